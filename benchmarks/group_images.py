"""More fused groups that are timed: images, layouts, tables, column sums and optimizers.

See ``benchmarks.group`` for what a declaration says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.group import Aim, Sizes, T, group
from benchmarks.group_cases import ids, plain, wide

# ------------------------------------------------------------------------ images

IMAGES = {(64, 256, 56, 56): (4, 6, 5, 5)}
BATCH_NORM: dict[str, Aim] = {
    "forward": ("other", lambda b, c, h, w: 4 * b * c * h * w),  # x; y
    "backward": ("other", lambda b, c, h, w: 6 * b * c * h * w),  # x, dy; dx
}
BATCH_NORM_ADD: dict[str, Aim] = {
    "forward": ("other", lambda b, c, h, w: 6 * b * c * h * w),  # x, residual; y
    # x, dy, the sign of y (1 bit); dx, dresidual
    "backward": ("other", lambda b, c, h, w: 8 * b * c * h * w + b * c * h * w // 8),
}


def normed(b: int, c: int, h: int, w: int, channels_last: bool = True) -> list[T]:
    """An image, and a batch norm's weight, bias, running mean and variance in float32."""
    mean = wide((c,), grad=False, written=True)
    var = wide((c,), grad=False, written=True, positive=True)
    return [T((b, c, h, w), channels_last=channels_last), wide((c,)), wide((c,)), mean, var]


def added(b: int, c: int, h: int, w: int, channels_last: bool = True) -> list[T]:
    return [T((b, c, h, w), channels_last=channels_last), *normed(b, c, h, w, channels_last)]


@group("batch_norm", IMAGES, normed, **BATCH_NORM)
@group("batch_norm_nchw", IMAGES, lambda *s: normed(*s, channels_last=False), **BATCH_NORM)
def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Training: statistics of the batch, and the running ones moved towards them."""
    return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.1)


@group("batch_norm_relu", IMAGES, normed, **BATCH_NORM)
@group("batch_norm_relu_nchw", IMAGES, lambda *s: normed(*s, channels_last=False), **BATCH_NORM)
def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.relu(batch_norm(x, weight, bias, mean, var))


@group("batch_norm_add_relu", IMAGES, added, **BATCH_NORM_ADD)
@group("batch_norm_add_relu_nchw", IMAGES, lambda *s: added(*s, False), **BATCH_NORM_ADD)
def batch_norm_add_relu(residual: Tensor, x: Tensor, *state: Tensor) -> Tensor:
    """The end of a ResNet block."""
    return F.relu(batch_norm(x, *state) + residual)


@group(
    "batch_norm_inference_relu",
    IMAGES,
    lambda *s: [t.fixed() for t in normed(*s)],
    forward=("pointwise", lambda b, c, h, w: 4 * b * c * h * w),
)
def batch_norm_inference_relu(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    return F.relu(F.batch_norm(x, mean, var, weight, bias))


PHOTOS = {(64, 3, 224, 224): (2, 3, 32, 16)}


@group(
    "stem",
    PHOTOS,
    lambda b, c, h, w: [
        T((b, c, h, w), grad=False, channels_last=True),
        T((64, c, 7, 7), channels_last=True),
    ],
    forward=("other", lambda b, c, h, w: 2 * b * (c * h * w + 64 * (h // 2) * (w // 2))),  # x; y
    backward=("other", lambda b, c, h, w: 2 * b * (c * h * w + 64 * (h // 2) * (w // 2))),  # x, dy
)
def stem(x: Tensor, weight: Tensor) -> Tensor:
    """A ResNet's first convolution, and the gradient of its weight."""
    return F.conv2d(x, weight, stride=2, padding=3)


@group(
    "patches",
    PHOTOS,
    lambda b, c, h, w: [T((b, c, h, w), grad=False), T((768, c, 16, 16)), T((768,))],
    forward=("other", lambda b, c, h, w: 2 * b * h * w * (c + 3)),  # x; y, of 768 in 256 pixels
    backward=("other", lambda b, c, h, w: 2 * b * h * w * (c + 3)),  # x, dy
)
def patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a vision transformer makes of an image: a row of numbers for each patch."""
    return F.conv2d(x, weight, bias, stride=16).flatten(2).transpose(1, 2) * 2


@group(
    "group_norm_silu",
    {(8, 320, 64, 64): (2, 20, 4, 4)},
    lambda b, c, h, w: [T((b, c, h, w)), T((c,)), T((c,))],
    forward=("other", lambda b, c, h, w: 4 * b * c * h * w),
    backward=("other", lambda b, c, h, w: 6 * b * c * h * w),
)
def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A diffusion model's block: groups of ten channels."""
    return F.silu(F.group_norm(x, x.shape[1] // 10, weight, bias, 1e-5))


@group(
    "layer_scale",
    {(64, 96, 56, 56): (2, 6, 5, 4)},
    lambda b, c, h, w: [plain((b, h, w, c)), plain((b, c, h, w)), plain((c,))],
    forward=("other", lambda b, c, h, w: 6 * b * c * h * w),  # NHWC x, NCHW residual; y
)
def layer_scale(x: Tensor, residual: Tensor, gamma: Tensor) -> Tensor:
    """The tail of a ConvNeXt block."""
    return x.permute(0, 3, 1, 2) * gamma.reshape(1, -1, 1, 1) + residual


@group(
    "squeeze_excite",
    IMAGES,
    lambda b, c, h, w: [plain((b, c, h, w))],
    forward=("other", lambda b, c, h, w: 4 * b * c * h * w),
)
def squeeze_excite(x: Tensor) -> Tensor:
    """The gate of a squeeze-and-excite block, without its two small matrices."""
    return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


# -------------------------------------------------------------- column sums, layouts

MATRICES = {(8192, 4096): (9, 24), (32768, 1024): (40, 8)}


@group(
    "bias_grad",
    MATRICES,
    lambda m, n: [plain((m, n))],
    forward=("other", lambda m, n: 2 * m * n + 2 * n),  # dy; dbias
)
def bias_grad(dy: Tensor) -> Tensor:
    return dy.sum(0)


@group(
    "gelu_bias_grad",
    MATRICES,
    lambda m, n: [plain((m, n)), plain((m, n))],
    forward=("other", lambda m, n: 6 * m * n + 2 * n),  # x, dy; dx, dbias
)
def gelu_bias_grad(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.ops.aten.gelu_backward(dy, x)
    return dx, dx.sum(0)


@group(
    "pad",
    {(64, 128, 112, 112): (2, 3, 6, 5)},
    lambda b, c, h, w: [plain((b, c, h, w)), plain((c, 1, 1)), plain((c, 1, 1))],
    forward=("pointwise", lambda b, c, h, w: 2 * b * c * (h * w + (h + 2) * (w + 2)) + 4 * c),
)
def pad(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Affine, ReLU and the frame of zeros that a convolution reads."""
    return F.pad(F.relu(x * scale + shift), (1, 1, 1, 1)) * 0.5


@group(
    "to_channels_last",
    {(64, 64, 224, 224): (2, 3, 5, 6)},
    lambda b, c, h, w: [wide((b, c, h, w), grad=False)],
    forward=("other", lambda b, c, h, w: 6 * b * c * h * w),  # float32 NCHW; bfloat16 NHWC
)
def to_channels_last(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16, memory_format=torch.channels_last)


@group(
    "to_contiguous",
    {(64, 64, 224, 224): (2, 3, 5, 6)},
    lambda b, c, h, w: [plain((b, c, h, w), channels_last=True)],
    forward=("other", lambda b, c, h, w: 6 * b * c * h * w),  # bfloat16 NHWC; float32 NCHW
)
def to_contiguous(x: Tensor) -> Tensor:
    return x.to(torch.float32, memory_format=torch.contiguous_format)


@group(
    "add_transposed",
    {(4096, 4096): (20, 20)},
    lambda m, n: [plain((m, n)), plain((n, m))],
    forward=("other", lambda m, n: 6 * m * n),
)
def add_transposed(a: Tensor, b: Tensor) -> Tensor:
    return a + b.t()


# ------------------------------------------------------------------------ tables


@group(
    "bert_embedding",
    {(64, 512, 30522, 768): (2, 6, 50, 24)},
    lambda b, s, v, n: [ids((b, s), high=v), plain((v, n)), plain((s, n)), *[plain((n,))] * 3],
    # int64 ids, their rows, positions; y
    forward=("row", lambda b, s, v, n: 8 * b * s + 4 * b * s * n + 2 * s * n + 6 * n),
)
def bert_embedding(
    tokens: Tensor, words: Tensor, places: Tensor, kind: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Words, token type and positions, and their norm."""
    hidden = F.embedding(tokens, words) + kind + places
    return F.layer_norm(hidden, weight.shape, weight, bias, 1e-12)


@group(
    "gpt2_embedding",
    {(32, 1024, 50257, 768): (2, 6, 50, 24)},
    lambda b, s, v, n: [ids((b, s), high=v), plain((v, n)), plain((s, n)), *[plain((n,))] * 2],
    # and the residual stream, which is kept
    forward=("row", lambda b, s, v, n: 8 * b * s + 6 * b * s * n + 2 * s * n + 4 * n),
)
def gpt2_embedding(
    tokens: Tensor, words: Tensor, places: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Words and positions, and the first norm."""
    hidden = F.embedding(tokens, words) + places
    return F.layer_norm(hidden, weight.shape, weight, bias, 1e-5), hidden


@group(
    "embedding",
    {(16384, 128256, 4096): (12, 50, 16)},
    lambda m, v, n: [ids((m,), high=v), T((v, n))],
    backward=("other", lambda m, v, n: 8 * m + 2 * m * n + 2 * v * n),  # ids, dy; the whole table
)
def embedding(tokens: Tensor, words: Tensor) -> Tensor:
    return F.embedding(tokens, words)


# ------------------------------------------------------------------------ optimizers

MODEL = {(24, 2048): (3, 12)}


def weights(layers: int, n: int) -> list[Sizes]:
    """100 M parameters: a matrix and a vector a layer."""
    return [shape for _ in range(layers) for shape in ((n, n), (n,))]


def gradients(layers: int, n: int) -> list[list[T]]:
    shapes = weights(layers, n)
    return [[wide(s) for s in shapes], [wide(s, grad=False) for s in shapes]]


def numel(layers: int, n: int) -> int:
    return layers * (n * n + n)


def with_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


@group(
    "adamw",
    MODEL,
    gradients,
    # float32 parameters, gradients, two moments; all but the gradients written
    update=("pointwise", lambda layers, n: 28 * numel(layers, n)),
)
def adamw(params: Sequence[Tensor], grads: Sequence[Tensor]) -> torch.optim.Optimizer:
    # capturable: the step count stays on the device, as compiled optimizers keep it
    on_gpu = params[0].is_cuda
    params = with_gradients(params, grads)
    return torch.optim.AdamW(params, lr=1e-3, foreach=True, capturable=on_gpu)


@group(
    "sgd_momentum",
    MODEL,
    gradients,
    update=("pointwise", lambda layers, n: 20 * numel(layers, n)),
)
def sgd_momentum(params: Sequence[Tensor], grads: Sequence[Tensor]) -> torch.optim.Optimizer:
    params = with_gradients(params, grads)
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9, foreach=True)


@group(
    "clip_grad_norm",
    MODEL,
    lambda layers, n: [wide(s, grad=False, written=True) for s in weights(layers, n)],
    forward=("other", lambda layers, n: 12 * numel(layers, n)),  # read for the norm; read, written
)
def clip_grad_norm(*grads: Tensor) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ with foreach, on gradients alone."""
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    torch._foreach_mul_(grads, torch.clamp(1.0 / (norm + 1e-6), max=1.0))
    return norm
