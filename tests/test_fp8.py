"""FP8: calibration, scale files and weights; all of it on a CPU."""

import argparse
import json
import shutil

import gemma4
import pytest
import torch
from conftest import GREEDY, TINY_GEMMA, copy_tiny_gemma, reference_model, save_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import calibrate
import generate as program
import quantize
from cache import KV_CACHE_DTYPES, KVCache, codec_of
from checkpoint import SCALES_NAME, fp8_scale_names, open_checkpoint, read_config, read_scales
from formats import LINEAR, Weight
from generate import generate, load_model


@pytest.fixture
def copy(calibrated, tmp_path):
    return shutil.copytree(calibrated, tmp_path / "copy")


def load(directory, precision="fp32", **options):
    return load_model(directory, device="cpu", precision=precision, **options)[0]


def tokens(rows=3, length=40) -> torch.Tensor:
    return torch.randint(10, 4000, (rows, length), generator=torch.Generator().manual_seed(0))


# --- calibration


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:experts that met fewer")
@pytest.mark.parametrize(
    "case",
    [
        "gemma-mqa",
        "gemma2-window-small",
        "gemma3-window-half",
        "gemma4-experts",
        "gemma4-unified",
        "gemma4-shared",
    ],
)
def test_recorded_maxima_are_the_references(case, tmp_path):
    """Inputs as transformers' modules get them, K and V as its cache holds them, to bfloat16's rounding."""
    from transformers import DynamicCache

    theirs = reference_model(case)
    ours, _ = load_model(save_checkpoint(theirs, tmp_path), device="cpu", precision="fp32")
    windows = tokens(4, 5).remainder(120).tolist()  # as short as the smallest window: the cache then holds all
    seen, of_experts = {}, {}

    def watch(name):
        return lambda _, inputs: seen.update({name: max(seen.get(name, 0), inputs[0].abs().max().item())})

    def watch_experts(name):
        """What each expert multiplies by its down_proj."""

        def watching(experts, inputs):
            x, chosen, _ = inputs
            for e in chosen.unique().tolist():
                gate, up = (x[(chosen == e).any(1)] @ experts.gate_up_proj[e].T).chunk(2, -1)
                amax = (experts.act_fn(gate) * up).abs().max().item()
                of_experts[name, e] = max(of_experts.get((name, e), 0), amax)

        return watching

    for i, layer in enumerate(theirs.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(watch(f"layers.{i}.attention.wqkv"))
        layer.self_attn.o_proj.register_forward_pre_hook(watch(f"layers.{i}.attention.wo"))
        layer.mlp.up_proj.register_forward_pre_hook(watch(f"layers.{i}.feed_forward.w13"))
        layer.mlp.down_proj.register_forward_pre_hook(watch(f"layers.{i}.feed_forward.w2"))
        if hasattr(layer, "experts"):
            layer.experts.register_forward_pre_hook(watch(f"layers.{i}.experts.w13"))
            layer.experts.register_forward_pre_hook(watch_experts(f"layers.{i}.experts.w2.input_scale"))
    theirs.lm_head.register_forward_pre_hook(watch("head_scales"))
    cache = DynamicCache()
    theirs(torch.tensor(windows), past_key_values=cache)
    histograms = calibrate.record(ours, windows, batch_size=3)
    factors = calibrate.scales(ours, histograms)
    assert bool(of_experts) == (case == "gemma4-experts")
    for (name, e), amax in of_experts.items():
        assert histograms[name][e].amax() == pytest.approx(amax, rel=2**-8)
    assert sum(len(h) for h in histograms.values() if isinstance(h, list)) == 8 * 3 * bool(of_experts)
    for name, amax in seen.items():
        assert factors[f"{name}.input_scale"] * 448 == pytest.approx(amax, rel=2**-8)
    for i, layer in enumerate(cache.layers):
        assert factors[f"layers.{i}.attention.k_scale"] * 448 == pytest.approx(layer.keys.abs().max().item(), rel=2**-8)
        assert factors[f"layers.{i}.attention.v_scale"] * 448 == pytest.approx(
            layer.values.abs().max().item(), rel=2**-8
        )
    assert ours.config.n_layers - len(cache.layers) == ours.config.n_shared_layers  # the others' have no factors
    assert f"layers.{len(cache.layers)}.attention.k_scale" not in factors
    if of_experts:
        gate_up = theirs.model.layers[2].experts.gate_up_proj[5].abs().max().item()
        assert factors["layers.2.experts.w13.weight_scale"][5] == pytest.approx(gate_up / 448)
    up = theirs.model.layers[1].mlp
    expected = max(up.gate_proj.weight.abs().max(), up.up_proj.weight.abs().max()) / 448
    assert factors["layers.1.feed_forward.w13.weight_scale"] == pytest.approx(expected.item())


@pytest.mark.parametrize("percentile", [100.0, 99.9, 99.0, 60.0])
def test_percentiles_are_exact(percentile):
    """The smallest value that at least so many per cent do not exceed."""
    x, histogram = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).bfloat16(), calibrate.Histogram()
    for part in x:
        histogram.add(part)
    ordered = x.abs().flatten().float().sort().values
    rank = -(-len(ordered) * percentile // 100)  # counted from 1
    assert histogram.amax(percentile) == ordered[int(rank) - 1].item()
    assert histogram.above(histogram.amax(percentile)) <= (1 - percentile / 100) * x.numel() + 1e-6


def test_values_that_are_not_finite_are_refused():
    histogram = calibrate.Histogram()
    histogram.add(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="not finite"):
        histogram.amax()


def test_scale_file_is_what_the_design_says(calibrated):
    factors = load_file(calibrated / SCALES_NAME)
    assert set(factors) == set(fp8_scale_names(read_config(calibrated)).values())
    assert "model.layers.5.self_attn.qkv_proj.input_scale" in factors
    assert "model.layers.0.mlp.gate_up_proj.weight_scale" in factors
    assert {"model.layers.2.self_attn.k_scale", "lm_head.weight_scale"} <= set(factors)
    assert all(f.dtype == torch.float32 and f.shape == () and f > 0 for f in factors.values())
    with safe_open(calibrated / SCALES_NAME, "pt") as f:
        metadata = f.metadata()
    assert metadata["text"] == "text.txt"
    assert int(metadata["tokens"]) > 500
    assert (metadata["amax"], metadata["kv_cache_dtype"], metadata["format_version"]) == ("maximum", "fp8_e4m3", "1")


def one_error(err: str) -> str:
    """The line on stderr, notes left out."""
    (line,) = (line for line in err.splitlines() if not line.startswith("note: "))
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--percentile 40", "--percentile: must be a number, from 50 to 100, not '40'"),
        ("--percentile nan", "--percentile: must be a number, from 50 to 100, not 'nan'"),
        ("--batch_size 0", "--batch_size: must be a whole number, at least 1, not '0'"),
        ("--batch_size -1", "--batch_size: must be a whole number, at least 1, not '-1'"),
        ("--window 1", "--window: must be a whole number, at least 2, not '1'"),
        ("--window 9000", "a window of 9000 tokens exceeds the context of 8192"),
        ("--max_tokens -1", "--max_tokens: must be a whole number, at least 1, not '-1'"),
        ("--max_tokens 63", "there are 63 tokens of text, and at least 64 are needed"),
        ("--text nowhere.txt", "nowhere.txt"),
        ("--checkpoint_path nowhere", "no checkpoint at nowhere"),
    ],
)
def test_calibration_mistakes(tmp_path, capsys, arguments, message):
    copy_tiny_gemma(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert calibrate.main(["--checkpoint_path", str(tmp_path), "--device", "cpu", *arguments.split()]) == 2
    assert message in one_error(capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


def test_calibration_text_that_is_too_short(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("x = 1\n")
    assert calibrate.main(["--text", str(tmp_path / "text.txt"), "--device", "cpu"]) == 2
    assert "at least 64 are needed" in capsys.readouterr().err


def test_calibration_sees_as_many_tokens_as_it_is_told(copy, monkeypatch):
    """Not whole windows only: 100 of a window of 512, 100 of windows of 64."""
    seen, record = [], calibrate.record
    monkeypatch.setattr(calibrate, "record", lambda model, pieces, size: seen.append(pieces) or record(model, pieces))
    arguments = ["--checkpoint_path", str(copy), "--device", "cpu", "--max_tokens", "100", "--window"]
    assert [calibrate.main([*arguments, window]) for window in ("512", "64")] == [0, 0]
    (whole,), (first, rest) = seen
    assert len(whole) == 100
    assert first + rest == whole
    with safe_open(copy / SCALES_NAME, "pt") as f:
        assert f.metadata()["tokens"] == "100"


def test_calibration_from_python_refuses(tiny):
    for arguments, message in (
        (([[2, 3]], 0), "batch_size must be at least 1, not 0"),
        (([[2, 3]], -1), "batch_size must be at least 1, not -1"),
        (([], 8), "needs windows"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate.record(tiny[0], *arguments)


def test_a_result_that_cannot_be_written_is_told_at_once(copy, monkeypatch, capsys):
    """Before weights are read, let alone anything computed."""
    runs = {  # what is written: the program's arguments
        SCALES_NAME: (calibrate, "--device", "cpu"),
        "gemma-fp8.safetensors": (quantize, "--mode", "fp8"),
        "gemma-int4-gptq-g32.safetensors": (quantize, "--mode", "int4-gptq", "--device", "cpu"),
    }

    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(calibrate, "load_model", never)
    monkeypatch.setattr(quantize, "check_weights", never)
    for name in runs.keys() - {SCALES_NAME}:
        shutil.copy(copy / SCALES_NAME, copy / name)
    monkeypatch.setattr("os.access", lambda *arguments: False)
    for name, (quantizer, *arguments) in runs.items():
        assert quantizer.main(["--checkpoint_path", str(copy), *arguments]) == 2
        assert f"{copy / name} can't be written: it is read-only" in one_error(capsys.readouterr().err)


# --- scale files


def edit_scales(directory, edit):
    file = directory / SCALES_NAME
    factors = load_file(file)
    edit(factors)
    save_file(factors, file)


Q = "model.layers.0.self_attn.qkv_proj.input_scale"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.update({Q: torch.tensor(float("nan"))}), f"{Q} in .* is nan"),
        (lambda f: f.update({Q: torch.tensor(0.0)}), f"{Q} in .* is 0.0"),
        (lambda f: f.update({Q: torch.tensor(-1.0)}), f"{Q} in .* is -1.0"),
        (lambda f: f.update({Q: torch.tensor(float("inf"))}), f"{Q} in .* is inf"),
        (lambda f: f.update({Q: torch.ones(2)}), rf"{Q} in .* of shape \[2\]"),
        (lambda f: f.pop(Q), f"lacks {Q}"),
        (lambda f: f.update({"model.layers.6.mlp.down_proj.input_scale": torch.ones(())}), "no place for: .*layers.6"),
        (
            lambda f: f.update({"model.layers.0.mlp.down_proj.weight_scale": torch.tensor(0.5)}),
            "is of another model: layers.0.feed_forward.w2.weight",
        ),
    ],
)
def test_bad_scale_files_are_refused_by_name(copy, edit, message):
    edit_scales(copy, edit)
    with pytest.raises(ValueError, match=message):
        load(copy, fp8=True)


def test_a_cut_scale_file_is_refused(copy):
    file = copy / SCALES_NAME
    content = file.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="fp8_scales.safetensors is (cut|damaged)"):
            load(copy, fp8=True)
    load(copy)  # a BF16 run does without
    with pytest.raises(ValueError, match="fp8_scales.safetensors is damaged"):
        generate(load(copy), [[2, 3]], 2, kv_cache_dtype=torch.float8_e4m3fn)


def test_scales_of_another_model_are_refused(copy, tmp_path):
    other = save_checkpoint(reference_model("gemma-mqa"), tmp_path / "other")
    shutil.copy(copy / SCALES_NAME, other)
    with pytest.raises(ValueError, match=r"is of another model \(gemma-1, 6 layers"):
        load(other, fp8=True)


def test_fp8_without_factors_names_the_command(capsys):
    assert program.main(["--fp8", "--device", "cpu"]) == 2
    assert "python calibrate.py --checkpoint_path" in capsys.readouterr().err


def test_one_kv_scale_for_both_and_none_at_all(copy):
    def one(factors):
        for i in range(6):
            k, v = (factors.pop(f"model.layers.{i}.self_attn.{kind}_scale") for kind in "kv")
            factors[f"model.layers.{i}.self_attn.kv_scale"] = torch.maximum(k, v)

    edit_scales(copy, one)
    scales = read_scales(copy / SCALES_NAME, read_config(copy))
    assert scales["layers.3.attention.k_scale"] == scales["layers.3.attention.v_scale"]
    edit_scales(copy, lambda factors: [factors.pop(name) for name in list(factors) if "kv_scale" in name])
    with pytest.warns(UserWarning, match="no factors for K and V: 1.0"):
        scales = read_scales(copy / SCALES_NAME, read_config(copy))
    assert scales["layers.3.attention.k_scale"] == 1


# --- weights


BAD = {  # kind: Hugging Face's name of a tensor
    "embedding": "model.embed_tokens.weight",
    "linear": "model.layers.3.self_attn.k_proj.weight",
    "norm": "model.layers.5.post_attention_layernorm.weight",
    "last norm": "model.norm.weight",
}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("kind", BAD)
def test_weights_that_are_not_finite_are_refused_by_name(copy, kind, value, capsys):
    """Whatever is made of them; the factors are those of the weights before one of them was damaged."""
    file, name, out = copy / "model.safetensors", BAD[kind], copy / "out"
    weights = load_file(file)
    weights[name].view(-1)[-1] = value  # of the embedding: a token that no text has
    save_file(weights, file, {"format": "pt"})
    before = sorted(copy.iterdir())
    for arguments in (
        "fp8",
        "fp8 --fp8_head",
        f"fp8 --export_hf {out}",
        "int8",
        "int4 --quantize_embedding",
        "int4-gptq --max_tokens 512 --device cpu",
    ):
        assert quantize.main(["--checkpoint_path", str(copy), "--mode", *arguments.split()]) == 2
        err = capsys.readouterr().err.splitlines()
        assert [line for line in err if not line.startswith(("note: ", "writing"))][-1] == (
            f"error: {name} has values that are not finite: the checkpoint is damaged"
        )
    assert calibrate.main(["--checkpoint_path", str(copy), "--device", "cpu", "--max_tokens", "128"]) == 2
    assert "has values that are not finite" in capsys.readouterr().err
    assert sorted(copy.iterdir()) == before


@torch.no_grad()
@pytest.mark.parametrize("head", [False, True])
def test_quantized_while_loading_is_the_quantized_file(copy, head, capsys):
    arguments = ["--mode", "fp8", "--checkpoint_path", str(copy)] + ["--fp8_head"] * head
    source = load(copy, fp8=True)
    assert quantize.main(arguments) == 0
    from_file = load(copy, fp8=True)
    assert from_file.layers[0].attention.wqkv.weight.dtype == torch.float8_e4m3fn
    assert (from_file.embedding.format.name == "fp8") == head
    by_name = load(copy / "gemma-fp8.safetensors")  # what a file is, its metadata says
    x = tokens()
    torch.testing.assert_close(from_file(x), by_name(x), atol=0, rtol=0)
    if not head:
        torch.testing.assert_close(from_file(x), source(x), atol=0, rtol=0)
    assert len(source.kv_scales.values) == 6
    assert from_file.kv_scales == source.kv_scales
    size = sum(p.nbytes for p in load(copy, "bf16", fp8=True).parameters())
    assert (copy / "gemma-fp8.safetensors").stat().st_size == pytest.approx(size, rel=0.005)
    exact = load(copy)(x)
    assert 0 < (from_file(x) - exact).abs().mean() < 0.1 * exact.std()
    assert load(copy).layers[0].attention.wqkv.weight.dtype == torch.float32  # without --fp8, the BF16 weights


def test_quantizing_mistakes(copy, capsys, tmp_path):
    assert quantize.main(["--mode", "fp8", "--checkpoint_path", str(TINY_GEMMA)]) == 2
    assert "run python calibrate.py" in capsys.readouterr().err
    assert quantize.main(["--mode", "fp8", "--checkpoint_path", str(copy)]) == 0
    capsys.readouterr()
    assert quantize.main(["--mode", "fp8", "--checkpoint_path", str(copy / "gemma-fp8.safetensors")]) == 2
    assert "is quantized already" in capsys.readouterr().err
    assert quantize.main(["--mode", "fp7"]) == 2
    assert "invalid choice: 'fp7'" in capsys.readouterr().err


@pytest.mark.parametrize("place", range(10))
def test_a_cut_fp8_file_is_refused(copy, place):
    assert quantize.main(["--mode", "fp8", "--checkpoint_path", str(copy)]) == 0
    file = copy / "gemma-fp8.safetensors"
    with open(file, "rb+") as f:
        f.truncate(file.stat().st_size * place // 10)
    with pytest.raises(ValueError, match="gemma-fp8.safetensors is (cut|damaged)"):
        load(copy, fp8=True)


def test_fp8_rows_are_alone(calibrated):
    model = load(calibrated, fp8=True)
    prompts = [[2, 310, 315], [2, 400, 1500, 20, 21, 900], [2]]
    options = dict(**GREEDY, kv_cache_dtype="fp8_e4m3")
    expected = [generate(model, [prompt], 14, **options)[0] for prompt in prompts]
    assert generate(model, prompts, 14, **options) == expected


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
def test_program_takes_every_cache_dtype(calibrated, capsys, name):
    options = ("--checkpoint_path", str(calibrated), "--device", "cpu", "--max_new_tokens", "5", "--json", "--fp8")
    assert program.main([*options, "--kv_cache_dtype", name]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 5


def test_a_weight_of_zeros_has_a_scale_that_does(tmp_path):
    directory = copy_tiny_gemma(tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    options = ["--checkpoint_path", str(directory)]
    assert calibrate.main([*options, "--max_tokens", "256"]) == 0
    model = load_model(directory, device="cpu", fp8=True)[0]
    assert model.layers[0].feed_forward.w2.data.float().count_nonzero() == 0
    assert quantize.main([*options, "--mode", "fp8"]) == 0


# --- Gemma 4


@pytest.fixture(scope="session", params=gemma4.KINDS)
def gemma4_directory(request, tmp_path_factory):
    return gemma4.calibrated(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def moe(tmp_path_factory):
    return gemma4.calibrated("moe", tmp_path_factory)


def same_parameters(one, two) -> bool:
    first, second = (model.state_dict() for model in (one, two))
    assert first.keys() == second.keys()
    return all(
        first[name].dtype == second[name].dtype
        and torch.equal(first[name].reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8))
        for name in first
    )


@torch.no_grad()
def test_gemma_4_quantized_while_loading_is_the_quantized_file(gemma4_directory, tmp_path, monkeypatch):
    copy = shutil.copytree(gemma4_directory, tmp_path / "copy")
    source, exact = load(copy, "bf16", fp8=True), load(copy, "bf16")
    monkeypatch.setattr(quantize, "ROWS", 40)  # blocks that end within a matrix
    assert quantize.main(["--mode", "fp8", "--checkpoint_path", str(copy)]) == 0
    from_file = load(copy, "bf16", fp8=True)
    assert same_parameters(source, from_file)
    assert from_file.kv_scales == source.kv_scales
    weights = {name: module for name, module in source.named_modules() if isinstance(module, Weight)}
    assert {name for name, weight in weights.items() if weight.format.name == "fp8"} == {
        name for name in weights if name.endswith(LINEAR)
    }
    x = tokens().remainder(640)
    ours, theirs = load(copy, fp8=True)(x), load(copy)(x)
    assert 0 < (ours - theirs).abs().mean() < 0.4 * theirs.std()  # random layers make rounding errors grow
    for name, weight in weights.items():  # each number within half a step of its own matrix's scale
        if name.endswith(LINEAR):
            numbers = weight.format.dequantize(weight, torch.float32)
            error = (numbers - exact.get_submodule(name).data.float()).abs().amax((-1, -2))
            assert (error <= 16.1 * weight.scale).all()  # 448 and 416 are neighbours


def test_gemma_4_fp8_rows_are_alone(gemma4_directory):
    model = load(gemma4_directory, fp8=True)
    prompts = [[2, 310, 315], [2, 400, 500, 20, 21, 600], [2]]
    options = dict(**GREEDY, kv_cache_dtype="fp8_e4m3")
    expected = [generate(model, [prompt], 14, **options)[0] for prompt in prompts]
    assert generate(model, prompts, 14, **options) == expected


@pytest.mark.parametrize("kind", ["e2b", "e4b"])
def test_layers_that_share_keys_have_their_donors_factors(kind, tmp_path_factory):
    model = load(gemma4.calibrated(kind, tmp_path_factory))
    config, codec = model.config, codec_of("fp8_e4m3", model.dtype)
    values = model.kv_scales.values
    assert len(values) == config.n_layers
    assert len(set(values)) == config.n_layers - config.n_shared_layers
    cache = KVCache.empty(config, 1, 64, codec, model.device, model.kv_scales)
    for i, layer in enumerate(cache.layers):
        assert values[i] == values[config.donor_of(i)] == (layer.k_scale, layer.v_scale)


def test_factors_of_experts(moe):
    factors, model = load_file(moe / SCALES_NAME), load(moe, fp8=True)
    assert set(factors) == set(fp8_scale_names(read_config(moe)).values())
    name = "model.layers.1.experts"
    assert factors[f"{name}.gate_up_proj.input_scale"].shape == ()
    for part in ("gate_up_proj.weight_scale", "down_proj.weight_scale", "down_proj.input_scale"):
        assert factors[f"{name}.{part}"].shape == (8,)
        assert len(set(factors[f"{name}.{part}"].tolist())) > 4
    experts = model.layers[1].experts
    assert torch.equal(experts.w2.input_scale, factors[f"{name}.down_proj.input_scale"])
    assert experts.w13.input_scale == factors[f"{name}.gate_up_proj.input_scale"]


def test_experts_that_met_few_tokens_get_their_layers_largest_factor(moe, capsys, tmp_path, monkeypatch):
    copy = shutil.copytree(moe, tmp_path / "copy")
    model, name = load(copy), "layers.1.experts.w2.input_scale"
    histograms = calibrate.record(model, tokens(8, 128).remainder(640).tolist())
    monkeypatch.setattr(calibrate, "MIN_TOKENS", 1)
    expected = calibrate.scales(model, histograms)
    histograms[name][3] = calibrate.Histogram()
    message = r"experts that met fewer than 1 tokens get the largest factor of their layer's: layers.1.experts 3$"
    with pytest.warns(UserWarning, match=message):
        factors = calibrate.scales(model, histograms)
    assert factors[name][3] == max(each for e, each in enumerate(expected[name]) if e != 3)
    assert [each for e, each in enumerate(factors[name]) if e != 3] == [
        each for e, each in enumerate(expected[name]) if e != 3
    ]
    monkeypatch.undo()
    arguments = ["--checkpoint_path", str(copy), "--device", "cpu", "--max_tokens", "64", "--window", "64"]
    assert calibrate.main(arguments) == 0
    assert "note: experts that met fewer than 64 tokens get the largest factor" in (err := capsys.readouterr().err)
    assert "layers.0.experts 0, layers.0.experts 1, layers.0.experts 2 and 21 more" in err
    (of_layer,) = set(read_scales(copy / SCALES_NAME, read_config(copy))[name])
    assert of_layer > 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda f: f.update({"model.layers.1.experts.down_proj.input_scale": torch.ones(7)}),
            r"layers.1.experts.down_proj.input_scale has shape \[7\], config.json asks for \[8\]",
        ),
        (lambda f: f.pop("model.layers.2.experts.gate_up_proj.weight_scale"), "lacks model.layers.2.experts.gate_up"),
        (lambda f: f["model.layers.1.experts.down_proj.input_scale"][5:].zero_(), "input_scale in .* is 0.0"),
        (
            lambda f: f["model.layers.1.experts.down_proj.weight_scale"][5:6].mul_(2),
            "is of another model: layers.1.experts.w2.weight, expert 5, asks for the scale",
        ),
    ],
)
def test_bad_factors_of_experts_are_refused_by_name(moe, tmp_path, edit, message):
    copy = shutil.copytree(moe, tmp_path / "copy")
    edit_scales(copy, edit)
    with pytest.raises(ValueError, match=message):
        load(copy, fp8=True)
    with pytest.raises(ValueError, match=message):  # before anything is written
        quantize.prepare_fp8(
            argparse.Namespace(fp8_head=False, export_hf=None, checkpoint_path=copy), open_checkpoint(copy)
        )
