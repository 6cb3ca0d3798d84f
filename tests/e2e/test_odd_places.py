"""A service in a hardened container: a user without a name or a home, one writable directory, a small /dev/shm.

Ray needs a token, the environment names proxies that do not answer, and the config's directory has an unusual name.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import yaml
from helpers.proxies import DEAD_PROXIES
from helpers.service import running_service

from tinylm import LLM, SamplingParams
from tinylm.client import Client

GREEDY = SamplingParams(max_tokens=12, temperature=0)


def test_a_service_runs_where_little_is_allowed(tmp_path: Path, stories_dir: Path) -> None:
    values = yaml.safe_load(Path("configs/serve.yaml").read_text(encoding="utf-8"))
    (application,) = values["applications"]
    application["args"] |= {"kernels": "numpy"}
    application["deployments"][0]["num_replicas"] = 1
    directory = tmp_path / "Größe ✓, with spaces"
    directory.mkdir()
    config = tmp_path / "odd.yaml"
    config.write_text(yaml.safe_dump(values))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, **DEAD_PROXIES}
    expected = LLM(stories_dir, kernels="numpy").generate("Once upon a time", GREEDY)[0].text
    with running_service(config, directory, in_place=True, **environment) as service:
        assert service.status() == "RUNNING"
        with Client(service.address, retries=0) as client:
            assert client.generate("Once upon a time", GREEDY).text == expected
    log = (directory / "log").read_text(encoding="utf-8")
    assert "stopping: running requests are finished first" in log
    assert "could not finish" not in log
