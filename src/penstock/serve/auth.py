"""Keys, stored as hashes and compared in constant time, sessions for the page, and how many requests each may run.

A session is a random cookie, and its CSRF token is derived from it. Our page reads the token in an answer; another
site can make a browser send the cookie, but cannot read the token.
"""

import contextlib
import hashlib
import hmac
import secrets
import time
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.errors import UserError
from penstock.serve.labelling import labellers
from penstock.serve.store import Store

SESSION_SECONDS = 30 * 24 * 3600
SHORTEST_KEY = 16
"""Characters. The hash of a shorter key could be found by trying all keys."""


def hashed(secret: str) -> str:
    """sha256 in hex. Keys and sessions are random and long, so a slow hash would not protect them better.

    A letter with an accent is the same in one code point or two: keyboards differ.
    """
    return hashlib.sha256(unicodedata.normalize("NFC", secret).encode("utf-8", "surrogatepass")).hexdigest()


def spellings(key: bytes) -> list[str]:
    """What a key in a header may say: clients write letters beyond ASCII in UTF-8 or in latin-1."""
    texts = [key.decode("latin-1").strip()]
    with contextlib.suppress(UnicodeDecodeError):
        texts.append(key.decode().strip())
    return texts


def cookie_of(scope: Mapping[str, Any]) -> str:
    """The name of a session's cookie: a browser keeps the cookies of all ports of a host together."""
    return f"penstock_session_{scope['server'][1]}"


def csrf_of(session: str) -> str:
    """The token that a request must carry beside the session's cookie."""
    return hmac.new(session.encode(), b"penstock csrf", hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Caller:
    """Who asks: the owner, or a labeller. Example: Caller("lab_5c...")."""

    labeller_id: str | None = None
    """None: the owner."""


class Keys:
    """The keys, labellers' tokens and sessions of a server, and how many requests of each are in work."""

    def __init__(self, store: Store, per_key: int) -> None:
        self._store, self._per_key = store, per_key
        self._callers = {sha256: Caller() for sha256 in store.key_hashes()}
        for sha256, labeller_id in labellers.token_hashes(store).items():
            self._callers[sha256] = Caller(labeller_id)
        self._sessions: dict[str, tuple[float, Caller]] = {}
        """Hash of a session -> when it ends and whose it is, as last read from the store."""
        self._busy: Counter[str] = Counter()

    def open_session(self, key: str) -> str | None:
        """A new session, or None when the key is wrong."""
        caller = self.whose(key)
        if caller is None:
            return None
        session, end = secrets.token_urlsafe(32), time.time() + SESSION_SECONDS
        self._store.add_session(hashed(session), end, caller.labeller_id)
        self._sessions[hashed(session)] = end, caller
        return session

    def close_session(self, session: str) -> None:
        self._sessions.pop(hashed(session), None)
        self._store.remove_session(hashed(session))

    def add_labeller(self, name: str) -> tuple[dict[str, Any], str]:
        """A labeller and a new token, which nobody can read again; one with this name loses the earlier token."""
        token = f"lk-{secrets.token_urlsafe(24)}"
        row = labellers.add(self._store, name, hashed(token))
        self._forget(row["id"])
        self._callers[hashed(token)] = Caller(row["id"])
        return row, token

    def end_labeller(self, labeller_id: str) -> None:
        """Ends a labeller's token and sessions; what was judged stays. Raises LookupError."""
        labellers.end(self._store, labeller_id)
        self._forget(labeller_id)

    def _forget(self, labeller_id: str) -> None:
        caller = Caller(labeller_id)
        # New ones in their place: requests on other threads read the old ones meanwhile.
        self._callers = {sha256: known for sha256, known in self._callers.items() if known != caller}
        self._sessions = {sha256: row for sha256, row in self._sessions.items() if row[1] != caller}

    def whose(self, key: str) -> Caller | None:
        """Who has this key or token. Takes the same time for a wrong one."""
        sha256 = hashed(key)
        matches = [known for known in self._callers if hmac.compare_digest(sha256, known)]
        return self._callers.get(matches[0]) if matches else None

    def remembers(self, session: str) -> Caller | None:
        """Whose session it is, if it has been looked up before; reads no database."""
        end, caller = self._sessions.get(hashed(session), (0.0, None))
        # A labeller may have ended between the reading of a session and its being remembered.
        return caller if end >= time.time() and caller in self._callers.values() else None

    def knows(self, session: str) -> Caller | None:
        """Whose session it is. Reads the database: not for the event loop."""
        sha256 = hashed(session)
        row = self._store.session(sha256)
        if row is None or row["ends_at"] < time.time():
            return None
        caller = Caller(row["labeller_id"])
        self._sessions[sha256] = row["ends_at"], caller
        return caller

    def enter(self, sha256: str) -> bool:
        """Counts a request of a key. False when the key has too many in work. `leave` ends what `enter` began."""
        if self._busy[sha256] >= self._per_key:
            return False
        self._busy[sha256] += 1
        return True

    def leave(self, sha256: str) -> None:
        """Counts a request of a key as answered."""
        self._busy[sha256] -= 1


def settle(store: Store, key: str | None, new: bool) -> str | None:
    """Makes sure that there is a key. Returns a new key to print, which nobody can read again, or None.

    Raises UserError for a key that is too short.
    """
    if key is not None:
        if len(key) < SHORTEST_KEY:
            raise UserError(f"--key: has {len(key)} characters; give {SHORTEST_KEY} or more, or none to have one made.")
        if key != key.strip() or not key.isprintable():
            raise UserError("--key: a header cannot hold its control characters or spaces at its ends; leave them out.")
        if store.key_hashes() != [hashed(key)]:
            store.replace_key(hashed(key))
        return None
    if store.key_hashes() and not new:
        return None
    key = f"pk-{secrets.token_urlsafe(24)}"
    store.replace_key(hashed(key))
    return key
