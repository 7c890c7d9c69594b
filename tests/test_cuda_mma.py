"""The PTX of the tensor-core GEMM, executed by a simulator of its instructions, against decoded weights in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ptx_simulator  # noqa: E402

from convert.codebook import codebook  # noqa: E402
from convert.format import SUPPORTED_BITS  # noqa: E402
from hlwq_cuda.kernels import decode, mma  # noqa: E402
from hlwq_cuda.kernels.layout import PLANES, pack_codes  # noqa: E402
from hlwq_cuda.kernels.tables import entries, float_entries, make_table  # noqa: E402

G, T = np.divmod(np.arange(32), 4)  # of lane 4 g + t
KINDS = [(bits, False) for bits in SUPPORTED_BITS] + [(bits, True) for bits in (2, 3, 4, 5)]


def plane_operands(codes: np.ndarray, bits: int, index: int) -> list[np.ndarray]:
    """Codes of a group [16, 512] -> registers [planes][rows g, g + 8][tensors][4], each [1, 32], as a kernel loads."""
    words = pack_codes(torch.from_numpy(codes), bits).numpy().view(np.uint32)
    operands, start = [], 0
    for size in PLANES[bits]:
        plane = words[:, start : start + 16 * size].reshape(16, 16, size)  # row, chunk, word
        start += 16 * size
        for row in (G, G + 8):
            for tensor in mma.plane_tensors(size, index):
                for element in range(4):
                    piece, word = divmod(4 * tensor + element, size)
                    operands.append(plane[row, 4 * piece + T, word])
    return operands


def table_operands(table: np.ndarray, bits: int, int8: bool) -> list[np.ndarray]:
    mode = "int8" if int8 else "exact"
    if not decode.uses_lanes(bits, mode):
        return [np.full(32, table[word]) for word in decode.table_words(bits, mode)]
    halves = table[: entries(bits) // 2].view(np.uint16).astype(np.uint32)
    lane = np.arange(32) % len(halves)
    return [halves[lane]] if bits < 8 else [halves[lane + at] | halves[lane + at + 32] << 16 for at in (0, 64)]


@pytest.mark.parametrize("sub_blocks", [1, 2, 4])
@pytest.mark.parametrize(("bits", "int8"), KINDS)
def test_piece_matches_reference(bits: int, int8: bool, sub_blocks: int):
    for index, tiles in [(0, 1), (1, 2), (2, 1), (3, 4)]:
        check_piece(mma.Piece(bits, int8, tiles, sub_blocks, index))


def check_piece(piece: mma.Piece) -> None:
    bits, int8, tiles, sub_blocks, index = piece
    rng = np.random.default_rng([*piece])
    codes = rng.integers(0, 2**bits, (16, 512), dtype=np.uint8)
    norms = rng.uniform(0.5, 2, (16, 4 * sub_blocks)).astype(np.float16)
    scales = rng.uniform(0.5, 2, (8 * tiles, 4 * sub_blocks)).astype(np.float32)
    acc = rng.normal(size=(tiles, 4, 32)).astype(np.float32)
    values = rng.integers(-127, 128, (8 * tiles, 512)).astype(np.int8) if int8 else None
    if values is None:
        values = rng.normal(size=(8 * tiles, 512)).astype(np.float16)
    table = make_table(codebook(bits), bits)

    operands = plane_operands(codes, bits, index)
    chunks = values.view(np.uint32).reshape(8 * tiles, 16, -1)[:, 4 * index :]
    operands += [word for n in range(tiles) for word in chunks[8 * n + G, T].T]
    tensor = slice(index * sub_blocks // 4 * 4, index * sub_blocks // 4 * 4 + 4)
    operands += [pair for row in (G, G + 8) for pair in norms[row, tensor].copy().view(np.uint32).T]
    columns = [8 * n + 2 * T + p for n in range(tiles) for p in range(2)]
    operands += [scale for column in columns for scale in scales[column, tensor].T.view(np.uint32)]
    if sub_blocks > 1:
        masks = [np.where(T * sub_blocks // 4 == s, -1, 0).astype(np.int32) for s in range(sub_blocks)]
        operands += [mask.view(np.uint32) for mask in masks for _ in range(4)]
    operands += [word for word in table_operands(table.numpy().view(np.uint32), bits, int8) for _ in range(4)]
    operands += list(acc.reshape(-1, 32).view(np.uint32))

    text, constraints = mma.multiply(piece)
    kinds = constraints.split(",")
    outputs = 4 * tiles
    assert len(kinds) == outputs + len(operands) and all(kind == "=&f" for kind in kinds[:outputs])
    registers = {f"${outputs + i}": operand[None] for i, operand in enumerate(operands)}
    state = ptx_simulator.run(text.strip()[1:-1].splitlines(), registers)
    out = np.stack([state[f"${i}"][0].view(np.float32) for i in range(outputs)]).reshape(tiles, 4, 32)

    step = table[-1:].view(torch.float32).item() if int8 else 1.0
    weight = float_entries(table, bits, "int8" if int8 else "exact").double().numpy()[codes] / step
    weight = weight.reshape(16, 4 * sub_blocks, -1) * norms[..., None].astype(np.float64)
    scaled = values.astype(np.float64).reshape(8 * tiles, 4 * sub_blocks, -1) * scales[..., None]
    block = slice(index * sub_blocks, (index + 1) * sub_blocks)
    product = np.einsum("nbk,mbk->nm", weight[:, block], scaled[:, block])
    size = np.einsum("nbk,mbk->nm", abs(weight[:, block]), abs(scaled[:, block])).max()
    for n in range(tiles):
        for k in range(4):
            want = acc[n, k] + product[G + 8 * (k // 2), 8 * n + 2 * T + k % 2]
            # float32 sums of a block, scaled and added: about ten roundings of values below `size`
            assert np.all(abs(out[n, k] - want) < 10 * 2.0**-24 * size), piece


def test_simulator_refuses_what_it_does_not_know():
    with pytest.raises(KeyError, match="popc"):
        ptx_simulator.run(["popc.b32 a, b;"], {"b": np.zeros((1, 32))})
