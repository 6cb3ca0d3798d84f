"""Learning from trained models beside the text: what they say together, what is kept of it, how runs learn it."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fixtures import encode_plainly, encoded_stories, release, short_run, tree_bytes, write_tokens

from tinylm.llm import load
from tinylm.model import Chunk, ModelRunner
from tinylm.tokenizer import Tokenizer
from tinylm.weights import TENSORS, ModelError
from train.card import _taught_by as model_card_sentence
from train.config import ConfigError, Lengths, Phase, Teach, TrainConfig
from train.data import TokenData
from train.files import file_sha256
from train.loop import Taught, _learnt_from_others, mean_loss, train
from train.model import GPT, released_model
from train.soft_targets import N_SOFT, N_TOP, soft_paths
from train.stage import load_tokens
from train.state import STATE_FILE
from train.teach import sparse, teach
from train.teachers import Teachers
from train.windows import windows

STEPS = 12
RUN = short_run(STEPS, micro_rows=4, average_decay=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return encoded_stories(tmp_path_factory.mktemp("taught"), RUN)


@pytest.fixture(scope="module")
def models(config: TrainConfig) -> list[Path]:
    return [release(config, config.workdir / "teachers" / f"t{seed}", seed) for seed in range(2)]


@pytest.fixture
def rows(config: TrainConfig) -> torch.Tensor:
    return torch.from_numpy(load_tokens(config).mixture.rows(0, 3))


def loaded(config: TrainConfig, directories: list[Path], context: int = 32, compiled: bool = False) -> Teachers:
    return Teachers(directories, file_sha256(config.tokenizer_path), context, compiled=compiled)


def engine_probabilities(directory: Path, ids: torch.Tensor) -> np.ndarray:
    """What TinyLM's own engine says of the same rows, (B, T, vocab)."""
    _, model = load(directory, precision="float32")
    (n, length), chunks = ids.shape, [Chunk(slot, 0, ids.shape[1]) for slot in range(len(ids))]
    runner = ModelRunner(model, n, n * length, n * length)
    logits = runner.forward(ids.numpy().ravel(), chunks, np.arange(n * length)).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).reshape(n, length, -1)


def test_together_they_say_the_mean_of_what_the_engine_says_of_each(config, models, rows):
    ids = rows[:, :-1]
    each = [engine_probabilities(directory, ids) for directory in models]
    assert np.abs(each[0] - each[1]).max() > 0.05
    np.testing.assert_allclose(loaded(config, models).probabilities(ids), np.mean(each, axis=0), atol=1e-4)
    np.testing.assert_allclose(loaded(config, models[:1]).probabilities(ids), each[0], atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_they_say_the_same_of_however_many_rows(config, models, rows):
    plain, compiled = loaded(config, models), loaded(config, models, compiled=True)
    for n in (3, 2, 1):
        said = compiled.probabilities(rows[:n, :-1])
        torch.testing.assert_close(said, plain.probabilities(rows[:n, :-1]), atol=1e-5, rtol=1e-4)


def test_of_a_distribution_the_likeliest_are_kept_and_the_rest_is_drawn_fairly():
    """The mean of many draws is the distribution; a single one sums to 1 and has the top exactly."""
    spread = torch.tensor([1.0, 4.0, 40.0])[:, None]  # from nearly even to nearly certain
    said = (torch.randn(3, 400, generator=torch.Generator().manual_seed(1)) * spread / 10).softmax(-1)
    mean, draws = torch.zeros_like(said), 2000
    for seed in range(draws):
        ids, probabilities = sparse(said, torch.Generator().manual_seed(seed))
        assert ids.shape == probabilities.shape == (3, N_SOFT)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(3))
        torch.testing.assert_close(probabilities[:, :N_TOP], said.topk(N_TOP).values)
        torch.testing.assert_close(said.gather(1, ids[:, :N_TOP]), probabilities[:, :N_TOP])
        mean.scatter_add_(1, ids, probabilities / draws)
    share = (1 - said.topk(N_TOP).values.sum(-1, keepdim=True)) / (N_SOFT - N_TOP)  # what one that is drawn stands for
    error = (share * said / draws) ** 0.5  # of a mean of that many draws
    assert ((mean - said).abs() <= 5 * error + 1e-6).all()


def taught_by(config: TrainConfig, models: list[Path], workdir: Path, **run: object) -> TrainConfig:
    """The same settings with teachers, in a work directory of their own with the same tokens."""
    for name in ("tokens", "text"):
        shutil.copytree(config.workdir / name, workdir / name)
    shutil.copy(config.tokenizer_path, workdir)
    values = config.model_dump(mode="json")
    values |= {"workdir": workdir, "teach": {"models": models, "collections": ["stories"]}}
    values["run"] |= run
    return TrainConfig.model_validate(values)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_written_is_what_they_say_of_each_token(config, models, tmp_path: Path, workers: int):
    settings = taught_by(config, models, tmp_path, workers=workers)
    teach(settings)
    data = load_tokens(settings)
    assert data.taught_by == {file_sha256(model / TENSORS): model.name for model in models}
    teachers, found = loaded(config, models), 0
    documents = data.to_train_on("stories")
    lengths = documents.lengths.tolist()
    for i in [lengths.index(max(lengths)), lengths.index(min(lengths)), len(documents) - 1]:
        ids = torch.from_numpy(documents.tokens(i).astype(np.int64))
        said = documents.soft_targets(i)
        for start, end, first in windows(len(ids) + 1, 32):
            expected = teachers.probabilities(ids[None, start:end])[0, first - 1 - start :]
            top = torch.from_numpy(said.probabilities[first - 1 : end, :N_TOP].astype(np.float32))
            torch.testing.assert_close(top, expected.topk(N_TOP).values, atol=1e-4, rtol=1e-3)
            there = expected.gather(1, torch.from_numpy(said.ids[first - 1 : end].astype(np.int64)))
            torch.testing.assert_close(there[:, :N_TOP], top, atol=1e-4, rtol=1e-3)
            least = top[:, -1:] + 1e-4
            assert (there[:, N_TOP:] <= least).all()  # what is drawn is not among the top
            drawn = torch.from_numpy(said.probabilities[first - 1 : end, N_TOP:].astype(np.float32))
            rest = (1 - top.sum(1, keepdim=True)) / (N_SOFT - N_TOP)
            torch.testing.assert_close(drawn, rest.expand_as(drawn), atol=2e-3, rtol=0)
            found += end - (first - 1)
    assert found > 64


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=8, max_size=20), st.integers(2, 6), st.integers(0, 3))
def test_each_row_of_a_mixture_has_what_is_said_of_its_own_tokens(lengths: list[int], context: int, seed: int):
    """Here of each token that it comes again, which shows where what is said belongs: of a collection in several
    shards, read whole and by lengths; of another nothing is said."""
    told, plain = ([[1, *range(100 * i, 100 * i + n)] for i, n in enumerate(lengths, first)] for first in (1, 300))
    with tempfile.TemporaryDirectory() as place:
        directory, taught = Path(place) / "tokens", Path(place) / "taught"
        collections = {"told": {"train": told}, "plain": {"train": plain}}
        write_tokens(directory, collections, shard_tokens=sum(map(len, told)) // 3)
        taught.mkdir()
        shards = sorted(directory.glob("told.train-*.npy"))
        assert len(shards) > 1
        for shard in shards:
            ids, probabilities = soft_paths(taught, shard)
            tokens = np.load(shard)
            np.save(ids, np.repeat(tokens[:, None], N_SOFT, axis=1))
            np.save(probabilities, np.full((len(tokens), N_SOFT), 1 / N_SOFT, np.float16))
        sums = {shard.name: file_sha256(shard) for shard in shards}
        index = {"taught_by": {}, "context": context, "seed": 1, "kept": [N_TOP, N_SOFT], "shards": sums}
        (taught / "index.json").write_text(json.dumps(index))
        weights, longest = {"told": 0.5, "plain": 0.5}, {"told": Lengths(least=1, most=max(map(len, told)))}
        phases = [Phase(from_tokens=20 * context, weights=weights, lengths=longest)]
        data = TokenData(directory, context, seed, weights, phases, taught=taught, taught_collections=["told"])
        of_plain = TokenData(directory, context, seed, weights, phases)
        rows, names = data.mixture.rows(0, 40), data.mixture.collections(0, 40)
        said = data.mixture.soft_targets(0, 40)
        assert set(names) == {"told", "plain"}
        assert np.array_equal(rows, of_plain.mixture.rows(0, 40))
        for row, name, ids, probabilities in zip(rows, names, *said, strict=True):
            if name == "told":
                assert ids.tolist() == [[token] * N_SOFT for token in row[:-1].tolist()]
                assert (probabilities == 1 / N_SOFT).all()
            else:
                assert not probabilities.any()


def test_a_loss_is_of_what_is_said_by_its_share_and_of_the_text_else(config, models, rows):
    shares = torch.tensor([0.0, 0.25, 1.0])
    inputs, tokens = rows[:, :-1], rows[:, 1:]
    said = loaded(config, models).probabilities(inputs)
    ids = torch.arange(400).expand(*said.shape)  # of a distribution that is kept whole
    model = released_model(models[0])
    log_p = model(inputs).log_softmax(-1)
    of_said, of_text = -(said * log_p).sum(-1), -log_p.gather(2, tokens[..., None])[..., 0]
    expected = (shares[:, None] * of_said + (1 - shares[:, None]) * of_text).mean()
    torch.testing.assert_close(mean_loss(model, inputs, tokens, taught=Taught(ids, said, shares)), expected)
    nothing = Taught(ids, torch.zeros_like(said), torch.zeros(3))
    torch.testing.assert_close(mean_loss(model, inputs, tokens, taught=nothing), mean_loss(model, inputs, tokens))


def distance(config: TrainConfig, weights: dict, teacher: Path) -> float:
    """How far a model is from what the teacher says of held-out text, nats a token."""
    ids = torch.from_numpy(load_tokens(config).validation_rows("stories", 8)[:, :-1]).clamp(min=0)
    student = GPT(config.model_config_)
    student.load_state_dict(weights)
    with torch.no_grad():
        log_said = loaded(config, [teacher]).probabilities(ids).log()
        return float((log_said.exp() * (log_said - student(ids).log_softmax(-1))).sum(-1).mean())


def outcome(config: TrainConfig) -> tuple[dict, dict, list[dict]]:
    """The averaged weights, the last state and the logged lines of a run."""
    lines: list[dict] = []
    states: list[dict] = []
    model = train(config, load_tokens(config), Tokenizer(config.tokenizer_path), lines.append, states.append)
    return model.state_dict(), states[-1], lines


def test_a_run_comes_nearer_to_its_teacher_and_says_who_it_was(config: TrainConfig, models: list[Path], tmp_path: Path):
    plain, state, lines = outcome(config)
    assert state["taught_by"] == {}
    settings = taught_by(config, models[:1], tmp_path / "work", taught={"stories": 0.9})
    teach(settings)
    weights, state, _ = outcome(settings)
    assert distance(config, weights, models[0]) < distance(config, plain, models[0]) - 0.1
    assert state["taught_by"] == {file_sha256(models[0] / TENSORS): "t0"}
    # A run teaches as what it releases does.
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / STATE_FILE)
    ids = torch.from_numpy(load_tokens(config).mixture.rows(0, 2)[:, :-1])
    student = GPT(config.model_config_)
    student.load_state_dict(weights)
    said = loaded(config, [tmp_path / "run"]).probabilities(ids)
    torch.testing.assert_close(said, student(ids).softmax(-1).detach())
    # Where no collection is taught, what was said changes nothing.
    run = settings.run.model_copy(update={"taught": {"stories": 0.0}})  # refused in a config
    _, _, same = outcome(settings.model_copy(update={"run": run}))
    assert [line.get("loss") for line in same] == [line.get("loss") for line in lines]


def test_what_was_said_is_kept_until_tokens_change(config, models, tmp_path: Path, capsys):
    settings = taught_by(config, models, tmp_path)
    with pytest.raises(ConfigError, match=r"^.*taught/index.json is missing: run `python -m train.teach` first"):
        load_tokens(settings)
    encode_plainly(config, tmp_path / "more", shard_tokens=3000)
    shutil.rmtree(settings.tokens_dir)
    (tmp_path / "more").rename(settings.tokens_dir)
    teach(settings)
    assert "stories: taught by t0, t1" in capsys.readouterr().out
    files = sorted(settings.taught_dir.glob("*.npy"))
    assert len(files) > 4
    content = [path.read_bytes() for path in files]

    def written_by_teaching() -> list[bool]:
        """Which of the files are other ones after the stage."""
        before = [path.exists() and path.stat().st_ino for path in files]
        teach(settings)
        return [path.stat().st_ino != inode for path, inode in zip(files, before, strict=True)]

    of_second = ["00001" in path.name for path in files]
    assert not any(written_by_teaching())
    shard = settings.tokens_dir / "stories.train-00001.npy"
    tokens = np.load(shard)
    np.save(shard, np.concatenate([tokens, tokens[:50]]))
    with pytest.raises(ConfigError, match=r"^\S*taught holds nothing of .*00001.npy as it is: run `python"):
        load_tokens(settings)
    assert written_by_teaching() == of_second
    np.save(shard, tokens)
    assert written_by_teaching() == of_second
    assert [path.read_bytes() for path in files] == content

    # A file that is gone, or cut off, or an index that is, is made again.
    (settings.taught_dir / "of-before.ids.npy").write_bytes(b"of a shard that is no longer there")
    second = next(path for path in files if "00001" in path.name)
    for cut in (0, 100, len(second.read_bytes()) - 1):
        second.write_bytes(second.read_bytes()[:cut])
        with pytest.raises(ConfigError, match=r"^\S*taught is damaged: run `python -m train.teach` again"):
            load_tokens(settings)
        teach(settings)
    index = settings.taught_dir / "index.json"
    index.write_text(index.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"^\S*taught is damaged: run `python -m train.teach` again"):
        load_tokens(settings)
    second.unlink()
    teach(settings)
    assert [path.read_bytes() for path in files] == content
    assert sorted(settings.taught_dir.iterdir()) == [index, *files]


def test_what_others_said_or_otherwise_is_not_taken_for_it_nor_thrown_away(config, models, tmp_path: Path):
    settings = taught_by(config, models, tmp_path)
    teach(settings)
    before = tree_bytes(settings.taught_dir)
    values = settings.model_dump(mode="json")
    for section, change, error, unusable in (
        (
            "teach",
            {"models": models[:1]},
            "made with another taught by, t0, t1: remove it",
            "teach.models is .'t0'., but",
        ),
        ("model", {"context": 16}, "made with another context, 32: remove it", "model.context is 16, but"),
        ("seed", 7, "made with another seed, 1: remove it", None),
    ):
        other = values | {section: {**values[section], **change} if isinstance(change, dict) else change}
        with pytest.raises(ConfigError, match=error):
            teach(TrainConfig.model_validate(other))
        if unusable:
            with pytest.raises(ConfigError, match=unusable):
                load_tokens(TrainConfig.model_validate(other))
    assert tree_bytes(settings.taught_dir) == before
    models[0].rename(tmp_path / "renamed")
    try:
        same = Teach(models=[tmp_path / "renamed", models[1]], collections=["stories"])
        renamed = settings.model_copy(update={"teach": same})
        teach(renamed)  # the same models as before
    finally:
        (tmp_path / "renamed").rename(models[0])
    load_tokens(renamed)
    assert {k: v for k, v in tree_bytes(settings.taught_dir).items() if k.endswith("npy")} == {
        k: v for k, v in before.items() if k.endswith("npy")
    }


def test_without_the_section_nothing_is_taught(config: TrainConfig, capsys: pytest.CaptureFixture):
    teach(config)
    assert "taught: nothing" in capsys.readouterr().out
    assert not config.taught_dir.exists()


def test_what_cannot_teach_is_named(config: TrainConfig, models: list[Path], tmp_path: Path):
    with pytest.raises(ModelError, match="nowhere"):
        loaded(config, [tmp_path / "nowhere"])
    short = release(config, tmp_path / "short", 3, context=16)
    with pytest.raises(ConfigError, match=r"teach.models: .*short reads 16 tokens: too few for rows of 32"):
        loaded(config, [short])
    with pytest.raises(ConfigError, match=r"teach.models: .*t0 has another tokenizer"):
        Teachers(models, "0" * 64, 32)
    with pytest.raises(ConfigError, match=r"teach.models: .*t0, .*t1, .*t0: one of them is named twice"):
        loaded(config, [*models, models[0]])
    damaged = Path(shutil.copytree(models[0], tmp_path / "damaged"))
    (damaged / TENSORS).write_bytes((models[0] / TENSORS).read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        loaded(config, [models[1], damaged])
    (tmp_path / "cut").mkdir()
    whole = io.BytesIO()
    torch.save({"step": 3}, whole)
    for content in (whole.getvalue(), whole.getvalue()[:-100], b"no state", b""):
        (tmp_path / "cut" / STATE_FILE).write_bytes(content)
        with pytest.raises(ConfigError, match=r"teach.models: .*cut/state.pt is not what a run saved: \w+: "):
            loaded(config, [tmp_path / "cut"])


def test_only_who_taught_something_is_named(config: TrainConfig, models: list[Path], tmp_path: Path):
    """Before a run has read anything of which others' words are learnt, it has learnt nothing of theirs."""
    before, now = {"a": 5}, {"a": 7, "b": 0}
    settings = taught_by(config, models, tmp_path)
    values = settings.model_dump(mode="json")
    values["prepare"]["collections"] = [{**values["prepare"]["collections"][0], "name": name} for name in ("a", "b")]
    for collection, learnt in (("a", True), ("b", False)):
        values["teach"]["collections"] = [collection]
        assert _learnt_from_others(TrainConfig.model_validate(values), before, now) is learnt


def test_a_card_says_who_taught():
    assert model_card_sentence({}) == ""
    sentence = model_card_sentence({"0123456789abcdef": "older", "f" * 64: "another"})
    assert "what other models say of it: older (sha256 0123456789ab), another (sha256 ffffffffffff)." in sentence
