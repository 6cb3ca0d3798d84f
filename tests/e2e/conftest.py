"""What tests of a running service share."""

from collections.abc import Iterator

import openai
import pytest
from helpers.browser import chromium
from helpers.service import Service
from playwright.sync_api import Browser

HEALTHY_WITHIN_S = 60


@pytest.fixture
def http() -> Iterator[openai.DefaultHttpxClient]:
    """An HTTP client that ignores the environment's proxies."""
    with openai.DefaultHttpxClient(trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def url(shared_service: Service) -> str:
    """The address of the web page. All replicas are healthy."""
    shared_service.wait_until_healthy(HEALTHY_WITHIN_S)
    return f"{shared_service.url}/"
