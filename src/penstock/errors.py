"""The errors a user can cause, one type per exit code. Each message is one paragraph: what, where, nearest fix.

Anything that is not a `PenstockError` is our own fault: exit code 5, with a traceback.
"""

import errno
import re


class PenstockError(Exception):
    """Base of the errors that end a command without a traceback."""

    exit_code = 5

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows (IPython asks for it): the message, as the command line does."""
        return [f"{type(self).__name__}: {self}"]


class UserError(PenstockError):
    """A flag, a path or a model that cannot work as given."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ResourceError(PenstockError):
    """Disk, memory or a device ran out, or a run stopped itself to protect what it had learned."""

    exit_code = 3


class DataError(PenstockError):
    """A record that cannot be read: `file:line: field: what is wrong and how to fix it`."""

    exit_code = 4


def one_line(text: object) -> str:
    """A text without its line ends: other libraries' errors, which stand inside our paragraphs, may have some."""
    return " ".join(line.strip() for line in str(text).splitlines() if line.strip())


def one_line_warning(message: Warning | str, *_: object, **__: object) -> str:
    """For warnings.formatwarning: without a line of source beside it."""
    return f"warning: {message}\n"


DISK = {
    # number: what the disk says, and what mends it
    errno.ENOSPC: ("the disk is full", "Free some space"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space"),
    errno.EFBIG: ("file too large", "Choose a file system that takes larger files"),
    errno.EIO: ("the disk reports an input/output error", "See what the system says of it (dmesg), or use another"),
    errno.EROFS: ("the file system is read-only", "See what the system says of the disk (dmesg), or use another"),
    errno.ESTALE: ("the network's file system has gone (stale file handle)", "Mount it again"),
}


def disk_trouble(error: BaseException) -> tuple[str, str] | None:
    """The reason in words and what mends it, when the disk is full or fails, else None."""
    code = error.errno if isinstance(error, OSError) else None
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors' own error type
        code = int(match[1])
    return DISK.get(code or 0)
