"""The Ray Serve deployment: gRPC requests into the engine, text back. Holds no model code.

    serve run configs/serve.yaml

`build_app` is the typed builder that the YAML's `args` go to. Balancing over replicas is Ray Serve's business.
"""

# No `from __future__ import annotations` here: Serve reads the builder's annotation to make its argument.

import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

import tinylm
from tinylm.async_engine import AsyncEngine, EngineDied
from tinylm.completion import Completion, CompletionBuilder
from tinylm.engine import Engine
from tinylm.kernels import KernelName, Precision
from tinylm.llm import load
from tinylm.sampling import TokenLogprobs
from tinylm.serving.access import Access
from tinylm.serving.calls import Call, Refused, answering
from tinylm.serving.grpc_service import Unparsable
from tinylm.serving.health import HealthMethods
from tinylm.serving.metrics import ServiceMetrics
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.wire import FINISH_REASONS, params_from_request

MAX_TEXT_BYTES = 64 * 1024  # of a prompt or a text to tokenize; far more than the context holds


class AppArgs(BaseModel):
    """What `args` in the Serve config may say."""

    model_config = ConfigDict(extra="forbid")

    model: Path = Path("models/stories-8m")  # a model directory, from the directory that Serve was started in
    slots: int = Field(default=16, ge=1, le=1024)  # requests decoded together
    max_waiting: int = Field(default=64, ge=0)  # requests queued behind them; more are refused
    prefill_tokens: int = Field(default=64, ge=1)  # prompt tokens a step takes while others decode
    kernels: KernelName = "auto"  # compiled ones where they can be, else NumPy
    precision: Precision = "auto"  # of activations and KV cache: int8, float32
    blas_threads: int = Field(default=1, ge=1)  # of one replica, for the numpy kernels
    stream_interval_ms: float = Field(default=10.0, ge=0)  # between a stream's messages, from its second
    stalled_s: float = Field(default=10.0, gt=0)  # a step that takes longer gets the replica replaced
    api_keys: Path | None = None  # the key file (`tinylm key`); without one, callers on this machine alone are served
    allow_anonymous: bool = False  # without a key file: serve callers from anywhere
    log_prompts: bool = False  # write prompts into the log


def build_app(args: AppArgs) -> serve.Application:
    """The application; relative paths are made absolute here, since replicas have directories of their own."""
    paths = {"model": args.model.resolve(), "api_keys": args.api_keys and args.api_keys.resolve()}
    return TinyLM.bind(args.model_copy(update=paths))  # type: ignore[attr-defined]


class Delta(NamedTuple):
    """What has been added to an answer."""

    text: str
    n_tokens: int
    logprobs: list[pb.TokenLogprob]  # one a token, if asked for
    completion: Completion | None  # with the last


@serve.deployment
class TinyLM(HealthMethods):
    """One replica: an engine with its own weights in memory and its own KV cache."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]  # Serve awaits it, on the replica's loop
        self._access = Access(args.api_keys, args.allow_anonymous)
        self._tokenizer, model = load(args.model, args.kernels, args.precision)
        self._config, self._weights, self._arithmetic = model.config, model.weight_type, model.arithmetic
        self._name = args.model.name
        self._args, self._every_s = args, args.stream_interval_ms / 1000
        engine = Engine(model, args.slots, args.max_waiting, args.prefill_tokens)
        self._engine = AsyncEngine(engine, args.blas_threads)
        self._metrics = ServiceMetrics(engine)
        self._replica = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Called by Serve; an engine that died or stalled gets the replica replaced."""
        self._engine.check(self._args.stalled_s)

    def _is_healthy(self) -> bool:
        try:
            self.check_health()
        except EngineDied:
            return False
        return True

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext) -> pb.GenerateResponse:
        with self._answering("Generate", request, grpc_context) as call:
            every_s = self._every_s if request.stop else math.inf
            async with aclosing(self._deltas(request, call, every_s)) as deltas:
                async for delta in deltas:
                    if (completion := delta.completion) is None:
                        continue
                    if completion.finish_reason == "timeout":
                        raise Refused(
                            grpc.StatusCode.DEADLINE_EXCEEDED,
                            f"timeout_ms is {request.timeout_ms}: it was over after "
                            f"{len(completion.token_ids)} tokens of the answer",
                        )
                    return pb.GenerateResponse(
                        text=completion.text,
                        logprobs=self._logprobs(completion.token_ids, completion.logprobs or []),
                        **self._ending(completion),
                    )
        return pb.GenerateResponse()

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        with self._answering("GenerateStream", request, grpc_context) as call:
            async with aclosing(self._deltas(request, call, self._every_s)) as deltas:
                async for text, n_tokens, logprobs, completion in deltas:
                    ending = {} if completion is None else self._ending(completion)
                    yield pb.GenerateStreamResponse(text=text, tokens=n_tokens, logprobs=logprobs, **ending)
        if call.status is not grpc.StatusCode.OK:
            yield pb.GenerateStreamResponse()  # the Python proxy takes the status from a message alone

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext) -> pb.TokenizeResponse:
        with self._answering("Tokenize", request, grpc_context):
            _check_size("text", request.text)
            pieces = self._tokenizer.piece_bytes
            ids = self._tokenizer.encode(request.text)
            return pb.TokenizeResponse(tokens=[pb.Token(id=token, bytes=pieces[token]) for token in ids])
        return pb.TokenizeResponse()

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetModelInfoResponse:
        with self._answering("GetModelInfo", request, grpc_context):
            config = self._config
            return pb.GetModelInfoResponse(
                name=self._name,
                parameters=config.n_parameters,
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                layers=config.n_layers,
                heads=config.n_heads,
                context=config.context,
                weights=self._weights,
                arithmetic=self._arithmetic,
                slots=self._args.slots,
                replica=self._replica,
                version=tinylm.__version__,
            )
        return pb.GetModelInfoResponse()

    @contextmanager
    def _answering(self, method: str, request: Message | Unparsable, context: RayServegRPCContext) -> Iterator[Call]:
        """Around a call's work, which begins once its caller is let in and its request is one."""
        with answering(method, context, self._metrics.count) as call:
            call.key = self._access.check(context)
            if isinstance(request, Unparsable):
                raise ValueError(request.reason)
            yield call

    async def _deltas(self, request: pb.GenerateRequest, call: Call, every_s: float) -> AsyncGenerator[Delta, None]:
        """What becomes certain of an answer, not oftener than every_s after its first token."""
        _check_size("prompt", request.prompt)
        if self._args.log_prompts:
            call.prompt = request.prompt
        params = params_from_request(request)
        ids = self._tokenizer.encode_document(request.prompt)
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else None
        builder: CompletionBuilder | None = None
        n_sent = 0
        async with aclosing(self._engine.generate(ids, params, timeout_s, every_s)) as updates:
            async for sequence in updates:
                if builder is None:
                    builder, call.sequence = CompletionBuilder(sequence, self._tokenizer), sequence
                text = builder.take()
                call.completion = builder.completion
                if text or builder.completion is not None:
                    new = slice(n_sent, builder.n_taken)
                    n_sent = builder.n_taken
                    logprobs = self._logprobs(sequence.tokens[new], sequence.logprobs[new])
                    yield Delta(text, new.stop - new.start, logprobs, builder.completion)
                if builder.completion is not None:
                    return

    def _ending(self, completion: Completion) -> dict:
        """The fields that both kinds of answer end with."""
        return {
            "finish_reason": FINISH_REASONS[completion.finish_reason],
            "usage": pb.Usage(prompt_tokens=completion.n_prompt_tokens, completion_tokens=len(completion.token_ids)),
            "timings": pb.Timings(
                queue_ms=completion.queue_s * 1000,
                first_token_ms=completion.first_token_s * 1000,
                total_ms=completion.total_s * 1000,
            ),
            "replica": self._replica,
        }

    def _logprobs(self, tokens: list[int], logprobs: list[TokenLogprobs]) -> list[pb.TokenLogprob]:
        return [
            pb.TokenLogprob(
                token=token,
                text=self._tokenizer.decode([token]),
                logprob=entry.logprob,
                top=[pb.TokenLogprob(token=t, text=self._tokenizer.decode([t]), logprob=p) for t, p in entry.top],
            )
            for token, entry in zip(tokens, logprobs, strict=False)  # none unless asked for
        ]


def _check_size(field: str, text: str) -> None:
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{field} has {size} bytes: it must have at most {MAX_TEXT_BYTES}")
