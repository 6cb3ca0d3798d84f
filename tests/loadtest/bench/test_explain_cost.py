"""The measurement of what explanations cost: what explorers do, and how pairs are compared."""

from __future__ import annotations

import grpc
import pytest
from helpers.client import Act, scripted_server, wait_until

from loadtest.bench import explain_cost


def test_explorers_ask_for_every_piece_and_wait_when_refused() -> None:
    with scripted_server() as (server, port):
        server.acts = [Act(0, grpc.StatusCode.UNAVAILABLE, retry_after_s=0.01), Act()]
        with explain_cost.explorers(f"127.0.0.1:{port}", 2) as asked:
            wait_until(lambda: len(server.timeouts_s) > 40)
        assert (asked.n_refused, asked.n_answered) == (1, len(server.timeouts_s) - 1)
    assert set(asked.answered_s) == {piece for piece, _ in explain_cost.PIECES}
    times = asked.as_dict()["ms"]
    computed = sum(times[piece]["answered"] for piece in ("norms", "attention", "lens", "scores", "matmul"))
    assert times["computed"]["answered"] == computed > 0
    assert 0 < times["computed"]["p50"] <= times["computed"]["p95"]


def test_a_failed_explanation_ends_the_measurement() -> None:
    with scripted_server() as (server, port):
        server.acts = [Act(0, grpc.StatusCode.INTERNAL)]
        with (
            pytest.raises(RuntimeError, match="an explorer failed: INTERNAL"),
            explain_cost.explorers(f"127.0.0.1:{port}", 1),
        ):
            wait_until(lambda: bool(server.timeouts_s))


def test_pairs_are_compared_by_the_median() -> None:
    """A slow period of the machine changes both measurements of a pair alike."""
    figures = [(100, 95), (10, 9), (200, 220)]
    pairs = [
        {"without": {"requests_per_s": without}, "with": {"requests_per_s": beside}} for without, beside in figures
    ]
    assert explain_cost.ratios(pairs) == {"requests_per_s": 0.95}
    assert explain_cost.over_all(pairs[:2]) == {"requests_per_s": pytest.approx(104 / 110, abs=1e-4)}
