"""Write a checkpoint with quantized weights: fp8 and int8 have half of BF16's bytes, int4 little more than a quarter.

int8 and int4 are for weights only: activations stay as they are. int4-gptq writes what int4 does, with codes that make
up for one another's rounding on a text (https://arxiv.org/abs/2210.17323).
"""

import interrupt

if __name__ == "__main__":
    interrupt.silence()  # while the rest is imported

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import (
    FP8_SCHEME,
    INT_FORMATS,
    LINEAR_WEIGHTS,
    QUANTIZED_FORMATS,
    SCALES_NAME,
    Checkpoint,
    Scale,
    check_weight_scale,
    joined_shape,
    load_weights,
    open_checkpoint,
    read_scales,
    some,
    sources,
    stored_parts,
    weight_scale_name,
)
from cli import Parser, add_model_options, number, path, run_program
from config import MULTIMODAL
from device import pick_device
from export import check_new_directory, write_checkpoint
from files import FP8_DTYPE, StoredTensor, check_writable, open_tensors, read_json, tensor_bytes, write_safetensors
from formats import FORMATS, GROUPS, Weight, group_parameters, largest, quantize_int4
from model import Experts, Residual, Transformer
from ops import TORCH
from ops.common import round_fp8
from ops.integer import pack_int4
from ops.rope import Positions
from text import batches, sample_windows
from tokenizer import open_tokenizer

ROWS = 4096  # of a weight that are in memory at once


def quantize_fp8(checkpoint: Checkpoint, scales: dict[str, Scale], file: Path, progress=lambda n: None):
    """Writes `checkpoint` with those of its weights in E4M3 that have one of `scales`, scales included.

    `scales` are `read_scales`', without the head's if the embedding is to stay as it is. A weight is read and written
    some rows at a time. `progress` is called with the number of source bytes done since the last call.
    """
    entries = {
        name: weight_entry(tensors, 0, shape_of(checkpoint, name), scales.get(weight_scale_name(name)), progress)
        for name, tensors in checkpoint.parts.items()
    }
    entries |= {name: scale_entry(value) for name, value in scales.items()}
    write_safetensors(file, entries, {"weight_format": "fp8"})


def export_hf(checkpoint: Checkpoint, scales: dict[str, Scale], directory: Path, progress=lambda n: None):
    """Writes `checkpoint` with FP8 weights as llm-compressor publishes it, for vLLM, TGI and transformers.

    q, k and v, and gate and up, become tensors of their own again, with the scales that they share, and so do experts.
    Layers that take keys and values of another are given its scales, too: vLLM looks there.
    https://github.com/vllm-project/compressed-tensors: src/compressed_tensors/quantization
    """
    source, config, entries = checkpoint.directory, checkpoint.config, {}
    for name, parts in sources(config, experts_apart=True).items():
        module, row = name.removesuffix("weight"), 0
        for index, (their_name, shape) in enumerate(parts):
            own = {
                kind: value[index * len(value) // len(parts)] if isinstance(value, list) else value
                for kind in ("weight_scale", "input_scale")
                if (value := scales.get(module + kind)) is not None
            }
            entries[their_name] = weight_entry(checkpoint.parts[name], row, shape, own.get("weight_scale"), progress)
            row += shape[0]
            for kind, value in own.items():
                entries[their_name.removesuffix("weight") + kind] = scale_entry([value])
    for layer in range(config.n_layers):
        for kind in ("k_scale", "v_scale"):
            value = scales[f"layers.{config.donor_of(layer)}.attention.{kind}"]
            entries[f"model.layers.{layer}.self_attn.{kind}"] = scale_entry([value])

    unquantized = {"lm_head": True, "re:.*router.*": config.n_experts, "re:.*per_layer.*": config.per_layer_size}
    group = {"targets": ["Linear"], "weights": FP8_SCHEME, "input_activations": FP8_SCHEME}
    settings = read_json(source / "config.json")
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [modules for modules, exist in unquantized.items() if exist],
        "kv_cache_scheme": FP8_SCHEME,
    }
    write_checkpoint(directory, source, entries, settings)


def scale_entry(value: Scale):
    scale = torch.tensor(value)
    return "F32", tuple(scale.shape), lambda: [tensor_bytes(scale)]


def weight_entry(tensors: list[StoredTensor], start: int, shape: tuple[int, ...], scale: Scale | None, progress):
    """For `write_safetensors`: the rows that `shape` has, from `start`, of tensors joined along their rows; in E4M3
    where there is a scale, or one of each of shape[0] experts."""
    count = rows_of(shape)

    def blocks():
        for first, rows in stored_rows(tensors, start, start + count):
            own = scale[(first - start) * len(scale) // count] if isinstance(scale, list) else scale
            yield tensor_bytes(rows if scale is None else round_fp8(rows, torch.tensor(own)))
            progress(rows.nbytes)

    return tensors[0].dtype if scale is None else FP8_DTYPE, shape, blocks


def shape_of(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """That of the parameter `name`."""
    return joined_shape(name, [tensor.shape for tensor in checkpoint.parts[name]], checkpoint.config)


def rows_of(shape: tuple[int, ...]) -> int:
    """How many rows a matrix has, or matrices have together; a vector's are its numbers."""
    return prod(shape[: max(1, len(shape) - 1)])


def stored_rows(tensors: list[StoredTensor], start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """Rows from `start` to `stop` of tensors joined along their rows, of one matrix and ROWS at most at a time, each
    with the number of its first row."""
    passed = 0
    for tensor in tensors:
        *stacked, count = tensor.shape[: max(1, len(tensor.shape) - 1)]
        if passed + rows_of(tensor.shape) <= start or passed >= stop:
            passed += rows_of(tensor.shape)
            continue
        with open_tensors(tensor.file) as f:
            stored = f.get_slice(tensor.key)
            for matrix in range(*stacked or (1,)):
                end = min(stop - passed, count)
                for row in range(max(start - passed, 0), end, ROWS):
                    rows = slice(row, min(row + ROWS, end))
                    yield passed + row, stored[matrix, rows] if stacked else stored[rows]
                passed += count


def check_weights(checkpoint: Checkpoint, scales: dict[str, Scale]):
    """Reads all weights once. Raises ValueError if one is not finite, or is not what its factor in `scales` says."""
    for name, tensors in checkpoint.parts.items():
        scale, found, passed = scales.get(weight_scale_name(name)), [], 0
        count, total = len(scale) if isinstance(scale, list) else 1, rows_of(shape_of(checkpoint, name))
        for tensor in tensors:
            for first, rows in stored_rows([tensor], 0, rows_of(tensor.shape)):
                matrix = (passed + first) * count // total
                found.append((slice(matrix, matrix + 1), torch.tensor([largest(tensor.key, rows)])))
            passed += rows_of(tensor.shape)
        if scale is not None:
            check_weight_scale(name, found, scale)


# ---------------------------------------------------------------------------------------------------------------------
# Integers


def write_int(
    checkpoint: Checkpoint,
    file: Path,
    quantized: Callable[[str], tuple[Tensor, ...]],
    head: bool,
    metadata: dict[str, str],
    progress=lambda n: None,
):
    """Writes `checkpoint` with its linear weights, and with `head` its embedding, in the format that `metadata` names.

    quantized(name) gives the parameters of a weight, in the order of its format, and is called in the model's order.
    `progress` is called with the number of source bytes done since the last call.
    """
    entries, held = {}, {}
    weight_format, group = metadata["weight_format"], int(metadata.get("group_size", 0))

    def part(name: str, index: int):
        if name not in held:  # the first of its parts
            held.clear()
            held[name] = quantized(name)
        yield tensor_bytes(held[name][index].cpu())

    for name, tensors in checkpoint.parts.items():
        shape = shape_of(checkpoint, name)
        if name.endswith(LINEAR_WEIGHTS) or (head and name == "embedding.weight"):
            parts = stored_parts(name, shape, weight_format, group)
            for index, (key, (dtype, part_shape)) in enumerate(parts.items()):
                entries[key] = (dtype, part_shape, partial(part, name, index))
        else:
            entries[name] = weight_entry(tensors, 0, shape, None, progress)
    write_safetensors(file, entries, metadata)


def round_weight(
    checkpoint: Checkpoint, name: str, weight_format: str, group: int, progress=lambda n: None
) -> tuple[Tensor, ...]:
    """The parameters of a weight of `checkpoint` in weight_format, each value rounded by itself, ROWS at a time."""
    shape, pieces = shape_of(checkpoint, name), []
    for _, rows in stored_rows(checkpoint.parts[name], 0, rows_of(shape)):
        pieces.append(FORMATS[weight_format].quantize(rows, group))
        progress(rows.nbytes)
    return tuple(torch.cat(parts).unflatten(0, shape[:-1]) for parts in zip(*pieces))


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323)

BLOCK = 128  # columns between two updates of all that follow


def gptq(
    weight: Tensor, hessian: Tensor, group: int, act_order: bool = False, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The parameters, in int4, of weight [N, K] that keep its products with inputs x, of which hessian [K, K] is the
    sum of x xᵀ.

    Columns are rounded one after the other, and what is lost in one is made up for in those that follow, along the
    inverse of the hessian that is left: row j of U, with H⁻¹ = Uᵀ U, is what the paper's (3) needs at column j, and all
    columns after a block get its updates at once. A group's scale and zero are those of its values by then; with
    `act_order`, where the columns with the largest inputs come first, those of its values at the start. `damping` times
    the mean of the diagonal is added to it. In hessian's dtype, which is overwritten. Raises ValueError if the hessian
    isn't finite, or isn't positive then.
    """
    n, k = weight.shape
    diagonal = hessian.diagonal()
    if not diagonal.isfinite().all():
        raise ValueError("the model computes values that are not finite; GPTQ can't go by them")
    diagonal[diagonal == 0] = 1  # an input that is always 0: any code will do
    order = diagonal.argsort(descending=True) if act_order else torch.arange(k, device=weight.device)
    diagonal += damping * diagonal.mean()
    if act_order:
        hessian = hessian[order][:, order]
    try:
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    except torch.linalg.LinAlgError:
        raise ValueError("the text's hessian is not positive definite: raise --damping, or use more text") from None

    parameters = group_parameters(weight.to(hessian.dtype).unflatten(1, (-1, group)))
    columns = weight.T[order].to(hessian.dtype).contiguous()  # [K, N]: what is worked on at a time lies together
    codes = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    block = max(BLOCK, group)
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = torch.empty(stop - start, n, dtype=columns.dtype, device=weight.device)
        for j, column in enumerate(order[start:stop].tolist(), start):
            g = column // group
            if not act_order and j % group == 0:
                parameters[:, g] = group_parameters(columns[j : j + group].T)
            scale, zero = parameters[:, g].to(columns.dtype).unbind(-1)
            code = (columns[j] / scale + zero).round_().clamp_(0, 15)
            error = (columns[j] - (code - zero) * scale) / upper[j, j]
            columns[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
            codes[column], errors[j - start] = code, error
        columns[stop:] -= upper[start:stop, stop:].T @ errors
    codes = codes.T.contiguous()
    return pack_int4(codes), parameters


@torch.no_grad()
def gptq_weights(
    checkpoint: Checkpoint,
    token_windows: list[list[int]],
    device: torch.device,
    quantize: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    group: int,
    batch_size: int = 8,
) -> Iterator[tuple[Tensor, ...]]:
    """`quantize`(weight, hessian) of each linear layer in turn, on inputs that come through the layers before as
    they are quantized, to int4 in groups of `group`. Experts are rounded if they meet too few tokens (`_gptq_experts`);
    a warning names them.

    On `device` are one block's weights, the residual stream of all windows in bf16, what layers have of these tokens
    beside it (embeddings of their own, shared keys and values), and a hessian in float32.
    """
    config, dtype, watched, rounded = checkpoint.config, torch.bfloat16, {}, []

    def watch(operation: Callable) -> Callable:
        """`operation`, which adds x xᵀ of its inputs to the hessian of the weight that is watched."""

        def watching(x: Tensor, weight: Weight, *rest, **options) -> Tensor:
            if weight in watched:
                _add_squares(watched[weight], x)
            return operation(x, weight, *rest, **options)

        return watching

    def watching_experts(h: Tensor, w13: Weight, w2: Weight, chosen: Tensor, *rest) -> Tensor:
        """`experts`, which keeps its inputs if they are watched."""
        if w13 in watched:
            watched[w13].append((h, chosen))
        return TORCH.experts(h, w13, w2, chosen, *rest)

    with torch.device("meta"):
        model = Transformer(config)
    watching = dict(matmul=watch(TORCH.matmul), matmul_geglu=watch(TORCH.matmul_geglu), experts=watching_experts)
    model.ops = replace(TORCH, **watching)
    model.rope_frequency, model.rope_frequency_local = (
        frequency.to(device) for frequency in (model.rope_frequency, model.rope_frequency_local)
    )

    def weights(prefix: str) -> dict[str, Tensor]:
        parts = {name: tensors for name, tensors in checkpoint.parts.items() if name.startswith(prefix)}
        loaded = load_weights(replace(checkpoint, parts=parts), device, dtype)
        return {name.removeprefix(prefix): weight for name, weight in loaded.items()}

    embedding, own, streams = weights("embedding.")["weight"], model.per_layer_inputs, []
    if own is not None:
        own.load_state_dict(weights("per_layer_inputs."), assign=True)
    for batch in batches(token_windows, batch_size):
        tokens = torch.tensor(batch).to(device)
        flat = tokens.flatten()
        x = TORCH.embed(flat, embedding, model.normalizers[dtype], dtype)
        streams.append(Stream(model.positions(tokens), Residual(x), None if own is None else own(TORCH, flat, x)))
    del embedding
    if own is not None:
        own.to("meta")
    for i, layer in enumerate(model.layers):
        layer.load_state_dict(weights(f"layers.{i}."), assign=True)

        for name in ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2"):
            linear = layer.get_submodule(name)
            watched[linear] = torch.zeros(linear.shape[1], linear.shape[1], device=device)
            _forward(model, i, streams)
            parameters = quantize(linear.weight, watched.pop(linear))
            linear.weight = torch.nn.Parameter(_numbers(parameters, linear.shape, group, dtype), False)
            yield parameters
        if layer.experts is not None:
            watched[layer.experts.w13] = []
            _forward(model, i, streams)
            *products, few = _gptq_experts(layer.experts, watched.pop(layer.experts.w13), quantize, group)
            rounded += [f"layers.{i}.experts {e}" for e in few]
            if rounded and layer is model.layers[-1]:
                warnings.warn(f"experts that met too few tokens for GPTQ are rounded: {some(rounded)}", stacklevel=2)
            yield from products
        streams = _forward(model, i, streams)
        layer.to("meta")


def _gptq_experts(
    experts: Experts, inputs: list[tuple[Tensor, Tensor]], quantize: Callable, group: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[int]]:
    """The parameters of w13 and of w2 of a layer's experts, which from then on have what these stand for, and the
    experts that are rounded: those that met fewer tokens than an eighth of their inputs' size.

    `inputs` are rows [M, N] and which experts [M, top_k] each goes to. An expert's hessians are of its own rows; those
    of w2 come through its w13 as it is quantized.
    """
    weights, parameters, few = (experts.w13, experts.w2), ([], []), []
    quantized = [torch.empty_like(weight.weight) for weight in weights]
    for e in range(experts.w13.experts):
        rows = [h[(chosen == e).any(1)] for h, chosen in inputs]
        if 8 * sum(map(len, rows)) < experts.w13.shape[1]:
            few.append(e)
        for weight, found, numbers in zip(weights, parameters, quantized):
            if e in few:
                found.append(quantize_int4(weight.weight[e], group))
            else:
                hessian = torch.zeros(weight.shape[1], weight.shape[1], device=numbers.device)
                for x in rows:
                    _add_squares(hessian, x)
                found.append(quantize(weight.weight[e], hessian))
            numbers[e] = _numbers(found[-1], weight.shape, group, numbers.dtype)
            if weight is experts.w13:
                rows = [TORCH.matmul_geglu(x, Weight.of("bf16", numbers[e]), x.dtype) for x in rows]
    for weight, numbers in zip(weights, quantized):
        weight.weight = torch.nn.Parameter(numbers, False)
    w13, w2 = (tuple(map(torch.stack, zip(*found))) for found in parameters)
    return w13, w2, few


def _add_squares(hessian: Tensor, x: Tensor):
    """Adds x xᵀ of rows x [M, K] to hessian [K, K]."""
    rows = x.float()
    hessian.addmm_(rows.T, rows)


def _numbers(parameters: tuple[Tensor, ...], shape: tuple[int, int], group: int, dtype: torch.dtype) -> Tensor:
    """What parameters in int4 stand for."""
    weight = Weight.of("int4", *parameters, shape=shape, group=group)
    return weight.format.dequantize(weight, dtype)


class Stream(NamedTuple):
    """A batch of windows on its way through the layers: positions of each kind of layer, the residual stream, and
    [M, L, P] what each layer is given of the tokens, if it is given something."""

    kinds: dict[bool, Positions]
    residual: Residual
    inputs: Tensor | None


def _forward(model: Transformer, layer: int, streams: list[Stream]) -> list[Stream]:
    """Each batch one layer on."""
    after = []
    for stream in streams:
        positions = stream.kinds[model.config.is_local(layer)]
        own = None if stream.inputs is None else stream.inputs[:, layer]
        after.append(stream._replace(residual=model.layers[layer](model.ops, stream.residual, positions, None, own)))
    return after


# ---------------------------------------------------------------------------------------------------------------------
# The program

MODES = (*QUANTIZED_FORMATS, "int4-gptq")
OPTIONS = {  # what only some modes take
    ("fp8",): ("fp8_head", "export_hf"),
    (*INT_FORMATS, "int4-gptq"): ("quantize_embedding",),
    (*(name for name in INT_FORMATS if FORMATS[name].grouped), "int4-gptq"): ("group_size",),
    ("int4-gptq",): ("text", "window", "max_tokens", "damping", "act_order", "device"),
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="quantize.py", description=__doc__)
    add = parser.add_argument
    add("--mode", choices=MODES, required=True)
    add_model_options(parser, "checkpoint_path")
    add("--fp8_head", action="store_true", help="fp8: the embedding, which is the output head, too")
    out = "fp8: a new directory for vLLM, TGI and transformers (default: a file of our own)"
    add("--export_hf", type=path, metavar="OUT", help=out)
    add("--quantize_embedding", action="store_true", help="int: the embedding, which is the output head, in int8")
    add("--group_size", type=int, choices=GROUPS, help="int4: neighbours that share a scale (default: 32)")
    add("--text", type=path, metavar="FILE", help="gptq: text, or JSON lines with 'text' (default: our own sources)")
    add("--window", type=number(int, 2), metavar="N", help="gptq: tokens seen at once (default: 512)")
    add("--max_tokens", type=number(int, 1), metavar="N", help="gptq: the text's first ones (default: 65536)")
    damping = "gptq: share of its mean that is added to the hessian's diagonal (default: 0.01)"
    add("--damping", type=number(float, 0, 1), help=damping)
    add("--act_order", action="store_true", help="gptq: inputs in the order of their size")
    add("--device", choices=("cuda", "cpu"), help="gptq: (default: cuda where there is a GPU)")
    return run_program(run, parser, argv)


def run(args: argparse.Namespace):
    for modes, options in OPTIONS.items():
        for option in options:
            value = getattr(args, option)
            if value is not None and value is not False and args.mode not in modes:
                raise ValueError(f"--{option} is for {' and '.join(f'--mode {mode}' for mode in modes)} only")
    checkpoint = open_checkpoint(args.checkpoint_path)
    if checkpoint.weight_format in QUANTIZED_FORMATS:
        raise ValueError(f"{args.checkpoint_path} is quantized already: name a checkpoint with BF16 weights")
    total = sum(tensor.size for tensors in checkpoint.parts.values() for tensor in tensors)
    prepare = prepare_fp8 if args.mode == "fp8" else prepare_int
    file, write = prepare(args, checkpoint)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {file.name}", leave=False) as bar:
        write(bar.update)
    print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB, {file.stat().st_size / total:.0%} of the source")


def prepare_fp8(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[Path, Callable]:
    """The file, and what writes it when it is called with `progress`. Raises ValueError or OSError for what is known to
    fail before that."""
    scales_file = checkpoint.directory / SCALES_NAME
    if not scales_file.exists():
        command = f"python calibrate.py --checkpoint_path {checkpoint.directory}"
        raise FileNotFoundError(f"there are no scaling factors at {scales_file}: run {command}")
    scales = read_scales(scales_file, checkpoint.config)
    if not args.fp8_head:
        scales = {name: scale for name, scale in scales.items() if not name.startswith("head")}
    if args.export_hf is None:
        file = checkpoint.directory / "gemma-fp8.safetensors"
        check_writable(file)
        check_weights(checkpoint, scales)
        return file, partial(quantize_fp8, checkpoint, scales, file)
    if args.fp8_head:
        raise ValueError("--export_hf leaves the output head as it is: leave out --fp8_head")
    check_new_directory(args.export_hf)
    if read_json(checkpoint.directory / "config.json")["model_type"] in MULTIMODAL:
        generation = checkpoint.config.generation
        raise ValueError(f"of a multimodal Gemma {generation} only the text part is read: it can't be exported whole")
    check_weights(checkpoint, scales)
    return args.export_hf / "model.safetensors", partial(export_hf, checkpoint, scales, args.export_hf)


def prepare_int(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[Path, Callable]:
    """As `prepare_fp8`."""
    weight_format = args.mode.removesuffix("-gptq")
    group = (args.group_size or 32) if FORMATS[weight_format].grouped else 0
    if group:
        check_group(checkpoint, group)
    file = checkpoint.directory / f"gemma-{args.mode}{f'-g{group}' if group else ''}.safetensors"
    check_writable(file)
    head, metadata, text = args.quantize_embedding, {"weight_format": weight_format}, None
    if group:
        metadata |= {"group_size": str(group), "method": "gptq" if args.mode == "int4-gptq" else "rounded"}
    if args.mode == "int4-gptq":
        device = pick_device(args.device)
        config = checkpoint.config
        tokenizer = open_tokenizer(checkpoint.directory, config)
        window, most = args.window or 512, args.max_tokens or 65536
        text = sample_windows(args.text, tokenizer, window, config.context_length, most, config.hidden_size)
        metadata |= {"text": args.text.name if args.text else "built-in", "tokens": str(sum(map(len, text)))}
    check_weights(checkpoint, {})

    def write(progress):
        if args.mode == "int4-gptq":
            damping = 0.01 if args.damping is None else args.damping
            quantize = partial(gptq, group=group, act_order=args.act_order, damping=damping)
            weights = gptq_weights(checkpoint, text, device, quantize, group)

        def quantized(name: str) -> tuple[Tensor, ...]:
            if name == "embedding.weight":
                return round_weight(checkpoint, name, FORMATS[weight_format].of_embedding.name, 0, progress)
            if args.mode != "int4-gptq":
                return round_weight(checkpoint, name, weight_format, group, progress)
            parameters = next(weights)  # of `name`: both go by the model's order
            progress(sum(tensor.size for tensor in checkpoint.parts[name]))
            return parameters

        write_int(checkpoint, file, quantized, head, metadata, progress)

    return file, write


def check_group(checkpoint: Checkpoint, group: int):
    inputs = {name: tensors[0].shape[-1] for name, tensors in checkpoint.parts.items() if name.endswith(LINEAR_WEIGHTS)}
    fitting = [str(each) for each in GROUPS if all(k % each == 0 for k in inputs.values())]
    for name, k in inputs.items():
        if k % group:
            advice = f"use {' or '.join(fitting)}" if fitting else "use --mode int8"
            raise ValueError(f"--group_size {group} does not divide the {k} inputs of {name}: {advice}")


if __name__ == "__main__":
    sys.exit(main())
