"""Check an HLWQ directory: headers, checksums, finite values, and against its source the error of every tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.codebook import expected_error
from convert.errors import ConvertError
from convert.format import codes_name, norms_name
from convert.progress import Progress, no_progress
from convert.target import OutputTensor, Target
from convert.tensors import TensorInfo, is_float, read
from convert.writer import CHECKSUMS_NAME, checksum

CHUNK_WEIGHTS = 2**21  # decoded at a time
SUSPECT_FACTOR = 2.0  # a good encoder stays below this multiple of the error that the codebook has on normal data


@dataclass(frozen=True)
class Verdict:
    """What was checked and found: one sentence a problem, relative errors worst first."""

    directory: Path
    problems: tuple[str, ...]
    checked_files: int
    checked_tensors: int
    errors: tuple[tuple[str, float], ...] = ()


def verify(checkpoint: Checkpoint, target: Target | None, threads: int, progress: Progress = no_progress) -> Verdict:
    """Check everything in `checkpoint`; with the `target` it was made from, the error of every tensor too.

    (Names, dtypes and shapes were checked when the checkpoint was opened.)
    """
    paths = sorted({info.path for info in checkpoint.tensors.values()})
    with ThreadPoolExecutor(threads) as pool:
        problems = [*_bad_checksums(checkpoint, paths, progress), *_not_finite(checkpoint, pool)]
        errors = [] if target is None else list(_relative_errors(checkpoint, target, pool, progress))
    if target is not None:
        problems += _unmatched(checkpoint, target)
        problems += [
            f"tensor {tensor.name} differs from {tensor.where}: relative error {error:.4f}"
            for tensor, error in errors
            if not error <= _suspect(checkpoint, tensor)
        ]
    worst_first = sorted(((tensor.name, error) for tensor, error in errors), key=lambda item: (-item[1], item[0]))
    return Verdict(checkpoint.directory, tuple(problems), len(paths), len(checkpoint.tensors), tuple(worst_first))


def work(checkpoint: Checkpoint, target: Target | None) -> int:
    """The total that `verify` reports to `progress`."""
    sizes = sum(path.stat().st_size for path in {info.path for info in checkpoint.tensors.values()})
    return sizes + sum(tensor.size for tensor in target.tensors if _is_stored(checkpoint, tensor)) if target else sizes


def _bad_checksums(checkpoint: Checkpoint, paths: list[Path], progress: Progress) -> Iterator[str]:
    sums = _read_sums(checkpoint.directory)
    for path in paths:
        recorded = sums.get(path.name)
        if recorded is None:
            yield f"{path}: {CHECKSUMS_NAME} has no checksum for the file"
        elif checksum(path) != recorded:
            yield f"{path}: the checksum differs from {CHECKSUMS_NAME}; the file is damaged"
        progress(path.stat().st_size)


def _read_sums(directory: Path) -> dict[str, str]:
    try:
        lines = (directory / CHECKSUMS_NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        lines = ["not text"]
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(pair) != 2 or len(pair[0]) != 64 for pair in pairs):
        raise ConvertError(f"{directory / CHECKSUMS_NAME}: not lines of a checksum and a file name")
    return {name: digest for digest, name in pairs}


def _not_finite(checkpoint: Checkpoint, pool: ThreadPoolExecutor) -> Iterator[str]:
    floating = {name: info for name, info in checkpoint.tensors.items() if is_float(info.dtype)}
    for (name, info), finite in zip(floating.items(), pool.map(_is_finite, floating.values()), strict=True):
        if not finite:
            yield f"{info.path}: tensor {name} holds NaN or infinity"


def _is_finite(info: TensorInfo) -> bool:
    return all(np.isfinite(read(info, rows)).all() for rows in _chunks(info.shape))


def _is_stored(checkpoint: Checkpoint, tensor: OutputTensor) -> bool:
    return tensor.module in checkpoint.quantization.modules or tensor.name in checkpoint.tensors


def _unmatched(checkpoint: Checkpoint, target: Target) -> Iterator[str]:
    for tensor in target.tensors:
        if not _is_stored(checkpoint, tensor):
            yield f"tensor {tensor.name} of {tensor.where} is not in the checkpoint"
    names = {tensor.name for tensor in target.tensors}
    modules = {tensor.module for tensor in target.tensors}
    quantized = checkpoint.quantization.modules
    stored = {name for module in quantized for name in (codes_name(module), norms_name(module))}
    for name in [*(checkpoint.tensors.keys() - stored - names), *(quantized.keys() - modules)]:
        yield f"{name} is in the checkpoint but not in the source"


def _relative_errors(
    checkpoint: Checkpoint, target: Target, pool: ThreadPoolExecutor, progress: Progress
) -> Iterator[tuple[OutputTensor, float]]:
    known = [tensor for tensor in target.tensors if _is_stored(checkpoint, tensor)]
    errors = pool.map(lambda tensor: _relative_error(checkpoint, target, tensor), known)
    for tensor, error in zip(known, errors, strict=True):
        progress(tensor.size)
        yield tensor, error


def _relative_error(checkpoint: Checkpoint, target: Target, tensor: OutputTensor) -> float:
    """|W - W'| / |W|; infinity when shapes differ."""
    module = tensor.module if tensor.module in checkpoint.quantization.modules else None
    if module is None:
        shape = checkpoint.tensors[tensor.name].shape
    else:
        spec = checkpoint.quantization.modules[module]
        shape = (*checkpoint.tensors[codes_name(module)].shape[:-1], spec.in_features)
    if shape != tensor.shape:
        return math.inf
    difference = total = 0.0
    for rows in _chunks(tensor.shape):
        source = target.read(tensor, rows).astype(np.float32)
        if module is None:
            stored = read(checkpoint.tensors[tensor.name], rows).astype(np.float32)
        else:
            stored = checkpoint.weight(module, rows, np.float32)
        difference += float(np.square(source - stored, dtype=np.float64).sum())
        total += float(np.square(source, dtype=np.float64).sum())
    if difference == 0:
        return 0.0
    return math.sqrt(difference / total) if total else math.inf


def _suspect(checkpoint: Checkpoint, tensor: OutputTensor) -> float:
    """The relative error above which a tensor cannot have come from this source."""
    spec = checkpoint.quantization.modules.get(tensor.module)
    if spec is None:
        return 2.0**-8  # at most rounded once to bfloat16 by --dtype
    return SUSPECT_FACTOR * math.sqrt(expected_error(checkpoint.quantization.codebooks[spec.bits]))


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    length = shape[0] if shape else 1
    step = max(CHUNK_WEIGHTS * length // max(math.prod(shape), 1), 1)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
