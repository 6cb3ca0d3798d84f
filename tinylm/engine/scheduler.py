"""Scheduling decisions as pure functions: which slot a request gets, and which tokens a step computes."""

from __future__ import annotations

from collections.abc import Sequence

LEAST_TO_COPY = 16  # computing a shorter prefix again is faster than copying it from another slot


def share_tokens(pending: Sequence[int], prefill_tokens: int, context: int) -> list[tuple[int, int]]:
    """Return which requests are in the next step, and the number of tokens of each: (place, count).

    pending: for each running request, how many of its tokens are not in the cache. A request with one such token
    decodes and always takes part. The other requests are in prefill and share `prefill_tokens` in their order, so that
    decoding does not stall. If no request decodes, they share `context` tokens.
    ([1, 100, 1], 64, 256) -> [(0, 1), (2, 1), (1, 64)]
    """
    shares = [(place, 1) for place, count in enumerate(pending) if count == 1]
    if len(shares) == len(pending):
        return shares
    budget = prefill_tokens if shares else context
    for place, count in enumerate(pending):
        if count > 1 and budget > 0:
            shares.append((place, min(count, budget)))
            budget -= min(count, budget)
    return shares


def choose_slot(ids: list[int], cached: list[list[int]], free: list[int]) -> tuple[int, int, int]:
    """Choose a free slot for a request. Return this slot, the slot whose prefix to use, and the prefix's length.

    cached: the tokens that each slot holds. free: the free slots, the longest unused slot first.
    ([1, 2, 3], [[1, 9], [1, 2]], [0, 1]) -> (1, 1, 2)
    """
    shared = [_common_prefix(ids, tokens) for tokens in cached]
    best = max(free, key=shared.__getitem__)
    source = max(range(len(cached)), key=shared.__getitem__)
    if shared[source] >= shared[best] + LEAST_TO_COPY:
        return free[0], source, shared[source]
    return best, best, shared[best]


def _common_prefix(ids: list[int], cached: list[int]) -> int:
    """Return the length of the common prefix, without the last of `ids`: the model must compute its logits."""
    limit = min(len(ids) - 1, len(cached))
    return next((i for i in range(limit) if ids[i] != cached[i]), limit)
