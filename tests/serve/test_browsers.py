"""The page in Debian's Chromium, Firefox and WebKit: what browsers do differently, and what was once wrong in each.

tests/serve/test_page*.py go through all of the page, in Chromium alone.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.browser import KEY, ServedPage
from tests.serve.conftest import eventually
from tests.serve.page_payloads import NOTHING_RUNS, PAYLOADS
from tests.serve.webdriver import NEEDS, Browser, started

pytest.importorskip("fastapi", reason="needs the server: pip install 'penstock[serve]'")

STARTED = "document.querySelector('.welcome')?.offsetParent"
LAST = "document.querySelector('#thread .turn:last-child:is(.assistant, .pair) .actions')"
ENDED = f"{LAST} && !document.querySelector('#send.busy')"
LENGTH = "([...document.querySelectorAll('.prose')].at(-1)?.textContent.length ?? 0)"
WATCH = """
  window.forbidden = [];
  document.addEventListener("securitypolicyviolation", (event) => forbidden.push(event.violatedDirective));
"""
"""Notes what the page's policy forbids. From now on: what is there at the start is the same in all browsers."""
IME = [{"isComposing": True}, {"keyCode": 229}]
"""How browsers mark the keys of an input method; WebKit only by the code, at the confirmation."""


@pytest.fixture(scope="module", params=NEEDS)
def any_browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(request.param, tmp_path_factory.mktemp(request.param)) as browser:
        yield browser


@pytest.fixture
def page(any_browser: Browser, served: ServedPage) -> Iterator[Browser]:
    """The page, logged in, in a browser that remembers nothing of another test. It must keep its own policy."""
    any_browser.goto(f"{served.url}/assets/style.css")
    known = json.dumps({"sampling": {"max_tokens": 12, "temperature": 0}})
    any_browser.run("localStorage.clear(); localStorage['penstock.settings'] = values[0]", known)
    any_browser.goto(f"{served.url}/#key={KEY}")
    any_browser.until(STARTED)
    any_browser.run(WATCH)
    yield any_browser
    assert any_browser.value("forbidden") == []


def say(page: Browser, text: str) -> None:
    page.click("#prompt")
    page.type(text)
    page.press("Enter")
    shown(page, text)


def shown(page: Browser, text: str) -> None:
    page.until("[...document.querySelectorAll('.bubble')].at(-1)?.textContent.includes(values[0])", text)


def grows(page: Browser, beyond: int = 0) -> int:
    page.until(f"{LENGTH} > values[0]", beyond)
    return page.value(LENGTH)


def stored(page: Browser, served: ServedPage) -> list[dict[str, Any]]:
    return served.store.messages(page.value("location.hash.slice(2)"))


def opened(page: Browser, served: ServedPage, *turns: tuple[str, str]) -> None:
    """Opens a conversation of these questions and answers."""
    conversation, parent = served.store.add_conversation("stored", "")["id"], None
    for question, answer in turns:
        asked = served.store.add_message(conversation, parent, "user", question)["id"]
        parent = served.store.add_message(conversation, asked, "assistant", "", model="left", sampling={})["id"]
        served.store.save_answers([{"id": parent, "content": answer, "finish_reason": "stop"}])
    page.goto(f"{served.url}/#/{conversation}")
    page.until(ENDED)


def sampled(page: Browser, **sampling: float) -> None:
    """The next answers are sampled so; without max_tokens they go on until they are stopped."""
    page.run("localStorage['penstock.settings'] = values[0]", json.dumps({"sampling": sampling}))
    page.reload()
    page.until(STARTED)
    page.run(WATCH)


# --- answers that live on the server ----------------------------------------------------------------------------------
def test_an_answer_goes_on_through_a_reload_and_is_stopped(page, served):
    sampled(page, temperature=0)
    with served.gate.held(after=20) as gate:
        say(page, "Tell me more")
        length = grows(page, 19)
        page.reload()
        page.run(WATCH)
        grows(page, length - 1)
        gate.let(200)
        grows(page, 200)  # a letter or more for each token
        page.click("#send")
        page.until(ENDED)
    page.until("document.querySelector('.note').textContent.includes('Stopped.')")
    [_, answer] = stored(page, served)
    assert answer["finish_reason"] == "cancelled"
    assert page.value("document.querySelector('.prose').textContent").split() == answer["content"].split()


def test_an_edited_message_stops_its_answer_and_gets_another(page, served):
    sampled(page, temperature=0)
    with served.gate.held(after=20) as gate:
        say(page, "Tell me all")
        grows(page)
        page.click("[aria-label='Edit this message']")
        page.until("document.activeElement.matches('[aria-label=\"Edit the message\"]')")
        page.type(" of it")
        page.press("Enter")
        shown(page, "Tell me all of it")
        assert eventually(lambda: stored(page, served)[1]["finish_reason"] == "cancelled")
        gate.let(20)
        grows(page)
        page.press("Escape")
        page.until(ENDED)
    assert [message["finish_reason"] for message in stored(page, served)] == [None, "cancelled", None, "cancelled"]


def test_an_answer_cut_by_its_length_goes_on_in_place(page, served):
    sampled(page, max_tokens=3)
    say(page, "Count")
    page.until(f"{ENDED} && document.querySelector('.note').textContent.includes('Stopped at the length limit.')")
    before = page.value("document.querySelector('.prose').textContent")
    page.click(".note button")
    page.until(f"{ENDED} && {LENGTH} > values[0]", len(before))
    [question, answer] = stored(page, served)
    assert question["content"] == "Count"
    assert answer["content"].split() == page.value("document.querySelector('.prose').textContent").split()
    assert answer["content"].strip().startswith(before.strip())
    assert len(answer["sampling"]["continued"]) == 1


def test_the_branch_that_was_picked_is_shown_again(page, served):
    opened(page, served, ("Hello", "the first"))
    conversation, (question, _) = page.value("location.hash.slice(2)"), stored(page, served)
    second = served.store.add_message(conversation, question["id"], "assistant", "", model="left", sampling={})["id"]
    served.store.save_answers([{"id": second, "content": "the second", "finish_reason": "stop"}])
    answer = f"{ENDED} && document.querySelector('.prose').textContent.trim() === values[0]"
    page.reload()
    page.until(answer, "the second")
    page.click("[aria-label='Previous branch']")
    page.until(answer, "the first")
    page.reload()
    page.until(f"{answer} && document.querySelector('.switcher span').textContent === '1/2'", "the first")
    page.run(WATCH)


# --- what a person writes ---------------------------------------------------------------------------------------------
def input_method(page: Browser, selector: str, key: str) -> None:
    """A key as an input method sends it, in each of the ways that browsers mark one."""
    for marks in IME:
        page.run(
            """const options = { bubbles: true, cancelable: true, key: values[1], ...values[2] };
            document.querySelector(values[0]).dispatchEvent(new KeyboardEvent("keydown", options));""",
            selector, key, marks,
        )  # fmt: skip


def test_keys_of_an_input_method_neither_send_nor_rename(page):
    page.click("#prompt")
    page.type("nihao")
    input_method(page, "#prompt", "Enter")
    assert page.value("document.querySelectorAll('.bubble').length") == 0
    page.press("Enter")
    shown(page, "nihao")
    page.until(ENDED)
    page.click("[aria-label='Rename nihao']")
    box = "[aria-label='New title']"
    page.until("document.activeElement.matches(values[0])", box)
    page.type("renamed")
    for key in ("Enter", "Escape"):
        input_method(page, box, key)
    assert page.value("document.querySelector(values[0]).value", box) == "renamed"
    page.press("Enter")
    page.until("document.querySelector('.conversations li.current').textContent.trim() === 'renamed'")


def test_escape_of_an_input_method_does_not_stop_an_answer(page, served):
    sampled(page, temperature=0)
    with served.gate.held(after=20) as gate:
        say(page, "Tell me all")
        length = grows(page, 19)
        input_method(page, "#prompt", "Escape")
        gate.let(20)
        grows(page, length)
        assert page.value("document.querySelector('#send').className") == "send busy"
        page.press("Escape")
        page.until(ENDED)


def test_return_on_a_phone_makes_a_line(page):
    """What a telephone says of itself is put in; tests/serve/test_page_text.py has a browser that says it."""
    page.run(
        """const media = Object.getOwnPropertyDescriptor(MediaQueryList.prototype, "media").get;
        const matches = Object.getOwnPropertyDescriptor(MediaQueryList.prototype, "matches").get;
        Object.defineProperty(MediaQueryList.prototype, "matches", {
          get() { return media.call(this).includes("coarse") || matches.call(this); },
        });"""
    )
    page.click("#prompt")
    page.type("One")
    page.press("Enter")
    page.type("two")
    assert page.value("document.querySelector('#prompt').value") == "One\ntwo"
    page.press("Control", "Enter")
    shown(page, "One\ntwo")
    page.until(ENDED)


def test_return_that_confirms_the_word_of_an_input_method_does_not_send_it(page):
    page.click("#prompt")
    page.compose("\u4f60\u597d")
    page.until("document.querySelector('#prompt').value === values[0]", "\u4f60\u597d")
    assert page.value("document.querySelectorAll('.bubble').length") == 0
    page.press("Enter")
    shown(page, "\u4f60\u597d")
    page.until(ENDED)


def test_what_is_not_sent_waits_in_its_conversation(page, served):
    say(page, "First")
    page.until(ENDED)
    link = page.value("location.hash")
    page.click("#prompt")
    page.type("half a question")
    page.click("#new-chat")
    page.until(STARTED)
    assert page.value("document.querySelector('#prompt').value") == ""
    page.click(f".conversations a[href='{link}']")
    page.until("document.querySelector('#prompt').value === 'half a question'")
    page.reload()
    page.run(WATCH)
    page.until("document.querySelector('#prompt')?.value === 'half a question'")


def test_a_long_paste_is_folded_and_sent_whole(page, served):
    pasted = "\n".join(f"line {i} of a long text" for i in range(4200))[:100_000]
    page.run(
        """const box = document.createElement("textarea");
        document.body.append(box);
        box.value = values[0];
        box.select();""",
        pasted,
    )
    page.press("Control", "c")
    page.click("#prompt")
    page.press("Control", "v")
    page.until("document.querySelector('#prompt').value")
    assert page.value("document.querySelector('#prompt').value.length") == len(pasted)
    page.click("#send")
    height = "document.querySelector('.bubble')?.getBoundingClientRect().height"
    page.until(f"{height} > 0")
    assert page.value(height) < 400
    page.click(".bubble ~ .link, .bubble .link")
    assert page.value(height) > 50_000
    assert eventually(lambda: page.value("location.hash") != "")
    assert stored(page, served)[0]["content"] == pasted


@pytest.mark.parametrize("letter", ["\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301"])
def test_a_title_ends_between_letters(page, letter):
    message = "a" * 59 + letter + "b" * 9
    fill = "const box = document.querySelector('#prompt'); box.value = values[0]; box.dispatchEvent(new Event('input'))"
    page.run(fill, message)
    page.click("#send")
    shown(page, message)
    page.until("document.title === values[0]", f"{'a' * 59}{letter} - penstock")
    page.until(ENDED)


# --- what a model writes ----------------------------------------------------------------------------------------------
def test_markdown_of_all_scripts_and_formulas_are_drawn(page, served):
    chinese = "\u8fd9\u662f**\u91cd\u70b9\u3002**\u540e\u9762"
    texts = ["1~3 and 5~7, ~~no~~", chinese, "- [x] done", r"\(a^2\) and $$\frac{1}{2}$$"]
    opened(page, served, ("Show", "\n\n".join(texts)))
    page.until("document.querySelectorAll('.prose .math.typeset .katex').length === 2")
    assert page.value("[...document.querySelectorAll('.prose del')].map((e) => e.textContent)") == ["no"]
    assert page.value("document.querySelector('.prose strong').textContent") == "\u91cd\u70b9\u3002"
    assert page.value("document.querySelector('.prose li .tick').ariaLabel") == "Done:"
    assert page.value("document.querySelector('.prose .katex-html .mfrac').getBoundingClientRect().height") > 10
    font = page.value("getComputedStyle(document.querySelector('.prose .katex')).fontFamily")
    assert "KaTeX_Main" in font
    assert page.run("await document.fonts.ready; return document.fonts.check('16px KaTeX_Main')")


def test_a_quote_that_is_too_deep_leaves_the_other_messages(page, served):
    opened(page, served, ("One", ">" * 20_000 + " deep"), ("Two", "The **second**."))
    assert page.value("[...document.querySelectorAll('.bubble')].map((e) => e.textContent.trim())") == ["One", "Two"]
    assert page.value("document.querySelector('.prose').textContent").rstrip().endswith("> deep")
    assert page.value("document.querySelector('.prose strong').textContent") == "second"


def test_thoughts_are_folded_and_each_text_has_its_own_direction(page, served):
    hebrew = "\u05e9\u05dc\u05d5\u05dd?"
    opened(page, served, (hebrew, "<think>why</think>because"))
    direction = "getComputedStyle(document.querySelector(values[0])).direction"
    assert page.value(direction, ".bubble") == "rtl"
    assert page.value(direction, ".prose > p") == "ltr"
    assert not page.value("document.querySelector('.thinking').open")
    page.click(".thinking summary")
    page.until("document.querySelector('.thinking').open")


def test_a_selection_survives_an_answer_that_grows(page, served):
    sampled(page, temperature=0)
    with served.gate.held(after=30) as gate:
        say(page, "Tell me all")
        length = grows(page, 29)
        page.run(
            """const text = document.querySelector(".prose p").firstChild;
            getSelection().setBaseAndExtent(text, 2, text, 12);"""
        )
        selected = page.value("getSelection().toString()")
        gate.let(20)
        grows(page, length)
        assert page.value("getSelection().toString()") == selected
        page.press("Escape")
        page.until(ENDED)
    assert len(selected) == 10
    assert page.value("getSelection().toString()") == selected


def test_scrolling_up_a_little_stays_up_until_the_end_is_reached(page, served):
    sampled(page, temperature=0)
    rest = "(({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight)"
    rest += "(document.querySelector('#scroll'))"
    opened(page, served, *((f"q{i}", f"a{i}") for i in range(15)))
    with served.gate.held(after=100) as gate:
        say(page, "Tell me all")
        length = grows(page, 99)  # a letter or more for each token
        page.until(f"{rest} < 8")
        page.wheel("#scroll", -40)
        page.until(f"{rest} > 30")
        top, before = page.value("document.querySelector('#scroll').scrollTop"), page.value(rest)
        gate.let(600)
        grows(page, length + 599)
        assert page.value(rest) > before + 60  # it grew below
        assert abs(page.value("document.querySelector('#scroll').scrollTop") - top) < 40
        page.click("[aria-label='Go to the latest message']")
        page.until(f"{rest} < 8")
        page.press("Escape")
        page.until(ENDED)


def test_scrolling_up_between_two_pictures_of_an_answer_that_grows_stays_up(page, served):
    """The text grows by more than somebody scrolls up, before the browser tells of either."""
    opened(page, served, *((f"q{i}", f"a{i}") for i in range(30)))
    jump = """
      const [scroll, thread] = ["#scroll", "#thread"].map((selector) => document.querySelector(selector));
      const event = () => new Promise((done) => scroll.addEventListener("scroll", done, { once: true }));
      const grow = () => {
        thread.insertAdjacentHTML("beforeend", "<p>more</p>".repeat(9));
        thread.dispatchEvent(new Event("resized"));
      };
      scroll.scrollTop = 0;
      await event();
      scroll.scrollTop = scroll.scrollHeight;
      await event();
      grow();
      scroll.scrollTop -= 40;
      const top = scroll.scrollTop;
      await event();
      grow();
      return scroll.scrollTop - top;
    """
    assert abs(page.run(jump)) < 2


def test_three_hundred_messages_are_a_conversation(page, served):
    opened(page, served, *((f"q{i}", f"a{i}") for i in range(150)))
    say(page, "And now?")
    page.until(f"{ENDED} && document.querySelectorAll('.prose').length === 151")
    assert page.value("document.querySelectorAll('.note.failed').length") == 0


def test_everything_is_printed(page, served):
    opened(page, served, ("line\n" * 200, "<think>" + "why\n\n" * 40 + "</think>" + "because\n\n" * 60))
    shown_on_paper = """
      dispatchEvent(new Event("beforeprint"));
      const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]);
      const on = { print: "all", screen: "not all" };
      for (const { media } of rules) if (media) media.mediaText = on[media.mediaText] ?? media.mediaText;
      const high = (selector) => document.querySelector(selector).getBoundingClientRect().height;
      return { page: document.documentElement.scrollHeight, bubble: high(".bubble"), thoughts: high(".thinking"),
               prose: high(".prose"), composer: high(".composer"), list: high(".sidebar") };
    """
    pages = page.pages()
    page.until("!document.querySelector('.thinking').open")
    shown = page.run(shown_on_paper)
    assert shown["bubble"] > 200 * 16
    assert shown["thoughts"] > 40 * 16
    assert shown["page"] > shown["bubble"] + shown["prose"]
    assert shown["composer"] == shown["list"] == 0
    page.run("dispatchEvent(new Event('afterprint'))")
    assert not page.value("document.querySelector('.thinking').open")
    assert pages is None or pages >= 4


def test_no_payload_runs(page, served):
    """The policy would stop it, and `page` fails for what the policy stops."""
    texts = ["\n\n".join(PAYLOADS[i : i + 10]) for i in range(0, len(PAYLOADS), 10)]
    opened(page, served, *((text, text) for text in texts))
    page.run(WATCH)
    assert page.value(NOTHING_RUNS) == []


# --- the policy -------------------------------------------------------------------------------------------------------
def test_what_the_policy_forbids_is_noticed(any_browser, served):
    """The oracle of `page`, behind each of the other tests."""
    any_browser.goto(f"{served.url}/assets/style.css")
    any_browser.goto(f"{served.url}/#key={KEY}")
    any_browser.until(STARTED)
    any_browser.run(WATCH)
    any_browser.run(
        """const script = document.createElement("script");
        script.textContent = "window.hurt = 1";
        document.body.append(script);"""
    )
    any_browser.until("forbidden.length === 1")
    assert not any_browser.value("window.hurt")
