"""`make gpu-check` without a GPU: the same code on small shapes, so that no minute of a lent GPU goes to a typo."""

import json

import pytest

from benchmarks import gpu

LONG = [pytest.param(check, marks=pytest.mark.slow) for check in ("table", "autochunk", "capacity")]  # a minute each


@pytest.mark.parametrize(
    "check", ["exact", "features", "rates", "attention", "head", "small", "tax", "sft", "rollout", *LONG]
)
def test_every_quick_check_runs_and_writes_its_result(check, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    flags = ["--device", "cpu", "--tiny", "--disk", str(tmp_path / "disk"), "--seconds", "1000"]  # on a busy machine
    assert gpu.main([*flags, "--only", check]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["machine"]["gpu"] is None
    result = results[check]
    assert not any("error" in row for row in result.get("rows", {}).values() if isinstance(row, dict))
    if check == "exact":
        assert result["bit_equal"]
        assert result["rows"]["naive fp32"]["largest_difference_to_plain_pytorch"] < 1e-5


def test_no_gpu_is_said_and_is_not_a_pass(capfd):
    if gpu.torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert gpu.main([]) == 2
    assert "no CUDA device" in capfd.readouterr().out
