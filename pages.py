"""Pages of the KV cache: which request holds which, and which hold a known prefix. Host logic alone, without torch."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from config import PAGE


@dataclass(eq=False)
class Held:
    """The pages of one request, from `Pages.take` until `Pages.release`."""

    pages: list[int]  # physical pages in the order of their tokens: a row of the page table
    cached: int  # tokens at the front that need no computing, a multiple of PAGE
    snapshot: Any  # what was attached to the prefix of `cached` tokens, or None
    tokens: list[int]  # the prompt, and what `register` was told comes after it


class Pages:
    """Gives out pages 1 to count - 1; page 0, the dump page, is never given out.

    Registered pages form the prefix tree: each is known by the page before it (0 for the first) and its own tokens,
    compared exactly. A held page in turn holds the page before it, so a page becomes idle after all those behind it.
    Hence the page that has been idle longest has none behind it in the tree, and is the one to evict.

    With `caching` off nothing is registered, and pages are shared through `like` alone. With `snapshots` on, a prefix
    can only be used if a snapshot is attached to it: a copy of what sliding-window layers, which keep their last tokens
    alone, held at its end. `on_evict` gets each snapshot that is dropped; it must not call this object.
    """

    def __init__(self, count: int, caching: bool = True, snapshots: bool = False, on_evict: Callable | None = None):
        self.count, self.caching, self.needs_snapshot = count, caching, snapshots
        self.on_evict = on_evict or (lambda snapshot: None)
        self.unused = list(range(count - 1, 0, -1))
        self.refs = [0] * count  # requests that hold the page, and held pages just behind it in the tree
        self.held: set[Held] = set()
        self.known: dict[tuple[int, tuple[int, ...]], int] = {}  # the tree: (page before, tokens) -> page
        self.keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # its inverse
        self.idle: OrderedDict[int, None] = OrderedDict()  # pages that only the tree keeps, longest idle first
        self.snapshots: OrderedDict[int, Any] = OrderedDict()  # by the prefix's last page, longest unused first

    @property
    def free(self) -> int:
        """Pages that can be taken: the unused ones and those that only the tree keeps."""
        return len(self.unused) + len(self.idle)

    def match(self, prompt: Sequence[int]) -> int:
        """Tokens of the prompt that `take` would find cached: whole pages, and never all, as one gives the logits."""
        return PAGE * len(self._hit(prompt))

    def needed(self, prompt: Sequence[int], tokens: int, like: bool = False) -> int:
        """Of `free`, the pages that `take` would use; with `like`, beside a holding of the same prompt."""
        if like:
            return -(-tokens // PAGE) - len(prompt) // PAGE
        shared = self._hit(prompt)
        return -(-tokens // PAGE) - len(shared) + self._idle(shared)

    def take(self, prompt: Sequence[int], tokens: int, like: Held | None = None) -> Held | None:
        """Room for `tokens` tokens that begin with the prompt; None, and nothing changes, if there is not enough.

        The pages of the longest cached prefix come first, then fresh ones. With `like`, a holding of the same prompt,
        all whole pages of the prompt are shared with it, computed or not, and `cached` is that of `like`.
        Raises ValueError if `like` was released or holds another prompt, or if `tokens` are fewer than the prompt's.
        """
        prompt = list(prompt)
        if tokens < len(prompt):
            raise ValueError(f"room for {tokens} tokens does not hold a prompt of {len(prompt)}")
        if like is None:
            shared = self._hit(prompt)
            cached, snapshot = PAGE * len(shared), self.snapshots.get(shared[-1]) if shared else None
        else:
            self._check_held(like)
            if like.tokens[: len(prompt)] != prompt or like.cached >= len(prompt):
                raise ValueError("the holding to share with has another prompt")
            shared = like.pages[: len(prompt) // PAGE]
            cached, snapshot = like.cached, like.snapshot
        fresh = -(-tokens // PAGE) - len(shared)
        if fresh + self._idle(shared) > self.free:
            return None
        for page in shared:
            self._hold(page)
        if like is None and snapshot is not None:
            self.snapshots.move_to_end(shared[-1])
        while len(self.unused) < fresh:
            self._evict()
        own = [self.unused.pop() for _ in range(fresh)]
        for page in own:
            self.refs[page] = 1
        held = Held(shared + own, cached, snapshot, prompt)
        self.held.add(held)
        return held

    def register(self, held: Held, tokens: Sequence[int] | None = None):
        """Lets later prompts find the whole pages of the prompt, or of `tokens`: the prompt and some of its answer.

        To be called when the work that fills the pages comes before all work that could read them. A prefix that the
        tree has already keeps its page there; the holder's own is then found by no one, and unused after its release.
        Raises ValueError if `held` was released, or if `tokens` don't begin with those known or don't fit in the pages.
        """
        self._check_held(held)
        if tokens is not None:
            tokens = list(tokens)
            if len(tokens) > PAGE * len(held.pages) or tokens[: len(held.tokens)] != held.tokens:
                raise ValueError("tokens to register must begin with those known and fit in the pages")
            held.tokens = tokens
        if not self.caching:
            return
        before = 0
        for i, page in enumerate(held.pages[: len(held.tokens) // PAGE]):
            key = before, tuple(held.tokens[PAGE * i : PAGE * (i + 1)])
            if key not in self.known:
                self.known[key], self.keys[page] = page, key
                self._hold(before)
            before = self.known[key]
        self._hold(before)  # counts as a use of pages that were there but had to be computed again
        self._drop(before)

    def release(self, held: Held):
        """Gives the pages back: those in the tree stay there until their room is needed. ValueError the second time."""
        self._check_held(held)
        self.held.remove(held)
        for page in held.pages:
            self._drop(page)

    def keep(self, caching: bool):
        """Says whether prompts are known to later ones from now on; without, those that were known are forgotten."""
        self.caching = caching
        if not caching:
            self.forget()

    def forget(self):
        """Drops all that nobody holds from the tree, say because the cache's scales change."""
        while self.idle:
            self._evict()

    def attach(self, held: Held, tokens: int, snapshot: Any):
        """Keeps a snapshot with the holding's first `tokens` tokens, in place of the one there.

        Raises ValueError if `held` was released or they are not the tokens of whole pages that are registered.
        """
        self._check_held(held)
        path = self._path(held.tokens, tokens)
        if not path or PAGE * len(path) != tokens:
            raise ValueError(f"no registered prefix of this holding ends at {tokens} tokens")
        if path[-1] in self.snapshots:
            self.on_evict(self.snapshots.pop(path[-1]))
        self.snapshots[path[-1]] = snapshot

    def evict_snapshot(self) -> Any:
        """Drops the least recently used snapshot, its pages held or not, and returns it; None if there is none.

        `on_evict` is not called. Work that writes over the snapshot must come after the work of holdings that have it.
        """
        return self.snapshots.popitem(last=False)[1] if self.snapshots else None

    def check(self):
        """Raises AssertionError unless each page is in one state and the counts are those of the holdings."""
        refs = Counter(page for held in self.held for page in held.pages)
        refs.update(before for page, (before, _) in self.keys.items() if before and self.refs[page])
        assert self.refs == [refs[page] for page in range(self.count)] and not self.refs[0]
        used = [page for page in range(self.count) if self.refs[page]]
        assert sorted([*self.unused, *self.idle, *used]) == list(range(1, self.count))
        assert self.free + len(used) == self.count - 1
        assert self.known == {key: page for page, key in self.keys.items()}
        assert self.idle.keys() <= self.keys.keys() and self.keys.keys().isdisjoint(self.unused)
        assert all(before == 0 or before in self.keys for before, _ in self.keys.values())
        order = {page: i for i, page in enumerate(self.idle)}
        assert all(order[page] < order.get(self.keys[page][0], self.count) for page in order)
        assert self.snapshots.keys() <= self.keys.keys()

    def _path(self, tokens: Sequence[int], stop: int) -> list[int]:
        """The tree's pages for the longest known prefix of whole pages in tokens[:stop]."""
        path, before = [], 0
        for end in range(PAGE, stop + 1, PAGE):
            before = self.known.get((before, tuple(tokens[end - PAGE : end])))
            if before is None:
                break
            path.append(before)
        return path

    def _hit(self, prompt: Sequence[int]) -> list[int]:
        path = self._path(prompt, len(prompt) - 1)
        while self.needs_snapshot and path and path[-1] not in self.snapshots:
            path.pop()
        return path

    def _idle(self, pages: list[int]) -> int:
        return sum(page in self.idle for page in pages)

    def _hold(self, page: int):
        while page:
            self.refs[page] += 1
            if self.refs[page] > 1:
                break
            del self.idle[page]
            page = self.keys[page][0]

    def _drop(self, page: int):
        while page:
            self.refs[page] -= 1
            if self.refs[page]:
                break
            if page not in self.keys:
                self.unused.append(page)
                break
            self.idle[page] = None
            page = self.keys[page][0]

    def _evict(self):
        page, _ = self.idle.popitem(last=False)
        del self.known[self.keys.pop(page)]
        self.unused.append(page)
        if page in self.snapshots:
            self.on_evict(self.snapshots.pop(page))

    def _check_held(self, held: Held):
        if held not in self.held:
            raise ValueError("these pages were released")
