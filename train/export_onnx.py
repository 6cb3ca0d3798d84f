"""Convert a model directory to ONNX (opset 23, standard operators only), and compare it with TinyLM's engine.

    python -m train.export_onnx --model models/stories-8m --out DIR

Writes model.onnx, in float32, and tokenizer.model. The model takes the KV cache as input and output:

    input_ids (batch, length)                                -> logits (batch, length, vocab)
    past_key_values.N.key, .value (batch, heads, past, size) -> present.N.key, .value (batch, heads, total, size)

N is the layer. `past` is 0 at first. `total` is past + length, at most the model's context. All sequences of a batch
have the same length: there is no padding.
"""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from tinylm.config import ModelConfig
from tinylm.terminal.output import say
from tinylm.weights import TOKENIZER, as_float32, load_model
from train.release.format_checks import engine_logits, exported_directory, require_equal, run_export, sample_ids
from train.release.onnx_graph import build_graph

FILE = "model.onnx"


def export_onnx(model: Path, out: Path) -> None:
    """Write `out`/model.onnx; raise ExportError, and write nothing, when its logits differ from the engine's."""
    config, quantized = load_model(model)
    tensors = {name: as_float32(tensor) for name, tensor in quantized.items()}
    with exported_directory("onnx", model, out) as new:
        onnx.save(build_graph(config, tensors), new / FILE)
        shutil.copyfile(model / TOKENIZER, new / TOKENIZER)
        ids = sample_ids(config)
        ours = engine_logits(config, tensors, ids)
        whole = Session(new / FILE, config).forward(ids)
        cached, cut = Session(new / FILE, config), [0, config.context // 2, config.context - 1, config.context]
        parts = [cached.forward(ids[:1, begin:end]) for begin, end in pairwise(cut)]
        program = f"ONNX Runtime {onnxruntime.__version__}"
        error = max(
            require_equal(program, whole, ours),
            require_equal(f"{program}, with its cache,", np.concatenate(parts, 1), ours[:1]),
        )
    say(f"{out / FILE}: logits at most {error:.1e} from the engine's")


class Session:
    """The exported model in ONNX Runtime, on one thread, with its cache."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()][1:]
        self._empty = (config.n_heads, 0, config.head_dim)
        self._cache: list[np.ndarray] = []

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Return logits (B, T, vocab) of ids (B, T), which follow the ids of earlier calls."""
        cache = self._cache or [np.zeros((len(ids), *self._empty), np.float32) for _ in self._names]
        logits, *self._cache = self._session.run(None, {"input_ids": ids, **dict(zip(self._names, cache, strict=True))})
        return logits


if __name__ == "__main__":
    run_export(__doc__, export_onnx)
