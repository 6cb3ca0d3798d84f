"""GGUF files of TinyLM's shape for llama.cpp, with or without TinyLM's tokenizer.

llama.cpp has no architecture with an ungated GELU. The nearest is Arcee's, which is the same but for relu(x)^2.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import sentencepiece as spm

from loadtest.bench.peers.model import Tensors, float32_tensors, fused_qkv, save_random_model
from tinylm.config import ModelConfig
from tinylm.weights import TOKENIZER

KIND = gguf.GGMLQuantizationType.Q8_0  # 8-bit weights, as TinyLM's


def write_random_model(directory: Path, like: Path) -> Path:
    """Write a model with random weights for llama.cpp's server, and return its path.

    like: a model directory with the wanted shape and tokenizer. The random model never ends an answer early.
    """
    save_random_model(directory / "random", ModelConfig.load(like / "config.json"))
    pieces = spm.SentencePieceProcessor(model_proto=(like / TOKENIZER).read_bytes())
    path = directory / f"{like.name}.gguf"
    write_gguf(path, *float32_tensors(directory / "random"), KIND, pieces)
    return path


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Tensors,
    kind: gguf.GGMLQuantizationType,
    pieces: spm.SentencePieceProcessor | None = None,
) -> None:
    """Write float32 tensors as a GGUF file whose matrices are of that kind. pieces: None for no tokenizer."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.ARCEE])
    _add_shape(writer, config)
    if pieces is None:
        writer.add_tokenizer_model("none")
    else:
        _add_tokenizer(writer, pieces)
    for name, tensor in _renamed(config, tensors).items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def _renamed(config: ModelConfig, tensors: Tensors) -> Tensors:
    """Return the tensors by the names that llama.cpp gives them."""
    renamed = {"token_embd.weight": tensors["model.embed_tokens.weight"]}
    renamed["output_norm.weight"] = tensors["model.norm.weight"]
    for i in range(config.n_layers):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        renamed[block + "attn_norm.weight"] = tensors[layer + "input_layernorm.weight"]
        renamed[block + "attn_qkv.weight"] = _interleaved(fused_qkv(tensors, i), config)
        renamed[block + "attn_output.weight"] = tensors[layer + "self_attn.o_proj.weight"]
        renamed[block + "ffn_norm.weight"] = tensors[layer + "post_attention_layernorm.weight"]
        renamed[block + "ffn_up.weight"] = tensors[layer + "mlp.up_proj.weight"]
        renamed[block + "ffn_down.weight"] = tensors[layer + "mlp.down_proj.weight"]
    return renamed


def _interleaved(qkv: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Return the rows of queries and keys as llama.cpp rotates them: a pair side by side, not half a head apart."""
    heads = qkv.reshape(3, config.n_heads, 2, config.head_dim // 2, config.hidden_size)
    pairs = heads[:2].swapaxes(2, 3)
    return np.concatenate([pairs.reshape(-1, config.hidden_size), heads[2].reshape(-1, config.hidden_size)])


def _add_tokenizer(writer: gguf.GGUFWriter, pieces: spm.SentencePieceProcessor) -> None:
    ids = range(pieces.vocab_size())
    writer.add_tokenizer_model("llama")  # SentencePiece
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types([_token_type(pieces, i) for i in ids])
    writer.add_bos_token_id(pieces.eos_id())  # the boundary token begins and ends a document
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _token_type(pieces: spm.SentencePieceProcessor, i: int) -> gguf.TokenType:
    if pieces.is_unknown(i):
        return gguf.TokenType.UNKNOWN
    if pieces.is_control(i):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if pieces.is_byte(i) else gguf.TokenType.NORMAL
