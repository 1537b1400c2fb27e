"""The tokenizer against SentencePiece itself; streaming; the chat format."""

import os
import random

import pytest
from conftest import TINY_GEMMA
from sentencepiece import SentencePieceProcessor

from tokenizer import Tokenizer

TEXTS = [
    "def f(x):\n    return x\n",
    "  leading, trailing and   inner spaces  ",
    "tabs\tand\r\nWindows lines\x00",
    "é 漢字 😀 👩‍👩‍👧 ﷽",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY_GEMMA / "tokenizer.model")


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_sentencepieces(tokenizer, text):
    reference = SentencePieceProcessor(model_file=str(TINY_GEMMA / "tokenizer.model"))
    tokens = tokenizer.encode(text)
    assert tokens == [2, *reference.encode(text)]
    assert tokenizer.decode(tokens) == text == reference.decode(tokens)
    assert tokenizer.encode(text, bos=False) == tokens[1:]


def test_control_tokens_and_ids_without_a_piece_decode_to_nothing(tokenizer):
    assert tokenizer.decode([0, 1, 2, 4096, 300000]) == ""
    assert tokenizer.decode([3]) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("text", TEXTS)
def test_stream_never_gives_half_a_character(tokenizer, text):
    stream, pieces = tokenizer.stream(), []
    for token in tokenizer.encode(text):
        pieces.append(stream.put(token))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1]
    assert "".join(pieces) + stream.end() == text


def test_stream_of_any_tokens_is_their_decoding(tokenizer):
    """Bytes that never become a character included; the last one is held until the end."""
    rng = random.Random(0)
    for _ in range(200):
        tokens = rng.choices([*range(28, 284), 300, 4000], k=12)
        stream = tokenizer.stream()
        assert "".join(map(stream.put, tokens)) + stream.end() == tokenizer.decode(tokens)
    first_byte_of_three = tokenizer.sp.piece_to_id("<0xE6>")
    stream = tokenizer.stream()
    assert stream.put(first_byte_of_three) == ""
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_chat_format(tokenizer):
    user, end = "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
    tokens = tokenizer.encode_turn("  Sort a list. ")
    assert tokens[:2] == [tokenizer.bos_id, tokenizer.start_of_turn]
    assert tokenizer.decode(tokens) == f"{user}Sort a list.{end}"
    later = tokenizer.encode_turn("And now?", first=False)  # behind the model's <end_of_turn>
    assert tokenizer.bos_id not in later
    assert tokenizer.decode(later) == f"\n{user}And now?{end}"


def test_chat_without_turn_tokens_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "start_of_turn", None)
    with pytest.raises(ValueError, match="no chat tokens"):
        tokenizer.encode_turn("hi")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\udcff", r"the text is not UTF-8: '.udcff' is its character 2"),
        ("\ud800", "the text is not UTF-8"),
        (5, "the text must be a str, not 5"),
        (None, "the text must be a str, not None"),
        (b"abc", "the text must be a str, not b'abc'"),
        (["a"], "the text must be a str"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer, text, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(text)


@pytest.mark.parametrize("tokens", [5, None, "ab", ["2"], [2.0], [-1]])
def test_what_are_no_tokens_is_refused(tokenizer, tokens):
    with pytest.raises(ValueError, match="tokens must be a list of token ids, not"):
        tokenizer.decode(tokens)


def test_a_file_that_is_no_tokenizer(tmp_path):
    """A pipe is not waited for, and a file that is as large as weights is not read."""
    file = tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer(file)
    os.mkfifo(file)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer(file)
    file.unlink()
    with open(file, "wb") as f:
        f.truncate(2**40)
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes: it is not Gemma's tokenizer"):
        Tokenizer(file)
    for content in (b"", b"\0" * 1000, b"text\n" * 1000):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is cut or is no"):
            Tokenizer(file)
