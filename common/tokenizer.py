"""Text to token ids and back.

    tokenizer = Tokenizer.from_folder(folder)          # None where the folder has no tokenizer
    tokenizer.encode("Hello")                          # [19556]
    tokenizer.decode([19556])                          # "Hello"
    tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])

Encoding is the `tokenizers` library's. Decoding is done here, by one rule that streaming shares
(`common.detokenizer`): every token stands for some bytes, and a text is those bytes put one after
the other and read as UTF-8. transformers is not needed for any of this; importing it would take
longer than all the rest of the start.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from common.chat_template import compile_chat_template

ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary -> that byte.

    Bytes that are printable in Latin-1 stand for themselves; the other 68 follow from U+0100 on
    (GPT-2's encoding, Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


BYTE_OF_CHARACTER = byte_alphabet()


class Tokenizer:
    """A tokenizer of the `tokenizers` library, with its special tokens and its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Raises ValueError for a decoder other than byte-level BPE or SentencePiece."""
        self.backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        self._bytes_of_token: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._spell, self.strips_leading_space = _decoding_rule(backend)
        # A byte without a token of its own is dropped by the library without a word.
        self._bytes_without_token = b""
        if self._spell is _spell_byte_level:
            self._bytes_without_token = bytes(
                byte
                for character, byte in BYTE_OF_CHARACTER.items()
                if backend.token_to_id(character) is None
            )

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """Read tokenizer.json and its companions; None where the folder has no tokenizer.

        Folders with an older form (vocab.json and merges.txt, or tokenizer.model) are converted by
        transformers. Raises ValueError for files that can't be read.
        """
        config = _read_json(folder / "tokenizer_config.json")
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"{file} is not a readable tokenizer: {error}") from error
        elif any((folder / old).is_file() for old in ("vocab.json", "tokenizer.model")):
            backend = _convert_older_form(folder)
        else:
            return None
        special = {**_read_json(folder / "special_tokens_map.json"), **config}
        return cls(
            backend,
            bos_token=_token_content(special.get("bos_token")),
            eos_token=_token_content(special.get("eos_token")),
            chat_template=_read_chat_template(folder, config),
        )

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """The tokenizer of random models: 256 bytes, then a few special tokens in ChatML."""
        backend = tokenizers.Tokenizer(models.BPE(vocab=BYTE_OF_CHARACTER, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(
            [
                AddedToken(content, special=True, normalized=False)
                for content in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
            ]
        )
        return cls(backend, eos_token="<|im_end|>", chat_template=CHATML_TEMPLATE)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
        }
        config = {key: value for key, value in config.items() if value is not None}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id; a model may have rows for ids beyond it."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return max(vocabulary.values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.backend.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.backend.token_to_id(self.eos_token)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it become themselves.

        Raises ValueError naming the first character that the vocabulary has no tokens for.
        """
        self._require_spellable(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The tokens' bytes read as UTF-8, as `bytes.decode(errors="replace")` reads them.

        Ids that the model has and the tokenizer doesn't stand for nothing.
        """
        skipped = self.special_ids if skip_special_tokens else ()
        parts = [self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped]
        text = b"".join(parts).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; b"" for an id without a token."""
        found = self._bytes_of_token.get(token_id)
        if found is None:
            found = self._bytes_of_token[token_id] = self._find_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """One token by itself, special or not; U+FFFD where it is a piece of a character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        messages: [{"role": "user", "content": "..."}, ...]; template_options go to the template
        (Qwen3 knows `enable_thinking`). Raises ValueError for messages of another form, or where
        the model has no chat template or its template refuses them.
        """
        if self._render_chat is None:
            raise ValueError(
                "this model has no chat template: it was not made for chat; pass the prompt as text"
            )
        self._check_messages(messages)
        text = self._render_chat(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
            **template_options,
        )
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def _render_chat(self) -> Callable[..., str] | None:
        return None if self.chat_template is None else compile_chat_template(self.chat_template)

    def _check_messages(self, messages: Sequence[Mapping[str, str]]) -> None:
        if not messages:
            raise ValueError("a conversation needs at least one message")
        for index, message in enumerate(messages):
            where = f"message {index}"
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise ValueError(
                    f"{where} must be a dict with 'role' and 'content' and nothing else, "
                    f"got {message!r}"
                )
            if message["role"] not in ROLES:
                raise ValueError(
                    f"{where} has role {message['role']!r}; the roles are {', '.join(ROLES)}"
                )
            if not isinstance(message["content"], str):
                raise ValueError(
                    f"{where}: content must be a str, got {type(message['content']).__name__}"
                )
            try:
                self._require_spellable(message["content"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None

    def _require_spellable(self, text: str) -> None:
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{text[error.start]!r} at position {error.start} is half of a surrogate pair, "
                "not a character: repair the text's encoding"
            ) from None
        missing = self._bytes_without_token
        if not missing or len(encoded.translate(None, missing)) == len(encoded):
            return
        for position, character in enumerate(text):
            if any(byte in missing for byte in character.encode("utf-8")):
                raise ValueError(
                    f"the tokenizer has no token for {character!r} (U+{ord(character):04X}) at "
                    f"position {position}: remove or replace that character"
                )

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"token ids are not negative, got {token_id}")
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        token = self.backend.id_to_token(token_id)
        return b"" if token is None else self._spell(token)


def _spell_byte_level(token: str) -> bytes:
    """A token of a byte-level vocabulary, where each character stands for a byte."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:  # written into the vocabulary as plain text, as some special tokens are
        return token.encode("utf-8")


def _spell_sentencepiece(token: str) -> bytes:
    """A SentencePiece piece: "▁" is a space, "<0xE2>" a byte outside the vocabulary."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode("utf-8")


def _decoding_rule(backend: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes], bool]:
    """How a token's bytes are spelled, and whether a text's first space is not part of it."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    by_type = {step["type"]: step for step in steps}
    if "ByteLevel" in by_type:
        return _spell_byte_level, False
    if "Metaspace" in by_type:
        return _spell_sentencepiece, by_type["Metaspace"].get("prepend_scheme") != "never"
    if "ByteFallback" in by_type:
        return _spell_sentencepiece, "Strip" in by_type
    raise ValueError(
        f"the tokenizer's decoder ({', '.join(by_type)}) is not supported; supported are those of "
        "byte-level BPE and of SentencePiece"
    )


def _convert_older_form(folder: Path) -> tokenizers.Tokenizer:
    """Let transformers build the fast tokenizer that the folder doesn't bring."""
    from transformers import AutoTokenizer  # slow to import, and seldom needed

    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer
    except Exception as error:
        raise ValueError(
            f"the tokenizer of {folder} can't be converted ({error}); save it with transformers' "
            "save_pretrained, which writes tokenizer.json"
        ) from error


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the one in tokenizer_config.json (where several: "default")."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _token_content(token: str | Mapping[str, Any] | None) -> str | None:
    """A special token, given by its text or with its attributes."""
    return token["content"] if isinstance(token, Mapping) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
