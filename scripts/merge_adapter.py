"""Merge a LoRA adapter into a checkpoint: a new one as Hugging Face publishes them, to be quantized, say."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import interrupt

if __name__ == "__main__":
    interrupt.silence()  # while the rest is imported

import argparse
from dataclasses import replace
from functools import reduce

import torch
from tqdm import tqdm

from adapter import read_adapter, updates_of
from checkpoint import load_weights, some
from cli import Parser, add_model_options, path, run_program
from export import check_new_directory, export_checkpoint, open_source
from files import torch_dtype


def run(args: argparse.Namespace):
    check_new_directory(args.output_dir)
    adapter, checkpoint = read_adapter(args.adapter), open_source(args.checkpoint_path)
    if adapter.others:
        what = f"changes {some(adapter.others)}, of a part for images or sound"
        raise ValueError(f"adapter {adapter.name} {what}: only the text model's modules can be merged")
    updates = updates_of(adapter, checkpoint.config)

    def tensor_of(name: str) -> torch.Tensor:
        """A weight, merged, in the dtype that it is stored in."""
        parts = {name: checkpoint.parts[name]}
        dtype = reduce(torch.promote_types, map(torch_dtype, parts[name]))
        return load_weights(replace(checkpoint, parts=parts), torch.device("cpu"), dtype, updates=updates)[name]

    size = sum(tensor.size for tensors in (*checkpoint.parts.values(), checkpoint.others) for tensor in tensors)
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"writing {args.output_dir}", leave=False) as bar:
        export_checkpoint(args.output_dir, args.checkpoint_path, tensor_of, bar.update)
    print(f"{args.output_dir}: {args.checkpoint_path} with {adapter}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="merge_adapter.py", description=__doc__)
    add_model_options(parser, "checkpoint_path")
    parser.add_argument("--adapter", type=path, required=True, metavar="DIR", help="in PEFT's format")
    parser.add_argument("--output_dir", type=path, required=True, metavar="OUT", help="a new directory")
    return run_program(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
