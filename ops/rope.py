"""Rotary embedding, and what queries, keys and values go through before attention: norms, rotation, rounding."""

from copy import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import PAGE
from ops.common import (
    jit,
    launch,
    launch_dependents,
    load_sum,
    normed,
    power_of_2,
    split_k_of,
    tl,
    triton_dtype,
    wait_for_previous,
)


class AttentionLayer(NamedTuple):
    """What distinguishes the attention of one layer.

    `scale` multiplies the scores, `softcap` c turns scores s into c * tanh(s / c), `window` counts the keys that a
    query sees, its own included (None: all), q_norm and k_norm [D] are weights of RMSNorm with `eps` (None: no norm),
    which multiplies by norm_offset + weight. With v_norm values get one without weight.

    Behind the queries there are `kv_products` products in what wqkv makes: 2, keys and then values; 1, of which both
    are made, values before the norm and rotation of keys; 0, none: keys and values are an earlier layer's, whose cache
    this layer is given, and it writes nothing there.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6
    v_norm: bool = False
    kv_products: int = 2
    norm_offset: float = 1.0


class Shared(NamedTuple):
    """Prefixes that rows share, for attention over them once for all of their rows.

    prefix [B] in int32 says how many of a row's first tokens are a shared prefix, a multiple of PAGE (0: none). `order`
    [B] in int32 has row numbers, those of a group side by side. A tile is rows of one group, at most `rows`: tiles [X,
    2] in int32 are the first place in `order` of each and how many rows it has, none where it is not used. In a step of
    T tokens a row `order` [B * T], `tiles` and `rows` are of these, token t of row b being number b * T + t.
    """

    prefix: Tensor
    order: Tensor
    tiles: Tensor
    rows: int


class Positions(NamedTuple):
    """Where the tokens of one forward are: what all local layers, or all global ones, share in it.

    There are N = `batch` sequences of at most T = `tokens` new tokens, M in all. Those of sequence n begin at token
    first[n] of all (first [N]; None: at n * T), and lengths[n] of them count, the rest being padding (lengths [N];
    None: all T). position [N] counts the tokens that each sequence has in the cache already (None: none anywhere). rope
    [2, M, D] holds cosines and sines. mask [N, 1, T, keys] is 0 where a query sees a key, else -inf; None means causal
    over the new tokens. slot [M] says where tokens go in the cache, as `cache.LayerCache.slots_for` counts it. What a
    kernel finds out by itself is None. Decode steps may have `shared` prefixes. In other forwards layers leave their
    keys and values in `kept` for those that have none (None: there are no such layers).

    `decoding` says that this is a decode step: all T tokens of each sequence, at positions position[n] + t, attend
    through the cache, where their own keys and values are by then. What a slot holds of positions behind these, of
    tokens that were rejected, is not seen; a ring has at least window + T - 1 slots.
    """

    batch: int
    tokens: int
    position: Tensor | None
    lengths: Tensor | None
    rope: Tensor
    mask: Tensor | None = None
    slot: Tensor | None = None
    first: Tensor | None = None
    shared: Shared | None = None
    kept: dict | None = None
    decoding: bool = False


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., D], pairing d with d + D / 2; in float32, rounded once (RoFormer, arXiv:2104.09864, eq. 34).

    cos and sin are those of every d, the first half of sin with a minus.
    """
    y = x.float()
    return torch.addcmul(y * cos, y.roll(y.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def rope_frequency(head_dim: int, theta: float, scale: float, share: float = 1.0) -> Tensor:
    """Radians a token [D] of each pair of a head, of which a share is rotated: the first half negative, whose sines then
    carry the sign that `rotate` wants; cosines don't mind."""
    # Explicitly on the CPU, so that building the model on the meta device leaves it real.
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequency = 1.0 / (theta**exponent) / scale  # [D / 2]
    frequency[int(share * head_dim // 2) :] = 0
    return torch.cat((-frequency, frequency))


def keys_of_values(v: Tensor, layer: AttentionLayer, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys of a layer whose cache keeps values v [..., D] alone: v times what the norm of keys multiplies by, rotated by
    cos and sin, as `rotate` wants them; in float32, rounded once."""
    weight = 1.0 if layer.k_norm is None else layer.norm_offset + layer.k_norm.float()
    return rotate(v.float() * weight, cos, sin).to(v.dtype)


def rotation_of_heads(rotation: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, D], as `rotate` wants them, of a cache's `rotation` [S, 2, R]."""
    still = head_dim // 2 - rotation.shape[2]
    cos, sin = F.pad(rotation[:, 0], (0, still), value=1.0), F.pad(rotation[:, 1], (0, still))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def keys_and_rotation(cache) -> tuple[Tensor | None, Tensor | None]:
    """What decode kernels load keys from, and the rotation of those that they make of values, where there is one.

    Values in FP8 are loaded once as keys and once as values: a load that two products take in different layouts is not
    pipelined, and the second finds in L2 what the first has brought.
    """
    if cache.k is not None:
        return cache.k, None
    return cache.v if cache.v.dtype.itemsize == 1 else None, cache.rotation


def rope(position: Tensor, *frequencies: Tensor) -> list[Tensor]:
    """Cosines and sines of angles: [2, M, D] in float32 for each of one or two frequencies, whose D may differ.

    The angles are position [M] (int64) * frequency [D], in radians. The first half of a frequency is negative, so that
    its sines carry the sign that `rotate` wants.
    """
    angles = [position.float()[:, None] * frequency for frequency in frequencies]
    return [torch.stack((angle.cos(), angle.sin())) for angle in angles]


@jit
def _rope_row(position_ptr, frequency_ptr, out_ptr, rows, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Computes the cosines and sines of row program_id(0)."""
    row, d = tl.program_id(0), tl.arange(0, BLOCK)
    frequency = tl.load(frequency_ptr + d, mask=d < D, other=0.0)
    wait_for_previous(PDL)
    angle = tl.load(position_ptr + row).to(tl.float32) * frequency
    tl.store(out_ptr + row * D + d, tl.cos(angle), mask=d < D)
    tl.store(out_ptr + (rows + row) * D + d, tl.sin(angle), mask=d < D)


@jit
def _rope_kernel(
    position_ptr,
    frequency_ptr,
    local_ptr,
    out_ptr,
    local_out_ptr,
    rows,
    D: tl.constexpr,
    LOCAL_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (row, 0) have the first frequencies, programs (row, 1) the second ones."""
    launch_dependents(PDL)
    if tl.program_id(1) == 0:
        _rope_row(position_ptr, frequency_ptr, out_ptr, rows, D, BLOCK, PDL)
    else:
        _rope_row(position_ptr, local_ptr, local_out_ptr, rows, LOCAL_D, BLOCK, PDL)


def rope_triton(position: Tensor, *frequencies: Tensor) -> list[Tensor]:
    """Does what `rope` does, with one kernel."""
    m, sizes = len(position), [len(frequency) for frequency in frequencies]
    out = [torch.empty(2, m, d, device=position.device) for d in sizes]
    launch(
        _rope_kernel,
        (m, len(frequencies)),
        *(position, frequencies[0], frequencies[-1], out[0], out[-1], m),
        D=sizes[0],
        LOCAL_D=sizes[-1],
        BLOCK=power_of_2(max(sizes)),
        num_warps=4,
        early=False,
    )
    return out


@jit
def _normed_rotated(
    qkv_ptr,
    row,
    rows,
    first,
    d,
    mask,
    cos,
    sin,
    norm_ptr,
    eps,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    AXIS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OFFSET: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loads elements d of the heads that begin at column `first` of a row of qkv, norms them, if they have a norm, and
    rotates them. The elements of a head lie along AXIS of d."""
    partner = (d + D // 2) % D
    x = load_sum(qkv_ptr, row, rows, first + d, mask, WIDTH, SPLIT_K, dtype)
    y = load_sum(qkv_ptr, row, rows, first + partner, mask, WIDTH, SPLIT_K, dtype)
    if norm_ptr is not None:
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=AXIS, keep_dims=True) / D + eps)
        x = normed(x, inverse_rms, tl.load(norm_ptr + d, mask=d < D, other=0.0), dtype, OFFSET)
        y = normed(y, inverse_rms, tl.load(norm_ptr + partner, mask=d < D, other=0.0), dtype, OFFSET)
    return (x * cos + y * sin).to(dtype).to(tl.float32)


@jit
def _values(
    qkv_ptr,
    row,
    rows,
    columns,
    mask,
    eps,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    AXIS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    V_NORM: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loads values from `columns` of a row of qkv, and norms them with V_NORM."""
    v = load_sum(qkv_ptr, row, rows, columns, mask, WIDTH, SPLIT_K, dtype)
    if V_NORM:
        v = normed(v, tl.rsqrt(tl.sum(v * v, axis=AXIS, keep_dims=True) / D + eps), None, dtype)
    return v


@jit
def _stored(x, cache_ptr, inverse_scale, LIMIT: tl.constexpr):
    """Rounds x as the cache stores it."""
    if LIMIT > 0:
        x = tl.clamp(x * inverse_scale, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache_ptr.dtype.element_ty)


@jit
def _write(x, cache_ptr, offsets, inverse_scale, mask, LIMIT: tl.constexpr):
    """Rounds x as the cache stores it, writes it where mask allows it, and returns what was rounded."""
    x = _stored(x, cache_ptr, inverse_scale, LIMIT)
    tl.store(cache_ptr + offsets, x, mask=mask)
    return x.to(tl.float32)


@jit
def _norm_factor(norm_ptr, d, D: tl.constexpr, OFFSET: tl.constexpr):
    """Loads what a norm multiplies elements d of a head by."""
    factor = tl.where(d < D, 1.0, 0.0)
    if norm_ptr is not None:
        factor = OFFSET + tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    return factor


@jit
def _written_kv_of_values(
    qkv_ptr,
    row,
    rows,
    first,
    d,
    mask,
    cos,
    sin,
    k_norm_ptr,
    eps,
    v_ptr,
    offsets,
    written,
    inverse_v_scale,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    AXIS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    dtype: tl.constexpr,
):
    """Norms the heads that begin at column `first` of a row of qkv, writes them as values where `written` allows it,
    and returns the keys that `keys_of_values` makes of them, and what was written."""
    partner = (d + D // 2) % D
    x = load_sum(qkv_ptr, row, rows, first + d, mask, WIDTH, SPLIT_K, dtype)
    y = load_sum(qkv_ptr, row, rows, first + partner, mask, WIDTH, SPLIT_K, dtype)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=AXIS, keep_dims=True) / D + eps)
    x = _write(normed(x, inverse_rms, None, dtype), v_ptr, offsets, inverse_v_scale, written, LIMIT)
    y = _stored(normed(y, inverse_rms, None, dtype), v_ptr, inverse_v_scale, LIMIT).to(tl.float32)
    k = x * _norm_factor(k_norm_ptr, d, D, OFFSET) * cos + y * _norm_factor(k_norm_ptr, partner, D, OFFSET) * sin
    return k.to(dtype).to(tl.float32), x


@jit
def _rotated_keys(
    v_ptr, rotation_ptr, at, position, mask, r, low_factor, high_factor, R: tl.constexpr, D: tl.constexpr, dtype
):
    """Makes those parts of keys that turn, pairs r of R, of the values that begin at v_ptr + `at` [BLOCK, 1]: the
    lower elements of pairs, and the higher ones."""
    low = tl.load(v_ptr + at + r[None, :], mask=mask, other=0.0).to(tl.float32) * low_factor[None, :]
    high = tl.load(v_ptr + at + D // 2 + r[None, :], mask=mask, other=0.0).to(tl.float32) * high_factor[None, :]
    angles = rotation_ptr + position[:, None] * (2 * R) + r[None, :]
    cos, sin = tl.load(angles, mask=mask, other=0.0), tl.load(angles + R, mask=mask, other=0.0)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@jit
def _materialise_kernel(
    v_ptr,
    table_ptr,
    rotation_ptr,
    k_norm_ptr,
    position_ptr,
    k_out_ptr,
    v_out_ptr,
    S,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row and block of slots, key head)."""
    launch_dependents(PDL)
    row, s = tl.program_id(0) // (S // BLOCK_S), tl.program_id(0) % (S // BLOCK_S) * BLOCK_S
    lane, d = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_D)[None, :]
    partner, pair = (d + D // 2) % D, d % (D // 2)
    wait_for_previous(PDL)
    entry = row * (S // PAGE) + s // PAGE
    page = tl.load(table_ptr + entry).to(tl.int64)
    used = s + lane < tl.load(position_ptr + row)
    mask = used & (d < D)
    inside = s % PAGE + lane
    at = ((page * KV_HEADS + tl.program_id(1)) * PAGE + inside) * D
    v = tl.load(v_ptr + at + d, mask=mask, other=0.0)
    x = v.to(tl.float32) * _norm_factor(k_norm_ptr, d, D, OFFSET)
    y = tl.load(v_ptr + at + partner, mask=mask, other=0.0).to(tl.float32)
    y *= _norm_factor(k_norm_ptr, partner, D, OFFSET)
    angles, turns = rotation_ptr + (s + lane) * (2 * R) + pair, mask & (pair < R)
    cos, sin = tl.load(angles, mask=turns, other=1.0), tl.load(angles + R, mask=turns, other=0.0)
    k = x * cos + y * tl.where(d < D // 2, -sin, sin)
    to = ((entry.to(tl.int64) * KV_HEADS + tl.program_id(1)) * PAGE + inside) * D + d
    tl.store(k_out_ptr + to, k.to(k_out_ptr.dtype.element_ty), mask=mask)
    tl.store(v_out_ptr + to, v, mask=mask)


def materialised(cache, layer: AttentionLayer, position: Tensor, dtype: torch.dtype):
    """The pages of the rows of a cache that keeps values alone, and the keys of these in `dtype`, both in memory of
    their own, with nothing in it from `position` [B] of a row on."""
    view, (rows, pages), (_, kv_heads, _, d) = copy(cache), cache.table.shape, cache.v.shape
    shape, block = (rows * pages, kv_heads, PAGE, d), 16
    view.k = torch.empty(shape, dtype=dtype, device=cache.v.device)
    view.v = torch.empty(shape, dtype=cache.v.dtype, device=cache.v.device)
    view.table = torch.arange(rows * pages, dtype=torch.int32, device=cache.v.device).view(rows, pages)
    launch(
        _materialise_kernel,
        (rows * cache.slots // block, kv_heads),
        *(cache.v, cache.table, cache.rotation, layer.k_norm, position, view.k, view.v, cache.slots),
        KV_HEADS=kv_heads,
        D=d,
        R=cache.rotation.shape[2],
        BLOCK_S=block,
        BLOCK_D=power_of_2(d),
        PAGE=PAGE,
        OFFSET=layer.norm_offset,
        num_warps=8,
    )
    return view


@jit
def _prefill_rope_kernel(
    qkv_ptr,
    rope_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slot_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    inverse_k_scale,
    inverse_v_scale,
    eps,
    rows,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT_K: tl.constexpr,
    KV_PRODUCTS: tl.constexpr,
    V_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    VALUES_ALONE: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (token, 0) make the queries of a token, programs (token, 1) its keys and values."""
    launch_dependents(PDL)
    WIDTH: tl.constexpr = (HEADS + KV_PRODUCTS * KV_HEADS) * D
    OUT: tl.constexpr = (HEADS + 2 * KV_HEADS) * D if KV_PRODUCTS > 0 else HEADS * D
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    wait_for_previous(PDL)
    cos = tl.load(rope_ptr + token * D + d, mask=d < D, other=0.0)
    sin = tl.load(rope_ptr + (rows + token) * D + d, mask=d < D, other=0.0)
    if tl.program_id(1) == 0:
        query = tl.arange(0, BLOCK_HEADS)[:, None]
        is_query = (query < HEADS) & (d < D)
        q = _normed_rotated(
            qkv_ptr, token, rows, query * D, d, is_query, cos, sin, q_norm_ptr, eps, WIDTH, D, 1, SPLIT_K, OFFSET, dtype
        )
        tl.store(out_ptr + token * OUT + query * D + d, q.to(dtype), mask=is_query)
    else:
        head = tl.arange(0, BLOCK_KV_HEADS)[:, None]
        mask = (head < KV_HEADS) & (d < D)
        first = (HEADS + head) * D
        if VALUES_ALONE:
            slot = tl.load(slot_ptr + token)
            offsets = ((slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE) * D + d
            heads = (qkv_ptr, token, rows, first, d, mask, cos, sin, k_norm_ptr, eps)
            to = (v_ptr, offsets, mask, inverse_v_scale)
            k, v = _written_kv_of_values(*heads, *to, WIDTH, D, 1, SPLIT_K, OFFSET, LIMIT, dtype)
        else:
            k = _normed_rotated(
                qkv_ptr, token, rows, first, d, mask, cos, sin, k_norm_ptr, eps, WIDTH, D, 1, SPLIT_K, OFFSET, dtype
            )
            columns = first + (KV_PRODUCTS - 1) * KV_HEADS * D + d
            v = _values(qkv_ptr, token, rows, columns, mask, eps, WIDTH, D, 1, SPLIT_K, V_NORM, dtype)
            if k_ptr is not None:
                slot = tl.load(slot_ptr + token)
                offsets = ((slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE) * D + d
                k = _write(k, k_ptr, offsets, inverse_k_scale, mask, LIMIT)
                v = _write(v, v_ptr, offsets, inverse_v_scale, mask, LIMIT)
        tl.store(out_ptr + token * OUT + first + d, k.to(dtype), mask=mask)
        tl.store(out_ptr + token * OUT + first + KV_HEADS * D + d, v.to(dtype), mask=mask)


def prefill_rope(
    qkv: Tensor, layer: AttentionLayer, cache, positions: Positions, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms and rotates queries and keys of prompts, rounds keys and values as the cache stores them, and writes them
    to `positions.slot`. For a cache of values alone, keys are made of the rounded ones.

    qkv is [M, (HEADS + kv_products * KV_HEADS) * D] in `dtype` or partial sums of it. Returns q [M, HEADS, D], and k
    and v [M, KV_HEADS, D] as the cache stores them, divided by their scales; without products of them they have no
    heads. Without a cache (None) nothing is rounded to one, nor written.
    """
    m, d, kv_heads = qkv.shape[-2], layer.head_dim, layer.n_kv_heads
    heads = [layer.n_heads, kv_heads, kv_heads] if layer.kv_products else [layer.n_heads, 0, 0]
    out = torch.empty(m, sum(heads), d, dtype=dtype, device=qkv.device)
    pools, scales, limit = (None, None), (1.0, 1.0), 0.0
    if cache is not None:
        pools, scales, limit = (cache.k, cache.v), (1 / cache.k_scale, 1 / cache.v_scale), cache.codec.limit
    launch(
        _prefill_rope_kernel,
        (m, 2 if layer.kv_products else 1),
        *(qkv, positions.rope, layer.q_norm, layer.k_norm, positions.slot, *pools, out),
        *(*scales, layer.eps, m),
        HEADS=layer.n_heads,
        KV_HEADS=kv_heads,
        D=d,
        PAGE=PAGE,
        BLOCK_HEADS=power_of_2(layer.n_heads),
        BLOCK_KV_HEADS=power_of_2(kv_heads),
        BLOCK_D=power_of_2(d),
        SPLIT_K=split_k_of(qkv),
        KV_PRODUCTS=layer.kv_products,
        V_NORM=layer.v_norm,
        OFFSET=layer.norm_offset,
        LIMIT=limit,
        VALUES_ALONE=cache is not None and cache.k is None,
        dtype=triton_dtype(dtype),
        num_warps=4 if layer.n_heads * d <= 8192 else 8,
    )
    return out.split_with_sizes(heads, dim=1)
