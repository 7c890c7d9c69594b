"""Low-rank adapters on top of quantized layers: `mlx_lm.lora` trains them, the codes stay as they are."""

from __future__ import annotations

import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

_NO_FUSE = (
    "an HLWQ layer keeps its codes, so an adapter cannot be fused into it: load the model with --adapter-path, or fuse "
    "the adapter into the source model and convert that"
)


class HLWQLoRALinear(LoRALinear):
    """y = linear(x) + scale * x A B."""

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """Refuses: ValueError."""
        raise ValueError(_NO_FUSE)


class HLWQLoRASwitchLinear(LoRASwitchLinear):
    """The same for a stack of experts."""

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """Refuses: ValueError."""
        raise ValueError(_NO_FUSE)


def lora_linear(base: nn.Module, inputs: int, outputs: int, rank: int, scale: float, dropout: float) -> HLWQLoRALinear:
    """An adapter of `rank` around a quantized linear layer [outputs, inputs]."""
    layer = HLWQLoRALinear(inputs, outputs, rank, dropout, scale)
    layer.linear = base
    return layer


def lora_switch_linear(base: nn.Module, rank: int, scale: float, dropout: float) -> HLWQLoRASwitchLinear:
    """An adapter of `rank` for each expert of a quantized stack."""
    layer = HLWQLoRASwitchLinear(base.input_dims, base.output_dims, base.num_experts, rank, dropout, scale)
    layer.linear = base
    return layer
