"""``@gems_compile.pointwise``: users' own pointwise functions, as fast and as fused as ours.

A function becomes an op of torch's (``gems_user::name``), under an overload that is named after its
contents. So a graph that holds the op says which function it means: caches of graphs need to know
no more, and a function that is defined anew is another op beside the old one.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import AuthoringError
from .gradients import differentiated, facts_of_backward
from .inlined import inlined, is_jit, returned
from .kernels.op import ALL, OPS, Authored
from .lowering.authored import NAMESPACE, declare
from .promotion import broadcast, read_rules, result_dtypes
from .user_ops import UserOp

#: types of parameters that are no tensors, as schemas spell them
KINDS = {float: "float", int: "int", bool: "bool", str: "str"}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_lock = threading.RLock()


def pointwise(
    function: Any = None,
    *,
    promotion: Any = "default",
    outputs: int = 1,
    backward: Any = None,
) -> Any:
    """Make an op of a Triton function on loaded tiles: ``@pointwise``, above ``@triton.jit``.

    Formula:    out[i] = function(x[i], y[i], ..., constants), over x, y, ... broadcast together
    Parameters: tensors, and constants: those with a default, and those annotated ``tl.constexpr``,
                ``float``, ``int``, ``bool`` or ``str``. 16-bit floats arrive as float32.
    promotion:  the dtype of the result, which the body computes in as well: ``"default"`` promotes
                as ``torch.add`` does, ``"int_to_float"`` as ``torch.exp``, ``"always_bool"`` as
                ``torch.eq``; ``("x", "y")`` or ``("x", "y", "int_to_float")``: of these parameters
                alone. What no rule names keeps its dtype. A list: one rule for each output
    outputs:    how many results the function returns
    backward:   takes the outputs' gradients, then the function's arguments, and returns a gradient
                for each tensor: another such op, or a function of torch's
    Raises:     AuthoringError
    """
    if function is None:
        return functools.partial(pointwise, promotion=promotion, outputs=outputs, backward=backward)
    if not is_jit(function):
        raise AuthoringError(
            f"pointwise: {function!r} is no function of triton.jit; write @gems_compile.pointwise "
            "above @triton.jit"
        )
    return Pointwise(function, promotion, outputs, backward)


class Pointwise:
    """A pointwise op: ``f(x, y, ..., out=None)``; ``f.op`` is torch's overload of it."""

    __name__: str
    __qualname__: str
    op: torch._ops.OpOverload

    def __init__(self, function: Any, promotion: Any, outputs: int, backward: Any) -> None:
        functools.update_wrapper(self, function.fn)
        self.function = function
        name = self.__name__ = function.fn.__name__
        if type(outputs) is not int or outputs < 1:
            raise AuthoringError(f"{name}: outputs={outputs!r} is no number of results; at least 1")
        self.parameters = _parameters(name, function.fn)
        defaults = inspect.signature(function.fn).parameters.items()
        self.defaults = {n: p.default for n, p in defaults if p.default is not p.empty}
        self.tensors = [n for n, kind in self.parameters.items() if kind == "Tensor"]
        self.rules = read_rules(name, promotion, outputs, self.parameters)
        if found := returned(function) - {outputs}:
            raise AuthoringError(
                f"{name}: its body returns {min(found)} results, where outputs={outputs}; write "
                f"outputs={min(found)}"
            )
        self._register(backward)

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        if out is None:
            return self.op(*args, **kwargs)
        places = out if isinstance(out, (tuple, list)) else (out,)
        self._write(self._bound(args, kwargs), places)
        return out

    def inplace(self, *args: Any, **kwargs: Any) -> Tensor:
        """Store the result in the first tensor, and return that."""
        values = self._bound(args, kwargs)
        place = values[list(self.parameters).index(self.tensors[0])]
        if torch.is_grad_enabled() and any(
            isinstance(v, Tensor) and v.requires_grad for v in values
        ):
            values = [v.clone() if v is place else v for v in values]  # saved for backward
        self._write(values, (place,))
        return place

    def backward(self, function: Any) -> Any:
        """Take a function as the gradient's: ``@f.backward``; returns the function."""
        self._register(function)
        return function

    def __repr__(self) -> str:
        return f"<pointwise {self.op}>"

    def __reduce__(self) -> str:
        """A model that holds it is copied and pickled as with a function: by name."""
        return self.__qualname__

    # calls ---------------------------------------------------------------------------------------

    def _bound(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments in order, defaults filled in."""
        names = list(self.parameters)
        given = {**self.defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or sorted(given) != sorted(names):
            raise AuthoringError(
                f"{self.__name__}: it is called with {len(args)} arguments and {list(kwargs)}; it "
                f"takes {', '.join(names)}"
            )
        return [given[name] for name in names]

    def _write(self, values: Sequence[Any], places: Sequence[Tensor]) -> None:
        if len(places) != len(self.rules):
            raise AuthoringError(
                f"{self.__name__}: out= has {len(places)} tensors for {len(self.rules)} results"
            )
        if not torch.compiler.is_compiling() and self.served.write(values, places):
            return
        made = self.op(*values)
        pairs = list(zip(places, made if len(places) > 1 else (made,), strict=True))
        for place, result in pairs:
            self._check_place(place, result)
        for place, result in pairs:
            place.copy_(result)

    def _check_place(self, place: Tensor, result: Tensor) -> None:
        if place.shape != result.shape or _rank(result.dtype) > _rank(place.dtype):
            raise AuthoringError(
                f"{self.__name__}: the result is {_told(result)}, its place {_told(place)}; they "
                "must have one shape, and the result's dtype must cast to the place's"
            )

    # registration --------------------------------------------------------------------------------

    def _register(self, backward: Any) -> None:
        """Make ``op``, once for all functions of equal contents."""
        name = self.__name__
        differentiated, told = facts_of_backward(name, backward, self.tensors)
        facts = (inlined(self.function, "op"), self._schema(""), self.rules, told)
        digest = "v" + hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        with _lock:
            if f"{NAMESPACE}.{name}.{digest}" not in OPS:
                self._define(digest, differentiated)
            self.op = getattr(getattr(getattr(torch.ops, NAMESPACE), name), digest)
            self.served = _served[self.op]

    def _schema(self, digest: str) -> str:
        parts = [
            f"{kind} {name}{_default(self.defaults[name]) if name in self.defaults else ''}"
            for name, kind in self.parameters.items()
        ]
        results = ", ".join(["Tensor"] * len(self.rules))
        results = f"({results})" if len(self.rules) > 1 else results
        return f"{self.__name__}.{digest}({', '.join(parts)}) -> {results}"

    def _define(self, digest: str, backward: Any) -> None:
        name, qualified = self.__name__, f"{self.__name__}.{digest}"
        _library.define(self._schema(digest), tags=(torch.Tag.pt2_compliant_tag,))
        op = getattr(getattr(getattr(torch.ops, NAMESPACE), name), digest)
        served = _served[op] = UserOp(op, name, self._results)
        _library.impl(qualified, served, "CompositeExplicitAutograd")
        full = f"{NAMESPACE}::{qualified}"
        torch.library.register_fake(full, self._fake, lib=_library)
        torch.library.register_vmap(full, functools.partial(_batched, op), lib=_library)
        run = differentiated(op, name, backward)
        _library.impl(qualified, run, "Autograd", with_keyset=True)
        declare(self._declaration(digest))

    def _declaration(self, digest: str) -> Authored:
        function, many = f"{self.__name__}_{digest}", len(self.rules)
        text = inlined(self.function, function)
        results = (function,) if many == 1 else tuple(f"{function}_{k}" for k in range(many))
        given = ", ".join(self.parameters)
        if many > 1:
            for k, result in enumerate(results):
                head = f"@triton.jit\ndef {result}({given}):"
                text += f"\n\n{head}\n    results = {function}({given})\n    return results[{k}]\n"
        named = dict.fromkeys(n for rule in self.rules for n in rule.names)
        return Authored(
            name=self.__name__,
            kind="pointwise",
            overloads=(f"{NAMESPACE}.{self.__name__}.{digest}",),
            body=self.function,
            dtypes=ALL,
            samples=(),
            doc=self.__doc__ or "",
            text=text,
            results=results,
            promoted=tuple(named),
            floating=any(rule.kind == "int_to_float" for rule in self.rules),
        )

    def _results(self, values: Sequence[Any]) -> list[Tensor]:
        """Empty tensors as the op returns them; with FakeTensors, fake ones."""
        tensors = [v for v in values if isinstance(v, Tensor)]
        shape, strides = broadcast(self.__name__, tensors)
        given = dict(zip(self.parameters, values, strict=True))
        device = tensors[0].device
        return [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for dtype in result_dtypes(self.rules, given)
        ]

    def _fake(self, *values: Any) -> Any:
        made = self._results(self._bound(values, {}))
        return tuple(made) if len(made) > 1 else made[0]


_served: dict[torch._ops.OpOverload, UserOp] = {}


def _parameters(name: str, function: Callable[..., Any]) -> dict[str, str]:
    """The function's parameters, and their types as a schema spells them."""
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        found[parameter.name] = _kind(name, parameter)
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.name == "out":
            raise AuthoringError(
                f"{name}: the parameter {parameter} cannot be one of an op's; *, ** and the name "
                "out are taken"
            )
    if "Tensor" not in found.values():
        raise AuthoringError(
            f"{name}: none of its parameters {list(found)} is a tensor; tensors are those without "
            "a default and an annotation"
        )
    return found


def _kind(name: str, parameter: inspect.Parameter) -> str:
    default, annotation = parameter.default, parameter.annotation
    spelled = getattr(annotation, "__name__", str(annotation))
    if spelled in KINDS.values():
        return spelled
    if type(default) in KINDS:
        return "Scalar" if type(default) is int else KINDS[type(default)]  # 1 may become 0.5
    if spelled.rpartition(".")[2] == "constexpr":
        return "Scalar"
    if default is parameter.empty:
        return "Tensor"
    raise AuthoringError(
        f"{name}: the default of {parameter.name}, {default!r}, is a {type(default).__name__}; "
        f"valid: {', '.join(KINDS.values())}"
    )


def _default(value: Any) -> str:
    return f'="{value}"' if isinstance(value, str) else f"={value!r}"


def _batched(op: Any, info: Any, places: Sequence[int | None], *values: Any) -> Any:
    """The op of a whole batch: its axis in front, and axes of size 1 where ranks differ."""
    ranks = [
        v.ndim - (k is not None)
        for v, k in zip(values, places, strict=True)
        if isinstance(v, Tensor)
    ]
    made = op(
        *(
            v if k is None else _batch_first(v, k, max(ranks))
            for v, k in zip(values, places, strict=True)
        )
    )
    return made, 0 if isinstance(made, Tensor) else (0,) * len(made)


def _batch_first(x: Tensor, place: int, rank: int) -> Tensor:
    x = x.movedim(place, 0)
    return x.reshape(x.shape[0], *[1] * (rank + 1 - x.ndim), *x.shape[1:])


def _rank(dtype: torch.dtype) -> int:
    """Which dtypes a dtype casts to, as ``torch.can_cast`` has it, which Dynamo cannot trace."""
    return 2 if dtype.is_floating_point else int(dtype != torch.bool)


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
