"""Recipe `auto`: the bits of every group of matrices that cost least under a budget of bytes.

The loss of a quantized model is close to a sum over its matrices, each term proportional to the matrix's relative
squared error (the linearity theorem of HIGGS, Malinovskii et al., arXiv 2411.17525). So one measurement a group is
enough: quantize that group alone, measure the KL divergence it causes, and scale it with the error of other bit
widths. What is left is a knapsack problem, solved exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from convert import search
from convert.codebook import codebook
from convert.errors import ConvertError
from convert.format import ModuleSpec
from convert.plan import Plan, PlannedTensor, make_plan
from convert.recipe import Recipe, fused_key
from convert.reference import decode
from convert.target import Target

PROBE_BITS = 3  # coarse enough for a clear signal, fine enough for the loss to stay linear
AUTO_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Option:
    """One bit width for a group: what it takes and what it costs."""

    bits: int
    nbytes: int
    loss: float


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option for each group, of least total loss with at most `budget` bytes: exact dynamic programming.

    The states after some groups are the pairs (bytes, loss) that no other pair beats in both.
    """
    nbytes, loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # for every state: index of the state before, and of the option
    least = [min(option.nbytes for option in options) for options in groups]
    rest = sum(least)
    if rest > budget:
        raise ConvertError(f"the smallest plan takes {rest} bytes, more than the {budget} asked for; raise the target")
    for options, smallest in zip(groups, least, strict=True):
        rest -= smallest
        all_bytes = (nbytes[:, None] + np.array([option.nbytes for option in options])).ravel()
        all_loss = (loss[:, None] + np.array([option.loss for option in options])).ravel()
        order = np.lexsort((all_loss, all_bytes))
        order = order[all_bytes[order] + rest <= budget]
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], all_loss[order]]))[:-1]
        kept = order[all_loss[order] < best_before]
        nbytes, loss = all_bytes[kept], all_loss[kept]
        steps.append((kept // len(options), kept % len(options)))
    chosen: list[Option] = []
    state = len(loss) - 1  # the largest kept total has the least loss
    for options, (before, option) in zip(reversed(groups), reversed(steps), strict=True):
        chosen.append(options[option[state]])
        state = before[state]
    return chosen[::-1]


def auto_recipe(
    target: Target,
    sensitivities: Callable[[Mapping[str, Sequence[PlannedTensor]]], Mapping[str, float]],
    block_size: int | None,
    dtype: np.dtype | None,
    *,
    bits_per_weight: float | None = None,
    nbytes: int | None = None,
) -> Recipe:
    """The recipe of least predicted loss with at most `bits_per_weight` over the whole model, or `nbytes` of tensors.

    sensitivities: groups of tensors, planned at PROBE_BITS -> the KL divergence that each group causes alone. A group
    that is not measured is taken to be as sensitive, by weight, as the others are on average.
    """
    plans = auto_plans(target, block_size, dtype)
    budget = auto_budget(plans, bits_per_weight, nbytes)
    any_plan = plans[PROBE_BITS]
    fixed = any_plan.nbytes - sum(planned.nbytes for planned in any_plan.quantized)
    groups = group_tensors(any_plan)
    measured = sensitivities(groups)
    sizes = {
        bits: {name: sum(p.nbytes for p in group) for name, group in group_tensors(plan).items()}
        for bits, plan in plans.items()
    }
    weights = {name: sum(planned.tensor.size for planned in group) for name, group in groups.items()}
    known = sum(weights[name] for name in measured)
    average = sum(measured.values()) / max(known, 1)
    options = [
        [
            Option(bits, sizes[bits][name], measured.get(name, average * weights[name]) * relative_error(bits))
            for bits in AUTO_BITS
        ]
        for name in groups
    ]
    chosen = allocate(options, budget - fixed)
    bits = {
        planned.tensor.module: option.bits
        for group, option in zip(groups.values(), chosen, strict=True)
        for planned in group
    }
    return Recipe("auto", bits)


def auto_plans(target: Target, block_size: int | None, dtype: np.dtype | None) -> dict[int, Plan]:
    """The plan of every legal number of bits, the same for all tensors."""
    return {bits: make_plan(target.tensors, Recipe("auto", {"*": bits}), block_size, dtype) for bits in AUTO_BITS}


def auto_budget(plans: Mapping[int, Plan], bits_per_weight: float | None, nbytes: int | None) -> int:
    """The bytes that all tensors may take; ConvertError if no plan fits."""
    weights = plans[PROBE_BITS].weights
    budget = nbytes if nbytes is not None else int((bits_per_weight or 0) * weights / 8)
    smallest = min(plan.nbytes for plan in plans.values())
    if smallest > budget:
        raise ConvertError(
            f"the target of {budget} bytes ({8 * budget / weights:.3f} bits a weight) cannot be met: "
            f"{min(AUTO_BITS)} bits everywhere take {smallest} ({8 * smallest / weights:.3f})"
        )
    return budget


def group_tensors(plan: Plan) -> dict[str, list[PlannedTensor]]:
    """Quantized tensors by the group that shares its bits: fused layers, all experts of a layer."""
    groups: dict[str, list[PlannedTensor]] = {}
    for planned in plan.quantized:
        groups.setdefault(fused_key(planned.tensor.module), []).append(planned)
    return groups


@cache
def relative_error(bits: int) -> float:
    """Squared error of the search encoder on normal weights, in units of that at PROBE_BITS."""
    return _squared_error(bits) / _squared_error(PROBE_BITS)


def _squared_error(bits: int) -> float:
    spec = ModuleSpec(bits, 128, 1024)
    weight = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    return float(((decode(search.encode(weight, spec), spec, codebook(bits)) - weight) ** 2).mean())
