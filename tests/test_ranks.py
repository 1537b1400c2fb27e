"""Several ranks that share a list of prompts: in threads on a store that is a dict, and as torchrun starts them."""

import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_GEMMA, copy_tiny_gemma
from test_scheduler import Rows

import generate as program
from adapter import save_adapter
from generate import generate, stream_completions
from parallel import START_SECONDS
from ranks import SECONDS, Deal, Ranks, fingerprint
from sampling import Sampling
from scheduler import Request, Scheduler
from text import Output

SETTINGS = ["--seed", "5", "--max_new_tokens", "60", "--device", "cpu", "--precision", "fp32", "--batch_size", "2"]


class Store:
    """What ranks need of a store of torch.distributed."""

    def __init__(self):
        self.values, self.lock = {}, threading.Lock()

    def set(self, key: str, value: str):
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def add(self, key: str, count: int) -> int:
        with self.lock:
            self.values[key] = self.values.get(key, 0) + count
            return self.values[key]


class Clock:
    """Time that goes on by a second whenever it is read."""

    def __init__(self):
        self.now = 0

    def __call__(self) -> int:
        self.now += 1
        return self.now


def on_all(count: int, function, store=None, **options) -> list:
    """What function(ranks) returns or raises on each of `count` ranks, which are threads."""
    store = store or Store()

    def run(rank: int):
        try:
            return function(Ranks(store, rank, count, pause=0.001, **options))
        except (ValueError, ConnectionError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# --- dealing


@pytest.mark.parametrize(("count", "samples", "rows"), [(40, 1, 8), (7, 1, 16), (300, 3, 16), (1, 50, 8), (0, 1, 4)])
@pytest.mark.parametrize("ranks", [2, 5])
def test_every_request_is_dealt_once_and_ranks_end_together(count, samples, rows, ranks):
    """Ranks of different speeds, whose rows take a random time."""
    keys = [(i, j) for i in range(count) for j in range(samples)]
    store, chance = Store(), random.Random(count)
    deals = [Deal(keys, ranks, rows, lambda n: store.add("taken", n)) for _ in range(ranks)]
    waiting, running, dealt = [[] for _ in deals], [[] for _ in deals], []
    ended, busy = [0] * ranks, [0] * ranks
    for step in range(100_000):
        for rank, deal in enumerate(deals):
            running[rank] = [left - 1 for left in running[rank] if left > 1]
            free = rows - len(running[rank])
            taken = deal.take(len(waiting[rank]), free, rows)
            dealt += taken
            waiting[rank] += taken
            for _ in waiting[rank][:free]:
                running[rank].append(chance.randint(1, 20) * (1 + rank % 2))
            busy[rank] += len(running[rank])
            del waiting[rank][:free]
            if running[rank]:
                ended[rank] = step
        if not any(running):
            break
    assert sorted(dealt) == keys
    if len(keys) > 2 * ranks * rows:
        assert max(ended) - min(ended) <= 60


def test_first_takes_are_equal_parts_and_samples_stay_together():
    store = Store()
    keys = [(i, j) for i in range(8) for j in range(4)]
    deals = [Deal(keys, 2, 100, lambda n: store.add("taken", n)) for _ in range(2)]
    first = [deal.take(0, 100, 100) for deal in deals]
    assert first == [[(i, j) for i in range(rank, 8, 2) for j in range(4)] for rank in range(2)]
    assert [deal.take(0, 84, 100) for deal in deals] == [[], []]
    deal = Deal([(0, j) for j in range(100)], 2, 8, lambda n: store.add("of one prompt", n))
    assert {len(part) for part in deal.parts} == {12, 4}
    assert len(deal.take(0, 8, 8)) == 12 and deal.take(8, 0, 8) == []  # enough wait


def test_schedulers_take_from_one_list():
    requests = {
        (i, 0): Request((i, 0), [i % 7 + 1] * (1 + i % 5), 1 + i % 9, Sampling(temperature=0)) for i in range(90)
    }
    expected = {request.key: tokens for request, tokens in Scheduler(Rows(4), None, requests.values(), 4).run()}
    store, runs, found = Store(), [], {}
    for rows in (4, 1, 16):
        deal = Deal(list(requests), 3, 16, lambda n: store.add("taken", n))
        take = lambda *room, deal=deal: map(requests.get, deal.take(*room))
        runs.append(Scheduler(Rows(rows), None, take, rows).run())
    counts = [0] * len(runs)
    while runs:
        for number, run in enumerate(list(runs)):
            try:
                request, tokens = next(run)
            except StopIteration:
                runs.remove(run)
                continue
            assert request.key not in found
            found[request.key], counts[number % 3] = tokens, counts[number % 3] + 1
    assert found == expected and all(counts)


def test_text_does_not_depend_on_the_number_of_ranks(tiny):
    model, tokenizer = tiny
    prompts = [tokenizer.encode(text) for text in ("def f(", "import os\n", "x = [", "#", "class A:\n")]
    options = dict(seed=3, num_samples=[1, 2, 3, 1, 2], batch_size=2, skip={(1, 1)})
    expected = dict(zip([(i, j) for i, n in enumerate(options["num_samples"]) for j in range(n)],
                        generate(model, prompts, 12, **options)))  # fmt: skip
    expected.pop((1, 1))
    parts = on_all(2, lambda ranks: list(stream_completions(model, prompts, 12, ranks=ranks, **options)))
    found = {(i, j): tokens for part in parts for i, j, tokens in part}
    assert found == expected and sum(map(len, parts)) == len(expected) and all(parts)


# --- the start and the end


def test_a_store_that_earlier_ranks_have_used():
    store = Store()
    for _ in range(3):
        both = on_all(3, lambda ranks: (ranks.start, ranks.deal([(0, 0)] * 9, 3).take(0, 3, 3)), store)
        assert len({start for start, _ in both}) == 1 and all(taken for _, taken in both)
    assert len({key.split(":")[0] for key in store.values}) == 4  # one of each start, and one of the meetings


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(ValueError, match=f"rank 1 has not come within {START_SECONDS} seconds"):
        Ranks(Store(), 0, 2, clock=Clock(), pause=0)
    with pytest.raises(ValueError, match=f"one of the ranks has not come within {START_SECONDS} seconds"):
        Ranks(Store(), 1, 2, clock=Clock(), pause=0)


def test_options_that_differ_are_named_on_all_ranks():
    def agree(ranks):
        ranks.agree({"seed": "1", "temperature": f"{0.5 if ranks.rank == 1 else 0.7}", "top_k": "3"})

    errors = on_all(3, agree)
    expected = "--temperature has to be the same on all ranks: it is 0.7 on rank 0 and 0.5 on rank 1"
    assert [str(error) for error in errors] == [expected] * 3
    assert on_all(3, lambda ranks: ranks.agree({"seed": "1"})) == [None] * 3


def test_fingerprint_of_a_checkpoint(tmp_path):
    copy = copy_tiny_gemma(tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(copy_tiny_gemma(tmp_path / "other"))
    before = fingerprint(copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-5}))
    assert fingerprint(copy) != before
    named = fingerprint(copy / "model.safetensors")
    (copy / "gemma.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    assert fingerprint(copy / "model.safetensors") == named != fingerprint(copy)
    assert fingerprint(tmp_path / "nowhere")
    for value in (1.0, 2.0):  # of which the header says nothing
        save_adapter(copy, {"model.norm": (torch.ones(1, 2), torch.full((2, 1), value))}, 1, 1.0, copy)
        before, was = fingerprint(copy), before
    assert before != was


def test_ranks_end_together():
    ended, merged = [], threading.Event()

    def work(ranks):
        ranks.agree({})
        if ranks.rank == 1:
            time.sleep(0.05)
        for tokens in range(ranks.rank + 1):
            ranks.on_step(1)
            ranks.made(tokens)
        made = ranks.gather()
        if ranks.rank == 0:
            time.sleep(0.02)
            merged.set()
        ranks.leave()
        ended.append(ranks.rank if merged.is_set() else None)
        return made

    assert on_all(3, work)[0] == (6, 4)
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize(("state", "is_there"), [("decoding", True), ("decoding", False), ("loading", False)])
@pytest.mark.parametrize("hanging", [0, 1])
def test_a_rank_that_hangs_is_named_by_those_that_wait(monkeypatch, state, is_there, hanging):
    monkeypatch.setattr("ranks.ALIVE", 0.1)
    monkeypatch.setitem(SECONDS, "decoding", 0.1)
    ended = threading.Event()

    def work(ranks):
        ranks.agree({})
        if ranks.rank == hanging:
            ranks.tell(state)
            while is_there and not ended.wait(0.001):
                ranks.tell()
            return
        try:
            ranks.gather()
            ranks.leave()
        finally:
            ended.set()

    error, where = str(on_all(2, work)[1 - hanging]), f"rank {hanging} on {socket.gethostname()}"
    if is_there:
        assert error == f"{where} did nothing for 0 seconds, while decoding"
    else:
        assert error == f"{where} is gone: it was {state}, 0 seconds ago"


def test_a_store_that_is_gone_is_one_line():
    class Gone(Store):
        def set(self, key, value):
            raise RuntimeError("Connection reset by peer\nstack")

    with pytest.raises(
        ConnectionError, match="the ranks' store can't be reached, its host may be gone: Connection reset"
    ):
        Ranks(Gone(), 0, 2)


# --- the parts of the output


def test_parts_of_any_number_of_ranks_are_resumed(tmp_path):
    out, run = tmp_path / "out.jsonl", {"prompts": [1]}
    first = [Output(out, run, 5, rank) for rank in range(3)]
    for place in range(6):
        first[place % 3].add(place, 0, {"text": f"{place}"})
    for each in first:
        each.stream.close()
    (tmp_path / "out.jsonl.partial").unlink()  # the host of rank 0 was lost
    with (tmp_path / "out.jsonl.rank2.partial").open("ab") as part:
        part.write(b'[7, 0, {"te')
    again = [Output(out, run, None, rank) for rank in range(2)]
    assert again[0].seed == again[1].seed == 5
    assert again[0].done.keys() == again[1].done.keys() == {(1, 0), (2, 0), (4, 0), (5, 0)}
    again[0].add(3, 0, {"text": "3"})
    again[1].add(0, 0, {"text": "0"})
    again[1].stream.close()
    with pytest.raises(ValueError, match="1 of 7 completions are in no .*: ranks on several hosts need a directory"):
        again[0].gather(7, 2)
    again[0].gather(6, 2)
    again[0].finish()
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == list("012345")
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_part_of_another_run_is_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    other = Output(out, {"prompts": [1]}, 5, 3)
    other.add(0, 0, {})
    other.stream.close()
    for run, seed in (({"prompts": [2]}, 5), ({"prompts": [1]}, 6)):
        with pytest.raises(ValueError, match="rank3.partial is of a run with other prompts or settings"):
            Output(out, run, seed)


# --- the program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--interactive"], "several ranks take no --interactive"),
        (["--profile", "x.json"], "several ranks take no --profile"),
        (["--num_beams", "2", "--output", "x.jsonl"], "several ranks take no --num_beams"),
        ([], "several ranks need --output"),
        (["--output", "x.jsonl"], "MASTER_PORT isn't set in the environment: start several ranks by torchrun"),
    ],
)
def test_what_does_not_go_with_several_ranks(capsys, monkeypatch, options, message):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    assert program.main(options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    monkeypatch.setenv("RANK", "one")
    assert program.main(["--output", "x.jsonl"]) == 2 and "RANK is 'one'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    lines = [{"prompt": f"def f{i}(", "num_samples": 1 + i % 2, "max_new_tokens": 30 + i} for i in range(12)]
    lines.insert(3, {"prompt": "long", "max_new_tokens": 9000})
    file = tmp_path_factory.mktemp("ranks") / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture(scope="module")
def expected(prompts) -> str:
    """What one process writes."""
    out = prompts.with_name("one.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cli.copy_bandwidth", lambda device: 1e10)
        assert program.main(["--prompts_file", str(prompts), "--output", str(out), *SETTINGS]) == 0
    return out.read_text()


def torchrun(prompts: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "generate.py"]
    command += ["--prompts_file", prompts, "--output", out, *SETTINGS]
    environment = {"TRITON_INTERPRET": "0", **os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_rank_is_killed_and_one_process_goes_on(capsys, monkeypatch, prompts, expected, tmp_path):
    out, parts = tmp_path / "out.jsonl", [tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.rank1.partial"]
    run = torchrun(prompts, out)
    try:
        while not all(part.exists() and part.read_bytes().count(b"\n") > 2 for part in parts):
            assert run.poll() is None
            time.sleep(0.01)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(workers[1]), signal.SIGKILL)
        _, error = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode and not out.exists()
    assert 'File "' + str(ROOT) not in error  # no traceback but torchrun's own
    done = [json.loads(line) for part in parts for line in part.read_bytes().splitlines()[1:]]
    assert len(done) >= 4
    monkeypatch.setattr("cli.copy_bandwidth", lambda device: 1e10)
    assert program.main(["--prompts_file", str(prompts), "--output", str(out), *SETTINGS]) == 0
    assert out.read_text() == expected
    rows = re.search(r"tokens in (\d+) rows", capsys.readouterr().err).group(1)
    assert int(rows) == 19 - len(done) - ("long" not in [completion["prompt"] for *_, completion in done])
    assert not any(part.exists() for part in parts)


# --- Ray


def text_generator():
    spec = importlib.util.spec_from_file_location("ray_batch", ROOT / "examples" / "ray_batch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TextGenerator


def test_batches_of_ray_data(tiny):
    texts = text_generator()(str(TINY_GEMMA), device="cpu", precision="fp32", seed=4, max_new_tokens=12)
    whole = {"prompt": np.array(["def f(", "import os\n", "x = ["], dtype=object), "index": np.arange(3)}
    found = texts(whole)
    assert found.keys() == {"prompt", "index", "text"} and all(found["text"])
    halves = [texts({name: column[part] for name, column in whole.items()}) for part in (slice(0, 1), slice(1, 3))]
    assert [*found["text"]] == [*halves[0]["text"], *halves[1]["text"]]
    model, tokenizer = tiny
    prompts = [tokenizer.encode(prompt) for prompt in whole["prompt"]]
    tokens = generate(model, prompts, 12, seed=4, stop_ids=())
    for text, each in zip(found["text"], tokens):
        assert tokenizer.decode(each).startswith(text)


def test_ray_itself():
    ray = pytest.importorskip("ray")
    rows = [{"prompt": text, "index": i} for i, text in enumerate(["def f(", "x = ["])]
    options = dict(checkpoint_path=str(TINY_GEMMA), device="cpu", precision="fp32", max_new_tokens=6, temperature=0)
    data = ray.data.from_items(rows).map_batches(text_generator(), fn_constructor_kwargs=options, concurrency=1)
    found = {row["index"]: row["text"] for row in data.take_all()}
    options.pop("checkpoint_path")
    here = text_generator()(str(TINY_GEMMA), **options)
    batch = {"prompt": np.array([row["prompt"] for row in rows]), "index": np.arange(2)}
    assert [found[0], found[1]] == [*here(batch)["text"]]
