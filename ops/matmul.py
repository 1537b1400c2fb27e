"""Matrix products: of a few rows by Triton kernels that read each weight once, of many by cuBLAS.

A weight is a `formats.Weight` [N, K]: `data` as it is stored, `scale` and, for products in FP8, `input_scale`. Which
format takes which function stands in formats.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.common import (
    E4M3,
    SMS,
    gelu_times,
    jit,
    launch,
    launch_dependents,
    load_scalar,
    power_of_2,
    prefetch_l2,
    store_rounded,
    tl,
    triton,
    triton_dtype,
    wait_for_previous,
)
from ops.norm import geglu, geglu_triton, gelu_product, gelu_product_triton
from ops.peers import Mail, Parts, mailboxes, next_fill, next_fills, out_and_mail, send, sent_parts

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor


def matmul(x: Tensor, weight, dtype: torch.dtype, partials: bool = False, mail: Mail | None = None) -> Tensor:
    """x @ weight.T [M, N] in `dtype`, of x [M, K] in `dtype`, or in E4M3 for a weight in E4M3.

    With `partials` the result may instead be float32 partial sums [split_k, M, N], if that is faster: `add_norm`,
    `geglu` and `attend` add them up as they read them. This definition leaves none. `dtype` may be float32 for any x:
    then the result is not rounded, since it is a part of a sum: of one over the ranks that `mail` reaches, which kernels
    may send at once. Then the result is `ops.peers.Parts`.
    """
    return weight.format.product(x, weight, dtype)


def matmul_triton(
    x: Tensor, weight, dtype: torch.dtype, partials: bool = False, mail: Mail | None = None
) -> Tensor | Parts:
    """Does what `matmul` does, by what is fastest for the shape: the kernel of the weight's format, or cuBLAS."""
    return weight.format.kernel(x, weight, dtype, partials, mail=mail)


def matmul_geglu(x: Tensor, weight, dtype: torch.dtype, next_scale: Tensor | None = None) -> Tensor:
    """Computes gelu(x @ gate.T) * (x @ up.T) [M, F] in `dtype` or, with next_scale, in E4M3.

    weight [2 * F, K] is gate over up.
    """
    return geglu(matmul(x, weight, dtype), dtype, next_scale)


def matmul_geglu_triton(x: Tensor, weight, dtype: torch.dtype, next_scale: Tensor | None = None) -> Tensor:
    """Does what `matmul_geglu` does, with one kernel where there are few rows."""
    return weight.format.kernel(x, weight, dtype, geglu=True, next_scale=next_scale)


def gelu_gate(x: Tensor, weight, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes gelu(x @ weight.T) * other [M, P] in `dtype`, of a weight [P, K] in the dtype of activations.

    other [M, P] may be a view of which rows lie apart.
    """
    return gelu_product(matmul(x, weight, dtype), other)


def gelu_gate_triton(x: Tensor, weight, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Does what `gelu_gate` does, with one kernel where there are few rows."""
    config = linear_config(len(x), *weight.shape, weight.data.dtype)
    if isinstance(config, GemvConfig):
        return gemv(x, weight, dtype, other=other, config=config._replace(block_n=2))
    if config is None:
        return gelu_product_triton(matmul_triton(x, weight, dtype), other)
    config = config._replace(block_n=16)  # few outputs, which many programs shall share
    return gemm(x, weight, dtype, other=other, config=config)


# ---------------------------------------------------------------------------------------------------------------------
# Definitions


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T in `dtype`, of numbers in another one, perhaps: added up in float32 and, in that, not rounded."""
    if x.is_cuda and dtype == torch.float32 != x.dtype:
        return torch.mm(x, weight.t(), out_dtype=dtype)
    wide = torch.promote_types(x.dtype, dtype)
    return F.linear(x.to(wide), weight.to(wide)).to(dtype)


def dense_product(x: Tensor, weight, dtype: torch.dtype) -> Tensor:
    """`matmul` by a weight in bf16 or float32."""
    data, packed = weight.data, weight.packed
    if x.dtype != dtype:
        return linear(x, data, dtype)
    if packed is None or torch.compiler.is_compiling():  # Inductor packs by itself
        return F.linear(x, data)
    if packed.source != weight.source or (torch.is_grad_enabled() and (x.requires_grad or data.requires_grad)):
        return F.linear(x, data)  # it has changed since, or a gradient is wanted, which oneDNN's product has not
    return torch.ops.mkldnn._linear_pointwise(x, packed.weight, None, "none", [], "")


def fp8_product(x: Tensor, weight, dtype: torch.dtype) -> Tensor:
    """`matmul` by a weight in E4M3: sums in float32, by cuBLAS where it can.

    Off the GPU this is plain arithmetic on the rounded values, and defines the result.
    """
    data = weight.data
    if x.is_cuda and data.shape[0] % 16 == data.shape[1] % 16 == 0:  # what cuBLAS takes
        return torch._scaled_mm(x, data.t(), scale_a=weight.input_scale, scale_b=weight.scale, out_dtype=dtype)
    return (F.linear(x.float(), data.float()) * (weight.input_scale * weight.scale)).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


class GemvConfig(NamedTuple):
    """How one row, or two, are multiplied: a program owns block_n outputs and adds up block_k columns at a time.

    num_stages - 1 such tiles are in flight. The first `early` of them are loaded while the kernel before still runs.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    early: int = 0


class GemmConfig(NamedTuple):
    """How up to 64 rows are multiplied: a program owns `blocks` times block_n outputs of all rows, at most block_m of them.

    Tensor cores want a side of 64: that is block_n or, of several blocks, block_m. Those may be smaller, so that programs
    divide well among the SMs. split_k programs share their outputs, each with a part of the columns; then the results
    are partial sums. `early` tiles are brought to L2 while the kernel before still runs, or waits for other ranks. The
    rest is as in `GemvConfig`.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    early: int = 0
    blocks: int = 1


def linear_config(m: int, n: int, k: int, dtype: torch.dtype, group: int = 0) -> GemvConfig | GemmConfig | None:
    """Picks how m rows are multiplied by a weight [n, k] of `dtype`; None means cuBLAS.

    What was fastest in whole steps on an H200 and, of 2 to 16 rows, on an H100: of gemma-2b, 2-2b, 3-4b, 7b and 2-9b and
    of what two and four ranks have of gemma-7b and, of one row, of gemma-4-31B.
    """
    if (m == 1 and dtype != torch.int8) or (m == 2 and dtype.itemsize == 2 and n >= 32768 and k > 2048):
        return row_config(n, k, dtype.itemsize == 1)
    if m > 64 or dtype == torch.float32 or k * dtype.itemsize % 16:  # rows of tiles begin at multiples of 16 bytes
        return None
    if m > 16 and dtype == E4M3 and n <= 16384:
        if 4096 < n <= 6144 and k <= 4096:
            return GemmConfig(power_of_2(m), block_n=64, block_k=256, split_k=1, num_warps=4, num_stages=4, early=6)
        return None
    if m > 32 and dtype.itemsize == 2:  # (64 rows of gemma-3-4b: 3.74 ms a step; 3.49 with both)
        if 16896 < n <= 24576 and k <= 4096:  # w13, whose blocks of 64 outputs would be 1.1 to 1.5 programs an SM
            block_n, blocks = (16, 5) if n <= 20480 else (32, 3)
            return GemmConfig(64, block_n, block_k=128, split_k=1, num_warps=4, num_stages=3, early=1, blocks=blocks)
        if 2048 < n <= 3072 and k > 4096:  # w2
            block_n, blocks = (16, 5) if n <= 2560 else (32, 3)
            return GemmConfig(64, block_n, block_k=128, split_k=4, num_warps=4, num_stages=4, early=1, blocks=blocks)
    wide = dtype.itemsize == 2 or (dtype == E4M3 and m <= 16)
    block_n = 64 if m <= 16 or dtype.itemsize == 1 else 128
    block_k = (256 if wide else 128) // dtype.itemsize  # two cache lines or one of each weight row
    wanted = 0.7 if m > 16 else 1 if wide else 1.5
    split_k = pick_split_k(n, k, block_n, wanted * SMS, 4 * block_k)
    num_stages = 6 if not wide else 4 if m <= 16 else 3
    early = int(wide)
    if m > 16 and dtype == E4M3 and 20480 < n <= 24576:
        early = 12  # w13 of two ranks (64 rows of gemma-7b: 2.61 ms a step; 2.56 so)
    return GemmConfig(max(16, power_of_2(m)), block_n, block_k, split_k, 4, num_stages, early)


def row_config(n: int, k: int, in_8: bool) -> GemvConfig:
    """`linear_config` of one row, or two, by a weight in 8 bits or in more."""

    def config(block_n: int, block_k: int, early: int, num_warps: int = 4, num_stages: int = 4) -> GemvConfig:
        return GemvConfig(block_n, block_k, num_warps, num_stages, early)

    if in_8:
        if k > 8192:  # w2
            if k == 12288 or n <= 2048:
                return config(2, 2048, 2, num_warps=2)
            return config(2, 2048, 4 if k > 16384 else 2)
        if n < 4096:  # qkv and wo, and w2 of ranks
            if k <= 1024:
                return config(4, 1024, 1, num_warps=2 if n > 2560 else 4)
            if k > 4096:
                return config(4, 1024, 3, num_warps=2 if n > 2560 else 4)
            if 2048 <= n <= 2304 or (k > 3072 and n <= 2816):
                return config(2, 1024, 2, num_warps=2)
            # 2,560 outputs (gemma-2b's qkv) would be 640 programs, which divide badly among the SMs
            return config(2 if n == 2560 or k == 3072 else 4, 2048, 2 if k > 3072 else 1)
        if k <= 2048 and n < 200_000:
            return config(8, 256, 3, num_warps=1) if n >= 32768 else config(4, 2048, 1)
        if n <= 6144:
            return config(4, 1024, 2, num_warps=2 if n <= 4096 else 1)
        if 8192 < n <= 12288:
            return config(8, 256, 4, num_warps=1)
        if n <= 24576:  # w13, from here on
            return config(8, 512, 2, num_warps=2) if n <= 20480 else config(8, 512, 3)
        if n < 32768:
            return config(4, 2048, 1)
        if n <= 49152 and k <= 4096:
            return config(2, 2048, 1, num_warps=2)
        if n >= 200_000 and 2048 <= k <= 2304:  # the head
            return config(8, 256, 2, num_warps=1)
        return config(8, 512, 2 if k <= 2048 else 0)
    if k > 8192:  # w2
        if n <= 2048:
            return config(8, 1024, 2, num_warps=8, num_stages=3)
        if n > 4096 and k <= 10752:
            return config(4, 1024, 2, num_warps=2)
        if n == 3072:
            return config(2, 2048, 4 if k > 16384 else 3)
        return config(2, 1024, 4) if n > 2560 else config(4, 1024, 3)
    if n < 4096:  # qkv and wo, and w2 of ranks
        if k <= 1024:
            return config(4, 1024, 1)
        if n > 2560 and not 3072 < k <= 4096:
            return config(4, 1024, 2, num_warps=2)
        if k > 2048:
            return config(4, 1024, 2)
        return config(2 if n == 2560 else 4, 2048, 1)
    if k <= 2048 and n < 200_000:
        return config(4, 1024, 1)
    if n <= 4096:  # qkv (gemma-4-31B on four: 4.87 ms a step, as the next 4.92)
        return config(8, 512, 4) if k >= 4096 else config(4, 1024, 2, num_warps=2)
    if n <= 10240 and 4096 <= k <= 5376:
        return config(8, 512, 2, num_warps=2) if n == k else config(4, 1024, 6 if n > 8192 else 3 if n < k else 1)
    if n <= 12288:
        return config(4, 1024, 2, num_warps=2 if 4096 <= k <= 5376 else 4)
    if n <= 24576:  # w13, from here on
        if n <= 20480:
            return config(8, 512, 2)
        return config(4, 1024, 3) if k > 4096 else config(8, 512, 3)
    return config(8, 512, 2 if k <= 2048 else 1 if n < 32768 else 0)


def pick_split_k(n: int, k: int, block_n: int, wanted: float, least: int) -> int:
    """Picks a power of 2 up to 8 that brings the programs to `wanted`, while each has at least `least` columns."""
    split_k = 1
    while -(-n // block_n) * split_k < wanted and split_k < 8 and k >= 2 * split_k * least:
        split_k *= 2
    return split_k


def dense_triton(
    x: Tensor,
    weight,
    dtype: torch.dtype,
    partials: bool = False,
    geglu: bool = False,
    next_scale: Tensor | None = None,
    mail: Mail | None = None,
) -> Tensor | Parts:
    """`matmul_triton` or, with `geglu`, `matmul_geglu_triton` for weights in bf16, float32 and E4M3."""
    config = linear_config(len(x), *weight.shape, weight.data.dtype)
    return with_config(x, weight, dtype, config, partials, geglu, next_scale, mail)


def with_config(
    x: Tensor,
    weight,
    dtype: torch.dtype,
    config: GemvConfig | GemmConfig | None,
    partials: bool = False,
    geglu: bool = False,
    next_scale: Tensor | None = None,
    mail: Mail | None = None,
) -> Tensor | Parts:
    """`dense_triton` as `config` says; None is cuBLAS."""
    if config is None:
        y = weight.format.product(x, weight, dtype)
        return geglu_triton(y, dtype, next_scale) if geglu else y
    if isinstance(config, GemvConfig):
        if geglu:  # half as many outputs a program, as each has two rows
            config = config._replace(block_n=max(1, config.block_n // 2))
        return gemv(x, weight, dtype, geglu, next_scale, config, mail=mail)
    if geglu and config.blocks == 1:
        few_deep = len(x) <= 16 and weight.shape[1] > 2048
        int8 = weight.data.dtype == torch.int8
        config = config._replace(block_n=64, num_stages=4 if few_deep and int8 else 3)
    elif not partials:
        config = config._replace(split_k=1)
    return gemm(x, weight, dtype, geglu, next_scale, config, mail=mail)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    input_scale_ptr,
    weight_scale_ptr,
    next_scale_ptr,
    other_ptr,
    other_stride,
    out_ptr,
    mail,
    ROWS: tl.constexpr,
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
    """Multiplies each of ROWS rows of x by BLOCK_N rows of the weight or, with GEGLU, by as many of gate and of up.

    With other_ptr the result is a gate, too, whose other factor is there, in rows other_stride apart. With `mail` it is
    sent.
    """
    if mail is None:
        launch_dependents(PDL)
    first = tl.program_id(0) * BLOCK_N
    if GEGLU:  # gate and up in turn: rows n and n + OUT; what is read twice is not stored
        i = tl.arange(0, 2 * BLOCK_N)
        row = tl.minimum(first + i // 2, OUT - 1) + i % 2 * OUT
    else:
        row = tl.minimum(first + tl.arange(0, BLOCK_N), OUT - 1)
    acc = (tl.zeros([row.shape[0], BLOCK_K], tl.float32),) * ROWS
    rows_ptr = weight_ptr + row.to(tl.int64) * IN
    columns = tl.arange(0, BLOCK_K)
    early = ()
    for k in tl.static_range(0, EARLY * BLOCK_K, BLOCK_K):
        mask = k + columns < IN
        early = early + (tl.load(rows_ptr[:, None] + (k + columns)[None, :], mask=mask[None, :], other=0.0),)
    input_scale = load_scalar(input_scale_ptr)
    weight_scale = load_scalar(weight_scale_ptr)
    next_scale = load_scalar(next_scale_ptr)
    boxes = mailboxes(mail)
    wait_for_previous(PDL)
    if mail is not None:
        launch_dependents(PDL)
        counts = next_fills(mail, 0, 1, ROWS)
    for tile in tl.static_range(EARLY):
        k = tile * BLOCK_K
        acc = _add_products(acc, early[tile], x_ptr + k + columns, k + columns < IN, ROWS, IN)
    for k in tl.range(EARLY * BLOCK_K, IN, BLOCK_K, num_stages=STAGES):
        mask = k + columns < IN
        weight = tl.load(rows_ptr[:, None] + (k + columns)[None, :], mask=mask[None, :], other=0.0)
        acc = _add_products(acc, weight, x_ptr + k + columns, mask, ROWS, IN)
    for m in tl.static_range(ROWS):
        y = tl.sum(acc[m], axis=1)
        if input_scale is not None:
            y *= input_scale * weight_scale
        y = y.to(dtype).to(tl.float32)
        if GEGLU:
            gate, up = tl.split(tl.reshape(y, [BLOCK_N, 2]))
            y = gelu_times(gate, up, dtype)
        n = first + tl.arange(0, BLOCK_N)
        if other_ptr is not None:
            other = tl.load(other_ptr + m * other_stride + n, mask=n < OUT, other=0.0)
            y = gelu_times(y, other.to(tl.float32), dtype)
        if mail is not None:
            send(y, mail, boxes, m, counts[m], n, n < OUT)
        else:
            store_rounded(out_ptr + m * OUT + n, y, next_scale, n < OUT, dtype)


@jit
def _add_products(acc, weight, x_ptrs, mask, ROWS: tl.constexpr, IN: tl.constexpr):
    """Adds a tile of the weight times the same columns of each row of x, at x_ptrs of the first, to the row's sums."""
    sums = ()
    for m in tl.static_range(ROWS):
        x = tl.load(x_ptrs + m * IN, mask=mask, other=0.0)
        sums = sums + (acc[m] + weight.to(tl.float32) * x.to(tl.float32)[None, :],)
    return sums


def gemv(
    x: Tensor,
    weight,
    dtype: torch.dtype,
    geglu: bool = False,
    next_scale: Tensor | None = None,
    config: GemvConfig | None = None,
    other: Tensor | None = None,
    mail: Mail | None = None,
) -> Tensor | Parts:
    """`matmul`, with `geglu` `matmul_geglu`, or with `other` `gelu_gate`, of few rows x [M, K] by a weight in bf16,
    float32 or E4M3."""
    (m, k), data = x.shape, weight.data
    n = data.shape[0] // 2 if geglu else data.shape[0]
    config = config or linear_config(m, data.shape[0], k, data.dtype)
    # Late: a rank of four of gemma-7b takes 0.91 ms a step in FP8, else 0.95; of 8 rows, by `gemm`, it would take 2 % more
    out = sent_parts(mail, m, 1, late=True)
    if out is None:
        out = torch.empty(m, n, dtype=dtype if next_scale is None else E4M3, device=x.device)
    launch(
        _gemv_kernel,
        (-(-n // config.block_n),),
        *(x, data, weight.input_scale, weight.scale, next_scale),
        *(other, None if other is None else other.stride(0), *out_and_mail(out)),
        ROWS=m,
        OUT=n,
        IN=k,
        GEGLU=geglu,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        EARLY=config.early,
        dtype=triton_dtype(dtype),
        num_warps=config.num_warps,
    )
    return out


@jit
def store_partial(out_ptr, mail, y, scale, n, m, rows, OUT: tl.constexpr):
    """Stores y [outputs n, rows m], which program (block of outputs, split) made of its part of the columns, or sends it."""
    row, mask = (tl.program_id(1) * rows + m)[None, :], (n < OUT)[:, None] & (m < rows)[None, :]
    if mail is not None:
        count = next_fill(mail, row, (m < rows)[None, :])
        send(y, mail, mailboxes(mail), row, count, n[:, None], mask)
    else:
        store_rounded(out_ptr + row.to(tl.int64) * OUT + n[:, None], y, scale, mask, out_ptr.dtype.element_ty)


@jit
def _gemm_kernel(
    weight_ptr,
    out_ptr,
    mail,
    weight_tiles,
    x_tiles,
    input_scale_ptr,
    weight_scale_ptr,
    next_scale_ptr,
    other_ptr,
    other_stride,
    rows,
    tiles,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCKS: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiplies up to BLOCK_M rows of x by BLOCKS * BLOCK_N rows of the weight; program (blocks of outputs, split).

    The weight's rows are the wide side of the product, x's few rows the narrow one; several blocks of the weight are
    narrow each. What tiles hold outside of their matrix is zero. With other_ptr the result is a gate, whose other factor
    is there, in rows other_stride apart.
    """
    launch_dependents(PDL)
    first_row = tl.program_id(0) * (BLOCKS * BLOCK_N)
    first_tile = tl.program_id(1) * tiles
    early_ptr = weight_ptr + first_row.to(tl.int64) * IN + first_tile * BLOCK_K
    inside = (first_tile + EARLY) * BLOCK_K <= IN
    count = tl.where(inside, tl.minimum(BLOCKS * BLOCK_N, OUT - first_row), 0)
    ITEM: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    prefetch_l2(early_ptr, IN * ITEM, count, EARLY * BLOCK_K * ITEM, PDL)
    if GEGLU:
        prefetch_l2(early_ptr + OUT * IN, IN * ITEM, count, EARLY * BLOCK_K * ITEM, PDL)
    acc = (tl.zeros([BLOCK_N, BLOCK_M] if BLOCKS == 1 else [BLOCK_M, BLOCK_N], tl.float32),) * BLOCKS
    up = acc
    input_scale = load_scalar(input_scale_ptr)
    next_scale = load_scalar(next_scale_ptr)
    if input_scale_ptr is not None:
        weight_scale = tl.load(weight_scale_ptr)
    wait_for_previous(PDL)
    for tile in tl.range(first_tile, first_tile + tiles, num_stages=STAGES):
        x = x_tiles.load([0, tile * BLOCK_K])
        acc = _add_tiles(acc, x, weight_tiles, first_row, tile * BLOCK_K, BLOCKS, BLOCK_N, PROMOTE)
        if GEGLU:
            up = _add_tiles(up, x, weight_tiles, first_row + OUT, tile * BLOCK_K, BLOCKS, BLOCK_N, PROMOTE)
    m = tl.arange(0, BLOCK_M)
    for block in tl.static_range(BLOCKS):
        n = first_row + block * BLOCK_N + tl.arange(0, BLOCK_N)
        y = acc[block] if BLOCKS == 1 else acc[block].T
        if GEGLU:
            y_up = up[block] if BLOCKS == 1 else up[block].T
        if input_scale_ptr is not None:
            scale = input_scale * weight_scale
            y *= scale
            if GEGLU:
                y_up *= scale
        elif weight_scale_ptr is not None:
            # int8's, of each row: not among the constants, since the loop needs the registers
            y *= tl.load(weight_scale_ptr + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
            if GEGLU:
                y_up *= tl.load(weight_scale_ptr + n + OUT, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
        if GEGLU:
            y = gelu_times(y.to(dtype).to(tl.float32), y_up.to(dtype).to(tl.float32), dtype)
        if other_ptr is not None:
            mask = (n < OUT)[:, None] & (m < rows)[None, :]
            other = tl.load(other_ptr + m.to(tl.int64)[None, :] * other_stride + n[:, None], mask=mask, other=0.0)
            y = gelu_times(y.to(dtype).to(tl.float32), other.to(tl.float32), dtype)
        store_partial(out_ptr, mail, y, next_scale, n, m, rows, OUT)


@jit
def _add_tiles(acc, x, weight_tiles, row, column, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, PROMOTE: tl.constexpr):
    """Adds a tile of x times the same columns of each block of the weight, the first of them at `row`, to the block's sums.

    A Hopper tensor core keeps few bits of a sum of FP8 products: each tile's is added in float32. (With fewer than 32
    products Triton would turn to FP16 instead, at a conversion for every weight.)
    """
    sums = ()
    for block in tl.static_range(BLOCKS):
        weight = weight_tiles.load([row + block * BLOCK_N, column]).to(x.dtype)  # from int8
        a, b = (weight, x.T) if BLOCKS == 1 else (x, weight.T)
        sums = sums + (tl.dot(a, b, acc[block], input_precision="ieee", max_num_imprecise_acc=PROMOTE),)
    return sums


def split_k_output(
    x: Tensor, n: int, block_k: int, split_k: int, dtype: torch.dtype, mail: Mail | None = None
) -> tuple[int, int, Tensor | Parts]:
    """Shares the columns of x [M, K] among split_k programs that take block_k at a time, and allocates the product.

    Returns the tiles of each program, the number of programs (fewer than split_k, if some would have no tile), and an
    empty result: [M, N] in `dtype`, float32 partial sums [programs, M, N], or Parts where these are to be sent.
    """
    m, k = x.shape
    tiles = -(-k // (block_k * split_k))
    split_k = -(-k // (block_k * tiles))
    if (sent := sent_parts(mail, m, split_k)) is not None:
        return tiles, split_k, sent
    if split_k == 1:
        return tiles, 1, torch.empty(m, n, dtype=dtype, device=x.device)
    return tiles, split_k, torch.empty(split_k, m, n, dtype=torch.float32, device=x.device)


def gemm(
    x: Tensor,
    weight,
    dtype: torch.dtype,
    geglu: bool = False,
    next_scale: Tensor | None = None,
    config: GemmConfig | None = None,
    other: Tensor | None = None,
    mail: Mail | None = None,
) -> Tensor | Parts:
    """`matmul`, with `geglu` `matmul_geglu`, or with `other` `gelu_gate`, of up to 64 rows, by a weight in int8, too.

    With config.split_k > 1, and without `geglu` or `other`, the result is float32 partial sums [split_k, M, N].
    """
    (m, k), data = x.shape, weight.data
    n = data.shape[0] // (2 if geglu else 1)
    config = config or linear_config(m, data.shape[0], k, data.dtype)
    split_k = 1 if geglu or other is not None else config.split_k
    tiles, split_k, out = split_k_output(x, n, config.block_k, split_k, dtype if next_scale is None else E4M3, mail)
    launch(
        _gemm_kernel,
        (-(-n // (config.blocks * config.block_n)), split_k),
        *(data, *out_and_mail(out)),
        TensorDescriptor.from_tensor(data, [config.block_n, config.block_k]),
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        *(weight.input_scale, weight.scale, next_scale, other, None if other is None else other.stride(0), m, tiles),
        OUT=n,
        IN=k,
        GEGLU=geglu,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        EARLY=min(config.early, tiles),
        PROMOTE=config.block_k if data.dtype == E4M3 else 0,
        BLOCKS=config.blocks,
        dtype=triton_dtype(dtype),
        num_warps=config.num_warps,
    )
    return out
