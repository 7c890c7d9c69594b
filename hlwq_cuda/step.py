"""One decode step of a dense decoder as a fixed list of launches: nine kernels a layer, one CUDA graph a token.

    layer:  norm -> q k v -> attention -> combine -> output -> norm -> gate up -> SiLU -> down
    step:   embedding, every layer, norm -> head

The kernels that are not products end with the rotation of their row into what the next product reads, the residual
stream stays in float32, and from compute capability 9.0 on each kernel starts while its predecessor still runs
(programmatic dependent launch) and loads what does not depend on it: the first weights, keys and values, gains.

    reason = FusedStep.supports(model, max_length)   # None, or why the model must take the general loop
    step = FusedStep(model, max_length)              # stacks weights, allocates the cache
    step.load_cache(past_key_values)                 # of a prefill by the model itself, any Cache; sets `position`
    step.token.fill_(token)
    logits = step.run()                              # [vocabulary], always the same buffer; extends the cache
    step.position += 1

`run` launches on the current stream without allocation, synchronization or a look at device values: capture it, with
whatever samples the next token into `step.token` and adds one to `step.position`, and replay the graph.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from hlwq_cuda.families import Layer, find_family
from hlwq_cuda.gpu import launch_options, multiprocessors
from hlwq_cuda.kernels.activation import silu_mul
from hlwq_cuda.kernels.attention import Partials, attention, combine, split_count
from hlwq_cuda.kernels.norm import norm
from hlwq_cuda.projection import Buffers, Projection, input_layout

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # their tables do not depend on the length of the text


class FusedStep:
    """The step of one model and one cache; see the module's docstring for use.

    token:    int64 [1], the token to run
    position: int64 [1], its index: the number of tokens in the cache; the last slot serves for any beyond it
    logits:   [vocabulary], float32, or the head's dtype where the head is not quantized
    cache:    [layers, keys and values, kv_heads, max_length, D], the dtype of the model's norms
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        """max_length: tokens of the cache. Raises ValueError with the sentence that `supports` returns."""
        reason = self.supports(model, max_length)
        if reason is not None:
            raise ValueError(reason)
        config, decoder = model.config, model.get_decoder()
        self._device = decoder.norm.weight.device
        self._launch = launch_options(self._device)
        self._eps = config.rms_norm_eps
        self._head_dim = head_dim(config)
        self._rotary = rotary_tables(decoder.rotary_emb, max_length, self._device)
        kv_heads, heads = config.num_key_value_heads, config.num_attention_heads
        self.cache = torch.zeros(
            (config.num_hidden_layers, 2, kv_heads, max_length, self._head_dim),
            dtype=decoder.norm.weight.dtype,
            device=self._device,
        )
        splits = split_count(kv_heads, max_length, multiprocessors(self._device))
        self._partials = Partials.empty(heads, splits, self._head_dim, self._device)
        self._buffers = Buffers(self._device)
        # programs of one norm read the old residual stream while others write the new one: two buffers, in turn
        self._hidden = [torch.empty(config.hidden_size, device=self._device) for _ in range(2)]
        self._embedded = self._hidden[0]
        self.token = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._embedding = decoder.embed_tokens
        family = find_family(config.model_type)
        self._launches = []
        delta = None
        for index, block in enumerate(decoder.layers):
            delta = self._add_layer(family.layer(block), self.cache[index], delta)
        head = Projection([model.get_output_embeddings()], self._buffers, self._eps)
        self._add_norm(decoder.norm, delta, head)
        self._add_projection(head)
        self.logits = head.output

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
        if rotary.rope_type not in FIXED_ROTARY or 2 * rotary.inv_freq.numel() != head_dim(config):
            return f"the fused step has no rotary embedding of type {rotary.rope_type} over part of a head"
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or torch.device("meta") in devices:
            return "the model is spread over several devices"
        groups = [
            (f"layer {i}", group) for i, block in enumerate(decoder.layers) for group in inputs(family.layer(block))
        ]
        for place, group in [*groups, ("output head", [model.get_output_embeddings()])]:
            try:
                input_layout(group)
            except ValueError as error:
                return f"{place}: {error}"
        return None

    def load_cache(self, past_key_values: Cache) -> None:
        """Copy the keys and values of a prefill, and set `position` to its length."""
        length = int(past_key_values.get_seq_length())
        for own, layer in zip(self.cache, past_key_values.layers, strict=True):
            own[0, :, :length] = layer.keys[0, :, :length]
            own[1, :, :length] = layer.values[0, :, :length]
        self.position.fill_(length)

    def run(self) -> torch.Tensor:
        """Launch the step of `token` at `position`; returns `logits`."""
        self._embedded.copy_(self._embedding(self.token)[0])
        for launch in self._launches:
            launch()
        return self.logits

    def _add_layer(self, layer: Layer, cache: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        """Add the launches of one block; `delta` and the result are what is still to be added to the residual."""
        of_qkv, of_output, of_gate_up, of_down = inputs(layer)
        qkv = Projection(of_qkv, self._buffers, self._eps)
        output = Projection(of_output, self._buffers)
        gate_up = Projection(of_gate_up, self._buffers, self._eps)
        down = Projection(of_down, self._buffers)
        gains = None if layer.query_norm is None else (layer.query_norm.weight.data, layer.key_norm.weight.data)
        self._add_norm(layer.attention_norm, delta, qkv)
        self._add_projection(qkv)
        scale = self._head_dim**-0.5
        tensors = (qkv.output, gains, self._rotary, *cache, self.position, self._partials)
        self._add(partial(attention, *tensors, self._eps, scale))
        self._add(partial(combine, self._partials, output.input, output.layout.block_size, output.layout.format))
        self._add_projection(output)
        self._add_norm(layer.mlp_norm, output.output, gate_up)
        self._add_projection(gate_up)
        self._add(partial(silu_mul, gate_up.output, down.input, down.layout.block_size, down.layout.format))
        self._add_projection(down)
        return down.output

    def _add_norm(self, module: nn.Module, delta: torch.Tensor | None, reader: Projection) -> None:
        old, new = self._hidden
        target = (reader.input, reader.layout.block_size, reader.layout.format)
        self._add(partial(norm, old, delta, module.weight.data, self._eps, new, *target))
        if delta is not None:
            self._hidden.reverse()

    def _add_projection(self, projection: Projection) -> None:
        self._add(projection.run)

    def _add(self, launch) -> None:
        self._launches.append(partial(launch, launch=self._launch))


def inputs(layer: Layer) -> tuple[tuple[nn.Module, ...], ...]:
    """The linear layers of a block, grouped by the row they read."""
    return (layer.query, layer.key, layer.value), (layer.output,), (layer.gate, layer.up), (layer.down,)


def head_dim(config) -> int:
    """The width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_tables(rotary: nn.Module, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the model's own rotary module at every position: float32 [length, D] each."""
    positions = torch.arange(length, device=device)[None]
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=device), positions)
    return cos[0].contiguous(), sin[0].contiguous()
