"""Hostile text in every field that a person, an imported file or a model can fill: nothing of it runs, nothing is
fetched, and no policy is broken, of which Chromium writes to the console, and the watch fails.

The labelling room's fields: labelling/test_label_page.py; versions: test_page_versions.py; reports:
tests/commands/test_watch.py; Firefox and WebKit: test_browsers.py.
"""

import json
from pathlib import Path
from urllib.parse import unquote

import pytest
import sqlalchemy as sa
import tomli_w

from penstock.run.report import RunFiles, sections_of
from penstock.run.report import page as report
from penstock.serve.tables import conversations
from tests.run.test_report import greedy, write_run
from tests.serve.browser import KEY, WAIT, say, settled, speak
from tests.serve.page_payloads import PAYLOADS, nothing_runs
from tests.serve.test_page import refuse
from tests.serve.test_page_days import bring

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'penstock[dev]'")
expect = playwright.expect
expect.set_options(timeout=WAIT)
IMAGE = "<img src=x onerror=alert(1)>"
FETCHING = "<img src=http://evil.invalid/a.png>"


# --- answers, messages, titles ----------------------------------------------------------------------------------------
def test_no_payload_of_an_answer_runs_or_fetches(open_page, served):
    """Ten payloads to a message, to save time: the two tests below take them one by one."""
    assert len(PAYLOADS) >= 180
    page = open_page()
    texts = ["\n\n".join(PAYLOADS[i : i + 10]) for i in range(0, len(PAYLOADS), 10)]
    speak(page, served, *texts)
    for count, text in enumerate(texts, 1):
        page.get_by_label("Message", exact=True).fill(text)
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#thread > :nth-child({2 * count}) > .actions")
    nothing_runs(page)


def test_no_payload_runs_while_it_is_being_written(open_page):
    """Every prefix of every payload is drawn: half a payload is another text to the parser."""
    page = open_page()
    drawn = page.evaluate(
        """async (payloads) => {
          const { render } = await import("/assets/markdown.js");
          const prose = document.createElement("div");
          prose.className = "prose";
          document.querySelector("#thread").append(prose);
          let drawn = 0;
          for (const payload of payloads) {
            for (let end = 1; end <= payload.length; end++, drawn++) {
              prose.replaceChildren(render("Well: " + payload.slice(0, end)));
              if (prose.querySelector("script, style, img, svg:not(.icon), iframe, [onerror], [onload], [style]")) {
                throw new Error(payload.slice(0, end));
              }
            }
          }
          return drawn;
        }""",
        PAYLOADS,
    )
    assert drawn == sum(len(payload.encode("utf-16-le")) // 2 for payload in PAYLOADS)
    nothing_runs(page)


def test_no_payload_runs_from_history_titles_or_exports(open_page, served):
    store = served.store
    titles = PAYLOADS[-200:]  # what a search shows at once
    for payload in titles:
        store.add_conversation(f"payload: {payload}"[:200], payload)
    conversation, parent = store.add_conversation("payloads", PAYLOADS[0])["id"], None
    for payload in PAYLOADS:
        question = store.add_message(conversation, parent, "user", payload)["id"]
        answer = store.add_message(conversation, question, "assistant", "", model=payload, sampling={})
        store.save_answers([{**answer, "content": payload, "finish_reason": "stop"}])
        parent = answer["id"]
    page = open_page()
    page.goto(f"{served.url}/#/{conversation}")
    settled(page)
    assert page.locator(".bubble").all_inner_texts()[:3] == PAYLOADS[:3]
    assert page.locator(".prose").count() == len(PAYLOADS)
    nothing_runs(page)
    page.get_by_placeholder("Search").fill("payload: ")
    expect(page.locator(".conversations li")).to_have_count(len(titles))
    nothing_runs(page)
    page.get_by_placeholder("Search").fill("onerror")
    expect(page.locator(".hit mark").first).to_have_text("onerror")
    nothing_runs(page)
    page.get_by_role("button", name="Settings").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Export as JSON lines").click()
    [line] = Path(download.value.path()).read_text().strip("\n").split("\n")
    twice = [payload for payload in PAYLOADS for _ in ("user", "assistant")]
    assert [message["content"] for message in json.loads(line)["messages"]] == [PAYLOADS[0], *twice]
    answer = page.request.get(f"{served.url}/api/conversations/{conversation}/export")
    assert answer.headers["content-type"].startswith("application/jsonl")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "attachment" in answer.headers["content-disposition"]


# --- what came later --------------------------------------------------------------------------------------------------
def test_no_payload_runs_from_presets_system_prompts_and_drafts(open_page):
    presets = [{"name": text, "model": text, "system": text, "sampling": {text: 1}} for text in PAYLOADS]
    page = open_page(presets=presets, system=PAYLOADS[0])
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#presets li")).to_have_count(len(PAYLOADS))
    nothing_runs(page)
    for i in range(len(PAYLOADS)):
        page.evaluate("i => document.querySelectorAll('#presets .link')[i].click()", i)
        assert PAYLOADS[i] in page.locator("#toast").text_content()
    expect(page.get_by_label("System prompt")).to_have_value(PAYLOADS[-1])
    nothing_runs(page)
    page.keyboard.press("Escape")
    draft = "\n".join(PAYLOADS)
    page.get_by_label("Message", exact=True).fill(draft)
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value(draft)
    nothing_runs(page)


def test_no_payload_runs_from_names_and_contents_of_files(open_page, served):
    page = open_page()
    texts = [text for text in PAYLOADS if "/" not in text]  # a browser's file has no folder in its name
    files = [{"name": text, "mimeType": "text/html", "buffer": text.encode()} for text in texts]
    page.locator("#files").set_input_files([{**files[0], "name": IMAGE, "buffer": b"\xff"}])
    expect(page.locator("#toast")).to_contain_text(f"{IMAGE}: it is no text")
    page.locator("#files").set_input_files(files)
    expect(page.locator(".chip")).to_have_count(len(files))
    nothing_runs(page)
    speak(page, served, IMAGE)  # all of them are more than a model reads
    say(page, IMAGE)
    shown = page.locator(".file summary")
    expect(shown).to_have_count(len(files))
    page.evaluate("() => { for (const details of document.querySelectorAll('.file')) details.open = true; }")
    assert page.locator(".file pre").all_text_contents() == texts
    nothing_runs(page)


def test_no_payload_runs_from_imported_files_whatever_they_are_of(open_page, served):
    def turns(text):
        shared = {"create_time": 1.6e9, "metadata": {"model_slug": text}}
        shared["content"] = {"content_type": "text", "parts": [text]}
        system, question, answer = ({"author": {"role": role}, **shared} for role in ("system", "user", "assistant"))
        nodes = {"s": (None, system), text: ("s", question), "a": (text, answer)}
        children = {"s": [text], text: ["a"], "a": []}
        return {i: {"id": i, "parent": up, "message": said, "children": children[i]} for i, (up, said) in nodes.items()}

    page = open_page(allowed=["400"])
    chatgpt = [{"title": text, "mapping": turns(text)} for text in PAYLOADS]
    sharegpt = [
        {
            "title": text,
            "id": text,
            "conversations": [{"from": "human", "value": f"{text} "}, {"from": "gpt", "value": text}],
        }
        for text in PAYLOADS
    ]
    ours = [
        {"messages": [{"role": role, "content": f"{text}  "} for role in ("user", "assistant")]} for text in PAYLOADS
    ]
    too_long = [{"title": IMAGE, "messages": [{"role": "user", "content": "x" * 500_001}]}]
    for name, rows in (("chatgpt.json", chatgpt), ("sharegpt.json", sharegpt), ("ours.jsonl", ours)):
        lines = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
        assert bring(page, name, lines.encode()) == f"{len(PAYLOADS)} imported."
    assert f"{IMAGE}: " in bring(page, "long.json", json.dumps(too_long).encode())
    assert f"{IMAGE}: it is no JSON" in bring(page, IMAGE, b"{")
    nothing_runs(page)
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    with served.store.reading() as connection:
        is_it = (conversations.c.title == FETCHING) & (conversations.c.system == FETCHING)
        of_chatgpt = connection.scalar(sa.select(conversations.c.id).where(is_it))
    page.goto(f"{served.url}/#/{of_chatgpt}")
    settled(page, FETCHING)
    expect(page.locator(".who")).to_have_text(FETCHING)
    nothing_runs(page)
    page.evaluate("document.querySelector('.sentinel').scrollIntoView()")
    nothing_runs(page)


def test_no_payload_runs_from_pinned_titles_questions_before_a_deletion_and_snippets(open_page, served):
    for payload in PAYLOADS[::6]:
        pinned = served.store.add_conversation(payload[:200], "")["id"]
        served.store.change_conversation(pinned, {"pinned": True})
        served.store.add_message(pinned, None, "user", payload)
    page = open_page()
    expect(page.get_by_role("heading", name="Pinned")).to_be_visible()
    nothing_runs(page)
    line = page.locator(".conversations li").first
    title = line.locator("a").text_content()
    for name in ("Delete", "Rename"):
        line.hover()
        line.get_by_role("button", name=name).click()
        nothing_runs(page)
        page.keyboard.press("Escape")
    expect(line.locator("a")).to_have_text(title, use_inner_text=False)
    for words in ("<img", "alert(1)", "</script>", "javascript:", IMAGE, '"onmouseover=', "&#x6A;", "(?:", "\\", "%"):
        page.get_by_placeholder("Search").fill(words)
        expect(page.locator(".hit, .nothing").first).not_to_have_text("Searching...")
        nothing_runs(page)


def test_no_payload_runs_from_models_names_titles_they_give_and_errors(open_page, served):
    page = open_page(log_in=False, allowed=["400"], titles=True)
    cards = [{"id": text, "max_model_len": 8192, "task": "generate"} for text in PAYLOADS]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": cards}))
    page.goto(f"{served.url}/?models#key={KEY}")
    page.wait_for_selector(".welcome")
    assert page.locator("#model option").all_text_contents() == PAYLOADS
    page.locator("#model").select_option(index=1)
    page.route("**/title", lambda route: route.fulfill(json={"id": route.request.url.split("/")[-2], "title": IMAGE}))
    speak(page, served, *PAYLOADS[:2])
    say(page, "Who are you?")
    expect(page).to_have_title(f"{IMAGE} - penstock")
    expect(page.locator(".who")).to_have_text(PAYLOADS[1])
    page.get_by_role("button", name="Edit this answer").click()
    page.get_by_label("Edit the answer").fill("\n\n".join(PAYLOADS))
    nothing_runs(page)
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".when").last).to_contain_text("rewritten")
    nothing_runs(page)
    refuse(page, 400, IMAGE)
    say(page, "And now?", wait=False)
    expect(page.locator(".note.failed")).to_contain_text(IMAGE)
    refuse(page, 400, IMAGE, address="**/messages")
    page.get_by_label("Message", exact=True).fill("Not taken")
    page.keyboard.press("Enter")
    expect(page.locator("#toast")).to_have_text(IMAGE)
    nothing_runs(page)


@pytest.mark.parametrize("fragment", [
    "key=%", "key=%zz", "token=<img src=x onerror=alert(1)>", "/%", "/..", "/../api", "/conv_x/<svg onload=alert(1)>",
    "/javascript:alert(1)", "javascript:alert(1)",
])  # fmt: skip
def test_an_address_that_somebody_hands_out_does_nothing_but_open_the_page(served, open_page, fragment):
    page = open_page(log_in=not fragment.startswith(("key", "token")), allowed=["401", "404"])
    page.goto(f"{served.url}/?{len(fragment)}#{fragment}")
    page.locator(".welcome, #key").locator("visible=true").wait_for()
    nothing_runs(page)


def test_no_title_leaves_the_name_of_a_download(open_page, served):
    page = open_page()
    for payload in PAYLOADS:
        title = f"{payload}\r\nSet-Cookie: x=1"[-200:]
        conversation = served.store.add_conversation(title, "")["id"]
        answer = page.request.get(f"{served.url}/api/conversations/{conversation}/markdown")
        header = answer.headers["content-disposition"]
        begin = "attachment; filename=\"conversation.md\"; filename*=UTF-8''"
        assert header.startswith(begin)
        assert unquote(header.removeprefix(begin)) == f"{title[:80].strip()}.md"
        assert (answer.headers["x-content-type-options"], "set-cookie" in answer.headers) == ("nosniff", False)


def test_no_payload_runs_from_the_report_of_runs(tmp_path, contexts, watch):
    """Of two, whose names are in the pictures' legends; a watched page is the same one."""
    runs = {}
    for name in ("$\\frac{1}$<img src=x onerror=alert(1)>", "<svg onload=alert(1)>"):
        samples = [{**greedy(step, text), "prompt": text} for text in PAYLOADS for step in (0, 2)]
        metrics = [{"step": step} | {f"{text}/{text}": step for text in PAYLOADS[::40]} for step in (1, 2)]
        health = [{"step": 1, "text": text} for text in PAYLOADS]
        judged = {"date": IMAGE, "prompts": 2, "by": IMAGE, "data": IMAGE, "against": IMAGE, "win_rate": 1.0}
        judged |= {"win_rate_interval": [0.5, 1.0], "win_rate_length_controlled": 1.0}
        files = {"samples": samples, "metrics": metrics, "health": health, "evaluations": [judged]}
        run = write_run(tmp_path / str(len(runs)), [2.0, 1.0], **files)
        (run / "config.toml").write_text(tomli_w.dumps({"command": IMAGE, **{text: text for text in PAYLOADS}}))
        runs[name] = RunFiles.read(run)
    file = tmp_path / "report.html"
    file.write_text(report(IMAGE, IMAGE, sections_of(runs)))
    page = contexts[False].new_page()
    watch.over(page)
    page.goto(file.as_uri())
    assert page.locator(".prompt").all_text_contents() == [text.strip() for text in PAYLOADS]
    nothing_runs(page)
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hurt = 1'}))")
    [refused] = watch.errors  # what the page's own policy would stop, if a text did become a script
    assert "Content Security Policy" in refused
    watch.errors.clear()
    nothing = page.evaluate("() => { document.querySelector('body > script').remove(); return window.hurt; }")
    assert nothing is None
    page.close()
    watch.check(tmp_path.as_uri())
