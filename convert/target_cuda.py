"""The target for transformers and vLLM: the source's own tensor names, `architectures` and `model_type`.

What may be quantized is decided from names, shapes and config.json, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from convert.architectures import is_known
from convert.checkpoint import read_config, text_config
from convert.errors import ConvertError
from convert.format import BLOCK_SIZES, QuantizationConfig
from convert.target import Kind, OutputTensor
from convert.tensors import INDEX_NAME, TensorInfo, is_float, read, read_tensors

MIN_WEIGHTS = 256  # norms, gates and biases of a few hundred values are not worth a codebook
MIN_IN_FEATURES = min(BLOCK_SIZES)  # a shorter row would be mostly padding
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings", "embed_in")
HEADS = ("lm_head", "embed_out", "output")
ROUTERS = ("gate", "router", "shared_expert_gate", "wg")
EXPERT_STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
NOT_TEXT = ("visual", "vision", "image", "audio", "speech", "multi_modal", "mm_projector", "vit", "mtp")
KEEP_DTYPE = ("A_log", "D", "dt_bias", "e_score_correction_bias")  # kept in float32 on purpose by those who train them
# transformers' Conv1D stores [in, out], and these expert stacks are [experts, in, out]: blocks along the last axis
# would mix outputs, and the modules that read them expect no codes
TRANSPOSED_LINEARS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")


class CudaTarget:
    """The source as transformers and vLLM name it."""

    format = "pt"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._config = read_config(directory)
        _check_architecture(directory, self._config)
        self._infos = read_tensors(directory)
        tied = text_config(self._config).get("tie_word_embeddings", self._config.get("tie_word_embeddings"))
        self.tensors: Sequence[OutputTensor] = [
            self._describe(name, info)
            for name, info in self._infos.items()
            if not (tied and _leaf(name) in HEADS)  # a tied table is stored once, under the embedding's name
        ]

    def read(self, tensor: OutputTensor, rows: slice) -> np.ndarray:
        """A range of the tensor's first axis."""
        return read(self._infos[tensor.name], rows)

    def config(self, quantization: QuantizationConfig) -> dict:
        """The source's config with `quantization_config`."""
        return {**self._config, "quantization_config": quantization.to_dict()}

    def files(self) -> Mapping[str, Path | str]:
        """Tokenizer, generation config, chat template, license, remote code: what lies beside the weights."""
        skipped = {"config.json", INDEX_NAME}
        return {
            path.name: path
            for path in sorted(self._directory.iterdir())
            if path.is_file()
            and path.name not in skipped
            and (path.suffix in COPIED or path.name.startswith(("LICENSE", "NOTICE")))
        }

    def _describe(self, name: str, info: TensorInfo) -> OutputTensor:
        kind, reason = classify(name, info, self._config)
        keep_dtype = name.rpartition(".")[2] in KEEP_DTYPE
        return OutputTensor(name, info.shape, info.dtype, f"{info.path}: tensor {name}", kind, reason, keep_dtype)


def classify(name: str, info: TensorInfo, config: Mapping) -> tuple[Kind | None, str]:
    """What a tensor is, or None and why it keeps its dtype."""
    parts = name.removesuffix(".weight").split(".")
    leaf = parts[-1]
    if not is_float(info.dtype):
        return None, "not floating"
    if info.size < MIN_WEIGHTS or len(info.shape) < 2:
        return None, "small"
    if info.shape[-1] < MIN_IN_FEATURES:
        return None, f"rows shorter than {MIN_IN_FEATURES}"
    if any(word in part for part in parts for word in NOT_TEXT):
        return None, "not text"
    if len(info.shape) == 3 and leaf in EXPERT_STACKS:
        return _classify_experts(leaf, info.shape, config)
    if len(info.shape) != 2 or not name.endswith(".weight"):
        return None, "not a matrix"
    if leaf in EMBEDDINGS:
        return Kind.EMBEDDING, ""
    if leaf in HEADS:
        return Kind.HEAD, ""
    if leaf in ROUTERS or "router" in parts:
        return None, "router"
    if any(word in leaf for word in ("norm", "conv", "emb", "wpe", "bias")) or leaf == "dt_proj":
        return None, "not a linear layer"
    if _model_types(config) & set(TRANSPOSED_LINEARS):
        return None, "stored transposed"
    return Kind.LINEAR, ""


def _classify_experts(leaf: str, shape: tuple[int, ...], config: Mapping) -> tuple[Kind | None, str]:
    """Stacks are quantized if they are [experts, out, in] for sure: by architecture and by the model's width."""
    hidden = text_config(config).get("hidden_size")
    width = shape[1] if leaf == "down_proj" else shape[2]
    if width != hidden or _model_types(config) & set(TRANSPOSED_EXPERTS):
        return None, "stored transposed"
    return Kind.EXPERTS, ""


def _model_types(config: Mapping) -> set[object]:
    return {config.get("model_type"), text_config(config).get("model_type")}


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _check_architecture(directory: Path, config: Mapping) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not (is_known(model_type) or "auto_map" in config):
        raise ConvertError(
            f"{directory / 'config.json'}: the architecture (model_type {model_type!r}) is unknown; "
            "a newer transformers may know it: pip install --upgrade transformers"
        )
