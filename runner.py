"""The device's side of decoding: the state of a batch, whole-step graphs, and the chain of two streams that runs
them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cache import Codec, KVCache, cache_bytes, pages_of
from config import MAX_STOP_IDS, PAGE
from device import free_memory
from model import Transformer
from ops.common import power_of_2
from ops.next_token import append_run, log_step
from ops.prefix_attention import tile_rows
from ops.rope import Shared
from pages import Pages
from parallel import Sums, agreed_seconds, least
from sampling import (
    ALL_GREEDY,
    SETTINGS,
    DrawKind,
    accept_or_draw,
    distribution,
    draw,
    noise_at,
    penalize,
    penalize_drafts,
)


@dataclass
class State:
    """What a decode step reads and writes, all on the device, for B rows of at most L tokens, to which a step appends
    runs of at most R.

    A row that is done keeps its position and count; a step still writes a slot of its cache, behind its tokens, or page
    0 if it has none.
    """

    token: Tensor  # [B], each row's newest
    position: Tensor  # [B], how many of its tokens are in the KV cache
    count: Tensor  # [B], how many new ones it has
    max_new_tokens: Tensor  # [B], how many they may be
    done: Tensor  # [B], bool
    finite: Tensor  # [B], bool: whether the logits of its newest run were
    noise: Tensor  # [B, S * (L + 1)], float64 in [0, 1), S for each new token: 1, or 3 where drafts may be rejected
    seen: Tensor | None  # [B, V], bool: what repetition_penalty is for
    history: Tensor | None  # [B, L + R], all its tokens, the newest at its position: what lookup is for
    hidden: Tensor | None  # [B, N], the model's last state at its newest token but one; None where nobody needs it
    settings: Tensor  # [B, len(SETTINGS)], float64: Sampling's values in their order
    stop_ids: Tensor  # [MAX_STOP_IDS], -1 where there is none
    log: Tensor  # [L + 1, B, 3 + R], int32, an entry a step, in turn: done, count, finite, and its run's tokens first
    step: Tensor  # [1], how many entries were written

    @classmethod
    def empty(
        cls,
        batch_size: int,
        length: int,
        device: torch.device,
        run: int = 1,
        history: bool = False,
        streams: int = 1,
    ) -> "State":
        """The state of batch_size rows of at most `length` tokens, `run` a step at most, all of them done, without what
        only some runs need."""

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            token=zeros(batch_size),
            position=zeros(batch_size),
            count=zeros(batch_size),
            max_new_tokens=zeros(batch_size),
            done=torch.ones(batch_size, dtype=torch.bool, device=device),
            finite=torch.ones(batch_size, dtype=torch.bool, device=device),
            noise=zeros(batch_size, streams * (length + 1), dtype=torch.float64),
            seen=None,
            history=zeros(batch_size, length + run) if history else None,
            hidden=None,
            settings=zeros(batch_size, len(SETTINGS), dtype=torch.float64),
            stop_ids=zeros(MAX_STOP_IDS),
            log=zeros(length + 1, batch_size, 3 + run, dtype=torch.int32),
            step=zeros(1),
        )

    def first_rows(self, count: int) -> "State":
        """A view of the first `count` rows, in the same memory."""
        values = {name: getattr(self, name) for name in ROW_FIELDS}
        rows = {name: value if value is None else value[:count] for name, value in values.items()}
        return State(**rows, stop_ids=self.stop_ids, log=self.log[:, :count], step=self.step)


ROW_FIELDS = tuple(field.name for field in fields(State) if field.name not in ("stop_ids", "log", "step"))


NOT_FINITE = (
    "the model computes values that are not finite (NaN or infinity): its weights are damaged, "
    "or need another precision"
)


def decode_step(
    model: Transformer,
    cache: KVCache,
    state: State,
    kind: DrawKind,
    shared: Shared | None = None,
    drafter=None,
    drafts: int = 0,
):
    """Computes, draws and appends one token for each row, or a run of them behind so many drafts, and writes the log."""
    tokens, guessed, states, before = state.token[:, None], None, None, state.count
    probabilities = None
    if drafts:
        guessed, probabilities = guesses(drafter, model, cache, state, kind, drafts)
        guessed = guessed if model.sums is None else model.sums.of_first(guessed)
        tokens = torch.cat((tokens, guessed), dim=1)
    if state.hidden is not None:
        states, before = state.hidden.new_empty(tokens.numel(), state.hidden.shape[1]), state.count.clone()
    own, greedy = cache.part(0, model.config.n_layers), kind == ALL_GREEDY
    options = {"shared": shared, "decoding": True, "states": states, "own_logits": greedy}
    logits = model.logits(tokens, own, state.position, None, drafts > 0, **options).flatten(0, -2)
    if greedy:
        model.ops.greedy(logits, state, guessed, model.sums, model.config.vocab_size)
    else:
        log_step(state, next_token(state, logits.float(), kind, guessed, probabilities, model.sums))
    if states is not None:  # of the token that the newest one was drawn behind
        last = torch.arange(0, len(states), tokens.shape[1], device=states.device) + state.count - before - 1
        state.hidden.copy_(states[last.clamp(min=0)])


def guesses(drafter, model: Transformer, cache: KVCache, state: State, kind: DrawKind, count: int):
    """Drafts [B, count], and what they were drawn with, where they may be rejected."""
    if drafter.streams > 1 and kind != ALL_GREEDY:
        return drafter.drawn(model, cache, state, kind, count)
    return drafter.drafts(model, cache, state, kind, count), None


def next_token(
    state: State,
    logits: Tensor,
    kind: DrawKind,
    drafts: Tensor | None = None,
    probabilities: Tensor | None = None,
    sums: Sums | None = None,
) -> Tensor:
    """Draws a token for each of T places of each row from logits [B * T, V] in float32, behind drafts [B, T - 1], and
    appends each row's run of them. Returns all tokens [B, T] that were drawn.

    A place's noise is that of the token's number, and what is penalized there is what the row has seen and the drafts
    before it: it draws what a step of its own would, had the drafts been drawn. Drafts that were drawn with
    `probabilities` [B, T - 1, V] may be rejected instead. With `sums` all ranks take what the first one draws.
    """
    rows, computed = len(state.token), logits
    place = torch.arange(len(logits) // rows, device=logits.device)
    settings = state.settings[:, None].expand(-1, len(place), -1).flatten(0, 1)
    settings = dict(zip(SETTINGS, settings.split(1, dim=1)))
    if kind.penalize:
        penalty = settings["repetition_penalty"].view(rows, -1, 1)
        at_places = logits.view(rows, len(place), -1)
        logits = penalize(at_places, state.seen[:, None], penalty)
        if drafts is not None:
            penalize_drafts(logits, at_places, drafts, penalty)
        logits = logits.flatten(0, 1)
    number = state.count[:, None] + place
    if probabilities is None:
        number = number.clamp(max=state.noise.shape[1] - 1)
        token = draw(logits, state.noise.gather(1, number).flatten(), settings, kind).view(rows, -1)
    else:
        noise = torch.stack([noise_at(state.noise, number, stream) for stream in (1, 2)])
        wanted = distribution(logits, settings, kind).view(rows, len(place), -1)
        token, drafts = accept_or_draw(wanted, probabilities, drafts, noise)
    if sums is not None:
        token, drafts = sums.of_first(token), None if drafts is None else sums.of_first(drafts)
    length = append_run(state, computed, token, drafts)
    if kind.penalize:  # what a row draws that is done is not seen: a conversation goes on with the others
        appended = token.gather(1, place.minimum((length - 1).clamp(min=0)[:, None]))
        state.seen.scatter_(1, appended, state.seen.gather(1, appended) | (length > 0)[:, None])
    return token


class Runner:
    """The state and KV cache of up to `batch_size` rows of at most `length` tokens, allocated once, and what advances
    them.

    Rows share `page_count` pages of the cache (default: enough for all of them), which `pages` gives out. A runner may
    serve many runs, one at a time: prompts, sampling and, on a GPU, the number of rows change between them, and
    within a run `admit` fills rows with new prompts, whatever the others do. `compile` records the decode step as one
    CUDA graph, once for each number of rows and of drafts and `DrawKind`, all in one memory pool; on a CPU torch.compile
    makes the step. `compile_prefill` does so with prefill, for prompts padded to a power of two. With a `drafter`
    (speculate.py) steps append runs of `longest_run` tokens at most. Raises ValueError for an FP8 cache whose scales are
    bad.

    `admit` and `step` are events of one chain: each begins, on the device, when the one before has ended, and writes an
    entry of the log, which `read` gives to the host. On CUDA two streams alternate. Event i waits, on the device, for
    the CUDA event that event i - 1 records behind its last kernel; behind that comes the copy of the log's entry to the
    host, which runs beside event i, and then another CUDA event, on which `read` waits. Who reads entry i - 1 while
    event i runs never lets the device wait. An entry is read before the log, which has one for every token of a row,
    comes round to it.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        length: int,
        codec: Codec,
        compile: bool = False,
        compile_prefill: bool = False,
        page_count: int | None = None,
        drafter=None,
        longest_run: int = 1,
    ):
        model.kv_scales.check(codec)
        self.batch_size, self.length, self.codec = batch_size, length, codec
        self.drafter, self.longest_run = drafter, longest_run
        self.draft_model = None if drafter is None else drafter.model  # one with a cache of its own
        page_count = 1 + batch_size * -(-length // PAGE) if page_count is None else page_count
        self.compile, self.compile_prefill = compile, compile_prefill
        self.device, self.ops, self.packs, self.sums = model.device, model.ops, model.ops.packs, model.sums
        models = [model] if self.draft_model is None else [model, self.draft_model]
        ahead = longest_run - 1
        length = cache_length(length, ahead)
        rings = batch_size + max(snapshots_of(each.config, batch_size, length, ahead) for each in models)
        caches = [
            KVCache.empty(each.config, rings, length, codec, self.device, each.kv_scales, page_count, ahead)
            for each in models
        ]
        self.whole_cache = caches[0] if len(caches) == 1 else caches[0].joined(caches[1])
        self.weights = None  # whose keys and values `pages` knows
        self.free_rings = list(range(batch_size, rings))  # for snapshots, which `pages` has of prefixes
        self.pages = Pages(page_count, snapshots=rings > batch_size, on_evict=self.free_rings.append)
        with torch.inference_mode(False):  # usable in and out of that mode, whoever asked first
            self.streams_of_noise = 1 if drafter is None else drafter.streams
            of_drafts = longest_run, drafter is not None, self.streams_of_noise
            self.whole_state = State.empty(batch_size, self.length, self.device, *of_drafts)
            if drafter is not None and drafter.needs_states:
                shape = batch_size, model.config.hidden_size
                self.whole_state.hidden = torch.zeros(shape, dtype=model.dtype, device=self.device)
            self.log = torch.zeros_like(self.whole_state.log, device="cpu", pin_memory=self.device.type == "cuda")
        self.cache, self.state = self.whole_cache, self.whole_state  # of the rows that are in use
        self.kind, self.events, self.entries, self.prefills_timed = ALL_GREEDY, 0, 0, []
        self.seconds = [0.0] * 4  # that the last events took, on a CPU
        self.steps, self.prefills, self.pool = {}, {}, None
        self.recording = False  # or compiling a step, which takes longer than steps do
        self.timed = {}  # seconds of recorded steps and of making their drafts
        self.groups, self.shared, self.whole_shared = [], {}, {}  # of rows in use; by tokens a row: in whose memory
        self.tile_of = *model.config.global_group, model.dtype
        # Functions, not methods of self: without a cycle, memory is free as soon as the runner is.
        self._step, self._run_prefill = decode_step, Transformer.logits
        if self.device.type == "cuda":
            self.streams = _streams(self.device)
            self.ended = [torch.cuda.Event() for _ in range(4)]
            # Apart: a stream waits longer for an event that takes the time
            self.clocks = [torch.cuda.Event(enable_timing=True) for _ in range(4 * (drafter is not None))]
            self.landed = [torch.cuda.Event() for _ in range(2)]
        else:
            self._step = _compiled(decode_step, dynamic=False) if compile else decode_step
            self._run_prefill = _compiled(Transformer.logits, dynamic=None) if compile_prefill else Transformer.logits

    def start(
        self,
        model: Transformer,
        rows: int,
        kind: DrawKind,
        stop_ids: tuple[int, ...],
        prefix_cache: bool = True,
        runs: tuple[int, ...] = (1,),
    ):
        """Readies the first `rows` rows of state and KV cache for a run, or some more where steps are graphs, and
        compiles or records what is not yet: steps of so many tokens a row, for each of `runs`. Without prefix_cache,
        nothing is kept of earlier prompts. Raises ValueError for too many stop ids, or --compile on a CPU without a
        compiler."""
        if self.compile and self.device.type == "cuda":
            rows = min(_padded_rows(rows), self.batch_size)
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(stop_ids)} stop ids are given; at most {MAX_STOP_IDS} can be")
        self.kind = kind
        self.pages.keep(prefix_cache)
        if kind.penalize and self.whole_state.seen is None:
            with torch.inference_mode(False):
                shape = (self.batch_size, model.config.vocab_size)
                self.whole_state.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self._use(rows)
        for table in self.whole_cache.tables.values():
            table.zero_()
        self.groups, self.shared, self.events, self.entries, self.prefills_timed = [], {}, 0, 0, []
        self.state.stop_ids.copy_(torch.tensor((*stop_ids, *[-1] * (MAX_STOP_IDS - len(stop_ids)))))
        self.state.done.fill_(True)
        if not self.compile:
            pack_weights(model, self.draft_model)
        try:
            for run in runs:
                self._made_step(model, run)
            if self.compile_prefill and self.device.type == "cpu" and rows not in self.prefills:
                width = min(8, self.length)
                tokens = torch.zeros(rows, width, dtype=torch.long)
                cache = self.cache.rows(torch.arange(rows))  # what prefill's own is to the compiler
                self._logits(
                    model, False, tokens, cache.part(0, model.config.n_layers), None, torch.full((rows,), width)
                )
                self.prefills[rows] = None
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from None
            if "InvalidCxxCompiler" not in f"{error!r}{error.__cause__!r}":
                raise
            raise ValueError("--compile needs a C++ compiler: install g++ or leave it out") from None
        recorded = len(runs) > 1 and self.compile and self.device.type == "cuda"
        self.step_seconds = self.timed.setdefault((len(self.state.token), kind), {})  # `Pace` goes on with it
        self.step_seconds |= {run: self._timed(run) for run in runs} if recorded else {}
        self.state.step.zero_()
        self.state.position.zero_()  # of rows that stay idle: their steps read one slot
        if self.device.type == "cuda":
            self.before = torch.cuda.current_stream()
            self.streams[0].wait_stream(self.before)

    def _made_step(self, model: Transformer, run: int = 1) -> "torch.cuda.CUDAGraph | None":
        """The graph of a step of `run` tokens of each row in use; compiles the step, and on CUDA records it, if that is
        still to do."""
        shared = self._shared(run)
        key = len(self.state.token), run, self.kind, shared and (shared.rows, len(shared.tiles))
        if self.compile and key not in self.steps:
            if self.events and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the chain goes on behind it
            self.recording = True
            try:
                self.steps[key] = self._make_step(model, shared, run)
            except torch.OutOfMemoryError:
                if not self.events:
                    raise
                self.steps[key] = None  # in the middle of a run a step can do without a graph
            finally:
                self.recording = False
        return self.steps.get(key)

    def _timed(self, run: int) -> float:
        """Seconds of a recorded step of `run` tokens a row, all of which are done."""
        key = len(self.state.token), run, self.kind, None
        if key not in self.timed:
            self.timed[key] = agreed_seconds(self.sums, _seconds_on_gpu(self.steps[key].replay))
        return self.timed[key]

    def _make_step(self, model: Transformer, shared: Shared | None, run: int) -> "torch.cuda.CUDAGraph | None":
        """Compiles the step for this number of rows and kind of draw; on CUDA also records it as one graph.

        All rows are done meanwhile: what a step writes then is one cache slot, which prefill or the row's next token
        overwrites.
        """
        state = self.state
        kept = (state.done, state.token, state.finite, state.step, state.hidden)
        kept = [(x, x.clone()) for x in kept if x is not None]
        state.done.fill_(True)
        try:
            if self.device.type == "cuda":
                return self.record(lambda: self._advance(model, self.cache, shared, run))
            # Inductor then knows the weights and packs them: 1.5 times as fast on 2 cores with AVX512-BF16.
            with torch._inductor.config.patch(freezing=True):
                self._advance(model, self.cache, shared, run)
        finally:
            for x, value in kept:
                x.copy_(value)

    def _advance(self, model: Transformer, cache: KVCache, shared: Shared | None, run: int):
        self._step(model, cache, self.state, self.kind, shared, self.drafter, run - 1)

    def record(self, run: Callable):
        """One CUDA graph of what `run` launches. It runs twice before: kernels are compiled, libraries take memory."""
        with _recording:
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

    def _use(self, rows: int):
        """The first `rows` rows are in use from now on."""
        self.cache, self.state = self.whole_cache.rows(slice(0, rows)), self.whole_state.first_rows(rows)

    def admit(self, model: Transformer, pieces: list, retired: list[int] = ()):
        """Fills the cache with pieces of prompts, starts the rows whose prompts end with them, and draws their first
        tokens: an event of the chain. `retired` rows end before it, as in `step`.

        A piece is a `scheduler.Piece`: it names tokens of a request's prompt, the row, and its pages and ring in the
        cache."""

        def run():
            self._retire(retired)
            logits, states, cache = self.prefill_pieces(model, pieces)
            ending = [i for i, piece in enumerate(pieces) if piece.ends]
            if len(ending) < len(pieces):
                index = self.sent(ending)
                logits, cache = logits[index], cache.rows(index)
                states = None if states is None else states[index]
            if ending:
                self._start_rows([pieces[i].running for i in ending], logits, states, cache, model.sums)
            log_step(self.state, self.state.token[:, None])

        with _range("prefill", self.device):
            self._event(run, prefill=True)

    def _start_rows(
        self, started: list, logits: Tensor, states: Tensor | None, cache: KVCache, sums: Sums | None = None
    ):
        """Starts rows [N] whose prompts' last tokens have these logits [N, V] and last states, and whose tables `cache`
        has."""
        index, state = self.sent([each.row for each in started]), self._state_of([each.request for each in started])
        prompts = [each.request.prompt for each in started]
        state.position.copy_(self.sent([len(prompt) - 1 for prompt in prompts]))
        if self.kind.penalize or self.state.history is not None:
            width = 1 + max(map(len, prompts))  # padded by a token of its own: none that would count as seen besides
            tokens = self.sent([[*prompt, *prompt[:1] * (width - len(prompt))] for prompt in prompts])
            if self.kind.penalize:
                state.seen = torch.zeros_like(self.state.seen[: len(prompts)]).scatter_(1, tokens, True)
            if self.state.history is not None:
                state.history = tokens
        state.hidden = states
        next_token(state, logits.float(), self.kind, sums=sums)
        for name in ROW_FIELDS:
            mine, value = getattr(self.state, name), getattr(state, name)
            if value is not None:
                mine = mine if value.dim() == 1 else mine[:, : value.shape[1]]
                mine.index_copy_(0, index, value)
        for ring, table in self.cache.tables.items():
            table.index_copy_(0, index, cache.tables[ring])

    def prefill_pieces(self, model: Transformer, pieces: list) -> tuple[Tensor, Tensor | None, KVCache]:
        """Fills the caches of pieces [N], but for followers only with what they don't share. Returns logits [N, V] of
        their last tokens, their last states, where drafts are made of these, and the cache as their rows see it."""
        cache = self.whole_cache.with_tables(self.tables([piece.running for piece in pieces]))
        self._copy_rings([(piece.snapshot, piece.running.ring) for piece in pieces if piece.snapshot is not None])
        logits, states = self._computed(model, pieces, cache)
        self._copy_rings([(piece.running.ring, piece.keep) for piece in pieces if piece.keep is not None])
        return logits, states, cache

    def _copy_rings(self, pairs: list[tuple[int, int]]):
        """Copies local layers' rings, (from, to) each."""
        for width in filter(None, self.whole_cache.tables if pairs else ()):
            pages = self.sent([[[1 + ring * width + i for i in range(width)] for ring in pair] for pair in pairs])
            self.whole_cache.copy_pages(width, pages[:, 0].flatten(), pages[:, 1].flatten())

    def _computed(self, model: Transformer, pieces: list, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """Fills the caches of pieces, as `prefill_pieces` does, and returns its logits and states."""
        computed = [i for i, piece in enumerate(pieces) if piece.leader is None]
        of_computed = cache if len(computed) == len(pieces) else cache.rows(self.sent(computed))
        texts = [(piece.begin, piece.prompt[piece.begin : piece.end]) for piece in pieces if piece.leader is None]
        if self.draft_model is not None:
            self._prefill(self.draft_model, texts, of_computed, draft=True)
        logits, states = self._prefill(model, texts, of_computed)
        if len(computed) == len(pieces):
            return logits, states
        place = {i: n for n, i in enumerate(computed)}
        index = self.sent([place[i if piece.leader is None else piece.leader] for i, piece in enumerate(pieces)])
        logits, states = logits[index], None if states is None else states[index]
        copies = [(piece.leader, i, piece.end // PAGE) for i, piece in enumerate(pieces) if piece.leader is not None]
        source, to, _ = self.sent(copies).unbind(1)
        for ring in filter(None, cache.tables):
            cache.copy_pages(ring, *(cache.tables[ring][rows].flatten() for rows in (source, to)))
        copies = [each for each in copies if pieces[each[1]].end % PAGE]  # the page that a prompt ends in
        if copies and 0 in cache.tables:
            source, to, block = self.sent(copies).unbind(1)
            cache.copy_pages(0, cache.tables[0][source, block], cache.tables[0][to, block])
        return logits, states

    def tables(self, rows: list) -> dict[int, Tensor]:
        """The tables of what runs in these rows."""
        tables = {}
        for ring, table in self.whole_cache.tables.items():
            width = table.shape[1]
            pages = [
                range(1 + each.ring * width, 1 + each.ring * width + width) if ring else each.held.pages
                for each in rows
            ]
            tables[ring] = self.sent([[*each, *[0] * (width - len(each))] for each in pages], torch.int32)
        return tables

    def catch_up(self, pieces: list[tuple[object, int, list[int]]]):
        """Fills the draft model's cache with tokens that steps without drafts have made: an event of the chain. Of each
        row a piece says what runs there, how many tokens are there already, and those that come behind them."""

        def run():
            cache = self.whole_cache.with_tables(self.tables([running for running, _, _ in pieces]))
            self._prefill(self.draft_model, [text for _, *text in pieces], cache, draft=True)
            log_step(self.state, self.state.token[:, None])

        with _range("prefill", self.device):
            self._event(run, prefill=True)

    def _prefill(
        self, model: Transformer, pieces: list[tuple[int, list[int]]], cache: KVCache, draft: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [N, V] of the last tokens of pieces [N], tokens behind so many others, whose rows `cache` has: packed,
        or padded on the right. The model is that of drafts, or the one that runs, whose states are returned, too."""
        cache = self._own_part(cache, draft)
        begins, texts = zip(*pieces)
        lengths, longest, total = self.sent([len(text) for text in texts]), max(map(len, texts)), sum(map(len, texts))
        position = self.sent(list(begins)) if any(begins) else None
        if self.packs:
            record = self.compile_prefill and self.device.type == "cuda" and not self.events
            width = power_of_2(max(64, total)) if record else -(-total // 64) * 64  # few shapes for libraries to meet
            tokens = self.sent([token for text in texts for token in text] + [0] * (width - total))
            if record:
                return self._recorded_prefill(
                    model, draft, tokens, cache, position, lengths, max(16, power_of_2(longest))
                )
            cache = cache.shortened(max(begins) + longest)  # keys made of values take memory
            return self._logits(model, draft, tokens, cache, position, lengths, False, longest)
        if self.compile_prefill:
            longest = max(longest, 2)  # a length of 1 would be compiled apart
        elif self.device.type == "cpu":
            longest = _few_widths(longest)
        tokens = self.sent([text + [0] * (longest - len(text)) for text in texts])
        if not self.compile_prefill:  # the definition reads all pages that there are
            cache = cache.shortened(max(begins) + longest)
        return self._logits(model, draft, tokens, cache, position, lengths)

    def _own_part(self, cache: KVCache, draft: bool) -> KVCache:
        """The part of the runner's cache that the draft model has, behind the other's, or that one's."""
        if self.draft_model is None:
            return cache
        first = len(cache.layers) - self.draft_model.config.n_layers
        return cache.part(first) if draft else cache.part(0, first)

    def _state_of(self, requests: list) -> State:
        """A state of one row a request, before its first token."""
        state = State.empty(len(requests), 0, self.device)
        state.done.zero_()
        state.stop_ids = self.state.stop_ids
        state.max_new_tokens = self.sent([request.max_new_tokens for request in requests])
        values = [[getattr(request.sampling, name) for name in SETTINGS] for request in requests]
        state.settings = self.sent(values, torch.float64)
        noise = [request.noise(self.streams_of_noise) for request in requests]
        longest = max(1, *map(len, noise))
        state.noise = self.sent([each + [0.0] * (longest - len(each)) for each in noise], torch.float64)
        return state

    def sent(self, values: list, dtype: torch.dtype = torch.long) -> Tensor:
        """On the device; the host goes on meanwhile."""
        values = torch.tensor(values, dtype=dtype)
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values

    def _logits(self, model: Transformer, draft: bool, tokens: Tensor, cache, position, lengths, *rest):
        if self.compile_prefill and self.device.type == "cpu":
            torch._dynamo.mark_dynamic(tokens, 1)
        hidden, states = self.whole_state.hidden, None
        if hidden is not None and not draft:
            states = hidden.new_empty(len(lengths), hidden.shape[1])
        return self._run_prefill(model, tokens, cache, position, lengths, *rest, states=states), states

    def _recorded_prefill(self, model: Transformer, draft: bool, tokens, cache, position, lengths, longest) -> Tensor:
        key = draft, len(tokens), len(lengths), longest, position is None
        inputs = [tokens, lengths, *cache.tables.values(), *([] if position is None else [position])]
        if key not in self.prefills:
            held = [x.clone() for x in inputs]
            tables, result = dict(zip(cache.tables, held[2:])), []

            def run():
                view = self._own_part(self.whole_cache.with_tables(tables), draft)
                arguments = held[0], view, None if position is None else held[-1], held[1], False, longest
                result[:] = [self._logits(model, draft, *arguments)]

            self.prefills[key] = self.record(run), held, result[0]
        graph, held, results = self.prefills[key]
        for mine, value in zip(held, inputs):
            mine.copy_(value)
        graph.replay()
        return results

    def step(
        self,
        model: Transformer,
        retired: list[int] = (),
        groups: list[tuple[int, list[int]]] | None = None,
        order: list[int] | None = None,
        run: int = 1,
    ):
        """One more token for each row that is not done, or with drafts up to `run` of them: an event of the chain.

        `retired` rows end before it, whatever they still might make: their pages may belong to others from now on.
        With `order`, only so many rows run from now on: the first is what row order[0] was, and so on. groups are
        (tokens, rows) of rows that begin with the same pages, and of how many tokens, as long as no others are given.
        """

        def step():
            self._retire(retired)
            if order is not None:
                self._move(order)
            if groups is not None:
                self.groups, self.shared = groups, {}
            graph = self._made_step(model, run)
            if graph is not None:
                graph.replay()
            else:
                cache = self.cache
                if self.device.type == "cpu" and not self.compile:  # whose definition reads all pages that there are
                    cache = cache.shortened(int(self.state.position.max()) + run)
                self._advance(model, cache, self._shared(run), run)

        with _range("decode step", self.device):
            self._event(step)

    def fewer_rows(self, rows: int) -> int:
        """How many rows a step has in which `rows` run: as many as now, where another number had to be compiled."""
        if self.compile:
            return _padded_rows(rows) if self.device.type == "cuda" else self.batch_size
        return rows

    def _move(self, order: list[int]):
        index = self.sent(order)
        for name in ROW_FIELDS:
            if (value := getattr(self.state, name)) is not None:
                value[: len(order)] = value[index]
        for table in self.cache.tables.values():
            table[: len(order)] = table[index]
        self._use(len(order))

    def _shared(self, run: int) -> Shared | None:
        """Tells attention which rows share a prefix, in steps of `run` tokens a row, always in the same memory."""
        if not self.groups:
            return None
        if run in self.shared:
            return self.shared[run]
        rows = len(self.state.token)
        if run not in self.whole_shared:
            with torch.inference_mode(False):
                shapes = (self.batch_size,), (self.batch_size * run,), (power_of_2(self.batch_size * run), 2)
                self.whole_shared[run] = [torch.zeros(x, dtype=torch.int32, device=self.device) for x in shapes]
        largest = run * max(len(members) for _, members in self.groups)
        tile = tile_rows(largest, *self.tile_of)
        prefix, order, tiles = [0] * rows, [], []
        for tokens, members in self.groups:
            tiles += [(len(order) + i, min(tile, run * len(members) - i)) for i in range(0, run * len(members), tile)]
            order += [row * run + i for row in members for i in range(run)]
            for row in members:
                prefix[row] = tokens
        whole = self.whole_shared[run]
        shared = Shared(whole[0][:rows], whole[1][: rows * run], whole[2][: power_of_2(len(tiles))], tile)
        tiles += [(0, 0)] * (len(shared.tiles) - len(tiles))
        order += [0] * (rows * run - len(order))
        for mine, values in ((shared.prefix, prefix), (shared.order, order), (shared.tiles, tiles)):
            mine.copy_(self.sent(values, torch.int32))
        self.shared[run] = shared
        return shared

    def _retire(self, rows: list[int]):
        if rows:
            index = self.sent(rows)
            self.state.done.index_fill_(0, index, True)
            self.state.position.index_fill_(0, index, 0)
            for table in self.cache.tables.values():
                table.index_fill_(0, index, 0)

    def _event(self, run: Callable, prefill: bool = False):
        """Runs `run`, which writes an entry of the log, behind the event before, and has the entry copied to the
        host."""
        entry = self.events % len(self.log)
        if self.device.type == "cpu":
            start = time.perf_counter()
            run()
            self.log[entry, : len(self.state.token)] = self.state.log[entry]
            self.seconds[self.events % 4] = time.perf_counter() - start
            if prefill:
                self.prefills_timed.append(self.seconds[self.events % 4])
        else:
            # Prefills take one of the streams only: what it frees is reused there
            with torch.cuda.stream(self.streams[0 if prefill else self.events % 2]):
                if self.events:
                    self.ended[(self.events - 1) % 4].wait()
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * prefill)]
                for mark in marks[:1]:
                    mark.record()
                run()
                for mark in marks[1:]:
                    mark.record()
                self.prefills_timed += [marks] if marks else []
                self.ended[self.events % 4].record()
                if self.clocks:
                    self.clocks[self.events % 4].record()
                self.log[entry, : len(self.state.token)].copy_(self.state.log[entry], non_blocking=True)
                self.landed[self.events % 2].record()
        self.events += 1

    def read(self) -> list[list[int]]:
        """[done, count, finite, *tokens] of each row after the next event whose entry of the log was not read yet.
        The tokens that the event has appended are the first of these, as many as the count has grown by.

        Raises ValueError if the logits of a row that was not done are not finite."""
        if self.device.type == "cuda":
            with _range("stop check", self.device):
                self.landed[self.entries % 2].synchronize()
        entry = self.log[self.entries % len(self.log), : len(self.state.token)].tolist()
        self.entries += 1
        if not all(finite for _, _, finite, *_ in entry):
            raise ValueError(NOT_FINITE)
        return entry

    def draft_seconds(self, model: Transformer, run: int) -> float:
        """How long drafts take of a step of `run` tokens a row: measured once, behind a run of the chain; 0 where they
        are compiled with the step."""
        if self.compile and self.device.type == "cpu":
            return 0.0
        key = len(self.state.token), run, self.kind, "drafts"
        if key not in self.timed:

            def drafts():
                guesses(self.drafter, model, self.cache, self.state, self.kind, run - 1)

            if self.device.type == "cuda":
                self.timed[key] = _seconds_on_gpu(self.record(drafts).replay if self.compile else drafts)
            else:
                start = time.perf_counter()
                drafts()
                self.timed[key] = time.perf_counter() - start
        return self.timed[key]

    def seconds_of_last(self) -> float | None:
        """How long the event took whose entry was read last, to the first rank; None where that is not known: of the
        first, or where events come that are not read at once."""
        event = self.entries - 1
        if self.device.type == "cpu":
            return agreed_seconds(self.sums, self.seconds[event % 4])
        if not event or self.drafter is None or self.events - event > 3:
            return None
        return agreed_seconds(self.sums, self.clocks[(event - 1) % 4].elapsed_time(self.clocks[event % 4]) / 1000)

    def finish(self) -> float:
        """Ends a run, also one that failed: what comes next on the device waits for the chain. Returns the seconds that
        its prefills took."""
        if self.device.type == "cpu":
            return sum(self.prefills_timed)
        for stream in self.streams:
            self.before.wait_stream(stream)
        self.before.synchronize()
        return sum(start.elapsed_time(end) / 1000 for start, end in self.prefills_timed)


def cache_length(length: int, ahead: int) -> int:
    """Of how many tokens a row's cache is that has `length`, and room behind them for drafts."""
    return -(-(length + ahead) // PAGE) * PAGE if ahead else length


def snapshots_of(config, batch_size: int, length: int, ahead: int = 0) -> int:
    """How many rings more than rows a runner has: none where no layer has one."""
    rings = any(pages_of(config, i, length, ahead)[1] for i in range(config.n_layers))
    return min(8, 1 + batch_size // 8) if rings else 0


def configs_of(model: Transformer, drafter) -> list:
    """Those of the models that have a KV cache: this one, and that of drafts, if there is one."""
    return [each.config for each in (model, drafter and drafter.model) if each is not None]


def runner_bytes(configs: list, rows: int, length: int, codec: Codec, pages: int, longest_run: int = 1) -> int:
    """Bytes of the KV caches, noise and log of a runner with these rows and pages, of a model and perhaps that of its
    drafts."""
    ahead = longest_run - 1
    length = cache_length(length, ahead)
    rings = rows + max(snapshots_of(config, rows, length, ahead) for config in configs)
    caches = sum(cache_bytes(config, rings, length, codec, pages, ahead) for config in configs)
    return caches + (24 + (8 + 4 * longest_run if ahead else 0)) * rows * length


def activation_bytes(model: Transformer, tokens: float) -> float:
    """Bytes that a prefill of so many tokens takes: mostly activations of the feed-forward layer, some at once."""
    config = model.config
    widths = [4 * config.intermediate_size_of(config.n_layers - 1), 6 * config.hidden_size]
    widths.append(config.n_layers * config.per_layer_size * 3)
    widths.append(config.n_active_experts * (3 * config.hidden_size + 3 * config.expert_size))  # a copy for each expert
    of_sums = 0 if model.sums is None else model.sums.shard.count * config.hidden_size * torch.float32.itemsize
    return tokens * (sum(widths) * model.dtype.itemsize + of_sums)


def pack_weights(model: Transformer, draft_model: Transformer | None = None):
    """Prepares eager runs on a CPU (`Transformer.pack`), if there is memory for the weights once more on all ranks."""
    device = model.device
    if device.type == "cpu" and least(model.sums, free_memory(device) - 2 * model.weight_bytes) > 0:
        for each in filter(None, (model, draft_model)):
            each.pack()


def _seconds_on_gpu(run: Callable) -> float:
    """Of the second of two runs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@cache
def _streams(device: torch.device) -> list:
    """Two, for all runners: libraries keep a workspace for each stream that they ever ran on."""
    return [torch.cuda.Stream(device) for _ in range(2)]


def _range(name: str, device: torch.device):
    """A named NVTX range, which a profiler shows."""
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()


def _padded_rows(rows: int) -> int:
    """How many rows a graph is recorded for: a power of two, or a multiple of 64."""
    return power_of_2(rows) if rows <= 64 else -(-rows // 64) * 64


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
_lock, _recording = threading.Lock(), threading.Lock()  # one thread at a time records a graph


@contextmanager
def lease(
    model: Transformer,
    rows: int,
    length: int,
    codec: Codec,
    compile: bool = False,
    compile_prefill: bool = False,
    pages: int | None = None,
    drafter=None,
    longest_run: int = 1,
) -> Iterator[Runner]:
    """A runner of `model` for as long as the context lasts, with at least so many pages (None: enough for all rows):
    the one that waits, if it fits the arguments, else a new one.

    Nobody else has it meanwhile: a second thread, or a run that starts within a run, gets another one. Where steps are
    graphs and attention reads what a row has, a larger runner does: lengths and rows are rounded up to a power of two,
    so that a prompt of another length seldom needs a new one. A run that fails leaves no runner behind.
    """
    roomy = compile and model.device.type == "cuda"
    pages = 1 + rows * -(-length // PAGE) if pages is None else pages
    with _lock:
        held = _idle.pop(model, None)
    if held is not None:
        wanted = (codec, compile, compile_prefill, model.ops, drafter, longest_run)
        has = (held.codec, held.compile, held.compile_prefill, held.ops, held.drafter, held.longest_run)
        fits = has == wanted and held.pages.count >= pages
        same = (held.batch_size, held.length) == (rows, length)
        if not fits or not (same or (roomy and held.batch_size >= rows and held.length >= length)):
            held = None  # freed before the next one is made
    if held is None:
        if roomy:
            more = _padded_rows(rows), min(max(512, power_of_2(length)), model.config.context_length)
            free = least(model.sums, free_memory(model.device))
            if runner_bytes(configs_of(model, drafter), *more, codec, pages, longest_run) < free // 2:
                rows, length = more
        held = Runner(model, rows, length, codec, compile, compile_prefill, pages, drafter, longest_run)
    if held.weights != (weights := _versions(model)):
        held.pages.forget()  # what other weights have made of prompts
        held.weights = weights
    yield held
    assert not held.pages.held, "pages were not given back"
    with _lock:
        _idle[model] = held


def _versions(model: Transformer) -> list[tuple[int, int]]:
    """What changes when weights do: where each is, and how often it was written in place, as far as PyTorch counts."""
    return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in model.parameters()]


def release(model: Transformer):
    """Frees the memory of the runner that waits for the model's next run, if there is one."""
    with _lock:
        _idle.pop(model, None)


def held_bytes(model: Transformer) -> int:
    """Bytes of the KV cache of the runner that waits for the model's next run."""
    with _lock:
        held = _idle.get(model)
    return 0 if held is None else held.whole_cache.bytes
