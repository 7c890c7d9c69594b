"""How much KL divergence each group of matrices causes when it alone is quantized (torch + transformers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import feedback, search_torch
from convert.code_store import row_digests
from convert.encoders import Encoder
from convert.format import ModuleSpec
from convert.plan import TIED_POWER, column_power

if TYPE_CHECKING:
    import torch
    from torch import nn


def measure(
    model: Any,
    windows: np.ndarray,
    group_of: Callable[[np.ndarray], tuple[str, ModuleSpec] | None],
    progress: Callable[[int], object] = lambda groups: None,
    *,
    encoder: Encoder | None = None,
) -> dict[str, float]:
    """Mean KL divergence from the unquantized model, nats a token, for every group that `group_of` names.

    model: a transformers causal language model on its device. windows: int64 [windows, length]. group_of: digest of a
    matrix's first row -> its group and how to quantize it, None to leave it. encoder: whose codes; None for search, on
    the model's device. The model is left as it was.
    """
    import torch

    groups: dict[str, list[tuple[torch.Tensor, ModuleSpec, float]]] = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim not in (2, 3):
            continue
        first_row = parameter.data.reshape(-1, parameter.shape[-1])[:1]
        found = group_of(row_digests(first_row.to("cpu", torch.float32).numpy()))
        if found is not None:
            if parameter is embedding.weight or (head is not None and parameter is head.weight):
                power = TIED_POWER if head is not None and head.weight is embedding.weight else 0.0
            else:
                power = column_power(parameter_name)
            groups.setdefault(found[0], []).append((parameter.data, found[1], power))
    batch = torch.from_numpy(windows).to(model.device)
    losses: dict[str, float] = {}
    with torch.no_grad():
        reference = _log_softmax(model, batch)
        for name, members in groups.items():
            originals = [weight.clone() for weight, *_ in members]
            for weight, spec, power in members:
                for matrix in weight if weight.ndim == 3 else [weight]:
                    matrix.copy_(_quantized(matrix.float(), spec, power, encoder))
            losses[name] = _mean_kl(reference, _log_softmax(model, batch))
            for (weight, *_), original in zip(members, originals, strict=True):
                weight.copy_(original)
            progress(1)
    return losses


def _quantized(weight: torch.Tensor, spec: ModuleSpec, power: float, encoder: Encoder | None) -> torch.Tensor:
    """The decoded weight float32 [N, K]."""
    if encoder is not None:
        return feedback.rounding(encoder(weight.cpu().numpy(), spec, power), spec, weight.device).weight()
    codes, norms = search_torch.encode(weight, spec, power)
    return feedback.Rounding(codes.long(), norms.float(), spec).weight()


def _log_softmax(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    return [model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1) for window in batch]


def _mean_kl(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    kl = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(reference, other, strict=True)]
    return max(float(sum(kl) / len(kl)), 0.0)
