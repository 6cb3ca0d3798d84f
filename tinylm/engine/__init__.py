"""The inference engine: it generates answers to many requests of token ids at the same time.

`scheduler` decides, `engine` steps, `async_engine` runs an engine for an event loop, `completion` makes text of tokens.
`logit_changes` computes what a request's settings add to its logits, with `dry` and the token ids of `word_tokens`.
`steps` records which requests shared a step, for people who watch.
"""

from tinylm.engine.engine import Engine, EngineFull
from tinylm.engine.request import Request, check_ids, check_length

__all__ = ["Engine", "EngineFull", "Request", "check_ids", "check_length"]
