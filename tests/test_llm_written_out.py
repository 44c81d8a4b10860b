"""What models write out in torch's own ops comes to as few kernels as ``gems_compile.llm``, and to
the same numbers: rewrites and fusion see to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, compile_, gems_only, ints, rand
from llm_cases import CASES, Case
from torch import Tensor, nn

import gems_compile
from gems_compile import llm, own_ops

pytestmark = gems_only

#: cases that are written as models write them (those of rotary embeddings are further down)
PLAIN = [
    case
    for case in CASES
    if not case.name.startswith(("rotary", "linear_cross_entropy", "topk"))
    and case.name != "cross_entropy_none"  # torch's takes a softcap apart from its statistics
]


def trained(fn: Callable[..., Any], args: Sequence[Tensor], **options: Any) -> tuple[Any, int]:
    """Results and gradients of the compiled function, and how many kernels and calls they took."""
    torch._dynamo.reset()
    before = len(gems_compile.reports())
    leaves = [a for a in args if a.requires_grad]
    out = compile_(fn, **options)(*args)
    out = [out] if isinstance(out, Tensor) else list(out)
    used = [t for t in out if t.requires_grad]
    torch.manual_seed(5)
    grads = torch.autograd.grad(used, leaves, [torch.randn(t.shape).to(t) for t in used])
    reports = gems_compile.reports()
    reports = reports[before:] if len(reports) > before else reports
    return [*out, *grads], sum(r.launches + r.aten_calls for r in reports)


def alike(fn: Callable[..., Any], plain: Callable[..., Any], args: Sequence[Tensor]) -> None:
    """Equal numbers of kernels; numbers that differ by what two roundings in bfloat16 are."""
    (got, launches), (want, written_out) = trained(fn, args), trained(plain, args)
    assert written_out == launches
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", PLAIN, ids=[case.name for case in PLAIN])
def test_as_few_kernels(case: Case) -> None:
    alike(case.fn, case.reference, case.make(torch.bfloat16))


# rotary embeddings as transformers writes them ----------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    """Llama, Qwen, Mistral, GPT-NeoX."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    """GPT-J, Cohere."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


@pytest.mark.parametrize("rotate", [rotate_half, rotate_pairs])
def test_rotary(rotate: Callable[[Tensor], Tensor]) -> None:
    def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return llm.apply_rotary(q, k, cos, sin, interleaved=rotate is rotate_pairs)

    q, k = (rand(2, heads, 7, 16, dtype=torch.bfloat16, grad=True) for heads in (4, 2))
    angles = torch.randn(2, 7, 8).to(DEVICE)
    angles = (
        torch.cat([angles] * 2, -1) if rotate is rotate_half else angles.repeat_interleave(2, -1)
    )
    alike(fused, plain, [q, k, angles.cos().bfloat16(), angles.sin().bfloat16()])


# what a rewrite does ------------------------------------------------------------------------------


def fired() -> list[str]:
    """The rewrites in all graphs; a forward and its backward have one log."""
    logs = {id(r.rewrites): r.rewrites for r in gems_compile.reports() if r.rewrites}
    return [f.rule for log in logs.values() for f in log.fired]


def test_mixtral_router() -> None:
    """The op without its division, which models may write in place."""

    def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), 2, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype), chosen

    def fused(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = llm.topk_softmax(logits, 2, renormalize=False)
        return (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), chosen

    logits = torch.linspace(-3, 3, 40, device=DEVICE)[torch.randperm(40)].view(5, 8)
    logits = logits.bfloat16().requires_grad_()
    alike(fused, plain, [logits])
    assert "routing" in fired()


class Causal(nn.Module):
    """A projection to the vocabulary and the loss, as ``transformers`` computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(24, 37, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.lm_head(hidden).float()
        labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return F.cross_entropy(logits.view(-1, 37), labels.view(-1), ignore_index=-100)


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_never_whole_where_memory_counts(autocast: bool) -> None:
    torch.manual_seed(0)
    model = Causal().to(DEVICE, torch.float32 if autocast else torch.bfloat16)
    hidden = rand(2, 6, 24, dtype=model.lm_head.weight.dtype, grad=True)
    args = [hidden, model.lm_head.weight, ints(2, 6, high=37)]

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return torch.func.functional_call(model, {"lm_head.weight": weight}, (hidden, labels))

    want, _ = trained(loss, args)
    assert fired() == []
    own_ops._handlers.clear()
    got, _ = trained(loss, args, options={"rewrites": "memory"})
    assert fired() == ["linear_cross_entropy"]
    assert own_ops.stats()["cross_entropy_with_gradient"]["ours"] == 1
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_lengths_that_vary_compile_once() -> None:
    model = Causal().to(DEVICE)
    compiled = torch.compile(model, backend="gems", dynamic=True, options={"rewrites": "memory"})
    for length in (6, 9, 11):
        args = rand(2, length, 24, grad=True), ints(2, length, high=37)
        torch.testing.assert_close(compiled(*args), model(*args))
    assert fired().count("linear_cross_entropy") == 1


def test_inference_computes_no_gradients() -> None:
    model, args = Causal().to(DEVICE), (rand(2, 6, 24), ints(2, 6, high=37))
    compiled = torch.compile(model, backend="gems", options={"rewrites": "memory"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), model(*args))
    assert "linear_cross_entropy" in fired()


def test_float16_keeps_its_logits() -> None:
    model = Causal().to(DEVICE, torch.float16)
    args = rand(2, 6, 24, dtype=torch.float16), ints(2, 6, high=37)
    torch.compile(model, backend="gems", options={"rewrites": "memory"})(*args)
    (miss,) = [m for r in gems_compile.reports() for m in r.rewrites.near_misses][:1]
    assert "float16, whose gradients a scaled loss keeps" in miss.reason


@pytest.mark.gpu
def test_peak_memory() -> None:
    """All logits, in float32 with their gradient, would take 1.5 GiB."""
    weight = rand(32768, 256, dtype=torch.bfloat16, grad=True)
    hidden = rand(4096, 256, dtype=torch.bfloat16, grad=True)
    target = ints(4096, high=32768)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), target)

    step = torch.compile(loss, backend="gems", options={"rewrites": "memory"})
    step(hidden, weight, target).backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(hidden, weight, target).backward()
    assert torch.cuda.max_memory_allocated() - before < 2**27


def test_a_dump_runs_by_itself(tmp_path: Path) -> None:
    """In a process that knows the ops of the graph alone."""
    model, args = Causal().to(DEVICE), (rand(2, 6, 24), ints(2, 6, high=37))
    with torch.no_grad():
        compile_(model, options={"rewrites": "memory", "dump": str(tmp_path)})(*args)
    (file,) = tmp_path.rglob("00_aten.py")
    assert "gems.linear_cross_entropy" in file.read_text()
    assert "linear_cross_entropy: " in (file.parent / "rewrites.txt").read_text()
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("result 0: float32[]")
