"""The methods of `tinylm.v1.TinyLM` on a Serve deployment: a service's answers as protobuf messages and gRPC statuses.

An exception that left a method would reach the client as INTERNAL with a traceback; none does.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from urllib.parse import unquote

from google.protobuf.message import Message
from ray.serve.grpc_util import RayServegRPCContext

import tinylm
from tinylm.client.wire import ending, params_from_request
from tinylm.engine import EngineFull
from tinylm.sampling import TokenLogprobs
from tinylm.serving.calls import Call, Refused
from tinylm.serving.grpc_service import Unparsable
from tinylm.serving.ray import haproxy
from tinylm.serving.service import Service, check_size
from tinylm.tokenizer import Tokenizer
from tinylm.v1 import tinylm_pb2 as pb

_PEER = re.compile(r"ipv[46]:\[?(?P<address>[0-9a-fA-F.:]+?(%[^\]]+)?)\]?:\d+")  # with the zone of a link-local one


class GrpcMethods:
    """For a deployment to inherit."""

    service: Service

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext) -> pb.GenerateResponse:
        service = self.service
        with self.service.answering("Generate") as call:
            self._let_in(call, request, grpc_context)
            timeout_s = request.timeout_ms / 1000 if request.timeout_ms else None
            deltas = service.generate(request.prompt, params_from_request(request), timeout_s, call, whole=True)
            async with aclosing(deltas):
                async for delta in deltas:
                    if (completion := delta.completion) is None:
                        continue
                    if completion.finish_reason == "timeout":
                        raise Refused.timeout(request.timeout_ms, len(completion.token_ids))
                    return pb.GenerateResponse(
                        text=completion.text,
                        logprobs=_logprobs(completion.token_ids, completion.logprobs or [], service.tokenizer),
                        **ending(completion, service.replica),
                    )
        _refuse(call, grpc_context)
        return pb.GenerateResponse()

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        service = self.service
        with self.service.answering("GenerateStream") as call:
            self._let_in(call, request, grpc_context)
            timeout_s = request.timeout_ms / 1000 if request.timeout_ms else None
            deltas = service.generate(request.prompt, params_from_request(request), timeout_s, call)
            async with aclosing(deltas):
                async for delta in deltas:
                    end = {} if delta.completion is None else ending(delta.completion, service.replica)
                    logprobs = _logprobs(delta.tokens, delta.logprobs, service.tokenizer)
                    n_tokens = len(delta.tokens)
                    yield pb.GenerateStreamResponse(text=delta.text, tokens=n_tokens, logprobs=logprobs, **end)
        if call.error is not None:
            _refuse(call, grpc_context)
            yield pb.GenerateStreamResponse()  # the Python proxy takes the status from a message alone

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext) -> pb.TokenizeResponse:
        with self.service.answering("Tokenize") as call:
            self._let_in(call, request, grpc_context)
            check_size("text", request.text)
            pieces = self.service.tokenizer.piece_bytes
            ids = self.service.tokenizer.encode(request.text)
            return pb.TokenizeResponse(tokens=[pb.Token(id=token, bytes=pieces[token]) for token in ids])
        _refuse(call, grpc_context)
        return pb.TokenizeResponse()

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetModelInfoResponse:
        service = self.service
        with self.service.answering("GetModelInfo") as call:
            self._let_in(call, request, grpc_context)
            config = service.config
            return pb.GetModelInfoResponse(
                name=service.name,
                parameters=config.n_parameters,
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                layers=config.n_layers,
                heads=config.n_heads,
                context=config.context,
                weights=service.weights,
                arithmetic=service.arithmetic,
                slots=service.args.slots,
                replica=service.replica,
                version=tinylm.__version__,
            )
        _refuse(call, grpc_context)
        return pb.GetModelInfoResponse()

    def _let_in(self, call: Call, request: Message | Unparsable, context: RayServegRPCContext) -> None:
        """Raises Refused for a caller who may not ask, ValueError for a request that is none."""
        authorization = dict(context.invocation_metadata()).get("authorization")
        call.key = self.service.access.check(
            address_of(context.peer() or ""), authorization if isinstance(authorization, str) else None
        )
        if isinstance(request, Unparsable):
            raise ValueError(request.reason)


def address_of(peer: str) -> str | None:
    """The IP address in gRPC's name for a peer; None for one of this machine without any, "" for one not understood.

    'ipv6:%5B::1%5D:50051' -> '::1'
    """
    if peer.startswith("unix:"):
        return None
    match = _PEER.fullmatch(unquote(peer))
    return match["address"] if match else ""


def _refuse(call: Call, context: RayServegRPCContext) -> None:
    """Tell the client how its call ended; the message that goes with it is empty."""
    context.set_code(call.status)
    context.set_details(call.details)
    if isinstance(call.error, EngineFull):
        context.set_trailing_metadata([(haproxy.FULL, "1")])


def _logprobs(tokens: list[int], logprobs: list[TokenLogprobs], tokenizer: Tokenizer) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token=token,
            text=tokenizer.decode([token]),
            logprob=entry.logprob,
            top=[pb.TokenLogprob(token=t, text=tokenizer.decode([t]), logprob=p) for t, p in entry.top],
        )
        for token, entry in zip(tokens, logprobs, strict=False)  # none unless asked for
    ]
