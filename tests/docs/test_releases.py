"""`docs.making.releases` measures every release on the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.train import write_parquet

from docs.making import releases
from train.demo_text import demo_text

MODEL = "models/stories-8m"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a config whose text is prepared: stories of new and old sources, and another collection."""
    directory = tmp_path_factory.mktemp("releases")
    texts = [f"Once upon a time {story}" for story in demo_text(60, seed=1).split("<|endoftext|>")]
    sources = [f"tinystories-{'misc' if n % 2 else 'cased'}#{n}" for n in range(len(texts))]
    collections = [
        {"name": name, "weight": 1, "source": str(write_parquet(directory / f"{name}.parquet", columns))}
        for name, columns in {
            releases.STORIES: {"text": texts, "source": sources},
            "books": {"text": demo_text(40, seed=2).split("<|endoftext|>")},
        }.items()
    ]
    values = {
        "name": "compared",
        "workdir": str(directory / "data"),
        "prepare": {"collections": collections, "validation_share": 0.4},
        "export": {"n_stories": 2},
    }
    path = directory / "compared.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    releases.prepare(releases.load_config(path))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["releases", *map(str, arguments)])
    releases.main()


def test_a_release_equals_itself(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only stories of new sources count."""
    out = tmp_path / "releases.json"
    command(monkeypatch, "--config", config, "--out", out, f"first={MODEL}", f"second={MODEL}")
    found = json.loads(out.read_text(encoding="utf-8"))
    first, second = found["releases"].values()
    assert first == second
    assert set(found["ratio_of_bits_per_byte"]["second"].values()) == {1.0}
    scored = releases.held_out(releases.load_config(config))[0]
    assert {document.source.split("#")[0] for document in scored} == {"tinystories-misc"}
    assert first["collections"][releases.STORIES]["documents"] == len(scored)
    assert first["stories"]["texts"] == 2
    assert found["held_out_stories_from_once_upon_a_time"]["texts"] == len(scored)


@pytest.mark.parametrize(
    ("release", "message"), [(MODEL, "is no NAME=DIRECTORY"), ("none=no/such/model", "no/such/model")]
)
def test_a_wrong_release_is_named(
    config: Path, release: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        command(monkeypatch, "--config", config, release)
    assert message in capsys.readouterr().err
