"""The engine behind a plain grpc.aio server."""

from __future__ import annotations

from loadtest.bench import services
from tinylm import LLM, SamplingParams
from tinylm.client import Client


def test_every_process_gives_the_text_of_the_library(stories: LLM, greedy: SamplingParams) -> None:
    expected = stories.generate("Once upon a time", greedy)[0]
    seen = set()
    with services.bare(2) as address:
        for _ in range(20):  # the kernel gives each connection to a random process
            with Client(address, retries=0) as client:
                answer = client.generate("Once upon a time", greedy)
                streamed = "".join(client.stream("Once upon a time", greedy))
            assert answer.text == streamed == expected.text
            seen.add(answer.replica)
            if len(seen) == 2:
                break
    assert len(seen) == 2
