"""The flags of `penstock serve`. No torch in here."""

from dataclasses import dataclass
from typing import Literal

from penstock.config import Flags


@dataclass(frozen=True)
class ServeConfig(Flags):
    """Answer over HTTP as OpenAI's API does, with a page to chat in."""

    model: tuple[str, ...]
    """Hugging Face directories, hub ids or run directories; NAME=PATH names one as clients shall call it."""
    host: str = "127.0.0.1"
    """The address to listen at; anything but this machine itself needs --key."""
    port: int = 8000
    """The port to listen at; 0 takes a free one."""
    key: str | None = None
    """The key that every request must bring, 16 characters or more; made and printed once when not given."""
    new_key: bool = False
    """Forget the key of earlier starts, and all sessions, and make another."""
    data_dir: str = "runs/serve"
    """Where conversations, votes and the hashed key are kept."""
    database: str | None = None
    """Keep them in PostgreSQL instead: postgresql://USER:PASSWORD@HOST/NAME."""
    move_damaged: bool = False
    """If the database is damaged, move it aside and start with an empty one."""
    follow: bool = False
    """Watch the runs and answer from each newer checkpoint as soon as it is there."""
    rows: int = 32
    """Answers of a model that are written together."""
    queue: int = 128
    """Answers that may wait for a row; what comes beyond is told to try again (429)."""
    per_key: int = 256
    """Requests with the same key in work at once."""
    max_length: int | None = None
    """Tokens of prompt and answer together; the model's own limit when not given. Bounds the memory of the rows."""
    cors: tuple[str, ...] = ()
    """Web origins whose pages may call the API: https://example.org. None, when not given."""
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """What the weights compute in; int8: weights only, beside bf16, for speed."""
    device: str | None = None
    """cpu, cuda, ... The accelerator if there is one, when not given."""
    threads: int | None = None
    """CPU threads that compute, torch's own choice when not given; 1 is best for small models on few cores."""
