"""Models of real shapes with random weights made on the device, for benchmarks that download nothing."""

from __future__ import annotations

import torch
import transformers

from convert.codebook import codebook
from convert.format import ModuleSpec, default_block_size
from hlwq_cuda.layers import HLWQLinear


def _dense(model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **rest) -> dict:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        **rest,
    }


SHAPES = {  # what differs from the defaults of transformers' config of that model_type
    "qwen3-8b": _dense("qwen3", 4096, 12288, 36, 32, 8, vocab_size=151936),
    "llama-3.1-8b": _dense("llama", 4096, 14336, 32, 32, 8, vocab_size=128256),
    "qwen2.5-7b": _dense("qwen2", 3584, 18944, 28, 28, 4, vocab_size=152064),
    "smollm2-135m": _dense("llama", 576, 1536, 30, 9, 3, head_dim=64, vocab_size=49152, tie_word_embeddings=True),
    # three layers of linear attention (gated DeltaNet) to one of gated attention
    "qwen3.5-9b": _dense(
        "qwen3_5_text",
        4096,
        12288,
        32,
        16,
        4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        vocab_size=248320,
    ),
}


def make_config(shape: str, length: int) -> transformers.PretrainedConfig:
    """The transformers config of a shape, for texts up to `length` tokens and without an end of text."""
    values = {"tie_word_embeddings": False, **SHAPES[shape], "max_position_embeddings": length}
    return transformers.AutoConfig.for_model(**values, eos_token_id=None, pad_token_id=None, bos_token_id=None)


def random_model(config: transformers.PretrainedConfig, bits: int | None, mode: str | None, device: torch.device):
    """A bf16 model with random weights; every linear layer and the head at `bits`, or all bf16 when None."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if bits is not None:
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and not (name == "lm_head" and config.tie_word_embeddings):
                model.set_submodule(name, random_linear(module, bits, mode, device))
    rotary = type(model.model.rotary_emb)(config).to(device)  # its tables are computed, not random
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            values = values.uniform_(0.5, 1.5) if "norm" in name else values.normal_(0.0, 0.02)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = rotary
    model.tie_weights()
    return model.eval()


def random_linear(linear: torch.nn.Linear, bits: int, mode: str | None, device: torch.device) -> HLWQLinear:
    """A quantized layer of the same shape in the device layout."""
    spec = ModuleSpec(bits, default_block_size(linear.in_features), linear.in_features)
    bias_dtype = None if linear.bias is None else torch.bfloat16
    module = HLWQLinear(linear.out_features, spec, codebook(bits), bias_dtype, mode, device="meta").to_empty(
        device=device
    )
    shape = module.weight_codes.shape
    codes = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)
    module.weight_codes = torch.nn.Parameter(codes, requires_grad=False)
    module.weight_norms.data.uniform_(0.1, 0.3)
    if module.bias is not None:
        module.bias.data.normal_()
    return module.prepare()


def weight_bytes(model: transformers.PreTrainedModel) -> int:
    """Everything that a loaded model holds: codes, norms, tables, and what is not quantized."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def cache_bytes(config: transformers.PretrainedConfig, context: int) -> int:
    """Keys and values of `context` tokens in bf16, and float32 states of linear attention: what one token reads."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    linear = kinds.count("linear_attention")
    attention = 2 * 2 * config.num_key_value_heads * config.head_dim * context * (len(kinds) - linear)
    if not linear:
        return attention
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    return attention + 4 * state * linear
