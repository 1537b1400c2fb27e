"""Attention of packed prompts against a loop over their sequences: on a GPU, or else in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from test_ops import BF16, DEVICE, E5M2, F32, normal, scalar, seeded  # noqa: F401

from config import PAGE
from ops import common
from ops.common import E4M3, round_fp8
from ops.prefill_attention import PrefillConfig, prefill_attention, prefill_config
from ops.rope import AttentionLayer, Positions

pytestmark = [
    pytest.mark.skipif(not common.available(DEVICE), reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # the interpreter's: infinity is meant
]


def integers(values):
    return None if values is None else torch.tensor(values, device=DEVICE)


def attention_in_float32(sequences, layer, scales, dtype, output_scale):
    """For each (q, k, v, position), k and v from position 0 on: the attention of its queries, in `dtype` or E4M3."""
    results = []
    for q, k, v, position in sequences:
        k, v = (x.repeat_interleave(layer.n_heads // layer.n_kv_heads, dim=1).transpose(0, 1) for x in (k, v))
        scores = q.float().transpose(0, 1) @ k.mT * (layer.scale * scales[0])  # [H, T, positions]
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        behind = position + torch.arange(len(q), device=DEVICE)[:, None] - torch.arange(k.shape[1], device=DEVICE)
        seen = behind >= 0 if layer.window is None else (behind >= 0) & (behind < layer.window)
        y = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v * scales[1]
        y = y.transpose(0, 1).flatten(1).to(dtype)
        results.append(y if output_scale is None else round_fp8(y, output_scale))
    return results


def stored_as(x, dtype, cache_dtype):
    """x as a cache of that dtype stores it, and again in `dtype`."""
    x = round_fp8(x, 1.0, cache_dtype) if cache_dtype.itemsize == 1 else x.to(cache_dtype)
    return x, x.to(dtype)


def packed(lengths, gaps, layer, dtype, cache_dtype, scales, position=None, slots=None):
    """Sequences of `lengths` new tokens behind `position` cached ones, gaps[n] tokens of NaN before the n-th.

    Returns q, k and v, the cache, the index of each first token, and what attention_in_float32 takes. A cache holds
    NaN in pages that are nobody's, and in slots without a token.
    """
    d, kv_heads = layer.head_dim, layer.n_kv_heads
    held = position or [0] * len(lengths)
    first = [sum(lengths[:n]) + sum(gaps[: n + 1]) for n in range(len(lengths))]
    buffer = normal(sum(lengths) + sum(gaps), layer.n_heads + 2 * kv_heads, d, dtype=dtype) * float("nan")
    q, k, v = buffer.split_with_sizes([layer.n_heads, kv_heads, kv_heads], dim=1)
    cache = SimpleNamespace(k_scale=scales[0], v_scale=scales[1])
    if position is not None:
        pages = len(lengths) * slots // PAGE + 2
        empty = torch.full((pages, kv_heads, PAGE, d), float("nan"), device=DEVICE).to(cache_dtype)
        cache.k, cache.v, cache.slots = empty, empty.clone(), slots
        cache.table = torch.randperm(pages, device=DEVICE)[:-2].view(len(lengths), -1).to(torch.int32)
    sequences = []
    for n, length in enumerate(lengths):
        here = slice(first[n], first[n] + length)
        q[here] = normal(length, layer.n_heads, d, dtype=dtype)
        whole = []
        for new, name, scale in ((k, "k", scales[0]), (v, "v", scales[1])):
            stored, x = stored_as(normal(held[n] + length, kv_heads, d, scale=1 / scale), dtype, cache_dtype)
            new[here] = x[held[n] :]
            whole.append(x.float())
            for p in range(max(0, held[n] - (slots or 0)), held[n]):
                page = cache.table[n, p % slots // PAGE]
                getattr(cache, name).view(torch.uint8)[page, :, p % PAGE] = stored[p].view(torch.uint8)
        sequences.append((q[here], *whole, held[n]))
    return (q, k, v), cache, first, sequences


def check(
    dtype, cache_dtype, layer, lengths, gaps, position=None, slots=None, output_scale=None, config=None, apart=False
):
    scales = (0.5, 0.25) if cache_dtype.itemsize == 1 else (1.0, 1.0)
    qkv, cache, first, sequences = packed(lengths, gaps, layer, dtype, cache_dtype, scales, position, slots)
    positions = Positions(
        len(lengths), max(lengths), integers(position), integers(lengths), rope=None, first=integers(first)
    )
    config = config or PrefillConfig(block_m=32, block_n=32, num_warps=4, num_stages=2)
    if apart:
        qkv = qkv[0].contiguous(), *qkv[1:]
    actual = prefill_attention(*qkv, layer, cache, positions, dtype, output_scale, config)
    assert actual.shape == (len(qkv[0]), layer.n_heads * layer.head_dim)
    for at, expected in zip(first, attention_in_float32(sequences, layer, scales, dtype, output_scale)):
        assert_near(actual[at : at + len(expected)], expected, dtype)


def assert_near(actual, expected, dtype):
    """Equal up to the rounding of the result and, in bfloat16, of the weights before their product with values."""
    assert actual.dtype == expected.dtype
    step = {F32: 1e-5, BF16: 2**-7, E4M3: 2**-3}[actual.dtype]
    actual, expected = actual.float(), expected.float()
    atol = (1e-5 if dtype == F32 else 2**-7) * expected.abs().amax().item() if len(expected) else 0.0
    torch.testing.assert_close(actual, expected, rtol=step, atol=atol)


MHA, GQA, MQA = (2, 2), (4, 2), (3, 1)
PACKED = {  # heads, D, window, softcap, lengths, tokens of padding before each
    "gqa": (GQA, 64, None, None, [100, 1, 65, 3], [0, 5, 0, 17]),
    "gqa-softcap-window": (GQA, 24, 40, 2.0, [64, 3, 100], [3, 0, 0]),
    "mqa-window": (MQA, 64, 33, None, [63, 100, 1], [0, 0, 40]),
    "mha-softcap": (MHA, 24, None, 2.0, [65, 0, 63], [1, 0, 2]),
    "window-1": (MHA, 24, 1, None, [40, 3], [0, 0]),
    "one": (MHA, 24, None, None, [1], [0]),
}


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_new_tokens_see_each_other(case, dtype):
    heads, d, window, softcap, lengths, gaps = PACKED[case]
    layer = AttentionLayer(*heads, d, d**-0.5, softcap, window)
    check(dtype, dtype, layer, lengths, gaps)


BEHIND = {  # heads, D, window, softcap, lengths, cached tokens of each, slots
    "global": (GQA, 64, None, None, [33, 3, 1, 64, 10], [0, 130, 64, 70, 1], 256),
    "global-softcap": (MHA, 24, None, 2.0, [3, 40], [130, 70], 192),
    "ring": (MHA, 24, 64, None, [40, 65, 3, 70], [130, 1, 64, 0], 64),  # that has come round, and not
    "ring-larger": (MQA, 64, 70, 2.0, [100, 1, 20], [300, 129, 70], 128),
}


@pytest.mark.parametrize("case", BEHIND)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (F32, BF16), (BF16, E4M3), (BF16, E5M2)])
def test_new_tokens_see_cached_ones(case, dtypes):
    heads, d, window, softcap, lengths, position, slots = BEHIND[case]
    layer = AttentionLayer(*heads, d, d**-0.5, softcap, window)
    check(*dtypes, layer, lengths, [0, 7] + [0] * (len(lengths) - 2), position, slots)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, E4M3), (F32, F32)])
def test_result_in_e4m3(dtypes):
    layer = AttentionLayer(*GQA, 64, 0.125)
    check(*dtypes, layer, [20, 40], [0, 0], [70, 1], 128, output_scale=scalar(0.01))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("head_dim", [24, 256, 512])
def test_own_configs(head_dim, dtype):
    """The blocks that are picked for these sizes, of which more than one are needed."""
    layer = AttentionLayer(2, 1, head_dim, head_dim**-0.5, softcap=5.0 if head_dim == 256 else None)
    for programs in {0, common.SMS} if dtype == BF16 else {0}:
        config = prefill_config(head_dim, dtype, programs)
        length = config.block_m + 9
        check(dtype, dtype, layer, [length, 3], [0, 1], [0, 70], 128, config=config)


@pytest.mark.parametrize("position", [None, [70, 1]])
def test_keys_of_another_layer(position):
    """They are in a buffer of their own."""
    layer = AttentionLayer(*GQA, 24, 0.2)
    check(BF16, E4M3, layer, [70, 5], [0, 3], position, 128, apart=True)


def test_blocks_larger_than_pages():
    layer = AttentionLayer(2, 2, 24, 0.2, window=150)
    config = PrefillConfig(block_m=64, block_n=128, num_warps=4, num_stages=2)
    check(BF16, BF16, layer, [300, 40], [0, 0], [200, 65], 192, config=config)


@pytest.mark.parametrize("lengths", [None, [7, 20, 13]])
def test_sequences_of_one_shape(lengths):
    """Without `first` they are T tokens apart, and without lengths they have T of them."""
    layer, tokens = AttentionLayer(*GQA, 24, 0.2), 20
    counts = lengths or [tokens] * 3
    gaps = [0, *(tokens - length for length in counts[:-1])]
    (q, k, v), _, first, sequences = packed(counts, gaps, layer, F32, F32, (1.0, 1.0))
    assert first == [0, tokens, 2 * tokens]
    positions = Positions(3, tokens, None, integers(lengths), rope=None)
    actual = prefill_attention(q, k, v, layer, None, positions, F32)
    for at, expected in zip(first, attention_in_float32(sequences, layer, (1.0, 1.0), F32, None)):
        assert_near(actual[at : at + len(expected)], expected, F32)


def test_scales_hold_without_context():
    """The first forward of a prompt has a cache that nothing is read of."""
    layer = AttentionLayer(*GQA, 24, 0.2)
    (q, k, v), cache, first, sequences = packed([40], [0], layer, BF16, E4M3, (0.5, 0.25))
    positions = Positions(1, 40, None, integers([40]), rope=None, first=integers(first))
    actual = prefill_attention(q, k, v, layer, cache, positions, BF16)
    (expected,) = attention_in_float32(sequences, layer, (0.5, 0.25), BF16, None)
    assert_near(actual, expected, BF16)


def test_many_sequences():
    """As many blocks as there can be: each sequence has one query more than a block has."""
    layer = AttentionLayer(1, 1, 24, 0.2)
    check(F32, F32, layer, [17] * 9, [0] * 9, config=PrefillConfig(16, 16, 4, 1))
