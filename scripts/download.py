"""Download a Gemma checkpoint from the Hugging Face Hub into checkpoints/REPO_ID."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import interrupt

if __name__ == "__main__":
    interrupt.silence()  # while the rest is imported

import argparse

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cli import Parser, path, run_program

FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
]


def download(repo_id: str, directory: Path, token: str | None = None, revision: str | None = None):
    """Fetches settings, tokenizer and safetensors shards, resuming what an earlier try left.

    Raises ValueError with a line that says what to do where the repository is gated, missing or out of reach.
    """
    page = f"https://huggingface.co/{repo_id}"
    try:
        snapshot_download(repo_id, local_dir=directory, allow_patterns=FILES, token=token, revision=revision)
    except GatedRepoError:
        raise ValueError(
            f"{repo_id} is gated: accept its licence at {page}, then run 'hf auth login' or pass --hf_token"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo_id} has no revision '{revision}'; see {page}/tree/main") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"no repository {repo_id} on the Hugging Face Hub, or it is private: check the name (google/gemma-7b, for "
            "one), or run 'hf auth login' or pass --hf_token"
        ) from None
    except HFValidationError as error:
        raise ValueError(f"'{repo_id}' is not a repository id such as google/gemma-7b ({error})") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"the download of {repo_id} did not finish ({_first_line(error)}); run it again: it resumes where it stopped"
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # the Hub's client leaves connection errors to its library
            raise
        raise ValueError(f"the Hugging Face Hub can't be reached ({_first_line(error)}); run it again") from None
    for files in (("config.json",), ("tokenizer.model", "tokenizer.json")):
        if not any((directory / file).exists() for file in files):
            missing = " and no ".join(files)
            raise ValueError(f"{repo_id} has no {missing}: not a Gemma checkpoint that this program can run")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run(args: argparse.Namespace):
    download(args.repo_id, args.checkpoints_dir / args.repo_id, args.hf_token, args.revision)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="download.py", description=__doc__)
    add = parser.add_argument
    add("repo_id", help="such as google/gemma-7b")
    directory = Path(__file__).parent.parent / "checkpoints"
    add("--checkpoints_dir", type=path, default=directory, metavar="DIR", help="(default: checkpoints beside scripts)")
    add("--hf_token", metavar="TOKEN", help="access token (default: HF_TOKEN, or what 'hf auth login' stored)")
    add("--revision", help="branch, tag or commit (default: the main branch)")
    return run_program(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
