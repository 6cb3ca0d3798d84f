"""The number of optimizer steps of a run, and the learning rate at each of them."""

from __future__ import annotations

from tinylm.config import ModelConfig
from train.config import Run

FINAL_LR = 0.02  # share of the peak learning rate at the last step


def total_steps(run: Run, model: ModelConfig) -> int:
    """Return the number of whole optimizer steps in `run.tokens`, at least one."""
    return max(1, run.tokens // (run.batch_rows * model.context))


def lr_factor(step: int, steps: int, run: Run) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, constant, linear decay to FINAL_LR."""
    warmup = min(1.0, (step + 1) / (run.warmup_steps + 1))
    decay_from = run.constant_share * steps
    left = min(1.0, max(0.0, (steps - step) / max(1.0, steps - decay_from)))
    return warmup * (FINAL_LR + (1 - FINAL_LR) * left)
