"""The target for transformers and vLLM: the source's own tensor names, `architectures` and `model_type`.

What may be quantized is decided from names, shapes and config.json, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from convert.checkpoint import read_config
from convert.errors import ConvertError
from convert.format import QuantizationConfig
from convert.target import Kind, OutputTensor
from convert.tensors import INDEX_NAME, TensorInfo, is_float, read, read_tensors

MIN_WEIGHTS = 256  # smaller tensors are not worth their names
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings", "embed_in")
HEADS = ("lm_head", "embed_out", "output")
# parts of a name that mark a router, a convolution or a layer whose weight is not used as a plain matrix
ROUTERS = ("gate", "router", "shared_expert_gate", "wg")
NOT_TEXT = (
    "visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "vit", "image_newline",
    "multi_modal_projector", "mm_projector", "connector", "audio_tower", "audio_model", "audio_encoder", "embed_audio",
    "embed_vision", "mtp",
)  # fmt: skip
# these models keep [in, out] in their linears (transformers' Conv1D), or [experts, in, out] in their stacks
TRANSPOSED_LINEARS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
KEEP_DTYPE = ("A_log", "dt_bias", "e_score_correction_bias", "D")


class CudaTarget:
    """The source as transformers and vLLM name it."""

    format = "pt"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._config = read_config(directory)
        self._infos = read_tensors(directory)
        model_type = self._config.get("model_type")
        if not isinstance(model_type, str):
            raise ConvertError(f"{directory / 'config.json'}: no model_type; the architecture is unknown")

    @cached_property
    def tensors(self) -> Sequence[OutputTensor]:
        """Everything to write, in the order of the source."""
        tied = text_config(self._config).get("tie_word_embeddings", self._config.get("tie_word_embeddings", False))
        return [
            self._describe(name, info)
            for name, info in self._infos.items()
            if not (tied and name.removesuffix(".weight").rpartition(".")[2] in HEADS)
        ]

    def read(self, tensor: OutputTensor, rows: slice) -> np.ndarray:
        """A range of the tensor's first axis."""
        return read(self._infos[tensor.name], rows)

    def config(self, quantization: QuantizationConfig) -> dict:
        """The source's config with `quantization_config`."""
        return {**self._config, "quantization_config": quantization.to_dict()}

    def files(self) -> Mapping[str, Path | str]:
        """Tokenizer, generation config, chat template, license: every small file of the source but the weights."""
        skipped = {"config.json", INDEX_NAME, "README.md"}
        return {
            path.name: path
            for path in sorted(self._directory.iterdir())
            if path.is_file()
            and path.name not in skipped
            and not path.name.startswith(".")
            and path.suffix in (".json", ".txt", ".model", ".jinja", ".py", ".md", "")
        }

    def _describe(self, name: str, info: TensorInfo) -> OutputTensor:
        kind, reason = classify(name, info, self._config)
        keep = name.rpartition(".")[2] in KEEP_DTYPE
        return OutputTensor(name, info.shape, info.dtype, f"{info.path}: tensor {name}", kind, reason, keep)


def text_config(config: Mapping) -> Mapping:
    """The part of config.json that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def classify(name: str, info: TensorInfo, config: Mapping) -> tuple[Kind | None, str]:
    """What a tensor is, or None and why it keeps its dtype."""
    parts = name.removesuffix(".weight").split(".")
    if not is_float(info.dtype):
        return None, "not floating"
    if info.size < MIN_WEIGHTS:
        return None, "small"
    if any(part in NOT_TEXT for part in parts):
        return None, "not text"
    if len(info.shape) == 3 and "experts" in parts:
        return _classify_experts(parts[-1], info.shape, config)
    if len(info.shape) != 2 or not name.endswith(".weight"):
        return None, "not a matrix"
    if parts[-1] in EMBEDDINGS:
        return Kind.EMBEDDING, ""
    if parts[-1] in HEADS:
        return Kind.HEAD, ""
    if parts[-1] in ROUTERS:
        return None, "router"
    if "norm" in parts[-1] or "conv" in parts[-1] or "emb" in parts[-1] or parts[-1] in ("wpe", "dt_proj"):
        return None, "not a linear layer"
    if config.get("model_type") in TRANSPOSED_LINEARS:
        return None, "stored transposed"
    return Kind.LINEAR, ""


def _classify_experts(leaf: str, shape: tuple[int, ...], config: Mapping) -> tuple[Kind | None, str]:
    return Kind.EXPERTS, ""
