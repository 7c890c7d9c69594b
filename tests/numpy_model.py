"""Reference logits: the Llama and Qwen3 decoders in plain numpy, float64, from an HLWQ directory.

Every backend's logits are compared with these. It reads through `convert.checkpoint` and multiplies through
`convert.reference.matmul`, so the only thing it shares with a backend is the format.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.format import codes_name
from convert.reference import matmul

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def reference_logits(directory: Path | str, tokens: list[int]) -> np.ndarray:
    """Logits after every prefix of `tokens`: float64 [T, vocabulary]."""
    return NumpyDecoder(Checkpoint.open(directory)).logits(np.asarray(tokens))


class NumpyDecoder:
    """A pre-norm decoder with rotary positions, grouped-query attention and a SiLU-gated MLP."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        family = checkpoint.quantization.base_model_type or config["model_type"]
        if family not in FAMILIES:
            raise ValueError(f"the numpy reference knows {', '.join(FAMILIES)}, not {family}")
        self.checkpoint = checkpoint
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps = config["rms_norm_eps"]
        self.rope_theta = _rope_theta(config)
        self.head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """int [T] -> float64 [T, vocabulary]."""
        x = self._embed(tokens)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            x = x + self._attention(f"{prefix}.self_attn", self._norm(f"{prefix}.input_layernorm", x))
            x = x + self._mlp(f"{prefix}.mlp", self._norm(f"{prefix}.post_attention_layernorm", x))
        return self._linear(self.head, self._norm("model.norm", x))

    def _attention(self, name: str, x: np.ndarray) -> np.ndarray:
        query, key, value = (
            self._linear(f"{name}.{projection}_proj", x).reshape(len(x), -1, self.head_dim) for projection in "qkv"
        )
        if f"{name}.q_norm.weight" in self.checkpoint.tensors:  # Qwen3
            query, key = self._norm(f"{name}.q_norm", query), self._norm(f"{name}.k_norm", key)
        query, key = self._rope(query), self._rope(key)
        group = self.heads // self.kv_heads
        key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(self.head_dim)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        probabilities = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", probabilities, value)
        return self._linear(f"{name}.o_proj", attended.reshape(len(x), -1))

    def _mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        gate, up = self._linear(f"{name}.gate_proj", x), self._linear(f"{name}.up_proj", x)
        return self._linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * up)

    def _rope(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions, the two halves of a head paired: [T, heads, head_dim]."""
        half = self.head_dim // 2
        frequencies = self.rope_theta ** (-np.arange(half) / half)
        angles = np.arange(len(x))[:, None, None] * frequencies
        low, high = x[..., :half], x[..., half:]
        turned = (low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles))
        return np.concatenate(turned, axis=-1)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self.checkpoint.tensor(f"{name}.weight").astype(np.float64)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps) * weight

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        quantization = self.checkpoint.quantization
        if codes_name(name) in self.checkpoint.tensors:
            spec = quantization.modules[name]
            y = matmul(x, self.checkpoint.encoded(name), spec, quantization.codebooks[spec.bits])
        else:
            y = x @ self.checkpoint.tensor(f"{name}.weight").astype(np.float64).T
        if f"{name}.bias" in self.checkpoint.tensors:
            y = y + self.checkpoint.tensor(f"{name}.bias").astype(np.float64)
        return y

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        name = "model.embed_tokens"
        if codes_name(name) not in self.checkpoint.tensors:
            return self.checkpoint.tensor(f"{name}.weight").astype(np.float64)[tokens]
        return np.concatenate([self.checkpoint.weight(name, slice(token, token + 1)) for token in tokens])


def _rope_theta(config: dict) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"the numpy reference has no rotary scaling of type {kind}")
    return float(rope.get("rope_theta") or config["rope_theta"])
