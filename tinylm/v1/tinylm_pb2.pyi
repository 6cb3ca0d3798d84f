import datetime

from google.protobuf import any_pb2 as _any_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_TIMEOUT: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_TIMEOUT: FinishReason

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed", "logprobs", "timeout_ms", "ignore_eos", "min_tokens", "stop_token_ids", "logit_bias", "presence_penalty", "frequency_penalty", "bad_words", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "prompt_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    DRY_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    DRY_BASE_FIELD_NUMBER: _ClassVar[int]
    DRY_ALLOWED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DRY_PENALTY_LAST_N_FIELD_NUMBER: _ClassVar[int]
    DRY_SEQUENCE_BREAKERS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: _containers.RepeatedScalarFieldContainer[str]
    seed: int
    logprobs: int
    timeout_ms: int
    ignore_eos: bool
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias: _containers.ScalarMap[int, float]
    presence_penalty: float
    frequency_penalty: float
    bad_words: _containers.RepeatedScalarFieldContainer[str]
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: _containers.RepeatedScalarFieldContainer[str]
    prompt_logprobs: int
    def __init__(self, prompt: _Optional[str] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., bad_words: _Optional[_Iterable[str]] = ..., dry_multiplier: _Optional[float] = ..., dry_base: _Optional[float] = ..., dry_allowed_length: _Optional[int] = ..., dry_penalty_last_n: _Optional[int] = ..., dry_sequence_breakers: _Optional[_Iterable[str]] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ms", "first_token_ms", "total_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    first_token_ms: float
    total_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., first_token_ms: _Optional[float] = ..., total_ms: _Optional[float] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token", "text", "logprob", "top")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token: int
    text: str
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "finish_reason", "usage", "timings", "logprobs", "replica", "prompt_logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    replica: str
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, text: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., replica: _Optional[str] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("text", "logprobs", "finish_reason", "usage", "timings", "replica", "tokens", "prompt_logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    replica: str
    tokens: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., replica: _Optional[str] = ..., tokens: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "bytes", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: int
    bytes: bytes
    text: str
    def __init__(self, id: _Optional[int] = ..., bytes: _Optional[bytes] = ..., text: _Optional[str] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text", "bytes")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    text: str
    bytes: bytes
    def __init__(self, text: _Optional[str] = ..., bytes: _Optional[bytes] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("name", "parameters", "vocab_size", "hidden_size", "layers", "heads", "context", "weights", "slots", "replica", "version", "arithmetic")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARITHMETIC_FIELD_NUMBER: _ClassVar[int]
    name: str
    parameters: int
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    context: int
    weights: str
    slots: int
    replica: str
    version: str
    arithmetic: str
    def __init__(self, name: _Optional[str] = ..., parameters: _Optional[int] = ..., vocab_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., layers: _Optional[int] = ..., heads: _Optional[int] = ..., context: _Optional[int] = ..., weights: _Optional[str] = ..., slots: _Optional[int] = ..., replica: _Optional[str] = ..., version: _Optional[str] = ..., arithmetic: _Optional[str] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("prompt", "tokens", "norms", "attention", "lens", "scores", "matmul", "cache", "batch", "logits")
    class Tokens(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Norms(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Attention(_message.Message):
        __slots__ = ("layer", "head")
        LAYER_FIELD_NUMBER: _ClassVar[int]
        HEAD_FIELD_NUMBER: _ClassVar[int]
        layer: int
        head: int
        def __init__(self, layer: _Optional[int] = ..., head: _Optional[int] = ...) -> None: ...
    class Lens(_message.Message):
        __slots__ = ("position", "top")
        POSITION_FIELD_NUMBER: _ClassVar[int]
        TOP_FIELD_NUMBER: _ClassVar[int]
        position: int
        top: int
        def __init__(self, position: _Optional[int] = ..., top: _Optional[int] = ...) -> None: ...
    class Scores(_message.Message):
        __slots__ = ("settings", "top")
        SETTINGS_FIELD_NUMBER: _ClassVar[int]
        TOP_FIELD_NUMBER: _ClassVar[int]
        settings: GenerateRequest
        top: int
        def __init__(self, settings: _Optional[_Union[GenerateRequest, _Mapping]] = ..., top: _Optional[int] = ...) -> None: ...
    class Matmul(_message.Message):
        __slots__ = ("layer", "name", "position")
        LAYER_FIELD_NUMBER: _ClassVar[int]
        NAME_FIELD_NUMBER: _ClassVar[int]
        POSITION_FIELD_NUMBER: _ClassVar[int]
        layer: int
        name: str
        position: int
        def __init__(self, layer: _Optional[int] = ..., name: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...
    class Cache(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Batch(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Logits(_message.Message):
        __slots__ = ("top",)
        TOP_FIELD_NUMBER: _ClassVar[int]
        top: int
        def __init__(self, top: _Optional[int] = ...) -> None: ...
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    LENS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    MATMUL_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    tokens: ExplainRequest.Tokens
    norms: ExplainRequest.Norms
    attention: ExplainRequest.Attention
    lens: ExplainRequest.Lens
    scores: ExplainRequest.Scores
    matmul: ExplainRequest.Matmul
    cache: ExplainRequest.Cache
    batch: ExplainRequest.Batch
    logits: ExplainRequest.Logits
    def __init__(self, prompt: _Optional[str] = ..., tokens: _Optional[_Union[ExplainRequest.Tokens, _Mapping]] = ..., norms: _Optional[_Union[ExplainRequest.Norms, _Mapping]] = ..., attention: _Optional[_Union[ExplainRequest.Attention, _Mapping]] = ..., lens: _Optional[_Union[ExplainRequest.Lens, _Mapping]] = ..., scores: _Optional[_Union[ExplainRequest.Scores, _Mapping]] = ..., matmul: _Optional[_Union[ExplainRequest.Matmul, _Mapping]] = ..., cache: _Optional[_Union[ExplainRequest.Cache, _Mapping]] = ..., batch: _Optional[_Union[ExplainRequest.Batch, _Mapping]] = ..., logits: _Optional[_Union[ExplainRequest.Logits, _Mapping]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("n_tokens", "tokens", "norms", "attention", "lens", "scores", "matmul", "cache", "batch", "logits")
    class Tokens(_message.Message):
        __slots__ = ("tokens",)
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        tokens: _containers.RepeatedCompositeFieldContainer[Token]
        def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...
    class Norms(_message.Message):
        __slots__ = ("norms",)
        NORMS_FIELD_NUMBER: _ClassVar[int]
        norms: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, norms: _Optional[_Iterable[float]] = ...) -> None: ...
    class Attention(_message.Message):
        __slots__ = ("layer", "head", "weights")
        LAYER_FIELD_NUMBER: _ClassVar[int]
        HEAD_FIELD_NUMBER: _ClassVar[int]
        WEIGHTS_FIELD_NUMBER: _ClassVar[int]
        layer: int
        head: int
        weights: bytes
        def __init__(self, layer: _Optional[int] = ..., head: _Optional[int] = ..., weights: _Optional[bytes] = ...) -> None: ...
    class Candidate(_message.Message):
        __slots__ = ("token", "probability")
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        PROBABILITY_FIELD_NUMBER: _ClassVar[int]
        token: Token
        probability: float
        def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., probability: _Optional[float] = ...) -> None: ...
    class Candidates(_message.Message):
        __slots__ = ("candidates",)
        CANDIDATES_FIELD_NUMBER: _ClassVar[int]
        candidates: _containers.RepeatedCompositeFieldContainer[ExplainResponse.Candidate]
        def __init__(self, candidates: _Optional[_Iterable[_Union[ExplainResponse.Candidate, _Mapping]]] = ...) -> None: ...
    class Lens(_message.Message):
        __slots__ = ("answers", "ranks", "position", "top")
        ANSWERS_FIELD_NUMBER: _ClassVar[int]
        RANKS_FIELD_NUMBER: _ClassVar[int]
        POSITION_FIELD_NUMBER: _ClassVar[int]
        TOP_FIELD_NUMBER: _ClassVar[int]
        answers: _containers.RepeatedCompositeFieldContainer[Token]
        ranks: _containers.RepeatedScalarFieldContainer[int]
        position: int
        top: _containers.RepeatedCompositeFieldContainer[ExplainResponse.Candidates]
        def __init__(self, answers: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., ranks: _Optional[_Iterable[int]] = ..., position: _Optional[int] = ..., top: _Optional[_Iterable[_Union[ExplainResponse.Candidates, _Mapping]]] = ...) -> None: ...
    class Stage(_message.Message):
        __slots__ = ("name", "value", "n_kept", "n_removed", "removed_probability", "removed")
        NAME_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        N_KEPT_FIELD_NUMBER: _ClassVar[int]
        N_REMOVED_FIELD_NUMBER: _ClassVar[int]
        REMOVED_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
        REMOVED_FIELD_NUMBER: _ClassVar[int]
        name: str
        value: float
        n_kept: int
        n_removed: int
        removed_probability: float
        removed: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., n_kept: _Optional[int] = ..., n_removed: _Optional[int] = ..., removed_probability: _Optional[float] = ..., removed: _Optional[_Iterable[int]] = ...) -> None: ...
    class Difference(_message.Message):
        __slots__ = ("token", "same_token", "largest", "n_compared")
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        SAME_TOKEN_FIELD_NUMBER: _ClassVar[int]
        LARGEST_FIELD_NUMBER: _ClassVar[int]
        N_COMPARED_FIELD_NUMBER: _ClassVar[int]
        token: int
        same_token: bool
        largest: float
        n_compared: int
        def __init__(self, token: _Optional[int] = ..., same_token: _Optional[bool] = ..., largest: _Optional[float] = ..., n_compared: _Optional[int] = ...) -> None: ...
    class Scores(_message.Message):
        __slots__ = ("stages", "tokens", "logits", "probabilities", "greedy", "chosen", "difference")
        STAGES_FIELD_NUMBER: _ClassVar[int]
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        LOGITS_FIELD_NUMBER: _ClassVar[int]
        PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
        GREEDY_FIELD_NUMBER: _ClassVar[int]
        CHOSEN_FIELD_NUMBER: _ClassVar[int]
        DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
        stages: _containers.RepeatedCompositeFieldContainer[ExplainResponse.Stage]
        tokens: _containers.RepeatedCompositeFieldContainer[Token]
        logits: _containers.RepeatedScalarFieldContainer[float]
        probabilities: _containers.RepeatedScalarFieldContainer[float]
        greedy: Token
        chosen: Token
        difference: ExplainResponse.Difference
        def __init__(self, stages: _Optional[_Iterable[_Union[ExplainResponse.Stage, _Mapping]]] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., logits: _Optional[_Iterable[float]] = ..., probabilities: _Optional[_Iterable[float]] = ..., greedy: _Optional[_Union[Token, _Mapping]] = ..., chosen: _Optional[_Union[Token, _Mapping]] = ..., difference: _Optional[_Union[ExplainResponse.Difference, _Mapping]] = ...) -> None: ...
    class Matmul(_message.Message):
        __slots__ = ("layer", "name", "values", "scales", "input_error", "output_error", "input")
        LAYER_FIELD_NUMBER: _ClassVar[int]
        NAME_FIELD_NUMBER: _ClassVar[int]
        VALUES_FIELD_NUMBER: _ClassVar[int]
        SCALES_FIELD_NUMBER: _ClassVar[int]
        INPUT_ERROR_FIELD_NUMBER: _ClassVar[int]
        OUTPUT_ERROR_FIELD_NUMBER: _ClassVar[int]
        INPUT_FIELD_NUMBER: _ClassVar[int]
        layer: int
        name: str
        values: bytes
        scales: _containers.RepeatedScalarFieldContainer[float]
        input_error: _containers.RepeatedScalarFieldContainer[float]
        output_error: _containers.RepeatedScalarFieldContainer[float]
        input: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, layer: _Optional[int] = ..., name: _Optional[str] = ..., values: _Optional[bytes] = ..., scales: _Optional[_Iterable[float]] = ..., input_error: _Optional[_Iterable[float]] = ..., output_error: _Optional[_Iterable[float]] = ..., input: _Optional[_Iterable[float]] = ...) -> None: ...
    class Logits(_message.Message):
        __slots__ = ("tokens", "logits")
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        LOGITS_FIELD_NUMBER: _ClassVar[int]
        tokens: _containers.RepeatedCompositeFieldContainer[Token]
        logits: bytes
        def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., logits: _Optional[bytes] = ...) -> None: ...
    class Cache(_message.Message):
        __slots__ = ("arithmetic", "slots", "slot_positions", "slot_bytes", "used_positions", "used_bytes")
        ARITHMETIC_FIELD_NUMBER: _ClassVar[int]
        SLOTS_FIELD_NUMBER: _ClassVar[int]
        SLOT_POSITIONS_FIELD_NUMBER: _ClassVar[int]
        SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
        USED_POSITIONS_FIELD_NUMBER: _ClassVar[int]
        USED_BYTES_FIELD_NUMBER: _ClassVar[int]
        arithmetic: str
        slots: int
        slot_positions: int
        slot_bytes: int
        used_positions: int
        used_bytes: int
        def __init__(self, arithmetic: _Optional[str] = ..., slots: _Optional[int] = ..., slot_positions: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., used_positions: _Optional[int] = ..., used_bytes: _Optional[int] = ...) -> None: ...
    class Share(_message.Message):
        __slots__ = ("request", "slot", "tokens", "kind")
        REQUEST_FIELD_NUMBER: _ClassVar[int]
        SLOT_FIELD_NUMBER: _ClassVar[int]
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        KIND_FIELD_NUMBER: _ClassVar[int]
        request: int
        slot: int
        tokens: int
        kind: str
        def __init__(self, request: _Optional[int] = ..., slot: _Optional[int] = ..., tokens: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...
    class Step(_message.Message):
        __slots__ = ("number", "began_at", "prepare_s", "model_s", "results_s", "n_waiting", "shares")
        NUMBER_FIELD_NUMBER: _ClassVar[int]
        BEGAN_AT_FIELD_NUMBER: _ClassVar[int]
        PREPARE_S_FIELD_NUMBER: _ClassVar[int]
        MODEL_S_FIELD_NUMBER: _ClassVar[int]
        RESULTS_S_FIELD_NUMBER: _ClassVar[int]
        N_WAITING_FIELD_NUMBER: _ClassVar[int]
        SHARES_FIELD_NUMBER: _ClassVar[int]
        number: int
        began_at: float
        prepare_s: float
        model_s: float
        results_s: float
        n_waiting: int
        shares: _containers.RepeatedCompositeFieldContainer[ExplainResponse.Share]
        def __init__(self, number: _Optional[int] = ..., began_at: _Optional[float] = ..., prepare_s: _Optional[float] = ..., model_s: _Optional[float] = ..., results_s: _Optional[float] = ..., n_waiting: _Optional[int] = ..., shares: _Optional[_Iterable[_Union[ExplainResponse.Share, _Mapping]]] = ...) -> None: ...
    class Replica(_message.Message):
        __slots__ = ("id", "slots", "steps")
        ID_FIELD_NUMBER: _ClassVar[int]
        SLOTS_FIELD_NUMBER: _ClassVar[int]
        STEPS_FIELD_NUMBER: _ClassVar[int]
        id: str
        slots: int
        steps: _containers.RepeatedCompositeFieldContainer[ExplainResponse.Step]
        def __init__(self, id: _Optional[str] = ..., slots: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[ExplainResponse.Step, _Mapping]]] = ...) -> None: ...
    class Batch(_message.Message):
        __slots__ = ("model", "replicas", "complete")
        MODEL_FIELD_NUMBER: _ClassVar[int]
        REPLICAS_FIELD_NUMBER: _ClassVar[int]
        COMPLETE_FIELD_NUMBER: _ClassVar[int]
        model: str
        replicas: _containers.RepeatedCompositeFieldContainer[ExplainResponse.Replica]
        complete: bool
        def __init__(self, model: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[ExplainResponse.Replica, _Mapping]]] = ..., complete: _Optional[bool] = ...) -> None: ...
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    LENS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    MATMUL_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    n_tokens: int
    tokens: ExplainResponse.Tokens
    norms: ExplainResponse.Norms
    attention: ExplainResponse.Attention
    lens: ExplainResponse.Lens
    scores: ExplainResponse.Scores
    matmul: ExplainResponse.Matmul
    cache: ExplainResponse.Cache
    batch: ExplainResponse.Batch
    logits: ExplainResponse.Logits
    def __init__(self, n_tokens: _Optional[int] = ..., tokens: _Optional[_Union[ExplainResponse.Tokens, _Mapping]] = ..., norms: _Optional[_Union[ExplainResponse.Norms, _Mapping]] = ..., attention: _Optional[_Union[ExplainResponse.Attention, _Mapping]] = ..., lens: _Optional[_Union[ExplainResponse.Lens, _Mapping]] = ..., scores: _Optional[_Union[ExplainResponse.Scores, _Mapping]] = ..., matmul: _Optional[_Union[ExplainResponse.Matmul, _Mapping]] = ..., cache: _Optional[_Union[ExplainResponse.Cache, _Mapping]] = ..., batch: _Optional[_Union[ExplainResponse.Batch, _Mapping]] = ..., logits: _Optional[_Union[ExplainResponse.Logits, _Mapping]] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class RetryInfo(_message.Message):
    __slots__ = ("retry_delay",)
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    retry_delay: _duration_pb2.Duration
    def __init__(self, retry_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
