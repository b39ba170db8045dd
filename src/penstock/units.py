"""Bytes as people write them."""

from penstock.errors import UserError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip


def parse_bytes(text: str, flag: str) -> int:
    """Bytes of "6GB", "512 MiB", "1.5e9". Raises UserError naming `flag` otherwise."""
    number = text.strip().rstrip("bBkKmMgGtTiI ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        nbytes = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{flag} {text}: not a number of bytes; write 6GB, 512MB or 1.5TB.") from error
    if nbytes <= 0:
        raise UserError(f"{flag} {text}: must be above 0.")
    return nbytes


def show_bytes(nbytes: float) -> str:
    """1234567890 -> "1.23 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} bytes"
