"""TinyLM: a small language model, its engine, its service and its clients."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinylm.client import AsyncClient, Client, ServiceError
    from tinylm.config import ModelConfig
    from tinylm.engine.completion import Completion
    from tinylm.llm import LLM
    from tinylm.sampling import SamplingParams, TokenLogprobs
    from tinylm.weights import ModelError

__version__ = "0.2.0"
__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "Completion",
    "ModelConfig",
    "ModelError",
    "SamplingParams",
    "ServiceError",
    "TokenLogprobs",
    "__version__",
]
# Names are imported when they are first used: a client does not import the engine, and the engine does not import gRPC.
_MODULES = {
    "LLM": "llm",
    "AsyncClient": "client",
    "Client": "client",
    "Completion": "engine.completion",
    "ModelConfig": "config",
    "ModelError": "weights",
    "SamplingParams": "sampling",
    "ServiceError": "client",
    "TokenLogprobs": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tinylm' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"tinylm.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
