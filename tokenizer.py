"""Text to ids and back, decoding as a stream, and chats as tokens: SentencePiece's tokenizer.model of Gemma 1 to 3, the
`tokenizers` library's tokenizer.json, and a checkpoint's own chat template."""

import codecs
import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from config import ModelConfig
from files import read_json

MAX_BYTES = 2**28  # of a tokenizer file; Gemma's have 5 and 33 million
MAX_TEMPLATE = 2**20  # bytes; Gemma 4's has 16 thousand
TURNS = (("<|turn>", "<turn|>"), ("<start_of_turn>", "<end_of_turn>"))  # Gemma 4; Gemma 1 to 3
THOUGHT = ("<|channel>", "<channel|>")
ROLES = ("system", "developer", "user", "assistant", "model")  # the last two are one


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


def check_messages(messages: list[dict]):
    """Raises ValueError unless these are messages, {"role": one of ROLES, "content": text}, of which the last is the
    user's."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list of objects with 'role' and 'content', not {messages!r}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f"message {number} must be an object with 'role' and 'content' alone, not {message!r}")
        if message["role"] not in ROLES:
            raise ValueError(f"message {number} has the role {message['role']!r}; known are {', '.join(ROLES)}")
        check_text(message["content"], f"the content of message {number}")
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message must be the user's, not one of role {messages[-1]['role']!r}")


def open_tokenizer(directory: Path, config: ModelConfig) -> "Tokenizer":
    """The tokenizer of a checkpoint: tokenizer.model of Gemma 1 to 3, tokenizer.json of Gemma 4, or else the other one.
    Raises FileNotFoundError without either, ValueError for one that is damaged or of another model."""
    file, sentencepiece = directory / "tokenizer.json", directory / "tokenizer.model"
    if file.exists() and (config.generation > 3 or not sentencepiece.exists()):
        tokenizer = JsonTokenizer(file)
        tokenizer.check(config.vocab_size)
        return tokenizer
    if config.generation > 3 and not sentencepiece.exists():
        sentencepiece = file  # what the error names
    return Tokenizer(sentencepiece)


def _file_of(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():  # a pipe could be waited for without end
        raise FileNotFoundError(f"no tokenizer at {path}; a checkpoint needs Gemma's {path.name}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes: it is not Gemma's tokenizer")
    return path


class Tokenizer:
    """SentencePiece's. `encode` puts one <bos> in front, as every Gemma expects. Ids of control tokens decode to
    nothing."""

    bos = "<bos>"

    def __init__(self, path: str | Path):
        """Loads tokenizer.model. Raises FileNotFoundError without the file, ValueError if it is cut or is not
        Gemma's."""
        self.path = _file_of(path)
        self.sp = SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(self.path.read_bytes())
        except RuntimeError:
            raise ValueError(f"{path} is cut or is no SentencePiece model") from None
        self.bos_id, self.eos_id, self.vocab_size = self.sp.bos_id(), self.sp.eos_id(), len(self.sp)
        # Gemma's normalizer puts no space in front. A file cut just before its normalizer loads, and does.
        if self.bos_id < 0 or self.sp.id_to_piece(self.sp.encode("a"))[0].startswith("▁"):
            raise ValueError(f"{path} is cut or is not Gemma's tokenizer")
        self._name_tokens(TURNS[-1], ("<bos>", "<eos>", "<pad>", *TURNS[-1]))

    def _name_tokens(self, turns: tuple[str, str], controls: Iterable[str]):
        """Finds the tokens that a chat is made of; `controls` are those that its messages can't have."""
        self.turns = turns
        self.start_of_turn, self.end_of_turn = map(self._id, turns)
        thought = tuple(map(self._id, THOUGHT))
        self.thought = None if None in thought else thought  # ids of the tokens around one
        self._controls = sorted((piece for piece in controls if self._id(piece) is not None), key=len, reverse=True)

    @property
    def pieces(self) -> list[str]:
        """Of all tokens, by their ids."""
        return self.sp.id_to_piece(list(range(self.vocab_size)))

    def is_control(self, token: int) -> bool:
        """Whether a token is no piece of text."""
        return not self._bytes(token)

    def _id(self, piece: str) -> int | None:
        token = self.sp.piece_to_id(piece)
        return None if token == self.sp.unk_id() else token

    def _encode(self, text: str) -> list[int]:
        """Ids of a text as it is typed."""
        return self.sp.encode(text)

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of a text whose characters are none of control tokens."""
        # SentencePiece takes a turn's token for a piece of text, wherever it is whole
        parts = re.split(f"(?<=<)(?={'|'.join(re.escape(turn[1:]) for turn in self.turns)})", text)
        return [token for part in parts for token in self.sp.encode(part)]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Raises ValueError for what is no text: a str with half a surrogate pair, such as a byte that is no UTF-8."""
        check_text(text)
        tokens = self._encode(text)
        return self._with_one_bos(tokens) if bos else tokens

    def _with_one_bos(self, tokens: list[int]) -> list[int]:
        first = next((i for i, token in enumerate(tokens) if token != self.bos_id), len(tokens))
        return [self.bos_id, *tokens[first:]]

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

    # -----------------------------------------------------------------------------------------------------------------
    # Chats

    @cached_property
    def _control(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, self._controls)))

    @cached_property
    def template(self) -> "ChatTemplate | None":
        """That of the checkpoint, where it has one. Raises ValueError if its file is damaged."""
        return read_template(self.path.parent)

    def check_chat(self, thinking: bool = False):
        """Raises ValueError if this tokenizer has no turn tokens, or if there is no such thing as `thinking`."""
        if self.template is None and None in (self.start_of_turn, self.end_of_turn):
            raise ValueError("this checkpoint's tokenizer has no chat tokens (<start_of_turn>), which a chat needs")
        if thinking and (self.template is None or not self.template.knows_thinking):
            raise ValueError("this checkpoint doesn't think on request: it has no chat template with enable_thinking")

    def encode_chat(self, messages: list[dict], thinking: bool = False) -> list[int]:
        """Messages, {"role": ..., "content": text}, of which the last is the user's, and the head of the model's turn.

        The checkpoint's template makes a text of them, or Gemma's own format does. Control tokens in it are those of
        the template: what is spelled like one in a message is text. Thoughts in earlier answers are left out.

        Raises ValueError for what are no such messages, a template that fails, and as `check_chat` does.
        """
        check_messages(messages)
        self.check_chat(thinking)
        messages = [dict(message) for message in messages]
        for message in messages:
            if message["role"] in ("assistant", "model"):
                message["role"] = "assistant"
                if self.thought:
                    begin, end = map(re.escape, THOUGHT)
                    message["content"] = re.sub(rf"{begin}.*?({end}|\Z)", "", message["content"], flags=re.DOTALL)
        # While a template is at work, which may trim and cut, a mark stands for what is spelled like a control token
        typed = "".join(message["content"] for message in messages)
        mark, spelled = next(char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in typed), []

        def hide(found: re.Match) -> str:
            spelled.append(found.group())
            return f"{mark}{len(spelled) - 1}{mark}"

        for message in messages:
            message["content"] = self._control.sub(hide, message["content"])
        text = self._built_in(messages) if self.template is None else self.template.render(messages, thinking)
        return self._with_one_bos(self._encode_rendered(text, mark, spelled))

    def _encode_rendered(self, text: str, mark: str, spelled: list[str]) -> list[int]:
        """Ids of what a template made, with marks for what is `spelled` like control tokens."""

        def plain(part: str) -> list[int]:
            part = re.sub(f"{mark}(\\d+){mark}", lambda found: spelled[int(found.group(1))], part)
            return self._encode_plain(part)

        tokens, end = [], 0
        for found in self._control.finditer(text):
            tokens += [*plain(text[end : found.start()]), self._id(found.group())]
            end = found.end()
        return tokens + plain(text[end:])

    def _built_in(self, messages: list[dict]) -> str:
        """Gemma's own format. Without a system turn, what the system says comes in front of what the user does."""
        begin, end = self.turns
        system = ""
        if messages[0]["role"] in ("system", "developer"):
            system = messages[0]["content"].strip() + "\n\n"
            messages = messages[1:]
        text = ""
        for number, message in enumerate(messages):
            role = {"user": "user", "assistant": "model"}.get(message["role"])
            if role is None or (number == 0 and role == "model"):
                raise ValueError("a system message must be the first, and one of the user the next")
            text += f"{begin}{role}\n{system}{message['content'].strip()}{end}\n"
            system = ""
        return f"{text}{begin}model\n"

    def encode_turn(self, text: str, first: bool = True) -> list[int]:
        """A user's turn and the head of the model's, in Gemma's own format: after <bos> if it is the `first`, else
        behind the model's <end_of_turn>. Raises ValueError as `check_chat` does."""
        tokens = self.encode_chat([{"role": "user", "content": text}])
        return tokens if first else self._encode("\n") + tokens[1:]


class JsonTokenizer(Tokenizer):
    """The `tokenizers` library's: BPE with byte fallback. What it calls special are control tokens."""

    def __init__(self, path: str | Path):
        """Loads tokenizer.json. Raises FileNotFoundError without the file, ValueError if it is cut or is not
        Gemma's."""
        self.path = _file_of(path)
        self.bpe = self._load()
        self.bos_id, self.eos_id = self._id(self.bos), self._id("<eos>")
        if self.bos_id is None or self.eos_id is None:
            raise ValueError(f"{path} is not Gemma's tokenizer: it lacks <bos> or <eos>")
        self.vocab_size = self.bpe.get_vocab_size()
        turns = next((turns for turns in TURNS if self._id(turns[0]) is not None), TURNS[0])
        controls = ["<bos>", "<eos>", *(piece for piece in (*turns, *THOUGHT) if self._id(piece) is not None)]
        self.bpe.add_special_tokens(controls)  # if they are not special already
        added = self.bpe.get_added_tokens_decoder()
        self.special = {token for token, each in added.items() if each.special} | set(map(self._id, controls))
        sample = "a b\n  é\U0010fffd"  # the last one is in no vocabulary, and comes in bytes
        if self.decode(self._encode(sample)) != sample:
            raise ValueError(f"{path} is not Gemma's tokenizer: it doesn't give a text back")
        self._name_tokens(turns, map(self.bpe.id_to_token, self.special))

    def _load(self):
        from tokenizers import Tokenizer  # here, since Gemma 1 to 3 do without

        try:
            content = self.path.read_text(encoding="utf-8")
            # The library would end the process over other bytes, and over merges that lack such a prefix
            if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', content):
                raise ValueError("Gemma's pieces have no continuing_subword_prefix")
            bpe = Tokenizer.from_str(content)
        except Exception as error:  # the library has no class of its own for it
            raise ValueError(f"{self.path} is cut or is no tokenizer of the tokenizers library") from error
        bpe.no_truncation()
        bpe.no_padding()
        return bpe

    @cached_property
    def _plain(self):
        """The same, but that special tokens are text to it: a setting that one in use by others can't change."""
        plain = self._load()
        plain.add_special_tokens(self._controls)  # the file may call some of them otherwise
        plain.encode_special_tokens = True
        return plain

    def check(self, rows: int):
        """Raises ValueError if there are pieces of text without a row of the embedding, which has so many."""
        beyond = [token for token in range(rows, self.vocab_size) if token not in self.special]
        if beyond:  # of Gemma 3 a special one, for images, has no row in models without them
            raise ValueError(
                f"{self.path} is of another model: it has {self.vocab_size} tokens, the embedding has {rows} rows"
            )

    @property
    def pieces(self) -> list[str]:
        return [self.bpe.id_to_token(token) for token in range(self.vocab_size)]

    def _id(self, piece: str) -> int | None:
        return self.bpe.token_to_id(piece)

    def _encode(self, text: str) -> list[int]:
        return self.bpe.encode(text, add_special_tokens=False).ids

    def _encode_plain(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _encode_rendered(self, text: str, mark: str, spelled: list[str]) -> list[int]:
        return super()._encode_rendered(text, mark, spelled) if mark in text else self._encode(text)

    def _bytes(self, token: int) -> bytes:
        piece = None if token in self.special else self.bpe.id_to_token(token)
        if piece is None:
            return b""
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace("▁", " ").encode()


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


# ---------------------------------------------------------------------------------------------------------------------
# Templates


def read_template(directory: Path) -> "ChatTemplate | None":
    """The chat template of a checkpoint: chat_template.jinja, or what tokenizer_config.json has; None without either.
    Raises ValueError for a file that is damaged."""
    config_file, file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    settings = read_json(config_file) if config_file.is_file() else {}
    if file.is_file():
        if file.stat().st_size > MAX_TEMPLATE:
            raise ValueError(f"{file} has more than {MAX_TEMPLATE:,} bytes: it is no chat template")
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8 text") from None
    else:
        file, source = config_file, settings.get("chat_template")
        if isinstance(source, list):  # of several, by name
            named = [each for each in source if isinstance(each, dict) and each.get("name") == "default"]
            source = named[0].get("template") if named else source
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{file}: chat_template must be a text, or a list of them with one named 'default'")
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    for key, value in settings.items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            tokens[key] = value
    return ChatTemplate(source, file, tokens)


class ChatTemplate:
    """A Jinja template, which makes a text of messages: in a sandbox, with the names that transformers gives it
    (https://huggingface.co/docs/transformers/chat_templating)."""

    def __init__(self, source: str, file: Path, tokens: dict[str, str]):
        self.source, self.file, self.tokens = source, file, tokens
        self.knows_thinking = "enable_thinking" in source

    @cached_property
    def _compiled(self):
        from jinja2 import TemplateError, ext, sandbox  # here, since most runs do without

        class Generation(ext.Extension):
            """{% generation %}, which marks for training what is the model's, and is nothing here."""

            tags = frozenset({"generation"})

            def parse(self, parser):
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def raise_exception(message):
            raise TemplateError(message)

        def tojson(value, ensure_ascii=False, **options):
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.source)

    def render(self, messages: list[dict], thinking: bool) -> str:
        """The text, with the head of the model's turn. Raises ValueError for whatever goes wrong in the template."""
        names = {"tools": None, "documents": None, "add_generation_prompt": True, "enable_thinking": thinking}
        try:
            return self._compiled.render(messages=messages, **self.tokens, **names)
        except Exception as error:  # of any kind: a template is a program
            raise ValueError(f"the chat template in {self.file} fails: {str(error) or type(error).__name__}") from error
