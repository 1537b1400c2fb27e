"""Every figure in the README. `python benchmark.py PROTOCOL` prints a table and, with --output, writes JSON.

Each case runs once to warm up, its time given apart, and then --repeats times: medians, and the spread from the fastest
to the slowest. Models have random weights at the published sizes. `share_of_copy_bandwidth` is what a decode step has to
read (weights, valid keys and values) over its time, as a share of what a large copy moves; `floor_ms` is the time of a
step at that speed.
"""

import argparse
import datetime
import gc
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import calibrate
import eval as evaluation
import quantize
from checkpoint import (
    CONVERTED_NAME,
    FP8_DTYPE,
    Checkpoint,
    convert,
    fp8_scale_names,
    open_checkpoint,
    sources,
    tensor_bytes,
    write_atomically,
    write_safetensors,
)
from generate import (
    DEFAULT_CHECKPOINT,
    Parser,
    Sampling,
    Stats,
    _now,
    copy_bandwidth,
    decoder_for,
    generate,
    load_model,
    pick_device,
    run_program,
)
from model import ModelConfig, Transformer

ROOT = Path(__file__).parent
OURS = "gemma-fast"
E4M3, GIB = torch.float8_e4m3fn, 2**30
INTEGERS = {"int8": {"bits": 8}}
INTEGERS |= {f"{mode}-g{group}": {"bits": 4, "group": group} for mode in ("int4", "int4-gptq") for group in (32, 128)}
PRECISIONS = {  # options of Transformer.random, dtype of the KV cache; "all": the embedding, which is the head, too
    "bf16": ({}, None),
    "fp8": ({"fp8": True}, None),
    "fp8-kv": ({"fp8": True}, E4M3),
    "fp8-all": ({"fp8": True, "head": True}, E4M3),
    **{
        name + end: (options | head, None)
        for name, options in INTEGERS.items()
        for end, head in (("", {}), ("-all", {"head": True}))
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Protocols: each yields its rows as they come


def tutorial(args: argparse.Namespace, batch: int = 64, longest: int = 20, new_tokens: int = 492) -> Iterator[dict]:
    """TransformerEngine's Gemma tutorial: batch 64, prompts of at most 20 tokens, 492 new, greedy, no stop, the whole
    call. The tutorial pads prompts to 512 positions and computes them all: padded_seconds is such a prefill and our
    decoding. Peer: transformers, prompts padded on the left."""
    shape = {"batch": batch, "context": f"2..{longest}", "new_tokens": new_tokens}

    def of_model(model: Transformer, kv_dtype, case: dict):
        vocab_size = model.config.vocab_size
        prompts = tutorial_prompts(batch, longest, vocab_size)
        run = ours(model, prompts, new_tokens, compile=True, kv_cache_dtype=kv_dtype)
        (row,) = measure(args, {OURS: run}, case | shape)
        prompts = random_prompts(batch, longest + new_tokens, vocab_size)
        run = ours(model, prompts, 1, compile=True, kv_cache_dtype=kv_dtype)
        runs = time_in_turn({OURS: run}, args.repeats, args.device)[OURS]
        prefill = median(stats.prefill_seconds for _, stats in runs[1:])
        yield row | rounded({"padded_prefill_seconds": prefill, "padded_seconds": prefill + row["decode_seconds"]})

    yield from each_model(args, of_model)
    for name in args.models if args.peers and have_transformers() else ():
        peer = peer_model(name, args.device)
        prompts = tutorial_prompts(batch, longest, peer.config.vocab_size)
        for cache in ("dynamic", "static"):
            run = transformers_generate(peer, prompts, new_tokens, cache_implementation=cache)
            case = {"model": name, "precision": "bf16", **shape}
            yield from measure(args, {f"transformers, {cache} cache": run}, case, repeats=2)
        del peer, run
        release()


def latency(
    args: argparse.Namespace, contexts: tuple[int, ...] = (128, 1024, 4096, 8000), new_tokens: int = 100
) -> Iterator[dict]:
    """Batch 1 behind prompts of 128 to 8,000 tokens, 100 new. Peer, at the first: transformers, static cache, compiled."""

    def of_model(model: Transformer, kv_dtype, case: dict):
        for context in contexts:
            prompts = random_prompts(1, context, model.config.vocab_size)
            run = ours(model, prompts, new_tokens, compile=True, kv_cache_dtype=kv_dtype)
            yield from measure(args, {OURS: run}, case | {"batch": 1, "context": context, "new_tokens": new_tokens})

    yield from each_model(args, of_model)
    for name in args.models if args.peers and have_transformers() else ():
        peer = peer_model(name, args.device)
        prompts = random_prompts(1, contexts[0], peer.config.vocab_size)
        run = transformers_generate(peer, prompts, new_tokens, cache_implementation="static")
        case = {"model": name, "precision": "bf16", "batch": 1, "context": contexts[0], "new_tokens": new_tokens}
        yield from measure(args, {"transformers, static cache": run}, case)
        del peer, run
        release()


def sweep(
    args: argparse.Namespace,
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    context: int = 128,
    new_tokens: int = 64,
) -> Iterator[dict]:
    """Batch 1 to 256, or --batches, 128 prompt tokens, 64 new; with --picture also an SVG. gpu_gib is the most that was
    allocated."""

    def of_model(model: Transformer, kv_dtype, case: dict):
        case["weights_gib"] = round(model.weight_bytes / GIB, 2)
        for batch in args.batches or batches:
            prompts = random_prompts(batch, context, model.config.vocab_size)
            run = ours(model, prompts, new_tokens, compile=True, kv_cache_dtype=kv_dtype)
            shape = {"batch": batch, "context": context, "new_tokens": new_tokens}
            torch.cuda.reset_peak_memory_stats()
            try:
                (row,) = measure(args, {OURS: run}, case | shape)
                yield row | {"gpu_gib": round(torch.cuda.max_memory_allocated() / GIB, 2)}
            except ValueError as error:
                if "memory" not in str(error):
                    raise
                print(f"{case['model']} {case['precision']}, batch {batch} is left out: {error}", flush=True)

    yield from each_model(args, of_model)


def weights(args: argparse.Namespace) -> Iterator[dict]:
    """What to choose weights by. Quality: of each trained --checkpoint_path, calibrate.py and quantize.py make each format
    with --calibration_text (GPTQ with 32,768 tokens of it) in a temporary directory (TMPDIR), and eval.py compares it with
    BF16 on --text; disk_mb is the file's. Sizes and speeds, on a GPU: disk_gib of the file, and what `sweep` measures at
    batch 1, 8 and 64; GPTQ's weights have int4's layout, which is measured once for both."""
    for checkpoint in [open_checkpoint(path) for path in args.checkpoint_path or ()]:  # each is looked at first
        yield from quality(args, checkpoint)
    if args.device.type != "cuda":
        print("speeds are left out: they need a CUDA GPU", flush=True)
        return
    layouts = {precision: precision.replace("-gptq", "") for precision in args.precisions}
    args = argparse.Namespace(**vars(args) | {"precisions": list(dict.fromkeys(layouts.values()))})
    for row in sweep(args, batches=(1, 8, 64)):
        row["disk_gib"] = row.pop("weights_gib")
        yield from (row | {"precision": name} for name, layout in layouts.items() if layout == row["precision"])


def stop_check(
    args: argparse.Namespace, batches: tuple[int, ...] = (1, 8, 64), context: int = 128, new_tokens: int = 200
) -> Iterator[dict]:
    """What it costs to learn whether all rows have stopped: as generate does it (ping-pong), and waiting for every
    step, against never; 128 prompt tokens, 200 new, in turn, at least 5 repeats."""

    def of_model(model: Transformer, kv_dtype, case: dict):
        for batch in batches:
            run = partial(ours, model, random_prompts(batch, context, model.config.vocab_size), new_tokens)
            options = {"compile": True, "kv_cache_dtype": kv_dtype}
            runners = {check: run(stop_check=check, **options) for check in ("never", "every", "ping-pong")}
            shape = {"batch": batch, "context": context, "new_tokens": new_tokens}
            rows = measure(args, runners, case | shape, repeats=max(5, args.repeats))
            for row in rows:
                overhead = row["decode_seconds"] / rows[0]["decode_seconds"] - 1
                yield row | {"overhead_percent": round(100 * overhead, 2)}

    yield from each_model(args, of_model)


def startup(args: argparse.Namespace) -> Iterator[dict]:
    """From process start to the first text of `generate.py --compile --fp8`, two tokens, from a file just written (in
    the page cache), with empty (cold) and filled (warm) caches of compiled kernels. The file has random FP8 weights and
    goes to a temporary directory (TMPDIR)."""
    options = ("--compile", "--fp8", "--kv_cache_dtype", "fp8_e4m3", "--max_new_tokens", "2", "--temperature", "0")
    for name in args.models:
        with synthetic_checkpoint(name, args.device) as directory:
            if directory is None:
                continue
            size, runs = (directory / FP8_NAME).stat().st_size, {"cold": [], "warm": []}
            for _ in range(args.repeats):
                with tempfile.TemporaryDirectory() as caches:
                    environment = {f"{kind}_CACHE_DIR": f"{caches}/{kind}" for kind in ("TRITON", "TORCHINDUCTOR")}
                    for values in runs.values():
                        path = "--checkpoint_path", str(directory)
                        values.append(first_output(args.device, *options, *path, **environment))
        for kind, values in runs.items():
            seconds = [value for value, _ in values]
            row = {"model": name, "kernel_caches": kind, "seconds": median(seconds)}
            row |= {"seconds_spread": [min(seconds), max(seconds)]}
            parts = [start_parts(*value) for value in values]
            row |= {f"{part}_seconds": median(p[part] for p in parts) for part in parts[0]}
            yield rounded(row | {"load_gb_per_second": size / row["load_seconds"] / 1e9})


def prefill(
    args: argparse.Namespace,
    shapes: tuple[tuple[int, int], ...] = ((1, 512), (1, 2048), (1, 8000), (8, 2048)),
    matrix_size: int = 8192,
) -> Iterator[dict]:
    """Prefill alone, 512 to 8,000 tokens, against a large matrix product, which is measured first: layers and causal
    attention, without and with --compile_prefill."""
    peaks = {}
    for precision in args.precisions:
        peaks[precision] = matrix_rate(args.device, "fp8" in PRECISIONS[precision][0], matrix_size)
        name = f"matrix product, {matrix_size} cubed"
        yield rounded({"name": name, "precision": precision, "tflop_per_second": peaks[precision] / 1e12})
    release()

    def of_model(model: Transformer, kv_dtype, case: dict):
        for (batch, tokens), compile_prefill in product(shapes, (False, True)):
            runs = time_prefill(args, model, batch, tokens, kv_dtype, compile_prefill)
            row = case | {"batch": batch, "context": tokens, "compile_prefill": compile_prefill} | seconds_of(runs)
            rate = prefill_flop(model, batch, tokens) / row["seconds"]
            row |= {"tokens_per_second": batch * tokens / row["seconds"], "tflop_per_second": rate / 1e12}
            yield rounded(row | {"share_of_matrix_product": rate / peaks[case["precision"]]})

    yield from each_model(args, of_model)


def memory(args: argparse.Namespace) -> Iterator[dict]:
    """GiB on the GPU, each case in a process of its own, without and with expandable segments: batch 1 and 64, 128
    prompt tokens, 384 new; and loading an FP8 file, its peak above the weights. An E4M3 KV cache is half of BF16's;
    fragmentation is the share of the reserved peak that was never allocated."""
    settings = {kind: {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{kind}"} for kind in (False, True)}
    for name, precision, batch in product(args.models, args.precisions, (1, 64)):
        for expandable, environment in settings.items():
            case = {"model": name, "precision": precision, "batch": batch, "expandable_segments": expandable}
            yield case | in_process(memory_of_run, name, precision, batch, **environment)
    for name in args.models:
        with synthetic_checkpoint(name, args.device) as directory:
            for expandable, environment in settings.items() if directory else ():
                case = {"model": name, "precision": "fp8-all", "name": "load", "expandable_segments": expandable}
                yield case | in_process(memory_of_load, str(directory), args.repeats, **environment)


def cpu(args: argparse.Namespace) -> Iterator[dict]:
    """tiny-gemma, batch 1 and 16, 32 prompt tokens, 200 new, in turn with transformers; and the time from process start
    to the first token."""
    eager, compiled = (load_model(DEFAULT_CHECKPOINT, args.device)[0] for _ in range(2))
    peer = None
    if args.peers and have_transformers():
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.bfloat16)
    for batch in (1, 16):
        prompts = random_prompts(batch, 32, eager.config.vocab_size)
        runners = {"eager": ours(eager, prompts, 200), "compile": ours(compiled, prompts, 200, compile=True)}
        if peer is not None:
            runners["transformers"] = transformers_generate(peer, prompts, 200)
        rows = measure(args, runners, {"model": "tiny-gemma", "batch": batch, "context": 32, "new_tokens": 200})
        for row in rows:
            if peer is not None:
                row["times_transformers"] = round(row["tokens_per_second"] / rows[-1]["tokens_per_second"], 2)
            yield row
    seconds = [first_output(args.device, "--max_new_tokens", "1")[0] for _ in range(args.repeats)]
    row = {"model": "tiny-gemma", "name": "process start to first token", "seconds": median(seconds)}
    yield rounded(row | {"seconds_spread": [min(seconds), max(seconds)]})


class Protocol(NamedTuple):
    rows: Callable[[argparse.Namespace], Iterator[dict]]
    device: str
    models: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()


PROTOCOLS = {
    "tutorial": Protocol(tutorial, "cuda", ("gemma-7b",), ("bf16", "fp8", "fp8-kv", "fp8-all")),
    "latency": Protocol(latency, "cuda", ("gemma-2b", "gemma-7b"), ("bf16", "fp8-all")),
    "sweep": Protocol(sweep, "cuda", ("gemma-7b",), ("bf16", "fp8-all")),
    "weights": Protocol(weights, "cuda", ("gemma-7b",), tuple(PRECISIONS)),
    "stop-check": Protocol(stop_check, "cuda", ("gemma-2b",), ("bf16", "fp8-all")),
    "startup": Protocol(startup, "cuda", ("gemma-7b",)),
    "prefill": Protocol(prefill, "cuda", ("gemma-7b",), ("bf16", "fp8")),
    "memory": Protocol(memory, "cuda", ("gemma-7b",), ("bf16", "fp8", "fp8-all")),
    "cpu": Protocol(cpu, "cpu"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Models and prompts


def random_model(name: str, precision: str, device: torch.device) -> tuple[Transformer, torch.dtype | None]:
    """A model of random weights, as `load_model` would have made it, and the dtype of its KV cache."""
    options, kv_dtype = PRECISIONS[precision]
    model = Transformer.random(ModelConfig.from_name(name), device, **options)
    model.has_kv_scales = True  # of 1.0, which does for random values
    return model, kv_dtype


def each_model(args: argparse.Namespace, of_model: Callable[..., Iterator[dict]]) -> Iterator[dict]:
    """The rows of of_model(model, KV cache's dtype, case) for each model and precision, one in memory at a time: nobody
    here keeps a reference."""
    for name, precision in product(args.models, args.precisions):
        yield from of_model(*random_model(name, precision, args.device), {"model": name, "precision": precision})
        release()


def release():
    gc.collect()
    if "torch._dynamo" in sys.modules:  # a peer's compiled code holds its model
        torch.compiler.reset()
    torch.cuda.empty_cache()


def hf_config(config: ModelConfig) -> dict:
    """config.json of a Gemma 1, as Hugging Face has it."""
    return {
        "model_type": "gemma",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
    }


def peer_model(name: str, device: torch.device):
    """transformers' model of the same sizes, random weights, BF16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with device:
        config = AutoConfig.for_model(**hf_config(ModelConfig.from_name(name)))
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def have_transformers() -> bool:
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no peer is timed", file=sys.stderr)
        return False
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return True


def random_prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """<bos> and random ids, the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, vocab_size, (rows, length), generator=generator)
    tokens[:, 0] = 2
    return tokens.tolist()


def tutorial_prompts(rows: int, longest: int, vocab_size: int) -> list[list[int]]:
    """<bos> and at least one random id each, `longest` tokens at most."""
    lengths = torch.randint(2, longest + 1, (rows,), generator=torch.Generator().manual_seed(1)).tolist()
    return [prompt[:length] for prompt, length in zip(random_prompts(rows, longest, vocab_size), lengths)]


FP8_NAME = "gemma-fp8.safetensors"


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
    """FP8 layers and head, factors of 1.0 for K and V, and tiny-gemma's tokenizer, whose ids are the first of many."""
    weights = Transformer.random(config, device, fp8=True, head=True).state_dict()
    weights |= {name: torch.ones(()) for name in fp8_scale_names(config) if name not in weights}
    dtypes = {torch.bfloat16: "BF16", torch.float32: "F32", E4M3: FP8_DTYPE}
    entries = {
        name: (dtypes[weight.dtype], tuple(weight.shape), lambda weight=weight: [tensor_bytes(weight.cpu())])
        for name, weight in weights.items()
    }
    write_safetensors(directory / FP8_NAME, entries, {"weight_format": "fp8"})
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    shutil.copy(DEFAULT_CHECKPOINT / "tokenizer.model", directory)


# ---------------------------------------------------------------------------------------------------------------------
# Trained checkpoints


def quality(args: argparse.Namespace, checkpoint: Checkpoint) -> Iterator[dict]:
    """BF16's row, which the others are compared with, and one for each of args.precisions."""
    with tempfile.TemporaryDirectory() as temporary:
        directory, bf16 = Path(temporary), None
        convert(checkpoint, directory / CONVERTED_NAME)
        for name in ("config.json", "generation_config.json", "tokenizer.model"):
            if (checkpoint.directory / name).exists():
                shutil.copy(checkpoint.directory / name, directory)
        if any("fp8" in precision for precision in args.precisions):
            output_of(calibrate, "--checkpoint_path", directory, "--text", args.calibration_text)
        for precision in dict.fromkeys(("bf16", *args.precisions)):
            file, options = directory / CONVERTED_NAME, ["--text", args.text]
            if precision != "bf16":
                output_of(quantize, "--checkpoint_path", directory, *quantize_options(precision, args.calibration_text))
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
    """What makes quantize.py write the file of a precision."""
    options, gptq = PRECISIONS[precision][0], "gptq" in precision
    mode, head = ("fp8", "--fp8_head") if "fp8" in options else (f"int{options['bits']}", "--quantize_embedding")
    arguments = ["--mode", mode + "-gptq" * gptq]
    arguments += ["--group_size", options["group"]] if "group" in options else []
    arguments += ["--text", text, "--max_tokens", 32768] if gptq else []
    return arguments + [head] * ("head" in options)


def output_of(program, *arguments) -> str:
    """What calibrate.py, quantize.py or eval.py prints on stdout; its failure, which it has told, ends this program."""
    with redirect_stdout(io.StringIO()) as output:
        if status := program.main([str(argument) for argument in arguments]):
            raise SystemExit(status)
    return output.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def ours(model: Transformer, prompts: list[list[int]], new_tokens: int, **options) -> Callable[[], Stats]:
    def run() -> Stats:
        stats = Stats()
        options_of_all = {"temperature": 0, "stop_ids": (), "batch_size": len(prompts), "stats": stats}
        generate(model, prompts, new_tokens, **options_of_all, **options)
        return stats

    return run


def transformers_generate(model, prompts: list[list[int]], new_tokens: int, **options) -> Callable[[], None]:
    """The peer's own loop: greedy, no stop token, dynamic cache unless `options` say otherwise; padded on the left."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)

    def run():
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)
        assert output.shape[1] == width + new_tokens

    return run


def time_in_turn(runners: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[tuple]]:
    """(seconds, what it returned) of each of 1 + `repeats` runs of each runner: a drift of the machine's speed meets
    all alike."""
    runs = {name: [] for name in runners}
    for _ in range(1 + repeats):
        for name, run in runners.items():
            start = _now(device)
            result = run()
            runs[name].append((_now(device) - start, result))
    return runs


def seconds_of(runs: list[tuple]) -> dict:
    seconds = [value for value, _ in runs[1:]]
    return {
        "seconds": median(seconds),
        "seconds_spread": [min(seconds), max(seconds)],
        "first_run_seconds": runs[0][0],
    }


def measure(args: argparse.Namespace, runners: dict[str, Callable], case: dict, repeats: int | None = None):
    """A row for each runner. Seconds are those of the whole call; those of decoding come from our Stats."""
    rows = []
    for name, runs in time_in_turn(runners, repeats or args.repeats, args.device).items():
        row = case | {"name": name} | seconds_of(runs)
        row["tokens_per_second"] = case["batch"] * case["new_tokens"] / row["seconds"]
        if runs[0][1] is not None:
            row |= decode_figures([stats for _, stats in runs[1:]], args.bandwidth)
        rows.append(rounded(row))
    return rows


def decode_figures(repeats: list[Stats], bandwidth: float) -> dict:
    """Of the same run, repeated; `bandwidth`, a copy's, in bytes a second."""
    rates, decode = [stats.decode_rate for stats in repeats], median(stats.decode_seconds for stats in repeats)
    stats = repeats[0]
    return {
        "prefill_seconds": median(stats.prefill_seconds for stats in repeats),
        "decode_seconds": decode,
        "decode_tokens_per_second": median(rates),
        "decode_spread": [min(rates), max(rates)],
        "step_ms": 1e3 * decode / stats.steps,
        "floor_ms": 1e3 * stats.bytes_read / stats.steps / bandwidth,
        "share_of_copy_bandwidth": stats.bytes_read / decode / bandwidth,
    }


@torch.inference_mode()
def time_prefill(
    args: argparse.Namespace, model: Transformer, batch: int, tokens: int, kv_dtype, compile_prefill: bool
):
    length = min(-(-(tokens + 1) // 64) * 64, model.config.context_length)
    decoder = decoder_for(model, batch, length, kv_dtype, True, compile_prefill)
    decoder.start(model, batch, Sampling(temperature=0), ())
    prompts = random_prompts(batch, tokens, model.config.vocab_size)
    run = partial(decoder.prefill, model, prompts, [], 1)
    return time_in_turn({"prefill": run}, args.repeats, args.device)["prefill"]


def prefill_flop(model: Transformer, batch: int, tokens: int) -> float:
    """Of the layers' products and of causal attention's two, which see half of all pairs."""
    config = model.config
    layers = 2 * sum(parameter.numel() for parameter in model.layers.parameters()) * tokens
    return batch * (layers + 4 * tokens**2 / 2 * config.n_heads * config.head_dim * config.n_layers)


def matrix_rate(device: torch.device, fp8: bool, size: int) -> float:
    """FLOP a second of square products of random values, summed as ours are (no fast accumulation); the best of five."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    run, best, count = partial(torch.mm, a, b.t()), math.inf, 10
    if fp8:
        one = torch.ones((), device=device)
        options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": False}
        run = partial(torch._scaled_mm, a.to(E4M3), b.to(E4M3).t(), **options)
    for _ in range(6):
        start = _now(device)
        for _ in range(count):
            run()
        best = min(best, _now(device) - start)
    return count * 2 * size**3 / best


def first_output(device: torch.device, *options: str, **environment: str) -> tuple[float, str]:
    """Seconds from the start of generate.py to the first byte on its stdout, and what it wrote to stderr."""
    command = [sys.executable, "generate.py", "--prompt", "\n", "--device", device.type, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)
    process.stdout.read(1)
    elapsed = time.perf_counter() - start
    error = process.communicate()[1].decode()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {error}")
    return elapsed, error


def start_parts(seconds: float, figures: str) -> dict[str, float]:
    """What `generate.py` says it spent its time with; the rest is Python, its imports and the way out."""
    parts = dict.fromkeys(("load", "compile", "prefill", "decode"))
    for part in parts:
        parts[part] = float(re.search(rf"^.*\b{part} ([\d.]+) s", figures, re.MULTILINE)[1])
    return {"import_and_rest": seconds - sum(parts.values()), **parts}


def in_process(function: Callable, *arguments, **environment: str) -> dict:
    """What a function of this file returns in a new process; a failure there is told and does not end this one."""
    code = f"import benchmark, json; print(json.dumps(benchmark.{function.__name__}(*{arguments!r})))"
    command, environment = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return {"failed": done.returncode} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def memory_of_run(name: str, precision: str, batch: int, prompt_tokens: int = 128, new_tokens: int = 384) -> dict:
    model, kv_dtype = random_model(name, precision, torch.device("cuda"))
    release()
    torch.cuda.reset_peak_memory_stats()
    prompts = random_prompts(batch, prompt_tokens, model.config.vocab_size)
    ours(model, prompts, new_tokens, compile=True, kv_cache_dtype=kv_dtype)()
    shape = model.decoder.batch_size, model.decoder.length
    cache, allocated = model.cache_bytes(*shape, kv_dtype), torch.cuda.max_memory_allocated()
    reserved = torch.cuda.max_memory_reserved()
    figures = {
        "kv_cache_length": shape[1],
        "weights_gib": model.weight_bytes / GIB,
        "kv_cache_gib": cache / GIB,
        "kv_cache_of_bf16": cache / model.cache_bytes(*shape, torch.bfloat16),
        "peak_allocated_gib": allocated / GIB,
        "peak_reserved_gib": reserved / GIB,
        "fragmentation": 1 - allocated / reserved,
    }
    return rounded(figures)


def memory_of_load(directory: str, repeats: int) -> dict:
    device, sizes = torch.device("cuda"), []
    torch.cuda.init()

    def load():
        release()
        torch.cuda.reset_peak_memory_stats()
        start = _now(device)
        model = load_model(directory, device, fp8=True)[0]
        seconds = _now(device) - start
        sizes[:] = model.weight_bytes, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return seconds

    figures = seconds_of([(load(), None) for _ in range(1 + repeats)])
    weights, allocated, reserved = sizes
    figures |= {"weights_gib": weights / GIB, "peak_allocated_gib": allocated / GIB}
    figures |= {"peak_reserved_gib": reserved / GIB, "above_weights_gib": (allocated - weights) / GIB}
    size = (Path(directory) / FP8_NAME).stat().st_size
    return rounded(figures | {"load_gb_per_second": size / figures["seconds"] / 1e9})


def environment(device: torch.device) -> dict:
    """What the figures were measured with, the copy bandwidth among it."""
    versions = {}
    for package in ("torch", "triton", "transformers", "transformer-engine"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": name,
        "python": platform.python_version(),
        **versions,
        "copy_bandwidth_gb_per_second": round(copy_bandwidth(device) / 1e9, 1),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def rounded(row: dict) -> dict:
    """Floats to five digits."""

    def short(value):
        if isinstance(value, list):
            return [short(v) for v in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return {key: short(value) for key, value in row.items()}


def cell(value) -> str:
    if isinstance(value, list):
        return "..".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def table(rows: Iterable[dict]) -> str:
    """A column a key, aligned; the words of a key stand above each other."""
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    words = [key.split("_") for key in keys]
    height = max(map(len, words), default=0)
    columns = []
    for key, head in zip(keys, words):
        column = [""] * (height - len(head)) + head + [cell(row.get(key)) for row in rows]
        left = any(isinstance(row.get(key), str) for row in rows)
        width = max(map(len, column))
        columns.append([text.ljust(width) if left else text.rjust(width) for text in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def weights_tables(rows: list[dict]) -> str:
    """`weights`' rows in Markdown: a table of each random model's sizes and speeds and each checkpoint's quality."""

    def values(key: str) -> list:
        return list(dict.fromkeys(row[key] for row in rows if key in row))

    out, names = [], [name for name in PRECISIONS if name in values("precision")]
    for model, checkpoint in product(values("model") or [None], values("checkpoint") or [None]) if rows else ():
        heads, lines = {"weights": "weights"}, {name: {"weights": name} for name in names}
        for row in sorted(rows, key=lambda row: "checkpoint" in row):
            if (row.get("model", model), row.get("checkpoint", checkpoint)) == (model, checkpoint):
                lines[row["precision"]] |= (cells := weights_cells(row))
                heads |= dict(zip(cells, cells))
        titles = (model and f"{model}: sizes and tokens/s", checkpoint and f"{checkpoint}: quality")
        out += ["; ".join(filter(None, titles)), ""]
        for line in (heads, dict.fromkeys(heads, "---"), *lines.values()):
            out.append(f"| {' | '.join(line.get(head, '') for head in heads)} |")
        out.append("")
    return "\n".join(out)


def weights_cells(row: dict) -> dict[str, str]:
    if "model" in row:
        rate = f"{row['decode_tokens_per_second']:,.0f}"
        if row["batch"] > 1:
            return {f"batch {row['batch']}": rate}
        sizes = {"disk, GiB": f"{row['disk_gib']:.2f}", "GPU, GiB": f"{row['gpu_gib']:.2f}"}
        return sizes | {"batch 1": f"{rate} ({100 * row['share_of_copy_bandwidth']:.0f} %)"}
    cells = {"MB": f"{row['disk_mb']:.1f}", "perplexity": f"{row['perplexity']:.3f}"}
    if "kl" in row:
        cells["perplexity"] += f" ({row['change_percent']:+.2f} %)"
        cells |= {"KL": f"{row['kl']:.4f}", "same top token": f"{100 * row['top1_agreement']:.1f} %"}
    return cells


COLOURS = ("#1f5fa8", "#c2501b", "#2e7d4f", "#7a4fa0", "#8a6d1a", "#a8325e")


def sweep_picture(rows: list[dict], title: str) -> str:
    """SVG of `sweep`'s rows: tokens/s, dashed at the floor, and share of the copy bandwidth, both over the batch."""
    series = {}
    for row in rows:
        series.setdefault(f"{row['model']} {row['precision']}", []).append(row)
    batches = sorted({row["batch"] for row in rows})
    title += ", {context} prompt tokens, {new_tokens} new".format(**rows[0])
    rates, floors, shares = [], [], []
    for colour, values in zip(COLOURS, series.values()):
        rates.append((colour, "", [(row["batch"], row["decode_tokens_per_second"]) for row in values]))
        floors.append((colour, "5 4", [(row["batch"], 1e3 * row["batch"] / row["floor_ms"]) for row in values]))
        shares.append((colour, "", [(row["batch"], 100 * row["share_of_copy_bandwidth"]) for row in values]))
    points = [y for _, _, line in rates + floors for _, y in line]
    powers = range(math.floor(math.log10(min(points))), math.ceil(math.log10(max(points))) + 1)
    legend = [
        f'<path d="M{70 + 190 * i} 46h24" stroke="{colour}" stroke-width="2.5"/>'
        f'<text x="{100 + 190 * i}" y="50">{label}</text>'
        for i, (colour, label) in enumerate(zip(COLOURS, series))
    ]
    return "\n".join((
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 430" font-family="sans-serif" font-size="13">',
        '<rect width="960" height="430" fill="#fff"/>',
        f'<text x="70" y="26" font-size="15">{title}</text>',
        *legend,
        *panel(70, "tokens/s while decoding; dashed: at the copy bandwidth", batches, rates + floors,
               [10**power for power in powers], math.log10),
        *panel(550, "share of the copy bandwidth, %", batches, shares, range(0, 101, 20), float),
        "</svg>\n",
    ))  # fmt: skip


def panel(left: int, title: str, batches: list[int], lines: list, ticks: Iterable[int], scale: Callable) -> list[str]:
    """Lines (colour, dashes, [(batch, y)]) over the logarithm of the batch; `scale` of y is linear on the paper."""
    ticks, top, bottom, width = list(ticks), 90, 375, 370
    low, high, octaves = scale(ticks[0]), scale(ticks[-1]), math.log2(batches[-1] / batches[0]) or 1

    def x(batch: int) -> str:
        return f"{left + width * math.log2(batch / batches[0]) / octaves:.1f}"

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (scale(value) - low) / (high - low), 1)

    parts = [f'<text x="{left}" y="76">{title}</text>']
    for tick in ticks:
        parts.append(f'<path d="M{left} {y(tick)}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4}" text-anchor="end">{tick:,}</text>')
    for batch in batches:
        parts.append(f'<text x="{x(batch)}" y="{bottom + 20}" text-anchor="middle">{batch}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{bottom + 42}" text-anchor="middle">batch</text>')
    for colour, dashes, values in lines:
        points = " ".join(f"{x(batch)},{y(value)}" for batch, value in values)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        )
        if not dashes:
            parts += [f'<circle cx="{x(batch)}" cy="{y(value)}" r="3.5" fill="{colour}"/>' for batch, value in values]
    return parts


def write_text(file: Path, text: str):
    write_atomically(file, lambda out: out.write(text.encode()))


def program_parser() -> argparse.ArgumentParser:
    protocols = "\n\n".join(f"{name}: {' '.join(p.rows.__doc__.split())}" for name, p in PROTOCOLS.items())
    description, layout = f"{__doc__}\n{protocols}", argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="benchmark.py", description=description, formatter_class=layout)
    add = parser.add_argument
    add("protocol", choices=PROTOCOLS)
    add("--models", nargs="+", choices=("gemma-2b", "gemma-7b"), help="(default: the protocol's)")
    add("--precisions", nargs="+", choices=PRECISIONS, help="(default: the protocol's)")
    add("--batches", nargs="+", type=int, metavar="N", help="sweep: instead of its own")
    add("--checkpoint_path", nargs="+", type=Path, metavar="DIR", help="weights: trained checkpoints in BF16")
    add("--text", type=Path, metavar="FILE", help="weights: to evaluate them on, as eval.py's")
    add("--calibration_text", type=Path, metavar="FILE", help="weights: for calibrate.py and GPTQ, as theirs")
    add("--no_peers", dest="peers", action="store_false", help="leave out transformers")
    add("--repeats", type=int, default=5, metavar="N", help="(default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the results as JSON")
    add("--picture", type=Path, metavar="FILE.svg", help="sweep: draw the results")
    return parser


def run(args: argparse.Namespace):
    protocol = PROTOCOLS[args.protocol]
    if args.repeats < 1:
        raise ValueError("--repeats must be at least 1")
    if (args.picture or args.batches) and args.protocol != "sweep":
        raise ValueError("--picture and --batches are sweep's")
    if min(args.batches or [1]) < 1:
        raise ValueError("--batches must be at least 1")
    files = {f"--{name}": getattr(args, name) for name in ("checkpoint_path", "text", "calibration_text")}
    if any(files.values()):
        if args.protocol != "weights":
            raise ValueError(f"{', '.join(files)} are weights'")
        for name, value in files.items():
            if not value:
                raise ValueError(f"{', '.join(files)} need one another: {name} is missing")
    elif protocol.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"protocol {args.protocol} needs a CUDA GPU")
    args.device = pick_device(None if args.checkpoint_path else protocol.device)
    args.models, args.precisions = args.models or protocol.models, args.precisions or protocol.precisions
    result = {"protocol": args.protocol, **environment(args.device)}
    args.bandwidth = 1e9 * result["copy_bandwidth_gb_per_second"]
    release()  # its buffers
    print(json.dumps(result), flush=True)
    result["results"] = rows = []
    try:
        for row in protocol.rows(args):
            print("  ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
            rows.append(row)
    finally:  # what was measured before a failure is kept
        print(f"\n{weights_tables(rows) if args.protocol == 'weights' else table(rows)}", flush=True)
        if args.output:
            write_text(args.output, json.dumps(result, indent=1) + "\n")
        if args.picture and rows:
            write_text(args.picture, sweep_picture(rows, f"{result['device']}, {result['date']}"))


def main(argv: list[str] | None = None) -> int:
    return run_program(run, program_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
