"""Programs of other people work with a service as docs/clients.md shows.

Each section of the page with code is a program:

- Each line of the first block installs the program. Each line gets an environment of its own below .clients/.
- The other blocks are executed in order. A block that begins with the name of a file, in a comment, is saved instead.
- A `text` block is the output of the block before it. There, `…` stands for one or more characters.

`make clients` runs this and writes docs/results/clients.json. It downloads a few GB once.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from helpers.docs_commands import ROOT, blocks
from helpers.service import Service, running_service

from tinylm.system.machine import describe

PAGE = ROOT / "docs/clients.md"
CACHE = ROOT / ".clients"
REPLICAS = 2
SHOWN = 4000  # characters of output in a result
INSTALL_LIMIT_S, RUN_LIMIT_S = 1800, 300
INTERPRETERS = {"sh": ["bash", "-euo", "pipefail"], "python": ["python"], "js": ["node"]}
EXAMPLES = {"sh": "example.sh", "python": "example.py", "js": "example.mjs"}  # where a block is saved
NAMED = re.compile(r"(?:#|//) (\S+\.\w+)\n")  # the first line of a block that is saved only


@dataclass(frozen=True)
class Program:
    """One way to install a program, and the blocks of its section."""

    name: str
    install: str
    blocks: tuple[tuple[str, str], ...]  # (language, content)
    works: str  # the sentence of the page

    @property
    def package(self) -> str:
        """Return the name of the package, as in `pip install 'openai==1.40.*'`: openai."""
        return re.split(r"[=<>\[]", shlex.split(self.install, comments=True)[2])[0]

    @property
    def directory(self) -> Path:
        return CACHE / re.sub(r"\W+", "-", self.install.removeprefix("pip install").lower()).strip("-")

    @property
    def version(self) -> str:
        if self.install.startswith("npm"):
            path = self.directory / "node_modules" / self.package / "package.json"
            return json.loads(path.read_text(encoding="utf-8"))["version"]
        code = f"import importlib.metadata; print(importlib.metadata.version({self.package!r}))"
        return self._run(["python", "-c", code], RUN_LIMIT_S).strip()

    def prepare(self) -> None:
        """Install the program, unless that is done. Link what the examples read."""
        done = self.directory / "installed"
        if not done.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            for target in (ROOT / "protos", ROOT / "evals", CACHE / "exports"):
                (self.directory / target.name).unlink(missing_ok=True)
                (self.directory / target.name).symlink_to(target)
            if self.install.startswith("pip"):
                subprocess.run([sys.executable, "-m", "venv", "--clear", self.directory / "venv"], check=True)
            self._run(["bash", "-c", self.install], INSTALL_LIMIT_S, **os.environ, PIP_CONSTRAINT=str(_torch()))
            done.touch()

    def follow(self, service: Service) -> str:
        """Run the blocks, and return the last output. Raise AssertionError if it is not as the page shows."""
        output = ""
        for language, content in self.blocks:
            if language == "text":
                assert _matches(output, content), f"printed:\n{output}\nand not:\n{content}"
                continue
            named = NAMED.match(content)
            path = self.directory / (named[1] if named else EXAMPLES[language])
            path.write_text(content, encoding="utf-8")
            if not named:
                addresses = {"TINYLM_URL": service.url, "TINYLM_ADDRESS": service.address}
                output = self._run([*INTERPRETERS[language], path.name], RUN_LIMIT_S, **addresses)
        return output

    def _run(self, command: list[str], limit_s: float, **environment: str) -> str:
        """Return the standard output. The program sees nothing of the user's home or settings, except as given."""
        own = {"LANG": "C.UTF-8", "HOME": str(self.directory)}
        path = f"{self.directory}/venv/bin:{os.environ['PATH']}"
        result = subprocess.run(
            command, cwd=self.directory, env={**own, **environment, "PATH": path},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
        return result.stdout


def programs() -> list[Program]:
    """Return the programs of the page, once for each way to install them."""
    found = []
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        if code := blocks(section):
            (works,) = re.findall(r"^Works: (.*?)\n(?:\n|\Z)", section, re.MULTILINE | re.DOTALL)
            for install in code[0][1].splitlines():
                name = section.partition("\n")[0]
                found.append(Program(name, install, tuple(code[1:]), " ".join(works.split())))
    return found


def _torch() -> Path:
    """Return a file of pip constraints with the tested version of PyTorch. The newest one can need GBs more."""
    path = CACHE / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line}\n" for line in lines if line.startswith("torch==")), encoding="utf-8")
    return path


def _matches(output: str, expected: str) -> bool:
    pattern = ".+".join(re.escape(part) for part in expected.strip().split("…"))
    return re.fullmatch(pattern, output.strip(), re.DOTALL) is not None


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("service")
    values = yaml.safe_load((ROOT / "configs/serve.yaml").read_text(encoding="utf-8"))
    values["applications"][0]["deployments"][0]["num_replicas"] = REPLICAS
    (directory / "few.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with running_service(directory / "few.yaml", directory) as service:
        yield service


@pytest.fixture(scope="module")
def exports() -> None:
    """The model with its tokenizer, as Hugging Face's programs read it."""
    out = CACHE / "exports/huggingface"
    if not (out / "manifest.json").exists():
        command = ["-m", "train.export_huggingface", "--model", "models/stories-8m", "--out", str(out)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


@pytest.mark.clients
@pytest.mark.parametrize("program", programs(), ids=lambda program: program.install)
def test_a_program_does_what_its_section_shows(program: Program, service: Service, exports: None) -> None:
    row = {"program": program.name, "package": program.package, "version": "", "install": program.install}
    row |= {"works": program.works, "date": describe()["date"], "passed": False, "reason": "", "output": ""}
    try:
        program.prepare()
        row["version"] = program.version
        row["output"] = program.follow(service).replace(f"{ROOT}/", "")[-SHOWN:]
    except (AssertionError, subprocess.SubprocessError) as error:
        record(row | {"reason": str(error)})
        raise
    record(row | {"passed": True})


def record(row: dict) -> None:
    """Add a result to the file that CLIENTS_REPORT names. The file keeps its results of other programs."""
    if path := os.environ.get("CLIENTS_REPORT"):
        out = Path(path)
        before = json.loads(out.read_text(encoding="utf-8"))["programs"] if out.exists() else []
        rows = {old["install"]: old for old in before} | {row["install"]: row}
        ordered = [rows[program.install] for program in programs() if program.install in rows]
        text = json.dumps({"command": "make clients", **describe(), "programs": ordered}, indent=1, ensure_ascii=False)
        out.write_text(text + "\n", encoding="utf-8")


@pytest.mark.clients
def test_load_generators_measure_the_same_load(service: Service, exports: None, tmp_path: Path) -> None:
    """guidellm, aiperf and `python -m loadtest` ask for the same prompts and get answers of the same length."""
    for program in programs():
        if program.name in ("guidellm", "aiperf"):
            program.prepare()
    n_requests, n_tokens = 6, 96
    out = tmp_path / "agreement.json"
    options = ["--requests", str(n_requests), "--max-tokens", str(n_tokens), "--concurrency", "2", "--rounds", "1"]
    command = [sys.executable, "-m", "loadtest.bench.agreement", "--server", service.url, "--out", str(out), *options]
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert all(value > 0 for value in result["median_ms"].values())
    calls = [line for line in service.call_lines() if line.get("completion_tokens") == n_tokens]  # of no other test
    assert len(calls) == 3 * n_requests, [(line["asctime"], line["prompt_tokens"]) for line in calls]
    assert all(count % 3 == 0 for count in Counter(line["prompt_tokens"] for line in calls).values())


def test_the_committed_results_are_of_the_page() -> None:
    rows = json.loads((ROOT / "docs/results/clients.json").read_text(encoding="utf-8"))["programs"]
    assert [(row["install"], row["works"]) for row in rows] == [(p.install, p.works) for p in programs()]
    assert [row["install"] for row in rows if not row["passed"]] == []


@pytest.mark.parametrize(
    ("output", "expected", "matches"),
    [
        ("a b\n", "a b", True),
        ("a b", "a …", True),
        ("a ", "a …", False),
        ("a\nb\nc", "a\n…\nc", True),
        ("ab", "a", False),
    ],
)
def test_an_ellipsis_of_the_page_stands_for_text(output: str, expected: str, matches: bool) -> None:
    assert _matches(output, expected) is matches
