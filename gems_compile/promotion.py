"""What a user's pointwise op returns: dtypes, shape and strides, by torch's own rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import (
    ELEMENTWISE_TYPE_PROMOTION_KIND,
    compute_elementwise_output_strides,
    elementwise_dtypes,
)

from .errors import AuthoringError, unknown

KINDS = {
    "default": ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT,
    "int_to_float": ELEMENTWISE_TYPE_PROMOTION_KIND.INT_TO_FLOAT,
    "always_bool": ELEMENTWISE_TYPE_PROMOTION_KIND.ALWAYS_BOOL,
}


@dataclass(frozen=True)
class Rule:
    """The dtype of one output: which parameters are promoted together, and how."""

    kind: str
    names: tuple[str, ...]


def read_rules(
    name: str, promotion: Any, outputs: int, parameters: Mapping[str, str]
) -> tuple[Rule, ...]:
    """One rule for each output, from what ``pointwise`` takes as ``promotion``."""
    given = promotion if isinstance(promotion, list) else [promotion] * outputs
    if len(given) != outputs:
        raise AuthoringError(
            f"{name}: promotion= has {len(given)} rules for {outputs} outputs; write one for each, "
            "and how many there are as outputs="
        )
    return tuple(_rule(name, rule, parameters) for rule in given)


def _rule(name: str, given: Any, parameters: Mapping[str, str]) -> Rule:
    numbers = [n for n, kind in parameters.items() if kind not in ("str", "bool")]
    words = (given,) if isinstance(given, str) else given
    if not isinstance(words, tuple) or not all(isinstance(word, str) for word in words):
        raise AuthoringError(unknown(f"{name}: the promotion", given, [*KINDS, *numbers]))
    kind = words[-1] if words and words[-1] in KINDS and words[-1] not in numbers else "default"
    names = tuple(w for w in words if w in numbers)
    for word in words:
        if word not in (kind, *numbers):
            raise AuthoringError(unknown(f"{name}: the promotion", word, [*KINDS, *numbers]))
    if names and all(parameters[n] != "Tensor" for n in names):
        raise AuthoringError(f"{name}: the promotion {given!r} names no tensor")
    return Rule(kind, names or tuple(numbers))


def result_dtypes(rules: Sequence[Rule], values: Mapping[str, Any]) -> list[torch.dtype]:
    """The outputs' dtypes; ``values``: the arguments by their parameters' names."""
    found = []
    for rule in rules:
        promoted = [values[n] for n in rule.names]
        _, dtype = elementwise_dtypes(*promoted, type_promotion_kind=KINDS[rule.kind])
        found.append(dtype)
    return found


def broadcast(name: str, tensors: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The shape and the strides that eager gives the result of a pointwise op."""
    devices = list(dict.fromkeys(str(t.device) for t in tensors))
    if len(devices) > 1:
        raise AuthoringError(
            f"{name}: its tensors are on {' and '.join(devices)}; move them to one"
        )
    for t in tensors:
        if t.layout != torch.strided or t.is_complex():
            told = t.dtype if t.layout == torch.strided else t.layout
            raise AuthoringError(
                f"{name}: a tensor is {told}; kernels take strided tensors of real numbers"
            )
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    expanded = [t.expand(shape) for t in tensors]
    return shape, compute_elementwise_output_strides(*expanded)
