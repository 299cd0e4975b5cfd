"""The tokenizer inside a GGUF file, rebuilt from its metadata.

    tokenizer = build_tokenizer(metadata)

A GGUF file has tokens, merges and the chat template, but of the rules that split a text before the
merges only a name (`tokenizer.ggml.pre`); what each name means is written here. transformers'
converter is not used: it gives every file the same splitting, and so SmolLM2 its numbers whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from common.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of llama.cpp's token types; 1 is a plain token

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
"""Tokens that end an answer in chat, whatever a file declares as its end of text."""


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Contractions, words, numbers (`digits` at a time), punctuation, line ends, blanks."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_SPLITTERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama-bpe": lambda: _split_words(r"\p{N}{1,3}"),
    "qwen2": lambda: _split_words(r"\p{N}"),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Raises ValueError naming a kind of tokenizer or of splitting that is not supported, or what
    the metadata lacks.
    """
    kind, splitting = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(
            f"GGUF tokenizer {kind!r} is not supported, only 'gpt2' (byte-level BPE); "
            "use the model's safetensors folder instead"
        )
    if splitting not in _SPLITTERS:
        raise ValueError(
            f"GGUF pre-tokenizer {splitting!r} is not supported; "
            f"supported: {', '.join(_SPLITTERS)}; use the model's safetensors folder instead"
        )
    for key in ("tokens", "merges", "token_type"):
        if f"tokenizer.ggml.{key}" not in metadata:
            raise ValueError(f"the GGUF file has no 'tokenizer.ggml.{key}'")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    token_types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]

    # A whole word that is in the vocabulary wins over the merges, in Llama 3's vocabulary only.
    is_llama3 = splitting == "llama-bpe"
    vocabulary = {
        token: token_id
        for token_id, (token, token_type) in enumerate(zip(tokens, token_types, strict=True))
        if token_type != _UNUSED
    }
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=is_llama3))
    if splitting == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _SPLITTERS[splitting]()
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=token_type == _CONTROL, normalized=False)
            for token, token_type in zip(tokens, token_types, strict=True)
            if token_type in (_CONTROL, _USER_DEFINED)
        ]
    )
    bos_id, eos_id = (metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos"))
    bos_token = None if bos_id is None else tokens[bos_id]
    if bos_token is not None and metadata.get("tokenizer.ggml.add_bos_token", is_llama3):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, bos_id)]
        )
    return Tokenizer(
        backend,
        bos_token=bos_token,
        eos_token=None if eos_id is None else tokens[eos_id],
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Every token that ends an answer, the file's own end of text first."""
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids += [tokens.index(token) for token in _TURN_ENDS if token in tokens]
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))
