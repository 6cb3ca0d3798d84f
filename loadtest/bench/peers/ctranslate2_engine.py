"""CTranslate2: its own decoder with weights and matmuls in int8, and its own sampler.

CTranslate2 generates whole answers and has no call for one step. So in decoding all sequences continue one prompt. It
keeps the keys and values of that prompt, and copies them to each sequence. The copy is part of its time, once in 64
steps.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import ctranslate2
import numpy as np
from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

from loadtest.bench.peers.model import Tensors, float32_tensors, fused_qkv
from loadtest.bench.peers.runner import TEMPERATURE, TOP_P, Case, Settings
from tinylm.config import ModelConfig


def build_spec(config: ModelConfig, tensors: Tensors) -> TransformerDecoderModelSpec:
    """Return the model as CTranslate2 describes it. Its tokens are the ids as text."""
    spec = TransformerDecoderModelSpec.from_config(
        config.n_layers,
        config.n_heads,
        activation=common_spec.Activation.GELUTanh,
        rms_norm=True,
        rotary_dim=0,  # all of a head's dimensions
        rotary_interleave=False,
        rotary_base=config.rope_theta,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = tensors["model.embed_tokens.weight"]
    decoder.layer_norm.gamma = tensors["model.norm.weight"]
    for i, layer in enumerate(decoder.layer):
        name = f"model.layers.{i}."
        layer.self_attention.layer_norm.gamma = tensors[name + "input_layernorm.weight"]
        layer.self_attention.linear[0].weight = fused_qkv(tensors, i)
        layer.self_attention.linear[1].weight = tensors[name + "self_attn.o_proj.weight"]
        layer.ffn.layer_norm.gamma = tensors[name + "post_attention_layernorm.weight"]
        layer.ffn.linear_0.weight = tensors[name + "mlp.up_proj.weight"]
        layer.ffn.linear_1.weight = tensors[name + "mlp.down_proj.weight"]
    boundary = str(config.boundary_id)
    spec.register_vocabulary([str(i) for i in range(config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = boundary
    spec.config.layer_norm_epsilon = config.norm_eps
    return spec


@cache
def _generator(directory: Path) -> ctranslate2.Generator:
    path = directory.with_name(f"{directory.name}.ctranslate2")
    if not path.exists():
        spec = build_spec(*float32_tensors(directory))
        spec.validate()
        path.mkdir()
        spec.save(str(path))
    return ctranslate2.Generator(str(path), compute_type="int8", inter_threads=1, intra_threads=1)


class CTranslate2:
    version = ctranslate2.__version__

    def __init__(self, directory: Path, batch: int, one_prompt: bool) -> None:
        """one_prompt: keep the first prompt, and let all sequences continue it."""
        self._generator = _generator(directory)
        self._batch, self._one_prompt = batch, one_prompt
        self._kept: list[str] = []
        self._last: list[list[str]] = []

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [{"one_prompt": case.kind == "decode"}]

    def start(self, prompts: np.ndarray) -> None:
        texts = [[str(token) for token in prompt] for prompt in prompts.tolist()]
        if self._one_prompt:
            self._kept, texts = texts[0][:-1], [text[-1:] for text in texts]
        self._last = self._generate(texts, 1)

    def decode(self, steps: int) -> int:
        return sum(len(tokens) for tokens in self._generate(self._last, steps))

    def logits(self, prompts: np.ndarray, following: np.ndarray) -> np.ndarray:
        ids = np.concatenate([prompts, following], axis=1)
        return np.asarray(self._generator.forward_batch(ids.tolist()))[:, -1]

    def close(self) -> None:
        pass

    def _generate(self, prompts: list[list[str]], n: int) -> list[list[str]]:
        """Return n more tokens of each sequence."""
        results = self._generator.generate_batch(
            prompts,
            max_length=n,
            min_length=n,
            sampling_topk=0,  # all
            sampling_topp=TOP_P,
            sampling_temperature=TEMPERATURE,
            include_prompt_in_result=False,
            static_prompt=self._kept or None,
            cache_static_prompt=True,
        )
        return [result.sequences[0] for result in results]
