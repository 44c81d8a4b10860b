"""The one place that touches torch's CUDA graph trees, which are private: see ``private.py``.

Checked against the sources of torch 2.11.0 and 2.13.0. Where something is missing, ``machinery``
says what, and nothing is captured.

The trees warm a function up (its first call runs, in their memory), record it when it is called
again and replay it from then on; graphs share one memory pool. They end a step when the next call
of anything compiled begins, and then reuse memory that is still in use: ``would_overwrite`` tells.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import private

Model = Callable[[list[Any]], Sequence[Any]]


class Trees:
    """The graphs of one device."""

    def __init__(self, index: int, module: Any) -> None:
        self.index, self.module = index, module
        self.stream = private.current_stream(index)
        self.threads = {n: _of_this_thread(module, n, new) for n, new in _THREAD_LOCALS.items()}

    def first(
        self, model: Model, args: list[Any], static: Sequence[int], kind: str, results: int
    ) -> tuple[Model, Sequence[Any]]:
        """(``model`` as a function that is captured, what it returned for ``args``). Like ``model``
        it takes a list of tensors, which it clears. Those that are not ``static`` are copied to
        where the graph reads them; others are read and written wherever they are, aligned or not,
        as kernels look at addresses when they are recorded."""
        for name, shared in self.threads.items():
            if not hasattr(self.module.local, name):
                setattr(self.module.local, name, shared)
        made: tuple[Model, Sequence[Any]] = self.module.cudagraphify(
            model,
            args,
            static,
            device_index=self.index,
            is_backward=kind == "backward",
            is_inference=kind == "inference",
            stack_traces=[None] * results,  # which it counts
        )
        return made

    def would_overwrite(self) -> bool:
        """Whether the next call would write over memory that something still holds."""
        manager = self._manager()
        return manager is not None and manager.can_start_new_generation() and self.holds()

    def holds(self) -> bool:
        """Whether something holds graphs' memory: what an earlier step saved for a backward that
        did not run yet, or gradients that were lent."""
        manager = self._manager()
        if manager is None or manager.current_node is None:
            return False
        return any(map(_in_use, manager.current_node._path_from_root))

    def _manager(self) -> Any:
        container = self.threads["tree_manager_containers"].get(self.index)
        return container.tree_manager if container is not None else None

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def wait_for(self, stream: int) -> None:
        """The current stream waits for what another one has been given to do."""
        other = torch.cuda.ExternalStream(stream, device=self.index)
        torch.cuda.current_stream(self.index).wait_stream(other)


def _in_use(node: Any) -> bool:
    """Whether something holds results of a graph's last run. What a model of ours says may be
    ``held`` stands for all of them: looking at each takes a microsecond."""
    model = getattr(node.wrapped_function.model, "__self__", None)
    refs = node.outputs_weakrefs
    held = getattr(model, "held", None)
    if held is None:
        return any(ref is not None and ref() is not None for ref in refs)
    return any(map(_has_aliases, [refs[k] for k in held if k < len(refs)]))


def _has_aliases(ref: Any) -> bool:
    """Whether another tensor than the trees' own has a result's memory: who holds results of ours
    holds such a one (``copies.alias``), and the trees' own look asks Python for more."""
    if ref is None:
        return False
    own = 0 if ref.extra_ref_check is None else OWN_REFERENCES
    return bool(torch._C._storage_Use_Count(ref.ref.cdata) > own)


#: to a storage of which the trees keep the tensor: that, and Python's object for the storage
OWN_REFERENCES = 2
#: where the trees of each thread are; ours share those of the first, one call at a time
_THREAD_LOCALS: dict[str, Callable[[], Any]] = {
    "tree_manager_containers": dict,
    "tree_manager_locks": lambda: defaultdict(threading.Lock),
}
_USED = {
    "CUDAGraphTreeManager": ("current_node", "can_start_new_generation"),
    "CUDAGraphNode": ("_path_from_root",),
    "StorageWeakRefWrapper": ("ref", "extra_ref_check"),
}


def _of_this_thread(module: Any, name: str, new: Callable[[], Any]) -> Any:
    if not hasattr(module.local, name):  # another thread imported the module
        setattr(module.local, name, new())
    return getattr(module.local, name)


@functools.cache
def machinery(device: torch.device) -> tuple[Trees | None, str]:
    """(what captures on a device, why nothing does)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None, "there is no NVIDIA GPU to capture on"
    try:
        from torch._inductor import cudagraph_trees as trees

        for cls, names in _USED.items():
            for name in names:
                getattr(getattr(trees, cls), name)
        torch._C._storage_Use_Count  # noqa: B018
        index = device.index if device.index is not None else torch.cuda.current_device()
        return Trees(index, trees), ""
    except (ImportError, AttributeError) as missing:
        return None, f"this torch keeps its CUDA graph trees elsewhere ({missing})"
