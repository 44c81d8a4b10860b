"""The page of an explanation in a headless Chromium: it opens at once, moves, searches, and answers
to clicks. Where there is none the tests are skipped; `make page-test` runs these and test_page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import browser
import pytest
from helpers import BACKEND, gems_only

if BACKEND == "gems":
    from explanations import hostile, large, small

    from gems_compile.explain import Explanation
    from gems_compile.insight.summary import GraphSummary

pytestmark = gems_only


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[browser.Browser]:
    if browser.find() is None:
        pytest.skip("no Chromium on this machine")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


PLACE = """(k => {
  const [x, y] = graph().boxes[k].at, at = canvas.getBoundingClientRect();
  return [at.left + (x + 20 - view.x) * view.scale, at.top + (y + 10 - view.y) * view.scale];
})"""
PANEL = "document.getElementById('panel').textContent"
PAN = """(async () => {
  const start = performance.now();
  for (let k = 0; k < 30; k++) { pan(3, 1); await new Promise(requestAnimationFrame); }
  return (performance.now() - start) / 30;
})()"""


def quiet(chromium: browser.Browser) -> bool:
    """No error, and nothing was asked for but the file."""
    assert chromium.errors == []
    return all(url.startswith(("file:", "about:")) for url in chromium.requests)


def test_5000_nodes_open_within_three_seconds_and_move_at_once(chromium, tmp_path) -> None:
    large().to_html(tmp_path / "page.html")
    assert chromium.open(tmp_path / "page.html") < 3
    assert int(chromium.eval("document.documentElement.dataset.ready")) < 3000
    milliseconds = chromium.eval(PAN)
    assert milliseconds < 100, f"a frame takes {milliseconds:.0f} ms"
    assert quiet(chromium)


def test_a_click_on_a_box_shows_it_and_escape_closes_it(chromium, tmp_path) -> None:
    small().to_html(tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    chromium.click(*chromium.eval(f"{PLACE}(0)"))
    shown = chromium.eval(PANEL)
    assert "fused_add_gelu" in shown and "step 0 of 4" in shown and "def fused_add_gelu" in shown
    assert "gelu = gelu(add)" in shown and "250 B (63% of eager's)" in shown
    assert chromium.eval("location.hash") == "#step=0"
    marked = (
        "[...document.querySelectorAll('pre .k, pre .c, pre .d, pre .n')].map(e => e.textContent)"
    )
    words = ["import", "@triton.jit", "def", "fused_add_gelu", '# "why"', "return", "1.5"]
    assert chromium.eval(marked) == words
    chromium.click(*chromium.eval(f"{PLACE}(1)"))
    assert "matrix products are left to the vendor's library" in chromium.eval(PANEL)
    chromium.key("Escape")
    assert chromium.eval(PANEL).startswith("graph 0 inference")
    assert quiet(chromium)


def test_the_pointer_over_a_box_or_the_strip_tells_what_is_there(chromium, tmp_path) -> None:
    small().to_html(tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    chromium.mouse("Moved", *chromium.eval(f"{PLACE}(1)"))
    told = "$('tip').hidden ? '' : $('tip').innerText"
    assert chromium.eval(told).split("\n") == ["1 mm", "f32[4, 8] \u2192 f32[4, 8]", "layers.0.up"]
    chromium.mouse("Moved", 5, 5)
    assert chromium.eval(told) == ""
    left, top = chromium.eval("(r => [r.left + 20, r.top + 20])(strip.getBoundingClientRect())")
    chromium.mouse("Moved", left, top)
    assert chromium.eval(told).startswith("0 fused_add_gelu")
    chromium.mouse("Wheel", left, top, deltaX=0, deltaY=-300)
    chromium.wait(lambda: chromium.eval("span.to") < 1)
    for colour in ("saved", "cost", "kernel"):
        chromium.eval(f"$('colour').value = '{colour}', $('colour').onchange()")
        chromium.frame()
    assert quiet(chromium)


def test_wheel_drag_and_keys_move_the_view(chromium, tmp_path) -> None:
    small().to_html(tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    scale, x = chromium.eval("[view.scale, view.x]")
    chromium.mouse("Wheel", 300, 300, deltaX=0, deltaY=-200)
    chromium.wait(lambda: chromium.eval("view.scale") > scale)
    x = chromium.eval("view.x")
    chromium.drag((300, 620), (240, 620))
    assert chromium.eval("view.x") > x
    chromium.key("0", "0")
    assert chromium.eval("view.scale") == scale
    chromium.eval("canvas.focus()")
    x = chromium.eval("view.x")
    chromium.key("ArrowRight")
    assert chromium.eval("view.x") > x
    chromium.key("j", "j")
    chromium.key("j", "j")
    assert chromium.eval("location.hash") == "#step=1"


def test_a_search_marks_counts_and_goes_from_match_to_match(chromium, tmp_path) -> None:
    large().to_html(tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    chromium.key("/", "/")
    chromium.type("LAYERS.3.block.mlp")
    assert chromium.eval("$('found').textContent") == "10"
    chromium.key("Enter")
    chromium.key("Enter")
    assert chromium.eval("$('found').textContent") == "2 of 10"
    assert chromium.eval("[state.step, inSight(state.step)]") == [71, True]
    assert chromium.eval("location.hash") == "#search=LAYERS.3.block.mlp&step=71"
    chromium.open(tmp_path / "page.html", "#search=model.py:4&step=24&tab=saved")
    shown = chromium.eval("[state.matches.size, state.step, $('table-view').hidden]")
    assert shown == [50, 24, False]


def test_tables_fold_and_a_row_goes_from_call_to_call(chromium, tmp_path) -> None:
    small().to_html(tmp_path / "page.html")
    chromium.open(tmp_path / "page.html", "#tab=saved")
    rows = chromium.eval("[...document.querySelectorAll('tbody tr')].map(r => r.innerText)")
    assert len(rows) == 2 and "\u00d72" in rows[0] and "fused_mul" in rows[0]
    seen = []
    for _ in range(3):
        chromium.eval("document.querySelector('tbody tr').click()")
        seen.append(chromium.eval("state.step"))
    assert seen == [2, 3, 2]
    for tab, words in {
        "aten": "matrix products",
        "unfused": "too wide",
        "rewrites": "silu is also read by mul",
        "dynamo": "x changed",
        "notes": "None.",
    }.items():
        chromium.eval(f"$('tab-{tab}').click()")
        assert words in chromium.eval("$('table-view').textContent")
    assert quiet(chromium)


def test_a_rewrite_s_nodes_before_and_after_stand_side_by_side(chromium, tmp_path) -> None:
    small().to_html(tmp_path / "page.html")
    told = "[...document.querySelectorAll('.rewrite')].map(e => e.innerText.split('\\n'))"
    corners = """[...document.querySelector('.sides').children].map(e => {
        const r = e.getBoundingClientRect(), colours = getComputedStyle(e.querySelector('pre'));
        return [r.left, r.top, colours.color, colours.backgroundColor];
    })"""
    colours = set()
    for theme in ("light", "dark"):
        chromium.open(tmp_path / "page.html", f"#tab=rewrites&theme={theme}")
        layers, other = chromium.eval(told)
        assert layers[0] == "attention \u00d72" and "model.py:9 z" in layers
        assert "layers.0 layers.1" in " ".join(layers)
        assert layers[-5:] == [
            "before: 2 nodes",
            "p = torch.softmax(s, -1)  # f32[4, 8]",
            "o = torch.matmul(p, v)",
            "after: 1 node",
            "a = sdpa(q)",
        ]
        assert other[0].strip() == "attention" and other[-1] == "after: 1 node"
        (left, top, *one), (right, level, *two) = chromium.eval(corners)
        assert left < right and top == level and one == two
        colours.add(tuple(one))
    assert len(colours) == 2
    chromium.eval("document.querySelector('.rewrite .link').click()")
    assert chromium.eval("[state.tab, state.query, state.step]") == ["graph", "layers.0", 0]
    assert quiet(chromium)


def test_on_a_narrow_page_the_chosen_tab_is_in_sight(chromium, tmp_path) -> None:
    small().to_html(tmp_path / "page.html")
    sizes = {"height": 800, "deviceScaleFactor": 1, "mobile": False}
    chromium.call("Emulation.setDeviceMetricsOverride", width=700, **sizes)
    ends = "(r => [r.left, r.right])($('%s').getBoundingClientRect())"
    try:
        for tab in ("graph", "notes"):
            chromium.open(tmp_path / "page.html", f"#tab={tab}")
            left, right = chromium.eval(ends % "tabs")
            first, last = chromium.eval(ends % f"tab-{tab}")
            assert left - 1 <= first < last <= right + 1
        assert chromium.eval("$('tabs').scrollLeft") > 0
    finally:
        chromium.call("Emulation.setDeviceMetricsOverride", width=1280, **sizes)


def test_recompiles_and_breaks_are_a_tab_where_there_are_any(chromium, tmp_path) -> None:
    explanation = small()
    explanation.to_html(tmp_path / "page.html")
    chromium.open(tmp_path / "page.html", "#tab=dynamo")
    rows = chromium.eval("[...document.querySelectorAll('tbody tr')].map(r => r.innerText)")
    for words in ("step", "model.py:3 x", "x changed", "guard: x == 2", "pass one x", "graph 0"):
        assert words in rows[0]
    assert "step, behind line 4\n" in rows[1] and "graph 7" in rows[1]
    assert "model.py:4 print(x)" in rows[2] and "\u00d72" in rows[2]
    chromium.eval("document.querySelector('td .link').click()")
    assert chromium.eval("[state.tab, $('panel').querySelector('h2').textContent]") == [
        "graph",
        "graph 0 inference",
    ]
    quieter = replace(explanation, breaks={}, break_lines={}, recompiles=())
    quieter.to_html(tmp_path / "page.html")
    chromium.open(tmp_path / "page.html", "#tab=dynamo")
    assert chromium.eval("[state.tab, document.getElementById('tab-dynamo')]") == ["graph", None]
    replace(quieter, gave_up=2).to_html(tmp_path / "page.html")
    chromium.open(tmp_path / "page.html", "#tab=dynamo")
    assert "2 functions had been compiled too often" in chromium.eval("$('table-view').textContent")
    assert quiet(chromium)


def test_hostile_texts_stay_texts(chromium, tmp_path) -> None:
    hostile().to_html(tmp_path / "page.html")
    for tab in ("graph", "saved", "aten", "unfused", "rewrites", "dynamo", "notes"):
        for step in range(4):
            chromium.open(tmp_path / "page.html", f"#tab={tab}&step={step}")
            assert chromium.eval("document.querySelectorAll('img, script').length") == 2
            assert chromium.eval("document.title") != "owned"
    assert "onerror" in chromium.eval(PANEL)
    assert quiet(chromium)


def test_the_page_follows_the_system_s_scheme_until_told(chromium, tmp_path) -> None:
    small().to_html(tmp_path / "page.html")
    theme = "document.documentElement.dataset.theme"
    for scheme in ("dark", "light"):
        chromium.scheme(scheme)
        chromium.open(tmp_path / "page.html")
        assert chromium.eval(theme) == scheme
    chromium.eval("$('theme').click()")
    assert chromium.eval(f"[{theme}, location.hash]") == ["dark", "#theme=dark"]


def test_a_page_of_no_graph_and_one_of_a_graph_without_calls_open(chromium, tmp_path) -> None:
    graph = GraphSummary(0, "inference", counted={"nodes": 3, "launches": 2, "aten_calls": 0})
    for graphs, words in (((), "Nothing was compiled"), ((graph,), "calls of this graph")):
        Explanation("f", "none", graphs).to_html(tmp_path / "page.html")
        chromium.open(tmp_path / "page.html")
        assert words in chromium.eval("document.querySelector('#nothing').innerText")
        for key in "j0+/":
            chromium.key(key, key)
        assert quiet(chromium)


def test_times_are_shown_to_scale(chromium, tmp_path) -> None:
    small().to_html(tmp_path / "page.html", {"graph 0 inference": [4.0, 90.0, 4.0, 2.0]})
    chromium.open(tmp_path / "page.html")
    assert chromium.eval("$('strip-title').textContent") == "One run: 100 \u00b5s"
    left, width, top = chromium.eval(
        "(r => [r.left + 12, r.width - 24, r.top + r.height / 2])(strip.getBoundingClientRect())"
    )
    chromium.click(left + 0.5 * width, top)  # within the ninety of a hundred that mm takes
    assert chromium.eval("state.step") == 1
    assert "90.0 \u00b5s" in chromium.eval(PANEL)
