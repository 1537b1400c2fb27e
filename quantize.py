"""Write a checkpoint with quantised weights: `--mode fp8`, half the bytes of BF16."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from checkpoint import (
    FP8_DTYPE,
    FP8_SCHEME,
    SCALES_NAME,
    Checkpoint,
    StoredTensor,
    check_weight_scale,
    fp8_scale_names,
    open_checkpoint,
    read_json,
    read_scales,
    sources,
    tensor_bytes,
    weight_scale_name,
    write_safetensors,
)
from generate import DEFAULT_CHECKPOINT, Parser, run_program
from kernels import round_fp8

ROWS = 4096  # of a weight that are in memory at once


def quantize_fp8(
    checkpoint: Checkpoint, scales: dict[str, float], file: Path, head: bool = False, progress=lambda n: None
):
    """Writes `checkpoint` with its linear weights, and with `head` its embedding, in E4M3, scales included.

    `scales` are `read_scales`'. A weight is read and written some rows at a time. `progress` is called with the number
    of source bytes done since the last call. Raises ValueError if the scales are of another model.
    """
    entries = {}
    for name, tensors in checkpoint.parts.items():
        scale = scales.get(weight_scale_name(name)) if head or name != "embedding.weight" else None
        check_scale(name, tensors, scale)
        shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
        entries[name] = weight_entry(tensors, 0, shape, scale, progress)
    for name, value in scales.items():
        if head or not name.startswith("head"):
            entries[name] = ("F32", (), lambda value=value: [tensor_bytes(torch.tensor(value))])
    write_safetensors(file, entries, {"weight_format": "fp8"})


def export_hf(checkpoint: Checkpoint, scales: dict[str, float], directory: Path, progress=lambda n: None):
    """Writes `checkpoint` with FP8 weights as llm-compressor publishes it, for vLLM, TGI and transformers.

    q, k and v, and gate and up, become tensors of their own again, with the scales that they share. Raises ValueError
    if `directory` has weights already, is the source's, or the scales are of another model.
    https://github.com/vllm-project/compressed-tensors: src/compressed_tensors/quantization
    """
    source = checkpoint.directory
    config = read_json(source / "config.json")
    if directory.resolve() == source.resolve():
        raise ValueError(f"{directory} is the source itself: name another directory to export to")
    if existing := sorted(directory.glob("model*.safetensors*")):
        raise ValueError(f"{existing[0]} exists already: name an empty directory to export to")
    if config["model_type"] == "gemma3":
        raise ValueError("of a multimodal Gemma 3 only the text part is read: it can't be exported whole")
    entries = {}
    for name, parts in sources(checkpoint.config).items():
        scale, start = scales.get(f"{name}_scale"), 0
        check_scale(name, checkpoint.parts[name], scale)
        for their_name, shape in parts:
            entries[their_name] = weight_entry(checkpoint.parts[name], start, shape, scale, progress)
            start += shape[0]
            for kind in () if scale is None else ("weight_scale", "input_scale"):
                value = scales[name.removesuffix("weight") + kind]
                entries[their_name.removesuffix("weight") + kind] = scale_entry(value)
    for ours, theirs in fp8_scale_names(checkpoint.config).items():
        if ours.endswith((".k_scale", ".v_scale")):
            entries[theirs] = scale_entry(scales[ours])

    group = {"targets": ["Linear"], "weights": FP8_SCHEME, "input_activations": FP8_SCHEME}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": FP8_SCHEME,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("generation_config.json", "tokenizer.model"):
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
    write_safetensors(directory / "model.safetensors", entries, {"format": "pt"})  # last: what is there is whole


def scale_entry(value: float):
    return "F32", (1,), lambda: [tensor_bytes(torch.tensor(value))]


def weight_entry(tensors: list[StoredTensor], start: int, shape: tuple[int, ...], scale: float | None, progress):
    """For `write_safetensors`: shape[0] rows, from `start`, of tensors joined along their first dimension; in E4M3
    where there is a scale."""

    def blocks():
        first, stop = start, start + shape[0]
        for tensor in tensors:
            with safe_open(tensor.file, framework="pt") as f:
                stored = f.get_slice(tensor.key)
                for row in range(max(first, 0), min(stop, tensor.shape[0]), ROWS):
                    rows = stored[row : min(row + ROWS, stop, tensor.shape[0])]
                    yield tensor_bytes(rows if scale is None else round_fp8(rows, scale))
                    progress(rows.nbytes)
            first, stop = first - tensor.shape[0], stop - tensor.shape[0]

    return tensors[0].dtype if scale is None else FP8_DTYPE, shape, blocks


def check_scale(name: str, tensors: list[StoredTensor], scale: float | None):
    if scale is not None:
        largest = 0.0
        for tensor in tensors:
            with safe_open(tensor.file, framework="pt") as f:
                largest = max(largest, f.get_tensor(tensor.key).abs().max().item())
        check_weight_scale(name, largest, scale)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="quantize.py", description=__doc__)
    add = parser.add_argument
    add("--mode", choices=("fp8",), required=True)
    add("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT, help="directory with BF16 weights")
    add("--fp8_head", action="store_true", help="the embedding, which is the output head, in FP8, too")
    add("--export_hf", type=Path, metavar="OUT", help="write a directory for vLLM, TGI and transformers instead")
    return run_program(run, parser, argv)


def run(args: argparse.Namespace):
    checkpoint = open_checkpoint(args.checkpoint_path)
    if checkpoint.weight_format == "fp8":
        raise ValueError(f"{args.checkpoint_path} is quantised already: name a checkpoint with BF16 weights")
    scales_file = checkpoint.directory / SCALES_NAME
    if not scales_file.exists():
        command = f"python calibrate.py --checkpoint_path {checkpoint.directory}"
        raise FileNotFoundError(f"there are no scaling factors at {scales_file}: run {command}")
    scales = read_scales(scales_file, checkpoint.config)
    if args.export_hf and args.fp8_head:
        raise ValueError("--export_hf leaves the output head as it is: leave out --fp8_head")
    file = args.export_hf / "model.safetensors" if args.export_hf else checkpoint.directory / "gemma-fp8.safetensors"
    total = sum(tensor.size for tensors in checkpoint.parts.values() for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {file.name}", file=sys.stderr) as bar:
        if args.export_hf:
            export_hf(checkpoint, scales, args.export_hf, bar.update)
        else:
            quantize_fp8(checkpoint, scales, file, args.fp8_head, bar.update)
    print(f"{file}: {file.stat().st_size / 1e9:.2f} GB, {file.stat().st_size / total:.0%} of the source")


if __name__ == "__main__":
    sys.exit(main())
