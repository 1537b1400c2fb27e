"""The next token of each row: what a decode step keeps of it, and the greedy choice of it by kernels."""

import torch
from torch import Tensor

from ops.common import SMS, jit, launch, launch_dependents, power_of_2, tl, wait_for_previous

ARGMAX_BLOCK, ARGMAX_WARPS = 2048, 4


def append_token(state, logits: Tensor, token: Tensor):
    """Appends token [B], which was drawn from logits [B, V], to each row of a `runner.State` that is not done.

    A row that is done keeps its count. `finite` says whether the logits of a row that was not done are finite: their
    sum is not if one of them isn't, and is one pass over them.
    """
    state.token.copy_(token)
    state.finite.copy_(state.done | logits.sum(-1).isfinite())
    state.count += ~state.done
    state.done |= (token[:, None] == state.stop_ids).any(-1) | (state.count >= state.max_new_tokens)


def log_step(state):
    """Writes the log's next entry: done, count, token and finite of each row."""
    entry = torch.stack((state.done, state.count, state.token, state.finite), -1).int()
    state.log.index_copy_(0, state.step % len(state.log), entry[None])
    state.step += 1


def greedy_next_token(logits: Tensor, state):
    """Ends a greedy step, in place in a `runner.State` of B rows.

    Takes each row's largest of logits [B, V], of equal ones the first, appends it as a token, advances the position of
    rows that are not done, and writes the log.
    """
    state.position += ~state.done
    logits = logits.float()
    append_token(state, logits, logits.argmax(-1))
    log_step(state)


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
def _append_token_kernel(
    best_ptr,
    index_ptr,
    token_ptr,
    count_ptr,
    max_new_tokens_ptr,
    done_ptr,
    finite_ptr,
    stop_ids_ptr,
    log_ptr,
    step_ptr,
    position_ptr,
    M,
    entries,
    stride,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Takes the best of the chunks, appends it, and writes an entry of the log, all rows in one program."""
    launch_dependents(PDL)
    row, chunk = tl.arange(0, BLOCK_M), tl.arange(0, CHUNKS)
    mask = row < M
    wait_for_previous(PDL)
    offsets = row[:, None] * CHUNKS + chunk[None, :]
    best = tl.load(best_ptr + offsets, mask=mask[:, None], other=float("-inf"))
    index = tl.load(index_ptr + offsets, mask=mask[:, None], other=0)
    largest = tl.max(best, axis=1)
    token = tl.maximum(tl.min(tl.where(best == largest[:, None], index, V - 1), axis=1), 0).to(tl.int64)
    finite = tl.min(index, axis=1) >= 0
    was_done = tl.load(done_ptr + row, mask=mask, other=1) != 0
    count = tl.load(count_ptr + row, mask=mask, other=0)
    max_new_tokens = tl.load(max_new_tokens_ptr + row, mask=mask, other=0)
    position = tl.load(position_ptr + row, mask=mask, other=0)
    step = tl.load(step_ptr)
    tl.store(token_ptr + row, token, mask=mask)
    count = tl.where(was_done, count, count + 1)
    tl.store(count_ptr + row, count, mask=mask)
    tl.store(position_ptr + row, tl.where(was_done, position, position + 1), mask=mask)
    done = was_done | (count >= max_new_tokens)
    for i in tl.static_range(STOP_IDS):
        done = done | (token == tl.load(stop_ids_ptr + i))
    tl.store(done_ptr + row, done.to(tl.uint8), mask=mask)
    finite = was_done | finite
    tl.store(finite_ptr + row, finite.to(tl.uint8), mask=mask)
    entry = log_ptr + step % entries * stride + row * 4
    tl.store(entry, done.to(tl.int32), mask=mask)
    tl.store(entry + 1, count.to(tl.int32), mask=mask)
    tl.store(entry + 2, token.to(tl.int32), mask=mask)
    tl.store(entry + 3, finite.to(tl.int32), mask=mask)
    tl.store(step_ptr, step + 1)


def greedy_next_token_triton(logits: Tensor, state):
    """Does what `greedy_next_token` does, with two kernels, for logits in bf16 or float32."""
    m, v = logits.shape
    chunks = min(power_of_2(-(-4 * SMS // m)), power_of_2(-(-v // ARGMAX_BLOCK)))
    best = torch.empty(m, chunks, dtype=torch.float32, device=logits.device)
    index = torch.empty(m, chunks, dtype=torch.int32, device=logits.device)
    chunk = -(-v // chunks)
    block = min(ARGMAX_BLOCK, power_of_2(chunk))
    chunk = -(-chunk // block) * block
    launch(_argmax_kernel, (m, chunks), logits, best, index, V=v, CHUNK=chunk, BLOCK=block, num_warps=ARGMAX_WARPS)
    launch(
        _append_token_kernel,
        (1,),
        *(best, index, state.token, state.count, state.max_new_tokens, state.done.view(torch.uint8)),
        *(state.finite.view(torch.uint8), state.stop_ids, state.log, state.step, state.position),
        *(m, len(state.log), state.log.stride(0)),
        V=v,
        BLOCK_M=power_of_2(m),
        CHUNKS=chunks,
        STOP_IDS=len(state.stop_ids),
        num_warps=4 if m * chunks <= 4096 else 8,
    )
