"""How stock mlx-lm finds this package without a flag.

mlx-lm has no registry of plugins: it imports `mlx_lm.models.<model_type>`. Our directories have the model_type "hlwq".
The wheel installs startup.pth as `hlwq_mlx.pth`; Python's `site` runs its one line at start, which appends a finder to
`sys.meta_path` and imports nothing. Only when somebody imports `mlx_lm.models.hlwq`, and mlx-lm has no module of that
name, does the finder come here. docs/measurements.md has the comparison with the alternative and what it costs.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

MODULE = "mlx_lm.models.hlwq"


def spec() -> ModuleSpec | None:
    """The module that mlx-lm asks for: hlwq_mlx/model.py under mlx-lm's name."""
    return spec_from_file_location(MODULE, Path(__file__).with_name("model.py"))
