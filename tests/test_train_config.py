"""Settings: a mistake in the file or on the command line is named in one line, never a traceback or silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from train_fixtures import ROOT

from train.config import ConfigError, load_config

COMMITTED = sorted({*(ROOT / "configs").glob("*train*.yaml"), ROOT / "configs" / "stories-8m.yaml"})
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


def test_the_committed_configs_are_there():
    assert {"train.yaml", "train-demo.yaml", "stories-8m.yaml"} <= {path.name for path in COMMITTED}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_configs_load(path: Path):
    config = load_config(path)
    assert config.run.batch_rows % (config.run.micro_rows * config.run.workers) == 0
    # Text without a licence and a name can't be credited on the model card.
    assert all(collection.licence or path.name == "stories-8m.yaml" for collection in config.prepare.collections)
    assert all(collection.attribution for collection in config.prepare.collections)


def test_overrides_reach_every_kind_of_key(path: Path):
    config = load_config(
        path,
        [
            "run.tokens=2e6",
            "run.muon_lr=3e-2",
            "run.adamw_betas=[0.8, 0.9]",
            "run.sample_prompt=There was a dog",
            "model.hidden_size=64",
            "model.n_heads=2",
            "prepare.collections.1.weight=0.5",
            "prepare.collections.0.minimum.simplicity=0.9",
            "prepare.max_documents=null",
            "workdir=elsewhere",
        ],
    )
    assert (config.run.tokens, config.run.muon_lr, config.run.adamw_betas) == (2_000_000, 0.03, (0.8, 0.9))
    assert config.run.sample_prompt == "There was a dog"
    assert (config.model_config_.hidden_size, config.model_config_.n_heads) == (64, 2)
    assert [collection.weight for collection in config.prepare.collections] == [1, 0.5]
    assert config.prepare.collections[0].minimum == {"simplicity": 0.9}
    assert config.prepare.max_documents is None
    assert config.run_dir == Path("elsewhere/runs/m")


def test_overrides_leave_the_rest_alone(path: Path):
    plain, changed = load_config(path).model_dump(), load_config(path, ["run.tokens=5"]).model_dump()
    assert changed["run"].pop("tokens") == 5
    assert plain["run"].pop("tokens") != 5
    assert changed == plain


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.token=5", "run.token"),  # unknown, a letter short
        ("runs.tokens=5", "runs"),
        ("run.tokens=many", "run.tokens"),
        ("run.tokens=0", "run.tokens"),
        ("run.tokens=2.5", "run.tokens"),
        ("run.tokens=nan", "run.tokens"),
        ("run.tokens=", "run.tokens"),
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
        ("name=..", "name"),
        ("seed=-1", "seed"),
        ("seed=1e20", "seed"),
        ("run.adamw_betas=[1.5, 0.9]", "run.adamw_betas.0"),
        ("run.muon_lr=inf", "run.muon_lr"),
        ("run.dropout=0.95", "run.dropout"),
        ("run.dropout={nothing: 0.1}", "run.dropout: 'nothing' is not among the collections"),
        ("run.taught={nothing: 0.1}", "run.taught: 'nothing' is not among the collections"),
        ("run.taught=1.5", "run.taught"),
        ("run.taught={a: 2}", "run.taught.a: Input should be less than or equal to 1 (given: 2)"),
        ("run.dropout={a: 2}", "run.dropout.a: Input should be less than or equal to 0.9 (given: 2)"),
        ("prepare.collections.0.weight=inf", "prepare.collections.0.weight"),
        ("model.vocab_size=100000", "model.vocab_size is 100000"),
        ("model.context=1", "model.context is 1"),
        ("model.rope_theta=abc", "rope_theta is 'abc'"),
        ("model.boundary_id=1.5", "boundary_id is 1.5"),
        ("export.sample_temperature=1000", "temperature is 1000"),
    ],
)
def test_wrong_overrides_are_named_in_one_line(path: Path, override: str, named: str):
    with pytest.raises(ConfigError) as raised:
        load_config(path, [override])
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("content", [b"name: [", b"- just\n- a list", b"", b"name: \xff\xfe"])
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, content: bytes):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(file)


def test_a_directory_is_no_config(tmp_path: Path):
    with pytest.raises(ConfigError, match=tmp_path.name):
        load_config(tmp_path)


@pytest.mark.parametrize("key", ["name", "prepare"])
def test_a_missing_key_is_named(path: Path, key: str):
    path.write_text(yaml.safe_dump({name: value for name, value in MINIMAL.items() if name != key}), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{key}: Field required"):
        load_config(path)


@pytest.mark.parametrize(
    ("phases", "named"),
    [
        ("[{from_tokens: 9, weights: {a: 1}}, {from_tokens: 9, weights: {a: 2}}]", "[9, 9]"),
        ("[{from_tokens: 0, weights: {b: 1}}]", "'b' is not among the collections with a weight above 0, a"),
        ("[{from_tokens: 0, weights: {a: 0}}]", "{'a': 0"),
        ("[{from_tokens: 0, weights: {a: -1}}]", "{'a': -1"),
        ("[{from_tokens: -1, weights: {a: 1}}]", "greater than or equal to 0"),
        ("[{from_tokens: 0, weights: {a: 1}, lengths: {b: {most: 9}}}]", "lengths are given of 'b'"),
        ("[{from_tokens: 0, weights: {a: 1}, lengths: {a: {least: 9, most: 8}}}]", "least is 9, above most, 8"),
    ],
)
def test_phases_that_can_not_be_are_named(path: Path, phases: str, named: str):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"run.phases={phases}"])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("taught", ["0", "{}", "{a: 0}"])
def test_teachers_of_nothing_are_named(path: Path, taught: str):
    teach = "teach={models: [models/stories-8m], collections: [a]}"
    with pytest.raises(ConfigError, match=r"run.taught is .*: nothing would be learnt of what is said of 'a'"):
        load_config(path, [teach, f"run.taught={taught}"])
    assert load_config(path, [f"run.taught={taught}"]).taught_of("a") == 0
    assert load_config(path, [teach]).taught_of("a") == 0.5


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["run.phases=[{from_tokens: 0, weights: {told: 1}}]"], "above 0, a, and nothing is told without `tell`"),
        (["tell={model: m, like: b}"], "tell.like: 'b' is not among the collections with a weight above 0"),
        (["tell={model: m, like: a}", "prepare.collections.0.name=told"], "'told' is what `tell` makes"),
        (["teach={models: [], collections: [a]}"], "teach.models: List should have at least 1 item"),
        (["teach={models: [m], collections: [told]}"], "teach.collections: 'told' is not among those"),
        (
            ["tell={model: m, like: a}", "teach={models: [m], collections: [told]}", "run.taught={a: 1}"],
            "run.taught: 'a' is not among teach.collections",
        ),
        (["tell={model: m, like: a, top_p: 0}"], "tell.top_p: Input should be greater than 0"),
        (["tell={model: m, like: a, temperature: 11}"], "temperature is 11"),
        (["tell={model: m, like: a, without: '('}"], "tell.without: Input should be a valid regular expression"),
    ],
)
def test_what_can_not_be_told_or_taught_is_named(path: Path, overrides: list[str], named: str):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_told_stories_may_be_read_taught_and_dropped(path: Path):
    told = ["tell={model: m, like: a}", "run.phases=[{from_tokens: 9, weights: {told: 1}}]", "run.dropout={told: 0.1}"]
    config = load_config(path, [*told, "teach={models: [m], collections: [told]}", "run.taught={told: 1}"])
    assert (config.taught_of("told"), config.taught_of("a"), config.run.dropout_of("told")) == (1, 0, 0.1)
