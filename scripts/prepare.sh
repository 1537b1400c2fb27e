#!/usr/bin/env bash
# Downloads a checkpoint from the Hugging Face Hub into checkpoints/REPO_ID and converts it:
#   scripts/prepare.sh google/gemma-7b [--hf_token TOKEN] [--revision REVISION]
set -euo pipefail
if [ $# -lt 1 ] || [[ "$1" == -* || " ${*:2} " == *" --c"* || " ${*:2} " =~ " "(-h|--help)" " ]]; then
  echo "usage: scripts/prepare.sh REPO_ID [--hf_token TOKEN] [--revision REVISION], REPO_ID such as google/gemma-7b" >&2
  exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if ! python -c "
import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, ('torch', 'sentencepiece', 'tokenizers', 'jinja2', 'safetensors', 'huggingface_hub', 'tqdm'))))" 2>/dev/null; then
  echo "error: this needs Python with the packages of requirements.txt: python -m pip install -r $root/requirements.txt" >&2
  exit 2
fi
python "$root/scripts/download.py" "$@"
python "$root/scripts/convert_hf_checkpoint.py" "$root/checkpoints/$1"
option=checkpoint_path
[[ "$1" == *-assistant ]] && option="draft_checkpoint_path"
echo "ready: python generate.py --$option checkpoints/$1"
