"""What the experiments on real models share."""

import sys
from pathlib import Path

import pytest

from benchmarks.real.runs import Stepping
from benchmarks.real.sentiment import learning

TOY = """
import itertools, sys, time
for i in itertools.count():
    if i == int(sys.argv[2]):
        sys.exit(7)
    with open(sys.argv[1], "a") as file:
        file.write(f"{i}\\n")
    time.sleep(0.2)
"""


def state_of(process) -> str:
    return Path(f"/proc/{process.pid}/status").read_text().partition("State:")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_stands_still_between_its_steps_and_says_how_it_ended(tmp_path):
    stepping = Stepping([sys.executable, "-c", TOY, str(tmp_path / "lines"), "4"], tmp_path / "lines")
    assert not (tmp_path / "lines").exists()
    assert stepping.step() > 0
    assert state_of(stepping._process) in "Tt"
    assert stepping.peak_rss_bytes() > 1e6
    while stepping._made() < 4:
        stepping.step()
    with pytest.raises(RuntimeError, match="exit code 7, after 4 steps"):
        stepping.step()
    stepping.close()


def test_a_reward_is_reached_where_five_steps_first_have_it_in_the_mean():
    rewards = [0.9, 0.1, 0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7, 0.15]
    facts = learning([(step, 10.0 * step, reward, 2.0) for step, reward in enumerate(rewards, 1)])
    assert facts["steps_to"] == {"0.4": 8, "0.5": 9}  # means: 0.26, 0.22, 0.34, 0.46, 0.58, 0.59
    assert facts["seconds_to"] == {"0.4": 80.0, "0.5": 90.0}
    assert facts["trained"] == [pytest.approx((5, 50.0, 0.26, 2.0)), pytest.approx((10, 100.0, 0.59, 2.0))]
