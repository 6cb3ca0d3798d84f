"""Going on from a released model when its run's checkpoints are gone, and what is refused of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from train_fixtures import ROW_TOKENS, encoded_stories, short_run

from tinylm.tokenizer import Tokenizer
from tinylm.weights import ModelError, save_model
from train.config import ConfigError, Teach, TrainConfig
from train.files import file_sha256
from train.loop import lr_factor, train
from train.restore import restored_state
from train.stage import load_tokens
from train.state import averaged_weights, check_continues
from train.teach import teach

STEPS = 40
RUN = short_run(STEPS)
OTHER_LENGTHS = {"from_tokens": 0, "weights": {"stories": 1}, "lengths": {"stories": {"least": 2, "most": 30}}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return encoded_stories(tmp_path_factory.mktemp("restore"), RUN)


def arrays(state: dict) -> dict:
    return {name: tensor.numpy() for name, tensor in averaged_weights(state).items()}


def run_on(config: TrainConfig, state: dict | None, **run: object) -> tuple[dict, list[dict]]:
    """The last state that a run saves, and its logged lines."""
    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
    lines: list[dict] = []
    states: list[dict] = []
    train(config, load_tokens(config), Tokenizer(config.tokenizer_path), lines.append, states.append, state)
    return states[-1], lines


@pytest.fixture(scope="module")
def first(config: TrainConfig) -> tuple[dict, list[dict]]:
    return run_on(config, None)


@pytest.fixture
def released(config: TrainConfig, first: tuple[dict, list[dict]], tmp_path: Path) -> Path:
    """The first run's model as `train.export` lays it out, without what is for people only."""
    state, _ = first
    record = {
        "step": state["step"],
        "tokens_seen": state["step"] * ROW_TOKENS,
        "tokens_by_collection": state["tokens_by_collection"],
        "training_wall_s": state["wall_s"],
        "training_machine": "an abacus",
        "seed": config.seed,
        "optimizer": "muon",
        "text_sha256": state["text_sha256"],
        "taught_by": {"0" * 64: "an older model"},
    }
    save_model(
        tmp_path / "model",
        config.model_config_,
        arrays(state),
        config.tokenizer_path.read_bytes(),
        extra_files={"evaluation.json": json.dumps(record).encode()},
    )
    return tmp_path / "model"


def longer(config: TrainConfig, **run: object) -> TrainConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"tokens": 2 * STEPS * ROW_TOKENS, **run})})


def test_a_run_goes_on_where_its_released_model_ended(config: TrainConfig, first, released: Path):
    state, lines = first
    config = longer(config)
    restored = restored_state(released, config, load_tokens(config))
    ours, theirs = (averaged_weights(of) for of in (restored, state))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        step = abs(tensor).max() / 127 / 2  # half of the coarsest row's step of int8
        assert abs(ours[name] - tensor).max() <= step * 1.001
    last, more = run_on(config, restored)
    assert [line["step"] for line in more if "loss" in line] == list(range(STEPS + 1, 2 * STEPS + 1))
    assert more[0]["loss"] < lines[0]["loss"] - 0.5  # it did not begin anew
    assert more[-1]["val_bpb"]["stories"] < lines[-1]["val_bpb"]["stories"]
    assert last["tokens_by_collection"] == {"stories": 2 * STEPS * ROW_TOKENS}
    assert last["wall_s"] > state["wall_s"]
    assert re.match(r"an abacus, then \d+ threads? of ", last["machine"])
    again, _ = run_on(longer(config, tokens=3 * STEPS * ROW_TOKENS), last)
    assert again["machine"] == last["machine"]  # and not named once more


def test_who_taught_a_model_stays_known(config: TrainConfig, released: Path):
    """Also where others teach it from there on."""
    config = longer(config).model_copy(update={"teach": Teach(models=[released], collections=["stories"])})
    teach(config)
    last, _ = run_on(config, restored_state(released, config, load_tokens(config)))
    assert last["taught_by"] == {"0" * 64: "an older model", file_sha256(released / "model.safetensors"): "model"}


@pytest.mark.parametrize(
    ("run", "error"),
    [
        ({"tokens": STEPS * ROW_TOKENS}, "run.tokens is 10,240, but .* has seen 10,240 already"),
        ({"batch_rows": 16}, "run.batch_rows is 16, but .* saw its 10,240 tokens in 40 steps"),
    ],
)
def test_a_run_that_it_is_not_of_is_named(config: TrainConfig, released: Path, run: dict, error: str):
    config = longer(config, **run)
    with pytest.raises(ConfigError, match=error):
        restored_state(released, config, load_tokens(config))


@pytest.mark.parametrize(
    ("recorded", "error"),
    [
        ({"text_sha256": "0" * 64}, "was trained on other text"),
        ({"seed": 2}, "seed is 1, but the checkpoint was trained with 2"),
        ({"optimizer": "adamw"}, "run.optimizer is 'muon', but the checkpoint was trained with 'adamw'"),
        ({"phases": [OTHER_LENGTHS]}, "not the mixture that the checkpoint saw"),
        ({"tokens_by_collection": {"stories": 7}}, "not the mixture that the checkpoint saw"),
    ],
)
def test_a_run_that_began_otherwise_is_refused(config: TrainConfig, released: Path, recorded: dict, error: str):
    path = released / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **recorded}))
    config = longer(config)
    with pytest.raises(ConfigError, match=error):
        check_continues(restored_state(released, config, load_tokens(config)), config, load_tokens(config))


def test_another_shape_is_refused(config: TrainConfig, released: Path):
    other = longer(config).model_copy(update={"model": {**config.model, "n_layers": 3}})
    with pytest.raises(ConfigError, match="a model of another shape"):
        restored_state(released, other, load_tokens(config))


def test_another_tokenizer_is_refused(config: TrainConfig, first, released: Path, tmp_path: Path):
    tokenizer = (Path(__file__).parents[1] / "models/stories-8m/tokenizer.model").read_bytes()
    record = (released / "evaluation.json").read_bytes()
    shutil.rmtree(released)
    save_model(released, config.model_config_, arrays(first[0]), tokenizer, extra_files={"evaluation.json": record})
    with pytest.raises(ConfigError, match="the tokens were not made with"):
        restored_state(released, longer(config), load_tokens(config))


@pytest.mark.parametrize("record", [None, "{", "[]", '{"step": 3}'])
def test_a_model_without_the_record_of_its_run_is_refused(config: TrainConfig, released: Path, record: str | None):
    (released / "evaluation.json").unlink() if record is None else (released / "evaluation.json").write_text(record)
    with pytest.raises(ConfigError, match="is not the record of a run"):
        restored_state(released, longer(config), load_tokens(config))


def test_a_damaged_model_is_refused(config: TrainConfig, released: Path):
    weights = released / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        restored_state(released, longer(config), load_tokens(config))


def test_optimizers_begin_anew_and_warm_up(config: TrainConfig, released: Path):
    config = longer(config, warmup_steps=9)
    restored = restored_state(released, config, load_tokens(config))
    assert [optimizer["state"] for optimizer in restored["optimizers"]] == [{}, {}]
    last, lines = run_on(config, restored)
    rates = [line["lr"] for line in lines if "loss" in line]
    assert rates[0] < rates[4] < rates[9]
    assert rates[0] == pytest.approx(lr_factor(STEPS, 2 * STEPS, config.run) / 10, abs=1e-4)
    assert last["begun_at"] == STEPS
