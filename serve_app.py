"""The Ray Serve deployment: checks gRPC requests, feeds the engine, streams text back. Holds no model code.

    serve run configs/serve.yaml

`build_app` is the typed builder that the YAML's `args` go to. Balancing over replicas is Ray Serve's business.
"""

# No `from __future__ import annotations` here: Serve reads the builder's annotation to make its argument.

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import grpc
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

import tinylm
from tinylm.async_engine import AsyncEngine, EngineDied
from tinylm.completion import Completion, CompletionBuilder
from tinylm.engine import Engine, EngineFull
from tinylm.kernels import KernelName, Precision
from tinylm.llm import load
from tinylm.sampling import TokenLogprobs
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.wire import FINISH_REASONS, params_from_request

logger = logging.getLogger("ray.serve")

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


def build_app(args: AppArgs) -> serve.Application:
    """The application; a relative model path is made absolute here, since replicas have directories of their own."""
    return TinyLM.bind(args.model_copy(update={"model": args.model.resolve()}))  # type: ignore[attr-defined]


class _Refused(Exception):
    """A call that ends with a status instead of an answer."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


@serve.deployment
class TinyLM:
    """One replica: an engine with its own weights in memory and its own KV cache."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]  # Serve awaits it, on the replica's loop
        self._tokenizer, model = load(args.model, args.kernels, args.precision)
        self._config, self._weights, self._arithmetic = model.config, model.weight_type, model.arithmetic
        self._name = args.model.name
        self._slots = args.slots
        engine = Engine(model, args.slots, args.max_waiting, args.prefill_tokens)
        self._engine = AsyncEngine(engine, args.blas_threads)
        self._replica = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Called by Serve; an engine that died or stalled gets the replica replaced."""
        self._engine.check()

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext) -> pb.GenerateResponse:
        try:
            async with aclosing(self._deltas(request)) as deltas:
                async for _, _, completion in deltas:
                    if completion is not None:
                        if completion.finish_reason == "timeout":
                            raise _Refused(
                                grpc.StatusCode.DEADLINE_EXCEEDED,
                                f"timeout_ms is {request.timeout_ms}: it was over after "
                                f"{len(completion.token_ids)} tokens of the answer",
                            )
                        return pb.GenerateResponse(
                            text=completion.text,
                            logprobs=self._logprobs(completion.token_ids, completion.logprobs or []),
                            **self._ending(completion),
                        )
            raise RuntimeError("the answer never ended")
        except Exception as error:
            _refuse(grpc_context, error)
            return pb.GenerateResponse()

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        try:
            async with aclosing(self._deltas(request)) as deltas:
                async for text, logprobs, completion in deltas:
                    ending = {} if completion is None else self._ending(completion)
                    if text or logprobs or ending:
                        yield pb.GenerateStreamResponse(text=text, logprobs=logprobs, **ending)
        except Exception as error:
            _refuse(grpc_context, error)
            yield pb.GenerateStreamResponse()  # the Python proxy takes the status from a message alone

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext) -> pb.TokenizeResponse:
        try:
            _check_size("text", request.text)
            pieces = self._tokenizer.piece_bytes
            ids = self._tokenizer.encode(request.text)
            return pb.TokenizeResponse(tokens=[pb.Token(id=token, bytes=pieces[token]) for token in ids])
        except Exception as error:
            _refuse(grpc_context, error)
            return pb.TokenizeResponse()

    async def GetModelInfo(self, request: pb.GetModelInfoRequest) -> pb.GetModelInfoResponse:
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
            slots=self._slots,
            replica=self._replica,
            version=tinylm.__version__,
        )

    async def _deltas(
        self, request: pb.GenerateRequest
    ) -> AsyncGenerator[tuple[str, list[pb.TokenLogprob], Completion | None], None]:
        """Text and log-probabilities as they become certain; the completion comes with the last."""
        _check_size("prompt", request.prompt)
        params = params_from_request(request)
        ids = self._tokenizer.encode_document(request.prompt)
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else None
        builder: CompletionBuilder | None = None
        async with aclosing(self._engine.generate(ids, params, timeout_s)) as updates:
            async for sequence in updates:
                builder = builder or CompletionBuilder(sequence, self._tokenizer)
                before = builder.n_taken
                text = builder.take()
                new = slice(before, builder.n_taken)
                yield text, self._logprobs(sequence.tokens[new], sequence.logprobs[new]), builder.completion
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


def _refuse(context: RayServegRPCContext, error: Exception) -> None:
    """Give a call the status of its error. An exception that left the method would reach the client as a traceback."""
    if isinstance(error, _Refused):
        code, details = error.code, error.details
    elif isinstance(error, ValueError):
        code, details = grpc.StatusCode.INVALID_ARGUMENT, str(error)
    elif isinstance(error, EngineFull):
        code, details = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    elif isinstance(error, EngineDied):
        code, details = grpc.StatusCode.UNAVAILABLE, "this replica's engine has ended: try again"
    else:
        logger.exception("unexpected error")
        code, details = grpc.StatusCode.INTERNAL, f"unexpected error: {type(error).__name__}"
    context.set_code(code)
    context.set_details(details)
