"""Perplexity of a text file, how far one checkpoint's predictions are from another's, and scores in benchmarks by
EleutherAI's lm-evaluation-harness."""

import interrupt

if __name__ == "__main__":
    interrupt.silence()  # while the rest is imported

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cache import Codec, KVCache, codec_of
from cli import Parser, add_model_options, number, path, run_program
from device import told_if_out_of_memory
from generate import generate, load_model
from model import Transformer
from parallel import Sums, replicas_of
from runner import release
from text import batches, check_window, completed, read_texts, stops_within, windows
from tokenizer import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError:  # only --tasks needs it: `find_tasks` says so
    TemplateLM = object

LOGITS = 4096  # positions whose logits are in memory at once where continuations are scored


@torch.inference_mode()
def evaluate(
    model: Transformer,
    windows: list[list[int]],
    batch_size: int = 8,
    kv_cache_dtype: str | torch.dtype | None = None,
    reference: Transformer | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict:
    """How well `model` predicts each token of a window from those before it in that window (token ids, at least 2).

    Returns `tokens`, the number of tokens predicted (all but each window's first); `loss`, their mean negative
    log-likelihood in nats; `perplexity`, exp(loss). With a `reference` also `kl`, the mean over the same positions of
    KL(reference || model) in nats, and `top1_agreement`, the share of them where both models' likeliest token is the
    same. At most batch_size windows run at once; K and V of `model` pass a cache in kv_cache_dtype (None: the weights'),
    those of `reference` one in its own weights' dtype. `progress` is called with the number of windows just done.

    Raises ValueError for a batch_size below 1, no windows, a window that is too short or exceeds a model's context, a
    token id outside the vocabulary, models with vocabularies of different sizes, a figure that is not finite, or too
    little GPU memory.
    """
    models = [model] if reference is None else [model, reference]
    codecs = [codec_of(kv_cache_dtype, model.dtype)] + [codec_of(None, each.dtype) for each in models[1:]]
    if not windows:
        raise ValueError("there are no windows to predict")
    lengths = set(map(len, windows))
    if min(lengths) < 2:
        raise ValueError(f"a window needs at least 2 tokens, not {min(lengths)}")
    for each in models:
        check_window(max(lengths), each.config.context_length)
    vocab_sizes = [each.config.vocab_size for each in models]
    if len(set(vocab_sizes)) > 1:
        raise ValueError(f"vocabularies of {vocab_sizes[0]} and of {vocab_sizes[1]} tokens can't be compared")
    if not all(0 <= token < vocab_sizes[0] for window in windows for token in window):
        raise ValueError(f"the text has a token id outside the vocabulary of {vocab_sizes[0]}")

    device = model.device
    loss, kl, agreed = torch.zeros(3, dtype=torch.float64, device=device)
    what = f"{batch_size} windows of {max(lengths)} tokens"
    with told_if_out_of_memory(device, what, "lower --batch_size or --window"):
        for batch in batches(windows, batch_size):
            tokens = torch.tensor(batch, device=device)  # [B, T]
            outputs = []
            for each, codec in zip(models, codecs):
                cache = KVCache.empty(each.config, *tokens.shape, codec, device, each.kv_scales)
                outputs.append(each(tokens, cache, all_logits=True))  # [B, T, V]
            for row, *logits in zip(tokens, *outputs):  # a row at a time: log-probabilities are as large as logits
                loss += F.cross_entropy(logits[0][:-1], row[1:], reduction="none").double().sum()
                if reference is None:
                    continue
                ours, theirs = (F.log_softmax(each[:-1], dim=-1) for each in logits)  # [T - 1, V]
                kl += (theirs.exp() * (theirs - ours)).sum(-1).double().sum()
                agreed += (ours.argmax(-1) == theirs.argmax(-1)).sum()
            progress(len(batch))

    count = sum(len(window) - 1 for window in windows)
    loss = loss / count
    result = {"perplexity": loss.exp().item(), "loss": loss.item(), "tokens": count}
    if reference is not None:
        result |= {"kl": kl.item() / count, "top1_agreement": agreed.item() / count}
    for name, value in result.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{name} is {value}: {'a' if reference else 'the'} model computes values that are not finite"
            )
    return result


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness


@torch.inference_mode()
def score(
    model: Transformer,
    requests: list[tuple[list[int], list[int]]],
    batch_size: int = 8,
    kv_cache_dtype: str | torch.dtype | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[tuple[float, bool]]:
    """For each (context, continuation) of token ids: the continuation's log-probability in nats, and whether it is what
    greedy decoding gives.

    A context runs once, however many continuations it has, and gives the logits of their first tokens; its K and V are
    then copied for each continuation of more than one. At most batch_size contexts or continuations run at once, those
    of similar length together. What exceeds the model's context is cut off at the beginning, with a warning.
    `progress` is called with the number of requests just done.

    Raises ValueError for a batch_size below 1, an empty context or continuation, a continuation longer than the model's
    context, a token id outside the vocabulary, a score that is not finite, or too little memory.
    """
    config, device = model.config, model.device
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    groups, cut = {}, 0  # context: indices of its continuations
    for index, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError(f"request {index + 1} has an empty {'continuation' if context else 'context'}")
        if len(continuation) > config.context_length:
            raise ValueError(
                f"request {index + 1} has a continuation of {len(continuation)} tokens, "
                f"more than the context of {config.context_length}"
            )
        if not all(0 <= token < config.vocab_size for part in (context, continuation) for token in part):
            raise ValueError(f"request {index + 1} has a token id outside the vocabulary of {config.vocab_size}")
        room = config.context_length + 1 - len(continuation)  # the last token is predicted, but not read
        cut += len(context) > room
        groups.setdefault(tuple(context[-room:]), []).append(index)
    if cut:
        warnings.warn(
            f"{cut} of {len(requests)} requests exceed the context of {config.context_length} tokens: "
            "the beginning of theirs is cut off",
            stacklevel=2,
        )

    results, contexts = [(0.0, True)] * len(requests), sorted(groups, key=len, reverse=True)
    codec = codec_of(kv_cache_dtype, model.dtype)
    release(model)  # its memory is wanted here
    with told_if_out_of_memory(device, f"{batch_size} requests at once", "lower --batch_size"):
        for i in range(0, len(contexts), batch_size):
            batch = contexts[i : i + batch_size]
            rows = [(row, index) for row, context in enumerate(batch) for index in groups[context]]
            rows.sort(key=lambda row: len(requests[row[1]][1]), reverse=True)
            continuations = [requests[index][1] for _, index in rows]
            scores = _score_batch(model, batch, [row for row, _ in rows], continuations, batch_size, codec)
            for (_, index), result in zip(rows, scores):
                results[index] = result
            progress(len(rows))
    return results


def _score_batch(
    model: Transformer, contexts, rows: list[int], continuations, batch_size: int, codec: Codec
) -> list[tuple[float, bool]]:
    """`score` of continuations (longest first), each of which follows the context that its element of `rows` counts."""
    tokens, lengths = _padded(contexts, 0, model.device)  # [B, T], [B]
    held = KVCache.empty(model.config, *tokens.shape, codec, model.device, model.kv_scales)
    row = torch.tensor(rows, device=model.device)  # [R]
    first = torch.tensor([continuation[0] for continuation in continuations], device=model.device)
    logits = model(tokens, held, None, lengths)  # [B, V]
    log_probs = logits.log_softmax(-1)[row, first].double()
    greedy = logits.argmax(-1)[row] == first
    del logits

    longer = [continuation for continuation in continuations if len(continuation) > 1]
    for i in range(0, len(longer), batch_size):
        part = slice(i, min(i + batch_size, len(longer)))
        inputs, counts = _padded([continuation[:-1] for continuation in longer[part]], 0, model.device)
        targets, _ = _padded([continuation[1:] for continuation in longer[part]], -100, model.device)
        cache = None  # the part before is freed first
        length = tokens.shape[1] + inputs.shape[1]
        cache = KVCache.empty(model.config, len(inputs), length, codec, model.device, model.kv_scales)
        cache.copy_rows(held, row[part])
        step = max(1, LOGITS // len(inputs))
        for j in range(0, inputs.shape[1], step):
            piece, target = inputs[:, j : j + step], targets[:, j : j + step]  # [R, T]
            valid = (counts - j).clamp(0, piece.shape[1])
            logits = model(piece, cache, lengths[row[part]] + j, valid, all_logits=True)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")  # 0 for padding
            log_probs[part] -= loss.view(target.shape).double().sum(-1)
            greedy[part] &= ((logits.argmax(-1) == target) | (target < 0)).all(-1)
            del logits
    if not log_probs.isfinite().all():
        raise ValueError("the model computes values that are not finite; it can't be scored")
    return list(zip(log_probs.tolist(), greedy.tolist()))


def _padded(rows: list, padding: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as [B, T], padded on the right, and their lengths [B]."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    return tokens.to(device), torch.tensor([len(row) for row in rows]).to(device)


class HarnessModel(TemplateLM):
    """A model as the harness wants it, for `lm_eval.simple_evaluate(model=HarnessModel(model, tokenizer), ...)`.

    Text becomes tokens, and scores are made, as by the harness's own `hf` model for Gemma: <bos> in front of every
    context and, in rolling log-likelihoods, in front of the text, where it is predicted, too. `compile` is for the
    decode steps of generation tasks.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        kv_cache_dtype: str | torch.dtype | None = None,
        compile: bool = False,
        seed: int = 1234,
    ):
        super().__init__()
        self.model, self.text = model, tokenizer  # the harness looks for Hugging Face's in `tokenizer`
        self.batch_size, self.kv_cache_dtype, self.compile, self.seed = batch_size, kv_cache_dtype, compile, seed
        self.max_length = model.config.context_length

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if string.startswith(self.text.bos):  # chat templates write it
            return self.text.encode(string.removeprefix(self.text.bos))
        return self.text.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), unit="request", leave=False, disable=disable_tqdm) as bar:
            return score(self.model, pairs, self.batch_size, self.kv_cache_dtype, bar.update)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Text up to the first stop string. A prompt that leaves no room for max_gen_toks is cut off at the beginning.

        Settings are the harness's `until`, `max_gen_toks` (256 if there is none), `do_sample` and `temperature`, and
        top_k, top_p, min_p and repetition_penalty of `Sampling`, off if not given. Raises ValueError for another one.
        """
        groups = {}  # settings: indices of their requests
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            settings = normalize_gen_kwargs(requests[indices[0]].args[1])
            stops, count = [stop for stop in settings.pop("until") if stop], settings.pop("max_gen_toks")
            sampled, temperature = settings.pop("do_sample"), settings.pop("temperature", 0.0)
            if unknown := settings.keys() - {"top_k", "top_p", "min_p", "repetition_penalty"}:
                raise ValueError(f"generation setting '{min(unknown)}' of a task is not supported")
            if not 0 < count < self.max_length:
                raise ValueError(f"max_gen_toks of {count} leaves no prompt in the context of {self.max_length}")
            prompts = [self.tok_encode(requests[index].args[0])[count - self.max_length :] for index in indices]
            with tqdm(total=len(prompts), unit="text", leave=False, disable=disable_tqdm) as bar:
                completions = generate(
                    self.model,
                    prompts,
                    count,
                    batch_size=self.batch_size,
                    temperature=temperature if sampled else 0,
                    seed=self.seed,
                    kv_cache_dtype=self.kv_cache_dtype,
                    compile=self.compile,
                    stop_when=stops_within(self.text, stops),
                    on_completion=lambda *_, bar=bar: bar.update(),
                    **({"top_k": 0} | settings),
                )
            for index, tokens in zip(indices, completions):
                texts[index], _ = completed(self.text, tokens, self.model.config.stop_ids, stops)
        return texts


def find_tasks(tasks: list[str], include_path: Path | None = None):
    """The harness's TaskManager that knows `tasks`: its own, those of YAML files in `include_path`, or such files
    themselves. Raises ValueError without the harness and for an unknown task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks needs the lm-evaluation-harness ({error}): pip install lm_eval") from None

    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"no directory at {include_path}")

    class Manager(TaskManager):
        def load(self, *arguments, **options):
            try:
                return super().load(*arguments, **options)
            except Exception as error:  # of any kind: what a task's file can do wrong has no end
                raise ValueError(f"{', '.join(tasks)} can't be loaded: {type(error).__name__}: {error}") from error

    files = {task for task in tasks if Path(task).is_file()}
    manager = Manager(include_path=include_path, include_defaults=False)
    if not files.issuperset(set(tasks) - set(manager.all_subtasks)):
        manager = Manager(include_path=include_path)  # the harness's own, some 14,000, take seconds to read
    if unknown := set(tasks) - files - set(manager.all_tasks):
        raise ValueError(f"there is no task and no file '{min(unknown)}': `lm_eval ls tasks` lists the tasks")
    return manager


# ---------------------------------------------------------------------------------------------------------------------
# The program


def program_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="eval.py", description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=path, metavar="FILE", help="plain text, or JSON lines (.jsonl) with 'text'")
    source.add_argument("--tasks", metavar="A,B", help="lm-evaluation-harness's tasks, or YAML files of your own")
    add("--include_path", type=path, metavar="DIR", help="where to look for more tasks (default: nowhere)")
    add("--num_fewshot", type=number(int, 0), metavar="N", help="examples before each question (default: the task's)")
    add("--limit", type=number(int, 1), metavar="N", help="questions of each task (default: all)")
    add("--seed", type=int, help="of a task's examples, and of sampling (default: 1234)")
    add("--compile", action="store_true", help="compile the decode step of tasks that generate")
    add("--window", type=number(int, 2), metavar="N", help="tokens of --text that a forward sees (default: 1024)")
    batch_size = "windows or requests at once (default: %(default)s)"
    add("--batch_size", type=number(int, 1), default=8, metavar="N", help=batch_size)
    names = "checkpoint_path", "adapter", "tp", "fp8", "kv_cache_dtype", "device", "ops", "precision"
    add_model_options(parser, *names)
    against = "a reference checkpoint; its KV cache is as its weights (default: none)"
    add("--against", type=path, metavar="PATH", help=against)
    add("--against_fp8", action="store_true", help="run the reference's linear layers in FP8")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace):
    if args.tasks is None:
        source, others = "--tasks", ("include_path", "num_fewshot", "limit", "seed", "compile")
    else:
        source, others = "--text", ("window", "against", "against_fp8")
    for name in others:
        value = getattr(args, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name} needs {source}")
    if args.against_fp8 and args.against is None:
        raise ValueError("--against_fp8 needs --against")
    if (replicas := replicas_of(args.tp)) > 1:
        raise ValueError(f"eval.py runs one model: --tp is {args.tp}, and there are {args.tp * replicas} processes")
    run_one = run_text if args.tasks is None else run_tasks
    if args.tp == 1:
        return run_one(args)
    from ranks import joined  # what one process has no use for

    with joined(args) as (_, sums):
        run_one(args, sums)


def _load(args: argparse.Namespace, sums: Sums | None, reference: bool = False) -> tuple[Transformer, Tokenizer]:
    """The model that is measured, or that of --against."""
    path, adapter, fp8 = args.checkpoint_path, args.adapter, args.fp8
    if reference:
        path, adapter, fp8 = args.against, None, args.against_fp8
    return load_model(path, args.device, args.precision, fp8, args.ops, adapter=adapter, sums=sums)


def run_text(args: argparse.Namespace, sums: Sums | None = None):
    window = 1024 if args.window is None else args.window
    texts = read_texts(args.text)
    model, tokenizer = _load(args, sums)
    check_window(window, model.config.context_length)
    model.kv_scales.check(codec_of(args.kv_cache_dtype, model.dtype))
    pieces = windows(texts, tokenizer, window)
    reference = None
    if args.against is not None:
        reference, other = _load(args, sums, reference=True)
        if other.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"{args.against} has a tokenizer of {other.vocab_size} tokens, "
                f"{args.checkpoint_path} one of {tokenizer.vocab_size}: they can't be compared"
            )
    with tqdm(total=len(pieces), unit="window", leave=False) as bar:
        result = evaluate(model, pieces, args.batch_size, args.kv_cache_dtype, reference, bar.update)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"perplexity {result['perplexity']:.4f}, loss {result['loss']:.5f} nats a token, "
        f"{result['tokens']:,} tokens in {len(pieces):,} windows"
    )
    if reference is not None:
        print(f"KL {result['kl']:.3g} nats a token from {args.against}, top-1 agreement {result['top1_agreement']:.2%}")


def run_tasks(args: argparse.Namespace, sums: Sums | None = None):
    tasks, seed = args.tasks.split(","), 1234 if args.seed is None else args.seed
    manager = find_tasks(tasks, args.include_path)
    from lm_eval import simple_evaluate

    model, tokenizer = _load(args, sums)
    model.kv_scales.check(codec_of(args.kv_cache_dtype, model.dtype))
    with redirect_stdout(sys.stderr):  # where the harness's notes belong
        result = simple_evaluate(
            model=HarnessModel(model, tokenizer, args.batch_size, args.kv_cache_dtype, args.compile, seed),
            tasks=tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            task_manager=manager,
            log_samples=False,
            fewshot_random_seed=seed,
        )
    if args.json:
        kept = ("results", "groups", "versions", "n-shot", "n-samples", "lm_eval_version")
        print(json.dumps({key: result[key] for key in kept if key in result}))
        return
    print(make_table(result))
    if "groups" in result:
        print(make_table(result, "groups"))


def main(argv: list[str] | None = None) -> int:
    return run_program(run, program_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
