"""What the pipeline asks of a target: which tensors to write, how to read them, and which files go with them.

A target knows the names and the config that one engine expects (target_cuda.py, target_mlx.py). The pipeline knows
neither engine: it sees `OutputTensor`s, reads them row by row, and writes what the plan says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import numpy as np

from convert.errors import ConvertError
from convert.format import QuantizationConfig

TARGETS = ("mlx", "cuda")
STYLES = ("package", "shim")  # mlx: the installed package, or a loader file in the directory (--trust-remote-code)


class Kind(Enum):
    """What a quantizable weight does in the model; recipes choose bits by it."""

    LINEAR = "linear"  # [N, K]
    EMBEDDING = "embedding"  # [vocabulary, hidden]; also the output head of a model with tied embeddings
    HEAD = "head"  # [vocabulary, hidden]
    EXPERTS = "experts"  # stacked linears [experts, N, K]


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output, before quantization, under the name that the engine expects."""

    name: str  # "model.layers.0.mlp.up_proj.weight"
    shape: tuple[int, ...]
    dtype: np.dtype  # as in the source
    where: str  # the source's file and tensor, for error messages
    kind: Kind | None = None  # None: cannot be quantized, and `reason` says why
    reason: str = ""
    keep_dtype: bool = False  # stays in its dtype even when --dtype asks for another

    @property
    def module(self) -> str:
        """The module that owns the weight: the prefix of `weight_codes` and `weight_norms`."""
        return self.name.removesuffix(".weight")

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Target(Protocol):
    """A source model seen through the names of one engine."""

    format: str  # safetensors metadata "format": "pt" or "mlx"

    @property
    def tensors(self) -> Sequence[OutputTensor]:
        """Everything to write, in the order of writing. Known from headers alone: no weight is read."""
        ...

    def read(self, tensor: OutputTensor, rows: slice) -> np.ndarray:
        """A range of the tensor's first axis in `tensor.dtype` (a scalar whole). Called from several threads."""
        ...

    def config(self, quantization: QuantizationConfig) -> dict:
        """The whole config.json of the output."""
        ...

    def files(self) -> Mapping[str, Path | str]:
        """Other files of the output by name: a path to copy, or the text to write (tokenizer, license, ...)."""
        ...


def open_target(name: str, directory: Path, style: str = STYLES[0]) -> Target:
    """The target `name` for the model in `directory`; `style` is how mlx-lm finds our loader."""
    if name == "cuda":
        if style != STYLES[0]:
            raise ConvertError(f"--style {style} is for --target mlx; leave it out")
        from convert.target_cuda import CudaTarget

        return CudaTarget(directory)
    from convert.target_mlx import MlxTarget

    return MlxTarget(directory, style)
