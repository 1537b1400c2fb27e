"""The programs that benchmark.py measures beside ours: transformers in this process, vLLM in processes of its own.

`python benchmarks/peers.py DIR` is such a process: it reads DIR/job.json and writes DIR/results.jsonl. It imports
nothing of this project, so that vLLM may bring its own versions of what we use, too.
"""

import ctypes
import gc
import glob
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median

VLLM = "vLLM"
TORCHRUN = "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_"  # what vLLM is not to see
VLLM_PRECISIONS = {  # our name of it, arguments of vllm.LLM; FP8: layers and cache, not the head
    "bf16": {},
    "fp8-kv": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
VLLM_CONTEXT = 2048
VLLM_SETTINGS = {  # what the environment says goes before
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the process that we time and can end
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy decoding doesn't need it
    "VLLM_USE_DEEP_GEMM": "0",  # is of FP8 in blocks and of mixtures of experts only
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # there is nothing to download
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # one process on one GPU needs no network
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}


def hf_config(config) -> dict:
    """Returns config.json of a text model as Hugging Face has it, of our ModelConfig."""
    last = config.n_layers - 1
    content = {
        "model_type": {3: "gemma3_text", 4: "gemma4_text"}.get(config.generation, f"gemma{config.generation}"),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "eos_token_id": list(config.stop_ids),
    }
    if config.generation == 1:
        return content | {"model_type": "gemma"}
    kinds = ("full_attention", "sliding_attention")
    content |= {
        "sliding_window": config.window,
        "layer_types": [kinds[config.is_local(layer)] for layer in range(config.n_layers)],
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    if config.generation == 2:
        return content
    angles = [{"rope_type": "default", "rope_theta": theta} for theta in (config.rope_theta, config.rope_theta_local)]
    if config.rope_scale != 1:
        angles[0] |= {"rope_type": "linear", "factor": config.rope_scale}
    if config.rotated_share != 1:
        angles[0] |= {"rope_type": "proportional", "partial_rotary_factor": config.rotated_share}
    content["rope_parameters"] = dict(zip(kinds, angles))
    if config.generation == 3:
        return content
    del content["query_pre_attn_scalar"], content["attn_logit_softcapping"]
    return content | {
        "global_head_dim": config.head_dim_of(last),
        "num_global_key_value_heads": config.kv_heads_of(last),
        "attention_k_eq_v": config.k_eq_v,
        "num_kv_shared_layers": config.n_shared_layers,
        "use_double_wide_mlp": config.shared_intermediate_size is not None,
        "enable_moe_block": config.n_experts > 0,
        "num_experts": config.n_experts or None,
        "top_k_experts": config.n_active_experts or None,
        "moe_intermediate_size": config.expert_size or None,
        "hidden_size_per_layer_input": config.per_layer_size,
        "vocab_size_per_layer_input": config.per_layer_vocab_size or config.vocab_size,
    }


def choose(
    protocol: str, known: Iterable[str], wanted: Iterable[str] | None, vllm_site: Path | None
) -> tuple[str, ...]:
    """Returns those of a protocol's `known` peers that are to be measured: the `wanted` ones, or, if that is None,
    those that are installed, with a line on stderr for each that is not.

    `vllm_site` is a directory that holds vLLM for its own process only. Raises ValueError if a peer that was asked for
    by name is not known or not installed."""
    if vllm_site is not None and not (vllm_site / "vllm").is_dir():
        raise ValueError(f"--vllm_site {vllm_site} has no package vllm in it")
    found = {name for name in known if importlib.util.find_spec(name) or (name == "vllm" and vllm_site)}
    for name in known if wanted is None else wanted:
        if name not in known:
            raise ValueError(f"--peers {name}: protocol {protocol} has no such peer, only {', '.join(known)}")
        if name not in found:
            if wanted is not None:
                raise ValueError(f"--peers {name}: it is not installed")
            print(f"{name} is not installed: it is not timed", file=sys.stderr)
    return tuple(name for name in known if name in found and (wanted is None or name in wanted))


# ---------------------------------------------------------------------------------------------------------------------
# transformers, in this process


def transformers_model(config: dict, device):
    """Makes transformers' model of a Hugging Face config: random weights in BF16 on a torch.device."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.utils.logging.set_verbosity_error()
    with device:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)


def transformers_checkpoint(directory):
    """Loads a checkpoint into transformers' model, in BF16 on the CPU."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def transformers_generate(model, prompts: list[list[int]], new_tokens: int, **options) -> Callable[[], None]:
    """Returns a function that runs the peer's own loop once: greedy, no stop token, a dynamic cache unless `options`
    say otherwise, prompts padded on the left."""
    import torch

    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)

    def run():
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)
        assert output.shape[1] == width + new_tokens

    return run


def transformers_drafts(directories: list, prompt: list[int], new_tokens: int) -> Callable[[str, int], None]:
    """Returns a function that continues a prompt by the first of two checkpoints with the peer's drafts: of whom, "prompt
    lookup" or the second checkpoint, and how many a step, 0 for none."""
    model, assistant = map(transformers_checkpoint, directories)
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0

    def run(by: str, count: int):
        assistant.generation_config.num_assistant_tokens = count
        drafts = {"prompt_lookup_num_tokens": count} if by == "prompt lookup" else {"assistant_model": assistant}
        transformers_generate(model, [prompt], new_tokens, **(drafts if count else {}))()

    return run


def transformers_training(config: dict, device, lora_rank: int, length: int, rows: int) -> Callable[[], None] | None:
    """A step of transformers' model on `rows` rows of `length` random tokens, 4,096 at a time: parameters in float32,
    products in BF16 by autocast, AdamW fused, attention by sdpa; with lora_rank PEFT's adapters on a BF16 model. None,
    with a line, where PEFT is not installed or memory is too small, even where activations are computed again."""
    import torch
    import transformers

    def start(keeps: bool) -> Callable[[], None]:
        dtype = torch.bfloat16 if lora_rank else torch.float32
        settings = transformers.AutoConfig.for_model(**config)
        with torch.device(device):
            options = dict(attn_implementation="sdpa", dtype=dtype)
            model = transformers.AutoModelForCausalLM.from_config(settings, **options)
        if lora_rank:
            from peft import LoraConfig, get_peft_model

            modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=modules))
        model.train()
        if not keeps:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        tokens = torch.randint(3, settings.vocab_size, (rows, length), device=device)

        def step():
            for some in tokens.split(max(1, 4096 // length)):
                with torch.autocast(torch.device(device).type, torch.bfloat16):
                    loss = model(input_ids=some, labels=some, use_cache=False).loss
                (loss * (len(some) / rows)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        torch.cuda.reset_peak_memory_stats()
        return step

    for keeps in (True, False):
        try:
            return start(keeps)
        except (torch.OutOfMemoryError, ImportError) as error:
            told = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        gc.collect()
        torch.cuda.empty_cache()
    print(f"transformers' training is left out: {told}", file=sys.stderr, flush=True)
    return None


@contextmanager
def transformers_batching(
    model, prompts: list[list[int]], limits: list[int], timeout: float
) -> Iterator[Callable[[], None]]:
    """Gives a function that has the peer's continuous batching make limits[i] new tokens of prompts[i] once: greedy, no
    stop token.

    Settings are the peer's own: attention by flash-attn, with CUDA graphs, where it is installed, else by PyTorch's
    sdpa over pages, without; a cache in 90 % of the free memory. But nothing is kept of earlier prompts. Thread, cache
    and graphs are made before the first run. A run raises RuntimeError if a request fails, if other numbers of tokens
    come than were asked for, or if it is not done after `timeout` seconds."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what fails is told here
    share = {"max_memory_percent": 0.01} if model.device.type == "cpu" else {}  # whose memory is everybody's
    manager = model.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(allow_block_sharing=False, **share),
        WorkloadHints(max(map(len, prompts)), max(limits), len(prompts)),
    )

    def run():
        end, counts = time.perf_counter() + timeout, {}
        names = [manager.add_request(prompt, max_new_tokens=limit) for prompt, limit in zip(prompts, limits)]
        while len(counts) < len(prompts):
            if time.perf_counter() > end:
                raise RuntimeError(f"it was not done after {timeout:g} seconds (--peer_timeout)")
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError(f"it ended: {manager.background_thread_status.fatal_error}")
            elif result.error is not None:
                raise RuntimeError(result.error)
            else:
                counts[result.request_id] = len(result.generated_tokens)
        if [counts.get(name) for name in names] != limits:
            raise RuntimeError(f"{sum(limits)} tokens were asked for, {sum(counts.values())} came")

    try:
        manager.warmup()
        manager.start()
        yield run
    finally:
        manager.stop(timeout=60, hard_stop=True)


# ---------------------------------------------------------------------------------------------------------------------
# vLLM, in a process of its own


def vllm_precisions(ours: Iterable[str]) -> list[str]:
    """Returns the names of vLLM's precisions that stand beside those of ours: BF16 beside BF16, FP8 beside any FP8."""
    return [name for name in VLLM_PRECISIONS if any(other.split("-")[0] == name.split("-")[0] for other in ours)]


def vllm_drafts(model: dict | None, right: Iterable[float]) -> dict:
    """Returns vLLM's settings of drafts by a model of Hugging Face's config, or, if that is None, by a lookup of the last
    1 to 5 tokens in the text. So many of them are taken at each place, behind taken ones, as `right` says."""
    rates = list(accumulate(right, lambda share, behind: share * behind))
    by = {"method": "draft_model", "model": model} if model else {"method": "ngram_gpu", "prompt_lookup_max": 5}
    by |= {} if model else {"prompt_lookup_min": 1}
    return by | {
        "num_speculative_tokens": len(rates),
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": rates,
    }


def vllm_figures(
    config: dict,
    precision: str,
    cases: list[tuple[list[list[int]], int | list[int], int]],
    repeats: int,
    site: Path | None,
    timeout: float,
    gpus: int = 1,
    drafts: dict | None = None,
) -> Iterator[dict]:
    """Measures vLLM with random weights on cases, one after the other: prompts of token ids, how many new tokens all or
    each of them get, and how many samples of each. Without a stop; greedy, or, of several samples, temperature 0.8 and
    top-k 200. Yields the figures of each case's row, and under "versions" those of vLLM and of the torch that it ran
    on.

    `drafts` is vLLM's speculative_config; a "model" in it is Hugging Face's config of one, which gets random weights, too.

    `config` is Hugging Face's, `site` a directory that only that process imports from, `timeout` in seconds for each
    case. vLLM doesn't say when prefill ends, so that every repeat has two calls, one with all new tokens and one with a
    single one: the second takes "prefill_seconds", and the difference is what the other steps took, "decode_seconds".
    "load_seconds" is the time to make vllm.LLM ready, compiling included. Raises RuntimeError, in a line, if vLLM fails
    or takes too long, behind the cases that were done by then."""
    keys = ("prompts", "new_tokens", "samples")
    job = {"precision": precision, "repeats": repeats, "cases": [dict(zip(keys, case)) for case in cases]}
    job |= {"gpus": gpus, "drafts": drafts}
    results, failure = _in_process(config, job, site, timeout * len(cases))
    for (prompts, new_tokens, samples), result in zip(cases, results):
        rows = samples * len(prompts)
        total = samples * sum(new_tokens) if isinstance(new_tokens, list) else rows * new_tokens
        first, *whole = result["seconds"]
        _, *single = result["single_token_seconds"]
        decode = [long - short for long, short in zip(whole, single)]
        rates = [(total - rows) / seconds for seconds in decode]
        yield {
            "name": VLLM,
            "seconds": median(whole),
            "seconds_spread": [min(whole), max(whole)],
            "first_run_seconds": first,
            "tokens_per_second": total / median(whole),
            "prefill_seconds": median(single),
            "decode_seconds": median(decode),
            "decode_tokens_per_second": median(rates),
            "decode_spread": [min(rates), max(rates)],
            "load_seconds": result["load_seconds"],
            "versions": result["versions"],
        }
    if failure:
        raise RuntimeError(failure)


def _in_process(config: dict, job: dict, site: Path | None, timeout: float) -> tuple[list[dict], str]:
    """Returns the results of the cases that were done, and a line on why not all were, or an empty one."""
    with tempfile.TemporaryDirectory() as temporary:
        directory, failure = Path(temporary), ""
        _write_config(directory / "model", config)
        if "model" in (job["drafts"] or {}):
            _write_config(directory / "draft", job["drafts"]["model"])
            job["drafts"] |= {"model": str(directory / "draft")}
        (directory / "job.json").write_text(json.dumps(job))
        log, results = directory / "log", directory / "results.jsonl"
        results.touch()
        with log.open("wb") as out:
            # In that directory, since a Python that vLLM starts imports from the working directory first.
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), temporary],
                env=_environment(site),
                cwd=temporary,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts can be ended with it
            )
            try:
                status = process.wait(timeout)
                failure = f"exit status {status}: {_last_error(log.read_text(errors='replace'))}" if status else ""
            except subprocess.TimeoutExpired:
                failure = f"it was not done after {timeout:g} seconds (--peer_timeout)"
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
        return [json.loads(line) for line in results.read_text().splitlines()], failure


def _write_config(directory: Path, config: dict):
    activation = dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
    kind = config["model_type"].removesuffix("_text").capitalize()
    config = config | {"architectures": [f"{kind}ForCausalLM"], "torch_dtype": "bfloat16", **activation}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))


def _environment(site: Path | None) -> dict[str, str]:
    environment = VLLM_SETTINGS | os.environ
    for name in [name for name in environment if name.startswith(TORCHRUN)]:
        del environment[name]
    for name, folder in (("PYTHONPATH", site and site.resolve()), ("LD_LIBRARY_PATH", _nvml_folder())):
        if folder is not None:
            environment[name] = os.pathsep.join(filter(None, (str(folder), environment.get(name))))
    return environment


def _nvml_folder() -> Path | None:
    """Returns where NVIDIA's management library is, if the loader doesn't find it: without it vLLM sees no GPU."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        found = glob.glob("/usr/local/nvidia/**/libnvidia-ml.so.1", recursive=True)
        return Path(found[0]).parent if found else None


def _last_error(log: str) -> str:
    """Returns the last line that tells an exception, since vLLM prints warnings on its way out, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [i for i, line in enumerate(lines) if re.search(r"\b\w*(Error|Exception|Interrupt)\b", line)] or [-1]
    line, *behind = lines[errors[-1] :]
    return " ".join([line, *behind[: "validation error for" in line]])[:300]  # which pydantic tells in the next line


def _of_each(case: dict) -> list[int]:
    """The new tokens of each prompt of a case."""
    new_tokens = case["new_tokens"]
    return new_tokens if isinstance(new_tokens, list) else [new_tokens] * len(case["prompts"])


def main(directory: Path):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the benchmark, whatever ends that

    from vllm import LLM, SamplingParams, __version__

    job = json.loads((directory / "job.json").read_text())
    config = json.loads((directory / "model" / "config.json").read_text())
    cases, sharing = job["cases"], any(case["samples"] > 1 for case in job["cases"])
    longest = max(len(prompt) for case in cases for prompt in case["prompts"])
    longest += max(max(_of_each(case)) for case in cases)
    start = time.perf_counter()
    llm = LLM(
        model=str(directory / "model"),
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=min(max(VLLM_CONTEXT, longest), config["max_position_embeddings"]),
        gpu_memory_utilization=0.9,
        tensor_parallel_size=job["gpus"],
        enable_prefix_caching=sharing,  # each repeat has the prompts of the one before
        seed=0,
        speculative_config=job["drafts"],
        **VLLM_PRECISIONS[job["precision"]],
    )
    load_seconds = time.perf_counter() - start
    versions = {"vllm": __version__, "vllm_torch": importlib.metadata.version("torch")}

    def generate(case: dict, wanted: list[int]) -> float:
        n = case["samples"]
        draw = {"n": n, "temperature": 0.8, "top_k": 200} if n > 1 else {"temperature": 0.0}
        settings = [SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False, **draw) for count in wanted]
        prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
        if sharing:
            llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        counts = [[len(sample.token_ids) for sample in output.outputs] for output in outputs]
        if counts != [[count] * n for count in wanted]:
            raise ValueError(f"{n * sum(wanted)} tokens were asked for, {sum(map(sum, counts))} came")
        return seconds

    for case in cases:
        new_tokens = _of_each(case)
        runs = [(generate(case, new_tokens), generate(case, [1] * len(new_tokens))) for _ in range(1 + job["repeats"])]
        whole, single = zip(*runs)
        result = {"load_seconds": load_seconds, "seconds": whole, "single_token_seconds": single}
        with (directory / "results.jsonl").open("a") as file:
            file.write(json.dumps(result | {"versions": versions}) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the way out may take long, and there is nothing left to do


if __name__ == "__main__":
    main(Path(sys.argv[1]))
