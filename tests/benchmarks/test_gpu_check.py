"""`make gpu-check` without a GPU: the same code on small shapes, so that no minute of a lent GPU goes to a typo."""

import json

import pytest

from benchmarks import gpu


@pytest.mark.parametrize(
    "check", ["exact", "features", "rates", "small", "table", "giants", "autochunk", "tax_xl", "rollout"]
)
def test_every_quick_check_runs_and_writes_its_result(check, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--device", "cpu", "--tiny", "--disk", str(tmp_path / "disk"), "--only", check]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["gpu"] is None
    found = found[check]
    assert not any("error" in one for one in found.get("rows", {}).values() if isinstance(one, dict))
    if check == "exact":
        assert found["bit_equal"]
        assert found["rows"]["naive fp32"]["largest_difference_to_plain_pytorch"] < 1e-5


@pytest.mark.parametrize("most", [1, 7, 40])
def test_bisection_finds_the_last_that_fits(most):
    assert gpu.most_layers(lambda layers: layers <= most, 1, 40) == most


def test_no_gpu_is_said_and_is_not_a_pass(capfd):
    if gpu.torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert gpu.main([]) == 2
    assert "no CUDA device" in capfd.readouterr().out
