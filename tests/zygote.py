"""A process that has imported everything, and is forked for each command: torch, transformers and penstock take seconds
to import, and the tests start hundreds of processes.

A client stands in for `python`. It hands over its arguments, environment, folder and standard streams, passes signals
on, and ends as the fork ends; when the client is killed, so is the fork. Nothing but imports has happened in the
zygote: there are no threads, no random numbers, nothing of an earlier test. What differs from a process of its own: the
fork is no child of the client and has another id, shares memory with the zygote, and computes on one thread.
"""

import atexit
import ctypes
import functools
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

STAGES = ("distillation.distill", "grpo", "kto", "ppo", "preference", "reward", "sft")
IMPORTED = [
    "torch.distributed.checkpoint", "torch.distributed.run", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers", "matplotlib.figure",
    *(f"penstock.algorithms.{name}" for name in STAGES), "penstock.commands.chat", "penstock.commands.generate",
    "penstock.memory.fsdp", "penstock.run.report", "penstock.serve.server",
]  # fmt: skip
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def zygotic(*words: object) -> list[str]:
    """The command line that runs `python` with these words in a fork of this process' zygote."""
    if sys.platform != "linux":  # elsewhere what torch loads does not survive a fork
        return [sys.executable, *map(str, words)]
    return [sys.executable, "-ES", __file__, "client", str(server()[0]), *map(str, words)]


@functools.cache
def stand_ins() -> Path:
    """A folder with `python`, `penstock` and `torchrun`, each of them zygotic, for a PATH."""
    if sys.platform != "linux":
        return Path(sys.executable).parent
    folder = server()[0].parent
    for name, words in {
        "python": [],
        "penstock": ["-m", "penstock"],
        "torchrun": ["-m", "torch.distributed.run"],
    }.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(zygotic(*words))} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@functools.cache
def server() -> tuple[Path, subprocess.Popen[bytes]]:
    """The socket of this process' zygote, and that process; it ends when its standard input does, with this process."""
    path = Path(tempfile.mkdtemp(prefix="zygote-")) / "socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, "server", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return path, process


def client(path: str, words: list[str]) -> None:
    """Runs the words in a fork of the server, and ends as that ends."""
    request = json.dumps({"words": words, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"%8d" % len(request)], [0, 1, 2])
        connection.sendall(request)
        child = int(connection.recv(8))
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(child, number))
        status = int(connection.recv(8))
    if os.WIFSIGNALED(status):
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


def serve(path: str) -> list[str]:
    """Returns, in a fork, the words that a client asks for. The server itself does not return."""
    for name in IMPORTED:
        __import__(name)
    gc.freeze()  # a collection would write to, and so copy, all that forks share
    assert len(os.listdir("/proc/self/task")) == 1
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        os.write(1, b"ready\n")
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return _watch(connection)
            connection.close()
            while os.waitpid(-1, os.WNOHANG)[0]:  # former watchers
                pass
    for name in Path(path).parent.iterdir():
        name.unlink()
    Path(path).parent.rmdir()
    os._exit(0)


def _watch(connection: socket.socket) -> list[str]:
    """Returns in the process that runs the words; its parent tells the client how it ended, or ends it."""
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int(length):
        request += connection.recv(1 << 20)
    alive, living = os.pipe()
    if (child := os.fork()) == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its watcher
        os.close(alive)
        connection.close()
        return _become(json.loads(request), streams)
    for stream in (*streams, living):
        os.close(stream)
    connection.sendall(b"%8d" % child)
    while alive not in select.select([alive, connection], [], [])[0]:  # the client is gone
        os.kill(child, signal.SIGKILL)
        connection.detach()
        break
    _, status = os.waitpid(child, 0)
    if connection.fileno() >= 0:
        connection.sendall(b"%8d" % status)
    os._exit(0)


def _become(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Takes what the client has: streams, folder, environment and import path."""
    import torch

    for stream, number in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:] = [*request["environment"].get("PYTHONPATH", "").split(os.pathsep), *PATH]
    torch.set_num_threads(1)
    return request["words"]


def run(words: list[str]) -> None:
    """What `python` does with these words."""
    if words[0] == "-u":
        words = words[1:]
        sys.stdout.reconfigure(write_through=True)
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] in ("-c", "-"):
        text, rest = (words[1], words[2:]) if words[0] == "-c" else (sys.stdin.read(), words[1:])
        sys.argv = [words[0], *rest]
        sys.path.insert(0, "")
        exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def main(role: str, path: str, *words: str) -> None:
    if role == "client":
        client(path, [*words])
    code: object = 0
    asked = serve(path)
    try:
        run(asked)
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        sys.last_type, sys.last_value, sys.last_traceback = sys.exc_info()
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    # the end of an interpreter without the second in which it frees all that it shares with the zygote
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


PATH = sys.path[1:]
if __name__ == "__main__":
    main(*sys.argv[1:])
