"""The tokenizer beside a model, as transformers reads it."""

from pathlib import Path
from typing import Any

from penstock.errors import UserError
from penstock.models.adapter_files import base_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a model, or None when it has no tokenizer files. Never runs remote code.

    An adapter without one has its base's.
    """
    path = Path(source)
    if path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
        source = base_of(source)
        path = Path(source)
    if path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{source}: its tokenizer cannot be read ({type(error).__name__}: {one_line(error)}); put the model's own "
            "tokenizer files beside it."
        ) from error


def check_fit(tokenizer: Any, vocab_size: int, source: str) -> None:
    """Raises UserError when the tokenizer can write ids that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise UserError(
            f"{source}: the tokenizer writes ids up to {highest} and the model has {vocab_size} embeddings; they "
            "belong to different models. Put the model's own tokenizer files beside it."
        )


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()).rstrip(".")
