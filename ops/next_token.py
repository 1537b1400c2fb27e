"""The next token of each row: what a decode step keeps of it, and the greedy choice of it by kernels."""

import torch
from torch import Tensor

from ops.common import SMS, jit, launch, launch_dependents, power_of_2, tl, wait_for_previous

ARGMAX_BLOCK, ARGMAX_WARPS = 2048, 4


def append_token(state, logits: Tensor, token: Tensor):
    """Appends token [B], which was drawn from logits [B, V], to each row of a `runner.State` that is not done.

    A row that is done keeps its count: its token lands behind its last one, where nobody reads it. The log gets how far
    the rows are, and whether the logits of those that were not done are finite: their sum is not if one of them isn't,
    and is one pass over them.
    """
    finite = (state.done | logits.sum(-1).isfinite()).all()
    state.token.copy_(token)
    state.output.scatter_(1, state.count[:, None], token[:, None])
    state.count += ~state.done
    state.done |= (token[:, None] == state.stop_ids).any(-1) | (state.count >= state.max_new_tokens)
    status = torch.stack((state.done.all(), state.count[0], token[0], finite))
    state.log.index_copy_(0, state.step, status[None])
    state.step += 1


def greedy_next_token(logits: Tensor, state):
    """Ends a greedy step, in place in a `runner.State` of B rows.

    Takes each row's largest of logits [B, V], of equal ones the first, appends it as a token, and advances the position
    of rows that are not done.
    """
    state.position += ~state.done
    logits = logits.float()
    append_token(state, logits, logits.argmax(-1))


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
    output_ptr,
    count_ptr,
    max_new_tokens_ptr,
    done_ptr,
    stop_ids_ptr,
    log_ptr,
    step_ptr,
    position_ptr,
    M,
    length,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Takes the best of the chunks and appends it, all rows in one program."""
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
    tl.store(output_ptr + row.to(tl.int64) * length + count, token, mask=mask)
    count = tl.where(was_done, count, count + 1)
    tl.store(count_ptr + row, count, mask=mask)
    tl.store(position_ptr + row, tl.where(was_done, position, position + 1), mask=mask)
    done = was_done | (count >= max_new_tokens)
    for i in tl.static_range(STOP_IDS):
        done = done | (token == tl.load(stop_ids_ptr + i))
    tl.store(done_ptr + row, done.to(tl.uint8), mask=mask)
    log_ptr += step * 4
    tl.store(log_ptr, tl.min(done.to(tl.int32), axis=0).to(tl.int64))
    tl.store(log_ptr + 1, tl.sum(tl.where(row == 0, count, 0), axis=0))
    tl.store(log_ptr + 2, tl.sum(tl.where(row == 0, token, 0), axis=0))
    tl.store(log_ptr + 3, tl.min((was_done | finite).to(tl.int32), axis=0).to(tl.int64))
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
        *(best, index, state.token, state.output, state.count, state.max_new_tokens, state.done.view(torch.uint8)),
        *(state.stop_ids, state.log, state.step, state.position, m, state.output.shape[1]),
        V=v,
        BLOCK_M=power_of_2(m),
        CHUNKS=chunks,
        STOP_IDS=len(state.stop_ids),
        num_warps=4 if m * chunks <= 4096 else 8,
    )
