"""The tokenizer inside a GGUF file as tokenizer.json and tokenizer_config.json, built with the `tokenizers` library.

A GGUF holds the vocabulary and the name of the rule that splits text before merging (`tokenizer.ggml.pre`); the rules
are those of the tokenizers that the models were published with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import ConvertError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # values of tokenizer.ggml.token_type

_LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def tokenizer_files(path: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja of the GGUF file `path`.

    fields: the file's `tokenizer.*` keys and their values.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise ConvertError(f"{path}: reading GGUF needs the tokenizers package: pip install 'hlwq-mlx[gguf]'") from None
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    model = fields.get("tokenizer.ggml.model")
    if model not in builders:
        raise ConvertError(f"{path}: GGUF tokenizer {model!r} is not supported; this release reads gpt2 and llama")
    tokens = fields["tokenizer.ggml.tokens"]
    tokenizer = builders[model](path, tokens, fields)
    _add_special_tokens(tokenizer, tokens, fields)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    context = fields.get("tokenizer.ggml.context_length")
    if context:
        config["model_max_length"] = int(context)
    for key in ("bos", "eos", "unknown", "padding"):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and int(index) < len(tokens):
            name = {"unknown": "unk", "padding": "pad"}.get(key, key)
            config[f"{name}_token"] = tokens[int(index)]
    _add_bos(tokenizer, config, fields, model)
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": ""}
    template = fields.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
        files["chat_template.jinja"] = template
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False)
    return files


def _byte_level_bpe(path: Path, tokens: list[str], fields: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's kind: every byte is a letter of the vocabulary, merges are listed in order."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = fields.get("tokenizer.ggml.pre", "gpt-2")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    llama3 = rule in ("llama-bpe", "llama3", "llama-v3")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=llama3, fuse_unk=False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule in ("gpt-2", "gpt2", "default"):
        splitter = gpt2
    elif rule in ("smollm", "starcoder", "refact", "command-r"):
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif rule == "qwen2" or llama3:
        pattern = Regex(_LLAMA3_SPLIT if llama3 else _QWEN2_SPLIT)
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])
    else:
        raise ConvertError(f"{path}: the GGUF tokenizer's split rule {rule!r} is not supported")
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(path: Path, tokens: list[str], fields: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's kind (Llama 2, Mistral 7B): scores order the merges, unknown characters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = fields["tokenizer.ggml.scores"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[int(fields.get("tokenizer.ggml.unknown_token_id", 0))]
    merges = _merges_from_scores(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if prefix else [replace])
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*pieces, decoders.Strip(" ", 1, 0)] if prefix else pieces)
    return tokenizer


def _merges_from_scores(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, best score first: SentencePiece merges the pair that scores best."""
    merges = [
        (piece[:cut], piece[cut:], index)
        for piece, index in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: (-scores[merge[2]], vocabulary[merge[0]], vocabulary[merge[1]]))
    return [(left, right) for left, right, _ in merges]


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], fields: Mapping[str, Any]) -> None:
    from tokenizers import AddedToken

    kinds = fields.get("tokenizer.ggml.token_type", [])
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == CONTROL]
    user = [token for token, kind in zip(tokens, kinds, strict=False) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])


def _add_bos(tokenizer: Tokenizer, config: dict[str, Any], fields: Mapping[str, Any], model: str) -> None:
    """Put the first token before every text where the file asks for it (llama.cpp's default for `llama`)."""
    from tokenizers import processors

    wanted = fields.get("tokenizer.ggml.add_bos_token", model == "llama")
    config["add_bos_token"] = bool(wanted)
    bos = config.get("bos_token")
    if wanted and bos:
        index = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
        )
