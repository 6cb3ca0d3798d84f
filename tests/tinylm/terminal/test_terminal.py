"""`tinylm write` as its user runs it, on a pseudo-terminal and on pipes, and the answers to shell completion."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.places import Place
from helpers.terminal import TINYLM, terminal

from tinylm import LLM, SamplingParams
from tinylm.terminal.commands import COMMANDS

GREEDY = ("-t", "0", "-n", "20", "--kernels", "numpy")
BEGIN = "Once upon a time"


@pytest.fixture(scope="module")
def continued(stories_dir):
    """Continue a text as `tinylm write` with the options GREEDY does."""
    llm = LLM(stories_dir, kernels="numpy")
    return lambda text: llm.generate(text, SamplingParams(max_tokens=20, temperature=0))[0].text


def test_a_session_at_a_terminal(tmp_path: Path, continued):
    first = continued(BEGIN)
    second = continued(BEGIN + first)
    file = tmp_path / "story.txt"
    with terminal(*GREEDY, state=tmp_path) as t:
        shown = t.enter(BEGIN)
        assert first.lstrip() in shown
        assert "length · 20 tokens · " in shown
        assert second.lstrip() in t.enter("")
        assert "taken back" in t.enter("/undo")
        assert second.lstrip() in t.enter("")
        assert second.lstrip() in t.enter("/retry")
        assert f"saved as {file}" in t.enter(f"/save {file}")
        assert file.read_text(encoding="utf-8") == BEGIN + first + second + "\n"
        assert "temperature is 12.0: it must be a number, 0 to 10" in t.enter("/set temperature 12")
        assert "error" not in t.enter("/set max_tokens 3")
        assert "max_tokens          3" in t.enter("/settings")
        assert "length · 3 tokens" in t.enter("A bear came.")
        assert "there is no command /frobnicate: /help" in t.enter("/frobnicate")
        assert "exists already" in t.enter(f"/save {Path(__file__)}")
        assert all(command in shown for shown in [t.enter("/help")] for command in COMMANDS)
        assert "the story is empty" in (t.enter("/new") and t.enter("/retry"))
        t.child.sendcontrol("d")
        t.child.wait()
        assert t.child.exitstatus == 0
    history = tmp_path / "tinylm" / "history"
    assert f"+{BEGIN}\n" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o777 == 0o600


def test_the_docs_transcript_is_what_happens(tmp_path: Path):
    """The speeds may differ."""
    page = Path("docs/use.md").read_text(encoding="utf-8")
    (transcript,) = re.findall(r"```console\n\$ tinylm write (.*?)```", page, re.DOTALL)
    options, *turns = re.split(r"^> ?", transcript, flags=re.MULTILINE)

    def without_speed(text: str) -> str:
        return re.sub(r"· [\d,]+ tokens/s", "", text).strip()

    with terminal(*shlex.split(options), state=tmp_path) as t:
        for turn in turns[:-1]:
            line, _, expected = turn.partition("\n")
            assert without_speed(expected) in without_speed(t.enter(line))
        assert turns[-1] == "/quit\n"


def test_ctrl_c_stops_the_model_and_discards_a_line(tmp_path: Path):
    with terminal("-n", "250", "-t", "0", "--kernels", "numpy", "--no-history", state=tmp_path) as t:
        t.child.sendline(BEGIN)
        t.child.expect("was")
        t.child.sendintr()
        assert "cancelled" in t.prompt()
        t.child.send("a line that is not meant")
        t.child.expect("meant")
        t.child.sendintr()
        t.prompt()
        t.enter("/set max_tokens 2")
        assert "length · 2 tokens" in t.enter("and")
        assert "not meant" not in t.enter("/show")
        t.child.sendline("/quit")
        t.child.wait()
        assert t.child.exitstatus == 0
    assert not (tmp_path / "tinylm").exists()


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}], ids=str)
def test_colours_show_probabilities_unless_turned_off(tmp_path: Path, environment: dict[str, str]):
    with terminal(*GREEDY, "--color-probabilities", state=tmp_path, **environment) as t:
        t.child.sendline(BEGIN)
        shown = t.raw_prompt()
    assert "tokens/s" in shown
    assert ("\x1b[3" in shown) is not bool(environment)


def test_the_story_continues_when_its_history_cannot_be_written(tmp_path: Path) -> None:
    with terminal(*GREEDY, state=tmp_path) as t:
        t.enter(BEGIN)
        shutil.rmtree(tmp_path / "tinylm")
        (tmp_path / "tinylm").write_text("a file in the place of the directory")
        assert "length · 20 tokens" in t.enter("")
        assert BEGIN in t.enter("/show")


def test_a_user_without_a_home_has_no_history(tmp_path: Path) -> None:
    with terminal(*GREEDY, state=tmp_path, place=Place(tmp_path)) as t:
        assert "length · 20 tokens" in t.enter(BEGIN)
        for name in ("~/story", "~no-such-user/story"):
            assert f"the home directory of {name} is unknown: give a path without ~" in t.enter(f"/save {name}")
        assert "saved as story" in t.enter("/save story")
    assert (tmp_path / "story").read_text(encoding="utf-8").startswith(BEGIN)
    assert not list(tmp_path.rglob("history"))


def write_from_pipe(lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [TINYLM, "write", *GREEDY, *options]
    return subprocess.run(command, input=lines, capture_output=True, text=True, check=False)


def test_each_line_of_a_pipe_is_a_turn(continued):
    """Only the story is printed."""
    story = BEGIN + continued(BEGIN)
    story += continued(story)
    story += " A bear came." + continued(story + " A bear came.")
    done = write_from_pipe(f"{BEGIN}\n\nA bear came.\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, story.removesuffix("\n") + "\n", "")


def test_an_error_ends_a_story_from_a_pipe():
    done = write_from_pipe("/set top_p 3\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: top_p is 3.0")


def test_a_story_may_become_longer_than_the_context():
    lines = "".join(f"Number {i} went to the park and saw a big red dog there.\n" for i in range(25))
    done = write_from_pipe(lines, "-n", "4")
    assert "Number 24 went" in done.stdout
    assert done.stderr.count("longer than the model can see (256 tokens)") == 1


COMPLETIONS = {
    "tinylm wr": ["write"],
    "tinylm generate --kernels ": ["auto", "numba", "numpy"],
    "tinylm info --precision i": ["int8"],
    "tinylm write --model ": ["models/stories-8m"],
    "tinylm bench -m mod": ["models/"],
    "tinylm bench -m models/s": ["models/stories-8m"],
}


@pytest.mark.parametrize(
    ("shell", "line"), [*(("bash", line) for line in COMPLETIONS), ("zsh", "tinylm wr"), ("fish", "tinylm wr")]
)
def test_a_shell_completes_commands_and_values(shell: str, line: str):
    """The environment variables are those that the scripts of --show-completion set."""
    environment = {
        **os.environ,
        "_TINYLM_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run([TINYLM], env=environment, capture_output=True, text=True, check=True)
    answers = done.stdout.removeprefix("_arguments '*: :((").replace('"', "").splitlines()
    # zsh and fish show a help text after the name
    assert [re.split(r"[:\t]", answer)[0] for answer in answers] == COMPLETIONS[line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_a_shell_is_shown(shell: str):
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # a test runs below no shell
    command = [TINYLM, "--show-completion", shell]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "_TINYLM_COMPLETE" in done.stdout
