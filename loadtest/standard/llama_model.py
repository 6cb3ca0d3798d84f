"""A GGUF file for llama.cpp's server: TinyLM's shape with random weights, and TinyLM's tokenizer.

Weights are random since llama.cpp has no GELU without a gate (loadtest.peers.llama tells the rest): what it says is
nonsense, what it costs is the same, and it never ends before `max_tokens`.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import sentencepiece as spm

from loadtest.peers.llama import write_gguf
from loadtest.peers.model import float32_tensors, save_random_model
from tinylm.config import ModelConfig
from tinylm.weights import TOKENIZER

KIND = gguf.GGMLQuantizationType.Q8_0  # 8-bit weights, as TinyLM's


def write_model(directory: Path, like: Path) -> Path:
    """Write the model into a directory; shape and tokenizer are those of the model directory `like`."""
    config = ModelConfig.load(like / "config.json")
    save_random_model(directory / "random", config)
    plain, path = directory / "plain.gguf", directory / f"{like.name}.gguf"
    write_gguf(plain, *float32_tensors(directory / "random"), KIND)
    _add_tokenizer(plain, path, spm.SentencePieceProcessor(model_proto=(like / TOKENIZER).read_bytes()))
    return path


def _add_tokenizer(source: Path, target: Path, pieces: spm.SentencePieceProcessor) -> None:
    """Copy a GGUF file that has no tokenizer, adding one."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.ARCEE])
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "tokenizer.", gguf.Keys.General.ARCHITECTURE)):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    ids = range(pieces.vocab_size())
    writer.add_tokenizer_model("llama")  # SentencePiece
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types([_token_type(pieces, i) for i in ids])
    writer.add_bos_token_id(pieces.eos_id())  # the boundary both begins and ends a document
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _token_type(pieces: spm.SentencePieceProcessor, i: int) -> gguf.TokenType:
    if pieces.is_unknown(i):
        return gguf.TokenType.UNKNOWN
    if pieces.is_control(i):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if pieces.is_byte(i) else gguf.TokenType.NORMAL
