"""Attention by kernels of ours on a GPU, behind each of ATen's backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attentioncheck import (
    BFLOAT16,
    CUDNN,
    EFFICIENT,
    FLASH,
    FLOAT,
    HALF,
    assert_near,
    check,
    exact,
    operands,
    served,
)
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import assert_same_metadata, gems_only, rand
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gems_compile

pytestmark = [pytest.mark.gpu, gems_only]

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


def check_backend(name: str, given: tuple[Tensor, Tensor, Tensor], **how: Any) -> None:
    """``check`` of one of ATen's backends, where it takes such calls at all."""
    with sdpa_kernel(getattr(SDPBackend, BACKENDS[name])):
        try:
            mask, gqa = how.get("bias"), given[0].shape[1] != given[1].shape[1]
            causal = how.get("causal", False)
            F.scaled_dot_product_attention(*given, mask, is_causal=causal, enable_gqa=gqa)
        except RuntimeError as error:
            pytest.skip(str(error).splitlines()[0])
        check(name, given, **how)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT16, HALF])
@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("name", BACKENDS)
def test_on_a_gpu(
    name: str, sizes: tuple[int, ...], dtype: torch.dtype, causal: bool, inside: bool
) -> None:
    check_backend(name, operands(sizes, dtype, inside), causal=causal)


@pytest.mark.parametrize("name", [FLASH, CUDNN])
def test_shared_keys_on_a_gpu(name: str) -> None:
    check_backend(name, operands((2, 8, 2, 300, 300, 128), BFLOAT16), causal=True)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT])
@pytest.mark.parametrize("shape", [(2, 4, 304, 272), (1, 1, 304, 272), (2, 1, 1, 272)])
def test_bias_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    bias = rand(*shape, dtype=dtype)
    bias[..., 7] = -math.inf
    check_backend(EFFICIENT, operands((2, 4, 4, 304, 272, 64), dtype), bias=bias)


@pytest.mark.parametrize("width", [64, 128])
def test_float32_on_a_gpu(width: int) -> None:
    check_backend(EFFICIENT, operands((2, 2, 2, 300, 200, width), FLOAT), causal=True)


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


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_either_forward_goes_with_either_backward_on_a_gpu(name: str, first: bool) -> None:
    """One of them is ours."""
    given = operands((2, 4, 4, 300, 300, 64), BFLOAT16)
    with sdpa_kernel(getattr(SDPBackend, BACKENDS[name])):
        with gems_compile.use_gems(only=[name] if first else []):
            out = F.scaled_dot_product_attention(*given, is_causal=True)
        do = torch.randn_like(out)
        with gems_compile.use_gems(only=[] if first else [f"{name}_backward"]):
            grads = torch.autograd.grad(out, given, do)
    assert ours(name if first else f"{name}_backward") == 1
    right = exact(*given, None, True, None)
    want = torch.autograd.grad(right, given, do.double())
    assert_near([out, *grads], [right, *want], BFLOAT16)


def test_a_captured_graph() -> None:
    """Replayed with other numbers in place."""
    q, k, v = (t.detach() for t in operands((1, 4, 4, 256, 256, 64), BFLOAT16))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), gems_compile.use_gems(only=[FLASH]):
        F.scaled_dot_product_attention(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = F.scaled_dot_product_attention(q, k, v)
        q.copy_(torch.randn_like(q))
        graph.replay()
    assert ours(FLASH) == 2, whys(FLASH)
    assert_near([out], [exact(q, k, v, None, False, None)], BFLOAT16)
