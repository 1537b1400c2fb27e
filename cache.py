"""The KV cache: where keys and values are, and how each cache dtype stores them.

Shapes are named by letters: B rows of the batch, P pages, K key/value heads, S slots of a row, D head_dim.
"""

import warnings
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from config import PAGE, ModelConfig
from ops.common import round_fp8
from ops.rope import rope, rope_frequency

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
    """Keys and values of one layer, in pages of `PAGE` tokens: k and v are [P, K, PAGE, D], zeros at first.

    With a `rotation` [S or more, 2, R], keys are made of values when they are read, as `ops.rope.keys_of_values` makes
    them, and k is None: it has cosines and sines, at each position, of the R first pairs of a head; others don't turn.

    The token at position p of row b lies at place p % PAGE of page table[b, p % S // PAGE], with table [B, S / PAGE] in
    int32. Most layers have S slots a row for as many positions. Where a window is shorter than that, they are a ring of
    at least the window, so that an arriving token replaces one that has left it; of T - 1 more where T arrive at once.
    Nothing is ever read from page 0: rows without pages write there. Layers of a kind share their table.

    Beams of one prompt read what other rows wrote: with a `slot_table` [B, S] in int32, the token in slot s of row b is
    read at place n % PAGE of page n // PAGE, with n = slot_table[b, s]. Rows write through `table` all the same.
    """

    slot_table: Tensor | None = None

    def __init__(
        self,
        pages: int,
        heads: int,
        head_dim: int,
        table: Tensor,
        codec: Codec,
        scales: tuple[float, float] = (1.0, 1.0),
        ring: int = 0,
        rotation: Tensor | None = None,
    ):
        self.codec, self.ring, self.table, self.slots = codec, ring, table, PAGE * table.shape[1]
        self.k_scale, self.v_scale = scales if rotation is None else scales[1:] * 2
        shape, self.rotation = (pages, heads, PAGE, head_dim), rotation
        self.k = None if rotation is not None else torch.zeros(shape, dtype=codec.dtype, device=table.device)
        self.v = torch.zeros(shape, dtype=codec.dtype, device=table.device)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """k and v, or v alone."""
        return (self.v,) if self.k is None else (self.k, self.v)

    def with_table(self, table: Tensor, slot_table: Tensor | None = None) -> "LayerCache":
        """The same memory, seen through another table."""
        view = copy(self)
        view.table, view.slot_table, view.slots = table, slot_table, PAGE * table.shape[1]
        return view

    def held_positions(self, end: Tensor) -> Tensor:
        """[B, S]: the position of the token in each slot once each row has `end` [B] tokens; negative where none is."""
        last = end[:, None] - 1
        return last - (last - torch.arange(self.slots, device=end.device)) % self.slots

    def held(self, end: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Keys and values, or values alone, [B, K, S, D] of all rows in `dtype`, as they are stored, once each row has
        `end` [B] tokens; zeros where none is."""
        empty = (self.held_positions(end) < 0)[:, None, :, None]
        if self.slot_table is not None:
            page, place = self.slot_table // PAGE, self.slot_table % PAGE
            found = [_as_words(x)[page, :, place].transpose(1, 2) for x in self.stored]
        else:  # [B, S / PAGE, K, PAGE, D]; by whole pages, where an index of two dimensions goes an element at a time
            pages = self.table.flatten()
            found = [_as_words(x) for x in self.stored]
            found = [x.flatten(1).index_select(0, pages).view(*self.table.shape, *x.shape[1:]) for x in found]
            found = [x.transpose(1, 2).flatten(2, 3) for x in found]
        return tuple(x.view(self.codec.dtype).to(dtype).masked_fill_(empty, 0) for x in found)  # copies of their own

    def encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """k and v, or v alone, as they are stored."""
        v = self.codec.encode(v, self.v_scale)
        return (v,) if self.k is None else (self.codec.encode(k, self.k_scale), v)

    def slots_for(self, row: Tensor, position: Tensor, end: Tensor | int) -> Tensor:
        """Where tokens at `position` [M] of rows `row` [M] go, as page * PAGE + place: in page 0 those that are not
        before their row's `end` [M], and those whose slot a later token of the row's takes."""
        slot = self.table[row, position % self.slots // PAGE] * PAGE + position % PAGE
        return torch.where((position < end) & (position + self.slots >= end), slot, 0)

    def copied(self) -> "LayerCache":
        """The pages of its rows, in memory of their own."""
        view = copy(self)
        *k, view.v = (_as_words(x)[self.table.flatten()].view(x.dtype) for x in self.stored)
        view.k = k[0] if k else None
        view.table = torch.arange(self.table.numel(), dtype=torch.int32, device=self.table.device).view_as(self.table)
        return view

    def write(self, *kv_slot: Tensor):
        """Stores encoded k and v, or v alone, [M, K, D] of tokens at slot [M], as `slots_for` counts them."""
        # Indexed without a transpose: Inductor writes this in place, and else copies the whole cache.
        *kv, slot = kv_slot
        index = slot // PAGE, slice(None), slot % PAGE
        for stored, x in zip(self.stored, kv, strict=True):
            stored[index] = x


def _as_words(x: Tensor) -> Tensor:
    """x in pieces of 8 bytes, where its last dimension has whole ones: what is indexed goes an element at a time, and
    not every operation knows every dtype."""
    words = x.shape[-1] * x.dtype.itemsize % 8 == 0
    return x.view(torch.int64 if words else torch.uint8) if words or x.dtype.itemsize == 1 else x


@dataclass
class KVCache:
    """The caches of all layers of a model, or of some; a layer without keys and values of its own has that of another.
    `tables` are those of layers without rings (0) and of layers with rings of so many pages, one row of each for a
    sequence."""

    layers: list[LayerCache]
    tables: dict[int, Tensor]

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch_size: int,
        length: int,
        codec: Codec,
        device: torch.device,
        scales: KVScales | None = None,
        pages: int | None = None,
        ahead: int = 0,
    ) -> "KVCache":
        """Allocates the caches of a model with these settings for batch_size sequences of at most `length` tokens.

        Each row has its own pages in all tables. With `pages`, so many are allocated for a layer without a ring, page 0
        included, and it is the caller's to say in its table which rows have which. Rings have room for `ahead` tokens
        more than windows: drafts, which may be rejected.
        """
        scales = KVScales() if scales is None else scales
        with torch.inference_mode(False):  # usable in and out of that mode, whoever asked first
            tables, layers, rotation = {}, [], None
            for layer in range(config.n_layers):
                if config.is_shared(layer):
                    layers.append(layers[config.donor_of(layer)])
                    continue
                count, ring = pages_of(config, layer, length, ahead)
                if ring not in tables:
                    own = 1 + torch.arange(batch_size * count, dtype=torch.int32, device=device).view(batch_size, count)
                    tables[ring] = own if ring or pages is None else torch.zeros_like(own)
                all_pages = 1 + batch_size * count if ring or pages is None else pages
                shape = all_pages, config.kv_heads_of(layer), config.head_dim_of(layer)
                if alone := config.keys_of_values(layer):
                    rotation = _rotation(config, count * PAGE, device) if rotation is None else rotation
                options = scales.of(layer, codec), ring, rotation if alone else None
                layers.append(LayerCache(*shape, tables[ring], codec, *options))
        return cls(layers, tables)

    def joined(self, other: "KVCache") -> "KVCache":
        """Both caches as one, of sequences that have the same pages in both."""
        return KVCache(self.layers + other.layers, other.tables | self.tables).with_tables(other.tables | self.tables)

    def part(self, first: int, last: int | None = None) -> "KVCache":
        """The caches of layers [first, last)."""
        return KVCache(self.layers[first:last], self.tables)

    def with_tables(self, tables: dict[int, Tensor], slot_tables: dict[int, Tensor] | None = None) -> "KVCache":
        """The same memory, for the sequences of other tables; with slot tables, one of each kind, for beams."""
        slot_tables = slot_tables or {}
        layers = [layer.with_table(tables[layer.ring], slot_tables.get(layer.ring)) for layer in self.layers]
        return KVCache(layers, tables)

    def rows(self, index) -> "KVCache":
        """The same memory, for the sequences at `index`: a slice, whose tables are views, or a tensor of numbers."""
        return self.with_tables({ring: table[index] for ring, table in self.tables.items()})

    def shortened(self, length: int) -> "KVCache":
        """The same memory, as if sequences could have `length` tokens only, which they don't exceed."""
        pages = -(-length // PAGE)
        tables = {ring: table if ring else table[:, :pages].contiguous() for ring, table in self.tables.items()}
        return self.with_tables(tables)

    def copy_rows(self, source: "KVCache", rows: Tensor):
        """Fills its rows with those of `source`, a cache of the same length or a smaller one, at index `rows`.

        A slot of a smaller cache is the same in a larger one: rings are either full already or not yet closed.
        """
        for mine, other in zip(self.own_layers, source.own_layers):
            to, pages = mine.table[:, : other.table.shape[1]].flatten(), other.table[rows].flatten()
            for stored, x in zip(mine.stored, other.stored):
                _as_words(stored)[to] = _as_words(x)[pages]

    def copy_pages(self, ring: int, source: Tensor, to: Tensor):
        """Copies pages of all layers with rings of so many pages, or of those without (0), by their numbers [N]."""
        for layer in self.own_layers:
            if layer.ring == ring:
                for x in map(_as_words, layer.stored):
                    x[to] = x[source]

    @property
    def own_layers(self) -> list[LayerCache]:
        """Each once."""
        return list({layer.v.data_ptr(): layer for layer in self.layers}.values())

    @property
    def bytes(self) -> int:
        rotation = next((layer.rotation.nbytes for layer in self.layers if layer.rotation is not None), 0)
        return rotation + sum(x.nbytes for layer in self.own_layers for x in layer.stored)


def _rotation(config: ModelConfig, slots: int, device: torch.device) -> Tensor:
    """The `LayerCache.rotation` of a model's layers [slots, 2, R]."""
    size, pairs = config.global_group[1], config.rotated_pairs
    frequency = rope_frequency(size, config.rope_theta, config.rope_scale, config.rotated_share)
    frequency = frequency[size // 2 :][:pairs].to(device)
    return rope(torch.arange(slots, device=device), frequency)[0].transpose(0, 1).contiguous()


def pages_of(config: ModelConfig, layer: int, length: int, ahead: int = 0) -> tuple[int, int]:
    """Pages that a row of `length` tokens needs in a layer, and the same if they are a ring, else 0."""
    pages = -(-length // PAGE)
    ring = -(-(config.window + ahead) // PAGE) if config.is_local(layer) else pages
    return (ring, ring) if ring < pages else (pages, 0)


def cache_bytes(
    config: ModelConfig, batch_size: int, length: int, codec: Codec, pages: int | None = None, ahead: int = 0
) -> int:
    """Bytes that `KVCache.empty` allocates for the same arguments."""
    total = 0
    for layer in range(config.n_layers):
        count, ring = pages_of(config, layer, length, ahead)
        count = 1 + batch_size * count if ring or pages is None else pages
        total += count * PAGE * _token_bytes(config, layer, codec)
    if any(map(config.keys_of_values, range(config.n_layers))):
        total += -(-length // PAGE) * PAGE * 2 * config.rotated_pairs * torch.float32.itemsize
    return total


def context_bytes(config: ModelConfig, length: int, codec: Codec) -> int:
    """Bytes of the keys and values of `length` tokens, as far as the next one sees them."""
    return sum(
        (min(config.window, length) if config.is_local(layer) else length) * _token_bytes(config, layer, codec)
        for layer in range(config.n_layers)
    )


def _token_bytes(config: ModelConfig, layer: int, codec: Codec) -> int:
    """Bytes that a token has in the cache of a layer."""
    if config.is_shared(layer):
        return 0
    stored = 1 if config.keys_of_values(layer) else 2
    return stored * config.kv_heads_of(layer) * config.head_dim_of(layer) * codec.dtype.itemsize
