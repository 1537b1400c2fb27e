"""Convert a Hugging Face checkpoint directory into one file, gemma.safetensors, that loads without copies."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from checkpoint import CONVERTED_NAME, convert, open_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="with config.json and model*.safetensors")
    args = parser.parse_args()
    file = args.directory / CONVERTED_NAME
    try:
        if args.directory.is_file():
            raise ValueError(f"{args.directory} is a file; name the checkpoint's directory")
        checkpoint = open_checkpoint(args.directory, formats=())
        size = sum(tensor.size for tensors in checkpoint.parts.values() for tensor in tensors)
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"writing {file.name}") as bar:
            convert(checkpoint, file, bar.update)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{file}: {checkpoint.parameters / 1e6:,.1f} M parameters, {size / 1e9:.2f} GB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
