"""What a conversion will write: a pure function of the target's tensors and the recipe. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convert.checkpoint import config_number
from convert.codebook import codebook
from convert.errors import ConvertError
from convert.format import ModuleSpec, QuantizationConfig, codes_name, default_block_size, norms_name
from convert.recipe import Recipe, check_fused
from convert.shard import StoredTensor
from convert.target import Kind, OutputTensor
from convert.tensors import is_float


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the target and what becomes of it: `spec` is None for one that is copied."""

    tensor: OutputTensor
    spec: ModuleSpec | None
    dtype: np.dtype  # of a copied tensor in the output
    power: float = 0.0  # how the search encoder weighs the inputs, see column_power
    guard: bool = False  # an empty tensor under the weight's own name joins the codes (docs/format.md)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors that it becomes: codes and norms, or itself."""
        if self.spec is None:
            return (StoredTensor(self.tensor.name, self.dtype, self.tensor.shape),)
        rows, module = self.tensor.shape[:-1], self.tensor.module
        guard = (StoredTensor(self.tensor.name, np.dtype(np.float16), (0,)),) if self.guard else ()
        return (
            StoredTensor(codes_name(module), np.dtype(np.uint32), (*rows, self.spec.words)),
            StoredTensor(norms_name(module), np.dtype(np.float16), (*rows, self.spec.blocks)),
            *guard,
        )

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return sum(stored.nbytes for stored in self.stored)


@dataclass(frozen=True)
class Plan:
    """Every tensor of the output in order of writing."""

    tensors: tuple[PlannedTensor, ...]
    dtype: np.dtype | None = None  # what --dtype asked for

    def guarded(self) -> Plan:
        """The plan with a guard at its first quantized linear layer, else its first matrix: for transformers."""
        matrices = [planned for planned in self.quantized if ".experts." not in planned.tensor.name]
        matrices.sort(key=lambda planned: planned.tensor.kind is not Kind.LINEAR)  # stable
        return replace(
            self,
            tensors=tuple(replace(planned, guard=planned in matrices[:1]) for planned in self.tensors),
        )

    @property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        """The tensors that become codes and norms."""
        return tuple(planned for planned in self.tensors if planned.spec)

    @property
    def weights(self) -> int:
        """Elements of all tensors."""
        return sum(planned.tensor.size for planned in self.tensors)

    @property
    def quantized_weights(self) -> int:
        """Elements that become codes."""
        return sum(planned.tensor.size for planned in self.quantized)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the output."""
        return sum(planned.nbytes for planned in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight over the whole model, norms, padding and unquantized tensors included."""
        return 8 * self.nbytes / max(self.weights, 1)

    def quantization(self) -> QuantizationConfig:
        """The `quantization_config` of the output; `bits` and `block_size` are those of the most weights."""
        modules = {planned.tensor.module: planned.spec for planned in self.quantized if planned.spec}
        weights: dict[tuple[int, int], int] = {}
        for planned in self.quantized:
            assert planned.spec
            key = (planned.spec.bits, planned.spec.block_size)
            weights[key] = weights.get(key, 0) + planned.tensor.size
        bits, block_size = max(weights, key=lambda key: weights[key])
        tables = {spec.bits: codebook(spec.bits) for spec in modules.values()}
        return QuantizationConfig(bits, block_size, tables, modules)


def make_plan(
    tensors: Sequence[OutputTensor], recipe: Recipe, block_size: int | None = None, dtype: np.dtype | None = None
) -> Plan:
    """Give every tensor its bits and block size. `dtype` is what floating tensors that stay unquantized become."""
    tied = not any(tensor.kind is Kind.HEAD for tensor in tensors)
    planned = tuple(_plan_tensor(tensor, recipe, tied, block_size, dtype) for tensor in tensors)
    check_fused(
        (each.tensor.module, each.spec.bits if each.spec else None) for each in planned if each.tensor.kind is not None
    )
    if not any(each.spec for each in planned):
        raise ConvertError("nothing to quantize: the model has no linear layer or embedding that the recipe covers")
    return Plan(planned, dtype)


def _plan_tensor(
    tensor: OutputTensor, recipe: Recipe, tied: bool, block_size: int | None, dtype: np.dtype | None
) -> PlannedTensor:
    bits = recipe.bits(tensor, tied) if tensor.kind is not None else None
    if bits is not None:
        in_features = tensor.shape[-1]
        spec = ModuleSpec(bits, block_size or default_block_size(in_features), in_features)
        power = column_power(tensor.module) if tensor.kind in (Kind.LINEAR, Kind.EXPERTS) else 0.0
        if tensor.kind is Kind.EMBEDDING and tied:
            power = TIED_POWER
        return PlannedTensor(tensor, spec, tensor.dtype, power)
    cast = dtype is not None and is_float(tensor.dtype) and not tensor.keep_dtype
    return PlannedTensor(tensor, None, dtype if cast and dtype is not None else tensor.dtype)


def legal_tensor_parallel(plan: Plan, config: Mapping, largest: int = 16) -> list[int]:
    """Degrees by which every quantized matrix and every attention head can be split without moving a block."""
    heads = config_number(config, "num_attention_heads", "n_head") or 1
    kv_heads = config_number(config, "num_key_value_heads") or heads
    degrees = [2**power for power in range(largest.bit_length()) if 2**power <= largest]
    return [
        degree
        for degree in degrees
        if heads % degree == 0
        and (kv_heads % degree == 0 or degree % kv_heads == 0)
        and all(_splits(planned, degree) for planned in plan.quantized)
    ]


# Linears that write to the residual stream; engines split these by columns, and all others by rows.
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "w2", "c_proj", "dense_4h_to_h", "fc2", "wo", "dense")

# Measured on two models (docs/quality.md): the input of a matrix that reads the residual stream matters in inverse
# proportion to the square of its column's size; that of a writer says nothing; that of a tied embedding in proportion.
READER_POWER = -2.0
TIED_POWER = 1.0


def column_power(name: str) -> float:
    """How the inputs of a linear layer matter by the size of their columns (convert/search.py), by its name."""
    leaf = name.removesuffix(".weight").partition("[")[0].rpartition(".")[2]
    return 0.0 if leaf in ROW_PARALLEL else READER_POWER


def _splits(planned: PlannedTensor, degree: int) -> bool:
    spec, tensor = planned.spec, planned.tensor
    assert spec
    if tensor.kind in (Kind.EMBEDDING, Kind.HEAD):
        return True  # engines pad the vocabulary
    if tensor.module.rpartition(".")[2] in ROW_PARALLEL:
        return degree == 1 or spec.in_features % (degree * spec.block_size) == 0
    return tensor.shape[-2] % degree == 0
