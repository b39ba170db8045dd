// Turns the markdown of a model into elements that are safe to show, in two steps: raw HTML is shown as text, and the
// output of marked goes through DOMPurify with a short list of tags. No element can fetch anything.

import { Marked, Tokenizer } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js";

import { escaped, h, icon } from "./dom.js";
import { highlight } from "./highlight.js";
import { markFormulas, maskFormulas, mathsExtensions } from "./maths.js";
import { splitThinking } from "./thinking.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
// Lists and quotes within each other, by their signs in one line or by indentation: marked takes time and stack for each.
const TOO_DEEP = /^(?:[ \t]*(?:>|[-*+](?=[ \t])|\d{1,9}[.)])){33,}[ \t]*[^\s*+>-]|^[ \t]{100,}(?:[-*+]|\d{1,9}[.)])[ \t]/m;

const CJK = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\u3000-\u303f\uff00-\uffef]/u;
const STARS = /^(\*{1,3})(?=[^\s*])((?:\\.|`[^`]*`|(?!\1)\*|[^*\\`])+?)(?<=[^\s*\\])\1(?!\*)/;

/** CommonMark wants a space or punctuation outside of stars that have punctuation inside, and Chinese, Japanese and
 * Korean write neither: there stars around a text are enough. */
const cjkEmphasis = {
  name: "cjkEmphasis",
  level: "inline",
  tokenizer(text) {
    const match = STARS.exec(text);
    if (!match) return;
    const [raw, stars, inner] = match;
    const next = text.slice(raw.length, raw.length + 2);
    const opens = /^[\p{P}\p{S}]/u.test(inner);
    const closes = /[\p{P}\p{S}]$/u.test(inner) && /^[^\s\p{P}\p{S}]/u.test(next);
    if (!(opens || closes) || !CJK.test(inner + next)) return;
    return { type: "cjkEmphasis", raw, level: stars.length, tokens: this.lexer.inlineTokens(inner) };
  },
  renderer({ level, tokens }) {
    const text = this.parser.parseInline(tokens);
    const strong = level > 1 ? `<strong>${text}</strong>` : text;
    return level === 2 ? strong : `<em>${strong}</em>`;
  },
};

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  extensions: [...mathsExtensions, cjkEmphasis],
  tokenizer: {
    del: (text) => (text.startsWith("~~") ? false : undefined), // "1~3" is a range
    emStrong(text, masked, before) {
      return Tokenizer.prototype.emStrong.call(this, text, maskFormulas(masked, text), before);
    },
  },
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`, // a link: never fetched
    checkbox: ({ checked }) => `<code class="task">${checked ? "&#9745;" : "&#9744;"}</code> `,
  },
});

/** A fragment with the rendered text, a model's thoughts folded before it. */
export function render(text) {
  const { thinking, closed, answer } = splitThinking(text);
  const fragment = renderMarkdown(answer);
  if (thinking !== null) fragment.prepend(drawThinking(thinking, closed));
  return fragment;
}

function drawThinking(thinking, closed) {
  return h(
    "details",
    { class: "thinking" },
    h("summary", {}, closed ? "Thoughts" : "Thinking"),
    h("div", {}, renderMarkdown(thinking)),
  );
}

/** The text as it is where it cannot be rendered: no answer may take the others from the page. */
function renderMarkdown(text) {
  try {
    if (TOO_DEEP.test(text)) throw new RangeError("too deep");
    return dress(globalThis.DOMPurify.sanitize(marked.parse(text), ALLOWED));
  } catch {
    const fragment = document.createDocumentFragment();
    fragment.append(h("p", { class: "plain", dir: "auto" }, text));
    return fragment;
  }
}

function dress(fragment) {
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) pre.replaceWith(codeBlock(pre));
  for (const box of fragment.querySelectorAll("code.task")) drawTask(box);
  markFormulas(fragment);
  for (const block of fragment.children) if (!block.dir) block.dir = "auto";
  return fragment;
}

/** A box that shows whether a task is done; nobody can tick it. */
function drawTask(box) {
  const done = box.textContent === "\u2611";
  box.closest("li")?.classList.add("task");
  box.replaceWith(h("span", { class: "tick", role: "img", "aria-label": done ? "Done:" : "To do:" }, box.textContent));
}

function codeBlock(pre) {
  const code = h("code", {}, pre.textContent);
  const language = /language-([\w+#.-]+)/.exec(pre.querySelector("code")?.className)?.[1] ?? "";
  highlight(code, language.toLowerCase());
  return h(
    "figure",
    { class: "code", dir: "ltr" },
    h(
      "figcaption",
      {},
      h("span", {}, language || "code"),
      h("button", { type: "button", class: "copy-code", "aria-label": "Copy code" }, icon("copy"), h("span", {}, "Copy")),
    ),
    h("pre", { tabindex: "0" }, code),
  );
}
