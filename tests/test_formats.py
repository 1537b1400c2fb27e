"""Weight formats: FP8's rounding, the layout of integers and their rounding, and products by each."""

from itertools import product

import pytest
import torch

from formats import FORMATS, Weight, quantize_int4, quantize_int8
from ops import TORCH
from ops.common import round_fp8
from ops.integer import dequantize, pack_int4, unpack_int4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- FP8


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


# --- int8 and int4


@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (5, 256)])
def test_packing_and_unpacking_are_inverses(shape):
    q = torch.randint(0, 16, shape)
    packed = pack_int4(q)
    assert (packed.dtype, packed.shape) == (torch.int32, (shape[0], shape[1] // 8))
    assert torch.equal(unpack_int4(packed).long(), q)
    words = torch.randint(-(2**31), 2**31, (shape[0], shape[1] // 8)).to(torch.int32)
    assert torch.equal(pack_int4(unpack_int4(words)), words)


@pytest.mark.parametrize(("k", "words"), [(96, 4), (192, 8), (384, 16), (512, 16)])
def test_layout_is_as_described(k, words):
    for word, p, high in product(range(words), range(4), range(2)):
        expected = torch.zeros(1, k // 8, dtype=torch.long)
        expected[0, k // 8 - words + word] = 15 << (4 * p + 16 * high)
        q = torch.zeros(1, k, dtype=torch.long)
        q[0, k - 8 * words + 2 * words * p + 2 * word + high] = 15
        assert torch.equal(pack_int4(q).long() & 0xFFFFFFFF, expected)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_int4_values_are_within_half_a_step(group):
    weight = torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1] = 0.25  # one sign only: 0 is a bound then
    weight[2] = -3
    weight[3, :group] *= 1e-3
    codes, parameters = quantize_int4(weight, group)
    assert (codes.dtype, parameters.dtype) == (torch.int32, torch.bfloat16)
    rounded = dequantize(Weight.of("int4", codes, parameters, shape=(7, 512), group=group), torch.float32)
    scale, zero = parameters.float().unbind(-1)
    assert torch.equal(16 * zero, (16 * zero).round())
    step = scale.repeat_interleave(group, 1)
    assert ((rounded - weight).abs() <= 0.57 * step).all()  # a zero's and a scale's own rounding are in it
    assert (rounded[0] == 0).all()
    torch.testing.assert_close(rounded[1:3], weight[1:3], rtol=0.005, atol=0)


def test_int8_values_are_within_half_a_step():
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[0] = 0
    codes, scale = quantize_int8(weight)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    rounded = dequantize(Weight.of("int8", codes, scale), torch.float32)
    inside = (codes.abs() < 127) | (weight == 0)
    assert ((rounded - weight.float()).abs() <= 0.501 * scale.float()[:, None])[inside].all()
    torch.testing.assert_close(rounded, weight.float(), rtol=0.005, atol=0.5 * scale.max().item())
    with pytest.raises(ValueError, match="not finite"):
        quantize_int8(torch.tensor([[1.0, float("nan")]]))


# --- weights


def weight_in(format: str, numbers: torch.Tensor, group: int = 0, input_scale: float = 2.5 / 448) -> Weight:
    """Numbers [N, K], rounded."""
    if format == "fp8":
        scale = numbers.abs().max() / 448
        parameters = round_fp8(numbers, scale), scale, torch.tensor(input_scale)
    elif format == "bf16":
        parameters = (numbers,)
    else:
        parameters = FORMATS[format].quantize(numbers, group)
    return Weight.of(format, *parameters, shape=tuple(numbers.shape), group=group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 17])
def test_fp8_product_is_its_definition(dtype, rows):
    x = 2 * torch.randn(rows, 48).to(dtype)
    weight = weight_in("fp8", torch.randn(20, 48))
    codes = round_fp8(x, weight.input_scale)
    assert (codes.float().abs() == 448).any()  # some inputs saturate
    expected = (codes.double() * weight.input_scale.double()) @ (weight.weight.double() * weight.scale.double()).T
    y = TORCH.matmul(codes, weight, dtype)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "group"), [("bf16", 0), ("int8", 0), ("int4", 32), ("int4", 64)])
def test_product_by_weights_alone_is_its_definition(dtype, format, group):
    """Of numbers that are rounded once to `dtype`."""
    x, numbers = torch.randn(6, 192).to(dtype), torch.randn(20, 192)
    weight = weight_in(format, numbers.to(dtype) if format == "bf16" else numbers, group)
    y, exact = TORCH.matmul(x, weight, dtype), weight.format.dequantize(weight, torch.float32)
    assert y.dtype == dtype
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    expected = x.float() @ exact.T
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert (exact - numbers).abs().max() < {"bf16": 0.02, "int8": 0.03, "int4": 0.3}[format]


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_has_what_its_format_stores(name):
    format = FORMATS[name]
    weight = Weight(64, 128, format, group=32)
    stored = format.stored(64, 128, 32)
    assert list(stored) == [key for key, _ in weight.named_parameters()]
    for key, (dtype, shape) in stored.items():
        parameter = getattr(weight, key)
        assert (parameter.dtype, tuple(parameter.shape)) == (dtype or torch.float32, shape)
        assert parameter.requires_grad == (name == "bf16")
    assert weight.group == (32 if format.grouped else 0)
    weight.store(FORMATS["bf16"])
    assert [key for key, _ in weight.named_parameters()] == ["weight"]


# --- experts


@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_of_experts_has_what_its_format_stores_of_each(name, own_inputs):
    format = FORMATS[name]
    weight = Weight(24, 64, format, 32, experts=5, own_inputs=own_inputs)
    stored = format.stored(24, 64, 32)
    assert list(stored) == [key for key, _ in weight.named_parameters()]
    assert (weight.shape, weight.experts) == ((24, 64), 5)
    for key, (dtype, shape) in stored.items():
        parameter, shared = getattr(weight, key), key == "input_scale" and not own_inputs
        assert (parameter.dtype, tuple(parameter.shape)) == (dtype or torch.float32, shape if shared else (5, *shape))
        assert format.parameters(24, 64, 32, 5, own_inputs)[key] == (dtype, tuple(parameter.shape))
        format.random(key, parameter.detach(), torch.Generator().manual_seed(0))
    numbers = format.dequantize(weight, torch.float32)
    assert numbers.shape == (5, 24, 64)
    assert abs(numbers.std().item() - 0.02) < 0.002
    parameters = [parameter.detach() for _, parameter in weight.named_parameters()]
    again = Weight.of(name, *parameters, shape=(24, 64), group=32)
    assert (again.shape, again.experts, again.group) == (weight.shape, 5, weight.group)
    assert again.own_inputs == (own_inputs and name == "fp8")
    assert torch.equal(format.dequantize(again, torch.float32), numbers)
    weight.store(FORMATS["bf16"])
    assert weight.weight.shape == (5, 24, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_quantized_and_read_one_by_one(name, dtype):
    numbers = torch.randn(3, 24, 64).to(dtype)
    each = [weight_in(name, matrix, 32) for matrix in numbers]
    if FORMATS[name].quantize is None:
        parameters = [torch.stack([getattr(w, key) for w in each]) for key in FORMATS[name].stored(24, 64, 32)]
    else:
        parameters = FORMATS[name].quantize(numbers, 32)
    weight = Weight.of(name, *parameters, shape=(24, 64), group=32)
    expected = torch.stack([w.format.dequantize(w, dtype) for w in each])
    assert torch.equal(weight.format.dequantize(weight, dtype), expected)


@pytest.mark.parametrize("experts", [0, 3])
def test_groups_divide_rows(experts):
    """The experts of Gemma 4 26B-A4B have 704 = 11 * 64 numbers a row."""
    assert Weight(8, 704, FORMATS["int4"], 64, experts).weight.shape[-1] == 88
    for group in (128, 256):
        with pytest.raises(ValueError, match=f"groups of {group} don't divide rows of 704 numbers: groups of 32 or 64"):
            Weight(8, 704, FORMATS["int4"], group, experts)
    with pytest.raises(ValueError, match="groups of 128 don't divide rows of 704"):
        quantize_int4(torch.randn(2, 8, 704), 128)
