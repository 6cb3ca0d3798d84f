"""The parts of the story prompt that need no terminal: the visible end of a story, settings, completion."""

import shlex

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from tinylm import SamplingParams
from tinylm.terminal.commands import CommandCompleter
from tinylm.terminal.settings import NAMES, changed, described
from tinylm.terminal.story import Story, visible_end


@pytest.fixture(scope="module")
def token_bytes(tokenizer):
    return lambda text: [tokenizer.piece_bytes[token] for token in tokenizer.encode(text)]


SENTENCES = st.sampled_from(["The dog ran.", "Why?", "a big red ball and", "Zoë 🎉", "\n\n", "“Yes!”"])


@given(text=st.lists(SENTENCES).map(" ".join), n_tokens=st.integers(10, 60))
@settings(max_examples=60)
@example(text="Zoë 🎉 Zoë 🎉 Zoë 🎉 The dog ran. The dog ran. The dog ran. The dog ran.", n_tokens=42)
def test_the_model_sees_the_end_of_the_story(token_bytes, text, n_tokens):
    seen = visible_end(text, token_bytes, n_tokens)
    assert text.endswith(seen)
    assert len(token_bytes(seen)) <= n_tokens
    assert seen == text or len(token_bytes(seen)) >= n_tokens // 2 - 8 or n_tokens < 20


@given(text=st.text(min_size=1, max_size=20), n_tokens=st.integers(5, 255))
@settings(max_examples=30)
@example(text=" ", n_tokens=255)
def test_only_the_end_of_a_long_story_is_tokenized(token_bytes, text, n_tokens):
    """A service refuses to tokenize more than 64 KiB."""

    def limited(part):
        assert len(part.encode()) <= 65536
        return token_bytes(part)

    seen = visible_end(text * 80_000, limited, n_tokens)
    assert (text * 80_000).endswith(seen)
    assert len(token_bytes(seen)) <= n_tokens


def test_the_visible_end_begins_with_a_sentence_or_word(token_bytes):
    sentences = "".join(f"Tom saw {i} dogs. " for i in range(40))
    assert visible_end(sentences, token_bytes, 50).startswith("Tom saw")
    words = " ".join(["butterflies"] * 100)
    assert visible_end(words, token_bytes, 50).startswith("butterflies ")
    assert visible_end("Short.", token_bytes, 50) == "Short."


def test_a_line_gets_a_space_before_it_unless_punctuation():
    story = Story()
    for line in ("Once", "upon", ", then", "", "\tx"):
        story.add(line)
    story.turns[-1].written = "\n"
    story.add("y")
    assert story.text == "Once upon, then\tx\ny"


def test_settings_are_read_as_they_are_shown():
    params = SamplingParams(temperature=0.5, top_k=3, stop=("The end", "x y"))  # without a seed and bad words
    read = SamplingParams(seed=9, bad_words=("dog",))
    for line in described(params).splitlines():
        name, *words = shlex.split(line)
        read = changed(read, name, words)
    assert read == params
    assert changed(params, "seed", []).seed is None
    left_out = {"logprobs", "prompt_logprobs", "ignore_eos", "logit_bias", "stop_token_ids"}  # for programs
    left_out |= {f"dry_{name}" for name in ("base", "allowed_length", "penalty_last_n", "sequence_breakers")}
    assert set(NAMES) | left_out == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("temprature", ["1"], "there is no setting 'temprature'"),
        ("top_k", ["many"], "top_k is 'many': it must be a whole number"),
        ("temperature", ["0", "5"], "temperature is '0 5': it must be a number"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name, words, message):
    with pytest.raises(ValueError, match=message):
        changed(SamplingParams(), name, words)


@pytest.mark.parametrize(
    ("text", "completions"),
    [
        ("/se", ["/set", "/settings"]),
        ("/set top", ["top_p", "top_k"]),
        ("/colors o", ["on", "off"]),
        ("Once /se", []),
        ("/save pyproject.t", ["oml"]),
    ],
)
def test_the_prompt_completes_commands(text, completions):
    assert [c.text for c in CommandCompleter().get_completions(Document(text), CompleteEvent())] == completions
