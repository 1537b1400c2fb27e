"""Runs of finetune.py in processes of their own, from one that has imported all and is forked: `python training_processes.py
JOBS`, JOBS being JSON, [{"ranks": 2, "argv": [...], "kill": [OUT, step, seconds], "goes_on": [OUT, OUT of another]}].

A job's processes are connected as torchrun connects them. They are killed so many seconds after the checkpoint of a step
was there. One that goes on does so from all but the newest checkpoint of the other run. Prints each job's exit statuses,
of one that was killed -9."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import finetune


def start(job: dict, rank: int, port: int) -> int:
    if pid := os.fork():
        return pid
    torch.set_num_threads(1)
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os._exit(finetune.main(job["argv"]))


for job in json.loads(sys.argv[1]):
    if "goes_on" in job:
        out, other = job["goes_on"]
        shutil.copytree(other, out)
        shutil.rmtree(finetune.saved(Path(out) / "checkpoints")[-1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [start(job, rank, port) for rank in range(job["ranks"])]
    if "kill" in job:
        out, step, seconds = job["kill"]
        while not any(int(each.name[5:]) >= step for each in finetune.saved(Path(out) / "checkpoints")):
            time.sleep(0.001)
        time.sleep(seconds)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)
