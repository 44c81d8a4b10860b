"""Constant attention masks are read while compiling: dropped, or turned into ``is_causal``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, TOLERANCE, gems_only, rand
from torch import Tensor

from gems_compile.backend import Gems

L = 6


def places() -> tuple[Tensor, Tensor]:
    steps = torch.arange(L, device=DEVICE)
    return steps[None, None, :, None], steps[None, None, None, :]


def all_seen() -> Tensor:
    queries, _ = places()
    return (queries >= 0).expand(2, -1, L, L)


def zeros() -> Tensor:
    return torch.zeros(1, 1, 1, L, device=DEVICE)


def causal() -> Tensor:
    queries, keys = places()
    return (keys <= queries) & queries.new_ones((), dtype=torch.bool)


def causal_of_positions() -> Tensor:
    """As transformers writes it: no token may see another sequence packed into the same row."""
    positions = (torch.arange(L, device=DEVICE) + 0)[None]
    starts = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    sequence = starts.cumsum(-1)
    batch = torch.arange(1, device=DEVICE)[:, None, None, None]
    queries, keys = places()
    return causal() & (sequence[batch, queries] == sequence[batch, keys]).to(DEVICE)


def causal_addend() -> Tensor:
    low = torch.full((L, L), torch.finfo(torch.float32).min, device=DEVICE)
    return torch.triu(low, diagonal=1)[None, None]


def window() -> Tensor:
    queries, keys = places()
    return (keys <= queries) & (keys > queries - 3)


def finite_addend() -> Tensor:
    return torch.triu(torch.full((L, L), -1.0, device=DEVICE), diagonal=1)


def written() -> Tensor:
    mask = torch.ones(L, L, dtype=torch.bool, device=DEVICE)
    mask[:, 0] = False
    return mask


def written_through_a_view() -> Tensor:
    mask = torch.ones(L, L, dtype=torch.bool, device=DEVICE)
    mask[0].fill_(False)
    mask[0, :2] = True
    return mask


def random() -> Tensor:
    return torch.rand(L, L, device=DEVICE) >= 0


CASES: list[tuple[Callable[[], Tensor], str]] = [
    (all_seen, "no mask is read"),
    (zeros, "no mask is read"),
    (causal, "half"),
    (causal_of_positions, "half"),
    (causal_addend, "half"),
    (window, ""),
    (finite_addend, ""),
    (written, ""),
    (written_through_a_view, ""),
    (random, ""),
]


def attend(make: Callable[[], Tensor], *operands: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*operands, attn_mask=make())


def run(
    program: Callable[..., Tensor], *operands: Tensor, **how: object
) -> tuple[list[Tensor], list[str]]:
    """(output and gradients, what was rewritten)."""
    backend = Gems()
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    out = torch.compile(program, backend=backend, fullgraph=True, **how)(*leaves)
    torch.manual_seed(3)
    out.backward(torch.randn(out.shape).to(out))
    fired = backend.reports[0].rewrites.fired
    return [out, *(x.grad for x in leaves)], [f.because for f in fired if "mask" in f.rule]


@gems_only
@pytest.mark.parametrize(("make", "because"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_constant_masks(make: Callable[[], Tensor], because: str):
    operands = [rand(2, 3, L, 8) for _ in range(3)]
    found, fired = run(lambda *x: attend(make, *x), *operands)
    assert len(fired) == bool(because) and all(because in text for text in fired)
    leaves = [x.clone().requires_grad_() for x in operands]
    wanted = attend(make, *leaves)
    torch.manual_seed(3)
    wanted.backward(torch.randn(wanted.shape).to(wanted))
    rtol, atol = TOLERANCE[torch.float32]
    for value, other in zip(found, [wanted, *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(value, other, rtol=10 * rtol, atol=10 * atol)


@gems_only
def test_a_mask_that_is_an_input_is_kept():
    q, mask = rand(2, 3, L, 8), torch.ones(L, L, dtype=torch.bool, device=DEVICE)
    backend = Gems()
    program = lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m)  # noqa: E731
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    compiled(q, mask)
    assert not backend.reports[0].rewrites.fired
    mask[:, 0] = False
    torch.testing.assert_close(compiled(q, mask), program(q, mask))


@gems_only
def test_a_mask_of_dynamic_size_is_kept():
    def program(x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[-2], device=DEVICE)
        mask = steps[None, :] <= steps[:, None]
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    backend = Gems()
    compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic=True)
    for length in (5, 9):
        x = rand(2, length, 8)
        torch.testing.assert_close(compiled(x), program(x), rtol=1e-4, atol=1e-4)
    assert not backend.reports[0].rewrites.fired


@gems_only
def test_other_masks_are_named_in_the_log():
    backend = Gems()
    torch.compile(lambda q: attend(window, q, q, q), backend=backend)(rand(2, 3, L, 8))
    (miss,) = backend.reports[0].rewrites.near_misses
    assert miss.rule == "constant_mask" and "something else" in miss.reason


@gems_only
@pytest.mark.parametrize(
    ("make", "because"), [(causal, "half"), (all_seen, "no mask"), (window, "")]
)
def test_constant_masks_of_checkpoints(make: Callable[[], Tensor], because: str):
    """The mask is made outside, and given to the body."""
    from torch.utils.checkpoint import checkpoint

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = make()
        body = lambda *x: F.scaled_dot_product_attention(*x[:3], attn_mask=x[3]) * 2  # noqa: E731
        return checkpoint(body, q, k, v, mask, use_reentrant=False)

    operands = [rand(2, 3, L, 8) for _ in range(3)]
    found, fired = run(program, *operands)
    assert len(fired) == bool(because) and all(because in text for text in fired)
    leaves = [x.clone().requires_grad_() for x in operands]
    wanted = attend(make, *leaves) * 2
    torch.manual_seed(3)
    wanted.backward(torch.randn(wanted.shape).to(wanted))
    for value, other in zip(found, [wanted, *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)
