"""Who may ask: keys kept as hashes and compared in constant time, sessions for the page, and how much each may run.

A session is a random cookie; its CSRF token is derived from it, so that a page that can read the one answer knows it
and another site, which only makes the browser send the cookie, does not.
"""

import hashlib
import hmac
import secrets
import time
from collections import Counter

from penstock.errors import UserError
from penstock.serve.store import Store

COOKIE = "penstock_session"
SESSION_SECONDS = 30 * 24 * 3600
SHORTEST_KEY = 16
"""Characters: hashes of shorter ones could be tried out."""


def hashed(secret: str) -> str:
    """sha256 in hex. Keys and sessions are random and long, so that a slow hash would protect nothing more."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def csrf_of(session: str) -> str:
    """The token that must come with a session's cookie."""
    return hmac.new(session.encode(), b"penstock csrf", hashlib.sha256).hexdigest()


class Keys:
    """The keys and sessions of a server, and what each key has in work."""

    def __init__(self, store: Store, per_key: int) -> None:
        self._store, self._per_key = store, per_key
        self._hashes = store.key_hashes()
        self._sessions: dict[str, float] = {}
        """Hash of a session -> when it ends, as last read from the store."""
        self._busy: Counter[str] = Counter()

    def open_session(self, key: str) -> str | None:
        """A new session for who knows the key, or None."""
        if not self.holds(key):
            return None
        session = secrets.token_urlsafe(32)
        self._store.add_session(hashed(session), time.time() + SESSION_SECONDS)
        return session

    def close_session(self, session: str) -> None:
        """Forgets a session."""
        self._sessions.pop(hashed(session), None)
        self._store.remove_session(hashed(session))

    def holds(self, key: str) -> bool:
        """Whether it is one of the keys; takes as long for a wrong one."""
        given = hashed(key)
        return sum(hmac.compare_digest(given, one) for one in self._hashes) > 0

    def knows(self, session: str) -> bool:
        """Whether the session is open."""
        name = hashed(session)
        ends = self._sessions.get(name) or self._store.session_ends(name)
        if ends is None or ends < time.time():
            return False
        self._sessions[name] = ends
        return True

    def enter(self, who: str) -> bool:
        """Counts a request of a key; false when it has too many in work already. Pair it with `leave`."""
        if self._busy[who] >= self._per_key:
            return False
        self._busy[who] += 1
        return True

    def leave(self, who: str) -> None:
        """The request has been answered."""
        self._busy[who] -= 1


def settle(store: Store, given: str | None, new: bool) -> str | None:
    """Makes sure that there is a key. Returns the one to print: it was made just now, and nobody can read it again.

    Raises UserError for a key that is too short.
    """
    if given is not None:
        if len(given) < SHORTEST_KEY:
            raise UserError(
                f"--key: has {len(given)} characters; give {SHORTEST_KEY} or more, or none to have one made."
            )
        if store.key_hashes() != [hashed(given)]:
            store.replace_key(hashed(given))
        return None
    if store.key_hashes() and not new:
        return None
    made = f"pk-{secrets.token_urlsafe(24)}"
    store.replace_key(hashed(made))
    return made
