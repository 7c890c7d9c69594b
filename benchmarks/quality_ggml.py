"""llama.cpp's Q4_K_M and IQ4_XS with an importance matrix, for benchmarks/quality.py.

The encoder is ggml's own (`ggml_quantize_chunk` of a libggml-base, as in PyPI pywhispercpp 1.5.1), the decoder that of
PyPI gguf. Which matrix gets which type is llama.cpp's rule (`llama_tensor_get_type` in src/llama-quant.cpp), also where
a row is not a multiple of 256: Q4_K then becomes Q5_0, Q6_K becomes Q8_0, IQ4_XS becomes IQ4_NL. With `pad` such rows
get zeros up to the next multiple and keep their type; bits are counted without the zeros, as on a model that fits.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SUPER_BLOCK = 256
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
THREADS = 8


def q4_k_m(name: str, layer: int, layers: int) -> str:
    """The type of a matrix in Q4_K_M: more bits for half of the v and down projections."""
    more_bits = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return "Q6_K" if more_bits and name.endswith(("v_proj", "down_proj")) else "Q4_K"


def iq4_xs(name: str, layer: int, layers: int) -> str:
    """The type of a matrix in IQ4_XS with an importance matrix, for fewer than 4 query heads a key head."""
    return "IQ4_XS"


def ggml_library() -> Path:
    """libggml-base of an installed pywhispercpp, else the one that the environment variable GGML_BASE names."""
    found = importlib.util.find_spec("pywhispercpp")
    beside = Path(found.origin).parent.parent if found and found.origin else Path()
    libraries = (
        [os.environ["GGML_BASE"]] if "GGML_BASE" in os.environ else beside.glob("pywhispercpp.libs/libggml-base*")
    )
    path = next(map(Path, libraries), None)
    if path is None:
        sys.exit("no libggml-base: pip install pywhispercpp==1.5.1, or name one in GGML_BASE")
    return path


class Ggml:
    """Quantize and dequantize with ggml's types."""

    def __init__(self, library: Path) -> None:
        # what an auditwheel put beside the library has to be found first
        for each in sorted(library.parent.glob("libgomp*")):
            ctypes.CDLL(str(each), mode=ctypes.RTLD_GLOBAL)
        self._quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer = ctypes.c_void_p
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]

    def round_trip(self, weight: np.ndarray, kind: str, importance: np.ndarray, pad: bool) -> tuple[np.ndarray, float]:
        """float32 [N, K] -> decoded [N, K] and bits a weight. importance: float32 [K], mean squares of the inputs."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        columns = weight.shape[1]
        missing = -columns % SUPER_BLOCK
        if missing and pad:
            weight, importance = np.pad(weight, ((0, 0), (0, missing))), np.pad(importance, (0, missing))
        elif missing:
            kind = FALLBACK[kind]
        number = GGMLQuantizationType[kind]
        block, nbytes = GGML_QUANT_SIZES[number]
        weight, importance = (np.ascontiguousarray(each, np.float32) for each in (weight, importance))
        coded = np.empty((len(weight), weight.shape[1] // block * nbytes), np.uint8)
        written = self._quantize(
            int(number), weight.ctypes.data, coded.ctypes.data, 0, *weight.shape, importance.ctypes.data
        )
        assert written == coded.nbytes
        return dequantize(coded, number).reshape(weight.shape)[:, :columns], 8 * nbytes / block

    def model(
        self,
        weights: Mapping[str, np.ndarray],
        importance: Mapping[str, np.ndarray],
        kind_of: Callable[[str, int, int], str],
        pad: bool,
    ) -> dict[str, tuple[np.ndarray, float]]:
        """Every matrix "...layers.3...": decoded, and bits a weight."""
        layers = 1 + max(map(_layer, weights))

        def run(name: str) -> tuple[np.ndarray, float]:
            return self.round_trip(weights[name], kind_of(name, _layer(name), layers), importance[name], pad)

        with ThreadPoolExecutor(THREADS) as pool:
            return dict(zip(weights, pool.map(run, weights), strict=True))


def _layer(name: str) -> int:
    return int(name.partition("layers.")[2].partition(".")[0])
