"""ONNX Runtime GenAI: its generator and sampler on the graph of `onnx_runtime`, with a cache of fixed size."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as genai
from onnxruntime.quantization import QuantType

from loadtest.bench.peers.model import float32_tensors
from loadtest.bench.peers.onnx_runtime import OnnxRuntimeInt8, build_graph, measured_kv_scales, quantized
from loadtest.bench.peers.runner import TEMPERATURE, TOP_P, Case, Settings
from tinylm.config import ModelConfig


def _config(config: ModelConfig) -> dict[str, object]:
    """Return genai_config.json: the shape, the names of the graph's inputs and outputs, and one thread."""
    decoder = {
        "session_options": {"intra_op_num_threads": 1, "inter_op_num_threads": 1, "provider_options": []},
        "filename": "model.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "inputs": {
            "input_ids": "ids",
            "attention_mask": "mask",
            "past_key_names": "past_key_%d",
            "past_value_names": "past_value_%d",
        },
        "outputs": {"logits": "logits", "present_key_names": "key_%d", "present_value_names": "value_%d"},
    }
    boundary = config.boundary_id
    model = {
        "type": "llama",
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "bos_token_id": boundary,
        "eos_token_id": boundary,
        "pad_token_id": boundary,
        "decoder": decoder,
    }
    return {"model": model, "search": {"past_present_share_buffer": True, "max_length": config.context}}


@cache
def _model(directory: Path, weights: str, per_channel: bool, kv: str) -> genai.Model:
    path = directory.with_name(f"{directory.name}.genai-{weights}-{per_channel}-{kv}")
    if not path.exists():
        config, tensors = float32_tensors(directory)
        path.mkdir()
        scales = None if kv == "float32" else measured_kv_scales(directory)
        graph = build_graph(config, tensors, scales, has_mask=True)
        onnx.save(quantized(graph, QuantType[weights], per_channel), path / "model.onnx")
        (path / "genai_config.json").write_text(json.dumps(_config(config)))
    return genai.Model(str(path))


class OnnxGenAI:
    version = genai.__version__

    def __init__(self, directory: Path, batch: int, weights: str, per_channel: bool, kv: str) -> None:
        """weights: their quantized type. per_channel: one scale per row. kv: float32 or int8."""
        self._model, self._batch = _model(directory, weights, per_channel, kv), batch
        self._context = float32_tensors(directory)[0].context
        self._generator = self._new()

    def _new(self) -> genai.Generator:
        params = genai.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=self._batch,
            max_length=self._context,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,  # all
        )
        return genai.Generator(self._model, params)

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return OnnxRuntimeInt8.settings_to_try(case)

    def start(self, prompts: np.ndarray) -> None:
        self._generator = self._new()
        self._generator.append_tokens(prompts.astype(np.int32))
        self._generator.generate_next_token()

    def decode(self, steps: int) -> int:
        for _ in range(steps):
            self._generator.generate_next_token()
        return steps * self._batch

    def logits(self, prompts: np.ndarray, following: np.ndarray) -> np.ndarray:
        generator = self._new()
        generator.append_tokens(prompts.astype(np.int32))
        for column in following.T:  # a sequence of a batch takes only tokens that it samples: leave it no choice
            logits = np.full_like(generator.get_logits(), -1e4)
            logits[np.arange(self._batch), 0, column] = 0
            generator.set_logits(logits)
            generator.generate_next_token()
        return np.array(generator.get_logits())[:, 0]

    def close(self) -> None:
        pass
