"""Which request runs in which row and when: rows are refilled as they finish. Host logic alone, without torch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from sampling import Sampling, noise_of

CHUNK = 8192  # tokens of prompts, padding included, that one prefill takes at most, or one prompt
PADDING = 1.25  # times its prompts' tokens that a prefill may be padded to,
SMALL = 512  # or this many tokens
SHARE = 16  # a refill is due when one of so many rows is free
LAGS = {"every": 0, "ping-pong": 1, "never": inf}  # events that may be under way when the log is read


@dataclass(frozen=True)
class Request:
    """One completion of one prompt. `key`, of a prompt and a sample, tells it from others."""

    key: tuple[int, int]
    prompt: list[int]  # token ids
    max_new_tokens: int
    sampling: Sampling
    seed: tuple[int, int] = (0, 0)  # and a prompt's number: with the sample's, what picks the noise
    stops: Callable[[list[int]], bool] | None = None  # whether these new tokens end it: asked after each

    @property
    def noise(self) -> list[float]:
        return noise_of(*self.seed, self.key[1], self.max_new_tokens) if self.sampling.temperature else []


@dataclass
class Running:
    """A request in a row: its tokens so far, and the events of the chain between which they come."""

    request: Request
    row: int
    first: int
    tokens: list[int] = field(default_factory=list)
    last: float = inf
    planned: int = 1  # tokens that it has after all events so far, unless it stops


class Scheduler:
    """Runs requests, in their order, on the rows of a `runner.Runner`, which has been started for that many rows.

    Finished rows are refilled together, a sixteenth of all at a time: a prefill of one prompt takes little less than
    that of some. A row whose limit is reached is refilled without waiting for the log; one that stops is known a step
    late.
    """

    def __init__(self, runner, model, requests: Iterable[Request], rows: int, check: str = "ping-pong"):
        self.runner, self.model, self.rows, self.lag = runner, model, rows, LAGS[check]
        self.requests, self.waiting = iter(requests), deque()  # those that come next, one a row at most, were taken
        self.free = list(range(rows))
        self.running: list[Running] = []
        self.retired: list[int] = []  # rows that have to be ended on the device
        self.steps = 0

    def run(self, on_step: Callable | None = None, on_token: Callable | None = None, cached: int = 0) -> Iterator:
        """Yields (request, new tokens) as completions finish.

        on_step(0, runner) is called before each prefill, on_step(i, runner) before decode step i; on_token gets each
        new token. `cached` tokens of the prompts are in the rows' caches already.
        """
        self._look_ahead()
        while self.waiting or self.running:
            groups = self._admissions()
            for rows, requests in groups:
                if on_step is not None:
                    on_step(0, self.runner)
                self._admit(rows, requests, cached)
                yield from self._read(on_token)
            if any(each.planned < each.request.max_new_tokens for each in self.running):
                self.steps += 1
                if on_step is not None:
                    on_step(self.steps, self.runner)
                self._step()
                yield from self._read(on_token)
            elif not groups:
                yield from self._read(on_token, lag=0)

    def _look_ahead(self):
        self.waiting.extend(islice(self.requests, self.rows - len(self.waiting)))

    def _admissions(self) -> list[tuple[list[int], list[Request]]]:
        """Rows and requests of the prefills that are due: prompts of about one length share one."""
        count = min(len(self.waiting), len(self.free))
        if count < min(len(self.waiting), max(1, self.rows // SHARE)):
            return []
        requests = [self.waiting.popleft() for _ in range(count)]
        self._look_ahead()
        groups, tokens, prompts = [[]], 0, 0
        for request in sorted(requests, key=lambda request: (len(request.prompt), request.prompt)):
            length, group = len(request.prompt), groups[-1]
            if not group or request.prompt != group[-1].prompt:  # samples of one prompt share its prefill
                tokens, prompts = tokens + length, prompts + 1
                if group and (prompts * length > CHUNK or prompts * length > max(PADDING * tokens, SMALL)):
                    groups.append([])
                    tokens, prompts = length, 1
            groups[-1].append(request)
        self.free.sort()
        return [([self.free.pop(0) for _ in group], group) for group in groups if group]

    def _admit(self, rows: list[int], requests: list[Request], cached: int):
        self.retired = [row for row in self.retired if row not in rows]
        started = [Running(request, row, self.runner.events) for row, request in zip(rows, requests)]
        self.runner.admit(self.model, rows, requests, cached)
        self.running += started
        self._release()

    def _step(self):
        self.runner.step(self.model, self.retired)
        self.retired = []
        for each in self.running:
            each.planned += each.last == inf
        self._release()

    def _release(self):
        """Frees the rows whose limit the last event reaches, while others wait for a row."""
        for each in self.running if self.waiting else ():
            if each.last == inf and each.planned >= each.request.max_new_tokens:
                self._leave(each)

    def _leave(self, each: Running):
        """Frees the row of a request, which has nothing from it after the last event."""
        each.last = self.runner.events - 1
        self.free.append(each.row)
        self.retired.append(each.row)

    def _read(self, on_token: Callable | None, lag: float | None = None) -> Iterator:
        """Takes what the log has, up to the last `lag` events, and yields the completions that it ends."""
        lag = min(self.lag if lag is None else lag, self.runner.length)  # what the log holds
        while self.runner.events - self.runner.entries > lag:
            event, entry = self.runner.entries, self.runner.read()
            for each in list(self.running):
                if not each.first <= event <= each.last:
                    continue
                done, count, token, _ = entry[each.row]
                if count > len(each.tokens):
                    each.tokens.append(token)
                    if on_token is not None:
                        on_token(token)
                    stops = each.request.stops
                    if not done and stops is not None and stops(each.tokens):
                        done = True
                if done:
                    self.running.remove(each)
                    if each.last == inf:
                        self._leave(each)
                    yield each.request, each.tokens
