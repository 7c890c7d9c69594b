"""sample.py: the greedy choice, the nucleus, and the distribution of draws, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from hlwq_cuda.kernels.sample import Sampler  # noqa: E402
from tests.triton_device import DEVICE, LAUNCH  # noqa: E402


def draws(logits: np.ndarray, temperature: float, top_p: float, count: int, seed: int = 1) -> np.ndarray:
    sampler = Sampler(len(logits), torch.device(DEVICE), LAUNCH)
    sampler.settings.copy_(torch.tensor([temperature, top_p]))
    sampler.seed.fill_(seed)
    values = torch.tensor(logits, device=DEVICE, dtype=torch.float32)
    token = torch.full((1,), -1, dtype=torch.int64, device=DEVICE)
    result = []
    for position in range(count):
        sampler.sample(values, torch.tensor([position], device=DEVICE), token)
        result.append(int(token))
    return np.array(result)


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The kept tokens and their probabilities: the fewest, most likely first, that reach top_p."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weights, kind="stable")
    total = np.cumsum(weights[order]) / weights.sum()
    kept = order[: int(np.searchsorted(total, top_p)) + 1]
    return kept, weights[kept] / weights[kept].sum()


@pytest.mark.parametrize("size", [1, 1000, 1024, 2500])
def test_greedy_takes_the_first_largest(size: int) -> None:
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32)
    logits[[size // 3, size - 1]] = 9.0
    token = torch.full((1,), -1, dtype=torch.int64, device=DEVICE)
    Sampler(size, torch.device(DEVICE), LAUNCH).greedy(torch.tensor(logits, device=DEVICE), token)
    assert int(token) == size // 3


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.7, 0.8), (2.0, 0.5)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = np.array([0.0, 1.0, -2.0, 1.7, 0.4, -9.0, 0.9])
    kept, probabilities = nucleus(logits, temperature, top_p)
    count = 120
    tokens = draws(logits, temperature, top_p, count)
    assert set(tokens) <= set(kept)
    observed = np.array([(tokens == token).sum() for token in kept])
    expected = probabilities * count
    likely = expected >= 5
    chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < 22  # 7 tokens, 6 degrees of freedom: exceeded by chance once in 800 seeds


def test_nucleus_over_several_tiles() -> None:
    logits = np.random.default_rng(3).normal(size=3000).astype(np.float32) * 2
    kept, _ = nucleus(logits, 1.0, 0.6)
    tokens = draws(logits, 1.0, 0.6, 15)
    assert set(tokens) <= set(kept) and len(set(tokens)) > 1


def test_tiny_top_p_is_greedy_and_seeds_repeat() -> None:
    logits = np.random.default_rng(4).normal(size=1500).astype(np.float32)
    assert set(draws(logits, 1.0, 1e-6, 2)) == {int(logits.argmax())}
    assert (draws(logits, 1.0, 1.0, 4) == draws(logits, 1.0, 1.0, 4)).all()
    assert (draws(logits, 1.0, 1.0, 4) != draws(logits, 1.0, 1.0, 4, seed=2)).any()
