"""What benchmark.py makes of its results: tables as text and Markdown, a picture of `sweep`, figures of documents.

Nothing here needs a GPU, PyTorch or another file of the project: results go in, text comes out.
"""

import json
import math
import textwrap
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

OURS, VLLM = "gemma-fast", "vLLM"
BEGIN, END = "<!-- headline: written by python benchmark.py report -->", "<!-- /headline -->"
PRECISIONS = {
    "bf16": "BF16",
    "fp8": "FP8 layers",
    "fp8-kv": "FP8 layers, E4M3 cache",
    "fp8-all": "FP8 layers and embedding, E4M3 cache",
    "int8": "int8",
    "int8-all": "int8, embedding too",
    **{
        f"{kind}-g{group}{end}": f"{title}, groups of {group}{more}"
        for group in (32, 128)
        for end, more in (("", ""), ("-all", ", embedding in int8"))
        for kind, title in (("int4", "int4"), ("int4-gptq", "GPTQ"))
    },
}
LABELS = {  # columns that say what a row is of, where its table has them: key, head
    "model": "model",
    "checkpoint": "checkpoint",
    "precision": "weights and cache",
    "name": "program",
    "ops": "operations",
    "check": "check",
    "shape": "prompt/new tokens",
    "drafts": "drafts",
    "right": "drafts right",
    "batch": "batch",
    "compile_prefill": "`--compile_prefill`",
    "expandable_segments": "expandable segments",
}

# ---------------------------------------------------------------------------------------------------------------------
# Text, for the terminal


def cell(value) -> str:
    if isinstance(value, list):
        return "..".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def table(rows: Iterable[dict]) -> str:
    """Returns rows as text, a column a key, aligned; the words of a key stand above each other."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def form(value, text: str) -> str:
    """Returns `text` with a number in it; what was not measured stays empty."""
    return "" if value is None else text.format(value)


def share(value) -> str:
    return "" if value is None else f" ({100 * value:.0f} %)"


def joined(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def markdown(lines: list[dict[str, str]]) -> str:
    """Returns a table with a column for each key of any line, in the order of their first appearance, and none for a
    key whose cells are all empty."""
    heads = dict.fromkeys(head for line in lines for head in line)
    heads = [head for head in heads if any(line.get(head) for line in lines)]
    body = [[line.get(head, "") for head in heads] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *body)) + "\n"


def labels(row: dict, known: Iterable[str] = LABELS) -> dict[str, str]:
    """Returns the cells that say what a row is of."""
    words = {False: "no", True: "yes"} | PRECISIONS
    return {
        LABELS[key]: str(row[key] if key == "batch" else words.get(row[key], row[key])) for key in known if key in row
    }


def pivot(rows: list[dict], known: Iterable[str], column: Callable[[dict], str], content: Callable[[dict], str]) -> str:
    """Returns a table with a line for each case, of what the `known` keys say, and a column for each value of
    column(row)."""
    lines, known = {}, tuple(known)
    heads = {head: "" for row in rows for head in labels(row, known)} | {column(row): "" for row in rows}
    for row in rows:
        case = labels(row, known)
        line = lines.setdefault(tuple(case.items()), heads | case)
        line[column(row)] = "; ".join(filter(None, (line[column(row)], content(row))))  # a second run of one case
    return markdown([*lines.values()])


def plain(rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """Returns a table with a line for each row: what it is of, then `columns`: a head, and what makes a row's cell."""
    heads = dict.fromkeys((head for row in rows for head in labels(row)), "")
    return markdown([heads | labels(row) | {head: of(row) for head, of in columns.items()} for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# Tables of the protocols, each of the rows of one JSON file


def figure(key: str, text: str = "{:,.0f}") -> Callable[[dict], str]:
    """Returns what makes a cell of a row's figure."""
    return lambda row: form(row.get(key), text)


whole_rate, decoding = figure("tokens_per_second"), figure("decode_tokens_per_second")


def decode_rate(row: dict) -> str:
    return decoding(row) + share(row.get("share_of_copy_bandwidth"))


def tokens(key: str) -> Callable[[dict], str]:
    return lambda row: f"{row[key]:,}" if isinstance(row[key], int) else str(row[key])


def latency(rows: list[dict]) -> str:
    contexts = {row["context"] for row in rows if row["name"] != OURS}
    whole = [row for row in rows if row["context"] in contexts]
    out = "Tokens/s while decoding and share of the copy bandwidth, by the number of prompt tokens:\n\n"
    decoded = [row for row in rows if "decode_tokens_per_second" in row]
    out += pivot(decoded, ("model", "precision", "name"), tokens("context"), decode_rate)
    if whole:
        case = f"{joined(f'{context:,}' for context in sorted(contexts))} prompt tokens, {new_tokens(rows)} new"
        out += f"\nTokens/s of the whole call, prefill included: {case}.\n\n"
        out += pivot(whole, ("model", "precision"), lambda row: row["name"], whole_rate) + loads(rows)
    return out


def new_tokens(rows: list[dict]) -> str:
    return joined(dict.fromkeys(f"{row['new_tokens']:,}" for row in rows if "new_tokens" in row))


def loads(rows: list[dict]) -> str:
    """Returns a sentence on the peers whose loading was timed."""
    cases = [
        f"{row['load_seconds']:.1f} s for {row['name']} with {row['model']} in {PRECISIONS[row['precision']]}"
        for row in rows
        if "load_seconds" in row
    ]
    return f"\nLoading and compiling come before that and took {joined(cases)}.\n" if cases else ""


def throughput(rows: list[dict]) -> str:
    columns = {
        "seconds": figure("seconds", "{:.2f}"),
        "new tokens/s": whole_rate,
        "prefill, s": figure("prefill_seconds", "{:.2f}"),
        "steps": figure("steps", "{:,}"),
    }
    return plain(rows, columns)


def samples(rows: list[dict]) -> str:
    def decoded(row: dict) -> str:
        return decoding(row) + form(row.get("step_ms"), " ({:.1f} ms)")

    def prefilled(row: dict) -> str:
        return form(row["prefill_seconds"], "{:.2f}") + form(row["prefill_of_one"], " ({:.2f} ×)")

    contexts = joined(dict.fromkeys(f"{row['context']:,}" for row in rows))
    case = f"{contexts} prompt tokens, {new_tokens(rows)} new"
    parts = {
        f"Tokens/s while decoding, all samples together, and the time of a step, by samples: {case}.": decoded,
        "Prefill in seconds, and how many times that of a single sample it is:": prefilled,
    }
    known = "model", "precision", "name"
    return "\n".join(f"{title}\n\n{pivot(rows, known, tokens('samples'), of)}" for title, of in parts.items())


def prefix_cache(rows: list[dict]) -> str:
    columns = {
        "requests": figure("requests", "{:,}"),
        "prompt tokens": figure("context", "{:,}"),
        "in common": figure("shared_tokens", "{:,}"),
        "new tokens": figure("new_tokens", "{:,}"),
        "seconds": figure("seconds", "{:.2f}"),
        "without the cache": figure("uncached_seconds", "{:.2f}"),
        "gain": figure("gain", "{:.2f} ×"),
    }
    return plain(rows, columns)


def beams(rows: list[dict]) -> str:
    columns = {
        "requests": figure("requests", "{:,}"),
        "prompt tokens": figure("context", "{:,}"),
        "beams": figure("beams", "{:,}"),
        "new tokens": figure("new_tokens", "{:,}"),
        "seconds": figure("seconds", "{:.2f}"),
        "requests/s": figure("requests_per_second", "{:.2f}"),
        "ms a step": figure("step_ms", "{:.2f}"),
    }
    return plain(rows, columns)


def tutorial(rows: list[dict]) -> str:
    def floor(row: dict) -> str:
        return form(row["floor_ms"] * (row["new_tokens"] - 1) / 1000, "{:.2f}") if "floor_ms" in row else ""

    columns = {
        "seconds": figure("seconds", "{:.2f}"),
        "floor of its decoding": floor,
        "padded, seconds": figure("padded_seconds", "{:.2f}"),
        "tokens/s": whole_rate,
    }
    shapes = {(row["batch"], row["context"], row["new_tokens"]) for row in rows}
    case = joined(f"batch {batch}, prompts of {context} tokens, {new} new" for batch, context, new in sorted(shapes))
    return f"The whole call, {case}.\n\n" + plain(rows, columns) + loads(rows)


def speculate(rows: list[dict]) -> str:
    def drafts(row: dict) -> str:
        if row["speculate_k"] == 0:
            return "none"
        return row["speculate_k"] if row["speculate_k"] == "auto" else f"{row['speculate_k']} a step"

    def content(row: dict) -> str:
        if row["speculate_k"] == 0:
            return decode_rate(row) if "decode_tokens_per_second" in row else whole_rate(row)
        return f"{row['gain']:.2f} ×" + form(row.get("tokens_per_step"), " ({:.2f})")

    def right(row: dict) -> str:
        return ", ".join(f"{share:.2f}" for share in row.get("right", ())) or row.get("text", "")

    out = "Tokens/s while decoding without drafts, and with them the gain, and what a step appends to a row:\n\n"
    rows = [row | {"right": right(row)} for row in rows]
    return out + pivot(rows, ("model", "precision", "name", "drafts", "right", "batch"), drafts, content)


def sweep(rows: list[dict]) -> str:
    contexts = joined(dict.fromkeys(f"{row['context']:,}" for row in rows))
    case = f"{contexts} prompt tokens, {new_tokens(rows)} new"
    out = f"Tokens/s while decoding, all rows together, and share of the copy bandwidth, by batch: {case}.\n\n"
    return out + pivot(rows, ("model", "precision", "name"), tokens("batch"), decode_rate)


def weights_tables(rows: list[dict]) -> str:
    """Returns `weights`' rows in Markdown: a table of each random model's sizes and speeds and each checkpoint's
    quality."""

    def values(key: str) -> list:
        return list(dict.fromkeys(row[key] for row in rows if key in row))

    out, names = [], sorted(values("precision"), key=lambda name: [*PRECISIONS, name].index(name))
    for model, checkpoint in product(values("model") or [None], values("checkpoint") or [None]) if rows else ():
        lines, evaluated = {name: {"weights": PRECISIONS.get(name, name)} for name in names}, None
        for row in sorted(rows, key=lambda row: "checkpoint" in row):
            if (row.get("model", model), row.get("checkpoint", checkpoint)) == (model, checkpoint):
                lines[row["precision"]] |= weights_cells(row)
                evaluated = row.get("tokens", evaluated)
        titles = [f"{model}: sizes and tokens/s"] if model else []
        if checkpoint:
            titles.append(f"{checkpoint}: quality" + (f" on {evaluated:,} tokens" if evaluated else ""))
        out.append(f"{'; '.join(titles)}\n\n{markdown([*lines.values()])}")
        out += [fastest([row for row in rows if row.get("model") == model])] if model else []
    return "\n".join(out)


def fastest(rows: list[dict]) -> str:
    """Returns a sentence on the weights that decode fastest at each batch."""
    best = {}
    for row in rows:
        best[row["batch"]] = max(best.get(row["batch"], row), row, key=lambda row: row["decode_tokens_per_second"])
    batches = {}
    for batch, row in best.items():
        batches.setdefault(PRECISIONS.get(row["precision"], row["precision"]), []).append(str(batch))
    return f"The fastest: {'; '.join(f'at batch {joined(n)} {weights}' for weights, n in batches.items())}.\n"


def weights_cells(row: dict) -> dict[str, str]:
    if "model" in row:
        if row["batch"] > 1:
            return {f"batch {row['batch']}": decoding(row)}
        sizes = {"disk, GiB": form(row.get("disk_gib"), "{:.2f}"), "GPU, GiB": form(row.get("gpu_gib"), "{:.2f}")}
        return sizes | {"batch 1": decode_rate(row)}
    cells = {"MB": f"{row['disk_mb']:.1f}", "perplexity": f"{row['perplexity']:.3f}"}
    if "kl" in row:
        cells["perplexity"] += f" ({row['change_percent']:+.2f} %)"
        cells |= {"KL": f"{row['kl']:.4f}", "same top token": f"{100 * row['top1_agreement']:.1f} %"}
    return cells


def stop_check(rows: list[dict]) -> str:
    def content(row: dict) -> str:
        return decoding(row) + form(row.get("overhead_percent"), " ({:+.2f} %)")

    out = "Tokens/s while decoding, and how much longer it takes than without a check, by batch:\n\n"
    rows = [row | {"check": row["name"]} for row in rows]
    return out + pivot(rows, ("model", "precision", "check"), tokens("batch"), content)


def parallel(rows: list[dict]) -> str:
    sums, steps = ([row for row in rows if ("us" in row) == of_sums] for of_sums in (True, False))
    columns = {
        "GPUs": figure("gpus", "{:,}"),
        "copies": figure("copies", "{:,}"),
        "requests": figure("requests", "{:,}"),
        "new tokens/s": whole_rate,
        "while decoding": decode_rate,
        "gain": figure("gain", "{:.2f} ×"),
    }
    tables = [plain(steps, columns)] if steps else []
    if sums:
        sums = [row | {"gpus": f"{row['gpus']} GPUs"} for row in sums]
        size = lambda row: f"{row['batch']} × {row['hidden_size']:,}, {row['gpus']}"
        tables.insert(
            0, f"Microseconds a sum, by rows × hidden size:\n\n{pivot(sums, ('name',), size, figure('us', '{:.1f}'))}"
        )
    return "\n".join(tables)


def startup(rows: list[dict]) -> str:
    columns = {"compiled kernels": lambda row: {"cold": "none yet", "warm": "cached"}[row["kernel_caches"]]}
    columns["seconds"] = figure("seconds", "{:.1f}")
    for part in ("import_and_rest", "load", "compile", "prefill", "decode"):
        columns[part.replace("_", " ")] = figure(f"{part}_seconds", "{:.2f}")
    return plain(rows, columns | {"load, GB/s": figure("load_gb_per_second", "{:.1f}")})


def prefill(rows: list[dict]) -> str:
    peaks = [row for row in rows if "model" not in row]
    out = "Tokens/s, and share of what a large matrix product reaches, by batch × prompt tokens:\n\n"
    out += pivot(
        [row for row in rows if "model" in row],
        ("model", "precision", "ops", "compile_prefill"),
        lambda row: f"{row['batch']} × {row['context']:,}",
        lambda row: whole_rate(row) + share(row.get("share_of_matrix_product")),
    )
    if peaks:
        names = joined(dict.fromkeys(row["name"] for row in peaks))
        speeds = (f"{form(row['tflop_per_second'], '{:,.0f}')} TFLOP/s in {row['precision'].upper()}" for row in peaks)
        out += f"\nThe {names}: {joined(speeds)}.\n"
    return out


def memory(rows: list[dict]) -> str:
    runs, loading = ([row for row in rows if ("name" in row) == named] for named in (False, True))
    keys = {"weights": "weights_gib", "peak, allocated": "peak_allocated_gib", "peak, reserved": "peak_reserved_gib"}
    peaks = {head: figure(key, "{:.2f}") for head, key in keys.items()}
    status = {"exit status": figure("failed", "{}")}
    columns = {
        "slots": figure("kv_cache_length", "{:,}"),
        "KV cache": figure("kv_cache_gib", "{:.2f}"),
        **peaks,
        **status,
    }
    columns["fragmentation"] = lambda row: form(row.get("fragmentation") and 100 * row["fragmentation"], "{:.1f} %")
    out = "While generating, GiB:\n\n" + plain(runs, columns)
    if loading:
        columns = {**peaks, "above the weights": figure("above_weights_gib", "{:.2f}")}
        columns |= {"seconds": figure("seconds", "{:.2f}"), "GB/s": figure("load_gb_per_second", "{:.1f}"), **status}
        out += "\nWhile loading, GiB:\n\n" + plain([row | {"name": OURS} for row in loading], columns)
    return out


def training(rows: list[dict]) -> str:
    columns = {
        "model": lambda row: row["model"],
        "trained": lambda row: row["trained"],
        "GPUs": lambda row: str(row["gpus"]),
        "rows x tokens": lambda row: f"{row['batch']} x {row['length']:,}",
        "products": lambda row: row["precision"].upper(),
        "program": lambda row: row["name"],
        "activations": lambda row: row.get("activations", ""),
        "step, ms": lambda row: form(1e3 * row["seconds"], "{:,.0f}"),
        "tokens/s": figure("tokens_per_second"),
        "TFLOP/s a GPU": figure("tflops"),
        "MFU": figure("mfu", "{:.0%}"),
        "peak, GiB": figure("peak_allocated_gib", "{:.1f}"),
    }
    return markdown([{head: of(row) for head, of in columns.items()} for row in rows])


def cpu(rows: list[dict]) -> str:
    def content(row: dict) -> str:
        return whole_rate(row) + form(row.get("times_transformers"), " ({:.2f} ×)")

    runs, others = ([row for row in rows if ("batch" in row) == timed] for timed in (True, False))
    out = "Tokens/s of the whole call, all rows together, and how many times transformers' that is:\n\n"
    out += pivot(runs, ("model", "batch"), lambda row: row["name"], content)
    return out + "".join(f"\n{row['model']}, {row['name']}: {form(row['seconds'], '{:.2f}')} s.\n" for row in others)


# ---------------------------------------------------------------------------------------------------------------------
# The documents


class Section(NamedTuple):
    """A protocol's part of the page: its title, what to know, what makes its tables of rows, and the options of its
    command that the rows don't tell."""

    title: str
    text: str
    tables: Callable[[list[dict]], str]
    options: str = ""


SECTIONS = {
    "latency": Section(
        "Latency",
        """One prompt, greedy decoding, no stop. transformers keeps its keys and values in a static cache and compiles
its decode step.""",
        latency,
    ),
    "tutorial": Section(
        "TransformerEngine's tutorial",
        """The benchmark of TransformerEngine's Gemma tutorial: short prompts of different lengths, and so many new
tokens that the longest prompt and its text fill the tutorial's cache. The floor is the time that a copy at full speed
takes to move all bytes that the decode steps have to read. The tutorial's prefill computes all positions of that cache,
padding included; "padded" is the time with such a prefill, "seconds" the time with one of the prompts alone.
transformers' prompts are padded on the left.""",
        tutorial,
    ),
    "throughput": Section(
        "Many requests",
        """Requests that are all there at once, greedy, no stop, the whole call. Mixed ones are 512 prompts of 16 to
1,024 tokens and 16 to 1,024 new ones, log-normal; of 128/128 there are 512, of 1,024/128 256. Rows are refilled as they
finish; where no batch is given, there are as many rows as memory holds. transformers runs its continuous batching with
its own defaults: attention by flash-attn and CUDA graphs where that is installed, else by PyTorch over pages.""",
        throughput,
    ),
    "samples": Section(
        "Many samples of one prompt",
        """Completions of one long prompt, all at once, drawn with temperature 0.8 and top-k 200. Its keys and values are
computed and kept once. vLLM's samples share them through its prefix cache, which is emptied before each call.""",
        samples,
    ),
    "prefix-cache": Section(
        "Prompts that begin alike",
        """The whole call with the prefix cache, which is empty at its beginning, and without: for prompts that have
their beginning in common, and for prompts that have nothing in common, where the gain is what the cache costs.""",
        prefix_cache,
    ),
    "beams": Section("Beam search", "The whole call, without a stop; new tokens are those that come back.", beams),
    "speculate": Section(
        "Drafts",
        """Guesses of the next tokens, some of which a step checks at once; the text is the same. Models of random weights
agree on nothing: of their drafts as many are right, by place behind right ones, as is said, whatever they make. Figures
of trained checkpoints have the drafts that these make, for text to go on with (free) or to repeat (copy).""",
        speculate,
    ),
    "sweep": Section("Batches", "Prompts of one length, a growing number of rows that are decoded together.", sweep),
    "weights": Section(
        "Which weights?",
        """Sizes and speeds are of models with random weights: GiB of the file and at most on the GPU at batch 1,
tokens/s while decoding, and at batch 1 the share of the copy bandwidth. GPTQ's weights are stored as int4's are, so
that one measurement is of both. Quality is of trained models, in windows of held-out Python code: perplexity and its
change from BF16, KL divergence from BF16 in nats, and the share of positions that have the same most probable token as
BF16. The scaling factors of FP8 and the corrections of GPTQ come from other code. Prefill attends to keys and values as
the cache holds them, so that the figures are those of decoding. Without a GPU the command measures the quality
alone.""",
        weights_tables,
        " --checkpoint_path DIR --text held_out.jsonl --calibration_text other.jsonl",
    ),
    "stop-check": Section(
        "The stop check",
        """What it costs to learn whether all rows have stopped. "ping-pong" is what `generate` does: it looks at the
tokens of a step while the next one runs. "every" waits for each step before it starts the next, "never" doesn't
look.""",
        stop_check,
    ),
    "startup": Section(
        "Start",
        """From process start to the first text of `generate.py --compile --fp8`, from a file in the page cache, without
and with kernels that an earlier start has compiled.""",
        startup,
    ),
    "prefill": Section(
        "Prefill",
        """Prefill alone, without and with `--compile_prefill`, by the implementation of the operations (`--ops`). The
work that is counted is that of the layers' matrix products and of causal attention; the large product sums as ours do,
without the hardware's fast accumulation.""",
        prefill,
    ),
    "parallel": Section(
        "Several GPUs",
        """A model that all GPUs share is for latency, and for models that one GPU has no room for; for throughput each GPU
has a copy. "gain" is the speed over that of one GPU, of decoding where steps are alike. First, what a sum of all ranks'
parts takes, in CUDA graphs: ours is one with the norm behind it, which sends the parts; those of a few rows are sent by
the product before it. What the same takes without a sum is below each.""",
        parallel,
    ),
    "memory": Section(
        "Memory",
        """Each case in a process of its own. "Allocated" is what tensors took at most, "reserved" what PyTorch asked
the GPU for; fragmentation is the share of the latter that was never allocated. "Expandable segments" is the allocator's
setting of that name.""",
        memory,
    ),
    "finetune": Section(
        "Fine-tuning",
        """A step on random tokens: forward, backward and AdamW on parameters in float32, or on adapters beside frozen
weights in BF16; up to 8,192 tokens at a time, attention over a row. Tokens/s are those of all GPUs. MFU is the share of
the GPU's dense BF16 peak, for FP8 too, that 6 FLOP a weight and token take (4 where weights are frozen) and
attention's. transformers runs the same recipe under autocast.""",
        training,
    ),
    "cpu": Section("CPU", "tiny-gemma, the checkpoint of this repository, in turn with transformers' `generate`.", cpu),
}
INTRODUCTION = """# Figures

`python benchmark.py report` writes this page from the JSON files beside it. Each of them was written by the command
below its name, on the machine and with the versions that stand beside its name. Models of Gemma's published sizes have
random weights.

Each case runs once to warm up and then several times; a figure is the median of the latter. The share of the copy
bandwidth compares a decode step with a large copy: it is the time in which the copy would move the bytes that the step
has to read (every weight and every valid key and value, once), divided by the time that the step took. "FP8 layers" are
linear layers whose weights and inputs are in E4M3, with one scaling factor a tensor; "E4M3 cache" is a KV cache in that
format.

vLLM, where a table has it, runs in a process of its own, on random weights (`load_format="dummy"`), with the same
prompts and with its own defaults for compiling and CUDA graphs. Its FP8 is made of BF16 weights while it loads
(`quantization="fp8"`); its embedding stays in BF16. It doesn't say when its prefill ends: its decoding is the time of
the whole call less the time of a call for a single new token. Where vLLM is not installed, `--vllm_site DIR` names a
directory that has it.
"""
HEADLINES = {  # protocol: unit, what it is called, key of the figure, its format
    "latency": ("tokens/s", "one text", "tokens_per_second", "{:,.0f}"),
    "tutorial": ("seconds", "TransformerEngine's tutorial", "seconds", "{:.2f}"),
    "throughput": ("tokens/s", "many requests", "tokens_per_second", "{:,.0f}"),
}
MIXED = "mixed"  # the shape of `throughput` in the headline, and of files that name none
HEADS = ("protocol", "date", "device", "python", "copy_bandwidth_gb_per_second", "repeats", "results")


def read_results(directory: Path) -> dict[str, list[tuple[str, dict]]]:
    """Returns what benchmark.py wrote into a directory: protocol -> [(name of the file without .json, its content)].
    Files without a row are left out. Raises ValueError for a file that is something else."""
    results = {}
    for file in sorted(directory.glob("*.json"), key=lambda file: file.stem):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            rows = content["results"]
            results.setdefault(content["protocol"], []).extend([(file.stem, content)] if rows else [])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} holds no results of benchmark.py") from None
    return results


def origin(content: dict) -> str:
    versions = (f"{name.replace('_', ' ')} {value}" for name, value in content.items() if name not in HEADS and value)
    versions = ", ".join((f"Python {content['python']}", *versions))
    bandwidth = cell(content["copy_bandwidth_gb_per_second"])
    return f"{content['device']}, {content['date']}; {versions}. A large copy moves {bandwidth} GB/s."


def command(name: str, content: dict, picture: bool) -> str:
    """Returns the command that measures the rows of NAME.json again; what is not a default is seen in them."""
    protocol, rows = content["protocol"], content["results"]
    ours = [row for row in rows if row.get("name") in (None, OURS, "load")]
    found = {"models": "model", "precisions": "precision", "ops": "ops"}
    if protocol in ("sweep", "throughput", "speculate", "parallel"):
        found["batches"] = "batch"
    if protocol == "speculate":
        found["drafts_per_step"], ours = "speculate_k", [row for row in ours if row["speculate_k"]]
    if protocol == "throughput":
        found["shapes"], ours = "shape", [{"shape": MIXED} | row for row in ours]
    if protocol == "samples":  # which measures a single one whatever is asked for
        found["batches"], ours = "samples", [row for row in ours if row["samples"] > 1]
    if protocol in ("cpu", "startup", "stop-check"):
        ours, found = rows, {"models": "model", "precisions": "precision"} if protocol != "cpu" else {}
    trained = protocol == "speculate" and "text" in rows[0]
    gpus = max(row.get("gpus", 1) for row in rows)
    out = f"torchrun --standalone --nproc_per_node {gpus}" if gpus > 1 else "python"
    out += f" benchmark.py {protocol}" + " --checkpoint_path DIR DRAFT_DIR --text held_out.jsonl" * trained
    if trained:
        del found["models"]
    for option, key in found.items():
        values = dict.fromkeys(str(row[key]) for row in ours if key in row)
        out += f" --{option} {' '.join(values)}" if values else ""
    if protocol == "parallel":
        kinds = ("requests" if "requests" in row else "sums" if "us" in row else "steps" for row in rows)
        parts = dict.fromkeys(kinds)
        out += f" --parts {' '.join(parts)}" if len(parts) < 3 else ""
    programs = {row.get("name", "").split(",")[0].lower() for row in rows}
    if protocol in ("latency", "tutorial", "throughput", "samples", "parallel", "cpu", "finetune") or trained:
        names = [peer for peer in ("transformers", "vllm") if peer in programs]
        out += f" --peers {' '.join(names)}" if names else " --no_peers"
    if any("checkpoint" in row for row in rows):
        out += SECTIONS[protocol].options
    if "repeats" in content:
        out += f" --repeats {content['repeats']}"
    out += f" --output benchmarks/{name}.json"
    return out + (f" --picture benchmarks/{name}.svg" if picture else "")


def section(protocol: str, files: list[tuple[str, dict]]) -> str:
    title, text, tables, _ = SECTIONS.get(protocol, Section(protocol, "", table_of_all))
    out = f"## {title}\n\n" + (f"{text}\n" if text else "")
    for name, content in files:
        picture = protocol == "sweep"
        out += f"\n[{name}.json]({name}.json): {origin(content)}\n\n```\n{command(name, content, picture)}\n```\n\n"
        out += tables(content["results"])
        out += f"\n![tokens/s and share of the copy bandwidth over the batch]({name}.svg)\n" if picture else ""
    return out


def table_of_all(rows: list[dict]) -> str:
    return markdown([{key: cell(value) for key, value in row.items()} for row in rows])


def program(row: dict) -> str:
    """Returns which program a row is of, whatever its cache is."""
    return row["name"].split(",")[0]


def headline(results: dict[str, list[tuple[str, dict]]], model: str = "gemma-7b") -> str:
    """Returns a small table of a model's figures on one GPU and a line on it; an empty text if there are none.

    Of several GPUs it is the one whose files hold vLLM's rows, of those the one whose files hold the most programs,
    then the one that was measured last; the same decides between several files of one GPU."""
    devices = {}  # device: protocol: (what decides, rows)
    for protocol in HEADLINES:
        for _, content in results.get(protocol, ()):
            rows = [row for row in content["results"] if row["model"] == model and row.get("shape", MIXED) == MIXED]
            if not rows:
                continue
            programs = {program(row) for row in rows}
            file = (VLLM in programs, len(programs), content["date"]), rows
            best = devices.setdefault(content["device"], {})
            best[protocol] = max(best.get(protocol, file), file, key=lambda file: file[0])

    def decides(device: str) -> tuple:
        vllm, programs, dates = zip(*(first for first, _ in devices[device].values()))
        return sum(vllm), sum(programs), max(dates)

    if not devices:
        return ""
    device = max(devices, key=decides)
    lines = [line for protocol, (_, rows) in devices[device].items() for line in headline_lines(protocol, model, rows)]
    dates = joined(dict.fromkeys(date for (_, _, date), _ in devices[device].values()))
    text = (
        f"Measured on one {device}, {dates}; whole calls, prefill included. FP8: linear layers, with a KV cache in E4M3. "
        f"Empty cells were not measured.{gains(results.get('parallel', []), model)} All figures and commands: "
        "[benchmarks/README.md](benchmarks/README.md)."
    )
    return f"{markdown(lines)}\n{textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)}\n"


def gains(files: list[tuple[str, dict]], model: str) -> str:
    """Returns a sentence on how much faster several GPUs decode one text than one does, if that was measured: by the
    newest file of each number of GPUs, of the kind with the most of them."""
    found = {}  # device: (precision, GPUs): gain
    for _, content in sorted(files, key=lambda file: file[1]["date"]):
        for row in content["results"]:
            case = row.get("model"), row["name"], row.get("batch"), row.get("copies")
            if case == (model, OURS, 1, 1) and row["gpus"] > 1 and "gain" in row:
                found.setdefault(content["device"], {})[row["precision"], row["gpus"]] = row["gain"]
    if not found:
        return ""
    device, rows = max(found.items(), key=lambda item: len(item[1]))
    counts = sorted({gpus for _, gpus in rows})
    kinds = []
    for kind, precision in (("BF16", "bf16"), ("FP8", "fp8-all")):
        if all((precision, gpus) in rows for gpus in counts):
            times = joined(f"{rows[precision, gpus]:.2f}" for gpus in counts) + " ×"
            kinds.append(f"{times} in {kind}" if kinds else f"{times} as fast as one in {kind}")
    return f" {joined(map(str, counts))} {device}s decode one text {', '.join(kinds)}." if kinds else ""


def headline_lines(protocol: str, model: str, rows: list[dict]) -> list[dict[str, str]]:
    """Returns a line for BF16 and one for FP8, if there are figures of it: each program's fastest way to run the
    protocol's first case."""
    unit, name, key, spec = HEADLINES[protocol]
    lines = []
    for kind, precision in (("BF16", "bf16"), ("FP8", "fp8-kv")):
        found = {}
        for row in rows:
            if row["precision"] == precision and row.get("context") == rows[0].get("context"):
                found[program(row)] = min(found.get(program(row), row), row, key=lambda row: row["seconds"])
        cells = {name: form(found.get(name, {}).get(key), spec) for name in (OURS, VLLM, "transformers")}
        if found:
            case = "{requests} of mixed lengths" if "requests" in rows[0] else "batch {batch}, {context} prompt tokens"
            case = f"{case}, {{new_tokens:,}} new".format(**rows[0])
            lines.append({model: f"{name}: {case}", "weights": kind, "unit": unit, **cells})
    return lines


def pages(root: Path) -> dict[Path, str]:
    """Returns file -> text of all that is made of benchmarks/*.json in a directory of the project:
    benchmarks/README.md, a picture for each file of `sweep`, and README.md with its headline block written anew.

    Raises ValueError if a JSON file holds something else or README.md lacks the block."""
    directory, readme = root / "benchmarks", root / "README.md"
    results = read_results(directory)
    order = [name for name in SECTIONS if results.get(name)] + [name for name in results if name not in SECTIONS]
    texts = {directory / "README.md": "\n".join((INTRODUCTION, *(section(name, results[name]) for name in order)))}
    for name, content in results.get("sweep", ()):
        picture = sweep_picture(content["results"], f"{content['device']}, {content['date']}")
        texts[directory / f"{name}.svg"] = picture
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{readme} lacks the lines {BEGIN} and {END}")
    texts[readme] = "\n".join((before + begin, "", headline(results), end + after))
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# The picture


COLORS = ("#1f5fa8", "#c2501b", "#2e7d4f", "#7a4fa0", "#8a6d1a", "#a8325e")


def sweep_picture(rows: list[dict], title: str) -> str:
    """SVG of `sweep`'s rows: tokens/s, dashed at the floor, and share of the copy bandwidth, both over the batch."""
    series = {}
    for row in rows:
        series.setdefault(f"{row['model']} {row['precision']}", []).append(row)
    batches = sorted({row["batch"] for row in rows})
    title += ", {context} prompt tokens, {new_tokens} new".format(**rows[0])
    rates, floors, shares = [], [], []
    for color, values in zip(COLORS, series.values()):
        rates.append((color, "", [(row["batch"], row["decode_tokens_per_second"]) for row in values]))
        floors.append((color, "5 4", [(row["batch"], 1e3 * row["batch"] / row["floor_ms"]) for row in values]))
        shares.append((color, "", [(row["batch"], 100 * row["share_of_copy_bandwidth"]) for row in values]))
    points = [y for _, _, line in rates + floors for _, y in line]
    powers = range(math.floor(math.log10(min(points))), math.ceil(math.log10(max(points))) + 1)
    legend = [
        f'<path d="M{70 + 190 * i} 46h24" stroke="{color}" stroke-width="2.5"/>'
        f'<text x="{100 + 190 * i}" y="50">{label}</text>'
        for i, (color, label) in enumerate(zip(COLORS, series))
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
    """Lines (color, dashes, [(batch, y)]) over the logarithm of the batch; `scale` of y is linear on the paper."""
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
    for color, dashes, values in lines:
        points = " ".join(f"{x(batch)},{y(value)}" for batch, value in values)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        )
        if not dashes:
            parts += [f'<circle cx="{x(batch)}" cy="{y(value)}" r="3.5" fill="{color}"/>' for batch, value in values]
    return parts
