"""Weight formats: what is stored of a matrix, how it is made and read, and what multiplies by it.

A new format is one entry of `FORMATS`, and a kernel if it is to be fast. Files, `quantize.py --mode` and random weights
follow from the entry.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ops.common import E4M3, round_fp8
from ops.integer import dequantize, int_product, int_triton, pack_int4
from ops.matmul import dense_product, dense_triton, fp8_product

LINEAR = ("wqkv", "wo", "w13", "w2")  # the modules whose weights are quantized
GROUPS = (32, 64, 128, 256)  # of int4: how many neighbours in a row may share a scale
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Format:
    """How a matrix [N, K] is stored.

    stored(n, k, group): dtype (None: that of activations) and shape of each parameter of a `Weight`. `product` is the
    PyTorch definition of x @ weight.T, `kernel` its fast form, both as ops/matmul.py calls them. dequantize(weight,
    dtype) gives the numbers [N, K]. quantize(numbers [N, K], group) gives the parameters, in their order; None if that
    needs more than the numbers. random(name, parameter, generator) fills a parameter for models of random weights.
    The last three take [E, N, K], too; what multiplies by experts is in ops/experts.py.
    """

    name: str
    stored: Callable[[int, int, int], dict[str, tuple[torch.dtype | None, tuple[int, ...]]]]
    product: Callable
    kernel: Callable
    dequantize: Callable
    random: Callable
    quantize: Callable | None = None
    grouped: bool = False  # whether neighbours in a row share a scale
    embedding: str | None = None  # the format of an embedding that is quantized along with it; None: the same

    def parameters(
        self, n: int, k: int, group: int = 0, experts: int = 0, own_inputs: bool = False
    ) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """`stored` of one matrix [n, k] or of `experts` matrices, which each parameter then has along its first
        dimension; input_scale only with own_inputs. Raises ValueError for a group that does not divide k."""
        if self.grouped:
            check_group(k, group)
        stored = self.stored(n, k, group)
        if not experts:
            return stored
        shared = () if own_inputs else ("input_scale",)
        return {
            name: (dtype, shape if name in shared else (experts, *shape)) for name, (dtype, shape) in stored.items()
        }

    @property
    def of_embedding(self) -> "Format":
        return FORMATS[self.embedding or self.name]


class PackedWeight(NamedTuple):
    """A bfloat16 weight in oneDNN's own layout, which F.linear would otherwise make anew in every call on a CPU.

    Measured on 2 cores with AVX512-BF16, gemma-2b's shapes: 1.4 times F.linear at 1 row, 1.6 times at 16; tiny-gemma's
    step takes 0.8 of the time.
    """

    weight: Tensor
    source: tuple[int, int]  # address and version of the weight that it was made from


class Weight(nn.Module):
    """A matrix [N, K] in one of FORMATS, as parameters: `weight`, the numbers or codes; `scale`; `input_scale`.

    scale is a float32 scalar in FP8, [N] in int8, [N, K / group, 2] in int4 (scale and zero), None else. input_scale, a
    float32 scalar, is that of the inputs of FP8 products, None else.

    With `experts` E it is E matrices of `shape` [N, K], and each parameter has E of what one matrix has, along its
    first dimension. input_scale stays one scalar for all of them, whose inputs are the same rows, but is [E] with
    own_inputs.
    """

    def __init__(
        self, n: int, k: int, format: Format | None = None, group: int = 0, experts: int = 0, own_inputs: bool = False
    ):
        super().__init__()
        self.shape, self.experts, self.own_inputs = (n, k), experts, own_inputs
        self.store(FORMATS["bf16"] if format is None else format, group)

    def store(self, format: Format, group: int = 0):
        """Makes this an empty weight in another format."""
        self.format, self.group, self.packed = format, group if format.grouped else 0, None
        stored = format.parameters(*self.shape, group, self.experts, self.own_inputs)
        for name in ("weight", "scale", "input_scale"):
            dtype, shape = stored.get(name, (None, None))
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, dtype=dtype), dtype is None)
            self.register_parameter(name, parameter)

    @classmethod
    def of(cls, format: str, *parameters: Tensor, shape: tuple[int, int] | None = None, group: int = 0) -> "Weight":
        """A weight of given parameters, in the order of the format's `stored`; with three dimensions, of experts."""
        n, k = shape or parameters[0].shape[-2:]
        experts = len(parameters[0]) if parameters[0].dim() == 3 else 0
        with torch.device("meta"):
            weight = cls(n, k, FORMATS[format], group, experts, experts > 0 and parameters[-1].dim() == 1)
        for name, parameter in zip(FORMATS[format].stored(n, k, group), parameters, strict=True):
            setattr(weight, name, nn.Parameter(parameter, False))
        return weight

    @property
    def data(self) -> Tensor:
        return self.weight

    @property
    def source(self) -> tuple[int, int]:
        """Address and version of `weight`: others, once it has changed."""
        return self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version

    def pack(self):
        """Keeps a bf16 weight in oneDNN's layout, too, until it changes; the next products on a CPU take that."""
        if self.weight.dtype == torch.bfloat16 and self.format.name == "bf16" and not self.experts:
            source = self.source
            if self.packed is None or self.packed.source != source:
                layout = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 1)
                self.packed = PackedWeight(layout, source)


# ---------------------------------------------------------------------------------------------------------------------
# int8 and int4, rounded


def quantize_int8(weight: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """Codes [..., N, K] and scale [..., N] of each row of weight [..., N, K]: the nearest of 255 codes, the largest
    value being 127."""
    scale = _scale(weight.float().abs().amax(-1) / 127)
    codes = (weight.float() / scale.float()[..., None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Packed codes [..., N, K / 8] and scales [..., N, K / group, 2]: each group of neighbours in weight [..., N, K] to
    the nearest of 16 codes, from its least value to its largest. Raises ValueError for a group that does not divide
    K."""
    check_group(weight.shape[-1], group)
    groups = weight.float().unflatten(-1, (-1, group))
    parameters = group_parameters(groups)
    scale, zero = parameters.float()[..., None].unbind(-2)
    codes = (groups / scale + zero).round().clamp(0, 15)
    return pack_int4(codes.flatten(-2)), parameters


def check_group(k: int, group: int):
    """Raises ValueError for int4 groups of `group` neighbours that do not divide rows of k numbers."""
    if not group or k % group:
        fitting = [str(each) for each in GROUPS if k % each == 0]
        raise ValueError(
            f"int4 groups of {group} don't divide rows of {k} numbers"
            + (f": groups of {' or '.join(fitting)} do" if fitting else "")
        )


def largest(name: str, values: Tensor) -> float:
    """The largest absolute value. Raises ValueError, with the tensor's name, if one is infinite or NaN."""
    amax = max(map(abs, torch.stack(torch.aminmax(values)).tolist()))  # both are NaN if a value is
    if not math.isfinite(amax):
        raise ValueError(f"{name} has values that are not finite: the checkpoint is damaged")
    return amax


def group_parameters(values: Tensor) -> Tensor:
    """Scale and zero [..., 2], in bf16, of each group [..., group] of values."""
    least, largest = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    scale = _scale((largest - least) / 15)
    sixteenths = (-16 * least / scale.to(least.dtype)).round().clamp(0, 255)
    return torch.stack((scale, (sixteenths / 16).bfloat16()), -1)


def _scale(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError("weights that are not finite can't be quantized")
    return torch.where(values == 0, 1, values).bfloat16()


# ---------------------------------------------------------------------------------------------------------------------
# Random weights: N(0, 0.02²), or codes that deviate as much


def _random_numbers(name: str, parameter: Tensor, generator: torch.Generator):
    parameter.normal_(0, 0.02, generator=generator)


def _random_fp8(name: str, parameter: Tensor, generator: torch.Generator):
    weight_scale = 0.1 / E4M3_MAX
    if name == "weight":
        for rows in parameter.flatten(0, -2).split(4096):
            values = torch.empty(rows.shape, device=parameter.device).normal_(0, 0.02, generator=generator)
            rows.copy_(round_fp8(values, weight_scale))
    else:
        parameter.fill_(weight_scale if name == "scale" else 20 / E4M3_MAX)  # for inputs up to 20


def _random_int8(name: str, parameter: Tensor, generator: torch.Generator):
    if name == "weight":
        parameter.random_(-127, 128, generator=generator)
    else:
        parameter.fill_(0.02 / 73.6)  # what 255 codes deviate by


def _random_int4(name: str, parameter: Tensor, generator: torch.Generator):
    if name == "weight":
        parameter.random_(-(2**31), 2**31, generator=generator)
    else:
        parameter.copy_(torch.tensor([0.02 / 4.61, 7.5]))  # what 16 codes deviate by, and their middle


# ---------------------------------------------------------------------------------------------------------------------
# The formats

FORMATS = {
    format.name: format
    for format in (
        Format(
            "bf16",  # or any other dtype of activations
            stored=lambda n, k, group: {"weight": (None, (n, k))},
            product=dense_product,
            kernel=dense_triton,
            dequantize=lambda weight, dtype: weight.data.to(dtype),
            random=_random_numbers,
        ),
        Format(
            "fp8",
            stored=lambda n, k, group: {
                "weight": (E4M3, (n, k)),
                "scale": (torch.float32, ()),
                "input_scale": (torch.float32, ()),
            },
            product=fp8_product,
            kernel=dense_triton,
            dequantize=lambda weight, dtype: (weight.data.float() * weight.scale[..., None, None]).to(dtype),
            random=_random_fp8,
        ),
        Format(
            "int8",
            stored=lambda n, k, group: {"weight": (torch.int8, (n, k)), "scale": (torch.bfloat16, (n,))},
            product=int_product,
            kernel=int_triton,
            dequantize=dequantize,
            random=_random_int8,
            quantize=quantize_int8,
        ),
        Format(
            "int4",
            stored=lambda n, k, group: {
                "weight": (torch.int32, (n, k // 8)),
                "scale": (torch.bfloat16, (n, k // group, 2)),
            },
            product=int_product,
            kernel=int_triton,
            dequantize=dequantize,
            random=_random_int4,
            quantize=quantize_int4,
            grouped=True,
            embedding="int8",
        ),
    )
}
