"""A load that continues while parts of the service die, and an account of all its requests.

The load uses TinyLM's client with its retries, so the account is what a caller sees. tests/chaos kills the parts.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tinylm.client import RETRIED, Client, ServiceError
from tinylm.sampling import SamplingParams

# The statuses after which a caller may retry: those of the client, and that of a full service.
RETRYABLE = frozenset(code.name for code in RETRIED) | {"RESOURCE_EXHAUSTED"}
CALL_LIMIT_S = 20.0  # an answer takes a fraction of a second; a call that takes this long is lost
PAUSE_S = 0.1  # after a failed request, so that no client asks a refusing service in a busy loop
Outcome = Literal["answered", "refused", "cut", "lost"]


@dataclass(frozen=True, slots=True)
class FaultRequest:
    """One request as its caller saw it, with its retries.

    answered: with the expected text. refused: with a status that permits a retry, and without text. cut: a stream that
    ended with such a status after its first text, which the client does not retry. lost: anything else, such as another
    text, another status, or no answer within CALL_LIMIT_S.
    """

    sent_at: float  # time.perf_counter() seconds
    ended_at: float
    outcome: Outcome
    status: str  # the gRPC status's name
    attempts: int


class FaultLoad:
    """Clients in threads that send requests, one after the other, until the end of the `with` block.

        with FaultLoad(["localhost:9000"], 4, "Once upon a time", expected) as load:
            ...
        account(load.requests)

    Every client asks for `expected`, the greedy answer; every second client asks for a stream. A client whose address
    names several servers, as in "ipv4:10.0.0.1:9000,10.0.0.2:9000", uses the next one when one is gone.
    """

    def __init__(self, addresses: list[str], clients: int, prompt: str, expected: str, max_tokens: int) -> None:
        self.requests: list[FaultRequest] = []
        self._prompt, self._expected = prompt, expected
        self._params = SamplingParams(max_tokens=max_tokens, temperature=0)
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, args=(addresses[i % len(addresses)], (i // len(addresses)) % 2 == 1))
            for i in range(clients)
        ]

    def __enter__(self) -> FaultLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _client(self, address: str, streamed: bool) -> None:
        with Client(address, timeout_s=CALL_LIMIT_S) as client:
            while not self._stopped.is_set():
                request = self._ask(client, streamed)
                self.requests.append(request)
                if request.outcome != "answered":
                    self._stopped.wait(PAUSE_S)

    def _ask(self, client: Client, streamed: bool) -> FaultRequest:
        pieces: list[str] = []
        status, attempts = "OK", 1
        outcome: Outcome
        sent_at = time.perf_counter()
        try:
            if streamed:
                stream = client.stream(self._prompt, self._params)
                pieces.extend(stream)
                answer = stream.completion
            else:
                answer = client.generate(self._prompt, self._params)
                pieces.append(answer.text)
            outcome, attempts = "answered" if "".join(pieces) == self._expected else "lost", answer.attempts
        except ServiceError as error:
            status, attempts = error.code.name, error.attempts
            outcome = "lost" if status not in RETRYABLE else "cut" if pieces else "refused"
        except ValueError as error:  # INVALID_ARGUMENT, although the request is valid
            status, outcome = str(error), "lost"
        return FaultRequest(sent_at, time.perf_counter(), outcome, status, attempts)


def account(requests: list[FaultRequest], fault_at: float) -> dict:
    """Return counts of the requests, and how long after `fault_at` (`time.perf_counter()`) clients felt the fault."""
    outcomes = Counter(request.outcome for request in requests)
    failed = [request for request in requests if request.outcome != "answered"]
    troubled = [request.ended_at for request in requests if request.attempts > 1 or request.outcome != "answered"]
    answers = sorted(request.ended_at for request in requests if request.outcome == "answered")
    longest = max((later - earlier for earlier, later in itertools.pairwise(answers)), default=0.0)
    slowest = max((request.ended_at - request.sent_at for request in requests), default=0.0)
    return {
        "requests": len(requests),
        **{outcome: outcomes[outcome] for outcome in ("answered", "refused", "cut", "lost")},
        "statuses": dict(Counter(request.status for request in failed)),
        "answered_after_retries": sum(r.outcome == "answered" and r.attempts > 1 for r in requests),
        "most_attempts": max((request.attempts for request in requests), default=0),
        "last_trouble_after_s": round(max((at - fault_at for at in troubled), default=0.0), 2),
        "longest_silence_s": round(longest, 2),
        "slowest_request_s": round(slowest, 2),
    }
