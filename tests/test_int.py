"""int8 and int4 weights: GPTQ, files and what runs them; all of it on a CPU."""

import json
import shutil
import sysconfig
from pathlib import Path

import gemma4
import pytest
import torch
from conftest import GREEDY, TINY_GEMMA, copy_tiny_gemma, made_once
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import calibrate
import eval as evaluation
import generate as program
import quantize
from checkpoint import open_checkpoint
from eval import evaluate
from files import read_header
from formats import FORMATS, Weight, group_parameters, quantize_int4
from generate import generate, load_model
from ops.integer import dequantize, unpack_int4
from quantize import gptq
from text import sample_windows, windows

MODES = {  # name of the file -> arguments
    "gemma-int8": ("int8",),
    "gemma-int4-g32": ("int4", "--quantize_embedding"),
    "gemma-int4-g128": ("int4", "--group_size", "128"),
    "gemma-int4-gptq-g32": ("int4-gptq", "--max_tokens", "2048", "--device", "cpu"),
    "gemma-int4-gptq-g128": ("int4-gptq", "--max_tokens", "2048", "--device", "cpu", "--group_size", "128"),
}


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """A copy of tiny-gemma with a file of each mode beside it."""

    def make(directory):
        copy_tiny_gemma(directory)
        for name, arguments in MODES.items():
            assert quantize.main(["--checkpoint_path", str(directory), "--mode", *arguments]) == 0
            assert (directory / f"{name}.safetensors").exists()

    return made_once(tmp_path_factory, "quantized", make)


@pytest.fixture(scope="module")
def heldout():
    """Windows of Python's own library, which is no calibration text."""
    _, tokenizer = load_model(TINY_GEMMA, device="cpu")
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text(encoding="utf-8") for name in ("textwrap.py", "json/decoder.py")]
    return windows(texts, tokenizer, 512)[:3]


@pytest.fixture
def copy(tmp_path):
    return copy_tiny_gemma(tmp_path)


def load(path, precision="fp32"):
    return load_model(path, device="cpu", precision=precision)[0]


# --- GPTQ


def problem(n=6, k=96, samples=300):
    """A weight, and the hessian of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(samples, k // 3, generator=generator).double()
        @ torch.randn(k // 3, k, generator=generator).double()
    )
    x += 0.3 * torch.randn(samples, k, generator=generator)
    return torch.randn(n, k, generator=generator).double(), x.T @ x


def direct(weight, hessian, group, act_order, damping):
    """GPTQ as the paper's (2) says it: after each column, all that are left move by the solution of their own
    problem."""
    weight, k = weight.clone(), weight.shape[1]
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(k).double()
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(k))
    parameters = [group_parameters(weight[:, g : g + group]) for g in range(0, k, group)]
    codes = torch.zeros(weight.shape, dtype=torch.long)
    for i, column in enumerate(order):
        g = column // group
        if not act_order and column % group == 0:
            parameters[g] = group_parameters(weight[:, column : column + group])
        scale, zero = parameters[g].double().unbind(-1)
        codes[:, column] = (weight[:, column] / scale + zero).round().clamp(0, 15)
        error = weight[:, column] - (codes[:, column] - zero) * scale
        rest = order[i + 1 :]
        if rest:  # least squares: what moves the rest has to do for x what the error did
            weight[:, rest] += torch.outer(error, torch.linalg.solve(hessian[rest][:, rest], hessian[rest, column]))
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("k", "group", "block"), [(96, 32, 128), (128, 64, 64), (160, 32, 32)])
def test_gptq_is_the_direct_solution(act_order, k, group, block, monkeypatch):
    monkeypatch.setattr(quantize, "BLOCK", block)
    weight, hessian = problem(k=k)
    expected = direct(weight, hessian, group, act_order, 0.01)
    result = gptq(weight, hessian.clone(), group, act_order)
    assert torch.equal(unpack_int4(result[0]).long(), expected)

    def loss(parameters):
        quantized = Weight.of("int4", *parameters, shape=tuple(weight.shape), group=group)
        error = dequantize(quantized, torch.float64) - weight
        return (error @ hessian * error).sum()

    assert loss(result) < 0.6 * loss(quantize_int4(weight, group))
    in_float32 = gptq(weight.float(), hessian.float(), group, act_order)
    assert (unpack_int4(in_float32[0]) != expected).float().mean() < 0.02


def test_gptq_with_inputs_that_are_always_zero_and_without_text():
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    result = Weight.of("int4", *gptq(weight, hessian, 32), shape=tuple(weight.shape), group=32)
    error = (dequantize(result, torch.float64) - weight)[:, 5].abs()
    assert (error <= 0.6 * result.scale[:, 0, 0].double()).all()
    with pytest.raises(ValueError, match="not positive definite: raise --damping"):
        gptq(weight, -torch.eye(96).double(), 32)
    hessian[5, 5] = float("inf")
    with pytest.raises(ValueError, match="computes values that are not finite"):
        gptq(weight, hessian, 32)


# --- files


@pytest.mark.parametrize("name", MODES)
def test_file_says_what_it_is_and_runs(quantized, name, capsys):
    file = quantized / f"{name}.safetensors"
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    assert metadata["weight_format"] == ("int8" if "int8" in name else "int4")
    assert metadata.get("group_size") == {"g32": "32", "g128": "128"}.get(name.rsplit("-", 1)[1])
    assert metadata.get("method") == (None if "int8" in name else "gptq" if "gptq" in name else "rounded")
    model, exact = load(file), load(quantized)
    assert exact.layers[0].attention.wqkv.weight.dtype == torch.float32  # a directory's are its BF16 weights
    assert model.layers[0].feed_forward.w2.weight.dtype == (torch.int8 if "int8" in name else torch.int32)
    assert (model.embedding.weight.dtype == torch.int8) == (name == "gemma-int4-g32")
    assert file.stat().st_size == pytest.approx(load(file, "bf16").weight_bytes, rel=0.005)
    arguments = ("--checkpoint_path", str(file), "--device", "cpu", "--temperature", "0", "--max_new_tokens", "8")
    assert program.main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 8


def test_directory_with_quantized_weights_only_names_them(quantized, tmp_path):
    for name in ("config.json", "tokenizer.model", "gemma-int8.safetensors"):
        shutil.copy(quantized / name, tmp_path)
    with pytest.raises(FileNotFoundError, match="name the file, .*gemma-int8.safetensors"):
        load(tmp_path)
    load(tmp_path / "gemma-int8.safetensors")


def test_rows_at_a_time_are_the_whole(quantized, monkeypatch):
    checkpoint, name = open_checkpoint(quantized), "layers.1.attention.wqkv.weight"
    whole = quantize.round_weight(checkpoint, name, "int4", 32)
    monkeypatch.setattr(quantize, "ROWS", 100)
    assert all(map(torch.equal, quantize.round_weight(checkpoint, name, "int4", 32), whole))
    assert torch.equal(load(quantized / "gemma-int4-g32.safetensors").layers[1].attention.wqkv.weight, whole[0])


def test_quality(quantized, heldout):
    """What each costs on text that GPTQ did not see; with so little text on either side the bounds are wide."""
    exact = load(quantized)
    results = {name: evaluate(load(quantized / f"{name}.safetensors"), heldout, 8, reference=exact) for name in MODES}
    perplexity = evaluate(exact, heldout, 8)["perplexity"]
    assert results["gemma-int8"]["perplexity"] == pytest.approx(perplexity, rel=0.002)
    assert results["gemma-int4-gptq-g32"]["perplexity"] == pytest.approx(perplexity, rel=0.05)
    for group in ("g32", "g128"):
        assert results[f"gemma-int4-gptq-{group}"]["kl"] < results[f"gemma-int4-{group}"]["kl"]


def test_fp8_cache_of_integer_weights(quantized, copy, capsys):
    """With factors for K and V of these weights, in a file of their own."""
    file = shutil.copy(quantized / "gemma-int4-g32.safetensors", copy)
    arguments = ["--checkpoint_path", str(file), "--max_tokens", "512", "--window", "128", "--device", "cpu"]
    assert calibrate.main(arguments) == 0
    assert (copy / "gemma-int4-g32-fp8_scales.safetensors").exists()
    assert not (copy / "fp8_scales.safetensors").exists()
    model = load(file)
    assert len(model.kv_scales.values) == 6
    assert load(copy).kv_scales.values is None
    prompts = [[2, 310, 315], [2, 400, 1500, 20, 21, 900], [2]]
    options = dict(**GREEDY, kv_cache_dtype=torch.float8_e4m3fn)
    expected = [generate(model, [prompt], 12, **options)[0] for prompt in prompts]
    assert generate(model, prompts, 12, **options) == expected


def test_eval_takes_a_file(quantized, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 8)
    file = str(quantized / "gemma-int8.safetensors")
    arguments = ["--text", str(tmp_path / "text.txt"), "--device", "cpu", "--json", "--checkpoint_path", file]
    assert evaluation.main([*arguments, "--against", str(quantized)]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["kl"] < 0.01


@pytest.mark.parametrize("place", range(0, 10, 3))
def test_a_cut_file_is_refused(quantized, tmp_path, place):
    for name in ("config.json", "tokenizer.model", "gemma-int4-g32.safetensors"):
        shutil.copy(quantized / name, tmp_path)
    file = tmp_path / "gemma-int4-g32.safetensors"
    with open(file, "rb+") as f:
        f.truncate(file.stat().st_size * place // 10)
    with pytest.raises(ValueError, match="gemma-int4-g32.safetensors is (cut|damaged)"):
        load(file)


Q = "layers.0.attention.wqkv"


@pytest.mark.parametrize(
    ("edit", "group", "message"),
    [
        (lambda w: w.pop(f"{Q}.scale"), "32", f"lacks {Q}.scale"),
        (
            lambda w: w.update({f"{Q}.scale": w[f"{Q}.scale"].float()}),
            "32",
            f"{Q}.scale is stored as F32, int4 has BF16",
        ),
        (
            lambda w: w.update({f"{Q}.scale": w[f"{Q}.scale"][:, :-1].clone()}),
            "32",
            rf"{Q}.scale has shape \[768, 7, 2\]",
        ),
        (lambda w: w.update({"layers.9.scale": torch.zeros(3)}), "32", "no place for: layers.9.scale"),
        (lambda w: None, "64", r"scale has shape \[768, 8, 2\], config.json asks for \[768, 4, 2\]"),
        (lambda w: None, "48", "in groups of 48, not of 32, 64, 128 or 256"),
    ],
)
def test_bad_files_are_refused_by_name(quantized, tmp_path, edit, group, message):
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(quantized / name, tmp_path)
    weights = load_file(quantized / "gemma-int4-g32.safetensors")
    edit(weights)
    metadata = {"format": "gemma-fast", "format_version": "1", "weight_format": "int4", "group_size": group}
    save_file(weights, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--mode int4 --group_size 256",
            "256 does not divide the 896 inputs of layers.0.feed_forward.w2.weight: use 32",
        ),
        ("--mode int4 --group_size 48", "--group_size: invalid choice: 48 (choose from 32, 64, 128, 256)"),
        ("--mode int4 --group_size 0", "--group_size: invalid choice: 0"),
        ("--mode int8 --group_size 32", "--group_size is for --mode int4 and --mode int4-gptq only"),
        ("--mode int4 --text x.txt", "--text is for --mode int4-gptq only"),
        ("--mode int8 --fp8_head", "--fp8_head is for --mode fp8 only"),
        ("--mode int8 --export_hf x", "--export_hf is for --mode fp8 only"),
        ("--mode int4-gptq --text nowhere.txt", "no text file at nowhere.txt"),
        ("--mode int4-gptq --text TEXT", "tokens of text, and at least 256 are needed"),
        ("--mode int4-gptq --window 9000", "exceeds the context"),
        ("--mode int4-gptq --window 0", "--window: must be a whole number, at least 2, not '0'"),
        ("--mode int4-gptq --max_tokens -1", "--max_tokens: must be a whole number, at least 1, not '-1'"),
        ("--mode int4-gptq --max_tokens 255", "there are 255 tokens of text, and at least 256 are needed"),
        ("--mode int4-gptq --damping -1", "--damping: must be a number, from 0 to 1, not '-1'"),
        ("--mode int4 --damping 0", "--damping is for --mode int4-gptq only"),
        ("--mode int3", "invalid choice: 'int3'"),
    ],
)
def test_mistakes(copy, capsys, arguments, message):
    (copy / "text.txt").write_text("x = 1\n")
    arguments = [str(copy / "text.txt") if word == "TEXT" else word for word in arguments.split()]
    assert quantize.main([*arguments, "--checkpoint_path", str(copy)]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert message in err[0]
    assert not list(copy.glob("gemma*"))


def test_what_an_integer_file_is_not_for(quantized, capsys):
    file = str(quantized / "gemma-int8.safetensors")
    assert quantize.main(["--mode", "int4", "--checkpoint_path", file]) == 2
    assert "is quantized already" in capsys.readouterr().err
    assert program.main(["--fp8", "--checkpoint_path", file, "--device", "cpu"]) == 2
    assert "has int8 weights, which can't run in FP8: leave out --fp8" in capsys.readouterr().err


def test_layout_in_a_file_is_one_for_all_devices(quantized):
    tensors, _ = read_header(quantized / "gemma-int4-g32.safetensors")
    kinds = {name.split(".", 2)[-1]: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    assert kinds["attention.wqkv.weight"] == ("I32", (768, 32))
    assert kinds["attention.wqkv.scale"] == ("BF16", (768, 8, 2))
    assert tensors["embedding.weight"].dtype == "I8"
    assert tensors["embedding.scale"].shape == (4096,)
    assert load(quantized / "gemma-int4-g32.safetensors").embedding.format.name == "int8"


# --- Gemma 4

GPTQ = ("--device", "cpu", *gemma4.CALIBRATION)


@pytest.fixture(scope="session", params=gemma4.KINDS)
def gemma4_quantized(request, tmp_path_factory):
    """A directory with a file of each mode beside the weights."""

    def make(directory):
        shutil.copytree(gemma4.calibrated(request.param, tmp_path_factory), directory, dirs_exist_ok=True)
        arguments = ["--checkpoint_path", str(directory), "--mode"]
        text = ("--text", str(directory / "text.txt"))
        for mode in (("int8", "--quantize_embedding"), ("int4",), ("int4-gptq", *text, *GPTQ)):
            assert quantize.main([*arguments, *mode]) == 0

    return made_once(tmp_path_factory, f"gemma4-{request.param}-int", make)


@pytest.fixture
def moe(tmp_path_factory, tmp_path):
    return shutil.copytree(gemma4.calibrated("moe", tmp_path_factory), tmp_path / "copy")


@pytest.mark.parametrize("name", ["gemma-int8", "gemma-int4-g32"])
def test_gemma_4_weights_are_rounded_and_nothing_else_is(gemma4_quantized, name):
    model, exact = load(gemma4_quantized / f"{name}.safetensors", "bf16"), load(gemma4_quantized, "bf16")
    format, quantized = FORMATS[name.split("-")[1]], set()
    for path, weight in model.named_modules():
        if isinstance(weight, Weight) and weight.format.name != "bf16":
            quantized.add(path)
            expected = weight.format.quantize(exact.get_submodule(path).data, weight.group)
            assert all(map(torch.equal, weight.parameters(), expected)), path
            assert weight.format is (format.of_embedding if path == "embedding" else format)
    parts = ["attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2"]
    parts += ["experts.w13", "experts.w2"] * (model.config.n_experts > 0)
    paths = {f"layers.{i}.{part}" for i in range(model.config.n_layers) for part in parts}
    assert quantized == (paths | {"embedding"} if name == "gemma-int8" else paths)
    others = {path: parameter for path, parameter in model.named_parameters() if path.rsplit(".", 1)[0] not in paths}
    for path, parameter in others.items():
        if not path.startswith("embedding"):
            assert torch.equal(parameter, exact.get_parameter(path)), path


def layer_outputs(model, pieces) -> list[torch.Tensor]:
    """The residual stream behind each layer."""
    found = [[] for _ in model.layers]

    def keep(layer):
        return lambda module, inputs, residual: found[layer].append(residual.added(model.ops, model.config, None)[0])

    hooks = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(model.layers)]
    with torch.inference_mode():
        for piece in pieces:
            model(torch.tensor([piece]), all_logits=True)
    for hook in hooks:
        hook.remove()
    return [torch.cat(each) for each in found]


def test_gptq_of_gemma_4_is_better_than_rounding_in_every_layer(gemma4_quantized):
    """On its own text, where rounding's errors are those that it made up for."""
    exact, tokenizer = load_model(gemma4_quantized, device="cpu", precision="fp32")
    pieces = sample_windows(gemma4_quantized / "text.txt", tokenizer, 128, 256, 1024, 64)
    expected = layer_outputs(exact, pieces)

    def errors(name) -> torch.Tensor:
        outputs = layer_outputs(load(gemma4_quantized / f"{name}.safetensors"), pieces)
        return torch.stack([(a - b).norm() / b.norm() for a, b in zip(outputs, expected)])

    assert (errors("gemma-int4-gptq-g32") < 0.95 * errors("gemma-int4-g32")).all()


@pytest.mark.parametrize("name", ["gemma-int8", "gemma-int4-gptq-g32"])
def test_gemma_4_generates_with_an_fp8_cache(gemma4_quantized, tmp_path, name):
    """With factors for K and V of these weights, of which layers that share keys have their donors'."""
    for part in ("config.json", "tokenizer.json", "text.txt", f"{name}.safetensors"):
        shutil.copy(gemma4_quantized / part, tmp_path)
    file = tmp_path / f"{name}.safetensors"
    arguments = ["--checkpoint_path", str(file), "--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    assert calibrate.main([*arguments, "--max_tokens", "256", "--window", "128"]) == 0
    model = load(file)
    assert len(set(model.kv_scales.values)) == model.config.n_layers - model.config.n_shared_layers
    prompts = [[2, 310, 315], [2, 400, 500, 20, 21, 600], [2]]
    options = dict(**GREEDY, kv_cache_dtype="fp8_e4m3")
    expected = [generate(model, [prompt], 12, **options)[0] for prompt in prompts]
    assert generate(model, prompts, 12, **options) == expected


def test_hessians_of_experts_are_those_of_the_tokens_that_each_meets(moe):
    """In the first layer, of weights that GPTQ leaves as they are: transformers' own inputs."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        moe, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    pieces = torch.randint(3, 640, (8, 64), generator=torch.Generator().manual_seed(0))
    hessians, expected = [], {}

    def inputs_of(experts, inputs):
        x, chosen, _ = inputs
        for e in range(8):
            rows = x[(chosen == e).any(1)]
            gate, up = (rows @ experts.gate_up_proj[e].T).chunk(2, -1)
            expected[e] = [rows.float(), (experts.act_fn(gate) * up).float()]

    def same(weight, hessian):
        hessians.append(hessian.clone())
        return weight, torch.zeros(())

    theirs.model.layers[0].experts.register_forward_pre_hook(inputs_of)
    with torch.inference_mode():
        theirs(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "_numbers", lambda parameters, *_: parameters[0])
        weights = quantize.gptq_weights(open_checkpoint(moe), pieces.tolist(), torch.device("cpu"), same, 32)
        for _ in range(6):  # those of the first layer
            parameters = next(weights)
    assert torch.equal(parameters[0], load(moe, "bf16").layers[0].experts.w2.data)
    assert len(hessians) == 4 + 2 * 8
    for e, inputs in expected.items():
        assert len(inputs[0]) > 100
        for x, hessian in zip(inputs, hessians[4 + 2 * e :]):
            # Attention is rounded otherwise, which sends some tokens to other experts; another expert's are 0.7 away.
            assert (hessian - x.T @ x).norm() < 0.1 * (x.T @ x).norm()


def test_experts_that_meet_few_tokens_are_rounded_and_named(moe, capsys):
    """Of 64 tokens, the fewest that GPTQ takes here, two experts each; 8 are few. Tokens that are all alike go to few
    experts."""
    (moe / "alike.txt").write_text("x" * 200)
    arguments = ["--checkpoint_path", str(moe), "--mode"]
    assert quantize.main([*arguments, "int4"]) == 0
    options = ["--text", str(moe / "alike.txt"), "--max_tokens", "64", "--window", "64", "--device", "cpu"]
    assert quantize.main([*arguments, "int4-gptq", *options]) == 0
    notes = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "note: experts" in line]
    assert len(notes) == 1
    assert "note: experts that met too few tokens for GPTQ are rounded: layers." in notes[0]
    rounded, quantized = (load(moe / f"gemma-int4{kind}-g32.safetensors") for kind in ("", "-gptq"))
    same = {
        f"layers.{i}.experts {e}"
        for i in range(3)
        for e in range(8)
        if torch.equal(rounded.layers[i].experts.w13.data[e], quantized.layers[i].experts.w13.data[e])
    }
    assert 0 < len(same) < 24
    assert {name for name in notes[0].split(": ")[-1].split(" and ")[0].split(", ")} <= same


def test_groups_that_do_not_divide_the_inputs_of_experts(moe, capsys):
    assert quantize.main(["--checkpoint_path", str(moe), "--mode", "int4", "--group_size", "64"]) == 2
    message = "--group_size 64 does not divide the 96 inputs of layers.0.experts.w2.weight: use 32"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
