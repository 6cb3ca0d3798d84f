"""The methods of `tinylm.v1.TinyLM`: a service's answers as protobuf messages and gRPC statuses.

Serve reports an exception that leaves a method as INTERNAL, with a traceback. Therefore no method raises one.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from urllib.parse import unquote

from google.protobuf.message import Message
from ray.serve.grpc_util import RayServegRPCContext

import tinylm
from tinylm.client.wire import STATUS_DETAILS, ending, params_from_request, retry_details
from tinylm.engine import EngineFull, check_ids
from tinylm.engine.delta import Delta
from tinylm.engine.prompt import check_size
from tinylm.sampling import TokenLogprobs
from tinylm.serving.calls import Call, Refused
from tinylm.serving.grpc import explain
from tinylm.serving.grpc_service import Unparsable
from tinylm.serving.ray import haproxy
from tinylm.serving.service import Service
from tinylm.serving.trace_context import TRACEPARENT, read_traceparent
from tinylm.tokenizer import Tokenizer
from tinylm.v1 import tinylm_pb2 as pb

MAX_TOKENS = 65_536  # to detokenize
_PEER = re.compile(r"ipv[46]:\[?(?P<address>[0-9a-fA-F.:]+?(%[^\]]+)?)\]?:\d+")  # "%" begins an IPv6 zone


class GrpcMethods:
    """The methods of the service. A deployment inherits them."""

    service: Service

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext) -> pb.GenerateResponse:
        with self.service.answering("Generate") as call:
            self._let_in(call, request, grpc_context)
            scores: list[pb.TokenLogprob] = []
            async with aclosing(await self._deltas(request, call, whole=True)) as deltas:
                async for delta in deltas:
                    scores += self._prompt_logprobs(delta)
                    if (completion := delta.completion) is None:
                        continue
                    if completion.finish_reason == "timeout":
                        raise Refused.timeout(request.timeout_ms, len(completion.token_ids))
                    return pb.GenerateResponse(
                        text=completion.text,
                        logprobs=_logprobs(completion.token_ids, completion.logprobs or [], self.service.tokenizer),
                        prompt_logprobs=scores,
                        **ending(completion, self.service.replica),
                    )
        _refuse(call, grpc_context)
        return pb.GenerateResponse()

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        with self.service.answering("GenerateStream") as call:
            self._let_in(call, request, grpc_context)
            async with aclosing(await self._deltas(request, call, whole=False)) as deltas:
                async for delta in deltas:
                    end = {} if delta.completion is None else ending(delta.completion, self.service.replica)
                    logprobs = _logprobs(delta.tokens, delta.logprobs, self.service.tokenizer)
                    n_tokens = len(delta.tokens)
                    scores = self._prompt_logprobs(delta)
                    yield pb.GenerateStreamResponse(
                        text=delta.text, tokens=n_tokens, logprobs=logprobs, prompt_logprobs=scores, **end
                    )
        if call.error is not None:
            _refuse(call, grpc_context)
            yield pb.GenerateStreamResponse()  # the Python proxy sends a status only with a message

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext) -> pb.TokenizeResponse:
        with self.service.answering("Tokenize") as call:
            self._let_in(call, request, grpc_context)
            check_size("text", request.text)
            pieces = self.service.tokenizer.piece_bytes
            ids = self.service.tokenizer.encode(request.text)
            return pb.TokenizeResponse(tokens=[pb.Token(id=token, bytes=pieces[token]) for token in ids])
        _refuse(call, grpc_context)
        return pb.TokenizeResponse()

    async def Detokenize(
        self, request: pb.DetokenizeRequest, grpc_context: RayServegRPCContext
    ) -> pb.DetokenizeResponse:
        tokenizer = self.service.tokenizer
        with self.service.answering("Detokenize") as call:
            self._let_in(call, request, grpc_context)
            if len(request.tokens) > MAX_TOKENS:
                raise ValueError(f"tokens has {len(request.tokens)} tokens: it must have at most {MAX_TOKENS}")
            check_ids(request.tokens, self.service.config.vocab_size)
            text, its_bytes = tokenizer.decode(request.tokens), tokenizer.decode_bytes(request.tokens)
            return pb.DetokenizeResponse(text=text, bytes=its_bytes)
        _refuse(call, grpc_context)
        return pb.DetokenizeResponse()

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetModelInfoResponse:
        service, config = self.service, self.service.config
        with service.answering("GetModelInfo") as call:
            self._let_in(call, request, grpc_context)
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

    async def Explain(self, request: pb.ExplainRequest, grpc_context: RayServegRPCContext) -> pb.ExplainResponse:
        with self.service.answering("Explain") as call:
            self._let_in(call, request, grpc_context)
            return await explain.answer(self.service, request, call)
        _refuse(call, grpc_context)
        return pb.ExplainResponse()

    def _let_in(self, call: Call, request: Message | Unparsable, context: RayServegRPCContext) -> None:
        """Raise Refused for a caller without access, ValueError for an unparsable request."""
        metadata = context.invocation_metadata()
        call.trace = read_traceparent([value for name, value in metadata if name == TRACEPARENT])
        authorization = dict(metadata).get("authorization")
        call.key = self.service.access.check(
            address_of(context.peer() or ""), authorization if isinstance(authorization, str) else None
        )
        if isinstance(request, Unparsable):
            raise request

    def _prompt_logprobs(self, delta: Delta) -> list[pb.TokenLogprob]:
        tokens, scores = [token for token, _ in delta.prompt], [score for _, score in delta.prompt]
        return _logprobs(tokens, scores, self.service.tokenizer)

    async def _deltas(self, request: pb.GenerateRequest, call: Call, whole: bool) -> AsyncGenerator[Delta, None]:
        params = params_from_request(request)
        (ids,) = await self.service.admit(call, [request.prompt], params)
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else None
        return self.service.generate(ids, params, timeout_s, call, whole=whole)


def address_of(peer: str) -> str | None:
    """Return the IP address in gRPC's name of a peer, None for a Unix socket, "" for an unknown form.

    'ipv6:%5B::1%5D:50051' -> '::1'
    """
    if peer.startswith("unix:"):
        return None
    match = _PEER.fullmatch(unquote(peer))
    return match["address"] if match else ""


def _refuse(call: Call, context: RayServegRPCContext) -> None:
    """Report the status of a failed call to the client."""
    context.set_code(call.status)
    context.set_details(call.details)
    if isinstance(call.error, EngineFull):
        context.set_trailing_metadata([(haproxy.FULL, "1")])
    elif isinstance(call.error, Refused) and call.error.retry_after_s is not None:
        details = retry_details(call.status.value[0], call.details, call.error.retry_after_s)
        context.set_trailing_metadata([(STATUS_DETAILS, details)])  # type: ignore[list-item]  # bytes, since it is -bin


def _logprobs(tokens: list[int], logprobs: list[TokenLogprobs], tokenizer: Tokenizer) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token=token,
            text=tokenizer.decode([token]),
            logprob=entry.logprob,
            top=[pb.TokenLogprob(token=t, text=tokenizer.decode([t]), logprob=p) for t, p in entry.top],
        )
        for token, entry in zip(tokens, logprobs, strict=False)  # `logprobs` is empty if not requested
    ]
