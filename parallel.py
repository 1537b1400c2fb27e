"""Tensor parallelism: what each of several ranks has of a model, and what they tell each other.

Rank r of W has the shard r. All ranks have the same residual stream, to the last bit, and run the same program on it:

| parameters                        | what a rank has                                                                |
| --------------------------------- | ------------------------------------------------------------------------------ |
| embedding, which is the head, too | rows, a multiple of 64 if there are enough; the last rank what is left         |
| wqkv                              | rows of its query heads, and of the key/value heads that these attend to       |
| wo                                | columns of its heads                                                           |
| w13                               | rows of the gate and the same ones of up                                       |
| w2                                | columns                                                                        |
| an expert's w13 and w2            | as these: every rank has a part of each expert                                 |
| the layers' own embeddings        | rows, as the embedding's                                                       |
| a drafter (assistant.py)          | of its layers as these, since they attend to the model's heads; else all of it |
| norms, routers and all else       | all of it                                                                      |

Where there are fewer key/value heads than ranks, some ranks have the same one. Scales of rows go with the rows, those of
groups with the columns; those of a tensor are everyone's, and so are int8's scales of rows whose columns are shared.

A product whose columns are shared leaves a part of the sum on each rank, in float32. All ranks get all parts, and the
norm that comes next adds them up in the order of the ranks, as it does with the partial sums of a kernel. So a rank
knows the same sums as another one, and sums differ from those of one rank by their order only.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from device import pick_device

VOCABULARY_STEPS = 64, 16, 1  # rows of which a rank has a multiple: the first that leaves every rank some
MAIL_ROWS = 4096  # that kernels send at a time, at most
MAIL_BYTES = 16 << 20  # that a rank sends the others at a time, at most
SHARED_ROWS = 16  # of a sum over more than two ranks, from which on each adds up some of them for all
GATHERED_BYTES = 64 << 20  # of a rank, that kernels send
# Memory that multicast maps outlives a process that dies. For the environment, before CUDA starts
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
START_SECONDS = 300  # in which all ranks have to have come
# How long a rank waits for another one, which may read weights: ranks.py looks after those that died or hang
TIMEOUT = timedelta(seconds=1800)

# ---------------------------------------------------------------------------------------------------------------------
# What a rank has


class Cut(NamedTuple):
    """What a rank has of a matrix: some ranges of rows, one behind another (None: all), and of the columns all or, with
    `columns`, the rank's share."""

    rows: tuple[tuple[int, int], ...] | None = None
    columns: bool = False


class Shard(NamedTuple):
    """One of `count` equal parts of a model, counted from 0."""

    rank: int
    count: int

    def share(self, size: int, what: str) -> tuple[int, int]:
        """[first, end) of `size` things. Raises ValueError, with what they are, unless all ranks have as many."""
        if size % self.count:
            raise ValueError(f"{size} {what} can't be shared evenly among {self.count} ranks")
        own = size // self.count
        return self.rank * own, (self.rank + 1) * own

    def kv_heads(self, heads: int) -> tuple[int, int]:
        """[first, end) of key/value heads: its share or, of fewer than there are ranks, one that others have, too.
        Raises ValueError if neither is possible."""
        if heads % self.count and self.count % heads:
            raise ValueError(
                f"{heads} key/value heads can't be shared among {self.count} ranks: neither divides the other"
            )
        first = self.rank * heads // self.count
        return first, first + max(1, heads // self.count)

    def vocabulary_width(self, size: int) -> int:
        """How many of `size` rows all ranks have but the last one, which has at most as many. Raises ValueError if there
        are too few."""
        for step in VOCABULARY_STEPS:
            width = -(-size // (self.count * step)) * step
            if width * (self.count - 1) < size:
                return width
        raise ValueError(f"a vocabulary of {size} can't be shared among {self.count} ranks")

    def vocabulary(self, size: int) -> tuple[int, int]:
        """[first, end) of the `size` rows of an embedding."""
        width = self.vocabulary_width(size)
        return self.rank * width, min((self.rank + 1) * width, size)

    def cut(self, name: str, config) -> Cut:
        """What it has of the parameter `name` (of any format, by our names) of a model of `config`, which is that of the
        whole."""
        module, layer = name.rsplit(".", 1)[0], int(name.split(".")[1]) if name.startswith("layers.") else 0
        if module == "embedding":  # of a drafter all, of which it takes rows apart
            return Cut() if config.backbone_size else Cut((self.vocabulary(config.vocab_size),))
        if module == "per_layer_inputs.embedding":
            return Cut((self.vocabulary(config.per_layer_vocab_size),))
        if module.endswith((".wo", ".w2")):
            return Cut(columns=True)
        if module.endswith(".w13"):
            size = config.expert_size if ".experts." in name else config.intermediate_size_of(layer)
            first, end = self.share(size, "columns of a feed-forward")
            return Cut(((first, end), (size + first, size + end)))
        if module.endswith(".wqkv"):
            kinds = [self.share(config.n_heads, "query heads"), *[self.kv_heads(config.kv_heads_of(layer))] * 2]
            counts = config.n_heads, config.kv_heads_of(layer), config.kv_heads_of(layer)
            rows, before, dim = [], 0, config.head_dim_of(layer)
            for (first, end), count in list(zip(kinds, counts))[: 1 + config.kv_products_of(layer)]:
                rows.append(((before + first) * dim, (before + end) * dim))
                before += count
            return Cut(tuple(rows))
        return Cut()

    def check_group(self, config, group: int):
        """Raises ValueError unless int4 groups of `group` neighbours divide the columns that ranks have of a row."""
        widths = [
            size for i in range(config.n_layers) for size in (config.intermediate_size_of(i), attended(config, i))
        ]
        for width in (*widths, config.expert_size):
            if width // self.count % group:
                own = f"{width // self.count} columns that each of {self.count} ranks has of {width}"
                raise ValueError(f"int4 groups of {group} don't divide the {own}")


def attended(config, layer: int) -> int:
    """How many numbers a layer's heads make of a token."""
    return config.n_heads * config.head_dim_of(layer)


# ---------------------------------------------------------------------------------------------------------------------
# What ranks tell each other


class Sums:
    """What joins the ranks of a model. Everything here is done by all of them, in the same order."""

    shard: Shard
    device: torch.device
    calls = 0  # of the others, by this process: who has made fewest is waited for

    def gathered(self, x: Tensor) -> Tensor:
        """[W, ...]: the x [...] of all ranks, whose shapes are the same, in their order."""
        raise NotImplementedError

    def parts(self, y: Tensor) -> Tensor:
        """Float32 [W, M, N], or as many as it takes, which add up to a product, of this rank's part of it: [M, N], or
        partial sums [P, M, N]."""
        return self.gathered(y.sum(0) if y.dim() == 3 else y)

    def mail(self, rows: int, width: int, words: bool = False):
        """The `ops.peers.Mail` by which kernels send so many rows of `width` numbers for a sum, or of 4 bytes each in words;
        None if they can't, or are slower."""

    def lost(self) -> int | None:
        """The rank whose part of a sum a kernel has waited for in vain, if there is one."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of the x of all ranks."""
        return self.gathered(x).sum(0)

    def joined(self, logits: Tensor, size: int) -> Tensor:
        """[M, size], of the logits [M, own] that a rank has of its rows of the vocabulary."""
        missing = self.shard.vocabulary_width(size) - logits.shape[1]
        whole = self.gathered(F.pad(logits, (0, missing)) if missing else logits)
        return whole.transpose(0, 1).flatten(1)[:, :size].contiguous()

    def of_first(self, x: Tensor) -> Tensor:
        """The x of rank 0."""
        return self.gathered(x)[0]

    def least(self, value: int) -> int:
        """The least value that a rank has. It is the hosts that tell each other, whatever their devices do meanwhile."""
        return int(self.gathered(torch.tensor([value])).min())

    def agreed(self, value: int) -> int:
        """The value that rank 0 has, as `least`."""
        return int(self.gathered(torch.tensor([value]))[0])


class ProcessSums(Sums):
    """Ranks that are processes, by torch.distributed: NCCL between GPUs, gloo between hosts."""

    def __init__(self, shard: Shard, device: torch.device):
        self.shard, self.device = shard, device

    def gathered(self, x: Tensor) -> Tensor:
        self.calls += 1
        own = x.contiguous().view(-1).view(torch.uint8)  # bytes, of which all backends know what to do
        whole = torch.empty(self.shard.count * own.numel(), dtype=torch.uint8, device=x.device)
        # Older torch knows it by another name
        gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
        try:
            gather(whole, own)
        except RuntimeError as error:  # its own errors are such
            reason = str(error).partition("\n")[0]
            raise ConnectionError(f"the other ranks of the model can't be reached: {reason}") from None
        return whole.view(x.dtype).view(self.shard.count, *x.shape)


class PeerSums(ProcessSums):
    """Ranks that are GPUs of one host, which can write to one another's memory: kernels add up what they send, and NCCL
    what is more than MAIL_BYTES from more than two."""

    def __init__(self, shard: Shard, device: torch.device):
        super().__init__(shard, device)
        # By width, and whether they are for words: how many rows, the mail, and what has to stay alive
        self.mails: dict[tuple[int, bool], tuple] = {}
        self.missing = torch.zeros(1, dtype=torch.int32, pin_memory=True)

    def gathered(self, x: Tensor) -> Tensor:
        if not x.is_cuda or x.nbytes % 4 or x.nbytes > GATHERED_BYTES:
            return super().gathered(x)
        from ops.peers import GATHERED, gather

        most, mail, _ = self._mail(GATHERED, True)
        return gather(x, mail, most)

    def mail(self, rows: int, width: int, words: bool = False):
        most, mail, _ = self._mail(width, words)
        # Two ranks send more in pieces (two H200s, 2,048 rows of 3,072, with the norm: 85 us; NCCL 120)
        if rows > most and (words or self.shard.count > 2):
            return None
        shared = rows >= SHARED_ROWS and self.shard.count > 2 and not words
        return mail._replace(SHARED=type(mail.SHARED)(True)) if shared else mail

    def _mail(self, width: int, words: bool) -> tuple:
        # The first call for a width has all ranks wait for one another, so that it must not be recorded
        if (width, words) not in self.mails:
            self.mails[width, words] = self._new_mail(width, words)
        return self.mails[width, words]

    def _new_mail(self, width: int, words: bool) -> tuple:
        from torch.distributed import _symmetric_memory as memory

        from ops.peers import EMPTY, box_shape, mail_of  # which imports this file

        count = self.shard.count
        rows = max(1, min(MAIL_ROWS, MAIL_BYTES // ((8 if words else 4) * width * (count - 1))))
        shape, dtype = box_shape(count, rows if words else 2 * rows, width, words)  # two sums are waited for at once
        own = memory.empty(shape, dtype=dtype, device=self.device).fill_(EMPTY.value)
        handle = memory.rendezvous(own, torch.distributed.group.WORLD)
        boxes = [handle.get_buffer(rank, shape, dtype) for rank in range(count)]
        torch.cuda.synchronize(self.device)
        self.least(0)  # nobody sends before all are empty
        return rows, mail_of(boxes, self.shard.rank, self.device, self.missing), (own, handle)

    def parts(self, y: Tensor) -> Tensor:
        return self.total(y.sum(0) if y.dim() == 3 else y)[None]

    def total(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.distributed.all_reduce(x)
        return x

    def lost(self) -> int | None:
        return int(self.missing) - 1 if int(self.missing) else None


def least(sums: Sums | None, value: int) -> int:
    """The least that a rank has, or the value itself where there is one rank: for what decides how a run goes."""
    return value if sums is None else sums.least(value)


def greatest(sums: Sums | None, value: float) -> float:
    """The greatest that a rank has, in float32, or the value itself where there is one rank."""
    return value if sums is None else float(sums.gathered(torch.tensor([value])).max())


def agreed(sums: Sums | None, value: int) -> int:
    """That of rank 0, or the value itself where there is one rank."""
    return value if sums is None else sums.agreed(value)


def agreed_seconds(sums: Sums | None, seconds: float) -> float:
    """Those of rank 0, to a nanosecond: each measures others."""
    return seconds if sums is None else sums.agreed(round(1e9 * seconds)) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# Who they are


def of_environment(name: str, default: int | None = None) -> int:
    """A number that torchrun has set. Raises ValueError without one."""
    text = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        what = "isn't set" if text is None else f"is {text!r}"
        raise ValueError(f"{name} {what} in the environment: start several ranks by torchrun") from None


def replicas_of(tensor_parallel: int) -> int:
    """How many models the processes are that torchrun has started, if so many of them, one after another, are the ranks
    of one. Raises ValueError if that doesn't go."""
    started = of_environment("WORLD_SIZE", 1)
    on_host = of_environment("LOCAL_WORLD_SIZE", started)
    if started % tensor_parallel:
        how = f"start it by torchrun --nproc-per-node {tensor_parallel}" if started == 1 else "it must divide them"
        raise ValueError(f"--tp is {tensor_parallel}, and there are {started} processes: {how}")
    if on_host % tensor_parallel:
        raise ValueError(f"--tp is {tensor_parallel}, and there are {on_host} processes on a host: it must divide them")
    return started // tensor_parallel


def own_device(device: str | None) -> torch.device:
    """This rank's of the GPUs of its host, which becomes the current one, or a CPU. Raises ValueError without one."""
    os.environ |= NO_MULTICAST
    chosen = pick_device(device)
    if chosen.type == "cuda":
        local = of_environment("LOCAL_RANK")
        if local >= torch.cuda.device_count():
            raise ValueError(f"{local + 1} processes were started here, and there are {torch.cuda.device_count()} GPUs")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    return chosen


@cache
def store_of(purpose: str):
    """A client of torchrun's store of keys and values, or of one of rank 0's where something else has set the
    environment. One that waits for a key lets nobody else use it meanwhile: there is one for each purpose."""
    from torch.distributed import TCPStore

    host, port = os.environ.get("MASTER_ADDR"), of_environment("MASTER_PORT")
    if host is None:
        raise ValueError("MASTER_ADDR isn't set in the environment: start several ranks by torchrun")
    own = of_environment("RANK") == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = timedelta(seconds=START_SECONDS)
    options = dict(wait_for_workers=False, multi_tenant=True)
    return asked(TCPStore, host, port, of_environment("WORLD_SIZE"), own, patience, **options)


def asked(function: Callable, *args, **options):
    """What a store answers. Raises ConnectionError without one."""
    try:
        return function(*args, **options)
    except RuntimeError as error:  # its own errors are such
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"the ranks' store can't be reached, its host may be gone: {reason}") from None


_starts = count()


def init(tensor_parallel: int, device: str | None = None, start: str = "") -> Sums | None:
    """What joins this process to those that share a model with it, of those that torchrun has started; None for one
    process without it. `start` is a name that all ranks have agreed on, if they have.

    Each takes a GPU of its own on its host. Raises ValueError unless there are `tensor_parallel` processes, or a
    multiple, of which each model is a group of its own.
    """
    replicas_of(tensor_parallel)
    if tensor_parallel == 1:
        return None
    import torch.distributed

    chosen, rank = own_device(device), of_environment("RANK")
    replica, shard = rank // tensor_parallel, Shard(rank % tensor_parallel, tensor_parallel)
    name = f"model {replica} {start} {next(_starts)}"  # what an earlier start has left there is another one's
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=torch.distributed.PrefixStore(name, store_of("models")),
        rank=shard.rank,
        world_size=shard.count,
        timeout=TIMEOUT,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    kind = PeerSums if chosen.type == "cuda" and _are_peers(chosen, shard) else ProcessSums
    return kind(shard, chosen)


def _are_peers(device: torch.device, shard: Shard) -> bool:
    """Whether the GPUs of all ranks of a model are this host's, and can read and write one another's memory."""
    first = device.index - shard.rank
    others = [i for i in range(first, first + shard.count) if i != device.index]
    inside = first >= 0 and first + shard.count <= torch.cuda.device_count()
    return inside and all(torch.cuda.can_device_access_peer(device.index, other) for other in others)


def close(sums: Sums | None):
    """Ends what `init` began, but not NCCL, which may wait without end for graphs that have recorded it: the process
    has to end by `os._exit`."""
    if sums is not None and sums.device.type == "cpu":
        torch.distributed.destroy_process_group()
