"""The scheduler over a runner that is none: rows whose next token is a known function of what they hold."""

import random
from itertools import islice
from types import SimpleNamespace

import pytest

from config import PAGE
from pages import Pages
from sampling import Sampling
from scheduler import CHUNK, PADDING, SMALL, Request, Scheduler

GREEDY, STOP = Sampling(temperature=0), 7


def following(tokens: list[int]) -> int:
    return (31 * sum(tokens) + len(tokens)) % 97


class Rows:
    """What Scheduler needs of a `runner.Runner`, whose steps append runs of at most `run` tokens."""

    def __init__(self, rows: int, pages: int | None = None, run: int = 1):
        self.rows, self.run, self.events, self.entries, self.log, self.admitted = [None] * rows, run, 0, 0, [], []
        self.length, self.groups, self.free_rings = 30, [], []
        self.padded = lambda rows: 1 << (rows - 1).bit_length()
        self.pages, self.packs = Pages(1 + (2 * rows if pages is None else pages)), True

    def admit(self, model, pieces, retired):
        self.admitted.append(pieces)
        for row in retired:
            self.rows[row].done = True
        for piece in pieces:
            if piece.ends:
                request = piece.running.request
                self.rows[piece.running.row] = SimpleNamespace(
                    tokens=list(request.prompt), new=0, limit=request.max_new_tokens, done=False
                )
                self._append(self.rows[piece.running.row], 1)
        self._write()

    def fewer_rows(self, rows):
        return self.padded(rows)

    def step(self, model, retired, groups=None, order=None, tokens=1):
        for row in retired:
            self.rows[row].done = True
        if order is not None:
            self.rows = [self.rows[row] for row in order]
        if groups is not None:
            self.groups.append(groups)
        for row in self.rows:
            if row is not None and not row.done:
                self._append(row, 1 + sum(row.tokens) % self.run)
        self._write()

    def _append(self, row, count):
        row.appended = []
        while len(row.appended) < count and not row.done:
            row.appended.append(following(row.tokens))
            row.tokens.append(row.appended[-1])
            row.new += 1
            row.done = row.new >= row.limit or row.tokens[-1] == STOP

    def _write(self):
        more = [STOP] * self.run  # what stands behind a run
        entry = [[1, 0, 1] if r is None else [r.done, r.new, 1, *r.appended] for r in self.rows]
        self.log.append([(each + more)[: 3 + self.run] for each in entry])
        self.events += 1
        assert self.events - self.entries <= self.length + 1  # entries of the log

    def read(self):
        self.entries += 1
        return self.log[self.entries - 1]


def expected(request: Request) -> list[int]:
    new = []
    while len(new) < request.max_new_tokens and STOP not in new:
        new.append(following(request.prompt + new))
        if request.stops is not None and request.stops(new):
            break
    return new


def requests_of(source: random.Random, count: int, longest: int = 30) -> list[Request]:
    stops = [None, None, lambda tokens: tokens[-1] % 13 == 0]
    return [
        Request(
            (i, 0),
            [source.randrange(97) for _ in range(source.randrange(1, longest))],
            source.randrange(1, longest),
            GREEDY,
            stops=source.choice(stops),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("check", ["every", "ping-pong", "never"])
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_every_request_gets_its_own_tokens_once(rows, check):
    for seed in range(20):
        requests = requests_of(random.Random(seed), 40)
        scheduler = Scheduler(Rows(rows), None, requests, rows, check)
        results = list(scheduler.run())
        assert len(results) == len(requests)
        assert {id(request) for request, _ in results} == {id(request) for request in requests}
        assert all(tokens == expected(request) for request, tokens in results)
        assert sorted({*scheduler.free}) == sorted({*scheduler.rings}) == list(range(rows)) and not scheduler.running
        scheduler.pages.check()
        assert not scheduler.pages.held


def test_what_is_taken_of_a_shared_list_has_a_row():
    """Rows are not free any more while the requests that they are for are about to start: where they were counted as
    such, one scheduler took what was meant for another, and had twice as much."""
    requests, asked = iter(requests_of(random.Random(0), 40)), []

    def take(waiting, free, rows):
        asked.append((waiting, free, rows))
        return list(islice(requests, max(0, free - waiting)))

    scheduler = Scheduler(Rows(8), None, take, 8)
    assert len(list(scheduler.run())) == 40
    assert asked[:2] == [(0, 8, 8), (0, 0, 8)] and all(free <= 8 for _, free, _ in asked)


def test_runs_of_tokens_come_in_order_and_are_cut_where_a_request_stops():
    for seed in range(10):
        requests, seen = requests_of(random.Random(seed), 40), []
        for check in ("every", "ping-pong", "never"):
            scheduler = Scheduler(Rows(5, run=4), None, requests, 5, check)
            assert all(tokens == expected(request) for request, tokens in scheduler.run())
            assert not scheduler.running
        request = requests[seed]
        ((_, tokens),) = Scheduler(Rows(1, run=4), None, [request], 1).run(on_token=seen.append)
        assert tokens == seen == expected(request)


def test_a_row_is_refilled_in_the_event_after_its_limit():
    """Rows that end by their limits alone cost no step too many: all steps are full until nothing waits."""
    requests = [Request((i, 0), [1, i], 4, GREEDY) for i in range(6)]
    requests = [request for request in requests if len(expected(request)) == 4][:6]
    runner = Rows(2)
    scheduler = Scheduler(runner, None, requests, 2)
    assert len(list(scheduler.run())) == len(requests)
    rounds = -(-len(requests) // 2)
    assert (scheduler.steps, runner.events) == (3 * rounds, 4 * rounds)


def admitted(runner: Rows) -> list[tuple[int, int, int]]:
    """Tokens that each prefill computes, its prompts, and its longest one."""
    groups = [[piece.end - piece.begin for piece in pieces if piece.leader is None] for pieces in runner.admitted]
    return [(sum(group), len(group), max(group)) for group in groups]


def requests_of_lengths(*lengths: int) -> list[Request]:
    return [Request((i, 0), [i, *[1] * (length - 1)], 1, GREEDY) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("packs", [True, False])
def test_prefills_are_as_large_as_they_may_be(packs):
    source = random.Random(3)
    requests = requests_of_lengths(*(source.randrange(1, 3000) for _ in range(200)))
    runner = Rows(200, pages=10_000)
    runner.packs = packs
    list(Scheduler(runner, None, requests, 200).run())
    assert sorted(piece.running.request.key[0] for pieces in runner.admitted for piece in pieces) == list(range(200))
    total = sum(len(request.prompt) for request in requests)
    if packs:  # sorted by length: what is left of a prefill is less than the next prompt
        assert all(tokens <= CHUNK for tokens, *_ in admitted(runner))
        assert len(runner.admitted) <= total / (CHUNK - 3000) + 1
    else:
        for tokens, prompts, longest in admitted(runner):
            assert prompts == 1 or prompts * longest <= min(CHUNK, max(SMALL, PADDING * tokens))
        assert len(runner.admitted) < 60


@pytest.mark.parametrize("packs", [True, False])
def test_long_prompts_are_cut(packs):
    lengths = [3 * CHUNK + 5, CHUNK, CHUNK + 1, 12, 2 * CHUNK]
    requests = requests_of_lengths(*lengths)
    runner = Rows(5, pages=2000)
    runner.packs = packs
    results = {request.key[0]: tokens for request, tokens in Scheduler(runner, None, requests, 5).run()}
    assert [results[i] for i in range(5)] == [expected(request) for request in requests]
    parts = {i: [] for i in range(5)}
    for pieces in runner.admitted:
        for piece in pieces:
            parts[piece.running.request.key[0]].append((piece.begin, piece.end))
    for i, length in enumerate(lengths):
        assert [begin for begin, _ in parts[i]] == [0, *(end for _, end in parts[i][:-1])]
        assert parts[i][-1][1] == length
    assert all(tokens <= CHUNK for tokens, *_ in admitted(runner))
    assert len(runner.admitted) == 10


@pytest.mark.parametrize("packs", [True, False])
def test_samples_of_one_prompt_share_a_prefill(packs):
    prompts = [[2] * length for length in (3000, 5000, 12, 3000, CHUNK + 100)]
    prompts[3][0] = 3
    requests = [Request((i, j), prompt, 1, GREEDY) for i, prompt in enumerate(prompts) for j in range(16)]
    runner = Rows(80, pages=500)  # each alone would need 16 * 305
    runner.packs, runner.pages.caching = packs, False
    list(Scheduler(runner, None, requests, 80).run())
    groups = [sorted({piece.running.request.key[0] for piece in pieces}) for pieces in runner.admitted]
    assert groups == ([[0, 2, 3], [1], [4], [4]] if packs else [[2], [0, 3], [1], [4], [4]])
    assert sum(tokens for tokens, *_ in admitted(runner)) == sum(map(len, prompts))
    assert [len(pieces) for pieces in runner.admitted[-2:]] == [1, 16]


def test_prompts_that_begin_alike_share_their_pages():
    """The first of them is computed alone, the others behind what it filled; and so in the next run."""
    common = [5] * (10 * PAGE + 7)
    requests = [Request((i, 0), [*common, *[i] * (1 + i)], 3, GREEDY) for i in range(40)]
    runner = Rows(16, pages=2000)
    for run in range(2):
        runner.admitted.clear()
        results = list(Scheduler(runner, None, requests, 16).run())
        assert len(results) == 40 and all(tokens == expected(request) for request, tokens in results)
        pieces = [piece for pieces in runner.admitted for piece in pieces]
        assert sorted(piece.begin for piece in pieces) == [10 * PAGE * (run or i > 0) for i in range(40)]
        if not run:
            assert len(runner.admitted[0]) == 1
        runner.pages.check()


def test_prompts_share_their_pages_where_layers_have_rings():
    """Behind a snapshot of the ring at the end of what they share, of which there are only two."""
    system = [[5 + i] * (10 * PAGE + 7) for i in range(2)]
    requests = [Request((i, 0), [*system[i % 2], *[i] * (1 + i)], 3, GREEDY) for i in range(40)]
    requests += [Request((40, j), prompt, 3, GREEDY) for prompt in [[77] * (8 * PAGE)] for j in range(40)]
    runner = Rows(16, pages=2000)
    runner.free_rings = [16, 17]
    runner.pages = Pages(2000, snapshots=True, on_evict=runner.free_rings.append)
    rings = {}  # what each holds: how many tokens of which prompt
    admit = runner.admit

    def watching(model, pieces, retired):
        for piece in pieces:
            if piece.leader is not None:
                continue
            prompt = tuple(piece.prompt)
            if piece.snapshot is not None:
                rings[piece.running.ring] = rings[piece.snapshot]
            assert piece.begin == 0 or rings[piece.running.ring] == prompt[: piece.begin]
        for piece in pieces:
            rings[piece.running.ring] = tuple(piece.prompt[: piece.end])
        for piece in pieces:
            if piece.keep is not None:
                rings[piece.keep] = rings[piece.running.ring]
        admit(model, pieces, retired)

    runner.admit = watching
    results = list(Scheduler(runner, None, requests, 16).run())
    assert len(results) == 80 and all(tokens == expected(request) for request, tokens in results)
    computed = sum(tokens for tokens, *_ in admitted(runner))
    assert computed < 0.4 * sum(len(request.prompt) for request in requests)
    runner.pages.check()
    runner.pages.forget()
    assert sorted(runner.free_rings) == [16, 17]


def test_requests_wait_for_pages():
    """Nothing that runs gives way; the largest fits alone; what waits is not overtaken."""
    source = random.Random(5)
    for _ in range(10):
        requests = [
            Request(
                (i, 0),
                [source.randrange(97) for _ in range(source.randrange(1, 300))],
                source.randrange(1, 200),
                GREEDY,
            )
            for i in range(60)
        ]
        runner = Rows(16, pages=max(-(-request.tokens // PAGE) for request in requests))
        runner.length = 500
        started = []
        scheduler = Scheduler(runner, None, requests, 16)
        for request, tokens in scheduler.run():
            assert tokens == expected(request)
        for pieces in runner.admitted:
            started.append(sorted(piece.running.request.key[0] for piece in pieces))
        keys = [key for group in started for key in group]
        assert sorted(keys) == list(range(60))
        scheduler.pages.check()
        assert not scheduler.pages.held


def test_pages_are_given_back_whatever_happens():
    requests, runner = requests_of(random.Random(1), 30), Rows(8)
    run = Scheduler(runner, None, requests, 8).run()
    for _ in range(3):
        next(run)
    run.close()
    assert not runner.pages.held

    def fail(token):
        raise RuntimeError("in a callback")

    with pytest.raises(RuntimeError, match="in a callback"):
        list(Scheduler(Rows(1), None, requests[:1], 1).run(on_token=fail))
    runner.pages.check()


def test_the_last_ones_run_in_fewer_rows():
    """Half of them at most, if it is worth it, each with its own tokens still."""
    requests = [Request((i, 0), [1, i], 10 if i % 9 else 500, GREEDY, stops=None) for i in range(40)]
    requests = [request for request in requests if len(expected(request)) == request.max_new_tokens]
    runner, widths = Rows(16, pages=1000), []
    runner.length = 600
    scheduler = Scheduler(runner, None, requests, 16)
    for request, tokens in scheduler.run(on_step=lambda *_: widths.append(len(runner.rows))):
        assert tokens == expected(request)
    assert len([request for request in requests if request.max_new_tokens == 500]) in (1, 2, 3, 4)
    assert widths[0] == 16 and widths[-1] <= 4
    scheduler.pages.check()
    assert not scheduler.pages.held


def test_rows_that_begin_alike_are_told_to_the_runner():
    system = [9] * (20 * PAGE)
    of_samples = [Request((0, j), prompt, 30, GREEDY) for prompt in [[3] * (40 * PAGE + 5)] for j in range(8)]
    of_system = [Request((1 + i, 0), [*system, *[i] * 30], 30, GREEDY) for i in range(6)]
    of_both = [
        Request((7 + i, j), prompt, 30, GREEDY)
        for i in range(2)
        for prompt in [[*system, *[5] * 10 * PAGE, i]]
        for j in range(2)
    ]
    few = [Request((20, j), prompt, 30, GREEDY) for prompt in [[8] * (5 * PAGE)] for j in range(3)]
    runner = Rows(32, pages=2000)
    runner.length = 40
    results = list(Scheduler(runner, None, [*of_samples, *of_system, *of_both, *few], 32).run())
    assert len(results) == 21 and all(tokens == expected(request) for request, tokens in results)
    groups = sorted((tokens, len(rows)) for tokens, rows in runner.groups[0])
    assert groups == [(20 * PAGE, 10), (40 * PAGE, 8)]
    for each in runner.groups:
        rows = [row for _, members in each for row in members]
        assert len(set(rows)) == len(rows)


def test_a_sixteenth_of_the_rows_is_refilled_at_once():
    requests = [Request((i, 0), [1, i], 1 + i, GREEDY) for i in range(200)]
    runner = Rows(64, pages=1000)
    list(Scheduler(runner, None, requests, 64, "every").run())
    sizes = [len(pieces) for pieces in runner.admitted]
    assert sum(sizes) == 200 and all(size >= 4 for size in sizes[:-1])


def test_callbacks():
    request, seen, steps = Request((0, 0), [4, 5], 6, GREEDY), [], []
    ((_, tokens),) = Scheduler(Rows(1), None, [request], 1).run(lambda i, _: steps.append(i), seen.append)
    assert seen == tokens == expected(request)
    assert steps == list(range(len(tokens)))
