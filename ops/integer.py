"""Products by weights in int8 and int4.

A weight [N, K] is stored as integer codes q and what turns them into numbers; `group` is 0 for int8:

    int8    data [N, K] int8         scale [N] bf16                  number = q * scale
    int4    data [N, K / 8] int32    scale [N, K / group, 2] bf16    number = (q - zero) * scale,  q from 0 to 15

In int4, `group` adjacent columns of a row (a multiple of 32) share a scale and a zero. The first paragraphs say where
everything lies in memory, those from "Units" on how `_int_gemv_kernel` multiplies up to 8 rows.

**Words and chunks.** Kernels read codes as int32 words. 16 words of a row are a *chunk*: 64 columns of int8, 128 of
int4.

    int8, word w of a chunk          bits  31..24   23..16    15..8     7..0
                                   column    4w+3     4w+2     4w+1       4w

    int4, word w of a chunk          bits  31..28   27..24   23..20   19..16   15..12    11..8     7..4     3..0
                                   column   2w+97    2w+65    2w+33     2w+1    2w+96    2w+64    2w+32       2w
                                 nibble p       3        2        1        0        3        2        1        0

Two adjacent columns of int4 lie 16 bits apart, so that `word >> 4 * p & 0x000F000F` has them in the two halves of a
register, where the tensor cores and the instructions for pairs of bf16 expect two adjacent numbers. Where 128 does not
divide K, a chunk has W = 4 or 8 words instead of 16: nibble p of word w is column 2 * W * p + 2 * w, 16 bits above it
is the next column. But for that of a single row, products take no such weight; it is dequantized in each call.

**Scale and zero.** The scale and the zero of an int4 group are read as one int32, a *pair*:

    bits  31..16   15..0
            zero   scale       both bf16

A zero is a whole number of sixteenths, from 0 to 255 / 16. So q - zero is fewer than 256 sixteenths, and bf16, which
has 8 significant bits, holds it exactly.

**Units.** A *unit* is 32 columns of a chunk, which two products of 16 columns each multiply. Thread t of 4 loads words
4t to 4t + 3 of the chunk, 16 bytes, and so has 8 columns of each unit:

    words                     0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12 13 14 15
    thread t                           0 |           1 |           2 |           3
    int4, unit u = nibble u   u  u  u  u |  u  u  u  u |  u  u  u  u |  u  u  u  u    columns 32u + 8t to 32u + 8t + 7
    int8, unit                0  0  1  1 |  0  0  1  1 |  0  0  1  1 |  0  0  1  1    columns 16t + 8u to 16t + 8u + 7

Of a thread's words in a unit, the first half (int4: two words, int8: one) is for the unit's first product, the second
half for its second one. A mask takes two columns out of a word at once: adjacent ones of int4, but columns 4w and
4w+2 of int8, or 4w+1 and 4w+3, since its bytes lie 8 bits apart. x is brought into the same order.

**The fragments of a product.** The instruction mma.m16n8k16 multiplies 16 rows of the weight by 8 rows of x, over 16
columns, and adds the products to float32 sums. The three matrices are spread over the 32 threads of a warp. Thread
4g + t, with g from 0 to 7 and t from 0 to 3, holds these elements:

    weight [16 rows, 16 columns]      x [16 columns, 8 rows]            sums [16 rows of the weight, 8 rows of x]
    rows g and g + 8                  row g                             rows g and g + 8
    columns 2t, 2t+1, 2t+8, 2t+9      columns 2t, 2t+1, 2t+8, 2t+9      columns 2t, 2t+1

The order of the 16 columns changes nothing, as long as the weight and x have the same one. So a thread's four columns
may be any four, and they are four that it loaded: thread 4g + t loads row g of each block of eight rows of the weight,
and row g of x. Every code and every number of x is then with the thread that multiplies it, and nothing goes through
shared memory until the warps' sums are added.

Tensors of the GEMV are therefore [4, 8, W, B, C], where each dimension is one of threads, warps or registers:

    4   threads: t, for words 4t to 4t + 3 of a chunk
    8   threads: g, the row of the weight in its block of eight rows, or the row of x and column n of the sums
    W   warps: each has other columns of the weight and x (other tiles)
    B   registers: the blocks of eight rows of the weight; 1 for x
    C   registers: the four words that were loaded, or the two words or four numbers of one product

Triton chooses which dimensions the threads of a load lie along. Older versions begin with the first dimensions, newer
ones with the last. For newer ones (LANES_LAST) the same tensors are [B, W, 8, 4, C]; only `_along_dimension` and the
permutations depend on it.

**Tiles.** A *tile* is what a warp multiplies at a time: CHUNKS adjacent chunks of every row of the weight that its
program owns. The warps of a program, and the split_k programs that own the same rows, share the tiles of those rows.

**Slots.** A product takes 8 rows of x, one for each column of its sums. With fewer rows of x, those 8 columns are
divided among SLOTS units, 8 / SLOTS columns for each; a unit's part is its *slot*. Of 2 rows of x, for example, SLOTS
is 4, if a tile has as many units:

    column n of the sums     0  1 | 2  3 | 4  5 | 6  7
    row m of x               0  1 | 0  1 | 0  1 | 0  1
    slot, a unit each           0 |    1 |    2 |    3

So all 32 threads load x of SLOTS units at once, 16 bytes each. For the product of one unit, x is set to zero in the
other slots, whose sums stay as they are. At the end the SLOTS sums of each row are added.

**Codes as bf16.** Converting integers to bf16 would cost more than all else. But 16 bits whose value u is below 256 are
the bf16 number u * 2**-133 as they stand: a denormal one for u < 128, and from 128 on the next binade, which has the
same steps. So codes are only masked, and x is multiplied by 2**80 to make up for the small factor, which works while
|x| < 2**47. In odd units of int4 the mask leaves the code in bits 4 to 7, 16 times as large, and x is multiplied by
2**76 instead. The sums are 2**-53 times what they should be, and are multiplied by 2**53 at the end. In int8 the code
is in two's complement: its highest bit is flipped, which makes it u = q + 128.

**Zeros.** The sum of (u - zero) * x is the sum of u * x less zero times the sum of x. A further product computes the
sums of x, by a weight of ones: one product for all slots, whose sums lie in the same threads and registers as those of
u * x. For int8 every zero is 128, and the weight is -128 instead of 1, so that both sums are just added.

**Periods.** A *period* is PERIOD units. After each, int4's sums are scaled and added to those of earlier periods. A
period is as many units as a group and a tile have in common or, if that is more, SLOTS units: their sums lie in
different columns, and each column takes the scale and zero of its own unit. int8's sums are scaled once, at the end.

**9 to 64 rows.** `_int4_gemm_kernel` converts codes to numbers: the bits 0x4300 + q are the bf16 number 128 + q, from
which 128 and zero are subtracted, both exactly, before the product by the scale is rounded. int8 is multiplied by
`_gemm_kernel` of ops/matmul.py.
"""

from math import gcd
from typing import NamedTuple

import torch
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
from ops.matmul import GemmConfig, linear, linear_config, pick_split_k, split_k_output, store_partial, with_config
from ops.norm import geglu_triton
from ops.peers import Mail, Parts, out_and_mail

# Versions of Triton differ in two things. With LANES_LAST it spreads the threads of a load over the last dimensions
# first, not over the first ones. With PAIRS_APART it gives thread t columns 2t, 2t + 1, 2t + 8, 2t + 9 of int4's
# operands, as the instruction has them, not columns 4t to 4t + 3.
LONGEST_ROW = 8192  # columns that `int4_row` takes
LANES_LAST = tl.constexpr(TRITON_VERSION >= (3, 7))
PAIRS_APART = tl.constexpr(TRITON_VERSION >= (3, 8))
DEQUANTIZE_BLOCK, DEQUANTIZE_WARPS = 4096, 4


class IntGemvConfig(NamedTuple):
    """How `_int_gemv_kernel` multiplies up to 8 rows: a program owns block_n outputs, a tile has block_k columns.

    The num_warps warps of a program, and those of the split_k programs that own the same outputs, share the tiles of a
    row. With `ahead` a warp loads its next tile before it multiplies this one; without, the compiler puts the loads
    behind the products, which takes fewer registers.
    """

    block_n: int
    block_k: int
    num_warps: int
    split_k: int = 1
    ahead: bool = False


def int_config(m: int, n: int, k: int, group: int) -> GemmConfig | IntGemvConfig | None:
    """Picks how m rows are multiplied by a weight [n, k] in int4 with groups of `group`, or in int8 if that is 0.

    None means that the weight is dequantized in each call and multiplied by cuBLAS. The choices are those that were
    fastest in whole steps of gemma-7b and gemma-2b on an H200.
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
        if group >= 128 and n > 32768:
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
    if m == 1 and (not group or group >= 128):
        return IntGemvConfig(block_n=16, block_k=512, num_warps=4, split_k=2 if group and k > 4096 else 1, ahead=True)
    return IntGemvConfig(block_n=16, block_k=256, num_warps=4, split_k=2, ahead=m == 1)


def words_per_chunk(k: int) -> int:
    """Returns how many words W a chunk of int4 has, in rows of k columns, a multiple of 32: 16 if 128 divides k."""
    return min(16, (k & -k) // 8)


def _nibble_shifts(device: torch.device) -> Tensor:
    """Returns the lowest bit [4, 1, 2] int32 of nibble p of the first and of the second of two columns, for each p."""
    return torch.arange(8, dtype=torch.int32, device=device).view(2, 1, 4).permute(2, 1, 0) * 4


def pack_int4(q: Tensor) -> Tensor:
    """Packs codes q [..., K], from 0 to 15, into int32 words [..., K / 8], as the head of this file shows.

    K is a multiple of 32.
    """
    q = q.unflatten(-1, (-1, 4, words_per_chunk(q.shape[-1]), 2)).int()
    return (q << _nibble_shifts(q.device)).sum((-3, -1), dtype=torch.int32).flatten(-2)


def unpack_int4(packed: Tensor) -> Tensor:
    """Returns the codes [..., K] int32, from 0 to 15, of words [..., K / 8] that `pack_int4` made."""
    words = packed.unflatten(-1, (-1, 1, words_per_chunk(8 * packed.shape[-1]), 1))
    return (words >> _nibble_shifts(packed.device) & 15).flatten(-4)


def dequantize(weight, dtype: torch.dtype) -> Tensor:
    """Computes the numbers [N, K], or [E, N, K], of a weight in int8 or int4, in `dtype`, rounded once."""
    data, scale = weight.data, weight.scale
    if not weight.group:
        return data.to(dtype) * scale.to(dtype)[..., None]
    scale, zero = scale.to(dtype)[..., None].unbind(-2)
    return ((unpack_int4(data).to(dtype).unflatten(-1, (-1, weight.group)) - zero) * scale).flatten(-2)


def int_product(x: Tensor, weight, dtype: torch.dtype) -> Tensor:
    """Multiplies x [M, K] by a weight in int8 or int4, dequantized to x's dtype: the definition of `matmul`, [M, N]."""
    return linear(x, dequantize(weight, x.dtype), dtype)


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
    """Dequantizes BLOCK columns of a row; program (row, block). GROUP is 0 for int8; WORDS is W of int4's chunks."""
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
        for i in tl.static_range(8):  # bits 4i to 4i + 3: nibble i % 4 of the first or second column
            columns = word // WORDS * (8 * WORDS) + i % 4 * (2 * WORDS) + word % WORDS * 2 + i // 4
            pair = tl.load(scale_ptr + row * (IN // GROUP) + columns // GROUP, mask=mask, other=0)
            scale, zero = scale_and_zero(pair)
            y = (((words >> (4 * i)) & 15).to(tl.float32) - zero) * scale
            tl.store(out_ptr + columns, y.to(dtype), mask=mask)


def dequantize_triton(weight, dtype: torch.dtype) -> Tensor:
    """Does what `dequantize` does, with one kernel."""
    k, group = weight.shape[-1], weight.group
    out = torch.empty(*weight.data.shape[:-1], k, dtype=dtype, device=weight.data.device)
    block = min(DEQUANTIZE_BLOCK, max(32, power_of_2(k)))
    launch(
        _dequantize_kernel,
        (out.numel() // k, -(-k // block)),
        *(weight.data, weight.scale.view(torch.int32) if group else weight.scale, out),
        IN=k,
        GROUP=group,
        WORDS=words_per_chunk(k),
        BLOCK=block,
        num_warps=DEQUANTIZE_WARPS,
    )
    return out


@jit
def scale_and_zero(pair):
    """Splits pairs, int32 each, into scales and zeros, float32 each."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@jit
def _bf16_pairs(words):
    """Splits int32 words [...] into the two bf16 numbers in each: [..., 2], the lower half first."""
    low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
    return tl.join(low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True))


@jit
def _along_dimension(x, D: tl.constexpr):
    """Gives x [N] five dimensions: N at dimension D, from 0 to 3, of [4, 8, W, B, C], and 1 at the others."""
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
def _weight_rows(block, g, OUT: tl.constexpr, GEGLU: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns which row of the weight is row g of block `block` of the program's blocks of eight rows.

    With GEGLU the blocks are eight rows of gate and the same eight of up, in turn, so that a thread has both. A row
    behind the last one is replaced by the last one.
    """
    if GEGLU:
        n = tl.program_id(0) * (BLOCK_N // 2) + block // 2 * 8 + g
        row = tl.minimum(n, OUT - 1) + block % 2 * OUT
    else:
        row = tl.minimum(tl.program_id(0) * BLOCK_N + block * 8 + g, OUT - 1)
    return row


@jit
def _load_weight_tile(
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
    """Loads each warp's tile of the weight, and of int4 its scales and zeros. `tile` [1, 1, W, 1, 1] numbers the tiles.

    Returns two tuples. `words` has [4, 8, W, B, 4] int32 for each chunk: element [t, g, w, b, i] is word 4t + i of row
    g of block b. `pairs`, empty for int8, has [4, 8, W, B, 1 or 2] int32 for each PERIOD units: element [t, g, w, b, j]
    is the pair that column 2t + j of the sums needs, that of the unit in whose slot the column is. It is one element
    for both columns where they have the same pair. Tiles from `end` on, and chunks behind the row, are 0 and not read.
    """
    BOTH: tl.constexpr = 2 if GROUP == 32 and SLOTS == 8 else 1  # columns 2t and 2t + 1 of the sums are of two groups
    ROW_CHUNKS: tl.constexpr = IN // (128 if GROUP else 64)
    t, g = _along_dimension(tl.arange(0, 4), 0), _along_dimension(tl.arange(0, 8), 1)
    block = _along_dimension(tl.arange(0, BLOCK_N // 8), 3)
    j, four = tl.arange(0, BOTH), tl.arange(0, 4)
    row = _weight_rows(block, g, OUT, GEGLU, BLOCK_N).to(tl.int64)
    words, pairs = (), ()
    for c in tl.static_range(CHUNKS):
        ptrs = weight_ptr + row * (ROW_CHUNKS * 16) + (tile * CHUNKS + c) * 16 + 4 * t + four
        words = words + (tl.load(ptrs, mask=_has_chunk(tile, c, end, ROW_CHUNKS, CHUNKS), other=0),)
    for first in tl.static_range(0, 4 * CHUNKS if GROUP else 0, PERIOD):
        unit = first + (2 * t + j) // (8 // SLOTS)
        ptrs = scale_ptr + row * (IN // GROUP) + (tile * (4 * CHUNKS) + unit) // (GROUP // 32)
        pairs = pairs + (tl.load(ptrs, mask=_has_chunk(tile, unit // 4, end, ROW_CHUNKS, CHUNKS), other=0),)
    return words, pairs


@jit
def _has_chunk(tile, chunk, end, ROW_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr):
    """Says whether tiles are before `end` and have a chunk of number `chunk`; a row has ROW_CHUNKS chunks in all."""
    if ROW_CHUNKS % CHUNKS == 0:  # every tile has every chunk
        chunk = 0 * chunk
    return tile * CHUNKS + chunk < tl.where(tile < end, ROW_CHUNKS, 0)


@jit
def _load_x_tile(
    x_ptr, rows, tile, end, IN: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr
):
    """Loads each warp's tile of x: a tuple of [4, 8, W, 1, 4] int32 words for each SLOTS units.

    A word has two numbers. Element [t, n, w, 0, i] is word i of the four that thread t multiplies by its codes of the
    unit in slot n // (8 / SLOTS), and is of row n % (8 / SLOTS) of x. Words 0 and 1 are for the unit's first product, 2
    and 3 for its second one. Rows from `rows` on, tiles from `end` on and chunks behind the row are 0 and not read.
    """
    UNITS: tl.constexpr = 4 if GROUP else 2  # of a chunk
    ROW_CHUNKS: tl.constexpr = IN // (32 * UNITS)
    t, n = _along_dimension(tl.arange(0, 4), 0), _along_dimension(tl.arange(0, 8), 1)
    slot, m, four = n // (8 // SLOTS), n % (8 // SLOTS), tl.arange(0, 4)
    xs = ()
    for first in tl.static_range(0, UNITS * CHUNKS, SLOTS):
        unit = first + slot
        mask = m < tl.where(_has_chunk(tile, unit // UNITS, end, ROW_CHUNKS, CHUNKS), rows, 0)
        unit = tile * (CHUNKS * UNITS) + unit
        if GROUP:
            offsets = unit * 16 + 4 * t
        else:
            offsets = unit // 2 * 32 + unit % 2 * 4 + 8 * t
        x = tl.load(x_ptr + m * (IN // 2) + offsets + four, mask=mask, other=0)
        if not GROUP:  # columns 0 and 2, then 1 and 3, as masks take the bytes of a word of codes
            low, high = tl.split(tl.reshape(x, x.shape[:4] + [2, 2]))
            pairs = tl.join((low & 65535) | (high << 16), ((low >> 16) & 65535) | (high & -65536))
            x = tl.reshape(pairs, x.shape)
        xs = xs + (x,)
    return xs


@jit
def _x_operands(x, unit: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr, BF16X2: tl.constexpr):
    """Makes the operands [W, 16, 8] of the two products of `unit`, of its words x [4, 8, W, 1, 4].

    x is multiplied by 2**80 or, for odd units of int4, by 2**76, and by 0 in the slots of other units.
    """
    other = _along_dimension(tl.arange(0, 8), 1) // (8 // SLOTS) - unit % SLOTS
    # A pair of 2**76 or of 2**80 where `other` is 0, else of 0. (A comparison would give the operands another layout.)
    factor = ((other * other - 1) >> 31) & (0x65806580 if GROUP and unit % 2 else 0x67806780)
    factor = factor + tl.zeros_like(x)
    if BF16X2:
        x = tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [x, factor], tl.int32, True, 1)
        x = _bf16_pairs(x)
    else:
        x = (_bf16_pairs(x).to(tl.float32) * _bf16_pairs(factor).to(tl.float32)).to(tl.bfloat16)
    first, second = tl.split(tl.permute(tl.reshape(x, x.shape[:4] + [2, 4]), [0, 1, 2, 3, 5, 4]))
    return tl.permute(_as_operand(first, GROUP), [0, 2, 1]), tl.permute(_as_operand(second, GROUP), [0, 2, 1])


@jit
def _code_bits(words, unit: tl.constexpr, GROUP: tl.constexpr, BF16X2: tl.constexpr):
    """Takes the codes of a unit out of a chunk's words [4, 8, W, B, 4].

    Returns those for its first and for its second product, each [4, 8, W, B, 2] int32 words of two 16-bit patterns. The
    pattern of a code is u or, in odd units of int4, 16 * u.
    """
    SHAPE: tl.constexpr = words.shape[:4] + [2, 2]
    if GROUP:  # a product takes the same two nibbles of two words
        words = (words >> (unit % 4 // 2 * 8)) & (0x00F000F0 if unit % 2 else 0x000F000F)
        first, second = tl.split(tl.permute(tl.reshape(words, SHAPE), [0, 1, 2, 3, 5, 4]))
    else:  # a product takes even and odd bytes of one word; with the highest bit flipped they are q + 128
        units = tl.split(tl.permute(tl.reshape(words, SHAPE), [0, 1, 2, 3, 5, 4]))
        words = units[unit % 2]
        if BF16X2:  # two instructions instead of four
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
def _as_matrices(x):
    """Returns x [4, 8, W, B, C] as a matrix for each warp, [W, 8 * B, 4 * C]: rows 8b + g, columns C * t + c."""
    x = tl.permute(x, [1, 0, 2, 3, 4] if LANES_LAST else [2, 3, 1, 0, 4])
    SHAPE: tl.constexpr = [x.shape[0], 8 * x.shape[1], 4 * x.shape[4]]
    return tl.reshape(x, SHAPE)


@jit
def _as_operand(x, GROUP: tl.constexpr):
    """Returns numbers [4, 8, W, B, 4] as an operand of a product, [W, 8 * B, 16].

    Thread t's four numbers become those columns that Triton wants it to have.
    """
    if not (GROUP and PAIRS_APART):
        x = _as_matrices(x)
    else:
        SPLIT: tl.constexpr = x.shape[:4] + [2, 2]
        x = tl.permute(tl.reshape(x, SPLIT), [1, 0, 2, 4, 3, 5] if LANES_LAST else [2, 3, 1, 4, 0, 5])
        SHAPE: tl.constexpr = [x.shape[0], 8 * x.shape[1], 16]
        x = tl.reshape(x, SHAPE)
    return x


@jit
def _code_operand(words, GROUP: tl.constexpr):
    """Returns 16-bit patterns, two in each word of [4, 8, W, B, 2], as the bf16 operand [W, 8 * B, 16] of a product."""
    SHAPE: tl.constexpr = words.shape[:4] + [4]
    return _as_operand(tl.reshape(_bf16_pairs(words), SHAPE), GROUP)


@jit
def _int_gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    mail,
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
    BF16X2: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiplies up to 8 rows of x in bf16 by a weight in int8 or int4; the head of this file explains how.

    Program (block of BLOCK_N outputs, split) has WARPS warps, and each warp has `tiles` tiles. A warp loads its first
    tile of the weight while the kernel before still runs, and each further tile while it multiplies the one before.
    """
    launch_dependents(PDL)
    UNITS: tl.constexpr = 4 if GROUP else 2  # of a chunk
    first = (tl.program_id(1) * WARPS + _along_dimension(tl.arange(0, WARPS), 2)) * tiles
    end = tl.minimum(first + tiles, tl.cdiv(IN, 32 * UNITS * CHUNKS))
    acc = tl.zeros([WARPS, BLOCK_N, 8], tl.float32)
    y, total = acc, acc  # sums of u * x and of x, of a period in int4 and of everything in int8
    PERIOD: tl.constexpr = max(SLOTS, min(GROUP // 32, 4 * CHUNKS))  # units whose sums are scaled at once
    words, pairs = _load_weight_tile(
        weight_ptr, scale_ptr, first, end, OUT, IN, GROUP, GEGLU, BLOCK_N, CHUNKS, SLOTS, PERIOD
    )
    SHAPE: tl.constexpr = words[0].shape[:4] + [2]
    ones = tl.full(SHAPE, 0x00010001 if GROUP else -0x7F7F7F80, tl.int32)  # pairs of 1, or of -128 (0x80808080)
    i = tl.arange(0, BLOCK_N)
    if not GROUP:
        scale = tl.load(scale_ptr + _weight_rows(i // 8, i % 8, OUT, GEGLU, BLOCK_N))
    wait_for_previous(PDL)
    xs = _load_x_tile(x_ptr, rows, first, end, IN, GROUP, CHUNKS, SLOTS)
    for count in tl.range(tiles, num_stages=1):
        tile = first + count + 1
        if not AHEAD or count + 1 < tiles:  # a branch is what keeps loads in front
            next_words, next_pairs = _load_weight_tile(
                weight_ptr, scale_ptr, tile, end, OUT, IN, GROUP, GEGLU, BLOCK_N, CHUNKS, SLOTS, PERIOD
            )
            next_xs = _load_x_tile(x_ptr, rows, tile, end, IN, GROUP, CHUNKS, SLOTS)
        else:
            next_words, next_pairs, next_xs = words, pairs, xs
        for unit in tl.static_range(UNITS * CHUNKS):
            x = _x_operands(xs[unit // SLOTS], unit, SLOTS, GROUP, BF16X2)
            halves = _code_bits(words[unit // UNITS], unit, GROUP, BF16X2)
            if GROUP and unit % PERIOD == 0:
                y = tl.zeros([WARPS, BLOCK_N, 8], tl.float32)
                total = tl.zeros([WARPS, BLOCK_N, 8], tl.float32)
            for half in tl.static_range(2):
                y = tl.dot(_code_operand(halves[half], GROUP), x[half], y)
            if unit % SLOTS == 0:  # the sums of x of all slots at once
                x = _x_operands(xs[unit // SLOTS], unit, 1, GROUP, BF16X2)
                for half in tl.static_range(2):
                    total = tl.dot(_code_operand(ones << (unit % 2 * 4 if GROUP else 0), GROUP), x[half], total)
            if GROUP and unit % PERIOD == PERIOD - 1:
                pair = tl.broadcast_to(pairs[unit // PERIOD], SHAPE)
                scale, zero = scale_and_zero(_as_matrices(pair))
                acc += scale * (y - zero * total)
        words, pairs, xs = next_words, next_pairs, next_xs
    if not GROUP:
        acc = y + total
    acc = tl.sum(acc, axis=0)
    acc = tl.sum(tl.reshape(acc, [BLOCK_N, SLOTS, 8 // SLOTS]), axis=1) * 2.0**53  # 2**-133 * 2**80 is undone
    if not GROUP:
        acc *= scale.to(tl.float32)[:, None]
    if GEGLU:
        i = tl.arange(0, BLOCK_N // 2)
        acc = tl.reshape(acc.to(tl.bfloat16).to(tl.float32), [BLOCK_N // 16, 2, 8, 8 // SLOTS])
        gate, up = tl.split(tl.permute(acc, [0, 2, 3, 1]))
        acc = tl.reshape(gelu_times(gate, up, tl.bfloat16), [BLOCK_N // 2, 8 // SLOTS])
    n = tl.program_id(0) * i.shape[0] + i
    m = tl.arange(0, 8 // SLOTS)
    store_partial(out_ptr, mail, acc, None, n, m, rows, OUT)


@jit
def _int4_gemm_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    mail,
    rows,
    tiles,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BF16X2: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiplies up to BLOCK_M rows of x by a weight in int4, as `_gemm_kernel` does, by codes converted to bf16.

    Program (block of BLOCK_N outputs, split) takes `tiles` chunks of 128 columns, and of each its 4 units in turn.
    """
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
            acc = tl.dot(int4_numbers(words, tl.load(pair_ptrs + column // GROUP), unit, dtype, BF16X2), x, acc)
            if GEGLU:
                pair = tl.load(pair_ptrs + OUT * (IN // GROUP) + column // GROUP)
                up = tl.dot(int4_numbers(up_words, pair, unit, dtype, BF16X2), x, up)
    if GEGLU:
        acc = gelu_times(acc.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    store_partial(out_ptr, mail, acc, None, n, m, rows, OUT)


@jit
def int4_numbers(words, pair, unit: tl.constexpr, dtype: tl.constexpr, BF16X2: tl.constexpr):
    """Dequantizes nibble `unit` of words [R, W], a chunk of R rows, with a pair [R] each: [R, 2 * W] in `dtype`, rounded
    once. BF16X2 makes bf16 only."""
    SHAPE: tl.constexpr = [words.shape[0], 2 * words.shape[1]]
    words = words >> (4 * unit)
    if BF16X2:  # the bits 0x4300 + q are the bf16 128 + q
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
        y = tl.reshape(_bf16_pairs(y), SHAPE)
    else:
        scale, zero = scale_and_zero(pair[:, None, None])
        y = tl.join(words & 15, (words >> 16) & 15).to(tl.float32)
        y = tl.reshape((y - zero) * scale, SHAPE).to(dtype)
    return y


@jit
def _int4_row_kernel(
    x_ptr,
    weight_ptr,
    pair_ptr,
    out_ptr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiplies one row of x by BLOCK_N rows of the weight, of at most BLOCK words. The head of this file has the
    layout."""
    launch_dependents(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, word = tl.minimum(n, OUT - 1)[:, None], tl.arange(0, BLOCK)[None, :]
    mask, column = word < IN // 8, word // WORDS * (8 * WORDS) + word % WORDS * 2
    words = tl.load(weight_ptr + row * (IN // 8) + word, mask=mask, other=0)
    acc = tl.zeros(words.shape, tl.float32)
    wait_for_previous(PDL)
    for nibble in tl.static_range(4):
        k = column + nibble * (2 * WORDS)
        scale, zero = scale_and_zero(tl.load(pair_ptr + row * (IN // GROUP) + k // GROUP, mask=mask, other=0))
        x = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(x_ptr + k + 1, mask=mask, other=0.0).to(tl.float32)
        # The bits of 128 + q in bfloat16, twice: no conversion, of which a GPU makes few at a time
        low, high = scale_and_zero(((words >> (4 * nibble)) & 0x000F000F) | 0x43004300)
        acc += scale * ((low - (zero + 128)) * x + (high - (zero + 128)) * y)
    tl.store(out_ptr + n, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=n < OUT)


def int4_row(x: Tensor, weight, dtype: torch.dtype | None = None) -> Tensor:
    """Multiplies one row x [1, K] by a weight in int4, whatever its chunks, with whole rows at a time: [1, N] in `dtype`,
    or that of x."""
    (n, k), block_n = weight.shape, 4
    out = torch.empty(1, n, dtype=dtype or x.dtype, device=x.device)
    launch(
        _int4_row_kernel,
        (-(-n // block_n),),
        *(x, weight.data, weight.scale.view(torch.int32), out),
        OUT=n,
        IN=k,
        GROUP=weight.group,
        WORDS=words_per_chunk(k),
        BLOCK_N=block_n,
        BLOCK=power_of_2(k // 8),
        num_warps=4,
    )
    return out


def int_triton(
    x: Tensor,
    weight,
    dtype: torch.dtype,
    partials: bool = False,
    geglu: bool = False,
    next_scale: Tensor | None = None,
    mail: Mail | None = None,
) -> Tensor | Parts:
    """Multiplies x [M, K] by a weight in int8 or int4: `matmul_triton` or, with `geglu`, `matmul_geglu_triton`."""
    config = int_config(len(x), *weight.shape, weight.group)
    if config is None and len(x) == 1 and weight.group and weight.shape[1] <= LONGEST_ROW and not geglu:
        return int4_row(x, weight, dtype)
    if config is None or x.dtype != torch.bfloat16:  # made in each call; of few rows unrounded, as by the kernels
        wide = torch.float32 if len(x) <= 8 else x.dtype
        y = linear(x.to(wide), dequantize_triton(weight, wide), dtype)
        return geglu_triton(y, dtype, next_scale) if geglu else y
    if not weight.group and isinstance(config, GemmConfig):
        return with_config(x, weight, dtype, config, partials, geglu, next_scale, mail)
    if not (partials or geglu):
        config = config._replace(split_k=1)
    elif geglu and isinstance(config, GemmConfig):
        config = config._replace(block_n=64)
    return int_matmul(x, weight, geglu, config, dtype, mail)


def int_matmul(
    x: Tensor,
    weight,
    geglu: bool = False,
    config: GemmConfig | IntGemvConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mail: Mail | None = None,
) -> Tensor | Parts:
    """Multiplies x [M, K] in bf16 as `config` says: `matmul` or, with `geglu`, `matmul_geglu`.

    int8 takes up to 8 rows, and K a multiple of 64; int4 takes up to 64 rows, and K a multiple of 128. The result is
    [M, N] in `dtype` or, if config.split_k > 1 and without `geglu`, float32 partial sums [split_k, M, N]; with `mail`
    they may be sent.
    """
    (n, k), m, group = weight.shape, len(x), weight.group
    config = config or int_config(m, n, k, group)
    n = n // 2 if geglu else n
    few = isinstance(config, IntGemvConfig)
    block_k = config.block_k * (config.num_warps if few else 1)
    tiles, split_k, out = split_k_output(x, n, block_k, 1 if geglu else config.split_k, dtype, mail)
    operands = weight.data.view(torch.int32), weight.scale.view(torch.int32) if group else weight.scale
    constants = {"OUT": n, "IN": k, "GROUP": group, "GEGLU": geglu, "BLOCK_N": config.block_n}
    constants |= {"BF16X2": is_hopper(x.device), "num_warps": config.num_warps}
    if few:
        units = config.block_k // 32
        launch(
            _int_gemv_kernel,
            (-(-n // (config.block_n // 2 if geglu else config.block_n)), split_k),
            *(x.view(torch.int32), *operands, *out_and_mail(out), m, tiles),
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
            *(x, *operands, *out_and_mail(out), m, tiles),
            **constants,
            BLOCK_M=config.block_m,
            STAGES=config.num_stages,
        )
    return out
