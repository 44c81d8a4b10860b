"""One measurement: one model through one backend, in a process of its own.

The process imports what it needs, waits for a line on stdin, and measures only then, so that a
parent may start it early. "Cold compile" is the first call less a steady step: Dynamo, AOTAutograd,
the backend and its kernels, for training also the backward; imports and one eager step (which
loads cuBLAS, cuDNN and their kernels) come before it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import Case, missing, spec_of
from benchmarks.processes import serve_row

Step = dict[str, torch.Tensor]


def compiled(model: torch.nn.Module, backend: str) -> Callable[..., Any]:
    """The model through a backend written as ``name`` or ``name:mode``; eager is the model."""
    name, _, mode = backend.partition(":")
    if name == "eager":
        return model
    return torch.compile(model, backend=name, mode=mode or None)


def import_backend(backend: str) -> None:
    """Import a backend's modules, which are not part of the time to compile.

    An unknown backend is left for the measurement to report.
    """
    name = backend.partition(":")[0]
    if name == "eager":
        return
    importlib.import_module("torch._dynamo")
    with contextlib.suppress(Exception):
        torch._dynamo.lookup_backend(name)
        if name == "inductor":
            importlib.import_module("torch._inductor.compile_fx")


def reports() -> dict[str, Any]:
    """Kernels, launches and ATen calls over the graphs that gems compiled, and what failed in them;
    {} where unknown."""
    try:
        import gems_compile

        graphs = gems_compile.reports()
    except (ImportError, AttributeError):
        return {}
    counts = {
        name: sum(getattr(graph, name) for graph in graphs)
        for name in ("kernels", "launches", "aten_calls")
    }
    return {**counts, "failures": [text for graph in graphs for text in graph.failures]}


def graphs() -> dict[str, int]:
    """What Dynamo made of the model: graphs and breaks between them."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def peak_mib(
    step: Callable[[], object], prepare: Callable[[], object], device: torch.device
) -> float | None:
    """Largest memory held over one steady step, weights included; None on a CPU.

    A step that replays a CUDA graph allocates nothing: its pool was taken when it was captured and
    counts as reserved, whether it is in use or not.

    The 32 MiB that torch's cuBLAS works in, and keeps, count where the step takes them, not where
    only eager's step, which came first, did.
    """
    if device.type != "cuda":
        return None
    torch._C._cuda_clearCublasWorkspaces()
    prepare()
    step()
    prepare()
    gc.collect()
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return max(kept, torch.cuda.max_memory_allocated(device)) / 2**20


def results_of(case: Case, run: Callable[..., Any]) -> tuple[Step, Step]:
    """One step's outputs and its parameters' gradients, by name, copied out of any graph pool."""
    case.reset()
    out = {name: value.detach().clone() for name, value in case.step(run).items()}
    grads = {
        name: param.grad.clone()
        for name, param in case.model.named_parameters()
        if param.grad is not None
    }
    return out, grads


def squares(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float()).double() ** 2)


def distance(found: Step, wanted: Step) -> float:
    """||found - wanted|| / ||wanted|| over all the tensors as one vector."""
    if found.keys() != wanted.keys():
        raise RuntimeError(f"other tensors than eager's: {sorted(found.keys() ^ wanted.keys())}")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise RuntimeError(f"{name}: {list(value.shape)}, eager {list(wanted[name].shape)}")
    above = sum(squares(value.float() - wanted[name].float()) for name, value in found.items())
    below = sum(squares(value) for value in wanted.values())
    return math.sqrt(above / below) if below else math.sqrt(above)


def errors(case: Case, run: Callable[..., Any], wider: torch.dtype) -> dict[str, float]:
    """Relative error of ``run`` against eager, and against eager in a wider dtype.

    Weights and inputs are the same. The gradients count as one vector.
    """
    found, row = results_of(case, run), {}
    if run is not case.model:
        row.update(compare("_vs_eager", found, results_of(case, case.model)))
    reference = case.upcast(wider)
    row.update(compare("", found, results_of(reference, reference.model)))
    return row


def compare(suffix: str, found: tuple[Step, Step], wanted: tuple[Step, Step]) -> dict[str, float]:
    """Errors of outputs, each and the largest, and of the gradients of a training step."""
    (out, grads), (wanted_out, wanted_grads) = found, wanted
    if out.keys() != wanted_out.keys():
        raise RuntimeError(f"other outputs than eager's: {sorted(out.keys() ^ wanted_out.keys())}")
    each = {name: distance({name: out[name]}, {name: wanted_out[name]}) for name in wanted_out}
    row = {f"error_{name}{suffix}": value for name, value in each.items()}
    worst = math.nan if any(map(math.isnan, each.values())) else max(each.values())
    row[f"error{suffix}"] = worst
    if wanted_grads or grads:
        row[f"grad_error{suffix}"] = distance(grads, wanted_grads)
    return row


def build(task: dict[str, Any], device: torch.device, dropout: bool) -> Case:
    dtype = getattr(torch, task["dtype"])
    return spec_of(task["model"]).build(dtype, device, task["small"], dropout)


def step_mark(backend: str) -> Callable[[], None]:
    """What announces a step; a CUDA graph's outputs, in some modes, live until the next one."""
    return torch.compiler.cudagraph_mark_step_begin if ":" in backend else lambda: None


def measure(task: dict[str, Any], device: torch.device, row: dict[str, Any]) -> None:
    """Fill ``row`` with everything about one model through one backend, speed first."""
    backend, spec = task["backend"], spec_of(task["model"])
    mark = step_mark(backend)
    case = build(task, device, dropout=True)
    case.reset()
    case.step(case.model)
    run = compiled(case.model, backend)

    def step() -> None:
        mark()
        case.step(run)

    case.reset()
    first = timing.seconds(step, device)
    steady = timing.measure(
        step, device, min_seconds=task["seconds"], prepare=case.reset, max_batch=case.max_batch
    )
    row.update(ms=steady.median_ms, best_ms=steady.best_ms, steps=steady.steps)
    if backend != "eager":
        row["compile_s"] = max(0.0, first - steady.median_ms / 1e3)
        row.update(graphs())
    if backend.partition(":")[0] == "gems":
        row.update(reports())
    row["peak_mib"] = peak_mib(step, case.reset, device)
    if not task["errors"]:
        return
    if spec.dropout:
        # another generator cannot drop the same elements: compare with p = 0
        del step, run, case
        free(device)
        case = build(task, device, dropout=False)
        run = compiled(case.model, backend)
    mark()
    wider = torch.float64 if task["dtype"] == "float32" else torch.float32
    row.update(errors(case, run, wider))
    row["error_without_dropout"] = spec.dropout


def free(device: torch.device) -> None:
    """Give back what a first compiled model held."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def versions(device: torch.device) -> dict[str, str]:
    """The machine and the software a row was measured with."""
    cuda = device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine() + " cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "transformers", "timm"):
        module = sys.modules.get(name)
        if module is not None:
            found[name] = getattr(module, "__version__", "unknown")
    return found


def serve(fill: Callable[[dict[str, Any], torch.device, dict[str, Any]], None]) -> None:
    """Read the task from argv, wait for a line on stdin, write the row to the task's file.

    ``fill(task, device, row)`` measures.
    """
    task = json.loads(sys.argv[-1])
    out = Path(task["out"])
    reason = missing(spec_of(task["model"]).package)
    early = ["triton"]
    if "transformers" in sys.modules:  # which imports its models only when they are named
        early.append("transformers.models.auto.modeling_auto")
    for name in early:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import_backend(task["backend"])
    out.with_name("ready").touch()
    if not sys.stdin.readline():
        return  # the parent went away
    device = torch.device(task["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    # float32 means float32: convolutions would take TF32 by default
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    row: dict[str, Any] = {"status": f"skipped: {reason}" if reason else "ok"}
    if not reason:
        try:
            fill(task, device, row)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            row["status"] = f"failed: {type(error).__name__}: {lines[0][:300]}"
            traceback.print_exc()
    serve_row(out, {**row, **versions(device)})


if __name__ == "__main__":
    serve(measure)
