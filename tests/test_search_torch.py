"""search_torch.py gives the codes of search.py: everywhere but where two choices are equally good to float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convert import search, search_torch  # noqa: E402
from convert.__main__ import main  # noqa: E402
from convert.checkpoint import Checkpoint  # noqa: E402
from convert.codebook import codebook  # noqa: E402
from convert.format import BLOCK_SIZES, SUPPORTED_BITS, ModuleSpec  # noqa: E402
from convert.reference import Encoded, decode  # noqa: E402
from tests.sources import write_llama  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weight(rows: int, columns: int) -> np.ndarray:
    """Columns of very different sizes, a zero row, a constant block."""
    rng = np.random.default_rng(columns)
    found = rng.standard_normal((rows, columns)) * rng.lognormal(0, 0.7, columns)
    found[3] = 0
    found[5, :32] = 0.7
    return found.astype(np.float32)


def squared_error(source: np.ndarray, encoded: Encoded, spec: ModuleSpec) -> float:
    """Of the whole weight."""
    return float(((decode(encoded, spec, codebook(spec.bits)) - source) ** 2).sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [0.0, -2.0, 1.0])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_same_codes_as_numpy(device: str, power: float, bits: int, block_size: int):
    source = weight(300, 200)
    spec = ModuleSpec(bits, block_size, 200)
    expected = search.encode(source, spec, power)
    codes, norms = search_torch.encode(torch.from_numpy(source).to(device), spec, power)
    found = Encoded(codes.cpu().numpy(), norms.cpu().numpy())
    same = (found.codes == expected.codes).reshape(-1, block_size).all(axis=1) & (found.norms == expected.norms).ravel()
    assert (~same).mean() < (0.05 if bits == 8 else 0.01)  # measured: .035 and .004
    error, other = (squared_error(source, each, spec) for each in (found, expected))
    assert error == pytest.approx(other, rel=1e-2 if bits == 8 else 1e-3)


def test_a_matrix_is_cut_as_by_numpy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "GROUP_WEIGHTS", 20 * 256)
    source, spec = weight(50, 256), ModuleSpec(4, 64, 256)
    whole, expected = search_torch.encode(torch.from_numpy(source), spec, -2.0), search.encode(source, spec, -2.0)
    pieces = [search_torch.encode(torch.from_numpy(source[start : start + 20]), spec, -2.0) for start in (0, 20, 40)]
    for found, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts))
    assert (whole[0].numpy() == expected.codes).mean() > 0.99


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_numpy_refuses(value: float):
    source = torch.ones(2, 128)
    source[1, 5] = value
    for power in (0.0, -2.0):
        with pytest.raises(ValueError, match="NaN or infinity"):
            search_torch.encode(source, ModuleSpec(4, 128, 128), power)
    with pytest.raises(ValueError, match="beyond float16"):
        search_torch.encode(torch.full((1, 128), 1e5), ModuleSpec(4, 128, 128))


def test_encoder_keeps_leading_axes():
    source = np.stack([weight(9, 128), weight(9, 128)[::-1]])
    spec = ModuleSpec(4, 128, 128)
    found, expected = search_torch.DeviceEncoder("cpu")(source, spec, -2.0), search.encode(source, spec, -2.0)
    assert found.codes.shape == expected.codes.shape and found.norms.shape == expected.norms.shape
    assert (found.codes == expected.codes).mean() > 0.99


def convert(source: Path, output: Path, *options: str) -> int:
    return main(["--model", str(source), "--output", str(output), "--target", "cuda", *options])


@pytest.mark.gpu
def test_command_on_the_gpu_writes_the_same_model(tmp_path: Path):
    source = write_llama(tmp_path / "llama")
    assert convert(source, tmp_path / "numpy") == 0
    assert convert(source, tmp_path / "gpu", "--device", "cuda") == 0
    first, second = (Checkpoint.open(tmp_path / name) for name in ("numpy", "gpu"))
    for module in first.quantization.modules:
        assert (first.encoded(module).codes == second.encoded(module).codes).mean() > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda", "--encoder", "plain"), "--encoder plain runs in numpy"),
        (("--device", "mps", "--encoder", "calibrated"), "needs float64"),
        (("--device", "mps"), "torch finds no such device here"),
    ],
)
def test_devices_that_do_not_serve_are_one_sentence(tmp_path: Path, capsys, options: tuple[str, ...], message: str):
    if torch.backends.mps.is_available() and message.startswith("torch"):
        pytest.skip("this machine has it")
    source = write_llama(tmp_path / "llama")
    assert convert(source, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
