"""Model directories: what is saved is what is loaded, and damage of any kind is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinylm import ModelConfig, ModelError
from tinylm.llm import load
from tinylm.weights import QuantizedMatrix, load_model, quantize_rows, save_model

TINY = st.sampled_from(np.array([1e-45, 2e-43, 1e-41, 1.2e-38, 1e-37], np.float32).tolist())
FILES = ["config.json", "model.safetensors", "tokenizer.model"]


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "tiny")


@pytest.fixture
def tokenizer_bytes(tiny_model_dir):
    return (tiny_model_dir / "tokenizer.model").read_bytes()


def reseal(directory):
    """Make the manifest agree with files that were changed: damage done before the model was published."""
    sums = {}
    for name in FILES:
        data = (directory / name).read_bytes()
        sums[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(sums))


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- what is saved is what is loaded


def test_float_weights_survive_exactly(tmp_path, tiny_config, tiny_tensors, tokenizer_bytes):
    save_model(tmp_path / "m", tiny_config, tiny_tensors, tokenizer_bytes, quantize=False)
    config, tensors = load_model(tmp_path / "m")
    assert config == tiny_config
    assert tensors.keys() == tiny_tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, tiny_tensors[name], err_msg=name)
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == tokenizer_bytes


def test_quantized_weights_are_off_by_half_a_step_at_most(tiny_model_dir, tiny_config, tiny_tensors):
    config, tensors = load_model(tiny_model_dir)
    assert config == tiny_config
    assert tensors.keys() == tiny_tensors.keys()
    for name, tensor in tensors.items():
        if tiny_tensors[name].ndim == 1:
            np.testing.assert_array_equal(tensor, tiny_tensors[name], err_msg=name)
        else:
            assert isinstance(tensor, QuantizedMatrix)
            off = np.abs(tensor.dequantize() - tiny_tensors[name])
            assert (off <= tensor.scale[:, None] * 0.5001).all(), name
            assert off.max() > 0, "the test would not see weights that were never quantized"


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32) | TINY,
    )
)
def test_quantizing_is_off_by_half_a_step_at_most(matrix):
    """For rows of any size: zeros, one huge value, values so small that their scale can't be written."""
    quantized = quantize_rows(matrix)
    assert quantized.values.dtype == np.int8
    assert quantized.scale.dtype == np.float32
    assert (quantized.scale > 0).all()
    exact = quantized.values.astype(np.float64) * quantized.scale[:, None]
    assert (np.abs(exact - matrix) <= quantized.scale[:, None] * 0.5001).all()
    np.testing.assert_allclose(quantized.dequantize(), exact, rtol=1e-6)


def test_each_row_uses_the_whole_range(tiny_model_dir):
    """A scale for the whole matrix would waste most of the 8 bits on rows of small values."""
    for name, tensor in load_model(tiny_model_dir)[1].items():
        if isinstance(tensor, QuantizedMatrix):
            assert (np.abs(tensor.values.astype(int)).max(axis=1) == 127).all(), name


def test_other_files_come_along(tmp_path, tiny_config, tiny_tensors, tokenizer_bytes):
    extra = {"README.md": b"# card", "config.json": b"never instead of the model's own"}
    save_model(tmp_path / "m", tiny_config, tiny_tensors, tokenizer_bytes, extra_files=extra)
    assert (tmp_path / "m" / "README.md").read_bytes() == b"# card"
    assert load_model(tmp_path / "m")[0] == tiny_config


def test_the_committed_model_is_whole(stories_dir):
    tokenizer, model = load(stories_dir)
    assert model.config == ModelConfig()
    assert tokenizer.vocab_size == model.config.vocab_size
    assert model.weight_type == "int8"


# --- damage is refused by name


def refused(directory, *needles):
    with pytest.raises(ModelError) as caught:
        load(directory)
    for needle in needles:
        assert str(needle) in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_is_named_with_both_sizes(model_dir, name):
    data = (model_dir / name).read_bytes()
    for kept in (0, len(data) // 2, len(data) - 1):
        (model_dir / name).write_bytes(data[:kept])
        refused(model_dir, model_dir / name, f"has {kept} bytes", f"says {len(data)}")


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_something_behind_it_is_named(model_dir, name):
    with (model_dir / name).open("ab") as file:
        file.write(b"\n")
    refused(model_dir, model_dir / name, "altered")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_one_flipped_bit_is_seen_and_both_sums_are_told(model_dir, name, where):
    data = bytearray((model_dir / name).read_bytes())
    right = hashlib.sha256(data).hexdigest()
    data[int(where * (len(data) - 1))] ^= 1 << 5
    (model_dir / name).write_bytes(data)
    refused(model_dir, model_dir / name, right, hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(model_dir, name):
    (model_dir / name).unlink()
    refused(model_dir, model_dir / name, "missing")


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", "null", "3", "{}", '{"config.json": 5}', '{"config.json": {"bytes": 1}}', "\xff"],
)
def test_a_broken_manifest_is_named(model_dir, manifest):
    (model_dir / "manifest.json").write_text(manifest, encoding="latin-1")
    refused(model_dir, model_dir / "manifest.json", "damaged")


def test_a_path_that_is_no_directory_is_named(model_dir):
    refused(model_dir / "nowhere", model_dir / "nowhere")
    refused(model_dir / "config.json", model_dir / "config.json")


def test_a_folder_of_something_else_is_said_to_be_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, tmp_path / "manifest.json", "not a whole model directory")


# --- files that are whole but don't fit together


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda values: {**values, "vocab_size": 0}, "vocab_size"),
        (lambda values: {**values, "dropout": 0.1}, "dropout"),
        (lambda values: {k: v for k, v in values.items() if k != "context"}, "context"),
        (lambda values: {**values, "n_layers": 4}, "model.layers.3."),
        (lambda values: {**values, "n_layers": 2}, "model.layers.2."),
        (lambda values: {**values, "mlp_size": 256}, "mlp.up_proj.weight"),
        (lambda values: [], "config"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_told(model_dir, change, needle):
    values = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(change(values)))
    reseal(model_dir)
    refused(model_dir, model_dir, needle)


def test_a_config_that_is_no_json_is_named(model_dir):
    (model_dir / "config.json").write_text("context: 64")
    reseal(model_dir)
    refused(model_dir, model_dir / "config.json")


def drop_scale(tensors):
    del tensors["model.embed_tokens.weight.scale"]


def cut_scale(tensors):
    tensors["model.embed_tokens.weight.scale"] = tensors["model.embed_tokens.weight.scale"][:-1]


def drop_norm(tensors):
    del tensors["model.norm.weight"]


def cut_norm(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]


def add_bias(tensors):
    tensors["model.norm.bias"] = np.zeros(64, np.float32)


@pytest.mark.parametrize("change", [drop_scale, cut_scale, drop_norm, cut_norm, add_bias])
def test_weights_of_another_model_are_refused(model_dir, change):
    tensors = safetensors.numpy.load((model_dir / "model.safetensors").read_bytes())
    change(tensors)
    (model_dir / "model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    reseal(model_dir)
    name = {"drop_scale": "embed", "cut_scale": "embed"}.get(change.__name__, "model.norm.")
    refused(model_dir, model_dir / "model.safetensors", name)


def spoil_scale(tensors):
    tensors["model.embed_tokens.weight.scale"][3] = np.nan


def spoil_norm(tensors):
    tensors["model.norm.weight"][0] = np.inf


@pytest.mark.parametrize(
    ("change", "name"), [(spoil_scale, "model.embed_tokens.weight.scale"), (spoil_norm, "model.norm.weight")]
)
def test_weights_that_are_not_finite_are_refused(model_dir, change, name):
    """One of them in a scale used to end the process, or to write one token for ever."""
    stored = safetensors.numpy.load((model_dir / "model.safetensors").read_bytes())
    tensors = {name: tensor.copy() for name, tensor in stored.items()}
    change(tensors)
    (model_dir / "model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    reseal(model_dir)
    refused(model_dir, model_dir / "model.safetensors", name, "not finite")


def test_weights_that_are_no_safetensors_are_named(model_dir):
    (model_dir / "model.safetensors").write_bytes(b"PK\x03\x04 this is a zip file")
    reseal(model_dir)
    refused(model_dir, model_dir / "model.safetensors", "safetensors")


def test_a_tokenizer_of_another_model_is_refused_with_both_numbers(
    tmp_path, random_gpt, tiny_config, tiny_tensors, tokenizer_bytes
):
    """Loaded all the same, it would write other words than the model meant."""
    smaller = ModelConfig(vocab_size=4000, hidden_size=64, n_layers=1, n_heads=2, mlp_size=128, context=64)
    tensors = {name: p.detach().numpy() for name, p in random_gpt(smaller).named_parameters()}
    save_model(tmp_path / "m", smaller, tensors, tokenizer_bytes)
    refused(tmp_path / "m", tmp_path / "m" / "tokenizer.model", "vocab_size is 4096", "4000")

    values = {**json.loads(tiny_config.to_json()), "boundary_id": 2}
    save_model(tmp_path / "b", ModelConfig.from_dict(values), tiny_tensors, tokenizer_bytes)
    refused(tmp_path / "b", tmp_path / "b" / "tokenizer.model", "boundary_id is 1", "2")


def test_a_tokenizer_that_is_none_is_named(model_dir):
    (model_dir / "tokenizer.model").write_bytes(b"not a tokenizer")
    reseal(model_dir)
    refused(model_dir, model_dir / "tokenizer.model")


# --- saving: all or nothing


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "nan", "inf"])
def test_weights_that_could_not_be_used_are_not_saved(tmp_path, tiny_config, tiny_tensors, tokenizer_bytes, fault):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {key: value.copy() for key, value in tiny_tensors.items()}
    if fault == "missing":
        del tensors[name]
    elif fault == "unknown":
        name = "lm_head.weight"
        tensors[name] = tensors["model.embed_tokens.weight"]
    elif fault == "shape":
        tensors[name] = tensors[name].T
    else:
        tensors[name][3, 4] = float(fault)
    with pytest.raises(ModelError, match=name):
        save_model(tmp_path / "m", tiny_config, tensors, tokenizer_bytes)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_model_and_nothing_else(model_dir, tiny_config, tiny_tensors, tokenizer_bytes):
    before = contents(model_dir)
    extra = {"first.md": b"written", "no-such-folder/second.md": b"impossible"}
    with pytest.raises(OSError, match="no-such-folder"):  # fails while files are being written
        save_model(model_dir, tiny_config, tiny_tensors, tokenizer_bytes, extra_files=extra)
    with pytest.raises(ModelError):
        save_model(model_dir, tiny_config, {}, tokenizer_bytes)
    assert contents(model_dir) == before
    assert list(model_dir.parent.iterdir()) == [model_dir]
    load(model_dir)


def test_a_new_model_replaces_the_old_one_whole(model_dir, tiny_config, tiny_tensors, tokenizer_bytes):
    doubled = {name: tensor * 2 for name, tensor in tiny_tensors.items()}
    save_model(model_dir, tiny_config, tiny_tensors, tokenizer_bytes, extra_files={"README.md": b"of the old one"})
    save_model(model_dir, tiny_config, doubled, tokenizer_bytes)
    _, tensors = load_model(model_dir)
    np.testing.assert_array_equal(tensors["model.norm.weight"], tiny_tensors["model.norm.weight"] * 2)
    assert sorted(path.name for path in model_dir.iterdir()) == sorted([*FILES, "manifest.json"])
    assert list(model_dir.parent.iterdir()) == [model_dir]


@pytest.mark.parametrize("name", ["notes.md", "README.md", "evaluation.json", "config.json"])
def test_a_model_with_a_file_of_the_user_is_not_replaced(model_dir, tiny_config, tiny_tensors, tokenizer_bytes, name):
    if name == "evaluation.json":  # a new manifest lists all files, so that this is no older model
        save_model(model_dir, tiny_config, tiny_tensors, tokenizer_bytes, extra_files={"README.md": b""})
    before = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    (model_dir / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"it holds {name}"):
        save_model(model_dir, tiny_config, tiny_tensors, tokenizer_bytes)
    assert {path.name: path.read_bytes() for path in model_dir.iterdir()} == before | {name: b"mine"}
    assert list(model_dir.parent.iterdir()) == [model_dir]


def test_a_model_of_an_older_release_is_replaced(tmp_path, stories_dir, tiny_config, tiny_tensors, tokenizer_bytes):
    """Its manifest lists three files; the pages of `train.export` lie beside them."""
    older = shutil.copytree(stories_dir, tmp_path / "model")
    assert set(json.loads((older / "manifest.json").read_text())) == set(FILES)
    save_model(older, tiny_config, tiny_tensors, tokenizer_bytes)
    assert sorted(path.name for path in older.iterdir()) == sorted([*FILES, "manifest.json"])


def test_others_may_read_a_saved_model(model_dir, tiny_config, tiny_tensors, tokenizer_bytes):
    """The temporary directory it is made in is private; the model in its place is not."""
    save_model(model_dir, tiny_config, tiny_tensors, tokenizer_bytes)
    assert model_dir.stat().st_mode & 0o777 == 0o755


def test_a_model_already_loaded_outlives_its_replacement(model_dir, tiny_config, tiny_tensors, tokenizer_bytes):
    """Weights are mapped from the file: a service must not read the new ones halfway through an answer."""
    _, tensors = load_model(model_dir)
    before = tensors["model.norm.weight"].copy()
    doubled = {name: tensor * 2 for name, tensor in tiny_tensors.items()}
    save_model(model_dir, tiny_config, doubled, tokenizer_bytes)
    np.testing.assert_array_equal(tensors["model.norm.weight"], before)
