"""Prompts and texts from files, and texts cut into windows of tokens."""

import json
from pathlib import Path

BOM = b"\xef\xbb\xbf"


def read_prompts(file: Path) -> list[str]:
    """Prompts of a text file, one a line, or of JSON lines, one object with a string `prompt` a line.

    A file is JSON lines if its name ends in .jsonl or .json, or if any line is an object with a `prompt`. Raises
    ValueError with the number of a line that holds no prompt, FileNotFoundError without the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no prompts file at {file}")
    lines = file.read_bytes().removeprefix(BOM).rstrip().splitlines()

    def prompt_of(line: bytes) -> str | None:
        try:
            entry = json.loads(line)
        except ValueError:
            return None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        return prompt if isinstance(prompt, str) else None

    is_json = file.suffix in (".jsonl", ".json") or any(prompt_of(line) is not None for line in lines)
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = prompt_of(line) if is_json else line.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file}, line {number}: not UTF-8 text") from None
        if prompt is None:
            raise ValueError(f"{file}, line {number}: not a JSON object with a string 'prompt'")
        if not prompt:
            raise ValueError(f"{file}, line {number}: the prompt is empty")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{file} holds no prompts")
    return prompts


def read_texts(file: Path) -> list[str]:
    """The documents of `file`: of JSON lines (its name ends in .jsonl or .json) the string `text` of each object, of
    any other file its whole content as one.

    Raises FileNotFoundError without the file, ValueError if it is no UTF-8, for a line (named by its number) that is
    not such an object, and if there is no text at all.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no text file at {file}")
    content = file.read_bytes().removeprefix(BOM)
    texts = []
    if file.suffix in (".jsonl", ".json"):
        for number, line in enumerate(content.rstrip().splitlines(), start=1):
            try:
                text = json.loads(line)["text"]
                text.encode()  # JSON can spell half a surrogate pair, which is no text
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{file}, line {number}: not a JSON object with a string 'text'") from None
            texts.append(text)
    else:
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not UTF-8 text") from None
    if not any(texts):
        raise ValueError(f"{file} holds no text")
    return texts


def own_text() -> list[str]:
    """The built-in sample of text: this program's README and sources."""
    directory = Path(__file__).parent
    files = (directory / "README.md", *sorted(directory.glob("*.py")), *sorted(directory.glob("ops/*.py")))
    return [file.read_text(encoding="utf-8") for file in files]


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
    """At most batch_size neighbours of one length at a time: without padding, every forward is that of an empty cache."""
    start = 0
    for end in range(1, len(windows) + 1):
        if end == len(windows) or end - start == batch_size or len(windows[end]) != len(windows[start]):
            yield windows[start:end]
            start = end
