"""The planted bugs, without running their campaign: each can be planted, and each starts with a test that exists."""

from benchmarks import planted_bugs


def test_the_right_line_of_every_bug_is_there_once():
    source = planted_bugs.ROOT / "src" / "penstock"
    texts = {file: (source / file).read_text() for file, *_ in planted_bugs.BUGS}
    stale = [f"{file}: {bug}" for file, bug, right, _ in planted_bugs.BUGS if texts[file].count(right) != 1]
    assert stale == [], "mend benchmarks/planted_bugs.py"
    assert all(right != wrong for _, _, right, wrong in planted_bugs.BUGS)


def test_every_bug_has_a_name_of_its_own():
    assert len({bug for _, bug, _, _ in planted_bugs.BUGS}) == len(planted_bugs.BUGS)


def test_most_bugs_start_with_the_test_that_caught_them_last_time():
    recorded = planted_bugs.recorded_tests()
    assert len(recorded) > len(planted_bugs.BUGS) // 2
    for test in recorded.values():
        path, name = test.split("::", 1)
        assert f"def {name.split('[')[0].split(':')[0]}(" in (planted_bugs.ROOT / path).read_text()


def test_the_tests_of_every_folder_run_on_a_bug():
    tests = planted_bugs.ROOT / "tests"
    folders = {path.relative_to(tests).parts[0] for path in tests.glob("*/**/test_*.py")} - {"benchmarks"}
    assert folders == set(planted_bugs.DIRECTORIES)
    run = {planted_bugs.ROOT / path for path in planted_bugs.files_in_order("serve/store.py")}
    assert {path for folder in folders for path in (tests / folder).rglob("test_*.py")} <= run
