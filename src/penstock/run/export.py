"""`penstock export`: a run's model as a directory that transformers loads."""

import os
import shutil
from pathlib import Path

from penstock.config import ExportConfig
from penstock.errors import UserError
from penstock.run.directory import RunDirectory, refused, resolve_model


def export(config: ExportConfig) -> Path:
    """Copies the best (or newest verified) checkpoint's model; with --dtype, rounded or widened on the way."""
    RunDirectory.peek(config.run)
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; choose another directory.")
    source = Path(resolve_model(config.run, config.which))
    if source.name != config.which:
        raise UserError(f"{config.run}: this run has no {config.which}; only ppo runs have a critic.")
    unfinished = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        for file in source.iterdir():
            shutil.copyfile(file, unfinished / file.name)
        if config.dtype is not None:
            from penstock.memory.strategy import DTYPES
            from penstock.models import pretrained

            decoder, extras = pretrained.load(source, dtype=DTYPES[config.dtype], device="cpu")
            pretrained.save(decoder, unfinished, score=extras.get("score.weight"))
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        raise refused(f"--out {out}", error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out
