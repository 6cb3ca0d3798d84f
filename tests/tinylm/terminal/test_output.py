"""How commands print text from elsewhere, and how they end, with real pipes, terminals and closed streams."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import unicodedata

import pytest
from helpers.terminal import shown_on_terminal
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from tinylm.terminal.output import PlainConsole, printable

COMMAND = """
import sys
from tinylm.terminal.output import PlainConsole, one_line_errors
with one_line_errors(ValueError):
    exec(sys.argv[1])
"""
texts = st.text(st.characters(), max_size=30)


def command(code: str, redirections: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run `code` as a command with these redirections of the shell."""
    shell = ["bash", "-c", f'"$@" {redirections}', "bash", sys.executable, "-c", COMMAND, code]
    variables = {**os.environ, **environment}
    return subprocess.run(shell, capture_output=True, stdin=subprocess.DEVNULL, env=variables, timeout=60, check=False)


def on_terminal(code: str, **environment: str) -> bytes:
    """Run `code` as a command, and return what a terminal gets."""
    return shown_on_terminal([sys.executable, "-c", COMMAND, code], **environment)


@given(texts)
def test_printable_text_holds_no_control_character(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in shown)
    assert all(new in (old, "\ufffd") for old, new in zip(text, shown, strict=True))


@given(st.sampled_from(["[/x]", "[red]", "[bold]a[/]", ":smile:", "[link=http://x]"]), texts)
def test_tables_show_data_without_reading_markup(markup: str, text: str) -> None:
    data = markup + text.replace("\n", "").replace("\t", "")
    console = PlainConsole()
    console.file, console.width = io.StringIO(), 500
    table = Table("name", title=markup)
    table.add_row(data)
    console.print(table)
    console.print(markup)
    assert console.file.getvalue().count(markup) >= 3


@given(texts.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)))
def test_a_pipe_gets_text_unchanged(text: str) -> None:
    console = PlainConsole()
    console.file = io.StringIO()
    console.write(text, end="")
    assert console.file.getvalue() == text


@pytest.mark.parametrize(
    "code",
    [
        'PlainConsole().write("a\\x1b]0;title\\x07b", style="red")',
        'PlainConsole().print("a\\x1b]0;title\\x07b")',
        'raise ValueError("a\\x1b]0;title\\x07b")',
        'from rich.table import Table; t = Table("\\x1b]0;title\\x07b"); t.add_row("\\x9b2J"); PlainConsole().print(t)',
    ],
)
def test_a_terminal_gets_no_escape_sequence_from_data(code: str) -> None:
    shown = on_terminal(code)
    assert b"title" in shown
    assert b"\x1b]" not in shown
    assert b"\x07" not in shown
    assert b"\xc2\x9b" not in shown


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_nothing_has_a_colour_when_colours_are_off(environment: dict[str, str]) -> None:
    code = 'PlainConsole().write("x", style="bold red"); PlainConsole().print("y", style="red"); raise ValueError("z")'
    assert b"\x1b" in on_terminal(code)
    assert b"\x1b" not in on_terminal(code, **environment)
    assert b"\x1b" not in command(code, FORCE_COLOR="1", NO_COLOR="1").stderr


@pytest.mark.parametrize(
    ("code", "unbuffered"), [('print("x\\n" * 100000)', ""), ('print("x")', "1"), ('PlainConsole().print("x")', "")]
)
def test_a_command_ends_quietly_after_its_reader(code: str, unbuffered: str) -> None:
    done = command(
        f"import time; time.sleep(0.1); {code}", "| true; exit ${PIPESTATUS[0]}", PYTHONUNBUFFERED=unbuffered
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, b"", b"")


@pytest.mark.parametrize(
    ("code", "redirections"),
    [("import os; r, w = os.pipe(); os.close(r); os.write(w, b'x')", ""), ('print("x")', ">/dev/full")],
    ids=["another broken pipe", "a full disk"],
)
def test_other_errors_of_the_system_are_one_line(code: str, redirections: str) -> None:
    done = command(code, redirections)
    assert done.returncode == 1
    assert [line[:7] for line in done.stderr.splitlines()] == [b"error: "]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_becomes_the_null_device(closed: str, tmp_path) -> None:
    """Neither a file that the command opens nor the output of a child takes the number of the stream."""
    file = tmp_path / "file"
    code = (
        "import subprocess\n"
        f"with open({str(file)!r}, 'w') as f:\n"
        "    f.write(sys.stdin.read())\n"
        "    print('out'); print('err', file=sys.stderr); sys.stdout.isatty()\n"
        "    subprocess.run('echo child; echo child >&2; cat', shell=True, check=True)"
    )
    done = command(code, closed)
    assert done.returncode == 0
    assert file.read_text() == ""
    for written, redirection, words in ((done.stdout, ">&-", b"child out"), (done.stderr, "2>&-", b"child err")):
        assert b" ".join(sorted(written.split())) == (b"" if redirection in closed.split() else words)


def test_ctrl_c_gives_status_130() -> None:
    assert command("raise KeyboardInterrupt").returncode == 130


def test_an_unexpected_error_keeps_its_traceback() -> None:
    assert b"Traceback" in command("raise KeyError('x')").stderr
