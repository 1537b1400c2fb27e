"""LoRA adapters as PEFT keeps them: a directory with adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path

from torch import Tensor

from files import tensor_bytes, write_atomically, write_safetensors


def save_adapter(directory: Path, factors: dict[str, tuple[Tensor, Tensor]], rank: int, alpha: float, base: str):
    """Writes factors A [rank, in] and B [out, rank] of modules by Hugging Face's names; `base` is the checkpoint."""
    entries = {}
    for name, pair in factors.items():
        for which, factor in zip("AB", pair):
            stored = factor.detach().float().cpu()
            write = "F32", tuple(stored.shape), lambda stored=stored: [tensor_bytes(stored)]
            entries[f"base_model.model.{name}.lora_{which}.weight"] = write
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in factors}),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_safetensors(directory / "adapter_model.safetensors", entries, {"format": "pt"})
    text = json.dumps(settings, indent=2) + "\n"
    write_atomically(directory / "adapter_config.json", lambda out: out.write(text.encode()))
