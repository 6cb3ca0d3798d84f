"""The inference engine: requests of token ids go in, their answers come out, many at a time.

`scheduler` decides, `engine` steps, `async_engine` runs an engine for an event loop, `completion` makes text of it.
"""

from tinylm.engine.engine import Engine, EngineFull
from tinylm.engine.request import Request, check_ids, check_length

__all__ = ["Engine", "EngineFull", "Request", "check_ids", "check_length"]
