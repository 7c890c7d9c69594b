"""The `calibrated` encoder: walk the model layer by layer and round every matrix against the inputs it really sees.

Each decoder layer is visited once, with the layers before it already quantized. Inside a layer the matrices are
taken in the order of use, those that read the same input together: the inputs of some ten thousand tokens give the
second moments, feedback.py the codes, and the decoded weight replaces the original before the next matrices are
visited. So the moments of a few matrices and one set of hidden states are in memory, whatever the size of the model.

A second stream of hidden states passes through the unquantized layers. The target of a matrix is what it gives in the
*unquantized* model, W X, approximated from the inputs X' of the quantized one: W X X'^T (X' X'^T)^-1 undoes part of the
error that earlier layers made (GPTAQ, Li et al., arXiv 2504.02692). A matrix that adds its output to the stream of
hidden states aims further: at the stream of the unquantized model, so at what all matrices before it got wrong.

Tokens count by how much the model's predictions depend on them (token_weights.py).

The output head comes first, since a tied one is also the embedding whose output all layers see; it is rounded against
what it reads in the unquantized model.

Recipe `auto` measures with codes of another kind: every matrix rounded `alone`, against its inputs in the unquantized
model. Then nothing is replaced, both streams are one, and there is no error to undo.

A result is accepted only if its output error on held-out windows is lower than that of the search encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import feedback, search_torch
from convert.code_store import CodeStore, row_digests
from convert.format import ModuleSpec
from convert.moments import Moments, gather
from convert.plan import TIED_POWER, column_power
from convert.reference import Encoded
from convert.token_weights import LayerWeights, gradient_squares, token_weights

if TYPE_CHECKING:
    import torch

    from convert.layer_walk import LayerRun

BATCH = 8  # windows that pass a layer together
HELD_OUT = 8  # one batch in so many only judges
ROUNDS = 1  # of norms and coordinate descent after error feedback
HEAD = "head"  # its name in the store
HEAD_ROWS = 2**15  # rows of the head that are rounded together
EMBEDDING_SHARE = 0.1  # what a tied embedding counts for as input, of the head's mean second moment; docs/quality.md

Result = tuple[np.ndarray, Encoded, ModuleSpec]  # digests uint64 [N] of the rows of a matrix, its codes, its spec
Rounded = tuple[Encoded, str]  # codes, and why they are those of the search encoder, or ""
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


def calibrate(
    model: Any,
    windows: np.ndarray,
    spec_of: SpecOf,
    store: CodeStore,
    *,
    alone: bool = False,
    device: str = "cpu",
    progress: Callable[[int], object] = lambda layers: None,
) -> Outcome:
    """Fill `store` with codes for the matrices of `model`'s decoder layers that `spec_of` gives a spec.

    model: a transformers causal language model in the dtype of its files, on `device` or not. windows: int64
    [windows, length], the tokens to calibrate on. Layers that the store already holds are read from it. alone: round
    every matrix as if it were the only one; else what comes later sees its error.
    """
    import torch

    from convert.layer_walk import LayerRun, decoder_layers, enter, record_calls, show_experts

    outcome = Outcome()
    with torch.no_grad():
        show_experts(model)
        layers = decoder_layers(model)
        batches, held_out = split_windows(torch.from_numpy(windows).to(model.device))
        calls = record_calls(model, layers, batches[0])
        exact = [state.to(device) for state in enter(model, layers, batches)]
        round_head(model, batches, held_out, spec_of, store, outcome)
        squares: list[LayerWeights] = [{} for _ in layers]
        if not all(store.has(_layer_name(index)) for index in range(len(layers))):
            squares = gradient_squares(model, layers, torch.cat(batches))
        hidden = exact
        if not alone:
            embedding = model.get_input_embeddings().weight
            original = embedding.detach().clone()
            _quantize_embedding(embedding, spec_of, store)
            hidden = [state.to(device) for state in enter(model, layers, batches)]
            embedding.copy_(original)
        for index, layer in enumerate(layers):
            run = LayerRun(layer, calls[index], device)
            name = _layer_name(index)
            if store.has(name):
                _decode_stored(run, spec_of, store)
            else:
                results = []
                stages = run.stages(hidden[0])
                streams = list(zip(hidden, exact, strict=True))
                for number, stage in enumerate(stages):
                    if alone:
                        run.restore()
                    later = [each for following in stages[number + 1 :] for group in following for each in group]
                    results += _round_stage(
                        run, stage, later, streams, held_out, squares[index], spec_of, f"{name}.", outcome
                    )
                results += _search_the_rest(run, stages, spec_of, f"{name}.", outcome)
                store.save(name, results)
            exact = [run.run(state, exact=True) for state in exact]
            hidden = exact if alone else [run.run(state) for state in hidden]
            progress(1)
    return outcome


def _layer_name(index: int) -> str:
    return f"layer-{index:05}"


def split_windows(windows: torch.Tensor) -> tuple[list[torch.Tensor], list[bool]]:
    """Batches of windows int64 [windows, length], and which of them only judge: one in HELD_OUT, the last of few."""
    size = min(BATCH, max(len(windows) // 2, 1))
    batches = list(windows[: len(windows) // size * size].split(size))
    last = len(batches) - 1
    held_out = [
        index % HELD_OUT == HELD_OUT - 1 or (len(batches) <= HELD_OUT and index == last)
        for index in range(len(batches))
    ]
    return batches, held_out


def judging_windows(windows: np.ndarray) -> np.ndarray:
    """The windows that no codes are fitted to, int64 [n, length], at least one."""
    import torch

    batches, held_out = split_windows(torch.from_numpy(windows))
    return torch.cat([batch for batch, judging in zip(batches, held_out, strict=True) if judging]).numpy()


def round_head(
    model: Any,
    batches: Sequence[torch.Tensor],
    held_out: Sequence[bool],
    spec_of: SpecOf,
    store: CodeStore,
    outcome: Outcome,
) -> None:
    """Round the output head against what it reads in the unquantized model.

    The rows of a head that is tied to the embedding also enter the first layer, where no input counts more than
    another.
    """
    from convert.layer_walk import head_inputs

    head = model.get_output_embeddings()
    if head is None or store.has(HEAD):
        return
    spec = spec_of(row_digests(_values(head.weight[:1])))
    if spec is None:
        return
    fit, judge = Moments(), Moments()
    for batch, judging in zip(batches, held_out, strict=True):
        (judge if judging else fit).add(head_inputs(model, head, batch))
    power = 0.0
    if head.weight is model.get_input_embeddings().weight:
        fit, judge = fit.with_identity(EMBEDDING_SHARE), judge.with_identity(EMBEDDING_SHARE)
        power = TIED_POWER
    results = []
    for start in range(0, len(head.weight), HEAD_ROWS):
        rows = head.weight[start : start + HEAD_ROWS].float()
        rounded = _round([rows], [power], fit, judge, spec)
        results += _record([f"output head from row {start}"], [rows], rounded, spec, outcome)
    store.save(HEAD, results)


def _quantize_embedding(weight: torch.Tensor, spec_of: SpecOf, store: CodeStore) -> None:
    values = _values(weight)
    spec = spec_of(row_digests(values[:1]))
    if spec is not None:
        _assign(weight, store.encoder()(values, spec), spec)


def _decode_stored(run: LayerRun, spec_of: SpecOf, store: CodeStore) -> None:
    encoder = store.encoder()
    for weight in run.weights().values():
        values = _values(weight)
        spec = spec_of(row_digests(values[:1]))
        if spec is not None:
            _assign(weight, encoder(values, spec), spec)


def _search_the_rest(
    run: LayerRun, stages: Sequence[Sequence[Sequence[str]]], spec_of: SpecOf, prefix: str, outcome: Outcome
) -> list[Result]:
    """Matrices that the layer never gives to `linear`: quantized too, but not against their inputs."""
    seen = {name for stage in stages for group in stage for name in group}
    results: list[Result] = []
    for name, weight in run.weights().items():
        spec = None if name in seen else spec_of(row_digests(_values(weight[:1])))
        if spec is not None:
            rounded = [(_searched(weight, spec, column_power(name)), "its inputs are not seen")]
            results += _record([f"{prefix}{name}"], [weight], rounded, spec, outcome)
            _assign(weight, rounded[0][0], spec)
    return results


def _round_stage(
    run: LayerRun,
    stage: Sequence[Sequence[str]],
    later: Sequence[str],
    streams: Sequence[tuple[torch.Tensor, torch.Tensor]],
    held_out: Sequence[bool],
    squares: LayerWeights,
    spec_of: SpecOf,
    prefix: str,
    outcome: Outcome,
) -> list[Result]:
    """Gather the moments of one stage, round its matrices, and put the decoded weights into the layer."""
    weights = run.weights()
    specs = {name: spec_of(row_digests(_values(weights[name][:1]))) for group in stage for name in group}
    groups = [[name for name in group if specs[name]] for group in stage]
    groups = [group for group in groups if group]
    if not groups:
        return []
    counts = token_weights(squares, groups[0]) if len(groups) == 1 else None
    by_batch = None if counts is None else counts.split([len(state) for state, _ in streams])
    fit, judge = gather(run, [group[0] for group in groups], later, streams, held_out, by_batch)
    results: list[Result] = []
    for group in groups:
        for names in _by_spec(group, specs):
            spec = specs[names[0]]
            assert spec
            originals, powers = [weights[name] for name in names], [column_power(name) for name in names]
            rounded = _round(originals, powers, fit.get(group[0]), judge.get(group[0]), spec)
            results += _record([f"{prefix}{name}" for name in names], originals, rounded, spec, outcome)
            for original, (found, _) in zip(originals, rounded, strict=True):
                _assign(original, found, spec)
    return results


def _record(
    names: Sequence[str],
    originals: Sequence[torch.Tensor],
    rounded: Sequence[Rounded],
    spec: ModuleSpec,
    outcome: Outcome,
) -> list[Result]:
    """What the store keeps of rounded matrices, and their place in the report."""
    for name, (_, reason) in zip(names, rounded, strict=True):
        if reason:
            outcome.fallbacks.append(f"{name}: {reason}")
        else:
            outcome.accepted += 1
    return [
        (row_digests(_values(original)), found, spec) for original, (found, _) in zip(originals, rounded, strict=True)
    ]


def _by_spec(names: Sequence[str], specs: dict[str, ModuleSpec | None]) -> list[list[str]]:
    found: dict[ModuleSpec | None, list[str]] = {}
    for name in names:
        found.setdefault(specs[name], []).append(name)
    return list(found.values())


def _round(
    originals: Sequence[torch.Tensor],
    powers: Sequence[float],
    fit: Moments | None,
    judge: Moments | None,
    spec: ModuleSpec,
) -> list[Rounded]:
    """Codes for matrices that share their input; those of the search encoder, and why, where they are no worse."""
    import torch

    searched = [_searched(each, spec, power) for each, power in zip(originals, powers, strict=True)]
    if fit is None or judge is None or fit.tokens < spec.in_features:
        tokens = fit.tokens if fit else 0
        return [(each, f"{tokens} calibration tokens for {spec.in_features} inputs") for each in searched]
    weight = feedback.rotate_rows(torch.cat(list(originals)), spec.block_size)
    hessian, wanted = fit.rotated(weight, spec.block_size)
    try:
        target = feedback.compensated(weight, hessian, wanted)
        norms = search_torch.best_norms(weight.reshape(-1, spec.block_size), spec.bits).reshape(len(weight), -1)
        state = feedback.round_with_feedback(target, hessian, norms, spec, ROUNDS)
    except feedback.SingularHessianError as error:
        return [(each, str(error)) for each in searched]
    baseline = torch.cat([feedback.rounding(each, spec, weight.device).values() for each in searched])
    judges = judge.rotated(weight, spec.block_size)
    sizes = [len(original) for original in originals]
    ours, theirs = (
        [float(rows.sum()) for rows in feedback.row_errors(values, *judges).split(sizes)]
        for values in (state.values(), baseline)
    )
    codes = state.codes.to("cpu", torch.uint8).split(sizes)
    norms = state.norms.to("cpu", torch.float16).split(sizes)
    return [
        (Encoded(codes[i].numpy(), norms[i].numpy()), "")
        if ours[i] < theirs[i]
        else (searched[i], "no better than search on held-out text")
        for i in range(len(originals))
    ]


def _searched(weight: torch.Tensor, spec: ModuleSpec, power: float) -> Encoded:
    codes, norms = search_torch.encode(weight, spec, power)
    return Encoded(codes.cpu().numpy(), norms.cpu().numpy())


def _values(weight: torch.Tensor) -> np.ndarray:
    import torch

    return weight.detach().to("cpu", torch.float32).numpy()


def _assign(weight: torch.Tensor, encoded: Encoded, spec: ModuleSpec) -> None:
    """Put the decoded weight in place of the original."""
    weight.data.copy_(feedback.rounding(encoded, spec, weight.device).weight())
