"""Texts of people on the page: from input methods and phones, of all lengths and directions, kept and printed."""

from typing import Any

import pytest

from tests.serve.browser import WAIT, answers, conversation_of, grows, reload, say, settled, speak
from tests.serve.conftest import eventually

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'penstock[dev]'")
pytest.importorskip("fastapi", reason="needs the server: pip install 'penstock[serve]'")
expect = playwright.expect
expect.set_options(timeout=WAIT)

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
KEYS = [{"isComposing": True}, {"keyCode": 229}]
"""How browsers mark the keys of an input method; Safari only by the code, at the confirmation."""


def press(locator: Any, key: str, **marks: Any) -> None:
    """A key as an input method sends it."""
    options = {"key": key, "bubbles": True, "cancelable": True, **marks}
    locator.evaluate("(element, options) => element.dispatchEvent(new KeyboardEvent('keydown', options))", options)


def prompt_of(page: Any) -> Any:
    return page.get_by_label("Message", exact=True)


# --- what is sent -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("letter", ["\U0001f600", FAMILY, "e\u0301"], ids=["emoji", "family", "accent"])
def test_a_title_ends_between_letters(open_page, served, letter):
    page = open_page()
    message = "a" * 59 + letter + "b" * 9
    say(page, message)
    assert page.title() == f"{'a' * 59}{letter} - penstock"
    conversation = served.store.add_conversation("", "")["id"]
    served.store.add_message(conversation, None, "user", message)
    title = served.store.conversation(conversation)["title"]
    assert title == "a" * 59 + (letter if len(letter) == 1 else "")


def test_zero_bytes_and_halves_of_characters_can_be_sent(open_page, served):
    page = open_page()
    prompt_of(page).evaluate("box => { box.value = 'a\\ud83d b\\0 c'; box.dispatchEvent(new Event('input')); }")
    prompt_of(page).press("Enter")
    settled(page)
    assert conversation_of(page, served)[0]["content"] == "a\ufffd b c"


@pytest.mark.parametrize("marks", KEYS, ids=["composing", "229"])
def test_keys_of_an_input_method_neither_send_nor_rename_nor_stop(open_page, marks):
    page = open_page()
    prompt_of(page).fill("nihao")
    press(prompt_of(page), "Enter", **marks)
    assert page.locator(".bubble").count() == 0
    prompt_of(page).press("Enter")
    settled(page, "nihao")
    page.get_by_role("button", name="Edit this message").click()
    box = page.get_by_label("Edit the message")
    box.fill("changed")
    press(box, "Enter", **marks)
    press(box, "Escape", **marks)
    expect(box).to_have_value("changed")
    page.get_by_role("button", name="Cancel").click()
    line = page.locator(".conversations li.current")
    line.hover()
    line.get_by_role("button", name="Rename nihao").click()
    name = page.get_by_label("New title")
    name.fill("renamed")
    press(name, "Enter", **marks)
    press(name, "Escape", **marks)
    expect(name).to_have_value("renamed")
    name.press("Enter")
    expect(line).to_have_text("renamed")


@pytest.mark.parametrize("marks", KEYS, ids=["composing", "229"])
def test_escape_of_an_input_method_does_not_stop_an_answer(open_page, served, marks):
    page = open_page(sampling={"temperature": 0})
    with served.gate.held(after=20) as gate:
        say(page, "Tell me all", wait=False)
        length = grows(page)
        press(prompt_of(page), "Escape", **marks)
        gate.let(20)
        grows(page, beyond=length)
        expect(page.locator("#send")).to_have_class("send busy")
        page.keyboard.press("Escape")
        settled(page)
    expect(page.locator(".note")).to_contain_text("Stopped.")


def test_return_on_a_phone_makes_a_line(open_page):
    page = open_page(width=390)
    prompt_of(page).fill("One")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    assert prompt_of(page).input_value() == "One\ntwo"
    page.get_by_role("button", name="Send").tap()
    settled(page, "One")
    prompt_of(page).fill("with a keyboard")
    page.keyboard.press("Control+Enter")
    settled(page, "with a keyboard")


# --- what is kept -----------------------------------------------------------------------------------------------------
def test_each_conversation_keeps_what_was_not_sent(open_page):
    page = open_page()
    say(page, "First")
    first = page.url
    prompt_of(page).fill("half a question")
    page.get_by_role("button", name="New chat").click()
    expect(prompt_of(page)).to_have_value("")
    prompt_of(page).fill("another")
    page.goto(first)
    expect(prompt_of(page)).to_have_value("half a question")
    reload(page)
    expect(prompt_of(page)).to_have_value("half a question")
    page.get_by_role("button", name="New chat").click()
    expect(prompt_of(page)).to_have_value("another")
    say(page, "another")
    page.get_by_role("button", name="New chat").click()
    expect(prompt_of(page)).to_have_value("")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_placeholder("Key")).to_be_visible()
    assert "half a question" not in page.evaluate("JSON.stringify({...localStorage})")


def test_what_could_not_be_sent_goes_back_to_its_own_conversation(open_page):
    page = open_page(allowed=["500"])
    say(page, "First")
    first = page.url
    error = {"error": {"message": "no room", "type": "t", "param": None, "code": "c"}}
    held: list[Any] = []
    page.route("**/messages", lambda route: held.append(route), times=1)
    say(page, "lost?", wait=False)
    assert eventually(lambda: page.evaluate("true") and held)
    page.get_by_role("button", name="New chat").click()
    held[0].fulfill(status=500, json=error)
    expect(page.locator("#toast")).to_contain_text("No room")
    expect(prompt_of(page)).to_have_value("")
    page.goto(first)
    expect(prompt_of(page)).to_have_value("lost?")


@pytest.mark.parametrize("first", [True, False])
def test_a_message_that_was_on_its_way_when_the_page_was_reloaded_is_there_once(open_page, served, first):
    page = open_page()
    if not first:
        say(page, "Hello")
    held: list[Any] = []
    page.route("**/messages", lambda route: held.append(route), times=1)
    say(page, "on its way", wait=False)
    assert eventually(lambda: page.evaluate("true") and held)
    sent, conversation = held[0].request.post_data_json, page.url.split("#/")[1]
    page.reload()
    expect(prompt_of(page)).to_have_value("on its way")
    served.store.add_message(conversation, sent["parent_id"], "user", sent["content"], message_id=sent["id"])
    page.keyboard.press("Enter")
    settled(page, "on its way")
    texts = [message["content"] for message in conversation_of(page, served) if message["role"] == "user"]
    assert texts.count("on its way") == 1
    page.reload()
    settled(page, "on its way")
    expect(prompt_of(page)).to_have_value("")


def test_a_new_name_is_kept_while_the_list_changes(open_page, served):
    page = open_page()
    with served.gate.held():
        say(page, "Slow", wait=False)
        line = page.locator(".conversations li.current")
        line.hover()
        line.get_by_role("button", name="Rename Slow").click()
        page.get_by_label("New title").fill("a new na")
    settled(page)  # its end loads the list
    page.evaluate("import('/assets/sidebar.js').then((sidebar) => sidebar.loadList())")  # as another tab's would
    expect(page.get_by_label("New title")).to_have_value("a new na")
    page.keyboard.press("Enter")
    expect(line).to_have_text("a new na")


def test_three_hundred_messages_are_a_conversation(open_page, served):
    conversation, parent = served.store.add_conversation("long", "")["id"], None
    for i in range(150):
        question = served.store.add_message(conversation, parent, "user", f"q{i}")["id"]
        parent = served.store.add_message(conversation, question, "assistant", "", model="left", sampling={})["id"]
        served.store.save_answers([{"id": parent, "content": f"a{i}", "finish_reason": "stop"}])
    page = open_page()
    page.goto(f"{served.url}/#/{conversation}")
    settled(page)
    say(page, "And now?")
    expect(page.locator(".note.failed")).to_have_count(0)
    assert len(answers(page)) == 151
    assert answers(page)[-1]


# --- what is seen -----------------------------------------------------------------------------------------------------
def test_a_long_message_is_folded_and_sent_whole(open_page, served):
    page = open_page(allowed=["400"])
    pasted = "\n".join(f"line {i} of a long text" for i in range(4200))[:100_000]
    prompt_of(page).evaluate(
        """(box, text) => {
          const clipboardData = new DataTransfer();
          clipboardData.setData("text/plain", text);
          box.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
        }""",
        pasted,
    )
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".bubble")).to_be_visible()
    height = "document.querySelector('.bubble').getBoundingClientRect().height"
    assert page.evaluate(height) < 400
    page.get_by_role("button", name="Show all 100,000 characters").click()
    assert page.evaluate(height) > 50_000
    page.get_by_role("button", name="Show less").click()
    assert page.evaluate(height) < 400
    assert eventually(lambda: page.evaluate("location.hash") != "")
    assert conversation_of(page, served)[0]["content"] == pasted


def test_a_quote_that_is_too_deep_leaves_the_other_messages(open_page, served):
    page = open_page()
    speak(page, served, ">" * 20_000 + " deep", "The **second**.")
    say(page, "One")
    say(page, "Two")
    assert page.locator(".bubble").all_inner_texts() == ["One", "Two"]
    assert answers(page)[0].endswith("> deep")
    expect(page.locator(".prose strong")).to_have_text("second")
    reload(page, "Two")
    assert len(answers(page)) == 2


def test_a_selection_survives_an_answer_and_its_end(open_page, served):
    page = open_page(sampling={"temperature": 0, "max_tokens": 100})
    with served.gate.held(after=20):
        say(page, "Tell me all", wait=False)
        grows(page, beyond=19)
        page.evaluate(
            """() => {
              const text = document.querySelector(".prose p").firstChild;
              getSelection().setBaseAndExtent(text, 2, text, 12);
              window.selected = getSelection().toString();
            }"""
        )
    settled(page)
    assert page.evaluate("selected.length === 10 && getSelection().toString() === selected")


def test_scrolling_up_a_little_stays_up_until_the_end_is_reached(open_page, served):
    conversation, parent = served.store.add_conversation("tall", "")["id"], None
    for i in range(15):
        question = served.store.add_message(conversation, parent, "user", f"q{i}")["id"]
        parent = served.store.add_message(conversation, question, "assistant", "", model="left", sampling={})["id"]
        served.store.save_answers([{"id": parent, "content": f"a{i}", "finish_reason": "stop"}])
    page = open_page(sampling={"temperature": 0})
    page.goto(f"{served.url}/#/{conversation}")
    settled(page)
    with served.gate.held(after=100) as gate:
        say(page, "Tell me all", wait=False)
        length = grows(page, beyond=99)  # a letter or more for each token
        rest = "(({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight)"
        rest += "(document.querySelector('#scroll'))"
        assert eventually(lambda: page.evaluate(rest) < 8)
        page.locator("#scroll").hover()
        page.mouse.wheel(0, -40)
        assert eventually(lambda: page.evaluate(rest) > 30)
        top, before = page.evaluate("document.querySelector('#scroll').scrollTop"), page.evaluate(rest)
        gate.let(600)
        grows(page, beyond=length + 599)
        assert page.evaluate(rest) > before + 60  # it grew below
        assert abs(page.evaluate("document.querySelector('#scroll').scrollTop") - top) < 40
        page.get_by_role("button", name="Go to the latest message").click()
        assert eventually(lambda: page.evaluate(rest) < 8)
        page.keyboard.press("Escape")
        settled(page)


def test_each_text_has_its_own_direction(open_page):
    page = open_page()
    hebrew = "\u05e9\u05dc\u05d5\u05dd?"
    prompt_of(page).fill(hebrew)
    direction = "element => getComputedStyle(element).direction"
    assert prompt_of(page).evaluate(direction) == "rtl"
    page.keyboard.press("Enter")
    settled(page, hebrew)
    assert page.locator(".bubble").evaluate(direction) == "rtl"
    assert page.locator(".prose > *").first.evaluate(direction) == "ltr"
    assert page.locator(".conversations li.current a").evaluate(direction) == "rtl"
    page.get_by_role("button", name="Edit this message").click()
    assert page.get_by_label("Edit the message").evaluate(direction) == "rtl"


def test_everything_is_printed(open_page, served):
    page = open_page()
    speak(page, served, "<think>" + "why\n\n" * 40 + "</think>" + "because\n\n" * 60)
    say(page, "line\n" * 200)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    shown = page.evaluate(
        """() => {
          const high = (selector) => document.querySelector(selector).getBoundingClientRect().height;
          return { page: document.documentElement.scrollHeight, bubble: high(".bubble"), thoughts: high(".thinking"),
                   prose: high(".prose"), composer: high(".composer"), list: high(".sidebar") };
        }"""
    )
    assert shown["bubble"] > 200 * 16
    assert shown["thoughts"] > 40 * 16
    assert shown["page"] > shown["bubble"] + shown["prose"]
    assert shown["composer"] == shown["list"] == 0
    page.emulate_media(media="null")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.evaluate("document.querySelector('.thinking').open")
    assert page.pdf().count(b"/Type /Page\n") >= 4
