"""The operations as training wants them: attention within documents, adapters, experts with gradients, the loss; their
definition in PyTorch, and TransformerEngine's modules in their place on a GPU.

A Block of model.py runs over either. With TransformerEngine the norm in front of a product is part of the product's
module: what `add_norm` then hands on as the normed stream is `Normed`, a promise of it.

| operation                       | PyTorch                              | TransformerEngine                          |
| ------------------------------- | ------------------------------------ | ------------------------------------------ |
| norm and product                | rms_norm, F.linear                   | LayerNormLinear                            |
| product                         | F.linear                             | Linear                                     |
| norm, GeGLU network             | rms_norm, F.linear, geglu            | LayerNormMLP, or with adapters the two     |
| attention, heads of at most 256 | scaled_dot_product_attention, a mask | DotProductAttention, thd, padding_causal * |
| attention with a softcap        | softmax_attention                    | FlexAttention (torch's), compiled          |
| attention, larger heads         | scaled_dot_product_attention, a mask | the same                                   |

* By cuDNN or flash-attn; where neither takes the shape it is torch's FlashAttention, which is also what PyTorch takes on a
GPU: TransformerEngine's own has all scores in memory.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import TORCH, Ops
from ops.attention import additive_mask, softmax_attention, split_heads
from ops.common import power_of_2
from ops.norm import add_norm, embed, geglu, rms_norm
from ops.rope import AttentionLayer, Positions
from ops.router import route
from ops.te import import_te

IGNORED = -100  # a target that doesn't count
LOGITS = 2**29  # of the loss that are in memory at once: 1 GiB in bfloat16
FUSED_HEAD = 256  # cuDNN's and FlexAttention's limit of head_dim on Hopper, with gradients
RECIPES = ("current", "delayed", "block")

# ---------------------------------------------------------------------------------------------------------------------
# Attention within documents


class Documents:
    """Which of M tokens belong together: documents one behind another, and who sees whom in them."""

    def __init__(self, ends: Tensor, index: Tensor, longest: int):
        """`ends` [documents + 1] in int32, the first 0; `index` [M] numbers each token's document; longest is at least
        the tokens of the longest document, known on the host."""
        self.ends, self.index, self.longest, self.made = ends, index, longest, {}

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Documents":
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        longest = power_of_2(max(lengths))  # few values: cuDNN plans for each
        return cls(ends.to(device, non_blocking=True), index.to(device, non_blocking=True), longest)

    def sees(self, window: int | None) -> Callable:
        """Whether query i sees key j: mask_mod(b, h, i, j) as FlexAttention calls it."""
        index = self.index

        def mask_mod(b, h, i, j):
            seen = (index[i] == index[j]) & (j <= i)
            return seen if window is None else seen & (i - j < window)

        return mask_mod

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[1, 1, M, M] in `dtype`: 0 where a query sees a key, else -inf."""
        if (key := ("mask", window, dtype)) not in self.made:
            at = torch.arange(len(self.index), device=self.index.device)
            self.made[key] = additive_mask(self.sees(window)(0, 0, at[:, None], at), dtype)[None, None]
        return self.made[key]

    def blocks(self, window: int | None):
        """The same as FlexAttention's BlockMask."""
        if (key := ("blocks", window)) not in self.made:
            from torch.nn.attention.flex_attention import create_block_mask

            m = len(self.index)
            self.made[key] = create_block_mask(self.sees(window), None, None, m, m, device=self.index.device)
        return self.made[key]


Core = Callable[[Tensor, Tensor, Tensor, AttentionLayer, Documents], Tensor]  # q, k, v [1, M, heads, D]: [1, M, H, D]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, documents: Documents) -> Tensor:
    """The definition: softmax attention with a mask of all M x M scores."""
    mask = documents.mask(layer.window, q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return softmax_attention(q, k, v, layer.scale, mask, softcap=layer.softcap).transpose(1, 2)


@cache
def _capped(softcap: float) -> Callable:
    return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)


@cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, documents: Documents) -> Tensor:
    """By torch's FlexAttention: blocks that no query sees are not computed. It takes softcaps."""
    y = _flex()(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=None if layer.softcap is None else _capped(layer.softcap),
        block_mask=documents.blocks(layer.window),
        scale=layer.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, documents: Documents) -> Tensor:
    """By torch's FlashAttention for documents one behind another, in half precision and without a softcap."""
    from torch.nn.attention import varlen

    group = layer.n_heads // layer.n_kv_heads  # torch 2.11 wants as many heads of each
    k, v = (x.repeat_interleave(group, 2) if group > 1 else x for x in (k, v))
    window = -1 if layer.window is None else layer.window - 1, 0  # to the left, inclusive
    ends, longest = documents.ends, documents.longest
    parts = (x[0].contiguous() for x in (q, k, v))
    return varlen.varlen_attn(*parts, ends, ends, longest, longest, scale=layer.scale, window_size=window)[None]


def gpu_attention(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, documents: Documents) -> Tensor:
    """By the fastest of PyTorch's that takes the layer."""
    by = flash_attention if layer.softcap is None and q.dtype != torch.float32 else flex_attention
    return (masked_attention if layer.head_dim > FUSED_HEAD else by)(q, k, v, layer, documents)


def attend_documents(
    core: Core,
    split: Callable,
    qkv: Tensor,
    layer: AttentionLayer,
    cache,
    positions: Positions,
    dtype,
    output_scale=None,
) -> Tensor:
    """`ops.attention.attend` without a cache, for one sequence of M tokens, whose Documents are `positions.mask`."""
    q, k, v = split(qkv[None], layer, positions.rope)
    if layer.kv_products == 0:
        k, v = positions.kept["kv"]
    elif positions.kept is not None:
        positions.kept["kv"] = k, v
    return core(q, k, v, layer, positions.mask).reshape(len(qkv), -1)


# ---------------------------------------------------------------------------------------------------------------------
# Products


class LoRA(nn.Module):
    """LoRA of a weight that joins several matrices: factors A [rank, K] and B [N, rank] of each, whose products
    B A x, times `scale`, are added to what the weight makes of x (https://arxiv.org/abs/2106.09685).

    The As are one parameter, so that they are one product. At first A is as in PEFT, uniform within 1 / sqrt(K), and B
    is 0.
    """

    def __init__(self, rows: list[int], columns: int, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        device, self.rank, self.scale = generator.device, rank, scale
        bound = columns**-0.5
        a = torch.empty(len(rows) * rank, columns, device=device)
        self.a = nn.Parameter(a.uniform_(-bound, bound, generator=generator))
        self.b = nn.ParameterList(torch.zeros(n, rank, device=device) for n in rows)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """What the weight makes of x [M, K], y [M, N], and what the factors add to it."""
        return _Adapted.apply(y, x, self.scale, self.a.to(x.dtype), *(b.to(x.dtype) for b in self.b))

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of each matrix."""
        return list(zip(self.a.detach().split(self.rank), (b.detach() for b in self.b)))


class _Adapted(torch.autograd.Function):
    """y + scale * (x A') B', with the products by B added to y where it lies: nobody else has a use for what a weight makes
    of x. So [M, N] is passed over once, where PyTorch's operations, one after another, would do so four times."""

    @staticmethod
    def forward(ctx, y, x, scale, a, *factors):
        ctx.scale, inner = scale, F.linear(x, a)
        ctx.save_for_backward(x, inner, a, *factors)
        for part, of_b, b in zip(_columns(y.detach(), factors), inner.chunk(len(factors), -1), factors):
            part.addmm_(of_b, b.T, alpha=scale)
        return y  # as a view of it, not as one that was written to: modules' outputs may not be

    @staticmethod
    def backward(ctx, gradient):
        x, inner, a, *factors = ctx.saved_tensors
        of_inner, of_factors = torch.empty_like(inner), []
        parts = _columns(gradient, factors), *(each.chunk(len(factors), -1) for each in (inner, of_inner))
        for part, of_b, out, b in zip(*parts, factors):
            out.copy_(part @ b)
            of_factors.append((part.T @ of_b).mul_(ctx.scale))
        of_inner.mul_(ctx.scale)
        of_x = of_inner @ a if ctx.needs_input_grad[1] else None
        return gradient, of_x, None, of_inner.T @ x, *of_factors


def _columns(y: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Those of y that each B [N, rank] makes."""
    return y.split([len(b) for b in factors], -1)


class _FrozenProduct(torch.autograd.Function):
    """x @ weight.T by a weight in a format of its own, which is made numbers anew for the gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return F.linear(x, weight.format.dequantize(weight, x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.format.dequantize(ctx.weight, gradient.dtype), None


def product(x: Tensor, weight, dtype: torch.dtype, partials: bool = False) -> Tensor:
    """`ops.matmul.matmul` with gradients, by weights of every format and with adapters."""
    y = F.linear(x, weight.weight) if weight.format.name == "bf16" else _FrozenProduct.apply(x, weight)
    return adapted(y, x, weight)


def has_adapter(weight) -> bool:
    """Whether an adapter is trained beside the weight, which is frozen then. That it wants a gradient doesn't tell: nothing
    does while a loss is only measured, or a block runs the first time of two."""
    return getattr(weight, "lora", None) is not None


def adapted(y: Tensor, x: Tensor, weight) -> Tensor:
    """The weight's product y of x, and what an adapter adds to it."""
    return weight.lora(y, x) if has_adapter(weight) else y


def experts(h: Tensor, w13, w2, chosen: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`ops.experts.experts` with gradients: each expert's rows side by side, one expert after another."""
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=w13.experts).tolist()  # a wait for the device
    token = order // chosen.shape[1]
    matrices = zip(*(weight.format.dequantize(weight, dtype).unbind() for weight in (w13, w2)))
    rows = [
        F.linear(geglu(F.linear(x, first), dtype), second)
        for x, (first, second) in zip(h[token].split(counts), matrices)
    ]
    y = torch.cat(rows).float() * weights.flatten()[order, None]
    return torch.zeros(h.shape, device=h.device).index_add(0, token, y).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def logit_gradients(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The sum of the targets' cross-entropies in nats, and its gradient in logits [M, V] before the softcap, rounded to
    their dtype at the end."""
    x, bend = logits.float(), None
    if softcap is not None:
        bend = torch.tanh(x / softcap)
        x = softcap * bend
    target = targets[:, None]
    counted = target != IGNORED
    total = x.logsumexp(-1, keepdim=True)
    loss = torch.where(counted, total - x.gather(-1, target.clamp(min=0)), 0).sum()
    hit = torch.arange(x.shape[1], device=x.device) == target
    gradient = torch.where(counted, (x - total).exp() - hit.float(), 0)
    if softcap is not None:
        gradient = gradient * (1 - bend.square())
    return loss, gradient.to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, softcap, with_gradients, of_logits):
        of_h, of_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        numbers = weight.to(h.dtype)
        grad_h = torch.empty_like(h) if of_h else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        loss, parts = torch.zeros((), device=h.device), -(-len(h) * len(weight) // LOGITS)
        rows = -(-len(h) // parts)
        for i in range(0, len(h), rows):
            part = slice(i, i + rows)
            one, gradient = of_logits(h[part] @ numbers.T, targets[part], softcap)
            loss += one
            if of_h:
                torch.mm(gradient, numbers, out=grad_h[part])
            if of_weight and h.dtype == torch.float32:
                grad_weight.addmm_(gradient.T, h[part])
            elif of_weight and h.is_cuda:
                torch.addmm(grad_weight, gradient.T, h[part], out_dtype=torch.float32, out=grad_weight)
            elif of_weight:
                grad_weight += gradient.T @ h[part]
            del gradient
        ctx.save_for_backward(grad_h, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        grads = (None if x is None else x.mul_(gradient) for x in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, of_logits: Callable = logit_gradients
) -> Tensor:
    """The sum of the cross-entropies, in nats, of targets [M] under logits h @ weight.T, h [M, N] and weight [V, N].

    IGNORED targets count nothing. Logits are made for some rows at a time, and their gradients with them, so that
    [M, V] is never in memory; that of the weight is summed up in float32. There is one backward for each forward.
    """
    return _CrossEntropy.apply(h, weight, targets, softcap, torch.is_grad_enabled(), of_logits)


# ---------------------------------------------------------------------------------------------------------------------
# Implementations


@dataclass(frozen=True)
class Training:
    """What runs a training forward: operations of the blocks, the loss's part, and, around all blocks and one of them,
    the context that says the products' precision and what recomputes its activations. `records` says whether a CUDA graph
    can hold it."""

    name: str
    ops: Ops
    of_logits: Callable
    precision: Callable[[], AbstractContextManager]
    checkpoint: Callable
    records: bool = False


def _embed(
    tokens: Tensor, weight: Tensor, factor: float, dtype: torch.dtype, scale: Tensor | None = None, *of_ranks
) -> Tensor:
    """`ops.norm.embed` of a weight that may be in float32, rounded to `dtype` as it is looked up."""
    return embed(tokens, weight, 1.0, dtype, scale).to(dtype) * factor


def by_torch(device: torch.device) -> Training:
    """The definition. On a GPU what lies between products is compiled, and attention FlexAttention's."""
    from torch.utils.checkpoint import checkpoint

    if on_gpu := device.type == "cuda":
        # One function serves layers of several kinds, with gradients and without
        torch._dynamo.config.recompile_limit = 64
    compiled = partial(torch.compile, dynamic=False) if on_gpu else lambda function: function
    gated, added = compiled(geglu), compiled(add_norm)

    def unrounded_add_norm(x, y, post_weight, weight, eps, input_scale=None, offset=1.0, factor=None):
        return added(x, y, post_weight, weight, eps, None, offset, factor)  # in front of a frozen FP8 weight, too

    def unrounded_route(x, scale, proj, expert_scale, top_k, eps, weight, input_scale=None, offset=1.0):
        return route(x, scale, proj, expert_scale, top_k, eps, weight, None, offset)

    operations = replace(
        TORCH,
        embed=_embed,
        add_norm=unrounded_add_norm,
        matmul=product,
        matmul_geglu=lambda x, weight, dtype, scale=None: gated(product(x, weight, dtype), dtype),
        route=unrounded_route,
        experts=experts,
        attend=partial(attend_documents, gpu_attention if on_gpu else masked_attention, compiled(split_heads)),
    )
    recomputed = partial(checkpoint, use_reentrant=False)
    return Training("torch", operations, compiled(logit_gradients), nullcontext, recomputed, on_gpu)


class Normed(NamedTuple):
    """The norm of the residual stream x [M, N] with `weight` [N], not made yet."""

    x: Tensor
    weight: Tensor


class Gated(NamedTuple):
    """GeGLU of the product by w13 of a `Normed`, not made yet."""

    normed: Normed
    w13: object


class TransformerEngine:
    """TransformerEngine's modules in place of products and attention, over the parameters of model.py's blocks.

    A module is built without memory of its own and given the block's parameters anew in each call: those are the
    gathered ones where parameters are sharded, and have the names of every other implementation's. What a module keeps
    from call to call is the state of its FP8 recipe and, of a frozen weight, its FP8 form.
    """

    def __init__(self, te, eps: float, norm_offset: float, fp8: str | None):
        self.te, self.modules, self.attentions, self.unfused, self.fp8 = te, {}, {}, set(), fp8
        os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")  # it is refused, and told, instead
        self.norms = dict(eps=eps, normalization="RMSNorm", zero_centered_gamma=norm_offset == 1.0)
        self.norm = partial(rms_norm, eps=eps, offset=norm_offset)
        self.plain, self.geglu = by_torch(torch.device("cuda")), torch.compile(geglu, dynamic=False)
        self.recipe = None if fp8 is None else _recipe(fp8)

    def training(self) -> Training:
        operations = replace(
            self.plain.ops,
            name="te",
            add_norm=self.add_norm,
            matmul=self.matmul,
            matmul_geglu=self.matmul_geglu,
            attend=partial(attend_documents, self.core, torch.compile(split_heads, dynamic=False)),
        )
        precision, checkpoint = nullcontext, partial(self.te.checkpoint, use_reentrant=False)
        if self.recipe is not None:
            precision = partial(self.te.autocast, enabled=True, recipe=self.recipe)
        # Scales of the last steps' largest values are the host's matter
        return Training("te", operations, self.plain.of_logits, precision, checkpoint, self.fp8 != "delayed")

    def add_norm(self, x, y, post_weight, weight, eps, input_scale=None, offset=1.0, factor=None):
        if y is not None:
            x, _ = self.plain.ops.add_norm(x, y, post_weight, None, eps, None, offset, factor)
        return x, None if weight is None else Normed(x, weight)

    def takes(self, weight) -> bool:
        return weight.format.name == "bf16" and all(n % 16 == 0 for n in weight.shape)

    def matmul(self, x, weight, dtype: torch.dtype, partials: bool = False) -> Tensor:
        if isinstance(x, Gated):
            (x, norm), w13 = x
            module = self.module("LayerNormMLP", weight, *weight.shape, activation="geglu", **self.norms)
            parameters = {"layer_norm_weight": norm, "fc1_weight": w13.weight, "fc2_weight": weight.weight}
            return self.run(module, x, parameters, weight)
        if not self.takes(weight):
            return product(self.norm(*x) if isinstance(x, Normed) else x, weight, dtype)
        if not isinstance(x, Normed):
            module = self.module("Linear", weight, *reversed(weight.shape))
            return adapted(self.run(module, x, {"weight": weight.weight}, weight), x, weight)
        with_lora = has_adapter(weight)
        options = self.norms | dict(return_layernorm_output=with_lora)
        module = self.module("LayerNormLinear", weight, *reversed(weight.shape), **options)
        parameters = {"layer_norm_weight": x.weight, "weight": weight.weight}
        y = self.run(module, x.x, parameters, weight)
        return adapted(*y, weight) if with_lora else y

    def matmul_geglu(self, x, weight, dtype: torch.dtype, next_scale=None) -> Tensor | Gated:
        whole = isinstance(x, Normed) and not has_adapter(weight)  # which would come between the two
        if whole and self.takes(weight) and weight.shape[0] % 32 == 0:
            return Gated(x, weight)
        return self.geglu(self.matmul(x, weight, dtype), dtype)

    def module(self, kind: str, weight, *sizes: int, **options):
        """The one of `weight`, which is asked for as it is now: the same in every call."""
        if weight not in self.modules:
            made = getattr(self.te, kind)(*sizes, bias=False, params_dtype=torch.bfloat16, device="meta", **options)
            self.modules[weight] = made
        return self.modules[weight]

    def run(self, module, x: Tensor, parameters: dict[str, Tensor], weight):
        """Runs a module with these parameters. Of a frozen weight the FP8 form is made once, and kept."""
        first = None
        if self.recipe is not None and has_adapter(weight):
            first = not getattr(module, "has_fp8_weight", False)
            module.has_fp8_weight = True
        module._parameters.update(parameters)
        y = module(x, is_first_microbatch=first)
        module._parameters.update(dict.fromkeys(parameters))  # rounded or gathered ones shall not stay in memory
        return y

    def core(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, documents: Documents) -> Tensor:
        key = layer.n_heads, layer.n_kv_heads, layer.head_dim, layer.window, layer.scale
        if layer.head_dim > FUSED_HEAD or layer.softcap is not None or key in self.unfused:
            return gpu_attention(q, k, v, layer, documents)
        if key not in self.attentions:
            self.attentions[key] = self.te.DotProductAttention(
                layer.n_heads,
                layer.head_dim,
                num_gqa_groups=layer.n_kv_heads,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                window_size=(-1, 0) if layer.window is None else (layer.window - 1, 0),  # to the left, inclusive
                softmax_scale=layer.scale,
            )
        lengths = {"cu_seqlens_q": documents.ends, "cu_seqlens_kv": documents.ends}
        lengths |= {"max_seqlen_q": documents.longest, "max_seqlen_kv": documents.longest}
        try:
            y = self.attentions[key](*(x[0].contiguous() for x in (q, k, v)), **lengths)
        except ValueError as error:
            if "backend" not in str(error):
                raise
            self.unfused.add(key)
            return gpu_attention(q, k, v, layer, documents)
        return y.view(1, len(y), layer.n_heads, layer.head_dim)


def _recipe(name: str):
    """TransformerEngine's FP8 recipe of that name in RECIPES. Scales are those of the tensors at hand ("current"), of
    the largest values of the last 1,024 steps ("delayed"), or of blocks of 128 numbers ("block"). What "delayed" has
    seen is in no checkpoint: a run that is resumed begins its history anew, and is not quite the straight one."""
    from transformer_engine.common import recipe

    if name == "delayed":
        return recipe.DelayedScaling(amax_history_len=1024, amax_compute_algo="max")
    return recipe.Float8CurrentScaling() if name == "current" else recipe.Float8BlockScaling()


def choose(device: torch.device, dtype: torch.dtype, eps: float, norm_offset: float, fp8: str | None) -> Training:
    """For activations in `dtype`: TransformerEngine on a GPU that has it, else PyTorch, with a note; products in FP8 by
    a recipe of RECIPES.

    `eps` and `norm_offset` are the model's. Raises ValueError for FP8 where it can't run.
    """
    if fp8 is not None and (device.type != "cuda" or dtype != torch.bfloat16):
        raise ValueError("--fp8 needs a CUDA GPU, and --precision bf16")
    least = (9, 0) if fp8 == "block" else (8, 9)
    if fp8 is not None and torch.cuda.get_device_capability(device) < least:
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no hardware for {fp8} FP8: leave out --fp8")
    if device.type != "cuda" or dtype != torch.bfloat16:
        return by_torch(device)
    try:
        te = import_te()
    except ValueError as error:
        if fp8 is not None:
            raise ValueError(f"--fp8 needs TransformerEngine: {error}") from None
        warnings.warn(f"training by PyTorch's operations, without TransformerEngine: {error}", stacklevel=2)
        return by_torch(device)
    return TransformerEngine(te, eps, norm_offset, fp8).training()
