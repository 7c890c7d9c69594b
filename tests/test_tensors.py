"""tensors.py and shard.py: what is written is read back, and one test for every way a file can be hostile."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert.format import FormatError
from convert.shard import ShardFile, StoredTensor
from convert.tensors import DTYPES, INDEX_NAME, read, read_header, read_tensors


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize("dtype", [name for name in DTYPES if not name.startswith("F8")])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 0), (2, 3, 4)])
def test_reads_what_the_safetensors_library_writes(tmp_path: Path, dtype: str, shape: tuple[int, ...]):
    data = np.random.default_rng(0).integers(0, 2, shape).astype(DTYPES[dtype])
    safetensors.numpy.save_file({"x": data, "y": data}, tmp_path / "model.safetensors")
    info = read_tensors(tmp_path)["y"]
    assert (info.shape, info.dtype) == (shape, DTYPES[dtype])
    assert read(info).tobytes() == data.tobytes() and read(info).shape == shape


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 3), slice(3, 7), slice(6, None), slice(None)])
def test_reads_a_range_of_rows(tmp_path: Path, rows: slice):
    data = np.random.default_rng(0).standard_normal((7, 5, 2)).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"x": data}, tmp_path / "model.safetensors")
    assert np.array_equal(read(read_header(tmp_path / "model.safetensors")["x"], rows), data[rows])


def test_writes_what_the_safetensors_library_reads(tmp_path: Path):
    generator = np.random.default_rng(0)
    tensors = {
        "odd": generator.standard_normal(3).astype(np.float16),
        "words": generator.integers(0, 2**32, (5, 6), np.uint32),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        stored = [StoredTensor(name, data.dtype, data.shape) for name, data in tensors.items()]
        shard = ShardFile(file, stored, {"format": "pt"})
        shard.write("words", 3, tensors["words"][3:])  # in any order, in pieces
        shard.write("odd", 0, tensors["odd"])
        shard.write("scalar", 0, tensors["scalar"])
        shard.write("words", 0, tensors["words"][:3])
    found = safetensors.numpy.load_file(path)
    assert found.keys() == tensors.keys()
    for name, data in tensors.items():
        assert found[name].dtype == data.dtype and np.array_equal(found[name], data)


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 8 + b"{}", b"\x40" + b"\0" * 7 + b"{}"])
def test_a_file_without_a_whole_header_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"model.safetensors: truncated or not a safetensors file"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe{}",
        b"[" * 100_000,
        [],
        {"a": None},
        {"a": {}},
        {"a": {"dtype": "F32", "shape": [2]}},
        entry(shape=None),
        entry(shape=["x"]),
        entry(offsets=[0]),
        entry(offsets=["a", "b"]),
        entry(dtype=["F32"]),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: object):
    with pytest.raises(FormatError, match="the safetensors header is damaged"):
        read_header(raw_file(tmp_path / "x.safetensors", header, bytes(16)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry(dtype="F4"), "tensor a has dtype F4, which is not supported"),
        (entry(shape=(2, 3)), r"tensor a: 16 bytes do not fit F32 \[2, 3\]"),
        (entry(shape=(-2, -2)), "tensor a: 16 bytes do not fit"),
        (entry(offsets=(16, 0)), "tensor a: -16 bytes do not fit"),
        (entry(offsets=(-16, 0)), "tensor a: 16 bytes do not fit"),
        (entry(offsets=(8, 24)), "truncated inside tensor a"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path: Path, header: dict, message: str):
    with pytest.raises(FormatError, match=message):
        read_header(raw_file(tmp_path / "x.safetensors", header, bytes(16)))


def test_a_file_that_shrinks_during_the_run_is_noticed(tmp_path: Path):
    path = raw_file(tmp_path / "x.safetensors", entry(), bytes(16))
    info = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FormatError, match="the file ended inside a tensor"):
        read(info)


INDEXES = {
    "not json": "not a safetensors index",
    "[]": "not a safetensors index",
    '{"weight_map": ["a"]}': "not a safetensors index",
    '{"weight_map": {"a": "../other.safetensors"}}': "is not the name of a file beside the index",
    '{"weight_map": {"a": "/etc/passwd"}}': "is not the name of a file beside the index",
    '{"weight_map": {"a": "missing.safetensors"}}': "missing.safetensors: the file is missing",
    '{"weight_map": {"b": "model.safetensors"}}': "model.safetensors: tensor b of the index is not in the file",
}


@pytest.mark.parametrize("index", INDEXES)
def test_a_hostile_index_is_refused(tmp_path: Path, index: str):
    raw_file(tmp_path / "model.safetensors", entry(), bytes(16))
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(FormatError, match=INDEXES[index]):
        read_tensors(tmp_path)


def test_the_index_decides_between_two_files(tmp_path: Path):
    raw_file(tmp_path / "model-1.safetensors", entry(), bytes(16))
    raw_file(tmp_path / "model-2.safetensors", entry(), b"\1" * 16)
    with pytest.raises(FormatError, match=r"model-2.safetensors: tensor a is also in model-1.safetensors"):
        read_tensors(tmp_path)
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert not read(read_tensors(tmp_path)["a"]).any()


def test_a_directory_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(FormatError, match=r"no model\*.safetensors file; is this a model directory"):
        read_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FormatError, match=r"no model\*.safetensors file; save pytorch_model.bin as safetensors"):
        read_tensors(tmp_path)


def test_missing_shards_are_counted_without_an_index(tmp_path: Path):
    raw_file(tmp_path / "model-00001-of-00002.safetensors", entry(), bytes(16))
    with pytest.raises(FormatError, match=r"model-00002-of-00002.safetensors: the file is missing"):
        read_tensors(tmp_path)
