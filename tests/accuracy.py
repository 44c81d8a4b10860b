"""How near results are to float64, and whether that is as near as eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import assert_same_bits, assert_same_values
from torch import Tensor
from torch.utils._pytree import tree_map


def in_float64(tree: Any, floats_only: bool) -> Any:
    """The same arguments on the CPU in float64; integers too unless ``floats_only``."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu()
            wide = leaf.is_floating_point() or not (floats_only or leaf.dtype == torch.bool)
            return leaf.double() if wide else leaf
        if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return torch.float64
        return leaf

    return tree_map(one, tree)


def ulp(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next number of ``dtype`` at each of t's (float64) magnitudes."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(t.abs().clamp(min=info.tiny, max=info.max)).exponent - 1
    return torch.ldexp(torch.full_like(t, info.eps), exponent)


def assert_accurate(
    got: Tensor,
    eager: Tensor,
    exact: Tensor,
    name: str,
    scale: str = "element",
    usual: Callable[[], float] | None = None,
    least: float = 1.0,
) -> None:
    """Infinities and NaNs where eager has them; elsewhere no more than twice eager's error against
    float64, or one unit in the last place. Integers and truth values are equal.

    ``scale``: "element" counts each error in ulps of its own element; "tensor" in ulps of the
    largest one, as the error of a sum goes with its terms and not with what they leave.
    ``usual`` tells eager's error on more data, for few results that eager may be lucky with.
    """
    got, eager, exact = got.detach().cpu(), eager.detach().cpu(), exact.detach().cpu()
    if eager.is_complex():
        got, eager, exact = (torch.view_as_real(t.resolve_conj()) for t in (got, eager, exact))
    if not eager.is_floating_point():
        wrong = (got != eager).nonzero().tolist()
        assert not wrong, f"{name}: {len(wrong)} of {eager.numel()} differ, first at {wrong[0]}"
        return
    if exact.shape != eager.shape:  # of some ops the CPU leaves results empty that a GPU fills
        assert_same_values(got, eager, name)
        return
    odd, regular = ~eager.isfinite(), eager.isfinite() & exact.isfinite()
    assert_same_bits(got[odd], eager[odd], f"{name}, where eager is not finite")
    bad = int((~got[regular].isfinite()).sum())
    assert not bad, f"{name}: {bad} values are not finite, eager's are"
    if eager.dtype == torch.float64:  # float64 cannot judge it
        torch.testing.assert_close(got, eager, rtol=1e-10, atol=1e-10, equal_nan=True)
        return
    mine, its = (error_in_ulps(t, exact, eager.dtype, scale) for t in (got, eager))
    if mine > max(2 * its, least) and usual is not None:
        its = max(its, usual())
    assert mine <= max(2 * its, least), f"{name}: {mine:.3g} ulps from float64, eager {its:.3g}"


def error_in_ulps(got: Tensor, exact: Tensor, dtype: torch.dtype, scale: str) -> float:
    got, exact = got.detach().cpu(), exact.detach().cpu()
    regular = got.isfinite() & exact.isfinite()
    if not regular.any():
        return 0.0
    got, exact = got[regular].double(), exact[regular].double()
    unit = ulp(exact, dtype)
    return float(((got - exact).abs() / (unit.max() if scale == "tensor" else unit)).max())
