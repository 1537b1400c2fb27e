"""Several processes share a list of prompts: who this one is, what it takes, and how all of them end together.

Each rank is a whole model, on a GPU of its own. torchrun starts them, and a store of keys and values that it has is all
that they share: a counter of what was taken, and how far each is.
"""

import argparse
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from files import MAX_JSON

START_SECONDS = 300  # in which all ranks have to have come
# In which a rank that is waited for has to tell something, by what it does; it tells every second, and at each change
SECONDS = {"loading": 1800, "prefill": 600, "decoding": 60, "waiting": 60, "merging": 600, "left": float("inf")}
TOLD = 1  # seconds between
SHARE = 4  # a rank takes at once what is left, divided by this and by the number of ranks
TOGETHER = 16  # samples of a prompt that one rank takes together at most

Key = tuple[int, int]  # a prompt and a sample


class Status(NamedTuple):
    """What a rank tells the others: a count of the times, where it is, what it does, and what it has made."""

    count: int
    host: str
    state: str  # of SECONDS
    rows: int
    tokens: int


def join(args: argparse.Namespace) -> "Ranks | None":
    """The ranks that torchrun started with this one, once all are there; None without it, or where this is the only one.

    `args` are generate.py's; its device becomes this rank's. Raises ValueError, on all ranks, for options that don't go
    with several, and for a difference between theirs.
    """
    count = _of_environment("WORLD_SIZE", 1)
    if count == 1:
        return None
    rank, local = _of_environment("RANK"), _of_environment("LOCAL_RANK")
    refused = dict(interactive=args.interactive, profile=args.profile is not None, num_beams=args.num_beams > 1)
    for name, is_given in refused.items():
        if is_given:
            raise ValueError(f"several ranks take no --{name}")
    if args.output is None:
        raise ValueError("several ranks need --output FILE.jsonl, which they write together")
    if str(args.prompts_file) == "-":
        raise ValueError("several ranks can't share stdin: name a file as --prompts_file")
    ranks = Ranks(_store(rank, count), rank, count)
    ranks.agree(_compared(args))
    if args.device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(f"rank {rank} is number {local} of its host, which has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
        args.device = f"cuda:{local}"
    return ranks


def _of_environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        what = "isn't set" if text is None else f"is {text!r}"
        raise ValueError(f"{name} {what} in the environment: start several ranks by torchrun") from None


def _store(rank: int, count: int):
    """torchrun's store; one of rank 0's where something else has set the environment."""
    from torch.distributed import TCPStore

    host, port = os.environ.get("MASTER_ADDR"), _of_environment("MASTER_PORT")
    if host is None:
        raise ValueError("MASTER_ADDR isn't set in the environment: start several ranks by torchrun")
    own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = timedelta(seconds=START_SECONDS)
    return _asked(TCPStore, host, port, count, own, patience, wait_for_workers=False)


def _asked(function: Callable, *args, **options):
    """What a store answers. Raises ConnectionError without one."""
    try:
        return function(*args, **options)
    except RuntimeError as error:  # its own errors are such
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"the ranks' store can't be reached, its host may be gone: {reason}") from None


def _compared(args: argparse.Namespace) -> dict[str, str]:
    """What has to be the same on all ranks: options, and the contents of the files that they name."""
    values = {name: str(value) for name, value in vars(args).items()}
    for name in ("checkpoint_path", "draft_checkpoint_path"):
        if getattr(args, name) is not None:
            values[name] += f" ({fingerprint(getattr(args, name))})"
    if args.prompts_file is not None and args.prompts_file.is_file():
        values["prompts_file"] += f" ({hashlib.sha256(args.prompts_file.read_bytes()).hexdigest()[:12]})"
    return values


def fingerprint(path: Path) -> str:
    """Of a checkpoint, its settings, tokenizer, and which weights it has, by their files' sizes and headers."""
    found, directory = hashlib.sha256(), path if path.is_dir() else path.parent
    files = [] if not path.exists() else sorted(directory.iterdir())
    for file in files:
        weights = file.suffix == ".safetensors"
        if weights and not path.is_dir() and file != path:
            continue
        if weights or file.suffix in (".json", ".model", ".jinja"):
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little") if weights else 0
                content = stream.read(min(length, MAX_JSON)) if weights else file.read_bytes()
            found.update(f"{file.name} {file.stat().st_size} {len(content)}\n".encode() + content)
    return found.hexdigest()[:12]


class Ranks:
    """All ranks as one of them sees them, through a `store` of torch.distributed."""

    def __init__(self, store, rank: int, count: int, clock: Callable[[], float] = time.monotonic, pause: float = 0.1):
        self.store, self.rank, self.count, self.clock, self.pause = store, rank, count, clock, pause
        self.rows = self.tokens = self.times = 0
        self.state, self.last = "loading", clock()
        self.on_progress: Callable[[int, int], None] | None = None  # gets all ranks' rows and tokens, on rank 0
        self.start = ""
        self.start = self._meet()
        self.tell("loading")

    # --- the start

    def _meet(self) -> str:
        """Waits for all ranks. Returns a name for this start: where torchrun starts ranks once more, its store still has
        what the earlier ones have left. Raises ValueError if one doesn't come."""
        mine, begun = secrets.token_hex(8), self.clock()
        if self.rank == 0:
            self.share("start", mine)
        while True:
            start = mine if self.rank == 0 else self._get("start")  # it may be that of an earlier one, which is over
            if start is not None:
                self.share(f"{start}, rank {self.rank}", mine)
                theirs = [self._get(f"{start}, rank {rank}") for rank in range(self.count if self.rank == 0 else 0)]
                if theirs and None not in theirs:
                    self.share(f"{start}, all", " ".join(theirs))
                if mine in (self._get(f"{start}, all") or "").split():
                    return start
            if self.clock() - begun > START_SECONDS:
                who = f"rank {theirs.index(None)}" if self.rank == 0 else "one of the ranks"
                raise ValueError(f"{who} has not come within {START_SECONDS} seconds")
            time.sleep(self.pause)

    def share(self, name: str, value: str):
        """Gives a value to the other ranks."""
        _asked(self.store.set, self._key(name), value)

    def _get(self, name: str) -> str | None:
        """A value that was given, if it was."""
        known = _asked(self.store.check, [self._key(name)])
        return _asked(self.store.get, self._key(name)).decode() if known else None

    def _key(self, name: str) -> str:
        return f"gemma-fast {self.start}: {name}"

    def shared(self, name: str, of: int = 0) -> str:
        """A value that rank `of` shares, once it does. Raises ValueError if it takes too long."""
        begun = self.clock()
        while (value := self._get(name)) is None:
            if self.clock() - begun > START_SECONDS:
                raise ValueError(f"rank {of} has told no '{name}' within {START_SECONDS} seconds")
            time.sleep(self.pause)
        return value

    def agree(self, values: dict[str, str]):
        """Raises ValueError on all ranks if one has another value than rank 0, naming the first that differs."""
        self.share(f"options of {self.rank}", json.dumps(values))
        first, *others = [json.loads(self.shared(f"options of {rank}", rank)) for rank in range(self.count)]
        self.share(f"comparison of {self.rank}", "")
        for rank in range(self.count if self.rank == 0 else 0):  # the store may be this rank's
            self.shared(f"comparison of {rank}", rank)
        for rank, theirs in enumerate(others, start=1):
            for name in first | theirs:
                if first.get(name) != theirs.get(name):
                    both = f"{first.get(name)} on rank 0 and {theirs.get(name)} on rank {rank}"
                    raise ValueError(f"--{name} has to be the same on all ranks: it is {both}")

    # --- the work

    def deal(self, keys: list[Key]) -> "Deal":
        """What gives this rank its part of `keys`, a list that is the same on all ranks."""
        return Deal(keys, self.count, lambda parts: _asked(self.store.add, self._key("taken"), parts))

    def on_step(self, step: int, runner=None):
        """Tells that this rank is alive; as `on_step` of stream_completions, called before each step and prefill."""
        state = "decoding" if step else "prefill"
        if state != self.state or self.clock() - self.last >= TOLD:
            self.tell(state)

    def made(self, tokens: int):
        """Counts a completion."""
        self.rows, self.tokens = self.rows + 1, self.tokens + tokens

    def tell(self, state: str):
        self.state, self.last, self.times = state, self.clock(), self.times + 1
        status = Status(self.times, socket.gethostname(), state, self.rows, self.tokens)
        self.share(f"status of {self.rank}", json.dumps(status))
        if self.rank == 0 and self.on_progress is not None:
            self.on_progress(*self.total(self.statuses()))

    def statuses(self) -> list[Status]:
        """Of all ranks. They have told one each before they agreed."""
        keys = [self._key(f"status of {rank}") for rank in range(self.count)]
        return [Status(*json.loads(content)) for content in _asked(self.store.multi_get, keys)]

    def total(self, statuses: list[Status]) -> tuple[int, int]:
        """All ranks' rows and tokens."""
        return sum(each.rows for each in statuses), sum(each.tokens for each in statuses)

    # --- the end

    def gather(self) -> tuple[int, int]:
        """Called when this rank's rows are written; on rank 0 returns when all ranks' are, with how many rows and tokens
        they are. Raises ValueError, naming it, for a rank that has told nothing for too long."""
        self.tell("waiting")
        if self.rank:
            return self.rows, self.tokens
        statuses = self._wait(range(1, self.count), ("waiting", "left"))
        self.tell("merging")
        return self.total(statuses)

    def leave(self):
        """Called by rank 0 when the file is written, and by the others to wait for that. Raises as `gather`."""
        if self.rank:
            self._wait([0], ("left",))
        self.tell("left")
        if not self.rank:  # the store may be this rank's
            self._wait(range(1, self.count), ("left",))

    def _wait(self, for_ranks: Collection[int], states: tuple[str, ...]) -> list[Status]:
        heard = {}  # what each rank told last, and when that was first seen
        while True:
            statuses, now = self.statuses(), self.clock()
            if all(statuses[rank].state in states for rank in for_ranks):
                return statuses
            for rank, status in enumerate(statuses):
                if rank not in heard or heard[rank][0] != status.count:
                    heard[rank] = status.count, now
                silence = now - heard[rank][1]
                if rank != self.rank and silence > SECONDS[status.state]:
                    where = f"rank {rank} on {status.host}"
                    raise ValueError(f"{where} was {status.state} and has told nothing for {silence:.0f} seconds")
            if now - self.last >= TOLD:
                self.tell(self.state)
            time.sleep(self.pause)


class Deal:
    """Takes keys from a list that all ranks have, in its order; what one takes no other does.

    A rank's first take is an equal part, as far as there are rows for it. Later ones are the smaller the less is left,
    so that all end at about the same time. `add(n)` adds to a counter that the ranks share and returns its value.
    Samples of a prompt stay together, as far as that is not too much at once.
    """

    def __init__(self, keys: list[Key], ranks: int, add: Callable[[int], int]):
        self.ranks, self.add = ranks, add
        self.first: int | None = -(-len(keys) // ranks)  # None once it is taken
        self.parts: list[list[Key]] = []
        together = min(TOGETHER, len(keys) // (SHARE * ranks))
        for key in keys:
            last = self.parts[-1] if self.parts else None
            if last and last[-1][0] == key[0] and len(last) < together:
                last.append(key)
            else:
                self.parts.append([key])
        self.before = [0, *accumulate(map(len, self.parts))]  # keys in the parts before each
        self.next = 0  # part, as far as this rank knows

    def take(self, waiting: int, free: int, rows: int) -> list[Key]:
        """What comes next on a rank where so many rows, of all, are free, and so many keys wait for one. Nothing, while
        enough do; with none waiting and a row free, nothing but at the end."""
        left = self.before[-1] - self.before[self.next]
        ahead = min(rows, left // (SHARE * self.ranks)) or min(1, free, left)
        if self.first is not None:
            ahead, self.first = min(rows, self.first), None
        elif waiting >= min(free, ahead) and 2 * waiting >= ahead:
            return []
        end, wanted = self.next, self.before[self.next] + ahead - waiting
        while end < len(self.parts) and self.before[end] < wanted:
            end += 1
        if end == self.next:
            return []
        count = end - self.next
        end = self.add(count)
        self.next = min(end, len(self.parts))
        return [key for part in self.parts[end - count : end] for key in part]
