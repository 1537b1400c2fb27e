"""Each kernel against the PyTorch that defines it: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from conftest import CASES, SIZES

import kernels
from generate import State
from kernels import E4M3, AttentionConfig, Gemv, IntGemv, IntWeight, Skinny
from model import ModelConfig, Transformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, F32, E5M2 = torch.bfloat16, torch.float32, torch.float8_e5m2
DTYPES = pytest.mark.parametrize("dtype", [BF16, F32])

pytestmark = [
    pytest.mark.skipif(not kernels.available(DEVICE), reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # the interpreter's: infinity is meant,
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),  # and so is NaN
]


@pytest.fixture(autouse=True)
def exact_interpreter(monkeypatch):
    """Rounds as the hardware does. Triton 3.6's interpreter cuts bfloat16 off, loses FP8's carries (1.99 becomes 1), makes
    no bfloat16 of integers, multiplies its matrices as integers, and with NumPy 2.5 can't use a loaded number as a loop's bound."""
    if DEVICE.type == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    torch_dtypes = {
        tl.float32: F32,
        tl.float16: torch.float16,
        tl.bfloat16: BF16,
        tl.float8e4nv: E4M3,
        tl.float8e5: E5M2,
    }
    as_integers = {1: np.uint8, 2: np.uint16, 4: np.uint32}

    def convert(data, source, target, rounding=None):
        source, target = torch_dtypes[source], torch_dtypes[target]
        values = torch.from_numpy(np.frombuffer(data.tobytes(), np.uint8).copy()).view(source).to(target)
        return values.view(torch.uint8).numpy().view(as_integers[target.itemsize]).reshape(data.shape)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            x.data if x.dtype == tl.float32 else convert(x.data, x.dtype, tl.float32).view(np.float32) for x in (a, b)
        )
        return interpreter.TensorHandle(a @ b + d.data, d.dtype.scalar)

    def from_integers(self, source, target):
        values = source.data.astype(np.float32)
        values = values if target.scalar == tl.float32 else convert(values, tl.float32, target.scalar)
        return interpreter.TensorHandle(values, target.scalar)

    def patch_tensor(tensor, scope, original=interpreter._patch_lang_tensor):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", from_integers)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(*shape, dtype=F32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def fp8(*shape, dtype=E4M3):
    return normal(*shape, scale=20).to(dtype)


def scalar(value):
    return torch.tensor(value, dtype=F32, device=DEVICE)


def assert_same(actual, expected):
    """Equal but for few values, and those to one step of the type: the order of a sum decides how it is rounded."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    step = {F32: 1e-5, BF16: 2**-7, E4M3: 2**-3, E5M2: 2**-2}[actual.dtype]
    actual, expected = actual.float(), expected.float()
    torch.testing.assert_close(actual, expected, rtol=step, atol=step / 8 * expected.abs().max().item())
    if step > 1e-5:
        assert (actual != expected).float().mean() < (0.1 if DEVICE.type == "cuda" else 0.05)


def partial_sums(y, parts):
    """Float32 matrices whose sum is y in its own precision."""
    pieces = [normal(*y.shape) for _ in range(parts - 1)]
    return torch.stack([*pieces, y.float() - sum(pieces)])


@DTYPES
@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("quantise", [False, True])
def test_add_norm(dtype, parts, post, quantise):
    m, n = 3, 75
    x, y = normal(m, n, dtype=dtype), normal(m, n, dtype=dtype)
    y = partial_sums(y, parts) if parts else y
    weight, post_weight = normal(n, dtype=dtype), normal(n, dtype=dtype) if post else None
    arguments = (x, y, post_weight, weight, 1e-6, scalar(0.01) if quantise else None)
    x_new, h = kernels.add_norm(*arguments)
    expected_x, expected_h = kernels.add_norm_reference(*arguments)
    assert_same(x_new, expected_x)
    assert_same(h, expected_h)


def test_add_norm_of_x_alone_and_without_a_norm():
    x, y, weight = normal(2, 64, dtype=BF16), normal(2, 64, dtype=BF16), normal(64, dtype=BF16)
    x_new, h = kernels.add_norm(x, None, None, weight, 1e-6)
    assert x_new is x
    assert_same(h, kernels.rms_norm(x, weight, 1e-6))
    x_new, h = kernels.add_norm(x, y, None, None, 1e-6)
    assert h is None
    assert_same(x_new, x + y)


@DTYPES
@pytest.mark.parametrize("parts", [0, 2])
def test_geglu(dtype, parts, monkeypatch):
    monkeypatch.setattr(kernels, "GEGLU_BLOCK", 32)
    y = normal(3, 2 * 45, dtype=dtype, scale=3)
    y[0, :4] = torch.tensor([100.0, -100, 1e4, -1e4])
    y = partial_sums(y, parts) if parts else y
    assert_same(kernels.geglu(y, dtype), kernels.geglu_reference(y, dtype))
    scale = scalar(0.02)
    assert_same(kernels.geglu(y, dtype, scale), kernels.geglu_reference(y, dtype, scale))


@DTYPES
def test_rescale(dtype):
    x = normal(3, 700, dtype=dtype)
    for arguments in ((x, 0.3), (x, 0.3, scalar(0.02))):
        assert_same(kernels.rescale(*arguments), kernels.rescale_reference(*arguments))
    assert kernels.rescale(x, 1.0) is x


def test_fp8_saturates_and_keeps_nan():
    y = torch.tensor([[1e4, -1e4, float("nan"), 0.5, 1, 1, 1, 1]], device=DEVICE)
    h = kernels.geglu(y, F32, scalar(1.0)).float()
    assert h[0, 0] == 448
    assert h[0, 2].isnan()


ATTENTION = {  # by sums, M, H, K, D, S
    "mha-sums": (True, 3, 2, 2, 24, 40),
    "mha": (False, 3, 2, 2, 64, 40),
    "gqa": (False, 3, 6, 2, 32, 50),
    "mqa": (False, 5, 4, 1, 24, 33),
    "mqa-20": (False, 1, 20, 1, 32, 20),
}


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (F32, BF16), (BF16, E4M3), (BF16, E5M2)])
def test_decode_attention(case, dtypes):
    by_sums, m, heads, kv_heads, d, slots = ATTENTION[case]
    dtype, cache_dtype = dtypes
    width = (heads + 2 * kv_heads) * d
    frequency = (torch.rand(d // 2).repeat(2) * torch.tensor([-1.0, 1]).repeat_interleave(d // 2)).to(DEVICE)
    # one key; a ring that is full, and has come round; between
    position = torch.tensor([0, slots + 9, slots // 2, slots - 1, 7][-m:], device=DEVICE)
    rope = kernels.rope_reference(position, frequency)[0]
    config = AttentionConfig(block_s=16, num_warps=4, num_stages=2, by_sums=by_sums)
    unit = 0.004
    norms = dict(q_norm=normal(d, dtype=dtype), k_norm=normal(d, dtype=dtype))
    quantised = dict(softcap=5.0, input_scale=scalar(unit), k_scale=0.02, v_scale=0.5)
    for splits, parts, scale, options in ((1, 0, 0.3, norms), (1, 0, 2.0, quantised), (2, 2, 2.0, quantised | norms)):
        qkv = normal(m, width, dtype=dtype)
        qkv = partial_sums(qkv, parts) if parts else qkv
        caches = [normal(m, kv_heads, slots, d).to(cache_dtype) for _ in range(2)]
        for row, p in enumerate(position.tolist()):
            for cache in caches:  # what is not in use yet, and the slot that is about to be written
                cache[row, :, p + 1 :] = float("nan")
                cache[row, :, p % slots] = float("nan")
        expected_caches = [cache.clone() for cache in caches]
        arguments = (heads, dtype, scale)
        y = kernels.decode_attention(qkv, rope, position, *caches, *arguments, **options, splits=splits, config=config)
        expected = kernels.decode_attention_reference(qkv, rope, position, *expected_caches, *arguments, **options)
        for cache, expected_cache in zip(caches, expected_caches):
            for row, p in enumerate(position.tolist()):
                assert_same(cache[row, :, : p + 1], expected_cache[row, :, : p + 1])
        if dtype == BF16 and not by_sums:  # weights are rounded for the second product
            atol = 0.005 / unit if "softcap" in options else 0.02
            torch.testing.assert_close(y.float(), expected.float(), rtol=2**-3 if options else 2**-6, atol=atol)
        else:
            assert_same(y, expected)


def test_rope():
    position, frequencies = torch.tensor([0, 7, 131_071], device=DEVICE), [normal(24), normal(24, scale=0.01)]
    for kinds in (1, 2):
        arguments = position, *frequencies[:kinds]
        torch.testing.assert_close(kernels.rope(*arguments), kernels.rope_reference(*arguments), rtol=0, atol=1e-6)


def test_attention_splits_fill_the_gpu():
    assert kernels.attention_splits(1024, 512, 16) == 1
    assert kernels.attention_splits(16, 512, 64) == 4
    assert kernels.attention_splits(16, 512, 8, num_warps=1) == 32
    assert kernels.attention_splits(1, 8192, 32) == 64
    assert kernels.attention_splits(1, 40, 32) == 1
    caches = [normal(1, 1, 90, 24) for _ in range(2)]
    arguments = (normal(1, 72), normal(2, 1, 24), torch.tensor([33], device=DEVICE), *caches, 1, F32, 0.3)
    # of two shares the second has no slots
    assert_same(kernels.decode_attention(*arguments), kernels.decode_attention_reference(*arguments))


def linear_inputs(m, n, k, dtype):
    """x, weight and their scales for a weight of `dtype`."""
    if dtype == E4M3:
        return fp8(m, k), fp8(n, k), scalar(0.02), scalar(0.003)
    return normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, scale=k**-0.5), None, None


@pytest.mark.parametrize("dtype", [BF16, F32, E4M3])
@pytest.mark.parametrize("early", [0, 1, 2])
@pytest.mark.parametrize("shape", [(11, 80), (16, 256), (5, 100)])
def test_gemv(dtype, shape, early):
    inputs = linear_inputs(1, *shape, dtype)
    out = F32 if dtype == F32 else BF16
    y = kernels.gemv(*inputs, out, config=Gemv(block_n=4, block_k=64, num_warps=4, num_stages=3, early=early))
    assert_same(y, kernels.linear_reference(*inputs, out))


@pytest.mark.parametrize("dtype", [BF16, F32, E4M3])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_linear_geglu(dtype, m):
    inputs, out = linear_inputs(m, 2 * 5, 80, dtype), F32 if dtype == F32 else BF16
    next_scale = scalar(0.05) if dtype == E4M3 else None
    expected = kernels.gemv_reference(*inputs, out, True, next_scale)
    assert_same(kernels.linear_geglu(*inputs, out, next_scale), expected)
    if m == 1:
        config = Gemv(block_n=2, block_k=32, num_warps=4, num_stages=2, early=1)
        assert_same(kernels.gemv(*inputs, out, True, next_scale, config), expected)
    else:
        config = Skinny(16, block_n=32, block_k=32, split=2, num_warps=4, num_stages=2)
        assert_same(kernels.skinny_matmul(*inputs, out, True, next_scale, config), expected)


@pytest.mark.parametrize("dtype", [BF16, F32, E4M3])
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("shape", [(5, 40, 128), (16, 64, 256), (19, 70, 176)])
def test_skinny_matmul(dtype, split, shape):
    m, n, k = shape
    inputs = linear_inputs(m, n, k, dtype)
    out = F32 if dtype == F32 else BF16
    config = Skinny(16 if m <= 16 else 32, block_n=32, block_k=32, split=split, num_warps=4, num_stages=2)
    y = kernels.skinny_matmul(*inputs, out, config=config)
    assert y.dim() == 2 if split == 1 else (len(y) <= split and y.dtype == F32)
    assert_same(y if split == 1 else y.sum(0).to(out), kernels.linear_reference(*inputs, out))


@pytest.mark.parametrize("dtype", [BF16, F32, E4M3])
@pytest.mark.parametrize("m", [1, 3, 65])
@pytest.mark.parametrize("partials", [False, True])
def test_linear_rows(dtype, m, partials):
    inputs = linear_inputs(m, 48, 512, dtype)
    out = F32 if dtype == F32 else BF16
    y = kernels.linear_rows(*inputs, out, partials=partials)
    assert partials or y.dim() == 2
    assert_same(y.sum(0).to(out) if y.dim() == 3 else y, kernels.linear_reference(*inputs, out))


@pytest.mark.parametrize("kind", [BF16, F32, E4M3])
def test_embed(kind):
    weight, tokens = (fp8 if kind == E4M3 else normal)(50, 72).to(kind), torch.tensor([3, 49, 0], device=DEVICE)
    arguments = (tokens, weight, 55.5, F32 if kind == F32 else BF16, scalar(0.013) if kind == E4M3 else None)
    assert torch.equal(kernels.embed(*arguments), kernels.embed_reference(*arguments))


def test_embed_int8():
    weight, tokens = int_weight(50, 72, 0), torch.tensor([3, 49, 0], device=DEVICE)
    arguments = (tokens, weight.packed, 55.5, BF16, weight.scale)
    expected = kernels.embed_reference(*arguments)
    assert torch.equal(kernels.embed(*arguments), expected)
    assert torch.equal(expected, kernels.dequantise_reference(weight, BF16)[tokens] * 55.5)


def int_weight(n, k, group):
    """Random codes, zeros far off the middle, too; group 0: int8."""
    scale = (torch.rand(n, k // group if group else 1) + 0.5) * k**-0.5 / (4 if group else 70)
    if not group:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return IntWeight(codes.to(DEVICE), scale[:, 0].bfloat16().to(DEVICE))
    packed = kernels.pack_int4(torch.randint(0, 16, (n, k)))
    zero = torch.randint(70, 190, scale.shape)
    zero[0] = torch.arange(k // group) % 2 * 255
    return IntWeight(packed.to(DEVICE), torch.stack((scale, zero / 16), -1).bfloat16().to(DEVICE))


GROUPS = pytest.mark.parametrize("group", [0, 32, 64, 128, 256])


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("n", "k"), [(11, 256), (6, 96), (6, 100), (6, 90)])
def test_one_row_by_int8(n, k, dtype):
    x, weight = normal(1, k, dtype=dtype), int_weight(n, k, 0)
    assert_same(kernels.linear_rows(x, weight), kernels.int_linear_reference(x, weight))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("m", [1, 2, 5, 17])
@pytest.mark.parametrize(("group", "k"), [(0, 96), (32, 96), (32, 384), (128, 512)])
def test_int_geglu(dtype, m, group, k):
    x, weight = normal(m, k, dtype=dtype), int_weight(2 * 5, k, group)
    expected = kernels.geglu_reference(kernels.int_linear_reference(x, weight), dtype)
    y = kernels.linear_geglu(x, weight, None, None, dtype)
    if group and dtype == BF16:
        assert_near(y, expected, 2)
    else:
        assert_same(y, expected)


def assert_near(actual, expected, factors=1):
    """To a rounding of all weights to bfloat16, beside the result's, in each of its factors."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    actual, expected = actual.float(), expected.float()
    atol = factors * 2**-7 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=factors * 2**-7, atol=atol)
    assert (actual - expected).norm() < 0.006 * factors * expected.norm()


@pytest.mark.parametrize(("split", "shape"), [(1, (5, 40, 256)), (2, (16, 64, 512)), (2, (19, 70, 768))])
def test_skinny_matmul_of_int8(split, shape):
    m, n, k = shape
    x, weight = normal(m, k, dtype=BF16), int_weight(n, k, 0)
    config = Skinny(16 if m <= 16 else 32, block_n=32, block_k=128, split=split, num_warps=4, num_stages=2)
    assert_sum(kernels.linear_rows(x, weight, partials=True, config=config), split, x, weight, assert_same)


def assert_sum(y, split, x, weight, compare):
    assert y.dim() == 2 if split == 1 else (len(y) <= split and y.dtype == F32)
    compare(y if split == 1 else y.sum(0).to(BF16), kernels.int_linear_reference(x, weight))


@pytest.mark.parametrize(
    ("m", "n", "k", "split", "block_k", "warps"),
    [
        (1, 11, 256, 1, 128, 1),
        (1, 40, 1280, 2, 256, 2),
        (2, 40, 1024, 1, 512, 4),
        (5, 40, 384, 2, 256, 1),
        (8, 40, 1280, 4, 256, 1),
        (9, 40, 1280, 2, 128, 4),
        (64, 16, 384, 1, 128, 4),
    ],
)
@GROUPS
def test_int_matmul(group, m, n, k, split, block_k, warps):
    if group == 0:
        k -= 64
    elif k % group:
        k = 512
    x, weight = normal(m, k, dtype=BF16), int_weight(n, k, group)
    config = kernels.linear_config(m, n, k, weight.dtype, group)
    if m <= 8:
        config = IntGemv(block_n=32, block_k=block_k, num_warps=warps, split=split, ahead=m < 5)
    else:
        config = config._replace(block_n=32, block_k=block_k, split=split)
    y = kernels.linear_rows(x, weight, partials=True, config=config)
    assert_sum(y, split, x, weight, assert_near if m > 8 else assert_same)  # up to 8 rows no weight is rounded


@pytest.mark.skipif(DEVICE.type == "cuda", reason="each Triton has one arrangement")
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize(("lanes_last", "pairs_apart"), [(False, False), (True, False), (True, True)])
def test_int_gemv_in_the_arrangements_of_tritons(group, lanes_last, pairs_apart, monkeypatch):
    for name, value in ("LANES_LAST", lanes_last), ("PAIRS_APART", pairs_apart):
        monkeypatch.setattr(kernels, name, kernels.tl.constexpr(value))
    x, weight = normal(2, 512, dtype=BF16), int_weight(40, 512, group)
    y = kernels.int_matmul(x, weight, config=IntGemv(block_n=32, block_k=256, num_warps=2))
    assert_same(y, kernels.int_linear_reference(x, weight))


@pytest.mark.parametrize("dtype", [BF16, F32])
@GROUPS
def test_dequantise(dtype, group):
    weight = int_weight(5, 768 if group else 72, group)
    expected = kernels.dequantise_reference(weight, dtype)
    assert torch.equal(kernels.dequantise(weight, dtype), expected)
    assert torch.equal(expected, kernels.dequantise_reference(weight, torch.float64).to(dtype))  # rounded once


@pytest.mark.parametrize("m", [1, 3, 65])
@pytest.mark.parametrize("group", [0, 64])
def test_int_linear_rows(m, group):
    x, weight = normal(m, 512, dtype=BF16), int_weight(48, 512, group)
    for partials in (False, True):
        y = kernels.linear_rows(x, weight, dtype=BF16, partials=partials)
        assert partials or y.dim() == 2
        assert_near(y.sum(0).to(BF16) if y.dim() == 3 else y, kernels.int_linear_reference(x, weight))


def decode_states(m, limit, stop_ids=()):
    """Two equal ones."""
    states = [State.empty(m, 8, DEVICE) for _ in range(2)]
    for state in states:
        state.limit, state.stop_ids = limit.clone(), torch.tensor(stop_ids, dtype=torch.long, device=DEVICE)
        state.done.zero_()
    return states


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1000), (5, 77), (3, 900)])
def test_greedy_emit_takes_the_first_of_equals(dtype, shape, monkeypatch):
    monkeypatch.setattr(kernels, "ARGMAX_BLOCK", 128)
    logits = normal(*shape, dtype=dtype).round()  # many equal maxima

    def token(logits):
        state, _ = decode_states(shape[0], torch.full((shape[0],), 5, device=DEVICE))
        kernels.greedy_emit(logits, state)
        return state.token

    assert torch.equal(token(logits).cpu(), logits.float().cpu().argmax(-1))
    for value in (float("-inf"), -3.0):
        assert token(torch.full_like(logits, value)).tolist() == [0] * len(logits)
    assert token(torch.full_like(logits, float("nan")))[0] < shape[1]


@pytest.mark.parametrize("stop_ids", [(), (5,), (5, 9, 30)])
@pytest.mark.parametrize("m", [1, 3, 7])
def test_greedy_emit(stop_ids, m):
    states = decode_states(m, (torch.arange(m) % 4 + 2).to(DEVICE), stop_ids)
    for i in range(6):
        logits = normal(m, 40, dtype=BF16)
        logits[:, 5] += i / 2
        for emit, state in zip((kernels.greedy_emit, kernels.greedy_emit_reference), states):
            emit(logits, state)
        for actual, expected in zip(*(vars(state).values() for state in states)):
            assert actual is expected is None or torch.equal(actual, expected)
    assert states[0].done.all()


def tiny_model(case, dtype, bits, monkeypatch):
    if DEVICE.type == "cpu":  # fewer programs for the interpreter

        def config_of(m, n, k, dtype, group=0):
            if dtype in (torch.int8, torch.int32) and m <= 8:
                return None if k % (128 if dtype == torch.int32 else 64) else IntGemv(128, 128, 1)
            if dtype == torch.int32:
                return None if k % 128 else Skinny(64, 32, 128, 1, 4, 1)
            return Gemv(64, 64, 4, 1) if m == 1 else None if dtype == F32 else Skinny(64, 64, 128, 1, 4, 1)

        monkeypatch.setattr(kernels, "linear_config", config_of)
        monkeypatch.setattr(kernels, "dequantise", kernels.dequantise_reference)  # a program a row
    model_type, settings = CASES[case]
    sizes = {"hidden_size": 128, "intermediate_size": 128} if bits == 4 else {}  # int4's kernels want 128 columns
    config = ModelConfig.from_hf(SIZES | sizes | settings | {"model_type": model_type})
    fp8_weights = bits == "fp8"
    model = Transformer.random(
        config, DEVICE, dtype, fp8=fp8_weights, head=bits is not None, bits=None if fp8_weights else bits
    )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.copy_(normal(*parameter.shape, dtype=dtype, scale=0.3))
        elif name.endswith(".scale"):
            scale = parameter[..., 0] if parameter.dim() == 3 else parameter
            scale.mul_((torch.rand(scale.shape, device=DEVICE) + 0.5) * 8)
        elif parameter.dim() > 1 and bits is None:
            parameter.copy_(normal(*parameter.shape, dtype=dtype, scale=0.15))
    for layer in model.layers:
        layer.attention.kv_scales = (0.01, 0.02)
    return model


def assert_same_step(actual, expected, dtype, bits):
    if dtype == F32 and bits != "fp8":
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        return
    # A rounding that falls to the other side moves what follows, FP8 to a code 6 % away. PyTorch rounds what integers
    # stand for to bfloat16.
    bound = {None: 0.03, "fp8": 0.1}.get(bits, 0.06)
    assert (actual - expected).norm() <= bound * (expected - expected.mean()).norm()


NAMES = ("case", "rows", "dtype", "bits", "cache_dtype")
STEPS = [
    ("gemma-mha", 2, BF16, None, E4M3),
    ("gemma-mqa", 1, F32, None, None),
    ("gemma-gqa", 3, BF16, "fp8", E4M3),
    ("gemma2-window-small", 3, F32, None, None),
    ("gemma2-window-small", 1, F32, "fp8", E5M2),
    ("gemma3-window-half", 1, F32, None, None),
    ("gemma3-window-half", 3, BF16, "fp8", None),
    ("gemma-mqa", 1, F32, 4, None),
    ("gemma-gqa", 3, BF16, 4, E4M3),
    ("gemma-mqa", 3, BF16, 8, E4M3),
    ("gemma3-window-half", 1, BF16, 8, None),
]


@torch.inference_mode()
@pytest.mark.parametrize(NAMES, STEPS)
def test_decode_is_forward(case, rows, dtype, bits, cache_dtype, monkeypatch):
    """Whole steps of tiny models, rows at different positions, behind a prefill that both share."""
    model = tiny_model(case, dtype, bits, monkeypatch)
    position = torch.tensor([19, 3, 12][:rows], device=DEVICE)
    prompts = torch.randint(2, 128, (rows, 19), device=DEVICE)
    logits = []
    for fast in (False, True):
        model.attach_caches(model.new_caches(rows, 48, cache_dtype))
        model(prompts, None, position)
        steps = []
        for i in range(2 if DEVICE.type == "cpu" else 20):
            token = torch.full((rows,), 3 + i, device=DEVICE)
            steps.append((model.decode(token, position + i) if fast else model(token[:, None], position + i)).float())
        logits.append(torch.stack(steps))
    assert_same_step(logits[1], logits[0], dtype, bits)


@torch.inference_mode()
@pytest.mark.parametrize(NAMES, STEPS[:6] + STEPS[8:10])
def test_prefill_is_forward(case, rows, dtype, bits, cache_dtype, monkeypatch):
    """Logits, and what a later query will see of the KV cache."""
    model = tiny_model(case, dtype, bits, monkeypatch)
    width = 11  # longer than the small window
    lengths = torch.tensor([width, 3, 9][:rows], device=DEVICE)
    prompts = torch.randint(2, 128, (rows, width), device=DEVICE)
    logits, held = [], []
    for run in (model, model.prefill):
        caches = model.new_caches(rows, 48, cache_dtype)
        model.attach_caches(caches)
        logits.append(run(prompts, None, lengths).float())
        seen = [(cache.held_positions(lengths) >= 0)[:, None, :, None] for cache in caches]
        held.append([torch.where(s, x.float(), 0) for cache, s in zip(caches, seen) for x in (cache.k, cache.v)])
    assert_same_step(logits[1], logits[0], dtype, bits)
    for expected, actual in zip(*held):
        assert_same_step(actual, expected, dtype, "fp8" if cache_dtype else bits)
    assert all(x.abs().sum(-1).count_nonzero() for x in held[1])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, E4M3])
@pytest.mark.parametrize("m", [1, 2, 3, 16, 33, 64])
@pytest.mark.parametrize("shape", [(12288, 3072), (3072, 4096), (2048, 16384), (1000, 1152)])
def test_published_sizes(dtype, m, shape):
    inputs = linear_inputs(m, *shape, dtype)
    y = kernels.linear_rows(*inputs, BF16, partials=True)
    y = y.sum(0).to(BF16) if y.dim() == 3 else y
    expected = kernels.linear_reference(*inputs, BF16)
    # an FP8 tensor core keeps 14 bits of a sum or so
    torch.testing.assert_close(
        y.float(), expected.float(), rtol=2**-7, atol=2**-9 * expected.float().abs().max().item()
    )


@pytest.mark.cuda
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("m", [1, 2, 3, 16, 33, 64, 65])
@pytest.mark.parametrize("shape", [(12288, 3072), (3072, 24576), (3072, 4096), (1000, 1152)])
def test_published_sizes_of_integers(group, m, shape):
    x, weight = normal(m, shape[1], dtype=BF16), int_weight(*shape, group)
    y, expected = kernels.linear_rows(x, weight, partials=True), kernels.int_linear_reference(x, weight)
    assert_near(y.sum(0).to(BF16) if y.dim() == 3 else y, expected)
    geglu = kernels.geglu_reference(expected, BF16)
    assert_near(kernels.linear_geglu(x, weight, None, None, BF16), geglu, factors=2)


@pytest.mark.cuda
@pytest.mark.parametrize("m", [1, 4, 64])
@pytest.mark.parametrize("group", [None, 0, 32])
def test_kernels_that_start_early(m, group, monkeypatch):
    """A graph of kernels, each reading what the ones before it have just written, replayed with new data."""
    n, f = 256, 512
    x, weight = normal(m, n, dtype=BF16), normal(n, dtype=BF16, scale=0.1)
    w13, w2 = (
        normal(*shape, dtype=BF16, scale=0.02) if group is None else int_weight(*shape, group)
        for shape in ((2 * f, n), (n, f))
    )

    def layers():
        state, y = x, None
        for _ in range(20):
            state, h = kernels.add_norm(state, y, weight if y is not None else None, weight, 1e-6)
            y = kernels.linear_rows(kernels.linear_geglu(h, w13, None, None, BF16), w2, partials=True)
        return kernels.add_norm(state, y, None, None, 1e-6)[0]

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers()
    monkeypatch.setattr(kernels, "USE_PDL", False)
    for _ in range(20):
        x.copy_(normal(m, n, dtype=BF16))
        graph.replay()
        assert torch.equal(y, layers())
