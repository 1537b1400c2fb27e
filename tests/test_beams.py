"""Beam search: tokens and scores against transformers', which rows share, batches, and the program's options."""

import json
import math
from collections import Counter

import pytest
import torch
from conftest import GREEDY, TEXTS, reference_model, save_checkpoint, small_model

import beams
import generate as program
import ops
from beams import beam_search, search
from cache import CODECS, KVCache, LayerCache
from cli import Stats
from config import PAGE
from generate import generate, load_model
from ops import common, decode_attention
from runner import held_bytes, release


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(2, 128, (length,), generator=generator).tolist() for length in lengths]


def frequent_tokens(model, prompts) -> list[int]:
    counts = Counter(token for tokens in generate(model, prompts, 24, **GREEDY) for token in tokens)
    return [token for token, _ in counts.most_common()]


@torch.no_grad()
def of_reference(theirs, prompt: list[int], max_new_tokens: int, stop_ids=(), **options) -> tuple[list[int], float]:
    theirs.generation_config.eos_token_id = list(stop_ids) or None
    ids = torch.tensor([prompt])
    output = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return output.sequences[0, len(prompt) :].tolist(), output.sequences_scores[0].item()


def assert_same(results, expected):
    """The same tokens, and scores to 1e-4, or to what float32 resolves where they are in the hundreds."""
    assert [tokens for tokens, _ in results] == [tokens for tokens, _ in expected]
    assert [score for _, score in results] == pytest.approx([score for _, score in expected], abs=1e-4, rel=1e-6)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """transformers' model and ours, of one small case."""
    theirs = reference_model("gemma-gqa")
    directory = save_checkpoint(theirs, tmp_path_factory.mktemp("beams"))
    return theirs, load_model(directory, device="cpu", precision="fp32")[0]


@pytest.fixture(scope="module")
def windowed():
    return small_model(case="gemma3-window-half")


# --- against the reference


SEARCHES = [
    dict(num_beams=2),
    dict(num_beams=3, early_stopping=True, length_penalty=0.0),
    dict(num_beams=4, early_stopping="never", length_penalty=2.0),
    dict(num_beams=4, length_penalty=-1.0, repetition_penalty=1.3),
]


@pytest.mark.parametrize("reference", ["gemma-mha", "gemma3-window-half", "gemma4-shared"], indirect=True)
def test_every_kind_of_model(reference):
    """Prompts that end before, at and behind a page's end and windows' ends, and some that cross them in decoding."""
    theirs, directory = reference
    ours = load_model(directory, device="cpu", precision="fp32")[0]
    prompts = random_prompts(1, 13, 56, 64, 71)
    ended = []
    for i, options in enumerate(SEARCHES):
        stop_ids = frequent_tokens(ours, prompts)[i : 4 * i + 1]  # one, four, seven, ten
        results = search(ours, prompts, 12, stop_ids=stop_ids, **options)
        assert_same(results, [of_reference(theirs, prompt, 12, stop_ids, **options) for prompt in prompts])
        ended += [tokens[-1] in stop_ids for tokens, _ in results]
    assert len(set(ended)) == 2  # some by a stop id, some by the limit


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_early_stopping_and_length_penalty(gemma, num_beams, early_stopping):
    theirs, ours = gemma
    prompts = random_prompts(3, 20)
    stop_ids = frequent_tokens(ours, prompts)[1:4]
    for length_penalty in (-1, 0, 0.5, 1.0, 2.0):
        options = dict(num_beams=num_beams, early_stopping=early_stopping, length_penalty=length_penalty)
        results = search(ours, prompts, 16, stop_ids=stop_ids, **options)
        assert_same(results, [of_reference(theirs, prompt, 16, stop_ids, **options) for prompt in prompts])


def test_each_setting_changes_results(gemma):
    """Into what they are in the reference: a setting that changes nothing would be compared for nothing."""
    theirs, ours = gemma
    prompts = random_prompts(3, 20, 9, 31, 2, 44)
    stop_ids = frequent_tokens(ours, prompts)[2:8]
    plain, found = dict(num_beams=2, length_penalty=2.0), []
    for other in (
        {},
        dict(length_penalty=0.5),
        dict(length_penalty=-1.0),
        dict(early_stopping=True),
        dict(early_stopping="never"),
        dict(repetition_penalty=1.3),
        dict(num_beams=3),
    ):
        found.append(search(ours, prompts, 16, stop_ids=stop_ids, **plain | other))
        assert_same(found[-1], [of_reference(theirs, prompt, 16, stop_ids, **plain | other) for prompt in prompts])
        assert [tokens for tokens, _ in found[-1]] != [tokens for tokens, _ in found[0]] or not other, other


def test_many_stop_ids(gemma):
    """Where most candidates end, more than 2 W of them are needed for W beams to go on."""
    theirs, ours = gemma
    prompts, options = random_prompts(3, 20, 9, 31, 2, 44), dict(num_beams=4, early_stopping="never")
    stop_ids = frequent_tokens(ours, prompts)[:16]
    results = search(ours, prompts, 40, stop_ids=stop_ids, **options)
    assert_same(results, [of_reference(theirs, prompt, 40, stop_ids, **options) for prompt in prompts])


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_limits_at_which_beams_that_go_on_are_what_there_is(gemma, limit):
    theirs, ours = gemma
    prompts = random_prompts(4, 30, 7)
    for stop_ids in ((), frequent_tokens(ours, prompts)[:1]):
        for length_penalty in (1.0, -1.0):
            options = dict(num_beams=3, length_penalty=length_penalty)
            results = search(ours, prompts, limit, stop_ids=stop_ids, **options)
            assert_same(results, [of_reference(theirs, prompt, limit, stop_ids, **options) for prompt in prompts])


@pytest.mark.parametrize("repetition_penalty", [1.3, 0.8])
def test_repetition_penalty(gemma, repetition_penalty):
    """On log-probabilities, of the prompt's tokens and of those that the beam has, whichever rows they came from."""
    theirs, ours = gemma
    prompts = [[2, 17, 90, 33, 33, 4], [2, 8], *random_prompts(66)]
    options = dict(num_beams=3, repetition_penalty=repetition_penalty)
    results = search(ours, prompts, 30, stop_ids=(), **options)
    assert_same(results, [of_reference(theirs, prompt, 30, **options) for prompt in prompts])


def test_one_beam_is_greedy(gemma, windowed):
    for model in (gemma[1], windowed):
        prompts = random_prompts(5, 60, 1, 90)
        stop_ids = frequent_tokens(model, prompts)[:3]
        expected = generate(model, prompts, 24, temperature=0, stop_ids=stop_ids)
        assert len({len(tokens) for tokens in expected}) > 1
        for early_stopping in (False, True, "never"):
            options = dict(num_beams=1, early_stopping=early_stopping, stop_ids=stop_ids)
            assert beam_search(model, prompts, 24, **options) == expected


# --- rows, pages, batches


@pytest.mark.parametrize("name", ["fp32", "fp8_e5m2"])
def test_slots_are_read_where_the_table_says(name):
    heads, slots, codec = 2, 2 * PAGE, CODECS[name]
    table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    cache = LayerCache(5, heads, 8, table, codec)
    for x in (cache.k, cache.v):
        x.copy_(torch.randn(x.shape).to(codec.dtype))
    slot_table = torch.randint(PAGE, 5 * PAGE, (2, slots), dtype=torch.int32)
    view, end = cache.with_table(table, slot_table), torch.tensor([slots, 70])
    k, v = view.held(end, torch.float32)
    for stored, held in ((cache.k, k), (cache.v, v)):
        for row in range(2):
            for s in range(int(end[row])):
                place = int(slot_table[row, s])
                assert torch.equal(held[row, :, s], stored[place // PAGE, :, place % PAGE].float())
            assert not held[row, :, int(end[row]) :].any()
    own = view.slots_for(torch.arange(2), torch.tensor([3, 66]), torch.tensor([4, 67]))
    assert own.tolist() == [PAGE + 3, 4 * PAGE + 2]  # through `table`


def test_batches_and_limits_of_each_prompt(windowed):
    prompts, limits = random_prompts(5, 80, 33, 1, 62), [9, 30, 3, 1, 20]
    options = dict(num_beams=3, stop_ids=frequent_tokens(windowed, prompts)[2:4], repetition_penalty=1.1)
    alone = [search(windowed, [prompt], limit, **options)[0] for prompt, limit in zip(prompts, limits)]
    for batch_size in (None, 1, 2, 4, 9):
        seen, stats = {}, Stats()

        def on_completion(i, j, tokens, seen=seen):
            seen[i, j] = tokens

        arguments = dict(batch_size=batch_size, on_completion=on_completion, stats=stats)
        assert_same(search(windowed, prompts, limits, **options, **arguments), alone)
        assert seen == {(i, 0): tokens for i, (tokens, _) in enumerate(alone)}
        assert (stats.rows, stats.prompt_tokens) == (5, sum(map(len, prompts)))
        assert stats.new_tokens == sum(len(tokens) for tokens, _ in alone)
    results = search(windowed, prompts, limits, skip={(0, 0), (3, 0)}, **options)
    assert [results[i] for i in (0, 3)] == [([], -math.inf)] * 2
    assert_same([results[i] for i in (1, 2, 4)], [alone[i] for i in (1, 2, 4)])
    assert beam_search(windowed, prompts, 5, skip={(i, 0) for i in range(5)}, num_beams=2) == [[]] * 5
    assert beam_search(windowed, [], num_beams=2) == []


def test_no_more_steps_than_the_last_prompt_needs(gemma):
    _, ours = gemma
    prompts, calls = random_prompts(5, 12, 3), []
    stats = Stats()
    options = dict(num_beams=2, stop_ids=(), batch_size=2)
    search(ours, prompts, [4, 2, 3], stats=stats, on_step=lambda i, runner: calls.append(i), **options)
    assert calls == [0, 1, 2, 3, 0, 4] and stats.steps == 4
    model, stop_ids = small_model(), tuple(range(2, 17))  # of 128: most searches are over soon
    early = Stats()
    results = beam_search(model, prompts, 200, num_beams=2, stop_ids=stop_ids, early_stopping=True, stats=early)
    assert max(map(len, results)) <= early.steps + 1 < 100


def test_prompts_in_pieces(windowed, monkeypatch):
    for model in (small_model(), windowed):
        prompts, options = random_prompts(200, 130, 7, 140), dict(num_beams=3, stop_ids=())
        expected = search(model, prompts, 8, **options)
        for chunk in (64, 100, 300):
            release(model)
            monkeypatch.setattr(beams, "CHUNK", chunk)
            assert_same(search(model, prompts, 8, **options), expected)
        monkeypatch.undo()


def test_prompts_behind_what_earlier_calls_left(windowed):
    """In pages, and in snapshots of rings where layers have windows; and a search leaves such pages, too."""
    start, *ends = random_prompts(130, 5, 70, 20, 9, 66, 40)
    prompts, options = [start + end for end in ends], dict(num_beams=2, stop_ids=(), batch_size=3)
    for model in (small_model(), windowed):
        release(model)
        cached = []

        def on_step(step, runner, cached=cached):
            cached += [each.cached for each in runner.pages.held] if step == 0 else []

        expected = search(model, prompts, 8, **options)
        greedy = generate(model, prompts, 8, **GREEDY)
        assert generate(model, prompts, 8, **GREEDY) == greedy
        assert_same(search(model, prompts, 8, on_step=on_step, **options), expected)
        assert {128} <= set(cached) <= {128, 192}
    model, cached = small_model(), []
    search(model, prompts, 8, **options)
    search(model, prompts, 8, on_step=lambda step, runner: on_step(step, runner, cached), **options)
    assert {128} <= set(cached) <= {128, 192}


def test_pages_are_given_back(windowed):
    seen = []
    for batch_size in (2, None, 1):
        search(
            windowed,
            random_prompts(70, 3, 64),
            9,
            num_beams=2,
            batch_size=batch_size,
            on_step=lambda i, runner: seen.append(runner),
        )
        seen[-1].pages.check()
        assert not seen[-1].pages.held
    assert held_bytes(windowed) > 0


@pytest.mark.parametrize("name", ["fp8_e5m2", "fp8_e4m3"])
@pytest.mark.filterwarnings("ignore:no scaling factors for K and V")
def test_fp8_cache(windowed, name):
    """The score is that of the tokens when they are read as a text, through a cache of this dtype: its keys and values
    are the same."""
    prompts = random_prompts(5, 63, 90)
    options = dict(num_beams=3, stop_ids=(), kv_cache_dtype=name)
    results = search(windowed, prompts, 24, **options)
    exact = search(windowed, prompts, 24, num_beams=3, stop_ids=())
    for prompt, (tokens, score), (_, other) in zip(prompts, results, exact):
        cache = KVCache.empty(windowed.config, 1, 128, CODECS[name], windowed.device)
        text = torch.tensor([prompt + tokens[:-1]])
        log_probs = windowed(text, cache, all_logits=True)[0, len(prompt) - 1 :].log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(tokens)[:, None]).mean().item()
        assert score == pytest.approx(expected, abs=1e-4) != other


def test_what_is_not_finite_ends_a_search(windowed):
    prompts, options = random_prompts(5, 9), dict(num_beams=2, stop_ids=())
    expected, weight = search(windowed, prompts, 10, **options), windowed.norm.weight
    good = weight[3].item()
    for at in (0, 1, 4, 9):

        def poison(step, runner, at=at):
            if step == at:
                weight[3] = float("nan")

        try:
            with pytest.raises(ValueError, match="not finite"):
                search(windowed, prompts, 10, on_step=poison, **options)
        finally:
            weight[3] = good
    assert_same(search(windowed, prompts, 10, **options), expected)


def test_too_little_memory_means_fewer_prompts_at_once(gemma, monkeypatch):
    _, ours = gemma
    prompts, calls = random_prompts(*[9] * 12), []
    options = dict(num_beams=2, stop_ids=())
    expected = search(ours, prompts, 5, **options)
    release(ours)
    rows = 2 * (beams.OF_LOGITS * 128 + 24 * PAGE) + 2 * 3 * PAGE * 2 * 2 * 32 * 4  # of a prompt
    room = 6 * rows + 12 * 9 * 4 * (4 * 96 + 6 * 64)
    monkeypatch.setattr(beams, "free_memory", lambda device: room)
    results = search(ours, prompts, 5, on_step=lambda i, runner: calls.append(i), **options)
    assert_same(results, expected)
    assert 2 <= calls.count(0) <= 6
    monkeypatch.setattr("device.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="not enough cpu memory: a batch of .* lower --num_beams, --batch_size"):
        search(small_model(), prompts, 5, **options)


# --- kernels


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # of lanes that are masked
@pytest.mark.skipif(not common.available(torch.device("cpu")), reason="needs Triton's interpreter")
def test_kernels(monkeypatch):
    """In Triton's interpreter: prompts packed, attention through slot tables, and once for a prompt's whole pages."""
    model = small_model(num_hidden_layers=1)
    prompts, options = random_prompts(5, 66), dict(num_beams=2, stop_ids=())
    expected = search(model, prompts, 4, **options)
    monkeypatch.setattr(beams, "SHARED", 1)
    monkeypatch.setattr(decode_attention, "pick_kv_splits", lambda *arguments: 2)  # each program takes long
    model.ops = ops.KERNELS
    assert_same(search(model, prompts, 4, **options), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "case", ["gemma-mha", "gemma-gqa", "gemma2-window-small", "gemma3-window-half", "gemma4-shared"]
)
def test_cuda(case, compile, monkeypatch):
    prompts = random_prompts(5, 66, 200, 130)
    stop_ids = frequent_tokens(small_model(case=case), prompts)[1:3]
    for shared in (1, 10**9):
        monkeypatch.setattr(beams, "SHARED", shared)
        on_cpu, on_gpu = small_model(case=case), small_model(case=case).to("cuda")
        on_gpu.ops = ops.choose("auto", on_gpu.device)
        for options in SEARCHES:
            options = dict(stop_ids=stop_ids, batch_size=3, **options)
            found, expected = (
                search(on_gpu, prompts, 40, compile=compile, **options),
                search(on_cpu, prompts, 40, **options),
            )
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
            assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-3)


# --- mistakes


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("text", {}, "prompts must be lists of token ids"),
        ([[]], {}, "the prompt is empty"),
        ([[2], [128]], {}, "prompt 2 has a token id outside the vocabulary of 128"),
        ([[2] * 200], {}, "200 tokens, and with 200 new ones exceeds the context of 256"),
        ([[2]], {"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ([[2]], {"num_beams": 2.0}, "num_beams must be a whole number, not 2.0"),
        ([[2]], {"num_beams": 65, "stop_ids": ()}, "num_beams can be at most 64 with a vocabulary of 128"),
        ([[2]], {"num_beams": 43, "stop_ids": (3, 4)}, "num_beams can be at most 42 with"),
        ([[2]], {"length_penalty": "1"}, "length_penalty must be a number, not '1'"),
        ([[2]], {"length_penalty": True}, "length_penalty must be a number, not True"),
        ([[2]], {"length_penalty": float("nan")}, "length_penalty must be a number, not nan"),
        ([[2]], {"length_penalty": -40.0}, "length_penalty -40.0 is too large for 200 new tokens"),
        ([[2]], {"early_stopping": "always"}, "early_stopping must be True, False or 'never', not 'always'"),
        ([[2]], {"early_stopping": 1}, "early_stopping must be True, False or 'never', not 1"),
        ([[2]], {"repetition_penalty": 0}, "repetition_penalty must be a number above 0, not 0"),
        ([[2]], {"stop_ids": [128]}, "stop_ids has a token id outside the vocabulary of 128"),
        ([[2]], {"stop_ids": [*range(17)]}, "17 stop ids are given; at most 16"),
        ([[2]], {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ([[2]], {"max_new_tokens": [1, 2]}, "max_new_tokens has 2 values for 1 prompts"),
        ([[2]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ([[2]], {"kv_cache_dtype": "int8"}, "kv_cache_dtype must be one of"),
        ([[2]], {"on_step": "f"}, "on_step must be a function, not 'f'"),
        ([[2]], {"on_completion": 5}, "on_completion must be a function, not 5"),
    ],
)
def test_mistakes(gemma, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(gemma[1], prompts, **dict(num_beams=2) | options)


# --- the program


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr("cli.copy_bandwidth", lambda device: 1e10)

    def run(*arguments) -> tuple[int, str, str]:
        status = program.main([*map(str, arguments), "--device", "cpu", "--precision", "fp32"])
        return status, *capsys.readouterr()

    return run


def test_program_prints_the_best_texts(tiny, run, tmp_path):
    model, tokenizer = tiny
    prompts = [tokenizer.encode(text) for text in TEXTS]
    options = dict(num_beams=3, length_penalty=0.5, early_stopping=True, repetition_penalty=1.2)
    expected = beam_search(model, prompts, [12, 12, 5, 12], **options)
    arguments = ("--num_beams", 3, "--length_penalty", 0.5, "--early_stopping", "--repetition_penalty", 1.2)
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "id": i} | ({"max_new_tokens": 5} if i == 2 else {}) for i, text in enumerate(TEXTS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = (*arguments, "--max_new_tokens", 12, "--prompts_file", file, "--batch_size", 2)
    status, out, err = run(*arguments, "--json")
    assert status == 0, err
    completions = [json.loads(line) for line in out.splitlines()]
    assert [each["tokens"] for each in completions] == expected
    assert [each["id"] for each in completions] == [0, 1, 2, 3]
    assert "4 rows" in err and "seed" not in err
    status, out, err = run(*arguments)
    assert status == 0, err
    assert all(f"--- prompt {n}\n{text}" in out for n, text in enumerate(TEXTS, start=1))


def test_program_resumes_its_output(run, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    arguments = ("--num_beams", 2, "--max_new_tokens", 8, "--prompt", *TEXTS, "--batch_size", 1)
    assert run(*arguments, "--output", out)[0] == 0
    whole = out.read_text()
    out.unlink()

    class Stop(Exception):
        pass

    def add(self, prompt, *rest, original=program.Output.add):
        if prompt == 2:
            raise Stop
        original(self, prompt, *rest)

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(program.Output, "add", add)
        run(*arguments, "--output", out)
    made = []
    monkeypatch.setattr(
        program.Output, "add", lambda self, *rest, add=program.Output.add: (made.append(rest[0]), add(self, *rest))
    )
    status, _, err = run(*arguments, "--length_penalty", 2.0, "--output", out)
    assert status == 2 and "of a run with other prompts or settings" in err
    assert run(*arguments, "--output", out)[0] == 0
    assert out.read_text() == whole and made == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_beams 0", "argument --num_beams: must be a whole number, at least 1, not '0'"),
        ("--num_beams 2 --length_penalty x", "argument --length_penalty: invalid float value: 'x'"),
        ("--num_beams 2 --length_penalty nan", "length_penalty must be a number, not nan"),
        ("--num_beams 5000", "num_beams can be at most"),
        ("--length_penalty 1", "--length_penalty and --early_stopping need --num_beams"),
        ("--early_stopping", "--length_penalty and --early_stopping need --num_beams"),
        ("--num_beams 1 --early_stopping", "--length_penalty and --early_stopping need --num_beams"),
        ("--num_beams 2 --temperature 0", "--num_beams takes no --temperature"),
        ("--num_beams 2 --temperature 0.8", "--num_beams takes no --temperature"),
        ("--num_beams 2 --top_k 200", "--num_beams takes no --top_k"),
        ("--num_beams 2 --top_p 0.9", "--num_beams takes no --top_p"),
        ("--num_beams 2 --min_p 0", "--num_beams takes no --min_p"),
        ("--num_beams 2 --seed 0", "--num_beams takes no --seed"),
        ("--num_beams 2 --num_samples 2", "--num_beams takes no --num_samples"),
        ("--num_beams 2 --interactive", "--num_beams takes no --interactive"),
        ("--num_beams 2 --compile_prefill", "--num_beams takes no --compile_prefill"),
        ("--num_beams 2 --stop x", "--num_beams takes no --stop"),
    ],
)
def test_program_refuses_what_makes_no_sense(run, arguments, message):
    status, out, err = run(*arguments.split())
    assert (status, out) == (2, "")
    assert f"error: {message}" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "own", [{"temperature": 1}, {"repetition_penalty": 1.1}, {"num_samples": 2}, {"seed": 1}, {"stop": "x"}]
)
def test_program_refuses_settings_of_a_prompts_own(run, tmp_path, own):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b"} | own) + "\n")
    status, out, err = run("--num_beams", 2, "--prompts_file", file)
    assert (status, out) == (2, "")
    assert f"prompts.jsonl, line 2: --num_beams takes no '{next(iter(own))}' of a prompt's own" in err
