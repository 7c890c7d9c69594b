"""Tiny checkpoints and their conversions, made once a session and shared by the tests of every backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import hlwq_cuda
from convert.__main__ import main as convert
from convert.checkpoint import Checkpoint
from tests.tiny_models import VOCABULARY, tiny_model


def source(family: str, root: Path, dtype: str = "float32") -> Path:
    """The unquantized checkpoint of a family under `root`, written at most once."""
    directory = root / f"{family}-{dtype}"
    return directory if directory.exists() else tiny_model(family, directory, dtype)


def converted(family: str, root: Path, *flags: str, dtype: str = "float32") -> Path:
    """The source converted with `--target cuda` and the flags of `python -m convert`, at most once."""
    directory = root / "-".join([family, dtype, "cuda", *(flag.strip("-") for flag in flags)])
    if not directory.exists():
        arguments = ["--target", "cuda", "--model", str(source(family, root, dtype)), "--output", str(directory)]
        assert convert([*arguments, *flags]) == 0
    return directory


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    """int64 [1, length]."""
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def decoded(directory: Path, output: Path) -> Path:
    """The unquantized checkpoint that the codes in `directory` stand for: float32, decoded by numpy."""
    checkpoint = Checkpoint.open(directory)
    modules = checkpoint.quantization.modules
    tensors = {}
    for module in modules:
        is_stack = len(checkpoint.tensors[f"{module}.weight_codes"].shape) == 3
        name = module if is_stack else f"{module}.weight"
        tensors[name] = torch.from_numpy(checkpoint.weight(module, dtype=np.float32).copy())
    for name, info in checkpoint.tensors.items():
        if not name.endswith((".weight_codes", ".weight_norms")) and info.size:
            tensors[name] = torch.from_numpy(checkpoint.tensor(name).astype(np.float32))
    output.mkdir()
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    config = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    (output / "config.json").write_text(json.dumps(config))
    return output


def compare_greedy(
    directory: Path,
    device: str,
    mode: str,
    bound: float,
    new: int = 24,
    prompts: Sequence[torch.Tensor] | None = None,  # int64 [1, L] each; five of random tokens
    least: int = 16,
) -> hlwq_cuda.LanguageModel:
    """Greedy tokens equal those of the dequantized model up to where its two best are closer than the error allows.

    That is `bound` times the root mean square of the logits. At least `least` tokens must be compared, or all.
    """
    model = hlwq_cuda.load(directory, device=device, mode=mode, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).dequantize()
    compared = complete = 0
    prompts = [random_ids(9, seed) for seed in range(5)] if prompts is None else prompts
    for ids in prompts:
        expected = dense.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answer = expected.sequences[0, ids.shape[1] :].tolist()
        found = list(model.generate_tokens(ids[0].tolist(), new))
        clear = 0
        for logits in expected.logits:
            best = logits[0].topk(2).values
            if best[0] - best[1] < bound * logits.norm() / logits.numel() ** 0.5:
                break
            clear += 1
        # transformers' answer ends with the end of the text, ours without it
        assert found[:clear] == answer[: min(clear, max(len(found), len(answer) - 1))]
        compared, complete = compared + clear, complete + (clear == len(answer))
    assert compared >= least or complete == len(prompts), f"the margins are too small after {compared} tokens"
    return model
