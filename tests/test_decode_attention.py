"""The decode step's attention over shared prefixes and through tables of slots, against float32: on a GPU, or else in
Triton's interpreter. What memory holds nothing of is NaN: free pages, slots not in use, page 0, and buffers."""

from types import SimpleNamespace

import pytest
import torch
from test_ops import (  # noqa: F401
    BF16,
    DEVICE,
    F32,
    copy_of,
    frequencies,
    layer_cache,
    normal,
    normed_and_rotated,
    partial_sums,
    scalar,
    seeded,
    turning_frequencies,
)

from cache import CODECS
from config import PAGE
from ops import attention, common, decode_attention, rope
from ops.common import E4M3, SMS, round_fp8, summed
from ops.decode_attention import AttentionConfig
from ops.prefix_attention import PrefixConfig, prefix_config, tile_rows
from ops.rope import AttentionLayer, Positions, Shared

NAN = float("nan")
E5M2 = torch.float8_e5m2
MHA, GQA, MQA = (2, 2), (4, 2), (3, 1)
pytestmark = [
    pytest.mark.skipif(not common.available(DEVICE), reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # the interpreter's: infinity is meant
]


@pytest.fixture(autouse=True)
def stale_memory(monkeypatch):
    """Fills what is allocated with NaN."""

    def empty(*shape, original=torch.empty, **options):
        x = original(*shape, **options)
        return x.copy_(torch.full(x.shape, NAN, device=x.device)) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", empty)


def integers(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def stored_as(x, scale, dtype):
    return round_fp8(x, scale, dtype) if dtype.itemsize == 1 else x.to(dtype)


class Step:
    """A decode step's attention of rows of which some share prefixes: its arguments, and what it has to make of them.

    groups are (prefix, positions of its rows), with a prefix of 0 for rows that share nothing; rows are shuffled.
    Tiles of `tile` rows are followed by unused ones. With `beams`, keys behind the prefix are anywhere. With `turning`
    pairs the cache keeps values alone.
    """

    def __init__(
        self,
        layer,
        dtype,
        cache_dtype,
        groups,
        slots,
        tile=4,
        split_k=0,
        scales=(1.0, 1.0),
        beams=False,
        ring=False,
        unit=None,
        turning=None,
    ):
        self.layer, self.dtype, self.slots, self.ring = layer, dtype, slots, ring
        d, kv_heads = layer.head_dim, layer.n_kv_heads
        b = self.rows = sum(len(positions) for _, positions in groups)
        order = torch.randperm(b).tolist()
        position, prefix, tiles, at, per_row = [0] * b, [0] * b, [], 0, slots // PAGE
        pages = 2 + b * per_row
        free = (1 + torch.randperm(pages - 1)).tolist()
        table = torch.zeros(b, per_row, dtype=torch.int32)
        filled = []  # places that hold something
        for tokens, positions in groups:
            members = order[at : at + len(positions)]
            common_pages = [free.pop() for _ in range(tokens // PAGE)]
            filled += [(page, place) for page in common_pages for place in range(PAGE)]
            for row, p in zip(members, positions):
                position[row], prefix[row] = p, tokens
                used = min(p // PAGE + 1, per_row)
                table[row, :used] = integers(common_pages + [free.pop() for _ in range(used - len(common_pages))])
                newest = [t for t in range(max(tokens, p - slots + 1), p + (layer.kv_products == 0))]
                filled += [(table[row, t % slots // PAGE].item(), t % PAGE) for t in newest]
            if tokens:
                tiles += [(at + i, min(tile, len(members) - i)) for i in range(0, len(members), tile)]
            at += len(positions)
        k, v = (torch.full((pages, kv_heads, PAGE, d), NAN, device=DEVICE).to(cache_dtype) for _ in "kv")
        page, place = torch.tensor(filled, dtype=torch.long).unbind(1) if filled else ([], [])
        for stored, scale in ((k, scales[0]), (v, scales[1])):
            stored.view(torch.uint8)[page, :, place] = stored_as(
                normal(len(filled), kv_heads, d), scale, cache_dtype
            ).view(torch.uint8)
        codec = next(codec for codec in CODECS.values() if codec.dtype == cache_dtype)
        frequency, rotation = frequencies(d), None
        if turning is not None:
            frequency.view(2, -1)[:, turning:] = 0
            rotation = rope.rope(torch.arange(slots, device=DEVICE), frequency[d // 2 :][:turning])[0]
            rotation, k, scales = rotation.transpose(0, 1).contiguous(), None, scales[1:] * 2
        self.cache = SimpleNamespace(
            k=k, v=v, table=table.to(DEVICE), slots=slots, codec=codec, k_scale=scales[0], v_scale=scales[1], ring=ring
        )
        self.cache.rotation, self.cache.stored = rotation, [x for x in (k, v) if x is not None]
        self.slot_of = table.long().repeat_interleave(PAGE, dim=1) * PAGE + torch.arange(slots) % PAGE
        if beams:  # the new token's slot has no source yet, unless its key has been written
            for row, p in enumerate(position):
                for t in range(max(prefix[row], p - slots + 1), p):
                    page, place = filled[torch.randint(len(filled), ())]
                    self.slot_of[row, t % slots] = page * PAGE + place
                if layer.kv_products:
                    self.slot_of[row, p % slots] = 2**30
            self.cache.slot_table = self.slot_of.to(torch.int32).to(DEVICE)
        tiles += [(0, 0), (b + 5, 0)]
        self.shared = Shared(integers(prefix), integers(order), integers(tiles), tile)
        self.position = integers(position, torch.long)
        self.qkv = partial_sums(normal(b, (layer.n_heads + layer.kv_products * kv_heads) * d, dtype=dtype), split_k)
        self.output_scale = None if unit is None else scalar(unit)
        self.angles = rope.rope(self.position, frequency)[0]

    def become(self, other):
        """Takes over what another step of as many rows has, in place."""
        for name in ("qkv", "position", "angles"):
            getattr(self, name).copy_(getattr(other, name))
        for name in ("k", "v", "table"):
            getattr(self.cache, name).copy_(getattr(other.cache, name))
        for mine, its in zip(self.shared[:3], other.shared):
            mine.zero_()[: len(its)].copy_(its)
        self.slot_of = other.slot_of

    def run(self, shared=True, kv_splits=None, config=None):
        shared = self.shared if shared else None
        positions = Positions(self.rows, 1, self.position, None, self.angles, shared=shared, decoding=True)
        arguments = self.qkv, self.layer, self.cache, positions, self.dtype, self.output_scale, kv_splits, config
        return decode_attention.decode_attention(*arguments)

    def expected(self):
        """What `run` returns, a row at a time; and the keys and values that it writes."""
        layer, cache, d, kv_heads = self.layer, self.cache, self.layer.head_dim, self.layer.n_kv_heads
        heads = summed(self.qkv, self.dtype).view(self.rows, -1, d)
        q, *new_kv = normed_and_rotated(heads, layer, self.angles[:, :, None])
        results, written = [], []
        for row, p in enumerate(self.position.tolist()):
            oldest, end = max(0, p - min(self.slots, layer.window or p + 1) + 1), p + (layer.kv_products == 0)
            at = self.slot_of[row, [t % self.slots for t in range(oldest, end)]].to(DEVICE)
            stored, scales = cache.stored, (cache.k_scale, cache.v_scale)
            new = [stored_as(x[row].float(), scale, cache.v.dtype) for x, scale in zip(new_kv, scales)][-len(stored) :]
            kv = [
                torch.cat((x.float()[at // PAGE, :, at % PAGE], *[y.float()[None] for y in new[i : i + 1]]))
                for i, x in enumerate(stored)
            ]
            if len(kv) == 1:
                cos, sin = (x[oldest : p + 1, None] for x in rope.rotation_of_heads(cache.rotation, d))
                kv = [rope.keys_of_values(*kv, layer, cos, sin), *kv]
            k, v = (x.repeat_interleave(layer.n_heads // kv_heads, dim=1).transpose(0, 1) for x in kv)  # [H, tokens, D]
            scores = q[row].float()[:, None] @ k.mT * (layer.scale * cache.k_scale)
            if layer.softcap is not None:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            results.append((scores.softmax(-1) @ v * cache.v_scale).flatten())
            written.append(new)
        y = torch.stack(results).to(self.dtype)
        return y if self.output_scale is None else round_fp8(y, self.output_scale), written

    def check(self, rows=None, **options):
        """Checks the result, of some rows or all, and that nothing but the new keys and values is written."""
        cache, rows = self.cache, range(self.rows) if rows is None else rows
        y, written = self.expected()
        after = [x.view(torch.uint8).clone() for x in cache.stored]
        for row, p in enumerate(self.position.tolist()):
            page = cache.table[row, p % self.slots // PAGE]
            for x, new in zip(after, written[row]):
                x[page, :, p % PAGE] = new.view(torch.uint8)
        actual = self.run(**options)
        assert actual.shape == y.shape
        assert_near(actual[rows], y[rows], self.dtype)
        for x, stored in zip(after, cache.stored):
            x, stored = (each.view(cache.v.dtype).float() for each in (x, stored.view(torch.uint8)))
            step = 2**-2 if cache.v.element_size() == 1 else 2**-6
            torch.testing.assert_close(stored, x, rtol=step, atol=1e-5, equal_nan=True)
        return actual


def assert_near(actual, expected, dtype):
    """Equal up to the rounding of the result and, in bfloat16, of the weights before their product with values."""
    assert actual.dtype == expected.dtype
    step = {F32: 2e-5, BF16: 2**-7, E4M3: 2**-3}[actual.dtype]
    actual, expected = actual.float(), expected.float()
    atol = (1e-5 if dtype == F32 else 2**-7) * expected.abs().amax().item()
    torch.testing.assert_close(actual, expected, rtol=step, atol=atol)


SUMS = AttentionConfig(block_s=16, num_warps=4, num_stages=2, by_sums=True)
DOTS = SUMS._replace(by_sums=False)
PREFIX = PrefixConfig(block_n=32, num_warps=4, num_stages=2, splits=3, ahead=1)


@pytest.fixture
def few_splits(monkeypatch):
    """Three splits of a prefix, which are fewer programs than fill a GPU."""
    monkeypatch.setattr(decode_attention, "prefix_config", lambda *arguments: PREFIX)


def layer_of(heads, d, dtype=None, **options):
    """With norms if their dtype is given."""
    if dtype is not None:
        options |= dict(q_norm=normal(d, dtype=dtype), k_norm=normal(d, dtype=dtype))
    return AttentionLayer(*heads, d, d**-0.5, **options)


GROUPS = {  # prefix, positions
    "two": [(64, [70, 64]), (0, [3])],  # one without keys of its own but the new one
    "alone": [(192, [192, 255, 200, 193, 192, 250, 208, 209, 207])],  # as three tiles
    "several": [(0, [63, 0]), (192, [192, 200, 193]), (64, [64, 191, 80, 65, 128])],
    "long": [(640, [640, 671, 700]), (0, [300]), (64, [70, 71])],
}
CASES = {  # heads, D, softcap, norms, config, groups, partial sums, products of K and V where they are normed
    "mha-sums": (MHA, 24, None, False, SUMS, "several", 0),
    "mha-sums-softcap": (MHA, 32, 2.0, False, SUMS, "long", 2),
    "mha": (MHA, 32, None, False, DOTS, "alone", 0),
    "gqa": (GQA, 24, None, True, DOTS, "several", 0),
    "gqa-sums": (GQA, 24, None, True, SUMS, "several", 0),
    "mqa": (MQA, 24, 2.0, True, DOTS, "two", 3),
    "mqa-sums": (MQA, 24, 2.0, True, SUMS, "two", 3),
    "k-is-v-sums": (MHA, 24, None, True, SUMS, "several", 2, 1),
    "k-is-v": (MQA, 24, None, True, DOTS, "several", 0, 1),
    "no-kv-sums": (MHA, 24, None, True, SUMS, "several", 0, 0),
    "no-kv": (GQA, 24, None, True, DOTS, "long", 2, 0),
    "no-kv-gqa-sums": (GQA, 24, None, True, SUMS, "several", 2, 0),
}


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", [(BF16, E4M3), (F32, F32)])
def test_shared_prefix(case, dtypes):
    heads, d, softcap, normed, config, groups, split_k, *products = CASES[case]
    options = dict(kv_products=products[0], v_norm=True, norm_offset=0.0) if products else {}
    layer = layer_of(heads, d, dtypes[0] if normed else None, softcap=softcap, **options)
    scales = (0.02, 0.5) if dtypes[1].itemsize == 1 else (1.0, 1.0)
    slots = 768 if groups == "long" else 256
    step = Step(layer, *dtypes, GROUPS[groups], slots, split_k=split_k, scales=scales)
    step.check(kv_splits=2 if groups == "several" else 1, config=config)


ALONE = {  # heads, D, pairs that turn, groups, beams, partial sums
    "mha": (MHA, 24, 12, "several", False, 0),
    "gqa": (GQA, 64, 32, "long", False, 2),
    "mqa": (MQA, 32, 3, "two", False, 0),
    "beams": (MQA, 24, 5, "several", True, 0),
}


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, E4M3)])
@pytest.mark.parametrize("shared", [True, False])
def test_values_alone(case, dtypes, shared):
    """Keys are made of the values that a cache holds."""
    heads, d, turning, groups, beams, split_k = ALONE[case]
    layer = layer_of(heads, d, dtypes[0], kv_products=1, v_norm=True, norm_offset=0.0 if beams else 1.0)
    scale = 0.5 if dtypes[1].itemsize == 1 else 1.0
    slots = 768 if groups == "long" else 256
    step = Step(layer, *dtypes, GROUPS[groups], slots, 4, split_k, (1.0, scale), beams, turning=turning)
    step.check(shared=shared, kv_splits=2, config=DOTS if case != "mha" else None)


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("dtypes", [(BF16, E4M3), (F32, F32)])
def test_result_in_e4m3(dtypes):
    Step(layer_of(GQA, 32), *dtypes, GROUPS["two"], 128, unit=0.01).check(config=DOTS)


@pytest.mark.usefixtures("few_splits")
def test_one_tile_a_row():
    """As many queries as the least block has, and more of them than heads: tiles of one row have one block, too."""
    for heads, tile in (((5, 1), 1), ((12, 2), 3)):
        Step(layer_of(heads, 32), F32, F32, GROUPS["two"], 128, tile=tile).check(kv_splits=1, config=DOTS)


@pytest.mark.usefixtures("few_splits")
def test_rows_that_ended():
    """They are at position 0 with a table of zeros, and may still be in a tile, from which others read."""
    step = Step(layer_of(MHA, 24), F32, F32, [(128, [130, 140, 150, 131]), (0, [5])], 192, tile=2)
    ended = step.shared.order[1].item()
    step.position[ended] = 0
    step.cache.table[ended] = 0
    expected, _ = step.expected()
    for config in (SUMS, DOTS):
        actual = step.run(kv_splits=2, config=config)
        others = [row for row in range(5) if row != ended]
        assert_near(actual[others], expected[others], F32)
        assert actual.isfinite().all()


@pytest.mark.parametrize("window", [40, None])
def test_windows_share_nothing(window, monkeypatch):
    """A layer whose window is less than its slots, ring or not, attends as if there were no prefixes."""
    monkeypatch.setattr(decode_attention, "prefix_attention", None)
    groups = [(64, [64, 90]), (0, [3])]
    Step(layer_of(MHA, 24, window=window), F32, F32, groups, 128, ring=window is None).check(config=DOTS)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (BF16, E4M3), (F32, E5M2)])
@pytest.mark.parametrize("config", [SUMS, DOTS], ids=["sums", "dots"])
def test_slot_table(config, dtypes):
    """Beams: each slot of a row is in any row's pages."""
    scales = (0.02, 0.5) if dtypes[1].itemsize == 1 else (1.0, 1.0)
    layer = layer_of(GQA, 24, softcap=2.0)
    step = Step(layer, *dtypes, [(0, [100, 0, 64, 17])], 128, scales=scales, beams=True)
    step.check(shared=False, kv_splits=2, config=config._replace(ahead=64))


@pytest.mark.parametrize("config", [SUMS, DOTS], ids=["sums", "dots"])
@pytest.mark.parametrize("window", [None, 50, 64])
def test_slot_table_of_a_ring(config, window):
    step = Step(layer_of(MHA, 24, window=window), F32, F32, [(0, [200, 63, 64, 7])], 64, beams=True, ring=True)
    step.check(shared=False, kv_splits=1, config=config)


@pytest.mark.parametrize("config", [SUMS, DOTS], ids=["sums", "dots"])
@pytest.mark.parametrize("window", [None, 50])
def test_slot_table_of_another_layers_keys(config, window):
    """The newest key is where the table of slots says."""
    layer = layer_of(MHA, 24, window=window, kv_products=0)
    positions = [200, 63, 64, 7] if window else [63, 0, 62, 7]
    step = Step(layer, F32, F32, [(0, positions)], 64, beams=True, ring=window is not None)
    step.check(shared=False, kv_splits=2, config=config)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, E5M2)])
@pytest.mark.parametrize(
    ("heads", "products", "turning"), [((8, 1), 1, None), ((16, 2), 0, None), ((2, 2), 2, None), ((8, 1), 1, 64)]
)
def test_heads_of_512(heads, products, turning, dtypes):
    """By what is picked for them."""
    layer = layer_of(heads, 512, dtypes[0], v_norm=True, norm_offset=0.0, kv_products=products)
    step = Step(layer, *dtypes, [(0, [70, 3])], 128, split_k=2, scales=(0.02, 0.5), turning=turning)
    step.check(shared=False, kv_splits=2)


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("config", [SUMS, DOTS], ids=["sums", "dots"])
def test_slot_table_behind_a_shared_prefix(config):
    Step(layer_of(MHA, 24), BF16, BF16, GROUPS["several"], 256, beams=True).check(kv_splits=2, config=config)


TOKENS = {  # heads, D, slots, window, softcap, products of K and V, pairs that turn, prefix
    "mha": (MHA, 24, 128, None, None, 2, None, 0),
    "shared": (GQA, 32, 128, None, 2.0, 2, None, 64),
    "ring": ((4, 1), 24, 64, 9, 2.0, 2, None, 0),
    "full-ring": (MHA, 32, 64, 61, None, 2, None, 0),  # with as many slots as 4 tokens need
    "no-kv": ((4, 1), 24, 64, 50, None, 0, None, 0),
    "no-kv-global": (MHA, 24, 128, None, None, 0, None, 0),
    "values-alone": (MQA, 32, 128, None, None, 1, 3, 0),
    "values-alone-shared": (MQA, 32, 128, None, None, 1, 16, 64),
}


def step_of_tokens(case, tokens, dtypes, window=None, split_k=0):
    """qkv, layer, cache and positions of rows of so many new tokens. What no query sees is 100: of tokens that were
    rejected, say, in slots behind the newest one, or on their way out of a ring."""
    heads, d, slots, own_window, softcap, products, turning, prefix = TOKENS[case]
    window, (dtype, cache_dtype) = window or own_window, dtypes
    layer = layer_of(heads, d, dtype, softcap=softcap, window=window, kv_products=products, v_norm=products < 2)
    starts = [70, slots - 1, 61] if window else [70, slots - tokens, 3]
    starts = [64, 110, 3] if prefix else starts
    position, rows = integers(starts, torch.long), len(starts)
    frequency, rotation = turning_frequencies(d, turning) if turning else (frequencies(d), None)
    scales = (0.02, 0.5) if cache_dtype.itemsize == 1 else (1.0, 1.0)
    cache = layer_cache(rows, heads[1], slots, d, cache_dtype, scales, rotation=rotation)
    cache.ring = window is not None
    if prefix:
        cache.table[1, : prefix // PAGE] = cache.table[0, : prefix // PAGE]
    end = position + tokens
    held, unseen = cache.held_positions(end), position if products else end
    stale = (held < 0) | (held >= unseen[:, None]) | (held <= position[:, None] - (window or slots))
    row, slot = stale.nonzero().unbind(1)
    for stored in cache.stored:
        stored[cache.table[row, slot // PAGE].long(), :, slot % PAGE] = torch.tensor(100.0).to(cache_dtype)
    qkv = partial_sums(normal(rows * tokens, (heads[0] + products * heads[1]) * d, dtype=dtype), split_k)
    query = (position[:, None] + torch.arange(tokens, device=DEVICE)).flatten()
    return qkv, layer, cache, positions_of(cache, layer, query.view(rows, -1), frequency, dtype)


def positions_of(cache, layer, query, frequency, dtype):
    """Those of a decode step of tokens at positions query [B, T]."""
    (rows, tokens), position = query.shape, query[:, 0].contiguous()
    row = torch.arange(rows, device=DEVICE).repeat_interleave(tokens)
    mask = attention.attention_mask(cache, layer.window, query, position, dtype, decoding=True)
    slot = cache.slots_for(row, query.flatten(), position[row] + tokens)
    angles = rope.rope(query.flatten(), frequency)[0]
    return Positions(rows, tokens, position, None, angles, mask, slot, decoding=True)


def of_single_steps(qkv, layer, cache, positions, dtype):
    """What as many steps of one token make of it."""
    results = []
    for t in range(positions.tokens):
        query = (positions.position + t)[:, None]
        one = positions_of(cache, layer, query, frequencies(layer.head_dim), dtype)
        one = one._replace(rope=positions.rope[:, t :: positions.tokens])
        results.append(attention.attend(qkv[t :: positions.tokens], layer, cache, one, dtype))
    return torch.stack(results, 1).flatten(0, 1)


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.parametrize(("tokens", "dtypes"), [(4, (F32, F32)), (2, (BF16, E4M3))])
def test_several_tokens(case, tokens, dtypes):
    """The kernel against the definition, and that against a step for each token."""
    prefix = TOKENS[case][-1]
    qkv, layer, cache, positions = step_of_tokens(case, tokens, dtypes, split_k=2 if case == "mha" else 0)
    unit = scalar(0.01) if case == "full-ring" else None
    caches = [copy_of(cache) for _ in range(3)]
    expected = attention.attend(qkv, layer, caches[0], positions, dtypes[0], unit)
    if dtypes[0] == F32 and unit is None:
        one_by_one = of_single_steps(summed(qkv, F32), layer, caches[1], positions, F32)
        torch.testing.assert_close(expected, one_by_one, rtol=1e-5, atol=1e-5)
    if prefix:
        tiles = integers([[0, 2 * tokens], [0, 0]])
        order = (integers([1, 0, 2])[:, None] * tokens + torch.arange(tokens, device=DEVICE)).flatten().int()
        positions = positions._replace(shared=Shared(integers([prefix, prefix, 0]), order, tiles, 2 * tokens))
    bare = positions._replace(mask=None, slot=None)
    actual = decode_attention.decode_attention(qkv, layer, caches[2], bare, dtypes[0], unit, 2, DOTS)
    assert_near(actual, expected, dtypes[0])
    for mine, other in zip(caches[2].stored, caches[0].stored):
        torch.testing.assert_close(mine.float(), other.float(), rtol=2**-2, atol=1e-5)


def test_a_ring_that_is_too_small():
    """Its oldest token is one that the first of the new ones sees, and the last replaces."""
    for window, enough in ((61, True), (62, False)):
        qkv, layer, cache, positions = step_of_tokens("full-ring", 4, (F32, F32), window)
        expected = of_single_steps(qkv, layer, copy_of(cache), positions, F32)
        actual = attention.attend(qkv, layer, cache, positions, F32)
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5) == enough


def test_several_tokens_of_rows_that_ended():
    """They are at position 0 with a table of zeros, as the last tokens of a row without pages for them may be."""
    qkv, layer, cache, positions = step_of_tokens("mha", 4, (F32, F32))
    expected = attention.attend(qkv, layer, copy_of(cache), positions, F32).view(3, 4, -1)
    for stored in cache.stored:
        stored[0] = NAN
    cache.table[2] = positions.position[2] = 0
    cache.table[1, 1] = 0  # of its tokens 0 and 1 are in another page
    positions.position[1] = 62
    actual = decode_attention.decode_attention(qkv, layer, cache, positions, F32, kv_splits=2, config=DOTS)
    assert_near(actual.view(3, 4, -1)[0], expected[0], F32)
    assert actual.isfinite().all()


def test_what_takes_no_several_tokens():
    qkv, layer, cache, positions = step_of_tokens("mha", 2, (F32, F32))
    with pytest.raises(ValueError, match="several tokens"):
        decode_attention.decode_attention(qkv, layer, cache, positions, F32, config=SUMS)
    picked = [
        decode_attention.attention_config(16, group, 8192, BF16, d, tokens=tokens)
        for group in (1, 8)
        for d in (256, 512)
        for tokens in (2, 4, 8)
    ]
    assert not any(config.by_sums for config in picked)


@pytest.mark.parametrize("dtypes", [(BF16, E4M3), (F32, F32)])
@pytest.mark.parametrize("rows", [2, 80])
def test_own_configs(rows, dtypes, monkeypatch):
    """What is picked for so many rows; on a CPU with fewer splits."""
    picked = []

    def pick(*arguments):
        picked.append(prefix_config(*arguments))
        return picked[-1]._replace(splits=2 if DEVICE.type == "cpu" else picked[-1].splits)

    monkeypatch.setattr(decode_attention, "prefix_config", pick)
    d = 256 if DEVICE.type == "cuda" else 24
    members, heads = (min(rows, 3), (1, 1)) if DEVICE.type == "cpu" else (rows, MHA)
    groups = [(384, [384 + row % 64 for row in range(members)]), (0, [9])]
    kv_splits = 2 if DEVICE.type == "cpu" else None
    Step(layer_of(heads, d), *dtypes, groups, 768, tile=tile_rows(rows, 1, d, dtypes[0])).check(kv_splits=kv_splits)
    assert picked


def test_picks():
    rows = {n: tile_rows(n, 1, 256, BF16) for n in (2, 16, 17, 64, 100, 256)}
    assert rows == {2: 16, 16: 16, 17: 64, 64: 64, 100: 128, 256: 128}
    assert tile_rows(100, 8, 256, BF16) == 16
    assert tile_rows(100, 32, 256, F32) == 1
    gemma_7b, gemma_2b = (16, 1), (1, 8)
    for n, (kv_heads, group), splits in (
        (16, gemma_7b, 8),
        (64, gemma_7b, 8),
        (128, gemma_7b, 8),
        (1024, gemma_7b, 1),
        (128, gemma_2b, 16),
    ):
        tile = tile_rows(n, group, 256, BF16)
        config = prefix_config(-(-n // tile), tile * group, kv_heads, 256, 8192, BF16, BF16)
        assert config.splits == splits
        assert config.splits * n * kv_heads * group <= SMS * 128  # 17 MB of results
    assert prefix_config(1, 16, 1, 256, 8192, BF16, BF16).splits == 32
    assert prefix_config(1, 16, 1, 256, 192, BF16, BF16).splits == 1


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["mha-sums", "gqa"])
def test_prefixes_change_between_replays(case):
    """One graph serves whatever groups there are, in tiles of as many rows at most, and none."""
    heads, _, softcap, normed, config, *_ = CASES[case]
    layer = layer_of(heads, 256, BF16 if normed else None, softcap=softcap)
    several = GROUPS["long"], [(0, [5, 9]), (640, [700] * 4)], [(0, [700, 3, 64, 0, 63, 255])], GROUPS["long"]
    steps = [Step(layer, BF16, BF16, groups, 768) for groups in several]
    first = steps[0]
    first.shared = first.shared._replace(tiles=integers([[0, 0]] * 6))
    first.run(config=config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = first.run(config=config)
    for step in steps[1:]:
        first.become(step)
        expected, _ = first.expected()
        for _ in range(3):
            graph.replay()
            assert_near(y, expected, BF16)
