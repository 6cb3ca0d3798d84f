"""Every command that README.md and docs/*.md show, and what executes it. A table, and what reads the pages.

A new command on a page needs a row here, unless one fits already: `tests/test_docs_commands.py` says so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE_OF_EXCERPTS = {"how-it-works.md"}  # its Python is cut out of files, which `test_docs_pages` checks
SHELL = {"", "bash", "sh", "console"}  # languages of blocks that hold commands
PROGRAMS = ("make", "tinylm", "python", "pip", "serve", "ray", "curl", "grpcurl", "docker", "kubectl", "sudo", "brew")

HERE = "executed by test_docs_commands"
ON_A_SERVICE = "executed by test_service on the service that runs there"

# Pattern of whole commands (the first that fits counts) -> HERE, ON_A_SERVICE, or the test that executes what it does.
TABLE = {
    r".* --help|make help|python -m loadtest standard --list": HERE,
    r"tinylm (generate|info|tokenize|key|--version)\b(?!.*--server).*": HERE,
    r"cat fullchain.pem privkey.pem > server.pem.*": HERE,
    r"python tests/web_screenshots.py .*": "tests/test_web_page.py::test_the_pictures_of_the_docs_can_be_taken",
    r".*localhost:(9000|8000)\b.*": ON_A_SERVICE,
    r"python -m loadtest( -.*)?(?<!localhost:9100 --duration 5)|python -m loadtest (report|compare) .*": ON_A_SERVICE,
    # What takes long, or needs a place of its own: the test that does the same with less.
    r"make serve|tinylm serve|(\w+=\S+ )*serve run (configs/serve.yaml|CONFIG)|export RAY_worker_niceness=0": (
        "tests/test_service.py::test_the_load_is_spread_over_all_four_replicas"
    ),
    r"make (test|check)": "tests/test_docs_commands.py::test_every_make_command_is_one_that_make_can_carry_out",
    r"make setup(-dev)?|pip install .*": (
        "tests/test_cluster_configs.py::test_the_image_installs_by_the_makefile_s_line"
    ),
    r"make monitor": (
        "tests/test_monitoring.py::test_prometheus_evaluates_every_alert_and_the_service_is_not_called_down"
    ),
    r"tinylm (write|chat).*": "tests/test_terminal.py::test_the_transcript_of_the_page_is_what_happens",
    r"tinylm --install-completion": "tests/test_terminal.py::test_the_script_for_each_shell_is_shown",
    r"make certificate": "tests/test_tls.py::test_the_certificate_s_key_is_for_its_owner_alone",
    r"make tls( TLS_CERT=server.pem)?|tinylm generate .*localhost:9443.*|kill -USR2": (
        "tests/test_tls.py::test_the_command_line_asks_over_tls"
    ),
    r"(SOAK_S=\d+ )?make chaos": "tests/chaos/test_service_faults.py",
    r"python -m loadtest.faults_page .*": (
        "tests/test_faults_page.py::test_the_page_on_faults_is_that_of_the_committed_results"
    ),
    r"python -m loadtest(.stub_server| --server localhost:9100) .*|python -m loadtest.bare_server": (
        "tests/test_loadtest_command.py::test_a_sweep_becomes_json_csv_page_and_pictures"
    ),
    r"python -m loadtest.standard.page": (
        "tests/test_speed_page.py::test_the_page_on_speed_is_that_of_the_committed_results"
    ),
    r"python -m loadtest overload .*": (
        "tests/test_service_limits.py::test_above_its_limit_it_goes_on_and_refuses_the_rest"
    ),
    r"python -m loadtest selftest": (
        "tests/test_loadtest_command.py::test_percentiles_are_those_of_the_delays_that_the_server_has"
    ),
    r"make bench( ONLY=.*)?|python -m loadtest standard": (
        "tests/test_loadtest_command.py::test_the_standard_set_goes_on_where_it_stopped"
    ),
    r"tinylm bench": "tests/test_benchmarks.py::test_the_engine_s_benchmark_reports_what_it_was_asked_for",
    r"make peers": "tests/test_benchmarks.py::test_the_comparison_of_engines_measures_those_that_are_here",
    r"make parts": "tests/test_benchmarks.py::test_the_parts_of_a_step_add_up_to_the_whole",
    r"make pictures|python -m docs.making.(measure|pictures|page)": (
        "tests/test_docs_pages.py::test_every_picture_is_drawn_and_stands_on_the_page"
    ),
    r"make reference": (
        "tests/test_docs_pages.py::test_the_reference_is_what_proto_docstrings_and_command_line_say"
    ),
    r"make train(-demo)?( CONFIG=.*)?|python -m train.(prepare|tokenizer|encode|run|export)( .*)?": (
        "tests/test_train_run.py::test_the_exported_model_writes_the_demos_sentences"
    ),
    r"python -m train.evaluate( .*)?": "tests/test_train_run.py::test_evaluating_again_gives_the_cards_figures",
    r"python -m train.export_(onnx|huggingface) .*": (
        "tests/test_train_exports.py::test_other_logits_are_refused_and_nothing_is_kept"
    ),
    r"python -m train.quantization_study": "tests/test_train_quantization.py::test_finer_formats_are_larger_and_closer",
    r"ray start .*": "tests/chaos/test_nodes.py",
    r"serve (deploy( .*)?|status)|ray status": "tests/chaos/test_service_faults.py",
}  # fmt: skip

# No test can execute these: they install programs, or need a Kubernetes cluster or a Docker registry. Their files are
# held to what Kubernetes and Docker know by tests/test_cluster_configs.py.
NOT_EXECUTED = (
    r"(sudo )?(apt-get|brew|systemctl) .*|ray metrics launch-prometheus",
    r"docker build --file configs/cluster/Dockerfile .*",
    r"kubectl .*",
)


@dataclass(frozen=True)
class Command:
    page: str
    text: str  # without prompt, comment and the path to the virtual environment
    output: str = ""  # what the page shows under it


def commands() -> list[Command]:
    """Those of blocks, then those within sentences, page by page; each text once a page."""
    found: dict[tuple[str, str], Command] = {}
    for path in PAGES:
        page, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        for language, block in blocks(text):
            for command in _of_block(page, language, block) if language in SHELL else []:
                found.setdefault((page, command.text), command)
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`([^`\n]+ [^`\n]+)`|^    (\S.*)$", prose, re.MULTILINE):
            line = _plain("".join(span))
            if re.sub(r"^(\w+=\S+ )+", "", line).startswith(tuple(f"{name} " for name in PROGRAMS)):
                found.setdefault((page, line), Command(page, line))
    return list(found.values())


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def programs() -> list[tuple[str, str]]:
    """(page, source) of the Python examples that stand by themselves."""
    pages = [path for path in PAGES if path.name not in MADE_OF_EXCERPTS]
    return [
        (str(p.relative_to(ROOT)), b) for p in pages for lang, b in blocks(p.read_text("utf-8")) if lang == "python"
    ]


def executed_by(command: Command) -> str | None:
    """HERE, ON_A_SERVICE, a test, or None when nothing says."""
    return next((how for pattern, how in TABLE.items() if re.fullmatch(pattern, command.text)), None)


def needs_service(source: str) -> bool:
    return bool(re.search(r"localhost:(9000|8000)", source))


def run(command: str | list[str], directory: Path) -> str:
    """Standard output of a shell command, or of a program's arguments; it must succeed."""
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
        stdin=subprocess.DEVNULL,  # what asks for more gets none
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def make_workplace(directory: Path) -> Path:
    """A directory that looks like the repository's, in which commands may leave files."""
    for path in ROOT.iterdir():
        if path.name not in {".git", ".venv"}:
            (directory / path.name).symlink_to(path)
    for name in ("fullchain.pem", "privkey.pem"):
        (directory / name).write_text(name + "\n", encoding="utf-8")
    return directory


def _of_block(page: str, language: str, block: str) -> list[Command]:
    block = block.replace("\\\n", " ")
    if language == "console":
        parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
        return [Command(page, _plain(c), output.strip()) for c, _, output in (part.partition("\n") for part in parts)]
    return [Command(page, _plain(line)) for line in block.splitlines() if _plain(line)]


def _plain(line: str) -> str:
    return re.sub(r"\s+# .*|^# .*", "", line).strip().removeprefix("$ ").replace(".venv/bin/", "")
