"""Settings: the published models', Hugging Face's config.json in its variants, and what is refused."""

from dataclasses import replace

import pytest
import torch
from conftest import CASES, SIZES

from config import NAMED_CONFIGS, ModelConfig
from model import Transformer


@pytest.mark.parametrize("name", list(NAMED_CONFIGS))
def test_published_sizes(name):
    """Parameter counts that Google's model cards and Hugging Face's model pages give, in millions."""
    published = {
        "gemma-2b": 2506, "gemma-7b": 8538, "codegemma-2b": 2506, "codegemma-7b": 8538,
        "gemma-2-2b": 2614, "gemma-2-9b": 9242, "gemma-2-27b": 27227,
        "gemma-3-270m": 268, "gemma-3-1b": 1000, "gemma-3-4b": 3880, "gemma-3-12b": 11766, "gemma-3-27b": 27009,
        "gemma-4-E2B": 4630, "gemma-4-E4B": 7460, "gemma-4-12B": 11910, "gemma-4-26B-A4B": 25230, "gemma-4-31B": 30700,
    }  # fmt: skip
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(ModelConfig.from_name(name)).parameters())
    assert parameters / 1e6 == pytest.approx(published[name], rel=2e-3)


@pytest.mark.parametrize("name", list(NAMED_CONFIGS))
def test_what_distinguishes_the_generations_is_a_field(name):
    config = ModelConfig.from_name(name)
    generation = config.generation
    assert generation == (int(name[6]) if name[:7] in ("gemma-2", "gemma-3", "gemma-4") and name[7:8] == "-" else 1)
    assert (config.post_norms, config.qk_norm) == (generation >= 2, generation >= 3)
    assert (config.attn_softcap is not None, config.logit_softcap is not None) == (
        generation == 2,
        generation in (2, 4),
    )
    assert any(config.local_layers) == (config.window is not None) == (generation >= 2)
    without = replace(config, post_norms=False, qk_norm=False)
    with torch.device("meta"):
        names, fewer = ({key.split(".", 2)[-1] for key in Transformer(each).state_dict()} for each in (config, without))
    norms = {"post_attention_norm.weight", "post_feed_forward_norm.weight"} if generation >= 2 else set()
    norms |= {"attention.q_norm.weight", "attention.k_norm.weight"} if generation >= 3 else set()
    assert names - fewer == norms


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match="no built-in configuration 'gemma-9'; there are: gemma-2b, "):
        ModelConfig.from_name("gemma-9")


def test_settings_that_do_not_fit_each_other_are_refused():
    config = ModelConfig.from_name("gemma-3-1b")
    for change, message in (
        ({"local_layers": (True,)}, "1 layer types are given for 26 layers"),
        ({"window": None}, "local layers need a sliding_window"),
        ({"n_kv_heads": 3}, "4 query heads cannot share 3 key/value heads evenly"),
        ({"head_dim": 255}, "head_dim 255 is odd"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "architecture 'llama' is not supported"),
        ({"model_type": "gemma4_assistant"}, r"another generation or kind of Gemma \(gemma4_assistant\)"),
        ({"model_type": "gemma4"}, "no text_config of gemma4_text"),
        ({"model_type": "gemma3n"}, r"Gemma \(gemma3n\)"),
        ({"model_type": "recurrent_gemma"}, r"Gemma \(recurrent_gemma\)"),
        ({"model_type": None}, "architecture None"),
        ({"model_type": ["gemma"]}, r"architecture \['gemma'\]"),
        ({"model_type": "gemma3"}, "no text_config of gemma3_text"),
        ({"model_type": "gemma3", "text_config": [1]}, "no text_config of gemma3_text"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma2"}}, "no text_config of gemma3_text"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true, not False"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true, not 'false'"),
        ({"use_bidirectional_attention": True}, "embedding model"),
        ({"hidden_activation": "silu"}, "activation 'silu'"),
        ({"hidden_activation": 0, "hidden_act": "gelu"}, "activation 0"),
        ({"hidden_activation": None, "hidden_act": ["gelu"]}, r"activation \['gelu'\]"),
        ({"hidden_size": "big"}, "hidden_size must be a whole number from 1 to 2,147,483,647, not 'big'"),
        ({"hidden_size": 256.0}, "hidden_size must be a whole number .* not 256.0"),
        ({"head_dim": None}, "head_dim must be a whole number .* not None"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number .* not 0"),
        ({"num_attention_heads": True}, "num_attention_heads must be a whole number .* not True"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"num_hidden_layers": 2147483648}, "num_hidden_layers must be a whole number from 1 to 1,000, not 2147483648"),
        ({"vocab_size": [9] * 10**6}, r"vocab_size must be .* not \[9, 9, 9, 9, 9, 9, \.\.\.\]$"),
        ({"max_position_embeddings": float("nan")}, "max_position_embeddings must be a whole number .* not nan"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings must be a whole number .* not inf"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings must be a whole number"),
        ({"sliding_window": 6.5}, "sliding_window must be a whole number .* not 6.5"),
        ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern must be a whole number .* not 0"),
        ({"layer_types": None, "sliding_window_pattern": 2.5}, "sliding_window_pattern must be a whole number"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number, not None"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, not -1"),
        ({"rms_norm_eps": 1e-320}, "rms_norm_eps must be a positive number, not 1e-320"),
        ({"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar must be a positive number, not 1000"),
        ({"query_pre_attn_scalar": True}, "query_pre_attn_scalar must be a positive number, not True"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping must be a positive number, not 0"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping must be a positive number, not '30'"),
        ({"layer_types": ["full_attention"] * 2}, "2 layer types are given for 7 layers"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer type 'chunked_attention'"),
        ({"layer_types": [["full_attention"]] * 7}, r"layer type \['full_attention'\]"),
        ({"layer_types": []}, r"layer_types must be a list of 7, not \[\]"),
        ({"layer_types": "full"}, "layer_types must be a list of 7, not 'full'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "RoPE type 'yarn'"),
        ({"rope_parameters": []}, r"rope_parameters must be an object or null, not \[\]"),
        ({"rope_parameters": {"full_attention": 5}}, "full_attention must be an object or null, not 5"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling must be an object or null, not 'linear'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a positive number, not None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor must be a positive number, not 0"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta must be a positive number, not None"),
        ({"rope_parameters": {}, "rope_theta": 0}, "rope_theta must be a positive number, not 0"),
        ({"rope_parameters": {}, "rope_local_base_freq": float("inf")}, "rope_local_base_freq must be .* not inf"),
        ({"eos_token_id": 1.5}, "eos_token_id must be a token id, or a list of them, not 1.5"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id, or a list of them, not -1"),
        ({"eos_token_id": [1, True]}, r"eos_token_id must be a token id, or a list of them, not \[1, True\]"),
        ({"eos_token_id": []}, r"eos_token_id must be a token id, or a list of them, not \[\]"),
        ({"eos_token_id": list(range(17))}, "17 stop ids are given; at most 16 can be"),
    ],
)
def test_settings_that_are_not_supported_are_named(change, message):
    model_type, settings = CASES["gemma3-window-small"]
    config = SIZES | settings | {"model_type": model_type}
    assert ModelConfig.from_hf(config).n_layers == 7
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(config | change)


def test_gemma_3_text_config_of_the_hub_takes_the_reference_defaults():
    """gemma-3-4b-it's config.json leaves out heads, vocabulary and context, and has the older RoPE keys."""
    hub = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    assert ModelConfig.from_hf(hub) == ModelConfig.from_name("gemma-3-4b")


def test_older_keys_of_gemma_1_to_3():
    gemma = {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000,
        "hidden_act": "gelu", "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 8192,
    }  # fmt: skip
    assert ModelConfig.from_hf(gemma | {"eos_token_id": [1, 107]}) == ModelConfig.from_name("gemma-2b")
    gemma2 = {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
        "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0, "rope_theta": 10000.0, "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    assert ModelConfig.from_hf(gemma2) == ModelConfig.from_name("gemma-2-2b")
    gemma3 = {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1000000, "rope_local_base_freq": 10000,
        "max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "eos_token_id": [1, 106],
        "attn_logit_softcapping": None, "final_logit_softcapping": None,
    }  # fmt: skip
    assert ModelConfig.from_hf(gemma3) == ModelConfig.from_name("gemma-3-1b")


def test_a_published_models_wrong_setting_is_followed_with_a_warning():
    right = ModelConfig.from_name("gemma-2-9b")
    assert right.differences_from_published() == ""
    first = replace(right, query_pre_attn_scalar=224)
    assert first.differences_from_published() == "query_pre_attn_scalar 224 (gemma-2-9b: 256)"


def test_global_heads_as_transformers_writes_them():
    """Its numbers of layers are padded with zeros."""
    import transformers

    layers = [f"{'full' if i % 6 == 5 else 'sliding'}_attention" for i in range(60)]
    sizes = dict(hidden_size=5376, intermediate_size=21504, num_hidden_layers=60, num_attention_heads=32)
    heads = dict(num_key_value_heads=16, num_global_key_value_heads=4, attention_k_eq_v=True, layer_types=layers)
    rest = dict(sliding_window=1024, hidden_size_per_layer_input=0, final_logit_softcapping=30.0)
    config = transformers.AutoConfig.for_model("gemma4_text", **sizes, **heads, **rest).to_dict()
    assert "05" in config["per_layer_config"]
    ours, named = ModelConfig.from_hf(config), ModelConfig.from_name("gemma-4-31B")
    for layer in range(60):
        assert ours.head_dim_of(layer) == named.head_dim_of(layer)
        assert ours.kv_heads_of(layer) == named.kv_heads_of(layer)
