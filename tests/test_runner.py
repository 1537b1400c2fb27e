"""Runners: steps on their state, who has one and for how long, runs side by side, and compiled against eager."""

import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import GREEDY, ONE_LAYER, TEXTS, assert_not_finite_ends_a_run, small_model, tiny_config

from cache import CODECS, KVScales
from formats import FORMATS
from generate import generate
from model import Transformer
from runner import Runner, State, held_bytes, lease, next_token, release
from sampling import ALL_GREEDY, SETTINGS, DrawKind, Sampling
from scheduler import Piece, Request, Running, Scheduler

FP32 = CODECS["fp32"]


@pytest.fixture(scope="module")
def prompts(tiny):
    return [tiny[1].encode(text) for text in TEXTS]


def piece_of(runner: Runner, request: Request, row: int) -> Piece:
    """All of the prompt of a request that runs in that row."""
    held = runner.pages.take(request.prompt, len(request.prompt) + request.max_new_tokens)
    return Piece(Running(request, row, row, held), 0, len(request.prompt))


# --- steps


@pytest.mark.parametrize("case", ["gemma-gqa", "gemma2-window-small"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_conversation_behind_its_cache_is_the_conversation_at_once(case, penalty):
    """Turns in pages that stay the caller's. Steps that come too late to know of a stop leave nothing behind."""
    model, sampling = small_model(case=case), Sampling(temperature=0, repetition_penalty=penalty)
    runner, source = Runner(model, 1, 192, FP32), random.Random(3)
    for _ in range(5):
        stop_ids, history, cached = tuple(source.sample(range(128), 12)), [], 0
        held = runner.pages.take([], 192)
        for _ in range(4):
            history += [source.randrange(2, 128) for _ in range(source.randrange(1, 20))]
            with torch.inference_mode():
                runner.start(model, 1, DrawKind.of(128, sampling), stop_ids)
                run = Scheduler(runner, model, [Request((0, 0), history, 12, sampling)], 1).run(
                    cached=cached, held=held
                )
                ((_, answer),) = run
                runner.finish()
            assert answer == generate(model, [history], 12, sampling=sampling, stop_ids=stop_ids)[0]
            history, cached = history + answer, len(history) + len(answer) - 1
        runner.pages.release(held)
        runner.pages.check()


def test_eager_prefill_meets_few_shapes(monkeypatch):
    model, widths = small_model(), set()
    logits = Transformer.logits

    def watching(self, tokens, *rest, **options):
        widths.add(tokens.shape[1])
        return logits(self, tokens, *rest, **options)

    monkeypatch.setattr(Transformer, "logits", watching)
    longest = model.config.context_length - 1
    for length in (*range(1, longest, 5), longest):
        generate(model, [[2] * length], 1, prefix_cache=False, **GREEDY)
    assert len(widths) <= 4 * longest.bit_length() and longest <= max(widths) <= longest + 1


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=5, repetition_penalty=1.2)])
@pytest.mark.parametrize("at", [0, 5])
def test_values_that_are_not_finite_end_the_run(tiny, prompts, sampling, at):
    assert_not_finite_ends_a_run(tiny[0], prompts, at, sampling=sampling)


def test_a_step_penalizes_first_and_filters_in_the_order_of_the_table():
    """What a run draws with, against transformers' processors in that order; noise on a grid of N, exact to 1 / N."""
    from transformers.generation import logits_process as reference

    n, vocabulary, seen = 4000, 50, [3, 17, 17, 40]
    logits = 2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(5))
    sampling = Sampling(temperature=1.6, top_k=30, top_p=0.9, min_p=0.08, repetition_penalty=1.7)
    exact = logits.clone()
    for processor in (
        reference.RepetitionPenaltyLogitsProcessor(1.7),
        reference.TemperatureLogitsWarper(1.6),
        reference.TopKLogitsWarper(30),
        reference.TopPLogitsWarper(0.9),
        reference.MinPLogitsWarper(0.08),
    ):
        exact = processor(torch.tensor([seen]), exact)
    exact = exact.softmax(-1)[0].double()

    state = State.empty(n, 4, torch.device("cpu"))
    state.done[:], state.max_new_tokens[:], state.stop_ids[:] = False, 4, -1
    state.noise[:, 0] = (torch.arange(n) + 0.5) / n
    state.settings[:] = torch.tensor([getattr(sampling, name) for name in SETTINGS]).double()
    state.seen = torch.zeros(n, vocabulary, dtype=torch.bool)
    state.seen[:, seen] = True
    next_token(state, logits.expand(n, -1), DrawKind.of(vocabulary, sampling))
    frequency = torch.bincount(state.token, minlength=vocabulary).double() / n
    assert (frequency[exact == 0] == 0).all()
    torch.testing.assert_close(frequency, exact, atol=1.5 / n, rtol=0)
    assert state.seen[torch.arange(n), state.token].all()
    assert (state.count == 1).all()


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, 5, repetition_penalty=1.5), Sampling(0, repetition_penalty=1.5), Sampling(1.0, 0)]
)
def test_a_run_is_what_steps_of_one_token_are(sampling):
    """Four places at once, behind drafts that are right, or wrong from some place on, against one step after another."""
    rows, vocabulary, kind = 61, 12, DrawKind.of(12, sampling)  # so few that tokens and drafts come twice
    source = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, 5, vocabulary, generator=source)
    noise = torch.rand(rows, 9, generator=source, dtype=torch.float64)

    def new_state() -> State:
        state = State.empty(rows, 8, torch.device("cpu"), run=4, history=True)
        state.done[:60], state.max_new_tokens[:], state.stop_ids[:] = False, 20, -1
        state.noise, state.seen = noise.clone(), torch.zeros(rows, vocabulary, dtype=torch.bool)
        state.seen[:, ::2] = True
        state.settings[:] = torch.tensor([getattr(sampling, name) for name in SETTINGS]).double()
        return state

    def kept(state: State, row: int) -> list:
        known = state.history[row, : state.position[row] + 1].tolist()
        return [known, *(getattr(state, name)[row].tolist() for name in ("token", "position", "count", "done", "seen"))]

    single, steps = new_state(), []
    for i in range(5):
        next_token(single, logits[:, i], kind)
        steps.append([kept(single, row) for row in range(rows)])
    drafts = single.history[:, 2:5].clone()
    for row in range(rows):
        if row % 4 < 3:
            drafts[row, row % 4] = (drafts[row, row % 4] + 1) % vocabulary
    state = new_state()
    next_token(state, logits[:, 0], kind)
    next_token(state, logits[:, 1:].flatten(0, 1), kind, drafts)
    for row in range(rows):  # the last one is done
        assert kept(state, row) == steps[1 + row % 4][row]


def test_rows_that_are_not_used_stay_done(tiny, prompts):
    model, _ = tiny
    runner = Runner(model, 4, 64, FP32)
    requests = [Request((i, 0), prompt, 6, Sampling(temperature=0)) for i, prompt in enumerate(prompts[:2])]
    with torch.inference_mode():
        runner.whole_state.history = torch.zeros(4, 65, dtype=torch.long)
        runner.start(model, 3, ALL_GREEDY, ())
        runner.admit(model, [piece_of(runner, *each) for each in zip(requests, [2, 0])])
        assert runner.state.done.tolist() == [False, True, False]
        for _ in range(5):
            runner.step(model)
        entries = [runner.read() for _ in range(6)]
        runner.finish()
    expected = generate(model, prompts[:2], 6, **GREEDY)
    assert [[entry[row][3] for entry in entries] for row in (2, 0)] == expected
    for i, row in enumerate((2, 0)):
        assert runner.state.history[row, : len(prompts[i]) + 6].tolist() == prompts[i] + expected[i]
    assert [[entry[row][:2] for entry in entries] for row in (0, 1)] == [
        [[count == 6, count] for count in range(1, 7)],
        [[1, 0]] * 6,
    ]


# --- who has a runner


def test_a_runner_serves_the_next_run_that_it_fits():
    model = small_model()

    def leased(rows=2, length=64, codec=FP32, **options) -> Runner:
        with lease(model, rows, length, codec, **options) as runner:
            assert held_bytes(model) == 0  # nobody else has it meanwhile
            return runner

    first = leased()
    assert leased() is first
    assert held_bytes(model) == first.whole_cache.bytes > 0
    for other in (dict(rows=3), dict(length=128), dict(codec=CODECS["bf16"]), dict(compile=True)):
        assert leased(**other) is not first
        assert leased(**other).batch_size == other.get("rows", 2)
    first = leased()
    release(model)
    assert held_bytes(model) == 0
    assert leased() is not first
    with pytest.raises(RuntimeError, match="in between"), lease(model, 2, 64, FP32):
        raise RuntimeError("in between")
    assert held_bytes(model) == 0  # what failed is not used again


def test_other_operations_take_another_runner():
    model = small_model()
    with lease(model, 2, 64, FP32) as first:
        pass
    with lease(model, 2, 64, FP32) as second:
        assert second is first
    model.ops = replace(model.ops, name="others")
    with lease(model, 2, 64, FP32) as third:
        assert third is not first


def test_a_model_that_ran_is_freed_as_soon_as_nobody_uses_it():
    model = small_model()
    generate(model, [[2, 3]], 4, **GREEDY)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_run_within_a_run(tiny, prompts):
    """`on_token` of one starts another, of another batch size and cache dtype; both give their own texts."""
    model, _ = tiny
    outer = dict(temperature=0.9, seed=4, stop_ids=())
    inner = dict(temperature=0.8, seed=5, kv_cache_dtype="fp8_e5m2", stop_ids=())
    alone = [generate(model, prompts[:1], 12, **GREEDY), generate(model, prompts, 8, **inner)]
    expected = generate(model, prompts[:1], 12, **outer)
    within = []

    def on_token(token):
        if len(within) < 4:  # the first and third take the very shape of the run that they are in
            batch, count, options = (prompts, 8, inner) if len(within) % 2 else (prompts[:1], 12, GREEDY)
            within.append(generate(model, batch, count, **options))

    assert generate(model, prompts[:1], 12, on_token=on_token, **outer) == expected
    assert within == alone * 2


def test_two_threads_on_one_model(tiny, prompts):
    """Several rounds at once, of different prompts, batch sizes and settings, give the texts of single runs."""
    model, _ = tiny
    sampled = dict(temperature=0.9, top_p=0.9, repetition_penalty=1.1, stop_ids=())
    rounds = [  # in the first two, and where they start again, both threads want a runner of the same shape
        [
            (prompts[:2], dict(GREEDY)),
            (prompts[2:], sampled | dict(seed=1)),
            (prompts, dict(GREEDY, kv_cache_dtype="fp8_e5m2")),
        ],
        [
            (prompts[1:3], sampled | dict(seed=2)),
            (prompts[:2], dict(GREEDY)),
            (prompts[1:2], sampled | dict(seed=3, num_samples=3)),
        ],
    ]
    expected = [[generate(model, batch, 10, **options) for batch, options in each] for each in rounds]
    barrier = threading.Barrier(2, timeout=60)

    def run(index: int) -> list:
        results = []
        try:
            for batch, options in rounds[index] * 2:
                barrier.wait()
                results.append(generate(model, batch, 10, **options))
        except BaseException:
            barrier.abort()
            raise
        return results

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, range(2))) == [each * 2 for each in expected]


def test_a_runner_is_freed_as_soon_as_nobody_uses_it():
    """It holds device memory; one that waited in a cycle for the garbage collector made memory grow."""
    assert _is_freed(small_model())


def _is_freed(model: Transformer, **options) -> bool:
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            runner = Runner(model, 1, 64, FP32, **options)
            runner.start(model, 1, ALL_GREEDY, ())
            runner.admit(model, [piece_of(runner, Request((0, 0), [2, 3], 9, Sampling(temperature=0)), 0)])
            runner.step(model)
            runner.finish()
        alive = weakref.ref(runner)
        del runner
        return alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_a_capture_without_memory_says_what_to_lower(tiny, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Runner, "_make_step", fail)
    with pytest.raises(ValueError, match=r"out of cpu memory with 2 rows of 64 tokens; lower --batch_size"):
        generate(tiny[0], [[2], [2]], 20, compile=True)
    monkeypatch.undo()
    assert len(generate(tiny[0], [[2], [2]], 3, **GREEDY)) == 2


def test_too_many_stop_ids(tiny):
    with pytest.raises(ValueError, match="17 stop ids are given; at most 16 can be"):
        generate(tiny[0], [[2]], 3, stop_ids=tuple(range(17)))


# --- compiled, with one shape as often as possible: Inductor compiles a kernel once, for all processes


def test_compiled_is_eager():
    """Several calls through one compiled step, of a local and a global layer: other prompts, other settings; and
    another model of the same shape, since Inductor bakes weights into what it compiles for a CPU."""
    rng = random.Random(0)
    prompts = [[2, *rng.choices(range(10, 120), k=length)] for length in (12, 3, 0)]
    one_global = dict(case="gemma3-window-half", num_hidden_layers=2)
    one_global |= dict(layer_types=["sliding_attention", "full_attention"])
    model = small_model(**one_global)
    for batch in (prompts, prompts[::-1]):
        expected = generate(model, batch, 40, **GREEDY)
        assert generate(model, batch, 40, compile=True, **GREEDY) == expected
    stop = expected[1][4]
    expected = generate(model, prompts, 40, temperature=0, stop_ids=(stop,))
    assert generate(model, prompts, 40, temperature=0, stop_ids=(stop,), compile=True) == expected
    for each in (small_model(1, **one_global), model):
        expected = generate(each, prompts, 40, **GREEDY)
        assert generate(each, prompts, 40, compile=True, **GREEDY) == expected


def test_compiled_is_eager_in_every_format():
    """A layer in FP8 and one in int4 behind an embedding in int8, with an FP8 cache that has factors."""
    model, other = (
        Transformer.random(tiny_config("gemma-mqa", num_hidden_layers=2), dtype=torch.float32, format=name, head=True)
        for name in ("fp8", "int4")
    )
    model.layers[1], model.embedding = other.layers[1], other.embedding
    model.kv_scales = KVScales([(0.01, 0.02), (0.02, 0.01)])
    assert [layer.attention.wqkv.format for layer in model.layers] == [FORMATS["fp8"], FORMATS["int4"]]
    prompts, options = [[2, 31, 15], [2, 40, 100, 20, 21, 90], [2]], dict(**GREEDY, kv_cache_dtype="fp8_e4m3")
    expected = [generate(model, [prompt], 12, **options)[0] for prompt in prompts]
    assert generate(model, prompts, 12, compile=True, **options) == expected


def test_a_compiled_runner_is_freed_as_soon_as_nobody_uses_it():
    model = small_model(**ONE_LAYER)
    _is_freed(model, compile=True)  # the compiler itself keeps the first one that it saw for a while
    assert _is_freed(model, compile=True)


def test_compiled_prefill_serves_every_length():
    import torch._dynamo

    model = small_model(num_hidden_layers=1)
    rng = random.Random(0)
    batches = [[[2 + row, *rng.choices(range(10, 120), k=length)] for row in range(2)] for length in (30, 5, 1, 0, 47)]
    expected = [generate(model, batch, 8, **GREEDY) for batch in batches]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert generate(model, batches[0], 8, compile_prefill=True, **GREEDY) == expected[0]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch, tokens in zip(batches, expected):
        assert generate(model, batch, 8, compile_prefill=True, **GREEDY) == tokens
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled == 1


def test_compiled_prefill_with_a_softcap():
    model, prompts = small_model(case="gemma2-window-half", num_hidden_layers=2), [[2, 3, 4, 5, 6, 9], [2]]
    assert generate(model, prompts, 3, compile_prefill=True, **GREEDY) == generate(model, prompts, 3, **GREEDY)
