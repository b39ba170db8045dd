"""A flag for code that runs once more in backward, for its gradients only."""

import contextlib
import contextvars
from collections.abc import Iterator

_RECOMPUTING = contextvars.ContextVar("recomputing", default=False)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Code inside runs again for its gradients only. Its results are known already, so a region of `execute` may return
    tensors of the same shape without memory."""
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


def is_recomputing() -> bool:
    return _RECOMPUTING.get()
