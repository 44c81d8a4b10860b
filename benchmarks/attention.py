"""``python -m benchmarks.attention``: scaled_dot_product_attention in eager mode, ATen's backends
and our kernels in turns: milliseconds and TFLOP/s of the forward and of the backward.

Numbers are compared with float64 first, in a head of the first and of the last batch. ``--tile
keys=64x64x8x2`` (queries x keys x warps x stages of "forward", "keys" or "queries") tries a tile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gems_compile
from benchmarks import timing
from gems_compile import eager
from gems_compile.lowering import attention

BACKENDS = ("flash", "cudnn", "efficient")


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    shared: int  # heads of keys
    length: int
    width: int
    causal: bool

    @property
    def name(self) -> str:
        heads = f"{self.heads}" if self.heads == self.shared else f"{self.heads}/{self.shared}"
        causal = " causal" if self.causal else ""
        return f"{self.batch} x {heads} x {self.length} x {self.width}{causal}"

    def flops(self, backward: bool) -> float:
        """As one counts them: two products of the forward, five of the backward."""
        product = 2.0 * self.batch * self.heads * self.length**2 * self.width
        return product * (5 if backward else 2) / (2 if self.causal else 1)

    def make(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """q, k, v as a linear layer leaves them."""
        torch.manual_seed(1234)
        many = (self.heads, self.shared, self.shared)
        shapes = [(self.batch, self.length, heads, self.width) for heads in many]
        drawn = [torch.randn(s, device=device, dtype=dtype).transpose(1, 2) for s in shapes]
        return [x.requires_grad_() for x in drawn]


CASES = [
    Case(*sizes, causal)
    for sizes in (
        (4, 16, 16, 4096, 64),
        (4, 16, 16, 4096, 128),
        (16, 12, 12, 1024, 64),
        (4, 32, 8, 4096, 128),
        (1, 32, 8, 16384, 128),
    )
    for causal in (False, True)
]
SMALL = [Case(1, 2, 2, 40, 16, False), Case(2, 2, 2, 33, 24, True)]


def run(case: Case, given: Sequence[Tensor]) -> Tensor:
    gqa = case.heads != case.shared
    return F.scaled_dot_product_attention(*given, is_causal=case.causal, enable_gqa=gqa)


@contextlib.contextmanager
def side(name: str) -> Iterator[None]:
    """ "flash" is ATen's backend, "flash, gems" ours behind its overload."""
    backend, _, ours = name.partition(", ")
    names = [f"_scaled_dot_product_{backend}_attention"] if backend in BACKENDS else []
    names = names or ["_scaled_dot_product_flash_attention_for_cpu"]
    chosen = contextlib.nullcontext()
    if backend in BACKENDS:
        chosen = sdpa_kernel(getattr(SDPBackend, f"{backend.upper()}_ATTENTION"))
    with chosen, gems_compile.use_gems(only=[*names, f"{names[0]}_backward"] if ours else []):
        yield


def distance(case: Case, given: Sequence[Tensor], found: Sequence[Tensor], grad: Tensor) -> float:
    """The largest error of results and gradients of a group of heads, of the largest number."""
    worst, group = 0.0, case.heads // case.shared
    for batch in {0, case.batch - 1}:
        parts = [(batch, slice(0, n)) for n in (group, 1, 1)]
        q, k, v = (
            x.detach()[at].double().requires_grad_() for x, at in zip(given, parts, strict=True)
        )
        s = q @ k.mT * case.width**-0.5
        if case.causal:
            s = s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril(), -torch.inf)
        out = torch.softmax(s, -1) @ v
        want = [out, *torch.autograd.grad(out, (q, k, v), grad[batch, :group].double())]
        for a, b, at in zip(found, want, [parts[0], *parts], strict=True):
            off = (a.detach()[at].double() - b.detach()).abs().max() / b.detach().abs().max()
            worst = max(worst, off.item())
    return worst


def rows(case: Case, sides: Sequence[str], dtype: torch.dtype, seconds: float) -> Iterator[Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = case.make(dtype, device)
    outs: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name in sides:
        with side(name):
            try:
                out = run(case, given)
            except RuntimeError as error:  # this backend has no kernel for it
                print(f"{case.name:32} {name:16} {str(error).splitlines()[0]}")
                continue
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
            grads = torch.autograd.grad(out, given, grad, retain_graph=True)
        outs[name] = out
        errors[name] = distance(case, given, (out, *grads), grad)

    def forward(name: str) -> Callable[[], object]:
        return lambda: run(case, [x.detach() for x in given])

    def backward(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(outs[name], given, grad, retain_graph=True)

    for back, step in ((False, forward), (True, backward)):
        best: dict[str, float] = {}
        for _ in range(3):  # in turns, as clocks drift
            for name in outs:
                with side(name):
                    ms = timing.median_ms(step(name), device, min_seconds=seconds / 3)
                best[name] = min(best.get(name, ms), ms)
        for name, ms in best.items():
            yield {
                "case": case.name,
                "side": name,
                "backward": back,
                "ms": ms,
                "tflops": case.flops(back) / ms / 1e9,
                "error": errors[name],
            }


def use_tile(text: str) -> None:
    """Have a kernel run in another tile, for all heads and dtypes."""
    which, _, numbers = text.partition("=")
    tile = attention.Tile(*map(int, numbers.split("x")))
    for table in (attention.TILES, attention.CROWDED, attention.WIDE):
        table[which] = dict.fromkeys(table[which], tile)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default=",".join(BACKENDS), help="ATen's to compare with")
    parser.add_argument("--ours", default="flash", help="behind which overloads ours are timed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--tile", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=0.6)
    parser.add_argument("--small", action="store_true", help="a trial on a CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    for text in options.tile:
        use_tile(text)
    on_gpu = torch.cuda.is_available()
    sides = [*options.backends.split(",")] if on_gpu else ["cpu"]
    sides += [f"{name}, gems" for name in (options.ours.split(",") if on_gpu else ["cpu"])]
    found: list[dict[str, Any]] = []
    for case in SMALL if options.small else CASES:
        if options.only not in case.name:
            continue
        for row in rows(case, sides, getattr(torch, options.dtype), options.seconds):
            found.append(row)
            what = "backward" if row["backward"] else "forward"
            print(
                f"{row['case']:32} {what:8} {row['side']:16} {row['ms']:9.3f} ms"
                f" {row['tflops']:7.1f} TFLOP/s   error {row['error']:.1e}",
                flush=True,
            )
    for handler in eager._state.handlers.values():
        for variant in handler.variants.values():
            if variant.why:
                print(f"{handler.name} was ATen's: {variant.why}")
    if options.json:
        device = torch.cuda.get_device_name() if on_gpu else "cpu"
        options.json.write_text(json.dumps({"device": device, "rows": found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
