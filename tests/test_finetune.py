"""Fine-tuning: the loss and its gradients beside transformers', documents and their targets, resuming, what is left."""

import json
import random
import resource
import shutil
import subprocess
import sys
import warnings
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES, ROOT, SIZES, TINY_GEMMA, small_model, tiny_config

import finetune
from checkpoint import open_checkpoint, sources
from files import tensor_bytes, write_safetensors
from finetune import Objective, Trainer, Workers, add_adapters, unfrozen, whole_model
from generate import load_model
from ops.norm import rms_norm
from ops.rope import AttentionLayer
from ops.training import (
    IGNORED,
    RECIPES,
    Documents,
    TransformerEngine,
    by_torch,
    cross_entropy,
    flash_attention,
    flex_attention,
    masked_attention,
)
from tokenizer import open_tokenizer
from training_data import Data, Document, documents_of, pack, read_documents

CPU = torch.device("cpu")
ALONE = Workers(0, 1, CPU)


def documents(*lengths: int, vocab: int = 128, seed: int = 0) -> list[Document]:
    """Random ones, of whose tokens about two of three are targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
    learned = [(torch.rand(n, generator=generator) < 0.7).tolist() for n in lengths]
    return [Document(array("i", t), bytes(m)) for t, m in zip(tokens, learned)]


def objective_of(directory, recompute: bool = True) -> Objective:
    model = whole_model(open_checkpoint(directory), ALONE, torch.float32)
    return Objective(model, by_torch(CPU), torch.float32, recompute)


def gradients_of(objective: Objective) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in objective.model.named_parameters() if p.grad is not None}


def backward(objective: Objective, *batches) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of batches and its gradients."""
    objective.zero_grad()
    total = 0.0
    for batch in batches:
        loss = objective(batch)
        loss.backward()
        total += loss.item()
    return total, gradients_of(objective)


def assert_close(found: dict, expected: dict, rtol: float):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(found[name], gradient, rtol=0, atol=rtol * scale + 1e-12), name


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_loss_and_gradients_are_those_of_transformers(reference):
    """A row of three documents, longer than the windows, against transformers' model on each of them alone."""
    their_model, directory = reference
    # Recomputing changes nothing, so that it is on in all of these tests but that of itself
    objective, rows = objective_of(directory), documents(23, 9, 11)
    loss, found = backward(objective, Data(rows, 48).batch([rows], CPU))
    their_model.zero_grad()
    total = 0.0
    for document in rows:
        tokens = torch.tensor(document.tokens)
        logits = their_model(tokens[None]).logits[0, :-1].float()
        targets = torch.where(torch.tensor(list(document.learned), dtype=torch.bool), tokens, IGNORED)[1:]
        total = total + F.cross_entropy(logits, targets, reduction="sum")
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    theirs, config = dict(their_model.named_parameters()), objective.model.config
    expected = {}
    for name, parts in sources(config).items():
        if name.endswith(".scalar"):
            continue
        expected[name] = torch.cat([theirs[their_name].grad for their_name, _ in parts])
    their_model.zero_grad()
    assert_close(found, expected, 1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Gemma 2 with both caps, and tiny-gemma's tokenizer."""
    settings = dict(vocab_size=4096, num_hidden_layers=2)
    directory = save_random(tmp_path_factory.mktemp("small") / "gemma2", "gemma2-window-small", **settings)
    shutil.copy(TINY_GEMMA / "tokenizer.model", directory)
    return directory


def save_random(directory: Path, case: str, **settings) -> Path:
    """A random model of a case in float32, in our format and so without transformers."""
    directory.mkdir()
    model_type, own = CASES[case]
    (directory / "config.json").write_text(json.dumps(SIZES | own | {"model_type": model_type} | settings))
    model = small_model(case=case, **settings)
    entries = {
        name: ("F32", tuple(p.shape), lambda p=p: [tensor_bytes(p.detach())]) for name, p in model.named_parameters()
    }
    write_safetensors(directory / "gemma.safetensors", entries, {"weight_format": "fp32"})
    return directory


def test_recomputing_changes_no_gradient(small):
    rows = documents(20, 12)
    batch = Data(rows, 32).batch([rows], CPU)
    loss, kept = backward(objective_of(small, recompute=False), batch)
    again, recomputed = backward(objective_of(small, recompute=True), batch)
    assert loss == again
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_rows_in_one_forward_are_rows_one_by_one(small):
    rows = [[document] for document in documents(24, 20, 16, 9)]
    data, objective = Data(documents(24), 24), objective_of(small)
    loss, together = backward(objective, data.batch(rows, CPU))
    together = {name: gradient.clone() for name, gradient in together.items()}
    apart_loss, apart = backward(objective, *(data.batch([row], CPU) for row in rows))
    assert loss == pytest.approx(apart_loss, rel=1e-6)
    assert_close(apart, together, 1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_loss_is_that_of_whole_logits(softcap, monkeypatch):
    monkeypatch.setattr("ops.training.LOGITS", 7 * 50)  # at most 7 of 30 rows at a time
    h, weight = (torch.randn(n, 16, requires_grad=True) for n in (30, 50))
    targets = torch.randint(0, 50, (30,))
    targets[::4] = IGNORED
    loss = cross_entropy(h, weight, targets, softcap)
    (3 * loss).backward()
    found, h.grad, weight.grad = (h.grad, weight.grad), None, None
    logits = h @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(found, (h.grad, weight.grad)):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_bf16_rounds_the_masters_and_sums_up_in_float32(small):
    """Gradients are in float32, and near those of float32 throughout."""
    rows = documents(20, 12)
    batch = Data(rows, 32).batch([rows], CPU)
    _, expected = backward(objective_of(small), batch)
    model = whole_model(open_checkpoint(small), ALONE, torch.bfloat16)
    _, found = backward(Objective(model, by_torch(CPU), torch.bfloat16, True), batch)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        similar = F.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
        assert similar > 0.95, name
    assert any(not torch.equal(found[name], found[name].bfloat16().float()) for name in ("embedding.weight",))


@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_gets_what_the_definition_sees(window, monkeypatch):
    """torch's function, which needs a GPU, by what its documentation says: `window_size` are the keys to the left and
    right of a query's own that it sees, -1 all."""

    def varlen_attn(q, k, v, ends, key_ends, longest, longest_key, scale, window_size):
        assert torch.equal(ends, key_ends) and longest == longest_key >= ends.diff().max()
        y, (left, right) = torch.empty_like(q), window_size
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
            at = torch.arange(end - start)
            ahead = at[:, None] - at
            seen = (ahead >= -right) & ((ahead <= left) | (left < 0))
            parts = (x[start:end].transpose(0, 1) for x in (q, k, v))
            y[start:end] = F.scaled_dot_product_attention(*parts, seen, scale=scale).transpose(0, 1)
        return y

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    layer = AttentionLayer(4, 2, 16, 0.3, None, window)
    q, k, v = (torch.randn(1, 50, heads, 16) for heads in (4, 2, 2))
    documents = Documents.of([20, 12, 18], CPU)
    found = flash_attention(q, k, v, layer, documents)
    assert torch.allclose(found, masked_attention(q, k, v, layer, documents), atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 7])
def test_flex_attention_sees_what_the_definition_sees(softcap, window, monkeypatch):
    """FlexAttention as it is before it is compiled, which a CPU runs without gradients."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr("ops.training._flex", lambda: flex.flex_attention)
    layer = AttentionLayer(4, 2, 32, 0.2, softcap, window)
    q, k, v = (torch.randn(1, 40, heads, 32) for heads in (4, 2, 2))
    row = Documents.of([20, 12, 8], CPU)
    expected = masked_attention(q, k, v, layer, row)
    with warnings.catch_warnings(action="ignore"):  # that it is not compiled
        assert torch.allclose(flex_attention(q, k, v, layer, row), expected, atol=1e-5)
    alone = masked_attention(*(x[:, 20:32] for x in (q, k, v)), layer, Documents.of([12], CPU))
    assert torch.allclose(expected[:, 20:32], alone, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def test_only_adapters_are_trained_and_at_first_change_nothing(small):
    rows = documents(20, 12)
    batch = Data(rows, 32).batch([rows], CPU)
    before, whole = backward(objective_of(small), batch)
    model, _ = load_model(small, "cpu", "fp32")
    add_adapters(model, 4, seed=1)
    objective = Objective(model, by_torch(CPU), torch.float32, True)
    loss, found = backward(objective, batch)
    assert loss == before
    layers = model.config.n_layers
    assert len(found) == layers * (4 + 7)  # A of each weight; B of q, k, v, o, gate, up and down
    assert all(".lora." in name for name in found)
    # What B's gradient is of that of the weight that the adapter is beside: scale * G Aᵀ
    for module, part, place in (("attention.wqkv", slice(128, 256), 1), ("feed_forward.w2", slice(None), 0)):
        lora = model.get_submodule(f"layers.1.{module}.lora")
        expected = 2 * whole[f"layers.1.{module}.weight"][part] @ lora.factors()[place][0].T
        assert_close({"b": lora.b[place].grad}, {"b": expected}, 1e-4)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_adapters_beside_quantized_weights(format, small):
    """The gradient through a quantized weight is that through the numbers that it stands for."""
    from model import Transformer

    config = tiny_config("gemma2-window-small")
    rows = documents(20, 12)
    batch = Data(rows, 32).batch([rows], CPU)
    model = Transformer.random(config, dtype=torch.float32, format=format)
    plain = Transformer.random(config, dtype=torch.float32)
    for (_, module), (name, twin) in zip(model.named_modules(), plain.named_modules()):
        if hasattr(module, "format"):
            twin.weight = torch.nn.Parameter(module.format.dequantize(module, torch.float32), False)
    found = []
    for each in (model, plain):
        add_adapters(each, 4, seed=1)
        found.append(backward(Objective(each, by_torch(CPU), torch.float32, True), batch))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_close(found[0][1], found[1][1], 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def shown(document: Document, tokenizer) -> str:
    """Its text, with targets in brackets; turns, and tokens that have no text, by their numbers."""
    text, inside = "", False
    for index, (token, learned) in enumerate(zip(document.tokens, document.learned)):
        learned = bool(learned) and index > 0
        text += "[" * (learned and not inside) + "]" * (inside and not learned)
        turn = token in (tokenizer.start_of_turn, tokenizer.end_of_turn)
        text += "" if turn else tokenizer.decode([token])
        text += f"<{token}>" * (turn or tokenizer.is_control(token))
        inside = learned
    return text + "]" * inside


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "x = 1"},
    {"role": "user", "content": "And <end_of_turn>?"},
    {"role": "assistant", "content": "y"},
    {"role": "user", "content": "left out"},
]


def test_targets_of_each_form():
    """By hand: 2 is <bos>, 1 <eos>, 4 and 5 begin and end a turn."""
    tokenizer = open_tokenizer(TINY_GEMMA, tiny_config())
    cases = [
        ({"text": "import os"}, "<2>[import os<1>]"),
        ({"prompt": "a =", "completion": " 1"}, "<2>a =[ 1<1>]"),
        (
            {"messages": CHAT},
            "<2><4>user\nBe brief.\n\nHi<5>\n<4>model\n[x = 1<5>]\n<4>user\nAnd <end_of_turn>?<5>\n<4>model\n[y<5>]",
        ),
        (
            {"prompt": CHAT[:4], "completion": CHAT[4:5]},
            "<2><4>user\nBe brief.\n\nHi<5>\n<4>model\nx = 1<5>\n<4>user\nAnd <end_of_turn>?<5>\n<4>model\n[y<5>]",
        ),
    ]
    for entry, expected in cases:
        (document,) = documents_of(entry, tokenizer)
        assert shown(document, tokenizer) == expected
    (document,) = documents_of({"prompt": "a =", "completion": " 1"}, tokenizer, everything=True)
    assert shown(document, tokenizer) == "<2>[a = 1<1>]"


def test_a_template_that_writes_earlier_turns_otherwise_makes_a_document_an_answer(json_tokenizer, tmp_path):
    """As Gemma 4's larger models have it: behind the head of the newest turn alone there is an empty thought."""
    directory = shutil.copytree(json_tokenizer, tmp_path / "tokenizer")
    template = directory / "chat_template.jinja"
    head = "{{- '<|turn>model\\n' -}}"
    assert head in template.read_text()
    template.write_text(template.read_text().replace(head, "{{- '<|turn>model\\n<|channel>thought\\n<channel|>' -}}"))
    from tokenizer import JsonTokenizer

    tokenizer = JsonTokenizer(directory / "tokenizer.json")
    messages = [each for each in CHAT if each["role"] != "system"]
    found = documents_of({"messages": messages}, tokenizer)
    begin, end, thought, after = (tokenizer._id(x) for x in ("<|turn>", "<turn|>", "<|channel>", "<channel|>"))
    empty = f"<{begin}>model\n<{thought}>thought\n<{after}>"
    first = f"<{tokenizer.bos_id}><{begin}>user\nHi<{end}>\n"
    second = f"{first}<{begin}>model\nx = 1<{end}>\n<{begin}>user\nAnd <end_of_turn>?<{end}>\n"
    expected = [f"{first}{empty}[x = 1<{end}>]", f"{second}{empty}[y<{end}>]"]
    assert [shown(document, tokenizer) for document in found] == expected


def test_rows_are_filled_best_fit_and_every_epoch_has_all_of_them():
    assert pack([3, 9, 5, 5, 2, 1], 10) == [[1, 5], [2, 3], [0, 4]]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 33, (300,), generator=generator).tolist()
    rows = pack(lengths, 32)
    assert sorted(index for row in rows for index in row) == list(range(300))
    assert all(sum(lengths[index] for index in row) <= 32 for row in rows)
    assert len(rows) <= 1.05 * sum(lengths) / 32

    data = Data(documents(*[8] * 7), 8, seed=3)
    epochs = [[data.row(7 * epoch + i)[0].tokens.tobytes() for i in range(7)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(d.tokens.tobytes() for d in data.documents)
    assert epochs[0] != epochs[1]
    # Three ranks: as many batches each, together the rows of one
    places = range(5)
    whole = sorted(tuple(b.tokens.tolist()) for b in data.batches(places, 0, 1, 1, CPU))
    shares = [list(data.batches(places, rank, 3, 1, CPU)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert sorted(tuple(b.tokens.tolist()) for share in shares for b in share if b.n_tokens) == whole
    assert data.targets_in(places) == sum(b.n_targets for share in shares for b in share)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

LINES = [
    {"prompt": "def add(a, b):\n", "completion": "    return a + b\n"},
    {"text": "import os\n\n\ndef path_of(name):\n    return os.path.join('a', name)\n"},
    {"messages": CHAT},
    *({"text": f"x{i} = {i}\n" * (1 + i % 3)} for i in range(9)),
]


@pytest.fixture
def command(small, tmp_path):
    return command_of(small, tmp_path)


def command_of(checkpoint: Path, directory: Path) -> list[str]:
    """Options of a run of 6 steps of 2 rows, which takes a second."""
    file = directory / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    data = f"--checkpoint_path {checkpoint} --data {file} --eval_data {file} --device cpu --max_length 64"
    return f"{data} --batch_tokens 128 --max_steps 6 --save_every 2 --learning_rate 1e-3 --lora_rank 0".split()


def run(command: list[str], out, *options: str) -> int:
    return finetune.main([*command, "--output_dir", str(out), *options])


def log_of(out) -> list[dict]:
    """Lines without times."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights_of(out) -> bytes:
    return next(out.glob("*model.safetensors")).read_bytes()


def ended_at(monkeypatch, step: int):
    """Has the next run end like by Ctrl-C before this step."""
    original = Trainer.train_step

    def train_step(self):
        if self.step == step:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("options", [(), ("--lora_rank", "2")])
def test_resumed_is_straight_through_bit_for_bit(options, command, tmp_path, monkeypatch, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run(command, straight, *options) == 0
    assert "6 steps" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        ended_at(patch, 5)  # behind the checkpoint of step 4
        assert run(command, resumed, *options) == 130
    assert run(command, resumed, *options, "--resume") == 0
    assert "2 steps" in capsys.readouterr().err
    assert log_of(resumed) == log_of(straight)
    assert weights_of(resumed) == weights_of(straight)
    assert sorted(each.name for each in (straight / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    losses = [line["eval_loss"] for line in log_of(straight) if "eval_loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert (straight / "curves.svg").read_text().count("<circle") == 4


def test_a_save_that_is_cut_leaves_the_checkpoint_before(command, tmp_path, monkeypatch, capsys):
    out, original = tmp_path / "out", finetune.dcp.save
    with monkeypatch.context() as patch:

        def save(state, storage_writer):
            original(state, storage_writer=storage_writer)
            if list((out / "checkpoints").glob("step-*")):
                (file,) = (out / "checkpoints" / ".step-00000004.tmp").glob("*.distcp")
                file.write_bytes(file.read_bytes()[:1000])
                raise KeyboardInterrupt

        patch.setattr(finetune.dcp, "save", save)
        assert run(command, out) == 130
    assert sorted(each.name for each in (out / "checkpoints").iterdir()) == [".step-00000004.tmp", "step-00000002"]
    assert run(command, out, "--resume") == 0
    assert "4 steps" in capsys.readouterr().err


def test_what_is_overfitted_is_known():
    model = small_model(case="gemma3-window-small").requires_grad_(True)
    objective = Objective(model, by_torch(CPU), torch.float32, True)
    trainer = trainer_of(objective, Data(documents(24), 24), steps=20, learning_rate=1e-2)
    losses = [trainer.train_step()["loss"] for _ in range(20)]
    assert losses[0] > 2 and losses[-1] < 0.05


def trainer_of(objective: Objective, data: Data, steps: int, learning_rate: float, rows: int = 1) -> Trainer:
    settings = {"rows": rows, "all_rows": steps * rows, "learning_rate": learning_rate, "weight_decay": 0.0}
    return Trainer(objective, data, ALONE, settings, steps)


def test_a_step_is_the_mean_over_its_targets(small):
    """However many forwards it takes: rows with few targets don't weigh more."""
    rows = documents(24, 20, 16, 9, vocab=4096)
    data = Data(rows, 24)
    trainers = [trainer_of(objective_of(small), data, steps=2, learning_rate=1e-3, rows=4) for _ in range(2)]
    trainers[1].at_once = 4
    figures = [trainer.train_step() for trainer in trainers]
    expected, _ = backward(objective_of(small), data.batch([[each] for each in rows], CPU))
    for each in figures:
        assert each["targets"] == data.n_targets
        assert each["loss"] == pytest.approx(expected / data.n_targets, rel=1e-6)
    assert figures[0]["gradient_norm"] == pytest.approx(figures[1]["gradient_norm"], rel=1e-5)


def test_a_step_whose_gradients_are_not_finite_changes_nothing(small):
    trainer = trainer_of(objective_of(small), Data(documents(24, vocab=4096), 24), steps=3, learning_rate=1e-3)
    norm = trainer.objective.model.norm.weight
    before, norm.data[3] = norm[5].item(), float("inf")
    assert trainer.train_step()["skipped"]
    assert norm[5].item() == before and trainer.step == 1
    norm.data[3] = 0.0
    assert not trainer.train_step()["skipped"]
    assert norm[5].item() != before


def parameters_of(command: list[str], out) -> dict[str, torch.Tensor]:
    """What a run's newest checkpoint has, read by one process."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "loop", lambda trainer, *rest: found.update(trainer.state()))
        patch.setattr(finetune, "export", lambda *_: None)
        assert run(command, out, "--resume") == 0
    return found


@pytest.fixture(scope="module")
def ran(small, json_tokenizer, tmp_path_factory) -> dict[str, tuple[list[str], Path]]:
    """Runs in processes of their own, all started by one that imports all once: the options and OUT of each."""
    directory = tmp_path_factory.mktemp("ran")
    # As Gemma 4's E2B: layers with the keys of others, which pass from one sharded layer to the next
    shared = save_random(directory / "gemma4", "gemma4-shared", vocab_size=640, vocab_size_per_layer_input=640)
    shutil.copytree(json_tokenizer, shared, dirs_exist_ok=True)
    plain, lora = command_of(small, directory), ("--lora_rank", "2")
    often, short = [*plain, "--max_steps", "12", "--save_every", "1"], ["--max_steps", "3", "--save_every", "3"]
    runs = {
        "two": plain,
        "four": plain,
        "lora": [*plain, *lora, *short],
        "gemma4": [*command_of(shared, directory), *short, "--rows_at_once", "1"],
        "killed": often,
    }
    outs = {name: (options, directory / f"{name}-out") for name, options in runs.items()}

    def job(name: str, ranks: int, *more: str, **how) -> dict:
        options, out = outs[name]
        return {"ranks": ranks, "argv": [*options, "--output_dir", str(out), *more], **how}

    delays = random.Random(0)
    goes_on = [str(outs[name][1]) for name in ("four", "two")]
    enough, too_little = dict(spare=[100, 100], keeps=True), dict(spare=[100, 100, 1, 100], keeps=False)
    jobs = [
        job("two", 2, **enough),
        job("four", 4, "--resume", goes_on=goes_on, **too_little),
        job("lora", 2),
        job("gemma4", 2, **enough),
    ]
    # Steps and saves take some 30 ms each
    for step in (2, 6):
        jobs.append(job("killed", 1, "--resume", kill=(str(outs["killed"][1]), step, delays.uniform(0, 0.06))))
    jobs.append(job("killed", 1, "--resume"))
    program = ROOT / "tests" / "training_processes.py"
    command = [sys.executable, program, json.dumps(jobs)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    statuses = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    expected = [[0] * 2, [0] * 4, [0] * 2, [0] * 2, [-9], [-9], [0]]
    assert statuses == expected, done.stderr
    return outs


@pytest.fixture
def one_thread():
    """As the processes of `ran` have: sums of as many parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["two", "four", "lora", "gemma4"])
def test_ranks_train_what_one_process_does(name, ran, one_thread, tmp_path):
    """Two, which keep activations after the first step; four, behind two's first steps, one of which has no memory for it;
    two with adapters; two with layers that share keys, which keep activations, too."""
    (options, out), one = ran[name], tmp_path / "one"
    assert run(options, one) == 0
    lines = list(zip(log_of(out), log_of(one), strict=True))
    assert len(lines) == (6 + 4 if name in ("two", "four") else 3 + 2)
    for line, theirs in lines:
        assert line.keys() == theirs.keys()
        for key in line.keys() & {"loss", "eval_loss", "gradient_norm"}:
            assert line[key] == pytest.approx(theirs[key], rel=1e-5), line
    found, expected = (
        {name: x for name, x in parameters_of(options, each).items() if not name.endswith((".exp_avg", "_sq", ".step"))}
        for each in (out, one)
    )
    assert_close(found, expected, 1e-6)


def test_killed_runs_go_on(ran, one_thread, tmp_path):
    """Killed twice, between steps or in a save, a run ends as one that was left alone."""
    options, out = ran["killed"]
    assert run(options, tmp_path / "straight") == 0
    assert log_of(out) == log_of(tmp_path / "straight")
    assert weights_of(out) == weights_of(tmp_path / "straight")


# ---------------------------------------------------------------------------------------------------------------------
# What is left, and what is refused


def test_exported_is_a_checkpoint_of_transformers(reference, tmp_path):
    """Every tensor has its place and its numbers."""
    import transformers

    their_model, directory = reference
    objective = objective_of(directory)
    finetune.export(objective.model, open_checkpoint(directory), tmp_path, ALONE)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    expected = their_model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    again, _ = load_model(tmp_path, "cpu", "fp32")
    assert torch.equal(again.embedding.weight, objective.model.embedding.weight)


def test_adapter_in_its_file_is_what_was_trained(command, tmp_path):
    """W + 2 B A, by the names of PEFT, has the loss that was measured at the end."""
    from safetensors.torch import load_file

    out = tmp_path / "out"
    assert run(command, out, "--lora_rank", "2") == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["r"] == 2 and settings["lora_alpha"] == 4
    factors = load_file(out / "adapter_model.safetensors")
    objective = objective_of(command[1])
    parameters = dict(objective.model.named_parameters())
    with torch.no_grad():
        for name, parts in sources(objective.model.config).items():
            row = 0
            for theirs, shape in parts:
                key = f"base_model.model.{theirs.removesuffix('.weight')}"
                if f"{key}.lora_A.weight" in factors:
                    a, b = (factors.pop(f"{key}.lora_{which}.weight") for which in "AB")
                    parameters[name][row : row + shape[0]] += 2 * b @ a
                row += shape[0]
    assert not factors
    documents, _ = read_documents(Path(command[3]), open_tokenizer(TINY_GEMMA, tiny_config()), 64)
    data = Data(documents, 64)
    measured = trainer_of(objective, data, steps=1, learning_rate=0.0).evaluate(data)
    assert measured == pytest.approx(log_of(out)[-1]["eval_loss"], rel=1e-5)


BAD = [  # a line of data, and what is said of it
    ("{", "line 2: not a JSON object"),
    ('{"tekst": "a"}', "line 2: not an object with either 'messages', or 'prompt' and 'completion', or 'text'"),
    ('{"text": "a", "messages": []}', "line 2: not an object with either"),
    ('{"text": 3}', "line 2: 'text' must be a str"),
    ('{"prompt": "a", "completion": null}', "line 2: 'completion' must be a str"),
    ('{"messages": "a"}', "line 2: messages must be a list"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: no message is the assistant's"),
    ('{"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "a"}]}', "the role 'judge'"),
]


def said(status: int, capsys) -> str:
    """The one line of error of a run that failed."""
    assert status == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if "error: " in line]
    return line


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines_are_named(line, message, command, tmp_path, capsys):
    Path(command[3]).write_text(f'{{"text": "a"}}\n{line}\n')
    assert message in said(run(command, tmp_path / "out"), capsys)


def test_what_is_refused(command, small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert "needs a CUDA GPU" in said(run(command, out, "--fp8"), capsys)
    assert "exceeds the context of 256" in said(run(command, out, "--max_length", "300"), capsys)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a b c d e f g h i j", "completion": "k"}) + "\n")
    error = said(run(command, out, "--max_length", "8", "--data", str(long)), capsys)
    assert f"nothing to learn in {long}: rows of 8 tokens (--max_length) end before any target" in error
    with monkeypatch.context() as patch:

        def out_of_memory(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(Trainer, "train_step", out_of_memory)
        error = said(run(command, out), capsys)
        assert "out of cpu memory with rows of 64 tokens; lower --rows_at_once or --max_length" in error
    assert "is not empty: add --resume" in said(run(command, out), capsys)
    assert run(command, out, "--resume") == 0
    capsys.readouterr()
    error = said(run(command, out, "--resume", "--learning_rate", "1e-4"), capsys)
    assert "is of a run with another learning_rate: 0.001, not 0.0001" in error
    Path(command[3]).write_text('{"text": "another"}\n')
    assert "of a run with another data" in said(run(command, out, "--resume"), capsys)


class Short(Trainer):
    """Memory ends in each second batch, of more than one row, or where activations are kept."""

    calls = 0

    def add_gradients(self, batch, factor):
        self.calls += 1
        if self.calls % 2 == 0 and (self.at_once > 1 or not self.objective.recompute):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().add_gradients(batch, factor)


def test_what_memory_does_not_hold_is_taken_in_parts(small):
    """The step that fails begins anew, with a row at once, then with activations that are computed again; and it ends as
    one that began so."""
    data, ends = Data(documents(24, 20, 16, 9, vocab=4096), 24), []
    settings = {"rows": 4, "all_rows": 12, "learning_rate": 1e-3, "weight_decay": 0.0}
    for adapts in (False, True):
        objective = objective_of(small, recompute=not adapts)
        trainer = Short(objective, data, ALONE, settings, 3, at_once=1 + adapts, adapts=adapts)
        losses = [trainer.train_step()["loss"] for _ in range(3)]
        assert trainer.calls == (2 + 2 + 12 if adapts else 12)
        assert (trainer.at_once, objective.recompute) == (1, True)
        ends.append(losses + [p.tolist() for p in trainer.parameters.values()])
    assert ends[0] == ends[1]
    trainer = Short(objective_of(small, recompute=False), data, ALONE, settings, 3)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step()


@pytest.mark.parametrize(("spare", "keeps"), [(11, True), (10, False)])
def test_activations_are_kept_if_those_of_all_blocks_fit_in(spare, keeps, small, monkeypatch):
    """Of two blocks, one of which leaves 5 bytes when it runs again."""
    numbers = iter([0, 1, 1, 2, 2, 7, 7, 10])  # both run, the second again, the first again
    monkeypatch.setattr(finetune, "allocated_memory", lambda device: next(numbers))
    monkeypatch.setattr(finetune, "spare_memory", lambda device: spare)
    objective = objective_of(small)
    trainer = trainer_of(objective, Data(documents(24, vocab=4096), 24), steps=2, learning_rate=1e-3)
    objective.block_bytes = 0  # as where weights are shared
    trainer.train_step()
    assert objective.recompute != keeps
    trainer.train_step()
    assert objective.recompute != keeps and next(numbers, None) is None


def test_a_full_disk_is_one_line(command, tmp_path, capsys):
    """Here it is a limit of the size of files; nothing of the checkpoint stays."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        error = said(run(command, tmp_path / "out"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path / 'out' / 'checkpoints' / 'step-00000002'} can't be written: File too large" in error
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_quantized_weights_take_adapters_only(calibrated, tmp_path, capsys):
    import quantize

    directory = shutil.copytree(calibrated, tmp_path / "checkpoint")
    assert quantize.main(["--mode", "int4", "--checkpoint_path", str(directory)]) == 0
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "import os"}\n')
    options = f"--checkpoint_path {directory}/gemma-int4-g32.safetensors --data {data} --device cpu --max_length 16"
    error = said(run([*options.split(), "--max_steps", "1", "--lora_rank", "0"], tmp_path / "out"), capsys)
    assert "int4 weights can't be trained: train adapters beside them (--lora_rank)" in error
    assert run([*options.split(), "--max_steps", "2"], tmp_path / "out", "--lora_rank", "2") == 0
    assert "loss" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# TransformerEngine's modules


class StandIns:
    """What TransformerEngine documents of its modules, in PyTorch: shows, without a GPU, that each gets the weights,
    norms and documents that are meant. What the real ones make is checked on a GPU, below."""

    class Linear(torch.nn.Module):
        def __init__(self, in_features, out_features, bias, params_dtype, device):
            super().__init__()
            assert not bias and device == "meta"
            self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, device=device))

        def forward(self, x, is_first_microbatch=None):
            """A weight that is told to be an earlier call's is that, whatever it has become."""
            if is_first_microbatch:
                self.rounded = self.weight.detach().clone()
            return F.linear(x, self.weight if is_first_microbatch is None else self.rounded)

    class LayerNormLinear(Linear):
        def __init__(self, *sizes, eps, normalization, zero_centered_gamma, return_layernorm_output, **options):
            super().__init__(*sizes, **options)
            assert normalization == "RMSNorm"
            self.layer_norm_weight = torch.nn.Parameter(torch.empty(sizes[0], device="meta"))
            self.norm = partial(rms_norm, eps=eps, offset=float(zero_centered_gamma))
            self.returns_norm = return_layernorm_output

        def forward(self, x, is_first_microbatch=None):
            h = self.norm(x, self.layer_norm_weight)
            y = super().forward(h, is_first_microbatch)
            return (y, h) if self.returns_norm else y

    class LayerNormMLP(torch.nn.Module):
        def __init__(
            self, hidden, ffn, bias, activation, eps, normalization, zero_centered_gamma, params_dtype, device
        ):
            super().__init__()
            assert not bias and activation == "geglu" and normalization == "RMSNorm" and device == "meta"
            shapes = {"layer_norm_weight": (hidden,), "fc1_weight": (2 * ffn, hidden), "fc2_weight": (hidden, ffn)}
            self.shapes, self.norm = shapes, partial(rms_norm, eps=eps, offset=float(zero_centered_gamma))

        def forward(self, x, is_first_microbatch=None):
            assert is_first_microbatch is None
            assert {name: tuple(self._parameters[name].shape) for name in self.shapes} == self.shapes
            norm, first, second = (self._parameters[name] for name in self.shapes)
            gate, up = F.linear(self.norm(x, norm), first).chunk(2, dim=-1)
            return F.linear(F.gelu(gate, approximate="tanh") * up, second)

    class DotProductAttention:
        def __init__(
            self, heads, head_dim, num_gqa_groups, qkv_format, attn_mask_type, window_size, softmax_scale, **_
        ):
            assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
            self.sizes, self.window, self.scale = (heads, num_gqa_groups, head_dim), window_size, softmax_scale

        def __call__(self, q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
            """Document by document."""
            heads, groups, head_dim = self.sizes
            assert q.shape[1:] == (heads, head_dim) and k.shape[1:] == v.shape[1:] == (groups, head_dim)
            assert cu_seqlens_q.dtype == torch.int32 and int(cu_seqlens_q.diff().max()) <= max_seqlen_q
            outputs = []
            for start, end in zip(cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()[1:]):
                at = torch.arange(end - start)
                behind = at[:, None] - at
                seen = (behind >= 0) & ((self.window[0] < 0) | (behind <= self.window[0]))
                parts = (x[start:end].transpose(0, 1) for x in (q, k, v))
                y = F.scaled_dot_product_attention(*parts, attn_mask=seen, scale=self.scale, enable_gqa=True)
                outputs.append(y.transpose(0, 1).flatten(1))
            return torch.cat(outputs)

    @staticmethod
    def checkpoint(function, use_reentrant):
        assert not use_reentrant
        return function()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("case", ["gemma-gqa", "gemma3-window-small", "gemma4-experts", "gemma4-shared"])
def test_transformer_engine_gets_what_the_definition_has(case, lora, monkeypatch):
    """A loss alone; then, of weights that were trained in between, the loss and gradients."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found, rows = [], documents(20, 12)
    for stand_in in (False, True):
        model = small_model(case=case)
        if lora:
            add_adapters(model, 4, seed=1)
        else:
            for parameter in unfrozen(model).parameters():
                parameter.data = parameter.data.double()  # rounded while it runs
        training = by_torch(CPU)
        if stand_in:
            config = model.config
            engine = TransformerEngine(StandIns, config.norm_eps, config.norm_offset, None)
            training, engine.recipe = engine.training(), "FP8"
        objective, batch = Objective(model, training, torch.float32, True), Data(rows, 32).batch([rows], CPU)
        with torch.no_grad():
            before = objective(batch).item()
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.add_(0.01)
        found.append((before, *backward(objective, batch)))
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-5)
    assert_close(found[1][2], found[0][2], 1e-4)
    kinds = {type(module).__name__ for module in engine.modules.values()}
    assert kinds == ({"Linear", "LayerNormLinear"} if lora else {"Linear", "LayerNormLinear", "LayerNormMLP"})
    # Nothing of what they were given stays with them
    assert all(p is None for module in engine.modules.values() for p in module._parameters.values())


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


GPU_CASES = {  # sizes that TransformerEngine's modules take; Gemma 2's caps go by FlexAttention
    "gemma": ("gemma-gqa", {}),
    "gemma2": ("gemma2-window-half", dict(attn_logit_softcapping=20.0, final_logit_softcapping=10.0)),
    "gemma3": ("gemma3-window-half", {}),
    "gemma4": ("gemma4-unified", {}),
    "experts": ("gemma4-experts", {}),
}


def gpu_model(case: str, seed: int = 0):
    """A model whose heads have 128 numbers or, of global layers of Gemma 4, 512; weights as small as trained ones."""
    from model import Transformer

    name, own = GPU_CASES[case]
    sizes = dict(hidden_size=256, intermediate_size=512, head_dim=128, vocab_size=512, max_position_embeddings=1024)
    sizes |= dict(global_head_dim=512, moe_intermediate_size=128) if name.startswith("gemma4") else {}
    model = Transformer.random(tiny_config(name, **(sizes | own)), dtype=torch.float32, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        for layer in model.layers if name.startswith("gemma4") else ():  # whose scores are not scaled otherwise
            for norm in filter(None, (layer.attention.q_norm, layer.attention.k_norm)):
                norm.weight.fill_(len(norm.weight) ** -0.25)
    return unfrozen(model)


def gradients_on(device: str, model, dtype: torch.dtype, fp8: str | None, batch_rows, by=None, recompute=True):
    """Loss and gradients, on the CPU in float32, of a copy of `model` on `device`."""
    from copy import deepcopy

    from ops.training import choose

    device, model = torch.device(device), deepcopy(model)
    for name, buffer in model.named_buffers():
        setattr(model, name, buffer.to(device))
    model.to(device)
    config = model.config
    training = by or choose(device, dtype, config.norm_eps, config.norm_offset, fp8)
    objective = Objective(model, training, dtype, recompute)
    loss, found = backward(objective, Data(batch_rows, 128).batch([batch_rows], device))
    return training.name, loss, {name: gradient.float().cpu() for name, gradient in found.items()}


def assert_similar(found: dict, expected: dict, least: float):
    """Each gradient points where it should, and is as long."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient.norm() > 0:
            similar = F.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0).item()
            longer = (found[name].norm() / gradient.norm()).item()
            wanted = least if gradient.dim() > 1 else 2 * least - 1  # a norm's sums up what errs in all tokens
            assert similar > wanted and 1 - 2 * (1 - wanted) < longer < 1 + 2 * (1 - wanted), (name, similar, longer)


@pytest.mark.cuda
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize("fp8", [None, "current", "delayed", "block"])
def test_transformer_engine_is_near_float32(case, fp8):
    """BF16 and FP8 against the definition in float32 on a CPU, three documents in a row that is not full."""
    pytest.importorskip("transformer_engine.pytorch")
    model, rows = gpu_model(case), documents(60, 40, 17, vocab=512)
    _, expected_loss, expected = gradients_on("cpu", model, torch.float32, None, rows)
    name, loss, found = gradients_on("cuda", model, torch.bfloat16, fp8, rows)
    assert name == "te"
    assert loss == pytest.approx(expected_loss, rel=0.01 if fp8 is None else 0.03)
    assert_similar(found, expected, least_of(case, 0.98 if fp8 is None else 0.9))


def least_of(case: str, least: float) -> float:
    """Where rounding sends a token to another expert, gradients differ more."""
    return least - 0.15 if case == "experts" else least


@pytest.mark.cuda
@pytest.mark.parametrize("case", GPU_CASES)
def test_pytorch_on_a_gpu_is_near_float32(case):
    """What trains where there is no TransformerEngine."""
    model, rows = gpu_model(case), documents(60, 40, 17, vocab=512)
    _, expected_loss, expected = gradients_on("cpu", model, torch.float32, None, rows)
    by = by_torch(torch.device("cuda"))
    _, loss, found = gradients_on("cuda", model, torch.bfloat16, None, rows, by=by)
    assert loss == pytest.approx(expected_loss, rel=0.01)
    assert_similar(found, expected, least_of(case, 0.98))


@pytest.mark.cuda
@pytest.mark.parametrize("fp8", [None, "current", "delayed"])
def test_recomputing_on_a_gpu_changes_no_gradient(fp8):
    pytest.importorskip("transformer_engine.pytorch")
    model, rows = gpu_model("gemma3"), documents(60, 40, 17, vocab=512)
    found = [gradients_on("cuda", model, torch.bfloat16, fp8, rows, recompute=each) for each in (False, True)]
    assert found[0][1] == found[1][1]
    assert_similar(found[1][2], found[0][2], 0.9999)


@pytest.mark.cuda
@pytest.mark.parametrize("fp8", [None, "current"])
def test_what_blocks_would_keep_is_known_before(fp8):
    """A block that runs again leaves as much as one that runs once. Parameters are in BF16, as gathered ones are."""
    from ops.training import choose

    pytest.importorskip("transformer_engine.pytorch")
    device, rows = torch.device("cuda", 0), [documents(100, 28, vocab=512)] * 16
    model = gpu_model("gemma3").to(device)
    for name, buffer in model.named_buffers():
        setattr(model, name, buffer.to(device))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    config = model.config
    training = choose(device, torch.bfloat16, config.norm_eps, config.norm_offset, fp8)
    objective, batch = Objective(model, training, torch.bfloat16, True), Data(rows[0], 128).batch(rows, device)
    found = []
    for recompute in (True, False):
        objective.recompute = recompute
        backward(objective, batch)  # what the first run makes, and stays
        objective.block_bytes = 0
        backward(objective, batch)
        found.append(objective.block_bytes)
    assert found[0] == pytest.approx(found[1], rel=0.1) and found[1] > 2 * batch.tokens.numel() * config.hidden_size


RECORDED = [  # products by TransformerEngine in BF16 or FP8, or by PyTorch
    ("gemma", "bf16", 0),
    ("gemma", "current", 0),
    ("gemma", "bf16", 4),
    ("gemma", "current", 4),
    ("gemma2", "bf16", 0),
    ("gemma3", "block", 0),
    ("gemma3", "torch", 0),
    ("gemma4", "current", 0),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "products", "lora"), RECORDED)
def test_recorded_steps_learn_what_launched_ones_do(case, products, lora):
    """Rows of one to three documents, two at once; the loss of all of them, measured in between, too."""
    from ops.training import choose

    if products != "torch":
        pytest.importorskip("transformer_engine.pytorch")
    fp8 = products if products in RECIPES else None

    device, rows = torch.device("cuda", 0), documents(128, 100, 70, 40, 30, 30, 30, 30, 90, 20, vocab=512)
    found = []
    for records in (True, False):
        model = gpu_model(case).to(device)
        for name, buffer in model.named_buffers():
            setattr(model, name, buffer.to(device))
        if lora:
            for parameter in model.requires_grad_(False).parameters():
                parameter.data = parameter.data.bfloat16()
            add_adapters(model, lora, seed=1)
        config, dtype = model.config, torch.bfloat16
        training = by_torch(device)
        if products != "torch":
            training = choose(device, dtype, config.norm_eps, config.norm_offset, fp8)
        assert training.records
        objective = Objective(model, replace(training, records=records), dtype, False)
        data = Data(rows, 128)
        settings = {"rows": 4, "all_rows": 40, "learning_rate": 3e-3 if lora else 3e-4, "weight_decay": 0.0}
        trainer = Trainer(objective, data, ALONE._replace(device=device), settings, 10, at_once=2)
        assert len(data.rows) >= 4 and len({len(row) for row in data.rows}) > 1
        found.append([])
        for _ in range(6):
            found[-1] += [trainer.train_step()["loss"], trainer.evaluate(data)]
        assert (trainer.recording is not None) == records
    assert found[1][-1] < 0.95 * found[1][1]
    assert found[0] == pytest.approx(found[1], rel=5e-3 if fp8 is None else 2e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [(), ("--lora_rank", "4")])
def test_fp8_learns_what_bf16_does(options, tmp_path):
    """Tiny-gemma: held-out losses within 0.5 %, after the same steps; a resumed run's log is the straight one's."""
    pytest.importorskip("transformer_engine.pytorch")
    text = (ROOT / "model.py").read_text().split("\n\n\n")
    for name, part in (("train", text[::2]), ("held_out", text[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in part))
    command = f"--data {tmp_path}/train.jsonl --eval_data {tmp_path}/held_out.jsonl --max_length 512"
    command = f"{command} --batch_tokens 2048 --max_steps 20 --save_every 10 --learning_rate 3e-4".split()
    losses = []
    for fp8 in ((), ("--fp8",), ("--fp8", "block")):
        out = tmp_path / f"out{len(losses)}"
        assert run(command, out, *options, *fp8) == 0
        losses.append([line["eval_loss"] for line in log_of(out) if "eval_loss" in line])
    assert losses[0][-1] < 0.98 * losses[0][0]
    for each in losses[1:]:
        assert each[-1] == pytest.approx(losses[0][-1], rel=0.005)
