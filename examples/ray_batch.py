"""Text by Ray Data, for prompts that are a data set of it, on many GPUs or hosts:

    texts = ray.data.read_json("prompts.jsonl").map_batches(
        TextGenerator, fn_constructor_kwargs=dict(checkpoint_path=PATH, compile=True), batch_size=1024, num_gpus=1,
        concurrency=8)

with columns `prompt` and `index`, the prompt's number: with the seed it decides the noise, so that the text depends on
neither the batches nor the number of GPUs.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from generate import generate, load_model


class TextGenerator:
    """Loads a checkpoint once; adds the column `text` to batches. `options` are those of `generate`."""

    def __init__(
        self, checkpoint_path: str, device: str | None = None, precision: str = "bf16", seed: int = 0, **options
    ):
        self.model, self.tokenizer = load_model(checkpoint_path, device, precision)
        self.seed, self.options = seed, options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        prompts = [self.tokenizer.encode(str(prompt)) for prompt in batch["prompt"]]
        seeds = [(self.seed, int(i)) for i in batch["index"]]
        stop_ids, texts = self.model.config.stop_ids, []
        for tokens in generate(self.model, prompts, seed=seeds, **self.options):
            texts.append(self.tokenizer.decode(tokens[:-1] if tokens[-1] in stop_ids else tokens))
        return batch | {"text": np.array(texts, dtype=object)}
