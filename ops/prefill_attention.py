"""Attention of prompts: new tokens of several sequences, packed one behind another, and what the cache holds of each.

A program has one query head and a block of one sequence's queries, and finds out on the device which
(FlashAttention-2, https://arxiv.org/abs/2307.08691, in its form for packed sequences). It takes the keys of the cache
first, page by page, then those of the new tokens. What masks cost is paid only for blocks that need one: new keys go

    | masked: the window begins | not masked | masked: the diagonal |
"""

from typing import NamedTuple

import torch
from torch import Tensor

from config import PAGE
from ops.common import (
    E4M3,
    LOG2E,
    LOWEST,
    SMS,
    jit,
    launch,
    launch_dependents,
    load_scalar,
    log2_scores,
    power_of_2,
    store_rounded,
    tl,
    triton_dtype,
    wait_for_previous,
)
from ops.rope import AttentionLayer, Positions


class PrefillConfig(NamedTuple):
    """How the attention of prompts runs: block_m queries a program, block_n keys at a time, num_stages such blocks in
    flight. Of the cache it is at most a page at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_config(head_dim: int, dtype: torch.dtype, programs: int = SMS) -> PrefillConfig:
    """Picks how heads of head_dim attend, where blocks of 128 queries would make `programs` programs.

    The queries, num_stages blocks of keys and as many of values have to fit in 227 kB of shared memory.
    """
    if dtype == torch.float32:  # without tensor cores: all operands are in registers
        if head_dim <= 64:
            return PrefillConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)
        return PrefillConfig(block_m=16, block_n=16, num_warps=8, num_stages=1)
    if head_dim > 256:
        return PrefillConfig(block_m=64, block_n=32, num_warps=8, num_stages=2)
    wide = head_dim > 128
    if programs < SMS:  # smaller blocks keep more of the GPU busy
        return PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=2 if wide else 3)
    return PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=2 if wide else 3)


@jit
def _block_of(lengths_ptr, N, T, BLOCK_SEQS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Returns the sequence of a program and its first token there, negative if there is nothing left for it to do.

    Late blocks of queries see more keys, so the last one goes first.
    """
    n = tl.arange(0, BLOCK_SEQS)
    if lengths_ptr is None:
        lengths = tl.where(n < N, T, 0)
    else:
        lengths = tl.load(lengths_ptr + n, mask=n < N, other=0).to(tl.int32)
    blocks = tl.cdiv(lengths, BLOCK_M)
    before = tl.sum(blocks, axis=0) - 1 - tl.program_id(1)  # blocks of the batch that are before this one
    passed = tl.cumsum(blocks, axis=0) <= before
    start = (before - tl.sum(tl.where(passed, blocks, 0), axis=0)) * BLOCK_M
    return tl.sum(passed.to(tl.int32), axis=0), start


@jit
def _load_block(ptrs, used, in_head, dtype: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr):
    """Loads keys or values [BLOCK_N, BLOCK_D] in `dtype`: 0 where not `used`, if MASKED, and where not `in_head`."""
    if MASKED:
        mask = used[:, None] & in_head[None, :] if PADDED else used[:, None]
        x = tl.load(ptrs, mask=mask, other=0.0)
    elif PADDED:
        x = tl.load(ptrs, mask=in_head[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    return x.to(dtype)


@jit
def _log2_weights(products, m, scale, softcap):
    """Computes `log2_scores` less m, in as few instructions as can be: one for each, without softcap."""
    if softcap is None:
        weights = products * (scale * LOG2E) - m
    else:  # tanh(x) = 1 - 2 / (1 + exp(2x)), where a root's reciprocal, squared, is faster than a division
        root = tl.rsqrt(1.0 + tl.exp2(products * (scale / softcap * (2.0 * LOG2E))))
        cap = softcap * LOG2E
        weights = (cap - m) - root * root * (2.0 * cap)
    return weights


@jit
def _attend_blocks(
    m,
    l,
    acc,
    query,
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    start,
    end,
    count,
    stride,
    slots,
    window,
    scale,
    softcap,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds keys [start, end) of a sequence to the running softmax: its maximum m, sum l and unscaled result acc.

    `start` is a multiple of BLOCK_N, and so is `end` unless MASKED; without a mask all queries see all of these keys.
    `query` [BLOCK_M] counts tokens from where keys are counted from, and there are `count` keys. With a table `stride`
    is that of pages, else that of tokens.
    """
    dtype: tl.constexpr = q.dtype
    BLOCK_D: tl.constexpr = q.shape[1]
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    step = stride if table_ptr is None else D
    offsets = n[:, None] * step + d[None, :]
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        if table_ptr is None:
            base = stride.to(tl.int64) * s
        else:
            base = tl.load(table_ptr + s % slots // PAGE).to(tl.int64) * stride + s % PAGE * D
        used = s + n < count
        k = _load_block(k_ptr + base + offsets, used, d < D, dtype, MASKED, D < BLOCK_D)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            behind = query[:, None] - (s + n)[None, :]
            if table_ptr is None:
                visible = behind >= 0
            else:
                visible = used[None, :]
            if window is not None:
                visible = visible & (behind < window)
            products = tl.where(visible, products, float("-inf"))
        m_new = tl.maximum(m, log2_scores(tl.max(products, axis=1), scale, softcap))
        p = tl.exp2(_log2_weights(products, m_new[:, None], scale, softcap))
        if MASKED and softcap is not None:
            p = tl.where(visible, p, 0.0)  # -inf has become -softcap
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        v = _load_block(v_ptr + base + offsets, used, d < D, dtype, MASKED, D < BLOCK_D)
        acc = tl.dot(p.to(dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return m, l, acc


@jit
def _attend(
    m,
    l,
    acc,
    query,
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    first,
    full,
    end,
    count,
    stride,
    slots,
    window,
    scale,
    softcap,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds keys [0, end) of a sequence, as far as queries from `first` on see them, to the running softmax.

    All queries would see the keys before `full`, were it not for the window.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    full = full // BLOCK_N * BLOCK_N
    begin = 0
    rest = (count, stride, slots, window, scale, softcap)
    keys = (query, q, k_ptr, v_ptr, table_ptr)
    if window is not None:
        oldest = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        begin = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N  # from here on all see all
        begin = tl.minimum(begin, full)
        m, l, acc = _attend_blocks(m, l, acc, *keys, oldest, begin, *rest, D, PAGE, BLOCK_N, STAGES, MASKED=True)
    m, l, acc = _attend_blocks(m, l, acc, *keys, begin, full, *rest, D, PAGE, BLOCK_N, STAGES, MASKED=False)
    return _attend_blocks(m, l, acc, *keys, full, end, *rest, D, PAGE, BLOCK_N, STAGES, MASKED=True)


@jit(do_not_specialize=["N"])
def _prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cache_k_ptr,
    cache_v_ptr,
    table_ptr,
    first_ptr,
    lengths_ptr,
    position_ptr,
    scale_ptr,
    out_ptr,
    scale,
    v_scale,
    softcap,
    window,
    stride,
    kv_stride,
    slots,
    N,
    T,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    CONTEXT: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (head, block of queries): neighbours share keys, and the late blocks of all heads start first.

    BLOCK_C keys of the cache or BLOCK_N new ones go at a time. T is how far apart sequences are without `first`, and
    how long without lengths. Tokens are `stride` apart in q and, unless kv_stride says otherwise, in k and v.
    """
    launch_dependents(PDL)
    head = tl.program_id(0)
    kv_head = head // (HEADS // KV_HEADS)
    output_scale = load_scalar(scale_ptr)
    wait_for_previous(PDL)
    sequence, start = _block_of(lengths_ptr, N, T, BLOCK_SEQS, BLOCK_M)
    if start < 0:
        return
    first = sequence.to(tl.int64) * T
    length = T
    if first_ptr is not None:
        first = tl.load(first_ptr + sequence)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + sequence).to(tl.int32)
    token, d = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (token < length)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + (first + token)[:, None] * stride + head * D + d[None, :], mask=mask, other=0.0)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    rest = (slots, window, scale, softcap)
    if CONTEXT:
        position = tl.load(position_ptr + sequence).to(tl.int32)
        k_base, v_base = cache_k_ptr + kv_head * PAGE * D, cache_v_ptr + kv_head * PAGE * D
        held = (position + token, q, k_base, v_base, table_ptr + sequence.to(tl.int64) * (slots // PAGE))
        held_range = (position + start, position, position, position, KV_HEADS * PAGE * D)
        m, l, acc = _attend(m, l, acc, *held, *held_range, *rest, D, PAGE, BLOCK_C, STAGES)
    step = stride if kv_stride is None else kv_stride
    new = (token, q, k_ptr + first * step + kv_head * D, v_ptr + first * step + kv_head * D, None)
    new_range = (start, start, tl.minimum(start + BLOCK_M, length), length, step)
    m, l, acc = _attend(m, l, acc, *new, *new_range, *rest, D, PAGE, BLOCK_N, STAGES)

    l = tl.where(l > 0, l, 1.0)  # padding may see nothing
    y = (acc * (v_scale / l)[:, None]).to(dtype).to(tl.float32)
    offsets = (first + token)[:, None] * (HEADS * D) + head * D + d[None, :]
    store_rounded(out_ptr + offsets, y, output_scale, mask, dtype)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: AttentionLayer,
    cache,
    positions: Positions,
    dtype: torch.dtype,
    output_scale: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Attends from new tokens to each other and to what the cache holds of their sequences, causally.

    q [M, HEADS, D], k and v [M, KV_HEADS, D] are what `ops.rope.prefill_rope` makes: views into one buffer, or those of
    k and v into another layer's. cache is the layer's `LayerCache` as it was before these tokens came, or None; it is
    read if there is a position, page by page, and a ring may hold more tokens than the window has. The result is [M,
    HEADS * D] in `dtype` or, with output_scale, in E4M3; that of padding is 0.
    """
    (tokens, n_heads, d), kv_heads, lengths = q.shape, k.shape[1], positions.lengths
    n = positions.batch if lengths is None else len(lengths)
    spacing = positions.tokens if positions.first is None or lengths is None else 0  # constant: nothing to compile for
    context = cache is not None and positions.position is not None
    k_scale, v_scale = (1.0, 1.0) if cache is None else (cache.k_scale, cache.v_scale)
    config = config or prefill_config(d, dtype, -(-tokens // 128) * n_heads)
    # What is left of padding has to be finite: attention that masks values by weights of 0 makes NaN of NaN.
    fill = torch.empty if positions.first is None and lengths is None else torch.zeros
    out = fill(tokens, n_heads * d, dtype=dtype if output_scale is None else E4M3, device=q.device)
    blocks = (tokens + n * (config.block_m - 1)) // config.block_m  # as many as n sequences of any lengths can have
    launch(
        _prefill_attention_kernel,
        (n_heads, blocks),
        *(q, k, v, *((cache.k, cache.v, cache.table) if context else (None, None, None))),
        *(positions.first, lengths, positions.position if context else None, output_scale, out),
        *(layer.scale * k_scale, v_scale, layer.softcap, layer.window),
        *(q.stride(0), None if k.stride(0) == q.stride(0) else k.stride(0)),
        *(cache.slots if context else PAGE, n, spacing),
        HEADS=n_heads,
        KV_HEADS=kv_heads,
        D=d,
        PAGE=PAGE,
        CONTEXT=context,
        BLOCK_SEQS=max(256, power_of_2(n)),  # seldom another, which would be compiled for
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_C=min(config.block_n, PAGE),
        BLOCK_D=max(16, power_of_2(d)),
        STAGES=config.num_stages,
        dtype=triton_dtype(dtype),
        num_warps=config.num_warps,
    )
    return out
