"""Products by weights in 8 and 4 bits."""

from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.common import (
    SMS,
    TRITON_VERSION,
    gelu_times,
    is_hopper,
    jit,
    launch,
    launch_dependents,
    power_of_2,
    tl,
    wait_for_previous,
)
from ops.matmul import GemmConfig, linear_config, pick_split_k, split_k_output, store_partial, with_config
from ops.norm import geglu_triton

LANES_LAST = tl.constexpr(
    TRITON_VERSION >= (3, 7)
)  # a load's threads lie along its last dimensions first, not its first ones
PAIRS_APART = tl.constexpr(TRITON_VERSION >= (3, 8))  # of int4's operands a thread has pairs of neighbours, not four
DEQUANTIZE_BLOCK, DEQUANTIZE_WARPS = 4096, 4


class IntGemvConfig(NamedTuple):
    """How up to 8 rows are multiplied by integers: a program owns block_n outputs.

    Its warps, and those of the split_k programs that own the same outputs, each add up a part of the columns, block_k of
    them at a time. With `ahead` the next ones are loaded before these are multiplied; without it the compiler puts loads
    behind products, which takes fewer registers.
    """

    block_n: int
    block_k: int
    num_warps: int
    split_k: int = 1
    ahead: bool = False


def int_config(m: int, n: int, k: int, group: int) -> GemmConfig | IntGemvConfig | None:
    """How m rows are multiplied by a weight [n, k] in int4 groups of `group` or, if that is 0, in int8.

    None where the weight is made in bf16 in each call. What was fastest in whole steps of gemma-7b and gemma-2b on an
    H200.
    """
    if group and (m > 64 or k % 128):
        return None
    if not group and (m > 8 or k % 64):
        return linear_config(m, n, k, torch.int8)
    if m > 8:
        block_m, block_n = max(16, power_of_2(m)), 64 if k > 8192 else 128
        split_k = pick_split_k(n, k, block_n, 1.5 * SMS, least=512)
        return GemmConfig(block_m, block_n, block_k=128, split_k=split_k, num_warps=4, num_stages=3)
    if n > 16384:
        if m > 1:
            return IntGemvConfig(block_n=32, block_k=256, num_warps=1 if group >= 128 or n > 100_000 else 2)
        if group >= 128:
            return IntGemvConfig(block_n=32, block_k=256, num_warps=1, ahead=True)
        return IntGemvConfig(block_n=16, block_k=512, num_warps=1 if group else 2, ahead=group > 0)
    if k > 8192 and m == 1:
        return IntGemvConfig(block_n=16, block_k=512 if group else 256, num_warps=4, split_k=2, ahead=True)
    if k > 8192 and group >= 128:
        return IntGemvConfig(block_n=32, block_k=256, num_warps=4, split_k=4)
    if k <= 8192 <= n:
        if m == 1 and group >= 128:
            return IntGemvConfig(block_n=16, block_k=512, num_warps=2, ahead=True)
        return IntGemvConfig(block_n=32 if group or m > 1 else 16, block_k=256, num_warps=4, ahead=m == 1 and group > 0)
    if m == 1 and not group:
        return IntGemvConfig(block_n=16, block_k=512, num_warps=4, ahead=True)
    return IntGemvConfig(block_n=16, block_k=256, num_warps=4, split_k=2, ahead=m == 1)


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


def dequantize(weight, dtype: torch.dtype) -> Tensor:
    """A weight in int8 or int4 as numbers [N, K] in `dtype`, rounded once."""
    data, scale = weight.data, weight.scale
    if not weight.group:
        return data.to(dtype) * scale.to(dtype)[:, None]
    scale, zero = scale.to(dtype)[..., None].unbind(2)
    return ((unpack_int4(data).to(dtype).unflatten(1, (-1, weight.group)) - zero) * scale).flatten(1)


def int_product(x: Tensor, weight, dtype: torch.dtype) -> Tensor:
    """`matmul` by a weight in int8 or int4, which is rounded to `dtype`."""
    return F.linear(x, dequantize(weight, dtype))


@jit
def _dequantize_kernel(
    weight_ptr,
    scale_ptr,
    out_ptr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    out_ptr += row * IN
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    wait_for_previous(PDL)
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


def dequantize_triton(weight, dtype: torch.dtype) -> Tensor:
    """Does what `dequantize` does, with one kernel."""
    (n, k), group = weight.shape, weight.group
    out = torch.empty(n, k, dtype=dtype, device=weight.data.device)
    block = min(DEQUANTIZE_BLOCK, max(32, power_of_2(k)))
    launch(
        _dequantize_kernel,
        (n, -(-k // block)),
        *(weight.data, weight.scale.view(torch.int32) if group else weight.scale, out),
        IN=k,
        GROUP=group,
        WORDS=_int4_words(k),
        BLOCK=block,
        num_warps=DEQUANTIZE_WARPS,
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
def _int_operands(x, unit: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr):
    """x of `unit`, multiplied as _int_gemv_kernel says, and zero in the slots of other units, as the operands [W, 16, 8] of
    its two products."""
    other = _along(tl.arange(0, 8), 1) // (8 // SLOTS) - unit % SLOTS
    # Twice 2**76 or 2**80 where `other` is 0. (A comparison would give the operands another layout.)
    factor = ((other * other - 1) >> 31) & (0x65806580 if GROUP and unit % 2 else 0x67806780)
    factor = factor + tl.zeros_like(x)
    if PAIRS:
        x = tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [x, factor], tl.int32, True, 1)
        x = _bf16_pairs(x)
    else:
        x = (_bf16_pairs(x).to(tl.float32) * _bf16_pairs(factor).to(tl.float32)).to(tl.bfloat16)
    first, second = tl.split(tl.permute(tl.reshape(x, x.shape[:4] + [2, 4]), [0, 1, 2, 3, 5, 4]))
    return tl.permute(_int_operand(first, GROUP), [0, 2, 1]), tl.permute(_int_operand(second, GROUP), [0, 2, 1])


@jit
def _int_halves(words, unit: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr):
    """A unit of a chunk's words [4, 8, W, B, 4], for its two products: the bits [4, 8, W, B, 2] of four numbers each."""
    SHAPE: tl.constexpr = words.shape[:4] + [2, 2]
    if GROUP:  # of two words the same nibbles
        words = (words >> (unit % 4 // 2 * 8)) & (0x00F000F0 if unit % 2 else 0x000F000F)
        first, second = tl.split(tl.permute(tl.reshape(words, SHAPE), [0, 1, 2, 3, 5, 4]))
    else:  # of one word even and odd bytes, which are q + 128
        units = tl.split(tl.permute(tl.reshape(words, SHAPE), [0, 1, 2, 3, 5, 4]))
        words = units[unit % 2]
        if PAIRS:  # two instructions instead of four
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
    PAIRS: tl.constexpr,
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
    launch_dependents(PDL)
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
    wait_for_previous(PDL)
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
            x = _int_operands(xs[unit // SLOTS], unit, SLOTS, GROUP, PAIRS)
            halves = _int_halves(words[unit // UNITS], unit, GROUP, PAIRS)
            if GROUP and unit % PERIOD == 0:
                y = tl.zeros([WARPS, BLOCK_N, 8], tl.float32)
                total = tl.zeros([WARPS, BLOCK_N, 8], tl.float32)
            for half in tl.static_range(2):
                y = tl.dot(_int_bits(halves[half], GROUP), x[half], y)
            if unit % SLOTS == 0:  # of all slots at once
                x = _int_operands(xs[unit // SLOTS], unit, 1, GROUP, PAIRS)
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
        acc = tl.reshape(gelu_times(gate, up, tl.bfloat16), [BLOCK_N // 2, 8 // SLOTS])
    n = tl.program_id(0) * i.shape[0] + i
    m = tl.arange(0, 8 // SLOTS)
    store_partial(out_ptr, acc, None, n, m, rows, OUT)


@jit
def _int4_gemm_kernel(
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
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    """As _gemm_kernel, 128 columns at a time: a product of 32 for each fourth of them, by weights in bf16."""
    launch_dependents(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n, m, word = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, 16)
    row = tl.minimum(n, OUT - 1).to(tl.int64)
    x_ptrs = x_ptr + m[None, :] * IN + tl.arange(0, 32)[:, None]
    words_ptrs = weight_ptr + row[:, None] * (IN // 8) + word[None, :]
    pair_ptrs = scale_ptr + row * (IN // GROUP)
    first = tl.program_id(1) * tiles
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = acc
    wait_for_previous(PDL)
    for chunk in tl.range(first, tl.minimum(first + tiles, IN // 128), num_stages=STAGES):
        words = tl.load(words_ptrs + chunk * 16)
        if GEGLU:
            up_words = tl.load(words_ptrs + OUT * (IN // 8) + chunk * 16)
        for unit in tl.static_range(4):
            column = chunk * 128 + unit * 32
            x = tl.load(x_ptrs + column, mask=(m < rows)[None, :], other=0.0)
            acc = tl.dot(_int4_weights(words, tl.load(pair_ptrs + column // GROUP), unit, PAIRS), x, acc)
            if GEGLU:
                pair = tl.load(pair_ptrs + OUT * (IN // GROUP) + column // GROUP)
                up = tl.dot(_int4_weights(up_words, pair, unit, PAIRS), x, up)
    if GEGLU:
        acc = gelu_times(acc.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    store_partial(out_ptr, acc, None, n, m, rows, OUT)


@jit
def _int4_weights(words, pair, unit: tl.constexpr, PAIRS: tl.constexpr):
    """A unit of words [R, 16], with scale and zero in pair [R], as weights [R, 32] in bf16."""
    words = words >> (4 * unit)
    if PAIRS:  # 0x4300 + q is 128 + q
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


def int_triton(
    x: Tensor, weight, dtype: torch.dtype, partials: bool = False, geglu: bool = False, next_scale: Tensor | None = None
) -> Tensor:
    """`matmul_triton` or, with `geglu`, `matmul_geglu_triton` for weights in int8 and int4."""
    config = int_config(len(x), *weight.shape, weight.group)
    if config is None or dtype != torch.bfloat16:  # made in each call; of few rows unrounded, as by the kernels
        wide = torch.float32 if len(x) <= 8 else dtype
        y = F.linear(x.to(wide), dequantize_triton(weight, wide)).to(dtype)
        return geglu_triton(y, dtype, next_scale) if geglu else y
    if not weight.group and isinstance(config, GemmConfig):
        return with_config(x, weight, dtype, config, partials, geglu, next_scale)
    if not (partials or geglu):
        config = config._replace(split_k=1)
    elif geglu and isinstance(config, GemmConfig):
        config = config._replace(block_n=64)
    return int_matmul(x, weight, geglu, config)


def int_matmul(x: Tensor, weight, geglu: bool = False, config: GemmConfig | IntGemvConfig | None = None) -> Tensor:
    """`matmul`, or with `geglu` `matmul_geglu`, of rows in bf16, as float32 partial sums if config.split_k > 1.

    Up to 8 rows by int8, with K a multiple of 64; up to 64 by int4, with K a multiple of 128.
    """
    (n, k), m, group = weight.shape, len(x), weight.group
    config = config or int_config(m, n, k, group)
    n = n // 2 if geglu else n
    few = isinstance(config, IntGemvConfig)
    block_k = config.block_k * (config.num_warps if few else 1)
    tiles, split_k, out = split_k_output(x, n, block_k, 1 if geglu else config.split_k, x.dtype)
    operands = weight.data.view(torch.int32), weight.scale.view(torch.int32) if group else weight.scale
    constants = {"OUT": n, "IN": k, "GROUP": group, "GEGLU": geglu, "BLOCK_N": config.block_n}
    constants |= {"PAIRS": is_hopper(x.device), "num_warps": config.num_warps}
    if few:
        units = config.block_k // 32
        launch(
            _int_gemv_kernel,
            (-(-n // (config.block_n // 2 if geglu else config.block_n)), split_k),
            *(x.view(torch.int32), *operands, out, m, tiles),
            **constants,
            CHUNKS=units // (4 if group else 2),
            SLOTS=gcd(8 // power_of_2(m), units),
            WARPS=config.num_warps,
            AHEAD=config.ahead,
        )
    else:
        launch(
            _int4_gemm_kernel,
            (-(-n // config.block_n), split_k),
            *(x, *operands, out, m, tiles),
            **constants,
            BLOCK_M=config.block_m,
            STAGES=config.num_stages,
        )
    return out
