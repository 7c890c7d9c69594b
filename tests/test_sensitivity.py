"""Sensitivities with codes of search and with calibrated codes of matrices rounded alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert.calibrate import calibrate, judging_windows  # noqa: E402
from convert.code_store import CodeStore, row_digests  # noqa: E402
from convert.evaluate import load_transformers  # noqa: E402
from convert.format import ModuleSpec, default_block_size  # noqa: E402
from convert.layer_walk import LayerRun, matrices, show_experts  # noqa: E402
from convert.recipe import fused_key  # noqa: E402
from convert.sensitivity import measure  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

WINDOWS = np.random.default_rng(0).integers(97, 123, (16, 128))  # few tokens: all is fitted well
Groups = dict[int, tuple[str, ModuleSpec]]  # digest of a matrix's first row -> its group, its spec


def model_of(family: str, directory: Path):
    model = load_transformers(tiny_model(family, directory, dtype="float32"), "auto")
    show_experts(model)
    return model


def linears(model) -> dict[str, torch.Tensor]:
    """Every matrix of the decoder layers that conversion quantizes, each expert by itself."""
    return {
        f"layers.{index}.{name}": weight
        for index, layer in enumerate(model.model.layers)
        for name, weight in matrices(layer).items()
        if not name.endswith("mlp.gate.weight")  # the router
    }


def groups_of(model, keep: Callable[[str], bool] = lambda name: True) -> Groups:
    found = {}
    for name, weight in linears(model).items():
        if keep(name):
            spec = ModuleSpec(3, default_block_size(weight.shape[1]), weight.shape[1])
            group = fused_key(name.partition("[")[0].removesuffix(".weight"))
            found[int(row_digests(weight[:1].detach().numpy())[0])] = (group, spec)
    return found


def codes_alone(model, groups: Groups, directory: Path, *, alone: bool = True):
    store = CodeStore(directory, "")

    def spec_of(digests: np.ndarray) -> ModuleSpec | None:
        return groups[int(digests[0])][1] if int(digests[0]) in groups else None

    calibrate(model, WINDOWS, spec_of, store, alone=alone)
    return store.encoder()


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("llama", ("layers.1.self_attn.k_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj")),
        ("llama", ("layers.0.self_attn.o_proj",)),
        ("llama", ("layers.1.mlp.down_proj",)),
        ("qwen3_moe", ("layers.1.mlp.experts.down_proj",)),
    ],
)
def test_alone_is_as_if_nothing_else_were_quantized(family: str, parts: tuple[str, ...], tmp_path: Path):
    model = model_of(family, tmp_path / "source")
    everything = groups_of(model)
    some = groups_of(model, lambda name: name.startswith(parts))
    assert 0 < len(some) < len(everything)
    found = codes_alone(model, everything, tmp_path / "alone")
    expected = codes_alone(model, some, tmp_path / "expected", alone=False)
    prefixed = codes_alone(model, everything, tmp_path / "prefixed", alone=False)
    changed = []
    for name, weight in linears(model).items():
        if name.startswith(parts):
            spec = ModuleSpec(3, default_block_size(weight.shape[1]), weight.shape[1])
            codes, others, later = (each(weight.detach().numpy(), spec).codes for each in (found, expected, prefixed))
            assert (codes != others).mean() < 1e-3  # sums of other order
            changed.append((codes != later).mean())
    assert max(changed) > 0.05


def test_inputs_of_low_rank_make_a_matrix_less_sensitive_to_calibrated_codes(tmp_path: Path):
    """Error feedback hides the error where there is no input; search cannot know."""
    model = model_of("llama", tmp_path / "source")
    values = model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        left, sizes, right = torch.linalg.svd(values, full_matrices=False)
        sizes[3:] = 0
        values.copy_(left * sizes @ right)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = groups_of(model)

    def group_of(digests: np.ndarray) -> tuple[str, ModuleSpec] | None:
        return groups.get(int(digests[0]))

    windows = judging_windows(WINDOWS)[:4]
    searched = measure(model, windows, group_of)
    codes = codes_alone(model, groups, tmp_path / "store")
    calibrated = measure(model, windows, group_of, encoder=codes)
    assert searched.keys() == calibrated.keys() == {group for group, _ in groups.values()}
    share = {name: calibrated[name] / searched[name] for name in searched}
    low = share.pop("layers.0.self_attn.o_proj")
    assert low < 0.5 * min(share.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_experts_are_measured_with_the_codes_of_each(tmp_path: Path):
    model = model_of("qwen3_moe", tmp_path / "source")
    groups = groups_of(model)
    codes = codes_alone(model, groups, tmp_path / "store")
    asked: list[np.ndarray] = []

    def encoder(weight: np.ndarray, spec: ModuleSpec, power: float):
        asked.append(weight)
        return codes(weight, spec, power)

    found = measure(model, WINDOWS[:1], lambda digests: groups.get(int(digests[0])), encoder=encoder)
    assert len(asked) == len(linears(model))
    assert all(loss > 0 for loss in found.values())


def test_finished_layers_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = model_of("llama", tmp_path / "source")
    groups = groups_of(model)
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    spec = ModuleSpec(3, default_block_size(weight.shape[1]), weight.shape[1])
    whole = codes_alone(model, groups, tmp_path / "store")(weight, spec)
    (tmp_path / "store" / "layer-00001.safetensors").unlink()
    stages = []
    original = LayerRun.stages
    monkeypatch.setattr(LayerRun, "stages", lambda run, hidden: stages.append(run) or original(run, hidden))
    resumed = codes_alone(model, groups, tmp_path / "store")(weight, spec)
    assert len(stages) == 1
    np.testing.assert_array_equal(resumed.codes, whole.codes)


def test_judging_windows_are_those_that_are_held_out():
    windows = np.arange(128)[:, None]
    np.testing.assert_array_equal(judging_windows(windows)[:, 0], [*range(56, 64), *range(120, 128)])
    np.testing.assert_array_equal(judging_windows(windows[:2]), [[1]])
