"""The keys and values of every sequence in flight, in arrays made once; a sequence owns one slot from start to end.

Which sequence has which slot is the engine's business; what is written there is the model's.
"""

from __future__ import annotations

import numpy as np

from tinylm.config import ModelConfig


class KVCache:
    """keys, values: (n_layers, n_slots, n_heads, context, head_dim) float32.

    Memory is touched as sequences grow into it: an unused slot costs address space only.
    """

    def __init__(self, config: ModelConfig, n_slots: int) -> None:
        shape = (config.n_layers, n_slots, config.n_heads, config.context, config.head_dim)
        self.keys = np.zeros(shape, np.float32)
        self.values = np.zeros(shape, np.float32)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
