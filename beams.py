"""Beam search, as transformers defines it (version 5, `GenerationMixin._beam_search` without sampling).

Each prompt has W beams: the W most probable continuations so far, none of which has ended. A step extends them all by
every token of the vocabulary and looks at the best of the results. Those that end there, with a stop id or at the limit,
become hypotheses if they are among the best W; the best W of the others are the new beams. A hypothesis is scored by
its log-probability divided by length ** length_penalty, and each prompt keeps its best W.

A beam is a row of the KV cache. When a beam goes on from another one's tokens, no key or value moves: each row writes
its own pages, and a table says for each of a beam's tokens in which row's page it is (`cache.LayerCache.slot_table`).
Here for two beams; the prompt is in pages of the first row:

    tokens of beam 0   prompt  a  b  d            slots of beam 0   row 0 ...  row 0  row 1  row 0
    tokens of beam 1   prompt  a  c  e            slots of beam 1   row 0 ...  row 0  row 0  row 1

All of a step happens on the device, in tensors whose shapes stay, so that on CUDA it is one graph. Shapes are named by
letters: G prompts, W beams a prompt, B = G * W rows, C candidates a prompt, L tokens, S slots of a row, V vocabulary.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from math import inf, isfinite, log10

import torch
import torch.nn.functional as F
from torch import Tensor

from arguments import (
    MAX_BATCH,
    SHARE,
    check_count,
    check_function,
    check_lists,
    check_prompts,
    checked_stop_ids,
    length_of_all,
    of_each,
)
from cache import Codec, KVCache, codec_of, context_bytes
from cli import Stats
from config import MAX_STOP_IDS, PAGE, ModelConfig
from device import check_memory, free_memory, now, told_if_out_of_memory
from model import Transformer
from ops.prefix_attention import tile_rows
from ops.rope import Shared
from parallel import least
from runner import NOT_FINITE, Runner, activation_bytes, held_bytes, lease, pack_weights, runner_bytes
from sampling import Sampling
from scheduler import CHUNK, SHARED, Piece, Request, Running, fits

ADVICE = "lower --num_beams, --batch_size, --max_new_tokens or the length of the prompts"
OF_LOGITS = 16  # bytes a logit that a step takes: the logit, its log-probability, and what sorts them
NO_HYPOTHESIS = -inf  # the score of a hypothesis that is not there; transformers has -1e9
GREATEST = 30  # digits that length ** length_penalty may have: sums of log-probabilities stay finite in float32 with it

# ---------------------------------------------------------------------------------------------------------------------
# The device's side


@dataclass
class Beams:
    """What a step reads and writes, all on the device, for G prompts of W beams and at most L tokens.

    Row g * W + w is beam w of prompt g. A prompt that is done keeps its hypotheses and its count; its rows go on
    writing the same slot of their own.
    """

    cache: KVCache  # of the rows, with the two below
    tables: dict[int, Tensor]  # where the rows write: as `KVCache.tables`
    slot_tables: dict[int, Tensor]  # [B, S] each, int32: where they read
    shared: Shared | None  # the prompts' whole pages, where attention takes them apart
    token: Tensor  # [B], each beam's newest
    start: Tensor  # [G], the place of a prompt's last token
    count: Tensor  # [G], how many new tokens each beam of a prompt has
    limit: Tensor  # [G], how many they may be
    done: Tensor  # [G], bool
    score: Tensor  # [G, W], float32: the beams' log-probabilities, the best first
    tokens: Tensor  # [G, W, L + 1], int32: their new tokens
    best_score: Tensor  # [G, W], float32: the hypotheses' scores, the best first; NO_HYPOTHESIS where none is
    best_count: Tensor  # [G, W], how many tokens they have
    best_tokens: Tensor  # [G, W, L + 1], int32
    stop_ids: Tensor  # [n]
    norm: Tensor  # [L + 2], float32: i ** length_penalty
    hoped: Tensor  # [G], the length that beams are hoped to score with; 0: their own
    when_full: Tensor  # bool: whether a prompt with W hypotheses is done (early_stopping)
    penalty: Tensor | None  # float32: repetition_penalty
    prompt: Tensor | None  # [G, L], what it counts as seen besides: a prompt, filled with tokens of its own
    report: Tensor  # [2], int32: whether all prompts are done, whether all log-probabilities were finite

    @classmethod
    def empty(
        cls, runner: Runner, prompts: int, beams: int, stop_ids: int, penalized: bool, shared: bool, tile: int
    ) -> "Beams":
        """The state of so many prompts, beams and stop ids on rows of a runner, all prompts done.

        With `shared`, attention takes prompts apart from what is new, `tile` beams of a prompt at a time.
        """
        rows, length, device = prompts * beams, runner.length, runner.device

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=device)

        widths = {ring: table.shape[1] for ring, table in runner.whole_cache.tables.items()}
        tables = {ring: zeros(rows, width, dtype=torch.int32) for ring, width in widths.items()}
        slot_tables = {ring: zeros(rows, PAGE * width, dtype=torch.int32) for ring, width in widths.items()}
        tiles = prompts * -(-beams // tile)
        order = torch.arange(rows, dtype=torch.int32, device=device)
        return cls(
            cache=runner.whole_cache.with_tables(tables, slot_tables),
            tables=tables,
            slot_tables=slot_tables,
            shared=Shared(zeros(rows, dtype=torch.int32), order, zeros(tiles, 2, dtype=torch.int32), tile)
            if shared
            else None,
            token=zeros(rows),
            start=zeros(prompts),
            count=zeros(prompts),
            limit=zeros(prompts),
            done=torch.ones(prompts, dtype=torch.bool, device=device),
            score=zeros(prompts, beams, dtype=torch.float32),
            tokens=zeros(prompts, beams, length + 1, dtype=torch.int32),
            best_score=zeros(prompts, beams, dtype=torch.float32),
            best_count=zeros(prompts, beams),
            best_tokens=zeros(prompts, beams, length + 1, dtype=torch.int32),
            stop_ids=zeros(stop_ids),
            norm=torch.ones(length + 2, dtype=torch.float32, device=device),
            hoped=zeros(prompts),
            when_full=zeros(dtype=torch.bool),
            penalty=torch.ones((), dtype=torch.float32, device=device) if penalized else None,
            prompt=zeros(prompts, length) if penalized else None,
            report=zeros(2, dtype=torch.int32),
        )

    def begin(self, runner: Runner, leaders: list[Running], followers: list[Running], settings: "Settings"):
        """Readies the first prompts for their first tokens: `leaders` are the first beams of each, `followers` the
        others, in the order of their rows."""
        prompts, beams = self.score.shape
        sent, idle = runner.sent, [0] * (prompts - len(leaders))
        rows = sorted([*leaders, *followers], key=lambda each: each.row)
        for ring, table in runner.tables(rows).items():
            self.tables[ring].zero_()[: len(rows)] = table
            slots = _slots(self.tables[ring][::beams])  # the first beam's are all beams'
            self.slot_tables[ring].copy_(slots.repeat_interleave(beams, 0))
        requests = [each.request for each in leaders]
        limits, lengths = [each.max_new_tokens for each in requests], [len(each.prompt) for each in requests]
        hopeful = settings.early_stopping == "never" and settings.length_penalty > 0
        self.start.copy_(sent([n - 1 for n in lengths] + idle))
        self.count.zero_()
        self.limit.copy_(sent(limits + idle))
        self.done.copy_(sent([0] * len(leaders) + [1] * len(idle)))
        self.hoped.copy_(sent((limits if hopeful else [0] * len(leaders)) + idle))
        self.score.fill_(-inf)[:, 0] = 0  # one beam at first: else all would be alike
        self.best_score.fill_(NO_HYPOTHESIS)
        self.stop_ids.copy_(sent(list(settings.stop_ids)))
        self.norm.copy_(settings.norm(len(self.norm)))
        self.when_full.fill_(settings.early_stopping is True)
        if self.penalty is not None:
            self.penalty.fill_(settings.repetition_penalty)
            longest = self.prompt.shape[1]
            texts = [each.prompt + [each.prompt[0]] * (longest - len(each.prompt)) for each in requests]
            self.prompt.zero_()[: len(leaders)] = sent(texts)
            self.tokens.copy_(self.prompt[:, None, :1].expand_as(self.tokens))
        if self.shared is not None:
            whole = [n // PAGE * PAGE for n in lengths] + idle
            self.shared.prefix.copy_(sent([n for n in whole for _ in range(beams)], torch.int32))
            tile = self.shared.rows
            places = [(g * beams + i, min(tile, beams - i)) for g in range(prompts) for i in range(0, beams, tile)]
            tiles = [(row, count if whole[row // beams] else 0) for row, count in places]
            self.shared.tiles.copy_(sent(tiles, torch.int32))


def _slots(table: Tensor) -> Tensor:
    """The slots [B, S] of the pages of a table [B, S / PAGE], as page * PAGE + place."""
    place = torch.arange(PAGE, dtype=table.dtype, device=table.device)
    return (table[:, :, None] * PAGE + place).flatten(1)


def step(model: Transformer, beams: Beams):
    """Extends all beams by one token more."""
    width = beams.score.shape[1]
    position = (beams.start + beams.count)[:, None].expand(-1, width).flatten()  # [B], of the newest token
    for ring, table in beams.tables.items():
        slots = beams.slot_tables[ring]
        slot = position[:, None] % slots.shape[1]  # [B, 1]
        page = table.gather(1, slot // PAGE)
        slots.scatter_(1, slot, page * PAGE + (slot % PAGE).int())
    choose(beams, model.logits(beams.token[:, None], beams.cache, position, shared=beams.shared))


def choose(beams: Beams, logits: Tensor):
    """Makes hypotheses and new beams of the old ones and the logits [B, V] of what follows them."""
    (prompts, width), vocabulary = beams.score.shape, logits.shape[-1]
    candidates = max(2, 1 + len(beams.stop_ids)) * width  # C: at least W of them go on
    rows = torch.arange(prompts * width, device=logits.device).view(prompts, width)
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    if beams.penalty is not None:
        seen = torch.cat((beams.prompt[:, None].expand(-1, width, -1), beams.tokens.long()), 2).flatten(0, 1)
        values = log_probs.gather(1, seen)
        values = torch.where(values < 0, values * beams.penalty, values / beams.penalty)
        log_probs.scatter_(1, seen, values)
    log_probs = log_probs.view(prompts, width, vocabulary).add_(beams.score[:, :, None])

    value, index = log_probs.flatten(1).topk(candidates)  # [G, C], the best first
    parent, token = index // vocabulary, index % vocabulary
    count = beams.count + 1
    tokens = beams.tokens.gather(1, parent[:, :, None].expand(-1, -1, beams.tokens.shape[2]))
    tokens.scatter_(2, beams.count[:, None, None].expand(-1, candidates, 1), token.int()[:, :, None])
    ends = (token[:, :, None] == beams.stop_ids).any(-1) | (count >= beams.limit)[:, None]

    # Hypotheses: the best of those there were and the new ones
    new = (value / beams.norm[count][:, None]).masked_fill(~ends, NO_HYPOTHESIS)[:, :width]
    best_score, best = torch.cat((beams.best_score, new), 1).topk(width)
    counts = torch.cat((beams.best_count, count[:, None].expand(-1, width)), 1)
    texts = torch.cat((beams.best_tokens, tokens[:, :width]), 1)

    # Beams: the best of those that go on
    score, chosen = value.masked_fill(ends, -inf).topk(width)

    # A prompt is done once its beams are unlikely to become better than its worst hypothesis
    worst = best_score[:, -1]
    hope = score[:, 0] / beams.norm[torch.where(beams.hoped > 0, beams.hoped, count)]
    full = beams.when_full & (worst > NO_HYPOTHESIS)
    done = (hope <= worst) | full | (count >= beams.limit)

    finite = (value.isfinite().all(1) | beams.done).all()
    for mine, computed in (
        (beams.best_score, best_score),
        (beams.best_count, counts.gather(1, best)),
        (beams.best_tokens, texts.gather(1, best[:, :, None].expand_as(beams.best_tokens))),
        (beams.count, count),
        (beams.done, done),  # the last: it says what the others keep
    ):
        was_done = beams.done.view(-1, *[1] * (mine.dim() - 1))
        mine.copy_(torch.where(was_done, mine, computed))
    beams.score.copy_(score)
    beams.token.copy_(token.gather(1, chosen).flatten())
    beams.tokens.copy_(tokens.gather(1, chosen[:, :, None].expand_as(beams.tokens)))
    source = rows.gather(1, parent.gather(1, chosen)).flatten()  # [B], the row that each beam goes on from
    for slots in beams.slot_tables.values():
        slots.copy_(slots[source])
    beams.report.copy_(torch.stack((beams.done.all(), finite)))


# ---------------------------------------------------------------------------------------------------------------------
# The host's side


@dataclass(frozen=True)
class Settings:
    """How beams are searched for. Raises ValueError for a value out of its range."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_count("num_beams", self.num_beams)
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not isfinite(penalty):
            raise ValueError(f"length_penalty must be a number, not {penalty!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping must be True, False or 'never', not {self.early_stopping!r}")
        Sampling(temperature=0, repetition_penalty=self.repetition_penalty)  # which knows its range
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(self.stop_ids)} stop ids are given; at most {MAX_STOP_IDS} can be")

    def check(self, config: ModelConfig, longest: int):
        """Raises ValueError for what doesn't go with a model, or with results of `longest` tokens."""
        most = config.vocab_size // max(2, 1 + len(self.stop_ids))  # all beams come of a prompt's first candidates
        if self.num_beams > most:
            raise ValueError(f"num_beams can be at most {most} with a vocabulary of {config.vocab_size}")
        if abs(self.length_penalty) * log10(longest) > GREATEST:
            raise ValueError(f"length_penalty {self.length_penalty} is too large for {longest} new tokens")

    def norm(self, count: int) -> Tensor:
        """[count] in float32: what the log-probability of so many tokens is divided by."""
        length = torch.arange(count, dtype=torch.float64).clamp(min=1)
        return length.pow(self.length_penalty).float()


@torch.inference_mode()
def beam_search(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int | list[int] = 200, **options
) -> list[list[int]]:
    """Continues each prompt (token ids, <bos> included) by its best hypothesis: at most max_new_tokens new token ids,
    the last of which may be a stop id. Takes the options of `search`, which returns scores, too."""
    return [tokens for tokens, _ in search(model, prompts, max_new_tokens, **options)]


@torch.inference_mode()
def search(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int | list[int] = 200,
    *,
    num_beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    repetition_penalty: float = 1.0,
    stop_ids: tuple[int, ...] | None = None,
    batch_size: int | None = None,
    kv_cache_dtype: str | torch.dtype | None = None,
    compile: bool = False,
    prefix_cache: bool = True,
    on_step: Callable[[int, Runner], None] | None = None,
    on_completion: Callable[[int, int, list[int]], None] | None = None,
    skip: Container[tuple[int, int]] = (),
    stats: Stats | None = None,
) -> list[tuple[list[int], float]]:
    """The best hypothesis of each prompt, and its score: log-probability / length ** length_penalty.

    What num_beams, length_penalty, early_stopping (True, False or "never") and repetition_penalty mean is what they
    mean to transformers' `generate`, whose tokens and scores these are: so the penalty divides and multiplies
    log-probabilities, prompts included. One beam is greedy decoding. max_new_tokens may be a list of one value a
    prompt. At most batch_size prompts, with all their beams, run at once (default: as many as make MAX_BATCH rows, and
    have room in memory), those with the most new tokens first; a batch ends before the next one starts.

    `compile` records a step as one CUDA graph; on a CPU steps are as without. With prefix_cache, what earlier calls have
    computed of prompts that begin alike is used. on_step(i, runner) is called before each
    prefill (i is 0) and before step i, on_completion with a prompt's number, 0 and its tokens when its batch has ended.
    No search is made for prompts i with (i, 0) in `skip`: they have no tokens, and a score of -inf. `stats` is added
    to. Raises ValueError as `generate.generate` does.
    """
    config, device = model.config, model.device
    codec = codec_of(kv_cache_dtype, model.dtype)
    check_lists(prompts)
    limits = of_each("max_new_tokens", max_new_tokens, prompts)
    for name, values in dict(max_new_tokens=limits, batch_size=[] if batch_size is None else [batch_size]).items():
        for value in values:
            check_count(name, value)
    stop_ids = tuple(dict.fromkeys(checked_stop_ids(model, stop_ids)))
    settings = Settings(num_beams, length_penalty, early_stopping, repetition_penalty, stop_ids)
    if num_beams == 1:  # greedy: the first end is the end
        settings = Settings(1, length_penalty, True, repetition_penalty, stop_ids)
    for name, value in dict(on_step=on_step, on_completion=on_completion).items():
        check_function(name, value)
    prompts = [list(prompt) for prompt in prompts]
    if not prompts:
        return []
    check_prompts(model, prompts, limits)
    wanted = [i for i in range(len(prompts)) if (i, 0) not in skip]
    if not wanted:
        return [([], -inf)] * len(prompts)
    settings.check(config, max(limits))
    stats = Stats() if stats is None else stats

    length = length_of_all(model, prompts, limits)
    order = sorted(wanted, key=lambda i: -limits[i])  # those of a batch end at about the same time
    requests = [Request((i, 0), prompts[i], limits[i], Sampling(temperature=0)) for i in order]
    size, pages = _room(model, requests, num_beams, batch_size, length, codec)
    batches = [requests[i : i + size] for i in range(0, len(requests), size)]
    results: dict[int, tuple[list[int], float]] = {}
    with told_if_out_of_memory(device, f"{size * num_beams} rows of {length} tokens", ADVICE):
        begun = now(device)
        with lease(model, size * num_beams, length, codec, compile, pages=pages) as runner:
            pack_weights(model)
            runner.pages.keep(prefix_cache)
            runs = _Search(model, runner, requests, size, settings, on_step)
            stats.compile_seconds += now(device) - begun
            for batch in batches:
                for request, tokens, score in runs.run(batch, stats):
                    results[request.key[0]] = tokens, score
                    if on_completion is not None:
                        on_completion(*request.key, tokens)
                    context = context_bytes(config, len(request.prompt) + len(tokens) // 2, codec)
                    stats.bytes_read += num_beams * (len(tokens) - 1) * context
                    stats.prompt_tokens += len(request.prompt)
                    stats.new_tokens += len(tokens)
                    stats.rows += 1
            stats.steps += runs.steps
            stats.bytes_read += runs.steps * model.step_bytes(size * num_beams)
    return [results.get(i, ([], -inf)) for i in range(len(prompts))]


class _Search:
    """Runs batches of at most `size` prompts on a runner's KV cache; with its graph, if steps are graphs."""

    def __init__(
        self,
        model: Transformer,
        runner: Runner,
        requests: list[Request],
        size: int,
        settings: Settings,
        on_step: Callable | None,
    ):
        self.model, self.runner, self.settings, self.on_step, self.steps = model, runner, settings, on_step, 0
        width, config, penalized = settings.num_beams, model.config, settings.repetition_penalty != 1
        saved = (width - 1) * sum(len(each.prompt) // PAGE * PAGE for each in requests[:size])
        shared = runner.packs and saved >= SHARED
        tile = min(width, tile_rows(width, *config.global_group, model.dtype))
        kind = size, width, len(settings.stop_ids), penalized, shared
        self.graph = None
        if not (runner.compile and runner.device.type == "cuda"):
            self.beams = Beams.empty(runner, *kind, tile)
            return
        key = "beams", *kind
        if key not in runner.steps:  # recorded while all prompts are done and all tables show page 0
            beams = Beams.empty(runner, *kind, tile)
            runner.steps[key] = runner.record(lambda: step(model, beams)), beams
        self.graph, self.beams = runner.steps[key]

    def run(self, batch: list[Request], stats: Stats) -> Iterator[tuple[Request, list[int], float]]:
        """Yields (request, tokens, score) for each request of a batch."""
        runner, width, device = self.runner, self.settings.num_beams, self.runner.device
        begun, leaders, followers = now(device), [], []
        try:
            for request in batch:
                row, like = len(leaders) * width, None
                for i in range(width):
                    held = runner.pages.take(request.prompt, request.tokens, like)
                    like = like or held
                    (followers if i else leaders).append(Running(request, row + i, row + i, held))
            self.beams.begin(runner, leaders, followers, self.settings)
            choose(self.beams, self._prefill(leaders).repeat_interleave(width, 0))
            stats.prefill_seconds += now(device) - begun
            begun = now(device)
            self._decode(max(request.max_new_tokens for request in batch))
            scores, counts = self.beams.best_score[:, 0].tolist(), self.beams.best_count[:, 0].tolist()
            tokens = self.beams.best_tokens[:, 0, : max(counts)].tolist()
            stats.decode_seconds += now(device) - begun
        finally:
            for each in [*leaders, *followers]:
                runner.pages.release(each.held)
        yield from ((request, tokens[g][: counts[g]], scores[g]) for g, request in enumerate(batch))

    def _prefill(self, leaders: list[Running]) -> Tensor:
        """Fills the pages of prompts, which are their first beams', and returns logits [G, V] of what follows them."""
        runner, first = self.runner, None
        for pieces in _pieces(leaders, runner.packs):
            if self.on_step is not None:
                self.on_step(0, runner)
            logits, *_ = runner.prefill_pieces(self.model, pieces)
            if first is None:
                first = logits.new_zeros(len(self.beams.done), logits.shape[1])
            ending = [i for i, piece in enumerate(pieces) if piece.ends]
            prompts = [pieces[i].running.row // self.settings.num_beams for i in ending]
            first[runner.sent(prompts)] = logits[runner.sent(ending)]
        for each in leaders:
            runner.pages.register(each.held)
        return first

    def _decode(self, limit: int):
        """Takes steps until all prompts are done, at the latest when their beams have `limit` tokens."""
        reader = _Reader(self.beams.report)
        done = reader.read()
        for _ in range(1, limit):
            if done:
                break
            self.steps += 1
            if self.on_step is not None:
                self.on_step(self.steps, self.runner)
            if self.graph is not None:
                self.graph.replay()
            else:
                step(self.model, self.beams)
            done = reader.read()
        reader.check(self.beams.report)


class _Reader:
    """Reads the report of each step: on CUDA that of the step before, while the newest one runs, so that the device
    never waits for the host."""

    def __init__(self, report: Tensor):
        self.report, self.count = report, 0
        if report.is_cuda:
            self.copies = torch.zeros(2, 2, dtype=report.dtype, pin_memory=True)
            self.landed = [torch.cuda.Event() for _ in range(2)]

    def read(self) -> bool:
        """Whether all prompts are done, as far as is known. Raises ValueError for values that are not finite."""
        if not self.report.is_cuda:
            return self.check(self.report)
        newest, before = self.count % 2, (self.count + 1) % 2
        self.copies[newest].copy_(self.report, non_blocking=True)
        self.landed[newest].record()
        self.count += 1
        if self.count == 1:
            return False
        self.landed[before].synchronize()
        return self.check(self.copies[before])

    @staticmethod
    def check(report: Tensor) -> bool:
        done, finite = report.tolist()
        if not finite:
            raise ValueError(NOT_FINITE)
        return bool(done)


def _pieces(leaders: list[Running], packs: bool) -> Iterator[list[Piece]]:
    """What prefills compute, one after the other: at most CHUNK tokens each, padding included."""
    pieces, tokens = [], 0
    for each in sorted(leaders, key=lambda each: len(each.request.prompt)):
        begin, length = each.held.cached, len(each.request.prompt)
        while begin < length:
            end = min(length, begin + CHUNK)
            longest = max(end - begin, *(piece.end - piece.begin for piece in pieces), 0)
            total = tokens + end - begin
            if pieces and not fits(total, len(pieces) + 1, longest, packs):
                yield pieces
                pieces, total = [], end - begin
            snapshot = each.held.snapshot if begin == each.held.cached else None
            pieces.append(Piece(each, begin, end, snapshot=snapshot))
            begin, tokens = end, total
            if end < length:  # what comes next sees it
                yield pieces
                pieces, tokens = [], 0
    yield pieces


def _room(
    model: Transformer, requests: list[Request], beams: int, batch_size: int | None, length: int, codec: Codec
) -> tuple[int, int]:
    """How many prompts run at once, and how many pages of the cache they need at most.

    Raises ValueError if there is no room for one of them, or for batch_size."""
    config, held = model.config, held_bytes(model)
    tokens = min(sum(len(request.prompt) for request in requests), CHUNK)
    activations = activation_bytes(model, tokens)
    own = [-(-request.tokens // PAGE) for request in requests]
    pages = [n + (beams - 1) * (n - len(request.prompt) // PAGE) for n, request in zip(own, requests)]
    size = min(len(requests), batch_size or max(1, MAX_BATCH // beams))
    free = least(model.sums, free_memory(model.device))
    while True:
        count, rows = 1 + max(sum(pages[i : i + size]) for i in range(0, len(pages), size)), size * beams
        needed = runner_bytes([config], rows, length, codec, count) + rows * OF_LOGITS * config.vocab_size + activations
        if size == 1 or batch_size is not None or needed <= SHARE * (free + held):
            break
        size -= max(1, size // 8)
    check_memory(int(needed - held), model.device, f"a batch of {rows} rows of {length} tokens", ADVICE, model.sums)
    return size, count
