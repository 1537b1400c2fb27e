"""Checkpoints that something happened to: each is refused in one line, or is the same model as before.

`pytest tests/test_fuzz.py -s --mutations 5000` runs a longer test and prints how many ended which way. A mutation
depends on the kind of checkpoint and its number only, both of which a failure names.
"""

import json
import os
import random
import shutil
import signal
import struct
import time
import warnings
from collections import Counter
from dataclasses import asdict
from math import isfinite
from pathlib import Path

import pytest
import torch
from conftest import TINY_GEMMA, made_once, tiny_config
from safetensors.torch import load_file, save_file

import quantize
from checkpoint import convert, fp8_scale_names, open_checkpoint, sources, write_scales
from generate import load_model
from model import Transformer

SECONDS = 2  # that a refusal or a tiny model may take
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
    num_key_value_heads=1, max_position_embeddings=256, eos_token_id=1, tie_word_embeddings=True, rms_norm_eps=1e-6,
    hidden_activation="gelu_pytorch_tanh", initializer_range=0.02,
)  # fmt: skip
GEMMA = SIZES | dict(model_type="gemma", rope_theta=10000.0)
GEMMA2 = SIZES | dict(
    model_type="gemma2", sliding_window=20, query_pre_attn_scalar=48, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
GEMMA3 = SIZES | dict(
    model_type="gemma3_text", sliding_window=20, query_pre_attn_scalar=40, rope_theta=1e6, rope_local_base_freq=1e4,
    rope_scaling={"rope_type": "linear", "factor": 8.0}, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
KINDS = {  # a way to name each checkpoint -> what is loaded of its directory, and the options that it is loaded with
    "single": (".", [{}]),
    "sharded": (".", [{}]),
    "converted": (".", [{}, {"fp8": True}]),
    "fp8": (".", [{"fp8": True}]),
    "hub": (".", [{}]),
    "int8": ("gemma-int8.safetensors", [{}]),
    "int4": ("gemma-int4-g32.safetensors", [{}]),
}

# ---------------------------------------------------------------------------------------------------------------------
# The checkpoints


def save(directory: Path, config: dict, shards: int = 1, prefix: str = ""):
    """A random model of `config` as Hugging Face publishes it."""
    directory.mkdir()
    shutil.copy(TINY_GEMMA / "tokenizer.model", directory)
    text = {"text_config": config, "model_type": "gemma3", "eos_token_id": [1, 9]} if prefix else config
    (directory / "config.json").write_text(json.dumps(text))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "pad_token_id": 0}))
    settings = tiny_config(**config)
    model, weights = Transformer.random(settings).state_dict(), {}
    for name, parts in sources(settings).items():
        rows = model[name].split([shape[0] for _, shape in parts])
        weights |= {prefix + theirs: part.clone() for (theirs, _), part in zip(parts, rows)}
    if shards == 1:
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return
    weights["vision_tower.patch.weight"] = torch.ones(2, 3)
    index, names = {}, list(weights)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        index |= dict.fromkeys(names[i::shards], file)
        save_file({name: weights[name] for name in names[i::shards]}, directory / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    def make(directory):
        save(directory / "single", GEMMA2)
        save(directory / "sharded", GEMMA3, 3, "language_model.")
        save(directory / "converted", GEMMA)
        source = directory / "converted"
        checkpoint = open_checkpoint(source)
        convert(checkpoint, source / "gemma.safetensors")
        weights = load_file(source / "gemma.safetensors")
        scales = {name: 0.03125 for name in fp8_scale_names(checkpoint.config)}
        for name in scales:
            if name.endswith("weight_scale"):
                weight = "embedding.weight" if name.startswith("head") else name.removesuffix("_scale")
                scales[name] = weights[weight].abs().max().item() / 448
        write_scales(source / "fp8_scales.safetensors", checkpoint.config, scales, {"tokens": "100"})
        (source / "model.safetensors").unlink()
        quantize.quantize_fp8(open_checkpoint(source), scales, source / "gemma-fp8.safetensors")
        for mode in ("int8", "int4"):
            assert quantize.main(["--checkpoint_path", str(source), "--mode", mode]) == 0
        for kind, file in (("fp8", "gemma-fp8.safetensors"), *((kind, KINDS[kind][0]) for kind in ("int8", "int4"))):
            (directory / kind).mkdir()
            for name in ("config.json", "generation_config.json", "tokenizer.model"):
                shutil.copy(source / name, directory / kind)
            (source / file).rename(directory / kind / file)
        for file in ("int8/gemma-int8-fp8_scales.safetensors", "int4/fp8_scales.safetensors"):
            shutil.copy(source / "fp8_scales.safetensors", directory / file)
        quantize.export_hf(open_checkpoint(source), scales, directory / "hub")

    return made_once(tmp_path_factory, "fuzz", make)


# ---------------------------------------------------------------------------------------------------------------------
# What happens to a file. A mutation gives what replaces the file's bytes and what must follow: it is "refused", is the
# "same" model, or ("any") either; the model may have other "settings", as config.json says, or other "data" in its weights.

TOKENS = (
    "null", "true", "false", "0", "-0", "-1", "1", "2", "3", "7", "16", "1.0", "1.5", "256.0", "1e-6", "0.0", "-1.5", "1e999",
    "1e39", "1e-300", "2147483647", "2147483648", "9223372036854775808", "1" + "0" * 400, "9" * 5000, '""', '"x"', '"1"',
    '"NaN"', '"F32"', '"full_attention"', '"linear"', '"fp8"', '"gemma2"', '"\\ud800"', '"a\\nb"', '"../x.safetensors"',
    '"/dev/zero"', '"config.json"', '"fp8_scales.safetensors"', "[]", "{}", "[1]", "[1, 1]", "[0, 0]", "[-1]", "[1.5]", "[[]]",
    '{"a": 1}', '["x"]', "[1, 2, 3]", json.dumps(list(range(17))), json.dumps(["full_attention"] * 2),
)  # fmt: skip
BROKEN = (
    "NaN",
    "Infinity",
    "-Infinity",
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    "",
    "01",
)
INTEGERS = {  # keys of config.json
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "sliding_window",
}  # fmt: skip
NUMBERS = {"rms_norm_eps", "query_pre_attn_scalar", "rope_theta", "rope_local_base_freq", "factor"}
CAPS = {"attn_logit_softcapping", "final_logit_softcapping"}
OBJECTS = {"rope_parameters", "rope_scaling", "quantization_config"}
KNOWN = INTEGERS | NUMBERS | CAPS | OBJECTS | {"eos_token_id", "layer_types", "tie_word_embeddings"}


def is_legal(key: str, value) -> bool:
    """Whether config.json can have this value; True for keys that say nothing of the model."""
    if key in INTEGERS:
        return type(value) is int and 0 < value < 2**31 and (key != "num_hidden_layers" or value <= 1000)
    if key in NUMBERS or (key in CAPS and value is not None):
        return type(value) in (int, float) and 1e-38 < value < 1e38
    if key in OBJECTS:
        return value is None or isinstance(value, dict)
    if key == "eos_token_id":
        ids = value if isinstance(value, list) else [1 if value is None else value]
        return 0 < len(ids) <= 16 and all(type(token) is int and 0 <= token < 2**31 for token in ids)
    if key == "layer_types":
        return value is None or (
            isinstance(value, list) and len(value) == 2 and set(value) <= set(GEMMA3["layer_types"])
        )
    return key != "tie_word_embeddings" or value is True


def nodes(content, path=()):
    """(parent, key or index) of every value in `content`."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from nodes(value)


def mutated_json(rng: random.Random, text: bytes, name: str) -> tuple[bytes, str]:
    content = json.loads(text)
    places = list(nodes(content))
    known = [(parent, key) for parent, key in places if key in KNOWN]
    parent, key = rng.choice(known if known and rng.random() < 0.7 else places)
    objects = [content, *(p[k] for p, k in places if isinstance(p[k], dict) and p[k])]
    what = rng.choice(
        ("value", "value", "value", "value", "broken", "twice", "mark", "spaces", "delete", "rename", "bytes")
    )
    if what == "bytes":
        return mutated_bytes(rng, text), "settings"
    if what == "mark":
        return b"\xef\xbb\xbf" + text, "refused"
    if what == "spaces":
        if isinstance(parent, dict) and name.endswith(".json"):
            parent[key] = parent.pop(key)  # to the end
        return json.dumps(content, indent=rng.randrange(3)).encode(), "same"
    if what in ("delete", "rename"):
        if isinstance(parent, dict) and what == "rename":
            parent[rng.choice((f"{key}x", str(key)[:-1], str(key).upper(), f"language_model.{key}", "x\ny"))] = parent[
                key
            ]
        del parent[key]
        return json.dumps(content).encode(), "settings"
    if what == "twice":
        parent = rng.choice(objects)
        key = rng.choice(list(parent))
        parent["@"] = rng.choice((parent[key], 1))
        return json.dumps(content).replace('"@"', json.dumps(key)).encode(), "refused"
    token = rng.choice(BROKEN if what == "broken" else TOKENS)
    before, parent[key] = parent[key], "@"
    text = json.dumps(content).replace('"@"', token).encode()
    if what == "broken" or token == "9" * 5000:  # more digits than Python reads
        return text, "refused"
    if name == "config.json" and isinstance(key, str) and not is_legal(key, json.loads(token)):
        return text, "refused"
    if name == "generation_config.json" and not is_legal(key, json.loads(token)):
        return text, "refused"
    return text, "same" if json.loads(token) == before and type(json.loads(token)) is type(before) else "settings"


def mutated_bytes(rng: random.Random, text: bytes) -> bytes:
    text = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(text))
        piece = bytes(
            rng.choice((rng.randrange(256), ord("1"), ord('"'), ord(","))) for _ in range(rng.choice((1, 1, 4)))
        )
        end = start + rng.choice((0, len(piece), len(piece), 3))
        text[start:end] = piece
    return bytes(text[: rng.randrange(len(text))] if rng.random() < 0.1 else text)


def mutated_tensors(rng: random.Random, content: bytes, file: Path) -> tuple[bytes, str]:
    """A safetensors file with another header, other data, or a length that does not fit them."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    what = rng.choice(("json", "json", "json", "entry", "entry", "bytes", "length", "cut", "data"))
    if what == "length":
        length = rng.choice((0, 1, length - 1, length + 1, length + 8, 2**63, 2**64 - 1, 100_000_001, len(content)))
        return struct.pack("<Q", length) + content[8:], "any"
    if what == "cut":
        return content[: rng.randrange(len(content))] if rng.random() < 0.7 else content + b"x", "refused"
    if what == "data":
        data = bytearray(data)
        for _ in range(rng.choice((1, 4))):
            start = rng.randrange(len(data))
            piece = rng.choice((b"\0" * 4, b"\xff" * 4, b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", rng.randbytes(4)))
            data[start : start + 4] = piece[: len(data) - start]
        return content[: 8 + length] + data, "data"
    expected = "any"
    if what == "bytes":
        header = mutated_bytes(rng, header)
    elif what == "json":
        header, expected = mutated_json(rng, header, "header")
        expected = "any" if expected == "settings" else expected
    else:
        entries = json.loads(header)
        key = rng.choice([key for key in entries if key != "__metadata__"])
        entry, other = entries[key], entries[rng.choice([key for key in entries if key != "__metadata__"])]
        part = rng.choice(("dtype", "dtype", "offset", "overlap", "overlap", "gap", "shape", "more"))
        if part == "dtype":
            before = entry["dtype"]
            entry["dtype"] = rng.choice(
                ("F16", "BF16", "F32", "F64", "I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F99", "f16")
            )
            if {before, entry["dtype"]} == {"F16", "BF16"} and before != entry["dtype"]:
                expected = "data"  # as long: only a file in our formats says which it has
        elif part == "offset":
            entry["data_offsets"][rng.randrange(2)] += rng.choice((-64, -1, 1, 2, 64, 10**9, 2**64))
            expected = "refused"
        elif part == "overlap":
            same = entry["data_offsets"] == other["data_offsets"]
            entry["data_offsets"] = other["data_offsets"]
            expected = "same" if same else "refused"
        elif part == "gap":  # that no tensor has
            for each in entries.values():
                if each.get("data_offsets", [0])[0] >= entry["data_offsets"][1]:
                    each["data_offsets"] = [offset + 8 for offset in each["data_offsets"]]
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
            data, expected = data + bytes(8), "refused"
        elif part == "shape":
            entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [], [1], [0], entry["shape"][:-1]))
        else:
            entry["more"] = 1
            expected = "refused"
        header = json.dumps(entries).encode()
    if rng.random() < 0.5:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data, expected


def replace_file(rng: random.Random, file: Path) -> str:
    """Puts something else in place of `file`."""
    what = rng.choice(("pipe", "directory", "empty", "noise", "loop", "missing"))
    file.unlink()
    if what == "pipe":
        os.mkfifo(file)
    elif what == "directory":
        file.mkdir()
    elif what == "loop":
        file.symlink_to(file.name)
    elif what != "missing":
        file.write_bytes(b"" if what == "empty" else rng.randbytes(1000))
    return (
        "refused" if what not in ("loop", "missing") else "settings"
    )  # generation_config.json and factors can be missing


def mutate(rng: random.Random, file: Path) -> str:
    if rng.random() < 0.05:
        return replace_file(rng, file)
    content = file.read_bytes()
    if file.suffix == ".json":
        content, expected = mutated_json(rng, content, file.name)
    else:
        content, expected = mutated_tensors(rng, content, file)
    file.unlink()  # not written over: what was loaded may be mapped
    file.write_bytes(content)
    return expected


# ---------------------------------------------------------------------------------------------------------------------
# What must hold


def result(path: Path, options: dict):
    """(settings, weights by name, factors of K and V) of a checkpoint."""
    model, _ = load_model(path, device="cpu", **options)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return model.config, weights, model.kv_scales


def converted(directory: Path):
    """Of a checkpoint that is converted first."""
    file = directory / "gemma.safetensors"
    try:
        convert(open_checkpoint(directory, formats=()), file)
        return result(directory, {})
    finally:
        file.unlink(missing_ok=True)


def equal(one: dict, other: dict) -> bool:
    def same(a, b):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
        )

    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def check_settings(config):
    """Each setting is one that a model can have."""
    for name, value in asdict(config).items():
        if name in ("n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads", "head_dim", "vocab_size"):
            assert type(value) is int and value > 0, (name, value)
        elif name in ("stop_ids", "suppressed_ids"):
            assert all(type(token) is int and token >= 0 for token in value), value
            assert name == "suppressed_ids" or 0 < len(value) <= 16, value
        elif name.startswith(("n_", "expert_size", "per_layer_", "norm_offset")) and value in (0, 0.0):
            pass  # what a model doesn't have
        elif name == "local_layers":
            assert len(value) in (0, config.n_layers) and all(type(flag) is bool for flag in value), value
        elif type(value) is not bool and value is not None:
            assert type(value) in (int, float) and value > 0 and isfinite(value), (name, value)
    assert type(config.context_length) is int
    assert config.window is None or type(config.window) is int


def outcome(load, before, expected: str, file: Path) -> str:
    """What a mutation led to. Raises AssertionError if that must not be."""
    start = time.perf_counter()
    try:
        config, weights, kv_scales = load()
    except (ValueError, FileNotFoundError) as error:
        message = " ".join(str(error).split())
        assert expected != "same", message
        assert 10 < len(message) < 1000, message
        return f"refused by {type(error).__name__}"
    finally:
        assert time.perf_counter() - start < SECONDS
    is_factors = file.name.endswith("fp8_scales.safetensors")
    old_config, old_weights, old_kv_scales = before
    assert expected != "refused" or (is_factors and kv_scales.problem), "accepted"
    if file.suffix == ".json":
        check_settings(config)
    if config != old_config:
        assert file.name in ("config.json", "generation_config.json")
        assert expected == "settings"
    if expected == "data":
        assert all(isfinite(scale) and scale > 0 for pair in kv_scales.values or () for scale in pair)
        for name, weight in weights.items():
            assert "fp8" not in str(file) or not name.endswith("scale") or (weight > 0).all(), name
    else:
        assert equal(weights, old_weights), "other weights"
        assert kv_scales == old_kv_scales or (is_factors and kv_scales.values is None), kv_scales
    if is_factors and kv_scales.problem:
        return "run without bad factors"
    if config != old_config:
        return "other settings"
    return "other data" if not equal(weights, old_weights) or kv_scales != old_kv_scales else "the same model"


def too_long(*_):
    raise AssertionError("it hangs")


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_checkpoints(checkpoints, tmp_path, kind, request, monkeypatch):
    directory = shutil.copytree(checkpoints / kind, tmp_path / kind)
    path, options = directory / KINDS[kind][0], KINDS[kind][1]
    files = sorted(file for file in directory.iterdir() if file.name != "tokenizer.model")
    loads = [lambda each=each: result(path, each) for each in options]
    if kind in ("single", "sharded"):
        loads.append(lambda: converted(directory))
    monkeypatch.setattr(signal, "SIGALRM", signal.SIGALRM)
    signal.signal(signal.SIGALRM, too_long)
    counts, failures = Counter(), []
    with warnings.catch_warnings(action="ignore"):
        before = [load() for load in loads]
        for i in range(-(-request.config.getoption("--mutations") // len(KINDS))):
            rng = random.Random(f"{kind} {i}")
            which, file = rng.randrange(len(loads)), rng.choice(files)
            expected = mutate(rng, file)
            signal.alarm(2 * SECONDS)
            try:
                found = outcome(loads[which], before[which], expected, file)
            except Exception as error:  # noqa: BLE001 all of them, so that one run shows all faults
                failures.append(f"{kind} {i}, {file.name}, {expected}: {type(error).__name__}: {error}"[:600])
                found = "wrong"
            finally:
                signal.alarm(0)
            counts[found] += 1
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            file.unlink(missing_ok=True)
            shutil.copy2(checkpoints / kind / file.name, file)
            left = [other.name for other in directory.iterdir() if other.name.endswith(".tmp")]
            assert not left, left
    print(f"\n{kind}: " + ", ".join(f"{count:,} {name}" for name, count in counts.most_common()))
    assert not failures, f"{len(failures)} wrong:\n" + "\n".join(failures[:40])
