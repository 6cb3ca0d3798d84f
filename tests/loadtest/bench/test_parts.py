"""The parts of a decode step, in each form of the kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.bench import parts
from loadtest.bench.revisions import FORMS
from tinylm.kernels.numba import describe

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.chaos
def test_the_parts_add_up_in_this_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that the processor does not have is left out."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(FORMS, "sse9", ())
    form = describe().removeprefix("numba, ")
    if form not in FORMS:
        pytest.skip("the command does not know the form of the kernels of this CPU")
    out = tmp_path / "parts.json"
    parts.main(out, "2", f"{form},sse9", here=False)
    result = json.loads(out.read_text(encoding="utf-8"))["forms"]
    assert list(result) == [form]
    times, least = (result[form]["2"][key] for key in ("microseconds", "least_microseconds"))
    whole = times.pop("whole step")
    assert sum(times.values()) == pytest.approx(whole, abs=1)
    assert set(parts.PARTS) < set(times)
    assert all(least[part] > 0 for part in ("matmuls", "attention"))


def test_an_unknown_form_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parts.main(None, "1", "avx512-vnni,mmx", here=False)
    assert "--forms has mmx: it must be some of avx512-vnni+amx, avx512-vnni, avx2" in capsys.readouterr().err
