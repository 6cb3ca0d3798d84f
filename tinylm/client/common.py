"""What both clients share: the settings of a connection, when to retry a call, and which error the caller gets.

`tinylm.client.sync` and `tinylm.client.aio` send the calls and wait.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from tinylm.client.wire import FINISH_REASON_NAMES
from tinylm.sampling import FinishReason, SamplingParams, TokenLogprobs
from tinylm.stream import Update
from tinylm.v1 import tinylm_pb2 as pb

API_KEY_VARIABLE = "TINYLM_API_KEY"
METADATA: tuple[tuple[str, str], ...] = (("application", "tinylm"),)
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # http_proxy of the environment is not meant for this
    ("grpc.initial_reconnect_backoff_ms", 100),  # a proxy is back in seconds; gRPC's own pauses grow to two minutes
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A peer that is gone without a word, or took the connection and never spoke, is noticed after these instead of at
    # the call's deadline. gRPC itself sends at most two such pings in a silent call's first minute, which servers bear.
    ("grpc.min_reconnect_backoff_ms", 5000),  # in fact the most that a connection may take to be made
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),
    ("grpc.http2.bdp_probe", 0),  # its pings would use those two up; it makes room for messages larger than ours
)
# What a caller may see when a replica or the proxy dies under a call; a call that has produced nothing may be repeated.
RETRIED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.NOT_FOUND,  # by a proxy that has just started: it has not heard of the application yet
    }
)
MAX_API_KEY_LENGTH = 4096  # HAProxy closes the connection at about 16 kB of headers
MAX_TIMEOUT_S = 1e9  # gRPC's clock overflows at about nine times as much; a longer timeout is no limit
FIRST_PAUSE_S = 0.1  # before the first repetition; each further pause is twice as long
CUT_OFF = (grpc.StatusCode.UNAVAILABLE, "the answer ended before its last message")


class ServiceError(RuntimeError):
    """The service refused or failed a call, or there is none.

    code: the gRPC status; attempts: how often the call was sent. The message is what the service said and what helps.
    """

    def __init__(self, code: grpc.StatusCode, details: str, attempts: int = 1) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.attempts = code, attempts


@dataclass(frozen=True, slots=True)
class ServedCompletion:
    """An answer of the service; times are the replica's own, without the network."""

    text: str
    finish_reason: FinishReason
    n_prompt_tokens: int
    n_tokens: int
    logprobs: list[TokenLogprobs] | None
    queue_s: float
    first_token_s: float
    total_s: float
    replica: str
    attempts: int  # how often the call was sent


class Connection:
    """Where a client asks, and how: the base of both clients."""

    def __init__(
        self,
        address: str = "localhost:9000",
        timeout_s: float | None = 60.0,
        retries: int = 6,
        api_key: str | None = None,
        tls: bool | Path = False,
    ) -> None:
        """Raise ValueError for a setting that cannot be used, OSError for a PEM file that cannot be read.

        address: host:port. Several addresses are `ipv4:10.0.0.1:9000,10.0.0.2:9000`: the first that answers is used.
        timeout_s: the most seconds that a call may take, with its retries. None or infinity sets no limit.
        retries: how often to retry a call that failed before it produced anything. The default retries for about 5
        seconds: in that time Serve replaces a dead proxy.
        api_key: by default the value of TINYLM_API_KEY in the environment. Whitespace around a key does not count.
        tls: True trusts the authorities that this machine trusts. A PEM file trusts the authorities in the file.
        """
        key = checked_api_key("api_key", api_key)
        self._metadata = call_metadata(key or checked_api_key(API_KEY_VARIABLE, os.environ.get(API_KEY_VARIABLE)))
        if not isinstance(address, str) or not address or not _is_one_word(address):
            raise ValueError(f"address must be HOST:PORT without spaces, got {address!r}")
        self.address = address
        self._timeout_s = checked_timeout_s("timeout_s", timeout_s)
        if not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries must be a whole number of at least 0, got {retries!r}")
        self._retries = retries
        self._is_closed = False
        self._credentials = _credentials(tls)

    def _open(self, module: ModuleType) -> Any:
        """A channel of `grpc` or of `grpc.aio`."""
        options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
        scheme, _, addresses = self.address.partition(":")
        if scheme in ("ipv4", "ipv6") and "," in addresses:
            # Else the whole list is sent as the name of the host that is asked, and HAProxy refuses such a name.
            options.append(("grpc.default_authority", addresses.split(",")[0]))
        if self._credentials is None:
            return module.insecure_channel(self.address, options=options)
        return module.secure_channel(self.address, self._credentials, options=options)

    def _attempts(self) -> Attempts:
        return Attempts(self.address, self._timeout_s, self._retries)

    def _require_open(self, attempts: Attempts) -> None:
        """Raise ServiceError if this client has been closed, before the call or during it."""
        if self._is_closed:
            raise ServiceError(grpc.StatusCode.CANCELLED, "this client has been closed", attempts.n) from None


class Attempts:
    """The attempts of one call: how long each may take, whether there is another one, and when."""

    def __init__(self, address: str, timeout_s: float | None, retries: int) -> None:
        self.n = 0
        self._address, self._timeout_s, self._retries = address, timeout_s, retries
        self._deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s

    def begin(self) -> float | None:
        """Count another attempt; the seconds that are left for it, None without a limit."""
        self.n += 1
        return None if self._timeout_s is None else max(0.0, self._deadline - time.monotonic())

    def pause_s(self, code: grpc.StatusCode, details: str | None, has_begun: bool = False) -> float:
        """Return the seconds to wait before the next attempt, after one that failed with `code`.

        Raise the error for the caller if there is no next attempt: the answer has begun, a dying replica does not give
        such a status, or no retries or no time are left.
        """
        pause_s = random.uniform(0.5, 1.0) * FIRST_PAUSE_S * 2 ** (self.n - 1)
        in_time = time.monotonic() + pause_s < self._deadline
        if code in RETRIED and not has_begun and self.n <= self._retries and in_time:
            return pause_s
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            raise ValueError(details) from None
        raise ServiceError(code, self._explained(code, details or "no details given"), self.n) from None

    def _explained(self, code: grpc.StatusCode, details: str) -> str:
        """What the service said, with what a caller can do about it."""
        match code:
            case grpc.StatusCode.UNAVAILABLE:
                times = f", asked {self.n} times" if self.n > 1 else ""
                return f"{details} (from {self._address}{times})"
            case grpc.StatusCode.UNAUTHENTICATED:
                return f"{details} (the key is taken from api_key or TINYLM_API_KEY)"
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"{details} (from {self._address}; timeout_s is {self._timeout_s})"
            case grpc.StatusCode.UNIMPLEMENTED | grpc.StatusCode.NOT_FOUND:
                return f"{details} (is it TinyLM that serves at {self._address}?)"
            case _:
                return details


class Answer:
    """Gathers the messages of one attempt, be it a stream's or the single one of a whole answer."""

    def __init__(self, params: SamplingParams, attempt: int) -> None:
        self._wants_logprobs, self._attempt = params.logprobs is not None, attempt
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []

    @property
    def has_begun(self) -> bool:
        """Whether anything of it has come: text, or tokens that are not text yet."""
        return any(self._pieces) or bool(self._logprobs)

    def add(self, message: pb.GenerateResponse | pb.GenerateStreamResponse) -> Update[ServedCompletion]:
        """What the message brings; a refused stream has an empty one before its status."""
        new = [TokenLogprobs(e.logprob, tuple((top.token, top.logprob) for top in e.top)) for e in message.logprobs]
        self._pieces.append(message.text)
        self._logprobs += new
        if message.finish_reason == pb.FINISH_REASON_UNSPECIFIED:
            return message.text, new, None
        completion = ServedCompletion(
            text="".join(self._pieces),
            finish_reason=FINISH_REASON_NAMES[message.finish_reason],
            n_prompt_tokens=message.usage.prompt_tokens,
            n_tokens=message.usage.completion_tokens,
            logprobs=self._logprobs if self._wants_logprobs else None,
            queue_s=message.timings.queue_ms / 1000,
            first_token_s=message.timings.first_token_ms / 1000,
            total_s=message.timings.total_ms / 1000,
            replica=message.replica,
            attempts=self._attempt,
        )
        return message.text, new, completion


def whole(params: SamplingParams, response: pb.GenerateResponse, attempt: int) -> ServedCompletion:
    """The completion of an answer that came in one message."""
    _, _, completion = Answer(params, attempt).add(response)
    if completion is None:
        raise ServiceError(*CUT_OFF, attempt)
    return completion


def checked_api_key(field: str, key: str | None) -> str | None:
    """Return the key without the whitespace around it, None for no key or a blank one.

    Raise ValueError, which names the field but does not hold the key, for a key that a header cannot carry.
    """
    if key is None:
        return None
    if not isinstance(key, str):
        raise ValueError(f"{field} must be a string, got {type(key).__name__}")
    key = key.strip()
    if len(key) > MAX_API_KEY_LENGTH:
        raise ValueError(f"{field} must have at most {MAX_API_KEY_LENGTH} characters, got {len(key)}")
    for place, character in enumerate(key, 1):
        if not "!" <= character <= "~":
            raise ValueError(
                f"{field} must have only ASCII letters, digits and signs: character {place} of {len(key)} is another"
            )
    return key or None


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call with a key from `checked_api_key`, or with none."""
    return METADATA if api_key is None else (*METADATA, ("authorization", f"Bearer {api_key}"))


def checked_timeout_s(field: str, timeout_s: float | None) -> float | None:
    """Return the timeout, None for no limit. Raise ValueError for a timeout that is not above 0."""
    if timeout_s is None:
        return None
    if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:  # NaN is not
        raise ValueError(f"{field} must be a number of seconds above 0, got {timeout_s!r}")
    return None if timeout_s > MAX_TIMEOUT_S else timeout_s


def _is_one_word(text: str) -> bool:
    return all(character.isprintable() and not character.isspace() for character in text)


def tokens(response: pb.TokenizeResponse) -> list[tuple[int, bytes]]:
    return [(token.id, token.bytes) for token in response.tokens]


def _credentials(tls: bool | Path) -> grpc.ChannelCredentials | None:
    if tls is False:
        return None
    authorities = None if tls is True else Path(tls).read_bytes()
    if authorities is not None and b"-----BEGIN CERTIFICATE-----" not in authorities:
        raise ValueError(f"tls is {tls}: there is no PEM certificate in it")
    return grpc.ssl_channel_credentials(authorities)
