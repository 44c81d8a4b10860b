"""``mode="max-autotune"``: other tiles are right, the fastest is taken, remembered, and told."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import DEVICE, check, gems_only, ints, rand
from torch import Tensor
from torch.nn import functional as F

from gems_compile.backend import Gems, lowering_options
from gems_compile.cache import cleared, held
from gems_compile.config import Config
from gems_compile.explain import Explanation
from gems_compile.kernels.target import INTERPRETER
from gems_compile.lowering import choices, progress, tune
from gems_compile.lowering.load import CompileError, Loading
from gems_compile.lowering.schedule import Tile
from gems_compile.lowering.trial import Hints, Trial, Untimed, places_read
from gems_compile.lowering.tune import best_of
from gems_compile.warm import tag

pytestmark = gems_only


class Fake:
    """Times kernels without running them: the one at ``place`` among a kernel's is the fastest."""

    def __init__(self, place: int) -> None:
        self.place, self.asked = place, list[str]()

    def __call__(self, kernels: Sequence[tuple[Any, Any]], places: Any) -> list[float]:
        self.asked.append(kernels[0][0].name)
        best = self.place % len(kernels)
        return [10.0 if k == best else 20.0 + k for k in range(len(kernels))]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[[int], Fake]:
    """Sets what times kernels; every kernel is worth it, and nothing is known yet."""
    monkeypatch.setattr(tune, "LEAST_US", 0.0)
    monkeypatch.setattr(tune, "LEAST_SHARE", 0.0)
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path))

    def use(place: int) -> Fake:
        """Another process, too: it knows what is on disk."""
        times = Fake(place)
        monkeypatch.setattr(choices, "_known", {})
        monkeypatch.setattr(tune, "timer", lambda device, number: times)
        return times

    return use


def compiled(fn: Callable[..., Any], *inputs: Any, seconds: float = 10, **kwargs: Any) -> list[Any]:
    """The reports of a compile that measures."""
    backend = Gems()
    torch._dynamo.reset()
    options = {"tune": True, "tune_seconds": seconds}
    run = torch.compile(fn, backend=backend, options=options, **kwargs)
    outputs = run(*inputs)
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if leaves:
        torch.autograd.grad(outputs, leaves, torch.ones_like(outputs))
    return list(backend.reports)


def gelu(x: Tensor, y: Tensor) -> Tensor:
    return F.gelu(x) * y


def rows_of_numbers(x: Tensor, s: Tensor) -> Tensor:
    return (x - s[:, None]).exp()


def transposed(x: Tensor, y: Tensor) -> Tensor:
    return (x.t() * 2 + y).contiguous()


def softmax(x: Tensor, y: Tensor) -> Tensor:
    return torch.softmax(x * y, -1)


def long_norm(x: Tensor, y: Tensor) -> Tensor:
    return F.layer_norm(x + y, x.shape[-1:])


def columns(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x * y
    return z.sum(0), z.amax(0)


def padded(x: Tensor) -> Tensor:
    return F.pad(torch.relu(x), (1, 1, 1, 1))


def gated(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([F.silu(x), y * 2], -1).exp()


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x + 1).max(-1)


def scanned(x: Tensor) -> Tensor:
    return (x + 1).cumsum(-1) * 2


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    return F.layer_norm(table[index] + 1, table.shape[-1:])


def norm_gradient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b)


def updates(x: list[Tensor], y: list[Tensor]) -> list[Tensor]:
    return [a * 0.9 + b.sqrt() for a, b in zip(x, y, strict=True)]


def _lists() -> list[Tensor]:
    return [rand(n).abs() for n in (5000, 3001, 70000)]


#: so many that a GPU's programs take steps, too
FEW, TALL = (600, 30000) if DEVICE == "cuda" else (3, 1100)
CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "flat": (gelu, lambda: (rand(130, 257), rand(130, 257))),
    "flat by rows": (rows_of_numbers, lambda: (rand(24, 1030), rand(24))),
    "flat carried": (padded, lambda: (rand(4, 9, 31, 31),)),
    "flat in pieces": (gated, lambda: (rand(64, 1024), rand(64, 2048))),
    "square": (transposed, lambda: (rand(200, 96), rand(96, 200))),
    "row": (softmax, lambda: (rand(37, 300), rand(37, 300))),
    "row argmax": (largest, lambda: (rand(37, 300),)),
    "row scan": (scanned, lambda: (rand(9, 700),)),
    "row gather": (looked_up, lambda: (rand(50, 96), ints(70, high=50))),
    "loop online": (softmax, lambda: (rand(FEW, 17001), rand(FEW, 17001))),
    "loop": (long_norm, lambda: (rand(FEW, 17000), rand(FEW, 17000))),
    "column": (columns, lambda: (rand(60, 100), rand(60, 100))),
    "column loop": (columns, lambda: (rand(TALL, 600).abs(), rand(TALL, 600).abs())),
    "flat together": (updates, lambda: (_lists(), _lists())),
    "sweep": (
        norm_gradient,
        lambda: (rand(700, 96, grad=True), rand(96, grad=True), rand(96, grad=True)),
    ),
}


@pytest.mark.parametrize("place", range(1, 8))
@pytest.mark.parametrize("name", CASES)
def test_every_tile_is_right(name: str, place: int, fake: Any) -> None:
    fn, make = CASES[name]
    times = fake(place)
    check(fn, *make(), options={"tune": True}, rtol=1e-4, atol=1e-4)
    assert times.asked


@pytest.mark.parametrize("name", CASES)
def test_each_kind_has_tiles_to_try(name: str, fake: Any) -> None:
    fn, make = CASES[name]
    fake(0)
    reports = compiled(fn, *make())
    kinds = {s.tiling.kind for r in reports for s in r.sources if s.tiling}
    kind = next(k for k in ("column loop", *name.split(" ")) if name.startswith(k))
    assert kind in kinds
    assert any(3 <= len(t.times) <= 8 for r in reports for t in r.tuned)


def only(reports: Sequence[Any]) -> Any:
    """What is told of the one kernel."""
    (fact,) = (t for r in reports for t in r.tuned)
    return fact


def test_sizes_that_are_symbolic(fake: Any) -> None:
    """The sizes of the first call are measured, and one choice serves all."""
    times = fake(2)
    check(softmax, rand(37, 300), rand(37, 300), options={"tune": True}, dynamic=True)
    assert times.asked
    fact = only(compiled(softmax, rand(37, 300), rand(37, 300), dynamic=True))
    assert fact.changed and fact.remembered


def test_equal_kernels_are_measured_once_and_all_changed(fake: Any) -> None:
    def layers(x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.softmax(x, -1) @ x.new_ones(40, 40)
        return x

    times = fake(1)
    check(layers, rand(30, 40), options={"tune": True}, grad=False)
    assert len(times.asked) == 1
    fake(1)
    (report,) = compiled(layers, rand(30, 40))
    assert only([report]).launches == 3 and report.kernels == 1


# what is chosen ----------------------------------------------------------------------------------


def test_another_tile_must_gain_much() -> None:
    a, b, c = Tile(1024), Tile(512), Tile(256)
    assert best_of([(a, 10.0), (b, 9.8), (c, 11.0)]) == a
    assert best_of([(a, 10.0), (b, 9.6), (c, 9.5)]) == c
    assert best_of([(a, 7.0), (b, 6.6)]) == a  # a clock's noise
    assert best_of([(a, 100.0), (b, 98.0)]) == a
    assert best_of([(a, 10.0)]) == a


def test_a_tile_that_fails_is_left_out(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(1)
    result, seen = Loading.result, []

    def fails(self: Loading) -> Any:
        seen.append(self.key)
        if len(seen) == 2:
            raise CompileError(self.source, "out of resources")
        return result(self)

    monkeypatch.setattr(Loading, "result", fails)
    fact = only(compiled(gelu, rand(130, 257), rand(130, 257)))
    assert fact.changed and [us for _, us in fact.times].count(None) == 1
    assert "failed" in str(fact)


def test_a_kernel_that_cannot_be_timed_stays(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def untimed(kernels: Any, places: Any) -> list[float]:
        raise Untimed("the GPU's memory is full")

    fake(1)
    monkeypatch.setattr(tune, "timer", lambda device, number: untimed)
    fact = only(compiled(gelu, rand(130, 257), rand(130, 257)))
    assert fact.why_not == "the GPU's memory is full" and not fact.changed


def test_measuring_that_fails_leaves_the_tiles(
    fake: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(kernels: Any, places: Any) -> list[float]:
        raise RuntimeError("the device is busy")

    fake(1)
    monkeypatch.setattr(tune, "timer", lambda device, number: fails)
    inputs = rand(130, 257), rand(130, 257)
    check(gelu, *inputs, options={"tune": True, "strict": False})
    assert "keeps its tiles: RuntimeError: the device is busy" in caplog.text
    with pytest.raises(Exception, match="the device is busy"):
        compiled(gelu, *inputs)


def test_the_seconds_are_kept(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that moves most comes first; the rest stay as they are."""

    def two(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(x, -1), y.cumsum(-1) * 2

    times, inputs = fake(1), (rand(40, 300), rand(90, 700))
    monkeypatch.setattr(tune.time, "monotonic", lambda: 13.0 * len(times.asked))
    (report,) = compiled(two, *inputs, seconds=12)
    done, left = report.tuned
    assert times.asked == [done.kernel] and "cumsum" in done.kernel
    assert left.why_not == "12 seconds were over"
    (report,) = compiled(two, *inputs, seconds=0)
    assert all(t.remembered == (t.kernel == done.kernel) for t in report.tuned)


def test_what_takes_no_time_is_not_measured(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = fake(1)
    monkeypatch.setattr(tune, "LEAST_US", 3.0)
    (report,) = compiled(gelu, rand(130, 257), rand(130, 257))
    assert not times.asked and not report.tuned


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(tune, "_told", set())
    with caplog.at_level("INFO", logger="gems_compile"):
        reports = [compiled(gelu, rand(130, 257), rand(130, 257))[0] for _ in range(2)]
    said = [r.getMessage() for r in caplog.records if "measured" in r.getMessage()]
    assert said == ["tiles are not measured: there is no GPU"]
    assert not any(r.tuned for r in reports)


class Clock(Trial):
    """A GPU whose kernels take ``us``; ``seen``: how often each was called."""

    def __init__(self, *us: float) -> None:
        self.us, self.seen = us, [0] * len(us)
        self.device, self.number = torch.device("cpu"), Hints({})

    def _memory(self, source: Any, places: Any) -> Any:
        return {}

    def _call(self, source: Any, launch: Any, memory: Any) -> Any:
        return launch

    def _rounds(self, calls: Any, rounds: int) -> dict[int, float]:
        for k in calls:
            self.seen[k] += rounds
        return {k: self.us[k] for k in calls}


def test_those_that_are_near_are_measured_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that would be taken, and the scheduled one, the longest."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    clock = Clock(10.0, 9.0, 9.5, 20.0)
    kernels = [(None, lambda: None)] * 4
    assert clock.times(kernels, {}) == [10.0, 9.0, 9.5, 20.0]
    assert clock.seen == [60, 60, 20, 5]


def test_what_the_gpu_does_not_take_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many() -> None:
        raise RuntimeError("too many resources requested for launch")

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    clock = Clock(10.0, 9.0)
    assert clock.times([(None, lambda: None), (None, too_many)], {}) == [10.0, float("inf")]
    with pytest.raises(Untimed, match="cannot be launched"):
        clock.times([(None, too_many), (None, lambda: None)], {})


# contents of memory ------------------------------------------------------------------------------


def test_places_are_in_range(fake: Any) -> None:
    """Numbers that say where a kernel reads are numbers of places that there are."""
    fake(0)
    (report,) = compiled(looked_up, rand(50, 96), ints(70, high=50))
    (source,) = (s for s in report.sources if s.tiling is not None)
    ((index, places),) = places_read(source, source.body.group.members, Hints({})).items()
    assert index.dtype == "int64" and places == 50


def test_computed_places_are_not_tried(fake: Any) -> None:
    """Nobody knows which contents would make them places that there are."""
    times = fake(0)
    fact = only(compiled(lambda t, i: t[i * 2 - 1] + 1, rand(50, 96), ints(70, high=20, low=1)))
    assert fact.why_not == "it computes where it reads" and not times.asked


def test_written_places_are_not_tried(fake: Any) -> None:
    """Of zeros, all would be one place."""

    def fn(t: Tensor, i: Tensor, x: Tensor) -> None:
        t.index_add_(0, i, x * 2)

    times = fake(0)
    torch.use_deterministic_algorithms(False)  # else it is ATen's
    with torch.no_grad():
        (report,) = compiled(fn, rand(50, 96), ints(70, high=50), rand(70, 96))
    assert only([report]).why_not == "it writes where its operands say" and not times.asked


def test_places_that_another_kernel_knows_do_not_matter(fake: Any) -> None:
    """What was read at computed places lies in memory."""

    def fn(t: Tensor, i: Tensor, w: Tensor) -> Tensor:
        return torch.softmax((t[i * 2 - 1] + 1) @ w, -1) * 2

    fake(0)
    inputs = rand(50, 96), ints(70, high=20, low=1), rand(96, 96)
    (report,) = compiled(fn, *inputs)
    assert [bool(t.why_not) for t in report.tuned].count(False) == 1


# what is remembered ------------------------------------------------------------------------------


def test_a_choice_is_remembered(fake: Any) -> None:
    inputs = rand(130, 257), rand(130, 257)
    fake(3)
    first = only(compiled(gelu, *inputs))
    times = fake(1)
    again = only(compiled(gelu, *inputs))
    assert first.changed and not first.remembered
    assert again.remembered and not times.asked
    assert (again.chosen, again.times) == (first.chosen, first.times)
    compiled(gelu, *(x[:120] for x in inputs))
    assert times.asked == ["fused_gelu_mul"]  # there is less to do


def test_the_command_shows_and_removes_choices(fake: Any) -> None:
    fake(1)
    compiled(gelu, rand(130, 257), rand(130, 257))
    assert [f["count"] for f in held() if f["what"].startswith("tiles")] == [1]
    cleared()
    assert not [f for f in held() if f["what"] != "whole graphs"]


def test_whole_graphs_of_other_modes_are_others() -> None:
    tags = set()
    for mode in ("default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"):
        config = Config.from_call(mode)
        tags.add(tag(config, lowering_options(config, INTERPRETER), []))
    assert len(tags) == 4


def test_what_was_measured_is_told(fake: Any) -> None:
    fake(1)
    backend = Gems()
    torch.compile(gelu, backend=backend, options={"tune": True})(rand(130, 257), rand(130, 257))
    text = str(Explanation.of(backend, "gelu"))
    assert "Tiles of kernels, measured" in text and "fused_gelu_mul: " in text


def test_one_line_of_the_log_says_what_was_done(
    fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake(1)
    with caplog.at_level("INFO", logger="gems_compile"):
        compiled(gelu, rand(130, 257), rand(130, 257))
    (line,) = (r.getMessage() for r in caplog.records if r.name.endswith("tune"))
    assert "measured the tiles of 1 of 1 kernels in " in line and line.endswith("; 1 changed")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_is_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress.sys, "stderr", Terminal(terminal))
    with progress.Progress(2) as bar:
        bar.step("fused_softmax")
        assert (bar.bar is not None) is terminal
    assert bool(progress.sys.stderr.getvalue()) is terminal


class Terminal(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


# on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_measured_kernels_are_right(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(tune, "LEAST_US", 0.0)
    monkeypatch.setattr(tune, "LEAST_SHARE", 0.0)
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path))
    fn, make = CASES[name]
    check(fn, *make(), mode="max-autotune-no-cudagraphs", rtol=1e-4, atol=1e-4)
    facts = [t for r in compiled(fn, *make()) for t in r.tuned]
    assert facts and all(t.remembered and not t.why_not for t in facts)
    assert all(us is None or 0 < us < 1e4 for t in facts for _, us in t.times)


@pytest.mark.gpu
def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Neither in memory nor in the state of torch's generators."""
    monkeypatch.setattr(tune, "LEAST_US", 0.0)
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path))
    inputs = rand(4096, 1024), rand(4096, 1024)
    state = torch.cuda.get_rng_state()
    before = torch.cuda.memory_allocated()
    compiled(gelu, *inputs)
    assert torch.cuda.memory_allocated() <= before + 2**16
    assert torch.equal(state, torch.cuda.get_rng_state())
