"""Sums over ranks inside of kernels, against the same sums by PyTorch. Without GPUs ranks are virtual, and come twice:
the first time they fill the boxes of those that come before them."""

from functools import partial

import pytest
import torch
from test_experts import experts_in
from test_ops import decode_states, dense_inputs, int_weight

from ops import matmul, next_token, norm
from ops.common import E4M3
from ops.experts import experts_triton
from ops.integer import IntGemvConfig, int_matmul
from ops.matmul import GemmConfig, GemvConfig
from ops.peers import EMPTY, TURNS, Parts, box_shape, gather, mail_of
from parallel import Shard

CPU, EPS = torch.device("cpu"), 1e-6


class VirtualSums:
    """What `parallel.PeerSums` is to kernels."""

    def __init__(self, shard: Shard, mails: dict, shared: bool):
        self.shard, self.mails, self.shared = shard, mails, shared

    def mail(self, rows: int, width: int, words: bool = False):
        mail = self.mails[words]
        return mail._replace(SHARED=type(mail.SHARED)(self.shared))


def on_ranks(count: int, width: int, run, slots: int = 8, fills: int = 3, shared: bool = False) -> list:
    """What run(rank, sums) returns on each rank, three times one after the other with the same boxes. It takes two turns
    until all have what each sends, and three until they have `shared` sums that each makes of it. The last rank needs one
    less: the others have sent before it."""
    kinds = {}
    for words in (False, True):
        shape, dtype = box_shape(count, slots, width, words)
        boxes = [torch.full(shape, EMPTY.value, dtype=dtype) for _ in range(count)]
        kinds[words] = [mail_of(boxes, rank, CPU) for rank in range(count)]
    mails = kinds[False] + kinds[True]
    for _ in range(3):
        filled, results = {words: [mail.filled.clone() for mail in kinds[words]] for words in kinds}, [None] * count
        turns = [*range(count)] * (3 if shared else 2)
        for rank in turns[:-1]:
            for words in kinds:
                kinds[words][rank].filled.copy_(filled[words][rank])
            sums = VirtualSums(Shard(rank, count), {words: kinds[words][rank] for words in kinds}, shared)
            results[rank] = run(rank, sums)
            check_emptied(kinds[False][rank])
    for of_kind in kinds.values():
        assert {int(mail.filled.max()) for mail in of_kind} in ({0}, {fills}) and not any(x.missing for x in of_kind)
    assert any(mail.filled.max() for mail in mails)
    return results


def check_emptied(mail):
    """What was read the time before is gone."""
    assert torch.equal(*mail.filled)
    for slot in mail.filled[0].nonzero().flatten():
        assert mail.own[(mail.filled[0, slot] - 1) % TURNS.value, :, slot].eq(EMPTY.value).all()


def check_alike(results: list):
    for result in results[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("count,shared,slots", [(2, False, 8), (2, False, 4), (3, False, 8), (3, True, 8)])
@pytest.mark.parametrize("post,fp8", [(False, True), (True, False)])
def test_add_norm_adds_up_the_ranks(count, shared, slots, post, fp8):
    """With four slots, in two pieces."""
    x, parts = torch.randn(3, 100), torch.randn(count, 2, 3, 100)
    weight, scale = torch.randn(100), torch.tensor(0.02) if fp8 else None
    post_weight = torch.randn(100) if post else None

    def run(rank, sums):
        y = Parts(parts[rank], sums.mail(3, 100))
        return norm.add_norm_triton(x, y, post_weight, weight, EPS, scale)

    results = on_ranks(count, 100, run, slots, 3 if slots == 8 else 6, shared)
    check_alike(results)
    expected = norm.add_norm_triton(x, parts.sum(1), post_weight, weight, EPS, scale)
    assert all(map(torch.equal, results[0], expected))


@pytest.mark.parametrize("count", [3, 4])
def test_long_rows_are_added_up_some_ranks_at_a_time(count):
    x = [torch.randn(1, 16).bfloat16() for _ in range(count)]
    weights = [dense_inputs(1, 4500, 16, torch.bfloat16)[1] for _ in range(count)]
    residual, norm_weight, config = torch.randn(1, 4500).bfloat16(), torch.randn(4500), GemvConfig(2048, 16, 4, 2)

    def run(rank, sums):
        y = matmul.with_config(x[rank], weights[rank], torch.float32, config, True, mail=sums.mail(1, 4500))
        return norm.add_norm_triton(residual, y, None, norm_weight, EPS)

    results = on_ranks(count, 4500, run)
    check_alike(results)
    products = [matmul.with_config(*each, torch.float32, config, True) for each in zip(x, weights)]
    expected = norm.add_norm_triton(residual, torch.stack(products), None, norm_weight, EPS)
    assert all(map(torch.equal, results[0], expected))


PRODUCTS = {  # rows, the weight's dtype or int4's group, and how they are multiplied
    "bf16": (1, torch.bfloat16, GemvConfig(8, 32, 4, 2, early=1)),
    "bf16, two rows": (2, torch.bfloat16, GemvConfig(8, 32, 4, 2)),
    "fp8": (1, E4M3, GemvConfig(4, 64, 4, 2)),
    "bf16, split": (3, torch.bfloat16, GemmConfig(16, 32, 32, 4, 4, 2)),
    "bf16, five rows": (5, torch.bfloat16, GemmConfig(16, 32, 32, 2, 4, 2)),
    "fp8, split": (3, E4M3, GemmConfig(16, 32, 32, 2, 4, 2)),
    "int8": (2, 0, IntGemvConfig(16, 64, 1)),
    "int4": (1, 32, IntGemvConfig(32, 128, 1, split_k=2)),
    "int4, more rows": (4, 32, GemmConfig(16, 16, 128, 2, 4, 2)),
    "too many": (5, torch.bfloat16, GemmConfig(16, 32, 32, 4, 4, 2)),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_send_what_they_make(kind):
    """The norm adds up the same numbers in the same order as when it sends them itself."""
    rows, dtype, config = PRODUCTS[kind]
    residual, norm_weight = torch.randn(rows, 20).bfloat16(), torch.randn(20)
    k = 256 if kind.startswith("int4") else 128
    if isinstance(dtype, int):
        inputs = [(torch.randn(rows, k).bfloat16(), int_weight(20, k, dtype)) for _ in range(2)]
    else:
        inputs = [dense_inputs(rows, 20, k, dtype)[:2] for _ in range(2)]

    def product(rank, mail=None):
        x, weight = inputs[rank]
        if isinstance(dtype, int):
            return int_matmul(x, weight, False, config, torch.float32, mail)
        return matmul.with_config(x, weight, torch.float32, config, True, mail=mail)

    def run(rank, sums):
        y = product(rank, sums.mail(rows, 20))
        assert isinstance(y, Parts) == (kind != "too many")
        y = y if isinstance(y, Parts) else Parts(y, sums.mail(rows, 20))
        return norm.add_norm_triton(residual, y, None, norm_weight, EPS)

    results = on_ranks(2, 20, run, slots=32)
    check_alike(results)
    products = [y if y.dim() == 3 else y[None] for y in map(product, range(2))]
    expected = norm.add_norm_triton(residual, torch.stack([sum(y) for y in products]), None, norm_weight, EPS)
    assert all(map(torch.equal, results[0], expected))


def added_pair(rows, y, z, weights, dtype=torch.bfloat16):
    """A residual stream to which both are added, and its norm; of three or four norms' weights."""
    x = torch.linspace(-1, 1, rows * weights.shape[1]).view(rows, -1).to(dtype)
    pair = norm.Pair(y, weights[0], z, weights[1])
    return norm.add_norm_triton(x, pair, weights[3] if len(weights) > 3 else None, weights[2], EPS)


@pytest.mark.parametrize("split_k", [1, 2])
def test_a_pair_is_what_was_sent_and_what_was_not(split_k):
    x, z, weights = torch.randn(2, 2, 128).bfloat16(), torch.randn(2, 2, 2, 24), torch.randn(4, 24)
    products = [dense_inputs(2, 24, 128, torch.bfloat16)[1] for _ in range(2)]
    config = GemmConfig(16, 16, 32, split_k, 4, 2)

    def run(rank, sums, sends=True):
        mail = sums.mail(2, 24) if sends else None
        y = matmul.with_config(x[rank], products[rank], torch.float32, config, True, mail=mail)
        y = y if sends else Parts(y if y.dim() == 3 else y[None], sums.mail(2, 24))
        return added_pair(2, y, Parts(z[rank], sums.mail(2, 24)), weights)

    results = on_ranks(2, 24, run, slots=16)
    check_alike(results)
    assert all(map(torch.equal, results[0], on_ranks(2, 24, lambda *rank: run(*rank, False), slots=16)[0]))


def test_experts_of_one_row_send_what_they_make():
    """Into boxes of their own, beside what a product sends or what is sent by the norm."""
    h, chosen, weights = torch.randn(1, 16).bfloat16(), torch.tensor([[2, 0]], dtype=torch.int32), torch.rand(1, 2)
    x, norms = torch.randn(2, 1, 16).bfloat16(), torch.randn(3, 16)
    dense = [dense_inputs(1, 16, 16, torch.bfloat16)[1] for _ in range(2)]
    stacks = [
        [experts_in("bf16", torch.randn(3, *shape).bfloat16() / 8) for shape in ((16, 16), (16, 8))] for _ in range(2)
    ]

    def run(rank, sums, y_sends=True, z_sends=True):
        mails = [sums.mail(1, 16) if sends else None for sends in (y_sends, z_sends)]
        y = matmul.matmul_triton(x[rank], dense[rank], torch.float32, True, mails[0])
        z = experts_triton(h, *stacks[rank], chosen, weights, torch.bfloat16, True, mails[1])
        parts = [each if isinstance(each, Parts) else Parts(each[None], sums.mail(1, 16)) for each in (y, z)]
        assert [bool(each.sent) for each in parts] == [y_sends, z_sends]
        return added_pair(1, *parts, norms)

    expected = on_ranks(2, 16, lambda rank, sums: run(rank, sums, False, False))
    for run_so in (run, partial(run, y_sends=False), partial(run, z_sends=False)):
        results = on_ranks(2, 16, run_so)
        check_alike(results)
        assert all(map(torch.equal, results[0], expected[0]))


def test_no_number_looks_as_if_it_were_not_there():
    parts = torch.full((2, 1, 1, 40), EMPTY.value, dtype=torch.int32).view(torch.float32)  # NaN

    def run(rank, sums):
        mail = sums.mail(1, 40)
        x, _ = norm.add_norm_triton(torch.zeros(1, 40), Parts(parts[rank], mail), None, None, EPS)
        return [x.isnan(), mail.own[int(mail.filled[0, 0]), 1 - rank, 0, :40] == EMPTY.value]

    for is_nan, is_empty in on_ranks(2, 40, run):
        assert is_nan.all() and not is_empty.any()


@pytest.mark.parametrize("slots,fills", [(8, 3), (4, 6)])
def test_a_pair_is_sent_by_the_norm(slots, fills):
    y, z, weights = torch.randn(2, 1, 3, 40), torch.randn(2, 2, 3, 40), torch.randn(3, 40)

    def run(rank, sums):
        mail = sums.mail(3, 40)
        return added_pair(3, Parts(y[rank], mail), Parts(z[rank], mail), weights, y.dtype)

    results = on_ranks(2, 40, run, slots, fills)
    check_alike(results)
    assert all(map(torch.equal, results[0], added_pair(3, y.sum(1), z.sum(1), weights, y.dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, E4M3])
def test_embeddings_are_looked_up_where_they_are(dtype):
    weight, tokens = (torch.randn(20, 24) * 20).to(dtype), torch.tensor([3, 12, 7, 19, 8])
    scale = {torch.int8: torch.rand(20).bfloat16(), E4M3: torch.tensor(0.5)}.get(dtype)

    def run(rank, sums):
        first, end = ((0, 8), (8, 20))[rank]
        own = scale[first:end] if dtype == torch.int8 else scale
        return [norm.embed_triton(tokens, weight[first:end], 2.0, torch.bfloat16, own, first, sums)]

    results = on_ranks(2, 24, run, fills=6)  # five rows, in two pieces
    check_alike(results)
    assert torch.equal(results[0][0], norm.embed_triton(tokens, weight, 2.0, torch.bfloat16, scale))


@pytest.mark.parametrize("count,bad", [(2, None), (3, None), (2, 150)])
def test_the_best_of_all_ranks_is_everyones(count, bad):
    """Of equal ones the first, also where the others are another rank's; a row that isn't finite is told."""
    logits = torch.randn(4, 200).bfloat16()
    logits[0, 199], logits[1, 70], logits[1, 190], logits[2, 0] = 9, 9, 9, 9
    if bad is not None:
        logits[3, bad] = float("nan")
    states = [decode_states(4, 200, (5, -1))[0] for _ in range(count + 1)]
    for state in states[1:]:
        for name, value in vars(states[0]).items():
            if value is not None and isinstance(value, torch.Tensor):
                getattr(state, name).copy_(value)
    kept = [{name: x.clone() for name, x in vars(state).items() if isinstance(x, torch.Tensor)} for state in states]

    def run(rank, sums):
        for name, value in kept[rank].items():
            getattr(states[rank], name).copy_(value)
        first, end = sums.shard.vocabulary(200)
        next_token.greedy_next_token_triton(logits[:, first:end].contiguous(), states[rank], None, sums, 200)
        return [x for name, x in vars(states[rank]).items() if isinstance(x, torch.Tensor)]

    check_alike(on_ranks(count, 2, run))
    next_token.greedy_next_token_triton(logits, states[count])
    for name in kept[0]:
        actual, expected = getattr(states[0], name), getattr(states[count], name)
        if bad is None or name not in ("token", "log", "done"):
            assert torch.equal(actual, expected), name
    assert bad is None or states[0].finite.tolist() == [True, True, True, False]


@pytest.mark.parametrize("x", [torch.arange(2500), torch.randn(3, 7, 2).bfloat16()], ids=["int64", "bf16"])
def test_all_ranks_have_what_each_has(x):
    """Of the larger one in two launches."""
    results = on_ranks(
        3, 1024, lambda rank, sums: [gather(x + rank, sums.mail(3, 1024, True), 3)], fills=3 * (1 + (x.nbytes > 12288))
    )
    check_alike(results)
    assert torch.equal(results[0][0], torch.stack([x, x + 1, x + 2]))
