"""Small quantized models of mlx-lm's architectures with heads that the fused step takes, and layers that nearly are."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models import llama, qwen2, qwen3, qwen3_5
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from convert.codebook import codebook
from convert.format import ModuleSpec
from hlwq_mlx.layers import HLWQLinear
from hlwq_mlx.siblings import link

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}


def tiny(family: str, layers: int = 2) -> nn.Module:
    """A model of mlx-lm, not quantized yet: "qwen3" (norms of heads), "llama" (Llama 3's rope), "qwen2" (biases), or
    "qwen3_5", a hybrid: three layers of gated delta attention to one of gated attention.
    """
    sizes = {"model_type": family, "num_hidden_layers": layers, **SIZES}
    if family == "qwen2":
        return qwen2.Model(qwen2.ModelArgs(**(sizes | {"hidden_size": 256})))
    if family == "llama":
        return llama.Model(llama.ModelArgs(**sizes, head_dim=128, rope_scaling=LLAMA3))
    if family == "qwen3_5":
        sizes |= {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 32,
        }
        return qwen3_5.Model(qwen3_5.ModelArgs(model_type=family, text_config=sizes))
    return qwen3.Model(qwen3.ModelArgs(**sizes, head_dim=64))


def quantized(module: nn.Module, dtype: mx.Dtype = mx.bfloat16, bits: int = 4) -> nn.Module:
    """`module` with random codes instead of its nn.Linear layers and random norms and biases, in `dtype`."""
    random, layers = np.random.default_rng(0), []
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            outputs, columns = layer.weight.shape
            spec = ModuleSpec(bits, 64, columns)
            new = HLWQLinear((outputs,), spec, codebook(bits), dtype, bias="bias" in layer)
            codes = random.integers(0, 2**32, (outputs, spec.words), dtype=np.uint32)
            new.weight_codes = mx.array(codes)
            new.weight_norms = mx.full((outputs, spec.blocks), (64 / columns) ** 0.5, mx.float16)
            if "bias" in new:
                new.bias = mx.array(random.standard_normal(outputs).astype(np.float32))
            layers.append((path, new))
        elif isinstance(layer, nn.RMSNorm):
            layer.weight = mx.array(random.uniform(0.5, 1.5, layer.weight.shape).astype(np.float32))
    module.update_modules(tree_unflatten(layers))
    module.set_dtype(dtype)
    for _, layer in layers:
        layer.weight_norms = layer.weight_norms.astype(mx.float16)
    module.eval()
    link(module.modules())
    return module


class ScaledSums(qwen3.TransformerBlock):
    """As in Granite and MiniCPM, but closer to 1."""

    def __call__(self, x, mask=None, cache=None):
        x = x + 0.9 * self.self_attn(self.input_layernorm(x), mask, cache)
        return x + 0.9 * self.mlp(self.post_attention_layernorm(x))


class NormsAfter(qwen3.TransformerBlock):
    """As in OLMo 2."""

    def __call__(self, x, mask=None, cache=None):
        x = x + self.input_layernorm(self.self_attn(x, mask, cache))
        return x + self.post_attention_layernorm(self.mlp(x))


class Parallel(qwen3.TransformerBlock):
    """Both halves from the same x."""

    def __call__(self, x, mask=None, cache=None):
        attended = self.self_attn(self.input_layernorm(x), mask, cache)
        return x + attended + self.mlp(self.post_attention_layernorm(x))


class Gelu(qwen3.MLP):
    def __call__(self, x):
        return self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x))


class HotterAttention(qwen3.Attention):
    """Scores 1.2 times as large as `scale` says, but for tokens before 8192: the temperature of Llama 4."""

    def __call__(self, x, mask=None, cache=None):
        scale, self.scale = self.scale, self.scale * (1.2 if cache and cache.offset >= 8192 else 1)
        y = super().__call__(x, mask, cache)
        self.scale = scale
        return y


def scaled_sums(layer: nn.Module) -> None:
    layer.__class__ = ScaledSums


def norms_after(layer: nn.Module) -> None:
    layer.__class__ = NormsAfter


def parallel(layer: nn.Module) -> None:
    layer.__class__ = Parallel


def gelu(layer: nn.Module) -> None:
    layer.mlp.__class__ = Gelu


def hotter_attention(layer: nn.Module) -> None:
    layer.self_attn.__class__ = HotterAttention


def traditional_rope(layer: nn.Module) -> None:
    layer.self_attn.rope = nn.RoPE(64, traditional=True)


# the modules are those of a known layer: all of it computes something else, or attention alone
NEARLY, NEARLY_ATTENTION = (scaled_sums, norms_after, parallel, gelu), (hotter_attention, traditional_rope)


class Sandwich(qwen3.TransformerBlock):
    """As in Gemma 2."""

    def __call__(self, x, mask=None, cache=None):
        x = x + self.after(self.self_attn(self.input_layernorm(x), mask, cache))
        return x + self.mlp(self.post_attention_layernorm(x))


class CacheFirst(qwen3.TransformerBlock):
    def __call__(self, x, cache=None, mask=None):
        return super().__call__(x, mask, cache)


def sandwich(layer: nn.Module) -> None:
    layer.__class__, layer.after = Sandwich, nn.RMSNorm(128)


def cache_first(layer: nn.Module) -> None:
    layer.__class__ = CacheFirst


def other_norm(layer: nn.Module) -> None:
    layer.post_attention_layernorm = nn.LayerNorm(128, bias=False)


def bias(layer: nn.Module) -> None:
    layer.mlp.down_proj = nn.Linear(192, 128)


def other_norm_of_attention(layer: nn.Module) -> None:
    layer.input_layernorm = nn.LayerNorm(128, bias=False)


def other_rope(layer: nn.Module) -> None:
    layer.self_attn.rope = DynamicNTKScalingRoPE(64, 512, False, 1e4, 2.0)


def sinks(layer: nn.Module) -> None:
    layer.self_attn.sinks = mx.zeros(4)


def bias_of_o(layer: nn.Module) -> None:
    layer.self_attn.o_proj = nn.Linear(256, 128)


# the modules are others: of the feed-forward half, or of attention alone
OTHERS, OTHER_ATTENTION = (
    (sandwich, cache_first, other_norm, bias),
    (other_norm_of_attention, other_rope, sinks, bias_of_o),
)
