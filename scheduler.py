"""Which request runs in which row and when: rows are refilled as they finish. Host logic alone, without torch."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import NamedTuple

from config import PAGE
from pages import Held
from sampling import Sampling, noise_of
from speculate import Pace

CHUNK = 8192  # tokens of prompts, padding included, that one prefill takes at most
PADDING = 1.25  # times its prompts' tokens that a prefill may be padded to, where prompts are padded,
SMALL = 512  # or this many tokens
SHARE = 16  # a refill is due when one of so many rows is free
SHARED = 1024  # tokens that need not be read again in a step, for which attention takes a prefix that rows share apart
SHRINK = 64  # steps that are left at least when rows are moved together so that fewer run
LAGS = {"every": 0, "ping-pong": 1, "never": inf}  # events that may be under way when the log is read


@dataclass(frozen=True)
class Request:
    """One completion of one prompt. `key`, of a prompt and a sample, tells it from others. Samples of a prompt have the
    same list, and follow each other."""

    key: tuple[int, int]
    prompt: list[int]  # token ids
    max_new_tokens: int
    sampling: Sampling
    seed: tuple[int, int] = (0, 0)  # and a prompt's number: with the sample's, what picks the noise
    stops: Callable[[list[int]], bool] | None = None  # whether these new tokens end it: asked after each

    def noise(self, streams: int) -> list[float]:
        """So many numbers for each new token."""
        count = streams * self.max_new_tokens
        return noise_of(*self.seed, self.key[1], count) if self.sampling.temperature else []

    @property
    def tokens(self) -> int:
        """How many it may have in the cache."""
        return len(self.prompt) + self.max_new_tokens


@dataclass
class Running:
    """A request in a row: its pages and its ring in the cache, its tokens so far, and the events of the chain between
    which they come."""

    request: Request
    row: int
    ring: int
    held: Held
    first: float = inf
    tokens: list[int] = field(default_factory=list)
    last: float = inf
    planned: int = 1  # tokens that it has after all events so far at least, unless it stops
    drafted: int = 0  # tokens of prompt and text that a draft model has in its cache


class Piece(NamedTuple):
    """What a prefill computes for a row: tokens [begin, end) of its prompt; with the last of them the row starts.

    Of several samples of a prompt in one prefill only the first is computed: it is the `leader` of the others, a number
    of a piece. `snapshot` is the ring that a row's is first copied from, for tokens before `begin` that other prompts
    have left, and `keep` the one that it is copied to at the end.
    """

    running: Running
    begin: int
    end: int
    leader: int | None = None
    snapshot: int | None = None
    keep: int | None = None

    @property
    def prompt(self) -> list[int]:
        return self.running.request.prompt

    @property
    def ends(self) -> bool:
        return self.end == len(self.prompt)


class Scheduler:
    """Runs requests, in their order, on the rows of a `runner.Runner`, which has been started for that many rows.

    A request starts when a row is free, and pages for all the tokens it may have: nothing that runs ever has to give
    way. Finished rows are refilled together, a sixteenth of all at a time: a prefill of one prompt takes little less
    than that of some. A row whose limit is reached is refilled without waiting for the log; one that stops is known a
    step late. Requests of one prompt that start together share what is computed of it, and so do, through the runner's
    `Pages`, prompts that begin with the same pages.

    Where several schedulers share a list, `requests` is a function: of how many wait, how many rows are free and how many
    there are, it gives those to take now. With none waiting and all rows free, nothing means that the list is at its end.
    """

    def __init__(
        self,
        runner,
        model,
        requests: Iterable[Request] | Callable[[int, int, int], Iterable[Request]],
        rows: int,
        check: str = "ping-pong",
        pace: Pace | None = None,
    ):
        self.runner, self.model, self.rows, self.lag = runner, model, rows, LAGS[check]
        if pace is not None:
            pace.seconds = runner.step_seconds
        self.pace, self.runs = pace, deque()  # tokens a row of the events that were not read yet, 0 for prefills
        self.behind = False  # whether a draft model has not met all tokens
        self.ended: Running | None = None  # the only request, once it has ended, if its pages and a draft model stay
        self.pages = runner.pages
        self.requests = requests if callable(requests) else iter(requests)
        self.waiting = deque()  # those that come next, one a row at most, were taken
        self.free, self.rings = list(range(rows)), list(range(rows))
        self.running: list[Running] = []
        self.kept: Held | None = None  # pages of the only request that stay its caller's
        self.retired: list[int] = []  # rows that have to be ended on the device
        self.changed = False  # whether other rows run than when their groups were told to the runner
        self.steps = 0
        self.drafts, self.right = Counter(), Counter()  # that mattered, by their place, and those that were right
        self.drafted = Counter()  # steps, by the tokens a row that they took

    def run(
        self,
        on_step: Callable | None = None,
        on_token: Callable | None = None,
        cached: int = 0,
        held: Held | None = None,
    ) -> Iterator:
        """Yields (request, new tokens) as completions finish.

        on_step(0, runner) is called before each prefill, on_step(i, runner) before decode step i; on_token gets each
        new token. A single request may continue what is in the cache: the first `cached` tokens of its prompt, in pages
        that the caller holds and keeps.
        """
        self.kept = held
        try:
            self._look_ahead()
            while self.waiting or self.running:
                prefills = 0
                for pieces in self._prefills(cached):
                    prefills += 1
                    if on_step is not None:
                        on_step(0, self.runner)
                    self._admit(pieces)
                    yield from self._read(on_token)
                if self._steps_left():
                    if self._fewer():
                        yield from self._read(on_token, lag=0)
                    tokens = self.pace.next() if self.pace else 1
                    if tokens > 1 and self.behind:
                        yield from self._read(on_token, lag=0)
                        self._catch_up([each for each in self.running if each.first < inf == each.last], 2)
                    self.steps += 1
                    if on_step is not None:
                        on_step(self.steps, self.runner)
                    self._step(self._fewer(), tokens)
                    yield from self._read(on_token)
                elif not prefills:
                    yield from self._read(on_token, lag=0)
                if not self.running:
                    self._look_ahead()
            if self.ended is not None:
                self._catch_up([self.ended], 1)
        finally:
            for each in self.running:
                if each.last == inf:
                    self._give_back(each)

    def _look_ahead(self, starting: int = 0):
        """Takes what comes next, where so many rows that are free will not be in a moment."""
        if callable(self.requests):
            self.waiting.extend(self.requests(len(self.waiting), len(self.free) - starting, self.rows))
            return
        self.waiting.extend(islice(self.requests, self.rows - len(self.waiting)))

    def _due(self) -> int:
        """How many requests start now: as many as rows and pages are free for, if those are enough."""
        enough = max(1, min(len(self.waiting), self.rows // SHARE))
        idle = all(each.last < inf for each in self.running)
        if len(self.free) < enough and not idle:
            return 0
        count, pages, prompt = 0, self.pages.free, None
        for request in islice(self.waiting, len(self.free)):
            pages -= self.pages.needed(request.prompt, request.tokens, request.prompt is prompt)
            if pages < 0:
                break
            count, prompt = count + 1, request.prompt
        return max(count, 1) if count >= enough or (idle and self.waiting) else 0

    def _prefills(self, cached: int) -> Iterator[list[Piece]]:
        """Pieces of the prompts that start now, at most CHUNK tokens at a time. Each list has to be admitted before the
        next one is made, which may share its pages."""
        requests = [self.waiting.popleft() for _ in range(self._due())]
        self._look_ahead(len(requests))
        queue = deque(sorted(requests, key=lambda request: len(request.prompt)))
        self.free.sort(reverse=True)
        cut = None  # the last piece, if its prompt goes on
        while queue:
            pieces, leaders, tokens, longest, filling = [], [], 0, 0, set()
            while queue:
                request = queue[0]
                if leaders and pieces[leaders[-1]].prompt is request.prompt:  # a sample of it
                    leader = pieces[leaders[-1]]
                    running = self._take(queue.popleft(), leader.running.held)
                    pieces.append(Piece(running, leader.begin, leader.end, leaders[-1]))
                    continue
                if cut is not None:
                    begin = cut.end
                else:
                    begin = self.pages.match(request.prompt) if self.kept is None else cached
                shared = 0 if begin or self.kept is not None else self._shared_with_others(request, queue)
                end = min(shared or len(request.prompt), begin + CHUNK)
                total, longest = tokens + end - begin, max(longest, end - begin)
                page = tuple(request.prompt[: begin + PAGE]) if self.pages.caching else None
                if pieces and (page in filling or not fits(total, len(leaders) + 1, longest, self.runner.packs)):
                    break
                running = cut.running if cut is not None else self._take(request, None)
                snapshot = running.held.snapshot if cut is None else None
                keep = self._ring_to_keep() if end == shared else None
                piece = Piece(running, begin, end, None, snapshot, keep)
                leaders.append(len(pieces))
                pieces.append(piece)
                tokens = total
                if page is not None and end - begin >= PAGE:
                    filling.add(page)
                cut = None if piece.ends else piece
                if cut is not None:
                    break
                queue.popleft()
            yield pieces

    def _shared_with_others(self, request: Request, queue: deque) -> int:
        """How many tokens at the beginning of a prompt are worth a snapshot of its ring, for prompts that come after
        it: 0 where there are no rings, or none is."""
        if not (self.pages.caching and self.pages.needs_snapshot):
            return 0
        others = [other for other in queue if other.prompt is not request.prompt]
        counts = sorted((_common(request.prompt, other.prompt) for other in [*others, *self.waiting]), reverse=True)
        saved, tokens = max(((tokens * i, tokens) for i, tokens in enumerate(counts, start=1)), default=(0, 0))
        return tokens if saved >= SMALL else 0

    def _ring_to_keep(self) -> int:
        """A ring for a snapshot: one that is free, or that of the snapshot that was not used for longest."""
        free = self.runner.free_rings
        return free.pop() if free else self.pages.evict_snapshot()

    def _take(self, request: Request, like: Held | None) -> Running:
        """A row, a ring and pages for a request, of which some may be those of one that is alike."""
        held = self.pages.take(request.prompt, request.tokens, like) if self.kept is None else self.kept
        running = Running(request, self.free.pop(), self.rings.pop(), held)
        self.running.append(running)
        return running

    def _catch_up(self, running: list[Running], spare: int):
        """Has the draft model's cache filled with what it has not met of these, but for the last `spare` tokens: those
        that drafts begin with, or the one that the other cache lacks, too. The log has been read."""
        pieces = []
        for each in running:
            text = each.request.prompt + each.tokens
            if each.drafted < len(text) - spare:
                pieces.append((each, each.drafted, text[each.drafted : -spare]))
        while pieces:
            tokens, count = len(pieces[0][2]), 1
            while count < len(pieces) and tokens + len(pieces[count][2]) <= CHUNK:
                tokens, count = tokens + len(pieces[count][2]), count + 1
            self.runner.catch_up(pieces[:count])
            self.runs.append(0)
            pieces = pieces[count:]
        self.behind = False

    def _admit(self, pieces: list[Piece]):
        event = self.runner.events
        self.runner.admit(self.model, pieces, self.retired)
        self.runs.append(0)
        self.retired = []
        for piece in pieces:
            if piece.leader is None and (piece.ends or piece.keep is not None):
                self.pages.register(piece.running.held)
            if piece.keep is not None:
                self.pages.attach(piece.running.held, piece.end, piece.keep)
            if piece.ends:
                piece.running.first, self.changed = event, True
                piece.running.drafted = len(piece.prompt)
        self._release()

    def _steps_left(self) -> int:
        """How many tokens, and so steps, are to come at most, of what runs now."""
        return max((each.request.max_new_tokens - each.planned for each in self.running), default=0)

    def _fewer(self) -> int:
        """How many rows steps need have from now on, if those are half as many at most; else 0."""
        run = self.pace.tokens(self.pace.current) if self.pace else 1
        if self.waiting or self._steps_left() < SHRINK * run:
            return 0
        rows = self.runner.fewer_rows(sum(each.last == inf for each in self.running))
        return rows if rows <= self.rows // 2 else 0

    def _step(self, fewer: int = 0, tokens: int = 1):
        order = self._move(fewer) if fewer else None
        groups = self._groups() if self.changed else None
        self.runner.step(self.model, self.retired, groups, order, tokens)
        self.runs.append(tokens)
        self.drafted[tokens] += 1
        self.behind |= tokens == 1 and self.pace is not None and self.runner.draft_model is not None
        self.retired, self.changed = [], False
        for each in self.running:
            each.planned += each.last == inf
        self._release()

    def _move(self, rows: int) -> list[int]:
        """Moves what runs to the first rows. Returns which row each of the first `rows` was; the log has to be read."""
        order = [each.row for each in self.running]
        for row, each in enumerate(self.running):
            each.row = row
        idle = [row for row in range(self.rows) if row not in order]
        order += idle[: rows - len(order)]
        self.rows, self.free, self.changed = rows, list(range(len(self.running), rows)), True
        return order

    def _groups(self) -> list[tuple[int, list[int]]]:
        """Rows that begin with the same pages, and how many tokens those hold, where it pays to attend to them at once.

        Of rows with the same first page either all are one group, or the samples of each prompt are, whichever saves
        more.
        """
        if not self.runner.packs:
            return []
        alike = {}
        for each in self.running:
            if each.last == inf and each.first < inf:
                alike.setdefault(each.held.pages[0], []).append(each)
        groups = []
        for members in alike.values():
            samples = {}
            for each in members:
                samples.setdefault(id(each.request.prompt), []).append(each)
            choices = [[_shared(group) for group in choice] for choice in ([members], samples.values())]
            groups += max(choices, key=lambda choice: sum(tokens * (len(rows) - 1) for tokens, rows in choice))
        return [(tokens, rows) for tokens, rows in groups if tokens * (len(rows) - 1) >= SHARED]

    def _release(self):
        """Frees the rows whose limit the last event reaches, while others wait for a row."""
        for each in self.running if self.waiting else ():
            if each.first < inf == each.last and each.planned >= each.request.max_new_tokens:
                self._leave(each)

    def _leave(self, each: Running):
        """Frees the row of a request, which has nothing from it after the last event."""
        each.last = self.runner.events - 1
        self.free.append(each.row)
        self.rings.append(each.ring)
        self.retired.append(each.row)
        self.changed = True
        self._give_back(each)

    def _give_back(self, each: Running):
        if each.held is not self.kept:
            self.pages.release(each.held)

    def _read(self, on_token: Callable | None, lag: float | None = None) -> Iterator:
        """Takes what the log has, up to the last `lag` events, and yields the completions that it ends."""
        lag = min(self.lag if lag is None else lag, self.runner.length)  # what the log holds
        while self.runner.events - self.runner.entries > lag:
            event, entry = self.runner.entries, self.runner.read()
            tokens, right = self.runs.popleft(), []
            for each in list(self.running):
                if not each.first <= event <= each.last:
                    continue
                done, count, _, *run = entry[each.row]
                stops = each.request.stops
                if tokens > 1:
                    each.drafted = len(each.request.prompt) + count - 2
                    each.planned = max(each.planned, count + self.runner.events - event - 1)
                    accepted = count - len(each.tokens) - 1
                    right.append((accepted, accepted if done else tokens - 1))
                for token in run[: count - len(each.tokens)]:
                    each.tokens.append(token)
                    if on_token is not None:
                        on_token(token)
                    ended = done and len(each.tokens) == count  # on the device, with this token
                    if not ended and stops is not None and stops(each.tokens):
                        done = True
                        break
                if done:
                    self.running.remove(each)
                    if self.kept is not None and self.pace is not None and self.runner.draft_model is not None:
                        self.ended = each
                    if each.last == inf:
                        self._leave(each)
                    yield each.request, each.tokens
            if tokens and self.pace:
                self.pace.learn(tokens, right, None if self.pace.fixed else self.runner.seconds_of_last())
                for accepted, mattered in right:
                    self.drafts.update(range(min(accepted + 1, mattered)))
                    self.right.update(range(accepted))


def fits(tokens: int, prompts: int, longest: int, packs: bool) -> bool:
    """Whether one prefill takes so many prompts of so many tokens in all, and at most `longest` a prompt: packed, or
    padded to that."""
    if packs:
        return tokens <= CHUNK
    return prompts * longest <= min(CHUNK, max(PADDING * tokens, SMALL))


def _shared(group: list[Running]) -> tuple[int, list[int]]:
    """How many tokens the pages hold that all of these begin with, and their rows."""
    first = group[0].held.pages
    count = min(len(each.request.prompt) for each in group) // PAGE
    for each in group[1:]:
        count = next((i for i in range(count) if each.held.pages[i] != first[i]), count)
    return PAGE * count, [each.row for each in group]


def _common(one: list[int], two: list[int]) -> int:
    """With how many tokens in whole pages, but not all, two prompts begin alike."""
    end = (min(len(one), len(two)) - 1) // PAGE * PAGE
    if one is two:
        return end
    return next((i for i in range(0, end, PAGE) if one[i : i + PAGE] != two[i : i + PAGE]), end)
