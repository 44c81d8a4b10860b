"""Tile shapes and warps, in closed form: no benchmark runs while a model compiles."""

from __future__ import annotations

from dataclasses import dataclass

from .indexing import Size, is_static

#: the longest row that is held in registers
MAX_PERSISTENT = 16384
#: elements of a longer row that a program's step reads, where no cache asks for another number
ROW_STEP = 4096
#: elements of a column reduction held in registers by one program
MAX_COLUMN_TILE = 8192
#: bytes of an element's operands beyond which a column reduction's tile is a small one
MANY_BYTES = 12
#: columns that one program reduces: a whole line of memory of 16-bit floats
COLUMNS = 64
#: rows that a warp gathers alone: a shorter one is a warp's own in any tile
WARPS_OWN = range(257, 1025)
#: bytes of shared memory for loads in flight: what a gfx942 has, a fourth of an H200's
MAX_IN_FLIGHT = 2**16
#: bytes of rows in flight, for each multiprocessor, that stay in the second-level cache: two thirds
#: of an H200's
CACHED = 2**18
#: bytes of shared memory that reductions take beside them, at the most
SCRATCH = 2**11
#: the longest row of which two programs fit on a multiprocessor, each with sums of its columns
SWEPT_BY_TWO = 4096
#: rows of which four programs fit
SWEPT_BY_FOUR = range(513, 1025)
#: elements of an operand that take longer to ask for than to carry
SMALL_OPERAND = 2**21
#: lengths of such columns that are short, and read few at once: as many as a sum has parts
PARTS = range(64, 1025)


@dataclass(frozen=True)
class Tile:
    x: int
    r: int = 1  # rows of a pointwise 2-D tile, or the reduced extent
    warps: int = 4
    stages: int = 1  # loads of so many steps of the loop are in flight
    each: int = 1  # elements of a step that share a running maximum
    cached: bool = False  # the rows in flight stay in cache until they are read again


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def needs_loop(rows: Size, reduced: Size, column: bool, shares: int = 0) -> bool:
    """Whether a reduction runs over its row in steps."""
    if not is_static(reduced):
        return True
    if column:
        across = columns_together(rows, reduced, shares)
        return across * power_of_two(reduced) > MAX_COLUMN_TILE
    return power_of_two(reduced) > MAX_PERSISTENT


def pointwise_tile(numel: Size, multiprocessors: int, each: int = 8) -> Tile:
    """``each``: elements that a thread of a large kernel works on."""
    if not is_static(numel):
        return Tile(1024)
    if numel >= 1024 * 4 * multiprocessors:
        block = max(1024, 64 * each)
        return Tile(block, warps=block // (32 * each))
    block = max(64, min(1024, power_of_two(numel // max(1, 2 * multiprocessors))))
    return Tile(block, warps=max(1, min(4, block // 64)))


def transpose_tile(x: int, y: int, long: bool = False) -> Tile:
    """x, y: how long the two axes are along which the operands are contiguous; ``long``: there is
    work for all, and what is stored takes more memory than what is loaded across.

    Longer runs of stores are then worth more than more programs (64 images of 64 x 224 x 224 from
    channels-last bfloat16 to contiguous float32, H200: 311.7 us, 314.8 in tiles of 64 x 64).
    """
    if long and x % 256 == 0 and y % 64 == 0:
        return Tile(256, 64, warps=4)
    across, down = min(64, power_of_two(x)), min(64, power_of_two(y))
    return Tile(across, down, warps=max(1, min(8, across * down // 512)))


def looped_row_tile(reduced: Size, loaded: int, again: int, online: bool, few: bool) -> Tile:
    """``loaded``: bytes that a step loads for one element; ``again``: those that a later loop loads
    once more, of the whole row; ``online``: whether a step updates a running maximum and sum;
    ``few``: whether a multiprocessor has one or two rows, which must keep it busy.

    Programs of more warps are fewer: as many at once as the second-level cache has room for their
    rows (softmax of 8192 x 65536 in bfloat16, H200: 550 us; 1100 with small programs).
    """
    if not is_static(reduced):
        return Tile(1, 1024, warps=4)
    rows = CACHED // max(1, again * reduced)
    if again and rows:
        warps = 32 // min(4, 1 << (rows.bit_length() - 1))
        most = warps * 1024 if loaded <= 2 else min(warps * 512, 8192)
        length = min(power_of_two(reduced), most)
        return Tile(1, length, warps, each=max(1, length // (256 * warps)), cached=True)
    if online:
        warps = 16 if few else 4
        length = min(warps * 1024, power_of_two(reduced))
        return Tile(1, length, warps, each=max(1, length // (256 * warps)))
    return Tile(1, min(ROW_STEP, power_of_two(reduced)), warps=8)


def row_tile(
    rows: Size,
    reduced: int,
    loads: int,
    multiprocessors: int,
    gathers: bool = False,
    draws: bool = False,
) -> Tile:
    """``loads``: how many operands of the tile's size there are; ``gathers``: whether some are read
    where another one says, so that more has to be on its way at once. Short rows are then a warp's
    own, and no warp waits for the other half of a sum (BERT's embedding and its norm, rows of 768,
    H200: 31.1 us, 34.3 with two warps to two rows). Not where a kernel ``draws`` random numbers,
    which take registers: with dropout 37.4 us, 21.1 with two warps (H100)."""
    length = power_of_two(reduced)
    together = max(1, 2048 // length)
    if is_static(rows):
        while together > 1 and rows // together < 4 * multiprocessors:
            together //= 2
        together = min(together, power_of_two(rows))
    per_thread = 16 if loads <= 4 else 8
    if length == 512 and together == 4 and loads <= 4:
        # two warps for four rows, not four: 131072 rows of layer norm on an H200: 70.3 us, 77.0;
        # softmax with a bias and a mask: 64.7, 69.2
        per_thread = 32
    if gathers and not (is_static(rows) and rows < 4 * multiprocessors * together):
        per_thread *= 4 if length in WARPS_OWN and not draws else 2
    warps = max(1, min(16, together * length // (32 * per_thread)))
    return Tile(together, length, warps)


def sweeps_together(length: int) -> int:
    """Programs that walk over rows so long, on each multiprocessor."""
    return 4 if length in SWEPT_BY_FOUR else 2 if length <= SWEPT_BY_TWO else 1


def sweep_tile(reduced: int, loaded: int, shared: int) -> Tile:
    """``reduced``: the length of a row; ``loaded``: bytes a step loads for one element;
    ``shared``: bytes of shared memory.

    Of four warps (eight for a row beyond 4096), with 32 elements to a thread; from 513 to 1024 in a
    row with 16, and twice as many programs (gradients of layer norms, H200, shares of a copy: rows
    of 768 1.26 and 1.07, of 512 0.88 and 0.92, of 2048 0.90 and 0.91; with 16 elements and 8 warps,
    in two programs, 1.02, 0.80 and 0.89). The loads of two steps are in flight while a third is
    computed with: 8192 rows of 8192, H200: 112 us; 156 with those of one step.
    """
    length = power_of_two(reduced)
    each = 16 if reduced in SWEPT_BY_FOUR else 32
    together = max(1, 4 * 32 * each // length)
    warps = together * length // (32 * each)
    room = shared // sweeps_together(reduced) - SCRATCH
    stages = 1 + room // max(1, together * length * loaded)
    return Tile(together, length, warps, stages=max(1, min(3, stages)))


def row_share_tile(reduced: Size, looped: bool) -> Tile:
    """Of one row, along memory. ``reduced``: how long a share is, if that is known."""
    length = ROW_STEP if looped else power_of_two(reduced)
    return Tile(1, length, warps=max(1, min(8, length // 512)))


def columns_together(columns: Size, reduced: Size, shares: int = 0) -> int:
    """How many columns one program reduces; ``reduced`` long, in each of the shares of the rows.

    Of a small operand fewer, for more programs share its latency; of few short columns (parts of a
    split reduction) as few as keep all multiprocessors busy (264 parts of 128 columns, H200: 2.9
    us; 3.9 with 16 columns together).
    """
    if not is_static(columns):
        return COLUMNS
    width = power_of_two(columns)
    if not is_static(reduced) or columns * reduced * max(1, shares) > SMALL_OPERAND:
        return min(COLUMNS, width)
    return min(16, max(1, width // 128) if reduced in PARTS else width)


def column_tile(columns: Size, reduced: Size, shares: int, looped: bool, loaded: int) -> Tile:
    """``loaded``: bytes that a step loads for one element of the tile.

    Two sums over 64 x 56 x 56 of 256 columns take 62 us (H200), and 79 with 8 warps and 1 stage.
    What many operands make takes registers: the gradient of a ResNet's pooling with batch norm's
    sums, of ten loads an element, 152 us in tiles of 1024 elements (H100), and 223 of 2048, both
    with two steps in flight; of the small tile there are three, which was not timed.
    """
    across = columns_together(columns, reduced, shares)
    if looped:
        least = 1024 if loaded > MANY_BYTES else 2048
        down = max(1, min(4096, max(least, 8192 // max(1, loaded))) // across)  # 8 KiB a step
        stages = MAX_IN_FLIGHT // max(1, across * down * loaded)
        return Tile(across, down, warps=4, stages=max(1, min(3, stages)))
    down = power_of_two(reduced)
    return Tile(across, down, warps=max(1, min(8, across * down // 512)))
