"""The KV cache: where keys and values are, and how each cache dtype stores them.

Shapes are named by letters: B rows of the batch, K key/value heads, S slots, D head_dim.
"""

import warnings
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from config import ModelConfig
from ops.common import round_fp8

# ---------------------------------------------------------------------------------------------------------------------
# Cache dtypes


@dataclass(frozen=True)
class Codec:
    """How keys and values are stored in `dtype`. A new cache dtype is an entry of `CODECS`, and what the kernels of
    ops/decode_attention.py and ops/rope.py need to convert it.

    real = stored * scale. `limit` is the largest stored value; 0 means that the dtype has the range of activations and
    no scale. `calibrated` says whether the scales are those of calibrate.py; else they are 1.
    """

    dtype: torch.dtype
    limit: float = 0.0
    calibrated: bool = False

    def encode(self, x: Tensor, scale: float) -> Tensor:
        """x as it is stored, in `dtype`."""
        return round_fp8(x, scale, self.dtype) if self.limit else x.to(self.dtype)


CODECS = {  # by the names that `--kv_cache_dtype` takes
    "bf16": Codec(torch.bfloat16),
    "fp32": Codec(torch.float32),
    "fp8_e4m3": Codec(torch.float8_e4m3fn, limit=448.0, calibrated=True),
    "fp8_e5m2": Codec(torch.float8_e5m2, limit=57344.0),  # it has the range to do without calibration
}
KV_CACHE_DTYPES = ("auto", *(name for name in CODECS if name != "fp32"))  # what users choose from; auto: as activations


def codec_of(kv_cache_dtype: str | torch.dtype | None, activations: torch.dtype) -> Codec:
    """The codec of a cache dtype, given by name or as a torch dtype; of the activations' for "auto" and None.

    Raises ValueError for any other.
    """
    wanted = activations if kv_cache_dtype in (None, "auto") else kv_cache_dtype
    for name, codec in CODECS.items():
        if wanted == name or wanted == codec.dtype:
            return codec
    raise ValueError(f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, not {kv_cache_dtype!r}")


@dataclass
class KVScales:
    """The scales of K and V of each layer, as calibrate.py made them, and what is wrong with their file."""

    values: list[tuple[float, float]] | None = None  # (K, V) a layer; None: there are none
    problem: str | None = None  # for whoever asks for a calibrated cache

    def check(self, codec: Codec):
        """Raises ValueError if `codec` needs scales and their file is bad; warns if there are none."""
        if codec.calibrated and self.problem:
            raise ValueError(self.problem)
        if codec.calibrated and self.values is None:
            warnings.warn("no scaling factors for K and V: 1.0 is used; calibrate.py makes better ones", stacklevel=3)

    def of(self, layer: int, codec: Codec) -> tuple[float, float]:
        return self.values[layer] if codec.calibrated and self.values is not None else (1.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class LayerCache:
    """Keys and values of one layer, allocated once: k and v are [B, K, S, D], zeros at first.

    A ring: the token at position p lies in slot p % S. A global layer has a slot for every position; a local one only
    as many as its window, so that an arriving token replaces the one that just left the window.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], codec: Codec, device, scales: tuple[float, float] = (1.0, 1.0)
    ):
        self.codec, self.slots = codec, shape[2]
        self.k_scale, self.v_scale = scales
        self.k = torch.zeros(shape, dtype=codec.dtype, device=device)
        self.v = torch.zeros(shape, dtype=codec.dtype, device=device)

    def rows(self, start: int, count: int) -> "LayerCache":
        """A view of `count` rows, in the same memory."""
        if count == len(self.k):
            return self  # a compiled step knows it
        view = copy(self)
        view.k, view.v = self.k[start : start + count], self.v[start : start + count]
        return view

    def held_positions(self, end: Tensor) -> Tensor:
        """[B, S]: the position of the token in each slot once each row has `end` [B] tokens; negative where none is."""
        last = end[:, None] - 1
        return last - (last - torch.arange(self.slots, device=end.device)) % self.slots

    def encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v as they are stored."""
        return self.codec.encode(k, self.k_scale), self.codec.encode(v, self.v_scale)

    def write(self, k: Tensor, v: Tensor, position: Tensor | None, lengths: Tensor | None, slot: tuple | None = None):
        """Stores encoded k and v [B, K, T, D] of tokens from `position` [B] on (None: 0), the first `lengths` [B] of
        them.

        Padding behind a row's length may be stored too, but only in slots that no query sees before their own token
        overwrites them. `slot` is the index of the entries of one new token a row, as `token_slot` makes it.
        """
        batch, _, tokens, _ = k.shape
        if position is None and tokens <= self.slots:
            self.k[:, :, :tokens] = k
            self.v[:, :, :tokens] = v
        elif tokens == 1:
            # Indexed without a transpose: Inductor writes this in place, and else copies the whole cache.
            slot = self.token_slot(position) if slot is None else slot
            self.k[slot] = k[:, :, 0]
            self.v[slot] = v[:, :, 0]
        else:  # more tokens than slots, or a ring that is partly filled: each slot takes the newest token of its own
            start = torch.zeros(batch, dtype=torch.long, device=k.device) if position is None else position
            end = start + (tokens if lengths is None else lengths)
            source = self.held_positions(end) - start[:, None]  # [B, S], index into the new tokens
            new = (source >= 0)[:, None, :, None]
            source = source.clamp(min=0)[:, None, :, None].expand_as(self.k)
            for stored, x in ((self.k, k), (self.v, v)):
                taken = _as_bytes(x).gather(2, source)  # not every operation knows every dtype
                _as_bytes(stored).copy_(torch.where(new, taken, _as_bytes(stored)))

    def token_slot(self, position: Tensor) -> tuple[Tensor, slice, Tensor]:
        """Index into k and v of the entries [B, K, D] of the tokens at `position` [B]."""
        return torch.arange(len(position), device=position.device), slice(None), position % self.slots


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _as_words(x: Tensor) -> Tensor:
    """x in pieces of 8 bytes, where its last dimension has whole ones: what is indexed goes an element at a time."""
    return x.view(torch.int64) if x.shape[-1] * x.dtype.itemsize % 8 == 0 else _as_bytes(x)


@dataclass
class KVCache:
    """The caches of all layers of a model, for `batch_size` rows."""

    layers: list[LayerCache]

    @property
    def batch_size(self) -> int:
        return len(self.layers[0].k)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch_size: int,
        length: int,
        codec: Codec,
        device: torch.device,
        scales: KVScales | None = None,
    ) -> "KVCache":
        """Allocates the caches of a model with these settings."""
        scales = KVScales() if scales is None else scales
        with torch.inference_mode(False):  # usable in and out of that mode, whoever asked first
            layers = []
            for layer in range(config.n_layers):
                shape = (batch_size, config.n_kv_heads, slots_of(config, layer, length), config.head_dim)
                layers.append(LayerCache(shape, codec, device, scales.of(layer, codec)))
        return cls(layers)

    def rows(self, start: int, count: int) -> "KVCache":
        """A view of `count` rows, in the same memory."""
        return self if count == self.batch_size else KVCache([layer.rows(start, count) for layer in self.layers])

    def like(self, batch_size: int, length: int) -> "KVCache":
        """Another cache of that size, for shorter sequences or as long ones."""
        layers = []
        for layer in self.layers:
            _, heads, slots, head_dim = layer.k.shape
            shape, scales = (batch_size, heads, min(slots, length), head_dim), (layer.k_scale, layer.v_scale)
            layers.append(LayerCache(shape, layer.codec, layer.k.device, scales))
        return KVCache(layers)

    def copy_rows(self, source: "KVCache", rows=slice(None), to=slice(None)):
        """Fills the rows at index `to` with the rows at index `rows` of `source`, which has the same length or a
        smaller one.

        A slot of a smaller cache is the same in a larger one: rings are either full already or not yet closed.
        """
        for mine, other in zip(self.layers, source.layers):
            for stored, x in ((mine.k, other.k), (mine.v, other.v)):
                _as_words(stored)[to, :, : other.slots] = _as_words(x)[rows]

    @property
    def bytes(self) -> int:
        return sum(2 * layer.k.nbytes for layer in self.layers)


def slots_of(config: ModelConfig, layer: int, length: int) -> int:
    """Slots a row that a layer needs for sequences of `length` tokens."""
    return min(config.window, length) if config.is_local(layer) else length


def cache_bytes(config: ModelConfig, batch_size: int, length: int, codec: Codec) -> int:
    """Bytes that `KVCache.empty` allocates for the same arguments."""
    slots = sum(slots_of(config, layer, length) for layer in range(config.n_layers))
    return 2 * batch_size * slots * config.n_kv_heads * config.head_dim * codec.dtype.itemsize
