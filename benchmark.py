"""Every figure in the README. `python benchmark.py PROTOCOL` prints a table and, with --output, writes JSON.

Peers run in the same process, in turn with ours, so that a drift of the machine's speed meets both alike.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from checkpoint import write_atomically
from generate import DEFAULT_CHECKPOINT, Stats, copy_bandwidth, generate, load_model, peak_memory
from model import ModelConfig, Transformer

REPEATS = 5


def random_prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """<bos> and random ids, the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, vocab_size, (rows, length), generator=generator)
    tokens[:, 0] = 2
    return tokens.tolist()


def timed(run: Callable[[], Stats | None], device: torch.device) -> tuple[float, Stats | None]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    stats = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, stats


def measure(runners: dict[str, Callable], tokens: int, device: torch.device, case: dict) -> list[dict]:
    """Runs each of `runners` once to warm up, then REPEATS times in turn. `tokens` are what one run generates.

    Seconds are those of the whole call, prefill and sampling included, less what our Stats call compiling: a runner
    compiles in its first run, whose time is given apart.
    """
    first, seconds, stats = {}, {name: [] for name in runners}, {}
    for repeat in range(REPEATS + 1):
        for name, run in runners.items():
            elapsed, run_stats = timed(run, device)
            if repeat == 0:
                first[name] = elapsed
            else:
                seconds[name].append(elapsed - (run_stats.compile_seconds if run_stats else 0))
            stats[name] = run_stats
    rows = []
    for name, values in seconds.items():
        row = case | {
            "name": name,
            "tokens_per_second": round(tokens / median(values), 1),
            "seconds": [round(value, 4) for value in sorted(values)],
            "first_run_seconds": round(first[name], 2),
        }
        if stats[name]:
            row["decode_tokens_per_second"] = round(stats[name].decode_rate, 1)
            row["decode_gb_per_second"] = round(stats[name].bandwidth / 1e9, 1)
        rows.append(row)
        print_row(row)
    return rows


def print_row(row: dict):
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def ours(model: Transformer, prompts: list[list[int]], new_tokens: int, **options) -> Callable[[], Stats]:
    def run() -> Stats:
        stats = Stats()
        generate(model, prompts, new_tokens, temperature=0, stop_ids=(), stats=stats, **options)
        return stats

    return run


def transformers_generate(model, prompts: list[list[int]], new_tokens: int, **options) -> Callable[[], None]:
    """The peer's own loop at its defaults: greedy, no stop token, dynamic cache unless `options` say otherwise."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts, device=model.device)

    def run():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **options
        )
        assert output.shape[1] == ids.shape[1] + new_tokens

    return run


def have_transformers() -> bool:
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no peer is timed", file=sys.stderr)
        return False
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return True


def protocol_cpu(args: argparse.Namespace) -> list[dict]:
    """tiny-gemma, batch 1 and 16, 32 prompt tokens, 200 new; and the time from process start to the first token."""
    device, rows = torch.device("cpu"), []
    model, _ = load_model(DEFAULT_CHECKPOINT, device)
    peer = None
    if args.peers and have_transformers():
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.bfloat16)
    for batch in (1, 16):
        prompts = random_prompts(batch, 32, model.config.vocab_size)
        runners = {"eager": ours(model, prompts, 200), "compile": ours(model, prompts, 200, compile=True)}
        if peer is not None:
            runners["transformers"] = transformers_generate(peer, prompts, 200)
        measured = measure(runners, 200 * batch, device, {"model": "tiny-gemma", "batch": batch})
        if peer is not None:
            for row in measured:
                row["times_transformers"] = round(row["tokens_per_second"] / measured[-1]["tokens_per_second"], 2)
        rows += measured
    starts = sorted(start_to_first_token() for _ in range(REPEATS))
    row = {"model": "tiny-gemma", "name": "process start to first token", "seconds": [round(s, 2) for s in starts]}
    print_row(row)
    return [*rows, row]


def start_to_first_token() -> float:
    command = [sys.executable, "generate.py", "--max_new_tokens", "1", "--prompt", "\n", "--device", "cpu"]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    assert process.stdout.read(1)
    elapsed = time.perf_counter() - start
    process.stdout.read()
    assert process.wait() == 0
    return elapsed


def protocol_latency(args: argparse.Namespace) -> list[dict]:
    """gemma-2b and gemma-7b, random BF16 weights, batch 1, 128 prompt tokens, 200 new, --compile, on a GPU."""
    device, rows = torch.device("cuda"), []
    for name in args.models or ("gemma-2b", "gemma-7b"):
        config = ModelConfig.from_name(name)
        model = Transformer.random(config, device)
        prompts = random_prompts(1, 128, config.vocab_size)
        torch.cuda.reset_peak_memory_stats()
        runners = {"eager": ours(model, prompts, 200), "compile": ours(model, prompts, 200, compile=True)}
        measured = measure(runners, 200, device, {"model": name, "batch": 1, "context": 128})
        measured[-1]["peak_memory_gib"] = round(peak_memory(device) / 2**30, 2)
        del model, runners
        release()
        if args.peers and have_transformers():
            from transformers import AutoModelForCausalLM, GemmaConfig

            peer_config = GemmaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                head_dim=config.head_dim,
            )
            with device:
                peer = AutoModelForCausalLM.from_config(peer_config, dtype=torch.bfloat16)
            run = transformers_generate(peer, prompts, 200, cache_implementation="static")
            measured += measure(
                {"transformers, static cache, compiled": run}, 200, device, {"model": name, "batch": 1, "context": 128}
            )
            del peer, run
            release()
        rows += measured
    return rows


def protocol_fp8(args: argparse.Namespace) -> list[dict]:
    """gemma-7b, random weights, batch 1, 8 and 64, 128 prompt tokens, 64 new, --compile: BF16, FP8, FP8 with E4M3 cache."""
    device, rows = torch.device("cuda"), []
    config = ModelConfig.from_name("gemma-7b")
    for weights, head, cache in (("bf16", False, None), ("fp8", False, None), ("fp8", True, torch.float8_e4m3fn)):
        model = Transformer.random(config, device, fp8=weights == "fp8", head=head)
        model.has_kv_scales = True  # of 1.0, which does for random values
        name = weights + (" with head, E4M3 cache" if head else "")
        for batch in (1, 8, 64):
            release()
            torch.cuda.reset_peak_memory_stats()
            run = ours(model, random_prompts(batch, 128, config.vocab_size), 64, compile=True, kv_cache_dtype=cache)
            (row,) = measure({name: run}, 64 * batch, device, {"model": "gemma-7b", "batch": batch, "context": 128})
            row["weights_gib"] = round(model.weight_bytes / 2**30, 2)
            row["kv_cache_gib"] = round(model.cache_bytes(batch, 192, cache) / 2**30, 3)
            row["peak_memory_gib"] = round(peak_memory(device) / 2**30, 2)
            rows.append(row)
        del model, run
        release()
    return rows


def release():
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


def environment(device: torch.device) -> dict:
    """What the figures were measured with, the copy bandwidth among it."""
    versions = {}
    for package in ("torch", "triton", "transformers"):
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


PROTOCOLS = {"cpu": (protocol_cpu, "cpu"), "latency": (protocol_latency, "cuda"), "fp8": (protocol_fp8, "cuda")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "protocol", choices=PROTOCOLS, help="; ".join(f"{k}: {v[0].__doc__}" for k, v in PROTOCOLS.items())
    )
    parser.add_argument("--models", nargs="+", choices=("gemma-2b", "gemma-7b"), help="latency: only these")
    parser.add_argument("--no_peers", dest="peers", action="store_false", help="leave out transformers")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    protocol, device = PROTOCOLS[args.protocol]
    if device == "cuda" and not torch.cuda.is_available():
        print(f"error: protocol {args.protocol} needs a CUDA GPU", file=sys.stderr)
        return 2
    result = {"protocol": args.protocol, **environment(torch.device(device))}
    print(json.dumps(result), flush=True)
    result["results"] = protocol(args)
    bandwidth = result["copy_bandwidth_gb_per_second"]
    for row in result["results"]:
        if "decode_gb_per_second" in row:
            row["share_of_copy_bandwidth"] = round(row["decode_gb_per_second"] / bandwidth, 3)
            print_row(
                {key: row[key] for key in ("model", "batch", "name", "tokens_per_second", "share_of_copy_bandwidth")}
            )
    if args.output:
        content = (json.dumps(result, indent=1) + "\n").encode()
        write_atomically(args.output, lambda out: out.write(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
