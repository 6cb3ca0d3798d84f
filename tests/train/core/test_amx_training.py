"""Training on AMX tiles against the same arithmetic in PyTorch: attention, Muon's iteration, and whole steps."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinylm.config import ModelConfig
from train.config import ConfigError
from train.core import amx
from train.core.model import GPT, rope_tables, rotate
from train.core.optimizers import COEFFICIENTS, NEWTON_SCHULZ_STEPS, Muon, _iterate

needs_tiles = pytest.mark.skipif(
    not (amx.permitted() and amx.cpu_features().issuperset(amx.FEATURES) and shutil.which("g++")),
    reason="no AMX for bfloat16, or no C++ compiler",
)
ROUNDED = 0.01  # error of a result relative to its size: bfloat16 has 8 bits of mantissa


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())


def attention_inputs(
    rows: int, n: int, n_heads: int, seed: int = 0, size: float = 1.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Return qkv, cos and sin for `amx.attention`."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, n, 3 * n_heads * amx.HEAD_DIM, generator=generator) * size
    return (qkv.bfloat16(), *rope_tables(ModelConfig(context=n)))


def pytorchs_attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what `amx.attention` computes, in the type of qkv."""
    rows, n, width = qkv.shape
    q, k, v = (part.transpose(1, 2) for part in qkv.view(rows, n, 3, -1, amx.HEAD_DIM).unbind(2))
    q, k = (rotate(x.float(), cos, sin).to(qkv.dtype) for x in (q, k))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attended.transpose(1, 2).reshape(rows, n, width // 3)


@needs_tiles
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 3),
    blocks=st.integers(1, 9),
    n_heads=st.integers(1, 4),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.1, 1.5, 8]),
)
def test_attention_is_as_exact_as_pytorchs(rows: int, blocks: int, n_heads: int, seed: int, size: float):
    """Compare values and gradients in bfloat16 with those in float32. Large scores lose more to rounding in both."""
    qkv, cos, sin = attention_inputs(rows, blocks * amx.MULTIPLE, n_heads, seed, size)
    gradient = torch.randn(rows, qkv.shape[1], n_heads * amx.HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    results = []
    for given_inputs, function in (
        (qkv.float(), pytorchs_attention),
        (qkv, pytorchs_attention),
        (qkv, lambda *arguments: amx.attention(*arguments)[0]),
    ):
        inputs = given_inputs.clone().requires_grad_()
        attended = function(inputs, cos, sin)
        (of_inputs,) = torch.autograd.grad(attended, inputs, gradient.to(attended.dtype))
        results.append([attended.detach(), *of_inputs.chunk(3, dim=-1)])
    for exact, theirs, ours in zip(*results, strict=True):
        assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact) + ROUNDED / 2


@needs_tiles
def test_attention_does_not_look_ahead():
    """Other later tokens change nothing before them, to the bit. `qkv` need not be contiguous."""
    qkv, cos, sin = attention_inputs(2, 96, 2)
    changed = qkv.clone()
    changed[:, 41:] = 3
    strided = torch.stack([changed, changed], dim=-1)[..., 0]
    before, after = (amx.attention(x, cos, sin)[0] for x in (qkv, strided))
    assert torch.equal(before[:, :41], after[:, :41])
    assert not torch.equal(before[:, 41:], after[:, 41:])


@needs_tiles
def test_results_do_not_depend_on_the_number_of_threads():
    qkv, cos, sin = attention_inputs(3, 64, 2)
    matrices = torch.randn(5, 64, 96).bfloat16()
    results = []
    n_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, inputs = matrices.clone(), qkv.clone().requires_grad_()
            attended = amx.attention(inputs, cos, sin)[0]
            attended.sum().backward()
            amx.newton_schulz(x, COEFFICIENTS, 2)
            results.append([attended.detach(), inputs.grad, x])
    finally:
        torch.set_num_threads(n_threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@needs_tiles
def test_attention_is_a_correct_operator_of_pytorch():
    qkv, cos, sin = attention_inputs(1, 32, 1)
    torch.library.opcheck(amx.attention, (qkv.requires_grad_(), cos, sin))


@needs_tiles
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 192), (2, 96, 64)])
def test_the_iteration_equals_pytorchs_in_bfloat16(shape: tuple[int, int, int]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = (x / x.norm(dim=(1, 2), keepdim=True)).bfloat16()
    expected = _iterate(x)
    amx.newton_schulz(x, COEFFICIENTS, NEWTON_SCHULZ_STEPS)
    assert relative_error(x, expected.float()) < ROUNDED


@needs_tiles
@pytest.mark.parametrize("length", [64, 49])
def test_a_model_with_tiles_has_the_same_gradients(length: int):
    """Compare one backward pass. Rows of 49 tokens fit no tile, so the model uses PyTorch's attention."""
    ids = torch.randint(0, 400, (2, length + 1), generator=torch.Generator().manual_seed(2))
    results = []
    for with_tiles in (False, True):
        model = GPT(ModelConfig(n_layers=2, vocab_size=400, context=64))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1, generator=generator)
        model.compile_blocks(with_tiles)
        assert [block.self_attn.uses_tiles for block in model.model.layers] == [with_tiles] * 2
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert relative_error(ours, theirs) < 3 * ROUNDED


@needs_tiles
def test_muon_uses_pytorch_for_sizes_that_fit_no_tile():
    gradient = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    moved = []
    for with_tiles in (False, True):
        matrix = torch.nn.Parameter(torch.zeros(40, 64))
        matrix.grad = gradient.clone()
        Muon([matrix], 0.02, 0.95, 0.0, bfloat16=True, with_tiles=with_tiles).step()
        moved.append(matrix.detach())
    assert torch.equal(*moved)


def test_a_processor_without_amx_has_no_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(amx, "cpu_features", lambda: frozenset({"avx512f"}))
    assert amx.library.__wrapped__() is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, compiler: str):
    monkeypatch.setattr(amx, "cpu_features", lambda: frozenset(amx.FEATURES))
    monkeypatch.setattr(amx, "permitted", lambda: True)
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ConfigError, match=f"run.compile is true, but the C\\+\\+ compiler '{compiler}' failed"):
        amx.library.__wrapped__()
