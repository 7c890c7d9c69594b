"""For programs that load models by `trust_remote_code=True` and leave no place for `import hlwq_cuda`."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hlwq_cuda.checkpoint import FormatError, open_checkpoint

MODULE = "modeling_hlwq"
_SOURCE = '''\
"""Lets transformers read this HLWQ directory with trust_remote_code=True; needs the package hlwq-mlx."""

try:
    import hlwq_cuda  # noqa: F401  (registers the quantization method)
except ImportError:
    raise ImportError("this model is quantized with HLWQ: pip install 'hlwq-mlx[cuda]'") from None

import transformers


class {name}(transformers.{name}):
    """transformers' own class, under its own name."""
'''


def add_remote_code(directory: Path | str) -> Path:
    """Add to an HLWQ directory what makes `from_pretrained(directory, trust_remote_code=True)` work; returns the file.

    It writes modeling_hlwq.py and the key `auto_map` of config.json, and leaves `architectures`, which vLLM reads.
    Raises FormatError for a directory that `open_checkpoint` refuses, one that has remote code already, and one whose
    architecture transformers does not have.
    """
    directory = Path(directory)
    config = dict(open_checkpoint(directory).config)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"))
    if "auto_map" in config:
        raise FormatError(f"{directory}: config.json has remote code of its own; import hlwq_cuda instead")
    if name is None:
        raise FormatError(f"{directory}: transformers has no causal language model {config.get('model_type')!r}")
    path = directory / f"{MODULE}.py"
    path.write_text(_SOURCE.format(name=name), encoding="utf-8")
    config["auto_map"] = {"AutoModelForCausalLM": f"{MODULE}.{name}"}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path
