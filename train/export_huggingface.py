"""A model directory as Hugging Face `transformers` loads it, weights and tokenizer, checked before it is kept.

    python -m train.export_huggingface --model models/stories-8m --out DIR

The model is an Arcee model (`ArceeForCausalLM`) with GELU in its tanh form, in float32. The tokenizer gives our ids for
any text that UTF-8 can hold, `<|endoftext|>` and `<unk>` in it being text like any other; `tokenizer(text)` puts the
boundary before it, as training did, `add_special_tokens=False` leaves it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, decoders, models, processors

from tinylm.config import ModelConfig
from tinylm.terminal.output import say
from tinylm.tokenizer import BOUNDARY_PIECE, Tokenizer
from tinylm.weights import TOKENIZER, load_model
from train.release.format_checks import (
    ExportError,
    engine_logits,
    exported_directory,
    float32_tensors,
    require_equal,
    run_export,
    sample_ids,
)

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces,\n\n\na tab\t and a line's end \r\n ",
    "caf\u00e9, cafe\u0301, \u65e5\u672c\u8a9e, \U0001f600\U0001f469\u200d\U0001f467, \ufeff, \x00",
    f"{BOUNDARY_PIECE}<unk><0x41> {SPACE}{SPACE}a",
    "aaaaaaaa........------ 1234567890 ?!?!",
    "",
]


def convert_model(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> transformers.ArceeForCausalLM:
    """The same model in PyTorch by `transformers`. tensors: float32, by the names that it uses too."""
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
        bos_token_id=config.boundary_id,
        eos_token_id=config.boundary_id,
        pad_token_id=config.boundary_id,
        architectures=["ArceeForCausalLM"],
    )
    model = transformers.ArceeForCausalLM(theirs).eval()
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        top_k=0,
        max_length=config.context,
        bos_token_id=config.boundary_id,
        eos_token_id=config.boundary_id,
        pad_token_id=config.boundary_id,
    )
    return model


def convert_tokenizer(path: Path, context: int) -> transformers.PreTrainedTokenizerFast:
    """A SentencePiece BPE model as a tokenizer of the `tokenizers` library.

    Spaces are written as spaces in its pieces, so that nothing has to be normalized: U+2581 itself stays apart from
    them, and goes as its bytes, like every character that is no piece.
    """
    proto = ModelProto.FromString(path.read_bytes())
    kinds = ModelProto.SentencePiece
    pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    score = {pieces[i]: piece.score for i, piece in enumerate(proto.pieces) if piece.type == kinds.NORMAL}
    # SentencePiece joins the two neighbours whose joined piece has the best score: any two that make a piece.
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(score, key=score.__getitem__, reverse=True)
        for i in range(1, len(piece))
        if piece[:i] in score and piece[i:] in score
    ]
    unknown = pieces[proto.trainer_spec.unk_id]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True))
    tokenizer.add_tokens(
        [
            AddedToken(pieces[i], normalized=False)
            for i, piece in enumerate(proto.pieces)
            if piece.type == kinds.USER_DEFINED
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (BOUNDARY_PIECE, unknown)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY_PIECE} $A",
        pair=f"{BOUNDARY_PIECE} $A {BOUNDARY_PIECE} $B",
        special_tokens=[(BOUNDARY_PIECE, vocabulary[BOUNDARY_PIECE])],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY_PIECE,
        eos_token=BOUNDARY_PIECE,
        pad_token=BOUNDARY_PIECE,
        unk_token=unknown,
        padding_side="left",
        model_max_length=context,
        split_special_tokens=True,  # in a text they are text
        clean_up_tokenization_spaces=False,
    )


def export_huggingface(model: Path, out: Path) -> None:
    """Write `out`; raises ExportError, and writes nothing, when logits or ids would not be those of the engine."""
    config, quantized = load_model(model)
    tensors = float32_tensors(quantized)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with exported_directory("huggingface", model, out) as scratch:
        convert_model(config, tensors).save_pretrained(scratch)
        convert_tokenizer(model / TOKENIZER, config.context).save_pretrained(scratch)
        _name_for_every_version(scratch / "tokenizer_config.json")
        ids = sample_ids(config)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(scratch, dtype="auto")
        # With more threads PyTorch's first forward pass of a process is now and then (3 in 40, on two cores) off by
        # 1e-3 from position 64 on; any later one is not.
        torch.set_num_threads(1)
        with torch.inference_mode():
            theirs = loaded(torch.from_numpy(ids)).logits.numpy()
        error = require_equal(f"transformers {transformers.__version__}", theirs, engine_logits(config, tensors, ids))
        require_same_ids(transformers.AutoTokenizer.from_pretrained(scratch), Tokenizer(model / TOKENIZER))
    say(f"{out}: logits at most {error:.1e} from the engine's, token ids the same")


def require_same_ids(theirs: transformers.PreTrainedTokenizerBase, ours: Tokenizer) -> None:
    """Raises ExportError when one of TEXTS, or a token's own text, is encoded or decoded otherwise."""
    for text in [*TEXTS, *(piece.decode(errors="ignore") for piece in ours.piece_bytes)]:
        found = theirs(text)["input_ids"], theirs(text, add_special_tokens=False)["input_ids"]
        if found != (ours.encode_document(text), ours.encode(text)) or theirs.decode(found[1]) != text:
            raise ExportError(f"transformers {transformers.__version__} gives other tokens for {text!r}")


def _name_for_every_version(path: Path) -> None:
    """The tokenizer's class by the name that `transformers` 4 knows as well as 5."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_export(__doc__, export_huggingface)
