"""Calls to an engine in the load generator's own process: what the same cores do without any service.

`engine:models/stories-8m` stands for a server; several `--processes` are several engines.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import aclosing
from pathlib import Path

from loadtest.load import Load
from loadtest.records import Call
from loadtest.workload import Ask
from tinylm.engine import Engine, EngineFull
from tinylm.engine.async_engine import STREAM_INTERVAL_S, AsyncEngine
from tinylm.engine.completion import CompletionBuilder
from tinylm.llm import load as load_model
from tinylm.sampling import SamplingParams


class EngineCaller:
    def __init__(self, load: Load) -> None:
        self._tokenizer, model = load_model(Path(load.server.removeprefix("engine:")))
        self._engine = AsyncEngine(Engine(model, n_slots=16, max_waiting=load.max_in_flight))
        self._name = f"process {os.getpid()}"
        self._every_s = STREAM_INTERVAL_S if load.stream else math.inf  # as often as the service is told

    async def ask(self, ask: Ask, call: Call, connection: int) -> None:
        ids = self._tokenizer.encode_document(ask.prompt)
        params = SamplingParams(max_tokens=ask.max_tokens, seed=ask.seed)
        call.replica, counts = self._name, []
        try:
            async with aclosing(self._engine.generate(ids, params, every_s=self._every_s)) as updates:
                builder: CompletionBuilder | None = None
                async for sequence in updates:
                    builder = builder or CompletionBuilder(sequence, self._tokenizer)
                    before = builder.n_taken
                    builder.take()
                    if builder.n_taken > before:
                        call.text_at.append(time.monotonic())
                        counts.append(builder.n_taken - before)
                    if builder.completion is not None:
                        call.tokens, call.prompt_tokens = len(builder.completion.token_ids), len(ids)
                        break
        except EngineFull:
            call.status = "RESOURCE_EXHAUSTED"
        except ValueError:
            call.status = "INVALID_ARGUMENT"
        call.text_tokens = counts

    async def close(self) -> None:
        self._engine.stop()
