"""Attention: its definition in PyTorch for prompts and decode steps, and the choice of kernels for both."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.common import summed
from ops.decode_attention import decode_attention
from ops.norm import rescale, rescale_triton, rms_norm
from ops.rope import AttentionLayer, Positions, prefill_rope, rotate


def attend(
    qkv: Tensor,
    layer: AttentionLayer,
    cache,
    positions: Positions,
    dtype: torch.dtype,
    output_scale: Tensor | None = None,
) -> Tensor:
    """Makes wo's input [B * T, H * D] of wqkv's output: norms, rotation, cache write and attention.

    qkv is [B * T, (H + 2 * K) * D] in `dtype`, or float32 partial sums of it. cache is the layer's `LayerCache`, or
    None for attention among the new tokens alone. With a cache, queries see keys and values as it stores them, in
    prefill as in decoding, and however a prompt is cut into pieces. The result is in `dtype` or, with output_scale, in
    E4M3.
    """
    batch, tokens, position, head_dim = positions.batch, positions.tokens, positions.position, layer.head_dim
    heads = summed(qkv, dtype).view(batch, tokens, -1, head_dim)
    qk, v = heads.split_with_sizes([layer.n_heads + layer.n_kv_heads, layer.n_kv_heads], dim=2)
    if layer.q_norm is not None:
        q, k = qk.split_with_sizes([layer.n_heads, layer.n_kv_heads], dim=2)
        qk = torch.cat((rms_norm(q, layer.q_norm, layer.eps), rms_norm(k, layer.k_norm, layer.eps)), dim=2)
    cos, sin = positions.rope.view(2, -1, tokens, 1, head_dim).unbind()
    qk, v = rotate(qk, cos, sin).transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, D]
    q, keys = qk.split_with_sizes([layer.n_heads, layer.n_kv_heads], dim=1)

    values, scale, v_scale = v, layer.scale, 1.0
    if cache is not None:
        scale, v_scale = scale * cache.k_scale, cache.v_scale
        k_stored, v_stored = cache.encode(keys, v)
        keys, values = k_stored.to(dtype), v_stored.to(dtype)
        if position is not None and tokens > 1:  # behind cached tokens; the ring may drop some that are seen here
            keys = torch.cat((cache.k.to(dtype), keys), dim=2)
            values = torch.cat((cache.v.to(dtype), values), dim=2)
        cache.write(k_stored, v_stored, position, positions.lengths, positions.slot)
        if position is not None and tokens == 1:
            keys, values = cache.k.to(dtype), cache.v.to(dtype)
    y = softmax_attention(q, keys, values, scale, positions.mask, layer.window, layer.softcap)
    return rescale(y.transpose(1, 2).reshape(batch * tokens, -1), v_scale, output_scale)


def attend_triton(
    qkv: Tensor,
    layer: AttentionLayer,
    cache,
    positions: Positions,
    dtype: torch.dtype,
    output_scale: Tensor | None = None,
    fused: Callable | None = None,
) -> Tensor:
    """Does what `attend` does: with kernels for one new token a row, and for prompts with kernels around a fused
    attention.

    `fused`(q, k, v, scale, mask, window, softcap) is that attention: PyTorch's, unless it is given. Prompts without a
    cache, and more than one token behind cached ones, are `attend`'s.
    """
    behind = positions.position is not None
    if cache is None or (behind and positions.tokens > 1):
        return attend(qkv, layer, cache, positions, dtype, output_scale)
    if behind:
        return decode_attention(qkv, layer, cache, positions, dtype, output_scale)
    if positions.lengths is None:
        everything = torch.full((positions.batch,), positions.tokens, device=qkv.device)
        positions = positions._replace(lengths=everything)
    q, k, v = (x.transpose(1, 2) for x in prefill_rope(qkv, layer, cache, positions, dtype))
    y = (fused or softmax_attention)(q, k, v, layer.scale * cache.k_scale, None, layer.window, layer.softcap)
    return rescale_triton(
        y.transpose(1, 2).reshape(positions.batch * positions.tokens, -1), cache.v_scale, output_scale
    )


def attention_mask(
    cache, window: int | None, query: Tensor, position: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, tuple | None]:
    """Which keys queries at positions query [B, T] see behind `position` [B] cached tokens, and where one new token
    goes.

    The mask [B, 1, T, keys] in `dtype` is 0 where a query sees a key, else -inf. One query a row sees the cache, its
    own token included. More of them see what the cache held before them, [0, S), and then each other, [S, S + T). The
    second result is the index of one new token a row in the cache, None for more.
    """
    if query.shape[1] == 1:  # a ring holds nothing that is out of the window
        mask = (torch.arange(cache.slots, device=query.device) <= query)[:, None, None, :]
        return additive_mask(mask, dtype), cache.token_slot(position)
    key = torch.cat((cache.held_positions(position), query), dim=1)[:, None, :]  # [B, 1, S + T]
    mask = (key >= 0) & (key <= query[:, :, None])
    if window is not None:
        mask &= key > query[:, :, None] - window
    return additive_mask(mask[:, None], dtype), None


def attention_mask_triton(
    cache, window: int | None, query: Tensor, position: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, tuple | None]:
    """Does what `attention_mask` does; the decode step's kernel does without it: (None, None) for one query a row."""
    if query.shape[1] == 1:
        return None, None
    return attention_mask(cache, window, query, position, dtype)


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
