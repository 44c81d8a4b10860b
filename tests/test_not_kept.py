"""Whole graphs that are not kept in torch's cache, or not taken from it, and what is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gems_only, rand
from warmcheck import entries, results, said

import gems_compile
from gems_compile.backend import Gems
from gems_compile.insight.summary import summarize
from gems_compile.lowering import load, pipeline, whole_graphs
from gems_compile.lowering.whole_graphs import FRESH, FROM_CACHE, KEPT

pytestmark = [gems_only, pytest.mark.usefixtures("caches")]


def double_exp(x):
    return (x * 2).exp() + 1


def once(**how: Any) -> set[str]:
    """What is said of a graph that is compiled now."""
    return said(results(lambda f: [f(rand(8, 16))], lambda: double_exp, **how)[1])


def test_options_that_differ_are_other_entries(caches, monkeypatch):
    changes = [
        {},
        {"numerics": "fast"},
        {"rewrites": False},
        {"rng": "eager"},
        {"layout": "keep"},
        {"keep_weights": True},
        {"strict": False},
    ]
    for options in changes:
        assert once(options=options or {"strict": True}) == {KEPT}
    assert len(entries(caches)) == len(changes)
    assert once(options={"numerics": "fast"}) == {FROM_CACHE}
    assert once(options={"threads": 3}) == {FROM_CACHE}  # decides nothing
    with monkeypatch.context() as patch:
        patch.setattr(gems_compile.warm, "sources_digest", lambda: "another version")
        assert once() == {KEPT}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert once() == {KEPT}
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_rule_of_the_programs_own_is_another_entry(monkeypatch):
    """Which ops AOTAutograd takes apart is asked of torch's tables without loading them."""
    tables = torch._decomp.global_decomposition_table
    assert once() == {KEPT}
    with monkeypatch.context() as patch:
        patch.setitem(tables["post_autograd"], torch.ops.aten.exp.default, double_exp)
        assert once() == {KEPT}
    assert once() == {FROM_CACHE}


def test_what_turns_it_off(caches, tmp_path):
    assert once(options={"cache": False}) == {"off: the option cache is off"}
    (why,) = once(options={"dump": str(tmp_path / "dump")})
    assert why.startswith("off: a dump")
    with torch.compiler.config.patch(force_disable_caches=True):
        (why,) = once()
        assert "force_disable_caches" in why
    with torch._functorch.config.patch(enable_autograd_cache=False):
        (why,) = once()
        assert "enable_autograd_cache" in why
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert once() == {"not kept: torch: FX graph cache is not enabled"}
    assert not entries(caches)


def test_another_torch(monkeypatch, caches):
    monkeypatch.setattr(whole_graphs, "MISSING", "this torch keeps it elsewhere")
    assert once() == {"off: this torch keeps it elsewhere"}


def test_a_torch_that_is_not_as_it_was(caches, monkeypatch, caplog):
    """What fails in the cache's ways, and not without it, is left out."""

    def changed(**entry):
        raise AssertionError("expected another thing")

    monkeypatch.setattr(whole_graphs.autograd_cache.AOTAutogradCache, "make_entry", changed)
    (why,) = once()
    assert why == "not kept: AssertionError: expected another thing"
    assert "the cache of whole graphs is not used" in caplog.text


def test_torchs_own_keys_are_left_alone(caches):
    """What is left out of our keys stays in Inductor's."""
    from torch._inductor import codecache

    before = dict(vars(codecache)), dict(vars(codecache.CacheBase))
    assert once() == {KEPT}
    assert (dict(vars(codecache)), dict(vars(codecache.CacheBase))) == before


def test_a_loaded_graph_is_called_without_detours(caches):
    for known in (KEPT, FROM_CACHE):
        graphs = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(whole_graphs.Kept, "_tell_torch", _noting(graphs))
            assert once() == {known}
        (graph,) = (g for g in graphs if g.run is not None)
        assert graph.run.__name__ == "call"


def _noting(graphs: list[Any]) -> Callable[[Any], None]:
    tell = whole_graphs.Kept._tell_torch

    def noted(graph: Any) -> None:
        graphs.append(graph)
        tell(graph)

    return noted


def test_a_folder_that_others_can_write(caches, caplog, monkeypatch):
    monkeypatch.setattr(gems_compile.warm, "_told", set())
    os.makedirs(caches)
    os.chmod(caches, 0o777)
    for _ in range(2):
        (why,) = once()
        assert "others can write to it" in why
    assert sum("others can write" in r.getMessage() for r in caplog.records) == 1
    assert not entries(caches)


def test_an_entry_that_cannot_be_written(caches, monkeypatch):
    def full(path, content, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_graphs.autograd_cache, "write_atomic", full)
    (why,) = once()
    assert why.startswith("not kept") and not entries(caches)


@pytest.mark.parametrize("damage", ["cut", "random", "empty", "text"])
def test_a_damaged_entry_is_a_miss(caches, damage):
    assert once() == {KEPT}
    (path,) = entries(caches)
    data = Path(path).read_bytes()
    place = data.index(b"def call(args)")
    harm = {
        "cut": data[: len(data) // 2],
        "random": bytes(range(256)) * 20,
        "empty": b"",
        "text": data[:place] + b"def Call" + data[place + 8 :],
    }
    Path(path).write_bytes(harm[damage])
    assert once() == {KEPT}  # compiled and written anew
    assert once() == {FROM_CACHE}


def test_what_torch_does_not_cache_is_told(caches):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    step = lambda f: [f(rand(4, 5).requires_grad_()).detach()]  # noqa: E731
    _, reports = results(step, lambda: lambda x: Double.apply(x).exp())
    assert all(why.startswith("not kept: torch: ") for why in said(reports))


def test_a_graph_with_a_part_that_failed_is_not_kept(caches, monkeypatch):
    monkeypatch.setenv("GEMS_STRICT", "0")

    def fails(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(pipeline, "emit", fails)
    (why,) = once()
    assert why.startswith("not kept: a part of it failed to compile") and not entries(caches)


def test_a_kernel_that_turned_out_to_be_of_no_use(caches, monkeypatch):
    """The graph is kept before its kernels are loaded; the next process compiles it again."""
    monkeypatch.setenv("GEMS_STRICT", "0")
    with monkeypatch.context() as patch:
        patch.setattr(load.Loading, "result", _no_room)
        assert once() == {KEPT}
    (why,) = once()
    assert why.startswith("not kept: its kernel") and "no room" in why


def _no_room(loading: Any) -> None:
    raise load.CompileError(loading.source, "no room")


def test_a_missing_kernel_that_does_not_compile(caches, monkeypatch):
    assert once() == {KEPT}
    monkeypatch.setattr(load.Loading, "settle", _no_room)
    (why,) = once()
    assert why.startswith("not kept: CompileError: fused")


def test_a_fresh_backend_neither_finds_nor_keeps(caches):
    def fresh():
        torch._dynamo.reset()
        backend = Gems(fresh=True)
        torch.compile(double_exp, backend=backend)(rand(8, 16))
        return said(backend.reports)

    assert fresh() == {FRESH} and not entries(caches)
    assert once() == {KEPT}
    assert fresh() == {FRESH} and len(entries(caches)) == 1


# what is told ------------------------------------------------------------------------------------


def test_a_report_from_the_cache_tells_what_the_first_did(caches):
    _, (first,) = results(lambda f: [f(rand(8, 16))], lambda: double_exp)
    _, (second,) = results(lambda f: [f(rand(8, 16))], lambda: double_exp)
    one, two = summarize(first), summarize(second)
    assert (one.cache, two.cache) == (KEPT, FROM_CACHE)
    same = ("nodes", "fused", "kernels", "launches", "aten_calls")
    assert {n: one.numbers()[n] for n in same} == {n: two.numbers()[n] for n in same}
    assert set(second.seconds) == {"load", "triton", "bind"}
    assert [s.text for s in second.sources] == [s.text for s in first.sources]
    json.dumps(two.to_dict())


def test_explain_compiles_afresh_and_tells_what_is_not_kept(caches):
    assert once() == {KEPT}
    found = gems_compile.explain(double_exp, rand(8, 16))
    assert found.graphs[0].nodes and "every process" not in str(found)
    numbers = [float(k) for k in range(20_000)]
    found = gems_compile.explain(lambda x: x * torch.tensor(numbers, device=x.device), rand(20_000))
    assert "Compiled anew by every process" in str(found)
    assert any("constant tensor of 80000 bytes" in fact for fact in found.why("cache"))
    assert len(entries(caches)) == 1
