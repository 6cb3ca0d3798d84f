"""Calls to a server with OpenAI's completions API, streamed as server-sent events: llama.cpp's, vLLM's and others.

They stand beside TinyLM in `python -m loadtest standard`. Each event with text counts as one message of one token when
the server sends no usage, which is how those servers stream.
"""

from __future__ import annotations

import json
import time

import aiohttp

from loadtest.load import Load
from loadtest.records import Call
from loadtest.workload import Ask

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

    async def ask(self, ask: Ask, call: Call, connection: int) -> None:
        body = {"prompt": ask.prompt, "max_tokens": ask.max_tokens, "seed": ask.seed % 2**31, **SAMPLING}
        if self._load.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        session = self._sessions[connection % len(self._sessions)]
        try:
            async with session.post(self._url, json=body) as response:
                if response.status != 200:
                    call.status = f"HTTP_{response.status}"
                elif self._load.stream:
                    await self._read_events(response, call)
                else:
                    usage = (await response.json())["usage"]
                    call.tokens, call.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        except TimeoutError:
            call.status = "DEADLINE_EXCEEDED"
        except aiohttp.ClientError:
            call.status = "UNAVAILABLE"
        except (ValueError, KeyError, TypeError):
            call.status = "NOT_OPENAI"  # an answer that is none of this protocol

    async def _read_events(self, response: aiohttp.ClientResponse, call: Call) -> None:
        usage: dict | None = None
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
                    call.text_at.append(time.monotonic())
                finished = finished or choice.get("finish_reason") is not None
        call.tokens = usage["completion_tokens"] if usage else len(call.text_at)
        call.prompt_tokens = usage["prompt_tokens"] if usage else 0
        if not finished:
            call.status = "CUT_OFF"

    async def close(self) -> None:
        for session in self._sessions:
            await session.close()
