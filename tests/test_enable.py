"""enable(), disable(), use_gems(), ops: what is replaced when, by which name, and told to whom."""

from __future__ import annotations

import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eagercheck import every_op, nothing_left, ours, same, whys  # noqa: F401
from helpers import DEVICE, assert_same, rand
from opcheck import overload

import gems_compile
from gems_compile import eager
from gems_compile.calls import one_op, varying
from gems_compile.calls.attention import ATTENTION
from gems_compile.calls.counting import SIZED
from gems_compile.errors import UnknownOp
from gems_compile.kernels.composed import COMPOSED
from gems_compile.kernels.draws import DRAWS
from gems_compile.kernels.factories import FACTORIES
from gems_compile.kernels.op import OPS
from gems_compile.kernels.target import current_target

x = lambda *shape, **kw: rand(*shape, grad=True, **kw)  # noqa: E731
KEY = "CUDA" if DEVICE == "cuda" else "CPU"

#: what a name stands for: all overloads of it
EXP, GELU = ("exp", "exp.out"), ("gelu", "gelu.out")

# what is on --------------------------------------------------------------------------------------


def test_enable_and_disable() -> None:
    a = rand(4)
    gems_compile.enable(only=["gelu", "add.Tensor"])
    assert gems_compile.enabled_ops() == ("add.Tensor", *GELU)
    F.gelu(a)
    assert ours("gelu") == 1
    gems_compile.enable(only="gelu")  # the last selection counts
    assert gems_compile.enabled_ops() == GELU
    gems_compile.disable()
    gems_compile.disable()
    assert gems_compile.enabled_ops() == ()
    F.gelu(a)
    assert ours("gelu") == 1


def test_the_default_can_be_narrowed() -> None:
    gems_compile.enable()
    on = gems_compile.enabled_ops()
    assert "_softmax" in on and "native_layer_norm" in on
    gems_compile.enable(exclude=["softmax", "gelu"])
    dropped = {"_softmax", "_softmax.out", *GELU} & set(on)
    assert set(on) - set(gems_compile.enabled_ops()) == dropped


def test_atens_kernels_are_back() -> None:
    """The dispatcher's own table is as it was."""
    names = [overload(n).name() for n in every_op()]
    table = lambda: [torch._C._dispatch_dump_table(n) for n in names]  # noqa: E731
    before = table()
    gems_compile.enable(only=every_op())
    during = table()
    assert all(a != b for a, b in zip(before, during, strict=True))
    gems_compile.disable()
    assert table() == before


@pytest.mark.parametrize("name", ["aten.add.Scalar", "aten.sum.default", "aten.exp.default"])
def test_a_trace_does_not_remember_our_kernels(name: str) -> None:
    """torch's Python dispatcher keeps what it found. A key of which ATen has no kernel itself, for
    it has one for all devices, was then called with ours gone: the process died."""
    from torch._dispatch.python import enable_python_dispatcher

    a, rest, op = rand(4), (1,) if "add" in name else (), overload(name)
    for _ in range(2):
        with gems_compile.use_gems(only=[name], record=(seen := []).append):
            with enable_python_dispatcher():
                assert_same(op(a, *rest), op(a.clone(), *rest))
            assert seen
        with enable_python_dispatcher():
            op(a, *rest)


def test_names() -> None:
    resolve = lambda *names: eager._names(frozenset(names), "enable")  # noqa: E731
    assert resolve("softmax") == resolve("_softmax")
    assert resolve("softmax") == {"aten._softmax.default", "aten._softmax.out"}
    assert resolve("add.Tensor") == resolve("aten.add.Tensor") == resolve("aten::add.Tensor")
    assert resolve("add") == {f"aten.add.{n}" for n in ("Tensor", "Scalar", "out", "Scalar_out")}
    assert resolve("add_") == {"aten.add_.Tensor", "aten.add_.Scalar"}
    assert resolve("max") == {f"aten.max.{n}" for n in ("default", "dim", "unary_out", "dim_max")}


@pytest.mark.parametrize("typo, close", [("softmx", "softmax"), ("gleu", "gelu"), ("Add", "add")])
def test_typos(typo: str, close: str) -> None:
    for arguments in ({"only": [typo]}, {"exclude": [typo]}):
        for call in (gems_compile.enable, gems_compile.use_gems):
            with pytest.raises(UnknownOp, match=rf"'{typo}' is declared; close to it: .*{close}"):
                call(**arguments)
    assert gems_compile.enabled_ops() == ()


def test_blocks_nest() -> None:
    on = gems_compile.enabled_ops
    gems_compile.enable(only=["add.Tensor"])
    with gems_compile.use_gems(only=["gelu", "exp"]):
        assert on() == EXP + GELU
        with gems_compile.use_gems(only=["gelu", "exp"], exclude=["exp"]) as block:
            assert on() == GELU
            with block:  # the same object again
                assert on() == GELU
            gems_compile.disable()
            assert on() == GELU
        assert on() == EXP + GELU
    assert on() == ()


def test_a_block_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), gems_compile.use_gems(only=["gelu"]):
        raise ZeroDivisionError
    assert gems_compile.enabled_ops() == ()


def test_a_block_decorates() -> None:
    @gems_compile.use_gems(only=["gelu"])
    def f(n: int) -> tuple[str, ...]:
        return f(n - 1) if n else gems_compile.enabled_ops()

    assert f(2) == GELU
    assert gems_compile.enabled_ops() == ()


def test_blocks_of_several_threads_add_up() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with gems_compile.use_gems(only=["exp"]):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with gems_compile.use_gems(only=["gelu"]):
        thread.start()
        assert inside.wait(10)
        assert gems_compile.enabled_ops() == EXP + GELU
    assert gems_compile.enabled_ops() == EXP
    leave.set()
    thread.join()
    assert gems_compile.enabled_ops() == ()


def test_threads_that_switch_while_others_compute() -> None:
    a = rand(4, 8)
    want, failed, stop = F.gelu(a).exp(), [], threading.Event()

    def compute() -> None:
        try:
            while not stop.is_set():
                torch.testing.assert_close(F.gelu(a).exp(), want)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        for k in range(150):
            with gems_compile.use_gems(only=["gelu", "exp"][: 1 + k % 2]):
                torch.testing.assert_close(F.gelu(a).exp(), want)
    finally:
        stop.set()
        for t in threads:
            t.join()
    assert not failed


def test_reentering_the_same_selection_registers_nothing(monkeypatch: Any) -> None:
    with gems_compile.use_gems(only=["gelu"]):
        monkeypatch.setattr(one_op.Handler, "register", lambda self: pytest.fail("registered"))
        with gems_compile.use_gems(only=["gelu"]):
            F.gelu(rand(4))
    assert ours("gelu") == 1


def test_a_composite_op_is_refused() -> None:
    """Ours at the device key would cut autograd off from the decomposition."""
    target = current_target()
    for name in eager._overloads():
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        aten = overload(name).name()
        if has(aten, "CompositeImplicitAutograd") and not has(aten, KEY):
            assert "decomposition" in str(eager.why_not_replaced(name, target))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU ATen's _fused_rms_norm is no composite")
def test_rms_norm_keeps_its_gradient() -> None:
    gems_compile.enable()
    assert "_fused_rms_norm" not in gems_compile.enabled_ops()
    same(lambda a, w: F.rms_norm(a, (33,), w, 1e-6), x(4, 33), x(33))


def test_every_declared_overload_exists_in_this_torch() -> None:
    """At run time an unknown one is skipped; here it would be a typo of ours."""
    declared = (*OPS, *COMPOSED, *map(str, SIZED), *map(str, ATTENTION), *FACTORIES, *DRAWS)
    missing = {n for n in declared if n.startswith("aten.")} - set(eager._overloads())
    assert not missing
    assert len(set(COMPOSED)) == len(COMPOSED) and not set(COMPOSED) & set(OPS)


def test_an_unknown_overload_is_skipped_with_a_reason(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setitem(OPS, "aten.gelu.nonsense", OPS["aten.gelu.default"])
    caches = eager._declared, eager._forms, eager._overloads
    for cache in caches:
        cache.cache_clear()
    try:
        with caplog.at_level("INFO"):
            assert "aten.gelu.nonsense" not in eager._overloads()
        assert "aten.gelu.nonsense is skipped" in caplog.text
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()


def test_without_a_target_nothing_is_replaced(monkeypatch: Any) -> None:
    monkeypatch.setattr(eager, "current_target", lambda vendor=None: None)
    gems_compile.enable()
    assert gems_compile.enabled_ops() == ()


# records -----------------------------------------------------------------------------------------


def test_record_to_a_function() -> None:
    seen: list[str] = []
    with gems_compile.use_gems(only=["gelu", "exp"], record=seen.append):
        for _ in range(3):
            F.gelu(rand(4)).exp()
        rand(0).exp()
    assert seen == ["gelu", "exp"]


def test_record_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ops.txt"
    gems_compile.enable(only=["gelu", "exp"], record=path)
    a = rand(4)
    F.gelu(a)
    assert path.read_text() == "gelu\n"
    a.exp()
    a.exp()
    gems_compile.disable()
    assert path.read_text() == "exp 2\ngelu 1\n"
    F.gelu(a)
    assert path.read_text() == "exp 2\ngelu 1\n"


# the cache of variants ---------------------------------------------------------------------------


def test_one_compile_a_kind_of_call(monkeypatch: Any) -> None:
    monkeypatch.setattr(varying, "OWN_SIZES", 4)
    a = rand(4, 6)
    with gems_compile.use_gems(only=["gelu"]):
        for t in (a, a + 1, a.t(), a.double(), a[:2], a):
            F.gelu(t)
        F.gelu(a, approximate="tanh")
    assert eager.stats()["gelu"] == {"ours": 7, "native": 0, "compiled": 5}


def test_shapes_that_never_repeat_stop_compiling(monkeypatch: Any) -> None:
    monkeypatch.setattr(varying, "OWN_SIZES", 4)  # sizes become arguments behind these
    monkeypatch.setattr(one_op, "MAX_COMPILED", 2)
    given = [rand(n) for n in range(1, 6)]
    with gems_compile.use_gems(only=["exp"]):
        got = [a.exp() for a in given]
    for a, b in zip(given, got, strict=True):
        assert_same(b, a.exp())
    assert eager.stats()["exp"] == {"ours": 2, "native": 3, "compiled": 2}


def _breaks(*_: Any) -> Any:
    raise RuntimeError("no such luck")


def test_a_failing_compile_is_atens(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("GEMS_STRICT", "0")
    monkeypatch.setattr(one_op, "compile_one", _breaks)
    a = rand(4)
    with gems_compile.use_gems(only=["exp"]):
        assert_same(a.exp(), a.exp())
    assert caplog.text.count("exp runs as ATen: RuntimeError: no such luck") == 1
    assert not ours("exp")


def test_a_failing_kernel_is_atens_and_strict_mode_raises(monkeypatch: Any, caplog: Any) -> None:
    a = rand(4)
    layouts = [one_op.layout_of(a)]
    monkeypatch.setattr(
        one_op, "compile_one", lambda *_: varying.Variant(_breaks, True, "", layouts)
    )
    with gems_compile.use_gems(only=["exp"]), pytest.raises(RuntimeError, match="no such luck"):
        a.exp()
    eager._state.handlers.clear()
    monkeypatch.setenv("GEMS_STRICT", "0")
    with gems_compile.use_gems(only=["exp"]):
        assert_same(a.exp(), torch.exp(a))
    assert "its kernel failed" in caplog.text
    assert eager.stats()["exp"] == {"ours": 0, "native": 2, "compiled": 0}


def test_a_result_laid_out_otherwise_is_atens(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        one_op, "compile_one", lambda *_: varying.Variant(_breaks, True, "", [("another",)])
    )
    with gems_compile.use_gems(only=["exp"]):
        rand(4).exp()
    assert "its meta" in whys("exp")[0]


def test_what_is_worth_a_kernel(monkeypatch: Any) -> None:
    """The rule of the default on a GPU, by what measurements may say."""
    from gems_compile.calls import worth
    from gems_compile.kernels.target import compile_target

    rows = {
        "_softmax": worth.Measured(2**24, least_across=2**19),
        "_log_softmax": worth.Measured(2**24, longest=16384),
        "logsumexp": worth.Measured(0),
        worth.ATTENTION[0]: worth.Measured(0),
        "add.Tensor": worth.Measured(None),
    }
    monkeypatch.setattr(worth, "table_of", lambda label: worth.Table(label, "", "", rows))
    h200 = compile_target("nvidia", 90)
    on = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    why = lambda name, *args: worth.why_not_worth(name, args, h200)  # noqa: E731
    assert why("_softmax", on(8192, 4096), -1, False) is None
    assert "less than 16777216" in str(why("_softmax", on(128, 4096), -1, False))
    assert why("_softmax", on(128, 4096), 0, False) is None
    assert worth.least_elements("_softmax", h200) == 2**19
    assert worth.least_elements("add.Tensor", h200) == worth.least_elements("exp", h200) > 2**60
    assert "a row has more" in str(why("_log_softmax", on(4096, 32768), 1, False))
    assert why("logsumexp", on(4), [0]) is None
    heads = [on(1, 2, 8, width) for width in (64, 80)]
    assert why(worth.ATTENTION[0], heads[0].half()) is None
    for x in (heads[0], heads[1].half()):
        assert "in 16 bits" in str(why(worth.ATTENTION[0], x))
    assert "gains nothing" in str(why("add.Tensor", on(2**13, 2**13)))
    assert worth.on_unasked("_softmax", h200) and not worth.on_unasked("_softmax.out", h200)
    assert not worth.on_unasked("add.Tensor", h200)


def test_the_measurements() -> None:
    from gems_compile.calls.worth import on_unasked, table_of
    from gems_compile.kernels.target import compile_target

    measured = table_of("nvidia:sm90").ops
    assert set(measured) <= {eager.aten_name(o) for o in eager._declared().values()}
    assert table_of("amd:gfx942") == table_of("nvidia:sm90")  # nobody has measured it
    h200 = compile_target("nvidia", 90)
    # which read memory once where ATen's do twice; and a copy's twin
    assert on_unasked("_softmax", h200) and on_unasked("native_layer_norm", h200)
    assert not on_unasked("add.Tensor", h200)


# ops ---------------------------------------------------------------------------------------------


def test_ops() -> None:
    a = x(4, 33)
    got = gems_compile.ops.gelu(a, approximate="tanh")
    assert_same(got.detach(), F.gelu(a, approximate="tanh").detach())
    assert_same(
        torch.autograd.grad(got.sum(), a)[0],
        torch.autograd.grad(F.gelu(a, approximate="tanh").sum(), a)[0],
    )
    assert ours("gelu") == 1
    assert_same(
        gems_compile.ops.softmax(a, dim=-1, half_to_float=False).detach(), a.softmax(-1).detach()
    )
    assert_same(gems_compile.ops.add(a, 2.5, alpha=2).detach(), (a + 5.0).detach())
    assert ours("_softmax") == ours("add.Tensor") == 1
    assert gems_compile.enabled_ops() == ()


def test_ops_beside_enable() -> None:
    gems_compile.enable(only=["gelu"])
    gems_compile.ops.gelu(rand(4))
    gems_compile.ops.exp(rand(4))
    assert gems_compile.enabled_ops() == GELU
    assert (ours("gelu"), ours("exp")) == (1, 1)


def test_ops_and_names_that_do_not_exist() -> None:
    assert isinstance(gems_compile.ops.gelu, types.FunctionType)
    assert "aten::gelu(" in gems_compile.ops.gelu.__doc__
    assert {"gelu", "softmax", "add"} <= set(dir(gems_compile.ops))
    with pytest.raises(AttributeError, match="'gleu' is declared; close to it: glu, gelu"):
        gems_compile.ops.gleu  # noqa: B018
    with pytest.raises((TypeError, RuntimeError), match="missing value for argument 'self'"):
        gems_compile.ops.gelu()


def test_small_calls_stay_atens_where_only_faster_ones_are_served() -> None:
    """As on a GPU without ``only=``; looking at such a call costs little."""
    x, w = rand(4, 64), rand(64)
    native = F.layer_norm(x, (64,), w)
    with gems_compile.use_gems(only=["native_layer_norm"]):
        handler = eager._state.handlers["aten.native_layer_norm.default"]
        handler.be_picky(True)
        before = eager.stats().get("native_layer_norm", {"ours": 0, "native": 0})
        got = F.layer_norm(x, (64,), w)
        after = eager.stats()["native_layer_norm"]
    assert torch.equal(got, native)
    assert after["native"] == before["native"] + 1 and after["ours"] == before["ours"]
