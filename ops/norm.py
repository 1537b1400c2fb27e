"""What is done to rows: the embedding's lookup, residual + RMSNorm, GeGLU, each with rounding to FP8 at its end."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.common import (
    E4M3,
    gelu_times,
    inverse_rms_of,
    jit,
    launch,
    launch_dependents,
    load_scalar,
    load_sum,
    normed,
    power_of_2,
    round_fp8,
    row_warps,
    split_k_of,
    store_rounded,
    summed,
    tl,
    triton_dtype,
    wait_for_previous,
)
from ops.peers import Parts, empty_row, mailboxes, next_fill, pieces, received_row, received_sum, send_row
from parallel import Sums

GEGLU_BLOCK, GEGLU_WARPS = 1024, 4
LAYERS_BLOCK = 4  # layers whose inputs a program makes

# ---------------------------------------------------------------------------------------------------------------------
# Embedding


def embed(
    tokens: Tensor,
    weight: Tensor,
    factor: float,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    first: int = 0,
    sums: Sums | None = None,
) -> Tensor:
    """Looks up rows of weight [V, N] for tokens [M] (int64) and multiplies them by `factor`: [M, N] in `dtype`.

    `scale` is a float32 scalar for a weight in E4M3, one bf16 number a row [V] for a weight in int8. The weight may be in
    the host's memory while tokens are on a GPU; a kernel then needs it pinned. With `sums` the rows are those of tokens
    from `first` on, and other ranks have the others.
    """
    if sums is not None:
        here = (tokens >= first) & (tokens < first + len(weight))
        own = embed((tokens - first).clamp(0, len(weight) - 1), weight, factor, dtype, scale)
        return sums.total(own.masked_fill(~here[:, None], 0))
    if weight.device != tokens.device:
        return F.embedding(tokens.to(weight.device), weight).to(tokens.device) * factor
    if scale is None:
        return F.embedding(tokens, weight) * factor
    if weight.dtype == torch.int8:
        return (F.embedding(tokens, weight) * scale[tokens].float()[..., None]).to(dtype) * factor
    rows = F.embedding(tokens, weight.view(torch.uint8)).view(E4M3)  # as bytes, which every device can look up
    return (rows.float() * scale).to(dtype) * factor


@jit
def _embed_kernel(
    tokens_ptr,
    weight_ptr,
    scale_ptr,
    x_ptr,
    mail,
    factor,
    first,
    rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    boxes = mailboxes(mail)
    wait_for_previous(PDL)
    if mail is not None:
        count = next_fill(mail, row)
    token = tl.load(tokens_ptr + row) - first
    known = (token >= 0) & (token < rows)
    here = columns < tl.where(known, N, 0)
    x = tl.load(weight_ptr + token * N + columns, mask=here, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        if weight_ptr.dtype.element_ty == tl.int8:
            scale_ptr += tl.where(known, token, 0)
        x = (x * tl.load(scale_ptr).to(tl.float32)).to(dtype).to(tl.float32)
    if mail is not None:
        send_row(x, mail, boxes, row, count, columns, mask)
        x = received_row(x, mail, boxes, row, count, columns, mask)
    tl.store(x_ptr + row * N + columns, (x * factor).to(dtype), mask=mask)


def embed_triton(
    tokens: Tensor,
    weight: Tensor,
    factor: float,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    first: int = 0,
    sums: Sums | None = None,
) -> Tensor:
    """Does what `embed` does, with one kernel."""
    mail = None if sums is None else sums.mail(len(tokens), weight.shape[1])
    if sums is not None and mail is None:
        return embed(tokens, weight, factor, dtype, scale, first, sums)
    x = torch.empty(len(tokens), weight.shape[1], dtype=dtype, device=tokens.device)
    for piece in pieces(mail, len(tokens)):
        launch(
            _embed_kernel,
            (piece.stop - piece.start,),
            *(tokens[piece], weight, scale, x[piece], mail, factor, first, len(weight)),
            N=weight.shape[1],
            BLOCK=power_of_2(weight.shape[1]),
            num_warps=row_warps(weight.shape[1]),
        )
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Residual and norm


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 1.0) -> Tensor:
    """x / rms(x) * (offset + weight) of rows x [..., N], in float32, rounded once at the end (arXiv:1910.07467).

    Without weight [N] it is x / rms(x).
    """
    y = x.float()
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = torch.addcmul(y if offset == 1 else offset * y, y, weight)
    return y.to(x.dtype)


class Pair(NamedTuple):
    """Two outputs of a layer, which are added up, each normed before: RMSNorm(y) * (offset + weight) + RMSNorm(z) *
    (offset + other_weight). y and z are as `add_norm` takes y; each norm, and the sum, is rounded."""

    y: Tensor | Parts
    weight: Tensor
    z: Tensor | Parts
    other_weight: Tensor


def add_norm(
    x: Tensor,
    y: Tensor | Pair | None,
    post_weight: Tensor | None,
    weight: Tensor | None,
    eps: float,
    input_scale: Tensor | None = None,
    offset: float = 1.0,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Adds a layer's output to the residual stream and norms the sum: (x + y, RMSNorm(x + y) * (offset + weight)).

    x [M, N] is the residual stream. y is [M, N] in x's dtype, float32 partial sums [split_k, M, N], the sum of a `Pair`
    of such, or None for no output yet. With post_weight [N], y gets a norm of its own before the sum. With factor [1] the
    sum, rounded, is multiplied by it; there is a y then. Without weight [N] the second result is None. The second result
    is in x's dtype or, with input_scale, in E4M3.
    """
    if y is not None:
        if isinstance(y, Pair):
            y, y_weight, z, z_weight = y
            z = rms_norm(summed(z, x.dtype), z_weight, eps, offset)
            y = rms_norm(summed(y, x.dtype), y_weight, eps, offset) + z
        else:
            y = summed(y, x.dtype)
        x = x + (y if post_weight is None else rms_norm(y, post_weight, eps, offset))
        x = x if factor is None else (x * factor).to(x.dtype)
    if weight is None:
        return x, None
    h = rms_norm(x, weight, eps, offset)
    return x, h if input_scale is None else round_fp8(h, input_scale)


@jit
def sum_over_ranks(y_ptr, mail, boxes, row, rows, columns, mask, N, SPLIT_K: tl.constexpr, dtype: tl.constexpr):
    """Adds up a row over the ranks, of SPLIT_K partial sums of each, which are sent now or, without y_ptr, were already."""
    if y_ptr is None:
        y = received_sum(mail, row, rows, columns, mask, SPLIT_K)
    else:
        count = next_fill(mail, row)
        y = load_sum(y_ptr, row, rows, columns, mask, N, SPLIT_K, tl.float32)
        send_row(y, mail, boxes, row, count, columns, mask)
        y = received_row(y, mail, boxes, row, count, columns, mask)
    return y.to(dtype).to(tl.float32)


@jit
def _pair_sum(
    y_ptr,
    weight,
    z_ptr,
    other,
    mail,
    boxes,
    row,
    rows,
    columns,
    mask,
    N,
    eps,
    OFFSET: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OTHER_SPLIT_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """Computes a row of the sum of a `Pair`."""
    if mail is None:
        y = load_sum(y_ptr, row, rows, columns, mask, N, SPLIT_K, dtype)
        z = load_sum(z_ptr, row, rows, columns, mask, N, OTHER_SPLIT_K, dtype)
        y = normed(y, inverse_rms_of(y, N, eps), weight, dtype, OFFSET)
    else:
        z_slot = mail.SLOTS // 2 + row
        if z_ptr is not None:
            z_count = next_fill(mail, z_slot)
            z = load_sum(z_ptr, row, rows, columns, mask, N, OTHER_SPLIT_K, tl.float32)
            send_row(z, mail, boxes, z_slot, z_count, columns, mask)
        y = sum_over_ranks(y_ptr, mail, boxes, row, rows, columns, mask, N, SPLIT_K, dtype)
        y = normed(y, inverse_rms_of(y, N, eps), weight, dtype, OFFSET)
        if z_ptr is not None:
            z = received_row(z, mail, boxes, z_slot, z_count, columns, mask)
        else:
            z = received_sum(mail, z_slot, 0, columns, mask, 1)
        z = z.to(dtype).to(tl.float32)
    z = normed(z, inverse_rms_of(z, N, eps), other, dtype, OFFSET)
    return (y + z).to(dtype).to(tl.float32)


@jit
def _add_norm_kernel(
    x_ptr,
    y_ptr,
    y_weight_ptr,
    z_ptr,
    z_weight_ptr,
    mail,
    post_ptr,
    weight_ptr,
    scale_ptr,
    factor_ptr,
    x_new_ptr,
    h_ptr,
    eps,
    rows,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OTHER_SPLIT_K: tl.constexpr,
    SENT: tl.constexpr,
    OTHER_SENT: tl.constexpr,
    AT_LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row); where products have sent SENT or OTHER_SENT sums of rows, there are as many that empty their boxes.

    AT_LAST the kernel before is waited for, which has sent the sums late: what it sends says by itself that it is there, and
    what kernels before it have written has been there since it let this one start.
    """
    launch_dependents(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    if SENT + OTHER_SENT > 0:
        emptied = row - rows
        if emptied >= 0:
            wait_for_previous(PDL)
            for part in tl.static_range(SENT):
                empty_row(mail, emptied + part * rows, columns, mask)
            if OTHER_SENT > 0:
                empty_row(mail, mail.SLOTS // 2 + emptied, columns, mask)
            return
    scale = load_scalar(scale_ptr)
    factor = load_scalar(factor_ptr)
    if z_weight_ptr is not None:
        y_weight = tl.load(y_weight_ptr + columns, mask=mask, other=0.0)
        z_weight = tl.load(z_weight_ptr + columns, mask=mask, other=0.0)
    if post_ptr is not None:
        post = tl.load(post_ptr + columns, mask=mask, other=0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    boxes, at = mailboxes(mail), (row, rows, columns, mask, N)
    wait_for_previous(PDL and not AT_LAST)
    x = tl.load(x_ptr + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    if x_new_ptr is not None:
        if z_weight_ptr is not None:
            y = _pair_sum(
                y_ptr,
                y_weight,
                z_ptr,
                z_weight,
                mail,
                boxes,
                *at,
                eps,
                OFFSET,
                SPLIT_K,
                OTHER_SPLIT_K,
                dtype,
            )
        elif mail is not None:
            y = sum_over_ranks(y_ptr, mail, boxes, *at, SPLIT_K, dtype)
        else:
            y = load_sum(y_ptr, *at, SPLIT_K, dtype)
        if post_ptr is not None:
            y = normed(y, inverse_rms_of(y, N, eps), post, dtype, OFFSET)
        x = (x + y).to(dtype).to(tl.float32)
        if factor is not None:
            x = (x * factor.to(tl.float32)).to(dtype).to(tl.float32)
        tl.store(x_new_ptr + row * N + columns, x.to(dtype), mask=mask)
    if weight_ptr is not None:
        h = normed(x, inverse_rms_of(x, N, eps), weight, dtype, OFFSET)
        store_rounded(h_ptr + row * N + columns, h, scale, mask, dtype)
    wait_for_previous(PDL and AT_LAST)


def sent_warps(n: int, late: bool) -> int:
    """Warps of a program that receives n numbers of each rank: what was fastest on an H200 of what one of several ranks
    takes (gemma-7b in FP8, one row of four: 0.89 ms a step, with 32 warps 0.90; 8 rows of two: 1.75, with 16 1.83)."""
    return 16 if late or n > 4096 else 32


def add_norm_triton(
    x: Tensor,
    y: Tensor | Parts | Pair | None,
    post_weight: Tensor | None,
    weight: Tensor | None,
    eps: float,
    input_scale: Tensor | None = None,
    offset: float = 1.0,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Does what `add_norm` does, with one kernel; of parts of sums over the ranks, too."""
    m, n = x.shape
    y, y_weight, z, z_weight = y if isinstance(y, Pair) else (y, None, None, None)
    parts = [each if isinstance(each, Parts) else Parts(each, None) for each in (y, z)]
    (y, mail, sent, late), (z, _, z_sent, z_late) = parts
    by_products = sent + z_sent > 0
    x_new = x if y is None and not sent else torch.empty_like(x)
    h = None if weight is None else torch.empty_like(x, dtype=x.dtype if input_scale is None else E4M3)
    all_pieces = pieces(mail, m)
    of = lambda each, piece: each if each is None or len(all_pieces) == 1 else each[..., piece, :]
    for piece in all_pieces:
        launch(
            _add_norm_kernel,
            ((piece.stop - piece.start) * (1 + by_products),),
            *(of(x, piece), of(y, piece), y_weight, of(z, piece), z_weight, mail, post_weight, weight),
            *(input_scale, factor, None if x_new is x else of(x_new, piece), of(h, piece), eps, m),
            N=n,
            OFFSET=offset,
            BLOCK=power_of_2(n),
            SPLIT_K=sent or split_k_of(y),
            OTHER_SPLIT_K=split_k_of(z),
            SENT=sent,
            OTHER_SENT=z_sent,
            AT_LAST=late if y_weight is None else z_late,
            num_warps=sent_warps(n, late or z_late) if by_products else row_warps(n),
        )
    return x_new, h


# ---------------------------------------------------------------------------------------------------------------------
# Inputs of each layer


def per_layer_inputs(
    tokens_part: Tensor, product: Tensor, weight: Tensor, factor: float, eps: float, offset: float = 1.0
) -> Tensor:
    """What each of L layers is given of the tokens, beside the residual stream: [M, L, P] (Gemma 3n and 4).

    tokens_part [M, L * P] are scaled rows of the embedding per layer, `product` [M, L * P] a product of the embedding
    of the model, which is multiplied by `factor` and normed with weight [P] in each layer's part. The sum of both is
    multiplied by 2**-0.5. Each step is rounded.
    """
    p = len(weight)
    normed = rms_norm((product * factor).unflatten(-1, (-1, p)), weight, eps, offset)
    return (normed + tokens_part.unflatten(-1, (-1, p))) * 2**-0.5


@jit
def _per_layer_inputs_kernel(
    tokens_ptr,
    product_ptr,
    weight_ptr,
    out_ptr,
    factor,
    eps,
    L: tl.constexpr,
    P: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, block of layers)."""
    launch_dependents(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    layer = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    mask = (layer < L) & (p < P)
    offsets = (tl.program_id(0).to(tl.int64) * L + layer) * P + p
    weight = tl.load(weight_ptr + p, mask=p < P, other=0.0)
    wait_for_previous(PDL)
    x = tl.load(product_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tokens = tl.load(tokens_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = (x * factor).to(dtype).to(tl.float32)
    x = normed(x, tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / P + eps), weight, dtype, OFFSET)
    x = (x + tokens).to(dtype).to(tl.float32)
    tl.store(out_ptr + offsets, (x * 0.7071067811865476).to(dtype), mask=mask)


def per_layer_inputs_triton(
    tokens_part: Tensor, product: Tensor, weight: Tensor, factor: float, eps: float, offset: float = 1.0
) -> Tensor:
    """Does what `per_layer_inputs` does, with one kernel."""
    (m, width), p = product.shape, len(weight)
    out = torch.empty(m, width // p, p, dtype=product.dtype, device=product.device)
    launch(
        _per_layer_inputs_kernel,
        (m, -(-width // (p * LAYERS_BLOCK))),
        *(tokens_part, product, weight, out, factor, eps),
        L=width // p,
        P=p,
        OFFSET=offset,
        BLOCK_L=LAYERS_BLOCK,
        BLOCK_P=power_of_2(p),
        num_warps=4,
    )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# GeGLU


def geglu(y: Tensor, dtype: torch.dtype, input_scale: Tensor | None = None) -> Tensor:
    """gelu(gate) * up [M, F] in `dtype` or, with input_scale, in E4M3 (arXiv:2002.05202, GELU approximated by tanh).

    y, gate and then up, is [M, 2 * F] in `dtype` or float32 partial sums [split_k, M, 2 * F].
    """
    gate, up = summed(y, dtype).chunk(2, dim=-1)
    h = gelu_product(gate, up)
    return h if input_scale is None else round_fp8(h, input_scale)


@jit
def _geglu_kernel(
    y_ptr,
    scale_ptr,
    h_ptr,
    rows,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    scale = load_scalar(scale_ptr)
    wait_for_previous(PDL)
    gate = load_sum(y_ptr, row, rows, columns, mask, 2 * F, SPLIT_K, dtype)
    up = load_sum(y_ptr, row, rows, columns + F, mask, 2 * F, SPLIT_K, dtype)
    store_rounded(h_ptr + row * F + columns, gelu_times(gate, up, dtype), scale, mask, dtype)


def geglu_triton(y: Tensor, dtype: torch.dtype, input_scale: Tensor | None = None) -> Tensor:
    """Does what `geglu` does, with one kernel."""
    m, f = y.shape[-2], y.shape[-1] // 2
    h = torch.empty(m, f, dtype=dtype if input_scale is None else E4M3, device=y.device)
    block = min(GEGLU_BLOCK, power_of_2(f))
    launch(
        _geglu_kernel,
        (m, -(-f // block)),
        *(y, input_scale, h, m),
        F=f,
        BLOCK=block,
        SPLIT_K=split_k_of(y),
        dtype=triton_dtype(dtype),
        num_warps=GEGLU_WARPS,
    )
    return h


def gelu_product(gate: Tensor, other: Tensor) -> Tensor:
    """gelu(gate) * other of gate [M, P] and other [M, P], whose rows may lie apart; GELU approximated by tanh."""
    return F.gelu(gate, approximate="tanh") * other


@jit
def _gelu_product_kernel(gate_ptr, other_ptr, out_ptr, stride, P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_dependents(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < P
    wait_for_previous(PDL)
    gate = tl.load(gate_ptr + row * P + columns, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(other_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * P + columns, gelu_times(gate, other, dtype).to(dtype), mask=mask)


def gelu_product_triton(gate: Tensor, other: Tensor) -> Tensor:
    """Does what `gelu_product` does, with one kernel."""
    (m, p), out = gate.shape, torch.empty_like(gate)
    options = dict(P=p, BLOCK=power_of_2(p), num_warps=row_warps(p))
    launch(_gelu_product_kernel, (m,), gate, other, out, other.stride(0), **options)
    return out


def rescale(x: Tensor, factor: float, input_scale: Tensor | None = None) -> Tensor:
    """x * factor in x's dtype or, with input_scale, in E4M3."""
    x = x if factor == 1 else x * factor
    return x if input_scale is None else round_fp8(x, input_scale)


@jit
def _rescale_kernel(x_ptr, scale_ptr, y_ptr, factor, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_dependents(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    scale = load_scalar(scale_ptr)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    store_rounded(y_ptr + offsets, (x * factor).to(dtype).to(tl.float32), scale, mask, dtype)


def rescale_triton(x: Tensor, factor: float, input_scale: Tensor | None = None) -> Tensor:
    """Does what `rescale` does, with one kernel."""
    if factor == 1 and input_scale is None:
        return x
    y = torch.empty_like(x, dtype=x.dtype if input_scale is None else E4M3)
    grid = (-(-x.numel() // GEGLU_BLOCK),)
    launch(_rescale_kernel, grid, x, input_scale, y, factor, x.numel(), BLOCK=GEGLU_BLOCK, num_warps=GEGLU_WARPS)
    return y
