"""A client and a service of different releases: fields and values that one of them does not know do no harm."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import SamplingParams
from tinylm.client import Client
from tinylm.client.answer import ReceivedAnswer, completion_of, tokens
from tinylm.client.wire import explain_request, params_from_request, request_from_params
from tinylm.serving.grpc_service import _tolerant
from tinylm.v1 import tinylm_pb2 as pb

KNOWN = 50  # every field of the proto has a smaller number
LENGTH_DELIMITED = 2
PARAMS = SamplingParams(max_tokens=9, seed=4, stop=("x",), logit_bias={5: 1.5}, logprobs=1, prompt_logprobs=0)
LOGPROBS = [pb.TokenLogprob(token=3, text=" a", logprob=-1.5, top=[pb.TokenLogprob(token=4, text="b", logprob=-2)])]
ANSWER = pb.GenerateResponse(
    text="Once",
    finish_reason=pb.FINISH_REASON_LENGTH,
    usage=pb.Usage(prompt_tokens=4, completion_tokens=1),
    timings=pb.Timings(queue_ms=1, first_token_ms=2, total_ms=3),
    logprobs=LOGPROBS,
    prompt_logprobs=LOGPROBS,
    replica="one",
)
NEW_REASON = 77


def varint(number: int) -> bytes:
    """Return protobuf's base-128 varint."""
    low = number & 0x7F
    return bytes([low]) if number < 0x80 else bytes([low | 0x80]) + varint(number >> 7)


def field(number: int, wire_type: int, payload: bytes) -> bytes:
    return varint(number << 3 | wire_type) + payload


def delimited(number: int, payload: bytes) -> bytes:
    return field(number, LENGTH_DELIMITED, varint(len(payload)) + payload)


NUMBERS = st.integers(KNOWN, 2**29 - 1).filter(lambda number: not 19000 <= number <= 19999)  # those are protobuf's own
FIELDS = st.one_of(
    st.builds(lambda number, value: field(number, 0, varint(value)), NUMBERS, st.integers(0, 2**64 - 1)),
    st.builds(lambda number, data: field(number, 1, data), NUMBERS, st.binary(min_size=8, max_size=8)),
    st.builds(delimited, NUMBERS, st.binary(max_size=40)),
    st.builds(lambda number, data: field(number, 5, data), NUMBERS, st.binary(min_size=4, max_size=4)),
)
UNKNOWN = st.lists(FIELDS, min_size=1, max_size=6).map(b"".join)


def with_unknown(message: Message, unknown: bytes) -> bytes:
    """Return the bytes of a message with unknown fields, also inside each message that it holds."""
    inside = b""
    for descriptor, value in message.ListFields():
        is_map = descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry
        if descriptor.message_type is None or is_map:
            scalar = type(message)()
            scalar.CopyFrom(message)
            for other, _ in message.ListFields():
                if other is not descriptor:
                    scalar.ClearField(other.name)
            inside += scalar.SerializeToString()
        else:
            for part in value if descriptor.is_repeated else [value]:
                inside += delimited(descriptor.number, with_unknown(part, unknown))
    return unknown + inside + unknown


@given(UNKNOWN)
@settings(max_examples=100)
def test_a_service_ignores_unknown_fields_of_a_request(unknown: bytes) -> None:
    request = request_from_params("Once", PARAMS)
    received = _tolerant(pb.GenerateRequest)(with_unknown(request, unknown))
    assert isinstance(received, pb.GenerateRequest)
    assert received.prompt == "Once"
    assert params_from_request(received) == PARAMS == params_from_request(request)
    question = _tolerant(pb.ExplainRequest)(
        with_unknown(explain_request("Once", "scores", PARAMS, {"top": 0}), unknown)
    )
    assert (question.prompt, question.WhichOneof("piece"), question.scores.top) == ("Once", "scores", 0)
    assert params_from_request(question.scores.settings) == PARAMS
    assert _tolerant(pb.ExplainRequest)(unknown).WhichOneof("piece") is None  # a piece of a later release


@given(UNKNOWN)
@settings(max_examples=100)
def test_a_client_ignores_unknown_fields_of_an_answer(unknown: bytes) -> None:
    answer = pb.GenerateResponse.FromString(with_unknown(ANSWER, unknown))
    assert completion_of(PARAMS, answer, 1) == completion_of(PARAMS, ANSWER, 1)
    stream = ReceivedAnswer(PARAMS, 1)
    assert stream.add(pb.GenerateStreamResponse.FromString(unknown)) == ("", [], None)
    assert not stream.has_begun
    names = {descriptor.name for descriptor in pb.GenerateStreamResponse.DESCRIPTOR.fields}
    last = pb.GenerateStreamResponse(**{d.name: value for d, value in ANSWER.ListFields() if d.name in names})
    received = stream.add(pb.GenerateStreamResponse.FromString(with_unknown(last, unknown)))[-1]
    assert received == completion_of(PARAMS, ANSWER, 1)
    found = pb.TokenizeResponse(tokens=[pb.Token(id=3, bytes=b" a")])
    assert tokens(pb.TokenizeResponse.FromString(with_unknown(found, unknown))) == [(3, b" a")]


@given(st.integers(4, 2**31 - 1) | st.integers(-(2**31), -1))
@settings(max_examples=30)
def test_an_unknown_finish_reason_ends_an_answer(number: int) -> None:
    answer = pb.GenerateResponse(text="Once")
    answer.finish_reason = number  # type: ignore[assignment]
    completion = completion_of(SamplingParams(), pb.GenerateResponse.FromString(answer.SerializeToString()), 1)
    assert (completion.finish_reason, completion.text) == ("unknown", "Once")


def test_an_answer_of_an_older_service_needs_only_text_and_reason() -> None:
    answer = pb.GenerateResponse(text="Once", finish_reason=pb.FINISH_REASON_STOP)
    completion = completion_of(PARAMS, answer, 1)
    assert (completion.text, completion.n_tokens, completion.logprobs, completion.prompt_logprobs) == (
        "Once",
        0,
        [],
        [],
    )


@pytest.fixture
def newer_service() -> Iterator[str]:
    """A real server that sends bytes of a later release."""
    unknown = field(KNOWN, 0, varint(1)) + delimited(KNOWN + 1, b"new")
    last = with_unknown(pb.GenerateResponse(text="Once"), unknown)

    class Newer(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            if details.method.endswith("/GenerateStream"):
                reason = field(pb.GenerateStreamResponse.FINISH_REASON_FIELD_NUMBER, 0, varint(NEW_REASON))
                return grpc.unary_stream_rpc_method_handler(lambda *_: iter([unknown, last + reason]))
            reason = field(pb.GenerateResponse.FINISH_REASON_FIELD_NUMBER, 0, varint(NEW_REASON))
            return grpc.unary_unary_rpc_method_handler(lambda *_: last + reason)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Newer()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_a_client_reads_the_answers_of_a_newer_service(newer_service: str) -> None:
    with Client(newer_service, retries=0) as client:
        whole, stream = client.generate("x"), client.stream("x")
        assert "".join(stream) == whole.text == "Once"
        assert whole.finish_reason == stream.completion.finish_reason == "unknown"
