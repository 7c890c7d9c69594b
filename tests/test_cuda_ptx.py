"""The PTX sequences decode every code in every place, in a simulator of their instructions."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ptx_simulator  # noqa: E402

from convert.codebook import codebook  # noqa: E402
from convert.format import SUPPORTED_BITS  # noqa: E402
from hlwq_cuda.kernels import decode, dot, layout, tables  # noqa: E402

MODES = [(bits, "exact") for bits in SUPPORTED_BITS] + [(bits, "int8") for bits in (2, 3, 4, 5)]


def units_with_every_code(bits: int) -> np.ndarray:
    """uint8 [samples, 32 lanes, codes of a unit]: in every place of a unit every code occurs, beside random ones."""
    samples = max(1, 2**bits // 32) * 4
    codes = np.random.default_rng(bits).integers(0, 2**bits, (samples, 32, decode.unit_codes(bits)))
    sweep = np.arange(samples * 32).reshape(samples, 32, 1) + np.arange(decode.unit_codes(bits)) * 5
    codes[: samples // 2] = (sweep % 2**bits)[: samples // 2]
    for place in range(codes.shape[-1]):
        assert set(codes[: samples // 2, :, place].ravel()) == set(range(2**bits))
    return codes.astype(np.uint8)


def registers(bits: int, mode: str, codes: np.ndarray) -> dict[str, np.ndarray]:
    """The words of each unit, and the table, as the kernels pass them."""
    chunks = codes.reshape(-1, layout.CHUNK)  # at 8 bits a chunk is two units
    words = layout.pack_codes(torch.from_numpy(chunks), bits).numpy().view(np.uint32)
    first, second = decode.unit_words(bits)
    words = words.reshape(*codes.shape[:2], first + second)  # one chunk: its planes follow each other
    state = {f"q{i}": words[..., i] for i in range(first)} | {f"r{i}": words[..., first + i] for i in range(second)}
    table = tables.make_table(codebook(bits), bits).numpy().view(np.uint32)
    for index, word in enumerate(decode.table_words(bits, mode)):
        state[f"t{index}"] = np.full(codes.shape[:2], table[word])
    if decode.uses_lanes(bits, mode):
        halves = table[: tables.entries(bits) // 2].view(np.uint16).astype(np.uint32)
        lane = np.arange(32) % len(halves)
        both = (
            [halves[lane] * 0x10001]
            if bits < 8
            else [halves[lane + at] | halves[lane + at + 32] << 16 for at in (0, 64)]
        )
        state |= {f"lane{i}": np.broadcast_to(value, codes.shape[:2]) for i, value in enumerate(both)}
    return state


@pytest.mark.parametrize(("bits", "mode"), MODES)
def test_every_code_in_every_place(bits: int, mode: str):
    codes = units_with_every_code(bits)
    state = ptx_simulator.run(decode.decode(bits, mode), registers(bits, mode, codes))
    if mode == "exact":
        words = np.stack([state[f"p{i}"] for i in range(codes.shape[-1] // 2)], -1)
        expected = np.array(codebook(bits)).astype(np.float16)[codes]
        assert np.array_equal(words.view(np.float16).reshape(codes.shape), expected)
    else:
        words = np.stack([state[f"v{i}"] for i in range(codes.shape[-1] // 4)], -1)
        found = words.view(np.int8).reshape(codes.shape).astype(np.float64)
        table = tables.make_table(codebook(bits), bits)
        step = table[-1:].view(torch.float32).item()
        values = tables.float_entries(table, bits, "int8").double().numpy()[codes]
        assert np.allclose(found + (0.5 if bits >= 4 else 0.0), values / step, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "mode"), MODES)
def test_sequences_use_declared_registers_only(bits: int, mode: str):
    declared = decode.declarations(bits, mode).removeprefix(".reg .b32 ").removesuffix(";").split(", ")
    assert len(declared) == len(set(declared))
    for statement in " ".join(decode.decode(bits, mode)).split(";"):
        for word in statement.replace(",", " ").split()[1:]:
            assert word[0].isdigit() or word in declared, (word, statement)


def test_instruction_counts_are_as_documented():
    def count(bits: int, mode: str) -> int:
        return sum(bool(s.strip()) for s in " ".join(decode.decode(bits, mode)).split(";"))

    assert count(4, "int8") == 4 * 9 and count(4, "exact") == 4 * 13


@pytest.mark.parametrize(("bits", "mode"), MODES)
def test_dot_product_of_a_unit(bits: int, mode: str):
    """The texts of dot.py: operands in the order that its docstring promises, and the sum in element 0."""
    codes = units_with_every_code(bits)
    state = registers(bits, mode, codes)
    facts = dot.describe(bits, mode)
    rng = np.random.default_rng(1)
    if mode == "int8":
        x = rng.integers(-127, 128, codes.shape).astype(np.int8)
        centroids = tables.float_entries(tables.make_table(codebook(bits), bits), bits, mode).double().numpy()
        step = tables.make_table(codebook(bits), bits)[facts.step_word :].view(torch.float32).item()
        expected = np.rint((centroids[codes] / step - (0.5 if bits >= 4 else 0)) * x).sum(-1)
        tolerance = 0.0
    else:
        x = rng.uniform(-1, 1, codes.shape).astype(np.float16)
        products = np.array(codebook(bits)).astype(np.float16).astype(np.float64)[codes] * x
        expected, tolerance = products.sum(-1), 2**-10 * np.abs(products).sum(-1)  # sums of eight in fp16

    codes_in = [state[f"q{i}"] for i in range(facts.width)]
    for i in range(facts.second):
        codes_in += [state[f"r{i}"]] * facts.width
    words = np.ascontiguousarray(x).view(np.uint32)
    activations = [words[..., m] for m in range(facts.activations)]
    table = [state[f"t{i}"] for i in range(facts.table_words) for _ in range(facts.width)]

    def run_text(text: tuple[str, str], results: int, operands: list[np.ndarray], with_table: bool) -> list[np.ndarray]:
        """The results of (PTX, constraints); the table's address has no memory behind it: its lanes are in `state`."""
        asm, constraints = text
        loads: list[str] = []
        if with_table and not table:
            loads = decode.load_lanes(bits, f"${results + len(operands)}")
            operands = operands + [np.zeros_like(operands[0])] * facts.width
        elif with_table:
            operands = operands + table
        assert len(constraints.split(",")) == results + len(operands)
        lines = [line for line in asm.strip("{}\n").splitlines() if line not in loads]
        after = ptx_simulator.run(lines, state | {f"${results + i}": word for i, word in enumerate(operands)})
        return [after[f"${i}"] for i in range(results)]

    whole = run_text(facts.whole, facts.width, codes_in + activations, True)
    entries = run_text(facts.decoder, facts.activations, codes_in, True)
    product = run_text(facts.product, facts.width, entries + activations, False)
    for results in (whole, product):
        assert (np.abs(results[0].view(np.float32) - expected) <= tolerance).all()
        assert not any(rest.any() for rest in results[1:])
