"""Codes that minimize the error of a layer's output instead of the error of its weights (torch).

For a weight W [N, K] that multiplies inputs with second moment H = mean(x x^T), the output error of a quantized Q is
tr((Q - W) H (Q - W)^T). Three steps lower it, all in the rotated basis, where the format rounds:

1. Error feedback (GPTQ, Frantar et al., arXiv 2210.17323; the same as LDLQ, Chee et al., arXiv 2307.13304): columns
   are rounded one after the other, each rounding error is pushed to the columns that are still free. The norms are
   fixed beforehand, so any order is legal; columns of large input come first ("act-order").
2. Norms: for every row, block after block, the norm of least output error under the present codes.
3. Coordinate descent: every code in turn moves to its best value with all others held.

Steps 2 and 3 repeat; neither can raise the error under H (float16 rounding of the norms aside).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from convert.codebook import codebook
from convert.format import ModuleSpec
from convert.reference import Encoded, hadamard

if TYPE_CHECKING:
    import torch

DAMPING = 0.01  # of the mean diagonal of H, the customary value (arXiv 2210.17323)
MAX_DAMPING = 1.0
COMPENSATION = (
    0.5  # the whole way overfits the calibration text: KL .0874 and .0965 on two texts, half way .0789, .0827
)
COLUMNS = 128  # columns between two updates of the whole matrix


class SingularHessianError(ValueError):
    """The second moment of the inputs has no usable Cholesky factor at any damping."""


@dataclass
class Rounding:
    """A matrix while it is being rounded, in the rotated basis."""

    codes: torch.Tensor  # int64 [N, Kp]
    norms: torch.Tensor  # float32 [N, Kp / B], values that float16 holds
    spec: ModuleSpec

    @property
    def table(self) -> torch.Tensor:
        """Centroids over sqrt(B), float32 [2**b]: a value is its norm times its entry."""
        return _table(self.spec.bits, self.spec.block_size, self.norms.device)

    @property
    def scales(self) -> torch.Tensor:
        """The norm of every element, float32 [N, Kp]."""
        return self.norms.repeat_interleave(self.spec.block_size, dim=1)

    def values(self) -> torch.Tensor:
        """The decoded weight in the rotated basis, float32 [N, Kp]."""
        return self.table[self.codes] * self.scales

    def weight(self) -> torch.Tensor:
        """The decoded weight, float32 [N, K]."""
        return rotate_rows(self.values(), self.spec.block_size)[:, : self.spec.in_features]


def rounding(encoded: Encoded, spec: ModuleSpec, device: torch.device) -> Rounding:
    """What the codes and norms of a matrix stand for."""
    import torch

    codes, norms = (torch.from_numpy(each).to(device) for each in encoded)
    return Rounding(codes.long(), norms.float(), spec)


def rotate_rows(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Steps 1 and 2 of the format: every block of a row times H_B, [N, K] -> [N, Kp]."""
    import torch

    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block_size))
    matrix = _rotation(block_size, weight.dtype, weight.device)
    return (padded.reshape(-1, block_size) @ matrix).reshape(len(weight), -1)


# Kept on the device: a copy from the host would wait for all work in flight, once a matrix.
@lru_cache(maxsize=32)
def _table(bits: int, block_size: int, device: torch.device) -> torch.Tensor:
    import torch

    return (torch.tensor(codebook(bits), dtype=torch.float64) / block_size**0.5).float().to(device)


@lru_cache(maxsize=32)
def _rotation(block_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    import torch

    return torch.from_numpy(hadamard(block_size).copy()).to(dtype).to(device)


def rotate_both(moment: torch.Tensor, block_size: int) -> torch.Tensor:
    """A second moment [K, K] of inputs -> [Kp, Kp] of rotated inputs."""
    return rotate_rows(rotate_rows(moment, block_size).T, block_size).T


def row_errors(values: torch.Tensor, hessian: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared output error |Y - Q X'|^2 of every row, less the part |Y|^2 that Q has no share in: [N].

    hessian: X' X'^T; wanted: Y X'^T, of the outputs that Q should give.
    """
    return ((values @ hessian - 2 * wanted) * values).sum(dim=1)


def compensated(weight: torch.Tensor, hessian: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """An unrounded weight that turns the quantized model's inputs X' into outputs closer to Y than W X' is: [N, Kp].

    hessian: X' X'^T; wanted: Y X'^T. W + COMPENSATION (Y - W X') X'^T (X' X'^T + damping)^-1.
    """
    import torch

    return weight + COMPENSATION * torch.linalg.solve(damped(hessian), (wanted - weight @ hessian).T).T


def round_with_feedback(
    weight: torch.Tensor, hessian: torch.Tensor, norms: torch.Tensor, spec: ModuleSpec, rounds: int
) -> Rounding:
    """Codes and norms of low output error.

    weight: float32 [N, Kp], rotated; hessian: float32 [Kp, Kp], of rotated inputs; norms: [N, Kp / B] to start from.
    Raises SingularHessianError when no damping up to the mean of H's diagonal makes H invertible.
    """
    import torch

    hessian = damped(hessian)
    order = torch.argsort(torch.diagonal(hessian), descending=True)
    state = Rounding(torch.zeros_like(weight, dtype=torch.int64), norms.half().float(), spec)
    _feed_errors_back(state, weight, feedback_factor(hessian[order][:, order]), order)
    for _ in range(rounds):
        _refit_norms(state, weight, hessian)
        _descend(state, weight, hessian, order)
    return state


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """H with its diagonal raised, a hundredth of its mean and more until Cholesky's factorization succeeds."""
    import torch

    mean = torch.diagonal(hessian).mean()
    share = DAMPING
    while mean > 0 and torch.isfinite(mean) and share <= MAX_DAMPING:
        raised = hessian + share * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        if not torch.linalg.cholesky_ex(raised)[1]:
            return raised
        share *= 10
    raise SingularHessianError("its inputs have no invertible second moment")


def feedback_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse, H^-1 = U^T U; row j tells where the error of column j goes."""
    import torch

    lower = torch.linalg.cholesky(hessian.double())
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).to(hessian.dtype)


def _nearest(values: torch.Tensor, scales: torch.Tensor, midpoints: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest centroids, a tie to the lower: any shape -> int64."""
    import torch

    return torch.bucketize(values / torch.where(scales > 0, scales, torch.ones_like(scales)), midpoints)


def _feed_errors_back(state: Rounding, weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor) -> None:
    import torch

    table, scales = state.table, state.scales[:, order]
    free = weight[:, order].clone()
    codes = torch.empty_like(state.codes)
    errors = torch.empty_like(free)
    for start in range(0, free.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        _run(_feed_block, free[:, part], factor[part, part], scales[:, part], table, codes[:, part], errors[:, part])
        free[:, start + COLUMNS :] -= errors[:, part] @ factor[part, start + COLUMNS :]
    state.codes[:, order] = codes


def _feed_block(
    free: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Error feedback inside a few columns; writes codes and the scaled errors that later columns need."""
    midpoints = (table[1:] + table[:-1]) / 2
    for j in range(free.shape[1]):
        code = _nearest(free[:, j], scales[:, j], midpoints)
        codes[:, j] = code
        errors[:, j] = (free[:, j] - table[code] * scales[:, j]) / factor[j, j]
        free[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]


def _refit_norms(state: Rounding, weight: torch.Tensor, hessian: torch.Tensor) -> None:
    size = state.spec.block_size
    gradient = (state.values() - weight) @ hessian
    directions = state.table[state.codes]
    for block in range(state.spec.blocks):
        part = slice(block * size, (block + 1) * size)
        direction = directions[:, part]
        curvature = ((direction @ hessian[part, part]) * direction).sum(dim=1)
        old = state.norms[:, block]
        new = (old - (gradient[:, part] * direction).sum(dim=1) / curvature).clamp(0, 65504).half().float()
        state.norms[:, block] = new
        gradient += ((new - old)[:, None] * direction) @ hessian[part]


def _descend(state: Rounding, weight: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor) -> None:
    """One round of coordinate descent over all columns in `order`."""
    import torch

    table, scales = state.table, state.scales[:, order]
    hessian = hessian[order][:, order]
    codes = state.codes[:, order]
    values = table[codes] * scales
    gradient = (values - weight[:, order]) @ hessian
    steps = torch.empty_like(values)
    for start in range(0, values.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        columns = (gradient[:, part], hessian[part, part], scales[:, part])
        _run(_descend_block, *columns, table, codes[:, part], values[:, part], steps[:, part])
        gradient[:, start + COLUMNS :] += steps[:, part] @ hessian[part, start + COLUMNS :]
    state.codes[:, order] = codes


def _descend_block(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
    steps: torch.Tensor,
) -> None:
    """Coordinate descent inside a few columns; writes codes and how far every value moved."""
    midpoints = (table[1:] + table[:-1]) / 2
    for j in range(values.shape[1]):
        code = _nearest(values[:, j] - gradient[:, j] / hessian[j, j], scales[:, j], midpoints)
        codes[:, j] = code
        steps[:, j] = table[code] * scales[:, j] - values[:, j]
        gradient[:, j + 1 :] += steps[:, j, None] * hessian[j, j + 1 :]


def _run(function: Callable[..., None], *tensors: torch.Tensor) -> None:
    """Call an in-place function; on CUDA by replaying a graph, because a thousand tiny launches cost far more."""
    if not tensors[0].is_cuda:
        function(*tensors)
        return
    graph, buffers = _graph(function, tuple((tuple(t.shape), t.dtype) for t in tensors), tensors[0].device)
    for buffer, tensor in zip(buffers, tensors, strict=True):
        buffer.copy_(tensor)
    graph.replay()
    for buffer, tensor in zip(buffers, tensors, strict=True):
        tensor.copy_(buffer)


@lru_cache(maxsize=32)  # the shapes of one model: a few kinds of matrices
def _graph(function: Callable[..., None], shapes: tuple, device: torch.device) -> tuple:
    import torch

    buffers = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        function(*buffers)  # loads every kernel, which capture forbids
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*buffers)
    return graph, buffers
