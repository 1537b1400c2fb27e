"""Several ranks as processes: what they make together, and how they end when one of them doesn't go on."""

import inspect
import io
import json
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from conftest import ROOT, TINY_GEMMA, made_once

import generate as program
import parallel
from beams import beam_search
from benchmarks import report
from benchmarks.report import OURS
from generate import generate
from speculate import DraftModel, PromptLookup

PROMPTS = [[2, 17, 5, 99, 3], [2, 8], [2, *range(20, 50)]]
OPTIONS = ["--device", "cpu", "--precision", "fp32", "--seed", "6", "--max_new_tokens", "8"]
FROM_STDIN = ["--prompts_file", "-", "--num_samples", "2", "--json"]
CHAT = ["--interactive", "--prompt_lookup"]
TEXT = "def f(\nimport os\n"


def results(model) -> list:
    rows = dict(batch_size=2, stop_ids=())
    return [
        generate(model, PROMPTS, 8, temperature=0, **rows),
        generate(model, PROMPTS, 8, temperature=1.0, top_p=0.9, min_p=0.01, seed=5, num_samples=2, **rows),
        generate(model, PROMPTS, 8, temperature=1.0, seed=5, drafter=PromptLookup(), **rows),
        generate(model, PROMPTS, 8, temperature=1.0, seed=5, drafter=DraftModel(model), speculate_k=3, **rows),
        beam_search(model, PROMPTS, 4, num_beams=3, stop_ids=()),
    ]


# How ranks end of which the second one does something in its 20th step
ENDS = {
    "raises": "raise KeyError('a bug')",
    "refuses": "raise ValueError('a mistake')",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "time.sleep(100)",
    "is interrupted": "os.kill(os.getpid(), signal.SIGINT)",
}
STEPS = """
import argparse, os, signal, sys, time
import cli, ranks
ranks.TOLD, ranks.ALIVE, ranks.SECONDS["decoding"] = 0.1, 2, 2
def run(args):
    with ranks.joined(argparse.Namespace(tp={tp}, device="cpu")) as (all, sums):
        for step in range(1, 2000):
            all.on_step(step)
            if all.rank == 1 and step == 20:
                {does}
            time.sleep(0.01)
            if sums:
                sums.agreed(step)
sys.exit(cli.run_program(run, argparse.ArgumentParser(), []))
"""
PROGRAMS = f"""
import io, json, os, sys, tempfile, warnings
from contextlib import redirect_stderr, redirect_stdout
import cli, generate as program
import eval as evaluation
from beams import beam_search
from generate import generate, load_model
from parallel import close, init
from speculate import DraftModel, PromptLookup
PROMPTS = {PROMPTS}
{inspect.getsource(results)}
def run(*argv, stdin="", of=program):
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO((stdin if os.environ["RANK"] == "0" else "not mine").encode()))
    with redirect_stdout(out), redirect_stderr(err):
        status = of.main(["--tp", "2", *argv])
    found.append((status, out.getvalue(), err.getvalue()))
cli.copy_bandwidth = lambda device: 1e10
found, options, rank = [], {OPTIONS}, int(os.environ["RANK"])
run(*options, "--top_k", str(rank + 3))
run(*options)
run(*options, *{FROM_STDIN}, stdin={TEXT!r})
run(*options, *{CHAT}, stdin={TEXT!r})
run("--device", "cpu", "--precision", "fp32", "--text", "requirements.txt", "--window", "16", "--json", of=evaluation)
warnings.simplefilter("ignore")
sums = init(2, "cpu")
model, _ = load_model({str(TINY_GEMMA)!r}, device="cpu", precision="fp32", sums=sums)
found += results(model), generate(model, PROMPTS, 8, temperature=1.0)
close(sums)
print(json.dumps(found))
"""
REPLICAS = """
import sys
import cli, generate as program
cli.copy_bandwidth = lambda device: 1e10
sys.exit(program.main(["--tp", "2", "--prompts_file", {prompts!r}, "--output", {output!r}, *{options}]))
"""
BENCHMARK = """
import sys
from functools import partial
import benchmark
from config import NAMED_CONFIGS
generate = benchmark.generate
benchmark.generate = lambda *arguments, compile, **options: generate(*arguments, **options)
benchmark.copy_bandwidth, benchmark.request_lengths = (lambda device: 1e10), (lambda count, shape: [(9, 4)] * count)
rows = partial(benchmark.parallel, new_tokens=4, prompt_tokens=16, requests=8)
benchmark.PROTOCOLS["parallel"] = benchmark.PROTOCOLS["parallel"]._replace(device="cpu", rows=rows)
NAMED_CONFIGS["tiny"] = (1, 1, 64, 128, 4, 2, 32, None, 32, 1.0, 512, 4096)
options = ["--models", "tiny", "--precisions", "bf16", "int4-g32", "--batches", "1", "--repeats", "1"]
sys.exit(benchmark.main(["parallel", *options, "--no_peers", "--output", {output!r}]))
"""


def write_prompts(directory: Path):
    lines = [{"prompt": f"def f{i}(", "num_samples": 1 + i % 2, "max_new_tokens": 10 + i} for i in range(6)]
    lines.insert(3, {"prompt": "long", "max_new_tokens": 9000})
    (directory / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))


def run_cases(prompts: Path, directory: Path):
    """Runs the processes of all cases and writes what they have ended with."""
    cases = {what: (2, STEPS.format(tp=2, does=does)) for what, does in ENDS.items()}
    cases["copy hangs"] = 2, STEPS.format(tp=1, does=ENDS["hangs"])
    cases["programs"] = 2, PROGRAMS
    files = dict(prompts=str(prompts), output=str(directory / "out.jsonl"))
    cases["replicas"] = 4, REPLICAS.format(options=[*OPTIONS, "--batch_size", "2"], **files)
    cases["benchmark"] = 2, BENCHMARK.format(output=str(directory / "parallel.json"))
    (directory / "ran.json").write_text(json.dumps(processes.run(cases)))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    return made_once(tmp_path_factory, "prompts_of_processes", write_prompts) / "prompts.jsonl"


@pytest.fixture(scope="session")
def directory(tmp_path_factory, prompts):
    """Where they have run, once for all of xdist's workers."""
    return made_once(tmp_path_factory, "processes", partial(run_cases, prompts))


@pytest.fixture(scope="session")
def ran(directory):
    """What they have ended with."""
    found = json.loads((directory / "ran.json").read_text())
    return {name: [tuple(each) for each in ranks] for name, ranks in found.items()}


ENDED = {
    "raises": (1, 1, "rank 1 on HOST has failed: KeyError: 'a bug'"),
    "refuses": (1, 2, "rank 1 on HOST has failed: a mistake"),
    "is killed": (2, -9, "rank 1 on HOST is gone: it was decoding, "),
    "hangs": (1, 1, "rank 1 on HOST did nothing for "),
    "is interrupted": (130, 130, None),
    "copy hangs": (1, 1, "rank 1 on HOST did nothing for "),
}


@pytest.mark.parametrize("what", ENDED)
def test_all_ranks_end_when_one(what, ran):
    (status, _, error), (other_status, _, other_error) = ran[what]
    expected_status, expected_other, line = ENDED[what]
    assert (status, other_status) == (expected_status, expected_other), error + other_error
    assert error.count("\n") == (line is not None), error
    if line is not None:
        assert error.startswith(f"error: {line.replace('HOST', socket.gethostname())}"), error
    if what in ("refuses", "hangs", "copy hangs"):
        assert other_error.startswith("error: ") and other_error.count("\n") == 1, other_error


def test_what_ranks_of_one_model_make(ran, tiny, capsys, monkeypatch):
    (status, out, err), (other_status, other_out, other_err) = ran["programs"]
    assert (status, other_status) == (0, 0), err + other_err
    *programs, of_all, unseeded = json.loads(out)
    *others, of_other, other_unseeded = json.loads(other_out)
    message = "error: --top_k has to be the same on all ranks: it is 3 on rank 0 and 4 on rank 1\n"
    assert programs[0] == others[0] == [2, "", message]
    assert all(each == [0, "", ""] for each in others[1:])
    assert of_all == of_other == results(tiny[0])
    assert unseeded == other_unseeded
    monkeypatch.setattr("cli.copy_bandwidth", lambda device: 1e10)
    for (status, out, err), options in zip(programs[1:4], ([], FROM_STDIN, CHAT)):
        stdin(monkeypatch, TEXT)
        assert program.main([*OPTIONS, *options]) == 0
        assert (status, out) == (0, capsys.readouterr().out)
        assert options == CHAT or "first of 2 ranks, on CPU" in err
    assert json.loads(programs[4][1])["perplexity"] > 1


def stdin(monkeypatch, text: str):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_replicas_that_ranks_share_write_what_one_process_writes(ran, directory, prompts, monkeypatch, tmp_path):
    assert [status for status, *_ in ran["replicas"]] == [0] * 4, ran["replicas"]
    monkeypatch.setattr("cli.copy_bandwidth", lambda device: 1e10)
    one = tmp_path / "one.jsonl"
    assert program.main(["--prompts_file", str(prompts), "--output", str(one), *OPTIONS, "--batch_size", "2"]) == 0
    assert one.read_text() == (directory / "out.jsonl").read_text()
    assert not [*directory.glob("*.partial")]
    (_, printed, figures), *others = ran["replicas"]
    assert printed == "" and "all 4 ranks: " in figures and "first of 2 ranks" in figures
    assert [each[1:] for each in others] == [("", "")] * 3


def test_benchmark(ran, directory):
    (status, printed, error), (other_status, *other) = ran["benchmark"]
    assert (status, other_status, *other) == (0, 0, "", ""), error
    content = json.loads((directory / "parallel.json").read_text())
    rows = content["results"]
    parts = "product, sum and norm", "product and norm", "sum and norm", "norm"
    assert [row["name"] for row in rows if "us" in row] == [*[f"{OURS}, {part}" for part in parts], "all_reduce"]
    rows = rows[4:]
    found = [(row["precision"], row["gpus"], row["copies"], row["name"], "shape" in row) for row in rows[1:]]
    kinds = (OURS, False), (f"{OURS}, prefill", False), (OURS, True)
    made = [(1, 1, *kind) for kind in kinds] + [(2, 1, *kind) for kind in kinds[:2]] + [(2, 2, *kinds[2])] * 2
    assert found == [(name, *each) for name in ("bf16", "int4-g32") for each in made]
    assert all(row["gain"] > 0 for row in rows[1:]) and printed
    table = report.parallel(rows)
    assert "| 1 × 64, 2 GPUs |" in table and table.count(" × |\n") == len(rows) - 1
    command = "torchrun --standalone --nproc_per_node 2 benchmark.py parallel --models tiny --precisions bf16 "
    assert report.command("x", content, False).startswith(f"{command}int4-g32 --batches 1 --no_peers")


def test_one_process_has_nothing_of_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ranks", None)  # its import fails
    monkeypatch.setattr(parallel, "store_of", lambda *_: pytest.fail("a store"))
    monkeypatch.setattr("cli.copy_bandwidth", lambda device: 1e10)
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        assert program.main(["--device", "cpu", "--max_new_tokens", "1"]) == 0


# --- GPUs

several_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def torchrun(*command: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.cuda
@several_gpus
@pytest.mark.parametrize("options", [[], ["--compile"], ["--compile", "--prompt_lookup", "--num_samples", "3"]])
def test_two_gpus_draw_what_one_does(options, capsys):
    options = ["--precision", "fp32", "--seed", "6", "--max_new_tokens", "60", "--json", *options]
    ran = torchrun("generate.py", "--tp", "2", *options)
    assert ran.returncode == 0, ran.stderr
    assert program.main(options) == 0
    assert ran.stdout == capsys.readouterr().out


@pytest.mark.cuda
@several_gpus
def test_what_two_gpus_send_goes_in_pieces(tmp_path, capsys):
    program_of_few_rows = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport generate, parallel\n"
    program_of_few_rows += "parallel.MAIL_ROWS = 16\nsys.exit(generate.main(sys.argv[1:]))\n"
    (tmp_path / "program.py").write_text(program_of_few_rows)
    options = ["--precision", "fp32", "--prompt", "One day, " * 30, "--max_new_tokens", "20", "--temperature", "0"]
    ran = torchrun(str(tmp_path / "program.py"), "--tp", "2", *options)
    assert ran.returncode == 0, ran.stderr
    assert program.main(options) == 0
    assert ran.stdout == capsys.readouterr().out


@pytest.mark.cuda
@several_gpus
@pytest.mark.parametrize("does", ["time.sleep(300)", "os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError('no')"])
def test_gpus_do_not_wait_for_ever(does, tmp_path):
    (tmp_path / "program.py").write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import generate, ranks, runner
ranks.SECONDS["decoding"], step = 5, runner.Runner.step
def broken(self, *arguments, **options):
    if os.environ["RANK"] == "1" and self.events > 20:
        {does}
    return step(self, *arguments, **options)
runner.Runner.step = broken
sys.exit(generate.main(["--tp", "2", "--compile", "--max_new_tokens", "500", "--batch_size", "1"]))
""")
    begun = time.monotonic()
    ran = torchrun(str(tmp_path / "program.py"))
    assert ran.returncode and time.monotonic() - begun < 120
    assert "KILL" in does or "error: rank 1 on " in ran.stderr or "error: no" in ran.stderr, ran.stderr
