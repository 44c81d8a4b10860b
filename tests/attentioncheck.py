"""What the tests of attention share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from eagercheck import ours, whys
from helpers import DEVICE, assert_same_metadata, rand
from torch import Tensor

import gems_compile

BFLOAT16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
#: of what float64 gives: units in the last place of the largest one, for p is rounded to the dtype
ULPS = {BFLOAT16: 3 * 2**-8, HALF: 3 * 2**-11, FLOAT: 5e-6}
#: what float64 leaves of a difference of equal numbers
NOTHING = 1e-12
FLASH, EFFICIENT, CUDNN = (
    f"_scaled_dot_product_{n}_attention" for n in ("flash", "efficient", "cudnn")
)


def operands(
    sizes: tuple[int, ...], dtype: torch.dtype, inside: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of (batch, heads, heads of keys, queries, keys, width); ``inside``: heads within the
    rows, as a linear layer leaves them."""
    batch, heads, shared, length, keys, width = sizes
    found = []
    for many, rows in ((heads, length), (shared, keys), (shared, keys)):
        x = rand(batch, rows, many, width, dtype=dtype).transpose(1, 2)
        found.append((x if inside else x.contiguous()).requires_grad_())
    return found[0], found[1], found[2]


def exact(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """In float64; what sees nothing is 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    s = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias.double()
    if causal:
        s = s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril(), -math.inf)
    none = (s == -math.inf).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(none, 0), -1).masked_fill(none, 0) @ v


def assert_near(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype) -> None:
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert not a.isnan().any(), f"result {k}"
        off, most = (t.double().abs().max().item() for t in (a.double() - b.double(), b))
        # of one key the gradients of queries are differences of equal numbers, of about 1
        bound = ULPS[dtype] * (most if most > NOTHING else 1.0)
        assert off <= bound, f"result {k}: {off:.2g} of {most:.2g}"


def check(
    name: str,
    given: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> None:
    """Results and gradients through ``scaled_dot_product_attention``: ours, right, laid out as
    ATen's, and the same bits each time."""
    gqa = given[0].shape[1] != given[1].shape[1]

    def run() -> list[Tensor]:
        how = {"attn_mask": bias, "is_causal": causal, "scale": scale, "enable_gqa": gqa}
        out = F.scaled_dot_product_attention(*given, **how)
        return [out, *torch.autograd.grad(out, given, gradient)]

    want = exact(*given, bias, causal, scale)
    gradient = torch.randn(want.shape, device=DEVICE).to(given[0].dtype)
    right = [want, *torch.autograd.grad(want, given, gradient.double())]
    native = run()
    with gems_compile.use_gems(only=[name, f"{name}_backward"]):
        got, again = run(), run()
    for served in (name, f"{name}_backward"):
        assert ours(served) == 2, whys(served)
    for a, b, c in zip(got, native, again, strict=True):
        assert_same_metadata(a.detach(), b.detach())
        assert torch.equal(a, c)
    assert_near(got, right, given[0].dtype)


def served(name: str, *args: Any, **kwargs: Any) -> Any:
    """(ATen's, ours) of an overload called by itself."""
    overload = getattr(torch.ops.aten, name).default
    want = overload(*args, **kwargs)
    with gems_compile.use_gems(only=[name]):
        got = overload(*args, **kwargs)
    return want, got
