"""A model's shape: which values are accepted, and what the error for other values says."""

from __future__ import annotations

import dataclasses
import json
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import ModelConfig
from tinylm.weights import tensor_shapes

SIZES = ["vocab_size", "hidden_size", "n_layers", "n_heads", "mlp_size", "context"]
BAD_VALUES = {
    **dict.fromkeys(SIZES, (0, -1, 1.5, 2.0, True, "192", None, nan)),
    **dict.fromkeys(["norm_eps", "rope_theta"], (0.0, -1e-5, nan, inf, "1e-5", None, True, [1])),
    "boundary_id": (-1, 4096, 1.0, True, "1", None),
}


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


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in BAD_VALUES for value in BAD_VALUES[field]])
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} is ") as caught:
        ModelConfig(**{field: value})
    assert f"{field} is {value!r}: it must " in str(caught.value)


@pytest.mark.parametrize("heads", [5, 7, 64, 192])  # 192 / 64 = 3 and 192 / 192 = 1 are odd: no halves to rotate
def test_heads_of_uneven_size_are_refused(heads):
    with pytest.raises(ValueError, match=rf"hidden_size is 192.*\({heads}\)"):
        ModelConfig(n_heads=heads)


@pytest.mark.parametrize("values", [None, 5, []])
def test_a_config_that_is_not_an_object_is_refused(values):
    with pytest.raises(ValueError, match="must be an object"):
        ModelConfig.from_dict(values)


def test_an_unknown_or_missing_key_is_named():
    values = dataclasses.asdict(ModelConfig())
    with pytest.raises(ValueError, match="unknown key 'gating'"):
        ModelConfig.from_dict({**values, "gating": True})
    for name in values:
        with pytest.raises(ValueError, match=f"lacks the key '{name}'"):
            ModelConfig.from_dict({key: value for key, value in values.items() if key != name})


def test_the_parameter_count_is_that_of_the_tensors(tiny_config):
    assert ModelConfig().n_parameters == 7_870_656
    for config in (ModelConfig(), tiny_config):
        sizes = [rows[0] * (rows[1] if len(rows) > 1 else 1) for rows in tensor_shapes(config).values()]
        assert config.n_parameters == sum(sizes)
