"""A run's weights averaged with those of released models: the mean, whose it is, and what is refused."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path

import numpy as np
import pytest
from train_fixtures import encoded_stories, release, short_run

from tinylm.weights import TENSORS, ModelError, as_float32, load_model
from train.averaging import averaged_with
from train.config import ConfigError, TrainConfig
from train.data import TokenData
from train.files import file_sha256
from train.restore import restored_state
from train.stage import load_tokens

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return encoded_stories(tmp_path_factory.mktemp("averaging"), short_run(2 * STEPS))


@pytest.fixture(scope="module")
def data(config: TrainConfig) -> TokenData:
    return load_tokens(config)


def recorded(config: TrainConfig, data: TokenData, directory: Path, seed: int, **record: object) -> Path:
    """A model of random weights with the record of a run."""
    release(config, directory, seed, **record.pop("shape", {}))
    made = {
        "step": STEPS,
        "tokens_seen": STEPS * config.run.batch_rows * config.model_config_.context,
        "tokens_by_collection": {"stories": STEPS * config.run.batch_rows * config.model_config_.context},
        "training_wall_s": 1.0,
        "training_machine": "an abacus",
        "seed": config.seed,
        "optimizer": "muon",
        "text_sha256": data.text_sha256,
        **record,
    }
    (directory / "evaluation.json").write_text(json.dumps(made))
    return directory


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {name: as_float32(tensor) for name, tensor in load_model(directory)[1].items()}


def test_it_is_the_mean_of_all_in_equal_parts_and_says_whose(config: TrainConfig, data: TokenData, tmp_path: Path):
    models = [recorded(config, data, tmp_path / name, seed) for seed, name in enumerate(("ours", "one", "two"))]
    each = [weights(model) for model in models]
    mean, names = averaged_with(each[0], models[1:], config.model_config_, data)
    assert names == {file_sha256(model / TENSORS): model.name for model in models[1:]}
    assert mean.keys() == each[0].keys()
    for name, tensor in mean.items():
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(tensor, np.mean([tensors[name] for tensors in each], axis=0), atol=1e-6)


def test_with_none_it_is_what_it_was(config: TrainConfig, data: TokenData, tmp_path: Path):
    ours = weights(recorded(config, data, tmp_path / "ours", 0))
    mean, names = averaged_with(ours, [], config.model_config_, data)
    assert names == {}
    assert all(np.array_equal(mean[name], ours[name]) for name in ours)


def test_with_whom_a_model_was_averaged_stays_known_where_a_run_goes_on_from_it(
    config: TrainConfig, data: TokenData, tmp_path: Path
):
    model = recorded(config, data, tmp_path / "model", 0, averaged_with={"0" * 64: "an older model"})
    assert restored_state(model, config, data)["averaged_with"] == {"0" * 64: "an older model"}


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"shape": {"n_layers": 1}}, "is a model of another shape"),
        ({"text_sha256": "0" * 64}, "was trained on other text"),
        ({"text_sha256": None}, "is not the record of a run: text_sha256"),
    ],
)
def test_what_is_of_another_run_is_named(
    config: TrainConfig, data: TokenData, tmp_path: Path, record: dict, error: str
):
    model = recorded(config, data, tmp_path / "other", 0, **record)
    with pytest.raises(ConfigError, match=rf"export.average_with: .*other.* {error}"):
        averaged_with({}, [model], config.model_config_, data)


def test_a_model_that_reads_otherwise_has_no_record_or_is_damaged_is_named(
    config: TrainConfig, data: TokenData, tmp_path: Path
):
    model = recorded(config, data, tmp_path / "model", 0)
    of_another = copy(data)
    of_another.tokenizer_sha256 = "0" * 64
    with pytest.raises(ConfigError, match="has another tokenizer"):
        averaged_with({}, [model], config.model_config_, of_another)
    (model / "evaluation.json").unlink()
    with pytest.raises(ConfigError, match=r"evaluation\.json is not the record of a run"):
        averaged_with({}, [model], config.model_config_, data)
    (model / TENSORS).write_bytes(b"")
    with pytest.raises(ModelError):
        averaged_with({}, [model], config.model_config_, data)
