"""The next tokens of each row: what a decode step keeps of them, and the greedy choice of them by kernels.

A step computes T places a row. The first is behind the row's newest token, each other one behind a draft, a guess of
the token before it. What is drawn at a place is the row's own token as long as all drafts before it are what was drawn
there: these tokens are a step's run, of one token at least. So drafts change how many tokens a step makes, never which.
"""

import torch
from torch import Tensor

from ops.common import SMS, jit, launch, launch_dependents, power_of_2, tl, wait_for_previous
from ops.peers import mailboxes, next_fill, received_words, send_words
from parallel import Sums

ARGMAX_BLOCK, ARGMAX_WARPS = 2048, 4


def append_run(state, logits: Tensor, token: Tensor, drafts: Tensor | None = None) -> Tensor:
    """Appends to each row of a `runner.State` that is not done its run of tokens [B, T], which were drawn from logits
    [B * T, V] behind drafts [B, T - 1].

    A run ends with the first token that differs from its draft, is a stop id, or is the last that the row may have. The
    position advances with it. A row that is done keeps its count and position. `finite` says whether the logits of a
    run are finite: their sum is not if one of them isn't, and is one pass over them. Returns the lengths [B] of runs, 0
    for rows that were done.
    """
    length, place = (~state.done).long(), torch.arange(token.shape[1], device=token.device)
    if drafts is not None:
        before = token[:, :-1]
        goes_on = (before == drafts) & ~(before[:, :, None] == state.stop_ids).any(-1)
        goes_on &= state.count[:, None] + place[1:] < state.max_new_tokens[:, None]
        length *= 1 + goes_on.cumprod(1).sum(1)
    state.finite.copy_((logits.sum(-1).isfinite().view(token.shape) | (place >= length[:, None])).all(1))
    state.token.copy_(token.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0])
    if state.history is not None:  # what is written behind a run is not its row's: nobody reads it
        state.history.scatter_(1, state.position[:, None] + 1 + place, token)
    state.position += length
    state.count += length
    state.done |= (state.token[:, None] == state.stop_ids).any(-1) | (state.count >= state.max_new_tokens)
    return length


def log_step(state, token: Tensor):
    """Writes the log's next entry: done, count and finite of each row, and tokens [B, T], its run's first."""
    entry = torch.cat((torch.stack((state.done, state.count, state.finite), 1), token), 1).int()
    state.log[:, :, : entry.shape[1]].index_copy_(0, state.step % len(state.log), entry[None])
    state.step += 1


def greedy_next_token(
    logits: Tensor, state, drafts: Tensor | None = None, sums: Sums | None = None, vocab_size: int | None = None
):
    """Ends a greedy step, in place in a `runner.State` of B rows.

    Takes each place's largest of logits [B * T, V], of equal ones the first, appends each row's run of them as tokens
    behind drafts [B, T - 1], and writes the log. With `sums` logits are those of a rank's part of a vocabulary of
    `vocab_size`.
    """
    logits = (logits if sums is None else sums.joined(logits, vocab_size)).float()
    token = logits.argmax(-1).view(len(state.token), -1)
    append_run(state, logits, token, drafts)
    log_step(state, token)


@jit
def _argmax_kernel(
    logits_ptr,
    best_ptr,
    index_ptr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Finds the largest of a chunk of logits, and where it is first: at -1 if one of them is not finite."""
    launch_dependents(PDL)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offsets = chunk * CHUNK + tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.where(offsets < V, offsets, V - 1)
    finite = offsets >= 0
    wait_for_previous(PDL)
    for i in range(0, CHUNK, BLOCK):
        value = tl.load(logits_ptr + row * V + offsets + i, mask=offsets + i < V, other=float("-inf")).to(tl.float32)
        index = tl.where(value > best, offsets + i, index)
        best = tl.maximum(best, value)
        finite = finite & ((tl.abs(value) < float("inf")) | (offsets + i >= V))
    largest = tl.max(best, axis=0)
    index = tl.where(finite, tl.where(best == largest, index, V - 1), -1)
    tl.store(best_ptr + row * tl.num_programs(1) + chunk, largest)
    tl.store(index_ptr + row * tl.num_programs(1) + chunk, tl.min(index, axis=0))


@jit
def _best_of_ranks_kernel(
    best_ptr,
    index_ptr,
    mail,
    ranks_best_ptr,
    ranks_index_ptr,
    first,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    RANKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Takes the best of a row's chunks, sends it to all ranks, and writes those of all, padded to RANKS."""
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk, ranks, columns = tl.arange(0, CHUNKS), tl.arange(0, RANKS), tl.arange(0, 2)
    boxes = mailboxes(mail)
    wait_for_previous(PDL)
    count = next_fill(mail, row)
    best = tl.load(best_ptr + row * CHUNKS + chunk)
    index = tl.load(index_ptr + row * CHUNKS + chunk)
    largest = tl.max(best, axis=0)
    index = tl.where(tl.min(index, axis=0) < 0, -1, first + tl.min(tl.where(best == largest, index, V - 1), axis=0))
    bits = tl.where(columns == 0, largest.to(tl.int32, bitcast=True), index)
    send_words(bits, mail, boxes, row, count, columns, columns < 2)
    found = received_words(mail, row, count, ranks, columns, (ranks < mail.WORLD)[:, None] & (columns < 2)[None, :])
    is_best = (columns == 0)[None, :]
    found_best = tl.sum(tl.where(is_best, found, 0), axis=1).to(tl.float32, bitcast=True)
    found_index = tl.sum(tl.where(is_best, 0, found), axis=1)
    tl.store(ranks_best_ptr + row * RANKS + ranks, tl.where(ranks < mail.WORLD, found_best, float("-inf")))
    tl.store(ranks_index_ptr + row * RANKS + ranks, found_index)


@jit
def _append_run_kernel(
    best_ptr,
    index_ptr,
    drafts_ptr,
    token_ptr,
    count_ptr,
    max_new_tokens_ptr,
    done_ptr,
    finite_ptr,
    stop_ids_ptr,
    log_ptr,
    step_ptr,
    position_ptr,
    history_ptr,
    M,
    entries,
    stride,
    history_stride,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
    LOGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Takes the best of the chunks of each place, appends runs of them, and writes an entry of the log, LOGGED numbers
    a row, all rows in one program."""
    launch_dependents(PDL)
    row, chunk = tl.arange(0, BLOCK_M), tl.arange(0, CHUNKS)
    mask = row < M
    wait_for_previous(PDL)
    was_done = tl.load(done_ptr + row, mask=mask, other=1) != 0
    count = tl.load(count_ptr + row, mask=mask, other=0)
    max_new_tokens = tl.load(max_new_tokens_ptr + row, mask=mask, other=0)
    position = tl.load(position_ptr + row, mask=mask, other=0)
    step = tl.load(step_ptr)
    entry = log_ptr + (step.to(tl.int32) % entries).to(tl.int64) * stride + row * LOGGED
    appended, done, finite, length, last = ~was_done, was_done, row >= 0, tl.zeros_like(count), tl.zeros_like(count)
    for i in tl.static_range(TOKENS):
        offsets = (row * TOKENS + i)[:, None] * CHUNKS + chunk[None, :]
        best = tl.load(best_ptr + offsets, mask=mask[:, None], other=float("-inf"))
        index = tl.load(index_ptr + offsets, mask=mask[:, None], other=0)
        largest = tl.max(best, axis=1)
        token = tl.maximum(tl.min(tl.where(best == largest[:, None], index, V - 1), axis=1), 0).to(tl.int64)
        finite = finite & (~appended | (tl.min(index, axis=1) >= 0))
        last = tl.where(appended | (i == 0), token, last)
        length = tl.where(appended, i + 1, length)
        ends = count + (i + 1) >= max_new_tokens
        for j in tl.static_range(STOP_IDS):
            ends = ends | (token == tl.load(stop_ids_ptr + j))
        done = done | (appended & ends)
        tl.store(entry + 3 + i, token.to(tl.int32), mask=mask)
        if history_ptr is not None:
            tl.store(history_ptr + row * history_stride + position + (i + 1), token, mask=mask)
        if i < TOKENS - 1:
            draft = tl.load(drafts_ptr + row * (TOKENS - 1) + i, mask=mask, other=-1)
            appended = appended & ~ends & (token == draft)
    tl.store(token_ptr + row, last, mask=mask)
    tl.store(count_ptr + row, count + length, mask=mask)
    tl.store(position_ptr + row, position + length, mask=mask)
    tl.store(done_ptr + row, done.to(tl.uint8), mask=mask)
    tl.store(finite_ptr + row, finite.to(tl.uint8), mask=mask)
    tl.store(entry, done.to(tl.int32), mask=mask)
    tl.store(entry + 1, (count + length).to(tl.int32), mask=mask)
    tl.store(entry + 2, finite.to(tl.int32), mask=mask)
    tl.store(step_ptr, step + 1)


def greedy_next_token_triton(
    logits: Tensor, state, drafts: Tensor | None = None, sums: Sums | None = None, vocab_size: int | None = None
):
    """Does what `greedy_next_token` does, with two kernels, or three of ranks, for logits in bf16 or float32."""
    mail = None if sums is None else sums.mail(len(logits), 2, words=True)
    if sums is not None and mail is None:
        return greedy_next_token_triton(sums.joined(logits, vocab_size), state, drafts)
    (m, v), rows = logits.shape, len(state.token)
    chunks = min(power_of_2(-(-4 * SMS // m)), power_of_2(-(-v // ARGMAX_BLOCK)))
    best = torch.empty(m, chunks, dtype=torch.float32, device=logits.device)
    index = torch.empty(m, chunks, dtype=torch.int32, device=logits.device)
    chunk = -(-v // chunks)
    block = min(ARGMAX_BLOCK, power_of_2(chunk))
    chunk = -(-chunk // block) * block
    launch(_argmax_kernel, (m, chunks), logits, best, index, V=v, CHUNK=chunk, BLOCK=block, num_warps=ARGMAX_WARPS)
    if mail is not None:
        of_chunks, chunks = (best, index), power_of_2(sums.shard.count)
        best, index = (x.new_empty(m, chunks) for x in of_chunks)
        arrays, first = (*of_chunks, mail, best, index), sums.shard.vocabulary(vocab_size)[0]
        own = dict(V=v, CHUNKS=of_chunks[0].shape[1])
        launch(_best_of_ranks_kernel, (m,), *arrays, first, **own, RANKS=chunks, num_warps=1)
        v = vocab_size
    launch(
        _append_run_kernel,
        (1,),
        *(best, index, drafts, state.token, state.count, state.max_new_tokens, state.done.view(torch.uint8)),
        *(state.finite.view(torch.uint8), state.stop_ids, state.log, state.step, state.position, state.history),
        *(rows, len(state.log), state.log.stride(0), 0 if state.history is None else state.history.stride(0)),
        V=v,
        TOKENS=m // rows,
        LOGGED=state.log.shape[2],
        BLOCK_M=power_of_2(rows),
        CHUNKS=chunks,
        STOP_IDS=len(state.stop_ids),
        num_warps=4 if rows * chunks <= 4096 else 8,
    )
