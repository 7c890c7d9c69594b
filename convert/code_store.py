"""Codes that calibration found, found again by the content of the source's rows.

A row of K weights is the unit: whatever names an engine gives its tensors, and however it stacks or joins them, rows
stay rows. So calibration runs on the transformers model, keeps the codes under a digest of every source row, and any
target's conversion picks them up. A row that is not in the store is encoded by search.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert import search
from convert.errors import ConvertError
from convert.format import ModuleSpec
from convert.packing import pack, unpack
from convert.reference import Encoded
from convert.tensors import TensorInfo, read, read_header

MANIFEST = "calibration.json"


def row_digests(weight: np.ndarray) -> np.ndarray:
    """A 64-bit digest of every row of a float [..., K] array, by its float32 values: uint64 [...]."""
    rows = np.ascontiguousarray(weight.reshape(-1, weight.shape[-1]), np.float32)
    digests = [hashlib.blake2b(row.data, digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), np.uint64).reshape(weight.shape[:-1])


class CodeStore:
    """A directory with one safetensors file for every calibrated layer, and the fingerprint of what they belong to."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        """Open or create. Refuses a directory that another model, text or plan has filled."""
        self._directory = directory
        manifest = directory / MANIFEST
        if not directory.exists():
            directory.mkdir(parents=True)
            manifest.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found != fingerprint:
            raise ConvertError(
                f"{directory}: holds the calibration of another model, text or recipe; "
                "repeat that command to use it, or delete the directory"
            )

    def has(self, layer: str) -> bool:
        """True if an earlier run finished this layer."""
        return self._path(layer).exists()

    def save(self, layer: str, results: Sequence[tuple[np.ndarray, Encoded, ModuleSpec]]) -> None:
        """Write all results of a layer at once: digests uint64 [N], codes, spec."""
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {}
        for index, (digests, encoded, spec) in enumerate(results):
            tensors[f"{index}.digests"] = digests
            tensors[f"{index}.codes.{spec.bits}.{spec.block_size}"] = pack(encoded.codes, spec.bits)
            tensors[f"{index}.norms"] = encoded.norms
        path = self._path(layer)
        temporary = path.with_suffix(".new")
        save_file(tensors, temporary)
        os.replace(temporary, path)

    def encoder(self) -> StoredEncoder:
        """The encoder that knows every layer saved so far."""
        return StoredEncoder([read_header(path) for path in sorted(self._directory.glob("*.safetensors"))])

    def _path(self, layer: str) -> Path:
        return self._directory / f"{layer}.safetensors"


class StoredEncoder:
    """`(weight, spec) -> Encoded` that looks rows up and encodes the rest by search."""

    def __init__(self, headers: Sequence[dict[str, TensorInfo]]) -> None:
        self._matrices: list[tuple[TensorInfo, TensorInfo, int, int]] = []  # codes, norms, bits, block size
        digests, matrices, rows = [], [], []
        for header in headers:
            for name, info in header.items():
                index, kind, *spec = name.split(".")
                if kind != "codes":
                    continue
                found = read(header[f"{index}.digests"])
                digests.append(found)
                matrices.append(np.full(len(found), len(self._matrices)))
                rows.append(np.arange(len(found)))
                self._matrices.append((info, header[f"{index}.norms"], int(spec[0]), int(spec[1])))
        everything = np.concatenate([np.empty(0, np.uint64), *digests])
        order = np.argsort(everything, kind="stable")
        self._digests = everything[order]
        self._matrix = np.concatenate([np.empty(0, np.int64), *matrices])[order]
        self._row = np.concatenate([np.empty(0, np.int64), *rows])[order]

    def __call__(self, weight: np.ndarray, spec: ModuleSpec, power: float = 0.0) -> Encoded:
        """Codes of every row of a float32 [..., N, K] weight; those of rows it does not know as search.encode does."""
        rows = weight.reshape(-1, weight.shape[-1])
        digests = row_digests(rows)
        position = np.minimum(np.searchsorted(self._digests, digests), max(len(self._digests) - 1, 0))
        known = self._digests[position] == digests if len(self._digests) else np.zeros(len(rows), bool)
        codes = np.empty((len(rows), spec.padded_in_features), np.uint8)
        norms = np.empty((len(rows), spec.blocks), np.float16)
        if not known.all():
            codes[~known], norms[~known] = search.encode(rows[~known], spec, power)
        matrix = np.where(known, self._matrix[position] if len(self._digests) else -1, -1)
        for index in np.unique(matrix[known]):
            here = matrix == index
            wanted = self._row[position[here]]
            codes[here], norms[here] = self._read(index, wanted, spec)
        shape = weight.shape[:-1]
        return Encoded(codes.reshape(*shape, -1), norms.reshape(*shape, -1))

    def _read(self, index: int, rows: np.ndarray, spec: ModuleSpec) -> tuple[np.ndarray, np.ndarray]:
        codes, norms, bits, block_size = self._matrices[index]
        if (bits, block_size) != (spec.bits, spec.block_size):
            raise ConvertError(f"{codes.path}: calibrated at {bits} bits, but the plan says {spec.bits}; delete it")
        part = slice(int(rows.min()), int(rows.max()) + 1)
        words, found = read(codes, part), read(norms, part)
        rows = rows - part.start
        return unpack(words, bits)[rows], found[rows]
