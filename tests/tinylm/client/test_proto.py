"""`tinylm/v1` is what `protos/` generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_the_generated_code_is_not_stale(tmp_path):
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iprotos", *outputs, "tinylm/v1/tinylm.proto"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    fresh = {path.name: path.read_text() for path in (tmp_path / "tinylm" / "v1").iterdir()}
    assert sorted(fresh) == ["tinylm_pb2.py", "tinylm_pb2.pyi", "tinylm_pb2_grpc.py"]
    for name, text in fresh.items():
        if (ROOT / "tinylm" / "v1" / name).read_text() != text:
            pytest.fail(f"tinylm/v1/{name} is not what protos/tinylm/v1/tinylm.proto generates: run `make proto`")
