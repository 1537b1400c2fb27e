"""The device's side of decoding: the state of a batch, whole-step graphs, and the chain of two streams that runs them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cache import Codec, KVCache, cache_bytes
from device import free_memory
from model import Transformer
from ops.next_token import append_token
from sampling import SETTINGS, DrawKind, Sampling, draw, penalize

STOP_IDS = 16  # at most


@dataclass
class State:
    """What a decode step reads and writes, all on the device, for B rows of at most L tokens.

    A row that is done keeps its position and count: what it still writes, a token and a slot of the cache, lies behind
    its results.
    """

    token: Tensor  # [B], each row's newest
    position: Tensor  # [B], how many of its tokens are in the KV cache
    output: Tensor  # [B, L + 1], its new tokens
    count: Tensor  # [B], how many they are
    max_new_tokens: Tensor  # [B], how many they may be
    done: Tensor  # [B], bool
    noise: Tensor  # [B, L + 1], float64 in [0, 1), one for each new token
    seen: Tensor | None  # [B, V], bool: what repetition_penalty is for
    settings: Tensor  # [len(SETTINGS)], float64: Sampling's values in their order
    stop_ids: Tensor  # [STOP_IDS], -1 where there is none
    log: Tensor  # [L + 1, 4], a row a step: whether all rows are done; count, token of the first; whether logits are finite
    step: Tensor  # [1], the log's next row

    @classmethod
    def empty(cls, batch_size: int, length: int, device: torch.device) -> "State":
        """The state of batch_size rows of at most `length` tokens, all of them done."""

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            token=zeros(batch_size),
            position=zeros(batch_size),
            output=zeros(batch_size, length + 1),
            count=zeros(batch_size),
            max_new_tokens=zeros(batch_size),
            done=torch.ones(batch_size, dtype=torch.bool, device=device),
            noise=zeros(batch_size, length + 1, dtype=torch.float64),
            seen=None,
            settings=zeros(len(SETTINGS), dtype=torch.float64),
            stop_ids=zeros(STOP_IDS),
            log=zeros(length + 1, 4),
            step=zeros(1),
        )

    def first_rows(self, count: int) -> "State":
        """A view of the first `count` rows, in the same memory."""
        shared = ("settings", "stop_ids", "log", "step")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return State(**{k: v if k in shared or v is None else v[:count] for k, v in values.items()})


def decode_step(model: Transformer, cache: KVCache, state: State, kind: DrawKind):
    """Computes, draws and appends one token for each row."""
    logits = model.logits(state.token[:, None], cache, state.position)
    if kind.greedy and not kind.penalize:
        model.ops.greedy(logits, state)
    else:
        state.position += ~state.done
        next_token(state, logits.float(), kind)


def next_token(state: State, logits: Tensor, kind: DrawKind):
    """Draws a token for each row from logits [B, V] in float32 and appends it."""
    settings, computed = dict(zip(SETTINGS, state.settings)), logits
    if kind.penalize:
        logits = penalize(logits, state.seen, settings["repetition_penalty"])
    if kind.greedy:
        token = logits.argmax(-1)
    else:
        noise = state.noise.gather(1, state.count[:, None])[:, 0]
        token = draw(logits, noise, settings, kind)
    if kind.penalize:
        state.seen.scatter_(1, token[:, None], True)
    append_token(state, computed, token)


class Runner:
    """The state and KV cache of up to `batch_size` rows of at most `length` tokens, allocated once, and what advances them.

    It may serve many runs, one at a time: prompts, sampling and, on a GPU, the number of rows change between them.
    `compile` records the decode step as one CUDA graph, once for each number of rows and `DrawKind`, all in one memory
    pool; on a CPU torch.compile makes the step. `compile_prefill` does so with prefill, for prompts padded to a power of
    two. Raises ValueError for an FP8 cache whose scales are bad.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        length: int,
        codec: Codec,
        compile: bool = False,
        compile_prefill: bool = False,
    ):
        model.kv_scales.check(codec)
        self.batch_size, self.length, self.codec = batch_size, length, codec
        self.compile, self.compile_prefill = compile, compile_prefill
        self.device, self.ops = model.device, model.ops
        self.whole_cache = KVCache.empty(model.config, batch_size, length, codec, self.device, model.kv_scales)
        with torch.inference_mode(False):  # usable in and out of that mode, whoever asked first
            self.whole_state = State.empty(batch_size, length, self.device)
            self.log = torch.zeros_like(self.whole_state.log, device="cpu", pin_memory=self.device.type == "cuda")
        self.cache, self.state = self.whole_cache, self.whole_state  # of the rows that are in use
        self.kind = DrawKind(True, 0, False, False)
        self.steps, self.prefills, self.pool = {}, {}, None
        # Functions, not methods of self: without a cycle, memory is free as soon as the runner is.
        self._step, self._prefill = decode_step, Transformer.logits
        if self.device.type == "cuda":
            self.streams = _streams(self.device)
        else:
            self._step = _compiled(decode_step, dynamic=False) if compile else decode_step
            self._prefill = _compiled(Transformer.logits, dynamic=None) if compile_prefill else Transformer.logits

    def start(self, model: Transformer, rows: int, sampling: Sampling, stop_ids: tuple[int, ...]):
        """Readies the first `rows` rows of state and KV cache for a run, or some more where steps are graphs, and compiles
        or records what is not yet. Raises ValueError for too many stop ids, or --compile on a CPU without a compiler."""
        if self.compile and self.device.type == "cuda":
            rows = min(_padded_rows(rows), self.batch_size)
        if len(stop_ids) > STOP_IDS:
            raise ValueError(f"{len(stop_ids)} stop ids are given; at most {STOP_IDS} can be")
        self.kind = DrawKind.of(sampling, model.config.vocab_size)
        if self.kind.penalize and self.whole_state.seen is None:
            with torch.inference_mode(False):
                shape = (self.batch_size, model.config.vocab_size)
                self.whole_state.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.cache, self.state = self.whole_cache.first_rows(rows), self.whole_state.first_rows(rows)
        self.state.settings.copy_(torch.tensor([getattr(sampling, name) for name in SETTINGS], dtype=torch.float64))
        self.state.stop_ids.copy_(torch.tensor((*stop_ids, *[-1] * (STOP_IDS - len(stop_ids)))))
        self.state.step.zero_()
        if self.device.type == "cpu" and not self.compile and 2 * model.weight_bytes < free_memory(self.device):
            model.pack()
        if not self.compile and not self.compile_prefill:
            return
        try:
            if self.compile and (rows, self.kind) not in self.steps:
                self.steps[rows, self.kind] = self._make_step(model)
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
        """Compiles the step for this number of rows and kind of draw; on CUDA also records it as one graph.

        All rows are done meanwhile: what a step writes then is one cache slot, which prefill or the row's next token
        overwrites.
        """
        self.state.done.fill_(True)
        if self.device.type == "cuda":
            graph = self._record(lambda: self._step(model, self.cache, self.state, self.kind))
        else:  # Inductor then knows the weights and packs them: 1.5 times as fast on 2 cores with AVX512-BF16.
            graph = None
            with torch._inductor.config.patch(freezing=True):
                self._step(model, self.cache, self.state, self.kind)
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
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # other threads may go on
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
        elif self.device.type == "cpu":
            width = min(_few_widths(width), self.length)
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
                logits = self._prefill(model, tokens, self.cache, position, lengths)
        state.position.copy_(lengths + cached)
        state.count.zero_()
        state.max_new_tokens.fill_(max_new_tokens)
        state.done.copy_(torch.arange(len(prompts)) >= len(prompts) - idle)
        state.step.zero_()
        if not self.kind.greedy:
            noise = torch.tensor(noise, dtype=torch.float64)
            state.noise[: len(noise), : noise.shape[1]] = noise.to(self.device)
        if self.kind.penalize:
            if not cached:
                state.seen.zero_()
            state.seen.scatter_(1, tokens, True)
        next_token(state, logits.float(), self.kind)

    def _recorded_prefill(self, model: Transformer, tokens: Tensor, lengths: Tensor) -> Tensor:
        if tokens.shape not in self.prefills:
            tokens, lengths = tokens.clone(), lengths.clone()
            result = []

            def run():
                result[:] = [self._prefill(model, tokens, self.cache, None, lengths)]

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
        on_step: Callable[[int, "Runner"], None] | None = None,
        check: str = "ping-pong",
    ) -> int:
        """Steps until every row is done, `steps` times at most; returns how many there were.

        on_token gets the first row's tokens, the one that prefill drew included. `check`, for the benchmark: whether all
        rows are done is read "ping-pong" as below, after "every" step, or "never". Raises ValueError if a row that is not
        done has logits that are not finite.

        On CUDA two streams alternate. Step i waits, on the device, for the event that step i - 1 records behind its
        last kernel; behind that event comes the copy of the step's row of the log to the host, which runs beside step i,
        and then another event, on which the host waits before it reads the row. It reads row i - 1 while step i runs,
        so that the device never waits for it. Every step has a row of its own on both sides: none is overwritten while
        it is copied or read. The one step too many writes where nobody reads: its rows are done.
        """
        graph = self.steps.get((len(self.state.token), self.kind))
        step = graph.replay if graph is not None else partial(self._step, model, self.cache, self.state, self.kind)
        delivered = 0

        def all_done(i: int) -> bool:
            nonlocal delivered
            done, count, token, finite = self.log[i].tolist()
            if not finite:
                raise ValueError(
                    "the model computes values that are not finite (NaN or infinity): its weights are damaged, or need "
                    "another precision"
                )
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
                    on_step(taken + 1, self)
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
        try:
            while taken < steps:
                if check == "every" or (check == "ping-pong" and taken > 0):
                    i = taken if check == "every" else taken - 1
                    with _range("stop check", self.device):
                        landed[i % 2].synchronize()
                        if all_done(i):
                            break
                if on_step is not None:
                    on_step(taken + 1, self)
                taken += 1
                with torch.cuda.stream(self.streams[taken % 2]), _range("decode step", self.device):
                    stepped[(taken - 1) % 2].wait()
                    step()
                    publish(taken)
        finally:  # after a callback's exception, too: what still runs is ahead of whatever gets this memory next
            for stream in self.streams:
                before.wait_stream(stream)
        if check == "never":
            self.log.copy_(self.state.log)
        torch.cuda.synchronize(self.device)
        for i in range(max(0, taken - 1), taken + 1):
            all_done(i)
        return taken

    def results(self, rows: int) -> list[list[int]]:
        """The new tokens of the first `rows` rows, the stop token included where there is one."""
        counts = self.state.count.tolist()
        return [row[:count] for row, count in zip(self.state.output[:rows].tolist(), counts)]


@cache
def _streams(device: torch.device) -> list:
    """Two, for all runners: libraries keep a workspace for each stream that they ever ran on."""
    return [torch.cuda.Stream(device) for _ in range(2)]


def _range(name: str, device: torch.device):
    """A named NVTX range, which a profiler shows."""
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()


def _padded_rows(rows: int) -> int:
    """How many rows a graph is recorded for: a power of two, or a multiple of 64."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


def _few_widths(width: int) -> int:
    """The next of four widths between powers of two: oneDNN keeps code for every shape of a product that it meets, some
    2 MiB for each width of a prefill, and never frees it."""
    step = 1 << max(0, width.bit_length() - 3)
    return -(-width // step) * step


def _compiled(function: Callable, dynamic: bool | None) -> Callable:
    import torch._dynamo
    import torch._inductor.config

    # A long-lived process may meet many shapes; past the limit fullgraph=True would raise.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


# ---------------------------------------------------------------------------------------------------------------------
# Runners that wait for their next run

_idle: "WeakKeyDictionary[Transformer, Runner]" = WeakKeyDictionary()  # one a model; who runs one has taken it out
_lock = threading.Lock()


@contextmanager
def lease(
    model: Transformer, rows: int, length: int, codec: Codec, compile: bool = False, compile_prefill: bool = False
) -> Iterator[Runner]:
    """A runner of `model` for as long as the context lasts: the one that waits, if it fits the arguments, else a new one.

    Nobody else has it meanwhile: a second thread, or a run that starts within a run, gets another one. Where steps are
    graphs and attention reads what a row has, a larger runner does: lengths and rows are rounded up to a power of two,
    so that a prompt of another length seldom needs a new one. A run that fails leaves no runner behind.
    """
    roomy = compile and model.device.type == "cuda"
    with _lock:
        held = _idle.pop(model, None)
    if held is not None:
        wanted = (codec, compile, compile_prefill, model.ops)
        fits = (held.codec, held.compile, held.compile_prefill, held.ops) == wanted
        same = (held.batch_size, held.length) == (rows, length)
        if not fits or not (same or (roomy and held.batch_size >= rows and held.length >= length)):
            held = None  # freed before the next one is made
    if held is None:
        if roomy:
            more = _padded_rows(rows), min(max(512, 1 << (length - 1).bit_length()), model.config.context_length)
            if cache_bytes(model.config, *more, codec) < free_memory(model.device) // 2:
                rows, length = more
        held = Runner(model, rows, length, codec, compile, compile_prefill)
    yield held
    with _lock:
        _idle[model] = held


def release(model: Transformer):
    """Frees the memory of the runner that waits for the model's next run, if there is one."""
    with _lock:
        _idle.pop(model, None)


def held_bytes(model: Transformer) -> int:
    """Bytes of the KV cache of the runner that waits for the model's next run."""
    with _lock:
        held = _idle.get(model)
    return 0 if held is None else held.whole_cache.bytes
