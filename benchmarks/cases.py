"""The models that are timed: names, shapes, and how to build each with random weights.

A case holds a model, its inputs and how to take one step. Nothing is downloaded: transformers
models come from configs, timm models from their names.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SEED = 1234


@dataclass
class Case:
    """A model in train or eval mode, its keyword inputs, and what winds its state back."""

    model: nn.Module
    inputs: dict[str, Any]
    training: bool
    reset: Callable[[], None] = lambda: None
    max_batch: int = 64  # steps between two resets
    params: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.model.train(self.training)
        self.params = list(self.model.parameters())

    def step(self, run: Callable[..., Any]) -> dict[str, torch.Tensor]:
        """One step through ``run``, the model or its compiled form: logits, and loss in training.

        A training step is forward and backward, from gradients set to None.
        """
        if not self.training:
            with torch.no_grad():
                return outputs(run(**self.inputs))
        for param in self.params:
            param.grad = None
        out = outputs(run(**self.inputs))
        out["loss"].backward()
        return out

    def upcast(self, dtype: torch.dtype) -> Case:
        """The same weights, buffers and inputs in a wider dtype; nothing is shared."""
        for param in self.params:
            param.grad = None
        self.reset()
        inputs = {name: upcast(value, dtype) for name, value in self.inputs.items()}
        return Case(copy.deepcopy(self.model).to(dtype), inputs, self.training)


@dataclass(frozen=True)
class Spec:
    """How to build one case: ``build(dtype, device, small, dropout)``."""

    build: Callable[[torch.dtype, torch.device, bool, bool], Case]
    package: str = "transformers"
    dropout: bool = False  # the step drops out, so its error is taken with p = 0


def outputs(out: Any) -> dict[str, torch.Tensor]:
    """The tensors that are compared: a model output's loss and logits, or a tensor as logits."""
    if isinstance(out, torch.Tensor):
        return {"logits": out}
    return {name: out[name] for name in ("loss", "logits") if out.get(name) is not None}


def upcast(value: Any, dtype: torch.dtype) -> Any:
    """A copy in ``dtype`` of a tensor or of a static cache; integers and flags stay."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, bool):
        return value
    cache = copy.deepcopy(value)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        layer.dtype = dtype
    return cache


def jitter(model: nn.Module) -> nn.Module:
    """Move every vector off its initial value.

    Fresh norm weights are ones, biases zeros and layer scales 1e-6: a kernel that ignored them
    would show no error.
    """
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.8, 1.2)
    return model


def token_ids(batch: int, length: int, vocab: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), device=device)


def from_config(auto: str, config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A transformers model with random weights made on the device, attention through SDPA."""
    import transformers

    torch.manual_seed(SEED)
    with torch.device(device):
        build = getattr(transformers, auto).from_config
        return jitter(build(config, dtype=dtype, attn_implementation="sdpa"))


def llama(
    dtype: torch.dtype, device: torch.device, small: bool, layers: int | None = None
) -> nn.Module:
    """The shape of Llama-3.2-1B: 16 layers, 32 query and 8 key heads of 64, vocabulary 128256."""
    from transformers import LlamaConfig

    size = dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
    )
    if small:
        size = dict(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=160,
        )
    if layers is not None:
        size["num_hidden_layers"] = layers
    rope = dict(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=32.0,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
    )
    config = LlamaConfig(
        **size,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters=rope,
    )
    return from_config("AutoModelForCausalLM", config, dtype, device)


def llama_prefill(dtype: torch.dtype, device: torch.device, small: bool, dropout: bool) -> Case:
    """2048 tokens of one sequence, all logits, no cache."""
    model = llama(dtype, device, small)
    ids = token_ids(1, 16 if small else 2048, model.config.vocab_size, device)
    return Case(model, dict(input_ids=ids, use_cache=False), training=False)


def llama_train(dtype: torch.dtype, device: torch.device, small: bool, dropout: bool) -> Case:
    """4 sequences of 2048 tokens with labels."""
    model = llama(dtype, device, small)
    shape = (2, 16) if small else (4, 2048)
    ids = token_ids(*shape, model.config.vocab_size, device)
    return Case(model, dict(input_ids=ids, labels=ids, use_cache=False), training=True)


def llama_layers(layers: int, training: bool) -> Callable[..., Case]:
    """Llama-3.2-1B with another number of layers, 512 tokens of one sequence, no cache.

    64 layers are 4.2 B parameters: in bfloat16 17 GB with their gradients.
    """

    def build(dtype: torch.dtype, device: torch.device, small: bool, dropout: bool) -> Case:
        model = llama(dtype, device, small, layers)
        ids = token_ids(1, 16 if small else 512, model.config.vocab_size, device)
        labels = dict(labels=ids) if training else {}
        return Case(model, dict(input_ids=ids, use_cache=False, **labels), training)

    return build


def llama_decode(dtype: torch.dtype, device: torch.device, small: bool, dropout: bool) -> Case:
    """One token against a static KV cache of 2048 positions whose first half is filled."""
    from transformers import StaticCache

    model = llama(dtype, device, small)
    config, length = model.config, 32 if small else 2048
    cache = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, dtype, device)
    if not hasattr(cache.layers[0], "cumulative_length"):
        raise RuntimeError("llama-1b-decode needs transformers 5, whose StaticCache counts tokens")
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    def reset() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length // 2)

    reset()
    token = token_ids(1, 1, config.vocab_size, device)
    inputs = dict(input_ids=token, past_key_values=cache, use_cache=True)
    return Case(model, inputs, training=False, reset=reset, max_batch=min(64, length // 2))


def bert(training: bool) -> Callable[..., Case]:
    """BERT-base with its masked-language-model head, 16 sequences of 512 tokens."""

    def build(dtype: torch.dtype, device: torch.device, small: bool, dropout: bool) -> Case:
        from transformers import BertConfig

        size = dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=120,
        )
        quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        config = BertConfig(**(size if small else {}), **({} if dropout else quiet))
        model = from_config("AutoModelForMaskedLM", config, dtype, device)
        shape = (2, 12) if small else (16, 512)
        inputs = dict(input_ids=token_ids(*shape, config.vocab_size, device))
        if training:
            inputs["labels"] = token_ids(*shape, config.vocab_size, device)
        return Case(model, inputs, training)

    return build


def gpt2_train(dtype: torch.dtype, device: torch.device, small: bool, dropout: bool) -> Case:
    """GPT-2 (124M), 8 sequences of 1024 tokens with labels; dropout 0.1, the config's default."""
    from transformers import GPT2Config

    size = dict(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=120)
    ends = dict(bos_token_id=0, eos_token_id=0)
    quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = GPT2Config(**(size | ends if small else {}), **({} if dropout else quiet))
    model = from_config("AutoModelForCausalLM", config, dtype, device)
    model.loss_type = "ForCausalLM"  # unset, transformers logs a warning that breaks the graph
    ids = token_ids(*((2, 16) if small else (8, 1024)), config.vocab_size, device)
    return Case(model, dict(input_ids=ids, labels=ids, use_cache=False), training=True)


def vit(training: bool) -> Callable[..., Case]:
    """ViT-B/16 at 224 x 224 with 1000 classes, 64 images."""

    def build(dtype: torch.dtype, device: torch.device, small: bool, dropout: bool) -> Case:
        from transformers import ViTConfig

        size = dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
        )
        config = ViTConfig(**(size if small else {}), num_labels=20 if small else 1000)
        model = from_config("AutoModelForImageClassification", config, dtype, device)
        batch = 2 if small else 64
        pixels = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
        inputs = dict(pixel_values=pixels.to(dtype))
        if training:
            inputs["labels"] = torch.randint(0, config.num_labels, (batch,), device=device)
        return Case(model, inputs, training)

    return build


class WithLoss(nn.Module):
    """A timm classifier and its cross entropy, with a transformers model's interface."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.model(x)
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def timm_case(
    name: str, training: bool, small_size: dict[str, Any], channels_last: bool
) -> Callable[..., Case]:
    """A timm model, 64 images of 224 x 224."""

    def build(dtype: torch.dtype, device: torch.device, small: bool, dropout: bool) -> Case:
        import timm

        torch.manual_seed(SEED)
        with torch.device(device):
            model = jitter(timm.create_model(name, **(small_size if small else {})))
        # small: batch norm's last maps still have 16 values a channel; over 2 it is chaotic
        batch, side, classes = (4, 64, small_size["num_classes"]) if small else (64, 224, 1000)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = model.to(dtype=dtype, memory_format=layout)
        x = torch.randn(batch, 3, side, side, device=device)
        inputs = dict(x=x.to(dtype=dtype, memory_format=layout))
        if training:
            inputs["labels"] = torch.randint(0, classes, (batch,), device=device)
        return Case(WithLoss(model) if training else model, inputs, training)

    return build


SMALL_RESNET = dict(layers=(1, 1, 1, 1), num_classes=20)
SMALL_CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(16, 24, 32, 48), num_classes=20)

CASES: dict[str, Spec] = {
    "llama-1b-prefill": Spec(llama_prefill),
    "llama-1b-decode": Spec(llama_decode),
    "llama-1b-train": Spec(llama_train),
    "bert-base-inference": Spec(bert(training=False)),
    "bert-base-train": Spec(bert(training=True), dropout=True),
    "gpt2-train": Spec(gpt2_train, dropout=True),
    "vit-b16-inference": Spec(vit(training=False)),
    "vit-b16-train": Spec(vit(training=True)),
    "resnet50-inference": Spec(timm_case("resnet50", False, SMALL_RESNET, True), package="timm"),
    "resnet50-train": Spec(timm_case("resnet50", True, SMALL_RESNET, True), package="timm"),
    "convnext-t-inference": Spec(
        timm_case("convnext_tiny", False, SMALL_CONVNEXT, False), package="timm"
    ),
}


LAYERED = re.compile(r"llama-(\d+)-layers-(train|inference)")


def spec_of(name: str) -> Spec:
    """One of ``CASES``, or Llama-3.2-1B with another number of layers (llama-64-layers-train)."""
    layered = LAYERED.fullmatch(name)
    if layered is None:
        return CASES[name]
    return Spec(llama_layers(int(layered[1]), training=layered[2] == "train"))


def names(wanted: str | None) -> list[str]:
    """The cases of a comma list; a name without its last word means all of them (resnet50).

    llama-N-layers-train and llama-N-layers-inference are cases only where they are named.
    """
    if wanted is None:
        return list(CASES)
    found: list[str] = []
    for word in filter(None, (part.strip() for part in wanted.split(","))):
        hits = [name for name in CASES if name == word or name.startswith(word + "-")]
        hits += [word] if LAYERED.fullmatch(word) else []
        if not hits:
            raise ValueError(f"--models {word}: no such model; there are {', '.join(CASES)}")
        found += [name for name in hits if name not in found]
    return found


def missing(package: str) -> str | None:
    """Why a case's package cannot be used here, or None."""
    if importlib.util.find_spec(package) is None:
        return f"{package} not installed"
    try:
        importlib.import_module(package)
    except Exception as error:  # timm without a working torchvision raises what it likes
        return f"{package} cannot be imported: {type(error).__name__}: {error}"
    return None
