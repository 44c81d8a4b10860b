"""The kernels of ``gems::attention`` and its backward: which tiles, and the text that calls the
device functions of ``kernels.attention`` for one head.

Lengths, and how far apart batches and heads lie, are numbers that the kernel is given: one kernel
serves all lengths. How far apart rows lie is part of the text, or loads would not be vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..kernels.attention_ops import NOTHING_SEEN
from ..kernels.target import Target
from .indexing import ceil_div, is_static
from .ir import BITS, Declined, Value
from .schedule import power_of_two
from .source import WAIT, Lines, Source, whole_kernel

LOG2E = 1.4426950408889634
#: as short as an axis of a matrix product may be
LEAST = 16
#: elements of the longest head
MOST = 256
#: and of float32, beyond which accumulators do not fit into registers
MOST_WIDE = 128
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Call:
    """What the kernels must know beside their operands, of which ``bias`` may be missing."""

    bias: bool
    causal: bool
    offset: int
    scale: float
    tf32: bool
    like: str


@dataclass(frozen=True)
class Tile:
    """BLOCK_M queries times BLOCK_N keys; ``stages`` of the loop are loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


# what a call is -----------------------------------------------------------------------------------


def of_forward(q: Value, k: Value, v: Value, bias: Value | None, *how: Any) -> Call:
    batch, heads, _, width = q.shape
    sizes = [n for x in (q, k, v) for n in x.shape]
    if not is_static(*sizes):
        raise Declined("its kernel is for lengths that are known")
    if q.dtype not in DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        raise Declined(f"attention of {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != width:
        raise Declined("queries, keys and values of different shapes")
    if heads % k.shape[1]:
        raise Declined(f"{heads} heads of queries for {k.shape[1]} of keys")
    longest, most = max(width, v.shape[3]), MOST_WIDE if q.dtype == "float32" else MOST
    if longest > most:
        raise Declined(f"a head of {longest} elements: its kernel has up to {most}")
    for x in (q, k, v):
        _check_rows(x)
    if bias is not None:
        _check_bias(bias, (batch, heads, q.shape[2], k.shape[2]))
    return Call(bias is not None, *how)


def of_backward(
    do: Value, q: Value, k: Value, v: Value, bias: Value | None, lse: Value, delta: Value, *how: Any
) -> Call:
    if do.dtype != q.dtype:
        raise Declined(f"a gradient of {do.dtype} for {q.dtype}")
    _check_rows(do)
    return of_forward(q, k, v, bias, *how)


def _check_rows(x: Value) -> None:
    if x.strides[3] != 1 and x.shape[3] != 1:
        raise Declined("its kernel reads heads whose elements lie side by side")


def _check_bias(bias: Value, scores: tuple[Any, ...]) -> None:
    if bias.dtype not in DTYPES:
        raise Declined(f"a bias of {bias.dtype}")
    own = (1,) * (4 - len(bias.shape)) + bias.shape
    if len(own) != 4 or any(n not in (1, full) for n, full in zip(own, scores, strict=True)):
        raise Declined(f"a bias of {list(bias.shape)} for {list(scores)}")


#: by kernel: of heads of up to so many elements. The best of six or seven on an H200, bfloat16,
#: 4 x 16 heads of 4096 queries and keys; those of MOST are not measured
TILES = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 4, 3), MOST: Tile(128, 64, 8, 2)},
    "keys": {64: Tile(128, 64, 4, 2), 128: Tile(64, 128, 8, 1), MOST: Tile(32, 64, 8, 2)},
    "queries": {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 4, 2), MOST: Tile(64, 32, 8, 2)},
}
#: of float32, whose products are made of three
WIDE = {
    "forward": {64: Tile(64, 32, 4, 2), MOST_WIDE: Tile(32, 32, 4, 1)},
    "keys": {64: Tile(32, 64, 8, 2), MOST_WIDE: Tile(32, 32, 8, 1)},
    "queries": {64: Tile(64, 32, 4, 2), MOST_WIDE: Tile(32, 32, 4, 1)},
}


def tile_of(which: str, q: Value, k: Value, v: Value, target: Target) -> Tile:
    """The tile of one of the kernels, by the width of a head and the dtype; a short side gets one
    no longer than it, a small shared memory one that fits."""
    width = max(block_of(q.shape[3]), block_of(v.shape[3]))
    table = WIDE if q.dtype == "float32" else TILES
    whole = next(tile for most, tile in table[which].items() if width <= most)
    queries, keys = block_of(q.shape[2]), block_of(k.shape[2])
    tile = replace(whole, queries=min(whole.queries, queries), keys=min(whole.keys, keys))
    if tile != whole:
        tile = replace(tile, warps=4)
    row = width * BITS[q.dtype] // 8
    while _rows_in_shared(which, tile) * row > target.shared:
        if tile.stages > 1:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.queries >= tile.keys:
            tile = replace(tile, queries=tile.queries // 2)
        else:
            tile = replace(tile, keys=tile.keys // 2)
        if min(tile.queries, tile.keys) < LEAST:
            raise Declined("its shared memory holds no tile of such heads")
    return tile


def _rows_in_shared(which: str, tile: Tile) -> int:
    """What a program has for good, and of what it walks over two tensors a stage."""
    if which == "keys":
        return 2 * tile.keys + 2 * tile.stages * tile.queries
    return (1 if which == "forward" else 2) * tile.queries + 2 * tile.stages * tile.keys


def block_of(width: Any) -> int:
    return max(LEAST, power_of_two(width))


# the kernels --------------------------------------------------------------------------------------


def forward(values: Sequence[Value], target: Target) -> Source:
    out, lse = values
    q, k, v, *bias = out.inputs
    call: Call = out.params
    tile = tile_of("forward", q, k, v, target)
    text = _Text("attention_forward", call, q, k, v, tile, target)
    text.operands({"q": q, "k": k, "v": v, **_named(bias)})
    text.operands({"out": out, "lse": lse}, "out")
    rows: Any = lse.shape[2]
    text.programs(q.shape[0], q.shape[1], ceil_div(rows, tile.queries), longest_last=call.causal)
    text.number("n_whole", k.shape[2] // tile.keys * tile.keys)
    text.number("n_lse", rows)
    empty = call.bias or (call.causal and call.offset < 0)
    nothing = NOTHING_SEEN[call.like]
    text.call(
        "forward",
        [*text.places("q", "k", "v", "bias", "out", "lse"), f"block * {tile.queries}"],
        [
            "n_q",
            "n_k",
            "n_whole",
            "n_lse",
            "offset",
            *text.rows("q", "k", "v", "out", "lse", "bias"),
        ],
        [text.column, text.scale, call.bias, call.causal, empty],
        ['float("inf")' if nothing else "0.0"],
    )
    return text.source()


def backward_keys(values: Sequence[Value], target: Target) -> Source:
    dk, dv = values
    _, q, k, v, *bias, _, _ = dk.inputs
    call: Call = dk.params
    tile = tile_of("keys", q, k, v, target)
    text = _Text("attention_backward_keys", call, q, k, v, tile, target)
    text.operands(_read(dk))
    text.operands({"dk": dk, "dv": dv}, "out")
    text.programs(k.shape[0], k.shape[1], ceil_div(k.shape[2], tile.keys), of_keys=True)
    heads = [f"{name}_head" for name in ("do", "q", "lse", "delta")]
    text.call(
        "backward_keys",
        text.places("do", "q", "k", "v", "bias", "lse", "delta", "dk", "dv"),
        [f"block * {tile.keys}", "n_q", "n_k", "offset"],
        [
            *heads,
            "bias_head" if bias else "0",
            *text.rows("do", "q", "k", "v", "lse", "delta", "bias"),
        ],
        [text.column, *text.rows("dk", "dv"), text.scale, repr(call.scale)],
        [call.bias, call.causal, text.group],
    )
    return text.source()


def backward_queries(values: Sequence[Value], target: Target) -> Source:
    (dq,) = values
    _, q, k, v = dq.inputs[:4]
    call: Call = dq.params
    tile = tile_of("queries", q, k, v, target)
    text = _Text("attention_backward_queries", call, q, k, v, tile, target)
    text.operands(_read(dq))
    text.operands({"dq": dq}, "out")
    blocks = ceil_div(q.shape[2], tile.queries)
    text.programs(q.shape[0], q.shape[1], blocks, longest_last=call.causal)
    text.number("n_whole", k.shape[2] // tile.keys * tile.keys)
    text.call(
        "backward_queries",
        text.places("do", "q", "k", "v", "bias", "lse", "delta", "dq"),
        [f"block * {tile.queries}", "n_q", "n_k", "n_whole", "offset"],
        [*text.rows("do", "q", "k", "v", "lse", "delta", "bias"), text.column, *text.rows("dq")],
        [text.scale, repr(call.scale), call.bias, call.causal],
    )
    return text.source()


def _read(gradient: Value) -> dict[str, Value]:
    do, q, k, v, *bias, lse, delta = gradient.inputs
    return {"do": do, "q": q, "k": k, "v": v, **_named(bias), "lse": lse, "delta": delta}


def _named(bias: Sequence[Value]) -> dict[str, Value]:
    return {"bias": bias[0]} if bias else {}


class _Text(Lines):
    """The lines of one of the kernels: where its head begins, and a call of the device function."""

    def __init__(
        self, name: str, call: Call, q: Value, k: Value, v: Value, tile: Tile, target: Target
    ) -> None:
        super().__init__()
        self.name, self.tile, self.waits, self.depth = name, tile, target.waits, 1
        self.params: list[Any] = []
        self.multiples: list[str] = []
        self.strides: dict[str, tuple[Any, ...]] = {}
        self.of_keys: set[str] = {"k", "v", "dk", "dv"}
        heads: Any = q.shape[1]
        self.group = heads // k.shape[1]
        self.column = "0"
        self.scale = repr(call.scale * LOG2E)
        width, written = q.shape[3], v.shape[3]
        self.widths = [width, written, tile.queries, tile.keys, block_of(width), block_of(written)]
        precision = "tf32" if call.tf32 else "tf32x3" if target.backend == "cuda" else "ieee"
        self.last = [tile.stages, f'"{precision if q.dtype == "float32" else "ieee"}"']
        self.numbers = {"n_q": q.shape[2], "n_k": k.shape[2], "offset": call.offset}
        self.grid: Any = 0

    def operands(self, tensors: Mapping[str, Value], role: str = "in") -> None:
        for name, value in tensors.items():
            self.params.append((name, role, value))
            self.strides[name] = _bias_strides(value) if name == "bias" else value.strides

    def number(self, name: str, value: Any) -> None:
        """A number that the kernel is given, as one of 32 bits."""
        self.numbers[name] = value
        self.params.append((name, "size", value))
        self.add(f"{name} = {name}.to(tl.int32)")

    def programs(
        self, batch: Any, heads: Any, blocks: Any, longest_last: bool = False, of_keys: bool = False
    ) -> None:
        """Blocks of a head one after the other, as they read the same; those first that have most
        to do. ``heads`` are those of keys, or of queries."""
        if self.waits:
            self.add(WAIT)
        self.grid = batch * heads * blocks
        for name, value in list(self.numbers.items()):
            self.number(name, value)
        self.params.append(("blocks", "size", blocks))
        self.add("blocks = blocks.to(tl.int32)")
        block = "tl.program_id(0) % blocks"
        self.add(f"block = blocks - 1 - {block}" if longest_last else f"block = {block}")
        self.add("place = tl.program_id(0) // blocks")
        self.add(f"batch = (place // {heads}).to(tl.int64)")
        if of_keys:
            self.add(f"shared = place % {heads}")
            self.add(f"head = shared * {self.group}")
        else:
            self.add(f"head = place % {heads}")
            self.add(f"shared = head // {self.group}")
        for name, strides in self.strides.items():
            for which, stride in zip(("batch", "head"), strides, strict=False):
                self._stride(f"{name}_{which}", stride)
        if "bias" in self.strides:
            self._stride("bias_row", self.strides["bias"][2])
            self.column = str(self.strides["bias"][3])

    def _stride(self, name: str, stride: Any) -> None:
        self.params.append((name, "size", stride))
        if stride % 16 == 0 and not name.startswith(("lse", "delta")):  # read number by number
            self.multiples.append(name)

    def places(self, *names: str) -> list[str]:
        """Where the program's head begins in each."""
        found = []
        for name in names:
            if name not in self.strides:
                found.append("None")
                continue
            head = "shared" if name in self.of_keys else "head"
            found.append(f"{name} + (batch * {name}_batch + {head} * {name}_head)")
        return found

    def rows(self, *names: str) -> list[str]:
        """How far apart rows lie."""
        rows = {name: str(strides[2]) for name, strides in self.strides.items()}
        rows["bias"] = "bias_row" if "bias" in rows else "0"
        return [rows[name] for name in names]

    def call(self, function: str, *arguments: Sequence[Any]) -> None:
        """The device function, of arguments by lines."""
        self.add(f"attention.{function}(")
        for line in (*arguments, [*self.widths, *self.last]):
            self.add("    " + ", ".join(map(str, line)) + ",")
        self.add(")")

    def source(self) -> Source:
        imports = ("attention",)
        source = whole_kernel(
            self.name, self, self.params, self.grid, self.tile.warps, self.waits, imports
        )
        source.meta["multiples"] = self.multiples
        source.meta["num_stages"] = self.tile.stages
        return source


def _bias_strides(bias: Value) -> tuple[Any, ...]:
    """Of [B, H, L, S], to which it broadcasts."""
    strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.strides, strict=True)]
    return (*[0] * (4 - len(strides)), *strides)
