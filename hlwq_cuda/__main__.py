"""`python -m hlwq_cuda generate --model DIR --prompt TEXT`, and `chat`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    import torch

    from hlwq_cuda.checkpoint import USER_ERRORS
    from hlwq_cuda.decode import SamplingError
    from hlwq_cuda.environment import DeviceError
    from hlwq_cuda.generate import PromptError, load

    try:
        model = load(arguments.model, arguments.mode, arguments.device)
        if model.model.device.type == "cpu" and arguments.device is None:
            print("no usable NVIDIA GPU: running on the CPU", file=sys.stderr)
        return arguments.run(model, arguments)
    except (*USER_ERRORS, DeviceError, PromptError, SamplingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:  # the model and its cache fitted: a long prompt needs more while it is read
        reason = str(error).split(". ")[0]
        print(f"error: {reason}; shorten the prompt, close what else uses the GPU, or use device cpu", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whatever reads our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains as it ends
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--model", required=True, help="an HLWQ directory made with --target cuda, or a Hub repository that is one")
    add(
        "--max-new-tokens",
        type=_positive,
        help="tokens of an answer at most (default 512, or what the context has left)",
    )
    add("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this probability")
    add("--seed", type=int, default=0, help="equal seeds give equal answers")
    add("--mode", choices=("exact", "int8"), help="arithmetic; the default is int8 at 2 to 5 bits on a GPU, else exact")
    add("--device", help="cuda, cuda:1, cpu; the default is the first usable GPU, else the CPU")
    parser = argparse.ArgumentParser(prog="python -m hlwq_cuda", description="Run an HLWQ model.")
    commands = parser.add_subparsers(required=True, metavar="command")
    generate = commands.add_parser("generate", parents=[shared], help="answer one prompt")
    generate.add_argument("--prompt", required=True, help="the question; goes through the model's chat template")
    generate.set_defaults(run=_generate)
    chat = commands.add_parser("chat", parents=[shared], help="talk in turns; an empty line ends it")
    chat.set_defaults(run=_chat)
    return parser


def _generate(model, arguments: argparse.Namespace) -> int:
    _answer(model, arguments.prompt, arguments)
    return 0


def _chat(model, arguments: argparse.Namespace) -> int:
    messages: list[dict] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return 0
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _answer(model, messages, arguments)})


def _answer(model, prompt, arguments: argparse.Namespace) -> str:
    """Print the answer as it comes, then what it took; returns it."""
    pieces = []
    sampling = (arguments.temperature, arguments.top_p, arguments.seed)
    for piece in model.stream(prompt, arguments.max_new_tokens, *sampling):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    print(f"{model.timing}; {model.description}", file=sys.stderr)
    return "".join(pieces)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
