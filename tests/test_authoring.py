"""Users' own pointwise functions: eager, into memory, fused, in other backends, differentiated."""

from __future__ import annotations

import itertools

import pytest
import torch
from authorcheck import assert_like, launched
from authored import gelu_and_mul, half_of, no_gradient, pick, plain, plus, scaled, square, three
from helpers import DEVICE, assert_same_metadata, assert_same_values, bools, gems_only, ints, rand
from torch import Tensor

from gems_compile.backend import Gems
from gems_compile.errors import AuthoringError

pytestmark = gems_only
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


# eager --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_eager(dtype: torch.dtype, approximate: str) -> None:
    x, y = rand(5, 33, dtype=dtype), rand(5, 33, dtype=dtype)
    got = gelu_and_mul(x, y, approximate=approximate)
    wide = plain(x.double(), y.double(), approximate)
    assert got.dtype == dtype
    assert_same_values(got, wide.to(dtype))
    assert got.data_ptr() not in (x.data_ptr(), y.data_ptr())


def test_a_number_is_part_of_the_kernel() -> None:
    x = rand(7)
    for factor in (2.5, 3, -1e-3, 1e30):
        assert_like(scaled(x, factor), (x.double() * factor).float())
    assert_like(scaled(x, factor=2.0), x * 2.0)
    for alpha in (2, 0.5):  # whatever number the default is
        assert_like(plus(x, x, alpha), torch.add(x, x, alpha=alpha))


@pytest.mark.parametrize(("one", "two"), [*itertools.product(DTYPES, DTYPES)])
def test_promotion(one: torch.dtype, two: torch.dtype) -> None:
    x, y = (ints(3, 5, high=5).to(d) for d in (one, two))
    assert_like(plus(x, y), torch.add(x, y))
    assert_like(plus(x, y[0, 0]), torch.add(x, y[0, 0]))  # a tensor of no dims yields


def test_promotion_of_a_number() -> None:
    x = ints(5)
    assert scaled(x, 0.5).dtype == torch.result_type(x, 0.5) == torch.float32
    assert_like(scaled(x, 0.5), x * 0.5)
    assert_like(half_of(x), x / 2)
    assert half_of(x.half()).dtype == torch.float16


def test_what_no_rule_names_keeps_its_dtype() -> None:
    x, y, condition = rand(4, 5), rand(5).half(), bools(4, 1)
    assert_like(pick(condition, x, y), torch.where(condition, x, y))
    large = ints(5) + 2**40  # no float32 holds them
    condition = bools(5)
    assert_like(pick(condition, large, -large), torch.where(condition, large, -large))


LAYOUTS = {
    "channels_last": lambda: rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted": lambda: rand(5, 4, 3, 2).permute(3, 2, 1, 0),
    "sliced": lambda: rand(2, 3, 4, 10)[..., ::2],
    "expanded": lambda: rand(1, 3, 1, 5).expand(2, 3, 4, 5),
    "unaligned": lambda: rand(2, 3, 4, 6)[..., 1:],
    "overlapping": lambda: rand(60).as_strided((2, 3, 4, 5), (20, 4, 2, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_broadcasting(layout: str) -> None:
    x = LAYOUTS[layout]()
    others = (rand(3, 1, 1), rand(2, 3, 4, 5), rand(5, 3, 4, 2).permute(3, 1, 2, 0), rand())
    for y in (*others, x):
        assert_like(plus(x, y), torch.add(x, y))
        assert_like(plus(y, x), torch.add(y, x))
        fakes = x.to("meta"), y.to("meta")
        assert_same_metadata(plus(*fakes), torch.add(*fakes))


def test_small_and_empty() -> None:
    assert_like(plus(rand(), rand()) * 0, rand() * 0)
    for shape in ((0,), (3, 0, 2)):
        assert_like(plus(rand(*shape), rand(1)), rand(*shape) + rand(1))
        assert [t.shape for t in three(rand(*shape), rand(1))] == [shape] * 3


def test_several_outputs() -> None:
    x, y = ints(4, 5), ints(5)
    product, half, larger = three(x, y)
    assert_like(product, (x + 3) * y)
    assert_like(half, x / 2)
    assert_like(larger, x > y)


def test_subclasses_are_taken_as_plain_tensors() -> None:
    class Own(Tensor):
        pass

    x = rand(5)
    assert_like(plus(x.as_subclass(Own), x).as_subclass(Tensor), x + x)
    assert_like(plus(torch.nn.Parameter(x), x).detach(), x + x)


def test_a_variant_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gems_compile.user_ops.MAX_COMPILED", 2)
    served = plus.served
    monkeypatch.setattr(served, "variants", {})
    for n in (3, 3, 4, 3):
        plus(rand(n), rand(n))
    assert sorted(v.calls for v in served.variants.values()) == [1, 3]
    plus(rand(5), rand(5))
    assert len(served.variants) == 2  # the oldest is forgotten
    x = rand(3)
    assert_like(plus(x, x), x + x)


# results into memory ------------------------------------------------------------------------------


def test_out() -> None:
    x, y = rand(4, 5), rand(5)
    out = torch.empty(5, 4, device=DEVICE).T
    version = out._version
    assert gelu_and_mul(x, y, out=out) is out and out._version > version
    assert_same_values(out, gelu_and_mul(x, y))
    assert out.stride() == (1, 4)
    with torch.inference_mode():
        assert_same_values(gelu_and_mul.inplace(x.clone(), y), out)
    outs = tuple(torch.empty(4, 5, device=DEVICE, dtype=d) for d in (None, None, torch.bool))
    assert three(x, y, out=outs) is outs
    for got, want in zip(outs, three(x, y), strict=True):
        assert_same_values(got, want)


def test_in_place_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rand(4, 5), rand(5)
    want = gelu_and_mul(x, y)
    monkeypatch.setattr(Tensor, "copy_", None)  # which would be another
    assert gelu_and_mul.inplace(x, y) is x
    assert_same_values(x, want)


def test_memory_that_is_shared_is_read_before_it_is_written() -> None:
    memory = rand(6)
    want = memory[:5] + memory[1:]
    plus(memory[:5], memory[1:], out=memory[1:])
    assert_same_values(memory[1:], want)


def test_out_of_another_dtype() -> None:
    x, wide = rand(5), torch.empty(5, device=DEVICE, dtype=torch.float64)
    plus(x, x, out=wide)
    assert_same_values(wide, (x + x).double())


def test_in_place_with_gradients() -> None:
    leaf, y = rand(5, grad=True), rand(5)
    x = leaf * 2
    gelu_and_mul.inplace(x, y).sum().backward()
    got, leaf.grad = leaf.grad, None
    plain(leaf * 2, y).sum().backward()
    assert_same_values(got, leaf.grad)


# compiled -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_fuses_with_its_neighbours(dtype: torch.dtype) -> None:
    x, y = rand(4, 33, dtype=dtype), rand(33, dtype=dtype)
    backend = Gems()
    fn = lambda x, y: (gelu_and_mul(x + 1, y, "tanh") * 2).relu()  # noqa: E731
    got = torch.compile(fn, backend=backend, fullgraph=True)(x, y)
    assert_same_values(got, fn(x, y), exact=True)
    assert launched(backend) == (1, 0)
    (source,) = backend.reports[0].sources
    assert "fused_add_gelu_and_mul_mul_relu" in source.text
    assert "test_authoring.py" in source.commented and "authoring.py:" in source.commented
    assert "return self.op(" not in source.commented  # the comment is the user's line


def test_alone_it_is_a_kernel() -> None:
    backend = Gems()
    x = rand(9)
    assert_like(torch.compile(plus, backend=backend)(x, x), x + x)
    assert launched(backend) == (1, 0)


def test_several_outputs_are_one_kernel() -> None:
    x, y = rand(4, 5), rand(5)
    backend = Gems()
    fn = lambda x, y: [t * 2 for t in three(x.sin(), y)]  # noqa: E731
    got = torch.compile(fn, backend=backend, fullgraph=True)(x, y)
    for a, b in zip(got, fn(x, y), strict=True):
        assert_like(a, b)
    assert launched(backend) == (1, 0)
    backend = Gems()
    first = torch.compile(lambda x, y: three(x, y)[1], backend=backend)(x, y)  # others are unused
    assert_like(first, x * 0.5)
    assert launched(backend) == (1, 0)


def test_before_a_reduction() -> None:
    x, y = rand(4, 33), rand(33)
    backend = Gems()
    got = torch.compile(lambda x, y: gelu_and_mul(x, y).softmax(-1), backend=backend)(x, y)
    assert_like(got, plain(x, y).softmax(-1))
    assert launched(backend) == (1, 0)


def test_writing_is_one_kernel() -> None:
    x, y, out = rand(4, 5), rand(5), torch.empty(4, 5, device=DEVICE)
    want = gelu_and_mul(x, y)

    def step(x: Tensor, y: Tensor, out: Tensor) -> None:
        gelu_and_mul(x, y, out=out)
        gelu_and_mul.inplace(x, y)

    backend = Gems()
    torch.compile(step, backend=backend, fullgraph=True)(x, y, out)
    assert_same_values(out, want)
    assert_same_values(x, want)
    assert launched(backend)[1] == 0


def test_dynamic_shapes() -> None:
    backend = Gems()
    compiled = torch.compile(
        lambda x, y: gelu_and_mul(x, y) * 2, backend=backend, dynamic=True, fullgraph=True
    )
    for n in (3, 7, 9):
        x, y = rand(n, 5), rand(n, 1)
        assert_like(compiled(x, y), plain(x, y) * 2)
    assert len(backend.reports) == 1 and launched(backend) == (1, 0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_other_backends(backend: str) -> None:
    x, y = rand(4, 5, grad=True), rand(4, 5)  # alone, so that Inductor writes no C++
    got = torch.compile(gelu_and_mul, backend=backend, fullgraph=True)(x, y)
    assert_same_values(got, plain(x, y))
    if backend == "aot_eager":  # whose backward sums nothing
        got.sum().backward()
        x_grad, x.grad = x.grad, None
        plain(x, y).sum().backward()
        assert_same_values(x_grad, x.grad)


# torch's rules ------------------------------------------------------------------------------------


def test_opcheck() -> None:
    x, y = rand(4, 5, grad=True), rand(5, grad=True)
    torch.library.opcheck(gelu_and_mul.op, (x, y), {"approximate": "tanh"})
    torch.library.opcheck(three.op, (x, y))
    torch.library.opcheck(half_of.op, (ints(3),))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck(approximate: str) -> None:
    x, y = (rand(*s, dtype=torch.float64, grad=True) for s in ((3, 4), (4,)))
    torch.autograd.gradcheck(lambda x, y: gelu_and_mul(x, y, approximate), (x, y))


def test_gradcheck_of_a_backward_in_torch() -> None:
    x, y = (rand(*s, dtype=torch.float64, grad=True) for s in ((3, 4), (3, 1)))
    torch.autograd.gradcheck(lambda x, y: three(x, y)[:2], (x, y))
    torch.autograd.gradcheck(square, (x,))
    torch.autograd.gradgradcheck(square, (x,))


def test_gradients_compiled() -> None:
    x, y = rand(4, 33, dtype=torch.bfloat16, grad=True), rand(33, grad=True)
    backend = Gems()
    torch.compile(lambda x, y: (gelu_and_mul(x, y) ** 2).sum(), backend=backend)(x, y).backward()
    got = x.grad, y.grad
    x.grad = y.grad = None
    (gelu_and_mul(x, y) ** 2).sum().backward()
    for a, b in zip(got, (x.grad, y.grad), strict=True):
        assert_like(a, b)
    assert [r.aten_calls for r in backend.reports] == [0, 0]


def test_no_gradient_is_an_error_where_it_is_asked_for() -> None:
    x = rand(3, grad=True)
    y = no_gradient(x)
    assert_same_values(y, x + 1)
    with pytest.raises(AuthoringError, match=r"no_gradient has no backward.*@no_gradient.backward"):
        y.sum().backward()


def test_vmap() -> None:
    x, y = rand(3, 4, 5), rand(5, 3)
    got = torch.vmap(gelu_and_mul, in_dims=(0, 1))(x, y)
    assert_same_values(got, torch.vmap(plain, in_dims=(0, 1))(x, y))
    product, _, larger = torch.vmap(three, in_dims=(None, 0))(x[0], y.T)
    assert_same_values(product, (x[0] + 3) * y.T[:, None])
    assert_same_values(larger, x[0] > y.T[:, None])
