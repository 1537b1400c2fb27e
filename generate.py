"""Text from a Gemma checkpoint: load, prefill, decode, print.

From Python: `model, tokenizer = load_model(path)`, then `generate(model, [tokenizer.encode(text)])`.
"""

import argparse
import json
import os
import random
import secrets
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from checkpoint import INT_FORMATS, SCALES_NAME, WEIGHT_FORMATS, load_weights, open_checkpoint, read_scales, scales_file
from model import TE_TOKENS, Transformer
from tokenizer import TextStream, Tokenizer

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
KV_DTYPES = {
    "auto": None,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny-gemma"
DEFAULT_PROMPT = 'def read_file(path):\n    """Return the contents of a file."""\n'
MAX_BATCH = 64  # rows that run at once where --batch_size doesn't say
CHAT_LENGTH = 8192  # tokens of a conversation's cache, where the model's context is longer
STOP_IDS = 16  # at most
LENGTH_STEP = 64  # caches have a multiple of this length: fewer different shapes to compile

# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_model(
    path: str | Path = DEFAULT_CHECKPOINT,
    device: str | torch.device | None = None,
    precision: str = "bf16",
    fp8: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """Loads a checkpoint directory (or one weight file in it) on `device` (None: CUDA where there is a GPU).

    `precision`, bf16 or fp32, is that of everything but FP8 weights. With `fp8`, linear layers work in E4M3: from the
    directory's FP8 file, or quantised while loading with the factors of fp8_scales.safetensors; so does an FP8 file that
    is named. A file with int8 or int4 weights is run as it is. Factors for K and V are taken along where there are any:
    of integer weights their own, else those of the directory. The tokenizer's <end_of_turn> joins
    config.stop_ids. Raises FileNotFoundError or ValueError with a line that says what is wrong; warns about shards that
    are converted in memory.
    """
    device = pick_device(device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    checkpoint = open_checkpoint(path, ("fp8", *WEIGHT_FORMATS.values()) if fp8 else WEIGHT_FORMATS.values())
    in_int = checkpoint.weight_format in INT_FORMATS
    if fp8 and in_int:
        raise ValueError(f"{path} has {checkpoint.weight_format} weights, which can't run in FP8: leave out --fp8")
    fp8 = fp8 or checkpoint.weight_format == "fp8"
    if fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no FP8 hardware: leave out --fp8")
    tokenizer = Tokenizer(checkpoint.directory / "tokenizer.model")
    config = checkpoint.config
    if tokenizer.end_of_turn is not None and tokenizer.end_of_turn not in config.stop_ids:
        config = replace(config, stop_ids=(*config.stop_ids, tokenizer.end_of_turn))
    if differences := config.differences_from_published():
        warnings.warn(f"config.json differs from the published model and is followed: {differences}", stacklevel=2)
    if checkpoint.weight_format is None:
        command = f"python scripts/convert_hf_checkpoint.py {os.path.relpath(checkpoint.directory)}"
        warnings.warn(
            f"converting Hugging Face's files in memory; the next start is faster after: {command}", stacklevel=2
        )

    scales, kv_problem = {}, None
    if checkpoint.weight_format != "fp8":
        file = scales_file(checkpoint)
        try:
            scales = read_scales(file if file.exists() else checkpoint.directory / SCALES_NAME, config)
        except FileNotFoundError as error:
            if fp8:
                command = f"python calibrate.py --checkpoint_path {os.path.relpath(checkpoint.directory)}"
                raise FileNotFoundError(f"--fp8 needs scaling factors; {error}: run {command}") from None
        except ValueError as error:
            if fp8:
                raise
            kv_problem = str(error)  # for whoever asks for an E4M3 cache
    if device.type == "cuda":
        needed = checkpoint.parameters * (1 if fp8 else dtype.itemsize)  # of most weights
        if in_int:
            needed = sum(tensor.size for tensors in checkpoint.parts.values() for tensor in tensors)
        advice = "use a smaller model" + (" or one with int4 weights" if in_int else " or --fp8")
        _check_memory(needed, device, "the weights", advice)
    with torch.device("meta"):
        model = Transformer(config)
        if fp8:
            model.use_fp8(head="head_scales.input_scale" in checkpoint.parts)
        elif in_int:
            model.use_int(checkpoint.group, head="embedding.scale" in checkpoint.parts)
    quantising = fp8 and checkpoint.weight_format != "fp8"
    linear_scales = {
        k: v for k, v in scales.items() if k.startswith("layers.") and k[-8:] not in (".k_scale", ".v_scale")
    }
    weights = load_weights(checkpoint, device, dtype, linear_scales if quantising else None)
    if quantising:
        weights |= {name: torch.tensor(scale, device=device) for name, scale in linear_scales.items()}
    else:  # the FP8 file's own
        scales |= {name: weights.pop(name).item() for name in list(weights) if name.endswith((".k_scale", ".v_scale"))}
    for i, layer in enumerate(model.layers):
        kv_scales = scales.get(f"layers.{i}.attention.k_scale"), scales.get(f"layers.{i}.attention.v_scale")
        if None not in kv_scales:
            layer.attention.kv_scales, model.has_kv_scales = kv_scales, True
    model.kv_scales_problem = kv_problem
    model.load_state_dict(weights, assign=True)
    model.to(device).requires_grad_(False).eval()
    return model, tokenizer


def pick_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
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


def _check_memory(needed: int, device: torch.device, what: str, advice: str):
    available = free_memory(device)
    if needed > available:
        gib = 2**30
        raise ValueError(
            f"not enough {device.type} memory: {what} needs {needed / gib:.1f} GiB, {available / gib:.1f} GiB is free; "
            + advice
        )


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    The filters work in this order, each on what the one before left: repetition penalty (CTRL, arXiv:1909.05858, over
    prompt and new tokens), temperature, top-k, top-p (arXiv:1904.09751), min-p (arXiv:2407.01082).
    """

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        # written so that a NaN fails, too
        for name, value, valid, rule in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0: no limit)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, not {value}")


def sample(
    logits: Tensor,
    noise: Tensor,
    temperature: float | Tensor,
    top_k: int = 0,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    limit: Tensor | None = None,
) -> Tensor:
    """Draws a token [B] for each row of logits [B, V] by inverting its cumulative distribution at noise [B] in [0, 1).

    Nothing is read by the host. A top_p or min_p of None is off. Of the top_k only the first `limit` count. Double
    precision keeps sums over a whole vocabulary exact to well below the noise's own resolution.
    """
    tokens = None
    if 0 < top_k <= logits.shape[-1]:
        logits, tokens = logits.topk(top_k)  # largest first
    elif top_p is not None:
        logits, tokens = logits.sort(descending=True)
    # The largest is taken off first: dividing by a tiny temperature then overflows to -inf, never to NaN.
    logits = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    if limit is not None:
        logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= limit, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p is not None:  # a token stays if those before it do not reach top_p: the first always does
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < top_p)
    if min_p is not None:
        probabilities = probabilities * (probabilities >= min_p * probabilities.amax(-1, keepdim=True))
    cumulative = probabilities.cumsum(-1)
    pick = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return (pick if tokens is None else tokens.gather(1, pick))[:, 0]


def _noise(seed: int, prompt: int, sample_index: int, count: int) -> list[float]:
    """`count` uniform numbers in [0, 1) that depend on these arguments alone: not on the device, nor on a neighbour."""
    source = random.Random(f"{seed}/{prompt}/{sample_index}")
    return [source.getrandbits(32) / 2**32 for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

TOP_K_STEP = 256  # top_k is rounded up to a multiple for the device, which then counts the first top_k of them


class Draw(NamedTuple):
    """What of `Sampling` shapes the computation of a step; values are the device's, and may change between runs."""

    greedy: bool
    top_k: int  # a multiple of TOP_K_STEP; 0: the whole vocabulary
    sort: bool  # the whole vocabulary, for top-p
    penalise: bool

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> "Draw":
        if sampling.temperature == 0:
            return cls(True, 0, False, sampling.repetition_penalty != 1)
        top_k = min(-(-sampling.top_k // TOP_K_STEP) * TOP_K_STEP, vocab_size) if sampling.top_k < vocab_size else 0
        return cls(False, top_k, top_k == 0 and sampling.top_p < 1, sampling.repetition_penalty != 1)


@dataclass
class State:
    """What a decode step reads and writes, all on the device, for B rows of at most L tokens.

    A row that is done keeps its position and count: what it still writes lies behind its results.
    """

    token: Tensor  # [B], each row's newest
    position: Tensor  # [B], how many of its tokens are in the KV cache
    output: Tensor  # [B, L + 1], its new tokens
    count: Tensor  # [B], how many they are
    limit: Tensor  # [B], how many they may be
    done: Tensor  # [B], bool
    noise: Tensor  # [B, L + 1], float64 in [0, 1), one for each new token
    seen: Tensor | None  # [B, V], bool: what repetition_penalty is for
    settings: Tensor  # [5], float64: Sampling's values in their order
    stop_ids: Tensor  # [STOP_IDS], -1 where there is none
    log: Tensor  # [L + 1, 3], a row a step: whether all rows are done; count and token of the first row
    step: Tensor  # [1], the log's next row

    @classmethod
    def empty(cls, batch_size: int, length: int, device: torch.device) -> "State":
        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            token=zeros(batch_size),
            position=zeros(batch_size),
            output=zeros(batch_size, length + 1),
            count=zeros(batch_size),
            limit=zeros(batch_size),
            done=torch.ones(batch_size, dtype=torch.bool, device=device),
            noise=zeros(batch_size, length + 1, dtype=torch.float64),
            seen=None,
            settings=zeros(5, dtype=torch.float64),
            stop_ids=zeros(STOP_IDS),
            log=zeros(length + 1, 3),
            step=zeros(1),
        )

    def rows(self, count: int) -> "State":
        """The first `count` rows, in the same memory."""
        shared = ("settings", "stop_ids", "log", "step")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return State(**{k: v if k in shared or v is None else v[:count] for k, v in values.items()})


def decode_step(model: Transformer, state: State, draw: Draw):
    """One token for each row."""
    logits = model(state.token[:, None], state.position)
    state.position += ~state.done
    emit(state, logits, draw)


def fast_step(model: Transformer, state: State, draw: Draw):
    """`decode_step` by kernels.py."""
    logits = model.decode(state.token, state.position)
    if draw.greedy and not draw.penalise:
        kernels.greedy_emit(logits, state)
        return
    state.position += ~state.done
    emit(state, logits.float(), draw)


def emit(state: State, logits: Tensor, draw: Draw):
    """Draws a token for each row from logits [B, V] and records it where the row is not done."""
    temperature, top_k, top_p, min_p, repetition_penalty = state.settings
    if draw.penalise:
        penalised = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(state.seen, penalised.float(), logits)
    if draw.greedy:
        token = logits.argmax(-1)
    else:
        noise = state.noise.gather(1, state.count[:, None])[:, 0]
        limit = top_k if draw.top_k else None
        filters = (top_p, min_p) if draw.top_k or draw.sort else (None, min_p)
        token = sample(logits, noise, temperature, draw.top_k, *filters, limit=limit)
    if draw.penalise:
        state.seen.scatter_(1, token[:, None], True)
    kernels.record(state, token)


class Decoder:
    """Decode state and KV cache of up to `batch_size` rows of at most `length` tokens, allocated once, and what
    advances them. It may serve many runs: prompts, sampling and, on a GPU, the number of rows change between them.

    `compile` records the decode step as one CUDA graph, once for each number of rows and `Draw`, all in one memory pool;
    on a CPU torch.compile makes the step. `compile_prefill` does so with prefill, for prompts padded to a power of two.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        length: int,
        kv_dtype: torch.dtype | None = None,
        compile: bool = False,
        compile_prefill: bool = False,
    ):
        check_kv_scales(model, kv_dtype)
        self.batch_size, self.length, self.kv_dtype = batch_size, length, kv_dtype
        self.compile, self.compile_prefill = compile, compile_prefill
        self.device = model.device
        with torch.inference_mode(False):  # usable in and out of that mode, whoever asked first
            self.caches = model.new_caches(batch_size, length, kv_dtype)
            self.all = self.state = State.empty(batch_size, length, self.device)
            self.log = torch.zeros_like(self.all.log, device="cpu", pin_memory=self.device.type == "cuda")
        self.draw = Draw(True, 0, False, False)
        self.steps, self.prefills, self.pool = {}, {}, None
        if self.device.type == "cuda":
            self.streams = _streams(self.device)
        # Functions, not methods of self: without a cycle, memory is free as soon as the decoder is.
        self.fast = compile and self.device.type == "cuda" and kernels.available(self.device)
        self._step = fast_step if self.fast else decode_step
        self._prefill = Transformer.prefill if self.fast else Transformer.forward
        if self.device.type == "cpu":
            self._step = _compiled(decode_step, dynamic=False) if compile else decode_step
            self._prefill = _compiled(Transformer.forward, dynamic=None) if compile_prefill else Transformer.forward

    def start(self, model: Transformer, rows: int, sampling: Sampling, stop_ids: tuple[int, ...]):
        """Readies the first `rows` rows, or some more where steps are graphs, of the state and the KV cache for a run;
        compiles or records what is not yet."""
        if self.compile and self.device.type == "cuda":
            rows = min(_padded_rows(rows), self.batch_size)
        if len(stop_ids) > STOP_IDS:
            raise ValueError(f"{len(stop_ids)} stop ids are given; at most {STOP_IDS} can be")
        model.attach_caches([cache.rows(rows) for cache in self.caches])
        self.draw = Draw.of(sampling, model.config.vocab_size)
        if self.draw.penalise and self.all.seen is None:
            with torch.inference_mode(False):
                shape = (self.batch_size, model.config.vocab_size)
                self.all.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.state = self.all.rows(rows)
        self.state.settings.copy_(torch.tensor(astuple(sampling), dtype=torch.float64))
        self.state.stop_ids.copy_(torch.tensor((*stop_ids, *[-1] * (STOP_IDS - len(stop_ids)))))
        self.state.step.zero_()
        if self.device.type == "cpu" and not self.compile and 2 * model.weight_bytes < free_memory(self.device):
            model.pack()
        if not self.compile and not self.compile_prefill:
            return
        try:
            if self.compile and (rows, self.draw) not in self.steps:
                self.steps[rows, self.draw] = self._make_step(model)
            if self.compile_prefill and self.device.type == "cpu" and rows not in self.prefills:
                self.prefill(model, [[0] * min(8, self.length)], [[0.0]], 1)
                self.prefills[rows] = None
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from None
            if "InvalidCxxCompiler" not in f"{error!r}{error.__cause__!r}":
                raise
            raise ValueError("--compile needs a C++ compiler: install g++ or leave it out") from None

    def _make_step(self, model: Transformer) -> "torch.cuda.CUDAGraph | None":
        """Compiles the step for this number of rows and this draw; on CUDA also records it as one graph.

        All rows are done meanwhile: what a step writes then is one cache slot, which prefill or the row's next token
        overwrites.
        """
        self.state.done.fill_(True)
        if self.device.type == "cuda":
            graph = self._record(lambda: self._step(model, self.state, self.draw))
        else:  # Inductor then knows the weights and packs them: 1.5 times as fast on 2 cores with AVX512-BF16.
            graph = None
            with torch._inductor.config.patch(freezing=True):
                self._step(model, self.state, self.draw)
        self.state.step.zero_()
        return graph

    def _record(self, run: Callable):
        """One CUDA graph of what `run` launches. It runs twice before: kernels are compiled, libraries take memory."""
        stream = self.streams[0]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            run()
        self.pool = graph.pool()
        return graph

    def prefill(
        self,
        model: Transformer,
        prompts: list[list[int]],
        noise: list[list[float]],
        max_new_tokens: int,
        cached: int = 0,
    ):
        """Starts a row for each prompt (at most those of `start`; the other rows stay idle) and draws its first token.

        `cached` tokens of every row are in the KV cache already and the prompts continue them.
        """
        state = self.state
        idle = len(state.token) - len(prompts)
        prompts = prompts + [prompts[0][:1]] * idle
        width = max(map(len, prompts))
        if self.compile_prefill and self.device.type == "cuda":
            width = min(max(16, 1 << (width - 1).bit_length()), self.length)
        elif self.compile_prefill:
            width = max(width, 2)  # a length of 1 would be compiled apart
        # A row's own token as padding: none that repetition_penalty would count as seen
        tokens = torch.tensor([prompt + prompt[:1] * (width - len(prompt)) for prompt in prompts]).to(self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts]).to(self.device)
        position = torch.full_like(lengths, cached) if cached else None
        if self.compile_prefill and self.device.type == "cpu":
            torch._dynamo.mark_dynamic(tokens, 1)
        if self.compile_prefill and self.device.type == "cuda" and not cached:
            logits = self._recorded_prefill(model, tokens, lengths)
        else:
            with _range("prefill", self.device):
                logits = self._prefill(model, tokens, position, lengths)
        state.position.copy_(lengths + cached)
        state.count.zero_()
        state.limit.fill_(max_new_tokens)
        state.done.copy_(torch.arange(len(prompts)) >= len(prompts) - idle)
        state.step.zero_()
        if not self.draw.greedy:
            noise = torch.tensor(noise, dtype=torch.float64)
            state.noise[: len(noise), : noise.shape[1]] = noise.to(self.device)
        if self.draw.penalise:
            if not cached:
                state.seen.zero_()
            state.seen.scatter_(1, tokens, True)
        emit(state, logits.float(), self.draw)

    def _recorded_prefill(self, model: Transformer, tokens: Tensor, lengths: Tensor) -> Tensor:
        if tokens.shape not in self.prefills:
            tokens, lengths = tokens.clone(), lengths.clone()
            result = []

            def run():
                result[:] = [self._prefill(model, tokens, None, lengths)]

            self.prefills[tokens.shape] = self._record(run), tokens, lengths, result[0]
        graph, tokens_in, lengths_in, logits = self.prefills[tokens.shape]
        tokens_in.copy_(tokens)
        lengths_in.copy_(lengths)
        with _range("prefill", self.device):
            graph.replay()
        return logits

    def decode(
        self,
        model: Transformer,
        steps: int,
        on_token: Callable[[int], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        check: str = "ping-pong",
    ) -> int:
        """Steps until every row is done, `steps` times at most; returns how many there were.

        on_token gets the first row's tokens, the one that prefill drew included. `check`, for the benchmark: whether all
        rows are done is read "ping-pong" as below, after "every" step, or "never".

        On CUDA two streams take turns. Step i waits, on the device, for the event that step i - 1 records behind its
        last kernel; behind that event comes the copy of the step's row of the log to the host, which runs beside step i,
        and then another event, on which the host waits before it reads the row. It reads row i - 1 while step i runs,
        so that the device never waits for it. Every step has a row of its own on both sides: none is overwritten while
        it is copied or read. The one step too many writes nothing: its rows are done.
        """
        graph = self.steps.get((len(self.state.token), self.draw))
        step = graph.replay if graph is not None else partial(self._step, model, self.state, self.draw)
        delivered = 0

        def all_done(i: int) -> bool:
            nonlocal delivered
            done, count, token = self.log[i].tolist()
            if on_token is not None and count > delivered:
                on_token(token)
            delivered = count
            return bool(done)

        if self.device.type == "cpu":
            for taken in range(steps + 1):
                self.log[taken].copy_(self.state.log[taken])
                if all_done(taken) or taken == steps:
                    return taken
                if on_step is not None:
                    on_step(taken + 1)
                step()

        stepped, landed = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
        before = torch.cuda.current_stream()

        def publish(i: int):
            stepped[i % 2].record()
            if check != "never":
                self.log[i].copy_(self.state.log[i], non_blocking=True)
                landed[i % 2].record()

        taken = 0
        self.streams[0].wait_stream(before)
        with torch.cuda.stream(self.streams[0]):
            publish(0)
        while taken < steps:
            if check == "every" or (check == "ping-pong" and taken > 0):
                i = taken if check == "every" else taken - 1
                with _range("stop check", self.device):
                    landed[i % 2].synchronize()
                    if all_done(i):
                        break
            if on_step is not None:
                on_step(taken + 1)
            taken += 1
            with torch.cuda.stream(self.streams[taken % 2]), _range("decode step", self.device):
                stepped[(taken - 1) % 2].wait()
                step()
                publish(taken)
        for stream in self.streams:
            before.wait_stream(stream)
        if check == "never":
            self.log.copy_(self.state.log)
        torch.cuda.synchronize(self.device)
        for i in range(max(0, taken - 1), taken + 1):
            all_done(i)
        return taken

    def results(self, rows: int) -> list[list[int]]:
        """New tokens of the first `rows` rows, the stop token included where there is one."""
        counts = self.state.count.tolist()
        return [row[:count] for row, count in zip(self.state.output[:rows].tolist(), counts)]


@cache
def _streams(device: torch.device) -> list:
    """Two, for all decoders: libraries keep a workspace for each stream that they ever ran on."""
    return [torch.cuda.Stream(device) for _ in range(2)]


def _range(name: str, device: torch.device):
    """A named NVTX range, which a profiler shows."""
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()


def _padded_rows(rows: int) -> int:
    """How many rows a graph is recorded for: a power of two, or a multiple of 64."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


def decoder_for(
    model: Transformer,
    rows: int,
    length: int,
    kv_dtype: torch.dtype | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
) -> Decoder:
    """The model's decoder if it fits the arguments, else a new one in its place.

    Where steps are graphs and attention reads what a row has, a larger one does: lengths and rows are rounded up to a
    power of two, so that a prompt of another length seldom needs a new one.
    """
    roomy = compile and model.device.type == "cuda"
    held, config = model.decoder, model.config
    if held is not None and (held.kv_dtype, held.compile, held.compile_prefill) == (kv_dtype, compile, compile_prefill):
        if (held.batch_size, held.length) == (rows, length):
            return held
        if roomy and held.batch_size >= rows and held.length >= length:
            return held
    model.decoder = held = None  # freed first
    model.attach_caches([None] * config.n_layers)
    if roomy:
        more = _padded_rows(rows), min(max(512, 1 << (length - 1).bit_length()), config.context_length)
        if model.cache_bytes(*more, kv_dtype) < free_memory(model.device) // 2:
            rows, length = more
    model.decoder = Decoder(model, rows, length, kv_dtype, compile, compile_prefill)
    return model.decoder


def check_kv_scales(model: Transformer, kv_dtype: torch.dtype | None):
    """Raises ValueError for an E4M3 cache if the file of factors is bad, and warns if there are none for K and V."""
    if kv_dtype == torch.float8_e4m3fn and model.kv_scales_problem:
        raise ValueError(model.kv_scales_problem)
    if kv_dtype == torch.float8_e4m3fn and not model.has_kv_scales:
        warnings.warn("no scaling factors for K and V: 1.0 is used; calibrate.py makes better ones", stacklevel=3)


def _compiled(function: Callable, dynamic: bool | None) -> Callable:
    import torch._dynamo
    import torch._inductor.config

    # A long-lived process may meet many shapes; past the limit fullgraph=True would raise.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


@dataclass
class Stats:
    """Seconds and counts of one or more `generate` calls."""

    compile_seconds: float = 0.0  # allocating caches and packing weights for a CPU, too
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    rows: int = 0
    steps: int = 0
    bytes_read: int = 0  # weights and valid KV cache entries that the decode steps had to read

    @property
    def decode_rate(self) -> float:
        """New tokens a second of decoding, all rows together; the first of each row is prefill's."""
        return (self.new_tokens - self.rows) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes_read / self.decode_seconds if self.decode_seconds else 0.0


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int = 200,
    *,
    batch_size: int | None = None,
    num_samples: int = 1,
    temperature: float = 0.8,
    top_k: int = 200,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: tuple[int, ...] | None = None,
    kv_cache_dtype: torch.dtype | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
    on_token: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    stop_check: str = "ping-pong",
    stats: Stats | None = None,
) -> list[list[int]]:
    """Continues each prompt (token ids, <bos> included) by at most max_new_tokens; returns the new token ids.

    There are num_samples continuations of each prompt, side by side, in the order of the prompts. One that ends with a
    stop id (default: the model's; () never stops) keeps it as its last token. At most batch_size rows run at once,
    those of similar length together; a row's result does not depend on the others, nor its noise (drawn from `seed`,
    the prompt's index and the sample's) on the device. Settings are `Sampling`'s. on_token gets the tokens of a single
    row as they come; on_step(i) is called before prefill (0) and before each decode step; stop_check is for the
    benchmark (`Decoder.decode`); `stats` is added to.

    Raises ValueError for an empty prompt, an unknown token id, a prompt too long for the context, a setting out of its
    range, or too little memory, saying which.
    """
    config, device = model.config, model.device
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not prompts:
        return []
    for index, prompt in enumerate(prompts):
        which = f"prompt {index + 1}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise ValueError(f"{which} is empty")
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ValueError(f"{which} has a token id outside the vocabulary of {config.vocab_size}")
        check_context(model, len(prompt), max_new_tokens, which)
    if on_token is not None and len(prompts) * num_samples > 1:
        raise ValueError("on_token streams a single row")
    stop_ids = config.stop_ids if stop_ids is None else tuple(stop_ids)
    seed = secrets.randbits(32) if seed is None else seed
    stats = Stats() if stats is None else stats

    rows = [(i, j) for i in range(len(prompts)) for j in range(num_samples)]
    rows.sort(key=lambda row: len(prompts[row[0]]))
    turns = -(-len(rows) // min(batch_size or MAX_BATCH, len(rows)))
    batch_size = -(-len(rows) // turns)  # even turns: no last one that is nearly empty
    longest = max(map(len, prompts))
    length = min(-(-(longest + max_new_tokens) // LENGTH_STEP) * LENGTH_STEP, config.context_length)
    _check_run_memory(model, batch_size, length, longest, kv_cache_dtype, sampling)

    results: dict[tuple[int, int], list[int]] = {}
    try:
        start = _now(device)
        decoder = decoder_for(model, batch_size, length, kv_cache_dtype, compile, compile_prefill)
        decoder.start(model, batch_size, sampling, stop_ids)
        stats.compile_seconds += _now(device) - start
        for i in range(0, len(rows), batch_size):
            turn = rows[i : i + batch_size]
            noise = [_noise(seed, *row, max_new_tokens) for row in turn] if temperature else []
            start = _now(device)
            if on_step is not None:
                on_step(0)
            decoder.prefill(model, [prompts[row[0]] for row in turn], noise, max_new_tokens)
            prefilled = _now(device)
            steps = decoder.decode(model, max_new_tokens - 1, on_token, on_step, stop_check)
            end = _now(device)
            results.update(zip(turn, decoder.results(len(turn))))

            new_tokens = sum(len(results[row]) for row in turn)
            prompt_tokens = sum(len(prompts[row[0]]) for row in turn)
            context = (prompt_tokens + new_tokens / 2) / len(turn)
            stats.prefill_seconds += prefilled - start
            stats.decode_seconds += end - prefilled
            stats.prompt_tokens += prompt_tokens
            stats.new_tokens += new_tokens
            stats.rows += len(turn)
            stats.steps += steps
            stats.bytes_read += steps * (
                model.weight_bytes + model.cache_bytes(len(turn), int(context), kv_cache_dtype)
            )
    except torch.OutOfMemoryError:
        raise ValueError(
            f"out of {device.type} memory with {batch_size} rows of {length} tokens; "
            "lower --batch_size, --max_new_tokens or the length of the prompts"
        ) from None
    return [results[i, j] for i in range(len(prompts)) for j in range(num_samples)]


def check_context(model: Transformer, prompt_tokens: int, max_new_tokens: int, which: str = "the prompt"):
    """Raises ValueError if a prompt and its continuation do not fit the model's context."""
    context = model.config.context_length
    if prompt_tokens + max_new_tokens > context:
        room = context - prompt_tokens
        advice = f"--max_new_tokens can be at most {room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"{which} has {prompt_tokens} tokens, and with {max_new_tokens} new ones exceeds the context of {context}: "
            + advice
        )


def _check_run_memory(model, batch_size: int, length: int, longest: int, kv_dtype, sampling: Sampling):
    """KV cache, decode state, and the largest activations of prefill (the feed-forward layer's, some at once)."""
    config = model.config
    held = 0 if model.decoder is None else sum(2 * cache.k.nbytes for cache in model.decoder.caches)
    cache = max(0, model.cache_bytes(batch_size, length, kv_dtype) - held)
    activations = batch_size * longest * (3 * config.intermediate_size + 4 * config.hidden_size) * model.dtype.itemsize
    logits = batch_size * config.vocab_size * (4 if sampling.temperature == 0 else 24)
    _check_memory(
        cache + activations + logits,
        model.device,
        f"a batch of {batch_size} rows of {length} tokens",
        "lower --batch_size, --max_new_tokens or the length of the prompts",
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------------------------------------------------------------
# The program


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the options)")


def program_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="generate.py", description="Generate text with Gemma.")
    add, default = parser.add_argument, Sampling()
    add("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT, help="directory, or weight file in it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    source.add_argument(
        "--prompts_file", type=Path, metavar="FILE", help="a prompt a line, or JSON lines with 'prompt'"
    )
    source.add_argument("--interactive", action="store_true", help="chat; the cache is kept between turns")
    add("--chat", action="store_true", help="put prompts into the chat format (instruction-tuned checkpoints)")
    add("--max_new_tokens", type=int, default=200, metavar="N")
    add("--batch_size", type=int, metavar="N", help=f"rows that run at once (default: all, at most {MAX_BATCH})")
    add("--num_samples", type=int, default=1, metavar="N", help="completions of each prompt")
    add("--temperature", type=float, default=default.temperature, help="0 is greedy (default: %(default)s)")
    add("--top_k", type=int, default=default.top_k, help="0 is no limit (default: %(default)s)")
    add("--top_p", type=float, default=default.top_p, help="(default: %(default)s)")
    add("--min_p", type=float, default=default.min_p, help="(default: %(default)s)")
    add("--repetition_penalty", type=float, default=default.repetition_penalty, help="(default: %(default)s)")
    add("--seed", type=int, help="the same seed gives the same samples (default: a random one)")
    add("--compile", action="store_true", help="compile the decode step; on CUDA, record it as one graph")
    add("--compile_prefill", action="store_true", help="compile prefill, too")
    add("--fp8", action="store_true", help="FP8 weights and matrix products (calibrate.py makes the scaling factors)")
    add("--kv_cache_dtype", choices=tuple(KV_DTYPES), default="auto", help="auto: as --precision")
    add("--device", choices=("cuda", "cpu"), help="(default: cuda where there is a GPU)")
    add("--precision", choices=tuple(PRECISIONS), default="bf16")
    add("--json", action="store_true", help="print one JSON object a completion")
    add("--profile", type=Path, metavar="TRACE.json", help="write a chrome trace of prefill and ten decode steps")
    return parser


def read_prompts(file: Path) -> list[str]:
    """Prompts of a text file, one a line, or of JSON lines, one object with a string `prompt` a line.

    A file is JSON lines if its name ends in .jsonl or .json, or if any line is an object with a `prompt`. Raises
    ValueError with the number of a line that holds no prompt, FileNotFoundError without the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no prompts file at {file}")
    lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().splitlines()

    def prompt_of(line: bytes) -> str | None:
        try:
            entry = json.loads(line)
        except ValueError:
            return None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        return prompt if isinstance(prompt, str) else None

    is_json = file.suffix in (".jsonl", ".json") or any(prompt_of(line) is not None for line in lines)
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = prompt_of(line) if is_json else line.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file}, line {number}: not UTF-8 text") from None
        if prompt is None:
            raise ValueError(f"{file}, line {number}: not a JSON object with a string 'prompt'")
        if not prompt:
            raise ValueError(f"{file}, line {number}: the prompt is empty")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{file} holds no prompts")
    return prompts


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that is much larger than any cache; the best of five."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = _now(device)
        target.copy_(source)
        best = min(best, _now(device) - start)
    return 2 * size / best


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch had allocated on a GPU, or that this process had resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(stats: Stats, load_seconds: float, model: Transformer, seed: int):
    """The figures of a run, to stderr."""
    device, gib = model.device, 2**30
    peak = peak_memory(device)  # before the bandwidth's own buffers
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name += " by the Triton kernels" if model.decoder and model.decoder.fast else " by PyTorch"
    te = f", prefill from {TE_TOKENS} tokens on by TransformerEngine {model.te_version}" if model.te_version else ""
    print(
        f"{name}, {str(model.dtype).removeprefix('torch.')}, seed {seed}{te}\n"
        f"load {load_seconds:.2f} s, compile {stats.compile_seconds:.2f} s, "
        f"prefill {stats.prefill_seconds:.3f} s ({stats.prompt_tokens} tokens), "
        f"decode {stats.decode_seconds:.3f} s ({stats.new_tokens} tokens in {stats.rows} rows)\n"
        f"decode {stats.decode_rate:.1f} tokens/s, {stats.bandwidth / 1e9:.1f} GB/s, "
        f"{stats.bandwidth / bandwidth:.0%} of the copy bandwidth ({bandwidth / 1e9:.1f} GB/s)\n"
        f"peak memory {peak / gib:.2f} GiB",
        file=sys.stderr,
    )


def chat(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, sampling: Sampling, seed: int):
    """A conversation on stdin and stdout. Each turn's prefill covers what is new since the one before."""
    length = min(model.config.context_length, CHAT_LENGTH)
    _check_run_memory(model, 1, length, min(length, 1024), KV_DTYPES[args.kv_cache_dtype], sampling)
    decoder = decoder_for(model, 1, length, KV_DTYPES[args.kv_cache_dtype], args.compile, args.compile_prefill)
    decoder.start(model, 1, sampling, model.config.stop_ids)
    cached, unread, turn = 0, [], 0  # tokens in the cache; the model's last token, which is not
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            continue
        tokens = unread + tokenizer.encode_turn(text, first=cached == 0)
        if cached and cached + len(tokens) + args.max_new_tokens > length:
            print(f"note: the conversation has filled its {length} tokens and starts anew", file=sys.stderr)
            cached, tokens = 0, tokenizer.encode_turn(text)
        if cached + len(tokens) + args.max_new_tokens > length:
            print(f"error: {len(tokens)} tokens and {args.max_new_tokens} new ones exceed {length}", file=sys.stderr)
            unread = []
            continue
        stream = tokenizer.stream()
        noise = [_noise(seed, turn, 0, args.max_new_tokens)] if sampling.temperature else []
        decoder.prefill(model, [tokens], noise, args.max_new_tokens, cached)
        decoder.decode(model, args.max_new_tokens - 1, partial(_print_token, stream, model.config.stop_ids))
        print(stream.end(), flush=True)
        (answer,) = decoder.results(1)
        cached += len(tokens) + len(answer) - 1
        unread = [] if answer[-1] in model.config.stop_ids else answer[-1:]
        unread, turn = [*unread, tokenizer.end_of_turn], turn + 1


def _print_token(stream: TextStream, stop_ids: tuple[int, ...], token: int):
    if token not in stop_ids:
        print(stream.put(token), end="", flush=True)


class _Trace:
    """Records prefill and ten decode steps as `on_step` is called, and writes them as a chrome trace."""

    def __init__(self, file: Path):
        self.file, self.recording = file, None

    def __call__(self, step: int):
        if step == 0 and self.recording is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.recording = torch.profiler.profile(activities=activities)
            self.recording.start()
        elif step == 11:
            self.finish()

    def finish(self):
        recording, self.recording = self.recording, False
        if recording:
            recording.stop()
            temporary = self.file.with_name(f".{os.getpid()}.{self.file.name}")
            recording.export_chrome_trace(str(temporary))
            os.replace(temporary, self.file)


def run(args: argparse.Namespace):
    if args.interactive and (args.json or args.profile or args.num_samples > 1 or (args.batch_size or 1) > 1):
        raise ValueError("--interactive takes no --json, --profile, --num_samples or --batch_size")
    if args.profile is not None and not args.profile.absolute().parent.is_dir():
        raise ValueError(f"--profile: there is no directory {args.profile.parent}")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    texts = read_prompts(args.prompts_file) if args.prompts_file else args.prompt or [DEFAULT_PROMPT]
    for text in texts:
        if not text:
            raise ValueError("the prompt is empty")
    start = time.perf_counter()
    model, tokenizer = load_model(args.checkpoint_path, args.device, args.precision, args.fp8)
    load_seconds = _now(model.device) - start
    seed = secrets.randbits(32) if args.seed is None else args.seed
    if args.interactive:
        with torch.no_grad():
            return chat(model, tokenizer, args, sampling, seed)

    prompts = [tokenizer.encode_turn(text) if args.chat else tokenizer.encode(text) for text in texts]
    stop_ids, stats, stream = model.config.stop_ids, Stats(), tokenizer.stream()
    streaming = sys.stdout.isatty() and not args.json and len(prompts) * args.num_samples == 1
    trace = _Trace(args.profile) if args.profile else None

    if streaming and not args.chat:
        print(texts[0], end="", flush=True)
    completions = generate(
        model,
        prompts,
        args.max_new_tokens,
        batch_size=args.batch_size,
        num_samples=args.num_samples,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=seed,
        kv_cache_dtype=KV_DTYPES[args.kv_cache_dtype],
        compile=args.compile,
        compile_prefill=args.compile_prefill,
        on_token=partial(_print_token, stream, stop_ids) if streaming else None,
        on_step=trace,
        stats=stats,
    )
    if trace:
        trace.finish()
    if streaming:
        print(stream.end(), flush=True)
    else:
        _print_completions(texts, prompts, completions, tokenizer, stop_ids, args)
    report(stats, load_seconds, model, seed)


def _print_completions(texts, prompts, completions, tokenizer, stop_ids, args):
    for i, tokens in enumerate(completions):
        prompt, sample_index = divmod(i, args.num_samples)
        stopped = tokens[-1] in stop_ids
        text = tokenizer.decode(tokens[:-1] if stopped else tokens)
        if args.json:
            completion = {
                "prompt": texts[prompt],
                "text": text,
                "tokens": tokens,
                "finish_reason": "stop" if stopped else "length",
                "prompt_tokens": len(prompts[prompt]),
            }
            print(json.dumps(completion, ensure_ascii=False))
            continue
        if len(completions) > 1:
            print(f"--- prompt {prompt + 1}" + (f", sample {sample_index + 1}" if args.num_samples > 1 else ""))
        print(text if args.chat else texts[prompt] + text)
    sys.stdout.flush()


def run_program(run: Callable, parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Parses, runs and gives the exit status: 0, or 2 with one line on stderr for what the user can mend."""
    warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
    try:
        run(parser.parse_args(argv))
    except BrokenPipeError:  # the reader of stdout is gone; Python would complain once more on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_program(run, program_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
