"""What became of a graph, for torch's own ways of watching: TORCH_LOGS and TORCH_TRACE."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

from ..late import Boxed
from ..lowering import private
from ..lowering.report import Report

log = logging.getLogger(__name__)


def tell(report: Report) -> None:
    """A line at info, all decisions at debug, and artifacts where TORCH_TRACE is on; what fails
    here stops no compile."""
    try:
        _tell(report)
    except Exception as error:
        log.warning("graph %s is not told of: %s: %s", report.label, type(error).__name__, error)


def _tell(report: Report) -> None:
    if log.isEnabledFor(logging.INFO):
        log.info("%s", in_a_line(report))
    if log.isEnabledFor(logging.DEBUG):
        for line in in_detail(report):
            log.debug("graph %s: %s", report.label, line)
    if private.traces():
        for name, encoding, text in artifacts(report):
            private.trace(name, encoding, text)


def loaded(load: Callable[[], Boxed], report: Report) -> Boxed:
    """``load`` the kernels, and tell what all stages took."""
    run = load()
    log.debug("graph %s runs; seconds: %s", report.label, seconds(report))
    return run


def in_a_line(report: Report) -> str:
    """``graph 0_forward: 12 nodes -> 3 launches, 2 ATen calls, 0.03 s, cache: kept``"""
    failed = f", {len(report.failures)} failed" if report.failures else ""
    return (
        f"graph {report.label}: {report.nodes} nodes -> {report.launches} launches, "
        f"{report.aten_calls} ATen calls, {sum(report.seconds.values()):.2f} s, "
        f"cache: {report.cache or 'not asked'}{failed}"
    )


def in_detail(report: Report) -> Iterator[str]:
    """Rewrites, near misses, what ATen runs and why, failures, seconds."""
    from .summary import ATEN, counted, summarize

    summary = summarize(report)
    for r, times in counted(summary.rewritten):
        yield f"rewritten x{times}: {r.rule}, because {r.because}  {r.line}"
    for m, times in counted(summary.near_misses):
        yield f"nearly rewritten x{times}: {m.rule} at {m.node}, but {m.reason}  {m.line}"
    calls = [(n.op, n.detail, n.line) for n in summary.nodes if n.fate == ATEN]
    for (op, why, line), times in counted(calls):
        yield f"runs as ATen x{times}: {op}, because {why}  {line}"
    for e, times in counted(summary.unfused):
        yield f"not fused x{times}: {e.producer} -> {e.consumer}, because {e.reason}  {e.line}"
    for failure in report.failures:
        yield f"failed: {failure}"
    yield f"seconds: {seconds(report)}"


def seconds(report: Report) -> str:
    return ", ".join(f"{stage} {s:.3f}" for stage, s in report.seconds.items())


def artifacts(report: Report) -> Iterator[tuple[str, str, str]]:
    """(Name, encoding, text) of what tlparse shows of a graph."""
    from .dump_files import rewrites_text
    from .plan import plan_text
    from .summary import summarize

    summary, label = summarize(report), report.label
    yield f"gems_{label}_plan", "string", plan_text(summary)
    yield f"gems_{label}_rewrites", "string", rewrites_text(summary)
    yield f"gems_{label}_report", "json", json.dumps(summary.to_dict())
    for name, text in summary.sources.items():
        yield f"gems_{label}_kernel_{name}", "string", text
