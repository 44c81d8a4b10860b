"""Attention by kernels of ours, behind ``scaled_dot_product_attention``: numbers and gradients
against float64, layouts against ATen's, and the machine code of the kernels without a GPU."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attentioncheck import (
    BFLOAT16,
    CUDNN,
    EFFICIENT,
    FLASH,
    FLOAT,
    HALF,
    assert_near,
    check,
    exact,
    operands,
    served,
)
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE, assert_same_metadata, gems_only, rand
from machine_code import assembly
from opcheck import options, trace
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gems_compile
from gems_compile.calls.attention import ATTENTION, completed, why_native
from gems_compile.calls.one_call import _compiled, in_clean_thread
from gems_compile.calls.operands import layout_of
from gems_compile.calls.sized import Steps
from gems_compile.config import Config
from gems_compile.kernels.fused import register_torch_ops
from gems_compile.kernels.target import INTERPRETER, current_target
from gems_compile.lowering.attention import Call, Tile, of_forward, tile_of
from gems_compile.lowering.decompose import whole_table
from gems_compile.lowering.ir import Declined, Value
from gems_compile.lowering.pipeline import compile_graph
from gems_compile.lowering.source import Source

CPU = "_scaled_dot_product_flash_attention_for_cpu"
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the overload is a CPU's")

SIZES = {
    "odd": (2, 3, 3, 37, 41, 24),
    "one query": (1, 2, 2, 1, 70, 16),
    "one key": (1, 2, 2, 19, 1, 16),
    "many blocks": (1, 2, 2, 300, 271, 16),
    "whole blocks": (1, 2, 2, 128, 256, 32),
    "width 80": (1, 2, 2, 33, 65, 80),
    "width 96": (1, 1, 1, 40, 33, 96),
    "width 192": (1, 1, 1, 33, 40, 192),
    "width 256": (1, 1, 1, 17, 20, 256),
    "width 8": (1, 2, 2, 20, 30, 8),
}


# on a CPU ----------------------------------------------------------------------------------------


@on_cpu
@gems_only
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes: tuple[int, ...], causal: bool) -> None:
    dtype = FLOAT if sizes[-1] <= 128 else HALF
    check(CPU, operands(sizes, dtype), causal=causal)


@on_cpu
@gems_only
@pytest.mark.parametrize("dtype", [BFLOAT16, HALF, FLOAT])
@pytest.mark.parametrize("inside", [False, True])
def test_dtypes_and_layouts(dtype: torch.dtype, inside: bool) -> None:
    check(CPU, operands((2, 4, 4, 45, 67, 40), dtype, inside), causal=True, scale=0.3)


@on_cpu
@gems_only
def test_parts_of_one_projection() -> None:
    """q, k and v as views of one tensor, of which ATen's results are dense."""
    whole = rand(2, 50, 3, 2, 16)
    q, k, v = (whole[:, :, part].transpose(1, 2).requires_grad_() for part in range(3))
    check(CPU, (q, k, v), causal=True)


BIASES = {
    "full": (2, 3, 37, 41),
    "of heads": (1, 3, 37, 41),
    "of keys": (2, 1, 1, 41),
    "of rows": (37, 1),
    "two dims": (37, 41),
}


@on_cpu
@gems_only
@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_bias(shape: tuple[int, ...]) -> None:
    check(CPU, operands(SIZES["odd"], FLOAT), bias=rand(*shape))


@on_cpu
@gems_only
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT16])
def test_queries_that_see_nothing(dtype: torch.dtype) -> None:
    bias = rand(37, 41)
    bias[5], bias[9, 3:], bias[36] = -math.inf, -math.inf, -math.inf
    check(CPU, operands(SIZES["odd"], dtype), bias=bias.to(dtype))


@on_cpu
@gems_only
def test_either_forward_goes_with_either_backward() -> None:
    """The logarithms of the sums are ATen's, so a graph may be recorded with ours off."""
    given = operands((1, 2, 2, 30, 21, 16), FLOAT)
    bias = rand(30, 21)
    bias[3] = -math.inf
    want, got = served(CPU, *(t.detach() for t in given), attn_mask=bias)
    assert_same_metadata(got[1], want[1])
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert got[1][0, 0, 3] == 0
    for first, second in ((True, False), (False, True)):
        with gems_compile.use_gems(only=[CPU] if first else [f"{CPU}_backward"]):
            out = F.scaled_dot_product_attention(*given, attn_mask=bias)
            if not second:
                gems_compile.disable()
            grads = torch.autograd.grad(out.square().sum(), given)
        right = exact(*given, bias, False, None)
        assert_near(grads, torch.autograd.grad(right.square().sum(), given), FLOAT)


@on_cpu
@gems_only
def test_heads_share_keys() -> None:
    """ATen's overload takes fewer heads of keys than of queries, as a GPU's do."""
    q, k, v = operands((2, 6, 2, 33, 45, 16), FLOAT)
    got = served(CPU, *(t.detach() for t in (q, k, v)), 0.0, True)[1]
    assert ours(CPU), whys(CPU)
    right = exact(q, k, v, None, True, None)
    assert_near([got[0]], [right], FLOAT)


@gems_only
@pytest.mark.parametrize("like", ["flash", "efficient", "cudnn", "cpu"])
@pytest.mark.parametrize(
    ("sizes", "offset", "biased"),
    [
        ((2, 6, 2, 33, 45, 16), 0, False),
        ((1, 4, 1, 140, 150, 24), 10, True),
        ((1, 2, 1, 70, 40, 16), -30, False),  # the first 30 queries see no key
    ],
)
def test_the_ops_themselves(sizes: tuple[int, ...], offset: int, biased: bool, like: str) -> None:
    """Kernels and plain forms, for what no overload of a CPU's asks: heads that share keys, and a
    mask whose diagonal lies elsewhere."""
    register_torch_ops()
    given = operands(sizes, FLOAT)
    seen = torch.ones(sizes[3], sizes[4], dtype=torch.bool, device=DEVICE).tril(offset)
    bias = rand(sizes[3], sizes[4]) if biased else torch.zeros(sizes[3], sizes[4], device=DEVICE)
    right = exact(*given, bias.masked_fill(~seen, -math.inf), False, 0.3)
    do = torch.randn_like(right).float()
    want = torch.autograd.grad(right, given, do.double())
    how = True, offset, 0.3, False, like
    more = [bias] if biased else []

    def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Any:
        return torch.ops.gems.attention.default(q, k, v, bias[0] if bias else None, *how)

    def backward(
        do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *b: Any
    ) -> Any:
        delta = (do * o).sum(-1, keepdim=True)
        inputs = do, q, k, v, b[0] if b else None, lse, delta, *how
        return torch.ops.gems.attention_queries.default(*inputs), *(
            torch.ops.gems.attention_keys.default(*inputs)
        )

    q, k, v = (t.detach() for t in given)
    plain, ours = forward(q, k, v, *more), compiled(forward, q, k, v, *more)
    for a, b in zip(ours, plain, strict=True):
        assert_same_metadata(a, b)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for run in (lambda f, *a: f(*a), compiled):
        assert_near([plain[0], *run(backward, do, *plain, q, k, v, *more)], [right, *want], FLOAT)


def compiled(fn: Any, *args: Tensor) -> Any:
    """What kernels of ours make of it."""
    run, report = compile_graph(trace(fn, *args), [], options(alone=True))
    assert not report.aten and not report.failures
    return run(list(args))


@on_cpu
@gems_only
def test_a_gradient_of_one_number() -> None:
    """That of a sum is expanded."""
    given = operands((1, 2, 2, 20, 20, 16), FLOAT)
    with gems_compile.use_gems(only=[CPU, f"{CPU}_backward"]):
        got = torch.autograd.grad(F.scaled_dot_product_attention(*given).sum(), given)
    assert ours(f"{CPU}_backward") == 1, whys(f"{CPU}_backward")
    want = torch.autograd.grad(exact(*given, None, False, None).sum(), given)
    assert_near(got, want, FLOAT)


@on_cpu
@gems_only
def test_what_is_atens() -> None:
    """With a reason, and ATen's numbers."""
    q, k, v = (t.detach() for t in operands((1, 2, 2, 20, 24, 16), FLOAT))
    cases: list[tuple[str, Sequence[Any], dict[str, Any]]] = [
        ("a scale of", (q, k, v), {"scale": -1.0}),
        ("attention of float64", (q.double(), k.double(), v.double()), {}),
        ("side by side", (q.mT.contiguous().mT, k, v), {}),
        ("up to 128", [torch.cat([t] * 9, -1) for t in (q, k, v)], {}),
    ]
    for why, args, how in cases:
        want, got = served(CPU, *args, **how)
        assert not ours(CPU)
        assert any(why in w for w in whys(CPU)), (why, whys(CPU))
        # ATen's kernel itself reads rows whose elements lie apart as if they did not
        alike = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert alike or args[0].stride(-1) != 1


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [
        (FLASH, {"dropout_p": 0.1}, "dropout"),
        (FLASH, {"return_debug_mask": True}, "mask of a dropout"),
        (FLASH, {"is_causal": True}, "diagonal"),
        (CUDNN, {"is_causal": True}, "diagonal"),
        (CUDNN, {"dropout_p": 0.1}, "dropout"),
        (EFFICIENT, {"dropout_p": 0.1}, "dropout"),
        (f"{EFFICIENT}_backward", {"grad_input_mask": [True] * 4}, "gradient of the bias"),
        (FLASH, {}, None),
        (EFFICIENT, {"is_causal": True}, None),
        (f"{EFFICIENT}_backward", {"grad_input_mask": [True, True, True, False]}, None),
    ],
)
def test_reasons(name: str, args: dict[str, Any], why: str | None) -> None:
    """Of calls on a GPU, asked without one."""
    q, k = torch.empty(1, 2, 8, 16, dtype=HALF), torch.empty(1, 2, 9, 16, dtype=HALF)
    overload = getattr(torch.ops.aten, name).default
    found = why_native(overload, (), {"query": q, "key": k, "value": k, **args}, INTERPRETER)
    assert (found is None) if why is None else (why in str(found))


@pytest.mark.parametrize(("queries", "few"), [(1, True), (64, True), (65, False), (4096, False)])
def test_few_queries(queries: int, few: bool) -> None:
    """A step of decoding: fewer programs than half of a GPU's multiprocessors."""
    target = dataclasses.replace(INTERPRETER, multiprocessors=132)
    q, k = (torch.empty(1, 40, n, 64, dtype=HALF, device="meta") for n in (queries, 5000))
    overload = getattr(torch.ops.aten, FLASH).default
    found = why_native(overload, (), {"query": q, "key": k, "value": k}, target)
    assert ("few queries" in str(found)) == few


@on_cpu
@gems_only
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", [FLASH, EFFICIENT, CUDNN])
def test_layouts_of_a_gpus_overloads(name: str, inside: bool, packed: bool) -> None:
    """As their meta functions say, and right: their rules, asked on a CPU."""
    q, k, v = (t.detach() for t in operands((2, 2, 2, 33, 33, 16), HALF, inside))
    if packed:
        q, k, v = (torch.cat([t] * 2, -1)[..., :16] for t in (q, k, v))
    bias = None if name == FLASH else rand(33, 33, dtype=HALF).expand(2, 2, 33, 33)
    more = () if name == FLASH else (bias, True)
    out, lse, *others = meta(name, q, k, v, *more)
    got = by_rule(name, q, k, v, *more)
    assert list(map(layout_of, got)) == list(map(layout_of, (out, lse)))
    do = torch.randn_like(got[0])
    saved = (*got, *others[:-1])
    if name == EFFICIENT:
        args = do, q, k, v, bias, *got, *others, 0.0, [True, True, True, False]
    elif name == CUDNN:
        args = do, q, k, v, *got, *others[4:6], bias, *others[:4], 0.0, False
    else:
        args = do, q, k, v, *saved[:6], 0.0, False, *saved[6:]
    grads = by_rule(f"{name}_backward", *args)
    want = [layout_of(t) for t in meta(f"{name}_backward", *args)[:3]]
    assert list(map(layout_of, grads)) == want
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    right = exact(leaves[0], leaves[1], leaves[2], bias, False, None)
    assert_near([got[0], *grads], [right, *torch.autograd.grad(right, leaves, do.double())], HALF)


def meta(name: str, *args: Any) -> Any:
    """What an overload's meta function makes of such arguments."""

    def one(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")

    return getattr(torch.ops.aten, name).default(*map(one, args))


def by_rule(name: str, *args: Any) -> Any:
    """What an overload's rule makes of them, here."""
    overload, target = getattr(torch.ops.aten, name).default, current_target()
    config = Config.from_call()

    def compile_step(make: Any) -> Any:
        return in_clean_thread(lambda: _compiled(make(), overload, target, config))

    return ATTENTION[overload](Steps(compile_step), *args)


def test_results_that_no_kernel_fills() -> None:
    """Of flash and cuDNN on a GPU: numbers, None, seeds; logarithms that are not asked for."""
    out, lse, seed = rand(2, 3), rand(2), torch.zeros(2, dtype=torch.uint64)
    native = (out, lse[:0], None, 7, seed, torch.empty((), dtype=torch.int64))
    mine = out + 1
    found = completed(lambda tensors: (mine, lse), native)([])
    assert found[0] is mine and found[1].shape == (0,) and found[2:4] == [None, 7]
    for a, b in zip(found[4:], native[4:], strict=True):
        assert a is not b
        assert_same_metadata(a, b)


# the kernels without a GPU ------------------------------------------------------------------------


def fakes(width: int, dtype: torch.dtype, causal: bool, bias: bool, group: int) -> list[Any]:
    """Graphs of the forward and of the backward, as large models have them."""
    register_torch_ops()
    how = causal, 0, width**-0.5, False, "flash"
    batch, heads, length = 2, 8, 1024
    with FakeTensorMode():
        rows = batch, length
        q, do = (torch.empty(*rows, heads, width, dtype=dtype).transpose(1, 2) for _ in range(2))
        k, v = (
            torch.empty(*rows, heads // group, width, dtype=dtype).transpose(1, 2) for _ in range(2)
        )
        lse, delta = torch.empty(batch, heads, length), torch.empty(batch, heads, length, 1)
        biases = [torch.empty(batch, 1, length, length, dtype=dtype)] if bias else []

        def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Any:
            return torch.ops.gems.attention.default(q, k, v, bias[0] if bias else None, *how)

        def backward(
            do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *bias: Tensor
        ) -> Any:
            given = do, q, k, v, bias[0] if bias else None, lse, delta, *how
            dk_and_dv = torch.ops.gems.attention_keys.default(*given)
            return *dk_and_dv, torch.ops.gems.attention_queries.default(*given)

        table = whole_table()
        return [
            make_fx(forward, decomposition_table=table)(q, k, v, *biases),
            make_fx(backward, decomposition_table=table)(do, q, k, v, lse, delta, *biases),
        ]


def kernels(*how: Any) -> list[Source]:
    """As an H100 would get them."""
    facts = {"multiprocessors": 132, "backend": "cuda", "arch": 90, "shared": 227 * 2**10}
    target = dataclasses.replace(INTERPRETER, **facts)
    made = []
    for graph in fakes(*how):
        report = compile_graph(graph, [], options(target=target, alone=True))[1]
        assert not report.aten
        made += report.sources
    return made


@gems_only
@pytest.mark.parametrize(
    ("width", "dtype", "causal", "bias", "group"),
    [
        (64, BFLOAT16, True, False, 1),
        (64, HALF, False, True, 1),
        (128, BFLOAT16, False, False, 1),
        (128, HALF, True, False, 4),
        (256, BFLOAT16, True, False, 1),
        (64, FLOAT, True, False, 1),
    ],
)
def test_machine_code(
    width: int, dtype: torch.dtype, causal: bool, bias: bool, group: int, tmp_path: Any
) -> None:
    """Products on tensor cores, keys and values copied ahead of them in pieces of 16 bytes (if any
    are), and no more shared memory than a multiprocessor has."""
    found = kernels(width, dtype, causal, bias, group)
    names = ["attention_forward", "attention_backward_keys", "attention_backward_queries"]
    assert [s.name for s in found] == names
    for source in found:
        text = assembly(source, tmp_path)
        assert "wgmma.mma_async" in text, source.name
        ahead = re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)
        assert bool(ahead) == (source.meta["num_stages"] > 1), source.name
        assert shared_bytes(source, tmp_path) <= 227 * 2**10


def shared_bytes(source: Source, folder: Any) -> int:
    import json

    return int(json.loads((folder / f"{source.name}.json").read_text())["shared"])


@gems_only
def test_one_kernel_for_all_lengths() -> None:
    """A length is a number that the kernel is given, and so are strides of batches and heads."""
    texts = set()
    for length in (500, 1000, 4096):
        with FakeTensorMode():
            q = torch.empty(2, length, 4, 64, dtype=HALF, device=DEVICE).transpose(1, 2)
        gm = make_fx(
            lambda q: torch.ops.gems.attention.default(
                q, q, q, None, True, 0, 0.125, False, "flash"
            ),
            decomposition_table=whole_table(),
            tracing_mode="fake",
        )(q)
        report = compile_graph(gm, [], options(alone=True))[1]
        texts |= {source.key for source in report.sources}
    assert len(texts) == 1


@gems_only
def test_layers_alike_in_one_graph() -> None:
    """The logarithms are not wanted, and still have their place; one kernel serves both layers."""
    how = True, 0, 0.25, False, "efficient"

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = torch.ops.gems.attention.default(q, k, v, None, *how)[0]
        return torch.ops.gems.attention.default(first, k, v, None, *how)[0] * 2

    register_torch_ops()
    q, k, v = (rand(1, 33, 2, 16).transpose(1, 2) for _ in range(3))
    gm = trace(layers, q, k, v)
    compiled, report = compile_graph(gm, [], options(alone=True))
    assert report.launches == 3 and not report.aten and not report.failures
    assert len({source.key for source in report.sources}) == 2
    want = exact(exact(q, k, v, None, True, 0.25), k, v, None, True, 0.25) * 2
    assert_near([compiled([q, k, v])[0]], [want], FLOAT)


@pytest.mark.parametrize("shared", [227, 163, 99, 64])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("which", ["forward", "keys", "queries"])
def test_tiles_fit(which: str, width: int, shared: int) -> None:
    target = dataclasses.replace(INTERPRETER, shared=shared * 2**10)
    for dtype in ("bfloat16", "float32"):
        if dtype == "float32" and width > 128:
            continue
        x = Value("buffer", None, (), (1, 1, 4096, width), dtype)
        tile = tile_of(which, x, x, x, target)
        block = max(16, 1 << (width - 1).bit_length())
        stays, moves = (tile.keys, tile.queries) if which == "keys" else (tile.queries, tile.keys)
        rows = (1 if which == "forward" else 2) * stays + 2 * tile.stages * moves
        assert rows * block * (4 if dtype == "float32" else 2) <= target.shared
        assert isinstance(tile, Tile) and min(tile.queries, tile.keys) >= 16


def test_shapes_that_do_not_fit() -> None:
    def value(*shape: int) -> Value:
        return Value("buffer", None, (), shape, "float16")

    how = False, 0, 1.0, False, "efficient"
    q, k = value(2, 4, 8, 16), value(2, 4, 9, 16)
    assert of_forward(q, k, k, value(4, 1, 9), *how) == Call(True, *how)
    for bad in (value(2, 3, 9, 16), value(1, 4, 9, 16), value(2, 4, 9, 8)):
        with pytest.raises(Declined):
            of_forward(q, bad, bad, None, *how)
    with pytest.raises(Declined, match="a bias of"):
        of_forward(q, k, k, value(8, 8), *how)
