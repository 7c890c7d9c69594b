"""Which bits each module gets, and the rule that layers which engines fuse must agree."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from convert.errors import ConvertError
from convert.format import SUPPORTED_BITS
from convert.target import Kind, OutputTensor

DEFAULT_BITS = 4

# The allocation of the published HLWQ models; a first match wins.
SEEDS: dict[str, int | None] = {
    "*.gate_proj": 3,
    "*.up_proj": 3,
    "*.gate_up_proj": 3,
    "*.down_proj": 4,
    "*.o_proj": 6,
    "*.out_proj": 6,
    "*lm_head": 6,
    "*embed_out": 6,
    "*": 5,
}

# Linears that read the same input and that engines join into one matrix: one tensor has one bit width.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),  # gate and up of Mixtral's experts
    ("in_proj_qkv", "in_proj_z"),  # Qwen3.5's linear attention
    ("in_proj_b", "in_proj_a"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek's latent attention
)
_EXPERT_INDEX = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Recipe:
    """Bits by module: `patterns` are shell patterns over module names, the first match wins; None keeps the dtype.

    `embed_bits` and `head_bits` stand above the patterns. A tied embedding serves as head too and takes the larger.
    """

    name: str
    patterns: Mapping[str, int | None]
    embed_bits: int | None = None
    head_bits: int | None = None

    def bits(self, tensor: OutputTensor, tied: bool) -> int | None:
        """Bits of a quantizable tensor, None to keep its dtype."""
        if tensor.kind is Kind.HEAD and self.head_bits is not None:
            return self.head_bits
        if tensor.kind is Kind.EMBEDDING:
            asked = [bits for bits in (self.embed_bits, self.head_bits if tied else None) if bits is not None]
            if asked:
                return max(asked)
        for pattern, bits in self.patterns.items():
            if fnmatchcase(tensor.module, pattern):
                return bits
        return DEFAULT_BITS


def make_recipe(
    name: str, bits: int = DEFAULT_BITS, embed_bits: int | None = None, head_bits: int | None = None
) -> Recipe:
    """`uniform`, `seeds`, or the path of a JSON or YAML file that maps patterns to bits (null keeps the dtype)."""
    for value in (bits, embed_bits, head_bits):
        if value is not None:
            _check_bits(value, "--bits, --embed-bits and --head-bits")
    if name == "uniform":
        return Recipe(name, {"*": bits}, embed_bits, head_bits)
    if name == "seeds":
        return Recipe(name, SEEDS, embed_bits, head_bits)
    patterns = read_patterns(Path(name))
    patterns.setdefault("*", bits)  # last, so it serves what nothing else matches
    return Recipe(name, patterns, embed_bits, head_bits)


def read_patterns(path: Path) -> dict[str, int | None]:
    """The ordered patterns of a recipe file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConvertError(f"--recipe {path}: not uniform, not seeds, not a readable file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConvertError(f"{path}: a recipe is a JSON or YAML file, and this is not text") from None
    patterns = _parse(path, text)
    if not isinstance(patterns, dict) or not patterns:
        raise ConvertError(f'{path}: a recipe maps patterns to bits, for example {{"*.down_proj": 5, "*": 4}}')
    for pattern, bits in patterns.items():
        if bits is not None:
            _check_bits(bits, f"{path}: pattern {pattern!r}")
    return {str(pattern): bits for pattern, bits in patterns.items()}


def check_fused(bits_by_module: Iterable[tuple[str, int | None]]) -> None:
    """Refuse bits that differ inside a group of layers which engines join into one matrix."""
    first: dict[tuple[str, int], tuple[str, int | None]] = {}
    for module, bits in bits_by_module:
        for group in _groups(module):
            other, other_bits = first.setdefault(group, (module, bits))
            if bits != other_bits:
                raise ConvertError(
                    f"the recipe gives {other} {_words(other_bits)} and {module} {_words(bits)}, but engines fuse "
                    "them into one matrix, which has one bit width; give both the same bits"
                )


def fused_key(module: str) -> str:
    """Equal for modules that must have the same bits, different for all others."""
    group = next(iter(_groups(module)), None)
    return module if group is None else f"{group[0]}{'+'.join(FUSED[group[1]]) if group[1] >= 0 else ''}"


def _groups(module: str) -> Iterable[tuple[str, int]]:
    parent, _, leaf = module.rpartition(".")
    shared, is_expert = _EXPERT_INDEX.subn(".experts.*.", f"{parent}.")
    for index, names in enumerate(FUSED):
        if leaf in names:
            yield shared, index
            return
    if is_expert:  # the same linear of all experts of a layer is one stack
        yield f"{shared}{leaf}", -1


def _parse(path: Path, text: str) -> object:
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConvertError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConvertError(f"{path}: not valid JSON ({error})") from None


def _check_bits(bits: object, where: str) -> None:
    if bits not in SUPPORTED_BITS or isinstance(bits, bool):
        raise ConvertError(f"{where}: bits is {bits!r}; the format has {', '.join(map(str, SUPPORTED_BITS))}")


def _words(bits: int | None) -> str:
    return "no quantization" if bits is None else f"{bits} bits"
