"""Python's garbage collection while something compiles: none for us, and as usual for others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from helpers import gems_only
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

from gems_compile import backend, collection
from gems_compile.collection import WhileDynamoTraces, no_collection

pytestmark = gems_only

TRACES = CallbackArgs(CallbackTrigger.DYNAMO, "0/0")
BACKWARD = CallbackArgs(CallbackTrigger.LAZY_BACKWARD, "0/0")


@pytest.fixture
def often() -> Iterator[None]:
    """Collections at every turn."""
    usual = gc.get_threshold()
    gc.set_threshold(50, 2, 2)
    yield
    gc.set_threshold(*usual)


def collections_of(compiled) -> int:
    """How many took place from Dynamo's first look at a function to its last."""
    many, inside = 0, False

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal many
        many += inside and phase == "start"

    def mark(args: CallbackArgs) -> None:
        nonlocal inside
        inside = not inside

    gc.callbacks.append(note)
    callback_handler.register_start_callback(mark)
    callback_handler.start_callbacks.sort(key=lambda f: f is mark)  # ours last ...
    callback_handler.register_end_callback(mark)
    callback_handler.end_callbacks.sort(key=lambda f: f is not mark)  # ... and first
    try:
        compiled(torch.rand(8))
    finally:
        callback_handler.remove_start_callback(mark)
        callback_handler.remove_end_callback(mark)
        gc.callbacks.remove(note)
    assert not inside
    return many


@pytest.mark.usefixtures("often")
def test_none_while_dynamo_traces_for_us() -> None:
    torch._dynamo.reset()
    backend._traces.listen()
    backend._traces.ours = True
    own = [torch.compile(lambda x, k=k: (x * k).relu() + 1, backend="gems") for k in range(2)]
    other = [torch.compile(lambda x, k=k: x - k, backend="aot_eager") for k in range(3)]
    assert collections_of(own[0]) == 0
    assert collections_of(other[0]) == 0  # nobody knows yet that it is not ours
    assert collections_of(other[1]) > 0
    assert collections_of(own[1]) > 0  # likewise
    assert gc.isenabled()
    assert collections_of(torch.compile(lambda x: x.exp(), backend="gems")) == 0
    assert gc.isenabled()


def test_a_reset_forgets_who_listens() -> None:
    torch._dynamo.reset()
    assert backend._traces.begin not in callback_handler.start_callbacks
    torch.compile(lambda x: x * 2, backend="gems")(torch.rand(8))
    torch._dynamo.reset_code_caches()
    torch.compile(lambda x: x * 3, backend="gems")(torch.rand(8))
    assert callback_handler.start_callbacks.count(backend._traces.begin) == 1
    assert callback_handler.end_callbacks.count(backend._traces.end) == 1


def test_what_a_user_turned_off_stays_off() -> None:
    traces = WhileDynamoTraces()
    gc.disable()
    try:
        traces.begin(TRACES)
        traces.end(TRACES)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_other_reasons_to_compile() -> None:
    """Only Dynamo's traces are long, and whoever ends last resumes."""
    traces = WhileDynamoTraces()
    traces.begin(BACKWARD)
    assert gc.isenabled()
    traces.end(BACKWARD)
    assert traces.ours
    traces.begin(TRACES)
    assert not gc.isenabled()
    traces.end(BACKWARD)
    assert gc.isenabled()


def test_what_a_compile_made_is_old() -> None:
    """The next collection of young objects has nothing to look through; frozen ones stay frozen."""
    young = []
    with no_collection():
        young.extend([k] for k in range(20_000))
        assert gc.get_count()[0] > 10_000
    assert gc.get_count()[0] < 10_000
    assert any(o is young[-1] for o in gc.get_objects(2))
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        assert frozen > collection.FROZEN_BY_PYTHON
        with no_collection():
            young.append([])
        # other threads may have let go of some; thawed, hardly any would be left
        assert gc.get_freeze_count() > frozen - 1000
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_no_tensor_waits_for_a_collection(breaks: bool, trains: bool) -> None:
    """What Dynamo traced with is let go of without one: memory is not held for longer."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).relu()
        if breaks:
            torch._dynamo.graph_break()
        return y.softmax(-1) * y

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="gems", fullgraph=not breaks)
    gc.collect()
    gc.disable()
    try:
        x = torch.rand(8, 8, requires_grad=trains)
        out = compiled(x)
        if trains:
            out.sum().backward()
        memory = [weakref.ref(t.untyped_storage()) for t in (x, out)]
        del x, out
        assert [ref() for ref in memory] == [None, None]
    finally:
        gc.enable()
