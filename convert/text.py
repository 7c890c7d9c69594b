"""Text to windows of tokens, for calibration and for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert.errors import ConvertError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_text(path: Path | str, flag: str) -> str:
    """The whole of a UTF-8 text file; `flag` names the option in messages."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConvertError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConvertError(f"{flag} {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise ConvertError(f"{flag} {path}: the file holds no text")
    return text


def load_tokenizer(directory: Path) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a model directory, and the size of the model's vocabulary."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ConvertError(f"{directory}: no usable tokenizer ({str(error).splitlines()[0]})") from None
    return tokenizer, AutoConfig.from_pretrained(directory).get_text_config().vocab_size


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, vocabulary: int, where: str
) -> np.ndarray:
    """The text's tokens cut into windows: int64 [windows, length]; what is left at the end is dropped.

    `vocabulary` is the number of rows of the model's embedding: a larger token is a sign of another model's tokenizer.
    """
    tokens = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    if tokens.size and tokens.max() >= vocabulary:
        raise ConvertError(
            f"{where}: the tokenizer gives token {tokens.max()}, but the model's embedding has {vocabulary} rows; "
            "the tokenizer belongs to another model"
        )
    windows = tokens[: tokens.size // length * length].reshape(-1, length)
    if not len(windows):
        raise ConvertError(f"{where}: {tokens.size} tokens are fewer than one window of {length}; use a longer text")
    return windows
