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
from typing import Any

from penstock.errors import UserError
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


class Keys:
    """The keys and sessions of a server, and how many requests of each are in work."""

    def __init__(self, store: Store, per_key: int) -> None:
        self._store, self._per_key = store, per_key
        self._hashes = store.key_hashes()
        self._sessions: dict[str, float] = {}
        """Hash of a session -> when it ends, as last read from the store."""
        self._busy: Counter[str] = Counter()

    def open_session(self, key: str) -> str | None:
        """A new session, or None when the key is wrong."""
        if not self.holds(key):
            return None
        session = secrets.token_urlsafe(32)
        self._store.add_session(hashed(session), time.time() + SESSION_SECONDS)
        return session

    def close_session(self, session: str) -> None:
        self._sessions.pop(hashed(session), None)
        self._store.remove_session(hashed(session))

    def holds(self, key: str) -> bool:
        """Whether this is a key of the server. Takes the same time for a wrong one."""
        sha256 = hashed(key)
        return sum(hmac.compare_digest(sha256, known) for known in self._hashes) > 0

    def remembers(self, session: str) -> bool:
        """Whether it is a session that has been looked up before; reads no database."""
        return self._sessions.get(hashed(session), 0.0) >= time.time()

    def knows(self, session: str) -> bool:
        """Whether it is a session. Reads the database: not for the event loop."""
        sha256 = hashed(session)
        end = self._store.session_ends(sha256)
        if end is None or end < time.time():
            return False
        self._sessions[sha256] = end
        return True

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
