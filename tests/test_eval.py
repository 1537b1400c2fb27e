"""eval.py: loss and perplexity against transformers, KL against its definition, files, mistakes."""

import json
import math
import subprocess
import sys

import gemma4
import pytest
import torch
from conftest import ROOT, TINY_GEMMA, copy_tiny_gemma, reference_model, save_checkpoint
from safetensors.torch import load_file, save_file

import eval as program
from cache import KVCache
from eval import evaluate, score
from generate import load_model
from text import read_texts, windows

FUNCTION = """
def read_file(path):
    with open(path) as file:
        return file.read()
"""
CLASS = """
class Path:
    def __init__(self, *parts):
        self.parts = parts

    def exists(self):
        return os.path.exists(os.path.join(*self.parts))
"""
TEXTS = [FUNCTION + CLASS, "import os\n\n" + CLASS + FUNCTION]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two random models of one kind: ((transformers' model, ours), the same of another seed)."""
    models = []
    for seed in range(2):
        theirs = reference_model("gemma2-window-half", seed)
        directory = save_checkpoint(theirs, tmp_path_factory.mktemp(f"seed{seed}"))
        models.append((theirs, load_model(directory, device="cpu", precision="fp32")[0]))
    return models


def random_windows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 128, (length,), generator=generator).tolist() for length in lengths]


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = program.main([*map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": 3, "text": text}) + "\n" for text in TEXTS))
    return file


# --- figures


@torch.no_grad()
def test_loss_and_perplexity_are_those_of_transformers(tiny):
    import transformers

    model, tokenizer = tiny
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY_GEMMA, dtype=torch.float32).eval()
    pieces = windows(TEXTS, tokenizer, 64)
    assert len(pieces) > 2
    assert 2 <= len(pieces[-1]) < 64
    total = count = 0
    for piece in pieces:
        tokens = torch.tensor([piece])
        total += theirs(tokens, labels=tokens).loss.item() * (len(piece) - 1)
        count += len(piece) - 1
    result = evaluate(model, pieces, batch_size=2)
    assert set(result) == {"perplexity", "loss", "tokens"}
    assert result["tokens"] == count
    assert result["loss"] == pytest.approx(total / count, abs=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), abs=1e-4)
    assert 1 < result["perplexity"] < 20


def test_the_batch_size_does_not_matter(pair):
    (_, model), (_, reference) = pair
    pieces = random_windows(40, 40, 40, 40, 40, 7)
    expected = evaluate(model, pieces, batch_size=1, reference=reference)
    for batch_size in (2, 5, 64):
        assert evaluate(model, pieces, batch_size, reference=reference) == pytest.approx(expected, rel=1e-5)


def test_a_window_does_not_see_its_predecessor(pair):
    (_, model), _ = pair
    pieces = random_windows(40, 40, 7)
    together = evaluate(model, pieces, batch_size=1)
    alone = [evaluate(model, [piece]) for piece in pieces]
    assert together["tokens"] == sum(each["tokens"] for each in alone) == 84
    mean = sum(each["loss"] * each["tokens"] for each in alone) / 84
    assert together["loss"] == pytest.approx(mean, rel=1e-6)


@torch.no_grad()
def test_kl_and_agreement_by_definition(pair):
    (their_model, model), (their_reference, reference) = pair
    pieces = random_windows(40, 40, 40, 23)
    kl, agreed = [], []
    for piece in pieces:
        p, q = (
            each(torch.tensor([piece])).logits[0, :-1].double().softmax(-1) for each in (their_reference, their_model)
        )
        kl.append((p * (p / q).log()).sum(-1))
        agreed.append(p.argmax(-1) == q.argmax(-1))
    result = evaluate(model, pieces, batch_size=2, reference=reference)
    assert result["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert result["kl"] > 0.01
    assert result["top1_agreement"] == pytest.approx(torch.cat(agreed).double().mean().item())
    swapped = evaluate(reference, pieces, batch_size=2, reference=model)
    assert swapped["kl"] != pytest.approx(result["kl"], rel=1e-3)
    assert swapped["top1_agreement"] == result["top1_agreement"]


def test_a_model_agrees_with_itself(pair):
    (_, model), _ = pair
    result = evaluate(model, random_windows(40, 40, 9), batch_size=2, reference=model)
    assert result["kl"] == pytest.approx(0, abs=1e-7)
    assert result["top1_agreement"] == 1


def test_the_kv_cache_has_the_dtype_asked_for(pair, monkeypatch):
    (_, model), (_, reference) = pair
    caches, empty = [], KVCache.empty

    def record(*arguments):
        caches.append(empty(*arguments))
        return caches[-1]

    monkeypatch.setattr(KVCache, "empty", record)
    for dtype in (torch.bfloat16, "bf16"):
        evaluate(model, random_windows(40), kv_cache_dtype=dtype, reference=reference)
        of_model, of_reference = ({layer.k.dtype for layer in cache.layers} for cache in caches[-2:])
        assert (of_model, of_reference) == ({torch.bfloat16}, {torch.float32})


def test_an_fp8_cache_changes_the_predictions_a_little(tiny):
    """Of one and the same model, too, whose reference has a cache of its own."""
    model, tokenizer = tiny
    pieces = windows(TEXTS, tokenizer, 64)
    coarse, fine = (
        evaluate(model, pieces, kv_cache_dtype=dtype, reference=model)
        for dtype in (torch.float8_e5m2, torch.float8_e4m3fn)
    )
    assert 1e-6 < fine["kl"] < coarse["kl"] < 0.5


@torch.no_grad()
@pytest.mark.parametrize("kind", gemma4.KINDS)
def test_figures_of_gemma_4_are_those_of_transformers(kind, tmp_path):
    """Perplexity, and log-probabilities of continuations behind contexts that are cached."""
    theirs = gemma4.reference(kind)
    model, _ = load_model(gemma4.checkpoint(kind, tmp_path), device="cpu", precision="fp32")
    pieces = random_windows(40, 40, 23)
    log_probs = [theirs(torch.tensor([piece])).logits[0, :-1].double().log_softmax(-1) for piece in pieces]
    each = [rows[range(len(rows)), piece[1:]] for rows, piece in zip(log_probs, pieces)]
    result = evaluate(model, pieces, batch_size=2)
    assert result["loss"] == pytest.approx(-torch.cat(each).mean().item(), abs=1e-4)

    cuts = [(0, 30), (0, 39), (1, 3), (1, 20), (2, 10), (2, 22)]
    scores = score(model, [(pieces[i][:cut], pieces[i][cut:]) for i, cut in cuts], batch_size=4)
    for (i, cut), (log_prob, greedy) in zip(cuts, scores):
        assert log_prob == pytest.approx(each[i][cut - 1 :].sum().item(), abs=1e-3)
        assert greedy == (log_probs[i][cut - 1 :].argmax(-1).tolist() == pieces[i][cut:])


# --- texts and windows


def test_windows_are_cut_from_documents_between_bos_and_eos(tiny):
    _, tokenizer = tiny
    tokens = [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert tokens[0] == tokenizer.bos_id
    for window in (2, 3, 64, len(tokens) - 1, len(tokens), len(tokens) + 9):
        pieces = windows(TEXTS, tokenizer, window)
        assert [token for piece in pieces for token in piece] == tokens[: len(tokens) - (len(tokens) % window == 1)]
        assert {len(piece) for piece in pieces[:-1]} <= {window}
        assert 2 <= len(pieces[-1]) <= window


def test_plain_text_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\nb\n')
    assert read_texts(file) == ['{"text": "a"}\r\n\nb\n']


def test_json_lines_are_one_document_each(file):
    assert read_texts(file) == TEXTS
    with open(file, "a") as out:
        out.write(json.dumps({"text": ""}) + "\n\n")  # an empty document has a line of its own; the file's end none
    assert read_texts(file) == [*TEXTS, ""]


# --- the program


def test_readable_and_json_output(capsys, file):
    options = ("--text", file, "--window", 64, "--precision", "fp32")
    status, out, err = run(capsys, *options, "--against", TINY_GEMMA, "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert set(result) == {"perplexity", "loss", "tokens", "kl", "top1_agreement"}
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["kl"] == pytest.approx(0, abs=1e-7)
    assert result["top1_agreement"] == 1
    _, out, _ = run(capsys, *options)
    assert out.startswith(f"perplexity {result['perplexity']:.4f}, loss {result['loss']:.5f} nats a token, ")
    assert len(out.splitlines()) == 1


def test_fp8_is_asked_for_by_name(capsys, monkeypatch, file):
    calls = []

    def load(path, device, precision, fp8, ops, adapter, sums):
        calls.append((str(path), fp8))
        return load_model(path, device, precision, ops=ops)

    monkeypatch.setattr(program, "load_model", load)
    for options in ((), ("--fp8",), ("--against", TINY_GEMMA, "--against_fp8"), ("--fp8", "--against", TINY_GEMMA)):
        status, _, err = run(capsys, "--text", file, "--window", 64, *options)
        assert status == 0, err
    assert calls == [(str(TINY_GEMMA), fp8) for fp8 in (False, True, False, True, True, False)]


def test_from_a_shell(file):
    command = [sys.executable, "eval.py", "--text", file, "--window", "64", "--device", "cpu", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"perplexity", "loss", "tokens"}
    assert "window" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "1"], "--window: must be a whole number, at least 2, not '1'"),
        (["--window", "8193"], "a window of 8193 tokens exceeds the context of 8192"),
        (["--batch_size", "0"], "--batch_size: must be a whole number, at least 1, not '0'"),
        (["--text", "nowhere.txt"], "no text file at nowhere.txt"),
        (["--checkpoint_path", "no/such/directory"], "no/such/directory"),
        (["--against", "no/such/directory"], "no/such/directory"),
        (["--against_fp8"], "--against_fp8 needs --against"),
        (["--kv_cache_dtype", "fp7"], "invalid choice: 'fp7'"),
        (["--windw", "2"], "unrecognized arguments: --windw 2"),
        (["--limit", "0"], "--limit: must be a whole number, at least 1, not '0'"),
        (["--num_fewshot", "0"], "--num_fewshot needs --tasks"),
        (["--seed", "0"], "--seed needs --tasks"),
        (["--compile"], "--compile needs --tasks"),
    ],
)
def test_mistakes_get_one_line(capsys, file, arguments, message):
    status, out, err = run(capsys, "--text", file, *arguments)
    assert (status, out) == (2, "")
    (line,) = (line for line in err.splitlines() if not line.startswith("note: "))
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("against", [False, True])
def test_what_is_not_finite_is_no_figure(capsys, file, tmp_path, against):
    """Of the model, or of the one that it is compared with alone."""
    damaged = copy_tiny_gemma(tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][5, 7] = float("inf")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    path = ("--against" if against else "--checkpoint_path", damaged)
    for options in ((), ("--json",)):
        status, out, err = run(capsys, "--text", file, "--window", 64, *path, *options)
        assert (status, out) == (2, "")
        (line,) = (line for line in err.splitlines() if line.startswith("error: "))
        assert "model computes values that are not finite" in line


def test_a_text_or_tasks_are_required(capsys):
    for arguments, message in (
        ((), "one of the arguments --text --tasks is required"),
        (("--text", "a.txt", "--tasks", "a"), "argument --tasks: not allowed with argument --text"),
        (("--tasks", "a", "--against", "."), "--against needs --text"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {message}")


def test_without_the_harness(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    status, out, err = run(capsys, "--tasks", "a")
    assert (status, out) == (2, "")
    assert err.startswith("error: --tasks needs the lm-evaluation-harness (")
    assert err.endswith("): pip install lm_eval\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: not a JSON object with a string 'text'"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}\n', "line 3: not a JSON"),
        ("a.json", b'{"prompt": "a"}\n', "line 1: not a JSON"),
        ("a.jsonl", b'{"text": "a"}\n["text"]\n', "line 2: not a JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2: not a JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: not a JSON"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"one\n\xff\xfe\n", "not UTF-8 text"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(file)


def test_mistakes_from_python(tiny, pair):
    model, tokenizer = tiny
    small = pair[0][1]
    for call, message in (
        (lambda: windows(TEXTS, tokenizer, 1), "window must be at least 2 tokens, not 1"),
        (lambda: windows([], tokenizer, 8), "too short: 0 tokens"),
        (lambda: evaluate(model, []), "no windows"),
        (lambda: evaluate(model, [[2, 3], [4]]), "at least 2 tokens, not 1"),
        (lambda: evaluate(model, [[2, 3]], batch_size=0), "batch_size must be at least 1, not 0"),
        (lambda: evaluate(model, [[2, 4096]]), "outside the vocabulary of 4096"),
        (lambda: evaluate(model, [[2] * 257], reference=small), "257 tokens exceeds the context of 256"),
        (lambda: evaluate(model, [[2, 3]], reference=small), "vocabularies of 4096 and of 128 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_reference_with_another_vocabulary_is_one_line(capsys, file, tmp_path):
    directory = save_checkpoint(reference_model("gemma-mqa"), tmp_path / "small")
    options = ("--text", file, "--window", 64, "--precision", "fp32")
    status, out, err = run(capsys, *options, "--against", directory)
    assert (status, out) == (2, "")
    assert "error: vocabularies of 4096 and of 128 tokens can't be compared" in err


@pytest.mark.parametrize("kind", ["moe", "e4b"])
def test_gemma_4_in_every_format(capsys, tmp_path_factory, tmp_path, kind):
    directory, text = gemma4.calibrated(kind, tmp_path_factory), tmp_path / "text.txt"
    text.write_text((directory / "text.txt").read_text()[-2000:])
    capsys.readouterr()  # calibrate.py's
    arguments = ("--checkpoint_path", directory, "--text", text, "--window", 128, "--json")
    for options, most in (((), 1e-9), (("--fp8",), 1.0), (("--fp8", "--kv_cache_dtype", "fp8_e4m3"), 2.0)):
        status, out, err = run(capsys, *arguments, *options, "--against", directory)
        assert status == 0, err
        assert 0 <= json.loads(out)["kl"] <= most
