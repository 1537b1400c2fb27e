"""What distinguishes one Gemma from another, as data: sizes, norms, windows, caps and angles."""

from dataclasses import dataclass, fields, replace
from reprlib import repr as shown  # cut, where it is long

from parallel import Shard

MAX_LAYERS, MAX_SIZE, MAX_STOP_IDS = 1000, 2**31 - 1, 16  # sizes and positions are int32 on the device
PAGE = 64  # tokens of a page of the KV cache


@dataclass(frozen=True)
class ModelConfig:
    """The settings of one model. Sizes are counts; the bases of RoPE's angles have no unit.

    Everything that makes layers differ is a field, so that no code asks which generation a model is of.
    """

    generation: int  # 1 to 4; CodeGemma is 1. It names the model in messages and files, and decides nothing.
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
    rotated_share: float = 1.0  # of a global layer's pairs; the others have an angle of 0
    norm_eps: float = 1e-6
    norm_offset: float = 1.0  # norms multiply by this plus their weight
    v_norm: bool = False  # whether values get a norm, which has no weight (Gemma 4, as what follows)
    layer_scalar: bool = False  # whether what leaves a layer is multiplied by a number of the layer's
    global_head_dim: int | None = None  # of global layers, where it is another than that of local ones
    n_global_kv_heads: int | None = None
    k_eq_v: bool = False  # whether global layers make values of the product that keys are made of
    n_shared_layers: int = 0  # so many last layers attend to what the last of their kind before them has in the cache
    shared_intermediate_size: int | None = None  # of those layers, where it is another
    n_experts: int = 0  # beside each layer's feed-forward
    n_active_experts: int = 0  # of them for a token
    expert_size: int = 0  # an expert's intermediate_size
    per_layer_size: int = 0  # of the embeddings that each layer has of its own (PLE)
    per_layer_vocab_size: int = 0
    backbone_size: int | None = None  # of drafters: hidden_size of the model whose keys and values all layers attend to
    n_centroids: int = 0  # of drafters: groups of tokens, of which those of the nearest few are candidates
    n_active_centroids: int = 0
    stop_ids: tuple[int, ...] = (1,)
    suppressed_ids: tuple[int, ...] = ()  # never drawn
    shard: Shard | None = None  # which part of the model this is, where ranks share one

    def __post_init__(self):
        if len(self.local_layers) not in (0, self.n_layers):
            raise ValueError(f"{len(self.local_layers)} layer types are given for {self.n_layers} layers")
        if any(self.local_layers) and not self.window:
            raise ValueError("local layers need a sliding_window")
        for layer in range(self.n_layers):
            if self.n_heads % self.kv_heads_of(layer):
                heads = f"{self.n_heads} query heads cannot share {self.kv_heads_of(layer)} key/value heads"
                raise ValueError(f"{heads} evenly")
            if self.head_dim_of(layer) % 2:
                raise ValueError(f"head_dim {self.head_dim_of(layer)} is odd; rotary embedding needs pairs")
            if self.donor_of(layer) is None and not self.backbone_size:
                kind = "sliding" if self.is_local(layer) else "full"
                raise ValueError(f"no layer before the last {self.n_shared_layers} has keys for layer {layer} ({kind})")
        if self.n_active_experts > self.n_experts:
            raise ValueError(f"top_k_experts is {self.n_active_experts}, and there are {self.n_experts} experts")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(self.stop_ids)} stop ids are given; at most {MAX_STOP_IDS} can be")

    def is_local(self, layer: int) -> bool:
        return bool(self.local_layers) and self.local_layers[layer]

    def head_dim_of(self, layer: int) -> int:
        return self.head_dim if self.is_local(layer) else self.global_head_dim or self.head_dim

    def kv_heads_of(self, layer: int) -> int:
        return self.n_kv_heads if self.is_local(layer) else self.n_global_kv_heads or self.n_kv_heads

    @property
    def global_group(self) -> tuple[int, int]:
        """Query heads on a key head of global layers, and their head_dim."""
        layer = next((i for i in range(self.n_layers) if not self.is_local(i)), 0)
        return self.n_heads // self.kv_heads_of(layer), self.head_dim_of(layer)

    def is_shared(self, layer: int) -> bool:
        """Whether a layer has no keys and values of its own."""
        return layer >= self.n_layers - self.n_shared_layers

    def donor_of(self, layer: int) -> int | None:
        """The layer whose keys and values it attends to: itself or, for one that has none, the last of its kind that
        has; None if there is no such layer."""
        if not self.is_shared(layer):
            return layer
        own = range(self.n_layers - self.n_shared_layers - 1, -1, -1)
        return next((each for each in own if self.is_local(each) == self.is_local(layer)), None)

    def kv_products_of(self, layer: int) -> int:
        """How many products of the normed stream its keys and values are made of: 2, 1 where they are the same, 0."""
        return 0 if self.is_shared(layer) else 1 if self.k_eq_v and not self.is_local(layer) else 2

    def keys_of_values(self, layer: int) -> bool:
        """Whether the cache of a layer keeps values alone, since its keys are those, weighted and rotated. Not where
        other layers attend to them, too, which don't have the weights."""
        made_of_one = self.kv_products_of(layer) == 1 and self.qk_norm and self.v_norm
        return made_of_one and not self.n_shared_layers

    @property
    def rotated_pairs(self) -> int:
        """Of a global layer's head."""
        return int(self.rotated_share * self.global_group[1] // 2)

    def intermediate_size_of(self, layer: int) -> int:
        return (
            self.shared_intermediate_size or self.intermediate_size if self.is_shared(layer) else self.intermediate_size
        )

    def vocabulary(self, size: int) -> tuple[int, int]:
        """[first, end) of the `size` rows of an embedding that are here."""
        return (0, size) if self.shard is None else self.shard.vocabulary(size)

    def sharded(self, shard: Shard) -> "ModelConfig":
        """The settings of a part of the model: heads and the sizes of feed-forwards are those of the part. Raises
        ValueError for what can't be shared among so many ranks."""

        def share(size: int | None, what: str) -> int | None:
            return size and shard.share(size, what)[1] - shard.share(size, what)[0]

        def kv_share(heads: int | None) -> int | None:
            return heads and shard.kv_heads(heads)[1] - shard.kv_heads(heads)[0]

        for size in (self.vocab_size, self.per_layer_vocab_size):
            _ = size and shard.vocabulary(size)
        return replace(
            self,
            n_heads=share(self.n_heads, "query heads"),
            n_kv_heads=kv_share(self.n_kv_heads),
            n_global_kv_heads=kv_share(self.n_global_kv_heads),
            intermediate_size=share(self.intermediate_size, "columns of a feed-forward"),
            shared_intermediate_size=share(self.shared_intermediate_size, "columns of a feed-forward"),
            expert_size=share(self.expert_size, "columns of an expert"),
            shard=shard,
        )

    @classmethod
    def from_name(cls, name: str) -> "ModelConfig":
        """The published sizes of `name`, for runs with random weights. Raises ValueError for an unknown name."""
        if name not in NAMED_CONFIGS:
            raise ValueError(f"no built-in configuration '{name}'; there are: {', '.join(NAMED_CONFIGS)}")
        if len(NAMED_CONFIGS[name]) == len(_GEMMA_4_KEYS):
            return cls.from_hf(_gemma_4(*NAMED_CONFIGS[name]))
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
        """Reads a Hugging Face config.json of a model type of GENERATIONS or MULTIMODAL, of the latter the text part.

        Fields that multimodal checkpoints leave out take Hugging Face's defaults. Raises ValueError, naming what it
        found, for another architecture, a value that its field can't have, or a setting that this file does not
        implement.
        """
        model_type = config.get("model_type")
        tied = config.get("tie_word_embeddings", True)
        stop_ids = stop_ids_of(config)
        named = isinstance(model_type, str)
        text_type = MULTIMODAL.get(model_type) if named else None
        if text_type:
            config = config.get("text_config")
            if not isinstance(config, dict) or config.get("model_type", text_type) != text_type:
                raise ValueError(f"model_type is {model_type}, but there is no text_config of {text_type}")
            tied = config.get("tie_word_embeddings", True) if tied is True else tied
            inner = stop_ids_of(config)  # checked, whether it counts or not
            stop_ids = stop_ids or inner
        elif not named or model_type not in GENERATIONS:
            known = named and "gemma" in model_type
            what = (
                f"another generation or kind of Gemma ({model_type})" if known else f"architecture {shown(model_type)}"
            )
            raise ValueError(f"{what} is not supported; this program runs {', '.join((*GENERATIONS, *MULTIMODAL))}")
        model_type = text_type or model_type
        generation = GENERATIONS[model_type]
        if tied is not True:
            raise ValueError(
                f"tie_word_embeddings must be true, not {shown(tied)}: Gemma's output head is its embedding"
            )
        if config.get("use_bidirectional_attention") not in (None, False, *["vision"] * (generation == 4)):
            raise ValueError("use_bidirectional_attention is set: an embedding model, which cannot generate text")
        config = _HF_DEFAULTS_OF_ALL | _HF_DEFAULTS[generation] | _HF_DEFAULTS_OF_TYPE.get(model_type, {}) | config
        activation = config.get("hidden_activation")
        activation = config.get("hidden_act") if activation is None else activation
        if activation not in (None, "gelu", "gelu_pytorch_tanh"):  # the first Gemma configs said gelu and meant tanh
            raise ValueError(f"activation {shown(activation)} is not supported; Gemma uses gelu_pytorch_tanh")

        layers = _integer(config, "num_hidden_layers", MAX_LAYERS)
        head_dim = _integer(config, "head_dim")
        local_layers = _local_layers(config, generation, layers)
        (theta, scale, share), (theta_local, scale_local, _) = _rope_settings(config, generation)

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
            rotated_share=share,
            norm_eps=_number(config, "rms_norm_eps"),
            stop_ids=stop_ids or (1,),
            **(_gemma_4_settings(config, local_layers) if generation == 4 else {}),
        )

    @classmethod
    def of_assistant(cls, config: dict) -> "ModelConfig":
        """Reads the config.json of a drafter, whose model type is one of ASSISTANTS. Raises ValueError as `from_hf`
        does, and for layers with keys, experts or embeddings of their own."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ASSISTANTS:
            raise ValueError(f"model_type is {shown(model_type)}; that of a drafter is {' or '.join(ASSISTANTS)}")
        text_type, backbone = ASSISTANTS[model_type]
        if config.get("tie_word_embeddings", True) is not True:
            raise ValueError(f"tie_word_embeddings must be true, not {shown(config['tie_word_embeddings'])}")
        config = {"backbone_hidden_size": backbone, "num_centroids": 2048, "centroid_intermediate_top_k": 32} | config
        text = {"model_type": text_type} | object_of(config, "text_config")
        model = cls.from_hf(text | {"num_kv_shared_layers": 0})
        shared = text.get("num_kv_shared_layers") or model.n_layers
        if shared != model.n_layers:
            raise ValueError(f"num_kv_shared_layers is {shown(shared)}; no layer of a drafter has keys of its own")
        if model.n_experts or model.per_layer_size:
            key = "enable_moe_block" if model.n_experts else "hidden_size_per_layer_input"
            raise ValueError(f"{key} is set; no drafter has experts or embeddings of each layer's own")
        settings = {"n_shared_layers": shared, "backbone_size": _integer(config, "backbone_hidden_size")}
        if _flag(config, "use_ordered_embeddings"):
            settings["n_centroids"] = count = _integer(config, "num_centroids", model.vocab_size)
            settings["n_active_centroids"] = _integer(config, "centroid_intermediate_top_k", count)
            if model.vocab_size % count:
                raise ValueError(f"num_centroids is {count}, which doesn't divide the vocabulary of {model.vocab_size}")
        return replace(model, **settings)

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
    # _GEMMA_4_KEYS
    "gemma-4-E2B": (35, 5, 1536, 6144, 8, 1, 1, 512, False, 256, 20, True, 0, 0, 0, 131072),
    "gemma-4-E4B": (42, 6, 2560, 10240, 8, 2, 2, 512, False, 256, 18, False, 0, 0, 0, 131072),
    "gemma-4-12B": (48, 6, 3840, 15360, 16, 8, 1, 1024, True, 0, 0, False, 0, 0, 0, 262144),
    "gemma-4-26B-A4B": (30, 6, 2816, 2112, 16, 8, 2, 1024, True, 0, 0, False, 128, 8, 704, 262144),
    "gemma-4-31B": (60, 6, 5376, 21504, 32, 16, 4, 1024, True, 0, 0, False, 0, 0, 0, 262144),
}
_GEMMA_4_KEYS = (
    "num_hidden_layers",
    "every such layer is global",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_global_key_value_heads",
    "sliding_window",
    "attention_k_eq_v",
    "hidden_size_per_layer_input",
    "num_kv_shared_layers",
    "use_double_wide_mlp",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "max_position_embeddings",
)
# What text models of a generation say that they are, and what multimodal ones do, with their text part's type
GENERATIONS = {"gemma": 1, "gemma2": 2, "gemma3_text": 3, "gemma4_text": 4, "gemma4_unified_text": 4}
MULTIMODAL = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
# Drafters: their text part's type, and what backbone_hidden_size is where it is missing
ASSISTANTS = {
    "gemma4_assistant": ("gemma4_text", 1536),
    "gemma4_unified_assistant": ("gemma4_unified_text", 3840),
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
    4: {
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size_per_layer_input": 262144,
        "query_pre_attn_scalar": 1.0,  # which no Gemma 4 has: scores are not scaled
    },
}
_HF_DEFAULTS_OF_TYPE = {
    "gemma4_text": {
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
    },
    "gemma4_unified_text": {
        "max_position_embeddings": 262144,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
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
    return token_ids_of(config, "eos_token_id")


def token_ids_of(config: dict, key: str) -> tuple[int, ...]:
    """The token ids, or the only one, that `key` has; () for null. Raises ValueError for what is none."""
    value = config.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if value == [] or not all(type(token) is int and 0 <= token <= MAX_SIZE for token in ids):
        raise ValueError(f"{key} must be a token id, or a list of them, not {shown(value)}")
    return ids


def _local_layers(config: dict, generation: int, n_layers: int) -> tuple[bool, ...]:
    kinds = config.get("layer_types")
    if generation == 1 or kinds is None:
        every = None if config.get("sliding_window_pattern") is None else _integer(config, "sliding_window_pattern")
        pattern = _layer_pattern(generation, n_layers, every)
        return (*pattern[:-1], False) if generation == 4 else pattern
    if not isinstance(kinds, list) or not kinds:
        raise ValueError(f"layer_types must be a list of {n_layers}, not {shown(kinds)}")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"layer type {shown(kind)} is not supported")
    local = tuple(kind == "sliding_attention" for kind in kinds)
    return (*local[:-1], False) if generation == 4 else local


def _layer_pattern(generation: int, n_layers: int, global_every: int | None = None) -> tuple[bool, ...]:
    """Which layers are local: none in Gemma 1, all but every second in Gemma 2, all but every sixth in Gemma 3 and
    4."""
    if generation == 1:
        return ()
    global_every = global_every or (2 if generation == 2 else 6)
    return tuple((layer + 1) % global_every != 0 for layer in range(n_layers))


def _rope_settings(config: dict, generation: int) -> list[tuple[float, float, float]]:
    """(theta, scale, share of the pairs that are rotated) of global and of local layers, from rope_parameters or from
    the older separate keys."""
    parameters = object_of(config, "rope_parameters")
    if "full_attention" in parameters or "sliding_attention" in parameters:
        kinds = [object_of(parameters, "full_attention"), object_of(parameters, "sliding_attention")]
    elif generation == 4:
        kinds = [{"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}, {"rope_theta": 1e4}]
    else:
        kinds = [parameters | object_of(config, "rope_scaling"), {}]
    settings, known = [], ["default", "linear"] if generation < 4 else ["default", "proportional"]
    for kind, key in zip(kinds, ("rope_theta", "rope_local_base_freq")):
        rope_type = kind.get("rope_type", kind.get("type", "default"))
        if rope_type not in known:
            which = "1 to 3 use" if generation < 4 else "4 uses"
            raise ValueError(f"RoPE type {shown(rope_type)} is not supported; Gemma {which} {' and '.join(known)}")
        theta = _number(kind, "rope_theta") if "rope_theta" in kind else _number(config, key)
        scale = _number(kind, "factor") if rope_type == "linear" or kind.get("factor") is not None else 1.0
        share = _number(kind, "partial_rotary_factor") if rope_type == "proportional" else 1.0
        if share > 1:
            raise ValueError(f"partial_rotary_factor must be at most 1, not {shown(share)}")
        settings.append((float(theta), float(scale), float(share)))
    return settings if generation >= 3 else [settings[0]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Gemma 4


def _gemma_4(*values) -> dict:
    """The config.json of a published size."""
    config = dict(zip(_GEMMA_4_KEYS, values, strict=True))
    every, layers = config.pop(_GEMMA_4_KEYS[1]), config["num_hidden_layers"]
    kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    return config | {
        "model_type": "gemma4_text",
        "layer_types": kinds,
        "enable_moe_block": config["num_experts"] > 0,
        "final_logit_softcapping": 30.0,
        "eos_token_id": [1, 106, 50],
    }


def _gemma_4_settings(config: dict, local_layers: tuple[bool, ...]) -> dict:
    """The fields that no model before Gemma 4 has."""
    settings = {"norm_offset": 0.0, "v_norm": True, "layer_scalar": True, "k_eq_v": _flag(config, "attention_k_eq_v")}
    settings |= _global_heads(config, local_layers, settings["k_eq_v"])
    settings["n_shared_layers"] = shared = _count(config, "num_kv_shared_layers")
    if _flag(config, "use_double_wide_mlp") and shared:
        settings["shared_intermediate_size"] = 2 * _integer(config, "intermediate_size")
    if _flag(config, "enable_moe_block"):
        settings["n_experts"] = _integer(config, "num_experts")
        settings["n_active_experts"] = _integer(config, "top_k_experts")
        settings["expert_size"] = _integer(config, "moe_intermediate_size")
    if width := _count(config, "hidden_size_per_layer_input"):
        settings |= {"per_layer_size": width, "per_layer_vocab_size": _integer(config, "vocab_size_per_layer_input")}
    if _flag(config, "attention_bias"):
        raise ValueError("attention_bias is set; no Gemma 4 has biases, and this program has none")
    return settings


def _global_heads(config: dict, local_layers: tuple[bool, ...], k_eq_v: bool) -> dict:
    """Head size and key/value heads of global layers: from keys of their own or, as newer files have them, from what
    per_layer_config says of each, by its number, which may be padded with zeros."""
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    defaults = {"head_dim": _integer(config, "global_head_dim")}
    defaults["num_key_value_heads"] = _integer(config, "num_key_value_heads")
    if k_eq_v and config.get(names["num_key_value_heads"]) is not None:
        defaults["num_key_value_heads"] = _integer(config, names["num_key_value_heads"])
    layers, found = object_of(config, "per_layer_config"), {}
    layers = {key.lstrip("0") or "0": value for key, value in layers.items()}
    for layer, local in enumerate(local_layers):
        own = object_of(layers, str(layer))
        if unknown := own.keys() - names.keys():
            raise ValueError(f"per_layer_config of layer {layer} has {', '.join(sorted(unknown))}, which is unknown")
        usual = {name: config[name] for name in names} if local or own else defaults
        heads = {name: _integer(own if name in own else usual, name) for name in names}
        if found.setdefault(local, heads) != heads:
            raise ValueError(f"per_layer_config of layer {layer} differs from that of other layers of its kind")
    of_local = {name: config[name] for name in names}
    if found.get(True, of_local) != of_local:
        raise ValueError("per_layer_config is of global layers only; it names a local one")
    heads = found.get(False, defaults)
    return {"global_head_dim": heads["head_dim"], "n_global_kv_heads": heads["num_key_value_heads"]}


def _flag(config: dict, key: str) -> bool:
    value = config.get(key)
    if value not in (None, True, False):
        raise ValueError(f"{key} must be true or false, not {shown(value)}")
    return bool(value)


def _count(config: dict, key: str) -> int:
    """0 for null, too."""
    return _integer(config, key) if config.get(key) else 0
