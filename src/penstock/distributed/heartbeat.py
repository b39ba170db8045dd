"""Who is still there: ranks leave signs of life in their common store, so that a rank that dies or hangs has a name.

A collective waits for all ranks. When one of them is gone, gloo says which address closed a connection, NCCL says
nothing, and a rank that merely hangs holds the others for as long as the backend is patient. Here a thread of every
rank counts up its own number once a beat and looks at the others'. It counts its own beats, not seconds: a laptop that
sleeps, or a job that is stopped and continued, stops all ranks alike.
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
"""Beats without one after which a rank counts as gone; a rank that leaves without failing is not missed."""
CLOSE = 5
"""The same when something else, a closed connection, already says that somebody is gone."""

HEARD = 3
"""Beats that a rank stays after it has found out: the store may be its own, and the others have to hear it too."""


class Pulse:
    """This rank's sign of life and its view of the others'. `store` is the ranks' own; the thread uses a copy."""

    def __init__(
        self, store: Store, rank: int, size: int, *, beat: float = BEAT, silence: int = SILENCE,
        end: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._rank = rank
        self._beat, self._silence, self._end = beat, silence, end or _end
        self._counts = [0] * size
        self._silent = [0] * size
        """Own beats since each rank's number last moved."""
        self._names = [f"rank {other}" for other in range(size)]
        self._found = ""
        """Who is gone, as the first rank that found out puts it."""
        self._stopped = threading.Event()
        self._store.set(f"name/{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    def leave(self, well: bool) -> None:
        """Ends the thread. `well`: this rank is done, and nobody needs to miss it."""
        atexit.unregister(self._at_exit)
        self._stopped.set()
        self._thread.join()
        if well:
            with contextlib.suppress(RuntimeError):  # the store went first: everybody is leaving
                self._store.set(f"left/{self._rank}", "")

    def missing(self) -> str | None:
        """Who gives no sign, in words, or None when all do. Waits for a few beats more than CLOSE.

        The first rank that finds out tells the others, who would else name those that stopped because of it.
        """
        for _ in range(CLOSE + 2):
            if self._verdict(CLOSE):
                time.sleep(HEARD * self._beat)
                break
            time.sleep(self._beat)
        return self._found or None

    def _run(self) -> None:
        while not self._stopped.wait(self._beat):
            self._look()
            if self._verdict(self._silence):
                time.sleep(HEARD * self._beat)
                if not self._stopped.is_set():
                    self._end(self._found)
                return

    def _look(self) -> None:
        """One beat."""
        try:
            self._store.add(f"beat/{self._rank}", 1)
            counts = [self._store.add(f"beat/{other}", 0) for other in range(len(self._counts))]
            for other, (count, before) in enumerate(zip(counts, self._counts, strict=True)):
                moved = count != before or self._store.check([f"left/{other}"])
                self._silent[other] = 0 if moved else self._silent[other] + 1
                if self._silent[other] == 1 and self._store.check([f"name/{other}"]):
                    self._names[other] = self._store.get(f"name/{other}").decode()
            self._counts = counts
            if not self._found and self._store.check(["verdict"]):
                self._found = self._store.get("verdict").decode()
        except RuntimeError:  # the store lives with rank 0 or with what started it
            self._silent[0] += 1

    def _verdict(self, silence: int) -> bool:
        """Whether somebody is gone; `_found` says who."""
        gone = [name for name, beats in zip(self._names, self._silent, strict=True) if beats >= silence]
        if gone and not self._found:
            self._found = f"{' and '.join(gone)} gave no sign of life for {silence * self._beat:.0f} s"
            with contextlib.suppress(RuntimeError):
                self._found = self._store.compare_set("verdict", "", self._found).decode()
        return bool(self._found)

    def _at_exit(self) -> None:
        self.leave(well=getattr(sys, "last_value", None) is None)


def _end(found: str) -> None:
    """The main thread waits inside a collective for a rank that will not come: nothing but the process can end it."""
    print(f"penstock: {advice(found)}", file=sys.stderr, flush=True)
    os._exit(3)


def advice(found: str) -> str:
    """What to tell the user. Example: advice("rank 1 (host, process 7) gave no sign of life for 60 s")."""
    return (
        f"{found}; the other ranks stop, since every step needs all of them. What it printed last says why it ended "
        "(out of memory, if it printed nothing). Checkpoints that were written are intact: penstock resume RUN."
    )
