"""Make the mixed load at a constant rate, and count the outcomes of its calls."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Literal

import grpc

from loadtest.bench.mixed_hour.calls import Caller, HttpStatus, Outcome, WrongAnswer
from tinylm.client import RETRIED, ServiceError

THREADS = 64
KILL_S = 20.0  # after a replica is killed, the time in which calls may end because of it
BURST_S = 20.0  # after a burst of calls, the time in which the queues may still be full
MAX_EXAMPLES = 100
HTTP_GONE = (0, 500, 502, 503, 504)  # 0: nothing came back. HAProxy's own answer has the status 500 and no JSON
Account = Literal["ok", "refused", "cancelled", "queue full", "ended by a kill", "unexpected"]
Kinds = Mapping[str, tuple[int, Callable[[Caller], Outcome]]]


@dataclass
class Windows:
    """The times in which calls may fail: after a kill, and during a burst of calls. In time.monotonic() seconds."""

    kills: list[float] = field(default_factory=list)
    bursts: list[tuple[float, float]] = field(default_factory=list)

    def kill_during(self, began: float, ended: float) -> bool:
        return any(began <= kill + KILL_S and ended >= kill for kill in self.kills)

    def burst_during(self, began: float, ended: float) -> bool:
        return any(began <= end + BURST_S and ended >= start for start, end in self.bursts)


class Load:
    """Calls at `rate_per_s`, from the beginning to the end of the `with` block.

    The rate does not fall when the service is slow, until THREADS calls are open.
    """

    def __init__(self, caller: Caller, kinds: Kinds, rate_per_s: float) -> None:
        self.windows = Windows()
        self.counts: Counter[tuple[str, Account]] = Counter()
        self.examples: list[dict[str, Any]] = []  # of calls that a kill ended, and of unexpected outcomes
        self._caller, self._kinds, self._rate_per_s = caller, kinds, rate_per_s
        self._round = [name for name, (weight, _) in kinds.items() for _ in range(weight)]
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            while True:
                random.shuffle(self._round)
                for name in self._round:
                    pool.submit(self._call, name)
                    due += 1 / self._rate_per_s
                    if self._stopped.wait(max(0.0, due - time.monotonic())):
                        return

    def _call(self, name: str) -> None:
        began = time.monotonic()
        account: Account
        try:
            account = self._kinds[name][1](self._caller)
        except Exception as error:
            account = self._account(error, began)
            self._keep(name, account, error)
        self.count(name, account)

    def count(self, name: str, account: Account, n: int = 1) -> None:
        with self._lock:
            self.counts[name, account] += n

    def _account(self, error: Exception, began: float) -> Account:
        """Return how a call counts that raised something that its kind does not expect."""
        ended = time.monotonic()
        if is_full(error) and self.windows.burst_during(began, ended):
            return "queue full"
        if is_gone(error) and self.windows.kill_during(began, ended):
            return "ended by a kill"
        return "unexpected"

    def _keep(self, name: str, account: Account, error: Exception) -> None:
        if account != "queue full":
            with self._lock:
                if sum(example["outcome"] == account for example in self.examples) < MAX_EXAMPLES:
                    second = round(time.monotonic() - self._began, 1)
                    text = f"{type(error).__name__}: {error}"[:400]
                    self.examples.append({"second": second, "kind": name, "outcome": account, "error": text})

    def total(self, account: Account) -> int:
        with self._lock:
            return sum(n for (_, found), n in self.counts.items() if found == account)

    def table(self) -> dict[str, dict[str, int]]:
        """Return kind -> outcome -> number of calls."""
        with self._lock:
            counts = dict(self.counts)
        names = dict.fromkeys(name for name, _ in counts)
        return {name: {account: n for (own, account), n in counts.items() if own == name} for name in names}


def is_full(error: Exception) -> bool:
    """Return whether the service refused a call because its queue was full, or because it works at its limit."""
    match error:
        case ServiceError():
            return error.code == grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after_s is None
        case grpc.RpcError():
            return error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        case HttpStatus():
            return error.status == 429 and error.code != "rate_limit_exceeded"
    return False


def is_gone(error: Exception) -> bool:
    """Return whether a call ended as calls end whose replica dies: with a status that permits a retry."""
    match error:
        case ServiceError():
            return error.code in RETRIED
        case grpc.RpcError():
            return error.code() in RETRIED
        case HttpStatus():
            return error.status in HTTP_GONE and not error.is_json
        case WrongAnswer():
            return False
    return isinstance(error, (OSError, HTTPException))
