"""Every kernel compiles for every target, with no GPU: sm_80, sm_90 and gfx942.

The kernels of all declared ops, of a set of fused programs and of the tiny models are written as
for a GPU with many multiprocessors and compiled by the compiler's own workers: some of them a day,
which the day's seed picks. ``GEMS_TEST_FULL=1`` takes all, and every sample of the single ops, in
three dtypes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import authored
import opcheck
import pytest
import test_models as models
import torch
import torch.nn.functional as F
from machine_code import sources
from opcheck import FULL, SEED, calls, make, one_node, overload, trace
from torch import Tensor

from gems_compile.backend import Gems
from gems_compile.kernels.draws import DRAWS
from gems_compile.kernels.op import OPS
from gems_compile.kernels.target import INTERPRETER
from gems_compile.lowering.load import Pool
from gems_compile.lowering.source import Source

TARGETS = {
    "sm_80": ["cuda", 80, 32],
    "sm_90": ["cuda", 90, 32],
    "gfx942": ["hip", "gfx942", 64],
}
#: one of so many kernels is compiled a day
SHARES = {"sm_80": 4, "sm_90": 2, "gfx942": 4}
SHARES_OF_SINGLES = {"sm_90": 3, "gfx942": 4}


# programs -----------------------------------------------------------------------------------------


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def ids(*shape: int, high: int) -> Tensor:
    return torch.randint(0, high, shape)


def with_gradients(fn: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """fn and the gradients of its floating operands, in one graph."""

    def both(*args: Tensor) -> list[Tensor]:
        places = [k for k, a in enumerate(args) if a.is_floating_point()]

        def of_floats(*floats: Tensor) -> Tensor:
            own = dict(zip(places, floats, strict=True))
            return fn(*(own.get(k, a) for k, a in enumerate(args)))

        y, gradients = torch.func.vjp(of_floats, *(args[k] for k in places))
        return [y, *gradients(torch.ones_like(y))]

    return both


def layer_norm_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x, (x.shape[-1],), w, b)) + x


def rms(x: Tensor, w: Tensor) -> Tensor:
    return w * (x.float() * (x.float().pow(2).mean(-1, True) + 1e-6).rsqrt()).to(x.dtype)


def rope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = q.shape[-1] // 2
    return q * cos + torch.cat([-q[..., half:], q[..., :half]], -1) * sin


def attention_weights(s: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(s * 0.125 + mask, -1)


def batch_norm(x: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor) -> Any:
    out = torch.ops.aten._native_batch_norm_legit_functional.default(x, w, b, m, v, True, 0.1, 1e-5)
    return [torch.relu(out[0]), *out[1:]]


def dropout(x: Tensor) -> Any:
    y, kept = torch.ops.aten.native_dropout.default(x, 0.1, True)
    return y + x, kept


def numbers(x: Tensor) -> list[Tensor]:
    """What eager mode draws in the dtype of x, and whole numbers."""
    names = ("uniform", "normal_functional", "exponential", "cauchy", "log_normal")
    floats = [DRAWS[f"aten.{name}.default"](x) for name in names]
    return [*floats, DRAWS["aten.bernoulli.p"](x, 0.3), DRAWS["aten.randint.low"](-3, 9, x.shape)]


def embed(tokens: Tensor, table: Tensor, places: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(table[tokens] + places, (places.shape[-1],), w)


def gemm_free_block(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up + x


def scatters(x: Tensor, y: Tensor, w: Tensor, i: Tensor) -> list[Tensor]:
    counts = torch.zeros_like(i)
    return [
        torch.zeros_like(x).index_add(0, i, y * w[:, None]),
        torch.zeros_like(x, dtype=torch.float16).index_add(0, i, y.half() * 2),
        torch.zeros_like(x).index_put((i,), y.exp(), accumulate=True) + 1,
        (x * 2).index_copy(0, i, y * 3),
        counts.scatter_add(0, i // 2, i + 1),
        counts.int().scatter_reduce(0, i // 2, (i + 1).int(), "amax"),
        torch.zeros_like(x).scatter(1, i[:3].expand(64, 3), x[:, :3] * 2) + x,
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> list[Tensor]:
    """Forward and backward, causal with heads that share keys, and with a bias."""
    out: list[Tensor] = []
    for more, causal in ((None, True), (bias, False)):
        how = causal, 0, 0.125, False, "flash"
        o, lse = torch.ops.gems.attention.default(q, k, v, more, *how)
        given = q, q, k, v, more, lse, (q * o).float().sum(-1, keepdim=True), *how
        out += [o, torch.ops.gems.attention_queries.default(*given)]
        out += torch.ops.gems.attention_keys.default(*given)
    return out


PROGRAMS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "layer_norm": (layer_norm_gelu, lambda: (rand(64, 1000), rand(1000), rand(1000))),
    "layer_norm_grad": (
        with_gradients(layer_norm_gelu),
        lambda: (rand(64, 768), rand(768), rand(768)),
    ),
    "layer_norm_long": (layer_norm_gelu, lambda: (rand(600, 20000), rand(20000), rand(20000))),
    "rms": (rms, lambda: (rand(64, 2048), rand(2048))),
    "rms_grad": (with_gradients(rms), lambda: (rand(64, 2048), rand(2048))),
    "softmax": (attention_weights, lambda: (rand(2, 8, 128, 128), rand(128, 128))),
    "softmax_grad": (
        with_gradients(attention_weights),
        lambda: (rand(2, 4, 64, 64), rand(64, 64)),
    ),
    "softmax_long": (lambda x: torch.softmax(x, -1), lambda: (rand(600, 20000),)),
    "softmax_few_rows": (lambda x: torch.softmax(x, -1), lambda: (rand(4, 40000),)),
    "layer_norm_few_rows": (layer_norm_gelu, lambda: (rand(8, 65536), rand(65536), rand(65536))),
    "cross_entropy_few_rows": (F.cross_entropy, lambda: (rand(64, 128256), ids(64, high=9))),
    "log_softmax_dim1": (lambda x: torch.log_softmax(x, 1), lambda: (rand(4, 19, 64),)),
    "cross_entropy": (
        with_gradients(lambda x, t: F.cross_entropy(x.float(), t)),
        lambda: (rand(64, 5000), ids(64, high=5000)),
    ),
    "cross_entropy_long": (
        lambda x, t: F.cross_entropy(x.float(), t),
        lambda: (rand(8, 50257), ids(8, high=50257)),
    ),
    "rope": (rope, lambda: (rand(2, 8, 64, 64), rand(64, 64), rand(64, 64))),
    "rope_grad": (
        with_gradients(rope),
        lambda: (rand(2, 8, 64, 64), rand(64, 64), rand(64, 64)),
    ),
    "rope_pair": (
        lambda q, k, cos, sin: (rope(q, cos, sin), rope(k, cos, sin)),
        lambda: (rand(2, 8, 64, 64), rand(2, 2, 64, 64), rand(64, 64), rand(64, 64)),
    ),
    "frame": (
        lambda x, scale: F.pad(F.relu(x * scale + 1), (1, 1, 1, 1)) * 0.5,
        lambda: (rand(16, 64, 24, 24), rand(64, 1, 1)),
    ),
    "swiglu": (with_gradients(gemm_free_block), lambda: (rand(64, 512),) * 3),
    "batch_norm": (
        batch_norm,
        lambda: (rand(8, 16, 14, 14), *(rand(16, dtype=torch.float32) for _ in range(4))),
    ),
    "group_norm": (
        with_gradients(lambda x, w, b: F.silu(F.group_norm(x, 4, w, b))),
        lambda: (rand(4, 32, 14, 14), rand(32), rand(32)),
    ),
    "cat_of_long_parts": (
        lambda a, b: torch.cat([F.gelu(a), b.sigmoid() * 2], 1) - 1,
        lambda: (rand(40, 2048), rand(40, 2056)),
    ),
    "dropout": (dropout, lambda: (rand(64, 512),)),
    "numbers": (numbers, lambda: (rand(64, 512),)),
    "wide numbers": (numbers, lambda: (rand(37, dtype=torch.float64),)),
    "transpose": (
        lambda x, y: (x.transpose(0, 1) * 2 + y).contiguous(),
        lambda: (rand(512, 256), rand(256, 512)),
    ),
    "heads": (
        lambda x: torch.relu(x.view(4, 64, 8, 32).permute(0, 2, 1, 3)),
        lambda: (rand(4, 64, 256),),
    ),
    "embedding": (
        embed,
        lambda: (ids(4, 64, high=1000), rand(1000, 256), rand(64, 256), rand(256)),
    ),
    "column_sum": (lambda x: (x * 2).sum(0), lambda: (rand(4096, 300),)),
    "full_sum": (lambda x: (x.float() ** 2).sum(), lambda: (rand(300, 500),)),
    "full_max": (lambda x: x.amax(), lambda: (rand(3000, 500),)),
    "argmax": (lambda x: x.argmax(-1), lambda: (rand(64, 1000),)),
    "argmax_long": (lambda x: x.argmax(-1), lambda: (rand(4, 40000),)),
    "var_mean": (lambda x: torch.var_mean(x.float(), -1), lambda: (rand(64, 300),)),
    "any_long": (lambda x: (x > 0).any(-1), lambda: (rand(4, 40000),)),
    "logsumexp_long": (lambda x: torch.logsumexp(x.float(), -1), lambda: (rand(600, 20000),)),
    "cat_pad": (lambda x, y: F.pad(torch.cat([x, y], 1) * 2, (1, 2)), lambda: (rand(32, 40),) * 2),
    "integers": (
        lambda i: ((i * 3 + 1) % 7, (i // 2).cumsum(0), i.sum(-1)),
        lambda: (ids(64, 100, high=99),),
    ),
    "scans": (
        lambda x: (
            (x * 2).cumsum(-1) - x.sum(-1, keepdim=True),
            x.cummax(-1),
            x.float().logcumsumexp(-1),
        ),
        lambda: (rand(64, 300),),
    ),
    "scans_long": (
        lambda x: ((x * 2).cumsum(-1) / x.sum(-1, keepdim=True), x.cummin(-1)),
        lambda: (rand(600, 20000),),
    ),
    "scans_of_columns": (
        lambda x: ((x * 2).cumprod(0), (x + 1).float().logcumsumexp(0)),
        lambda: (rand(4096, 300),),
    ),
    "scans_of_truth": (lambda x: (x > 0).cumsum(-1) * 2, lambda: (rand(64, 300),)),
    "best": (lambda x: ((x * 2).max(-1), (x + 1).min(0)), lambda: (rand(600, 300),)),
    "windows": (
        lambda x: ((x * 2).unfold(1, 4, 2).sum(-1), F.pad(x[None], (2, 1), mode="reflect") + 1),
        lambda: (rand(64, 300),),
    ),
    "parts": (
        lambda x, y: torch.slice_scatter(x * 2, y, 1, 1, 299, 3).repeat(2, 1) + 1,
        lambda: (rand(64, 300), rand(64, 100)),
    ),
    "masks": (
        lambda i, x: torch.where((i[:, None] >= i[None, :]) & (x > 0), x, -1e4),
        lambda: (ids(64, high=99), rand(64, 64)),
    ),
    "attention": (
        attention,
        lambda: (rand(2, 4, 200, 64), rand(2, 2, 300, 64), rand(2, 2, 300, 64), rand(200, 300)),
    ),
    "scatters": (
        scatters,
        lambda: (rand(64, 256), rand(40, 256), rand(40), ids(40, high=64)),
    ),
}
DYNAMIC = (
    "layer_norm_grad",
    "rms",
    "softmax",
    "rope",
    "swiglu",
    "column_sum",
    "embedding",
    "scans",
    "scatters",
)


@functools.cache
def fused() -> dict[str, Source]:
    """Kernels of the programs, by key: bfloat16, with static and with symbolic sizes."""
    torch.use_deterministic_algorithms(False)  # under which scatters would be ATen's
    found = {}
    for name, (fn, inputs) in PROGRAMS.items():
        for dynamic in (False, True)[: 1 + (name in DYNAMIC)]:
            found.update({s.key: s for s in sources(trace(fn, *inputs(), dynamic=dynamic))})
    return found


def _singles() -> Iterator[Source]:
    for name in OPS:
        for call in calls(name)[:1] if not FULL else calls(name):
            for dtype in _dtypes(name):
                yield from sources(one_node(overload(name), *make(call, dtype)).graph)


def _dtypes(name: str) -> list[str]:
    wanted = ("float32", "bfloat16", "float16") if FULL else ("float32", "bfloat16")
    return [d for d in wanted if d in OPS[name].dtypes] or list(OPS[name].dtypes[:1])


@functools.cache
def single() -> dict[str, Source]:
    """Kernels of the declared ops, each alone; of tensors on the CPU also where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opcheck, "DEVICE", "cpu")
        return {s.key: s for s in _singles()}


def models_of_the_day() -> list[str]:
    """Every second one: to write all their kernels takes two minutes."""
    return list(models.MODELS) if FULL else sorted(models.MODELS)[SEED % 2 :: 2]


@functools.cache
def of_models() -> dict[str, Source]:
    """Kernels of a training step of the day's tiny models, static and with symbolic sizes.

    They are written, forward and backward, and then the model runs in eager mode.
    """
    wide = dataclasses.replace(INTERPRETER, multiprocessors=132)
    backend, found = Gems(), {}

    def write_only(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        backend(gm, inputs)
        found.update({s.key: s for r in backend.reports for s in r.sources})
        return gm.forward

    both = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with pytest.MonkeyPatch.context() as patch, both:
        patch.setattr("gems_compile.backend.current_target", lambda vendor: wide)
        for name in models_of_the_day():
            for dynamic in (False, True)[: 1 + (name in models.DYNAMIC)]:
                torch._dynamo.reset()
                run = torch.compile(models.build(name), backend=write_only, dynamic=dynamic)
                run(models.tokens(9))
    return found


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Two compile workers with a Triton cache of their own."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    pool = Pool(2)
    try:
        yield pool
    finally:
        pool.close()
        del os.environ["TRITON_CACHE_DIR"]
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before


def compile_all(kernels: dict[str, Source], target: list[Any], workers: Pool, folder: Path) -> None:
    answers = {}
    for key, source in kernels.items():
        path = folder / f"{key}.py"
        path.write_text(source.text)
        answers[key] = workers.submit({"path": str(path), "meta": source.meta, "target": target})
    failed = []
    for key, answer in answers.items():
        error = answer.get()
        if error is not None:
            failed.append(f"{kernels[key].name}: {error}\n{kernels[key].text}")
        elif not (folder / f"{key}.json").exists():
            failed.append(f"{kernels[key].name}: no binary was written")
    assert not failed, f"{len(failed)} of {len(kernels)} failed, the first: {failed[0]}"


def of_the_day(kernels: dict[str, Source], shares: int) -> dict[str, Source]:
    """One of ``shares`` kernels, by their keys; another one tomorrow."""
    if FULL:
        return kernels
    print(f"of {len(kernels)} kernels one in {shares}: GEMS_TEST_SEED={SEED}")
    return {key: s for key, s in kernels.items() if (int(key[:8], 16) + SEED) % shares == 0}


@pytest.mark.parametrize("target", TARGETS)
def test_fused_programs(target: str, workers: Pool, tmp_path: Path) -> None:
    compile_all(of_the_day(fused(), SHARES[target]), TARGETS[target], workers, tmp_path)


@pytest.mark.parametrize("target", SHARES_OF_SINGLES)
def test_single_ops(target: str, workers: Pool, tmp_path: Path) -> None:
    kernels = of_the_day(single(), SHARES_OF_SINGLES[target])
    compile_all(kernels, TARGETS[target], workers, tmp_path)


@pytest.mark.model
@pytest.mark.skipif(opcheck.DEVICE != "cpu", reason="a GPU compiles them for itself")
def test_models(workers: Pool, tmp_path: Path) -> None:
    """In one test, for writing them takes longer than compiling them."""
    for name, target in TARGETS.items():
        folder = tmp_path / name
        folder.mkdir()
        compile_all(of_the_day(of_models(), SHARES[name]), target, workers, folder)


def test_functions_of_users(workers: Pool, tmp_path: Path) -> None:
    """Whose text holds what workers cannot import; two results are computed together."""
    graph = trace(
        lambda dz, x, y: [t.relu() for t in authored.gelu_and_mul_backward(dz, x, y)],
        *(rand(64, 1000) for _ in range(3)),
    )
    kernels = {s.key: s for s in sources(graph)}
    (source,) = kernels.values()
    for name, target in TARGETS.items():
        (tmp_path / name).mkdir()
        compile_all(kernels, target, workers, tmp_path / name)
    made = Path(os.environ["TRITON_CACHE_DIR"]).rglob(f"{source.name}.ttir")
    texts = [path.read_text() for path in made]
    assert {text.count("erf") for text in texts} == {1}


def test_dropout_moves_no_element_between_threads(workers: Pool, tmp_path: Path) -> None:
    """Its words are made and joined in the registers of the thread that has their elements."""
    programs = {
        "flat": lambda x, row: torch.native_dropout(x, 0.1, True)[0],
        "two axes": lambda x, row: torch.native_dropout(x + row, 0.1, True)[0],
    }
    for name, fn in programs.items():
        (source,) = sources(trace(fn, rand(2048, 4096), rand(4096)), "cuda")
        folder = tmp_path / name
        folder.mkdir()
        compile_all({source.key: source}, TARGETS["sm_90"], workers, folder)
        facts = json.loads((folder / f"{source.key}.json").read_text())
        assert ", 0, True)" in source.text and facts["shared"] == 0


def test_odd_rows_are_moved_in_vectors(workers: Pool, tmp_path: Path) -> None:
    """A row of 50257 begins at any even address; the loads are of 16 bytes all the same."""
    programs = {
        "looped": lambda x, scale: torch.softmax(x, -1),
        "by rows": lambda x, scale: x * scale,
    }
    for name, fn in programs.items():
        (source,) = sources(trace(fn, rand(300, 50257), rand(300, 1)))
        folder = tmp_path / name
        folder.mkdir()
        compile_all({source.key: source}, TARGETS["sm_90"], workers, folder)
        # kernels of other tests may have this name
        made = Path(os.environ["TRITON_CACHE_DIR"]).rglob(f"{source.name}.ptx")
        text = max(made, key=lambda path: path.stat().st_mtime_ns).read_text()
        assert re.search(r"ld\.global\S*\.v4\.b32", text), name
        assert len(re.findall(r"ld\.global\S*\.b16", text)) <= 1, name  # a row's own number


def assembly(fn: Callable[..., Any], *inputs: Tensor, workers: Pool, folder: Path) -> str:
    """The PTX of fn's one kernel for an H200."""
    (source,) = sources(trace(fn, *inputs), "cuda")
    folder.mkdir()
    compile_all({source.key: source}, TARGETS["sm_90"], workers, folder)
    made = Path(os.environ["TRITON_CACHE_DIR"]).rglob(f"{source.name}.ptx")
    return max(made, key=lambda path: path.stat().st_mtime_ns).read_text()


def test_a_row_is_divided_by_one_reciprocal(workers: Pool, tmp_path: Path) -> None:
    """Divisions stand behind a branch that usual numbers do not take, four by four."""

    def scaled(x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True)

    programs = {
        "in a row": (scaled, [rand(300, 4096)]),
        "by rows": (lambda x, s: x / s, [rand(300, 4096), rand(300, 1)]),
    }
    for name, (fn, inputs) in programs.items():
        text = assembly(fn, *inputs, workers=workers, folder=tmp_path / name)
        branches = len(re.findall(r"@!odd bra done", text))
        assert branches, name
        assert len(re.findall(r"div\.rn\.f32", text)) == 4 * branches + 1, name
