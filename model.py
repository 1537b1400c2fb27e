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
from ops.norm import Pair
from ops.peers import Parts
from ops.rope import AttentionLayer, Positions, Shared, rope_frequency
from parallel import Sums

# ---------------------------------------------------------------------------------------------------------------------
# What ranks share


def shared_product(ops: Ops, x: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """x @ weight.T for the next norm to add up: [M, N] in `dtype`, or float32 partial sums. Where ranks have some of the
    columns each, these are the parts of all of them."""
    if ops.sums is None:
        return ops.matmul(x, weight, dtype, partials=True)
    mail = ops.mail(len(x), weight.shape[0])
    return ops.parts(ops.matmul(x, weight, torch.float32, partials=True, mail=mail))


# ---------------------------------------------------------------------------------------------------------------------
# Layers, in the order in which data meets them


class Residual(NamedTuple):
    """The residual stream x [M, N], and the newest layer's output y, which the next norm adds to it.

    y is [M, N] or float32 partial sums of it, of this rank or of all, or a pair of such; None before the first layer.
    post_weight [N] belongs to the norm that y gets before that, if there is one; factor [1] multiplies the sum, if there
    is one.
    """

    x: Tensor
    y: Tensor | Parts | Pair | None = None
    post_weight: Tensor | None = None
    factor: Tensor | None = None

    def at(self, index: Tensor, ops: Ops, config: ModelConfig) -> "Residual":
        """That of the tokens at `index`."""
        if isinstance(self.y, Parts | Pair):  # of all tokens, which may be sent already
            return Residual(self.added(ops, config, None)[0][index])
        return self._replace(x=self.x[index], y=None if self.y is None else self.y[..., index, :])

    def added(self, ops: Ops, config: ModelConfig, norm: "RMSNorm | None", input_scale: Tensor | None = None):
        """The sum x + y, and the norm of it, in E4M3 if input_scale is given."""
        weight = None if norm is None else norm.weight
        x, y, post_weight, factor = self
        return ops.add_norm(x, y, post_weight, weight, config.norm_eps, input_scale, config.norm_offset, factor)


class RMSNorm(nn.Module):
    """The weight of a norm, which `add_norm` and `attend` apply: x / rms(x) * (norm_offset + weight)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class Attention(nn.Module):
    """Attention of one layer: queries, keys and values of the normed stream, and the product by `wo` of what they
    make."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.index = config, layer
        size, products = config.head_dim_of(layer), config.kv_products_of(layer)
        heads = config.n_heads + products * config.kv_heads_of(layer)
        self.wqkv = Weight(heads * size, config.hidden_size)  # queries, then keys, then values
        self.wo = Weight(config.hidden_size, config.n_heads * size)
        self.q_norm = RMSNorm(size) if config.qk_norm else None
        self.k_norm = RMSNorm(size) if config.qk_norm and products else None

    @property
    def layer(self) -> AttentionLayer:
        config, layer = self.config, self.index
        return AttentionLayer(
            config.n_heads,
            config.kv_heads_of(layer),
            config.head_dim_of(layer),
            config.query_pre_attn_scalar**-0.5,
            config.attn_softcap,
            config.window if config.is_local(layer) else None,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            config.norm_eps,
            config.v_norm,
            config.kv_products_of(layer),
            config.norm_offset,
        )

    def forward(self, ops: Ops, h: Tensor, positions: Positions, cache, dtype: torch.dtype) -> Tensor:
        qkv = ops.matmul(h, self.wqkv, dtype, partials=True)
        y = ops.attend(qkv, self.layer, cache, positions, dtype, self.wo.input_scale)
        return shared_product(ops, y, self.wo, dtype)


class FeedForward(nn.Module):
    """GeGLU between two products."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.w13 = Weight(2 * intermediate_size, hidden_size)  # gate, then up
        self.w2 = Weight(hidden_size, intermediate_size)

    def forward(self, ops: Ops, h: Tensor, dtype: torch.dtype) -> Tensor:
        h = ops.matmul_geglu(h, self.w13, dtype, self.w2.input_scale)
        return shared_product(ops, h, self.w2, dtype)


class Experts(nn.Module):
    """A mixture of experts: each token's feed-forward is a weighted sum of a few of many, which a router picks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, count = config, config.n_experts
        self.router = Router(config)
        self.norm = RMSNorm(config.hidden_size)
        self.w13 = Weight(2 * config.expert_size, config.hidden_size, experts=count)
        self.w2 = Weight(config.hidden_size, config.expert_size, experts=count, own_inputs=True)

    def route(self, ops: Ops, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which experts tokens go to, their weights, and the rows that experts are given, of the residual stream x [M, N]."""
        config, router = self.config, self.router
        factors = router.input_factor, router.proj, router.expert_factor
        norm = self.norm.weight, self.w13.input_scale, config.norm_offset
        return ops.route(x, *factors, config.n_active_experts, config.norm_eps, *norm)

    def forward(self, ops: Ops, chosen: Tensor, weights: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
        if ops.sums is None:
            return ops.experts(h, self.w13, self.w2, chosen, weights, dtype)
        mail = ops.mail(*h.shape)
        return ops.parts(ops.experts(h, self.w13, self.w2, chosen, weights, dtype, partials=True, mail=mail))


class Router(nn.Module):
    """What picks the experts of a token: a product of its normed residual stream, each input and result of which has a
    factor of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_factor = nn.Parameter(torch.empty(config.hidden_size))
        self.proj = Weight(config.n_experts, config.hidden_size)
        self.expert_factor = nn.Parameter(torch.empty(config.n_experts))


class PerLayer(nn.Module):
    """What a layer makes of the embeddings of its own that tokens have for it (PLE): a gate of the residual stream times
    them, and a product of that."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Weight(config.per_layer_size, config.hidden_size)
        self.proj = Weight(config.hidden_size, config.per_layer_size)

    def forward(self, ops: Ops, x: Tensor, inputs: Tensor) -> Tensor:
        return ops.matmul(ops.gelu_gate(x, self.gate, inputs, x.dtype), self.proj, x.dtype, partials=True)


class PerLayerInputs(nn.Module):
    """The embeddings that tokens have for each layer, and a product of their common one that is added to them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, width = config, config.n_layers * config.per_layer_size
        self.vocabulary = first, end = config.vocabulary(config.per_layer_vocab_size)
        self.embedding = Weight(end - first, width)
        self.proj = Weight(width, config.hidden_size)
        self.norm, self.normalizers = RMSNorm(config.per_layer_size), rounded_roots(config.per_layer_size)

    def forward(self, ops: Ops, tokens: Tensor, x: Tensor) -> Tensor:
        """[M, L, P] for tokens [M] of embedding x [M, N]."""
        config = self.config
        factor, first = self.normalizers[x.dtype], self.vocabulary[0]
        own = ops.embed(tokens, self.embedding.data, factor, x.dtype, None, first, ops.sums)
        product = ops.matmul(x, self.proj, x.dtype)
        factor = config.hidden_size**-0.5
        return ops.per_layer_inputs(own, product, self.norm.weight, factor, config.norm_eps, config.norm_offset)


class Block(nn.Module):
    """One layer: norm, attention, norm, feed-forward, each output with a norm of its own if the model has them.

    Beside the feed-forward there may be experts, and behind both what the layer makes of its own embeddings."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, size = config, config.hidden_size

        def norm(exists: bool = True) -> RMSNorm | None:
            return RMSNorm(size) if exists else None

        self.attention_norm = norm()
        self.attention = Attention(config, layer)
        self.post_attention_norm = norm(config.post_norms)
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(size, config.intermediate_size_of(layer))
        self.experts = Experts(config) if config.n_experts else None
        self.post_dense_norm, self.post_experts_norm = norm(config.n_experts > 0), norm(config.n_experts > 0)
        self.post_feed_forward_norm = norm(config.post_norms)
        self.per_layer = PerLayer(config) if config.per_layer_size else None
        self.post_per_layer_norm = norm(config.per_layer_size > 0)
        self.scalar = nn.Parameter(torch.empty(1)) if config.layer_scalar else None

    def forward(
        self, ops: Ops, residual: Residual, positions: Positions, cache, inputs: Tensor | None = None
    ) -> Residual:
        """`inputs` [M, P] are the tokens' embeddings of this layer, where layers have some."""
        config, dtype, attention, feed_forward = self.config, residual.x.dtype, self.attention, self.feed_forward
        x, h = residual.added(ops, config, self.attention_norm, attention.wqkv.input_scale)
        y = attention(ops, h, positions, cache, dtype)
        residual = Residual(x, y, self.post_attention_norm and self.post_attention_norm.weight)
        x, h = residual.added(ops, config, self.feed_forward_norm, feed_forward.w13.input_scale)
        if self.experts is None:
            y = feed_forward(ops, h, dtype)
        else:
            routed = self.experts.route(ops, x)  # whose last kernel has one program: w13 loads weights meanwhile
            dense, sparse = self.post_dense_norm.weight, self.post_experts_norm.weight
            y = Pair(feed_forward(ops, h, dtype), dense, self.experts(ops, *routed, dtype), sparse)
        post = self.post_feed_forward_norm and self.post_feed_forward_norm.weight
        if self.per_layer is not None:
            x, _ = Residual(x, y, post).added(ops, config, None)
            y, post = self.per_layer(ops, x, inputs), self.post_per_layer_norm.weight
        return Residual(x, y, post, self.scalar)


def rounded_roots(size: int) -> dict[torch.dtype, float]:
    """The root of a size, by which embeddings are multiplied, as the reference rounds it to the weights' dtype:
    sqrt(3072) is 55.5 in bfloat16."""
    dtypes = torch.bfloat16, torch.float32
    return {dtype: torch.tensor(size**0.5, dtype=dtype, device="cpu").item() for dtype in dtypes}


class Transformer(nn.Module):
    """A Gemma text model. Build it on the meta device and load with assign=True, or use `random`.

    `ops` says what runs it (ops/__init__.py), `kv_scales` what an FP8 cache is scaled by, `adapter` what is merged into
    its weights, in words; nothing else is kept from one call to the next.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.ops, self.kv_scales, self.adapter = config, ops.TORCH, KVScales(), None
        self.vocabulary = first, end = config.vocabulary(config.vocab_size)
        self.embedding = Weight(end - first, config.hidden_size)  # the output head, too
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm, self.normalizers = RMSNorm(config.hidden_size), rounded_roots(config.hidden_size)
        self.per_layer_inputs = PerLayerInputs(config) if config.per_layer_size else None
        kinds = {config.is_local(layer): config.head_dim_of(layer) for layer in range(config.n_layers)}
        frequency = rope_frequency(
            kinds.get(False, config.head_dim), config.rope_theta, config.rope_scale, config.rotated_share
        )
        frequency_local = rope_frequency(config.head_dim, config.rope_theta_local, config.rope_scale_local)
        self.register_buffer("rope_frequency", frequency, persistent=False)
        self.register_buffer("rope_frequency_local", frequency_local, persistent=False)
        # Explicitly on the CPU, so that building the model on the meta device leaves it real.
        here = [token - first for token in config.suppressed_ids if first <= token < end]
        suppressed = torch.tensor(here, dtype=torch.long, device="cpu")
        self.register_buffer("suppressed", suppressed, persistent=False)

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
        """A model with weights drawn on `device` from N(0, 0.02²), norms and other factors 1: for measuring and testing.

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
                    weights[name].fill_(1 - config.norm_offset if isinstance(module, RMSNorm) else 1)
        return model.load(weights, device, ops.choose("auto", torch.device(device)))

    def load(self, weights: dict[str, Tensor], device, ops: Ops) -> "Transformer":
        """Takes `weights` as they are and where they are, for generating on `device` by `ops`. Returns itself."""
        self.load_state_dict(weights, assign=True)
        self.ops = ops
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.to(device))
        return self.requires_grad_(False).eval()

    def store(self, format: str, group: int = 0, head: bool = False):
        """Makes the weights of layers, and with `head` the embedding, empty ones in `format`; on the meta device."""
        for layer in self.layers:
            for name, module in layer.named_modules():
                if name.endswith(LINEAR):
                    module.store(FORMATS[format], group)
        if head:
            self.embedding.store(FORMATS[format].of_embedding)

    @property
    def sums(self) -> Sums | None:
        """What joins the ranks that share the model; None where there is one."""
        return self.ops.sums

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

    def step_bytes(self, rows: float) -> float:
        """Bytes of the weights that a step of so many rows reads: all, but of experts those that are met, as if each
        were as probable as any other, and of the layers' own embeddings a row a token."""
        config, total = self.config, self.weight_bytes
        for layer in self.layers if config.n_experts else ():
            weights = (layer.experts.w13, layer.experts.w2)
            missed = (1 - config.n_active_experts / config.n_experts) ** rows
            total -= missed * sum(parameter.nbytes for weight in weights for parameter in weight.parameters())
        if config.per_layer_size:
            table = self.per_layer_inputs.embedding.data
            total -= table.nbytes * (1 - rows / len(table))
        return total

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
        decoding: bool = False,
        states: Tensor | None = None,
        own_logits: bool = False,
    ) -> Tensor:
        """`forward`, in the dtype that the head's product has: that of activations, or float32 with a softcap.

        Where `ops.packs`, tokens may also be [M], those of B rows one after another, lengths [B] of each and at most
        `longest`; what is behind them is padding. `shared` says which rows of a decode step share a prefix.

        One token a row behind cached ones is a decode step; with `decoding` T of them are, too, without lengths. They
        attend through the cache, where the next step may overwrite the last ones of them. `states` [rows of logits, N]
        is given what the last norm makes, in the dtype of activations. With `own_logits` they are those of this rank's
        part of the vocabulary, where ranks have one each.
        """
        dtype, ops, config = self.dtype, self.ops, self.config
        kinds = self.positions(tokens, cache, position, lengths, longest, shared, decoding)
        flat, embedding, inputs = tokens.flatten().contiguous(), self.embedding, None
        factor, first = self.normalizers[dtype], self.vocabulary[0]
        x = ops.embed(flat, embedding.data, factor, dtype, embedding.scale, first, ops.sums)
        if self.per_layer_inputs is not None:
            inputs = self.per_layer_inputs(ops, flat, x)
        residual, last = Residual(x), None
        if not all_logits and tokens.shape != (len(tokens), 1):
            count = tokens.shape[-1] if lengths is None else lengths
            if tokens.dim() == 1:
                last = count.cumsum(0) - 1
            else:
                last = torch.arange(0, tokens.numel(), tokens.shape[1], device=tokens.device) - 1 + count
        for index, layer in enumerate(self.layers):
            if last is not None and cache is not None and config.is_shared(index):
                # From here on nothing is written to the cache: only the tokens that logits are wanted of go on
                residual, inputs = residual.at(last, ops, config), None if inputs is None else inputs[last]
                newest = torch.zeros_like(last) + count - 1 + (0 if position is None else position)
                kinds, last = self.positions(newest[:, None], cache, newest), None
            layer_cache = None if cache is None else cache.layers[index]
            own = None if inputs is None else inputs[:, index]
            residual = layer(ops, residual, kinds[config.is_local(index)], layer_cache, own)
        if last is not None:
            residual = residual.at(last, ops, config)
        x, h = residual.added(ops, config, self.norm, embedding.input_scale)
        if states is not None:
            states.copy_(h if h.dtype == dtype else Residual(x).added(ops, config, self.norm)[1])
        logits = ops.matmul(h, embedding, dtype)
        if (softcap := config.logit_softcap) is not None:
            logits = softcap * torch.tanh(logits.float() / softcap)
        if config.suppressed_ids and (decoding or not all_logits):
            logits = logits.index_fill(-1, self.suppressed, torch.finfo(logits.dtype).min / 2)
        if ops.sums is not None and not own_logits:
            logits = ops.sums.joined(logits, config.vocab_size)
        return logits.view(*tokens.shape, -1) if all_logits else logits

    def positions(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        longest: int | None = None,
        shared: Shared | None = None,
        decoding: bool = False,
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
        decoding |= position is not None and tokens.shape == (batch, 1)
        if decoding:
            query = position if count == 1 else (position[:, None] + torch.arange(count, device=device)).flatten()
        elif first is None:
            query = torch.arange(count, device=device).repeat(batch)
        if cache is not None and not decoding:
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
                    mask = self.ops.mask(layer, window, query.view(batch, -1), position, self.dtype, decoding)
                if decoding and mask is not None:
                    row = torch.arange(batch, device=device).repeat_interleave(count)
                    slot = layer.slots_for(row, query, position[row] + count)
                elif not decoding:
                    slot = layer.slots_for(row, query, end)
            kept = {} if config.n_shared_layers and not decoding else None
            parts = batch, count, position, lengths, ropes[int(kind)], mask, slot, first, shared, kept, decoding
            kinds[kind] = Positions(*parts)
        return kinds
