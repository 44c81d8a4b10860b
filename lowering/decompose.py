"""Which ATen ops AOTAutograd may take apart before we see them.

As few as possible: AOTAutograd's time follows the number of nodes, and an op that stays whole runs
as ATen at worst. What we declare stays whole too.
"""

from __future__ import annotations

import functools
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..kernels import load_ops
from ..kernels.dropout import native_dropout
from ..kernels.fused import register_torch_ops
from ..kernels.op import OPS
from ..kernels.softmax import decompose_log_softmax

#: the ops of ``own_ops``, which adds to it: overload -> the function that it is
OWN_RULES: dict[Any, Callable[..., Any]] = {}
#: modules of the rules in torch's tables as torch fills them
OWNER = "torch."
#: packets that run best whole, as ATen
KEEP = {
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "convolution",
    "convolution_backward",
    "embedding_dense_backward",
    "_softmax",
    "_log_softmax",
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "max_pool2d_with_indices",
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices",
    "max_unpool2d",  # of channels-last images torch's rule makes contiguous ones
    "max_unpool3d",
    "avg_pool2d",
    "avg_pool2d_backward",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool2d_backward",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "grid_sampler_2d",
    "index_put",
    "_unsafe_index_put",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_add",
    "index_copy",
    "cumsum",
    "sort",
    "topk",
    "split",
    "split_with_sizes",
    "unbind",
    "stack",
    "cat",
    "slice_scatter",
    "select_scatter",
    "addcmul",
    "addcdiv",
    "lerp",
    "_foreach_lerp",
    "clamp",
    "clamp_min",
    "clamp_max",
    "native_dropout",
    "rsub",
    "masked_fill",
    "unsafe_split",
    "_to_copy",
    "copy",
    "detach",
    "alias",
    "arange",
    "full",
    "full_like",
    "zeros",
    "ones",
    "var_mean",
    "var",
    "std",
    "logsumexp",
    "nll_loss_forward",
    "nll_loss_backward",
    "_fused_rms_norm",
    "_fused_rms_norm_backward",
    "cudnn_batch_norm",
    "cudnn_batch_norm_backward",
    "constant_pad_nd",
    "index_select",
    "gather",
    "expand_as",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "bernoulli",
    "rand",
    "randn",
    "randint",
    "rand_like",
    "randn_like",
    "uniform",
    "normal",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "batch_norm_backward",
    "miopen_batch_norm",
    "t",
    "transpose",
    "permute",
    "squeeze",
    "unsqueeze",
    "flip",
    "soft_margin_loss_backward",  # its rule takes 1 from what is nearly 1
}


class Decompositions(Mapping[Any, Callable[..., Any]]):
    """torch's table of decompositions, less what stays whole; made when it is first asked.

    A graph that the cache has is not decomposed, and torch's table takes a fifth of a second to
    load. ``own_rng``: dropout's mask is drawn again in backward, from a seed
    (``kernels.dropout``).
    """

    def __init__(self, own_rng: bool = True) -> None:
        self.own_rng = own_rng
        register_torch_ops()

    @property
    def table(self) -> Mapping[Any, Callable[..., Any]]:
        return _table(self.own_rng)

    def __getitem__(self, op: Any) -> Callable[..., Any]:
        return self.table[op]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


@functools.cache
def _table(own_rng: bool) -> Mapping[Any, Callable[..., Any]]:
    import torch
    from torch._inductor.decomposition import select_decomp_table

    load_ops()
    own: dict[Any, Callable[..., Any]] = {
        torch.ops.aten._log_softmax.default: decompose_log_softmax
    }
    if own_rng:
        own[torch.ops.aten.native_dropout.default] = native_dropout
    return ChainMap(
        OWN_RULES,  # first, and as it is: later ops add to it
        own,
        {
            op: rule
            for op, rule in select_decomp_table().items()
            if str(op) not in OPS and getattr(op, "_opname", "") not in KEEP
        },
    )


@functools.cache
def whole_table() -> ChainMap[Any, Callable[..., Any]]:
    """Every rule of torch's but those of ops that the core reads: for an op that eager mode takes
    apart, with no neighbour that would rather have it whole."""
    from torch._decomp import decomposition_table
    from torch._inductor.decomposition import select_decomp_table
    from torch._ops import OpOverload

    from .scatter import SCATTERS
    from .view_ops import VIEWS

    load_ops()
    written = {name.replace("_.", ".", 1) for name in SCATTERS}
    read = {*OPS, *VIEWS, *SCATTERS, *written}
    rules = {**decomposition_table, **select_decomp_table()}
    kept = {op: r for op, r in rules.items() if isinstance(op, OpOverload) and str(op) not in read}
    return ChainMap(OWN_RULES, kept)


def added_rules() -> list[str]:
    """The ops for which a program has put rules of its own into torch's tables."""
    from torch._decomp import global_decomposition_table

    inductor = sys.modules.get("torch._inductor.decomposition")  # else nobody has added to it
    tables = [global_decomposition_table["post_autograd"]]
    tables += [inductor.decompositions] if inductor is not None else []
    return sorted({str(op) for table in tables for op, rule in table.items() if _is_added(rule)})


def _is_added(rule: Any) -> bool:
    while isinstance(rule, functools.partial):
        rule = rule.func
    return not (getattr(rule, "__module__", None) or "").startswith(OWNER)
