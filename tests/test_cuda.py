"""The same on a GPU: against the reference's float32 logits and against our own CPU runs. float32 unless said."""

import pytest
import torch
from conftest import TINY_GEMMA

import generate as program
from generate import Stats, generate, load_model

pytestmark = pytest.mark.cuda
GREEDY = dict(temperature=0, stop_ids=())


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_GEMMA, device="cuda", precision="fp32")


@pytest.fixture(scope="module")
def prompts(tiny):
    texts = (
        "def fibonacci(n):\n",
        "import os\n\n\nclass Path:\n    def __init__(self, path):\n",
        "#",
        "x = [i for i in",
    )
    return [tiny[1].encode(text) for text in texts]


@pytest.fixture(scope="module")
def on_cpu():
    return load_model(TINY_GEMMA, device="cpu", precision="fp32")[0]


@torch.no_grad()
def test_logits_of_prefill_and_decode(reference):
    theirs, directory = reference
    ours, _ = load_model(directory, device="cuda", precision="fp32")
    tokens = torch.randint(2, 128, (3, 50), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    tokens = tokens.cuda()
    torch.testing.assert_close(ours(tokens, all_logits=True).cpu(), expected, atol=1e-4, rtol=0)
    ours.setup_caches(3, 64)
    lengths = torch.tensor([30, 4, 17], device="cuda")
    rows, position = torch.arange(3), lengths.clone()
    torch.testing.assert_close(
        ours(tokens[:, :30], None, lengths).cpu(), expected[rows, lengths.cpu() - 1], atol=1e-4, rtol=0
    )
    for _ in range(20):
        logits = ours(tokens[rows.cuda(), position][:, None], position)
        torch.testing.assert_close(logits.cpu(), expected[rows, position.cpu()], atol=1e-4, rtol=0)
        position += 1


@pytest.mark.parametrize("compile", [False, True])
def test_greedy_tokens_are_the_cpus(tiny, on_cpu, prompts, compile):
    expected = [generate(on_cpu, [prompt], 64, **GREEDY)[0] for prompt in prompts]
    assert generate(tiny[0], prompts, 64, compile=compile, **GREEDY) == expected
    assert generate(tiny[0], prompts, 64, batch_size=3, compile=compile, **GREEDY) == expected
    assert generate(tiny[0], prompts[:1], 64, compile=compile, compile_prefill=compile, **GREEDY) == expected[:1]


@pytest.mark.parametrize("compile", [False, True])
def test_samples_are_the_cpus(tiny, on_cpu, prompts, compile):
    """The noise is made on the host: a seed means the same on every device, where float32 leaves no near ties."""
    options = dict(seed=4, temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, num_samples=2)
    expected = generate(on_cpu, prompts, 30, **options)
    assert generate(tiny[0], prompts, 30, compile=compile, **options) == expected


@pytest.mark.parametrize("compile", [False, True])
def test_rows_that_stop_at_every_possible_step(tiny, prompts, compile):
    """The host learns of a stop one step late: the step too many must leave no trace."""
    endless = generate(tiny[0], prompts, 24, **GREEDY)
    for stop in {token for tokens in endless for token in tokens}:
        expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in endless]
        stats, seen = Stats(), []
        assert generate(tiny[0], prompts, 24, temperature=0, stop_ids=(stop,), compile=compile, stats=stats) == expected
        assert stats.steps <= min(23, max(map(len, expected)))  # one more than needed at most
        generate(tiny[0], prompts[:1], 24, temperature=0, stop_ids=(stop,), compile=compile, on_token=seen.append)
        assert seen == expected[0]


@torch.no_grad()
def test_bfloat16_loss_is_the_cpus(tiny):
    with open(torch.__file__, encoding="utf-8") as f:
        tokens = torch.tensor(tiny[1].encode(f.read())[: 8 * 512]).view(8, 512)

    def loss(device):
        model, _ = load_model(TINY_GEMMA, device=device, precision="bf16")
        logits = model(tokens.to(device), all_logits=True)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).cpu(), tokens[:, 1:].flatten()).item()

    assert loss("cuda") == pytest.approx(loss("cpu"), abs=0.002)


def test_memory_does_not_grow_over_generations(tiny, prompts):
    def used(rounds):
        for i in range(rounds):
            generate(tiny[0], prompts[: 1 + i % 4], 20 + 30 * (i % 5), **GREEDY)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = used(20)
    assert used(20) <= first


def test_too_little_memory_says_what_to_lower(tiny, prompts, monkeypatch):
    with pytest.raises(ValueError, match=r"not enough cuda memory: a batch of \d+ rows .* lower --batch_size"):
        generate(tiny[0], prompts[:1], 8000, num_samples=20000, batch_size=20000)
    monkeypatch.setattr(program, "free_memory", lambda device: 2**60)  # a wrong estimate
    with pytest.raises(ValueError, match=r"out of cuda memory with 20000 rows .* lower --batch_size"):
        generate(tiny[0], prompts[:1], 8000, num_samples=20000, batch_size=20000)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("arguments", [[], ["--compile", "--compile_prefill"], ["--profile", "TRACE"]])
def test_program(capsys, tmp_path, arguments):
    arguments = [str(tmp_path / "trace.json") if a == "TRACE" else a for a in arguments]
    assert program.main([*arguments, "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(program.DEFAULT_PROMPT)
    assert torch.cuda.get_device_name() in err
    assert "of the copy bandwidth" in err
