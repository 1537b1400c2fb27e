"""Runs of finetune.py in processes of their own, from one that has imported all and is forked: `python
training_processes.py JOBS`, JOBS being JSON, [{"ranks": 2, "argv": [...], "kill": [OUT, step, seconds], "goes_on": [OUT,
OUT of another]}].

A job's processes are connected as torchrun connects them. They are killed so many seconds after the checkpoint of a step
was there. One that goes on does so from all but the newest checkpoint of the other run. Prints each job's exit statuses,
of one that was killed -9, and on stderr what its processes said."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from processes import fork, free_port

import finetune

with tempfile.TemporaryDirectory() as directory:
    for number, job in enumerate(json.loads(sys.argv[1])):
        if "goes_on" in job:
            out, other = job["goes_on"]
            shutil.copytree(other, out)
            shutil.rmtree(finetune.saved(Path(out) / "checkpoints")[-1])
        code = f"import sys, torch, finetune\ntorch.set_num_threads(1)\nsys.exit(finetune.main({job['argv']!r}))"
        files, port = Path(directory) / str(number), free_port()
        pids = [fork(files, rank, job["ranks"], port, code) for rank in range(job["ranks"])]
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
