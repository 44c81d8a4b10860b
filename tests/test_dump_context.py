"""`gems_compile.dump(folder)`, what a dump says of its options, and layers that are shown once."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from helpers import BACKEND, DEVICE, gems_only, rand
from torch import nn

if BACKEND == "gems":
    import gems_compile
    from gems_compile import dumping
    from gems_compile.backend import Gems
    from gems_compile.config import Config, told
    from gems_compile.errors import OptionError
    from gems_compile.insight.layers import Stretch, stretches
    from gems_compile.insight.plan import in_bytes

pytestmark = gems_only


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch) -> None:
    monkeypatch.delenv("GEMS_DUMP", raising=False)
    monkeypatch.setattr(dumping, "_everywhere", None)


def compiled(fn, **kwargs):
    return torch.compile(fn, backend=Gems(), **kwargs)


def folder_of() -> str | None:
    return Config.from_call().dump


# which folder ------------------------------------------------------------------------------------


def test_a_block_dumps_what_is_compiled_in_it(tmp_path: Path) -> None:
    x = rand(3, 4)
    with gems_compile.dump(tmp_path) as folder:
        assert folder == str(tmp_path)
        compiled(lambda x: x.sin() + 1)(x)
    compiled(lambda x: x.cos() + 1)(x)
    (graph,) = tmp_path.iterdir()
    assert "sin" in (graph / "plan.txt").read_text()


def test_blocks_nest_and_an_exception_leaves_them(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with gems_compile.dump(one):
        with gems_compile.dump(two):
            assert folder_of() == str(two)
        with gems_compile.dump(None):
            assert folder_of() is None
        with pytest.raises(KeyError), gems_compile.dump(two):
            raise KeyError
        assert folder_of() == str(one)
    assert folder_of() is None


def test_a_call_alone_holds_until_the_next(tmp_path: Path) -> None:
    gems_compile.dump(tmp_path)
    assert folder_of() == str(tmp_path)
    with gems_compile.dump(tmp_path / "inner"):
        assert folder_of() == str(tmp_path / "inner")
    assert folder_of() == str(tmp_path)
    gems_compile.dump(None)
    assert folder_of() is None


def test_one_object_is_entered_again(tmp_path: Path) -> None:
    block = gems_compile.dump(tmp_path)
    for _ in range(2):
        with block, block:
            assert folder_of() == str(tmp_path)
        assert folder_of() is None


def test_what_goes_before_what(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GEMS_DUMP", str(tmp_path / "variable"))
    assert folder_of() == str(tmp_path / "variable")
    with gems_compile.dump(tmp_path / "block"):
        assert folder_of() == str(tmp_path / "block")
        given = Config.from_call(options={"dump": tmp_path / "option"})
        assert given.dump == str(tmp_path / "option")
        assert Config.from_call(options={"dump": None}).dump is None
    with gems_compile.dump(None):
        assert folder_of() is None


def test_a_block_holds_in_its_thread_and_a_call_in_all(tmp_path: Path) -> None:
    def elsewhere() -> str | None:
        found: list[str | None] = []
        thread = threading.Thread(target=lambda: found.append(folder_of()))
        thread.start()
        thread.join()
        return found[0]

    with gems_compile.dump(tmp_path):
        assert elsewhere() is None
    gems_compile.dump(tmp_path)
    assert elsewhere() == str(tmp_path)


def test_many_threads_at_once(tmp_path: Path) -> None:
    wrong: list[str | None] = []
    start = threading.Barrier(4)

    def work(name: str) -> None:
        start.wait()
        for k in range(200):
            with gems_compile.dump(tmp_path / name / str(k)):
                if folder_of() != str(tmp_path / name / str(k)):
                    wrong.append(folder_of())

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_path_is_the_users_mistake() -> None:
    with pytest.raises(OptionError, match="option 'dump' is 7; valid: a folder's path, None"):
        gems_compile.dump(7)
    assert folder_of() is None


# what it says ------------------------------------------------------------------------------------


def test_each_option_says_where_it_came_from(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GEMS_RNG", "eager")
    with gems_compile.dump(tmp_path):
        compiled(lambda x: x.sin() + 1, options={"numerics": "fast", "max_autotune": False})(
            rand(3, 4)
        )
    (graph,) = tmp_path.iterdir()
    found = json.loads((graph / "options.json").read_text())
    options = found["options"]
    assert options["numerics"] == {"value": "fast", "from": "options"}
    assert options["tune"] == {"value": False, "from": "options"}
    assert options["rng"] == {"value": "eager", "from": "GEMS_RNG"}
    assert options["layout"] == {"value": "auto", "from": "default"}
    assert options["dump"] == {"value": str(tmp_path), "from": "gems_compile.dump"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() >= {"gems-compile", "triton", "python", "system"}
    assert found["target"] == gems_compile.backend.current_target().label
    assert found["driver"]


def test_a_mode_is_where_its_options_came_from() -> None:
    mode = "max-autotune-no-cudagraphs"
    found = told(Config.from_call(mode), mode)
    assert found["tune"] == {"value": True, "from": f"mode {mode}"}
    assert found["cudagraphs"]["from"] == f"mode {mode}"
    assert found["strict"]["from"] in ("default", "GEMS_STRICT")


def test_stages_and_caches_are_in_the_report(tmp_path: Path) -> None:
    x = rand(3, 4, grad=True)
    with gems_compile.dump(tmp_path):
        fn = compiled(lambda x: (x.sin() * 2).softmax(-1), options={"cache": True})
        fn(x).sum().backward()
    for kind in ("forward", "backward"):
        report = json.loads((tmp_path / f"graph_00_{kind}/report.json").read_text())
        stages = {"Dynamo", "rewrites", "AOTAutograd", "passes", "fuse", "emit", "triton", "bind"}
        assert report["timings"].keys() >= stages
        assert all(0 <= seconds < 600 for seconds in report["timings"].values())
        assert report["caches"]["graph"] == "off: a dump shows every stage of a compile"
        assert report["cache"] == report["caches"]["graph"]
        kernels = report["caches"]["kernels"]
        assert kernels.keys() == report["sources"].keys() and kernels
        for said in kernels.values():
            assert said == "interpreted" or said.startswith(("hit", "miss: "))


def test_equal_layers_are_printed_once(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            return x + torch.nn.functional.gelu(self.linear(self.norm(x)))

    model = nn.Sequential(*(Layer() for _ in range(6))).to(DEVICE)
    with torch.no_grad(), gems_compile.dump(tmp_path):
        compiled(model)(rand(4, 8))
    graph = tmp_path / "graph_00_inference"
    calls = json.loads((graph / "report.json").read_text())["calls"]
    products = [c for c in calls if c["name"] == "addmm"]
    assert len(products) == 6  # the data has all
    plan = (graph / "plan.txt").read_text()
    assert "\nx5  steps 1 to 2, and so on to step 10: reads " in plan
    assert plan.count(" aten   addmm") == 2
    assert "in 0.linear, 1.linear, 2.linear, 3.linear ..." in plan
    product = products[0]
    moved = f"[reads {product['read']} B, writes {product['written']} B, saves 0 B]"
    assert plan.count(moved) == 2
    saved = sum(c["eager"] - c["read"] - c["written"] for c in calls)
    assert f"saves {in_bytes(saved)}" in plan.splitlines()[2]


def test_few_equal_steps_are_printed_each(tmp_path: Path) -> None:
    with gems_compile.dump(tmp_path):
        w = rand(8, 8)
        compiled(lambda x, v, w: (x @ v, x @ w))(rand(4, 8), rand(8, 8), w)
    plan = (tmp_path / "graph_00_inference/plan.txt").read_text()
    assert plan.count(" aten   mm") == 2
    assert "\nx2" not in plan


def test_equal_steps_have_all_of_their_lines(tmp_path: Path) -> None:
    def fn(x, w):
        a = x @ w
        b = x @ (w * 2)
        c = x @ (w * 3)
        d = x @ (w * 4)
        return a, b, c, d

    with gems_compile.dump(tmp_path):
        compiled(fn)(rand(4, 8), rand(8, 8))
    plan = (tmp_path / "graph_00_inference/plan.txt").read_text()
    for line in ("a = x @ w", "b = x @ (w * 2)", "c = x @ (w * 3)", "d = x @ (w * 4)"):
        assert f"  {line}\n" in plan


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("a", [(0, 1, 1)]),
        ("abc", [(0, 3, 1)]),
        ("aaaa", [(0, 1, 4)]),
        ("abcbcbcd", [(0, 1, 1), (1, 2, 3), (7, 1, 1)]),
        ("aabaabaab", [(0, 3, 3)]),
        ("aabcaabcx", [(0, 4, 2), (8, 1, 1)]),
        ("xaab", [(0, 1, 1), (1, 1, 2), (3, 1, 1)]),
        ("abab" + "z" + "cdcd", [(0, 2, 2), (4, 1, 1), (5, 2, 2)]),
        ("abababa", [(0, 2, 3), (6, 1, 1)]),
    ],
)
def test_stretches(text: str, found: list[tuple[int, int, int]]) -> None:
    assert stretches(text) == [Stretch(*facts) for facts in found]


def test_stretches_cover_everything_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        length = int(torch.randint(0, 40, (), generator=generator))
        keys = torch.randint(0, 3, (length,), generator=generator).tolist()
        whole: list[int] = []
        for s in stretches(keys):
            assert s.start == len(whole)
            whole += keys[s.start : s.start + s.length] * s.times
        assert whole == keys


def test_bytes_in_words() -> None:
    counts = (0, 1023, 1024, 1536, -2048, 5 * 2**20, 3 * 2**30, 2**41)
    words = ["0 B", "1023 B", "1.0 KB", "1.5 KB", "-2.0 KB", "5.0 MB", "3.0 GB", "2.0 TB"]
    assert [in_bytes(count) for count in counts] == words
