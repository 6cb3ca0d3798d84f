"""Muon against PyTorch's Muon, and the learning rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.config import Run
from train.core.optimizers import Muon, lr_factor, orthogonalize

SHAPES = [(24, 24), (48, 16), (16, 48)]


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_pytorchs_muon_within_bfloat16(shape: tuple[int, int]):
    """PyTorch rounds to 8 bits of mantissa in five iterations. The update moves an entry by about 0.02."""
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = [Muon([ours], **settings), torch.optim.Muon([theirs], **settings)]
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert (ours - 1).abs().max() > 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalizing_keeps_the_singular_vectors(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalize(matrix[None])[0] @ right.T
    assert (found - found.diagonal().diag()).abs().max() < 1e-9
    well_inside = singular / singular.norm() > 0.02
    assert (found.diagonal()[well_inside] > 0.6).all()
    assert (found.diagonal() < 1.3).all()


def test_matrices_in_a_batch_do_not_influence_each_other():
    generator = torch.Generator().manual_seed(5)
    shapes = [*SHAPES, (24, 24), (24, 24)]  # Muon computes matrices of one shape in one batch
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]

    def moved(chosen: list[int]) -> list[torch.Tensor]:
        matrices = [torch.nn.Parameter(starts[i].clone()) for i in chosen]
        optimizer = Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1)
        for of_step in gradients:
            for matrix, i in zip(matrices, chosen, strict=True):
                matrix.grad = of_step[i].clone()
            optimizer.step()
        return [matrix.detach() for matrix in matrices]

    for i, matrix in enumerate(moved(list(range(len(shapes))))):
        torch.testing.assert_close(matrix, moved([i])[0], atol=1e-6, rtol=0)
        assert not torch.equal(matrix, starts[i])


def test_bfloat16_only_rounds_the_orthogonalization():
    matrix = torch.randn(48, 16, generator=torch.Generator().manual_seed(6))
    exact, rounded = orthogonalize(matrix[None]), orthogonalize(matrix[None], bfloat16=True)
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05


def test_the_learning_rate_rises_stays_and_falls():
    factors = [lr_factor(step, 200, Run(warmup_steps=9, constant_share=0.4)) for step in range(201)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[9:81] == [1.0] * 72
    assert np.diff(factors[80:]) == pytest.approx(np.full(120, -0.98 / 120))  # a straight line
    assert factors[200] == pytest.approx(0.02)
    # No warm-up, no decay, and more warm-up than steps.
    assert lr_factor(0, 10, Run(warmup_steps=0, constant_share=0)) == 1
    assert lr_factor(9, 10, Run(warmup_steps=0, constant_share=1)) == 1
    assert lr_factor(4, 5, Run(warmup_steps=99, constant_share=1)) == pytest.approx(0.05)
