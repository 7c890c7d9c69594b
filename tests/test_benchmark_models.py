"""What the benchmarks of whole models compute without a GPU: random models, their sizes, and directories of them."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from benchmarks import load, random_models  # noqa: E402
from hlwq_cuda.layers import HLWQLinear, HLWQWeight  # noqa: E402

TINY = {
    "dense": random_models._dense("qwen3", 128, 256, 2, 4, 2, head_dim=32, vocab_size=61),
    "hybrid": random_models._dense(
        "qwen3_5_text",
        128,
        256,
        4,
        2,
        1,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=16,
        vocab_size=61,
    ),
}


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models, "SHAPES", {**random_models.SHAPES, **TINY})


@pytest.mark.parametrize("shape", TINY)
def test_a_random_model_is_whole_and_quantized(shape: str):
    config = random_models.make_config(shape, 32)
    model = random_models.random_model(config, 4, "exact", torch.device("cpu"))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    layers = [module for module in model.modules() if isinstance(module, HLWQLinear)]
    packed = sum(module.weight_codes.nbytes + module.weight_norms.nbytes for module in layers)
    expected = (module.out_features * module.in_features * module.spec.bits_per_weight / 8 for module in layers)
    assert packed == sum(expected)
    assert random_models.weight_bytes(model) > packed + model.get_input_embeddings().weight.nbytes


def test_sizes_of_caches():
    dense, hybrid = (random_models.make_config(shape, 32) for shape in TINY)
    # two layers: bf16 keys and values of two heads
    assert random_models.cache_bytes(dense, 10) == 2 * 2 * 2 * 2 * 32 * 10
    # one layer in four has a head of attention, the others have four float32 matrices
    assert random_models.cache_bytes(hybrid, 10) == 2 * 2 * 1 * 64 * 10 * 1 + 3 * 4 * 4 * 32 * 16


def test_a_random_directory_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load, "SHARD_BYTES", 1 << 16)
    load.write_random("dense", 4, tmp_path, "cpu")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert sum(isinstance(module, HLWQWeight) for module in model.modules()) == 2 * 7 + 1
    assert load.read_seconds(tmp_path) > 0
