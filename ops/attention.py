"""Attention: its definition in PyTorch for prompts and decode steps, and the choice of kernels for both."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.common import summed
from ops.decode_attention import decode_attention
from ops.norm import rescale, rescale_triton, rms_norm
from ops.prefill_attention import prefill_attention
from ops.rope import (
    AttentionLayer,
    Positions,
    keys_of_values,
    materialised,
    prefill_rope,
    rotate,
    rotation_of_heads,
)


def attend(
    qkv: Tensor,
    layer: AttentionLayer,
    cache,
    positions: Positions,
    dtype: torch.dtype,
    output_scale: Tensor | None = None,
) -> Tensor:
    """Makes wo's input [M, H * D] of wqkv's output: norms, rotation, cache write and attention.

    qkv is [M, (H + kv_products * K) * D] in `dtype`, or float32 partial sums of it. cache is the layer's `LayerCache`,
    or None for attention among the new tokens alone. With a cache, queries see keys and values as it stores them, in
    prefill as in decoding, and however a prompt is cut into pieces. A layer without products of K and V is given the
    cache that they are in, and finds those of prompts in `positions.kept`. The result is in `dtype` or, with
    output_scale, in E4M3. This definition takes sequences of T tokens, M = N * T, padding included.
    """
    batch, tokens, decoding = positions.batch, positions.tokens, positions.decoding
    q, k, v = split_heads(summed(qkv, dtype).view(batch, tokens, -1), layer, positions.rope)
    if layer.kv_products:
        keys, values = _seen(k, v, layer, cache, positions, dtype)
        if positions.kept is not None and not decoding:
            positions.kept["kv"] = keys, values
    else:
        held = _with_keys(cache.held(positions.position + tokens, dtype), layer, cache) if decoding else None
        keys, values = held if decoding else positions.kept["kv"]
    k_scale, v_scale = (1.0, 1.0) if cache is None else (cache.k_scale, cache.v_scale)
    scale = layer.scale * k_scale
    y = softmax_attention(q.transpose(1, 2), keys, values, scale, positions.mask, layer.window, layer.softcap)
    return rescale(y.transpose(1, 2).reshape(batch * tokens, -1), v_scale, output_scale)


def split_heads(qkv: Tensor, layer: AttentionLayer, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, T, H, D], keys and values [N, T, K, D] of wqkv's output [N, T, (H + kv_products * K) * D], normed and
    rotated by rope [2, N * T, D]; of a layer without products, no keys and values."""
    heads = qkv.unflatten(-1, (-1, layer.head_dim))
    n_keys = layer.n_kv_heads if layer.kv_products else 0
    qk, v = heads.split_with_sizes([layer.n_heads + n_keys, heads.shape[2] - layer.n_heads - n_keys], dim=2)
    if layer.kv_products == 1:
        v = qk[:, :, layer.n_heads :]
    if layer.v_norm:
        v = rms_norm(v, None, layer.eps)
    if layer.q_norm is not None:
        q, k = qk.split_with_sizes([layer.n_heads, n_keys], dim=2)
        norms = ((q, layer.q_norm), (k, layer.k_norm))
        qk = torch.cat([rms_norm(x, weight, layer.eps, layer.norm_offset) for x, weight in norms], dim=2)
    cos, sin = rope.view(2, *qkv.shape[:2], 1, layer.head_dim).unbind()
    qk = rotate(qk, cos, sin)
    q, k = qk.split_with_sizes([layer.n_heads, n_keys], dim=2)
    return q, k, v


def _seen(k: Tensor, v: Tensor, layer: AttentionLayer, cache, positions: Positions, dtype: torch.dtype):
    """Writes new k and v [B, T, K, D] to the cache, if there is one, and returns the keys and values [B, K, S, D] that
    there are for queries: those held before, and the new ones as the cache stores them."""
    if cache is None:
        return k.transpose(1, 2), v.transpose(1, 2)
    stored = cache.encode(k, v)
    if positions.decoding:
        cache.write(*(x.flatten(0, 1) for x in stored), positions.slot)
        return _with_keys(cache.held(positions.position + positions.tokens, dtype), layer, cache)
    seen = [x.to(dtype).transpose(1, 2) for x in stored]
    if len(seen) == 1:
        cos, sin = positions.rope.view(2, len(v), 1, -1, layer.head_dim).unbind()
        seen = [keys_of_values(*seen, layer, cos, sin), *seen]
    if positions.position is not None:  # behind cached tokens; the ring may drop some that are seen here
        held = _with_keys(cache.held(positions.position, dtype), layer, cache)
        seen = [torch.cat(pair, dim=2) for pair in zip(held, seen)]
    cache.write(*(x.flatten(0, 1) for x in stored), positions.slot)
    return seen


def _with_keys(held: tuple[Tensor, ...], layer: AttentionLayer, cache) -> tuple[Tensor, Tensor]:
    """Keys and values [B, K, S, D] of a cache, which holds both or values alone."""
    if len(held) == 2:
        return held
    cos, sin = rotation_of_heads(cache.rotation[: cache.slots], layer.head_dim)  # slots of such layers are positions
    return keys_of_values(*held, layer, cos, sin), *held


def attend_triton(
    qkv: Tensor,
    layer: AttentionLayer,
    cache,
    positions: Positions,
    dtype: torch.dtype,
    output_scale: Tensor | None = None,
    fused: Callable | None = None,
) -> Tensor:
    """Does what `attend` does, also for sequences of unlike lengths: with a kernel for decode steps, and for prompts
    with one for rotation and cache write and another for attention.

    Prompts of one length that see nothing but themselves are left to `fused`(q, k, v, scale, mask, window, softcap),
    PyTorch's attention unless it is given.
    """
    if positions.decoding and cache is not None:
        return decode_attention(qkv, layer, cache, positions, dtype, output_scale)
    context = cache
    if layer.kv_products and cache is not None and cache.ring and positions.position is not None:
        context = cache.copied()  # new tokens replace some that are seen here
    elif cache is not None and cache.k is None and positions.position is not None:
        context = materialised(cache, layer, positions.position, dtype)
    q, k, v = prefill_rope(qkv, layer, cache, positions, dtype)
    if layer.kv_products == 0:
        k, v, context = positions.kept["kv"]
    elif positions.kept is not None:
        positions.kept["kv"] = k, v, context
    alike = positions.position is None and (positions.first is None or positions.batch == 1)
    alike &= layer.head_dim <= 256  # of larger heads PyTorch keeps all scores in memory
    if alike and layer.softcap is None and (layer.window is None or positions.tokens <= layer.window):
        k_scale, v_scale = (1.0, 1.0) if cache is None else (cache.k_scale, cache.v_scale)
        q, k, v = (x.unflatten(0, (positions.batch, -1)).transpose(1, 2) for x in (q, k, v))
        y = (fused or softmax_attention)(q, k, v, layer.scale * k_scale, None, layer.window, None)
        return rescale_triton(y.transpose(1, 2).reshape(qkv.shape[-2], -1), v_scale, output_scale)
    return prefill_attention(q, k, v, layer, context, positions, dtype, output_scale)


def attention_mask(
    cache, window: int | None, query: Tensor, position: Tensor, dtype: torch.dtype, decoding: bool = False
) -> Tensor:
    """Which keys queries at positions query [N, T] see behind `position` [N] cached tokens.

    The mask [N, 1, T, keys] in `dtype` is 0 where a query sees a key, else -inf. Queries of a decode step, and one a
    row, see the cache, with all T tokens in it. Those of prompts see what the cache held before them, [0, S), and then
    each other, [S, S + T).
    """
    if decoding or query.shape[1] == 1:
        key = cache.held_positions(position + query.shape[1])[:, None, :]
    else:
        key = torch.cat((cache.held_positions(position), query), dim=1)[:, None, :]  # [N, 1, S + T]
    mask = (key >= 0) & (key <= query[:, :, None])
    if window is not None:
        mask &= key > query[:, :, None] - window
    return additive_mask(mask[:, None], dtype)


def no_mask(*_) -> None:
    """Kernels need none."""
    return


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where mask is true, else -inf."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def softmax_attention(
    q, k, v, scale: float, mask=None, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Attention of q [B, H, T, D] over k and v [B, K, S, D]; returns [B, H, T, D].

    With mask [B, 1, T, S], 0 where a query sees a key and -inf elsewhere. Without, S equals T and the mask is causal,
    limited to the last `window` keys. `softcap` c turns scores s into c * tanh(s / c).
    """
    batch, heads, tokens, head_dim = q.shape
    group = heads // k.shape[1]
    if tokens == 1:  # the queries that share a key head become rows of one query matrix: keys are read once
        q = q.reshape(batch, -1, group, head_dim)
        y = _attend_masked(q, k, v, scale, mask, softcap)
        return y.reshape(batch, heads, 1, head_dim)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if mask is None and window is not None and tokens > window:
        return _attend_in_blocks(q, k, v, scale, window, softcap)
    return _attend_masked(q, k, v, scale, mask, softcap)


def _attend_masked(q, k, v, scale, mask, softcap):
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    # Fused attention has no softcap. The scores are in memory here, so some queries go at a time.
    tokens, keys = q.shape[2], k.shape[2]
    if mask is None:
        mask = additive_mask(torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(), q.dtype)
    mask = mask.expand(*mask.shape[:-2], tokens, keys)
    k_float, v_float, outputs = k.float().mT, v.float(), []
    starts, step = ([0], tokens) if torch.compiler.is_compiling() else (range(0, tokens, 256), 256)
    for i in starts:
        scores = (
            softcap * torch.tanh(q[:, :, i : i + step].float() @ k_float * scale / softcap) + mask[..., i : i + step, :]
        )
        outputs.append((scores.softmax(dim=-1) @ v_float).to(q.dtype))
    return torch.cat(outputs, dim=2)


def _attend_in_blocks(q, k, v, scale, window, softcap):
    """Causal attention to the last `window` keys in O(T * window) time and memory, for T > window; heads are equal.

    Tokens are cut into blocks of `window`: a query sees keys of its own block and the one before only.

        block of queries   |      m      |         allowed where  i < j <= i + window
        its keys       | m - 1 |    m    |         (i counts queries, j the keys of both blocks)
    """
    batch, heads, tokens, head_dim = q.shape
    blocks = -(-tokens // window)
    pad = blocks * window - tokens
    q = F.pad(q, (0, 0, 0, pad)).view(batch, heads, blocks, window, head_dim).transpose(1, 2).flatten(0, 1)
    k, v = (
        F.pad(x, (0, 0, window, pad)).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v)
    )  # [B * blocks, H, 2 * window, D]
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device)
    block = torch.arange(blocks, device=q.device)[:, None, None]
    mask = (i < j) & (j <= i + window) & ((block > 0) | (j >= window))  # [blocks, window, 2 * window]
    y = _attend_masked(q, k, v, scale, additive_mask(mask, q.dtype)[:, None].repeat(batch, 1, 1, 1), softcap)
    y = y.view(batch, blocks, heads, window, head_dim).transpose(1, 2).flatten(2, 3)
    return y[:, :, :tokens]
