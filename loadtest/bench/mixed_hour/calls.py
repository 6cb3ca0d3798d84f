"""Every kind of call that the mixed load makes, over gRPC and HTTP: valid ones, cancelled ones and refused ones.

A kind is a function that makes one call. It returns its outcome, and raises for every outcome that is not expected.
"""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from typing import Any, Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from tinylm import SamplingParams
from tinylm.client import METADATA, Client, ServiceError, call_metadata
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

Outcome = Literal["ok", "refused", "cancelled"]
LIMIT_S = 120.0  # of a call: an answer takes a fraction of a second, unless other programs use all cores
N_PROMPTS = 100
ENDLESS = "la la la la la la la la"  # the model does not end this text early
OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))  # a connection for each channel
PIECES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tokens", {}), ("norms", {}), ("attention", {"layer": 3}), ("lens", {"top": 3}), ("scores", {"seed": 1}),
    ("matmul", {"layer": 1, "name": "qkv"}), ("cache", {}),
)  # fmt: skip
PAGES = ("/", "/main.js", "/base.css", "/icon.svg")


class WrongAnswer(RuntimeError):
    """The service answered, but not as it must."""


class HttpStatus(RuntimeError):
    """The service answered with a status of 400 or more."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body[:300].decode(errors='replace')}")
        self.status, self.code, self.is_json = status, None, True
        try:
            self.code = json.loads(body)["error"]["code"]  # OpenAI's
        except ValueError:
            self.is_json = False
        except (KeyError, TypeError):
            pass


@dataclass(frozen=True)
class Keys:
    """One key without limits, one for a few requests per minute, one for a few tokens per minute."""

    free: str
    few_requests: str
    few_tokens: str


@dataclass
class Caller:
    """Addresses, connections and keys for calls from many threads."""

    address: str
    http_port: int
    haproxy_metrics_port: int
    keys: Keys
    ray_metrics: Callable[[], list[str]]  # returns HOST:PORT of each exporter of Ray
    revoked_key: str = "tlm-" + "0" * 43
    temporary_key: str | None = None  # valid until it is replaced
    n_retried: int = 0  # calls that TinyLM's client sent more than once
    _texts: dict[int, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.clients = [Client(self.address, timeout_s=LIMIT_S, api_key=self.keys.free) for _ in range(4)]
        self.limited = {
            key: Client(self.address, timeout_s=LIMIT_S, api_key=key, retries=0)
            for key in (self.keys.few_requests, self.keys.few_tokens)
        }
        self.channel = grpc.insecure_channel(self.address, options=OPTIONS)
        self.stub = TinyLMStub(self.channel)
        self.metadata = call_metadata(self.keys.free)

    def client(self) -> Client:
        return random.choice(self.clients)

    def check(self, number: int, text: str, attempts: int = 1) -> None:
        """Raise WrongAnswer unless the text is that of all earlier answers to the same request."""
        with self._lock:
            self.n_retried += attempts > 1
            if self._texts.setdefault(number, text) != text:
                raise WrongAnswer(f"request {number}: {text!r} instead of {self._texts[number]!r}")

    def http(
        self, method: str, path: str, body: Any = None, key: str | None = None, **headers: str
    ) -> tuple[HTTPResponse, bytes]:
        """Return the answer to one request on a new connection. Raise HttpStatus."""
        with closing(HTTPConnection("127.0.0.1", self.http_port, timeout=LIMIT_S)) as connection:
            return exchange(connection, method, path, body, key or self.keys.free, headers)

    def raw_http(self, path: str, body: Mapping[str, Any], version: str = "1.1") -> socket.socket:
        """Return a socket over which a POST was sent."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/{version}\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {self.keys.free}\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.http_port), timeout=LIMIT_S)
        connection.sendall(head.encode() + data)
        return connection


def exchange(
    connection: HTTPConnection, method: str, path: str, body: Any, key: str, headers: Mapping[str, str] = {}
) -> tuple[HTTPResponse, bytes]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    own = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connection.request(method, path, data, {**own, **headers})
    response = connection.getresponse()
    content = response.read()
    if response.status >= 400:
        raise HttpStatus(response.status, content)
    return response, content


def refused(call: Callable[[], object], *expected: grpc.StatusCode | int | str) -> Outcome:
    """Return "refused" if the call fails with one of these: gRPC's status, HTTP's status, or `code` of its error."""
    try:
        answer = call()
    except ValueError:
        found: tuple[object, ...] = (grpc.StatusCode.INVALID_ARGUMENT,)
        if not set(found) & set(expected):
            raise
    except ServiceError as error:
        if error.code not in expected:
            raise
    except grpc.RpcError as error:
        if error.code() not in expected:
            raise
    except HttpStatus as error:
        if error.status not in expected and error.code not in expected:
            raise
    else:
        raise WrongAnswer(f"accepted, not refused with {expected}: {str(answer)[:200]}")
    return "refused"


def numbered(number: int) -> tuple[str, SamplingParams]:
    """Return prompt and settings of a request that always has the same answer."""
    names = ("Lily", "Tom", "Mia", "Ben", "Zoe", "Max", "Anna")
    prompt = f"One day, {names[number % 7]} and {names[number % 5]} saw {number} little birds in the garden. They"
    return prompt, SamplingParams(max_tokens=8 + number % 41, seed=number, temperature=0.8, top_p=0.95)


def body_of(number: int, **fields: Any) -> dict[str, Any]:
    """Return the same request for HTTP."""
    prompt, params = numbered(number)
    return {"prompt": prompt, "max_tokens": params.max_tokens, "seed": number, "temperature": 0.8, "top_p": 0.95,
            **fields}  # fmt: skip


def _number() -> int:
    return random.randrange(N_PROMPTS)


# gRPC: answered.


def generate(caller: Caller) -> Outcome:
    number = _number()
    answer = caller.client().generate(*numbered(number))
    caller.check(number, answer.text, answer.attempts)
    return "ok"


def generate_stream(caller: Caller) -> Outcome:
    number = _number()
    stream = caller.client().stream(*numbered(number))
    text = "".join(stream)
    caller.check(number, text, stream.completion.attempts)
    return "ok"


def new_connection(caller: Caller) -> Outcome:
    number = _number()
    with Client(caller.address, timeout_s=LIMIT_S, api_key=caller.keys.free) as client:
        answer = client.generate(*numbered(number))
    caller.check(number, answer.text, answer.attempts)
    return "ok"


def score(caller: Caller) -> Outcome:
    prompt, _ = numbered(_number())
    answer = caller.client().generate(prompt, SamplingParams(max_tokens=0, prompt_logprobs=5))
    if not answer.prompt_logprobs or len(answer.prompt_logprobs) != answer.n_prompt_tokens - 1:
        raise WrongAnswer(f"{answer.n_prompt_tokens} tokens have other log-probabilities: {answer.prompt_logprobs}")
    return "ok"


def all_settings(caller: Caller) -> Outcome:
    params = SamplingParams(
        max_tokens=24, temperature=1.2, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, stop=("\n\n", "END"),
        logprobs=3, ignore_eos=True, min_tokens=2, stop_token_ids=(5,), logit_bias={10: 1.5}, presence_penalty=0.1,
        frequency_penalty=0.1, bad_words=("dragon",), dry_multiplier=0.8,
    )  # fmt: skip
    answer = "".join(caller.client().stream("Once upon a time", params))
    if "dragon" in answer:
        raise WrongAnswer(f"a bad word is in {answer!r}")
    return "ok"


def tokenize(caller: Caller) -> Outcome:
    prompt, _ = numbered(_number())
    text = prompt * random.randint(1, 20)
    tokens = caller.client().tokenize(text)
    if b"".join(data for _, data in tokens).decode() != text:
        raise WrongAnswer("the tokens are not those of the text")
    return "ok"


def detokenize(caller: Caller) -> Outcome:
    caller.client().detokenize([random.randrange(4096) for _ in range(200)])
    return "ok"


def model_info(caller: Caller) -> Outcome:
    caller.client().info()
    return "ok"


def health(caller: Caller) -> Outcome:
    stub = health_pb2_grpc.HealthStub(caller.channel)
    status = stub.Check(health_pb2.HealthCheckRequest(), metadata=METADATA, timeout=LIMIT_S).status
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise WrongAnswer(f"health is {status}")
    return "ok"


def health_watch(caller: Caller) -> Outcome:
    stub = health_pb2_grpc.HealthStub(caller.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(), metadata=METADATA, timeout=LIMIT_S)
    next(watch)
    watch.cancel()
    return "cancelled"


def reflection(caller: Caller) -> Outcome:
    name = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    call = caller.channel.stream_stream(
        name,
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=LIMIT_S)
    if len(answer.list_services_response.service) < 2:
        raise WrongAnswer(str(answer))
    return "ok"


def old_client(caller: Caller) -> Outcome:
    """Send the fields of the first release only."""
    request = pb.GenerateRequest(prompt="Once upon a time", max_tokens=12, temperature=0)
    caller.stub.Generate(request, metadata=caller.metadata, timeout=LIMIT_S)
    return "ok"


def newer_client(caller: Caller) -> Outcome:
    """Send a field that this release does not know."""
    data = pb.GenerateRequest(prompt="Once upon a time", max_tokens=12).SerializeToString() + b"\xf8\x07\x01"
    call = caller.channel.unary_unary("/tinylm.v1.TinyLM/Generate")
    call(data, metadata=caller.metadata, timeout=LIMIT_S)
    return "ok"


# gRPC: cancelled and refused.


def cancelled_stream(caller: Caller) -> Outcome:
    request = pb.GenerateRequest(prompt=ENDLESS, max_tokens=230, temperature=0)
    call = caller.stub.GenerateStream(request, metadata=caller.metadata, timeout=LIMIT_S)
    for _ in range(random.randrange(4)):
        next(call)
    call.cancel()
    return "cancelled"


def dropped_stream(caller: Caller) -> Outcome:
    """Close TinyLM's own stream after its first piece."""
    stream = caller.client().stream(ENDLESS, SamplingParams(max_tokens=230, temperature=0))
    next(stream)
    stream.close()
    return "cancelled"


def cancelled_call(caller: Caller) -> Outcome:
    request = pb.GenerateRequest(prompt=ENDLESS, max_tokens=230, temperature=0)
    call = caller.stub.Generate.future(request, metadata=caller.metadata, timeout=LIMIT_S)
    threading.Event().wait(random.uniform(0, 0.05))
    call.cancel()
    return "cancelled"


def past_deadline(caller: Caller) -> Outcome:
    request = pb.GenerateRequest(prompt=ENDLESS, max_tokens=230, timeout_ms=5)
    return refused(
        lambda: caller.stub.Generate(request, metadata=caller.metadata, timeout=LIMIT_S),
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )


def past_grpc_deadline(caller: Caller) -> Outcome:
    request = pb.GenerateRequest(prompt=ENDLESS, max_tokens=230)
    return refused(
        lambda: caller.stub.Generate(request, metadata=caller.metadata, timeout=0.01), grpc.StatusCode.DEADLINE_EXCEEDED
    )


def bad_input(caller: Caller) -> Outcome:
    fields: dict[str, Any] = random.choice([
        {"temperature": float("nan")}, {"top_p": 7.0}, {"max_tokens": 0}, {"prompt": "a" * 100_000},
        {"prompt": "word " * 300}, {"stop": [""]}, {"logit_bias": {9999: 1.0}},
    ])  # fmt: skip
    request = pb.GenerateRequest(**{"prompt": "Once", **fields})
    method = random.choice([caller.stub.Generate, lambda *a, **k: list(caller.stub.GenerateStream(*a, **k))])
    return refused(lambda: method(request, metadata=caller.metadata, timeout=LIMIT_S), grpc.StatusCode.INVALID_ARGUMENT)


def damaged_message(caller: Caller) -> Outcome:
    call = caller.channel.unary_unary("/tinylm.v1.TinyLM/Generate")
    data = random.choice([b"\x0a\x7fOnce", b"\x0a\x01\xc3", bytes(range(256))])
    return refused(lambda: call(data, metadata=caller.metadata, timeout=LIMIT_S), grpc.StatusCode.INVALID_ARGUMENT)


def large_message(caller: Caller) -> Outcome:
    request = pb.GenerateRequest(prompt="a" * 5_000_000)
    return refused(
        lambda: caller.stub.Generate(request, metadata=caller.metadata, timeout=LIMIT_S),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )


def unknown_key(caller: Caller) -> Outcome:
    metadata = call_metadata(caller.revoked_key)
    request = pb.TokenizeRequest(text="Once")
    return refused(
        lambda: caller.stub.Tokenize(request, metadata=metadata, timeout=LIMIT_S), grpc.StatusCode.UNAUTHENTICATED
    )


def temporary_key(caller: Caller) -> Outcome:
    if caller.temporary_key is not None:
        metadata = call_metadata(caller.temporary_key)
        caller.stub.Tokenize(pb.TokenizeRequest(text="Once"), metadata=metadata, timeout=LIMIT_S)
    return "ok"


def limited_key(caller: Caller) -> Outcome:
    """Ask with a limited key. A refusal must name a time."""
    client = random.choice(list(caller.limited.values()))
    try:
        client.generate("Once upon a time", SamplingParams(max_tokens=16))
    except ServiceError as error:
        if error.code == grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after_s is not None:
            return "refused"
        raise
    return "ok"


# HTTP: answered.


def completion(caller: Caller) -> Outcome:
    number = _number()
    _, content = caller.http("POST", "/v1/completions", body_of(number))
    caller.check(number, json.loads(content)["choices"][0]["text"])
    return "ok"


def many_completions(caller: Caller) -> Outcome:
    prompts = [numbered(_number())[0] for _ in range(3)]
    _, content = caller.http(
        "POST", "/v1/completions", {"prompt": prompts, "n": 2, "max_tokens": 16, "logprobs": 2, "echo": False}
    )
    if len(json.loads(content)["choices"]) != 6:
        raise WrongAnswer(f"not six answers: {content[:200]!r}")
    return "ok"


def streamed_completion(caller: Caller) -> Outcome:
    number = _number()
    _, content = caller.http("POST", "/v1/completions", body_of(number, stream=True))
    *events, done, _ = content.decode().split("\n\n")
    if done != "data: [DONE]":
        raise WrongAnswer(f"the stream ends with {events[-1:]} and {done!r}")
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    caller.check(number, "".join(texts))
    return "ok"


def http_1_0(caller: Caller) -> Outcome:
    number = _number()
    with caller.raw_http("/v1/completions", body_of(number, stream=random.random() < 0.5), "1.0") as connection:
        content = b"".join(iter(lambda: connection.recv(65536), b""))
    if not content.startswith(b"HTTP/1.") or b" 200 " not in content.split(b"\r\n")[0]:
        raise HttpStatus(int(content.split()[1]) if content else 0, content.partition(b"\r\n\r\n")[2])
    return "ok"


def explain(caller: Caller) -> Outcome:
    """A replica explains one prompt at a time. A second one is refused as busy."""
    piece, fields = random.choice(PIECES)
    try:
        caller.http("POST", f"/explain/{piece}", {"prompt": "Once upon a time there was", **fields})
    except HttpStatus as error:
        if error.code == "busy":
            return "refused"
        raise
    return "ok"


def http_tokens(caller: Caller) -> Outcome:
    """Tokenize and detokenize on one connection, which the client keeps open."""
    prompt, _ = numbered(_number())
    with closing(HTTPConnection("127.0.0.1", caller.http_port, timeout=LIMIT_S)) as connection:
        _, content = exchange(connection, "POST", "/tokenize", {"prompt": prompt}, caller.keys.free)
        tokens = json.loads(content)["tokens"]
        _, content = exchange(connection, "POST", "/detokenize", {"tokens": tokens[1:]}, caller.keys.free)
    if json.loads(content)["prompt"] != prompt:
        raise WrongAnswer(f"{content!r} instead of {prompt!r}")
    return "ok"


def models(caller: Caller) -> Outcome:
    _, content = caller.http("GET", "/v1/models")
    name = json.loads(content)["data"][0]["id"]
    caller.http("GET", f"/v1/models/{name}")
    caller.http("GET", "/health")
    caller.http("GET", "/-/healthz")
    return "ok"


def page(caller: Caller) -> Outcome:
    path = random.choice(PAGES)
    response, content = caller.http("GET", path)
    tag = {"if-none-match": response.getheader("etag") or ""}
    again, nothing = caller.http("GET", path, **tag)
    _, head = caller.http("HEAD", path)
    if not content or nothing or head or again.status != 304:
        raise WrongAnswer(f"{path}: {len(content)} bytes, then {again.status}")
    return "ok"


def live(caller: Caller) -> Outcome:
    """Ask as the web page does each second."""
    _, content = caller.http("GET", random.choice(["/live", "/explain/batch"]))
    if not json.loads(content)["replicas"]:
        raise WrongAnswer("no replica")
    return "ok"


def metrics(caller: Caller) -> Outcome:
    """Read what Prometheus reads: HAProxy's metrics and those of Ray."""
    for target in (f"127.0.0.1:{caller.haproxy_metrics_port}", *caller.ray_metrics()):
        try:
            with closing(HTTPConnection(target, timeout=LIMIT_S)) as connection:
                _, content = exchange(connection, "GET", "/metrics", None, "")
        except OSError as error:
            raise type(error)(f"{error} ({target})") from None
        if not content:
            raise WrongAnswer(f"{target} has no metrics")
    return "ok"


# HTTP: cancelled and refused.


def closed_stream(caller: Caller) -> Outcome:
    """Close the connection after the first bytes of a stream, or before them."""
    body = {"prompt": ENDLESS, "max_tokens": 230, "temperature": 0, "stream": True, "n": 2}
    with caller.raw_http("/v1/completions", body) as connection:
        if random.random() < 0.7:
            content = connection.recv(1024)
            if b" 200 " not in content.split(b"\r\n")[0]:
                raise HttpStatus(int(content.split()[1]) if content else 0, content.partition(b"\r\n\r\n")[2])
    return "cancelled"


def closed_call(caller: Caller) -> Outcome:
    with caller.raw_http("/v1/completions", {"prompt": ENDLESS, "max_tokens": 230, "temperature": 0}):
        threading.Event().wait(random.uniform(0, 0.05))
    return "cancelled"


def half_request(caller: Caller) -> Outcome:
    """Leave before the whole request is sent."""
    with socket.create_connection(("127.0.0.1", caller.http_port), timeout=LIMIT_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    return "cancelled"


def bad_http(caller: Caller) -> Outcome:
    body, status = random.choice([
        (b"{", 400), (b"", 400), ({"prompt": "Once", "temperature": -1}, 400), ({"prompt": "Once", "unknown": 1}, 400),
        ({"prompt": "word " * 300}, 400), ({"prompt": "Once", "model": "another"}, 404),
        ({"prompt": ENDLESS, "max_tokens": 230, "timeout_ms": 5}, 504),
    ])  # fmt: skip
    return refused(lambda: caller.http("POST", "/v1/completions", body), status)


def bad_path(caller: Caller) -> Outcome:
    method, path, status = random.choice(
        [("GET", "/nothing", 404), ("DELETE", "/v1/completions", 405), ("POST", "/explain/matmul", 400)]
    )
    body = {"prompt": "Once", "layer": 99, "name": "qkv"} if method == "POST" else None
    return refused(lambda: caller.http(method, path, body), status, "busy")


def http_unknown_key(caller: Caller) -> Outcome:
    return refused(lambda: caller.http("POST", "/v1/completions", body_of(_number()), key=caller.revoked_key), 401)


def http_limited_key(caller: Caller) -> Outcome:
    key = random.choice(list(caller.limited))
    try:
        caller.http("POST", "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 16}, key=key)
    except HttpStatus as error:
        if error.code == "rate_limit_exceeded":
            return "refused"
        raise
    return "ok"


# Kind -> how many of them a round of calls has, and the function.
KINDS: dict[str, tuple[int, Callable[[Caller], Outcome]]] = {
    "gRPC: Generate": (12, generate),
    "gRPC: GenerateStream": (12, generate_stream),
    "gRPC: Generate on a new connection": (2, new_connection),
    "gRPC: score a prompt": (3, score),
    "gRPC: all settings": (2, all_settings),
    "gRPC: Tokenize": (4, tokenize),
    "gRPC: Detokenize": (4, detokenize),
    "gRPC: GetModelInfo": (3, model_info),
    "gRPC: Health/Check": (3, health),
    "gRPC: Health/Watch": (2, health_watch),
    "gRPC: reflection": (2, reflection),
    "gRPC: an old client": (2, old_client),
    "gRPC: a newer client": (2, newer_client),
    "gRPC: a stream is cancelled": (6, cancelled_stream),
    "gRPC: a stream is dropped": (2, dropped_stream),
    "gRPC: a call is cancelled": (3, cancelled_call),
    "gRPC: timeout_ms is over": (2, past_deadline),
    "gRPC: the deadline is over": (2, past_grpc_deadline),
    "gRPC: bad input": (4, bad_input),
    "gRPC: a damaged message": (2, damaged_message),
    "gRPC: a message of 5 MB": (1, large_message),
    "gRPC: an unknown key": (2, unknown_key),
    "gRPC: a key that was just added": (2, temporary_key),
    "gRPC: a key with a limit": (6, limited_key),
    "HTTP: a completion": (8, completion),
    "HTTP: six completions": (2, many_completions),
    "HTTP: a streamed completion": (8, streamed_completion),
    "HTTP: an HTTP/1.0 client": (2, http_1_0),
    "HTTP: explain": (4, explain),
    "HTTP: tokenize, detokenize": (4, http_tokens),
    "HTTP: models, health": (2, models),
    "HTTP: web page": (2, page),
    "HTTP: live view": (4, live),
    "HTTP: metrics": (1, metrics),
    "HTTP: a stream is closed": (6, closed_stream),
    "HTTP: a call is closed": (3, closed_call),
    "HTTP: half a request": (2, half_request),
    "HTTP: bad input": (4, bad_http),
    "HTTP: a bad path": (2, bad_path),
    "HTTP: an unknown key": (2, http_unknown_key),
    "HTTP: a key with a limit": (4, http_limited_key),
}
