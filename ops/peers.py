"""What ranks that share a model tell each other in the middle of a kernel, through one another's memory (NVLink).

A rank has a mailbox, which all ranks can write to. In it every rank has a box for each row of a matrix, twice: rows take
turns with the two, so that one can be filled while the other is still read. To add up a row over the ranks, a program
writes its own part of it to its boxes at all ranks, waits until those at home are full, and adds up the parts in the
order of the ranks. So every rank has the same bits, and one trip over the link is all that it takes.

A number lies in a box beside a count of how often the box was filled, in one word of 8 bytes, which is written at once
(NCCL's protocol LL). So a reader sees by itself what is new; no flag has to wait for what was written before it, and
nothing is ever reset. The same box is filled again two sums later. By then the sender has its receiver's part of the sum
between, which that sent in a kernel behind the one that read the box.

A rank that doesn't come is waited for no longer than LIMIT; then `missing` names it, and nobody waits any more. What is
computed from there on is worthless, and the host, which looks at `missing` now and then, ends the run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.common import jit, launch, launch_dependents, power_of_2, tl, wait_for_previous

LIMIT = tl.constexpr(60_000_000_000)  # nanoseconds: longer than a rank compiles what others have compiled
GATHERED = 1024  # words of 4 bytes that a program gathers


class Mail(NamedTuple):
    """A mailbox as kernels take it: WORLD ranks have boxes of WIDTH numbers for each of SLOTS rows."""

    addresses: Tensor  # int64 [WORLD]: where the mailboxes of all ranks are
    own: Tensor  # int64 [2, WORLD, SLOTS, WIDTH]: this rank's boxes
    filled: Tensor  # int32 [SLOTS]: how often a row's boxes were filled
    failed: Tensor  # int32 [1]: 1 once a rank was missing
    missing: Tensor  # int32 [1], in the host's memory: that rank + 1
    rank: int
    WORLD: tl.constexpr
    SLOTS: tl.constexpr
    WIDTH: tl.constexpr
    WAITS: tl.constexpr  # not in Triton's interpreter, where ranks come one after the other


class Parts(NamedTuple):
    """What a rank has of a product that is to be added up over the ranks, before it is sent: float32 y [P, M, N]."""

    y: Tensor
    mail: Mail


@jit
def mailboxes(mail):
    """Loads where the mailboxes of all ranks are; before a kernel waits."""
    boxes = ()
    if mail is not None:
        for peer in tl.static_range(mail.WORLD):
            box = tl.load(mail.addresses + peer).to(tl.pointer_type(tl.int64))
            boxes = boxes + (tl.multiple_of(box, 16),)
    return boxes


@jit
def send(bits, mail, boxes, slot, columns, mask):
    """Sends this rank's numbers of a row, as int32 `bits`, to all ranks. Returns how often the row's boxes are filled."""
    count = tl.load(mail.filled + slot) + 1
    tl.debug_barrier()  # all threads have it before one of them stores the next
    word = (count.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    box = (((count & 1) * mail.WORLD + mail.rank) * mail.SLOTS + slot).to(tl.int64) * mail.WIDTH
    for peer in tl.static_range(mail.WORLD):
        tl.store(boxes[peer] + box + columns, word, mask=mask)
    tl.store(mail.filled + slot, count)
    return count


@jit
def _boxes_of(mail, slot, count):
    """Where at home the first rank's box of a row is that is filled for the `count`th time."""
    return mail.own + ((count & 1) * (mail.WORLD * mail.SLOTS) + slot).to(tl.int64) * mail.WIDTH


@jit
def _tell(mail, late):
    """Notes that a rank, counted from 1, has not come; 0 is none."""
    tl.store(mail.missing, late, mask=late > 0)
    tl.store(mail.failed, 1, mask=late > 0)


@jit
def _read_sum(mail, box, count, mask):
    """Adds up what is there, in the order of the ranks; and the last one, counted from 1, of whom something is missing."""
    total, late = tl.zeros(mask.shape, tl.float32), tl.zeros(mask.shape, tl.int32)
    for peer in tl.static_range(mail.WORLD):
        word = tl.load(box + peer * (mail.SLOTS * mail.WIDTH), mask=mask, other=0, volatile=True)
        value = word.to(tl.int32).to(tl.float32, bitcast=True)
        total = value if peer == 0 else total + value
        late = tl.where(mask & ((word >> 32).to(tl.int32) != count), peer + 1, late)
    return total, tl.max(late, axis=0)


@jit
def received_sum(mail, slot, count, columns, mask):
    """Adds up what all ranks have sent of a row, in their order."""
    box = _boxes_of(mail, slot, count) + columns
    total, late = _read_sum(mail, box, count, mask)
    if mail.WAITS:
        end = tl.extra.cuda.globaltimer() + tl.where(tl.load(mail.failed) == 0, LIMIT, 0)
        while (late > 0) & (tl.extra.cuda.globaltimer() < end):
            total, late = _read_sum(mail, box, count, mask)
        _tell(mail, late)
    return total


@jit
def _read(mail, box, count, mask, rank):
    word = tl.load(box, mask=mask, other=0, volatile=True)
    late = tl.where(mask & ((word >> 32).to(tl.int32) != count), rank + 1, 0)
    return word.to(tl.int32), tl.max(tl.max(late, axis=1), axis=0)


@jit
def received(mail, slot, count, ranks, columns, mask):
    """Bits of what each of the ranks [R] has sent of columns [C] of a row, where the mask [R, C] says so: int32 [R, C]."""
    box = _boxes_of(mail, slot, count) + (ranks * (mail.SLOTS * mail.WIDTH))[:, None] + columns[None, :]
    bits, late = _read(mail, box, count, mask, ranks[:, None])
    if mail.WAITS:
        end = tl.extra.cuda.globaltimer() + tl.where(tl.load(mail.failed) == 0, LIMIT, 0)
        while (late > 0) & (tl.extra.cuda.globaltimer() < end):
            bits, late = _read(mail, box, count, mask, ranks[:, None])
        _tell(mail, late)
    return bits


@jit
def _gather_kernel(x_ptr, mail, out_ptr, first, words, RANKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Sends a block of words from `first` on of x [words] to all ranks, and writes those of all to out [WORLD, words]."""
    launch_dependents(PDL)
    slot = tl.program_id(0)
    columns, ranks = tl.arange(0, BLOCK), tl.arange(0, RANKS)
    word = first + slot * BLOCK + columns
    boxes = mailboxes(mail)
    wait_for_previous(PDL)
    count = send(tl.load(x_ptr + word, mask=word < words, other=0), mail, boxes, slot, columns, word < words)
    mask = (ranks < mail.WORLD)[:, None] & (word < words)[None, :]
    bits = received(mail, slot, count, ranks, columns, mask)
    tl.store(out_ptr + ranks.to(tl.int64)[:, None] * words + word[None, :], bits, mask=mask)


def gather(x: Tensor, mail: Mail, rows: int) -> Tensor:
    """[WORLD, ...]: the x [...] of all ranks, whose bytes are a multiple of 4, by kernels of at most `rows` programs."""
    world = mail.WORLD.value
    words = x.contiguous().view(-1).view(torch.int32)
    out = torch.empty(world, len(words), dtype=torch.int32, device=x.device)
    for first in range(0, len(words), rows * GATHERED):
        grid = (min(rows, -(-(len(words) - first) // GATHERED)),)
        options = dict(RANKS=power_of_2(world), BLOCK=GATHERED, num_warps=4)
        launch(_gather_kernel, grid, words, mail, out, first, len(words), **options)
    return out.view(x.dtype).view(world, *x.shape)


def mail_of(
    boxes: list[Tensor], rank: int, slots: int, width: int, device: torch.device, missing: Tensor | None = None
) -> Mail:
    """A rank's mail, of the mailboxes of all ranks, int64 [2, ranks, slots, width], zeros, as this process sees them;
    `missing` is int32 [1], zero, that a GPU can write to (default: a new one)."""
    addresses = torch.tensor([box.data_ptr() for box in boxes], device=device)
    filled, failed = (torch.zeros(count, dtype=torch.int32, device=device) for count in (slots, 1))
    if missing is None:
        missing = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    sizes = map(tl.constexpr, (len(boxes), slots, width, device.type == "cuda"))
    return Mail(addresses, boxes[rank], filled, failed, missing, rank, *sizes)
