"""The flags of `penstock serve`. No torch in here."""

from dataclasses import dataclass

from penstock.config import InferenceFlags, TemplateFlags


@dataclass(frozen=True)
class ServeConfig(TemplateFlags, InferenceFlags):
    """Answer over HTTP as OpenAI's API does, with a page to chat in."""

    model: tuple[str, ...]
    """Hugging Face directories, hub ids or run directories; NAME=PATH gives the name that clients use."""
    lora_modules: tuple[str, ...] = ()
    """Adapters of the one model, answered in the same batches under names of their own: NAME=DIRECTORY, or runs."""
    host: str = "127.0.0.1"
    """Address to listen at; one that other machines can reach needs --key."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    key: str | None = None
    """Key that every request must send, at least 16 characters. Default: PENSTOCK_KEY of the environment, which other
    users of the machine cannot see, or else made and printed at the first start."""
    new_key: bool = False
    """Make a new key; the earlier key and all sessions end."""
    data_dir: str = "runs/serve"
    """Directory of conversations, votes and the hashed key."""
    database: str | None = None
    """PostgreSQL database to keep them in instead: postgresql://USER:PASSWORD@HOST/NAME. Default: PENSTOCK_DATABASE of
    the environment, which other users of the machine cannot see."""
    move_damaged: bool = False
    """If the database is damaged, move it aside and start with an empty one."""
    follow: bool = False
    """Watch the runs and answer from each newer checkpoint."""
    rows: int = 32
    """Answers of one model that are generated together."""
    queue: int = 128
    """Answers that may wait for a row; further requests get status 429."""
    per_key: int = 256
    """Requests with one key that may be in progress at once."""
    max_length: int | None = None
    """Tokens of prompt and answer together; it bounds the memory of the rows. Default: the model's limit."""
    root_path: str = ""
    """Prefix below which a proxy serves this server: /penstock. Default: none."""
    cors: tuple[str, ...] = ()
    """Web origins whose pages may call the API: https://example.org. Default: none."""
    threads: int | None = None
    """CPU threads that compute; 1 is best for small models on few cores. Default: torch's choice."""
