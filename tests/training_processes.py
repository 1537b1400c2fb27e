"""Runs of finetune.py in processes of their own, from one that has imported all and is forked: `python
training_processes.py JOBS`, JOBS being JSON, [{"ranks": 2, "argv": [...], "spare": [100, 1], "keeps": false,
"kill": [OUT, step, seconds], "goes_on": [OUT, OUT of another]}].

A job's processes are connected as torchrun connects them. `spare` is the memory that each has, of which a block takes 1;
those fail that in the end keep activations though `keeps` is false, or don't though it is true. They are killed so many
seconds after the checkpoint of a step was there. One that goes on does so from all but the newest checkpoint of the
other run. Prints each job's exit statuses, of one that was killed -9, and on stderr what its processes said."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch._dynamo  # for the forks, whose optimizers import it
import torch.distributed.checkpoint.state_dict  # noqa: F401, which they import, too
from processes import fork, free_port

import finetune

RUN = """
import sys, torch, finetune
torch.set_num_threads(1)
sys.exit(finetune.main({argv!r}))
"""
MEMORY = """
import finetune, itertools
allocated, loop = itertools.count(), finetune.loop
finetune.allocated_memory, finetune.spare_memory = lambda device: next(allocated), lambda device: {spare}

def checked_loop(trainer, *rest):
    loop(trainer, *rest)
    assert trainer.objective.recompute != {keeps}

finetune.loop = checked_loop
"""

with tempfile.TemporaryDirectory() as directory:
    for number, job in enumerate(json.loads(sys.argv[1])):
        if "goes_on" in job:
            out, other = job["goes_on"]
            shutil.copytree(other, out)
            shutil.rmtree(finetune.saved(Path(out) / "checkpoints")[-1])
        codes = [RUN.format(**job)] * job["ranks"]
        if "spare" in job:
            codes = [MEMORY.format(spare=each, keeps=job["keeps"]) + RUN.format(**job) for each in job["spare"]]
        files, port = Path(directory) / str(number), free_port()
        pids = [fork(files, rank, job["ranks"], port, code) for rank, code in enumerate(codes)]
        if "kill" in job:
            out, step, seconds = job["kill"]
            while not any(int(each.name[5:]) >= step for each in finetune.saved(Path(out) / "checkpoints")):
                time.sleep(0.001)
            time.sleep(seconds)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)
        for said in sorted(Path(directory).glob(f"{number}.*.2")):
            print(said.read_text(), file=sys.stderr)
