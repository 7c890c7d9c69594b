"""recipe.py: bits by module, and the groups that engines fuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convert.errors import ConvertError
from convert.recipe import check_fused, make_recipe
from convert.target import Kind, OutputTensor


def tensor(name: str, kind: Kind = Kind.LINEAR) -> OutputTensor:
    return OutputTensor(f"{name}.weight", (64, 64), np.dtype(np.float32), "file", kind)


LAYER = "model.layers.3"


@pytest.mark.parametrize(
    ("module", "bits"),
    [
        (f"{LAYER}.mlp.gate_proj", 3),
        (f"{LAYER}.mlp.up_proj", 3),
        (f"{LAYER}.mlp.experts.gate_up_proj", 3),
        (f"{LAYER}.mlp.experts.7.down_proj", 4),
        (f"{LAYER}.self_attn.q_proj", 5),
        (f"{LAYER}.self_attn.o_proj", 6),
        (f"{LAYER}.linear_attn.in_proj_qkv", 5),
        (f"{LAYER}.linear_attn.out_proj", 6),
        ("model.embed_tokens", 5),
        ("lm_head", 6),
    ],
)
def test_seeds(module: str, bits: int):
    kind = {"model.embed_tokens": Kind.EMBEDDING, "lm_head": Kind.HEAD}.get(module, Kind.LINEAR)
    assert make_recipe("seeds").bits(tensor(module, kind), tied=False) == bits


def test_uniform_with_other_bits_for_embedding_and_head():
    recipe = make_recipe("uniform", 3, embed_bits=5, head_bits=6)
    assert recipe.bits(tensor("a.q_proj"), tied=False) == 3
    assert recipe.bits(tensor("embed_tokens", Kind.EMBEDDING), tied=False) == 5
    assert recipe.bits(tensor("lm_head", Kind.HEAD), tied=False) == 6
    assert recipe.bits(tensor("embed_tokens", Kind.EMBEDDING), tied=True) == 6  # one table serves both
    assert make_recipe("uniform").bits(tensor("embed_tokens", Kind.EMBEDDING), tied=True) == 4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.json", '{"*.q_proj": 5, "*_proj": 3, "lm_head": null}'),
        ("r.yaml", '"*.q_proj": 5\n"*_proj": 3\nlm_head: null\n'),
        ("r.yml", '{"*.q_proj": 5, "*_proj": 3, "lm_head": null}'),
    ],
)
def test_a_file_of_patterns_is_read_in_order(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    recipe = make_recipe(str(tmp_path / name), bits=6)
    modules = ["a.q_proj", "a.k_proj", "lm_head", "a.other"]
    assert [recipe.bits(tensor(module), tied=False) for module in modules] == [5, 3, None, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a recipe maps patterns to bits"),
        ("{}", "a recipe maps patterns to bits"),
        ('{"*": 7}', r"pattern '\*': bits is 7; the format has 2, 3, 4, 5, 6, 8"),
        ('{"*": "4"}', "bits is '4'"),
        ('{"*": true}', "bits is True"),
        ('{"*": [4]}', r"bits is \[4\]"),
    ],
)
def test_a_bad_recipe_file_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConvertError, match=message):
        make_recipe(str(tmp_path / "r.json"))


def test_bad_yaml_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ConvertError, match=r"r.yaml: not valid YAML \(") as caught:
        make_recipe(str(tmp_path / "r.yaml"))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path):
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConvertError, match=r"r.json: a recipe is a JSON or YAML file, and this is not text"):
        make_recipe(str(tmp_path / "r.json"))


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ConvertError, match=r"--recipe sedes: not uniform, not seeds, not a readable file"):
        make_recipe("sedes")


@pytest.mark.parametrize("option", ["bits", "embed_bits", "head_bits"])
def test_bits_outside_the_format_are_refused(option: str):
    with pytest.raises(ConvertError, match="bits is 7"):
        make_recipe("uniform", **{option: 7})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("l.0.attn.q_proj", "l.0.attn.v_proj"),
        ("l.0.mlp.gate_proj", "l.0.mlp.up_proj"),
        ("l.0.linear_attn.in_proj_qkv", "l.0.linear_attn.in_proj_z"),
        ("l.0.linear_attn.in_proj_b", "l.0.linear_attn.in_proj_a"),
        ("l.0.mlp.experts.0.w1", "l.0.mlp.experts.0.w3"),
        ("l.0.mlp.experts.0.gate_proj", "l.0.mlp.experts.1.up_proj"),  # all experts of a layer are one stack
        ("l.0.mlp.experts.0.down_proj", "l.0.mlp.experts.31.down_proj"),
    ],
)
def test_fused_layers_must_agree(first: str, second: str):
    check_fused([(first, 4), (second, 4)])
    check_fused([(first, None), (second, None)])
    with pytest.raises(ConvertError, match=f"the recipe gives {first} 4 bits and {second} 5 bits, but engines fuse"):
        check_fused([(first, 4), (second, 5)])
    with pytest.raises(ConvertError, match="no quantization"):
        check_fused([(first, None), (second, 5)])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("l.0.attn.q_proj", "l.1.attn.k_proj"),
        ("l.0.attn.q_proj", "l.0.attn.o_proj"),
        ("l.0.linear_attn.in_proj_qkv", "l.0.linear_attn.in_proj_a"),
        ("l.0.mlp.experts.0.down_proj", "l.0.mlp.experts.0.up_proj"),
        ("l.0.mlp.experts.0.down_proj", "l.1.mlp.experts.0.down_proj"),
    ],
)
def test_other_layers_are_free(first: str, second: str):
    check_fused([(first, 4), (second, 5)])
