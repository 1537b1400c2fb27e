"""The engine: stops, batches, sampling and its seed, compiled against eager, mistakes from Python."""

import collections
import gc
import random
import weakref

import pytest
import torch
from conftest import GREEDY, SIZES, TEXTS, TINY_GEMMA, reference_model, save_checkpoint

import generate as program
from generate import Decoder, Sampling, Stats, generate, load_model, sample
from model import ModelConfig, Transformer


@pytest.fixture(scope="module")
def tiny():
    """tiny-gemma in float32, where a different batch or kernel moves no greedy token."""
    return load_model(TINY_GEMMA, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def prompts(tiny):
    return [tiny[1].encode(text) for text in TEXTS]


def small_model(seed: int = 0, dtype=torch.float32) -> Transformer:
    config = ModelConfig.from_hf({"model_type": "gemma", **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2})
    model = Transformer.random(config, dtype=dtype, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
        model.embedding.weight.div_(3)
    return model


# --- stops and batches


def test_each_row_stops_at_its_own_stop_token_whenever_that_comes():
    model, prompts = small_model(), [[2, 9, 81, 4], [2, *range(5, 12)], [2, 33], [2, 70, 71, 72]]
    endless = generate(model, prompts, 24, **GREEDY)
    assert {tokens.index(token) for tokens in endless for token in tokens} >= set(range(20))
    for stop in {token for tokens in endless for token in tokens}:
        expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in endless]
        assert generate(model, prompts, 24, temperature=0, stop_ids=(stop,)) == expected


def test_no_more_steps_than_the_last_row_needs(tiny, prompts):
    model, _ = tiny
    endless = generate(model, prompts, 24, **GREEDY)
    stop = endless[0][5]
    expected = endless[0].index(stop)  # the first new token is prefill's
    stats = Stats()
    generate(model, prompts[:1], 24, temperature=0, stop_ids=(stop,), stats=stats)
    assert stats.steps == expected
    assert (stats.new_tokens, stats.rows, stats.prompt_tokens) == (expected + 1, 1, len(prompts[0]))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9])
def test_a_row_does_not_depend_on_its_neighbours(tiny, prompts, batch_size):
    model, _ = tiny
    options = dict(temperature=0.9, top_k=50, seed=3)
    alone = [generate(model, prompts, 20, **options)]
    assert generate(model, prompts, 20, batch_size=batch_size, **options) == alone[0]
    greedy = [generate(model, [prompt], 20, **GREEDY)[0] for prompt in prompts]
    assert generate(model, prompts, 20, batch_size=batch_size, **GREEDY) == greedy


def test_samples_stand_side_by_side_in_the_order_of_the_prompts(tiny, prompts):
    model, _ = tiny
    few = generate(model, prompts[:2], 12, num_samples=3, seed=1, batch_size=4)
    assert len(few) == 6
    assert few[0] != few[1]
    # the same noise for sample 0 whatever num_samples is
    assert [few[0], few[3]] == generate(model, prompts[:2], 12, num_samples=1, seed=1)


def test_one_new_token_and_a_prompt_of_bos_alone(tiny):
    model, tokenizer = tiny
    (tokens,) = generate(model, [[tokenizer.bos_id]], 1, **GREEDY)
    assert tokens == [model(torch.tensor([[tokenizer.bos_id]])).argmax().item()]


def test_no_prompts_no_completions(tiny):
    assert generate(tiny[0], []) == []


def test_on_token_sees_every_token_once(tiny, prompts):
    model, _ = tiny
    seen = []
    (tokens,) = generate(model, prompts[:1], 17, on_token=seen.append, **GREEDY)
    assert seen == tokens
    stop, seen = tokens[6], []
    (tokens,) = generate(model, prompts[:1], 17, temperature=0, stop_ids=(stop,), on_token=seen.append)
    assert seen == tokens


@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16])
def test_cache_dtype(tiny, prompts, kv_dtype):
    model, _ = tiny
    generate(model, prompts, 3, kv_cache_dtype=kv_dtype, **GREEDY)
    assert model.layers[0].attention.cache.k.dtype == (kv_dtype or torch.float32)


def test_conversation_behind_its_cache_is_the_conversation_at_once(tiny):
    model, tokenizer = tiny
    decoder = Decoder(model, 1, 256)
    turns = [tokenizer.encode("def add(a, b):\n"), tokenizer.encode("class A:\n", bos=False), [300]]
    history, cached = [], 0
    with torch.inference_mode():
        for turn in turns:
            unread = history[cached:] + turn
            decoder.start(model, 1, Sampling(temperature=0), ())
            decoder.prefill(model, [unread], [], 10, cached)
            decoder.decode(model, 9)
            (answer,) = decoder.results(1)
            history += turn
            assert answer == generate(model, [history], 10, **GREEDY)[0]
            model_length = len(history) + len(answer) - 1
            history, cached = history + answer, model_length


# --- against the reference


@torch.no_grad()
def test_loss_on_text_is_the_references(tiny):
    """bfloat16 weights, 512-token windows of Python source; the reference's loss to within 0.002."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model(TINY_GEMMA, device="cpu", precision="bf16")
    with open(random.__file__, encoding="utf-8") as f:
        tokens = torch.tensor(tokenizer.encode(f.read())[: 8 * 512]).view(8, 512)
    theirs = AutoModelForCausalLM.from_pretrained(TINY_GEMMA, dtype=torch.bfloat16)

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()).item()

    expected = loss(theirs(tokens).logits)
    assert expected < 3.5  # it has learnt Python
    assert loss(model(tokens, all_logits=True)) == pytest.approx(expected, abs=0.002)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_the_references(tmp_path, penalty):
    theirs = reference_model("gemma-gqa")
    theirs.generation_config.eos_token_id = None
    ours, _ = load_model(save_checkpoint(theirs, tmp_path), device="cpu", precision="fp32")
    prompts = [[2, 17, 90, 33, 33, 4], [2, 8]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=penalty,
        )
        expected.append(output[0, len(prompt) :].tolist())
    assert generate(ours, prompts, 40, repetition_penalty=penalty, **GREEDY) == expected
    assert generate(ours, prompts, 40, **GREEDY) != expected


# --- sampling

FILTERS = {
    "temperature": dict(temperature=0.7),
    "hot": dict(temperature=2.5),
    "top_k": dict(temperature=1.0, top_k=7),
    "top_k of 1": dict(temperature=1.0, top_k=1),
    "top_k of all": dict(temperature=1.0, top_k=50),
    "top_p": dict(temperature=1.0, top_p=0.6),
    "tiny top_p": dict(temperature=1.0, top_p=1e-4),
    "min_p": dict(temperature=1.0, min_p=0.1),
    "min_p of 1": dict(temperature=1.0, min_p=1.0),
    "top_k, top_p": dict(temperature=0.9, top_k=20, top_p=0.8),
    "top_p, min_p": dict(temperature=1.3, top_p=0.9, min_p=0.05),
    "all": dict(temperature=1.5, top_k=25, top_p=0.95, min_p=0.04),
}


@pytest.mark.parametrize("name", list(FILTERS))
def test_sampling_follows_the_exact_distribution(name):
    """The reference's own filters give the exact probabilities. Noise on a grid of N makes ours exact to 1 / N."""
    from transformers.generation import logits_process as reference

    settings = FILTERS[name]
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(5))
    exact = reference.TemperatureLogitsWarper(settings["temperature"])(None, logits)
    if "top_k" in settings:
        exact = reference.TopKLogitsWarper(settings["top_k"])(None, exact)
    if "top_p" in settings:
        exact = reference.TopPLogitsWarper(settings["top_p"])(None, exact)
    if "min_p" in settings:
        exact = reference.MinPLogitsWarper(settings["min_p"])(None, exact)
    exact = exact.softmax(-1)[0].double()

    n = 20_000
    noise = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = sample(logits.expand(n, -1), noise, **settings)
    frequency = torch.bincount(tokens, minlength=50).double() / n
    assert (frequency[exact == 0] == 0).all()
    torch.testing.assert_close(frequency, exact, atol=1.5 / n, rtol=0)


def test_the_ends_of_the_noise_draw_tokens_that_the_filters_kept():
    logits = torch.tensor([[0.0, 3.0, -2.0, 1.0]]).expand(2, -1)
    noise = torch.tensor([0.0, 1 - 2**-32], dtype=torch.float64)
    assert sample(logits, noise, 1.0, min_p=0.1).tolist() == [1, 3]
    assert sample(logits, noise, 1.0, top_p=0.5).tolist() == [1, 1]
    assert sample(logits, noise, 1e-30).tolist() == [1, 1]  # next to nothing is greedy, not NaN


def test_generated_samples_follow_the_models_distribution():
    """3,000 first tokens against the model's own probabilities: chi-square, far out in whose tail a bug would land."""
    model, n = small_model(), 3000
    prompt = [2, 40, 7]
    probabilities = (model(torch.tensor([prompt])) / 1.4).double().softmax(-1)[0]
    probabilities, kept = probabilities.topk(12)
    probabilities /= probabilities.sum()
    tokens = generate(model, [prompt], 1, num_samples=n, temperature=1.4, top_k=12, seed=11, batch_size=1000)
    counts = collections.Counter(token for (token,) in tokens)
    assert set(counts) <= set(kept.tolist())
    chi_square = sum((counts[t] - n * p) ** 2 / (n * p) for t, p in zip(kept.tolist(), probabilities.tolist()))
    assert chi_square < 31.3  # 11 degrees of freedom, 0.1 %; the seed is fixed


def test_the_same_seed_gives_the_same_samples(tiny, prompts):
    model, _ = tiny
    one, two = (generate(model, prompts, 15, seed=7) for _ in range(2))
    assert one == two
    assert generate(model, prompts, 15, seed=8) != one
    assert generate(model, prompts, 15) != generate(model, prompts, 15)


@pytest.mark.parametrize("compile", [False, True])
def test_a_decoder_is_freed_as_soon_as_nobody_uses_it(compile):
    """It holds device memory; one that waited in a cycle for the garbage collector made memory grow."""
    model = small_model()
    for _ in range(2 if compile else 1):  # the compiler itself keeps the first one that it saw for a while
        gc.collect()
        gc.disable()
        try:
            with torch.inference_mode():
                decoder = Decoder(model, 2, 64, compile=compile)
                decoder.start(model, 2, Sampling(), ())
                decoder.prefill(model, [[2, 3]], [[0.5] * 9], 9)
                decoder.decode(model, 8)
            alive = weakref.ref(decoder)
            del decoder
            freed = alive() is None
        finally:
            gc.enable()
    assert freed


# --- compiled


def test_compiled_is_eager(tiny, prompts):
    """Several calls through one compiled step: other prompts, other settings; and another model of the same shape."""
    model, _ = tiny
    for batch in (prompts, prompts[::-1]):
        expected = generate(model, batch, 40, **GREEDY)
        assert generate(model, batch, 40, compile=True, **GREEDY) == expected
    options = dict(top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    for seed, temperature in ((1, 0.7), (2, 1.2)):
        expected = generate(model, prompts, 20, seed=seed, temperature=temperature, **options)
        assert generate(model, prompts, 20, seed=seed, temperature=temperature, compile=True, **options) == expected
    stop = expected[1][4]
    expected = generate(model, prompts, 20, temperature=0, stop_ids=(stop,))
    assert generate(model, prompts, 20, temperature=0, stop_ids=(stop,), compile=True) == expected


def test_two_models_of_one_shape_do_not_share_compiled_weights():
    """Inductor bakes weights into what it compiles for a CPU: the second model must not get the first one's."""
    prompt = [[2, 9, 81, 4]]
    for seed in (0, 1, 0):
        model = small_model(seed)
        assert generate(model, prompt, 30, compile=True, **GREEDY) == generate(model, prompt, 30, **GREEDY)


def test_compiled_prefill_serves_every_length():
    import torch._dynamo

    model = small_model()
    rng = random.Random(0)
    batches = [[[2, *rng.choices(range(10, 120), k=length)] for _ in range(2)] for length in (30, 5, 1, 0, 47)]
    expected = [generate(model, batch, 8, **GREEDY) for batch in batches]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert generate(model, batches[0], 8, compile_prefill=True, **GREEDY) == expected[0]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch, tokens in zip(batches, expected):
        assert generate(model, batch, 8, compile_prefill=True, **GREEDY) == tokens
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled == 1


# --- mistakes


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "the prompt is empty"),
        ([[2], []], {}, "prompt 2 is empty"),
        ([[2, 4096]], {}, "token id outside the vocabulary of 4096"),
        ([[2, -1]], {}, "token id outside"),
        ([[2] * 8000], {}, r"8000 tokens, and with 200 new ones exceeds the context of 8192.*at most 192"),
        ([[2] * 8192], {}, "shorten the prompt"),
        ([[2]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[2]], {"batch_size": 0}, "batch_size must be at least 1"),
        ([[2]], {"num_samples": -1}, "num_samples must be at least 1"),
        ([[2]], {"temperature": -0.1}, "temperature must be at least 0"),
        ([[2]], {"temperature": float("nan")}, "temperature"),
        ([[2]], {"top_k": -1}, "top_k"),
        ([[2]], {"top_p": 0.0}, "top_p"),
        ([[2]], {"top_p": 1.1}, "top_p"),
        ([[2]], {"min_p": 2.0}, "min_p"),
        ([[2]], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([[2], [2]], {"on_token": print}, "single row"),
    ],
)
def test_mistakes_are_value_errors(tiny, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny[0], prompts, **options)


def test_too_little_memory_is_said_before_it_is_taken(tiny, monkeypatch):
    monkeypatch.setattr(program, "free_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"rows of .* tokens needs .* GiB, 0\.0 GiB is free; lower --batch_size"):
        generate(tiny[0], [[2]] * 64, 4000)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_a_capture_without_memory_says_what_to_lower(tiny, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Decoder, "_make_step", fail)
    with pytest.raises(ValueError, match=r"out of cpu memory with 2 rows of 64 tokens; lower --batch_size"):
        generate(tiny[0], [[2], [2]], 20, compile=True)
    monkeypatch.undo()
    assert len(generate(tiny[0], [[2], [2]], 3, **GREEDY)) == 2


def test_unknown_precision_and_device(tiny):
    with pytest.raises(ValueError, match="precision 'fp16'"):
        load_model(TINY_GEMMA, precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            load_model(TINY_GEMMA, device="cuda")
