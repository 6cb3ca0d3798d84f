"""The answers of a batch job: those of the library, alone and together, and errors in OpenAI's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.batch_jobs import lasting, line_of, mixed_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import LLM, SamplingParams
from tinylm.batch.engine import BatchEngine, EngineSettings


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> BatchEngine:
    return BatchEngine(EngineSettings(tiny_model_dir))


def response_to(engine: BatchEngine, line: str) -> tuple[int, dict]:
    """Return the status and the body of the answer to one line."""
    (answer,) = engine.answer([line])
    response = json.loads(answer.text)["response"]
    assert answer.failed == (response["status_code"] != 200)
    return response["status_code"], response["body"]


@settings(max_examples=20)
@given(st.lists(st.sampled_from(mixed_lines(30)), unique=True, max_size=12))
def test_an_answer_does_not_depend_on_the_other_lines(engine: BatchEngine, lines: list[str]) -> None:
    together = [answer.text for answer in engine.answer(lines)]
    alone = [engine.answer([line])[0].text for line in lines]
    assert list(map(lasting, together)) == list(map(lasting, alone))


def test_answers_are_those_of_the_library(engine: BatchEngine, tiny: LLM) -> None:
    prompts = ["The dog", "A fox"]
    status, body = response_to(engine, line_of("a", prompt=prompts, n=2, max_tokens=9, seed=4, temperature=0.9))
    params = [SamplingParams(max_tokens=9, temperature=0.9, top_p=1, seed=seed) for seed in (4, 5)]
    expected = [tiny.generate(prompt, own)[0] for prompt in prompts for own in params]
    assert status == 200
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == [completion.text for completion in expected]
    assert [choice["finish_reason"] for choice in body["choices"]] == [c.finish_reason for c in expected]
    n_prompt_tokens = expected[0].n_prompt_tokens + expected[2].n_prompt_tokens
    n_tokens = sum(len(completion.token_ids) for completion in expected)
    assert body["usage"] == {
        "prompt_tokens": n_prompt_tokens, "completion_tokens": n_tokens, "total_tokens": n_prompt_tokens + n_tokens,
    }  # fmt: skip
    assert (body["object"], body["model"]) == ("text_completion", "tiny")


def test_a_line_may_have_128_answers(engine: BatchEngine) -> None:
    lines = [line_of("a", prompt=["x"] * 64, n=2, max_tokens=2), line_of("b", prompt="x", max_tokens=2)]
    many, one = (json.loads(answer.text)["response"]["body"]["choices"] for answer in engine.answer(lines))
    assert (len(many), len(one)) == (128, 1)
    assert len({choice["text"] for choice in many}) > 64  # without a seed, all differ


def test_a_prompt_is_scored(engine: BatchEngine, tiny: LLM) -> None:
    text = "The dog ran"
    _, body = response_to(engine, line_of("a", prompt=text, echo=True, logprobs=1, max_tokens=0))
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    scores = [token.logprob for token in tiny.score(text)[0].logprobs]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize(
    ("body", "status", "kind", "param", "code", "message"),
    [
        ({"temperature": 11}, 400, "invalid_request_error", "temperature", None, "temperature is 11"),
        ({"prompt": "word " * 99}, 400, "invalid_request_error", "prompt", None, "prompt has"),
        ({"prompt": "x" * 70_000}, 400, "invalid_request_error", "prompt", None, "prompt has 70000 bytes"),
        ({"stop_token_ids": [4096], "n": 9}, 400, "invalid_request_error", "stop_token_ids", None, "4095"),
        ({"bad_words": ["\ud800"]}, 400, "invalid_request_error", "bad_words", None, "not Unicode"),
        ({"model": "gpt-2"}, 404, "invalid_request_error", "model", "model_not_found", "this job has only 'tiny'"),
        (
            {"max_tokens": 60, "ignore_eos": True, "timeout_ms": 1},
            504,
            "server_error",
            None,
            "timeout",
            "timeout_ms is 1",
        ),
    ],
)
def test_a_wrong_line_gets_an_error(
    engine: BatchEngine, body: dict, status: int, kind: str, param: str | None, code: str | None, message: str
) -> None:
    """The lines beside it get their answers."""
    lines = [line_of("a", max_tokens=3), line_of("b", **body), line_of("c", max_tokens=3)]
    first, wrong, last = (json.loads(answer.text) for answer in engine.answer(lines))
    assert wrong.keys() == {"id", "custom_id", "response", "error"}
    assert (wrong["custom_id"], wrong["error"], wrong["response"]["status_code"]) == ("b", None, status)
    error = wrong["response"]["body"]["error"]
    assert (error["type"], error["param"], error["code"]) == (kind, param, code)
    assert message in error["message"]
    assert [line["response"]["status_code"] for line in (first, last)] == [200, 200]
    assert not engine.has_work
