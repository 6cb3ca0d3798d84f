"""What README.md and docs/*.md show is executed as it stands there, in a fresh clone of HEAD: `make walkthrough`.

Commands and how each is executed are in `docs_commands.TABLE`. A row's commands come in the pages' order, rows in the
table's. It needs the pages' ports, no other Ray on the machine, and a network that has the packages. It takes half an
hour on two busy cores.
"""

from collections.abc import Iterator

import docs_commands
import pytest
from clone import Clone
from docs_commands import TABLE, Command, Walk, executed_by

pytestmark = pytest.mark.walkthrough

COMMANDS = [command for command in docs_commands.commands() if isinstance(executed_by(command), Walk)]
ROWS: dict[str, Walk] = {c.text: how for c in COMMANDS if isinstance(how := executed_by(c), Walk)}


def steps() -> dict[str, list[Command]]:
    """What is shown -> where, in the order of execution."""
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
def test_the_command_does_what_its_page_says(clone: Clone, commands: list[Command]) -> None:
    clone.walk(commands[0].shown, commands[0].text, ROWS[commands[0].text], ROWS)
