"""Calls to an engine in the process of the load generator, to measure the same cores without a service.

`--server engine:models/stories-8m` selects it. Each of several `--processes` has its own engine.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import aclosing
from pathlib import Path

from loadtest.generator.call_record import CallRecord
from loadtest.generator.workload import Request
from loadtest.load import Load
from tinylm.engine import Engine, EngineFull
from tinylm.engine.async_engine import STREAM_INTERVAL_S, AsyncEngine, Listener
from tinylm.engine.completion import CompletionBuilder
from tinylm.llm import load as load_model
from tinylm.sampling import SamplingParams


class EngineCaller:
    def __init__(self, load: Load) -> None:
        self._tokenizer, model = load_model(Path(load.server.removeprefix("engine:")))
        self._engine = AsyncEngine(Engine(model, n_slots=16, max_waiting=load.max_in_flight))
        self._ignore_eos = load.ignore_eos
        self._name = f"process {os.getpid()}"
        self._every_s = STREAM_INTERVAL_S if load.stream else math.inf  # as the service does

    async def ask(self, request: Request, record: CallRecord, connection: int) -> None:
        record.replica, record.text_tokens = self._name, []
        try:
            await self._generate(request, record, record.text_tokens)
        except EngineFull:
            record.status = "RESOURCE_EXHAUSTED"
        except ValueError:
            record.status = "INVALID_ARGUMENT"

    async def _generate(self, request: Request, record: CallRecord, counts: list[int]) -> None:
        ids = self._tokenizer.encode_document(request.prompt)
        params = SamplingParams(max_tokens=request.max_tokens, seed=request.seed, ignore_eos=self._ignore_eos)
        builder = CompletionBuilder(self._tokenizer, params)
        async with aclosing(self._engine.generate(ids, params, listener=Listener(self._every_s))) as updates:
            async for progress in updates:
                before = builder.n_taken
                builder.take(progress)
                if builder.n_taken > before:
                    record.text_at.append(time.monotonic())
                    counts.append(builder.n_taken - before)
                if builder.completion is not None:
                    record.tokens, record.prompt_tokens = len(builder.completion.token_ids), len(ids)
                    return

    async def close(self) -> None:
        self._engine.stop()
