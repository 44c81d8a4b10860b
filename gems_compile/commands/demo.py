"""``python -m gems_compile demo``: a small Llama-style model, eager beside gems, and its dump.

Forward without gradients, then one training step: loss, backward, optimizer. The same weights and
tokens go through both; the largest difference of each result is printed and checked.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..backend import Gems
from ..dynamo import Watch
from ..explain import Explanation
from ..tables import Table, show

# The model: plain PyTorch, as one writes it; the rewrites find the norm and the attention in it.


@dataclass(frozen=True)
class Size:
    """Heads share ``kv_heads`` keys and values; a head is ``dim // heads`` wide."""

    layers: int = 2
    dim: int = 32
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 64
    vocabulary: int = 96
    batch: int = 2
    length: int = 16


TINY = Size()
LARGE = Size(
    layers=4, dim=1024, heads=16, kv_heads=4, hidden=2816, vocabulary=8192, batch=4, length=1024
)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: the two halves of each head as the two parts of complex numbers, turned."""
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-two, one), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.kv_heads = size.heads, size.kv_heads
        self.width = size.dim // size.heads
        self.q = nn.Linear(size.dim, size.dim, bias=False)
        self.k = nn.Linear(size.dim, self.kv_heads * self.width, bias=False)
        self.v = nn.Linear(size.dim, self.kv_heads * self.width, bias=False)
        self.out = nn.Linear(size.dim, size.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = self.q(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.width) + mask
        mixed = torch.matmul(torch.softmax(scores, dim=-1), v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


class SwiGLU(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate = nn.Linear(size.dim, size.hidden, bias=False)
        self.up = nn.Linear(size.dim, size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(size.dim), Attention(size)
        self.mlp_norm, self.mlp = RMSNorm(size.dim), SwiGLU(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Tokens [batch, length] -> (logits [batch, length, vocabulary], loss)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.dim)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.dim)
        self.width = size.dim // size.heads
        nn.init.normal_(self.embedding.weight, std=0.02 if size.dim > 64 else 0.2)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        length, device = tokens.shape[1], tokens.device
        place = torch.arange(length, device=device, dtype=torch.float32)
        pair = torch.arange(0, self.width, 2, device=device, dtype=torch.float32)
        angle = place[:, None] * 10000.0 ** (-pair / self.width)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = torch.full((length, length), float("-inf"), device=device, dtype=x.dtype).triu(1)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        logits = F.linear(self.norm(x), self.embedding.weight)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss


# Running it --------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one side computed: result name -> tensor."""

    values: dict[str, Tensor]
    seconds: dict[str, float]
    calls: dict[str, int]  # stage -> ATen calls that compute something, seen in eager mode


class _Calls(TorchDispatchMode):
    """Counts ATen calls, less those whose result is a view."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        infos = [r.alias_info for r in func._schema.returns]
        self.count += not any(i is not None and not i.is_write for i in infos)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Check:
    """``error`` is that of the worst tensor of this kind. ``eager`` is eager's own, against
    float32; None where eager already runs in float32.
    """

    name: str
    error: float
    limit: float
    eager: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class Result:
    explanation: Explanation
    eager_calls: dict[str, int]
    checks: tuple[Check, ...]
    first_call_seconds: dict[str, float]
    milliseconds: dict[str, dict[str, float]]
    dump: str | None
    device: str
    dtype: str

    @property
    def passed(self) -> bool:
        failures = any(g.failures for g in self.explanation.graphs)
        return bool(self.explanation.graphs) and not failures and all(c.passed for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "device": self.device,
            "dtype": self.dtype,
            "dump": self.dump,
            "eager_calls": self.eager_calls,
            "checks": [{**asdict(c), "passed": c.passed} for c in self.checks],
            "first_call_seconds": self.first_call_seconds,
            "milliseconds": self.milliseconds,
            "explanation": self.explanation.to_dict(),
        }


def run(
    size: Size | None = None,
    dump: str | None = "gems_dump",
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Both sides, compared; on a GPU in bfloat16 and timed, else in float32."""
    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    size = size or (LARGE if gpu else TINY)
    torch.manual_seed(0)
    master = Llama(size).to(device)
    tokens = torch.randint(size.vocabulary, (size.batch, size.length + 1), device=device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def model(kind: torch.dtype = dtype) -> Llama:
        return copy.deepcopy(master).to(kind)

    weights = sum(p.numel() for p in master.parameters())
    where = f"{_word(dtype)}, on {_device_name(device)}"
    say(f"a Llama-style model with {weights:,} parameters, {where}")
    say("eager runs forward and one training step ...")
    eager = _both(model(), batch, counting=True)
    reference = _both(model(torch.float32), batch) if gpu else None
    backend, watch = Gems(fresh=True), Watch()
    options: dict[str, Any] | None = {"dump": dump} if dump else None
    compiled: Any = torch.compile(model(), backend=backend, options=options)
    with watch:
        found = _both(compiled, batch, lambda text: say(f"gems:  {text}"))
    checks = tuple(_checks(found, eager, reference))
    milliseconds = _timed(model(), compiled, batch, say) if gpu else {}
    return Result(
        Explanation.of(backend, "A Llama-style model", watch),
        eager.calls,
        checks,
        found.seconds,
        milliseconds,
        os.path.abspath(dump) if dump else None,
        _device_name(device),
        _word(dtype),
    )


def _both(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    say: Callable[[str], None] = lambda text: None,
    counting: bool = False,
) -> Seen:
    """A forward without gradients, then a training step."""
    values: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}

    def stage(name: str, what: Callable[[], Any]) -> Any:
        say(f"{name} compiles and runs ...")
        start = time.perf_counter()
        with _Calls() if counting else contextlib.nullcontext() as counter:
            out = what()
        _wait()
        seconds[name] = time.perf_counter() - start
        calls[name] = counter.count if counter is not None else 0
        say(f"{name} took {seconds[name]:.1f} s")
        return out

    with torch.no_grad():
        logits, loss = stage("forward", lambda: model(*batch))
    values["logits"], values["loss"] = logits, loss
    logits, loss = stage("forward with gradients", lambda: model(*batch))
    values["training loss"] = loss.detach()
    stage("backward", loss.backward)
    parameters = dict(getattr(model, "_orig_mod", model).named_parameters())
    values.update({f"gradient {name}": p.grad for name, p in parameters.items()})
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    values.update({f"updated {name}": p.detach() for name, p in parameters.items()})
    return Seen({name: t.detach().clone() for name, t in values.items()}, seconds, calls)


ROUNDING = 2.0**-8  # of one value to bfloat16
KINDS = {
    "output": ("logits",),
    "loss": ("loss", "training loss"),
    "gradients": ("gradient",),
    "updated parameters": ("updated",),
}


def _checks(found: Seen, eager: Seen, reference: Seen | None) -> list[Check]:
    """In float32: gems against eager, the largest difference over the largest value. In bfloat16:
    both against float32, by norms, where eager's own error is the measure."""
    checks = []
    for kind, starts in KINDS.items():
        names = [n for n in eager.values if n.startswith(starts)]
        if reference is None:
            checks.append(Check(kind, _worst(_difference, found, eager, names), 1e-4))
        else:
            own = _worst(_distance, eager, reference, names)
            error = _worst(_distance, found, reference, names)
            checks.append(Check(kind, error, 1.2 * own + ROUNDING, own))
    return checks


Measure = Callable[[Tensor, Tensor], float]


def _worst(measure: Measure, found: Seen, wanted: Seen, names: list[str]) -> float:
    errors = [measure(found.values[n], wanted.values[n]) for n in names]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """norm(found - wanted) / norm(wanted)."""
    difference = (found.double() - wanted.double()).norm()
    return (difference / wanted.double().norm().clamp_min(1e-30)).item()


def _difference(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted| / max |wanted|."""
    difference = (found.double() - wanted.double()).abs().max()
    return (difference / wanted.double().abs().max().clamp_min(1e-30)).item()


def _timed(
    eager: nn.Module, compiled: Any, batch: tuple[Tensor, Tensor], say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Median milliseconds on the GPU, {what: {"eager": ms, "gems": ms}}."""
    say("timing both")

    def forward(model: Any) -> None:
        with torch.no_grad():
            model(*batch)

    def step(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        model(*batch)[1].backward()

    return {
        name: {"eager": _median(what, eager), "gems": _median(what, compiled)}
        for name, what in (("forward", forward), ("forward and backward", step))
    }


def _median(what: Callable[[Any], None], model: Any, rounds: int = 20) -> float:
    times = []
    for k in range(rounds + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        what(model)
        end.record()
        end.synchronize()
        if k >= 5:
            times.append(start.elapsed_time(end))
    return sorted(times)[rounds // 2]


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return "the CPU"


# Printing it -------------------------------------------------------------------------------------


def main(dump: str | None, as_json: bool) -> int:
    """Run the demo and print it; the exit code is 0 if gems agreed with eager."""
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {text}", file=sys.stderr, flush=True)

    result = run(dump=dump, say=say)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
        return 0 if result.passed else 1
    print(flush=True)
    show([*result.explanation.blocks(), *_result_blocks(result)])
    return 0 if result.passed else 1


def _result_blocks(result: Result) -> list[Table | str]:
    blocks: list[Table | str] = [_beside_eager(result), _check_table(result)]
    if result.milliseconds:
        rows: list[Sequence[Any]] = [
            (what, ms["eager"], ms["gems"], f"{ms['eager'] / ms['gems']:.2f}x")
            for what, ms in result.milliseconds.items()
        ]
        title = f"Milliseconds a call, median, on {result.device}"
        blocks.append(Table(title, ("", "eager", "gems", "speed"), rows))
    else:
        blocks.append(
            "The kernels ran in Triton's interpreter: it shows that they are right, and "
            "says nothing about speed."
        )
    if result.dump:
        blocks.append(
            f"Every stage is in {result.dump}: the graph after each pass as Python that "
            "runs by itself, the plan, and each kernel with the lines of the model it "
            "came from. Start with graph_01_forward/plan.txt."
        )
    good = "gems agrees with eager." if result.passed else "gems does NOT agree with eager."
    return [*blocks, good]


def _beside_eager(result: Result) -> Table:
    """Calls of each stage. Both sides' ATen calls count only where they compute something."""
    columns = ("", "eager calls", "gems kernels", "gems ATen calls", "first call s")
    rows: list[Sequence[Any]] = []
    graphs = result.explanation.graphs
    for (stage, eager), kind in zip(
        result.eager_calls.items(), ("inference", "forward", "backward"), strict=True
    ):
        mine = [g for g in graphs if g.kind == kind]
        rows.append(
            (
                stage,
                eager,
                sum(g.launches for g in mine),
                sum(g.aten_calls for g in mine),
                result.first_call_seconds[stage],
            )
        )
    return Table("Calls of eager beside gems (views not counted)", columns, rows)


def _check_table(result: Result) -> Table:
    against = "float32" if result.checks[0].eager is not None else "eager"
    columns = ["result", f"gems against {against}", "allowed", ""]
    rows: list[Any] = []
    for c in result.checks:
        rows.append([c.name, f"{c.error:.1e}", f"{c.limit:.1e}", "ok" if c.passed else "WRONG"])
        if c.eager is not None:
            rows[-1].insert(1, f"{c.eager:.1e}")
    title = "Largest error, relative to the largest value"
    if against == "float32":
        columns.insert(1, "eager against float32")
        title = "Largest error: the norm of the difference over the norm"
    return Table(title, columns, rows)
