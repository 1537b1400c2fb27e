"""Tiny random models made by transformers, the reference, and saved as Hugging Face publishes them."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, for the programs that tests start, too
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TINY_GEMMA = ROOT / "checkpoints" / "tiny-gemma"
GREEDY = dict(temperature=0, stop_ids=())
TEXTS = (  # prompts of different lengths
    "def fibonacci(n):\n",
    "import os\n\n\nclass Path:\n    def __init__(self, path):\n",
    "#",
    "x = [i for i in",
)

# hidden 64 and head_dim 24 or 32: head_dim is never hidden / heads. Sequences in the tests have about 40 tokens.
SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    head_dim=32,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
)
LINEAR_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES = {
    "gemma-mha": ("gemma", dict(num_attention_heads=4, num_key_value_heads=4, head_dim=24)),
    "gemma-gqa": ("gemma", dict(num_attention_heads=4, num_key_value_heads=2)),
    "gemma-mqa": ("gemma", dict(num_attention_heads=4, num_key_value_heads=1)),
    "gemma2-window-half": (
        "gemma2",
        dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=20, query_pre_attn_scalar=48),
    ),
    "gemma2-window-small": (
        "gemma2",
        dict(
            num_attention_heads=4,
            num_key_value_heads=4,
            sliding_window=5,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=4.0,  # small, so that both caps bend what the tests see
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3-window-half": (
        "gemma3_text",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=7,
            sliding_window=20,
            query_pre_attn_scalar=40,
            rope_parameters=LINEAR_ROPE,
        ),
    ),
    "gemma3-window-small": (
        "gemma3_text",
        dict(num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=7, sliding_window=6),
    ),
}


def reference_model(case: str, seed: int = 0):
    """transformers' model for a case: float32, random weights, norm weights that are not zero."""
    import transformers

    model_type, settings = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | settings))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Layers that outweigh the embedding: greedy tokens then vary, instead of repeating the last one.
            parameter.normal_(0, 0.1 if "embed" in name else 0.3)
    return model.eval()


def copy_tiny_gemma(directory: Path) -> Path:
    """As committed, whether or not it was converted since."""
    return shutil.copytree(
        TINY_GEMMA, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("gemma*.safetensors")
    )


def save_checkpoint(model, directory: Path, **options) -> Path:
    """As Hugging Face publishes it, with tiny-gemma's tokenizer beside it."""
    model.save_pretrained(directory, **options)
    shutil.copy(TINY_GEMMA / "tokenizer.model", directory)
    return directory


@pytest.fixture(scope="session", params=list(CASES))
def reference(request, tmp_path_factory):
    """(transformers' model, directory of the same as a checkpoint) for each case."""
    model = reference_model(request.param)
    return model, save_checkpoint(model, tmp_path_factory.mktemp(request.param))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
