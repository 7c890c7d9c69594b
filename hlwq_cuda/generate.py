"""Text in, text out: `load(directory).generate(prompt)`."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hlwq_cuda import environment
from hlwq_cuda.checkpoint import FormatError, find_directory, open_checkpoint
from hlwq_cuda.decode import Decoder, Sampling
from hlwq_cuda.kernels.tables import INT8_MAX_BITS
from hlwq_cuda.layers import HLWQWeight
from hlwq_cuda.ops import MODES

NEW_TOKENS = 512  # of an answer at most, unless the caller says how many
CACHE_STEP = 4096  # tokens: a cache is a multiple of this or a smaller power of two, for several turns of a chat

Prompt = str | Sequence[dict]  # text, or messages [{"role": ..., "content": ...}]


class PromptError(ValueError):
    """The prompt cannot be run: it is empty or longer than the model's context."""


@dataclass(frozen=True)
class Timing:
    """What one answer took."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, in the cache since the last answer
    prompt_seconds: float  # to the first new token
    new_tokens: int
    new_seconds: float  # for all new tokens but the first
    peak_bytes: int  # of GPU memory allocated since loading; of the process on the CPU

    def __str__(self) -> str:
        prefill = (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        decode = max(self.new_tokens - 1, 0) / self.new_seconds if self.new_seconds else 0.0
        return (
            f"prompt: {self.prompt_tokens} tokens{cached}, {prefill:.1f} tokens/s; "
            f"answer: {self.new_tokens} tokens, {decode:.1f} tokens/s; peak memory {self.peak_bytes / 2**30:.2f} GiB"
        )


def load(
    model: str | Path, mode: str | None = None, device: str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Open an HLWQ directory, or a Hub repository that is one.

    mode:   "exact" or "int8" (see docs); None takes int8 at 2 to 5 bits on a GPU, else exact
    device: None takes the first usable GPU, else the CPU
    dtype:  of activations; None takes the checkpoint's on a GPU and float32 on the CPU

    Raises, before weights are read: FormatError (not an HLWQ directory, or a damaged one), DeviceError (no such GPU,
    too old, too little memory).
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode is {mode!r}; the modes are {', '.join(MODES)}")
    place = environment.pick_device(device)
    directory = find_directory(model)
    open_checkpoint(directory)
    tokenizer = _load_tokenizer(directory)
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" else "auto"
    network = AutoModelForCausalLM.from_pretrained(directory, device_map={"": place}, dtype=dtype)
    set_mode(network, mode)
    return LanguageModel(network, tokenizer)


def set_mode(model: PreTrainedModel, mode: str | None) -> None:
    """Choose the arithmetic of every quantized layer; those of 6 and 8 bits have no int8 form and stay exact."""
    for module in model.modules():
        if isinstance(module, HLWQWeight):
            module.mode = "exact" if mode == "int8" and module.spec.bits > INT8_MAX_BITS else mode


class LanguageModel:
    """A causal language model of transformers, quantized or not, and its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.timing: Timing | None = None  # of the last answer
        self._decoder: Decoder | None = None

    @property
    def description(self) -> str:
        """The device, the arithmetic and the step, for people."""
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        modes = {module.effective_mode() for module in self.model.modules() if isinstance(module, HLWQWeight)}
        parts = [name, " and ".join(sorted(modes)) or str(self.model.dtype).removeprefix("torch.")]
        return ", ".join([*parts, *([self._decoder.step.name] if self._decoder else [])])

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The answer to `prompt` as one string."""
        return "".join(self.stream(prompt, max_new_tokens, temperature, top_p, seed))

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,  # None: NEW_TOKENS, or what the context has left
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The answer piece by piece, each of whole characters; `timing` is set at the end."""
        tokens = self.generate_tokens(self.encode(prompt), max_new_tokens, Sampling(temperature, top_p, seed))
        return text_pieces(self.tokenizer, tokens)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: through the chat template where the tokenizer has one."""
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.tokenizer.encode(text, add_special_tokens=False)
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        return self.tokenizer.encode(text)

    def generate_tokens(
        self, ids: Sequence[int], max_new_tokens: int | None = None, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """New tokens up to `max_new_tokens` or the end of the text, which is not among them."""
        max_new_tokens = self._check_lengths(len(ids), max_new_tokens)
        decoder = self._decoder_for(len(ids) + max_new_tokens)
        ends = self._end_tokens()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        token = decoder.prefill(ids, sampling or Sampling())
        first = last = time.perf_counter()
        count = 1
        try:
            if token in ends:
                return
            yield token
            for token in decoder.tokens(max_new_tokens - 1):
                last, count = time.perf_counter(), count + 1
                if token in ends:
                    return
                yield token
        finally:
            peak = _peak_bytes(self.model.device)
            self.timing = Timing(len(ids), decoder.kept, first - start, count, last - first, peak)

    @property
    def _context(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _check_lengths(self, prompt: int, new: int | None) -> int:
        """How many new tokens there may be. PromptError when the model's context is too short."""
        if prompt == 0:
            raise PromptError("the prompt is empty")
        if new is None:
            new = NEW_TOKENS if self._context is None else max(1, min(NEW_TOKENS, self._context - prompt))
        if new < 1:
            raise PromptError(f"max_new_tokens is {new}; it must be 1 or more")
        if self._context is not None and prompt + new > self._context:
            raise PromptError(
                f"the prompt has {prompt} tokens and {new} new ones are asked for, but the model's context has "
                f"{self._context}; shorten the prompt or ask for fewer"
            )
        return new

    def _decoder_for(self, tokens: int) -> Decoder:
        """The decoder, made anew when its cache is too short."""
        if self._decoder is None or self._decoder.max_length < tokens:
            self._decoder = None  # its memory first
            length = cache_length(tokens)
            length = length if self._context is None else min(length, self._context)
            environment.check_memory(_cache_bytes(self.model, length), self.model.device, f"a cache of {length} tokens")
            self._decoder = Decoder(self.model, length)
        return self._decoder

    def _end_tokens(self) -> set[int]:
        ends = {self.tokenizer.eos_token_id}
        for config in (self.model.generation_config, self.model.config.get_text_config()):
            found = getattr(config, "eos_token_id", None)
            ends.update(found if isinstance(found, (list, tuple)) else [found])
        return ends - {None}


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` as they come, in pieces of whole characters.

    A token's text may depend on the one before it (a space that belongs to a word is dropped at the start of a text),
    so each piece is what a token adds to the text of the piece before.
    """
    ids: list[int] = []
    start = shown = 0  # ids[start:shown] is the piece before

    def piece() -> str:
        before, now = (tokenizer.decode(ids[start:end], skip_special_tokens=True) for end in (shown, len(ids)))
        return now[len(before) :]

    for token in tokens:
        ids.append(token)
        text = piece()
        if text and not text.endswith("�"):  # else a character's bytes are still to come
            yield text
            start, shown = shown, len(ids)
    if shown < len(ids):
        yield piece()


def cache_length(tokens: int) -> int:
    """Room for at least so many tokens: grows by doubling, then by CACHE_STEP."""
    if tokens > CACHE_STEP:
        return -(-tokens // CACHE_STEP) * CACHE_STEP
    return max(256, 1 << (tokens - 1).bit_length())


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{directory}: no usable tokenizer ({reason}); copy the source model's there") from None


def _cache_bytes(model: PreTrainedModel, length: int) -> int:
    """Keys and values of every layer at `length` tokens; more than a hybrid model needs."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * length * model.dtype.itemsize


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
