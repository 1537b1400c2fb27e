"""Gemma 4's drafters (`-assistant`): a few narrow layers that guess a model's next tokens, which the model then verifies.

A drafter has no keys and values: its layers attend to those that the model has in its cache, the local ones to what the
model's last local layer with keys of its own wrote, the global ones likewise. What it is given of the newest token is
the model's embedding of that, and the model's state, after its final norm, of the token before. Shapes are named by
letters: B rows of the batch, N the model's hidden size, V vocabulary.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KVCache
from checkpoint import load_weights, open_checkpoint
from config import ASSISTANTS, ModelConfig
from files import read_json
from formats import Weight
from model import Block, Residual, RMSNorm, Transformer
from ops import Ops
from ops.rope import Positions

# Added to the newest token's position, this is where queries are rotated to, and where the local window counts from. The
# newest token has no key yet, and which of the two training used is unknown: transformers and llama.cpp have 0, vLLM -1.
QUERY_OFFSET = 0

# hidden size, feed-forward, query heads, whether tokens are in groups, of which only a few are looked at
SIZES = {
    "gemma-4-E2B": (256, 2048, 4, True),
    "gemma-4-E4B": (256, 2048, 4, True),
    "gemma-4-12B": (1024, 8192, 16, False),
    "gemma-4-26B-A4B": (1024, 8192, 16, False),
    "gemma-4-31B": (1024, 8192, 32, False),
}


class Assistant(nn.Module):
    """A drafter of `config` for `target`. Build it on the meta device and `load` it, or use `random`. Raises ValueError
    if it is of another model."""

    def __init__(self, config: ModelConfig, target: ModelConfig):
        super().__init__()
        check_fit(config, target)
        self.config, hidden, backbone = config, config.hidden_size, config.backbone_size
        self.donors = {local: donor(target, local) for local in set(map(config.is_local, range(config.n_layers)))}
        # A local layer's newest key is that of the position before the newest token's
        self.window = None if config.window is None else config.window - 1 - QUERY_OFFSET
        layers = replace(config, window=self.window)
        self.pre_projection = Weight(hidden, 2 * backbone)  # embedding, then state
        self.layers = nn.ModuleList(Block(layers, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(hidden)
        self.embedding = Weight(config.vocab_size, hidden)  # the head, and nothing else
        self.post_projection = Weight(backbone, hidden)
        self.centroids = Weight(config.n_centroids, hidden) if config.n_centroids else None
        ordering = torch.empty(config.vocab_size, dtype=torch.long) if config.n_centroids else None
        self.register_buffer("token_ordering", ordering)  # tokens, those of a centroid side by side

    @classmethod
    def random(cls, name: str, target: Transformer, seed: int = 0) -> "Assistant":
        """The published sizes of the drafter for the model `name`, with weights drawn from N(0, 0.02²), norms and other
        factors 1; vocabulary, keys and values are those of `target`. Raises ValueError for a name without a drafter."""
        if name not in SIZES:
            raise ValueError(f"no drafter for '{name}' is known; there are those for {', '.join(SIZES)}")
        with torch.device("meta"):
            assistant = cls(assistant_config(target.config, *SIZES[name]), target.config)
        device = target.device
        generator, weights = torch.Generator(device).manual_seed(seed), {}
        for key, value in assistant.state_dict().items():
            if key == "token_ordering":
                weights[key] = torch.randperm(len(value), generator=generator, device=device)
                continue
            weights[key] = torch.ones_like(value, device=device, dtype=target.dtype)
            if value.dim() > 1:
                weights[key].normal_(0, 0.02, generator=generator)
        return assistant.load(weights, target)

    def load(self, weights: dict[str, Tensor], target: Transformer) -> "Assistant":
        """Takes `weights` as they are and where they are. Returns itself."""
        self.load_state_dict(weights, assign=True)
        for index, layer in enumerate(self.layers):
            own = self.donors[self.config.is_local(index)]
            if target.config.keys_of_values(own):  # then keys are made when they are read, by the norm of those who do
                layer.attention.k_norm = target.layers[own].attention.k_norm
        return self.requires_grad_(False).eval()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a pass for one row reads."""
        total, config = sum(parameter.nbytes for parameter in self.parameters()), self.config
        if config.n_centroids:
            table = self.embedding.data.nbytes
            total -= table - table * config.n_active_centroids // config.n_centroids
        return total

    def drafts(
        self, target: Transformer, cache: KVCache, token: Tensor, state: Tensor, position: Tensor, count: int
    ) -> Tensor:
        """Guesses the `count` tokens [B, count] behind the newest one of each row, the most probable ones.

        token [B] is at position [B], which says how many keys the row has in the target's cache: all but the newest
        token's. state [B, N], in the dtype of activations, is the target's of the token before, after the final norm.
        All guesses are made from there: with one query position and these keys. Rows that are done may have any state,
        and position 0. Nothing is read on the host, and shapes are fixed.
        """
        kinds, drafts = self.positions(target, cache, position), []
        for number in range(count):
            h = self(target, cache, kinds, token, state)
            token = self.best(h, target.ops)
            drafts.append(token)
            if number + 1 < count:
                state = target.ops.matmul(h, self.post_projection, h.dtype)
        return torch.stack(drafts, dim=1)

    def positions(self, target: Transformer, cache: KVCache, position: Tensor) -> dict[bool, Positions]:
        """What all global (False) and all local (True) layers share in the passes for newest tokens at position [B]: a
        decode step whose own keys, those of the tokens before, are in the cache already."""
        ops, seen, kinds = target.ops, (position - 1).clamp(min=0), {}
        query = (position + QUERY_OFFSET).clamp(min=0)
        ropes = ops.rope(query, target.rope_frequency, *[target.rope_frequency_local] * (True in self.donors))
        step = {"decoding": True}
        for local, own in self.donors.items():
            window = self.window if local else None
            mask = ops.mask(cache.layers[own], window, seen[:, None], seen, target.dtype)
            kinds[local] = Positions(len(position), 1, seen, None, ropes[int(local)], mask, **step)
        return kinds

    def forward(
        self, target: Transformer, cache: KVCache, kinds: dict[bool, Positions], token: Tensor, state: Tensor
    ) -> Tensor:
        """One pass: the drafter's own state, after its norm, for tokens [B] and states [B, N] of the tokens before."""
        ops, config, dtype, embedding = target.ops, self.config, target.dtype, target.embedding
        factor, first = target.normalizers[dtype], target.vocabulary[0]
        embedded = ops.embed(token, embedding.data, factor, dtype, embedding.scale, first, ops.sums)
        residual = Residual(ops.matmul(torch.cat((embedded, state), dim=1), self.pre_projection, dtype))
        for index, layer in enumerate(self.layers):
            local = config.is_local(index)
            residual = layer(ops, residual, kinds[local], cache.layers[self.donors[local]])
        _, h = residual.added(ops, config, self.norm)
        return h

    def scores(self, h: Tensor, ops: Ops) -> tuple[Tensor, Tensor | None]:
        """Logits of candidates, and which tokens these are: of the tokens of the nearest centroids [B, C] or, where the
        drafter has no centroids, of all tokens [B, V], and None."""
        config = self.config
        if not config.n_centroids:
            return ops.matmul(h, self.embedding, h.dtype), None
        nearest = ops.matmul(h, self.centroids, h.dtype).topk(config.n_active_centroids, sorted=False).indices
        tokens = self.token_ordering.view(config.n_centroids, -1)[nearest].flatten(1)
        return (F.embedding(tokens, self.embedding.data) @ h[:, :, None])[:, :, 0], tokens

    def best(self, h: Tensor, ops: Ops) -> Tensor:
        """The most probable tokens [B], int64."""
        logits, tokens = self.scores(h, ops)
        best = logits.argmax(dim=1)
        return best if tokens is None else tokens.gather(1, best[:, None])[:, 0]


def donor(target: ModelConfig, local: bool) -> int | None:
    """The layer whose keys and values the drafter's layers of a kind attend to: the last of this kind that has its own."""
    layers = [layer for layer in range(target.n_layers) if target.is_local(layer) == local]
    return target.donor_of(layers[-1]) if layers else None


def check_fit(config: ModelConfig, target: ModelConfig):
    """Raises ValueError, naming what differs, if a drafter is not of the model `target`."""

    def check(what: str, own, other):
        if own != other:
            raise ValueError(f"the drafter is of another model: its {what} is {own}, the model's is {other}")

    check("backbone_hidden_size", config.backbone_size, target.hidden_size)
    check("vocab_size", config.vocab_size, target.vocab_size)
    for layer in range(config.n_layers):
        local = config.is_local(layer)
        own, kind = donor(target, local), "sliding" if local else "full"
        if own is None:
            raise ValueError(f"the drafter is of another model: that has no layers of {kind} attention")
        check(f"head_dim of {kind} attention", config.head_dim_of(layer), target.head_dim_of(own))
        check(f"number of K/V heads of {kind} attention", config.kv_heads_of(layer), target.kv_heads_of(own))
    check("RoPE of full attention", _rope(config), _rope(target))
    check("RoPE of sliding attention", _rope_local(config), _rope_local(target))


def _rope(config: ModelConfig) -> tuple[float, float, float]:
    return config.rope_theta, config.rope_scale, config.rotated_share


def _rope_local(config: ModelConfig) -> tuple[float, float]:
    return config.rope_theta_local, config.rope_scale_local


def assistant_config(
    target: ModelConfig, hidden_size: int, intermediate_size: int, n_heads: int, ordered: bool
) -> ModelConfig:
    """The settings of a drafter of these sizes for `target`: three local layers and a global one."""
    return replace(
        target,
        n_layers=4,
        local_layers=(True, True, True, False),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        n_heads=n_heads,
        logit_softcap=None,
        n_shared_layers=4,
        shared_intermediate_size=None,
        n_experts=0,
        n_active_experts=0,
        per_layer_size=0,
        backbone_size=target.hidden_size,
        n_centroids=2048 if ordered else 0,
        n_active_centroids=32 if ordered else 0,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def is_assistant(directory: str | Path) -> bool:
    """Whether config.json in a directory says that it is a drafter's. False if there is none."""
    file = Path(directory) / "config.json"
    return file.is_file() and read_json(file).get("model_type") in tuple(ASSISTANTS)


def load_assistant(directory: str | Path, target: Transformer) -> Assistant:
    """Loads a drafter's directory, as published, onto the device and into the dtype of `target`. Raises
    FileNotFoundError or ValueError with a line that says what is wrong: with its files, or with its being of another
    model."""
    directory = Path(directory)
    file = directory / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"no drafter at {directory}: it has no config.json")
    content = read_json(file)
    try:
        config = ModelConfig.of_assistant(content)
        shard = target.config.shard
        with torch.device("meta"):
            assistant = Assistant(config if shard is None else config.sharded(shard), target.config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    checkpoint = open_checkpoint(directory, (), config)
    if checkpoint.weight_format is not None:
        raise ValueError(
            f"{directory} has {checkpoint.weight_format} weights; drafters in BF16, F16 and F32 can be read"
        )
    weights = load_weights(checkpoint, target.device, target.dtype, shard=shard)
    if config.n_centroids:
        ordering = weights["token_ordering"]
        if not torch.equal(ordering.sort().values, torch.arange(len(ordering), device=ordering.device)):
            raise ValueError(f"{directory} is damaged: token_ordering doesn't have each token once")
    return assistant.load(weights, target)
