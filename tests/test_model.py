"""The model against transformers' on the same random weights, and its parts against their definitions."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES, SIZES, reference_model, save_checkpoint

import model as model_file
from generate import generate, load_model
from model import KVCache, ModelConfig, Transformer, attention

PROMPT_LENGTHS = (40, 1, 13, 27)


@pytest.fixture(scope="module")
def models(reference):
    theirs, directory = reference
    return theirs, load_model(directory, device="cpu", precision="fp32")[0]


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_prefill_logits_at_every_position(models):
    theirs, ours = models
    tokens = random_tokens(3, 45)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # logits that are all alike would agree by chance
    torch.testing.assert_close(ours(tokens, all_logits=True), expected, atol=1e-4, rtol=0)
    ours.setup_caches(3, 64)
    torch.testing.assert_close(ours(tokens, all_logits=True), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(tokens), expected[:, -1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decode_logits_at_every_position_of_rows_of_different_lengths(models):
    theirs, ours = models
    tokens = random_tokens(4, 80, seed=1)
    expected = theirs(tokens).logits
    ours.setup_caches(4, 96)
    lengths = torch.tensor(PROMPT_LENGTHS)
    padded = tokens[:, : max(PROMPT_LENGTHS)].clone()
    for row, length in enumerate(PROMPT_LENGTHS):
        padded[row, length:] = 99
    rows, position = torch.arange(4), lengths.clone()
    logits = ours(padded, None, lengths)
    torch.testing.assert_close(logits, expected[rows, position - 1], atol=1e-4, rtol=0)
    for _ in range(40):
        logits = ours(tokens[rows, position][:, None], position)
        torch.testing.assert_close(logits, expected[rows, position], atol=1e-4, rtol=0)
        position += 1


@torch.no_grad()
def test_prefill_behind_cached_tokens(models):
    theirs, ours = models
    tokens = random_tokens(2, 60, seed=2)
    expected = theirs(tokens).logits
    ours.setup_caches(2, 64)
    ours(tokens[:, :9], None, torch.tensor([9, 4]))
    position = torch.tensor([9, 4])
    for length in (3, 1, 17, 26):  # some longer than the windows, some shorter
        piece = torch.stack([tokens[row, p : p + length] for row, p in enumerate(position.tolist())])
        logits = ours(piece, position, all_logits=True)
        for row, p in enumerate(position.tolist()):
            torch.testing.assert_close(logits[row], expected[row, p : p + length], atol=1e-4, rtol=0)
        position = position + length


@torch.no_grad()
def test_greedy_tokens_alone_and_in_a_ragged_batch(models):
    theirs, ours = models
    theirs.generation_config.eos_token_id = None
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in PROMPT_LENGTHS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        expected.append(generated[0, len(prompt) :].tolist())
    assert len({token for tokens in expected for token in tokens}) > 8  # not one token over and over
    options = dict(temperature=0, stop_ids=())
    assert [generate(ours, [prompt], 64, **options)[0] for prompt in prompts] == expected
    assert generate(ours, prompts, 64, **options) == expected
    assert generate(ours, prompts, 64, batch_size=2, **options) == expected


@torch.no_grad()
@pytest.mark.parametrize("case", ["gemma-gqa", "gemma2-window-half", "gemma3-window-half"])
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
    ours.setup_caches(4, 48)
    prefill = ours(tokens[:, :20], all_logits=True)
    steps = [ours(tokens[:, i : i + 1], torch.full((4,), i), all_logits=True) for i in range(20, 45)]
    error, their_error = torch.cat([prefill, *steps], dim=1) - truth, theirs - truth
    assert error.abs().mean() <= 1.25 * their_error.abs().mean()
    assert error.abs().max() <= 2 * their_error.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_checkpoint(layout, tmp_path):
    """Both key layouts of gemma3 checkpoints, with vision tensors and an output head beside the text model."""
    import json

    from safetensors.torch import load_file, save_file

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
    torch.testing.assert_close(attention(q, k, v, 0.3, window=window, softcap=softcap), expected)


def test_softcapped_attention_in_query_blocks_is_the_same_as_at_once():
    q, k, v = (torch.randn(1, 2, 600, 8) for _ in range(3))
    scores = 3 * torch.tanh(0.5 * q @ k.mT / 3)
    expected = scores.masked_fill(torch.ones(600, 600).triu(1).bool(), float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(attention(q, k, v, 0.5, softcap=3.0), expected)


@pytest.mark.parametrize("slots", [4, 7, 32])
def test_cache_holds_the_newest_tokens(slots):
    """Whatever the pieces in which tokens arrive, slot p % S holds the newest token p that it can."""
    cache = KVCache(2, 1, slots, 1, torch.float32, "cpu")
    ends = torch.tensor([0, 0])
    for lengths in ([6, 2], [1, 1], [9, 3], [1, 1]):
        lengths = torch.tensor(lengths)
        position = ends if ends.any() else None
        values = (ends[:, None] + torch.arange(int(lengths.max()))).float()[:, None, :, None]  # a token is its position
        slot = (torch.arange(2), slice(None), ends % slots)
        shared = model_file.Shared(None, None, None, slot)
        cache.write(values, -values, shared, position, lengths)
        ends = ends + lengths
        for row, end in enumerate(ends.tolist()):
            for p in range(max(0, end - slots), end):
                assert cache.k[row, 0, p % slots, 0] == p
                assert cache.v[row, 0, p % slots, 0] == -p
        held = cache.held_positions(ends)
        assert (torch.where(held >= 0, cache.k[:, 0, :, 0], held) == held).all()


def test_local_layers_keep_only_their_window():
    config = ModelConfig.from_name("gemma-3-1b")
    with torch.device("meta"):
        model = Transformer(config)
        per_token = 2 * config.n_kv_heads * config.head_dim * 2
        global_layers = sum(not config.is_local(i) for i in range(26))
        assert global_layers == 4
        assert model.cache_bytes(3, 4096, torch.bfloat16) == 3 * per_token * (4 * 4096 + 22 * 512)


@pytest.mark.parametrize("name", list(model_file.NAMED_CONFIGS))
def test_published_sizes(name):
    """Parameter counts that Google's model cards and Hugging Face's model pages give, in millions."""
    published = {
        "gemma-2b": 2506, "gemma-7b": 8538, "codegemma-2b": 2506, "codegemma-7b": 8538,
        "gemma-2-2b": 2614, "gemma-2-9b": 9242, "gemma-2-27b": 27227,
        "gemma-3-270m": 268, "gemma-3-1b": 1000, "gemma-3-4b": 3880, "gemma-3-12b": 11766, "gemma-3-27b": 27009,
    }  # fmt: skip
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(ModelConfig.from_name(name)).parameters())
    assert parameters / 1e6 == pytest.approx(published[name], rel=2e-3)


def test_random_weights_are_the_same_for_the_same_seed():
    config = ModelConfig.from_hf({"model_type": "gemma", **tiny_settings()})
    one, two, three = (Transformer.random(config, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.embedding.weight, two.embedding.weight)
    assert not torch.equal(one.embedding.weight, three.embedding.weight)
    assert one.layers[0].attention.wqkv.weight.float().std() == pytest.approx(0.02, rel=0.05)


def tiny_settings() -> dict:
    import conftest

    return conftest.SIZES | dict(num_attention_heads=4, num_key_value_heads=2)


@torch.no_grad()
def test_packed_weights_follow_a_change_of_the_weights():
    """A weight packed for the CPU must not outlive the weight that it was made from."""
    config = ModelConfig.from_hf({"model_type": "gemma", **tiny_settings()})
    model, prompt = Transformer.random(config, seed=1), [[2, 5, 7]]
    generate(model, prompt, 8, temperature=0, stop_ids=())
    other = Transformer.random(config, seed=2)
    expected = generate(other, prompt, 8, temperature=0, stop_ids=())
    for parameter, new in zip(model.parameters(), other.parameters()):
        parameter.copy_(new)
    assert generate(model, prompt, 8, temperature=0, stop_ids=()) == expected


def test_gelu_is_the_tanh_approximation():
    x = torch.linspace(-4, 4, 64)
    config = ModelConfig.from_hf({"model_type": "gemma", **tiny_settings()})
    layer = Transformer.random(config, dtype=torch.float32).layers[0].feed_forward
    gate, up = layer.w13(x).chunk(2)
    expected = layer.w2(0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(F.gelu(gate), F.gelu(gate, approximate="tanh"))


def test_cases_cover_what_they_claim():
    heads = {(s["num_attention_heads"], s["num_key_value_heads"]) for _, s in CASES.values()}
    assert {(4, 4), (4, 2), (4, 1)} <= heads


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="a real one is installed")
def test_a_transformer_engine_that_cannot_be_imported_is_a_warning(tmp_path, monkeypatch):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text("raise OSError('libcudnn.so.9: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="TransformerEngine can't be imported, prefill runs on PyTorch: libcudnn"):
        assert model_file.import_te() is None
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)


def test_transformer_engine_waits_for_a_long_prefill(monkeypatch):
    """Its import takes seconds. With a device that says it is CUDA."""
    model = Transformer.random(ModelConfig.from_hf(SIZES | CASES["gemma-mha"][1] | {"model_type": "gemma"}))
    calls = []
    monkeypatch.setattr(Transformer, "use_te", lambda self: calls.append(setattr(self, "te_tried", True)))
    monkeypatch.setattr(model_file, "TE_TOKENS", 10)

    class OnCuda(torch.Tensor):
        is_cuda = True

    def forward(rows, length, *rest):
        model(torch.zeros(rows, length, dtype=torch.long).as_subclass(OnCuda), *rest)

    forward(3, 3)
    model.setup_caches(12, 16)
    forward(12, 1, torch.zeros(12, dtype=torch.long))
    model.attach_caches([None] * 3)
    model(torch.zeros(2, 8, dtype=torch.long))
    assert not calls
    forward(2, 5)
    forward(2, 5)
    assert len(calls) == 1
