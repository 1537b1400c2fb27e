"""Tensor parallelism: what ranks have of a model, that it adds up to the whole, and that all of them say the same."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CASES, GREEDY, small_model, tiny_config
from test_assistant import filled, make_reference, make_target
from torch import Tensor

import checkpoint as checkpoint_file
from adapter import Adapter, updates_of
from assistant import load_assistant
from checkpoint import (
    DTYPE_NAMES,
    LINEAR_WEIGHTS,
    PER_LAYER_TABLE,
    Checkpoint,
    fp8_scale_names,
    load_weights,
    open_checkpoint,
    parameter_name,
    scale_shape,
    sources,
)
from config import NAMED_CONFIGS, ModelConfig
from files import tensor_bytes, write_safetensors
from formats import Weight
from generate import generate, load_model
from model import Transformer
from ops import TORCH
from parallel import Shard, Sums, greatest, init, replicas_of
from speculate import AssistantDrafter

CPU = torch.device("cpu")
UNEVEN = dict(vocab_size=200, vocab_size_per_layer_input=200)  # 2 ranks: 128 and 72, 4 ranks: three times 64, and 8
SIZES = dict(intermediate_size=256, moe_intermediate_size=128)  # of which 4 ranks have whole groups of int4
PROMPTS = [[2, 17, 5, 99, 3], [2, 8], [2, *range(20, 50)]]


class ThreadSums(Sums):
    """A rank that is a thread; `told` is what all of them said last."""

    def __init__(self, rank: int, told: list, barrier: threading.Barrier):
        self.shard, self.device, self.told, self.barrier = Shard(rank, len(told)), CPU, told, barrier

    def gathered(self, x: Tensor) -> Tensor:
        self.told[self.shard.rank] = x
        self.barrier.wait(30)
        whole = torch.stack(self.told)
        self.barrier.wait(30)  # before the next thing is said
        return whole


def on_ranks(count: int, run: Callable) -> list:
    """What run(sums) returns on each of the ranks, which are threads."""
    told, barrier = [None] * count, threading.Barrier(count)

    def rank_of(rank: int):
        try:
            with torch.inference_mode():
                return run(ThreadSums(rank, told, barrier))
        except BaseException:
            barrier.abort()  # nobody waits for this one
            raise

    with ThreadPoolExecutor(count) as threads:
        ranks = [threads.submit(rank_of, rank) for rank in range(count)]
    errors = [each.exception() for each in ranks if each.exception()]
    if errors:
        raise next((x for x in errors if not isinstance(x, threading.BrokenBarrierError)), errors[0])
    return [each.result() for each in ranks]


# --- what ranks have


def entry(tensor: Tensor):
    return DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), lambda: [tensor_bytes(tensor)]


def as_published(model: Transformer, directory: Path, apart: bool = False) -> Checkpoint:
    """The model's numbers under Hugging Face's names, those of experts together or apart."""
    entries, weights = {}, model.state_dict()
    for ours, parts in sources(model.config, apart).items():
        whole = weights[ours] if len(parts) == 1 else weights[ours].flatten(0, -2)
        rows = [shape[0] for _, shape in parts]
        entries |= {theirs: entry(part) for (theirs, _), part in zip(parts, whole.split(rows))}
    write_safetensors(directory / "model.safetensors", entries, {"format": "pt"})
    (directory / "config.json").write_text("{}")
    return open_checkpoint(directory, config=model.config)


def as_ours(model: Transformer, directory: Path, format: str, group: int = 0) -> Checkpoint:
    """The model as one file in a weight format."""
    entries, file = {}, directory / "gemma.safetensors"
    if format == "fp8":
        entries = {name: entry(torch.ones(scale_shape(name, model.config))) for name in fp8_scale_names(model.config)}
    for name, tensor in model.state_dict().items():
        if format == "fp8" and name.endswith(".scale"):
            name = f"{name.removesuffix('scale')}weight_scale"
        if format == "fp8" and name.endswith("_scale"):
            name = name.replace("embedding.", "head_scales.")
        entries[name] = entry(tensor)
    write_safetensors(file, entries, {"weight_format": format, "group_size": str(group)})
    return open_checkpoint(file, config=model.config)


def loaded(checkpoint: Checkpoint, config: ModelConfig, like: Transformer, ops=TORCH) -> Transformer:
    """The model, or a shard of it, of the formats that `like` has."""
    with torch.device("meta"):
        model, first = Transformer(config), like.layers[0].attention.wqkv
        model.store(first.format.name, first.group, head=like.embedding.format.name != "bf16")
    weights = load_weights(checkpoint, CPU, torch.float32, shard=config.shard)
    weights = {
        parameter_name(name): weight for name, weight in weights.items() if name[-8:] not in (".k_scale", ".v_scale")
    }
    return model.load(weights, CPU, ops)


def numbers(model: Transformer) -> dict[str, Tensor]:
    """Of all weights, in float32; and all other parameters."""
    found = {n: m.format.dequantize(m, torch.float32) for n, m in model.named_modules() if isinstance(m, Weight)}
    other = {n: p for n, p in model.named_parameters() if n.rsplit(".", 1)[0] not in found}
    return found | other | {n: p for n, p in model.named_parameters() if n.endswith("input_scale")}


def part_of(name: str, whole: Tensor, config: ModelConfig, rank: int, count: int) -> Tensor:
    """What a rank has of a weight, by other means than parallel.py's."""
    if name in ("embedding", "per_layer_inputs.embedding"):
        return whole.split(Shard(0, count).vocabulary_width(len(whole)))[rank]
    if name.endswith((".wo", ".w2")):
        return whole.chunk(count, -1)[rank]
    if name.endswith(".w13"):
        return torch.cat([half.chunk(count, -2)[rank] for half in whole.chunk(2, -2)], -2)
    if name.endswith(".wqkv"):
        layer = int(name.split(".")[1])
        heads = whole.unflatten(0, (-1, config.head_dim_of(layer)))
        queries, others = heads[: config.n_heads], heads[config.n_heads :]
        kinds = others.chunk(config.kv_products_of(layer)) if len(others) else []
        own = [queries.chunk(count)[rank]]
        own += [each.repeat_interleave(max(1, count // len(each)), 0).chunk(count)[rank] for each in kinds]
        return torch.cat(own).flatten(0, 1)
    return whole


FORMS = {
    "published": (dict(), lambda *given: as_published(*given)),
    "experts apart": (dict(), lambda *given: as_published(*given, True)),
    "converted": (dict(), lambda *given: as_ours(*given, "fp32")),
    "fp8": (dict(format="fp8", head=True), lambda *given: as_ours(*given, "fp8")),
    "int8": (dict(format="int8", head=True), lambda *given: as_ours(*given, "int8")),
    "int4": (dict(format="int4", head=True), lambda *given: as_ours(*given, "int4", 32)),
}


@pytest.mark.parametrize(
    ("case", "form"),
    [
        *(("gemma4-experts", form) for form in FORMS),
        *(("gemma-gqa", form) for form in ("published", "fp8", "int4")),
        *(("gemma4-shared", form) for form in ("published", "converted", "int8")),
    ],
)
def test_shards_are_parts_of_the_whole_and_add_up_to_it(case, form, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.PIECE", 5000)
    settings, write = FORMS[form]
    config = tiny_config(case, **SIZES, **UNEVEN)
    model = Transformer.random(config, dtype=torch.float32, **settings)
    checkpoint, tokens = write(model, tmp_path), torch.tensor([[2, 7, 199, 64], [2, 130, 5, 71]])
    whole, expected = numbers(loaded(checkpoint, config, model)), model(tokens)
    assert all(map(torch.equal, whole.values(), numbers(model).values()))
    for count in (2, 4):
        shards = [loaded(checkpoint, config.sharded(Shard(rank, count)), model) for rank in range(count)]
        for rank, shard in enumerate(shards):
            own = numbers(shard)
            assert own.keys() == whole.keys()
            for name, weight in whole.items():
                assert torch.equal(own[name], part_of(name, weight, config, rank, count)), name

        def run(sums, shards=shards):
            shard = shards[sums.shard.rank]
            shard.ops = replace(TORCH, sums=sums)
            return shard(tokens)

        first, *others = on_ranks(count, run)
        assert all(torch.equal(first, each) for each in others)
        # A sum's last bits may round an input to the next of 8 bits
        tolerance = 0.02 * expected.abs().max().item() if form == "fp8" else 2e-5 * expected.abs().max().item()
        torch.testing.assert_close(first, expected, atol=tolerance, rtol=0)


def sharded(model: Transformer, checkpoint: Checkpoint, sums: Sums) -> Transformer:
    return loaded(checkpoint, model.config.sharded(sums.shard), model, replace(TORCH, sums=sums))


@pytest.mark.parametrize("case", CASES)
def test_ranks_generate_what_one_does(case, tmp_path):
    model = small_model(case=case)
    checkpoint, options = as_published(model, tmp_path), dict(temperature=1.0, top_k=20, seed=3, num_samples=2)
    tokens = torch.tensor([[2, 7, 127, 64, 3, 9, 28, 40], [2, 30, 5, 71, 8, 9, 0, 1]])

    def texts(model):
        greedy = generate(model, PROMPTS, 4, batch_size=2, **GREEDY)
        return greedy, generate(model, PROMPTS[:1], 4, stop_ids=(), repetition_penalty=1.2, **options)

    def results(sums):
        shard = sharded(model, checkpoint, sums)
        return shard(tokens), texts(shard) if sums.shard.count == 2 else None

    with torch.inference_mode():
        logits, expected = model(tokens), texts(model)
    for count in (2, 4):
        for its_logits, its_texts in on_ranks(count, results):
            torch.testing.assert_close(its_logits, logits, atol=1e-5 * logits.abs().max().item(), rtol=1e-5)
            assert its_texts in (None, expected)


@pytest.mark.parametrize(("name", "ordered", "count"), [("shared", True, 2), ("k_eq_v", False, 2)])
def test_ranks_guess_what_one_does(name, ordered, count, tmp_path):
    target = make_target(name)
    make_reference(target, name, ordered).save_pretrained(tmp_path / "drafter")
    checkpoint, options = as_published(target, tmp_path), dict(seed=3, stop_ids=(), speculate_k=2)

    def guesses(target):
        assistant = load_assistant(tmp_path / "drafter", target)
        cache, token, state, position = filled(target)
        drafts = assistant.drafts(target, cache, token, state, position, 3)
        return drafts, generate(target, PROMPTS, 6, drafter=AssistantDrafter(assistant), **options)

    with torch.inference_mode():
        drafts, texts = guesses(target)
    for its_drafts, its_texts in on_ranks(count, lambda sums: guesses(sharded(target, checkpoint, sums))):
        assert torch.equal(its_drafts, drafts) and its_texts == texts


def assert_parts(checkpoint: Checkpoint, config: ModelConfig, **options):
    """What ranks load is a part of what one loads."""

    def run(sums):
        return load_weights(
            checkpoint, CPU, torch.float32, **options, shard=sums.shard, greatest=partial(greatest, sums)
        )

    whole = load_weights(checkpoint, CPU, torch.float32, **options)
    for count in (2, 4):
        for rank, own in enumerate(on_ranks(count, run)):
            assert own.keys() == whole.keys()
            for name, weight in whole.items():
                expected = part_of(name.removesuffix(".weight"), weight.float(), config, rank, count)
                assert own[name].dtype == weight.dtype
                assert torch.equal(own[name].float(), expected), name


def scales_of(model: Transformer) -> dict:
    weights = {name: weight for name, weight in model.state_dict().items() if name.endswith(LINEAR_WEIGHTS)}
    return {f"{name}_scale": (weight.abs().amax((-2, -1)) / 448).tolist() for name, weight in weights.items()}


@pytest.mark.parametrize("apart", [False, True])
def test_ranks_quantize_their_parts_as_they_read_them(apart, tmp_path):
    config = tiny_config("gemma4-experts", **SIZES)
    model = Transformer.random(config, dtype=torch.float32)
    checkpoint, scales = as_published(model, tmp_path, apart), scales_of(model)
    assert_parts(checkpoint, config, scales=scales)
    name = "layers.1.attention.wo.weight_scale"
    with pytest.raises(ValueError, match=f"is of another model: {name.removesuffix('_scale')} asks"):
        load_weights(checkpoint, CPU, torch.float32, scales | {name: scales[name] / 2}, shard=Shard(0, 2))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("case", ["gemma-gqa", "gemma4-shared"])
def test_ranks_merge_their_parts_of_an_adapter(case, fp8, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.PIECE", 5000)
    config = tiny_config(case, **SIZES)
    model = Transformer.random(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = (64 * parameter).round() / 64  # sums are the same in any order
    checkpoint, factors = as_published(model, tmp_path), {}
    for name, shape in (part for parts in sources(config).values() for part in parts):
        if name.endswith("_proj.weight"):
            a, b = torch.randint(-3, 4, (2, shape[1])), torch.randint(-3, 4, (shape[0], 2))
            factors[name.removesuffix(".weight")] = a.float(), b.float()
    updates = updates_of(Adapter("any", factors, 2, 0.5, dict.fromkeys(factors, 0.25)), config)
    assert_parts(checkpoint, config, updates=updates, scales=scales_of(model) if fp8 else None)


def test_ranks_read_published_fp8_of_which_each_part_has_its_scale(tmp_path):
    config, entries = tiny_config(), {}
    settings = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
    for ours, parts in sources(config).items():
        for i, (theirs, shape) in enumerate(parts):
            numbers = torch.randn(shape)
            if ours.endswith(LINEAR_WEIGHTS):
                numbers = numbers.to(torch.float8_e4m3fn)
                for kind in ("weight_scale", "input_scale"):
                    entries[theirs.replace("weight", kind)] = entry(torch.tensor(0.5 + 0.1 * i))
            entries[theirs] = entry(numbers)
    write_safetensors(tmp_path / "model.safetensors", entries, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="1.0 is used"):
        assert_parts(open_checkpoint(tmp_path, config=config), config)


def test_embeddings_of_the_layers_are_shared_in_the_memory_of_the_host(tmp_path):
    config = tiny_config("gemma4-shared", **UNEVEN)
    checkpoint = as_published(Transformer.random(config, dtype=torch.float32), tmp_path)
    assert_parts(checkpoint, config, on_host=(PER_LAYER_TABLE,))


def test_bytes_that_all_ranks_read_are_those_of_the_file(tmp_path, monkeypatch):
    model, pieces = small_model(vocab_size=4096), []
    monkeypatch.setattr(checkpoint_file, "_copy_pieces", lambda found, device: pieces.extend(found))
    for checkpoint in (as_published(model, tmp_path), as_ours(model, tmp_path, "fp32")):
        stored, whole = sum(tensor.size for parts in checkpoint.parts.values() for tensor in parts), 0
        for rank in range(2):
            weights = load_weights(checkpoint, CPU, torch.float32, shard=Shard(rank, 2))
            whole += sum(weight.nbytes for name, weight in weights.items() if "norm" in name)
        assert stored < whole + sum(piece.size for piece in pieces) < 1.01 * stored
        pieces.clear()


def test_a_bfloat16_model_adds_up_parts_that_are_not_rounded(tmp_path):
    model = small_model().bfloat16()
    y, weight = torch.randn(3, 128).bfloat16(), model.layers[0].attention.wo
    part = TORCH.matmul(y, weight, torch.float32, partials=True)
    assert torch.equal(part, y.float() @ weight.data.float().T)
    checkpoint, tokens = as_published(model, tmp_path), torch.tensor([[2, 7, 127, 64]])

    def run(sums):
        shard = Transformer(model.config.sharded(sums.shard))
        weights = load_weights(checkpoint, CPU, torch.bfloat16, shard=sums.shard)
        return shard.load(weights, CPU, replace(TORCH, sums=sums))(tokens)

    first, second = on_ranks(2, run)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model(tokens).detach(), atol=0.05 * first.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        ({}, 3, "4 query heads can't be shared evenly among 3 ranks"),
        ({}, 8, "4 query heads can't be shared evenly among 8 ranks"),
        (dict(num_attention_heads=12, num_key_value_heads=6), 4, "6 key/value heads can't be shared among 4 ranks"),
        (dict(intermediate_size=98), 4, "98 columns of a feed-forward can't be shared evenly among 4 ranks"),
        (dict(vocab_size=9), 4, "a vocabulary of 9 can't be shared among 4 ranks"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_its_numbers(settings, count, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings).sharded(Shard(0, count))


def test_published_sizes_can_be_shared():
    refused = {}
    for name in NAMED_CONFIGS:
        config = ModelConfig.from_name(name)
        for count in (2, 4, 8):
            try:
                config.sharded(Shard(count - 1, count))
                Shard(0, count).check_group(config, 128)
            except ValueError as error:
                refused[name, count] = str(error)
    for name in ("gemma-3-270m", "gemma-3-1b"):
        assert refused.pop((name, 8)) == "4 query heads can't be shared evenly among 8 ranks"
    expected = "int4 groups of 128 don't divide the 1728 columns that each of 4 ranks has of 6912"
    assert refused.pop(("gemma-3-1b", 4)) == expected
    # 2112 columns, of which 2 ranks have whole groups of 32
    assert refused.keys() == {("gemma-4-26B-A4B", count) for count in (2, 4, 8)}
    config = ModelConfig.from_name("gemma-4-26B-A4B")
    Shard(0, 2).check_group(config, 32)
    with pytest.raises(ValueError, match="int4 groups of 32 don't divide the 528 columns that each of 4 ranks has"):
        Shard(0, 4).check_group(config, 32)


@pytest.mark.parametrize(
    ("size", "count", "own"), [(262208, 8, [32832] * 7 + [32384]), (200, 2, [128, 72]), (128, 4, [32] * 4)]
)
def test_the_vocabulary_is_shared_in_steps(size, count, own):
    ranges = [Shard(rank, count).vocabulary(size) for rank in range(count)]
    assert [end - first for first, end in ranges] == own
    assert [first for first, _ in ranges[1:]] == [end for _, end in ranges[:-1]]


def test_ranks_that_do_not_fit_are_refused(monkeypatch):
    assert init(1) is None
    with pytest.raises(ValueError, match="--tp is 2, and there are 1 processes: .* torchrun --nproc-per-node 2"):
        init(2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--tp is 2, and there are 3 processes: it must divide them"):
        init(2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="--tp is 8, and there are 4 processes on a host"):
        init(8)
    assert replicas_of(2) == 4
    with pytest.raises(ValueError, match="ops 'te' runs on one GPU"):
        load_model(device="cpu", ops="te", sums=ThreadSums(0, [None], threading.Barrier(1)))
