"""Checkpoints as Hugging Face publishes them, written: for transformers, vLLM and this program."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from checkpoint import (
    QUANTIZED_FORMATS,
    WEIGHT_FORMATS,
    Checkpoint,
    open_checkpoint,
    sources,
    stored_blocks,
)
from config import MULTIMODAL
from files import STORED_DTYPES, check_writable, read_json, tensor_bytes, write_safetensors

COPIED = (  # files that an export has from its source
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)


def check_new_directory(directory: Path):
    """Raises ValueError or OSError if nothing can be exported to `directory`: it is not empty, or can't be made."""
    out = directory.absolute()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{directory} is not empty: name a new directory to export to")
    check_writable(next(each for each in (out, *out.parents) if each.exists()) / out.name)


def write_checkpoint(directory: Path, source: Path, entries: dict, settings: dict):
    """Writes tensors, as `write_safetensors` takes them, and settings for config.json to a new directory, with the
    tokenizer's and other files of the directory `source`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", entries, {"format": "pt"})  # first: failing leaves no part
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def open_source(path: Path) -> Checkpoint:
    """The checkpoint at `path`, of Hugging Face's files where these are there: of multimodal models they alone have all
    parts. Raises ValueError for one with quantized weights, and what `open_checkpoint` does."""
    theirs = any((path / f"model.safetensors{end}").exists() for end in ("", ".index.json"))
    checkpoint = open_checkpoint(path, () if theirs else WEIGHT_FORMATS.values())
    if checkpoint.weight_format in QUANTIZED_FORMATS:
        raise ValueError(f"{path} is quantized already: name a checkpoint with BF16 weights")
    if checkpoint.weight_format and read_json(checkpoint.directory / "config.json")["model_type"] in MULTIMODAL:
        raise ValueError(f"{path} has the text part of a multimodal model only: Hugging Face's files are needed, too")
    return checkpoint


def export_checkpoint(
    directory: Path, source: Path, tensor_of: Callable[[str], Tensor], progress: Callable[[int], None] = lambda n: None
):
    """Writes the checkpoint at `source` with other weights to a new directory, as Hugging Face's, in the dtypes that it
    has. What is no part of the text model is copied; a head of its own, which is the embedding once more, is left out.

    tensor_of(name) gives the whole weight that we call `name`. It is called once for each name of
    `checkpoint.sources`, in that order, and one tensor is kept at a time. `progress` is called with the number of bytes
    written since the last call. Raises ValueError for a weight that is not finite, and what `open_source` does.
    """
    checkpoint = open_source(source)
    names, entries, held = sources(checkpoint.config), {}, {}

    def rows(name: str, key: str, dtype: str, shape: tuple[int, ...], first: int, total: int) -> Iterator[memoryview]:
        if name not in held:  # the first of its parts
            held.clear()
            held[name] = tensor_of(name)
        whole = held[name].detach().reshape(total, *shape[1:])  # experts may have tensors of their own
        part = whole[first : first + shape[0]].to("cpu", STORED_DTYPES[dtype])
        if not part.isfinite().all():
            raise ValueError(f"{key} has values that are not finite")
        yield tensor_bytes(part)
        progress(part.nbytes)

    for name, parts in checkpoint.parts.items():
        if checkpoint.weight_format:  # a converted file has no names of theirs
            layout = [(theirs, parts[0].dtype, shape) for theirs, shape in names[name]]
        else:
            layout = [(tensor.key, tensor.dtype, tensor.shape) for tensor in parts]
        first, total = 0, sum(shape[0] for _, _, shape in layout)
        for key, dtype, shape in layout:
            entries[key] = dtype, shape, partial(rows, name, key, dtype, shape, first, total)
            first += shape[0]
    for tensor in checkpoint.others:
        if not tensor.key.endswith("lm_head.weight"):
            entries[tensor.key] = tensor.dtype, tensor.shape, partial(stored_blocks, tensor, progress)
    write_checkpoint(directory, checkpoint.directory, entries, read_json(checkpoint.directory / "config.json"))
