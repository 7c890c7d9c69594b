"""From a prompt to tokens, one at a time: prefill, then a step and the choice of the next token in one CUDA graph.

Two steps share one loop. `FusedStep` (step.py) runs the dense families it knows; every other architecture runs its own
transformers module on a static cache. Both read `token` at `position` and leave logits; the sampler overwrites `token`,
so that a graph replays without the host. On the CPU the same loop runs without a graph.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from hlwq_cuda.layers import HLWQExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AHEAD = 2  # steps in flight: the GPU computes one token while the host reads the one before


class SamplingError(ValueError):
    """A temperature or top-p out of range."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise SamplingError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


class Step(Protocol):
    """One model, one cache, one token at a time."""

    token: torch.Tensor  # int64 [1], the token to run
    position: torch.Tensor  # int64 [1], its index
    rewinds: bool  # whether the cache can go back to fewer tokens; the states of linear attention cannot

    def prefill(self, ids: torch.Tensor, kept: int = 0) -> torch.Tensor:
        """Fill the cache with a prompt, int64 [1, L], of which it holds the first `kept` tokens, and nothing else.

        Returns the logits of its last token, [vocabulary]. `kept` above 0 needs a cache that rewinds.
        """
        ...

    def run(self) -> torch.Tensor:
        """Run `token`, extend the cache, return logits [vocabulary]; capturable on a GPU."""
        ...


class ModuleStep:
    """Any causal language model of transformers, by its own forward pass on a static cache."""

    name = "transformers module"

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self._model, self._max_length = model, max_length
        self.token = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.position = torch.zeros_like(self.token)
        self._cache = static_cache(model, max_length)
        self._cache_name = cache_argument(model)
        self.rewinds = all(isinstance(layer, StaticLayer) for layer in self._cache.layers)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        self._has_experts = any(isinstance(module, HLWQExperts) for module in model.modules())

    def prefill(self, ids: torch.Tensor, kept: int = 0) -> torch.Tensor:
        """See Step."""
        if kept:
            for layer in self._cache.layers:
                layer.cumulative_length.fill_(kept)
        else:
            self._cache.reset()
        if self._has_experts:
            self._model.set_experts_implementation("eager")  # decodes each expert that is used once
        logits = self._forward(ids[:, kept:])
        if self._has_experts:
            self._model.set_experts_implementation("batched_mm")  # no loop over experts that the host must count
        self.position.fill_(ids.shape[1])
        return logits

    def run(self) -> torch.Tensor:
        """See Step."""
        return self._forward(self.token[None])

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        cache = {self._cache_name: self._cache}
        return self._model(ids, **cache, use_cache=True, **self._last_only).logits[0, -1]


class FusedModelStep:
    """A family that step.py knows; the model itself reads the prompt where the step cannot."""

    name = "fused step"

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        from hlwq_cuda.step import FusedStep

        self._model, self._step = model, FusedStep(model, max_length)
        self.token, self.position, self.rewinds = self._step.token, self._step.position, self._step.reads_prompts

    def prefill(self, ids: torch.Tensor, kept: int = 0) -> torch.Tensor:
        """See Step."""
        if self._step.reads_prompts:
            return self._step.prefill(ids[0, kept:], kept)
        cache = DynamicCache(config=self._model.config)
        named = {cache_argument(self._model): cache}
        logits = self._model(ids, **named, use_cache=True, logits_to_keep=1).logits[0, -1]
        self._step.load_cache(cache)
        return logits

    def run(self) -> torch.Tensor:
        """See Step."""
        return self._step.run()


class Decoder:
    """Generates tokens with one model; keeps its cache and graphs for the next prompt that fits in `max_length`."""

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self.max_length = max_length
        self.step = make_step(model, max_length)
        self._on_gpu = model.device.type == "cuda"
        self._sampler = make_sampler(model)
        self._graphs: dict[bool, torch.cuda.CUDAGraph | None] = {}  # by whether the choice is greedy
        self._held: list[int] = []  # the tokens in the cache, as far as the host knows
        self.kept = 0  # tokens at the beginning of the last prompt that the cache held already

    @torch.no_grad()
    def prefill(self, ids: Sequence[int], sampling: Sampling) -> int:
        """Read a prompt, but for what it has in common with the last text, and choose the first new token."""
        self._sampler.set(sampling)
        self._greedy = sampling.temperature == 0
        if self._on_gpu and self._greedy not in self._graphs:
            self._graphs[self._greedy] = self._capture()
            self._held = []
        self.kept = common_prefix(self._held, ids[:-1]) if self.step.rewinds else 0
        self._held = []
        logits = self.step.prefill(torch.tensor([list(ids)], device=self.step.token.device), self.kept)
        self._held = list(ids)
        self._sampler.choose(logits, self.step.position, self.step.token)
        self._newest = int(self.step.token)
        return self._newest

    def tokens(self, count: int) -> Iterator[int]:
        """The next `count` tokens after the prompt's first; the caller stops when it has read the last it wants."""
        in_flight: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        for _ in range(count):
            self._advance()
            in_flight.append(self._copy_to_host())
            if len(in_flight) == _AHEAD:
                yield self._read(*in_flight.popleft())
        while in_flight:
            yield self._read(*in_flight.popleft())

    def _read(self, host: torch.Tensor, event: torch.cuda.Event | None) -> int:
        """A token that a step has made, from the one before it, which therefore is in the cache."""
        if event is not None:
            event.synchronize()
        self._held.append(self._newest)
        self._newest = int(host)
        return self._newest

    @torch.no_grad()
    def _advance(self) -> None:
        graph = self._graphs.get(self._greedy)
        if graph is not None:
            graph.replay()
        else:
            self._run_and_choose()

    def _run_and_choose(self) -> None:
        logits = self.step.run()
        self.step.position += 1
        self._sampler.choose(logits, self.step.position, self.step.token)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """The graph of one step, or None, with a warning, for a model whose forward pass needs the host."""
        self.step.prefill(torch.zeros_like(self.step.token)[None])  # allocates what is allocated on first use
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels, and lets libraries take their workspaces
                self._run_and_choose()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run_and_choose()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"decoding without a CUDA graph, several times slower: {reason}", stacklevel=2)
            return None
        return graph

    def _copy_to_host(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if not self._on_gpu:
            return self.step.token.clone(), None
        host = torch.empty(1, dtype=torch.int64, pin_memory=True)
        host.copy_(self.step.token, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event


class DeviceSampler:
    """kernels/sample.py, inside the graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        from hlwq_cuda.gpu import launch_options
        from hlwq_cuda.kernels.sample import Sampler

        vocabulary = model.get_output_embeddings().out_features
        self._sampler = Sampler(vocabulary, model.device, launch_options(model.device))

    def set(self, sampling: Sampling) -> None:
        """For the tokens from here on; a captured graph reads the same tensors."""
        self._greedy = sampling.temperature == 0
        self._sampler.settings.copy_(torch.tensor([sampling.temperature or 1.0, sampling.top_p]))
        self._sampler.seed.fill_(sampling.seed)

    def choose(self, logits: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> None:
        """Overwrite `token` with the choice from logits [vocabulary]."""
        if self._greedy:
            self._sampler.greedy(logits, token)
        else:
            self._sampler.sample(logits, position, token)


class HostSampler:
    """The same choice in plain torch, with other random numbers."""

    def set(self, sampling: Sampling) -> None:
        """For the tokens from here on."""
        self._sampling = sampling

    def choose(self, logits: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> None:
        """Overwrite `token` with the choice from logits [vocabulary]."""
        if self._sampling.temperature == 0:
            token.copy_(logits.argmax())
            return
        probabilities = torch.softmax(logits.float() / self._sampling.temperature, -1)
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.where(before < self._sampling.top_p, ordered, 0.0)
        generator = torch.Generator().manual_seed(hash((self._sampling.seed, int(position))))
        token.copy_(order[torch.multinomial(kept, 1, generator=generator)][0])


def make_step(model: PreTrainedModel, max_length: int) -> Step:
    """The fused step on a GPU where it knows the model, else the model's own module."""
    if model.device.type == "cuda":
        from hlwq_cuda.step import FusedStep

        if FusedStep.supports(model, max_length) is None:
            return FusedModelStep(model, max_length)
    return ModuleStep(model, max_length)


def make_sampler(model: PreTrainedModel) -> DeviceSampler | HostSampler:
    """The sampler of the model's device."""
    return DeviceSampler(model) if model.device.type == "cuda" else HostSampler()


def static_cache(model: PreTrainedModel, max_length: int) -> StaticCache:
    """transformers' static cache, with whole layers in place of windowed ones.

    A windowed layer counts its tokens on the host, which a graph cannot see. On a whole layer the attention mask keeps
    the window; its length lies on the device.
    """
    cache = StaticCache(config=model.config, max_cache_len=max_length)
    cache.layers = [
        StaticLayer(max_length) if type(layer) is StaticSlidingWindowLayer else layer for layer in cache.layers
    ]
    return cache


def cache_argument(model: PreTrainedModel) -> str:
    """What `model` calls its cache: transformers renamed `past_key_values` in 5.24."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Equal tokens at the beginning of both."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
