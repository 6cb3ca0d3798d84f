"""The rank of this process among the processes that train one model together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the number of ranks."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Return the rank in PyTorch's process group, or rank 0 of 1 without a group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a scalar over all ranks; every rank must call this."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def decided_by_first(self, decision: bool, device: torch.device) -> bool:
        """Return rank 0's decision; every rank must call this."""
        if self.world == 1:
            return decision
        shared = torch.tensor(float(decision), device=device)
        dist.broadcast(shared, src=0)
        return bool(shared)
