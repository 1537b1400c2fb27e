"""Each kernel against the PyTorch that defines it: on a GPU where there is one, else in Triton's interpreter."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES, GLOBAL, LOCAL, SIZES, small_model

import ops
from cache import CODECS, KVCache, KVScales, LayerCache, codec_of
from config import NAMED_CONFIGS, PAGE, ModelConfig
from formats import Weight
from model import Attention, FeedForward, Transformer
from ops import attention, common, decode_attention, integer, lookup, matmul, next_token, norm, rope
from ops.common import E4M3
from ops.decode_attention import AttentionConfig
from ops.integer import IntGemvConfig
from ops.matmul import GemmConfig, GemvConfig
from ops.rope import AttentionLayer, Positions
from parallel import Shard
from runner import State, decode_step
from sampling import ALL_GREEDY

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, F32, E5M2 = torch.bfloat16, torch.float32, torch.float8_e5m2
DTYPES = pytest.mark.parametrize("dtype", [BF16, F32])

pytestmark = [
    pytest.mark.skipif(not common.available(DEVICE), reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # the interpreter's: infinity is meant,
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),  # and so is NaN
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(*shape, dtype=F32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def fp8(*shape, dtype=E4M3):
    return normal(*shape, scale=20).to(dtype)


def scalar(value):
    return torch.tensor(value, dtype=F32, device=DEVICE)


def assert_same(actual, expected):
    """Equal but for few values, and those to one step of the type: the order of a sum decides how it is rounded."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    step = {F32: 1e-5, BF16: 2**-7, E4M3: 2**-3, E5M2: 2**-2}[actual.dtype]
    actual, expected = actual.float(), expected.float()
    torch.testing.assert_close(actual, expected, rtol=step, atol=step / 8 * expected.abs().max().item())
    if step > 1e-5:
        assert (actual != expected).float().mean() < (0.1 if DEVICE.type == "cuda" else 0.05)


def assert_near(actual, expected, factors=1):
    """Equal to a rounding of all weights to bfloat16, beside the result's, in each of its factors."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    actual, expected = actual.float(), expected.float()
    atol = factors * 2**-7 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=factors * 2**-7, atol=atol)
    assert (actual - expected).norm() < 0.006 * factors * expected.norm()


def partial_sums(y, split_k):
    """Float32 matrices whose sum is y in its own precision; y as it is for a split_k of 0."""
    if not split_k:
        return y
    pieces = [normal(*y.shape) for _ in range(split_k - 1)]
    return torch.stack([*pieces, y.float() - sum(pieces)])


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@DTYPES
@pytest.mark.parametrize("split_k", [0, 1, 3])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_add_norm(dtype, split_k, post, rounded):
    m, n = 3, 75
    x, y = normal(m, n, dtype=dtype), partial_sums(normal(m, n, dtype=dtype), split_k)
    weight, post_weight = normal(n, dtype=dtype), normal(n, dtype=dtype) if post else None
    arguments = (x, y, post_weight, weight, 1e-6, scalar(0.01) if rounded else None)
    x_new, h = norm.add_norm_triton(*arguments)
    expected_x, expected_h = norm.add_norm(*arguments)
    assert_same(x_new, expected_x)
    assert_same(h, expected_h)


@DTYPES
def test_add_norm_with_an_offset_and_a_factor(dtype):
    m, n = 3, 75
    x, y, weight, post_weight = (normal(*shape, dtype=dtype) for shape in ((m, n), (m, n), (n,), (n,)))

    def normed(x, weight, offset):
        return F.rms_norm(x.float(), (n,), offset + weight.float(), 1e-6).to(dtype)

    for offset in (0.0, 1.0, 0.5):
        for factor in (None, normal(1, dtype=dtype)):
            arguments = (x, y, post_weight, weight, 1e-6, None, offset, factor)
            expected = x + normed(y, post_weight, offset)
            expected = expected if factor is None else expected * factor
            for add_norm in (norm.add_norm, norm.add_norm_triton):
                x_new, h = add_norm(*arguments)
                assert_same(x_new, expected)
                assert_same(h, normed(x_new, weight, offset))


@pytest.mark.parametrize("add_norm", [norm.add_norm, norm.add_norm_triton])
def test_add_norm_of_x_alone_and_without_a_norm(add_norm):
    x, y, weight = normal(2, 64, dtype=BF16), normal(2, 64, dtype=BF16), normal(64, dtype=BF16)
    x_new, h = add_norm(x, None, None, weight, 1e-6)
    assert x_new is x
    assert_same(h, norm.rms_norm(x, weight, 1e-6))
    x_new, h = add_norm(x, y, None, None, 1e-6)
    assert h is None
    assert_same(x_new, x + y)


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("post", [False, True])
def test_add_norm_of_a_pair(dtype, offset, post):
    m, n = 3, 75
    x, y, z = (normal(m, n, dtype=dtype) for _ in range(3))
    weight, y_weight, z_weight, post_weight = (normal(n, dtype=dtype) for _ in range(4))

    def normed(x, weight):
        return F.rms_norm(x.float(), (n,), offset + weight.float(), 1e-6).to(dtype)

    added = normed(y, y_weight) + normed(z, z_weight)
    expected = x + (normed(added, post_weight) if post else added)
    for split_k, other_split_k in ((0, 0), (2, 0), (0, 3)):
        pair = norm.Pair(partial_sums(y, split_k), y_weight, partial_sums(z, other_split_k), z_weight)
        for add_norm in (norm.add_norm, norm.add_norm_triton):
            x_new, h = add_norm(x, pair, post_weight if post else None, weight, 1e-6, None, offset)
            assert_same(x_new, expected)
            assert_same(h, normed(x_new, weight))


@DTYPES
@pytest.mark.parametrize(("layers", "p"), [(3, 24), (5, 64)])
def test_per_layer_inputs(dtype, layers, p):
    m, offset = 4, 0.0
    tokens_part, product, weight = (normal(*shape, dtype=dtype) for shape in ((m, layers * p), (m, layers * p), (p,)))
    actual = [
        each(tokens_part, product, weight, 0.3, 1e-6, offset)
        for each in (norm.per_layer_inputs, norm.per_layer_inputs_triton)
    ]
    for i in range(layers):
        part = slice(p * i, p * i + p)
        y = F.rms_norm((product[:, part] * 0.3).float(), (p,), weight.float(), 1e-6).to(dtype)
        expected = ((y + tokens_part[:, part]).float() / 2**0.5).to(dtype)
        for each in actual:
            assert_same(each[:, i], expected)


@DTYPES
@pytest.mark.parametrize("split_k", [0, 2])
def test_geglu(dtype, split_k, monkeypatch):
    monkeypatch.setattr(norm, "GEGLU_BLOCK", 32)
    y = normal(3, 2 * 45, dtype=dtype, scale=3)
    y[0, :4] = torch.tensor([100.0, -100, 1e4, -1e4])
    y = partial_sums(y, split_k)
    for scale in (None, scalar(0.02)):
        assert_same(norm.geglu_triton(y, dtype, scale), norm.geglu(y, dtype, scale))


@DTYPES
def test_rescale(dtype):
    x = normal(3, 700, dtype=dtype)
    for arguments in ((x, 0.3), (x, 0.3, scalar(0.02)), (x, 1.0, scalar(0.02))):
        assert_same(norm.rescale_triton(*arguments), norm.rescale(*arguments))
    assert norm.rescale_triton(x, 1.0) is x


def test_fp8_saturates_and_keeps_nan():
    y = torch.tensor([[1e4, -1e4, float("nan"), 0.5, 1, 1, 1, 1]], device=DEVICE)
    for geglu in (norm.geglu, norm.geglu_triton):
        h = geglu(y, F32, scalar(1.0)).float()
        assert h[0, 0] == 448
        assert h[0, 2].isnan()


@pytest.mark.parametrize("kind", [BF16, F32, E4M3])
def test_embed(kind):
    weight, tokens = (fp8 if kind == E4M3 else normal)(50, 72).to(kind), torch.tensor([3, 49, 0], device=DEVICE)
    arguments = (tokens, weight, 55.5, F32 if kind == F32 else BF16, scalar(0.013) if kind == E4M3 else None)
    assert torch.equal(norm.embed_triton(*arguments), norm.embed(*arguments))


def test_embed_int8():
    weight, tokens = int_weight(50, 72, 0), torch.tensor([3, 49, 0], device=DEVICE)
    arguments = (tokens, weight.data, 55.5, BF16, weight.scale)
    expected = norm.embed(*arguments)
    assert torch.equal(norm.embed_triton(*arguments), expected)
    assert torch.equal(expected, integer.dequantize(weight, BF16)[tokens] * 55.5)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def test_rope():
    position, frequencies = torch.tensor([0, 7, 131_071], device=DEVICE), [normal(24), normal(10, scale=0.01)]
    for kinds in (1, 2):
        arguments = position, *frequencies[:kinds]
        torch.testing.assert_close(rope.rope_triton(*arguments), rope.rope(*arguments), rtol=0, atol=1e-6)


def frequencies(d):
    return (torch.rand(d // 2).repeat(2) * torch.tensor([-1.0, 1]).repeat_interleave(d // 2)).to(DEVICE)


def turning_frequencies(d, pairs):
    """Of which only the first pairs turn, and the rotation of a cache of values alone at 128 positions."""
    frequency = frequencies(d)
    frequency.view(2, -1)[:, pairs:] = 0
    rotation = rope.rope(torch.arange(128, device=DEVICE), frequency[d // 2 :][:pairs])[0]
    return frequency, rotation.transpose(0, 1).contiguous()


def layer_cache(rows, heads, slots, d, dtype, scales=(1.0, 1.0), fill=True, rotation=None):
    """A cache as if there had been tokens in every slot, or full of zeros; its pages are in no order."""
    count = rows * slots // PAGE
    table = (1 + torch.randperm(count)).int().view(rows, -1).to(DEVICE)
    cache = LayerCache(1 + count, heads, d, table, codec_of(dtype, dtype), scales, rotation=rotation)
    if fill:
        for stored in cache.stored:
            stored.copy_(normal(*stored.shape))
    return cache


def copy_of(cache):
    copy = cache.with_table(cache.table)
    copy.k, copy.v = None if cache.k is None else cache.k.clone(), cache.v.clone()
    return copy


def slots_in_order(stored, cache):
    """[B, K, S, D] of what is stored in pages."""
    pages = stored.view(torch.uint8)[cache.table].view(stored.dtype)  # [B, S / PAGE, K, PAGE, D]
    return torch.cat(pages.unbind(1), dim=2)


def normed_and_rotated(heads, layer, angles):
    """Queries and, if the layer has them, keys and values of heads [M, HEADS + kv_products * KV_HEADS, D]."""

    def normed(x, weight):
        return F.rms_norm(x.float(), x.shape[-1:], weight, layer.eps).to(x.dtype)

    kv = heads[:, layer.n_heads :]
    parts = [heads[:, : layer.n_heads], kv[:, : layer.n_kv_heads], kv[:, -layer.n_kv_heads :]]
    parts = parts if layer.kv_products else parts[:1]
    for i, weight in enumerate((layer.q_norm, layer.k_norm)[: len(parts)]):
        if weight is not None:
            parts[i] = normed(parts[i], layer.norm_offset + weight.float())
        parts[i] = rope.rotate(parts[i], *angles)
    if layer.v_norm:
        parts[2:] = [normed(x, None) for x in parts[2:]]
    return parts


def attention_in_float32(qkv, layer, cache, positions, dtype, output_scale=None):
    """What decode_attention and, for one new token a row, attend stand for: of a softmax that nothing is rounded in."""
    (_, kv_heads, _, d), position, slots = cache.v.shape, positions.position, cache.slots
    m = len(position)
    q, *new = normed_and_rotated(common.summed(qkv, dtype).view(m, -1, d), layer, positions.rope[:, :, None])
    page = cache.table[torch.arange(m, device=qkv.device), position % slots // PAGE]
    for stored, x, scale in ((cache.k, new[0], cache.k_scale), (cache.v, new[-1], cache.v_scale)) if new else ():
        if stored is None:
            continue
        x = common.round_fp8(x, scale, stored.dtype) if stored.dtype.itemsize == 1 else x.to(stored.dtype)
        stored.view(torch.uint8)[page, :, position % PAGE] = x.view(torch.uint8)
    slot = torch.arange(slots, device=qkv.device)
    age = (position[:, None] - slot) % slots  # tokens since the one in a slot
    used = ((age <= position[:, None]) & (age < (layer.window or slots)))[:, None, :, None]  # [B, 1, S, 1]
    *k, v = (torch.where(used, slots_in_order(stored, cache).float(), 0.0) for stored in cache.stored)
    k = k[0] if k else rope.keys_of_values(v, layer, *rope.rotation_of_heads(cache.rotation[:slots], d))
    scores = q.float().view(m, kv_heads, -1, d) @ k.mT * (layer.scale * cache.k_scale)  # [B, K, G, S]
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    weights = scores.masked_fill(~used.mT, float("-inf")).softmax(-1)
    y = (weights @ v * cache.v_scale).to(dtype).view(m, -1)
    return y if output_scale is None else common.round_fp8(y, output_scale)


ATTENTION = {  # by_sums, B, H, K, D, S, window, products of K and V, norm of V, norms' offset
    "mha-sums": (True, 3, 2, 2, 24, 64, 50, 2, False, 1.0),
    "mha": (False, 3, 2, 2, 64, 128, None, 2, False, 1.0),
    "gqa": (False, 3, 6, 2, 32, 64, 64, 2, False, 1.0),
    "mqa": (False, 5, 4, 1, 24, 64, 9, 2, False, 1.0),
    "mqa-20": (False, 1, 20, 1, 32, 64, None, 2, False, 1.0),
    "v-norm-sums": (True, 3, 2, 2, 24, 64, 50, 2, True, 0.0),
    "k-is-v-sums": (True, 3, 2, 2, 24, 128, None, 1, True, 0.0),
    "no-kv-sums": (True, 3, 2, 2, 24, 64, 50, 0, True, 0.0),
    "no-kv-sums-global": (True, 3, 2, 2, 24, 128, None, 0, True, 0.0),
    "v-norm": (False, 3, 4, 2, 24, 64, 50, 2, True, 0.0),
    "k-is-v": (False, 3, 4, 1, 24, 128, None, 1, True, 0.0),
    "values-alone": (False, 3, 4, 1, 24, 128, None, 1, True, 0.0),
    "no-kv": (False, 5, 4, 2, 24, 64, 9, 0, True, 0.0),
    "no-kv-global": (False, 3, 4, 1, 24, 128, None, 0, True, 0.0),
}


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, E4M3)])
def test_decode_attention(case, dtypes):
    by_sums, m, heads, kv_heads, d, slots, window, products, v_norm, offset = ATTENTION[case]
    dtype, cache_dtype = dtypes
    # one key; a ring that is full, and has come round; between
    come_round = slots + 9 if window else slots - 2
    position = torch.tensor([0, come_round, slots // 2, slots - 1, 7][-m:], device=DEVICE)
    frequency, rotation = turning_frequencies(d, 3) if case == "values-alone" else (frequencies(d), None)
    angles = rope.rope(position, frequency)[0]
    config = AttentionConfig(block_s=16, num_warps=4, num_stages=2, by_sums=by_sums)
    unit = 0.004
    norms = dict(q_norm=normal(d, dtype=dtype), k_norm=normal(d, dtype=dtype) if products else None)
    options = dict(v_norm=v_norm, kv_products=products, norm_offset=offset)
    for kv_splits, split_k, scale, rounded, normed in (
        (1, 0, 0.3, False, True),
        (1, 0, 2.0, True, False),
        (2, 2, 2.0, True, True),
    ):
        softcap = 5.0 if rounded else None
        layer = AttentionLayer(heads, kv_heads, d, scale, softcap, window, **options, **(norms if normed else {}))
        output_scale = scalar(unit) if rounded else None
        qkv = partial_sums(normal(m, (heads + products * kv_heads) * d, dtype=dtype), split_k)
        scales = (0.02, 0.5) if rounded else (1.0, 1.0)
        cache = layer_cache(m, kv_heads, slots, d, cache_dtype, scales, rotation=rotation)
        mask = attention.attention_mask(cache, window, position[:, None], position, dtype)
        slot = cache.slots_for(torch.arange(m, device=DEVICE), position, position + 1)
        positions = Positions(m, 1, position, None, angles, mask, slot, decoding=True)
        for stored in cache.stored:
            stored[0] = float("nan")  # nobody's
        for row, p in enumerate(position.tolist()):
            for stored in cache.stored:  # what is not in use yet, and the slot that is about to be written
                for slot in (*range(p + 1, slots), *[p % slots] * (products > 0)):
                    stored[cache.table[row, slot // PAGE], :, slot % PAGE] = float("nan")
        finite, expected_cache = copy_of(cache), copy_of(cache)
        y = decode_attention.decode_attention(
            qkv, layer, cache, positions._replace(mask=None, slot=None), dtype, output_scale, kv_splits, config
        )
        defined = attention.attend(qkv, layer, finite, positions, dtype, output_scale)
        expected = attention_in_float32(qkv, layer, expected_cache, positions, dtype, output_scale)
        for i in range(len(cache.stored)):
            of_all = [slots_in_order(each.stored[i], each) for each in (expected_cache, cache, finite)]
            for row, p in enumerate(position.tolist()):
                for actual in of_all[1:]:
                    assert_same(actual[row, :, : p + 1], of_all[0][row, :, : p + 1])
        rounds = dict(rtol=2**-3 if rounded else 2**-6, atol=0.005 / unit if rounded else 0.02)
        if dtype == BF16 and not by_sums:  # weights are rounded for the second product
            torch.testing.assert_close(y.float(), expected.float(), **rounds)
        else:
            assert_same(y, expected)
        if dtype == BF16:  # so are weights and values before their scale
            torch.testing.assert_close(defined.float(), expected.float(), **rounds)
        else:
            assert_same(defined, expected)


def test_kv_splits_fill_the_gpu():
    pick = decode_attention.pick_kv_splits
    assert pick(1024, 512, 16) == 1
    assert pick(16, 512, 64) == 4
    assert pick(16, 512, 8, num_warps=1) == 32
    assert pick(1, 8192, 32) == 64
    assert pick(1, 40, 32) == 1
    cache, position = layer_cache(1, 1, 128, 24, F32), torch.tensor([33], device=DEVICE)
    expected_cache, layer = copy_of(cache), AttentionLayer(1, 1, 24, 0.3)
    arguments = layer, cache, Positions(1, 1, position, None, normal(2, 1, 24), decoding=True), F32
    qkv = normal(1, 72)
    expected = attention_in_float32(qkv, layer, expected_cache, *arguments[2:])
    assert_same(decode_attention.decode_attention(qkv, *arguments), expected)  # of two splits the second has no slots


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "split_k", "window", "ragged"),
    [
        (BF16, BF16, 2, None, True),
        (BF16, E4M3, 0, 5, True),
        (F32, E5M2, 0, 5, False),
        (F32, F32, 3, None, False),
    ],
)
@pytest.mark.parametrize(("cached", "alone"), [(None, False), ((3, 70, 0), False), ((3, 70, 0), True)])
def test_attention_of_prompts(dtype, cache_dtype, split_k, window, ragged, cached, alone):
    """What new tokens get, behind cached ones or not, and what a later query will see of the cache; packed, too. Global
    layers' caches may keep values alone."""
    window = None if alone else window
    rows, tokens, heads, kv_heads, d, slots = 3, 8, 4, 2, 24, 64 if window else 128
    lengths = torch.tensor([tokens, 3, 6] if ragged else [tokens] * 3, device=DEVICE)
    position = None if cached is None else torch.tensor(cached, device=DEVICE)
    qkv = partial_sums(normal(rows * tokens, (heads + (2 - alone) * kv_heads) * d, dtype=dtype), split_k)
    norms = dict(q_norm=normal(d, dtype=dtype), k_norm=normal(d, dtype=dtype)) if split_k else dict(softcap=5.0)
    norms |= dict(kv_products=1, v_norm=True, norm_offset=0.0) if alone else {}
    layer = AttentionLayer(heads, kv_heads, d, 0.3, window=window, **norms)
    row, query = torch.arange(rows, device=DEVICE).repeat_interleave(tokens), torch.arange(tokens).repeat(rows)
    query, end = query.to(DEVICE), lengths
    if cached is not None:
        query, end = query + position[row], end + position
    frequency, rotation = turning_frequencies(d, 5) if alone else (frequencies(d), None)
    angles = rope.rope(query, frequency)[0]
    output_scale = scalar(0.01) if cache_dtype == E4M3 else None
    before = layer_cache(rows, kv_heads, slots, d, cache_dtype, (0.02, 0.5), cached is not None, rotation)
    before.ring = window is not None
    valid = torch.arange(tokens, device=DEVICE) < lengths[:, None]
    results = []
    for attend, packed in (
        (attention.attend, False),
        (attention.attend_triton, False),
        (attention.attend_triton, True),
    ):
        cache = copy_of(before)
        slot, mask, first = cache.slots_for(row, query, end[row]), None, None
        if cached is not None:
            mask = attention.attention_mask(cache, window, query.view(rows, -1), position, dtype)
        mine, its_angles = qkv, angles
        if packed:  # and padding behind all
            kept = torch.cat((valid.flatten().nonzero()[:, 0], torch.zeros(2, dtype=torch.long, device=DEVICE)))
            mine, its_angles, slot = qkv[..., kept, :].contiguous(), angles[:, kept].contiguous(), slot[kept]
            slot[-2:] = 0
            first = lengths.cumsum(0) - lengths
        positions = Positions(
            rows, tokens, position, lengths if ragged or packed else None, its_angles, mask, slot, first
        )
        y = attend(mine, layer, cache, positions, dtype, output_scale)
        assert not packed or not y[-2:].float().any()  # a NaN in padding would not stay there
        y = y[:-2] if packed else y[valid.flatten()]
        held = cache.held_positions(end) >= 0
        stored = [slots_in_order(x, cache).transpose(1, 2)[held] for x in cache.stored]
        assert all(x.float().abs().sum(-1).count_nonzero() == x[..., 0].numel() for x in stored)
        results.append((y, *stored))
    for actual in results[1:]:
        for mine, expected in zip(actual, results[0]):
            if dtype == BF16 and mine is actual[0]:  # the two round weights at other places
                unit = 1 if output_scale is None else 0.01
                torch.testing.assert_close(mine.float(), expected.float(), rtol=2**-3, atol=0.02 / unit)
            else:
                assert_same(mine, expected)


@pytest.mark.parametrize(
    ("attend", "dtype", "cache_dtype"), [(attention.attend, F32, F32), (attention.attend_triton, BF16, E4M3)]
)
@pytest.mark.parametrize(
    ("window", "cached", "products"), [(None, None, 1), (None, (70, 3), 2), (50, (70, 3), 2), (50, (70, 3), 1)]
)
def test_prompts_of_layers_that_share_keys(attend, dtype, cache_dtype, window, cached, products):
    """A layer with norms, and one that has its keys and values, against layers without norms and with keys of their
    own; a ring has lost tokens by the time that the second layer runs."""
    rows, tokens, heads, kv_heads, d, slots = 2, 11, 4, 2, 24, 64 if window else 128
    norms = dict(q_norm=normal(d, dtype=dtype), norm_offset=0.0, v_norm=True)
    layers = (
        AttentionLayer(heads, kv_heads, d, 0.3, None, window, k_norm=normal(d), kv_products=products, **norms),
        AttentionLayer(heads, kv_heads, d, 0.3, None, window, kv_products=0, **norms),
    )
    plain = AttentionLayer(heads, kv_heads, d, 0.3, None, window)
    row, query = torch.arange(rows, device=DEVICE).repeat_interleave(tokens), torch.arange(tokens).repeat(rows)
    query, position = query.to(DEVICE), None if cached is None else torch.tensor(cached, device=DEVICE)
    query = query if cached is None else query + position[row]
    angles, still = rope.rope(query, frequencies(d))[0], torch.zeros(2, rows * tokens, d, device=DEVICE)
    still[0] = 1
    cache = layer_cache(rows, kv_heads, slots, d, cache_dtype, (0.02, 0.5), fill=cached is not None)
    cache.ring = window is not None
    before = copy_of(cache)
    end, mask = tokens if cached is None else tokens + position[row], None
    if cached is not None:
        mask = attention.attention_mask(cache, window, query.view(rows, -1), position, dtype)
    slot = cache.slots_for(row, query, end)
    positions = Positions(rows, tokens, position, None, angles, mask, slot, kept={})
    kv = []
    for layer in layers:
        qkv = partial_sums(normal(rows * tokens, (heads + layer.kv_products * kv_heads) * d, dtype=dtype), 2)
        parts = normed_and_rotated(common.summed(qkv, dtype).view(rows * tokens, -1, d), layer, angles[:, :, None])
        q, kv = parts[0], parts[1:] or kv
        expected_cache = copy_of(before)
        expected_cache.ring = cache.ring
        expected = attend(
            torch.cat((q, *kv), 1).flatten(1), plain, expected_cache, positions._replace(rope=still), dtype
        )
        assert_same(attend(qkv, layer, cache, positions, dtype), expected)
        for stored, written in ((cache.k, expected_cache.k), (cache.v, expected_cache.v)):
            assert_same(stored, written)


# ---------------------------------------------------------------------------------------------------------------------
# Products


def product(x, weight, dtype):
    """x @ weight.T in float32, of the weight as it is stored, rounded once."""
    if weight.input_scale is not None:
        return (F.linear(x.float(), weight.data.float()) * (weight.input_scale * weight.scale)).to(dtype)
    return F.linear(x.float(), weight.format.dequantize(weight, F32)).to(dtype)


def dense_inputs(m, n, k, dtype):
    """x, a weight of `dtype`, and the dtype of their product."""
    if dtype == E4M3:
        return fp8(m, k), Weight.of("fp8", fp8(n, k), scalar(0.003), scalar(0.02)), BF16
    return normal(m, k, dtype=dtype), Weight.of("bf16", normal(n, k, dtype=dtype, scale=k**-0.5)), dtype


def int_weight(n, k, group):
    """Random codes, zeros far off the middle, too; group 0: int8."""
    scale = (torch.rand(n, k // group if group else 1) + 0.5) * k**-0.5 / (4 if group else 70)
    if not group:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return Weight.of("int8", codes.to(DEVICE), scale[:, 0].bfloat16().to(DEVICE))
    packed = integer.pack_int4(torch.randint(0, 16, (n, k)))
    zero = torch.randint(70, 190, scale.shape)
    zero[0] = torch.arange(k // group) % 2 * 255
    scales = torch.stack((scale, zero / 16), -1).bfloat16()
    return Weight.of("int4", packed.to(DEVICE), scales.to(DEVICE), shape=(n, k), group=group)


def assert_sum(y, split_k, x, weight, dtype, compare=assert_same):
    """Compares a product, or what may be split_k partial sums of one."""
    assert y.dim() == 2 if split_k == 1 else (len(y) <= split_k and y.dtype == F32)
    compare(common.summed(y, dtype), product(x, weight, dtype))


PRODUCTS = pytest.mark.parametrize("dtype", [BF16, F32, E4M3])


@PRODUCTS
def test_definition_of_matmul(dtype):
    x, weight, out = dense_inputs(5, 48, 128, dtype)
    for _ in range(2):
        assert_same(matmul.matmul(x, weight, out, partials=True), product(x, weight, out))
        if DEVICE.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            weight.pack()  # only what is in bf16
            assert (weight.packed is not None) == (dtype == BF16)
    expected = norm.geglu(matmul.matmul(x, weight, out), out, scalar(0.05))
    assert torch.equal(matmul.matmul_geglu(x, weight, out, scalar(0.05)), expected)


@DTYPES
@pytest.mark.parametrize("group", [0, 64])
def test_definition_of_matmul_by_integers(dtype, group):
    x, weight = normal(5, 128, dtype=dtype), int_weight(48, 128, group)
    y = matmul.matmul(x, weight, dtype)
    (assert_near if dtype == BF16 else assert_same)(y, product(x, weight, dtype))
    assert torch.equal(matmul.matmul_geglu(x, weight, dtype), norm.geglu(y, dtype))


@PRODUCTS
@pytest.mark.parametrize("early", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 11, 80), (1, 16, 256), (1, 5, 100), (3, 11, 80), (4, 5, 100)])
def test_gemv(dtype, shape, early):
    x, weight, out = dense_inputs(*shape, dtype)
    config = GemvConfig(block_n=4, block_k=64, num_warps=4, num_stages=3, early=early)
    assert_same(matmul.gemv(x, weight, out, config=config), product(x, weight, out))


@PRODUCTS
@pytest.mark.parametrize("m", [1, 2, 5])
def test_matmul_geglu(dtype, m):
    x, weight, out = dense_inputs(m, 2 * 5, 80, dtype)
    next_scale = scalar(0.05) if dtype == E4M3 else None
    expected = norm.geglu(product(x, weight, out), out, next_scale)
    assert_same(matmul.matmul_geglu_triton(x, weight, out, next_scale), expected)
    if m < 5:
        config = GemvConfig(block_n=2, block_k=32, num_warps=4, num_stages=2, early=1)
        assert_same(matmul.gemv(x, weight, out, True, next_scale, config), expected)
    if m > 1:
        for config in (
            GemmConfig(16, block_n=32, block_k=32, split_k=2, num_warps=4, num_stages=2),
            GemmConfig(64, block_n=16, block_k=32, split_k=1, num_warps=4, num_stages=2, early=1, blocks=3),
        ):
            assert_same(matmul.gemm(x, weight, out, True, next_scale, config), expected)


@DTYPES
@pytest.mark.parametrize("m", [1, 3, 17, 65])
@pytest.mark.parametrize("p", [24, 40])
def test_gelu_gate(dtype, m, p):
    x, weight, _ = dense_inputs(m, p, 128, dtype)
    other = normal(m, 3, p, dtype=dtype)[:, 1]
    expected = norm.geglu(torch.cat((product(x, weight, dtype), other), 1), dtype)
    for gelu_gate in (matmul.gelu_gate, matmul.gelu_gate_triton):
        assert_same(gelu_gate(x, weight, other, dtype), expected)
    if m == 3:
        config = GemvConfig(block_n=2, block_k=64, num_warps=4, num_stages=2)
        assert_same(matmul.gemv(x, weight, dtype, config=config, other=other), expected)


@PRODUCTS
@pytest.mark.parametrize("split_k", [1, 2, 4])
@pytest.mark.parametrize("shape", [(5, 40, 128), (16, 64, 256), (19, 70, 176), (50, 110, 176)])
def test_gemm(dtype, split_k, shape):
    x, weight, out = dense_inputs(*shape, dtype)
    block_m, block_n, blocks = (16, 32, 1) if len(x) <= 16 else (32, 32, 1) if len(x) <= 32 else (64, 16, 3)
    config = GemmConfig(block_m, block_n, 32, split_k, num_warps=4, num_stages=2, blocks=blocks)
    assert_sum(matmul.gemm(x, weight, out, config=config), split_k, x, weight, out)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_tiles_of_each_model_fit_an_sm(name, ranks, monkeypatch):
    """In shared memory, of which an H100 has 227 KiB a program; and each row that is to come early has a thread."""
    config = ModelConfig.from_name(name).sharded(Shard(0, ranks))

    def check(x, weight, dtype, geglu, next_scale, found, mail=None):
        rows = found.blocks * found.block_n
        tiles = (rows * (1 + geglu) + found.block_m) * found.block_k * weight.data.itemsize
        assert found.num_stages * tiles <= 226 << 10 and rows <= 32 * found.num_warps, (len(x), weight.shape, found)

    monkeypatch.setattr(matmul, "gemm", check)
    monkeypatch.setattr(matmul, "gemv", lambda *arguments, **options: None)
    shapes = {(config.vocab_size, config.hidden_size, False)}
    with torch.device("meta"):
        for layer in range(config.n_layers):
            attention = Attention(config, layer)
            feed_forward = FeedForward(config.hidden_size, config.intermediate_size_of(layer))
            shapes |= {(*weight.shape, False) for weight in (attention.wqkv, attention.wo, feed_forward.w2)}
            shapes.add((*feed_forward.w13.shape, True))
        for (n, k, geglu), dtype in itertools.product(shapes, (BF16, E4M3)):
            weight = SimpleNamespace(shape=(n, k), data=torch.empty(n, k, dtype=dtype))
            for m in (2, 8, 16, 17, 33, 64):
                found = matmul.linear_config(m, n, k, dtype)
                if found is not None:  # cuBLAS
                    matmul.with_config(torch.empty(m, k), weight, BF16, found, partials=not geglu, geglu=geglu)


@pytest.mark.parametrize(
    ("split_k", "shape"),
    [(1, (5, 40, 256)), (2, (16, 64, 512)), (2, (19, 70, 768)), (2, (9, 40, 1216)), (1, (64, 16, 320))],
)
def test_gemm_by_int8(split_k, shape):
    m, n, k = shape
    x, weight = normal(m, k, dtype=BF16), int_weight(n, k, 0)
    block_m = max(16, common.power_of_2(m))
    config = GemmConfig(block_m, block_n=32, block_k=128, split_k=split_k, num_warps=4, num_stages=2)
    assert_sum(matmul.with_config(x, weight, BF16, config, partials=True), split_k, x, weight, BF16)


@PRODUCTS
@pytest.mark.parametrize("m", [1, 3, 65])
@pytest.mark.parametrize("partials", [False, True])
def test_matmul(dtype, m, partials):
    x, weight, out = dense_inputs(m, 48, 512, dtype)
    y = matmul.matmul_triton(x, weight, out, partials)
    assert partials or y.dim() == 2
    assert_same(common.summed(y, out), product(x, weight, out))


@pytest.mark.parametrize("m", [1, 3, 20, 65])
@pytest.mark.parametrize("format", ["bf16", "fp8", "int8", "int4"])
def test_a_part_of_a_sum_is_not_rounded(format, m):
    """What a rank makes of its columns, of inputs in bfloat16 or E4M3."""
    if format.startswith("int"):
        x, weight = normal(m, 512, dtype=BF16), int_weight(48, 512, 0 if format == "int8" else 32)
    else:
        x, weight, _ = dense_inputs(m, 48, 512, E4M3 if format == "fp8" else BF16)
    for multiply in (matmul.matmul, matmul.matmul_triton):
        y = multiply(x, weight, F32, True)
        assert y.dtype == F32
        (assert_near if format.startswith("int") else assert_same)(common.summed(y, F32), product(x, weight, F32))


@DTYPES
@pytest.mark.parametrize(("n", "k"), [(11, 256), (6, 96), (6, 100), (6, 90)])
def test_one_row_by_int8(n, k, dtype):
    x, weight = normal(1, k, dtype=dtype), int_weight(n, k, 0)
    assert_same(matmul.matmul_triton(x, weight, dtype), product(x, weight, dtype))


@DTYPES
@pytest.mark.parametrize(("group", "k"), [(32, 96), (32, 160), (64, 192), (32, 2112)])
def test_one_row_by_int4_in_chunks_of_any_size(group, k, dtype):
    """Without a weight that is dequantized."""
    x, weight = normal(1, k, dtype=dtype), int_weight(11, k, group)
    y = matmul.matmul_triton(x, weight, dtype)
    assert torch.equal(y, integer.int4_row(x, weight))
    (assert_near if dtype == BF16 else assert_same)(y, product(x, weight, dtype))


@DTYPES
@pytest.mark.parametrize("m", [1, 2, 5, 17])
@pytest.mark.parametrize(("group", "k"), [(0, 96), (32, 96), (32, 384), (128, 512)])
def test_matmul_geglu_by_integers(dtype, m, group, k):
    x, weight = normal(m, k, dtype=dtype), int_weight(2 * 5, k, group)
    expected = norm.geglu(product(x, weight, dtype), dtype)
    y = matmul.matmul_geglu_triton(x, weight, dtype)
    if group and dtype == BF16:
        assert_near(y, expected, 2)
    else:
        assert_same(y, expected)


INT_MATMUL = [  # M, N, K, split_k, block_k, warps
    (1, 11, 256, 1, 128, 1),
    (1, 40, 1280, 2, 256, 2),
    (2, 40, 1024, 1, 512, 4),
    (5, 40, 384, 2, 256, 1),
    (8, 24, 1280, 4, 256, 1),
    (9, 40, 1280, 2, 128, 4),
    (64, 16, 384, 1, 128, 4),
]


@pytest.mark.parametrize(
    ("group", "m", "n", "k", "split_k", "block_k", "warps"),
    [(group, *case) for group in (0, 32, 64, 128, 256) for case in INT_MATMUL if group or case[0] <= 8],
)
def test_int_matmul(group, m, n, k, split_k, block_k, warps):
    if group == 0:
        k -= 64
    elif k % group:
        k = 512
    x, weight = normal(m, k, dtype=BF16), int_weight(n, k, group)
    if m <= 8:
        config = IntGemvConfig(block_n=32, block_k=block_k, num_warps=warps, split_k=split_k, ahead=m < 5)
    else:
        config = integer.int_config(m, n, k, group)._replace(block_n=32, block_k=block_k, split_k=split_k)
    y = integer.int_matmul(x, weight, config=config)
    # up to 8 rows no weight is rounded
    assert_sum(y, split_k, x, weight, BF16, assert_near if m > 8 else assert_same)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="each Triton has one arrangement")
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize(("lanes_last", "pairs_apart"), [(False, False), (True, False), (True, True)])
def test_int_gemv_in_the_arrangements_of_tritons(group, lanes_last, pairs_apart, monkeypatch):
    for name, value in ("LANES_LAST", lanes_last), ("PAIRS_APART", pairs_apart):
        monkeypatch.setattr(integer, name, integer.tl.constexpr(value))
    x, weight = normal(2, 512, dtype=BF16), int_weight(40, 512, group)
    y = integer.int_matmul(x, weight, config=IntGemvConfig(block_n=32, block_k=256, num_warps=2))
    assert_same(y, product(x, weight, BF16))


@DTYPES
@pytest.mark.parametrize("group", [0, 32, 64, 128, 256])
def test_dequantize(dtype, group):
    weight = int_weight(5, 768 if group else 72, group)
    expected = integer.dequantize(weight, dtype)
    assert torch.equal(integer.dequantize_triton(weight, dtype), expected)
    assert torch.equal(expected, integer.dequantize(weight, torch.float64).to(dtype))  # rounded once


@pytest.mark.parametrize("m", [1, 3, 65])
@pytest.mark.parametrize("group", [0, 64])
def test_matmul_by_integers(m, group):
    x, weight = normal(m, 512, dtype=BF16), int_weight(24, 512, group)
    for partials in (False, True):
        y = matmul.matmul_triton(x, weight, BF16, partials)
        assert partials or y.dim() == 2
        assert_near(common.summed(y, BF16), product(x, weight, BF16))


# ---------------------------------------------------------------------------------------------------------------------
# The next tokens


def decode_states(m, max_new_tokens, stop_ids=(), **options):
    """Two equal ones."""
    states = [State.empty(m, 8, DEVICE, **options) for _ in range(2)]
    for state in states:
        state.max_new_tokens.copy_(max_new_tokens)
        state.stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=DEVICE)
        state.done.zero_()
    return states


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1000), (5, 77), (3, 900)])
def test_greedy_takes_the_first_of_equals(dtype, shape, monkeypatch):
    monkeypatch.setattr(next_token, "ARGMAX_BLOCK", 128)
    logits = normal(*shape, dtype=dtype).round()  # many equal maxima

    def token(logits):
        state, _ = decode_states(shape[0], torch.full((shape[0],), 5))
        next_token.greedy_next_token_triton(logits, state)
        return state.token

    assert torch.equal(token(logits).cpu(), logits.float().cpu().argmax(-1))
    for value in (float("-inf"), -3.0):
        assert token(torch.full_like(logits, value)).tolist() == [0] * len(logits)
    assert token(torch.full_like(logits, float("nan")))[0] < shape[1]


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_logged(dtype, value, monkeypatch):
    monkeypatch.setattr(next_token, "ARGMAX_BLOCK", 128)
    logits = normal(3, 900, dtype=dtype)
    for row, column in [(None, 0), (0, 0), (2, 899), (1, 500)]:
        states = decode_states(3, torch.full((3,), 5))
        states[0].done[1] = states[1].done[1] = True
        bad = logits.clone()
        if row is not None:
            bad[row, column] = value
        next_token.greedy_next_token_triton(bad, states[0])
        next_token.greedy_next_token(bad, states[1])
        for state in states:
            assert state.log[0, :, 2].tolist() == [row in (None, 1) or each != row for each in range(3)]  # 1 is done
            assert 0 <= state.token.min() <= state.token.max() < 900


@pytest.mark.parametrize("stop_ids", [(), (5,), (5, 9, 30), (9, 5, *[-1] * 14)])
@pytest.mark.parametrize("m, drafted", [(1, 0), (3, 0), (7, 0), (3, 2)])
def test_greedy_next_token(stop_ids, m, drafted):
    options = dict(run=drafted + 2, history=True) if drafted else {}
    states = decode_states(m, torch.arange(m) % 4 + 2, stop_ids, **options)
    for i in range(6):
        logits = normal(m * (1 + drafted), 40, dtype=BF16)
        logits[:, 5] += i / 2
        token = logits.argmax(-1).view(m, -1)
        drafts = torch.where(torch.rand(m, drafted) < 0.7, token[:, :-1].cpu(), 3).to(DEVICE) if drafted else None
        next_token.greedy_next_token_triton(logits, states[0], drafts)
        next_token.greedy_next_token(logits, states[1], drafts)
        for actual, expected in zip(*(vars(state).values() for state in states)):
            assert actual is expected is None or torch.equal(actual, expected)
    assert states[0].done.all()


@pytest.mark.parametrize("greedy", [next_token.greedy_next_token, next_token.greedy_next_token_triton])
def test_runs_end_where_they_have_to(greedy):
    """Rows that would each go on with 11, 12, 13, 14, from position 2 with 3 new tokens."""
    cases = [  # drafts, what else is so, how many are appended, done and finite after it
        ([11, 12, 13], {}, 4, False, True),
        ([9, 12, 13], {}, 1, False, True),
        ([11, 12, 9], {}, 3, False, True),
        ([11, 9, 13], {}, 2, False, True),
        ([11, 12, 13], dict(stop=1), 2, True, True),
        ([9, 12, 13], dict(stop=1), 1, False, True),
        ([11, 12, 13], dict(limit=6), 3, True, True),
        ([11, 12, 9], dict(limit=7), 3, False, True),
        ([11, 12, 13], dict(done=True, bad=0), 0, True, True),
        ([11, 9, 13], dict(bad=2), 2, False, True),
        ([11, 12, 13], dict(bad=3), 4, False, False),
    ]
    state, _ = decode_states(len(cases), 20, (5, -1), run=5, history=True)
    state.position.fill_(2)
    state.count.fill_(3)
    tokens = torch.tensor([[11, 12, 13, 14]] * len(cases))
    for row, (drafts, what, *_) in enumerate(cases):
        state.done[row], state.max_new_tokens[row] = what.get("done", False), what.get("limit", 20)
        if "stop" in what:
            tokens[row, what["stop"]] = drafts[what["stop"]] = 5
    logits = F.one_hot(tokens, 40).float()
    for row, (_, what, *_) in enumerate(cases):
        if "bad" in what:
            logits[row, what["bad"], 20] = float("nan")
    drafts = torch.tensor([drafts for drafts, *_ in cases])
    greedy(logits.flatten(0, 1).to(DEVICE), state, drafts.to(DEVICE))
    for row, (_, what, count, done, finite) in enumerate(cases):
        values = [x[row].item() for x in (state.done, state.finite, state.count, state.position)]
        assert values == [done, finite, 3 + count, 2 + count]
        appended = tokens[row, :count].tolist()[: what.get("bad")]  # but which of logits with a NaN is the largest?
        assert state.log[0, row, : 3 + len(appended)].tolist() == [done, 3 + count, finite, *appended]
        assert state.history[row, : 3 + len(appended)].tolist() == [0, 0, 0, *appended]
        assert state.token[row] == state.history[row, 2 + count] or not count
    assert state.step == 1


# ---------------------------------------------------------------------------------------------------------------------
# Drafts


def looked_up(tokens: list[int], count: int) -> list[int]:
    """What `prompt_lookup` is to find behind these tokens."""
    for n in (5, 4, 3, 2, 1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                for i in range(count):
                    tokens = [*tokens, tokens[end + i]]
                return tokens[-count:]
    return tokens[-1:] * count


@pytest.mark.parametrize("block", [16, 4096])
def test_prompt_lookup(block, monkeypatch):
    monkeypatch.setattr(lookup, "LOOKUP_BLOCK", block)
    for length, alphabet, count in [(50, 2, 3), (50, 4, 1), (37, 12, 6), (3, 1, 2)]:
        history = torch.randint(alphabet, (24, length)) + 100_000
        position = torch.randint(length, (24,))
        position[:3], position[3] = torch.arange(3), length - 1
        expected = torch.tensor([looked_up(row[: i + 1].tolist(), count) for row, i in zip(history, position)])
        history, position = history.to(DEVICE), position.to(DEVICE)
        assert torch.equal(lookup.prompt_lookup(history, position, count).cpu(), expected)
        assert torch.equal(lookup.prompt_lookup_triton(history, position, count).cpu(), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


def tiny_model(case, dtype, format, monkeypatch):
    if DEVICE.type == "cpu":  # fewer programs for the interpreter

        def dense_config(m, n, k, dtype, group=0):
            if m == 1:
                return GemvConfig(256, 128, 4, 1)
            return None if dtype == F32 else GemmConfig(64, 256, 64, 2, 4, 1)

        def int_config(m, n, k, group):
            if m <= 8:
                return None if k % (128 if group else 64) else IntGemvConfig(256, 128, 1)
            if group:
                return None if k % 128 else GemmConfig(64, 256, 128, 1, 4, 1)
            return dense_config(m, n, k, torch.int8)

        def attention_config(*arguments, original=decode_attention.attention_config):
            return original(*arguments)._replace(block_s=16)

        monkeypatch.setattr(matmul, "linear_config", dense_config)
        monkeypatch.setattr(integer, "linear_config", dense_config)
        monkeypatch.setattr(integer, "int_config", int_config)
        monkeypatch.setattr(integer, "dequantize_triton", integer.dequantize)  # a program a row
        monkeypatch.setattr(decode_attention, "attention_config", attention_config)
        monkeypatch.setattr(decode_attention, "pick_kv_splits", lambda *arguments: 2)
    model_type, settings = CASES[case]
    sizes = {"hidden_size": 128, "intermediate_size": 128} if format == "int4" else {}  # whose kernels want 128 columns
    if format == "int4" and model_type.startswith("gemma4"):
        settings = settings | {"moe_intermediate_size": 64}
    if model_type == "gemma3_text":
        settings = settings | {"num_hidden_layers": 3, "layer_types": [LOCAL, GLOBAL, LOCAL]}
    elif case == "gemma4-unified":
        settings = settings | {"num_hidden_layers": 3, "layer_types": [LOCAL, LOCAL, GLOBAL]}
    elif case == "gemma4-shared":  # two layers without keys of their own behind three
        layers = [LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL]
        settings = settings | {"num_hidden_layers": 5, "layer_types": layers, "num_kv_shared_layers": 2}
    elif not model_type.startswith("gemma4"):
        settings = settings | {"num_hidden_layers": 2}
    config = ModelConfig.from_hf(SIZES | sizes | settings | {"model_type": model_type})
    model = Transformer.random(config, DEVICE, dtype, format=format, head=format != "bf16")
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.copy_(normal(*parameter.shape, dtype=dtype, scale=0.3) + 1 - config.norm_offset)
            if config.norm_offset == 0 and "attention.q" in name:  # scores are not scaled: large ones choose one key
                parameter.mul_(0.2)
        elif name.endswith(".scale"):  # so that layers outweigh the embedding; FP8's roundings grow along
            scale = parameter[..., 0] if parameter.dim() == 3 else parameter
            scale.mul_((torch.rand(scale.shape, device=DEVICE) + 0.5) * (2 if format == "fp8" else 8))
        elif parameter.dim() > 1 and format == "bf16":
            parameter.copy_(normal(*parameter.shape, dtype=dtype, scale=0.15))
    return model


def new_cache(model, rows, cache_dtype):
    scales = KVScales(values=[(0.01, 0.02)] * model.config.n_layers)
    return KVCache.empty(model.config, rows, 48, codec_of(cache_dtype, model.dtype), DEVICE, scales)


def assert_same_step(actual, expected, dtype, format):
    if dtype == F32 and format != "fp8":
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        return
    # A rounding that falls to the other side moves what follows, FP8 to a code 6 % away. PyTorch rounds what integers
    # stand for to bfloat16.
    bound = {"bf16": 0.03, "fp8": 0.1}.get(format, 0.06)
    assert (actual - expected).norm() <= bound * (expected - expected.mean()).norm()


NAMES = ("case", "rows", "dtype", "format", "cache_dtype")
STEPS = [
    ("gemma-mha", 2, BF16, "bf16", E4M3),
    ("gemma-mqa", 1, F32, "bf16", None),
    ("gemma-gqa", 3, BF16, "fp8", E4M3),
    ("gemma2-window-small", 3, F32, "bf16", None),
    ("gemma2-window-small", 1, F32, "fp8", E5M2),
    ("gemma3-window-half", 1, F32, "bf16", None),
    ("gemma3-window-half", 2, BF16, "fp8", None),
    ("gemma-mqa", 1, F32, "int4", None),
    ("gemma-gqa", 3, BF16, "int4", E4M3),
    ("gemma-mqa", 2, BF16, "int8", E4M3),
    ("gemma3-window-half", 1, BF16, "int8", None),
    ("gemma4-experts", 1, F32, "bf16", None),
    ("gemma4-experts", 3, F32, "fp8", E4M3),
    ("gemma4-experts", 2, F32, "int4", None),
    ("gemma4-unified", 2, BF16, "bf16", E5M2),
    ("gemma4-shared", 2, F32, "bf16", None),
    ("gemma4-shared", 1, F32, "bf16", E4M3),
]


@torch.inference_mode()
@pytest.mark.parametrize(NAMES, STEPS)
def test_decode_is_forward(case, rows, dtype, format, cache_dtype, monkeypatch):
    """Whole steps of tiny models, rows at different positions, behind a prefill that both share: logits, and what a later
    query will see of the KV cache. Tokens and positions are columns of matrices: kernels take what lies in memory without
    a gap."""
    model = tiny_model(case, dtype, format, monkeypatch)
    position = torch.tensor([19, 3, 12][:rows], device=DEVICE)
    tokens = torch.randint(2, 128, (rows, 20), device=DEVICE)
    prompts = torch.randint(2, 128, (rows, 19), device=DEVICE)
    logits, held, count = [], [], 1 if DEVICE.type == "cpu" else 20
    for operations in (ops.TORCH, ops.KERNELS):
        cache, model.ops = new_cache(model, rows, cache_dtype), ops.TORCH
        model.logits(prompts, cache, None, position)
        steps, model.ops = [], operations
        for i in range(count):
            strided = torch.stack((position + i, position), 1)[:, 0]
            steps.append(model.logits(tokens[:, i : i + 1], cache, strided).float())
        logits.append(torch.stack(steps))
        held.append([x for layer in cache.layers for x in layer.held(position + count, F32)])
    assert_same_step(logits[1], logits[0], dtype, format)
    for expected, actual in zip(*held):
        assert_same_step(actual, expected, dtype, "fp8" if cache_dtype else format)


@torch.inference_mode()
@pytest.mark.parametrize(NAMES, STEPS[:6:2] + STEPS[8:10] + STEPS[12:13] + STEPS[15:])
def test_prefill_is_forward(case, rows, dtype, format, cache_dtype, monkeypatch):
    """Logits, and what a later query will see of the KV cache."""
    model = tiny_model(case, dtype, format, monkeypatch)
    width = 8  # longer than the small window
    lengths = torch.tensor([width, 3, 6][:rows], device=DEVICE)
    prompts = torch.randint(2, 128, (rows, width), device=DEVICE)
    logits, held = [], []
    for operations in (ops.TORCH, ops.KERNELS):
        cache, model.ops = new_cache(model, rows, cache_dtype), operations
        logits.append(model.logits(prompts, cache, None, lengths).float())
        held.append([x for layer in cache.layers for x in layer.held(lengths, F32)])
    assert_same_step(logits[1], logits[0], dtype, format)
    for expected, actual in zip(*held):
        assert_same_step(actual, expected, dtype, "fp8" if cache_dtype else format)
    assert all(x.abs().sum(-1).count_nonzero() for x in held[1])


@torch.inference_mode()
@pytest.mark.parametrize(("case", "dtype", "cache_dtype"), [("gemma4-shared", F32, None), ("gemma-mha", BF16, E4M3)])
def test_a_step_of_several_tokens(case, dtype, cache_dtype, monkeypatch):
    model, tokens = tiny_model(case, dtype, "bf16", monkeypatch), torch.randint(2, 128, (2, 10), device=DEVICE)
    position, logits = torch.tensor([7, 3], device=DEVICE), []
    for operations in (ops.TORCH, ops.KERNELS):
        cache, model.ops = new_cache(model, 2, cache_dtype), ops.TORCH
        model.logits(tokens[:, :7], cache, None, position)
        model.ops = operations
        logits.append(model.logits(tokens[:, 7:], cache, position, all_logits=True, decoding=True).float())
    assert_same_step(logits[1], logits[0], dtype, "bf16")


@torch.inference_mode()
def test_prompts_without_a_cache_and_in_pieces(monkeypatch):
    model = tiny_model("gemma3-window-half", F32, "bf16", monkeypatch)
    tokens = torch.randint(2, 128, (2, 7), device=DEVICE)
    logits = []
    for operations in (ops.TORCH, ops.KERNELS):
        cache, model.ops = new_cache(model, 2, None), operations
        lengths = torch.tensor([4, 2], device=DEVICE)
        logits.append(model.logits(tokens, all_logits=True))
        model.logits(tokens[:, :4], cache, None, lengths)
        logits.append(model.logits(tokens[:, 4:], cache, lengths, all_logits=True))
    for expected, actual in zip(logits[:2], logits[2:]):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, E4M3])
@pytest.mark.parametrize("m", [1, 2, 3, 16, 33, 64])
@pytest.mark.parametrize("shape", [(12288, 3072), (3072, 4096), (2048, 16384), (1000, 1152)])
def test_published_sizes(dtype, m, shape):
    x, weight, out = dense_inputs(m, *shape, dtype)
    y, expected = matmul.matmul_triton(x, weight, out, partials=True), product(x, weight, out).float()
    # an FP8 tensor core keeps 14 bits of a sum or so
    atol = 2**-9 * expected.abs().max().item()
    torch.testing.assert_close(common.summed(y, out).float(), expected, rtol=2**-7, atol=atol)


@pytest.mark.cuda
@pytest.mark.parametrize("m", [1, 2, 3, 16, 33, 64, 65])
@pytest.mark.parametrize(
    ("shape", "group"),
    [
        *(
            ((n, k), group)
            for n, k in [(12288, 3072), (3072, 24576), (3072, 4096), (1000, 1152)]
            for group in (0, 32, 128)
        ),
        ((2816, 2112), 0),
        ((2816, 2112), 32),
    ],
)
def test_published_sizes_of_integers(shape, group, m):
    x, weight = normal(m, shape[1], dtype=BF16), int_weight(*shape, group)
    y, expected = matmul.matmul_triton(x, weight, BF16, partials=True), product(x, weight, BF16)
    assert_near(common.summed(y, BF16), expected)
    assert_near(matmul.matmul_geglu_triton(x, weight, BF16), norm.geglu(expected, BF16), factors=2)


@pytest.mark.cuda
@pytest.mark.parametrize("m", [2, 16])
@pytest.mark.parametrize("group", [0, 64])
def test_integers_without_arithmetic_on_bf16_pairs(m, group, monkeypatch):
    """As older GPUs multiply."""
    x, weight = normal(m, 1024, dtype=BF16), int_weight(512, 1024, group)
    monkeypatch.setattr(integer, "is_hopper", lambda device: False)
    y = common.summed(matmul.matmul_triton(x, weight, BF16, partials=True), BF16)
    (assert_near if group and m > 8 else assert_same)(y, product(x, weight, BF16))


@pytest.mark.cuda
@pytest.mark.parametrize("m", [1, 4, 64])
@pytest.mark.parametrize("group", [None, 0, 32])
def test_kernels_that_start_early(m, group, monkeypatch):
    """A graph of kernels, each reading what the ones before it have just written, replayed with new data."""
    n, f = 256, 512
    x, weight = normal(m, n, dtype=BF16), normal(n, dtype=BF16, scale=0.1)
    w13, w2 = (
        Weight.of("bf16", normal(*shape, dtype=BF16, scale=0.02)) if group is None else int_weight(*shape, group)
        for shape in ((2 * f, n), (n, f))
    )

    def layers():
        state, y = x, None
        for _ in range(20):
            state, h = norm.add_norm_triton(state, y, weight if y is not None else None, weight, 1e-6)
            y = matmul.matmul_triton(matmul.matmul_geglu_triton(h, w13, BF16), w2, BF16, partials=True)
        return norm.add_norm_triton(state, y, None, None, 1e-6)[0]

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers()
    monkeypatch.setattr(common, "USE_PDL", False)
    for _ in range(20):
        x.copy_(normal(m, n, dtype=BF16))
        graph.replay()
        assert torch.equal(y, layers())


@pytest.mark.cuda
@torch.inference_mode()
@pytest.mark.parametrize(NAMES, STEPS)
def test_steps_that_start_early(case, rows, dtype, format, cache_dtype, monkeypatch):
    """Whole steps in a graph leave the same tokens, positions and KV cache with and without early starts."""
    model = tiny_model(case, dtype, format, monkeypatch)
    model.ops = ops.KERNELS
    lengths = torch.tensor([19, 3, 12][:rows], device=DEVICE)
    prompts = torch.randint(2, 128, (rows, 19), device=DEVICE)
    results = []
    for early in (True, False):
        monkeypatch.setattr(common, "USE_PDL", early)
        cache, state = new_cache(model, rows, cache_dtype), State.empty(rows, 48, DEVICE)
        model.logits(prompts, cache, None, lengths)
        state.position.copy_(lengths)
        state.token.fill_(3)
        state.max_new_tokens.fill_(20 + 2)
        state.stop_ids.fill_(-1)
        state.done.zero_()
        decode_step(model, cache, state, ALL_GREEDY)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decode_step(model, cache, state, ALL_GREEDY)
        for _ in range(20):
            graph.replay()
        assert state.count.tolist() == [21] * rows
        layers = [x[1:].float() for layer in cache.layers for x in layer.stored]  # padding is in page 0
        results.append([state.position, state.count, state.done, state.log, *layers])
    for with_, without in zip(*results):
        assert torch.equal(with_, without)


@pytest.mark.parametrize("name", ["fp8_e4m3"])
@torch.no_grad()
def test_model_whose_caches_keep_values_alone(name):
    """A prompt, a piece behind it and a step: by kernels as by their definitions."""
    layers = dict(num_hidden_layers=2, layer_types=[LOCAL, GLOBAL])
    model, results = small_model(case="gemma4-unified", **layers).to(DEVICE), []
    model.kv_scales = KVScales([(0.3, 0.02)] * model.config.n_layers)
    x = torch.randint(3, 120, (1, 70)).to(DEVICE)
    for kind in ("torch", "kernels"):
        model.ops = ops.choose(kind, DEVICE)
        cache = KVCache.empty(model.config, 1, 130, CODECS[name], DEVICE, model.kv_scales)
        position = torch.full((1,), 66, device=DEVICE)
        logits = [model(x[:, :66], cache), model(x[:, 66:69], cache, position)]
        results.append(torch.stack([*logits, model(x[:, 69:], cache, position + 3)]))
    # what lies between two codes may be rounded to either
    difference = (results[1] - results[0]).abs()
    assert difference.mean() < (1e-5 if name == "fp32" else 0.02)
