"""HLWQ models in PyTorch: transformers integration and Triton kernels.

    import hlwq_cuda
    model = AutoModelForCausalLM.from_pretrained(directory)       # transformers, or
    print(hlwq_cuda.load(directory).generate("What is a codebook?"))

Importing this package tells transformers what "hlwq" is; without it, transformers refuses an HLWQ directory.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("transformers") is not None:  # the kernels and modules need torch alone
    from hlwq_cuda.adapters import enable_lora
    from hlwq_cuda.generate import LanguageModel, load, set_mode
    from hlwq_cuda.hf import HLWQConfig, register
    from hlwq_cuda.remote_code import add_remote_code

    __all__ = ["HLWQConfig", "LanguageModel", "add_remote_code", "enable_lora", "load", "set_mode"]

    register()
