"""Every command and example of README.md and docs/*.md is executed: here, or as a table says."""

import ast
import re
import sys
from pathlib import Path

import docs_commands
import pytest
from docs_commands import CI, HERE, ITSELF, ROOT, TABLE, Command, Walk, executed_by

COMMANDS = docs_commands.commands()
PROGRAMS = docs_commands.programs()


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return docs_commands.make_workplace(tmp_path)


def test_no_command_is_unaccounted_for() -> None:
    unknown = [f"{command.page}: {command.text}" for command in COMMANDS if executed_by(command) is None]
    assert unknown == [], "say in tests/docs_commands.py what executes these"


@pytest.mark.parametrize("pattern", TABLE)
def test_no_row_of_the_table_is_left_over(pattern: str) -> None:
    how = TABLE[pattern]
    assert any(re.fullmatch(pattern, command.text) and executed_by(command) is how for command in COMMANDS)


@pytest.mark.parametrize(
    "test", sorted(h for h in TABLE.values() if isinstance(h, str) and h not in {HERE, CI, ITSELF})
)
def test_every_test_that_the_table_names_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("command", sorted({c.text for c in COMMANDS if executed_by(c) is CI}))
def test_what_ci_executes_is_a_line_of_it(command: str) -> None:
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("pattern", [pattern for pattern, how in TABLE.items() if isinstance(how, Walk)])
def test_a_walk_s_row_fits_the_pages(pattern: str) -> None:
    """What it fills in is there to be filled in, and what runs beside it are commands with later rows of their own."""
    how = TABLE[pattern]
    texts = [command.text for command in COMMANDS if executed_by(command) is how]
    assert all(any(left_open in text for text in texts) for left_open in how.filled)
    rows = list(TABLE.values())
    for server in how.beside:
        own = [executed_by(command) for command in COMMANDS if command.text == server]
        assert own, f"no page shows {server!r}"
        assert all(rows.index(row) > rows.index(how) for row in own)


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
