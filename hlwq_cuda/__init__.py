"""HLWQ models in PyTorch: transformers integration and Triton kernels.

    import hlwq_cuda
    model = AutoModelForCausalLM.from_pretrained(directory)

Importing this package tells transformers what "hlwq" is; without it, transformers cannot read an HLWQ directory.
"""

from __future__ import annotations

from hlwq_cuda.hf import HLWQConfig, register

__all__ = ["HLWQConfig"]

register()
