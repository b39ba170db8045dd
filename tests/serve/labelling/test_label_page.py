"""The labelling room as labellers and its owner meet it: Debian's Chromium against a real `penstock serve`."""

import json
import re
import urllib.request

import pytest
import sqlalchemy as sa

from penstock.serve.labelling import export, room
from penstock.serve.labelling.owner_api import NAME
from penstock.serve.tables import label_items
from tests.serve.browser import KEY, LOOKS, WAIT
from tests.serve.page_payloads import PAYLOADS, nothing_runs

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'penstock[dev]'")
expect = playwright.expect
expect.set_options(timeout=WAIT)

WEIR = {"prompt": [{"role": "user", "content": "What is a weir?"}], "responses": ["a low dam", "a fish", "a bird"]}


def ask(served, method, path, body=None, key=KEY):
    """What the server answers a script."""
    head = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(served.url + path, data, head, method=method)) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@pytest.fixture
def enter(served, new_page):
    """enter(token, width=390): the room's page, in a browser that has seen nothing. The room is empty at first."""
    with served.store.writing() as connection:
        connection.execute(sa.delete(label_items))
    room.change_settings(served.store, dict(room.SETTINGS))

    def open_it(token, *, path="/label", **browser):
        page = new_page(**browser)
        page.goto(f"{served.url}{path}#token={token}" if token else served.url + path)
        return page

    return open_it


@pytest.fixture
def hire(served):
    """hire("ada"): a token of a labeller."""
    return lambda name: ask(served, "POST", "/api/labelling/labellers", {"name": name})["token"]


def add(served, *items, **options):
    return ask(served, "POST", "/api/labelling/items", {"items": list(items), **options})


def card(page, text):
    """The card of an answer, also while it is rewritten."""
    page.wait_for_selector(".answer-card")
    letter = page.locator(".answer-card").filter(has_text=text).locator(".letter").inner_text()
    return page.locator(".answer-card").filter(has=page.get_by_text(letter, exact=True))


def order(page):
    """The answers on the screen with their ranks."""
    cards = page.locator(".answer-card")
    return [
        (cards.nth(i).locator(".text").inner_text().strip(), cards.nth(i).locator(".rank").inner_text())
        for i in range(cards.count())
    ]


def rankings(served):
    return [(line["responses"], line["ranking"]) for line in export.rankings(served.store)]


# --- a labeller -------------------------------------------------------------------------------------------------------
def test_a_labeller_ranks_by_the_keyboard_alone(enter, hire, served):
    add(served, WEIR, {**WEIR, "responses": ["x", "y"]})
    page = enter(hire("ada"))
    page.wait_for_selector(".answer-card")
    assert "#" not in page.url
    focused = page.evaluate("document.activeElement.className")
    assert focused == "answer-card"
    for text, key in (("a low dam", "b"), ("a bird", "w")):
        card(page, text).focus()
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.innerText").endswith(text)  # the card keeps the keyboard
    assert order(page) == [("a low dam", "1"), ("a fish", "2"), ("a bird", "3")]
    page.keyboard.press("Shift+ArrowUp")
    assert order(page) == [("a low dam", "1"), ("a fish", "2"), ("a bird", "2")]
    expect(page.locator("#status")).to_contain_text("rank 2 of 2, equal to")
    page.keyboard.press("k")
    assert order(page) == [("a low dam", "1"), ("a bird", "2"), ("a fish", "3")]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("3")
    assert [text for text, _ in order(page)] == ["a bird", "a fish", "a low dam"]
    page.keyboard.press("1")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("=")
    assert order(page) == [("a low dam", "1"), ("a bird", "1"), ("a fish", "2")]
    page.keyboard.press("Control+Enter")
    expect(page.locator("#progress-words")).to_have_text("1 done, 1 left")
    assert rankings(served) == [(WEIR["responses"], [[0, 2], [1]])]
    page.keyboard.press("s")
    expect(page.locator("#nothing")).to_contain_text("Nothing is left")
    assert len(rankings(served)) == 1


def test_an_order_that_nobody_looked_at_is_not_submitted_at_once(enter, hire, served):
    add(served, WEIR)
    page = enter(hire("ada"))
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#toast")).to_contain_text("You have not changed the order")
    assert rankings(served) == []
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#nothing")).to_be_visible()
    assert len(rankings(served)) == 1


def test_answers_are_dragged_before_behind_and_onto_each_other(enter, hire, served):
    add(served, WEIR)
    page = enter(hire("ada"))
    page.wait_for_selector(".answer-card")

    def drag(text, other, part):
        grip, box = card(page, text).locator(".grip").bounding_box(), card(page, other).bounding_box()
        page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + 40, box["y"] + box["height"] * part, steps=4)
        page.mouse.up()

    top, middle, bottom = (text for text, _ in order(page))
    drag(bottom, top, 0.1)
    assert [text for text, _ in order(page)] == [bottom, top, middle]
    drag(bottom, middle, 0.9)
    assert order(page) == [(top, "1"), (middle, "2"), (bottom, "3")]
    drag(bottom, top, 0.5)
    assert order(page) == [(top, "1"), (bottom, "1"), (middle, "2")]
    drag(top, top, 0.5)
    assert order(page) == [(top, "1"), (bottom, "1"), (middle, "2")]


def test_buttons_move_rewrite_and_restore_and_a_reload_keeps_the_work(enter, hire, served):
    add(served, WEIR)
    page = enter(hire("ada"))
    low = card(page, "a low dam")
    low.get_by_role("button", name="The best").click()
    low.get_by_role("button", name="Rewrite").click()
    box = low.get_by_role("textbox")
    box.fill("a **low** dam across a river")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#toast")).to_contain_text("Keep or cancel")
    low.get_by_role("button", name="Keep").click()
    card(page, "a fish").get_by_role("button", name="Rewrite").click()
    page.keyboard.press("Escape")
    page.get_by_label("Note").fill("Fish are no weirs.")
    page.get_by_label("Flag this item").select_option("unclear")
    before = order(page)
    page.reload()
    page.wait_for_selector(".answer-card")
    assert order(page) == before
    assert page.locator(".answer-card strong").inner_text() == "low"
    expect(page.get_by_label("Note")).to_have_value("Fish are no weirs.")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#nothing")).to_be_visible()
    first, edit = export.rankings(served.store)
    assert (first["flag"], first["note"], first["weight"]) == ("unclear", "Fish are no weirs.", 0)
    assert edit["responses"] == ["a **low** dam across a river", "a low dam"]
    page.get_by_role("button", name="Take back").click()
    page.wait_for_selector(".answer-card")
    assert list(export.rankings(served.store)) == []
    assert order(page) == before
    card(page, "across a river").get_by_role("button", name="Restore").click()
    assert card(page, "a low dam").locator(".text").inner_text().strip() == "a low dam"


def test_formulas_of_answers_are_typeset(enter, hire, served):
    add(served, {**WEIR, "responses": [r"It is \(a^2\).", r"$$\frac{1}{2}$$"]})
    page = enter(hire("ada"))
    expect(page.locator(".answer-card .math.typeset .katex")).to_have_count(2)


def test_guidelines_are_shown_once_and_by_a_key(enter, hire, served):
    add(served, WEIR)
    ask(served, "PATCH", "/api/labelling", {"guidelines": "Prefer **dams**."})
    page = enter(hire("ada"))
    expect(page.get_by_role("dialog", name="Guidelines")).to_contain_text("Prefer dams.")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector(".answer-card")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("g")
    expect(page.get_by_role("dialog", name="Guidelines")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()


def test_who_lost_an_item_to_somebody_else_is_told_and_goes_on(enter, hire, served):
    add(served, WEIR, {**WEIR, "responses": ["x", "y"]})
    page = enter(hire("ada"), allowed=["409"])
    page.wait_for_selector(".answer-card")
    with served.store.writing() as connection:  # a long lunch
        connection.exec_driver_sql("UPDATE label_slots SET leased_until = 1 WHERE labeller_id IS NOT NULL")
    bo = hire("bo")
    while item := ask(served, "POST", "/api/label/next", key=bo)["item"]:
        levels = [[i] for i in range(len(item["answers"]))]
        ask(served, "POST", f"/api/label/items/{item['id']}", {"outcome": "ranked", "ranking": levels}, key=bo)
    page.keyboard.press("b")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#toast")).to_contain_text("somebody else has it now")
    expect(page.locator("#nothing")).to_be_visible()


def test_a_labeller_who_opens_the_chat_is_led_to_the_room_and_a_wrong_token_is_told(enter, hire, served):
    add(served, WEIR)
    page = enter(hire("ada"))
    page.wait_for_selector(".answer-card")
    page.goto(served.url)
    page.wait_for_url("**/label")
    page.wait_for_selector(".answer-card")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading", name="The labelling room")).to_be_visible()
    other = enter("no token of theirs", allowed=["401"])
    expect(other.get_by_role("alert").first).to_contain_text("no token of this room")


# --- the owner --------------------------------------------------------------------------------------------------------
def test_the_owner_runs_the_room_on_the_page(enter, served, tmp_path):
    lines = tmp_path / "items.jsonl"
    lines.write_text("\n".join(json.dumps({**WEIR, "responses": [f"{i}a", f"{i}b"]}) for i in range(3)) + "\n")
    array = tmp_path / "gold.json"
    array.write_text(json.dumps([{**WEIR, "ranking": [0, 1, 2]}]))
    page = enter(KEY)
    page.get_by_label("File", exact=True).set_input_files(lines)
    page.get_by_role("button", name="Import").click()
    expect(page.locator("#toast")).to_contain_text("3 items are new.")
    page.get_by_label("File", exact=True).set_input_files(array)
    page.get_by_label("Their rankings are known").check()
    page.get_by_role("button", name="Import").click()
    expect(page.locator("#toast")).to_contain_text("1 items are new.")
    expect(page.get_by_label("Their rankings are known")).not_to_be_checked()
    page.get_by_label("File", exact=True).set_input_files(lines)
    page.get_by_role("button", name="Import").click()
    expect(page.locator("#toast")).to_contain_text("3 were there already")
    page.get_by_label("Name of a new labeller").fill("Ada")
    page.get_by_role("button", name="Add a labeller").click()
    expect(page.get_by_label("Link", exact=True)).to_have_value(re.compile("token="))
    link = page.get_by_label("Link", exact=True).input_value()
    page.keyboard.press("Escape")
    page.get_by_label("Guidelines, in markdown").fill("Be *kind*.")
    page.get_by_label("Labellers per item").fill("2")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#toast")).to_contain_text("Saved.")
    figures = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    assert (figures["Items"], figures["Open"], figures["Test items"]) == ("3", "3", "1")
    assert ask(served, "GET", "/api/labelling")["settings"]["guidelines"] == "Be *kind*."
    with page.expect_download() as download:
        page.get_by_role("link", name="Rankings").click()
    assert download.value.path().read_text() == ""
    page.get_by_role("button", name="Label", exact=True).click()
    expect(page.get_by_role("dialog", name="Guidelines")).to_be_visible()
    page.keyboard.press("Escape")
    page.wait_for_selector(".answer-card")
    guest = enter(link.split("token=")[1], allowed=["401"])
    expect(guest.locator("#name")).to_have_text("Ada")
    expect(guest.locator("#views")).to_be_hidden()


def test_an_object_of_a_file_that_is_no_item_is_named_by_its_number(enter, served, tmp_path):
    lines = tmp_path / "items.jsonl"
    rows = [{**WEIR, "responses": [f"{i}a", f"{i}b"]} for i in range(250)]
    lines.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "x", "responses": ["one"]}])))
    page = enter(KEY, allowed=["400"])
    page.get_by_label("File", exact=True).set_input_files(lines)
    page.get_by_role("button", name="Import").click()
    expect(page.locator("#toast")).to_contain_text("Object 251.responses: 1 responses")
    lines.write_text('{"prompt": "x"\n')
    page.get_by_label("File", exact=True).set_input_files(lines)
    page.get_by_role("button", name="Import").click()
    expect(page.locator("#toast")).to_contain_text("Line 1 is no JSON.")


def test_prompts_alone_are_answered_by_the_models_that_are_ticked(enter, served, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": WEIR["prompt"]}))
    page = enter(KEY)
    page.get_by_label("left", exact=True).uncheck()
    page.get_by_label("Answers", exact=True).fill("3")
    page.get_by_label("Longest answer").fill("8")
    page.get_by_label("File", exact=True).set_input_files(file)
    page.get_by_role("button", name="Import").click()
    expect(page.locator("#toast")).to_contain_text("1 items are new.")
    page.get_by_role("button", name="Label", exact=True).click()
    while not page.locator(".answer-card").count():
        page.get_by_role("button", name="The room").click()
        page.wait_for_selector(".figures")
        page.get_by_role("button", name="Label", exact=True).click()
        page.wait_for_selector(".answer-card, #nothing:not([hidden])")
    assert page.locator(".answer-card").count() == 3
    with served.store.reading() as connection:
        (answers,) = connection.scalars(sa.select(label_items.c.answers))
    assert {answer["model"] for answer in answers} == {"right"}


# --- everybody --------------------------------------------------------------------------------------------------------
def test_no_text_of_anybody_is_run(enter, hire, served):
    ask(served, "PATCH", "/api/labelling", {"guidelines": "\n\n".join(PAYLOADS)})
    names = [payload for payload in PAYLOADS if NAME.fullmatch(payload)]
    token = [hire(name) for name in names][-1]
    texts = [f"{payload}\n{i}" for i, payload in enumerate(PAYLOADS)]
    items = [texts[i : i + 9] for i in range(0, len(texts) - 1, 9)]
    for answers in items:
        turns = [{"role": role, "content": answers[0]} for role in ("user", "assistant", "user")]
        add(served, {"prompt": turns, "responses": answers})
    page = enter(token)
    expect(page.get_by_role("dialog", name="Guidelines")).to_be_visible()
    nothing_runs(page)
    page.keyboard.press("Escape")
    for i, answers in enumerate(items):
        expect(page.locator("#progress-words")).to_contain_text(f"{i} done")
        card(page, "Answer A").get_by_role("button", name="The best").click()
        card(page, "Answer A").get_by_role("button", name="Rewrite").click()
        page.get_by_label("Answer A, rewritten").fill(answers[-1])
        page.get_by_role("button", name="Keep").click()
        nothing_runs(page)
        page.get_by_label("Note").fill(answers[0][:500])
        page.get_by_label("Flag this item").select_option("other")
        page.get_by_role("button", name="Submit").click()
    expect(page.locator("#nothing")).to_be_visible()
    nothing_runs(page)
    owner = enter(KEY)
    owner.wait_for_selector(".plain-list li b")
    assert set(names) <= set(owner.get_by_role("rowheader").all_text_contents())
    nothing_runs(owner)
    owner.get_by_role("row").filter(has_text="onload").first.get_by_role("button").first.click()
    expect(owner.locator("#token-title")).to_contain_text("onload")
    nothing_runs(owner)
    owner.keyboard.press("Escape")
    cards = [{"id": payload, "max_model_len": 64, "task": "generate"} for payload in PAYLOADS]
    owner.route("**/v1/models", lambda route: route.fulfill(json={"data": cards}))
    owner.get_by_role("button", name="The room").click()
    expect(owner.locator(".draft-model")).to_have_count(len(PAYLOADS))
    nothing_runs(owner)


def test_pictures_of_the_room(enter, hire, served, shoot):
    """What a labeller and the owner see."""
    answers = [
        "A **penstock** is the gated pipe that carries water from a reservoir to a turbine.",
        "It feeds the turbine:\n\n1. a gate opens\n2. water falls\n3. the wheel turns",
        "A kind of fish.", "A pipe to a turbine, with a gate.",
    ]  # fmt: skip
    for i in range(3):
        add(served, {"prompt": [{"role": "user", "content": f"What is a penstock? ({i})"}], "responses": answers})
    tokens = {name: hire(name) for name in ("Ada", "Bo")}
    for width, scheme in LOOKS:
        page = enter(tokens["Ada"], width=width, scheme=scheme)
        card(page, "A kind of fish.").get_by_role("button", name="The worst").click()
        card(page, "with a gate.").get_by_role("button", name="The best").click()
        card(page, "carries water").get_by_role("button", name="The best").click()
        card(page, "with a gate.").get_by_role("button", name="Equal to the one above").click()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        shoot("label", page)
        owner = enter(KEY, width=width, scheme=scheme)
        owner.wait_for_selector(".figures")
        shoot("room", owner)
