"""Triton kernels of the decode step, where every row brings one token, and of prefill; each beside the PyTorch that
defines it.

M is the number of rows, in prefill of tokens; the other letters are model.py's: H query heads, K key/value heads, D head_dim, S cache slots,
F intermediate size, V vocabulary. Every tensor is contiguous. Results are rounded where the modules of model.py round, so
that the two differ by the order of summation only. FP8 is E4M3 with real = fp8 * scale, as round_fp8 makes it.

A kernel may start while the one before still runs (programmatic dependent launch), and waits before it touches what others
write. All of them wait, so that whatever ran earlier has finished, too.
"""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
except ImportError:  # on a CPU nothing here runs; the definitions below still have to load
    triton, tl = None, SimpleNamespace(constexpr=float)

    def jit(function):
        return function


E4M3 = torch.float8_e4m3fn
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # a running maximum's start; -inf would make NaN of -inf - -inf
LIFT = tl.constexpr(2.0**100)  # see _int4_dot
USE_PDL = True  # programmatic dependent launch, where the GPU has it


def available(device: torch.device) -> bool:
    """Whether these kernels run on `device`: CUDA with Triton installed, or anything under Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or triton.knobs.runtime.interpret)


@functools.cache
def _has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(kernel, grid: tuple[int, ...], *args, **constants):
    pdl = USE_PDL and _has_pdl(args[0].device)
    options = {"launch_pdl": True} if pdl else {}
    kernel[grid](*args, PDL=pdl, **constants, **options)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


# ---------------------------------------------------------------------------------------------------------------------
# Configurations. Everything that was, or can be, tuned by measuring is in this section.

SMS = 132  # of an H100 or H200


class Gemv(NamedTuple):
    """A program owns block_n outputs and adds up block_k columns at a time, with num_stages - 1 such tiles in flight.

    The first `early` of them are loaded while the kernel before still runs.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    early: int = 0


class Skinny(NamedTuple):
    """A program owns block_n outputs of all rows, block_m at most, and one of `split` shares of the columns.

    The rest is as in `Gemv`.
    """

    block_m: int
    block_n: int
    block_k: int
    split: int
    num_warps: int
    num_stages: int


class AttentionConfig(NamedTuple):
    """block_s slots at a time; by_sums: float32 sums instead of tensor cores, where each key head has one query. The
    first `ahead` slots go to L2 while the kernel before still runs."""

    block_s: int
    num_warps: int
    num_stages: int
    by_sums: bool
    ahead: int = 0


def linear_config(m: int, n: int, k: int, dtype: torch.dtype) -> Gemv | Skinny | None:
    """How `linear_rows` multiplies m rows by a weight [n, k] of `dtype`; None for cuBLAS.

    What was fastest in whole steps of gemma-7b and gemma-2b on an H200.
    """
    if dtype == torch.int32:
        return _int4_config(m, n, k)
    if m == 1:
        in_8 = dtype.itemsize == 1
        if k > 8192 and n <= 2560 and not in_8:
            return Gemv(block_n=8, block_k=1024, num_warps=8, num_stages=3, early=2)
        if k > 8192:
            return Gemv(block_n=2 if n > 2560 else 4, block_k=2048, num_warps=4, num_stages=4, early=3 if in_8 else 1)
        if n < 4096:  # 2,560 outputs (gemma-2b's qkv) would be 640 programs, which divide badly among the SMs
            early = min(2, -(-k // 2048))
            return Gemv(block_n=2 if n == 2560 else 4, block_k=2048, num_warps=4, num_stages=4, early=early)
        if k <= 2048 and n < 200_000:
            return Gemv(block_n=4, block_k=2048 if in_8 else 1024, num_warps=4, num_stages=4, early=1)
        return Gemv(block_n=8, block_k=512, num_warps=4, num_stages=4, early=2 if n < 32768 or k <= 2048 else 0)
    if m > 64 or dtype == torch.float32 or k * dtype.itemsize % 16:  # rows of tiles begin at multiples of 16 bytes
        return None
    if m > 16 and dtype == E4M3 and n <= 16384:
        return None
    block_n = 64 if m <= 16 or dtype.itemsize == 1 else 128
    block_k = 128 // dtype.itemsize  # a cache line of each weight row
    split, wanted = 1, 1.5 * SMS if m <= 16 else 0.7 * SMS
    while -(-n // block_n) * split < wanted and split < 8 and k >= 2 * split * 4 * block_k:  # four tiles at least
        split *= 2
    return Skinny(max(16, _power_of_2(m)), block_n, block_k, split, num_warps=4, num_stages=6)


def _int4_config(m: int, n: int, k: int) -> Gemv | Skinny | None:
    """`linear_config` for packed 4-bit weights. In `Gemv`, a thread is meant to have 32 columns of 8 rows: what it does to
    x is then shared by 8 rows."""
    if m == 1:
        if n < 8192 or k > 8192:
            return Gemv(block_n=4 if n < 8192 else 8, block_k=4096, num_warps=4, num_stages=1)
        return Gemv(block_n=8, block_k=1024, num_warps=1, num_stages=1)
    if m > 64:
        return None
    block_n, block_k, split = 64, 256, 1
    while -(-n // block_n) * split < 1.5 * SMS and split < 8 and k >= 2 * split * 4 * block_k:
        split *= 2
    return Skinny(max(16, _power_of_2(m)), block_n, block_k, split, num_warps=4, num_stages=3)


def attention_config(pairs: int, group: int, slots: int, cache_dtype: torch.dtype) -> AttentionConfig:
    """For `group` query heads on each of `pairs` rows' key heads."""
    if group > 1:
        return AttentionConfig(block_s=32, num_warps=4, num_stages=2, by_sums=False, ahead=64)
    if pairs >= SMS:
        if cache_dtype.itemsize == 1:
            return AttentionConfig(block_s=8, num_warps=1, num_stages=6, by_sums=True)
        return AttentionConfig(block_s=16, num_warps=2, num_stages=3, by_sums=True)
    if slots > 2048:
        return AttentionConfig(block_s=32, num_warps=4, num_stages=3, by_sums=True)
    return AttentionConfig(block_s=32, num_warps=4, num_stages=2, by_sums=False, ahead=64)


def attention_splits(pairs: int, slots: int, block_s: int) -> int:
    """Programs that share one row and key head, of which there are `pairs`: enough of them to fill the GPU."""
    return min(_power_of_2(-(-SMS // pairs)), _power_of_2(-(-slots // (2 * block_s))), 64)


def _row_warps(n: int) -> int:
    return 1 if n <= 256 else 4 if n <= 2048 else 8


GEGLU_BLOCK, GEGLU_WARPS = 1024, 4
DEQUANTISE_BLOCK, DEQUANTISE_WARPS = 4096, 4
ARGMAX_BLOCK, ARGMAX_WARPS = 2048, 4

# ---------------------------------------------------------------------------------------------------------------------
# What several kernels do. In here everything is float32, and `.to(dtype).to(tl.float32)` rounds.


@jit
def _start(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def _wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def _fetch(ptr, stride, count, SIZE: tl.constexpr, PDL: tl.constexpr):
    """`count` pieces of SIZE bytes, `stride` bytes apart, on their way to L2; a thread for each. SIZE and stride are
    multiples of 16."""
    if PDL and SIZE > 0:
        tl.inline_asm_elementwise(
            """{
            .reg .pred wanted;
            .reg .b32 thread;
            .reg .b64 piece;
            mov.u32 thread, %tid.x;
            setp.lt.s32 wanted, thread, $3;
            mad.wide.s32 piece, thread, $2, $1;
            @wanted cp.async.bulk.prefetch.L2.global [piece], $4;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r,r",
            [ptr.to(tl.uint64), stride, count, SIZE],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def _output(y_ptr, row, rows, columns, mask, N, PARTS: tl.constexpr, dtype: tl.constexpr):
    """Columns of a row of a linear layer's output: [rows, N] in `dtype`, or the sum of PARTS such float32 matrices."""
    if PARTS == 0:
        y = tl.load(y_ptr + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    else:
        y = tl.load(y_ptr + row * N + columns, mask=mask, other=0.0)
        for part in tl.static_range(1, PARTS):
            y += tl.load(y_ptr + (part * rows + row) * N + columns, mask=mask, other=0.0)
        y = y.to(dtype).to(tl.float32)
    return y


@jit
def _inverse_rms(x, N, eps):
    return tl.rsqrt(tl.sum(x * x, axis=0) / N + eps)


@jit
def _normed(x, inverse_rms, weight_ptr, columns, mask, dtype: tl.constexpr):
    x = x * inverse_rms
    x = x + x * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return x.to(dtype).to(tl.float32)


@jit
def _quantised(x, scale_ptr):
    # div_rn: a plain division is not correctly rounded, and PyTorch's is
    x = x * tl.div_rn(1.0, tl.load(scale_ptr))
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@jit
def _store(ptrs, y, scale_ptr, mask, dtype: tl.constexpr):
    """In `dtype` or, with a scale, in E4M3."""
    if scale_ptr is not None:
        tl.store(ptrs, _quantised(y, scale_ptr), mask=mask)
    else:
        tl.store(ptrs, y.to(dtype), mask=mask)


@jit
def _tanh(x):
    """To 1e-7, which is as close to -1 as PyTorch's gets: its GELU of -10 is 0."""
    return 2.0 / (1.0 + tl.exp2(x * (-2.0 * LOG2E))) - 1.0  # of large negative x: 2 / inf - 1


@jit
def _geglu(gate, up, dtype: tl.constexpr):
    tanh = _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    gelu = 0.5 * gate * (1.0 + tanh)
    return (gelu.to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)


def round_fp8(x: Tensor, scale: float | Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x / scale, saturated and rounded to the nearest value of an FP8 `dtype`.

    Times the reciprocal in float32, as TransformerEngine does it: a division would break the many ties otherwise.
    """
    limit = torch.finfo(dtype).max
    return (x.float() * (1 / scale)).clamp(-limit, limit).to(dtype)


def _summed(y: Tensor, dtype: torch.dtype) -> Tensor:
    return y.sum(0).to(dtype) if y.dim() == 3 else y


def _parts(y: Tensor | None) -> int:
    return y.shape[0] if y is not None and y.dim() == 3 else 0


# ---------------------------------------------------------------------------------------------------------------------
# Embedding


def embed_reference(tokens, weight, factor, dtype, weight_scale=None):
    if weight_scale is None:
        return F.embedding(tokens, weight) * factor
    if weight.dtype == torch.int8:
        return (F.embedding(tokens, weight) * weight_scale[tokens].float()[..., None]).to(dtype) * factor
    rows = F.embedding(tokens, weight.view(torch.uint8)).view(E4M3)  # as bytes, which every device can look up
    return (rows.float() * weight_scale).to(dtype) * factor


@jit
def _embed_kernel(
    tokens_ptr,
    weight_ptr,
    scale_ptr,
    x_ptr,
    factor,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    _start(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    _wait(PDL)
    token = tl.load(tokens_ptr + row)
    x = tl.load(weight_ptr + token * N + columns, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        if weight_ptr.dtype.element_ty == tl.int8:
            scale_ptr += token
        x = (x * tl.load(scale_ptr).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(x_ptr + row * N + columns, (x * factor).to(dtype), mask=mask)


def embed(
    tokens: Tensor, weight: Tensor, factor: float, dtype: torch.dtype, weight_scale: Tensor | None = None
) -> Tensor:
    """Rows [M, N] of weight [V, N], times `factor`, for tokens [M] (int64), in `dtype`. weight_scale is an E4M3 weight's,
    or that of each row [V] of an int8 weight."""
    x = torch.empty(len(tokens), weight.shape[1], dtype=dtype, device=weight.device)
    _launch(
        _embed_kernel,
        (len(tokens),),
        *(tokens, weight, weight_scale, x, factor),
        N=weight.shape[1],
        BLOCK=_power_of_2(weight.shape[1]),
        num_warps=_row_warps(weight.shape[1]),
    )
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Residual, norm, quantisation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight) in float32, rounded once at the end."""
    y = x.float()
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    return torch.addcmul(y, y, weight).to(x.dtype)


def add_norm_reference(x, y, post_weight, weight, eps, input_scale=None):
    if y is not None:
        y = _summed(y, x.dtype)
        x = x + (y if post_weight is None else rms_norm(y, post_weight, eps))
    if weight is None:
        return x, None
    h = rms_norm(x, weight, eps)
    return x, h if input_scale is None else round_fp8(h, input_scale)


@jit
def _add_norm_kernel(
    x_ptr,
    y_ptr,
    post_ptr,
    weight_ptr,
    scale_ptr,
    x_new_ptr,
    h_ptr,
    eps,
    rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    _start(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    _wait(PDL)
    x = tl.load(x_ptr + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = _output(y_ptr, row, rows, columns, mask, N, PARTS, dtype)
        if post_ptr is not None:
            y = _normed(y, _inverse_rms(y, N, eps), post_ptr, columns, mask, dtype)
        x = (x + y).to(dtype).to(tl.float32)
        tl.store(x_new_ptr + row * N + columns, x.to(dtype), mask=mask)
    if weight_ptr is not None:
        h = _normed(x, _inverse_rms(x, N, eps), weight_ptr, columns, mask, dtype)
        _store(h_ptr + row * N + columns, h, scale_ptr, mask, dtype)


def add_norm(
    x: Tensor,
    y: Tensor | None,
    post_weight: Tensor | None,
    weight: Tensor | None,
    eps: float,
    input_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(x_new, h): x_new = x + y, and h = RMSNorm(x_new) * (1 + weight), in x's dtype or, with input_scale, in E4M3.

    x [M, N] is the residual stream. y, a layer's output, is [M, N] in x's dtype, float32 partial sums [P, M, N], or None.
    With post_weight [N] its own norm comes before the sum. Without weight [N] there is no h.
    """
    m, n = x.shape
    x_new = x if y is None else torch.empty_like(x)
    h = None if weight is None else torch.empty_like(x, dtype=x.dtype if input_scale is None else E4M3)
    _launch(
        _add_norm_kernel,
        (m,),
        *(x, y, post_weight, weight, input_scale, None if y is None else x_new, h, eps, m),
        N=n,
        BLOCK=_power_of_2(n),
        PARTS=_parts(y),
        num_warps=_row_warps(n),
    )
    return x_new, h


# ---------------------------------------------------------------------------------------------------------------------
# GeGLU, quantisation


def geglu_reference(y, dtype, input_scale=None):
    gate, up = _summed(y, dtype).chunk(2, dim=-1)
    h = F.gelu(gate.float(), approximate="tanh").to(dtype) * up
    return h if input_scale is None else round_fp8(h, input_scale)


@jit
def _geglu_kernel(
    y_ptr,
    scale_ptr,
    h_ptr,
    rows,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    _start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    _wait(PDL)
    gate = _output(y_ptr, row, rows, columns, mask, 2 * F, PARTS, dtype)
    up = _output(y_ptr, row, rows, columns + F, mask, 2 * F, PARTS, dtype)
    _store(h_ptr + row * F + columns, _geglu(gate, up, dtype), scale_ptr, mask, dtype)


def geglu(y: Tensor, dtype: torch.dtype, input_scale: Tensor | None = None) -> Tensor:
    """gelu(gate) * up [M, F] in `dtype` or, with input_scale, in E4M3.

    y, gate and then up, is [M, 2 * F] in `dtype` or float32 partial sums [P, M, 2 * F].
    """
    m, f = y.shape[-2], y.shape[-1] // 2
    h = torch.empty(m, f, dtype=dtype if input_scale is None else E4M3, device=y.device)
    block = min(GEGLU_BLOCK, _power_of_2(f))
    _launch(
        _geglu_kernel,
        (m, -(-f // block)),
        *(y, input_scale, h, m),
        F=f,
        BLOCK=block,
        PARTS=_parts(y),
        dtype=_triton_dtype(dtype),
        num_warps=GEGLU_WARPS,
    )
    return h


def _triton_dtype(dtype: torch.dtype):
    return {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def rescale_reference(x, factor, input_scale=None):
    x = x * factor
    return x if input_scale is None else round_fp8(x, input_scale)


@jit
def _rescale_kernel(x_ptr, scale_ptr, y_ptr, factor, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    _start(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    _wait(PDL)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    _store(y_ptr + offsets, (x * factor).to(dtype).to(tl.float32), scale_ptr, mask, dtype)


def rescale(x: Tensor, factor: float, input_scale: Tensor | None = None) -> Tensor:
    """x * factor in x's dtype or, with input_scale, in E4M3."""
    if factor == 1 and input_scale is None:
        return x
    y = torch.empty_like(x, dtype=x.dtype if input_scale is None else E4M3)
    grid = (-(-x.numel() // GEGLU_BLOCK),)
    _launch(_rescale_kernel, grid, x, input_scale, y, factor, x.numel(), BLOCK=GEGLU_BLOCK, num_warps=GEGLU_WARPS)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Rotary embedding, KV cache, and attention of one query a row


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., D], pairing d with d + D / 2; in float32, rounded once (RoFormer, eq. 34).

    cos and sin are those of every d, the first half of sin with a minus.
    """
    y = x.float()
    return torch.addcmul(y * cos, y.roll(y.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def rope_reference(position, *frequencies):
    angles = [position.float()[:, None] * frequency for frequency in frequencies]
    return torch.stack([torch.stack((angle.cos(), angle.sin())) for angle in angles])


@jit
def _rope_kernel(
    position_ptr, frequency_ptr, local_ptr, out_ptr, rows, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    _start(PDL)
    row, kind = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    if kind == 0:
        frequency = tl.load(frequency_ptr + d, mask=d < D, other=0.0)
    else:
        frequency = tl.load(local_ptr + d, mask=d < D, other=0.0)
    _wait(PDL)
    angle = tl.load(position_ptr + row).to(tl.float32) * frequency
    offsets = (2 * kind * rows + row) * D + d
    tl.store(out_ptr + offsets, tl.cos(angle), mask=d < D)
    tl.store(out_ptr + offsets + rows * D, tl.sin(angle), mask=d < D)


def rope(position: Tensor, *frequencies: Tensor) -> Tensor:
    """Cosine and sine [kinds, 2, M, D], float32, of the angles position [M] (int64) * frequency [D], radians, for one or
    two frequencies."""
    m, d = len(position), len(frequencies[0])
    out = torch.empty(len(frequencies), 2, m, d, device=position.device)
    grid = (m, len(frequencies))
    _launch(
        _rope_kernel, grid, position, frequencies[0], frequencies[-1], out, m, D=d, BLOCK=_power_of_2(d), num_warps=4
    )
    return out


def rope_and_write_reference(
    qkv,
    rope,
    position,
    k_cache,
    v_cache,
    n_heads,
    dtype,
    k_scale=1.0,
    v_scale=1.0,
    q_norm=None,
    k_norm=None,
    eps=1e-6,
):
    m, kv_heads, slots, d = k_cache.shape
    q, k, v = _summed(qkv, dtype).view(m, -1, d).split_with_sizes([n_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    q, k = (rotate(x, *rope[:, :, None]) for x in (q, k))
    rows, slot = torch.arange(m, device=qkv.device), position % slots
    for cache, x, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        x = round_fp8(x, scale, cache.dtype) if cache.dtype.itemsize == 1 else x.to(cache.dtype)
        cache.view(torch.uint8)[rows, :, slot] = x.view(torch.uint8)
    return q


def decode_attention_reference(
    qkv, rope, position, k_cache, v_cache, n_heads, dtype, scale, softcap=None, input_scale=None, **options
):
    q = rope_and_write_reference(qkv, rope, position, k_cache, v_cache, n_heads, dtype, **options)
    (m, kv_heads, slots, d), heads = k_cache.shape, n_heads
    valid = (torch.arange(slots, device=q.device) <= position[:, None])[:, None, :, None]  # [M, 1, S, 1]
    k, v = (torch.where(valid, cache.float(), 0.0) for cache in (k_cache, v_cache))
    scores = q.float().view(m, kv_heads, -1, d) @ k.mT * (scale * options.get("k_scale", 1.0))  # [M, K, G, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~valid.mT, float("-inf"))
    y = (scores.softmax(-1) @ v * options.get("v_scale", 1.0)).to(dtype).view(m, heads * d)
    return y if input_scale is None else round_fp8(y, input_scale)


@jit
def _rotated(
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
    PARTS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Elements d, along AXIS, of the heads that begin at column `first`, behind their norm, if there is one, and their
    rotation."""
    partner = (d + D // 2) % D
    x = _output(qkv_ptr, row, rows, first + d, mask, WIDTH, PARTS, dtype)
    y = _output(qkv_ptr, row, rows, first + partner, mask, WIDTH, PARTS, dtype)
    if norm_ptr is not None:
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=AXIS, keep_dims=True) / D + eps)
        x = _normed(x, inverse_rms, norm_ptr, d, d < D, dtype)
        y = _normed(y, inverse_rms, norm_ptr, partner, d < D, dtype)
    return (x * cos + y * sin).to(dtype).to(tl.float32)


@jit
def _keep(x, cache_ptr, offsets, inverse_scale, mask, LIMIT: tl.constexpr):
    """x rounded as the cache keeps it, which is written if mask allows it."""
    if LIMIT > 0:
        x = tl.clamp(x * inverse_scale, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    x = x.to(cache_ptr.dtype.element_ty)
    tl.store(cache_ptr + offsets, x, mask=mask)
    return x.to(tl.float32)


@jit
def _prefill_rope_kernel(
    qkv_ptr,
    rope_ptr,
    q_norm_ptr,
    k_norm_ptr,
    lengths_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    inverse_k_scale,
    inverse_v_scale,
    eps,
    rows,
    T,
    S,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """The queries of one token, or its keys and values."""
    _start(PDL)
    WIDTH: tl.constexpr = (H + 2 * K) * D
    token = tl.program_id(0).to(tl.int64)
    row, t = token // T, token % T
    d = tl.arange(0, BLOCK_D)[None, :]
    _wait(PDL)
    cos = tl.load(rope_ptr + t * D + d, mask=d < D, other=0.0)
    sin = tl.load(rope_ptr + (T + t) * D + d, mask=d < D, other=0.0)
    if tl.program_id(1) == 0:
        query = tl.arange(0, BLOCK_H)[:, None]
        is_query = (query < H) & (d < D)
        q = _rotated(qkv_ptr, token, rows, query * D, d, is_query, cos, sin, q_norm_ptr, eps, WIDTH, D, 1, PARTS, dtype)
        tl.store(out_ptr + token * WIDTH + query * D + d, q.to(dtype), mask=is_query)
    else:
        head = tl.arange(0, BLOCK_K)[:, None]
        mask = (head < K) & (d < D)
        first = (H + head) * D
        k = _rotated(qkv_ptr, token, rows, first, d, mask, cos, sin, k_norm_ptr, eps, WIDTH, D, 1, PARTS, dtype)
        v = _output(qkv_ptr, token, rows, first + K * D + d, mask, WIDTH, PARTS, dtype)
        length = tl.load(lengths_ptr + row)
        offsets = ((row * K + head) * S + t % S) * D + d
        heads = tl.where(t < length, tl.where(t + S >= length, K, 0), 0)  # of tokens that share a slot, the newest's
        kept = (head < heads) & (d < D)
        k = _keep(k, k_ptr, offsets, inverse_k_scale, kept, LIMIT)
        v = _keep(v, v_ptr, offsets, inverse_v_scale, kept, LIMIT)
        tl.store(out_ptr + token * WIDTH + first + d, k.to(dtype), mask=mask)
        tl.store(out_ptr + token * WIDTH + first + K * D + d, v.to(dtype), mask=mask)


def prefill_rope(
    qkv: Tensor,
    rope: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    n_heads: int,
    dtype: torch.dtype,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [B, T, H, D] and k, and v [B, T, K, D], of tokens at positions 0 to T - 1; k and v as the caches
    [B, K, S, D] keep them, divided by their scales. Those of the first `lengths` [B] tokens (int64), or the newest S of
    them, are written to slots position % S. rope [2, T, D]; the rest is as in `decode_attention`, M is B * T."""
    (batch, kv_heads, slots, d), (m, width) = k_cache.shape, qkv.shape[-2:]
    out = torch.empty(m, width, dtype=dtype, device=qkv.device)
    _launch(
        _prefill_rope_kernel,
        (m, 2),
        *(qkv, rope, q_norm, k_norm, lengths, k_cache, v_cache, out),
        *(1 / k_scale, 1 / v_scale, eps, m, m // batch, slots),
        H=n_heads,
        K=kv_heads,
        D=d,
        BLOCK_H=_power_of_2(n_heads),
        BLOCK_K=_power_of_2(kv_heads),
        BLOCK_D=_power_of_2(d),
        PARTS=_parts(qkv),
        LIMIT=torch.finfo(k_cache.dtype).max if k_cache.dtype.itemsize == 1 else 0.0,
        dtype=_triton_dtype(dtype),
        num_warps=4,
    )
    return out.view(batch, m // batch, -1, d).split_with_sizes([n_heads, kv_heads, kv_heads], dim=2)


@jit
def _log2_scores(products, scale, softcap):
    """Times log2(e), for exp2."""
    if softcap is None:
        scores = products * (scale * LOG2E)
    else:
        scores = _tanh(products * (scale / softcap)) * (softcap * LOG2E)
    return scores


@jit
def _share(position, S, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr):
    """The slots [start, end) of an attention program's share, in whole blocks of those that are in use."""
    used = tl.minimum(position + 1, S).to(tl.int32)
    size = tl.cdiv(tl.cdiv(used, BLOCK_S), SPLITS) * BLOCK_S
    start = tl.program_id(2) * size
    return start, tl.minimum(start + size, used)


@jit
def _own(
    qkv_ptr,
    rope_ptr,
    k_norm_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    inverse_k_scale,
    inverse_v_scale,
    eps,
    rows,
    S,
    d,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    AHEAD: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """What an attention program of (row, key head, split) begins with: the row's slot; the program's share; the rotation at
    the row's position; and the row's new key and value, which the first split writes, and which never come from the
    cache. Before the wait, the first AHEAD slots of the share that the last known position gives: an old one does no
    harm there."""
    WIDTH: tl.constexpr = (G + 2) * K * D
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    in_head = d < D
    if PDL and AHEAD > 0:
        PIECE: tl.constexpr = 1024
        ITEM: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth // 8
        start, end = _share(tl.load(position_ptr + row), S, BLOCK_S, SPLITS)
        first = ((row * K + head) * S + start) * D
        count = tl.minimum(end - start, AHEAD) * (D * ITEM) // PIECE
        _fetch(k_ptr + first, PIECE, count, PIECE, PDL)
        _fetch(v_ptr + first, PIECE, count, PIECE, PDL)
    _wait(PDL)
    position = tl.load(position_ptr + row)
    slot = (position % S).to(tl.int32)
    start, end = _share(position, S, BLOCK_S, SPLITS)
    cos = tl.load(rope_ptr + row * D + d, mask=in_head, other=0.0)
    sin = tl.load(rope_ptr + (rows + row) * D + d, mask=in_head, other=0.0)
    k_head = (G * K + head) * D
    k = _rotated(qkv_ptr, row, rows, k_head, d, in_head, cos, sin, k_norm_ptr, eps, WIDTH, D, 0, PARTS, dtype)
    v = _output(qkv_ptr, row, rows, k_head + K * D + d, in_head, WIDTH, PARTS, dtype)
    offsets = ((row * K + head) * S + slot) * D + d
    mask = d < tl.where(tl.program_id(2) == 0, D, 0)
    k = _keep(k, k_ptr, offsets, inverse_k_scale, mask, LIMIT)
    v = _keep(v, v_ptr, offsets, inverse_v_scale, mask, LIMIT)
    return slot, start, end, cos, sin, k, v


@jit
def _attention_by_sums_kernel(
    qkv_ptr,
    rope_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    scale_ptr,
    out_ptr,
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
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    AHEAD: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query on each key head. Each of BLOCK_S lanes has a softmax of its own over every BLOCK_S-th slot, so that the
    loop exchanges nothing between warps; they are joined at the end."""
    _start(PDL)
    WIDTH: tl.constexpr = 3 * K * D
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    in_head = d < D
    slot, start, end, cos, sin, own_k, own_v = _own(
        qkv_ptr,
        rope_ptr,
        k_norm_ptr,
        k_ptr,
        v_ptr,
        position_ptr,
        inverse_k_scale,
        inverse_v_scale,
        eps,
        rows,
        S,
        d,
        K,
        G,
        D,
        BLOCK_S,
        SPLITS,
        PARTS,
        LIMIT,
        AHEAD,
        dtype,
        PDL,
    )
    q = _rotated(qkv_ptr, row, rows, head * D, d, in_head, cos, sin, q_norm_ptr, eps, WIDTH, D, 0, PARTS, dtype)
    first = tl.program_id(2) == 0
    base = (row * K + head) * S * D
    own = (lane == 0) & first
    m = tl.where(own, _log2_scores(tl.sum(q * own_k, axis=0), scale, softcap), LOWEST)
    l = tl.where(own, 1.0, 0.0)
    acc = tl.where(own[:, None], own_v[None, :], 0.0)
    offsets = base + lane[:, None] * D + d[None, :]
    for s in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        used = (s + lane < end) & (s + lane != slot)
        mask = used[:, None] & in_head[None, :] if D < BLOCK_D else used[:, None]
        k = tl.load(k_ptr + offsets + s * D, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offsets + s * D, mask=mask, other=0.0).to(tl.float32)
        scores = _log2_scores(tl.sum(q[None, :] * k, axis=1), scale, softcap)
        scores = tl.where(used, scores, float("-inf"))
        m_new = tl.maximum(m, scores)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new)
        l = l * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v
        m = m_new
    m_all = tl.max(m, axis=0)
    weight = tl.exp2(m - m_all)
    l_all = tl.sum(l * weight, axis=0)
    y = tl.sum(acc * weight[:, None], axis=0)
    if SPLITS == 1:
        _store(
            out_ptr + (row * K + head) * D + d,
            (y / l_all * v_scale).to(dtype).to(tl.float32),
            scale_ptr,
            in_head,
            dtype,
        )
    else:
        entry = (tl.program_id(2) * rows + row) * K + head
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
    position_ptr,
    scale_ptr,
    out_ptr,
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
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    AHEAD: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """The G queries on a key head as rows of one matrix; the rest is as above."""
    _start(PDL)
    # FP8 is exact in float16, and converted faster than to bfloat16
    is_fp8: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth == 8
    factor: tl.constexpr = tl.float16 if is_fp8 and dtype == tl.bfloat16 else dtype
    WIDTH: tl.constexpr = (G + 2) * K * D
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, lane, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    in_head = d < D
    q_mask = (g < G)[:, None] & in_head[None, :]
    slot, start, end, cos, sin, own_k, own_v = _own(
        qkv_ptr,
        rope_ptr,
        k_norm_ptr,
        k_ptr,
        v_ptr,
        position_ptr,
        inverse_k_scale,
        inverse_v_scale,
        eps,
        rows,
        S,
        d,
        K,
        G,
        D,
        BLOCK_S,
        SPLITS,
        PARTS,
        LIMIT,
        AHEAD,
        dtype,
        PDL,
    )
    heads = (head * G + g)[:, None] * D
    q = _rotated(
        qkv_ptr,
        row,
        rows,
        heads,
        d[None, :],
        q_mask,
        cos[None, :],
        sin[None, :],
        q_norm_ptr,
        eps,
        WIDTH,
        D,
        1,
        PARTS,
        dtype,
    )
    first = tl.program_id(2) == 0
    base = (row * K + head) * S * D
    m = tl.where(first, _log2_scores(tl.sum(q * own_k[None, :], axis=1), scale, softcap), LOWEST)
    l = tl.where(first, 1.0, 0.0) + tl.zeros([BLOCK_G], tl.float32)
    acc = tl.where(first, own_v[None, :], 0.0) + tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    query = q.to(factor)
    offsets = base + lane[:, None] * D + d[None, :]
    for s in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        used = (s + lane < end) & (s + lane != slot)
        mask = used[:, None] & in_head[None, :] if D < BLOCK_D else used[:, None]
        k = tl.load(k_ptr + offsets + s * D, mask=mask, other=0.0).to(factor)
        scores = _log2_scores(tl.dot(query, tl.trans(k), input_precision="ieee"), scale, softcap)
        scores = tl.where(used[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        v = tl.load(v_ptr + offsets + s * D, mask=mask, other=0.0).to(factor)
        acc = tl.dot(p.to(factor), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    if SPLITS == 1:
        offsets = heads + row * G * K * D + d[None, :]
        _store(out_ptr + offsets, (acc / l[:, None] * v_scale).to(dtype).to(tl.float32), scale_ptr, q_mask, dtype)
    else:
        entry = ((tl.program_id(2) * rows + row) * K + head) * G + g
        tl.store(stats_ptr + entry * 2, m, mask=g < G)
        tl.store(stats_ptr + entry * 2 + 1, l, mask=g < G)
        if start < end:
            tl.store(acc_ptr + entry[:, None] * D + d[None, :], acc, mask=q_mask)


@jit
def _combine_kernel(
    acc_ptr,
    stats_ptr,
    scale_ptr,
    out_ptr,
    v_scale,
    entries,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    _start(PDL)
    row_head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    entry = tl.arange(0, SPLITS) * entries + row_head
    _wait(PDL)
    m = tl.load(stats_ptr + entry * 2)
    l = tl.load(stats_ptr + entry * 2 + 1)
    weight = tl.exp2(m - tl.max(m, axis=0))
    # a share without slots has written no sums
    acc = tl.load(acc_ptr + entry[:, None] * D + d[None, :], mask=(l > 0)[:, None] & (d < D)[None, :], other=0.0)
    y = tl.sum(acc * weight[:, None], axis=0) / tl.sum(l * weight, axis=0)
    _store(out_ptr + row_head * D + d, (y * v_scale).to(dtype).to(tl.float32), scale_ptr, d < D, dtype)


def decode_attention(
    qkv: Tensor,
    rope: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    n_heads: int,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None = None,
    input_scale: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    splits: int | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Rotates queries and keys, writes keys and values to slot position % S, and attends to slots 0 to min(position, S - 1)
    of the caches [M, K, S, D] in bf16, float32, E4M3 or E5M2; reads no other. Returns [M, H * D] in `dtype` or, with
    input_scale, in E4M3.

    qkv is [M, (H + 2 * K) * D] in `dtype` or float32 partial sums [P, M, ...]. rope [2, M, D] is what `rope` makes of
    position [M], the token's own (int64), and frequencies of which the first half is negative, so that their sines are
    `rotate`'s. q_norm and k_norm [D] are RMSNorm weights. `scale`
    multiplies the scores; softcap c turns scores s into c * tanh(s / c); k_scale and v_scale are an FP8 cache's. `splits`
    programs, a power of 2, share a row's slots.
    """
    m, kv_heads, slots, d = k_cache.shape
    group = n_heads // kv_heads
    config = config or attention_config(m * kv_heads, group, slots, k_cache.dtype)
    splits = splits or attention_splits(m * kv_heads, slots, config.block_s)
    out = torch.empty(m, n_heads * d, dtype=dtype if input_scale is None else E4M3, device=qkv.device)
    acc = stats = None
    if splits > 1:
        acc = torch.empty(splits, m, n_heads, d, dtype=torch.float32, device=qkv.device)
        stats = torch.empty(splits, m, n_heads, 2, dtype=torch.float32, device=qkv.device)  # maximum and sum
    block_d = max(16, _power_of_2(d))
    _launch(
        _attention_by_sums_kernel if config.by_sums else _attention_kernel,
        (m, kv_heads, splits),
        *(qkv, rope, q_norm, k_norm, k_cache, v_cache, position, input_scale, out, acc, stats),
        *(scale * k_scale, v_scale, softcap, 1 / k_scale, 1 / v_scale, eps, m, slots),
        K=kv_heads,
        G=group,
        D=d,
        BLOCK_G=max(16, _power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_S=config.block_s,
        SPLITS=splits,
        STAGES=config.num_stages,
        PARTS=_parts(qkv),
        LIMIT=torch.finfo(k_cache.dtype).max if k_cache.dtype.itemsize == 1 else 0.0,
        AHEAD=config.ahead if d * k_cache.dtype.itemsize % 16 == 0 else 0,
        dtype=_triton_dtype(dtype),
        num_warps=config.num_warps,
    )
    if splits > 1:
        _launch(
            _combine_kernel,
            (m * n_heads,),
            *(acc, stats, input_scale, out, v_scale, m * n_heads),
            D=d,
            BLOCK_D=block_d,
            SPLITS=splits,
            dtype=_triton_dtype(dtype),
            num_warps=_row_warps(splits * d),
        )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers


def linear_reference(x, weight, input_scale=None, weight_scale=None, dtype=None):
    y = F.linear(x.float(), weight.float())
    return (y if input_scale is None else y * (input_scale * weight_scale)).to(dtype or x.dtype)


def fp8_matmul(x: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T [M, N] in `dtype` of x [M, K] and weight [N, K] in E4M3: by cuBLAS, or as `linear_reference`."""
    if x.is_cuda and weight.shape[0] % 16 == weight.shape[1] % 16 == 0:  # what cuBLAS takes
        return torch._scaled_mm(x, weight.t(), scale_a=input_scale, scale_b=weight_scale, out_dtype=dtype)
    return linear_reference(x, weight, input_scale, weight_scale, dtype)


@jit
def _as_float(weight, FAST: tl.constexpr):
    """In float32. Of int8 a GPU makes it by way of float16, whose bits 0x6400 + u are 1024 + u; converting integers is
    slower."""
    if FAST and weight.dtype == tl.int8:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 u, low, high, offset;
            .reg .b16 h0, h1, h2, h3;
            xor.b32 u, $4, 0x80808080;
            mov.b32 offset, 0x64806480;
            prmt.b32 low, u, 0x64646464, 0x4140;
            prmt.b32 high, u, 0x64646464, 0x4342;
            sub.f16x2 low, low, offset;
            sub.f16x2 high, high, offset;
            mov.b32 {h0, h1}, low;
            mov.b32 {h2, h3}, high;
            cvt.f32.f16 $0, h0;
            cvt.f32.f16 $1, h1;
            cvt.f32.f16 $2, h2;
            cvt.f32.f16 $3, h3;
            }""",
            "=f,=f,=f,=f,r",
            [weight],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        y = weight.to(tl.float32)
    return y


@jit
def _gemv_rows(OUT: tl.constexpr, BLOCK_N: tl.constexpr, GEGLU: tl.constexpr):
    """Of the weight, for a program's BLOCK_N outputs; what is read twice is not stored."""
    first = tl.program_id(0) * BLOCK_N
    if GEGLU:  # gate and up in turn: rows n and n + OUT
        i = tl.arange(0, 2 * BLOCK_N)
        row = tl.minimum(first + i // 2, OUT - 1) + i % 2 * OUT
    else:
        row = tl.minimum(first + tl.arange(0, BLOCK_N), OUT - 1)
    return row


@jit
def _gemv_store(
    out_ptr,
    y,
    next_scale_ptr,
    OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GEGLU: tl.constexpr,
    dtype: tl.constexpr,
):
    """Sums y of `_gemv_rows`."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = y.to(dtype).to(tl.float32)
    if GEGLU:
        gate, up = tl.split(tl.reshape(y, [BLOCK_N, 2]))
        y = _geglu(gate, up, dtype)
    _store(out_ptr + n, y, next_scale_ptr, n < OUT, dtype)


@jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    input_scale_ptr,
    weight_scale_ptr,
    next_scale_ptr,
    out_ptr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    _start(PDL)
    ROWS: tl.constexpr = 2 * BLOCK_N if GEGLU else BLOCK_N
    row = _gemv_rows(OUT, BLOCK_N, GEGLU)
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    rows_ptr = weight_ptr + row.to(tl.int64) * IN
    columns = tl.arange(0, BLOCK_K)
    early = ()
    for k in tl.static_range(0, EARLY * BLOCK_K, BLOCK_K):
        mask = k + columns < IN
        early = early + (tl.load(rows_ptr[:, None] + (k + columns)[None, :], mask=mask[None, :], other=0.0),)
    _wait(PDL)
    for tile in tl.static_range(EARLY):
        k = tile * BLOCK_K
        x = tl.load(x_ptr + k + columns, mask=k + columns < IN, other=0.0)
        acc += _as_float(early[tile], PDL) * x.to(tl.float32)[None, :]
    for k in tl.range(EARLY * BLOCK_K, IN, BLOCK_K, num_stages=STAGES):
        mask = k + columns < IN
        weight = tl.load(rows_ptr[:, None] + (k + columns)[None, :], mask=mask[None, :], other=0.0)
        acc += _as_float(weight, PDL) * tl.load(x_ptr + k + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    y = tl.sum(acc, axis=1)
    if input_scale_ptr is not None:
        y *= tl.load(input_scale_ptr) * tl.load(weight_scale_ptr)
    elif weight_scale_ptr is not None:  # int8
        y *= tl.load(weight_scale_ptr + row).to(tl.float32)
    _gemv_store(out_ptr, y, next_scale_ptr, OUT, BLOCK_N, GEGLU, dtype)


def gemv_reference(x, weight, input_scale=None, weight_scale=None, dtype=None, geglu=False, next_scale=None):
    y = linear_reference(x, weight, input_scale, weight_scale, dtype)
    return geglu_reference(y, y.dtype, next_scale) if geglu else y


def gemv(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    geglu: bool = False,
    next_scale: Tensor | None = None,
    config: Gemv | None = None,
) -> Tensor:
    """x @ weight.T of one row x [1, K], weight [N, K], in `dtype` (None: x's), which is not x's for E4M3.

    For an E4M3 weight, x is E4M3 and input_scale and weight_scale (0-dim float32) are given; for an int8 weight only
    weight_scale [N]. With `geglu`, weight is gate [F, K] over up [F, K], and gelu(gate) * up [1, F] is returned, in E4M3
    if next_scale is given.
    """
    (m, k), dtype = x.shape, dtype or x.dtype
    if m > 1:
        raise ValueError(f"gemv takes one row, not {m}")
    n = weight.shape[0] // 2 if geglu else weight.shape[0]
    config = config or linear_config(m, weight.shape[0], k, weight.dtype)
    out = torch.empty(m, n, dtype=dtype if next_scale is None else E4M3, device=x.device)
    _launch(
        _gemv_kernel,
        (-(-n // config.block_n),),
        *(x, weight, input_scale, weight_scale, next_scale, out),
        OUT=n,
        IN=k,
        GEGLU=geglu,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        EARLY=config.early,
        dtype=_triton_dtype(dtype),
        num_warps=config.num_warps,
    )
    return out


@jit
def _skinny_kernel(
    out_ptr,
    weight_tiles,
    x_tiles,
    input_scale_ptr,
    weight_scale_ptr,
    next_scale_ptr,
    rows,
    tiles,
    OUT: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PROMOTE: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Weight rows are the wide side of the product, x's few rows the narrow one. What tiles hold outside of their matrix
    is zero."""
    _start(PDL)
    first_row = tl.program_id(0) * BLOCK_N
    first_tile = tl.program_id(1) * tiles
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if GEGLU:
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    _wait(PDL)
    for tile in tl.range(first_tile, first_tile + tiles, num_stages=STAGES):
        x = x_tiles.load([0, tile * BLOCK_K]).T
        # A Hopper tensor core keeps few bits of a sum of FP8 products: each tile's is added in float32. (With fewer
        # than 32 products Triton would turn to FP16 instead, at a conversion for every weight.)
        weight = weight_tiles.load([first_row, tile * BLOCK_K])
        weight = weight.to(x.dtype)  # int8
        acc = tl.dot(weight, x, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE)
        if GEGLU:
            weight = weight_tiles.load([first_row + OUT, tile * BLOCK_K])
            weight = weight.to(x.dtype)
            up = tl.dot(weight, x, up, input_precision="ieee", max_num_imprecise_acc=PROMOTE)
    n = first_row + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    if input_scale_ptr is not None:
        scale = tl.load(input_scale_ptr) * tl.load(weight_scale_ptr)
        acc *= scale
        if GEGLU:
            up *= scale
    elif weight_scale_ptr is not None:
        acc *= tl.load(weight_scale_ptr + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
        if GEGLU:
            up *= tl.load(weight_scale_ptr + n + OUT, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
    if GEGLU:
        acc = _geglu(acc.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    offsets = (tl.program_id(1) * rows + m[None, :]).to(tl.int64) * OUT + n[:, None]
    mask = (n < OUT)[:, None] & (m < rows)[None, :]
    _store(out_ptr + offsets, acc, next_scale_ptr, mask, out_ptr.dtype.element_ty)


def _shares(x: Tensor, n: int, config: Skinny, dtype: torch.dtype) -> tuple[int, int, Tensor]:
    """Tiles of a program, programs that share n outputs of x [M, K], and memory for those: [M, N] in `dtype`, or float32
    partial sums [programs, M, N]."""
    m, k = x.shape
    tiles = -(-k // (config.block_k * config.split))
    split = -(-k // (config.block_k * tiles))  # without shares that would be empty
    if split == 1:
        return tiles, 1, torch.empty(m, n, dtype=dtype, device=x.device)
    return tiles, split, torch.empty(split, m, n, dtype=torch.float32, device=x.device)


def skinny_matmul(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    geglu: bool = False,
    next_scale: Tensor | None = None,
    config: Skinny | None = None,
) -> Tensor:
    """`gemv` of up to 64 rows; with config.split > 1 float32 partial sums [split, M, N], and no `geglu`."""
    (m, k), n, dtype = x.shape, weight.shape[0] // (2 if geglu else 1), dtype or x.dtype
    config = config or linear_config(m, weight.shape[0], k, weight.dtype)
    config = config._replace(split=1) if geglu else config
    tiles, split, out = _shares(x, n, config, dtype if next_scale is None else E4M3)
    _launch(
        _skinny_kernel,
        (-(-n // config.block_n), split),
        out,
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        *(input_scale, weight_scale, next_scale, m, tiles),
        OUT=n,
        GEGLU=geglu,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        PROMOTE=config.block_k if weight.dtype == E4M3 else 0,
        dtype=_triton_dtype(dtype),
        num_warps=config.num_warps,
    )
    return out


def linear_rows(
    x: Tensor,
    weight: "Tensor | IntWeight",
    input_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    partials: bool = False,
    config: Gemv | Skinny | None = None,
) -> Tensor:
    """x @ weight.T [M, N] in `dtype` (None: x's) of x [M, K] and weight [N, K], by whatever is fastest for the shape.

    Both are in bf16 or float32, or in E4M3 with input_scale and weight_scale (0-dim float32), or weight is an IntWeight
    and `dtype` x's. With `partials`, the result may be float32 partial sums [P, M, N] instead: `add_norm`, `geglu` and
    `decode_attention` take those.
    """
    m, dtype = len(x), dtype or x.dtype
    config = config or linear_config(m, *weight.shape, weight.dtype)
    if isinstance(config, Skinny) and not partials:
        config = config._replace(split=1)
    if isinstance(weight, IntWeight):
        if config is None or (m > 1 and dtype == torch.float32):
            return F.linear(x, dequantise(weight, dtype))  # made in each call
        if weight.zero is not None:
            return (int4_gemv if m == 1 else int4_skinny_matmul)(x, weight, config=config)
        weight, weight_scale = weight.packed, weight.scale
    if isinstance(config, Gemv):
        return gemv(x, weight, input_scale, weight_scale, dtype, config=config)
    if isinstance(config, Skinny):
        return skinny_matmul(x, weight, input_scale, weight_scale, dtype, config=config)
    if input_scale is None:
        return F.linear(x, weight)
    return fp8_matmul(x, weight, input_scale, weight_scale, dtype)


def linear_geglu(
    x: Tensor,
    weight: "Tensor | IntWeight",
    input_scale: Tensor | None,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    next_scale: Tensor | None = None,
) -> Tensor:
    """`linear_rows` by gate [F, K] over up [F, K], and then `geglu`: [M, F]."""
    config = linear_config(len(x), *weight.shape, weight.dtype)
    in_int4 = weight.dtype == torch.int32
    apart = config is None or (len(x) > 1 and (in_int4 or dtype == torch.float32))
    if apart:
        return geglu(linear_rows(x, weight, input_scale, weight_scale, dtype, partials=True), dtype, next_scale)
    if isinstance(config, Gemv):  # half as many outputs a program, as each has two rows
        config = config._replace(block_n=max(1, config.block_n // 2))
    else:
        config = config._replace(block_n=64, num_stages=4 if len(x) <= 16 and weight.shape[1] > 2048 else 3)
    if in_int4:
        return int4_gemv(x, weight, True, config)
    if isinstance(weight, IntWeight):
        weight, weight_scale = weight.packed, weight.scale
    by = gemv if isinstance(config, Gemv) else skinny_matmul
    return by(x, weight, input_scale, weight_scale, dtype, True, next_scale, config)


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers with integer weights


class IntWeight(NamedTuple):
    """A weight [N, K] in 8 or 4 bits. int8: packed [N, K] int8 and scale [N], real = packed * scale. int4: packed
    [N, K / 8] int32, scale and zero [N, K / group], real = (q - zero / 16) * scale with q from 0 to 15; `group`, a multiple
    of 32, is the number of neighbours in a row that share a scale. scale is bf16, zero uint8.

    Four words hold 32 columns. Bits 4i to 4i + 3 of word c are column 4i + c of them:

        bits           0..3   4..7   8..11  ...  28..31
        word 0           0      4      8    ...    28
        word 1           1      5      9    ...    29        16 bytes that lie side by side meet x in
        word 2           2      6     10    ...    30        slices of four, and nothing has to be sorted
        word 3           3      7     11    ...    31

    A zero in sixteenths costs a byte, and leaves q - zero / 16 exact in bf16.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @classmethod
    def empty(cls, n: int, k: int, group: int = 0) -> "IntWeight":
        """int8 if group is 0; on torch's default device."""
        if not group:
            return cls(torch.empty(n, k, dtype=torch.int8), torch.empty(n, dtype=torch.bfloat16))
        scale = torch.empty(n, k // group, dtype=torch.bfloat16)
        return cls(torch.empty(n, k // 8, dtype=torch.int32), scale, torch.empty_like(scale, dtype=torch.uint8))

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.packed.shape
        return n, k if self.zero is None else 8 * k

    @property
    def group(self) -> int:
        return 0 if self.zero is None else self.shape[1] // self.zero.shape[1]


def pack_int4(q: Tensor) -> Tensor:
    """[N, K / 8] int32 of q [N, K], integers from 0 to 15, K a multiple of 32: IntWeight's layout."""
    n, k = q.shape
    q = q.view(n, k // 32, 8, 4).int() << torch.arange(0, 32, 4, dtype=torch.int32, device=q.device)[:, None]
    return q.sum(2, dtype=torch.int32).view(n, k // 8)


def unpack_int4(packed: Tensor) -> Tensor:
    """[N, K] int32, from 0 to 15, of `pack_int4`'s result."""
    n, words = packed.shape
    q = packed.view(n, words // 4, 1, 4) >> torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)[:, None]
    return (q & 15).view(n, 8 * words)


def dequantise_reference(weight: IntWeight, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`, rounded once."""
    packed, scale, zero = weight
    if zero is None:
        return packed.to(dtype) * scale.to(dtype)[:, None]
    q = unpack_int4(packed).to(dtype).unflatten(1, (zero.shape[1], -1))
    return ((q - zero.to(dtype)[..., None] / 16) * scale.to(dtype)[..., None]).flatten(1)


def int_linear_reference(x: Tensor, weight: IntWeight) -> Tensor:
    return F.linear(x.float(), dequantise_reference(weight, torch.float32)).to(x.dtype)


def int_linear(x: Tensor, weight: IntWeight) -> Tensor:
    """x @ weight.T of x [..., K] in its dtype: by the kernels on a GPU, else with the weight rounded to that dtype."""
    if x.is_cuda and available(x.device):
        return linear_rows(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
    return F.linear(x, dequantise_reference(weight, x.dtype))


@jit
def _dequantise_kernel(
    weight_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    _start(PDL)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    out_ptr += row * IN
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    _wait(PDL)
    if zero_ptr is None:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(weight_ptr + row * IN + columns, mask=columns < IN, other=0).to(tl.float32)
        tl.store(out_ptr + columns, (y * tl.load(scale_ptr + row).to(tl.float32)).to(dtype), mask=columns < IN)
    else:
        word = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        mask = word < IN // 8
        group = row * (IN // GROUP) + word // (GROUP // 8)
        scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32) * 0.0625
        words = tl.load(weight_ptr + row * (IN // 8) + word, mask=mask, other=0)
        columns = word // 4 * 32 + word % 4
        for i in tl.static_range(8):
            y = (((words >> (4 * i)) & 15).to(tl.float32) - zero) * scale
            tl.store(out_ptr + columns + 4 * i, y.to(dtype), mask=mask)


def dequantise(weight: IntWeight, dtype: torch.dtype) -> Tensor:
    """`dequantise_reference`."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.packed.device)
    block = min(DEQUANTISE_BLOCK, max(32, _power_of_2(k)))
    _launch(
        _dequantise_kernel,
        (n, -(-k // block)),
        *(*weight, out),
        IN=k,
        GROUP=weight.group,
        BLOCK=block,
        num_warps=DEQUANTISE_WARPS,
    )
    return out


@jit
def _nibble(words, i: tl.constexpr):
    return (words & (15 << (4 * i))).to(tl.float32, bitcast=True)


@jit
def _int4_tile(
    weight_ptr,
    scale_ptr,
    zero_ptr,
    row,
    tile,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Words [rows, BLOCK_K / 8], and the scale and zero of each 32 columns of them."""
    word = tile * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)[None, :]
    unit = tile * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)[None, :]
    row = row.to(tl.int64)[:, None]
    words = tl.load(weight_ptr + row * (IN // 8) + word, mask=word < IN // 8, other=0)
    group = row * (IN // GROUP) + unit // (GROUP // 32)
    scale = tl.load(scale_ptr + group, mask=unit < IN // 32, other=0.0)
    return words, scale, tl.load(zero_ptr + group, mask=unit < IN // 32, other=0)


@jit
def _int4_dot(x_ptr, low, scale, zero, tile, IN: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of x and a tile of weights, a sum for each 32 columns.

    4.2 TB/s leave an SM 3.5 instructions a weight. So none is spent on making a number of a nibble: bits 4i to 4i + 3 of
    a word, the rest 0, are the float32 (a denormal one) nibble * 2**(4i - 149) as they stand, for i up to 4, and x is
    scaled up instead, once for all rows: by LIFT, which |x| < 2**27 allows, and 2**(-4i). Of each 32 columns the sum
    of q * x is then put right with their scale and zero: scale * (sum of q * x - zero * sum of x).
    """
    UNITS: tl.constexpr = BLOCK_K // 32
    word = tile * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    mask = word < IN // 8
    x_ptrs = x_ptr + word // 4 * 32 + word % 4
    x0 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptrs + 4, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + 8, mask=mask, other=0.0).to(tl.float32)
    x3 = tl.load(x_ptrs + 12, mask=mask, other=0.0).to(tl.float32)
    x4 = tl.load(x_ptrs + 16, mask=mask, other=0.0).to(tl.float32)
    x5 = tl.load(x_ptrs + 20, mask=mask, other=0.0).to(tl.float32)
    x6 = tl.load(x_ptrs + 24, mask=mask, other=0.0).to(tl.float32)
    x7 = tl.load(x_ptrs + 28, mask=mask, other=0.0).to(tl.float32)
    x_sum = tl.sum(tl.reshape(x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7, [UNITS, 4]), axis=1)
    high = low >> 12
    y = _nibble(low, 0) * (x0 * LIFT)[None, :] + _nibble(low, 1) * (x1 * (LIFT / 16))[None, :]
    y += _nibble(low, 2) * (x2 * (LIFT / 256))[None, :]
    y += _nibble(low, 3) * (x3 * (LIFT / 4096))[None, :]
    y += _nibble(low, 4) * (x4 * (LIFT / 65536))[None, :]
    y += _nibble(high, 2) * (x5 * (LIFT / 256))[None, :]
    y += _nibble(high, 3) * (x6 * (LIFT / 4096))[None, :]
    y += _nibble(high, 4) * (x7 * (LIFT / 65536))[None, :]
    y = tl.sum(tl.reshape(y, [ROWS, UNITS, 4]), axis=2) * (2.0**149 / LIFT)
    return (y - zero.to(tl.float32) * 0.0625 * x_sum[None, :]) * scale.to(tl.float32)


@jit
def _int4_gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """As _gemv_kernel."""
    _start(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    ROWS: tl.constexpr = 2 * BLOCK_N if GEGLU else BLOCK_N
    row = _gemv_rows(OUT, BLOCK_N, GEGLU)
    early = ()
    for tile in tl.static_range(EARLY):
        early = early + (_int4_tile(weight_ptr, scale_ptr, zero_ptr, row, tile, IN, GROUP, BLOCK_K),)
    _wait(PDL)
    acc = tl.zeros([ROWS, BLOCK_K // 32], tl.float32)
    for tile in tl.static_range(EARLY):
        words, scale, zero = early[tile]
        acc += _int4_dot(x_ptr, words, scale, zero, tile, IN, ROWS, BLOCK_K)
    for tile in tl.range(EARLY, tl.cdiv(IN, BLOCK_K), num_stages=STAGES):
        words, scale, zero = _int4_tile(weight_ptr, scale_ptr, zero_ptr, row, tile, IN, GROUP, BLOCK_K)
        acc += _int4_dot(x_ptr, words, scale, zero, tile, IN, ROWS, BLOCK_K)
    _gemv_store(out_ptr, tl.sum(acc, axis=1), None, OUT, BLOCK_N, GEGLU, dtype)


def int4_gemv(x: Tensor, weight: IntWeight, geglu: bool = False, config: Gemv | None = None) -> Tensor:
    """`gemv` by 4-bit weights: [1, N], or with `geglu` [1, N / 2], in x's dtype."""
    (n, k), m = weight.shape, len(x)
    if m > 1:
        raise ValueError(f"int4_gemv takes one row, not {m}")
    config = config or linear_config(m, n, k, weight.dtype)
    n = n // 2 if geglu else n
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _launch(
        _int4_gemv_kernel,
        (-(-n // config.block_n),),
        *(x, *weight, out),
        OUT=n,
        IN=k,
        GROUP=weight.group,
        GEGLU=geglu,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        EARLY=config.early,
        num_warps=config.num_warps,
    )
    return out


@jit
def _int4_skinny_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    tiles,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """As _skinny_kernel: a product for each of a word's nibbles, which become weights in x's dtype before."""
    _start(PDL)
    WORDS: tl.constexpr = BLOCK_K // 8
    UNITS: tl.constexpr = BLOCK_K // 32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, word = tl.arange(0, BLOCK_M), tl.arange(0, WORDS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.minimum(n, OUT - 1)
    x_ptrs, in_rows = x_ptr + m[None, :] * IN, (m < rows)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(1) * tiles
    _wait(PDL)
    for tile in tl.range(first, first + tiles, num_stages=STAGES):
        words, scale, zero = _int4_tile(weight_ptr, scale_ptr, zero_ptr, row, tile, IN, GROUP, BLOCK_K)
        scale = scale.to(tl.float32)
        least = zero.to(tl.float32) * -0.0625 * scale
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [BLOCK_N, UNITS, 4]), [BLOCK_N, WORDS])
        least = tl.reshape(tl.broadcast_to(least[:, :, None], [BLOCK_N, UNITS, 4]), [BLOCK_N, WORDS])
        w = tile * WORDS + word
        mask = in_rows & (w < IN // 8)[:, None]
        for i in tl.static_range(8):
            weight = (((words >> (4 * i)) & 15).to(tl.float32) * scale + least).to(dtype)
            x = tl.load(x_ptrs + (w // 4 * 32 + w % 4 + 4 * i)[:, None], mask=mask, other=0.0)
            acc = tl.dot(weight, x, acc, input_precision="ieee")
    offsets = (tl.program_id(1) * rows + m[None, :]).to(tl.int64) * OUT + n[:, None]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=(n < OUT)[:, None] & in_rows)


def int4_skinny_matmul(x: Tensor, weight: IntWeight, config: Skinny | None = None) -> Tensor:
    """`skinny_matmul` by 4-bit weights, in x's dtype. config.block_k is at least 128."""
    (n, k), m = weight.shape, len(x)
    config = config or linear_config(m, n, k, weight.dtype)
    tiles, split, out = _shares(x, n, config, x.dtype)
    _launch(
        _int4_skinny_kernel,
        (-(-n // config.block_n), split),
        *(x, *weight, out, m, tiles),
        OUT=n,
        IN=k,
        GROUP=weight.group,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The next token


def record(state, token: Tensor):
    """Keeps token [M] in a generate.State where a row is not done, and says in its log how far the rows are."""
    state.token.copy_(token)
    state.output.scatter_(1, state.count[:, None], token[:, None])  # a row that is done writes behind its last token
    state.count += ~state.done
    state.done |= (token[:, None] == state.stop_ids).any(-1) | (state.count >= state.limit)
    status = torch.stack((state.done.all(), state.count[0], token[0]))
    state.log.index_copy_(0, state.step, status[None])
    state.step += 1


def greedy_emit_reference(logits, state):
    state.position += ~state.done
    record(state, logits.float().argmax(-1))


@jit
def _argmax_kernel(
    logits_ptr,
    best_ptr,
    index_ptr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The largest of a chunk of logits, and where it is first."""
    _start(PDL)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offsets = chunk * CHUNK + tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.where(offsets < V, offsets, V - 1)
    _wait(PDL)
    for i in range(0, CHUNK, BLOCK):
        value = tl.load(logits_ptr + row * V + offsets + i, mask=offsets + i < V, other=float("-inf")).to(tl.float32)
        index = tl.where(value > best, offsets + i, index)
        best = tl.maximum(best, value)
    largest = tl.max(best, axis=0)
    tl.store(best_ptr + row * tl.num_programs(1) + chunk, largest)
    tl.store(index_ptr + row * tl.num_programs(1) + chunk, tl.min(tl.where(best == largest, index, V - 1), axis=0))


@jit
def _emit_kernel(
    best_ptr,
    index_ptr,
    token_ptr,
    output_ptr,
    count_ptr,
    limit_ptr,
    done_ptr,
    stop_ids_ptr,
    log_ptr,
    step_ptr,
    position_ptr,
    M,
    length,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """All rows in one program: the chunks' best, and what is kept of it."""
    _start(PDL)
    row, chunk = tl.arange(0, BLOCK_M), tl.arange(0, CHUNKS)
    mask = row < M
    _wait(PDL)
    offsets = row[:, None] * CHUNKS + chunk[None, :]
    best = tl.load(best_ptr + offsets, mask=mask[:, None], other=float("-inf"))
    index = tl.load(index_ptr + offsets, mask=mask[:, None], other=0)
    largest = tl.max(best, axis=1)
    token = tl.min(tl.where(best == largest[:, None], index, V - 1), axis=1).to(tl.int64)
    was_done = tl.load(done_ptr + row, mask=mask, other=1) != 0
    count = tl.load(count_ptr + row, mask=mask, other=0)
    limit = tl.load(limit_ptr + row, mask=mask, other=0)
    position = tl.load(position_ptr + row, mask=mask, other=0)
    step = tl.load(step_ptr)
    tl.store(token_ptr + row, token, mask=mask)
    tl.store(output_ptr + row.to(tl.int64) * length + count, token, mask=mask)
    count = tl.where(was_done, count, count + 1)
    tl.store(count_ptr + row, count, mask=mask)
    tl.store(position_ptr + row, tl.where(was_done, position, position + 1), mask=mask)
    done = was_done | (count >= limit)
    for i in tl.static_range(STOP_IDS):
        done = done | (token == tl.load(stop_ids_ptr + i))
    tl.store(done_ptr + row, done.to(tl.uint8), mask=mask)
    tl.store(log_ptr + step * 3, tl.min(done.to(tl.int32), axis=0).to(tl.int64))
    tl.store(log_ptr + step * 3 + 1, tl.sum(tl.where(row == 0, count, 0), axis=0))
    tl.store(log_ptr + step * 3 + 2, tl.sum(tl.where(row == 0, token, 0), axis=0))
    tl.store(step_ptr, step + 1)


def greedy_emit(logits: Tensor, state):
    """The end of a greedy step, behind logits [M, V] in bf16 or float32, in place in a generate.State of M rows. Of equal
    logits the first wins."""
    m, v = logits.shape
    chunks = min(_power_of_2(-(-4 * SMS // m)), _power_of_2(-(-v // ARGMAX_BLOCK)))
    best = torch.empty(m, chunks, dtype=torch.float32, device=logits.device)
    index = torch.empty(m, chunks, dtype=torch.int32, device=logits.device)
    chunk = -(-v // chunks)
    block = min(ARGMAX_BLOCK, _power_of_2(chunk))
    chunk = -(-chunk // block) * block
    _launch(_argmax_kernel, (m, chunks), logits, best, index, V=v, CHUNK=chunk, BLOCK=block, num_warps=ARGMAX_WARPS)
    _launch(
        _emit_kernel,
        (1,),
        *(best, index, state.token, state.output, state.count, state.limit, state.done.view(torch.uint8)),
        *(state.stop_ids, state.log, state.step, state.position, m, state.output.shape[1]),
        V=v,
        BLOCK_M=_power_of_2(m),
        CHUNKS=chunks,
        STOP_IDS=len(state.stop_ids),
        num_warps=4 if m * chunks <= 4096 else 8,
    )
