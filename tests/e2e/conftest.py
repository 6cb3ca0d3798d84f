"""What tests of a running service share."""

from collections.abc import Iterator

import openai
import pytest


@pytest.fixture
def http() -> Iterator[openai.DefaultHttpxClient]:
    """An HTTP client that ignores the environment's proxies."""
    with openai.DefaultHttpxClient(trust_env=False, timeout=30) as client:
        yield client
