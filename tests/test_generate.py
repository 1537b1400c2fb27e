"""`generate`: stops, batches, sampling and its seed, settings, mistakes from Python."""

import collections
import random

import pytest
import torch
from conftest import GREEDY, TEXTS, TINY_GEMMA, reference_model, save_checkpoint, small_model

import device as device_file
import generate as program
import runner as runner_file
import scheduler as scheduler_file
from cli import Stats
from generate import generate, load_model, stream_completions
from model import Transformer
from runner import Runner, held_bytes, release
from sampling import Sampling


@pytest.fixture(scope="module")
def prompts(tiny):
    return [tiny[1].encode(text) for text in TEXTS]


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


def test_a_row_does_not_depend_on_its_neighbours(tiny, prompts):
    model, _ = tiny
    options = dict(temperature=0.9, top_k=50, seed=3)
    sampled = generate(model, prompts, 12, **options)
    greedy = [generate(model, [prompt], 12, **GREEDY)[0] for prompt in prompts]
    for batch_size in (1, 2, 3, 4, 9):
        assert generate(model, prompts, 12, batch_size=batch_size, **options) == sampled
        assert generate(model, prompts, 12, batch_size=batch_size, **GREEDY) == greedy


def test_settings_of_each_prompt(tiny, prompts):
    """Rows of all kinds of draws, limits and lengths side by side, refilled: each as it is alone."""
    model, tokenizer = tiny
    more = [tokenizer.encode("x" * n) for n in (1, 40, 7, 150)]
    prompts = [*prompts, *more]
    limits = [1, 16, 5, 9, 13, 3, 11, 7]
    samplings = [
        Sampling(temperature=0),
        Sampling(top_k=20),
        Sampling(top_k=0),
        Sampling(top_k=0, top_p=0.8, temperature=1.2),
        Sampling(temperature=0, repetition_penalty=1.3),
        Sampling(top_k=300, min_p=0.05, repetition_penalty=1.1),
        Sampling(top_k=1),
        Sampling(),
    ]
    options = dict(seed=5, stop_ids=())
    alone = []
    for i, prompt in enumerate(prompts):  # behind others, so that its index and its noise are the same
        before = [[tokenizer.bos_id]] * i
        alone.append(generate(model, [*before, prompt], [*[1] * i, limits[i]], sampling=samplings[i], **options)[i])
    assert [len(tokens) for tokens in alone] == limits
    for batch_size in (None, 1, 2, 3, 5):
        found = {}
        results = generate(
            model,
            prompts,
            limits,
            sampling=samplings,
            batch_size=batch_size,
            on_completion=lambda i, j, tokens, found=found: found.update({(i, j): tokens}),
            **options,
        )
        assert results == alone
        assert [found[i, 0] for i in range(8)] == alone


@pytest.mark.parametrize(
    ("case", "chunk"),
    [("gemma-mqa", 64), ("gemma2-window-small", 150), *(("gemma3-window-half", n) for n in (150, 8192))]
    + [("gemma4-shared", 64), ("gemma4-unified", 150)],
)
def test_prompts_that_share_pages_have_the_texts_that_they_have_alone(case, chunk, monkeypatch):
    """Cut or not, with samples, beginnings of 63 to 130 tokens that some share, twice, and few pages to run in; what
    nobody has is full of NaN."""
    monkeypatch.setattr(scheduler_file, "CHUNK", chunk)
    monkeypatch.setattr(scheduler_file, "SMALL", 64)
    monkeypatch.setattr(scheduler_file, "SHRINK", 4)
    model, source = small_model(case=case), random.Random(chunk)
    common = [source.randrange(7, 120) for _ in range(130)]
    prompts = [
        common[: source.choice([0, 63, 64, 65, 128, 130])] + [source.randrange(7, 120) for _ in range(1 + 3 * i)]
        for i in range(8)
    ]
    limits, counts = [source.randrange(1, 12) for _ in prompts], [1, 3, 1, 1, 2, 1, 1, 1]
    samplings = [
        Sampling(temperature=0.9 * (i % 2), top_k=5 * (i % 3), repetition_penalty=1 + 0.3 * (i % 3 == 0))
        for i in range(8)
    ]
    alone = []
    for i, (prompt, limit, sampling, count) in enumerate(zip(prompts, limits, samplings, counts)):
        options = dict(sampling=sampling, num_samples=count, seed=[(7, i)], stop_ids=(5, 6), prefix_cache=False)
        alone += generate(model, [prompt], limit, **options)

    def poison(step, runner):
        pages, width = runner.pages, runner.whole_cache.tables.get(True, torch.zeros(1, 1)).shape[1]
        rings = [1 + ring * width + i for ring in runner.free_rings for i in range(width)]
        for layer in runner.whole_cache.layers:
            nobodys = [0, *(rings if layer.ring else pages.unused)]
            for stored in layer.stored:
                stored[nobodys] = float("nan")

    seeds = [(7, i) for i in range(8)]
    options = dict(sampling=samplings, num_samples=counts, seed=seeds, stop_ids=(5, 6), on_step=poison)
    for rows in (1, 3, 16):
        for prefix_cache in (True, True, False):
            assert generate(model, prompts, limits, batch_size=rows, prefix_cache=prefix_cache, **options) == alone


def test_what_other_weights_have_made_of_a_prompt_is_not_used():
    model, prompt = small_model(), [[2, *range(5, 105)]]
    before = generate(model, prompt, 9, **GREEDY)
    assert runner_file._idle[model].pages.match(prompt[0]) == 64
    with torch.no_grad():
        model.layers[0].attention.wqkv.weight.mul_(-1)
    after = generate(model, prompt, 9, **GREEDY)
    assert after != before
    release(model)
    assert generate(model, prompt, 9, **GREEDY) == after


def test_few_pages_make_requests_wait(tiny, monkeypatch):
    """Memory for one of them or a little more, as far as the run knows."""
    model, tokenizer = tiny
    prompts = [tokenizer.encode(text) * 8 for text in TEXTS]
    expected, rows, room = generate(model, prompts, 70, **GREEDY), [], program.rows_and_pages
    monkeypatch.setattr(program, "rows_and_pages", lambda model, pages, *rest: (3, 1 + max(pages) + len(rows)))
    for extra in range(2):
        release(model)
        rows.append(extra)
        assert generate(model, prompts, 70, **GREEDY) == expected
    monkeypatch.setattr(program, "rows_and_pages", room)


def test_two_thousand_requests_leave_no_page_behind():
    model, source = small_model(), random.Random(4)
    prompts = [[2, *(source.randrange(10, 120) for _ in range(source.randrange(1, 90)))] for _ in range(2000)]
    limits = [source.randrange(1, 4) for _ in prompts]
    results = generate(model, prompts, limits, temperature=0, batch_size=64)
    assert list(map(len, results)) == limits or any(results[i][-1] in model.config.stop_ids for i in range(2000))
    pages = runner_file._idle[model].pages
    pages.check()
    pages.forget()
    assert pages.free == pages.count - 1 and not pages.held


def test_a_callback_that_raises_leaves_the_model_usable(tiny, prompts):
    expected = generate(tiny[0], prompts, 5, **GREEDY)

    def fail(*_):
        raise RuntimeError("in a callback")

    for name in ("on_step", "on_completion"):
        with pytest.raises(RuntimeError, match="in a callback"):
            generate(tiny[0], prompts, 5, **GREEDY, **{name: fail})
        assert generate(tiny[0], prompts, 5, **GREEDY) == expected


def test_completions_come_as_they_finish(tiny, prompts):
    """Whoever stops asking for more leaves the model usable."""
    expected = generate(tiny[0], prompts, [9, 2, 5, 1], **GREEDY)
    found = list(stream_completions(tiny[0], prompts, [9, 2, 5, 1], **GREEDY))
    assert [i for i, *_ in found] == [3, 1, 2, 0]
    assert {(i, j): tokens for i, j, tokens in found} == {(i, 0): tokens for i, tokens in enumerate(expected)}
    some = stream_completions(tiny[0], prompts, [9, 2, 5, 1], **GREEDY)
    assert next(some) == (3, 0, expected[3])
    some.close()
    assert generate(tiny[0], prompts, [9, 2, 5, 1], **GREEDY) == expected


def test_those_that_may_take_longest_start_first(tiny, prompts, monkeypatch):
    limits, admit = [], Runner.admit

    def watching(self, model, pieces, retired):
        limits.extend(piece.running.request.max_new_tokens for piece in pieces)
        admit(self, model, pieces, retired)

    monkeypatch.setattr(Runner, "admit", watching)
    generate(tiny[0], prompts, [2, 9, 5, 7], batch_size=1, **GREEDY)
    assert limits == [9, 7, 5, 2]


def test_a_list_of_settings_has_one_for_each_prompt(tiny, prompts):
    with pytest.raises(ValueError, match="max_new_tokens has 3 values for 4 prompts"):
        generate(tiny[0], prompts, [1, 2, 3])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        generate(tiny[0], prompts, [1, 2, 3, 0])
    with pytest.raises(ValueError, match="sampling must be a Sampling, not None"):
        generate(tiny[0], prompts, 3, sampling=[None] * 4)
    with pytest.raises(ValueError, match="stop_check must be one of every, ping-pong, never, not 'sometimes'"):
        generate(tiny[0], prompts, 3, stop_check="sometimes")


def test_stop_when(tiny, prompts):
    model, _ = tiny
    endless = generate(model, prompts, 24, **GREEDY)
    results = generate(model, prompts, 24, stop_when=lambda tokens: len(tokens) == 5 + tokens[0] % 3, **GREEDY)
    assert results == [tokens[: 5 + tokens[0] % 3] for tokens in endless]


def test_samples_stand_side_by_side_in_the_order_of_the_prompts(tiny, prompts):
    model, _ = tiny
    few = generate(model, prompts[:2], 12, num_samples=3, seed=1, batch_size=4)
    assert len(few) == 6
    assert few[0] != few[1]
    # the same noise for sample 0 whatever num_samples is
    assert [few[0], few[3]] == generate(model, prompts[:2], 12, num_samples=1, seed=1)


def test_samples_of_a_prompt_share_its_prefill(tiny, prompts, monkeypatch):
    """Of two prompts, in rows that are neighbours and in others, in groups and behind another row's end."""
    model, _ = tiny
    options = dict(seed=3, top_k=40, repetition_penalty=1.1, stop_ids=())
    alone = [generate(model, prompts[:2], 9, batch_size=1, num_samples=5, **options)]
    computed, logits = [], Transformer.logits

    def watching(self, tokens, cache, position, *rest, **options):
        computed.append(len(tokens) if position is None else 0)
        return logits(self, tokens, cache, position, *rest, **options)

    monkeypatch.setattr(Transformer, "logits", watching)
    assert [generate(model, prompts[:2], 9, num_samples=5, **options)] == alone
    assert sum(computed) == 2
    for batch_size in (2, 3, 4):
        assert [generate(model, prompts[:2], 9, num_samples=5, batch_size=batch_size, **options)] == alone
    few = [generate(model, prompts, 9, batch_size=1, num_samples=count, **options) for count in (2, [1, 3, 2, 2])]
    assert [generate(model, prompts, 9, num_samples=count, **options) for count in (2, [1, 3, 2, 2])] == few


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


@pytest.mark.parametrize("kv_cache_dtype", [None, "auto", "bf16", torch.bfloat16, "fp8_e5m2"])
def test_cache_dtype(tiny, prompts, kv_cache_dtype):
    model, _ = tiny
    seen = set()

    def on_step(step, runner):
        seen.update(layer.k.dtype for layer in runner.cache.layers)

    generate(model, prompts, 3, kv_cache_dtype=kv_cache_dtype, on_step=on_step, **GREEDY)
    wanted = {None: torch.float32, "auto": torch.float32, "fp8_e5m2": torch.float8_e5m2}
    assert seen == {wanted.get(kv_cache_dtype, torch.bfloat16)}


def test_on_step_is_called_before_prefill_and_each_step(tiny, prompts):
    model, _ = tiny
    calls = []

    def on_step(step, runner):
        calls.append((step, len(runner.state.token), runner.state.count.max().item() if step else None))

    generate(model, prompts, 4, batch_size=2, on_step=on_step, **GREEDY)
    assert calls == [(0, 2, None), (1, 2, 1), (2, 2, 2), (3, 2, 3), (0, 2, None), (4, 2, 1), (5, 2, 2), (6, 2, 3)]
    assert held_bytes(model) > 0


# --- against the reference


@torch.no_grad()
def test_loss_on_text_is_the_references(tiny):
    """bfloat16 weights, 512-token windows of Python source; the reference's loss to within 0.002."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model(TINY_GEMMA, device="cpu", precision="bf16")
    with open(random.__file__, encoding="utf-8") as f:
        tokens = torch.tensor(tokenizer.encode(f.read())[: 4 * 512]).view(4, 512)
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


def test_settings_as_one_value_and_by_name(tiny, prompts):
    """`sampling` is what names change; what is left out has its defaults."""
    model, _ = tiny
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.1)
    by_name = dict(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.1)
    expected = generate(model, prompts, 12, seed=1, **by_name)
    assert generate(model, prompts, 12, seed=1, sampling=sampling) == expected
    changed = generate(model, prompts, 12, seed=1, sampling=sampling, temperature=0.7, top_k=0)
    assert changed == generate(model, prompts, 12, seed=1, **by_name | dict(temperature=0.7, top_k=0)) != expected
    assert generate(model, prompts, 12, sampling=sampling, temperature=0, repetition_penalty=1.0, stop_ids=()) == (
        generate(model, prompts, 12, **GREEDY)
    )
    assert generate(model, prompts, 12, seed=1) == generate(model, prompts, 12, seed=1, sampling=Sampling())


def test_prompts_may_be_tuples(tiny, prompts):
    assert generate(tiny[0], tuple(map(tuple, prompts)), 3, **GREEDY) == generate(tiny[0], prompts, 3, **GREEDY)


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_cache_dtypes_by_name_are_those_by_dtype(calibrated, prompts, name, dtype):
    model, _ = load_model(calibrated, device="cpu", precision="fp32")
    by_name, by_dtype = (generate(model, prompts, 12, kv_cache_dtype=each, **GREEDY) for each in (name, dtype))
    assert by_name == by_dtype


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
        ("text", {}, "prompts must be lists of token ids, which tokenizer.encode.text. makes"),
        (["text"], {}, "prompts must be lists of token ids"),
        ([["2"]], {}, "the prompt must be a list of token ids"),
        ([[2], [2.0]], {}, "prompt 2 must be a list of token ids"),
        ([[2]], {"max_new_tokens": "10"}, "max_new_tokens must be a whole number, not '10'"),
        ([[2]], {"max_new_tokens": 2.0}, "max_new_tokens must be a whole number, not 2.0"),
        ([[2]], {"batch_size": "4"}, "batch_size must be a whole number, not '4'"),
        ([[2]], {"num_samples": None}, "num_samples must be a whole number, not None"),
        ([[2]], {"temperature": "hot"}, "temperature must be a number, at least 0, not 'hot'"),
        ([[2]], {"top_k": 2.5}, "top_k must be a whole number, .* not 2.5"),
        ([[2]], {"seed": "x"}, "seed must be a whole number, not 'x'"),
        (None, {}, "prompts must be lists of token ids"),
        (5, {}, "prompts must be lists of token ids"),
        ((prompt for prompt in [[2]]), {}, "prompts must be lists of token ids"),
        ([5], {}, "prompts must be lists of token ids"),
        ([[True]], {}, "the prompt must be a list of token ids"),
        ([[2]], {"seed": 2.5}, "seed must be a whole number, not 2.5"),
        ([[2]], {"seed": True}, "seed must be a whole number, not True"),
        ([[2]], {"num_samples": 10**400}, "num_samples must be at most 2147483647"),
        ([[2]], {"stop_ids": 5}, "stop_ids must be a list of token ids, not 5"),
        ([[2]], {"stop_ids": "5"}, "stop_ids must be a list of token ids, not '5'"),
        ([[2]], {"stop_ids": [1, "5"]}, "stop_ids must be a list of token ids, not .1, '5'"),
        ([[2]], {"stop_ids": [4096]}, "stop_ids has a token id outside the vocabulary of 4096"),
        ([[2]], {"stop_ids": {-1}}, "stop_ids has a token id outside the vocabulary"),
        ([[2]], {"stop_ids": range(17)}, "stop_ids must be a list of token ids"),
        ([[2]], {"stop_ids": [*range(17)]}, "17 stop ids are given; at most 16"),
        ([[2]], {"on_token": 5}, "on_token must be a function, not 5"),
        ([[2]], {"on_step": "f"}, "on_step must be a function, not 'f'"),
        ([[2]], {"kv_cache_dtype": "int3"}, "kv_cache_dtype must be one of auto, bf16, .*, not 'int3'"),
        ([[2]], {"kv_cache_dtype": torch.int8}, "kv_cache_dtype must be one of auto, .*, not torch.int8"),
        ([[2]], {"sampling": {}}, "sampling must be a Sampling, not {}"),
        ([[2]], {"sampling": {"temperature": 1}}, "sampling must be a Sampling, not {'temperature': 1}"),
        ([[2]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[2]], {"batch_size": 0}, "batch_size must be at least 1"),
        ([[2]], {"num_samples": -1}, "num_samples must be at least 1"),
        ([[2]], {"temperature": -0.1}, "temperature must be a number, at least 0, not -0.1"),
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
    with pytest.raises(ValueError, match=message) as error:
        generate(tiny[0], prompts, **options)
    assert "\n" not in str(error.value)


def test_too_little_memory_is_said_before_it_is_taken(tiny, monkeypatch):
    release(tiny[0])
    monkeypatch.setattr(device_file, "free_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"rows of .* tokens needs .* GiB, 0\.0 GiB is free; lower --batch_size"):
        generate(tiny[0], [[2]] * 64, 4000)


def test_results_count_in_the_memory_check(tiny, monkeypatch):
    """A batch fits; a finished row takes 500 bytes of the host, and each of its tokens 40."""
    monkeypatch.setattr(device_file, "free_memory", lambda device: 2**30)
    with pytest.raises(
        ValueError, match=r"the text of 10000000 rows needs 5\.0 GiB, 1\.0 GiB is free; lower --num_samples"
    ):
        generate(tiny[0], [[2]], 1, num_samples=10**7, batch_size=1)


def test_unknown_paths():
    for path in (None, 5, ""):
        with pytest.raises(ValueError, match="path must be that of a checkpoint, not"):
            load_model(path, device="cpu")


def test_unknown_precision_device_and_operations():
    with pytest.raises(ValueError, match="precision '\\[\\]'"):
        load_model(TINY_GEMMA, precision=[])
    with pytest.raises(ValueError, match="precision 'fp16'"):
        load_model(TINY_GEMMA, precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            load_model(TINY_GEMMA, device="cuda")
    with pytest.raises(ValueError, match="device must be cuda or cpu, not 'gpu'"):
        load_model(TINY_GEMMA, device="gpu")
    with pytest.raises(ValueError, match="ops must be one of auto, kernels, te, torch, not 'cuda'"):
        load_model(TINY_GEMMA, device="cpu", ops="cuda")
