"""Whole models: tiny `transformers` with random weights, and blocks in plain torch."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, Pair, assert_same, check, compile_, ints, no_new_graph, rand
from torch import nn

pytestmark = pytest.mark.model

VOCAB = 97
NEAR = {"rtol": 1e-4, "atol": 2e-5}  # float32 sums of up to a hundred terms, in another order
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
ENCODER = SMALL | {"max_position_embeddings": 64, "type_vocab_size": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# name -> (config class, model class, config)
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", DECODER),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", DECODER | {"sliding_window": 8}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | NO_DROPOUT_GPT2,
    ),
    "bert": ("BertConfig", "BertForMaskedLM", ENCODER | NO_DROPOUT),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
    "deberta": (
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        ENCODER
        | NO_DROPOUT
        | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
}


class WithLoss(nn.Module):
    """Tokens -> (loss, logits), with the tokens as their own labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        cached = hasattr(self.model.config, "use_cache")
        extra = {"use_cache": False} if cached else {}
        out = self.model(input_ids=tokens, labels=tokens, **extra)
        return out.loss, out.logits


def build(name, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    config_class, model_class, config = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    return WithLoss(model.to(DEVICE, dtype))


def tokens(length, batch=2):
    return ints(batch, length, high=VOCAB, low=2)


@pytest.mark.parametrize("name", MODELS)
def test_training(name):
    """Loss, logits and the gradient of every parameter."""
    check(build(name), tokens(9), fullgraph=False, **NEAR)


@pytest.mark.parametrize("name", MODELS)
def test_inference(name):
    check(build(name).eval(), tokens(9), fullgraph=False, context=torch.no_grad, **NEAR)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "t5")]


#: those whose dynamic graphs all targets' compilers see
DYNAMIC = ("llama", "gpt2", "bert")


@pytest.mark.parametrize("name", [*DYNAMIC, *SLOW])
def test_training_with_two_lengths(name):
    """dynamic=True: the second and third length run the graph of the first."""
    pair = Pair(build(name), dynamic=True, fullgraph=False)
    # Gemma2's gradients reach 60: eight float32 roundings of that. Eager's own distance from
    # float64 is 6e-7 of their norm, and so is ours.
    near = {**NEAR, "atol": 6e-5} if name == "gemma2" else NEAR
    pair(tokens(9), **near)
    with no_new_graph():
        pair(tokens(11), **near)
        pair(tokens(5, batch=3), **near)


@pytest.mark.parametrize("name", ["qwen3", "deberta"])
def test_inference_with_two_lengths(name):
    pair = Pair(build(name).eval(), dynamic=True, fullgraph=False)
    for length in (9, 13):
        pair(tokens(length), context=torch.no_grad, **NEAR)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_bfloat16_inference(name):
    """No farther from a float32 run than eager's bfloat16, plus one rounding."""
    model = build(name, torch.bfloat16).eval()
    exact = build(name).eval()
    exact.load_state_dict({key: t.float() for key, t in model.state_dict().items()})
    x = tokens(9)
    with torch.no_grad():
        want, eager = exact(x)[1], model(x)[1]
        got = compile_(model, fullgraph=False)(x)[1]
    assert got.dtype == eager.dtype

    def error(t):
        return ((t.float() - want).norm() / want.norm()).item()

    assert error(got) <= 1.2 * error(eager) + 2**-9


def test_padding_mask():
    model = build("bert").model.eval()
    mask = torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
    mask[1, 6:] = 0

    def fn(tokens, mask):
        return model(input_ids=tokens, attention_mask=mask).logits

    check(fn, tokens(9), mask, fullgraph=False, context=torch.no_grad, **NEAR)


def test_checkpointed_training():
    model = build("llama")
    model.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    check(model.train(), tokens(9), fullgraph=False, **NEAR)


def test_autocast_training():
    """All gradients together lie no farther from a float32 run than eager's, plus one rounding."""
    model, x = build("llama"), tokens(9)

    def gradients(run, autocast):
        model.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            loss = run(x)[0]
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    want = gradients(model, False)
    eager, got = gradients(model, True), gradients(compile_(model, fullgraph=False), True)
    assert (got - want).norm() <= 1.2 * (eager - want).norm() + 2**-9 * want.norm()


def test_dropout_training_runs_and_learns():
    """With dropout the numbers are ours: the loss falls, and every gradient is finite."""
    model = build("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    step = compile_(model.train(), fullgraph=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    x = tokens(9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = step(x)[0]
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def static_cache(config, length):
    cache = importlib.import_module("transformers").StaticCache
    return cache(config=config, max_cache_len=length)


def test_decoding_with_a_static_cache():
    """Prefill in eager, then three decoding steps: the logits, and the caches the steps wrote."""
    model = build("llama").model.eval()

    def step(tokens, cache, position):
        return model(
            input_ids=tokens,
            past_key_values=cache,
            cache_position=position,
            position_ids=position[None],
            use_cache=True,
        ).logits

    prompt, following = tokens(5, batch=1), tokens(3, batch=1)
    runs = []
    for run in (step, compile_(step, fullgraph=False)):
        cache = static_cache(model.config, 12)
        with torch.no_grad():
            out = [step(prompt, cache, torch.arange(5, device=DEVICE))]
            for i in range(3):
                position = torch.tensor([5 + i], device=DEVICE)
                out.append(run(following[:, i : i + 1], cache, position))
        runs.append([*out, *[t for layer in cache.layers for t in (layer.keys, layer.values)]])
    for want, got in zip(*runs, strict=True):
        assert_same(got, want, **NEAR)


def test_decoding_agrees_with_the_whole_sequence():
    """Eager and a growing cache on one side, one compiled forward on the other."""
    model = build("llama").model.eval()
    x = tokens(6, batch=1)
    with torch.no_grad():
        got = compile_(lambda t: model(input_ids=t, use_cache=False).logits, fullgraph=False)(x)
        past, rows = None, []
        for i in range(6):
            out = model(input_ids=x[:, i : i + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits)
    assert_same(got, torch.cat(rows, 1).clone(), **NEAR)


def test_generate_tokens_greedily():
    """Arg max over compiled logits picks eager's tokens."""
    model = build("qwen3").model.eval()
    logits = compile_(
        lambda t: model(input_ids=t, use_cache=False).logits, dynamic=True, fullgraph=False
    )
    with torch.no_grad():
        x = tokens(4)
        want = got = x
        for _ in range(3):
            new = model(input_ids=want, use_cache=False).logits[:, -1].argmax(-1)
            want = torch.cat([want, new[:, None]], 1)
            got = torch.cat([got, logits(got)[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(got, want)


# --- blocks in plain torch ------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Identity()
        if stride != 1 or width != out:
            self.down = nn.Sequential(
                nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.relu(y)


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        Residual(4, 4, 1),
        Residual(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of NCHW."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return super().forward(x).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.down(F.gelu(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


def convnext():
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), ChannelNorm(4), ConvNextBlock(4), ConvNextBlock(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 5),
    )  # fmt: skip


class VitBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 17, 8) * 0.1)
        self.blocks = nn.Sequential(VitBlock(8, 2), VitBlock(8, 2))
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.blocks(x)[:, 0])


VISION = {"resnet": resnet, "convnext": convnext, "vit": Vit}
VISION_NEAR = {"rtol": 1e-3, "atol": 1e-4}  # batch norm over a few dozen values amplifies rounding


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", VISION)
def test_vision(name, mode, layout):
    model = VISION[name]().to(DEVICE).to(memory_format=layout).train(mode == "train")
    pair = Pair(model)
    for _ in range(2):
        x = rand(2, 3, 8, 8).to(memory_format=layout)
        if mode == "train":
            pair(x.requires_grad_(), **VISION_NEAR)
        else:
            pair(x, context=torch.no_grad, **VISION_NEAR)


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_vision_with_dynamic_batch_and_size(name):
    pair = Pair(VISION[name]().to(DEVICE).eval(), dynamic=True)
    pair(rand(2, 3, 8, 12), context=torch.no_grad, **VISION_NEAR)  # three sizes, three symbols
    with no_new_graph():
        pair(rand(5, 3, 16, 20), context=torch.no_grad, **VISION_NEAR)


def test_recurrent_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = x.new_zeros(x.shape[1], 6)
            for row in x:
                h = self.cell(row, h)
            return self.head(h)

    check(Net().to(DEVICE), rand(4, 2, 4, grad=True), **NEAR)


def test_transformer_encoder_of_torch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(DEVICE)
    check(model, rand(2, 5, 8, grad=True), **NEAR)


def test_unet_like_skip_connections():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, 1)
            self.c, self.norm = nn.Conv2d(10, 3, 3, padding=1), nn.GroupNorm(2, 6)

        def forward(self, x):
            a = F.silu(self.a(x))
            b = F.silu(self.norm(self.b(a)))
            up = F.interpolate(b, scale_factor=2.0, mode="nearest")
            return self.c(torch.cat([a, up], 1)) + x

    check(Net().to(DEVICE), rand(2, 3, 8, 8, grad=True), **NEAR)
