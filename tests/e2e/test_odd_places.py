"""A service in a hardened container: a user without a name or a home, one writable directory, a small /dev/shm.

Ray needs a token, the environment names proxies that do not answer, and the checkout and the config lie in a directory
with an unusual name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import yaml
from helpers.proxies import DEAD_PROXIES
from helpers.service import ROOT, running_service
from openai import DefaultHttpxClient

import tinylm
from tinylm import LLM, SamplingParams
from tinylm.client import Client

GREEDY = SamplingParams(max_tokens=12, temperature=0)
PROMPT = "Once upon a time"
VERSION = "0.0.1+odd"  # of the checkout in the unusual directory


def checkout(directory: Path) -> Path:
    """Copy the files of this checkout that a service needs, with a version of their own."""
    for name in ("tinylm", "models", "configs"):
        shutil.copytree(ROOT / name, directory / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "serve_app.py", directory)
    init = directory / "tinylm" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{tinylm.__version__}"', f'"{VERSION}"'))
    return directory


def test_a_service_runs_where_little_is_allowed(tmp_path: Path, stories_dir: Path, http: DefaultHttpxClient) -> None:
    values = yaml.safe_load(Path("configs/serve.yaml").read_text(encoding="utf-8"))
    (application,) = values["applications"]
    application["args"] |= {"kernels": "numpy"}
    application["deployments"][0]["num_replicas"] = 1
    directory = tmp_path / "Größe ✓, with spaces"
    directory.mkdir()
    config = tmp_path / "odd.yaml"
    config.write_text(yaml.safe_dump(values))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    environment = {**token, **DEAD_PROXIES, "PYTHONPATH": str(checkout(directory / "tinylm"))}
    expected = LLM(stories_dir, kernels="numpy").generate(PROMPT, GREEDY)[0].text
    with running_service(config, directory, in_place=True, **environment) as service:
        assert service.status() == "RUNNING"
        with Client(service.address, retries=0) as client:
            assert client.info().version == VERSION
            assert client.generate(PROMPT, GREEDY).text == expected
        fields = {"prompt": PROMPT, "max_tokens": GREEDY.max_tokens, "temperature": 0}
        answer = http.post(f"{service.url}/v1/completions", json=fields).json()
        assert answer["choices"][0]["text"] == expected
    log = (directory / "log").read_text(encoding="utf-8")
    assert "stopping: running requests are finished first" in log
    assert "could not finish" not in log


def test_a_batch_job_runs_in_a_checkout_with_an_unusual_path(tmp_path: Path, stories: LLM) -> None:
    directory = checkout(tmp_path / "ünï cödé, dir" / "tinylm")
    body = {"prompt": PROMPT, "max_tokens": GREEDY.max_tokens, "temperature": 0}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    (directory / "in put.jsonl").write_text(json.dumps(request) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "tinylm.cli", "batch", "in put.jsonl", "öut.jsonl"]
    subprocess.run(command, cwd=directory, env={**os.environ, "PYTHONPATH": str(directory)}, check=True)
    (answer,) = map(json.loads, (directory / "öut.jsonl").read_text(encoding="utf-8").splitlines())
    assert answer["response"]["body"]["choices"][0]["text"] == stories.generate(PROMPT, GREEDY)[0].text
