"""Second moments of what a matrix reads, and of what it should give for it (torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert import feedback

if TYPE_CHECKING:
    import torch

    from convert.layer_walk import LayerRun


@dataclass
class Moments:
    """Sums over tokens of the inputs X' that one or several matrices share, each token with its weight.

    Of the outputs Y that are wanted, either those of the unquantized model from its own inputs, W X, or those that
    also bring the stream of hidden states back to the unquantized one: W X' + R.
    """

    tokens: int = 0
    mass: float = 0.0  # sum of the weights
    quantized: torch.Tensor | float = 0.0  # X' X'^T [K, K]
    cross: torch.Tensor | float = 0.0  # X X'^T [K, K]
    drift: torch.Tensor | None = None  # R X'^T [N, K]

    def add(
        self,
        inputs: torch.Tensor,
        exact: torch.Tensor | None = None,
        *,
        drift: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Inputs X' of the quantized model, float32 [tokens, K]; X of the unquantized one, or R, if tokens agree."""
        weighted = inputs if weights is None else inputs * weights[:, None]
        self.tokens += len(inputs)
        self.mass += len(inputs) if weights is None else float(weights.sum())
        own = inputs.T @ weighted
        self.quantized = self.quantized + own
        if drift is None:
            self.cross = self.cross + (own if exact is None else exact.T @ weighted)
        else:
            self.drift = drift.T @ weighted + (0.0 if self.drift is None else self.drift)

    def with_identity(self, share: float) -> Moments:
        """The same and as many inputs that are unrelated and alike, `share` times as large."""
        import torch

        assert isinstance(self.quantized, torch.Tensor) and isinstance(self.cross, torch.Tensor)
        level = share * torch.diagonal(self.quantized).mean() * torch.eye(len(self.cross), device=self.cross.device)
        return Moments(self.tokens, self.mass, self.quantized + level, self.cross + level)

    def rotated(self, weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """X' X'^T [Kp, Kp] and Y X'^T [N, Kp] per token in the rotated basis, for a rotated weight [N, Kp]."""
        import torch

        mass = self.mass or 1.0
        hessian = feedback.rotate_both(torch.as_tensor(self.quantized) / mass, block_size)
        if self.drift is not None:
            return hessian, weight @ hessian + feedback.rotate_rows(self.drift / mass, block_size)
        return hessian, weight @ feedback.rotate_both(torch.as_tensor(self.cross) / mass, block_size)


def gather(
    run: LayerRun,
    names: Sequence[str],
    later: Sequence[str],
    states: Sequence[tuple[torch.Tensor, torch.Tensor]],
    held_out: Sequence[bool],
    weights: Sequence[torch.Tensor] | None,
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Moments for fitting and for judging, of the inputs of every name that some token reaches.

    later: matrices of the layer that are used after these. states: hidden states in front of the layer of the
    quantized and of the unquantized model, a pair for every batch; the same tensor twice says that nothing before the
    matrix is quantized. weights: of the tokens [windows, length], for every batch; None where all count alike, as for
    experts.
    """
    fit: dict[str, Moments] = {}
    judge: dict[str, Moments] = {}
    # experts see other tokens when the router decides otherwise: no common tokens
    differ = len(names) == 1 and states[0][0] is not states[0][1]
    writes = differ and run.writes(names[0], later, states[0][0])
    for index, ((state, exact_state), judging) in enumerate(zip(states, held_out, strict=True)):
        seen = run.inputs(state, names)
        seen_exact = run.inputs(exact_state, names, exact=True) if differ and not writes else {}
        drift = None
        if writes:
            drift = run.run(exact_state, exact=True, silent=later) - run.run(state, silent=later)
            drift = drift.reshape(-1, drift.shape[-1])
        token_weights = None if weights is None else weights[index].flatten().to(state.device)
        for name, inputs in seen.items():
            moments = (judge if judging else fit).setdefault(name, Moments())
            moments.add(inputs, seen_exact.get(name), drift=drift, weights=token_weights)
    return fit, judge
