"""Each rewrite fires once on its samples, never on what looks alike, and gives the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table

from gems_compile.kernels.fused import register_torch_ops
from gems_compile.kernels.op import T
from gems_compile.lowering.passes import drop_duplicates, drop_no_ops, reinplace_updates
from gems_compile.lowering.rewrite import (
    Rewrite,
    RewriteLog,
    Sample,
    apply_rewrites,
    rewrite_dynamo_graph,
)
from gems_compile.lowering.rewrites import MEMORY, TABLE

KEPT = (
    "_softmax", "_softmax_backward_data", "gelu", "gelu_backward", "silu", "silu_backward",
    "native_layer_norm", "native_layer_norm_backward", "_to_copy", "addmm", "baddbmm", "clone",
    "native_dropout", "embedding", "where", "masked_fill",
)  # fmt: skip
DECOMPOSITIONS = {
    op: how
    for op, how in select_decomp_table().items()
    if getattr(op, "_schema", None) is None or op._schema.name.removeprefix("aten::") not in KEPT
}
DTYPES = (torch.float32, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLES = [
    pytest.param(rule, s, id=f"{rule.name}-{s.program.__name__.strip('_')}-{i}")
    for rule in MEMORY
    for i, s in enumerate(rule.samples)
]
LOOKALIKES = [
    pytest.param(rule, s, id=f"{rule.name}-{s.program.__name__.strip('_')}-{i}")
    for rule in MEMORY
    for i, s in enumerate(rule.leaves_alone)
]


class Backend:
    """The rewrites and passes, then ATen: what they do, without the code generator."""

    def __init__(self, dynamo: bool = True, table: tuple[Rewrite, ...] = TABLE) -> None:
        self.dynamo, self.table = dynamo, table
        self.log = RewriteLog()
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list) -> object:
        if self.dynamo:
            self.log.extend(rewrite_dynamo_graph(gm, self.table))
            gm.graph.lint()
        compiler = aot_autograd(
            fw_compiler=self.lower,
            decompositions=DECOMPOSITIONS,
            keep_inference_input_mutations=True,
        )
        return compiler(gm, inputs)

    def lower(self, gm: torch.fx.GraphModule, inputs: list) -> object:
        drop_no_ops(gm)
        drop_duplicates(gm)
        if not self.dynamo:
            self.log.extend(apply_rewrites(gm, self.table))
            gm.graph.lint()
        reinplace_updates(gm)
        gm.graph.lint()
        gm.recompile()
        self.graphs.append(gm)
        return make_boxed_func(gm.forward)


def make(inputs: tuple, dtype: torch.dtype, requires_grad: bool = False) -> list:
    torch.manual_seed(0)
    made = [torch.randn(t.shape).to(DEVICE, dtype) if isinstance(t, T) else t for t in inputs]
    return [t.requires_grad_(requires_grad) if torch.is_tensor(t) else t for t in made]


def run(program: object, args: list) -> list[torch.Tensor]:
    """Outputs, and gradients of the inputs if they want any."""
    result = program(*args)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if args[0].requires_grad:
        torch.manual_seed(1)
        weighted = sum((y * torch.randn(y.shape).to(y)).sum() for y in outputs)
        outputs += torch.autograd.grad(weighted, args)
    return [t.detach() for t in outputs]


def in_float64(program: object, args: list) -> list[torch.Tensor]:
    """The program on the same values with each dtype it names widened."""
    wide = [a.detach().double().requires_grad_(a.requires_grad) for a in args]

    class Widen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if func is torch.Tensor.float:
                return args[0]
            if func in (torch.Tensor.to, torch.nn.functional.softmax):
                args = tuple(torch.float64 if a == torch.float32 else a for a in args)
                if kwargs.get("dtype") is torch.float32:
                    kwargs["dtype"] = torch.float64
            return func(*args, **kwargs)

    with Widen():
        return run(program, wide)


def assert_as_accurate(got: list, plain: list, exact: list, dtype: torch.dtype) -> None:
    """No further from float64 than 1.5 times the unfused program, give or take one rounding."""
    assert len(got) == len(plain) == len(exact)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        size = c.abs().max().item()
        error, allowed = ((t.double() - c).abs().max().item() for t in (a, b))
        assert error <= 1.5 * allowed + size * torch.finfo(dtype).eps, (error, allowed)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "sample"), SAMPLES)
def test_fires_once_with_the_same_numbers(
    rule: Rewrite, sample: Sample, dtype: torch.dtype, train: bool
) -> None:
    backend = Backend(table=MEMORY)
    args = make(sample.inputs, dtype, requires_grad=train)
    got = run(torch.compile(sample.program, backend=backend, fullgraph=True), args)
    if rule.name == "attention" and dtype is torch.float32 and DEVICE != "cpu":
        (miss,) = backend.log.near_misses
        assert "TF32" in miss.reason
        return
    assert [fired.rule for fired in backend.log.fired] == [rule.name], backend.log.near_misses
    plain, exact = run(sample.program, args), in_float64(sample.program, args)
    assert_as_accurate(got, plain, exact, dtype)
    assert got[0].stride() == plain[0].stride()


@pytest.mark.parametrize(("rule", "sample"), LOOKALIKES)
def test_leaves_lookalikes_alone(rule: Rewrite, sample: Sample) -> None:
    for dtype in DTYPES:
        torch._dynamo.reset()
        backend = Backend(table=(rule,))
        args = make(sample.inputs, dtype)
        torch.compile(sample.program, backend=backend, fullgraph=True)(*args)
        assert backend.log.fired == []


@pytest.mark.parametrize(("rule", "sample"), [p for p in SAMPLES if p.values[0] is TABLE[0]])
def test_attention_is_found_in_aten_inference_graphs(rule: Rewrite, sample: Sample) -> None:
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    backend, args = Backend(dynamo=False), make(sample.inputs, dtype)
    got = run(torch.compile(sample.program, backend=backend, fullgraph=True), args)
    assert [fired.rule for fired in backend.log.fired] == [rule.name]
    plain, exact = run(sample.program, args), in_float64(sample.program, args)
    assert_as_accurate(got, plain, exact, dtype)


def test_near_miss_says_why() -> None:
    (queries,) = (s for s in TABLE[0].leaves_alone if "queries" in s.program.__name__)
    backend = Backend()
    torch.compile(queries.program, backend=backend)(*make(queries.inputs, torch.float32))
    (miss,) = backend.log.near_misses
    assert miss.reason == "softmax runs over dim -2, not over the keys"
    assert "torch.softmax" in miss.source


def test_a_chain_that_reads_what_another_became() -> None:
    def attention(x):
        return (x @ x.transpose(-2, -1) * 0.5).softmax(-1) @ x

    def program(x):
        return attention(attention(x))

    backend, args = Backend(), make((T(2, 4, 8, 8),), torch.bfloat16)
    got, plain = run(torch.compile(program, backend=backend), args), run(program, args)
    assert_as_accurate(got, plain, in_float64(program, args), torch.bfloat16)
    assert [fired.rule for fired in backend.log.fired] == ["attention", "attention"]


def test_dynamic_sizes_compile_once() -> None:
    for sample in (TABLE[0].samples[0], TABLE[2].samples[0]):
        torch._dynamo.reset()
        backend = Backend()
        compiled = torch.compile(sample.program, backend=backend, dynamic=True)
        for extra in (0, 3, 5):
            shapes = [[n + extra if n in (8, 12, 6) else n for n in t.shape] for t in sample.inputs]
            args = make(tuple(T(*shape) for shape in shapes), torch.bfloat16)
            got, plain = run(compiled, args), run(sample.program, args)
            assert_as_accurate(got, plain, in_float64(sample.program, args), torch.bfloat16)
        assert len(backend.log.fired) == 1
        assert len(backend.graphs) == 1


@pytest.mark.parametrize("after_cast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_rounds_where_the_chain_rounds(dtype: torch.dtype, after_cast: bool) -> None:
    rule = TABLE[2] if after_cast else TABLE[1]
    program = rule.samples[0].program
    args = make((T(5, 7, 32), T(32)), dtype)
    got = torch.compile(program, backend=Backend(), fullgraph=True)(*args)
    assert torch.equal(got, program(*args))


def test_rms_norm_op_passes_opcheck_and_gradcheck() -> None:
    register_torch_ops()
    op = torch.ops.gems.rms_norm.default
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for w in (weight, None):
        for after_cast in (True, False):
            torch.autograd.gradcheck(lambda x, w=w, c=after_cast: op(x, w, 1e-6, c)[0], (x,))
    torch.autograd.gradcheck(lambda w: op(x, w, 1e-6, True)[0], (weight,))
    for case in (x, x.transpose(0, 1), x[:, ::2], x.bfloat16(), x[:0], x[:1].expand(3, 4, 8)):
        for w in (weight.to(case.dtype), None):
            torch.library.opcheck(op, (case.detach().requires_grad_(), w, 1e-6, True))


def test_autocast_keeps_dtypes_and_numbers() -> None:
    rule = TABLE[0]
    sample = next(s for s in rule.samples if "scaled_query" in s.program.__name__)
    args, backend = make(sample.inputs, torch.float32), Backend()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = torch.compile(sample.program, backend=backend)(*args)
        plain = sample.program(*args)
    assert [fired.rule for fired in backend.log.fired] == ["attention"]
    assert_as_accurate([got], [plain], in_float64(sample.program, args), torch.bfloat16)


def test_vmap_and_checkpoint() -> None:
    program = TABLE[2].samples[0].program
    x, weight = make((T(4, 6, 32), T(32)), torch.float32, requires_grad=True)
    backend = Backend()
    mapped = torch.compile(torch.func.vmap(program, in_dims=(0, None)), backend=backend)
    torch.testing.assert_close(mapped(x, weight), program(x, weight))
    assert backend.log.fired == []

    def checkpointed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(program, x, weight, use_reentrant=False)

    got = run(torch.compile(checkpointed, backend=backend), [x, weight])
    torch.testing.assert_close(got, run(program, [x, weight]))
    assert [fired.rule for fired in backend.log.fired] == ["rms_norm"]


def tiny(name: str, **more: object) -> torch.nn.Module:
    """A transformers model of two layers, its attention written out."""
    transformers = pytest.importorskip("transformers")
    llama = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    bert = {**llama, "image_size": 32, "patch_size": 8}
    del bert["num_key_value_heads"], bert["head_dim"]
    sizes = {
        "Llama": llama, "Mistral": llama, "Qwen3": llama, "Gemma2": llama, "Bert": bert,
        "ViT": bert, "T5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
        "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes[name], **more)
    config._attn_implementation = "eager"
    suffix = "EncoderModel" if name == "T5" else "Model"
    torch.manual_seed(0)
    return getattr(transformers, name + suffix)(config).eval()


@pytest.mark.model
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "attentions", "norms"),
    [
        ("Llama", 2, 5),
        ("Mistral", 2, 5),
        ("Qwen3", 2, 9),
        ("Gemma2", 0, 9),  # soft-capped scores
        ("GPT2", 2, 0),
        ("Bert", 2, 0),
        ("ViT", 2, 0),
        ("T5", 2, 5),
    ],
)
def test_models(name: str, attentions: int, norms: int, dtype: torch.dtype) -> None:
    model, backend = tiny(name).to(DEVICE, dtype), Backend()
    compiled = torch.compile(model, backend=backend)
    wide = torch.float32 if dtype is torch.bfloat16 else torch.float64
    exact_model = copy.deepcopy(model).to(wide)
    errors = {"got": [], "plain": []}
    for seed in range(4):  # a single input says little: one rounding decides a whole gradient
        inputs = model_inputs(name, dtype, seed)
        exact = step(exact_model, exact_model, model_inputs(name, wide, seed, dtype), seed)
        plain = step(model, model, inputs, seed)
        got = step(model, compiled, inputs, seed)
        for key in plain.keys() - {k for k in plain if "key.bias" in k or "k_proj.bias" in k}:
            # (softmax does not see a key's bias: its gradient is 0, and all of it is rounding)
            for kind, found in (("got", got), ("plain", plain)):
                error = (found[key].to(wide) - exact[key]).norm() / exact[key].norm()
                errors[kind].append(error.item())
    fired = [f.rule for f in backend.log.fired]
    fused = dtype is torch.bfloat16 or DEVICE == "cpu"  # float32 on a GPU stays two matmuls
    assert fired.count("attention") == (attentions if fused else 0), backend.log.near_misses
    assert len(fired) - fired.count("attention") == norms, backend.log.near_misses
    mean = {kind: sum(values) / len(values) for kind, values in errors.items()}
    assert mean["got"] <= 1.2 * mean["plain"], mean


def model_inputs(name: str, dtype: torch.dtype, seed: int, via: torch.dtype | None = None) -> dict:
    """What the model is called with; pixels rounded to ``via`` first."""
    torch.manual_seed(seed)
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 32, 32).to(via or dtype).to(DEVICE, dtype)}
    ids = {"input_ids": torch.randint(0, 100, (2, 9)).to(DEVICE)}
    return ids if name in ("Bert", "T5") else {**ids, "use_cache": False}


def step(
    model: torch.nn.Module, run: torch.nn.Module, inputs: dict, seed: int
) -> dict[str, torch.Tensor]:
    """The hidden states, and the gradients of a random projection of them."""
    hidden = run(**inputs).last_hidden_state
    torch.manual_seed(seed)
    (hidden * torch.randn(hidden.shape).bfloat16().to(hidden)).mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"hidden": hidden.detach(), **found}
