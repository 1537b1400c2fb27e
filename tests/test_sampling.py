"""Sampling: every filter against transformers' by exact distributions, the filters' order, noise, and settings."""

import itertools

import pytest
import torch

from sampling import ALL_GREEDY, FILTERS, DrawKind, Sampling, draw, min_p, noise_of, temperature, top_k, top_p
from sampling import SETTINGS as NAMES

VOCABULARY = 50
SETTINGS = {
    "temperature": dict(temperature=0.7),
    "hot": dict(temperature=2.5),
    "top_k": dict(temperature=1.0, top_k=7),
    "top_k of 1": dict(temperature=1.0, top_k=1),
    "top_k of all": dict(temperature=1.0, top_k=50),
    "top_p": dict(temperature=1.0, top_p=0.6),
    "tiny top_p": dict(temperature=1.0, top_p=1e-4),
    "min_p": dict(temperature=1.0, min_p=0.1),
    "min_p of 1": dict(temperature=1.0, min_p=1.0),
    "top_k, top_p": dict(temperature=0.9, top_k=20, top_p=0.8),
    "top_p, min_p": dict(temperature=1.3, top_p=0.9, min_p=0.05),
    "all": dict(temperature=1.5, top_k=25, top_p=0.95, min_p=0.04),
}
OFF = dict(top_k=0, top_p=1.0, min_p=0.0)


def drawn(logits: torch.Tensor, noise: torch.Tensor, filters=FILTERS, **settings) -> torch.Tensor:
    """Tokens [B] by a run's own way from settings to `draw`."""
    sampling = Sampling(**(OFF | settings))
    values = {name: getattr(sampling, name) for name in NAMES}
    return draw(logits, noise, values, DrawKind.of(logits.shape[-1], sampling), filters)


def frequencies(logits: torch.Tensor, n: int, filters=FILTERS, **settings) -> torch.Tensor:
    """Of n tokens whose noise is a grid: the distribution, exact to 1 / n."""
    noise = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = drawn(logits.expand(n, -1), noise, filters, **settings)
    return torch.bincount(tokens, minlength=logits.shape[-1]).double() / n


def reference(logits: torch.Tensor, filters=FILTERS, **settings) -> torch.Tensor:
    """Probabilities by transformers' processors, in the order of `filters`."""
    from transformers.generation import logits_process

    processors = {
        "temperature": logits_process.TemperatureLogitsWarper,
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    for filter in filters:
        if filter.__name__ in settings:
            logits = processors[filter.__name__](settings[filter.__name__])(None, logits)
    return logits.softmax(-1)[0].double()


def random_logits(seed: int = 5) -> torch.Tensor:
    return 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def assert_distribution(frequency: torch.Tensor, exact: torch.Tensor, n: int):
    assert (frequency[exact == 0] == 0).all()
    torch.testing.assert_close(frequency, exact, atol=1.5 / n, rtol=0)


# --- filters


@pytest.mark.parametrize("name", list(SETTINGS))
def test_sampling_follows_the_exact_distribution(name):
    """The reference's own filters give the exact probabilities. Noise on a grid of N makes ours exact to 1 / N."""
    logits, n, settings = random_logits(), 20_000, SETTINGS[name]
    assert_distribution(frequencies(logits, n, **settings), reference(logits, **settings), n)


def test_the_order_of_the_filters_is_the_given_one():
    """All 24 orders, each as transformers in that same order. Some differ: top-p before min-p sums over a tail that
    min-p would have cut, and min-p keeps more behind a high temperature than before it."""
    logits, n = random_logits(), 4000
    settings = dict(temperature=1.6, top_k=30, top_p=0.9, min_p=0.08)
    results = {}
    for order in itertools.permutations(FILTERS):
        exact = reference(logits, order, **settings)
        frequency = frequencies(logits, n, order, **settings)
        assert_distribution(frequency, exact, n)
        results[order] = frequency
    assert FILTERS == (temperature, top_k, top_p, min_p)
    for other in ((temperature, top_k, min_p, top_p), (min_p, temperature, top_k, top_p)):
        assert (results[FILTERS] - results[other]).abs().max() > 0.005, [filter.__name__ for filter in other]


def test_filters_by_hand():
    """Of sorted logits with probabilities 0.5, 0.3, 0.15 and 0.05."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()

    def kept(filter, value) -> int:
        for each in (value, torch.tensor(value, dtype=torch.float64)):  # a run's are on the device
            result = filter(logits, each)
            count = int(result.isfinite().sum())
            assert torch.equal(result[:, :count], logits[:, :count])
        return count

    assert [kept(top_k, value) for value in (0, 1, 3, 9)] == [4, 1, 3, 4]
    assert [kept(top_p, value) for value in (1e-9, 0.49, 0.51, 0.79, 0.81, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert [kept(min_p, value) for value in (0.0, 0.09, 0.11, 0.59, 0.61, 1.0)] == [4, 4, 3, 2, 1, 1]
    torch.testing.assert_close(temperature(logits, 0.5), 2 * logits)


def test_the_ends_of_the_noise_draw_tokens_that_the_filters_kept():
    logits = torch.tensor([[0.0, 3.0, -2.0, 1.0]]).expand(2, -1)
    noise = torch.tensor([0.0, 1 - 2**-32], dtype=torch.float64)
    assert drawn(logits, noise, temperature=1.0, min_p=0.1).tolist() == [1, 3]
    assert drawn(logits, noise, temperature=1.0, top_p=0.5).tolist() == [1, 1]
    assert drawn(logits, noise, temperature=1e-30).tolist() == [1, 1]  # next to nothing is greedy, not NaN


def test_rows_are_drawn_alone():
    logits = torch.cat([random_logits(seed) for seed in range(4)])
    noise = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    for settings in SETTINGS.values():
        alone = [drawn(logits[i : i + 1], noise[i : i + 1], **settings) for i in range(4)]
        assert torch.equal(drawn(logits, noise, **settings), torch.cat(alone))


# --- what a step computes


def test_values_do_not_change_what_a_step_computes():
    """`DrawKind` tells what has to be compiled anew: nothing for another temperature, p, or top_k in the same step."""
    kind = DrawKind.of(4096, Sampling())
    assert kind == (False, 256, False, False, False)
    for same in (dict(temperature=2.0), dict(top_k=7), dict(top_k=256), dict(top_p=0.5), dict(min_p=0.1)):
        assert DrawKind.of(4096, Sampling(**same)) == kind
    whole = DrawKind.of(4096, Sampling(top_k=0))
    assert DrawKind.of(4096, Sampling(top_k=257)).candidates == 512
    assert DrawKind.of(50, Sampling(top_k=30)) == (False, 50, False, False, False)
    assert whole == DrawKind.of(4096, Sampling(top_k=4096)) == (False, 0, False, True, False)
    assert DrawKind.of(4096, Sampling(top_k=0, top_p=0.9)) == (False, 0, True, False, False)
    assert DrawKind.of(4096, Sampling(repetition_penalty=1.1)).penalize
    greedy = Sampling(temperature=0, top_p=0.9)
    assert DrawKind.of(4096, greedy) == ALL_GREEDY
    assert DrawKind.of(4096, greedy, Sampling(), Sampling(top_k=300)) == (True, 512, False, False, False)
    assert DrawKind.of(4096, Sampling(), Sampling(top_k=0, top_p=0.9)) == (False, 0, True, False, False)
    assert DrawKind.of(4096, Sampling(), Sampling(top_k=0)) == (False, 256, False, True, False)


def test_a_row_is_drawn_alike_beside_rows_of_other_settings():
    logits, vocabulary = torch.cat([random_logits(seed) for seed in range(4)]), VOCABULARY
    rows = [dict(temperature=0.0), dict(top_k=7), dict(top_k=0, top_p=1.0), dict(top_k=0, top_p=0.7, temperature=1.3)]
    samplings = [Sampling(**row) for row in rows]
    for noise in (torch.full((4,), value, dtype=torch.float64) for value in (0.05, 0.4, 0.8, 0.99)):
        alone = []
        for i, sampling in enumerate(samplings):
            values = {name: torch.tensor([[getattr(sampling, name)]]).double() for name in NAMES}
            alone.append(draw(logits[i : i + 1], noise[:1], values, DrawKind.of(vocabulary, sampling)))
        for group in itertools.permutations(range(4), 3):
            some = [samplings[i] for i in group]
            values = {name: torch.tensor([[getattr(each, name)] for each in some]).double() for name in NAMES}
            tokens = draw(logits[list(group)], noise[:3], values, DrawKind.of(vocabulary, *some))
            assert tokens.tolist() == [alone[i].item() for i in group]


# --- noise and settings


def test_noise_depends_on_seed_prompt_and_sample_alone():
    noise = noise_of(1, 2, 3, 1000)
    assert noise == noise_of(1, 2, 3, 1000)
    assert noise[:10] == noise_of(1, 2, 3, 10)
    assert all(0 <= value < 1 for value in noise)
    assert sum(noise) / 1000 == pytest.approx(0.5, abs=0.05)
    others = [noise_of(*key, 10) for key in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (1, 23, 0), (12, 3, 0))]
    assert len({tuple(values) for values in (noise[:10], *others)}) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number, at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number, at least 0, not nan"),
        ({"temperature": float("inf")}, "temperature must be .* not inf"),
        ({"temperature": "hot"}, "temperature must be .* not 'hot'"),
        ({"temperature": True}, "temperature must be .* not True"),
        ({"top_k": -1}, r"top_k must be a whole number, at least 0 \(0: no limit\), not -1"),
        ({"top_k": 2.5}, "top_k must be a whole number, .* not 2.5"),
        ({"top_k": True}, "top_k must be .* not True"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p must be .* not 1.1"),
        ({"min_p": 2.0}, "min_p must be a number from 0 to 1, not 2.0"),
        ({"min_p": None}, "min_p must be .* not None"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0, not 0.0"),
    ],
)
def test_settings_out_of_their_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
