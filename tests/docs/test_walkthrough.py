"""`make walkthrough`: every command of README.md and docs/*.md is executed as shown, in a fresh clone of HEAD.

`docs_commands.TABLE` says how. Rows run in the order of the table, and the commands of a row in the order of the pages.
This needs the ports that the pages use, no other Ray on the machine, and the package index. It takes half an hour.
"""

from collections.abc import Iterator

import pytest
from clone import Clone
from helpers import docs_commands
from helpers.docs_commands import TABLE, Command, Walk, executed_by

pytestmark = pytest.mark.walkthrough

COMMANDS = [command for command in docs_commands.commands() if isinstance(executed_by(command), Walk)]
ROWS: dict[str, Walk] = {c.text: how for c in COMMANDS if isinstance(how := executed_by(c), Walk)}


def steps() -> dict[str, list[Command]]:
    """Return the commands by what the pages show, in the order of execution."""
    rows, found = list(TABLE.values()), {}
    for command in sorted(COMMANDS, key=lambda c: rows.index(ROWS[c.text])):
        found.setdefault(command.shown, []).append(command)
    return found


@pytest.fixture(scope="module")
def clone() -> Iterator[Clone]:
    with Clone() as clone:
        yield clone


@pytest.mark.parametrize(
    "commands", [pytest.param(found, id=f"{found[0].page}: {shown}") for shown, found in steps().items()]
)
def test_a_command_does_what_its_page_says(clone: Clone, commands: list[Command]) -> None:
    clone.walk(commands[0].shown, commands[0].text, ROWS[commands[0].text], ROWS)
