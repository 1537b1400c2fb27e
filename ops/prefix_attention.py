"""Attention over prefixes that rows share, the decode step's: the keys of a prefix are read once for all of its rows.

A softmax over the keys of a prefix and those of a row alone is made of two (bifurcated attention,
https://arxiv.org/abs/2403.08845): ops/decode_attention.py attends to the row's own keys, leaves the rotated queries for
the kernel here, and combines the results of both as it does those of programs that share a row's slots. A program here
has the queries of one key head in a tile of rows as one matrix, and `splits` programs share the pages of the prefix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from config import PAGE
from ops.common import (
    LOWEST,
    SMS,
    jit,
    launch,
    launch_dependents,
    log2_scores,
    power_of_2,
    prefetch_l2,
    tl,
    triton_dtype,
    wait_for_previous,
)
from ops.rope import AttentionLayer, Shared, _norm_factor, _rotated_keys, keys_and_rotation


class PrefixConfig(NamedTuple):
    """How attention over shared prefixes runs: block_n keys at a time, at most a page, num_stages such blocks in flight.

    `splits` programs share a prefix, for each tile of rows and key head. The first `ahead` pages of each are brought to
    L2 while the kernel before still runs.
    """

    block_n: int
    num_warps: int
    num_stages: int
    splits: int
    ahead: int = 0


def tile_rows(rows: int, group: int, head_dim: int, dtype: torch.dtype) -> int:
    """Picks how many rows a tile has at most where so many share a prefix and `group` query heads share a key head.

    A program multiplies keys with the queries of a tile: of 16, the least that tensor cores take, of 64, one group of
    warps, or of 128, two. Their results have to fit in registers.
    """
    queries = rows * group
    if dtype == torch.float32 or queries <= 16:
        queries = 16
    else:
        queries = 64 if queries <= 64 or head_dim > 256 else 128
    return max(1, queries // group)


def prefix_config(
    tiles: int,
    queries: int,
    kv_heads: int,
    head_dim: int,
    slots: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    values_alone: bool = False,
) -> PrefixConfig:
    """Picks how tiles of at most `queries` queries a key head attend to their prefix, which has less than `slots` keys.

    `tiles` is how many there were if all rows shared one prefix: together they fill the GPU. Where fewer rows do, and
    what programs wait for is memory, there are at least 4 splits, whose results are few bytes.
    """
    splits = SMS // (tiles * kv_heads)
    if queries <= 32:
        splits = max(splits, 4)
    splits = max(1, min(splits, slots // (2 * PAGE), 32))
    if dtype == torch.float32:  # without tensor cores: all operands are in registers
        return PrefixConfig(block_n=16, num_warps=8, num_stages=1, splits=splits)
    is_fp8 = cache_dtype.itemsize == 1
    if queries <= 32:  # bound by memory
        if head_dim > 256:
            return PrefixConfig(block_n=32, num_warps=4, num_stages=4 if is_fp8 else 2, splits=splits, ahead=2)
        return PrefixConfig(block_n=64 if is_fp8 else 32, num_warps=4, num_stages=4, splits=splits, ahead=2)
    if head_dim > 256:  # keys that are made of values take registers
        return PrefixConfig(block_n=16 if values_alone else 32, num_warps=8, num_stages=2, splits=splits, ahead=1)
    return PrefixConfig(block_n=64, num_warps=4 if queries <= 64 else 8, num_stages=2, splits=splits, ahead=1)


@jit
def _entry(order_ptr, i, used, head, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """Returns which of all rows' query heads is query i of a tile, whose rows begin at order_ptr, on a key head."""
    row = tl.load(order_ptr + i // GROUP, mask=used, other=0).to(tl.int64)
    return row * HEADS + head * GROUP + i % GROUP


@jit
def _prefix_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    rotation_ptr,
    k_norm_ptr,
    table_ptr,
    prefix_ptr,
    order_ptr,
    tiles_ptr,
    acc_ptr,
    stats_ptr,
    scale,
    softcap,
    rows,
    S,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile of rows, key head, split); tiles of one prefix, side by side, find its keys in L2.

    Rows are of one token; TOKENS of them are a sequence's, which has one table and one prefix.
    """
    launch_dependents(PDL)
    # FP8 is exact in float16, and converted faster than to bfloat16
    is_fp8: tl.constexpr = v_ptr.dtype.element_ty.primitive_bitwidth == 8
    factor: tl.constexpr = tl.float16 if is_fp8 and dtype == tl.bfloat16 else dtype
    HEADS: tl.constexpr = KV_HEADS * GROUP
    head = tl.program_id(1)
    first = tl.load(tiles_ptr + 2 * tl.program_id(0))
    count = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    leader = tl.load(order_ptr + first, mask=count > 0, other=0).to(tl.int64) // TOKENS
    table_ptr += leader * (S // PAGE)
    prefix = tl.load(prefix_ptr + leader, mask=count > 0, other=0)
    size = tl.cdiv(prefix // BLOCK_N, SPLITS) * BLOCK_N
    start = tl.program_id(2) * size
    end = tl.minimum(start + size, prefix)
    if PDL:
        PIECE: tl.constexpr = 1024
        PIECES: tl.constexpr = PAGE * D * v_ptr.dtype.element_ty.primitive_bitwidth // 8 // PIECE
        for ahead in tl.static_range(AHEAD):
            s = start + ahead * PAGE
            page = tl.load(table_ptr + s // PAGE, mask=s < end, other=0).to(tl.int64)
            pieces = tl.where(s < end, PIECES, 0)
            if rotation_ptr is None:
                prefetch_l2(k_ptr + (page * KV_HEADS + head) * PAGE * D, PIECE, pieces, PIECE, PDL)
            prefetch_l2(v_ptr + (page * KV_HEADS + head) * PAGE * D, PIECE, pieces, PIECE, PDL)
    i, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    used = i // GROUP < count
    mask = used[:, None] & (d < D)[None, :]
    entry = _entry(order_ptr + first, i, used, head, GROUP, HEADS)
    page = tl.load(table_ptr + start // PAGE, mask=start < end, other=0)
    wait_for_previous(PDL)
    if count == 0:
        return
    if rotation_ptr is not None:  # as in ops/decode_attention.py, which has multiplied queries by what keys are
        r = tl.arange(0, BLOCK_R)
        low_factor = _norm_factor(k_norm_ptr, r, D, OFFSET)
        high_factor = _norm_factor(k_norm_ptr, D // 2 + r, D, OFFSET)
        turning = (r < R)[None, :]
        low_q = tl.load(q_ptr + entry[:, None] * D + r[None, :], mask=used[:, None] & turning, other=0.0)
        high_q = tl.load(q_ptr + entry[:, None] * D + D // 2 + r[None, :], mask=used[:, None] & turning, other=0.0)
        q = tl.load(q_ptr + entry[:, None] * D + d[None, :], mask=mask & (d % (D // 2) >= R)[None, :], other=0.0)
    else:
        q = tl.load(q_ptr + entry[:, None] * D + d[None, :], mask=mask, other=0.0).to(factor)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    at = n[:, None] * D + d[None, :]
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        base = ((page.to(tl.int64) * KV_HEADS + head) * PAGE + s % PAGE) * D
        page = tl.load(table_ptr + (s + BLOCK_N) // PAGE, mask=s + BLOCK_N < end, other=0)
        if rotation_ptr is not None:
            v = tl.load(v_ptr + base + at, mask=(d < D)[None, :], other=0.0).to(factor)
            k = v
            if k_ptr is not None:
                k = tl.load(k_ptr + base + at, mask=(d < D)[None, :], other=0.0).to(factor)
            low_k, high_k = _rotated_keys(
                v_ptr, rotation_ptr, base + n[:, None] * D, s + n, turning, r, low_factor, high_factor, R, D, factor
            )
            products = tl.dot(low_q, tl.trans(low_k), input_precision="ieee")
            products = tl.dot(high_q, tl.trans(high_k), products, input_precision="ieee")
            products = tl.dot(q, tl.trans(k), products, input_precision="ieee")
        else:
            if D < BLOCK_D:
                k = tl.load(k_ptr + base + at, mask=(d < D)[None, :], other=0.0).to(factor)
                v = tl.load(v_ptr + base + at, mask=(d < D)[None, :], other=0.0).to(factor)
            else:
                k = tl.load(k_ptr + base + at).to(factor)
                v = tl.load(v_ptr + base + at).to(factor)
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
        m_new = tl.maximum(m, log2_scores(tl.max(products, axis=1), scale, softcap))
        p = tl.exp2(log2_scores(products, scale, softcap) - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(factor), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    entry = _entry(order_ptr + first, i, used, head, GROUP, HEADS)  # again: registers are scarce in the loop
    entry += tl.program_id(2).to(tl.int64) * rows * HEADS
    tl.store(stats_ptr + entry * 2, m, mask=used)
    tl.store(stats_ptr + entry * 2 + 1, l, mask=used)
    if start < end:
        tl.store(acc_ptr + entry[:, None] * D + d[None, :], acc, mask=mask)


def prefix_attention(
    q: Tensor,
    layer: AttentionLayer,
    cache,
    shared: Shared,
    acc: Tensor,
    stats: Tensor,
    config: PrefixConfig,
    tokens: int = 1,
):
    """Attends from queries q [M, HEADS, D], normed and rotated, of `tokens` new tokens a row, to the keys of each row's
    shared prefix.

    For a cache of values alone, queries are multiplied by what keys are, except where they turn, and in the dtype that
    values are multiplied in. Leaves unscaled results in acc [splits, M, HEADS, D], and maxima and sums in stats
    [splits, M, HEADS, 2]: nothing for rows without a prefix, and no results, with a sum of 0, where a split has no
    keys.
    """
    (m, n_heads, d), kv_heads = q.shape, cache.v.shape[1]
    group, (k, rotation) = n_heads // kv_heads, keys_and_rotation(cache)
    launch(
        _prefix_attention_kernel,
        (len(shared.tiles), kv_heads, config.splits),
        *(q, k, cache.v, rotation, None if rotation is None else layer.k_norm, cache.table),
        *(shared.prefix, shared.order, shared.tiles, acc, stats),
        *(layer.scale * cache.k_scale, layer.softcap, m, cache.slots),
        KV_HEADS=kv_heads,
        GROUP=group,
        D=d,
        R=0 if rotation is None else rotation.shape[2],
        BLOCK_M=max(16, power_of_2(shared.rows * group)),
        BLOCK_N=config.block_n,
        BLOCK_D=max(16, power_of_2(d)),
        BLOCK_R=0 if rotation is None else max(16, power_of_2(rotation.shape[2])),
        OFFSET=layer.norm_offset,
        SPLITS=config.splits,
        STAGES=config.num_stages,
        AHEAD=config.ahead if d * cache.v.dtype.itemsize % 16 == 0 else 0,
        PAGE=PAGE,
        TOKENS=tokens,
        dtype=triton_dtype(q.dtype),
        num_warps=config.num_warps,
    )
