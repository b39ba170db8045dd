"""The page of every day in Chromium: search, pins, titles, answers that people rewrite, messages removed, files,
import, presets, shortcuts, the gauge; and axe-core's rules, where PENSTOCK_AXE names its axe.min.js."""

import io
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browser import (
    AXE,
    LOOKS,
    WAIT,
    answers,
    ask,
    axe_finds_nothing,
    conversation_of,
    reload,
    say,
    settled,
    speak,
)
from tests.serve.test_page import RICH

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'penstock[dev]'")
expect = playwright.expect
expect.set_options(timeout=WAIT)
MARKDOWN = """# Rivers

A *penstock* feeds a turbine:

- a gate
- a pipe

```python
print(1)
```

| river | km |
|---|---|
| Aare | 288 |
"""


def box(page: Any) -> Any:
    return page.get_by_label("Message", exact=True)


def stored(served: Any, *turns: str, **fields: Any) -> str:
    """A conversation in the store; the first turn is a person's. Returns its id."""
    conversation, parent = served.store.add_conversation(fields.get("title", ""), "")["id"], None
    for i, content in enumerate(turns):
        role = "assistant" if i % 2 else "user"
        row = served.store.add_message(conversation, parent, role, content if role == "user" else "", model="left")
        if role == "assistant":
            served.store.save_answers([{**row, "content": content, "finish_reason": "stop"}])
        parent = row["id"]
    return conversation


# --- the list ---------------------------------------------------------------------------------------------------------
def test_a_search_finds_words_in_messages_and_opens_the_branch_at_the_place(open_page, served):
    page = open_page()
    conversation = stored(served, "Of what is a weir made", "Of stone and quagga bones.")
    served.store.add_message(conversation, None, "user", "Another beginning")  # the branch that is shown by itself
    page.get_by_placeholder("Search").fill("QUAGGA stone")
    hit = page.locator(".hit")
    expect(hit).to_have_count(1)
    expect(hit.locator(".hit-text")).to_have_text("Of stone and quagga bones.")
    assert hit.locator("mark").all_inner_texts() == ["stone", "quagga"]
    hit.click()
    expect(page.locator(".prose")).to_have_text("Of stone and quagga bones.")
    assert page.url.endswith(conversation)
    focused = page.evaluate("document.activeElement.id")
    assert focused == served.store.messages(conversation)[1]["id"]
    page.get_by_placeholder("Search").fill("nobody ever wrote this")
    expect(page.locator(".nothing")).to_have_text('Nothing with "nobody ever wrote this".')


def test_a_search_goes_on_to_older_messages(open_page):
    page = open_page()
    pages = [{"data": [], "rest": 7}, {"data": [], "rest": None}]
    asked = []

    def answer(route: Any) -> None:
        asked.append(route.request.url)
        route.fulfill(json=pages[len(asked) - 1])

    page.route("**/api/search*", answer)
    page.get_by_placeholder("Search").fill("(old")
    expect(page.locator(".nothing")).to_have_text('Nothing with "(old" in the newer messages.')
    page.get_by_role("button", name="Search older messages").click()
    expect(page.locator(".nothing")).to_have_text('Nothing with "(old".')
    assert [url.split("q=")[1] for url in asked] == ["(old", "(old&rest=7"]


def test_a_pinned_conversation_stays_on_top(open_page, served):
    page = open_page()
    say(page, "The first of the day")
    old = page.url.split("#/")[1]
    page.get_by_role("button", name="New chat").click()
    say(page, "The second of the day")
    line = page.locator(".conversations li").filter(has_text="The first of the day").first
    line.hover()
    line.get_by_role("button", name="Pin The first of the day").click()
    pinned = page.locator(".conversations section").filter(has=page.get_by_role("heading", name="Pinned"))
    expect(pinned.locator("li").first).to_have_text("The first of the day")
    assert served.store.conversation(old)["pinned"]
    page.reload()
    expect(pinned.locator("li").first).to_have_text("The first of the day")
    pinned.locator("li").first.hover()
    page.get_by_role("button", name="Unpin The first of the day").click()
    expect(page.get_by_role("heading", name="Pinned")).to_have_count(0)
    assert not served.store.conversation(old)["pinned"]


def test_the_list_folds_and_stays_so(open_page):
    page = open_page()
    page.get_by_role("button", name="Fold the list").click()
    expect(page.get_by_role("navigation")).to_be_hidden()
    expect(page.get_by_role("button", name="Conversations", exact=True)).to_be_focused()
    page.reload()
    page.wait_for_selector(".welcome")
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.keyboard.press("Control+Shift+S")
    expect(page.get_by_role("navigation")).to_be_visible()


def test_the_model_names_a_conversation_unless_somebody_did(open_page, served):
    page = open_page(titles=True)

    def answer(route: Any) -> None:
        conversation = route.request.url.split("/")[-2]
        assert route.request.post_data_json == {"model": "left"}
        route.fulfill(json={**served.store.conversation(conversation), "title": "Pipes of rivers"})

    page.route("**/title", answer)
    say(page, "What is all this about?")
    expect(page.locator(".conversations li.current")).to_have_text("Pipes of rivers")
    expect(page).to_have_title("Pipes of rivers - penstock")
    say(page, "And a second question")  # names nothing again
    expect(page.locator(".conversations li.current")).to_have_text("Pipes of rivers")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Let the model name a conversation").uncheck()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="New chat").click()
    say(page, "Not to be named")
    expect(page.locator(".conversations li.current")).to_have_text("Not to be named")


# --- messages ---------------------------------------------------------------------------------------------------------
def test_an_answer_is_rewritten_beside_the_first_and_is_better(open_page, served, pictures):
    page = open_page()
    say(page, "What is a sluice?")
    [first] = answers(page)
    page.get_by_role("button", name="Edit this answer").click()
    editor = page.get_by_label("Edit the answer")
    expect(editor).to_be_focused()
    editor.fill("A gate in a channel.")
    page.screenshot(path=pictures / "rewrite.png")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".prose")).to_have_text("A gate in a channel.")
    expect(page.locator(".when").last).to_contain_text("rewritten")
    expect(page.locator(".switcher span")).to_have_text("2/2")
    question, answer, ours = conversation_of(page, served)
    assert ours["edited_from"] == answer["id"]
    [vote] = ask(page, f"api/votes?conversation_id={question['conversation_id']}")["data"]
    assert (vote["shown"], vote["chosen_id"]) == ([answer["id"], ours["id"]], ours["id"])
    reload(page, "What is a sluice?")
    expect(page.locator(".prose")).to_have_text("A gate in a channel.")  # a branch, and no pair side by side
    page.get_by_role("button", name="Previous branch").click()
    assert answers(page) == [first]
    page.get_by_role("button", name="Edit this answer").click()
    page.keyboard.press("Escape")
    assert answers(page) == [first]


def test_a_message_is_deleted_with_what_follows_after_a_question(open_page, served):
    page = open_page()
    say(page, "First question")
    say(page, "Second question")
    turn = page.locator(".turn.user").last
    turn.hover()
    turn.get_by_role("button", name="Delete this message").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("It and the message that follows it will be gone for good")
    dialog.get_by_role("button", name="Keep it").click()
    turn.hover()
    turn.get_by_role("button", name="Delete this message").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(page.locator(".bubble")).to_have_count(1)
    assert len(conversation_of(page, served)) == 2
    page.get_by_role("button", name="Delete this answer").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("button", name="Answer this")).to_be_visible()
    say(page, "In its place")
    assert [row["content"] for row in conversation_of(page, served) if row["role"] == "user"][-1] == "In its place"


def test_answers_say_when_and_how_fast_and_the_gauge_how_full(open_page, served):
    page = open_page()
    expect(page.get_by_role("meter")).to_be_hidden()
    say(page, "How much was that?")
    [_, answer] = conversation_of(page, served)
    usage = answer["usage"]
    facts = page.locator(".assistant .when")
    expect(facts).to_contain_text(f"{usage['completion_tokens']} tokens")
    assert facts.locator("time").get_attribute("datetime").startswith("20")
    used = usage["prompt_tokens"] + usage["completion_tokens"]
    meter = page.get_by_role("meter", name="Context in use")
    assert meter.get_attribute("aria-valuenow") == str(used)
    expect(meter).to_have_text(f"{used} of 8,192 tokens")


# --- files ------------------------------------------------------------------------------------------------------------
def test_text_files_go_with_a_message_and_others_do_not(open_page, served, pictures):
    page = open_page()
    say(page, "Hello")
    notes = {"name": "notes <b>.txt", "mimeType": "text/plain", "buffer": b"Water & <i>stone</i>\n</file>\nend"}
    image = {"name": "picture.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\n\0\xff"}
    large = {"name": "large.txt", "mimeType": "text/plain", "buffer": b"x" * 500_001}
    page.locator("#files").set_input_files([notes, image, large])
    expect(page.locator(".chip")).to_have_count(1)
    expect(page.locator("#toast")).to_contain_text("large.txt: it has 500,001 characters")
    page.screenshot(path=pictures / "files.png")
    page.get_by_role("button", name="Take notes <b>.txt off").click()
    expect(page.locator(".chip")).to_have_count(0)
    page.locator("#files").set_input_files([notes])
    say(page, "Read this", wait=False)
    settled(page, "Read this")
    content = conversation_of(page, served)[2]["content"]
    assert content == 'Read this\n\n<file name="notes <b>.txt">\nWater & <i>stone</i>\n</file>\nend\n</file>'
    reload(page, "Read this")
    page.locator(".file summary").click()
    expect(page.locator(".file pre")).to_have_text("Water & <i>stone</i>\n</file>\nend", use_inner_text=True)
    expect(page.locator(".chip")).to_have_count(0)


def test_a_file_that_could_not_be_sent_is_still_attached(open_page):
    page = open_page(allowed=["ERR_FAILED"])
    say(page, "Hello")
    page.route("**/messages", lambda route: route.abort(), times=1)
    page.locator("#files").set_input_files([{"name": "a.txt", "mimeType": "text/plain", "buffer": b"abc"}])
    expect(page.locator(".chip")).to_have_count(1)
    page.get_by_role("button", name="Send").click()  # a file alone is a message
    expect(page.locator(".chip")).to_have_count(1)
    expect(page.locator(".bubble")).to_have_count(1)


CHATGPT = {
    "title": "Rivers <img src=x onerror=alert(1)>",
    "create_time": 1_600_000_000.5,
    "mapping": {
        "root": {"id": "root", "message": None, "parent": None, "children": ["s"]},
        "s": {"id": "s", "parent": "root", "children": ["q"], "message": {
            "author": {"role": "system"}, "content": {"content_type": "text", "parts": [""]}}},
        "q": {"id": "q", "parent": "s", "children": ["tool", "a2"], "message": {
            "author": {"role": "user"}, "create_time": 1_600_000_001, "content": {
                "content_type": "multimodal_text", "parts": [{"asset_pointer": "x"}, "What is a delta?"]}}},
        "tool": {"id": "tool", "parent": "q", "children": ["a1"], "message": {
            "author": {"role": "assistant"}, "recipient": "python",
            "content": {"content_type": "code", "text": "print(1)"}}},
        "a1": {"id": "a1", "parent": "tool", "children": ["a1b"], "message": {
            "author": {"role": "assistant"}, "metadata": {"model_slug": "gpt-4o"}, "create_time": 1_600_000_002,
            "content": {"content_type": "text", "parts": ["Land at a mouth."]}}},
        "a1b": {"id": "a1b", "parent": "a1", "children": ["q"], "message": {
            "author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["Of a river."]}}},
        "a2": {"id": "a2", "parent": "q", "children": ["t"], "message": {
            "author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["Sediment."]}}},
        "t": {"id": "t", "parent": "a2", "children": [], "message": {
            "author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Thanks"]}}},
    },
}  # fmt: skip
SHAREGPT = {"id": "x", "conversations": [
    {"from": "system", "value": "Be brief."}, {"from": "human", "value": "What is silt?"},
    {"from": "gpt", "value": "Fine earth."},
]}  # fmt: skip


def zipped(**files: bytes | str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_json", ".json"), content)
    return packed.getvalue()


def bring(page: Any, name: str, content: bytes) -> str:
    """Imports a file. Returns what the page says when it has ended."""
    if not page.get_by_role("dialog").count():
        page.get_by_role("button", name="Import").click()
    page.evaluate("document.querySelector('#import-result').replaceChildren()")
    page.get_by_label("Files to import").set_input_files({"name": name, "mimeType": "", "buffer": content})
    expect(page.locator("#import-result")).to_contain_text(re.compile(r"imported"))
    return page.locator("#import-result").inner_text()


def test_conversations_of_other_programs_are_imported_with_branches_and_times(open_page, served, pictures):
    page = open_page()
    archive = zipped(user_json="{}", conversations_json=json.dumps([CHATGPT]), images__a="no json")
    assert bring(page, "export.zip", archive) == "1 imported."
    page.screenshot(path=pictures / "import.png")
    assert bring(page, "export.zip", archive) == "0 imported, 1 were here already."
    both = json.dumps([SHAREGPT, {"conversations": [{"from": "gpt", "value": "Nobody asked"}]}, 5]).encode()
    assert bring(page, "sharegpt.json", both).startswith("1 imported, 1 left out.")
    rows, _ = served.store.list_conversations(200, None)
    [silt] = [row for row in rows if row["title"] == "What is silt?"]
    assert silt["system"] == "Be brief."
    [rivers] = [row for row in rows if row["title"] == CHATGPT["title"]]
    assert (rivers["created_at"], rivers["named"]) == (1_600_000_000.5, True)
    tree = served.store.messages(rivers["id"])
    question = tree[0]["id"]
    told = [(row["role"], row["content"], row["parent_id"] == question, row["model"]) for row in tree]
    assert told == [
        ("user", "What is a delta?", False, None), ("assistant", "Land at a mouth.\n\nOf a river.", True, None),
        ("assistant", "Sediment.", True, None), ("user", "Thanks", False, None),
    ]  # fmt: skip
    assert tree[0]["created_at"] == 1_600_000_001
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    page.goto(f"{served.url}/#/{rivers['id']}")
    expect(page.locator(".bubble")).to_have_text(["What is a delta?", "Thanks"])


def test_our_own_export_comes_back_with_its_branches(open_page, served):
    page = open_page()
    speak(page, served, "Fish.", "Frogs and fish.")
    say(page, "What does the heron eat?")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".switcher span")).to_have_text("2/2")
    settled(page)
    page.get_by_role("button", name="Bad answer").click()
    expect(page.get_by_role("button", name="Bad answer")).to_have_attribute("aria-pressed", "true")
    conversation = page.url.split("#/")[1]
    lines = page.evaluate("id => fetch(`api/conversations/${id}/export`).then((answer) => answer.text())", conversation)
    served.store.remove_conversation(conversation)
    assert bring(page, "conversation.jsonl", lines.encode()) == "1 imported."
    rows, _ = served.store.list_conversations(200, None)
    [back] = [row for row in rows if row["title"] == "What does the heron eat?"]
    again = [{"messages": turns} for turns in served.store.leaves(back["id"])]
    assert again == [json.loads(line) for line in lines.splitlines()]


def bomb() -> bytes:
    """300 MiB of blanks in a zip of 300 kB."""
    return zipped(conversations_json=b" " * (300 * 2**20))


def liar() -> bytes:
    """A zip whose entry says that it is smaller than it is, and one that points beyond its end."""
    content = bytearray(zipped(conversations_json=json.dumps([SHAREGPT])))
    place = content.find(b"PK\x01\x02")
    content[place + 20 : place + 24] = (2**31).to_bytes(4, "little")
    content[place + 42 : place + 46] = (2**31).to_bytes(4, "little")
    return bytes(content)


def dumped(data: Any) -> bytes:
    return json.dumps(data).encode()


CIRCLE = {"a": {"parent": "b", "children": ["b"]}, "b": {"parent": "a", "children": ["a"]}}
PROTOTYPE = b'[{"__proto__": {"messages": 1}, "mapping": {"__proto__": {"children": ["__proto__"]}}}]'
NO_EXPORTS = {  # name -> content, and what the page says
    "bomb.zip": (bomb, "holds more than 256 MB"),
    "liar.zip": (liar, "cannot read"),
    "cut.zip": (lambda: zipped(conversations_json="[]" * 999)[:-30], "no zip file"),
    "torn.zip": (lambda: torn(zipped(conversations_json=json.dumps([SHAREGPT] * 50))), "damaged"),
    "other.zip": (lambda: zipped(readme="x"), "no .json or .jsonl file in it"),
    "cut.json": (lambda: dumped([SHAREGPT])[:-5], "no JSON, or a damaged or cut one"),
    "deep.json": (lambda: b"[" * 2_000_000, "no JSON"),
    "deeper.json": (lambda: b"[" * 100_000 + b"]" * 100_000, "no conversation in it"),
    "binary.json": (lambda: zlib.compress(b"x" * 99), "no text in UTF-8"),
    "else.json": (lambda: b'{"settings": 1}', "no conversation in it"),
    "prototype.json": (lambda: PROTOTYPE, "0 imported"),
    "circle.json": (lambda: dumped([{"mapping": CIRCLE}]), "no question in it"),
    "types.json": (
        lambda: dumped([{"messages": [None, 5, {"role": {}, "content": {}}]}, {"mapping": 3}]),
        "0 imported",
    ),
    "long.json": (lambda: dumped({"messages": [{"role": "user", "content": "x" * 500_001}]}), "0 imported, 1 left out"),
}


def torn(content: bytes) -> bytes:
    """A zip whose packed bytes were overwritten."""
    return content[:60] + b"\xff" * 40 + content[100:]


@pytest.mark.parametrize("name", NO_EXPORTS)
def test_a_file_that_is_no_export_is_refused_in_words(open_page, served, name):
    content, says = NO_EXPORTS[name]
    page = open_page(allowed=["400", "413"])
    before = len(served.store.list_conversations(200, None)[0])
    assert says in bring(page, name, content())
    assert len(served.store.list_conversations(200, None)[0]) == before
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    say(page, "The page is well")


def test_the_branch_on_the_screen_is_exported_as_markdown(open_page, served, tmp_path):
    page = open_page()
    speak(page, served, "First *answer*.", "Second answer.")
    say(page, "What is a lock?")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".switcher span")).to_have_text("2/2")
    settled(page)
    page.get_by_role("button", name="Previous branch").click()
    page.get_by_role("button", name="Settings").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Export what is shown as markdown").click()
    assert download.value.suggested_filename == "What is a lock_.md"
    text = Path(download.value.path()).read_text()
    assert "First *answer*." in text
    assert "Second answer." not in text


# --- settings and keys ------------------------------------------------------------------------------------------------
def test_new_conversations_begin_with_the_usual_system_prompt_and_presets_bring_theirs(open_page, served):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Speak like a miller.")
    page.get_by_role("button", name="Begin new conversations with this").click()
    page.get_by_label("Temperature", exact=True).fill("0.3")
    page.get_by_label("Name of the preset").fill("Miller")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Miller", exact=True)).to_be_visible()
    page.get_by_label("Temperature", exact=True).fill("1.5")
    page.get_by_label("System prompt").fill("")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="New chat").click()
    say(page, "Good morning")
    assert served.store.conversation(page.url.split("#/")[1])["system"] == "Speak like a miller."
    assert conversation_of(page, served)[1]["sampling"]["temperature"] == 1.5
    page.reload()
    settled(page, "Good morning")
    page.locator("#model").select_option("right")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Miller", exact=True).click()
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.3")
    page.keyboard.press("Escape")
    expect(page.locator("#model")).to_have_value("left")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Delete the preset Miller").click()
    expect(page.get_by_role("button", name="Miller", exact=True)).to_have_count(0)


def test_shortcuts_do_what_their_sheet_says(open_page):
    page = open_page()
    say(page, "A question to change")
    page.keyboard.press("Control+k")
    expect(page.get_by_placeholder("Search")).to_be_focused()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".welcome")).to_be_visible()
    page.go_back()
    settled(page, "A question to change")
    box(page).focus()
    page.keyboard.press("?")
    expect(box(page)).to_have_value("?")  # a letter, where somebody writes
    box(page).fill("")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_be_focused()
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    sheet = page.get_by_role("dialog", name="Keyboard")
    expect(sheet).to_be_visible()
    expect(sheet.locator("dt")).to_have_count(9)
    page.keyboard.press("Control+Shift+O")  # nothing, below a dialog
    page.keyboard.press("Escape")
    expect(sheet).to_be_hidden()
    expect(page.locator(".bubble")).to_have_text("A question to change")


def test_errors_are_said_in_a_persons_words(open_page):
    full = "the prompt has 9000 tokens and left has a context of 8192, answer included; shorten it"
    cases = {
        ("queue_full", "left has 9 answers running"): "Many answers are being written right now.",
        (
            "context_length_exceeded",
            full,
        ): "This conversation has grown to 9,000 tokens, and the model reads 8,192 with",
        (
            "model_not_found",
            "there is no model 'x' here",
        ): "This model is no longer served. Pick another one at the top.",
        ("not_found", "there is no message msg_0 here."): "This message no longer exists.",
        ("invalid_value", "something else."): "Something else.",
    }
    page = open_page(log_in=False)
    words = "([code, message]) => import('./assets/words.js').then(({ inWords }) => inWords({ code, message }))"
    for error, sentence in cases.items():
        assert page.evaluate(words, list(error)).startswith(sentence)


# --- axe-core ---------------------------------------------------------------------------------------------------------
SCREENS = {
    "welcome": lambda page: None,
    "chat": lambda page: None,
    "settings": lambda page: page.get_by_role("button", name="Settings").click(),
    "shortcuts": lambda page: page.evaluate("document.querySelector('#shortcuts').showModal()"),
    "import": lambda page: page.evaluate("document.querySelector('#import').showModal()"),
    "search": lambda page: page.evaluate(
        "(box => { box.value = 'penstock'; box.oninput(); })(document.querySelector('#search'))"
    ),
}


@pytest.mark.skipif(not AXE, reason="PENSTOCK_AXE names no axe.min.js: npm install axe-core makes one in node_modules")
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_core_finds_nothing(open_page, served, width):
    page = open_page(width=width)
    for name, show in SCREENS.items():
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            if name == "chat" and scheme == "light":
                speak(page, served, MARKDOWN, MARKDOWN)
                say(page, "What is a penstock?")
                page.get_by_role("button", name="Answer again").click()
                expect(page.locator(".switcher span")).to_have_text("2/2")
                settled(page)
            if scheme == "light":
                show(page)
            page.wait_for_timeout(0)
            axe_finds_nothing(page, f"{name}, {scheme}")
        page.keyboard.press("Escape")


def test_pictures_of_the_page(open_page, served, shoot):
    """An example conversation, since a random model has nothing to say."""
    for title in ("Notes on reward models", "Sorting a list in Python", "A haiku about the river"):
        served.store.add_conversation(title, "")
    page = open_page()
    speak(page, served, RICH.split("\n\nSee")[0])
    say(page, "How does a penstock work?")
    conversation = page.url.split("#/")[1]
    presets = [{"name": name, "model": "left", "system": "", "sampling": {}} for name in ("Brief", "A miller of 1890")]
    for width, scheme in LOOKS:
        page = open_page(width=width, scheme=scheme, presets=presets, system="Answer in a few words.")
        page.goto(f"{served.url}/#/{conversation}")
        settled(page)
        page.evaluate("document.querySelector('#scroll').scrollTop = 0")
        shoot("chat", page)
        if width < 600:
            page.get_by_role("button", name="Conversations", exact=True).click()
        page.get_by_placeholder("Search").fill("turbine water")
        expect(page.locator(".hit").first).to_be_visible()
        shoot("search", page)
        page.get_by_placeholder("Search").fill("")
        if width < 600:
            page.get_by_role("button", name="Close the list").click()
        page.get_by_role("button", name="Settings").click()
        shoot("settings", page)
        page.keyboard.press("Escape")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("?")
        shoot("shortcuts", page)
