"""Code that runs as ranks do: in processes that one forks which has imported the program, all cases side by side."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(cases: dict[str, tuple[int, str]], seconds: float = 120) -> dict[str, list[tuple[int, str, str]]]:
    """The status, stdout and stderr of each rank of each case, which is a number of ranks and what they execute."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, env=environment, **pipes) as process:
        try:
            found, error = process.communicate(json.dumps(cases), timeout=seconds)
        finally:
            process.kill()  # with its group of forks, if it is not done
    assert process.returncode == 0, error
    return {name: [tuple(each) for each in ranks] for name, ranks in json.loads(found).items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(files: Path, rank: int, count: int, port: int, code: str) -> int:
    """The number of a process that executes `code` as a rank."""
    if process := os.fork():
        return process
    numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_PORT=port)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}
    for stream in (1, 2):
        os.dup2(os.open(f"{files}.{rank}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
    status = 1
    try:
        exec(code, {"__name__": "rank"})  # noqa: S102
        status = 0
    except SystemExit as end:
        status = end.code
    except Exception:  # noqa: BLE001, the code's
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import benchmark  # noqa: F401, for the forks, as all that it imports
    import eval  # noqa: F401
    import ranks  # noqa: F401

    with tempfile.TemporaryDirectory() as directory:
        cases, processes, found = json.load(sys.stdin), {}, {}
        for name, (count, code) in cases.items():
            port = free_port()
            processes[name] = [fork(Path(directory) / name, rank, count, port, code) for rank in range(count)]
        for name, forks in processes.items():
            statuses = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in forks]
            files = [[Path(directory) / f"{name}.{rank}.{stream}" for stream in (1, 2)] for rank in range(len(forks))]
            found[name] = [(status, *[x.read_text() for x in streams]) for status, streams in zip(statuses, files)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
