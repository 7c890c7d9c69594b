"""Where transformers keeps each quantized weight of a checkpoint, and the module that takes its place.

transformers renames tensors while it loads and stacks the linears of a layer's experts: a checkpoint's
`mlp.experts.3.gate_proj` becomes a slice of the parameter `mlp.experts.gate_up_proj`. Everything here follows its own
conversion table, so that a family needs no code of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from hlwq_cuda.checkpoint import FormatError, ModuleSpec, QuantizationConfig, codes_name
from hlwq_cuda.layers import HLWQEmbedding, HLWQExperts, HLWQLinear, HLWQWeight

SERIALIZED = ("weight_codes", "weight_norms")


@dataclass(frozen=True)
class Place:
    """A weight in the model: the parameter `key` of transformers, and the checkpoint's modules that fill it."""

    key: str  # "model.layers.0.mlp.up_proj.weight" or, a stack, "model.layers.0.mlp.experts.down_proj"
    spec: ModuleSpec
    sources: tuple[str, ...]

    @property
    def path(self) -> str:
        """The module that will own the codes."""
        return self.key.removesuffix(".weight")


def find_places(model: PreTrainedModel, quantization: QuantizationConfig) -> dict[str, Place]:
    """The place of every quantized module, by key. `model` is on the meta device, not yet changed.

    FormatError names a module that the architecture does not have, and experts that one stack cannot hold.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    places: dict[str, Place] = {}
    for name, spec in quantization.modules.items():
        found = (
            rename_source_key(candidate, renamings, converters, model.base_model_prefix, state)[0]
            for candidate in (f"{name}.weight", name)
        )
        key = next((key for key in found if key in state), None)
        if key is None:
            raise FormatError(f"{type(model).__name__} has no module {name}; convert the model again")
        other = places.get(key)
        if other is not None and other.spec != spec:
            raise FormatError(
                f"{other.sources[0]} and {name} are one tensor in {type(model).__name__} but differ in bits, block "
                "size or width; convert the model again with equal bits for both"
            )
        places[key] = Place(key, spec, (*(other.sources if other else ()), name))
    return places


def make_module(model: PreTrainedModel, place: Place, codebook: Sequence[float]) -> HLWQWeight:
    """The empty module, on the meta device, that holds the codes at `place`; the model is not changed."""
    owner_path, _, leaf = place.key.rpartition(".")
    owner = model.get_submodule(owner_path)
    if leaf != "weight":
        stack = getattr(owner, leaf)
        check_width(place, stack.shape[-1])
        return HLWQExperts(*stack.shape[:2], place.spec, codebook, stack.dtype, device="meta")
    check_width(place, owner.weight.shape[-1])
    if isinstance(owner, nn.Embedding):
        return _embedding(owner, place, codebook)
    if isinstance(owner, nn.Linear) and type(owner).forward is nn.Linear.forward:
        bias_dtype = None if owner.bias is None else owner.bias.dtype
        return HLWQLinear(owner.out_features, place.spec, codebook, bias_dtype, device="meta")
    raise FormatError(
        f"{place.path} is a {type(owner).__name__}, which cannot be quantized; convert the model again with a "
        "recipe that keeps it"
    )


def install(model: PreTrainedModel, path: str, module: nn.Module | nn.Parameter) -> None:
    """Put `module` where the model has a module or, for a stack of experts, a parameter."""
    owner_path, _, leaf = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    for registry in (owner._parameters, owner._modules):
        registry.pop(leaf, None)
    setattr(owner, leaf, module)


def install_tied_heads(model: PreTrainedModel, modules: Mapping[str, HLWQWeight]) -> dict[str, str]:
    """Make the heads that are tied to an embedding in `modules` (by path) quantized heads; returns {head: embedding}.

    transformers ties the codes, by names that this function puts into its tables; norms are a buffer, which it does
    not tie: share_norms does, once they are loaded.
    """
    heads = {}
    for target, source in model.all_tied_weights_keys.items():
        path, embedding_path = target.removesuffix(".weight"), source.removesuffix(".weight")
        embedding, dense = modules.get(embedding_path), model.get_submodule(path)
        if isinstance(embedding, HLWQEmbedding) and isinstance(dense, nn.Linear):
            head = embedding.as_linear()
            head.weight_codes = nn.Parameter(torch.empty_like(head.weight_codes), requires_grad=False)
            head.register_buffer("weight_norms", torch.empty_like(head.weight_norms), persistent=False)
            head.bias = dense.bias
            install(model, path, head)
            heads[path] = embedding_path
    rename_tied(model, {f"{path}.weight": codes_name(path) for path in (*heads, *heads.values())})
    return heads


def rename_tied(model: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Rename parameters in the tables of tied parameters of the model and its submodels."""
    for path, submodel in model.named_modules():
        if isinstance(submodel, PreTrainedModel):
            prefix = f"{path}." if path else ""
            local = {old.removeprefix(prefix): new.removeprefix(prefix) for old, new in names.items()}
            for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
                table = getattr(submodel, attribute)
                if isinstance(table, Mapping):
                    renamed = {local.get(old, old): local.get(source, source) for old, source in table.items()}
                    setattr(submodel, attribute, renamed)


def share_norms(model: PreTrainedModel, heads: Mapping[str, str]) -> None:
    """Complete what install_tied_heads began, after loading."""
    for head, embedding in heads.items():
        model.get_submodule(head).weight_norms = model.get_submodule(embedding).weight_norms


def serialized_converters(converters: Sequence[WeightConverter], stacks: Sequence[str]) -> list[WeightConverter]:
    """Copies of transformers' merges of experts that merge their codes and norms into `stacks`."""
    copies = []
    for converter in converters:
        target = converter._original_target_patterns[0]
        sources = converter._original_source_patterns
        if len(converter.target_patterns) > 1 or not any(target in stack for stack in stacks):
            continue
        for name in SERIALIZED:
            renamed = [f"{source.removesuffix('.weight')}.{name}" for source in sources]
            operations = [
                MergeExperts(rule.dim) if isinstance(rule, MergeModulelist) else rule for rule in converter.operations
            ]
            copy = WeightConverter(renamed, f"{target}.{name}", operations=operations)
            copy.scope_prefix, copy.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
            copies.append(copy)
    return copies


def check_width(place: Place, width: int) -> None:
    """FormatError when config.json and the architecture disagree about K."""
    if place.spec.in_features != width:
        raise FormatError(
            f"config.json gives {place.sources[0]} in_features {place.spec.in_features}, but the model has {width}; "
            "convert the model again"
        )


class MergeExperts(MergeModulelist):
    """transformers' stack of the tensors of all experts, with a reverse that keeps axes of length one."""

    @property
    def reverse_op(self) -> SplitExperts:
        """For save_pretrained."""
        return SplitExperts(self.dim)


class SplitExperts(SplitModulelist):
    """In transformers 5.17 the original drops every axis of length one: the norms of a row of one block."""

    def convert(self, input_dict: dict, *args, **kwargs) -> dict:
        """{name: tensor [experts, ...]} -> {name of each expert: tensor [...]}; all inputs have one shape."""
        stack = next(iter(input_dict.values()))
        shape = list((stack[0] if isinstance(stack, list) else stack).shape)
        del shape[self.dim]
        return {name: part.reshape(shape) for name, part in super().convert(input_dict, *args, **kwargs).items()}


class HLWQScaledEmbedding(HLWQEmbedding):
    """An embedding whose rows a family multiplies by a constant, as Gemma does by sqrt(hidden size)."""

    def __init__(self, *arguments, scale: float, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.exact_scale = scale
        self.scale = float(
            torch.tensor(scale, dtype=self.dtype, device="cpu")
        )  # those families round it to the weight's dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows times the constant."""
        return super().forward(ids) * self.scale


def _embedding(owner: nn.Embedding, place: Place, codebook: Sequence[float]) -> HLWQEmbedding:
    arguments = (owner.num_embeddings, place.spec, codebook, owner.weight.dtype)
    if type(owner).forward is nn.Embedding.forward:
        return HLWQEmbedding(*arguments, device="meta")
    scale = getattr(owner, "scalar_embed_scale", getattr(owner, "embed_scale", None))
    if isinstance(scale, (int, float)):
        return HLWQScaledEmbedding(*arguments, scale=float(scale), device="meta")
    raise FormatError(
        f"{place.path} is a {type(owner).__name__}, which cannot be quantized; convert the model again with a recipe "
        "that keeps it"
    )
