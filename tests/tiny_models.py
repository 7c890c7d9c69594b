"""Tiny random checkpoints of real architectures, written by transformers: what every conversion test starts from.

`tiny_model("llama", directory)` writes config.json, model.safetensors and a byte-level tokenizer with a chat template.
Widths are chosen so that all block sizes occur: 128, 64 and 32 where they divide K, and 128 with padding where none
does (200, 264). The vocabulary of 259 is odd, so N has a tail. Weights are drawn far larger than a training run's
initialization, which gives logits with a clear first choice; all comes from a fixed seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model(family: str, directory: Path | str, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Write the checkpoint of `family`, one of FAMILIES, with weights of `dtype`; returns `directory`."""
    directory = Path(directory)
    torch.manual_seed(seed)
    model = FAMILIES[family]().to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomize(name, parameter)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 256
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    if family == "gpt2":
        _strip_prefix(directory / "model.safetensors", "transformer.")
    _add_hub_keys(directory / "config.json")
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, then SPECIAL_TOKENS: encodes any text without training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _strip_prefix(path: Path, prefix: str) -> None:
    """The hub's gpt2 was saved without the prefix of its causal model, and mlx-lm expects that."""
    tensors = load_file(path)
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})


def _add_hub_keys(path: Path) -> None:
    """Keys that every published config has and mlx-lm reads, which transformers 5 writes under newer names."""
    config = json.loads(path.read_text())
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    if "rope_theta" in (config.get("rope_parameters") or {}):
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    if "n_positions" in config:
        config["n_ctx"] = config["n_positions"]
    path.write_text(json.dumps(config, indent=2))


def _randomize(name: str, parameter: torch.nn.Parameter) -> None:
    """Matrices keep the scale of their input, embeddings get 1/4 (tied logits spread by a few units)."""
    if parameter.ndim == 1:
        parameter.add_(0.1 * torch.randn_like(parameter))  # norm weights, biases, decay rates: near their usual start
    elif any(part in name for part in ("embed", "wte", "wpe")):
        parameter.normal_(0.0, 0.25)
    else:
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # GPT-2 stores [K, N]
        fan_in = parameter.shape[0] if transposed else parameter.shape[-1]
        gain = 3.0 if name.startswith("lm_head") else 1.0
        parameter.normal_(0.0, gain / math.sqrt(fan_in))


def _llama() -> transformers.PreTrainedModel:
    """Tied embeddings, grouped heads; K = 160, 128 and 200."""
    config = transformers.LlamaConfig(
        **_decoder(hidden_size=160, intermediate_size=200, heads=(4, 2), head_dim=32), tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config)


def _qwen3() -> transformers.PreTrainedModel:
    """Norms on q and k, a head of its own; K = 128, 96 and 192."""
    config = transformers.Qwen3Config(
        **_decoder(hidden_size=128, intermediate_size=192, heads=(4, 2), head_dim=24), tie_word_embeddings=False
    )
    return transformers.Qwen3ForCausalLM(config)


def _qwen3_5() -> transformers.PreTrainedModel:
    """Three gated DeltaNet layers to one of attention, and a vision tower; K = 128, 64 and 264."""
    text = transformers.Qwen3_5TextConfig(
        **_decoder(hidden_size=128, intermediate_size=264, heads=(2, 1), head_dim=64, layers=4),
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=16,
        tie_word_embeddings=False,
    )
    vision = transformers.models.qwen3_5.Qwen3_5VisionConfig(
        depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=128, num_position_embeddings=16
    )
    config = transformers.Qwen3_5Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), tie_word_embeddings=False
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


def _gemma3() -> transformers.PreTrainedModel:
    """Tied embeddings scaled by sqrt(hidden), norms of 1 + w, a sliding window of 8 tokens; K = 96, 64 and 192."""
    config = transformers.Gemma3TextConfig(
        **_decoder(hidden_size=96, intermediate_size=192, heads=(2, 1), head_dim=32, layers=6),
        query_pre_attn_scalar=32,
        sliding_window=8,
        tie_word_embeddings=True,
    )
    return transformers.Gemma3ForCausalLM(config)


def _qwen3_moe() -> transformers.PreTrainedModel:
    """Four experts, two used a token; K = 64 and 96."""
    config = transformers.Qwen3MoeConfig(
        **_decoder(hidden_size=64, intermediate_size=128, heads=(2, 1), head_dim=32),
        moe_intermediate_size=96,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _gpt2() -> transformers.PreTrainedModel:
    """Biases everywhere, transposed weights, learned positions, names without a prefix as on the hub; K = 96, 384."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=96,
        n_layer=2,
        n_head=3,
        n_positions=512,
        bos_token_id=256,
        eos_token_id=256,
    )
    return transformers.GPT2LMHeadModel(config)


def _decoder(hidden_size: int, intermediate_size: int, heads: tuple[int, int], head_dim: int, layers: int = 2) -> dict:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }


FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3_5": _qwen3_5,
    "gemma3": _gemma3,
    "qwen3_moe": _qwen3_moe,
    "gpt2": _gpt2,
}
