"""eval.py --tasks against the harness's own Hugging Face model: the same tasks, scores and log-likelihoods."""

import json
import os
import sysconfig
from dataclasses import replace
from pathlib import Path

import gemma4
import pytest
import torch
from conftest import TINY_GEMMA, copy_tiny_gemma, reference_model, save_checkpoint
from safetensors.torch import load_file, save_file

import eval as program
from cli import Stats
from eval import HarnessModel, find_tasks, score
from generate import load_model

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when datasets is imported
lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval[hf] (requirements-dev.txt)")
from lm_eval.api.instance import Instance

CODE = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text()  # which no change here changes
LONG_TEXTS = [CODE[i : i + 250] for i in (900, 6000, 9000)]

TASKS = {
    "next_line": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
num_fewshot: 1
fewshot_split: test
fewshot_config: {sampler: first_n}
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "one_token": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: ["(", "def", "return", "    x = 1"]
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "continuation": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n", "return"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
COMMON = """task: {name}
dataset_path: json
test_split: test
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """YAML files of four tasks, each of 16 items: lines of code and what follows them."""
    directory = tmp_path_factory.mktemp("tasks")
    lines = [line for line in CODE.splitlines(keepends=True) if line.strip()]
    with open(directory / "data.json", "w") as file:
        for index, start in enumerate(range(30, 318, 18)):
            end = start + 2 + index % 3
            context = "".join(lines[start:end]).lstrip()
            choices = [lines[i] for i in (end, end + 40, end + 80)[: 2 + index % 2]]
            answer = index % len(choices)
            choices[0], choices[answer] = choices[answer], choices[0]
            file.write(json.dumps({"context": context, "choices": choices, "answer": answer}) + "\n")
    files = []
    for name, text in TASKS.items():
        files.append(directory / f"{name}.yaml")
        common = COMMON.format(name=name, data=directory / "data.json", cache=directory / "cache")
        files[-1].write_text(common + text)
    return list(map(str, files))


@pytest.fixture(scope="module")
def theirs(tiny):
    """The harness's own model; its tokenizer has the pieces and scores of our tokenizer.model."""
    pytest.importorskip("accelerate", reason="needs lm_eval[hf] (requirements-dev.txt)")
    import transformers
    from lm_eval.models.huggingface import HFLM
    from transformers.convert_slow_tokenizer import generate_merges

    sp = tiny[1].sp
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    merges = generate_merges(vocab, {piece: sp.get_score(i) for piece, i in vocab.items()})
    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_GEMMA, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True, batch_size=8)


def results(model, tasks) -> tuple[dict, dict]:
    """Each task's scores, and each item's responses."""
    result = lm_eval.evaluate(model, find_tasks(tasks).load(tasks), bootstrap_iters=0)
    scores = {name: {k: v for k, v in each.items() if isinstance(v, float)} for name, each in result["results"].items()}
    return scores, {name: [item["resps"] for item in items] for name, items in result["samples"].items()}


def ask(model, method: str, *requests, **options) -> list:
    instances = [Instance(method, {}, request, i) for i, request in enumerate(requests)]
    return getattr(model, method)(instances, disable_tqdm=True, **options)


# --- against the harness's own model


def test_scores_and_log_likelihoods_are_those_of_the_harness(tiny, theirs, tasks):
    expected, their_responses = results(theirs, tasks)
    scores, responses = results(HarnessModel(*tiny, batch_size=8), tasks)
    assert set(scores) == set(TASKS)
    for name in TASKS:
        assert scores[name] == pytest.approx(expected[name], rel=1e-4), name
        assert len(responses[name]) == 16
    assert scores["next_line"]["acc,none"] > 0.6
    assert responses["continuation"] == their_responses["continuation"]
    for name in ("next_line", "one_token", "whole_text"):
        for ours, reference in zip(responses[name], their_responses[name]):
            ours, reference = (torch.tensor(each, dtype=torch.float64).flatten() for each in (ours, reference))
            torch.testing.assert_close(ours, reference, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["moe", "e2b"])
def test_scores_of_gemma_4_are_those_of_the_harness(kind, tmp_path, tasks):
    pytest.importorskip("accelerate", reason="needs lm_eval[hf] (requirements-dev.txt)")
    import transformers
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    directory = gemma4.checkpoint(kind, tmp_path)
    file = str(directory / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=file, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    template = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    theirs = HFLM(pretrained=gemma4.reference(kind), tokenizer=tokenizer, add_bos_token=True, batch_size=8)
    ours = HarnessModel(*load_model(directory, device="cpu", precision="fp32"), batch_size=8)
    expected, their_responses = results(theirs, tasks)
    scores, responses = results(ours, tasks)
    for name in ("next_line", "one_token", "whole_text"):
        assert scores[name] == pytest.approx(expected[name], rel=1e-4), name
        for mine, reference in zip(responses[name], their_responses[name]):
            mine, reference = (torch.tensor(each, dtype=torch.float64).flatten() for each in (mine, reference))
            torch.testing.assert_close(mine, reference, atol=1e-2, rtol=1e-5)  # logarithms of up to 2,000
    assert len(responses["continuation"]) == 16


def test_what_exceeds_the_context_is_cut_as_by_the_harness(tiny, theirs, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(model, "config", replace(model.config, context_length=48))
    monkeypatch.setattr(theirs, "_max_length", 48)
    ours = HarnessModel(model, tokenizer, batch_size=3)
    for text in LONG_TEXTS:
        assert len(tokenizer.encode(text)) > 48
    texts = [(text,) for text in (*LONG_TEXTS, "short", "")]
    assert ask(ours, "loglikelihood_rolling", *texts) == pytest.approx(
        ask(theirs, "loglikelihood_rolling", *texts), abs=1e-3
    )
    pairs = [(text, f"    return {i}\n") for i, text in enumerate((*LONG_TEXTS, "", "def f():\n   "))]
    with pytest.warns(UserWarning, match=f"{len(LONG_TEXTS)} of {len(pairs)} requests exceed the context of 48"):
        scores = ask(ours, "loglikelihood", *pairs)
    expected = ask(theirs, "loglikelihood", *pairs)
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-3)
    prompts = [(text, {"until": ["zzz"], "max_gen_toks": 20}) for text in LONG_TEXTS]
    theirs_alone = [ask(theirs, "generate_until", prompt)[0] for prompt in prompts]  # it cuts a batch at its longest
    assert ask(ours, "generate_until", *prompts) == theirs_alone


# --- scoring


@torch.no_grad()
@pytest.mark.parametrize(
    "case", ["gemma-mqa", "gemma2-window-half", "gemma3-window-small", "gemma4-experts", "gemma4-shared"]
)
def test_a_score_is_the_sum_of_log_probabilities(case, tmp_path, monkeypatch):
    """Contexts of one token, within and beyond a local layer's window (6 or 20); continuations alone, sharing their
    context, of one token and of many, which run in pieces."""
    reference = reference_model(case)
    model, _ = load_model(save_checkpoint(reference, tmp_path), device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(2, 128, (count,), generator=generator).tolist()

    requests = [
        (context, tokens(length))
        for context, lengths in (
            (tokens(1), (50, 3, 1)),
            (tokens(4), (30, 7)),
            (tokens(19), (2,)),
            (tokens(45), (9, 1, 40)),
        )
        for length in lengths
    ]
    context = tokens(10)
    greedy = reference(torch.tensor([context])).logits[0, -1].argmax().item()
    requests.append((context, [greedy]))
    expected = []
    for context, continuation in requests:
        logits = reference(torch.tensor([context + continuation[:-1]])).logits[0, -len(continuation) :]
        log_probs = logits.double().log_softmax(-1)[range(len(continuation)), continuation]
        expected.append((log_probs.sum().item(), logits.argmax(-1).tolist() == continuation))
    assert expected[-1][1]
    for batch_size, positions in ((1, 4096), (3, 24), (64, 4096)):
        monkeypatch.setattr(program, "LOGITS", positions)
        done = []
        scores = score(model, requests, batch_size, progress=done.append)
        assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
        assert [each for each, _ in scores] == pytest.approx([each for each, _ in expected], abs=1e-3)
        assert sum(done) == len(requests)
        assert max(done) <= 3 * batch_size
    assert model(torch.tensor([context])).shape == (1, 128)  # no cache of the last batch is left behind


def test_the_kv_cache_has_the_dtype_asked_for(tiny):
    model, tokenizer = tiny
    requests = [(tokenizer.encode(text), tokenizer.encode("    return x\n", bos=False)) for text in LONG_TEXTS]
    exact, fine, coarse = (
        torch.tensor([each for each, _ in score(model, requests, kv_cache_dtype=dtype)])
        for dtype in (None, torch.float8_e4m3fn, torch.float8_e5m2)
    )
    assert 1e-3 < (fine - exact).abs().max() < (coarse - exact).abs().max() < 3


def test_mistakes_in_requests(tiny):
    model, _ = tiny
    for requests, message in (
        ([([2], [3]), ([2], [])], "request 2 has an empty continuation"),
        ([([], [3])], "request 1 has an empty context"),
        ([([2], [4096])], "request 1 has a token id outside the vocabulary of 4096"),
        ([([2], [3] * 8193)], "a continuation of 8193 tokens, more than the context of 8192"),
    ):
        with pytest.raises(ValueError, match=message):
            score(model, requests)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        score(model, [], batch_size=0)


def test_bos_is_not_doubled(tiny):
    model = HarnessModel(*tiny)
    assert model.tok_encode("a") == model.tok_encode("<bos>a") == [2, *model.tok_encode("a", add_special_tokens=False)]


# --- generation


def test_settings_of_generation(tiny):
    model = HarnessModel(*tiny, batch_size=4)
    prompt, greedy = "def read(path):\n", {"max_gen_toks": 24, "until": []}
    full, short, stopped, ignored = ask(
        model,
        "generate_until",
        (prompt, greedy),
        (prompt, greedy | {"max_gen_toks": 5}),
        (prompt, greedy | {"until": ["zzz", "", "."]}),
        (prompt, greedy | {"do_sample": False, "temperature": 0.8}),
    )
    assert full.startswith(short)
    assert len(short) < len(full)
    assert stopped == full.split(".")[0] != full
    assert ignored == full
    sampling = greedy | {"do_sample": True, "temperature": 1.0}
    drawn = ask(model, "generate_until", *[(prompt, sampling)] * 4)
    assert len(set(drawn)) > 1  # repeats of a request differ
    assert drawn == ask(model, "generate_until", *[(prompt, sampling)] * 4)
    assert ask(model, "generate_until", (prompt, sampling | {"top_k": 1})) == [full]
    for wrong, message in (
        ({"num_beams": 4}, "generation setting 'num_beams' of a task is not supported"),
        ({"max_gen_toks": 8192}, "max_gen_toks of 8192 leaves no prompt in the context of 8192"),
        (
            {"do_sample": True, "temperature": 1.0, "top_p": 2.0},
            "top_p must be a number above 0 and at most 1, not 2.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ask(model, "generate_until", (prompt, wrong))


def _stops_early(monkeypatch, model, tokenizer, **options):
    """Rows with a stop string are done a step late, and the texts are those of a run that goes on to the end."""
    prompts = [(text, {"until": ["\n"], "max_gen_toks": 400}) for text in (*LONG_TEXTS, "x = [", "import os\n\n")]
    steps, generate = [], program.generate

    def watching(*args, **options):
        stats = Stats()
        results = generate(*args, stats=stats, **options)
        steps.append(stats.steps)
        return results

    monkeypatch.setattr(program, "generate", watching)
    texts = ask(HarnessModel(model, tokenizer, batch_size=8, **options), "generate_until", *prompts)
    assert steps[0] < 200
    endless = [(text, {"until": [], "max_gen_toks": 100}) for text, _ in prompts]
    full = ask(HarnessModel(model, tokenizer, batch_size=8), "generate_until", *endless)
    assert texts == [text.split("\n")[0] for text in full]


def test_a_stop_string_ends_its_row(monkeypatch, tiny):
    _stops_early(monkeypatch, *tiny)


@pytest.mark.cuda
def test_a_stop_string_ends_its_row_in_the_graph(monkeypatch):
    _stops_early(monkeypatch, *load_model(TINY_GEMMA, device="cuda", precision="fp32"), compile=True)


# --- the program


def test_from_the_command_line(capsys, tasks):
    options = ["--tasks", ",".join(tasks[:1]), "--limit", "6", "--device", "cpu", "--precision", "fp32"]
    assert program.main([*options, "--num_fewshot", "2", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out)
    assert result["n-samples"]["next_line"] == {"original": 16, "effective": 6}
    assert result["n-shot"] == {"next_line": 2}
    assert 0 <= result["results"]["next_line"]["acc,none"] <= 1
    assert program.main(options) == 0
    out = capsys.readouterr().out
    assert "|next_line|" in out
    assert "|acc " in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "ParserError"),
        (bytes(range(256)), "ReaderError"),
        (b"- 1\n", "Expected YAML dict"),
        (("{field}", "{nope}"), "'nope' is undefined"),
        (("metric: acc}", "metric: nope}"), "KeyError"),
        (("data.json", "nowhere.json"), "Unable to find"),
    ],
)
def test_a_task_file_that_is_wrong_is_a_line(tasks, tmp_path, capsys, content, message):
    file = tmp_path / "wrong.yaml"
    if isinstance(content, tuple):
        before, after = content
        good = Path(tasks[1]).read_text().replace("{{context}}", "{{field}}")
        assert before in good
        content = good.replace(before, after).replace("{{field}}", "{{context}}").encode()
    file.write_bytes(content)
    assert program.main(["--tasks", str(file), "--limit", "1", "--device", "cpu"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {file} can't be loaded: ")
    assert message in line


def test_scores_that_are_not_finite_are_refused(tasks, tmp_path, capsys):
    directory = copy_tiny_gemma(tmp_path / "damaged")
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    for task in tasks[:3]:
        arguments = ["--tasks", task, "--limit", "1", "--device", "cpu", "--checkpoint_path", str(directory)]
        assert program.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1] == "error: the model computes values that are not finite; it can't be scored"


def test_tasks_of_a_directory(tasks, tmp_path):
    directory = Path(tasks[0]).parent
    assert "next_line" in find_tasks(["next_line", tasks[1]], directory).all_tasks
    with pytest.raises(FileNotFoundError, match="no directory at"):
        find_tasks(["next_line"], tmp_path / "nowhere")
