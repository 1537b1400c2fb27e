"""Prompts and texts from files, and texts cut into windows of tokens."""

import fcntl
import hashlib
import json
import re
import secrets
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from files import read_json, write_atomically
from sampling import SETTINGS, Sampling
from tokenizer import check_messages, check_text

BOM = b"\xef\xbb\xbf"
JSON_LINES = (".jsonl", ".json")  # suffixes


def check_prompt(prompt: str):
    """Raises ValueError for a prompt that is empty or no text."""
    if not prompt:
        raise ValueError("the prompt is empty")
    check_text(prompt, "the prompt")


def read_prompts(file: Path, settings: Iterable[str] = ()) -> list[dict]:
    """Prompts of a text file, one a line, or of JSON lines: {"prompt": text}, or {"messages": [{"role": ..., "content":
    text}, ...]} for a chat, and what else an object has of `settings`.

    A file, or for "-" stdin, is JSON lines if its name ends in .jsonl or .json, or if any line is an object with a
    `prompt` or `messages`; then blank lines are skipped. Raises ValueError with the number of a line that holds no
    prompt or a key that is unknown: a setting whose name has a slip would be without effect. FileNotFoundError without
    the file.
    """
    name, content = _read(file, "prompts file")
    lines, known = _lines(content, name), ("prompt", *settings, "messages")
    is_json = file.suffix in JSON_LINES or any(_object(line).keys() & {"prompt", "messages"} for line in lines)
    entries = []
    for number, line in enumerate(lines, start=1):
        entry, where = {"prompt": line}, f"{name}, line {number}"
        if is_json:
            if not line.strip():
                continue
            entry = _object(line)
            if "messages" not in entry and not isinstance(entry.get("prompt"), str):
                raise ValueError(f"{where}: not a JSON object with a string 'prompt', or with 'messages'")
            if "messages" in entry and "prompt" in entry:
                raise ValueError(f"{where}: 'prompt' and 'messages' are both there")
            if unknown := ", ".join(repr(key) for key in entry if key not in known):
                raise ValueError(f"{where}: unknown {unknown}; known are {', '.join(known)}")
        try:
            if "messages" in entry:
                check_messages(entry["messages"])
            else:
                check_prompt(entry["prompt"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        entries.append(entry | {"where": where})
    if not entries:
        raise ValueError(f"{name} holds no prompts")
    return entries


def sampling_settings(directory: Path) -> dict:
    """Those of `Sampling` that generation_config.json of a checkpoint has, unless it says do_sample: false. Raises
    ValueError for a value that is out of its range."""
    file = directory / "generation_config.json"
    content = read_json(file) if file.is_file() else {}
    if content.get("do_sample") is False:
        return {}
    settings = {name: content[name] for name in SETTINGS if content.get(name) is not None}
    try:
        Sampling(**settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return settings


def split_thoughts(tokenizer, tokens: list[int]) -> tuple[list[list[int]], list[int]]:
    """A model's new tokens as its thoughts and its answer. A thought is what <|channel> and <channel|> enclose; if it is
    the last, it may go on to the end."""
    if tokenizer.thought is None:
        return [], tokens
    begin, end = tokenizer.thought
    thoughts, answer, thinking = [], [], False
    for token in tokens:
        if token == begin:
            thinking = True
            thoughts.append([])
        elif token == end:
            thinking = False
        else:
            (thoughts[-1] if thinking else answer).append(token)
    return thoughts, answer


def thoughts_of(tokenizer, tokens: list[int]) -> str:
    """The text of the thoughts in new tokens, without the word in the first line of each, which says what it is."""
    thoughts, _ = split_thoughts(tokenizer, tokens)
    texts = [tokenizer.decode(thought).partition("\n")[2].strip() for thought in thoughts]
    return "\n\n".join(filter(None, texts))


def stops_within(tokenizer, stops: list[str]) -> Callable[[list[int]], bool] | None:
    """What says, after each of a row's new tokens, whether one of `stops` is in the text of the answer now; None
    without stops."""
    tail = max((len(stop.encode()) for stop in stops), default=0)  # tokens; each has at least a byte

    def is_there(tokens: list[int]) -> bool:
        last = tokens[-tail:]
        if tokenizer.thought is not None:
            begin, end = tokenizer.thought
            if tokens.count(begin) > tokens.count(end):  # a thought goes on
                return False
            after = next((i for i in range(len(last), 0, -1) if last[i - 1] == end), 0)
            last = last[after:]
        text = tokenizer.decode(last)
        return any(stop in text for stop in stops)

    return is_there if stops else None


def before_stop(text: str, stops: list[str]) -> str:
    """Text up to the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=None)]


def completed(tokenizer, tokens: list[int], stop_ids: Container[int], stops: list[str]) -> tuple[str, bool]:
    """The answer in new tokens, up to a stop id or the first of `stops`, and whether there is one."""
    ended = tokens[-1] in stop_ids
    _, answer = split_thoughts(tokenizer, tokens[:-1] if ended else tokens)
    whole = tokenizer.decode(answer)
    text = before_stop(whole, stops)
    return text, ended or text != whole


def part_of(file: Path, rank: int) -> Path:
    """Where a rank writes its completions until all are there."""
    return file.with_name(f"{file.name}.rank{rank}.partial" if rank else f"{file.name}.partial")


class Output:
    """Completions of a run as JSON lines, appended to FILE.partial as they finish and sorted into FILE at the end.

    A run that was ended goes on where it stopped: `done` has the completions that are there already, by the numbers of
    the prompt and the sample, and `seed` the seed that the first start had. `run` is what the completions depend on
    besides. Where several ranks make a run, those after the first write parts of their own, FILE.rank1.partial and so
    on; whatever the number of ranks of a later start, it reads them all. Raises ValueError for a FILE that exists, a
    partial one of another run or seed, or one that another process writes.
    """

    def __init__(self, file: Path, run: dict, seed: int | None, rank: int = 0):
        self.file, self.partial = file, part_of(file, rank)
        if file.exists():
            raise ValueError(f"{file} exists already: name another file, or delete it")
        self.stream = open(self.partial, "a+b")  # noqa: SIM115, it stays open as long as the run lasts
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.partial} is being written by another process") from None
        digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        self.head, self.done = {"run": digest, "seed": seed}, {}
        self.begun = self._read(self.partial)
        self.stream.truncate(self.begun)  # without a last line that is torn
        self.others = self._read_others()
        if self.head["seed"] is None:
            self.head["seed"] = secrets.randbits(32)
        self.seed = self.head["seed"]

    def add(self, prompt: int, sample: int, completion: dict):
        if not self.begun:  # a run that made nothing leaves nothing that another one would have to be like
            self._write(self.head)
            self.begun = True
        self.done[prompt, sample] = completion
        self._write([prompt, sample, completion])

    def gather(self, count: int, ranks: int):
        """Takes what the other of so many ranks have written, which have closed their parts. Raises ValueError if that
        makes less than `count` completions."""
        self.others = self._read_others(ranks)
        if len(self.done) < count:
            missing = f"{count - len(self.done)} of {count} completions are in no {self.file}*.partial"
            raise ValueError(f"{missing}: ranks on several hosts need a directory that all of them share")

    def finish(self):
        """Writes FILE, in the order of the prompts and samples."""
        lines = [json.dumps(self.done[place], ensure_ascii=False) + "\n" for place in sorted(self.done)]
        write_atomically(self.file, lambda out: out.writelines(line.encode() for line in lines))
        for partial in (self.partial, *self.others):
            partial.unlink()
        self.stream.close()

    def _read_others(self, ranks: int = 0) -> list[Path]:
        """Takes what the other parts have. Returns which they are: those that the directory lists, and those of so many
        ranks, which it may list late, if it is on another host."""
        name = re.compile(rf"{re.escape(self.file.name)}(\.rank\d+)?\.partial")
        found = {file.name for file in self.file.parent.iterdir() if name.fullmatch(file.name)}
        found |= {file.name for file in (part_of(self.file, rank) for rank in range(ranks)) if file.exists()}
        others = [self.file.with_name(part) for part in sorted(found - {self.partial.name})]
        for file in others:
            self._read(file)
        return others

    def _read(self, file: Path) -> int:
        """Takes what a part has. Returns how many bytes that is."""
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return 0
        try:
            head, *entries = map(json.loads, whole.split(b"\n")[:-1])  # a text may have other line ends
            same, seed = head["run"] == self.head["run"], head["seed"]
            self.done |= {(prompt, sample): completion for prompt, sample, completion in entries}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is not of this program: delete it, or name another file") from None
        if not same or self.head["seed"] not in (None, seed):
            advice = "finish that, delete it, or name another file"
            raise ValueError(f"{file} is of a run with other prompts or settings: {advice}")
        self.head["seed"] = seed
        return len(whole)

    def _write(self, line):
        self.stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.stream.flush()


def read_texts(file: Path) -> list[str]:
    """The documents of `file`: of JSON lines (its name ends in .jsonl or .json) the string `text` of each object, of
    any other file, or for "-" of stdin, its whole content as one.

    Other keys of an object are passed over: corpora come with metadata beside each text, which is no setting of ours.
    Raises FileNotFoundError without the file, ValueError if it is no UTF-8, for a line (named by its number) that is
    not such an object, and if there is no text at all.
    """
    file = Path(file)
    name, content = _read(file, "text file")
    if file.suffix in JSON_LINES:
        texts = []
        for number, line in enumerate(_lines(content, name), start=1):
            if not line.strip():
                continue
            text = _object(line).get("text")
            try:
                check_text(text)
            except ValueError:
                raise ValueError(f"{name}, line {number}: not a JSON object with a string 'text'") from None
            texts.append(text)
    else:
        texts = [_decoded(content, name)]
    if not any(texts):
        raise ValueError(f"{name} holds no text")
    return texts


def read_objects(file: Path, what: str) -> Iterator[tuple[str, dict]]:
    """The objects of JSON lines, blank ones skipped, and where each is: file and number of the line.

    Raises FileNotFoundError without the file, ValueError with the number of a line that is no JSON object in UTF-8."""
    name, content = _read(file, what)
    for number, line in enumerate(_lines(content, name), start=1):
        if line.strip():
            if not (entry := _object(line)):
                raise ValueError(f"{name}, line {number}: not a JSON object")
            yield f"{name}, line {number}", entry


def _read(file: Path, what: str) -> tuple[str, bytes]:
    """Name and content, without a byte order mark, of a file or a pipe, which can be read but once; of stdin for
    "-"."""
    if str(file) == "-":
        if sys.stdin is None:
            raise ValueError(f"the {what} is stdin, which is closed")
        return "stdin", sys.stdin.buffer.read().removeprefix(BOM)
    if not file.exists() or file.is_dir():
        raise FileNotFoundError(f"no {what} at {file}")
    return str(file), file.read_bytes().removeprefix(BOM)


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not UTF-8 text") from None


def _lines(content: bytes, name: str) -> list[str]:
    """All but blank lines at the end. (Python's lines of a str would end at more than line ends.)"""
    return [
        _decoded(line, f"{name}, line {number}") for number, line in enumerate(content.rstrip().splitlines(), start=1)
    ]


def _object(line: str) -> dict:
    """The JSON object that a line is, an empty one for any other line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def own_text() -> list[str]:
    """The built-in sample of text: this program's README and sources."""
    directory = Path(__file__).parent
    files = (directory / "README.md", *sorted(directory.glob("*.py")), *sorted(directory.glob("ops/*.py")))
    return [file.read_text(encoding="utf-8") for file in files]


def sample_windows(
    file: Path | None, tokenizer, window: int, context_length: int, max_tokens: int, least: int
) -> list[list[int]]:
    """The first max_tokens tokens of the text in `file`, or of this program's own, with a note, in `windows`.

    Raises ValueError for a window longer than the context, and if there are fewer than `least` tokens.
    """
    check_window(window, context_length)
    if file is None:
        print("note: these are this program's sources; --text FILE with your kind of text is better", file=sys.stderr)
    pieces = windows(own_text() if file is None else read_texts(file), tokenizer, window)
    pieces = [piece[: max_tokens - start] for start, piece in zip(range(0, max_tokens, window), pieces)]
    if (tokens := sum(map(len, pieces))) < least:
        raise ValueError(f"there are {tokens} tokens of text, and at least {least} are needed")
    return pieces


def check_window(window: int, context_length: int):
    """Raises ValueError for a window that is longer than the model's context."""
    if window > context_length:
        raise ValueError(f"a window of {window} tokens exceeds the context of {context_length}")


def windows(texts: list[str], tokenizer, window: int) -> list[list[int]]:
    """<bos>, the tokens and <eos> of each text, all joined and cut into lists of `window` tokens.

    The last list may be shorter; one token alone, which predicts nothing, is left out. Raises ValueError for a window
    below 2 tokens and if less than 2 tokens are there.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, not {window}")
    tokens = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_id)]
    if len(tokens) < 2:
        raise ValueError(f"the text is too short: {len(tokens)} tokens, and a window needs 2")
    pieces = [tokens[i : i + window] for i in range(0, len(tokens), window)]
    return pieces if len(pieces[-1]) > 1 else pieces[:-1]


def batches(windows: list[list[int]], batch_size: int):
    """At most batch_size neighbours of one length at a time: without padding, every forward is that of an empty cache.

    Raises ValueError for a batch size below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    start = 0
    for end in range(1, len(windows) + 1):
        if end == len(windows) or end - start == batch_size or len(windows[end]) != len(windows[start]):
            yield windows[start:end]
            start = end
