"""What ranks that share a model tell each other in the middle of a kernel, through one another's memory (NVLink).

A rank has a mailbox, which all ranks can write to. In it every rank has a box for each row of a matrix, TURNS times: a
row takes turns with them. To add up a row over the ranks, each writes its own part of it to its boxes at the others,
waits until those at home are full, and adds up the parts in the order of the ranks. So every rank has the same bits. How
often a row was filled is counted, which says whose turn it is. There are two kinds of boxes, whose readers see by
themselves what is new, so that one trip over the link is all that it takes:

- *Numbers*, for sums. What is EMPTY is not there yet, and what was read is emptied when the row is filled the next time.
  (A rank of four of gemma-4-31B: 4.92 ms a step; 5.16 in words.) A product of a few rows sends so what it makes, to its
  own rank, too, each of its programs a piece, and the norm behind it has only to receive. (gemma-7b in BF16 on two H200s,
  in words: 2.35 ms a step; 2.53 if the norm sends.) Partial sums have boxes of their own, as so many more rows. A norm
  sends so what other products have made, a row a program. Many rows over more than two ranks are added up by one rank
  each, which sends the others the sum.
- *Words*, for any bits. Beside 4 bytes there is the count, in a word of 8 bytes, which is written at once (NCCL's
  protocol LL).

A box is filled again TURNS sums later. By then the sender has its receiver's part of the sum before, which that sent in a
kernel behind those that have read the box and emptied it.

A rank that doesn't come is waited for no longer than LIMIT; then `missing` names it, and nobody waits any more. What is
computed from there on is worthless, and the host, which looks at `missing` now and then, ends the run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.common import jit, launch, launch_dependents, power_of_2, tl, wait_for_previous

LIMIT = tl.constexpr(60_000_000_000)  # nanoseconds: longer than a rank compiles what others have compiled
SENT_ROWS = 16  # of partial sums that a product sends itself, at most
SENT_PARTS = 8  # of all ranks together: a program that adds them up holds some rows of them
NUMBERS = tl.constexpr(32768)  # that it holds at a time
EMPTY = tl.constexpr(-1)  # the bits of a number that isn't there: no sum has them, whose NaN are others
NAN = tl.constexpr(0x7FC00000)
TURNS = tl.constexpr(4)  # a power of 2, since counts wrap
LINE = 32  # numbers in a line of the cache, at which boxes begin
GATHERED = 1024  # words that a program gathers


class Mail(NamedTuple):
    """A mailbox as kernels take it: WORLD ranks have boxes of WIDTH numbers or words for each of SLOTS rows. Of two sums that
    are waited for at once the second has the second half of the slots."""

    addresses: Tensor  # int64 [WORLD]: where the mailboxes of all ranks are
    own: Tensor  # int32 or, of words, int64 [TURNS, WORLD, SLOTS, WIDTH]: this rank's boxes
    filled: Tensor  # int32 [2, SLOTS]: how often a row's boxes were filled, and emptied
    failed: Tensor  # int32 [1]: 1 once a rank was missing
    missing: Tensor  # int32 [1], in the host's memory: that rank + 1
    rank: int
    WORLD: tl.constexpr
    SLOTS: tl.constexpr
    WIDTH: tl.constexpr
    WAITS: tl.constexpr  # not in Triton's interpreter, where ranks come one after the other
    SHARED: tl.constexpr  # rows are added up by one rank each


class Parts(NamedTuple):
    """What a rank has of a product that is to be added up over the ranks: float32 y [P, M, N], to be sent, or None if that
    many partial sums are `sent` already. If they are sent `late`, their kernel lets the next one, the norm, start only once
    all kernels before itself have finished."""

    y: Tensor | None
    mail: Mail
    sent: int = 0
    late: bool = False


def pieces(mail: Mail | None, rows: int) -> list[slice]:
    """Which of so many rows are sent by one launch: at most as many as there are boxes for. (They may be more than run side
    by side: all GPUs start programs in the order of their rows, and so have the same ones at work.)"""
    most = rows if mail is None else mail.SLOTS.value // 2
    return [slice(first, min(first + most, rows)) for first in range(0, rows, most)]


def sent_parts(mail: Mail | None, rows: int, parts: int, late: bool = False) -> Parts | None:
    """The Parts that a product returns whose kernel sends so many partial sums of so many rows itself, perhaps `late`; None
    if there is nobody to send them to, or the norm behind it is to do so."""
    if mail is None or rows * parts > SENT_ROWS or parts * mail.WORLD.value > SENT_PARTS:
        return None
    return Parts(None, mail, parts, late)


def out_and_mail(out: Tensor | Parts) -> tuple[Tensor | None, Mail | None]:
    """What a product's kernel writes to, and how it sends, of what it returns."""
    return (None, out.mail) if isinstance(out, Parts) else (out, None)


@jit
def mailboxes(mail):
    """Loads where the mailboxes of all ranks are; before a kernel waits."""
    boxes = ()
    if mail is not None:
        for peer in tl.static_range(mail.WORLD):
            boxes = boxes + (_mailbox(mail, peer),)
    return boxes


@jit
def _mailbox(mail, rank):
    box = tl.load(mail.addresses + rank).to(tl.pointer_type(mail.own.dtype.element_ty))
    return tl.multiple_of(box, 16)


@jit
def next_fill(mail, slot, mask=None):
    """How often a row's boxes are filled by what is sent now."""
    return tl.load(mail.filled + slot, mask=mask) + 1


@jit
def next_fills(mail, slot, step, PARTS: tl.constexpr):
    """`next_fill` of PARTS rows, the first of them `slot`, `step` apart."""
    counts = ()
    for part in tl.static_range(PARTS):
        counts = counts + (next_fill(mail, slot + part * step),)
    return counts


@jit
def _note_fills(mail, slot, step, counts, PARTS: tl.constexpr):
    """Notes what `next_fills` was, once the boxes are read."""
    tl.debug_barrier()  # all threads have the counts
    for part in tl.static_range(PARTS):
        tl.store(mail.filled + slot + part * step, counts[part])


@jit
def _patience(mail):
    """Nanoseconds that a rank is waited for: none, once one was missing."""
    return tl.where(tl.load(mail.failed) == 0, LIMIT, 0)


@jit
def _box(mail, count, rank, slot):
    """Where in a mailbox the box of `rank` is that is filled for the `count`th time with row `slot`."""
    return (((count & (TURNS - 1)) * mail.WORLD + rank) * mail.SLOTS + slot).to(tl.int64) * mail.WIDTH


@jit
def _tell(mail, late):
    """Notes that a rank, counted from 1, has not come; 0 is none."""
    tl.store(mail.missing, late, mask=late > 0)
    tl.store(mail.failed, 1, mask=late > 0)


@jit
def _bits(y):
    """Those by which numbers are sent."""
    bits = y.to(tl.int32, bitcast=True)
    return tl.where(bits == EMPTY, NAN, bits)


@jit
def _store(values, mail, boxes, slot, count, columns, mask, TO_OWN: tl.constexpr):
    """Stores what a box holds in this rank's boxes at the others and, TO_OWN, at home."""
    place = _box(mail, count, mail.rank, slot) + columns
    for peer in tl.static_range(mail.WORLD):
        wanted = mask
        if not TO_OWN:
            wanted = mask & (columns * 0 + mail.rank != peer)
        tl.store(boxes[peer] + place, values, mask=wanted)


@jit
def send(y, mail, boxes, slot, count, columns, mask):
    """Sends this rank's numbers of rows to all ranks."""
    _store(_bits(y), mail, boxes, slot, count, columns, mask, True)


@jit
def send_row(y, mail, boxes, slot, count, columns, mask):
    """Sends this rank's part y of a row to the others or, where rows are SHARED, to the one that adds it up."""
    if mail.SHARED:
        owner, place = slot % mail.WORLD, _box(mail, count, mail.rank, slot) + columns
        tl.store(_mailbox(mail, owner) + place, _bits(y), mask=mask & (columns * 0 + mail.rank != owner))
    else:
        _store(_bits(y), mail, boxes, slot, count, columns, mask, False)


@jit
def _empty(mail, slot, count, columns, mask):
    """Empties those boxes of a row that were filled the `count`th time: whose first number is there."""
    numbers = ()
    for rank in tl.static_range(mail.WORLD):
        numbers = numbers + (tl.load(mail.own + _box(mail, count, rank, slot), volatile=True),)
    tl.debug_barrier()  # all threads have them
    for rank in tl.static_range(mail.WORLD):
        filled = mask & (columns * 0 + numbers[rank] != EMPTY)
        tl.store(mail.own + _box(mail, count, rank, slot) + columns, EMPTY, mask=filled)
    tl.store(mail.filled + mail.SLOTS + slot, count + 1)


@jit
def empty_row(mail, slot, columns, mask):
    """Empties the boxes of a row that were filled the time before, in a program beside the one that reads them now."""
    _empty(mail, slot, tl.load(mail.filled + mail.SLOTS + slot), columns, mask)


@jit
def _wait_for_first(mail, slot, count, first, end, limit):
    """Waits until there is a number of a row, which one program sends, of each other one of ranks [first, end)."""
    for rank in tl.range(first, end, num_stages=1):
        if rank != mail.rank:
            box = mail.own + _box(mail, count, rank, slot)
            number = tl.load(box, volatile=True)
            while (number == EMPTY) & (tl.extra.cuda.globaltimer() < limit):
                number = tl.load(box, volatile=True)


@jit
def _read_sum(y, mail, slot, step, counts, first, end, columns, mask, PARTS: tl.constexpr):
    """Adds up what is there of ranks [first, end), in their order, and y as this rank's part if there is one; and the last
    of them, counted from 1, of whom something is missing.

    A program has registers for NUMBERS of them at a time."""
    TOGETHER: tl.constexpr = max(1, min(mail.WORLD, NUMBERS // (PARTS * mask.shape[0])))  # ranks
    total, late = tl.zeros(mask.shape, tl.float32), tl.zeros(mask.shape, tl.int32)
    for base in tl.range(first, end, TOGETHER, num_stages=1):
        for peer in tl.static_range(TOGETHER):
            rank = base + peer
            wanted = mask & (columns * 0 + rank < end)
            if y is not None:
                wanted = wanted & (columns * 0 + rank != mail.rank)
            of_rank = tl.zeros(mask.shape, tl.float32)
            for part in tl.static_range(PARTS):
                box = mail.own + _box(mail, counts[part], rank, slot + part * step)
                bits = tl.load(box + columns, mask=wanted, other=0, volatile=True)
                of_rank += bits.to(tl.float32, bitcast=True)
                late = tl.where(wanted & (bits == EMPTY), rank + 1, late)
            if y is not None:
                of_rank += tl.where(columns * 0 + rank == mail.rank, y, 0.0)
            total += of_rank
    return total, tl.max(late, axis=0)


@jit
def _awaited_sum(y, mail, slot, step, counts, first, end, columns, mask, PARTS: tl.constexpr, WHOLE: tl.constexpr):
    """`_read_sum` once it is there; of WHOLE rows it is read when they begin to be."""
    if mail.WAITS:
        limit = tl.extra.cuda.globaltimer() + _patience(mail)
        if WHOLE:
            _wait_for_first(mail, slot, counts[0], first, end, limit)
    total, late = _read_sum(y, mail, slot, step, counts, first, end, columns, mask, PARTS)
    if mail.WAITS:
        while (late > 0) & (tl.extra.cuda.globaltimer() < limit):
            total, late = _read_sum(y, mail, slot, step, counts, first, end, columns, mask, PARTS)
        _tell(mail, late)
    return total


@jit
def received_sum(mail, slot, step, columns, mask, PARTS: tl.constexpr):
    """Adds up what products of all ranks have sent of a row: PARTS partial sums each, in slots that are `step` apart."""
    counts = next_fills(mail, slot, step, PARTS)
    total = _awaited_sum(None, mail, slot, step, counts, 0, mail.WORLD, columns, mask, PARTS, False)
    _note_fills(mail, slot, step, counts, PARTS)
    return total


@jit
def received_row(y, mail, boxes, slot, count, columns, mask):
    """Adds up what all ranks have sent of a row, in their order; y is this one's part."""
    _empty(mail, slot, count - 1, columns, mask)
    if mail.SHARED:
        owner = (slot % mail.WORLD).to(tl.int32)
        if owner == mail.rank:
            total = _awaited_sum(y, mail, slot, 0, (count,), 0, mail.WORLD, columns, mask, 1, True)
            _store(_bits(total), mail, boxes, slot, count, columns, mask, False)
        else:
            total = _awaited_sum(None, mail, slot, 0, (count,), owner, owner + 1, columns, mask, 1, True)
    else:
        total = _awaited_sum(y, mail, slot, 0, (count,), 0, mail.WORLD, columns, mask, 1, True)
    _note_fills(mail, slot, 0, (count,), 1)
    return total


@jit
def send_words(bits, mail, boxes, slot, count, columns, mask):
    """Sends this rank's int32 bits of a row to all ranks."""
    words = (count.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    _store(words, mail, boxes, slot, count, columns, mask, True)


@jit
def _read_words(mail, box, count, mask, rank):
    word = tl.load(box, mask=mask, other=0, volatile=True)
    late = tl.where(mask & ((word >> 32).to(tl.int32) != count), rank + 1, 0)
    return word.to(tl.int32), tl.max(tl.max(late, axis=1), axis=0)


@jit
def received_words(mail, slot, count, ranks, columns, mask):
    """Bits of what each of the ranks [R] has sent of columns [C] of a row, where the mask [R, C] says so: int32 [R, C]."""
    box = mail.own + _box(mail, count, ranks, slot)[:, None] + columns[None, :]
    bits, late = _read_words(mail, box, count, mask, ranks[:, None])
    if mail.WAITS:
        end = tl.extra.cuda.globaltimer() + _patience(mail)
        while (late > 0) & (tl.extra.cuda.globaltimer() < end):
            bits, late = _read_words(mail, box, count, mask, ranks[:, None])
        _tell(mail, late)
    _note_fills(mail, slot, 0, (count,), 1)
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
    count = next_fill(mail, slot)
    send_words(tl.load(x_ptr + word, mask=word < words, other=0), mail, boxes, slot, count, columns, word < words)
    mask = (ranks < mail.WORLD)[:, None] & (word < words)[None, :]
    bits = received_words(mail, slot, count, ranks, columns, mask)
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


def box_shape(ranks: int, slots: int, width: int, words: bool) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a mailbox with room for so many numbers of 4 bytes a row, in words or not."""
    width = width if words else -(-width // LINE) * LINE
    return (TURNS.value, ranks, slots, width), torch.int64 if words else torch.int32


def mail_of(boxes: list[Tensor], rank: int, device: torch.device, missing: Tensor | None = None) -> Mail:
    """A rank's mail, of the mailboxes of all ranks, of a `box_shape` and all EMPTY, as this process sees them; `missing` is
    int32 [1], zero, that a GPU can write to (default: a new one)."""
    addresses = torch.tensor([box.data_ptr() for box in boxes], device=device)
    slots, width = boxes[rank].shape[2:]
    filled, failed = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((2, slots), 1))
    if missing is None:
        missing = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    sizes = map(tl.constexpr, (len(boxes), slots, width, device.type == "cuda", False))
    return Mail(addresses, boxes[rank], filled, failed, missing, rank, *sizes)
