"""Gemma's layers, once, over the operations of ops/: what a prompt, a decode step and training have in common.

Shapes are named by letters: B rows of the batch, T tokens a row in this forward, M = B * T, H query heads, K key/value
heads, D head_dim, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import ops
from cache import KVCache, KVScales
from config import ModelConfig
from formats import FORMATS, LINEAR, Weight
from ops import Ops
from ops.rope import AttentionLayer, Positions, Shared

# ---------------------------------------------------------------------------------------------------------------------
# Layers, in the order in which data meets them


class Residual(NamedTuple):
    """The residual stream x [M, N], and the newest layer's output y, which the next norm adds to it.

    y is [M, N] or float32 partial sums of it, None before the first layer; post_weight [N] belongs to the norm that y
    gets before that, if there is one.
    """

    x: Tensor
    y: Tensor | None = None
    post_weight: Tensor | None = None


class RMSNorm(nn.Module):
    """The weight of a norm, which `add_norm` and `attend` apply: x / rms(x) * (1 + weight)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class Attention(nn.Module):
    """Attention of one layer: queries, keys and values of the normed stream, and the product by `wo` of what they
    make."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.window = config, config.window if config.is_local(layer) else None
        heads = config.n_heads + 2 * config.n_kv_heads
        self.wqkv = Weight(heads * config.head_dim, config.hidden_size)  # queries, then keys, then values
        self.wo = Weight(config.hidden_size, config.n_heads * config.head_dim)
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else None

    @property
    def layer(self) -> AttentionLayer:
        config = self.config
        return AttentionLayer(
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.query_pre_attn_scalar**-0.5,
            config.attn_softcap,
            self.window,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            config.norm_eps,
        )

    def forward(self, ops: Ops, h: Tensor, positions: Positions, cache, dtype: torch.dtype) -> Tensor:
        qkv = ops.matmul(h, self.wqkv, dtype, partials=True)
        y = ops.attend(qkv, self.layer, cache, positions, dtype, self.wo.input_scale)
        return ops.matmul(y, self.wo, dtype, partials=True)


class FeedForward(nn.Module):
    """GeGLU between two products."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w13 = Weight(2 * config.intermediate_size, config.hidden_size)  # gate, then up
        self.w2 = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, ops: Ops, h: Tensor, dtype: torch.dtype) -> Tensor:
        h = ops.matmul_geglu(h, self.w13, dtype, self.w2.input_scale)
        return ops.matmul(h, self.w2, dtype, partials=True)


class Block(nn.Module):
    """One layer: norm, attention, norm, feed-forward, each output with a norm of its own if the model has them."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.eps = config.norm_eps
        self.attention_norm = RMSNorm(config.hidden_size)
        self.attention = Attention(config, layer)
        self.post_attention_norm = RMSNorm(config.hidden_size) if config.post_norms else None
        self.feed_forward_norm = RMSNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.post_feed_forward_norm = RMSNorm(config.hidden_size) if config.post_norms else None

    def forward(self, ops: Ops, residual: Residual, positions: Positions, cache) -> Residual:
        dtype, attention, feed_forward = residual.x.dtype, self.attention, self.feed_forward
        x, h = ops.add_norm(*residual, self.attention_norm.weight, self.eps, attention.wqkv.input_scale)
        y = attention(ops, h, positions, cache, dtype)
        post = self.post_attention_norm and self.post_attention_norm.weight
        x, h = ops.add_norm(x, y, post, self.feed_forward_norm.weight, self.eps, feed_forward.w13.input_scale)
        y = feed_forward(ops, h, dtype)
        return Residual(x, y, self.post_feed_forward_norm and self.post_feed_forward_norm.weight)


class Transformer(nn.Module):
    """A Gemma text model. Build it on the meta device and load with assign=True, or use `random`.

    `ops` says what runs it (ops/__init__.py), `kv_scales` what an FP8 cache is scaled by; nothing else is kept from one
    call to the next.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.ops, self.kv_scales = config, ops.TORCH, KVScales()
        self.embedding = Weight(config.vocab_size, config.hidden_size)  # the output head, too
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size)
        # The reference rounds this factor to the weights' dtype: sqrt(3072) is 55.5 in bfloat16.
        self.normalizers = {
            dtype: torch.tensor(config.hidden_size**0.5, dtype=dtype, device="cpu").item()
            for dtype in (torch.bfloat16, torch.float32)
        }
        # Explicitly on the CPU, so that building the model on the meta device leaves them real.
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        frequency = 1.0 / (config.rope_theta**exponent) / config.rope_scale  # [D / 2], radians a token
        frequency_local = 1.0 / (config.rope_theta_local**exponent) / config.rope_scale_local
        # [D], the first half negative: their sines then carry the sign that `rotate` wants, and cosines don't mind.
        self.register_buffer("rope_frequency", torch.cat((-frequency, frequency)), persistent=False)
        self.register_buffer("rope_frequency_local", torch.cat((-frequency_local, frequency_local)), persistent=False)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        device="cpu",
        dtype=torch.bfloat16,
        seed: int = 0,
        format: str = "bf16",
        group: int = 32,
        head: bool = False,
    ) -> "Transformer":
        """A model with weights drawn on `device` from N(0, 0.02²), norms zero: for measuring and testing.

        Layers, and with `head` the embedding, have their weights in `format`. In FP8, inputs are scaled for values up
        to 20; integers are evenly distributed codes of the same deviation.
        """
        with torch.device("meta"):
            model = cls(config)
            model.store(format, group, head)
        generator = torch.Generator(device).manual_seed(seed)
        weights = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                weights[name] = torch.empty_like(
                    parameter, device=device, dtype=dtype if parameter.requires_grad else parameter.dtype
                )
                if isinstance(module, Weight):
                    module.format.random(name.removeprefix(f"{path}."), weights[name], generator)
                else:
                    weights[name].zero_()
        return model.load(weights, device, ops.choose("auto", torch.device(device)))

    def load(self, weights: dict[str, Tensor], device, ops: Ops) -> "Transformer":
        """Takes `weights` as they are, for generating on `device` by `ops`. Returns itself."""
        self.load_state_dict(weights, assign=True)
        self.ops = ops
        return self.to(device).requires_grad_(False).eval()

    def store(self, format: str, group: int = 0, head: bool = False):
        """Makes the weights of layers, and with `head` the embedding, empty ones in `format`; on the meta device."""
        for layer in self.layers:
            for name, module in layer.named_modules():
                if name.endswith(LINEAR):
                    module.store(FORMATS[format], group)
        if head:
            self.embedding.store(FORMATS[format].of_embedding)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, norms, plain weights, and the KV cache by default."""
        return self.norm.weight.dtype

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    def pack(self):
        """Prepares eager runs on a CPU, where oneDNN has bfloat16; does nothing elsewhere, nor for weights that are
        packed already. Takes the weights' bytes once more; a mapped file's own pages can then leave memory."""
        if self.device.type != "cpu" or self.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
            return
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            for module in self.modules():
                if isinstance(module, Weight):
                    module.pack()

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Logits in float32 for tokens [B, T]: [B, V] for each row's last token, or [B, T, V] with all_logits.

        With a cache of B rows, keys and values go there. position [B] is the number of tokens that each row has in it
        already; None says that it has none. lengths [B] is the number of valid tokens a row, the rest being padding on
        the right; None means T everywhere. Row and cache limits are the caller's to keep.
        """
        return self.logits(tokens, cache, position, lengths, all_logits).float()

    def logits(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        all_logits: bool = False,
        longest: int | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """`forward`, in the dtype that the head's product has: that of activations, or float32 with a softcap.

        Where `ops.packs`, tokens may also be [M], those of B rows one after another, lengths [B] of each and at most
        `longest`; what is behind them is padding. `shared` says which rows of a decode step share a prefix.
        """
        dtype, ops = self.dtype, self.ops
        kinds = self.positions(tokens, cache, position, lengths, longest, shared)
        x = ops.embed(
            tokens.flatten().contiguous(), self.embedding.data, self.normalizers[dtype], dtype, self.embedding.scale
        )
        residual = Residual(x)
        for index, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            residual = layer(ops, residual, kinds[self.config.is_local(index)], layer_cache)
        if not all_logits and tokens.shape != (len(tokens), 1):
            count = tokens.shape[-1] if lengths is None else lengths
            if tokens.dim() == 1:
                last = count.cumsum(0) - 1
            else:
                last = torch.arange(0, tokens.numel(), tokens.shape[1], device=tokens.device) - 1 + count
            residual = residual._replace(x=residual.x[last], y=residual.y[..., last, :])
        _, h = ops.add_norm(*residual, self.norm.weight, self.config.norm_eps, self.embedding.input_scale)
        logits = ops.matmul(h, self.embedding, dtype)
        if (softcap := self.config.logit_softcap) is not None:
            logits = softcap * torch.tanh(logits.float() / softcap)
        return logits.view(*tokens.shape, -1) if all_logits else logits

    def positions(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        longest: int | None = None,
        shared: Shared | None = None,
    ) -> dict[bool, Positions]:
        """What all global (False) and all local (True) layers share in a forward."""
        config, device, first, row = self.config, tokens.device, None, None
        position, lengths = (x if x is None else x.contiguous() for x in (position, lengths))
        if tokens.dim() == 1:
            batch, count = len(lengths), longest
            ends = lengths.cumsum(0)
            first, index = ends - lengths, torch.arange(len(tokens), device=device)
            row = torch.searchsorted(ends, index, right=True).clamp(max=batch - 1)
            query = index - first[row]
        else:
            batch, count = tokens.shape
            query = torch.arange(count, device=device).repeat(batch)
        decoding = position is not None and tokens.shape == (batch, 1)
        if decoding:
            query = position
        elif cache is not None:
            row = torch.arange(batch, device=device).repeat_interleave(count) if row is None else row
            end = count if lengths is None else lengths[row]
            if position is not None:
                query, end = query + position[row], end + position[row]
        local = any(map(config.is_local, range(config.n_layers)))
        ropes = self.ops.rope(query, self.rope_frequency, *[self.rope_frequency_local] * local)
        kinds = {}
        for index in range(config.n_layers):
            kind = config.is_local(index)
            if kind in kinds:
                continue
            mask = slot = None
            if cache is not None:
                layer = cache.layers[index]
                if position is not None and first is None:
                    window = config.window if kind else None
                    mask = self.ops.mask(layer, window, query.view(batch, -1), position, self.dtype)
                if decoding and mask is not None:
                    slot = layer.slots_for(torch.arange(batch, device=device), position, position + 1)
                elif not decoding:
                    slot = layer.slots_for(row, query, end)
            kinds[kind] = Positions(batch, count, position, lengths, ropes[int(kind)], mask, slot, first, shared)
        return kinds
