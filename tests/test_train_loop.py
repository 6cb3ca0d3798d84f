"""The training loop without Ray: it learns, it resumes as if nothing had happened, and its batches add up."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train_fixtures import encoded_stories, short_run, train_rank, write_tokens

from tinylm.config import ModelConfig
from tinylm.model import Model
from tinylm.tokenizer import Tokenizer
from train.config import ConfigError, Run, TrainConfig
from train.core.checkpoint import Checkpoint
from train.core.loop import VALIDATION_ROWS, train
from train.core.model import GPT, attention_in_blocks, dropout_noise, gelu_by_sigmoid
from train.core.muon import Muon, orthogonalize
from train.core.schedule import lr_factor, total_steps
from train.core.validation import bits_per_byte
from train.data.tokens import TokenData
from train.evaluate import WINDOWS_A_BATCH, make_runner, score_document, windows
from train.stage import load_tokens

STEPS = 24
RUN = short_run(STEPS, validate_every_steps=1000, checkpoint_every_steps=5, checkpoint_every_s=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return encoded_stories(tmp_path_factory.mktemp("loop"), RUN)


def trained(config: TrainConfig, checkpoint: Checkpoint | None = None, save=lambda checkpoint: None, **run: object):
    """The averaged model's weights after a run, and its logged lines."""
    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
    lines: list[dict] = []
    data = load_tokens(config)
    model = train(config, data, Tokenizer(config.tokenizer_path), lines.append, save, checkpoint)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, lines


@pytest.fixture(scope="module")
def unbroken(config: TrainConfig):
    return trained(config)


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def assert_close(ours: dict, theirs: dict, atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_the_learning_rate_warms_up_stays_and_decays_to_its_end():
    run = Run(warmup_steps=9, constant_share=0.4)
    factors = [lr_factor(step, 200, run) for step in range(201)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[9:81] == [1.0] * 72
    assert np.diff(factors[80:]) == pytest.approx(np.full(120, -0.98 / 120))  # a straight line
    assert factors[200] == pytest.approx(0.02)
    # The edges of the settings: all decay, no decay, more warm-up than steps.
    assert lr_factor(0, 10, Run(warmup_steps=0, constant_share=0)) == 1
    assert lr_factor(9, 10, Run(warmup_steps=0, constant_share=1)) == 1
    assert lr_factor(4, 5, Run(warmup_steps=99, constant_share=1)) == pytest.approx(0.05)


def test_steps_follow_from_tokens():
    assert total_steps(Run(tokens=8192, batch_rows=4), ModelConfig(context=256)) == 8
    assert total_steps(Run(tokens=1), ModelConfig()) == 1


def test_training_lowers_the_loss_and_logs_what_it_did(config: TrainConfig, unbroken):
    _, lines = unbroken
    by_step = losses(lines)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    # It begins as it should, knowing nothing: small embeddings make every token nearly equally likely.
    assert by_step[0] == pytest.approx(math.log(400), abs=0.2)
    assert np.mean(by_step[-3:]) < by_step[0] - 1.0
    last = lines[-1]
    assert last["step"] == last["steps"] == STEPS
    assert last["tokens"] == STEPS * 8 * 32
    assert set(last["val_bpb"]) == {"stories"}
    assert last["sample"].startswith("Once upon a time")
    assert last["epochs"]["stories"] > 0


class Killed(Exception):
    pass


@pytest.mark.parametrize("chance", [{}, {"dropout": 0.2}], ids=["plain", "dropout"])
@pytest.mark.parametrize("step", [5, 15])
def test_a_resumed_run_ends_where_the_unbroken_one_does(
    config: TrainConfig, unbroken, step: int, chance: dict, tmp_path: Path
):
    """Of the optimizers' moments, the average, the schedule, the data and what is dropped, anything lost
    would move the weights: one step moves them by 0.02 in the matrices, some 20,000 times the tolerance."""
    if chance:
        unbroken = trained(config, **chance)

    def save(checkpoint: Checkpoint) -> None:
        if checkpoint.step == step:
            checkpoint.save(tmp_path / "state.pt")
            raise Killed

    with pytest.raises(Killed):
        trained(config, save=save, **chance)
    weights, lines = trained(config, Checkpoint.load(tmp_path / "state.pt"), **chance)
    assert_close(weights, unbroken[0], atol=1e-6)
    assert losses(lines) == losses(unbroken[1])[step:]


def test_each_row_has_its_own_dropout():
    """A row without any is what it is in a model that is judged; the others differ from pass to pass."""
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


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    torch.manual_seed(1)
    shares = torch.tensor([0.1, 0.5, 0.0])
    noises = [dropout_noise((2, 3, 100, 111), shares) for _ in range(2)]  # no multiple of eight elements
    assert not torch.equal(*noises)
    for noise in noises:
        for row, share in enumerate(round(float(share) * 256) / 256 for share in shares):
            of_row = noise[:, row]
            zero = (of_row == 0).float()
            assert abs(zero.mean() - share) <= 5 * (share * (1 - share) / of_row.numel()) ** 0.5
            assert of_row[of_row != 0].unique().tolist() == pytest.approx([1 / (1 - share)])
            neighbours = (zero[..., 1:] == zero[..., :-1]).float().mean()  # independent, also within a draw of eight
            assert abs(neighbours - (share**2 + (1 - share) ** 2)) < 0.02


def test_gelu_is_its_tanh_form():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    ours, theirs = gelu_by_sigmoid(x), torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for gradients in zip(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x), strict=True):
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_what_is_validated_drops_nothing(config: TrainConfig):
    tokenizer, data = Tokenizer(config.tokenizer_path), load_tokens(config)
    run = config.run.model_copy(update={"dropout": 0.5, "tokens": 8 * 8 * 32})
    lines: list[dict] = []
    model = train(config.model_copy(update={"run": run}), data, tokenizer, lines.append, lambda state: None)
    piece_bytes = torch.tensor([len(piece) for piece in tokenizer.piece_bytes])
    rows = torch.from_numpy(data.validation_rows("stories", VALIDATION_ROWS))
    assert lines[-1]["val_bpb"]["stories"] == round(bits_per_byte(model.eval(), rows, piece_bytes), 4)


def test_a_finished_run_that_is_resumed_changes_nothing(config: TrainConfig, unbroken):
    states: list[Checkpoint] = []
    trained(config, save=states.append)
    assert states[-1].step == STEPS
    weights, lines = trained(config, states[-1])
    assert_close(weights, unbroken[0], atol=1e-6)
    assert lines == []


def test_two_micro_batches_are_one_batch(config: TrainConfig, unbroken):
    """Apart by rounding, 0.0001 in the losses and 0.0006 in the weights; a wrong micro-batch in a single one of the
    steps sets them apart by 0.03 and 0.003."""
    weights, lines = trained(config, micro_rows=4)
    assert losses(lines) == pytest.approx(losses(unbroken[1]), abs=1e-3)
    assert_close(weights, unbroken[0], atol=2e-3)


def test_two_workers_are_one(config: TrainConfig, unbroken, tmp_path: Path):
    """Different rows on each of two gloo ranks, two micro-batches each, gradients averaged: the weights of one worker
    with all the rows."""
    shared = config.model_copy(update={"run": config.run.model_copy(update={"micro_rows": 2})})
    torch.multiprocessing.spawn(train_rank, (2, shared.model_dump(mode="json"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_close(ranks[0]["weights"], ranks[1]["weights"], atol=0)
    assert ranks[0]["saved_steps"] == ranks[1]["saved_steps"] == [5, 10, 15, 20, STEPS]
    assert losses(ranks[0]["lines"]) == pytest.approx(losses(unbroken[1]), abs=1e-3)
    assert ranks[1]["lines"] == []
    assert_close(ranks[0]["weights"], unbroken[0], atol=2e-3)


def test_a_state_of_another_tokenizer_is_refused(config: TrainConfig):
    states: list[Checkpoint] = []
    trained(config, save=states.append, tokens=8 * 32)
    with pytest.raises(ConfigError, match="another tokenizer"):
        trained(config, replace(states[0], tokenizer_sha256="0" * 64))
    with pytest.raises(ConfigError, match="on other text"):
        trained(config, replace(states[0], text_sha256="0" * 64))


def test_a_run_goes_on_by_the_settings_it_was_begun_with(config: TrainConfig):
    """Rows follow from the step: with other settings before it, some would be skipped and others seen twice."""
    states: list[Checkpoint] = []
    trained(config, save=states.append, tokens=8 * 8 * 32)
    assert states[-1].tokens_by_collection == {"stories": 8 * 8 * 32}
    with pytest.raises(ConfigError, match=r"run\.batch_rows is 16, but the checkpoint was trained with 8"):
        trained(config, states[-1], batch_rows=16)
    with pytest.raises(ConfigError, match="seed is 2, but the checkpoint was trained with 1"):
        trained(config.model_copy(update={"seed": 2}), states[-1])
    collections = [{**collection.model_dump(), "weight": 2} for collection in config.prepare.collections]
    heavier = config.model_copy(update={"prepare": config.prepare.model_validate({"collections": collections})})
    with pytest.raises(ConfigError, match=r"weight is \{'stories': 2\.0\}, but the checkpoint was trained with"):
        trained(heavier, states[-1])


def test_settings_that_do_not_fit_are_named(config: TrainConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.batch_rows is 8"):
        trained(config, micro_rows=3)
    for key, value, ours in (("vocab_size", 500, 400), ("boundary_id", 2, 1)):
        documents = {"train": [[value if key == "boundary_id" else 1, *range(3, 99)]], "validation": [[1, 2]]}
        write_tokens(tmp_path / key, {"s": documents}, **{key: value})
        data = TokenData.load(tmp_path / key, 32, 1, {"s": 1})
        with pytest.raises(ConfigError, match=f"{key} is {ours}, but the tokens were made with {value}"):
            train(config, data, Tokenizer(config.tokenizer_path), print, print)


def random_model(config: TrainConfig) -> GPT:
    """Weights large enough, and no projection zero, that every part of the model matters."""
    model = GPT(config.shape)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3, generator=generator)
    return model


@torch.no_grad()
def slow_bits_per_byte(model: GPT, tokenizer: Tokenizer, rows: np.ndarray) -> float:
    """Token by token, in float64: -log2 p(next), over the bytes of the tokens that stand for text."""
    bits = n_bytes = 0.0
    for row in rows.tolist():
        for i in range(1, len(row)):
            if row[i] < 0 or row[i] == tokenizer.boundary_id:
                continue
            logits = model(torch.tensor([row[:i]]))[0, -1].double()
            bits -= float(torch.log_softmax(logits, dim=0)[row[i]]) / math.log(2)
            n_bytes += len(tokenizer.decode_bytes([row[i]]))
    return bits / n_bytes


def test_bits_per_byte_leave_out_boundaries_and_padding(config: TrainConfig):
    tokenizer, model = Tokenizer(config.tokenizer_path), random_model(config)
    row = (tokenizer.encode_document("A red kite — 😀.") + tokenizer.encode_document("A bear came by to see it."))[:33]
    assert len(row) == 33
    short = [*tokenizer.encode_document("Oh!"), *[-1] * 33][:33]
    assert tokenizer.boundary_id in row[1:]
    rows = np.array([row, short, row[::-1]])
    piece_bytes = torch.tensor([len(piece) for piece in tokenizer.piece_bytes])
    slow = slow_bits_per_byte(model, tokenizer, rows)
    for batch_rows in (1, 2, 16):
        assert bits_per_byte(model, torch.from_numpy(rows), piece_bytes, batch_rows) == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("context", [2, 3, 7, 32])
def test_windows_have_every_token_as_a_target_once_with_context(context: int):
    for n_tokens in range(2, 4 * context + 3):
        scored: list[int] = []
        for start, end, first in windows(n_tokens, context):
            assert 0 <= start < end <= n_tokens - 1
            assert end - start <= context  # what goes in
            assert start == 0 or first - start >= context // 2
            scored += range(first, end + 1)
        assert scored == list(range(1, n_tokens))


def test_a_long_document_is_scored_window_by_window(config: TrainConfig):
    """Each token as in a sequence of its window's tokens alone; more windows than go through the engine at once."""
    tokenizer, model, shape = Tokenizer(config.tokenizer_path), random_model(config), config.shape
    text = " ".join(f"Otto the bear had {n} kites." for n in range(30))
    ids = tokenizer.encode_document(text)
    spans = list(windows(len(ids), shape.context))
    assert len(spans) > WINDOWS_A_BATCH
    bits = 0.0
    with torch.no_grad():
        for start, end, first in spans:
            logits = model(torch.tensor([ids[start:end]]))[0].double()
            says = torch.log_softmax(logits, dim=1)
            bits -= sum(float(says[i - 1 - start, ids[i]]) for i in range(first, end + 1)) / math.log(2)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    score = score_document(make_runner(Model(shape, tensors)), tokenizer, text)
    assert (score.tokens, score.bytes) == (len(ids) - 1, len(text))
    assert score.bits == pytest.approx(bits, rel=1e-4)


def test_the_engine_scores_as_training_does(config: TrainConfig):
    """Two programs and one number: PyTorch's bits per byte, and TinyLM's engine on the exported weights."""
    tokenizer, model, shape = Tokenizer(config.tokenizer_path), random_model(config), config.shape
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    runner = make_runner(Model(shape, tensors))
    piece_bytes = torch.tensor([len(piece) for piece in tokenizer.piece_bytes])
    for text in ("Anna had a kite.", "Otto the bear lived on a hill. "):
        ids = tokenizer.encode_document(text)
        assert len(ids) <= shape.context + 1
        score = score_document(runner, tokenizer, text)
        assert (score.tokens, score.bytes) == (len(ids) - 1, len(text))
        expected = bits_per_byte(model, torch.tensor([ids]), piece_bytes)
        assert score.bits / score.bytes == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_is_pytorchs_up_to_its_bfloat16(shape: tuple[int, int]):
    """PyTorch rounds to 8 bits of mantissa in each of five iterations; an entry moves by some 0.02."""
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


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_orthogonalized_matrices_keep_their_directions(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalize(matrix[None])[0] @ right.T
    assert (found - found.diagonal().diag()).abs().max() < 1e-9
    well_inside = singular / singular.norm() > 0.02
    assert (found.diagonal()[well_inside] > 0.6).all()
    assert (found.diagonal() < 1.3).all()


def test_muon_moves_matrices_together_as_each_alone():
    """Of one shape they go through together, whatever the others are."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(24, 24), (48, 16), (24, 24), (16, 48), (24, 24)]
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

    together = moved(list(range(len(shapes))))
    for i, matrix in enumerate(together):
        torch.testing.assert_close(matrix, moved([i])[0], atol=1e-6, rtol=0)
        assert not torch.equal(matrix, starts[i])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_training(config: TrainConfig):
    """Also what is dropped is the same: it is drawn outside of what is compiled."""
    expected, plain = trained(config, dropout=0.2)
    weights, lines = trained(config, dropout=0.2, compile=True)
    assert losses(lines) == pytest.approx(losses(plain), abs=1e-3)
    assert_close(weights, expected, atol=2e-3)


@pytest.mark.parametrize("length", [1, 64, 65, 200, 256])
def test_attention_in_blocks_is_attention(length: int):
    """Values and all gradients, where the last block is whole and where it is not."""
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


def test_bfloat16_trains_as_float32_does(config: TrainConfig, unbroken):
    """Weights stay in float32; the blocks' products have 8 bits of mantissa, and the losses follow."""
    products: set[torch.dtype] = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: products.add(out.dtype) if isinstance(module, torch.nn.Linear) else None
    )
    with hook:
        weights, lines = trained(config, bfloat16=True, tokens=4 * 8 * 32, constant_share=1)
    assert torch.bfloat16 in products
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert losses(lines) == pytest.approx(losses(unbroken[1])[:4], abs=0.05)


def test_orthogonalizing_in_bfloat16_is_the_same_but_for_its_rounding():
    matrix = torch.randn(48, 16, generator=torch.Generator().manual_seed(6))
    exact, rounded = orthogonalize(matrix[None]), orthogonalize(matrix[None], bfloat16=True)
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_where_a_row_is_several_blocks_of_queries():
    """What is compiled is other code than what is not: attention in blocks, GELU by a sigmoid."""
    shape = ModelConfig(n_layers=1, vocab_size=400, hidden_size=32, n_heads=2, mlp_size=64, context=150)
    model = GPT(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    ids = torch.randint(400, (2, 150), generator=torch.Generator().manual_seed(1))

    def logits_and_gradients() -> list[torch.Tensor]:
        logits = model(ids)
        return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]

    plain = logits_and_gradients()
    model.compile_blocks()
    for ours, theirs in zip(logits_and_gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
