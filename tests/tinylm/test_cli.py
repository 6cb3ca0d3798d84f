"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from helpers.client import Act, scripted_server
from helpers.terminal import shown_on_terminal

import tinylm

TINYLM = Path(sys.executable).with_name("tinylm")
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def cli(stories_dir):
    """Runs `tinylm ...` in the repository's root and gives back its status and its output."""

    def run(*arguments, stdin=b""):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run(
            [TINYLM, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            cwd=stories_dir.parent.parent,
            env=environment,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def succeed(cli):
    """The standard output of a command that must succeed and say nothing of errors."""

    def run(*arguments, stdin=""):
        done = cli(*arguments, stdin=stdin.encode())
        assert (done.returncode, done.stderr.decode()) == (0, "")
        return done.stdout.decode()

    return run


@pytest.fixture
def fail(cli):
    """The one line that a command which must fail has for its user."""

    def run(*arguments, stdin=""):
        done = cli(*arguments, stdin=stdin.encode())
        assert done.returncode == 1
        assert done.stdout == b""
        [line] = done.stderr.decode().splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture(scope="module")
def closed_port():
    """An address that nobody answers at."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound but not listening
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def test_version(succeed):
    assert succeed("--version") == f"tinylm {tinylm.__version__}\n"


def test_generate_prints_what_the_library_gives_and_json_is_the_same(succeed, stories):
    """The prompt and its continuation; -n bounds it; a seed makes it reproducible."""
    options = ("-n", 12, "--seed", 5)
    text = succeed("generate", PROMPT, *options)
    answer = json.loads(succeed("generate", PROMPT, *options, "--json"))
    [expected] = stories.generate(PROMPT, tinylm.SamplingParams(max_tokens=12, seed=5))
    assert text == PROMPT + expected.text + "\n"
    assert (answer["prompt"], answer["text"], answer["token_ids"]) == (PROMPT, expected.text, expected.token_ids)
    assert answer["finish_reason"] == expected.finish_reason
    assert len(answer["token_ids"]) <= 12


def test_every_setting_reaches_the_engine(succeed, tiny, tiny_model_dir):
    settings = {
        "--max-tokens": 20,
        "--temperature": 1.3,
        "--top-p": 0.9,
        "--top-k": 40,
        "--min-p": 0.01,
        "--repetition-penalty": 1.2,
        "--seed": 3,
        "--logprobs": 2,
    }
    fields = {name.removeprefix("--").replace("-", "_"): value for name, value in settings.items()}
    [free] = tiny.generate("x", tinylm.SamplingParams(**fields))
    stop = free.text[len(free.text) // 2 :][:3]
    [expected] = tiny.generate("x", tinylm.SamplingParams(**fields, stop=("\1", stop)))
    options = [part for item in settings.items() for part in item]
    output = succeed("generate", "x", *options, "--stop", "\1", "--stop", stop, "-m", tiny_model_dir, "--json")
    answer = json.loads(output)
    assert answer["text"] == expected.text
    assert answer["token_ids"] == expected.token_ids
    assert [entry["logprob"] for entry in answer["logprobs"]] == pytest.approx(
        [entry.logprob for entry in expected.logprobs], abs=1e-3
    )


def test_a_prompt_may_come_from_standard_input(succeed):
    assert succeed("generate", "-", "-n", 4, "-t", 0, stdin=PROMPT) == succeed("generate", PROMPT, "-n", 4, "-t", 0)


def test_tokenize_shows_each_token_and_its_text(succeed, tokenizer):
    text = "Once upon a time 🙂\n"
    tokens = json.loads(succeed("tokenize", text, "--json"))
    assert tokens["ids"] == tokenizer.encode(text)
    assert len(tokens["pieces"]) == len(tokens["ids"])
    assert json.loads(succeed("tokenize", "-", "--json", stdin=text)) == tokens


def test_tokenize_prints_a_table_and_a_count(cli, tokenizer):
    done = cli("tokenize", "a cat")
    ids = tokenizer.encode("a cat")
    assert [int(line.split()[0]) for line in done.stdout.decode().splitlines()] == ids
    assert done.stderr.decode().strip() == f"{len(ids)} tokens"


def test_info_tells_shape_and_size(succeed, stories_dir):
    facts = json.loads(succeed("info", "--json"))
    config = json.loads((stories_dir / "config.json").read_text())
    assert {name: facts[name] for name in config} == config
    assert facts["parameters"] == 7_870_656
    assert facts["weights"] == "int8"
    assert facts["arithmetic"] == tinylm.LLM(stories_dir).model.arithmetic
    chosen = succeed("info", "--json", "--kernels", "numpy", "--precision", "int8")
    assert json.loads(chosen)["arithmetic"] == "numpy, int8"
    assert facts["bytes_on_disk"] == sum(path.stat().st_size for path in stories_dir.iterdir())
    assert facts["version"] == tinylm.__version__
    assert "7,870,656" in succeed("info")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("-t", "11", "temperature is 11.0"),
        ("--temperature", "nan", "temperature is nan"),
        ("-n", "0", "max_tokens is 0"),
        ("--top-p", "0", "top_p is 0.0"),
        ("--stop", "", "stop holds a string of length 0"),
        ("--kernels", "cuda", "kernels is 'cuda'"),
        ("--precision", "int4", "precision is 'int4'"),
    ],
)
def test_a_bad_setting_is_one_line(fail, option, value, told):
    assert told in fail("generate", PROMPT, option, value)


def test_a_prompt_too_long_is_one_line(fail):
    assert "at most 255" in fail("generate", "-", stdin="word " * 300)


def test_a_missing_or_damaged_model_is_one_line(fail, stories_dir, tmp_path):
    for command in (("generate", PROMPT), ("info",), ("tokenize", PROMPT)):
        assert "nowhere" in fail(*command, "--model", "nowhere")
    damaged = shutil.copytree(stories_dir, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"")
    assert str(damaged / "model.safetensors") in fail("generate", PROMPT, "-m", damaged)


def test_a_server_that_does_not_answer_is_one_line(fail, closed_port):
    with ThreadPoolExecutor(2) as pool:  # they try for seconds
        asked = [pool.submit(fail, *ask, "--server", closed_port) for ask in (("generate", PROMPT), ("info",))]
    assert all("UNAVAILABLE" in one.result() for one in asked)


def test_input_that_is_no_text_is_one_line(cli):
    done = cli("tokenize", "-", stdin=b"\xff\xfe")
    assert done.returncode == 1
    assert len(done.stderr.decode().splitlines()) == 1


def test_a_model_directory_may_have_any_name(succeed, tiny_model_dir, tmp_path):
    place = shutil.copytree(tiny_model_dir, tmp_path / "a[" / "x]:smile:")
    shown = succeed("info", "--model", place, "--kernels", "numpy")
    assert str(place) in "".join(shown.split())  # without the line breaks of the table


TITLE = "\x1b]0;title\x07"


@pytest.mark.parametrize("command", [("generate", PROMPT), ("info",), ("tokenize", PROMPT)], ids=lambda c: c[0])
def test_a_service_cannot_command_the_terminal(command):
    """Its text, its name, its tokens and its errors may hold any character."""
    with scripted_server() as (server, port):
        for act in (Act(details=TITLE), Act(0, grpc.StatusCode.PERMISSION_DENIED, details=TITLE)):
            server.acts, server.timeouts_s = [act], []
            shown = shown_on_terminal([str(TINYLM), *command, "--server", f"127.0.0.1:{port}"])
            assert b"title" in shown
            assert TITLE.encode() not in shown


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", [("generate", "-", "-n", "2"), ("write",), ("--help",)], ids=lambda c: c[0])
def test_a_command_runs_with_closed_streams(command, closed, tiny_model_dir):
    options = () if command == ("--help",) else ("--model", str(tiny_model_dir), "--kernels", "numpy")
    shell = ["bash", "-c", f'"$@" {closed}', "bash", TINYLM, *command, *options]
    done = subprocess.run(shell, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_generate_shows_no_colour_where_none_is_wanted(environment, tiny_model_dir):
    command = [str(TINYLM), "generate", PROMPT, "-n", "2", "--kernels", "numpy", "--model"]
    assert b"\x1b[1m" in shown_on_terminal([*command, str(tiny_model_dir)])
    assert re.search(rb"\x1b\[[0-9;]*m", shown_on_terminal([*command, str(tiny_model_dir)], **environment)) is None
    assert re.search(rb"\x1b\[[0-9;]*m", shown_on_terminal([*command, "nowhere"], **environment)) is None


def test_an_unknown_option_is_a_usage_error(cli):
    done = cli("generate", PROMPT, "--temprature", "1")
    assert done.returncode == 2
    assert "--temprature" in done.stderr.decode()
