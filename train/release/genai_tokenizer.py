"""The files with which onnxruntime-genai loads the tokenizer of a Hugging Face export.

genai_config.json has the special tokens. tokenizer_module.json, which transformers ignores, names another form of
tokenizer.json, because onnxruntime-genai knows neither spaces inside pieces nor bytes without these fields:

- its pieces have U+2581 for a space, and a step of its decoder replaces U+2581: both together mean SentencePiece;
- its pre-tokenizer splits at a fixed string, here at a space, which no text has after the normalizer. Without it,
  onnxruntime-genai splits texts as GPT-2 does, also before "'T" of "'Then".

The ids are the engine's, with four exceptions: U+2581 is a space, the names of special tokens are these tokens, a text
ends at NUL, and words of more than 100 characters are cut.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinylm.config import ModelConfig

CONFIG, MODULE, TOKENIZER = "genai_config.json", "tokenizer_module.json", "tokenizer_genai.json"
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


def write_genai_files(directory: Path, config: ModelConfig) -> None:
    """Write the three files beside the tokenizer.json of an export."""
    exported = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    special_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), config.boundary_id)
    shape = {"type": "arcee", "context_length": config.context, "vocab_size": config.vocab_size}
    files: dict[str, Any] = {
        CONFIG: {"model": {**shape, **special_ids}},
        MODULE: {"tiktoken_file": TOKENIZER},  # it reads any .json file of this field in the place of tokenizer.json
        TOKENIZER: genai_form(exported),
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def genai_form(exported: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an exported tokenizer.json in the form that onnxruntime-genai needs."""
    model = exported["model"]
    vocabulary = {piece.replace(" ", SPACE): token for piece, token in model["vocab"].items()}
    merges = [[piece.replace(" ", SPACE) for piece in pair] for pair in model["merges"]]
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        **exported,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {**model, "vocab": vocabulary, "merges": merges},
    }
