"""Tiny random models made by transformers, the reference, and saved as Hugging Face publishes them; and Triton's
interpreter as all tests have it."""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, for the programs that tests start, too
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TINY_GEMMA = ROOT / "checkpoints" / "tiny-gemma"
GREEDY = dict(temperature=0, stop_ids=())
CODE = (  # to calibrate on
    "import os\n\n\ndef walk(path):\n    for name in os.listdir(path):\n        yield os.path.join(path, name)\n" * 20
)
TEXTS = (  # prompts of different lengths
    "def fibonacci(n):\n",
    "import os\n\n\nclass Path:\n    def __init__(self, path):\n",
    "#",
    "x = [i for i in",
)

# hidden 64 and head_dim 24 or 32: head_dim is never hidden / heads. Sequences in the tests have about 40 tokens.
SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    head_dim=32,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
)
LINEAR_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA4 = dict(  # heads of global layers are twice as large, and 8 of their 32 pairs rotate
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=6,
    layer_types=[LOCAL, LOCAL, GLOBAL] * 2,
    head_dim=32,
    global_head_dim=64,
    sliding_window=6,
    final_logit_softcapping=30.0,
    hidden_size_per_layer_input=0,
)
PER_LAYER = dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=128)
CASES = {
    "gemma-mha": ("gemma", dict(num_attention_heads=4, num_key_value_heads=4, head_dim=24)),
    "gemma-gqa": ("gemma", dict(num_attention_heads=4, num_key_value_heads=2)),
    "gemma-mqa": ("gemma", dict(num_attention_heads=4, num_key_value_heads=1)),
    "gemma2-window-half": (
        "gemma2",
        dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=20, query_pre_attn_scalar=48),
    ),
    "gemma2-window-small": (
        "gemma2",
        dict(
            num_attention_heads=4,
            num_key_value_heads=4,
            sliding_window=5,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=4.0,  # small, so that both caps bend what the tests see
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3-window-half": (
        "gemma3_text",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=4,
            layer_types=[LOCAL, LOCAL, GLOBAL, LOCAL],
            sliding_window=20,
            query_pre_attn_scalar=40,
            rope_parameters=LINEAR_ROPE,
        ),
    ),
    "gemma3-window-small": (  # five local layers for a global one, which no layer_types say
        "gemma3_text",
        dict(num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=7, sliding_window=6),
    ),
    # In turn as 31B, 26B-A4B and 12B: with experts, keys that are values, and the 12B's type
    "gemma4-experts": (
        "gemma4_text",
        GEMMA4
        | dict(
            attention_k_eq_v=True, num_global_key_value_heads=1, num_hidden_layers=3, layer_types=[LOCAL, LOCAL, GLOBAL]
        )
        | dict(enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=48),
    ),
    "gemma4-unified": (
        "gemma4_unified_text",
        GEMMA4
        | dict(attention_k_eq_v=True, num_global_key_value_heads=1, sliding_window=20)
        | dict(num_hidden_layers=4, layer_types=[LOCAL, GLOBAL] * 2),
    ),
    # As E2B: the last layers share keys and have a feed-forward of their own size, all have embeddings of their own
    "gemma4-shared": (
        "gemma4_text",
        GEMMA4 | PER_LAYER | dict(num_key_value_heads=1, num_kv_shared_layers=3, use_double_wide_mlp=True),
    ),
}


def reference_model(case: str, seed: int = 0):
    """transformers' model for a case: float32, random weights, norm weights that are not zero."""
    import transformers

    model_type, settings = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | settings))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Layers that outweigh the embedding: greedy tokens then vary, instead of repeating the last one.
            mean, deviation = 0.0, 0.1 if "embed" in name else 0.3
            if model_type.startswith("gemma4") and parameter.dim() == 1:  # norms' weights are factors, no offsets
                # Scores are not scaled: large ones make of softmax a choice, and of float32's rounding 2e-4
                mean, deviation = (0.4, 0.1) if "self_attn" in name else (1.0, 0.2)
            parameter.normal_(mean, deviation)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.normal_(0.8, 0.1)
    return model.eval()


def copy_tiny_gemma(directory: Path) -> Path:
    """As committed, whether or not it was converted since."""
    return shutil.copytree(
        TINY_GEMMA, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("gemma*.safetensors")
    )


CHAT_TEMPLATE = """\
{%- macro answer(text) -%}
    {%- set found = namespace(text='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set found.text = found.text + part.split('<|channel>')[0] -%}
    {%- endfor -%}
    {{- found.text | trim -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set system = messages[0].role in ('system', 'developer') -%}
{%- if system or enable_thinking -%}
    {{- '<|turn>system\\n' + ('<|think|>\\n' if enable_thinking else '') -}}
    {{- messages[0].content | trim if system else '' -}}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if message.role not in ('user', 'assistant') -%}
        {{- raise_exception('a ' + message.role + ' message in the middle') -}}
    {%- endif -%}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
    {{- answer(message.content) if message.role == 'assistant' else message.content | trim -}}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""  # of the form that Gemma 4's chats have
GEMMA4_SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<|tool_response>", "<|think|>", "<|channel>", "<channel|>"),
    *("<|turn>", "<turn|>", "<|image>"),
)


def save_json_tokenizer(directory: Path, vocab_size: int = 640) -> Path:
    """tokenizer.json as Gemma 4's, but small, with its settings and a chat template beside it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = [*GEMMA4_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=tokens, show_progress=False)
    # None of the program's own, whose edits would make other pieces; pieces of newlines are those of the next line alone
    texts = [" ".join((ROOT / "LICENSE").read_text().split())]
    tokenizer.train_from_iterator([*texts, "user model system\n\n\n\n <end_of_turn> é" * 20], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(GEMMA4_SPECIAL)]  # bytes are pieces like others
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken("<table>", normalized=False)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "tokenizer_class": "GemmaTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def save_checkpoint(model, directory: Path, **options) -> Path:
    """As Hugging Face publishes it, with tiny-gemma's tokenizer beside it."""
    model.save_pretrained(directory, **options)
    shutil.copy(TINY_GEMMA / "tokenizer.model", directory)
    return directory


ONE_LAYER = dict(num_hidden_layers=1, vocab_size=4096)  # settings of models that are compiled; tiny-gemma's tokenizer


def tiny_config(case: str = "gemma-gqa", **settings):
    """The settings of a case as a `ModelConfig`."""
    from config import ModelConfig

    model_type, own = CASES[case]
    return ModelConfig.from_hf(SIZES | own | {"model_type": model_type} | settings)


def small_model(seed: int = 0, case: str = "gemma-gqa", **settings):
    """A random model in float32 whose greedy tokens vary; it needs no transformers."""
    from model import Transformer

    model = Transformer.random(tiny_config(case, **settings), dtype=torch.float32, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
        model.embedding.weight.div_(3)
    return model


def assert_not_finite_ends_a_run(model, prompts, at: int, **options):
    """A NaN that is in a weight from `at` on, a step or 0 for prefill, ends a run; the next one is as ever."""
    from device import now
    from generate import generate

    options |= dict(seed=1, stop_ids=())
    expected, weight = generate(model, prompts, 16, **options), model.norm.weight
    good = weight[3].item()

    def poison(step: int, _):
        if step == at:
            weight[3] = float("nan")
            now(model.device)  # before the step

    try:
        with pytest.raises(ValueError, match="not finite"):
            generate(model, prompts, 16, on_step=poison, **options)
    finally:
        weight[3] = good
    assert generate(model, prompts, 16, **options) == expected


def fake_input(monkeypatch, lines: list[str]):
    lines = iter(lines)

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


patched_modules = set()  # Triton's own, in which the interpreter has replaced what it replaces


@pytest.fixture(autouse=True)
def exact_interpreter(monkeypatch):
    """Makes the interpreter round as the hardware does, and take a third of its time.

    Triton's interpreter cuts bfloat16 off, loses FP8's carries (1.99 becomes 1), makes no bfloat16 of integers,
    multiplies its matrices as integers, and with NumPy 2.5 can't use a loaded number as a loop's bound. For each call
    of a function it replaces all of the language anew, which the launch of the kernel has done before, and for each sum
    of integers it finds out whether it overflows, which it tells nobody.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    torch_dtypes = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    as_integers = {1: np.uint8, 2: np.uint16, 4: np.uint32}

    def convert(data, source, target, rounding=None):
        source, target = torch_dtypes[source], torch_dtypes[target]
        values = torch.from_numpy(np.frombuffer(data.tobytes(), np.uint8).copy()).view(source).to(target)
        return values.view(torch.uint8).numpy().view(as_integers[target.itemsize]).reshape(data.shape)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            x.data if x.dtype == tl.float32 else convert(x.data, x.dtype, tl.float32).view(np.float32) for x in (a, b)
        )
        return interpreter.TensorHandle(a @ b + d.data, d.dtype.scalar)

    def from_integers(self, source, target):
        values = source.data.astype(np.float32)
        values = values if target.scalar == tl.float32 else convert(values, tl.float32, target.scalar)
        return interpreter.TensorHandle(values, target.scalar)

    def patch_tensor(tensor, scope, original=interpreter._patch_lang_tensor):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched_modules:  # nothing undoes this
            interpreter._patch_lang(self.fn)
            patched_modules.add(module)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", from_integers)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))


def made_once(tmp_path_factory, name: str, make) -> Path:
    """A directory that `make`(directory) filled, once for all of xdist's workers. Whoever changes it takes a copy."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = base / name
    with FileLock(base / f"{name}.lock"):
        if not directory.exists():
            partial = base / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(directory)
    return directory


@pytest.fixture(scope="session")
def tiny():
    """tiny-gemma in float32, where a different batch or kernel moves no greedy token, and its tokenizer."""
    from generate import load_model

    return load_model(TINY_GEMMA, device="cpu", precision="fp32")


@pytest.fixture(scope="session")
def json_tokenizer(tmp_path_factory):
    """A directory with a small tokenizer.json, its settings and a chat template."""
    return made_once(tmp_path_factory, "json_tokenizer", save_json_tokenizer)


@pytest.fixture(scope="session")
def from_json(json_tokenizer):
    from tokenizer import JsonTokenizer

    return JsonTokenizer(json_tokenizer / "tokenizer.json")


@pytest.fixture(scope="session")
def transformers_tokenizer(json_tokenizer):
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(json_tokenizer / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    reference.chat_template = CHAT_TEMPLATE
    return reference


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory):
    """A copy of tiny-gemma with factors from a short text."""
    import calibrate

    def make(directory):
        copy_tiny_gemma(directory)
        (directory / "text.txt").write_text(CODE)
        arguments = ["--checkpoint_path", str(directory), "--text", str(directory / "text.txt"), "--window", "128"]
        assert calibrate.main([*arguments, "--device", "cpu"]) == 0

    return made_once(tmp_path_factory, "calibrated", make)


@pytest.fixture(scope="session", params=list(CASES))
def reference(request, tmp_path_factory):
    """(transformers' model, directory of the same as a checkpoint) for each case."""
    model = reference_model(request.param)
    return model, save_checkpoint(model, tmp_path_factory.mktemp(request.param))


def pytest_addoption(parser):
    parser.addoption("--mutations", type=int, default=1000, help="of checkpoints in test_fuzz.py (default: 1000)")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
