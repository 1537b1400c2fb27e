"""Mistakes as users make them: one line on stderr, exit status 2, no traceback, nothing left behind; 130 for Ctrl-C."""

import importlib
import io
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import CODE, ROOT, copy_tiny_gemma

import device as device_file
import generate as program
import interrupt
from checkpoint import convert
from text import read_prompts, read_texts

PROGRAMS = (
    "generate",
    "calibrate",
    "quantize",
    "eval",
    "benchmark",
    "convert_hf_checkpoint",
    "merge_adapter",
    "download",
)


def file_of(name: str) -> Path:
    return next(file for file in (ROOT / f"{name}.py", ROOT / "scripts" / f"{name}.py") if file.exists())


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    monkeypatch.setattr("cli.copy_bandwidth", lambda device: 1e10)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The current directory of the command lines: checkpoints `tiny` and, with FP8 weights, `fp8`, and some files."""
    directory = tmp_path_factory.mktemp("mistakes")
    tiny = copy_tiny_gemma(directory / "tiny")
    for name in ("no_tokenizer", "pipe", "binary", "huge", "tokenizer_directory", "converted_is_directory"):
        copy = directory / name
        copy.mkdir()
        for file in tiny.iterdir():
            if file.name != "tokenizer.model":
                (copy / file.name).symlink_to(file)
    os.mkfifo(directory / "pipe" / "tokenizer.model")
    (directory / "binary" / "tokenizer.model").write_bytes(bytes(range(256)) * 1000)
    with open(directory / "huge" / "tokenizer.model", "wb") as f:
        f.truncate(2**40)
    (directory / "tokenizer_directory" / "tokenizer.model").mkdir()
    (directory / "converted_is_directory" / "gemma.safetensors").mkdir()
    (directory / "empty").mkdir()
    (directory / "text.txt").write_text(CODE)
    (directory / "short.txt").write_text("x")
    (directory / "blank.txt").write_text("")
    (directory / "latin1.txt").write_bytes(b"caf\xe9\n")
    (directory / "surrogate.jsonl").write_text('{"text": "a", "meta": 1}\n\n{"text": "\\ud800"}\n')
    (directory / "typo.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b", "temprature": 1, "id": 3}\n')
    return directory


def contents(directory: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def run(capfd, monkeypatch, name: str, arguments: list[str]) -> tuple[int, str, str]:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    status = importlib.import_module(name).main(arguments)
    out, err = capfd.readouterr()
    return status, out, err


MISTAKES = [
    # names and choices
    ("generate --tempratur 1", "unrecognized arguments: --tempratur 1"),
    ("generate hello", "unrecognized arguments: hello"),
    ("generate --prompt a --interactive", "not allowed with argument"),
    ("generate --interactive --json", "--interactive takes no --json"),
    ("generate --interactive --num_samples 2", "--interactive takes no --json, --output, --profile, --num_samples"),
    ("generate --kv_cache_dtype fp8", "invalid choice: 'fp8'"),
    ("generate --precision int4", "invalid choice: 'int4'"),
    ("generate --ops triton", "invalid choice: 'triton'"),
    ("generate --device gpu", "invalid choice: 'gpu'"),
    ("generate --fp8", "--fp8 needs scaling factors"),
    ("generate --ple_device cpu", "--ple_device is for models with embeddings of each layer's own"),
    # numbers
    ("generate --max_new_tokens 0", "argument --max_new_tokens: must be a whole number, at least 1, not '0'"),
    ("generate --max_new_tokens many", "argument --max_new_tokens: must be a whole number, at least 1, not 'many'"),
    ("generate --max_new_tokens 8190", "exceeds the context of 8192"),
    (f"generate --max_new_tokens 1{'0' * 400}", "max_new_tokens must be at most"),
    ("generate --interactive --max_new_tokens 0", "argument --max_new_tokens: must be a whole number, at least 1"),
    ("generate --interactive --max_new_tokens 8190", "--max_new_tokens can be at most 8182 in a conversation of 8192"),
    ("generate --num_samples 0", "argument --num_samples: must be a whole number, at least 1"),
    ("generate --num_samples 100000000000", "num_samples must be at most"),
    ("generate --num_samples 1000000000 --max_new_tokens 8000", "not enough cpu memory: the text of 1000000000 rows"),
    ("generate --batch_size 0", "argument --batch_size: must be a whole number, at least 1"),
    ("generate --batch_size 2.5", "argument --batch_size: must be a whole number, at least 1, not '2.5'"),
    ("generate --temperature -1", "argument --temperature: must be a number, at least 0, not '-1'"),
    ("generate --temperature nan", "argument --temperature: must be a number, at least 0, not 'nan'"),
    ("generate --temperature 1e400", "argument --temperature: must be a number, at least 0, not '1e400'"),
    ("generate --top_p 0", "top_p must be a number above 0 and at most 1, not 0.0"),
    ("generate --min_p 1.5", "argument --min_p: must be a number, from 0 to 1, not '1.5'"),
    ("generate --top_k -5", "argument --top_k: must be a whole number, from 0 to 2147483647, not '-5'"),
    (f"generate --top_k 1{'0' * 400}", "argument --top_k: must be a whole number, from 0"),
    ("generate --repetition_penalty 0", "repetition_penalty must be a number above 0, not 0.0"),
    ("generate --seed 1.5", "argument --seed: invalid int value: '1.5'"),
    (f"generate --seed {'9' * 5000}", "argument --seed: invalid int value"),
    ("calibrate --window 1", "argument --window: must be a whole number, at least 2, not '1'"),
    ("calibrate --window 9000 --text text.txt", "a window of 9000 tokens exceeds the context of 8192"),
    ("calibrate --batch_size 0", "argument --batch_size: must be a whole number, at least 1, not '0'"),
    ("calibrate --max_tokens -1", "argument --max_tokens: must be a whole number, at least 1, not '-1'"),
    ("calibrate --percentile 101", "argument --percentile: must be a number, from 50 to 100, not '101'"),
    ("quantize --mode int4 --group_size 0", "argument --group_size: invalid choice: 0"),
    ("quantize --mode int4-gptq --damping 2", "argument --damping: must be a number, from 0 to 1, not '2'"),
    ("quantize --mode int4-gptq --damping nan", "argument --damping: must be a number, from 0 to 1, not 'nan'"),
    ("quantize --mode int4-gptq --window 0", "argument --window: must be a whole number, at least 2, not '0'"),
    ("quantize --mode int4-gptq --max_tokens 0", "argument --max_tokens: must be a whole number, at least 1"),
    ("quantize --mode int4-gptq --window 9000 --text text.txt", "a window of 9000 tokens exceeds the context of 8192"),
    ("eval --text text.txt --window 0", "argument --window: must be a whole number, at least 2, not '0'"),
    ("eval --text text.txt --window 9000", "a window of 9000 tokens exceeds the context of 8192"),
    ("eval --text text.txt --batch_size -1", "argument --batch_size: must be a whole number, at least 1, not '-1'"),
    ("eval --tasks x --limit 0", "argument --limit: must be a whole number, at least 1, not '0'"),
    ("benchmark cpu --repeats 0", "argument --repeats: must be a whole number, at least 1, not '0'"),
    ("benchmark sweep --batches 0", "argument --batches: must be a whole number, at least 1, not '0'"),
    # prompts and texts
    ("generate --prompt ''", "the prompt is empty"),
    ("generate --prompt a ''", "the prompt is empty"),
    ("generate --prompt -x", "expected at least one argument (write --option=-value where"),
    ("generate --prompt a\udcff", r"the prompt is not UTF-8: '\udcff' is its character 2"),
    ("generate --prompts_file nowhere.txt", "no prompts file at nowhere.txt"),
    ("generate --prompts_file tiny", "no prompts file at tiny"),
    ("generate --prompts_file blank.txt", "blank.txt holds no prompts"),
    ("generate --prompts_file latin1.txt", "latin1.txt, line 1: not UTF-8 text"),
    (
        "generate --prompts_file typo.jsonl",
        "typo.jsonl, line 3: unknown 'temprature'; known are prompt, id, max_new_tokens",
    ),
    ("calibrate --text nowhere.txt", "no text file at nowhere.txt"),
    ("calibrate --text short.txt", "there are 3 tokens of text, and at least 64 are needed"),
    ("calibrate --text latin1.txt", "latin1.txt: not UTF-8 text"),
    ("quantize --mode int4-gptq --text blank.txt", "blank.txt holds no text"),
    ("quantize --mode int4-gptq --text short.txt", "at least 256 are needed"),
    ("eval --text surrogate.jsonl", "surrogate.jsonl, line 3: not a JSON object with a string 'text'"),
    ("eval --text tiny", "no text file at tiny"),
    # checkpoints and outputs
    ("generate --checkpoint_path nowhere", "no checkpoint at nowhere"),
    ("generate --checkpoint_path ''", "argument --checkpoint_path: must be a path, not ''"),
    ("generate --checkpoint_path empty", "empty has no config.json"),
    ("generate --checkpoint_path no_tokenizer", "no tokenizer at no_tokenizer/tokenizer.model"),
    ("generate --checkpoint_path pipe", "no tokenizer at pipe/tokenizer.model"),
    ("generate --checkpoint_path tokenizer_directory", "no tokenizer at tokenizer_directory/tokenizer.model"),
    ("generate --checkpoint_path binary", "binary/tokenizer.model is cut or is no SentencePiece model"),
    ("generate --checkpoint_path huge", "huge/tokenizer.model has 1,099,511,627,776 bytes: it is not Gemma's"),
    ("generate --adapter nowhere", "no adapter at nowhere: there is no nowhere/adapter_config.json"),
    ("generate --adapter tiny", "no adapter at tiny"),
    ("generate --adapter ''", "argument --adapter: must be a path, not ''"),
    ("eval --text text.txt --adapter nowhere", "no adapter at nowhere"),
    ("generate --profile no/such/trace.json", "there is no directory no/such"),
    ("generate --profile tiny", "tiny can't be written"),
    ("generate --profile ''", "argument --profile: must be a path, not ''"),
    ("quantize --mode fp8", "fp8_scales.safetensors"),
    ("quantize --mode int8 --damping 0.1", "--damping is for --mode int4-gptq only"),
    ("quantize", "the following arguments are required: --mode"),
    ("eval", "one of the arguments --text --tasks is required"),
    ("eval --text text.txt --against nowhere", "no checkpoint at nowhere"),
    ("benchmark", "the following arguments are required: protocol"),
    ("benchmark cpu --output no/such/results.json", "there is no directory no/such"),
    ("convert_hf_checkpoint", "the following arguments are required: directory"),
    ("convert_hf_checkpoint tiny more", "unrecognized arguments: more"),
    ("convert_hf_checkpoint nowhere", "no checkpoint at nowhere"),
    ("convert_hf_checkpoint ''", "argument directory: must be a path, not ''"),
    ("convert_hf_checkpoint converted_is_directory", "gemma.safetensors can't be written"),
    ("merge_adapter", "the following arguments are required: --adapter, --output_dir"),
    ("merge_adapter --adapter nowhere --output_dir tiny", "tiny is not empty: name a new directory to export to"),
    ("merge_adapter --adapter nowhere --output_dir new", "no adapter at nowhere"),
    ("merge_adapter --adapter nowhere --output_dir text.txt/new", "text.txt/new can't be written: there is no"),
    ("download", "the following arguments are required: repo_id"),
    ("download ../gemma", "'../gemma' is not a repository id such as google/gemma-7b"),
    ("download /etc --checkpoints_dir ''", "argument --checkpoints_dir: must be a path, not ''"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[ascii(line[:60]) for line, _ in MISTAKES])
def test_a_mistake_is_one_line(capfd, monkeypatch, here, line, message):
    monkeypatch.chdir(here)
    name, *arguments = shlex.split(line)
    if name in ("generate", "calibrate", "quantize", "eval") and "--checkpoint_path" not in arguments:
        arguments += ["--checkpoint_path", "tiny"]
    before = contents(here)
    status, out, err = run(capfd, monkeypatch, name, arguments)
    assert (status, out) == (2, "")
    *notes, last = err.splitlines()
    assert all(note.startswith("note: ") for note in notes), err
    assert last.startswith("error: ")
    assert message in last
    assert contents(here) == before


@pytest.mark.parametrize("name", ["generate", "download"])
def test_help_gives_the_default_of_every_option_with_a_value(capfd, name, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        run(capfd, monkeypatch, name, ["--help"])
    assert ended.value.code == 0
    described = capfd.readouterr().out.split("options:", 1)[1].replace("\n       ", " ")
    for option in described.split("\n  -"):
        if re.match(r"-\w+ [^ ]", option):
            assert "(default: " in option, option


# --- prompts


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ('{"prompt": "a"}\n\n \n{"prompt": "b\\n"}\n\n', ["a", "b\n"]),
        ("one\ntwo", ["one", "two"]),
        ("{not json\n" + "[" * 100_000, ["{not json", "[" * 100_000]),
    ],
)
def test_prompts_come_from_files_pipes_and_stdin(tmp_path, monkeypatch, content, prompts):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_text(content)
    assert [entry["prompt"] for entry in read_prompts(file)] == prompts
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(content,))
    writer.start()
    assert [entry["prompt"] for entry in read_prompts(pipe)] == prompts
    writer.join()
    with open(file, encoding="ascii") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert [entry["prompt"] for entry in read_prompts(Path("-"))] == prompts
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="stdin, which is closed"):
        read_prompts(Path("-"))


def test_metadata_beside_a_text_is_passed_over(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"text": "a", "meta": {"url": "x"}}\n\n{"id": 3, "text": "b"}\n')
    assert read_texts(file) == ["a", "b"]


def test_prompts_of_two_options_are_all_taken(capfd, monkeypatch, here):
    options = ["--checkpoint_path", str(here / "tiny"), "--max_new_tokens", "1", "--json", "--device", "cpu"]
    _, out, _ = run(capfd, monkeypatch, "generate", ["--prompt", "a", "b", "--prompt=-1 + 2", *options])
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a", "b", "-1 + 2"]


def test_rows_are_made_as_they_come(tiny, monkeypatch):
    """A hundred million rows that fit, to a test that stops at the second batch."""
    model, tokenizer = tiny
    monkeypatch.setattr(device_file, "free_memory", lambda device: 2**50)
    steps = []

    def on_step(step, runner):
        steps.append(step)
        if steps.count(0) == 2:
            raise KeyboardInterrupt

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(KeyboardInterrupt):
        program.generate(model, [tokenizer.encode("a")], 1, num_samples=100_000_000, batch_size=2, on_step=on_step)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


# --- the profile


def test_text_comes_before_a_profile_that_cant_be_written(capfd, monkeypatch, here, tmp_path):
    """The disk is full, of which the profiler says nothing: a limit on the size of files has the same effect."""
    write, (soft, hard) = program._Trace.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_without_room(self, file):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            write(self, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(program._Trace, "write", write_without_room)
    options = ["--checkpoint_path", str(here / "tiny"), "--max_new_tokens", "2", "--device", "cpu"]
    options += ["--profile", str(tmp_path / "trace.json")]
    status, out, err = run(capfd, monkeypatch, "generate", options)
    assert status == 2
    assert out.startswith(program.DEFAULT_PROMPT)
    assert re.fullmatch(r"error: .*trace\.json can't be written: .* has no room for it", err.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


# --- standard streams


def shell(line: str, here: Path) -> tuple[int, str, str]:
    """Status and output of a shell's line, in which `generate` is the program with options that make it quick."""
    command = f"{sys.executable} {ROOT}/generate.py --checkpoint_path tiny --max_new_tokens 2 --device cpu --seed 1"
    done = subprocess.run(
        ["bash", "-c", f'generate() {{ {command} "$@"; }}; {line}'],
        cwd=here, env=os.environ | {"PYTHONUNBUFFERED": ""}, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_streams_that_are_closed_or_full(here):
    assert shell("generate >&-", here) == (2, "", "error: stdout is closed\n")
    status, out, err = shell("generate --interactive <&-", here)
    assert (status, out) == (2, "")
    assert err.endswith("error: --interactive reads stdin, which is closed\n")
    status, out, err = shell("generate >/dev/full", here)
    assert status == 2
    assert err.endswith("error: [Errno 28] No space left on device\n")
    status, out, err = shell("generate --json 2>&- <&-", here)  # no note and no figure among the results
    assert (status, err) == (0, "")
    assert set(json.loads(out)) == {"prompt", "text", "tokens", "finish_reason", "prompt_tokens"}
    assert shell("generate --help | head -c 1; exit ${PIPESTATUS[0]}", here)[:2] == (0, "u")


def test_help_into_a_full_file_is_one_line(capfd, monkeypatch):
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(capfd, monkeypatch, "generate", ["--help"]) == (2, "", "error: [Errno 28] No space left on device\n")


def through(monkeypatch, arguments: list[str], stdin: bytes = b"", encoding: str = "utf-8") -> tuple[int, str]:
    """Status and output of generate.py, whose streams are as a process has them."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    status = program.main([*arguments, "--max_new_tokens", "2", "--device", "cpu"])
    return status, out.getvalue().decode(encoding)


def test_what_stdout_cant_encode_is_escaped(monkeypatch, here):
    options = ["--checkpoint_path", str(here / "tiny"), "--prompt", "\u00e9\u6f22"]
    status, out = through(monkeypatch, options, encoding="ascii")
    assert status == 0
    assert out.startswith(r"\xe9\u6f22")
    status, out = through(monkeypatch, [*options, "--json"], encoding="ascii")
    assert json.loads(out)["prompt"] == "\u00e9\u6f22"
    assert "\u00e9\u6f22" in through(monkeypatch, [*options, "--json"])[1]


def test_a_chat_goes_on_after_a_line_that_is_no_text(monkeypatch, capfd, here):
    options = ["--checkpoint_path", str(here / "tiny"), "--interactive", "--temperature", "0"]
    status, out = through(monkeypatch, options, stdin=b"hello\n\xff\n\nhello\n")
    assert capfd.readouterr().err.endswith("error: the line is not UTF-8: '\\udcff' is its character 1\n")
    assert status == 0
    assert out == through(monkeypatch, options, stdin=b"hello\nhello\n")[1]


# --- Ctrl-C


@pytest.fixture
def interrupted_import(tmp_path):
    """An environment where importing torch or the Hub's client is when Ctrl-C is pressed."""
    for name in ("torch", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
        )
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.fixture
def with_interrupts():
    """In a shell's background job, which the tests may be, Ctrl-C is ignored, and in what they start, too."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("name", PROGRAMS)
def test_ctrl_c_while_a_program_is_imported(name, interrupted_import, with_interrupts):
    done = subprocess.run(
        [sys.executable, file_of(name), "--help"],
        env=interrupted_import, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_library_leaves_ctrl_c_alone(interrupted_import, with_interrupts):
    done = subprocess.run(
        [sys.executable, "-c", "import generate"],
        cwd=ROOT, env=interrupted_import, capture_output=True, check=False,
    )  # fmt: skip
    assert b"KeyboardInterrupt" in done.stderr


def test_ctrl_c_in_a_chat(here, with_interrupts):
    command = [sys.executable, ROOT / "generate.py", "--checkpoint_path", "tiny", "--interactive", "--device", "cpu"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*command, "--max_new_tokens", "8000"], cwd=here, **pipes) as process:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert all(line.startswith(b"note: ") for line in err.splitlines()), err


def test_ctrl_c_while_a_program_exits(tmp_path, with_interrupts):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, b"")


def test_ctrl_c_leaves_nothing_behind(capfd, monkeypatch, here):
    def interrupted(checkpoint, file, progress):
        convert(checkpoint, file, lambda n: os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr("convert_hf_checkpoint.convert", interrupted)
    before = contents(here)
    monkeypatch.setattr("interrupt.quit_at_once", lambda *_: None)  # in a program, the end
    handler = signal.signal(signal.SIGINT, interrupt.quit_at_once)
    try:
        status, out, _ = run(capfd, monkeypatch, "convert_hf_checkpoint", [str(here / "tiny")])
        assert signal.getsignal(signal.SIGINT) is interrupt.quit_at_once
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (status, out) == (130, "")
    assert contents(here) == before


def test_ignored_ctrl_c_stays_ignored(monkeypatch):
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt.silence()
        with interrupt.raised():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


# --- prepare.sh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: "),
        (["google/gemma-7b", "--checkpoints_dir", "x"], "usage: "),
        (["google/gemma-7b"], "python -m pip install -r "),
    ],
)
def test_prepare_without_its_needs_is_one_line(tmp_path, arguments, message):
    """A Python of nothing but its own library."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "prepare.sh", *arguments],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
