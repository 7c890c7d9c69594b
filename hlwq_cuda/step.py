"""One decode step of a dense decoder as a fixed list of launches: nine kernels a layer, one CUDA graph a token.

    layer:  norm -> q k v -> attention -> combine -> output -> norm -> gate up -> SiLU -> down
    step:   embedding, every layer, norm -> head

In place of attention a layer may have another mixer (mixers.py): gated DeltaNet takes two kernels.

The kernels that are not products end with the rotation of their row into what the next product reads, the residual
stream stays in float32, and from compute capability 9.0 on each kernel starts while its predecessor still runs
(programmatic dependent launch) and loads what does not depend on it: the first weights, keys and values, gains.

    reason = FusedStep.supports(model, max_length)   # None, or why the model must take the general loop
    step = FusedStep(model, max_length)              # stacks weights, allocates the cache
    step.prefill(ids)                                # or, where `reads_prompts` is false, load_cache(cache) after a
    step.token.fill_(token)                          # prefill by the model itself; both set `position`
    logits = step.run()                              # [vocabulary], always the same buffer; extends the cache
    step.position += 1

`run` launches on the current stream without allocation, synchronization or a look at device values: capture it, with
whatever samples the next token into `step.token` and adds one to `step.position`, and replay the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from hlwq_cuda.families import Attention, Layer, find_family
from hlwq_cuda.gpu import launch_options, multiprocessors
from hlwq_cuda.kernels.activation import silu_mul
from hlwq_cuda.kernels.attention import Partials, split_count
from hlwq_cuda.kernels.norm import norm
from hlwq_cuda.mixers import AttentionMixer, DeltaMixer, Surroundings, refuse
from hlwq_cuda.projection import Buffers, Projection, input_layout
from hlwq_cuda.prompt import Block, FusedPrompt

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # their tables do not depend on the length of the text


class FusedStep:
    """The step of one model and one cache; see the module's docstring for use.

    token:    int64 [1], the token to run
    position: int64 [1], its index: the number of tokens in the cache; the last slot serves for any beyond it
    logits:   [vocabulary], float32, or the head's dtype where the head is not quantized
    reads_prompts: whether `prefill` can serve: every layer has ordinary attention
    cache:    [layers with attention, keys and values, kv_heads, max_length, D], the dtype of the model's norms
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        """max_length: tokens of the cache. Raises ValueError with the sentence that `supports` returns."""
        reason = self.supports(model, max_length)
        if reason is not None:
            raise ValueError(reason)
        config, decoder = model.config, model.get_decoder()
        family = find_family(config.model_type)
        layers = [family.layer(block) for block in decoder.layers]
        self._device = decoder.norm.weight.device
        self._launch = launch_options(self._device)
        self._gain = family.gain
        kv_heads, heads, width = config.num_key_value_heads, config.num_attention_heads, head_dim(config)
        attentions = sum(isinstance(layer.mixer, Attention) for layer in layers)
        self.cache = torch.zeros(
            (attentions, 2, kv_heads, max_length, width), dtype=decoder.norm.weight.dtype, device=self._device
        )
        self.token = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._buffers = Buffers(self._device)
        splits = split_count(kv_heads, max_length, multiprocessors(self._device))
        self._around = Surroundings(
            self._buffers,
            self.position,
            config.rms_norm_eps,
            family.gain,
            rotary_tables(decoder.rotary_emb, max_length, self._device),
            Partials.empty(heads, splits, width, self._device),
            width,
        )
        # programs of one norm read the old residual stream while others write the new one: two buffers, in turn
        self._hidden = [torch.empty(config.hidden_size, device=self._device) for _ in range(2)]
        self._embedded = self._hidden[0]
        self._embedding = decoder.embed_tokens
        self._launches, self._mixers, self._blocks = [], [], []
        caches, delta = iter(self.cache), None
        for layer in layers:
            delta = self._add_layer(layer, caches, delta)
        head = Projection([model.get_output_embeddings()], self._buffers, config.rms_norm_eps)
        self._before_head = self._hidden[0], delta  # residual stream, and what is still to be added
        self._add_norm(decoder.norm, delta, head)
        self._add(head.run)
        self.logits = head.output
        self.reads_prompts = len(self._blocks) == len(layers)
        self._prompt = FusedPrompt(self._blocks, self._embedding, self._around.rotary, self._around.eps)

    @staticmethod
    def supports(model: PreTrainedModel, max_length: int) -> str | None:
        """None when the step can run `model` with a cache of `max_length` tokens, else one sentence saying why not."""
        config = model.config
        family = find_family(config.model_type)
        if family is None:
            return f"no fused step for the model type {config.model_type}"
        if config.hidden_act not in ("silu", "swish"):
            return f"the fused step has SiLU, the model {config.hidden_act}"
        window = getattr(config, "sliding_window", None)
        if window is not None and max_length > window:
            return f"{max_length} tokens exceed the sliding window of {window}, which the fused step does not have"
        decoder = model.get_decoder()
        rotary = decoder.rotary_emb
        if rotary.rope_type not in FIXED_ROTARY:
            return f"the fused step has no rotary embedding of type {rotary.rope_type}"
        layers = [family.layer(block) for block in decoder.layers]
        reasons = (refuse(layer.mixer, 2 * rotary.inv_freq.numel(), head_dim(config)) for layer in layers)
        reason = next(filter(None, reasons), None)
        if reason is not None:
            return reason
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or torch.device("meta") in devices:
            return "the model is spread over several devices"
        groups = [(f"layer {i}", group) for i, layer in enumerate(layers) for group in inputs(layer)]
        for place, group in [*groups, ("output head", [model.get_output_embeddings()])]:
            try:
                input_layout(group)
            except ValueError as error:
                return f"{place}: {error}"
        return None

    def load_cache(self, cache: Cache) -> None:
        """Copy what a prefill left, and set `position` to its length."""
        length = int(cache.get_seq_length())
        for mixer, layer in zip(self._mixers, cache.layers, strict=True):
            mixer.load(layer, length)
        self.position.fill_(length)

    def prefill(self, ids: torch.Tensor, kept: int = 0) -> torch.Tensor:
        """Read tokens int64 [L] behind the first `kept` of the cache; sets `position`, returns `logits` of the last.

        Raises ValueError when the cache is too short for them.
        """
        if kept + len(ids) > self.cache.shape[3]:
            raise ValueError(f"{kept + len(ids)} tokens do not fit in a cache of {self.cache.shape[3]}")
        for buffer, row in zip(self._before_head, self._prompt.read(ids, kept), strict=True):
            buffer.copy_(row)
        for launch in self._launches[-2:]:  # norm and head
            launch()
        self.position.fill_(kept + len(ids))
        return self.logits

    def run(self) -> torch.Tensor:
        """Launch the step of `token` at `position`; returns `logits`."""
        self._embedded.copy_(self._embedding(self.token)[0])
        for launch in self._launches:
            launch()
        return self.logits

    def _add_layer(self, layer: Layer, caches: Iterator[torch.Tensor], delta: torch.Tensor | None) -> torch.Tensor:
        """Add the launches of one block; `delta` and the result are what is still to be added to the residual."""
        if isinstance(layer.mixer, Attention):
            mixer = AttentionMixer(layer.mixer, self._around, next(caches))
        else:
            mixer = DeltaMixer(layer.mixer, self._around)
        self._mixers.append(mixer)
        gate_up = Projection((layer.gate, layer.up), self._buffers, self._around.eps)
        down = Projection((layer.down,), self._buffers)
        if isinstance(layer.mixer, Attention) and not layer.mixer.gated:
            gains = (self._gain(layer.mixer_norm), self._gain(layer.mlp_norm))
            attends = (mixer.projection, mixer.gains, mixer.cache, mixer.output)
            self._blocks.append(Block(gains[0], *attends, gains[1], gate_up, down))
        self._add_norm(layer.mixer_norm, delta, mixer.projection)
        for launch in (mixer.projection.run, *mixer.launches, mixer.output.run):
            self._add(launch)
        self._add_norm(layer.mlp_norm, mixer.output.output, gate_up)
        self._add(gate_up.run)
        self._add(partial(silu_mul, gate_up.output, down.input, down.layout.block_size, down.layout.format))
        self._add(down.run)
        return down.output

    def _add_norm(self, module: nn.Module, delta: torch.Tensor | None, reader: Projection) -> None:
        old, new = self._hidden
        target = (reader.input, reader.layout.block_size, reader.layout.format)
        self._add(partial(norm, old, delta, self._gain(module), self._around.eps, new, *target))
        if delta is not None:
            self._hidden.reverse()

    def _add(self, launch) -> None:
        self._launches.append(partial(launch, launch=self._launch))


def inputs(layer: Layer) -> tuple[tuple[nn.Module, ...], ...]:
    """The linear layers of a block, grouped by the row they read."""
    return layer.mixer.inputs, (layer.mixer.output,), (layer.gate, layer.up), (layer.down,)


def head_dim(config) -> int:
    """The width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_tables(rotary: nn.Module, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the model's own rotary module at every position: float32 [length, R] each."""
    positions = torch.arange(length, device=device)[None]
    if hasattr(rotary, "mrope_section"):  # one for time, height and width, which are equal in text
        positions = positions.expand(3, -1, -1)
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=device), positions)
    return cos[0].contiguous(), sin[0].contiguous()
