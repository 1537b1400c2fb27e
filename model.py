"""Gemma 1, 2 and 3: settings, modules and the static KV cache, in one definition.

Shapes are named by letters: B rows of the batch, T tokens a row in this forward, S slots of a KV cache,
H query heads, K key/value heads, D head_dim, V vocabulary.
"""

import importlib.util
import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels import IntWeight, fp8_matmul, int_linear, rms_norm, rotate, round_fp8

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class ModelConfig:
    """What distinguishes one Gemma from another. Sizes are counts, angles' bases are unitless."""

    generation: int  # 1, 2 or 3; CodeGemma is 1
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int  # a field of its own: n_heads * head_dim is not hidden_size in most Gemmas
    vocab_size: int
    context_length: int
    query_pre_attn_scalar: float  # attention scores are multiplied by this ** -0.5
    window: int | None = None  # keys that a local layer sees, the query's own included
    local_layers: tuple[bool, ...] = ()  # one flag a layer; () means that all are global
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    rope_theta: float = 10_000.0  # global layers
    rope_scale: float = 1.0  # positions of global layers are divided by this
    rope_theta_local: float = 10_000.0
    rope_scale_local: float = 1.0
    norm_eps: float = 1e-6
    stop_ids: tuple[int, ...] = (1,)

    def __post_init__(self):
        if len(self.local_layers) not in (0, self.n_layers):
            raise ValueError(f"{len(self.local_layers)} layer types are given for {self.n_layers} layers")
        if any(self.local_layers) and not self.window:
            raise ValueError("local layers need a sliding_window")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def post_norms(self) -> bool:
        return self.generation >= 2

    @property
    def qk_norm(self) -> bool:
        return self.generation >= 3

    def is_local(self, layer: int) -> bool:
        return bool(self.local_layers) and self.local_layers[layer]

    @classmethod
    def from_name(cls, name: str) -> "ModelConfig":
        """The published sizes of `name`, for runs with random weights. Raises ValueError for an unknown name."""
        if name not in NAMED_CONFIGS:
            raise ValueError(f"no built-in configuration '{name}'; there are: {', '.join(NAMED_CONFIGS)}")
        generation, layers, hidden, ffn, heads, kv_heads, head_dim, window, scalar, scale, vocab, context = (
            NAMED_CONFIGS[name]
        )
        return cls(
            generation=generation,
            n_layers=layers,
            hidden_size=hidden,
            intermediate_size=ffn,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab,
            context_length=context,
            query_pre_attn_scalar=scalar,
            window=window,
            local_layers=_layer_pattern(generation, layers),
            attn_softcap=50.0 if generation == 2 else None,
            logit_softcap=30.0 if generation == 2 else None,
            rope_theta=1e6 if generation == 3 else 1e4,
            rope_scale=scale,
            stop_ids=(1, 106) if generation == 3 else (1, 107),
        )

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """Reads a Hugging Face config.json of model_type gemma, gemma2, gemma3_text or gemma3 (its text part).

        Fields that Gemma 3's multimodal checkpoints leave out take Hugging Face's defaults. Raises ValueError, naming
        what it found, for another architecture or a setting that this file does not implement.
        """
        model_type = config.get("model_type")
        tied = config.get("tie_word_embeddings", True)
        stop_ids = config.get("eos_token_id")
        if model_type == "gemma3":
            if not isinstance(config.get("text_config"), dict):
                raise ValueError("config.json says gemma3 but holds no text_config")
            config = config["text_config"]
            tied = tied and config.get("tie_word_embeddings", True)
            stop_ids = stop_ids or config.get("eos_token_id")
        elif model_type not in ("gemma", "gemma2", "gemma3_text"):
            known = str(model_type).startswith(("gemma", "recurrent_gemma", "paligemma", "t5gemma"))
            what = f"another generation or kind of Gemma ({model_type})" if known else f"architecture '{model_type}'"
            raise ValueError(f"{what} is not supported; this program runs gemma, gemma2, gemma3_text and gemma3")
        generation = {"gemma": 1, "gemma2": 2}.get(model_type, 3)

        defaults = _HF_DEFAULTS[generation]

        def get(key: str):
            value = config.get(key, defaults.get(key))
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"config.json needs a positive number as '{key}', not {value!r}")
            return value

        if not tied:
            raise ValueError("tie_word_embeddings is false; Gemma's output head is its embedding")
        if config.get("use_bidirectional_attention"):
            raise ValueError("use_bidirectional_attention is set: an embedding model, which cannot generate text")
        activation = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
        if activation not in ("gelu", "gelu_pytorch_tanh"):  # the first Gemma configs said gelu and meant tanh
            raise ValueError(f"activation '{activation}' is not supported; Gemma uses gelu_pytorch_tanh")

        layers = get("num_hidden_layers")
        local_layers = _layer_pattern(generation, layers, config.get("sliding_window_pattern"))
        if generation > 1 and config.get("layer_types") is not None:
            unknown = set(config["layer_types"]) - {"sliding_attention", "full_attention"}
            if unknown:
                raise ValueError(f"layer type '{min(unknown)}' is not supported")
            local_layers = tuple(kind == "sliding_attention" for kind in config["layer_types"])
        (theta, scale), (theta_local, scale_local) = _rope_settings(config, generation)

        return cls(
            generation=generation,
            n_layers=layers,
            hidden_size=get("hidden_size"),
            intermediate_size=get("intermediate_size"),
            n_heads=get("num_attention_heads"),
            n_kv_heads=get("num_key_value_heads"),
            head_dim=get("head_dim"),
            vocab_size=get("vocab_size"),
            context_length=get("max_position_embeddings"),
            query_pre_attn_scalar=get("head_dim") if generation == 1 else get("query_pre_attn_scalar"),
            window=get("sliding_window") if any(local_layers) else None,
            local_layers=local_layers,
            attn_softcap=config.get("attn_logit_softcapping", 50.0) if generation == 2 else None,  # null: off
            logit_softcap=config.get("final_logit_softcapping", {2: 30.0}.get(generation)) if generation > 1 else None,
            rope_theta=theta,
            rope_scale=scale,
            rope_theta_local=theta_local,
            rope_scale_local=scale_local,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            stop_ids=_as_tuple(stop_ids) or (1,),
        )

    def differences_from_published(self) -> str:
        """Where these settings have a published model's sizes and yet disagree with it: 'field 224 (gemma-2-9b: 256)'.

        An empty string if nothing does. gemma-2-9b's first config.json said query_pre_attn_scalar 224, for one.
        """
        sizes = ("generation", "n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads", "head_dim")
        for name in NAMED_CONFIGS:
            published = ModelConfig.from_name(name)
            if any(getattr(self, size) != getattr(published, size) for size in sizes):
                continue
            published = replace(published, vocab_size=self.vocab_size, stop_ids=self.stop_ids)
            return ", ".join(
                f"{f.name} {getattr(self, f.name)} ({name}: {getattr(published, f.name)})"
                for f in fields(self)
                if getattr(self, f.name) != getattr(published, f.name)
            )
        return ""


# generation, layers, hidden, ffn, heads, kv heads, head_dim, window, query_pre_attn_scalar, RoPE scale, vocab, context
NAMED_CONFIGS = {
    "gemma-2b": (1, 18, 2048, 16384, 8, 1, 256, None, 256, 1.0, 256000, 8192),
    "gemma-7b": (1, 28, 3072, 24576, 16, 16, 256, None, 256, 1.0, 256000, 8192),
    "codegemma-2b": (1, 18, 2048, 16384, 8, 1, 256, None, 256, 1.0, 256000, 8192),
    "codegemma-7b": (1, 28, 3072, 24576, 16, 16, 256, None, 256, 1.0, 256000, 8192),
    "gemma-2-2b": (2, 26, 2304, 9216, 8, 4, 256, 4096, 256, 1.0, 256000, 8192),
    "gemma-2-9b": (2, 42, 3584, 14336, 16, 8, 256, 4096, 256, 1.0, 256000, 8192),
    "gemma-2-27b": (2, 46, 4608, 36864, 32, 16, 128, 4096, 144, 1.0, 256000, 8192),
    "gemma-3-270m": (3, 18, 640, 2048, 4, 1, 256, 512, 256, 1.0, 262144, 32768),
    "gemma-3-1b": (3, 26, 1152, 6912, 4, 1, 256, 512, 256, 1.0, 262144, 32768),
    "gemma-3-4b": (3, 34, 2560, 10240, 8, 4, 256, 1024, 256, 8.0, 262208, 131072),
    "gemma-3-12b": (3, 48, 3840, 15360, 16, 8, 256, 1024, 256, 8.0, 262208, 131072),
    "gemma-3-27b": (3, 62, 5376, 21504, 32, 16, 128, 1024, 168, 8.0, 262208, 131072),
}

# What Hugging Face's configuration classes fill in; gemma-3-4b's text_config, for one, leaves most of it out.
_HF_DEFAULTS = {
    1: {"max_position_embeddings": 8192},
    2: {
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    3: {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
}


def _as_tuple(value) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _layer_pattern(generation: int, n_layers: int, global_every: int | None = None) -> tuple[bool, ...]:
    """Which layers are local: none in Gemma 1, all but every second in Gemma 2, all but every sixth in Gemma 3."""
    if generation == 1:
        return ()
    global_every = global_every or (2 if generation == 2 else 6)
    return tuple((layer + 1) % global_every != 0 for layer in range(n_layers))


def _rope_settings(config: dict, generation: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(theta, scale) of global and of local layers, from rope_parameters or from the older separate keys."""
    parameters = config.get("rope_parameters") or {}
    if "full_attention" in parameters or "sliding_attention" in parameters:
        kinds = [parameters.get("full_attention") or {}, parameters.get("sliding_attention") or {}]
    else:
        kinds = [parameters | (config.get("rope_scaling") or {}), {}]
    thetas = [config.get("rope_theta", 1e6 if generation == 3 else 1e4), config.get("rope_local_base_freq", 1e4)]
    settings = []
    for kind, theta in zip(kinds, thetas):
        rope_type = kind.get("rope_type", kind.get("type", "default"))
        if rope_type not in ("default", "linear"):
            raise ValueError(f"RoPE type '{rope_type}' is not supported; Gemma 1 to 3 use default and linear")
        scale = kind.get("factor", 1.0) if rope_type == "linear" else 1.0
        settings.append((float(kind.get("rope_theta", theta)), float(scale)))
    return settings[0], settings[1] if generation == 3 else settings[0]


# ---------------------------------------------------------------------------------------------------------------------
# KV cache


class Shared(NamedTuple):
    """What all local, or all global, layers share in one forward."""

    cos: Tensor  # [1 or B, T, 1, D], float32
    sin: Tensor  # the same, with a minus in the first half: what `rotate` multiplies the other half with
    mask: Tensor | None  # [B, 1, T, keys], 0 where a query sees a key, else -inf; None: causal over the new tokens
    slot: (
        tuple[Tensor, slice, Tensor] | None
    )  # in decode: index of the [B, K, D] entries that the tokens get in a cache


class KVCache:
    """Keys and values of one layer, allocated once: k and v are [B, K, S, D], zeros at first.

    A ring: the token at position p lives in slot p % S. A global layer has a slot for every position; a local one only
    as many as its window, so that an arriving token replaces the one that just left the window.
    """

    def __init__(self, batch_size: int, n_kv_heads: int, slots: int, head_dim: int, dtype, device):
        shape = (batch_size, n_kv_heads, slots, head_dim)
        self.slots, self.dtype = slots, dtype
        self.k_scale = self.v_scale = 1.0  # real = stored * scale
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def rows(self, count: int) -> "KVCache":
        """The first `count` rows, in the same memory."""
        if count == len(self.k):
            return self  # a compiled step knows it
        view = copy(self)
        view.k, view.v = self.k[:count], self.v[:count]
        return view

    def held_positions(self, end: Tensor) -> Tensor:
        """[B, S]: the position of the token in each slot once each row has `end` [B] tokens; negative where none is."""
        last = end[:, None] - 1
        return last - (last - torch.arange(self.slots, device=end.device)) % self.slots

    def rounded(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v as the cache gives them back, divided by its scales: attention sees the same numbers in prefill and
        in decode, and however a prompt is cut into pieces."""
        if self.dtype.itemsize == 1:
            return round_fp8(k, self.k_scale, self.dtype).to(k.dtype), round_fp8(v, self.v_scale, self.dtype).to(
                v.dtype
            )
        return k.to(self.dtype).to(k.dtype), v.to(self.dtype).to(v.dtype)

    def write(self, k: Tensor, v: Tensor, shared: Shared, position: Tensor | None, lengths: Tensor | None):
        """Stores k and v [B, K, T, D], `rounded` already, of tokens from `position` [B] on (None: 0); only the first
        `lengths` [B] count.

        Padding behind a row's length may be stored too, but only in slots that no query sees before their own token
        overwrites them.
        """
        batch, _, tokens, _ = k.shape
        if position is None and tokens <= self.slots:
            self.k[:, :, :tokens] = k
            self.v[:, :, :tokens] = v
        elif tokens == 1:
            # Indexed without a transpose: Inductor writes this in place, and else copies the whole cache.
            self.k[shared.slot] = k[:, :, 0].to(self.dtype)
            self.v[shared.slot] = v[:, :, 0].to(self.dtype)
        else:  # more tokens than slots, or a ring that is partly filled: each slot takes the newest token of its own
            start = torch.zeros(batch, dtype=torch.long, device=k.device) if position is None else position
            end = start + (tokens if lengths is None else lengths)
            source = self.held_positions(end) - start[:, None]  # [B, S], index into the new tokens
            new = (source >= 0)[:, None, :, None]
            source = source.clamp(min=0)[:, None, :, None].expand_as(self.k)
            self.k.copy_(torch.where(new, k.gather(2, source).to(self.dtype), self.k))
            self.v.copy_(torch.where(new, v.gather(2, source).to(self.dtype), self.v))


# ---------------------------------------------------------------------------------------------------------------------
# Modules, in the order in which data meets them. `Linear` and `attention` are the two places where other
# implementations come in.


class Linear(nn.Linear):
    """x @ weight.T, without a bias."""

    input_scale = weight_scale = None  # FP8Linear's
    packed: "PackedWeight | None" = None
    te: "TELinear | None" = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if prefers_te(self.te, x):
            return self.te(x)
        return linear(x, self.weight, self.packed)


class PackedWeight(NamedTuple):
    """A bfloat16 weight in oneDNN's own layout, which F.linear would otherwise make anew in every call on a CPU.

    Measured on 2 cores with AVX512-BF16, gemma-2b's shapes: 1.4 times F.linear at 1 row, 1.6 times at 16; tiny-gemma's
    step takes 0.8 of the time.
    """

    weight: Tensor
    source: tuple[int, int]  # address and version of the weight that it was made from

    @classmethod
    def of(cls, weight: Tensor, old: "PackedWeight | None") -> "PackedWeight":
        source = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if old is not None and old.source == source:
            return old
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1), source)


def linear(x: Tensor, weight: Tensor, packed: PackedWeight | None) -> Tensor:
    if packed is None or torch.compiler.is_compiling():  # Inductor packs by itself
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, packed.weight, None, "none", [], "")


class FP8Linear(nn.Module):
    """A linear layer that keeps its weight in E4M3 only; static scales of input and weight, real = fp8 * scale."""

    te: "TELinear | None" = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn), False)
        self.weight_scale = nn.Parameter(torch.empty(()), False)
        self.input_scale = nn.Parameter(torch.empty(()), False)

    def forward(self, x: Tensor) -> Tensor:
        if prefers_te(self.te, x):
            return self.te(x)
        return fp8_linear(x, self.weight, self.input_scale, self.weight_scale)


def fp8_linear(x: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """x [..., in] rounded to E4M3, times weight [out, in] in E4M3; summed in float32, returned in x's dtype.

    Off the GPU this is plain arithmetic on the rounded values, and defines the result.
    """
    rows = round_fp8(x, input_scale).flatten(0, -2)
    return fp8_matmul(rows, weight, input_scale, weight_scale, x.dtype).view(*x.shape[:-1], -1)


class IntLinear(nn.Module):
    """A linear layer that keeps its weight in 8 or, with `group`, in 4 bits: the parts of a kernels.IntWeight."""

    input_scale = weight_scale = None

    def __init__(self, in_features: int, out_features: int, group: int = 0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        empty = IntWeight.empty(out_features, in_features, group)
        self.weight, self.scale = nn.Parameter(empty.packed, False), nn.Parameter(empty.scale, False)

    @property
    def operand(self) -> IntWeight:
        return IntWeight(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return int_linear(x, self.operand)


def operands(linear: Linear | FP8Linear | IntLinear) -> tuple[Tensor | IntWeight, Tensor | None, Tensor | None]:
    weight = linear.operand if isinstance(linear, IntLinear) else linear.weight
    return weight, linear.input_scale, linear.weight_scale


def import_te():
    """TransformerEngine's PyTorch module; None where it is not installed or, with a warning, can't be imported."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        warnings.warn(f"TransformerEngine can't be imported, prefill runs on PyTorch: {error}", stacklevel=2)
        return None


TE_TOKENS = 2048


def prefers_te(te: "object | None", x: Tensor) -> bool:
    """Where TransformerEngine's modules run: in prefill, x [B, T, ...] with T > 1, of TE_TOKENS tokens at least.

    A call of a TE linear takes some 100 microseconds of the host: below, the GPU waits for it. H200, 128 tokens, prefill
    with TE and without: gemma-7b in BF16 42 ms and 19, in FP8 60 and 27; gemma-2b 27 and 12, 36 and 24. Decoding goes
    without, too: inside a CUDA graph its GEMMs are slower than PyTorch's own at few rows (gemma-7b's linear layers, 8
    rows: FP8 2.89 ms against 2.36, BF16 4.67 against 4.24), let alone kernels.py's.
    """
    return te is not None and x.shape[1] > 1 and x.shape[0] * x.shape[1] >= TE_TOKENS


class TELinear:
    """TransformerEngine's linear layer over the weight of a `Linear` or `FP8Linear`, which it shares.

    No module of its own, so that the state dict stays the same. FP8: DelayedScaling, whose scales are set here and stay,
    since TE updates them only where gradients are enabled. Rows are padded to the multiple of 8 that its GEMMs want.
    """

    def __init__(self, source: "Linear | FP8Linear"):
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import DelayedScaling, Format

        self.fp8 = isinstance(source, FP8Linear)
        self.recipe = DelayedScaling(fp8_format=Format.E4M3, amax_history_len=1)
        self.autocast = te.autocast
        options = dict(bias=False, params_dtype=torch.bfloat16, device=source.weight.device)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            te.quantized_model_init(enabled=self.fp8, recipe=self.recipe),
        ):
            self.module = te.Linear(source.in_features, source.out_features, **options)
            if self.fp8:
                self.module.weight._data = source.weight.data.view(torch.uint8)
                self.module.weight._scale_inv = source.weight_scale.data.reshape(1)
                scale = self.module.fp8_meta["scaling_fwd"].scale  # 0: input, 1: weight
                scale[0], scale[1] = 1 / source.input_scale, 1 / source.weight_scale
            else:
                self.module.weight = nn.Parameter(source.weight.data, False)
        self.module.requires_grad_(False).eval()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        pad = -len(rows) % 8 if self.fp8 else 0
        with torch.no_grad(), self.autocast(enabled=self.fp8, recipe=self.recipe):
            y = self.module(F.pad(rows, (0, 0, 0, pad)) if pad else rows)
        return y[: len(rows)].view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) in float32, rounded once at the end."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def attention(q, k, v, scale: float, mask=None, window: int | None = None, softcap: float | None = None) -> Tensor:
    """Attention of q [B, H, T, D] over k and v [B, K, S, D]; returns [B, H, T, D].

    With mask [B, 1, T, S], 0 where a query sees a key and -inf elsewhere. Without, S equals T and the mask is causal,
    limited to the last `window` keys. `softcap` c turns scores s into c * tanh(s / c).
    """
    batch, heads, tokens, head_dim = q.shape
    group = heads // k.shape[1]
    if tokens == 1:  # the queries that share a key head become rows of one query matrix: keys are read once
        q = q.reshape(batch, -1, group, head_dim)
        y = _attend(q, k, v, scale, mask, softcap)
        return y.reshape(batch, heads, 1, head_dim)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if mask is None and window is not None and tokens > window:
        return _attend_in_blocks(q, k, v, scale, window, softcap)
    return _attend(q, k, v, scale, mask, softcap)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _attend(q, k, v, scale, mask, softcap):
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    # Fused attention has no softcap. The scores are in memory here, so some queries go at a time.
    tokens, keys = q.shape[2], k.shape[2]
    if mask is None:
        mask = _additive(torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(), q.dtype)
    mask = mask.expand(*mask.shape[:-2], tokens, keys)
    k_float, v_float, outputs = k.float().mT, v.float(), []
    step = tokens if torch.compiler.is_compiling() else 256
    for i in range(0, tokens, step):
        scores = _capped(q[:, :, i : i + step].float() @ k_float * scale, softcap) + mask[..., i : i + step, :]
        outputs.append((scores.softmax(dim=-1) @ v_float).to(q.dtype))
    return torch.cat(outputs, dim=2)


def _attend_in_blocks(q, k, v, scale, window, softcap):
    """Causal attention to the last `window` keys in O(T * window) time and memory, for T > window; heads are equal.

    Tokens are cut into blocks of `window`: a query sees keys of its own block and the one before only.

        block of queries   |      m      |         allowed where  i < j <= i + window
        its keys       | m - 1 |    m    |         (i counts queries, j the keys of both blocks)
    """
    batch, heads, tokens, head_dim = q.shape
    blocks = -(-tokens // window)
    pad = blocks * window - tokens
    q = F.pad(q, (0, 0, 0, pad)).view(batch, heads, blocks, window, head_dim).transpose(1, 2).flatten(0, 1)
    k, v = (
        F.pad(x, (0, 0, window, pad)).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v)
    )  # [B * blocks, H, 2 * window, D]
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device)
    block = torch.arange(blocks, device=q.device)[:, None, None]
    mask = (i < j) & (j <= i + window) & ((block > 0) | (j >= window))  # [blocks, window, 2 * window]
    y = _attend(q, k, v, scale, _additive(mask, q.dtype)[:, None].repeat(batch, 1, 1, 1), softcap)
    y = y.view(batch, blocks, heads, window, head_dim).transpose(1, 2).flatten(2, 3)
    return y[:, :, :tokens]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_softcap
        self.window = config.window if config.is_local(layer) else None
        heads = config.n_heads + 2 * config.n_kv_heads
        self.wqkv = Linear(config.hidden_size, heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.cache: KVCache | None = None
        self.kv_scales = (1.0, 1.0)  # of K and V in an E4M3 cache
        self.te = None  # TransformerEngine's attention, in a tuple: no module of this one

    def forward(self, x: Tensor, shared: Shared, position: Tensor | None, lengths: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.wqkv(x).view(batch, tokens, -1, self.head_dim)
        qk, v = qkv.split_with_sizes([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, : self.n_heads]), self.k_norm(qk[:, :, self.n_heads :])), dim=2)
        qk, v = rotate(qk, shared.cos, shared.sin).transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, D]
        q, k = qk.split_with_sizes([self.n_heads, self.n_kv_heads], dim=1)

        cache, scale = self.cache, self.scale
        if cache is not None:
            (k, v), scale = cache.rounded(k, v), scale * cache.k_scale
        keys, values = k, v
        if position is not None and tokens > 1:  # behind cached tokens; the ring may drop some that are seen here
            keys = torch.cat((cache.k.to(k.dtype), k), dim=2)
            values = torch.cat((cache.v.to(v.dtype), v), dim=2)
        if cache is not None:
            cache.write(k, v, shared, position, lengths)
        if position is not None and tokens == 1:
            keys, values = cache.k.to(k.dtype), cache.v.to(v.dtype)

        if position is None and prefers_te(self.te, x):  # its factor for the scores is fixed
            (te_attention,) = self.te
            q = q if scale == self.scale else q * (scale / self.scale)
            y = te_attention(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
            y = y.view(batch, tokens, self.n_heads, self.head_dim).transpose(1, 2)
        else:
            y = attention(q, keys, values, scale, shared.mask, self.window, self.softcap)
        if cache is not None and cache.v_scale != 1:
            y = y * cache.v_scale
        return self.wo(y.transpose(1, 2).reshape(batch, tokens, -1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w13 = Linear(config.hidden_size, 2 * config.intermediate_size)  # gate, then up
        self.w2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.gelu(gate, approximate="tanh") * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()

        def norm(present: bool = True):
            return RMSNorm(config.hidden_size, config.norm_eps) if present else None

        self.attention_norm = norm()
        self.attention = Attention(config, layer)
        self.post_attention_norm = norm(config.post_norms)
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(config)
        self.post_feed_forward_norm = norm(config.post_norms)

    def forward(self, x: Tensor, shared: Shared, position: Tensor | None, lengths: Tensor | None) -> Tensor:
        y = self.attention(self.attention_norm(x), shared, position, lengths)
        x = x + (y if self.post_attention_norm is None else self.post_attention_norm(y))
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + (y if self.post_feed_forward_norm is None else self.post_feed_forward_norm(y))


HEAD_SCALES = ("input_scale", "weight_scale")


class Transformer(nn.Module):
    """A Gemma text model. Build it on the meta device and load with assign=True, or use `random`."""

    packed_head: PackedWeight | None = None
    has_kv_scales = False  # whether the layers' kv_scales were calibrated
    kv_scales_problem: str | None = None  # what is wrong with the file that they should have come from
    decoder = None  # `generate`'s, kept from run to run with the KV cache
    te_version: str | None = None  # of TransformerEngine, once a prefill was long enough for it
    te_tried = False  # its import takes seconds: only then

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # The output head, too. Not nn.Embedding(...): on the meta device its initialisation takes a second of imports.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.embedding.scale = None  # of each row [V], if they are in int8
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head_scales: nn.ParameterDict | None = None  # input_scale and weight_scale, if the embedding is in E4M3
        # The reference rounds the factor to the weights' dtype: sqrt(3072) is 55.5 in bfloat16.
        self.embedding_scale = {
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
        fp8: bool = False,
        head: bool = False,
        bits: int | None = None,
        group: int = 32,
    ) -> "Transformer":
        """A model with weights drawn on `device` from N(0, 0.02²), norms zero: for measuring and testing. With `fp8`,
        linear layers, and with `head` the embedding, are in E4M3, inputs scaled for values up to 20. With `bits`, 8 or 4,
        they are integers, evenly distributed with the same deviation, and an embedding has 8 bits."""
        with torch.device("meta"):
            model = cls(config)
            if fp8:
                model.use_fp8(head)
            elif bits:
                model.use_int(group if bits == 4 else 0, head)
        generator = torch.Generator(device).manual_seed(seed)
        weights, weight_scale = {}, 0.1 / 448
        for name, parameter in model.named_parameters():
            if name.endswith(".scale") or not parameter.is_floating_point():
                weights[name] = weight = torch.empty_like(parameter, device=device)
                if parameter.dtype == torch.int32:
                    weight.random_(-(2**31), 2**31, generator=generator)
                elif parameter.dtype == torch.int8:
                    weight.random_(-127, 128, generator=generator)
                elif weight.dim() == 1:  # 255 codes deviate by 73.6
                    weight.fill_(0.02 / 73.6)
                else:  # 16 by 4.61; 7.5 is the middle
                    weight.copy_(torch.tensor([0.02 / 4.61, 7.5]))
                continue
            if name.endswith("_scale"):
                weights[name] = torch.tensor(weight_scale if name.endswith("weight_scale") else 20 / 448, device=device)
                continue
            in_fp8 = parameter.dtype == torch.float8_e4m3fn
            weights[name] = weight = torch.zeros(
                parameter.shape, device=device, dtype=parameter.dtype if in_fp8 else dtype
            )
            if in_fp8:
                for rows in weight.split(4096):
                    values = torch.empty(rows.shape, device=device).normal_(0, 0.02, generator=generator)
                    rows.copy_(round_fp8(values, weight_scale))
            elif weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
        model.load_state_dict(weights, assign=True)
        return model.to(device).requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but FP8 weights: activations, norms, and the KV cache by default."""
        return self.norm.weight.dtype

    def use_fp8(self, head: bool = False):
        """Turns linear layers, and with `head` the embedding, into FP8 ones without contents; on the meta device."""
        self._replace_linears(FP8Linear)
        if head:
            self.embedding.weight = nn.Parameter(self.embedding.weight.to(torch.float8_e4m3fn), False)
            self.head_scales = nn.ParameterDict({k: nn.Parameter(torch.empty(()), False) for k in HEAD_SCALES})

    def use_int(self, group: int = 0, head: bool = False):
        """As `use_fp8`, with weights in int4, in groups of `group`, or, if that is 0, in int8; the embedding in int8."""
        self._replace_linears(partial(IntLinear, group=group))
        if head:
            empty = IntWeight.empty(*self.embedding.weight.shape)
            self.embedding.weight = nn.Parameter(empty.packed, False)
            self.embedding.scale = nn.Parameter(empty.scale, False)

    def _replace_linears(self, new: Callable[[int, int], nn.Module]):
        """By new(in_features, out_features)."""
        for layer in self.layers:
            for parent, names in ((layer.attention, ("wqkv", "wo")), (layer.feed_forward, ("w13", "w2"))):
                for name in names:
                    linear = getattr(parent, name)
                    setattr(parent, name, new(linear.in_features, linear.out_features))

    @property
    def head_weight(self) -> Tensor | IntWeight:
        embedding = self.embedding
        return embedding.weight if embedding.scale is None else IntWeight(embedding.weight, embedding.scale)

    @torch.inference_mode(False)
    @torch.no_grad()
    def use_te(self):
        """Lets long prefills run on TransformerEngine, where it is installed and this is a BF16 or FP8 model on CUDA. What
        it can't do, Gemma 2's softcap without flash-attn, stays on PyTorch."""
        self.te_tried = True
        te = import_te() if self.device.type == "cuda" and self.dtype == torch.bfloat16 else None
        if te is None:
            return
        for module in self.modules():
            if isinstance(module, (Linear, FP8Linear)):
                module.te = TELinear(module)
            elif isinstance(module, Attention) and module.softcap is None:
                te_attention = te.DotProductAttention(
                    module.n_heads,
                    module.head_dim,
                    num_gqa_groups=module.n_kv_heads,
                    attention_dropout=0.0,
                    qkv_format="bshd",
                    attn_mask_type="causal",
                    window_size=(-1, 0) if module.window is None else (module.window - 1, 0),  # to the left, inclusive
                    softmax_scale=module.scale,
                )
                module.te = (te_attention.eval(),)
        self.te_version = importlib.import_module("transformer_engine").__version__

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    def pack(self):
        """Prepares eager runs on a CPU, where oneDNN has bfloat16; does nothing elsewhere, nor for weights that are
        packed already. Takes the weights' bytes once more; a mapped file's own pages can then leave memory."""
        if self.device.type != "cpu" or self.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
            return
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return
        for module in self.modules():
            if isinstance(module, Linear):
                module.packed = PackedWeight.of(module.weight, module.packed)
        if self.embedding.weight.dtype == self.dtype:
            self.packed_head = PackedWeight.of(self.embedding.weight, self.packed_head)

    def cache_bytes(self, batch_size: int, length: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the KV cache that `setup_caches` allocates for the same arguments."""
        slots = sum(self._slots(layer, length) for layer in range(self.config.n_layers))
        return 2 * batch_size * slots * self.config.n_kv_heads * self.config.head_dim * (dtype or self.dtype).itemsize

    def new_caches(self, batch_size: int, length: int, dtype: torch.dtype | None = None) -> list[KVCache]:
        """KV caches for batch_size rows of at most `length` tokens, in `dtype` (None: the weights'), one a layer."""
        config, dtype, caches = self.config, dtype or self.dtype, []
        with torch.inference_mode(False):  # usable in and out of that mode, whoever asked first
            for index, layer in enumerate(self.layers):
                slots = self._slots(index, length)
                cache = KVCache(batch_size, config.n_kv_heads, slots, config.head_dim, dtype, self.device)
                if dtype == torch.float8_e4m3fn:  # E5M2 has the range to do without
                    cache.k_scale, cache.v_scale = layer.attention.kv_scales
                caches.append(cache)
        return caches

    def attach_caches(self, caches: list[KVCache | None]):
        for layer, cache in zip(self.layers, caches):
            layer.attention.cache = cache

    def setup_caches(self, batch_size: int, length: int, dtype: torch.dtype | None = None):
        """Gives every layer a cache of `new_caches`. Caches of these very sizes are kept: what they hold from an earlier
        run is never seen by a later one."""
        held = self.layers[0].attention.cache, self.layers[-1].attention.cache
        wanted = [(batch_size, self._slots(i, length), dtype or self.dtype) for i in (0, self.config.n_layers - 1)]
        if None in held or [(len(cache.k), cache.slots, cache.dtype) for cache in held] != wanted:
            self.attach_caches([None] * self.config.n_layers)  # freed first
            self.attach_caches(self.new_caches(batch_size, length, dtype))

    def _slots(self, layer: int, length: int) -> int:
        return min(self.config.window, length) if self.config.is_local(layer) else length

    def forward(
        self,
        tokens: Tensor,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Logits in float32 for tokens [B, T]: [B, V] for each row's last token, or [B, T, V] with all_logits.

        position [B] is the number of tokens that each row has in the KV cache already; None says that the cache is
        empty or, before `setup_caches`, that there is none. lengths [B] is the number of valid tokens a row, the rest
        being padding on the right; None means T everywhere. Row and cache limits are the caller's to keep.
        """
        config = self.config
        if tokens.is_cuda and not self.te_tried and tokens.shape[1] > 1 and tokens.numel() >= TE_TOKENS:
            self.use_te()
        scale = self.embedding.scale if self.head_scales is None else self.head_scales["weight_scale"]
        x = kernels.embed_reference(tokens, self.embedding.weight, self.embedding_scale[self.dtype], self.dtype, scale)

        query = torch.arange(tokens.shape[1], device=tokens.device)[None, :]  # [1 or B, T], positions
        if position is not None:
            query = query + position[:, None]
        kinds = {
            local: self._shared(local, query, position) for local in {*map(config.is_local, range(config.n_layers))}
        }
        for index, layer in enumerate(self.layers):
            x = layer(x, kinds[config.is_local(index)], position, lengths)

        if not all_logits:
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            x = x[:, -1] if lengths is None else x[rows, lengths - 1]
        x = self.norm(x)
        if self.embedding.scale is not None:
            logits = int_linear(x, self.head_weight).float()
        elif self.head_scales is None:
            logits = linear(x, self.embedding.weight, self.packed_head).float()
        else:
            scales = self.head_scales
            logits = fp8_linear(x, self.embedding.weight, scales["input_scale"], scales["weight_scale"]).float()
        if config.logit_softcap is not None:
            logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
        return logits

    def decode(self, tokens: Tensor, position: Tensor) -> Tensor:
        """`forward` for one token [B] a row, behind those in the KV cache, by kernels.py: logits [B, V] in the weights'
        dtype (float32 with a softcap), which differ from forward's by the order in which sums are made."""

        def attend(layer: Attention, qkv: Tensor, rope: Tensor, *norms) -> Tensor:
            cache, input_scale = layer.cache, layer.wo.input_scale
            options = layer.scale, layer.softcap, input_scale, cache.k_scale, cache.v_scale
            caches = cache.k, cache.v, layer.n_heads, self.dtype
            return kernels.decode_attention(qkv, rope, position, *caches, *options, *norms)

        return self._by_kernels(tokens, position, attend)

    def prefill(self, tokens: Tensor, position: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """`forward` for the logits of each row's last token, as `decode` makes them: by kernels.py and PyTorch's fused
        attention, where the KV cache is empty. H200, gemma-7b, 8 times 2,048 tokens: 414 ms in BF16, 254 in FP8; forward
        takes 560 and 519, on TransformerEngine 616 and 466."""
        if position is not None:
            return self.forward(tokens, position, lengths)
        batch, count = tokens.shape
        if lengths is None:
            lengths = torch.full((batch,), count, device=tokens.device)

        def attend(layer: Attention, qkv: Tensor, rope: Tensor, *norms) -> Tensor:
            cache = layer.cache
            caches = cache.k, cache.v, layer.n_heads, self.dtype, cache.k_scale, cache.v_scale
            q, k, v = kernels.prefill_rope(qkv, rope, lengths, *caches, *norms)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            y = attention(q, k, v, layer.scale * cache.k_scale, None, layer.window, layer.softcap)
            return kernels.rescale(y.transpose(1, 2).reshape(batch * count, -1), cache.v_scale, layer.wo.input_scale)

        last = torch.arange(0, batch * count, count, device=tokens.device) + lengths - 1
        return self._by_kernels(tokens.flatten(), torch.arange(count, device=tokens.device), attend, last)

    def _by_kernels(self, tokens: Tensor, positions: Tensor, attend: Callable, rows: Tensor | None = None) -> Tensor:
        """Logits for tokens [M], or for `rows` of them only. attend(a layer's Attention, its qkv, the rotations of
        `positions`, the weights of its norms, epsilon) makes wo's input."""
        config, dtype, eps = self.config, self.dtype, self.config.norm_eps
        head = (None, None) if self.head_scales is None else tuple(self.head_scales[kind] for kind in HEAD_SCALES)
        local = any(map(config.is_local, range(config.n_layers)))
        rope = kernels.rope(positions, self.rope_frequency, *[self.rope_frequency_local] * local)
        scale = head[1] if self.embedding.scale is None else self.embedding.scale
        x = kernels.embed(tokens, self.embedding.weight, self.embedding_scale[dtype], dtype, scale)
        y = post_weight = None  # the newest layer's output, and the norm that it gets before x takes it in
        for index, layer in enumerate(self.layers):
            attention, feed_forward = layer.attention, layer.feed_forward
            x, h = kernels.add_norm(x, y, post_weight, layer.attention_norm.weight, eps, attention.wqkv.input_scale)
            qkv = kernels.linear_rows(h, *operands(attention.wqkv), dtype, partials=True)
            norms = (norm and norm.weight for norm in (attention.q_norm, attention.k_norm))
            y = attend(attention, qkv, rope[int(config.is_local(index))], *norms, eps)
            y = kernels.linear_rows(y, *operands(attention.wo), dtype, partials=True)
            post_weight = layer.post_attention_norm and layer.post_attention_norm.weight
            w13, w2 = feed_forward.w13, feed_forward.w2
            x, h = kernels.add_norm(x, y, post_weight, layer.feed_forward_norm.weight, eps, w13.input_scale)
            h = kernels.linear_geglu(h, *operands(w13), dtype, w2.input_scale)
            y = kernels.linear_rows(h, *operands(w2), dtype, partials=True)
            post_weight = layer.post_feed_forward_norm and layer.post_feed_forward_norm.weight
        if rows is not None:
            x, y = x[rows], y[..., rows, :]
        _, h = kernels.add_norm(x, y, post_weight, self.norm.weight, eps, head[0])
        logits = kernels.linear_rows(h, self.head_weight, *head, dtype)
        if config.logit_softcap is not None:
            logits = config.logit_softcap * torch.tanh(logits.float() / config.logit_softcap)
        return logits

    def _shared(self, local: bool, query: Tensor, position: Tensor | None) -> Shared:
        frequency = self.rope_frequency_local if local else self.rope_frequency
        angle = query.float()[:, :, None, None] * frequency  # [1 or B, T, 1, D]
        mask = slot = None
        if position is not None:
            layer = next(i for i in range(self.config.n_layers) if self.config.is_local(i) == local)
            cache = self.layers[layer].attention.cache
            if query.shape[1] == 1:  # the token itself is in the cache by then; a ring holds nothing out of the window
                mask = (torch.arange(cache.slots, device=query.device) <= query)[:, None, None, :]
                slot = (torch.arange(len(position), device=query.device), slice(None), position % cache.slots)
            else:
                held = cache.held_positions(position)  # [B, S]
                key = torch.cat((held, query), dim=1)[:, None, :]  # [B, 1, S + T]
                mask = (key >= 0) & (key <= query[:, :, None])
                if local:
                    mask &= key > query[:, :, None] - self.config.window
                mask = mask[:, None]
            mask = _additive(mask, self.dtype)
        return Shared(angle.cos(), angle.sin(), mask, slot)
