"""Run on a GPU when there is one, else through Triton's interpreter; `torch.empty` holds NaN."""

import os

import torch

if not torch.cuda.is_available():
    # triton reads it once, when it is first imported, and torch._dynamo imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import atexit
import importlib.util
import shutil
import tempfile

import pytest

os.environ.setdefault("GEMS_STRICT", "1")
os.environ.setdefault(
    "GEMS_CACHE", "0"
)  # tests look at what was compiled; test_warm.py turns it on
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# xdist's workers inherit the first process's folders; no test meets another day's entries
for folder in ("GEMS_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
    if folder not in os.environ:
        os.environ[folder] = tempfile.mkdtemp(prefix="gems-tests-")
        atexit.register(shutil.rmtree, os.environ[folder], ignore_errors=True)

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("gems_compile"):
    try:
        interpreter = importlib.import_module("gems_compile.kernels.interpreter")
    except ModuleNotFoundError as missing:
        if missing.name != "gems_compile.kernels.interpreter":
            raise
    else:
        interpreter.repair()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gems")
    what = "one sample of each of torch's ops, in three dtypes"
    group.addoption("--quick", action="store_true", help=what)
    what = "where eager mode is compared with ATen: on the same device (default), or on the CPU"
    group.addoption("--ref", choices=("device", "cpu"), default="device", help=what)
    what = "sizes are arguments of eager mode's kernels from the first call on"
    group.addoption("--any-sizes", action="store_true", help=what)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--any-sizes"):
        importlib.import_module("gems_compile.calls.varying").OWN_SIZES = 0
    # what is collected depends on them, so the modules of tests ask when they are imported
    if config.getoption("--quick"):
        os.environ["GEMS_TEST_QUICK"] = "1"
    os.environ.setdefault("GEMS_TEST_REF", config.getoption("--ref"))
    for text in (
        "ignore:.*does not have a deterministic implementation.*:UserWarning",
        "ignore:.*Deterministic behavior was enabled.*:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_state():
    """No compiled code and no random state of an earlier test; memory nobody wrote reads as NaN.

    Convolutions of float32 are computed in float32: in TF32 two layouts of one differ by 1e-3.
    `fill_uninitialized_memory` works below Python (so for `empty_strided` and `new_empty` of any
    caller), but only while deterministic algorithms are on.
    """
    torch._dynamo.reset()
    _compile_nested_frames()
    torch.manual_seed(0)
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_deterministic_debug_mode(before)


def _compile_nested_frames() -> None:
    """torch keeps one switch for all threads that leaves frames below a graph break to Python while
    a function of fullgraph=True runs; two threads that call such functions can leave it on."""
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_eval_frame_override"):  # torch 2.11
        frames.set_eval_frame_override(torch._dynamo.eval_frame._EvalFrameOverride.NONE)


@pytest.fixture(autouse=True)
def _poisoned_results(monkeypatch):
    """What our executor allocates reads as NaN until a kernel writes it: its allocator is torch's
    guard-level one, which knows no `fill_uninitialized_memory`."""
    try:
        from opcheck import poisoned

        from gems_compile.lowering import private
    except ImportError:  # another backend stands in
        return
    if not torch.cuda.is_available():
        monkeypatch.setattr(private, "allocator", poisoned)


@pytest.fixture(autouse=True)
def _nothing_served(monkeypatch):
    """Ops of ours called in eager mode are ATen's, which kernels are compared with, although some
    file of tests has imported `gems_compile.llm`. The tests of that serve them."""
    try:
        from gems_compile.kernels import served
    except ImportError:  # another backend stands in
        return
    monkeypatch.setattr(served, "_server", None)


@pytest.fixture(autouse=True)
def _nothing_taken_over_wrongly(monkeypatch):
    """A source taken over from a kernel alike is what would have been written, in every test."""
    try:
        from gems_compile.lowering.alike import Alike
    except ImportError:  # another backend stands in
        yield
        return
    taken_over, wrong = Alike.source, []

    def source(self, group, write):
        found = taken_over(self, group, write)
        if found.like is not None and _all_of(found) != _all_of(write(group)):
            wrong.append(found.commented)
        return found

    monkeypatch.setattr(Alike, "source", source)
    yield
    assert not wrong


def _all_of(source):
    head = (source.name, source.params, source.grid, source.meta, source.text, source.commented)
    if source.body is None:  # of a kernel that is written as a whole
        return head
    steps = {
        section: [(i.kind, i.out, i.text, i.indices, i.cond, i.dtype, i.wide) for i in instrs]
        for section, instrs in source.body.sections.items()
    }
    return (*head, source.body.params, steps)


@pytest.fixture(autouse=True)
def _nothing_replayed_wrongly(monkeypatch):
    """Groups that are made again are like those that were found, in every test."""
    try:
        from gems_compile.lowering.replay import Groups
    except ImportError:  # another backend stands in
        yield
        return
    make, wrong = Groups.make, []

    def told(groups):
        return {**vars(groups), "groups": [vars(group) for group in groups.groups]}

    def made_and_checked(self, stretch):
        make(self, stretch)
        if told(Groups(stretch)) != told(self):
            wrong.append(stretch.values)

    monkeypatch.setattr(Groups, "make", made_and_checked)
    yield
    assert not wrong


@pytest.fixture(autouse=True)
def _nothing_repeated_wrongly(monkeypatch):
    """A composite op that follows a recipe is what taking it apart makes, in every test."""
    try:
        from gems_compile.lowering.repeats import Repeats
    except ImportError:  # another backend stands in
        yield
        return
    made, wrong = Repeats.made, []

    def made_and_checked(self, op, args, values, make):
        begin = len(values)
        result = made(self, op, args, values, make)
        end = len(values)
        again = make()
        mine, others = values[begin:end], values[end:]
        del values[end:]
        if _steps(args, mine, result) != _steps(args, others, again):
            wrong.append(op.name)
        return result

    monkeypatch.setattr(Repeats, "made", made_and_checked)
    yield
    assert not wrong


def _steps(args, values, result):
    """What the values are, with those made among them named by their order."""
    from gems_compile.lowering.ir import Value
    from gems_compile.lowering.views import View

    places = {v: k for k, v in enumerate(values)}

    def named(what):
        if isinstance(what, (tuple, list)):
            return tuple(map(named, what))
        if isinstance(what, View):
            return what.key
        if isinstance(what, Value):
            return ("value", places.get(what, what.id))
        return (type(what), getattr(what, "expr", what))

    steps = [
        (v.kind, v.op, named(v.args), named(v.params), v.shape, v.dtype, v.strides, v.node)
        for v in values
    ]
    return steps, named(result)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The cache of whole graphs is on, and empty; torch's folder.

    So are the kernels': other tests must not meet what is marked as useless there, nor this one
    what they have loaded.
    """
    monkeypatch.setattr("gems_compile.lowering.load._launchers", {})
    monkeypatch.setenv("GEMS_CACHE", "1")
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path / "gems"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    torch._dynamo.utils.counters["aot_autograd"].clear()
    return tmp_path / "torch"


@pytest.fixture
def trees(monkeypatch):
    """What captures CUDA graphs, or what stands for it."""
    from fake_graphs import watched

    yield from watched(monkeypatch)
