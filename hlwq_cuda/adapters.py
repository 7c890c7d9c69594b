"""LoRA adapters of PEFT on quantized linear layers: y = HLWQ(x) + B(A(x)) * scaling. The codes stay as they are."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from hlwq_cuda.layers import HLWQLinear

if TYPE_CHECKING:
    from peft import LoraConfig


def enable_lora(config: LoraConfig) -> LoraConfig:
    """Teach `config` to adapt HLWQ layers, and return it: `get_peft_model(model, enable_lora(LoraConfig(...)))`.

    PEFT does not save this with an adapter, so that `PeftModel.from_pretrained` needs `config=` with such a config.
    """
    config._register_custom_module({HLWQLinear: _lora_linear()})
    return config


@cache
def _lora_linear() -> type[nn.Module]:
    """The adapted layer; a function, because its base class needs PEFT."""
    from peft.tuners.lora import LoraLayer

    class LoraHLWQLinear(nn.Module, LoraLayer):
        """A quantized linear layer with adapters; they cannot be merged into codes."""

        def __init__(self, base_layer: HLWQLinear, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **_):
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            if config.use_dora:
                raise ValueError("DoRA needs the norm of every dense weight, which HLWQ does not store; use plain LoRA")
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

        def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            """[..., K] -> [..., N]."""
            result = self.base_layer(x)
            if self.disable_adapters:
                return result
            for name in self.active_adapters:
                if name in self.lora_A:
                    inputs = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
                    hidden = self.lora_A[name](self.lora_dropout[name](inputs))
                    result = result + (self.lora_B[name](hidden) * self.scaling[name]).to(result.dtype)
            return result

    return LoraHLWQLinear
