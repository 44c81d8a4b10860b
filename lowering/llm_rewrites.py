"""Rewrites that put ops of language models in place of what models write: see ``rewrites.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.op import T
from . import llm_losses, llm_ops  # noqa: F401 (they register the ops that replacements call)
from .graph import is_tensor, value_of
from .rewrite import Match, Rewrite, either, o, sample, through

aten, gems = torch.ops.aten, torch.ops.gems

_WIDE = (torch.float32, torch.float64)

# --- routing -----------------------------------------------------------------------------------

#: a row is searched k times: for routers, not for vocabularies
MOST_EXPERTS, MOST_CHOSEN = 1024, 16


def routing_pattern(logits: Any, dim: Any, k: Any, over: Any, largest: Any, order: Any) -> Any:
    """Mixtral, Qwen's experts: topk(softmax(logits), k); weights may be divided by their sum."""
    return o.topk(o.softmax(through("cast", logits), dim), k, over, largest, order)


def routing(
    match: Match, logits: Any, dim: Any, k: Any, over: Any, largest: Any, order: Any
) -> Any:
    return gems.topk_softmax.default(logits, k, False)


def check_routing(match: Match) -> str | None:
    logits, k = match.value("logits"), match["k"]
    scores = value_of(match.read("softmax")[0][0])
    if not is_tensor(logits) or not logits.dtype.is_floating_point or logits.dim() < 1:
        return "the logits are no tensor of floats"
    last = logits.dim() - 1
    if any(type(d) is not int or d % logits.dim() != last for d in (match["dim"], match["over"])):
        return "softmax or topk does not run over the last dim"
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    casts = [value_of(node).dtype for node, _ in match.read("cast")]
    if any(dtype != wide for dtype in (scores.dtype, *casts)):
        return f"the scores are {scores.dtype}, which rounds before topk chooses"
    experts = logits.shape[-1]
    if type(experts) is not int or experts > MOST_EXPERTS:
        return f"a row has {experts} entries; at most {MOST_EXPERTS} are searched again and again"
    if type(k) is not int or not 1 <= k <= min(MOST_CHOSEN, experts):
        return f"k is {k}, no number from 1 to {MOST_CHOSEN}"
    return None if match["largest"] is True else "the smallest entries are chosen"


def _mixtral_router(logits: Any) -> Any:
    weights = F.softmax(logits, dim=1, dtype=torch.float)
    weights, _ = torch.topk(weights, 2, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype)


def _qwen_router(logits: Any) -> Any:
    weights, chosen = logits.float().softmax(-1).topk(3, -1)
    return weights * 2, torch.gather(logits.float(), -1, chosen)


def _scores_used(logits: Any) -> Any:
    scores = F.softmax(logits, dim=-1, dtype=torch.float)
    return scores.topk(2, -1)[0], scores.mean(0)


def _softmax_over_tokens(logits: Any) -> Any:
    return F.softmax(logits, dim=0, dtype=torch.float).topk(2, -1)[0]


def _smallest(logits: Any) -> Any:
    return F.softmax(logits, dim=-1, dtype=torch.float).topk(2, -1, largest=False)[0]


def _vocabulary(logits: Any) -> Any:
    return F.softmax(logits, dim=-1, dtype=torch.float).topk(2, -1)[0]


def _half_of_all(logits: Any) -> Any:
    return F.softmax(logits, dim=-1, dtype=torch.float).topk(20, -1)[0]


ROUTING = Rewrite(
    name="routing",
    pattern=routing_pattern,
    replacement=routing,
    because="a kernel that reads a row once chooses the experts, where ATen's topk is a call",
    samples=(sample(_mixtral_router, T(6, 8)), sample(_qwen_router, T(2, 5, 16))),
    leaves_alone=(
        sample(_scores_used, T(6, 8)),
        sample(_softmax_over_tokens, T(6, 8)),
        sample(_smallest, T(6, 8)),
        sample(_vocabulary, T(2, 1100)),
        sample(_half_of_all, T(2, 40)),
    ),
    check=check_routing,
)

# --- cross entropy of a projection ---------------------------------------------------------------


def linear_cross_entropy_pattern(
    hidden: Any, weight: Any, bias: Any, part: Any, target: Any, ignore_index: Any, reduction: Any,
    smoothing: Any,
) -> Any:  # fmt: skip
    """cross_entropy(linear(hidden, weight, bias)[..., :-1, :]), of all rows or without the last."""
    logits = through("cast", "reshape", o.linear(hidden, weight, bias))
    rows = through("cast", "reshape", either(o.part(logits, part), logits))
    return o.cross_entropy(rows, target, None, None, ignore_index, None, reduction, smoothing)


def linear_cross_entropy(
    match: Match, hidden: Any, weight: Any, bias: Any, part: Any, target: Any, ignore_index: Any,
    reduction: Any, smoothing: Any,
) -> Any:  # fmt: skip
    """The op of ``llm.linear_cross_entropy``; autocast's casts stand in the graph."""
    dtype, used = _logits(match).dtype, value_of(match.root).requires_grad
    values = [match.value(name) for name in ("hidden", "weight", "bias")]
    wanted = [used and v is not None and v.requires_grad for v in values]
    hidden, weight, bias = (
        p if v is None or v.dtype == dtype else aten._to_copy.default(p, dtype=dtype)
        for p, v in zip((hidden, weight, bias), values, strict=True)
    )
    if part is not None:
        hidden = hidden[part]
    number = llm_losses.MEAN if reduction == "mean" else llm_losses.SUM
    return gems.linear_cross_entropy.default(
        aten.flatten.using_ints(hidden, 0, -2), weight, target, bias, ignore_index,
        float(smoothing), 0.0, number, 0, wanted,
    )[0]  # fmt: skip


def _logits(match: Match) -> Any:
    return value_of(match.read("linear")[0][0])


def check_linear_cross_entropy(match: Match) -> str | None:
    hidden, target, loss = match.value("hidden"), match.value("target"), value_of(match.root)
    if not (is_tensor(hidden) and is_tensor(target) and is_tensor(match.value("weight"))):
        return "the graph holds no value for an operand"
    if hidden.dim() < 2 or target.dim() != 1 or target.dtype not in (torch.int64, torch.int32):
        return "targets are no vector of classes, or there is one row alone"
    if match["reduction"] not in ("mean", "sum"):
        return f"reduction is {match['reduction']!r}: each row's loss is wanted"
    if type(match["ignore_index"]) is not int or type(match["smoothing"]) not in (int, float):
        return "ignore_index or label_smoothing is no number"
    if _logits(match).dtype == torch.float16:
        return "the logits are float16, whose gradients a scaled loss keeps from vanishing"
    casts = [value_of(node).dtype for node, _ in match.read("cast")]
    if loss.dtype not in _WIDE or any(dtype != loss.dtype for dtype in casts):
        return f"the loss is rounded to {loss.dtype}"
    for _, reading in match.read("part"):
        if value_of(reading.args[0]).dim() != hidden.dim():
            return "rows are left out after they were put in one dim"
    return None


def _causal_loss(hidden: Any, weight: Any) -> Any:
    labels = torch.arange(12, device=hidden.device).view(2, 6) % weight.shape[0]
    logits = F.linear(hidden, weight).float()[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, weight.shape[0]), labels[..., 1:].reshape(-1))


def _padded_loss(hidden: Any, weight: Any, bias: Any) -> Any:
    labels = torch.arange(12, device=hidden.device).view(2, 6) % weight.shape[0]
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    logits = F.linear(hidden, weight, bias).view(-1, weight.shape[0]).float()
    return F.cross_entropy(logits, labels.view(-1), reduction="sum", label_smoothing=0.1)


def _target(rows: int, weight: Any) -> Any:
    return torch.arange(rows, device=weight.device) % weight.shape[0]


def _logits_returned(hidden: Any, weight: Any) -> Any:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, _target(6, weight)), logits


def _losses_of_rows(hidden: Any, weight: Any) -> Any:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, _target(6, weight), reduction="none")


def _classes_weighted(hidden: Any, weight: Any) -> Any:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, _target(6, weight), weight=weight[:, 0].abs().float())


def _capped(hidden: Any, weight: Any) -> Any:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(torch.tanh(logits / 30) * 30, _target(6, weight))


def _probabilities(hidden: Any, weight: Any) -> Any:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, F.one_hot(_target(6, weight), 9).float())


def _classes_reshaped(hidden: Any, weight: Any) -> Any:
    logits = F.linear(hidden, weight).float().view(-1, 3)
    return F.cross_entropy(logits, torch.arange(18, device=hidden.device) % 3)


_ROWS = (T(6, 16), T(9, 16))

LINEAR_CROSS_ENTROPY = Rewrite(
    name="linear_cross_entropy",
    pattern=linear_cross_entropy_pattern,
    replacement=linear_cross_entropy,
    because="some rows' logits are in memory at a time, and forward computes their gradients",
    samples=(
        sample(_causal_loss, T(2, 6, 16), T(9, 16)),
        sample(_padded_loss, T(2, 6, 16), T(9, 16), T(9)),
    ),
    leaves_alone=(
        sample(_logits_returned, *_ROWS),
        sample(_losses_of_rows, *_ROWS),
        sample(_classes_weighted, *_ROWS),
        sample(_capped, *_ROWS),
        sample(_probabilities, *_ROWS),
        sample(_classes_reshaped, *_ROWS),
    ),
    check=check_linear_cross_entropy,
)
