"""Write one safetensors file: header first, then the tensors in any order, row by row.

The safetensors library writes a file from tensors that are all in memory; the converter never has them all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from convert.tensors import DTYPE_NAMES


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an output file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardFile:
    """An open safetensors file whose header is written first; tensors are filled in any order, row by row."""

    def __init__(self, file: BinaryIO, tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> None:
        # widest elements first: every tensor is aligned to its dtype without holes, which the format forbids
        ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        header: dict = {"__metadata__": dict(metadata)}
        offsets: dict[str, tuple[int, StoredTensor]] = {}
        end = 0
        for tensor in ordered:
            start, end = end, end + tensor.nbytes
            offsets[tensor.name] = (start, tensor)
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
        self._file, self._offsets, self._data_start = file, offsets, 8 + len(text)

    def write(self, name: str, first_row: int, data: np.ndarray) -> None:
        """Put `data` at index `first_row` of the first axis of tensor `name`."""
        start, tensor = self._offsets[name]
        row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape and tensor.shape[0] else 0
        self._file.seek(self._data_start + start + first_row * row_bytes)
        self._file.write(np.ascontiguousarray(data).view(np.uint8).reshape(-1).data)
