"""format.py: arithmetic of shapes, the config schema, and one test for every refusal."""

from __future__ import annotations

import copy
import json

import pytest

from convert.codebook import codebook
from convert.format import (
    BLOCK_SIZES,
    SUPPORTED_BITS,
    FormatError,
    ModuleSpec,
    QuantizationConfig,
    codes_name,
    default_block_size,
    norms_name,
)

CONFIG = QuantizationConfig(
    bits=4,
    block_size=128,
    codebooks={4: codebook(4), 3: codebook(3)},
    modules={"model.layers.0.q_proj": ModuleSpec(4, 128, 4096), "model.layers.0.up_proj": ModuleSpec(3, 64, 192)},
    base_model_type="llama",
)


def document() -> dict:
    return json.loads(json.dumps({"quantization_config": CONFIG.to_dict()}))


def test_config_survives_json():
    assert QuantizationConfig.parse(document(), "config.json") == CONFIG


def test_names():
    assert (codes_name("a.b"), norms_name("a.b")) == ("a.b.weight_codes", "a.b.weight_norms")


@pytest.mark.parametrize(("in_features", "block"), [(4096, 128), (576, 64), (96, 32), (200, 128), (31, 128), (64, 64)])
def test_default_block_size(in_features: int, block: int):
    assert default_block_size(in_features) == block


def test_sizes_of_a_padded_row():
    spec = ModuleSpec(bits=3, block_size=128, in_features=200)
    assert (spec.blocks, spec.padded_in_features, spec.words, spec.bytes_per_row) == (2, 256, 24, 100)
    assert spec.bits_per_weight == 4.0


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_a_block_is_whole_words(bits: int, block: int):
    assert ModuleSpec(bits, block, block).words * 32 == bits * block
    assert ModuleSpec(bits, block, 5 * block).words == 5 * ModuleSpec(bits, block, block).words


@pytest.mark.parametrize(
    "fields", [(7, 128, 64), (4.0, 128, 64), (4, 48, 64), (4, 128, 0), (4, 128, 2.5), (4, 128, True), ("4", 128, 64)]
)
def test_a_spec_outside_the_format_is_refused(fields: tuple):
    with pytest.raises(FormatError):
        ModuleSpec(*fields)


REFUSALS = {
    "no quantization_config": lambda quant, config: config.pop("quantization_config"),
    "quant_method is 'gptq'": lambda quant, _: quant.update(quant_method="gptq"),
    "format_version is 2": lambda quant, _: quant.update(format_version=2),
    "format_version is None": lambda quant, _: quant.pop("format_version"),
    "format_version is True": lambda quant, _: quant.update(format_version=True),
    "quantization_config.modules is missing": lambda quant, _: quant.pop("modules"),
    "quantization_config.codebooks is missing": lambda quant, _: quant.update(codebooks=[]),
    "module m needs bits": lambda quant, _: quant["modules"].update(m={"bits": 4}),
    "module m needs bits, block_size": lambda quant, _: quant["modules"].update(m=None),
    "module m: bits is 7": lambda quant, _: quant["modules"].update(m={"bits": 7, "block_size": 128, "in_features": 1}),
    "lacks the table for 4 bits": lambda quant, _: quant["codebooks"].pop("4"),
    "codebook '4' must be": lambda quant, _: quant["codebooks"]["4"].pop(),
    "codebook '3' must be": lambda quant, _: quant["codebooks"]["3"].reverse(),
    "codebook '2' must be": lambda quant, _: quant["codebooks"].update({"2": [0.0, float("nan"), 1.0, 2.0]}),
    "codebook '999999999999'": lambda quant, _: quant["codebooks"].update({"999999999999": []}),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_config_outside_the_format_is_refused(message: str):
    config = copy.deepcopy(document())
    REFUSALS[message](config["quantization_config"], config)
    with pytest.raises(FormatError, match=message) as caught:
        QuantizationConfig.parse(config, "dir/config.json")
    assert str(caught.value).startswith("dir/config.json: ") and "\n" not in str(caught.value)
