"""Custom ops and Triton kernels that functionalization turned into copies, turned back."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import torch
from torch import fx

from .graph import value_of

log = logging.getLogger("gems_compile")


def inline_functionalized_ops(gm: fx.GraphModule) -> int:
    """Turn ``auto_functionalized`` custom ops and Triton kernels back into in-place calls.

    Left in the graph they would clone every tensor they write. torch's own passes do the work; if
    they fail (they are private), the graph stays as it was, right but with the clones.
    """
    wanted = [n for n in gm.graph.nodes if _is_functionalized(n)]
    if not wanted:
        return 0
    before = copy.deepcopy(gm.graph)
    try:
        _inline_with_torch(gm, fake_mode_of(gm.graph))
    except Exception as error:
        log.warning("%d functionalized ops keep their clones: %s", len(wanted), error)
        gm.graph = before
        return 0
    return len(wanted) - sum(map(_is_functionalized, gm.graph.nodes))


def _is_functionalized(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in (
        "auto_functionalized",
        "auto_functionalized_v2",
        "triton_kernel_wrapper_functional",
    )


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake mode in which the graph's values live, or None."""
    modes = (getattr(value_of(node), "fake_mode", None) for node in graph.nodes)
    return next((mode for mode in modes if mode is not None), None)


def _inline_with_torch(gm: fx.GraphModule, mode: Any) -> None:
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater
    from torch._inductor.virtualized import V

    with V.set_fake_mode(mode):
        # torch 2.11 takes the graph, 2.13 the module
        takes_module = "gm" in inspect.signature(FakeTensorUpdater).parameters
        whole: Any = gm if takes_module else gm.graph
        updater = FakeTensorUpdater(whole)
        reinplace_inplaceable_ops(updater, gm.graph)
        post_grad.decompose_triton_kernel_wrapper_functional(gm.graph)
        post_grad.decompose_auto_functionalized(gm.graph)
