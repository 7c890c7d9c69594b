"""transformers loads, saves, makes and undoes HLWQ checkpoints of every family, without a change to its API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

import hlwq_cuda  # noqa: E402
from convert.checkpoint import Checkpoint  # noqa: E402
from hlwq_cuda.layers import HLWQEmbedding, HLWQLinear, HLWQWeight  # noqa: E402
from tests.hlwq_models import converted, decoded, random_ids, source  # noqa: E402
from tests.tiny_models import FAMILIES  # noqa: E402

REPOSITORY = Path(__file__).parent.parent
IDS = random_ids(19)
FP16 = 2**-10  # activations on disk-offloaded layers are rounded to fp16; elsewhere only the order of sums differs


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def load(directory: Path, **options):
    """The model and what transformers says about its loading; any complaint fails."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def quantized_bytes(directory: Path) -> dict[str, bytes]:
    """Codes and norms by the last parts of their names: saving may add a prefix of the model's."""
    checkpoint = Checkpoint.open(directory)
    names = [name for name in checkpoint.tensors if name.endswith(("weight_codes", "weight_norms"))]
    return {name.removeprefix("transformer."): checkpoint.tensor(name).tobytes() for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_loads_saves_and_dequantizes(family: str, root: Path, tmp_path: Path):
    directory = converted(family, root)
    model = load(directory, dtype=torch.float32)
    assert any(isinstance(module, HLWQWeight) for module in model.modules())
    assert model.dtype == torch.float32
    found = logits(model)

    model.save_pretrained(tmp_path / "saved")
    assert quantized_bytes(tmp_path / "saved") == quantized_bytes(directory)
    assert torch.equal(logits(load(tmp_path / "saved", dtype=torch.float32)), found)

    dense = model.dequantize()
    assert not any(isinstance(module, HLWQWeight) for module in dense.modules())
    assert relative_error(found, logits(dense)) < FP16
    expected = load(decoded(directory, tmp_path / "decoded")).state_dict()
    for name, tensor in dense.state_dict().items():
        assert relative_error(tensor, expected[name]) < 2**-11, name  # the codebook is rounded to fp16
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "dense")), logits(dense))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3"])
def test_quantizing_on_load_gives_the_converters_codes(family: str, root: Path, tmp_path: Path):
    """Also when the model computes in another dtype than the source's: the encoder reads the source."""
    config = hlwq_cuda.HLWQConfig(bits=5, embed_bits=6)
    directory = converted(family, root, "--bits", "5", "--embed-bits", "6")
    model = load(source(family, root), quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert quantized_bytes(tmp_path) == quantized_bytes(directory)
    assert torch.equal(logits(model), logits(load(directory, dtype=torch.bfloat16)))
    saved, expected = (Checkpoint.open(path).quantization for path in (tmp_path, directory))
    assert (saved.modules, saved.codebooks) == (expected.modules, expected.codebooks)


@pytest.mark.gpu
def test_quantizing_on_load_to_the_gpu_gives_the_converters_codes(root: Path, tmp_path: Path):
    config = hlwq_cuda.HLWQConfig(bits=4, encoder="plain")
    load(source("llama", root), quantization_config=config, device_map="cuda").save_pretrained(tmp_path)
    assert quantized_bytes(tmp_path) == quantized_bytes(converted("llama", root, "--encoder", "plain"))


def test_tied_head_shares_the_embeddings_codes(root: Path):
    model = load(converted("llama", root))
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, HLWQEmbedding) and isinstance(head, HLWQLinear)
    assert head.weight_codes is embedding.weight_codes and head.weight_norms is embedding.weight_norms


def test_layers_on_disk_compute_the_same(root: Path, tmp_path: Path):
    """Offloaded layers stay in format 1 and are laid out when they run."""
    directory = converted("llama", root)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(directory, device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32)
    assert model.model.layers[1].mlp.up_proj.weight_codes.is_meta
    assert relative_error(logits(model), logits(load(directory, dtype=torch.float32))) < FP16


@pytest.mark.gpu
def test_layers_on_disk_run_on_the_gpu(root: Path, tmp_path: Path):
    directory = converted("llama", root)
    places = {"model.embed_tokens": 0, "lm_head": 0, "model.norm": 0, "model.rotary_emb": 0}
    places |= {"model.layers.0": 0, "model.layers.1": "disk"}
    model = load(directory, device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32)
    hlwq_cuda.set_mode(model, "exact")
    assert model.model.layers[1].mlp.up_proj.weight_codes.is_meta
    with torch.no_grad():
        found = model(IDS.cuda()).logits.double().cpu()
    assert relative_error(found, logits(load(directory, dtype=torch.float32))) < 2 * FP16


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_compiles_to_one_graph_on_the_gpu(mode: str, root: Path):
    """By the default compiler of torch, for one row and for many; an int8 rounding may fall elsewhere."""
    model = load(converted("llama", root), device_map="cuda", dtype=torch.float32)
    hlwq_cuda.set_mode(model, mode)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for ids in (IDS.cuda(), IDS[:, :1].cuda()):
            found, expected = (network(ids, use_cache=False).logits for network in (compiled, model))
            assert relative_error(found, expected) < (FP16 if mode == "exact" else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_from_the_gpu_keeps_every_bit(family: str, root: Path, tmp_path: Path):
    directory = converted(family, root)
    load(directory, device_map="cuda").save_pretrained(tmp_path)
    assert quantized_bytes(tmp_path) == quantized_bytes(directory)


def test_device_map(root: Path):
    model = load(converted("qwen3", root), device_map="cpu", dtype=torch.float32)
    assert torch.equal(logits(model), logits(load(converted("qwen3", root), dtype=torch.float32)))


def test_casting_a_model_leaves_the_norms(root: Path):
    model = load(converted("llama", root), dtype=torch.float32).to(torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_norms.dtype == torch.float16
    assert model.dtype == torch.bfloat16


def test_gradients_reach_what_lies_below(root: Path):
    """Against the dense model: the loss's gradient by the first layer's gains, through two layers of codes."""
    directory = converted("qwen3", root)
    gradients = []
    for dense in (False, True):
        model = load(directory, dtype=torch.float32)
        model = model.dequantize() if dense else model
        gain = model.model.layers[0].input_layernorm.weight.requires_grad_()
        model(IDS, labels=IDS).loss.backward()
        gradients.append(gain.grad.double())
    assert gradients[1].norm() > 0
    assert relative_error(*gradients) < 4 * FP16


def test_adapters_train_on_top(root: Path):
    import peft

    model = load(converted("qwen3", root), dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model, hlwq_cuda.enable_lora(config))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.parametrize("family", FAMILIES)
def test_without_this_package_transformers_refuses(family: str, root: Path, tmp_path: Path, monkeypatch):
    """Without the guard tensor it only warns, and the model computes with random weights."""
    directory = converted(family, root)
    load(directory).save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "hlwq")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "hlwq")
    for guarded in (directory, tmp_path):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(guarded)


def test_compiles_to_one_graph(root: Path):
    """No product leaves the graph: fullgraph raises at the first that would."""
    model = load(converted("llama", root), dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(IDS, use_cache=False).logits.double()
    assert relative_error(found, logits(model)) < 1e-5  # float32, other orders of summation


def test_remote_code_needs_no_import(root: Path, tmp_path: Path):
    """In a new process, because this one has imported the package."""
    directory = Path(shutil.copytree(converted("qwen3_moe", root), tmp_path / "model"))
    hlwq_cuda.add_remote_code(directory)
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM as Auto\n"
        "options = {'trust_remote_code': True, 'dtype': torch.float32, 'output_loading_info': True}\n"
        "model, info = Auto.from_pretrained(sys.argv[1], **options)\n"
        "assert not any(info.values()), info\n"
        f"torch.save(model(torch.tensor({IDS.tolist()})).logits, sys.argv[2])\n"
        "model.save_pretrained(sys.argv[3])\n"
    )
    arguments = [str(directory), str(tmp_path / "logits.pt"), str(tmp_path / "saved")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, env=environment)
    found = torch.load(arguments[1]).double()
    # another process may run other numbers of threads, and so sum in other orders
    assert relative_error(found, logits(load(directory, dtype=torch.float32))) < 1e-5
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["architectures"] == json.loads((directory / "config.json").read_text())["architectures"]


def test_registering_twice_is_harmless():
    hlwq_cuda.register()
    assert auto.AUTO_QUANTIZER_MAPPING["hlwq"] is hlwq_cuda.hf.HLWQQuantizer


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="'bitz'"):
        hlwq_cuda.HLWQConfig(bitz=4)


def test_recipe_reaches_the_modules(root: Path):
    model = load(source("llama", root), quantization_config=hlwq_cuda.HLWQConfig(recipe="seeds"))
    layer = model.model.layers[0]
    bits = [module.spec.bits for module in (layer.mlp.gate_proj, layer.mlp.down_proj, layer.self_attn.q_proj)]
    assert bits == [3, 4, 5]
    assert not np.isnan(logits(model).numpy()).any()
