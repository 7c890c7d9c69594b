"""What rounding activations (and centroids) to int8 costs: KL divergence of mode int8 from mode exact, same codes.

    python benchmarks/int8_activations.py DIRECTORY --text FILE [--source MODEL] [--windows 8]

DIRECTORY was made with --target cuda. On the CPU the int8 products are emulated with the same roundings. With --source,
the unquantized model's directory, both modes are compared with it too. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import hlwq_cuda
from convert.evaluate import compare, torch_model
from convert.text import read_text, token_windows


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    model = hlwq_cuda.load(arguments.directory)
    vocabulary = model.model.config.get_text_config().vocab_size
    text = read_text(arguments.text, "--text")
    windows = token_windows(model.tokenizer, text, arguments.length, vocabulary, str(arguments.text))
    windows = windows[: arguments.windows]

    def logits(mode: str):
        def run(window):
            hlwq_cuda.set_mode(model.model, mode)
            with torch.no_grad():
                ids = torch.from_numpy(window)[None].to(model.model.device)
                return model.model(ids, use_cache=False).logits[0].float().cpu()

        return run

    pairs = {"int8 from exact": (logits("exact"), logits("int8"))}
    if arguments.source is not None:
        source = torch_model(arguments.source, device="cpu")
        pairs |= {f"{mode} from source": (source, logits(mode)) for mode in ("exact", "int8")}
    result: dict = {
        "directory": arguments.directory.name,
        "device": str(model.model.device),
        "tokens": int(windows.size),
    }
    for name, (reference, tested) in pairs.items():
        found = compare(reference, tested, windows)
        print(f"{name}: KL {found.kl:.5f} +- {found.kl_error:.5f} nats, same first choice {found.top1:.4f}")
        result[name] = {"kl": found.kl, "kl_se": found.kl_error, "top1": found.top1, "ppl": found.perplexity}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
