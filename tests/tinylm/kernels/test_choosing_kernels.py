"""Which kernels and which precision a model uses."""

from __future__ import annotations

import re

import pytest
from helpers.kernels import SETTINGS, outcome, start_python

from tinylm import LLM
from tinylm.kernels import choose, numba, numpy
from tinylm.kernels.numba import amx, emitter
from tinylm.model import Model


@pytest.mark.parametrize(
    ("choice", "quantized", "message"),
    [
        (("cuda", "auto"), True, "kernels is 'cuda': it must be one of auto, numba, numpy"),
        (("", "int8"), False, "kernels is '': it must be one of auto, numba, numpy"),
        (("auto", "int4"), True, "precision is 'int4': it must be one of auto, int8, float32"),
        (("numpy", "Float32"), False, "precision is 'Float32': it must be one of auto, int8, float32"),
        (("numba", "auto"), False, "kernels is 'numba': it must be auto or numpy, since the model's weights are float"),
        (("numba", "float32"), False, "kernels is 'numba': it must be auto or numpy, since"),
        (("auto", "int8"), False, "precision is 'int8': it must be auto or float32, since"),
    ],
)
def test_an_impossible_choice_is_refused_by_field_and_value(choice, quantized, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        choose(*choice, quantized)


@pytest.mark.parametrize(
    ("choice", "quantized", "chosen"),
    [
        (("auto", "auto"), True, (numba, "int8")),
        (("auto", "float32"), True, (numba, "float32")),
        (("numpy", "auto"), True, (numpy, "float32")),
        (("auto", "auto"), False, (numpy, "float32")),
        (("numpy", "float32"), False, (numpy, "float32")),
        (("numpy", "int8"), True, (numpy, "int8")),
        (("numba", "int8"), True, (numba, "int8")),
    ],
)
def test_auto_chooses_the_fastest(choice, quantized, chosen):
    assert choose(*choice, quantized) == chosen


def test_a_model_names_its_kernels_instructions_and_precision(tiny_config, tiny_quantized):
    """`tinylm info` and the service show this, so that a user notices slow instructions."""
    for kernels, precision in SETTINGS:
        words = Model(tiny_config, tiny_quantized, kernels, precision).arithmetic.split(", ")
        instructions = emitter.dot_product() + ("+amx" if amx.permitted() else "")
        assert words == ([kernels, instructions, precision] if kernels == "numba" else [kernels, precision])


WITHOUT_NUMBA = """
import sys, logging
sys.modules["numba"] = None
logging.basicConfig()
from tinylm import LLM, SamplingParams
for _ in range(2):
    llm = LLM("models/stories-8m")
print(llm.model.arithmetic)
print(llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=20))[0].text)
try:
    LLM("models/stories-8m", kernels="numba")
except ValueError as error:
    print(error)
"""


def test_without_numba_the_numpy_kernels_serve(stories_dir, greedy):
    """The log warns once."""
    out, err = outcome(start_python(WITHOUT_NUMBA))
    arithmetic, text, *error = out.splitlines()
    assert arithmetic == "numpy, float32"
    expected = LLM(stories_dir, kernels="numpy").generate("Once upon a time", greedy)[0].text
    assert expected.startswith(text)
    assert re.match(r"kernels is 'numba': they can't be loaded here: .*numba", " ".join(error))
    assert err.count("using the numpy kernels") == 1, err
