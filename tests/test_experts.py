"""The router and the experts: the definitions against formulas written anew and transformers' modules, the kernels
against the definitions. On a GPU, or else in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_ops import BF16, DEVICE, F32, assert_near, assert_same, normal, scalar, seeded  # noqa: F401

from formats import FORMATS, Weight
from ops import common
from ops import experts as moe
from ops import router as routing
from ops.common import round_fp8
from ops.experts import GroupedConfig
from ops.router import RouterConfig

EPS = 1e-6
FORMATS_IN = pytest.mark.parametrize(
    ("format", "group", "dtype"),
    [("bf16", 0, BF16), ("bf16", 0, F32), ("fp8", 0, BF16), ("fp8", 0, F32)]
    + [("int8", 0, BF16), ("int8", 0, F32), ("int4", 32, BF16), ("int4", 64, BF16), ("int4", 32, F32)],
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # the interpreter's: infinity is meant
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # and so is NaN
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),
]
needs_triton = pytest.mark.skipif(not common.available(DEVICE), reason="needs Triton")


def experts_in(format: str, numbers: torch.Tensor, group: int = 0, input_scale=None) -> Weight:
    """Numbers [E, N, K], rounded; in FP8 with an input_scale, a scalar or [E]."""
    if format == "bf16":
        return Weight.of(format, numbers)
    if format == "fp8":
        scale = numbers.float().abs().amax((1, 2)) / 448
        return Weight.of(format, round_fp8(numbers, scale[:, None, None]), scale, input_scale)
    return Weight.of(format, *FORMATS[format].quantize(numbers, group), shape=tuple(numbers.shape[1:]), group=group)


def case(format, group, dtype, m, n_experts=8, top_k=2, hidden=64, f=48, one_expert=False):
    """What `experts` takes: rows, weights, and experts drawn evenly but for the last one, which nobody has."""
    f = f if format != "int4" else max(64, f)
    h = normal(m, hidden, dtype=dtype)
    numbers = [normal(n_experts, 2 * f, hidden, dtype=dtype, scale=0.2), normal(n_experts, hidden, f, dtype=dtype)]
    scales = scalar(3 / 448), (0.5 + torch.rand(n_experts, device=DEVICE)) * (10 / 448)
    w13, w2 = (experts_in(format, x, group, scale) for x, scale in zip(numbers, scales, strict=True))
    h = h if format != "fp8" else round_fp8(h, scales[0])
    chosen = torch.rand(m, n_experts - 1).topk(top_k).indices.int().to(DEVICE)
    if one_expert:
        chosen[:, 0] = n_experts - 1
    return h, w13, w2, chosen, torch.rand(m, top_k).to(DEVICE), dtype


def by_formula(h, w13, w2, chosen, weights, dtype):
    """The sum of experts, token by token, of numbers that are rounded where the definition rounds."""
    gate_up, down = (weight.format.dequantize(weight, F32).double() for weight in (w13, w2))
    if dtype == BF16 and w13.format.name != "fp8":  # integers are multiplied as numbers in bf16
        gate_up, down = gate_up.bfloat16().double(), down.bfloat16().double()
    rows = h.double() * (1 if w13.input_scale is None else w13.input_scale.double())
    out = torch.zeros(len(h), w2.shape[0], dtype=torch.float64, device=h.device)
    for token, (row, its_experts, its_weights) in enumerate(zip(rows, chosen.tolist(), weights, strict=True)):
        for e, weight in zip(its_experts, its_weights, strict=True):
            gate, up = (gate_up[e] @ row).to(dtype).chunk(2)
            g = F.gelu(gate, approximate="tanh") * up
            if w2.input_scale is not None:
                g = round_fp8(g, w2.input_scale[e]).double() * w2.input_scale[e].double()
            out[token] += (down[e] @ g.double()).to(dtype).double() * weight.double()
    return out.to(dtype)


def assert_agree(actual, expected, format, dtype):
    """To the order of sums; in FP8 to a few values between the products that were rounded to their neighbour; in
    integers to the rounding of weights to bfloat16, which kernels don't do. On a GPU, at full size, the order of sums
    moves what is rounded to bfloat16 between the products, too."""
    if format.startswith("int") and dtype == BF16:
        assert_near(actual, expected, 3)
    elif format == "fp8":
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        actual, expected = actual.float(), expected.float()
        # a GPU's tensor cores keep fewer bits of FP8's sums
        assert (actual - expected).norm() < (0.01 if DEVICE.type == "cuda" else 0.004) * expected.norm()
        torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.03 * expected.abs().max().item())
    elif dtype == BF16 and DEVICE.type == "cuda":
        assert_near(actual, expected, 3)
    else:
        assert_same(actual, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Definitions


@FORMATS_IN
@pytest.mark.parametrize("m", [1, 7])
def test_experts_are_the_formula(format, group, dtype, m):
    arguments = case(format, group, dtype, m)
    assert_agree(moe.experts(*arguments), by_formula(*arguments), format, dtype)


@pytest.mark.parametrize(("format", "group"), [("bf16", 0), ("fp8", 0), ("int8", 0), ("int4", 64)])
@pytest.mark.parametrize("m", [1, 5])
def test_parts_of_sums_are_not_rounded(format, group, m):
    """What experts make of their columns on a rank, by the definition and by kernels."""
    *arguments, dtype = case(format, group, BF16, m)
    rounded = moe.experts(*arguments, dtype)
    for experts in (moe.experts, moe.experts_triton) if common.available(DEVICE) else (moe.experts,):
        y = experts(*arguments, dtype, partials=True)
        assert y.dtype == F32
        assert not torch.equal(y, y.to(dtype).float())
        assert_agree(y.to(dtype), rounded, "int8" if format != "fp8" else format, dtype)


@FORMATS_IN
def test_experts_without_knowing_which(format, group, dtype, monkeypatch):
    """What is traced or captured gives what is computed expert by expert."""
    arguments = case(format, group, dtype, 5)
    expected = moe.experts(*arguments)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_agree(moe.experts(*arguments), expected, format, dtype)


@pytest.mark.parametrize(("format", "group"), [("bf16", 0), ("fp8", 0), ("int8", 0), ("int4", 32)])
def test_experts_and_router_compile(format, group):
    """In one graph, as --compile wants it on a CPU."""
    arguments = case(format, group, F32, 3)
    compiled = torch.compile(moe.experts, fullgraph=True, backend="aot_eager")
    assert_agree(compiled(*arguments), moe.experts(*arguments), format, F32)
    arguments = (*router(F32, 3), 2, EPS, normal(64))
    compiled = torch.compile(routing.route, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments)[0], routing.route(*arguments)[0])


def test_gradients_of_experts_and_router():
    h, w13, w2, chosen, weights, dtype = case("bf16", 0, F32, 5)
    leaves = [x.detach().clone().requires_grad_() for x in (h, weights, w13.data, w2.data)]
    h, weights, gate_up, down = leaves
    y = moe.experts(h, Weight.of("bf16", gate_up), Weight.of("bf16", down), chosen, weights, dtype)
    assert y.requires_grad
    picked = gate_up[chosen.long()], down[chosen.long()]  # [M, top_k, ...]
    gate, up = torch.einsum("mjnk,mk->mjn", picked[0], h).chunk(2, -1)
    z = torch.einsum("mjnk,mjk,mj->mn", picked[1], F.gelu(gate, approximate="tanh") * up, weights)
    for actual, expected in zip(
        torch.autograd.grad(y.square().sum(), leaves[:2]),
        torch.autograd.grad(z.square().sum(), leaves[:2]),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    x, scale, proj, expert_scale = router(BF16, 3)
    weight = normal(64, dtype=BF16)
    for result in (1, 2):
        x.grad = None
        routing.route(x.requires_grad_(), scale, proj, expert_scale, 2, EPS, weight)[result].sum().backward()
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_router_and_experts_are_transformers(dtype):
    """Bit by bit, in bfloat16, too."""
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts, Gemma4TextRouter

    config = Gemma4TextConfig(
        hidden_size=64, num_experts=8, top_k_experts=2, moe_intermediate_size=48, enable_moe_block=True
    )
    config._experts_implementation = "grouped_mm"
    theirs = Gemma4TextRouter(config).to(DEVICE, dtype), Gemma4TextExperts(config).to(DEVICE, dtype)
    with torch.no_grad():
        for module in theirs:
            for parameter in module.parameters():
                parameter.normal_(1 if parameter.dim() == 1 else 0, 0.2)
        x = normal(40, 64, dtype=dtype)
        _, expected_weights, expected_chosen = theirs[0](x)
        router = theirs[0].scale, Weight.of("bf16", theirs[0].proj.weight), theirs[0].per_expert_scale
        chosen, weights, _ = routing.route(x, *router, 2, config.rms_norm_eps, normal(64, dtype=dtype))
        assert torch.equal(chosen.long(), expected_chosen)
        assert torch.equal(weights, expected_weights)
        expected = theirs[1](x, expected_chosen, expected_weights)
        y = moe.experts(
            x,
            *(Weight.of("bf16", w.data) for w in (theirs[1].gate_up_proj, theirs[1].down_proj)),
            chosen,
            weights,
            dtype,
        )
        assert torch.equal(y, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Router


def router(dtype, m, n_experts=8, hidden=64):
    return (
        normal(m, hidden, dtype=dtype, scale=3),
        1 + normal(hidden, dtype=dtype, scale=0.2),
        Weight.of("bf16", normal(n_experts, hidden, dtype=dtype, scale=2)),
        1 + normal(n_experts, dtype=dtype, scale=0.2),
    )


def test_route_is_the_formula():
    x, scale, proj, expert_scale = router(F32, 6)
    weight = normal(64)
    chosen, weights, h = routing.route(x, scale, proj, expert_scale, 3, EPS, weight, offset=0.5)
    torch.testing.assert_close(h, F.rms_norm(x, (64,), 0.5 + weight, EPS))
    assert (chosen.dtype, weights.dtype) == (torch.int32, F32)
    for row, its, its_weights in zip(x.double(), chosen.long(), weights, strict=True):
        logits = proj.data.double() @ (row / (row.square().mean() + EPS).sqrt() * scale.double() / 8)
        assert its.tolist() == logits.argsort(descending=True)[:3].tolist()
        expected = logits[its].softmax(0) * expert_scale[its].double()
        torch.testing.assert_close(its_weights, expected.float(), rtol=1e-5, atol=1e-6)


CONFIGS = [
    RouterConfig(block_m=1, block_e=4, block_k=0, num_warps=4, num_stages=1),
    RouterConfig(block_m=16, block_e=16, block_k=32, num_warps=4, num_stages=2),
]


@needs_triton
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("m", "n_experts", "top_k", "hidden"), [(1, 8, 2, 64), (5, 128, 8, 72), (17, 6, 3, 40)])
def test_route(dtype, config, m, n_experts, top_k, hidden):
    input_scale, offset = (scalar(0.01), 1.0) if m == 5 else (None, 0.0)
    arguments = (*router(dtype, m, n_experts, hidden), top_k, EPS, normal(hidden, dtype=dtype), input_scale, offset)
    chosen, weights, h = routing.route_triton(*arguments, config)
    expected_chosen, expected_weights, expected_h = routing.route(*arguments)
    assert_same(h, expected_h)
    assert (chosen.dtype, weights.dtype) == (torch.int32, F32)
    assert torch.equal(chosen, expected_chosen)
    torch.testing.assert_close(weights, expected_weights, rtol=0.02 if dtype == BF16 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("route", [routing.route, pytest.param(routing.route_triton, marks=needs_triton)])
def test_of_equal_experts_the_first_are_taken(route):
    """Logits of one product each, so that they are the same in any order of summation."""
    x, scale, _, expert_scale = router(BF16, 4, 16)
    proj = torch.zeros(16, 64, dtype=BF16, device=DEVICE)
    proj[:, 5] = torch.tensor([1.0, 3, 2, 3, 1, 2, 3, 0] * 2)
    x[:, 5] = x[:, 5].abs() + 1
    x[3, 5] = 0  # every expert is as good
    chosen, weights, _ = route(x, scale, Weight.of("bf16", proj), torch.ones_like(expert_scale), 8, EPS, scale)
    assert chosen[:3].tolist() == [[1, 3, 6, 9, 11, 14, 2, 5]] * 3
    assert chosen[3].tolist() == list(range(8))
    torch.testing.assert_close(weights[3], torch.full_like(weights[3], 1 / 8))
    assert torch.equal(weights[:3, 0], weights[:3, 5])


@needs_triton
def test_a_router_without_numbers_names_experts_all_the_same():
    """Weights of NaN end a run with a message; an expert that doesn't exist would end the process."""
    x, *rest = router(BF16, 3, 16)
    x[0], x[1, 2] = float("nan"), float("inf")
    chosen, weights, _ = routing.route_triton(x, *rest, 4, EPS, rest[0])
    assert weights[:2].isnan().all()
    assert ((chosen >= 0) & (chosen < 16)).all()
    assert all(len(set(row)) == 4 for row in chosen.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Order of pairs


@needs_triton
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("m", "n_experts", "top_k"), [(2, 8, 2), (5, 8, 3), (64, 128, 8), (70, 128, 8), (90, 6, 1)])
@pytest.mark.parametrize("one_expert", [False, True])
def test_pairs_are_sorted(block_m, m, n_experts, top_k, one_expert):
    chosen = torch.randint(0, n_experts, (m, top_k), dtype=torch.int32, device=DEVICE)
    if one_expert:
        chosen[:] = n_experts - 1
    pairs = moe.sort_pairs(chosen, n_experts, block_m)
    expected, order = chosen.flatten().sort(stable=True)
    assert torch.equal(pairs.order.long(), order)
    assert torch.equal(pairs.position[order], torch.arange(m * top_k, dtype=torch.int32, device=DEVICE))
    tiles = [tile for tile in pairs.tiles.tolist() if tile[1] < tile[2]]
    rows = [(e, row) for e, first, end in tiles for row in range(first, end)]
    assert rows == list(zip(expected.tolist(), range(m * top_k), strict=True))
    assert all(end - first <= block_m for _, first, end in tiles)
    assert len(tiles) == sum(-(-count // block_m) for count in chosen.flatten().bincount().tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Products


@needs_triton
@FORMATS_IN
@pytest.mark.parametrize("m", [1, 2, 5, 17, 65])
def test_experts(format, group, dtype, m, monkeypatch):
    monkeypatch.setattr(moe, "COMBINE_BLOCK", 32)
    arguments = case(format, group, dtype, m, one_expert=m == 17)
    assert_agree(moe.experts_triton(*arguments), moe.experts(*arguments), format, dtype)


@needs_triton
@FORMATS_IN
@pytest.mark.parametrize("m", [3])
def test_many_experts(format, group, dtype, m):
    arguments = case(format, group, dtype, m, n_experts=128, top_k=8, hidden=128, f=32)
    assert_agree(moe.experts_triton(*arguments), moe.experts(*arguments), format, dtype)


@needs_triton
@pytest.mark.parametrize(("format", "group"), [("bf16", 0), ("fp8", 0), ("int8", 0), ("int4", 32)])
@pytest.mark.parametrize("m", [3, 40])
def test_blocks_of_outputs_and_rows(format, group, m):
    """Blocks that the sizes are no multiples of."""
    f = 144 if group == 0 else 192
    arguments = case(format, group, BF16, m, n_experts=4, hidden=192, f=f, one_expert=True)
    for block_m, block_n, block_k in ((16, 32, 64), (32, 128, 32)):
        config = GroupedConfig(block_m, block_n, block_k, num_warps=4, num_stages=2)
        y = moe.with_configs(*arguments, (config, config))
        assert_agree(y, moe.experts(*arguments), format, BF16)


@needs_triton
def test_int4_in_short_chunks_is_dequantized():
    arguments = case("int4", 32, BF16, 3, n_experts=3, hidden=64, f=96)
    assert_agree(moe.experts_triton(*arguments), moe.experts(*arguments), "int4", BF16)


@needs_triton
def test_rows_that_tiles_cannot_begin_at():
    arguments = case("bf16", 0, BF16, 3, f=44)
    assert torch.equal(moe.experts_triton(*arguments), moe.experts(*arguments))


@needs_triton
def test_rows_do_not_depend_on_their_neighbours():
    """A NaN stays in its row."""
    h, *rest = case("bf16", 0, BF16, 5)
    expected = moe.experts_triton(h, *rest)
    h[2] = float("nan")
    y = moe.experts_triton(h, *rest)
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], expected[others])
    assert y[2].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# At full size


def random_experts(format: str, n: int, k: int, own_inputs: bool = False) -> Weight:
    with torch.device("meta"):
        weight = Weight(n, k, FORMATS[format], 32, 128, own_inputs)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in list(weight.named_parameters()):
        data = torch.empty_like(parameter, dtype=BF16 if parameter.requires_grad else parameter.dtype, device=DEVICE)
        weight.format.random(name, data, generator)
        setattr(weight, name, torch.nn.Parameter(data, False))
    return weight


@pytest.fixture(scope="module", params=["bf16", "fp8", "int8", "int4"])
def full_size(request):
    w13, w2 = random_experts(request.param, 2 * 704, 2816), random_experts(request.param, 2816, 704, True)
    if request.param == "fp8":
        w13.input_scale.fill_(5 / 448)
        w2.input_scale.copy_(torch.linspace(5, 15, 128) / 448)
    return SimpleNamespace(format=request.param, weights=(w13, w2))


@pytest.mark.cuda
@pytest.mark.parametrize("m", [1, 2, 8, 64, 512])
def test_full_size_in_a_graph(full_size, m):
    """What a graph that was captured with other tokens makes of these."""
    format, (w13, w2) = full_size.format, full_size.weights
    router = 1 + normal(2816, dtype=BF16, scale=0.2), Weight.of("bf16", normal(128, 2816, dtype=BF16))
    router += (1 + normal(128, dtype=BF16, scale=0.2), 8, EPS, 1 + normal(2816, dtype=BF16, scale=0.2))
    router += (w13.input_scale, 0.0)
    x = normal(m, 2816, dtype=BF16)

    def run(route, experts):
        chosen, weights, h = route(x, *router)
        return chosen, weights, h, experts(h, w13, w2, chosen, weights, BF16)

    run(routing.route_triton, moe.experts_triton)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(routing.route_triton, moe.experts_triton)
    x.copy_(torch.randn(m, 2816))
    graph.replay()
    first = [result.clone() for result in results]
    graph.replay()
    assert all(torch.equal(result, again) for result, again in zip(first, results, strict=True))
    chosen, weights, h, y = results
    expected_chosen, expected_weights, expected_h = routing.route(x, *router)
    assert_same(h, expected_h)
    same = (chosen == expected_chosen).all(1)  # not where logits were rounded to neighbours
    assert same.float().mean() > 0.9
    torch.testing.assert_close(weights[same], expected_weights[same], rtol=0.02, atol=0.002)
    assert_agree(y, moe.experts(h, w13, w2, chosen, weights, BF16), format, BF16)


@pytest.mark.cuda
@pytest.mark.parametrize("block_m", [64, 128])
def test_blocks_at_full_size(full_size, block_m):
    (w13, w2), dtype = full_size.weights, full_size.weights[0].data.dtype
    block_k = 128 // dtype.itemsize
    configs = GroupedConfig(block_m, 64, block_k, 4, 3), GroupedConfig(block_m, 128, block_k, 4, 3)
    h = normal(300, 2816, dtype=BF16)
    h = h if full_size.format != "fp8" else round_fp8(h, w13.input_scale)
    chosen = torch.rand(300, 128, device=DEVICE).topk(8).indices.int()
    chosen[:, 0] = 7
    arguments = (h, w13, w2, chosen, torch.rand(300, 8, device=DEVICE), BF16)
    assert_agree(moe.with_configs(*arguments, configs), moe.experts(*arguments), full_size.format, BF16)


@pytest.mark.cuda
def test_the_definition_in_a_graph():
    arguments = case("bf16", 0, BF16, 4)
    expected = moe.experts(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe.experts(*arguments)
    graph.replay()
    assert_same(y, expected)
