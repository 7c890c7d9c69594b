"""The `calibrated` encoder: walk the model layer by layer and round every matrix against the inputs it really sees.

Each decoder layer is visited once, with the layers before it already quantized. Inside a layer the matrices are
taken in the order of use, those that read the same input together: the inputs of some ten thousand tokens give the
second moments, feedback.py the codes, and the decoded weight replaces the original before the next matrices are
visited. So the moments of a few matrices and one set of hidden states are in memory, whatever the size of the model.

A second stream of hidden states passes through the unquantized layers. The target of a matrix is what it gives in the
*unquantized* model, W X, approximated from the inputs X' of the quantized one: W X X'^T (X' X'^T)^-1 undoes part of the
error that earlier layers made (GPTAQ, Li et al., arXiv 2504.02692).

A result is accepted only if its output error on held-out windows is lower than that of the search encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import feedback, search
from convert.code_store import CodeStore, row_digests
from convert.format import ModuleSpec
from convert.reference import Encoded

if TYPE_CHECKING:
    import torch
    from torch import nn

    from convert.layer_walk import LayerRun

BATCH = 8  # windows that pass a layer together
HELD_OUT = 8  # one batch in so many only judges
ROUNDS = 1  # of norms and coordinate descent after error feedback

SpecOf = Callable[[np.ndarray], "ModuleSpec | None"]  # digests uint64 [N] of a matrix's rows -> its spec


@dataclass
class Outcome:
    """What calibration did, for the report."""

    accepted: int = 0
    fallbacks: list[str] = field(default_factory=list)  # "matrix: why", for each that the search encoder gets

    def text(self) -> str:
        """For people."""
        lines = [f"{self.accepted} matrices calibrated, {len(self.fallbacks)} left to the search encoder"]
        return "\n".join([*lines, *(f"  {each}" for each in self.fallbacks)])


@dataclass
class Moments:
    """Second moments of the inputs that one or several matrices share, as sums over tokens."""

    tokens: int = 0
    quantized: torch.Tensor | float = 0.0  # X' X'^T [K, K]
    cross: torch.Tensor | float = 0.0  # X X'^T [K, K]

    def add(self, inputs: torch.Tensor, exact: torch.Tensor | None) -> None:
        """Inputs X' of the quantized model, float32 [tokens, K], and X of the unquantized one, if tokens agree."""
        self.tokens += len(inputs)
        own = inputs.T @ inputs
        self.quantized = self.quantized + own
        self.cross = self.cross + (own if exact is None else exact.T @ inputs)

    def rotated(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both moments per token in the rotated basis, float32 [Kp, Kp]."""
        import torch

        quantized, cross = (
            feedback.rotate_both(torch.as_tensor(total / self.tokens), block_size)
            for total in (self.quantized, self.cross)
        )
        return quantized, cross


def calibrate(
    model: Any,
    windows: np.ndarray,
    spec_of: SpecOf,
    store: CodeStore,
    *,
    device: str = "cpu",
    progress: Callable[[int], object] = lambda layers: None,
) -> Outcome:
    """Fill `store` with codes for the matrices of `model`'s decoder layers that `spec_of` gives a spec.

    model: a transformers causal language model in the dtype of its files, on `device` or not. windows: int64
    [windows, length], the tokens to calibrate on. Layers that the store already holds are read from it.
    """
    import torch

    from convert.layer_walk import LayerRun, decoder_layers, enter, record_calls, show_experts

    outcome = Outcome()
    with torch.no_grad():
        show_experts(model)
        layers = decoder_layers(model)
        size = min(BATCH, max(len(windows) // 2, 1))
        tokens = torch.from_numpy(windows[: len(windows) // size * size]).to(model.device)
        batches = list(tokens.split(size))
        held_out = [
            index % HELD_OUT == HELD_OUT - 1 or (len(batches) <= HELD_OUT and index == len(batches) - 1)
            for index in range(len(batches))
        ]
        calls = record_calls(model, layers, batches[0])
        exact = [state.to(device) for state in enter(model, layers, batches)]
        _quantize_embedding(model.get_input_embeddings(), spec_of)
        hidden = [state.to(device) for state in enter(model, layers, batches)]
        for index, layer in enumerate(layers):
            run = LayerRun(layer, calls[index], device)
            name = f"layer-{index:05}"
            if store.has(name):
                _decode_stored(run, spec_of, store)
            else:
                results = []
                stages = run.stages(hidden[0])
                for stage in stages:
                    results += _round_stage(run, stage, hidden, exact, held_out, spec_of, f"{name}.", outcome)
                _search_the_rest(run, stages, spec_of, f"{name}.", outcome)
                store.save(name, results)
            exact = [run.run(state, exact=True) for state in exact]
            hidden = [run.run(state) for state in hidden]
            progress(1)
    return outcome


def _quantize_embedding(embedding: nn.Embedding, spec_of: SpecOf) -> None:
    weight = _values(embedding.weight)
    spec = spec_of(row_digests(weight[:1]))
    if spec is not None:
        _assign(embedding.weight, search.encode(weight, spec), spec)


def _decode_stored(run: LayerRun, spec_of: SpecOf, store: CodeStore) -> None:
    encoder = store.encoder()
    for weight in run.weights().values():
        values = _values(weight)
        spec = spec_of(row_digests(values[:1]))
        if spec is not None:
            _assign(weight, encoder(values, spec), spec)


def _search_the_rest(
    run: LayerRun, stages: Sequence[Sequence[Sequence[str]]], spec_of: SpecOf, prefix: str, outcome: Outcome
) -> None:
    """Matrices that the layer never gives to `linear`: quantized too, but not against their inputs."""
    seen = {name for stage in stages for group in stage for name in group}
    for name, weight in run.weights().items():
        values = _values(weight)
        spec = None if name in seen else spec_of(row_digests(values[:1]))
        if spec is not None:
            outcome.fallbacks.append(f"{prefix}{name}: its inputs are not seen")
            _assign(weight, search.encode(values, spec), spec)


def _round_stage(
    run: LayerRun,
    stage: Sequence[Sequence[str]],
    hidden: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    held_out: Sequence[bool],
    spec_of: SpecOf,
    prefix: str,
    outcome: Outcome,
) -> list[tuple[np.ndarray, Encoded, ModuleSpec]]:
    """Gather the moments of one stage, round its matrices, and put the decoded weights into the layer."""
    weights = run.weights()
    specs = {name: spec_of(row_digests(_values(weights[name][:1]))) for group in stage for name in group}
    groups = [[name for name in group if specs[name]] for group in stage]
    groups = [group for group in groups if group]
    if not groups:
        return []
    fit, judge = _gather(run, [group[0] for group in groups], hidden, exact, held_out)
    results = []
    for group in groups:
        for names in _by_spec(group, specs):
            spec = specs[names[0]]
            assert spec
            originals = [weights[name] for name in names]
            rounded = _round(originals, fit.get(group[0]), judge.get(group[0]), spec)
            for name, original, found in zip(names, originals, rounded, strict=True):
                values = _values(original)
                if isinstance(found, str):
                    outcome.fallbacks.append(f"{prefix}{name}: {found}")
                    _assign(original, search.encode(values, spec), spec)
                else:
                    outcome.accepted += 1
                    results.append((row_digests(values), found, spec))
                    _assign(original, found, spec)
    return results


def _by_spec(names: Sequence[str], specs: dict[str, ModuleSpec | None]) -> list[list[str]]:
    found: dict[ModuleSpec | None, list[str]] = {}
    for name in names:
        found.setdefault(specs[name], []).append(name)
    return list(found.values())


def _gather(
    run: LayerRun,
    names: Sequence[str],
    hidden: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    held_out: Sequence[bool],
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Moments for fitting and for judging, of the inputs of every name that some token reaches."""
    fit: dict[str, Moments] = {}
    judge: dict[str, Moments] = {}
    shared = len(names) == 1  # experts see other tokens when the router decides otherwise: no common tokens
    for state, exact_state, judging in zip(hidden, exact, held_out, strict=True):
        seen = run.inputs(state, names)
        seen_exact = run.inputs(exact_state, names, exact=True) if shared else {}
        for name, inputs in seen.items():
            (judge if judging else fit).setdefault(name, Moments()).add(inputs, seen_exact.get(name))
    return fit, judge


def _round(
    originals: Sequence[torch.Tensor], fit: Moments | None, judge: Moments | None, spec: ModuleSpec
) -> list[Encoded | str]:
    """Codes for matrices that share their input, or for each the reason to use the search encoder instead."""
    import torch

    if fit is None or judge is None or fit.tokens < spec.in_features:
        tokens = fit.tokens if fit else 0
        return [f"{tokens} calibration tokens for {spec.in_features} inputs"] * len(originals)
    weight = feedback.rotate_rows(torch.cat(list(originals)), spec.block_size)
    hessian, cross = fit.rotated(spec.block_size)
    try:
        target = feedback.compensated(weight, hessian, cross)
        norms = feedback.search_norms(weight, spec)
        state = feedback.round_with_feedback(target, hessian, norms, spec, ROUNDS)
    except feedback.SingularHessianError as error:
        return [str(error)] * len(originals)
    plain = feedback.nearest_codes(weight, feedback.search_norms(weight, spec), spec)
    judges = judge.rotated(spec.block_size)
    found, baseline = (feedback.row_errors(each.values(), weight, *judges) for each in (state, plain))
    sizes = [len(original) for original in originals]
    better = [
        bool(ours.sum() < theirs.sum()) for ours, theirs in zip(found.split(sizes), baseline.split(sizes), strict=True)
    ]
    codes = state.codes.to("cpu", torch.uint8).split(sizes)
    norms = state.norms.to("cpu", torch.float16).split(sizes)
    return [
        Encoded(codes[i].numpy(), norms[i].numpy()) if better[i] else "no better than search on held-out text"
        for i in range(len(originals))
    ]


def _values(weight: torch.Tensor) -> np.ndarray:
    import torch

    return weight.detach().to("cpu", torch.float32).numpy()


def _assign(weight: torch.Tensor, encoded: Encoded, spec: ModuleSpec) -> None:
    """Put the decoded weight in place of the original."""
    import torch

    state = feedback.Rounding(
        torch.from_numpy(encoded.codes.astype(np.int64)).to(weight.device),
        torch.from_numpy(encoded.norms.astype(np.float32)).to(weight.device),
        spec,
    )
    decoded = feedback.rotate_rows(state.values(), spec.block_size)[:, : spec.in_features]
    weight.data.copy_(decoded)
