"""What the page makes of the text of a model: many texts on one page of Chromium, without a server.

The page's files are handed out by the test, under the policy that the server sends with them: what needs an inline
style or another host fails here.
"""
# ruff: noqa: RUF001 - the texts are people's, in their signs

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.serve import middleware, static_files
from tests.conftest import PATIENCE

pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'penstock[dev]'")

HOST = "http://127.0.0.1"  # nothing is asked there: `hand_out` answers
SHELL = '<!doctype html><link rel="stylesheet" href="/assets/style.css"><div id="app"><div class="prose"></div></div>'


def hand_out(route: Any) -> None:
    """A file of the page, as the server sends it."""
    headers = {name.decode(): value.decode() for name, value in middleware.HEADERS}
    path = route.request.url.removeprefix(f"{HOST}/")
    if path == "":
        route.fulfill(body=SHELL, content_type="text/html", headers=headers)
    elif path.removeprefix("assets/") in static_files.files():
        body, _, media_type = static_files.files()[path.removeprefix("assets/")]
        route.fulfill(body=body, content_type=media_type, headers=headers)
    else:
        route.fulfill(status=404)


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    errors: list[str] = []
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route("**/*", hand_out)
    page.goto(f"{HOST}/")
    page.evaluate(
        """async () => {
          const [{ render }, { typeset }, { morph }] = await Promise.all(
            ["markdown", "maths", "dom"].map((name) => import(`/assets/${name}.js`)));
          const prose = document.querySelector(".prose");
          window.prose = prose;
          window.show = (text) => (prose.replaceChildren(render(text)), prose);
          window.typeset = () => typeset(prose);
          window.grow = (text) => (morph(prose, render(text)), typeset(prose), prose);
        }"""
    )
    yield page
    page.close()
    assert errors == []


def html_of(page: Any, text: str) -> str:
    """The rendered text, without the attributes that every block has."""
    html = page.evaluate("text => show(text).innerHTML", text)
    return re.sub(r' dir="\w+"|\n', "", html)


def test_vendored_files_are_the_packages_own():
    vendor = static_files.PAGE / "vendor"
    rows = re.findall(r"^\| (\S+) \|.* ([0-9a-f]{64}) \|$", (vendor / "README.md").read_text(), re.MULTILINE)
    files = {path.relative_to(vendor).as_posix() for path in vendor.rglob("*") if path.is_file()}
    assert {name for name, _ in rows} == files - {"README.md"}
    for name, digest in rows:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest


CASES = {
    "a range is not struck out": ("1~3 and 5~7 ~a~", "<p>1~3 and 5~7 ~a~</p>"),
    "two tildes strike out": ("~~no~~ 1~2", "<p><del>no</del> 1~2</p>"),
    "Chinese, quotes inside": ("**“你好”**世界", "<p><strong>“你好”</strong>世界</p>"),
    "Chinese, a colon inside": ("**重要：**内容", "<p><strong>重要：</strong>内容</p>"),
    "Chinese, a full stop": (
        "这是**强调。**然后**再**来", "<p>这是<strong>强调。</strong>然后<strong>再</strong>来</p>"
    ),
    "Chinese, brackets on both sides": ("他说**「是」**吧", "<p>他说<strong>「是」</strong>吧</p>"),
    "Chinese, ASCII brackets": ("**注(1)**的", "<p><strong>注(1)</strong>的</p>"),
    "Japanese": ("これは**「強調」**です", "<p>これは<strong>「強調」</strong>です</p>"),
    "Korean": ('**"강조"**는 굵게', '<p><strong>"강조"</strong>는 굵게</p>'),
    "Chinese, one star and three": (
        "*“斜”*体***“粗”***体", "<p><em>“斜”</em>体<em><strong>“粗”</strong></em>体</p>"
    ),
    "Chinese, code inside": ("**“`a**b`”**的", "<p><strong>“<code>a**b</code>”</strong>的</p>"),
    "CommonMark's own rule elsewhere": ('a**"b"**c', '<p>a**"b"**c</p>'),
    "ordinary emphasis": ("**a** *b* ***c***", "<p><strong>a</strong> <em>b</em> <em><strong>c</strong></em></p>"),
    "tasks": (
        "- [ ] a\n- [x] b\n- c",
        '<ul><li class="task"><span class="tick" role="img" aria-label="To do:">☐</span> a</li>'
        '<li class="task"><span class="tick" role="img" aria-label="Done:">☑</span> b</li><li>c</li></ul>',
    ),
    "tasks with space between": (
        "- [ ] a\n\n- [x] b",
        '<ul><li class="task"><p><span class="tick" role="img" aria-label="To do:">☐</span> a</p></li>'
        '<li class="task"><p><span class="tick" role="img" aria-label="Done:">☑</span> b</p></li></ul>',
    ),
    "a thematic break of many signs": ("- " * 60 + "\n\n" + "*" * 200, "<hr><hr>"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_markdown_is_shown_as_meant(page, name):
    text, expected = CASES[name]
    assert html_of(page, text) == expected


FORMULAS = {
    r"so \(x^2\) is": [("x^2", False)],
    r"so \[x^2\] is": [("x^2", True)],
    "so $$x^2$$ is": [("x^2", True)],
    "$$\nx_1 * y_1\n= 3\n$$\n\nthen": [("x_1 * y_1\n= 3", True)],
    "text\n\\[\n\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}\n\\]\nmore": [
        ("\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}", True)
    ],
    "1. one:\n   $$a*b*c$$\n2. two": [("a*b*c", True)],
    "for $x$ and $f(x) = 2$, $n$-th": [("x", False), ("f(x) = 2", False), ("n", False)],
    "**a $x*y$ b** *c \\(d*e\\) f*": [("x*y", False), ("d*e", False)],
    "> \\(a < b\\)": [("a < b", False)],
    "| a |\n|---|\n| $x_1$ |": [("x_1", False)],
    "中文$x$公式": [("x", False)],
}
MONEY = [
    "$5 and $6", "it costs $5, or $6.50 with tax", "US$5 and CA$7", "$5 (or 6$) is all", "$HOME and $PATH",
    "$HOME/$USER", "`$a` and `$b`", "```\n$x$ \\(y\\)\n```", "\\$x\\$", "between $5-$6", "$ 5 $", "a $$ b",
    "\\(", "\\[ a", "$$", "$$$", "from $100 to $200, i.e. $100/day", "costs 5$ and 6$.",
]  # fmt: skip
FORMULAS_SHOWN = "text => [...show(text).querySelectorAll('.math')].map((f) => [f.dataset.tex, f.matches('.display')])"


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_found(page, text):
    assert page.evaluate(FORMULAS_SHOWN, text) == [list(formula) for formula in FORMULAS[text]]


@pytest.mark.parametrize("text", MONEY)
def test_money_and_code_are_no_formulas(page, text):
    assert page.evaluate(FORMULAS_SHOWN, text) == []


def test_a_text_is_searched_for_formulas_once_whatever_its_stars(page):
    """Once for each star a text of 10,000 characters held the page for half a minute."""
    shown = page.evaluate(
        """text => {
          const { matchAll } = String.prototype;
          let searches = 0;
          String.prototype.matchAll = function (...of) { searches++; return matchAll.apply(this, of); };
          const { innerHTML } = show(text);
          String.prototype.matchAll = matchAll;
          return [searches, innerHTML.split("<em").length - 1, innerHTML.split('class="math"').length - 1];
        }""",
        "*a* $x*y$ " * 50,
    )
    assert shown[0] < 50
    assert shown[1:] == [50, 50]


def test_formulas_are_typeset_and_what_katex_cannot_read_stays_as_it_is(page):
    """KaTeX is the oracle of its own drawing; here: it runs under the policy, its fonts come, MathML stands beside."""
    tex = r"\frac{a}{b} \vec{v} \sqrt{x} \pmb{b} \fcolorbox{red}{blue}{c} \overbrace{x} \underline{y} \cancel{z}"
    page.evaluate("text => (show(text), typeset())", rf"\({tex}\) and \(\nonsense{{\) and \(\href{{http://a}}{{b}}\)")
    page.wait_for_selector(".math.typeset .katex-mathml math mfrac")
    first, second, third = page.locator(".math").all()
    assert first.locator(".katex-html .vlist").count() > 0
    assert "KaTeX_Main" in first.locator(".katex").evaluate("element => getComputedStyle(element).fontFamily")
    assert second.inner_text() == r"\(\nonsense{\)"
    assert second.get_attribute("class") == "math typeset failed"
    assert third.locator("a").count() == 0  # links need trust
    vector = first.locator(".katex-html svg").first
    assert vector.evaluate("svg => svg.style.width.endsWith('em') && svg.getBoundingClientRect().width < 40")
    loaded = page.evaluate("document.fonts.ready.then(() => [...document.fonts].map((font) => font.status))")
    assert loaded.count("loaded") >= 2


@pytest.mark.parametrize("tex", [r"\def\a{\a\a}\a", "{" * 3_900, r"\rule{9999em}{9999em}", r"\htmlStyle{color:red}{x}"])
def test_no_formula_hangs_or_takes_the_page(page, tex):
    page.evaluate("tex => (show(`\\\\(${tex}\\\\) end`), typeset())", tex)
    assert page.evaluate("prose.textContent.trim().endsWith(' end')")
    assert page.evaluate("prose.scrollWidth <= 1280 && prose.getBoundingClientRect().height < 2000")
    assert page.locator(".prose [style*=red]").count() == 0


DEEP = {
    "quotes": ">" * 20_000 + " x",
    "quotes with spaces": "> " * 5_000 + "x",
    "lists in one line": "- " * 5_000 + "x",
    "numbers in one line": "1. " * 5_000 + "x",
    "lists by indentation": "\n".join("  " * i + "- x" for i in range(400)),
    "quotes of every depth": "\n".join(">" * i + " x" for i in range(900)),
    "brackets": "[" * 20_000,
    "emphasis": "*a **b " * 300 + "c** d*" * 300,
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_nesting_is_shown_as_text_and_not_as_nothing(page, name):
    text = DEEP[name]
    shown = page.evaluate("text => { show(text); return prose.textContent; }", text)
    assert len(re.sub(r"\s", "", shown)) >= len(re.sub(r"[\s>*-]|1\.", "", text))
    assert page.evaluate("prose.getBoundingClientRect().height > 0")


def test_quotes_and_lists_of_a_usual_depth_are_nested(page):
    page.evaluate("text => show(text)", "> " * 12 + "x\n\n" + "\n".join("  " * i + "- x" for i in range(12)))
    assert page.locator(".prose blockquote").count() == 12
    assert page.locator(".prose li").count() == 12


def test_a_renderer_that_fails_shows_the_text(page):
    shown = page.evaluate(
        """() => {
          const { sanitize } = DOMPurify;
          DOMPurify.sanitize = () => { throw new Error("broken"); };
          const html = show("**a**\\n\\n<b>").innerHTML;
          DOMPurify.sanitize = sanitize;
          return html;
        }"""
    )
    assert shown == '<p class="plain" dir="auto">**a**\n\n&lt;b&gt;</p>'


def test_thoughts_are_folded_before_the_answer(page):
    html = html_of(page, "<think>\nWell, **so**.\n</think>\n\nThe answer.")
    assert html == (
        '<details class="thinking"><summary>Thoughts</summary><div><p>Well, <strong>so</strong>.</p></div></details>'
        "<p>The answer.</p>"
    )
    assert "<summary>Thinking</summary><div><p>Well" in html_of(page, "<think>Well")
    assert html_of(page, "About <think>x</think>") == "<p>About &lt;think&gt;x&lt;/think&gt;</p>"


def test_each_block_has_the_direction_of_its_own_text(page):
    page.evaluate("text => show(text)", "שלום `a`\n\nHello\n\n- مرحبا\n\n```\nאב\n```\n\n> שלום\n\n| א |\n|---|\n| ב |")
    directions = page.evaluate("[...prose.children].map((block) => getComputedStyle(block).direction)")
    assert directions == ["rtl", "ltr", "rtl", "ltr", "rtl", "rtl"]
    assert page.locator(".prose ul").evaluate("list => getComputedStyle(list).paddingRight") != "0px"
    assert page.locator(".prose blockquote").evaluate("quote => getComputedStyle(quote).borderRightWidth") != "0px"


GROWING = """Look:

- a
- [ ] **b** and c

```python
def f(x):
    return x
```

| a | b |
|---|---|
| 1 | 2 |

The end."""
PREFIXES = [GROWING[:end] for end in range(len(GROWING) + 1)]


def test_text_that_grows_looks_as_if_it_was_drawn_at_once(page):
    grown = page.evaluate("texts => texts.map((text) => grow(text).innerHTML)", PREFIXES)
    assert grown == page.evaluate("texts => texts.map((text) => show(text).innerHTML)", PREFIXES)


def test_a_selection_survives_the_growth_of_its_paragraph(page):
    selected = page.evaluate(
        """() => {
          show("First one.\\n\\nSecond **bold** and mo");
          const [first, second] = prose.querySelectorAll("p");
          getSelection().setBaseAndExtent(first.firstChild, 2, second.lastChild, 4);
          const rest = "re *and* `more`\\n\\n```\\nx\\n```\\n- y";
          for (let end = 1; end <= rest.length; end++) {
            grow("First one.\\n\\nSecond **bold** and mo" + rest.slice(0, end));
          }
          return getSelection().toString();
        }"""
    )
    assert selected == "rst one.\n\nSecond bold and"


def test_opened_thoughts_stay_open_and_a_formula_is_drawn_once(page):
    page.evaluate("show('<think>a'); typeset()")
    page.locator(".prose summary").click()
    page.evaluate("grow('<think>a $x$</think> b'); ")
    page.wait_for_selector(".prose .katex")
    page.evaluate("window.drawn = document.querySelector('.prose .katex')")
    page.evaluate("grow('<think>a $x$</think> b and more')")
    assert page.evaluate("document.querySelector('.prose details').open")
    assert page.evaluate("drawn.isConnected")
