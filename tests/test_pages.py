"""Pages against a model that keeps every prefix as a plain tuple of tokens and searches all of them at each step."""

import random
from itertools import chain
from types import SimpleNamespace

import pytest

from pages import PAGE, Pages

A, B, C = BLOCKS = [[7] * PAGE, [7] * (PAGE - 1) + [8], [9] + [7] * (PAGE - 1)]  # two differ by one token each


def prefixes(tokens: list[int], stop: int) -> list[tuple[int, ...]]:
    """The prefixes of tokens[:stop] that are whole pages, longest first."""
    return [tuple(tokens[:end]) for end in range(stop // PAGE * PAGE, 0, -PAGE)]


class Model:
    """What Pages should hold. `tree` maps each registered prefix to its last page and the time it was last held."""

    def __init__(self, count: int, caching: bool, snapshots: bool):
        self.caching, self.needs_snapshot = caching, snapshots
        self.unused, self.tree, self.holdings, self.time = set(range(1, count)), {}, [], 0
        self.snapshots, self.dropped = {}, []  # prefix -> snapshot, least recently used first

    def is_held(self, prefix) -> bool:
        used = {page for held in self.holdings for page in held.pages}
        return any(node.page in used and other[: len(prefix)] == prefix for other, node in self.tree.items())

    def idle(self):
        return [prefix for prefix in self.tree if not self.is_held(prefix)]

    def hit(self, prompt):
        usable = self.snapshots if self.needs_snapshot else self.tree
        return next((prefix for prefix in prefixes(prompt, len(prompt) - 1) if prefix in usable), ())

    def touch(self, path):
        for prefix in path:
            if prefix in self.tree and not self.is_held(prefix):
                self.time += 1
                self.tree[prefix].time = self.time

    def evict(self):
        """Evicts the prefix that was held longest ago among those that nobody holds and that none continues."""
        idle = self.idle()
        leaves = [p for p in idle if not any(len(q) > len(p) and q[: len(p)] == p for q in self.tree)]
        prefix = min(leaves, key=lambda prefix: self.tree[prefix].time)
        self.unused.add(self.tree.pop(prefix).page)
        if prefix in self.snapshots:
            self.dropped.append(self.snapshots.pop(prefix))

    def take(self, held, prompt, tokens, like):
        """Whether `held`, which Pages gave (None: nothing), is what it should have given."""
        hit = self.hit(prompt) if like is None else ()
        path = prefixes(list(hit), len(hit))
        shared = [self.tree[prefix].page for prefix in reversed(path)]
        if like is not None:
            shared = like.pages[: len(prompt) // PAGE]
        fresh = (tokens + PAGE - 1) // PAGE - len(shared)
        if fresh > len(self.unused) + len(set(self.idle()) - set(path)):
            assert held is None
            return
        self.holdings.append(SimpleNamespace(pages=shared, tokens=prompt))  # so that no shared page is evicted
        while len(self.unused) < fresh:
            self.evict()
        own = held.pages[len(shared) :]
        assert (
            held.pages[: len(shared)] == shared and len(own) == len(set(own)) == fresh and self.unused.issuperset(own)
        )
        assert held.cached == (len(hit) if like is None else like.cached)
        assert held.snapshot == (self.snapshots.get(hit) if like is None else like.snapshot)
        self.unused.difference_update(own)
        self.holdings[-1] = held
        if hit in self.snapshots:
            self.snapshots[hit] = self.snapshots.pop(hit)

    def register(self, held, tokens):
        path = prefixes(tokens, len(tokens)) if self.caching else []
        for prefix in reversed(path):
            self.tree.setdefault(prefix, SimpleNamespace(page=held.pages[len(prefix) // PAGE - 1], time=0))
        self.touch(path)

    def release(self, held):
        before = set(self.idle())
        self.holdings.remove(held)
        self.touch(sorted(set(self.idle()) - before, key=len, reverse=True))
        used = {page for other in self.holdings for page in other.pages} | {node.page for node in self.tree.values()}
        self.unused.update(set(held.pages) - used)

    def attach(self, prefix, snapshot):
        if prefix in self.snapshots:
            self.dropped.append(self.snapshots.pop(prefix))
        self.snapshots[prefix] = snapshot


def prompt_of(source: random.Random) -> list[int]:
    blocks = source.choices(BLOCKS, weights=[4, 2, 1], k=source.randrange(4))
    tail = source.choice([0, 0, 1, 30, PAGE - 1])
    return [*chain(*blocks), *(source.randrange(3) for _ in range(tail))] or [1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("caching, snapshots", [(True, False), (True, True), (False, False)])
def test_random_operations_against_the_model(caching, snapshots, seed):
    source, dropped = random.Random(seed), []
    count = source.choice([8, 14, 24])
    pages, model = Pages(count, caching, snapshots, dropped.append), Model(count, caching, snapshots)
    hits = refused = evicted = 0
    for step in range(5000):
        operation, known = source.random(), len(model.tree)
        held = source.choice(model.holdings) if model.holdings else None
        if operation < 0.45:
            like = held if source.random() < 0.3 else None
            prompt = list(held.tokens) if like else prompt_of(source)
            room = len(prompt) + source.randrange(2 * PAGE)
            assert pages.match(prompt) == len(model.hit(prompt))
            before = repr(vars(pages))
            taken = pages.take(prompt, room, like)
            model.take(taken, prompt, room, like)
            if taken is None:
                assert repr(vars(pages)) == before
                refused += 1
            elif like is None:
                hits += taken.cached > 0
        elif held is not None and operation < 0.65:
            tokens = held.tokens
            if source.random() < 0.3:  # an answer came, in part: what later turns of a chat begin with
                tokens = (tokens + source.choice(BLOCKS) * 2)[: len(held.pages) * PAGE]
                tokens = tokens[: source.randrange(len(held.tokens), len(tokens) + 1)]
            pages.register(held, source.choice([tokens, None]) if tokens == held.tokens else tokens)
            model.register(held, tokens)
        elif held is not None and operation < 0.92:
            pages.release(held)
            model.release(held)
        elif held is not None and operation < 0.98:
            known_prefixes = [prefix for prefix in prefixes(held.tokens, len(held.tokens)) if prefix in model.tree]
            if known_prefixes:
                prefix = source.choice(known_prefixes)
                pages.attach(held, len(prefix), step)
                model.attach(prefix, step)
        elif operation > 0.99:
            first = next(iter(model.snapshots), None)
            assert pages.evict_snapshot() == model.snapshots.pop(first, None)
        evicted += len(model.tree) < known
        pages.check()
        assert pages.free == len(model.unused) + len(model.idle())
        assert pages.held == set(model.holdings)
        assert dropped == model.dropped
    assert refused and (hits and evicted) if caching else hits == evicted == 0
    for held in list(pages.held):
        pages.release(held)
    assert pages.free == count - 1
    pages.forget()
    pages.check()
    assert (len(pages.unused), pages.known, pages.keys) == (count - 1, {}, {})
    assert sorted(dropped) == sorted(model.dropped + list(model.snapshots.values()))


@pytest.mark.parametrize(
    "length, cached", [(0, 0), (1, 0), (63, 0), (64, 0), (65, 64), (127, 64), (128, 64), (129, 128)]
)
def test_one_token_is_always_left_to_compute(length, cached):
    pages, prompt = Pages(9), (A + B + C)[:length]
    pages.register(pages.take(A + B + C, 4 * PAGE))
    assert pages.match(prompt) == cached
    again = pages.take(prompt, length)
    assert (again.cached, len(again.pages)) == (cached, -(-length // PAGE))


def test_a_page_is_found_behind_its_own_prefix_alone():
    pages = Pages(9)
    pages.register(pages.take(A + B + C, 3 * PAGE))
    for prompt, cached in [(A + B + C, 128), (A + C + C, 64), (B + B + C, 0), (C + B, 0), (B + C, 0)]:
        assert pages.match(prompt + [1]) == cached + PAGE * (prompt == A + B + C)


def test_the_longest_idle_page_goes_first_and_the_end_of_a_prefix_before_its_start():
    pages = Pages(6)
    for prompt in (A + B, C, B):
        held = pages.take(prompt, len(prompt))
        pages.register(held)
        pages.release(held)
    pages.release(pages.take(C + [1], PAGE + 1))  # a use
    left = []
    for room in range(1, 6):
        pages.release(pages.take([1], room * PAGE))
        left.append([pages.match(prompt + [1]) // PAGE for prompt in (A + B, B, C)])
    assert left == [[2, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_held_pages_are_not_evicted():
    pages = Pages(6)
    held = pages.take(A + B, 3 * PAGE)
    pages.register(held)
    other = pages.take([1], 2 * PAGE)
    assert pages.free == 0 and pages.take([1], 1) is None and not {*held.pages} & {*other.pages}
    sharing = pages.take(A + B, 3 * PAGE)
    assert sharing is None  # one page is shared, two are lacking
    pages.release(other)
    sharing = pages.take(A + B, 3 * PAGE)
    pages.release(held)
    assert sharing.pages[0] == held.pages[0] and pages.free == 2
    assert pages.take([1], 2 * PAGE) and pages.match(A + B + [1]) == PAGE
    pages.check()


def test_two_that_computed_one_prefix():
    """Behind the first's page in the tree, which is pinned by it, stands a page of the second."""
    pages = Pages(8)
    first, second = pages.take(A, PAGE), pages.take(A + B, 2 * PAGE)
    pages.register(first)
    pages.register(second)
    pages.release(first)
    pages.check()
    assert pages.free == 7 - 3
    third = pages.take(A + B + C, 3 * PAGE)
    assert third.pages[:2] == [first.pages[0], second.pages[1]] and third.cached == 2 * PAGE
    pages.release(second)
    pages.release(third)
    pages.check()
    assert len(pages.unused) == 5  # the second's own copy of the prefix was not kept


def test_pages_computed_again_count_as_used():
    pages = Pages(4)
    for prompt in (A, B, A):  # a prompt of one page is never a hit
        held = pages.take(prompt, PAGE)
        pages.register(held)
        pages.release(held)
    assert pages.take([1], 2 * PAGE) and [pages.match(block + [1]) for block in (A, B)] == [PAGE, 0]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("tail", [[], [1]])
def test_samples_share_all_whole_pages_of_their_prompt(caching, tail):
    pages, prompt = Pages(20, caching), A + B + tail
    first = pages.take(prompt, len(prompt) + PAGE)
    second = pages.take(prompt, len(prompt) + PAGE, like=first)
    pages.register(first)
    third = pages.take(prompt, len(prompt) + PAGE, like=second)
    holdings = [first, second, third]
    assert all(held.pages[:2] == first.pages[:2] and held.cached == 0 for held in holdings)
    own = [page for held in holdings for page in held.pages[2:]]
    assert len(set(own)) == len(own) == 3 * (1 + len(tail))
    for held in holdings:
        pages.check()
        assert not pages.idle
        pages.release(held)
    assert pages.free == 19 and len(pages.idle) == 2 * caching
    assert pages.match(prompt + [1]) == 2 * PAGE * caching


def test_a_chat_turn_finds_the_answer_before_it():
    pages = Pages(9)
    held = pages.take(A + [1, 2], 4 * PAGE)
    pages.register(held)
    said = A + [1, 2] + B + C[:61]
    pages.register(held, said)
    assert pages.match(said + [5, 6]) == 2 * PAGE  # one token is lacking to the third page
    pages.register(held, said + [5])
    pages.release(held)
    assert pages.match(said + [5, 6]) == 3 * PAGE and pages.match(said + [4, 6]) == 2 * PAGE
    pages.check()


def test_forget_leaves_what_is_held():
    pages = Pages(9)
    first = pages.take(A + B, 2 * PAGE)
    pages.register(first)
    pages.release(first)
    held = pages.take(A + [1], 2 * PAGE)
    pages.forget()
    pages.check()
    assert pages.match(A + B + [1]) == PAGE and pages.free == 6
    pages.release(held)
    pages.forget()
    assert pages.match(A + [1]) == 0 and len(pages.unused) == 8


def test_with_windows_a_hit_ends_at_a_snapshot():
    dropped = []
    pages = Pages(5, snapshots=True, on_evict=dropped.append)
    held = pages.take(A + B + C, 3 * PAGE)
    pages.register(held)
    assert pages.match(A + B + C) == 0
    pages.attach(held, PAGE, "one")
    pages.attach(held, 3 * PAGE, "old")
    pages.attach(held, 3 * PAGE, "three")
    assert dropped == ["old"]
    pages.release(held)
    assert pages.match(A + B + C) == PAGE  # three pages would leave no token to compute
    assert pages.match(A + B + C + [1]) == 3 * PAGE
    held = pages.take(A + B, 2 * PAGE)
    assert (held.cached, held.snapshot, held.pages[0]) == (PAGE, "one", 1)
    assert pages.evict_snapshot() == "three" and pages.match(A + B + C + [1]) == PAGE  # "one" was used since
    assert pages.evict_snapshot() == "one" and pages.match(A + B + C + [1]) == 0  # though it is held
    assert pages.evict_snapshot() is None and dropped == ["old"]
    pages.register(held)
    pages.attach(held, 2 * PAGE, "two")
    pages.release(held)
    assert len(pages.take([1], 4 * PAGE).pages) == 4 and dropped == ["old", "two"]
    pages.check()


def test_mistakes_are_told():
    pages = Pages(9)
    held, other = pages.take(A, 2 * PAGE), pages.take(B, PAGE)
    state = repr(vars(pages))
    for mistake in (
        lambda: pages.take(A, PAGE - 1),
        lambda: pages.take(A, PAGE, like=other),
        lambda: pages.register(held, B),
        lambda: pages.register(held, A + B + C),
        lambda: pages.attach(held, PAGE, "not registered"),
        lambda: pages.attach(held, 0, "no page"),
    ):
        with pytest.raises(ValueError):
            mistake()
    assert repr(vars(pages)) == state
    pages.register(held)
    longer = pages.take(A + B, 2 * PAGE)
    with pytest.raises(ValueError):
        pages.take(A, PAGE, like=longer)  # would leave nothing to compute
    pages.release(longer)
    pages.release(held)
    for mistake in (
        lambda: pages.release(held),
        lambda: pages.register(held),
        lambda: pages.attach(held, PAGE, "released"),
        lambda: pages.take(A, PAGE, like=held),
    ):
        with pytest.raises(ValueError, match="released"):
            mistake()
    pages.check()


def test_a_large_pool_under_many_operations():
    """100,000 pages, all known, one evicted and one registered at each step: a search of the tree would take hours."""
    pages = Pages(100_001)
    for i in range(150_000):
        held = pages.take([i] * PAGE, PAGE)
        pages.register(held)
        pages.release(held)
    pages.check()
    assert not pages.unused and len(pages.known) == 100_000
    assert [pages.match([i] * (PAGE + 1)) for i in (0, 49_999, 50_000, 149_999)] == [0, 0, PAGE, PAGE]
