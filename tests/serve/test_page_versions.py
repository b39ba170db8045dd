"""The page of versions in a browser: what it shows, and rolling back by one click."""

import re

import pytest

from penstock.run.versions import REFUSED, TRUSTED, Versions
from penstock.serve.versions.rounds import LOG
from tests.serve.browser import LOOKS
from tests.serve.conftest import KEY, running, save_chatty
from tests.serve.page_payloads import PAYLOADS, nothing_runs

AGREED = {"mean": 0.66, "interval": [0.61, 0.71], "conversations": 212}
COUNTED = {"comparisons": 320, "votes": 80, "sha256": "17cdf4034b4b1a2f"}
TRAINED = {
    "way": ["dpo"], "why_way": "320 comparisons teach the model directly", "votes": COUNTED, "heldout": COUNTED,
    "agreement": {"all": AGREED}, "answers": {"prompts": 64, "ended": [0.98, 1.0], "tokens": [21.5, 18.25]},
    "checks": [
        {"name": "moves with held-out votes of all rounds", "passed": True, "shown": "66.0% (61.0% to 71.0%)"},
        {"name": "facts.jsonl against the start", "passed": True, "shown": "+0.010 (-0.020 to +0.040); allowed: -0.1"},
    ],
    "memory": {"planned": 434850550, "taken": 440705024},
}  # fmt: skip


@pytest.fixture
def live(tmp_path):
    """Four versions: the start, one promoted, one whose votes were flipped, one promoted."""
    models = [save_chatty(tmp_path / f"model-{seed}", seed) for seed in range(3)]
    versions = Versions.begin(tmp_path / "live", models[0])
    shared = {"new": COUNTED, "seconds": 81.0}
    why = "moves with held-out votes of all rounds: 66.0% (61.0% to 71.0% of 212 conversations)"
    made = {"decision": "promoted", "why": why, "state": TRUSTED, **TRAINED, **shared}
    versions.add(version=1, parent=0, learned=[1], model=models[1], examined={}, **made)
    judged = {"new": {**AGREED, "mean": 0.31, "interval": [0.26, 0.37]}, "known": AGREED, "by": "reward model"}
    why = "they contradict earlier votes: what those taught agrees with 31.0% (26.0% to 37.0% of 212 conversations)"
    versions.add(version=2, parent=1, decision="refused", why=why, state=REFUSED, learned=[], examined=judged, **shared)
    judged = {"new": AGREED, "known": AGREED, "by": "reward model"}
    versions.add(version=3, parent=1, learned=[3], model=models[2], examined=judged, **made)
    return versions


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_person_reads_why_and_rolls_back_by_one_click(tmp_path, live, contexts, watch, width, scheme):
    from playwright.sync_api import expect

    with running(tmp_path / "data", str(live.path), follow=True) as server:
        page = contexts[width < 600].new_page()
        page.set_viewport_size({"width": width, "height": 844})
        page.emulate_media(color_scheme=scheme)
        watch.over(page)
        page.goto(f"{server.address}/#key={KEY}")
        page.wait_for_selector(".welcome")
        if width < 600:
            page.get_by_role("button", name="Conversations").click()
        page.get_by_role("link", name="Versions").click()
        page.wait_for_url(f"{server.address}/versions")
        page.goto(f"{server.address}/versions/")
        assert page.url == f"{server.address}/versions"
        cards = page.locator("article")
        expect(cards).to_have_count(4)
        expect(cards.first.get_by_text("served", exact=True)).to_be_visible()
        expect(cards.nth(1)).to_contain_text("they contradict earlier votes")
        cards.nth(1).get_by_text("Figures and lineage").press("Enter")
        expect(cards.nth(1)).to_contain_text("31.0 % (26.0 % to 37.0 % of 212 conversations)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        cards.nth(2).get_by_role("button", name="Roll back to this").click()
        expect(page.get_by_role("dialog")).to_contain_text("Votes that only later versions learned are withdrawn")
        page.get_by_role("button", name="Serve it").click()
        expect(page.get_by_text("Version 1 is served.").first).to_be_visible()
        expect(cards.nth(0)).to_contain_text("votes withdrawn")
        assert (cards.nth(1).locator("details")).get_attribute("open") is not None  # what was open stays open
        assert Versions(live.path).current == 1

        cards.nth(1).get_by_role("button", name="Trust its votes").click()
        expect(cards.nth(1)).to_contain_text("votes trusted")
        page.get_by_role("button", name="Learn from new votes now").click()
        expect(page.locator(".log")).to_contain_text(re.compile("0 new votes and comparisons"), timeout=300_000)
        page.close()
        watch.check(server.address)


def test_pictures_of_versions(tmp_path, live, contexts, shoot):
    with running(tmp_path / "data", str(live.path), follow=True) as server:
        for width, scheme in LOOKS:
            page = contexts[width < 600].new_page()
            page.set_viewport_size({"width": width, "height": 844 if width < 600 else 820})
            page.emulate_media(color_scheme=scheme)
            page.goto(f"{server.address}/#key={KEY}")
            page.wait_for_selector(".welcome")
            page.goto(f"{server.address}/versions")
            page.get_by_text("Figures and lineage").nth(1).click()
            page.mouse.move(0, 0)
            shoot("versions", page)
            page.close()


def test_no_text_of_a_version_its_data_or_its_model_is_run(tmp_path, contexts, watch):
    """Names of models are names of folders; figures and reasons quote names of files and of models."""
    start, made = (save_chatty(tmp_path / name, seed) for seed, name in enumerate(("start", "made")))
    versions = Versions.begin(tmp_path / "<img src=x onerror=alert(1)>", start)
    (versions.path / LOG).write_text("\n".join(PAYLOADS[-12:]))
    for number, text in enumerate(PAYLOADS, 1):
        counted = {"comparisons": text, "votes": text, "sha256": text}
        checks = [{"name": text, "passed": False, "shown": text}]
        judged = {"new": {**AGREED, "conversations": text}, "known": {**AGREED, "conversations": text}, "by": text}
        figures = {**TRAINED, "way": [text], "why_way": text, "votes": counted, "heldout": counted, "checks": checks}
        why = {"why": text, "state": REFUSED, "learned": [text], "new": counted, "seconds": 1.0, "examined": judged}
        versions.add(version=number, parent=text, decision="refused", model=made, **figures, **why)
    with running(tmp_path / "data", str(versions.path), follow=True) as server:
        page = contexts[False].new_page()
        watch.over(page)
        page.goto(f"{server.address}/#key={KEY}")
        page.wait_for_selector(".welcome")
        page.goto(f"{server.address}/versions")
        page.wait_for_selector("article")
        assert page.locator("article").count() == len(PAYLOADS) + 1
        assert page.locator("article > p").all_text_contents()[:-1] == PAYLOADS[::-1]
        page.evaluate("() => { for (const details of document.querySelectorAll('details')) details.open = true; }")
        nothing_runs(page)
        page.get_by_role("button", name="Trust its votes").first.click()
        page.wait_for_selector("#toast:not([hidden])")
        nothing_runs(page)
        page.close()
        watch.check(server.address)


def test_who_is_not_logged_in_is_told_where_to(tmp_path, live, contexts):
    with running(tmp_path / "data", str(live.path)) as server:
        context = contexts[False]
        context.clear_cookies()
        page = context.new_page()
        page.goto(f"{server.address}/versions")
        page.get_by_role("link", name="the chat page").wait_for()
        assert page.locator("article").count() == 0
        page.close()
