"""Stress a service as callers can: fill its queue, cancel many calls, set short deadlines, send invalid requests.

Each function returns how often it saw each gRPC status.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import grpc

from tinylm.client import METADATA
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

LIMIT_S = 60.0
STREAMS = 90  # a connection allows 100 at the same time
METHODS = ("Generate", "GenerateStream", "Tokenize", "GetModelInfo", "Explain")
OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))  # each channel has its own connection


def fill_queue(address: str, calls: int) -> Counter[str]:
    """Ask for `calls` answers at once, each as long as the context."""
    request = pb.GenerateRequest(prompt="Once upon a time", max_tokens=250, temperature=0, ignore_eos=True)
    channels = [grpc.insecure_channel(address, options=OPTIONS) for _ in range(-(-calls // STREAMS))]
    for channel in channels:  # on a busy machine, the service would answer the first calls while the others connect
        grpc.channel_ready_future(channel).result(LIMIT_S)
    stubs = itertools.cycle([TinyLMStub(channel) for channel in channels])
    futures = [next(stubs).Generate.future(request, metadata=METADATA, timeout=LIMIT_S) for _ in range(calls)]
    statuses = Counter(future.code().name for future in futures)
    for channel in channels:
        channel.close()
    return statuses


def cancel(address: str, calls: int) -> Counter[str]:
    """Cancel `calls` streams: before the first message, at it, or after some."""
    # No answer may end before its caller leaves.
    request = pb.GenerateRequest(prompt="Once upon a time", max_tokens=250, temperature=0, ignore_eos=True)
    statuses: Counter[str] = Counter()
    numbers = iter(range(calls))
    lock = threading.Lock()

    def caller() -> None:
        with grpc.insecure_channel(address, options=OPTIONS) as channel:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                call = TinyLMStub(channel).GenerateStream(request, metadata=METADATA, timeout=LIMIT_S)
                try:
                    for _ in range(number % 4):
                        next(call)
                    call.cancel()
                    status = "CANCELLED"
                except grpc.RpcError as error:
                    status = error.code().name
                with lock:
                    statuses[status] += 1

    callers = [threading.Thread(target=caller) for _ in range(16)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    return statuses


def short_deadlines(address: str, calls: int) -> Counter[str]:
    """Ask for answers that take longer than their time limit, which is the request's or gRPC's."""
    statuses: Counter[str] = Counter()
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        stub = TinyLMStub(channel)
        futures = []
        for number in range(calls):
            by_request = number % 2 == 0
            request = pb.GenerateRequest(prompt="Once", max_tokens=250, timeout_ms=5 if by_request else 0)
            timeout = LIMIT_S if by_request else 0.005
            futures.append(stub.Generate.future(request, metadata=METADATA, timeout=timeout))
            if len(futures) == STREAMS:
                statuses.update(future.code().name for future in futures)
                futures.clear()
        statuses.update(future.code().name for future in futures)
    return statuses


def fuzz(address: str, rounds: int = 1) -> Counter[str]:
    """Send each of `requests` to each method. An error of the service also counts as "METHOD what: STATUS"."""
    statuses: Counter[str] = Counter()
    with grpc.insecure_channel(address, options=(*OPTIONS, ("grpc.max_send_message_length", -1))) as channel:
        for _ in range(rounds):
            for what, data in requests():
                for method in METHODS:
                    if method == "GetModelInfo" and len(data) < 100:  # it has no fields, so every message is valid
                        continue
                    status = _send(channel, method, data)
                    statuses[status] += 1
                    if status in ("INTERNAL", "UNKNOWN", "UNAVAILABLE"):
                        statuses[f"{method} {what}: {status}"] += 1
    return statuses


def requests() -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of requests for text: damaged, extreme, or unusual."""
    numbers = {
        "NaN": float("nan"), "infinity": float("inf"), "-infinity": float("-inf"), "-1": -1.0, "1e308": 1e308,
        "5e-324": 5e-324, "-0": -0.0,
    }  # fmt: skip
    for field, (name, value) in itertools.product(
        ("temperature", "top_p", "min_p", "repetition_penalty"), numbers.items()
    ):
        yield f"{field} {name}", pb.GenerateRequest(prompt="Once", max_tokens=2, **{field: value}).SerializeToString()
    for field in ("max_tokens", "top_k", "logprobs", "timeout_ms"):
        for number in (0, 1, 2**31, 2**32 - 1):
            # An answer of two tokens can be faster than a timeout of 1 ms.
            fields = {"prompt": "Once", "max_tokens": 200 if field == "timeout_ms" else 2, field: number}
            yield f"{field} {number}", pb.GenerateRequest(**fields).SerializeToString()
    for seed in (0, 2**63, 2**64 - 1):
        yield f"seed {seed}", pb.GenerateRequest(prompt="Once", max_tokens=2, seed=seed).SerializeToString()

    def message(fields: dict) -> bytes:
        return pb.GenerateRequest(max_tokens=2, **fields).SerializeToString()

    yield "nothing", b""
    yield "an empty prompt", message({"prompt": ""})
    yield "zeros in the prompt", message({"prompt": "\0" * 100})
    yield "odd characters", message({"prompt": "\u202e\ufeff\U0010ffff\u0300" * 20})
    yield "a prompt of 4 MB", message({"prompt": "a" * 4_000_000})
    yield "a prompt of 5 MB", message({"prompt": "a" * 5_000_000})
    yield "one word of 60 KB", message({"prompt": "x" * 60_000})
    yield "an empty stop string", message({"prompt": "Once", "stop": [""]})
    yield "5,000 stop strings", message({"prompt": "Once", "stop": [f"stop {i}" for i in range(5000)]})
    yield "a stop string of 1 MB", message({"prompt": "Once", "stop": ["s" * 1_000_000]})
    yield "a prompt that is not UTF-8", b"\x0a\x04\xff\xfe\xfd\xfc"
    yield "half a character", b"\x0a\x01\xc3"
    yield "a lone surrogate", b"\x0a\x03\xed\xa0\x80"
    yield "a message cut short", b"\x0a\x7fOnce"
    yield "a field of another type", b"\x08\x01"
    yield "an unknown field", b"\xf8\x07\x01"
    yield "a group without an end", b"\x0b" * 50
    yield "a length of 2^63", b"\x0a" + b"\xff" * 8 + b"\x7f"
    yield "noise", bytes(range(256))


def _send(channel: grpc.Channel, method: str, data: bytes) -> str:
    path = f"/tinylm.v1.TinyLM/{method}"
    arguments = {"metadata": METADATA, "timeout": LIMIT_S}
    try:
        if method == "GenerateStream":
            for _ in channel.unary_stream(path)(data, **arguments):
                pass
        else:
            channel.unary_unary(path)(data, **arguments)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def settled(true: Callable[[], bool], limit_s: float) -> bool:
    """Return whether `true` returns True within the limit."""
    deadline = time.monotonic() + limit_s
    while not (done := true()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return done
