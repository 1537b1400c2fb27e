"""What ranks that share a model tell each other in the middle of a kernel, through one another's memory (NVLink).

A rank has a mailbox, which all ranks can write to. In it every rank has a box for each row of a matrix, twice: rows take
turns with the two, so that one can be filled while the other is still read. To add up a row over the ranks, each writes
its own part of it to its boxes at all ranks, waits until those at home are full, and adds up the parts in the order of
the ranks. So every rank has the same bits, and one trip over the link is all that it takes.

Of a few rows the product itself sends what it makes, each of its programs a piece, and the norm behind it has only to
receive. Partial sums of a product have boxes of their own, as so many more rows. Of other products the norm sends, a row
a program. Many rows over more than two ranks are added up by one rank each, which sends the others the sum: two trips,
but of less.

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
SENT_ROWS = 16  # of partial sums that a product sends itself, at most
SENT_PARTS = 8  # of all ranks together: a program that adds them up holds a row of each
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
    SHARED: tl.constexpr  # rows are added up by one rank each


class Parts(NamedTuple):
    """What a rank has of a product that is to be added up over the ranks: float32 y [P, M, N], or None if that many
    partial sums are `sent` already."""

    y: Tensor | None
    mail: Mail
    sent: int = 0


def sent_parts(mail: Mail | None, rows: int, parts: int) -> int:
    """How many partial sums of so many rows a product's kernel sends itself; 0 if the norm behind it is to send them."""
    return 0 if mail is None or rows * parts > SENT_ROWS or parts * mail.WORLD.value > SENT_PARTS else parts


def out_and_mail(out: Tensor | Parts) -> tuple[Tensor | None, Mail | None]:
    """What a product's kernel writes to, and how it sends, of what it returns."""
    return (None, out.mail) if isinstance(out, Parts) else (out, None)


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
def fills(mail, slot, step, PARTS: tl.constexpr):
    """How often the boxes of PARTS rows, the first of them `slot`, `step` apart, are filled by what is sent now."""
    counts = ()
    for part in tl.static_range(PARTS):
        counts = counts + (tl.load(mail.filled + slot + part * step) + 1,)
    return counts


@jit
def _word(bits, count):
    return (count.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)


@jit
def _box(mail, count, rank, slot):
    """Where in a mailbox the box of `rank` is that is filled for the `count`th time with row `slot`."""
    return (((count & 1) * mail.WORLD + rank) * mail.SLOTS + slot).to(tl.int64) * mail.WIDTH


@jit
def send(bits, mail, boxes, slot, count, columns, mask):
    """Sends this rank's numbers of rows, as int32 `bits`, to all ranks."""
    place, word = _box(mail, count, mail.rank, slot) + columns, _word(bits, count)
    for peer in tl.static_range(mail.WORLD):
        tl.store(boxes[peer] + place, word, mask=mask)


@jit
def send_row(y, mail, boxes, slot, count, columns, mask):
    """Sends this rank's part y of a row to all ranks or, where rows are SHARED, to the one that adds it up."""
    bits = y.to(tl.int32, bitcast=True)
    if mail.SHARED:
        owner = slot % mail.WORLD
        box = tl.multiple_of(tl.load(mail.addresses + owner).to(tl.pointer_type(tl.int64)), 16)
        place = _box(mail, count, mail.rank, slot) + columns
        tl.store(box + place, _word(bits, count), mask=mask & (columns * 0 + mail.rank != owner))
    else:
        send(bits, mail, boxes, slot, count, columns, mask)


@jit
def _tell(mail, late):
    """Notes that a rank, counted from 1, has not come; 0 is none."""
    tl.store(mail.missing, late, mask=late > 0)
    tl.store(mail.failed, 1, mask=late > 0)


@jit
def _read_missing(mail, slot, step, counts, columns, values, missing, PARTS: tl.constexpr):
    """Reads what was `missing` of the parts' values, and says what still is: also the last rank, counted from 1, that
    some of it is of."""
    read, still, late = (), (), tl.zeros(columns.shape, tl.int32)
    for peer in tl.static_range(mail.WORLD):
        for part in tl.static_range(PARTS):
            wanted = missing[peer * PARTS + part]
            box = mail.own + _box(mail, counts[part], peer, slot + part * step)
            word = tl.load(box + columns, mask=wanted, other=0, volatile=True)
            new = wanted & ((word >> 32).to(tl.int32) == counts[part])
            value = word.to(tl.int32).to(tl.float32, bitcast=True)
            read = read + (tl.where(new, value, values[peer * PARTS + part]),)
            still = still + (wanted & (new == 0),)
            late = tl.where(wanted & (new == 0), peer + 1, late)
    return read, still, tl.max(late, axis=0)


@jit
def received_sum(mail, boxes, slot, step, counts, own, columns, mask, PARTS: tl.constexpr = 1):
    """Adds up what all ranks have sent of a row, in their order: PARTS partial sums each, in slots that are `step` apart.
    `own` is what this one has sent; it is read where rows are SHARED."""
    values, missing = (), ()
    owner = columns * 0 + (slot % mail.WORLD).to(tl.int32)
    adds = owner == mail.rank
    for peer in tl.static_range(mail.WORLD):
        for _ in tl.static_range(PARTS):
            value, wanted = tl.zeros(mask.shape, tl.float32), mask
            if mail.SHARED:
                value = tl.where(adds & (owner == peer), own, value)
                wanted = mask & (adds != (owner == peer))
            values, missing = values + (value,), missing + (wanted,)
    values, missing, late = _read_missing(mail, slot, step, counts, columns, values, missing, PARTS)
    if mail.WAITS:
        end = tl.extra.cuda.globaltimer() + tl.where(tl.load(mail.failed) == 0, LIMIT, 0)
        while (late > 0) & (tl.extra.cuda.globaltimer() < end):
            values, missing, late = _read_missing(mail, slot, step, counts, columns, values, missing, PARTS)
        _tell(mail, late)
    total = tl.zeros(mask.shape, tl.float32)
    for peer in tl.static_range(mail.WORLD):
        part_of_rank = tl.zeros(mask.shape, tl.float32)
        for part in tl.static_range(PARTS):
            part_of_rank += values[peer * PARTS + part]
        total += part_of_rank
    if mail.SHARED:
        send(total.to(tl.int32, bitcast=True), mail, boxes, slot, counts[0], columns, mask & adds)
    tl.debug_barrier()  # all threads have the counts
    for part in tl.static_range(PARTS):
        tl.store(mail.filled + slot + part * step, counts[part])
    return total


@jit
def _read(mail, box, count, mask, rank):
    word = tl.load(box, mask=mask, other=0, volatile=True)
    late = tl.where(mask & ((word >> 32).to(tl.int32) != count), rank + 1, 0)
    return word.to(tl.int32), tl.max(tl.max(late, axis=1), axis=0)


@jit
def received(mail, slot, count, ranks, columns, mask):
    """Bits of what each of the ranks [R] has sent of columns [C] of a row, where the mask [R, C] says so: int32 [R, C]."""
    box = mail.own + _box(mail, count, ranks, slot)[:, None] + columns[None, :]
    bits, late = _read(mail, box, count, mask, ranks[:, None])
    if mail.WAITS:
        end = tl.extra.cuda.globaltimer() + tl.where(tl.load(mail.failed) == 0, LIMIT, 0)
        while (late > 0) & (tl.extra.cuda.globaltimer() < end):
            bits, late = _read(mail, box, count, mask, ranks[:, None])
        _tell(mail, late)
    tl.debug_barrier()  # all threads have the count
    tl.store(mail.filled + slot, count)
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
    count = fills(mail, slot, 0, 1)[0]
    send(tl.load(x_ptr + word, mask=word < words, other=0), mail, boxes, slot, count, columns, word < words)
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
    sizes = map(tl.constexpr, (len(boxes), slots, width, device.type == "cuda", False))
    return Mail(addresses, boxes[rank], filled, failed, missing, rank, *sizes)
