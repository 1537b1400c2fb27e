"""What `generate` and `beam_search` take: how much of it runs at once, and what is refused."""

from collections import Counter
from collections.abc import Callable

from cache import Codec, cache_bytes
from device import check_memory, free_memory
from model import Transformer
from parallel import least
from runner import activation_bytes, configs_of, held_bytes, runner_bytes
from sampling import DrawKind
from scheduler import CHUNK

MAX_BATCH = 256  # rows that run at once where --batch_size doesn't say
SHARE = 0.95  # of free memory that a run may plan with: graphs and libraries take some
MOST = 2**31 - 1  # of anything that is counted
PADDED = 1.25  # times its tokens that a prefill has at most, once a runner has rounded its width up
ADVICE = "lower --batch_size, --max_new_tokens or the length of the prompts"
LENGTH_STEP = 64  # caches have a multiple of this length: fewer different shapes to compile


def of_each(name: str, value, prompts: list) -> list:
    """One value for each prompt, of one for all or of a list of them."""
    if not isinstance(value, list | tuple):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise ValueError(f"{name} has {len(value)} values for {len(prompts)} prompts")
    return list(value)


def check_lists(prompts):
    """Raises ValueError unless prompts are lists."""
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, list | tuple) for prompt in prompts):
        raise ValueError("prompts must be lists of token ids, which tokenizer.encode(text) makes")


def check_function(name: str, value: Callable | None):
    """Raises ValueError for what is neither a function nor None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function, not {value!r}")


def check_count(name: str, value):
    """Raises ValueError unless `value` is a whole number from 1 to MOST."""
    if not is_whole(value):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not 1 <= value <= MOST:
        raise ValueError(f"{name} must be at {f'least 1, not {value}' if value < 1 else f'most {MOST}'}")


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_prompts(model: Transformer, prompts: list[list[int]], limits: list[int]):
    """Raises ValueError for a prompt that the model can't continue by its limit of new tokens."""
    vocab_size = model.config.vocab_size
    for index, prompt in enumerate(prompts):
        which = f"prompt {index + 1}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise ValueError(f"{which} is empty")
        if not all(map(is_whole, prompt)):
            raise ValueError(f"{which} must be a list of token ids, which tokenizer.encode(text) makes")
        if not all(0 <= token < vocab_size for token in prompt):
            raise ValueError(f"{which} has a token id outside the vocabulary of {vocab_size}")
        check_context(model, len(prompt), limits[index], which)


def length_of_all(model: Transformer, prompts: list[list[int]], limits: list[int]) -> int:
    """The length that a KV cache for these prompts and their limits of new tokens has."""
    length = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
    return min(-(-length // LENGTH_STEP) * LENGTH_STEP, model.config.context_length)


def checked_stop_ids(model: Transformer, stop_ids) -> tuple[int, ...]:
    """The model's stop ids for None, else those given. Raises ValueError for what are none."""
    if stop_ids is None:
        return model.config.stop_ids
    if not isinstance(stop_ids, list | tuple | set | frozenset) or not all(map(is_whole, stop_ids)):
        raise ValueError(f"stop_ids must be a list of token ids, not {stop_ids!r}")
    if not all(0 <= token < model.config.vocab_size for token in stop_ids):
        raise ValueError(f"stop_ids has a token id outside the vocabulary of {model.config.vocab_size}")
    return tuple(stop_ids)


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


def rows_and_pages(
    model: Transformer,
    pages: Counter[int],
    rows: int,
    fewer: bool,
    length: int,
    longest: int,
    codec: Codec,
    kind: DrawKind,
    drafter=None,
    longest_run: int = 1,
) -> tuple[int, int]:
    """How many rows run at once, at most `rows`, and how many pages they share, where pages[n] requests need n pages.

    Memory has to have room for pages and rings, decode state, and what a prefill takes: activations of the feed-forward
    layer, some at once. Where pages for all rows don't fit, there are fewer, and requests wait for them; there are
    fewer rows, too, if those may be. What makes drafts may have a cache of its own, and steps then take longest_run
    tokens a row. Raises ValueError if there is no room for the largest request, or for the rows.
    """
    config, held, count_of_all = model.config, held_bytes(model), pages.total()
    configs = configs_of(model, drafter)
    tokens = min(CHUNK if model.ops.packs else PADDED * CHUNK, count_of_all * longest)
    activations = activation_bytes(model, tokens)
    # Bytes a logit that a draw takes: sorting, float64, and what a penalty makes of them
    of_logits = 56 if kind.in_order else 32 if kind.in_any_order or kind.penalize else 12
    a_page = sum(cache_bytes(each, 0, length, codec, 1) - cache_bytes(each, 0, length, codec, 0) for each in configs)
    room = SHARE * (least(model.sums, free_memory(model.device)) + held) - activations

    def needed(rows: int, count: int) -> float:
        logits = rows * longest_run * config.vocab_size * of_logits
        return runner_bytes(configs, rows, length, codec, count, longest_run) + logits

    def largest(rows: int) -> int:
        total = 0
        for need in sorted(pages, reverse=True):
            total += need * min(pages[need], rows)
            rows -= min(pages[need], rows)
        return total

    rows, most = min(rows, count_of_all), max(pages)
    mean = sum(need * count for need, count in pages.items()) / count_of_all
    while True:
        count = 1 + largest(rows)
        if a_page and needed(rows, count) > room:
            count = max(1 + most, min(count, int((room - needed(rows, 0)) // a_page)))
        busy = count - 1 >= mean * rows  # or rows wait for pages
        if rows == 1 or not fewer or (busy and needed(rows, count) <= room):
            break
        rows = (rows - 1) // 32 * 32 or rows - max(1, rows // 8)
    what = f"a batch of {rows} rows of {length} tokens"
    check_memory(int(needed(rows, count) + activations - held), model.device, what, ADVICE, model.sums)
    return rows, count
