"""Checkpoints on disk: Hugging Face's safetensors shards, and the converted file with our names.

Nothing here builds a model. Every file is checked whole (header, names, shapes, size) before a tensor is read.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from queue import SimpleQueue
from reprlib import repr as shown  # cut, where it is long
from typing import NamedTuple

import torch
from safetensors import safe_open

from config import ModelConfig, object_of, stop_ids_of, token_ids_of
from files import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    FP8_DTYPE,
    STORED_DTYPES,
    StoredTensor,
    open_tensors,
    read_header,
    read_json,
    tensor_bytes,
    torch_dtype,
    write_safetensors,
)
from formats import E4M3_MAX, FORMATS, GROUPS, LINEAR, largest
from ops.common import round_fp8
from ops.integer import pack_int4, unpack_int4, words_per_chunk
from parallel import Cut, Shard

PER_LAYER_TABLE = "per_layer_inputs.embedding.weight"
TOKEN_ORDERING = "masked_embedding.token_ordering"  # of drafters; the only tensor of int64
CONVERTED_NAME = "gemma.safetensors"
WEIGHT_FORMATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
QUANTIZED_FORMATS = tuple(name for name in FORMATS if name != "bf16")
INT_FORMATS = tuple(name for name, format in FORMATS.items() if format.quantize)
LINEAR_WEIGHTS = tuple(f"{module}.weight" for module in LINEAR)  # ends of the names of what is quantized
FP8_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
PIECE, READERS = 1 << 24, 4  # bytes of a tensor that a thread copies at a time, and threads, on the way to a GPU
NOT_TEXT = (  # parts of multimodal models
    "vision_tower.",
    "multi_modal_projector.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
    "vision_embedder.",
)
SCALES_NAME, SCALES_FORMAT = "fp8_scales.safetensors", "gemma-fast-fp8-scales"
Scale = float | list[float]  # a factor, or one of each expert


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found complete. `parts` maps each of our parameter names to the stored tensors that
    make it up, joined along their first dimension."""

    directory: Path
    config: ModelConfig
    parts: dict[str, list[StoredTensor]]
    weight_format: str | None  # bf16, fp16, fp32, int8, int4, fp8 (Hugging Face's, too); None: its other files
    group: int = 0  # of int4: how many neighbours in a row share a scale
    others: tuple[StoredTensor, ...] = ()  # that no parameter is made of: parts for images, copies

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensors in self.parts.values() for tensor in tensors)


class LowRank(NamedTuple):
    """A product that is added to rows of a weight [N, K]: b @ a * scale, to those from `first` on."""

    first: int
    a: torch.Tensor  # [r, K]
    b: torch.Tensor  # [rows, r]
    scale: float


def sources(config: ModelConfig, experts_apart: bool = False) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our parameter names -> [(Hugging Face name, shape), ...], to be joined along the first dimension. With
    experts_apart each expert has tensors of its own."""
    hidden = config.hidden_size
    table = {"embedding.weight": [("model.embed_tokens.weight", (config.vocab_size, hidden))]}
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        ffn, head_dim, products = config.intermediate_size_of(i), config.head_dim_of(i), config.kv_products_of(i)
        q, kv = config.n_heads * head_dim, config.kv_heads_of(i) * head_dim
        norms = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
        if config.post_norms:  # there, "post_attention_layernorm" is what its name says
            norms = {
                "attention_norm": "input_layernorm",
                "post_attention_norm": "post_attention_layernorm",
                "feed_forward_norm": "pre_feedforward_layernorm",
                "post_feed_forward_norm": "post_feedforward_layernorm",
            }
        if config.n_experts:
            norms |= {
                "post_dense_norm": "post_feedforward_layernorm_1",
                "experts.norm": "pre_feedforward_layernorm_2",
                "post_experts_norm": "post_feedforward_layernorm_2",
            }
        if config.per_layer_size:
            norms["post_per_layer_norm"] = "post_per_layer_input_norm"
        for our_norm, their_norm in norms.items():
            table[f"{ours}.{our_norm}.weight"] = [(f"{theirs}.{their_norm}.weight", (hidden,))]
        table[f"{ours}.attention.wqkv.weight"] = [
            (f"{theirs}.self_attn.q_proj.weight", (q, hidden)),
            *[(f"{theirs}.self_attn.{name}_proj.weight", (kv, hidden)) for name in "kv"[:products]],
        ]
        table[f"{ours}.attention.wo.weight"] = [(f"{theirs}.self_attn.o_proj.weight", (hidden, q))]
        for norm in ("q_norm", "k_norm")[: 0 if not config.qk_norm else 2 if products else 1]:
            table[f"{ours}.attention.{norm}.weight"] = [(f"{theirs}.self_attn.{norm}.weight", (head_dim,))]
        table[f"{ours}.feed_forward.w13.weight"] = [
            (f"{theirs}.mlp.gate_proj.weight", (ffn, hidden)),
            (f"{theirs}.mlp.up_proj.weight", (ffn, hidden)),
        ]
        table[f"{ours}.feed_forward.w2.weight"] = [(f"{theirs}.mlp.down_proj.weight", (hidden, ffn))]
        if config.n_experts:
            table |= _sources_of_experts(config, f"{ours}.experts", theirs, experts_apart)
        if config.per_layer_size:
            gate, proj = (f"{theirs}.per_layer_{name}.weight" for name in ("input_gate", "projection"))
            table[f"{ours}.per_layer.gate.weight"] = [(gate, (config.per_layer_size, hidden))]
            table[f"{ours}.per_layer.proj.weight"] = [(proj, (hidden, config.per_layer_size))]
        if config.layer_scalar:
            table[f"{ours}.scalar"] = [(f"{theirs}.layer_scalar", (1,))]
    if config.per_layer_size:
        width = config.n_layers * config.per_layer_size
        for ours, theirs, shape in (
            ("embedding", "embed_tokens_per_layer", (config.per_layer_vocab_size, width)),
            ("proj", "per_layer_model_projection", (width, hidden)),
            ("norm", "per_layer_projection_norm", (config.per_layer_size,)),
        ):
            table[f"per_layer_inputs.{ours}.weight"] = [(f"model.{theirs}.weight", shape)]
    table["norm.weight"] = [("model.norm.weight", (hidden,))]
    if config.backbone_size:
        table["pre_projection.weight"] = [("pre_projection.weight", (hidden, 2 * config.backbone_size))]
        table["post_projection.weight"] = [("post_projection.weight", (config.backbone_size, hidden))]
    if config.n_centroids:
        table["centroids.weight"] = [("masked_embedding.centroids.weight", (config.n_centroids, hidden))]
        table["token_ordering"] = [(TOKEN_ORDERING, (config.vocab_size,))]
    return table


def _sources_of_experts(config: ModelConfig, ours: str, theirs: str, apart: bool) -> dict:
    """Those of a layer's experts and of their router."""
    count, hidden, ffn = config.n_experts, config.hidden_size, config.expert_size
    if apart:
        each = [f"{theirs}.experts.{i}" for i in range(count)]
        w13 = [(f"{name}.{part}_proj.weight", (ffn, hidden)) for name in each for part in ("gate", "up")]
        w2 = [(f"{name}.down_proj.weight", (hidden, ffn)) for name in each]
    else:
        w13 = [(f"{theirs}.experts.gate_up_proj", (count, 2 * ffn, hidden))]
        w2 = [(f"{theirs}.experts.down_proj", (count, hidden, ffn))]
    return {
        f"{ours}.w13.weight": w13,
        f"{ours}.w2.weight": w2,
        f"{ours}.router.proj.weight": [(f"{theirs}.router.proj.weight", (count, hidden))],
        f"{ours}.router.input_factor": [(f"{theirs}.router.scale", (hidden,))],
        f"{ours}.router.expert_factor": [(f"{theirs}.router.per_expert_scale", (count,))],
    }


def joined_shape(name: str, shapes: list[tuple[int, ...]], config: ModelConfig) -> tuple[int, ...]:
    """The shape of the parameter `name`, whose parts have these: joined along the first dimension, or stacked where
    they are single experts'."""
    rows, *rest = sum(shape[0] for shape in shapes), *shapes[0][1:]
    if name.endswith((".experts.w13.weight", ".experts.w2.weight")) and len(rest) == 1:
        return config.n_experts, rows // config.n_experts, *rest
    return rows, *rest


def read_config(directory: Path) -> ModelConfig:
    """Settings from config.json; the stop ids from generation_config.json where there is one."""
    file = directory / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{directory} has no config.json; scripts/prepare.sh REPO_ID makes a whole checkpoint")
    generation_file = directory / "generation_config.json"
    content, generation = read_json(file), read_json(generation_file) if generation_file.exists() else {}
    try:
        config = ModelConfig.from_hf(content)
        file = generation_file  # that the next error is of
        suppressed = token_ids_of(generation, "suppress_tokens")
        return replace(config, stop_ids=stop_ids_of(generation) or config.stop_ids, suppressed_ids=suppressed)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def open_checkpoint(
    path: str | Path, formats: Iterable[str] = WEIGHT_FORMATS.values(), config: ModelConfig | None = None
) -> Checkpoint:
    """Finds and checks a checkpoint: a directory, or one weight file with config.json beside it. With `config` its
    settings are these, whatever config.json says.

    In a directory, converted files of one of the weight `formats`, in this order, come before Hugging Face's shards. A
    file that is named is taken whatever its format. Raises FileNotFoundError or ValueError, naming the file or tensor
    that is missing, left over, cut or of the wrong shape. Warns about a converted file that is older than its source.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; scripts/prepare.sh REPO_ID downloads and converts one")
    directory = path if path.is_dir() else path.parent
    config = read_config(directory) if config is None else config
    files, strict = _weight_files(directory, formats) if path.is_dir() else ([path], None)

    stored, others, weight_format, group = {}, [], None, 0
    for file in files:
        tensors, metadata = read_header(file)
        if metadata.get("format") == FORMAT:
            _check_format(file, metadata)
            weight_format = metadata["weight_format"]
            group = int(metadata["group_size"]) if _is_grouped(weight_format) else 0
        for key, tensor in tensors.items():
            name = key if weight_format else canonical_name(key)
            if name in stored:
                raise ValueError(f"{name} is in {stored[name].file.name} and again in {file.name}")
            if name is None:
                others.append(tensor)
            else:
                stored[name] = tensor
            if strict is not None and strict.pop(key, file.name) != file.name:
                raise ValueError(f"{key} is in {file.name}, the index says elsewhere")
    if strict:
        key, file_name = next(iter(strict.items()))
        raise ValueError(f"{key} is missing from {directory / file_name}, where the index says it is")

    table = sources(config, experts_apart=any(re.search(r"\.experts\.\d+\.", name) for name in stored))
    if weight_format:  # one stored tensor a parameter, of the joined shape
        _warn_if_older(file, weight_format)
        table = {name: [(name, joined_shape(name, [s for _, s in parts], config))] for name, parts in table.items()}
    linear, head, dtypes = [name for name in table if name.endswith(LINEAR_WEIGHTS)], [], {TOKEN_ORDERING: "I64"}
    if weight_format in WEIGHT_FORMATS.values():
        dtypes = {name: dtype for dtype, each in WEIGHT_FORMATS.items() if each == weight_format for name in table}
    elif weight_format == "fp8":
        head = ["embedding.weight"] if "head_scales.weight_scale" in stored else []
        names = [name for name in fp8_scale_names(config) if head or not name.startswith("head")]
        scales = {name: [(name, scale_shape(name, config))] for name in names}
    elif weight_format is None and _says_fp8(directory / "config.json", stored):
        weight_format, scales = "fp8", _fp8_scale_sources(config, table, stored)
    if weight_format == "fp8":
        dtypes = {part: FP8_DTYPE for name in linear + head for part, _ in table[name]}
        table |= scales
    elif weight_format in INT_FORMATS:
        head = ["embedding.weight"] if "embedding.scale" in stored else []
        for name in linear + head:
            ((_, whole),) = table.pop(name)
            for part, (dtype, shape) in stored_parts(name, whole, weight_format, group).items():
                table[part], dtypes[part] = [(part, shape)], dtype
    wanted = {name: shape for parts in table.values() for name, shape in parts}
    for name, shape in wanted.items():
        if name in stored:
            _check(stored[name], shape, weight_format, dtypes.get(name))
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(f"{path} lacks {some(missing)}")
    unused = unused_prefixes(config)
    left_over = {name: tensor for name, tensor in stored.items() if name not in wanted}
    if unknown := [tensor.key for name, tensor in left_over.items() if not name.startswith(unused)]:
        raise ValueError(f"{path} has tensors that config.json has no place for: {some(unknown)}")
    parts = {name: [stored[part] for part, _ in sources_] for name, sources_ in table.items()}
    return Checkpoint(directory, config, parts, weight_format, group, (*others, *left_over.values()))


def unused_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """What Hugging Face's names begin with of the keys' and values' weights and scales that files may have of layers
    that take those of others."""
    layers = [f"model.layers.{i}.self_attn" for i in range(config.n_layers) if config.is_shared(i)]
    names = ("k_proj.", "v_proj.", "k_norm.", "k_scale", "v_scale", "kv_scale")
    return tuple(f"{layer}.{name}" for layer in layers for name in names)


def _check(tensor: StoredTensor, shape: tuple[int, ...], weight_format: str | None = None, dtype: str | None = None):
    """Raises ValueError unless `tensor` has that shape, which is () for a scale, the dtype that weight_format has there
    (None: any of DTYPES), and as many bytes."""
    if shape == () and tensor.shape not in ((), (1,)):
        raise ValueError(
            f"{tensor.key} in {tensor.file} is of shape {shown([*tensor.shape])}; only one scale a tensor can be read"
        )
    if shape and tensor.shape != shape:
        raise ValueError(f"{tensor.key} has shape {shown([*tensor.shape])}, config.json asks for {list(shape)}")
    if dtype and tensor.dtype != dtype:
        raise ValueError(f"{tensor.key} is stored as {tensor.dtype}, {weight_format or 'a drafter'} has {dtype} there")
    if not dtype and tensor.dtype not in DTYPES:
        raise ValueError(f"{tensor.key} in {tensor.file} is stored as {tensor.dtype}; BF16, F16 and F32 can be read")
    if tensor.size != prod(tensor.shape) * torch_dtype(tensor).itemsize:
        raise ValueError(f"{tensor.file} is damaged: the bytes of {tensor.key} do not match its shape")


def stored_parts(
    name: str, shape: tuple[int, ...], weight_format: str, group: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of what a file in weight_format has of the weight `name`, of that shape [N, K] or, of
    experts, [E, N, K]."""
    module, format = name.removesuffix("weight"), FORMATS[weight_format]
    if name == "embedding.weight":
        format = format.of_embedding
    *experts, n, k = shape
    stored = format.parameters(n, k, group, *experts)
    return {f"{module}{part}": (DTYPE_NAMES[dtype], part_shape) for part, (dtype, part_shape) in stored.items()}


def parameter_name(name: str) -> str:
    """The model's name of what a file calls `name`: they differ for the factors of FP8 weights."""
    name = name.replace("head_scales.", "embedding.")
    return f"{name.removesuffix('weight_scale')}scale" if name.endswith("weight_scale") else name


def _says_fp8(config_file: Path, stored: dict[str, StoredTensor]) -> bool:
    """Whether config.json describes FP8 weights and inputs with one static scale a tensor, as published for vLLM and
    TGI: quant_method "fp8" (AutoFP8) or "compressed-tensors" (llm-compressor). Raises ValueError, naming what it found,
    for any other quantization, and for FP8 tensors that config.json says nothing of.

    https://docs.vllm.ai/en/latest/features/quantization/fp8/,
    https://github.com/vllm-project/compressed-tensors: src/compressed_tensors/quantization
    """
    config = read_json(config_file)
    if config.get("quantization_config") is not None:
        try:
            _check_fp8_settings(config)
        except ValueError as error:
            raise ValueError(f"{config_file}: {error}") from None
        return True
    if fp8 := [tensor.key for tensor in stored.values() if tensor.dtype.startswith("F8_")]:
        raise ValueError(f"config.json has no quantization_config, and these tensors are FP8: {some(fp8)}")
    return False


def _check_fp8_settings(config: dict):
    def check(where: str, found, wanted):
        if found != wanted:
            raise ValueError(
                f"{where} is {json.dumps(found)}, this program reads {json.dumps(wanted)}: "
                "FP8 weights and inputs with one static scale a tensor"
            )

    settings = object_of(config, "quantization_config")
    method, schemes = settings.get("quant_method"), {}
    if method == "fp8":
        check("activation_scheme", settings.get("activation_scheme"), "static")
        check("weight_block_size", settings.get("weight_block_size"), None)
    elif method == "compressed-tensors":
        groups = object_of(settings, "config_groups") or {"config_groups": {}}
        for name in groups:
            group = object_of(groups, name)
            schemes |= {f"{name}'s {kind}": object_of(group, kind) for kind in ("weights", "input_activations")}
    else:
        raise ValueError(f"quant_method {shown(method)} is not supported; 'fp8' and 'compressed-tensors' are")
    if method == "fp8" and isinstance(settings.get("kv_cache_scheme"), str):
        check("kv_cache_scheme", settings["kv_cache_scheme"], "static")
    elif settings.get("kv_cache_scheme") is not None:
        schemes["kv_cache_scheme"] = object_of(settings, "kv_cache_scheme")
    for where, scheme in schemes.items():
        for key, wanted in FP8_SCHEME.items():  # what is left out has these values, but for the type
            found = scheme.get(key)
            check(f"{key} of {where}", wanted if found is None and key != "type" else found, wanted)
    if "e5m2" in str(config.get("kv_cache_torch_dtype")):
        raise ValueError("kv_cache_torch_dtype is E5M2; only K and V scales of E4M3 can be read")


def _fp8_scale_sources(config: ModelConfig, table: dict, stored: dict[str, StoredTensor]) -> dict:
    """Like `sources`, where the scales lie in a Hugging Face FP8 checkpoint. K and V may have none: an empty list."""
    scales = {}
    for ours, theirs in fp8_scale_names(config).items():
        module, kind = ours.rsplit(".", 1)
        if kind in ("k_scale", "v_scale"):
            attention = theirs.removesuffix(kind)
            projection = f"{attention}{kind[0]}_proj."
            # in turn: llm-compressor today, modelopt, llm-compressor before, AutoFP8 and TGI
            names = (theirs, projection + kind, projection + "output_scale", attention + "kv_scale")
            scales[ours] = [(name, ()) for name in names if name in stored][:1]
        elif not ours.startswith("head"):
            weights = [name.removesuffix(".weight") for name, _ in table[f"{module}.weight"]]
            shape = scale_shape(ours, config) if len(weights) == 1 else ()
            scales[ours] = [(f"{name}.{kind}", shape) for name in weights]
    return scales


def _weight_files(directory: Path, formats: Iterable[str]) -> tuple[list[Path], dict[str, str] | None]:
    """The files to read, and what Hugging Face's index, where there is one, says of them: {tensor: file name}."""
    index_file, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    shards = []
    index = None
    if index_file.exists():
        index = read_json(index_file).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{index_file} has no weight_map")
        for name in index.values():  # plain names: a path could lead anywhere
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}\.safetensors", name):
                raise ValueError(f"{index_file} names {shown(name)}, which can't be a shard beside it")
        shards = [directory / name for name in sorted(set(index.values()))]
    elif single.exists():
        shards = [single]
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        if (
            formats
            and file not in shards
            and not file.name.endswith(SCALES_NAME)
            and not file.name.startswith("model-")
        ):
            metadata = read_header(file)[1]
            if metadata.get("format") == FORMAT:
                found.setdefault(metadata.get("weight_format"), file)
    for weight_format in formats:
        if weight_format in found:
            return [found[weight_format]], None
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(f"shard {shard} is missing; the index names it: download it again")
    if not shards and found:
        file = next(iter(found.values()))
        raise FileNotFoundError(f"{directory} has quantized weights only: name the file, {file}")
    if not shards:
        raise FileNotFoundError(f"{directory} has no weights: neither {CONVERTED_NAME} nor model*.safetensors")
    return shards, index


def _check_format(file: Path, metadata: dict[str, str]):
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {metadata.get('format_version')}, this program reads {FORMAT_VERSION}: "
            "convert it again with scripts/convert_hf_checkpoint.py"
        )
    if metadata.get("weight_format") not in (*QUANTIZED_FORMATS, *WEIGHT_FORMATS.values()):
        raise ValueError(f"{file} has weight format '{metadata.get('weight_format')}', which this program can't read")
    weight_format, group = metadata["weight_format"], metadata.get("group_size")
    if _is_grouped(weight_format) and group not in map(str, GROUPS):
        raise ValueError(f"{file} has {weight_format} weights in groups of {group}, not of {one_of(GROUPS)}")


def _warn_if_older(file: Path, weight_format: str):
    """Warns if a file in our formats was not written since those of its directory that it is made from."""
    made_from = list(file.parent.glob("model*.safetensors"))
    if weight_format in QUANTIZED_FORMATS:
        made_from.append(file.with_name(CONVERTED_NAME))
    for source in made_from:
        if source != file and source.exists() and source.stat().st_mtime > file.stat().st_mtime:
            warnings.warn(f"{file} is older than {source} and may have other weights: make it again", stacklevel=3)
            return


def _is_grouped(weight_format: str | None) -> bool:
    return weight_format in FORMATS and FORMATS[weight_format].grouped


def canonical_name(key: str) -> str | None:
    """A Hugging Face key without the prefix that multimodal checkpoints put in front; None for what is not needed."""
    for prefix in ("language_model.model.", "model.language_model."):
        if key.startswith(prefix):
            return "model." + key.removeprefix(prefix)
    if key.removeprefix("model.").startswith(NOT_TEXT) or key.endswith("rotary_emb.inv_freq"):
        return None
    if key in ("lm_head.weight", "language_model.lm_head.weight"):
        return None  # a copy of the embedding: config.json says tied
    return key


def one_of(values: Iterable) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}"


def some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def load_weights(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    scales: dict[str, Scale] | None = None,
    on_host: Container[str] = (),
    shard: Shard | None = None,
    updates: Mapping[str, list[LowRank]] | None = None,
    greatest: Callable[[float], float] = lambda value: value,
) -> dict[str, torch.Tensor]:
    """The state dict, or what a shard has of it, on `device` in `dtype`. On a CPU a tensor that is stored whole in
    `dtype` stays a view of the mapped file; every other one, or a shard's part of it, is copied once, in pieces of PIECE
    bytes. Those whose names are in on_host go to the host's memory, which a GPU can read.

    With `scales` (of `fp8_scale_names`) linear weights become E4M3 as they are read, a piece at a time: the model never
    exists in both formats. FP8 parts with scales of their own get the largest of them, as in vLLM: those with a smaller
    one are rounded again. Scales of K and V that are not there are 1.0, with a warning. Raises ValueError if a weight's
    scale is not what the weight asks for, or is not a positive number.

    `updates`, by our names, are added to weights as these are read, in float32, and the sum is rounded once to `dtype`.
    Such a weight becomes E4M3 when all of it is read, by a scale of its own, which is in the state dict, too: of shards
    that is everyone's if `greatest` makes of a shard's largest value that of all of them.
    """
    weights, pieces, maxima, config = {}, [], {}, checkpoint.config
    updates = {} if updates is None else updates
    with ExitStack() as stack:
        files = {tensor.file for tensors in checkpoint.parts.values() for tensor in tensors}
        opened = {file: stack.enter_context(open_tensors(file)) for file in files}

        def scales_of(name: str) -> tuple[list[float], torch.Tensor]:
            """Those of the parts of what has the scale `name`, and what is made of them: the largest, or that of each
            expert."""
            own = [value for tensor in checkpoint.parts[name] for value in _scales(tensor, opened[tensor.file])]
            return own, torch.tensor(own or [1.0]).view(*scale_shape(name, config), -1).amax(-1)

        for name, tensors in checkpoint.parts.items():
            if name.endswith("_scale"):
                weights[name] = scales_of(name)[1].to(device)
                continue
            scale, own_scales = None if scales is None else scales.get(weight_scale_name(name)), [1.0] * len(tensors)
            stored_dtype = torch_dtype(tensors[0])
            if stored_dtype == torch.float8_e4m3fn:
                if len(tensors) > 1:
                    own_scales, scale = scales_of(f"{name}_scale")
            elif scale is not None:
                scale, maxima[name] = torch.tensor(scale), []
            merged = updates.get(name)
            target_dtype = dtype if merged or scale is None and stored_dtype.itemsize > 1 else torch.float8_e4m3fn
            if not stored_dtype.is_floating_point or name.endswith(".scale"):  # parts of an integer weight
                target_dtype = stored_dtype
            cut = Cut() if shard is None else shard.cut(name, config)
            if name in on_host:
                stored = opened[tensors[0].file].get_slice(tensors[0].key)
                whole = stored[slice(*cut.rows[0]) if cut.rows else slice(None)].to(target_dtype)
                weights[name] = whole.pin_memory() if device.type == "cuda" else whole
                continue
            unchanged = stored_dtype == target_dtype and not merged
            if cut == Cut() and len(tensors) == 1 and unchanged and device.type == "cpu":
                weights[name] = opened[tensors[0].file].get_tensor(tensors[0].key)
                continue
            layout = Layout.of(name, tensors, config)
            ranges = cut.rows or ((0, layout.rows),)
            rows = sum(end - first for first, end in ranges)
            rest, columns, repack = layout.columns(shard if cut.columns else None, stored_dtype == torch.int32)
            shape = (layout.experts, rows, *rest) if layout.experts else (rows, *rest)
            weights[name] = torch.empty(shape, device=device, dtype=target_dtype)
            targets, step = weights[name].view(-1, rows, prod(rest)), layout.rows_of(PIECE, tensors[0])
            before, own_pieces = [0, *accumulate(tensor.shape[0] for tensor in tensors)], []
            for part, first, expert, to, count in layout.runs(tensors, ranges):
                convert = repack
                if scale is not None and not merged:
                    which = slice(expert, expert + 1) if scale.numel() > 1 else slice(0, 1)
                    each = scale.view(-1)[which]
                    if stored_dtype.itemsize > 1 or own_scales[part] != each.item():
                        settings = dict(own_scale=own_scales[part], scale=each.to(device), which=which)
                        convert = partial(_to_e4m3, **settings, largest=maxima.get(name))
                for i in range(0, count, step):
                    if merged:
                        place = dict(first=before[part] + first + i, columns=slice(*columns))
                        convert = partial(_merge, **place, updates=merged, largest=maxima.get(name))
                    target = targets[expert, to + i : to + min(i + step, count)]
                    own_pieces.append(Piece(tensors[part], first + i, columns, prod(layout.rest), target, convert))
            if merged and scale is not None:
                _copy_pieces(own_pieces, device)
                weights[name], weights[weight_scale_name(name)] = _quantize_whole(name, weights[name], greatest)
            else:
                pieces += own_pieces
        _copy_pieces(pieces, device)
    for name, found in maxima.items():
        check_weight_scale(name, found, scales[weight_scale_name(name)], whole=shard is None)
    if without := [name for name, tensors in checkpoint.parts.items() if not tensors]:
        warnings.warn(f"{checkpoint.directory} lacks {some(without)}: 1.0 is used", stacklevel=3)
    return weights


def weight_scale_name(name: str) -> str:
    """Of the parameter `name`, in `fp8_scale_names`."""
    return "head_scales.weight_scale" if name == "embedding.weight" else f"{name}_scale"


class Layout(NamedTuple):
    """How a parameter lies in the tensors that it is made of: one matrix, or one of each of some experts, of so many
    rows, each of which has the shape `rest`: its columns or, of int4's scales, pairs of them; () is one number."""

    experts: int  # 0: one matrix
    stacked: bool  # whether there is one tensor, which has the experts along its first dimension
    rows: int
    rest: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensors: list[StoredTensor], config: ModelConfig) -> "Layout":
        shape = tensors[0].shape
        experts = config.n_experts if re.search(r"\.experts\.w\d+\.(weight|scale)$", name) else 0
        stacked = experts > 0 and (len(shape) == 3 or name.endswith(".scale"))
        rows = shape[1] if stacked else sum(tensor.shape[0] for tensor in tensors) // max(1, experts)
        return cls(experts, stacked, rows, shape[1 + stacked :])

    def rows_of(self, size: int, tensor: StoredTensor) -> int:
        """How many rows have `size` bytes, one at least."""
        return max(1, size // (prod(self.rest) * torch_dtype(tensor).itemsize))

    def columns(self, shard: Shard | None, packed: bool) -> tuple[tuple[int, ...], tuple[int, int], Callable | None]:
        """Of a row, what a shard has whose columns are shared (None: all): its shape, which numbers [first, end) it is
        made of, and how: int4's words are `packed` in an order that depends on how long a row is."""
        if shard is None or not self.rest:
            return self.rest, (0, prod(self.rest)), None
        (first, end), inner = shard.share(self.rest[0], "columns"), prod(self.rest[1:])
        rest, columns = (end - first, *self.rest[1:]), (first * inner, end * inner)
        chunk = words_per_chunk(8 * self.rest[0]) if packed else 0
        if not packed or words_per_chunk(8 * rest[0]) == chunk:
            return rest, columns, None
        first, end = first // chunk * chunk, -(-end // chunk) * chunk
        own = columns[0] - first, columns[1] - first
        return rest, (first, end), partial(_repacked, chunk=chunk, columns=own)

    def runs(
        self, tensors: list[StoredTensor], ranges: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[int, int, int, int, int]]:
        """Where to find the rows `ranges` of each matrix: the number of a tensor, its row, the number of the matrix, the
        row's number among those that are wanted of it, and how many rows follow each other."""
        before = 0  # rows of all matrices, one below another, that earlier tensors have
        for part, tensor in enumerate(tensors):
            count = tensor.shape[0] * (self.rows if self.stacked else 1)
            for matrix in range(before // self.rows, -(-(before + count) // self.rows)):
                to = 0
                for first, end in ranges:
                    here = matrix * self.rows + first
                    low, high = max(here, before), min(here + end - first, before + count)
                    if low < high:
                        yield part, low - before, matrix, to + low - here, high - low
                    to += end - first
            before += count


class Piece(NamedTuple):
    """Some rows of a stored tensor, from `first` on, and of these the `columns` [first, end) of `width`: as many rows as
    `target` has, which gets them converted, or as they are for None."""

    tensor: StoredTensor
    first: int
    columns: tuple[int, int]
    width: int
    target: torch.Tensor
    convert: Callable | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and bytes of a row that are read."""
        return len(self.target), (self.columns[1] - self.columns[0]) * torch_dtype(self.tensor).itemsize

    @property
    def size(self) -> int:
        return prod(self.shape)

    def put(self, rows: torch.Tensor):
        """Gives the target its rows, of bytes."""
        rows = rows.view(torch_dtype(self.tensor))
        self.target.copy_(rows if self.convert is None else self.convert(rows))


def _repacked(words: torch.Tensor, chunk: int, columns: tuple[int, int]) -> torch.Tensor:
    """Words of int4 [rows, own] for `columns` [first, end), in words, of rows whose chunks have so many words."""
    codes = unpack_int4(words.unflatten(-1, (-1, chunk))).flatten(-2)
    return pack_int4(codes[:, 8 * columns[0] : 8 * columns[1]])


def _to_e4m3(
    rows: torch.Tensor, own_scale: float, scale: torch.Tensor, which: slice, largest: list[tuple] | None
) -> torch.Tensor:
    """Rounds rows, or matrices that have a scale each; notes in `largest` which they are, and their largest values."""
    if largest is not None:
        largest.append((which, rows.abs().reshape(len(scale), -1).amax(1).float()))
    return round_fp8(rows.float() * own_scale, scale.view(-1, *[1] * (rows.dim() - 1)))


def _merge(
    rows: torch.Tensor, first: int, columns: slice, updates: list[LowRank], largest: list[tuple] | None
) -> torch.Tensor:
    """Rows of a weight from `first` on, or of these some columns, in float32, with what is added to them; notes in
    `largest` their largest value without it."""
    if largest is not None:
        largest.append((slice(0, 1), rows.abs().amax().float().view(1)))
    rows = rows.to(torch.float32, copy=True)
    for update in updates:
        start, stop = max(first, update.first), min(first + len(rows), update.first + len(update.b))
        if start < stop:
            a, b = update.a[:, columns], update.b[start - update.first : stop - update.first]
            rows[start - first : stop - first].addmm_(b.to(rows), a.to(rows), alpha=update.scale)
    return rows


def _quantize_whole(
    name: str, weight: torch.Tensor, greatest: Callable[[float], float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in E4M3, and the scale that its largest value asks for, or the greatest of those of its parts."""
    scale = torch.tensor(greatest(largest(name, weight)) / E4M3_MAX or 1.0, device=weight.device)
    quantized = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    step = max(1, PIECE // weight[0].nbytes)
    for rows, target in zip(weight.split(step), quantized.split(step)):
        target.copy_(round_fp8(rows, scale))
    return quantized, scale


def _copy_pieces(pieces: list[Piece], device: torch.device):
    """Reads pieces, and puts them where they belong.

    To a GPU through pinned buffers and a few threads: a mapped file's pages would be copied one by one.
    """

    def mapped(piece: Piece) -> bool:
        return device.type != "cuda" or piece.columns != (0, piece.width)

    files = {piece.tensor.file for piece in pieces if mapped(piece)}
    contents = {file: torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8) for file in files}

    def read(piece: Piece, rows: torch.Tensor):
        """The piece's bytes, into rows of them."""
        row = piece.width * torch_dtype(piece.tensor).itemsize
        start = piece.tensor.bytes[0] + piece.first * row
        if mapped(piece):
            first, end = (column * torch_dtype(piece.tensor).itemsize for column in piece.columns)
            whole = contents[piece.tensor.file][start : start + len(rows) * row].view(len(rows), row)
            rows.copy_(whole[:, first:end])
            return
        with open(piece.tensor.file, "rb", buffering=0) as f:
            f.seek(start)
            if f.readinto(rows.view(-1).numpy()) != piece.size:
                raise ValueError(f"{piece.tensor.file} became shorter while it was read")

    if device.type != "cuda":
        for piece in pieces:
            rows = torch.empty(piece.shape, dtype=torch.uint8)
            read(piece, rows)
            piece.put(rows)
        return
    buffers = SimpleQueue()
    for _ in range(READERS):
        buffers.put(torch.empty(PIECE, dtype=torch.uint8, pin_memory=True))

    def copy(piece: Piece):
        size = piece.size
        buffer = buffers.get() if size <= PIECE else torch.empty(size, dtype=torch.uint8)
        try:
            read(piece, buffer[:size].view(piece.shape))
            with torch.inference_mode():  # whatever the caller's mode: targets may be its tensors
                piece.put(buffer[:size].view(piece.shape).to(device, non_blocking=True))
                torch.cuda.current_stream(device).synchronize()  # before the buffer's next use
        finally:
            if size <= PIECE:
                buffers.put(buffer)

    with ThreadPoolExecutor(READERS) as threads:
        for _ in threads.map(copy, pieces):  # raises what a thread raised
            pass


def _scales(tensor: StoredTensor, opened: safe_open) -> list[float]:
    values = opened.get_tensor(tensor.key).flatten().tolist()
    for value in values:
        if not 0 < value < float("inf"):
            raise ValueError(f"{tensor.key} in {tensor.file} is {value}; a scale is one positive number")
    return values


def fp8_scale_names(config: ModelConfig) -> dict[str, str]:
    """Our name of each scale -> its name in the scale file, which is Hugging Face's module and input_scale,
    weight_scale, k_scale or v_scale. Layers without keys and values of their own have no scales of them."""
    names, experts = {}, []
    if config.n_experts:
        experts = [("experts.w13", "experts.gate_up_proj"), ("experts.w2", "experts.down_proj")]
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for our_module, their_module in (
            ("attention.wqkv", "self_attn.qkv_proj"),
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w13", "mlp.gate_up_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
            *experts,
        ):
            for kind in ("input_scale", "weight_scale"):
                names[f"{ours}.{our_module}.{kind}"] = f"{theirs}.{their_module}.{kind}"
        for kind in () if config.is_shared(i) else ("k_scale", "v_scale"):
            names[f"{ours}.attention.{kind}"] = f"{theirs}.self_attn.{kind}"
    for kind in ("input_scale", "weight_scale"):
        names[f"head_scales.{kind}"] = f"lm_head.{kind}"
    return names


def scale_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Of the scale `name` of `fp8_scale_names`: () but for experts, whose weights have one each, and whose second
    products have inputs of their own."""
    return (config.n_experts,) if ".experts." in name and not name.endswith("w13.input_scale") else ()


def check_weight_scale(name: str, found: Iterable[tuple[slice, torch.Tensor]], scale: Scale, whole: bool = True):
    """Raises ValueError if the largest of a weight's absolute values is not what its scale says, or not finite.

    `found` are the largest of pieces, and which of the scales these have. Without `whole` they are of a part of the
    weight, whose largest may be less.
    """
    scales = torch.tensor(scale)
    largest = torch.zeros(scales.numel())
    for which, values in found:
        largest[which] = torch.maximum(largest[which], values.cpu())
    for index, (amax, each) in enumerate(zip(largest.tolist(), scales.flatten().tolist())):
        where = f"{name}, expert {index}," if scales.dim() else name
        if not math.isfinite(amax):
            raise ValueError(f"{where} has values that are not finite")
        amax = amax / E4M3_MAX or 1.0  # of zeros any scale would do; calibrate.py takes 1
        if not 0.99 * amax <= each <= (1.01 * amax if whole else math.inf):
            raise ValueError(
                f"{SCALES_NAME} is of another model: {where} asks for the scale {amax:.3g}, it says {each:.3g}; "
                "run calibrate.py again"
            )


def read_scales(file: Path, config: ModelConfig) -> dict[str, Scale]:
    """Scales by our names, from a file that calibrate.py wrote or of the same names.

    One kv_scale may stand for k_scale and v_scale; where a layer has neither, they are 1.0, with a warning. Raises
    FileNotFoundError, or ValueError for a file that is cut, of another model, or has a scale that is not a positive
    number.
    """
    if not file.exists():
        raise FileNotFoundError(f"no FP8 scaling factors at {file}")
    tensors, metadata = read_header(file)
    if metadata.get("format", SCALES_FORMAT) != SCALES_FORMAT:
        raise ValueError(f"{file} is no file of FP8 scaling factors but {metadata['format']}")
    if metadata.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ValueError(f"{file} has format version {metadata['format_version']}, this program reads {FORMAT_VERSION}")
    model = metadata.get("model", fingerprint(config))
    if model != fingerprint(config):
        raise ValueError(f"{file} is of another model ({model}, this one is {fingerprint(config)}): run calibrate.py")
    values, shapes = {}, {theirs: scale_shape(ours, config) for ours, theirs in fp8_scale_names(config).items()}
    with open_tensors(file) as opened:
        for key, tensor in tensors.items():
            shape = shapes.get(key, ())
            _check(tensor, shape)
            value = _scales(tensor, opened)
            values[key] = value if shape else value[0]
    scales, without = {}, 0
    for ours, theirs in fp8_scale_names(config).items():
        if theirs.endswith((".k_scale", ".v_scale")):
            both = values.pop(theirs[: -len("k_scale")] + "kv_scale", None) if theirs.endswith(".v_scale") else None
            both = both or values.get(theirs[: -len("k_scale")] + "kv_scale")
            value = values.pop(theirs, both)
            without += value is None
            scales[ours] = 1.0 if value is None else value
        elif theirs in values:
            scales[ours] = values.pop(theirs)
        else:
            raise ValueError(f"{file} lacks {theirs}: it is of another model, or cut; run calibrate.py again")
    if values:
        raise ValueError(f"{file} has factors that this model has no place for: {some(list(values))}")
    if without:
        warnings.warn(f"{file} has no factors for K and V: 1.0 is used; run calibrate.py", stacklevel=2)
    return scales


def scales_file(checkpoint: Checkpoint) -> Path:
    """Where calibrate.py puts factors: one file for a directory, and one of its own for each with integer weights."""
    if checkpoint.weight_format not in INT_FORMATS:
        return checkpoint.directory / SCALES_NAME
    ((tensor, *_), *_) = checkpoint.parts.values()
    return tensor.file.with_name(f"{tensor.file.stem}-{SCALES_NAME}")


def write_scales(file: Path, config: ModelConfig, scales: dict[str, Scale], metadata: dict[str, str]):
    """Writes scales by our names as calibrate.py's file, which `read_scales` reads."""
    entries = {}
    for ours, theirs in fp8_scale_names(config).items():
        value = torch.tensor(scales[ours]).expand(scale_shape(ours, config))
        entries[theirs] = ("F32", tuple(value.shape), lambda value=value: [tensor_bytes(value)])
    write_safetensors(file, entries, {"format": SCALES_FORMAT} | metadata)


def fingerprint(config: ModelConfig) -> str:
    """What tells models apart in a scale file: generation and sizes."""
    text = (
        f"gemma-{config.generation}, {config.n_layers} layers, {config.hidden_size}, {config.intermediate_size}, "
        f"{config.n_heads}/{config.n_kv_heads} heads of {config.head_dim}, {config.vocab_size}"
    )
    if config.generation > 3:
        last = config.n_layers - 1  # a global layer
        text += f", {config.kv_heads_of(last)} of {config.head_dim_of(last)}, {config.n_shared_layers} shared"
        text += f", {config.n_experts} experts of {config.expert_size}, {config.per_layer_size} a layer"
    return text


def convert(checkpoint: Checkpoint, file: Path, progress: Callable[[int], None] = lambda n: None, chunk: int = 1 << 24):
    """Writes `checkpoint` as one file with our names, in the dtype it is stored in. Memory: `chunk` bytes.

    Joining tensors along their first dimension is joining their bytes, so that none has to be loaded. `progress` is
    called with the number of bytes written since the last call.
    """
    if checkpoint.weight_format == "fp8":
        raise ValueError(f"{checkpoint.directory} is an FP8 checkpoint already: it is loaded as it is, not converted")
    if checkpoint.weight_format in INT_FORMATS:
        raise ValueError(f"{checkpoint.directory} is quantized already: its file is loaded as it is, not converted")
    dtypes = {tensor.dtype for tensors in checkpoint.parts.values() for tensor in tensors}
    if len(dtypes) > 1:
        raise ValueError(f"the checkpoint mixes dtypes: {', '.join(sorted(dtypes))}")

    def blocks(tensors: list[StoredTensor]):
        for tensor in tensors:
            yield from stored_blocks(tensor, progress, chunk)

    entries = {}
    for name, tensors in checkpoint.parts.items():
        shape = joined_shape(name, [tensor.shape for tensor in tensors], checkpoint.config)
        entries[name] = (tensors[0].dtype, shape, partial(blocks, tensors))
    write_safetensors(file, entries, {"weight_format": WEIGHT_FORMATS[dtypes.pop()]})


def stored_blocks(tensor: StoredTensor, progress: Callable[[int], None], chunk: int = 1 << 24) -> Iterator[bytes]:
    """A tensor's bytes, at most `chunk` at a time; `progress` is called with the number of each."""
    with open(tensor.file, "rb") as source:
        source.seek(tensor.bytes[0])
        for start in range(0, tensor.size, chunk):
            block = source.read(min(chunk, tensor.size - start))
            progress(len(block))
            yield block
