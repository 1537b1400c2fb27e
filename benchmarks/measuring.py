"""What every protocol of benchmark.py measures with: prompts that are the same for everyone, clocks, and round figures."""

import math
import platform
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from device import now

# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def random_prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """<bos> and random ids, the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, vocab_size, (rows, length), generator=generator)
    tokens[:, 0] = 2
    return tokens.tolist()


def request_lengths(count: int, shape: str) -> list[tuple[int, int]]:
    """Tokens of the prompt and new ones of each request, which a shape like 128/128 gives; mixed ones are log-normal
    around means of 200 and 250, cut at 16 and 1,024."""
    if shape != "mixed":
        prompt, new = map(int, shape.split("/"))
        return [(prompt, new)] * count
    source, deviation = random.Random(20261124), 0.8

    def length(mean: float) -> int:
        value = source.lognormvariate(math.log(mean) - deviation**2 / 2, deviation)
        return max(16, min(1024, round(value)))

    return [(length(200), length(250)) for _ in range(count)]


def prompts_of_lengths(lengths: list[int], vocab_size: int) -> list[list[int]]:
    prompts = random_prompts(len(lengths), max(lengths), vocab_size)
    return [prompt[:length] for prompt, length in zip(prompts, lengths)]


def tutorial_prompts(rows: int, longest: int, vocab_size: int) -> list[list[int]]:
    """<bos> and at least one random id each, `longest` tokens at most."""
    lengths = torch.randint(2, longest + 1, (rows,), generator=torch.Generator().manual_seed(1)).tolist()
    return prompts_of_lengths(lengths, vocab_size)


# ---------------------------------------------------------------------------------------------------------------------
# Times


def time_in_turn(runners: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[tuple]]:
    """(seconds, what it returned) of each of 1 + `repeats` runs of each runner: a drift of the machine's speed meets
    all alike."""
    runs = {name: [] for name in runners}
    for _ in range(1 + repeats):
        for name, run in runners.items():
            start = now(device)
            result = run()
            runs[name].append((now(device) - start, result))
    return runs


def spread(seconds: list[float]) -> dict:
    return {"seconds": median(seconds), "seconds_spread": [min(seconds), max(seconds)]}


def seconds_of(runs: list[tuple]) -> dict:
    """Of what `time_in_turn` returns of a runner: the first run warms up."""
    return spread([seconds for seconds, _ in runs[1:]]) | {"first_run_seconds": runs[0][0]}


def time_launches(run: Callable, device: torch.device, count: int = 50) -> float:
    """Seconds of a run, of `count` in a CUDA graph or, on a CPU, one behind another; the median of ten times."""
    replay = lambda: [run() for _ in range(count)]
    if device.type == "cuda":
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            replay()
        replay = graph.replay
    return median(seconds for seconds, _ in time_in_turn({"": replay}, 10, device)[""][1:]) / count


def matrix_rate(device: torch.device, fp8: bool, size: int) -> float:
    """FLOP a second of square products of random values, summed as ours are (no fast accumulation); the best of
    five."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    run, best, count = partial(torch.mm, a, b.t()), math.inf, 10
    if fp8:
        one = torch.ones((), device=device)
        options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": False}
        run = partial(torch._scaled_mm, a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), **options)
    for _ in range(6):
        start = now(device)
        for _ in range(count):
            run()
        best = min(best, now(device) - start)
    return count * 2 * size**3 / best


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rounded(row: dict) -> dict:
    """Floats to five digits."""

    def short(value):
        if isinstance(value, list):
            return [short(v) for v in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return {key: short(value) for key, value in row.items()}
