"""Every command and example of README.md and docs/*.md is executed: here, or as `docs_commands.TABLE` says."""

import ast
import re
import sys
from pathlib import Path

import pytest
from helpers import docs_commands
from helpers.docs_commands import CI, HERE, PAGES, ROOT, TABLE, Command, Walk, executed_by

COMMANDS = docs_commands.commands()
HERE_COMMANDS = {(command.text, command.output): command for command in COMMANDS if executed_by(command) is HERE}
MAKE_COMMANDS = sorted({command.text for command in COMMANDS if re.match(r"(\w+=\S+ )*make ", command.text)})
EXAMPLES = [(page, source) for page, source in docs_commands.programs() if not docs_commands.needs_service(source)]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return docs_commands.make_workplace(tmp_path)


def test_every_command_has_a_row() -> None:
    unknown = [f"{command.page}: {command.text}" for command in COMMANDS if executed_by(command) is None]
    assert unknown == [], "say in tests/helpers/docs_commands.py how these are tested"


def test_every_row_has_a_command() -> None:
    used = {next((p for p in TABLE if re.fullmatch(p, command.text)), None) for command in COMMANDS}
    assert [pattern for pattern in TABLE if pattern not in used] == []


def test_ci_runs_the_commands_that_it_should() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert {command.text for command in COMMANDS if executed_by(command) is CI} <= set(lines)


@pytest.mark.parametrize("pattern", [pattern for pattern, how in TABLE.items() if isinstance(how, Walk)])
def test_a_walk_fits_the_pages(pattern: str) -> None:
    """Its placeholders occur in its commands, and the servers that it needs have later rows."""
    how = TABLE[pattern]
    texts = [command.text for command in COMMANDS if executed_by(command) is how]
    assert all(any(placeholder in text for text in texts) for placeholder in how.filled)
    rows = list(TABLE.values())
    for server in how.beside:
        own = [executed_by(command) for command in COMMANDS if command.text == server]
        assert own, f"no page shows {server!r}"
        assert all(rows.index(row) > rows.index(how) for row in own)


@pytest.mark.parametrize("command", HERE_COMMANDS.values(), ids=lambda command: f"{command.page}: {command.text}")
def test_a_command_prints_what_its_page_shows(command: Command, workplace: Path) -> None:
    output = docs_commands.run(command.text, workplace)
    if command.output:
        assert output.strip() == command.output


@pytest.mark.parametrize("command", MAKE_COMMANDS)
def test_make_knows_every_make_command(command: str) -> None:
    assert docs_commands.run(f"{command} --dry-run", ROOT)


@pytest.mark.parametrize("source", [source for _, source in EXAMPLES], ids=[page for page, _ in EXAMPLES])
def test_an_example_runs(source: str, workplace: Path) -> None:
    assert docs_commands.run([sys.executable, "-c", source], workplace).strip()


def test_every_named_module_shows_its_command() -> None:
    """The module's docstring is the text of its `--help`."""
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    modules = set(re.findall(r"python -m ((?:train|loadtest)[\w.]*\w)", text))
    assert len(modules) > 5
    for module in modules:
        path = ROOT / module.replace(".", "/")
        source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        assert f"python -m {module}" in source


def test_every_test_named_by_the_table_exists() -> None:
    for how in TABLE.values():
        if isinstance(how, str) and "::" in how:
            path, _, name = how.partition("::")
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
