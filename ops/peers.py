"""What ranks that share a model tell each other in the middle of a kernel, through one another's memory (NVLink).

A rank has a mailbox, which all ranks can write to. In it every rank has a box for each row of a matrix, twice: rows take
turns with the two, so that one can be filled while the other is still read. To add up a row over the ranks, each writes
its own part of it to its boxes at the others, waits until those at home are full, and adds up the parts in the order of
the ranks. So every rank has the same bits. A row's boxes are filled again two sums later. By then the sender has its
receiver's part of the sum between, which that sent in a kernel behind the one that read the box; so nothing is ever
reset. How often a row was filled is counted, and there are two ways to say that a box is:

- *Words.* A number lies beside the count in a word of 8 bytes, which is written at once (NCCL's protocol LL). A reader
  sees by itself what is new, and one trip over the link is all that it takes. A product of a few rows sends so what it
  makes, to its own rank, too, each of its programs a piece, and the norm behind it has only to receive. (gemma-7b in BF16
  on two H200s: 2.35 ms a step; 2.53 if the norm sends.) Partial sums have boxes of their own, as so many more rows.
- *Flags.* Numbers alone, and the count behind them as soon as all are there: half as many bytes, and one word to look
  at, for a second trip. A norm sends so what other products have made, a row a program. (FP8, 64 rows: 2.96 ms instead
  of 3.10.) Many rows over more than two ranks are added up by one rank each, which sends the others the sum.

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
LINE = 32  # numbers of 4 bytes, a line of the cache, at which boxes with flags begin
WORDS = tl.constexpr(16384)  # that it holds at a time
GATHERED = 1024  # words of 4 bytes that a program gathers


class Mail(NamedTuple):
    """A mailbox as kernels take it: WORLD ranks have boxes of WIDTH words for each of SLOTS rows. A box is filled always
    with words, or always with numbers and a flag, which is its last 4 bytes. Of two sums that are waited for at once the
    second has the second half of the slots."""

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
    """What a rank has of a product that is to be added up over the ranks: float32 y [P, M, N], to be sent with a flag for
    each row, or None if that many partial sums are `sent` already, in words; `late` says by a kernel that lets the next
    one, the norm, start only once all kernels before itself have finished."""

    y: Tensor | None
    mail: Mail
    sent: int = 0
    late: bool = False


def box_width(width: int, words: bool) -> int:
    """The WIDTH of boxes for so many numbers, in words or with a flag."""
    return width if words else -(-(width + 1) // LINE) * LINE // 2


def pieces(mail: Mail | None, rows: int) -> list[slice]:
    """Which of so many rows are sent by one launch, with flags: at most as many as there are boxes for."""
    most = rows if mail is None else mail.SLOTS.value // 2
    return [slice(first, min(first + most, rows)) for first in range(0, rows, most)]


def sent_parts(mail: Mail | None, rows: int, parts: int) -> Parts | None:
    """The Parts that a product returns whose kernel sends so many partial sums of so many rows itself; None if there is
    nobody to send them to, or the norm behind it is to do so."""
    if mail is None or rows * parts > SENT_ROWS or parts * mail.WORLD.value > SENT_PARTS:
        return None
    return Parts(None, mail, parts)


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
def _tell(mail, late):
    """Notes that a rank, counted from 1, has not come; 0 is none."""
    tl.store(mail.missing, late, mask=late > 0)
    tl.store(mail.failed, 1, mask=late > 0)


@jit
def _read_sum(mail, slot, step, counts, columns, mask, PARTS: tl.constexpr):
    """Adds up what is there, in the order of the ranks; and the last one, counted from 1, of whom something is missing.

    A program has registers for WORDS of them at a time."""
    TOGETHER: tl.constexpr = max(1, min(mail.WORLD, WORDS // (PARTS * mask.shape[0])))  # ranks
    total, late = tl.zeros(mask.shape, tl.float32), tl.zeros(mask.shape, tl.int32)
    for first in tl.range(0, mail.WORLD, TOGETHER, num_stages=1):
        for peer in tl.static_range(TOGETHER):
            rank = first + peer
            wanted = mask & (columns * 0 + rank < mail.WORLD)
            of_rank = tl.zeros(mask.shape, tl.float32)
            for part in tl.static_range(PARTS):
                box = mail.own + _box(mail, counts[part], rank, slot + part * step)
                word = tl.load(box + columns, mask=wanted, other=0, volatile=True)
                of_rank += word.to(tl.int32).to(tl.float32, bitcast=True)
                late = tl.where(wanted & ((word >> 32).to(tl.int32) != counts[part]), rank + 1, late)
            total += of_rank
    return total, tl.max(late, axis=0)


@jit
def received_sum(mail, slot, step, columns, mask, PARTS: tl.constexpr):
    """Adds up what all ranks have sent in words of a row: PARTS partial sums each, in slots that are `step` apart."""
    counts = next_fills(mail, slot, step, PARTS)
    total, late = _read_sum(mail, slot, step, counts, columns, mask, PARTS)
    if mail.WAITS:
        end = tl.extra.cuda.globaltimer() + _patience(mail)
        while (late > 0) & (tl.extra.cuda.globaltimer() < end):
            total, late = _read_sum(mail, slot, step, counts, columns, mask, PARTS)
        _tell(mail, late)
    _note_fills(mail, slot, step, counts, PARTS)
    return total


@jit
def _store_row(y, mail, box, count, slot, columns, mask):
    """Stores a row in a mailbox, as this rank's; no flag yet."""
    tl.store(box.to(tl.pointer_type(tl.float32)) + 2 * _box(mail, count, mail.rank, slot) + columns, y, mask=mask)


@jit
def _fenced(count, WAITS: tl.constexpr):
    """`count`, once what this program has stored is seen wherever a flag is that it raises from now on: flags are stored
    by the first thread, which has a fence for all."""
    tl.debug_barrier()
    if WAITS:
        count = tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first fence.acq_rel.sys;
            mov.b32 $0, $1;
            }""",
            "=r,r",
            [count],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return count


@jit
def _raise_flag(mail, box, count, raised, slot):
    """Says that a row is there, of which `raised` is the fenced count."""
    flag = box.to(tl.pointer_type(tl.int32)) + 2 * _box(mail, count, mail.rank, slot) + (2 * mail.WIDTH - 1)
    tl.atomic_xchg(flag, raised, sem="relaxed", scope="sys")


@jit
def _send_to_others(y, mail, boxes, count, slot, columns, mask):
    """Sends a row to all ranks but this one."""
    for peer in tl.static_range(mail.WORLD):
        _store_row(y, mail, boxes[peer], count, slot, columns, mask & (columns * 0 + mail.rank != peer))
    raised = _fenced(count, mail.WAITS)
    for peer in tl.static_range(mail.WORLD):
        if peer != mail.rank:
            _raise_flag(mail, boxes[peer], count, raised, slot)


@jit
def send_row(y, mail, boxes, count, slot, columns, mask):
    """Sends this rank's part y of a row to the others or, where rows are SHARED, to the one that adds it up."""
    if mail.SHARED:
        owner = slot % mail.WORLD
        if owner != mail.rank:
            box = tl.multiple_of(tl.load(mail.addresses + owner).to(tl.pointer_type(tl.int64)), 16)
            _store_row(y, mail, box, count, slot, columns, mask)
            _raise_flag(mail, box, count, _fenced(count, mail.WAITS), slot)
    else:
        _send_to_others(y, mail, boxes, count, slot, columns, mask)


@jit
def _is_raised(flag, count, limit, WAITS: tl.constexpr):
    """Waits until a flag is `count` or more, at most `limit` nanoseconds; and says whether it is."""
    raised = count * 0 + 1
    if WAITS:
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
def _row_of(mail, peer, count, slot, columns, mask):
    """What a rank has sent of a row, which is waited for."""
    box = mail.own.to(tl.pointer_type(tl.int32)) + 2 * _box(mail, count, peer, slot)
    late = _is_raised(box + (2 * mail.WIDTH - 1), count, _patience(mail), mail.WAITS) == 0
    _tell(mail, tl.where(late, peer + 1, 0))
    return tl.load(box + columns, mask=mask, other=0, cache_modifier=".cg").to(tl.float32, bitcast=True)


@jit
def _sum_of_all(y, mail, count, slot, columns, mask):
    """Adds up a row over the ranks, in their order; y is this one's part, the others' are waited for."""
    total = tl.zeros(mask.shape, tl.float32)
    for peer in tl.static_range(mail.WORLD):
        part = y
        if peer != mail.rank:
            part = _row_of(mail, peer, count, slot, columns, mask)
        total += part
    return total


@jit
def received_row(y, mail, boxes, count, slot, columns, mask):
    """Adds up what all ranks have sent of a row, in their order; y is this one's part."""
    if mail.SHARED:
        owner = (slot % mail.WORLD).to(tl.int32)
        if owner == mail.rank:
            total = _sum_of_all(y, mail, count, slot, columns, mask)
            _send_to_others(total, mail, boxes, count, slot, columns, mask)
        else:
            total = _row_of(mail, owner, count, slot, columns, mask)
    else:
        total = _sum_of_all(y, mail, count, slot, columns, mask)
    _note_fills(mail, slot, 0, (count,), 1)
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
        end = tl.extra.cuda.globaltimer() + _patience(mail)
        while (late > 0) & (tl.extra.cuda.globaltimer() < end):
            bits, late = _read(mail, box, count, mask, ranks[:, None])
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
