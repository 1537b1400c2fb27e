"""Checkpoints on disk: Hugging Face's safetensors shards, and the converted file with our names.

Nothing here builds a model. Every file is checked whole (header, names, shapes, size) before a tensor is read.
"""

import json
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from model import ModelConfig

FORMAT, FORMAT_VERSION = "gemma-fast", "1"
CONVERTED_NAME = "gemma.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
WEIGHT_FORMATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `bytes` [start, end) of `file`; `key` is its name there, dtype as safetensors spells it."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: tuple[int, int]

    @property
    def size(self) -> int:
        return self.bytes[1] - self.bytes[0]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found complete. `parts` maps each of our parameter names to the stored tensors that
    make it up, joined along their first dimension."""

    directory: Path
    config: ModelConfig
    parts: dict[str, list[StoredTensor]]
    converted: bool

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensors in self.parts.values() for tensor in tensors)


def sources(config: ModelConfig) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our parameter names -> [(Hugging Face name, shape), ...], to be joined along the first dimension."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    table = {"embedding.weight": [("model.embed_tokens.weight", (config.vocab_size, hidden))]}
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        norms = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
        if config.post_norms:  # there, "post_attention_layernorm" is what its name says
            norms = {
                "attention_norm": "input_layernorm",
                "post_attention_norm": "post_attention_layernorm",
                "feed_forward_norm": "pre_feedforward_layernorm",
                "post_feed_forward_norm": "post_feedforward_layernorm",
            }
        for our_norm, their_norm in norms.items():
            table[f"{ours}.{our_norm}.weight"] = [(f"{theirs}.{their_norm}.weight", (hidden,))]
        table[f"{ours}.attention.wqkv.weight"] = [
            (f"{theirs}.self_attn.q_proj.weight", (q, hidden)),
            (f"{theirs}.self_attn.k_proj.weight", (kv, hidden)),
            (f"{theirs}.self_attn.v_proj.weight", (kv, hidden)),
        ]
        table[f"{ours}.attention.wo.weight"] = [(f"{theirs}.self_attn.o_proj.weight", (hidden, q))]
        if config.qk_norm:
            for norm in ("q_norm", "k_norm"):
                table[f"{ours}.attention.{norm}.weight"] = [(f"{theirs}.self_attn.{norm}.weight", (config.head_dim,))]
        table[f"{ours}.feed_forward.w13.weight"] = [
            (f"{theirs}.mlp.gate_proj.weight", (ffn, hidden)),
            (f"{theirs}.mlp.up_proj.weight", (ffn, hidden)),
        ]
        table[f"{ours}.feed_forward.w2.weight"] = [(f"{theirs}.mlp.down_proj.weight", (hidden, ffn))]
    table["norm.weight"] = [("model.norm.weight", (hidden,))]
    return table


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file (https://huggingface.co/docs/safetensors: 8 bytes header length,
    JSON, data). Raises ValueError if the file is cut, longer than its header says, or no safetensors file."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = f.read(length) if length <= size - 8 else b""
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        base = 8 + length
        tensors = {
            key: StoredTensor(
                file, key, e["dtype"], tuple(e["shape"]), (base + e["data_offsets"][0], base + e["data_offsets"][1])
            )
            for key, e in entries.items()
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{file} is cut or is no safetensors file: its header is not complete") from None
    end = max((tensor.bytes[1] for tensor in tensors.values()), default=base)
    if size != end:
        raise ValueError(f"{file} is damaged: {size:,} bytes, where its header describes {end:,}; download it again")
    return tensors, metadata


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is cut or damaged: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def read_config(directory: Path) -> ModelConfig:
    """Settings from config.json; the stop ids from generation_config.json where there is one."""
    file = directory / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{directory} has no config.json; scripts/prepare.sh REPO_ID makes a whole checkpoint")
    try:
        config = ModelConfig.from_hf(read_json(file))
    except TypeError as error:
        raise ValueError(f"{file}: {error}") from None
    generation_file = directory / "generation_config.json"
    stop_ids = read_json(generation_file).get("eos_token_id") if generation_file.exists() else None
    if stop_ids is not None:
        config = replace(config, stop_ids=(stop_ids,) if isinstance(stop_ids, int) else tuple(stop_ids))
    return config


def open_checkpoint(path: str | Path, prefer_converted: bool = True) -> Checkpoint:
    """Finds and checks a checkpoint: a directory, or one weight file with config.json beside it.

    In a directory a converted file comes before Hugging Face's shards, if prefer_converted. Raises FileNotFoundError
    or ValueError, naming the file or tensor that is missing, left over, cut or of the wrong shape.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; scripts/prepare.sh REPO_ID downloads and converts one")
    directory = path if path.is_dir() else path.parent
    config = read_config(directory)
    files, strict = ([path], None) if path.is_file() else _weight_files(directory, prefer_converted)

    stored, converted = {}, False
    for file in files:
        tensors, metadata = read_header(file)
        converted = metadata.get("format") == FORMAT
        if converted:
            _check_format(file, metadata)
        for key, tensor in tensors.items():
            name = key if converted else _canonical_name(key)
            if name in stored:
                raise ValueError(f"{name} is in {stored[name].file.name} and again in {file.name}")
            if name is not None:
                stored[name] = tensor
            if strict is not None and strict.pop(key, file.name) != file.name:
                raise ValueError(f"{key} is in {file.name}, the index says elsewhere")
    if strict:
        key, file_name = next(iter(strict.items()))
        raise ValueError(f"{key} is missing from {directory / file_name}, where the index says it is")

    table = sources(config)
    if converted:  # one stored tensor a parameter, of the joined shape
        table = {name: [(name, (sum(s[0] for _, s in parts), *parts[0][1][1:]))] for name, parts in table.items()}
    wanted = {name: shape for parts in table.values() for name, shape in parts}
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(f"{path} lacks {_some(missing)}")
    if left_over := [tensor.key for name, tensor in stored.items() if name not in wanted]:
        raise ValueError(f"{path} has tensors that config.json has no place for: {_some(left_over)}")
    for name, shape in wanted.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise ValueError(f"{tensor.key} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{tensor.key} is stored as {tensor.dtype}; BF16, F16 and F32 can be read")
        if tensor.size != prod(shape) * DTYPES[tensor.dtype].itemsize:
            raise ValueError(f"{tensor.file} is damaged: the bytes of {tensor.key} do not match its shape")
    parts = {name: [stored[part] for part, _ in sources_] for name, sources_ in table.items()}
    return Checkpoint(directory, config, parts, converted)


def _weight_files(directory: Path, prefer_converted: bool) -> tuple[list[Path], dict[str, str] | None]:
    """The files to read, and what Hugging Face's index, where there is one, says of them: {tensor: file name}."""
    index_file, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    shards = []
    index = None
    if index_file.exists():
        index = read_json(index_file).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise ValueError(f"{index_file} has no weight_map")
        shards = [directory / name for name in sorted(set(index.values()))]
    elif single.exists():
        shards = [single]
    for file in sorted(directory.glob("*.safetensors")):
        if file in shards or file.name.startswith("model-") or not prefer_converted:
            continue
        metadata = read_header(file)[1]
        if metadata.get("format") == FORMAT and metadata.get("weight_format") in WEIGHT_FORMATS.values():
            return [file], None
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(f"shard {shard} is missing; the index names it: download it again")
    if not shards:
        raise FileNotFoundError(f"{directory} has no weights: neither {CONVERTED_NAME} nor model*.safetensors")
    return shards, dict(index) if index else None


def _check_format(file: Path, metadata: dict[str, str]):
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {metadata.get('format_version')}, this program reads {FORMAT_VERSION}: "
            "convert it again with scripts/convert_hf_checkpoint.py"
        )
    if metadata.get("weight_format") not in WEIGHT_FORMATS.values():
        raise ValueError(f"{file} has weight format '{metadata.get('weight_format')}', which this program can't read")


def _canonical_name(key: str) -> str | None:
    """A Hugging Face key without the prefix that multimodal checkpoints put in front; None for what is not needed."""
    for prefix in ("language_model.model.", "model.language_model."):
        if key.startswith(prefix):
            return "model." + key.removeprefix(prefix)
    not_text = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
    if key.startswith(not_text) or key.endswith("rotary_emb.inv_freq"):
        return None
    if key in ("lm_head.weight", "language_model.lm_head.weight"):
        return None  # a copy of the embedding: config.json says tied
    return key


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def load_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict, on `device` in `dtype`. On a CPU a tensor that is stored whole in `dtype` stays a view of the
    mapped file; every other one is copied once."""
    weights = {}
    with ExitStack() as stack:
        files = {tensor.file for tensors in checkpoint.parts.values() for tensor in tensors}
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        for name, tensors in checkpoint.parts.items():
            loaded = [opened[tensor.file].get_tensor(tensor.key) for tensor in tensors]
            if len(loaded) == 1:
                weights[name] = loaded[0].to(device, dtype)
                continue
            rows = sum(len(part) for part in loaded)
            weights[name] = torch.empty(rows, *loaded[0].shape[1:], device=device, dtype=dtype)
            for part, target in zip(loaded, weights[name].split([len(part) for part in loaded])):
                target.copy_(part)
    return weights


def convert(checkpoint: Checkpoint, file: Path, progress: Callable[[int], None] = lambda n: None, chunk: int = 1 << 24):
    """Writes `checkpoint` as one file with our names, in the dtype it is stored in. Memory: `chunk` bytes.

    Joining tensors along their first dimension is joining their bytes, so that none has to be loaded. `progress` is
    called with the number of bytes written since the last call.
    """
    entries, layout, offset = {}, [], 0
    dtypes = {tensor.dtype for tensors in checkpoint.parts.values() for tensor in tensors}
    if len(dtypes) > 1:
        raise ValueError(f"the checkpoint mixes dtypes: {', '.join(sorted(dtypes))}")
    for name, tensors in checkpoint.parts.items():
        size = sum(tensor.size for tensor in tensors)
        shape = [sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]]
        entries[name] = {"dtype": tensors[0].dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        layout += tensors
        offset += size
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "weight_format": WEIGHT_FORMATS[dtypes.pop()]}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-(8 + len(header)) % 64)  # tensors start at multiples of 64 bytes in the mapped file

    def write(out):
        out.write(struct.pack("<Q", len(header)) + header)
        for tensor in layout:
            with open(tensor.file, "rb") as source:
                source.seek(tensor.bytes[0])
                left = tensor.size
                while left:
                    block = source.read(min(left, chunk))
                    if not block:
                        raise ValueError(f"{tensor.file} became shorter while it was read")
                    out.write(block)
                    progress(len(block))
                    left -= len(block)

    write_atomically(file, write)


def write_atomically(file: Path, write: Callable):
    """Calls write(open binary file) on a temporary name beside `file` and renames it: a crash leaves no half file."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            write(out)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
