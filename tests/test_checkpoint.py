"""Files: conversion, every way in which a checkpoint can be incomplete, and the two scripts."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import gemma4
import pytest
import torch
from conftest import ROOT, TINY_GEMMA, copy_tiny_gemma, made_once, reference_model, save_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantize
from checkpoint import convert, fp8_scale_names, open_checkpoint, sources, write_scales
from config import ModelConfig
from files import check_writable, read_header, write_atomically
from generate import load_model
from model import Transformer


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    """A small Gemma 3 in several shards."""

    def make(directory):
        save_checkpoint(reference_model("gemma3-window-small"), directory, max_shard_size="100KB")
        assert len(list(directory.glob("model-*.safetensors"))) > 3

    return made_once(tmp_path_factory, "sharded", make)


@pytest.fixture
def copy(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "checkpoint")


def load(directory: Path):
    return load_model(directory, device="cpu", precision="fp32")[0]


# --- conversion


def test_converted_file_holds_the_same_weights_under_our_names(copy):
    direct = load(copy)
    written = []
    convert(open_checkpoint(copy), copy / "gemma.safetensors", written.append, chunk=1000)
    assert sum(written) == sum(p.nbytes for p in direct.parameters())
    for shard in copy.glob("model*"):
        shard.unlink()
    converted = load(copy)
    for (name, one), (other_name, two) in zip(direct.named_parameters(), converted.named_parameters()):
        assert name == other_name
        assert torch.equal(one, two)
    with safe_open(copy / "gemma.safetensors", "pt") as f:  # by the library, not by our own reader
        assert f.metadata() == {"format": "gemma-fast", "format_version": "1", "weight_format": "fp32"}
        assert set(f.keys()) == {name for name, _ in direct.named_parameters()}
    assert all(parameter.data_ptr() % 8 == 0 for parameter in converted.parameters())


def test_loading_a_converted_file_copies_nothing(tmp_path):
    copy_tiny_gemma(tmp_path)
    convert(open_checkpoint(tmp_path), tmp_path / "gemma.safetensors")
    model, _ = load_model(tmp_path, device="cpu")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    areas = []
    for line in maps.read_text().splitlines():
        if line.endswith(str(tmp_path / "gemma.safetensors")):
            areas.append([int(end, 16) for end in line.split()[0].split("-")])
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in areas), name


def test_a_directory_with_both_loads_the_converted_file_without_a_warning(copy, recwarn):
    load(copy)
    assert "python scripts/convert_hf_checkpoint.py" in str(recwarn.pop(UserWarning).message)
    convert(open_checkpoint(copy), copy / "any-name.safetensors")
    for shard in copy.glob("model-*"):
        shard.write_bytes(b"")  # not even looked at
        os.utime(shard, (0, 0))
    load(copy)
    assert not [w for w in recwarn if "convert" in str(w.message)]


def test_one_file_of_a_directory_can_be_named(copy):
    convert(open_checkpoint(copy), copy / "gemma.safetensors")
    assert torch.equal(load(copy / "gemma.safetensors").norm.weight, load(copy).norm.weight)


def test_half_precision_and_mixed_dtypes(copy):
    for shard in copy.glob("model-*"):
        save_file({k: v.half() for k, v in load_file(shard).items()}, shard)
    assert load(copy).dtype == torch.float32
    weights = load_file(shard)
    save_file({k: v.float() for k, v in weights.items()}, shard)
    load(copy)  # each tensor is converted as it is read
    with pytest.raises(ValueError, match="mixes dtypes: F16, F32"):
        convert(open_checkpoint(copy), copy / "gemma.safetensors")


def test_a_crash_leaves_no_half_file(tmp_path):
    file = tmp_path / "out"
    file.write_bytes(b"old")

    def write(out):
        out.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, write)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert file.read_bytes() == b"old"


def test_what_killed_runs_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    file, code = tmp_path / "out[1]", "import sys, time, pathlib; from files import write_atomically as w;"
    code += "w(pathlib.Path(sys.argv[1]), lambda out: (out.write(b'theirs'), print('writing', flush=True), input()))"
    command = [sys.executable, "-c", code, file]
    runs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    for run in runs:
        assert run.stdout.readline() == "writing\n"
    runs[0].kill()
    runs[0].communicate()
    others = [tmp_path / name for name in (".out[1].txt.1.tmp", ".out1.1.tmp", ".out[1].notes.tmp")]
    for other in others:
        other.touch()
    assert len(list(tmp_path.iterdir())) == 5
    check_writable(file)
    assert len(list(tmp_path.iterdir())) == 4
    write_atomically(file, lambda out: out.write(b"ours"))
    assert file.read_bytes() == b"ours"
    runs[1].communicate("\n", timeout=60)
    assert file.read_bytes() == b"theirs"
    assert set(tmp_path.iterdir()) == {file, *others}


def test_a_file_that_cannot_be_written_is_named_at_once(tmp_path):
    full = OSError(28, "No space left on device")
    with pytest.raises(OSError, match=r"No space left on device: '.*/out'"):
        write_atomically(tmp_path / "out", lambda out: (_ for _ in ()).throw(full))
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    check_writable(tmp_path / "file")
    for file, message in (
        (tmp_path / "none" / "out", r"none/out can't be written: there is no directory .*none"),
        (tmp_path / "file" / "out", r"file/out can't be written: there is no directory .*file"),
        (tmp_path / "directory", "directory can't be written: it is no regular file"),
        (tmp_path / "pipe", "pipe can't be written: it is no regular file"),
        (Path("/proc/self/out"), "'/proc/self/out'"),
    ):
        for write in (check_writable, lambda file: write_atomically(file, lambda out: None)):
            with pytest.raises(OSError, match=message):
                write(file)
    assert {file.name for file in tmp_path.iterdir()} == {"directory", "file", "pipe"}


# --- incomplete checkpoints


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("converted", [False, True])
def test_weights_cut_at_any_place_are_refused(copy, tenth, converted):
    file = sorted(copy.glob("model-*.safetensors"))[tenth % 3]
    if converted:
        file = copy / "gemma.safetensors"
        convert(open_checkpoint(copy), file)
    size = file.stat().st_size
    places = [0, 5, 8, 200, size // 9, size // 3, size // 2, size - 1000, size - 8, size - 1]
    with open(file, "rb+") as f:
        f.truncate(places[tenth])
    with pytest.raises(ValueError, match=rf"{file.name} is (cut|damaged)"):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_cut_json_is_refused(copy, name, share):
    text = (copy / name).read_text().rstrip()
    (copy / name).write_text(text[: int(len(text) * share)])
    with pytest.raises(ValueError, match=rf"{name} is cut or damaged"):
        load(copy)


def test_every_cut_of_the_tokenizer_is_refused(copy):
    content = (TINY_GEMMA / "tokenizer.model").read_bytes()
    fields = 59584  # here the pieces and the trainer's settings end: what is left would load
    for end in (0, 1, 100, 28314, len(content) // 2, 58755, fields, len(content) - 1):
        (copy / "tokenizer.model").write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"tokenizer\.model is cut"):
            load(copy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.model", "no tokenizer at"),
        ("model-00002-of-*", r"shard .*model-00002-of-.* is missing"),
        ("model*", "has no weights"),
    ],
)
def test_missing_files(copy, name, message):
    for file in copy.glob(name):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load(copy)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere; scripts/prepare.sh"):
        load(tmp_path / "nowhere")


def edit_weights(directory: Path, edit):
    """Joins the shards of a checkpoint, applies `edit` to the dict of tensors and saves one file."""
    weights = {}
    for shard in directory.glob("model-*.safetensors"):
        weights |= load_file(shard)
        shard.unlink()
    (directory / "model.safetensors.index.json").unlink()
    edit(weights)
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.layers.3.mlp.up_proj.weight"), "lacks model.layers.3.mlp.up_proj.weight"),
        (lambda w: w.update({"model.layers.0.mlp.gate_proj.bias": torch.zeros(2)}), "no place for: .*gate_proj.bias"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(2)}), r"model.norm.weight has shape \[2\].*\[64\]"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
            "model.norm.weight in .* is stored as I8",
        ),
        (lambda w: w.update({"language_model.model.norm.weight": torch.zeros(64)}), "model.norm.weight is in .* and"),
    ],
)
def test_keys_that_are_missing_left_over_or_wrong(copy, edit, message):
    edit_weights(copy, edit)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_many_missing_keys_are_counted(copy):
    edit_weights(copy, lambda weights: [weights.pop(k) for k in list(weights) if "layers.2." in k])
    with pytest.raises(ValueError, match=r"lacks model.layers.2.* and 10 more"):
        load(copy)


def test_index_that_names_another_shard(copy):
    index_file = copy / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    names = sorted(set(index["weight_map"].values()))
    key = next(k for k, v in index["weight_map"].items() if v == names[0])
    index["weight_map"][key] = names[1]
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{key} is in {names[0]}, the index says elsewhere"):
        load(copy)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "2"}, "format version 2, this program reads 1"),
        ({"weight_format": "int3"}, "weight format 'int3'"),
    ],
)
def test_other_formats_are_refused_by_name(copy, metadata, message):
    file = copy / "gemma.safetensors"
    convert(open_checkpoint(copy), file)
    with safe_open(file, "pt") as f:
        metadata = f.metadata() | metadata
    save_file(load_file(file), file, metadata)
    with pytest.raises(ValueError, match=message):
        load(file)


def write_raw(file: Path, header: str | bytes, data: bytes = bytes(8)):
    header = header if isinstance(header, bytes) else header.encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(old: str = "", new: str = "") -> str:
    """Of a header, with something else in one place."""
    return '"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'.replace(old, new, 1)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("\ufeff{" + entry() + "}", "header is not complete"),
        (b"{" + entry().encode() + b"}\xff", "can't decode byte 0xff"),
        ("[" + entry() + "]", "header is not complete"),
        ("{" + entry() + "," + entry() + "}", "'t' comes twice"),
        ('{"__metadata__": {"a": "1", "a": "2"},' + entry() + "}", "'a' comes twice"),
        ('{"__metadata__": {"a": 1},' + entry() + "}", "metadata are {'a': 1}, not text"),
        ('{"__metadata__": null,' + entry() + "}", "metadata are None, not text"),
        ('{"t": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"t": NaN}', "NaN is no number"),
        ('{"t": 5}', "t is 5, not dtype, shape and data_offsets"),
        ("{" + entry("dtype", "dtipe") + "}", "not dtype, shape and data_offsets"),
        ("{" + entry("[2]", '[2], "more": 1') + "}", "not dtype, shape and data_offsets"),
        ("{" + entry('"F32"', '["F32"]') + "}", r"dtype \['F32'\]"),
        ("{" + entry("[2]", "2") + "}", "t has 2, not a list of whole numbers"),
        ("{" + entry("[2]", "[2.0]") + "}", r"t has \[2.0\], not a list of whole numbers"),
        ("{" + entry("[2]", "[true, 2]") + "}", r"t has \[True, 2\], not a list of whole numbers"),
        ("{" + entry("[0, 8]", "[-8, 8]") + "}", r"t has \[-8, 8\], not a list of whole numbers"),
        ("{" + entry("[0, 8]", "[0, 8.0]") + "}", r"t has \[0, 8.0\], not a list of whole numbers"),
        ("{" + entry("[0, 8]", "[0, 8, 8]") + "}", r"offsets \[0, 8, 8\]"),
        ("{" + entry("[0, 8]", "[8, 0]") + "}", r"offsets \[8, 0\]"),
        ("{" + entry("[0, 8]", "[1, 8]") + "}", "t does not begin where the tensor before it ends"),
        ("{" + entry() + "," + entry('"t"', '"u"') + "}", "u does not begin where the tensor before it ends"),
        ("{" + entry() + ',"u": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "u does not begin where"),
        ("{" + entry("[0, 8]", "[0, 16]") + "}", "is damaged: .* bytes, where its header describes"),
        ("{}", "is damaged: 18 bytes, where its header describes 10"),
    ],
)
def test_headers_that_the_format_does_not_have(tmp_path, header, message):
    file = tmp_path / "x.safetensors"
    write_raw(file, "{" + entry() + "}")
    assert read_header(file)[0]["t"].shape == (2,)
    write_raw(file, header)
    with pytest.raises(ValueError, match=message) as error:
        read_header(file)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 400


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    file = tmp_path / "x.safetensors"
    header = 100_000_001
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", header) + b"{}")
        f.truncate(8 + header)  # sparse
    with pytest.raises(ValueError, match="header is not complete"):
        read_header(file)


def test_an_unknown_dtype_in_what_is_not_needed_is_a_line(copy):
    edit_weights(copy, lambda w: w.update({"vision_tower.x": torch.zeros(2)}))
    file = copy / "model.safetensors"
    file.write_bytes(re.sub(rb'("vision_tower.x":{"dtype":)"F32"', rb'\1"F99"', file.read_bytes()))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .*F99"):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "a": 1}', "'a' comes twice"),
        ('{"a": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, "nested too deeply"),
        ('{"a": Infinity}', "Infinity is no number"),
        ("\ufeff{}", "BOM"),
        ("[]", "it is no object"),
        ('{"a": ' + "9" * 5000 + "}", "4300"),
    ],
)
def test_json_that_can_be_read_in_several_ways_is_refused(copy, name, content, message):
    (copy / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name} is cut or damaged: not valid JSON .*{message}"):
        load(copy)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00002-of-*",
        "gemma.safetensors",
        "other.safetensors",
    ],
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_directory_in_place_of_a_file_is_refused_at_once(copy, name, make):
    files = list(copy.glob(name)) or [copy / name]
    for file in files:
        file.unlink(missing_ok=True)
        make(file)
    with pytest.raises(ValueError, match=f"{files[0].name} is no regular file"):
        load(copy)


def edit_header(file: Path, old: str, new: str, data: bytes = b""):
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    write_raw(file, content[8:length].decode().replace(old, new, 1), content[length:] + data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_header(f, "{", "\ufeff{"), "header is not complete"),
        (lambda f: edit_header(f, '"tokens": "1"', '"tokens": 1'), "not text"),
        (lambda f: edit_header(f, "[0, 4]", "[0, 4.0]"), "not a list of whole numbers"),
        (lambda f: edit_header(f, "[4, 8]", "[0, 4]"), "does not begin where the tensor before it ends"),
        (lambda f: edit_header(f, '"F32"', '"F99"'), "is damaged"),
        (lambda f: edit_header(f, '"F32"', '"I32"'), "is stored as I32; BF16, F16 and F32 can be read"),
        (lambda f: edit_header(f, '"shape": []', '"shape": [1, 1]'), r"is of shape \[1, 1\]; only one scale"),
        (lambda f: edit_header(f, '"shape": []', '"shape": [2]'), "damaged|only one scale"),
        (lambda f: edit_header(f, "F32", "\\ud800"), "dtype|damaged|header"),
        (lambda f: edit_header(f, "[0, 4]", "[-0, 4]"), "is damaged"),  # a number for Python, none for the library
        (lambda f: write_raw(f, '{"a": ' + "[" * 100_000), "nested too deeply"),
        (lambda f: (f.unlink(), os.mkfifo(f)), "is no regular file"),
        (lambda f: (f.unlink(), f.mkdir()), "is no regular file"),
    ],
)
def test_a_bad_file_of_factors_stops_nothing_but_fp8(copy, damage, message):
    file = copy / "fp8_scales.safetensors"
    config = open_checkpoint(copy).config
    write_scales(file, config, dict.fromkeys(fp8_scale_names(config), 1.0), {"tokens": "1"})
    assert load(copy).kv_scales.problem is None
    damage(file)
    model = load(copy)
    assert model.kv_scales.values is None
    assert re.search(message, model.kv_scales.problem)
    assert "fp8_scales.safetensors" in model.kv_scales.problem
    with pytest.raises(ValueError, match=message):
        load_model(copy, device="cpu", fp8=True)


def test_a_bad_file_of_factors_for_integers_does_not_stop_the_shards(copy):
    (copy / "gemma-int8-fp8_scales.safetensors").write_bytes(b"x")
    load(copy)


def test_an_fp8_file_has_fp8_where_it_says(copy):
    checkpoint = open_checkpoint(copy)
    convert(checkpoint, copy / "gemma.safetensors")
    weights = load_file(copy / "gemma.safetensors")
    weights |= {name: torch.tensor(1.0) for name in fp8_scale_names(checkpoint.config) if not name.startswith("head")}
    save_file(weights, copy / "x.safetensors", {"format": "gemma-fast", "format_version": "1", "weight_format": "fp8"})
    with pytest.raises(ValueError, match="wqkv.weight is stored as F32, fp8 has F8_E4M3 there"):
        load(copy / "x.safetensors")


def test_a_pipe_as_the_checkpoint_is_refused_at_once(copy):
    os.mkfifo(copy / "pipe")
    with pytest.raises(ValueError, match="pipe is no regular file"):
        load(copy / "pipe")


@pytest.mark.parametrize("name", ["../other.safetensors", "/dev/zero", "", "x" * 300 + ".safetensors", 5, "a\0.bin"])
def test_an_index_that_leads_elsewhere_is_refused(copy, name):
    index_file = copy / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["model.norm.weight"] = name
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="can't be a shard beside it"):
        load(copy)


@pytest.mark.parametrize("weight_map", [None, [], {}, "all"])
def test_an_index_without_names_is_refused(copy, weight_map):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="has no weight_map"):
        load(copy)


def test_a_mistake_in_a_configuration_names_its_file(copy):
    for name in ("generation_config.json", "config.json"):
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | {"eos_token_id": [1, 1.5]}))
        with pytest.raises(ValueError, match=rf"{name}: eos_token_id must be a token id, .* not \[1, 1.5\]"):
            load(copy)


def test_a_converted_file_has_the_dtype_that_it_says(copy):
    convert(open_checkpoint(copy), copy / "gemma.safetensors")
    with safe_open(copy / "gemma.safetensors", "pt") as f:
        metadata = f.metadata()
    save_file({k: v.half() for k, v in load_file(copy / "gemma.safetensors").items()}, copy / "x.safetensors", metadata)
    with pytest.raises(ValueError, match="embedding.weight is stored as F16, fp32 has F32 there"):
        load(copy / "x.safetensors")


def test_a_file_older_than_what_it_is_made_from_is_noted(copy):
    file, quantized, shard = copy / "gemma.safetensors", copy / "gemma-int8.safetensors", next(copy.glob("model-*"))
    convert(open_checkpoint(copy), file)
    assert quantize.main(["--checkpoint_path", str(copy), "--mode", "int8"]) == 0

    def noted() -> list[list[tuple[str, str]]]:
        found = []
        for each in (copy, quantized):
            with warnings.catch_warnings(record=True) as notes:
                load(each)
            found.append([names for w in notes for names in re.findall(r"(\S+) is older than (\S+) ", str(w.message))])
        return found

    assert noted() == [[], []]
    os.utime(quantized, (1e9, 1e9))
    shard.unlink()
    for other in copy.glob("model-*"):
        os.utime(other, (1e9, 1e9))
    assert noted() == [[], [(str(quantized), str(file))]]
    os.utime(file, (1e9, 1e9))
    assert noted() == [[], []]
    shard.touch()
    assert noted() == [[(str(file), str(shard))], [(str(quantized), str(shard))]]


def test_stop_ids_come_from_the_generation_config_and_the_tokenizer(copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 77]}))
    assert load(copy).config.stop_ids == (1, 77, 5)  # 5 is the tokenizer's <end_of_turn>
    (copy / "generation_config.json").unlink()
    assert load(copy).config.stop_ids == (1, 5)


# --- scripts


def test_convert_script(copy, monkeypatch):
    command = [sys.executable, "scripts/convert_hf_checkpoint.py", copy]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert "writing gemma.safetensors: 100%" in done.stderr
    before = (copy / "gemma.safetensors").read_bytes()
    assert run_script(monkeypatch, copy) == 0  # again, from the shards
    assert (copy / "gemma.safetensors").read_bytes() == before


def run_script(monkeypatch, *arguments) -> int:
    """As `python scripts/convert_hf_checkpoint.py` does, in this process."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import convert_hf_checkpoint

    monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", *map(str, arguments)])
    return convert_hf_checkpoint.main()


def test_convert_script_says_what_is_wrong(copy, tmp_path, monkeypatch, capsys):
    next(copy.glob("model-00002*")).unlink()
    for directory, message in (
        (copy, "shard"),
        (tmp_path / "none", "no checkpoint at"),
        (copy / "config.json", "is a file"),
    ):
        assert run_script(monkeypatch, directory) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    assert not (copy / "gemma.safetensors").exists()


def response_error(kind, status: int):
    import httpx

    request = httpx.Request("GET", "https://huggingface.co/x")
    return kind("first line\nsecond line", response=httpx.Response(status, request=request))


def test_download_says_what_to_do(monkeypatch, tmp_path):
    import httpx
    from huggingface_hub import errors

    monkeypatch.syspath_prepend(ROOT / "scripts")
    import download

    cases = [
        (
            response_error(errors.GatedRepoError, 403),
            "gated: accept its licence at https://huggingface.co/google/gemma-7b",
        ),
        (response_error(errors.RepositoryNotFoundError, 404), "no repository google/gemma-7b"),
        (response_error(errors.RevisionNotFoundError, 404), "no revision"),
        (response_error(errors.HfHubHTTPError, 500), r"did not finish \(first line\); run it again"),
        (errors.LocalEntryNotFoundError("offline"), "did not finish"),
        (OSError("No space left on device"), "No space left"),
        (httpx.ConnectError("no route"), r"can't be reached \(no route\)"),
        (errors.HFValidationError("bad"), "not a repository id"),
    ]
    for error, message in cases:

        def fail(*args, _error=error, **kwargs):
            raise _error

        monkeypatch.setattr(download, "snapshot_download", fail)
        with pytest.raises(ValueError, match=message):
            download.download("google/gemma-7b", tmp_path)


def test_download_asks_for_what_is_needed_and_no_more(monkeypatch, tmp_path):
    from fnmatch import fnmatch

    monkeypatch.syspath_prepend(ROOT / "scripts")
    import download

    calls = []

    def snapshot(repo_id, local_dir, allow_patterns, **options):
        calls.append((repo_id, allow_patterns))
        Path(local_dir).mkdir(exist_ok=True)
        (Path(local_dir) / "config.json").touch()

    monkeypatch.setattr(download, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="has no tokenizer.model"):
        download.download("someone/other", tmp_path / "other")
    (_, patterns), *_ = calls
    wanted = ["config.json", "tokenizer.model", "model-00001-of-00004.safetensors", "model.safetensors.index.json"]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in wanted)
    unwanted = ["gemma-7b.gguf", "pytorch_model.bin", "original/x.safetensors.bin", "README.md"]
    assert not any(fnmatch(name, pattern) for name in unwanted for pattern in patterns)


def test_prepare_script_wants_a_repository():
    for arguments in ((), ("--hf_token", "x")):
        done = subprocess.run(
            ["bash", "scripts/prepare.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "usage: scripts/prepare.sh REPO_ID" in done.stderr


def test_names_cover_the_model():
    """Our names and shapes for a checkpoint are those of the modules, for each generation."""
    for name in ("gemma-2b", "gemma-2-9b", "gemma-3-4b"):
        config = ModelConfig.from_name(name)
        with torch.device("meta"):
            shapes = {key: tuple(value.shape) for key, value in Transformer(config).state_dict().items()}
        table = sources(config)
        assert {k: (sum(s[0] for _, s in parts), *parts[0][1][1:]) for k, parts in table.items()} == shapes


# --- Gemma 4


@pytest.mark.parametrize("kind", gemma4.KINDS)
def test_a_converted_gemma_4_is_the_same_in_shards_and_in_one_file(kind, tmp_path, monkeypatch):
    gemma4.checkpoint(kind, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    direct = load(tmp_path)
    convert(open_checkpoint(tmp_path), tmp_path / "gemma.safetensors", chunk=1000)
    for (name, one), (other, two) in zip(direct.named_parameters(), load(tmp_path).named_parameters(), strict=True):
        assert name == other
        assert torch.equal(one, two)


@pytest.fixture
def moe(tmp_path):
    return gemma4.checkpoint("moe", tmp_path / "moe")


@pytest.fixture
def e2b(tmp_path):
    """Layers 3 to 5 have the keys of layers 1 and 2."""
    return gemma4.checkpoint("e2b", tmp_path / "e2b")


def edit_file(directory: Path, edit):
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def take_apart(weights: dict):
    """Experts under names of their own, as quantizers write them."""
    for name in [name for name in weights if ".experts." in name]:
        module, parts = name.rsplit(".", 1)[0], ("gate", "up") if "gate_up" in name else ("down",)
        for e, expert in enumerate(weights.pop(name)):
            for part, matrix in zip(parts, expert.chunk(len(parts))):
                weights[f"{module}.{e}.{part}_proj.weight"] = matrix.clone()


def test_experts_may_come_apart(moe, monkeypatch):
    monkeypatch.setattr("checkpoint.PIECE", 5000)  # less than an expert's bytes
    expected = load(moe)
    edit_file(moe, take_apart)
    model = load(moe)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    convert(open_checkpoint(moe), moe / "gemma.safetensors")
    assert all(map(torch.equal, load(moe).parameters(), expected.parameters()))


EXPERTS = "model.layers.1.experts"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(f"{EXPERTS}.down_proj"), f"lacks {EXPERTS}.down_proj$"),
        (
            lambda w: w.update({f"{EXPERTS}.gate_up_proj": w[f"{EXPERTS}.gate_up_proj"][:7].clone()}),
            rf"{EXPERTS}.gate_up_proj has shape \[7, 192, 64\], config.json asks for \[8, 192, 64\]",
        ),
        (lambda w: (take_apart(w), w.pop(f"{EXPERTS}.4.up_proj.weight")), f"lacks {EXPERTS}.4.up_proj.weight$"),
        (
            lambda w: (take_apart(w), w.pop("model.layers.0.experts.0.down_proj.weight")),
            "lacks model.layers.0.experts.0.down_proj.weight$",
        ),
        (
            lambda w: (take_apart(w), w.update({f"{EXPERTS}.8.up_proj.weight": torch.zeros(96, 64)})),
            f"no place for: {EXPERTS}.8.up_proj.weight$",
        ),
        (lambda w: w.pop("model.layers.2.router.per_expert_scale"), "lacks model.layers.2.router.per_expert_scale$"),
    ],
)
def test_what_experts_lack_is_named(moe, edit, message):
    edit_file(moe, edit)
    with pytest.raises(ValueError, match=message):
        load(moe)


def test_keys_of_layers_that_share_others_are_not_read(e2b):
    expected = load(e2b)

    def add(weights):
        for name in ("k_proj", "v_proj", "k_norm"):
            weights[f"model.layers.4.self_attn.{name}.weight"] = torch.zeros(3)

    edit_file(e2b, add)
    assert all(map(torch.equal, load(e2b).parameters(), expected.parameters()))


@pytest.mark.parametrize("name", ["k_proj", "v_proj", "k_norm"])
def test_a_donors_keys_that_are_missing_are_named(e2b, name):
    edit_file(e2b, lambda weights: weights.pop(f"model.layers.1.self_attn.{name}.weight"))
    with pytest.raises(ValueError, match=f"lacks model.layers.1.self_attn.{name}.weight$"):
        load(e2b)


def test_layers_that_share_keys_need_a_donor_of_their_kind(e2b):
    config = json.loads((e2b / "config.json").read_text())
    config["num_kv_shared_layers"] = 4
    (e2b / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no layer before the last 4 has keys for layer 2 \(full\)"):
        load(e2b)
