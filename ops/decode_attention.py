"""Attention of few queries a row over the KV cache, the decode step's: rotation, cache write and attention in a kernel.

A program has one row and one key head, and `kv_splits` programs share the slots of those: each leaves a maximum, a sum
and an unscaled result, which a second kernel combines (FlashDecoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Where rows share prefixes, these programs have the slots behind
them only, and the splits of ops/prefix_attention.py are combined with theirs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from config import PAGE
from ops.common import (
    E4M3,
    LOWEST,
    SMS,
    jit,
    launch,
    launch_dependents,
    load_scalar,
    log2_scores,
    power_of_2,
    prefetch_l2,
    row_warps,
    split_k_of,
    store_rounded,
    tl,
    triton_dtype,
    wait_for_previous,
)
from ops.prefix_attention import prefix_attention, prefix_config
from ops.rope import (
    AttentionLayer,
    Positions,
    _norm_factor,
    _normed_rotated,
    _rotated_keys,
    _values,
    _write,
    _written_kv_of_values,
    keys_and_rotation,
)


class AttentionConfig(NamedTuple):
    """How the decode step's attention runs: block_s slots at a time, num_stages such blocks in flight.

    `by_sums` multiplies by float32 sums instead of tensor cores, where each key head has one query. The first `ahead`
    slots are brought to L2 while the kernel before still runs.
    """

    block_s: int
    num_warps: int
    num_stages: int
    by_sums: bool
    ahead: int = 0


def attention_config(
    pairs: int,
    group: int,
    slots: int,
    cache_dtype: torch.dtype,
    head_dim: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    values_alone: bool = False,
    tokens: int = 1,
) -> AttentionConfig:
    """Picks how `group` query heads on each of `pairs` rows' key heads attend: what was fastest on an H100 or H200.

    Keys that are made of a cache of values alone are not multiplied by sums, nor are those that several `tokens` of a
    row see."""
    is_fp8 = cache_dtype.itemsize == 1
    if tokens > 1:
        return _config_of_tokens(group * tokens, is_fp8, head_dim, dtype)
    # Each of a group's queries may have programs of its own, which load keys again. (One row of gemma-3-4b, of 128 and 600
    # tokens: 2.17 and 2.21 ms a step, by tensor cores 2.20 and 2.41; four rows of 1,000 tokens: 3.04 and 2.96 ms.)
    by_sums = not values_alone and (group == 1 or (pairs * group <= 16 and slots <= 2048))
    if head_dim > 256:
        if by_sums:
            return AttentionConfig(block_s=8, num_warps=4, num_stages=2, by_sums=True, ahead=64)
        if dtype == torch.float32:
            return AttentionConfig(block_s=16, num_warps=8, num_stages=2, by_sums=False, ahead=64)
        if is_fp8:
            return AttentionConfig(block_s=64, num_warps=8, num_stages=2, by_sums=False, ahead=64)
        return AttentionConfig(block_s=32, num_warps=4, num_stages=2, by_sums=False, ahead=64)
    if not by_sums:
        if pairs <= 16 and slots <= 512:  # more programs of fewer slots
            return AttentionConfig(block_s=32, num_warps=4, num_stages=2, by_sums=False, ahead=64)
        return AttentionConfig(block_s=64, num_warps=4, num_stages=2, by_sums=False, ahead=64)
    if pairs >= SMS:
        if slots > 512:  # rows are of unlike lengths, and the longest must not be the last
            if is_fp8:
                return AttentionConfig(block_s=16, num_warps=4, num_stages=3, by_sums=True)
            return AttentionConfig(block_s=32, num_warps=4, num_stages=4, by_sums=True)
        return AttentionConfig(block_s=16, num_warps=2, num_stages=3, by_sums=True)
    if slots > 2048:
        if is_fp8:
            return AttentionConfig(block_s=64, num_warps=8, num_stages=3, by_sums=True)
        return AttentionConfig(block_s=32, num_warps=4, num_stages=3, by_sums=True)
    return AttentionConfig(block_s=8, num_warps=1, num_stages=2, by_sums=True, ahead=64)


def _config_of_tokens(queries: int, is_fp8: bool, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """`attention_config` where rows have several tokens, with so many `queries` on each of a row's key heads: by the
    registers and shared memory that a program takes."""
    if dtype == torch.float32:
        return AttentionConfig(block_s=16, num_warps=8, num_stages=2, by_sums=False, ahead=64)
    if head_dim > 256:
        block_s = 64 if is_fp8 and queries <= 16 else 32
        return AttentionConfig(block_s=block_s, num_warps=8, num_stages=2, by_sums=False, ahead=64)
    return AttentionConfig(block_s=64, num_warps=4 if queries <= 16 else 8, num_stages=2, by_sums=False, ahead=64)


def pick_kv_splits(pairs: int, slots: int, block_s: int, num_warps: int = 4) -> int:
    """Picks how many programs share one row and key head, of which there are `pairs`: enough to fill the GPU."""
    programs = SMS * 4 // num_warps if pairs < SMS else SMS
    return min(power_of_2(-(-programs // pairs)), power_of_2(-(-slots // (2 * block_s))), 64)


def combine_block(heads: int) -> int:
    """Picks how many elements a program combines of one of so many query heads of all rows."""
    return 32 if heads < 1024 else 128


@jit
def _kv_split(position, prefix, S, BLOCK_S: tl.constexpr, KV_SPLITS: tl.constexpr, TOKENS: tl.constexpr):
    """Returns the slots [start, end) of a program: its part, in whole blocks, of those from `prefix` on in use."""
    used = tl.minimum(position + TOKENS, S).to(tl.int32)
    size = tl.cdiv(tl.cdiv(used - prefix, BLOCK_S), KV_SPLITS) * BLOCK_S
    start = prefix + tl.program_id(2) * size
    return start, tl.minimum(start + size, used)


@jit
def _page(table_ptr, s, PAGE: tl.constexpr):
    """Loads the page of slot s of a row."""
    return tl.load(table_ptr + s // PAGE).to(tl.int64)


@jit
def _age(s, slot, S, WINDOW: tl.constexpr):
    """How many tokens older than the newest one, which is in `slot`, is what slots s have. Only windows have rings."""
    age = slot - s
    if WINDOW > 0:
        age = (age + S) % S
    return age


@jit
def _seen(used, s, slot, S, token, WINDOW: tl.constexpr, TOKENS: tl.constexpr):
    """Says which of slots s [BLOCK_S], of those `used`, are seen by queries of new tokens `token` [BLOCK_GROUP]."""
    seen = used[None, :]
    if TOKENS > 1:
        age = _age(s, slot, S, WINDOW)[None, :] - (TOKENS - 1 - token)[:, None]  # than the query's own token
        seen = seen & (age >= 0)
        if WINDOW > 0:
            seen = seen & (age < WINDOW)
    return seen


@jit
def _places(
    slots_ptr,
    page,
    s,
    end,
    slot,
    S,
    head,
    lane,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_PRODUCTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Says where a head's keys and values of slots s + lane begin [BLOCK_S, 1], and which of them any new token sees.

    They are in `page` or, with slots_ptr, wherever it says of each. `slot` is the newest token's, which is not seen
    where its key and value come from registers.
    """
    used = s + lane < end
    if TOKENS == 1 and KV_PRODUCTS > 0:
        used = used & (s + lane != slot)
    if WINDOW > 0:
        used = used & (_age(s + lane, slot, S, WINDOW) < WINDOW + TOKENS - 1)
    if slots_ptr is None:
        base = ((page * KV_HEADS + head) * PAGE + s % PAGE) * D
        places = base + lane[:, None] * D
    else:
        at = tl.load(slots_ptr + s + lane, mask=used, other=0).to(tl.int64)
        places = (((at // PAGE * KV_HEADS + head) * PAGE + at % PAGE) * D)[:, None]
    return places, used


@jit
def _block(
    k_ptr,
    v_ptr,
    slots_ptr,
    page,
    s,
    end,
    slot,
    S,
    head,
    lane,
    d,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_PRODUCTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Loads a head's keys and values [BLOCK_S, BLOCK_D] of slots s + lane, and says which of them any new token sees."""
    places, used = _places(slots_ptr, page, s, end, slot, S, head, lane, KV_HEADS, D, PAGE, WINDOW, KV_PRODUCTS, TOKENS)
    mask = used[:, None] & (d < D)[None, :] if D < BLOCK_D else used[:, None]
    offsets = places + d[None, :]
    return tl.load(k_ptr + offsets, mask=mask, other=0.0), tl.load(v_ptr + offsets, mask=mask, other=0.0), used


@jit
def _place(
    position_ptr,
    table_ptr,
    prefix_ptr,
    S,
    BLOCK_S: tl.constexpr,
    KV_SPLITS: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Returns where program (row, head, split) works: the slot of the row's newest token, the row's table, and the
    program's slots [start, end)."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row).to(tl.int32)
    prefix = 0
    if prefix_ptr is not None:
        prefix = tl.load(prefix_ptr + row)
        prefix = tl.where(prefix <= position, prefix, 0)  # a row that has ended is at position 0
    start, end = _kv_split(position, prefix, S, BLOCK_S, KV_SPLITS, TOKENS)
    return (position + TOKENS - 1) % S, table_ptr + row * (S // PAGE), start, end


@jit
def _prefetch_slots(
    k_ptr,
    v_ptr,
    page,
    start,
    end,
    head,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Has keys and values of the first AHEAD slots of [start, end) brought to L2, as far as they are in `page`."""
    if PDL and AHEAD > 0:
        PIECE: tl.constexpr = 1024
        ITEM: tl.constexpr = v_ptr.dtype.element_ty.primitive_bitwidth // 8
        first = (page * KV_HEADS + head) * PAGE * D + (start % PAGE) * D
        count = tl.minimum(tl.minimum(end - start, AHEAD), PAGE - start % PAGE) * (D * ITEM) // PIECE
        if k_ptr is not None:
            prefetch_l2(k_ptr + first, PIECE, count, PIECE, PDL)
        prefetch_l2(v_ptr + first, PIECE, count, PIECE, PDL)


@jit
def _new_kv(
    qkv_ptr,
    rope_ptr,
    k_norm_ptr,
    eps,
    rows,
    head,
    d,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SPLIT_K: tl.constexpr,
    KV_PRODUCTS: tl.constexpr,
    V_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loads the rotation at the row's position, and makes the head's new key and value, if the layer has any."""
    WIDTH: tl.constexpr = (GROUP + KV_PRODUCTS) * KV_HEADS * D
    row = tl.program_id(0).to(tl.int64)
    in_head = d < D
    cos = tl.load(rope_ptr + row * D + d, mask=in_head, other=0.0)
    sin = tl.load(rope_ptr + (rows + row) * D + d, mask=in_head, other=0.0)
    column = (GROUP * KV_HEADS + head) * D
    k, v = cos, sin  # of no use; Triton returns no None
    if KV_PRODUCTS > 0:
        k = _normed_rotated(
            qkv_ptr, row, rows, column, d, in_head, cos, sin, k_norm_ptr, eps, WIDTH, D, 0, SPLIT_K, OFFSET, dtype
        )
        columns = column + (KV_PRODUCTS - 1) * KV_HEADS * D + d
        v = _values(qkv_ptr, row, rows, columns, in_head, eps, WIDTH, D, 0, SPLIT_K, V_NORM, dtype)
    return cos, sin, k, v


@jit
def _write_new(k, v, k_ptr, v_ptr, own, inverse_k_scale, inverse_v_scale, d, D: tl.constexpr, LIMIT: tl.constexpr):
    """Rounds the new key and value as the caches store them; the first split writes them from offset `own` on.

    They are used from registers. Loads that come after these stores would wait for them, since a load may be of what
    was stored: so the first block is loaded before.
    """
    mask = d < tl.where(tl.program_id(2) == 0, D, 0)
    k = _write(k, k_ptr, own + d, inverse_k_scale, mask, LIMIT)
    v = _write(v, v_ptr, own + d, inverse_v_scale, mask, LIMIT)
    return k, v


@jit
def _write_tokens(
    qkv_ptr,
    rope_ptr,
    k_norm_ptr,
    k_ptr,
    v_ptr,
    rotation_ptr,
    own,
    mine,
    inverse_k_scale,
    inverse_v_scale,
    eps,
    rows,
    head,
    d,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    KV_PRODUCTS: tl.constexpr,
    V_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    TOKENS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Makes the keys and values of those of a row's new tokens that are `mine` [BLOCK_TOKENS], and writes them from
    offsets `own` [BLOCK_TOKENS] on; what the program loads afterwards has them."""
    WIDTH: tl.constexpr = (GROUP + KV_PRODUCTS) * KV_HEADS * D
    d, to, mask = d[None, :], own[:, None] + d[None, :], mine[:, None] & (d < D)[None, :]
    row = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None]
    column = (GROUP * KV_HEADS + head) * D
    if rotation_ptr is None:
        cos = tl.load(rope_ptr + row * D + d, mask=mask, other=0.0)
        sin = tl.load(rope_ptr + (rows + row) * D + d, mask=mask, other=0.0)
        k = _normed_rotated(
            qkv_ptr, row, rows, column, d, mask, cos, sin, k_norm_ptr, eps, WIDTH, D, 1, SPLIT_K, OFFSET, dtype
        )
        _write(k, k_ptr, to, inverse_k_scale, mask, LIMIT)
    columns = column + (KV_PRODUCTS - 1) * KV_HEADS * D + d
    v = _values(qkv_ptr, row, rows, columns, mask, eps, WIDTH, D, 1, SPLIT_K, V_NORM, dtype)
    _write(v, v_ptr, to, inverse_v_scale, mask, LIMIT)
    tl.debug_barrier()


@jit
def _attend_by_sums(m, l, acc, q, k, v, used, scale, softcap):
    """Adds a block of slots to each lane's running softmax: its maximum m, its sum l and its unscaled result acc."""
    scores = log2_scores(tl.sum(q[None, :] * k.to(tl.float32), axis=1), scale, softcap)
    scores = tl.where(used, scores, float("-inf"))
    m_new = tl.maximum(m, scores)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(scores - m_new)
    return m_new, l * alpha + p, acc * alpha[:, None] + p[:, None] * v.to(tl.float32)


@jit
def _attention_by_sums_kernel(
    qkv_ptr,
    rope_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_ptr,
    v_ptr,
    rotation_ptr,
    position_ptr,
    table_ptr,
    slots_ptr,
    prefix_ptr,
    scale_ptr,
    out_ptr,
    q_ptr,
    acc_ptr,
    stats_ptr,
    scale,
    v_scale,
    softcap,
    inverse_k_scale,
    inverse_v_scale,
    eps,
    rows,
    S,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    KV_SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    KV_PRODUCTS: tl.constexpr,
    V_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    AHEAD: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attends with one query a program, of TOKENS = 1; program (row, query head, split).

    Where GROUP query heads share a key head, each of their programs loads its keys, and writes the same new one. Each of
    BLOCK_S lanes has a softmax of its own over every BLOCK_S-th slot, so that the loop exchanges nothing between warps;
    the lanes are joined at the end. The first block is loaded before the wait, unless an earlier kernel of this step has
    written to it. Queries are left in q_ptr for whoever attends to the prefixes, if there are any.
    """
    launch_dependents(PDL)
    WIDTH: tl.constexpr = (GROUP + KV_PRODUCTS) * KV_HEADS * D
    HEADS: tl.constexpr = GROUP * KV_HEADS
    row, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = query // GROUP
    lane, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    in_head = d < D
    output_scale = load_scalar(scale_ptr)
    slot, table_ptr, start, end = _place(position_ptr, table_ptr, prefix_ptr, S, BLOCK_S, KV_SPLITS, PAGE, TOKENS)
    if slots_ptr is not None:
        slots_ptr += row * S
    own_page = _page(table_ptr, slot, PAGE)
    first_page = _page(table_ptr, tl.minimum(start, S - 1), PAGE)
    memory, place = (k_ptr, v_ptr, slots_ptr), (slot, S, head, lane, d)
    if KV_PRODUCTS > 0:
        k, v, used = _block(
            *memory, first_page, start, end, *place, KV_HEADS, D, BLOCK_D, PAGE, WINDOW, KV_PRODUCTS, TOKENS
        )
    s = start + BLOCK_S
    page = _page(table_ptr, tl.minimum(s, S - 1), PAGE)
    _prefetch_slots(k_ptr, v_ptr, page, s, end, head, KV_HEADS, D, PAGE, AHEAD, PDL)
    wait_for_previous(PDL)
    if KV_PRODUCTS == 0:
        k, v, used = _block(
            *memory, first_page, start, end, *place, KV_HEADS, D, BLOCK_D, PAGE, WINDOW, KV_PRODUCTS, TOKENS
        )
    inputs = (qkv_ptr, rope_ptr, k_norm_ptr, eps, rows)
    cos, sin, own_k, own_v = _new_kv(*inputs, head, d, KV_HEADS, GROUP, D, SPLIT_K, KV_PRODUCTS, V_NORM, OFFSET, dtype)
    q = _normed_rotated(
        qkv_ptr, row, rows, query * D, d, in_head, cos, sin, q_norm_ptr, eps, WIDTH, D, 0, SPLIT_K, OFFSET, dtype
    )
    if q_ptr is not None:
        mask = d < tl.where(tl.program_id(2) == 0, D, 0)
        tl.store(q_ptr + (row * HEADS + query) * D + d, q.to(dtype), mask=mask)
    if KV_PRODUCTS > 0:
        own_at = ((own_page * KV_HEADS + head) * PAGE + slot % PAGE) * D
        own_k, own_v = _write_new(own_k, own_v, k_ptr, v_ptr, own_at, inverse_k_scale, inverse_v_scale, d, D, LIMIT)
        own = (lane == 0) & (tl.program_id(2) == 0)
        m = tl.where(own, log2_scores(tl.sum(q * own_k, axis=0), scale, softcap), LOWEST)
        l = tl.where(own, 1.0, 0.0)
        acc = tl.where(own[:, None], own_v[None, :], 0.0)
    else:
        m = tl.full([BLOCK_S], LOWEST, tl.float32)
        l = tl.zeros([BLOCK_S], tl.float32)
        acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    m, l, acc = _attend_by_sums(m, l, acc, q, k, v, used, scale, softcap)
    for s in tl.range(start + BLOCK_S, end, BLOCK_S, num_stages=STAGES):
        at = _page(table_ptr, s, PAGE)
        k, v, used = _block(*memory, at, s, end, *place, KV_HEADS, D, BLOCK_D, PAGE, WINDOW, KV_PRODUCTS, TOKENS)
        m, l, acc = _attend_by_sums(m, l, acc, q, k, v, used, scale, softcap)
    m_all = tl.max(m, axis=0)
    weight = tl.exp2(m - m_all)
    l_all = tl.sum(l * weight, axis=0)
    y = tl.sum(acc * weight[:, None], axis=0)
    if acc_ptr is None:
        store_rounded(
            out_ptr + (row * HEADS + query) * D + d,
            (y / l_all * v_scale).to(dtype).to(tl.float32),
            output_scale,
            in_head,
            dtype,
        )
    else:
        entry = (tl.program_id(2) * rows + row) * HEADS + query
        tl.store(stats_ptr + entry * 2, m_all)
        tl.store(stats_ptr + entry * 2 + 1, l_all)
        if start < end:
            tl.store(acc_ptr + entry * D + d, y, mask=in_head)


@jit
def _attention_kernel(
    qkv_ptr,
    rope_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_ptr,
    v_ptr,
    rotation_ptr,
    position_ptr,
    table_ptr,
    slots_ptr,
    prefix_ptr,
    scale_ptr,
    out_ptr,
    q_ptr,
    acc_ptr,
    stats_ptr,
    scale,
    v_scale,
    softcap,
    inverse_k_scale,
    inverse_v_scale,
    eps,
    rows,
    S,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    KV_SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    KV_PRODUCTS: tl.constexpr,
    V_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    AHEAD: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attends where each key head has GROUP queries of each of TOKENS new tokens, which tensor cores take as rows of a
    matrix, those of a token side by side.

    Program (row, key head, split); `rows` counts tokens. The key and value of one token stay in registers; of several,
    each program writes those whose slots it has, and loads them as it does all others. Where the cache keeps values
    alone, there is a rotation_ptr: what keys are multiplied by is the queries' matter then, but for the R pairs of a
    head that turn and are loaded again. With a k_ptr all values are loaded again, for the product with queries.
    """
    launch_dependents(PDL)
    # FP8 is exact in float16, and converted faster than to bfloat16
    is_fp8: tl.constexpr = v_ptr.dtype.element_ty.primitive_bitwidth == 8
    factor: tl.constexpr = tl.float16 if is_fp8 and dtype == tl.bfloat16 else dtype
    WIDTH: tl.constexpr = (GROUP + KV_PRODUCTS) * KV_HEADS * D
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, lane, d = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    in_head = d < D
    if TOKENS > 1:
        token = tl.minimum(g // GROUP, TOKENS - 1)
        of_row, member = (row * TOKENS + token)[:, None], g % GROUP
    else:
        token, of_row, member = 0, row, g
    q_mask = (g < GROUP * TOKENS)[:, None] & in_head[None, :]
    output_scale = load_scalar(scale_ptr)
    slot, table_ptr, start, end = _place(position_ptr, table_ptr, prefix_ptr, S, BLOCK_S, KV_SPLITS, PAGE, TOKENS)
    if slots_ptr is not None:
        slots_ptr += row * S
    own_slot, mine = slot, True
    if TOKENS > 1:
        t = tl.arange(0, BLOCK_TOKENS)
        own_slot = (slot + S - (TOKENS - 1) + tl.minimum(t, TOKENS - 1)) % S
        mine = (t < TOKENS) & (own_slot >= start) & (own_slot < end)
    own_page = _page(table_ptr, own_slot, PAGE)
    page = _page(table_ptr, tl.minimum(start, S - 1), PAGE)
    _prefetch_slots(
        k_ptr if rotation_ptr is None else None, v_ptr, page, start, end, head, KV_HEADS, D, PAGE, AHEAD, PDL
    )
    wait_for_previous(PDL)
    if TOKENS > 1:
        if KV_PRODUCTS > 0 and tl.max(mine.to(tl.int32), axis=0) > 0:
            inputs = (qkv_ptr, rope_ptr, k_norm_ptr, k_ptr, v_ptr, rotation_ptr)
            own_at = ((own_page * KV_HEADS + head) * PAGE + own_slot % PAGE) * D
            _write_tokens(
                *inputs,
                own_at,
                mine,
                inverse_k_scale,
                inverse_v_scale,
                eps,
                rows,
                head,
                d,
                KV_HEADS,
                GROUP,
                D,
                BLOCK_TOKENS,
                SPLIT_K,
                KV_PRODUCTS,
                V_NORM,
                OFFSET,
                LIMIT,
                TOKENS,
                dtype,
            )
        q_cos = tl.load(rope_ptr + of_row * D + d[None, :], mask=q_mask, other=0.0)
        q_sin = tl.load(rope_ptr + (rows + of_row) * D + d[None, :], mask=q_mask, other=0.0)
    else:
        inputs = (qkv_ptr, rope_ptr, k_norm_ptr, eps, rows)
        cos, sin, own_k, own_v = _new_kv(
            *inputs, head, d, KV_HEADS, GROUP, D, SPLIT_K, KV_PRODUCTS, V_NORM, OFFSET, dtype
        )
        q_cos, q_sin = cos[None, :], sin[None, :]
    heads = (head * GROUP + member)[:, None] * D
    q = _normed_rotated(
        qkv_ptr,
        of_row,
        rows,
        heads,
        d[None, :],
        q_mask,
        q_cos,
        q_sin,
        q_norm_ptr,
        eps,
        WIDTH,
        D,
        1,
        SPLIT_K,
        OFFSET,
        dtype,
    )
    first = tl.program_id(2) == 0
    if rotation_ptr is not None:
        turning = (d % (D // 2) < R)[None, :]
        weighted = tl.where(turning, q, q * _norm_factor(k_norm_ptr, d, D, OFFSET)[None, :])
    else:
        weighted = q.to(dtype)
    if q_ptr is not None:
        mask = (g < tl.where(first, GROUP * TOKENS, 0))[:, None] & in_head[None, :]
        q_offsets = heads + of_row * GROUP * KV_HEADS * D + d[None, :]
        tl.store(q_ptr + q_offsets, weighted.to(q_ptr.dtype.element_ty), mask=mask)
    l = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_D], tl.float32)
    if TOKENS == 1 and KV_PRODUCTS > 0:
        own_at = ((own_page * KV_HEADS + head) * PAGE + slot % PAGE) * D
        if rotation_ptr is not None:
            columns = (GROUP * KV_HEADS + head) * D
            new = (qkv_ptr, row, rows, columns, d, in_head, cos, sin, k_norm_ptr, eps)
            to = (v_ptr, own_at + d, d < tl.where(first, D, 0), inverse_v_scale)
            own_k, own_v = _written_kv_of_values(*new, *to, WIDTH, D, 0, SPLIT_K, OFFSET, LIMIT, dtype)
        else:
            own_k, own_v = _write_new(own_k, own_v, k_ptr, v_ptr, own_at, inverse_k_scale, inverse_v_scale, d, D, LIMIT)
        m = tl.where(first, log2_scores(tl.sum(q * own_k[None, :], axis=1), scale, softcap), LOWEST)
        l += tl.where(first, 1.0, 0.0)
        acc += tl.where(first, own_v[None, :], 0.0)
    else:
        m = tl.full([BLOCK_GROUP], LOWEST, tl.float32)
    memory, place = (k_ptr, v_ptr, slots_ptr), (slot, S, head, lane, d)
    if rotation_ptr is not None:
        r = tl.arange(0, BLOCK_R)
        low_factor = _norm_factor(k_norm_ptr, r, D, OFFSET)
        high_factor = _norm_factor(k_norm_ptr, D // 2 + r, D, OFFSET)
        low_d, high_d = tl.minimum(r, D - 1)[None, :], tl.minimum(D // 2 + r, D - 1)[None, :]
        every = tl.zeros([BLOCK_GROUP, 1], tl.int32)
        low, high = tl.gather(q, low_d + every, axis=1).to(factor), tl.gather(q, high_d + every, axis=1).to(factor)
        query = tl.where(turning, 0.0, weighted).to(factor)
    else:
        query = q.to(factor)
    for s in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        at = _page(table_ptr, s, PAGE)
        if rotation_ptr is not None:
            places, used = _places(
                slots_ptr, at, s, end, slot, S, head, lane, KV_HEADS, D, PAGE, WINDOW, KV_PRODUCTS, TOKENS
            )
            kv_mask, pairs = used[:, None] & in_head[None, :], used[:, None] & (r < R)[None, :]
            v = tl.load(v_ptr + places + d[None, :], mask=kv_mask, other=0.0)
            k = v
            if k_ptr is not None:
                k = tl.load(k_ptr + places + d[None, :], mask=kv_mask, other=0.0)
            low_k, high_k = _rotated_keys(
                v_ptr, rotation_ptr, places, s + lane, pairs, r, low_factor, high_factor, R, D, factor
            )
            products = tl.dot(low, tl.trans(low_k), input_precision="ieee")
            products = tl.dot(high, tl.trans(high_k), products, input_precision="ieee")
            products = tl.dot(query, tl.trans(k.to(factor)), products, input_precision="ieee")
        else:
            k, v, used = _block(*memory, at, s, end, *place, KV_HEADS, D, BLOCK_D, PAGE, WINDOW, KV_PRODUCTS, TOKENS)
            products = tl.dot(query, tl.trans(k.to(factor)), input_precision="ieee")
        scores = log2_scores(products, scale, softcap)
        seen = _seen(used, s + lane, slot, S, token, WINDOW, TOKENS)
        scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(factor), v.to(factor), acc * alpha[:, None], input_precision="ieee")
        m = m_new
    if acc_ptr is None:
        offsets = heads + of_row * GROUP * KV_HEADS * D + d[None, :]
        store_rounded(
            out_ptr + offsets, (acc / l[:, None] * v_scale).to(dtype).to(tl.float32), output_scale, q_mask, dtype
        )
    else:
        of_row = row * TOKENS + token
        entry = ((tl.program_id(2) * rows + of_row) * KV_HEADS + head) * GROUP + member
        tl.store(stats_ptr + entry * 2, m, mask=g < GROUP * TOKENS)
        tl.store(stats_ptr + entry * 2 + 1, l, mask=g < GROUP * TOKENS)
        if start < end:
            tl.store(acc_ptr + entry[:, None] * D + d[None, :], acc, mask=q_mask)


@jit
def _combine_kernel(
    acc_ptr,
    stats_ptr,
    prefix_ptr,
    scale_ptr,
    out_ptr,
    v_scale,
    entries,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    KV_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Combines the results of splits for BLOCK elements of a query head; program (row and head, block).

    Rows are of one token; TOKENS of them are a sequence's, which has one prefix. There are KV_SPLITS results or, for a
    row with a shared prefix, SPLITS. What others hold is left from another step.
    """
    launch_dependents(PDL)
    row_head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, BLOCK_SPLITS)
    entry = split * entries + row_head
    scale = load_scalar(scale_ptr)
    used = split < KV_SPLITS
    if prefix_ptr is not None:
        used = split < tl.where(tl.load(prefix_ptr + row_head // (HEADS * TOKENS)) > 0, SPLITS, KV_SPLITS)
    wait_for_previous(PDL)
    m = tl.load(stats_ptr + entry * 2, mask=used, other=LOWEST)
    l = tl.load(stats_ptr + entry * 2 + 1, mask=used, other=0.0)
    acc = tl.load(acc_ptr + entry[:, None] * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)
    weight = tl.exp2(m - tl.max(m, axis=0))
    acc = tl.where((l > 0)[:, None], acc, 0.0)  # a split without slots has written no sums
    y = tl.sum(acc * weight[:, None], axis=0) / tl.sum(l * weight, axis=0)
    store_rounded(out_ptr + row_head * D + d, (y * v_scale).to(dtype).to(tl.float32), scale, d < D, dtype)


def decode_attention(
    qkv: Tensor,
    layer: AttentionLayer,
    cache,
    positions: Positions,
    dtype: torch.dtype,
    output_scale: Tensor | None = None,
    kv_splits: int | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Does what `ops.attention.attend` does for a decode step, with one kernel or two, three for shared prefixes.

    qkv [M, (HEADS + kv_products * KV_HEADS) * D], of T tokens of each of B rows, is in `dtype` or in float32 partial
    sums. The result is [M, HEADS * D] in `dtype` or, with output_scale, in E4M3. Queries and keys are normed and
    rotated, the key and value of token t are written to slot (position + t) % S, where those of a layer without
    products are already, and of the caches only slots 0 to min(position + T, S) - 1 are read. kv_splits programs, a
    power of 2, share a row's slots.

    A cache may have a `slot_table` [B, S] in int32: the key of slot s of row b is then read at place slot_table[b, s] %
    PAGE of page slot_table[b, s] // PAGE, whosever that is, and the new one is written through `table` all the same.
    Rows have one token then. Layers whose slots are no ring attend to `positions.shared` once for its rows.
    """
    (batch, _), slots, (_, kv_heads, _, d) = cache.table.shape, cache.slots, cache.v.shape
    m, tokens = batch * positions.tokens, positions.tokens
    n_heads = layer.n_heads
    group = n_heads // kv_heads
    k, rotation = keys_and_rotation(cache)
    windowed = layer.window is not None and layer.window < slots
    shared = None if windowed or getattr(cache, "ring", False) else positions.shared
    if config is None:
        alone = rotation is not None
        config = attention_config(batch * kv_heads, group, slots, cache.v.dtype, d, dtype, alone, tokens)
        if shared is not None and config.by_sums and m * kv_heads >= SMS:  # a row's own keys are few
            config = AttentionConfig(block_s=16, num_warps=2, num_stages=3, by_sums=True)
    heads = n_heads if config.by_sums else kv_heads  # that have a program each
    warps = config.num_warps if d <= 256 else 4  # a program of larger heads has an SM, however many its warps
    kv_splits = kv_splits or pick_kv_splits(batch * heads, slots, config.block_s, warps)
    splits, slot_table = kv_splits, getattr(cache, "slot_table", None)
    if tokens > 1 and (config.by_sums or slot_table is not None):
        raise ValueError("several tokens a row are for tensor cores and for rows that read their own pages")
    out = torch.empty(m, n_heads * d, dtype=dtype if output_scale is None else E4M3, device=qkv.device)
    q = prefix = acc = stats = None
    if shared is not None:
        rows, prefix = shared.rows, shared.prefix
        tiles, alone = -(-m // rows), rotation is not None
        of_prefix = prefix_config(tiles, rows * group, kv_heads, d, slots, dtype, cache.v.dtype, alone)
        splits += of_prefix.splits
        of_products = torch.float16 if rotation is not None and k is not None and dtype == torch.bfloat16 else dtype
        q = torch.empty(m, n_heads, d, dtype=of_products, device=qkv.device)
    if splits > 1:
        acc = torch.empty(splits, m, n_heads, d, dtype=torch.float32, device=qkv.device)
        stats = torch.empty(splits, m, n_heads, 2, dtype=torch.float32, device=qkv.device)  # maximum and sum
    k_scale, v_scale = cache.k_scale, cache.v_scale
    launch(
        _attention_by_sums_kernel if config.by_sums else _attention_kernel,
        (batch, heads, kv_splits),
        *(qkv, positions.rope, layer.q_norm, layer.k_norm, k, cache.v, rotation),
        *(positions.position, cache.table, slot_table, prefix, output_scale, out, q, acc, stats),
        *(layer.scale * k_scale, v_scale, layer.softcap, 1 / k_scale, 1 / v_scale, layer.eps, m, slots),
        KV_HEADS=kv_heads,
        GROUP=group,
        D=d,
        R=0 if rotation is None else rotation.shape[2],
        BLOCK_GROUP=max(16, power_of_2(group * tokens)),
        BLOCK_TOKENS=power_of_2(tokens),
        BLOCK_D=max(16, power_of_2(d)),
        BLOCK_R=0 if rotation is None else max(16, power_of_2(rotation.shape[2])),
        BLOCK_S=config.block_s,
        KV_SPLITS=kv_splits,
        STAGES=config.num_stages,
        SPLIT_K=split_k_of(qkv),
        KV_PRODUCTS=layer.kv_products,
        V_NORM=layer.v_norm,
        OFFSET=layer.norm_offset,
        LIMIT=cache.codec.limit,
        AHEAD=config.ahead if d * cache.v.dtype.itemsize % 16 == 0 and slot_table is None else 0,
        PAGE=PAGE,
        WINDOW=layer.window if windowed else 0,
        TOKENS=tokens,
        dtype=triton_dtype(dtype),
        num_warps=config.num_warps,
    )
    if shared is not None:
        prefix_attention(q, layer, cache, shared, acc[kv_splits:], stats[kv_splits:], of_prefix, tokens)
    if splits > 1:
        block, block_splits = combine_block(m * n_heads), power_of_2(splits)
        launch(
            _combine_kernel,
            (m * n_heads, -(-d // block)),
            *(acc, stats, prefix, output_scale, out, v_scale, m * n_heads),
            HEADS=n_heads,
            D=d,
            BLOCK=block,
            BLOCK_SPLITS=block_splits,
            KV_SPLITS=kv_splits,
            SPLITS=splits,
            TOKENS=tokens,
            dtype=triton_dtype(dtype),
            num_warps=row_warps(block_splits * block),
        )
    return out
