"""Attention by kernels of ours, behind ``scaled_dot_product_attention``: numbers and gradients
against float64, layouts against ATen's, and the machine code of the kernels without a GPU."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE, assert_same_metadata, gems_only, rand
from machine_code import assembly
from opcheck import options
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gems_compile
from gems_compile.kernels.fused import register_torch_ops
from gems_compile.kernels.target import INTERPRETER
from gems_compile.lowering.attention import Call, Tile, of_forward, tile_of
from gems_compile.lowering.decompose import whole_table
from gems_compile.lowering.ir import Declined, Value
from gems_compile.lowering.pipeline import compile_graph
from gems_compile.lowering.source import Source

CPU = "_scaled_dot_product_flash_attention_for_cpu"
FLASH, EFFICIENT, CUDNN = (
    f"_scaled_dot_product_{n}_attention" for n in ("flash", "efficient", "cudnn")
)
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the overload is a CPU's")
gpu = pytest.mark.gpu

BFLOAT16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
#: of what float64 gives: units in the last place of the largest one, for p is rounded to the dtype
ULPS = {BFLOAT16: 3 * 2**-8, HALF: 3 * 2**-11, FLOAT: 5e-6}


# what is right -----------------------------------------------------------------------------------


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
        # of one key the gradients of queries are differences of equal numbers, of about 1
        off = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)
        assert off <= ULPS[dtype], f"result {k}: {off.item():.2g} of {b.abs().max().item():.2g}"


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


SIZES = {
    "odd": (2, 3, 3, 37, 41, 24),
    "one query": (1, 2, 2, 1, 70, 16),
    "one key": (1, 2, 2, 19, 1, 16),
    "many blocks": (1, 2, 2, 300, 271, 16),
    "whole blocks": (1, 2, 2, 128, 256, 32),
    "width 80": (1, 2, 2, 33, 65, 80),
    "width 96": (1, 1, 1, 40, 33, 96),
    "width 192": (1, 1, 1, 33, 40, 192),
    "width 256": (1, 1, 1, 17, 20, 256),
    "width 8": (1, 2, 2, 20, 30, 8),
}


# on a CPU ----------------------------------------------------------------------------------------


@on_cpu
@gems_only
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes: tuple[int, ...], causal: bool) -> None:
    dtype = FLOAT if sizes[-1] <= 128 else HALF
    check(CPU, operands(sizes, dtype), causal=causal)


@on_cpu
@gems_only
@pytest.mark.parametrize("dtype", [BFLOAT16, HALF, FLOAT])
@pytest.mark.parametrize("inside", [False, True])
def test_dtypes_and_layouts(dtype: torch.dtype, inside: bool) -> None:
    check(CPU, operands((2, 4, 4, 45, 67, 40), dtype, inside), causal=True, scale=0.3)


@on_cpu
@gems_only
def test_parts_of_one_projection() -> None:
    """q, k and v as views of one tensor, of which ATen's results are dense."""
    whole = rand(2, 50, 3, 2, 16)
    q, k, v = (whole[:, :, part].transpose(1, 2).requires_grad_() for part in range(3))
    check(CPU, (q, k, v), causal=True)


BIASES = {
    "full": (2, 3, 37, 41),
    "of heads": (1, 3, 37, 41),
    "of keys": (2, 1, 1, 41),
    "of rows": (37, 1),
    "two dims": (37, 41),
}


@on_cpu
@gems_only
@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_bias(shape: tuple[int, ...]) -> None:
    check(CPU, operands(SIZES["odd"], FLOAT), bias=rand(*shape))


@on_cpu
@gems_only
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT16])
def test_queries_that_see_nothing(dtype: torch.dtype) -> None:
    bias = rand(37, 41)
    bias[5], bias[9, 3:], bias[36] = -math.inf, -math.inf, -math.inf
    check(CPU, operands(SIZES["odd"], dtype), bias=bias.to(dtype))


def served(name: str, *args: Any, **kwargs: Any) -> Any:
    """(ATen's, ours) of an overload called by itself."""
    overload = getattr(torch.ops.aten, name).default
    want = overload(*args, **kwargs)
    with gems_compile.use_gems(only=[name]):
        got = overload(*args, **kwargs)
    return want, got


@on_cpu
@gems_only
def test_either_forward_goes_with_either_backward() -> None:
    """The logarithms of the sums are ATen's, so a graph may be recorded with ours off."""
    given = operands((1, 2, 2, 30, 21, 16), FLOAT)
    bias = rand(30, 21)
    bias[3] = -math.inf
    want, got = served(CPU, *(t.detach() for t in given), attn_mask=bias)
    assert_same_metadata(got[1], want[1])
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert got[1][0, 0, 3] == 0
    for first, second in ((True, False), (False, True)):
        with gems_compile.use_gems(only=[CPU] if first else [f"{CPU}_backward"]):
            out = F.scaled_dot_product_attention(*given, attn_mask=bias)
            if not second:
                gems_compile.disable()
            grads = torch.autograd.grad(out.square().sum(), given)
        right = exact(*given, bias, False, None)
        assert_near(grads, torch.autograd.grad(right.square().sum(), given), FLOAT)


@on_cpu
@gems_only
def test_heads_share_keys() -> None:
    """ATen's overload takes fewer heads of keys than of queries, as a GPU's do."""
    q, k, v = operands((2, 6, 2, 33, 45, 16), FLOAT)
    got = served(CPU, *(t.detach() for t in (q, k, v)), 0.0, True)[1]
    assert ours(CPU), whys(CPU)
    right = exact(q, k, v, None, True, None)
    assert_near([got[0]], [right], FLOAT)
    do = torch.randn_like(right).float()
    register_torch_ops()
    back = [t.detach() for t in (q, k, v)]
    delta = (do * got[0]).sum(-1, keepdim=True)
    how = back[0], back[1], back[2], None, got[1], delta, True, 0, 0.25, False, "cpu"
    plain = [torch.ops.gems.attention_queries(do, *how), *torch.ops.gems.attention_keys(do, *how)]
    assert_near(plain, torch.autograd.grad(right, (q, k, v), do.double()), FLOAT)


@on_cpu
@gems_only
def test_a_gradient_of_one_number() -> None:
    """That of a sum is expanded."""
    given = operands((1, 2, 2, 20, 20, 16), FLOAT)
    with gems_compile.use_gems(only=[CPU, f"{CPU}_backward"]):
        got = torch.autograd.grad(F.scaled_dot_product_attention(*given).sum(), given)
    assert ours(f"{CPU}_backward") == 1, whys(f"{CPU}_backward")
    want = torch.autograd.grad(exact(*given, None, False, None).sum(), given)
    assert_near(got, want, FLOAT)


@on_cpu
@gems_only
def test_what_is_atens() -> None:
    """With a reason, and ATen's numbers."""
    q, k, v = (t.detach() for t in operands((1, 2, 2, 20, 24, 16), FLOAT))
    cases: list[tuple[str, Sequence[Any], dict[str, Any]]] = [
        ("a scale of", (q, k, v), {"scale": -1.0}),
        ("attention of float64", (q.double(), k.double(), v.double()), {}),
        ("side by side", (q.mT.contiguous().mT, k, v), {}),
        ("up to 128", [torch.cat([t] * 9, -1) for t in (q, k, v)], {}),
    ]
    for why, args, how in cases:
        want, got = served(CPU, *args, **how)
        assert not ours(CPU)
        assert any(why in w for w in whys(CPU)), (why, whys(CPU))
        # ATen's kernel itself reads rows whose elements lie apart as if they did not
        alike = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert alike or args[0].stride(-1) != 1


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [
        (FLASH, {"dropout_p": 0.1}, "dropout"),
        (FLASH, {"return_debug_mask": True}, "mask of a dropout"),
        (FLASH, {"is_causal": True}, "diagonal"),
        (CUDNN, {"is_causal": True}, "diagonal"),
        (CUDNN, {"dropout_p": 0.1}, "dropout"),
        (EFFICIENT, {"dropout_p": 0.1}, "dropout"),
        (f"{EFFICIENT}_backward", {"grad_input_mask": [True] * 4}, "gradient of the bias"),
        (FLASH, {}, None),
        (EFFICIENT, {"is_causal": True}, None),
        (f"{EFFICIENT}_backward", {"grad_input_mask": [True, True, True, False]}, None),
    ],
)
def test_reasons(name: str, args: dict[str, Any], why: str | None) -> None:
    """Of calls on a GPU, asked without one."""
    from gems_compile.attention import why_native

    q, k = torch.empty(1, 2, 8, 16, dtype=HALF), torch.empty(1, 2, 9, 16, dtype=HALF)
    overload = getattr(torch.ops.aten, name).default
    found = why_native(overload, (), {"query": q, "key": k, "value": k, **args})
    assert (found is None) if why is None else (why in str(found))


# the kernels without a GPU ------------------------------------------------------------------------


def fakes(width: int, dtype: torch.dtype, causal: bool, bias: bool, group: int) -> list[Any]:
    """Graphs of the forward and of the backward, as large models have them."""
    register_torch_ops()
    how = causal, 0, width**-0.5, False, "flash"
    batch, heads, length = 2, 8, 1024
    with FakeTensorMode():
        rows = batch, length
        q, do = (torch.empty(*rows, heads, width, dtype=dtype).transpose(1, 2) for _ in range(2))
        k, v = (
            torch.empty(*rows, heads // group, width, dtype=dtype).transpose(1, 2) for _ in range(2)
        )
        lse, delta = torch.empty(batch, heads, length), torch.empty(batch, heads, length, 1)
        biases = [torch.empty(batch, 1, length, length, dtype=dtype)] if bias else []

        def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Any:
            return torch.ops.gems.attention.default(q, k, v, bias[0] if bias else None, *how)

        def backward(
            do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *bias: Tensor
        ) -> Any:
            given = do, q, k, v, bias[0] if bias else None, lse, delta, *how
            dk_and_dv = torch.ops.gems.attention_keys.default(*given)
            return *dk_and_dv, torch.ops.gems.attention_queries.default(*given)

        table = whole_table()
        return [
            make_fx(forward, decomposition_table=table)(q, k, v, *biases),
            make_fx(backward, decomposition_table=table)(do, q, k, v, lse, delta, *biases),
        ]


def kernels(*how: Any) -> list[Source]:
    """As an H100 would get them."""
    facts = {"multiprocessors": 132, "backend": "cuda", "arch": 90, "shared": 227 * 2**10}
    target = dataclasses.replace(INTERPRETER, **facts)
    made = []
    for graph in fakes(*how):
        report = compile_graph(graph, [], options(target=target, alone=True))[1]
        assert not report.aten
        made += report.sources
    return made


@gems_only
@pytest.mark.parametrize(
    ("width", "dtype", "causal", "bias", "group"),
    [
        (64, BFLOAT16, True, False, 1),
        (64, HALF, False, True, 1),
        (128, BFLOAT16, False, False, 1),
        (128, HALF, True, False, 4),
        (256, BFLOAT16, True, False, 1),
        (64, FLOAT, True, False, 1),
    ],
)
def test_machine_code(
    width: int, dtype: torch.dtype, causal: bool, bias: bool, group: int, tmp_path: Any
) -> None:
    """Products on tensor cores, keys and values copied ahead of them in pieces of 16 bytes, and no
    more shared memory than a multiprocessor has."""
    found = kernels(width, dtype, causal, bias, group)
    names = ["attention_forward", "attention_backward_keys", "attention_backward_queries"]
    assert [s.name for s in found] == names
    for source in found:
        text = assembly(source, tmp_path)
        assert "wgmma.mma_async" in text, source.name
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)
        assert shared_bytes(source, tmp_path) <= 227 * 2**10


def shared_bytes(source: Source, folder: Any) -> int:
    import json

    return int(json.loads((folder / f"{source.name}.json").read_text())["shared"])


@gems_only
def test_one_kernel_for_all_lengths() -> None:
    """A length is a number that the kernel is given, and so are strides of batches and heads."""
    texts = set()
    for length in (500, 1000, 4096):
        with FakeTensorMode():
            q = torch.empty(2, length, 4, 64, dtype=HALF).transpose(1, 2)
        gm = make_fx(
            lambda q: torch.ops.gems.attention.default(
                q, q, q, None, True, 0, 0.125, False, "flash"
            ),
            decomposition_table=whole_table(),
            tracing_mode="fake",
        )(q)
        report = compile_graph(gm, [], options(alone=True))[1]
        texts |= {source.key for source in report.sources}
    assert len(texts) == 1


@pytest.mark.parametrize("shared", [227, 163, 99, 64])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("which", ["forward", "keys", "queries"])
def test_tiles_fit(which: str, width: int, shared: int) -> None:
    target = dataclasses.replace(INTERPRETER, shared=shared * 2**10)
    for dtype in ("bfloat16", "float32"):
        if dtype == "float32" and width > 128:
            continue
        x = Value("buffer", None, (), (1, 1, 4096, width), dtype)
        tile = tile_of(which, x, x, x, False, target)
        block = max(16, 1 << (width - 1).bit_length())
        stays, moves = (tile.keys, tile.queries) if which == "keys" else (tile.queries, tile.keys)
        rows = (1 if which == "forward" else 2) * stays + 2 * tile.stages * moves
        assert rows * block * (4 if dtype == "float32" else 2) <= target.shared
        assert isinstance(tile, Tile) and min(tile.queries, tile.keys) >= 16


def test_shapes_that_do_not_fit() -> None:
    def value(*shape: int) -> Value:
        return Value("buffer", None, (), shape, "float16")

    how = False, 0, 1.0, False, "efficient"
    q, k = value(2, 4, 8, 16), value(2, 4, 9, 16)
    assert of_forward(q, k, k, value(4, 1, 9), *how) == Call(True, *how)
    for bad in (value(2, 3, 9, 16), value(1, 4, 9, 16), value(2, 4, 9, 8)):
        with pytest.raises(Declined):
            of_forward(q, bad, bad, None, *how)
    with pytest.raises(Declined, match="a bias of"):
        of_forward(q, k, k, value(8, 8), *how)


# on a GPU ----------------------------------------------------------------------------------------

BACKENDS = {
    FLASH: "FLASH_ATTENTION",
    EFFICIENT: "EFFICIENT_ATTENTION",
    CUDNN: "CUDNN_ATTENTION",
}
LARGE = {
    "whole blocks": (2, 4, 4, 512, 512, 64),
    "odd": (2, 3, 3, 397, 397, 64),
    "width 128": (2, 4, 4, 1000, 1000, 128),
    "width 96": (1, 2, 2, 300, 300, 96),
    "width 256": (1, 2, 2, 257, 257, 256),
}


@gpu
@gems_only
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT16, HALF])
@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("name", BACKENDS)
def test_on_a_gpu(
    name: str, sizes: tuple[int, ...], dtype: torch.dtype, causal: bool, inside: bool
) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name == CUDNN and sizes[-1] > 128:
        pytest.skip("cuDNN's backward has no such heads")
    with sdpa_kernel(SDPBackend[BACKENDS[name]]):
        check(name, operands(sizes, dtype, inside), causal=causal)


@gpu
@gems_only
@pytest.mark.parametrize("name", [FLASH, CUDNN])
def test_shared_keys_on_a_gpu(name: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend[BACKENDS[name]]):
        check(name, operands((2, 8, 2, 300, 300, 128), BFLOAT16), causal=True)


@gpu
@gems_only
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT])
@pytest.mark.parametrize("shape", [(2, 4, 304, 272), (1, 1, 304, 272), (2, 1, 1, 272)])
def test_bias_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    bias = rand(*shape, dtype=dtype)
    bias[..., 7] = -math.inf
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        check(EFFICIENT, operands((2, 4, 4, 304, 272, 64), dtype), bias=bias)


@gpu
@gems_only
@pytest.mark.parametrize("width", [64, 128])
def test_float32_on_a_gpu(width: int) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        check(EFFICIENT, operands((2, 2, 2, 300, 200, width), FLOAT), causal=True)


@gpu
@gems_only
@pytest.mark.parametrize("name", BACKENDS)
def test_all_results_on_a_gpu(name: str) -> None:
    """Those that autograd saves, too."""
    q, k, v = (t.detach() for t in operands((1, 4, 4, 200, 200, 64), BFLOAT16))
    more = () if name == FLASH else (None, True)
    want, got = served(name, q, k, v, *more)
    assert ours(name) == 1, whys(name)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, Tensor):
            assert_same_metadata(a, b)
        else:
            assert a == b
    torch.testing.assert_close(got[1][:, :, :200], want[1][:, :, :200], rtol=1e-4, atol=1e-3)
