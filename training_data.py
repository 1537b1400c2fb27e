"""What is learned from: JSON lines as documents of tokens, which of these are targets, and documents packed in rows.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}     the answers
    {"prompt": text, "completion": text}     the completion and <eos>; both may be lists of messages
    {"text": text}                           everything but <bos>

A row is `size` tokens long: whole documents, one after another, and padding. Nothing here depends on how many processes
there are: each of them packs all documents and takes its own rows.
"""

import hashlib
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ops.training import IGNORED, Documents
from text import read_objects
from tokenizer import Tokenizer, check_text

FORMS = ({"messages"}, {"prompt", "completion"}, {"text"})
ASSISTANT = ("assistant", "model")


class Document(NamedTuple):
    """Token ids, and for each of them whether it is a target: 1 where the loss counts it, else 0."""

    tokens: array
    learned: bytes


# ---------------------------------------------------------------------------------------------------------------------
# Lines to documents


def read_documents(file: Path, tokenizer: Tokenizer, size: int, everything: bool = False) -> tuple[list[Document], int]:
    """The documents of a file, none longer than `size` tokens: the start of those that are; and how many were cut.

    With `everything` all tokens but <bos> are targets. Documents whose targets were cut off are left out. Raises
    FileNotFoundError, or ValueError for a line (named by its number) of none of the three forms and for a file in which
    nothing is left to learn.
    """
    documents, cut = [], 0
    for where, entry in tqdm(read_objects(file, "training data"), unit=" lines", desc="tokenizing", leave=False):
        try:
            for document in documents_of(entry, tokenizer, everything):
                cut += len(document.tokens) > size
                document = Document(document.tokens[:size], document.learned[:size])
                if any(document.learned[1:]):
                    documents.append(document)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not documents:
        why = f"rows of {size} tokens (--max_length) end before any target" if cut else "it has no targets"
        raise ValueError(f"there is nothing to learn in {file}: {why}")
    return documents, cut


def documents_of(entry: dict, tokenizer: Tokenizer, everything: bool = False) -> list[Document]:
    """What an object of one of the FORMS becomes: one document, or one an answer where the chat template writes earlier
    turns otherwise than the newest. Raises ValueError for any other object."""
    forms = [form for form in FORMS if form <= entry.keys()]
    if len(forms) != 1:
        raise ValueError("not an object with either 'messages', or 'prompt' and 'completion', or 'text'")
    if "text" in forms[0]:
        check_text(entry["text"], "'text'")
        tokens = [*tokenizer.encode(entry["text"]), tokenizer.eos_id]
        return [_document(tokens, [(1, len(tokens))], everything)]
    if "messages" in forms[0]:
        return _chat(entry["messages"], 0, tokenizer, everything)
    prompt, completion = entry["prompt"], entry["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(prompt + completion, len(prompt), tokenizer, everything)
    check_text(prompt, "'prompt'")
    check_text(completion, "'completion'")
    # Apart: where pieces would merge across the border, no one could say which side they are of
    head = tokenizer.encode(prompt)
    tokens = [*head, *tokenizer.encode(completion, bos=False), tokenizer.eos_id]
    return [_document(tokens, [(len(head), len(tokens))], everything)]


def _document(tokens: list[int], spans: list[tuple[int, int]], everything: bool) -> Document:
    """That of tokens of which those in spans [start, end), or with `everything` all but the first, are targets."""
    learned = bytearray(len(tokens))
    for start, end in [(1, len(tokens))] if everything else spans:
        learned[start:end] = b"\1" * (end - start)
    return Document(array("i", tokens), bytes(learned))


def _chat(messages: list[dict], start: int, tokenizer: Tokenizer, everything: bool) -> list[Document]:
    """Targets are what the assistant says in messages[start:], each time with the token that ends its turn.

    What a model is given before an answer is what `encode_chat` makes of the messages before it. Thoughts are left out,
    as it leaves out those of earlier answers.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"messages must be a list of objects with 'role' and 'content', not {messages!r}")
    answers = [i for i, message in enumerate(messages) if i >= start and message.get("role") in ASSISTANT]
    if not answers:
        raise ValueError("no message is the assistant's: there is nothing to learn")
    heads = [tokenizer.encode_chat(messages[:i]) for i in answers]
    # A turn of the user closes the last answer as it closes all others
    after = {"role": "user", "content": "."}
    whole = tokenizer.encode_chat([*messages[: answers[-1] + 1], after])
    spans = [(len(head), _end_of_turn(whole, len(head), tokenizer)) for head in heads]
    if all(whole[: len(head)] == head for head in heads):
        return [_document(whole[: spans[-1][1]], spans, everything)]
    documents = []
    for i, head in zip(answers, heads):
        whole = tokenizer.encode_chat([*messages[: i + 1], after])
        begins = [at for at, token in enumerate(whole) if token == tokenizer.start_of_turn]
        begin = begins[-3]  # of the answer; the turns behind it are `after`, and the head of what would follow
        own = head[len(head) - 1 - head[::-1].index(tokenizer.start_of_turn) :]
        same = next((n for n, pair in enumerate(zip(own, whole[begin:])) if pair[0] != pair[1]), len(own))
        answer = whole[begin + same : _end_of_turn(whole, begin, tokenizer)]
        documents.append(_document(head + answer, [(len(head), len(head) + len(answer))], everything))
    return documents


def _end_of_turn(tokens: list[int], start: int, tokenizer: Tokenizer) -> int:
    """Behind the token that ends the turn in which tokens[start] is."""
    return tokens.index(tokenizer.end_of_turn, start) + 1 if tokenizer.end_of_turn in tokens[start:] else len(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Documents to rows


def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Rows of documents, by their indices, whose lengths sum up to at most `size`: best-fit decreasing, the longest
    first, each into the fullest row that has room."""
    rows, room = [], []  # room: (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[index], -1))
        left, row = room.pop(at) if at < len(room) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if left > lengths[index]:
            insort(room, (left - lengths[index], row))
    return rows


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model at once, one behind another: M = rows * size tokens.

    tokens, targets and position [M]: ids, the id that each token predicts (IGNORED: none that counts), and its place in
    its document. `lengths` are the documents', padding, which is one a row, included; `n_tokens` and `n_targets` count
    without it.
    """

    tokens: Tensor
    targets: Tensor
    position: Tensor
    documents: Documents
    lengths: list[int]
    n_tokens: int
    n_targets: int


class Data:
    """Documents packed in rows of `size` tokens, in the order that `seed` draws anew for each epoch."""

    def __init__(self, documents: list[Document], size: int, seed: int = 0, pad_id: int = 0):
        self.documents, self.size, self.seed, self.pad_id = documents, size, seed, pad_id
        self.rows = pack([len(document.tokens) for document in documents], size)
        self.epoch, self.order = None, []  # the order of the rows in that epoch

    @property
    def fingerprint(self) -> str:
        """Of documents, targets and rows."""
        digest = hashlib.sha256(str(self.size).encode())
        for document in self.documents:
            digest.update(document.tokens.tobytes() + document.learned)
        return digest.hexdigest()[:16]

    @property
    def n_tokens(self) -> int:
        return sum(len(document.tokens) for document in self.documents)

    @property
    def n_targets(self) -> int:
        return sum(sum(document.learned[1:]) for document in self.documents)

    def row(self, place: int) -> list[Document]:
        """The documents of row `place` of all epochs' rows, one epoch behind another."""
        epoch, index = divmod(place, len(self.rows))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.rows), generator=generator).tolist()
        return [self.documents[each] for each in self.rows[self.order[index]]]

    def targets_in(self, places: range) -> int:
        return sum(sum(document.learned[1:]) for place in places for document in self.row(place))

    def batches(self, places: range, rank: int, ranks: int, at_once: int, device: torch.device) -> Iterator[Batch]:
        """Those of the rows `places` that are this rank's, every ranks-th, `at_once` of them at a time.

        Each rank gets as many batches: rows of padding alone make up for those that are missing.
        """
        mine = list(places[rank::ranks])
        mine += [None] * (-(-len(places) // ranks) - len(mine))
        for start in range(0, len(mine), at_once):
            rows = [[] if place is None else self.row(place) for place in mine[start : start + at_once]]
            yield self.batch(rows, device)

    def batch(self, rows: list[list[Document]], device: torch.device) -> Batch:
        parts = []
        for row in rows:
            parts += [(document.tokens, document.learned) for document in row]
            padding = self.size - sum(len(document.tokens) for document in row)
            if padding:
                parts.append((array("i", [self.pad_id]) * padding, bytes(padding)))
        lengths = [len(tokens) for tokens, _ in parts]
        ends = list(accumulate(lengths))
        tokens = torch.tensor(array("i", chain.from_iterable(tokens for tokens, _ in parts)), dtype=torch.long)
        learned = torch.tensor(bytearray(b"".join(learned for _, learned in parts)), dtype=torch.bool)
        starts = torch.tensor([0, *ends[:-1]])
        position = torch.arange(len(tokens)) - starts.repeat_interleave(torch.tensor(lengths))
        targets = torch.where(learned & (position > 0), tokens, IGNORED).roll(-1)  # the first is none: see `position`
        documents = Documents.of(lengths, device)
        counts = sum(len(document.tokens) for row in rows for document in row), int((targets != IGNORED).sum())
        on_device = (x.to(device, non_blocking=True) for x in (tokens, targets, position))
        return Batch(*on_device, documents, lengths, *counts)
