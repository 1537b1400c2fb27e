"""benchmark.py: what of it needs no GPU."""

import argparse
import gc
import json
import math
import shlex
import subprocess
import time
import weakref
import xml.dom.minidom
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, copy_tiny_gemma, small_model
from safetensors.torch import load_file, save_file

import benchmark
import calibrate
import eval as evaluation
import quantize
from benchmarks import checkpoints, peers, report, training
from benchmarks.report import OURS
from checkpoint import open_checkpoint, read_config
from cli import Stats
from config import NAMED_CONFIGS
from files import read_header
from finetune import Workers
from formats import Weight
from generate import generate, load_model
from model import Transformer
from runner import Runner
from speculate import PromptLookup

CPU = torch.device("cpu")
CUDA_PROTOCOLS = [name for name, protocol in benchmark.PROTOCOLS.items() if protocol.device == "cuda"]


@pytest.fixture
def tiny(monkeypatch):
    """The arguments of a run on a model of two layers."""
    monkeypatch.setitem(NAMED_CONFIGS, "tiny", (1, 2, 64, 128, 4, 2, 32, None, 32, 1.0, 512, 256))
    return argparse.Namespace(
        device=CPU,
        models=["tiny"],
        precisions=["bf16", "fp8-all"],
        repeats=1,
        bandwidth=1e10,
        peers=(),
        vllm_site=None,
        peer_timeout=60.0,
        ops=None,
        batches=None,
        shapes=None,
    )


@pytest.fixture
def eager(monkeypatch):
    """Our runs are not compiled, which on a CPU takes long; what each call got is in the list."""
    calls = []

    def uncompiled(model, prompts, new_tokens, *, compile, **options):
        calls.append((prompts, new_tokens, options))
        return generate(model, prompts, new_tokens, **options)

    monkeypatch.setattr(benchmark, "generate", uncompiled)
    return calls


@pytest.fixture
def trained(tmp_path):
    """tiny-gemma, cut to its first layer."""
    directory = copy_tiny_gemma(tmp_path / "one-layer")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = load_file(directory / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, directory / "model.safetensors")
    return directory


def test_training_rows(monkeypatch):
    """Steps of all weights and of adapters, and transformers' beside them, on a CPU that passes for a GPU."""
    monkeypatch.setattr(training, "workers", lambda device: nullcontext(Workers(0, 1, CPU)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**40))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setitem(NAMED_CONFIGS, "tiny", (1, 1, 64, 128, 4, 2, 32, None, 32, 1.0, 512, 4096))
    args = argparse.Namespace(models=["tiny"], precisions=["bf16"], peers=("transformers",), repeats=1)
    rows = list(training.training(args, ((32, 3),), rank=2))
    assert [(row["name"], row["trained"]) for row in rows][::2] == [(OURS, "all"), (OURS, "adapters of rank 2")]
    assert {row["name"] for row in rows[1::2]} == {"transformers"}
    for row in rows:
        assert row["batch"] == 3 and row["length"] == 32 and row["mfu"] > 0
        assert row["tokens_per_second"] == pytest.approx(96 / row["seconds"], rel=1e-3)
    assert rows[0]["flop"] > rows[2]["flop"] > 0.6 * rows[0]["flop"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("protocol", CUDA_PROTOCOLS)
def test_no_gpu(protocol, capsys):
    assert benchmark.main([protocol]) == 2
    assert capsys.readouterr().err == f"error: protocol {protocol} needs a CUDA GPU\n"


def test_help_names_every_protocol(capsys):
    with pytest.raises(SystemExit) as help_asked:
        benchmark.main(["--help"])
    assert help_asked.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n{name}: " in out for name in benchmark.PROTOCOLS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nonsense", "invalid choice: 'nonsense'"),
        ("latency --picture a.svg --ops te", "error: latency takes no --ops, --picture"),
        ("sweep --no_peers", "sweep takes no --no_peers"),
        ("report --models gemma-2b --repeats 5", "report takes no --models, --repeats"),
        ("cpu --peers vllm", "--peers vllm: protocol cpu has no such peer, only transformers"),
        ("cpu --peers transformers --no_peers", "--no_peers: not allowed with argument --peers"),
        ("cpu --vllm_site .", "cpu takes no --vllm_site"),
        ("latency --peer_timeout 0", "--peer_timeout: must be a number, at least 1, not '0'"),
        ("latency --peer_timeout inf", "--peer_timeout: must be a number, at least 1, not 'inf'"),
        ("cpu --repeats 0", "--repeats: must be a whole number, at least 1, not '0'"),
        ("sweep --batches 8 0", "--batches: must be a whole number, at least 1, not '0'"),
        ("sweep --text a.txt", "sweep takes no --text"),
        ("samples --shapes mixed", "samples takes no --shapes"),
        ("throughput --shapes 64/64", "--shapes: invalid choice: '64/64'"),
        ("beams --batches 8", "beams takes no --batches"),
        ("weights --text a.txt --calibration_text b.txt", "need one another: --checkpoint_path is missing"),
        ("weights --checkpoint_path a --calibration_text b.txt", "need one another: --text is missing"),
        ("cpu --output ''", "--output: must be a path, not ''"),
        ("weights --checkpoint_path DIR --text /dev/null --calibration_text b.txt", "no text file at /dev/null"),
        ("weights --checkpoint_path a --text a.txt", "need one another: --calibration_text is missing"),
        ("weights --checkpoint_path nowhere --text a.txt --calibration_text b.txt", "no checkpoint at nowhere"),
        ("weights --checkpoint_path DIR DIR/nowhere --text a.txt --calibration_text b.txt", "nowhere"),
        ("weights --checkpoint_path DIR --text nowhere.txt --calibration_text b.txt --precisions int8", "nowhere.txt"),
        (
            "weights --checkpoint_path DIR --text DIR/config.json --calibration_text nowhere.txt --precisions fp8",
            "nowhere.txt",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message, trained, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "environment", lambda device: {"copy_bandwidth_gb_per_second": 1.0})
    try:
        status = benchmark.main(shlex.split(arguments.replace("DIR", str(trained))))
    except SystemExit as ended:  # by the program that told
        status = ended.code
    out, err = capsys.readouterr()
    assert status == 2
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert "|" not in out


def test_tutorial_prompts():
    prompts = benchmark.tutorial_prompts(64, 20, 1000)
    assert prompts == benchmark.tutorial_prompts(64, 20, 1000)
    assert {len(prompt) for prompt in prompts} == set(range(2, 21))
    assert all(prompt[0] == 2 and min(prompt[1:]) >= 10 for prompt in prompts)


def test_floor_and_share():
    """A step reads 8 GB: at 4 TB/s that takes 2 ms, half of what it took."""
    runs = [Stats(0, 0.1, seconds, 256, 202, 2, 100, 800 * 10**9) for seconds in (0.4, 0.3, 0.5)]
    figures = benchmark.decode_figures(runs, 4e12)
    assert figures["step_ms"] == pytest.approx(4)
    assert figures["floor_ms"] == pytest.approx(2)
    assert figures["share_of_copy_bandwidth"] == pytest.approx(0.5)
    assert figures["decode_tokens_per_second"] == pytest.approx(500)
    assert figures["decode_spread"] == pytest.approx([400, 200 / 0.3])


def test_bytes_of_a_step_are_weights_and_valid_cache(tiny):
    model, kv_dtype = benchmark.random_model("tiny", "fp8-all", CPU)
    stats = benchmark.ours(model, benchmark.random_prompts(3, 20, 512), 11, kv_cache_dtype=kv_dtype)()
    assert (stats.rows, stats.steps, stats.new_tokens) == (3, 10, 33)
    assert stats.bytes_read == 10 * (model.weight_bytes + 3 * 25 * 2 * 2 * 2 * 32)  # rows, tokens, K and V, layers, ...


def test_one_model_is_in_memory_at_a_time(tiny, monkeypatch):
    models, make = [], benchmark.random_model

    def watched(*arguments):
        assert all(model() is None for model in models)
        model, kv_dtype = make(*arguments)
        models.append(weakref.ref(model))
        return model, kv_dtype

    monkeypatch.setattr(benchmark, "random_model", watched)

    def of_model(model, kv_dtype, case):
        run = benchmark.ours(model, [[2, 3]], 2, kv_cache_dtype=kv_dtype)
        yield from benchmark.measure(tiny, {"ours": run}, case | {"batch": 1, "new_tokens": 2})

    assert [row["precision"] for row in benchmark.each_model(tiny, of_model)] == ["bf16", "fp8-all"]
    assert len(models) == 2


def test_prefill_rows(tiny, monkeypatch):
    monkeypatch.setitem(NAMED_CONFIGS, "tiny", (1, 1, *NAMED_CONFIGS["tiny"][2:]))  # a layer less to compile
    tiny.precisions, tiny.ops = ["bf16"], ["torch"]
    peak, eager, compiled = benchmark.prefill(tiny, shapes=((2, 16),), matrix_size=64)
    assert eager["ops"] == "torch"
    assert not eager["compile_prefill"]
    assert compiled["compile_prefill"]
    assert eager["share_of_matrix_product"] == pytest.approx(
        eager["tflop_per_second"] / peak["tflop_per_second"], rel=1e-3
    )
    assert eager["tokens_per_second"] == pytest.approx(32 / eager["seconds"], rel=1e-3)


def test_prefill_flop_of_gemma_7b():
    """7.751 B parameters in the layers."""
    with torch.device("meta"):
        model = benchmark.Transformer(benchmark.ModelConfig.from_name("gemma-7b"))
    layers, attention = 2 * 7.751e9 * 2048, 2 * 2048**2 * 16 * 256 * 28
    assert benchmark.prefill_flop(model, 3, 2048) == pytest.approx(3 * (layers + attention), rel=1e-3)


def test_prefill_flop_of_models_whose_layers_differ():
    """26B-A4B: 3.82 B parameters a token with the head, of which 0.74 B are the head's; E2B's last 20 layers compute a
    token."""
    with torch.device("meta"):
        experts, shared = (
            benchmark.Transformer(benchmark.ModelConfig.from_name(f"gemma-4-{name}")) for name in ("26B-A4B", "E2B")
        )
    assert benchmark.prefill_flop(experts, 1, 1) == pytest.approx(2 * 3.08e9, rel=0.01)
    own = sum(
        math.prod(weight.shape)
        for layer in shared.layers[:15]
        for weight in layer.modules()
        if isinstance(weight, Weight)
    )
    attention = 15 * 4 * 8 * 256 * 2000**2
    assert 2 * own * 2000 < benchmark.prefill_flop(shared, 1, 2000) < 2 * own * 2000 + attention


@pytest.mark.parametrize("name", list(NAMED_CONFIGS))
def test_peers_get_the_same_sizes(name):
    config = benchmark.ModelConfig.from_name(name)
    assert benchmark.ModelConfig.from_hf(peers.hf_config(config)) == config


SHAPES = {"8/4": 5, "20/2": 3}


def test_throughput_of_each_shape(tiny, eager, capsys):
    """Whose tokens transformers' continuous batching makes, too."""
    tiny.precisions, tiny.peers, tiny.peer_timeout = ["bf16"], ("transformers",), 60.0
    rows = list(benchmark.throughput(tiny, SHAPES))
    assert capsys.readouterr().err == ""
    assert [(row["name"], row["shape"]) for row in rows] == [
        (name, shape) for name in ("gemma-fast", "transformers, continuous batching") for shape in SHAPES
    ]
    for row in rows:
        count = SHAPES[row["shape"]]
        prompt, new = map(int, row["shape"].split("/"))
        assert (row["requests"], row["prompt_tokens"], row["new_tokens"]) == (count, count * prompt, count * new)
        assert row["tokens_per_second"] == pytest.approx(count * new / row["seconds"], rel=1e-3)
    assert all(options["prefix_cache"] is False for _, _, options in eager)

    tiny.shapes, tiny.batches, tiny.peers = ["20/2"], [2, 3], ()
    assert [(row["shape"], row["batch"]) for row in benchmark.throughput(tiny, SHAPES)] == [("20/2", 2), ("20/2", 3)]


def test_lengths_of_requests():
    """The mixed ones are those of the figures that are published."""
    lengths = benchmark.request_lengths(512, "mixed")
    assert tuple(map(sum, zip(*lengths))) == (105573, 136335)
    assert benchmark.request_lengths(2, "1024/128") == [(1024, 128)] * 2
    assert [len(prompt) for prompt in benchmark.prompts_of_lengths([3, 9, 5], 100)] == [3, 9, 5]


def no_memory(manager):
    raise MemoryError("9 bytes are more than 1")


@pytest.mark.parametrize(
    ("name", "function", "told"),
    [
        ("get_result", lambda self, timeout: argparse.Namespace(error="no room\nfor it"), "RuntimeError: no room"),
        (
            "get_result",
            lambda self, timeout: argparse.Namespace(request_id=time.time(), error=None, generated_tokens=[1]),
            "RuntimeError: 6 tokens were asked for, 3 came",
        ),
        ("start", lambda self: None, "RuntimeError: it ended: None"),
        ("warmup", no_memory, "MemoryError: 9 bytes are more than 1"),
        ("get_result", lambda self, timeout: time.sleep(0.1), "it was not done after 0.3 seconds (--peer_timeout)"),
    ],
)
def test_a_failure_of_continuous_batching_is_told(tiny, monkeypatch, capsys, name, function, told):
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    monkeypatch.setattr(gc, "collect", lambda: None)  # most of the time
    monkeypatch.setattr(ContinuousBatchingManager, name, function)
    tiny.peers, tiny.peer_timeout = ("transformers",), 0.3
    prompts_of = partial(benchmark.random_prompts, 3, 20)
    case = benchmark.Case(prompts_of, {"shape": "20/2", "requests": 3, "new_tokens": 6}, [2, 2, 2])
    assert list(benchmark.peer_rows(tiny, [case])) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("transformers, tiny, 20/2 tokens, is left out: ")
    assert told in line


def test_samples(tiny, eager, monkeypatch, capsys):
    tiny.precisions = ["bf16"]
    one, *rows = benchmark.samples(tiny, (4, 2), context=70, new_tokens=3)
    assert (one["samples"], one["prefill_of_one"]) == (1, 1)
    assert [row["samples"] for row in rows] == [4, 2]
    for row in rows:
        assert row["prefill_of_one"] == pytest.approx(row["prefill_seconds"] / one["prefill_seconds"], rel=1e-3)
        assert row["tokens_per_second"] == pytest.approx(3 * row["samples"] / row["seconds"], rel=1e-3)
        rate = 2 * row["samples"] / row["decode_seconds"]
        assert row["decode_tokens_per_second"] == pytest.approx(rate, rel=1e-3)
        assert {"floor_ms", "share_of_copy_bandwidth"}.isdisjoint(row)
    assert {options["temperature"] for _, _, options in eager} == {0.8}
    assert all(options["num_samples"] == options["batch_size"] for _, _, options in eager)

    def little_memory(model, prompts, new_tokens, *, num_samples, **options):
        if num_samples > 2:
            raise ValueError("out of memory")
        return eager_generate(model, prompts, new_tokens, num_samples=num_samples, **options)

    eager_generate, tiny.batches = benchmark.generate, [2, 8]
    monkeypatch.setattr(benchmark, "generate", little_memory)
    rows = list(benchmark.samples(tiny, context=70, new_tokens=3))
    assert [row["samples"] for row in rows] == [1, 2]
    assert "samples 8, context 70, new_tokens 3 is left out: out of memory\n" in capsys.readouterr().out


def test_prefix_cache(tiny, eager, monkeypatch):
    """Each run with the cache begins with an empty one."""
    kept, start = [], Runner.start

    def started(runner, *arguments):
        kept.append(len(runner.pages.known))
        return start(runner, *arguments)

    monkeypatch.setattr(Runner, "start", started)
    tiny.precisions = ["bf16"]
    rows = list(benchmark.prefix_cache(tiny, 4, shared=128, own=8, new_tokens=2))
    assert [row["shared_tokens"] for row in rows] == [128, 0]
    for row in rows:
        assert (row["requests"], row["context"], row["new_tokens"]) == (4, 136, 2)
        assert row["gain"] == pytest.approx(row["uncached_seconds"] / row["seconds"], rel=1e-3)
    assert [options["prefix_cache"] for _, _, options in eager] == [True, False] * 4
    assert kept == [0, 2] * 2 + [0, 8] * 2
    (alike, *_), (others, *_) = eager[0], eager[-1]
    assert {tuple(prompt[:128]) for prompt in alike} == {tuple(alike[0][:128])}
    assert len({tuple(prompt[:64]) for prompt in others}) == 4


def test_beams(tiny):
    tiny.precisions = ["fp8-kv"]
    (row,) = benchmark.beams(tiny, count=3, context=20, num_beams=2, new_tokens=5)
    assert (row["requests"], row["context"], row["beams"], row["new_tokens"]) == (3, 20, 2, 15)
    assert row["requests_per_second"] == pytest.approx(3 / row["seconds"], rel=1e-3)
    assert row["tokens_per_second"] == pytest.approx(15 / row["seconds"], rel=1e-3)


def test_table():
    rows = [{"name": "a", "seconds_spread": [0.5, 1.25]}, {"name": "long name", "step_ms": 12345.6}]
    assert report.table(rows).splitlines() == [
        "             seconds    step",
        "name          spread      ms",
        "a          0.5..1.25",
        "long name             12,346",
    ]


def test_picture():
    rows = [
        {"model": "gemma-7b", "precision": precision, "batch": batch, "decode_tokens_per_second": 180.0 * batch}
        | {"context": 128, "new_tokens": 64, "floor_ms": 4.0, "share_of_copy_bandwidth": 0.72}
        for precision in ("bf16", "fp8-all")
        for batch in (1, 8, 64)
    ]
    picture = xml.dom.minidom.parseString(report.sweep_picture(rows, "one GPU"))
    assert len(picture.getElementsByTagName("polyline")) == 6
    texts = [text.firstChild.data for text in picture.getElementsByTagName("text")]
    assert {"one GPU, 128 prompt tokens, 64 new", "gemma-7b bf16", "gemma-7b fp8-all", "64", "10,000", "100"} <= set(
        texts
    )
    assert report.sweep_picture(rows[:1], "")


def test_quality_of_weights_is_what_eval_says_of_their_files(trained, tmp_path, monkeypatch, capsys):
    def output(program, *arguments, path=trained) -> str:
        assert program.main([*map(str, arguments), "--checkpoint_path", str(path)]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(benchmark, "pick_device", lambda device: CPU)
    text, other, result = (tmp_path / name for name in ("text.txt", "other.txt", "result.json"))
    text.write_text((ROOT / "tokenizer.py").read_text()[:1500])
    other.write_text((ROOT / "calibrate.py").read_text()[:2000])
    gptq = ("int4-gptq", "--group_size", 128, "--text", other, "--max_tokens", 32768)
    cases = {  # precision: arguments of quantize.py, of eval.py
        "fp8-kv": (("fp8",), ("--kv_cache_dtype", "fp8_e4m3")),
        "int8-all": (("int8", "--quantize_embedding"), ()),
        "int4-gptq-g128": (gptq, ()),
    }
    before = sorted(trained.iterdir())
    texts = ("--text", text, "--calibration_text", other)
    out = output(benchmark, "weights", *texts, "--precisions", *cases, "--output", result)
    assert sorted(trained.iterdir()) == before
    assert "\nspeeds are left out: they need a CUDA GPU\n" in out
    assert "\n| weights | MB | perplexity | KL | same top token |\n" in out
    bf16, *rows = json.loads(result.read_text())["results"]
    assert [row["precision"] for row in rows] == list(cases)
    perplexity = json.loads(output(evaluation, "--json", "--text", text))["perplexity"]
    assert (bf16["precision"], bf16["perplexity"]) == ("bf16", perplexity)

    output(calibrate, "--text", other)
    for row, (mode, options) in zip(rows, cases.values()):
        output(quantize, "--mode", *mode)
        (file,) = trained.glob("gemma-*.safetensors")
        figures = json.loads(output(evaluation, "--json", "--text", text, "--against", trained, *options, path=file))
        change = 100 * (figures["perplexity"] / perplexity - 1)
        figures |= {"disk_mb": file.stat().st_size / 1e6, "change_percent": change, "checkpoint": "one-layer"}
        assert row.items() >= figures.items()
        stored = read_header(file)[0].values()
        size = sum(tensor.size for tensor in stored if not tensor.key.endswith((".k_scale", ".v_scale")))
        made, _ = benchmark.PRECISIONS[row["precision"]]
        assert Transformer.random(read_config(trained), **made).weight_bytes == size  # what disk_gib is
        file.unlink()


def test_speeds_of_weights(tiny, monkeypatch):
    """GPTQ's are int4's, measured once."""
    tiny.checkpoint_path, tiny.device = None, torch.device("cuda")
    tiny.precisions = ["bf16", "int4-g32", "int4-gptq-g32"]

    def sweep(args, batches):
        assert args.precisions == ["bf16", "int4-g32"]
        for precision in args.precisions:
            for batch in batches:
                yield {"model": "tiny", "precision": precision, "batch": batch, "weights_gib": 1.5}

    monkeypatch.setattr(benchmark, "sweep", sweep)
    rows = list(benchmark.weights(tiny))
    assert [row["batch"] for row in rows if row["precision"] == "int4-gptq-g32"] == [1, 8, 64]
    assert len(rows) == 9
    assert all(row["disk_gib"] == 1.5 for row in rows)


def test_table_of_weights():
    speeds = [
        {"model": "gemma-7b", "precision": precision, "batch": batch, "disk_gib": 5.0, "gpu_gib": 5.254}
        | {"decode_tokens_per_second": 432.1 * batch, "share_of_copy_bandwidth": 0.876}
        for precision in ("bf16", "int8")
        for batch in (1, 8, 64)
    ]
    quality = [
        {"checkpoint": name, "precision": "bf16", "disk_mb": 44.06, "perplexity": 3.83, "change_percent": 0.0}
        for name in ("one", "two")
    ]
    quality.append(quality[0] | {"precision": "int8", "change_percent": 0.016, "kl": 0.00031, "top1_agreement": 0.9931})
    assert report.weights_tables(quality + speeds).splitlines()[:8] == [
        "gemma-7b: sizes and tokens/s; one: quality",
        "",
        "| weights | disk, GiB | GPU, GiB | batch 1 | batch 8 | batch 64 | MB | perplexity | KL | same top token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| BF16 | 5.00 | 5.25 | 432 (88 %) | 3,457 | 27,654 | 44.1 | 3.830 |  |  |",
        "| int8 | 5.00 | 5.25 | 432 (88 %) | 3,457 | 27,654 | 44.1 | 3.830 (+0.02 %) | 0.0003 | 99.3 % |",
        "",
        "The fastest: at batch 1, 8 and 64 BF16.",
    ]
    assert report.weights_tables(speeds).splitlines()[2] == (
        "| weights | disk, GiB | GPU, GiB | batch 1 | batch 8 | batch 64 |"
    )
    assert report.weights_tables(quality).count(": quality\n") == 2
    assert report.weights_tables([]) == ""


def test_synthetic_checkpoint_loads_and_runs(tiny):
    with checkpoints.synthetic_checkpoint("tiny", CPU) as directory:
        assert open_checkpoint(directory, ("fp8",)).weight_format == "fp8"
        model, _ = load_model(directory, CPU, fp8=True)
        assert model.kv_scales.values
        assert model.embedding.format.name == "fp8"
        made, _ = benchmark.random_model("tiny", "fp8-all", CPU)
        options = dict(temperature=0, stop_ids=(), kv_cache_dtype=torch.float8_e4m3fn)
        prompt = [2, 300, 500]
        assert generate(model, [prompt], 8, **options) == generate(made, [prompt], 8, **options)
    assert not directory.exists()


def test_a_full_disk_is_told(tiny, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    assert list(benchmark.startup(tiny)) == []
    assert "tiny is left out: " in capsys.readouterr().out


def test_parts_of_a_start():
    figures = (
        "NVIDIA H200, bfloat16, seed 1\n"
        "load 2.50 s, compile 3.00 s, prefill 0.250 s (2 tokens), decode 0.010 s (2 tokens in 1 rows)\n"
        "decode 100.0 tokens/s, 800.0 GB/s, 20% of the copy bandwidth (4200.0 GB/s)\n"
    )
    parts = benchmark.start_parts(8.76, figures)
    assert parts == pytest.approx(
        {"import_and_rest": 3.0, "load": 2.5, "compile": 3.0, "prefill": 0.25, "decode": 0.01}
    )


def test_an_interrupted_benchmark_ends_what_it_started(monkeypatch):
    processes = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)
            self.stdout = self  # its reader is interrupted

        def read(self, count):
            raise KeyboardInterrupt

        def close(self):
            pass

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.first_output(CPU)
    assert processes[0].wait(10) < 0


@pytest.mark.parametrize("program", [benchmark, calibrate, evaluation, quantize])
def test_help_gives_every_default(program, monkeypatch):
    monkeypatch.setattr(program, "run_program", lambda run, parser, argv: parser)
    for action in program.main([])._actions:
        if action.option_strings and not action.required and action.nargs != 0:
            assert "default" in action.help or (program, action.dest) in ((evaluation, "text"), (evaluation, "tasks"))


def test_a_result_that_cannot_be_written_is_told_at_once(monkeypatch, tmp_path, capsys):
    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(benchmark, "environment", never)
    for file, message in ((tmp_path, "it is no regular file"), (tmp_path / "a" / "b", "there is no directory")):
        assert benchmark.main(["cpu", "--output", str(file)]) == 2
        assert f"{file} can't be written: {message}" in capsys.readouterr().err


def test_a_failure_in_a_process_of_its_own_is_a_row(capfd):
    assert benchmark.in_process(benchmark.rounded, {"a": 1.23456789}) == {"a": 1.2346}
    assert benchmark.in_process(benchmark.rounded) == {"failed": 1}
    assert "TypeError" in capfd.readouterr().err


def test_what_was_measured_before_a_failure_is_written(tmp_path, monkeypatch, capsys):
    def rows(args):
        yield {"name": "first", "seconds": 1.0}
        raise RuntimeError

    rows.__doc__ = ""
    monkeypatch.setitem(benchmark.PROTOCOLS, "cpu", benchmark.Protocol(rows, "cpu"))
    with pytest.raises(RuntimeError):
        benchmark.main(["cpu", "--output", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["results"] == [{"name": "first", "seconds": 1.0}]
    assert "first" in capsys.readouterr().out


def test_drafts_are_right_as_often_as_is_said():
    """Those of a random model, which agrees with none."""
    model = small_model()
    operations, prompt = model.ops, [2, 9, 8, 7, 6, 5, 9, 8]
    for right, expected in (((1.0,) * 7, 1.0), ((0.0,) * 7, 0.0), ((0.5,) * 7, 0.5)):
        model.ops, stats = benchmark.forced_right(operations, right, model.device), Stats()
        drafts = dict(drafter=PromptLookup(), speculate_k=7, stats=stats)
        generate(model, [prompt] * 8, 40, temperature=0, stop_ids=(), **drafts)
        share = stats.right.total() / stats.drafts.total()
        assert share == pytest.approx(expected, abs=0.15 if expected == 0.5 else 0)
