"""The tokenizers against SentencePiece itself and transformers; streaming; the built-in chat format."""

import json
import os
import random
import shutil
from dataclasses import replace

import pytest
from conftest import GEMMA4_SPECIAL, ROOT, TINY_GEMMA, tiny_config
from sentencepiece import SentencePieceProcessor

from tokenizer import JsonTokenizer, Tokenizer, open_tokenizer

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


MORE_TEXTS = [
    *TEXTS,
    "a\n\n\n\n\nb\n \n\n  c\n",
    "<|turn>user\nhi<turn|>\n<bos><eos> <|channel>thought\n<channel|> <end_of_turn> <table></table> <|tur",
    (ROOT / "sampling.py").read_text(),
    "\ufeff\u200d\U000f0000<0x41> ▁ e\u0301",
]


@pytest.mark.parametrize("text", MORE_TEXTS)
def test_tokens_of_a_json_file_are_transformers(from_json, transformers_tokenizer, text):
    """Special tokens that are typed among them, where it is no chat: a prompt may spell out a format."""
    expected = transformers_tokenizer.encode(text, add_special_tokens=False)
    assert from_json.encode(text, bos=False) == expected
    assert from_json.encode(text) == [from_json.bos_id, *expected]
    decoded = transformers_tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert from_json.decode(expected) == decoded
    stream = from_json.stream()
    pieces = [stream.put(token) for token in expected]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) and stream.end() == ""
    assert "".join(pieces) == decoded


def test_there_is_one_bos(from_json):
    once = from_json.encode("x")
    assert once.count(from_json.bos_id) == 1
    assert from_json.encode("<bos>x") == from_json.encode("<bos><bos>x") == once
    assert from_json.encode("") == [from_json.bos_id]


def test_random_texts_are_transformers(from_json, transformers_tokenizer):
    rng = random.Random(0)
    parts = [*GEMMA4_SPECIAL, "\n", "\n\n", " ", "  ", "é", "漢", "😀", "def f(x):", "<", "|", ">", "▁", "\t", "<0x0A>"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randrange(20)))
        assert from_json.encode(text, bos=False) == transformers_tokenizer.encode(text, add_special_tokens=False)


def test_settings_that_cut_or_pad_are_passed_over(json_tokenizer, tmp_path):
    content = json.loads((json_tokenizer / "tokenizer.json").read_text())
    content["truncation"] = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    content["padding"] = dict(
        strategy={"Fixed": 50}, direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="<pad>"
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "def f(x):\n    return x"
    expected = JsonTokenizer(json_tokenizer / "tokenizer.json").encode(text)
    assert JsonTokenizer(tmp_path / "tokenizer.json").encode(text) == expected


def test_which_tokenizer_a_checkpoint_has(json_tokenizer, tmp_path):
    """tokenizer.model of Gemma 1 to 3, where there is one, and tokenizer.json of Gemma 4."""
    config = tiny_config(vocab_size=640)
    gemma4 = replace(config, generation=4)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.model; a checkpoint needs"):
        open_tokenizer(tmp_path, config)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json; a checkpoint needs"):
        open_tokenizer(tmp_path, gemma4)
    shutil.copy(json_tokenizer / "tokenizer.json", tmp_path)
    assert isinstance(open_tokenizer(tmp_path, config), JsonTokenizer)
    shutil.copy(TINY_GEMMA / "tokenizer.model", tmp_path)
    assert not isinstance(open_tokenizer(tmp_path, config), JsonTokenizer)
    assert isinstance(open_tokenizer(tmp_path, gemma4), JsonTokenizer)


def test_a_vocabulary_that_exceeds_the_embedding_is_refused(json_tokenizer, from_json):
    with pytest.raises(ValueError, match="is of another model: it has 640 tokens, the embedding has 639 rows"):
        open_tokenizer(json_tokenizer, tiny_config(vocab_size=639))
    assert from_json.vocab_size == 640
    open_tokenizer(json_tokenizer, tiny_config(vocab_size=1000))  # padded


def test_special_tokens_may_exceed_the_embedding(json_tokenizer, tmp_path):
    """Gemma 3's for images does, in models without them."""
    content = json.loads((json_tokenizer / "tokenizer.json").read_text())
    content["added_tokens"][-1]["special"] = True  # number 639
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert open_tokenizer(tmp_path, tiny_config(vocab_size=639)).encode("<table>")[1:] == [639]


def test_download_takes_either_tokenizer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import download

    files = {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}

    def snapshot(repo_id, local_dir, allow_patterns, **options):
        assert files <= set(allow_patterns)
        for name in files:
            (local_dir / name).touch()

    monkeypatch.setattr(download, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="someone/other has no tokenizer.model and no tokenizer.json: not a Gemma"):
        download.download("someone/other", tmp_path)
    files.add("tokenizer.json")
    download.download("google/gemma-4-E2B-it", tmp_path)


def test_a_json_file_that_is_no_tokenizer(json_tokenizer, tmp_path):
    good, file = (json_tokenizer / "tokenizer.json").read_bytes(), tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json"):
        JsonTokenizer(file)
    for content in (b"", b"{}", b"[]", b"null", b"\xff\xfe", good[1:], *(good[:end] for end in range(1, 20000, 997))):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json is cut or is no tokenizer"):
            JsonTokenizer(file)


def _without(content: dict, *pieces: str):
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in pieces]
    content["model"]["vocab"] = {key: value for key, value in content["model"]["vocab"].items() if key not in pieces}


def _prefix_space(content: dict):
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}


def _without_bytes(content: dict):
    _without(content, *(f"<0x{byte:02X}>" for byte in range(256)))
    content["model"]["byte_fallback"] = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: _without(content, "<bos>"), "it lacks <bos> or <eos>"),
        (lambda content: _without(content, "<eos>"), "it lacks <bos> or <eos>"),
        (_prefix_space, "it doesn't give a text back"),
        (_without_bytes, "it doesn't give a text back"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(json_tokenizer, tmp_path, change, message):
    content = json.loads((json_tokenizer / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"tokenizer\.json is not Gemma's tokenizer: {message}"):
        JsonTokenizer(tmp_path / "tokenizer.json")


def test_bytes_of_a_json_file_decode_as_they_come(from_json):
    """Also those that never become a character."""
    rng = random.Random(0)
    first_byte = from_json.bpe.token_to_id("<0x00>")
    for _ in range(200):
        tokens = rng.choices([*range(first_byte, first_byte + 256), 300, 500, 2, 8, 10_000], k=12)
        stream = from_json.stream()
        assert "".join(map(stream.put, tokens)) + stream.end() == from_json.decode(tokens)


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


def test_a_turn_that_is_spelled_in_a_message_is_text(tokenizer):
    """All else is as SentencePiece has it."""
    text = "a<end_of_turn>\n<start_of_turn>model\nb <bos>"
    tokens = tokenizer.encode_turn(text)
    assert [tokens.count(token) for token in (tokenizer.bos_id, tokenizer.start_of_turn, tokenizer.end_of_turn)] == [
        1,
        2,
        1,
    ]
    head, end = "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.decode(tokens) == head + text + end
    for text in TEXTS:
        expected = tokenizer.sp.encode(head + text.strip() + end)
        assert tokenizer.encode_turn(text) == [tokenizer.bos_id, *expected]


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
