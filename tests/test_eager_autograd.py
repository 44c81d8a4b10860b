"""Derivatives of torch's own samples with every op of ours behind eager PyTorch: gradcheck and
gradgradcheck pass wherever they do without us, and vmap, jvp and torch.func give the same numbers.

A run takes a share of the ops, chosen by the seed in the tests' names; ``GEMS_TEST_SEED`` repeats a
run, ``GEMS_TEST_FULL=1`` takes all ops and more samples of each.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eagercheck import every_op, nothing_left, ours, same  # noqa: F401
from helpers import DEVICE, rand
from opcheck import FULL, QUICK, SEED, tensors
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

import gems_compile
from gems_compile import eager

PER_OP = 3 if FULL else 1
SHARE = 10 if QUICK else 12  # cases of a run that is not full
LARGEST = 100  # elements of a sample: gradcheck runs a function many times
#: ops that no kernel of ours comes near, and whose samples take long or need libraries
APART = ("linalg.", "fft.", "sparse.", "signal.", "to_sparse", "jiterator")


def cases() -> list[Any]:
    found = [
        pytest.param(info, dtype, id=f"{name(info)}-{dtype}-seed{SEED}")
        for info in op_db
        if info.supports_autograd and not info.name.startswith(APART)
        for dtype in ("float64", "complex128")
        if getattr(torch, dtype) in info.supported_backward_dtypes(DEVICE)
    ]
    return found if FULL else random.Random(f"{SEED} autograd").sample(found, SHARE)


def name(info: Any) -> str:
    return f"{info.name}.{info.variant_test_name}".rstrip(".")


@pytest.fixture(autouse=True)
def any_order() -> None:
    """Sums may be atomic: where deterministic algorithms are asked for, scatters are ATen's."""
    torch.use_deterministic_algorithms(False)


class Program:
    """A sample as a function of its real and complex tensors; the rest stays as it is."""

    def __init__(self, info: Any, sample: Any) -> None:
        given = (sample.input, sample.args, sample.kwargs)
        self.info, self.sample = info, sample
        self.given, self.spec = tree_flatten(given)
        self.places = [
            k for k, v in enumerate(self.given) if isinstance(v, Tensor) and v.requires_grad
        ]
        self.leaves = [self.given[k] for k in self.places]

    def __call__(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        given = list(self.given)
        for k, leaf in zip(self.places, leaves, strict=True):
            given[k] = leaf
        value, args, kwargs = tree_unflatten(given, self.spec)
        out = self.info.gradcheck_wrapper(self.info.op, value, *args, **kwargs)
        if self.sample.output_process_fn_grad is not None:
            out = self.sample.output_process_fn_grad(out)
        return tuple(tensors(out))


def programs(info: Any, dtype: str) -> list[Program]:
    torch.manual_seed(SEED)
    # all of them: some generators hold torch's settings until their end
    found = list(info.sample_inputs(DEVICE, getattr(torch, dtype), requires_grad=True))
    made = [Program(info, s) for s in found if plain(s)]
    usable = [p for p in made if p.leaves]
    chosen = random.Random(f"{SEED} {info.name} {dtype}")
    return chosen.sample(usable, min(PER_OP, len(usable)))


def plain(sample: Any) -> bool:
    every = tensors((sample.input, sample.args, sample.kwargs))
    small = sum(t.numel() for t in every) <= LARGEST
    return small and all(type(t) is Tensor and t.layout == torch.strided for t in every)


# gradcheck ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("info", "dtype"), cases())
def test_gradcheck(info: Any, dtype: str) -> None:
    """Backward, backward under vmap, forward mode, and the gradient of the gradient."""
    ran = False
    for program in programs(info, dtype):
        for how, check in checks(info, program):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    native = check()
                except Exception:  # whatever it is that torch cannot
                    continue
                if not native:
                    continue
                with gems_compile.use_gems(only=every_op()):
                    assert check(), how
                ran = True
    if not ran:
        pytest.skip("it does not pass without us either")
    if not any(row["ours"] for row in eager.stats().values()):
        pytest.skip("all of its calls are ATen's")


def checks(info: Any, program: Program) -> Iterator[tuple[str, Callable[[], bool]]]:
    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in program(*leaves) if t.requires_grad)

    fast = {"fast_mode": True, "nondet_tol": info.gradcheck_nondet_tol}
    first, second = torch.autograd.gradcheck, torch.autograd.gradgradcheck
    leaves, batched = program.leaves, info.check_batched_grad
    yield "gradcheck", lambda: first(function, leaves, check_batched_grad=batched, **fast)
    if info.supports_forward_ad:
        forward = {"check_forward_ad": True, "check_backward_ad": False}
        yield "forward mode", lambda: first(function, leaves, **forward, **fast)
    if info.supports_gradgrad:
        yield "gradgradcheck", lambda: second(function, leaves, **fast)


# torch.func on torch's samples --------------------------------------------------------------------


@pytest.mark.parametrize(("info", "dtype"), cases())
def test_func(info: Any, dtype: str) -> None:
    """vmap, jvp, vjp, and the gradients of a batch, as they are without us."""
    ran = False
    for program in programs(info, dtype):
        leaves = [t.detach() for t in program.leaves]
        for how, transformed in transforms(program):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    want, again = tensors(transformed(leaves)), tensors(transformed(leaves))
                except Exception:  # whatever it is that torch cannot
                    continue
                with gems_compile.use_gems(only=every_op()):
                    got = tensors(transformed(leaves))
            assert len(got) == len(want), how
            for a, b, c in zip(got, want, again, strict=True):
                assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), how
                if torch.allclose(b, c, equal_nan=True):  # else it holds what nobody has written
                    torch.testing.assert_close(
                        a, b, rtol=1e-8, atol=1e-9, equal_nan=True, msg=functools.partial(told, how)
                    )
            ran = True
    if not ran:
        pytest.skip("torch transforms none of its samples")
    if not any(row["ours"] for row in eager.stats().values()):
        pytest.skip("all of its calls are ATen's")


def told(how: str, what: str) -> str:
    return f"{how}: {what}"


Leaves = list[Tensor]


def transforms(program: Program) -> Iterator[tuple[str, Callable[[Leaves], Any]]]:
    places = tuple(range(len(program.leaves)))

    def total(*leaves: Tensor) -> Tensor:
        used = [t for t in program(*leaves) if t.is_floating_point() or t.is_complex()]
        return sum((t.abs().sum() for t in used), torch.zeros((), device=DEVICE))

    def batch(leaves: Leaves) -> Leaves:
        return [torch.stack([t, t.flip(0) if t.ndim else t]) for t in leaves]

    def pull(*leaves: Tensor) -> Any:
        out, back = vjp(program, *leaves)
        return out, back(tuple(torch.ones_like(t) for t in out))

    def push(leaves: Leaves) -> Any:
        return jvp(program, tuple(leaves), tuple(t * 0.5 for t in leaves))

    yield "vmap", lambda leaves: vmap(program, randomness="same")(*batch(leaves))
    yield "jvp", push
    yield "vjp", lambda leaves: pull(*leaves)
    yield (
        "gradients of a batch",
        lambda leaves: vmap(grad(total, argnums=places), randomness="same")(*batch(leaves)),
    )


# torch.func on programs ---------------------------------------------------------------------------


def norm_and_gate(x: Tensor, w: Tensor) -> Tensor:
    h = F.layer_norm(x @ w, (w.shape[1],))
    return F.silu(h) * h.tanh()


def attention(x: Tensor, w: Tensor) -> Tensor:
    h = (x @ w).unsqueeze(0)
    return (h @ h.mT / 2).softmax(-1) @ h


def losses(x: Tensor, w: Tensor) -> Tensor:
    target = torch.arange(x.shape[0], device=x.device) % w.shape[1]
    return F.cross_entropy(x @ w, target, label_smoothing=0.1)


def convolution(x: Tensor, w: Tensor) -> Tensor:
    image = (x @ w).reshape(1, 1, x.shape[0], w.shape[1])
    kernel = w[:3, :3].reshape(1, 1, 3, 3)
    return F.gelu(F.conv2d(image, kernel, padding=1)).logsumexp((-1, -2)) + F.softplus(x).var()


def windows(x: Tensor, w: Tensor) -> Tensor:
    image = (x @ w).expand(1, 2, -1, -1)
    return F.avg_pool2d(F.group_norm(image, 2), 2).cumsum(-1) + F.interpolate(
        image, scale_factor=0.5, mode="bilinear"
    )


def scalar(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w: fn(x, w).square().sum()


def directional(fn: Callable[..., Tensor], x: Tensor, w: Tensor) -> Any:
    """Forward over reverse: the product of the Hessian and a direction."""
    slope = lambda v: grad(scalar(fn), argnums=1)(x, v)  # noqa: E731
    return jvp(slope, (w,), (w * 0.5,))


PROGRAMS = [norm_and_gate, attention, losses, convolution, windows]
OF_PROGRAMS: dict[str, Callable[..., Any]] = {
    "grad": lambda fn, x, w: grad(scalar(fn), argnums=(0, 1))(x, w),
    "jacrev": lambda fn, x, w: jacrev(fn, argnums=1)(x, w),
    "jacfwd": lambda fn, x, w: jacfwd(fn, argnums=1)(x, w),
    "hessian": lambda fn, x, w: hessian(scalar(fn), argnums=1)(x, w),
    "hessian times vector": directional,
    "gradients of samples": lambda fn, x, w: vmap(grad(scalar(fn), argnums=1), in_dims=(0, None))(
        torch.stack([x, x * 2, x - 1]), w
    ),
    "nested vmap": lambda fn, x, w: vmap(vmap(fn, in_dims=(None, 0)), in_dims=(0, None))(
        torch.stack([x, x * 2]), torch.stack([w, w - 1, w + 1])
    ),
}


@pytest.mark.parametrize("how", OF_PROGRAMS)
@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_transforms_of_programs(fn: Callable[..., Tensor], how: str) -> None:
    x, w = rand(6, 4).double(), rand(4, 4).double()
    transformed = OF_PROGRAMS[how]
    same(lambda x, w: transformed(fn, x, w), x, w, rtol=1e-8, atol=1e-9)
    assert any(row["ours"] for row in eager.stats().values())


def test_backward_through_a_transform() -> None:
    x, w = (rand(*shape).double().requires_grad_() for shape in ((5, 6, 4), (4, 4)))
    per_sample = vmap(grad(scalar(norm_and_gate), argnums=1), in_dims=(0, None))
    same(per_sample, x, w, served=("native_layer_norm",), rtol=1e-8, atol=1e-9)


def test_gradients_of_samples_pass_gradcheck() -> None:
    x, w = (rand(*shape).double().requires_grad_() for shape in ((2, 3, 4), (4, 4)))
    per_sample = vmap(grad(scalar(norm_and_gate), argnums=1), in_dims=(0, None))
    with gems_compile.use_gems(only=every_op()):
        assert torch.autograd.gradcheck(per_sample, (x, w), fast_mode=True)
    assert ours("native_layer_norm")
