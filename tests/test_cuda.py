"""The same on a GPU: against the reference's float32 logits and against our own CPU runs. float32 unless said."""

import pytest
import torch
from conftest import GREEDY, TEXTS, TINY_GEMMA, copy_tiny_gemma

import calibrate
import generate as program
import model as model_file
import quantize
from checkpoint import SCALES_NAME, read_config, read_scales
from generate import Stats, generate, load_model
from model import FP8Linear

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_GEMMA, device="cuda", precision="fp32")


@pytest.fixture(scope="module")
def prompts(tiny):
    return [tiny[1].encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def on_cpu():
    return load_model(TINY_GEMMA, device="cpu", precision="fp32")[0]


@torch.no_grad()
def test_logits_of_prefill_and_decode(reference):
    theirs, directory = reference
    ours, _ = load_model(directory, device="cuda", precision="fp32")
    tokens = torch.randint(2, 128, (3, 50), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    tokens = tokens.cuda()
    torch.testing.assert_close(ours(tokens, all_logits=True).cpu(), expected, atol=1e-4, rtol=0)
    ours.setup_caches(3, 64)
    lengths = torch.tensor([30, 4, 17], device="cuda")
    rows, position = torch.arange(3), lengths.clone()
    torch.testing.assert_close(
        ours(tokens[:, :30], None, lengths).cpu(), expected[rows, lengths.cpu() - 1], atol=1e-4, rtol=0
    )
    for _ in range(20):
        logits = ours(tokens[rows.cuda(), position][:, None], position)
        torch.testing.assert_close(logits.cpu(), expected[rows, position.cpu()], atol=1e-4, rtol=0)
        position += 1


@pytest.mark.parametrize("compile", [False, True])
def test_greedy_tokens_are_the_cpus(tiny, on_cpu, prompts, compile):
    expected = [generate(on_cpu, [prompt], 64, **GREEDY)[0] for prompt in prompts]
    assert generate(tiny[0], prompts, 64, compile=compile, **GREEDY) == expected
    assert generate(tiny[0], prompts, 64, batch_size=3, compile=compile, **GREEDY) == expected
    assert generate(tiny[0], prompts[:1], 64, compile=compile, compile_prefill=compile, **GREEDY) == expected[:1]


@pytest.mark.parametrize("compile", [False, True])
def test_samples_are_the_cpus(tiny, on_cpu, prompts, compile):
    """The noise is made on the host: a seed means the same on every device, where float32 leaves no near ties."""
    options = dict(seed=4, temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, num_samples=2)
    expected = generate(on_cpu, prompts, 30, **options)
    assert generate(tiny[0], prompts, 30, compile=compile, **options) == expected


@pytest.mark.parametrize("compile", [False, True])
def test_rows_that_stop_at_every_possible_step(tiny, prompts, compile):
    """The host learns of a stop one step late: the step too many must leave no trace."""
    endless = generate(tiny[0], prompts, 24, **GREEDY)
    for stop in {token for tokens in endless for token in tokens}:
        expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in endless]
        stats, seen = Stats(), []
        assert generate(tiny[0], prompts, 24, temperature=0, stop_ids=(stop,), compile=compile, stats=stats) == expected
        assert stats.steps <= min(23, max(map(len, expected)))  # one more than needed at most
        generate(tiny[0], prompts[:1], 24, temperature=0, stop_ids=(stop,), compile=compile, on_token=seen.append)
        assert seen == expected[0]


@torch.no_grad()
def test_bfloat16_loss_is_the_cpus(tiny):
    with open(torch.__file__, encoding="utf-8") as f:
        tokens = torch.tensor(tiny[1].encode(f.read())[: 8 * 512]).view(8, 512)

    def loss(device):
        model, _ = load_model(TINY_GEMMA, device=device, precision="bf16")
        logits = model(tokens.to(device), all_logits=True)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).cpu(), tokens[:, 1:].flatten()).item()

    assert loss("cuda") == pytest.approx(loss("cpu"), abs=0.002)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    directory = copy_tiny_gemma(tmp_path_factory.mktemp("calibrated"))
    assert calibrate.main(["--checkpoint_path", str(directory), "--max_tokens", "8192"]) == 0
    return directory


def python_tokens(tokenizer, rows: int, length: int) -> torch.Tensor:
    with open(torch.__file__, encoding="utf-8") as f:
        return torch.tensor(tokenizer.encode(f.read())[: rows * length]).view(rows, length)


@torch.inference_mode()
def test_calibration_is_the_cpus(calibrated, tmp_path):
    other = copy_tiny_gemma(tmp_path)
    assert calibrate.main(["--checkpoint_path", str(other), "--max_tokens", "8192", "--device", "cpu"]) == 0
    one, two = (read_scales(d / SCALES_NAME, read_config(d)) for d in (calibrated, other))
    for name, scale in one.items():  # maxima go through layers of bfloat16 roundings before they are taken
        assert scale == pytest.approx(two[name], rel=0.03), name


@torch.inference_mode()
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_logits_are_the_cpus(calibrated, tiny, kv_dtype):
    """Teacher-forced over 4 x 200 tokens: the mean loss agrees to 0.01 (0.02 with E5M2's two bits), single logits to less than FP8's own error.

    Not closer: a difference of one part in a million, which any other order of summing makes, moves some input to the
    next FP8 code, 6 % away, and after some layers two correct programs differ by most of what each differs from
    float32. Layer by layer they agree: see the next test.
    """
    tokens = python_tokens(tiny[1], 4, 200)

    def logits(directory, device, precision, fp8=False):
        model, _ = load_model(directory, device=device, precision=precision, fp8=fp8)
        model.setup_caches(4, 256, kv_dtype if fp8 else None)
        return model(tokens.to(device), all_logits=True).cpu()

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    exact, on_cpu, on_gpu = (
        logits(TINY_GEMMA, "cpu", "fp32"),
        logits(calibrated, "cpu", "bf16", True),
        logits(calibrated, "cuda", "bf16", True),
    )
    assert (on_gpu - on_cpu).abs().mean() <= 1.1 * (on_cpu - exact).abs().mean()
    assert loss(on_gpu) == pytest.approx(loss(on_cpu), abs=0.02 if kv_dtype == torch.float8_e5m2 else 0.01)


@torch.inference_mode()
def test_each_fp8_layer_is_the_cpus_to_bfloat16s_rounding(calibrated, monkeypatch):
    """The same inputs through every FP8 layer, on the GPU's matrix units and on the CPU: as far apart as a rounding to
    bfloat16 (half of 2^-8), on 1 row, on a few and on many; through TransformerEngine, too, where it is installed."""
    monkeypatch.setattr(model_file, "TE_TOKENS", 2)
    on_cpu, _ = load_model(calibrated, device="cpu", fp8=True)
    on_gpu, _ = load_model(calibrated, device="cuda", fp8=True)
    on_gpu.use_te()
    for (name, one), (_, two) in zip(on_cpu.named_modules(), on_gpu.named_modules()):
        if isinstance(one, FP8Linear):
            for shape in ((1, 1), (3, 1), (64, 1), (1, 2), (2, 5), (3, 64)):  # [B, T]; T > 1 is prefill, TE's part
                x = 30 * one.input_scale * torch.randn(*shape, one.in_features)
                x = x.bfloat16()
                expected, y = one(x).float(), two(x.cuda()).float().cpu()
                assert (y - expected).norm() <= 2**-8 * expected.norm(), (name, shape)


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_compiled_is_eager(calibrated, prompts, kv_dtype):
    """In float32 outside the FP8 products. A row's neighbours and its padding change nothing."""
    model, _ = load_model(calibrated, device="cuda", precision="fp32", fp8=True)
    options = dict(kv_cache_dtype=kv_dtype, **GREEDY)
    expected = [generate(model, [prompt], 32, **options)[0] for prompt in prompts]
    same = [a == b for a, b in zip(expected, generate(model, prompts, 32, compile=True, **options))]
    assert sum(same) >= len(same) - 1  # a value on the border between two FP8 codes may fall to either side


@torch.inference_mode()
@pytest.mark.parametrize("fp8", [False, True])
def test_prefill_on_transformer_engine_is_pytorchs(calibrated, tiny, fp8, monkeypatch):
    pytest.importorskip("transformer_engine")
    monkeypatch.setattr(model_file, "TE_TOKENS", 2)
    model, _ = load_model(calibrated, device="cuda", precision="bf16", fp8=fp8)
    assert model.te_version is None
    model(torch.zeros(1, 2, dtype=torch.long, device="cuda"))
    assert model.te_version
    exact = load_model(calibrated, device="cpu", precision="fp32", fp8=fp8)[0]
    for rows, length in ((4, 200), (1, 5), (3, 7)):
        tokens = python_tokens(tiny[1], rows, length)
        on_te = model(tokens.cuda(), all_logits=True).cpu()
        for module in model.modules():
            if getattr(module, "te", None) is not None:
                module.te = None
        on_torch = model(tokens.cuda(), all_logits=True).cpu()
        model.use_te()
        truth = exact(tokens, all_logits=True)
        te_error, error = (on_te - truth).abs().mean(), (on_torch - truth).abs().mean()
        print(f"{rows} x {length}, fp8 {fp8}: TE {te_error:.4f}, PyTorch {error:.4f} from the CPU's float32")
        assert te_error <= 1.5 * error + 1e-3


@pytest.fixture(scope="module")
def weights(calibrated):
    """tiny-gemma's BF16, FP8 (rounded on loading), int8 and int4: what to load, and how."""
    for mode in ("int8", "int4"):
        assert quantize.main(["--checkpoint_path", str(calibrated), "--mode", mode, "--quantize_embedding"]) == 0
    files = {"int8": "gemma-int8.safetensors", "int4": "gemma-int4-g32.safetensors"}
    return {name: calibrated / files.get(name, "") for name in ("bf16", "fp8", "int8", "int4")}


@torch.inference_mode()
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "kv_dtype", "rounding"),
    [
        ("bf16", None, 0.15),
        ("fp8", None, 0.6),
        ("fp8", torch.float8_e4m3fn, 0.6),
        ("int8", None, 0.2),
        ("int4", None, 0.2),
    ],
)
def test_fast_steps_choose_the_tokens_of_plain_steps(weights, prompts, device, name, kv_dtype, rounding):
    """The kernels' steps behind the same tokens as the modules' on either device, in each format: another token only
    where the plain step's two largest logits lie within rounding of each other. Logits of 8 to 16 are 1 / 16 apart in
    bfloat16; the CPU rounds what it makes of integers to bfloat16, too; what FP8 makes of a sum's last bit, the tests
    above say."""
    plain, _ = load_model(weights[name], device=device, precision="bf16", fp8=name == "fp8")
    fast, _ = load_model(weights[name], device="cuda", precision="bf16", fp8=name == "fp8")
    others, steps = [], 0
    for prompt, tokens in zip(prompts, generate(plain, prompts, 64, kv_cache_dtype=kv_dtype, **GREEDY)):
        for model in (plain, fast):
            model.attach_caches(model.new_caches(1, 128, kv_dtype))
            model(torch.tensor([prompt], device=model.device))
        for i, token in enumerate(tokens[:-1]):
            position = torch.tensor([len(prompt) + i])
            expected = plain(torch.tensor([[token]], device=device), position.to(device))[0].float().cpu()
            actual = fast.decode(torch.tensor([token], device="cuda"), position.cuda())[0].float().cpu()
            steps += 1
            if actual.argmax() != expected.argmax():
                first, second = expected.topk(2).values.tolist()
                others.append(first - second)
    print(f"{name}, cache {kv_dtype}, against {device}: {len(others)} of {steps} tokens differ, gaps {others}")
    assert max(others, default=0) <= rounding
    assert len(others) <= 0.04 * steps


def test_sampling_settings_and_lengths_change_without_a_new_capture(tiny, prompts):
    settings = (
        dict(temperature=0.3),
        dict(top_k=5),
        dict(top_p=0.5),
        dict(min_p=0.1),
        dict(top_k=250, temperature=2.0),
    )
    for prompt, setting in zip(prompts * 2, settings):
        expected = generate(tiny[0], [prompt], 30, seed=3, **setting)
        generate(tiny[0], prompts[:1], 20, compile=True, seed=1)
        decoder = tiny[0].decoder
        recorded = len(decoder.steps)
        assert generate(tiny[0], [prompt], 30, compile=True, seed=3, **setting) == expected
        assert tiny[0].decoder is decoder
        assert len(decoder.steps) == recorded


@pytest.mark.parametrize("check", ["every", "never"])
def test_stop_checks_give_the_same_tokens(tiny, prompts, check):
    options = dict(temperature=0, stop_ids=(300, 16, 10), compile=True)
    assert generate(tiny[0], prompts, 40, stop_check=check, **options) == generate(tiny[0], prompts, 40, **options)


def test_two_models_take_turns(tiny, on_cpu, prompts):
    other, _ = load_model(TINY_GEMMA, device="cuda", precision="fp32")
    expected = [generate(on_cpu, [prompt], 20, **GREEDY)[0] for prompt in prompts]
    for _ in range(2):
        for model in (tiny[0], other):
            assert generate(model, prompts, 20, compile=True, **GREEDY) == expected


def test_memory_does_not_grow_over_generations(tiny, prompts):
    def used(rounds):
        for i in range(rounds):
            generate(tiny[0], prompts[: 1 + i % 4], 20 + 30 * (i % 5), compile=i % 2 == 0, **GREEDY)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = used(20)
    assert used(50) <= first


def test_too_little_memory_says_what_to_lower(tiny, prompts, monkeypatch):
    with pytest.raises(ValueError, match=r"not enough cuda memory: a batch of \d+ rows .* lower --batch_size"):
        generate(tiny[0], prompts[:1], 8000, num_samples=20000, batch_size=20000)
    monkeypatch.setattr(program, "free_memory", lambda device: 2**60)  # a wrong estimate
    with pytest.raises(ValueError, match=r"out of cuda memory with 20000 rows .* lower --batch_size"):
        generate(tiny[0], prompts[:1], 8000, num_samples=20000, batch_size=20000)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("arguments", [[], ["--compile", "--compile_prefill"], ["--profile", "TRACE"]])
def test_program(capsys, tmp_path, arguments):
    arguments = [str(tmp_path / "trace.json") if a == "TRACE" else a for a in arguments]
    assert program.main([*arguments, "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(program.DEFAULT_PROMPT)
    by = "the Triton kernels" if "--compile" in arguments else "PyTorch"
    assert f"{torch.cuda.get_device_name()} by {by}, " in err
    assert "of the copy bandwidth" in err
