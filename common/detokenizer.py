"""Text that grows with the tokens, never showing half a character.

    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids)
    for token_id in sampled:
        print(detokenizer.append(token_id), end="")
    print(detokenizer.flush())
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from common.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text as they come, in constant time for each.

    Everything `append` returned, then what `flush` returns, is exactly
    `tokenizer.decode(appended_ids, skip_special_tokens)`. One difference: a SentencePiece
    tokenizer's first space belongs to the text where a prompt stands before it. Bytes that are no
    UTF-8 become U+FFFD; bytes that may still grow into a character wait for the next token. A
    character that the prompt ends in the middle of is not completed: the output is read by itself.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._strip_space = tokenizer.strips_leading_space and not prompt_token_ids
        self._decoder = _Utf8Decoder(errors="replace")

    def append(self, token_id: int) -> str:
        """The text that this token completes; "" while its character is unfinished."""
        if token_id in self._skipped:
            return ""
        return self._stripped(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, else ""."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if not (self._strip_space and text):
            return text
        self._strip_space = False
        return text.removeprefix(" ")
