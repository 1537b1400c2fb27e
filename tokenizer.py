"""SentencePiece tokenizer of Gemma 1 to 3: text to ids and back, the chat format, and decoding as a stream."""

import codecs
from pathlib import Path

from sentencepiece import SentencePieceProcessor

MAX_BYTES = 2**28  # of a tokenizer.model; Gemma's have 5 million


def check_text(text: str, name: str = "the text"):
    """Raises ValueError for what is no text: no str, or one with half a surrogate pair, as a bad byte of a command line
    becomes, or as JSON can spell."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a str, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise ValueError(f"{name} is not UTF-8: {bad!r} is its character {error.start + 1}") from None


class Tokenizer:
    """`encode` puts <bos> in front, as every Gemma expects. Ids of control tokens decode to nothing."""

    def __init__(self, path: str | Path):
        """Loads tokenizer.model. Raises FileNotFoundError without the file, ValueError if it is cut or is not
        Gemma's."""
        path = Path(path)
        if not path.is_file():  # a pipe could be waited for without end
            raise FileNotFoundError(f"no tokenizer at {path}; a checkpoint needs Gemma's tokenizer.model")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path} has {size:,} bytes: it is not Gemma's tokenizer")
        self.sp = SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise ValueError(f"{path} is cut or is no SentencePiece model") from None
        self.bos_id, self.eos_id, self.vocab_size = self.sp.bos_id(), self.sp.eos_id(), len(self.sp)
        # Gemma's normalizer puts no space in front. A file cut just before its normalizer loads, and does.
        if self.bos_id < 0 or self.sp.id_to_piece(self.sp.encode("a"))[0].startswith("▁"):
            raise ValueError(f"{path} is cut or is not Gemma's tokenizer")
        self.start_of_turn, self.end_of_turn = self._special("<start_of_turn>"), self._special("<end_of_turn>")

    def _special(self, piece: str) -> int | None:
        token = self.sp.piece_to_id(piece)
        return None if token == self.sp.unk_id() else token

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Raises ValueError for what is no text: a str with half a surrogate pair, such as a byte that is no UTF-8."""
        check_text(text)
        return [self.bos_id] * bos + self.sp.encode(text)

    def encode_turn(self, text: str, first: bool = True) -> list[int]:
        """A user's turn and the head of the model's: after <bos> if it is the `first`, else behind the model's
        <end_of_turn>. Raises ValueError if this tokenizer has no turn tokens."""
        if self.start_of_turn is None or self.end_of_turn is None:
            raise ValueError("this checkpoint's tokenizer has no chat tokens (<start_of_turn>), which a chat needs")
        turn = f"<start_of_turn>user\n{text.strip()}<end_of_turn>\n<start_of_turn>model\n"
        return self.encode(turn) if first else self.encode("\n" + turn, bos=False)

    def decode(self, tokens: list[int]) -> str:
        """Raises ValueError for what are no token ids."""
        if not isinstance(tokens, list | tuple) or not all(isinstance(token, int) and token >= 0 for token in tokens):
            raise ValueError(f"tokens must be a list of token ids, not {tokens!r}")
        return b"".join(map(self._bytes, tokens)).decode("utf-8", errors="replace")

    def stream(self) -> "TextStream":
        return TextStream(self)

    def _bytes(self, token: int) -> bytes:
        if token >= self.vocab_size or self.sp.is_control(token):  # the embedding may have more rows than pieces
            return b""
        if self.sp.is_byte(token):
            return bytes([int(self.sp.id_to_piece(token)[1:-1], 16)])
        if self.sp.is_unknown(token):
            return "\N{REPLACEMENT CHARACTER}".encode()
        return self.sp.id_to_piece(token).replace("▁", " ").encode()


class TextStream:
    """Decodes token by token; a character whose bytes are spread over tokens comes out when it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer._bytes(token))

    def end(self) -> str:
        """What is left: a replacement character if the last one never became whole."""
        return self._decoder.decode(b"", final=True)
