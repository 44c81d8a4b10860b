"""``backend="gems"``: a Dynamo graph -> AOTAutograd -> ``lowering.compile_graph``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule

from .config import Config, cache_dir, vendor
from .kernels import load_ops
from .kernels.target import current_target
from .lowering.decompose import decompositions
from .lowering.options import Options
from .lowering.pipeline import Report, compile_graph

log = logging.getLogger(__name__)

_reports: list[Report] = []
_told: set[str] = set()


def reports() -> list[Report]:
    """What became of every graph compiled in this process, oldest first."""
    return list(_reports)


class Gems:
    """The backend object: ``torch.compile(model, backend=gems)``, or ``backend="gems"``."""

    compiler_name = "gems"
    __name__ = "gems"

    def __call__(
        self, gm: GraphModule, inputs: Sequence[Any], *, mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        config = Config.from_call(mode, options)
        target = current_target(vendor())
        if target is None:
            _tell_once("no GPU and no interpreter (TRITON_INTERPRET=1): graphs run as ATen")
            return aot_autograd(fw_compiler=run_as_aten, keep_inference_input_mutations=True)(
                gm, inputs
            )
        load_ops()
        return _compile(gm, inputs, config, target)

    def reset(self) -> None:
        """``torch._dynamo.reset()`` calls this."""
        _reports.clear()

    def __repr__(self) -> str:
        return "<backend gems>"


gems = Gems()


def _compile(gm: GraphModule, inputs: Sequence[Any], config: Config, target: Any) -> Any:
    options = lowering_options(config, target)
    if target.name != "interpreter":
        from .lowering.load import pool

        pool(options.threads)  # workers start while AOTAutograd traces
    if config.rewrites:
        from .lowering.rewrite import rewrite_dynamo_graph

        rewrite_dynamo_graph(gm)
    compilers = {
        kind: _compiler(kind, config, options) for kind in ("forward", "backward", "inference")
    }
    return aot_autograd(
        fw_compiler=compilers["forward"],
        bw_compiler=compilers["backward"],
        inference_compiler=compilers["inference"],
        decompositions=decompositions,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )(gm, inputs)


def lowering_options(config: Config, target: Any) -> Options:
    return Options(
        target=target, exact=config.numerics == "eager", strict=config.strict,
        own_rng=config.rng == "gems", cache_dir=cache_dir(), threads=config.threads,
    )


def _compiler(kind: str, config: Config, options: Options) -> Callable[..., Any]:
    def compile_one(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        label = f"{len(_reports)}_{kind}"
        try:
            run, report = compile_graph(gm, inputs, options, label)
        except Exception as e:
            if options.strict:
                raise
            log.warning("graph %s runs as ATen: %s: %s", label, type(e).__name__, e)
            _reports.append(Report(label, failures=[f"{type(e).__name__}: {e}"]))
            return run_as_aten(gm, inputs)
        _reports.append(report)
        return run

    return compile_one


def run_as_aten(gm: GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """The graph, node by node, through ATen; boxed as AOTAutograd asks for."""
    interpreter = torch.fx.Interpreter(gm)

    def run(args: list[Any]) -> Any:
        return interpreter.boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)
