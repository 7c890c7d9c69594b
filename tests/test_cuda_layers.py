"""Modules load format 1, compute in either layout, and save what they loaded."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convert.codebook import codebook  # noqa: E402
from convert.format import ModuleSpec  # noqa: E402
from convert.packing import pack  # noqa: E402
from convert.reference import decode, encode, matmul  # noqa: E402
from hlwq_cuda.layers import HLWQEmbedding, HLWQExperts, HLWQLinear  # noqa: E402


def encoded(shape: tuple[int, ...], spec: ModuleSpec, seed: int = 0):
    """Random weights [*shape, K], encoded, and the tensors of a checkpoint."""
    weight = np.random.default_rng(seed).standard_normal((*shape, spec.in_features)).astype(np.float32)
    result = encode(weight, spec)
    state = {"weight_codes": torch.from_numpy(pack(result.codes, spec.bits))}
    return result, state | {"weight_norms": torch.from_numpy(result.norms)}


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


def same_bytes(state: dict, saved: dict) -> bool:
    return all(torch.equal(value.view(torch.uint8), saved[name].view(torch.uint8)) for name, value in state.items())


@pytest.mark.parametrize(("bits", "block_size", "width"), [(4, 128, 256), (3, 64, 192), (5, 128, 200), (6, 32, 96)])
def test_linear_in_both_states(bits: int, block_size: int, width: int):
    spec = ModuleSpec(bits, block_size, width)
    result, state = encoded((24,), spec)
    state["bias"] = torch.linspace(-1, 1, 24)
    layer = HLWQLinear(24, spec, codebook(bits), bias_dtype=torch.float32)
    layer.load_state_dict(state)
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
    expected = matmul(x.numpy(), result, spec, codebook(bits)) + state["bias"].numpy()
    assert relative_error(layer(x), expected) < 2**-11  # centroids and activations rounded to fp16
    layer.prepare()
    assert layer.weight_codes.dtype == torch.int32
    assert relative_error(layer(x), expected) < 2**-11
    assert same_bytes(state, layer.state_dict())
    layer.load_state_dict(state)
    assert relative_error(layer(x), expected) < 2**-11


def test_int8_mode_is_near_the_reference():
    spec = ModuleSpec(4, 128, 512)
    result, state = encoded((64,), spec)
    layer = HLWQLinear(64, spec, codebook(4), mode="int8")
    layer.load_state_dict(state)
    layer.prepare()
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    error = relative_error(layer(x), matmul(x.numpy(), result, spec, codebook(4)))
    assert 2**-11 < error < 0.012  # largest / 127 a step: .007 for normal activations; above, it would not be int8


def test_int8_is_refused_where_the_table_has_none():
    with pytest.raises(ValueError, match="mode int8 serves 2 to 5 bits"):
        HLWQLinear(8, ModuleSpec(6, 128, 128), codebook(6), mode="int8")


def test_embedding_and_its_head_share_parameters():
    spec = ModuleSpec(5, 64, 192)
    result, state = encoded((50,), spec)
    embedding = HLWQEmbedding(50, spec, codebook(5), torch.float32)
    head = embedding.as_linear()
    embedding.load_state_dict(state)
    embedding.prepare()
    head.prepare()
    assert head.weight_codes is embedding.weight_codes
    ids = torch.tensor([[3, 49], [0, 3]])
    weight = decode(result, spec, codebook(5))
    assert relative_error(embedding(ids), weight[ids.numpy()]) < 2**-11
    x = torch.randn(4, 192, generator=torch.Generator().manual_seed(2))
    assert relative_error(head(x), x.double().numpy() @ weight.T) < 2**-11


def test_experts_one_at_a_time():
    spec = ModuleSpec(4, 128, 128)
    result, state = encoded((3, 16), spec)
    experts = HLWQExperts(3, 16, spec, codebook(4), torch.float32)
    experts.load_state_dict(state)
    experts.prepare()
    weight = decode(result, spec, codebook(4))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    assert relative_error(experts[torch.tensor(1)], weight[1]) < 2**-11
    assert relative_error(experts(x, 2), x.double().numpy() @ weight[2].T) < 2**-11
    assert same_bytes(state, experts.state_dict())
