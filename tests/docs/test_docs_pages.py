"""The pages: how-it-works.md and its pictures follow from code and results, and figures equal the committed results."""

import hashlib
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from helpers.docs_commands import PAGES
from matplotlib.image import imread

from docs.making import measure, page, pictures, training
from loadtest.bench import pages
from loadtest.bench.markdown import fill
from loadtest.results import result_file
from train.quantization_study import markdown

RESULTS = Path("docs/results")


def text_of(name: str) -> str:
    return " ".join(Path(name).read_text(encoding="utf-8").split())


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_how_it_works_matches_code_and_results() -> None:
    assert page.OUT.read_text(encoding="utf-8") == page.render(), "run python -m docs.making.page"


@pytest.mark.parametrize("name", sorted(pages.PAGES))
def test_tables_show_the_committed_results(name: str) -> None:
    text = (pages.DOCS / name).read_text(encoding="utf-8")
    assert text == fill(text, pages.PAGES[name](RESULTS)), "run python -m loadtest.bench.pages"


def test_pictures_show_what_the_released_model_computes() -> None:
    """Everything except the times is computed again, and compared within rounding."""
    committed = json.loads(measure.OUT.read_text(encoding="utf-8"))
    for name, values in json.loads(json.dumps(measure.computed())).items():
        assert_near(values, committed[name], name)


def test_the_section_on_training_shows_the_demo() -> None:
    """The first steps are computed again. The later ones differ more from one processor to another."""
    steps = 10
    ours, theirs = training.training(measure.STORY + measure.ANSWER, steps), load("pictures.json")["training"]
    curve = theirs.pop("curve")
    assert_near(ours.pop("curve"), {name: values[:2] for name, values in curve.items()}, "curve")
    assert_near(ours, theirs, "training")
    assert curve["steps"] == [*range(0, curve["steps"][-1] + 1, steps)]
    slope, step = theirs["derivative"], theirs["one_step"]
    assert slope["difference"] == pytest.approx(slope["autograd"], rel=2e-3)
    assert step["loss_before"] == pytest.approx(math.log(theirs["vocab_size"]), rel=0.01)
    assert curve["rows"][-1] < step["loss_after"] < step["loss_before"]


def assert_near(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(ours, dict):
        for key, value in ours.items():
            assert_near(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_near(one, other, f"{where}[{i}]")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=2e-3, rel=2e-3), where
    elif "kept_by_top_p" in where or ".ranks" in where or ".after[" in where:  # a tie may fall either way
        assert ours == pytest.approx(theirs, abs=2, rel=0.02), where
    else:
        assert ours == theirs, where


def test_every_drawn_picture_is_on_the_page(tmp_path: Path) -> None:
    text = page.OUT.read_text(encoding="utf-8")
    for path in pictures.draw(tmp_path):
        assert f"](images/{path.name})" in text
        assert imread(path).shape == imread(pictures.OUT / path.name).shape


def test_every_committed_picture_is_on_a_page() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [path.name for path in pictures.OUT.glob("*.png") if f"images/{path.name})" not in text] == []


def test_the_readme_shows_measured_engine_speeds() -> None:
    readme = text_of("README.md")
    rows = {row["batch"]: row for row in load("bench.json")["decode"]}
    for batch in (1, 4, 16):
        row = rows[batch]
        shares = f"{row['share_of_bandwidth']:.0%} | {row['share_of_peak']:.0%}"
        assert f"| {batch} | {row['tokens_per_s']:,.0f} | {shares} |" in readme
    ratios = load("peers.json")["ratios"]["tinylm / best of the others"]
    one, four, sixteen = (f"{ratios[f'decode {batch}']:.2f}" for batch in (1, 4, 16))
    assert f"{one}, {four} and {sixteen} times as fast as the best" in readme


def test_the_readme_shows_measured_service_speeds() -> None:
    readme = text_of("README.md")
    runs = result_file.read(RESULTS / "standard/haproxy-unary.json")["runs"]
    rates: dict[int, list[float]] = {}
    for run in runs:
        rates.setdefault(run["load"]["concurrency"], []).append(run["requests_per_s"])
    four, sixteen = (sum(rates[n]) / len(rates[n]) for n in (4, 16))
    assert f"{four:.0f} requests per second for 4 clients in all, and {sixteen:.0f} for 16" in readme


def test_the_readme_shows_measured_setup_and_quality() -> None:
    readme = text_of("README.md")
    serve = load("fresh-clone.json")["make_serve"]
    assert f"{serve['seconds_until_ready']} seconds and {serve['downloaded']['megabytes']} MB" in readme
    evaluation = json.loads(Path("models/stories-8m/evaluation.json").read_text(encoding="utf-8"))
    score = evaluation["collections"]["tinystories"]["bits_per_byte"]
    assert f"{evaluation['tokens_seen'] / 1e6:.1f} million tokens" in readme
    assert f"{score:.4f} bits per byte on held-out TinyStories" in readme


def test_the_training_page_shows_measured_weight_formats() -> None:
    study = load("quantization.json")
    for row in study["formats"]:
        row["decode_tokens_per_cpu_s"] = None  # the page shows no speeds
    assert markdown(study) in Path("docs/training.md").read_text(encoding="utf-8")


def test_the_comparison_page_shows_measured_figures() -> None:
    text = Path("docs/evaluate.md").read_text(encoding="utf-8")
    result = load("lm-eval.json")
    by_harness = [run for run in result["runs"] if run["program"].startswith("lm-evaluation-harness")]
    assert {run["arithmetic"] for run in by_harness} == {"int8", "float32"}
    for run in by_harness:
        figures = run["results"]
        shown = [f"{100 * figures[f'tinylm_{kind}']:.1f} %" for kind in ("endings", "names", "order")]
        assert f"| {run['arithmetic']} | " in text
        assert f" | {' | '.join(shown)} | {figures['tinylm_text']:.4f} |" in text
        assert f"lm_eval=={result['versions']['lm_eval']}" in text.replace("lm-eval[api,hf]", "lm_eval")
    assert f"is right for {100 * by_harness[0]['results']['tinylm_last_word']:.1f} % of the passages" in text


def test_lm_evaluation_harness_gave_the_figures_of_train_evaluate() -> None:
    result = load("lm-eval.json")
    assert result["data"]["sha256"] == hashlib.sha256(Path("evals/tinylm.jsonl").read_bytes()).hexdigest()
    ours = {run["arithmetic"]: run["results"] for run in result["runs"] if run["program"] == "train.evaluate"}
    for run in result["runs"]:
        for name, figure in ours[run["arithmetic"]].items():
            assert run["results"][name] == pytest.approx(figure, abs=1e-4), (run["program"], name)


def test_the_usage_page_shows_measured_http_latency() -> None:
    grpc, http = (
        median(run["latency_ms"]["p50"] for run in load(f"face-{protocol}.json")["runs"])
        for protocol in ("grpc", "http")
    )
    assert f"{grpc:.1f} ms for 64 tokens over gRPC and {http:.1f} ms over HTTP" in text_of("docs/use.md")


def test_the_serving_page_shows_measured_overload() -> None:
    text = text_of("docs/serve.md")
    (double,) = [above["rounds"] for above in load("overload.json")["above"] if above["factor"] == 2]
    kept = [100 * found["kept_throughput"] for found in double]
    assert f"keeps {min(kept):.0f} to {max(kept):.0f} % of its best throughput" in text
    slowest = max(found["refused_p99_ms"] for above in load("overload.json")["above"] for found in above["rounds"])
    assert f"within {slowest:.0f} ms at p99" in text


def test_an_excerpt_that_the_code_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"tinylm/config\.py has no lines from 'nowhere'"):
        page.excerpt("tinylm/config.py", "nowhere", "anywhere")
