"""`penstock export`: a run's model as a directory that transformers loads."""

import shutil
from pathlib import Path

from penstock.config import ExportConfig
from penstock.errors import UserError
from penstock.run.directory import RunDirectory, resolve_model


def export(config: ExportConfig) -> Path:
    """Copies the best (or newest verified) checkpoint's model; with --dtype, rounded or widened on the way."""
    RunDirectory.peek(config.run)
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; choose another directory.")
    source = Path(resolve_model(config.run, config.which))
    if source.name != config.which:
        raise UserError(f"{config.run}: this run has no {config.which}; only ppo runs have a critic.")
    shutil.copytree(source, out, dirs_exist_ok=True)
    if config.dtype is not None:
        from penstock.memory.strategy import DTYPES
        from penstock.models import pretrained

        decoder, extras = pretrained.load(source, dtype=DTYPES[config.dtype], device="cpu")
        pretrained.save(decoder, out, score=extras.get("score.weight"))
    return out
