"""Checkpoints of tiny random Gemma 4 models of every kind, as transformers saves them, with a small tokenizer.json."""

from pathlib import Path

import torch
from conftest import CODE, GEMMA4, GLOBAL, LOCAL, PER_LAYER, ROOT, SIZES, made_once, save_json_tokenizer

CALIBRATION = ("--window", "128", "--max_tokens", "1024")
K_EQ_V = dict(attention_k_eq_v=True, num_global_key_value_heads=1)
SHARED = GEMMA4 | PER_LAYER | dict(vocab_size_per_layer_input=640)
KINDS = {  # the checkpoint that it is like: model_type and settings
    "dense": ("gemma4_text", GEMMA4 | K_EQ_V),  # 31B
    "unified": ("gemma4_unified_text", GEMMA4 | K_EQ_V),  # 12B
    "moe": (  # 26B-A4B
        "gemma4_text",
        GEMMA4
        | K_EQ_V
        | dict(num_hidden_layers=3, layer_types=[LOCAL, LOCAL, GLOBAL], intermediate_size=128)
        | dict(enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=96),
    ),
    "e2b": (
        "gemma4_text",
        SHARED | dict(num_key_value_heads=1, num_kv_shared_layers=3, use_double_wide_mlp=True),
    ),
    "e4b": (
        "gemma4_text",
        SHARED | dict(num_kv_shared_layers=2, num_hidden_layers=5, layer_types=[LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL]),
    ),
}


def reference(kind: str, seed: int = 0):
    """transformers' model: float32, every number away from what it is at first."""
    import transformers

    model_type, settings = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | settings | dict(vocab_size=640)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms, factors of the router
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 0.5 if "embed" in name else parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.normal_(0.8, 0.1)
    return model.eval()


def checkpoint(kind: str, directory: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """Writes a model of this kind, as save_pretrained does with `options`, and a tokenizer."""
    reference(kind).to(dtype).save_pretrained(directory, **options)
    return save_json_tokenizer(directory, 640)


def calibrated(kind: str, tmp_path_factory) -> Path:
    """The directory of such a checkpoint in BF16, with text.txt and factors from that, made once. Whoever changes it
    takes a copy."""
    import calibrate

    def make(directory):
        checkpoint(kind, directory, torch.bfloat16)
        (directory / "text.txt").write_text(CODE + (ROOT / "sampling.py").read_text())
        arguments = ["--checkpoint_path", str(directory), "--text", str(directory / "text.txt"), *CALIBRATION]
        assert calibrate.main([*arguments, "--device", "cpu"]) == 0

    return made_once(tmp_path_factory, f"gemma4-{kind}", make)
