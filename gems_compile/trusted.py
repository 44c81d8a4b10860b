"""Whether a user's rewrite gives the numbers of its pattern: both are run on its example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .rewriting import Rewriting

#: floating dtype -> the complex one of the same parts, where PyTorch computes with that
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float64": (torch.float64, torch.complex128),
    "float32": (torch.float32, torch.complex64),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
}
ULPS = 4  # of the largest number, as ``verify`` allows


def why_far(rule: Rewriting, dtype: str, device: torch.device) -> tuple[str | None, str]:
    """(the reason not to trust the rule in this dtype or None, how near it was in words).

    The replacement may be twice as far from the pattern in float64 as the pattern in this dtype,
    and ULPS more. For float64 that distance is float32's, of which it has 2^-29.
    """
    try:
        given = _made(rule.example, dtype, device)
        got, plain = (_run(f, given) for f in (rule.replacement, rule.pattern))
        narrow = given if dtype != "float64" else _made(rule.example, "float32", device)
        exact = _run(rule.pattern, [_wide(v) for v in narrow])
        own = plain if dtype != "float64" else _run(rule.pattern, narrow)
    except Exception as error:  # on what the user wrote
        text = str(error).partition("\n")[0]
        return f"on its example in {dtype}, {type(error).__name__}: {text}", ""
    target = exact if dtype != "float64" else plain
    eps = torch.finfo(DTYPES[dtype][0]).eps
    scale = 1.0 if dtype != "float64" else eps / torch.finfo(torch.float32).eps
    worst = 0.0
    for name, g, o, e, t in zip(_names(rule, given), got, own, exact, target, strict=True):
        allowed = 2 * scale * _largest(_finite(_difference(o, e)))
        allowed += ULPS * eps * _largest(_finite(t))
        far = _largest(_difference(g, t))
        if not far <= allowed:
            told = f"{name} is {far:.3g} from the pattern's, where {allowed:.3g} is its rounding"
            return f"in {dtype} {told}", ""
        worst = max(worst, far / allowed if allowed else 0.0)
    same = not any(_difference(g, p).any() for g, p in zip(got, plain, strict=True))
    near = f"within rounding ({worst:.2f} of what is allowed)"
    return None, "the same numbers" if same else near


def _names(rule: Rewriting, given: Sequence[Any]) -> list[str]:
    """Of what ``_run`` returns."""
    tensors = [n for n, v in zip(rule.rule.parameters, given, strict=True) if _has_gradient(v)]
    return ["the result", *(f"the gradient of {name}" for name in tensors)]


def _made(example: Sequence[Any], dtype: str, device: torch.device) -> list[Any]:
    """The example in a dtype; the same numbers each time, from no generator of the program's."""
    generator = torch.Generator().manual_seed(0)
    real, complex_ = DTYPES[dtype]
    made: list[Any] = []
    for value in example:
        if isinstance(value, (tuple, list)):
            value = torch.randn(tuple(value), generator=generator, device="cpu")
        if not isinstance(value, Tensor):
            made.append(value)
            continue
        if value.is_complex() and complex_ is None:
            raise TypeError(f"there is no complex number of {dtype}; leave {dtype} out of dtypes=")
        wanted = complex_ if value.is_complex() else real
        value = value.detach().to(device, wanted if _is_float(value) else value.dtype, copy=True)
        made.append(value)
    return made


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor) or not _is_float(value):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _run(function: Callable[..., Tensor], given: Sequence[Any]) -> list[Tensor]:
    """The result, and the gradients of floating parameters for one random gradient of it."""
    with torch.inference_mode(False), torch.enable_grad(), _no_autocast(given):
        leaves = [v.detach().clone() if isinstance(v, Tensor) else v for v in given]
        wanted = [v.requires_grad_() for v in leaves if _has_gradient(v)]
        result = function(*leaves)
        found: list[Any] = [None] * len(wanted)
        if result.requires_grad:
            generator = torch.Generator().manual_seed(1)
            drawn = torch.randn(result.shape, generator=generator, device="cpu")
            found = list(torch.autograd.grad(result, wanted, drawn.to(result), allow_unused=True))
        zeros = [
            torch.zeros_like(v) if g is None else g for g, v in zip(found, wanted, strict=True)
        ]
        return [result.detach(), *zeros]


def _no_autocast(given: Sequence[Any]) -> torch.autocast:
    device = next(v.device.type for v in given if isinstance(v, Tensor))
    return torch.autocast(device, enabled=False)


def _is_float(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and _is_float(value)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """0 where both are infinite or NaN alike."""
    if not _is_float(a):
        return (a != b).double()
    a, b = _wide(a), _wide(b)
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)


def _finite(value: Tensor) -> Tensor:
    return value[value.isfinite()]


def _largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0
