"""The chat page as a person meets it: Debian's Chromium against a real `penstock serve` with two tiny random models.

Answers that a random model cannot give (markdown, attacks, failures) come from `speak` and `refuse`.
"""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.serve.browser import (
    KEY,
    WAIT,
    answers,
    ask,
    conversation_of,
    grows,
    reload,
    say,
    settled,
    speak,
    stream,
)
from tests.serve.conftest import eventually
from tests.serve.test_middleware import proxied

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'penstock[dev]'")
pytest.importorskip("fastapi", reason="needs the server: pip install 'penstock[serve]'")
expect = playwright.expect

PAGE = Path(__file__).parent.parent.parent / "src" / "penstock" / "serve" / "page"
expect.set_options(timeout=WAIT)


def answer_again(page: Any) -> None:
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".switcher span")).to_have_text("2/2")
    settled(page)


# --- the key ----------------------------------------------------------------------------------------------------------
def test_the_key_is_asked_for_once_per_browser(open_page, served, watch, pictures):
    page = open_page(log_in=False, allowed=["401"])  # the wrong key, on purpose
    page.get_by_placeholder("Key").fill("not the key of the server")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert").first).to_contain_text("That is not the key")
    page.screenshot(path=pictures / "login.png")
    assert len(watch.errors) == 1
    page.get_by_placeholder("Key").fill(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".welcome")
    [cookie] = page.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert KEY not in page.evaluate("JSON.stringify({...localStorage, ...sessionStorage}) + document.cookie")
    page.reload()
    page.wait_for_selector(".welcome")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_placeholder("Key")).to_be_visible()
    page.reload()
    expect(page.get_by_placeholder("Key")).to_be_visible()
    assert not page.context.cookies()
    assert len(watch.errors) == 1  # asking for the key is no error


def test_the_page_is_served_with_a_policy_that_allows_nothing_inline(served, open_page):
    answer = open_page(log_in=False).request.get(served.url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", answer.text())
    for file in PAGE.glob("*.js"):
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", file.read_text()), file


# --- chat -------------------------------------------------------------------------------------------------------------
def test_a_conversation_of_several_turns_is_there_again_after_a_reload(open_page, served, pictures):
    page = open_page()
    say(page, "What colour is the fox?")
    say(page, "And the owl?")
    before = answers(page)
    assert len(before) == 2
    page.screenshot(path=pictures / "chat.png")
    reload(page, "And the owl?")
    assert answers(page) == before
    assert page.locator(".bubble").all_inner_texts() == ["What colour is the fox?", "And the owl?"]
    expect(page.locator(".conversations li.current")).to_have_text("What colour is the fox?")
    roles = [message["role"] for message in conversation_of(page, served)]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert page.title() == "What colour is the fox? - penstock"


@pytest.mark.parametrize("control", ["button", "Escape"])
def test_stop_ends_an_answer_and_keeps_what_was_said(open_page, served, pictures, control):
    page = open_page(sampling={"temperature": 0})
    with served.gate.held(after=20):
        say(page, "Tell me all", wait=False)
        grows(page, beyond=19)
        if control == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        settled(page)
    expect(page.locator(".note")).to_contain_text("Stopped.")
    page.screenshot(path=pictures / "stopped.png")
    message = conversation_of(page, served)[1]
    assert message["finish_reason"] == "cancelled"
    assert message["content"]
    reload(page)
    expect(page.locator(".note")).to_contain_text("Stopped.")


def test_an_answer_is_seen_to_grow_after_a_reload_and_in_a_second_tab_and_is_stopped_there(open_page, served, watch):
    page = open_page(sampling={"temperature": 0})
    with served.gate.held(after=20) as gate:
        say(page, "Tell me more", wait=False)
        length = grows(page)
        page.reload()
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        gate.let(20)
        length = grows(page, beyond=length)
        other = page.context.new_page()
        watch.over(other)
        other.goto(page.url)
        grows(other)
        gate.let(20)
        grows(other, beyond=length)
        other.get_by_role("button", name="Stop").click()
        settled(other)
        settled(page)  # the first tab is told
    expect(page.locator(".note")).to_contain_text("Stopped.")
    [_, answer] = conversation_of(page, served)
    assert answer["finish_reason"] == "cancelled"
    assert page.locator(".prose").inner_text() == other.locator(".prose").inner_text()
    other.close()


def test_a_connection_that_is_lost_loses_nothing_of_an_answer(open_page, served):
    page = open_page(sampling={"temperature": 0, "max_tokens": 40}, allowed=["ERR_FAILED"])
    cut = []

    def cut_off(route: Any) -> None:
        """The answer begins on the server, and its events end after the first."""
        cut.append(route.fetch(timeout=WAIT).text().split("\n\n")[0] + "\n\n")
        route.fulfill(content_type="text/event-stream", body=cut[0])

    page.route("**/replies", cut_off, times=1)
    say(page, "A long one")
    [_, answer] = conversation_of(page, served)
    assert json.loads(cut[0].removeprefix("data: "))["message"]["id"] == answer["id"]
    assert len(answers(page)) == 1
    assert answers(page)[0].split() == answer["content"].split()
    page.route("**/replies", lambda route: route.abort(), times=1)  # neither the request nor an answer gets through
    say(page, "Another")
    page.route("**/messages", lambda route: (route.fetch(), route.abort()), times=1)  # its reply is lost
    say(page, "A third", wait=False)
    expect(page.get_by_label("Message", exact=True)).to_have_value("A third")
    page.get_by_label("Message", exact=True).press("Enter")
    settled(page, "A third")
    roles = [(message["role"], message["content"]) for message in conversation_of(page, served)]
    assert [content for role, content in roles if role == "user"] == ["A long one", "Another", "A third"]
    assert len(roles) == 6


def test_a_tab_that_comes_back_shows_what_another_wrote(open_page, served):
    page = open_page()
    say(page, "Hello")
    other = page.context.new_page()
    other.goto(page.url)
    settled(other, "Hello")
    say(other, "And the owl?")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    settled(page, "And the owl?")
    assert answers(page) == answers(other)
    other.close()


def test_what_a_server_left_unfinished_goes_on_in_place(open_page, served):
    page = open_page(sampling={"max_tokens": 12, "temperature": 0})
    say(page, "Hello")
    [_, answer] = conversation_of(page, served)
    served.store.save_answers([{**answer, "content": "Half", "finish_reason": "interrupted"}])  # as the next start does
    reload(page)
    expect(page.locator(".note")).to_contain_text("The server ended while it wrote this.")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".prose")).to_have_text(re.compile("Half.+", re.DOTALL))
    settled(page)
    assert conversation_of(page, served)[1]["content"].startswith("Half")
    assert len(conversation_of(page, served)) == 2


def test_editing_and_deleting_stop_the_answer_that_is_being_written(open_page, served):
    page = open_page(sampling={"temperature": 0})
    with served.gate.held(after=20) as gate:
        say(page, "Tell me all", wait=False)
        grows(page)
        page.get_by_role("button", name="Edit this message").click()
        page.get_by_label("Edit the message").fill("Tell me less")
        page.keyboard.press("Enter")
        page.locator(".bubble").filter(has_text="Tell me less").wait_for()
        assert eventually(lambda: conversation_of(page, served)[1]["finish_reason"] == "cancelled")
        gate.let(20)
        grows(page)
        line = page.locator(".conversations li.current")
        line.hover()
        line.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.locator(".welcome")).to_be_visible()
        assert eventually(lambda: "penstock_serve_rows_used 0.0" in page.request.get(f"{served.url}/metrics").text())


def test_answering_again_adds_an_alternative_and_keeps_the_first(open_page, served):
    page = open_page(sampling={"max_tokens": 12})
    say(page, "Hello")
    [first] = answers(page)
    answer_again(page)
    [second] = answers(page)
    assert second != first
    page.get_by_role("button", name="Previous branch").click()
    expect(page.locator(".switcher span")).to_have_text("1/2")
    assert answers(page) == [first]
    reload(page)
    expect(page.locator(".switcher span")).to_have_text("1/2")  # the branch that was picked
    assert answers(page) == [first]
    page.get_by_role("button", name="Next branch").click()
    assert answers(page) == [second]
    question, *both = conversation_of(page, served)
    assert [message["parent_id"] for message in both] == [question["id"]] * 2


def test_editing_a_message_starts_a_branch_with_the_old_one_beside_it(open_page, pictures):
    page = open_page()
    say(page, "What does the fox eat?")
    say(page, "Thank you")
    page.get_by_role("button", name="Edit this message").first.click()
    box = page.get_by_label("Edit the message")
    assert box.input_value() == "What does the fox eat?"
    box.fill("What does the owl eat?")
    page.screenshot(path=pictures / "edit.png")
    page.keyboard.press("Enter")
    settled(page, "What does the owl eat?")
    assert page.locator(".bubble").all_inner_texts() == ["What does the owl eat?"]
    expect(page.locator(".switcher span")).to_have_text("2/2")
    page.get_by_role("button", name="Previous branch").click()
    assert page.locator(".bubble").all_inner_texts() == ["What does the fox eat?", "Thank you"]
    page.get_by_role("button", name="Edit this message").first.click()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Edit the message")).to_have_count(0)
    assert page.locator(".bubble").count() == 2


def test_an_answer_cut_by_its_length_goes_on_in_place(open_page, served):
    page = open_page(sampling={"max_tokens": 3, "temperature": 0})
    say(page, "Count")
    expect(page.locator(".note")).to_contain_text("Stopped at the length limit.")
    [before] = answers(page)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".prose")).not_to_have_text(before)
    settled(page)
    [after] = answers(page)
    [question, answer] = conversation_of(page, served)
    assert question["content"] == "Count"
    assert answer["content"].startswith(before)
    assert (answer["content"].split(), len(answer["sampling"]["continued"])) == (after.split(), 1)
    reload(page)
    assert answers(page) == [after]
    say(page, "And then?")
    expect(page.get_by_role("button", name="Continue")).to_have_count(1)  # only behind the last


def test_system_prompt_and_sampling_reach_the_server_and_are_remembered(open_page, served, pictures):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    labels = {"Temperature": 0.5, "Top p": 0.9, "Min p": 0.02, "Top k": 40, "Longest answer": 5, "Seed": 11}
    for label, value in labels.items():
        page.get_by_label(label, exact=True).fill(str(value))
    page.screenshot(path=pictures / "settings.png")
    page.get_by_role("button", name="Close settings").click()
    say(page, "Hello")
    [user, answer] = conversation_of(page, served)
    chosen = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.02, "top_k": 40, "max_tokens": 5, "seed": 11}
    assert answer["sampling"] == chosen
    assert served.store.turns(user["id"], user["conversation_id"])[0] == {"role": "system", "content": "Be brief."}
    reload(page)
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("System prompt").input_value() == "Be brief."
    assert page.get_by_label("Seed", exact=True).input_value() == "11"
    page.get_by_label("System prompt").fill("Be kind.")
    with page.expect_response(lambda answer: answer.request.method == "PATCH"):
        page.keyboard.press("Escape")
    assert served.store.conversation(user["conversation_id"])["system"] == "Be kind."


def test_the_model_is_the_one_that_was_picked(open_page, served):
    page = open_page()
    models = page.get_by_role("combobox", name="Model", exact=True)
    assert models.locator("option").all_inner_texts() == ["left", "right"]
    models.select_option("right")
    say(page, "Hello")
    assert conversation_of(page, served)[1]["model"] == "right"
    expect(page.locator(".who")).to_have_text("right")
    reload(page)
    expect(models).to_have_value("right")


# --- side by side and votes -------------------------------------------------------------------------------------------
def test_of_two_models_side_by_side_one_is_voted_better_blind(open_page, served, pictures):
    page = open_page()
    page.get_by_role("button", name="Compare two answers").click()
    say(page, "What colour is the fox?")
    columns = page.locator(".answer")
    expect(columns).to_have_count(2)
    expect(page.locator(".who").first).to_contain_text("name hidden until you vote")
    page.screenshot(path=pictures / "side-by-side.png")
    page.get_by_role("button", name="B is better").click()
    expect(columns.nth(1)).to_have_class("answer better")
    page.screenshot(path=pictures / "voted.png")
    names = [column.locator(".who span").first.inner_text() for column in columns.all()]
    assert sorted(names) == ["left", "right"]
    stored = {message["id"]: message for message in conversation_of(page, served)}
    [vote] = ask(page, f"/api/votes?conversation_id={page.url.split('#/')[1]}")["data"]
    assert [stored[message_id]["model"] for message_id in vote["shown"]] == names  # in the order of the screen
    assert vote["chosen_id"] == vote["shown"][1]
    say(page, "And the owl?")  # both go on from the better one
    questions = [message for message in conversation_of(page, served) if message["role"] == "user"]
    assert questions[1]["parent_id"] == vote["chosen_id"]
    before = answers(page)
    reload(page, "And the owl?")
    assert answers(page) == before
    expect(page.get_by_role("button", name="B is better").first).to_have_attribute("aria-pressed", "true")


def test_one_model_answers_twice_with_two_seeds_and_the_vote_is_a_tie(open_page, served):
    page = open_page(compare=True, model="left", modelB="left", blind=False)
    say(page, "Hello")
    assert {message["sampling"]["seed"] for message in conversation_of(page, served)[1:]} == {7, 8}
    assert page.locator(".who span").all_inner_texts() == ["left, seed 7", "left, seed 8"]
    page.get_by_role("button", name="Tie").click()
    expect(page.get_by_role("button", name="Tie")).to_have_attribute("aria-pressed", "true")
    [vote] = ask(page, f"/api/votes?conversation_id={page.url.split('#/')[1]}")["data"]
    assert vote["chosen_id"] is None
    answer_again(page)
    expect(page.locator(".answer")).to_have_count(2)
    assert len(conversation_of(page, served)) == 5


def test_a_pair_without_a_vote_stays_a_pair_in_this_browser(open_page):
    page = open_page(compare=True)
    say(page, "Hello")
    before = answers(page)
    reload(page)
    assert page.locator(".answer .prose").all_inner_texts() == before
    expect(page.locator(".who").first).to_contain_text("name hidden until you vote")


def test_a_thumb_is_stored_and_can_be_taken_back(open_page):
    page = open_page()
    say(page, "Hello")
    up, down = page.get_by_role("button", name="Good answer"), page.get_by_role("button", name="Bad answer")
    up.click()
    expect(up).to_have_attribute("aria-pressed", "true")
    down.click()
    expect(down).to_have_attribute("aria-pressed", "true")
    expect(up).to_have_attribute("aria-pressed", "false")
    votes = f"/api/votes?conversation_id={page.url.split('#/')[1]}"
    assert [vote["value"] for vote in ask(page, votes)["data"]] == [-1]
    reload(page)
    expect(down).to_have_attribute("aria-pressed", "true")
    down.click()
    expect(down).to_have_attribute("aria-pressed", "false")
    assert ask(page, votes)["data"] == []


# --- the list ---------------------------------------------------------------------------------------------------------
def test_conversations_can_be_renamed_found_and_deleted(open_page, served):
    page = open_page()
    say(page, "About rivers")
    kept = page.url
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".welcome")).to_be_visible()
    say(page, "About mountains")
    line = page.locator(".conversations li.current")
    line.hover()
    line.get_by_role("button", name="Rename About mountains").click()
    page.get_by_label("New title").fill("High places")
    page.keyboard.press("Enter")
    expect(line).to_have_text("High places")
    assert page.title() == "High places - penstock"
    page.get_by_placeholder("Search").fill("high pl")
    expect(page.locator(".conversations li")).to_have_count(1)
    page.get_by_placeholder("Search").fill("nothing is called this")
    expect(page.locator(".nothing")).to_contain_text("Nothing with")
    page.get_by_placeholder("Search").fill("")
    line.hover()
    line.get_by_role("button", name="Delete High places").click()
    page.get_by_role("button", name="Keep it").click()
    expect(line).to_have_text("High places")
    line.hover()
    line.get_by_role("button", name="Delete High places").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".welcome")).to_be_visible()
    expect(page.get_by_role("link", name="High places")).to_have_count(0)
    page.get_by_role("link", name="About rivers").first.click()
    settled(page, "About rivers")
    assert page.url == kept
    page.go_back()
    expect(page.locator(".welcome")).to_be_visible()


def test_an_answer_goes_on_while_another_conversation_is_open(open_page, served):
    page = open_page(sampling={"temperature": 0, "max_tokens": 60})
    with served.gate.held(after=20):
        say(page, "A long one", wait=False)
        grows(page)
        conversation = page.url.split("#/")[1]
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".welcome")).to_be_visible()
    assert eventually(lambda: served.store.messages(conversation)[1]["finish_reason"] == "length")
    page.get_by_role("link", name="A long one").first.click()
    settled(page, "A long one")
    expect(page.locator(".note")).to_contain_text("Stopped at the length limit.")


def test_export_writes_json_lines_of_every_branch(open_page, served, tmp_path):
    page = open_page(sampling={"max_tokens": 6})
    say(page, "What does the crow eat?")
    answer_again(page)
    page.get_by_role("button", name="Settings").click()
    with page.expect_download() as single:
        page.get_by_role("link", name="Export as JSON lines").click()
    page.keyboard.press("Escape")
    with page.expect_download() as everything:
        page.get_by_role("link", name="Export all").click()
    lines = [json.loads(line) for line in Path(single.value.path()).read_text().splitlines()]
    texts = [message["content"] for message in conversation_of(page, served) if message["role"] == "assistant"]
    answers = [message for line in lines for message in line["messages"] if message["role"] == "assistant"]
    for answer in answers:
        # An answer that max_tokens cut is not to be learned, and says so.
        assert (answer.pop("weight", 1), answer.pop("finish_reason", "stop")) in ((0, "length"), (1, "stop"))
    assert answers == [{"role": "assistant", "content": text} for text in texts if text]
    assert all(line["messages"][0] == {"role": "user", "content": "What does the crow eat?"} for line in lines)
    both = Path(everything.value.path()).read_text()
    assert all(line in both for line in Path(single.value.path()).read_text().splitlines())
    assert single.value.suggested_filename.endswith(".jsonl")


# --- what a model writes ----------------------------------------------------------------------------------------------
RICH = """A **penstock** carries water from a reservoir to a turbine. Three things decide what comes out:

1. **Head**: how far the water falls.
2. **Flow**: how much of it arrives per second.
3. **Losses**: friction in the pipe, and bends.

```python
def power(head, flow, efficiency=0.9):
    \"\"\"Watts from metres and cubic metres per second.\"\"\"
    return 1000 * 9.81 * head * flow * efficiency  # density times gravity
```

| head | flow | power |
|---:|---:|---:|
| 10 m | 0.5 m3/s | 44 kW |
| 40 m | 0.5 m3/s | 177 kW |

> Small turbines are fed from reservoirs far larger than themselves.

See [the article](https://example.com/penstock), ![a picture](https://example.com/x.png) and `code`.
"""


def test_markdown_code_tables_and_links_are_shown_and_code_is_copied(open_page, served):
    page = open_page()
    speak(page, served, RICH)
    say(page, "How does it work?")
    prose = page.locator(".prose")
    expect(prose.locator("strong").first).to_have_text("penstock")
    expect(prose.locator("ol li")).to_have_count(3)
    expect(prose.locator("td")).to_have_count(6)
    expect(prose.locator("blockquote")).to_be_visible()
    expect(prose.locator("figcaption span").first).to_have_text("python")
    expect(prose.locator(".code-word").first).to_have_text("def")
    links = prose.locator("a")
    assert links.all_inner_texts() == ["the article", "a picture"]  # a picture of another host is a link
    for link in links.all():
        assert link.get_attribute("target") == "_blank"
        assert "noopener" in link.get_attribute("rel")
    assert prose.locator("img").count() == 0
    prose.get_by_role("button", name="Copy code").click()
    code = RICH.split("```python\n")[1].split("\n```")[0]
    assert page.evaluate("navigator.clipboard.readText()").strip() == code
    page.get_by_role("button", name="Copy this answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == RICH
    page.get_by_role("button", name="Copy this message").click()
    assert page.evaluate("navigator.clipboard.readText()") == "How does it work?"


# --- when things go wrong ---------------------------------------------------------------------------------------------
def refuse(
    page: Any, status: int, message: str, headers: dict[str, str] | None = None, address: str = "**/replies"
) -> None:
    """The next request to this address gets this error."""
    error = {"error": {"message": message, "type": "t", "param": None, "code": "c"}}
    page.route(address, lambda route: route.fulfill(status=status, json=error, headers=headers or {}), times=1)


def test_a_busy_server_is_asked_again_when_it_said(open_page, pictures):
    page = open_page(allowed=["429"])
    refuse(page, 429, "128 answers wait already", {"retry-after": "3"})
    say(page, "Hello", wait=False)
    expect(page.locator(".note.busy")).to_contain_text("The server is busy. Trying again in")
    page.screenshot(path=pictures / "busy.png")
    settled(page)
    expect(page.locator(".note.busy")).to_have_count(0)
    assert answers(page)[0]
    refuse(page, 429, "128 answers wait already", {"retry-after": "600"})
    say(page, "Again", wait=False)
    expect(page.locator(".note.busy")).to_contain_text("600 s")
    page.keyboard.press("Escape")  # waiting can be stopped too
    expect(page.locator(".note").last).to_contain_text("Stopped.")
    page.get_by_role("button", name="Try again").click()
    settled(page)
    assert len(answers(page)) == 2


def test_a_failed_answer_says_why_and_can_be_tried_again(open_page, served):
    page = open_page(allowed=["400"])
    refuse(page, 400, "the prompt has 300 tokens and left has a context of 256")
    say(page, "Hello", wait=False)
    expect(page.locator(".note.failed")).to_contain_text("300 tokens and left has a context of 256")
    say(page, "Shorter")  # takes the place of what was not answered
    assert page.locator(".bubble").all_inner_texts() == ["Shorter"]

    failure = {"type": "error", "error": {"message": "the model failed", "type": "t", "param": None, "code": "c"}}

    def break_off(route: Any) -> None:
        conversation = conversation_of(page, served)[0]["conversation_id"]
        asked = route.request.post_data_json
        parent = asked["parent_id"]
        message = served.store.add_message(conversation, parent, "assistant", "", model="left", message_id=asked["id"])
        served.store.save_answers([{**message, "content": "Half an", "finish_reason": "error"}])
        stream(route, [{"type": "message", "message": message}, {"type": "delta", "content": "Half an"}, failure])

    page.route("**/replies", break_off, times=1)
    say(page, "Break", wait=False)
    expect(page.locator(".note.failed")).to_contain_text("The model failed")
    assert answers(page)[-1] == "Half an"
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".switcher span").last).to_have_text("2/2")
    settled(page)


def test_while_models_are_loaded_the_page_says_so_and_waits(open_page, served):
    page = open_page(log_in=False, allowed=["503"])
    refuse(page, 503, "the server is loading.", {"retry-after": "3"}, "**/health")
    page.goto(f"{served.url}/?again#key={KEY}")
    expect(page.locator("#banner")).to_contain_text("The model is being loaded.")
    page.wait_for_selector(".welcome")
    expect(page.locator("#banner")).to_be_hidden()


def test_a_server_of_reward_models_alone_says_that_none_chats(open_page):
    page = open_page(log_in=False)
    card = {"id": "taste", "object": "model", "created": 1, "owned_by": "penstock", "task": "score"}
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [card]}))
    page.get_by_placeholder("Key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_contain_text("No model here can chat.")


def test_a_lost_server_is_waited_for_and_nothing_written_is_lost(open_page, pictures):
    page = open_page(allowed=["ERR_INTERNET_DISCONNECTED"])
    page.context.set_offline(True)
    say(page, "Are you there?", wait=False)
    expect(page.locator("#banner")).to_be_visible()
    expect(page.get_by_label("Message", exact=True)).to_have_value("Are you there?")
    page.screenshot(path=pictures / "offline.png")
    page.context.set_offline(False)
    expect(page.locator("#banner")).to_be_hidden()
    page.get_by_label("Message", exact=True).press("Enter")
    settled(page, "Are you there?")


def test_a_conversation_that_is_gone_leaves_a_word_and_a_new_chat(open_page, served):
    page = open_page(allowed=["404"])
    page.goto(f"{served.url}/#/conv_{'0' * 24}")
    expect(page.locator("#toast")).to_have_text("This conversation no longer exists.")
    expect(page.locator(".welcome")).to_be_visible()


def test_a_second_log_in_in_another_tab_does_not_disturb_the_first(open_page, served, watch):
    page = open_page(allowed=["403"])
    other = page.context.new_page()
    watch.over(other)
    other.goto(f"{served.url}/#key={KEY}")
    other.wait_for_selector(".welcome")
    other.close()
    say(page, "Hello")


# --- for everybody ----------------------------------------------------------------------------------------------------
def test_everything_works_from_the_keyboard(open_page):
    page = open_page()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.get_by_label("Message", exact=True).input_value() == "One\ntwo"
    page.keyboard.press("Enter")
    settled(page, "One")
    page.get_by_role("button", name="Good answer").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="Good answer")).to_be_focused()  # it was drawn anew
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.evaluate("document.activeElement.blur(), document.querySelector('.skip').focus()")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    assert "#/conv_" not in page.url or page.locator(".bubble").count() == 1
    page.get_by_placeholder("Search").fill("none of the conversations of other tests")
    seen = set()
    for _ in range(45):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
    controls = {"new-chat", "search", "export-all", "prompt", "model", "compare", "open-settings", "theme"}
    assert controls | {"Answer again", "Edit this message"} <= seen


def test_every_control_has_a_name_and_answers_are_announced(open_page):
    page = open_page(compare=True)
    say(page, "Hello")
    page.get_by_role("button", name="Tie").click()
    expect(page.get_by_role("status")).to_have_text("The answer is complete.")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, a, input, select, textarea")]
          .filter((one) => !one.closest("[aria-hidden=true]") && one.getAttribute("aria-hidden") !== "true")
          .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim()))
          .filter((one) => !one.labels?.[0]?.textContent.trim())
          .map((one) => one.outerHTML)"""
    )
    assert nameless == []


def test_text_has_enough_contrast_in_light_and_in_dark(open_page):
    pairs = [(text, ground) for text in ("text", "muted") for ground in ("ground", "surface", "side", "raised")]
    pairs += [(text, ground) for text in ("accent", "danger") for ground in ("ground", "surface")]
    pairs += [("on-accent", "accent"), ("code-word", "surface"), ("code-string", "surface"), ("code-number", "surface")]
    page = open_page(log_in=False)
    rgb = """(name) => {
      const probe = document.createElement("i");
      probe.style.color = `var(--${name})`;
      document.body.append(probe);
      return getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
    }"""

    def light(name: str) -> float:
        """Relative luminance (WCAG 2.2)."""
        parts = [c / 255 for c in page.evaluate(rgb, name)[:3]]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for text, ground in pairs:
            low, high = sorted((light(text), light(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, text, ground)


def test_the_theme_follows_the_system_until_somebody_chooses(open_page):
    page = open_page(scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    button = page.get_by_role("button", name="Theme")
    button.click()
    expect(button).to_have_text("Theme: light")
    assert page.evaluate(ground) != dark
    page.reload()
    page.wait_for_selector(".welcome")
    assert page.evaluate(ground) != dark
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert page.evaluate(ground) == dark


def test_a_phone_shows_everything_without_sideways_scrolling(open_page, served, pictures):
    page = open_page(width=390)
    fits = "document.documentElement.scrollWidth <= 390 && document.querySelector('#scroll').scrollWidth <= 390"
    speak(page, served, RICH + "\n\n" + "x" * 300)
    say(page, "How does it work? " + "y" * 200)
    assert page.evaluate(fits)
    page.screenshot(path=pictures / "phone-chat.png")
    page.get_by_role("button", name="Compare two answers").tap()
    say(page, "And the owl?")
    [a, b] = [column.bounding_box() for column in page.locator(".answer").all()]
    assert b["y"] >= a["y"] + a["height"]  # below each other
    assert page.evaluate(fits)
    page.get_by_role("button", name="A is better").tap()
    expect(page.locator(".answer.better")).to_have_count(1)
    page.screenshot(path=pictures / "phone-voted.png")
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.get_by_role("button", name="Conversations").tap()
    expect(page.get_by_role("navigation")).to_be_visible()
    page.screenshot(path=pictures / "phone-list.png")
    page.keyboard.press("Escape")
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.get_by_role("button", name="Settings").tap()
    assert page.evaluate("document.querySelector('#settings').scrollWidth <= 390")
    page.keyboard.press("Escape")
    small = page.evaluate(
        """() => [...document.querySelectorAll(".top button, .composer button, .verdict button, .actions > button")]
          .filter((one) => one.offsetParent && Math.min(one.offsetWidth, one.offsetHeight) < 32)
          .map((one) => one.getAttribute("aria-label") || one.textContent)"""
    )
    assert small == []


def test_the_page_works_below_a_proxys_prefix(browser, served, watch):
    """Log-in, answers, a reload, links and the log-out, through a proxy that takes the prefix off."""
    with proxied(urlsplit(served.url).port, "/lab/chat") as address:
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        watch.over(page)
        page.goto(f"{address}/lab/chat/#key={KEY}")
        page.wait_for_selector(".welcome")
        say(page, "Is this below a prefix?")
        assert page.url.startswith(f"{address}/lab/chat/#/conv_")
        reload(page, "Is this below a prefix?")
        page.locator("#open-settings").click()
        for link in ("#export-all", "#export-one"):
            href = page.locator(link).evaluate("link => link.href")
            assert href.startswith(f"{address}/lab/chat/api/")
            assert "Is this below a prefix?" in page.evaluate("url => fetch(url).then(answer => answer.text())", href)
        page.keyboard.press("Escape")
        page.locator("#new-chat").click()
        assert page.url == f"{address}/lab/chat/"
        page.locator("#log-out").click()
        page.wait_for_selector("#key")
        page.reload()
        page.wait_for_selector("#key")
        page.close()
        watch.check(f"{address}/lab/chat")
