"""``@gems_compile.rewrite``: users' own rewrites, a function in place of a chain of calls."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from . import registered
from .config import vendor
from .errors import RewriteError, unknown
from .gradients import contents
from .kernels.target import current_target
from .lowering import traced
from .lowering.graph import is_tensor
from .lowering.rewrites import MEMORY
from .trusted import DTYPES, why_far

log = logging.getLogger(__name__)


def rewrite(
    pattern: Callable[..., Tensor],
    *,
    example: Sequence[Any],
    because: str,
    dtypes: Sequence[str] = tuple(DTYPES),
    declines: Callable[..., str | None] | None = None,
    memory: bool = False,
) -> Callable[[Callable[..., Tensor]], Rewriting]:
    """Put the function below in place of ``pattern``'s calls, in all that is compiled from now on.

    Formula:   pattern(x, y, ..., c) -> replacement(x, y, ..., c), equal up to rounding
    pattern:   a function of torch's on tensors and floats that returns one tensor. A program has
               its chain however the calls are spelt (``x * 2``, ``x.mul(2)``), unless something
               else reads a value within it or writes among its calls
    example:   what the parameters are, in order: a shape, a tensor, or a float, which stands for
               any number. On it both functions are run, now without numbers and with them when a
               chain is first found; a shape gets normal numbers
    because:   the reason, which ``explain`` and dumps show
    dtypes:    for which the two agree: names of floating dtypes, "float32" also for complex64
    declines:  takes what the pattern takes, FakeTensors and floats, and returns the reason to
               leave a chain alone, or None
    memory:    only with ``options={"rewrites": "memory"}``: it saves memory and may take time
    Raises:    RewriteError where the functions differ in parameters, shape, dtype or strides, write
               into an argument, draw random numbers or return memory of an argument
    """
    if not callable(pattern):
        raise RewriteError(f"rewrite: the pattern {pattern!r} is no function")
    if not dtypes:
        raise RewriteError(f"rewrite: dtypes=() is for nothing; choose from {', '.join(DTYPES)}")
    for name in dtypes:
        if name not in DTYPES:
            raise RewriteError(unknown("rewrite: the dtype", name, DTYPES))
    return functools.partial(
        _added, pattern, tuple(example), because, tuple(dtypes), declines, memory
    )


def _added(*facts: Any) -> Rewriting:
    rule = Rewriting(*facts)
    rule.add()
    return rule


class Rewriting:
    """A rewrite of a user's; called, it is the replacement. ``with rule:`` it holds in the block,
    and no longer behind it."""

    def __init__(
        self,
        pattern: Callable[..., Tensor],
        example: tuple[Any, ...],
        because: str,
        dtypes: tuple[str, ...],
        declines: Callable[..., str | None] | None,
        memory: bool,
        replacement: Callable[..., Tensor],
    ) -> None:
        if not callable(replacement):
            raise RewriteError(f"rewrite: the replacement {replacement!r} is no function")
        functools.update_wrapper(self, replacement)
        self.name: str = getattr(replacement, "__name__", type(replacement).__name__)
        self.pattern, self.replacement, self.because = pattern, replacement, because
        self.example, self.dtypes, self.memory = example, dtypes, memory
        self._told: dict[Any, str | None] = {}  # (device's type, dtype) -> why it is not trusted
        self._check_call()
        facts = [contents(f) for f in (pattern, replacement, declines)]
        self.digest = hashlib.sha256(repr((facts, dtypes, memory)).encode()).hexdigest()
        self.rule = traced.Rule(
            self.name, pattern, replacement, because, self._fakes(), declines, self._why_wrong
        )
        try:
            self.rule.check()
        except traced.NoPattern as why:
            raise RewriteError(f"{self.name}: {why}") from why

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.replacement(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<rewrite {self.name}>"

    def add(self) -> None:
        """Apply it from now on, in place of one of the same name."""
        registered.add(self)

    def remove(self) -> None:
        """Apply it no more; what was compiled stays as it is."""
        registered.remove(self)

    def __enter__(self) -> Rewriting:
        self.add()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def check(self, device: str | torch.device | None = None) -> dict[str, str]:
        """Run pattern and replacement on the example, forward and backward: dtype -> how near.

        ``device``: where; None: where kernels run. Raises: RewriteError where in one of ``dtypes``
        the replacement is further from float64 than twice the pattern and 4 units in the last place
        """
        if device is None:
            target = current_target(vendor())
            device = "cpu" if target is None else target.device
        found = {}
        for dtype in self.dtypes:
            reason, told = why_far(self, dtype, torch.device(device))
            if reason is not None:
                raise RewriteError(f"{self.name}: {reason}")
            found[dtype] = told
        return found

    # what a user may have got wrong ---------------------------------------------------------------

    def _check_call(self) -> None:
        wanted, found = (
            list(inspect.signature(f).parameters) for f in (self.pattern, self.replacement)
        )
        if wanted != found:
            raise RewriteError(
                f"{self.name}: the replacement takes {', '.join(found) or 'nothing'}; the pattern "
                f"takes {', '.join(wanted) or 'nothing'}, and both are given the same"
            )
        if len(self.example) != len(wanted):
            raise RewriteError(
                f"{self.name}: the example has {len(self.example)} values for {len(wanted)} "
                f"parameters ({', '.join(wanted)})"
            )
        for name, value in zip(wanted, self.example, strict=True):
            if not (is_tensor(value) or type(value) is float or _is_shape(value)):
                raise RewriteError(
                    f"{self.name}: the example of {name} is {value!r}; a shape such as (4, 8), a "
                    "tensor or a float is one, and other constants are written in the pattern"
                )
        if not any(is_tensor(v) or _is_shape(v) for v in self.example):
            raise RewriteError(f"{self.name}: none of its parameters is a tensor")
        if not self.because or not isinstance(self.because, str):
            raise RewriteError(f"{self.name}: because={self.because!r} is no reason in words")
        if self.name in {rule.name for rule in MEMORY}:
            raise RewriteError(f"{self.name} is the name of a built-in rewrite; choose another")

    def _fakes(self) -> tuple[Any, ...]:
        mode = FakeTensorMode()
        return tuple(self._fake(value, mode) for value in self.example)

    @staticmethod
    def _fake(value: Any, mode: FakeTensorMode) -> Any:
        if is_tensor(value):
            return mode.from_tensor(value.detach().cpu())
        with mode:
            return torch.empty(value, device="cpu") if _is_shape(value) else value

    def _why_wrong(self, values: Sequence[Any]) -> str | None:
        """Why a chain of such tensors is left alone; their numbers are looked at once."""
        for name, value, like in zip(self.rule.parameters, values, self.rule.example, strict=True):
            if is_tensor(value) and _kind(value) != _kind(like):
                return f"{name} is {_name(value.dtype)}, where its example is {_name(like.dtype)}"
        tensors = [value for value in values if is_tensor(value)]
        floats = (v.dtype.to_real() for v in tensors if v.is_floating_point() or v.is_complex())
        for dtype in sorted(set(map(_name, floats))) or self.dtypes[:1]:
            if dtype not in self.dtypes:
                return f"a tensor is {dtype}; the rule is for {', '.join(self.dtypes)}"
            key = tensors[0].device.type, dtype
            if key not in self._told:
                self._told[key], _ = why_far(self, dtype, tensors[0].device)
                if self._told[key] is not None:
                    log.warning("%s is not applied: %s", self.name, self._told[key])
            if self._told[key] is not None:
                return self._told[key]
        return None


def _kind(value: Tensor) -> Any:
    """Floats of all widths are one kind, as are complex numbers; of others the dtype is."""
    if value.is_complex():
        return "complex"
    return "float" if value.is_floating_point() else value.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(n) is int and n >= 0 for n in value)
