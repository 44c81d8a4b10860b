"""Attention without its matrix of scores: o = softmax(scale * q @ k^T + bias) @ v.

FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691). A program has a block of rows of one
head and walks over blocks of the other side. Exponents are of base 2, with the scale folded in;
scores and sums are float32. The backward has one kernel that walks over queries (the gradients of
keys and values) and one over keys (those of queries): nothing is added up by atomics, so the same
call gives the same bits. Each walk is in two parts, of blocks that need no mask and of those that
do.

The functions here see one head: pointers to its first element, and how far apart its rows are.
``lowering.attention`` writes the kernels that call them.

``attention_ops`` has the torch ops. Compile workers import this file: it knows no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))

# ---------------------------------------------------------------------------------------- forward


@triton.jit
def tile(
    x, first, end, row, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALL: tl.constexpr
):
    """x[first : first + ROWS, :COLS]; zeros from row ``end`` (unless ALL) and column D on."""
    n, d = tl.arange(0, ROWS), tl.arange(0, COLS)
    # 64 bits for the block's place alone: what is within a block are numbers of 32 bits
    where = x + tl.cast(first, tl.int64) * row + (n[:, None] * row + d[None, :])
    if ALL and COLS == D:
        value = tl.load(where)
    elif ALL:
        value = tl.load(where, mask=(d < D)[None, :], other=0.0)
    elif COLS == D:
        value = tl.load(where, mask=(first + n < end)[:, None], other=0.0)
    else:
        value = tl.load(where, mask=(first + n < end)[:, None] & (d < D)[None, :], other=0.0)
    return value


@triton.jit
def put(x, value, first, end, row, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store a tile where ``tile`` would read it."""
    n, d = tl.arange(0, ROWS), tl.arange(0, COLS)
    where = x + tl.cast(first, tl.int64) * row + (n[:, None] * row + d[None, :])
    inside = (first + n < end)[:, None] & (d < D)[None, :]
    tl.store(where, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def biased(s, bias, rows, columns, n_q, n_k, bias_row, bias_column, scale):
    """scale * s + bias in base 2; ``rows`` and ``columns`` are of one shape with s, broadcast."""
    where = bias + rows.to(tl.int64) * bias_row + columns.to(tl.int64) * bias_column
    b = tl.load(where, mask=(rows < n_q) & (columns < n_k), other=0.0).to(tl.float32)
    return tl.fma(s, scale, b * LOG2E)


@triton.jit
def seen_by(
    first, n_k, n_whole, offset,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(Where blocks of keys end that all queries of the block see, where all that any sees end).

    ``n_whole``: n_k as a multiple of BLOCK_N, a number that the kernel is given. A compiler that
    can tell that only one block is left makes no loop of it, and matrix products wait for each
    other.
    """
    whole, end = n_whole, n_k
    if CAUSAL:
        whole = tl.maximum(tl.minimum(n_whole, (first + 1 + offset) // BLOCK_N * BLOCK_N), 0)
        end = tl.maximum(tl.minimum(n_k, first + BLOCK_M + offset), 0)
    return whole, end


@triton.jit
def over_keys(
    acc, total, most, q, k, v, bias, first, start, end, n_q, n_k, offset,
    k_row, v_row, bias_row, bias_column, scale,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, EMPTY: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(acc, total, most) after the keys in [start, end): sums of p * v and of p = 2^(s - most), and
    the largest score, of each query. EMPTY: there may be queries that see no key."""
    rows = first + tl.arange(0, BLOCK_M)
    for now in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        columns = now + tl.arange(0, BLOCK_N)
        keys = tile(k, now, n_k, k_row, D, BLOCK_N, BLOCK_D, not MASKED)
        s = tl.dot(q, tl.trans(keys), input_precision=DOT)
        if BIAS:
            s = biased(
                s, bias, rows[:, None], columns[None, :], n_q, n_k, bias_row, bias_column, scale
            )
        if MASKED:
            seen = (columns < n_k)[None, :]
            if CAUSAL:
                seen = seen & (columns[None, :] <= rows[:, None] + offset)
            s = tl.where(seen, s, -INFINITY)
        now_most = tl.maximum(most, tl.max(s, 1) if BIAS else tl.max(s, 1) * scale)
        less = now_most
        if EMPTY:
            less = tl.where(now_most == -INFINITY, 0.0, now_most)
        p = tl.exp2(s - less[:, None] if BIAS else tl.fma(s, scale, -less[:, None]))
        shrink = tl.exp2(most - less)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        values = tile(v, now, n_k, v_row, DV, BLOCK_N, BLOCK_DV, not MASKED)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=DOT)
        most = now_most
    return acc, total, most


@triton.jit
def forward(
    q, k, v, bias, out, lse, first, n_q, n_k, n_whole, n_lse, offset,
    q_row, k_row, v_row, out_row, lse_row, bias_row, bias_column, scale,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, EMPTY: tl.constexpr, LSE_EMPTY: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rows of ``out`` and ``lse`` from ``first`` on, of one head.

    Query i sees keys up to i + offset (CAUSAL), or all. ``scale`` is in base 2. A query that sees
    none has 0 and LSE_EMPTY; rows of lse from n_q to n_lse infinity.
    """
    rows = first + tl.arange(0, BLOCK_M)
    queries = tile(q, first, n_q, q_row, D, BLOCK_M, BLOCK_D, False)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    most = tl.full([BLOCK_M], -INFINITY, tl.float32)
    whole, end = seen_by(first, n_k, n_whole, offset, CAUSAL, BLOCK_M, BLOCK_N)
    acc, total, most = over_keys(
        acc, total, most, queries, k, v, bias, first, 0, whole, n_q, n_k, offset,
        k_row, v_row, bias_row, bias_column, scale, BIAS, CAUSAL, EMPTY, False,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, DOT,
    )  # fmt: skip
    acc, total, most = over_keys(
        acc, total, most, queries, k, v, bias, first, whole, end, n_q, n_k, offset,
        k_row, v_row, bias_row, bias_column, scale, BIAS, CAUSAL, EMPTY, True,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, DOT,
    )  # fmt: skip
    logarithm = (most + tl.log2(total)) / LOG2E
    if EMPTY:
        logarithm = tl.where(total == 0.0, LSE_EMPTY, logarithm)
        total = tl.where(total == 0.0, 1.0, total)
    put(out, acc / total[:, None], first, n_q, out_row, DV, BLOCK_M, BLOCK_DV)
    logarithm = tl.where(rows < n_q, logarithm, INFINITY)
    tl.store(lse + rows.to(tl.int64) * lse_row, logarithm, mask=rows < n_lse)


# --------------------------------------------------------------------------------------- backward


@triton.jit
def statistics(lse, delta, rows, n_q, lse_row, delta_row):
    """(lse in base 2, delta) of these rows; infinity where there is no row, or it sees no key."""
    inside = rows < n_q
    one = tl.load(lse + rows.to(tl.int64) * lse_row, mask=inside, other=INFINITY)
    one = tl.where(one == -INFINITY, INFINITY, one)
    return one * LOG2E, tl.load(delta + rows.to(tl.int64) * delta_row, mask=inside, other=0.0)


@triton.jit
def over_queries(
    dk, dv, k, v, do, q, bias, lse, delta, first, start, end, n_q, n_k, offset,
    do_row, q_row, lse_row, delta_row, bias_row, bias_column, scale,
    BIAS: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(dk, dv) with what queries in [start, end) add; scores are transposed: [BLOCK_N, BLOCK_M].

    Keys from n_k on have rows of their own, which are not stored: they need no mask.
    """
    columns = first + tl.arange(0, BLOCK_N)
    for now in tl.range(start, end, BLOCK_M, num_stages=STAGES):
        rows = now + tl.arange(0, BLOCK_M)
        queries = tile(q, now, n_q, q_row, D, BLOCK_M, BLOCK_D, False)
        logarithm, less = statistics(lse, delta, rows, n_q, lse_row, delta_row)
        s = tl.dot(k, tl.trans(queries), input_precision=DOT)
        if BIAS:
            s = biased(
                s, bias, rows[None, :], columns[:, None], n_q, n_k, bias_row, bias_column, scale
            )
            p = tl.exp2(s - logarithm[None, :])
        else:
            p = tl.exp2(tl.fma(s, scale, -logarithm[None, :]))
        if MASKED:
            p = tl.where(columns[:, None] <= rows[None, :] + offset, p, 0.0)
        gradient = tile(do, now, n_q, do_row, DV, BLOCK_M, BLOCK_DV, False)
        dv = tl.dot(p.to(gradient.dtype), gradient, dv, input_precision=DOT)
        dp = tl.dot(v, tl.trans(gradient), input_precision=DOT)
        ds = p * (dp - less[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=DOT)
    return dk, dv


@triton.jit
def backward_keys(
    do, q, k, v, bias, lse, delta, dk_out, dv_out, first, n_q, n_k, offset,
    do_head, q_head, lse_head, delta_head, bias_head,
    do_row, q_row, k_row, v_row, lse_row, delta_row, bias_row, bias_column,
    dk_row, dv_row, scale, natural,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rows of dk and dv from ``first`` on, of one head of keys: sums over its GROUP heads of
    queries, of which do, q, lse, delta and bias are the first one's."""
    keys = tile(k, first, n_k, k_row, D, BLOCK_N, BLOCK_D, False)
    values = tile(v, first, n_k, v_row, DV, BLOCK_N, BLOCK_DV, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for _ in tl.range(0, GROUP, num_stages=1):
        start = 0
        if CAUSAL:
            start = tl.maximum(first - offset, 0) // BLOCK_M * BLOCK_M
            whole = tl.maximum(first + BLOCK_N - 1 - offset, 0)
            whole = tl.minimum((whole + BLOCK_M - 1) // BLOCK_M * BLOCK_M, n_q)
            dk, dv = over_queries(
                dk, dv, keys, values, do, q, bias, lse, delta, first, start, whole, n_q, n_k,
                offset, do_row, q_row, lse_row, delta_row, bias_row, bias_column, scale, BIAS, True,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, DOT,
            )  # fmt: skip
            start = whole
        dk, dv = over_queries(
            dk, dv, keys, values, do, q, bias, lse, delta, first, start, n_q, n_q, n_k, offset,
            do_row, q_row, lse_row, delta_row, bias_row, bias_column, scale, BIAS, False,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, DOT,
        )  # fmt: skip
        do += do_head
        q += q_head
        lse += lse_head
        delta += delta_head
        if BIAS:
            bias += bias_head
    put(dk_out, dk * natural, first, n_k, dk_row, D, BLOCK_N, BLOCK_D)
    put(dv_out, dv, first, n_k, dv_row, DV, BLOCK_N, BLOCK_DV)


@triton.jit
def gradient_over_keys(
    dq, q, do, logarithm, less, k, v, bias, first, start, end, n_q, n_k, offset,
    k_row, v_row, bias_row, bias_column, scale,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq with what keys in [start, end) add."""
    rows = first + tl.arange(0, BLOCK_M)
    for now in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        columns = now + tl.arange(0, BLOCK_N)
        keys = tile(k, now, n_k, k_row, D, BLOCK_N, BLOCK_D, not MASKED)
        values = tile(v, now, n_k, v_row, DV, BLOCK_N, BLOCK_DV, not MASKED)
        s = tl.dot(q, tl.trans(keys), input_precision=DOT)
        if BIAS:
            s = biased(
                s, bias, rows[:, None], columns[None, :], n_q, n_k, bias_row, bias_column, scale
            )
            p = tl.exp2(s - logarithm[:, None])
        else:
            p = tl.exp2(tl.fma(s, scale, -logarithm[:, None]))
        if MASKED:
            seen = (columns < n_k)[None, :]
            if CAUSAL:
                seen = seen & (columns[None, :] <= rows[:, None] + offset)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(values), input_precision=DOT)
        ds = p * (dp - less[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=DOT)
    return dq


@triton.jit
def backward_queries(
    do, q, k, v, bias, lse, delta, dq_out, first, n_q, n_k, n_whole, offset,
    do_row, q_row, k_row, v_row, lse_row, delta_row, bias_row, bias_column, dq_row, scale, natural,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rows of dq from ``first`` on, of one head."""
    queries = tile(q, first, n_q, q_row, D, BLOCK_M, BLOCK_D, False)
    gradient = tile(do, first, n_q, do_row, DV, BLOCK_M, BLOCK_DV, False)
    rows = first + tl.arange(0, BLOCK_M)
    logarithm, less = statistics(lse, delta, rows, n_q, lse_row, delta_row)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole, end = seen_by(first, n_k, n_whole, offset, CAUSAL, BLOCK_M, BLOCK_N)
    dq = gradient_over_keys(
        dq, queries, gradient, logarithm, less, k, v, bias, first, 0, whole, n_q, n_k, offset,
        k_row, v_row, bias_row, bias_column, scale, BIAS, CAUSAL, False,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, DOT,
    )  # fmt: skip
    dq = gradient_over_keys(
        dq, queries, gradient, logarithm, less, k, v, bias, first, whole, end, n_q, n_k, offset,
        k_row, v_row, bias_row, bias_column, scale, BIAS, CAUSAL, True,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, DOT,
    )  # fmt: skip
    put(dq_out, dq * natural, first, n_q, dq_row, D, BLOCK_M, BLOCK_D)
