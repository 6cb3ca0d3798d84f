"""`tinylm write` as its user has it, on a pseudo-terminal and on pipes; and its parts that are easier tried alone."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.terminal import TINYLM, terminal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from tinylm import SamplingParams
from tinylm.terminal.lines import CommandCompleter
from tinylm.terminal.settings import NAMES, changed, described
from tinylm.terminal.story import Story, visible_end
from tinylm.terminal.writer import COMMANDS, words_after

GREEDY = ("-t", "0", "-n", "20", "--kernels", "numpy")
BEGIN = "Once upon a time"


@pytest.fixture
def token_bytes(tokenizer):
    return lambda text: [tokenizer.piece_bytes[token] for token in tokenizer.encode(text)]


@pytest.fixture(scope="module")
def numpy_stories(stories_dir):
    from tinylm import LLM

    return LLM(stories_dir, kernels="numpy")


def test_a_session_at_a_terminal(tmp_path: Path, numpy_stories):
    """Write, go on, take back, write anew, set, save, leave."""
    params = SamplingParams(max_tokens=20, temperature=0)
    first = BEGIN + numpy_stories.generate(BEGIN, params)[0].text
    second = first + numpy_stories.generate(first, params)[0].text
    file = tmp_path / "story.txt"
    with terminal(*GREEDY, state=tmp_path) as t:
        shown = t.enter(BEGIN)
        assert first.removeprefix(BEGIN).lstrip() in shown
        assert "length · 20 tokens · " in shown
        assert second.removeprefix(first).lstrip() in t.enter("")
        assert "taken back" in t.enter("/undo")
        assert second.removeprefix(first).lstrip() in t.enter("")
        assert second.removeprefix(first).lstrip() in t.enter("/retry")
        assert f"saved as {file}" in t.enter(f"/save {file}")
        assert file.read_text(encoding="utf-8") == second + "\n"
        assert "temperature is 12.0: it must be a number, 0 to 10" in t.enter("/set temperature 12")
        assert "error" not in t.enter("/set max_tokens 3")
        assert "max_tokens          3" in t.enter("/settings")
        assert "length · 3 tokens" in t.enter("A bear came.")
        assert "there is no command /frobnicate: /help" in t.enter("/frobnicate")
        assert "is there already" in t.enter(f"/save {Path(__file__)}")
        assert all(command in shown for shown in [t.enter("/help")] for command in COMMANDS)
        assert "the story is empty" in (t.enter("/new") and t.enter("/retry"))
        t.child.sendcontrol("d")
        t.child.wait()
        assert t.child.exitstatus == 0
    history = tmp_path / "tinylm" / "history"
    assert f"+{BEGIN}\n" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o777 == 0o600


def test_page_transcript_is_what_happens(tmp_path: Path):
    """Speeds aside."""
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


def test_ctrl_c_stops_the_model_and_takes_a_line_back(tmp_path: Path):
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


def test_colours_are_there_where_they_are_wanted(tmp_path: Path):
    with terminal(*GREEDY, "--color-probabilities", state=tmp_path) as t:
        t.child.sendline(BEGIN)
        shown = t.raw_prompt()
        assert "\x1b[32m" in shown or "\x1b[33m" in shown
    with terminal(*GREEDY, "--color-probabilities", state=tmp_path, NO_COLOR="1") as t:
        t.child.sendline(BEGIN)
        shown = t.raw_prompt()
        assert "tokens/s" in shown
        assert "\x1b[3" not in shown


def test_lines_of_a_pipe_are_turns_and_the_story_is_all_that_is_printed(numpy_stories):
    params = SamplingParams(max_tokens=20, temperature=0)
    story = BEGIN + numpy_stories.generate(BEGIN, params)[0].text
    story += numpy_stories.generate(story, params)[0].text
    story += " A bear came." + numpy_stories.generate(story + " A bear came.", params)[0].text
    done = subprocess.run(
        [TINYLM, "write", *GREEDY], input=f"{BEGIN}\n\nA bear came.\n", capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (story.removesuffix("\n") + "\n", "")
    bad = subprocess.run([TINYLM, "chat", *GREEDY], input="/set top_p 3\n", capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("error: top_p is 3.0")


def test_a_story_longer_than_the_context_goes_on_and_says_so_once(numpy_stories):
    lines = "".join(f"Number {i} went to the park and saw a big red dog there.\n" for i in range(25))
    options = ("-n", "4", "--kernels", "numpy", "--seed", "1")
    done = subprocess.run([TINYLM, "write", *options], input=lines, capture_output=True, text=True, check=True)
    assert "Number 24 went" in done.stdout
    assert done.stderr.count("longer than the model can see (256 tokens)") == 1


@given(
    text=st.lists(st.sampled_from(["The dog ran.", "Why?", "a big red ball and", "Zoë 🎉", "\n\n", "“Yes!”"])).map(
        " ".join
    ),
    n_tokens=st.integers(10, 60),
)
@settings(max_examples=60)
@example(text="Zoë 🎉 Zoë 🎉 Zoë 🎉 The dog ran. The dog ran. The dog ran. The dog ran.", n_tokens=42)
def test_what_the_model_sees_is_the_end_of_the_story_and_fits(tokenizer, text, n_tokens):
    seen = visible_end(text, lambda t: [tokenizer.piece_bytes[token] for token in tokenizer.encode(t)], n_tokens)
    assert text.endswith(seen)
    assert len(tokenizer.encode(seen)) <= n_tokens
    assert seen == text or len(tokenizer.encode(seen)) >= n_tokens // 2 - 8 or n_tokens < 20


@given(text=st.text(min_size=1, max_size=20), n_tokens=st.integers(5, 255))
@settings(max_examples=30)
@example(text=" ", n_tokens=255)
def test_only_the_end_of_a_long_story_is_tokenized(tokenizer, text, n_tokens):
    """A service refuses to tokenize more than 64 KiB."""

    def token_bytes(part):
        assert len(part.encode()) <= 65536
        return [tokenizer.piece_bytes[token] for token in tokenizer.encode(part)]

    seen = visible_end(text * 80_000, token_bytes, n_tokens)
    assert (text * 80_000).endswith(seen)
    assert len(tokenizer.encode(seen)) <= n_tokens


def test_it_begins_with_a_sentence_else_with_a_word(token_bytes):
    sentences = "".join(f"Tom saw {i} dogs. " for i in range(40))
    assert visible_end(sentences, token_bytes, 50).startswith("Tom saw")
    words = " ".join(["butterflies"] * 100)
    assert visible_end(words, token_bytes, 50).startswith("butterflies ")
    assert visible_end("Short.", token_bytes, 50) == "Short."


def test_lines_are_set_off_from_the_story_but_for_punctuation():
    story = Story()
    for line in ("Once", "upon", ", then", "", "\tx"):
        story.add(line)
    story.turns[-1].written = "\n"
    story.add("y")
    assert story.text == "Once upon, then\tx\ny"


def test_settings_are_read_as_they_are_shown():
    params = SamplingParams(temperature=0.5, top_k=3, seed=9, stop=("The end", "x y"))
    read = SamplingParams()
    for line in described(params).splitlines():
        name, *words = shlex.split(line)
        read = changed(read, name, words)
    assert read == params
    assert changed(params, "seed", []).seed is None
    assert set(NAMES) | {"logprobs"} == set(SamplingParams.__dataclass_fields__)
    with pytest.raises(ValueError, match="there is no setting 'temprature'"):
        changed(params, "temprature", ["1"])
    with pytest.raises(ValueError, match="top_k is 'many': it must be a whole number"):
        changed(params, "top_k", ["many"])


def test_commands_complete():
    completer = CommandCompleter(tuple(COMMANDS), words_after)

    def completed(text: str) -> list[str]:
        return [c.text for c in completer.get_completions(Document(text), CompleteEvent())]

    assert completed("/se") == ["/set", "/settings"]
    assert completed("/set top") == ["top_p", "top_k"]
    assert completed("/colors o") == ["on", "off"]
    assert completed("Once /se") == []
    assert completed("/save pyproject.t") == ["oml"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tinylm wr", ["write"]),
        ("tinylm generate --kernels ", ["auto", "numba", "numpy"]),
        ("tinylm write --kernels nump", ["numpy"]),
        ("tinylm info --precision ", ["auto", "int8", "float32"]),
        ("tinylm write --model ", ["models/stories-8m"]),
        ("tinylm bench -m mod", ["models/"]),
        ("tinylm bench -m models/s", ["models/stories-8m"]),
        ("tinylm generate --temp", ["--temperature"]),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_s_questions_are_answered(shell: str, line: str, expected: list[str]):
    """In each shell's own protocol, as the script of --show-completion asks them."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_TINYLM_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run([TINYLM], env=environment, capture_output=True, text=True, check=True)
    answers = done.stdout.replace('"', "").split("\n")
    if shell == "zsh":
        answers = done.stdout.removeprefix("_arguments '*: :((").split("))'")[0].replace('"', "").split("\n")
    # zsh and fish show a help text beside the name
    assert [answer.replace(":", "\t").split("\t")[0] for answer in answers if answer] == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_each_shell_is_shown(shell: str):
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # a test runs below no shell
    command = [TINYLM, "--show-completion", shell]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "_TINYLM_COMPLETE" in done.stdout


def test_story_goes_on_when_its_history_cannot_be_written(tmp_path: Path) -> None:
    with terminal(*GREEDY, state=tmp_path) as t:
        t.enter(BEGIN)
        shutil.rmtree(tmp_path / "tinylm")
        (tmp_path / "tinylm").write_text("a file in the place of the directory")
        assert "length · 20 tokens" in t.enter("")
        assert BEGIN in t.enter("/show")
