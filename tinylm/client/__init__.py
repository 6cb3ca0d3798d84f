"""Clients of the TinyLM service over gRPC: the same parameters and nearly the same answers as `tinylm.LLM`.

    client = Client("localhost:9000")
    client.generate("Once upon a time").text

`AsyncClient` has the same methods for asyncio. Knows nothing of Ray beyond the metadata that its ingress wants.
"""

from tinylm.client.aio import AsyncClient
from tinylm.client.common import (
    CHANNEL_OPTIONS,
    METADATA,
    RETRIED,
    ServedCompletion,
    ServiceError,
    call_metadata,
    checked_api_key,
)
from tinylm.client.sync import Client

__all__ = [
    "CHANNEL_OPTIONS",
    "METADATA",
    "RETRIED",
    "AsyncClient",
    "Client",
    "ServedCompletion",
    "ServiceError",
    "call_metadata",
    "checked_api_key",
]
