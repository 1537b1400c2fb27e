"""What a device is and has: the choice of it, its memory, its time and how fast it copies."""

import sys
import time
from contextlib import contextmanager

import torch

GIB = 2**30
SHARE = 0.92  # of a GPU's memory that tensors may take: some is lost between them


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; for None, CUDA where there is a GPU. Raises ValueError for CUDA without one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be cuda or cpu, not {device!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: use --device cpu")
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, as far as its driver or operating system says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return sys.maxsize


def check_memory(needed: int, device: torch.device, what: str, advice: str, sums=None):
    """Raises ValueError, with what needs them and what to do, if `needed` bytes are not free on `device`; with `sums`
    (parallel.py) on all ranks, if that is so on one of them."""
    available = free_memory(device)
    missing = needed > available
    if missing if sums is None else sums.least(not missing) == 0:
        raise ValueError(
            f"not enough {device.type} memory: {what} needs {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB is free; "
            + advice
        )


@contextmanager
def told_if_out_of_memory(device: torch.device, what: str, advice: str):
    """Raises ValueError, with what there was no memory for and what to do, if PyTorch runs out of it in the context."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError(f"out of {device.type} memory with {what}; {advice}") from None


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch had allocated on a GPU, or that this process had resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def allocated_memory(device: torch.device) -> int:
    """Bytes that PyTorch has allocated on a GPU now; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def spare_memory(device: torch.device) -> int:
    """Bytes that a GPU still had when PyTorch had allocated the most so far, of the SHARE that tensors may take; 0 on a
    CPU, where nobody counts them."""
    if device.type != "cuda":
        return 0
    total = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return int(SHARE * total) - torch.cuda.max_memory_allocated(device)


def now(device: torch.device) -> float:
    """Seconds on a clock, once everything that was launched on `device` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that is much larger than any cache; the best of five."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = now(device)
        target.copy_(source)
        best = min(best, now(device) - start)
    return 2 * size / best
