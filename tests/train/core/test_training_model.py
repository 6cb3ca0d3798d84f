"""The model's dropout, attention and GELU equal PyTorch's functions."""

from __future__ import annotations

import pytest
import torch

from tinylm.config import ModelConfig
from train.core.model import GPT, attention_in_blocks, dropout_noise, gelu_by_sigmoid


def test_each_row_has_its_own_dropout():
    """A row with a share of 0 equals a row without dropout. The other rows differ between passes."""
    ids = torch.arange(64)[None].expand(3, -1) % 50
    model = GPT(ModelConfig(n_layers=2, vocab_size=400))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        one, two = (model(ids, torch.tensor([0.3, 0.0, 0.1])) for _ in range(2))
        plain = model(ids)
    torch.testing.assert_close(one[1], plain[1], atol=1e-5, rtol=0)
    for row, least in ((0, 0.1), (2, 0.01)):
        assert (one[row] - two[row]).abs().mean() > least * plain[row].std()
        assert (one[row] - plain[row]).abs().mean() > least * plain[row].std()


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(1)
    shares = torch.tensor([0.1, 0.5, 0.0])
    noises = [dropout_noise((2, 3, 100, 111), shares) for _ in range(2)]  # not a multiple of eight elements
    assert not torch.equal(*noises)
    for noise in noises:
        for row, share in enumerate(round(float(share) * 256) / 256 for share in shares):
            of_row = noise[:, row]
            zero = (of_row == 0).float()
            assert abs(zero.mean() - share) <= 5 * (share * (1 - share) / of_row.numel()) ** 0.5
            assert of_row[of_row != 0].unique().tolist() == pytest.approx([1 / (1 - share)])
            # Elements are independent, also within the eight bytes of one draw.
            neighbours = (zero[..., 1:] == zero[..., :-1]).float().mean()
            assert abs(neighbours - (share**2 + (1 - share) ** 2)) < 0.02


def test_gelu_by_sigmoid_is_the_tanh_form():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    ours, theirs = gelu_by_sigmoid(x), torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for gradients in zip(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x), strict=True):
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 64, 65, 200, 256])
def test_attention_in_blocks_equals_pytorchs_attention(length: int):
    """Compare values and gradients, with a whole last block and with a partial one."""
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(2, 3, length, 16, generator=generator, requires_grad=True) for _ in range(3)]
    out = torch.randn(2, 3, length, 16, generator=generator)
    theirs = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    ours = attention_in_blocks(*inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, out), torch.autograd.grad(theirs, inputs, out), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
