"""Cross entropy of language models, by itself and with the projection to the vocabulary: see
``gems_compile.llm`` for what they take."""

from __future__ import annotations

import torch
from torch import Tensor

from .llm_ops import wide
from .own_ops import gradient_of, own_op

gems = torch.ops.gems

#: what to do with the losses of the rows, as ATen numbers it
NONE, MEAN, SUM = 0, 1, 2


def _capped(z: Tensor, softcap: float) -> Tensor:
    return (z / softcap).tanh() * softcap if softcap else z


def _losses(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row its loss [N], max(z) [N, 1] and log(sum(exp(z - max(z)))) [N, 1], and whether it
    counts [N]."""
    z = _capped(wide(logits), softcap)
    top, logsum = gems.log_softmax_stats.default(z, -1)
    counts = target != ignore_index
    # no kernel stops at a class that is none: its loss is NaN
    exists = (target >= 0) & (target < logits.shape[-1])
    place = torch.where(exists, target, 0).to(torch.int64).unsqueeze(-1)
    goal = _capped(wide(logits.gather(-1, place)), softcap)
    if smoothing:
        goal = (1 - smoothing) * goal + smoothing * z.mean(-1, keepdim=True)
    loss = torch.where(exists, (logsum - (goal - top)).squeeze(-1), float("nan"))
    return torch.where(counts, loss, 0.0), top, logsum, counts


def _dlogits(
    g: Tensor,
    logits: Tensor,
    target: Tensor,
    top: Tensor,
    logsum: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
) -> Tensor:
    """The gradient of the logits, where that of each row's loss is g [N]."""
    z = _capped(wide(logits), softcap)
    d = ((z - top) - logsum).exp()
    if smoothing:
        d = d - smoothing / logits.shape[-1]
    column = torch.arange(logits.shape[-1], device=logits.device)
    d = torch.where(column == target.unsqueeze(-1), d - (1 - smoothing), d)
    d = d * torch.where(target != ignore_index, g, 0.0).unsqueeze(-1)
    if softcap:
        d = d * (1 - (z / softcap).square())
    return d.to(logits.dtype)


@own_op(
    "cross_entropy(Tensor logits, Tensor target, int ignore_index, float label_smoothing,"
    " float softcap, int reduction) -> (Tensor loss, Tensor top, Tensor logsum, Tensor count)"
)
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, top, logsum, counts = _losses(logits, target, ignore_index, label_smoothing, softcap)
    count = counts.to(loss.dtype).sum()
    if reduction != NONE:
        loss = loss.sum()
    return loss / count if reduction == MEAN else loss, top, logsum, count


@gradient_of(
    cross_entropy,
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor top, Tensor logsum,"
    " Tensor count, int ignore_index, float label_smoothing, float softcap, int reduction)"
    " -> Tensor dlogits",
)
def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    top: Tensor,
    logsum: Tensor,
    count: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: int,
) -> Tensor:
    g = dloss / count if reduction == MEAN else dloss
    return _dlogits(g, logits, target, top, logsum, ignore_index, label_smoothing, softcap)


# with the projection -----------------------------------------------------------------------------


@own_op(
    "cross_entropy_with_gradient(Tensor logits, Tensor target, Tensor scale, int ignore_index,"
    " float label_smoothing, float softcap) -> (Tensor loss, Tensor dlogits)"
)
def cross_entropy_with_gradient(
    logits: Tensor,
    target: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, and the gradient of scale [] times that."""
    more = ignore_index, label_smoothing, softcap
    loss, top, logsum, _ = _losses(logits, target, *more)
    return loss.sum(), _dlogits(scale, logits, target, top, logsum, *more)


def _like_results(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: int,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    parts = (hidden, weight, bias)
    grads = [
        torch.empty(
            t.shape if t is not None and yes else (0,), dtype=hidden.dtype, device=hidden.device
        )
        for t, yes in zip(parts, wanted, strict=True)
    ]
    return hidden.new_empty((), dtype=dtype), grads[0], grads[1], grads[2]


def _all_logits(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: int,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, of which autograd computes the gradients."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    more = ignore_index, label_smoothing, softcap, reduction
    loss = gems.cross_entropy.default(logits, target, *more)[0]
    return loss, *(hidden.new_empty(0) for _ in wanted)


def rows_at_once(rows: int, classes: int, features: int) -> int:
    """How many rows' logits take about the memory of all rows' features; a power of 2, and as many
    as keep a matrix product busy."""
    share = max(rows * features // max(classes, 1), 1)
    return max(256, 1 << (share - 1).bit_length())


@own_op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? bias,"
    " int ignore_index, float label_smoothing, float softcap, int reduction, int chunk,"
    " bool[] wanted)"
    " -> (Tensor loss, Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)",
    fake=_like_results,
    transformed=_all_logits,
)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: int,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and, of the ``wanted`` ones of hidden, weight and bias, its gradients.

    There are ``chunk`` rows of logits at a time; 0: about as many bytes of them as of hidden.
    Gradients of 16-bit weights are added up in float32.
    """
    chunk = chunk or rows_at_once(hidden.shape[0], *weight.shape)
    given = hidden, weight, target, bias, ignore_index, label_smoothing, softcap, reduction
    total, dhidden, dweight, dbias = _like_results(*given, chunk, wanted)
    total.zero_()
    sums = [t if t.dtype == total.dtype else t.to(total.dtype) for t in (dweight, dbias)]
    for t in sums:
        t.zero_()
    count = (target != ignore_index).sum() if reduction == MEAN else target.new_ones(())
    scale = count.to(total.dtype).reciprocal()
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = torch.nn.functional.linear(hidden[part], weight, bias)
        loss, dlogits = gems.cross_entropy_with_gradient.default(
            logits, target[part], scale, ignore_index, label_smoothing, softcap
        )
        del logits
        total += loss
        if wanted[0]:
            torch.mm(dlogits, weight, out=dhidden[part])
        if wanted[1]:
            _add_product(sums[0], dlogits.t(), hidden[part])
        if wanted[2]:
            sums[1] += dlogits.sum(0, dtype=total.dtype)
    return total * scale, dhidden, sums[0].to(hidden.dtype), sums[1].to(hidden.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, added in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


@gradient_of(
    linear_cross_entropy,
    "linear_cross_entropy_backward(Tensor dloss, Tensor hidden_grad, Tensor weight_grad,"
    " Tensor bias_grad) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)
def linear_cross_entropy_backward(
    dloss: Tensor, hidden_grad: Tensor, weight_grad: Tensor, bias_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden_grad * dloss, weight_grad * dloss, bias_grad * dloss
