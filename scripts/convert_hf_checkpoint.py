"""Convert a Hugging Face checkpoint directory into one file, gemma.safetensors, that loads without copies."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import interrupt

if __name__ == "__main__":
    interrupt.silence()  # while the rest is imported

import argparse

from tqdm import tqdm

from assistant import is_assistant
from checkpoint import CONVERTED_NAME, convert, open_checkpoint
from cli import Parser, path, run_program
from files import check_writable


def run(args: argparse.Namespace):
    file = args.directory / CONVERTED_NAME
    if args.directory.is_file():
        raise ValueError(f"{args.directory} is a file; name the checkpoint's directory")
    if is_assistant(args.directory):
        print(f"{args.directory} has drafts for --draft_checkpoint_path, and stays as it is", file=sys.stderr)
        return
    checkpoint = open_checkpoint(args.directory, formats=())
    check_writable(file)
    size = sum(tensor.size for tensors in checkpoint.parts.values() for tensor in tensors)
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"writing {file.name}") as bar:
        convert(checkpoint, file, bar.update)
    print(f"{file}: {checkpoint.parameters / 1e6:,.1f} M parameters, {size / 1e9:.2f} GB", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="convert_hf_checkpoint.py", description=__doc__)
    parser.add_argument("directory", type=path, help="with config.json and model*.safetensors")
    return run_program(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
