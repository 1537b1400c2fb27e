"""Text from a Gemma checkpoint: load, prefill, decode, print.

From Python: `model, tokenizer = load_model(path)`, then `generate(model, [tokenizer.encode(text)])`.
"""

import interrupt

if __name__ == "__main__":
    interrupt.silence()  # while the rest is imported

import argparse
import json
import os
import secrets
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from functools import partial
from operator import mul
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from adapter import read_adapter, updates_of
from arguments import (
    ADVICE,
    MAX_BATCH,
    MOST,
    check_context,
    check_count,
    check_function,
    check_lists,
    check_prompts,
    checked_stop_ids,
    is_whole,
    length_of_all,
    of_each,
    rows_and_pages,
)
from assistant import is_assistant, load_assistant
from beams import beam_search
from cache import KVScales, codec_of, context_bytes
from chat import Printer, converse, system_messages
from checkpoint import (
    INT_FORMATS,
    PER_LAYER_TABLE,
    QUANTIZED_FORMATS,
    SCALES_NAME,
    WEIGHT_FORMATS,
    load_weights,
    open_checkpoint,
    parameter_name,
    read_scales,
    scales_file,
)
from cli import (
    DEFAULT_CHECKPOINT,
    PRECISIONS,
    Parser,
    Stats,
    add_model_options,
    number,
    path,
    print_figures,
    run_program,
)
from config import PAGE
from device import check_memory, now, pick_device, told_if_out_of_memory
from files import check_writable, write_atomically
from model import Transformer
from ops import choose
from parallel import Sums, agreed, greatest, replicas_of
from runner import Runner, lease
from sampling import SETTINGS, DrawKind, Sampling
from scheduler import LAGS, Request, Scheduler
from speculate import MOST_DRAFTS, AssistantDrafter, Drafter, DraftModel, PromptLookup, check_same_tokens, pace_of
from text import (
    Output,
    check_prompt,
    completed,
    part_of,
    read_prompts,
    sampling_settings,
    stops_within,
    thoughts_of,
)
from tokenizer import Tokenizer, check_text, open_tokenizer

if TYPE_CHECKING:
    from ranks import Ranks

DEFAULT_PROMPT = 'def read_file(path):\n    """Return the contents of a file."""\n'
RESULT_BYTES, TOKEN_BYTES = 500, 40  # of the host's memory for a finished row, and for each of its tokens

# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_model(
    path: str | Path = DEFAULT_CHECKPOINT,
    device: str | torch.device | None = None,
    precision: str = "bf16",
    fp8: bool = False,
    ops: str = "auto",
    ple_device: str | None = None,
    adapter: str | Path | None = None,
    sums: Sums | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Loads a checkpoint directory (or one weight file in it) on `device` (None: CUDA where there is a GPU).

    `precision`, bf16 or fp32, is that of everything but FP8 weights. With `fp8`, linear layers work in E4M3: from the
    directory's FP8 file, or quantized while loading with the factors of fp8_scales.safetensors; so does an FP8 file
    that is named. A file with int8 or int4 weights is run as it is. Factors for K and V are taken along where there are
    any: of integer weights their own, else those of the directory. `ops`, one of `ops.NAMES`, says what runs the
    layers. ple_device "cpu" leaves the embeddings that each layer has of its own (Gemma 4 E2B and E4B) in the host's
    memory, from which a GPU reads the rows that it needs. What ends a turn to the tokenizer joins config.stop_ids.

    `adapter` is the directory of a LoRA adapter in PEFT's format. It is merged into the weights as they are read, before
    they are quantized; FP8 inputs keep the factors that they have without it. With `sums` (`parallel.init`) the model is
    a rank's part of it; all ranks then make the same calls with it.
    Raises FileNotFoundError or ValueError with a line that says what is wrong; warns about shards that are converted in
    memory.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"path must be that of a checkpoint, not {path!r}")
    device = pick_device(device)
    if precision not in tuple(PRECISIONS):
        raise ValueError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    if sums is not None and ops == "te":
        raise ValueError("ops 'te' runs on one GPU: use 'kernels'")
    operations = replace(choose(ops, device), sums=sums)  # before gigabytes are read
    adapter = None if adapter is None else read_adapter(adapter)
    formats = WEIGHT_FORMATS.values() if adapter or not fp8 else ("fp8", *WEIGHT_FORMATS.values())
    checkpoint = open_checkpoint(path, formats)
    if adapter and checkpoint.weight_format in QUANTIZED_FORMATS:
        advice = "merge it into BF16 weights (scripts/merge_adapter.py), then quantize these"
        raise ValueError(f"{path} has {checkpoint.weight_format} weights, to which no adapter can be added: {advice}")
    updates = updates_of(adapter, checkpoint.config) if adapter else None
    if adapter and adapter.others:
        warnings.warn(f"{adapter} has factors for images or sound, which are left out", stacklevel=2)
    in_int = checkpoint.weight_format in INT_FORMATS
    if fp8 and in_int:
        raise ValueError(f"{path} has {checkpoint.weight_format} weights, which can't run in FP8: leave out --fp8")
    fp8 = fp8 or checkpoint.weight_format == "fp8"
    if fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no FP8 hardware: leave out --fp8")
    config, on_host = checkpoint.config, ()
    if ple_device not in (None, "cpu", "cuda"):
        raise ValueError(f"ple_device must be cpu or cuda, not {ple_device!r}")
    if ple_device is not None and not config.per_layer_size:
        raise ValueError("--ple_device is for models with embeddings of each layer's own (Gemma 4 E2B and E4B)")
    if ple_device == "cpu" and device.type == "cuda":
        on_host = (PER_LAYER_TABLE,)
    tokenizer = open_tokenizer(checkpoint.directory, config)
    if tokenizer.end_of_turn is not None and tokenizer.end_of_turn not in config.stop_ids:
        config = replace(config, stop_ids=(*config.stop_ids, tokenizer.end_of_turn))
    if differences := config.differences_from_published():
        warnings.warn(f"config.json differs from the published model and is followed: {differences}", stacklevel=2)
    if checkpoint.weight_format is None:
        command = f"python scripts/convert_hf_checkpoint.py {os.path.relpath(checkpoint.directory)}"
        warnings.warn(
            f"converting Hugging Face's files in memory; the next start is faster after: {command}", stacklevel=2
        )

    scales, kv_problem = {}, None
    if checkpoint.weight_format != "fp8":
        file = scales_file(checkpoint)
        try:
            scales = read_scales(file if file.exists() else checkpoint.directory / SCALES_NAME, config)
        except FileNotFoundError as error:
            if fp8:
                command = f"python calibrate.py --checkpoint_path {os.path.relpath(checkpoint.directory)}"
                raise FileNotFoundError(f"--fp8 needs scaling factors; {error}: run {command}") from None
        except ValueError as error:
            if fp8:
                raise
            kv_problem = str(error)  # for whoever asks for an E4M3 cache
    if sums is not None and checkpoint.group:
        sums.shard.check_group(config, checkpoint.group)
    with torch.device("meta"):
        model = Transformer(config if sums is None else config.sharded(sums.shard))
        if fp8 or in_int:
            head = {"head_scales.input_scale", "embedding.scale"} & checkpoint.parts.keys()
            model.store("fp8" if fp8 else checkpoint.weight_format, checkpoint.group, head=bool(head))
    if device.type == "cuda":
        needed = 0
        for name, parameter in model.named_parameters():
            itemsize = dtype.itemsize if parameter.requires_grad else parameter.itemsize
            needed += parameter.numel() * itemsize if name not in on_host else 0
        advice = "use a smaller model" + (" or one with int4 weights" if in_int else " or --fp8")
        check_memory(needed, device, "the weights", advice, sums)
    quantizing = fp8 and checkpoint.weight_format != "fp8"
    linear_scales = {
        k: v for k, v in scales.items() if k.startswith("layers.") and k[-8:] not in (".k_scale", ".v_scale")
    }
    weights = load_weights(
        checkpoint,
        device,
        dtype,
        linear_scales if quantizing else None,
        on_host,
        sums and sums.shard,
        updates,
        partial(greatest, sums),
    )
    if quantizing:
        given = {name: torch.tensor(scale, device=device) for name, scale in linear_scales.items()}
        weights = given | weights  # merged ones have scales of their own
    else:  # the FP8 file's own
        scales |= {name: weights.pop(name).item() for name in list(weights) if name.endswith((".k_scale", ".v_scale"))}
    donors = map(config.donor_of, range(config.n_layers))
    kv_scales = [tuple(scales.get(f"layers.{i}.attention.{kind}_scale") for kind in "kv") for i in donors]
    model.kv_scales = KVScales(None if None in kv_scales[0] else kv_scales, kv_problem)
    model.adapter = None if adapter is None else str(adapter)
    model.load({parameter_name(name): weight for name, weight in weights.items()}, device, operations)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Generating


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int | list[int] = 200,
    *,
    on_completion: Callable[[int, int, list[int]], None] | None = None,
    **options,
) -> list[list[int]]:
    """Continues each prompt (token ids, <bos> included) by at most max_new_tokens; returns the new token ids.

    `options` are those of `stream_completions`, whose results these are, sorted by prompt and sample; those that are
    skipped are empty. on_completion gets the number of the prompt, that of the sample, and the tokens of each as soon
    as it is there.
    """
    check_function("on_completion", on_completion)
    results: dict[tuple[int, int], list[int]] = {}
    for prompt, sample, tokens in stream_completions(model, prompts, max_new_tokens, **options):
        results[prompt, sample] = tokens
        if on_completion is not None:
            on_completion(prompt, sample, tokens)
    counts = of_each("num_samples", options.get("num_samples", 1), prompts)
    return [results.get((i, j), []) for i, count in enumerate(counts) for j in range(count)]


@torch.inference_mode()
def stream_completions(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int | list[int] = 200,
    *,
    sampling: Sampling | list[Sampling] | None = None,
    batch_size: int | None = None,
    num_samples: int | list[int] = 1,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | list[int | tuple[int, int]] | None = None,
    stop_ids: tuple[int, ...] | None = None,
    stop_when: Callable[[list[int]], bool] | list[Callable[[list[int]], bool] | None] | None = None,
    kv_cache_dtype: str | torch.dtype | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
    prefix_cache: bool = True,
    on_token: Callable[[int], None] | None = None,
    on_step: Callable[[int, Runner], None] | None = None,
    skip: Container[tuple[int, int]] = (),
    stop_check: str = "ping-pong",
    stats: Stats | None = None,
    drafter: Drafter | None = None,
    speculate_k: int | str = "auto",
    ranks: "Ranks | None" = None,
) -> Iterator[tuple[int, int, list[int]]]:
    """Continues each prompt (token ids, <bos> included) by at most max_new_tokens; yields the number of the prompt,
    that of the sample, both counted from 0, and the new token ids of each completion as soon as it is there.

    There are num_samples completions of each prompt. One that ends with a stop id (default: the model's; () never
    stops) keeps it as its last token, and so does one that ends because stop_when(its new tokens) is true. Settings are
    those of `sampling` (default: `Sampling()`), but for temperature to repetition_penalty where they are given. At most
    batch_size rows run at once (default: what memory holds, at most MAX_BATCH), refilled as they finish; a row's result
    does not depend on the others, nor its noise (drawn from `seed`, the prompt's number and the sample's) on the
    device. kv_cache_dtype is a name of `cache.KV_CACHE_DTYPES`, or a dtype.

    max_new_tokens, sampling, num_samples, stop_when and seed may be lists of one value a prompt. A prompt with a seed
    of its own has the text that it has alone; (seed, i) stands for a seed of all prompts and the prompt's number.

    Prompts that begin with the same tokens share what is computed of them, whole pages of 64 at a time; with
    prefix_cache, also with prompts of earlier calls, as long as there is memory and weights stay. (Weights that are
    changed through `.data`, which PyTorch does not count, want prefix_cache=False once.)

    on_token gets the tokens of a single row as they come; on_step(i, runner) is called before each prefill (i is 0) and
    before decode step i. Completions whose (prompt, sample) is in `skip` are not made. stop_check is for the benchmark
    (`scheduler.LAGS`); `stats` is added to.

    With a `drafter` (speculate.py) a step checks speculate_k guesses of the next tokens at once, 1 to MOST_DRAFTS, or as
    many as promise to pay ("auto"), none if none do. The text is the same.

    With `ranks` (ranks.py) other processes have made the same call: each yields what it takes from the list of all.

    Several threads may run one model at a time, each with a cache of its own. Raises ValueError for an empty prompt, an
    unknown token id, a prompt too long for the context, a setting of a wrong type or out of its range, or too little
    memory, that of the host for the results included, saying which.
    """
    config, device = model.config, model.device
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    overrides = {name: value for name, value in given.items() if value is not None}
    codec = codec_of(kv_cache_dtype, model.dtype)
    if stop_check not in LAGS:
        raise ValueError(f"stop_check must be one of {', '.join(LAGS)}, not {stop_check!r}")
    check_lists(prompts)
    limits = of_each("max_new_tokens", max_new_tokens, prompts)
    samplings = of_each("sampling", Sampling() if sampling is None else sampling, prompts)
    counts = of_each("num_samples", num_samples, prompts)
    stop_when = of_each("stop_when", stop_when, prompts)
    numbers = dict(max_new_tokens=limits, num_samples=counts, batch_size=[] if batch_size is None else [batch_size])
    for name, values in numbers.items():
        for value in values:
            check_count(name, value)
    for each in samplings:
        if not isinstance(each, Sampling):
            raise ValueError(f"sampling must be a Sampling, not {each!r}")
    samplings = [replace(each, **overrides) for each in samplings]
    if isinstance(seed, list):
        seeds = [each if isinstance(each, tuple) else (each, 0) for each in of_each("seed", seed, prompts)]
    else:
        seed = agreed(model.sums, secrets.randbits(32)) if seed is None else seed
        seeds = [(seed, place) for place in range(len(prompts))]
    for each in seeds:
        if len(each) != 2 or not all(map(is_whole, each)):
            raise ValueError(f"seed must be a whole number, not {each[0]!r}")
    prompts = [list(prompt) for prompt in prompts]
    if not prompts:
        return
    check_prompts(model, prompts, limits)
    for name, value in [("on_token", on_token), ("on_step", on_step), *(("stop_when", each) for each in stop_when)]:
        check_function(name, value)
    if on_token is not None and sum(counts) > 1:
        raise ValueError("on_token streams a single row")
    stop_ids = checked_stop_ids(model, stop_ids)
    stats = Stats() if stats is None else stats
    pace = pace_of(drafter, speculate_k)

    n_rows, longest = sum(counts), max(map(len, prompts))
    length = length_of_all(model, prompts, limits)
    kind = DrawKind.of(config.vocab_size, *set(samplings))
    pages = Counter()  # how many requests need so many: samples share those of their prompt
    for prompt, limit, count in zip(prompts, limits, counts):
        alone = -(-(len(prompt) + limit) // PAGE)
        pages[alone] += 1
        pages[alone - len(prompt) // PAGE] += count - 1
    # With more rows than this the request that may take longest would end no sooner, and all others with it
    share = 1 if ranks is None else ranks.replicas
    busy = -(-sum(map(mul, limits, counts)) // (max(limits) * share))
    most = min(MAX_BATCH, -(-busy // 64) * 64)
    mine = -(-n_rows // share)
    of_drafts = drafter, pace.runs[-1] if pace else 1
    rows, page_count = rows_and_pages(
        model, pages, min(batch_size or most, mine), batch_size is None, length, longest, codec, kind, *of_drafts
    )
    check_memory(
        sum(count * (RESULT_BYTES + TOKEN_BYTES * limit) for count, limit in zip(counts, limits)),
        torch.device("cpu"),
        f"the text of {n_rows} rows",
        "lower --num_samples, --max_new_tokens or the number of prompts",
        model.sums,
    )
    longest_first = sorted(range(len(prompts)), key=lambda i: -limits[i])  # one that starts last keeps few rows busy
    keys = ((i, j) for i in longest_first for j in range(counts[i]) if (i, j) not in skip)

    def request_of(key: tuple[int, int]) -> Request:
        i = key[0]
        return Request(key, prompts[i], limits[i], samplings[i], seeds[i], stop_when[i])

    if ranks is None:
        requests = map(request_of, keys)
    else:
        deal = ranks.deal(list(keys), min(batch_size or most, mine))
        requests = lambda *room: map(request_of, deal.take(*room))
    with told_if_out_of_memory(device, f"{rows} rows of {length} tokens", ADVICE):
        start = now(device)
        with lease(model, rows, length, codec, compile, compile_prefill, page_count, *of_drafts) as runner:
            runner.start(model, rows, kind, stop_ids, prefix_cache, pace.runs if pace else (1,))
            started = now(device)
            check = "every" if device.type == "cpu" else stop_check
            scheduler = Scheduler(runner, model, requests, rows, check, pace)
            drawn = kv_bytes = 0  # by steps; that these had to read if each made a token
            try:
                for request, tokens in scheduler.run(on_step, on_token):
                    drawn += len(tokens) - 1
                    context = len(request.prompt) + len(tokens) // 2
                    kv_bytes += (len(tokens) - 1) * context_bytes(config, context, codec)
                    stats.prompt_tokens += len(request.prompt)
                    stats.new_tokens += len(tokens)
                    stats.rows += 1
                    stats.running = len(scheduler.running)
                    yield *request.key, tokens
            finally:
                prefill_seconds = runner.finish()
            stats.compile_seconds += started - start
            stats.prefill_seconds += prefill_seconds
            stats.decode_seconds += now(device) - started - prefill_seconds
            stats.steps += scheduler.steps
            stats.drafts += scheduler.drafts
            stats.right += scheduler.right
            checked = drawn - scheduler.right.total()  # rows of all steps
            stats.bytes_read += int(kv_bytes * checked / max(1, drawn))
            for run, steps in scheduler.drafted.items():
                stats.bytes_read += int(steps * model.step_bytes(run * checked / scheduler.steps))
                if run > 1:
                    stats.draft_seconds += steps * runner.draft_seconds(model, run)
                    stats.bytes_read += steps * (run - 1) * drafter.weight_bytes


# ---------------------------------------------------------------------------------------------------------------------
# The program


def drafts_per_step(text: str) -> int | str:
    """What `--speculate_k` says."""
    return text if text == "auto" else number(int, 1, MOST_DRAFTS)(text)


def program_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="generate.py", description="Generate text with Gemma.")
    add, default = parser.add_argument, Sampling()
    add_model_options(parser, "checkpoint_path", "adapter")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more prompts (default: a bit of Python)"
    )
    source.add_argument(
        "--prompts_file",
        type=path,
        metavar="FILE",
        help="a prompt a line, or JSON lines with 'prompt', or 'messages', and settings of its own; - is stdin "
        "(default: none)",
    )
    source.add_argument("--interactive", action="store_true", help="chat; the cache is kept between turns")
    add("--chat", action="store_true", help="put prompts into the chat format (instruction-tuned checkpoints)")
    add("--system", metavar="TEXT", help="what a chat begins with, before the user's first turn (default: nothing)")
    add("--thinking", action="store_true", help="ask the model to think first; its thoughts go to stderr")
    add("--no_thoughts", action="store_true", help="leave thoughts out of what is shown and written")
    count = number(int, 1)
    add("--max_new_tokens", type=count, default=200, metavar="N", help="of a completion (default: %(default)s)")
    add("--batch_size", type=count, metavar="N", help=f"rows that run at once (default: all, at most {MAX_BATCH})")
    add("--num_samples", type=count, default=1, metavar="N", help="completions of each prompt (default: %(default)s)")
    share = number(float, 0, 1)
    kinds = dict(temperature=number(float, 0), top_k=number(int, 0, MOST), top_p=share, min_p=share)
    off = dict(temperature="greedy", top_k="no limit", top_p="no limit", min_p="no limit", repetition_penalty="none")
    for name in SETTINGS:
        value = 1 if name in ("top_p", "repetition_penalty") else 0
        text = f"{value} is {off[name]} (default: the checkpoint's, else {getattr(default, name)})"
        add(f"--{name}", type=kinds.get(name, number(float, 0)), help=text)
    add("--stop", nargs="+", action="extend", metavar="TEXT", help="text ends before any of these (default: none)")
    beams = (
        "search for the most probable text with N beams, --batch_size prompts at once (default: %(default)s, no search)"
    )
    add("--num_beams", type=count, default=1, metavar="N", help=beams)
    penalty = "of beams: log-probabilities are divided by length ** X (default: 1.0)"
    add("--length_penalty", type=float, metavar="X", help=penalty)
    add("--early_stopping", action="store_true", help="a search ends once N texts have ended")
    add("--seed", type=int, help="the same seed gives the same samples (default: a random one)")
    add("--compile", action="store_true", help="compile the decode step; on CUDA, record it as one graph")
    add("--compile_prefill", action="store_true", help="compile prefill, too")
    add_model_options(parser, "tp", "fp8", "kv_cache_dtype", "device", "ops", "precision")
    draft = "a smaller checkpoint whose guesses are checked, some at once; the text stays (default: none)"
    add("--draft_checkpoint_path", type=path, metavar="PATH", help=draft)
    add("--prompt_lookup", action="store_true", help="check guesses from the text so far, some at once; the text stays")
    reject = "draw guesses and accept or reject them: more are right, but the text depends on --speculate_k"
    add("--rejection_sampling", action="store_true", help=reject)
    k = f"guesses a step, 1 to {MOST_DRAFTS}, or auto: as many as pay, none if none do (default: auto)"
    add("--speculate_k", type=drafts_per_step, metavar="N", help=k)
    ple = "cpu: embeddings of each layer's own (Gemma 4 E2B, E4B) stay in the host's memory (default: --device)"
    add("--ple_device", choices=("cpu", "cuda"), help=ple)
    add("--json", action="store_true", help="print one JSON object a completion")
    output = "write JSON lines as rows finish, resumed where an earlier start was ended (default: none)"
    add("--output", type=path, metavar="FILE.jsonl", help=output)
    add(
        "--profile",
        type=path,
        metavar="TRACE.json",
        help="write a chrome trace of prefill and ten decode steps (default: none)",
    )
    return parser


class _Trace:
    """Records prefill and ten decode steps as `on_step` is called."""

    recording = None
    running = False

    def __call__(self, step: int, runner: Runner):
        if step == 0 and self.recording is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.recording, self.running = torch.profiler.profile(activities=activities), True
            self.recording.start()
        elif step == 11:
            self.stop()

    def stop(self):
        if self.running:
            self.running = False
            self.recording.stop()

    def write(self, file: Path):
        """Writes a chrome trace. Raises OSError where there is no room: the profiler leaves a part and says nothing."""
        with TemporaryDirectory() as directory:
            trace = Path(directory) / "trace.json"
            self.recording.export_chrome_trace(str(trace))
            if not trace.exists():
                raise OSError(f"{file} can't be written: {directory} has no room for it")
            write_atomically(file, lambda out: out.write(trace.read_bytes()))


def run(args: argparse.Namespace):
    replicas = replicas_of(args.tp)
    if args.tp == replicas == 1:
        return _run(args)
    if replicas > 1:
        _check_for_replicas(args)
    from ranks import joined  # what one process has no use for

    with joined(args) as (ranks, sums):
        _run(args, ranks, sums)


def _check_for_replicas(args: argparse.Namespace):
    """Raises ValueError for options that don't go with several models."""
    refused = dict(interactive=args.interactive, profile=args.profile is not None, num_beams=args.num_beams > 1)
    for name, is_given in refused.items():
        if is_given:
            raise ValueError(f"several ranks take no --{name}, unless they share a model (--tp)")
    if args.output is None:
        raise ValueError(
            "several ranks need --output FILE.jsonl, which they write together, unless they share a model (--tp)"
        )


def _run(args: argparse.Namespace, ranks: "Ranks | None" = None, sums: Sums | None = None):
    others = args.json, args.output, args.profile, args.num_samples > 1, (args.batch_size or 1) > 1
    if args.interactive and any(others):
        raise ValueError("--interactive takes no --json, --output, --profile, --num_samples or --batch_size")
    if args.profile is not None:
        check_writable(args.profile)
    is_first, several = ranks is None or ranks.rank == 0, ranks is not None and ranks.replicas > 1
    path = args.checkpoint_path
    defaults = sampling_settings(path if path.is_dir() else path.parent)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    sampling = Sampling(**defaults | given)
    asked = _asked(args, sampling)
    if args.system is not None:
        check_text(args.system, "--system")
    if not args.interactive and all(each.messages is None for each in asked):
        for name in ("system", "thinking"):
            if getattr(args, name) not in (None, False):
                raise ValueError(f"--{name} needs --chat or --interactive, or 'messages' in a prompts file")
    beams = _beam_settings(args, asked)
    if args.prompt_lookup and args.draft_checkpoint_path:
        raise ValueError("--prompt_lookup and --draft_checkpoint_path are two ways to the same: give one of them")
    if args.speculate_k and not (args.prompt_lookup or args.draft_checkpoint_path):
        raise ValueError("--speculate_k needs --draft_checkpoint_path or --prompt_lookup")
    if args.rejection_sampling and not args.draft_checkpoint_path:
        raise ValueError("--rejection_sampling needs --draft_checkpoint_path")
    if args.rejection_sampling and args.speculate_k in (None, "auto"):
        raise ValueError("--rejection_sampling needs a number, --speculate_k N: the text depends on it")
    output, seed, done = _output(args, asked, beams, ranks) if args.output else (None, args.seed, ())
    seed = agreed(sums, secrets.randbits(32)) if seed is None else seed
    start = time.perf_counter()
    options = args.device, args.precision, args.fp8, args.ops, args.ple_device, args.adapter
    model, tokenizer = load_model(args.checkpoint_path, *options, sums)
    drafter = _drafter(args, model, tokenizer)
    load_seconds = now(model.device) - start
    if args.interactive or any(each.messages for each in asked):
        tokenizer.check_chat(args.thinking)
    if args.interactive:
        with torch.no_grad():
            return converse(model, tokenizer, args, sampling, seed, drafter, ranks and ranks.on_step)

    stop_ids, stats, fitting = model.config.stop_ids, Stats(), []
    for i, each in enumerate(asked):
        try:
            each.tokens = _tokens(each, tokenizer, args.thinking)
            check_context(model, len(each.tokens), each.max_new_tokens, each.where or "the prompt")
            fitting.append(i)
        except ValueError as error:
            if args.output is None:
                raise
            for j in range(each.num_samples if is_first else 0):
                if (i, j) not in done:
                    output.add(i, j, each.named | {"error": str(error)})
    prompts = [asked[i] for i in fitting]
    total = sum(each.num_samples for each in prompts)
    place = {i: n for n, i in enumerate(fitting)}  # in `prompts`, of one in `asked`
    skip = {(place[i], j) for i, j in done if i in place}
    streaming = sys.stdout.isatty() and not args.json and args.output is None and total == 1 and not beams
    printer = Printer(tokenizer, stop_ids, asked[0].stop, not args.no_thoughts) if streaming else None
    trace = _Trace() if args.profile and is_first else None
    hooks = [hook for hook in (ranks and ranks.on_step, trace) if hook]
    if streaming and asked[0].messages is None:
        print(asked[0].prompt, end="", flush=True)
    begin = time.perf_counter()
    with tqdm(total=total, initial=len(skip), unit="text", disable=None if args.output else True, leave=False) as bar:

        def show(rows: int, tokens: int, where: str):
            bar.update(len(skip) + rows - bar.n)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - begin):,.0f} tokens/s, {where}")

        def on_completion(n: int, j: int, tokens: list[int]):
            output.add(fitting[n], j, _completion(prompts[n], tokens, tokenizer, stop_ids, args.no_thoughts))
            if ranks:
                ranks.made(len(tokens))
            if not several:
                show(bar.n - len(skip) + 1, stats.new_tokens, f"{stats.running} rows in use")

        if several and is_first:
            ranks.on_progress = lambda rows, tokens: show(rows, tokens, f"{ranks.count} ranks")
        options = dict(
            batch_size=args.batch_size,
            kv_cache_dtype=args.kv_cache_dtype,
            compile=args.compile,
            on_step=(lambda *step: [hook(*step) for hook in hooks]) if hooks else None,
            on_completion=on_completion if output else None,
            skip=skip,
            stats=stats,
        )
        texts, limits = [each.tokens for each in prompts], [each.max_new_tokens for each in prompts]
        if beams:
            results = beam_search(model, texts, limits, **beams, **options)
        else:
            results = generate(
                model,
                texts,
                limits,
                sampling=[each.sampling for each in prompts],
                num_samples=[each.num_samples for each in prompts],
                seed=[(seed, i) if asked[i].seed is None else (asked[i].seed, 0) for i in fitting],
                stop_when=[stops_within(tokenizer, each.stop) for each in prompts],
                compile_prefill=args.compile_prefill,
                on_token=printer,
                drafter=drafter,
                speculate_k=args.speculate_k or "auto",
                ranks=ranks if several else None,
                **options,
            )
        if several:
            if output:
                output.stream.close()
            made = ranks.gather(), time.perf_counter() - begin
            if is_first:
                output.gather(sum(each.num_samples for each in asked), ranks.replicas)
    if trace:
        trace.stop()
    if args.output:
        if is_first:
            output.finish()
    elif streaming:
        printer.end()
    else:
        rows = [(n, each, j) for n, each in enumerate(prompts, start=1) for j in range(each.num_samples)]
        for (n, each, j), tokens in zip(rows, results):
            completion = _completion(each, tokens, tokenizer, stop_ids, args.no_thoughts)
            if args.json:  # on another stdout what stands for a character that it lacks is no JSON
                print(json.dumps(completion, ensure_ascii=sys.stdout.encoding not in ("utf-8", "UTF-8")))
                continue
            head = f"--- prompt {n}{f', sample {j + 1}' if each.num_samples > 1 else ''}\n" if total > 1 else ""
            if "thoughts" in completion:
                print(head + completion["thoughts"], file=sys.stderr)
            print(head + (each.prompt if each.messages is None else "") + completion["text"])
        sys.stdout.flush()
    print(_used(sampling, [name for name in defaults if name not in given], beams, model), file=sys.stderr)
    print_figures(stats, load_seconds, model, None if beams else seed)
    if several:
        (rows, tokens), seconds = made
        of_all = f"{tokens} tokens in {rows} rows and {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s"
        print(f"all {ranks.count} ranks: {of_all}; figures above are of the first", file=sys.stderr)
    if trace:
        trace.write(args.profile)


def _drafter(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> Drafter | None:
    """What makes drafts, as the options say; None for nothing. Raises ValueError for a checkpoint that can't."""
    if args.prompt_lookup:
        return PromptLookup()
    if args.draft_checkpoint_path is None:
        return None
    if is_assistant(args.draft_checkpoint_path):
        if args.rejection_sampling:
            raise ValueError("--rejection_sampling needs a draft model; an assistant's guesses are not drawn")
        return AssistantDrafter(load_assistant(args.draft_checkpoint_path, model))
    name, options = args.draft_checkpoint_path, (args.device, args.precision, False, args.ops)
    draft, other = load_model(name, *options)
    check_same_tokens(tokenizer, other, str(name))
    if draft.config.context_length < model.config.context_length:
        warnings.warn(
            f"{name} was trained for {draft.config.context_length} tokens, and drafts behind more", stacklevel=2
        )
    return DraftModel(draft, args.rejection_sampling)


def _asked(args: argparse.Namespace, sampling: Sampling) -> list[argparse.Namespace]:
    """The prompts with their settings: what a line of the prompts file says, else the options. `named` is what stands
    in a completion, too. Raises ValueError, naming the line, for a setting of a wrong type or out of its range."""
    if args.prompts_file:
        entries = read_prompts(args.prompts_file, ("id", "max_new_tokens", "num_samples", "seed", "stop", *SETTINGS))
    else:
        entries = [{"prompt": text, "where": ""} for text in args.prompt or [DEFAULT_PROMPT]]
        for entry in entries:
            check_prompt(entry["prompt"])
    options = {name: getattr(args, name) for name in ("max_new_tokens", "num_samples", "stop")} | {"seed": None}
    asked = []
    for entry in entries:
        each = argparse.Namespace(**options | entry)
        each.named = {key: entry[key] for key in ("id", "prompt", "messages") if key in entry}
        each.own, each.messages = entry.keys(), entry.get("messages")
        if args.chat and each.messages is None:
            each.messages = [{"role": "user", "content": each.prompt}]
        if each.messages and each.messages[0]["role"] not in ("system", "developer"):
            each.messages = [*system_messages(args.system), *each.messages]
        try:
            each.sampling = replace(sampling, **{name: entry[name] for name in SETTINGS if name in entry})
            for name in ("max_new_tokens", "num_samples"):
                check_count(name, getattr(each, name))
            if each.seed is not None and not is_whole(each.seed):
                raise ValueError(f"seed must be a whole number, not {each.seed!r}")
            stops = [each.stop] if isinstance(each.stop, str) else each.stop or []
            if not isinstance(stops, list) or not all(stop and isinstance(stop, str) for stop in stops):
                raise ValueError(f"stop must be a text or a list of texts, not {each.stop!r}")
            for stop in stops:
                check_text(stop, "a stop")
            each.stop = stops
        except ValueError as error:
            raise ValueError(f"{each.where}: {error}" if each.where else str(error)) from None
        asked.append(each)
    return asked


def _tokens(asked: argparse.Namespace, tokenizer: Tokenizer, thinking: bool) -> list[int]:
    """Those of a prompt. Raises ValueError, naming its line, for messages that the template refuses."""
    if asked.messages is None:
        return tokenizer.encode(asked.prompt)
    try:
        return tokenizer.encode_chat(asked.messages, thinking)
    except ValueError as error:
        raise ValueError(f"{asked.where}: {error}" if asked.where else str(error)) from None


def _beam_settings(args: argparse.Namespace, asked: list[argparse.Namespace]) -> dict:
    """How beams are searched for, as `beams.search` takes it; {} without --num_beams. Raises ValueError for options and
    settings of a prompt's own that don't go with it."""
    if args.num_beams == 1:
        if args.length_penalty is not None or args.early_stopping:
            raise ValueError("--length_penalty and --early_stopping need --num_beams")
        return {}
    without = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "interactive", "compile_prefill")
    without += ("draft_checkpoint_path", "prompt_lookup")
    given = [name for name in without if getattr(args, name) is not None and getattr(args, name) is not False]
    given += ["num_samples"] if args.num_samples > 1 else []
    if given:
        raise ValueError(f"--num_beams takes no --{given[0]}")
    for each in asked:
        if own := [name for name in (*SETTINGS, "num_samples", "seed", "stop") if name in each.own]:
            raise ValueError(f"{each.where}: --num_beams takes no {own[0]!r} of a prompt's own")
    penalty = 1.0 if args.length_penalty is None else args.length_penalty
    return dict(
        num_beams=args.num_beams,
        length_penalty=penalty,
        early_stopping=args.early_stopping,
        repetition_penalty=asked[0].sampling.repetition_penalty,
    )


def _output(
    args: argparse.Namespace, asked: list[argparse.Namespace], beams: dict, ranks: "Ranks | None" = None
) -> tuple[Output | None, int, Container[tuple[int, int]]]:
    """The file of --output, for a run of these prompts and settings, of each replica's first rank; and of all: the seed,
    and which completions are done already, both as the first rank says."""
    check_writable(args.output)
    run = {name: getattr(args, name) for name in ("chat", "fp8", "kv_cache_dtype", "precision")}
    run["checkpoint"] = str(args.checkpoint_path.resolve())
    run |= {"adapter": str(args.adapter.resolve())} if args.adapter else {}
    run |= {"beams": beams} if beams else {}
    run |= {name: getattr(args, name) for name in ("system", "thinking", "no_thoughts") if getattr(args, name)}
    of_each = ("named", "max_new_tokens", "num_samples", "seed", "stop")
    run["prompts"] = [[*(getattr(each, name) for name in of_each), vars(each.sampling)] for each in asked]
    if ranks is None or ranks.rank == 0:
        output = Output(args.output, run, args.seed)
        if ranks is not None:
            ranks.share("output", json.dumps([output.seed, [*output.done]]))
        return output, output.seed, set(output.done)
    seed, done = json.loads(ranks.shared("output"))
    done = {tuple(key) for key in done}
    if ranks.member:
        return None, seed, done
    output = Output(args.output, run, seed, ranks.replica)
    if not (first := part_of(args.output, 0)).exists():
        raise ValueError(
            f"rank {ranks.rank} has no {first}: ranks on several hosts need a directory that all of them share"
        )
    return output, seed, done


def _completion(
    asked: argparse.Namespace, tokens: list[int], tokenizer: Tokenizer, stop_ids: tuple[int, ...], no_thoughts: bool
) -> dict:
    """What --json and --output give of new tokens."""
    text, stopped = completed(tokenizer, tokens, stop_ids, asked.stop)
    thoughts = "" if no_thoughts else thoughts_of(tokenizer, tokens)
    return asked.named | {
        "text": text,
        **({"thoughts": thoughts} if thoughts else {}),
        "tokens": tokens,
        "finish_reason": "stop" if stopped else "length",
        "prompt_tokens": len(asked.tokens),
    }


def _used(sampling: Sampling, from_checkpoint: list[str], beams: dict, model: Transformer) -> str:
    """What tokens were drawn by: settings, those of generation_config.json among them, and ids of its own."""
    off = dict(top_k=0, top_p=1, min_p=0, repetition_penalty=1)
    settings = {name: value for name, value in vars(sampling).items() if value != off.get(name)}
    if beams or not sampling.temperature:
        settings = {name: value for name, value in settings.items() if name == "repetition_penalty"}
    parts = [f"{beams['num_beams']} beams"] if beams else [] if sampling.temperature else ["greedy"]
    parts += [f"{name} {value}" for name, value in settings.items()]
    line = ", ".join(parts)
    if names := ", ".join(name for name in from_checkpoint if name in settings):
        line += f" ({names}: generation_config.json's)"
    for name, ids in (("stop", model.config.stop_ids), ("suppressed", model.config.suppressed_ids)):
        line += f"; {name} ids {', '.join(map(str, ids))}" if ids else ""
    return line


def main(argv: list[str] | None = None) -> int:
    return run_program(run, program_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
