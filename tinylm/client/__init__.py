"""Clients of the TinyLM service over gRPC, with the same parameters as `tinylm.LLM`.

    client = Client("localhost:9000")
    client.generate("Once upon a time").text

`AsyncClient` has the same methods for asyncio. Of Ray, the clients know only the metadata that its proxy requires.
"""

from tinylm.client.aio import AsyncClient
from tinylm.client.answer import ServedCompletion
from tinylm.client.attempts import RETRIED, ServiceError
from tinylm.client.connection import CHANNEL_OPTIONS, METADATA, call_metadata, checked_api_key
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
