"""Download a Gemma checkpoint from the Hugging Face Hub into checkpoints/REPO_ID."""

import argparse
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.model",
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
    for file in ("config.json", "tokenizer.model"):
        if not (directory / file).exists():
            raise ValueError(f"{repo_id} has no {file}: not a Gemma checkpoint that this program can run")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo_id", help="such as google/gemma-7b")
    parser.add_argument("--checkpoints_dir", type=Path, default=Path(__file__).parent.parent / "checkpoints")
    parser.add_argument("--hf_token", help="access token (default: HF_TOKEN, or what 'hf auth login' stored)")
    parser.add_argument("--revision", help="branch, tag or commit")
    args = parser.parse_args()
    try:
        download(args.repo_id, args.checkpoints_dir / args.repo_id, args.hf_token, args.revision)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
