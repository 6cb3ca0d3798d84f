"""Model directories: loading returns what was saved, and names the file that is damaged or does not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinylm import ModelError
from tinylm.llm import load
from tinylm.weights import QuantizedMatrix, load_model, quantize_rows, save_model

FILES = ["config.json", "model.safetensors", "tokenizer.model"]
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "tiny")


@pytest.fixture
def save(tiny_model_dir, tiny_config, tiny_tensors):
    """Save the tiny model, or a changed one, in a directory."""
    tokenizer = (tiny_model_dir / "tokenizer.model").read_bytes()

    def save(directory, config=tiny_config, tensors=tiny_tensors, **options):
        save_model(directory, config, tensors, tokenizer, **options)

    return save


def reseal(directory):
    """Write a manifest for the files as they are now."""
    sums = {}
    for name in FILES:
        data = (directory / name).read_bytes()
        sums[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(sums))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_saved_matrices_are_quantized_row_by_row(tiny_model_dir, tiny_config, tiny_tensors):
    config, tensors = load_model(tiny_model_dir)
    assert config == tiny_config
    assert tensors.keys() == tiny_tensors.keys()
    for name, tensor in tensors.items():
        if tiny_tensors[name].ndim == 1:
            np.testing.assert_array_equal(tensor, tiny_tensors[name], err_msg=name)
        else:
            assert isinstance(tensor, QuantizedMatrix)
            assert (np.abs(tensor.values.astype(int)).max(axis=1) == 127).all(), name
            assert (np.abs(tensor.dequantize() - tiny_tensors[name]) <= tensor.scale[:, None] * 0.5001).all(), name


TINY = st.sampled_from(np.array([1e-45, 2e-43, 1e-41, 1.2e-38, 1e-37], np.float32).tolist())


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32) | TINY,
    )
)
def test_quantizing_changes_values_by_half_a_step_at_most(matrix):
    """This holds for zeros, for one huge value, and for values so small that their scale is not a normal float."""
    quantized = quantize_rows(matrix)
    assert quantized.values.dtype == np.int8
    assert quantized.scale.dtype == np.float32
    assert (quantized.scale > 0).all()
    exact = quantized.values.astype(np.float64) * quantized.scale[:, None]
    assert (np.abs(exact - matrix) <= quantized.scale[:, None] * 0.5001).all()
    np.testing.assert_allclose(quantized.dequantize(), exact, rtol=1e-6)


def test_extra_files_are_saved_but_replace_no_model_file(tmp_path, save, tiny_config):
    save(tmp_path / "m", extra_files={"README.md": b"# card", "config.json": b"not the model's"})
    assert (tmp_path / "m" / "README.md").read_bytes() == b"# card"
    assert load_model(tmp_path / "m")[0] == tiny_config


def assert_refused(directory, *needles):
    with pytest.raises(ModelError) as caught:
        load(directory)
    for needle in needles:
        assert str(needle) in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_size_is_named(model_dir, name):
    data = (model_dir / name).read_bytes()
    for damaged in (b"", data[:-1], data + b"\n"):
        (model_dir / name).write_bytes(damaged)
        assert_refused(model_dir, model_dir / name, f"has {len(damaged)} bytes", f"says {len(data)}")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.7, 1.0])
def test_one_flipped_bit_is_named_with_both_sums(model_dir, name, where):
    data = bytearray((model_dir / name).read_bytes())
    right = hashlib.sha256(data).hexdigest()
    data[int(where * (len(data) - 1))] ^= 1 << 5
    (model_dir / name).write_bytes(data)
    assert_refused(model_dir, model_dir / name, right, hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(model_dir, name):
    (model_dir / name).unlink()
    assert_refused(model_dir, model_dir / name, "missing")


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "null", "{}", '{"config.json": 5}', '{"config.json": {"bytes": 1}}', "\xff"],
)
def test_a_broken_manifest_is_named(model_dir, manifest):
    (model_dir / "manifest.json").write_text(manifest, encoding="latin-1")
    assert_refused(model_dir, model_dir / "manifest.json", "damaged")


def test_a_model_is_found_through_links(tiny_model_dir, tmp_path):
    """A download cache links each file to a name of its own, and a release links to a version."""
    (tmp_path / "snapshot").mkdir()
    for path in tiny_model_dir.iterdir():
        shutil.copy(path, tmp_path / hashlib.sha256(path.name.encode()).hexdigest())
        (tmp_path / "snapshot" / path.name).symlink_to(f"../{hashlib.sha256(path.name.encode()).hexdigest()}")
    (tmp_path / "current").symlink_to("snapshot")
    config, tensors = load_model(tmp_path / "current")
    expected_config, expected = load_model(tiny_model_dir)
    assert config == expected_config
    assert tensors.keys() == expected.keys()
    assert load(tmp_path / "current")[0].vocab_size == config.vocab_size


def test_a_path_without_a_model_is_named(model_dir, tmp_path):
    assert_refused(model_dir / "nowhere", model_dir / "nowhere")
    assert_refused(model_dir / "config.json", model_dir / "config.json")
    assert_refused(tmp_path, tmp_path / "manifest.json", "not a complete model directory")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_format_is_named(model_dir, name):
    (model_dir / name).write_bytes(b"not such a file")
    reseal(model_dir)
    assert_refused(model_dir, model_dir / name)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"n_layers": 4}, "model.layers.3."),
        ({"n_layers": 2}, "model.layers.2."),
        ({"mlp_size": 256}, "mlp.up_proj.weight"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(model_dir, change, needle):
    values = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**values, **change}))
    reseal(model_dir)
    assert_refused(model_dir, model_dir, needle)


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        (NORM, lambda tensor: None, "is missing"),
        (NORM, lambda tensor: tensor[:-1], "shape (63,)"),
        ("model.norm.bias", lambda tensor: np.zeros(64, np.float32), "has no tensor"),
        (NORM, lambda tensor: np.full_like(tensor, np.inf), "not finite"),
        (f"{EMBEDDING}.scale", lambda tensor: None, "one scale per row"),
        (f"{EMBEDDING}.scale", lambda tensor: tensor[:-1], "one scale per row"),
        (f"{EMBEDDING}.scale", lambda tensor: np.full_like(tensor, np.nan), "not finite"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(model_dir, name, change, fault):
    tensors = safetensors.numpy.load((model_dir / "model.safetensors").read_bytes())
    changed = change(tensors.pop(name, None))
    if changed is not None:
        tensors[name] = changed
    (model_dir / "model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    reseal(model_dir)
    assert_refused(model_dir, model_dir / "model.safetensors", name.removesuffix(".scale"), fault)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, save, tiny_config, tiny_tensors):
    smaller = {**tiny_tensors, EMBEDDING: tiny_tensors[EMBEDDING][:4000]}
    save(tmp_path / "m", dataclasses.replace(tiny_config, vocab_size=4000), smaller)
    assert_refused(tmp_path / "m", tmp_path / "m" / "tokenizer.model", "vocab_size is 4096", "4000")
    save(tmp_path / "b", dataclasses.replace(tiny_config, boundary_id=2))
    assert_refused(tmp_path / "b", tmp_path / "b" / "tokenizer.model", "boundary_id is 1", "2")


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "nan", "inf"])
def test_weights_that_cannot_be_used_are_not_saved(tmp_path, save, tiny_tensors, fault):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {key: value.copy() for key, value in tiny_tensors.items()}
    if fault == "missing":
        del tensors[name]
    elif fault == "unknown":
        name = "lm_head.weight"
        tensors[name] = tensors[EMBEDDING]
    elif fault == "shape":
        tensors[name] = tensors[name].T
    else:
        tensors[name][3, 4] = float(fault)
    with pytest.raises(ModelError, match=name):
        save(tmp_path / "m", tensors=tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_model(model_dir, save):
    before = contents(model_dir)
    with pytest.raises(OSError, match="no-such-folder"):  # fails after it has written a file
        save(model_dir, extra_files={"first.md": b"written", "no-such-folder/second.md": b"impossible"})
    with pytest.raises(ModelError):
        save(model_dir, tensors={})
    assert contents(model_dir) == before
    assert list(model_dir.parent.iterdir()) == [model_dir]


def test_a_new_model_replaces_the_whole_directory(model_dir, save, tiny_tensors):
    """A process that has loaded the old model keeps its weights, which are mapped from the old file."""
    save(model_dir, extra_files={"README.md": b"about the old model"})
    _, old = load_model(model_dir)
    save(model_dir, tensors={name: tensor * 2 for name, tensor in tiny_tensors.items()})
    _, new = load_model(model_dir)
    np.testing.assert_array_equal(old[NORM], tiny_tensors[NORM])
    np.testing.assert_array_equal(new[NORM], tiny_tensors[NORM] * 2)
    assert sorted(contents(model_dir)) == sorted([*FILES, "manifest.json"])
    assert list(model_dir.parent.iterdir()) == [model_dir]
    assert model_dir.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["notes.md", "README.md", "evaluation.json", "config.json"])
def test_a_model_with_a_file_of_the_user_is_not_replaced(model_dir, save, name):
    if name == "evaluation.json":  # a manifest with more than three files is not from an older release
        save(model_dir, extra_files={"README.md": b""})
    (model_dir / name).write_text("mine")
    before = contents(model_dir)
    with pytest.raises(FileExistsError, match=f"it holds {name}"):
        save(model_dir)
    assert contents(model_dir) == before
    assert list(model_dir.parent.iterdir()) == [model_dir]


def test_a_model_of_an_older_release_is_replaced(tmp_path, stories_dir, save):
    """Its manifest lists three files, and not the pages of `train.export`."""
    older = shutil.copytree(stories_dir, tmp_path / "model")
    manifest = json.loads((older / "manifest.json").read_text())
    (older / "manifest.json").write_text(json.dumps({name: manifest[name] for name in FILES}))
    save(older)
    assert sorted(contents(older)) == sorted([*FILES, "manifest.json"])


def test_float_matrices_are_loaded_unchanged(model_dir, tiny_tensors):
    """`save_model` writes int8 matrices only, but models of other tools and older releases have floats."""
    safetensors.numpy.save_file(dict(tiny_tensors), model_dir / "model.safetensors")
    reseal(model_dir)
    tensors = load_model(model_dir)[1]
    assert tensors.keys() == tiny_tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, tiny_tensors[name], err_msg=name)
