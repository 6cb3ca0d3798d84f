"""A model's shape: what is accepted, what is refused and how the refusal reads."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import ModelConfig
from tinylm.weights import tensor_shapes

SIZES = ["vocab_size", "hidden_size", "n_layers", "n_heads", "mlp_size", "context"]


@given(
    st.builds(
        lambda heads, half, **other: ModelConfig(n_heads=heads, hidden_size=2 * heads * half, **other),
        heads=st.integers(1, 16),
        half=st.integers(1, 64),
        vocab_size=st.integers(2, 100_000),
        n_layers=st.integers(1, 64),
        mlp_size=st.integers(1, 4096),
        context=st.integers(1, 8192),
        norm_eps=st.floats(1e-8, 1e-2),
        rope_theta=st.floats(1, 1e6),
        boundary_id=st.integers(0, 1),
    )
)
def test_a_config_survives_its_file(config):
    assert ModelConfig.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "192", None, float("nan")])
def test_a_size_that_is_no_whole_number_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        ModelConfig(**{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("field", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0.0, -1e-5, float("nan")])
def test_a_factor_that_is_not_positive_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        ModelConfig(**{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("heads", [5, 7, 64, 192])  # 192 / 64 = 3 and 192 / 192 = 1 are odd: no halves to rotate
def test_heads_that_do_not_divide_the_hidden_size_evenly_are_refused(heads):
    with pytest.raises(ValueError, match=rf"hidden_size is 192.*\({heads}\)"):
        ModelConfig(n_heads=heads)


@pytest.mark.parametrize("boundary", [-1, 4096])
def test_a_boundary_outside_the_vocabulary_is_refused(boundary):
    with pytest.raises(ValueError, match=rf"boundary_id is {boundary}: it must lie in 0\.\.4095"):
        ModelConfig(boundary_id=boundary)


@pytest.mark.parametrize("field", ["norm_eps", "rope_theta", "boundary_id", "context"])
@pytest.mark.parametrize("value", ["1e-5", None, True, float("inf"), [1]])
def test_a_value_of_another_kind_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is "):
        ModelConfig(**{field: value})


@pytest.mark.parametrize("values", [None, 5, []])
def test_a_config_that_is_no_object_is_refused(values):
    with pytest.raises(ValueError, match="must be an object"):
        ModelConfig.from_dict(values)


def test_a_key_of_another_version_is_named():
    values = dataclasses.asdict(ModelConfig())
    with pytest.raises(ValueError, match="unknown key 'gating'"):
        ModelConfig.from_dict({**values, "gating": True})
    for name in values:
        with pytest.raises(ValueError, match=f"lacks the key '{name}'"):
            ModelConfig.from_dict({key: value for key, value in values.items() if key != name})


def test_the_parameter_count_is_that_of_the_tensors(tiny_config):
    for config in (ModelConfig(), tiny_config):
        sizes = [rows[0] * (rows[1] if len(rows) > 1 else 1) for rows in tensor_shapes(config).values()]
        assert config.n_parameters == sum(sizes)


def test_the_default_is_the_shape_the_project_is_about():
    config = ModelConfig()
    assert (config.hidden_size, config.n_layers, config.vocab_size, config.context) == (192, 16, 4096, 256)
    assert config.n_parameters == 7_870_656


def test_a_config_can_not_be_changed_after_its_check():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().context = 512
