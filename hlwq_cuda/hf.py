"""HLWQ in transformers: `from_pretrained` loads HLWQ directories, makes them from unquantized models, and saves them.

`register()` makes the quantization method "hlwq" known to transformers; `import hlwq_cuda` calls it. Written for
transformers 5.17 and later: hooks whose arguments changed between releases take what they are given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, revert_weight_conversion
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from hlwq_cuda import environment
from hlwq_cuda.checkpoint import (
    QUANT_METHOD,
    FormatError,
    ModuleSpec,
    QuantizationConfig,
    codes_name,
    encode,
    norms_name,
    open_checkpoint,
    plan_quantization,
    refuse_mlx,
)
from hlwq_cuda.kernels.layout import CONVERSION_BYTES
from hlwq_cuda.layers import HLWQEmbedding, HLWQExperts, HLWQLinear, HLWQWeight
from hlwq_cuda.placement import (
    HLWQScaledEmbedding,
    Place,
    find_places,
    install,
    install_tied_heads,
    make_module,
    rename_tied,
    serialized_converters,
    share_norms,
)


class HLWQConfig(QuantizationConfigMixin):
    """How to quantize a model while it loads, with the converter's options and its codes; or config.json's record.

    bits, recipe, embed_bits, head_bits, block_size, encoder: the flags of `python -m convert` of those names.
    `quantization` is what a quantized model holds: read from config.json, or planned when loading begins.
    """

    def __init__(
        self,
        bits: int = 4,
        recipe: str = "uniform",
        embed_bits: int | None = None,
        head_bits: int | None = None,
        block_size: int | None = None,
        encoder: str | None = None,
        **stored,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.bits, self.recipe, self.embed_bits, self.head_bits = bits, recipe, embed_bits, head_bits
        self.block_size, self.encoder = block_size, encoder
        self.quantization: QuantizationConfig | None = None
        self.powers: dict[str, float] = {}  # of the modules of a plan, see plan_quantization
        stored.pop("quant_method", None)
        if "format_version" in stored or "modules" in stored:
            record = {"quant_method": QUANT_METHOD, "bits": bits, "block_size": block_size, **stored}
            refuse_mlx({"quantization_config": record}, "the directory")
            self.quantization = QuantizationConfig.parse({"quantization_config": record}, "config.json")
        elif stored:
            raise TypeError(f"HLWQConfig has no option {min(stored)!r}")

    def plan(self, directory: Path | None) -> None:
        """Decide, from headers alone, what to quantize in the unquantized model in `directory`."""
        if directory is None:
            raise ValueError("HLWQ quantizes a model while it loads from safetensors files, and this one has none")
        options = (self.bits, self.block_size, self.recipe, self.embed_bits, self.head_bits)
        self.quantization, self.powers = plan_quantization(directory, *options)

    def to_dict(self) -> dict:
        """The `quantization_config` of config.json once a model is quantized, else the options."""
        if self.quantization is not None:
            return self.quantization.to_dict()
        return {name: value for name, value in vars(self).items() if name not in ("quantization", "powers")}


class HLWQQuantizer(HfQuantizer):
    """Puts HLWQ modules in the place of what is quantized.

    The modules of a quantized checkpoint are swapped on the meta device, so that its tensors load by name. An
    unquantized checkpoint loads as usual until a weight of the plan arrives: it is encoded, and its module swapped.
    """

    requires_calibration = False

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        """DeviceError for a GPU that is absent or too old."""
        for device in environment.devices_of(device_map):
            environment.check_device(device)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map=None, checkpoint_files=None, **kwargs
    ) -> PreTrainedModel:
        directory = _directory(checkpoint_files)
        if not self.pre_quantized:
            self.quantization_config.plan(directory)
        quantization = self.quantization_config.quantization
        self.places = find_places(model, quantization)
        self.modules = {
            key: make_module(model, place, quantization.codebooks[place.spec.bits])
            for key, place in self.places.items()
        }
        if self.pre_quantized and directory is not None:
            _check_directory(model, directory, self.places, self.modules)
        devices = list(environment.devices_of(device_map))
        if len(devices) == 1:
            needed = _loaded_bytes(model, self.modules) + CONVERSION_BYTES
            environment.check_memory(needed, devices[0], f"loading {type(model).__name__}")

        by_path = {place.path: self.modules[key] for key, place in self.places.items()}
        replaced = [*by_path, *(name.removesuffix(".weight") for name in model.all_tied_weights_keys)]
        self.dense = {path: _get(model, path) for path in replaced}  # what dequantize puts back
        self.heads = install_tied_heads(model, by_path)
        if self.pre_quantized:
            for path, module in by_path.items():
                install(model, path, module)
        else:  # float32 holds every float dtype of a source: the encoder sees what the converter would read
            exact = {f"^{re.escape(key)}$" for key in self.modules}
            model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *exact}
        self.experts = model.config.get_text_config()._experts_implementation
        if any(isinstance(module, HLWQExperts) for module in self.modules.values()):
            model.set_experts_implementation("eager")  # the one that asks a stack for single experts
        return model

    def update_weight_conversions(self, weight_conversions: list, model=None) -> list:
        """Before transformers' own rules, whose patterns match ours in 5.17: merge the codes of experts."""
        converters = [rule for rule in weight_conversions if isinstance(rule, WeightConverter)]
        self.merges = serialized_converters(converters, [place.path for place in self.places.values()])
        return [*self.merges, *weight_conversions] if self.pre_quantized else weight_conversions

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        """Whether a weight that arrives in floating point is to be encoded."""
        return not self.pre_quantized and param_name in self.modules

    def get_quantize_ops(self) -> ConversionOps:
        """What encodes such a weight."""
        return EncodeOperation(self)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes an element, for placing modules on devices."""
        if self.param_needs_quantization(model, param_name):
            return self.places[param_name].spec.bits_per_weight / 8
        return param.element_size()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        share_norms(model, self.heads)
        for module in model.modules():
            if isinstance(module, HLWQWeight):
                _finish(module)
        _check_norms(model)
        # saving reverses these rules from the last to the first, and the first that matches wins
        rules = [rule for rule in model._weight_conversions or () if rule not in self.merges]
        model._weight_conversions = [*rules, *self.merges]
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict]:
        """What save_pretrained writes: format 1 and a guard; brings `modules` up to date, whose names it may change."""
        config = self.quantization_config
        config.quantization = replace(config.quantization, modules=_saved_modules(model, self.heads))
        state = model.state_dict()
        for head in self.heads:
            del state[codes_name(head)]
        guarded = _guarded(model, self.heads)
        if guarded is not None:
            state[f"{guarded}.weight"] = torch.empty(0)
        return state, {}

    def is_serializable(self, *args, **kwargs) -> bool:
        """save_pretrained writes an HLWQ directory."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top: gradients reach the activations, never the codes."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Every product is one custom op."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        if not isinstance(dtype, torch.dtype):  # the config's own, which save_pretrained turns into a word
            dtype = model.dtype
        for place in self.places.values():
            module, dense = model.get_submodule(place.path), self.dense[place.path]
            weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
            if isinstance(dense, nn.Module):
                dense.weight = weight
            if isinstance(module, HLWQLinear):
                dense.bias = module.bias
            if isinstance(module, HLWQScaledEmbedding):
                dense.embed_scale = torch.tensor(module.exact_scale, device=weight.device)
            install(model, place.path, dense if isinstance(dense, nn.Module) else weight)
        for path, embedding in self.heads.items():
            dense, module = self.dense[path], model.get_submodule(path)
            dense.weight, dense.bias = model.get_submodule(embedding).weight, module.bias
            install(model, path, dense)
        rename_tied(model, {codes_name(path): f"{path}.weight" for path in (*self.heads, *self.heads.values())})
        model._weight_conversions = None  # transformers' own rules fit again
        if any(isinstance(module, HLWQExperts) for module in self.modules.values()):
            model.set_experts_implementation(self.experts)
        return model


class EncodeOperation(ConversionOps):
    """Encodes one weight as it arrives, and swaps its module."""

    def __init__(self, quantizer: HLWQQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: Mapping, *, model=None, full_layer_name=None, missing_keys=None, **kwargs) -> dict:
        """{name: weight [..., N, K]} -> {name of the codes: ..., name of the norms: ...}."""
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        place, module = self.quantizer.places[full_layer_name], self.quantizer.modules[full_layer_name]
        dense = self.quantizer.dense[place.path]
        if isinstance(module, HLWQLinear):
            module.bias = dense.bias
        install(model, place.path, module)
        missing_keys.discard(full_layer_name)
        try:
            config = self.quantizer.quantization_config
            power = config.powers[place.sources[0]]
            rows = weight.float().cpu().numpy()
            if len(place.sources) > len(rows):  # gate and up of every expert: the converter encodes them apart
                rows = rows.reshape(len(place.sources), -1, rows.shape[-1])
            words, norms = (
                part.reshape(*weight.shape[:-1], -1) for part in encode(rows, place.spec, config.encoder, power)
            )
        except ValueError as error:
            raise FormatError(f"{full_layer_name}: {error}") from None
        tensors = {codes_name(place.path): torch.from_numpy(words), norms_name(place.path): torch.from_numpy(norms)}
        return {name: tensor.to(weight.device) for name, tensor in tensors.items()}


def register() -> None:
    """Make "hlwq" known to transformers; once is enough, and again does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(HLWQConfig)
        register_quantizer(QUANT_METHOD)(HLWQQuantizer)


def _directory(checkpoint_files: Sequence[str] | None) -> Path | None:
    """The directory of the safetensors files that transformers will read, or None."""
    if not checkpoint_files or not str(checkpoint_files[0]).endswith(".safetensors"):
        return None
    return Path(checkpoint_files[0]).parent


def _check_directory(
    model: PreTrainedModel, directory: Path, places: Mapping[str, Place], modules: Mapping[str, HLWQWeight]
) -> None:
    """Check every header; expect the guard; FormatError for a matrix whose rows are not the model's."""
    checkpoint = open_checkpoint(directory)
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    for key, place in places.items():
        for source in place.sources:
            if source == checkpoint.guarded:
                ignored |= {f"^{re.escape(name)}$" for name in (key, f"{source}.weight")}
        info = checkpoint.tensors[codes_name(place.sources[0])]
        if len(place.sources) == 1 and info.shape != tuple(modules[key].weight_codes.shape):
            expected = list(modules[key].weight_codes.shape)
            raise FormatError(
                f"{info.path}: {codes_name(place.sources[0])} is {list(info.shape)}, but the model needs {expected}; "
                "convert the model again"
            )
    model._keys_to_ignore_on_load_unexpected = ignored


def _loaded_bytes(model: PreTrainedModel, modules: Mapping[str, HLWQWeight]) -> int:
    """Bytes of the model once loaded."""
    tied = model.all_tied_weights_keys
    dense = sum(t.nbytes for name, t in model.state_dict().items() if name not in modules and name not in tied)
    return dense + sum(module.weight_codes.nbytes + module.weight_norms.nbytes for module in modules.values())


def _finish(module: HLWQWeight) -> None:
    """Make the module ready to compute; one that is offloaded keeps format 1, which is what lies on disk."""
    if module.weight_codes.device.type != "meta":
        module.prepare()
        return
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)  # may be 0, a GPU
    module.make_table("cpu" if device is None else device)


def _check_norms(model: PreTrainedModel) -> None:
    """FormatError when a norm is not finite: the file was damaged after it was written."""
    modules = {path: module for path, module in model.named_modules() if isinstance(module, HLWQWeight)}
    found = [(~module.weight_norms.isfinite()).sum().cpu() for module in modules.values()]
    for path, count in zip(modules, torch.stack(found).tolist(), strict=True):
        if count:
            raise FormatError(f"{norms_name(path)} holds {count} values that are not finite; download the file again")


def _saved_modules(model: PreTrainedModel, heads: Mapping[str, str]) -> dict[str, ModuleSpec]:
    """The quantized modules by the names that save_pretrained writes, which are the source's."""
    by_spec: dict[ModuleSpec, dict[str, torch.Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, HLWQWeight) and path not in heads:
            shape = module.weight_codes.shape
            by_spec.setdefault(module.spec, {})[codes_name(path)] = torch.empty(
                shape, dtype=torch.uint32, device="meta"
            )
    suffix = len(codes_name(""))
    return {
        name[:-suffix]: spec for spec, tensors in by_spec.items() for name in revert_weight_conversion(model, tensors)
    }


def _guarded(model: PreTrainedModel, heads: Mapping[str, str]) -> str | None:
    """The module that gets the guard: the first quantized linear layer, else the embedding.

    The guard is an empty tensor under the name of a weight that format 1 replaces. To transformers without this
    package it is a weight of the wrong shape, which is an error; that weight missing would only be a warning, and the
    model would run on random numbers.
    """
    for kind in (HLWQLinear, HLWQEmbedding):
        for path, module in model.named_modules():
            if isinstance(module, kind) and path not in heads:
                return path
    return None


def _get(model: nn.Module, path: str) -> nn.Module | nn.Parameter:
    owner, _, leaf = path.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)
