"""Every command and example of README.md and docs/*.md is executed: here, on a service, or by the test in a table."""

import ast
import re
import sys
from pathlib import Path

import docs_commands
import pytest
from docs_commands import HERE, NOT_EXECUTED, ON_A_SERVICE, ROOT, TABLE, Command, executed_by

COMMANDS = docs_commands.commands()
PROGRAMS = docs_commands.programs()


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return docs_commands.make_workplace(tmp_path)


def test_no_command_is_unaccounted_for() -> None:
    unknown = [
        f"{command.page}: {command.text}"
        for command in COMMANDS
        if executed_by(command) is None and not any(re.fullmatch(pattern, command.text) for pattern in NOT_EXECUTED)
    ]
    assert unknown == [], "say in tests/docs_commands.py what executes these"


@pytest.mark.parametrize("pattern", [*TABLE, *NOT_EXECUTED])
def test_no_row_of_the_table_is_left_over(pattern: str) -> None:
    assert any(re.fullmatch(pattern, command.text) for command in COMMANDS)


@pytest.mark.parametrize("test", sorted(set(TABLE.values()) - {HERE, ON_A_SERVICE}))
def test_every_test_that_the_table_names_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert name in names or (not name and any(n.startswith("test_") for n in names))


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if executed_by(c) is HERE], ids=lambda c: f"{c.page}: {c.text}"
)
def test_the_command_runs_and_prints_what_the_page_shows(command: Command, workplace: Path) -> None:
    output = docs_commands.run(command.text, workplace)
    if command.output:
        assert output.strip() == command.output


@pytest.mark.parametrize("command", sorted({c.text for c in COMMANDS if re.match(r"(\w+=\S+ )*make ", c.text)}))
def test_every_make_command_is_one_that_make_can_carry_out(command: str) -> None:
    """Not carried out: `make` says what it would do."""
    assert docs_commands.run(f"{command} --dry-run", ROOT)


@pytest.mark.parametrize(
    "source",
    [s for _, s in PROGRAMS if not docs_commands.needs_service(s)],
    ids=[page for page, s in PROGRAMS if not docs_commands.needs_service(s)],
)
def test_the_example_runs(source: str, workplace: Path) -> None:
    assert docs_commands.run([sys.executable, "-c", source], workplace).strip()
