"""The exported formats: other programs compute and tokenize like TinyLM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import tokenizers
import torch
import transformers
from helpers.train import tree_bytes
from hypothesis import given
from hypothesis import strategies as st

from tinylm import LLM, SamplingParams
from tinylm.explain.explainer import Explainer
from tinylm.llm import load
from tinylm.system.files import check_directory
from tinylm.weights import as_float32, load_model
from train.export_huggingface import convert_tokenizer, export_huggingface, require_same_ids
from train.export_onnx import FILE, Session, export_onnx
from train.release.format_checks import ExportError, engine_logits, export_files
from train.release.genai_tokenizer import SPACE

EXPORTS = {"onnx": export_onnx, "huggingface": export_huggingface}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_model_dir) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("exported")
    for name, export in EXPORTS.items():
        export(tiny_model_dir, directory / name)
    return {name: directory / name for name in EXPORTS}


@pytest.fixture(scope="module")
def ids(tiny_config) -> np.ndarray:
    return np.random.default_rng(7).integers(tiny_config.vocab_size, size=(2, tiny_config.context))


@pytest.fixture(scope="module")
def logits(tiny_model_dir, ids) -> np.ndarray:
    """(2, context, vocab) by the engine's reference kernels."""
    config, tensors = load_model(tiny_model_dir)
    return engine_logits(config, {name: as_float32(tensor) for name, tensor in tensors.items()}, ids)


@pytest.fixture(scope="module")
def their_tokenizer(exported):
    return transformers.AutoTokenizer.from_pretrained(exported["huggingface"])


@pytest.fixture(scope="module")
def genai_tokenizer(exported) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(exported["huggingface"] / "tokenizer_genai.json"))


def test_transformers_gives_the_engines_logits(exported, ids, logits):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported["huggingface"])
    assert type(model).__name__ == "ArceeForCausalLM"
    with torch.inference_mode():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(theirs, logits, atol=1e-3)


def test_an_explanation_shows_what_transformers_computes(exported, tiny_model_dir):
    """Attention, residual stream and logit lens, layer by layer."""
    explainer = Explainer(*load(tiny_model_dir, "numpy", "float32"))
    prompt = "Once upon a time there was a fox, and the fox saw a dog."
    ids = torch.tensor([[token.id for token in explainer.tokens(prompt)]])
    model = transformers.AutoModelForCausalLM.from_pretrained(exported["huggingface"], attn_implementation="eager")
    with torch.inference_mode():
        theirs = model(ids, output_attentions=True, output_hidden_states=True)
        *streams, normed = theirs.hidden_states  # the last one is after the last norm
        logits = [model.lm_head(model.model.norm(stream))[0] for stream in streams[1:]] + [model.lm_head(normed)[0]]
    norms, lens = explainer.norms(prompt), explainer.lens(prompt, top=5)
    for layer, stream in enumerate(streams):
        np.testing.assert_allclose(norms[layer], stream[0].norm(dim=-1).numpy(), atol=1e-4)
    for layer, (weights, scores) in enumerate(zip(theirs.attentions, logits, strict=True), 1):
        np.testing.assert_allclose(explainer.attention(prompt, layer), weights[0].numpy(), atol=1e-4)
        best = lens.top[layer - 1]
        expected = scores[-1].softmax(-1)[[one.token.id for one in best]].numpy()
        np.testing.assert_allclose([one.probability for one in best], expected, atol=1e-4)
        answers = logits[-1].argmax(-1)
        ranks = 1 + (scores > scores.gather(1, answers[:, None])).sum(-1)
        assert lens.ranks[layer - 1].tolist() == pytest.approx(ranks.tolist(), abs=1)  # a tie may fall either way
    np.testing.assert_allclose(explainer.logits(prompt), logits[-1][-1].numpy(), atol=1e-4)


PIECES = ["the", " ", "  ", "\n", "ing", ".", '"', "<|endoftext|>", "<unk>", "▁", "é"]


@given(st.text(max_size=40) | st.lists(st.sampled_from(PIECES)).map("".join))
def test_transformers_gives_the_ids_of_the_tokenizer(tokenizer, their_tokenizer, text: str):
    ids = their_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode_document(text)
    assert their_tokenizer.decode(ids) == text


@pytest.mark.parametrize("cut", [[0, 64], [0, 1, 2, 64], [0, 31, 63, 64]])
def test_onnx_gives_the_engines_logits_in_parts(exported, tiny_config, ids, logits, cut: list[int]):
    session = Session(exported["onnx"] / FILE, tiny_config)
    parts = [session.forward(ids[:, begin:end]) for begin, end in pairwise(cut)]
    np.testing.assert_allclose(np.concatenate(parts, 1), logits, atol=1e-3)


def test_onnx_uses_only_standard_operators(exported):
    model = onnx.load(exported["onnx"] / FILE)
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("times", [1.01, np.nan])
def test_an_export_with_other_logits_is_not_written(tmp_path, tiny_model_dir, monkeypatch, name: str, times: float):
    module = sys.modules[EXPORTS[name].__module__]
    monkeypatch.setattr(module, "engine_logits", lambda *arguments: engine_logits(*arguments) * times)
    with pytest.raises(ExportError, match="other logits"):
        EXPORTS[name](tiny_model_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_replaces_only_an_export_of_its_form(exported, tmp_path, tiny_model_dir, name: str):
    other = next(form for form in EXPORTS if form != name)
    for place in (
        shutil.copytree(tiny_model_dir, tmp_path / "model"),
        shutil.copytree(exported[other], tmp_path / "x"),
    ):
        before = tree_bytes(place)
        with pytest.raises(FileExistsError, match="cannot replace"):
            check_directory(place, partial(export_files, name))
        assert tree_bytes(place) == before


@pytest.mark.parametrize("name", EXPORTS)
def test_a_model_is_not_exported_over_itself(tmp_path, tiny_model_dir, name: str):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    before = tree_bytes(model)
    with pytest.raises(ExportError, match="the model itself"):
        EXPORTS[name](model, tmp_path / "elsewhere" / ".." / "model")
    assert tree_bytes(model) == before


def test_another_tokenizer_is_refused(tiny_model_dir, tokenizer):
    """The other tokenizer reads the boundary's name in a text as the boundary."""
    theirs = convert_tokenizer(tiny_model_dir / "tokenizer.model", 64)
    theirs.split_special_tokens = False
    with pytest.raises(ExportError, match="other tokens"):
        require_same_ids(theirs, tokenizer)


def test_a_missing_model_is_reported_in_one_line(tmp_path):
    command = [sys.executable, "-m", "train.export_onnx", "--model", str(tmp_path / "none"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (1, 1)
    assert "none" in result.stderr


def test_an_export_has_what_transformers_4_needs(exported):
    """transformers 4.57.1 loads and runs an export with these settings, without a warning about max_new_tokens."""
    settings = json.loads((exported["huggingface"] / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert "max_length" not in json.loads((exported["huggingface"] / "generation_config.json").read_text())


def test_an_export_has_what_onnxruntime_genai_needs(exported, tiny_config):
    """Version 0.18.0 loads such a tokenizer, and gives the engine's ids and texts."""

    def read(name: str) -> dict:
        return json.loads((exported["huggingface"] / name).read_text(encoding="utf-8"))

    model = read("genai_config.json")["model"]
    assert model["context_length"] == tiny_config.context  # without it, nothing is loaded
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert model[name] == tiny_config.boundary_id
    form = read(read("tokenizer_module.json")["tiktoken_file"])
    replaced = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    assert replaced in form["decoder"]["decoders"]  # this makes it a SentencePiece model
    assert form["pre_tokenizer"]["type"] == "Split"  # at a string: without it, texts are split as GPT-2 does
    assert set(form["pre_tokenizer"]["pattern"]) == {"String"}
    assert not any(" " in piece for piece in form["model"]["vocab"])
    assert form["added_tokens"] == read("tokenizer.json")["added_tokens"]
    assert {"genai_config.json", "tokenizer_module.json", "tokenizer_genai.json"} <= set(read("manifest.json")["files"])


@given(st.text(max_size=40) | st.lists(st.sampled_from(PIECES)).map("".join))
def test_the_form_for_onnxruntime_genai_is_the_same_tokenizer(tokenizer, genai_tokenizer, text: str):
    """Except for U+2581, which is a space, and the names of special tokens, which are these tokens."""
    text = text.replace(SPACE, "").replace("<|endoftext|>", "").replace("<unk>", "")
    ids = genai_tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text)
    assert genai_tokenizer.decode(ids) == text


def test_transformers_generates_the_engines_tokens(exported, tiny_model_dir, their_tokenizer, assert_same_greedy):
    exact = LLM.from_parts(*load(tiny_model_dir, "numpy", "float32"))
    ours = exact.generate("Once upon a time", SamplingParams(max_tokens=20, temperature=0))[0].token_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(exported["huggingface"])
    prompt = their_tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    theirs = model.generate(prompt, do_sample=False, max_new_tokens=20)[0].tolist()[prompt.shape[1] :]
    assert_same_greedy(exact, prompt[0].tolist(), list(ours), theirs[: len(ours)])
