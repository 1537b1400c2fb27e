"""Checkpoints that benchmark.py makes for a while: of random weights to load, of trained weights in every format."""

import gc
import io
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch

import calibrate
import eval as evaluation
import quantize
from benchmarks.peers import hf_config
from checkpoint import CONVERTED_NAME, Checkpoint, convert, fp8_scale_names, parameter_name, sources
from cli import DEFAULT_CHECKPOINT
from config import ModelConfig
from files import FP8_DTYPE, tensor_bytes, write_safetensors
from model import Transformer

E4M3, GIB = torch.float8_e4m3fn, 2**30
FP8_NAME = "gemma-fp8.safetensors"
INTEGERS = {"int8": {"format": "int8"}}
INTEGERS |= {
    f"{mode}-g{group}": {"format": "int4", "group": group} for mode in ("int4", "int4-gptq") for group in (32, 128)
}
PRECISIONS = {  # options of Transformer.random, dtype of the KV cache; "all": the embedding, which is the head, too
    "bf16": ({}, None),
    "fp8": ({"format": "fp8"}, None),
    "fp8-kv": ({"format": "fp8"}, E4M3),
    "fp8-all": ({"format": "fp8", "head": True}, E4M3),
    **{
        name + end: (options | head, None)
        for name, options in INTEGERS.items()
        for end, head in (("", {}), ("-all", {"head": True}))
    },
}


def release():
    """Gives the memory of models that nobody refers to any more back to the GPU."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # code that was compiled for a peer holds its model
        torch.compiler.reset()
    torch.cuda.empty_cache()


@contextmanager
def synthetic_checkpoint(name: str, device: torch.device) -> Iterator[Path | None]:
    """A temporary directory with an FP8 checkpoint of random weights; None, and a line, if the disk has no room."""
    config = ModelConfig.from_name(name)
    needed = sum(math.prod(shape) for parts in sources(config).values() for _, shape in parts)
    with tempfile.TemporaryDirectory() as directory:
        free = shutil.disk_usage(directory).free
        if free < 1.1 * needed:
            print(f"{name} is left out: {directory} has {free / GIB:.1f} GiB, its file needs {needed / GIB:.1f}")
            yield None
            return
        write_checkpoint(Path(directory), config, device)
        release()
        yield Path(directory)


def write_checkpoint(directory: Path, config: ModelConfig, device: torch.device):
    """Writes FP8 layers and head, factors of 1.0 for K and V, and tiny-gemma's tokenizer, whose ids are the first of
    many."""
    parameters = Transformer.random(config, device, format="fp8", head=True).state_dict()
    names = (*sources(config), *fp8_scale_names(config))
    weights = {name: parameters.get(parameter_name(name), torch.ones(())) for name in names}
    dtypes = {torch.bfloat16: "BF16", torch.float32: "F32", E4M3: FP8_DTYPE}
    entries = {
        name: (dtypes[weight.dtype], tuple(weight.shape), lambda weight=weight: [tensor_bytes(weight.cpu())])
        for name, weight in weights.items()
    }
    write_safetensors(directory / FP8_NAME, entries, {"weight_format": "fp8"})
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    shutil.copy(DEFAULT_CHECKPOINT / "tokenizer.model", directory)


def quality(checkpoint: Checkpoint, precisions: list[str], text: Path, calibration_text: Path) -> Iterator[dict]:
    """Yields a row for BF16, which the others are compared with, and one for each of `precisions`: the size of the file
    in MB and what eval.py says of it on `text`."""
    with tempfile.TemporaryDirectory() as temporary:
        directory, bf16 = Path(temporary), None
        convert(checkpoint, directory / CONVERTED_NAME)
        for name in ("config.json", "generation_config.json", "tokenizer.model"):
            if (checkpoint.directory / name).exists():
                shutil.copy(checkpoint.directory / name, directory)
        if any("fp8" in precision for precision in precisions):
            output_of(calibrate, "--checkpoint_path", directory, "--text", calibration_text)
        for precision in dict.fromkeys(("bf16", *precisions)):
            file, options = directory / CONVERTED_NAME, ["--text", text]
            if precision != "bf16":
                output_of(quantize, "--checkpoint_path", directory, *quantize_options(precision, calibration_text))
                file = directory / f"gemma-{re.sub('-(kv|all)$', '', precision)}.safetensors"
                options += ["--against", directory / CONVERTED_NAME]
            if PRECISIONS[precision][1] is not None:
                options += ["--kv_cache_dtype", "fp8_e4m3"]
            figures = json.loads(output_of(evaluation, "--json", "--checkpoint_path", file, *options))
            bf16 = bf16 or figures["perplexity"]
            row = {"checkpoint": checkpoint.directory.resolve().name, "precision": precision}
            row |= {"disk_mb": file.stat().st_size / 1e6, **figures}
            yield row | {"change_percent": 100 * (figures["perplexity"] / bf16 - 1)}
            if precision != "bf16":
                file.unlink()
            release()


def quantize_options(precision: str, text: Path) -> list:
    """Returns the arguments with which quantize.py writes the file of a precision."""
    options, gptq = PRECISIONS[precision][0], "gptq" in precision
    mode = options["format"]
    head = "--fp8_head" if mode == "fp8" else "--quantize_embedding"
    arguments = ["--mode", mode + "-gptq" * gptq]
    arguments += ["--group_size", options["group"]] if "group" in options else []
    arguments += ["--text", text, "--max_tokens", 32768] if gptq else []
    return arguments + [head] * ("head" in options)


def output_of(program, *arguments) -> str:
    """Runs calibrate.py, quantize.py or eval.py and returns what it prints on stdout; its failure, which it has told,
    ends this program."""
    with redirect_stdout(io.StringIO()) as output:
        if status := program.main([str(argument) for argument in arguments]):
            raise SystemExit(status)
    return output.getvalue()
