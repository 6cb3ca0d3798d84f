"""The command line as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess

import grpc
import pytest
from helpers.client import Act, scripted_server
from helpers.terminal import TINYLM, shown_on_terminal

import tinylm
from tinylm.explain.explainer import Explainer
from tinylm.explain.forms import as_json
from tinylm.llm import load

PROMPT = "Once upon a time"


def run(*arguments, stdin=b""):
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [TINYLM, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=60, check=False)


def succeed(*arguments, stdin=b""):
    """Return the standard output of a command that must succeed without a message."""
    done = run(*arguments, stdin=stdin)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    return done.stdout.decode()


@pytest.fixture
def small(tiny_model_dir):
    """Options for a small model that needs no compilation."""
    return ("--model", tiny_model_dir, "--kernels", "numpy", "--precision", "float32")


@pytest.fixture(scope="module")
def llm(tiny_model_dir):
    """The model of `small` in this process."""
    return tinylm.LLM(tiny_model_dir, kernels="numpy", precision="float32")


def test_version():
    assert succeed("--version") == f"tinylm {tinylm.__version__}\n"


def test_generate_prints_the_prompt_and_its_continuation(small, llm):
    [expected] = llm.generate(PROMPT, tinylm.SamplingParams(max_tokens=12, seed=5))
    text = PROMPT + expected.text + "\n"
    assert succeed("generate", PROMPT, "-n", 12, "--seed", 5, *small) == text
    with_mark = f"\ufeff{PROMPT}".encode()
    assert succeed("generate", "-", "-n", 12, "--seed", 5, *small, stdin=with_mark) == text


def test_every_setting_reaches_the_engine(small, llm):
    settings = {
        "max_tokens": 20,
        "temperature": 1.3,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "seed": 3,
        "logprobs": 2,
        "min_tokens": 4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "dry_multiplier": 0.8,
        "bad_words": ("the", "was"),
        "stop_token_ids": (7, 8),
    }
    [free] = llm.generate("x", tinylm.SamplingParams(**settings))
    stop = free.text[len(free.text) // 2 :][:3]
    settings |= {"stop": ("\1", stop)}
    biases = {300: 2.5, 301: -5}
    params = tinylm.SamplingParams(**settings, logit_bias=biases, ignore_eos=True)
    [expected] = llm.generate("x", params)
    several = [(name, value if isinstance(value, tuple) else (value,)) for name, value in settings.items()]
    options = [part for name, values in several for value in values for part in (f"--{name.replace('_', '-')}", value)]
    options += [
        "--ignore-eos",
        *(part for pair in biases.items() for part in ("--logit-bias", "=".join(map(str, pair)))),
    ]
    answer = json.loads(succeed("generate", "x", *options, *small, "--json"))
    assert {name: answer[name] for name in ("prompt", "text", "token_ids", "finish_reason")} == {
        "prompt": "x",
        "text": expected.text,
        "token_ids": expected.token_ids,
        "finish_reason": expected.finish_reason,
    }
    assert [entry["logprob"] for entry in answer["logprobs"]] == pytest.approx(
        [entry.logprob for entry in expected.logprobs], abs=1e-3
    )


def test_tokenize_shows_each_token_and_its_text(tokenizer):
    text = "Once upon a time 🙂\n"
    ids = tokenizer.encode(text)
    tokens = json.loads(succeed("tokenize", text, "--json"))
    assert tokens["ids"] == ids
    assert len(tokens["pieces"]) == len(ids)
    table = run("tokenize", "-", stdin=text.encode())
    assert [int(line.split()[0]) for line in table.stdout.decode().splitlines()] == ids
    assert table.stderr.decode().strip() == f"{len(ids)} tokens"


EXPLAINED = {
    "temperature": 1.3,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "dry_multiplier": 0.8,
    "seed": 3,
    "min_tokens": 1,
}


def test_explain_shows_what_the_explainer_finds(small, tiny_model_dir, llm):
    explainer = Explainer(*load(tiny_model_dir, "numpy", "float32"))
    params = tinylm.SamplingParams(**EXPLAINED, ignore_eos=True, bad_words=("the",), logit_bias={300: 2.5})
    options = [part for name, value in EXPLAINED.items() for part in (f"--{name.replace('_', '-')}", value)]
    options += ["--ignore-eos", "--bad-words", "the", "--logit-bias", "300=2.5", "--top", 7, *small]
    shown = json.loads(succeed("explain", PROMPT, *options, "--json"))
    scores = as_json(explainer.scores(PROMPT, params, top=7))
    difference = shown["scores"].pop("difference")
    assert shown["scores"] == {name: value for name, value in scores.items() if name != "difference"}
    assert (difference["same_token"], difference["largest"] < 1e-4) == (True, True)
    assert [difference["token"]] == llm.generate(PROMPT, dataclasses.replace(params, max_tokens=1))[0].token_ids
    assert shown["prompt"] == PROMPT
    for name, part in (
        ("tokens", explainer.tokens(PROMPT)),
        ("norms", explainer.norms(PROMPT)),
        ("lens", explainer.lens(PROMPT, top=3)),
    ):
        assert shown[name] == as_json(part)
    assert shown["cache"]["used_positions"] == len(shown["tokens"])
    tables = succeed("explain", "-", *options, stdin=PROMPT.encode())
    words = {"top_k", "min_p", "next token (seed 3)", "KV cache", "the same token", repr(scores["chosen"]["text"])}
    assert [word for word in words if word not in tables] == []


def test_info_shows_shape_and_size(stories_dir):
    facts = json.loads(succeed("info", "--json", "--kernels", "numpy", "--precision", "int8"))
    config = json.loads((stories_dir / "config.json").read_text())
    assert {name: facts[name] for name in config} == config
    assert facts["parameters"] == 7_870_656
    assert facts["weights"] == "int8"
    assert facts["arithmetic"] == "numpy, int8"
    assert facts["bytes_on_disk"] == sum(path.stat().st_size for path in stories_dir.iterdir())
    assert facts["version"] == tinylm.__version__


def test_info_shows_any_directory_name(tiny_model_dir, tmp_path):
    place = shutil.copytree(tiny_model_dir, tmp_path / "a[" / "x]:smile:")
    shown = succeed("info", "--model", place, "--kernels", "numpy")
    assert str(place) in "".join(shown.split())  # the table may break the line


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("generate", PROMPT, "-t", "11"), b"", "temperature is 11.0"),
        (("generate", PROMPT, "--stop", ""), b"", "stop holds a string of length 0"),
        (("generate", PROMPT, "--logit-bias", "300:5"), b"", "--logit-bias is '300:5': it must be TOKEN=BIAS"),
        (("generate", PROMPT, "--logit-bias", "5000=5"), b"", "logit_bias holds token 5000: tokens are 0 to 4095"),
        (("generate", PROMPT, "--kernels", "cuda"), b"", "kernels is 'cuda'"),
        (("generate", "-", "--kernels", "numpy"), b"word " * 300, "at most 255"),
        (("generate", PROMPT, "--model", "nowhere"), b"", "nowhere"),
        (("info", "--model", "nowhere"), b"", "nowhere"),
        (("tokenize", PROMPT, "--model", "nowhere"), b"", "nowhere"),
        (("explain", PROMPT, "--model", "nowhere"), b"", "nowhere"),
        (("explain", "", "--kernels", "numpy"), b"", "prompt has 0 tokens: it must have 1 to 64"),
        (("explain", "-", "--kernels", "numpy"), b"a dog " * 33, "it must have 1 to 64"),
        (("explain", PROMPT, "--top", "0", "--kernels", "numpy"), b"", "top is 0: it must be a whole number, 1 to 100"),
        (("tokenize", "-"), b"\xff\xfe", "standard input is UTF-16"),
        (("info", "--server", "localhost:1"), b"", "UNAVAILABLE"),
        (("bench", "--batches", "1;2"), b"", "--batches must be whole numbers"),
    ],
)
def test_an_error_is_one_line(arguments, stdin, message):
    done = run(*arguments, stdin=stdin)
    assert (done.returncode, done.stdout) == (1, b"")
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("error: ")
    assert message in line


TITLE = "\x1b]0;title\x07"


@pytest.mark.parametrize("command", [("generate", PROMPT), ("info",), ("tokenize", PROMPT)], ids=lambda c: c[0])
def test_a_service_cannot_control_the_terminal(command):
    """The service's text, name, tokens and errors may have any character."""
    with scripted_server() as (server, port):
        for act in (Act(details=TITLE), Act(0, grpc.StatusCode.PERMISSION_DENIED, details=TITLE)):
            server.acts, server.timeouts_s = [act], []
            shown = shown_on_terminal([TINYLM, *command, "--server", f"127.0.0.1:{port}"])
            assert b"title" in shown
            assert TITLE.encode() not in shown


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", [("generate", "-", "-n", "2"), ("write",), ("--help",)], ids=lambda c: c[0])
def test_a_command_runs_with_closed_streams(command, closed, small):
    options = () if command == ("--help",) else map(str, small)
    shell = ["bash", "-c", f'"$@" {closed}', "bash", TINYLM, *command, *options]
    done = subprocess.run(shell, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
