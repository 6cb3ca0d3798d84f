"""Muon: momentum, orthogonalized, for the matrices of the transformer's blocks (Jordan et al. 2024).

The same update as `torch.optim.Muon`, whose Newton-Schulz iteration always runs in bfloat16: that takes twice the time
of float32 on a CPU that has no instructions for it, and two thirds on one that has.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0: singular values come near 1 in few steps, and stay within 0.3
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrix: Tensor, bfloat16: bool = False) -> Tensor:
    """(M, N) -> (M, N) with the same singular vectors and singular values near 1, by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x.bfloat16() if bfloat16 else x) / (matrix.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """For matrices alone; weight decay is decoupled (Loshchilov & Hutter 2019), the momentum Nesterov's.

    A step has the size lr * sqrt(max(1, rows / columns)), so that one rate suits all shapes. In a process group, whose
    ranks must have the same gradients, each orthogonalizes its share of the matrices and has the others' sent.
    """

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, bfloat16: bool = False
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._bfloat16 = bfloat16

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is no closure to call
        distributed = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        for group in self.param_groups:
            updates = []
            for number, matrix in enumerate(group["params"]):
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                owner = number % world
                if rank == owner:
                    nesterov = matrix.grad.lerp(momentum, group["momentum"])
                    update = orthogonalize(nesterov, self._bfloat16 or matrix.is_cuda).contiguous()
                else:
                    update = torch.empty_like(matrix)
                # Sent while the next ones are computed.
                updates.append((update, dist.broadcast(update, owner, async_op=True) if world > 1 else None))
            for matrix, (update, sent) in zip(group["params"], updates, strict=True):
                if sent is not None:
                    sent.wait()
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)
