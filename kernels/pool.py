"""Max pooling whose places are told within their windows, in a byte each.

ATen tells them within the image, in eight bytes: more than what it pools takes. Forward looks at
all elements of a window in the order of ATen, so that equal ones give the same place; backward adds
up, for each element, what the windows that chose it were given, in a fixed order.

Compile workers import this file without torch: torch is imported inside the functions.
"""

from __future__ import annotations

from typing import Any

from .op import T, call, composite

#: elements of a window that are written out, one by one
MOST_TAPS = 16
#: further before a window's first element, along an axis, than the other axis can make up for
NEVER = -256


def define(library: Any) -> None:
    """Register these on a torch Library. Sizes are pairs: down, across.

    max_pool2d:          x [..., H, W] -> (values, places): the maximum of each window, and which
                         of its elements that is, row by row
    max_pool2d_backward: gradient, places, [H, W] -> the gradient of x
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    how = "int[] kernel, int[] stride, int[] padding, bool ceil"
    library.define(f"max_pool2d(Tensor x, {how}) -> (Tensor, Tensor)", tags=tags)
    library.define(
        f"max_pool2d_backward(Tensor gradient, Tensor places, SymInt[] size, {how}) -> Tensor",
        tags=tags,
    )
    library.impl("max_pool2d", _max_pool2d, "CompositeExplicitAutograd")
    library.impl("max_pool2d_backward", _max_pool2d_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::max_pool2d", _room_for_values, lib=library)
    torch.library.register_fake("gems::max_pool2d_backward", _room_for_gradient, lib=library)


def _room_for_values(x: Any, *how: Any) -> Any:
    import torch

    values, _ = torch.ops.aten.max_pool2d_with_indices.default(x, *_atens(*how))
    return values, torch.empty_like(values, dtype=torch.int8)


def _room_for_gradient(gradient: Any, places: Any, size: Any, *how: Any) -> Any:
    import torch

    shape = (*gradient.shape[:-2], *size)
    strides = gradient.new_empty(shape).stride()
    if gradient.ndim == 4 and gradient.is_contiguous(memory_format=torch.channels_last):
        _, c, h, w = shape
        strides = (h * w * c, 1, w * c, c)
    return gradient.new_empty_strided(shape, strides)


def _atens(kernel: Any, stride: Any, padding: Any, ceil: bool) -> tuple[Any, ...]:
    """The arguments of ATen, which knows of dilation besides."""
    return kernel, stride, padding, [1, 1], ceil


def _first(shape: Any, axis: int, stride: int, padding: int, device: Any) -> Any:
    """Where each window begins along an axis, as something that broadcasts to ``shape``."""
    import torch

    line = [1] * len(shape)
    line[axis] = shape[axis]
    return (torch.arange(shape[axis], device=device) * stride - padding).view(line)


def _max_pool2d(x: Any, kernel: Any, stride: Any, padding: Any, ceil: bool) -> Any:
    import torch

    how = _atens(kernel, stride, padding, ceil)
    values, indices = torch.ops.aten.max_pool2d_with_indices.default(x, *how)
    top = _first(values.shape, values.ndim - 2, stride[0], padding[0], x.device)
    left = _first(values.shape, values.ndim - 1, stride[1], padding[1], x.device)
    row, column = indices // x.shape[-1] - top, indices % x.shape[-1] - left
    return values, (row * kernel[1] + column).to(torch.int8)


def _max_pool2d_backward(
    gradient: Any, places: Any, size: Any, kernel: Any, stride: Any, padding: Any, ceil: bool
) -> Any:
    import torch

    top = _first(places.shape, places.ndim - 2, stride[0], padding[0], places.device)
    left = _first(places.shape, places.ndim - 1, stride[1], padding[1], places.device)
    within = places.long()
    index = (top + within // kernel[1]) * size[-1] + left + within % kernel[1]
    x, how = _room_for_gradient(gradient, places, size), _atens(kernel, stride, padding, ceil)
    return torch.ops.aten.max_pool2d_with_indices_backward.default(gradient, x, *how, index)


# ------------------------------------------------------------------------------------- kernels


def windows(size: Any, kernel: int, stride: int, padding: int, ceil: bool) -> Any:
    """How many windows there are along an axis, as torch counts them."""
    count = (size + 2 * padding - kernel + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1  # the last one would begin in the padding
    return count


_HOW = ([3, 3], [2, 2], [1, 1], False)


@composite(
    "gems.max_pool2d.default",
    samples=[call(T(2, 3, 7, 9), *_HOW), call(T(3, 8, 6), [2, 3], [2, 1], [0, 1], True)],
)
def max_pool2d(b: Any, x: Any, kernel: Any, stride: Any, padding: Any, ceil: bool) -> Any:
    """(The maximum of each window, or NaN where there is one; which element it is.)"""
    every = list(zip((x.ndim - 2, x.ndim - 1), kernel, stride, padding, strict=True))
    counts = [windows(x.shape[a], k, s, p, ceil) for a, k, s, p in every]
    wide, shape = list(x.shape), [*x.shape[:-2], *counts]
    for (axis, k, s, p), count in zip(every, counts, strict=True):
        if isinstance(count, int):
            wide[axis] = max(x.shape[axis] + p, (count - 1) * s + k)
        elif (
            p
        ):  # nothing beyond is read; ``windows`` knows no symbolic count where it is rounded up
            wide[axis] = x.shape[axis] + 2 * p
    starts = [(axis, p, 1) for axis, _, _, p in every]
    padded, lowest = wide != list(x.shape), float("-inf")
    value, place = b.full(shape, lowest, "float32"), _first_inside(b, shape, every)
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            # a padded image each, of which one element is read: else it would be stored
            tap = b.patch(b.full(wide, lowest, x.dtype), x, starts) if padded else x
            for (axis, _, s, _), count, at in zip(every, counts, (row, column), strict=True):
                tap = b.slice(tap, axis, at, at + (count - 1) * s + 1, s)
            tap = b.cast(tap, "float32")
            larger = b.call("gt", tap, value, dtype="bool")
            larger = b.call("logical_or", larger, b.call("isnan", tap, dtype="bool"), dtype="bool")
            value = b.where(larger, tap, value)
            place = b.where(larger, b.full((), row * kernel[1] + column, "int32"), place)
    return b.cast(value, x.dtype), b.cast(place, "int8")


def _first_inside(b: Any, shape: Any, every: Any) -> Any:
    """The first element of each window that lies in the image, which a window of minus infinity
    has as its maximum."""
    total, factor = b.full(shape, 0, "int32"), 1
    for axis, k, s, p in reversed(every):
        if p:
            before = b.sub(p, b.mul(b.cast(b.iota(shape, axis), "int32"), s), 1)
            before = b.call("maximum", before, b.full((), 0, "int32"))
            total = b.add(total, b.mul(before, factor), 1)
        factor *= k
    return total


@composite(
    "gems.max_pool2d_backward.default",
    samples=[  # windows that lie in the image whatever the places are: ATen reads those
        call(
            T(2, 3, 4, 5),
            T(2, 3, 4, 5, dtype="int8", low=0, high=3),
            [8, 10],
            [2, 2],
            [2, 2],
            [0, 0],
            False,
        ),
    ],
)
def max_pool2d_backward(
    b: Any, gradient: Any, places: Any, size: Any, kernel: Any, stride: Any, padding: Any, _: bool
) -> Any:
    """For each element the sum, in float32, of what the windows were given that chose it."""
    axes = (gradient.ndim - 2, gradient.ndim - 1)
    shape = [*gradient.shape[:-2], *(getattr(n, "expr", n) for n in size)]
    along = list(range(gradient.ndim - 2))
    rows, columns = (
        list(_windows_over(b, shape, gradient.shape[axis], axis, k, s, p))
        for axis, k, s, p in zip(axes, kernel, stride, padding, strict=True)
    )
    nothing, total = b.full((), 0.0, "float32"), None
    for row, down in rows:
        for column, across in columns:
            where = [(axes[0], row), (axes[1], column)]
            within = b.gather(places, where, [*along, None, None], shape, wrap=False)
            given = b.gather(gradient, where, [*along, None, None], shape, wrap=False)
            asked = b.add(b.mul(down, kernel[1]), across, 1)
            chosen = b.call("eq", b.cast(within, "int32"), asked, dtype="bool")
            part = b.where(chosen, b.cast(given, "float32"), nothing)
            total = part if total is None else b.add(total, part, 1)
    return b.cast(total, gradient.dtype)


def _windows_over(
    b: Any, shape: Any, windows: int, axis: int, kernel: int, stride: int, padding: int
) -> Any:
    """For the windows that may reach over an element: (which one, as which of the window's
    elements), along an axis. A window that does not reach is asked for what none has: then there is
    one comparison for each element, and what windows reach is found once a line."""
    place = b.add(b.cast(b.iota(shape, axis), "int32"), padding, 1)  # no table to be loaded
    last = b.call("floor_divide", place, stride)
    rest = b.sub(place, b.mul(last, stride), 1)
    for before in range(-(-kernel // stride)):
        window, element = b.sub(last, before, 1), b.add(rest, before * stride, 1)
        reaches = b.call("lt", element, kernel, dtype="bool")
        for bound in (
            b.call("ge", window, 0, dtype="bool"),
            b.call("lt", window, windows, dtype="bool"),
        ):
            reaches = b.call("logical_and", reaches, bound, dtype="bool")
        element = b.where(reaches, element, b.full((), NEVER, "int32"))
        yield b.clamp(window, 0, windows - 1), element
