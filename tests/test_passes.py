"""Passes drop what changes nothing and keep what only looks so; in-place updates stay exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from clock import processor_seconds
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx

from gems_compile.lowering import graph as questions
from gems_compile.lowering.passes import (
    PASSES,
    drop_dead_code,
    drop_duplicates,
    drop_no_ops,
    inline_functionalized_ops,
    reinplace_updates,
)

aten = torch.ops.aten


class Capture:
    """A backend that runs ``passes`` over each ATen graph and keeps the graph and the counts."""

    def __init__(self, *passes: Callable[[fx.GraphModule], int]) -> None:
        self.passes, self.graphs, self.counts = passes, [], []
        self.inner = aot_autograd(fw_compiler=self.lower, keep_inference_input_mutations=True)

    def __call__(self, gm: fx.GraphModule, inputs: list) -> object:
        return self.inner(gm, inputs)

    def lower(self, gm: fx.GraphModule, inputs: list) -> object:
        for run in self.passes:
            self.counts.append(run(gm))
            gm.graph.lint()
        gm.recompile()
        self.graphs.append(gm)
        return make_boxed_func(gm.forward)

    def targets(self) -> list[str]:
        return [str(n.target) for n in self.graphs[-1].graph.nodes if n.op == "call_function"]


def traced(program: Callable, *args: torch.Tensor) -> fx.GraphModule:
    return make_fx(program, tracing_mode="fake")(*args)


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def check(program: Callable, run: Callable, *args: torch.Tensor) -> list[str]:
    """What is left after one pass, which must not change the numbers or the strides."""
    gm = traced(program, *args)
    run(gm)
    gm.graph.lint()
    gm.recompile()
    for got, wanted in zip(gm(*args), program(*args), strict=True):
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()
    return targets(gm)


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: aten.detach(x),
        lambda x: aten.alias(x),
        lambda x: aten.view(x, [4, 6]),
        lambda x: aten.view(aten.view(x, [24]), [4, 6]),
        lambda x: aten.permute(aten.permute(x, [1, 0]), [1, 0]),
        lambda x: aten.expand(x, [4, 6]),
        lambda x: aten.slice(x, 1, 0, 6),
        lambda x: aten.clone(x),
        lambda x: aten._to_copy(x, dtype=torch.float32),
        lambda x: aten._to_copy(aten._to_copy(x, dtype=torch.float64), dtype=torch.float32),
        lambda x: aten.mul(x, 1),
        lambda x: aten.div(x, 1.0),
        lambda x: aten.sub(x, 0.0),
        lambda x: aten.squeeze(aten.unsqueeze(x, 0), 0),
    ],
)
def test_no_ops_go(op: Callable) -> None:
    def program(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (aten.sin(op(aten.cos(x))),)

    gm = traced(program, X)
    assert drop_no_ops(gm) >= 1
    drop_dead_code(gm)
    assert targets(gm) == ["aten.cos.default", "aten.sin.default"]


@pytest.mark.parametrize(
    "op",
    [
        lambda x: aten.add(x, 0.0),  # -0.0 + 0 is 0
        lambda x: aten.sub(x, -0.0),
        lambda x: aten.mul(x, 1.0 + 1e-7),
        lambda x: aten.slice(x, 1, 0, 5),
        lambda x: aten.permute(x, [1, 0]),
        lambda x: aten.view(x, [6, 4]),
        lambda x: aten.clone(aten.permute(x, [1, 0]), memory_format=torch.contiguous_format),
        lambda x: aten._to_copy(aten._to_copy(x, dtype=torch.bfloat16), dtype=torch.float32),
        lambda x: aten.clone(aten.expand(aten.slice(x, 0, 0, 1), [4, 6])),
    ],
)
def test_what_changes_something_stays(op: Callable) -> None:
    x = torch.randn(4, 6)
    x[0, 0] = -0.0

    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return aten.sign(op(aten.neg(x))), aten.reciprocal(op(x))

    assert check(program, drop_no_ops, x) == targets(traced(program, x))


def test_int_times_one_that_promotes_stays() -> None:
    x = torch.arange(6)
    assert check(lambda x: (aten.mul(x, 1.0),), drop_no_ops, x) == ["aten.mul.Tensor"]
    assert check(lambda x: (aten.sin(aten.add(x, 0)),), drop_no_ops, x) == ["aten.sin.default"]


def test_a_returned_copy_stays_a_copy() -> None:
    assert check(lambda x: (aten.clone(x),), drop_no_ops, X) == ["aten.clone.default"]
    left = check(lambda x: (aten.view(aten.clone(x), [24]),), drop_no_ops, X)
    assert left == ["aten.clone.default", "aten.view.default"]

    def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = aten.sin(x)
        return y, aten.clone(y)

    assert check(twice, drop_no_ops, X) == ["aten.sin.default", "aten.clone.default"]
    left = check(lambda x: (aten.clone(aten.sin(x)),), drop_no_ops, X)
    assert left == ["aten.sin.default"]  # one fresh tensor either way


def test_two_copies_of_one_value_do_not_become_one() -> None:
    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = aten.sin(x)
        return aten.clone(y), aten.clone(y)

    for run in (drop_no_ops, drop_duplicates):
        gm = traced(program, X)
        run(gm)
        gm.recompile()
        a, b = gm(X)
        assert a.data_ptr() != b.data_ptr()


def test_a_copy_taken_before_a_write_stays() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        old = x.clone()
        x.add_(1)
        return old * x

    backend, x = Capture(drop_no_ops, drop_duplicates), X.clone()
    wanted, y = program(X.clone()), x.clone()
    assert torch.equal(torch.compile(program, backend=backend)(y), wanted)
    assert torch.equal(y, X + 1)

    g = fx.Graph()  # the write in the middle, as after reinplace_updates
    p = g.placeholder("p")
    c = g.call_function(aten.clone.default, (p,))
    s = g.call_function(aten.sin.default, (p,))
    w = g.call_function(aten.add_.Tensor, (p, 1))
    s2 = g.call_function(aten.sin.default, (p,))
    g.output((g.call_function(aten.add.Tensor, (c, s)), s2))
    for node in (p, c, s, w, s2):
        node.meta["val"] = X
    gm = fx.GraphModule({}, g)
    wanted = gm(X.clone())
    assert drop_no_ops(gm) == drop_duplicates(gm) == 0
    assert all(map(torch.equal, gm(X.clone()), wanted))


def test_duplicates_go() -> None:
    def program(x: torch.Tensor) -> tuple[torch.Tensor]:
        a, b = aten.sin(x), aten.sin(x)
        c, d = aten.sum(a, [0]), aten.sum(b, [0])
        return (aten.add(c, d),)

    left = check(program, drop_duplicates, X)
    assert left == ["aten.sin.default", "aten.sum.dim_IntList", "aten.add.Tensor"]


def test_lookalike_duplicates_stay() -> None:
    def scalars(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return aten.mul(x, 0.0), aten.mul(x, -0.0), aten.full([2], 1), aten.full([2], 1.0)

    assert len(check(scalars, drop_duplicates, X)) == 4
    noise = traced(lambda x: (aten.add(aten.rand_like(x), aten.rand_like(x)),), X)
    before = targets(noise)
    assert drop_duplicates(noise) == 0 and targets(noise) == before
    returned = traced(lambda x: (aten.sin(x), aten.sin(x)), X)
    assert drop_duplicates(returned) == 0


def test_what_is_returned_takes_no_other_results_place() -> None:
    """In a joint graph: who has the result may write it, and backward reads its own."""

    def program(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return aten.sin(x), aten.cos(aten.sin(x)), aten.neg(aten.cos(aten.sin(x)))

    gm = traced(program, X)
    wanted = gm(X)
    assert drop_duplicates(gm, returned=False) == 1  # two sines that nobody has
    assert all(map(torch.equal, gm(X), wanted))
    assert drop_duplicates(gm) == 2
    assert all(map(torch.equal, gm(X), wanted))


def test_equal_symbols_are_one() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1) + torch.arange(x.shape[0] * x.shape[1], device=x.device)

    backend = Capture(drop_no_ops, drop_duplicates)
    compiled = torch.compile(program, backend=backend, dynamic=True)
    for n in (3, 5):
        torch.testing.assert_close(compiled(torch.ones(n, 4)), program(torch.ones(n, 4)))
    assert sum("mul" in t for t in backend.targets()) <= 1


def test_dead_code_keeps_effects() -> None:
    def program(x: torch.Tensor) -> tuple[torch.Tensor]:
        aten.sin(x)
        aten.rand_like(x)
        aten._assert_async(aten.all(aten.eq(x, x)))
        return (aten.cos(x),)

    gm = traced(program, X)
    drop_dead_code(gm)
    left = targets(gm)
    assert "aten.sin.default" not in left
    assert {"aten.rand_like.default", "aten._assert_async.default"} <= set(left)


def _index_put(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    c[torch.tensor([1, 3], device=c.device)] = k
    return c * 2


def _index_copy(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    c.index_copy_(0, torch.tensor([1, 3], device=c.device), k)
    return c.sum(0)


def _slice(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    c[2:4] = k
    return c + 1


def _slice_of_slice(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    c[2:4, 1:] = k[:, 1:]
    return c + 1


def _select(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    c[2] = k[0]
    return c + 1


def _twice(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    c[2:4] = k
    c[0] = k[1]
    return c + 1


def _scatter(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    c.scatter_(0, torch.zeros(2, 6, dtype=torch.long, device=c.device), 3.0)
    return c + k.sum()


def _shifted(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    c[1:] = c[1:] + c[:-1]
    return c * k.sum()


def _old_read_before(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    total = c.sum()
    c[2:4] = k
    return c + total


@pytest.mark.parametrize(
    "program",
    [_index_put, _index_copy, _slice, _slice_of_slice, _select, _twice, _scatter, _shifted],
)
def test_updates_happen_in_place(program: Callable) -> None:
    backend = Capture(*PASSES)
    c, k = torch.randn(5, 6), torch.randn(2, 6)
    mine = c.clone()
    got = torch.compile(program, backend=backend)(mine, k)
    assert torch.equal(got, program(c, k))
    assert torch.equal(mine, c)
    assert backend.counts[-1] == 1
    copies = [n for n in backend.graphs[-1].graph.nodes if n.target is aten.copy_.default]
    assert not any(n.args[0].op == "placeholder" for n in copies)
    assert not any("scatter.default" in t for t in backend.targets())


def _old_read_after(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    old = c.view(-1).clone()
    c[2:4] = k
    return c + old.view(5, 6)


def _overlap(c: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    c[1:] = c[:-1].clone()
    return c * k.sum()


def _returned_new(c: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    new = torch.slice_scatter(c, k, 0, 2, 4)
    old = c * 2
    c.copy_(new)
    return new, old


@pytest.mark.parametrize("program", [_old_read_after, _overlap, _returned_new, _old_read_before])
def test_updates_stay_exact_where_they_overlap(program: Callable) -> None:
    backend = Capture(*PASSES)
    c, k = torch.randn(5, 6), torch.randn(2, 6)
    mine = c.clone()
    got, wanted = torch.compile(program, backend=backend)(mine, k), program(c, k)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert torch.equal(mine, c)


def _copied_back(build: Callable[[fx.Graph, fx.Node, fx.Node], tuple]) -> fx.GraphModule:
    """A graph ``p, k -> ...`` that ends in ``copy_(p, new)``; ``build`` gives (new, outputs)."""
    g = fx.Graph()
    p, k = g.placeholder("p"), g.placeholder("k")
    p.meta["val"], k.meta["val"] = torch.randn(5, 6), torch.randn(2, 6)
    new, outputs = build(g, p, k)
    g.call_function(aten.copy_.default, (p, new))
    g.output(outputs)
    for node in g.nodes:
        if node.op == "call_function":
            node.meta["val"] = node.target(*fx.map_arg(node.args, questions.value_of))
    return fx.GraphModule({}, g)


def _source_shares_memory(g: fx.Graph, p: fx.Node, k: fx.Node) -> tuple:
    head = g.call_function(aten.slice.Tensor, (p, 0, 0, 4))
    return g.call_function(aten.slice_scatter.default, (p, head, 0, 1, 5)), (k,)


def _late_view_reader(g: fx.Graph, p: fx.Node, k: fx.Node) -> tuple:
    view = g.call_function(aten.view.default, (p, [30]))
    new = g.call_function(aten.slice_scatter.default, (p, k, 0, 1, 3))
    return new, (g.call_function(aten.sin.default, (view,)),)


def _new_is_returned(g: fx.Graph, p: fx.Node, k: fx.Node) -> tuple:
    new = g.call_function(aten.slice_scatter.default, (p, k, 0, 1, 3))
    return new, (g.call_function(aten.view.default, (new, [30])),)


@pytest.mark.parametrize("build", [_source_shares_memory, _late_view_reader, _new_is_returned])
def test_updates_that_must_not_be_in_place(build: Callable) -> None:
    gm = _copied_back(build)
    before = targets(gm)
    assert reinplace_updates(gm) == 0
    assert targets(gm) == before


def test_custom_op_that_writes_runs_without_clones() -> None:
    @torch.library.custom_op("gems_test::fill_twice", mutates_args={"out"})
    def fill_twice(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x * 2)

    fill_twice.register_fake(lambda x, out: None)

    def program(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops.gems_test.fill_twice(x.sin(), out)
        return out + 1

    backend = Capture(inline_functionalized_ops)
    got = torch.compile(program, backend=backend, fullgraph=True)(X)
    assert torch.equal(got, program(X))
    assert backend.counts == [1]
    assert "gems_test.fill_twice.default" in backend.targets()
    assert not any("clone" in t for t in backend.targets())


def test_questions() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.SiLU())])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x) + 1

    backend = Capture()
    torch.compile(Model(), backend=backend)(X)
    nodes = {str(n.target): n for n in backend.graphs[0].graph.nodes}
    add = nodes["aten.add.Tensor"]
    assert questions.source_line(add).startswith("test_passes.py:")
    assert questions.source_line(add).endswith("return self.layers[0](x) + 1")
    inner = next(n for n in backend.graphs[0].graph.nodes if "layers" in questions.module_path(n))
    assert questions.module_path(inner) == "layers.0.0"
    assert questions.value_of(add).shape == (4, 6)


def a_chain(turns: int) -> fx.GraphModule:
    g = fx.Graph()
    x = g.placeholder("x")
    x.meta["val"] = X
    node = x
    for i in range(turns):
        for op in (aten.sin.default, aten.detach.default, aten.mul.Tensor):
            node = g.call_function(op, (node, i) if op is aten.mul.Tensor else (node,))
            node.meta["val"] = X
    g.output((node,))
    return fx.GraphModule({}, g)


def test_passes_take_linear_time() -> None:
    def passes_over(turns: int) -> Callable[[], None]:
        gm = a_chain(turns)

        def run() -> None:
            assert [each(gm) for each in PASSES] == [0, turns + 1, 0, 0, 0, 0]

        return run

    few, many = (processor_seconds(partial(passes_over, turns)) for turns in (375, 1500))
    assert many < 8 * few, (few, many)  # 16 times as long if it were quadratic
    assert many < 1, many  # about 0.1 s


def test_the_only_write_of_an_input() -> None:
    """What is said from the users alone is what the whole graph's storage says."""

    def alone(x: torch.Tensor) -> torch.Tensor:
        x.copy_(x + 1)
        return x * 2  # of what was read before, or of what is there now

    def twice(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x.copy_(x * 3) + 1

    def through_a_view(x: torch.Tensor) -> torch.Tensor:
        x.view(-1).add_(1)
        return x.copy_(x * 3) + 1

    def by_another_name(x: torch.Tensor) -> torch.Tensor:
        return x.copy_(x * 3).view(-1) + 1

    for program, plain in ((alone, True), (twice, False), (through_a_view, False)):
        graph = traced(program, torch.ones(2, 3)).graph
        (write,) = questions.calls_of(graph, (aten.copy_.default,))
        assert questions.is_only_write(write, write.args[0]) is plain
        storage = questions.Storage(graph)
        assert (storage.writes[storage.root[write.args[0]]] == [write]) is plain
    graph = traced(by_another_name, torch.ones(2, 3)).graph
    (write,) = questions.calls_of(graph, (aten.copy_.default,))
    assert not questions.is_only_write(write, write.args[0])  # the storage has another name for it
