"""``gems::attention`` and its backward, as torch ops: ``attention`` has the device functions,
``lowering.attention`` writes the kernels.

Compile workers import this file without torch: torch is imported inside the functions.
"""

from __future__ import annotations

import math
from typing import Any

#: whose results' layouts ``like`` names: the overloads of ATen that compute attention
LIKE = ("flash", "efficient", "cudnn", "cpu")
#: what lse says of a query that sees no key: 0 is ATen's on a CPU, and infinity its flash kernel's;
#: with either all p = exp(s - lse) of the backward are 0, which -inf would make NaN
NOTHING_SEEN = {"flash": math.inf, "efficient": math.inf, "cudnn": math.inf, "cpu": 0.0}
#: what rows of lse are filled up to a multiple of
LSE_ROWS = {"flash": 1, "efficient": 32, "cudnn": 1, "cpu": 1}

_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? bias"
_HOW = "bool causal, int offset, float scale, bool tf32, str like"


def define(library: Any) -> None:
    """Register these on a torch Library.

    attention:          o = softmax(scale * q @ k^T + bias) @ v, lse = log(sum(exp(...)))
    attention_keys:     (dk, dv), of do and delta = sum(do * o, -1)
    attention_queries:  dq

    Shapes:  q [B, H, L, D]; k [B, G, S, D]; v [B, G, S, E]: G divides H, heads of queries that
             follow one another share one of keys; bias what broadcasts to [B, H, L, S];
             o, do [B, H, L, E]; delta [B, H, L, 1]; lse [B, H, L], see ``like``
    Dtypes:  float16, bfloat16 or float32, one for q, k, v and do; sums, delta and lse in float32
    causal:  query i sees keys up to i + ``offset``; one that sees none has 0
    tf32:    whether products of float32 may round their factors so
    like:    results lie as those of that overload of ATen do (``LIKE``); lse has its shape
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    back = f"Tensor do, {_GIVEN}, Tensor lse, Tensor delta, {_HOW}"
    library.define(f"attention({_GIVEN}, {_HOW}) -> (Tensor o, Tensor lse)", tags=tags)
    library.define(f"attention_keys({back}) -> (Tensor dk, Tensor dv)", tags=tags)
    library.define(f"attention_queries({back}) -> Tensor", tags=tags)
    for name, plain, room in (
        ("attention", _attention, _room),
        ("attention_keys", _keys, _room_for_keys),
        ("attention_queries", _queries, _room_for_queries),
    ):
        library.impl(name, plain, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gems::{name}", room, lib=library)


# layouts -----------------------------------------------------------------------------------------


def _room(q: Any, k: Any, v: Any, bias: Any, *how: Any) -> Any:
    import torch

    like = how[-1]
    batch, heads, length, _ = q.shape
    shape = (batch, heads, length, v.shape[-1])
    if like == "efficient":
        out = torch.empty_permuted(shape, (0, 2, 1, 3), dtype=q.dtype, device=q.device)
    elif shape == tuple(q.shape):
        out = torch.empty_like(q)
    else:  # in the order of q's
        order = sorted(range(4), key=lambda axis: -q.stride(axis))
        out = torch.empty_permuted(shape, order, dtype=q.dtype, device=q.device)
    rows = -(-length // LSE_ROWS[like]) * LSE_ROWS[like]
    if like == "cpu":
        lse = q.new_empty((batch, rows, heads), dtype=torch.float32).transpose(1, 2)
    else:
        last = (1,) if like == "cudnn" else ()
        lse = q.new_empty((batch, heads, rows, *last), dtype=torch.float32)
    return out, lse


def _room_for_gradient(x: Any, like: str) -> Any:
    import torch

    if like in ("flash", "cudnn"):
        return torch.empty_like(x)
    return torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device)


def _room_for_keys(do: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return _room_for_gradient(k, rest[-1]), _room_for_gradient(v, rest[-1])


def _room_for_queries(do: Any, q: Any, *rest: Any) -> Any:
    return _room_for_gradient(q, rest[-1])


# plain forms -------------------------------------------------------------------------------------


def _scores(q: Any, k: Any, bias: Any, causal: bool, offset: int, scale: float) -> Any:
    """[B, G, H / G, L, S], in float32 at least; -inf of what is not seen."""
    import torch

    s = _grouped(q, k) @ _wide(k).unsqueeze(2).mT * scale
    if bias is not None:
        shape = (*q.shape[:3], k.shape[2])
        s = s + bias.expand(shape).unflatten(1, s.shape[1:3])
    if causal:
        rows = torch.arange(q.shape[2], device=q.device)[:, None]
        seen = torch.arange(k.shape[2], device=q.device) <= rows + offset
        s = s.masked_fill(~seen, -math.inf)
    return s


def _wide(x: Any) -> Any:
    import torch

    return x if x.dtype == torch.float64 else x.float()


def _grouped(x: Any, k: Any) -> Any:
    """x [B, H, ...] as [B, G, H / G, ...]"""
    return _wide(x).unflatten(1, (k.shape[1], -1))


def _attention(
    q: Any, k: Any, v: Any, bias: Any, causal: bool, offset: int, scale: float, *how: Any
) -> Any:
    import torch

    s = _scores(q, k, bias, causal, offset, scale)
    largest = s.amax(-1, keepdim=True)
    e = torch.exp(s - torch.where(largest == -math.inf, 0, largest))
    total = e.sum(-1, keepdim=True)
    found = (e / torch.where(total == 0, 1, total)) @ _wide(v).unsqueeze(2)
    logarithm = torch.where(total == 0, NOTHING_SEEN[how[-1]], largest + torch.log(total))
    out, lse = _room(q, k, v, bias, *how)
    lse.fill_(math.inf)[:, :, : q.shape[2]].copy_(
        logarithm.flatten(1, 2).reshape(*q.shape[:3], *lse.shape[3:])
    )
    return out.copy_(found.flatten(1, 2)), lse


def _gradients(
    do: Any, q: Any, k: Any, v: Any, bias: Any, lse: Any, delta: Any, causal: bool, offset: int,
    scale: float,
) -> Any:  # fmt: skip
    """(p, ds), [B, G, H / G, L, S]"""
    import torch

    s = _scores(q, k, bias, causal, offset, scale)
    logarithm = _grouped(lse[:, :, : q.shape[2]].reshape(*q.shape[:3], 1), k)
    p = torch.where(s == -math.inf, 0, torch.exp(s - logarithm))
    dp = _grouped(do, k) @ _wide(v).unsqueeze(2).mT
    return p, p * (dp - _grouped(delta, k))


def _keys(*given: Any) -> Any:
    do, q, k = given[:3]
    p, ds = _gradients(*given[:-2])
    dk = (ds.mT @ _grouped(q, k)).sum(2) * given[-3]
    dv = (p.mT @ _grouped(do, k)).sum(2)
    room = _room_for_keys(*given)
    return room[0].copy_(dk), room[1].copy_(dv)


def _queries(*given: Any) -> Any:
    k = given[2]
    _, ds = _gradients(*given[:-2])
    dq = (ds @ _wide(k).unsqueeze(2)).flatten(1, 2) * given[-3]
    return _room_for_queries(*given).copy_(dq)
