"""What ranks that share a model tell each other in the middle of a kernel, through one another's memory (NVLink).

A rank has a mailbox, which all ranks can write to. In it every rank has a box for each row of a matrix, twice: rows take
turns with the two, so that one can be filled while the other is still read. To add up a row over the ranks, a program
writes its own part of it to its boxes at all ranks and raises a flag there; it waits until all flags at home are up, and
adds the parts in the order of the ranks. So every rank has the same bits. One trip over the link is all that it takes.

A flag is the number of times that its box was filled, which both sides count: nothing is ever reset. The same box is
filled again two sums later. By then the sender has seen its receiver's flag of the sum between, which that raised in a
kernel behind the one that read the box.

A rank that doesn't come is waited for no longer than LIMIT; then `missing` names it, and nobody waits any more. What is
computed from there on is worthless, and the host, which looks at `missing` with each step's log, ends the run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.common import jit, tl

LIMIT = tl.constexpr(60_000_000_000)  # nanoseconds: longer than it takes a rank to compile what others have compiled


class Mail(NamedTuple):
    """A mailbox as kernels take it: WORLD ranks have boxes of WIDTH float32 numbers for each of SLOTS rows."""

    addresses: Tensor  # int64 [WORLD]: where the mailboxes of all ranks are
    own: Tensor  # float32: this rank's boxes [2, WORLD, SLOTS, WIDTH], and behind them the flags, int32 [WORLD, SLOTS]
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


def mail_words(world: int, slots: int, width: int) -> int:
    """How many words of 4 bytes a mailbox has."""
    return world * slots * (2 * width + 1)


@jit
def mailboxes(mail):
    """Loads where the mailboxes of all ranks are; before a kernel waits."""
    boxes = ()
    if mail is not None:
        for peer in tl.static_range(mail.WORLD):
            boxes = boxes + (tl.load(mail.addresses + peer).to(tl.pointer_type(tl.float32)),)
    return boxes


@jit
def send(value, mail, boxes, slot, columns, mask):
    """Sends this rank's `value` of a row to all ranks. Returns how often the row's boxes are filled by now."""
    count = tl.load(mail.filled + slot) + 1
    box = (((count & 1) * mail.WORLD + mail.rank) * mail.SLOTS + slot).to(tl.int64) * mail.WIDTH
    for peer in tl.static_range(mail.WORLD):
        tl.store(boxes[peer] + box + columns, value, mask=mask)
    tl.debug_barrier()  # all threads have written before one of them raises the flags
    flag = 2 * mail.WORLD * mail.SLOTS * mail.WIDTH + mail.rank * mail.SLOTS + slot
    for peer in tl.static_range(mail.WORLD):
        tl.atomic_xchg(boxes[peer].to(tl.pointer_type(tl.int32)) + flag, count, sem="release", scope="sys")
    tl.store(mail.filled + slot, count)
    return count


@jit
def _wait_for(flag, count, limit, WAITS: tl.constexpr):
    """Waits until a flag is `count` or more, at most `limit` nanoseconds: returns 1 if it is, else 0."""
    raised = count * 0 + 1
    if WAITS:  # every thread for itself: what it reads from then on is not older than the flag
        raised = tl.inline_asm_elementwise(
            """{
            .reg .pred yes;
            .reg .s32 ahead;
            .reg .u64 begun, now;
            mov.u64 begun, %globaltimer;
            again:
            ld.acquire.sys.global.s32 ahead, [$1];
            sub.s32 ahead, ahead, $2;
            setp.ge.s32 yes, ahead, 0;
            @yes bra done;
            mov.u64 now, %globaltimer;
            sub.u64 now, now, begun;
            setp.lt.u64 yes, now, $3;
            @yes bra again;
            done:
            setp.ge.s32 yes, ahead, 0;
            selp.s32 $0, 1, 0, yes;
            }""",
            "=r,l,r,l",
            [flag.to(tl.uint64), count, limit],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return raised


@jit
def _wait_for_all(mail, slot, count):
    """Waits until all ranks have filled their boxes of a row for the `count`th time."""
    flag = mail.own.to(tl.pointer_type(tl.int32)) + 2 * mail.WORLD * mail.SLOTS * mail.WIDTH + slot
    limit = tl.where(tl.load(mail.failed) == 0, LIMIT, 0)
    for peer in tl.static_range(mail.WORLD):
        late = _wait_for(flag + peer * mail.SLOTS, count, limit, mail.WAITS) == 0
        tl.store(mail.missing, peer + 1, mask=late)
        tl.store(mail.failed, 1, mask=late)
    return mail.own + ((count & 1) * mail.WORLD * mail.SLOTS + slot).to(tl.int64) * mail.WIDTH


@jit
def received_sum(mail, slot, count, columns, mask):
    """Adds up what all ranks have sent of a row, in their order."""
    box = _wait_for_all(mail, slot, count) + columns
    total = tl.load(box, mask=mask, other=0.0, cache_modifier=".cg")
    for peer in tl.static_range(1, mail.WORLD):
        total += tl.load(box + peer * mail.SLOTS * mail.WIDTH, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@jit
def received(mail, slot, count, ranks, columns):
    """Loads columns [C] of what each of the ranks [R] has sent of a row: [R, C]."""
    box = _wait_for_all(mail, slot, count) + (ranks * mail.SLOTS * mail.WIDTH)[:, None] + columns[None, :]
    return tl.load(box, mask=(ranks < mail.WORLD)[:, None], other=0.0, cache_modifier=".cg")


def mail_of(
    boxes: list[Tensor], rank: int, slots: int, width: int, device: torch.device, missing: Tensor | None = None
) -> Mail:
    """A rank's mail, of the mailboxes of all ranks, int32 [mail_words], zeros, as this process sees them; `missing` is
    int32 [1], zero, that a GPU can write to (default: a new one)."""
    own = boxes[rank].view(torch.float32)
    addresses = torch.tensor([box.data_ptr() for box in boxes], device=device)
    filled, failed = (torch.zeros(count, dtype=torch.int32, device=device) for count in (slots, 1))
    if missing is None:
        missing = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    sizes = map(tl.constexpr, (len(boxes), slots, width, device.type == "cuda"))
    return Mail(addresses, own, filled, failed, missing, rank, *sizes)
