"""Fine-tune a Gemma on your text: all of its weights, or adapters beside them (LoRA), on one GPU or many.

    python finetune.py --data train.jsonl --output_dir OUT                                        on a GPU, or a CPU
    torchrun --standalone --nproc_per_node 8 finetune.py --data train.jsonl --output_dir OUT      on eight GPUs

Lines of the data are {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}; of chats the answers are
learned, of prompts the completions, of texts everything (training_data.py). OUT gets the fine-tuned checkpoint as
Hugging Face has it, or the adapter as PEFT has it; log.jsonl and curves.svg; and, in checkpoints/, what --resume goes on
from.

Parameters are in float32, rounded to BF16 where they are multiplied: what an update adds to a weight is often less than
what BF16 can tell apart. On several GPUs they are sharded (FSDP2); adapters are on each, and gradients are summed up.
Routers of experts are trained by the loss alone, as in transformers: nothing balances what experts are given.
"""

import interrupt

if __name__ == "__main__":
    interrupt.silence()  # while the rest is imported

import argparse
import gc
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from adapter import save_adapter
from checkpoint import (
    QUANTIZED_FORMATS,
    Checkpoint,
    fingerprint,
    load_weights,
    open_checkpoint,
    sources,
)
from cli import PRECISIONS, Parser, add_model_options, number, path, run_program
from config import ModelConfig
from device import GIB, allocated_memory, now, peak_memory, pick_device, spare_memory, told_if_out_of_memory
from export import export_checkpoint, open_source
from files import check_writable, read_json, write_atomically
from formats import LINEAR, Weight
from generate import load_model
from model import Block, Residual, Transformer
from ops.common import power_of_2
from ops.norm import rms_norm
from ops.rope import Positions, rope
from ops.training import FUSED_HEAD, RECIPES, Documents, LoRA, Training, choose, cross_entropy
from parallel import of_environment, own_device
from text import check_window
from tokenizer import open_tokenizer
from training_data import Batch, Data, read_documents

KEPT = 2  # checkpoints of a run
ROOT_PARTS = ("embedding.", "norm.", "per_layer_inputs.")  # what is in no layer
CLIP = 1.0  # norm that longer gradients are scaled down to
PEAKS = {  # FLOP/s of dense BF16 products, as NVIDIA states them
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}

# ---------------------------------------------------------------------------------------------------------------------
# The model and its loss


class Kept:
    """Keys and values that layers leave for later ones, by name. No dictionary: FSDP copies those that it finds in a
    module's arguments, and what is left in a copy nobody finds."""

    def __init__(self):
        self.entries = {}

    def __setitem__(self, name: str, value: tuple[Tensor, Tensor]):
        self.entries[name] = value

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return self.entries[name]


@cache
def _added() -> Callable:
    """total + part in float32, in place: of PyTorch's own operations, one that mixes dtypes takes four times as long."""
    return torch.compile(lambda total, part: total.add_(part), dynamic=True)


class Rounded(torch.autograd.Function):
    """A parameter rounded to `dtype`, whose gradient is added to the parameter's without being made float32 before."""

    @staticmethod
    def forward(ctx, parameter, dtype):
        ctx.parameter = parameter
        return parameter.to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        total = ctx.parameter.grad
        if total is None or not gradient.is_cuda:
            return gradient.to(ctx.parameter.dtype), None
        _added()(total.view(-1), gradient.reshape(-1))
        return None, None


@contextmanager
def rounded(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While it lasts, what is trained in `module` is its parameters rounded to `dtype`; gradients reach the parameters.
    Sharded parameters are rounded already when they are gathered."""
    originals = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter.dtype != dtype:
                originals.append((part._parameters, name, parameter))
    try:
        for parameters, name, parameter in originals:
            parameters[name] = Rounded.apply(parameter, dtype)
        yield
    finally:
        for parameters, name, parameter in originals:
            parameters[name] = parameter


class Objective(nn.Module):
    """The loss of a model, whose blocks run by `training`'s operations in `dtype`. With `recompute` each block keeps
    its input alone for the backward, which runs it again. `block_bytes`, where it isn't None, becomes the most that one
    left in memory when it ran: when it ran again, what it would keep otherwise."""

    def __init__(self, model: Transformer, training: Training, dtype: torch.dtype, recompute: bool):
        super().__init__()
        self.model, self.training_ops, self.dtype, self.recompute = model, training, dtype, recompute
        self.block_bytes: int | None = None
        for layer in model.layers:
            layer.forward = partial(self.run_block, layer.forward, layer)

    @property
    def records(self) -> bool:
        """Whether a CUDA graph can hold it: experts' rows are counted on the host."""
        return self.training_ops.records and not self.recompute and not self.model.config.n_experts

    def run_block(self, forward: Callable, layer: Block, *args) -> Residual:
        def run() -> Residual:
            with rounded(layer, self.dtype), self.measured():
                residual = forward(*args)
                # Added here, since the weight of the norm behind a layer is gone when a sharded layer is done
                return Residual(residual.added(self.training_ops.ops, self.model.config, None)[0])

        return self.training_ops.checkpoint(run) if self.recompute and torch.is_grad_enabled() else run()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measures what a block that runs in the context leaves in memory, if that is asked for."""
        if self.block_bytes is None:
            yield
            return
        before = allocated_memory(self.model.device)
        try:
            yield
        finally:  # a block that runs again is left by an exception as soon as the backward has all that it needs
            self.block_bytes = max(self.block_bytes, allocated_memory(self.model.device) - before)

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the cross-entropies of a batch's targets, in nats."""
        model, ops, config, dtype = self.model, self.training_ops.ops, self.model.config, self.dtype
        local = any(map(config.is_local, range(config.n_layers)))
        ropes = rope(batch.position, model.rope_frequency, *[model.rope_frequency_local] * local)
        kept = [Kept() if config.n_shared_layers else None for _ in ropes]
        m = len(batch.tokens)
        kinds = [
            Positions(1, m, None, None, ropes[kind], mask=batch.documents, kept=kept[kind])
            for kind in range(len(ropes))
        ]
        embedding, inputs = model.embedding, None
        with self.training_ops.precision():
            x = ops.embed(batch.tokens, embedding.data, model.normalizers[dtype], dtype, embedding.scale)
            if model.per_layer_inputs is not None:
                with rounded(model.per_layer_inputs, dtype):
                    inputs = model.per_layer_inputs(ops, batch.tokens, x)
            residual = Residual(x)
            for index, layer in enumerate(model.layers):
                own = None if inputs is None else inputs[:, index]
                residual = layer(ops, residual, kinds[config.is_local(index)], None, own)
        h = rms_norm(residual.x, model.norm.weight, config.norm_eps, config.norm_offset)
        head = embedding.data
        if embedding.format.name != "bf16":
            head = embedding.format.dequantize(embedding, dtype)
        return cross_entropy(h, head, batch.targets, config.logit_softcap, self.training_ops.of_logits)


class Workers(NamedTuple):
    """The processes that train together, one a device: this one's number, how many there are, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x, summed up over all of them in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def least(self, value: int) -> int:
        """The least value that one of them has."""
        x = torch.tensor(value, device=self.device)
        if self.count > 1:
            dist.all_reduce(x, dist.ReduceOp.MIN)
        return int(x)

    def wait(self):
        if self.count > 1:
            dist.barrier()


@contextmanager
def workers(device: str | None) -> Iterator[Workers]:
    """Those that torchrun started, connected; or this one alone."""
    count = of_environment("WORLD_SIZE", 1)
    if count == 1:
        yield Workers(0, 1, pick_device(device))
        return
    device = own_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Workers(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()


def shard(module: nn.Module, ranks: Workers, dtype: torch.dtype):
    """Leaves each of several ranks its share of the module's parameters, to be gathered in `dtype` while it runs."""
    if ranks.count > 1:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=init_device_mesh(ranks.device.type, (ranks.count,)), mp_policy=policy)


def whole_model(checkpoint: Checkpoint, ranks: Workers, dtype: torch.dtype) -> Transformer:
    """A checkpoint's model with parameters in float32, all to be trained, on this rank's device; on several, sharded
    layer by layer as they are read, and gathered in `dtype`."""
    if checkpoint.weight_format not in (None, "bf16", "fp16", "fp32"):
        raise ValueError(
            f"{checkpoint.weight_format} weights can't be trained: train adapters beside them (--lora_rank)"
        )
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    modules = {f"layers.{i}.": layer for i, layer in enumerate(model.layers)}
    for prefix, module in (modules | {"": model}).items():
        names = [name for name in checkpoint.parts if name.startswith(prefix or ROOT_PARTS)]
        parts = {name: checkpoint.parts[name] for name in names}
        loaded = load_weights(replace(checkpoint, parts=parts), ranks.device, torch.float32)
        # A copy, since it may be a view of the file
        loaded = {name.removeprefix(prefix): x.clone() if x.device.type == "cpu" else x for name, x in loaded.items()}
        module.load_state_dict(loaded, strict=bool(prefix), assign=True)
        if prefix:
            shard(module, ranks, dtype)
    for name, buffer in model.named_buffers():
        setattr(model, name, buffer.to(ranks.device))
    return unfrozen(model)


def unfrozen(model: Transformer) -> Transformer:
    """The model, all of its parameters to be trained but the scalars of layers: constants in the reference, too."""
    model.requires_grad_(True)
    for layer in model.layers if model.config.layer_scalar else ():
        layer.scalar.requires_grad_(False)
    return model


def add_adapters(model: Transformer, rank: int, seed: int):
    """Puts adapters beside the linear weights of attention and feed-forward networks, those of experts excepted."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, parts in sources(model.config).items():
        module = name.removesuffix(".weight")
        if module.endswith(LINEAR) and ".experts." not in module:
            weight: Weight = model.get_submodule(module)
            rows = [shape[0] for _, shape in parts]
            weight.lora = LoRA(rows, weight.shape[1], rank, 2.0, generator)  # alpha is twice the rank


def adapter_factors(model: Transformer) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors A and B by Hugging Face's names of the modules that they are beside."""
    factors = {}
    for name, parts in sources(model.config).items():
        lora = getattr(model.get_submodule(name.rpartition(".")[0]), "lora", None)
        if lora is not None:
            for (theirs, _), pair in zip(parts, lora.factors()):
                factors[theirs.removesuffix(".weight")] = pair
    return factors


# ---------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of step 0 to steps - 1: rises in the first 3 %, then falls as a cosine to a tenth."""
    rising = max(1, round(0.03 * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Recording:
    """What a batch adds to the gradients, as a CUDA graph, since a host launches short kernels more slowly than they run:
    gemma-7b, adapters, 2,048 tokens a step take an H100 166 ms instead of 263."""

    def __init__(self, objective: Objective, data: Data, rows: int, device: torch.device):
        """Records batches of `rows` rows of `data`. Gradients are those that the parameters have now. What runs for the
        first time has to have run before."""
        empty, self.factor = data.batch([[]] * rows, device), torch.zeros((), device=device)
        most = rows * (1 + max(map(len, data.rows)))  # documents, and padding behind each row's
        ends = torch.zeros(1 + power_of_2(most), dtype=torch.int32, device=device)
        documents = Documents(ends, empty.documents.index, empty.documents.longest)  # of a whole row
        self.batch = replace(empty, documents=documents)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # of what the same took before, since a graph has memory of its own
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                loss = objective(self.batch)
                (loss * self.factor).backward()
        except Exception as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # which a recording that can't end would hide
                raise error.__context__ from None
            raise
        self.loss = loss.detach()

    def __call__(self, batch: Batch, factor: float) -> Tensor:
        """The loss, which the next call overwrites."""
        ours, ends = self.batch, batch.documents.ends
        of_tokens = ([each.tokens, each.targets, each.position, each.documents.index] for each in (ours, batch))
        for to, x in zip(*of_tokens):
            to.copy_(x)
        ours.documents.ends[: len(ends)].copy_(ends)
        ours.documents.ends[len(ends) :].fill_(len(batch.tokens))  # of none
        self.factor.fill_(factor)
        self.graph.replay()
        return self.loss


def rows_at_once(config: ModelConfig, device: torch.device, size: int, sharded: bool) -> int:
    """How many rows of `size` tokens go through a model together, if memory holds what they leave: one on a CPU, and where
    attention makes all scores of all rows."""
    if device.type == "cpu" or max(map(config.head_dim_of, range(config.n_layers))) > FUSED_HEAD:
        return 1
    return max(1, (4096 if sharded else 8192) // size)


class Trainer:
    """A model in training: its objective, the optimiser, the data, and the step that comes next."""

    def __init__(
        self,
        objective: Objective,
        data: Data,
        ranks: Workers,
        settings: dict,
        steps: int,
        at_once: int = 1,
        adapts: bool = False,
    ):
        """`settings` are what a resumed run must agree on: of them learning_rate, weight_decay and rows (of a step) are
        read here. At most `at_once` rows of a rank go through the model together. With `adapts` it adapts to the memory: a
        rank that has all weights takes less where a step runs out of it, and begins the step again. Ranks that share them
        can't, since the others would wait: they begin with activations that are computed again, and keep them after the
        first step if all of them have the memory."""
        self.objective, self.data, self.ranks, self.settings, self.steps = objective, data, ranks, settings, steps
        mine = -(-settings["rows"] // ranks.count)
        self.at_once, self.step = -(-mine // -(-mine // at_once)), 0  # of batches as alike as can be
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        frozen = not any(p is objective.model.norm.weight for p in self.parameters.values())
        self.flop_a_token = (4 if frozen else 6) * multiplied(objective.model)
        self.sharded = any(isinstance(p, DTensor) for p in self.parameters.values())
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        others = [p for p in self.parameters.values() if p.dim() < 2]
        groups = [dict(params=matrices, weight_decay=settings["weight_decay"]), dict(params=others, weight_decay=0.0)]
        on_gpu = ranks.device.type == "cuda"
        self.warm, self.recording = False, None  # whether a batch that may be recorded has run
        self.retries = adapts and not self.sharded
        objective.block_bytes = 0 if adapts and self.sharded else None
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=on_gpu)
        for p in self.parameters.values():  # made now, so that memory runs out before the first step or never
            if self.records:  # what runs before it is recorded has to run as it does then
                p.grad = torch.zeros_like(p)
            step = torch.zeros((), device=ranks.device if on_gpu else "cpu")
            self.optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def places(self, step: int) -> range:
        """Those of the rows of step `step`, in all epochs' rows."""
        rows = self.settings["rows"]
        return range(step * rows, min((step + 1) * rows, self.settings["all_rows"]))

    @property
    def records(self) -> bool:
        """Whether batches are recorded. They add to the same gradients each time then, which are never None."""
        return not self.sharded and self.objective.records

    def add_gradients(self, batch: Batch, factor: float) -> Tensor:
        """The loss of a batch, whose gradients, times `factor`, are added to the parameters'."""
        if self.records and len(batch.tokens) == self.at_once * self.data.size:
            if self.recording is None and self.warm:
                self.recording = Recording(self.objective, self.data, self.at_once, self.ranks.device)
            if self.recording is not None:
                return self.recording(batch, factor)
            self.warm = True
        loss = self.objective(batch)
        (loss * factor).backward()
        return loss.detach()

    def gradients_of(self, places: range, factor: float) -> tuple[Tensor, int, float] | None:
        """Loss, tokens and FLOP of this rank's part of the rows `places`, whose gradients, times `factor`, are added to the
        parameters'. None if memory has run out, where less can be taken at once."""
        loss, tokens, flop, ranks = torch.zeros((), device=self.ranks.device), 0, 0.0, self.ranks
        try:
            for batch in self.data.batches(places, ranks.rank, ranks.count, self.at_once, ranks.device):
                loss += self.add_gradients(batch, factor)
                tokens, flop = tokens + batch.n_tokens, flop + self.flop(batch)
        except torch.OutOfMemoryError:
            if not self.retries or (self.at_once == 1 and self.objective.recompute):
                raise
            return None
        return loss, tokens, flop

    def take_less(self):
        """Takes half as many rows at once or, of a single one, keeps each block's input alone; and drops gradients."""
        if self.at_once > 1:
            self.at_once //= 2
        else:
            self.objective.recompute = True
        self.warm, self.recording = False, None
        self.optimizer.zero_grad(set_to_none=not self.records)
        gc.collect()
        torch.cuda.empty_cache()

    def take_more(self):
        """Keeps activations from now on, if on every rank those of all blocks fit in beside the most that a step took
        without them."""
        needed = self.objective.model.config.n_layers * self.objective.block_bytes
        if self.ranks.least(spare_memory(self.ranks.device) - needed) > 0:
            self.objective.recompute = False
        self.objective.block_bytes = None

    def train_step(self) -> dict:
        """One step; returns its figures. One whose gradients are not finite, or without targets, changes nothing."""
        start, places, ranks = now(self.ranks.device), self.places(self.step), self.ranks
        targets = self.data.targets_in(places)
        rate = learning_rate(self.step, self.steps, self.settings["learning_rate"])
        # Gradients are averaged over the ranks: by FSDP, or below
        while (made := self.gradients_of(places if targets else range(0), ranks.count / max(1, targets))) is None:
            self.take_less()
        loss, tokens, flop = made
        gradients = [p.grad for p in self.parameters.values() if targets and p.grad is not None]
        if ranks.count > 1 and not self.sharded:
            for gradient in gradients:
                ranks.sum(gradient).div_(ranks.count)
        squares = sum(map(squares_of, gradients), torch.zeros_like(loss, dtype=torch.float64))
        if not self.sharded and not ranks.first:
            squares = torch.zeros_like(squares)  # the first rank's are those of all
        counts = torch.tensor([tokens, flop], dtype=torch.float64, device=ranks.device)
        sums = ranks.sum(torch.cat((torch.stack((loss.double(), squares)), counts)))
        total, squares, tokens, flop = sums.tolist()
        length = math.sqrt(squares)
        figures = {
            "step": self.step + 1,
            "learning_rate": rate,
            "tokens": round(tokens),
            "targets": targets,
            "flop": flop,
        }
        figures |= {"loss": total / targets if targets else None, "gradient_norm": length}
        figures["skipped"] = not targets or not math.isfinite(length)
        if not figures["skipped"]:
            for gradient in gradients if length > CLIP else ():
                gradient.mul_(CLIP / length)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.records)  # what was recorded adds to these
        if self.objective.block_bytes is not None and targets:  # a step without targets has run nothing
            self.take_more()
        self.step += 1
        return figures | {"seconds": now(ranks.device) - start}

    @torch.no_grad()
    def evaluate(self, data: Data) -> float:
        """The mean loss, in nats a target, of all rows of `data`."""
        ranks, loss = self.ranks, torch.zeros((), device=self.ranks.device, dtype=torch.float64)
        for batch in data.batches(range(len(data.rows)), ranks.rank, ranks.count, self.at_once, ranks.device):
            loss += self.objective(batch)
        return ranks.sum(loss).item() / data.n_targets

    def flop(self, batch: Batch) -> float:
        """What training on a batch takes: 6 a weight and token, 4 where weights are frozen, and attention's."""
        config = self.objective.model.config
        pairs = {}  # of a query and a key that it sees, by window
        for layer in range(config.n_layers):
            window = config.window if config.is_local(layer) else None
            if window not in pairs:
                pairs[window] = sum(
                    n * n / 2 if window is None or n <= window else window * (n - window / 2) for n in batch.lengths
                )
        attention = sum(
            12 * config.n_heads * config.head_dim_of(i) * pairs[config.window if config.is_local(i) else None]
            for i in range(config.n_layers)
        )
        return batch.n_tokens * self.flop_a_token + attention

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has: trained parameters, and what the optimiser keeps of each."""
        state = {}
        for name, p in self.parameters.items():
            state |= {name: p.detach()} | {f"{name}.{key}": x for key, x in self.optimizer.state[p].items()}
        return state

    def save(self, directory: Path):
        """Writes a checkpoint of this step below `directory`: aside, and renamed when it is whole. The newest KEPT
        stay. Raises OSError, naming it, if it can't be written."""
        target = directory / f"step-{self.step:08}"
        aside = directory / f".{target.name}.tmp"
        if self.ranks.first:
            directory.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
        self.ranks.wait()
        try:
            with warnings.catch_warnings(action="ignore"):  # that this is one process
                dcp.save(self.state(), storage_writer=dcp.FileSystemWriter(aside))
            if self.ranks.first:
                content = {"step": self.step, "settings": self.settings}
                (aside / "run.json").write_text(json.dumps(content, indent=2) + "\n")
                aside.rename(target)
        except (OSError, CheckpointException) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"the checkpoint {target} can't be written: {cause_of(error)}") from None
        if self.ranks.first:
            for old in saved(directory)[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        self.ranks.wait()

    def resume(self, directory: Path):
        """Goes on from the newest checkpoint below `directory`, if there is one. Raises ValueError if that run's
        settings were others, naming them, or it can't be read."""
        if not (found := saved(directory)):
            return
        content = read_json(found[-1] / "run.json")
        for name, value in self.settings.items():
            if content["settings"].get(name) != value:
                was = content["settings"].get(name)
                raise ValueError(f"{found[-1]} is of a run with another {name}: {was}, not {value}")
        try:
            with warnings.catch_warnings(action="ignore"):
                dcp.load(self.state(), storage_reader=dcp.FileSystemReader(found[-1]))
        except (OSError, CheckpointException) as error:
            raise ValueError(
                f"{found[-1]} can't be read: {cause_of(error)}; delete it to go on from the one before"
            ) from None
        self.step = content["step"]


def squares_of(gradient: Tensor) -> Tensor:
    """The sum of this rank's squares: each row's in float32, of which rows are summed up in float64, since the order of
    millions in float32 would show."""
    x = local(gradient)
    return (x if x.dim() < 2 else torch.linalg.vector_norm(x, dim=-1)).double().square().sum()


def local(x: Tensor) -> Tensor:
    """This rank's share of a tensor that may be sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def saved(directory: Path) -> list[Path]:
    """The checkpoints below `directory`, the oldest first."""
    return sorted(directory.glob("step-*"))


def cause_of(error: BaseException) -> str:
    """What went wrong, in a line: of an error that several led to, the system's."""
    if isinstance(error, CheckpointException):  # of one rank or more
        error = next(iter(error.failures.values()))[0]
    chain = [error]
    while before := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(before)
    system = next((each.strerror for each in chain if isinstance(each, OSError) and each.strerror), None)
    return system or str(error) or type(error).__name__


def multiplied(model: Transformer) -> int:
    """Weights that a token is multiplied by: all matrices but those that are looked up only, and of experts the active
    ones."""
    count = model.embedding.shape[0] * model.embedding.shape[1]
    for name, module in model.named_modules():
        if isinstance(module, Weight) and name not in ("embedding", "per_layer_inputs.embedding"):
            count += module.shape[0] * module.shape[1] * (model.config.n_active_experts if module.experts else 1)
    return count


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def export(model: Transformer, checkpoint: Checkpoint, directory: Path, ranks: Workers):
    """Writes a whole model to `directory` as Hugging Face has it, with what `checkpoint` has beside the text model."""
    parameters = dict(model.named_parameters())

    def whole(name: str) -> Tensor:
        p = parameters[name].detach()
        return p.full_tensor() if isinstance(p, DTensor) else p

    if ranks.first:
        export_checkpoint(directory, checkpoint.directory, whole)
    else:
        for name in sources(model.config):  # takes part in gathering
            whole(name)


class Log:
    """log.jsonl, a line a step: what is shown on the way, and drawn at the end. Only the first rank writes it."""

    def __init__(self, file: Path, step: int, first: bool):
        """Goes on behind `step`: lines of later steps are of a run that was ended before its next checkpoint."""
        self.file, self.first, self.lines = file, first, []
        if first and step and file.exists():
            self.lines = [line for line in map(json.loads, file.read_text().splitlines()) if line["step"] <= step]
        if first:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_atomically(file, lambda out: out.write(text.encode()))

    def add(self, **line):
        self.lines.append(line)
        if self.first:
            with open(self.file, "a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")


def picture(lines: list[dict]) -> str:
    """SVG of a log: the loss of each step, and that of held-out data as dots, over the steps."""
    curve = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    dots = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    steps, values = [x for x, _ in curve + dots], [y for _, y in curve + dots]
    low, high, last = min(values), max(values), max(*steps, 1)
    high = high if high > low else low + 1
    left, top, width, height = 60, 40, 640, 260

    def at(step: float, value: float) -> tuple[str, str]:
        return f"{left + width * step / last:.1f}", f"{top + height * (high - value) / (high - low):.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 730 350" font-family="sans-serif" font-size="13">',
        '<rect width="730" height="350" fill="#fff"/>',
        f'<text x="{left}" y="24">loss, nats a token, over steps; dots: held-out data</text>',
    ]
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = at(0, value)
        parts.append(f'<path d="M{left} {y}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end" dominant-baseline="middle">{value:.2f}</text>')
        x, _ = at(last * i / 4, low)
        parts.append(f'<text x="{x}" y="{top + height + 22}" text-anchor="middle">{round(last * i / 4)}</text>')
    points = " ".join(",".join(at(*point)) for point in curve)
    parts.append(f'<polyline points="{points}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>')
    for x, y in (at(*dot) for dot in dots):
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#c2501b"/>')
    return "\n".join((*parts, "</svg>", ""))


def print_figures(trainer: Trainer, args: argparse.Namespace, lines: list[dict], load_seconds: float, steps: int):
    """Prints the figures of the last `steps` steps to stderr."""
    ranks, data, device = trainer.ranks, trainer.data, trainer.ranks.device
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        by = {"te": "TransformerEngine", "torch": "PyTorch"}[trainer.objective.training_ops.name]
        name = f"{ranks.count} x {torch.cuda.get_device_name(device)} by {by}"
    precision = str(trainer.objective.dtype).removeprefix("torch.") + (f", {args.fp8} FP8" if args.fp8 else "")
    full, learned = data.n_tokens / data.size / len(data.rows), data.n_targets / data.n_tokens
    rows = f"{len(data.documents):,} documents in {len(data.rows):,} rows of {data.size} tokens, {full:.0%} full"
    told = [
        f"{name}, {precision}, seed {args.seed}",
        f"load {load_seconds:.2f} s; {rows}; {learned:.0%} of tokens are targets",
    ]
    if run := [line for line in lines if "tokens" in line][-steps:] if steps else []:
        tokens, targets, seconds = (sum(line[key] for line in run) for key in ("tokens", "targets", "seconds"))
        after = run[1:] or run  # the first step compiles and plans
        held = [line["eval_loss"] for line in lines if "eval_loss" in line]
        skipped = sum(line["skipped"] for line in run)
        first = f"the first step in {run[0]['seconds']:.1f} s"
        told += [
            f"{steps} steps, {tokens:,} tokens, {targets:,} targets in {seconds:.1f} s, {first}; then "
            + speed_in_words(after, ranks),
            f"{trainer.at_once} row{'s' * (trainer.at_once > 1)} at once, activations "
            + ("computed again" if trainer.objective.recompute else "kept"),
            f"loss {run[0]['loss']:.4f} in the first step, {run[-1]['loss']:.4f} in the last"
            + (f"; held-out {held[0]:.4f} at first, {held[-1]:.4f} at the end" if held else "")
            + (f"; {skipped} steps skipped, whose gradients were not finite" if skipped else ""),
        ]
    print("\n".join(told), f"peak memory {peak_memory(device) / GIB:.2f} GiB", sep="\n", file=sys.stderr)


def speed_in_words(lines: list[dict], ranks: Workers) -> str:
    """tokens/s of all ranks together, and on a known GPU the share of its peak that the model's products take (MFU)."""
    seconds = sum(line["seconds"] for line in lines)
    text, rate = (
        f"{sum(line['tokens'] for line in lines) / seconds:,.0f} tokens/s",
        sum(x["flop"] for x in lines) / seconds,
    )
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
    peak = next((peak for gpu, peak in PEAKS.items() if gpu in name), None)
    return text if peak is None else f"{text}, MFU {rate / ranks.count / peak:.1%}"


# ---------------------------------------------------------------------------------------------------------------------
# The program


def program_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="finetune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add_model_options(parser, "checkpoint_path")
    add("--data", type=path, required=True, metavar="FILE", help="JSON lines to learn from; '-' is stdin")
    add("--eval_data", type=path, metavar="FILE", help="JSON lines to measure the loss of (default: none)")
    add(
        "--output_dir",
        type=path,
        required=True,
        metavar="OUT",
        help="a new directory, or with --resume a run's; of all hosts",
    )
    add(
        "--lora_rank",
        type=number(int, 0),
        default=16,
        metavar="N",
        help="of adapters, which are what is trained; 0: all weights are (default: 16)",
    )
    recipe = "FP8 products, by TransformerEngine; with %(metavar)s of: " + ", ".join(RECIPES) + " (default: current)"
    add("--fp8", nargs="?", const=RECIPES[0], choices=RECIPES, metavar="RECIPE", help=recipe)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count, metavar="N", help="times that all data are seen (default: 1)")
    length.add_argument("--max_steps", type=count, metavar="N", help="steps, however many epochs these are")
    add("--learning_rate", type=number(float, 0), metavar="F", help="at most (default: 1e-5, of adapters 2e-4)")
    add("--weight_decay", type=number(float, 0, 1), default=0.0, metavar="F", help="of matrices (default: 0)")
    add("--batch_tokens", type=count, default=32768, metavar="N", help="of a step, on all GPUs (default: %(default)s)")
    add("--max_length", type=number(int, 8), default=2048, metavar="N", help="tokens of a row (default: %(default)s)")
    at_once = "rows in one forward of a GPU (default: 8,192 tokens, of sharded weights 4,096, or what memory holds)"
    add("--rows_at_once", type=count, metavar="N", help=at_once)
    add("--learn_everything", action="store_true", help="prompts and the user's turns are learned, too")
    keep = (
        "keep them all for the backward: faster, and takes more memory (default: on GPUs whose memory holds them; of "
        "sharded weights, from the second step on)"
    )
    add("--keep_activations", action=argparse.BooleanOptionalAction, help=keep)
    every = "write a checkpoint, and measure --eval_data, every N steps (default: %(default)s)"
    add("--save_every", type=count, default=100, metavar="N", help=every)
    add("--resume", action="store_true", help="go on from OUT's newest checkpoint; the other options stay the same")
    add_model_options(parser, "device")
    add("--precision", choices=tuple(PRECISIONS), help="of activations (default: bf16 on a GPU, fp32 on a CPU)")
    add(
        "--seed", type=number(int, 0), default=0, metavar="N", help="of the order of rows, and of adapters (default: 0)"
    )
    return parser


def prepare_output(args: argparse.Namespace):
    """Raises an OSError or ValueError if OUT can't be written, or holds something and is not to be resumed."""
    out = args.output_dir
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no directory")
    if out.exists() and any(out.iterdir()) and not args.resume:
        raise ValueError(f"{out} is not empty: add --resume to go on with the run in it, or name a new directory")
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "log.jsonl")


def run(args: argparse.Namespace):
    with workers(args.device) as ranks:
        advice = "lower --rows_at_once or --max_length, use --no-keep_activations, train adapters (--lora_rank)"
        with told_if_out_of_memory(ranks.device, f"rows of {args.max_length} tokens", f"{advice}, or use more GPUs"):
            train(args, ranks)


def train(args: argparse.Namespace, ranks: Workers):
    start, out, size = time.perf_counter(), args.output_dir, args.max_length
    dtype = PRECISIONS[args.precision or ("bf16" if ranks.device.type == "cuda" else "fp32")]
    checkpoint = open_checkpoint(args.checkpoint_path)
    config = checkpoint.config
    check_window(size, config.context_length)
    training = choose(ranks.device, dtype, config.norm_eps, config.norm_offset, args.fp8)  # before anything takes long
    if args.fp8 and size % 128:
        raise ValueError(f"--fp8 needs rows of a multiple of 128 tokens: --max_length {-(-size // 128) * 128}, say")
    if ranks.first:
        prepare_output(args)
        if not args.lora_rank:
            open_source(checkpoint.directory)  # what the export at the end needs
    tokenizer = open_tokenizer(checkpoint.directory, config)
    data, held_out = read_data(args, tokenizer)
    model = load(args, checkpoint, ranks, dtype)
    sharded, keeps, at_once = ranks.count > 1 and not args.lora_rank, args.keep_activations, args.rows_at_once
    adapts = keeps is None and (sharded or at_once is None)  # sharded, it leaves the rows alone
    keeps = ranks.device.type == "cuda" and not sharded if keeps is None else keeps
    at_once = at_once or rows_at_once(config, ranks.device, size, sharded)
    objective = Objective(model, training, dtype, not keeps)
    if not args.lora_rank:
        shard(objective, ranks, dtype)
    rows = min(max(1, args.batch_tokens // size), len(data.rows))
    all_rows = args.max_steps * rows if args.max_steps else (args.epochs or 1) * len(data.rows)
    rate = args.learning_rate if args.learning_rate is not None else 2e-4 if args.lora_rank else 1e-5
    settings = {
        "model": fingerprint(config),
        "data": data.fingerprint,
        "lora_rank": args.lora_rank,
        "fp8": args.fp8,
        "precision": str(dtype).removeprefix("torch."),
        "rows": rows,
        "all_rows": all_rows,
        "learning_rate": rate,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
    }
    trainer = Trainer(objective, data, ranks, settings, -(-all_rows // rows), at_once, adapts)
    if args.resume:
        trainer.resume(out / "checkpoints")
    load_seconds, first = time.perf_counter() - start, trainer.step
    log = Log(out / "log.jsonl", first, ranks.first)
    loop(trainer, held_out, log, out / "checkpoints", args.save_every)
    if args.lora_rank and ranks.first:
        save_adapter(out, adapter_factors(model), args.lora_rank, 2.0 * args.lora_rank, str(checkpoint.directory))
    elif not args.lora_rank:
        export(model, checkpoint, out, ranks)
    if ranks.first:
        if any(line.get("loss") is not None for line in log.lines):
            write_atomically(out / "curves.svg", lambda file: file.write(picture(log.lines).encode()))
        print_figures(trainer, args, log.lines, load_seconds, trainer.step - first)
        option = (
            f"--checkpoint_path {args.checkpoint_path} --adapter {out}"
            if args.lora_rank
            else f"--checkpoint_path {out}"
        )
        print(f"{out}: python generate.py {option}")


def read_data(args: argparse.Namespace, tokenizer) -> tuple[Data, Data | None]:
    """--data and --eval_data in rows."""
    packed = []
    for file in (args.data, args.eval_data):
        if file is None:
            packed.append(None)
            continue
        documents, cut = read_documents(file, tokenizer, args.max_length, args.learn_everything)
        if cut:
            what = f"{cut} document{'s' if cut > 1 else ''} of {file}"
            warnings.warn(f"{what} cut to the first {args.max_length} tokens (--max_length)", stacklevel=2)
        packed.append(Data(documents, args.max_length, args.seed))
    return packed[0], packed[1]


def load(args: argparse.Namespace, checkpoint: Checkpoint, ranks: Workers, dtype: torch.dtype) -> Transformer:
    """The model to be trained: whole, or frozen and with adapters."""
    if not args.lora_rank:
        return whole_model(checkpoint, ranks, dtype)
    precision = next(name for name, each in PRECISIONS.items() if each == dtype)
    model, _ = load_model(args.checkpoint_path, ranks.device, precision, ops="torch")
    if args.fp8 and checkpoint.weight_format in QUANTIZED_FORMATS:
        raise ValueError(
            f"--fp8 is for products by BF16 weights: {args.checkpoint_path} has {checkpoint.weight_format}"
        )
    add_adapters(model, args.lora_rank, args.seed)
    return model


def loop(trainer: Trainer, held_out: Data | None, log: Log, checkpoints: Path, save_every: int):
    """Trains to the last step, with a checkpoint and a measurement of held_out every so many steps and at the end."""
    ranks, steps = trainer.ranks, trainer.steps
    if held_out is not None and trainer.step == 0:
        log.add(step=0, eval_loss=trainer.evaluate(held_out))
    with tqdm(total=steps, initial=trainer.step, unit="step", leave=False, disable=not ranks.first) as bar:
        while trainer.step < steps:
            figures = trainer.train_step()
            log.add(**figures)
            loss = "none" if figures["loss"] is None else f"{figures['loss']:.3f}"
            bar.set_postfix_str(f"loss {loss}, {speed_in_words([figures], ranks)}", refresh=False)
            bar.update()
            if trainer.step % save_every == 0 or trainer.step == steps:
                if held_out is not None:
                    log.add(step=trainer.step, eval_loss=trainer.evaluate(held_out))
                trainer.save(checkpoints)


def main(argv: list[str] | None = None) -> int:
    return run_program(run, program_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
