"""FP8: rounding, linear layers, calibration, scale files, weights and KV cache; all of it on a CPU."""

import json
import shutil

import pytest
import torch
from conftest import TINY_GEMMA, copy_tiny_gemma, reference_model, save_checkpoint
from safetensors.torch import load_file, save_file

import calibrate
import generate as program
import quantize
from checkpoint import SCALES_NAME, fp8_scale_names, read_config, read_scales
from generate import KV_DTYPES, generate, load_model
from model import FP8Linear, round_fp8

TEXT = (
    "import os\n\n\ndef walk(path):\n    for name in os.listdir(path):\n        yield os.path.join(path, name)\n" * 20
)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A copy of tiny-gemma with factors from a short text."""
    directory = copy_tiny_gemma(tmp_path_factory.mktemp("calibrated"))
    (directory / "text.txt").write_text(TEXT)
    arguments = ["--checkpoint_path", str(directory), "--text", str(directory / "text.txt"), "--window", "128"]
    assert calibrate.main([*arguments, "--device", "cpu"]) == 0
    return directory


@pytest.fixture
def copy(calibrated, tmp_path):
    return shutil.copytree(calibrated, tmp_path / "copy")


def load(directory, precision="fp32", **options):
    return load_model(directory, device="cpu", precision=precision, **options)[0]


def tokens(rows=3, length=40) -> torch.Tensor:
    return torch.randint(10, 4000, (rows, length), generator=torch.Generator().manual_seed(0))


# --- rounding and the linear layer


def e4m3_values() -> torch.Tensor:
    """All non-negative values of E4M3 (arXiv:2209.05433): 4 bits of exponent, bias 7, 3 of mantissa, no infinity."""
    values = [m / 8 * 2**-6 for m in range(8)]
    values += [(1 + m / 8) * 2 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return torch.tensor(values[:-1])  # the last code is NaN


def test_rounding_takes_the_nearest_e4m3_value_and_saturates():
    values = e4m3_values()
    assert values[-1] == 448
    x = torch.cat((torch.linspace(-500, 500, 4001), torch.randn(4000) * 0.01, values))
    nearest = (x.abs()[:, None] - values).abs().min(1).values
    rounded = round_fp8(x, 1.0).float()
    torch.testing.assert_close((x - rounded).abs(), nearest, atol=0, rtol=0)
    assert round_fp8(torch.tensor([1e9, -1e9]), 2.0).float().tolist() == [448, -448]
    assert round_fp8(torch.tensor([1e9]), 1.0, torch.float8_e5m2).float().item() == 57344


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 17])
def test_fp8_linear_is_its_definition(dtype, rows):
    layer = FP8Linear(48, 20)
    weight, x = torch.randn(20, 48), torch.randn(2, rows, 48).to(dtype)
    layer.weight_scale.data.fill_(weight.abs().max() / 448)
    layer.input_scale.data.fill_(2.5 / 448)  # some inputs saturate
    layer.weight.data.copy_(round_fp8(weight, layer.weight_scale))
    inputs = round_fp8(x, layer.input_scale).double() * layer.input_scale.double()
    expected = inputs @ (layer.weight.double() * layer.weight_scale.double()).T
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5)


# --- calibration


@torch.no_grad()
@pytest.mark.parametrize("case", ["gemma-mqa", "gemma2-window-small", "gemma3-window-half"])
def test_recorded_maxima_are_the_references(case, tmp_path):
    """Inputs as transformers' modules get them, K and V as its cache holds them, to bfloat16's rounding."""
    from transformers import DynamicCache

    theirs = reference_model(case)
    ours, _ = load_model(save_checkpoint(theirs, tmp_path), device="cpu", precision="fp32")
    windows = tokens(4, 5).remainder(120).tolist()  # as short as the smallest window: the cache then holds all
    seen = {}

    def watch(name):
        return lambda _, inputs: seen.update({name: max(seen.get(name, 0), inputs[0].abs().max().item())})

    for i, layer in enumerate(theirs.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(watch(f"layers.{i}.attention.wqkv"))
        layer.self_attn.o_proj.register_forward_pre_hook(watch(f"layers.{i}.attention.wo"))
        layer.mlp.up_proj.register_forward_pre_hook(watch(f"layers.{i}.feed_forward.w13"))
        layer.mlp.down_proj.register_forward_pre_hook(watch(f"layers.{i}.feed_forward.w2"))
    theirs.lm_head.register_forward_pre_hook(watch("head_scales"))
    cache = DynamicCache()
    theirs(torch.tensor(windows), past_key_values=cache)
    histograms = calibrate.record(ours, windows, batch_size=3)
    factors = calibrate.scales(ours, histograms)
    for name, amax in seen.items():
        assert factors[f"{name}.input_scale"] * 448 == pytest.approx(amax, rel=2**-8)
    for i, layer in enumerate(cache.layers):
        assert factors[f"layers.{i}.attention.k_scale"] * 448 == pytest.approx(layer.keys.abs().max().item(), rel=2**-8)
        assert factors[f"layers.{i}.attention.v_scale"] * 448 == pytest.approx(
            layer.values.abs().max().item(), rel=2**-8
        )
    assert all(layer.attention.cache is None for layer in ours.layers)
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
    from safetensors import safe_open

    with safe_open(calibrated / SCALES_NAME, "pt") as f:
        metadata = f.metadata()
    assert metadata["text"] == "text.txt"
    assert int(metadata["tokens"]) > 500
    assert (metadata["amax"], metadata["kv_cache_dtype"], metadata["format_version"]) == ("maximum", "fp8_e4m3", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--percentile", "40"], "--percentile must be above 50"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--checkpoint_path", "nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_calibration_mistakes(capsys, arguments, message):
    assert calibrate.main([*arguments, "--device", "cpu"]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert message in err[0]


def test_calibration_text_that_is_too_short(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("x = 1\n")
    assert calibrate.main(["--text", str(tmp_path / "text.txt"), "--device", "cpu"]) == 2
    assert "calibrating needs at least 64" in capsys.readouterr().err


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


@torch.no_grad()
@pytest.mark.parametrize("head", [False, True])
def test_quantised_while_loading_is_the_quantised_file(copy, head, capsys):
    arguments = ["--mode", "fp8", "--checkpoint_path", str(copy)] + ["--fp8_head"] * head
    source = load(copy, fp8=True)
    assert quantize.main(arguments) == 0
    from_file = load(copy, fp8=True)
    assert from_file.layers[0].attention.wqkv.weight.dtype == torch.float8_e4m3fn
    assert (from_file.head_scales is not None) == head
    by_name = load(copy / "gemma-fp8.safetensors")  # what a file is, its metadata says
    x = tokens()
    torch.testing.assert_close(from_file(x), by_name(x), atol=0, rtol=0)
    if not head:
        torch.testing.assert_close(from_file(x), source(x), atol=0, rtol=0)
    assert [layer.attention.kv_scales for layer in from_file.layers] == [
        layer.attention.kv_scales for layer in source.layers
    ]
    size = sum(p.nbytes for p in load(copy, "bf16", fp8=True).parameters())
    assert (copy / "gemma-fp8.safetensors").stat().st_size == pytest.approx(size, rel=0.005)
    exact = load(copy)(x)
    assert 0 < (from_file(x) - exact).abs().mean() < 0.1 * exact.std()
    assert load(copy).layers[0].attention.wqkv.weight.dtype == torch.float32  # without --fp8, the BF16 weights


def test_quantising_mistakes(copy, capsys, tmp_path):
    assert quantize.main(["--mode", "fp8", "--checkpoint_path", str(TINY_GEMMA)]) == 2
    assert "run python calibrate.py" in capsys.readouterr().err
    assert quantize.main(["--mode", "fp8", "--checkpoint_path", str(copy)]) == 0
    capsys.readouterr()
    assert quantize.main(["--mode", "fp8", "--checkpoint_path", str(copy / "gemma-fp8.safetensors")]) == 2
    assert "is quantised already" in capsys.readouterr().err
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


def test_fp8_compiled_is_eager_and_rows_are_alone(calibrated):
    model = load(calibrated, fp8=True)
    prompts = [[2, 310, 315], [2, 400, 1500, 20, 21, 900], [2]]
    options = dict(temperature=0, stop_ids=(), kv_cache_dtype=torch.float8_e4m3fn)
    expected = [generate(model, [prompt], 24, **options)[0] for prompt in prompts]
    assert generate(model, prompts, 24, **options) == expected
    assert generate(model, prompts, 24, compile=True, **options) == expected


# --- KV cache


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache_is_its_definition(calibrated, dtype, monkeypatch):
    """Attention over K and V rounded and scaled back, whether they come from the cache or were just computed."""
    import model as model_file

    ours, x = load(calibrated), tokens(2, 30)
    scales = [layer.attention.kv_scales if dtype == torch.float8_e4m3fn else (1.0, 1.0) for layer in ours.layers]
    assert all(k != 1 for k, _ in scales) == (dtype == torch.float8_e4m3fn)

    plain, calls = model_file.attention, []

    def rounding(q, k, v, *rest):
        k_scale, v_scale = scales[len(calls) % len(scales)]
        calls.append(None)
        k = round_fp8(k, k_scale, dtype).float() * k_scale
        return plain(q, k, round_fp8(v, v_scale, dtype).float() * v_scale, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(model_file, "attention", rounding)
        expected = ours(x, all_logits=True)
    ours.setup_caches(2, 64, dtype)
    assert ours.layers[0].attention.cache.k.dtype == dtype
    difference = (ours(x, all_logits=True) - expected).abs()
    # a value on the border of two codes may fall to the other side after a rounding in float32
    assert difference.mean() < 1e-4
    assert difference.max() < 0.02
    ours(x[:, :12])
    ours(x[:, 12:20], torch.full((2,), 12))
    for i in range(20, 30):
        logits = ours(x[:, i : i + 1], torch.full((2,), i))
        assert (logits - expected[:, i]).abs().mean() < 0.02


@pytest.mark.parametrize("case", ["gemma2-window-small", "gemma3-window-half"])
def test_fp8_cache_with_windows(case, tmp_path):
    theirs = reference_model(case)
    model, _ = load_model(save_checkpoint(theirs, tmp_path), device="cpu", precision="fp32")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        model.setup_caches(2, 64, dtype)
        x = tokens(2, 45).remainder(120)
        with torch.no_grad():
            expected = model(x, all_logits=True)
            model(x[:, :30])
            logits = [model(x[:, i : i + 1], torch.full((2,), i)) for i in range(30, 45)]
        assert (torch.stack(logits, 1) - expected[:, 30:]).abs().mean() < 0.02


def test_fp8_cache_is_half_of_bf16(calibrated):
    model = load(calibrated)
    half, whole = (model.cache_bytes(3, 128, dtype) for dtype in (torch.float8_e4m3fn, torch.bfloat16))
    assert 2 * half == whole
    model.setup_caches(3, 128, torch.float8_e4m3fn)
    assert sum(2 * layer.attention.cache.k.nbytes for layer in model.layers) == half


def test_e4m3_cache_without_factors_warns_and_e5m2_does_not(recwarn):
    model = load(TINY_GEMMA)
    generate(model, [[2, 3]], 2, kv_cache_dtype=torch.float8_e5m2)
    assert not [w for w in recwarn if "scaling factors" in str(w.message)]
    with pytest.warns(UserWarning, match="no scaling factors for K and V: 1.0"):
        generate(model, [[2, 3]], 2, kv_cache_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("name", list(KV_DTYPES))
def test_program_takes_every_cache_dtype(calibrated, capsys, name):
    options = ("--checkpoint_path", str(calibrated), "--device", "cpu", "--max_new_tokens", "5", "--json", "--fp8")
    assert program.main([*options, "--kv_cache_dtype", name]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 5
