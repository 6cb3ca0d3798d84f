"""Calls to a server with OpenAI's completions API, streamed as server-sent events.

llama.cpp's server, vLLM and others have this API. TinyLM and vLLM report usage with each message, so that the tokens of
each are known. If a server sends no usage, each message counts as one token.
"""

from __future__ import annotations

import json
import time
from typing import Any

import aiohttp

from loadtest.generator.call_record import CallRecord
from loadtest.generator.workload import Request
from loadtest.load import Load

SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}  # TinyLM's defaults


class OpenAICaller:
    def __init__(self, load: Load) -> None:
        self._load = load
        self._url = load.server.rstrip("/") + "/v1/completions"
        headers = {"authorization": f"Bearer {load.api_key}"} if load.api_key else {}
        timeout = aiohttp.ClientTimeout(total=load.timeout_s)
        self._sessions = [
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout)
            for _ in range(load.n_connections)
        ]

    async def ask(self, request: Request, record: CallRecord, connection: int) -> None:
        try:
            await self._post(request, record, self._sessions[connection % len(self._sessions)])
        except TimeoutError:
            record.status = "DEADLINE_EXCEEDED"
        except aiohttp.ClientError:
            record.status = "UNAVAILABLE"
        except (ValueError, KeyError, TypeError):
            record.status = "NOT_OPENAI"  # the answer does not follow this API

    async def _post(self, request: Request, record: CallRecord, session: aiohttp.ClientSession) -> None:
        body: dict[str, Any] = {"prompt": request.prompt, "max_tokens": request.max_tokens, **SAMPLING}
        body["seed"] = request.seed % 2**31
        if self._load.ignore_eos:  # TinyLM's, llama.cpp's and vLLM's, but not OpenAI's
            body["ignore_eos"] = True
        if self._load.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        async with session.post(self._url, json=body) as response:
            if response.status != 200:
                record.status = f"HTTP_{response.status}"
            elif self._load.stream:
                await _read_events(response, record)
            else:
                usage = (await response.json())["usage"]
                record.tokens, record.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]

    async def close(self) -> None:
        for session in self._sessions:
            await session.close()


async def _read_events(response: aiohttp.ClientResponse, record: CallRecord) -> None:
    usage: dict[str, int] | None = None
    counts: list[int] = []  # the tokens of each message with text, if the server says
    finished = False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            break
        event = json.loads(data)
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            if choice.get("text"):
                record.text_at.append(time.monotonic())
                if event.get("usage"):
                    counts.append(event["usage"]["completion_tokens"] - sum(counts))
            finished = finished or choice.get("finish_reason") is not None
    record.tokens = usage["completion_tokens"] if usage else len(record.text_at)
    record.prompt_tokens = usage["prompt_tokens"] if usage else 0
    if len(counts) == len(record.text_at):
        record.text_tokens = counts
    if not finished:
        record.status = "CUT_OFF"  # the stream ended before the answer was finished
