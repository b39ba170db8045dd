"""Versions: one file of lines that only grows, from which everything follows."""

import pytest

from penstock.errors import UserError
from penstock.run.versions import FILE, REFUSED, TRUSTED, WAITING, WITHDRAWN, Versions, served_model


@pytest.fixture
def versions(tmp_path):
    versions = Versions.begin(tmp_path / "live", "base")
    for number, parent, decision in ((1, 0, "promoted"), (2, 1, "kept aside"), (3, 1, "promoted")):
        learned = [number] if number < 3 else [2, 3]
        versions.add(
            version=number, parent=parent, decision=decision, state=TRUSTED, learned=learned, model=f"runs/{number}"
        )
    return versions


def test_the_newest_promoted_version_is_served(versions):
    assert versions.current == 3
    assert versions.lineage(3) == [3, 1, 0]
    assert versions.learned(3) == {1, 2, 3}
    assert served_model(versions.path) == ("v3", "runs/3")
    (versions.path / "runs" / "3").mkdir(parents=True)
    assert served_model(versions.path) == ("v3", str(versions.path / "runs" / "3"))


def test_rolling_back_withdraws_votes_and_rolling_forward_takes_them_again(versions):
    versions.serve(versions.before(), "no good")
    assert versions.current == 1
    assert versions.states == {1: TRUSTED, 2: WITHDRAWN, 3: WITHDRAWN}
    versions.serve(3, "good after all")
    assert versions.states == {1: TRUSTED, 2: TRUSTED, 3: TRUSTED}
    versions.serve(0, "all of it")
    assert set(versions.states.values()) == {WITHDRAWN}
    with pytest.raises(UserError, match="no version before it"):
        versions.before()


def test_a_person_decides_whose_votes_count(versions):
    versions.add(version=4, parent=3, decision="refused", state=WAITING, learned=[])
    assert versions.states[4] == WAITING
    versions.trust(4, True, "they are ours")
    versions.trust(2, False, "a bot")
    assert (versions.states[4], versions.states[2]) == (TRUSTED, REFUSED)
    versions.add(version=5, parent=3, decision="promoted", state=TRUSTED, changed={4: REFUSED}, learned=[5], model="m")
    assert versions.states[4] == REFUSED
    with pytest.raises(UserError, match="no votes came with a version 9"):
        versions.trust(9, True, "")
    with pytest.raises(UserError, match="version 4 was not trained"):
        versions.serve(4, "")


def test_half_a_line_of_a_killed_process_is_passed_over_and_removed(versions):
    with (versions.path / FILE).open("ab") as file:
        file.write(b'{"version": 4, "decision": "prom')
    assert Versions(versions.path).current == 3
    versions.serve(1, "still writable")
    lines = (versions.path / FILE).read_text().splitlines()
    assert len(lines) == 5
    assert Versions(versions.path).current == 1


def test_a_damaged_line_is_named(versions):
    with (versions.path / FILE).open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(UserError, match="is damaged"):
        Versions(versions.path)


def test_one_round_at_a_time(versions):
    assert not versions.busy
    with versions.round():
        assert Versions(versions.path).busy
        with pytest.raises(UserError, match="another round is running"), Versions(versions.path).round():
            pass
    assert not versions.busy
