"""Every figure in the README. `python benchmark.py PROTOCOL` prints a table and, with --output, writes JSON;
`python benchmark.py report` makes the tables of the documents from the JSON files.

Each case runs once to warm up, its time given apart, and then --repeats times: medians, and the spread from the fastest
to the slowest. Models have random weights at the published sizes. `share_of_copy_bandwidth` is what a decode step has
to read (weights, valid keys and values) over its time, as a share of what a large copy moves; `floor_ms` is the time of
a step at that speed.
"""

import interrupt

if __name__ == "__main__":
    interrupt.silence()  # while the rest is imported

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from assistant import Assistant
from beams import beam_search
from benchmarks import peers, report
from benchmarks.checkpoints import FP8_NAME, GIB, PRECISIONS, quality, release, synthetic_checkpoint
from benchmarks.measuring import (
    cpu_name,
    matrix_rate,
    prompts_of_lengths,
    random_prompts,
    request_lengths,
    rounded,
    seconds_of,
    spread,
    time_in_turn,
    time_launches,
    tutorial_prompts,
)
from benchmarks.report import OURS
from benchmarks.training import training
from cache import KVScales, cache_bytes, codec_of
from checkpoint import open_checkpoint
from cli import DEFAULT_CHECKPOINT, Parser, Stats, number, path, run_program
from config import NAMED_CONFIGS, ModelConfig
from device import copy_bandwidth, now, pick_device
from files import check_writable, write_atomically
from formats import Weight
from generate import drafts_per_step, generate, load_model
from model import Transformer, shared_product
from ops import Ops, choose
from parallel import Sums, of_environment
from runner import Runner, lease
from sampling import ALL_GREEDY, Sampling
from scheduler import Request, Scheduler
from speculate import AssistantDrafter, Drafter, DraftModel, PromptLookup, check_same_tokens
from text import read_texts

ROOT = Path(__file__).parent
OPS = ("kernels", "te", "torch")  # implementations of the operations, as load_model's ops names them

# ---------------------------------------------------------------------------------------------------------------------
# Protocols: each yields its rows as they come


def tutorial(args: argparse.Namespace, batch: int = 64, longest: int = 20, new_tokens: int = 492) -> Iterator[dict]:
    """TransformerEngine's Gemma tutorial: batch 64, prompts of at most 20 tokens, 492 new, greedy, no stop, the whole
    call. The tutorial pads prompts to 512 positions and computes them all: padded_seconds is such a prefill and our
    decoding. Peers: vLLM, transformers with prompts padded on the left."""
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
    case = Case(partial(tutorial_prompts, batch, longest), shape, new_tokens)
    yield from peer_rows(args, [case], ("dynamic", "static"), repeats=2)


def latency(
    args: argparse.Namespace, contexts: tuple[int, ...] = (128, 1024, 4096, 8000), new_tokens: int = 100
) -> Iterator[dict]:
    """Batch 1 behind prompts of 128 to 8,000 tokens, 100 new. Peers, at the first length: vLLM, whose decoding is what
    100 new tokens take longer than a single one; transformers, static cache, compiled."""

    def of_model(model: Transformer, kv_dtype, case: dict):
        for context in contexts:
            prompts = random_prompts(1, context, model.config.vocab_size)
            run = ours(model, prompts, new_tokens, compile=True, kv_cache_dtype=kv_dtype)
            yield from measure(args, {OURS: run}, case | {"batch": 1, "context": context, "new_tokens": new_tokens})

    yield from each_model(args, of_model)
    shape = {"batch": 1, "context": contexts[0], "new_tokens": new_tokens}
    yield from peer_rows(args, [Case(partial(random_prompts, 1, contexts[0]), shape, new_tokens)], ("static",))


def throughput(args: argparse.Namespace, counts: dict[str, int] | None = None) -> Iterator[dict]:
    """Requests that are all there at once, greedy, no stop, the whole call, in --shapes. mixed: 512 of prompts of 16 to
    1,024 tokens (mean 206) and 16 to 1,024 new ones (mean 266); 128/128: 512 of 128 and 128; 1024/128: 256 of 1,024 and
    128. Our rows are as many as memory holds. Peers: vLLM; transformers' continuous batching, at most 2 repeats, with
    its defaults: flash-attn and CUDA graphs where it finds them, else attention over pages by PyTorch's sdpa."""
    cases, counts = [], counts or REQUESTS
    for shape in args.shapes or counts:
        lengths = request_lengths(counts[shape], shape)
        limits = [new for _, new in lengths]
        columns = {"shape": shape, "requests": len(lengths)}
        columns |= {"prompt_tokens": sum(prompt for prompt, _ in lengths), "new_tokens": sum(limits)}
        cases.append(Case(partial(prompts_of_lengths, [prompt for prompt, _ in lengths]), columns, limits))

    def of_model(model: Transformer, kv_dtype, case: dict):
        for (prompts_of, columns, limits, _), rows in product(cases, args.batches or (None,)):
            prompts = prompts_of(model.config.vocab_size)
            run = ours(model, prompts, limits, compile=True, kv_cache_dtype=kv_dtype, batch_size=rows)
            yield from measure(args, {OURS: run}, case | columns | ({"batch": rows} if rows else {}))

    yield from each_model(args, of_model)
    yield from peer_rows(args, cases, repeats=min(2, args.repeats))


def samples(
    args: argparse.Namespace,
    counts: tuple[int, ...] = (16, 64, 128, 256),
    context: int = 8000,
    new_tokens: int = 128,
) -> Iterator[dict]:
    """16 to 256 completions, or --batches, of one prompt of 8,000 tokens, all at once, 128 new tokens each, temperature
    0.8, top-k 200; and a single one, first: prefill_of_one is prefill's time over that of the single one's. Peer: vLLM,
    whose samples share the prompt, too (its prefix cache is emptied before each call)."""
    drawn = {"temperature": 0.8, "top_k": 200, "seed": 0}
    columns = {"context": context, "new_tokens": new_tokens}
    numbers = dict.fromkeys((1, *(args.batches or counts)))
    cases = [Case(partial(random_prompts, 1, context), {"samples": n} | columns, new_tokens, n) for n in numbers]

    def of_model(model: Transformer, kv_dtype, case: dict):
        for prompts_of, columns, _, n in cases:
            prompts = prompts_of(model.config.vocab_size)
            options = drawn | {"num_samples": n, "batch_size": n, "kv_cache_dtype": kv_dtype}
            run = ours(model, prompts, new_tokens, compile=True, **options)
            for row in measure_where_it_fits(args, {OURS: run}, case | columns):
                # Of a step in which each row reads the prompt by itself
                yield {key: row[key] for key in row if key not in ("floor_ms", "share_of_copy_bandwidth")}

    single = {}
    for row in chain(each_model(args, of_model), peer_rows(args, cases)):
        one = single.setdefault((row["model"], row["precision"], row["name"]), row["prefill_seconds"])
        yield rounded(row | {"prefill_of_one": row["prefill_seconds"] / one})


def prefix_cache(
    args: argparse.Namespace, count: int = 256, shared: int = 2000, own: int = 100, new_tokens: int = 8
) -> Iterator[dict]:
    """What the prefix cache gains: 256 prompts that begin with the same 2,000 tokens and have 100 of their own, 8 new,
    the whole call, from an empty cache and without one (uncached_seconds), in turn. And what it costs where it finds
    nothing: 256 prompts of 2,100 tokens that share none. gain is uncached_seconds over seconds."""

    def of_model(model: Transformer, kv_dtype, case: dict):
        for common in (shared, 0):
            prompts = random_prompts(count, shared + own, model.config.vocab_size)
            prompts = [prompts[0][:common] + prompt[common:] for prompt in prompts]
            run = partial(ours, model, prompts, new_tokens, compile=True, kv_cache_dtype=kv_dtype, batch_size=None)
            # Each run without the cache empties it for the next one with it
            runs = time_in_turn({on: run(prefix_cache=on) for on in (True, False)}, args.repeats, args.device)
            row = case | {"name": OURS, "requests": count, "context": shared + own, "shared_tokens": common}
            row |= {"new_tokens": new_tokens, **seconds_of(runs[True])}
            row["uncached_seconds"] = seconds_of(runs[False])["seconds"]
            yield rounded(row | {"gain": row["uncached_seconds"] / row["seconds"]})

    yield from each_model(args, of_model)


def beams(
    args: argparse.Namespace, count: int = 16, context: int = 256, num_beams: int = 4, new_tokens: int = 256
) -> Iterator[dict]:
    """Beam search with 4 beams: 16 prompts of 256 tokens, 256 new, no stop, the whole call. New tokens are those of the
    hypotheses that come back."""

    def of_model(model: Transformer, kv_dtype, case: dict):
        prompts = random_prompts(count, context, model.config.vocab_size)
        options = {"num_beams": num_beams, "stop_ids": (), "kv_cache_dtype": kv_dtype, "compile": True}
        options["prefix_cache"] = False  # each repeat computes its prompts

        def run() -> Stats:
            stats = Stats()
            beam_search(model, prompts, new_tokens, stats=stats, **options)
            return stats

        columns = {"requests": count, "context": context, "beams": num_beams, "new_tokens": count * new_tokens}
        for row in measure(args, {OURS: run}, case | columns):
            yield rounded(row | {"requests_per_second": count / row["seconds"]})

    yield from each_model(args, of_model)


def speculate(args: argparse.Namespace, context: int = 128, new_tokens: int = 256) -> Iterator[dict]:
    """Drafts, --drafts_per_step, against none (0): batch 1, 8 and 64, or --batches; 128 prompt tokens, 256 new. Random
    models agree on nothing: so many drafts are right at each place, behind right ones, as `right` says, whatever models
    make. gain is the decoding speed over that without drafts, tokens_per_step what a step appends to a row. With
    --checkpoint_path, a trained model and one for its drafts, what these make of --text is measured instead: code that is
    to be repeated (copy), and code that is to go on (free). Peers: vLLM's n-gram lookup and draft models, of which as many
    are taken as right; of trained models, at batch 1, transformers' prompt lookup and assisted generation, the whole
    call."""
    if args.checkpoint_path:
        yield from speculate_trained(args)
        return
    counts = [0, *(args.drafts_per_step or (1, 3, 7, "auto"))]

    def of_model(model: Transformer, kv_dtype, case: dict):
        operations = model.ops
        for by, right in DRAFTS_OF.get(case["model"], DRAFTS_OF["gemma-7b"]):
            drafter, model.ops = random_drafter(by, case["model"], model), forced_right(operations, right, args.device)
            for batch in args.batches or (1, 8, 64):
                prompts = random_prompts(batch, context, model.config.vocab_size)
                shape = {"batch": batch, "context": context, "new_tokens": new_tokens}
                columns = case | {"drafts": by, "right": list(right)} | shape
                yield from rows_of_drafts(args, model, prompts, drafter, counts, columns, kv_cache_dtype=kv_dtype)

    yield from each_model(args, of_model)
    for name in args.models if "vllm" in args.peers else ():
        plain: dict[tuple, float] = {}  # tokens a second without drafts, by precision and batch
        for (by, right), count in product(DRAFTS_OF.get(name, DRAFTS_OF["gemma-7b"]), counts):
            if by == "assistant" or count == "auto" or not any(right) or (count == 0 and plain):
                continue
            shape = {"context": context, "new_tokens": new_tokens, "speculate_k": count}
            cases = [
                Case(
                    partial(random_prompts, batch, context),
                    {"drafts": by, "right": list(right), "batch": batch, **shape},
                    new_tokens,
                )
                for batch in args.batches or (1, 8, 64)
            ]
            draft = None if by == "prompt lookup" else config_of_peer(by)
            drafts = peers.vllm_drafts(draft, right[:count]) if count else None
            for row in peer_rows(
                argparse.Namespace(**vars(args) | {"models": [name], "peers": ("vllm",)}), cases, drafts=drafts
            ):
                rate = row["decode_tokens_per_second"]
                yield rounded(row | {"gain": rate / plain.setdefault((row["precision"], row["batch"]), rate)})


def speculate_trained(args: argparse.Namespace, context: int = 256, new_tokens: int = 128) -> Iterator[dict]:
    """`speculate`'s rows of two trained checkpoints; a file of the text is to be gone on with, or repeated behind it."""
    (model, tokenizer), (draft, other) = (load_model(path, args.device) for path in args.checkpoint_path)
    check_same_tokens(tokenizer, other, args.checkpoint_path[1].name)
    texts = [tokenizer.encode(text) for text in read_texts(args.text)]
    texts = [text[:context] for text in texts if len(text) >= context][: max(args.batches or (8,))]
    again = tokenizer.encode("\n\n# The same again:\n", bos=False)
    kinds = {"free": texts, "copy": [text + again + text[1:17] for text in texts]}
    counts = [0, *(args.drafts_per_step or (1, 3, 7, "auto"))]
    drafters = {"prompt lookup": PromptLookup(), args.checkpoint_path[1].name: DraftModel(draft)}
    for (kind, prompts), (by, drafter), batch in product(kinds.items(), drafters.items(), args.batches or (1, 8)):
        case = {"model": args.checkpoint_path[0].name, "text": kind, "drafts": by}
        case |= {"batch": batch, "context": len(prompts[0]), "new_tokens": new_tokens}
        yield from rows_of_drafts(args, model, prompts[:batch], drafter, counts, case)
        if "transformers" in args.peers and batch == 1:
            run, first = peers.transformers_drafts(args.checkpoint_path, prompts[0], new_tokens), None
            for count in (count for count in counts if count != "auto"):
                named = {f"transformers, {by}": partial(run, by, count)}
                (row,) = measure(args, named, case | {"speculate_k": count})
                first = first or row["tokens_per_second"]
                yield rounded(row | {"gain": row["tokens_per_second"] / first})


def rows_of_drafts(
    args: argparse.Namespace,
    model: Transformer,
    prompts: list[list[int]],
    drafter: Drafter,
    counts: list[int | str],
    case: dict,
    **options,
) -> Iterator[dict]:
    """A row for each number of drafts a step, of which the first is 0."""
    rate, options = None, options | {"compile": args.device.type == "cuda"}
    for count in counts:
        of_drafts = {"drafter": drafter, "speculate_k": count} if count else {}
        run, done = ours(model, prompts, case["new_tokens"], **options, **of_drafts), []

        def kept(run=run, done=done) -> Stats:
            done.append(run())
            return done[-1]

        (row,) = measure(args, {OURS: kept}, case | {"speculate_k": count})
        stats, rate = done[-1], rate or row["decode_tokens_per_second"]
        row |= {"tokens_per_step": stats.tokens_per_step, "gain": row["decode_tokens_per_second"] / rate}
        row["right_by_place"] = [stats.right[place] / tried for place, tried in sorted(stats.drafts.items())]
        yield rounded(row | {"share_of_drafts": stats.draft_seconds / stats.decode_seconds})


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
            for row in measure_where_it_fits(args, {OURS: run}, case | shape):
                yield row | {"gpu_gib": round(torch.cuda.max_memory_allocated() / GIB, 2)}

    yield from each_model(args, of_model)


def weights(args: argparse.Namespace) -> Iterator[dict]:
    """What to choose weights by. Quality: of each trained --checkpoint_path, calibrate.py and quantize.py make each
    format with --calibration_text (GPTQ with 32,768 tokens of it) in a temporary directory (TMPDIR), and eval.py
    compares it with BF16 on --text; disk_mb is the file's. Sizes and speeds, on a GPU: disk_gib of the file, and what
    `sweep` measures at batch 1, 8 and 64; GPTQ's weights have int4's layout, which is measured once for both."""
    checkpoints = list(map(open_checkpoint, args.checkpoint_path or ()))
    for file in (args.text, args.calibration_text) if checkpoints else ():
        if not file.is_file():  # a pipe, for one, can be read but once
            raise FileNotFoundError(f"no text file at {file}")
    for checkpoint in checkpoints:
        yield from quality(checkpoint, args.precisions, args.text, args.calibration_text)
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
            prompts = random_prompts(batch, context, model.config.vocab_size)
            run = partial(ours, model, prompts, new_tokens, compile=True, kv_cache_dtype=kv_dtype)
            runners = {check: run(stop_check=check) for check in ("never", "every", "ping-pong")}
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
            row = {"model": name, "kernel_caches": kind, **spread([value for value, _ in values])}
            parts = [start_parts(*value) for value in values]
            row |= {f"{part}_seconds": median(p[part] for p in parts) for part in parts[0]}
            yield rounded(row | {"load_gb_per_second": size / row["load_seconds"] / 1e9})


def prefill(
    args: argparse.Namespace,
    shapes: tuple[tuple[int, int], ...] = ((1, 512), (1, 2048), (1, 8000), (8, 2048)),
    matrix_size: int = 8192,
) -> Iterator[dict]:
    """Prefill alone, 512 to 8,000 tokens, against a large matrix product, which is measured first: layers and causal
    attention, without and with --compile_prefill, for each implementation of the operations, or for --ops."""
    peaks = {}
    for precision in args.precisions:
        peaks[precision] = matrix_rate(args.device, PRECISIONS[precision][0].get("format") == "fp8", matrix_size)
        name = f"matrix product, {matrix_size} cubed"
        yield rounded({"name": name, "precision": precision, "tflop_per_second": peaks[precision] / 1e12})
    release()

    def of_model(model: Transformer, kv_dtype, case: dict):
        for ops in args.ops or OPS:
            try:
                model.ops = choose(ops, model.device)
            except ValueError as error:
                print(f"ops {ops} is left out: {error}", file=sys.stderr)
                continue
            for (batch, tokens), compile_prefill in product(shapes, (False, True)):
                runs = time_prefill(args, model, batch, tokens, kv_dtype, compile_prefill)
                row = case | {"ops": ops, "batch": batch, "context": tokens, "compile_prefill": compile_prefill}
                row |= seconds_of(runs)
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


def parallel(
    args: argparse.Namespace, new_tokens: int = 100, prompt_tokens: int = 2048, requests: int = 512
) -> Iterator[dict]:
    """Under torchrun, on all GPUs of a host. First the microseconds that it takes to add up what each has of `batch` rows
    of a hidden state, in CUDA graphs: ours with the norm behind it, that norm alone, NCCL's all_reduce, and those of
    PyTorch's symmetric memory. Then a model on the first GPU, while the others wait; one that all GPUs share (--tp); and
    one on each (copies). The first two at batch 1, 8 and 64, or --batches, 128 prompt tokens, 100 new, and a prefill of
    2,048 tokens; first and last with throughput's 512 mixed requests, copies also with as many each. gain is the speed
    over that of one GPU: of decoding, where steps are alike. --parts leaves some of it out. Peer: vLLM, on all GPUs."""
    sums, batches, context, parts = args.sums, args.batches or (1, 8, 64), 128, args.parts or PARTS
    count, alone = sums.shard.count, {}
    sizes = sorted({ModelConfig.from_name(name).hidden_size for name in args.models}) if "sums" in parts else ()
    for hidden, batch in product(sizes, batches):
        for name, seconds in time_sums(sums, batch, hidden).items():
            yield rounded({"name": name, "gpus": count, "batch": batch, "hidden_size": hidden, "us": 1e6 * seconds})

    def steps_of(model: Transformer, kv_dtype, case: dict) -> Iterator[dict]:
        for batch in batches:
            prompts = random_prompts(batch, context, model.config.vocab_size)
            run = ours(model, prompts, new_tokens, compile=True, kv_cache_dtype=kv_dtype)
            shape = {"batch": batch, "context": context, "new_tokens": new_tokens}
            yield from measure_where_it_fits(args, {OURS: run}, case | shape)
        row = case | {"name": f"{OURS}, prefill", "batch": 1, "context": prompt_tokens}
        row |= seconds_of(time_prefill(args, model, 1, prompt_tokens, kv_dtype, False))
        yield rounded(row | {"tokens_per_second": prompt_tokens / row["seconds"]})

    def requests_of(model: Transformer, kv_dtype, case: dict, number: int, ranks=None) -> Iterator[dict]:
        lengths = request_lengths(number, "mixed")
        prompts = prompts_of_lengths([prompt for prompt, _ in lengths], model.config.vocab_size)
        limits, options = [new for _, new in lengths], {"compile": True, "batch_size": None, "ranks": ranks, "seed": 0}
        run = ours(model, prompts, limits, kv_cache_dtype=kv_dtype, **options)

        def run_together():
            sums.agreed(0)  # they wait for each other
            run()
            sums.agreed(0)

        row = case | {"name": OURS, "shape": "mixed", "requests": number, "new_tokens": sum(limits)}
        row |= seconds_of(time_in_turn({OURS: run_together if ranks else run}, args.repeats, args.device)[OURS])
        yield rounded(row | {"tokens_per_second": sum(limits) / row["seconds"]})

    for name, precision, (gpus, copies) in product(args.models, args.precisions, ((1, 1), (count, 1), (count, count))):
        case, rows = {"model": name, "precision": precision, "gpus": gpus, "copies": copies}, []
        if gpus == count or sums.shard.rank == 0:
            shared = gpus > copies
            try:
                model = *random_model(name, precision, args.device, sums if shared else None), case
                rows += steps_of(*model) if copies == 1 and "steps" in parts else ()
                for number in sorted({requests, copies * requests}) if "requests" in parts and not shared else ():
                    rows += requests_of(*model, number, args.copies if gpus > 1 else None)
            except ValueError as error:  # the same on all ranks: of sizes, or of memory
                print(f"{name}, {precision}, {gpus} GPUs: {error}", file=sys.stderr, flush=True)
            model = None
            release()
        sums.agreed(0)
        for row in rows:
            speed = row.get("decode_tokens_per_second", row["tokens_per_second"])
            key = name, precision, row["name"], row.get("batch")
            if gpus == 1:
                alone[key] = speed
            yield rounded(row | {"gain": speed / alone[key]}) if key in alone else row
    if sums.shard.rank == 0 and "steps" in parts:
        shapes = [{"gpus": count, "batch": batch, "context": context, "new_tokens": new_tokens} for batch in batches]
        cases = [Case(partial(random_prompts, shape["batch"], context), shape, new_tokens) for shape in shapes]
        yield from peer_rows(args, cases, gpus=count)
    sums.agreed(0)


def cpu(args: argparse.Namespace) -> Iterator[dict]:
    """tiny-gemma, batch 1 and 16, 32 prompt tokens, 200 new, in turn with transformers; and the time from process start
    to the first token."""
    eager, compiled = (load_model(DEFAULT_CHECKPOINT, args.device)[0] for _ in range(2))
    peer = peers.transformers_checkpoint(DEFAULT_CHECKPOINT) if "transformers" in args.peers else None
    for batch in (1, 16):
        prompts = random_prompts(batch, 32, eager.config.vocab_size)
        runners = {"eager": ours(eager, prompts, 200), "compile": ours(compiled, prompts, 200, compile=True)}
        if peer is not None:
            runners["transformers"] = peers.transformers_generate(peer, prompts, 200)
        rows = measure(args, runners, {"model": "tiny-gemma", "batch": batch, "context": 32, "new_tokens": 200})
        for row in rows:
            if peer is not None:
                row["times_transformers"] = round(row["tokens_per_second"] / rows[-1]["tokens_per_second"], 2)
            yield row
    seconds = [first_output(args.device, "--max_new_tokens", "1")[0] for _ in range(args.repeats)]
    yield rounded({"model": "tiny-gemma", "name": "process start to first token", **spread(seconds)})


class Protocol(NamedTuple):
    """What yields its rows, the device that it needs, the defaults of its options, the peers that it knows, and the
    options that only it takes."""

    rows: Callable[[argparse.Namespace], Iterator[dict]]
    device: str
    models: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


COPY = (0.44, 0.85, 0.89, 0.94, 0.95, 0.96, 0.98)
FREE = (0.32, 0.77, 0.7, 0.83, 0.88, 0.93, 0.94)
# What makes drafts for a model, and the shares of them that are right: prompt lookup's by small-gemma on code that it
# repeats, and goes on with, and none; a guess; those that vLLM publishes of Gemma 4's (0.86, 0.71, 0.55, 0.42 by place)
DRAFTS_OF = {
    "gemma-7b": (("prompt lookup", COPY), ("prompt lookup", FREE), ("prompt lookup", (0.0,) * 7)),
    "gemma-3-27b": (("gemma-3-270m", (0.7,) * 7),),
    "gemma-4-31B": (("assistant", (0.86, 0.826, 0.775, 0.764, 0.76, 0.76, 0.76)),),
}
TRAINED = ("checkpoint_path", "text", "calibration_text")
BOTH = ("transformers", "vllm")
PARTS = "sums", "steps", "requests"  # of `parallel`
REQUESTS = {"mixed": 512, "128/128": 512, "1024/128": 256}  # `throughput`'s: prompt/new tokens, how many requests
PROTOCOLS = {
    "tutorial": Protocol(tutorial, "cuda", ("gemma-7b",), ("bf16", "fp8", "fp8-kv", "fp8-all"), BOTH),
    "latency": Protocol(latency, "cuda", ("gemma-2b", "gemma-7b"), ("bf16", "fp8-kv", "fp8-all"), BOTH),
    "throughput": Protocol(throughput, "cuda", ("gemma-7b",), ("bf16", "fp8-kv"), BOTH, ("batches", "shapes")),
    "samples": Protocol(samples, "cuda", ("gemma-7b",), ("bf16", "fp8-kv"), ("vllm",), ("batches",)),
    "prefix-cache": Protocol(prefix_cache, "cuda", ("gemma-7b",), ("bf16", "fp8-kv")),
    "beams": Protocol(beams, "cuda", ("gemma-7b",), ("bf16", "fp8-kv")),
    "speculate": Protocol(
        speculate,
        "cuda",
        tuple(DRAFTS_OF),
        ("fp8-all",),
        BOTH,
        ("batches", "drafts_per_step", *TRAINED[:2]),
    ),
    "sweep": Protocol(sweep, "cuda", ("gemma-7b",), ("bf16", "fp8-all"), options=("batches", "picture")),
    "weights": Protocol(weights, "cuda", ("gemma-7b",), tuple(PRECISIONS), options=TRAINED),
    "stop-check": Protocol(stop_check, "cuda", ("gemma-2b",), ("bf16", "fp8-all")),
    "startup": Protocol(startup, "cuda", ("gemma-7b",)),
    "prefill": Protocol(prefill, "cuda", ("gemma-7b",), ("bf16", "fp8"), options=("ops",)),
    "memory": Protocol(memory, "cuda", ("gemma-7b",), ("bf16", "fp8", "fp8-all")),
    "parallel": Protocol(
        parallel, "cuda", ("gemma-7b",), ("bf16", "fp8-all", "int4-g128"), ("vllm",), ("batches", "parts")
    ),
    "cpu": Protocol(cpu, "cpu", peers=("transformers",)),
    "finetune": Protocol(training, "cuda", ("gemma-2b", "gemma-7b"), ("bf16", "fp8"), ("transformers",)),
}

# ---------------------------------------------------------------------------------------------------------------------
# Models and prompts


def random_model(
    name: str, precision: str, device: torch.device, sums: Sums | None = None
) -> tuple[Transformer, torch.dtype | None]:
    """A model of random weights, or with `sums` a rank's part of one, as `load_model` would have made it, and the dtype
    of its KV cache."""
    (options, kv_dtype), config = PRECISIONS[precision], ModelConfig.from_name(name)
    if sums is not None:
        sums.shard.check_group(config, options.get("group", 1))
        config = config.sharded(sums.shard)
    model = Transformer.random(config, device, **options)
    model.ops = replace(model.ops, sums=sums)
    model.kv_scales = KVScales([(1.0, 1.0)] * model.config.n_layers)  # which do for random values
    return model, kv_dtype


def each_model(args: argparse.Namespace, of_model: Callable[..., Iterator[dict]]) -> Iterator[dict]:
    """The rows of of_model(model, KV cache's dtype, case) for each model and precision, one in memory at a time: nobody
    here keeps a reference."""
    for name, precision in product(args.models, args.precisions):
        yield from of_model(*random_model(name, precision, args.device), {"model": name, "precision": precision})
        release()


def config_of_peer(name: str) -> dict:
    return peers.hf_config(ModelConfig.from_name(name))


def random_drafter(by: str, name: str, model: Transformer) -> Drafter:
    """What makes drafts for a model: prompt lookup, an assistant, or a random model of a published size, in BF16."""
    if by == "prompt lookup":
        return PromptLookup()
    if by == "assistant":
        return AssistantDrafter(Assistant.random(name, model))
    draft, _ = random_model(by, "bf16", model.device)
    return DraftModel(draft)


def forced_right(operations: Ops, right: tuple[float, ...], device: torch.device) -> Ops:
    """The same operations, to which so many drafts are right at each place, behind right ones: greedy choices are those
    of logits in which drafts that are meant to be right are the largest, others the smallest."""
    draws = torch.rand(4096, 64, len(right), generator=torch.Generator().manual_seed(0))
    meant = (draws < torch.tensor(right)).to(device)

    def greedy(logits: torch.Tensor, state, drafts: torch.Tensor | None = None, *of_ranks):
        if drafts is not None:
            rows, count = drafts.shape
            (now,) = meant.index_select(0, state.step % len(meant))[:, :rows, :count]
            value = torch.where(now, 1e4, -1e4).to(logits.dtype)
            logits.view(rows, count + 1, -1)[:, :-1].scatter_(2, drafts[..., None], value[..., None])
        operations.greedy(logits, state, drafts, *of_ranks)

    return replace(operations, greedy=greedy)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def ours(model: Transformer, prompts: list[list[int]], new_tokens: int | list[int], **options) -> Callable[[], Stats]:
    def run() -> Stats:
        stats = Stats()
        options_of_all = {"temperature": 0, "stop_ids": (), "batch_size": len(prompts), "stats": stats}
        options_of_all["prefix_cache"] = False  # each repeat computes its prompts
        generate(model, prompts, new_tokens, **options_of_all | options)
        return stats

    return run


def measure(args: argparse.Namespace, runners: dict[str, Callable], case: dict, repeats: int | None = None):
    """A row for each runner. Seconds are those of the whole call; those of decoding come from our Stats."""
    rows = []
    for name, runs in time_in_turn(runners, repeats or args.repeats, args.device).items():
        row = case | {"name": name} | seconds_of(runs)
        texts = 1 if "requests" in case else case.get("samples") or case["batch"]  # new_tokens: of all requests
        row["tokens_per_second"] = texts * case["new_tokens"] / row["seconds"]
        if runs[0][1] is not None:
            row |= decode_figures([stats for _, stats in runs[1:]], args.bandwidth)
        rows.append(rounded(row))
    return rows


def measure_where_it_fits(args: argparse.Namespace, runners: dict[str, Callable], case: dict) -> list[dict]:
    """What `measure` gives; no rows, and a line, where memory has no room for the case."""
    try:
        return measure(args, runners, case)
    except ValueError as error:
        if "memory" not in str(error):
            raise
        print(f"{', '.join(f'{key} {value}' for key, value in case.items())} is left out: {error}", flush=True)
        return []


class Case(NamedTuple):
    """What is timed: the prompts for a vocabulary's size, the columns that say what it is, the new tokens of all prompts
    or a list of those of each, and the samples of a prompt."""

    prompts_of: Callable[[int], list[list[int]]]
    columns: dict
    new_tokens: int | list[int]
    samples: int = 1


def peer_rows(
    args: argparse.Namespace,
    cases: list[Case],
    caches: tuple[str, ...] = (),
    repeats: int | None = None,
    gpus: int = 1,
    drafts: dict | None = None,
) -> Iterator[dict]:
    """A row for each case and model, and each of vLLM's precisions beside ours, or each of transformers' `caches`;
    cases with a list of new tokens are for its continuous batching. `drafts` are vLLM's. A failure of that or of vLLM is
    told in a line and has no row."""
    precisions = peers.vllm_precisions(args.precisions) if "vllm" in args.peers else ()
    for name, precision in product(args.models, precisions):
        config, settings = config_of_peer(name), (args.repeats, args.vllm_site, args.peer_timeout, gpus)
        jobs = [(case.prompts_of(config["vocab_size"]), case.new_tokens, case.samples) for case in cases]
        try:
            for case, figures in zip(cases, peers.vllm_figures(config, precision, jobs, *settings, drafts)):
                yield rounded({"model": name, "precision": precision, **case.columns, **figures})
        except RuntimeError as error:
            print(f"vLLM, {name} {precision}, is left out: {error}", file=sys.stderr, flush=True)
    for name in args.models if "transformers" in args.peers else ():
        peer, run = peers.transformers_model(config_of_peer(name), args.device), None
        for case in cases:
            prompts, new_tokens = case.prompts_of(peer.config.vocab_size), case.new_tokens
            columns = {"model": name, "precision": "bf16", **case.columns}
            for cache in caches:
                run = peers.transformers_generate(peer, prompts, new_tokens, cache_implementation=cache)
                yield from measure(args, {f"transformers, {cache} cache": run}, columns, repeats)
            if isinstance(new_tokens, list):
                try:
                    with peers.transformers_batching(peer, prompts, new_tokens, args.peer_timeout) as run:
                        rows = measure(args, {"transformers, continuous batching": run}, columns, repeats)
                    yield from rows
                except (RuntimeError, ValueError, MemoryError, ImportError, OSError) as error:
                    told = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                    what = f"transformers, {name}, {columns['shape']} tokens"
                    print(f"{what}, is left out: {told}", file=sys.stderr, flush=True)
        del peer, run
        release()


def decode_figures(repeats: list[Stats], bandwidth: float) -> dict:
    """Of the same run, repeated; `bandwidth`, a copy's, in bytes a second."""
    rates, decode = [stats.decode_rate for stats in repeats], median(stats.decode_seconds for stats in repeats)
    stats = repeats[0]
    return {
        "prefill_seconds": median(stats.prefill_seconds for stats in repeats),
        "decode_seconds": decode,
        "decode_tokens_per_second": median(rates),
        "decode_spread": [min(rates), max(rates)],
        "steps": stats.steps,
        "step_ms": 1e3 * decode / stats.steps,
        "floor_ms": 1e3 * stats.bytes_read / stats.steps / bandwidth,
        "share_of_copy_bandwidth": stats.bytes_read / decode / bandwidth,
    }


@torch.inference_mode()
def time_prefill(
    args: argparse.Namespace, model: Transformer, batch: int, tokens: int, kv_dtype, compile_prefill: bool
):
    length = min(-(-(tokens + 1) // 64) * 64, model.config.context_length)
    runner = Runner(model, batch, length, codec_of(kv_dtype, model.dtype), False, compile_prefill)
    prompts = random_prompts(batch, tokens, model.config.vocab_size)
    requests = [Request((i, 0), prompt, 1, Sampling(temperature=0)) for i, prompt in enumerate(prompts)]

    def run():
        runner.start(model, batch, ALL_GREEDY, (), prefix_cache=False)
        list(Scheduler(runner, model, requests, batch).run())
        runner.finish()

    return time_in_turn({"prefill": run}, args.repeats, args.device)["prefill"]


@torch.inference_mode()
def time_sums(sums: Sums, rows: int, size: int) -> dict[str, float]:
    """Seconds that it takes to sum up the [rows, size] of all ranks, in different ways, all of which have them all; also
    those that a product of few rows sends, by a weight [size, 2048]."""
    from torch import distributed

    device, group = sums.device, distributed.group.WORLD.group_name
    ops = replace(choose("auto", device), sums=sums)
    x, part = torch.zeros(rows, size, dtype=torch.bfloat16, device=device), torch.zeros(rows, size, device=device)
    weight = torch.zeros(size, dtype=torch.bfloat16, device=device)
    factor = Weight.of("bf16", torch.zeros(size, 2048, dtype=torch.bfloat16, device=device))
    h = torch.zeros(rows, 2048, dtype=torch.bfloat16, device=device)
    ways = {
        f"{OURS}, product, sum and norm": lambda: ops.add_norm(
            x, shared_product(ops, h, factor, h.dtype), None, weight, 1e-6
        ),
        f"{OURS}, product and norm": lambda: ops.add_norm(x, ops.matmul(h, factor, h.dtype, True), None, weight, 1e-6),
        f"{OURS}, sum and norm": lambda: ops.add_norm(x, ops.parts(part), None, weight, 1e-6),
        f"{OURS}, norm": lambda: ops.add_norm(x, part[None], None, weight, 1e-6),
        "all_reduce": partial(distributed.all_reduce, x),
    }
    if device.type == "cuda":
        import torch.distributed._symmetric_memory as symmetric_memory

        shared = symmetric_memory.empty(rows, size, dtype=torch.bfloat16, device=device)
        symmetric_memory.rendezvous(shared, distributed.group.WORLD)
        for name in ("one_shot_all_reduce", "two_shot_all_reduce_"):
            ways[f"symm_mem.{name}"] = partial(getattr(torch.ops.symm_mem, name), shared, "sum", group)
    return {name: time_launches(run, device) for name, run in ways.items()}


def prefill_flop(model: Transformer, batch: int, tokens: int) -> float:
    """Of the layers' products, of experts' those that a token takes, and of attention's two, for the pairs that it sees.
    Layers that share keys compute the last token only."""
    config, total = model.config, 0.0
    for index, layer in enumerate(model.layers):
        weights = [module for module in layer.modules() if isinstance(module, Weight)]
        count = 1 if config.is_shared(index) else tokens
        for weight in weights:
            total += 2 * math.prod(weight.shape) * (config.n_active_experts if weight.experts else 1) * count
        window = min(config.window, tokens) if config.is_local(index) else tokens
        seen = count * tokens if config.is_shared(index) else window * tokens - window**2 / 2
        total += 4 * seen * config.n_heads * config.head_dim_of(index)
    return batch * total


def first_output(device: torch.device, *options: str, **environment: str) -> tuple[float, str]:
    """Seconds from the start of generate.py to the first byte on its stdout, and what it wrote to stderr."""
    command = [sys.executable, "generate.py", "--prompt", "\n", "--device", device.type, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes) as process:
        try:
            process.stdout.read(1)
            elapsed = time.perf_counter() - start
            error = process.communicate()[1].decode()
        finally:
            process.kill()  # unless it is done: Ctrl-C may come to this process alone
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
    allocated = torch.cuda.max_memory_allocated()
    length = prompt_tokens + new_tokens
    with lease(model, batch, length, codec_of(kv_dtype, model.dtype), compile=True) as runner:  # the one that has run
        cache, length = runner.whole_cache.bytes, runner.length
        of_bf16 = cache_bytes(model.config, runner.batch_size, length, codec_of("bf16", model.dtype))
    reserved = torch.cuda.max_memory_reserved()
    figures = {
        "kv_cache_length": length,
        "weights_gib": model.weight_bytes / GIB,
        "kv_cache_gib": cache / GIB,
        "kv_cache_of_bf16": cache / of_bf16,
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
        start = now(device)
        model = load_model(directory, device, fp8=True)[0]
        seconds = now(device) - start
        sizes[:] = model.weight_bytes, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return seconds

    figures = seconds_of([(load(), None) for _ in range(1 + repeats)])
    weights, allocated, reserved = sizes
    figures |= {
        "weights_gib": weights / GIB,
        "peak_allocated_gib": allocated / GIB,
        "peak_reserved_gib": reserved / GIB,
        "above_weights_gib": (allocated - weights) / GIB,
        "load_gb_per_second": (Path(directory) / FP8_NAME).stat().st_size / figures["seconds"] / 1e9,
    }
    return rounded(figures)


def environment(device: torch.device) -> dict:
    """What the figures were measured with, the copy bandwidth among it."""
    versions = {}
    for package in ("torch", "triton", "transformers", "transformer-engine", "vllm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": name,
        "python": platform.python_version(),
        **versions,
        "copy_bandwidth_gb_per_second": round(copy_bandwidth(device) / 1e9, 1),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The program


def write_text(file: Path, text: str):
    write_atomically(file, lambda out: out.write(text.encode()))


def program_parser() -> argparse.ArgumentParser:
    rows = {name: protocol.rows for name, protocol in PROTOCOLS.items()} | {"report": write_report}
    protocols = "\n\n".join(f"{name}: {' '.join(function.__doc__.split())}" for name, function in rows.items())
    description, layout = f"{__doc__}\n{protocols}", argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="benchmark.py", description=description, formatter_class=layout)
    add = parser.add_argument  # every default is None: what was given is seen by that
    names = "of published sizes: " + ", ".join(NAMED_CONFIGS)
    add("protocol", choices=rows)
    add("--models", nargs="+", choices=NAMED_CONFIGS, metavar="NAME", help=f"(default: the protocol's) {names}")
    add("--precisions", nargs="+", choices=PRECISIONS, help="(default: the protocol's)")
    add(
        "--batches",
        nargs="+",
        type=number(int, 1),
        metavar="N",
        help="sweep, throughput, samples: (default: 1 to 256; what memory holds; 16 to 256)",
    )
    count = "speculate: drafts a step, 1 to 7 or auto (default: 1 3 7 auto)"
    add("--drafts_per_step", nargs="+", type=drafts_per_step, metavar="N", help=count)
    add("--shapes", nargs="+", choices=REQUESTS, help="throughput: tokens of prompts/new ones (default: all)")
    add("--parts", nargs="+", choices=PARTS, help="parallel: what to measure (default: all)")
    add("--ops", nargs="+", choices=OPS, help="prefill: implementations of the operations (default: all)")
    add("--checkpoint_path", nargs="+", type=path, metavar="DIR", help="weights: trained, in BF16 (default: none)")
    add("--text", type=path, metavar="FILE", help="weights: to evaluate them on (default: none)")
    add("--calibration_text", type=path, metavar="FILE", help="weights: for calibrate.py and GPTQ (default: none)")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--peers", nargs="+", choices=BOTH, help="to time beside ours (default: those installed)")
    peer.add_argument(
        "--no_peers", dest="peers", action="store_const", const=(), help="leave them out (default: don't)"
    )
    add("--vllm_site", type=path, metavar="DIR", help="where vLLM is (default: where it is installed)")
    seconds = "that vLLM may take for a row, loading too, and transformers for a run of requests (default: 300)"
    add("--peer_timeout", type=number(float, 1), metavar="SECONDS", help=seconds)
    add("--repeats", type=number(int, 1), metavar="N", help="timed runs of each case (default: 5)")
    add("--output", type=path, metavar="FILE", help="write the results as JSON (default: don't)")
    add("--picture", type=path, metavar="FILE.svg", help="sweep: draw the results (default: don't)")
    return parser


def check_options(args: argparse.Namespace):
    """Raises ValueError for options that the protocol doesn't take, and fills in defaults."""
    protocol = PROTOCOLS.get(args.protocol)
    known = {"protocol"}
    if protocol:
        known |= {"repeats", "output", *protocol.options}
        known |= {name for name in ("models", "precisions", "peers") if getattr(protocol, name)}
        known |= {"vllm_site", "peer_timeout"} if "vllm" in protocol.peers else set()
    given = [name for name, value in vars(args).items() if value is not None and name not in known]
    if given:
        names = ("no_peers" if name == "peers" and not args.peers else name for name in given)
        raise ValueError(f"{args.protocol} takes no {', '.join(f'--{name}' for name in names)}")
    args.repeats, args.peer_timeout = args.repeats or 5, args.peer_timeout or 300.0
    trained = {f"--{name}": getattr(args, name) for name in TRAINED if name in known}
    for name, value in trained.items() if any(trained.values()) else ():
        if not value:
            raise ValueError(f"{', '.join(trained)} need one another: {name} is missing")


def write_report():
    """Writes benchmarks/README.md, the pictures beside it and the headline figures in README.md from
    benchmarks/*.json."""
    for file, text in report.pages(ROOT).items():
        write_text(file, text)
        print(f"wrote {file.relative_to(ROOT)}")


def run(args: argparse.Namespace):
    check_options(args)
    if args.protocol == "report":
        return write_report()
    protocol = PROTOCOLS[args.protocol]
    if protocol.device == "cuda" and not torch.cuda.is_available() and not args.checkpoint_path:
        raise ValueError(f"protocol {args.protocol} needs a CUDA GPU")
    args.peers = peers.choose(args.protocol, protocol.peers, args.peers, args.vllm_site)
    args.device = pick_device(None if args.checkpoint_path else protocol.device)
    if args.protocol != "parallel":
        return run_protocol(args, protocol)
    args.tp = of_environment("WORLD_SIZE", 1)
    if args.tp == 1:
        raise ValueError("protocol parallel measures several GPUs: start it by torchrun --nproc-per-node N")
    from ranks import Ranks, joined  # what one process has no use for

    with joined(args) as (ranks, args.sums):
        args.copies = Ranks(ranks.store, ranks.rank, ranks.count)
        run_protocol(args, protocol)


def run_protocol(args: argparse.Namespace, protocol: Protocol):
    """Prints and, with --output, writes the rows of a protocol; of several ranks the first does."""
    is_first = of_environment("RANK", 0) == 0
    args.models, args.precisions = args.models or protocol.models, args.precisions or protocol.precisions
    for file in filter(None, (args.output, args.picture) if is_first else ()):
        check_writable(file)
    result = {"protocol": args.protocol, **environment(args.device), "repeats": args.repeats}
    args.bandwidth = 1e9 * result["copy_bandwidth_gb_per_second"]
    release()  # its buffers
    print(json.dumps(result), flush=True)
    rows = []
    try:
        for row in protocol.rows(args):
            result |= row.pop("versions", {})  # a peer's, in its own process
            print("  ".join(f"{key} {report.cell(value)}" for key, value in row.items()), flush=True)
            rows.append(row)
            if args.output and is_first:  # at once: what was measured before the end comes, whatever it is, is kept
                write_text(args.output, json.dumps(result | {"results": rows}, indent=1) + "\n")
    finally:
        print(f"\n{report.weights_tables(rows) if args.protocol == 'weights' else report.table(rows)}", flush=True)
        if args.picture and rows:
            write_text(args.picture, report.sweep_picture(rows, f"{result['device']}, {result['date']}"))


def main(argv: list[str] | None = None) -> int:
    return run_program(run, program_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
