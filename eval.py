"""Perplexity of a text file, and how far one checkpoint's predictions are from another's."""

import argparse
import json
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from generate import DEFAULT_CHECKPOINT, KV_DTYPES, PRECISIONS, Parser, check_kv_scales, load_model, run_program
from model import Transformer
from tokenizer import Tokenizer


def read_texts(file: Path) -> list[str]:
    """The documents of `file`: of JSON lines (its name ends in .jsonl or .json) the string `text` of each object, of
    any other file its whole content as one.

    Raises FileNotFoundError without the file, ValueError if it is no UTF-8, for a line (named by its number) that is
    not such an object, and if there is no text at all.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no text file at {file}")
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    texts = []
    if file.suffix in (".jsonl", ".json"):
        for number, line in enumerate(content.rstrip().splitlines(), start=1):
            try:
                text = json.loads(line)["text"]
                text.encode()  # JSON can spell half a surrogate pair, which is no text
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{file}, line {number}: not a JSON object with a string 'text'") from None
            texts.append(text)
    else:
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not UTF-8 text") from None
    if not any(texts):
        raise ValueError(f"{file} holds no text")
    return texts


def windows(texts: list[str], tokenizer: Tokenizer, window: int) -> list[list[int]]:
    """<bos>, the tokens and <eos> of each text, all joined and cut into lists of `window` tokens.

    The last list may be shorter; one token alone, which predicts nothing, is left out. Raises ValueError for a window
    below 2 tokens and if less than 2 tokens are there.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, not {window}")
    tokens = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_id)]
    if len(tokens) < 2:
        raise ValueError(f"the text is too short: {len(tokens)} tokens, and a window needs 2")
    pieces = [tokens[i : i + window] for i in range(0, len(tokens), window)]
    return pieces if len(pieces[-1]) > 1 else pieces[:-1]


@torch.inference_mode()
def evaluate(
    model: Transformer,
    windows: list[list[int]],
    batch_size: int = 8,
    kv_dtype: torch.dtype | None = None,
    reference: Transformer | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict:
    """How well `model` predicts each token of a window from those before it in that window (token ids, at least 2).

    Returns `tokens`, the number of tokens predicted (all but each window's first); `loss`, their mean negative
    log-likelihood in nats; `perplexity`, exp(loss). With a `reference` also `kl`, the mean over the same positions of
    KL(reference || model) in nats, and `top1_agreement`, the share of them where both models' likeliest token is the
    same. At most batch_size windows run at once; K and V of `model` pass a cache in kv_dtype (None: the weights'),
    those of `reference` one in its own weights' dtype. `progress` is called with the number of windows just done.

    Raises ValueError for a batch_size below 1, no windows, a window that is too short or exceeds a model's context, a
    token id outside the vocabulary, models with vocabularies of different sizes, or too little GPU memory.
    """
    models = [model] if reference is None else [model, reference]
    kv_dtypes = (kv_dtype, None)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if not windows:
        raise ValueError("there are no windows to predict")
    lengths = set(map(len, windows))
    if min(lengths) < 2:
        raise ValueError(f"a window needs at least 2 tokens, not {min(lengths)}")
    for each in models:
        _check_window(each, max(lengths))
    vocab_sizes = [each.config.vocab_size for each in models]
    if len(set(vocab_sizes)) > 1:
        raise ValueError(f"vocabularies of {vocab_sizes[0]} and of {vocab_sizes[1]} tokens can't be compared")
    if not all(0 <= token < vocab_sizes[0] for window in windows for token in window):
        raise ValueError(f"the text has a token id outside the vocabulary of {vocab_sizes[0]}")

    device = model.device
    loss, kl, agreed = torch.zeros(3, dtype=torch.float64, device=device)
    try:
        for batch in _batches(windows, batch_size):
            tokens = torch.tensor(batch, device=device)  # [B, T]
            outputs = []
            for each, dtype in zip(models, kv_dtypes):
                each.setup_caches(*tokens.shape, dtype)
                outputs.append(each(tokens, all_logits=True))  # [B, T, V]
            for row, *logits in zip(tokens, *outputs):  # a row at a time: log-probabilities are as large as logits
                loss += F.cross_entropy(logits[0][:-1], row[1:], reduction="none").double().sum()
                if reference is None:
                    continue
                ours, theirs = (F.log_softmax(each[:-1], dim=-1) for each in logits)  # [T - 1, V]
                kl += (theirs.exp() * (theirs - ours)).sum(-1).double().sum()
                agreed += (ours.argmax(-1) == theirs.argmax(-1)).sum()
            progress(len(batch))
    except torch.OutOfMemoryError:
        raise ValueError(
            f"out of {device.type} memory with {batch_size} windows of {max(lengths)} tokens; "
            "lower --batch_size or --window"
        ) from None

    count = sum(len(window) - 1 for window in windows)
    loss = loss / count
    result = {"perplexity": loss.exp().item(), "loss": loss.item(), "tokens": count}
    if reference is not None:
        result |= {"kl": kl.item() / count, "top1_agreement": agreed.item() / count}
    return result


def _batches(windows: list[list[int]], batch_size: int):
    """At most batch_size neighbours of one length: without padding, every forward is that of an empty cache."""
    for _, group in groupby(windows, key=len):
        group = list(group)
        for i in range(0, len(group), batch_size):
            yield group[i : i + batch_size]


def _check_window(model: Transformer, window: int):
    if window > model.config.context_length:
        raise ValueError(f"a window of {window} tokens exceeds the context of {model.config.context_length}")


# ---------------------------------------------------------------------------------------------------------------------
# The program


def program_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="eval.py", description=__doc__)
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="plain text, or JSON lines (.jsonl) with 'text'")
    add("--window", type=int, default=1024, metavar="N", help="tokens that a forward sees (default: %(default)s)")
    add("--batch_size", type=int, default=8, metavar="N", help="windows that run at once (default: %(default)s)")
    add("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT, help="directory, or weight file in it")
    add("--fp8", action="store_true", help="run the linear layers in FP8")
    add("--kv_cache_dtype", choices=tuple(KV_DTYPES), default="auto", help="auto: as the weights")
    add("--device", choices=("cuda", "cpu"), help="(default: cuda where there is a GPU)")
    add("--precision", choices=tuple(PRECISIONS), default="bf16")
    add("--against", type=Path, metavar="PATH", help="a reference checkpoint; its KV cache is as its weights")
    add("--against_fp8", action="store_true", help="run the reference's linear layers in FP8")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace):
    for name, least in (("window", 2), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.against_fp8 and args.against is None:
        raise ValueError("--against_fp8 needs --against")

    def load(path: Path, fp8: bool) -> tuple[Transformer, Tokenizer]:
        return load_model(path, args.device, args.precision, **({"fp8": True} if fp8 else {}))

    texts = read_texts(args.text)
    model, tokenizer = load(args.checkpoint_path, args.fp8)
    _check_window(model, args.window)
    check_kv_scales(model, KV_DTYPES[args.kv_cache_dtype])
    pieces = windows(texts, tokenizer, args.window)
    reference = None
    if args.against is not None:
        reference, other = load(args.against, args.against_fp8)
        if other.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"{args.against} has a tokenizer of {other.vocab_size} tokens, "
                f"{args.checkpoint_path} one of {tokenizer.vocab_size}: they can't be compared"
            )
    with tqdm(total=len(pieces), unit="window", leave=False) as bar:
        result = evaluate(model, pieces, args.batch_size, KV_DTYPES[args.kv_cache_dtype], reference, bar.update)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"perplexity {result['perplexity']:.4f}, loss {result['loss']:.5f} nats a token, "
        f"{result['tokens']:,} tokens in {len(pieces):,} windows"
    )
    if reference is not None:
        print(f"KL {result['kl']:.3g} nats a token from {args.against}, top-1 agreement {result['top1_agreement']:.2%}")


def main(argv: list[str] | None = None) -> int:
    return run_program(run, program_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
