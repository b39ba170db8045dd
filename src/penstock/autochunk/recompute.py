"""Says to whatever computes that a part runs once more, in backward, for its gradients alone."""

import contextlib
import contextvars
from collections.abc import Iterator

_RECOMPUTING = contextvars.ContextVar("recomputing", default=False)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Inside, parts are run again for their gradients alone: what they return was known before, so a part that is
    computed in slices (autochunk.execute) may return something of the same shape that holds nothing."""
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


def is_recomputing() -> bool:
    """Whether this is inside `recomputing()`."""
    return _RECOMPUTING.get()
