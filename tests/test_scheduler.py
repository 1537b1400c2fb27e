"""The scheduler over a runner that is none: rows whose next token is a known function of what they hold."""

import random
from types import SimpleNamespace

import pytest

from sampling import Sampling
from scheduler import CHUNK, PADDING, SMALL, Request, Scheduler

GREEDY, STOP = Sampling(temperature=0), 7


def following(tokens: list[int]) -> int:
    return (31 * sum(tokens) + len(tokens)) % 97


class Rows:
    """What Scheduler needs of a `runner.Runner`; `late` entries of the log are there only when more events come."""

    def __init__(self, rows: int):
        self.rows, self.events, self.entries, self.log, self.admitted = [None] * rows, 0, 0, [], []
        self.length = 30

    def admit(self, model, rows, requests, cached=0):
        self.admitted.append((list(rows), requests))
        for row, request in zip(rows, requests, strict=True):
            self.rows[row] = SimpleNamespace(
                tokens=list(request.prompt), new=0, limit=request.max_new_tokens, done=False
            )
            self._append(self.rows[row])
        self._write()

    def step(self, model, retired):
        for row in retired:
            self.rows[row].done = True
        for row in self.rows:
            if row is not None and not row.done:
                self._append(row)
        self._write()

    def _append(self, row):
        row.tokens.append(following(row.tokens))
        row.new += 1
        row.done = row.new >= row.limit or row.tokens[-1] == STOP

    def _write(self):
        self.log.append([[1, 0, 0, 1] if r is None else [r.done, r.new, r.tokens[-1], 1] for r in self.rows])
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
        assert sorted({*scheduler.free}) == list(range(rows)) and not scheduler.running


def test_a_row_is_refilled_in_the_event_after_its_limit():
    """Rows that end by their limits alone cost no step too many: all steps are full until nothing waits."""
    requests = [Request((i, 0), [1, i], 4, GREEDY) for i in range(6)]
    requests = [request for request in requests if len(expected(request)) == 4][:6]
    runner = Rows(2)
    scheduler = Scheduler(runner, None, requests, 2)
    assert len(list(scheduler.run())) == len(requests)
    rounds = -(-len(requests) // 2)
    assert (scheduler.steps, runner.events) == (3 * rounds, 4 * rounds)


def test_prompts_of_about_one_length_share_a_prefill():
    source = random.Random(3)
    requests = [Request((i, 0), [i] * source.randrange(1, 3000), 1, GREEDY) for i in range(200)]
    requests.append(Request((200, 0), [2] * (2 * CHUNK), 1, GREEDY))
    runner = Rows(201)
    list(Scheduler(runner, None, requests, 201).run())
    assert sorted(row for rows, _ in runner.admitted for row in rows) == list(range(201))
    for _, group in runner.admitted:
        lengths = [len(request.prompt) for request in group]
        padded = len(group) * max(lengths)
        assert len(group) == 1 or padded <= CHUNK
        assert len(group) == 1 or padded <= max(SMALL, PADDING * sum(lengths))
    assert len(runner.admitted) < 60


def test_samples_of_one_prompt_share_a_prefill():
    prompts = [[2] * length for length in (3000, 5000, 12, 3000)]
    prompts[3][-1] = 3
    requests = [Request((i, j), prompt, 1, GREEDY) for i, prompt in enumerate(prompts) for j in range(16)]
    runner = Rows(64)
    list(Scheduler(runner, None, requests, 64).run())
    groups = [sorted({request.key[0] for request in group}) for _, group in runner.admitted]
    assert groups == [[2], [0, 3], [1]]
    assert [len(group) for _, group in runner.admitted] == [16, 32, 16]


def test_a_sixteenth_of_the_rows_is_refilled_at_once():
    requests = [Request((i, 0), [1, i], 1 + i, GREEDY) for i in range(200)]
    runner = Rows(64)
    list(Scheduler(runner, None, requests, 64, "every").run())
    sizes = [len(rows) for rows, _ in runner.admitted]
    assert sum(sizes) == 200 and all(size >= 4 for size in sizes[:-1])


def test_callbacks():
    request, seen, steps = Request((0, 0), [4, 5], 6, GREEDY), [], []
    ((_, tokens),) = Scheduler(Rows(1), None, [request], 1).run(lambda i, _: steps.append(i), seen.append)
    assert seen == tokens == expected(request)
    assert steps == list(range(len(tokens)))
