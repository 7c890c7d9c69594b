"""How much each token of the calibration text counts: by what an error there does to the model's predictions (torch).

A layer's output error adds up over tokens as if all mattered alike. To second order the KL divergence that small errors
e of a matrix's outputs cause is half of E (g . e)^2, with g the gradient of log p(y) for a y drawn from the model's
own prediction: the Fisher information. So a token counts by |g|^2 (GuidedQuant, Kim et al., arXiv 2505.07004), here by
its square root: one drawn y is a noisy estimate, and whole squares did worse than equal weights (docs/quality.md).

One window at a time passes the unquantized model forward and backward; only a number for each token is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from convert.layer_walk import matrices, watch

if TYPE_CHECKING:
    import torch
    from torch import nn

TEMPER = 0.5  # exponent of |g|^2

LayerWeights = dict[str, "torch.Tensor"]  # name of a matrix -> |g|^2, float32 [windows, length]


def gradient_squares(model: Any, layers: nn.ModuleList, windows: torch.Tensor) -> list[LayerWeights]:
    """|g|^2 of every token for every matrix of every layer that sees all tokens of a window (experts do not).

    windows: int64 [windows, length], on the model's device. The result is on the CPU.
    """
    import torch

    names = {
        weight.data_ptr(): (index, name)
        for index, layer in enumerate(layers)
        for name, weight in matrices(layer).items()
    }
    found: list[LayerWeights] = [{} for _ in layers]
    generator = torch.Generator(model.device).manual_seed(0)
    model.requires_grad_(False)
    handle = layers[0].register_forward_pre_hook(_differentiable, with_kwargs=True)
    for number, window in enumerate(windows):

        def see_output(place: tuple[int, str], output: torch.Tensor, number: int = number) -> None:
            index, name = place
            if output.requires_grad and output.numel() == windows.shape[1] * output.shape[-1]:
                if name not in found[index]:
                    found[index][name] = torch.zeros(windows.shape)
                output.register_hook(partial(_keep_squares, found[index][name][number]))

        with torch.enable_grad(), watch(names, see_output=see_output):
            logits = model(input_ids=window[None], use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    handle.remove()
    return found


def token_weights(squares: LayerWeights, names: Sequence[str]) -> torch.Tensor | None:
    """The weights of the tokens for matrices that share their input, mean 1: float32 [windows, length].

    They are rounded as one matrix, whose gradient is theirs together. None where the gradients were not seen.
    """
    if not all(name in squares for name in names):
        return None
    weights = sum((squares[name] for name in names[1:]), squares[names[0]]) ** TEMPER
    mean = weights.mean()
    return weights / mean if mean > 0 else None


def _keep_squares(row: torch.Tensor, gradient: torch.Tensor) -> None:
    row.copy_(gradient.float().square().sum(-1).flatten())


def _differentiable(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Let gradients be taken from the hidden states that enter the first layer on."""
    hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
