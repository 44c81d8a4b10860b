"""Random ops of eager mode: each is a function of uniform random bits, written once, with ATen ops.

A call draws one 64-bit seed from the generator; the bits are words of Philox 4x32-7 at the
element's place in a contiguous tensor (``random``), so a call's numbers depend on the seed and the
shape alone. Under ``torch.compile`` these ops are ATen's. torch is imported inside the functions:
compile workers import the op files without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .dropout import drawn_words, native_dropout
from .op import T, call, composite
from .sorting import LONGEST

#: overload -> its rule, a function of the overload's arguments less the generator
DRAWS: dict[str, Callable[..., Any]] = {"aten.native_dropout.default": native_dropout}

#: how many of ATen's steps there are in [0, 1) of each dtype: 2 ** these
DIGITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
#: a range of integers that 62 bits hit evenly: by 2 ** -30 of a probability
WIDEST = 2**32


# bits ---------------------------------------------------------------------------------------------


def define(library: Any) -> None:
    """Register ``gems::random_bits`` on a torch Library.

    random_bits:  int32 in [0, 2 ** bits), bits < 32: the upper ones of the word that Philox 4x32-7,
                  keyed by the seed and ``salt``, has for each place in a contiguous tensor
    """
    import torch

    library.define(
        "random_bits(Tensor seed, SymInt[] size, SymInt[] stride, int salt, int bits) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    library.impl("random_bits", _random_bits, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::random_bits", _empty_bits, lib=library)


def _random_bits(seed: Any, size: Any, stride: Any, salt: int, bits: int) -> Any:
    words = drawn_words(seed + salt, size) >> (32 - bits)
    return _empty_bits(seed, size, stride, salt, bits).copy_(words)


def _empty_bits(seed: Any, size: Any, stride: Any, salt: int, bits: int) -> Any:
    import torch

    return torch.empty_strided(size, stride, dtype=torch.int32, device=seed.device)


@composite(
    "gems.random_bits.default",
    samples=[call(T(dtype="int64", low=0, high=2**40), [7, 33], [33, 1], 5, 24)],
    dtypes=("int32",),
)
def random_bits(b: Any, seed: Any, size: Any, stride: Any, salt: int, bits: int) -> Any:
    """The upper bits of a random word of each element."""
    return b.random_bits(tuple(getattr(s, "expr", s) for s in size), seed, salt, bits)


class Bits:
    """The random bits of one call, for the elements of a tensor: each draw is of new words."""

    def __init__(self, size: Sequence[int], stride: Sequence[int], device: Any) -> None:
        import torch

        self.size, self.stride, self.salt = list(size), list(stride), 0
        self.seed = torch.ops.gems.seed.default(device)

    def draw(self, bits: int) -> Any:
        import torch

        self.salt += 1
        return torch.ops.gems.random_bits.default(
            self.seed, self.size, self.stride, self.salt, bits
        )

    def uniform(self, digits: int) -> Any:
        """k / 2 ** digits of whole k, 0 <= k < 2 ** digits: float32, or float64 of more than 24."""
        import torch

        if digits <= 24:
            return self.draw(digits).to(torch.float32) * 2.0**-digits
        upper = self.draw(digits - 26).to(torch.float64)
        return (upper * 2.0**26 + self.draw(26).to(torch.float64)) * 2.0**-digits

    def above_zero(self, dtype: Any) -> Any:
        """In (0, 1], down to 2 ** -31, or 2 ** -53 in float64."""
        import torch

        if dtype == torch.float64:
            return 1.0 - self.uniform(53)
        return (self.draw(31).to(torch.float32) + 1.0) * 2.0**-31

    def inside(self, dtype: Any) -> Any:
        """In (0, 1), each number as likely as 1 less it."""
        digits = 52 if _name(dtype) == "float64" else 23
        return self.uniform(digits) + 2.0 ** -(digits + 1)

    def normal(self, dtype: Any) -> Any:
        """Of mean 0 and deviation 1, by Box and Muller; at most 6.6, or 8.6 in float64."""
        radius = (self.above_zero(dtype).log() * -2.0).sqrt()
        angle = self.uniform(53 if _name(dtype) == "float64" else 24) * (2.0 * math.pi)
        return radius * angle.cos()


def _bits_of(x: Any) -> Bits:
    """For the elements of x, in its order of dims, without its gaps."""
    import torch

    return Bits(x.shape, torch.empty_like(x).stride(), x.device)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# distributions ------------------------------------------------------------------------------------


class Refused(ValueError):
    """ATen's kernel runs, and has the error for it if it is one."""


def _distribution(*names: str) -> Callable[[Any], Any]:
    """Declare a rule of a functional overload: of its first operand only shape, layout, dtype and
    device count."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        DRAWS.update(dict.fromkeys(names, rule))
        return rule

    return register


def _floating(dtype: Any) -> None:
    if _name(dtype) not in DIGITS:
        raise Refused(f"no numbers of {dtype} are drawn so")


def _finite(*numbers: float) -> None:
    if not all(map(math.isfinite, numbers)):
        raise Refused(f"a parameter of {numbers} is not finite")


@_distribution("aten.uniform.default")
def uniform(x: Any, low: float = 0.0, high: float = 1.0, generator: Any = None) -> Any:
    """low + (high - low) * u, of u = k / 2 ** digits of the dtype; in [low, high)."""
    import torch

    _floating(x.dtype)
    _finite(low, high, high - low)
    largest = torch.finfo(x.dtype).max
    if not -largest <= low <= high <= largest or high - low > largest:
        raise Refused(f"[{low}, {high})")
    u = _bits_of(x).uniform(DIGITS[_name(x.dtype)])
    if (low, high) == (0.0, 1.0):
        return u.to(x.dtype)
    drawn = (u * (high - low) + low).to(x.dtype)
    end = torch.full((), high, dtype=x.dtype, device=x.device)
    start = torch.full((), low, dtype=x.dtype, device=x.device)
    return torch.where(drawn >= end, start, drawn)  # to which a number may have been rounded


@_distribution("aten.normal_functional.default")
def normal(x: Any, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Any:
    """mean + std * z."""
    _floating(x.dtype)
    _finite(mean, std)
    if std < 0:
        raise Refused(f"a deviation of {std}")
    z = _bits_of(x).normal(x.dtype)
    return (z if (mean, std) == (0.0, 1.0) else z * std + mean).to(x.dtype)


@_distribution("aten.exponential.default")
def exponential(x: Any, rate: float = 1.0, generator: Any = None) -> Any:
    """-log(u) / rate of u in (0, 1]; what would be 0 is half of the dtype's epsilon, as ATen's."""
    import torch

    _floating(x.dtype)
    _finite(rate)
    if rate <= 0:
        raise Refused(f"a rate of {rate}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    drawn = _bits_of(x).above_zero(x.dtype).log().neg().clamp_min(torch.finfo(wide).eps / 2)
    return (drawn / rate).to(x.dtype)


@_distribution("aten.cauchy.default")
def cauchy(x: Any, median: float = 0.0, sigma: float = 1.0, generator: Any = None) -> Any:
    """median + sigma * tan(pi * (u - 1/2)) of u in (0, 1)."""
    _floating(x.dtype)
    _finite(median, sigma)
    if sigma <= 0:
        raise Refused(f"a scale of {sigma}")
    angle = (_bits_of(x).inside(x.dtype) - 0.5) * math.pi
    return (angle.tan() * sigma + median).to(x.dtype)


@_distribution("aten.log_normal.default")
def log_normal(x: Any, mean: float = 1.0, std: float = 2.0, generator: Any = None) -> Any:
    """exp(mean + std * z)."""
    _floating(x.dtype)
    _finite(mean, std)
    if std <= 0:
        raise Refused(f"a deviation of {std}")
    return (_bits_of(x).normal(x.dtype) * std + mean).exp().to(x.dtype)


@_distribution("aten.bernoulli.p")
def bernoulli(x: Any, p: float, generator: Any = None) -> Any:
    """1 with probability p, in steps of 2 ** -31, else 0."""
    if not 0.0 <= p <= 1.0:
        raise Refused(f"a probability of {p}")
    # "<=" of one less: int32 does not hold 2 ** 31
    return (_bits_of(x).draw(31) <= round(p * 2**31) - 1).to(x.dtype)


@_distribution("aten.bernoulli.default")
def bernoulli_of(p: Any, generator: Any = None) -> Any:
    """1 with the probability that the element is, else 0. Probabilities beyond [0, 1] count as the
    nearest one in it: an operand's values are not looked at."""
    return _below(p, p)


@_distribution("aten.bernoulli.Tensor")
def bernoulli_tensor(x: Any, p: Any, generator: Any = None) -> Any:
    """``bernoulli_of`` in the shape and dtype of x."""
    return _below(x, p)


def _below(x: Any, p: Any) -> Any:
    _floating(p.dtype)
    u = _bits_of(x).uniform(53 if _name(p.dtype) == "float64" else 24)
    return (u < p.to(u.dtype)).to(x.dtype)


@_distribution("aten.normal.Tensor_Tensor", "aten.normal.Tensor_float", "aten.normal.float_Tensor")
def normal_around(mean: Any, std: Any = 1.0, generator: Any = None) -> Any:
    """mean + std * z, of which one or both are tensors; a negative deviation is the positive one's
    distribution: an operand's values are not looked at."""
    import torch

    for number in (mean, std):
        if isinstance(number, torch.Tensor):
            _floating(number.dtype)
        else:
            _finite(number)
    if not isinstance(std, torch.Tensor) and std < 0:
        raise Refused(f"a deviation of {std}")
    like = mean if isinstance(mean, torch.Tensor) else std
    shape = torch.broadcast_shapes(*(getattr(n, "shape", ()) for n in (mean, std)))
    z = _bits_of(torch.empty(shape, dtype=like.dtype, device=like.device)).normal(like.dtype)
    return (z * std + mean).to(like.dtype)


# factories ----------------------------------------------------------------------------------------


def _made(like: Any, memory_format: Any = None, **options: Any) -> Any:
    """A tensor that says which one is wanted; as nothing reads it, it is no part of the graph."""
    import torch

    options.pop("generator", None)
    if isinstance(like, torch.Tensor):
        return torch.empty_like(like, memory_format=memory_format, **options)
    return torch.empty(like, **options)


@_distribution("aten.rand.default", "aten.rand.generator", "aten.rand_like.default")
@_distribution("aten.rand_like.generator")
def rand(like: Any, **options: Any) -> Any:
    """``uniform`` in [0, 1)."""
    return uniform(_made(like, **options))


@_distribution("aten.randn.default", "aten.randn.generator", "aten.randn_like.default")
@_distribution("aten.randn_like.generator")
def randn(like: Any, **options: Any) -> Any:
    """``normal`` of mean 0 and deviation 1."""
    return normal(_made(like, **options))


@_distribution("aten.normal.float_float")
def normal_made(mean: float, std: float, size: Any, **options: Any) -> Any:
    return normal(_made(size, **options), mean, std)


@_distribution("aten.randperm.default", "aten.randperm.generator")
def randperm(n: int, *, dtype: Any = None, **options: Any) -> Any:
    """0, 1 ... n - 1 in an order drawn evenly: that of random keys of 62 bits, of which no two of
    so few are equal (once in 2 ** 39 calls). Keys are sorted by their upper half, after they were
    by the lower one."""
    import torch

    if not 1 < n <= LONGEST:
        raise Refused(f"{n} numbers")
    dtype = torch.int64 if dtype is None else dtype
    if dtype.is_floating_point and n > 2 ** DIGITS.get(_name(dtype), 0):
        raise Refused(f"{n} numbers in {dtype}")
    bits = _bits_of(_made([n], dtype=torch.int32, **options))
    first = _order(bits.draw(31))
    return first[_order(bits.draw(31)[first])].to(dtype)


def _order(keys: Any) -> Any:
    """Their places, in the order of the keys; equal ones stay in their order."""
    import torch

    return torch.ops.gems.row_order.default(keys, False, True, keys.numel())


@_distribution("aten.randint.default", "aten.randint.generator")
def randint(high: int, size: Any, **options: Any) -> Any:
    return randint_between(0, high, size, **options)


@_distribution("aten.randint.low", "aten.randint.low_generator")
def randint_between(low: int, high: int, size: Any, *, dtype: Any = None, **options: Any) -> Any:
    """Whole numbers in [low, high)."""
    import torch

    return _whole(_made(size, dtype=torch.int64 if dtype is None else dtype, **options), low, high)


@_distribution("aten.randint_like.default", "aten.randint_like.generator")
def randint_like(x: Any, high: int, **options: Any) -> Any:
    return _whole(_made(x, **options), 0, high)


@_distribution("aten.randint_like.low_dtype", "aten.randint_like.low_generator_dtype")
def randint_like_between(x: Any, low: int, high: int, **options: Any) -> Any:
    return _whole(_made(x, **options), low, high)


def _whole(x: Any, low: int, high: int) -> Any:
    """low + k % (high - low), of k of 62 bits."""
    import torch

    if x.dtype.is_floating_point:
        _floating(x.dtype)
        least, largest = -(2 ** DIGITS[_name(x.dtype)]), 2 ** DIGITS[_name(x.dtype)]
    elif x.dtype == torch.bool:
        least, largest = 0, 1
    else:
        least, largest = torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max
    if not (least <= low < high <= largest + 1 and high - low <= WIDEST):
        raise Refused(f"[{low}, {high}) of {x.dtype}")
    bits = _bits_of(x)
    upper = bits.draw(31).to(torch.int64) * 2**31
    return ((upper + bits.draw(31).to(torch.int64)) % (high - low) + low).to(x.dtype)
