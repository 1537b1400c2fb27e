"""generate.py as a user types it."""

import importlib.util
import itertools
import json
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
from conftest import ONE_LAYER, ROOT, SIZES, TINY_GEMMA, copy_tiny_gemma, fake_input, small_model
from safetensors.torch import save_file

import chat
import device as device_file
import generate as program
from runner import Runner
from text import Output


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    """Measuring it takes longer than what most tests are for; the first one is a process that does."""
    monkeypatch.setattr("cli.copy_bandwidth", lambda device: 1e10)


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = program.main([*map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    return status, out, err


def test_first_command_prints_text_and_figures():
    done = subprocess.run(
        [sys.executable, "generate.py"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith(program.DEFAULT_PROMPT)
    assert done.stdout[len(program.DEFAULT_PROMPT) :].strip()  # how much there is, the draw decides: it has no seed
    for figure in (
        r"load [\d.]+ s, compile [\d.]+ s, prefill [\d.]+ s \(\d+ tokens\), decode [\d.]+ s",
        r"decode [\d.]+ tokens/s, [\d.]+ GB/s, \d+% of the copy bandwidth \([\d.]+ GB/s\)",
        r"peak memory [\d.]+ GiB",
    ):
        assert re.search(figure, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_json_objects_in_input_order(capsys, tmp_path):
    prompts = ["import sys\n", "x", "class Point:\n    def __init__(self, x, y):\n", "y"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ("--max_new_tokens", 30, "--seed", 5, "--num_samples", 2, "--precision", "fp32", "--json")
    status, out, err = run(capsys, "--prompts_file", file, "--batch_size", 3, *options)
    assert status == 0, err
    completions = [json.loads(line) for line in out.splitlines()]
    assert [c["prompt"] for c in completions] == [prompt for prompt in prompts for _ in range(2)]
    tokenizer = program.Tokenizer(TINY_GEMMA / "tokenizer.model")
    for c in completions:
        assert set(c) == {"prompt", "text", "tokens", "finish_reason", "prompt_tokens"}
        assert c["prompt_tokens"] == len(tokenizer.encode(c["prompt"]))
        stopped = c["tokens"][-1] in (1, 5)
        assert c["finish_reason"] == ("stop" if stopped else "length")
        assert stopped or len(c["tokens"]) == 30
        assert c["text"] == tokenizer.decode(c["tokens"][:-1] if stopped else c["tokens"])
    _, again, _ = run(capsys, "--prompt", *prompts, *options)
    assert again == out


def test_finish_reason_stop(capsys):
    """Twenty samples of 150 tokens: some reach the end of their file."""
    options = (
        "--num_samples",
        20,
        "--max_new_tokens",
        150,
        "--seed",
        1,
        "--json",
        "--prompt",
        "if __name__ == '__main__':\n    main()\n",
    )
    _, out, _ = run(capsys, *options)
    completions = [json.loads(line) for line in out.splitlines()]
    reasons = {c["finish_reason"] for c in completions}
    assert reasons == {"stop", "length"}
    assert all((c["tokens"][-1] in (1, 5)) == (c["finish_reason"] == "stop") for c in completions)


def test_several_completions_are_told_apart(capsys):
    _, out, _ = run(capsys, "--prompt", "a = 1\n", "b = 2\n", "--num_samples", 2, "--max_new_tokens", 3)
    assert [line for line in out.splitlines() if line.startswith("--- ")] == [
        "--- prompt 1, sample 1",
        "--- prompt 1, sample 2",
        "--- prompt 2, sample 1",
        "--- prompt 2, sample 2",
    ]
    assert out.count("a = 1\n") >= 2


def test_plain_prompts_file(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("def f(x):\n{not json\n\n")  # blank lines at the end are no prompts
    _, out, _ = run(capsys, "--prompts_file", file, "--max_new_tokens", 2, "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["def f(x):", "{not json"]


def test_a_single_prompt_streams_on_a_terminal(capsys):
    """Through a pseudo-terminal: the text comes in pieces, and is the same as without a terminal."""
    options = ("--temperature", "0", "--max_new_tokens", "30")
    command = [sys.executable, "generate.py", *options, "--device", "cpu"]
    main_end, program_end = pty.openpty()
    process = subprocess.Popen(command, cwd=ROOT, stdout=program_end, stderr=subprocess.DEVNULL)
    os.close(program_end)
    pieces = []
    while True:
        try:
            piece = os.read(main_end, 65536)
        except OSError:
            break
        if not piece:
            break
        pieces.append(piece)
    assert process.wait() == 0
    _, plain, _ = run(capsys, *options)
    assert b"".join(pieces).replace(b"\r\n", b"\n").decode() == plain
    assert len(pieces) > 5


def test_interactive_chat_keeps_its_cache_between_turns(monkeypatch):
    """Each turn's prefill gets what is new; what it sees is the whole conversation."""
    prefills = []
    admit = Runner.admit

    def record(self, model, pieces, retired):
        prefills.append((pieces[0].prompt, pieces[0].begin))
        admit(self, model, pieces, retired)

    monkeypatch.setattr(Runner, "admit", record)
    fake_input(monkeypatch, ["Sort a list.", "", "Reverse it.", "Thanks."])
    assert program.main(["--interactive", "--temperature", "0", "--max_new_tokens", "8", "--device", "cpu"]) == 0
    assert len(prefills) == 3
    tokenizer = program.Tokenizer(TINY_GEMMA / "tokenizer.model")
    assert prefills[0] == (tokenizer.encode_turn("Sort a list."), 0)
    for (before, _), (tokens, cached) in itertools.pairwise(prefills):
        assert tokens[: len(before)] == before
        assert len(before) <= cached <= len(before) + 8
        assert tokenizer.end_of_turn in tokens[cached : cached + 2]
        assert tokenizer.bos_id not in tokens[1:]


def test_interactive_conversation_that_fills_the_context_starts_anew(monkeypatch, capsys):
    monkeypatch.setattr(chat, "CHAT_LENGTH", 96)
    fake_input(monkeypatch, ["one two three"] * 5 + ["word " * 90])
    assert program.main(["--interactive", "--max_new_tokens", "20", "--device", "cpu"]) == 0
    _, err = capsys.readouterr()
    assert "note: the conversation has filled its 96 tokens and starts anew" in err
    assert "new ones exceed 96" in err


def test_chat_prints_the_answer_alone(capsys):
    status, out, _ = run(capsys, "--chat", "--prompt", "Sort a list.", "--max_new_tokens", 5, "--json")
    assert status == 0
    assert json.loads(out)["prompt_tokens"] > 8
    _, out, _ = run(capsys, "--chat", "--prompt", "Sort a list.", "--max_new_tokens", 5)
    assert "Sort a list." not in out


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A random model of one layer with tiny-gemma's tokenizer, for the compiler."""
    directory = tmp_path_factory.mktemp("one_layer")
    copy_tiny_gemma(directory)
    (directory / "model.safetensors").unlink()
    config = SIZES | ONE_LAYER | dict(model_type="gemma", num_attention_heads=4, num_key_value_heads=2)
    (directory / "config.json").write_text(json.dumps(config))
    metadata = {"format": "gemma-fast", "format_version": "1", "weight_format": "fp32"}
    save_file(small_model(**ONE_LAYER).state_dict(), directory / "gemma.safetensors", metadata)
    return directory


def test_compile_from_the_command_line(capsys, one_layer):
    options = ("--checkpoint_path", one_layer, "--max_new_tokens", 30, "--precision", "fp32", "--seed", 1)
    options += ("--top_p", 0.9, "--min_p", 0.01, "--repetition_penalty", 1.1, "--temperature", 0.7)
    _, eager, _ = run(capsys, *options)
    _, compiled, err = run(capsys, *options, "--compile", "--compile_prefill")
    assert compiled == eager
    assert not re.search(r"compile 0\.00 s", err)


def test_operations_by_name(capsys, monkeypatch):
    """--ops torch is what a CPU runs by itself; the others need a GPU there, but for Triton's interpreter."""
    options = ("--temperature", 0, "--max_new_tokens", 12, "--json")
    _, expected, _ = run(capsys, *options)
    for name in ("auto", "torch"):
        status, out, err = run(capsys, *options, "--ops", name)
        assert (status, out) == (0, expected), err
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    for name in ("kernels", "te"):
        status, out, err = run(capsys, *options, "--ops", name)
        assert (status, out, err) == (2, "", f"error: ops '{name}' needs a CUDA GPU: use 'torch'\n")


def test_profile_is_a_trace_of_prefill_and_ten_steps(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    status, _, err = run(capsys, "--profile", trace, "--max_new_tokens", 30, "--temperature", 0)
    assert status == 0, err
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::embedding") == 11
    assert [f.name for f in tmp_path.iterdir()] == ["trace.json"]


# --- mistakes: one line on stderr, exit status 2 (more in test_mistakes.py)


def test_lines_of_a_prompts_file_have_settings_of_their_own(capsys, tmp_path):
    """Each as it is alone with these settings; what a line doesn't say, the options do."""
    lines = [
        {"prompt": "import os\n", "seed": 7, "num_samples": 2, "top_k": 30, "id": "first"},
        {"prompt": "x = [", "temperature": 0, "max_new_tokens": 30, "stop": "]"},
        {"prompt": "def f(", "seed": 3, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "stop": [")", ","]},
        {"prompt": "class A:", "id": 4},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ["--seed", "5", "--max_new_tokens", "12", "--json", "--device", "cpu", "--precision", "fp32"]
    status, out, _ = run(capsys, "--prompts_file", file, *options)
    assert status == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [completion.get("id") for completion in found] == ["first", "first", None, None, 4]
    alone = []
    for line in lines[:3]:
        mine = [["--" + key, *map(str, value if isinstance(value, list) else [value])] for key, value in line.items()]
        mine = [part for option in mine if option[0] != "--id" for part in option]
        status, out, _ = run(capsys, *options, *mine, *([] if "seed" in line else ["--seed", "5"]))
        assert status == 0
        alone += [json.loads(line) for line in out.splitlines()]
    for completion, expected in zip(found, alone):
        completion.pop("id", None)
        assert completion == expected
    assert found[2]["finish_reason"] == "stop" and "]" not in found[2]["text"]
    assert "]" in program.Tokenizer(TINY_GEMMA / "tokenizer.model").decode(found[2]["tokens"])
    assert found[4]["finish_reason"] == "length" and len(found[4]["tokens"]) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_p": 0}, "top_p must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 8192}, "exceeds the context of 8192"),
        ({"num_samples": True}, "num_samples must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"stop": ""}, "stop must be a text or a list of texts"),
        ({"stop": [3]}, "stop must be a text or a list of texts"),
        ({"stop": "\ud800"}, "a stop is not UTF-8"),
    ],
)
def test_bad_settings_of_a_prompts_file_are_numbered(capsys, tmp_path, settings, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n\n" + json.dumps({"prompt": "b"} | settings))
    status, _, err = run(capsys, "--prompts_file", file)
    assert status == 2
    assert "line 3" in err and message in err


# --- the output file


@pytest.fixture
def asked(tmp_path):
    lines = [
        {"prompt": text, "id": i, "num_samples": 1 + i % 2} for i, text in enumerate(["def f(", "import", "x", "#"])
    ]
    lines.insert(2, {"prompt": "long " * 300, "max_new_tokens": 8000, "id": "long"})
    lines[1]["seed"] = 4
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


OUTPUT = ["--seed", "5", "--max_new_tokens", "12", "--device", "cpu", "--precision", "fp32", "--batch_size", "2"]


def test_output_is_what_json_prints_with_a_line_for_what_fails(capsys, asked, tmp_path):
    out = tmp_path / "out.jsonl"
    status, printed, _ = run(capsys, "--prompts_file", asked, "--output", out, *OUTPUT)
    assert (status, printed) == (0, "")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [completion["id"] for completion in found] == [0, 1, 1, "long", 2, 3, 3]
    failed = found.pop(3)
    assert set(failed) == {"id", "prompt", "error"} and "line 3 has 302 tokens" in failed["error"]
    assert not (tmp_path / "out.jsonl.partial").exists()
    lines = asked.read_text().splitlines()
    lines[2] = json.dumps({"prompt": "x", "max_new_tokens": 1})  # in its place: others keep their noise
    asked.write_text("\n".join(lines))
    status, printed, _ = run(capsys, "--prompts_file", asked, "--json", *OUTPUT)
    expected = [json.loads(line) for line in printed.splitlines()]
    assert status == 0 and found == expected[:3] + expected[4:]


@pytest.mark.parametrize(("torn", "ended"), [(b"", 1), (b"[3", 4), (b'[3, 0, {"id": 1, "prompt": "im', 1)])
def test_output_goes_on_where_it_stopped(capsys, monkeypatch, asked, tmp_path, ended, torn):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ["--prompts_file", asked, *OUTPUT]
    assert run(capsys, *options, "--output", whole)[0] == 0

    add, added = Output.add, []

    def interrupted(self, *entry):
        if len(added) == ended:
            raise KeyboardInterrupt
        add(self, *entry)
        added.append(entry[:2])

    monkeypatch.setattr(Output, "add", interrupted)
    assert run(capsys, *options, "--output", out)[0] == 130
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("ab") as file:
        file.write(torn)
    ended = 100
    assert run(capsys, *options, "--output", out)[0] == 0
    assert sorted(added) == [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (4, 1)]  # each once
    assert out.read_text() == whole.read_text() and not partial.exists()


def test_output_without_a_seed_keeps_that_of_its_first_start(capsys, monkeypatch, asked, tmp_path):
    out, finish = tmp_path / "out.jsonl", Output.finish
    options = ["--prompts_file", asked, *OUTPUT[2:], "--output", out]

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "finish", interrupted)
    assert run(capsys, *options)[0] == 130
    head, *before = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    (tmp_path / "out.jsonl.partial").write_text("\n".join((head, *before[:2])) + "\n")
    monkeypatch.setattr(Output, "finish", finish)
    assert run(capsys, *options)[0] == 0
    completions = [completion for *_, completion in sorted(map(json.loads, before), key=lambda entry: entry[:2])]
    assert len(completions) == 7
    assert out.read_text() == "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in completions)


def test_output_of_another_run_is_refused(capsys, asked, tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    options = ["--prompts_file", asked, "--output", out]
    out.write_text("")
    assert "exists already" in run(capsys, *options, *OUTPUT)[2]
    out.unlink()
    other = Output(out, {"prompts": []}, 5)
    other.add(0, 0, {})
    other.stream.close()
    for content, more, message in (
        (partial.read_bytes(), OUTPUT, "is of a run with other prompts or settings"),
        (b"something\n", OUTPUT, "is not of this program"),
        (b"[1]\n", OUTPUT, "is not of this program"),
    ):
        partial.write_bytes(content)
        status, _, err = run(capsys, *options, *more)
        assert status == 2 and message in err
        assert partial.read_bytes() == content
    partial.unlink()
    with pytest.raises(ValueError, match="by another process"):
        one = Output(out, {}, 5)
        one.add(0, 0, {})
        Output(out, {}, 5)
    one.stream.close()
    with pytest.raises(ValueError, match="other prompts or settings"):
        Output(out, {}, 6)


def test_a_run_that_made_nothing_is_in_nobodys_way(capsys, asked, tmp_path):
    """The checkpoint was misspelt: the file of the right one is not of another run."""
    out = tmp_path / "out.jsonl"
    options = ["--prompts_file", asked, "--output", out, *OUTPUT]
    assert run(capsys, *options, "--checkpoint_path", tmp_path / "nowhere")[0] == 2
    assert run(capsys, *options)[0] == 0
    assert len(out.read_text().splitlines()) == 7


def test_text_that_streams_ends_before_a_stop(capsys):
    tokenizer = program.Tokenizer(TINY_GEMMA / "tokenizer.model")
    for text in ("ab", "abc", "one STOP two", "one STO", "one STSTOP", "STOP", "a STOP b STOP", "nothing"):
        for stops in ([], ["STOP"], ["STOP", "b"], ["x"]):
            printer = chat.Printer(tokenizer, (1,), stops)
            for token in [*tokenizer.encode(text, bos=False), 1]:
                printer(token)
            printer.end()
            expected = text[: min((text.find(stop) for stop in stops if stop in text), default=None)]
            assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2: not a JSON object with a string 'prompt'"),
        (b'{"prompt": "a"}\n\n{"prompt": 3}\n', "line 3: not a JSON"),
        (
            b'{"prompt": "a"}\n{"prompt": "b", "temprature": 0.5}\n',
            "line 2: unknown 'temprature'; known are prompt, id",
        ),
        (b'{"prompt": "a", "max_tokens": 3, "ID": 1}\n', "line 1: unknown 'max_tokens', 'ID'; known"),
        (b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "line 2: the prompt is not UTF-8: '\\ud800' is its character 1"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8 text"),
        (b'{"prompt": "a"}\n{"prompt": "\xed\xa0\x80"}\n', "line 2: not UTF-8 text"),
        (b'{"prompt": "a"}\n' + b"[" * 100_000 + b"\n", "line 2: not a JSON object"),
        (b'{"prompt": null}\n', "line 1: not a JSON object with a string 'prompt'"),
        (b'{"text": "a"}\n{"prompt": "b"}\n', "line 1: not a JSON"),
        (b'{"prompt": "a"}\n{"prompt": "b', "line 2: not a JSON"),
        (b'{"prompt": "a"}\n{"prompt": ""}\n', "line 2: the prompt is empty"),
        (b"one\n\nthree\n", "line 2: the prompt is empty"),
        (b"one\n\xff\xfe\n", "line 2: not UTF-8"),
        (b"", "holds no prompts"),
        (b"\n\n", "holds no prompts"),
    ],
)
def test_bad_lines_of_a_prompts_file_are_numbered(capsys, tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    status, _, err = run(capsys, "--prompts_file", file)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert program.main(["--device", "cuda"]) == 2
    assert "error: there is no CUDA device here: use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "architecture 'llama' is not supported"),
        ({"model_type": "gemma3n_text"}, "(gemma3n_text)"),
        ({"num_hidden_layers": 7}, "lacks model.layers.6"),
        ({"num_hidden_layers": 5}, "no place for: model.layers.5"),
        ({"intermediate_size": 800}, "has shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(capsys, tmp_path, change, message):
    copy_tiny_gemma(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    status, out, err = run(capsys, "--checkpoint_path", tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_cut_checkpoint_is_one_line(capsys, tmp_path):
    copy_tiny_gemma(tmp_path)
    with open(tmp_path / "model.safetensors", "rb+") as f:
        f.truncate(10_000_000)
    status, _, err = run(capsys, "--checkpoint_path", tmp_path)
    assert status == 2
    assert "model.safetensors is damaged: 10,000,000 bytes, where its header describes 14,299,576" in err


def test_too_little_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(device_file, "free_memory", lambda device: 2**20)
    status, _, err = run(capsys, "--num_samples", 64, "--max_new_tokens", 4000)
    assert status == 2
    assert "error: not enough cpu memory" in err


def test_no_compiler_is_one_line(capsys, monkeypatch, one_layer, tmp_path):
    """--compile where there is no C++ compiler."""
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where nothing is compiled yet
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        status, out, err = run(capsys, "--checkpoint_path", one_layer, "--compile", "--max_new_tokens", 2)
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert lines == ["error: --compile needs a C++ compiler: install g++ or leave it out"]


def test_a_closed_pipe_is_no_error():
    """A reader that is gone before the first word comes."""
    done = subprocess.run(
        f"{sys.executable} generate.py --num_samples 2 --max_new_tokens 4 --device cpu | true",
        cwd=ROOT, shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
