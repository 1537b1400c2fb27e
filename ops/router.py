"""The router of a mixture of experts: which of them a token goes to, and their weights (Gemma 4 26B-A4B)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.common import (
    E4M3,
    inverse_rms_of,
    jit,
    launch,
    launch_dependents,
    load_scalar,
    normed,
    power_of_2,
    round_fp8,
    store_rounded,
    tl,
    wait_for_previous,
)
from ops.matmul import matmul
from ops.norm import rms_norm


def route(
    x: Tensor,
    scale: Tensor,
    proj,
    expert_scale: Tensor,
    top_k: int,
    eps: float,
    weight: Tensor,
    input_scale: Tensor | None = None,
    offset: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Picks the top_k experts of each row of the residual stream x [M, N], and norms it for them.

    The row's RMS norm, times scale [N], times N**-0.5, each rounded, is multiplied by proj, a `formats.Weight` [E, N];
    the result, rounded, goes through a softmax in float32. Returns the indices [M, top_k] (int32) of the largest
    probabilities, the largest first and equal ones in the order of their experts, and their weights [M, top_k]
    (float32): the probabilities, divided by their sum, times expert_scale [E]. The third result [M, N] is RMSNorm(x) *
    (offset + weight [N]), in x's dtype or, with input_scale, in E4M3.
    """
    logits = matmul(rms_norm(x, None, eps) * scale * x.shape[1] ** -0.5, proj, x.dtype)
    chances, order = logits.softmax(-1, dtype=torch.float32).sort(dim=-1, descending=True, stable=True)
    chances, experts = chances[:, :top_k], order[:, :top_k]
    weights = chances / chances.sum(-1, keepdim=True) * expert_scale[experts]
    h = rms_norm(x, weight, eps, offset)
    return experts.int(), weights, h if input_scale is None else round_fp8(h, input_scale)


class RouterConfig(NamedTuple):
    """How the router's logits are made: a program owns block_e experts, and block_m rows.

    With a block_m of 1 it multiplies the whole row at once, else block_k columns at a time.
    """

    block_m: int
    block_e: int
    block_k: int
    num_warps: int
    num_stages: int


def router_config(m: int) -> RouterConfig:
    """Picks how the logits of m rows are made."""
    if m <= 16:
        return RouterConfig(block_m=1, block_e=4, block_k=0, num_warps=8, num_stages=1)
    if m <= 512:
        return RouterConfig(block_m=16, block_e=32, block_k=128, num_warps=4, num_stages=3)
    return RouterConfig(block_m=64, block_e=128, block_k=64, num_warps=4, num_stages=3)


@jit
def _router_row(x, inverse_rms, scale, factor, dtype: tl.constexpr):
    """Computes what the router multiplies of x, of a row or of rows, rounded three times."""
    y = (x * inverse_rms).to(dtype).to(tl.float32)
    y = (y * scale.to(tl.float32)).to(dtype).to(tl.float32)
    return (y * factor).to(dtype)


@jit
def _router_gemv_kernel(
    x_ptr,
    scale_ptr,
    proj_ptr,
    weight_ptr,
    input_scale_ptr,
    logits_ptr,
    h_ptr,
    eps,
    factor,
    EXPERTS: tl.constexpr,
    IN: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Makes the logits of a row for BLOCK_E experts, and the first of them its norm; program (block of experts, row)."""
    launch_dependents(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(1).to(tl.int64)
    e, k = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK)
    mask = k < IN
    proj = tl.load(proj_ptr + e[:, None] * IN + k[None, :], mask=(e < EXPERTS)[:, None] & mask[None, :], other=0.0)
    scale = tl.load(scale_ptr + k, mask=mask, other=0.0)
    normed_here = k < tl.where(tl.program_id(0) == 0, IN, 0)
    weight = tl.load(weight_ptr + k, mask=normed_here, other=0.0)
    input_scale = load_scalar(input_scale_ptr)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * IN + k, mask=mask, other=0.0).to(tl.float32)
    inverse_rms = inverse_rms_of(x, IN, eps)
    y = _router_row(x, inverse_rms, scale, factor, dtype)
    logits = tl.sum(proj.to(tl.float32) * y.to(tl.float32)[None, :], axis=1)
    tl.store(logits_ptr + row * EXPERTS + e, logits.to(dtype), mask=e < EXPERTS)
    h = normed(x, inverse_rms, weight, dtype, OFFSET)
    store_rounded(h_ptr + row * IN + k, h, input_scale, normed_here, dtype)


@jit
def _router_gemm_kernel(
    x_ptr,
    scale_ptr,
    proj_ptr,
    weight_ptr,
    input_scale_ptr,
    logits_ptr,
    h_ptr,
    eps,
    factor,
    rows,
    EXPERTS: tl.constexpr,
    IN: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Makes the logits of BLOCK_M rows for BLOCK_E experts, and the first of these their norms; program (block of rows,
    block of experts)."""
    launch_dependents(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e, columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * IN + columns[None, :]
    h_ptrs = h_ptr + m.to(tl.int64)[:, None] * IN + columns[None, :]
    proj_ptrs = proj_ptr + e[None, :] * IN + columns[:, None]
    input_scale = load_scalar(input_scale_ptr)
    wait_for_previous(PDL)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for k in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        x = tl.load(x_ptrs + k, mask=(m < rows)[:, None] & (k + columns < IN)[None, :], other=0.0).to(tl.float32)
        squares += x * x
    inverse_rms = tl.rsqrt(tl.sum(squares, axis=1) / IN + eps)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for k in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        mask = k + columns < IN
        x = tl.load(x_ptrs + k, mask=(m < rows)[:, None] & mask[None, :], other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + k + columns, mask=mask, other=0.0)
        y = _router_row(x, inverse_rms[:, None], scale[None, :], factor, dtype)
        proj = tl.load(proj_ptrs + k, mask=mask[:, None] & (e < EXPERTS)[None, :], other=0.0)
        acc = tl.dot(y, proj, acc, input_precision="ieee")
        mask = k + columns < tl.where(tl.program_id(1) == 0, IN, 0)
        weight = tl.load(weight_ptr + k + columns, mask=mask, other=0.0)
        h = normed(x, inverse_rms[:, None], weight[None, :], dtype, OFFSET)
        store_rounded(h_ptrs + k, h, input_scale, (m < rows)[:, None] & mask[None, :], dtype)
    offsets = m.to(tl.int64)[:, None] * EXPERTS + e[None, :]
    tl.store(logits_ptr + offsets, acc.to(dtype), mask=(m < rows)[:, None] & (e < EXPERTS)[None, :])


@jit
def _top_k_kernel(
    logits_ptr,
    expert_scale_ptr,
    experts_ptr,
    weights_ptr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Picks a row's experts by counting for each of them how many are before it."""
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    mask = e < EXPERTS
    expert_scale = tl.load(expert_scale_ptr + e, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    logits = tl.load(logits_ptr + row * EXPERTS + e, mask=mask, other=float("-inf")).to(tl.float32)
    chances = tl.exp(logits - tl.max(logits, axis=0))
    chances = chances / tl.sum(chances, axis=0)
    # Bits of numbers that are not negative are in the numbers' order, and NaN has a place in it, too: whatever the
    # numbers are, the first TOP_K places get an expert each.
    bits = tl.where(mask, chances.to(tl.int32, bitcast=True), -(2**31))
    is_before = (bits[:, None] > bits[None, :]) | ((bits[:, None] == bits[None, :]) & (e[:, None] < e[None, :]))
    place = tl.sum(is_before.to(tl.int32), axis=0)
    chosen = place < TOP_K
    weights = chances / tl.sum(tl.where(chosen, chances, 0.0), axis=0) * expert_scale
    tl.store(experts_ptr + row * TOP_K + place, e, mask=chosen)
    tl.store(weights_ptr + row * TOP_K + place, weights, mask=chosen)


def route_triton(
    x: Tensor,
    scale: Tensor,
    proj,
    expert_scale: Tensor,
    top_k: int,
    eps: float,
    weight: Tensor,
    input_scale: Tensor | None = None,
    offset: float = 1.0,
    config: RouterConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `route` does, with one kernel for the logits and the norm, and one for the rest."""
    (m, k), n = x.shape, proj.shape[0]
    config = config or router_config(m)
    logits = torch.empty(m, n, dtype=x.dtype, device=x.device)
    chosen = torch.empty(m, top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(m, top_k, dtype=torch.float32, device=x.device)
    h = torch.empty_like(x, dtype=x.dtype if input_scale is None else E4M3)
    arguments = (x, scale, proj.data, weight, input_scale, logits, h, eps, k**-0.5)
    constants = {"EXPERTS": n, "IN": k, "OFFSET": offset, "BLOCK_E": config.block_e, "num_warps": config.num_warps}
    if config.block_m == 1:
        launch(_router_gemv_kernel, (-(-n // config.block_e), m), *arguments, **constants, BLOCK=power_of_2(k))
    else:
        launch(
            _router_gemm_kernel,
            (-(-m // config.block_m), -(-n // config.block_e)),
            *(*arguments, m),
            **constants,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            STAGES=config.num_stages,
        )
    launch(
        _top_k_kernel,
        (m,),
        *(logits, expert_scale, chosen, weights),
        EXPERTS=n,
        TOP_K=top_k,
        BLOCK=power_of_2(n),
        num_warps=4,
    )
    return chosen, weights, h
