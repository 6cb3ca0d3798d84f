"""Formats of stored weights: the arrays on disk represent the computed values, within the format's rounding."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from train import quantization_study as study
from train.evaluate import Score


def matrices():
    shape = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1), st.sampled_from([0, 1e-3, 1]))
    return shape.map(
        lambda s: (np.random.default_rng(s[2]).standard_normal((s[0], s[1] * study.GROUP)) * s[3]).astype(np.float32)
    )


@given(matrices())
def test_int4_is_within_half_a_step_of_its_group(matrix: np.ndarray):
    """Values near 8 times the scale are rounded to 7, with an error of at most one step."""
    groups = matrix.reshape(len(matrix), -1, study.GROUP)
    step = np.abs(groups).max(axis=2, keepdims=True) / 8
    error = np.abs(study.int4_groups(matrix).matrix.reshape(groups.shape) - groups)
    assert (error <= step * 1.01 + 1e-6).all()
    assert np.median(error) <= np.median(step) / 2 + 1e-6


@given(matrices())
def test_int4_on_disk_represents_the_computed_values(matrix: np.ndarray):
    stored = study.int4_groups(matrix)
    packed, scale = stored.arrays[""], stored.arrays[study.SCALE_SUFFIX]
    assert (packed.nbytes, scale.nbytes) == (matrix.size // 2, matrix.size // study.GROUP * 2)
    values = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(matrix), -1, study.GROUP).astype(np.float32) - 8
    np.testing.assert_array_equal((values * scale[..., None].astype(np.float32)).reshape(matrix.shape), stored.matrix)


def test_int4_needs_whole_groups():
    with pytest.raises(ValueError, match="a row has 40 weights: int4 needs a multiple of 32"):
        study.int4_groups(np.zeros((2, 40), np.float32))


def test_finer_formats_are_larger_and_more_exact(tiny_tensors):
    sizes, errors = {}, {}
    for name, formats in study.FORMATS.items():
        sizes[name], tensors = study.stored(tiny_tensors, *formats)
        assert tensors.keys() == tiny_tensors.keys()
        errors[name] = sum(float(np.square(tensors[key] - tiny_tensors[key]).sum()) for key in tensors)
    exact, int8, half, mixed, int4 = study.FORMATS
    assert sizes[exact] == len(safetensors.numpy.save(tiny_tensors))
    assert sizes[exact] > sizes[half] > sizes[int8] > sizes[mixed] > sizes[int4]
    assert 0 == errors[exact] < errors[half] < errors[int8] < errors[mixed] < errors[int4]


def test_a_difference_compares_the_same_documents():
    """Each document costs 0.1 bits per byte more, so the interval has no width, although the documents differ."""
    exact = {"books": [Score(10, 100 * n, 90.0 * n * n, f"book {n}") for n in range(1, 9)]}
    ours = {"books": [score._replace(bits=score.bits + score.bytes / 10) for score in exact["books"]]}
    figures = study.against(ours, exact)["books"]
    assert figures["more_than_float32"] == pytest.approx(0.1)
    assert figures["interval_95"] == pytest.approx([0.1, 0.1])
