"""Convert a model directory to the format of Hugging Face `transformers`, and compare it with TinyLM's engine.

    python -m train.export_huggingface --model models/stories-8m --out DIR

The model is an Arcee model (`ArceeForCausalLM`) with the tanh form of GELU, in float32. The tokenizer gives the
ids that TinyLM's tokenizer gives, for every text; `<|endoftext|>` and `<unk>` in a text are ordinary characters.
`tokenizer(text)` adds the boundary in front, as in training; with `add_special_tokens=False` it does not.
train/release/genai_tokenizer.py says how onnxruntime-genai reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, decoders, models, processors

from tinylm.config import ModelConfig
from tinylm.terminal.output import say
from tinylm.tokenizer import BOUNDARY_PIECE, Tokenizer
from tinylm.weights import TOKENIZER, as_float32, load_model
from train.release.format_checks import (
    ExportError,
    engine_logits,
    exported_directory,
    require_equal,
    run_export,
    sample_ids,
)
from train.release.genai_tokenizer import SPACE, write_genai_files

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces,\n\n\na tab\t and a line's end \r\n ",
    "caf\u00e9, cafe\u0301, \u65e5\u672c\u8a9e, \U0001f600\U0001f469\u200d\U0001f467, \ufeff, \x00",
    f"{BOUNDARY_PIECE}<unk><0x41> {SPACE}{SPACE}a",
    "aaaaaaaa........------ 1234567890 ?!?!",
    "",
]


def export_huggingface(model: Path, out: Path) -> None:
    """Write `out`; raise ExportError, and write nothing, when logits or ids differ from the engine's."""
    config, quantized = load_model(model)
    tensors = {name: as_float32(tensor) for name, tensor in quantized.items()}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with exported_directory("huggingface", model, out) as new:
        _convert_model(config, tensors).save_pretrained(new)
        convert_tokenizer(model / TOKENIZER, config.context).save_pretrained(new)
        _fit_version_4(new / "tokenizer_config.json")
        write_genai_files(new, config)
        ids = sample_ids(config)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(new, dtype="auto")
        # With two threads, the first forward pass of a process is sometimes (3 in 40) wrong by 1e-3.
        torch.set_num_threads(1)
        with torch.inference_mode():
            theirs = loaded(torch.from_numpy(ids)).logits.numpy()
        error = require_equal(f"transformers {transformers.__version__}", theirs, engine_logits(config, tensors, ids))
        require_same_ids(transformers.AutoTokenizer.from_pretrained(new), Tokenizer(model / TOKENIZER))
    say(f"{out}: logits at most {error:.1e} from the engine's, token ids the same")


def _convert_model(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> transformers.ArceeForCausalLM:
    """Return the model as a PyTorch module of `transformers`. tensors: float32 by name."""
    special_ids: dict[str, Any] = {
        "bos_token_id": config.boundary_id,
        "eos_token_id": config.boundary_id,
        "pad_token_id": config.boundary_id,
    }
    theirs = transformers.ArceeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        architectures=["ArceeForCausalLM"],
        **special_ids,
    )
    model = transformers.ArceeForCausalLM(theirs).eval()
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=config.context * 3 // 4, **special_ids
    )
    return model


def convert_tokenizer(path: Path, context: int) -> transformers.PreTrainedTokenizerFast:
    """Return a SentencePiece BPE model as a tokenizer of `transformers`."""
    tokenizer, unknown = _convert_bpe(ModelProto.FromString(path.read_bytes()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY_PIECE,
        eos_token=BOUNDARY_PIECE,
        pad_token=BOUNDARY_PIECE,
        unk_token=unknown,
        padding_side="left",
        model_max_length=context,
        split_special_tokens=True,  # the names of special tokens in a text are text
        clean_up_tokenization_spaces=False,
    )


def _convert_bpe(proto: ModelProto) -> tuple[tokenizers.Tokenizer, str]:
    """Return a SentencePiece BPE model as a tokenizer of the `tokenizers` library, and its unknown piece.

    Its pieces have spaces where SentencePiece has U+2581. So the text needs no normalization, and U+2581 in a text is
    encoded as bytes, like every character that is not a piece.
    """
    kinds = ModelProto.SentencePiece
    pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    score = {pieces[i]: piece.score for i, piece in enumerate(proto.pieces) if piece.type == kinds.NORMAL}
    # SentencePiece joins the two neighbours whose joined piece has the best score. Any two pieces can be joined.
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(score, key=score.__getitem__, reverse=True)
        for i in range(1, len(piece))
        if piece[:i] in score and piece[i:] in score
    ]
    unknown = pieces[proto.trainer_spec.unk_id]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True))
    user_defined = [pieces[i] for i, piece in enumerate(proto.pieces) if piece.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in user_defined])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (BOUNDARY_PIECE, unknown)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY_PIECE} $A",
        pair=f"{BOUNDARY_PIECE} $A {BOUNDARY_PIECE} $B",
        special_tokens=[(BOUNDARY_PIECE, vocabulary[BOUNDARY_PIECE])],
    )
    return tokenizer, unknown


def require_same_ids(theirs: transformers.PreTrainedTokenizerBase, ours: Tokenizer) -> None:
    """Raise ExportError when `theirs` encodes or decodes one of TEXTS, or a token's own text, in another way."""
    for text in [*TEXTS, *(piece.decode(errors="ignore") for piece in ours.piece_bytes)]:
        found = theirs(text)["input_ids"], theirs(text, add_special_tokens=False)["input_ids"]
        if found != (ours.encode_document(text), ours.encode(text)) or theirs.decode(found[1]) != text:
            raise ExportError(f"transformers {transformers.__version__} gives other tokens for {text!r}")


def _fit_version_4(path: Path) -> None:
    """Write the tokenizer's class name that `transformers` 4 knows, and what the model takes. Version 5 knows both too.

    By default, version 4 gives token_type_ids too, which the model refuses.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_export(__doc__, export_huggingface)
