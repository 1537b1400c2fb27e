"""Files on disk, whatever they are of: safetensors and JSON, read strictly, and what is written whole or not at all."""

import json
import os
import re
import secrets
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from math import prod
from pathlib import Path
from reprlib import repr as shown  # cut, where it is long
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

FORMAT, FORMAT_VERSION = "gemma-fast", "1"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INT_DTYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8}
FP8_DTYPE = "F8_E4M3"
STORED_DTYPES = {**DTYPES, **INT_DTYPES, FP8_DTYPE: torch.float8_e4m3fn}
MAX_JSON = 100_000_000  # bytes, as in the library: of a safetensors file's header


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


def torch_dtype(tensor: StoredTensor) -> torch.dtype:
    return STORED_DTYPES[tensor.dtype]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file (https://huggingface.co/docs/safetensors: 8 bytes header length,
    JSON, data). Raises ValueError if the file is cut, longer than its header says, or no safetensors file."""
    size = _size(file)
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = f.read(length) if length <= min(size - 8, MAX_JSON) else b""
    try:
        if not header.startswith(b"{"):
            raise ValueError("its header is not complete")
        entries = _parse(header)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"its metadata are {shown(metadata)}, not text")
        tensors = {key: _stored_tensor(file, key, entry, 8 + length) for key, entry in entries.items()}
    except ValueError as error:
        raise ValueError(f"{file} is cut or is no safetensors file: {error}") from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.bytes):
        if tensor.bytes[0] != end:
            raise ValueError(f"{file} is damaged: {tensor.key} does not begin where the tensor before it ends")
        end = tensor.bytes[1]
    if size != end:
        raise ValueError(f"{file} is damaged: {size:,} bytes, where its header describes {end:,}; download it again")
    return tensors, metadata


def _stored_tensor(file: Path, key: str, entry: dict, base: int) -> StoredTensor:
    """What an entry of a header says, whose data begin at `base`. Raises ValueError for what the format does not
    have."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key} is {shown(entry)}, not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for values in (shape, offsets):
        if not isinstance(values, list) or not all(type(n) is int and n >= 0 for n in values):
            raise ValueError(f"{key} has {shown(values)}, not a list of whole numbers")
    if not isinstance(dtype, str) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{key} has the dtype {shown(dtype)} and the offsets {shown(offsets)}")
    return StoredTensor(file, key, dtype, tuple(shape), (base + offsets[0], base + offsets[1]))


def open_tensors(file: Path) -> safe_open:
    """`safe_open`. Raises ValueError for what `read_header` lets pass and the library doesn't, an unknown dtype for
    one."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _size(file: Path) -> int:
    """In bytes. Raises ValueError if `file` is none, but a directory, a link to nowhere, or a pipe, which may not
    end."""
    if not file.is_file():
        raise ValueError(f"{file} is no regular file")
    return file.stat().st_size


def _parse(text: bytes) -> dict:
    """A JSON object in UTF-8. Raises ValueError for anything else, and for a key that comes twice, NaN, a byte order
    mark or nesting too deep to read, which JSON (https://www.rfc-editor.org/rfc/rfc8259) refuses or leaves open."""

    def unique(pairs: list) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{shown(name)} comes twice")
        return content

    def refuse(constant: str):
        raise ValueError(f"{constant} is no number")

    try:
        content = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    return content


def read_json(file: Path) -> dict:
    """Raises ValueError, naming the file, if it holds no JSON object."""
    if _size(file) > MAX_JSON:
        raise ValueError(f"{file} has more than {MAX_JSON:,} bytes")
    try:
        return _parse(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is cut or damaged: not valid JSON ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_safetensors(
    file: Path, entries: dict[str, tuple[str, tuple[int, ...], Callable[[], Iterable]]], metadata: dict[str, str]
):
    """Writes name -> (dtype as safetensors spells it, shape, what gives the tensor's bytes in blocks), one by one.

    `metadata` says the file's format, unless it is ours. The library's own writer wants all tensors in memory. Raises
    ValueError if a tensor's bytes are too few or many.
    """
    if metadata.get("format") != "pt":  # Hugging Face's
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION} | metadata
    header, offset = {"__metadata__": metadata}, 0
    for name, (dtype, shape, _) in entries.items():
        size = prod(shape) * STORED_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # the mapped tensors start at a multiple of 64 bytes

    def write(out):
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (_, _, blocks) in entries.items():
            for block in blocks():
                out.write(block)
            if out.tell() != 8 + len(encoded) + header[name]["data_offsets"][1]:
                raise ValueError(f"{name} became shorter or longer while it was read")

    write_atomically(file, write)


def check_writable(file: Path):
    """Raises an OSError that names `file` if it can't be written, at the start of a program whose result comes late.

    Leaves nothing behind, what a killed run left for the same file included.
    """
    with _temporary(file):
        pass


def write_atomically(file: Path, write: Callable):
    """Calls write(open binary file) on a temporary name beside `file` and renames it: a crash leaves no half file.

    Raises an OSError that names `file` if there is no room, or as `check_writable`.
    """
    with _temporary(file) as out:
        write(out)
        out.flush()
        os.replace(out.name, file)


@contextmanager
def _temporary(file: Path) -> Iterator[BinaryIO]:
    """An open binary file beside `file`, under a name of its own, which is removed unless it was renamed.

    It is locked while it is open, so that one whose lock can be had is of a run that was killed: those are removed.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file} can't be written: there is no directory {file.parent}")
    if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
        raise PermissionError(f"{file} can't be written: it is {'read-only' if file.is_file() else 'no regular file'}")
    for other in file.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(file.name)}\.\d+\.tmp", other.name):
            with suppress(OSError), open(other, "rb+") as left_over:
                flock(left_over, LOCK_EX | LOCK_NB)
                other.unlink()
    try:
        while True:
            temporary = file.with_name(f".{file.name}.{secrets.randbits(32)}.tmp")
            with open(temporary, "xb") as out:
                with suppress(OSError):  # a file system without locks
                    flock(out, LOCK_EX)
                if temporary.exists():  # else another run took it for a left one before it was locked
                    yield out
                    break
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary), temporary):  # the disk is full, for one
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
