"""The fused step against the model's own forward pass, in float64 and as quantized modules, token by token.

Without a GPU the small kernels run in Triton's interpreter and the products in plain torch.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")

from convert import packing, reference  # noqa: E402
from convert.codebook import codebook  # noqa: E402
from convert.format import ModuleSpec, default_block_size  # noqa: E402
from hlwq_cuda import prompt  # noqa: E402
from hlwq_cuda.decode import cache_argument  # noqa: E402
from hlwq_cuda.layers import HLWQEmbedding, HLWQLinear  # noqa: E402
from hlwq_cuda.step import FusedStep  # noqa: E402
from tests.triton_device import DEVICE  # noqa: E402

LENGTH = 24
SMALL = {
    "vocab_size": 67,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SMALL, head_dim=32, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=40),
    # two linear layers to one of gated attention; the rotary embedding covers a quarter of a head
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **{**SMALL, "num_hidden_layers": 3, "initializer_range": 0.1},
        head_dim=48,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=64,
        partial_rotary_factor=0.25,
    ),
}


def build(family: str) -> transformers.PreTrainedModel:
    """A random float32 model; norms and biases are random too, since ones and zeros would hide a missing one."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "A_log")):
                parameter.normal_(0.0, 0.5)
            elif "conv1d" in name:
                parameter.normal_()
    return model.to(DEVICE)


def quantize(model: transformers.PreTrainedModel, bits: dict[str, int], mode: str) -> transformers.PreTrainedModel:
    """A copy with every linear layer (and a tied embedding) quantized; `bits` by the last part of the name, or 4."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not (name == "lm_head" and model.config.tie_word_embeddings):
            width = bits.get(name.rsplit(".", 1)[-1], 4)
            model.set_submodule(name, quantized(module, width, mode if width < 6 else "exact"))
    if model.config.tie_word_embeddings:
        source = model.model.embed_tokens
        spec = ModuleSpec(4, default_block_size(source.embedding_dim), source.embedding_dim)
        embedding = HLWQEmbedding(source.num_embeddings, spec, codebook(4), torch.float32)
        model.model.embed_tokens = fill(embedding, source.weight, spec)
        model.lm_head = embedding.as_linear(mode)
    return model


def quantized(linear: torch.nn.Linear, bits: int, mode: str) -> HLWQLinear:
    spec = ModuleSpec(bits, default_block_size(linear.in_features), linear.in_features)
    bias_dtype = None if linear.bias is None else linear.bias.dtype
    module = fill(HLWQLinear(linear.out_features, spec, codebook(bits), bias_dtype, mode), linear.weight, spec)
    if linear.bias is not None:
        module.bias.data = linear.bias.data.clone()
    return module


def fill(module, weight: torch.Tensor, spec: ModuleSpec):
    encoded = reference.encode(weight.detach().cpu().numpy(), spec)
    module.weight_codes.data = torch.from_numpy(packing.pack(encoded.codes, spec.bits))
    module.weight_norms.data = torch.from_numpy(encoded.norms)
    return module.prepare(DEVICE)


def dequantized(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same function in float64: ordinary linear layers with the weights that the codes stand for."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (HLWQLinear, HLWQEmbedding)):
            weight = torch.nn.Parameter(module.dequantize(torch.float64))
            if isinstance(module, HLWQLinear):
                plain = torch.nn.Linear(*weight.shape[::-1], bias=module.bias is not None, device=DEVICE)
                plain.bias = module.bias
            else:
                plain = torch.nn.Embedding(*weight.shape, device=DEVICE)
            plain.weight = weight
            model.set_submodule(name, plain)
    return model.double()


def all_logits(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(tokens).logits[0].double().cpu().numpy()


def stepped_logits(model: transformers.PreTrainedModel, tokens: torch.Tensor, prefill: int) -> np.ndarray:
    """Logits at positions prefill, prefill + 1, ... by the fused step, after a prompt of `prefill` tokens."""
    step = FusedStep(model, LENGTH)
    step.cache.fill_(float("nan"))
    with torch.no_grad():
        if step.reads_prompts:
            step.prefill(tokens[0, :prefill])
        else:
            cache = transformers.DynamicCache(config=model.config)
            model(tokens[:, :prefill], **{cache_argument(model): cache}, use_cache=True)
            step.load_cache(cache)
        rows = []
        for token in tokens[0, prefill:]:
            step.token.fill_(token)
            rows.append(step.run().double().cpu().numpy().copy())
            step.position += 1
    return np.stack(rows)


def prompt_logits(model: transformers.PreTrainedModel, *parts: torch.Tensor) -> np.ndarray:
    """Logits of the last token, the prompt read in parts."""
    step = FusedStep(model, LENGTH)
    step.cache.fill_(float("nan"))
    with torch.no_grad():
        for part in parts:
            logits = step.prefill(part, int(step.position))
    assert int(step.position) == sum(map(len, parts))
    return logits.double().cpu().numpy()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, SMALL["vocab_size"], (1, 9))).to(DEVICE)


@pytest.mark.parametrize("family", CONFIGS)
def test_exact_step_equals_float64_model(family: str, tokens: torch.Tensor) -> None:
    model = quantize(build(family), {"v_proj": 6, "down_proj": 3, "o_proj": 8}, "exact")
    got, expected = stepped_logits(model, tokens, 5), all_logits(dequantized(model), tokens)[5:]
    # activations and centroids are rounded to fp16 (2**-11) at every product of the chain
    assert np.abs(got - expected).max() <= 2**-7 * expected.std()
    assert (got.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "qwen3_5"])
def test_prompt_equals_float64_model(family: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, behind a cache, and in chunks; layers that read the same row differ in bits."""
    model = quantize(build(family), {"v_proj": 6, "down_proj": 3, "o_proj": 8}, "exact")
    expected = all_logits(dequantized(model), tokens)[-1]
    bound = 2**-7 * expected.std()
    assert np.abs(prompt_logits(model, tokens[0]) - expected).max() <= bound
    assert np.abs(prompt_logits(model, *tokens[0].split([1, 5, 3])) - expected).max() <= bound
    monkeypatch.setattr(prompt, "CHUNK", 4)
    assert np.abs(prompt_logits(model, tokens[0]) - expected).max() <= bound


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prompt_in_half_precision(family: str, tokens: torch.Tensor) -> None:
    """At once and behind a cache, which are two ways through torch's attention; rounded to fp16 between kernels."""
    model = quantize(build(family), {}, "exact").half()
    expected = all_logits(dequantized(model), tokens)[-1]
    for parts in ([tokens[0]], [tokens[0, :6], tokens[0, 6:]]):
        assert np.abs(prompt_logits(model, *parts) - expected).max() <= 2**-6 * expected.std()


def test_a_prompt_beyond_the_cache_is_refused(tokens: torch.Tensor) -> None:
    step = FusedStep(build("mistral"), 10)
    step.prefill(tokens[0])
    with pytest.raises(ValueError, match="18 tokens do not fit in a cache of 10"):
        step.prefill(tokens[0], 9)


def test_prompt_in_int8_equals_modules() -> None:
    """More rows than the kernels for a few take: both round rows and weights alike."""
    model = quantize(build("llama"), {}, "int8")
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, SMALL["vocab_size"], (1, 80))).to(DEVICE)
    modules, exact = all_logits(model, tokens)[-1], all_logits(dequantized(model), tokens)[-1]
    step = FusedStep(model, 80)
    with torch.no_grad():
        got = step.prefill(tokens[0]).double().cpu().numpy()
    assert 0 < np.abs(got - modules).max() <= 0.5 * np.abs(modules - exact).max()


def test_linear_attention_after_a_prompt_of_any_length(tokens: torch.Tensor) -> None:
    """Shorter and longer than the convolution, whose last inputs the step keeps in a ring.

    The bound is wider because the model reads the prompt: on a GPU its convolution rounds to TF32.
    """
    model = quantize(build("qwen3_5"), {}, "exact")
    expected = all_logits(dequantized(model), tokens)
    for prefill in (2, 7):
        got = stepped_logits(model, tokens, prefill)
        assert np.abs(got - expected[prefill:]).max() <= 2**-5 * expected.std()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_int8_step_equals_modules(family: str, tokens: torch.Tensor) -> None:
    """The modules round the same activations; what differs is a step of int8 where fp32 sums fall on either side."""
    model = quantize(build(family), {}, "int8")
    modules, exact = all_logits(model, tokens)[5:], all_logits(dequantized(model), tokens)[5:]
    got = stepped_logits(model, tokens, 5)
    assert np.abs(got - modules).max() <= 0.5 * np.abs(modules - exact).max()
    margin = np.sort(modules, -1)[:, -1] - np.sort(modules, -1)[:, -2]
    clear = margin > 2 * np.abs(got - modules).max(-1)
    assert clear.any() and (got.argmax(-1) == modules.argmax(-1))[clear].all()


def test_unquantized_model_takes_the_same_step(tokens: torch.Tensor) -> None:
    model = build("qwen2")
    expected = all_logits(model, tokens)
    np.testing.assert_allclose(stepped_logits(model, tokens, 3), expected[3:], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(prompt_logits(model, tokens[0]), expected[-1], rtol=1e-3, atol=1e-4)


def test_merging_keeps_one_copy_and_the_modules_work(tokens: torch.Tensor) -> None:
    model = quantize(build("qwen3"), {}, "exact")
    before = all_logits(model, tokens)
    FusedStep(model, LENGTH)
    attention = model.model.layers[0].self_attn
    storages = {module.weight_codes.untyped_storage().data_ptr() for module in (attention.q_proj, attention.v_proj)}
    assert len(storages) == 1
    FusedStep(model, LENGTH)  # finds them merged
    assert attention.k_proj.weight_codes.untyped_storage().data_ptr() in storages
    np.testing.assert_array_equal(all_logits(model, tokens), before)


def test_a_position_beyond_the_cache_uses_the_last_slot() -> None:
    step = FusedStep(build("mistral"), 4)
    logits = []
    for position in (3, 4, 1000):
        step.cache.fill_(0.5)
        step.position.fill_(position)
        logits.append(step.run().clone())
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_reasons_not_to_take_the_step() -> None:
    model = build("mistral")
    assert FusedStep.supports(model, 64) is None
    model.config.sliding_window = 16
    assert "sliding window of 16" in FusedStep.supports(model, 17)
    assert FusedStep.supports(model, 16) is None
    attention = model.model.layers[1].self_attn
    attention.q_proj = quantized(attention.q_proj, 4, "exact")
    assert FusedStep.supports(model, 8) == "layer 1: a quantized and an unquantized layer read the same input"
    with pytest.raises(ValueError, match="layer 1"):
        FusedStep(model, 8)
    model.model.layers[0].mlp.down_proj = torch.nn.Identity()
    assert FusedStep.supports(model, 8).startswith("layer 0: the fused step has no layer of type torch.nn")
    model.config.model_type = "gpt2"
    assert FusedStep.supports(model, 8) == "no fused step for the model type gpt2"
