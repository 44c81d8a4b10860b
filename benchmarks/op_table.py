"""The calls of ops that follow from no declaration: see ``op_cases``. One line an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.op_cases import (
    INPUT_DEVICE,
    INPUT_DTYPE,
    Case,
    Filled,
    Sizes,
    by_size,
    reduction,
)
from gems_compile import eager
from gems_compile.calls.one_call import aten_name
from gems_compile.kernels.op import Call, T, call

F32, I64, BOOL = "float32", "int64", "bool"


def places(*shape: int, below: int) -> T:
    return T(*shape, dtype=I64, low=0, high=below)


def distinct(*shape: int) -> Filled:
    return Filled("permutation", shape)


# on the rows of a matrix [r, c]: at several sizes -------------------------------------------------

Rows = Callable[[int, int], Call]

SOFTMAX: dict[str, Rows] = {
    "_softmax": lambda r, c: call(T(r, c), 1, False),
    "_log_softmax": lambda r, c: call(T(r, c), 1, False),
    "_softmax_backward_data": lambda r, c: call(
        T(r, c), T(r, c, low=0.0, high=1.0), 1, INPUT_DTYPE
    ),
    "_log_softmax_backward_data": lambda r, c: call(
        T(r, c), T(r, c, low=-9.0, high=-1.0), 1, INPUT_DTYPE
    ),
    "_safe_softmax": lambda r, c: call(T(r, c), 1),
}
ACROSS: dict[str, Rows] = {
    "_softmax": lambda r, c: call(T(r, c), 0, False),
    "_log_softmax": lambda r, c: call(T(r, c), 0, False),
}
NORM: dict[str, Rows] = {
    "native_layer_norm": lambda r, c: call(T(r, c), [c], T(c), T(c), 1e-5),
    "native_layer_norm_backward": lambda r, c: call(
        T(r, c), T(r, c), [c], T(r, 1, dtype=F32), _rstd(r, 1), T(c), T(c), [True] * 3
    ),
    "_fused_rms_norm": lambda r, c: call(T(r, c), [c], T(c), 1e-6),
    "_fused_rms_norm_backward": lambda r, c: call(
        T(r, c), T(r, c), [c], _rstd(r, 1), T(c), [True] * 2
    ),
}


def _rstd(*shape: int) -> T:
    return T(*shape, dtype=F32, low=0.5, high=1.5)


# at one size --------------------------------------------------------------------------------------

Once = Callable[[Sizes], Call]


def flat(s: Sizes, **bounds: float) -> T:
    return T(s.flat, **bounds)


def padded(shape: tuple[int, ...], dims: int) -> tuple[int, ...]:
    """One more on both sides of the last dims."""
    kept = len(shape) - dims
    return (*shape[:kept], *(n + 2 for n in shape[kept:]))


def halves(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return tuple(n // 2 if k == dim else n for k, n in enumerate(shape))


def doubled(shape: tuple[int, ...]) -> list[int]:
    """Twice the size of an image."""
    return [2 * n for n in shape[2:]]


def _channels(s: Sizes, count: int) -> list[T]:
    return [T(s.image[1]) for _ in range(count)]


IMAGES: dict[str, Once] = {  # norms of images
    "native_group_norm": lambda s: call(T(*s.image), *_channels(s, 2), *_grouped(s), 1e-5),
    "native_group_norm_backward": lambda s: call(
        T(*s.image),
        T(*s.image),
        T(s.image[0], s.groups),
        T(s.image[0], s.groups, low=0.5, high=1.5),
        *_channels(s, 1),
        *_grouped(s),
        [True] * 3,
    ),
    "_native_batch_norm_legit_no_training": lambda s: call(
        T(*s.image), *_channels(s, 3), T(s.image[1], low=0.5, high=1.5), 0.1, 1e-5
    ),
    "_native_batch_norm_legit_functional": lambda s: call(
        T(*s.image), *_channels(s, 3), T(s.image[1], low=0.5, high=1.5), True, 0.1, 1e-5
    ),
    "native_batch_norm_backward": lambda s: call(
        T(*s.image),
        T(*s.image),
        *_channels(s, 2),
        T(s.image[1], low=0.5, high=1.5),
        T(s.image[1], dtype=F32),
        _rstd(s.image[1]),
        True,
        1e-5,
        [True] * 3,
    ),
    "native_batch_norm": lambda s: call(*_batch_norm(s), True, 0.1, 1e-5),
    "_native_batch_norm_legit": lambda s: call(*_batch_norm(s), True, 0.1, 1e-5),
    "_native_batch_norm_legit.no_stats": lambda s: call(
        T(*s.image), *_channels(s, 2), True, 0.1, 1e-5
    ),
    "_batch_norm_with_update": lambda s: call(*_batch_norm(s), 0.1, 1e-5),
    "_batch_norm_with_update_functional": lambda s: call(*_batch_norm(s), 0.1, 1e-5),
    "_batch_norm_no_update": lambda s: call(*_batch_norm(s), 0.1, 1e-5),
    "_weight_norm_interface_backward": lambda s: call(
        *(T(s.square, s.square) for _ in range(2)), T(s.square, 1), _rstd(s.square, 1), 0
    ),
    "_weight_norm_interface": lambda s: call(T(s.square, s.square), T(s.square, 1), 0),
    "renorm": lambda s: call(T(*s.matrix), 2, 0, 1.0),
}


def _batch_norm(s: Sizes) -> list[T]:
    """Images, weight, bias, running mean and variance."""
    return [T(*s.image), *_channels(s, 3), T(s.image[1], low=0.5, high=1.5)]


def _grouped(s: Sizes) -> tuple[int, int, int, int]:
    n, c, h, w = s.image
    return n, c, h * w, s.groups


LOSS: dict[str, Once] = {
    "nll_loss_forward": lambda s: call(
        T(*s.matrix, high=0.0), places(s.matrix[0], below=s.matrix[1]), None, 1, -100
    ),
    "nll_loss_backward": lambda s: call(
        T(), T(*s.matrix), places(s.matrix[0], below=s.matrix[1]), None, 1, -100, T(low=5, high=9)
    ),
    "nll_loss2d_forward": lambda s: call(
        T(*s.image, high=0.0), places(*_pixels(s), below=s.image[1]), None, 1, -100
    ),
    "nll_loss2d_backward": lambda s: call(
        T(), T(*s.image), places(*_pixels(s), below=s.image[1]), None, 1, -100, T(low=5, high=9)
    ),
    "mse_loss": lambda s: call(flat(s), flat(s)),
    "mse_loss_backward": lambda s: call(T(), flat(s), flat(s), 1),
    "huber_loss": lambda s: call(flat(s), flat(s)),
    "smooth_l1_loss": lambda s: call(flat(s), flat(s)),
    "smooth_l1_loss_backward": lambda s: call(T(), flat(s), flat(s), 1, 1.0),
    "soft_margin_loss": lambda s: call(flat(s), flat(s)),
    "binary_cross_entropy": lambda s: call(_shares(s), _shares(s)),
    "binary_cross_entropy_backward": lambda s: call(T(), _shares(s), _shares(s)),
    "dist": lambda s: call(flat(s), flat(s)),
    "binary_cross_entropy_with_logits": lambda s: call(flat(s), _shares(s)),
    "soft_margin_loss_backward": lambda s: call(T(), flat(s), flat(s), 1),
}


def _pixels(s: Sizes) -> tuple[int, int, int]:
    n, _, h, w = s.image
    return n, h, w


def _shares(s: Sizes) -> T:
    return flat(s, low=0.1, high=0.9)


POINTWISE: dict[str, Once] = {  # several pointwise ops, as torch's rules have it
    "angle": lambda s: call(flat(s)),
    "glu": lambda s: call(T(*s.matrix)),
    "glu_backward": lambda s: call(T(*halves(s.matrix, 1)), T(*s.matrix), 1),
    "log_sigmoid_forward": lambda s: call(flat(s)),
    "log_sigmoid_backward": lambda s: call(flat(s), flat(s), flat(s)),
    "_prelu_kernel_backward": lambda s: call(flat(s), flat(s), flat(s)),
    "bucketize.Tensor": lambda s: call(flat(s), Filled("sorted", (64,))),
    "isin.Tensor_Tensor": lambda s: call(places(s.flat, below=99), places(8, below=99)),
    "isin.Tensor_Scalar": lambda s: call(places(s.flat, below=99), 7),
    "isin.Scalar_Tensor": lambda s: call(7, places(8, below=99)),
    "linalg_cross": lambda s: call(T(s.flat // 4, 3), T(s.flat // 4, 3)),
    "affine_grid_generator": lambda s: call(T(s.image[0], 2, 3), list(s.image), False),
    "addr": lambda s: call(T(*s.matrix), T(s.matrix[0]), T(s.matrix[1])),
    "_masked_scale": lambda s: call(flat(s), T(s.flat, dtype="uint8", low=0, high=2), 1.25),
    "mvlgamma": lambda s: call(flat(s, low=3.0, high=9.0), 3),
    "polar": lambda s: call(T(s.flat, dtype=F32), T(s.flat, dtype=F32)),
    "searchsorted.Tensor": lambda s: call(Filled("sorted", (64,)), flat(s)),
    "bucketize.Scalar": lambda s: call(0.5, Filled("sorted", (64,))),
    "searchsorted.Scalar": lambda s: call(Filled("sorted", (64,)), 0.5),
}
REDUCTION: dict[str, Once] = {
    "aminmax": lambda s: call(T(*s.matrix), dim=1),
    "count_nonzero": lambda s: call(T(*s.matrix, dtype="int32", low=0, high=2)),
    "linalg_vector_norm": lambda s: call(T(*s.matrix), 2, [1]),
    "nansum": lambda s: call(T(*s.matrix, low=0.0, high=1.0), [1]),
    "norm.Scalar": lambda s: call(T(*s.matrix), 2),
    "norm.ScalarOpt_dim": lambda s: call(T(*s.matrix), 2, [1]),
    "_is_all_true": lambda s: call(T(s.flat, dtype=BOOL)),
    "_cdist_forward": lambda s: call(T(24, s.square), T(24, s.square), 1.0, None),
    "trace": lambda s: call(T(s.square, s.square, low=0.0, high=1.0)),
}
PRODUCT: dict[str, Once] = {
    "addmv": lambda s: call(T(s.matrix[0]), T(*s.matrix), T(s.matrix[1])),
    "mv": lambda s: call(T(*s.matrix), T(s.matrix[1])),
    "dot": lambda s: call(_shares(s), _shares(s)),
    "vdot": lambda s: call(_shares(s), _shares(s)),
    "mm": lambda s: call(T(s.matrix[0], 1), T(1, s.matrix[1])),
    "addmm": lambda s: call(T(*s.matrix), T(s.matrix[0], 1), T(1, s.matrix[1])),
    "bmm": lambda s: call(T(2, *s.matrix), T(2, s.matrix[1], 1)),
    "baddbmm": lambda s: call(T(2, s.matrix[0], 1), T(2, *s.matrix), T(2, s.matrix[1], 1)),
    "addbmm": lambda s: call(T(s.matrix[0], 1), T(2, *s.matrix), T(2, s.matrix[1], 1)),
}
#: these touch parts of their tensors, at places that the call says
INDEXING: dict[str, Once] = {
    "embedding": lambda s: call(T(*s.table), _tokens(s)),
    "embedding_dense_backward": lambda s: call(
        T(s.tokens, s.table[1]), _tokens(s), s.table[0], -1, False
    ),
    "index_select": lambda s: call(T(*s.table), 0, _tokens(s)),
    "index.Tensor": lambda s: call(T(*s.table), [_tokens(s)]),
    "_unsafe_index.Tensor": lambda s: call(T(*s.table), [_tokens(s)]),
    "gather": lambda s: call(T(*s.matrix), 1, places(*s.matrix, below=s.matrix[1])),
    "take": lambda s: call(flat(s), places(s.flat, below=s.flat)),
    "_unsafe_masked_index": lambda s: call(
        flat(s), T(s.flat, dtype=BOOL), [places(s.flat, below=s.flat)], 0
    ),
    "scatter.src": lambda s: call(T(*s.matrix), 1, distinct(*s.matrix), T(*s.matrix)),
    "scatter.value": lambda s: call(T(*s.matrix), 1, distinct(*s.matrix), 2.0),
    "scatter_add": lambda s: call(T(*s.matrix), 1, distinct(*s.matrix), T(*s.matrix)),
    "scatter_reduce.two": lambda s: call(T(*s.matrix), 1, distinct(*s.matrix), T(*s.matrix), "sum"),
    "scatter.reduce": lambda s: call(
        T(*s.matrix), 1, distinct(*s.matrix), T(*s.matrix), reduce="add"
    ),
    "scatter.value_reduce": lambda s: call(T(*s.matrix), 1, distinct(*s.matrix), 2.0, reduce="add"),
    "_unsafe_masked_index_put_accumulate": lambda s: call(
        flat(s), T(s.flat, dtype=BOOL), [distinct(s.flat)], flat(s)
    ),
    "index_put": lambda s: call(T(*s.table), [distinct(s.table[0])], T(*s.table)),
    "index_add": lambda s: call(T(*s.table), 0, _tokens(s), T(s.tokens, s.table[1])),
    "index_copy": lambda s: call(T(*s.table), 0, distinct(s.table[0]), T(*s.table)),
    "index_fill.int_Scalar": lambda s: call(T(*s.table), 0, _tokens(s), 2.0),
    "index_fill.int_Tensor": lambda s: call(T(*s.table), 0, _tokens(s), T()),
    "nonzero": lambda s: call(T(s.flat, dtype=BOOL)),
    "nonzero_static": lambda s: call(T(s.flat, dtype=BOOL), size=s.short),
    "masked_select": lambda s: call(flat(s), T(s.flat, dtype=BOOL)),
    "repeat_interleave.Tensor": lambda s: call(T(s.flat, dtype=I64, low=0, high=4)),
}


def _tokens(s: Sizes) -> T:
    return places(s.tokens, below=s.table[0])


LAYOUT: dict[str, Once] = {
    "cat": lambda s: call([T(*s.matrix), T(*s.matrix)], 1),
    "stack": lambda s: call([T(*s.matrix), T(*s.matrix)], 1),
    "_chunk_cat": lambda s: call([T(*s.matrix), T(*s.matrix)], 0, 2),
    "constant_pad_nd": lambda s: call(T(*s.image), [1, 1, 1, 1], 0.5),
    "reflection_pad1d": lambda s: call(T(*s.signal), [1, 1]),
    "reflection_pad2d": lambda s: call(T(*s.image), [1] * 4),
    "reflection_pad3d": lambda s: call(T(*s.volume), [1] * 6),
    "reflection_pad1d_backward": lambda s: call(T(*padded(s.signal, 1)), T(*s.signal), [1, 1]),
    "reflection_pad2d_backward": lambda s: call(T(*padded(s.image, 2)), T(*s.image), [1] * 4),
    "reflection_pad3d_backward": lambda s: call(T(*padded(s.volume, 3)), T(*s.volume), [1] * 6),
    "replication_pad1d": lambda s: call(T(*s.signal), [1, 1]),
    "replication_pad2d": lambda s: call(T(*s.image), [1] * 4),
    "replication_pad3d": lambda s: call(T(*s.volume), [1] * 6),
    "flip": lambda s: call(T(*s.matrix), [1]),
    "roll": lambda s: call(T(*s.matrix), [3], [1]),
    "rot90": lambda s: call(T(*s.matrix)),
    "repeat": lambda s: call(T(*halves(s.matrix, 0)), [2, 1]),
    "expand_copy": lambda s: call(T(s.matrix[0], 1), list(s.matrix)),
    "permute_copy": lambda s: call(T(*s.image), [0, 2, 3, 1]),
    "t_copy": lambda s: call(T(*s.matrix)),
    "view_copy": lambda s: call(T(*s.matrix), [-1]),
    "squeeze_copy": lambda s: call(T(1, *s.matrix)),
    "as_strided_copy": lambda s: call(T(*s.matrix), list(s.matrix[::-1]), [1, s.matrix[1]]),
    "narrow_copy": lambda s: call(T(*s.matrix), 1, 0, s.matrix[1] // 2),
    "unfold_copy": lambda s: call(T(*s.matrix), 1, 4, 2),
    "diag_embed": lambda s: call(T(s.square // 64 + 2, s.square // 8)),
    "diagonal_copy": lambda s: call(T(s.square, s.square)),
    "select_backward": lambda s: call(T(s.matrix[0]), list(s.matrix), 1, 0),
    "select_scatter": lambda s: call(T(*s.matrix), T(s.matrix[0]), 1, 0),
    "slice_backward": lambda s: call(
        T(*halves(s.matrix, 1)), list(s.matrix), 1, 0, s.matrix[1] // 2, 1
    ),
    "slice_scatter": lambda s: call(T(*s.matrix), T(*halves(s.matrix, 1)), 1, 0, s.matrix[1] // 2),
    "replication_pad1d_backward": lambda s: call(T(*padded(s.signal, 1)), T(*s.signal), [1, 1]),
    "replication_pad2d_backward": lambda s: call(T(*padded(s.image, 2)), T(*s.image), [1] * 4),
    "replication_pad3d_backward": lambda s: call(T(*padded(s.volume, 3)), T(*s.volume), [1] * 6),
    "diagonal_backward": lambda s: call(T(s.square), [s.square, s.square], 0, 0, 1),
    "diagonal_scatter": lambda s: call(T(s.square, s.square), T(s.square)),
    "block_diag": lambda s: call([T(s.square // 2, s.square // 2), T(s.square // 4, s.square)]),
    "lift_fresh_copy": lambda s: call(flat(s)),
    "unfold_backward": lambda s: call(
        T(s.matrix[0], s.matrix[1] // 2 - 1, 4), list(s.matrix), 1, 4, 2
    ),
    "tril": lambda s: call(T(s.square, s.square)),
    "triu": lambda s: call(T(s.square, s.square)),
}
IMAGE: dict[str, Once] = {
    "_adaptive_avg_pool2d": lambda s: call(T(*s.image), [n // 2 + 1 for n in s.image[2:]]),
    "_adaptive_avg_pool3d": lambda s: call(T(*s.volume), [n // 2 for n in s.volume[2:]]),
    "channel_shuffle": lambda s: call(T(*s.image), 2),
    "pixel_shuffle": lambda s: call(T(*s.image), 2),
    "pixel_unshuffle": lambda s: call(T(*s.image), 2),
    "im2col": lambda s: call(T(*s.image), [3, 3], [1, 1], [1, 1], [1, 1]),
    "upsample_nearest1d": lambda s: call(T(*s.signal), doubled(s.signal)),
    "upsample_nearest2d": lambda s: call(T(*s.image), doubled(s.image)),
    "upsample_nearest3d": lambda s: call(T(*s.volume), doubled(s.volume)),
    "upsample_linear1d": lambda s: call(T(*s.signal), doubled(s.signal), False),
    "upsample_bilinear2d": lambda s: call(T(*s.image), doubled(s.image), False),
    "upsample_bicubic2d": lambda s: call(T(*s.image), doubled(s.image), False),
    "upsample_trilinear3d": lambda s: call(T(*s.volume), doubled(s.volume), False),
    "_upsample_nearest_exact1d": lambda s: call(T(*s.signal), doubled(s.signal)),
    "_upsample_nearest_exact2d": lambda s: call(T(*s.image), doubled(s.image)),
    "_upsample_nearest_exact3d": lambda s: call(T(*s.volume), doubled(s.volume)),
    "_upsample_bicubic2d_aa": lambda s: call(T(*s.image), _halved(s.image), False),
    "_upsample_bilinear2d_aa": lambda s: call(T(*s.image), _halved(s.image), False),
    "avg_pool2d": lambda s: call(T(*s.image), [2, 2]),
    "avg_pool3d": lambda s: call(T(*s.volume), [2, 2, 2]),
    "avg_pool2d_backward": lambda s: call(T(*_pooled(s.image)), T(*s.image), *_by_twos(2)),
    "avg_pool3d_backward": lambda s: call(T(*_pooled(s.volume)), T(*s.volume), *_by_twos(3)),
    "_adaptive_avg_pool2d_backward": lambda s: call(T(*_pooled(s.image)), T(*s.image)),
    "_adaptive_avg_pool3d_backward": lambda s: call(T(*_pooled(s.volume)), T(*s.volume)),
    "max_pool2d_with_indices": lambda s: call(T(*s.image), [2, 2]),
    "col2im": lambda s: call(
        T(s.image[0], s.image[1] * 4, _windows(s.image)),
        s.image[2:],
        [2, 2],
        [1, 1],
        [0, 0],
        [2, 2],
    ),
    "grid_sampler_2d": lambda s: call(
        T(*s.image), T(s.image[0], *s.image[2:], 2, low=-1.0, high=1.0), 0, 0, False
    ),
}


def _halved(shape: tuple[int, ...]) -> list[int]:
    return [n // 2 for n in shape[2:]]


def _pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], *_halved(shape))


def _windows(shape: tuple[int, ...]) -> int:
    return (shape[2] // 2) * (shape[3] // 2)


def _by_twos(axes: int) -> tuple[object, ...]:
    """What says how means of windows of two elements are taken."""
    return [2] * axes, [2] * axes, [0] * axes, False, True, None


ORDER: dict[str, Once] = {  # of float32, whose draws hardly ever repeat
    "sort": lambda s: call(_line(s)),
    "sort.stable": lambda s: call(_line(s), stable=True),
    "topk": lambda s: call(_line(s), 3),
    "kthvalue": lambda s: call(_line(s), 3),
    "median.dim": lambda s: call(_line(s), 1),
    "nanmedian.dim": lambda s: call(_line(s), 1),
    "median": lambda s: call(T(s.matrices[-1][1], dtype=F32)),
    "nanmedian": lambda s: call(T(s.matrices[-1][1], dtype=F32)),
    "_unique2": lambda s: call(
        T(s.matrices[-1][1], dtype="int32", low=0, high=999), True, True, True
    ),
    "unique_consecutive": lambda s: call(T(s.flat, dtype=I64, low=0, high=3), True, True),
}


def _line(s: Sizes) -> T:
    return T(*s.matrices[1], dtype=F32)


RANDOM: dict[str, Once] = {
    "native_dropout": lambda s: call(flat(s), 0.1, True),
    "uniform": lambda s: call(flat(s)),
    "normal_functional": lambda s: call(flat(s)),
    "exponential": lambda s: call(flat(s)),
    "cauchy": lambda s: call(flat(s)),
    "log_normal": lambda s: call(flat(s)),
    "bernoulli.p": lambda s: call(flat(s), 0.25),
    "bernoulli": lambda s: call(_shares(s)),
    "bernoulli.Tensor": lambda s: call(flat(s), _shares(s)),
    "normal.Tensor_Tensor": lambda s: call(flat(s), _shares(s)),
    "normal.Tensor_float": lambda s: call(flat(s), 2.0),
    "normal.float_Tensor": lambda s: call(1.0, _shares(s)),
    "normal.float_float": lambda s: call(1.0, 2.0, [s.flat], **_made()),
    "rand": lambda s: call([s.flat], **_made()),
    "randn": lambda s: call([s.flat], **_made()),
    "rand_like": lambda s: call(flat(s)),
    "randn_like": lambda s: call(flat(s)),
    "randint": lambda s: call(99, [s.flat], device=INPUT_DEVICE),
    "randint.low": lambda s: call(-9, 99, [s.flat], device=INPUT_DEVICE),
    "randint_like": lambda s: call(T(s.flat, dtype=I64, low=0, high=9), 99),
    "randperm": lambda s: call(s.matrices[-1][1], device=INPUT_DEVICE),
    "multinomial": lambda s: call(T(*s.matrices[-1], dtype=F32, low=0.1, high=1.0), 64, True),
    "randint_like.low_dtype": lambda s: call(T(s.flat, dtype=I64, low=0, high=9), -9, 99),
}


def _made() -> dict[str, str]:
    return {"dtype": INPUT_DTYPE, "device": INPUT_DEVICE}


FACTORY: dict[str, Once] = {
    "full": lambda s: call([s.flat], 0.5, **_made()),
    "full_like": lambda s: call(flat(s), 0.5),
    "new_full": lambda s: call(T(s.short), [s.flat], 0.5),
    "ones": lambda s: call([s.flat], **_made()),
    "ones_like": lambda s: call(flat(s)),
    "new_ones": lambda s: call(T(s.short), [s.flat]),
    "zeros": lambda s: call([s.flat], **_made()),
    "zeros_like": lambda s: call(flat(s)),
    "new_zeros": lambda s: call(T(s.short), [s.flat]),
    "zero": lambda s: call(flat(s)),
    "arange": lambda s: call(s.flat, device=INPUT_DEVICE),
    "arange.start": lambda s: call(1, s.flat, device=INPUT_DEVICE),
    "arange.start_step": lambda s: call(0, s.flat, 2, device=INPUT_DEVICE),
    "range": lambda s: call(0, s.short, dtype=F32, device=INPUT_DEVICE),
    "range.step": lambda s: call(0, s.short, 2, dtype=F32, device=INPUT_DEVICE),
    "linspace": lambda s: call(0.0, 1.0, s.flat, dtype=F32, device=INPUT_DEVICE),
    "logspace": lambda s: call(0.0, 1.0, s.flat, dtype=F32, device=INPUT_DEVICE),
    "eye": lambda s: call(s.square, **_made()),
    "eye.m": lambda s: call(s.square, s.square // 2, **_made()),
    "scalar_tensor": lambda s: call(0.5, **_made()),
}

ROWWISE = {"softmax": SOFTMAX, "norm": NORM}
ONCE = {
    "norm": IMAGES,
    "loss": LOSS,
    "pointwise": POINTWISE,
    "reduction": REDUCTION,
    "product": PRODUCT,
    "indexing": INDEXING,
    "layout": LAYOUT,
    "image": IMAGE,
    "order": ORDER,
    "random": RANDOM,
    "factory": FACTORY,
}
#: composites whose schemas say enough
BY_SCHEMA = ("max.dim", "min.dim", "var.correction", "var_mean.correction", "std.correction")
BY_SCHEMA += ("cummax", "cummin")


def written(name: str, sizes: Sizes) -> Iterator[Case]:
    """The cases of an overload that stand here."""
    op = aten_name(eager._overloads()[name])
    if op in BY_SCHEMA:
        yield from reduction(name, sizes)
    for family, rows in ROWWISE.items():
        for shape in sizes.matrices if op in rows else ():
            yield Case(name, family, by_size(*shape), rows[op](*shape))
    if op in ACROSS:
        for shape in (sizes.matrix, sizes.matrices[-1]):
            label = f"{by_size(*shape)}-columns"
            yield Case(name, "softmax", label, ACROSS[op](*shape), across=True)
    for family, once in ONCE.items():
        if op in once:
            made = once[op](sizes)
            label = by_size(*_largest(made))
            yield Case(name, family, label, made, whole=family != "indexing")


def _largest(made: Call) -> tuple[int, ...]:
    """The shape of the largest tensor."""
    from math import prod

    from torch.utils._pytree import tree_leaves

    shapes = [t.shape for t in tree_leaves(made.args) if isinstance(t, (T, Filled))]
    sizes = [leaf for leaf in tree_leaves(made.args) if type(leaf) is int]  # of a factory
    return max(shapes, key=prod) if shapes else (max(sizes, default=1),)
