"""What the programs have in common: the parser, errors as one line, and the figures at the end of a run."""

import argparse
import io
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

import interrupt
import ops
from cache import KV_CACHE_DTYPES
from device import GIB, copy_bandwidth, peak_memory
from model import Transformer

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny-gemma"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError where the original prints and exits."""

    def error(self, message: str):
        hint = "--help lists the options"
        if "expected" in message:  # argparse took what begins with a minus for an option
            hint = "write --option=-value where a value begins with '-'; " + hint
        raise ValueError(f"{message} ({hint})")

    def print_help(self, file=None):
        print(self.format_help(), end="", file=file, flush=True)  # argparse would hide that stdout is full


def number(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], int | float]:
    """What argparse's `type` takes for a number of that kind from `least` to `most`; NaN and infinity are none."""

    def read(text: str) -> int | float:
        rule = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {name}, {rule}, not {text!r}")
        return value

    return read


def path(text: str) -> Path:
    """What argparse's `type` takes for a path: an empty one, which pathlib takes for the current directory, is none."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not ''")
    return Path(text)


def add_model_options(parser: argparse.ArgumentParser, *names: str):
    """Adds those of the options that several programs take and that are named: checkpoint_path, fp8, ops and so on."""
    options = {
        "checkpoint_path": dict(
            type=path,
            default=DEFAULT_CHECKPOINT,
            metavar="PATH",
            help="directory, or weight file in it (default: checkpoints/tiny-gemma beside this program)",
        ),
        "adapter": dict(
            type=path, metavar="DIR", help="a LoRA adapter in PEFT's format, merged while loading (default: none)"
        ),
        "fp8": dict(action="store_true", help="FP8 weights and products (calibrate.py makes the scaling factors)"),
        "kv_cache_dtype": dict(choices=KV_CACHE_DTYPES, default="auto", help="auto: as --precision (default: auto)"),
        "device": dict(choices=("cuda", "cpu"), help="(default: cuda where there is a GPU)"),
        "ops": dict(
            choices=ops.NAMES, default="auto", help="what runs the layers (default: kernels on a GPU, else torch)"
        ),
        "tp": dict(
            type=number(int, 1),
            default=1,
            metavar="N",
            help="GPUs that share the model, each by a process that torchrun starts (default: 1)",
        ),
        "precision": dict(choices=tuple(PRECISIONS), default="bf16", help="of activations (default: %(default)s)"),
    }
    for name in names:
        parser.add_argument(f"--{name}", **options[name])


def run_program(run: Callable, parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Parses, runs and gives the exit status: 0, or 2 with one line on stderr for what the user can mend, or 130 for
    Ctrl-C."""
    warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
    status = 0
    try:
        with interrupt.raised():
            _ready_streams()
            run(parser.parse_args(argv))
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout is gone
        pass
    except (ValueError, OSError, MemoryError) as error:
        print_error(error)
        status = 2
    except KeyboardInterrupt:
        status = 130
    # What can't be written, Python would complain of once more on exit
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def print_error(error: Exception):
    """Prints an error as one line on stderr."""
    with suppress(OSError):  # then there is nobody to tell
        print(f"error: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)


def _ready_streams():
    """Makes the standard streams fit for any text, and sees to those that are closed. Raises ValueError without
    stdout."""
    for descriptor in range(3):  # the next file that is opened would get the number of a closed one, and its output
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")  # else print would write to stdout
    if sys.stdout is None:
        raise ValueError("stdout is closed")
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)


@dataclass
class Stats:
    """Seconds and counts of one or more `generate` calls."""

    compile_seconds: float = 0.0  # allocating caches and packing weights for a CPU, too
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    rows: int = 0
    steps: int = 0
    bytes_read: int = 0  # weights and valid KV cache entries that the decode steps had to read
    running: int = 0  # rows in use when the newest completion came
    drafts: Counter = field(default_factory=Counter)  # that mattered, by their place in a step
    right: Counter = field(default_factory=Counter)  # and those that were right
    draft_seconds: float = 0.0  # of decode_seconds, those that making drafts took

    @property
    def decode_rate(self) -> float:
        """New tokens a second of decoding, all rows together; the first of each row is prefill's."""
        return (self.new_tokens - self.rows) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens that a step appends to a row; the first of each row is prefill's."""
        drawn = self.new_tokens - self.rows
        return drawn / (drawn - self.right.total())

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes_read / self.decode_seconds if self.decode_seconds else 0.0


OPS_IN_WORDS = {
    "kernels": "by the Triton kernels",
    "torch": "by PyTorch",
    "te": "by TransformerEngine and the Triton kernels",
}


def _drafts_in_words(stats: Stats) -> str:
    """A line, where there were drafts."""
    if not stats.drafts:
        return ""
    shares = " ".join(f"{stats.right[place] / count:.2f}" for place, count in sorted(stats.drafts.items()))
    share = f", {stats.draft_seconds / stats.decode_seconds:.0%} of decoding" if stats.draft_seconds else ""
    return (
        f"drafts: {stats.tokens_per_step:.2f} tokens a row and step, {shares} right by place behind right ones{share}\n"
    )


def print_figures(stats: Stats, load_seconds: float, model: Transformer, seed: int | None):
    """Prints the figures of a run to stderr; seed None: of one that draws nothing."""
    device = model.device
    peak = peak_memory(device)  # before the bandwidth's own buffers
    bandwidth = copy_bandwidth(device)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} {OPS_IN_WORDS[model.ops.name]}"
    if model.sums is not None:
        name = f"first of {model.sums.shard.count} ranks, on {name}"
    merged = "" if model.adapter is None else f", with {model.adapter}"
    print(
        f"{name}, {str(model.dtype).removeprefix('torch.')}{'' if seed is None else f', seed {seed}'}{merged}\n"
        f"load {load_seconds:.2f} s, compile {stats.compile_seconds:.2f} s, "
        f"prefill {stats.prefill_seconds:.3f} s ({stats.prompt_tokens} tokens), "
        f"decode {stats.decode_seconds:.3f} s ({stats.new_tokens} tokens in {stats.rows} rows)\n"
        f"decode {stats.decode_rate:.1f} tokens/s, {stats.bandwidth / 1e9:.1f} GB/s, "
        f"{stats.bandwidth / bandwidth:.0%} of the copy bandwidth ({bandwidth / 1e9:.1f} GB/s)\n"
        f"{_drafts_in_words(stats)}"
        f"peak memory {peak / GIB:.2f} GiB",
        file=sys.stderr,
    )
