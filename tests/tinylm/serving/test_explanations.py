"""Explanations over HTTP and gRPC: a replica's servers with its engine and its explaining process, without Ray."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from ray import serve

from tinylm import LLM, SamplingParams
from tinylm.client import AsyncClient, Client, ServiceError
from tinylm.client.wire import PIECES
from tinylm.engine import Engine
from tinylm.explain.engine_answer import Difference
from tinylm.explain.explainer import Explainer
from tinylm.explain.forms import as_json
from tinylm.explain.results import CacheUse, Candidate, Lens, RoundedInput, Scores, StageReport, Token, as_shades
from tinylm.llm import load
from tinylm.serving.calls import Busy
from tinylm.serving.explanations import Explanations
from tinylm.serving.grpc.methods import GrpcMethods
from tinylm.serving.http.app import build_http_app
from tinylm.serving.keys import make_key
from tinylm.serving.live import LiveMethods
from tinylm.serving.service import AppArgs, Service
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub, add_TinyLMServicer_to_server

PROMPT = "Once upon a time there was a \U0001f98a"
SETTINGS = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2, "seed": 5}
Post = Callable[..., Awaitable[tuple[int, dict[str, str], Any]]]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"), app_name="tinylm")
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)


@pytest.fixture
def args(stories_dir: Path) -> dict[str, Any]:
    return {"model": stories_dir, "kernels": "numpy", "precision": "int8", "slots": 2}


@asynccontextmanager
async def replica(args: dict[str, Any]) -> AsyncIterator[tuple[Service, Post]]:
    """Yield a service, and a function that sends a request to its HTTP application."""
    service = Service(AppArgs(**args))
    # Other programs may use the cores of this machine meanwhile.
    service.explanations._rest = lambda took_s, cpu_s: None  # type: ignore[method-assign]
    app = build_http_app(service)

    async def post(path: str, *, key: str | None = None, **fields: object) -> tuple[int, dict[str, str], Any]:
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        if key is not None:
            headers.append((b"authorization", f"Bearer {key}".encode()))
        scope = {
            **{"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "query_string": b""},
            **{"path": path, "raw_path": path.encode(), "headers": headers, "client": ("127.0.0.1", 1)},
        }
        sent: list[dict] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, json.loads(content)

    try:
        yield service, post
    finally:
        service.explanations.stop()
        service.engine.stop()


@asynccontextmanager
async def grpc_server(service: Service) -> AsyncIterator[str]:
    """Yield the address of a gRPC server with the methods of a replica."""
    methods = GrpcMethods()
    methods.service = service
    server = grpc.aio.server()
    add_TinyLMServicer_to_server(methods, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def over_http(response: pb.ExplainResponse) -> Any:
    """Return what HTTP answers, for the same piece over gRPC."""
    n, piece = response.n_tokens, response.WhichOneof("piece")
    part = getattr(response, piece)

    def token(message: pb.Token) -> Token:
        return Token(message.id, message.text, list(message.bytes))

    def stage(message: pb.ExplainResponse.Stage) -> StageReport:
        value = message.value if message.HasField("value") else None
        removed = (message.n_kept, message.n_removed, message.removed_probability, list(message.removed))
        return StageReport(message.name, value, *removed)

    match piece:
        case "tokens":
            return {"tokens": as_json([token(one) for one in part.tokens])}
        case "norms":
            return {"norms": as_json(np.array(part.norms).reshape(-1, n))}
        case "attention":
            layer, head = (getattr(part, name) if part.HasField(name) else None for name in ("layer", "head"))
            shape = (-1, n, n) if layer is not None else (16, -1, n, n)
            weights = np.frombuffer(part.weights, np.uint8).reshape(shape)
            return {"layer": layer, "head": head, "weights": as_json(weights)}
        case "lens":
            top = [[Candidate(token(one.token), one.probability) for one in best.candidates] for best in part.top]
            ranks = np.array(part.ranks).reshape(-1, n)
            return as_json(Lens([token(one) for one in part.answers], ranks, part.position, top))
        case "scores":
            found, stages = part.difference, [stage(one) for one in part.stages]
            difference = Difference(found.token, found.same_token, found.largest, found.n_compared)
            probabilities = np.array(part.probabilities).reshape(-1, len(stages))
            tokens, logits = [token(one) for one in part.tokens], np.array(part.logits)
            chosen = (token(part.greedy), token(part.chosen))
            return as_json(Scores(stages, tokens, logits, probabilities, *chosen, difference))
        case "matmul":
            values = np.frombuffer(part.values, np.int8).reshape(len(part.scales), -1)
            numbers = map(np.array, (part.scales, part.input_error, part.output_error))
            rounded = RoundedInput(values, *numbers, np.array(part.input) if part.input else None)
            return {"layer": part.layer, "name": part.name, **as_json(rounded)}
        case "logits":
            return {"tokens": as_json([token(one) for one in part.tokens]), "logits": as_json(part.logits)}
        case "cache":
            positions = (part.slots, part.slot_positions, part.slot_bytes, part.used_positions, part.used_bytes)
            return as_json(CacheUse(part.arithmetic, *positions))


def test_pieces_are_those_of_the_library(args: dict[str, Any], stories_dir: Path) -> None:
    tokenizer, model = load(stories_dir, "numpy", "int8")
    explainer, llm = Explainer(tokenizer, model), LLM.from_parts(tokenizer, model)
    params = SamplingParams(**SETTINGS, logit_bias={300: 2})

    async def check() -> None:
        async with replica(args) as (service, post):

            async def ask(piece: str, **fields: object) -> Any:
                status, headers, body = await post(f"/explain/{piece}", prompt=PROMPT, **fields)
                assert (status, headers["content-type"]) == (200, "application/json"), body
                return body

            assert await ask("tokens") == {"tokens": as_json(explainer.tokens(PROMPT))}
            assert await ask("norms") == {"norms": as_json(explainer.norms(PROMPT))}
            shades = as_json(as_shades(explainer.attention(PROMPT, 4)))
            assert await ask("attention", layer=4) == {"layer": 4, "head": None, "weights": shades}
            every = as_json(as_shades(explainer.attention_of_all(PROMPT)))
            assert await ask("attention") == {"layer": None, "head": None, "weights": every}
            assert every[3] == shades
            assert await ask("attention", layer=4, head=5) == {"layer": 4, "head": 5, "weights": shades[4:5]}
            assert await ask("lens") == as_json(explainer.lens(PROMPT))
            assert await ask("lens", position=2, top=3) == as_json(explainer.lens(PROMPT, 2, 3))
            rounded = as_json(explainer.matmul(PROMPT, 9, "up"))
            assert await ask("matmul", layer=9, name="up") == {"layer": 9, "name": "up", **rounded}
            one = await ask("matmul", layer=9, name="up", position=2)
            assert one == {"layer": 9, "name": "up", **as_json(explainer.matmul(PROMPT, 9, "up", 2))}
            raw = await ask("logits", top=9)
            assert raw["tokens"] == as_json(explainer.raw_scores(PROMPT, 9).tokens)
            sent = np.frombuffer(base64.b64decode(raw["logits"]), "<f4")
            np.testing.assert_array_equal(sent, explainer.logits(PROMPT))
            cache = await ask("cache")
            assert (cache["slots"], cache["used_positions"]) == (2, len(explainer.tokens(PROMPT)))

            found = await ask("scores", **SETTINGS, logit_bias={"300": 2}, top=7)
            difference = found.pop("difference")
            expected = as_json(explainer.scores(PROMPT, params, top=7))
            assert found == {name: value for name, value in expected.items() if name != "difference"}
            assert (difference["same_token"], difference["largest"] < 1e-4) == (True, True)
            assert [difference["token"]] == llm.generate(PROMPT, params)[0].token_ids[:1]
            greedy = await ask("scores", temperature=0, min_tokens=100)
            assert greedy["difference"]["token"] == greedy["chosen"]["id"] == greedy["greedy"]["id"]
            pid = service.explanations._process.pid
            assert os.getpriority(os.PRIO_PROCESS, pid) == 19
            if sys.platform == "linux":
                assert os.sched_getscheduler(pid) == os.SCHED_IDLE

    asyncio.run(check())


def test_both_clients_get_over_grpc_what_http_answers(args: dict[str, Any]) -> None:
    params = SamplingParams(**SETTINGS, logit_bias={300: 2})
    cases: list[tuple[str, dict[str, Any]]] = [
        *[("tokens", {}), ("norms", {}), ("attention", {"layer": 4}), ("attention", {"layer": 4, "head": 5})],
        *[("lens", {}), ("lens", {"position": 0, "top": 3}), ("matmul", {"layer": 9, "name": "up"}), ("cache", {})],
        *[("attention", {}), ("matmul", {"layer": 9, "name": "up", "position": 2}), ("logits", {"top": 9})],
    ]

    async def check() -> None:
        async with (
            replica(args) as (service, post),
            grpc_server(service) as address,
            AsyncClient(address, retries=0) as client,
        ):
            for piece, fields in cases:
                _, _, expected = await post(f"/explain/{piece}", prompt=PROMPT, **fields)
                answer = await client.explain(PROMPT, piece, **fields)
                assert over_http(answer) == expected
            with Client(address, retries=0) as plain:
                assert await asyncio.to_thread(plain.explain, PROMPT, piece, **fields) == answer
            assert answer.n_tokens == len(service.tokenizer.encode_document(PROMPT))

            for top in ({}, {"top": 7}):
                fields = {**SETTINGS, "logit_bias": {"300": 2}, **top}
                _, _, expected = await post("/explain/scores", prompt=PROMPT, **fields)
                found = over_http(await client.explain(PROMPT, "scores", params, **top))
                # The engine can find the prompt in its cache, and then adds numbers in another order.
                largest = [scores["difference"].pop("largest") for scores in (found, expected)]
                assert found == expected
                assert max(largest) < 1e-4
            by_default = (await client.explain(PROMPT, "scores")).scores.stages
            assert {stage.name: stage.value for stage in by_default}["temperature"] == SamplingParams().temperature

    asyncio.run(check())


def test_a_busy_replica_names_the_time_to_a_grpc_client(args: dict[str, Any]) -> None:
    async def check() -> None:
        async with (
            replica(args) as (service, _),
            grpc_server(service) as address,
            AsyncClient(address, retries=0) as client,
            AsyncClient(address, retries=20) as patient,
        ):
            asked = [client.explain(PROMPT, "norms") for _ in range(2)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            (error,) = [answer for answer in answers if isinstance(answer, Exception)]
            assert isinstance(error, ServiceError)
            assert (error.code, error.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 1.0)
            assert "another explanation: try again in 1 s" in str(error)
            answers = await asyncio.gather(*(patient.explain(PROMPT, "norms") for _ in range(2)))
            assert answers[0] == answers[1]

    asyncio.run(check())


def test_the_process_rests_on_a_busy_machine(stories_dir: Path) -> None:
    _, model = load(stories_dir, "numba", "int8")
    explanations = Explanations(stories_dir, "int8", Engine(model, n_slots=2))
    for took_s in (2.06, 1.9, 2.06):  # one slow answer is not enough
        explanations._rest(took_s, cpu_s=1.0)
        explanations.check_idle()
    explanations._rest(took_s=0.04, cpu_s=0.001)  # an answer that needs next to nothing says nothing
    explanations._rest(took_s=2.06, cpu_s=1.0)
    with pytest.raises(Busy, match="the machine is busy, and the last one was a short time ago: try again in 1 s"):
        explanations.check_idle()


def test_an_explanation_is_refused_when_the_replica_is_busy(args: dict[str, Any]) -> None:
    async def check() -> None:
        async with replica(args) as (service, post):
            answers = await asyncio.gather(*(post("/explain/norms", prompt=PROMPT) for _ in range(2)))
            assert sorted(status for status, _, _ in answers) == [200, 503]
            status, headers, body = max(answers, key=lambda answer: answer[0])
            assert (headers["retry-after"], body["error"]["code"]) == ("1", "busy")
            assert "another explanation: try again in 1 s" in body["error"]["message"]

            service.explanations._process.send_signal(signal.SIGKILL)  # the next question starts another process
            service.explanations._process.wait()
            assert (await post("/explain/norms", prompt=PROMPT))[0] == 200

            params = SamplingParams(max_tokens=200, ignore_eos=True)
            running = [service.engine.generate([1, 5], params) for _ in range(2)]
            for request in running:
                await anext(request)
            while service.engine.engine.n_running < 2:
                await asyncio.sleep(0.01)
            status, _, body = await post("/explain/scores", prompt=PROMPT)
            assert (status, body["error"]["code"]) == (503, "busy")
            assert "requests use all 2 slots" in body["error"]["message"]
            assert (await post("/explain/tokens", prompt=PROMPT))[0] == 200  # it takes no time
            for request in running:
                await request.aclose()
            while service.engine.engine.n_running > 0:
                await asyncio.sleep(0.01)
            assert (await post("/explain/scores", prompt=PROMPT))[0] == 200

    asyncio.run(check())


def test_the_live_batch_shows_which_requests_shared_a_step(args: dict[str, Any]) -> None:
    class Replica(LiveMethods):
        def __init__(self, service: Service) -> None:
            self.service = service

    async def check() -> None:
        async with replica(args) as (service, _):
            one = Replica(service)
            assert (await one.live_steps())["steps"] == []  # from now on, steps are recorded
            params = SamplingParams(max_tokens=4, ignore_eos=True)

            async def run(prompt: str) -> None:
                async for _ in service.engine.generate(service.tokenizer.encode_document(prompt), params):
                    pass

            await asyncio.gather(*map(run, (PROMPT, "My secret", "dog")))
            found = await one.live_steps()
            assert json.loads(json.dumps(found)) == found
            assert (found["id"], found["slots"]) == ("one", 2)
            shares = [share for step in found["steps"] for share in step["shares"]]
            assert {share["request"] for share in shares} == {1, 2, 3}
            for request in (1, 2, 3):
                of_answer = [s["tokens"] for s in shares if (s["request"], s["kind"]) == (request, "answer")]
                assert of_answer == [1, 1, 1]  # the last token of an answer is never computed
            assert any(len(step["shares"]) == 2 for step in found["steps"])
            assert all(set(share) == {"request", "slot", "tokens", "kind"} for share in shares)

    asyncio.run(check())


def test_explanations_need_a_key_where_text_does(
    args: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret, line = make_key("alice")
    (tmp_path / "keys.txt").write_text(line)

    async def check() -> None:
        async with replica({**args, "api_keys": tmp_path / "keys.txt"}) as (service, post):
            for piece in ("tokens", "norms", "attention", "lens", "logits", "scores", "matmul", "cache"):
                for key in (None, "nonsense"):
                    status, _, body = await post(f"/explain/{piece}", key=key, prompt=PROMPT)
                    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert (await post("/explain/cache", key=secret, prompt=PROMPT))[0] == 200
            async with grpc_server(service) as address:
                for api_key in (None, "nonsense"):
                    async with AsyncClient(address, retries=0, api_key=api_key) as client:
                        for piece in PIECES:
                            with pytest.raises(ServiceError, match="UNAUTHENTICATED"):
                                await client.explain(PROMPT, piece)
                async with AsyncClient(address, retries=0, api_key=secret) as client:
                    with caplog.at_level(logging.INFO, "ray.serve"):
                        assert (await client.explain(PROMPT, "cache")).cache.slots == 2
            record = caplog.records[-1]
            assert (record.method, record.status, record.api_key_name) == ("Explain", "OK", "alice")

    asyncio.run(check())


def test_an_error_names_field_value_and_limit(args: dict[str, Any]) -> None:
    of_both = [
        ("tokens", {"prompt": ""}, "prompt has 0 tokens: it must have 1 to 64"),
        ("lens", {"prompt": " dog" * 65}, "prompt has 65 tokens: it must have 1 to 64"),
        ("attention", {"prompt": "a", "layer": 17}, "layer is 17: it must be a whole number, 1 to 16"),
        ("attention", {"prompt": "a", "layer": 1, "head": 7}, "head is 7: it must be a whole number, 1 to 6"),
        ("attention", {"prompt": "a", "layer": -1}, "layer is -1: it must be a whole number, 1 to 16"),
        ("attention", {"prompt": "a", "head": 1}, "layer is None: it must be a whole number, 1 to 16"),
        (
            "matmul",
            {"prompt": "a", "layer": 1, "name": "up", "position": 2},
            "position is 2: it must be a whole number",
        ),
        ("logits", {"prompt": "a", "top": 0}, "top is 0: it must be a whole number, 1 to 100"),
        ("matmul", {"prompt": "a", "layer": 1, "name": "gate"}, "name is 'gate': it must be one of qkv, out, up, down"),
        ("lens", {"prompt": "a", "position": 2}, "position is 2: it must be a whole number, 0 to 1"),
        ("lens", {"prompt": "a", "top": 101}, "top is 101: it must be a whole number, 1 to 100"),
        ("lens", {"prompt": "a", "top": 0}, "top is 0: it must be a whole number, 1 to 100"),
        ("scores", {"prompt": "a", "top": 0}, "top is 0: it must be a whole number, 1 to 100"),
        ("scores", {"prompt": "a", "temperature": 11}, "temperature is 11.0: it must be a number, 0 to 10"),
        ("scores", {"prompt": "a", "logit_bias": {"4096": 1}}, "logit_bias holds token 4096: tokens are 0 to 4095"),
    ]
    of_http = [
        ("attention", {"prompt": "a", "layer": "1"}, "layer is '1': input should be a valid integer"),
        ("scores", {"prompt": "a", "max_tokens": 2}, "max_tokens is not a field of this API"),
        ("norms", {"prompt": 5}, "prompt is of type int"),
    ]

    def request(piece: str, prompt: str, **fields: Any) -> pb.ExplainRequest:
        own = {name: fields.pop(name) for name in ("layer", "head", "name", "position", "top") if name in fields}
        if biases := fields.pop("logit_bias", None):
            fields["logit_bias"] = {int(token): value for token, value in biases.items()}
        return pb.ExplainRequest(prompt=prompt, **{piece: {**own, "settings": fields} if fields else own})

    of_grpc = [
        (pb.ExplainRequest(prompt="a"), f"piece is not set: it must be one of {', '.join(PIECES)}"),
        (
            pb.ExplainRequest(prompt="a", scores={"settings": {"prompt": "b"}}),
            "settings.prompt must be empty: prompt is a field of ExplainRequest",
        ),
        *((request(piece, **fields), message) for piece, fields, message in of_both),
    ]

    async def check() -> None:
        async with replica(args) as (service, post):
            async with grpc_server(service) as address, grpc.aio.insecure_channel(address) as channel:
                for asked, message in of_grpc:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await TinyLMStub(channel).Explain(asked, timeout=60)
                    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                    assert caught.value.details().startswith(message)
            for piece, fields, message in of_both + of_http:
                status, _, body = await post(f"/explain/{piece}", **fields)
                assert (status, body["error"]["type"]) == (400, "invalid_request_error"), fields
                assert body["error"]["message"].startswith(message)
            assert (await post("/explain/norms", prompt="a", model="gpt-2"))[0] == 404
            assert (await post("/explain/everything", prompt="a"))[0] == 404

    asyncio.run(check())
