"""A process that forks: what it made before works in the child, or says why not, and never hangs."""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tinylm import LLM, SamplingParams
from tinylm.client import Client
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer, add_TinyLMServicer_to_server

LIMIT_S = 60
GREEDY = SamplingParams(max_tokens=8, temperature=0)
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def in_child(function: Callable[[], str]) -> str:
    """Return the function's result, or its error, from a forked child. Fail if the child hangs."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = function()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writable, text.encode())
        os._exit(0)
    os.close(writable)
    deadline = time.monotonic() + LIMIT_S
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    with os.fdopen(readable, "rb") as pipe:
        return pipe.read().decode()


def test_a_forked_child_uses_its_copy_of_the_model(stories: LLM) -> None:
    expected = stories.generate("Once", GREEDY)[0].text
    stream = stories.stream("Once", GREEDY)
    first = next(stream)
    assert in_child(lambda: stories.generate("Once", GREEDY)[0].text) == expected
    assert in_child(lambda: first + "".join(stream)) == expected
    assert first + "".join(stream) == expected


def test_a_child_says_that_the_model_was_in_use(stories_dir: Path) -> None:
    llm = LLM(stories_dir)
    with ThreadPoolExecutor(1) as pool, llm._stepping:  # as a thread inside a step
        assert in_child(lambda: llm.generate("Once", GREEDY)[0].text).startswith("RuntimeError: another thread used")
        assert pool.submit(in_child, lambda: "".join(llm.stream("Once", GREEDY))).result().startswith("RuntimeError")
    assert llm.generate("Once", GREEDY)[0].text


class Echo(TinyLMServicer):
    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        return pb.GenerateResponse(text=request.prompt, finish_reason=pb.FINISH_REASON_LENGTH)


def test_a_client_works_before_and_after_a_fork() -> None:
    """The server is in a process of its own: gRPC's servers do not survive a fork."""
    readable, writable = os.pipe()
    server_process = os.fork()
    if server_process == 0:
        server = grpc.server(ThreadPoolExecutor(2))
        add_TinyLMServicer_to_server(Echo(), server)
        os.write(writable, str(server.add_insecure_port("127.0.0.1:0")).encode())
        server.start()
        threading.Event().wait(4 * LIMIT_S)
        os._exit(0)
    try:
        address = f"127.0.0.1:{os.read(readable, 10).decode()}"
        with Client(address, timeout_s=20) as client:
            assert in_child(lambda: client.generate("unused before").text) == "unused before"
            assert client.generate("parent").text == "parent"
            assert in_child(lambda: client.generate("child").text) == "child"
            assert in_child(lambda: Client(address, timeout_s=20).generate("new").text) == "new"
            assert client.generate("parent").text == "parent"
    finally:
        os.kill(server_process, signal.SIGKILL)
        os.waitpid(server_process, 0)
        os.close(readable)
        os.close(writable)


def test_settings_survive_pickling() -> None:
    params = replace(GREEDY, stop=["."], logit_bias={5: 1.0}, seed=7)
    assert pickle.loads(pickle.dumps(params)) == params
