"""Drafters: passes against transformers', kernels against definitions, files, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import GLOBAL, LOCAL, small_model
from safetensors.torch import load_file, save_file
from torch import nn

import assistant as assistant_module
import ops
from assistant import Assistant, assistant_config, is_assistant, load_assistant
from cache import CODECS, KVCache
from config import ModelConfig
from generate import generate
from model import Transformer
from ops import common, decode_attention
from ops.attention import _with_keys
from speculate import AssistantDrafter

SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=4, layer_types=[LOCAL, LOCAL, LOCAL, GLOBAL])
LENGTHS = (85, 3, 40)  # of the prompts in the cache: the ring of local layers has 64 slots, their window 6 or 20 keys
TARGETS = {  # a target, and what it says of keys and values, which drafters repeat
    "shared": ("gemma4-shared", dict(num_key_value_heads=1)),
    "own": ("gemma4-unified", dict(attention_k_eq_v=False, num_global_key_value_heads=None)),
    "k_eq_v": ("gemma4-unified", dict(attention_k_eq_v=True, num_global_key_value_heads=1)),
}
needs_interpreter = pytest.mark.skipif(not common.available(torch.device("cpu")), reason="needs Triton's interpreter")


def make_target(name: str) -> Transformer:
    case, settings = TARGETS[name]
    target = small_model(case=case, **settings)
    for index, layer in enumerate(target.layers):
        if layer.attention.k_norm is not None:
            nn.init.normal_(layer.attention.k_norm.weight, 0.4, 0.1, torch.Generator().manual_seed(index))
    return target


def make_reference(target: Transformer, name: str, ordered: bool):
    """transformers' drafter for a target, of random numbers; of the 12B's model type for the one with k_eq_v."""
    transformers = pytest.importorskip("transformers")
    kind, model_type = ("Gemma4Unified", "gemma4_unified_text") if name == "k_eq_v" else ("Gemma4", "gemma4_text")
    config, text = target.config, dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, global_head_dim=64)
    text |= dict(vocab_size=128, vocab_size_per_layer_input=0, hidden_size_per_layer_input=0)
    text |= dict(sliding_window=config.window, num_kv_shared_layers=4, model_type=model_type)
    config = getattr(transformers, f"{kind}AssistantConfig")(
        text_config=SIZES | text | TARGETS[name][1],
        backbone_hidden_size=config.hidden_size,
        use_ordered_embeddings=ordered,
        num_centroids=16,
        centroid_intermediate_top_k=3,
    )
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    reference = getattr(transformers, f"{kind}AssistantForCausalLM")(config).float().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
            if key.endswith("token_ordering"):
                tensor.copy_(torch.randperm(128))
            elif key.endswith("layer_scalar") or tensor.dim() == 1 and "norm" in key:
                tensor.normal_(0.8, 0.2)
            elif tensor.dim() > 1:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return reference


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(target, transformers' drafter, its directory) by the target's name and the kind of head, each made once."""
    made = {}

    def make(name: str, ordered: bool):
        if (name, ordered) not in made:
            target = make_target(name)
            reference, directory = make_reference(target, name, ordered), tmp_path_factory.mktemp(name)
            reference.save_pretrained(directory)
            made[name, ordered] = target, reference, directory
        return made[name, ordered]

    return make


def filled(target: Transformer, codec: str = "fp32"):
    """A cache of prompts of LENGTHS, and newest tokens and states: what `drafts` is given."""
    generator = torch.Generator().manual_seed(2)
    cache = KVCache.empty(target.config, len(LENGTHS), 120, CODECS[codec], target.device)
    tokens, lengths = torch.randint(3, 128, (len(LENGTHS), max(LENGTHS)), generator=generator), torch.tensor(LENGTHS)
    with torch.inference_mode():
        target(tokens, cache, lengths=lengths)
    token = torch.randint(3, 128, (len(LENGTHS),), generator=generator)
    state = torch.randn(len(LENGTHS), target.config.hidden_size, generator=generator).to(target.dtype)
    return cache, token, state, lengths


def reference_pass(reference, assistant, target, cache, row: int, token: int, state, position: int):
    """transformers' logits and next state of a row, given the keys that it is to see and no others."""
    seen, query = {}, position + assistant_module.QUERY_OFFSET
    for local, own in assistant.donors.items():
        layer = cache.rows([row]).layers[own]
        at = layer.held_positions(torch.tensor([position]))[0]
        within = (at >= 0) & (at > query - target.config.window) if local else at >= 0
        held = layer.held(torch.tensor([position]), torch.float32)
        held = _with_keys(held, target.layers[own].attention.layer, layer)
        seen[LOCAL if local else GLOBAL] = tuple(x[:, :, within] for x in held)
    embedded = target.embedding.data[token] * target.config.hidden_size**0.5
    inputs = torch.cat((embedded, state))[None, None]
    output = reference(inputs_embeds=inputs, position_ids=torch.tensor([[query]]), shared_kv_states=seen)
    return output.logits[0, 0], output.last_hidden_state[0, 0]


# The definition of attention takes no cache of values alone in layers without keys of their own


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's: infinity is meant
@pytest.mark.parametrize(
    "name, ordered, operations, offset",
    [
        ("shared", True, "TORCH", 0),
        ("own", False, "TORCH", -1),
        pytest.param("k_eq_v", False, "TORCH", 0),
        pytest.param("k_eq_v", False, "KERNELS", 0, marks=needs_interpreter),
    ],
)
def test_is_transformers_drafter(saved, monkeypatch, name, ordered, operations, offset):
    """Logits and states of a pass, and drafts in a row, local windows and rings being crossed."""
    monkeypatch.setattr(assistant_module, "QUERY_OFFSET", offset)
    target, reference, directory = saved(name, ordered)
    assistant = load_assistant(directory, target)
    cache, token, state, position = filled(target)
    count = 3 if operations == "TORCH" else 2
    monkeypatch.setattr(target, "ops", getattr(ops, operations))
    monkeypatch.setattr(decode_attention, "pick_kv_splits", lambda *arguments: 2)  # each program takes long
    with torch.inference_mode():
        kinds = assistant.positions(target, cache, position)
        h = assistant(target, cache, kinds, token, state)
        logits, tokens = assistant.scores(h, target.ops)
        next_state = target.ops.matmul(h, assistant.post_projection, h.dtype)
        drafts = assistant.drafts(target, cache, token, state, position, count)
        for row, n in enumerate(LENGTHS):
            own, own_state = token[row], state[row]
            for number in range(count):
                expected, own_state = reference_pass(reference, assistant, target, cache, row, own, own_state, n)
                own = expected.argmax()
                assert drafts[row, number] == own
                if number == 0:
                    wanted = expected if tokens is None else expected[tokens[row]]
                    torch.testing.assert_close(logits[row], wanted, rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(next_state[row], own_state, rtol=1e-4, atol=1e-4)
                    assert tokens is None or (expected > expected.min()).sum() <= tokens.shape[1] == 3 * 128 // 16
    assert drafts.dtype == torch.long and len(drafts.unique()) > 3


def test_rows_that_are_done_and_an_fp8_target(monkeypatch):
    """Whatever their state is, rows at position 0 get tokens, and others the same ones. An embedding in E4M3 gives what
    its rounded numbers give."""
    monkeypatch.setitem(assistant_module.SIZES, "tiny", (48, 80, 4, False))
    config = make_target("own").config
    target = Transformer.random(config, dtype=torch.float32, format="fp8", head=True)
    assistant = Assistant.random("tiny", target)
    cache, token, state, position = filled(target, "fp8_e4m3")
    with torch.inference_mode():
        drafts = assistant.drafts(target, cache, token, state, position, 2)
        state[1], position[1] = float("nan"), 0
        others = assistant.drafts(target, cache, token, state, position, 2)
        assert torch.equal(others[[0, 2]], drafts[[0, 2]]) and 0 <= others.min() and others.max() < config.vocab_size
        plain = Transformer.random(config, dtype=torch.float32)
        plain.embedding.weight.copy_(target.embedding.format.dequantize(target.embedding, torch.float32))
        assert torch.equal(assistant.drafts(plain, cache, token, state, position, 2)[[0, 2]], drafts[[0, 2]])


@pytest.mark.parametrize("name, millions", [("E2B", 78), ("E4B", 79), ("12B", 423), ("26B-A4B", 420), ("31B", 470)])
def test_published_sizes(name, millions):
    """Counts of parameters, with a model and a cache that have no memory, so that nothing can be read on the host."""
    name = f"gemma-4-{name}"
    with torch.device("meta"):
        target = Transformer(ModelConfig.from_name(name)).to("meta")
        assistant = Assistant(assistant_config(target.config, *assistant_module.SIZES[name]), target.config)
        count = sum(parameter.numel() for parameter in assistant.parameters())
        assert abs(count / 1e6 - millions) < 5
        left_out = (262144 - 4096) * 256 if assistant.centroids else 0
        assert assistant.weight_bytes == 4 * (count - left_out)
        if target.config.n_shared_layers:  # what the definition of attention takes
            cache = KVCache.empty(target.config, 2, 5000, CODECS["fp32"], torch.device("meta"))
            state, long = torch.empty(2, target.config.hidden_size), torch.empty(2, dtype=torch.long)
            assert assistant.drafts(target, cache, long, state, long, 3).shape == (2, 3)


def change_config(directory, **settings):
    file = directory / "config.json"
    content = json.loads(file.read_text())
    for key, value in settings.items():
        (content if key in content else content["text_config"])[key] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(backbone_hidden_size=72), "its backbone_hidden_size is 72, the model's is 64"),
        (dict(vocab_size=256), "its vocab_size is 256, the model's is 128"),
        (dict(head_dim=16), "its head_dim of sliding attention is 16, the model's is 32"),
        (dict(num_key_value_heads=2), "its number of K/V heads of sliding attention is 2, the model's is 1"),
        (dict(num_kv_shared_layers=2), "num_kv_shared_layers is 2; no layer of a drafter has keys of its own"),
        (dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=8), "hidden_size_per_layer_input is set"),
        (dict(num_centroids=24), "num_centroids is 24, which doesn't divide the vocabulary of 128"),
        (dict(model_type="gemma4"), "model_type is 'gemma4'; that of a drafter is gemma4_assistant or"),
        (dict(use_ordered_embeddings=False), "has no place for: masked_embedding"),
        (dict(num_centroids=32), r"centroids.weight has shape \[16, 48\], config.json asks for \[32, 48\]"),
    ],
)
def test_refuses_config(saved, tmp_path, settings, message):
    target, _, directory = saved("shared", True)
    directory = shutil.copytree(directory, tmp_path / "copy")
    change_config(directory, **settings)
    with pytest.raises(ValueError, match=message) as raised:
        load_assistant(directory, target)
    assert "\n" not in str(raised.value)


def test_files(saved, tmp_path):
    """What says that a directory is a drafter's; shards; tensors that are missing, left over or no ordering."""
    target, reference, source = saved("shared", True)
    assert is_assistant(source) and not is_assistant(tmp_path)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    whole, shards = (load_assistant(directory, target).state_dict() for directory in (source, tmp_path / "shards"))
    assert whole.keys() == shards.keys() and all(torch.equal(whole[key], shards[key]) for key in whole)
    tensors, directory = load_file(source / "model.safetensors"), shutil.copytree(source, tmp_path / "copy")

    def written(**changes):
        changed = {key: value for key, value in (tensors | changes).items() if value is not None}
        save_file(changed, directory / "model.safetensors", {"format": "pt"})
        return directory

    ordering = "masked_embedding.token_ordering"
    for changes, message in (
        ({"post_projection.weight": None}, "lacks post_projection.weight"),
        ({"model.more.weight": torch.ones(2)}, "has no place for: model.more.weight"),
        ({ordering: tensors[ordering].float()}, "token_ordering is stored as F32, a drafter has I64 there"),
        ({ordering: tensors[ordering].clamp(max=100)}, "token_ordering doesn't have each token once"),
    ):
        with pytest.raises(ValueError, match=message):
            load_assistant(written(**changes), target)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_assistant(tmp_path, target)
    with pytest.raises(ValueError, match="no drafter for 'gemma-7b' is known"):
        Assistant.random("gemma-7b", target)
    with pytest.raises(ValueError, match="that has no layers of sliding attention"):
        config = ModelConfig.of_assistant(json.loads((source / "config.json").read_text()))
        Assistant(config, replace(target.config, local_layers=(), n_shared_layers=0, head_dim=32))


@pytest.mark.parametrize(("name", "ordered"), [("shared", True), ("k_eq_v", False)])
def test_drafts_from_states_never_change_the_text(saved, name, ordered):
    """Also that of rows that are filled again, whose states come from prompts."""
    target, _, directory = saved(name, ordered)
    drafter = AssistantDrafter(load_assistant(directory, target))
    prompts = [[2, *range(3, 3 + count)] for count in (5, 30, 1, 12)]
    options = dict(seed=1, stop_ids=(), batch_size=2)
    for temperature in (0, 1.0):
        expected = generate(target, prompts, 26, temperature=temperature, **options)
        for k in (3, "auto"):
            got = generate(target, prompts, 26, temperature=temperature, drafter=drafter, speculate_k=k, **options)
            assert got == expected


def test_states_are_those_of_the_token_before(saved, monkeypatch):
    """At each step, however long the run was that the one before appended."""
    target, _, directory = saved("shared", True)
    drafter, seen = AssistantDrafter(load_assistant(directory, target)), []

    def drafts(self, model, cache, state, kind, count):
        seen.append((int(state.position[0]), state.hidden[0].clone()))
        return (
            text[state.position + torch.arange(1, count + 1)][None]
            if len(seen) % 2
            else state.token[:, None].repeat(1, count)
        )

    monkeypatch.setattr(AssistantDrafter, "drafts", drafts)
    prompt = [2, 5, 9, 4]
    (new,) = generate(target, [prompt], 30, temperature=0, stop_ids=())
    text = torch.tensor(prompt + new + [0] * 8)
    assert generate(target, [prompt], 30, temperature=0, stop_ids=(), drafter=drafter, speculate_k=3) == [new]
    states = torch.empty(len(text), target.config.hidden_size)
    with torch.inference_mode():
        target.logits(text[None], all_logits=True, states=states)
    assert 10 < len(seen) < 25
    for position, state in seen:
        torch.testing.assert_close(state, states[position - 1], atol=1e-4, rtol=1e-4)
