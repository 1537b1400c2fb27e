"""Several processes that make one run: who this one is, what it takes, what it is told, and how all of them end together.

Ranks are copies of a model, each on a GPU of its own, or groups of `--tp` of them share one (parallel.py). torchrun starts
them. A store of keys and values that it has is all that copies share: a counter of what was taken, and how far each is.
The first rank of a group asks for all of it.
"""

import argparse
import hashlib
import io
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from adapter import FACTORS_NAME
from cli import print_error
from files import MAX_JSON
from parallel import START_SECONDS, Sums, agreed, asked, close, init, of_environment, own_device, store_of

# In which a rank has to go on with what it does. `recording` is a graph's, of kernels that may have to be compiled
SECONDS = {"loading": 1800, "prefill": 300, "recording": 300, "decoding": 45, "waiting": 45, "merging": 600}
SECONDS |= {"reading": float("inf"), "left": float("inf")}
ALIVE = 30  # and to tell, from a thread of its own, that it is there
TOLD = 1  # seconds between
SHARE = 4  # samples of a prompt that one rank takes together are at most a rank's part of all, divided by this
REFILLED = 16  # a rank takes more once one in so many of its rows is free
TOGETHER = 16  # samples of a prompt that one rank takes together at most
INTERRUPTED = "Ctrl-C"

Key = tuple[int, int]  # a prompt and a sample


class Status(NamedTuple):
    """What a rank tells the others: two counts, of the times and of its steps, sums with others included, where it is,
    what it does, what it has made, and why it has failed."""

    times: int
    steps: int
    host: str
    state: str  # of SECONDS
    rows: int
    tokens: int
    error: str


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[tuple["Ranks", Sums | None]]:
    """All ranks, and what joins those that share a model, for a run of a program with `args`: its `tp`, and its device,
    which becomes this rank's. Only the first rank has stdin, stdout and stderr.

    Raises ValueError, on all ranks, for a difference between theirs. If one of them fails or hangs, all others end with
    a line that says so.
    """
    rank, count = of_environment("RANK"), of_environment("WORLD_SIZE")
    ranks = Ranks(store_of("ranks"), rank, count, args.tp)
    ranks.look_after()
    try:
        ranks.agree(_compared(args))
        with ExitStack() as stack:
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            stack.enter_context(ranks.input())
            if args.device != "cpu":
                args.device = own_device(args.device)
            ranks.sums = sums = init(args.tp, args.device, ranks.start)
            yield ranks, sums
            sys.stdout.flush()
            ranks.tell("waiting")
            close(sums)
            ranks.leave()
            if sums is not None and sums.device.type == "cuda":
                sys.stderr.flush()
                os._exit(0)  # as `close` wants it
    except BaseException as error:
        ranks.fail(error)
        raise


def _compared(args: argparse.Namespace) -> dict[str, str]:
    """What has to be the same on all ranks: options, and the contents of the files that they name."""
    values = {name: str(value) for name, value in vars(args).items()}
    for name, value in vars(args).items():
        if not isinstance(value, Path) or name in ("output", "profile"):
            continue
        if value.is_dir() or value.suffix == ".safetensors":
            values[name] += f" ({fingerprint(value)})"
        elif value.is_file():
            values[name] += f" ({hashlib.sha256(value.read_bytes()).hexdigest()[:12]})"
    return values


def fingerprint(path: Path) -> str:
    """Of a checkpoint, its settings, tokenizer, and which weights it has, by their files' sizes and headers; of an
    adapter, its settings and factors."""
    found, directory = hashlib.sha256(), path if path.is_dir() else path.parent
    files = [] if not path.exists() else sorted(directory.iterdir())
    for file in files:
        weights = file.suffix == ".safetensors"
        if weights and not path.is_dir() and file != path:
            continue
        whole = file.suffix in (".json", ".model", ".jinja") or file.name == FACTORS_NAME
        if weights or whole:
            with open(file, "rb") as stream:
                length = 0 if whole else int.from_bytes(stream.read(8), "little")
                content = stream.read() if whole else stream.read(min(length, MAX_JSON))
            found.update(f"{file.name} {file.stat().st_size} {len(content)}\n".encode() + content)
    return found.hexdigest()[:12]


class Ranks:
    """All ranks as one of them sees them, through a `store` of torch.distributed. `shared` of them, one after another,
    are a replica, which has one model."""

    def __init__(
        self,
        store,
        rank: int,
        count: int,
        shared: int = 1,
        clock: Callable[[], float] = time.monotonic,
        pause: float = 0.02,
    ):
        self.store, self.rank, self.count, self.clock, self.pause = store, rank, count, clock, pause
        self.replica, self.member, self.replicas, self.together = rank // shared, rank % shared, count // shared, shared
        self.sums: Sums | None = None
        self.rows = self.tokens = self.times = self.steps = self.deals = 0
        self.state, self.error, self.runner = "loading", "", None
        self.on_progress: Callable[[int, int], None] | None = None  # gets all ranks' rows and tokens, on rank 0
        self.heard = {}  # of each rank its two counts, and when they were seen first
        self.telling, self.ending, self.over = threading.Lock(), threading.Lock(), threading.Event()
        self.stderr = sys.stderr
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
        asked(self.store.set, self._key(name), value)

    def _get(self, name: str) -> str | None:
        """A value that was given, if it was."""
        known = asked(self.store.check, [self._key(name)])
        return asked(self.store.get, self._key(name)).decode() if known else None

    def _key(self, name: str) -> str:
        return f"gemma-fast {self.start}: {name}"

    def shared(self, name: str, of: int = 0, seconds: float = START_SECONDS) -> str:
        """A value that rank `of` shares, once it does. Raises ValueError if it takes longer."""
        begun = self.clock()
        while (value := self._get(name)) is None:
            if self.clock() - begun > seconds:
                raise ValueError(f"rank {of} has told no '{name}' within {seconds} seconds")
            time.sleep(self.pause)
        return value

    @contextmanager
    def input(self) -> Iterator[None]:
        """Within, stdin is what the first rank's is, on all of them."""
        kept = sys.stdin
        sys.stdin = None if kept is None else _Input(self, kept)
        try:
            yield
        finally:
            sys.stdin = kept

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

    def deal(self, keys: list[Key], rows: int) -> "Deal":
        """What gives this rank's replica its part of `keys`, a list that is the same on all ranks, where each has `rows`
        rows at most."""

        self.deals += 1
        key = self._key(f"taken of {self.deals}")

        def add(parts: int) -> int:
            return agreed(self.sums, 0 if self.member else asked(self.store.add, key, parts))

        return Deal(keys, self.replicas, rows, add)

    def on_step(self, step: int, runner=None):
        """Counts a step; as `on_step` of stream_completions, called before each step and prefill."""
        self.steps, self.runner = self.steps + 1, runner
        self.state = "decoding" if step else "prefill"

    def made(self, tokens: int):
        """Counts a completion."""
        self.rows, self.tokens = self.rows + 1, self.tokens + tokens

    def tell(self, state: str | None = None):
        """Tells what this rank does: something else, or that it is still there."""
        with self.telling:
            if state is not None:
                self.state, self.steps = state, self.steps + 1
            self.times += 1
            now = "recording" if self.runner is not None and self.runner.recording else self.state
            steps = self.steps + (0 if self.sums is None else self.sums.calls)
            made = socket.gethostname(), now, self.rows, self.tokens, self.error
            self.share(f"status of {self.rank}", json.dumps((self.times, steps, *made)))

    def statuses(self) -> list[Status]:
        """Of all ranks. They have told one each before they agreed."""
        keys = [self._key(f"status of {rank}") for rank in range(self.count)]
        return [Status(*json.loads(content)) for content in asked(self.store.multi_get, keys)]

    def total(self, statuses: list[Status]) -> tuple[int, int]:
        """All ranks' rows and tokens."""
        return sum(each.rows for each in statuses), sum(each.tokens for each in statuses)

    # --- the end

    def gather(self) -> tuple[int, int]:
        """Called when this rank's rows are written; on rank 0 returns when all ranks' are, with how many rows and tokens
        they are. Raises as `check`."""
        self.tell("waiting")
        if self.rank:
            return self.rows, self.tokens
        statuses = self._wait(range(1, self.count), ("waiting", "left"))
        self.tell("merging")
        return self.total(statuses)

    def leave(self):
        """Called by rank 0 when all is written, and by the others to wait for that. Raises as `check`."""
        if self.rank:
            self.tell("waiting")
            self._wait([0], ("left",))
            self.over.set()
        self.tell("left")
        if not self.rank:  # the store may be this rank's
            self._wait(range(1, self.count), ("left",))
            self.over.set()

    def _wait(self, for_ranks: Collection[int], states: tuple[str, ...]) -> list[Status]:
        while True:
            statuses = self.statuses()
            if all(statuses[rank].state in states for rank in for_ranks):
                return statuses
            self.check(statuses)
            self.steps += 1
            time.sleep(self.pause)

    def check(self, statuses: list[Status], alive: float | None = None):
        """Raises ConnectionError, naming it, for a rank that has failed, that hangs, or of which nothing was heard for so
        many seconds (None: ALIVE)."""
        now, hanging, alive = self.clock(), None, ALIVE if alive is None else alive
        if self.sums is not None and (lost := self.sums.lost()) is not None:
            where = f"rank {self.rank - self.sums.shard.rank + lost} on {statuses[self.rank].host}"
            raise ConnectionError(f"{where} left a sum without its part")
        for rank, status in enumerate(statuses):
            if rank != self.rank and status.error:
                raise ConnectionError(status.error)
            times, told, steps, gone_on = self.heard.get(rank, (None,) * 4)
            told, gone_on = (told if times == status.times else now), (gone_on if steps == status.steps else now)
            self.heard[rank] = status.times, told, status.steps, gone_on
            if rank != self.rank and now - told > alive and status.state != "left":
                where = f"rank {rank} on {status.host}"
                raise ConnectionError(f"{where} is gone: it was {status.state}, {now - told:.0f} seconds ago")
            if now - gone_on > SECONDS[status.state]:
                hanging = rank
        if hanging is not None:  # who waits for another one of its model has made as many steps at least
            first = hanging - hanging % self.together
            steps = {rank: statuses[rank].steps for rank in range(first, first + self.together)}
            behind = [rank for rank in steps if steps[rank] == min(steps.values())]
            names = " and ".join(f"rank {rank} on {statuses[rank].host}" for rank in behind)
            state, seconds = statuses[behind[0]].state, now - self.heard[hanging][3]
            raise ConnectionError(f"{names} did nothing for {seconds:.0f} seconds, while {state}")

    def look_after(self):
        """From now on a thread tells that this rank is there, and ends the process when another one isn't."""
        threading.Thread(target=self._look_after, daemon=True).start()

    def _look_after(self):
        while not self.over.wait(TOLD):
            try:
                self.tell()
                statuses = self.statuses()
                if self.on_progress is not None:
                    self.on_progress(*self.total(statuses))
                self.check(statuses)
            except ConnectionError as error:
                with self.ending:  # if it is the first to say so
                    if not self.over.is_set():
                        self._end(error, 130 if str(error).endswith(f": {INTERRUPTED}") else 1)

    def _end(self, error: BaseException, status: int):
        """Ends the process at once, whatever its other threads or its GPU wait for, with one line, or none if status is
        that of Ctrl-C."""
        self._give_up(error)
        with redirect_stderr(self.stderr), suppress(OSError, ValueError):
            if status != 130:
                print_error(error)
            self.stderr.flush()
        os._exit(status)

    def _give_up(self, error: BaseException):
        """Tells the others why this rank ends, and waits until they know, for a few seconds at most."""
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        text = INTERRUPTED if isinstance(error, KeyboardInterrupt) else f"{kind}{error}"
        known = isinstance(error, ConnectionError)  # which names another rank
        self.error = text if known else f"rank {self.rank} on {socket.gethostname()} has failed: {text}"
        with suppress(ConnectionError):
            self.tell()
            self._until(lambda each: each.error or each.state == "left")
            self.tell("left")
            if self.rank == 0:  # the store may be this rank's
                self._until(lambda each: each.state == "left")

    def _until(self, known: Callable[[Status], bool]):
        end = time.monotonic() + 4 * TOLD
        while time.monotonic() < end and not all(map(known, self.statuses())):
            time.sleep(self.pause)

    def fail(self, error: BaseException):
        """Tells the others that this rank has failed by `error`. Where ranks share a model the process ends: it might
        wait for them for ever."""
        if isinstance(error, ConnectionError):
            time.sleep(3 * TOLD)  # one that is gone tells nothing more
            try:
                self.check(self.statuses(), alive=2 * TOLD)
            except ConnectionError as reason:
                error = reason
        with self.ending:
            self.over.set()
        if self.sums is None:
            self._give_up(error)
            return
        known = isinstance(error, (OSError, ValueError, MemoryError, KeyboardInterrupt))
        if not known:
            traceback.print_exception(error, file=self.stderr)
        self._end(error, 130 if isinstance(error, KeyboardInterrupt) else 2 if known else 1)


class _Input(io.TextIOBase):
    """stdin of several ranks: the first one reads it and shares each line, or all that is left, as it comes."""

    def __init__(self, ranks: Ranks, own):
        self.ranks, self.own, self.count = ranks, own, 0
        self.buffer = self  # bytes of it are read as a whole

    def isatty(self) -> bool:
        return self.ranks.rank == 0 and self.own.isatty()

    def readline(self, size: int = -1) -> str:
        return self._shared(self.own.readline)

    def read(self, size: int = -1) -> bytes:
        return self._shared(lambda: self.own.buffer.read().decode("utf-8", "surrogateescape")).encode(
            "utf-8", "surrogateescape"
        )

    def _shared(self, read: Callable[[], str]) -> str:
        ranks, name = self.ranks, f"input {self.count}"
        self.count += 1
        ranks.tell("reading")
        if ranks.rank == 0:
            text = read()
            ranks.share(name, json.dumps(text))
        else:
            text = json.loads(ranks.shared(name, seconds=float("inf")))
        ranks.tell("loading")
        return text


class Deal:
    """Takes keys from a list that all ranks have, in its order; what one takes no other does.

    A rank's first take is an equal part, as far as there are rows for it: every `ranks`th of those that are taken at
    first, so that none has all of the longest. Later ones are the smaller the less is left, so that all end at about the
    same time. `add(n)` adds to a counter that the ranks share and returns its value. Samples of a prompt stay together,
    as far as that is not too much at once.
    """

    def __init__(self, keys: list[Key], ranks: int, rows: int, add: Callable[[int], int]):
        self.ranks, self.add = ranks, add
        self.first: int | None = min(rows, -(-len(keys) // ranks))  # None once it is taken
        self.parts: list[list[Key]] = []
        together = min(TOGETHER, len(keys) // (SHARE * ranks))
        for key in keys:
            last = self.parts[-1] if self.parts else None
            if last and last[-1][0] == key[0] and len(last) < together:
                last.append(key)
            else:
                self.parts.append([key])
        at_first = bisect_right(list(accumulate(map(len, self.parts))), self.first * ranks)
        self.parts[:at_first] = [part for rank in range(ranks) for part in self.parts[rank:at_first:ranks]]
        self.before = [0, *accumulate(map(len, self.parts))]  # keys in the parts before each
        self.next = 0  # part, as far as this rank knows

    def take(self, waiting: int, free: int, rows: int) -> list[Key]:
        """What comes next on a rank where so many rows, of all, are free, and so many keys wait for one. Nothing, while
        enough do, nor before a part of the rows is free, lest another rank's should be sooner; with none waiting and all
        rows free, nothing but at the end."""
        left = self.before[-1] - self.before[self.next]
        count = min(free, left // self.ranks) or min(1, free, left)
        if REFILLED * free < rows:
            count = 0
        if self.first is not None:
            count, self.first = min(rows, self.first), None
        end, wanted = self.next, self.before[self.next] + count - waiting
        while end < len(self.parts) and self.before[end] < wanted:
            end += 1
        if end == self.next:
            return []
        count = end - self.next
        end = self.add(count)
        self.next = min(end, len(self.parts))
        return [key for part in self.parts[end - count : end] for key in part]
