"""Settings: an error in the file or on the command line is one line that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.train import ROOT

from train.config import ConfigError, load_config

COMMITTED = [ROOT / "configs" / f"{name}.yaml" for name in ("train", "train-demo", "fine-tune", "stories-8m")]
MINIMAL = {
    "name": "m",
    "prepare": {
        "collections": [{"name": "a", "source": "a.txt", "weight": 1}, {"name": "b", "source": "b.txt", "weight": 0}]
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return file


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_configs_load(path: Path):
    config = load_config(path)
    assert config.run.batch_rows % (config.run.micro_rows * config.run.workers) == 0
    # The model card credits the text by its licence and attribution.
    assert all(collection.licence or path.name == "stories-8m.yaml" for collection in config.prepare.collections)
    assert all(collection.attribution for collection in config.prepare.collections)


def test_overrides_reach_every_kind_of_key(path: Path):
    config = load_config(
        path,
        [
            "run.tokens=2e6",
            "run.muon_lr=3e-2",
            "run.dropout={a: 0.1}",
            "run.sample_prompt=There was a dog",
            "model.hidden_size=64",
            "model.n_heads=2",
            "prepare.collections.1.weight=0.5",
            "prepare.collections.0.minimum.simplicity=0.9",
            "prepare.max_documents=null",
            "workdir=elsewhere",
        ],
    )
    assert (config.run.tokens, config.run.muon_lr, config.run.dropout) == (2_000_000, 0.03, {"a": 0.1})
    assert config.run.sample_prompt == "There was a dog"
    assert (config.shape.hidden_size, config.shape.n_heads) == (64, 2)
    assert [collection.weight for collection in config.prepare.collections] == [1, 0.5]
    assert config.prepare.collections[0].minimum == {"simplicity": 0.9}
    assert config.prepare.max_documents is None
    assert config.run_dir == Path("elsewhere/runs/m")


def test_a_run_has_at_least_one_step(path: Path):
    assert load_config(path, ["run.tokens=8191", "run.batch_rows=4"]).steps == 7
    assert load_config(path, ["run.tokens=1"]).steps == 1


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.token=5", "run.token"),  # unknown, a letter short
        ("runs.tokens=5", "runs"),
        ("run.tokens=many", "run.tokens"),
        ("run.tokens=0", "run.tokens"),
        ("run.tokens=2.5", "run.tokens"),
        ("run.tokens=[1", "run.tokens"),  # not YAML
        ("run.sample_prompt=a: b: c", "run.sample_prompt"),
        ("run.tokens", "run.tokens"),  # no value
        ("=5", "=5"),
        ("name.first=5", "name.first"),
        ("prepare.collections.7.weight=1", "prepare.collections.7.weight"),
        ("prepare.collections.first.weight=1", "prepare.collections.first.weight"),
        ("prepare.collections.0.weight=-1", "prepare.collections.0.weight"),
        ("prepare.collections.0.weight=0", "weight 0"),  # of every collection
        ("prepare.collections.1.name=a", "'a' is named twice"),
        ("prepare.validation_share=1", "prepare.validation_share"),
        ("model.hiden_size=64", "hiden_size"),
        ("model.n_heads=5", "n_heads"),
        ("name=../m", "name"),
        ("seed=-1", "seed"),
        ("run.muon_lr=inf", "run.muon_lr"),
        ("run.dropout=0.95", "run.dropout"),
        ("run.dropout={nothing: 0.1}", "run.dropout: 'nothing' is not among the collections"),
        ("run.dropout={a: 2}", "run.dropout.a: Input should be less than or equal to 0.9 (given: 2)"),
        ("run.final_share=0.1", "run.final_share is 0.1: run.final_max_tokens must name a collection"),
        ("run.final_max_tokens={nothing: 9}", "run.final_max_tokens: 'nothing' is not among the collections"),
        ("run.final_max_tokens={a: 0}", "run.final_max_tokens.a: Input should be greater than or equal to 1"),
        ("model.vocab_size=100000", "model.vocab_size is 100000"),
        ("model.context=1", "model.context is 1"),
        ("model.rope_theta=abc", "rope_theta is 'abc'"),
        ("export.sample_temperature=1000", "temperature is 1000"),
    ],
)
def test_a_wrong_override_is_named_in_one_line(path: Path, override: str, named: str):
    with pytest.raises(ConfigError) as raised:
        load_config(path, [override])
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_hash_of_the_settings_ignores_directories(path: Path):
    config = load_config(path)
    assert load_config(path, ["workdir=elsewhere", "models_dir=/models"]).sha256 == config.sha256
    assert len({load_config(path, [f"run.tokens={n}"]).sha256 for n in (1, 2)} | {config.sha256}) == 3


def test_final_rows_begin_with_a_whole_step(path: Path):
    settings = ["run.tokens=1e6", "run.batch_rows=8", "run.final_max_tokens={a: 99}"]
    for share in (0, 0.1, 0.33, 1):
        config = load_config(path, [*settings, f"run.final_share={share}"])
        assert config.final_row % 8 == 0
        assert abs(config.final_row / 8 - config.steps * (1 - share)) <= 0.5


@pytest.mark.parametrize("content", [b"name: [", b"- just\n- a list", b"", b"name: \xff\xfe", None])
def test_a_file_without_settings_is_named(tmp_path: Path, content: bytes | None):
    file = tmp_path / "broken.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.yaml") as raised:
        load_config(file)
    assert "\n" not in str(raised.value)


def test_a_directory_is_not_a_config(tmp_path: Path):
    with pytest.raises(ConfigError, match=tmp_path.name):
        load_config(tmp_path)


def test_fine_tuning_does_not_replace_its_start(path: Path):
    with pytest.raises(ConfigError, match="is start_from and would be replaced"):
        load_config(path, ["name=released", "models_dir=models", "start_from=elsewhere/../models/released"])


@pytest.mark.parametrize("key", ["name", "prepare"])
def test_a_missing_key_is_named(path: Path, key: str):
    path.write_text(yaml.safe_dump({name: value for name, value in MINIMAL.items() if name != key}), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{key}: Field required"):
        load_config(path)


def test_the_released_config_has_the_hash_of_the_released_model():
    """A setting that is added later must not change it, or the config would no longer be the model's."""
    evaluation = json.loads((ROOT / "models/stories-8m/evaluation.json").read_text())
    assert load_config(ROOT / "configs/stories-8m.yaml").sha256 == evaluation["config_sha256"]
