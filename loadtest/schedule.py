"""When the requests of an open loop are to be sent: decided before the run, whatever the service does meanwhile."""

from __future__ import annotations

import numpy as np

from loadtest.load import Load


def arrivals(load: Load) -> np.ndarray:
    """Seconds from the start of the measured time, ascending; negative ones are the warm-up's.

    "poisson": independent, exponentially distributed pauses with mean 1 / rate, as of many users who don't know of each
    other; "constant": even pauses. With `load.requests` exactly so many are measured, else those of `duration_s`.
    """
    rate = load.rate_per_s
    assert rate is not None
    rng = np.random.default_rng(load.seed)
    n_warmup = int(np.ceil(load.warmup_s * rate * 2)) + 20
    n_measured = load.requests or int(np.ceil(load.duration_s * rate + 8 * np.sqrt(load.duration_s * rate))) + 20
    if load.arrivals == "poisson":
        warmup = -np.cumsum(rng.exponential(1 / rate, n_warmup))[::-1]
        measured = np.cumsum(rng.exponential(1 / rate, n_measured))
    else:
        warmup = -np.arange(n_warmup, 0, -1) / rate
        measured = np.arange(n_measured) / rate
    warmup = warmup[warmup >= -load.warmup_s]
    if load.requests is None:
        measured = measured[measured < load.duration_s]
    return np.concatenate([warmup, measured])
