"""OpenAI's API with OpenAI's client and as plain HTTP. `test_proxies` has what both proxies and protocols share."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import openai
import pytest
from helpers.batch_jobs import line_of
from helpers.service import Service
from openai import DefaultHttpxClient, OpenAI

from tinylm import LLM, SamplingParams
from tinylm.batch.engine import BatchEngine, EngineSettings

PROMPT = "Once upon a time"
LIMIT_S = 30
SETTINGS = {"max_tokens": 32, "temperature": 0.9, "top_p": 0.9, "seed": 3}
pytestmark = pytest.mark.parametrize("shared_service", ["serve.yaml"], indirect=True)


@pytest.fixture
def service(shared_service: Service) -> Service:
    return shared_service


@pytest.fixture
def client(service: Service, http: DefaultHttpxClient) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0, http_client=http) as client:
        yield client


def test_whole_and_streamed_answers_are_the_library_s(client: OpenAI, stories: LLM) -> None:
    expected = stories.generate(PROMPT, SamplingParams(**SETTINGS, stop=("zz", "."), logprobs=3))[0]
    fields = {"model": "stories-8m", "prompt": PROMPT, "stop": ["zz", "."], "logprobs": 3, **SETTINGS}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    (choice,) = whole.choices
    assert choice.text == expected.text == "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert choice.finish_reason == expected.finish_reason == chunks[-2].choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        expected.n_prompt_tokens,
        len(expected.token_ids),
    )
    streamed = [chunk.choices[0].logprobs for chunk in chunks[:-1]]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for logprobs in streamed for value in getattr(logprobs, name)]
        assert joined == getattr(choice.logprobs, name)
    tokens, logprobs = choice.logprobs.tokens, choice.logprobs.token_logprobs
    assert "".join(tokens).startswith(expected.text)
    assert logprobs == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-4)
    for token, logprob, top in zip(tokens, logprobs, choice.logprobs.top_logprobs, strict=True):
        assert top[token] == logprob
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert 3 <= len(top) <= 4


def test_several_prompts_and_answers_are_what_each_is_alone(client: OpenAI, stories: LLM) -> None:
    prompts = [PROMPT, "The little dog"]
    together = client.completions.create(model="stories-8m", prompt=prompts, n=2, **SETTINGS)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    alone = [
        stories.generate(prompt, SamplingParams(**{**SETTINGS, "seed": seed}))[0]
        for prompt in prompts
        for seed in (3, 4)
    ]
    assert [choice.text for choice in together.choices] == [completion.text for completion in alone]
    assert together.usage.prompt_tokens == alone[0].n_prompt_tokens + alone[2].n_prompt_tokens
    assert together.usage.completion_tokens == sum(len(completion.token_ids) for completion in alone)
    texts = [""] * 4
    for chunk in client.completions.create(model="stories-8m", prompt=prompts, n=2, stream=True, **SETTINGS):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in together.choices]


def test_token_ids_equal_their_text_and_echo_repeats_the_prompt(client: OpenAI, stories: LLM) -> None:
    ids = stories.tokenizer.encode(PROMPT)
    texts = [
        client.completions.create(model="stories-8m", prompt=prompt, echo=True, **SETTINGS).choices[0].text
        for prompt in (PROMPT, ids, [stories.tokenizer.boundary_id, *ids], [ids])
    ]
    streamed = client.completions.create(model="stories-8m", prompt=PROMPT, echo=True, stream=True, **SETTINGS)
    texts.append("".join(chunk.choices[0].text for chunk in streamed))
    expected = stories.generate(PROMPT, SamplingParams(**SETTINGS))[0].text
    assert texts == [PROMPT + expected] * 5


def test_a_batch_of_prompts_larger_than_the_queue_is_answered(client: OpenAI, stories: LLM) -> None:
    """128 answers wait for each other, and a short request beside them does not wait for all."""
    prompts = [f"{PROMPT} {i}" for i in range(128)]
    fields = {"model": "stories-8m", "max_tokens": 4, "temperature": 0}
    with ThreadPoolExecutor(2) as pool:
        together = pool.submit(client.completions.create, prompt=prompts, **fields)
        assert client.completions.create(prompt=PROMPT, **fields).choices[0].text
        choices = together.result().choices
    expected = stories.generate(prompts, SamplingParams(max_tokens=4, temperature=0))
    assert [choice.text for choice in choices] == [completion.text for completion in expected]


def test_best_of_returns_the_most_likely_answers(client: OpenAI, stories: LLM) -> None:
    answer = client.completions.create(model="stories-8m", prompt=[PROMPT, "The dog"], n=2, best_of=4, **SETTINGS)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    found, n_tokens = iter(answer.choices), 0
    for prompt in (PROMPT, "The dog"):
        params = [SamplingParams(**{**SETTINGS, "seed": seed}, logprobs=0) for seed in range(3, 7)]
        completions = [stories.generate(prompt, settings)[0] for settings in params]
        completions.sort(key=lambda c: -sum(entry.logprob for entry in c.logprobs) / len(c.token_ids))
        assert [next(found).text, next(found).text] == [completion.text for completion in completions[:2]]
        n_tokens += sum(len(completion.token_ids) for completion in completions)
    assert answer.usage.completion_tokens == n_tokens
    assert answer.choices[0].logprobs is None


def test_a_batch_job_returns_the_bodies_of_the_service(
    service: Service, http: DefaultHttpxClient, stories_dir: Path
) -> None:
    bodies: list[dict] = [
        {"prompt": PROMPT, "logprobs": 2, **SETTINGS},
        {"prompt": [PROMPT, "The \U0001f98a"], "n": 2, "best_of": 3, "stop": ["."], **SETTINGS},
        {"prompt": [[5, 6, 7], [1, 5]], "echo": True, "logprobs": 1, "max_tokens": 0},
        {"prompt": PROMPT, "bad_words": ["was"], "dry_multiplier": 0.8, "model": "stories-8m", **SETTINGS},
        {"prompt": "a", "top_p": 2},
        {"prompt": [1, 4096]},
        {"prompt": "a", "stop_token_ids": [4096]},
        {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "timeout_ms": 1},
    ]
    lines = [line_of(str(i), **body) for i, body in enumerate(bodies)]
    statuses = []
    for body, answer in zip(bodies, BatchEngine(EngineSettings(stories_dir)).answer(lines), strict=True):
        response, ours = http.post(f"{service.url}/v1/completions", json=body), json.loads(answer.text)["response"]
        theirs = response.json()
        assert list(ours["body"]) == list(theirs)
        assert ours["status_code"] == response.status_code
        statuses.append(response.status_code)
        if response.status_code != 504:  # its message counts the tokens until then
            changing = {"id": "", "created": 0} if response.status_code == 200 else {}
            assert ours["body"] | changing == theirs | changing
    assert statuses == [200] * 4 + [400] * 3 + [504]


def test_every_event_can_have_usage_and_padding(service: Service, http: DefaultHttpxClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
    body = {"prompt": PROMPT, "n": 2, "stream": True, "stream_options": options, **SETTINGS}
    lines = http.post(f"{service.url}/v1/completions", json=body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert {len(line.removeprefix("data: ")) % 64 for line in lines[: len(events) - 1]} == {0}
    *pieces, last = events
    n_tokens = dict.fromkeys((0, 1), 0)
    for event in pieces:
        (choice,) = event["choices"]
        assert event["usage"]["completion_tokens"] >= n_tokens[choice["index"]]
        n_tokens[choice["index"]] = event["usage"]["completion_tokens"]
        assert event["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"]
    assert sum(n_tokens.values()) == last["usage"]["completion_tokens"]


def test_text_becomes_tokens_and_text_again(service: Service, http: DefaultHttpxClient, stories: LLM) -> None:
    text = "The fox \U0001f98a ran."
    for special in (True, False):
        body = {"prompt": text, "add_special_tokens": special, "return_token_strs": True}
        found = http.post(f"{service.url}/tokenize", json=body).json()
        ids = (stories.tokenizer.encode_document if special else stories.tokenizer.encode)(text)
        assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), stories.config.context)
        assert found["token_strs"] == [stories.tokenizer.piece(token) for token in ids]
        assert http.post(f"{service.url}/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    for path, wrong, word in (
        ("tokenize", {"prompt": 1}, "prompt is of type int"),
        ("tokenize", {"prompt": "", "x": 1}, "x is not a field"),
        ("tokenize", {"prompt": "", "model": "gpt-2"}, "gpt-2"),
        ("detokenize", {"tokens": [4096]}, "4095"),
        ("detokenize", {}, "tokens"),
    ):
        response = http.post(f"{service.url}/{path}", json=wrong)
        assert response.status_code == (404 if "model" in wrong else 400)
        assert word in response.json()["error"]["message"]


def test_a_prompt_is_explained_as_the_engine_answers(
    service: Service, http: DefaultHttpxClient, client: OpenAI, stories: LLM
) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.9, top_p=0.9, seed=3)
    body = {"prompt": PROMPT, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    scores = http.post(f"{service.url}/explain/scores", json=body).json()
    assert [scores["chosen"]["id"]] == stories.generate(PROMPT, params)[0].token_ids
    assert scores["difference"]["same_token"]
    assert scores["difference"]["largest"] < 0.5  # roundings to 8 bits that fall the other way
    lens = http.post(f"{service.url}/explain/lens", json={"prompt": PROMPT}).json()
    assert lens["answers"][-1]["id"] == stories.generate(PROMPT, SamplingParams(1, 0))[0].token_ids[0]
    refused = http.post(f"{service.url}/explain/attention", json={"prompt": PROMPT, "layer": 17})
    assert (refused.status_code, "layer is 17" in refused.json()["error"]["message"]) == (400, True)

    assert http.get(f"{service.url}/explain/batch").json()["complete"]  # from now on, steps are recorded
    client.completions.create(model="stories-8m", prompt=PROMPT, n=2, **SETTINGS)
    time.sleep(1)  # an older view is kept for half a second
    response = http.get(f"{service.url}/explain/batch")
    steps = [step for replica in response.json()["replicas"] for step in replica["steps"]]
    assert any(len(step["shares"]) == 2 for step in steps)
    assert PROMPT not in response.text


def test_web_pages_of_other_origins_need_permission(service: Service, http: DefaultHttpxClient) -> None:
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    response = http.request("OPTIONS", f"{service.url}/v1/completions", headers=headers)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


def test_a_prompt_is_scored(client: OpenAI, stories: LLM) -> None:
    """Lists have one entry for each token that the client sent. A boundary has null. Bytes without text have names."""
    text = f"{PROMPT} \U0001f98a ran"
    boundary, ids = stories.tokenizer.boundary_id, stories.tokenizer.encode(text)
    scored = stories.score(text, top=2)[0]
    for prompt, n_boundaries in ((text, 0), (ids, 0), ([boundary, *ids], 1)):
        fields = {"model": "stories-8m", "prompt": prompt, "echo": True, "logprobs": 2, "temperature": 0}
        (alone,) = client.completions.create(**fields, max_tokens=0).choices
        (whole,) = client.completions.create(**fields, max_tokens=3).choices
        streamed = [chunk.choices[0] for chunk in client.completions.create(**fields, max_tokens=3, stream=True)]
        assert (alone.text, alone.finish_reason) == (text, "length")
        assert whole.text == "".join(choice.text for choice in streamed)
        n = len(ids) + n_boundaries
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            values = getattr(whole.logprobs, name)
            assert values == [value for choice in streamed for value in getattr(choice.logprobs, name)]
            assert len(values) == n + 3
            if name in ("tokens", "text_offset"):
                assert values[:n] == getattr(alone.logprobs, name)
        found = whole.logprobs
        assert found.token_logprobs[n_boundaries:n] == pytest.approx([t.logprob for t in scored.logprobs], abs=1e-3)
        assert found.token_logprobs[:n_boundaries] == found.top_logprobs[:n_boundaries] == [None] * n_boundaries
        assert found.tokens[:n_boundaries] == ["<|endoftext|>"] * n_boundaries
        for token, top in zip(found.tokens[n_boundaries:], found.top_logprobs[n_boundaries:], strict=True):
            assert token in top
        assert "bytes:\\xf0" in found.tokens
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            if not token.startswith(("bytes:", "<|")):
                assert whole.text[offset : offset + len(token)] == token
        assert found.text_offset[found.tokens.index("bytes:\\xf0")] == text.index("\U0001f98a")


def test_an_echo_scores_the_token_that_ends_the_answer(client: OpenAI, stories: LLM) -> None:
    """lm-evaluation-harness asks for one token and drops its entry. An empty answer must not cost it the prompt's."""
    fields = {"model": "stories-8m", "prompt": PROMPT, "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1}
    (token,) = stories.generate(PROMPT, SamplingParams(1, 0))[0].token_ids
    whole, ended = (client.completions.create(**fields, extra_body=more) for more in ({}, {"stop_token_ids": [token]}))
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == (PROMPT, "stop")
    found, expected = ended.choices[0].logprobs, whole.choices[0].logprobs
    assert (found.tokens, found.text_offset) == (expected.tokens, expected.text_offset)
    assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-3)
    assert (whole.usage.completion_tokens, ended.usage.completion_tokens) == (1, 0)


def test_defaults_are_openai_s_and_our_settings_take_effect(client: OpenAI, stories: LLM) -> None:
    plain = client.completions.create(model="stories-8m", prompt=PROMPT, seed=5)
    assert plain.choices[0].text == stories.generate(PROMPT, SamplingParams(16, 1.0, 1.0, seed=5))[0].text
    own = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.3, "bad_words": ["was"], "dry_multiplier": 0.8}
    theirs = {"presence_penalty": 0.5, "frequency_penalty": 0.5}
    more = client.completions.create(
        model="stories-8m", prompt=PROMPT, extra_body=own, logit_bias={"300": 2}, **theirs, **SETTINGS
    )
    params = SamplingParams(**SETTINGS, **own, **theirs, logit_bias={300: 2})
    assert more.choices[0].text == stories.generate(PROMPT, params)[0].text


def test_the_model_is_listed_and_others_are_unknown(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve(model.id)) == ("stories-8m", model)
    for unknown in (
        lambda: client.models.retrieve("gpt-2"),
        lambda: client.completions.create(model="gpt-2", prompt=PROMPT),
    ):
        with pytest.raises(openai.NotFoundError, match="stories-8m") as caught:
            unknown()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": float("nan")}, None, "NaN"),
        ({"prompt": "\ud800"}, None, "surrogate"),
        ({"prompt": [1, 4096]}, None, "4095"),
        ({"prompt": [1, 4096], "echo": True}, None, "4095"),
        ({"prompt": [5] * 300}, "prompt", "255"),
        ({"tempreature": 1}, None, "tempreature"),
    ],
)
def test_an_error_names_the_field(
    service: Service, http: DefaultHttpxClient, fields: dict, param: str | None, words: str
) -> None:
    for stream in (False, True):
        body = json.dumps({"prompt": PROMPT, "stream": stream, **fields})
        response = http.post(
            f"{service.url}/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, None)
        assert words in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)],
)
def test_an_unknown_path_or_method_gets_openai_s_error(
    service: Service, http: DefaultHttpxClient, method: str, path: str, status: int
) -> None:
    response = http.request(method, service.url + path)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert (status == 405) == ("allow" in response.headers)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/live"), ("GET", "/explain/batch")],
)
def test_without_keys_a_foreign_host_name_is_refused(
    service: Service, http: DefaultHttpxClient, method: str, path: str
) -> None:
    """A browser sends such a name for a foreign page whose name leads to this machine."""
    body = {"prompt": "a", "max_tokens": 1} if method == "POST" else None
    for host, expected in (("elsewhere.example:8000", 401), (f"127.0.0.1:{service.http_port}", 200)):
        response = http.request(method, service.url + path, json=body, headers={"host": host})
        assert (response.status_code, "'elsewhere.example:8000'" in response.text) == (expected, expected == 401)


@pytest.mark.parametrize("path", ["/", "/main.js", "/health", "/v1/models", "/v1/models/stories-8m", "/live"])
def test_head_is_answered_as_get_without_a_body(service: Service, path: str) -> None:
    """Uptime monitors send HEAD."""
    answers = []
    for method in ("GET", "HEAD"):
        with closing(HTTPConnection("localhost", service.http_port, timeout=LIMIT_S)) as connection:
            connection.request(method, path)
            response = connection.getresponse()
            answers.append((response.status, response.headers["content-type"], response.read()))
    assert answers[0][0] == 200
    assert answers[1] == (*answers[0][:2], b"")


def test_a_call_is_one_line_of_the_log(service: Service, client: OpenAI) -> None:
    asked = client.completions.with_raw_response.create(model="stories-8m", prompt=PROMPT, n=2, **SETTINGS)
    usage = asked.parse().usage
    name = asked.headers["x-request-id"]
    deadline = time.monotonic() + LIMIT_S
    while not (lines := [line for line in service.call_lines() if line.get("request_id") == name]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (line,) = lines
    assert (line["method"], line["status"], line["finish_reason"]) == ("POST /v1/completions", "OK", "length")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage.prompt_tokens, usage.completion_tokens)
    assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["total_ms"]
    assert PROMPT not in json.dumps(line)
