"""LoRA adapters: PEFT's are read as PEFT runs them, ours are read by PEFT, and what can't be merged is refused by name."""

import importlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import CASES, ROOT, SIZES, TINY_GEMMA, reference_model, save_checkpoint, tiny_config
from safetensors.torch import load_file, save_file
from test_parallel import on_ranks

import generate as program
from adapter import Adapter, read_adapter, save_adapter, updates_of
from checkpoint import SCALES_NAME, convert, open_checkpoint, read_config, read_scales, sources, write_scales
from export import export_checkpoint
from generate import load_model

peft = pytest.importorskip("peft")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = ["gemma-mqa", "gemma2-window-half", "gemma3-window-small", "gemma4-experts", "gemma4-shared"]
TOKENS = torch.randint(2, 128, (2, 30), generator=torch.Generator().manual_seed(0))


def with_adapter(model, directory: Path, targets=LINEAR, base: str = "", **settings):
    """Puts random factors beside a model's linear modules by PEFT, and saves them; gives PEFT's model."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **settings
    )
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)
    with warnings.catch_warnings(action="ignore"):  # there is no base model on the Hub
        wrapped.save_pretrained(directory)
    return wrapped.eval()


def load(path: Path, **options):
    with warnings.catch_warnings(action="ignore"):
        return load_model(path, device="cpu", **{"precision": "fp32"} | options)[0]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS, all_logits=True)


def merge(checkpoint: Path, adapter: Path, out: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        options = ["--checkpoint_path", str(checkpoint), "--adapter", str(adapter), "--output_dir", str(out)]
        return importlib.import_module("merge_adapter").main(options)


def edit(directory: Path, tensors=None, **settings) -> Path:
    """Changes what an adapter has: `tensors` is called with its factors, None takes a setting away."""
    file = directory / "adapter_config.json"
    content = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))
    if tensors is not None:
        factors = load_file(directory / "adapter_model.safetensors")
        tensors(factors)
        save_file(factors, directory / "adapter_model.safetensors")
    return directory


def of_layers(model, names=LINEAR, rank: int = 4) -> dict:
    """Random factors, as fine-tuning has them, of a transformers model's linear modules that have these names."""
    torch.manual_seed(2)
    return {
        name: (torch.randn(rank, module.in_features) * 0.2, torch.randn(module.out_features, rank) * 0.2)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in names
    }


@pytest.fixture(scope="module")
def tiny_adapter(tmp_path_factory):
    """Of tiny-gemma, whose logits it moves, in all of its linear modules."""
    torch.manual_seed(3)
    factors = {}
    for parts in sources(read_config(TINY_GEMMA)).values():
        for name, shape in parts:
            if name.endswith("_proj.weight"):
                a, b = torch.randn(8, shape[1]) * 0.1, torch.randn(shape[0], 8) * 0.1
                factors[name.removesuffix(".weight")] = a, b
    directory = tmp_path_factory.mktemp("adapters") / "pirate"
    save_adapter(directory, factors, 8, 16, TINY_GEMMA)
    return directory


# --- against PEFT


@pytest.fixture(scope="module", params=MODELS)
def adapted(request, tmp_path_factory):
    """PEFT's logits, and the directories of the checkpoint and of the adapter, for each kind of Gemma."""
    directory, model = tmp_path_factory.mktemp(request.param), reference_model(request.param)
    base = save_checkpoint(model, directory / "base")
    targets = [*LINEAR, "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection", "router.proj"]
    patterns = dict(
        rank_pattern={"q_proj": 2, "model.layers.1.mlp.up_proj": 3},
        alpha_pattern={"^model.layers.0.self_attn.o_proj": 11, "down_proj": 1.5},
    )
    theirs = with_adapter(model, directory / "adapter", targets, **patterns)
    with torch.no_grad():
        return theirs(TOKENS).logits, base, directory / "adapter"


def test_logits_are_those_of_peft(adapted, tmp_path):
    expected, base, adapter = adapted
    assert (logits(load(base)) - expected).abs().max() > 0.3
    torch.testing.assert_close(logits(load(base, adapter=adapter)), expected, atol=1e-4, rtol=0)
    converted = shutil.copytree(base, tmp_path / "converted")
    convert(open_checkpoint(base), converted / "gemma.safetensors")
    (converted / "model.safetensors").unlink()
    torch.testing.assert_close(logits(load(converted, adapter=adapter)), expected, atol=1e-4, rtol=0)


def test_a_merged_checkpoint_is_one_for_transformers_and_for_us(adapted, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    expected, base, adapter = adapted
    assert merge(base, adapter, tmp_path / "out") == 0
    assert capsys.readouterr().err.endswith(f"{base} with {read_adapter(adapter)}\n")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(base, adapter=adapter)))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in base.iterdir()}


def test_ranks_merge_what_one_process_does(tiny_adapter):
    expected = logits(load(TINY_GEMMA, adapter=tiny_adapter))
    options = dict(device="cpu", precision="fp32", adapter=tiny_adapter)
    first, second = on_ranks(2, lambda sums: logits(load_model(TINY_GEMMA, **options, sums=sums)[0]))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["gemma-gqa", "gemma4-shared"])  # of the latter not all layers have keys
def test_peft_reads_ours(case, tmp_path):
    model = reference_model(case)
    base, factors = save_checkpoint(model, tmp_path / "base"), of_layers(model)
    save_adapter(tmp_path / "adapter", factors, 4, 2.0, base)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["target_modules"] == sorted(LINEAR)) == (case == "gemma-gqa")
    with warnings.catch_warnings(action="error", category=UserWarning):  # of factors that are missing
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    ours = load(base, adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=0)
    assert (logits(load(base)) - expected).abs().max() > 0.3
    read = read_adapter(tmp_path / "adapter")
    assert (read.rank, read.alpha, set(read.factors)) == (4, 2.0, set(factors))
    assert all(torch.equal(one, two) for name in factors for one, two in zip(read.factors[name], factors[name]))
    save_adapter(tmp_path / "adapter", factors, 4, 2.0, base)  # over the old one
    with pytest.raises(ValueError, match=r"\[4, 64\] and \[.*, 4\] of model.layers.0.* don't fit the rank 8"):
        save_adapter(tmp_path / "adapter", factors, 8, 2.0, base)


def test_the_text_part_of_a_multimodal_model(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    text = SIZES | CASES["gemma3-window-small"][1] | dict(num_hidden_layers=2)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    settings = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration._from_config(settings, attn_implementation="eager", dtype=torch.float32)
    model.eval()
    base = save_checkpoint(model, tmp_path / "base")
    save_adapter(tmp_path / "ours", of_layers(model.model.language_model, rank=2), 2, 4, base)
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    theirs = with_adapter(model, tmp_path / "text", targets)
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
    torch.testing.assert_close(logits(load(base, adapter=tmp_path / "text")), expected, atol=1e-4, rtol=0)
    assert merge(base, tmp_path / "text", tmp_path / "out") == 0
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert before.keys() == after.keys()
    changed = {key.split(".")[-2] for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed == {"q_proj", "v_proj", "down_proj"}

    # As older versions named it, and with factors of the vision tower beside
    def rename(factors: dict):
        for key in list(factors):
            factors[key.replace("model.language_model.", "language_model.model.")] = factors.pop(key)
        vision = "base_model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
        factors |= {f"{vision}.lora_A.weight": torch.ones(4, 32), f"{vision}.lora_B.weight": torch.ones(32, 4)}

    edit(shutil.copytree(tmp_path / "text", tmp_path / "both"), rename)
    with pytest.warns(UserWarning, match="adapter both .* has factors for images or sound, which are left out"):
        ours, _ = load_model(base, "cpu", "fp32", adapter=tmp_path / "both")
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=0)
    assert merge(base, tmp_path / "both", tmp_path / "out2") == 2
    assert "changes vision_tower.vision_model.encoder.layers.0.self_attn.q_proj, of a part" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()

    again = Gemma3ForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    with warnings.catch_warnings(action="error", category=UserWarning):
        theirs = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
    torch.testing.assert_close(logits(load(base, adapter=tmp_path / "ours")), expected, atol=1e-4, rtol=0)


# --- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sum_is_rounded_once(tiny_adapter, tmp_path, dtype, monkeypatch):
    def cast(factors: dict):
        factors |= {key: factor.to(dtype) for key, factor in factors.items()}

    adapter = edit(shutil.copytree(tiny_adapter, tmp_path / "adapter"), cast)
    monkeypatch.setattr("checkpoint.PIECE", 5000)  # pieces that end within q, k and v
    ours, stored = load(TINY_GEMMA, precision="bf16", adapter=adapter), load_file(TINY_GEMMA / "model.safetensors")
    expected = []
    for name in ("q", "k", "v"):
        module = f"model.layers.1.self_attn.{name}_proj"
        a, b = (factor.float() for factor in read_adapter(adapter).factors[module])
        expected.append((stored[f"{module}.weight"].float() + 2 * b @ a).bfloat16())
    weight = ours.layers[1].attention.wqkv.weight
    assert weight.dtype == torch.bfloat16
    # The order of a product's sum may move a value that lies between two
    assert (weight != torch.cat(expected)).float().mean() < 1e-3
    torch.testing.assert_close(weight, torch.cat(expected), rtol=2**-7, atol=1e-6)
    assert torch.equal(ours.embedding.weight, load(TINY_GEMMA, precision="bf16").embedding.weight)


def test_fp8_is_that_of_the_merged_weights(calibrated, tiny_adapter, tmp_path):
    def only_attention(factors: dict):
        for key in [key for key in factors if "mlp" in key]:
            del factors[key]

    adapter = edit(shutil.copytree(tiny_adapter, tmp_path / "adapter"), only_attention)
    edit(adapter, target_modules=LINEAR[:4])
    ours = load(calibrated, fp8=True, precision="bf16", adapter=adapter)
    merged, config = tmp_path / "merged", read_config(calibrated)
    assert merge(calibrated, adapter, merged) == 0
    weights, base = load(merged, precision="bf16"), read_scales(calibrated / SCALES_NAME, config)
    amax = {f"{name}_scale": weight.abs().max().item() for name, weight in weights.named_parameters()}
    scales = base | {name: amax[name] / 448 for name in base if name in amax}
    write_scales(merged / SCALES_NAME, config, scales, {})
    expected = load(merged, fp8=True, precision="bf16")
    for (name, one), (_, two) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)), name
    name = "layers.0.attention.wqkv.weight_scale"
    assert ours.layers[0].attention.wqkv.scale.item() == pytest.approx(scales[name])
    assert scales[name] > 1.1 * base[name]
    # Factors of another checkpoint are still told by its own weights
    other = shutil.copytree(calibrated, tmp_path / "other")
    write_scales(other / SCALES_NAME, config, scales, {})
    with pytest.raises(ValueError, match=rf"{SCALES_NAME} is of another model: layers.0.attention.wqkv"):
        load(other, fp8=True, adapter=adapter)


def test_an_fp8_file_beside_bf16_weights_is_passed_over(calibrated, tiny_adapter, tmp_path):
    import quantize

    both = shutil.copytree(calibrated, tmp_path / "both")
    assert quantize.main(["--mode", "fp8", "--checkpoint_path", str(both)]) == 0
    ours = load(both, fp8=True, precision="bf16", adapter=tiny_adapter)
    assert torch.equal(logits(ours), logits(load(calibrated, fp8=True, precision="bf16", adapter=tiny_adapter)))
    with pytest.raises(
        ValueError, match=r"gemma-fp8.safetensors has fp8 weights.*: merge it .*merge_adapter.py\), then"
    ):
        load(both / "gemma-fp8.safetensors", adapter=tiny_adapter)
    assert merge(both / "gemma-fp8.safetensors", tiny_adapter, tmp_path / "out") == 2


@pytest.mark.parametrize("layout", ["experts apart", "fused", "converted"])
def test_an_export_of_other_weights(tmp_path, layout):
    """As fine-tuning makes it: each weight is asked for once, in the model's order, which other processes can follow."""
    model = reference_model("gemma4-experts")
    base = save_checkpoint(model, tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    if layout == "experts apart":
        for key in [key for key in stored if ".experts." in key]:
            module, name = key.rsplit(".", 1)
            for e, matrix in enumerate(stored.pop(key)):
                parts = dict(zip(("gate", "up"), matrix.chunk(2))) if name == "gate_up_proj" else {"down": matrix}
                stored |= {f"{module}.{e}.{part}_proj.weight": rows.clone() for part, rows in parts.items()}
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    if layout == "converted":
        convert(open_checkpoint(base), base / "gemma.safetensors")
        (base / "model.safetensors").unlink()
    weights, asked = dict(load(base).named_parameters()), []

    def tensor_of(name: str) -> torch.Tensor:
        asked.append(name)
        return weights[name].double() * 2

    export_checkpoint(tmp_path / "out", base, tensor_of)
    assert asked == list(sources(read_config(base)))
    after = load_file(tmp_path / "out" / "model.safetensors")
    del stored["lm_head.weight"]
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[key], 2 * stored[key]) for key in stored)
    weights["layers.1.attention.wqkv.weight"][3, 4] = float("nan")
    with pytest.raises(ValueError, match="model.layers.1.self_attn.q_proj.weight has values that are not finite"):
        export_checkpoint(tmp_path / "out2", base, tensor_of)
    assert not any((tmp_path / "out2").iterdir())


@pytest.mark.cuda
@pytest.mark.parametrize("fp8", [False, True])
def test_a_gpu_merges_as_a_cpu(calibrated, tiny_adapter, monkeypatch, fp8):
    monkeypatch.setattr("checkpoint.PIECE", 5000)
    options = dict(fp8=fp8, precision="bf16", adapter=tiny_adapter)
    ours, expected = (load_model(calibrated, device, **options)[0] for device in ("cuda", "cpu"))
    for (name, one), (_, two) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        one, two = one.cpu().float(), two.float()
        step = dict(rtol=2**-3, atol=2**-9) if fp8 else dict(rtol=2**-7, atol=1e-6)  # of rounding, E4M3's least too
        torch.testing.assert_close(one, two, **step, msg=name)
        assert (one != two).float().mean() < 1e-2, name


# --- refusals

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(use_rslora=True), "use_rslora is True"),
        (dict(use_dora=True), "use_dora is True"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (dict(bias="all"), "bias is 'all'; only 'none' can be merged"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out is True"),
        (dict(lora_bias=True), "lora_bias is True"),
        (dict(layer_replication=[[0, 2]]), r"layer_replication is \[\[0, 2\]\]"),
        (dict(alora_invocation_tokens=[5]), r"alora_invocation_tokens is \[5\]"),
        (dict(something_new=1), "something_new is 1"),
        (dict(peft_type="LOHA"), "peft_type is 'LOHA'; only 'LORA'"),
        (dict(peft_type="gone"), "peft_type is None"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa': its factors are those of other weights"),
        (dict(init_lora_weights=[]), r"init_lora_weights is \[\]"),
        (dict(r=0), "r must be a whole number, at least 1, not 0"),
        (dict(r=True), "r must be a whole number, at least 1, not True"),
        (dict(r="gone"), "r must be a whole number, at least 1, not None"),
        (dict(lora_alpha="16"), "lora_alpha must be a number, not '16'"),
        (dict(lora_alpha=10**400), "lora_alpha must be a number, not 1000"),
        (dict(rank_pattern=[1]), r"rank_pattern is \[1\], not an object"),
        (dict(rank_pattern={"q_proj": "2"}), "rank_pattern's q_proj must be a whole number"),
        (dict(alpha_pattern={r"layers\.[02].*": 2}), r"alpha_pattern has the pattern .*; only names of modules"),
        (dict(alpha_pattern={"q_proj": None}), "alpha_pattern's q_proj must be a number, not None"),
        (dict(r=7), r"lora_A \[8, 256\] and lora_B \[512, 8\], which don't fit the rank 7"),
    ],
)
def test_settings_that_cant_be_followed(tiny_adapter, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(edit(shutil.copytree(tiny_adapter, tmp_path / "adapter"), **settings))


def set_to(key: str, value: torch.Tensor):
    return lambda factors: factors.update({key: value})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda f: f.pop(f"{Q}.lora_B.weight"), "lacks lora_B of model.layers.0.self_attn.q_proj"),
        (lambda f: f.pop(f"{Q}.lora_A.weight"), "lacks lora_A of model.layers.0.self_attn.q_proj"),
        (lambda f: f[f"{Q}.lora_A.weight"][3].fill_(float("nan")), "q_proj.lora_A.weight .* not finite"),
        (lambda f: f[f"{Q}.lora_B.weight"][3].fill_(float("-inf")), "q_proj.lora_B.weight .* not finite"),
        (set_to(f"{Q}.lora_A.weight", torch.zeros(8, 256, dtype=torch.int8)), "is stored as I8; BF16, F16, F32"),
        (set_to(f"{Q}.lora_A.weight", torch.zeros(8)), r"lora_A \[8\]"),
        (set_to(f"{Q}.lora_A.weight", torch.zeros(8, 60)), r"q_proj make \[512, 60\], the weight is \[512, 256\]"),
        (set_to(f"{Q}.lora_B.weight", torch.zeros(60, 8)), r"q_proj make \[60, 256\], the weight is \[512, 256\]"),
        (set_to(f"{Q}.lora_magnitude_vector", torch.zeros(8)), "has .*lora_magnitude_vector, which is no lora_A"),
        (set_to("base_model.model.lm_head.weight", torch.zeros(8)), "has base_model.model.lm_head.weight, which is no"),
        (
            lambda f: [f.update({key.replace("q_proj", "w_proj"): f.pop(key)}) for key in list(f) if key.startswith(Q)],
            "factors of model.layers.0.self_attn.w_proj, which is no linear layer",
        ),
        (
            lambda f: [f.update({key.replace(".0.", ".66."): f[key].clone()}) for key in list(f) if key.startswith(Q)],
            "another model: it has factors of layer 66, this model has 6 layers",
        ),
        (lambda f: [f.pop(key) for key in list(f) if ".5." in key], "its last layer is 4, this model's .* is 5"),
        (lambda f: f.clear(), "has no factors of the text model"),
    ],
)
def test_factors_that_dont_fit(tiny_adapter, tmp_path, tensors, message):
    adapter = edit(shutil.copytree(tiny_adapter, tmp_path / "adapter"), tensors)
    with pytest.raises(ValueError, match=message):
        updates_of(read_adapter(adapter), read_config(TINY_GEMMA))


def test_modules_of_some_layers_only(tiny_adapter, tmp_path):
    def thin(factors: dict):
        for key in [key for key in factors if ".5." in key or (".2." in key and "q_proj" in key)]:
            del factors[key]

    adapter = edit(shutil.copytree(tiny_adapter, tmp_path / "adapter"), thin, layers_to_transform=[0, 1, 2, 3, 4])
    ours, base = load(TINY_GEMMA, adapter=adapter), load(TINY_GEMMA)
    same = [
        torch.equal(one.attention.wqkv.weight, two.attention.wqkv.weight) for one, two in zip(ours.layers, base.layers)
    ]
    assert same == [False] * 5 + [True]
    rows = ours.config.n_heads * ours.config.head_dim
    mine, theirs = (model.layers[2].attention.wqkv.weight for model in (ours, base))
    assert torch.equal(mine[:rows], theirs[:rows])
    assert not torch.equal(mine[rows:], theirs[rows:])


def test_keys_of_a_layer_that_takes_those_of_another():
    """Older versions of transformers had modules there, which nothing went through."""
    config = tiny_config("gemma4-shared")
    names = [f"model.layers.{layer}.self_attn.k_proj" for layer in (2, 5)]
    factors = {name: (torch.ones(1, 64), torch.ones(64, 1)) for name in names}
    updates = updates_of(Adapter("old", factors, 1, 1.0, dict.fromkeys(names, 1.0)), config)
    assert [*updates] == ["layers.2.attention.wqkv.weight"]


def test_directories_that_are_no_adapter(tiny_adapter, tmp_path):
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"adapter_model.bin is a pickle, which can run any code: save the adapter again"
    ):
        read_adapter(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        read_adapter(adapter)
    with pytest.raises(ValueError, match="adapter must be the directory of one, not 5"):
        read_adapter(5)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is cut or damaged"):
        read_adapter(adapter)


# --- the programs


def test_a_user_merges_while_generating(tiny_adapter, tmp_path, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        options = ["--checkpoint_path", str(TINY_GEMMA), "--device", "cpu", "--max_new_tokens", "12"]
        return program.main([*options, "--temperature", "0", *map(str, arguments)]), *capsys.readouterr()

    _, plain, err = run("--prompt", "import os")
    assert "adapter" not in err
    status, text, err = run("--prompt", "import os", "--adapter", tiny_adapter)
    assert status == 0
    assert text != plain
    assert ", with adapter pirate (rank 8, 42 modules)\n" in err
    assert merge(TINY_GEMMA, tiny_adapter, tmp_path / "merged") == 0
    assert run("--prompt", "import os", "--checkpoint_path", tmp_path / "merged")[1] == text
    assert run("--prompt", "import os", "--adapter", tiny_adapter, "--prompt_lookup")[1] == text


def test_a_run_goes_on_with_the_adapter_that_it_began_with(tiny_adapter, tmp_path, capsys, monkeypatch):
    options = ["--checkpoint_path", str(TINY_GEMMA), "--device", "cpu", "--max_new_tokens", "2", "--prompt", "a", "b"]
    options += ["--output", str(tmp_path / "out.jsonl")]

    def ends_early(*args, on_completion, **options):
        on_completion(0, 0, [5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program, "generate", ends_early)
        assert program.main([*options, "--adapter", str(tiny_adapter)]) == 130
    assert program.main(options) == 2
    assert "out.jsonl.partial is of a run with other prompts or settings" in capsys.readouterr().err
    assert program.main([*options, "--adapter", str(tiny_adapter)]) == 0


def test_eval_compares_with_the_base(tiny_adapter, tmp_path, capsys):
    import eval as evaluation

    (tmp_path / "text.txt").write_text("import os\n" * 20)
    arguments = ["--text", str(tmp_path / "text.txt"), "--checkpoint_path", str(TINY_GEMMA), "--device", "cpu"]
    arguments += ["--against", str(TINY_GEMMA), "--json"]
    assert evaluation.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["kl"] == 0
    assert evaluation.main([*arguments, "--adapter", str(tiny_adapter)]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] > 0.01
