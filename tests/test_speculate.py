"""Drafts: that they never change the text, whoever makes them, that right ones are accepted, how many pay, and what is
refused."""

import random

import pytest
import torch
from conftest import TINY_GEMMA, fake_input, small_model

import generate as program
from cache import codec_of
from cli import Stats
from generate import generate
from runner import lease, release
from sampling import ALL_GREEDY, DrawKind, Sampling, accept_or_draw, distribution, draw, draw_from
from scheduler import Request, Scheduler
from speculate import DraftModel, Pace, PromptLookup, check_same_tokens

REPEATING = [2, 9, 8, 7, 6, 5, 9, 8, 7, 6]
SETTINGS = (  # of the prompts, in turn: each filter and the penalty, and greedy
    Sampling(temperature=0),
    Sampling(temperature=0.9, top_k=5),
    Sampling(temperature=0, repetition_penalty=1.4),
    Sampling(temperature=1.1, top_p=0.7),
    Sampling(temperature=0.8, top_k=0, repetition_penalty=1.2),
    Sampling(temperature=1.2, top_k=0, min_p=0.1),
)


def prompts_of(vocab_size: int, count: int = 6, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[2, *(source.randrange(vocab_size) for _ in range(source.randrange(1, 40)))] for _ in range(count - 1)] + [
        REPEATING
    ]


class Script(Pace):
    """Takes so many tokens a row, step by step, and the last number from then on."""

    def __init__(self, *script: int):
        super().__init__(tuple(sorted({1, *script})))
        self.script = list(script)

    def next(self) -> int:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]


def scripted(monkeypatch, *script: int):
    monkeypatch.setattr(program, "pace_of", lambda drafter, k: drafter and Script(*script))


@pytest.mark.parametrize(
    "case",
    ["gemma-mha", "gemma2-window-half", "gemma3-window-small", "gemma4-unified", "gemma4-shared"],
)
def test_drafts_never_change_the_text(case, monkeypatch):
    """Rows with settings of their own, refilled; windows are crossed by drafts that are right, wrong and nonsense."""
    model, other = small_model(case=case), small_model(seed=1)
    prompts = prompts_of(min(model.config.vocab_size, other.config.vocab_size))
    limits = [20, 9, 1, 16, 12, 26]
    options = dict(sampling=list(SETTINGS), seed=5, stop_ids=(11, 12), batch_size=4)
    expected = generate(model, prompts, limits, **options)
    scripted(monkeypatch, 4, 8, 1, 1, 2, 1, 8)
    for drafter in (PromptLookup(), DraftModel(model), DraftModel(other)):
        assert generate(model, prompts, limits, drafter=drafter, **options) == expected
    release(model)


def test_right_drafts_are_all_accepted_also_behind_steps_without(monkeypatch):
    model, counted = small_model(case="gemma3-window-half"), []
    prompts = prompts_of(model.config.vocab_size, 3)
    for script in ((8,), (2, 1, 1, 1, 4, 1, 8)):
        scripted(monkeypatch, *script)
        stats = Stats()
        generate(model, prompts, 40, drafter=DraftModel(model), temperature=0, stop_ids=(), stats=stats)
        assert stats.right == stats.drafts
        assert stats.right.total() > 60
        counted.append(stats.steps)
    assert counted[0] == 5  # the first token is prefill's; the last step may make 7


def test_a_conversations_next_turn_finds_what_the_draft_model_has_met():
    """Also what the turn before has made without drafts."""
    model = small_model(case="gemma2-window-half")
    codec, kind, prompt = codec_of(None, model.dtype), ALL_GREEDY, REPEATING
    with lease(model, 1, 192, codec, drafter=DraftModel(model), longest_run=8) as runner:
        held, cached = runner.pages.take([], 192), 0
        for script in ((1,), (2, 1), (8,)):
            runner.start(model, 1, kind, ())
            request = Request((0, 0), prompt, 30, Sampling(temperature=0))
            scheduler = Scheduler(runner, model, [request], 1, "every", Script(*script))
            ((_, tokens),) = scheduler.run(cached=cached, held=held)
            runner.finish()
            assert scheduler.right == scheduler.drafts
            cached, prompt = len(prompt + tokens) - 1, [*prompt, *tokens, 5, 9, 8]
        assert scheduler.right.total() > 20
        runner.pages.release(held)


def test_a_stop_or_a_limit_ends_a_run_anywhere():
    model = small_model()
    (text,) = generate(model, [REPEATING], 12, temperature=0, stop_ids=())
    for end in range(1, 12):
        drafts = dict(temperature=0, drafter=DraftModel(model), speculate_k=7)
        assert generate(model, [REPEATING], end, stop_ids=(), **drafts) == [text[:end]]
        stopped = text[: text.index(text[end]) + 1]
        assert generate(model, [REPEATING], 12, stop_ids=(text[end],), **drafts) == [stopped]
        streamed = []
        ends = dict(stop_ids=(), stop_when=lambda tokens, end=end: len(tokens) == end, on_token=streamed.append)
        assert generate(model, [REPEATING], 12, **ends, **drafts) == [text[:end]]
        assert streamed == text[:end]


def test_up_to_the_contexts_last_token():
    model = small_model(max_position_embeddings=64)
    prompt = [2, *range(20, 60)]
    expected = generate(model, [prompt], 23, temperature=0, stop_ids=())
    for drafter in (PromptLookup(), DraftModel(model)):
        assert generate(model, [prompt], 23, temperature=0, stop_ids=(), drafter=drafter, speculate_k=7) == expected


def test_prefixes_and_samples_with_drafts(monkeypatch):
    """Prompts that share pages with each other and with those of an earlier call, and samples of them."""
    model = small_model(case="gemma2-window-half")
    source = random.Random(1)
    common = [2, *(source.randrange(128) for _ in range(150))]
    prompts = [common + [i + 3, i + 4] for i in range(3)]
    options = dict(temperature=1.0, seed=2, stop_ids=(), num_samples=2, batch_size=4)
    expected = generate(model, prompts, 20, prefix_cache=False, **options)
    scripted(monkeypatch, 4, 1, 8, 2)
    for drafter in (PromptLookup(), DraftModel(model)):
        for _ in range(2):
            assert generate(model, prompts, 20, drafter=drafter, **options) == expected


def test_prompt_lookup_of_a_trained_model(tiny):
    """So many drafts are right where code is repeated: a loss would not be seen in the text."""
    model, tokenizer = tiny
    text = "def area(width, height):\n    return width * height\n\n\n"
    prompt, stats = tokenizer.encode(text * 3), Stats()
    generate(model, [prompt], 48, temperature=0, stop_ids=(), drafter=PromptLookup(), speculate_k=3, stats=stats)
    assert stats.steps <= 24
    assert stats.right[0] >= 0.6 * stats.drafts[0]


# --- how many


def paced(right: float, costs: dict[int, float], steps: int = 400) -> list[int]:
    """Tokens a row of steps that cost so much, where such a share of drafts is right."""
    pace, source, taken = Pace(), random.Random(0), []
    for _ in range(steps):
        run = pace.next()
        count = 0
        while count < run - 1 and source.random() < right:
            count += 1
        pace.learn(run, [(count, run - 1)], costs[run])
        taken.append(run)
    return taken


def test_as_many_drafts_as_pay():
    cheap, dear = {1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2}, {1: 1.0, 2: 1.6, 4: 2.8, 8: 5.0}
    assert paced(0.95, cheap)[-100:].count(8) > 90
    assert paced(0.5, {1: 1.0, 2: 1.05, 4: 1.4, 8: 2.4})[-100:].count(8) < 5
    for right, costs in ((0.0, cheap), (0.4, dear)):
        taken = paced(right, costs)
        assert taken[50:].count(1) > 0.9 * len(taken[50:])
        assert set(taken[50:]) > {1}  # probes


def test_drafts_are_tried_again_when_the_text_changes():
    pace = Pace()
    costs = {1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2}
    for step in range(600):
        run = pace.next()
        pace.learn(run, [(run - 1 if step > 200 else 0, run - 1)], costs[run])
    assert run == 8


def test_a_first_step_that_compiles_is_not_what_steps_cost():
    pace = Pace()
    for seconds in (30.0, 1.0, 1.0, 30.0):
        pace.learn(8, [(7, 7)], seconds)
    assert 1.0 <= pace.seconds[8] < 1.3


# --- the program


def run_program(capsys, *arguments: str) -> tuple[str, str]:
    assert program.main([*arguments, "--device", "cpu", "--precision", "fp32"]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_program(capsys):
    arguments = ["--prompt", "def f(x):", "import os", "--max_new_tokens", "24", "--seed", "1"]
    expected, figures = run_program(capsys, *arguments)
    assert "drafts" not in figures
    out, figures = run_program(capsys, *arguments, "--prompt_lookup", "--speculate_k", "3")
    assert out == expected
    assert "tokens a row and step" in figures
    out, figures = run_program(capsys, *arguments, "--draft_checkpoint_path", str(TINY_GEMMA), "--speculate_k", "7")
    assert out == expected
    assert "drafts: " in figures


def test_a_conversation_goes_on_behind_drafts(capsys, monkeypatch):
    texts = []
    for drafts in ([], ["--prompt_lookup"], ["--draft_checkpoint_path", str(TINY_GEMMA)]):
        fake_input(monkeypatch, ["def add(a, b):", "def add(a, b): again", "and again"])
        options = ["--interactive", "--max_new_tokens", "20", "--temperature", "0", *drafts]
        texts.append(run_program(capsys, *options)[0])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculate_k", "3"], "--speculate_k needs --draft_checkpoint_path or --prompt_lookup"),
        (["--prompt_lookup", "--speculate_k", "8"], "speculate_k"),
        (["--prompt_lookup", "--speculate_k", "many"], "speculate_k"),
        (["--prompt_lookup", "--draft_checkpoint_path", str(TINY_GEMMA)], "two ways to the same"),
        (["--prompt_lookup", "--num_beams", "2"], "--num_beams takes no --prompt_lookup"),
        (["--draft_checkpoint_path", "nowhere"], "nowhere"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    try:
        status = program.main([*arguments, "--device", "cpu"])
    except SystemExit as end:
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if "error" in line]) == 1


def test_speculate_k_from_python():
    for k in (0, 8, "3", True, None):
        with pytest.raises(ValueError, match="speculate_k must be auto or a number from 1 to 7"):
            generate(small_model(), [[2]], 1, drafter=PromptLookup(), speculate_k=k)


def test_a_draft_of_other_tokens_is_refused(tiny, from_json):
    _, tokenizer = tiny
    with pytest.raises(ValueError, match="draft can't draft: its token .* the model's is"):
        check_same_tokens(tokenizer, from_json, "draft")
    check_same_tokens(tokenizer, tokenizer, "draft")


@pytest.mark.cuda
@pytest.mark.parametrize(
    "case", ["gemma-gqa", "gemma2-window-small", "gemma3-window-half", "gemma4-unified", "gemma4-shared"]
)
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(case, compile, monkeypatch):
    device = torch.device("cuda")
    model, other = (small_model(seed, case).to(device) for seed in (0, 1))
    from ops import choose

    model.ops = other.ops = choose("auto", device)
    prompts = prompts_of(model.config.vocab_size)
    options = dict(sampling=list(SETTINGS), seed=5, stop_ids=(11, 12), batch_size=4, compile=compile)
    expected = generate(model, prompts, 40, **options)
    scripted(monkeypatch, 4, 8, 1, 1, 2, 1, 8)
    for drafter in (PromptLookup(), DraftModel(model), DraftModel(other)):
        stats = Stats()
        assert generate(model, prompts, 40, drafter=drafter, stats=stats, **options) == expected
        if drafter == DraftModel(model):
            assert stats.right == stats.drafts
    release(model)


@pytest.mark.cuda
def test_memory_does_not_grow_with_drafts():
    device = torch.device("cuda")
    from ops import choose

    model = small_model().to(device)
    model.ops = choose("auto", device)
    sizes = []
    for number in range(60):
        generate(model, [REPEATING], 24, temperature=0, stop_ids=(), drafter=PromptLookup(), compile=True)
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[-1] <= sizes[5]


# --- rejection sampling


def test_what_is_accepted_or_drawn_is_distributed_as_wanted():
    """Of 40,000 rows: the first token; the second one behind each first; drafts from a distribution far from that."""
    generator, rows, size = torch.Generator().manual_seed(0), 40_000, 5
    wanted = torch.rand(3, size, generator=generator, dtype=torch.float64).softmax(-1)
    wanted[1, 2] = 0.0  # dropped by a filter
    wanted /= wanted.sum(-1, keepdim=True)
    guessed = torch.rand(2, size, generator=generator, dtype=torch.float64).pow(3)
    guessed /= guessed.sum(-1, keepdim=True)
    noise = torch.rand(3, rows, 3, generator=generator, dtype=torch.float64)
    drafts = draw_from(guessed.expand(rows, -1, -1), noise[0, :, :2])
    expanded = wanted.expand(rows, -1, -1), guessed.expand(rows, -1, -1)
    token, kept = accept_or_draw(*expanded, drafts, noise[1:])
    assert torch.equal(kept >= 0, kept == token[:, :2])
    counts = token[:, 0].bincount(minlength=size) / rows
    torch.testing.assert_close(counts.double(), wanted[0], atol=0.01, rtol=0)
    accepted = kept[:, 0] >= 0
    assert accepted.double().mean() == pytest.approx(torch.minimum(wanted[0], guessed[0]).sum().item(), abs=0.01)
    counts = token[accepted, 1].bincount(minlength=size) / accepted.sum()
    torch.testing.assert_close(counts.double(), wanted[1], atol=0.02, rtol=0)
    both = kept[:, 1] >= 0
    counts = token[both, 2].bincount(minlength=size) / both.sum()
    torch.testing.assert_close(counts.double(), wanted[2], atol=0.02, rtol=0)


def test_probabilities_are_what_draw_draws_with():
    settings = [Sampling(temperature=0), *(each for each in SETTINGS if each.temperature)]
    generator = torch.Generator().manual_seed(1)
    logits, values = torch.randn(len(settings), 300, generator=generator) * 3, {}
    for name in vars(settings[0]):
        values[name] = torch.tensor([[float(getattr(each, name))] for each in settings], dtype=torch.float64)
    kind = DrawKind.of(300, *settings)
    probabilities = distribution(logits, values, kind)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = torch.stack([draw(logits, noise.expand(len(settings)), values, kind) for noise in grid])
    for row, expected in enumerate(probabilities):
        counts = drawn[:, row].bincount(minlength=300) / 4000
        torch.testing.assert_close(counts.double(), expected, atol=1e-3, rtol=0)


def test_rejection_sampling(capsys, monkeypatch):
    """Greedy rows have the text that they have without; drafts of the model itself are all accepted; a row's text is its
    own whatever the neighbours; the program says what it needs."""
    model, other = small_model(case="gemma2-window-half"), small_model(seed=1)
    prompts = prompts_of(128)
    options = dict(seed=5, stop_ids=(11,), speculate_k=3)
    for drafter in (DraftModel(model, reject=True), DraftModel(other, reject=True)):
        together = generate(model, prompts, 20, sampling=list(SETTINGS), drafter=drafter, batch_size=4, **options)
        for i in (0, 2):
            greedy = dict(sampling=SETTINGS[i], stop_ids=(11,))
            assert [together[i]] == generate(model, [prompts[i]], 20, **greedy)
        alone = [
            generate(model, [prompts[i]], 20, sampling=SETTINGS[i], drafter=drafter, **options | {"seed": [(5, i)]})
            for i in range(len(prompts))
        ]
        assert [[text] for text in together] == alone
    stats = Stats()
    drafts = dict(drafter=DraftModel(model, reject=True), stats=stats)
    generate(model, prompts, 20, sampling=list(SETTINGS), **drafts, **options)
    assert stats.right == stats.drafts
    assert stats.right.total() > 50
    for arguments in (["--prompt_lookup"], ["--draft_checkpoint_path", str(TINY_GEMMA)]):
        assert program.main([*arguments, "--rejection_sampling", "--device", "cpu"]) == 2
        assert "--rejection_sampling needs" in capsys.readouterr().err
    arguments = ["--draft_checkpoint_path", str(TINY_GEMMA), "--rejection_sampling", "--speculate_k", "3"]
    assert "drafts: " in run_program(capsys, *arguments, "--max_new_tokens", "12")[1]
