"""A conversation on stdin and stdout, and the printing of a text as its tokens come."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable

from arguments import rows_and_pages
from cache import codec_of
from cli import print_error
from config import PAGE
from model import Transformer
from pages import Held
from runner import Runner, lease
from sampling import DrawKind, Sampling
from scheduler import Request, Scheduler
from speculate import Drafter, Pace, pace_of
from text import before_stop, completed, stops_within
from tokenizer import Tokenizer, check_text

CHAT_LENGTH = 8192  # tokens of a conversation's cache, where the model's context is longer


def converse(
    model: Transformer,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    sampling: Sampling,
    seed: int,
    drafter: Drafter | None = None,
    on_step: Callable | None = None,
):
    """Holds a conversation as generate.py's options say. Each turn's prefill covers what is new since the one before."""
    if sys.stdin is None:
        raise ValueError("--interactive reads stdin, which is closed")
    length = min(model.config.context_length, CHAT_LENGTH)
    room = length - len(
        tokenizer.encode_chat([*system_messages(args.system), {"role": "user", "content": ""}], args.thinking)
    )
    if args.max_new_tokens > room:
        raise ValueError(f"--max_new_tokens can be at most {room} in a conversation of {length} tokens")
    codec, pace = codec_of(args.kv_cache_dtype, model.dtype), pace_of(drafter, args.speculate_k or "auto")
    kind = DrawKind.of(model.config.vocab_size, sampling)
    pages, of_drafts = Counter([-(-length // PAGE)]), (drafter, pace.runs[-1] if pace else 1)
    _, pages = rows_and_pages(model, pages, 1, False, length, min(length, 1024), codec, kind, *of_drafts)
    with lease(model, 1, length, codec, args.compile, args.compile_prefill, pages, *of_drafts) as runner:
        held = runner.pages.take([], length)
        try:
            _take_turns(model, tokenizer, runner, held, sampling, args, seed, pace, on_step)
        finally:
            runner.pages.release(held)


def _take_turns(
    model: Transformer,
    tokenizer: Tokenizer,
    runner: Runner,
    held: Held,
    sampling: Sampling,
    args: argparse.Namespace,
    seed: int,
    pace: Pace | None,
    on_step: Callable | None,
):
    """Answers each line of stdin by at most max_new_tokens tokens, until there is none."""
    length, max_new_tokens, stops = min(runner.length, CHAT_LENGTH), args.max_new_tokens, args.stop or []
    kind = DrawKind.of(model.config.vocab_size, sampling)
    check = "every" if model.device.type == "cpu" else "ping-pong"
    messages, turn = system_messages(args.system), 0
    history, kept = [], []  # tokens of the messages, and those whose keys and values are in the pages that are held
    while True:
        runs = pace.runs if pace else (1,)
        # Compiled, the first time, before anybody has to wait
        runner.start(model, 1, kind, model.config.stop_ids, runs=runs)
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            continue
        try:
            check_text(text, "the line")
        except ValueError as error:
            print_error(error)
            continue
        user = {"role": "user", "content": text}
        tokens = _next_turn(tokenizer, [*messages, user], history, args.thinking)
        if history and len(tokens) + max_new_tokens > length:
            print(f"note: the conversation has filled its {length} tokens and starts anew", file=sys.stderr)
            messages, history = system_messages(args.system), []
            tokens = _next_turn(tokenizer, [*messages, user], history, args.thinking)
        if len(tokens) + max_new_tokens > length:
            print(f"error: {len(tokens)} tokens and {max_new_tokens} new ones exceed {length}", file=sys.stderr)
            messages, history = system_messages(args.system), []
            continue
        printer = Printer(tokenizer, model.config.stop_ids, stops, not args.no_thoughts)
        request = Request((turn, 0), tokens, max_new_tokens, sampling, (seed, turn), stops_within(tokenizer, stops))
        scheduler = Scheduler(runner, model, [request], 1, check, pace)
        cached = _reusable(model, kept, tokens)
        try:
            ((_, answer),) = scheduler.run(on_step, printer, cached=cached, held=held)
        finally:
            runner.finish()
        printer.end()
        said, _ = completed(tokenizer, answer, model.config.stop_ids, stops)
        messages += [user, {"role": "assistant", "content": said}]
        history, kept, turn = tokens + answer, tokens + answer[:-1], turn + 1  # the last one is not in the cache yet
        if answer[-1] in model.config.stop_ids:
            history.pop()
        history.append(tokenizer.end_of_turn)


def system_messages(system: str | None) -> list[dict]:
    """The messages that a chat begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def _next_turn(tokenizer: Tokenizer, messages: list[dict], history: list[int], thinking: bool) -> list[int]:
    """Tokens of a conversation up to the answer to its last message. Its template may write earlier turns differently
    once there is a later one; Gemma's own format goes on from the history's tokens."""
    if history and tokenizer.template is None:
        return history + tokenizer.encode_turn(messages[-1]["content"], first=False)
    return tokenizer.encode_chat(messages, thinking)


def _reusable(model: Transformer, kept: list[int], tokens: list[int]) -> int:
    """How many tokens of a prompt need not be computed, since the cache has those that are `kept`."""
    count = next((i for i, (a, b) in enumerate(zip(kept, tokens)) if a != b), min(len(kept), len(tokens) - 1))
    config = model.config
    if count < len(kept) and any(config.local_layers) and len(kept) + 2 > config.window:
        return 0  # rings have the newest tokens (a step may be under way that makes one more), not those before them
    return count


class Printer:
    """Prints an answer as its tokens come, but for what may be the beginning of a stop string, and none of what
    follows. Thoughts go to stderr, if `thoughts` is true."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...], stops: list[str], thoughts: bool = True):
        self.stream, self.stop_ids, self.stops = tokenizer.stream(), stop_ids, stops
        self.held, self.stopped = "", False
        self.around, self.thoughts = tokenizer.thought or (), thoughts
        self.thinking, self.named, self.shown = False, False, False  # of the thought that goes on

    def __call__(self, token: int):
        if token in self.stop_ids:
            return
        if token in self.around:
            self._end_thought()
            self.thinking = token == self.around[0]
        elif self.thinking:
            self._think(self.stream.put(token))
        else:
            self.held += self.stream.put(token)
            self._print(len(self.held) - max((len(stop) - 1 for stop in self.stops), default=0))

    def end(self):
        self._end_thought()
        self.held += self.stream.end()
        self._print(len(self.held))
        print(flush=True)

    def _think(self, text: str):
        if not self.named:  # the first line says what it is
            _, newline, text = text.partition("\n")
            self.named = bool(newline)
        if text and self.thoughts:
            print(text, end="", file=sys.stderr, flush=True)
            self.shown = True

    def _end_thought(self):
        if self.shown:
            print(file=sys.stderr, flush=True)
        self.named = self.shown = False

    def _print(self, count: int):
        text = before_stop(self.held, self.stops)
        if not self.stopped:
            count = len(text) if text != self.held else max(0, count)
            print(text[:count], end="", flush=True)
            self.stopped, self.held = text != self.held, self.held[count:]
