"""TinyLM: a small language model, its engine, and the ways to ask it. Imports neither Ray nor PyTorch."""

from tinylm.completion import Completion
from tinylm.config import ModelConfig
from tinylm.llm import LLM
from tinylm.sampling import SamplingParams, TokenLogprobs
from tinylm.weights import ModelError

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "ModelConfig", "ModelError", "SamplingParams", "TokenLogprobs", "__version__"]
