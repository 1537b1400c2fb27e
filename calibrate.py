"""FP8 scaling factors from text: runs a BF16 model over it and records the largest inputs, weights, K and V.

Writes fp8_scales.safetensors beside the checkpoint: one float32 a factor, real = fp8 * factor, factor = amax / 448. A
file with int8 or int4 weights gets a file of its own, for an FP8 KV cache with these weights. Experts have factors of
their own; those that met too few of the text's tokens to tell are named, and get the largest of their layer's.
"""

import interrupt

if __name__ == "__main__":
    interrupt.silence()  # while the rest is imported

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import (
    Scale,
    fingerprint,
    fp8_scale_names,
    open_checkpoint,
    scale_shape,
    scales_file,
    some,
    write_scales,
)
from cli import Parser, add_model_options, number, path, run_program
from files import check_writable
from formats import E4M3_MAX, Weight, largest
from generate import load_model
from model import Transformer
from ops import TORCH
from text import batches, sample_windows

MIN_TOKENS = 64  # fewer say next to nothing about what inputs can be: of a model, and of each of its experts


class Histogram:
    """How often each absolute value occurred, in bfloat16: 32,768 counts, from which any percentile is exact."""

    values = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16).double()

    def __init__(self):
        self.counts, self.rows = None, 0

    def add(self, x: Tensor):
        self.rows += x.shape[:-1].numel()
        bits = x.detach().bfloat16().view(torch.int16) & 0x7FFF
        counts = torch.bincount(bits.flatten().int(), minlength=2**15)
        self.counts = counts if self.counts is None else self.counts + counts

    def amax(self, percentile: float = 100.0) -> float:
        """The value that `percentile` per cent of all do not exceed. Raises ValueError for infinite values or NaN."""
        counts = self.counts.cpu()
        if counts[0x7F80:].any():
            raise ValueError("the model computes values that are not finite; it can't be calibrated")
        cumulative = counts.cumsum(0)
        index = int(torch.searchsorted(cumulative, percentile / 100 * cumulative[-1]))
        if percentile == 100:
            index = int(counts.nonzero().max())
        return self.values[index].item()

    def above(self, amax: float) -> int:
        return int(self.counts.cpu()[self.values > amax].sum())


class _KVRecorder:
    """Stands for the KV cache of a layer, which keeps nothing, and sees what would be written."""

    k_scale = v_scale = 1.0

    def __init__(self, k: Histogram, v: Histogram):
        self.k, self.v = k, v

    def encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k.add(k)
        self.v.add(v)
        return k, v

    def slots_for(self, *_):
        pass

    def write(self, *_):
        pass


Histograms = Histogram | list[Histogram]  # one, or one of each expert


@torch.inference_mode()
def record(model: Transformer, token_windows: Iterable[list[int]], batch_size: int = 8) -> dict[str, Histograms]:
    """Histograms by our scale names (`fp8_scale_names`) of all linear inputs, K and V over windows of tokens.

    Raises ValueError for a batch_size below 1, no windows, and a weight that is not finite.
    """
    token_windows = list(token_windows)
    if not token_windows:
        raise ValueError("calibrating needs windows of tokens")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            largest(name, parameter)
    config, histograms = model.config, {}
    for name in fp8_scale_names(config):
        if not name.endswith("weight_scale"):
            experts = scale_shape(name, config)
            histograms[name] = [Histogram() for _ in range(*experts)] if experts else Histogram()
    names = {module: f"{name}.input_scale" for name, module in model.named_modules()}

    def watch(operation: Callable) -> Callable:
        """`operation`, which records its inputs, if its weight has a factor for them; of the head, which runs at every
        position here, it makes no logits."""

        def watching(x: Tensor, weight, *rest, **options) -> Tensor:
            if weight is model.embedding:
                histograms["head_scales.input_scale"].add(x)
                return x[:, :1]
            if names[weight] in histograms:
                histograms[names[weight]].add(x)
            return operation(x, weight, *rest, **options)

        return watching

    def watching_experts(h: Tensor, w13: Weight, w2: Weight, chosen: Tensor, *rest) -> Tensor:
        """`experts`, which records the inputs of both products."""
        histograms[names[w13]].add(h)
        for e in chosen.unique().tolist():
            rows = h[(chosen == e).any(1)]
            histograms[names[w2]][e].add(TORCH.matmul_geglu(rows, _matrix(w13, e), h.dtype))
        return TORCH.experts(h, w13, w2, chosen, *rest)

    watched = copy(model)
    watched.ops = replace(
        TORCH, matmul=watch(TORCH.matmul), matmul_geglu=watch(TORCH.matmul_geglu), experts=watching_experts
    )
    layers = [f"layers.{config.donor_of(i)}.attention" for i in range(config.n_layers)]
    cache = SimpleNamespace(
        layers=[_KVRecorder(*(histograms[f"{name}.{kind}_scale"] for kind in "kv")) for name in layers]
    )
    with tqdm(total=sum(map(len, token_windows)), unit=" tokens", desc="calibrating", leave=False) as bar:
        for batch in batches(token_windows, batch_size):
            watched(torch.tensor(batch).to(model.device), cache, all_logits=True)
            bar.update(sum(map(len, batch)))
    return histograms


def _matrix(weight: Weight, expert: int) -> Weight:
    """One of an expert weight's matrices."""
    parameters = [parameter[expert] for parameter in weight.parameters()]
    return Weight.of(weight.format.name, *parameters, shape=weight.shape, group=weight.group)


def scales(model: Transformer, histograms: dict[str, Histograms], percentile: float = 100.0) -> dict[str, Scale]:
    """Factors by our names: inputs, K and V by `percentile` of what was recorded, weights by their maximum.

    Experts that met fewer than MIN_TOKENS tokens get the largest factor that inputs of their layer's experts have; a
    warning names them.
    """
    factors, unmet = {}, []
    for name in fp8_scale_names(model.config):
        if name.endswith("weight_scale"):
            module = "embedding" if name.startswith("head") else name.removesuffix(".weight_scale")
            weight = model.get_submodule(module)
            matrices = [_matrix(weight, e) for e in range(weight.experts)] or [weight]
            amax = [largest(module, matrix.format.dequantize(matrix, model.dtype)) for matrix in matrices]
            amax = amax if weight.experts else amax[0]
        elif isinstance(found := histograms[name], list):
            amax = [each.amax(percentile) if each.rows else 0.0 for each in found]
            few = [e for e, each in enumerate(found) if each.rows < MIN_TOKENS]
            unmet += [f"{name.removesuffix('.w2.input_scale')} {e}" for e in few]
            amax = [max(amax) if e in few else each for e, each in enumerate(amax)]
        else:
            amax = found.amax(percentile)
        factors[name] = [_factor(each) for each in amax] if isinstance(amax, list) else _factor(amax)
    if unmet:
        what = f"experts that met fewer than {MIN_TOKENS} tokens get the largest factor of their layer's"
        warnings.warn(f"{what}: {some(unmet)}", stacklevel=2)
    return factors


def _factor(amax: float) -> float:
    return amax / E4M3_MAX if amax else 1.0


def print_table(factors: dict[str, Scale], histograms: dict[str, Histograms], rows: int = 10):
    """The widest inputs, and how many of the recorded values their factors saturate."""
    entries = sorted(_entries(factors, histograms), key=lambda entry: -entry[1])
    print(f"{'widest':<42} {'amax':>9} {'weight amax':>12} {'saturated':>16}")
    for name, factor, weight, histogram in entries[:rows]:
        amax = factor * E4M3_MAX
        above, total = histogram.above(amax * (1 + 1e-6)), int(histogram.counts.sum())
        print(
            f"{name:<42} {amax:>9.3g} {'' if weight is None else f'{weight * E4M3_MAX:.3g}':>12} "
            f"{f'{above:,} of {total:,}':>16}"
        )
    saturated = sum(histogram.above(factor * E4M3_MAX * (1 + 1e-6)) for _, factor, _, histogram in entries)
    print(f"saturated in all {len(entries)} tensors: {saturated:,} values")


def _entries(
    factors: dict[str, Scale], histograms: dict[str, Histograms]
) -> Iterator[tuple[str, float, float | None, Histogram]]:
    """Name, factor, factor of the weight that it is an input of, and histogram of each; those of experts that met no
    token are left out."""
    for name, found in histograms.items():
        weight = factors.get(name.replace("input_scale", "weight_scale")) if "input" in name else None
        if isinstance(found, list):
            each = zip(factors[name], weight, found)
            yield from ((f"{name}[{e}]", *entry) for e, entry in enumerate(each) if entry[-1].rows)
        else:
            yield name, factors[name], max(weight) if isinstance(weight, list) else weight, found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="calibrate.py", description=__doc__)
    add = parser.add_argument
    add_model_options(parser, "checkpoint_path", "device", "precision")
    add("--text", type=path, metavar="FILE", help="text, or JSON lines with 'text' (default: this program's sources)")
    count = number(int, 1)
    add("--window", type=number(int, 2), default=512, metavar="N", help="tokens seen at once (default: %(default)s)")
    add("--batch_size", type=count, default=8, metavar="N", help="windows at once (default: %(default)s)")
    add("--max_tokens", type=count, default=65536, metavar="N", help="the text's first ones (default: %(default)s)")
    add("--percentile", type=number(float, 50, 100), default=100, help="of absolute values (default: 100, the maximum)")
    return run_program(run, parser, argv)


def run(args: argparse.Namespace):
    file = scales_file(open_checkpoint(args.checkpoint_path))
    check_writable(file)
    model, tokenizer = load_model(args.checkpoint_path, args.device, args.precision)
    if any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters()):
        raise ValueError(f"{args.checkpoint_path} is quantized already: calibrating needs BF16 weights")
    context_length = model.config.context_length
    pieces = sample_windows(args.text, tokenizer, args.window, context_length, args.max_tokens, MIN_TOKENS)
    tokens = sum(map(len, pieces))
    histograms = record(model, pieces, args.batch_size)
    factors = scales(model, histograms, args.percentile)
    metadata = {
        "model": fingerprint(model.config),
        "kv_cache_dtype": "fp8_e4m3",
        "text": args.text.name if args.text else "built-in",
        "tokens": str(tokens),
        "amax": "maximum" if args.percentile == 100 else f"percentile {args.percentile:g}",
    }
    write_scales(file, model.config, factors, metadata)
    print_table(factors, histograms)
    count = sum(len(factor) if isinstance(factor, list) else 1 for factor in factors.values())
    print(f"{file}: {count} factors from {tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(main())
