"""attention.py against float64: head dims, grouped queries, norms of q and k, every cache length around a split's edge.

The cache beyond the new token is NaN: reading it, or leaving a partial result unwritten, shows in every output.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from convert import reference  # noqa: E402
from hlwq_cuda.kernels import attention  # noqa: E402
from tests.triton_device import DEVICE, LAUNCH, poisoned_activation  # noqa: E402

LENGTH, SPLITS, EPS = 80, 4, 1e-6


def rms_norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * gain


def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    low, high = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-high, low], -1) * sin


def expected_attention(
    qkv: np.ndarray,  # [(heads + 2 kv_heads) * D]
    gains: tuple[np.ndarray, np.ndarray] | None,
    cos: np.ndarray,  # [T, D]
    sin: np.ndarray,
    keys: np.ndarray,  # [kv_heads, T, D]
    values: np.ndarray,
    position: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The output [heads * D], and the new key and value [kv_heads, D], in float64."""
    kv_heads, _, head_dim = keys.shape
    rows = qkv.astype(np.float64).reshape(-1, head_dim)
    q, k, v = np.split(rows, [len(rows) - 2 * kv_heads, len(rows) - kv_heads])
    if gains is not None:
        q, k = rms_norm(q, gains[0]), rms_norm(k, gains[1])
    q, k = rotary(q, cos[position], sin[position]), rotary(k, cos[position], sin[position])
    all_keys = np.concatenate([keys[:, :position].astype(np.float64), k[:, None]], 1)
    all_values = np.concatenate([values[:, :position].astype(np.float64), v[:, None]], 1)
    scores = np.einsum("kgd,ktd->kgt", q.reshape(kv_heads, -1, head_dim), all_keys) / math.sqrt(head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("kgt,ktd->kgd", weights, all_values).ravel(), k, v


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,block,format",
    [
        (9, 3, 64, 64, "exact"),  # SmolLM2
        (8, 2, 64, 128, "int8"),  # a block spans two heads
        (7, 1, 128, 128, "int8"),  # Qwen2.5's odd groups
        (4, 4, 96, 128, "exact"),  # a head is no whole block
        (2, 1, 256, 128, "plain"),
        (17, 1, 32, 32, "exact"),  # more queries than one tile of 16 rows; 544 = 17 blocks
        (3, 1, 24, 128, "exact"),  # 72 columns in a padded block
    ],
)
@pytest.mark.parametrize("position", [0, 1, 37])
def test_attention_matches_reference(
    heads: int, kv_heads: int, head_dim: int, block: int, format: str, qk_norm: bool, position: int
) -> None:
    rng = np.random.default_rng(head_dim + position)
    qkv = rng.normal(size=(heads + 2 * kv_heads) * head_dim).astype(np.float32)
    gains = tuple(rng.uniform(0.5, 1.5, (2, head_dim)).astype(np.float16)) if qk_norm else None
    angle = np.arange(LENGTH)[:, None] * 100.0 ** (-np.arange(head_dim // 2) / head_dim)
    cos, sin = (np.tile(f(angle), 2).astype(np.float32) for f in (np.cos, np.sin))
    cache = rng.normal(size=(2, kv_heads, LENGTH, head_dim)).astype(np.float16)
    cache[:, :, position:] = np.nan
    keys, values = torch.tensor(cache, device=DEVICE)

    out = poisoned_activation(heads * head_dim, block, format)
    partials = attention.Partials.empty(heads, SPLITS, head_dim, torch.device(DEVICE))
    for part in (partials.out, partials.maximum, partials.total):
        part.fill_(float("nan"))
    attention.attention(
        torch.tensor(qkv, device=DEVICE),
        None if gains is None else tuple(torch.tensor(gain, device=DEVICE) for gain in gains),
        (torch.tensor(cos, device=DEVICE), torch.tensor(sin, device=DEVICE)),
        keys,
        values,
        torch.tensor([position], device=DEVICE),
        partials,
        EPS,
        head_dim**-0.5,
        LAUNCH,
    )
    attention.combine(partials, out, block, format, LAUNCH)

    expected, new_key, new_value = expected_attention(qkv, gains, cos, sin, *cache, position)
    got_key, got_value = (cached[:, position].double().cpu().numpy() for cached in (keys, values))
    np.testing.assert_allclose(got_key, new_key, rtol=2**-10, atol=2e-6)  # one rounding to fp16
    np.testing.assert_allclose(got_value, new_value, rtol=2**-10, atol=1e-7)
    assert torch.isnan(keys[:, position + 1 :]).all() and torch.isnan(values[:, position + 1 :]).all()

    got = out.values.double().cpu().numpy()
    # q, keys and weights are rounded to fp16 for the tensor cores: 2**-11 of the largest score, then of the values
    tolerance = 2**-9 * np.abs(cache[:, :, :position].astype(np.float64)).max(initial=np.abs(new_value).max())
    if format != "plain":
        expected = reference.rotate(expected, block)
        scale = out.scales.double().cpu().numpy().repeat(block) * np.sqrt(block)
        got, tolerance = got * scale, tolerance + (scale / 2 if format == "int8" else 0)
    assert (np.abs(got - expected) <= tolerance).all(), np.abs(got - expected).max() / np.max(tolerance)


def test_split_count_fills_the_gpu_where_the_cache_is_long() -> None:
    assert attention.split_count(8, 648, 132) == 8
    assert attention.split_count(8, 4096, 132) == 16
    assert attention.split_count(32, 4096, 132) == 4
    assert attention.split_count(1, 32768, 170) == 64
    assert attention.split_count(200, 4096, 80) == 1
    assert attention.split_count(8, 20, 132) == 1
