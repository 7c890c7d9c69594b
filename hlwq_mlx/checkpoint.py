"""What a model directory must hold for MLX: its config parsed and its tensors checked, one sentence an error.

The one module of this package that imports `convert`, which is a common name: a script `convert.py` in the working
directory hides our package from `python -c` and `python -m`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import mlx.core as mx

try:
    from convert.codebook import codebook
    from convert.format import (
        QUANT_METHOD,
        SUPPORTED_BITS,
        FormatError,
        ModuleSpec,
        QuantizationConfig,
        codes_name,
        norms_name,
    )
except ImportError as error:
    found = getattr(sys.modules.get("convert"), "__file__", None)
    # not an ImportError: mlx-lm would report that as an unknown model type
    raise RuntimeError(
        f"hlwq_mlx needs its package `convert`, but Python found {found or 'none'}; "
        "rename that file, start Python elsewhere or with -P, or install hlwq-mlx again"
    ) from error

__all__ = [
    "QUANT_METHOD",
    "SUPPORTED_BITS",
    "FormatError",
    "ModuleSpec",
    "QuantizationConfig",
    "check_module",
    "check_names",
    "codebook",
    "parse",
]

CONFIG = "config.json"
REMEDY = "convert the model again"


def parse(config: Mapping) -> QuantizationConfig:
    """The checked quantization_config of a directory made by `python -m convert --target mlx`."""
    quantization = QuantizationConfig.parse(config, CONFIG)
    if not isinstance(quantization.base_model_type, str):
        raise FormatError(
            f"{CONFIG}: quantization_config.base_model_type is missing; this checkpoint was not made for MLX, "
            "use python -m convert --target mlx"
        )
    return quantization


def check_module(weights: Mapping[str, mx.array], module: str, spec: ModuleSpec, rows: tuple[int, ...]) -> None:
    """FormatError unless the tensors of `module` are there with the dtypes and shapes of a weight [*rows, K]."""
    expected = {
        codes_name(module): (mx.uint32, (*rows, spec.words)),
        norms_name(module): (mx.float16, (*rows, spec.blocks)),
    }
    for name, (dtype, shape) in expected.items():
        if name not in weights:
            raise FormatError(f"model*.safetensors: tensor {name} is missing; {REMEDY}")
        found = weights[name]
        if found.dtype != dtype or found.shape != shape:
            raise FormatError(
                f"model*.safetensors: {name} is {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}; {REMEDY}"
            )


def check_names(found: set[str], expected: set[str]) -> None:
    """FormatError for a tensor that the architecture needs and the files lack, or the other way round."""
    for names, what in ((expected - found, "is missing"), (found - expected, "belongs to no layer of the model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise FormatError(f"model*.safetensors: tensor {min(names)} {what}{more}; {REMEDY}")
