"""What benchmark.py measures of fine-tuning: steps of finetune.py on random weights, beside transformers' with the same
recipe."""

import argparse
from array import array
from collections.abc import Iterator
from itertools import product

import torch

from benchmarks import peers
from benchmarks.checkpoints import GIB, release
from benchmarks.measuring import random_prompts, rounded, seconds_of, time_in_turn
from benchmarks.report import OURS
from config import ModelConfig
from device import peak_memory
from finetune import PEAKS, Objective, Trainer, add_adapters, rows_at_once, shard, unfrozen, workers
from model import Transformer
from ops.training import choose
from training_data import Data, Document


def training(
    args: argparse.Namespace, shapes: tuple[tuple[int, int], ...] = ((4096, 8), (256, 8)), rank: int = 16
) -> Iterator[dict]:
    """A step of fine-tuning on 8 rows of 4,096 tokens, and of 256 as in TransformerEngine's tutorial: all weights, where
    16 bytes a parameter fit, and adapters of rank 16; FP8 by current scaling. Started by torchrun, on all of its GPUs.
    Activations are kept if memory holds them. tflops and mfu are a GPU's. Peer: transformers, the same recipe."""
    with workers("cuda") as ranks:
        for name, lora, precision in product(args.models, (0, rank), args.precisions):
            config, total = ModelConfig.from_name(name), torch.cuda.get_device_properties(ranks.device).total_memory
            with torch.device("meta"):
                count = sum(p.numel() for p in Transformer(config).parameters())
            if not lora and 16 * count / ranks.count > 0.82 * total:
                print(f"{name}, all weights, is left out: {16 * count / ranks.count / GIB:.0f} GiB a GPU", flush=True)
                continue
            case = {"model": name, "precision": precision, "trained": f"adapters of rank {lora}" if lora else "all"}
            for length, rows in shapes:
                columns = case | {"gpus": ranks.count, "length": length, "batch": rows}
                row = time_training(args, config, precision, lora, ranks, length, rows)
                if ranks.first:
                    yield rounded(columns | row)
                if "transformers" in args.peers and ranks.count == 1 and precision == "bf16":
                    release()
                    run = peers.transformers_training(peers.hf_config(config), ranks.device, lora, length, rows)
                    if run is not None:
                        flop, seconds = row["flop"], seconds_of(time_in_turn({"": run}, args.repeats, ranks.device)[""])
                        yield rounded(
                            columns | {"name": "transformers"} | training_figures(seconds, flop, ranks, length * rows)
                        )
                        del run
                release()


def time_training(args, config: ModelConfig, precision: str, lora: int, ranks, length: int, rows: int) -> dict:
    """Figures of our steps, as finetune.py makes them."""
    documents = [Document(array("i", each), b"\1" * length) for each in random_prompts(rows, length, config.vocab_size)]
    settings = {"rows": rows, "all_rows": 10**6 * rows, "learning_rate": 1e-5, "weight_decay": 0.0}
    release()
    torch.cuda.reset_peak_memory_stats()
    try:
        model = Transformer.random(config, ranks.device, dtype=torch.bfloat16 if lora else torch.float32)
        if lora:
            add_adapters(model, lora, 0)
        else:
            for layer in model.layers:
                shard(layer, ranks, torch.bfloat16)
            unfrozen(model)
        options = (config.norm_eps, config.norm_offset, "current" if precision == "fp8" else None)
        operations, sharded = choose(ranks.device, torch.bfloat16, *options), ranks.count > 1 and not lora
        objective = Objective(model, operations, torch.bfloat16, sharded)
        if not lora:
            shard(objective, ranks, torch.bfloat16)
        at_once = rows_at_once(config, ranks.device, length, sharded)
        trainer = Trainer(objective, Data(documents, length), ranks, settings, 10**6, at_once, adapts=True)
        trainer.train_step()  # and the next one, which warms up, too, may keep activations or record
        runs = time_in_turn({OURS: trainer.train_step}, args.repeats, ranks.device)[OURS]
    except torch.OutOfMemoryError:
        raise ValueError(f"out of GPU memory with rows of {length} tokens") from None
    row = {"name": OURS, "by": operations.name, "activations": "computed again" if objective.recompute else "kept"}
    row |= {"at_once": trainer.at_once, "recorded": trainer.recording is not None}
    return row | training_figures(seconds_of(runs), runs[0][1]["flop"], ranks, length * rows)


def training_figures(seconds: dict, flop: float, ranks, tokens: int) -> dict:
    rate = flop / seconds["seconds"] / ranks.count
    peak = next((peak for gpu, peak in PEAKS.items() if gpu in torch.cuda.get_device_name(ranks.device)), None)
    figures = seconds | {"tokens_per_second": tokens / seconds["seconds"], "flop": flop, "tflops": rate / 1e12}
    figures |= {} if peak is None else {"mfu": rate / peak}
    return figures | {"peak_allocated_gib": peak_memory(ranks.device) / GIB}
