"""Read tensors from the safetensors files of a directory, one at a time, by plain file reads.

The safetensors library maps whole files, whose pages count as resident memory until the file is closed; the
converter promises a small peak, so this module reads the header (the layout is four lines in the safetensors
README) and then only the bytes asked for.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.format import FormatError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` is its first byte in `path`."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * self.dtype.itemsize


def is_float(dtype: np.dtype) -> bool:
    """True for the floating dtypes that models are trained in."""
    return dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, from its header alone. FormatError for a damaged file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise FormatError(f"{path}: truncated or not a safetensors file; download it again")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _parse_entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except FileNotFoundError:
        raise FormatError(f"{path}: the file is missing; download it again") from None
    except FormatError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: the safetensors header is damaged ({error!r}); download the file again") from None
    return tensors


def read_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model directory: where its index says, else in any of its `model*.safetensors`.

    FormatError names a missing shard, a tensor that the index promises and no shard has, a tensor that is in two
    files, or an empty directory.
    """
    if not (directory / INDEX_NAME).exists():
        return _read_without_index(directory)
    shards = _read_index(directory / INDEX_NAME)
    headers = {shard: read_header(directory / shard) for shard in sorted(set(shards.values()))}
    for name, shard in shards.items():
        if name not in headers[shard]:
            raise FormatError(f"{directory / shard}: tensor {name} of the index is not in the file; download it again")
    return {name: headers[shard][name] for name, shard in shards.items()}


def read(info: TensorInfo, rows: slice = slice(None)) -> np.ndarray:
    """The tensor, or the given range of its first axis (step 1), as a new array."""
    if not info.shape:
        return np.fromfile(info.path, info.dtype, 1, offset=info.start).reshape(())
    first, last, _ = rows.indices(info.shape[0])
    shape = (max(last - first, 0), *info.shape[1:])
    row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
    data = np.fromfile(info.path, info.dtype, math.prod(shape), offset=info.start + first * row_bytes)
    if data.size != math.prod(shape):
        raise FormatError(f"{info.path}: the file ended inside a tensor; was it changed during the run?")
    return data.reshape(shape)


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor: {tensor name: file name}."""
    try:
        shards = {str(name): str(shard) for name, shard in json.loads(path.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: not a safetensors index ({error!r}); download it again") from None
    outside = next((shard for shard in shards.values() if Path(shard).name != shard), None)
    if outside is not None:
        raise FormatError(f"{path}: {outside!r} is not the name of a file beside the index")
    return shards


def _read_without_index(directory: Path) -> dict[str, TensorInfo]:
    paths = sorted(directory.glob("model*.safetensors"))
    if not paths:
        others = [path.name for path in directory.glob("*.bin")] + [path.name for path in directory.glob("*.pth")]
        hint = f"save {min(others)} as safetensors first" if others else "is this a model directory?"
        raise FormatError(f"{directory}: no model*.safetensors file; {hint}")
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        _check_shard_count(path, paths)
        for name, info in read_header(path).items():
            if name in tensors:
                raise FormatError(f"{path}: tensor {name} is also in {tensors[name].path.name}; which one is meant?")
            tensors[name] = info
    return tensors


def _check_shard_count(path: Path, paths: list[Path]) -> None:
    numbered = re.fullmatch(r"(model-)(\d+)-of-(\d+)(\.safetensors)", path.name)
    if numbered is None:
        return
    prefix, digits, total, suffix = numbered[1], len(numbered[2]), numbered[3], numbered[4]
    for index in range(1, int(total) + 1):
        shard = path.with_name(f"{prefix}{index:0{digits}}-of-{total}{suffix}")
        if shard not in paths:
            raise FormatError(f"{shard}: the file is missing; download it again")


def _parse_entry(path: Path, name: str, entry: dict, data_start: int, file_size: int) -> TensorInfo:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise FormatError(f"{path}: tensor {name} has dtype {entry['dtype']}, which is not supported")
    shape = tuple(int(length) for length in entry["shape"])
    begin, end = entry["data_offsets"]
    info = TensorInfo(path, dtype, shape, data_start + begin)
    if end - begin != info.nbytes or begin < 0 or min(shape, default=0) < 0:
        raise FormatError(f"{path}: tensor {name}: {end - begin} bytes do not fit {entry['dtype']} {list(shape)}")
    if data_start + end > file_size:
        raise FormatError(f"{path}: truncated inside tensor {name}; download it again")
    return info
