"""LoRA adapters (https://arxiv.org/abs/2106.09685) as PEFT keeps them: a directory with settings and factors."""

import json
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from reprlib import repr as shown  # cut, where it is long

from torch import Tensor

from checkpoint import DTYPE_NAMES, LowRank, canonical_name, sources, unused_prefixes
from config import MULTIMODAL, ModelConfig
from files import DTYPES, open_tensors, read_header, read_json, tensor_bytes, write_atomically, write_safetensors

SETTINGS_NAME, FACTORS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
ALL_LAYERS = "model.layers."  # what the names of layers' modules begin with
# Settings that don't change what an adapter means, or that are read; any other one must be off
KNOWN = {
    *("peft_type", "task_type", "bias", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "lora_dropout"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config", "qalora_group_size"),
    *("megatron_config", "megatron_core", "runtime_config"),
}
INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # the others change the weights beneath, too


@dataclass(frozen=True)
class Adapter:
    """Factors A [r, in] and B [out, r] of linear modules, by their names in Hugging Face's text model. B A times the
    module's own of `scales`, which is alpha / r, is added to the weight [out, in]."""

    name: str
    factors: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    scales: dict[str, float]
    everywhere: tuple[str, ...] = ()  # what modules are called that it has factors of in each layer
    others: list[str] = field(default_factory=list)  # modules for images and sound, whose factors are left out

    def __str__(self) -> str:
        return f"adapter {self.name} (rank {self.rank}, {len(self.factors)} modules)"


def read_adapter(directory: str | Path) -> Adapter:
    """Reads and checks an adapter that PEFT or `save_adapter` wrote.

    Raises FileNotFoundError, or ValueError for settings or factors that are damaged, or that mean more than products
    added to linear modules, naming them.
    """
    if not isinstance(directory, str | os.PathLike) or not str(directory):
        raise ValueError(f"adapter must be the directory of one, not {directory!r}")
    directory = Path(directory)
    settings_file, file = directory / SETTINGS_NAME, directory / FACTORS_NAME
    if not settings_file.exists():
        raise FileNotFoundError(f"no adapter at {directory}: there is no {settings_file}")
    settings = read_json(settings_file)
    try:
        rank, alpha = _check_settings(settings)
    except ValueError as error:
        raise ValueError(f"{settings_file}: {error}") from None
    if not file.exists() and (directory / PICKLE_NAME).exists():
        what = f"{directory / PICKLE_NAME} is a pickle, which can run any code"
        raise ValueError(f"{what}: save the adapter again with PEFT, which writes {FACTORS_NAME}")
    if not file.exists():
        raise FileNotFoundError(f"{directory} has no {FACTORS_NAME}")

    stored, _ = read_header(file)
    found: dict[str, dict[str, Tensor]] = {}
    with open_tensors(file) as opened:
        for key, tensor in stored.items():
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
            if match is None:
                raise ValueError(f"{file} has {key}, which is no lora_A or lora_B of a linear module")
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{key} in {file} is stored as {tensor.dtype}; {', '.join(DTYPES)} can be read")
            factor = opened.get_tensor(key)
            if not factor.isfinite().all():
                raise ValueError(f"{key} in {file} has values that are not finite")
            found.setdefault(match[1], {})[match[2]] = factor
    factors, scales, others = {}, {}, []
    for theirs, pair in found.items():
        module = canonical_name(theirs)
        for which in "AB":
            if which not in pair:
                raise ValueError(f"{file} lacks lora_{which} of {theirs}")
        a, b = pair["A"], pair["B"]
        own_rank, own_alpha = (_of_module(settings, *each, theirs) for each in (("rank", rank), ("alpha", alpha)))
        if a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] == own_rank:
            shapes = f"lora_A {[*a.shape]} and lora_B {[*b.shape]}"
            raise ValueError(f"{file} has of {theirs} {shapes}, which don't fit the rank {own_rank}")
        if module is None:
            others.append(theirs)
        elif module in factors:
            raise ValueError(f"{file} has factors of {module} twice")
        else:
            factors[module], scales[module] = (a, b), own_alpha / own_rank
    if not factors:
        raise ValueError(f"{file} has no factors of the text model")
    return Adapter(directory.absolute().name, factors, rank, alpha, scales, _targets(settings), others)


def _check_settings(settings: dict) -> tuple[int, float]:
    """r and lora_alpha. Raises ValueError, naming it, for a setting that this program can't follow."""
    for key, wanted in (("peft_type", "LORA"), ("bias", "none")):
        if settings.get(key) != wanted:
            raise ValueError(f"{key} is {shown(settings.get(key))}; only {wanted!r} can be merged")
    init = settings.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in INITS:
        what = "its factors are those of other weights than the checkpoint's"
        raise ValueError(f"init_lora_weights is {shown(init)}: {what}; PEFT can convert it to plain LoRA")
    for key, value in settings.items():
        if key not in KNOWN and value not in (None, False, [], {}, ""):
            raise ValueError(f"{key} is {shown(value)}, which can't be merged into weights here")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = {} if settings.get(key) is None else settings[key]
        if not isinstance(patterns, dict):
            raise ValueError(f"{key} is {shown(patterns)}, not an object")
        for pattern, value in patterns.items():
            if not re.fullmatch(r"\^?[\w.]+", pattern):
                raise ValueError(f"{key} has the pattern {shown(pattern)}; only names of modules can be read")
            check = _check_rank if key == "rank_pattern" else _check_alpha
            check(f"{key}'s {pattern}", value)
    _check_rank("r", rank)
    _check_alpha("lora_alpha", alpha)
    return rank, float(alpha)


def _check_rank(name: str, value):
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, not {shown(value)}")


def _check_alpha(name: str, value):
    if type(value) not in (int, float) or not abs(value) < 1e38:
        raise ValueError(f"{name} must be a number, not {shown(value)}")


def _of_module(settings: dict, kind: str, default: float, module: str) -> float:
    """A module's own rank or alpha: that of the first pattern, which is the end of names or, with ^, a whole one."""
    for pattern, value in (settings.get(f"{kind}_pattern") or {}).items():
        if module == pattern.removeprefix("^") or module.endswith(f".{pattern}"):
            return value
    return default


def _targets(settings: dict) -> tuple[str, ...]:
    """The modules that the settings name without saying in which layers."""
    targets = settings.get("target_modules")
    if settings.get("layers_to_transform") is not None or settings.get("exclude_modules"):
        return ()
    return tuple(each for each in targets if isinstance(each, str)) if isinstance(targets, list) else ()


def updates_of(adapter: Adapter, config: ModelConfig) -> dict[str, list[LowRank]]:
    """What an adapter adds to a model's weights, by our names, as `load_weights` takes it. Raises ValueError, with the
    module's name, for factors of another model's."""
    places = {}  # Hugging Face's module -> our parameter, its first row there, its shape
    for ours, parts in sources(config).items():
        first = 0
        for theirs, shape in parts:
            if len(shape) == 2 and not ours.endswith("embedding.weight"):
                places[theirs.removesuffix(".weight")] = ours, first, shape
            first += shape[0]
    unused, updates = unused_prefixes(config), {}
    for module, (a, b) in adapter.factors.items():
        if module not in places:
            if f"{module}.".startswith(unused):
                continue
            if (layer := _layer(module)) >= config.n_layers:
                what = f"it has factors of layer {layer}, this model has {config.n_layers} layers"
                raise ValueError(f"adapter {adapter.name} is of another model: {what}, counted from 0")
            raise ValueError(f"adapter {adapter.name} has factors of {module}, which is no linear layer of this model")
        ours, first, shape = places[module]
        if (len(b), a.shape[1]) != shape:
            what = f"the factors of {module} make {[len(b), a.shape[1]]}, the weight is {[*shape]}"
            raise ValueError(f"adapter {adapter.name} is of another model: {what}")
        updates.setdefault(ours, []).append(LowRank(first, a, b, adapter.scales[module]))
    there = max(map(_layer, adapter.factors))
    asked = max((_layer(module) for module in places if module.rsplit(".", 1)[-1] in adapter.everywhere), default=-1)
    if there < asked:
        what = f"its last layer is {there}, this model's with such modules is {asked}"
        raise ValueError(f"adapter {adapter.name} is of another model: {what}, counted from 0")
    return updates


def _layer(module: str) -> int:
    """The number of the layer that a module is in; -1 if it is in none."""
    number = module.removeprefix(ALL_LAYERS).split(".")[0]
    return int(number) if module.startswith(ALL_LAYERS) and number.isdecimal() else -1


def save_adapter(
    directory: str | Path, factors: dict[str, tuple[Tensor, Tensor]], rank: int, alpha: float, base: str | Path
):
    """Writes A [r, in] and B [out, r] of linear modules, by names as "model.layers.0.self_attn.q_proj", as an adapter
    that PEFT and `read_adapter` read.

    `base` is the checkpoint that it is of. Where that is a directory with a multimodal model, modules are named as in
    that. Raises ValueError for factors that don't fit the rank.
    """
    directory, base_settings, inner = Path(directory), Path(base) / "config.json", "model."
    if base_settings.exists() and read_json(base_settings).get("model_type") in MULTIMODAL:
        inner = "model.language_model."
    entries, names = {}, [inner + module.removeprefix("model.") for module in factors]
    for name, (a, b) in zip(names, factors.values()):
        if a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] == rank:
            raise ValueError(f"the factors {[*a.shape]} and {[*b.shape]} of {name} don't fit the rank {rank}")
        for which, factor in (("A", a), ("B", b)):
            write = partial(_bytes_of, factor)
            entries[f"{PREFIX}{name}.lora_{which}.weight"] = DTYPE_NAMES[factor.dtype], tuple(factor.shape), write
    # Where all layers have the same modules, these need no layer's name; in a multimodal model others are called alike
    ends, layers = sorted({name.rsplit(".", 1)[-1] for name in names}), {_layer(module) for module in factors}
    alike = inner == "model." and layers == set(range(len(layers))) and len(names) == len(ends) * len(layers)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ends if alike else names,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / FACTORS_NAME, entries, {"format": "pt"})
    text = json.dumps(settings, indent=2) + "\n"
    write_atomically(directory / SETTINGS_NAME, lambda out: out.write(text.encode()))


def _bytes_of(factor: Tensor) -> list[memoryview]:
    return [tensor_bytes(factor.detach().cpu())]
