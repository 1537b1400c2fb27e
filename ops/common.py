"""What kernels have in common: how they are launched, and small pieces that several of them use.

Shapes are named by letters everywhere in ops/: B rows of the batch, T tokens a row in this forward, M = B * T rows of a
matrix, N outputs and K inputs of a weight [N, K], S slots of a KV cache, D head_dim, V vocabulary. Counts of heads are
spelled out: HEADS of queries, KV_HEADS of keys and values, GROUP = HEADS / KV_HEADS. Every tensor is contiguous. In
kernels everything is computed in float32, and `.to(dtype).to(tl.float32)` rounds where the PyTorch definition rounds:
kernel and definition differ by the order of summation only.

**Early starts.** What the author of a kernel has to know, said once:
- A kernel is launched with programmatic dependent launch where the GPU has it (Hopper and newer, constexpr PDL): it may
  start while the kernel before it still runs, as soon as all programs of that one have called `launch_dependents`,
  which nearly every kernel does first. So the launch costs nothing, and loads can begin early.
- Before `wait_for_previous` a kernel may read what no kernel of the same step writes: weights, scales, norms,
  positions, and the keys and values of older tokens. After it, everything that earlier kernels wrote is there.
- A kernel that calls `launch_dependents` behind its own wait starts the next one later, when all before itself have
  finished: what these have written, and it does not touch, the next one may read and write before its wait; what it
  reads, too, once that is known to be read. So a norm whose sums were sent late (`ops.peers.Parts`) waits at its end only:
  when they are there, all programs have sent them, and read what they were made of.
- Every kernel has to wait, also one that needs nothing from the one before: only then does "the one before has
  finished" mean that all before it have. Else nothing may be written before the wait.
- `rope`, the first kernel of a step, is launched without an early start (`early=False`), so that the step before, which
  wrote positions and keys, has finished by then.

FP8 is E4M3 with real = fp8 * scale, as `round_fp8` makes it.
"""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
except ImportError:  # on a CPU no kernel runs; the definitions beside them still have to load
    triton, tl, TRITON_VERSION = None, SimpleNamespace(constexpr=float), (0, 0)

    def jit(function=None, **options):
        return function or jit


E4M3 = torch.float8_e4m3fn
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # a running maximum's start; -inf would make NaN of -inf - -inf
SMS = 132  # streaming multiprocessors of an H100 or H200: how many programs run side by side
USE_PDL = True  # early starts, where the GPU has them; a switch for tests, which changes no result


def available(device: torch.device) -> bool:
    """Says whether these kernels run on `device`: CUDA with Triton, or anything under Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or triton.knobs.runtime.interpret)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Says whether `device` is a GPU of compute capability 9.0 or newer, with early starts and bf16x2 arithmetic."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(kernel, grid: tuple[int, ...], *args, early: bool = True, **constants):
    """Launches `kernel`, whose last constant is PDL; with `early` it may start before the previous one ends."""
    pdl = USE_PDL and is_hopper(args[0].device)
    options = {"launch_pdl": True} if pdl and early else {}
    kernel[grid](*args, PDL=pdl, **constants, **options)


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def row_warps(n: int) -> int:
    """Warps of a program that works on a row of n numbers."""
    return 1 if n <= 256 else 4 if n <= 2048 else 8


@jit
def launch_dependents(PDL: tl.constexpr):
    """Lets the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait_for_previous(PDL: tl.constexpr):
    """Waits until the kernel before has finished and what it wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def prefetch_l2(ptr, stride, count, SIZE: tl.constexpr, PDL: tl.constexpr):
    """Has `count` pieces of SIZE bytes, `stride` bytes apart, brought to L2, one by each thread.

    SIZE and stride are multiples of 16.
    """
    if PDL and SIZE > 0:
        tl.inline_asm_elementwise(
            """{
            .reg .pred wanted;
            .reg .b32 thread;
            .reg .b64 piece;
            mov.u32 thread, %tid.x;
            setp.lt.s32 wanted, thread, $3;
            mad.wide.s32 piece, thread, $2, $1;
            @wanted cp.async.bulk.prefetch.L2.global [piece], $4;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r,r",
            [ptr.to(tl.uint64), stride, count, SIZE],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def load_sum(y_ptr, row, rows, columns, mask, N, SPLIT_K: tl.constexpr, dtype: tl.constexpr):
    """Loads columns of a row of a product [rows, N] in `dtype`, or adds up SPLIT_K float32 partial sums of them."""
    if SPLIT_K == 0:
        y = tl.load(y_ptr + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    else:
        y = tl.load(y_ptr + row * N + columns, mask=mask, other=0.0)
        for part in tl.static_range(1, SPLIT_K):
            y += tl.load(y_ptr + (part * rows + row) * N + columns, mask=mask, other=0.0)
        y = y.to(dtype).to(tl.float32)
    return y


@jit
def inverse_rms_of(x, N, eps):
    """Computes 1 / sqrt(mean(x²) + eps) of a row of N numbers."""
    return tl.rsqrt(tl.sum(x * x, axis=0) / N + eps)


@jit
def normed(x, inverse_rms, weight, dtype: tl.constexpr, OFFSET: tl.constexpr = 1.0):
    """Computes x * inverse_rms * (OFFSET + weight), or x * inverse_rms if weight is None, rounded to `dtype`."""
    x = x * inverse_rms
    if weight is not None:
        if OFFSET == 0.0:
            x = x * weight.to(tl.float32)
        else:
            x = OFFSET * x + x * weight.to(tl.float32)
    return x.to(dtype).to(tl.float32)


@jit
def load_scalar(ptr):
    """Loads what ptr points to, or returns None if ptr is None.

    Kernels load constants before their wait: at its end a program would wait for memory once more.
    """
    value = None
    if ptr is not None:
        value = tl.load(ptr)
    return value


@jit
def to_e4m3(x, scale):
    """Rounds x / scale to E4M3, as `round_fp8` does."""
    # div_rn: a plain division is not correctly rounded, and PyTorch's is
    x = x * tl.div_rn(1.0, scale)
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@jit
def store_rounded(ptrs, y, scale, mask, dtype: tl.constexpr):
    """Stores y in `dtype` or, with a scale, in E4M3."""
    if scale is not None:
        tl.store(ptrs, to_e4m3(y, scale), mask=mask)
    else:
        tl.store(ptrs, y.to(dtype), mask=mask)


@jit
def tanh(x):
    """Computes tanh(x) to 1e-7, as close to -1 as PyTorch's gets, whose GELU of -10 is 0."""
    return 2.0 / (1.0 + tl.exp2(x * (-2.0 * LOG2E))) - 1.0  # of large negative x: 2 / inf - 1


@jit
def log2_scores(products, scale, softcap):
    """Computes attention's scores of products q · k, and multiplies them by log2(e), since exp2 follows."""
    if softcap is None:
        scores = products * (scale * LOG2E)
    else:
        scores = tanh(products * (scale / softcap)) * (softcap * LOG2E)
    return scores


@jit
def gelu_times(gate, up, dtype: tl.constexpr):
    """Computes gelu(gate) * up, with the approximation of GELU by tanh."""
    t = tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    gelu = 0.5 * gate * (1.0 + t)
    return (gelu.to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)


def round_fp8(x: Tensor, scale: float | Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x / scale, saturated and rounded to the nearest value of an FP8 `dtype`.

    Times the reciprocal in float32, as TransformerEngine does it: a division would break the many ties otherwise.
    """
    limit = torch.finfo(dtype).max
    return (x.float() * (1 / scale)).clamp(-limit, limit).to(dtype)


def summed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y [M, N] as it is, or the sum of float32 partial sums y [split_k, M, N] in `dtype`."""
    return y.sum(0).to(dtype) if y.dim() == 3 else y


def split_k_of(y: Tensor | None) -> int:
    """How many partial sums y [split_k, M, N] has; 0 for a result [M, N] and for None."""
    return y.shape[0] if y is not None and y.dim() == 3 else 0


def triton_dtype(dtype: torch.dtype):
    """Triton's name of a dtype of activations."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
