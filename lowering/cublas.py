"""Matrix products that cuBLAS is called for from the native launcher, among a run's kernels.

``torch.mm`` takes the host 10 to 20 us, in which cuBLAS chooses the algorithm again. Here it is
asked once, for the same choice: results are the same to the bit. Where something was set that the
choice depends on, products stay ATen's.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .private import reinterpreter

#: cuBLAS's numbers for what a product may be of (library_types.h)
TYPES = {"float16": 2, "bfloat16": 14}
#: enumerators of ``torch.backends.cuda.preferred_blas_library`` that mean cuBLAS
CUBLAS = {"Default", "Cublas"}


class Problem(NamedTuple):
    """(rows, inner) times (inner, columns); ``left`` and ``right``: strides of the factors. The
    result is contiguous."""

    dtype: str
    rows: int
    inner: int
    columns: int
    left: tuple[int, int]
    right: tuple[int, int]

    @classmethod
    def of(cls, told: Sequence[Any]) -> Problem:
        """From a list, as JSON has it."""
        dtype, rows, inner, columns, left, right = told
        return cls(dtype, rows, inner, columns, tuple(left), tuple(right))

    def asked(self) -> tuple[int, ...]:
        """As ``cublas.h`` wants it: type, sizes, which factor is turned, leading dimensions."""
        factors = [(self.rows, self.inner, self.left), (self.inner, self.columns, self.right)]
        turned, ld = zip(*(leading(*factor) or (0, 0) for factor in factors), strict=True)
        return (TYPES[self.dtype], self.rows, self.columns, self.inner, *turned, *ld)


def leading(rows: int, columns: int, strides: tuple[int, int]) -> tuple[int, int] | None:
    """(whether columns lie together and not rows, how far one is from the next); None where neither
    do. Where both do, it is as ATen sees it (``cublasCommonArgs``)."""
    row, column = strides
    if (columns == 1 or column == 1) and (rows == 1 or row == columns):  # contiguous
        return 0, columns
    if row == 1 and column >= rows:
        return 1, column
    if column == 1 and row >= columns:
        return 0, row
    return None


def library() -> str:
    return f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}"


def why_not(device: torch.device) -> str | None:
    """Why products on a device are not called so."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "there is no cuBLAS"
    if not _is_loaded(library()):
        return f"torch has not loaded {library()}"
    matmul = torch.backends.cuda.matmul
    for name, default in _DEFAULTS.items():
        if getattr(matmul, name, default) is not default:
            return f"torch.backends.cuda.matmul.{name} was set"
    if getattr(torch.backends.cuda.preferred_blas_library(), "name", "") not in CUBLAS:
        return "torch.backends.cuda.preferred_blas_library is another"
    if torch.cuda.tunable.is_enabled():
        return "torch.cuda.tunable is on"
    return None


_DEFAULTS = {
    "allow_bf16_reduced_precision_reduction": True,
    "allow_fp16_reduced_precision_reduction": True,
    "allow_fp16_accumulation": False,
}


def most_workspace(device: int) -> int:
    """How many bytes torch gives cuBLAS to work in (``CUDABlas.cpp``)."""
    given = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if given:
        return sum(int(size) * int(many) for size, many in given) << 10
    large = torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
    return 4096 * 8 << 10 if large else (4096 * 2 + 16 * 8) << 10


@functools.cache
def _is_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True


def in_torch(problem: Problem) -> Callable[..., None]:
    """The product by ATen. A factor, or the result, is a tensor and how many bytes it begins behind
    that tensor's first."""
    view, itemsize = reinterpreter(), getattr(torch, problem.dtype).itemsize
    rows, inner, columns = problem.rows, problem.inner, problem.columns

    def multiply(left: Any, at: int, right: Any, right_at: int, out: Any, out_at: int) -> None:
        torch.mm(
            view(left, (rows, inner), problem.left, at // itemsize),
            view(right, (inner, columns), problem.right, right_at // itemsize),
            out=view(out, (rows, columns), (columns, 1), out_at // itemsize),
        )

    return multiply
