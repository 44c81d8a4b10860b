"""Steps of ``fused=True`` optimizers in eager mode: rules that write the lists they are given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .forms import IN_PLACE, Form
from .whole import Whole, wide

Lists = list[Tensor]


def optimizers() -> list[Form]:
    """Their overloads, each of which writes its first lists."""
    return [
        Form(o, o, IN_PLACE, tuple(a.name for a in o._schema.arguments if a.alias_info is not None))
        for o in RULES
    ]


def _not_scaled(grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if grad_scale is not None or found_inf is not None:
        raise Whole("gradients that a scaler has scaled")


def _adam(decoupled: bool) -> Any:
    def step(
        params: Lists,
        grads: Lists,
        averages: Lists,
        squares: Lists,
        largest: Lists,
        steps: Lists,
        *,
        lr: Any,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> tuple[()]:
        """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2
        p -= lr m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps)"""
        _not_scaled(grad_scale, found_inf)
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            raise Whole("a beta of 0")
        for k, param in enumerate(params):
            p, g = wide(param), wide(grads[k])
            g = -g if maximize else g
            if decoupled:
                p = p - lr * weight_decay * p
            elif weight_decay:
                g = g + weight_decay * p
            m = torch.lerp(wide(averages[k]), g, 1 - beta1)
            v = wide(squares[k]) * beta2 + (1 - beta2) * g * g
            averages[k].copy_(m)
            squares[k].copy_(v)
            if amsgrad:
                v = torch.maximum(wide(largest[k]), v)
                largest[k].copy_(v)
            n = steps[k].to(p.dtype)
            left1, left2 = (-torch.expm1(n * math.log(b)) for b in (beta1, beta2))
            param.copy_(p - lr / left1 * m / (v.sqrt() / left2.sqrt() + eps))
        return ()

    return step


def sgd(
    params: Lists,
    grads: Lists,
    momenta: Lists,
    *,
    weight_decay: float,
    momentum: float,
    lr: Any,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[()]:
    """b = momentum b + (1 - dampening) g, or g at first; p -= lr b, or lr (g + momentum b)"""
    _not_scaled(grad_scale, found_inf)
    for k, param in enumerate(params):
        p, g = wide(param), wide(grads[k])
        g = -g if maximize else g
        if weight_decay:
            g = g + weight_decay * p
        if momentum:
            b = g if is_first_step else wide(momenta[k]) * momentum + (1 - dampening) * g
            momenta[k].copy_(b)
            g = g + momentum * b if nesterov else b
        param.copy_(p - lr * g)
    return ()


aten = torch.ops.aten
RULES = {
    aten._fused_adam_.default: _adam(decoupled=False),
    aten._fused_adam_.tensor_lr: _adam(decoupled=False),
    aten._fused_adamw_.default: _adam(decoupled=True),
    aten._fused_adamw_.tensor_lr: _adam(decoupled=True),
    aten._fused_sgd_.default: sgd,
    aten._fused_sgd_.tensor_lr: sgd,
}
