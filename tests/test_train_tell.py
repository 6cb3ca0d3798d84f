"""Stories that a model makes up to be trained on: what they are, who told them, how runs read them, what is refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from train_fixtures import ROW_TOKENS, encoded_stories, release, short_run

from tinylm.config import ModelConfig
from tinylm.llm import load
from tinylm.model import Model
from tinylm.tokenizer import Tokenizer
from tinylm.weights import TENSORS
from train.config import ConfigError, Tell, TrainConfig
from train.data import Documents, read_tokens
from train.files import file_sha256
from train.loop import train
from train.model import GPT
from train.stage import load_tokens
from train.state import check_continues
from train.tell import tell, told_stories

STEPS = 6
TOLD_FROM = 4 * ROW_TOKENS
RUN = short_run(STEPS, checkpoint_every_steps=1, checkpoint_every_s=0)
TOLD_PHASE = {"from_tokens": TOLD_FROM, "weights": {"stories": 0.5, "told": 0.5}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Without anything told."""
    return encoded_stories(tmp_path_factory.mktemp("told"), RUN)


@pytest.fixture(scope="module")
def teller(plain: TrainConfig) -> Path:
    return release(plain, plain.workdir / "teller", 0)


def with_told(plain: TrainConfig, teller: Path, run: dict | None = None, **settings: object) -> TrainConfig:
    """The same settings with a section `tell` and a phase that reads what is told."""
    values = plain.model_dump(mode="json")
    values["tell"] = {"model": teller, "like": "stories", "begin_tokens": 20, "tokens": 3000, **settings}
    values["run"] |= {"phases": [TOLD_PHASE], **(run or {})}
    return TrainConfig.model_validate(values)


@pytest.fixture(scope="module")
def config(plain: TrainConfig, teller: Path) -> TrainConfig:
    config = with_told(plain, teller)
    tell(config)
    return config


def documents_of(directory: Path, name: str) -> list[list[int]]:
    documents = read_tokens(directory)[1]["train"][name]
    return [documents.tokens(i).tolist() for i in range(len(documents))]


def test_a_told_story_is_begun_as_one_that_was_read_and_comes_to_an_end(config: TrainConfig, teller: Path):
    told, read = documents_of(config.told_dir, "told"), documents_of(config.tokens_dir, "stories")
    beginnings = {tuple(document[:20]) for document in read}
    assert {tuple(story[:20]) for story in told} <= beginnings
    assert len({tuple(story[:20]) for story in told}) > 10
    assert len({tuple(story) for story in told}) > 0.9 * len(told)
    boundary = config.model_config_.boundary_id
    assert all(story[0] == boundary and boundary not in story[1:] for story in told)
    assert max(map(len, told)) <= 32
    index = json.loads((config.told_dir / "index.json").read_text())
    assert 3000 <= index["collections"]["told"]["train"]["tokens"] == sum(map(len, told)) < 3000 + 32
    assert index["collections"]["told"]["train"]["documents"] == len(told)
    assert index["told_by"] == {file_sha256(teller / TENSORS): "teller"}
    assert index["settings"]["top_p"] == 0.95


def test_the_seed_decides_what_is_told(config: TrainConfig, teller: Path):
    tokenizer, model = load(teller)
    like = read_tokens(config.tokens_dir)[1]["train"]["stories"]

    def first(n: int, seed: int, **settings: object) -> list[list[int]]:
        found = told_stories(tokenizer, model, config.tell.model_copy(update=settings), like, 32, seed)
        return [story.tolist() for story in itertools.islice(found, n)]

    stories = first(20, config.seed)
    assert stories == documents_of(config.told_dir, "told")[:20]
    assert first(20, config.seed + 1) != stories
    # And of the same ones, what is not wanted is left out.
    texts = [tokenizer.decode(story[1:]) for story in stories]
    unwanted = re.compile(rf"(?s).{{{sorted(map(len, texts))[10]},}}")  # so, what is longer than half of them
    wanted = [story for story, text in zip(stories, texts, strict=True) if not unwanted.search(text)]
    assert 0 < len(wanted) < 20
    assert first(len(wanted), config.seed, without=unwanted) == wanted


def states_of(config: TrainConfig, state: dict | None = None) -> list[dict]:
    states: list[dict] = []
    train(config, load_tokens(config), Tokenizer(config.tokenizer_path), lambda _: None, states.append, state)
    return states


def test_a_phase_reads_it_and_the_run_says_whose_it_was(config: TrainConfig, teller: Path):
    states = states_of(config)
    assert [state["tokens_by_collection"]["told"] for state in states[:4]] == [0] * 4
    assert [state["told_by"] for state in states[:4]] == [{}] * 4
    last = states[-1]
    assert 0 < last["tokens_by_collection"]["told"] < 2 * ROW_TOKENS
    assert last["told_by"] == {file_sha256(teller / TENSORS): "teller"}
    data = load_tokens(config)
    told = ["".join(f"{token} " for token in story) for story in documents_of(config.told_dir, "told")]
    rows = [
        data.mixture.rows(number, 1)[0].tolist()
        for number in range(TOLD_FROM // 32, TOLD_FROM // 32 + 20)
        if data.mixture.collections(number, 1) == ["told"]
    ]
    everything = " ".join(told)
    assert len(rows) > 3
    for row in rows:
        whole = [part for part in re.split(r"(?=\b1 )", "".join(f"{token} " for token in row[:-1])) if part]
        assert all(part in everything for part in whole)


def test_a_run_without_it_goes_on_with_it_and_not_back(plain: TrainConfig, config: TrainConfig):
    shorter = plain.model_copy(update={"run": plain.run.model_copy(update={"tokens": TOLD_FROM})})
    before = states_of(shorter)[-1]
    check_continues(before, config, load_tokens(config))
    after = states_of(config, before)[-1]
    assert after["tokens_by_collection"]["told"] > 0
    longer = plain.model_copy(update={"run": plain.run.model_copy(update={"tokens": 2 * RUN["tokens"]})})
    with pytest.raises(ConfigError, match="not the mixture that the checkpoint saw"):
        check_continues(after, longer, load_tokens(longer))


def test_without_the_section_nothing_is_told(plain: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture):
    elsewhere = plain.model_copy(update={"workdir": tmp_path})
    tell(elsewhere)
    assert "told: nothing" in capsys.readouterr().out
    assert not elsewhere.told_dir.exists()


def test_told_stories_are_never_what_a_model_is_judged_on(config: TrainConfig):
    assert load_tokens(config).validation_collections == ["stories"]


def test_what_can_not_be_told_is_named(plain: TrainConfig, teller: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"tell.begin_tokens is 32: the context is 32"):
        tell(with_told(plain, teller, begin_tokens=32))
    elsewhere = with_told(plain.model_copy(update={"workdir": tmp_path}), teller)
    with pytest.raises(ConfigError, match=r"index.json is missing: run `python -m train.encode` first"):
        tell(elsewhere)
    shutil.copytree(plain.tokens_dir, elsewhere.tokens_dir)
    of_another(elsewhere.tokens_dir, "tokenizer_sha256")
    with pytest.raises(ConfigError, match=r"tell.model: .*teller has another tokenizer"):
        tell(elsewhere)
    assert not elsewhere.told_dir.exists()


def of_another(directory: Path, key: str) -> None:
    path = directory / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "0" * 64}))


def test_what_was_not_told_of_these_tokens_is_not_read(config: TrainConfig, tmp_path: Path):
    elsewhere = config.model_copy(update={"workdir": tmp_path})
    shutil.copytree(config.tokens_dir, elsewhere.tokens_dir)
    with pytest.raises(ConfigError, match=r"told/index.json is missing: run `python -m train.tell` first"):
        load_tokens(elsewhere)
    shutil.copytree(config.told_dir, elsewhere.told_dir)
    load_tokens(elsewhere)
    of_another(elsewhere.told_dir, "text_sha256")
    with pytest.raises(ConfigError, match=r"told was begun from other tokens: run `python -m train.tell` again"):
        load_tokens(elsewhere)


def test_a_model_that_never_ends_is_given_up(plain: TrainConfig, tmp_path: Path):
    tokenizer = Tokenizer(plain.tokenizer_path)
    config = ModelConfig(vocab_size=400, hidden_size=32, n_layers=1, n_heads=2, mlp_size=64, context=32)
    tensors = {name: tensor.numpy().copy() for name, tensor in GPT(config, seed=1).state_dict().items()}
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:] = np.abs(embedding) + 0.1  # all logits above 0, but for the boundary's
    embedding[config.boundary_id] *= -1
    np.save(tmp_path / "like.npy", np.array([config.boundary_id, 5, 6, 7], np.uint16))
    like = Documents([tmp_path / "like.npy"], config.boundary_id)
    settings = Tell(model=Path(), like="stories", begin_tokens=4)
    with pytest.raises(ConfigError, match=r"tell.model: of \d+ stories only 0 ended within 32 tokens: too few"):
        next(told_stories(tokenizer, Model(config, tensors), settings, like, 32, 0))
