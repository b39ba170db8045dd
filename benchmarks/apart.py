"""A call in a forked process: its memory is its own, and so is its failure. Forking imports nothing again.

The parent must not have computed on several threads or asked a driver for anything before it forks.
"""

import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from penstock.errors import PenstockError

Call = Callable[[], dict[str, Any]]
THREADS = "PENSTOCK_BENCHMARK_THREADS"
"""The variable with the threads that a forked process computes on; default: all cores."""


class Apart:
    """Starts the call at once; `result` waits for it."""

    def __init__(self, call: Call) -> None:
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self._began = time.monotonic()
        self._process = multiprocessing.get_context("fork").Process(target=_send_result, args=(call, sender))
        self._process.start()
        sender.close()

    def result(self, seconds: float) -> dict[str, Any]:
        """What it returned and `seconds_in_all`; an `error` where it failed or takes longer than `seconds`."""
        try:
            result = self._receiver.recv() if self._receiver.poll(max(seconds, 0)) else {"error": "no time left"}
        except EOFError:
            result = {"error": "the process ended without a result: killed, most likely for its memory"}
        self._process.kill()
        self._process.join()
        return {**result, "seconds_in_all": time.monotonic() - self._began}


def apart(call: Call, seconds: float) -> dict[str, Any]:
    """What the call returns, from a process of its own."""
    return Apart(call).result(seconds)


def _send_result(call: Call, sender: Any) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with a check that ran out of time
    torch.set_num_threads(int(os.environ.get(THREADS) or len(os.sched_getaffinity(0))))
    try:
        torch.manual_seed(0)
        result = call()
    except PenstockError as error:
        result = {"error": f"{type(error).__name__}: {error}"[:400]}
    except Exception:
        result = {"error": traceback.format_exc()[-1500:]}
    sender.send(result)
