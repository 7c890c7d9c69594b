"""The allocation against brute force, and the auto recipe on a tiny model."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from convert.allocate import AUTO_BITS, PROBE_BITS, Option, allocate, auto_recipe, group_tensors
from convert.errors import ConvertError
from convert.plan import make_plan
from convert.recipe import Recipe, fused_key
from convert.target import open_target


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_optimal(seed: int):
    rng = np.random.default_rng(seed)
    groups = [
        [Option(bits, int(rng.integers(1, 40)), float(rng.random())) for bits in (2, 3, 4)]
        for _ in range(rng.integers(2, 7))
    ]
    everything = list(itertools.product(*groups))
    smallest = min(sum(option.nbytes for option in plan) for plan in everything)
    for budget in (smallest, smallest + 7, smallest + 30, 10**6):
        legal = [plan for plan in everything if sum(option.nbytes for option in plan) <= budget]
        best = min(sum(option.loss for option in plan) for plan in legal)
        found = allocate(groups, budget)
        assert sum(option.nbytes for option in found) <= budget
        assert sum(option.loss for option in found) == pytest.approx(best)
    with pytest.raises(ConvertError, match="raise the target"):
        allocate(groups, smallest - 1)


def test_fused_layers_share_a_key():
    layer = "model.layers.3.self_attn."
    assert fused_key(f"{layer}q_proj") == fused_key(f"{layer}v_proj") != fused_key(f"{layer}o_proj")
    assert fused_key(f"{layer}q_proj") != fused_key("model.layers.4.self_attn.q_proj")
    experts = "model.layers.0.mlp.experts."
    assert fused_key(f"{experts}0.up_proj") == fused_key(f"{experts}7.gate_proj") != fused_key(f"{experts}0.down_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tests.tiny_models import tiny_model

    return tiny_model("llama", tmp_path_factory.mktemp("allocate") / "source")


def test_auto_recipe_spends_its_bits_where_they_count(source: Path):
    target = open_target("cuda", source)
    plan = make_plan(target.tensors, Recipe("uniform", {"*": PROBE_BITS}))
    sensitive = fused_key("model.layers.1.self_attn.q_proj")
    losses = {name: 1.0 if name == sensitive else 1e-3 for name in group_tensors(plan)}
    recipe = auto_recipe(target, lambda groups: losses, None, None, bits_per_weight=3.6)
    found = make_plan(target.tensors, recipe)
    assert found.bits_per_weight <= 3.6
    assert recipe.patterns["model.layers.1.self_attn.k_proj"] == max(AUTO_BITS)
    assert len(set(recipe.patterns.values())) > 1
    same = auto_recipe(target, lambda groups: losses, None, None, nbytes=found.nbytes)
    assert make_plan(target.tensors, same).nbytes <= found.nbytes


def test_target_that_cannot_be_met_is_one_sentence(source: Path):
    target = open_target("cuda", source)
    with pytest.raises(ConvertError, match="cannot be met: 2 bits everywhere take"):
        auto_recipe(target, lambda groups: pytest.fail("measured"), None, None, bits_per_weight=1.5)
