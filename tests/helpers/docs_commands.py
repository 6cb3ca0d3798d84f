"""The commands that README.md and docs/*.md show, and a table of what executes each of them.

A new command on a page needs a row here, unless one fits already. `tests/docs/test_docs_commands.py` checks that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES_ONLY = {"files.md"}  # it names commands without their arguments
CLIENTS = "clients.md"  # `test_clients` executes its blocks
MADE_OF_EXCERPTS = {"how-it-works.md"}  # its Python consists of excerpts, which `test_docs_pages` checks
SHELL = {"", "bash", "sh", "console"}  # languages of blocks with commands
PROGRAMS = (
    *("make", "tinylm", "python", "pip", "serve", "ray", "curl", "grpcurl", "printf", "export", "kill", "git"),
    *("sudo", "apt", "apt-get", "brew", "systemctl", "docker", "kubectl", "helm", "lm_eval"),
)

HERE = "executed by test_docs_commands"
CI = "a line of .ci/run"
ITSELF = "the command that executes the walks"
ESTIMATE = "tests/loadtest/bench/test_arm_estimate.py::test_the_command_estimates_every_processor"
AGREEMENT = "tests/docs/test_clients.py::test_load_generators_measure_the_same_load"


class Until(Enum):
    """What a walk waits for, and how it ends the command."""

    END = auto()  # it ends by itself with status 0
    AT_WORK = auto()  # it takes long: Ctrl-C ends it once it prints `says`
    SERVES = auto()  # Ctrl-C ends it once `asked` succeeds
    LEFT_RUNNING = auto()  # it ends by itself, and leaves processes that the walk ends once `asked` succeeds


@dataclass(frozen=True, eq=False)
class Walk:
    """`make walkthrough` executes the command as shown, at a terminal, in a fresh clone."""

    until: Until
    says: str = ""  # pattern of its output
    asked: str = ""  # shell command that must succeed afterwards, or while a server runs; $SAID is the group of `says`
    beside: tuple[str, ...] = ()  # commands of this table that must run meanwhile
    before: str = ""  # shell command that prepares what the page assumes
    filled: Mapping[str, str] = field(default_factory=dict)  # placeholder of the page -> value
    environment: Mapping[str, str] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()  # committed files or directories that it may change
    refused: str = ""  # AT_WORK: pattern of an error that is accepted, for text that cannot be downloaded
    on_service: bool = False  # test_service executes it too, on its own service and with short loads
    limit_s: float = 240


SERVE = "make serve"
HEAD = "RAY_AUTH_MODE=token RAY_worker_niceness=0 ray start --head"
WORKER = "RAY_AUTH_MODE=token RAY_worker_niceness=0 ray start --address HEAD:6379"
DEPLOY = "RAY_AUTH_MODE=token serve deploy configs/cluster/serve.yaml"
ASK = "tinylm info --server localhost:9000"
ASK_TLS = "tinylm info --server localhost:9443 --ca tls/ca.pem"
NO_TINYSTORIES = r"error: collection 'tinystories': .* could not be loaded"
BUSY = r"[1-9]\S* requests/s"
RESULTS, IMAGES = "docs/results/", "docs/images/"
PLACE = {"/somewhere/with/space": "../elsewhere"}
DEMO = {"CONFIG": "configs/train-demo.yaml"}
EXPORTED = "python -m train.export_huggingface --model models/stories-8m --out exports/huggingface"
HELD_OUT = {"FILE.parquet": "data/demo/text/demo.validation.parquet"}

# Pattern of whole commands (the first match counts) -> HERE, CI, the test that executes it, or a walk. Walks run in
# this order. The row of a server comes after the rows that need it, and ends it.
TABLE: dict[str, str | Walk] = {
    r".* --help|make help|python -m loadtest.bench.standard --list|python -m tinylm.serving.metrics": HERE,
    r"tinylm write --seed 1 -n 40": "tests/tinylm/terminal/test_terminal.py::test_the_docs_transcript_is_what_happens",
    r"tinylm batch .* --ray": "tests/e2e/test_batch_on_ray.py::test_a_job_on_ray_resumes_with_the_same_answers",
    r"(printf .* \| )?tinylm (generate|batch|info|tokenize|explain|key|write|--version)\b(?!.*--server).*": HERE,
    r"cat fullchain.pem privkey.pem > server.pem.*": HERE,
    r"make (test|check|docs)": CI,
    r"make walkthrough": ITSELF,
    # With the packages of `make setup` only.
    r"make setup": Walk(Until.END, asked="! python -c 'import torch'", limit_s=1200),
    r"tinylm --install-completion": Walk(
        Until.END, "completion installed", asked="grep --quiet _TINYLM_COMPLETE ~/.bash_completions/tinylm.sh"
    ),
    r"make certificate": Walk(Until.END, "made tls/server.pem", asked="test -s tls/server.pem && test -s tls/ca.pem"),
    r"tinylm generate .*localhost:9443.*": Walk(Until.END, "Once upon a time", beside=(SERVE, "make tls")),
    r"make tls": Walk(Until.SERVES, asked=ASK_TLS, beside=(SERVE,)),
    r"make tls TLS_CERT=server.pem": Walk(
        Until.SERVES, asked=ASK_TLS, beside=(SERVE,), before="cp tls/server.pem server.pem"
    ),
    r"tinylm .* --server localhost:9000|curl .*localhost:8000/.*": Walk(Until.END, beside=(SERVE,), on_service=True),
    r"make monitor": Walk(
        Until.SERVES,
        "Prometheus: http://localhost:9090/alerts",
        asked="curl --silent --fail localhost:9090/-/ready",
        beside=(SERVE,),
    ),
    r"serve deploy configs/serve.yaml": Walk(Until.END, "Sent deploy request successfully", beside=(SERVE,)),
    r"serve status": Walk(Until.END, "RUNNING: 4", beside=(SERVE,)),
    r"ray status": Walk(Until.END, "Active:", beside=(SERVE,)),
    # With all packages, on the same service.
    r"make setup-dev": Walk(Until.END, asked="python -c 'import torch'", limit_s=1800),
    r"pip install -e '.\[\w+\]'": Walk(Until.END, "Successfully installed"),
    r"pip install 'lm-eval\[.*": Walk(Until.END, r"Successfully installed|already satisfied", limit_s=1800),
    r"lm_eval --model local-completions .*": Walk(
        Until.END, r"\|tinylm_text +\|", beside=(SERVE,), before=EXPORTED, limit_s=600
    ),
    r"lm_eval --model hf .*": Walk(Until.END, r"\|tinylm_text +\|", before=EXPORTED, limit_s=600),
    r"python tests/web_screenshots.py .* --measure .*": Walk(
        Until.END, "open_part_ms", beside=(SERVE,), rewrites=(RESULTS,)
    ),
    r"python tests/web_screenshots.py .*": Walk(Until.END, "web-desktop.png", beside=(SERVE,), rewrites=(IMAGES,)),
    r"python -m loadtest --(concurrency 320|rate 250,.*) .*": Walk(Until.AT_WORK, BUSY, beside=(SERVE,)),
    r"python -m loadtest.bench.agreement .*": AGREEMENT,
    r"python -m loadtest( -.*)?": Walk(Until.END, "requests/s", beside=(SERVE,), on_service=True),
    r"python -m loadtest report .*": Walk(Until.END, "report.html", on_service=True),
    r"python -m loadtest compare .*": Walk(
        Until.END, filled={"before.json": "load.json", "after.json": "load.json"}, on_service=True
    ),
    r"make serve": Walk(Until.SERVES, "TinyLM is ready", asked=ASK),
    # Other ways to serve.
    r"tinylm serve": Walk(Until.SERVES, "TinyLM is ready", asked=ASK),
    r"(\w+=\S+ )*serve run configs/serve.yaml": Walk(Until.SERVES, "Submitted deploy config", asked=ASK),
    r"ray get-auth-token --generate": Walk(Until.END, asked="test -s ~/.ray/auth_token"),
    r"RAY_AUTH_MODE=token serve status": Walk(Until.END, "RUNNING: 4", beside=(HEAD, WORKER, DEPLOY)),
    re.escape(DEPLOY): Walk(
        Until.LEFT_RUNNING,
        "Sent deploy request successfully",
        asked="RAY_AUTH_MODE=token serve status | grep 'RUNNING: 4'",
        beside=(HEAD, WORKER),
        before="tinylm key alice --file keys.txt && sed -i s:/etc/tinylm:$PWD: configs/cluster/serve.yaml",
        rewrites=("configs/cluster/serve.yaml",),
    ),
    re.escape(WORKER): Walk(
        Until.LEFT_RUNNING,
        "Ray runtime started",
        asked="RAY_AUTH_MODE=token ray status --address localhost:6379 | grep --count '^ 1 node_' | grep 2",
        beside=(HEAD,),
        filled={"HEAD": "localhost"},
    ),
    re.escape(HEAD): Walk(
        Until.LEFT_RUNNING, "Ray runtime started", asked="RAY_AUTH_MODE=token ray status --address localhost:6379"
    ),
    # Training.
    r"make train-demo": Walk(Until.END, asked="test -s data/demo/models/demo/model.safetensors", limit_s=900),
    r"python -m train.demo_text": Walk(Until.END),
    r"python -m train.(prepare|tokenizer|encode|run|export) --config configs/train-demo.yaml.*": Walk(
        Until.END, filled=PLACE
    ),
    r"python -m train.lm_eval_data .*": "tests/train/test_lm_eval_data.py::test_the_command_writes_what_choose_returns",
    r"python -m train.evaluate .*": Walk(Until.END, '"bits_per_byte"', filled=HELD_OUT),
    r"python -m train.quantization_study .*": Walk(
        Until.END, r"int4 in groups of 32", filled=DEMO, rewrites=(RESULTS,)
    ),
    r"python -m train.export_(onnx|huggingface) .*": Walk(Until.END, "logits at most"),
    r"make train": Walk(Until.AT_WORK, r"tinystories .* [1-9]\d*/", refused=NO_TINYSTORIES),
    r"python -m train.demo_text --out data/my-text/.*": Walk(Until.END),
    r"make train CONFIG=configs/fine-tune.yaml": Walk(Until.AT_WORK, r"training .* [1-9]\d*/", limit_s=400),
    # Measuring and making pages.
    r"python -m loadtest selftest": Walk(Until.END, "highest rate, stream"),
    r"tinylm bench": Walk(Until.END, r'"decode":'),
    r"python -m loadtest.bench.tiles": "tests/loadtest/bench/test_tiles.py::test_the_command_compares_both_forms",
    r"python -m loadtest.bench.arm_estimate": ESTIMATE,
    r"python -m loadtest.bench.revisions": "tests/loadtest/bench/test_revisions.py::"
    "test_the_command_compares_a_revision_with_itself",
    r"python -m loadtest.bench.service_revisions": "tests/loadtest/bench/test_service_revisions.py::"
    "test_the_command_compares_a_revision_with_itself",
    r"make parts": Walk(Until.END, "whole step", rewrites=(RESULTS, "docs/engine.md")),
    r"make pictures": Walk(Until.END, "how-it-works.md", rewrites=(RESULTS, IMAGES, "docs/how-it-works.md")),
    r"make proto": Walk(Until.END),
    r"python -m (loadtest.bench.pages|docs.making.page)": Walk(Until.END),
    r"python -m docs.making.releases": "tests/docs/test_releases.py::test_a_release_equals_itself",
    r"make chaos": Walk(Until.AT_WORK, r"tests/chaos/\w+\.py \.", limit_s=400),
    r"make soak( MINUTES=\d+)?|python -m loadtest.bench.mixed_hour": Walk(Until.AT_WORK, r"minute 1: ", limit_s=400),
    r"make clients": Walk(Until.AT_WORK, r"tests/docs/test_clients\.py \.", limit_s=600),
    r"(ARM_REQUESTS=\d+ )?make arm": Walk(
        Until.AT_WORK, r"collected \d+ items", refused=r"error: \S+ is not installed", limit_s=600
    ),
    r"make bench( ONLY=.*)?|python -m loadtest.bench.standard": Walk(Until.AT_WORK, BUSY, limit_s=400),
    r"make peers": Walk(Until.AT_WORK, r"Building wheel for llama|round 1", limit_s=900),
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    page: str
    shown: str  # without prompt and comment
    output: str = ""  # the output that the page shows

    @property
    def text(self) -> str:
        """The command without the path of the virtual environment."""
        return self.shown.replace(".venv/bin/", "")


def commands() -> list[Command]:
    """Return the commands of blocks and of sentences, page by page, each once per page."""
    found: dict[tuple[str, str], Command] = {}
    for path in [page for page in PAGES if page.name not in NAMES_ONLY]:
        page, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        for language, block in blocks(text) if path.name != CLIENTS else []:
            for command in _of_block(page, language, block) if language in SHELL else []:
                found.setdefault((page, command.shown), command)
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for paragraph in re.split(r"\n\s*\n", prose):
            for span in [*re.findall(r"`([^`]+)`", paragraph), *re.findall(r"^    (\S.*)$", paragraph, re.MULTILINE)]:
                command = Command(page, _plain(" ".join(span.split())))
                if re.sub(r"^(\w+=\S+ )+", "", command.text).startswith(tuple(f"{name} " for name in PROGRAMS)):
                    found.setdefault((page, command.shown), command)
    return list(found.values())


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def programs() -> list[tuple[str, str]]:
    """Return (page, source) of the complete Python examples."""
    pages = [path for path in PAGES if path.name not in {*MADE_OF_EXCERPTS, CLIENTS}]
    return [
        (str(p.relative_to(ROOT)), b) for p in pages for lang, b in blocks(p.read_text("utf-8")) if lang == "python"
    ]


def executed_by(command: Command) -> str | Walk | None:
    """Return HERE, CI, a test or a walk; None if no row matches."""
    return next((how for pattern, how in TABLE.items() if re.fullmatch(pattern, command.text)), None)


def is_for_a_service(command: Command) -> bool:
    how = executed_by(command)
    return isinstance(how, Walk) and how.on_service


def filled(text: str, how: Walk) -> str:
    """Return the command with its placeholders replaced."""
    for placeholder, value in how.filled.items():
        text = text.replace(placeholder, value)
    return text


def needs_service(source: str) -> bool:
    return bool(re.search(r"localhost:(9000|8000)", source))


def run(command: str | list[str], directory: Path) -> str:
    """Run a shell command, or a program with arguments; assert that it succeeds, and return its standard output."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OPENBLAS_NUM_THREADS": "1",
    }
    shell = ["bash", "-euo", "pipefail", "-c", command] if isinstance(command, str) else command
    result = subprocess.run(
        shell,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def make_workplace(directory: Path) -> Path:
    """Fill a directory with links to the repository's files, so that commands can write into it."""
    directory.mkdir(exist_ok=True)
    for path in ROOT.iterdir():
        if path.name not in {".git", ".venv"}:
            (directory / path.name).symlink_to(path)
    for name in ("fullchain.pem", "privkey.pem"):
        (directory / name).write_text(name + "\n", encoding="utf-8")
    requests = next(
        b for language, b in blocks((ROOT / "docs/use.md").read_text(encoding="utf-8")) if language == "json"
    )
    (directory / "requests.jsonl").write_text(requests, encoding="utf-8")
    return directory


def _of_block(page: str, language: str, block: str) -> list[Command]:
    block = block.replace("\\\n", " ")
    if language == "console":
        parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
        return [Command(page, _plain(c), output.strip()) for c, _, output in (part.partition("\n") for part in parts)]
    return [Command(page, _plain(line)) for line in block.splitlines() if _plain(line)]


def _plain(line: str) -> str:
    return re.sub(r"\s+# .*|^# .*", "", line).strip().removeprefix("$ ")
