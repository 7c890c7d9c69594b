"""A prompt through the layers of a fused step: many rows at once, straight into the step's cache.

transformers' module needs a millisecond of the host for every layer in bf16 and three where layers are quantized, many
times what the kernels of 512 tokens take on an H100. Here a layer is nine calls: norm, q k v, split_heads, attention,
output, norm, gate up, SiLU, down; the four products are the step's own, so that q, k and v, or gate and up, are one and
round their common input once (three launches each where the weight is quantized). Attention is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from hlwq_cuda.kernels.rows import add_norm, silu_mul_rows, split_heads
from hlwq_cuda.projection import Projection

CHUNK = 2048  # tokens at a time: bounds the memory between the products


@dataclass(frozen=True)
class Block:
    """One layer with attention: its projections, the gains of its norms, its part of the cache."""

    mixer_gain: torch.Tensor  # [H]
    inputs: Projection  # q, k, v
    head_gains: tuple[torch.Tensor, torch.Tensor] | None  # of q and k, [D]
    cache: torch.Tensor  # [keys and values, kv_heads, T, D]
    output: Projection
    mlp_gain: torch.Tensor  # [H]
    gate_up: Projection
    down: Projection


class FusedPrompt:
    """Reads prompts for a FusedStep (step.py), whose blocks and cache these are."""

    def __init__(
        self,
        blocks: Sequence[Block],
        embedding: nn.Module,
        rotary: tuple[torch.Tensor, torch.Tensor],  # cos, sin: float32 [T, D]
        eps: float,
    ) -> None:
        self._blocks, self._embedding, self._rotary, self._eps = blocks, embedding, rotary, eps

    def read(self, ids: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [L] at positions from `first` on; the cache has those before.

        Returns the residual stream of the last token, float32 [H], and what the last layer has still to add to it.
        """
        for start in range(0, len(ids), CHUNK):
            hidden, delta = self._read_chunk(ids[start : start + CHUNK], first + start)
        return hidden[-1], delta[-1]

    def _read_chunk(self, ids: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, delta = self._embedding(ids).float(), None
        for block in self._blocks:
            dtype = block.cache.dtype
            qkv = block.inputs.multiply(add_norm(hidden, delta, block.mixer_gain, self._eps, dtype))
            delta = block.output.multiply(self._attend(block, qkv, first))
            gate_up = block.gate_up.multiply(add_norm(hidden, delta, block.mlp_gain, self._eps, dtype))
            delta = block.down.multiply(silu_mul_rows(gate_up))
        return hidden, delta

    def _attend(self, block: Block, qkv: torch.Tensor, first: int) -> torch.Tensor:
        """[M, (heads + 2 kv_heads) * D] -> [M, heads * D]; extends the cache."""
        keys, values = block.cache
        queries = split_heads(qkv, block.head_gains, self._rotary, keys, values, first, self._eps)
        end = first + len(qkv)
        seen = (part[None, :, :end] for part in (keys, values))
        mask = causal_lower_right(len(qkv), end)
        out = scaled_dot_product_attention(queries[None], *seen, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)
