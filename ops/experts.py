"""The GeGLU networks of a mixture of experts, which ops/router.py picks for each token (Gemma 4 26B-A4B).

Each of M tokens goes to top_k of E experts, which are P = M * top_k *pairs*: pair p is of token p // top_k. Products by
experts take the rows of pairs sorted by expert, so that each expert that is met is read once, by all of its rows, and no
other expert is read at all. Nothing asks the host which experts those are: grids are as large as the number of pairs
may need.

    experts [M, top_k]   which experts a token goes to      3 0 | 0 2 | 3 0       pairs 0 .. 5
    order [P]            the pairs, sorted by expert         1 2 5 | 3 | 0 4      of experts 0, 2 and 3
    position [P]         where pair p is in that order       4 0 1 3 5 2
    tiles [T, 3]         (expert, first row, end): at most BLOCK_M rows of one expert; first = end if there is none

A forward of one token needs no order: its pairs have an expert each. Up to FEW_ROWS tokens take a kernel to sort them,
more take PyTorch's sort.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.common import (
    E4M3,
    gelu_times,
    is_hopper,
    jit,
    launch,
    launch_dependents,
    load_scalar,
    power_of_2,
    store_rounded,
    tl,
    triton,
    triton_dtype,
    wait_for_previous,
)
from ops.integer import dequantize_triton, int4_numbers, words_per_chunk
from ops.matmul import GemvConfig
from ops.norm import geglu
from ops.peers import Mail, Parts, mailboxes, next_fill, out_and_mail, send, sent_parts

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

FEW_ROWS = 64  # tokens up to which decode steps go, and the kernel that sorts them
SORT_BLOCK = 64  # pairs, and tiles, of a program that sorts
COMBINE_BLOCK, COMBINE_WARPS = 1024, 4

# ---------------------------------------------------------------------------------------------------------------------
# Definitions


class Part(NamedTuple):
    """Matrices taken out of a weight, or another form of it, under the names that a `formats.Weight` has."""

    data: Tensor
    scale: Tensor | None = None
    group: int = 0
    input_scale: Tensor | None = None
    shape: tuple[int, int] | None = None
    experts: int = 0


def experts(
    h: Tensor,
    w13,
    w2,
    chosen: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    partials: bool = False,
    mail: Mail | None = None,
) -> Tensor:
    """The weighted sum [M, N] of what its experts make of each row of h [M, N], in `dtype`.

    Expert e makes gelu(h @ gate[e].T) * (h @ up[e].T) @ w2[e].T, rounded to `dtype`; weights [M, top_k] multiply the
    results of experts chosen [M, top_k] in float32, and their sum is rounded once. w13 and w2 are `formats.Weight`s of E
    matrices [2 * F, N], gate over up, and [N, F]. For weights in E4M3 h is in E4M3, too, and GeGLU's result is rounded
    with the input_scale of w2's expert. With `partials` the result is in float32, and no result of an expert is
    rounded, since all are parts of sums: of one over the ranks that `mail` reaches, which kernels may send at once, into
    boxes of a second sum at a time. Then the result is `ops.peers.Parts`.
    """
    out_dtype = torch.float32 if partials else dtype
    m, top_k = chosen.shape
    if torch.compiler.is_compiling() or (h.is_cuda and torch.cuda.is_current_stream_capturing()):
        # What experts there are must not decide what is done: each token gets copies of its experts' weights.
        slots = [_of_expert(h, w13, w2, slot, dtype, out_dtype) for slot in chosen.long().unbind(1)]
        return (torch.stack(slots, 1).float() * weights[..., None]).sum(1).to(out_dtype)
    y = torch.zeros(m, top_k, w2.shape[0], device=h.device)
    for e in chosen.unique().tolist():
        token, slot = (chosen == e).nonzero(as_tuple=True)
        y[token, slot] = _of_expert(_rows(h, token), w13, w2, e, dtype, out_dtype).float() * weights[token, slot, None]
    return y.sum(1).to(out_dtype)


def _of_expert(h: Tensor, w13, w2, e: int | Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """What expert e makes of rows h [m, N] or, with experts e [m], what each makes of its row: [m, N]."""
    next_scale = None if w2.input_scale is None else w2.input_scale[e][..., None]
    return _product(geglu(_product(h, w13, e, dtype), dtype, next_scale), w2, e, out_dtype)


def _product(x: Tensor, weight, e: int | Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies rows x [m, K] by the matrix of expert e or, with experts e [m], each row by its expert's."""
    data, scale = _rows(weight.data, e), None if weight.scale is None else weight.scale[e]
    if data.dtype == E4M3:
        numbers, x = data.float(), x.float()
    else:
        numbers, x = weight.format.dequantize(Part(data, scale, weight.group), x.dtype).to(dtype), x.to(dtype)
    y = x @ numbers.mT if isinstance(e, int) else (x[:, None] @ numbers.mT)[:, 0]
    if data.dtype == E4M3:
        y = y * ((weight.input_scale[e] if weight.own_inputs else weight.input_scale) * scale)[..., None]
    return y.to(dtype)


def _rows(x: Tensor, index: int | Tensor) -> Tensor:
    """x[index], of E4M3 as bytes, which every device can look up."""
    return x.view(torch.uint8)[index].view(E4M3) if x.dtype == E4M3 else x[index]


# ---------------------------------------------------------------------------------------------------------------------
# Order of pairs


@jit
def _store_tiles(
    tiles_ptr, tiles_in_all, counts, first, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores tiles `first` to first + BLOCK - 1, of experts that have counts [EXPERTS] rows, one behind another."""
    e, t = tl.arange(0, EXPERTS)[None, :], first + tl.arange(0, BLOCK)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    tile = t[:, None] - (tl.cumsum(tiles, axis=0) - tiles)[None, :]  # which of an expert's tiles t is
    start = (tl.cumsum(counts, axis=0) - counts)[None, :]
    is_its = (tile >= 0) & (tile < tiles[None, :])
    begin = start + tile * BLOCK_M
    end = tl.minimum(begin + BLOCK_M, start + counts[None, :])
    mask = t < tiles_in_all
    tl.store(tiles_ptr + 3 * t, tl.sum(tl.where(is_its, e, 0), axis=1), mask=mask)
    tl.store(tiles_ptr + 3 * t + 1, tl.sum(tl.where(is_its, begin, 0), axis=1), mask=mask)
    tl.store(tiles_ptr + 3 * t + 2, tl.sum(tl.where(is_its, end, 0), axis=1), mask=mask)


@jit
def _sort_kernel(
    experts_ptr,
    order_ptr,
    position_ptr,
    tiles_ptr,
    pairs,
    tiles_in_all,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Finds the position of BLOCK pairs, by counting for each how many are before it, and makes BLOCK tiles."""
    launch_dependents(PDL)
    first = tl.program_id(0) * BLOCK
    p, e = first + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    wait_for_previous(PDL)
    expert = tl.load(experts_ptr + p, mask=p < pairs, other=EXPERTS)
    before = tl.zeros([BLOCK, BLOCK], tl.int32)
    counts = tl.zeros([BLOCK, EXPERTS], tl.int32)
    for start in range(0, pairs, BLOCK):
        q = start + tl.arange(0, BLOCK)
        other = tl.load(experts_ptr + q, mask=q < pairs, other=EXPERTS)  # behind all experts
        is_before = (other[None, :] == expert[:, None]) & (q[None, :] < p[:, None])
        before += (is_before | (other[None, :] < expert[:, None])).to(tl.int32)
        counts += (other[:, None] == e[None, :]).to(tl.int32)
    position = tl.sum(before, axis=1)
    tl.store(position_ptr + p, position, mask=p < pairs)
    tl.store(order_ptr + position, p, mask=p < pairs)
    _store_tiles(tiles_ptr, tiles_in_all, tl.sum(counts, axis=0), first, EXPERTS, BLOCK_M, BLOCK)


@jit
def _tiles_kernel(
    ends_ptr,
    tiles_ptr,
    tiles_in_all,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Makes BLOCK tiles of experts whose rows end before ends [E]; EXPERTS is the power of 2 from E on."""
    launch_dependents(PDL)
    e = tl.arange(0, EXPERTS)
    wait_for_previous(PDL)
    ends = tl.load(ends_ptr + e, mask=e < E, other=0)
    starts = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    _store_tiles(tiles_ptr, tiles_in_all, ends - starts, tl.program_id(0) * BLOCK, EXPERTS, BLOCK_M, BLOCK)


class Sorted(NamedTuple):
    """Pairs sorted by expert; the head of this file explains it. None for one token's, which are in order as they
    are."""

    order: Tensor | None
    position: Tensor | None
    tiles: Tensor | None


def sort_pairs(chosen: Tensor, n_experts: int, block_m: int) -> Sorted:
    """Sorts the pairs of experts chosen [M, top_k] on their device, for tiles of block_m rows. Pairs of one expert stay
    in order."""
    m, pairs, device = len(chosen), chosen.numel(), chosen.device
    if m == 1:
        return Sorted(None, None, None)
    count = min(pairs, pairs // block_m + min(pairs, n_experts))
    tiles = torch.empty(count, 3, dtype=torch.int32, device=device)
    constants = {"EXPERTS": power_of_2(n_experts), "BLOCK_M": block_m, "BLOCK": SORT_BLOCK, "num_warps": 4}
    if m <= FEW_ROWS:
        order, position = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
        grid = (-(-pairs // SORT_BLOCK),)
        launch(_sort_kernel, grid, chosen, order, position, tiles, pairs, count, **constants)
        return Sorted(order, position, tiles)
    by_expert, order = chosen.flatten().sort(stable=True)
    position = torch.empty(pairs, dtype=torch.int32, device=device)
    position[order] = torch.arange(pairs, dtype=torch.int32, device=device)
    numbers = torch.arange(n_experts, dtype=torch.int32, device=device)
    ends = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
    launch(_tiles_kernel, (-(-count // SORT_BLOCK),), ends, tiles, count, E=n_experts, **constants)
    return Sorted(order, position, tiles)


# ---------------------------------------------------------------------------------------------------------------------
# Products


class GroupedConfig(NamedTuple):
    """How rows sorted by expert are multiplied: a program owns block_n outputs of at most block_m rows of one expert.

    block_k columns are added up at a time (int4: a chunk), and num_stages - 1 such tiles are in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


Configs = tuple[GemvConfig, GemvConfig] | tuple[GroupedConfig, GroupedConfig]  # of w13 and of w2


def experts_config(m: int, top_k: int, n_experts: int, dtype: torch.dtype, size: int) -> Configs:
    """Picks how the pairs of m tokens are multiplied by weights of experts of `size`, stored in `dtype`: what was fastest
    on an H100 or H200, of the sizes of Gemma 4 26B-A4B. Both configurations of one choice have the same block_m.

    (BF16, microseconds for 2,048 and 16,384 tokens: 764 and 3,369, where torch._grouped_mm takes 962 and 3,656.)
    """
    block_k = 128 // dtype.itemsize  # a cache line of each weight row
    if m == 1 and dtype != torch.int32:  # tensor cores take int4's experts of one row in 45 us, sums in 112
        w13 = GemvConfig(2, 512, num_warps=2, num_stages=4)
        if dtype.itemsize == 1:
            w13 = GemvConfig(4, 512, num_warps=4, num_stages=4)
        return w13, GemvConfig(4, 512, 8, num_stages=1) if size <= 512 else GemvConfig(1, 1024, 4, num_stages=1)
    if m <= FEW_ROWS:
        wide = 1 if dtype == torch.int32 else 2  # cache lines at a time
        return GroupedConfig(16, 64, wide * block_k, 4, 3), GroupedConfig(16, 64, block_k, num_warps=4, num_stages=4)
    if dtype == torch.bfloat16:
        return GroupedConfig(128, 64, block_k, num_warps=8, num_stages=3), GroupedConfig(128, 128, block_k, 8, 3)
    block_m = 64 if m * top_k < 256 * n_experts else 128
    return GroupedConfig(block_m, 64, block_k, num_warps=4, num_stages=3), GroupedConfig(block_m, 128, block_k, 4, 3)


@jit
def _expert_gemv_kernel(
    x_ptr,
    weight_ptr,
    experts_ptr,
    input_scale_ptr,
    weight_scale_ptr,
    next_scale_ptr,
    out_ptr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Makes BLOCK_N outputs of GeGLU for one row of x and one of its experts; program (block of outputs, pair)."""
    launch_dependents(PDL)
    pair = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    i, columns = tl.arange(0, 2 * BLOCK_N), tl.arange(0, BLOCK_K)
    row = tl.minimum(first + i // 2, OUT - 1) + i % 2 * OUT  # of gate and of up in turn
    input_scale = load_scalar(input_scale_ptr)
    wait_for_previous(PDL)
    e = tl.load(experts_ptr + pair)
    row += e * (2 * OUT)
    rows_ptr = weight_ptr + row.to(tl.int64) * IN
    acc = tl.zeros([2 * BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        mask = k + columns < IN
        weight = tl.load(rows_ptr[:, None] + (k + columns)[None, :], mask=mask[None, :], other=0.0)
        x = tl.load(x_ptr + k + columns, mask=mask, other=0.0)
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, axis=1)
    if input_scale_ptr is not None:
        y *= input_scale * tl.load(weight_scale_ptr + e)
    elif weight_scale_ptr is not None:  # int8's, of each row
        y *= tl.load(weight_scale_ptr + row).to(tl.float32)
    gate, up = tl.split(tl.reshape(y.to(dtype).to(tl.float32), [BLOCK_N, 2]))
    y = gelu_times(gate, up, dtype)
    next_scale = None
    if next_scale_ptr is not None:
        next_scale = tl.load(next_scale_ptr + e)
    n = first + tl.arange(0, BLOCK_N)
    store_rounded(out_ptr + pair * OUT + n, y, next_scale, n < OUT, dtype)


@jit
def _expert_sum_kernel(
    x_ptr,
    weight_ptr,
    experts_ptr,
    weights_ptr,
    input_scale_ptr,
    weight_scale_ptr,
    out_ptr,
    mail,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiplies each row of x [TOP_K, IN] by BLOCK_N rows of its expert, and adds up the weighted results, which are
    stored or, with `mail`, sent `late`.

    SLOTS is the power of 2 from TOP_K on.
    """
    if mail is None:
        launch_dependents(PDL)
    i, columns = tl.arange(0, SLOTS * BLOCK_N), tl.arange(0, BLOCK_K)
    pair = i // BLOCK_N
    n = tl.program_id(0) * BLOCK_N + i % BLOCK_N
    boxes = mailboxes(mail)
    wait_for_previous(PDL)
    if mail is not None:
        launch_dependents(PDL)
        count = next_fill(mail, mail.SLOTS // 2)
    e = tl.load(experts_ptr + pair, mask=pair < TOP_K, other=0)
    row = e * OUT + tl.minimum(n, OUT - 1)
    rows_ptr = weight_ptr + row.to(tl.int64) * IN
    acc = tl.zeros([SLOTS * BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        mask = (pair < TOP_K)[:, None] & (k + columns < IN)[None, :]
        weight = tl.load(rows_ptr[:, None] + (k + columns)[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + (pair * IN)[:, None] + (k + columns)[None, :], mask=mask, other=0.0)
        acc += weight.to(tl.float32) * x.to(tl.float32)
    y = tl.sum(acc, axis=1)
    if input_scale_ptr is not None:
        y *= tl.load(input_scale_ptr + e) * tl.load(weight_scale_ptr + e)
    elif weight_scale_ptr is not None:
        y *= tl.load(weight_scale_ptr + row).to(tl.float32)
    y = y.to(dtype).to(tl.float32) * tl.load(weights_ptr + pair, mask=pair < TOP_K, other=0.0)
    y = tl.sum(tl.reshape(y, [SLOTS, BLOCK_N]), axis=0)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if mail is not None:
        send(y, mail, boxes, mail.SLOTS // 2, count, n, n < OUT)
    else:
        tl.store(out_ptr + n, y.to(dtype), mask=n < OUT)


@jit
def _expert_gemm_kernel(
    out_ptr,
    weight,
    x_ptr,
    experts_ptr,
    order_ptr,
    tiles_ptr,
    input_scale_ptr,
    weight_scale_ptr,
    next_scale_ptr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TOP_K: tl.constexpr,
    GEGLU: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PROMOTE: tl.constexpr,
    BF16X2: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiplies a tile of sorted rows by BLOCK_N rows of its expert; program (block of outputs, tile).

    With GEGLU these are w13's gate and up, and row i is that of the token of pair i; otherwise they are w2's, and row i
    is row i of x. The weight's rows are the wide side of the product. `weight` is a descriptor of all experts' rows or,
    for int4, a pointer: int4's chunks, of WORDS words, are converted as in `_int4_gemm_kernel`.
    """
    launch_dependents(PDL)
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    wait_for_previous(PDL)
    if tiles_ptr is None:  # one token: pair i is row i
        first, end = tile, tile + 1
        e = tl.load(experts_ptr + tile)
    else:
        e = tl.load(tiles_ptr + 3 * tile)
        first, end = tl.load(tiles_ptr + 3 * tile + 1), tl.load(tiles_ptr + 3 * tile + 2)
    if first >= end:
        return
    i = first + m
    has_row = i < end
    x_row = i
    if GEGLU:
        if order_ptr is not None:
            x_row = tl.load(order_ptr + i, mask=has_row, other=0)
        x_row = x_row // TOP_K
    x_ptrs = x_ptr + x_row.to(tl.int64)[None, :] * IN
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if GEGLU:
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first_row = e * (2 * OUT if GEGLU else OUT)
    if GROUP == 0:
        columns = tl.arange(0, BLOCK_K)
        n0 = first_row + tl.program_id(0) * BLOCK_N
        for k in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
            mask = has_row[None, :] & (k + columns < IN)[:, None]
            x = tl.load(x_ptrs + (k + columns)[:, None], mask=mask, other=0.0)
            acc = tl.dot(
                weight.load([n0, k]).to(x.dtype), x, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE
            )
            if GEGLU:
                up_weight = weight.load([n0 + OUT, k]).to(x.dtype)
                up = tl.dot(up_weight, x, up, input_precision="ieee", max_num_imprecise_acc=PROMOTE)
    else:
        row = (first_row + tl.minimum(n, OUT - 1)).to(tl.int64)
        word, column = tl.arange(0, WORDS), tl.arange(0, 2 * WORDS)
        words_ptrs = weight + row[:, None] * (IN // 8) + word[None, :]
        pair_ptrs = weight_scale_ptr + row * (IN // GROUP)
        for chunk in tl.range(0, IN // (8 * WORDS), num_stages=STAGES):
            words = tl.load(words_ptrs + chunk * WORDS)
            if GEGLU:
                up_words = tl.load(words_ptrs + OUT * (IN // 8) + chunk * WORDS)
            for unit in tl.static_range(4):
                k = chunk * (8 * WORDS) + unit * (2 * WORDS)
                x = tl.load(x_ptrs + (k + column)[:, None], mask=has_row[None, :], other=0.0)
                numbers = int4_numbers(words, tl.load(pair_ptrs + k // GROUP), unit, x.dtype, BF16X2)
                acc = tl.dot(numbers, x, acc, input_precision="ieee")
                if GEGLU:
                    pair = tl.load(pair_ptrs + OUT * (IN // GROUP) + k // GROUP)
                    up = tl.dot(int4_numbers(up_words, pair, unit, x.dtype, BF16X2), x, up, input_precision="ieee")
    if input_scale_ptr is not None:
        scale = tl.load(input_scale_ptr if GEGLU else input_scale_ptr + e) * tl.load(weight_scale_ptr + e)
        acc *= scale
        if GEGLU:
            up *= scale
    elif weight_scale_ptr is not None and GROUP == 0:  # int8's, of each row
        scale_ptrs = weight_scale_ptr + first_row + n
        acc *= tl.load(scale_ptrs, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
        if GEGLU:
            up *= tl.load(scale_ptrs + OUT, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
    if GEGLU:
        acc = gelu_times(acc.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    next_scale = None
    if next_scale_ptr is not None:
        next_scale = tl.load(next_scale_ptr + e)
    mask = (n < OUT)[:, None] & has_row[None, :]
    store_rounded(out_ptr + i.to(tl.int64)[None, :] * OUT + n[:, None], acc, next_scale, mask, dtype)


@jit
def _combine_kernel(
    y_ptr,
    position_ptr,
    weights_ptr,
    out_ptr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Adds up what a token's experts made, weighted, in the order of its pairs; program (token, block of columns)."""
    launch_dependents(PDL)
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    acc = tl.zeros([BLOCK], tl.float32)
    wait_for_previous(PDL)
    for pair in tl.static_range(TOP_K):
        row = token * TOP_K + pair
        weight = tl.load(weights_ptr + row)
        if position_ptr is not None:
            row = tl.load(position_ptr + row)
        y = tl.load(y_ptr + row.to(tl.int64) * N + columns, mask=mask, other=0.0)
        acc += y.to(tl.float32) * weight
    tl.store(out_ptr + token.to(tl.int64) * N + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)


def experts_triton(
    h: Tensor,
    w13,
    w2,
    chosen: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    partials: bool = False,
    mail: Mail | None = None,
) -> Tensor | Parts:
    """Does what `experts` does, by kernels."""
    if any(weight.data[0, 0].nbytes % 16 for weight in (w13, w2)):  # rows of tiles begin at multiples of 16 bytes
        return experts(h, w13, w2, chosen, weights, dtype, partials)
    w13, w2 = (_multiplied(weight, dtype) for weight in (w13, w2))
    stored = torch.int32 if w13.group or w2.group else w13.data.dtype
    configs = experts_config(*chosen.shape, w13.experts, stored, w2.shape[1])
    return with_configs(h, w13, w2, chosen, weights, dtype, configs, torch.float32 if partials else dtype, mail)


def _multiplied(weight, dtype: torch.dtype):
    """The weight that products take: dequantized, if it is in int4 and has chunks of fewer than 8 words."""
    if not weight.group or weight.shape[1] % 64 == 0:
        return weight
    return Part(dequantize_triton(weight, dtype), shape=weight.shape, experts=weight.experts)


def with_configs(
    h: Tensor,
    w13,
    w2,
    chosen: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    configs: Configs,
    out_dtype: torch.dtype | None = None,
    mail: Mail | None = None,
) -> Tensor | Parts:
    """`experts_triton` as `configs` say; the result is in out_dtype (None: `dtype`)."""
    (m, top_k), (n, f), device = chosen.shape, w2.shape, h.device
    out_dtype = out_dtype or dtype
    if isinstance(configs[0], GemvConfig):
        return _of_one_row(h, w13, w2, chosen, weights, dtype, configs, out_dtype, mail)
    pairs = sort_pairs(chosen, w13.experts, configs[0].block_m)
    g = torch.empty(m * top_k, f, dtype=dtype if w2.input_scale is None else E4M3, device=device)
    _gemm(g, h, w13, chosen, pairs, configs[0], dtype, geglu=True, next_scale=w2.input_scale)
    y = torch.empty(m * top_k, n, dtype=out_dtype, device=device)
    _gemm(y, g, w2, chosen, pairs, configs[1], out_dtype)
    out = torch.empty(m, n, dtype=out_dtype, device=device)
    block = min(COMBINE_BLOCK, power_of_2(n))
    launch(
        _combine_kernel,
        (m, -(-n // block)),
        *(y, pairs.position, weights, out),
        N=n,
        TOP_K=top_k,
        BLOCK=block,
        num_warps=COMBINE_WARPS,
    )
    return out


def _of_one_row(
    h: Tensor,
    w13,
    w2,
    chosen: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    configs: tuple[GemvConfig, GemvConfig],
    out_dtype: torch.dtype,
    mail: Mail | None,
) -> Tensor | Parts:
    """`with_configs` of one row h [1, N], by two kernels."""
    (n, f), top_k, device = w2.shape, chosen.shape[1], h.device
    g = torch.empty(top_k, f, dtype=dtype if w2.input_scale is None else E4M3, device=device)
    launch(
        _expert_gemv_kernel,
        (-(-f // configs[0].block_n), top_k),
        *(h, w13.data, chosen, w13.input_scale, _scales(w13), w2.input_scale, g),
        OUT=f,
        IN=n,
        BLOCK_N=configs[0].block_n,
        BLOCK_K=configs[0].block_k,
        STAGES=configs[0].num_stages,
        dtype=triton_dtype(dtype),
        num_warps=configs[0].num_warps,
    )
    out = sent_parts(mail, 1, 1, late=True)
    if out is None:
        out = torch.empty(1, n, dtype=out_dtype, device=device)
    launch(
        _expert_sum_kernel,
        (-(-n // configs[1].block_n),),
        *(g, w2.data, chosen, weights, w2.input_scale, _scales(w2), *out_and_mail(out)),
        OUT=n,
        IN=f,
        TOP_K=top_k,
        SLOTS=power_of_2(top_k),
        BLOCK_N=configs[1].block_n,
        BLOCK_K=configs[1].block_k,
        STAGES=configs[1].num_stages,
        dtype=triton_dtype(out_dtype),
        num_warps=configs[1].num_warps,
    )
    return out


def _scales(weight) -> Tensor | None:
    """What kernels take: of int4, a scale and a zero as one int32."""
    return weight.scale.view(torch.int32) if weight.group else weight.scale


def _gemm(
    out: Tensor,
    x: Tensor,
    weight,
    chosen: Tensor,
    pairs: Sorted,
    config: GroupedConfig,
    dtype: torch.dtype,
    geglu: bool = False,
    next_scale: Tensor | None = None,
):
    """Multiplies x, the rows of tokens with `geglu` and those of sorted pairs without, into sorted rows `out`."""
    (n, k), data, scale, group = weight.shape, weight.data, _scales(weight), weight.group
    n = n // 2 if geglu else n
    if not group:
        data = TensorDescriptor.from_tensor(data.view(-1, k), [config.block_n, config.block_k])
    tiles = chosen.numel() if pairs.tiles is None else len(pairs.tiles)
    launch(
        _expert_gemm_kernel,
        (-(-n // config.block_n), tiles),
        *(out, data, x, chosen, pairs.order, pairs.tiles, weight.input_scale, scale, next_scale),
        OUT=n,
        IN=k,
        TOP_K=chosen.shape[1],
        GEGLU=geglu,
        GROUP=group,
        WORDS=words_per_chunk(k) if group else 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        PROMOTE=config.block_k if weight.data.dtype == E4M3 else 0,
        BF16X2=is_hopper(x.device) and x.dtype == torch.bfloat16,
        dtype=triton_dtype(dtype),
        num_warps=config.num_warps,
    )
