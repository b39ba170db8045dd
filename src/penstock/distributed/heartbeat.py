"""Signs of life: every rank counts in the ranks' common store, so that a rank that dies or hangs is named.

A collective waits for all ranks. When one of them is gone, gloo names the address that closed a connection, NCCL names
nothing, and a rank that hangs holds the others until the backend's timeout. Here a thread of every rank increases its
own number once a beat and reads the other ranks'. Silence is counted in own beats, not in seconds: a laptop that
sleeps, or a job that is suspended as a whole, stops all ranks alike.
"""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from torch.distributed import Store

BEAT = 1.0
"""Seconds between signs of life."""
SILENCE = 60
"""Beats without one after which a rank is gone; a rank that ended without failing is not missed."""
CLOSE = 5
"""The same when a closed connection already shows that a rank is gone."""
HEARD = 3
"""Beats that a rank stays after its verdict: the store may live in this process, and the other ranks must read it."""


class Heartbeat:
    """This rank's sign of life, and its view of the other ranks'. The thread uses a clone of `store`."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        beat: float = BEAT,
        silence: int = SILENCE,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._rank = rank
        self._beat, self._silence, self._end = beat, silence, end or _end
        self._counts = [0] * size
        self._silent = [0] * size
        """Own beats since each rank's number last moved."""
        self._names = [f"rank {i}" for i in range(size)]
        self._gone = ""
        """The ranks that are gone, in the words of the first rank with a verdict."""
        self._answers = True
        """Whether the store did at the last beat."""
        self._stopped = threading.Event()
        self._store.set(f"name/{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    def leave(self, well: bool) -> None:
        """Ends the thread. `well`: this rank is done, and must not count as gone."""
        atexit.unregister(self._at_exit)
        self._stopped.set()
        self._thread.join()
        if well:
            with contextlib.suppress(RuntimeError):  # the store went first: all ranks are ending
                self._store.set(f"left/{self._rank}", "")

    def missing(self) -> str | None:
        """The ranks that give no sign of life, in words, or None when all do. Waits for a few beats more than CLOSE.

        The first verdict is every rank's verdict: later ones would name ranks that stopped because of it.
        """
        for _ in range(CLOSE + 2):
            if self._verdict(CLOSE):
                time.sleep(HEARD * self._beat)
                break
            time.sleep(self._beat)
        return self._gone or None

    def _run(self) -> None:
        look = threading.Thread()
        while not self._stopped.wait(self._beat):
            if not look.is_alive():
                look = threading.Thread(target=self._look, name="look", daemon=True)
                look.start()
                look.join(self._beat)
            self._answers = not look.is_alive()
            if not self._answers:  # the process with the store, rank 0 or its launcher, is stopped
                self._silent[0] += 1
            if self._verdict(self._silence):
                time.sleep(HEARD * self._beat)
                if not self._stopped.is_set():
                    self._end(self._gone)
                return

    def _look(self) -> None:
        """One beat."""
        try:
            self._store.add(f"beat/{self._rank}", 1)
            counts = [self._store.add(f"beat/{i}", 0) for i in range(len(self._counts))]
            for i, (count, before) in enumerate(zip(counts, self._counts, strict=True)):
                moved = count != before or self._store.check([f"left/{i}"])
                self._silent[i] = 0 if moved else self._silent[i] + 1
                if self._silent[i] == 1 and self._store.check([f"name/{i}"]):
                    self._names[i] = self._store.get(f"name/{i}").decode()
            self._counts = counts
            if not self._gone and self._store.check(["verdict"]):
                self._gone = self._store.get("verdict").decode()
        except RuntimeError:  # the store lives in rank 0 or in its launcher
            self._silent[0] += 1

    def _verdict(self, silence: int) -> bool:
        """Whether any rank is gone; `_gone` names it."""
        silent = [name for name, beats in zip(self._names, self._silent, strict=True) if beats >= silence]
        if silent and not self._gone:
            self._gone = f"{' and '.join(silent)} gave no sign of life for {silence * self._beat:.0f} s"
            with contextlib.suppress(RuntimeError):
                if self._answers:
                    self._gone = self._store.compare_set("verdict", "", self._gone).decode()
        return bool(self._gone)

    def _at_exit(self) -> None:
        self.leave(well=getattr(sys, "last_value", None) is None)


def _end(gone: str) -> None:
    """The main thread waits inside a collective for a rank that will not come: only the process can be ended."""
    print(f"penstock: {advice(gone)}", file=sys.stderr, flush=True)
    os._exit(3)


def advice(gone: str) -> str:
    """The message for the user. Example: advice("rank 1 (host, process 7) gave no sign of life for 60 s")."""
    return (
        f"{gone}; the other ranks stop, since every step needs all of them. What it printed last says why it ended "
        "(out of memory, if it printed nothing). Checkpoints that were written are intact: penstock resume RUN."
    )
