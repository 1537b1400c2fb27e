"""How the next token is drawn: settings, filters, noise."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    The repetition penalty (CTRL, arXiv:1909.05858, over prompt and new tokens) comes first. Then the filters work in the
    order of FILTERS, each on the distribution that the one before left: temperature, top-k, top-p (arXiv:1904.09751),
    min-p (arXiv:2407.01082). That is transformers' order, too. Raises ValueError for a value out of its range.
    """

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, is_valid, rule in (  # written so that a NaN fails, too
            ("temperature", lambda value: 0 <= value < float("inf"), "a number, at least 0"),
            ("top_k", lambda value: value >= 0, "a whole number, at least 0 (0: no limit)"),
            ("top_p", lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
            ("min_p", lambda value: 0 <= value <= 1, "a number from 0 to 1"),
            ("repetition_penalty", lambda value: 0 < value < float("inf"), "a number above 0"),
        ):
            value, kinds = getattr(self, name), (int,) if name == "top_k" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not is_valid(value):
                raise ValueError(f"{name} must be {rule}, not {value!r}")


SETTINGS = tuple(field.name for field in fields(Sampling))

# ---------------------------------------------------------------------------------------------------------------------
# Filters: each takes logits [B, N] in float64 and its setting's value, a number or a 0-dim tensor, and returns logits,
# -inf for what it drops. A new filter is one function here, one field of `Sampling`, and its place in FILTERS.


def temperature(logits: Tensor, value: Tensor) -> Tensor:
    return logits / value  # the largest is 0 by now: a tiny temperature overflows to -inf, never to NaN


def top_k(logits: Tensor, value: Tensor) -> Tensor:
    """Keeps the `value` largest of logits that are sorted, all of them for 0."""
    rank = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill((rank >= value) & (torch.as_tensor(value, device=logits.device) > 0), float("-inf"))


def top_p(logits: Tensor, value: Tensor) -> Tensor:
    """Keeps a token of sorted logits if those before it do not reach the share `value`: the first always."""
    probabilities = logits.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return logits.masked_fill(before >= value, float("-inf"))


def min_p(logits: Tensor, value: Tensor) -> Tensor:
    """Keeps the tokens that have at least `value` times the probability of the most probable one."""
    return logits.masked_fill(logits.exp() < value * logits.amax(-1, keepdim=True).exp(), float("-inf"))


FILTERS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (temperature, top_k, top_p, min_p)
NEED_ORDER = {top_k, top_p}  # filters of sorted logits
TOP_K_STEP = 256  # top_k is rounded up to a multiple for the device, which then counts the first top_k of them


class DrawKind(NamedTuple):
    """What of `Sampling` shapes the computation of a step; values are the device's, and may change between runs."""

    greedy: bool
    candidates: int  # a multiple of TOP_K_STEP that covers top_k; 0: the whole vocabulary
    in_order: bool  # whether the whole vocabulary is sorted, for top-p
    penalize: bool

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> "DrawKind":
        penalize = sampling.repetition_penalty != 1
        if sampling.temperature == 0:
            return cls(True, 0, False, penalize)
        candidates = 0
        if 0 < sampling.top_k < vocab_size:
            candidates = min(-(-sampling.top_k // TOP_K_STEP) * TOP_K_STEP, vocab_size)
        return cls(False, candidates, candidates == 0 and sampling.top_p < 1, penalize)


def penalize(logits: Tensor, seen: Tensor, repetition_penalty: Tensor) -> Tensor:
    """Logits [B, V] in float32, made smaller by the penalty for tokens that are `seen` [B, V]."""
    penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    return torch.where(seen, penalized.float(), logits)


def draw(
    logits: Tensor,
    noise: Tensor,
    settings: dict[str, float | Tensor],
    kind: DrawKind,
    filters: tuple[Callable[[Tensor, Tensor], Tensor], ...] = FILTERS,
) -> Tensor:
    """Draws a token [B] for each row of logits [B, V] by inverting its cumulative distribution at noise [B] in [0, 1).

    `settings` gives each filter its value, by the filter's name. Nothing is read by the host. Double precision keeps sums
    over a whole vocabulary exact to well below the noise's own resolution.
    """
    tokens, in_order = None, kind.candidates > 0 or kind.in_order
    if kind.candidates:
        logits, tokens = logits.topk(kind.candidates)  # largest first
    elif kind.in_order:
        logits, tokens = logits.sort(descending=True)
    logits = (logits - logits.amax(-1, keepdim=True)).double()
    for filter in filters:
        if in_order or filter not in NEED_ORDER:
            logits = filter(logits, settings[filter.__name__])
    cumulative = logits.softmax(-1).cumsum(-1)
    pick = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return (pick if tokens is None else tokens.gather(1, pick))[:, 0]


def noise_of(seed: int, prompt: int, sample: int, count: int) -> list[float]:
    """`count` uniform numbers in [0, 1) for a sample of a prompt, both counted from 0.

    They depend on these arguments alone: neither on the device, nor on a neighbour in the batch.
    """
    source = random.Random(f"{seed}/{prompt}/{sample}")
    return [source.getrandbits(32) / 2**32 for _ in range(count)]
