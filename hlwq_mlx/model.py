"""`Model` and `ModelArgs` as mlx-lm loads them: any of its architectures, with the quantized layers put in.

mlx_lm.load_model imports `mlx_lm.models.<model_type>`, makes `ModelArgs.from_dict(config)`, `Model(args)`, calls
`model.sanitize(weights)` and loads what that returns. Our directories have the model_type "hlwq" and keep the
source's in quantization_config.base_model_type, so every step can be handed on to that architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils
from mlx_lm.models.switch_layers import SwitchLinear
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from hlwq_mlx.checkpoint import FormatError, QuantizationConfig, check_module, check_names, parse
from hlwq_mlx.fused import fuse_layers
from hlwq_mlx.layers import HLWQEmbedding, HLWQLinear, HLWQSwitchLinear
from hlwq_mlx.siblings import link
from hlwq_mlx.steps import compile_steps

CODES, NORMS = "weight_codes", "weight_norms"
QUANTIZED_TYPES = {SwitchLinear: HLWQSwitchLinear, nn.Embedding: HLWQEmbedding, nn.Linear: HLWQLinear}


@dataclass
class ModelArgs:
    """The arguments of the architecture, and which of its layers are quantized."""

    base_class: type[nn.Module]
    base_args: Any
    quantization: QuantizationConfig

    @classmethod
    def from_dict(cls, config: Mapping) -> ModelArgs:
        """Parse a whole config.json. FormatError when its quantization_config is not valid."""
        quantization = parse(config)
        _introduce(config["model_type"])
        base_config = {key: value for key, value in config.items() if key != "quantization_config"}
        base_config["model_type"] = quantization.base_model_type
        try:
            base_class, base_args_class = utils._get_classes(config=base_config)
        except ValueError:
            raise FormatError(
                f"config.json: {quantization.base_model_type!r} is not an architecture of mlx-lm {mlx_lm.__version__}; "
                "update mlx-lm"
            ) from None
        return cls(base_class, base_args_class.from_dict(base_config), quantization)


def Model(args: ModelArgs) -> nn.Module:
    """The architecture's model, as an instance of a subclass that puts the quantized layers in when it is loaded."""
    # same name and module as the base, so that whatever looks at the class sees the architecture
    members = {"sanitize": _sanitize(args), "__module__": args.base_class.__module__}
    if hasattr(args.base_class, "shard"):
        members["shard"] = _refuse_to_shard
    return type(args.base_class.__name__, (args.base_class,), members)(args.base_args)


def _introduce(model_type: str) -> None:
    """Make our model_type known to transformers, which reads config.json for the tokenizer and warns about others."""
    if model_type not in CONFIG_MAPPING:
        AutoConfig.register(model_type, type("HLWQConfig", (PretrainedConfig,), {"model_type": model_type}))


def _refuse_to_shard(self: nn.Module, group: mx.distributed.Group | None = None) -> None:
    # mlx-lm's own would take our layers for its QuantizedLinear
    raise NotImplementedError(
        "HLWQ layers on MLX cannot be split within a layer; pass --pipeline, which gives each machine whole layers"
    )


def _sanitize(args: ModelArgs):
    def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Put the quantized layers in and check every tensor; the weights were sanitized by the converter."""
        modules = dict(self.named_modules())
        shapes = {path: modules[path].weight.shape for path in args.quantization.modules if path in modules}
        if hasattr(args.base_class, "sanitize"):
            # some architectures change themselves here (Gemma 3 drops its head when the embedding is tied): show them
            # the names that they know. The result is not used, and nothing of it is computed: MLX is lazy.
            args.base_class.sanitize(self, _unquantized(weights, shapes))
        _replace(self, args.quantization, weights)
        check_names(set(weights), {name for name, _ in tree_flatten(self.parameters())})
        return weights

    return sanitize


def _unquantized(weights: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """The weights with a placeholder `M.weight` for each quantized module M."""
    plain = {name: array for name, array in weights.items() if name.rpartition(".")[2] not in (CODES, NORMS)}
    return plain | {f"{path}.weight": mx.zeros(shape) for path, shape in shapes.items()}


def _replace(model: nn.Module, quantization: QuantizationConfig, weights: Mapping[str, mx.array]) -> None:
    modules = dict(model.named_modules())
    dtype = _main_dtype(weights)
    layers = []
    for path, spec in quantization.modules.items():
        if path not in modules:
            raise FormatError(f"config.json: module {path} is not a layer of the model; convert the model again")
        old = modules[path]
        quantized_type = next((new for plain, new in QUANTIZED_TYPES.items() if isinstance(old, plain)), None)
        if quantized_type is None:
            raise FormatError(f"config.json: {path} is a {type(old).__name__}, which cannot be quantized")
        *rows, in_features = old.weight.shape
        if in_features != spec.in_features:
            raise FormatError(
                f"config.json: {path} has in_features {spec.in_features}, but the model's layer has {in_features}; "
                "convert the model again"
            )
        check_module(weights, path, spec, tuple(rows))
        codebook = quantization.codebooks[spec.bits]
        layers.append((path, quantized_type(tuple(rows), spec, codebook, dtype, bias="bias" in old)))
    model.update_modules(tree_unflatten(layers))
    link(model.modules())
    compile_steps(model.modules())
    fuse_layers(model.modules())


def _main_dtype(weights: Mapping[str, mx.array]) -> mx.Dtype:
    """The dtype in which the model computes: the commonest floating one of the tensors that are not quantized."""
    dtypes = Counter(
        array.dtype
        for name, array in weights.items()
        if not name.endswith((CODES, NORMS)) and mx.issubdtype(array.dtype, mx.floating)
    )
    return dtypes.most_common(1)[0][0] if dtypes else mx.bfloat16
