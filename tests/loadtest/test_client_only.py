"""The imports of the gRPC caller."""

from __future__ import annotations

import subprocess
import sys


def test_grpc_caller_imports_neither_engine_nor_ray() -> None:
    code = "import loadtest.generator.grpc_caller, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "tinylm.client" in loaded
    assert not loaded & {"numba", "ray", "torch", "tinylm.engine", "tinylm.llm"}
