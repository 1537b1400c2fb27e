"""The model against transformers' on the same random weights, and its parts against their definitions."""

import importlib.util
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES, GREEDY, reference_model, save_checkpoint, tiny_config
from safetensors.torch import load_file, save_file

import ops
from cache import CODECS, KVCache
from checkpoint import sources
from formats import FORMATS
from generate import generate, load_model
from model import Transformer
from ops import te
from ops.attention import softmax_attention

PROMPT_LENGTHS = (40, 1, 13, 27)
GEMMA4_CASES = [case for case in CASES if case.startswith("gemma4")]


@pytest.fixture(scope="module")
def models(reference):
    theirs, directory = reference
    return theirs, load_model(directory, device="cpu", precision="fp32")[0]


def cache_of(model: Transformer, rows: int, length: int) -> KVCache:
    codec = next(codec for codec in CODECS.values() if codec.dtype == model.dtype)
    return KVCache.empty(model.config, rows, length, codec, model.device)


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_prefill_logits_at_every_position(models):
    theirs, ours = models
    tokens = random_tokens(3, 45)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # logits that are all alike would agree by chance
    torch.testing.assert_close(ours(tokens, all_logits=True), expected, atol=1e-4, rtol=0)
    cache = cache_of(ours, 3, 64)
    torch.testing.assert_close(ours(tokens, cache, all_logits=True), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(tokens, cache), expected[:, -1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decode_logits_at_every_position_of_rows_of_different_lengths(models):
    theirs, ours = models
    tokens = random_tokens(4, 80, seed=1)
    expected = theirs(tokens).logits
    cache = cache_of(ours, 4, 96)
    lengths = torch.tensor(PROMPT_LENGTHS)
    padded = tokens[:, : max(PROMPT_LENGTHS)].clone()
    for row, length in enumerate(PROMPT_LENGTHS):
        padded[row, length:] = 99
    rows, position = torch.arange(4), lengths.clone()
    logits = ours(padded, cache, None, lengths)
    torch.testing.assert_close(logits, expected[rows, position - 1], atol=1e-4, rtol=0)
    for _ in range(40):
        logits = ours(tokens[rows, position][:, None], cache, position)
        torch.testing.assert_close(logits, expected[rows, position], atol=1e-4, rtol=0)
        position += 1


@torch.no_grad()
def test_prefill_behind_cached_tokens(models):
    theirs, ours = models
    tokens = random_tokens(2, 60, seed=2)
    expected = theirs(tokens).logits
    cache = cache_of(ours, 2, 64)
    ours(tokens[:, :9], cache, None, torch.tensor([9, 4]))
    position = torch.tensor([9, 4])
    for length in (3, 1, 17, 26):  # some longer than the windows, some shorter
        piece = torch.stack([tokens[row, p : p + length] for row, p in enumerate(position.tolist())])
        logits = ours(piece, cache, position, all_logits=True)
        for row, p in enumerate(position.tolist()):
            torch.testing.assert_close(logits[row], expected[row, p : p + length], atol=1e-4, rtol=0)
        position = position + length


@torch.no_grad()
@pytest.mark.parametrize(
    "reference", ["gemma-mha", "gemma2-window-small", "gemma3-window-half", *GEMMA4_CASES], indirect=True
)
def test_greedy_tokens_alone_and_in_a_ragged_batch(models):
    theirs, ours = models
    theirs.generation_config.eos_token_id = None
    prompts = [random_tokens(1, length, seed=1 + length)[0].tolist() for length in PROMPT_LENGTHS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        expected.append(generated[0, len(prompt) :].tolist())
    assert len({token for tokens in expected for token in tokens}) > 8  # not one token over and over
    assert [generate(ours, [prompt], 40, **GREEDY)[0] for prompt in prompts] == expected
    assert generate(ours, prompts, 40, **GREEDY) == expected
    assert generate(ours, prompts, 40, batch_size=2, **GREEDY) == expected


@torch.no_grad()
@pytest.mark.parametrize("case", ["gemma-gqa", "gemma2-window-half", "gemma3-window-half", "gemma4-shared"])
def test_bfloat16_is_as_close_to_float32_as_the_reference_is(case, tmp_path):
    """bfloat16 keeps 8 bits, and a rounding early on goes through every layer after it: two correct programs that
    round at different places differ from each other by as much as each does from float32. So the yardstick is the
    reference's own distance from its float32 result: ours may be 1.25 times that in the mean, 2 times in the maximum.
    """
    exact = reference_model(case)
    directory = save_checkpoint(exact.to(torch.bfloat16), tmp_path)
    rounded = exact.bfloat16()
    tokens = random_tokens(4, 45)
    theirs = rounded(tokens).logits.float()
    truth = rounded.float()(tokens).logits  # the same rounded weights, computed in float32
    ours, _ = load_model(directory, device="cpu", precision="bf16")
    cache = cache_of(ours, 4, 48)
    prefill = ours(tokens[:, :20], cache, all_logits=True)
    steps = [ours(tokens[:, i : i + 1], cache, torch.full((4,), i), all_logits=True) for i in range(20, 45)]
    error, their_error = torch.cat([prefill, *steps], dim=1) - truth, theirs - truth
    assert error.abs().mean() <= 1.25 * their_error.abs().mean()
    assert error.abs().max() <= 2 * their_error.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_checkpoint(layout, tmp_path):
    """Both key layouts of gemma3 checkpoints, with vision tensors and an output head beside the text model."""
    theirs = reference_model("gemma3-window-half")
    save_checkpoint(theirs, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("model.", layout, 1): tensor for name, tensor in weights.items() if name != "lm_head.weight"
    }
    vision = {"language_model.model.": "vision_tower.", "model.language_model.": "model.vision_tower."}[layout]
    renamed[vision + "embeddings.weight"] = torch.zeros(3)
    renamed["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(renamed, tmp_path / "model.safetensors")
    text_config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text_config}))
    ours, _ = load_model(tmp_path, device="cpu", precision="fp32")
    tokens = random_tokens(2, 30)
    torch.testing.assert_close(ours(tokens, all_logits=True), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("tokens", "window"), [(7, 3), (12, 4), (13, 4), (9, 8), (5, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sliding_window_attention_matches_its_definition(tokens, window, softcap):
    q, k, v = (torch.randn(2, heads, tokens, 8) for heads in (4, 2, 2))
    scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    scores = scores.masked_fill((distance < 0) | (distance >= window), float("-inf"))
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(softmax_attention(q, k, v, 0.3, window=window, softcap=softcap), expected)


def test_softcapped_attention_in_query_blocks_is_the_same_as_at_once():
    q, k, v = (torch.randn(1, 2, 600, 8) for _ in range(3))
    scores = 3 * torch.tanh(0.5 * q @ k.mT / 3)
    expected = scores.masked_fill(torch.ones(600, 600).triu(1).bool(), float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(softmax_attention(q, k, v, 0.5, softcap=3.0), expected)


def test_random_weights_are_the_same_for_the_same_seed():
    config = tiny_config()
    one, two, three = (Transformer.random(config, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.embedding.weight, two.embedding.weight)
    assert not torch.equal(one.embedding.weight, three.embedding.weight)
    assert one.layers[0].attention.wqkv.weight.float().std() == pytest.approx(0.02, rel=0.05)


@torch.no_grad()
def test_packed_weights_follow_a_change_of_the_weights():
    """A weight packed for the CPU must not outlive the weight that it was made from: not in a run, nor in a forward."""
    model, prompt = Transformer.random(tiny_config(), seed=1), [[2, 5, 7]]
    generate(model, prompt, 8, **GREEDY)
    other = Transformer.random(tiny_config(), seed=2)
    expected = other(torch.tensor(prompt)), generate(other, prompt, 8, **GREEDY)
    for parameter, new in zip(model.parameters(), other.parameters()):
        parameter.copy_(new)
    assert torch.equal(model(torch.tensor(prompt)), expected[0])
    assert generate(model, prompt, 8, **GREEDY) == expected[1]


def test_geglu_is_by_the_tanh_approximation():
    x = torch.linspace(-4, 4, 64)[None]
    layer = Transformer.random(tiny_config(), dtype=torch.float32).layers[0].feed_forward
    gate, up = (x @ layer.w13.weight.T).chunk(2, dim=-1)
    hidden = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    torch.testing.assert_close(layer(ops.TORCH, x, torch.float32), hidden @ layer.w2.weight.T)
    assert not torch.equal(F.gelu(gate), F.gelu(gate, approximate="tanh"))


def test_cases_cover_what_they_claim():
    heads = {(s["num_attention_heads"], s["num_key_value_heads"]) for _, s in CASES.values()}
    assert {(4, 4), (4, 2), (4, 1)} <= heads


# --- gradients


@pytest.mark.parametrize(
    "case", ["gemma2-window-small", "gemma3-window-half", "gemma4-experts", "gemma4-unified", "gemma4-shared"]
)
def test_gradients_are_the_references(case, tmp_path):
    """Layers can be trained as they are: every parameter's gradient, q, k and v, and gate and up, being joined."""
    theirs = reference_model(case)
    ours, _ = load_model(save_checkpoint(theirs, tmp_path), device="cpu", precision="fp32")
    ours.requires_grad_(True)
    tokens = random_tokens(2, 30)

    def backward(logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()

    backward(theirs(tokens).logits)
    backward(ours(tokens, all_logits=True))
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for name, parts in sources(ours.config).items():
        gradient = ours.get_parameter(name).grad
        assert gradient.isfinite().all()
        if name.endswith(".scalar"):  # a buffer there
            continue
        wanted = torch.cat([expected[part] for part, _ in parts])
        assert (gradient - wanted).norm() <= 1e-3 * wanted.norm(), name
        compared += 1
    assert compared + len(ours.layers) * ours.config.layer_scalar == len(list(ours.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_random_weights_are_finite(dtype):
    """Behind a run, too, which packs bfloat16's weights for a CPU."""
    model = Transformer.random(tiny_config("gemma3-window-half"), dtype=dtype).requires_grad_(True)
    tokens = random_tokens(2, 30)
    generate(model, tokens.tolist(), 2, **GREEDY)
    F.cross_entropy(model(tokens, all_logits=True).flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.layers[0].attention.wqkv.weight.grad.abs().max() > 0


# --- weights in other formats, and what runs the layers


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_random_weights_in_a_format_run(format, head):
    model = Transformer.random(tiny_config(), dtype=torch.float32, format=format, head=head, seed=1)
    assert {layer.attention.wqkv.format.name for layer in model.layers} == {format}
    assert (model.embedding.format.name != "bf16") == head
    linear = model.layers[0].feed_forward.w2
    assert FORMATS[format].dequantize(linear, torch.float32).std() == pytest.approx(0.02, rel=0.1)
    logits = model(random_tokens(2, 9), all_logits=True)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_what_runs_the_layers_is_chosen_by_name():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert ops.choose("auto", cpu) is ops.choose("torch", cpu) is ops.choose("torch", cuda) is ops.TORCH
    if importlib.util.find_spec("triton") is not None:
        assert ops.choose("auto", cuda) is ops.choose("kernels", cuda) is ops.KERNELS
    with pytest.raises(ValueError, match="ops must be one of auto, kernels, te, torch, not 'triton'"):
        ops.choose("triton", cpu)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="a real one is installed")
def test_a_transformer_engine_that_cannot_be_imported_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs TransformerEngine: pip install -r requirements-cuda.txt"):
        te.import_te()
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text("raise OSError('libcudnn.so.9: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="TransformerEngine can't be imported: libcudnn"):
        te.import_te()
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
