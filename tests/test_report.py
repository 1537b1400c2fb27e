"""`benchmark.py report`, and the peers whose rows it shows: a stand-in for vLLM, in a process of its own as vLLM is."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import benchmark
from benchmarks import checkpoints, peers, report

FAKE_VLLM = """
import json, pathlib, subprocess, sys, time

__version__ = "1.2.3"
HERE = pathlib.Path(__file__).parent

class SamplingParams:
    def __init__(self, **options):
        self.options = options

class Output:
    def __init__(self, max_tokens, n=1, **options):
        self.outputs = [self] * n
        self.token_ids = [7] * max_tokens

class LLM:
    def __init__(self, model, **options):
        self.seen = {"config": json.loads((pathlib.Path(model) / "config.json").read_text()), "options": options}
        mode = (HERE / "mode").read_text()
        if mode == "fails":
            print("a line before")
            sys.excepthook = lambda kind, error, trace: print(f"{kind.__name__}: {error}\\\\nwarning: not shut down")
            raise RuntimeError("no room for the weights")
        if mode == "hangs":
            (HERE / "pid").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
            time.sleep(60)
        self.fails, self.resets = mode == "fails at 3 samples", 0

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, settings, use_tqdm):
        self.seen |= {"prompts": prompts, "settings": settings[0].options, "resets": self.resets}
        if self.fails and settings[0].options.get("n") == 3:
            raise RuntimeError("no room for the samples")
        with open(HERE / "seen.jsonl", "a") as file:
            print(json.dumps(self.seen), file=file)
        time.sleep(0.002 * settings[0].options["max_tokens"])
        return [Output(**each.options) for each in settings]
"""


@pytest.fixture
def site(tmp_path):
    """A directory with a package vllm; its file `mode` says what it does."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM.replace("\\\\", "\\"))
    (package / "mode").write_text("works")
    return package.parent


@pytest.fixture
def latency(site, tmp_path, monkeypatch):
    """Runs protocol latency, with a row in place of our model's, and returns its JSON."""
    ours = {"model": "gemma-2b", "precision": "bf16", "name": "gemma-fast"}
    monkeypatch.setattr(benchmark, "each_model", lambda args, of_model: iter([ours]))
    monkeypatch.setitem(benchmark.PROTOCOLS, "latency", benchmark.PROTOCOLS["latency"]._replace(device="cpu"))
    figures = {"date": "2026-01-01", "device": "one CPU", "vllm": None, "copy_bandwidth_gb_per_second": 1.0}
    monkeypatch.setattr(benchmark, "environment", lambda device: figures)

    def run(*options: str) -> dict:
        output = tmp_path / "out.json"
        arguments = (
            "--models",
            "gemma-2b",
            "--precisions",
            "bf16",
            "fp8-all",
            "--repeats",
            "2",
            "--output",
            str(output),
        )
        assert benchmark.main(["latency", *arguments, *options]) == 0
        return json.loads(output.read_text())

    return run


def test_vllm_has_our_prompts_in_a_process_of_its_own(latency, site):
    result = latency("--peers", "vllm", "--vllm_site", str(site))
    assert result["vllm"] == "1.2.3"
    assert result["vllm_torch"] == torch.__version__
    assert "vllm" not in sys.modules
    ours, *rows = result["results"]
    assert ours["name"] == "gemma-fast"
    assert [(row["name"], row["precision"]) for row in rows] == [("vLLM", "bf16"), ("vLLM", "fp8-kv")]
    for row in rows:
        assert (row["batch"], row["context"], row["new_tokens"]) == (1, 128, 100)
        assert row["decode_tokens_per_second"] == pytest.approx(99 / row["decode_seconds"], rel=1e-3)
        assert row["tokens_per_second"] == pytest.approx(100 / row["seconds"], rel=1e-3)
        assert row["decode_seconds"] + row["prefill_seconds"] == pytest.approx(row["seconds"], rel=0.2)
        assert row["load_seconds"] >= 0

    calls = [json.loads(line) for line in (site / "vllm" / "seen.jsonl").read_text().splitlines()]
    assert [call["settings"]["max_tokens"] for call in calls] == [100, 1] * 6  # to warm up, two repeats; two precisions
    assert {call["options"].get("quantization") for call in calls[:6]} == {None}
    assert {(call["options"]["quantization"], call["options"]["kv_cache_dtype"]) for call in calls[6:]} == {
        ("fp8",) * 2
    }
    for call in calls:
        assert call["prompts"] == [{"prompt_token_ids": benchmark.random_prompts(1, 128, 256000)[0]}]
        assert call["settings"]["ignore_eos"]
        assert call["settings"]["temperature"] == 0
        assert (call["options"]["max_model_len"], call["options"]["enable_prefix_caching"]) == (2048, False)
        assert (call["options"]["load_format"], call["options"]["skip_tokenizer_init"]) == ("dummy", True)
        assert call["config"].items() >= benchmark.config_of_peer("gemma-2b").items()


def test_vllm_has_one_process_for_all_cases(site):
    """What was measured before it failed is kept; samples have the prefix cache, emptied before each call."""
    (site / "vllm" / "mode").write_text("fails at 3 samples")
    config, prompt = benchmark.config_of_peer("gemma-7b"), [2] * 8000
    cases = [([prompt], 20, 1), ([prompt, prompt], [20, 10], 2), ([prompt], 20, 3), ([prompt], 20, 4)]
    figures = peers.vllm_figures(config, "bf16", cases, 1, site, 30.0)
    one, two = next(figures), next(figures)
    with pytest.raises(RuntimeError, match="exit status 1: RuntimeError: no room for the samples"):
        next(figures)
    assert one["tokens_per_second"] == pytest.approx(20 / one["seconds"])
    assert two["tokens_per_second"] == pytest.approx(60 / two["seconds"])
    assert two["decode_tokens_per_second"] == pytest.approx(56 / two["decode_seconds"])
    calls = [json.loads(line) for line in (site / "vllm" / "seen.jsonl").read_text().splitlines()]
    assert [call["resets"] for call in calls] == list(range(1, 9))
    assert [call["settings"].get("n", 1) for call in calls] == [1] * 4 + [2] * 4
    assert [call["settings"]["temperature"] for call in calls] == [0.0] * 4 + [0.8] * 4
    assert calls[0]["options"]["max_model_len"] == 8020
    assert calls[0]["options"]["enable_prefix_caching"]


def test_a_peer_that_fails_leaves_our_rows(latency, site, capsys):
    (site / "vllm" / "mode").write_text("fails")
    assert [row["name"] for row in latency("--peers", "vllm", "--vllm_site", str(site))["results"]] == ["gemma-fast"]
    failure = "is left out: exit status 1: RuntimeError: no room for the weights"
    assert capsys.readouterr().err.splitlines() == [
        f"vLLM, gemma-2b {precision}, {failure}" for precision in ("bf16", "fp8-kv")
    ]


def test_a_peer_that_hangs_is_ended_with_what_it_started(latency, site, capsys):
    (site / "vllm" / "mode").write_text("hangs")
    options = ("--peers", "vllm", "--vllm_site", str(site), "--peer_timeout", "2", "--precisions", "bf16")
    assert [row["name"] for row in latency(*options)["results"]] == ["gemma-fast"]
    error = "vLLM, gemma-2b bf16, is left out: it was not done after 2 seconds (--peer_timeout)\n"
    assert capsys.readouterr().err == error
    state = Path("/proc") / (site / "vllm" / "pid").read_text() / "stat"
    for _ in range(100):  # until the system has noticed
        if not state.exists() or ") Z " in state.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the process that it started still runs")


def test_which_peers(latency, site, monkeypatch, capsys):
    def chosen(wanted=None, known=("transformers", "vllm"), vllm_site=None):
        return peers.choose("latency", known, wanted, vllm_site)

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name == "transformers" or None)
    assert chosen() == ("transformers",)
    assert capsys.readouterr().err == "vllm is not installed: it is not timed\n"
    assert chosen(vllm_site=site) == ("transformers", "vllm")
    assert chosen(["vllm"], vllm_site=site) == ("vllm",)
    assert chosen(()) == ()
    with pytest.raises(ValueError, match="--peers vllm: it is not installed"):
        chosen(["vllm"])
    with pytest.raises(ValueError, match=r"--vllm_site .* has no package vllm in it"):
        chosen(vllm_site=site / "vllm")
    assert [row["name"] for row in latency("--no_peers")["results"]] == ["gemma-fast"]
    assert peers.vllm_precisions(["int8", "fp8-all"]) == ["fp8-kv"]
    assert peers.vllm_precisions(["int4-g32"]) == []


# ---------------------------------------------------------------------------------------------------------------------
# The documents


def stale(root: Path) -> list[str]:
    """The files that are not what the command would write."""
    return [file.name for file, text in report.pages(root).items() if file.read_text(encoding="utf-8") != text]


@pytest.fixture
def root(tmp_path):
    """The documents and results of the repository, to change."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "root" / "benchmarks")
    shutil.copy(ROOT / "README.md", tmp_path / "root")
    return tmp_path / "root"


def page(root: Path) -> str:
    return report.pages(root)[root / "benchmarks" / "README.md"]


def change(root: Path, name: str, new_name: str | None = None, **figures) -> list[dict]:
    """Writes a result of the repository again, with other figures in its head, and returns its rows."""
    content = json.loads((root / "benchmarks" / name).read_text()) | figures
    (root / "benchmarks" / (new_name or name)).write_text(json.dumps(content))
    return content["results"]


def test_documents_are_what_the_command_writes():
    """If this fails: python benchmark.py report."""
    assert stale(ROOT) == []


def test_a_changed_figure_is_seen(root):
    assert stale(root) == []
    rows = change(root, "latency-h100.json")
    rows[0]["tokens_per_second"] += 10
    change(root, "latency-h100.json", results=rows)
    assert stale(root) == ["README.md", "README.md"]

    pictures = [f"benchmarks/{name}.svg" for name, _ in report.read_results(ROOT / "benchmarks")["sweep"]]
    assert report.pages(ROOT).keys() == {ROOT / name for name in ("README.md", "benchmarks/README.md", *pictures)}
    shutil.copy(ROOT / "benchmarks" / "latency-h100.json", root / "benchmarks")
    for name in ("README.md", "benchmarks/README.md", "benchmarks/sweep.svg"):
        text = (root / name).read_text()
        figure = next(cell for cell in ("165", "10,096", "10,000") if cell in text)
        (root / name).write_text(text.replace(figure, "9" + figure, 1))
        assert stale(root) == [Path(name).name]
        (root / name).write_text(text)


def test_the_command_writes_them(root, monkeypatch, capsys):
    committed = {file: file.read_text() for file in report.pages(root)}
    monkeypatch.setattr(benchmark, "ROOT", root)
    for file in committed:
        if file != root / "README.md":
            file.unlink()
    assert benchmark.main(["report"]) == 0
    assert {file: file.read_text() for file in committed} == committed
    written = sorted(str(file.relative_to(root)) for file in committed)
    assert sorted(capsys.readouterr().out.splitlines()) == [f"wrote {name}" for name in written]

    (root / "README.md").write_text("nothing\n")
    assert benchmark.main(["report"]) == 2
    (root / "benchmarks" / "cpu.json").write_text("[]")
    assert benchmark.main(["report"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"error: {root}/README.md lacks the lines {report.BEGIN} and {report.END}",
        f"error: {root}/benchmarks/cpu.json holds no results of benchmark.py",
    ]


def test_results_that_are_missing_leave_their_section_out(root):
    for file in sorted((root / "benchmarks").glob("*.json")):
        assert f"[{file.name}]" in page(root)
        file.unlink()
        assert f"[{file.name}]" not in page(root)
        assert f"benchmark.py {file.stem} " not in page(root)
    assert page(root) == report.INTRODUCTION
    assert "| gemma-7b |" not in report.pages(root)[root / "README.md"]


def test_another_gpu_and_vllm(root):
    """Each file is a table of its own; the headline is of the GPU where vLLM was measured."""
    for protocol in ("latency", "tutorial"):
        rows = change(root, f"{protocol}.json")
        first = next(row for row in rows if row["model"] == "gemma-7b") | {"seconds": 0.5, "tokens_per_second": 12345.0}
        rows += [first | {"precision": "fp8-kv"}] if protocol == "latency" else []
        rows += [first | {"name": "vLLM", "precision": name, "load_seconds": 99.5} for name in ("bf16", "fp8-kv")]
        change(root, f"{protocol}.json", f"{protocol}-h100.json", device="NVIDIA H100", results=rows, vllm="0.26.0")
    text = page(root)
    assert text.index("[latency.json](latency.json): NVIDIA H200") < text.index(
        "[latency-h100.json](latency-h100.json): "
    )
    assert "transformers 5.17.0, vllm 0.26.0. A large copy" in text
    assert "--peers transformers vllm --output benchmarks/latency-h100.json" in text
    assert "99.5 s for vLLM with gemma-7b in BF16 and 99.5 s for vLLM with gemma-7b in FP8 layers, E4M3 cache." in text
    headline = report.headline(report.read_results(root / "benchmarks")).splitlines()
    assert headline[0] == "| gemma-7b | weights | unit | gemma-fast | vLLM | transformers |"
    assert headline[2].endswith("| BF16 | tokens/s | 230 | 12,345 | 124 |")
    assert headline[3].endswith("| FP8 | tokens/s | 12,345 | 12,345 |  |")
    assert headline[4].endswith("| BF16 | seconds | 3.46 | 0.50 | 5.95 |")
    assert headline[5].endswith("| FP8 | seconds | 2.10 | 0.50 |  |")
    assert "Measured on one NVIDIA H100, 2026-11-21;" in headline[7]


def test_the_headline_says_what_several_gpus_gain():
    row = {"model": "gemma-7b", "name": report.OURS, "batch": 1, "copies": 1}
    files = []
    for date, device, gpus, found in (
        ("2026-11-02", "GPU A", 2, {"bf16": 1.5, "fp8-all": 1.25}),
        ("2026-11-01", "GPU A", 2, {"bf16": 1.1, "fp8-all": 1.1}),
        ("2026-11-01", "GPU A", 4, {"bf16": 2.5, "fp8-all": 2.0}),
        ("2026-11-03", "GPU B", 2, {"bf16": 1.9}),
    ):
        results = [row | {"gpus": 1, "precision": name, "gain": 1.0} for name in found]
        results += [row | {"gpus": gpus, "precision": name, "gain": gain} for name, gain in found.items()]
        files.append(("x", {"date": date, "device": device, "results": results}))
    expected = "2 and 4 GPU As decode one text 1.50 and 2.50 × as fast as one in BF16, 1.25 and 2.00 × in FP8."
    assert report.gains(files, "gemma-7b") == f" {expected}"
    assert report.gains(files[-1:], "gemma-7b") == " 2 GPU Bs decode one text 1.90 × as fast as one in BF16."
    assert report.gains(files, "gemma-2b") == report.gains([], "gemma-7b") == ""


def test_rows_that_a_protocol_gains_are_shown(root):
    rows = change(root, "prefill.json")
    measured = [row for row in rows if row.get("ops") == "kernels"]
    gained = [row | {"ops": ops} for row in measured for ops in ("kernels", "te")]
    first = f"{measured[0]['tokens_per_second']:,.0f} ({100 * measured[0]['share_of_matrix_product']:.0f} %)"
    change(root, "prefill.json", results=[*rows[:2], *gained, gained[-1] | {"model": "gemma-3-1b", "context": 77777}])
    text = page(root)
    assert "| model | weights and cache | operations | `--compile_prefill` | 1 × 512 |" in text
    assert f"| gemma-7b | BF16 | te | no | {first} |" in text
    assert "| gemma-3-1b | FP8 layers | te | yes |" in text
    assert "8 × 77,777 |" in text
    assert "--models gemma-7b gemma-3-1b --precisions bf16 fp8 --ops kernels te --" in text

    content = {"protocol": "energy", "results": [{"model": "gemma-2b", "joules": 12.3456}]}
    change(root, "cpu.json", "energy.json", repeats=3, **content)
    assert "## energy\n" in page(root)
    assert "| model | joules |\n| --- | --- |\n| gemma-2b | 12.35 |" in page(root)


def test_many_requests_of_several_shapes(root):
    """The headline has the mixed ones."""
    rows = change(root, "throughput-h100.json")
    assert "benchmark.py throughput --models gemma-7b --precisions bf16 fp8-kv --shapes mixed --peers vllm" in page(
        root
    )
    before = report.headline(report.read_results(root / "benchmarks"))
    peer = rows[0] | {"name": "transformers, continuous batching", "tokens_per_second": 1234.0}
    rows = [rows[0] | {"shape": "128/128", "tokens_per_second": 9999.0}, *rows, peer]
    change(root, "throughput-h100.json", results=rows)
    assert "--shapes 128/128 mixed --peers transformers vllm" in page(root)
    assert "| model | weights and cache | program | prompt/new tokens | seconds |" in page(root)
    assert f"| gemma-7b | BF16 | gemma-fast | 128/128 | {rows[0]['seconds']:.2f} | 9,999 |" in page(root)
    after = report.headline(report.read_results(root / "benchmarks"))
    figures = " | ".join(f"{row['tokens_per_second']:,.0f}" for row in rows[1:-1] if row["precision"] == "bf16")
    assert before.count(f"| {figures} |  |") == 1
    assert after == before.replace(f"| {figures} |  |", f"| {figures} | 1,234 |")

    change(root, "throughput-h100.json", "throughput-later.json", results=rows[:1], date="2099-01-01")
    assert report.headline(report.read_results(root / "benchmarks")) == after


def test_samples_prefix_cache_and_beams(root):
    def write(protocol: str, results: list[dict]):
        results = [{"model": "gemma-7b", "precision": "bf16", "name": "gemma-fast"} | row for row in results]
        change(root, "cpu.json", f"{protocol}-h100.json", protocol=protocol, results=results, repeats=2)

    rows = [
        {"samples": n, "context": 8000, "new_tokens": 128, "decode_tokens_per_second": 150.4 * n, "step_ms": 6.649}
        | {"prefill_seconds": 0.5, "prefill_of_one": 1.0}
        for n in (1, 16)
    ]
    step = rows[1].pop("step_ms")
    write("samples", [*rows, rows[1] | {"name": "vLLM", "prefill_of_one": 2.5, "step_ms": step}])
    text = page(root)
    assert (
        "samples --models gemma-7b --precisions bf16 --batches 16 --peers vllm --repeats 2 "
        "--output benchmarks/samples-h100.json" in text
    )
    assert "by samples: 8,000 prompt tokens, 128 new." in text
    assert "| gemma-7b | BF16 | gemma-fast | 150 (6.6 ms) | 2,406 |\n" in text
    assert "| gemma-7b | BF16 | vLLM |  | 0.50 (2.50 ×) |\n" in text

    row = {"requests": 256, "context": 2100, "shared_tokens": 2000, "new_tokens": 8, "seconds": 2.0}
    write("prefix-cache", [row | {"uncached_seconds": 16.0, "gain": 8.0}])
    assert "| gemma-7b | BF16 | gemma-fast | 256 | 2,100 | 2,000 | 8 | 2.00 | 16.00 | 8.00 × |\n" in page(root)
    row = {"requests": 16, "context": 256, "beams": 4, "new_tokens": 4096, "seconds": 2.0, "requests_per_second": 8.0}
    write("beams", [row])
    assert "| gemma-7b | BF16 | gemma-fast | 16 | 256 | 4 | 4,096 | 2.00 | 8.00 |\n" in page(root)
    assert "python benchmark.py beams --models gemma-7b --precisions bf16 --repeats 2 --output" in page(root)


def test_the_memory_of_a_case_that_failed(root):
    rows = change(root, "memory.json")
    failed = {"model": "gemma-7b", "precision": "fp8", "batch": 64, "expandable_segments": True, "failed": 1}
    change(root, "memory.json", results=[*rows, failed])
    assert "| gemma-7b | FP8 layers | 64 | yes |  |  |  |  |  | 1 |  |\n" in page(root)


def test_every_protocol_and_format_has_its_words():
    assert report.SECTIONS.keys() == benchmark.PROTOCOLS.keys()
    assert report.PRECISIONS.keys() == checkpoints.PRECISIONS.keys()


def test_a_report_needs_no_pytorch():
    code = "import sys; from benchmarks import peers, report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
