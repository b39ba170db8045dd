// Turns the markdown of a model into elements that are safe to show, in two steps: raw HTML is shown as text, and the
// output of marked goes through DOMPurify with a short list of tags. No element can fetch anything.

import { Marked } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js";

import { h, icon } from "./dom.js";
import { highlight } from "./highlight.js";

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

const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`, // a link: never fetched
    checkbox: ({ checked }) => (checked ? "&#9745; " : "&#9744; "),
  },
});

/** A fragment with the rendered text. */
export function render(text) {
  const fragment = globalThis.DOMPurify.sanitize(marked.parse(text), ALLOWED);
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
  return fragment;
}

function codeBlock(pre) {
  const code = h("code", {}, pre.textContent);
  const language = /language-([\w+#.-]+)/.exec(pre.querySelector("code")?.className)?.[1] ?? "";
  highlight(code, language.toLowerCase());
  return h(
    "figure",
    { class: "code" },
    h(
      "figcaption",
      {},
      h("span", {}, language || "code"),
      h("button", { type: "button", class: "copy-code", "aria-label": "Copy code" }, icon("copy"), h("span", {}, "Copy")),
    ),
    h("pre", { tabindex: "0" }, code),
  );
}
