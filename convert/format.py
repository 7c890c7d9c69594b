"""Names, shapes and the config schema of HLWQ checkpoints, format version 1 (docs/format.md).

Standard library only: both backends import this module, so it must cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

FORMAT_VERSION = 1
QUANT_METHOD = "hlwq"
SUPPORTED_BITS = (2, 3, 4, 5, 6, 8)
BLOCK_SIZES = (128, 64, 32)  # in order of preference
WORD_BITS = 32  # codes are stored in uint32 words
NORM_BITS = 16  # norms are float16


class FormatError(ValueError):
    """A checkpoint (or its config) is not valid HLWQ format 1. The message names file, tensor and remedy."""


@dataclass(frozen=True)
class ModuleSpec:
    """How one module is quantized: `bits` a code, `block_size` codes a norm, `in_features` = K before padding."""

    bits: int
    block_size: int
    in_features: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in SUPPORTED_BITS:
            raise FormatError(f"bits is {self.bits!r}; the format has {', '.join(map(str, SUPPORTED_BITS))}")
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise FormatError(f"block_size is {self.block_size!r}; the format has {', '.join(map(str, BLOCK_SIZES))}")
        if type(self.in_features) is not int or self.in_features < 1:
            raise FormatError(f"in_features is {self.in_features!r}; it must be a positive integer")

    @property
    def blocks(self) -> int:
        """Blocks (and norms) a row."""
        return -(-self.in_features // self.block_size)

    @property
    def padded_in_features(self) -> int:
        """Kp: K rounded up to whole blocks."""
        return self.blocks * self.block_size

    @property
    def words(self) -> int:
        """uint32 words of codes a row."""
        return self.padded_in_features * self.bits // WORD_BITS

    @property
    def bytes_per_row(self) -> int:
        """Stored bytes a row: codes and norms."""
        return self.words * (WORD_BITS // 8) + self.blocks * (NORM_BITS // 8)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight of the source, norms and padding included."""
        return 8 * self.bytes_per_row / self.in_features


@dataclass(frozen=True)
class QuantizationConfig:
    """The parsed `quantization_config` of config.json.

    `bits` and `block_size` are the summary that tools print; `modules` is the truth. `codebooks` maps bits to
    the ascending table of 2**bits centroids. `base_model_type` is set in directories made for MLX only: the
    source's `model_type`, which config.json replaces by ours.
    """

    bits: int
    block_size: int
    codebooks: Mapping[int, tuple[float, ...]]
    modules: Mapping[str, ModuleSpec]
    base_model_type: str | None = None

    def to_dict(self) -> dict:
        """The JSON object that `parse` reads."""
        out: dict = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "block_size": self.block_size,
            "codebooks": {str(bits): list(table) for bits, table in sorted(self.codebooks.items())},
            "modules": {
                name: {"bits": spec.bits, "block_size": spec.block_size, "in_features": spec.in_features}
                for name, spec in self.modules.items()
            },
        }
        if self.base_model_type is not None:
            out["base_model_type"] = self.base_model_type
        return out

    @classmethod
    def parse(cls, config: Mapping, where: str) -> QuantizationConfig:
        """Check the `quantization_config` object of `config` (a whole config.json) found in the file `where`.

        Raises FormatError, one sentence, for anything that a reader of format version 1 must refuse.
        """
        quant = config.get("quantization_config")
        if not isinstance(quant, Mapping):
            raise FormatError(f"{where}: no quantization_config; this is not an HLWQ checkpoint")
        method, version = quant.get("quant_method"), quant.get("format_version")
        if method != QUANT_METHOD:
            raise FormatError(f"{where}: quant_method is {method!r}, not {QUANT_METHOD!r}")
        if type(version) is not int or version != FORMAT_VERSION:
            raise FormatError(
                f"{where}: format_version is {version!r}, this release reads {FORMAT_VERSION}; "
                "update the package or convert the model again"
            )
        modules = {name: _parse_module(name, entry, where) for name, entry in _mapping(quant, "modules", where).items()}
        codebooks = dict(
            _parse_codebook(key, table, where) for key, table in _mapping(quant, "codebooks", where).items()
        )
        missing = sorted({spec.bits for spec in modules.values()} - codebooks.keys())
        if missing:
            raise FormatError(f"{where}: codebooks lacks the table for {missing[0]} bits that modules use")
        base = quant.get("base_model_type")
        return cls(quant.get("bits", 0), quant.get("block_size", 0), codebooks, modules, base)


def default_block_size(in_features: int) -> int:
    """128 where it divides K, else the largest of 64 and 32 that does, else 128 with padding."""
    return next((size for size in BLOCK_SIZES if in_features % size == 0), BLOCK_SIZES[0])


def codes_name(module: str) -> str:
    """Tensor of the packed codes: uint32 [..., N, Kp * bits / 32]."""
    return f"{module}.weight_codes"


def norms_name(module: str) -> str:
    """Tensor of the block norms: float16 [..., N, Kp / B]."""
    return f"{module}.weight_norms"


def _mapping(quant: Mapping, key: str, where: str) -> Mapping:
    value = quant.get(key)
    if not isinstance(value, Mapping):
        raise FormatError(f"{where}: quantization_config.{key} is missing or not an object; convert the model again")
    return value


def _parse_module(name: str, entry: object, where: str) -> ModuleSpec:
    try:
        return ModuleSpec(entry["bits"], entry["block_size"], entry["in_features"])  # type: ignore[index]
    except (KeyError, TypeError):
        raise FormatError(f"{where}: module {name} needs bits, block_size and in_features, found {entry!r}") from None
    except FormatError as error:
        raise FormatError(f"{where}: module {name}: {error}") from None


def _parse_codebook(key: str, table: object, where: str) -> tuple[int, tuple[float, ...]]:
    values = tuple(table) if isinstance(table, (list, tuple)) else ()
    numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    bits = next((bits for bits in SUPPORTED_BITS if str(bits) == key), None)
    if bits is None or len(values) != 2**bits or not numbers or list(values) != sorted(set(values)):
        raise FormatError(f"{where}: codebook {key!r} must be 2**bits ascending finite numbers, for bits of the format")
    return bits, values
