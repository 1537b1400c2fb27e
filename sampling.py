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

    The repetition penalty (CTRL, arXiv:1909.05858, over prompt and new tokens) comes first. Then the filters work in
    the order of FILTERS, each on the distribution that the one before left: temperature, top-k, top-p
    (arXiv:1904.09751), min-p (arXiv:2407.01082). That is transformers' order, too. Raises ValueError for a value out of
    its range.
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
    """What of the `Sampling` of all rows shapes the computation of a step; values are the device's, and differ by
    row."""

    greedy: bool  # whether some rows take the most probable token
    candidates: int  # a multiple of TOP_K_STEP that covers top_k of all rows with a filter of sorted logits; 0: none
    in_order: bool  # whether the whole vocabulary is sorted, for those rows, since some of them have no top-k
    in_any_order: bool  # whether some rows are drawn from a vocabulary that is not sorted
    penalize: bool

    @classmethod
    def of(cls, vocab_size: int, *samplings: Sampling) -> "DrawKind":
        sampled = [sampling for sampling in samplings if sampling.temperature]
        in_order = [sampling for sampling in sampled if needs_order(sampling.top_k, sampling.top_p, vocab_size)]
        limits = [sampling.top_k for sampling in in_order]
        limited = bool(limits) and all(0 < limit < vocab_size for limit in limits)
        return cls(
            greedy=len(sampled) < len(samplings),
            candidates=min(-(-max(limits) // TOP_K_STEP) * TOP_K_STEP, vocab_size) if limited else 0,
            in_order=bool(limits) and not limited,
            in_any_order=len(in_order) < len(sampled),
            penalize=any(sampling.repetition_penalty != 1 for sampling in samplings),
        )


ALL_GREEDY = DrawKind(True, 0, False, False, False)  # all rows, without a penalty: what `Ops.greedy` is for


def needs_order(top_k, top_p, vocab_size: int):
    """Whether a row is drawn from sorted logits, of numbers or of tensors of them: by its own settings alone."""
    return (0 < top_k) & (top_k < vocab_size) | (top_p < 1)


def penalized(logits: Tensor, repetition_penalty: Tensor) -> Tensor:
    """Logits in float32, made smaller by the penalty."""
    return torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty).float()


def penalize(logits: Tensor, seen: Tensor, repetition_penalty: Tensor) -> Tensor:
    """Logits [..., V] in float32, made smaller by the penalty for tokens that are `seen` [..., V]."""
    return torch.where(seen, penalized(logits, repetition_penalty), logits)


def penalize_drafts(result: Tensor, logits: Tensor, drafts: Tensor, repetition_penalty: Tensor):
    """Writes to result [B, T, V], at each place, the penalized logits [B, T, V] of the drafts [B, T - 1] before it.

    They are taken from what is not penalized yet: a draft that was seen before, or comes twice, is penalized once. At a
    place before the last, its newest draft stands for those that come later.
    """
    number = torch.arange(drafts.shape[1], device=drafts.device)
    index = drafts[:, number.minimum(number[:, None])]  # [B, T - 1, T - 1]: in place i + 1 the drafts 0 to i
    result[:, 1:].scatter_(2, index, penalized(logits[:, 1:].gather(2, index), repetition_penalty[:, 1:]))


def _filtered(logits: Tensor, settings: dict[str, Tensor], filters) -> Tensor:
    """The probabilities that filters leave of logits [B, N], in float64."""
    logits = (logits - logits.amax(-1, keepdim=True)).double()
    for filter in filters:
        logits = filter(logits, settings[filter.__name__])
    return logits.softmax(-1)


def distribution(logits: Tensor, settings: dict[str, Tensor], kind: DrawKind) -> Tensor:
    """The probabilities [B, V], in float64, with which `draw` takes the tokens of logits [B, V]."""
    result = None
    if kind.in_any_order:
        result = _filtered(logits, settings, [filter for filter in FILTERS if filter not in NEED_ORDER])
    if kind.candidates or kind.in_order:
        largest, ids = logits.topk(kind.candidates) if kind.candidates else logits.sort(descending=True)
        of_order = torch.zeros_like(logits, dtype=torch.float64).scatter(1, ids, _filtered(largest, settings, FILTERS))
        ordered = needs_order(settings["top_k"], settings["top_p"], logits.shape[-1])
        result = of_order if result is None else torch.where(ordered, of_order, result)
    if kind.greedy:
        best = torch.zeros_like(logits, dtype=torch.float64).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
        result = best if result is None else torch.where(settings["temperature"] == 0, best, result)
    return result


def noise_at(noise: Tensor, number: Tensor, stream: int) -> Tensor:
    """Of three numbers for each new token, in noise [B, 3 * L], one for those of `number` [B, T]: what a draft is drawn
    by, whether it is accepted, or what is drawn in its place."""
    return noise.gather(1, (3 * number + stream).clamp(max=noise.shape[1] - 1))


def draw_from(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Tokens [...] of probabilities [..., V], which need not add up to 1, by inverting their sums at noise [...]."""
    cumulative = probabilities.cumsum(-1)
    token = (cumulative <= noise[..., None] * cumulative[..., -1:]).sum(-1)
    return token.clamp(max=probabilities.shape[-1] - 1)


def accept_or_draw(wanted: Tensor, guessed: Tensor, drafts: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Rejection sampling (arXiv:2211.17192, 2302.01318): tokens [B, T] whose first ones are distributed as `wanted`
    [B, T, V] says, made of drafts [B, T - 1] that were drawn as `guessed` [B, T - 1, V] says; and the drafts, -1 from the
    first one on that was rejected.

    noise [2, B, T] says whether drafts are accepted, and what is drawn where the first one isn't, from what is wanted
    more often than it was guessed, or behind all of them. Nothing is guessed there, or where rounding leaves no such
    thing: what is drawn is what is wanted.
    """
    at = drafts[..., None]
    p, q = wanted[:, :-1].gather(2, at)[..., 0], guessed.gather(2, at)[..., 0]
    accepted = (noise[0, :, :-1] * q < p).cumprod(1).bool()
    rest = torch.cat(((wanted[:, :-1] - guessed).clamp(min=0), wanted[:, -1:]), dim=1)
    rest = torch.where(rest.sum(-1, keepdim=True) > 1e-9, rest, wanted)
    drawn = draw_from(rest, noise[1])
    drafts = torch.where(accepted, drafts, -1)
    return torch.cat((torch.where(accepted, drafts, drawn[:, :-1]), drawn[:, -1:]), dim=1), drafts


def draw(
    logits: Tensor,
    noise: Tensor,
    settings: dict[str, Tensor],
    kind: DrawKind,
    filters: tuple[Callable[[Tensor, Tensor], Tensor], ...] = FILTERS,
) -> Tensor:
    """Draws a token [B] for each row of logits [B, V] by inverting its cumulative distribution at noise [B] in [0, 1).

    `settings` gives each filter its values [B, 1], by the filter's name. A row's token depends on nothing but its own
    logits, noise and settings; only which of equal logits comes first is PyTorch's choice, which knows all rows.
    Nothing is read by the host. Double precision keeps sums over a whole vocabulary exact to well below the noise's own
    resolution.
    """

    def pick(logits: Tensor, filters) -> Tensor:
        return draw_from(_filtered(logits, settings, filters), noise)[:, None]

    token = None
    if kind.in_any_order:
        token = pick(logits, [filter for filter in filters if filter not in NEED_ORDER])
    if kind.candidates or kind.in_order:
        largest, ids = logits.topk(kind.candidates) if kind.candidates else logits.sort(descending=True)
        drawn = ids.gather(1, pick(largest, filters))
        ordered = needs_order(settings["top_k"], settings["top_p"], logits.shape[-1])
        token = drawn if token is None else torch.where(ordered, drawn, token)
    if kind.greedy:
        best = logits.argmax(-1, keepdim=True)
        token = best if token is None else torch.where(settings["temperature"] == 0, best, token)
    return token[:, 0]


def noise_of(seed: int, prompt: int, sample: int, count: int) -> list[float]:
    """`count` uniform numbers in [0, 1) for a sample of a prompt, both counted from 0.

    They depend on these arguments alone: neither on the device, nor on a neighbour in the batch.
    """
    source = random.Random(f"{seed}/{prompt}/{sample}")
    return [source.getrandbits(32) / 2**32 for _ in range(count)]
