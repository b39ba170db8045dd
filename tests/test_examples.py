"""Every recipe of examples/ runs from an empty directory, on a tiny model for a step, and stays short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.data.toyland import save_tokenizer
from tests.conftest import PATIENCE, metrics
from tests.zygote import stand_ins

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = sorted(EXAMPLES.glob("*.sh"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_runs(recipe, tmp_path, tiny_model):
    model = tiny_model(vocab_size=400, max_length=256)
    save_tokenizer(Path(model), ["What is a penstock? The gated pipe that feeds a turbine."], vocab_size=400)
    environment = {
        **os.environ, "PATH": f"{stand_ins()}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MODEL": model, "TEACHER": model, "STEPS": "1",
        "OUT": str(tmp_path / "runs" / "run"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", recipe], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(tmp_path / "runs" / "run")) == 1


def test_recipes_are_about_twenty_lines():
    assert len(RECIPES) >= 7
    assert {path.name for path in RECIPES if len(path.read_text().splitlines()) > 22} == set()
