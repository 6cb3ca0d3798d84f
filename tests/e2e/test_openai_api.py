"""OpenAI's API with OpenAI's own client and as raw HTTP, on the real configs: both proxies, four replicas each."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection

import openai
import pytest
from helpers.service import Service
from openai import OpenAI

from tinylm import LLM, SamplingParams
from tinylm.client import Client
from tinylm.serving.http.merge import merged
from tinylm.serving.http.requests import MAX_BODY_BYTES, read_request

PROMPT = "Once upon a time"
LIMIT_S = 30
SLACK_MS = 100  # for the news that a client has left to arrive; an answer for nobody takes several times that
SETTINGS = {"max_tokens": 32, "temperature": 0.9, "top_p": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def first_replicas(shared_service: Service) -> dict[str, int]:
    """Name -> process of the replicas before the first test of this file."""
    shared_service.wait_until_healthy(LIMIT_S)
    return shared_service.replicas()


@pytest.fixture
def service(shared_service: Service, first_replicas: dict[str, int]) -> Service:
    return shared_service


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)  # http_proxy of the environment is not meant for this
    with OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0, http_client=http) as client:
        yield client


def ask(
    service: Service, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request over a socket, which nothing between retries or mends."""
    with socket.create_connection(("localhost", service.http_port), timeout=LIMIT_S) as connection:
        # Sent and read at once: a server that refuses what is still being sent resets the connection afterwards.
        sender = threading.Thread(target=_send, args=(connection, _request(method, path, body, **headers)))
        sender.start()
        answer = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
        sender.join()
    head, _, rest = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    found = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(status.split()[1]), found, _dechunked(rest) if "transfer-encoding" in found else rest


def _send(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        connection.sendall(data)


def _request(method: str, path: str, body: bytes, **headers: str) -> bytes:
    fields = {"host": "localhost", "connection": "close", "content-length": str(len(body))}
    fields |= {"content-type": "application/json"} if body else {}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def _dechunked(rest: bytes) -> bytes:
    whole = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        whole, rest = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return whole


def completions(service: Service, **fields: object) -> tuple[int, dict[str, str], bytes]:
    return ask(service, "POST", "/v1/completions", json.dumps({"prompt": PROMPT, **fields}).encode())


def events(body: bytes) -> list[dict]:
    """The events of a stream, whose framing must be SSE's: `data: JSON`, blank line, and the end said."""
    *datas, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(data.startswith("data: ") for data in datas)
    return [json.loads(data.removeprefix("data: ")) for data in datas]


def test_http_and_grpc_give_the_same_answer_whole_and_streamed(service: Service, client: OpenAI, stories: LLM) -> None:
    params = SamplingParams(**SETTINGS, stop=("zz", "."), logprobs=3)
    expected = stories.generate(PROMPT, params)[0]
    with Client(service.address, retries=0) as grpc_client:
        assert grpc_client.generate(PROMPT, params).text == expected.text
    whole = client.completions.create(model="stories-8m", prompt=PROMPT, stop=["zz", "."], logprobs=3, **SETTINGS)
    chunks = list(
        client.completions.create(
            model="stories-8m", prompt=PROMPT, stop=["zz", "."], logprobs=3, stream=True,
            stream_options={"include_usage": True}, **SETTINGS,
        )
    )  # fmt: skip
    (choice,) = whole.choices
    assert choice.text == "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.text
    assert choice.finish_reason == chunks[-2].choices[0].finish_reason == expected.finish_reason == "stop"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert whole.usage == chunks[-1].usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        expected.n_prompt_tokens,
        len(expected.token_ids),
    )
    assert (chunks[-1].choices, [chunk.usage for chunk in chunks[:-1]]) == ([], [None] * (len(chunks) - 1))
    streamed = [chunk.choices[0].logprobs for chunk in chunks[:-1]]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for logprobs in streamed for value in getattr(logprobs, name)]
        assert joined == getattr(choice.logprobs, name)
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert "".join(tokens).startswith(expected.text)
    assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]
    assert choice.logprobs.token_logprobs == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-4)
    for token, logprob, top in zip(tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
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


def test_ids_are_as_good_as_their_text_and_echo_puts_the_prompt_first(client: OpenAI, stories: LLM) -> None:
    ids = stories.tokenizer.encode(PROMPT)
    prompts = [PROMPT, ids, [stories.tokenizer.boundary_id, *ids], [ids]]
    texts = [
        client.completions.create(model="stories-8m", prompt=prompt, echo=True, **SETTINGS).choices[0].text
        for prompt in prompts
    ]
    streamed = client.completions.create(model="stories-8m", prompt=PROMPT, echo=True, stream=True, **SETTINGS)
    texts.append("".join(chunk.choices[0].text for chunk in streamed))
    expected = stories.generate(PROMPT, SamplingParams(**SETTINGS))[0].text
    assert texts == [PROMPT + expected] * 5


def test_defaults_are_openai_s_and_our_own_settings_count(client: OpenAI, stories: LLM) -> None:
    plain = client.completions.create(model="stories-8m", prompt=PROMPT, seed=5)
    assert plain.choices[0].text == stories.generate(PROMPT, SamplingParams(16, 1.0, 1.0, seed=5))[0].text
    own = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.3}
    more = client.completions.create(model="stories-8m", prompt=PROMPT, extra_body=own, **SETTINGS)
    assert more.choices[0].text == stories.generate(PROMPT, SamplingParams(**SETTINGS, **own))[0].text


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
    ("fields", "param", "said"),
    [
        ({"temperature": -1}, "temperature", "0 to 10"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"n": 17}, "n", "16"),
        ({"prompt": ["a"] * 9, "n": 2}, "prompt", "16"),
        ({"prompt": []}, "prompt", "1 to 16"),
        ({"prompt": "word " * 300}, "prompt", "255"),
        ({"prompt": "a" * 100_000}, "prompt", "65536"),
        ({"prompt": "\ud800"}, None, "surrogate"),
        ({"\ud800": 1}, None, "no field"),
        ({"prompt": [1, 4096]}, None, "4095"),
        ({"prompt": [1, 4096], "echo": True}, None, "4095"),
        ({"prompt": [5] * 300}, "prompt", "255"),
        ({"prompt": [5] * 70_000, "n": 16}, "prompt", "65536"),
        ({"prompt": ["My secret", 1]}, "prompt", "of type list: input should be a valid"),
        ({"stop": {"secret": 1}}, "stop", "of type dict"),
        ({"stop": [""]}, "stop", "1 to 256"),
        ({"logprobs": 21}, "logprobs", "0 to 20"),
        ({"logprobs": 1, "echo": True}, "logprobs", "echo"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"suffix": "."}, "suffix", "not supported"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"tempreature": 1}, None, "tempreature"),
    ],
)
def test_a_bad_request_is_told_which_field(service: Service, fields: dict, param: str | None, said: str) -> None:
    for stream in ({}, {"stream": True}) if "stream_options" not in fields else ({},):
        status, headers, body = completions(service, **fields, **stream)
        assert (status, headers["content-type"]) == (400, "application/json")
        error = json.loads(body)["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert said in error["message"]
        assert "secret" not in error["message"]  # messages are logged


def test_what_changes_nothing_is_accepted(service: Service) -> None:
    neutral = {"best_of": 1, "suffix": None, "logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0,
               "user": "me", "stop": None, "seed": None, "logprobs": None, "stream": None}  # fmt: skip
    assert completions(service, **neutral)[0] == 200


def test_statuses_and_forms_of_errors(service: Service) -> None:
    nonsense = b'{"prompt": "\xff"}'
    deep = b"[" * 100_000
    too_large = b" " * (MAX_BODY_BYTES + 1)
    asked = [
        (400, None, ask(service, "POST", "/v1/completions", nonsense)),
        (400, None, ask(service, "POST", "/v1/completions", deep)),
        (400, None, ask(service, "POST", "/v1/completions", b'"prompt"')),
        (400, None, ask(service, "POST", "/v1/completions", b'{"prompt": "a"}', content_type="text/plain")),
        (404, None, ask(service, "GET", "/v1/nothing")),
        (405, None, ask(service, "GET", "/v1/completions")),
        (413, "request_too_large", ask(service, "POST", "/v1/completions", too_large)),
        (504, "timeout", completions(service, max_tokens=250, temperature=0, timeout_ms=5)),
    ]
    for expected, code, (status, _, body) in asked:
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (expected, code)
        assert error.keys() == {"message", "type", "param", "code"}
        assert "Traceback" not in error["message"]


def test_a_stream_is_server_sent_events_in_pieces_and_a_time_limit_ends_it(service: Service) -> None:
    # With a stop string to look out for, pieces come every 5 ms instead of 40, which is as long as 100 tokens take.
    status, headers, body = completions(service, stream=True, max_tokens=100, temperature=0, stop=["never said"])
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    chunks = events(body)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    # How much shorter the first piece is than the whole is a matter of how busy the machine is.
    assert 0 < len(chunks[0]["choices"][0]["text"]) < len(text)
    assert {chunk["id"] for chunk in chunks} == {f"cmpl-{headers['x-request-id']}"}
    status, _, body = completions(service, stream=True, max_tokens=250, temperature=0, timeout_ms=5)
    assert status == 200
    assert events(body)[-1]["choices"][0]["finish_reason"] == "timeout"


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/live")])
def test_without_keys_a_page_from_elsewhere_can_not_ask_by_its_own_name(
    service: Service, method: str, path: str
) -> None:
    """As a browser asks for a page whose name has been made to lead to this machine."""
    body = b'{"prompt": "a", "max_tokens": 1}' if method == "POST" else b""
    for host, expected in (("elsewhere.example:8000", 401), (f"127.0.0.1:{service.http_port}", 200)):
        status, _, answer = ask(service, method, path, body, host=host)
        assert (status, "'elsewhere.example:8000'" in answer.decode()) == (expected, expected == 401)


def ask_http(service: Service, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection("localhost", service.http_port, timeout=10)
    with closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


@pytest.mark.parametrize("path", ["/", "/main.js", "/health", "/v1/models", "/v1/models/stories-8m", "/live"])
def test_head_is_answered_as_get_without_a_body(service: Service, path: str) -> None:
    """Uptime monitors send HEAD."""
    status, headers, _ = ask_http(service, "GET", path)
    assert status == 200
    assert ask_http(service, "HEAD", path)[0] == 200
    assert ask_http(service, "HEAD", path)[1]["content-type"] == headers["content-type"]
    assert ask_http(service, "HEAD", path)[2] == b""


def test_other_methods_are_refused_with_those_allowed(service: Service) -> None:
    status, headers, _ = ask_http(service, "DELETE", "/v1/models")
    assert status == 405
    assert "GET" in headers["allow"]


def test_health_needs_nothing(service: Service) -> None:
    status, _, body = ask(service, "GET", "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok"})


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_slots(service: Service, stream: bool) -> None:
    """Sixteen answers fill a replica; whoever goes on with them for nobody would write down that they were finished."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 250, "n": 16, "temperature": 0, "stream": stream}).encode()
    names = [f"left-{stream}-{number}" for number in range(8)]

    def leave(name: str) -> float:
        """Milliseconds that the client stayed, which may be long where the machine is busy."""
        came_at = time.monotonic()
        with socket.create_connection(("localhost", service.http_port), timeout=LIMIT_S) as connection:
            connection.sendall(_request("POST", "/v1/completions", body, x_request_id=name))
            if stream:
                assert connection.recv(4096)
            else:
                time.sleep(0.05)
        return (time.monotonic() - came_at) * 1000

    with ThreadPoolExecutor(2) as pool:
        stayed_ms = dict(zip(names, pool.map(leave, names), strict=True))
    deadline = time.monotonic() + LIMIT_S
    lines: list[dict] = []
    while len(lines) < len(names) and time.monotonic() < deadline:
        lines = [line for line in service.call_lines() if line.get("request_id") in names]
        time.sleep(0.05)
    assert sorted(line["request_id"] for line in lines) == names
    assert "CANCELLED" in {line["status"] for line in lines}
    finished = [line for line in lines if line["status"] != "CANCELLED"]  # before the client left, not after
    assert [line for line in finished if line["total_ms"] > stayed_ms[line["request_id"]] + SLACK_MS] == []


def test_one_call_is_one_line_of_the_log_with_the_same_fields_as_grpc_s(service: Service, client: OpenAI) -> None:
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


def test_replicas_outlive_all_of_it(service: Service, first_replicas: dict[str, int]) -> None:
    # The Python proxy may shun a replica for 10 s, for as long as it takes an old count of its calls for true.
    service.wait_until_healthy(LIMIT_S)
    assert service.replicas() == first_replicas


def test_merged_streams_lose_nothing_and_the_first_error_ends_all() -> None:
    closed = []

    async def count(name: int, items: int, error: bool = False):
        try:
            for item in range(items):
                await asyncio.sleep(0)
                yield name, item
            if error:
                raise ValueError("the middle one")
        finally:
            closed.append(name)

    async def collect(*generators) -> list:
        return [(place, item) async for place, item in merged(generators)]

    got = asyncio.run(collect(count(0, 5), count(1, 0), count(2, 3)))
    for name, items in ((0, 5), (1, 0), (2, 3)):
        assert [item for place, item in got if place == name] == [(name, item) for item in range(items)]
    closed.clear()
    with pytest.raises(ValueError, match="the middle one"):
        asyncio.run(collect(count(0, 10**9), count(1, 2, error=True), count(2, 10**9)))
    assert sorted(closed) == [0, 1, 2]


def test_seeds_of_several_answers_differ_and_stay_within_the_limit() -> None:
    request = read_request(json.dumps({"n": 3, "seed": 2**63 - 1}).encode())
    assert [request.params(index).seed for index in range(3)] == [2**63 - 1, 0, 1]


@pytest.mark.parametrize("options", [{"include_usage": None}, {}, None])
def test_null_counts_as_absent_at_any_depth(options: dict | None) -> None:
    body = {"prompt": "Once", "stream": True, "stop": None, "stream_options": options, "logit_bias": {"1": None}}
    request = read_request(json.dumps(body).encode())
    assert request.stream_options is None or not request.stream_options.include_usage


def test_null_within_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^stop"):
        read_request(json.dumps({"prompt": "Once", "stop": ["a", None]}).encode())
