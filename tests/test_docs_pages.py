"""Pages that are made from code and results are as these are now, and what their pictures show is computed again."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

import tinylm
from docs.making import measure, page, pictures, reference

RESULT = json.loads(measure.OUT.read_text(encoding="utf-8"))


def test_the_page_is_what_its_template_the_code_and_the_results_make() -> None:
    assert page.OUT.read_text(encoding="utf-8") == page.render(), "make pictures, or python -m docs.making.page"


def test_an_excerpt_that_is_gone_from_the_code_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"tinylm/config\.py has no lines from 'nowhere'"):
        page.excerpt("tinylm/config.py", "nowhere", "anywhere")


@pytest.mark.parametrize("name", sorted(reference.PAGES))
def test_the_reference_is_what_proto_docstrings_and_command_line_say(name: str) -> None:
    assert (reference.OUT / name).read_text(encoding="utf-8") == reference.PAGES[name](), "make reference"


def test_the_reference_has_what_the_package_exports() -> None:
    headings = set((reference.OUT / "python.md").read_text(encoding="utf-8").splitlines())
    assert {f"### {name}" for name in tinylm.__all__ if not name.startswith("_")} <= headings


def test_what_the_pictures_show_is_computed_again_from_the_committed_model() -> None:
    """All but the times; in numbers that rounding of another processor can't change."""
    again = json.loads(json.dumps(measure.computed()))
    assert again.keys() == RESULT.keys() & again.keys()
    for name, values in again.items():
        assert_near(values, RESULT[name], name)


def assert_near(ours: object, theirs: object, where: str) -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_near(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_near(one, other, f"{where}[{i}]")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=2e-3, rel=2e-3), where
    elif "kept_by_top_p" in where or ".ranks" in where or ".after[" in where:  # a tie may fall either way
        assert ours == pytest.approx(theirs, abs=2, rel=0.02), where
    else:
        assert ours == theirs, where


def test_the_cache_is_what_makes_long_texts_affordable() -> None:
    cache = RESULT["cache"]
    assert cache["with_ms"][-1] < cache["without_ms"][-1]
    assert RESULT["revision"]
    assert RESULT["machine"]["processor"]


def test_every_picture_is_drawn_and_stands_on_the_page(tmp_path: Path) -> None:
    text = page.OUT.read_text(encoding="utf-8")
    drawn = pictures.draw(tmp_path)
    assert {f"](images/{path.name})" in text for path in drawn} == {True}
    for path in drawn:
        committed = imread(pictures.OUT / path.name)
        assert imread(path).shape == committed.shape
        assert committed.std() > 0.05  # something is on it
