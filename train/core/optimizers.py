"""The optimizers of a run and their learning rate.

`torch.optim.Muon` makes the same update as `Muon`, but always iterates in bfloat16. On a CPU without bfloat16
instructions, that takes twice the time of float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from train.config import Run
from train.core import amx
from train.core.model import GPT
from train.core.ranks import Ranks

ADAMW_BETAS = (0.9, 0.98)
MUON_MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0: few steps bring singular values to within 0.3 of 1
NEWTON_SCHULZ_STEPS = 5
FINAL_LR = 0.02  # share of the peak learning rate at the last step


def make_optimizers(model: GPT, run: Run, with_tiles: bool = False) -> list[Optimizer]:
    """Return Muon for the blocks' matrices, and AdamW without decay for the embedding and the norms.

    with_tiles: Muon uses AMX.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        Muon(matrices, run.muon_lr, MUON_MOMENTUM, run.weight_decay, run.bfloat16, with_tiles),
        torch.optim.AdamW(others, lr=run.adamw_lr, betas=ADAMW_BETAS, weight_decay=0.0),
    ]


def lr_factor(step: int, steps: int, run: Run) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, constant, linear decay to FINAL_LR."""
    warmup = min(1.0, (step + 1) / (run.warmup_steps + 1))
    decay_from = run.constant_share * steps
    left = min(1.0, max(0.0, (steps - step) / max(1.0, steps - decay_from)))
    return warmup * (FINAL_LR + (1 - FINAL_LR) * left)


class Muon(Optimizer):
    """Orthogonalized Nesterov momentum for matrices (Jordan et al. 2024), with decoupled weight decay.

    A step has the size lr * sqrt(max(1, rows / columns)), so that one rate suits all shapes. Matrices of one shape are
    computed in one batch. In a process group, all ranks must have the same gradients. Each rank orthogonalizes
    a part of the matrices and sends it to the others.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        bfloat16: bool = False,
        with_tiles: bool = False,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._bfloat16, self._with_tiles = bfloat16, with_tiles

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is no closure to call
        ranks = Ranks.current()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            updates = []
            moved = [matrix for matrix in group["params"] if matrix.grad is not None]
            for owner, share in _shares(moved, ranks.world):
                gradients = [grad for matrix in share if (grad := matrix.grad) is not None]
                averages = [self._average(matrix) for matrix in share]
                torch._foreach_lerp_(averages, gradients, 1 - momentum)
                if ranks.rank == owner:
                    nesterov = torch.stack(torch._foreach_lerp(gradients, averages, momentum))
                    bfloat16 = self._bfloat16 or nesterov.is_cuda
                    update = orthogonalize(nesterov, bfloat16, self._with_tiles).contiguous()
                else:
                    update = share[0].new_empty((len(share), *share[0].shape))
                # The ranks send this update while the next one is computed.
                sent = dist.broadcast(update, owner, async_op=True) if ranks.world > 1 else None
                updates.append((share, update, sent))
            for share, update, sent in updates:
                if sent is not None:
                    sent.wait()
                rows, columns = share[0].shape
                torch._foreach_mul_(share, 1 - lr * group["weight_decay"])
                torch._foreach_add_(share, update.unbind(), alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _average(self, matrix: Tensor) -> Tensor:
        """Return the running average of a matrix's gradients."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def _shares(matrices: Sequence[Tensor], world: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (rank, matrices of one shape that this rank orthogonalizes)."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for alike in by_shape.values():
        for owner in range(min(world, len(alike))):
            yield owner, alike[owner::world]


def orthogonalize(matrices: Tensor, bfloat16: bool = False, with_tiles: bool = False) -> Tensor:
    """Return matrices (B, M, N) with the same singular vectors and singular values near 1 (Newton-Schulz iteration).

    with_tiles: use AMX where the sizes fit.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if with_tiles and bfloat16 and all(size % amx.MULTIPLE == 0 for size in x.shape[1:]):
        x = x.bfloat16().contiguous()
        amx.newton_schulz(x, COEFFICIENTS, NEWTON_SCHULZ_STEPS)
    elif x.shape[-1] >= 2 * x.shape[-2] and not bfloat16:
        x = _iterate_gram(x @ x.mT) @ x
    else:
        x = _iterate(x.bfloat16() if bfloat16 else x)
    return (x.mT if tall else x).to(matrices.dtype)


def _iterate(x: Tensor) -> Tensor:
    for _ in range(NEWTON_SCHULZ_STEPS):
        x = torch.baddbmm(x, _polynomial(x @ x.mT), x, beta=COEFFICIENTS[0])
    return x


def _iterate_gram(gram: Tensor) -> Tensor:
    """Return the product, (B, M, M), of all factors of x in `_iterate`. gram: x @ x.mT.

    It needs only matrices of (M, M): for x of (M, 4 M), 0.6 of the time. Bfloat16 is too coarse for it.
    """
    factor = product = _plus_identity(_polynomial(gram))
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        gram = factor @ gram @ factor
        factor = _plus_identity(_polynomial(gram))
        product = factor @ product
    return product


def _polynomial(gram: Tensor) -> Tensor:
    _, b, c = COEFFICIENTS
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


def _plus_identity(matrices: Tensor) -> Tensor:
    """Add COEFFICIENTS[0] times the identity, in place."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(COEFFICIENTS[0])
    return matrices
