"""The programs that benchmark.py measures beside ours: transformers."""

import sys
from collections.abc import Callable


def hf_config(config) -> dict:
    """Returns config.json of a Gemma 1 as Hugging Face has it, of our ModelConfig."""
    return {
        "model_type": "gemma",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
    }


# ---------------------------------------------------------------------------------------------------------------------
# transformers, in this process


def have_transformers() -> bool:
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no peer is timed", file=sys.stderr)
        return False
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return True


def transformers_model(config: dict, device):
    """Makes transformers' model of a Hugging Face config: random weights in BF16 on a torch.device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with device:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)


def transformers_checkpoint(directory):
    """Loads a checkpoint into transformers' model, in BF16 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def transformers_generate(model, prompts: list[list[int]], new_tokens: int, **options) -> Callable[[], None]:
    """Returns a function that runs the peer's own loop once: greedy, no stop token, a dynamic cache unless `options` say
    otherwise, prompts padded on the left."""
    import torch

    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)

    def run():
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)
        assert output.shape[1] == width + new_tokens

    return run
