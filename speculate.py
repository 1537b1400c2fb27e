"""Speculative decoding: guesses of the next tokens, which one step of the model checks at once.

A step takes each row's newest token and k drafts behind it, and draws the model's own token at each of these places with
that token's own noise. A draft is right as long as it is what was drawn: so drafts change how many tokens a step makes,
never which (ops/next_token.py). What differs is where drafts come from, how many pay, and the time that they take.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling import SETTINGS, DrawKind, distribution, draw_from, noise_at, penalize

RUNS = (1, 2, 4, 8)  # tokens a row of the steps between which `Pace` chooses: one more than drafts
MOST_DRAFTS = RUNS[-1] - 1
FORGET = 0.97  # how much of what is known of drafts remains after each step that had some,
FORGET_ALL = 0.2  # and at the beginning of a probe
PROBE, PROBE_MOST = 64, 1024  # steps without drafts after which some are tried again
TRIES, TRIES_MORE = 2, 8  # steps of a probe, and of one in which a draft was right, from there
DOUBT = 2.0  # drafts of as many right ones as others have, that are known of each place
NEVER = -1e30  # the logit of a token that a draft model doesn't know
GAIN = 1.02  # how much faster another number of drafts must promise to be

# ---------------------------------------------------------------------------------------------------------------------
# Where drafts come from


class Drafter(Protocol):
    """What guesses tokens. With a `model` it has a KV cache of its own, in the layers behind the checked model's; where
    it `needs_states`, the batch's state has the checked model's last ones. A pass reads `weight_bytes`. Each new token
    has `streams` numbers in [0, 1)."""

    weight_bytes: int
    streams: int
    model: torch.nn.Module | None
    needs_states: bool

    def drafts(self, model, cache, state, kind: DrawKind, count: int) -> Tensor:
        """Guesses [B, count] of the tokens behind each row's newest one, from the state of a batch (`runner.State`).

        On the device alone, in shapes that stay: it is recorded with the step."""


@dataclass(frozen=True)
class PromptLookup:
    """What came next where a row's last tokens were before, in its prompt or in what it has made of it."""

    weight_bytes, streams, model, needs_states = 0, 1, None, False

    def drafts(self, model, cache, state, kind: DrawKind, count: int) -> Tensor:
        return model.ops.lookup(state.history, state.position, count)


@dataclass(frozen=True, eq=False)
class DraftModel:
    """The most probable tokens to a smaller model of the same vocabulary; or, with `reject`, tokens drawn as the row's
    settings say, which are accepted or rejected so that the text is distributed as without drafts. More are right then,
    but which text comes of a seed depends on them and on their number."""

    model: torch.nn.Module
    reject: bool = False
    needs_states = False

    @property
    def streams(self) -> int:
        return 3 if self.reject else 1

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes

    def drafts(self, model, cache, state, kind: DrawKind, count: int) -> Tensor:
        return self._passes(model, cache, state, count, lambda logits, drafts: logits.argmax(-1))

    def drawn(self, model, cache, state, kind: DrawKind, count: int) -> tuple[Tensor, Tensor]:
        """Guesses that are drawn, and the probabilities [B, count, V] of all tokens in their places."""
        settings, probabilities = dict(zip(SETTINGS, state.settings.split(1, dim=1))), []
        number = state.count[:, None] + torch.arange(count, device=state.count.device)
        noise = noise_at(state.noise, number, 0)

        def draw(logits: Tensor, drafts: list[Tensor]) -> Tensor:
            missing = model.config.vocab_size - logits.shape[1]
            logits = F.pad(logits.float(), (0, missing), value=NEVER)
            if kind.penalize:
                seen, penalty = state.seen, settings["repetition_penalty"]
                for draft in drafts:
                    seen = seen.scatter(1, draft[:, None], True)
                logits = penalize(logits, seen, penalty)
            probabilities.append(distribution(logits, settings, kind))
            return draw_from(probabilities[-1], noise[:, len(drafts)])

        return self._passes(model, cache, state, count, draw), torch.stack(probabilities, dim=1)

    def _passes(self, model, cache, state, count: int, choose: Callable[[Tensor, list[Tensor]], Tensor]) -> Tensor:
        """Guesses that are chosen(logits, those before). The first pass takes the last two tokens: where all drafts were
        right, the draft model has not met the last of them."""
        draft, vocabulary, drafts = self.model, model.config.vocab_size, []
        own, position = cache.part(model.config.n_layers), (state.position - 1).clamp(min=0)
        tokens = state.history.gather(1, torch.stack((position, position + 1), dim=1))
        logits = draft.logits(tokens, own, position, None, True, decoding=True)[:, 1]
        while True:
            drafts.append(choose(logits[:, :vocabulary], drafts))
            if len(drafts) == count:
                return torch.stack(drafts, dim=1)
            logits = draft.logits(drafts[-1][:, None], own, position + 1 + len(drafts), decoding=True)


@dataclass(frozen=True, eq=False)
class AssistantDrafter:
    """Those of a drafter that was trained with the model, reads its keys and values, and goes on from its last state."""

    assistant: torch.nn.Module
    streams, model, needs_states = 1, None, True

    @property
    def weight_bytes(self) -> int:
        return self.assistant.weight_bytes

    def drafts(self, model, cache, state, kind: DrawKind, count: int) -> Tensor:
        return self.assistant.drafts(model, cache, state.token, state.hidden, state.position, count)


def check_same_tokens(tokenizer, other, name: str):
    """Raises ValueError unless a draft's tokenizer has the tokens of the model's: control tokens behind all others may
    be missing in one of them."""
    mine, theirs = tokenizer.pieces, other.pieces
    for token, (piece, its) in enumerate(zip(mine, theirs)):
        if piece != its:
            raise ValueError(f"{name} can't draft: its token {token} is {its!r}, the model's is {piece!r}")
    common, more = min(len(mine), len(theirs)), tokenizer if len(mine) > len(theirs) else other
    if not all(map(more.is_control, range(common, more.vocab_size))):
        raise ValueError(f"{name} can't draft: its tokenizer has {len(theirs)} tokens, the model's has {len(mine)}")


# ---------------------------------------------------------------------------------------------------------------------
# How many


def pace_of(drafter: Drafter | None, speculate_k: int | str) -> "Pace | None":
    """What says how many drafts steps have; None where there are none. Raises ValueError for a wrong speculate_k."""
    if speculate_k != "auto" and (type(speculate_k) is not int or not 1 <= speculate_k <= MOST_DRAFTS):
        raise ValueError(f"speculate_k must be auto or a number from 1 to {MOST_DRAFTS}, not {speculate_k!r}")
    if drafter is None:
        return None
    if drafter.streams > 1 and speculate_k == "auto":
        raise ValueError("drafts that may be rejected need a number of them, --speculate_k: the text depends on it")
    return Pace() if speculate_k == "auto" else Pace(fixed=speculate_k + 1)


class Pace:
    """Says how many tokens a row the next step takes: `fixed`, or those that promise most tokens a second.

    What is known is which share of drafts was right at each place, of those behind right ones, and how long steps took.
    Both are a step late, and of the batch as a whole. Where drafts don't pay there are none, but for a few steps now and
    then, in case the text has changed: seldom, if it hasn't.
    """

    def __init__(self, runs: tuple[int, ...] = RUNS, fixed: int | None = None):
        self.fixed, self.runs = fixed, (fixed,) if fixed else runs
        self.right = [0.0] * (self.runs[-1] - 1)  # of drafts at each place, those that were
        self.tried = [0.0] * (self.runs[-1] - 1)  # and those behind right ones
        self.seconds: dict[int, float] = {}  # that steps of so many tokens a row take
        self.first: dict[int, float] = {}  # and that the first of them took
        self.current, self.since, self.interval, self.tries = self.runs[-1], 0, PROBE, 0
        self.promising: bool | None = None  # whether a draft of this probe was right

    def next(self) -> int:
        """Tokens a row of the next step."""
        if self.fixed:
            return self.fixed
        if unknown := [run for run in self.runs if run not in self.seconds]:
            return unknown[-1]
        best = self._best(self.runs)
        if best > 1:
            self.since, self.tries, self.interval, self.current, self.promising = 0, 0, PROBE, best, None
            return best
        if self.since == self.interval:
            self.since, self.tries, self.interval = 0, TRIES, min(2 * self.interval, PROBE_MOST)
            self.promising = False
            self._forget(FORGET_ALL)
        if self.tries:
            self.tries -= 1
            return self._best(self.runs[1:])
        self.since, self.current = self.since + 1, 1
        return 1

    def learn(self, run: int, right: list[tuple[int, int]], seconds: float | None):
        """Takes in a step of `run` tokens a row: of each row how many of its drafts were right, and how many mattered;
        and how long it took."""
        if seconds is not None and run not in self.seconds:
            if run in self.first:  # one of two may have had something to compile
                self.seconds[run] = min(seconds, self.first[run])
            self.first[run] = seconds
        elif seconds is not None:
            change = min(seconds, 2 * self.seconds[run]) - self.seconds[run]
            self.seconds[run] += change * (0.2 if change > 0 else 0.5)  # sooner where there are fewer rows
        if run > 1 and right:
            self._forget(FORGET)
            if self.promising is False and any(count for count, _ in right):
                self.promising, self.tries, self.interval = True, TRIES_MORE, PROBE
            for count, mattered in right:
                for place in range(min(count + 1, mattered)):
                    self.tried[place] += 1
                    self.right[place] += place < count

    def _forget(self, remains: float):
        self.right, self.tried = ([remains * count for count in counts] for counts in (self.right, self.tried))

    def tokens(self, run: int) -> float:
        """How many a row a step of `run` tokens a row is expected to append."""
        expected, share, usual = 1.0, 1.0, (sum(self.right) + 1) / (sum(self.tried) + 2)
        for right, tried in zip(self.right[: run - 1], self.tried):
            share *= (right + DOUBT * usual) / (tried + DOUBT)
            expected += share
        return expected

    def _best(self, runs: tuple[int, ...]) -> int:
        rates = {run: self.tokens(run) / self.seconds[run] for run in runs}
        best = max(rates, key=rates.get)
        return self.current if self.current in rates and rates[best] < GAIN * rates[self.current] else best
