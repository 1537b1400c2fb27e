"""What distinguishes one Gemma from another, as data: sizes, norms, windows, caps and angles."""

from dataclasses import dataclass, fields, replace
from reprlib import repr as shown  # cut, where it is long

MAX_LAYERS, MAX_SIZE, MAX_STOP_IDS = 1000, 2**31 - 1, 16  # sizes and positions are int32 on the device
PAGE = 64  # tokens of a page of the KV cache


@dataclass(frozen=True)
class ModelConfig:
    """The settings of one model. Sizes are counts; the bases of RoPE's angles have no unit.

    Everything that makes layers differ is a field, so that no code asks which generation a model is of.
    """

    generation: int  # 1, 2 or 3; CodeGemma is 1. It names the model in messages and files, and decides nothing.
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int  # a field of its own: n_heads * head_dim is not hidden_size in most Gemmas
    vocab_size: int
    context_length: int
    query_pre_attn_scalar: float  # attention scores are multiplied by this ** -0.5
    post_norms: bool = False  # whether the outputs of attention and feed-forward get a norm of their own (Gemma 2, 3)
    qk_norm: bool = False  # whether each head's query and key get a norm (Gemma 3)
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
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(self.stop_ids)} stop ids are given; at most {MAX_STOP_IDS} can be")

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
            post_norms=generation >= 2,
            qk_norm=generation >= 3,
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
        what it found, for another architecture, a value that its field can't have, or a setting that this file does not
        implement.
        """
        model_type = config.get("model_type")
        tied = config.get("tie_word_embeddings", True)
        stop_ids = stop_ids_of(config)
        if model_type == "gemma3":
            config = config.get("text_config")
            if not isinstance(config, dict) or config.get("model_type", "gemma3_text") != "gemma3_text":
                raise ValueError("model_type is gemma3, but there is no text_config of gemma3_text")
            tied = config.get("tie_word_embeddings", True) if tied is True else tied
            inner = stop_ids_of(config)  # checked, whether it counts or not
            stop_ids = stop_ids or inner
        elif model_type not in ("gemma", "gemma2", "gemma3_text"):
            known = str(model_type).startswith(("gemma", "recurrent_gemma", "paligemma", "t5gemma"))
            what = (
                f"another generation or kind of Gemma ({model_type})" if known else f"architecture {shown(model_type)}"
            )
            raise ValueError(f"{what} is not supported; this program runs gemma, gemma2, gemma3_text and gemma3")
        generation = {"gemma": 1, "gemma2": 2}.get(model_type, 3)
        if tied is not True:
            raise ValueError(
                f"tie_word_embeddings must be true, not {shown(tied)}: Gemma's output head is its embedding"
            )
        if config.get("use_bidirectional_attention") not in (None, False):
            raise ValueError("use_bidirectional_attention is set: an embedding model, which cannot generate text")
        config = _HF_DEFAULTS_OF_ALL | _HF_DEFAULTS[generation] | config
        activation = config.get("hidden_activation")
        activation = config.get("hidden_act") if activation is None else activation
        if activation not in (None, "gelu", "gelu_pytorch_tanh"):  # the first Gemma configs said gelu and meant tanh
            raise ValueError(f"activation {shown(activation)} is not supported; Gemma uses gelu_pytorch_tanh")

        layers = _integer(config, "num_hidden_layers", MAX_LAYERS)
        head_dim = _integer(config, "head_dim")
        local_layers = _local_layers(config, generation, layers)
        (theta, scale), (theta_local, scale_local) = _rope_settings(config, generation)

        def softcap(key: str) -> float | None:
            return None if config.get(key) is None else _number(config, key)

        return cls(
            generation=generation,
            n_layers=layers,
            hidden_size=_integer(config, "hidden_size"),
            intermediate_size=_integer(config, "intermediate_size"),
            n_heads=_integer(config, "num_attention_heads"),
            n_kv_heads=_integer(config, "num_key_value_heads"),
            head_dim=head_dim,
            vocab_size=_integer(config, "vocab_size"),
            context_length=_integer(config, "max_position_embeddings"),
            query_pre_attn_scalar=head_dim if generation == 1 else _number(config, "query_pre_attn_scalar"),
            post_norms=generation >= 2,
            qk_norm=generation >= 3,
            window=_integer(config, "sliding_window") if any(local_layers) else None,
            local_layers=local_layers,
            attn_softcap=softcap("attn_logit_softcapping") if generation == 2 else None,
            logit_softcap=softcap("final_logit_softcapping") if generation > 1 else None,
            rope_theta=theta,
            rope_scale=scale,
            rope_theta_local=theta_local,
            rope_scale_local=scale_local,
            norm_eps=_number(config, "rms_norm_eps"),
            stop_ids=stop_ids or (1,),
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
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
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
        "rope_theta": 1e6,
    },
}
_HF_DEFAULTS_OF_ALL = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_local_base_freq": 1e4}


def _integer(config: dict, key: str, most: int = MAX_SIZE) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= most:  # True is an int, too
        raise ValueError(f"{key} must be a whole number from 1 to {most:,}, not {shown(value)}")
    return value


def _number(config: dict, key: str) -> float:
    value = config.get(key)
    if type(value) not in (int, float) or not 1e-38 < value < 1e38:  # what float32 has
        raise ValueError(f"{key} must be a positive number, not {shown(value)}")
    return value


def object_of(config: dict, key: str) -> dict:
    """An empty one for null, too."""
    value = {} if config.get(key) is None else config[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object or null, not {shown(value)}")
    return value


def stop_ids_of(config: dict) -> tuple[int, ...]:
    """eos_token_id of config.json or generation_config.json, which may be a list; () if there is none. Raises
    ValueError for what is no token id."""
    value = config.get("eos_token_id")
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if value == [] or not all(type(token) is int and 0 <= token <= MAX_SIZE for token in ids):
        raise ValueError(f"eos_token_id must be a token id, or a list of them, not {shown(value)}")
    return ids


def _local_layers(config: dict, generation: int, n_layers: int) -> tuple[bool, ...]:
    kinds = config.get("layer_types")
    if generation == 1 or kinds is None:
        every = None if config.get("sliding_window_pattern") is None else _integer(config, "sliding_window_pattern")
        return _layer_pattern(generation, n_layers, every)
    if not isinstance(kinds, list) or not kinds:
        raise ValueError(f"layer_types must be a list of {n_layers}, not {shown(kinds)}")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"layer type {shown(kind)} is not supported")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _layer_pattern(generation: int, n_layers: int, global_every: int | None = None) -> tuple[bool, ...]:
    """Which layers are local: none in Gemma 1, all but every second in Gemma 2, all but every sixth in Gemma 3."""
    if generation == 1:
        return ()
    global_every = global_every or (2 if generation == 2 else 6)
    return tuple((layer + 1) % global_every != 0 for layer in range(n_layers))


def _rope_settings(config: dict, generation: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(theta, scale) of global and of local layers, from rope_parameters or from the older separate keys."""
    parameters = object_of(config, "rope_parameters")
    if "full_attention" in parameters or "sliding_attention" in parameters:
        kinds = [object_of(parameters, "full_attention"), object_of(parameters, "sliding_attention")]
    else:
        kinds = [parameters | object_of(config, "rope_scaling"), {}]
    settings = []
    for kind, key in zip(kinds, ("rope_theta", "rope_local_base_freq")):
        rope_type = kind.get("rope_type", kind.get("type", "default"))
        if rope_type not in ("default", "linear"):
            raise ValueError(f"RoPE type {shown(rope_type)} is not supported; Gemma 1 to 3 use default and linear")
        theta = _number(kind, "rope_theta") if "rope_theta" in kind else _number(config, key)
        settings.append((float(theta), float(_number(kind, "factor")) if rope_type == "linear" else 1.0))
    return settings[0], settings[1] if generation == 3 else settings[0]
