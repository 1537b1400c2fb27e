"""Triton kernels of the decode step, where every row brings one token, and of prefill; each beside the PyTorch that
defines it.

M is the number of rows, in prefill of tokens; the other letters are model.py's: H query heads, K key/value heads, D head_dim, S cache slots,
F intermediate size, V vocabulary. Every tensor is contiguous. Results are rounded where the modules of model.py round, so
that the two differ by the order of summation only. FP8 is E4M3 with real = fp8 * scale, as round_fp8 makes it.

A kernel may start while the one before still runs (programmatic dependent launch), and waits before it touches what others
write. All of them wait, so that whatever ran earlier has finished, too. `rope`, a step's first, starts no earlier than that:
weights, positions and older keys and values may be read without waiting.
"""

import functools
from math import gcd
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
    VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
except ImportError:  # on a CPU nothing here runs; the definitions below still have to load
    triton, tl, VERSION = None, SimpleNamespace(constexpr=float), (0, 0)

    def jit(function):
        return function


E4M3 = torch.float8_e4m3fn
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # a running maximum's start; -inf would make NaN of -inf - -inf
LANES_LAST = tl.constexpr(VERSION >= (3, 7))  # a load's threads lie along its last dimensions first, not its first ones
PAIRS_APART = tl.constexpr(VERSION >= (3, 8))  # of int4's operands a thread has pairs of neighbours, not four
USE_PDL = True  # programmatic dependent launch, where the GPU has it


def available(device: torch.device) -> bool:
    """Whether these kernels run on `device`: CUDA with Triton installed, or anything under Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or triton.knobs.runtime.interpret)


@functools.cache
def _has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(kernel, grid: tuple[int, ...], *args, early: bool = True, **constants):
    pdl = USE_PDL and _has_pdl(args[0].device)
    options = {"launch_pdl": True} if pdl and early else {}
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


class IntGemv(NamedTuple):
    """A program owns block_n outputs of up to 8 rows. Each of its warps, and of those of the `split` programs that own the
    same, adds up a share of the columns, block_k of them at a time. With `ahead` the next ones are loaded before these are
    multiplied; without it the compiler puts loads behind products, which takes fewer registers."""

    block_n: int
    block_k: int
    num_warps: int
    split: int = 1
    ahead: bool = False


class AttentionConfig(NamedTuple):
    """block_s slots at a time; by_sums: float32 sums instead of tensor cores, where each key head has one query. The
    first `ahead` slots go to L2 while the kernel before still runs."""

    block_s: int
    num_warps: int
    num_stages: int
    by_sums: bool
    ahead: int = 0


def linear_config(m: int, n: int, k: int, dtype: torch.dtype, group: int = 0) -> Gemv | Skinny | IntGemv | None:
    """How `linear_rows` multiplies m rows by a weight [n, k] of `dtype`, int32 in an IntWeight's groups; None for cuBLAS.

    What was fastest in whole steps of gemma-7b and gemma-2b on an H200.
    """
    if dtype == torch.int32:
        return None if m > 64 or k % 128 else _int_config(m, n, k, group)
    if dtype == torch.int8 and m <= 8 and k % 64 == 0:
        return _int_config(m, n, k, group)
    if m == 1 and dtype != torch.int8:
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
    split = _shares_of_columns(n, k, block_n, 1.5 * SMS if m <= 16 else 0.7 * SMS, 4 * block_k)
    return Skinny(max(16, _power_of_2(m)), block_n, block_k, split, num_warps=4, num_stages=6)


def _shares_of_columns(n: int, k: int, block_n: int, wanted: float, least: int) -> int:
    """A power of 2 up to 8 that brings `wanted` programs, if that leaves each at least `least` columns."""
    split = 1
    while -(-n // block_n) * split < wanted and split < 8 and k >= 2 * split * least:
        split *= 2
    return split


def _int_config(m: int, n: int, k: int, group: int) -> Skinny | IntGemv:
    """`linear_config` for an IntWeight whose K is a multiple of 64, or in groups of 128."""
    if m > 8:
        block_m, block_n = max(16, _power_of_2(m)), 64 if k > 8192 else 128
        split = _shares_of_columns(n, k, block_n, 1.5 * SMS, least=512)
        return Skinny(block_m, block_n, block_k=128, split=split, num_warps=4, num_stages=3)
    if n > 16384:
        if m > 1:
            return IntGemv(block_n=32, block_k=256, num_warps=1 if group >= 128 or n > 100_000 else 2)
        if group >= 128:
            return IntGemv(block_n=32, block_k=256, num_warps=1, ahead=True)
        return IntGemv(block_n=16, block_k=512, num_warps=1 if group else 2, ahead=group > 0)
    if k > 8192 and m == 1:
        return IntGemv(block_n=16, block_k=512 if group else 256, num_warps=4, split=2, ahead=True)
    if k > 8192 and group >= 128:
        return IntGemv(block_n=32, block_k=256, num_warps=4, split=4)
    if k <= 8192 <= n:
        if m == 1 and group >= 128:
            return IntGemv(block_n=16, block_k=512, num_warps=2, ahead=True)
        return IntGemv(block_n=32 if group or m > 1 else 16, block_k=256, num_warps=4, ahead=m == 1 and group > 0)
    if m == 1 and not group:
        return IntGemv(block_n=16, block_k=512, num_warps=4, ahead=True)
    return IntGemv(block_n=16, block_k=256, num_warps=4, split=2, ahead=m == 1)


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
    return AttentionConfig(block_s=8, num_warps=1, num_stages=2, by_sums=True, ahead=64)


def attention_splits(pairs: int, slots: int, block_s: int, num_warps: int = 4) -> int:
    """Programs that share one row and key head, of which there are `pairs`: enough of them to fill the GPU."""
    programs = SMS * 4 // num_warps if pairs < SMS else SMS
    return min(_power_of_2(-(-programs // pairs)), _power_of_2(-(-slots // (2 * block_s))), 64)


def _row_warps(n: int) -> int:
    return 1 if n <= 256 else 4 if n <= 2048 else 8


COMBINE_BLOCK = 32
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
def _normed(x, inverse_rms, weight, dtype: tl.constexpr):
    x = x * inverse_rms
    x = x + x * weight.to(tl.float32)
    return x.to(dtype).to(tl.float32)


@jit
def _constant(ptr):
    """What ptr points to, if it is not None. Kernels load constants before their wait: at its end a program would wait for
    memory once more."""
    value = None
    if ptr is not None:
        value = tl.load(ptr)
    return value


@jit
def _quantised(x, scale):
    # div_rn: a plain division is not correctly rounded, and PyTorch's is
    x = x * tl.div_rn(1.0, scale)
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@jit
def _store(ptrs, y, scale, mask, dtype: tl.constexpr):
    """In `dtype` or, with a scale, in E4M3."""
    if scale is not None:
        tl.store(ptrs, _quantised(y, scale), mask=mask)
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
    scale = _constant(scale_ptr)
    if post_ptr is not None:
        post = tl.load(post_ptr + columns, mask=mask, other=0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    _wait(PDL)
    x = tl.load(x_ptr + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = _output(y_ptr, row, rows, columns, mask, N, PARTS, dtype)
        if post_ptr is not None:
            y = _normed(y, _inverse_rms(y, N, eps), post, dtype)
        x = (x + y).to(dtype).to(tl.float32)
        tl.store(x_new_ptr + row * N + columns, x.to(dtype), mask=mask)
    if weight_ptr is not None:
        h = _normed(x, _inverse_rms(x, N, eps), weight, dtype)
        _store(h_ptr + row * N + columns, h, scale, mask, dtype)


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
    scale = _constant(scale_ptr)
    _wait(PDL)
    gate = _output(y_ptr, row, rows, columns, mask, 2 * F, PARTS, dtype)
    up = _output(y_ptr, row, rows, columns + F, mask, 2 * F, PARTS, dtype)
    _store(h_ptr + row * F + columns, _geglu(gate, up, dtype), scale, mask, dtype)


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
    scale = _constant(scale_ptr)
    _wait(PDL)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    _store(y_ptr + offsets, (x * factor).to(dtype).to(tl.float32), scale, mask, dtype)


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
        _rope_kernel,
        grid,
        *(position, frequencies[0], frequencies[-1], out, m),
        D=d,
        BLOCK=_power_of_2(d),
        num_warps=4,
        early=False,
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
        x = _normed(x, inverse_rms, tl.load(norm_ptr + d, mask=d < D, other=0.0), dtype)
        y = _normed(y, inverse_rms, tl.load(norm_ptr + partner, mask=d < D, other=0.0), dtype)
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
def _block(k_ptr, v_ptr, base, s, end, slot, lane, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys and values [BLOCK_S, BLOCK_D] of slots s + lane, and which of them are in use, the token's own not."""
    used = (s + lane < end) & (s + lane != slot)
    mask = used[:, None] & (d < D)[None, :] if D < BLOCK_D else used[:, None]
    offsets = base + s * D + lane[:, None] * D + d[None, :]
    return tl.load(k_ptr + offsets, mask=mask, other=0.0), tl.load(v_ptr + offsets, mask=mask, other=0.0), used


@jit
def _place(position_ptr, S, K: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr):
    """Of an attention program of (row, key head, split): the row's slot, where the head begins in the caches, and the
    program's share."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    start, end = _share(position, S, BLOCK_S, SPLITS)
    return (position % S).to(tl.int32), (row * K + tl.program_id(1)) * S * D, start, end


@jit
def _fetch_slots(k_ptr, v_ptr, base, start, end, D: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr):
    """AHEAD slots on their way to L2."""
    if PDL and AHEAD > 0:
        PIECE: tl.constexpr = 1024
        ITEM: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth // 8
        first = base + start * D
        count = tl.minimum(end - start, AHEAD) * (D * ITEM) // PIECE
        _fetch(k_ptr + first, PIECE, count, PIECE, PDL)
        _fetch(v_ptr + first, PIECE, count, PIECE, PDL)


@jit
def _own(
    qkv_ptr,
    rope_ptr,
    k_norm_ptr,
    eps,
    rows,
    d,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    dtype: tl.constexpr,
):
    """The rotation at the row's position, and the row's new key and value."""
    WIDTH: tl.constexpr = (G + 2) * K * D
    row = tl.program_id(0).to(tl.int64)
    in_head = d < D
    cos = tl.load(rope_ptr + row * D + d, mask=in_head, other=0.0)
    sin = tl.load(rope_ptr + (rows + row) * D + d, mask=in_head, other=0.0)
    head = (G * K + tl.program_id(1)) * D
    k = _rotated(qkv_ptr, row, rows, head, d, in_head, cos, sin, k_norm_ptr, eps, WIDTH, D, 0, PARTS, dtype)
    v = _output(qkv_ptr, row, rows, head + K * D + d, in_head, WIDTH, PARTS, dtype)
    return cos, sin, k, v


@jit
def _keep_own(k, v, k_ptr, v_ptr, own, inverse_k_scale, inverse_v_scale, d, D: tl.constexpr, LIMIT: tl.constexpr):
    """The new key and value as the caches keep them, which the first split writes behind `own`, and which never come from
    there. What is loaded after this would wait for it: a load may be of what was stored."""
    mask = d < tl.where(tl.program_id(2) == 0, D, 0)
    k = _keep(k, k_ptr, own + d, inverse_k_scale, mask, LIMIT)
    v = _keep(v, v_ptr, own + d, inverse_v_scale, mask, LIMIT)
    return k, v


@jit
def _attend_by_sums(m, l, acc, q, k, v, used, scale, softcap):
    """One more block for a softmax of each lane: its maximum m, sum l and acc, to which another block is added."""
    scores = _log2_scores(tl.sum(q[None, :] * k.to(tl.float32), axis=1), scale, softcap)
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
    loop exchanges nothing between warps; they are joined at the end. The first block is loaded before the wait."""
    _start(PDL)
    WIDTH: tl.constexpr = 3 * K * D
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    in_head = d < D
    output_scale = _constant(scale_ptr)
    slot, base, start, end = _place(position_ptr, S, K, D, BLOCK_S, SPLITS)
    k, v, used = _block(k_ptr, v_ptr, base, start, end, slot, lane, d, D, BLOCK_D)
    _fetch_slots(k_ptr, v_ptr, base, start + BLOCK_S, end, D, AHEAD, PDL)
    _wait(PDL)
    cos, sin, own_k, own_v = _own(qkv_ptr, rope_ptr, k_norm_ptr, eps, rows, d, K, G, D, PARTS, dtype)
    q = _rotated(qkv_ptr, row, rows, head * D, d, in_head, cos, sin, q_norm_ptr, eps, WIDTH, D, 0, PARTS, dtype)
    own_k, own_v = _keep_own(own_k, own_v, k_ptr, v_ptr, base + slot * D, inverse_k_scale, inverse_v_scale, d, D, LIMIT)
    own = (lane == 0) & (tl.program_id(2) == 0)
    m = tl.where(own, _log2_scores(tl.sum(q * own_k, axis=0), scale, softcap), LOWEST)
    l = tl.where(own, 1.0, 0.0)
    acc = tl.where(own[:, None], own_v[None, :], 0.0)
    m, l, acc = _attend_by_sums(m, l, acc, q, k, v, used, scale, softcap)
    for s in tl.range(start + BLOCK_S, end, BLOCK_S, num_stages=STAGES):
        k, v, used = _block(k_ptr, v_ptr, base, s, end, slot, lane, d, D, BLOCK_D)
        m, l, acc = _attend_by_sums(m, l, acc, q, k, v, used, scale, softcap)
    m_all = tl.max(m, axis=0)
    weight = tl.exp2(m - m_all)
    l_all = tl.sum(l * weight, axis=0)
    y = tl.sum(acc * weight[:, None], axis=0)
    if SPLITS == 1:
        _store(
            out_ptr + (row * K + head) * D + d,
            (y / l_all * v_scale).to(dtype).to(tl.float32),
            output_scale,
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
    output_scale = _constant(scale_ptr)
    slot, base, start, end = _place(position_ptr, S, K, D, BLOCK_S, SPLITS)
    _fetch_slots(k_ptr, v_ptr, base, start, end, D, AHEAD, PDL)
    _wait(PDL)
    cos, sin, own_k, own_v = _own(qkv_ptr, rope_ptr, k_norm_ptr, eps, rows, d, K, G, D, PARTS, dtype)
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
    own_k, own_v = _keep_own(own_k, own_v, k_ptr, v_ptr, base + slot * D, inverse_k_scale, inverse_v_scale, d, D, LIMIT)
    first = tl.program_id(2) == 0
    m = tl.where(first, _log2_scores(tl.sum(q * own_k[None, :], axis=1), scale, softcap), LOWEST)
    l = tl.where(first, 1.0, 0.0) + tl.zeros([BLOCK_G], tl.float32)
    acc = tl.where(first, own_v[None, :], 0.0) + tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    query = q.to(factor)
    for s in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        k, v, used = _block(k_ptr, v_ptr, base, s, end, slot, lane, d, D, BLOCK_D)
        scores = _log2_scores(tl.dot(query, tl.trans(k.to(factor)), input_precision="ieee"), scale, softcap)
        scores = tl.where(used[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(factor), v.to(factor), acc * alpha[:, None], input_precision="ieee")
        m = m_new
    if SPLITS == 1:
        offsets = heads + row * G * K * D + d[None, :]
        _store(out_ptr + offsets, (acc / l[:, None] * v_scale).to(dtype).to(tl.float32), output_scale, q_mask, dtype)
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
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    _start(PDL)
    row_head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, SPLITS) * entries + row_head
    scale = _constant(scale_ptr)
    _wait(PDL)
    m = tl.load(stats_ptr + entry * 2)
    l = tl.load(stats_ptr + entry * 2 + 1)
    acc = tl.load(acc_ptr + entry[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    weight = tl.exp2(m - tl.max(m, axis=0))
    acc = tl.where((l > 0)[:, None], acc, 0.0)  # a share without slots has written no sums
    y = tl.sum(acc * weight[:, None], axis=0) / tl.sum(l * weight, axis=0)
    _store(out_ptr + row_head * D + d, (y * v_scale).to(dtype).to(tl.float32), scale, d < D, dtype)


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
    splits = splits or attention_splits(m * kv_heads, slots, config.block_s, config.num_warps)
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
            (m * n_heads, -(-d // COMBINE_BLOCK)),
            *(acc, stats, input_scale, out, v_scale, m * n_heads),
            D=d,
            BLOCK=COMBINE_BLOCK,
            SPLITS=splits,
            dtype=_triton_dtype(dtype),
            num_warps=_row_warps(splits * COMBINE_BLOCK),
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
    first = tl.program_id(0) * BLOCK_N
    if GEGLU:  # gate and up in turn: rows n and n + OUT; what is read twice is not stored
        i = tl.arange(0, 2 * BLOCK_N)
        row = tl.minimum(first + i // 2, OUT - 1) + i % 2 * OUT
    else:
        row = tl.minimum(first + tl.arange(0, BLOCK_N), OUT - 1)
    acc = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
    rows_ptr = weight_ptr + row.to(tl.int64) * IN
    columns = tl.arange(0, BLOCK_K)
    early = ()
    for k in tl.static_range(0, EARLY * BLOCK_K, BLOCK_K):
        mask = k + columns < IN
        early = early + (tl.load(rows_ptr[:, None] + (k + columns)[None, :], mask=mask[None, :], other=0.0),)
    input_scale = _constant(input_scale_ptr)
    weight_scale = _constant(weight_scale_ptr)
    next_scale = _constant(next_scale_ptr)
    _wait(PDL)
    for tile in tl.static_range(EARLY):
        k = tile * BLOCK_K
        x = tl.load(x_ptr + k + columns, mask=k + columns < IN, other=0.0)
        acc += early[tile].to(tl.float32) * x.to(tl.float32)[None, :]
    for k in tl.range(EARLY * BLOCK_K, IN, BLOCK_K, num_stages=STAGES):
        mask = k + columns < IN
        weight = tl.load(rows_ptr[:, None] + (k + columns)[None, :], mask=mask[None, :], other=0.0)
        x = tl.load(x_ptr + k + columns, mask=mask, other=0.0)
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, axis=1)
    if input_scale is not None:
        y *= input_scale * weight_scale
    y = y.to(dtype).to(tl.float32)
    if GEGLU:
        gate, up = tl.split(tl.reshape(y, [BLOCK_N, 2]))
        y = _geglu(gate, up, dtype)
    n = first + tl.arange(0, BLOCK_N)
    _store(out_ptr + n, y, next_scale, n < OUT, dtype)


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

    For an E4M3 weight, x is E4M3 and input_scale and weight_scale (0-dim float32) are given. With `geglu`, weight is gate
    [F, K] over up [F, K], and gelu(gate) * up [1, F] is returned, in E4M3 if next_scale is given.
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
def _store_share(out_ptr, y, scale, n, m, rows, OUT: tl.constexpr):
    """y [outputs n, rows m] of a program's share of the columns."""
    offsets = (tl.program_id(1) * rows + m[None, :]).to(tl.int64) * OUT + n[:, None]
    _store(out_ptr + offsets, y, scale, (n < OUT)[:, None] & (m < rows)[None, :], out_ptr.dtype.element_ty)


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
    input_scale = _constant(input_scale_ptr)
    next_scale = _constant(next_scale_ptr)
    if input_scale_ptr is not None:
        weight_scale = tl.load(weight_scale_ptr)
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
        scale = input_scale * weight_scale
        acc *= scale
        if GEGLU:
            up *= scale
    elif weight_scale_ptr is not None:
        # int8's, of each row: not among the constants, since the loop needs the registers
        acc *= tl.load(weight_scale_ptr + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
        if GEGLU:
            up *= tl.load(weight_scale_ptr + n + OUT, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
    if GEGLU:
        acc = _geglu(acc.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    _store_share(out_ptr, acc, next_scale, n, m, rows, OUT)


def _shares(x: Tensor, n: int, config: Skinny | IntGemv, dtype: torch.dtype) -> tuple[int, int, Tensor]:
    """Tiles of a program, in an IntGemv of each warp, programs that share n outputs of x [M, K], and memory for those:
    [M, N] in `dtype`, or float32 partial sums [programs, M, N]."""
    m, k = x.shape
    block_k = config.block_k * (config.num_warps if isinstance(config, IntGemv) else 1)
    tiles = -(-k // (block_k * config.split))
    split = -(-k // (block_k * tiles))  # without shares that would be empty
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
    config: Gemv | Skinny | IntGemv | None = None,
) -> Tensor:
    """x @ weight.T [M, N] in `dtype` (None: x's) of x [M, K] and weight [N, K], by whatever is fastest for the shape.

    Both are in bf16 or float32, or in E4M3 with input_scale and weight_scale (0-dim float32), or weight is an IntWeight
    and `dtype` x's. With `partials`, the result may be float32 partial sums [P, M, N] instead: `add_norm`, `geglu` and
    `decode_attention` take those.
    """
    m, dtype = len(x), dtype or x.dtype
    config = config or linear_config(m, *weight.shape, weight.dtype, getattr(weight, "group", 0))
    if isinstance(config, Skinny | IntGemv) and not partials:
        config = config._replace(split=1)
    if isinstance(weight, IntWeight):
        if config is None or dtype != torch.bfloat16:  # made in each call; of few rows unrounded, as by the kernels
            wide = torch.float32 if m <= 8 else dtype
            return F.linear(x.to(wide), dequantise(weight, wide)).to(dtype)
        if weight.group or isinstance(config, IntGemv):
            return int_matmul(x, weight, config=config)
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
    config = linear_config(len(x), *weight.shape, weight.dtype, getattr(weight, "group", 0))
    if config is None or (isinstance(weight, IntWeight) and dtype != torch.bfloat16):
        return geglu(linear_rows(x, weight, input_scale, weight_scale, dtype, partials=True), dtype, next_scale)
    if isinstance(config, Gemv):  # half as many outputs a program, as each has two rows
        config = config._replace(block_n=max(1, config.block_n // 2))
    elif isinstance(config, IntGemv):
        return int_matmul(x, weight, True, config)
    elif weight.dtype == torch.int32:
        return int_matmul(x, weight, True, config._replace(block_n=64))
    else:
        config = config._replace(block_n=64, num_stages=4 if len(x) <= 16 and weight.shape[1] > 2048 else 3)
    if isinstance(weight, IntWeight):
        weight, weight_scale = weight.packed, weight.scale
    by = gemv if isinstance(config, Gemv) else skinny_matmul
    return by(x, weight, input_scale, weight_scale, dtype, True, next_scale, config)


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers with integer weights


class IntWeight(NamedTuple):
    """A weight [N, K] in 8 or 4 bits. int8: packed [N, K] int8 and scale [N] bf16, real = packed * scale. int4: packed
    [N, K / 8] int32 and scale [N, K / group, 2] bf16, which holds scale and zero: real = (q - zero) * scale with q from 0
    to 15 and zero in sixteenths, which leaves q - zero exact in bf16. `group`, a multiple of 32, is the number of
    neighbours in a row that share them.

    W words hold 8 W columns, with W 16, or less where 128 does not divide K. Bits 4p to 4p + 3 of word w are column
    2 W p + 2 w of them, bits 4p + 16 to 4p + 19 the next: a pair of bf16 is made of a word at once.
    """

    packed: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, n: int, k: int, group: int = 0) -> "IntWeight":
        """int8 if group is 0; on torch's default device."""
        if not group:
            return cls(torch.empty(n, k, dtype=torch.int8), torch.empty(n, dtype=torch.bfloat16))
        scale = torch.empty(n, k // group, 2, dtype=torch.bfloat16)
        return cls(torch.empty(n, k // 8, dtype=torch.int32), scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.packed.shape
        return n, 8 * k if self.dtype == torch.int32 else k

    @property
    def group(self) -> int:
        return self.shape[1] // self.scale.shape[1] if self.dtype == torch.int32 else 0


def _int4_words(k: int) -> int:
    """W of IntWeight, for k columns, a multiple of 32."""
    return min(16, (k & -k) // 8)


def _int4_shifts(device: torch.device) -> Tensor:
    """[4, 1, 2] int32: of each p, and of the first and second of two columns."""
    return torch.arange(8, dtype=torch.int32, device=device).view(2, 1, 4).permute(2, 1, 0) * 4


def pack_int4(q: Tensor) -> Tensor:
    """[N, K / 8] int32 of q [N, K], integers from 0 to 15, K a multiple of 32: IntWeight's layout."""
    q = q.unflatten(1, (-1, 4, _int4_words(q.shape[1]), 2)).int()
    return (q << _int4_shifts(q.device)).sum((2, 4), dtype=torch.int32).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """[N, K] int32, from 0 to 15, of `pack_int4`'s result."""
    words = packed.unflatten(1, (-1, 1, _int4_words(8 * packed.shape[1]), 1))
    return (words >> _int4_shifts(packed.device) & 15).flatten(1)


def dequantise_reference(weight: IntWeight, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`, rounded once."""
    packed, scale = weight
    if not weight.group:
        return packed.to(dtype) * scale.to(dtype)[:, None]
    scale, zero = scale.to(dtype)[..., None].unbind(2)
    return ((unpack_int4(packed).to(dtype).unflatten(1, (-1, weight.group)) - zero) * scale).flatten(1)


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
    out_ptr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    _start(PDL)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    out_ptr += row * IN
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    _wait(PDL)
    if GROUP == 0:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(weight_ptr + row * IN + columns, mask=columns < IN, other=0).to(tl.float32)
        tl.store(out_ptr + columns, (y * tl.load(scale_ptr + row).to(tl.float32)).to(dtype), mask=columns < IN)
    else:
        word = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        mask = word < IN // 8
        words = tl.load(weight_ptr + row * (IN // 8) + word, mask=mask, other=0)
        for i in tl.static_range(8):
            columns = word // WORDS * (8 * WORDS) + i % 4 * (2 * WORDS) + word % WORDS * 2 + i // 4
            pair = tl.load(scale_ptr + row * (IN // GROUP) + columns // GROUP, mask=mask, other=0)
            scale, zero = _int4_scale(pair)
            y = (((words >> (4 * i)) & 15).to(tl.float32) - zero) * scale
            tl.store(out_ptr + columns, y.to(dtype), mask=mask)


def dequantise(weight: IntWeight, dtype: torch.dtype) -> Tensor:
    """`dequantise_reference`."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.packed.device)
    block = min(DEQUANTISE_BLOCK, max(32, _power_of_2(k)))
    _launch(
        _dequantise_kernel,
        (n, -(-k // block)),
        *(weight.packed, weight.scale.view(torch.int32) if weight.group else weight.scale, out),
        IN=k,
        GROUP=weight.group,
        WORDS=_int4_words(k),
        BLOCK=block,
        num_warps=DEQUANTISE_WARPS,
    )
    return out


@jit
def _int4_scale(pair):
    """(scale, zero) of their bits."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@jit
def _bf16_pairs(words):
    """[..., 2]: the two bf16 that lie in an int32."""
    low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
    return tl.join(low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True))


@jit
def _along(x, D: tl.constexpr):
    """x [N] along dimension D of [4, 8, W, B, C]: those are threads (two), warps and registers (two). The integer GEMV is
    written so that its loads leave everything where its products want it, in Triton's own choice of layouts; with
    LANES_LAST this takes [B, W, 8, 4, C], and what follows says [4, 8, W, B, C] of both."""
    AT: tl.constexpr = 3 - D if LANES_LAST else D
    if AT == 0:
        y = x[:, None, None, None, None]
    elif AT == 1:
        y = x[None, :, None, None, None]
    elif AT == 2:
        y = x[None, None, :, None, None]
    else:
        y = x[None, None, None, :, None]
    return y


@jit
def _int_rows(block, g, OUT: tl.constexpr, GEGLU: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row g of the program's block of eight; with GEGLU eight rows of gate, and then the same of up: a thread has both."""
    if GEGLU:
        n = tl.program_id(0) * (BLOCK_N // 2) + block // 2 * 8 + g
        row = tl.minimum(n, OUT - 1) + block % 2 * OUT
    else:
        row = tl.minimum(tl.program_id(0) * BLOCK_N + block * 8 + g, OUT - 1)
    return row


@jit
def _int_tile(
    weight_ptr,
    scale_ptr,
    tile,
    end,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PERIOD: tl.constexpr,
):
    """CHUNKS times 16 words of the weight's rows, if the warps' tiles [W, 1, 1] are before `end`: words [4, 8, W, B, 4] of
    each, of `_int_rows` b and g at [:, g, :, b]. Of int4, for each PERIOD units of 32 columns scale and zero
    [4, 8, W, B, 2], too, where [t, ..., j] is what a product's column 2t + j needs, which has the slots of `_int_x`; [..., 1]
    where they do not depend on j. The order of dimensions is that of threads, warps and registers."""
    BOTH: tl.constexpr = 2 if GROUP == 32 and SLOTS == 8 else 1
    COUNT: tl.constexpr = IN // (128 if GROUP else 64)
    t, g, block = _along(tl.arange(0, 4), 0), _along(tl.arange(0, 8), 1), _along(tl.arange(0, BLOCK_N // 8), 3)
    j, four = tl.arange(0, BOTH), tl.arange(0, 4)
    row = _int_rows(block, g, OUT, GEGLU, BLOCK_N).to(tl.int64)
    words, pairs = (), ()
    for c in tl.static_range(CHUNKS):
        ptrs = weight_ptr + row * (COUNT * 16) + (tile * CHUNKS + c) * 16 + 4 * t + four
        words = words + (tl.load(ptrs, mask=_before(tile, c, end, COUNT, CHUNKS), other=0),)
    for first in tl.static_range(0, 4 * CHUNKS if GROUP else 0, PERIOD):
        unit = first + (2 * t + j) // (8 // SLOTS)
        ptrs = scale_ptr + row * (IN // GROUP) + (tile * (4 * CHUNKS) + unit) // (GROUP // 32)
        pairs = pairs + (tl.load(ptrs, mask=_before(tile, unit // 4, end, COUNT, CHUNKS), other=0),)
    return words, pairs


@jit
def _before(tile, chunk, end, COUNT: tl.constexpr, CHUNKS: tl.constexpr):
    """Whether tiles are before `end`, and have such chunks, of COUNT in all."""
    if COUNT % CHUNKS == 0:  # they have all
        chunk = 0 * chunk
    return tile * CHUNKS + chunk < tl.where(tile < end, COUNT, 0)


@jit
def _int_x(x_ptr, rows, tile, end, IN: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr):
    """The warps' tiles of x, two numbers in an int32: [4, 8, W, 1, 4] for each SLOTS units of 32 columns. A product has 8
    columns: a unit takes 8 / SLOTS of them, for as many rows, and SLOTS units are loaded at once. Of the four, the first two
    are for its first product."""
    UNITS: tl.constexpr = 4 if GROUP else 2  # of a chunk
    COUNT: tl.constexpr = IN // (32 * UNITS)
    t, n = _along(tl.arange(0, 4), 0), _along(tl.arange(0, 8), 1)
    slot, m, four = n // (8 // SLOTS), n % (8 // SLOTS), tl.arange(0, 4)
    xs = ()
    for first in tl.static_range(0, UNITS * CHUNKS, SLOTS):
        unit = first + slot
        mask = m < tl.where(_before(tile, unit // UNITS, end, COUNT, CHUNKS), rows, 0)
        unit = tile * (CHUNKS * UNITS) + unit
        if GROUP:
            offsets = unit * 16 + 4 * t
        else:
            offsets = unit // 2 * 32 + unit % 2 * 4 + 8 * t
        x = tl.load(x_ptr + m * (IN // 2) + offsets + four, mask=mask, other=0)
        if not GROUP:  # columns 0 and 2, 1 and 3, as a word's bytes make pairs
            low, high = tl.split(tl.reshape(x, x.shape[:4] + [2, 2]))
            pairs = tl.join((low & 65535) | (high << 16), ((low >> 16) & 65535) | (high & -65536))
            x = tl.reshape(pairs, x.shape)
        xs = xs + (x,)
    return xs


@jit
def _int_operands(x, unit: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr, FAST: tl.constexpr):
    """x of `unit`, multiplied as _int_gemv_kernel says, and zero in the slots of other units, as the operands [W, 16, 8] of
    its two products."""
    other = _along(tl.arange(0, 8), 1) // (8 // SLOTS) - unit % SLOTS
    # Twice 2**76 or 2**80 where `other` is 0. (A comparison would give the operands another layout.)
    factor = ((other * other - 1) >> 31) & (0x65806580 if GROUP and unit % 2 else 0x67806780)
    factor = factor + tl.zeros_like(x)
    if FAST:
        x = tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [x, factor], tl.int32, True, 1)
        x = _bf16_pairs(x)
    else:
        x = (_bf16_pairs(x).to(tl.float32) * _bf16_pairs(factor).to(tl.float32)).to(tl.bfloat16)
    first, second = tl.split(tl.permute(tl.reshape(x, x.shape[:4] + [2, 4]), [0, 1, 2, 3, 5, 4]))
    return tl.permute(_int_operand(first, GROUP), [0, 2, 1]), tl.permute(_int_operand(second, GROUP), [0, 2, 1])


@jit
def _int_halves(words, unit: tl.constexpr, GROUP: tl.constexpr, FAST: tl.constexpr):
    """A unit of a chunk's words [4, 8, W, B, 4], for its two products: the bits [4, 8, W, B, 2] of four numbers each."""
    SHAPE: tl.constexpr = words.shape[:4] + [2, 2]
    if GROUP:  # of two words the same nibbles
        words = (words >> (unit % 4 // 2 * 8)) & (0x00F000F0 if unit % 2 else 0x000F000F)
        first, second = tl.split(tl.permute(tl.reshape(words, SHAPE), [0, 1, 2, 3, 5, 4]))
    else:  # of one word even and odd bytes, which are q + 128
        units = tl.split(tl.permute(tl.reshape(words, SHAPE), [0, 1, 2, 3, 5, 4]))
        words = units[unit % 2]
        if FAST:  # two instructions instead of four
            even, odd = tl.inline_asm_elementwise(
                """{
                .reg .b32 sign, high;
                mov.b32 sign, 0x00800080;
                shr.u32 high, $2, 8;
                lop3.b32 $0, $2, 0x00ff00ff, sign, 0x6a;
                lop3.b32 $1, high, 0x00ff00ff, sign, 0x6a;
                }""",
                "=&r,=r,r",
                [words],
                dtype=(tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            even, odd = (words & 0x00FF00FF) ^ 0x00800080, ((words >> 8) & 0x00FF00FF) ^ 0x00800080
        first, second = tl.split(tl.permute(tl.join(even, odd), [0, 1, 2, 3, 5, 4]))
    return first, second


@jit
def _by_rows(x):
    """[4, 8, W, B, C] as [W, 8 B, 4 C]."""
    x = tl.permute(x, [1, 0, 2, 3, 4] if LANES_LAST else [2, 3, 1, 0, 4])
    SHAPE: tl.constexpr = [x.shape[0], 8 * x.shape[1], 4 * x.shape[4]]
    return tl.reshape(x, SHAPE)


@jit
def _int_operand(x, GROUP: tl.constexpr):
    """[4, 8, W, B, 4] as [W, 8 B, 16]; a product does not mind the order of its 16 columns."""
    if not (GROUP and PAIRS_APART):
        x = _by_rows(x)
    else:
        SPLIT: tl.constexpr = x.shape[:4] + [2, 2]
        x = tl.permute(tl.reshape(x, SPLIT), [1, 0, 2, 4, 3, 5] if LANES_LAST else [2, 3, 1, 4, 0, 5])
        SHAPE: tl.constexpr = [x.shape[0], 8 * x.shape[1], 16]
        x = tl.reshape(x, SHAPE)
    return x


@jit
def _int_bits(words, GROUP: tl.constexpr):
    """[4, 8, W, B, 2] as [W, 8 B, 16] in bf16."""
    SHAPE: tl.constexpr = words.shape[:4] + [4]
    return _int_operand(tl.reshape(_bf16_pairs(words), SHAPE), GROUP)


@jit
def _int_gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    rows,
    tiles,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Up to 8 rows x in bf16, `tiles` times CHUNKS times 16 words of the weight's rows a warp.

    Nothing goes through shared memory before the warps' sums do: a thread loads what the tensor cores want of it, the next
    tile while this one is multiplied, the first weights while the kernel before still runs. What would cost most is to make
    numbers of integers. But 16 bits that are 0 except for the lowest eight are the bf16 u * 2**-133 as they stand (denormal
    ones, and the binade after, whose steps are the same). So x is multiplied, by 2**80, which |x| < 2**47 allows, and by
    2**76 for nibbles in bits 4 to 7. The sum of (q - zero) * x is that of q * x less zero times the sum of x, which a
    product by ones gives to all; int8's zero is 128, and that product is by -128.
    """
    _start(PDL)
    UNITS: tl.constexpr = 4 if GROUP else 2  # of a chunk
    first = (tl.program_id(1) * WARPS + _along(tl.arange(0, WARPS), 2)) * tiles
    end = tl.minimum(first + tiles, tl.cdiv(IN, 32 * UNITS * CHUNKS))
    acc = tl.zeros([WARPS, BLOCK_N, 8], tl.float32)
    y, total = acc, acc
    PERIOD: tl.constexpr = max(SLOTS, min(GROUP // 32, 4 * CHUNKS))  # units whose sums are scaled at once
    words, pairs = _int_tile(weight_ptr, scale_ptr, first, end, OUT, IN, GROUP, GEGLU, BLOCK_N, CHUNKS, SLOTS, PERIOD)
    SHAPE: tl.constexpr = words[0].shape[:4] + [2]
    ones = tl.full(SHAPE, 0x00010001 if GROUP else -0x7F7F7F80, tl.int32)
    i = tl.arange(0, BLOCK_N)
    if not GROUP:
        scale = tl.load(scale_ptr + _int_rows(i // 8, i % 8, OUT, GEGLU, BLOCK_N))
    _wait(PDL)
    xs = _int_x(x_ptr, rows, first, end, IN, GROUP, CHUNKS, SLOTS)
    for count in tl.range(tiles, num_stages=1):
        tile = first + count + 1
        if not AHEAD or count + 1 < tiles:  # a branch is what keeps loads in front
            next_words, next_pairs = _int_tile(
                weight_ptr, scale_ptr, tile, end, OUT, IN, GROUP, GEGLU, BLOCK_N, CHUNKS, SLOTS, PERIOD
            )
            next_xs = _int_x(x_ptr, rows, tile, end, IN, GROUP, CHUNKS, SLOTS)
        else:
            next_words, next_pairs, next_xs = words, pairs, xs
        for unit in tl.static_range(UNITS * CHUNKS):
            x = _int_operands(xs[unit // SLOTS], unit, SLOTS, GROUP, PDL)
            halves = _int_halves(words[unit // UNITS], unit, GROUP, PDL)
            if GROUP and unit % PERIOD == 0:
                y = tl.zeros([WARPS, BLOCK_N, 8], tl.float32)
                total = tl.zeros([WARPS, BLOCK_N, 8], tl.float32)
            for half in tl.static_range(2):
                y = tl.dot(_int_bits(halves[half], GROUP), x[half], y)
            if unit % SLOTS == 0:  # of all slots at once
                x = _int_operands(xs[unit // SLOTS], unit, 1, GROUP, PDL)
                for half in tl.static_range(2):
                    total = tl.dot(_int_bits(ones << (unit % 2 * 4 if GROUP else 0), GROUP), x[half], total)
            if GROUP and unit % PERIOD == PERIOD - 1:
                pair = tl.broadcast_to(pairs[unit // PERIOD], SHAPE)
                scale, zero = _int4_scale(_by_rows(pair))
                acc += scale * (y - zero * total)
        words, pairs, xs = next_words, next_pairs, next_xs
    if not GROUP:
        acc = y + total
    acc = tl.sum(acc, axis=0)
    acc = tl.sum(tl.reshape(acc, [BLOCK_N, SLOTS, 8 // SLOTS]), axis=1) * 2.0**53  # 133 - 80
    if not GROUP:
        acc *= scale.to(tl.float32)[:, None]
    if GEGLU:
        i = tl.arange(0, BLOCK_N // 2)
        acc = tl.reshape(acc.to(tl.bfloat16).to(tl.float32), [BLOCK_N // 16, 2, 8, 8 // SLOTS])
        gate, up = tl.split(tl.permute(acc, [0, 2, 3, 1]))
        acc = tl.reshape(_geglu(gate, up, tl.bfloat16), [BLOCK_N // 2, 8 // SLOTS])
    n = tl.program_id(0) * i.shape[0] + i
    m = tl.arange(0, 8 // SLOTS)
    _store_share(out_ptr, acc, None, n, m, rows, OUT)


@jit
def _int4_skinny_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    rows,
    tiles,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """As _skinny_kernel, 128 columns at a time: a product of 32 for each fourth of them, by weights in bf16."""
    _start(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n, m, word = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, 16)
    row = tl.minimum(n, OUT - 1).to(tl.int64)
    x_ptrs = x_ptr + m[None, :] * IN + tl.arange(0, 32)[:, None]
    words_ptrs = weight_ptr + row[:, None] * (IN // 8) + word[None, :]
    pair_ptrs = scale_ptr + row * (IN // GROUP)
    first = tl.program_id(1) * tiles
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = acc
    _wait(PDL)
    for chunk in tl.range(first, tl.minimum(first + tiles, IN // 128), num_stages=STAGES):
        words = tl.load(words_ptrs + chunk * 16)
        if GEGLU:
            up_words = tl.load(words_ptrs + OUT * (IN // 8) + chunk * 16)
        for unit in tl.static_range(4):
            column = chunk * 128 + unit * 32
            x = tl.load(x_ptrs + column, mask=(m < rows)[None, :], other=0.0)
            acc = tl.dot(_int4_weights(words, tl.load(pair_ptrs + column // GROUP), unit, PDL), x, acc)
            if GEGLU:
                pair = tl.load(pair_ptrs + OUT * (IN // GROUP) + column // GROUP)
                up = tl.dot(_int4_weights(up_words, pair, unit, PDL), x, up)
    if GEGLU:
        acc = _geglu(acc.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    _store_share(out_ptr, acc, None, n, m, rows, OUT)


@jit
def _int4_weights(words, pair, unit: tl.constexpr, FAST: tl.constexpr):
    """A unit of words [R, 16], with scale and zero in pair [R], as weights [R, 32] in bf16."""
    words = words >> (4 * unit)
    if FAST:  # 0x4300 + q is 128 + q
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 y, scale, zero, offset;
            mov.b32 offset, 0x43004300;
            lop3.b32 y, $1, 0x000f000f, offset, 0xea;
            prmt.b32 scale, $2, $2, 0x1010;
            prmt.b32 zero, $2, $2, 0x3232;
            sub.rn.bf16x2 y, y, offset;
            sub.rn.bf16x2 y, y, zero;
            mul.rn.bf16x2 $0, y, scale;
            }""",
            "=r,r,r",
            [words, tl.broadcast_to(pair[:, None], words.shape)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        y = tl.reshape(_bf16_pairs(y), [words.shape[0], 32])
    else:
        scale, zero = _int4_scale(pair[:, None, None])
        y = tl.join(words & 15, (words >> 16) & 15).to(tl.float32)
        y = tl.reshape((y - zero) * scale, [words.shape[0], 32]).to(tl.bfloat16)
    return y


def int_matmul(x: Tensor, weight: IntWeight, geglu: bool = False, config: Skinny | IntGemv | None = None) -> Tensor:
    """`skinny_matmul` of rows in bf16: up to 8 by int8, K a multiple of 64; up to 64 by int4, K a multiple of 128."""
    (n, k), m, group = weight.shape, len(x), weight.group
    config = config or linear_config(m, n, k, weight.dtype, group)
    n = n // 2 if geglu else n
    scale = weight.scale.view(torch.int32) if group else weight.scale
    operands = weight.packed.view(torch.int32), scale
    config = config._replace(split=1) if geglu else config
    tiles, split, out = _shares(x, n, config, x.dtype)
    constants = {"OUT": n, "IN": k, "GROUP": group, "GEGLU": geglu, "BLOCK_N": config.block_n}
    if isinstance(config, IntGemv):
        units = config.block_k // 32
        _launch(
            _int_gemv_kernel,
            (-(-n // (config.block_n // 2 if geglu else config.block_n)), split),
            *(x.view(torch.int32), *operands, out, m, tiles),
            **constants,
            CHUNKS=units // (4 if group else 2),
            SLOTS=gcd(8 // _power_of_2(m), units),
            WARPS=config.num_warps,
            AHEAD=config.ahead,
            num_warps=config.num_warps,
        )
        return out
    _launch(
        _int4_skinny_kernel,
        (-(-n // config.block_n), split),
        *(x, *operands, out, m, tiles),
        **constants,
        BLOCK_M=config.block_m,
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
