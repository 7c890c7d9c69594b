"""Read an HLWQ directory: config.json and checked tensors, for tools and tests that run without a backend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.format import FormatError, ModuleSpec, QuantizationConfig, codes_name, norms_name
from convert.packing import unpack
from convert.reference import Encoded, decode
from convert.tensors import TensorInfo, read, read_tensors


@dataclass(frozen=True)
class Checkpoint:
    """An opened HLWQ directory; nothing but headers is in memory."""

    directory: Path
    config: Mapping  # the whole config.json
    quantization: QuantizationConfig
    tensors: Mapping[str, TensorInfo]  # without the guard
    guarded: str | None = None  # the module whose weight's name the guard has, see docs/format.md

    @classmethod
    def open(cls, directory: Path | str) -> Checkpoint:
        """Parse config.json and every header; FormatError for the first thing that format 1 forbids."""
        directory = Path(directory)
        config = read_config(directory)
        quantization = QuantizationConfig.parse(config, str(directory / "config.json"))
        tensors = read_tensors(directory)
        for module, spec in quantization.modules.items():
            _check_module(directory, tensors, module, spec)
        guards = [module for module in quantization.modules if _is_guard(tensors.get(f"{module}.weight"))]
        for module in guards:
            del tensors[f"{module}.weight"]
        return cls(directory, config, quantization, tensors, guards[0] if guards else None)

    def tensor(self, name: str) -> np.ndarray:
        """An unquantized tensor in its stored dtype."""
        if name not in self.tensors:
            raise FormatError(f"{self.directory}: tensor {name} is missing; convert the model again")
        return read(self.tensors[name])

    def encoded(self, module: str, rows: slice = slice(None)) -> Encoded:
        """Unpacked codes and norms of a quantized module, or of a range of its first axis."""
        words = read(self.tensors[codes_name(module)], rows)
        norms = read(self.tensors[norms_name(module)], rows)
        return Encoded(unpack(words, self.quantization.modules[module].bits), norms)

    def weight(self, module: str, rows: slice = slice(None), dtype: type = np.float64) -> np.ndarray:
        """The decoded weight of a quantized module, float [..., N, K]."""
        spec = self.quantization.modules[module]
        return decode(self.encoded(module, rows), spec, self.quantization.codebooks[spec.bits], dtype)


def read_config(directory: Path) -> dict:
    """config.json of a model directory; FormatError when it is missing or not a JSON object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: the file is missing; is this a model directory?") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: not a JSON object")
    return config


def text_config(config: Mapping) -> Mapping:
    """The part of a config.json that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def config_number(config: Mapping, *names: str) -> int:
    """The first of the language model's keys `names` that holds a positive integer, else 0."""
    values = (text_config(config).get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _is_guard(info: TensorInfo | None) -> bool:
    return info is not None and info.shape == (0,)


def _check_module(directory: Path, tensors: Mapping[str, TensorInfo], module: str, spec: ModuleSpec) -> None:
    expected = {codes_name(module): (np.uint32, spec.words), norms_name(module): (np.float16, spec.blocks)}
    for name, (dtype, last_axis) in expected.items():
        if name not in tensors:
            raise FormatError(f"{directory}: tensor {name} is missing; convert the model again")
        info = tensors[name]
        if info.dtype != dtype or len(info.shape) < 2 or info.shape[-1] != last_axis:
            found = f"{info.dtype} {list(info.shape)}"
            raise FormatError(f"{info.path}: {name} is {found}, not {np.dtype(dtype)} [..., {last_axis}]")
    if tensors[codes_name(module)].shape[:-1] != tensors[norms_name(module)].shape[:-1]:
        raise FormatError(f"{directory}: {module} has codes and norms of different shapes; convert the model again")
