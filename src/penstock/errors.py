"""The errors a user can cause, one type per exit code. Each message is one paragraph: what, where, nearest fix.

Anything that is not a `PenstockError` is our own fault: exit code 5, with a traceback.
"""


class PenstockError(Exception):
    """Base of the errors that end a command without a traceback."""

    exit_code = 5

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows (IPython asks for it): the message, as the command line does."""
        return [f"{type(self).__name__}: {self}"]


class UserError(PenstockError):
    """A flag, a path or a model that cannot work as given."""

    exit_code = 2


class ResourceError(PenstockError):
    """Disk, memory or a device ran out, or a run stopped itself to protect what it had learned."""

    exit_code = 3


class DataError(PenstockError):
    """A record that cannot be read: `file:line: field: what is wrong and how to fix it`."""

    exit_code = 4
