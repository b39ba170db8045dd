// Formulas: \( \), \[ \], $$ $$ and $ $ in markdown, and KaTeX, which is read when the first formula is to be seen.
// A formula is drawn as its source until KaTeX is there, and for good where KaTeX cannot read it.

import { escaped } from "./dom.js";

const SOURCE = String.raw`\\\((?:(?!\n\s*\n)[\s\S]){1,4000}?\\\)|\\\[(?:(?!\n\s*\n)[\s\S]){1,4000}?\\\]|\$\$(?:\\.|(?!\n\s*\n)[^\\$]){1,4000}?\$\$`;
// After Pandoc's rule: no space within, no letter or digit behind. No code within, for "`$a` and `$b`".
const DOLLARS = String.raw`\$(?=[^\s$])(?:\\.|[^\\$\n` + "`" + String.raw`]){1,500}?(?<=[\p{L}\p{N})\]}'!|*])\$(?![A-Za-z\d$])`;
const INLINE = new RegExp(`^(?:${SOURCE}|${DOLLARS})`, "u");
const ALL = new RegExp(`${SOURCE}|${DOLLARS}`, "gu");
const BLOCK = /^ {0,3}(?:\$\$(?:\\.|(?!\n[ \t]*\n)[^\\$]){1,9999}?\$\$|\\\[[\s\S]{1,9999}?\\\])[ \t]*(?:\n|$)/;
const BEGINS = /(?<![\w$\\])\$|\\[([]/;
const DELIMITERS = /^(?:\$\$?|\\[([])|(?:\$\$?|\\[)\]])$/g;

/** "$5 (or 6$)" is money: between single dollars there is a sign of mathematics, or no word. */
const isMaths = (raw) => !/^\$[^$]/.test(raw) || /[\\^_=<>]/.test(raw) || !/\p{L}{2}/u.test(raw);

const kind = (raw) => (/^(?:\$\$|\\\[)/.test(raw) ? "math display" : "math");

/** For marked. The output is the source in a <code>, which `markFormulas` finds behind the sanitiser. */
export const mathsExtensions = [
  {
    name: "formula",
    level: "inline",
    start: (text) => BEGINS.exec(text)?.index,
    tokenizer(text) {
      const raw = INLINE.exec(text)?.[0];
      if (raw && isMaths(raw)) return { type: "formula", raw };
    },
    renderer: ({ raw }) => `<code class="${kind(raw)}">${escaped(raw)}</code>`,
  },
  {
    name: "formulaBlock",
    level: "block",
    start(text) {
      const begin = /\n {0,3}(?:\$\$|\\\[)/.exec(text);
      return begin ? begin.index + 1 : undefined;
    },
    tokenizer(text) {
      const raw = BLOCK.exec(text)?.[0];
      if (raw) return { type: "formulaBlock", raw };
    },
    renderer: ({ raw }) => `<p><code class="math display">${escaped(raw.trim())}</code></p>`,
  },
];

const masks = new Map(); // of the texts that marked is in: it asks for each sign of a text and of the texts within it

/** Of a text that ends with `rest`, as marked masks it: each formula as letters, because a star in it is a product. */
export function maskFormulas(masked, rest) {
  if (!/[$\\]/.test(rest)) return masked;
  let known = masks.get(masked);
  if (!known?.rest.endsWith(rest)) {
    if (masks.size >= 32) masks.clear();
    masks.set(masked, (known = { rest, mask: maskOf(masked, rest) }));
  }
  return known.mask;
}

function maskOf(masked, rest) {
  const begin = masked.length - rest.length;
  const pieces = [];
  let end = 0;
  for (const { 0: raw, index } of rest.matchAll(ALL)) {
    if (!isMaths(raw)) continue;
    pieces.push(masked.slice(end, begin + index), "a".repeat(raw.length));
    end = begin + index + raw.length;
  }
  return pieces.join("") + masked.slice(end);
}

export function markFormulas(fragment) {
  for (const code of fragment.querySelectorAll("code.math")) {
    const span = document.createElement("span");
    span.className = code.className;
    span.dir = "ltr";
    span.dataset.tex = code.textContent.replace(DELIMITERS, "").trim();
    span.textContent = code.textContent;
    code.replaceWith(span);
  }
}

let katex = null; // once it is there
let loading = null;

/** Draws the formulas below an element. Those before KaTeX is there come later, and then it dispatches "resized". */
export function typeset(root) {
  const formulas = root.querySelectorAll(".math:not(.typeset)");
  if (formulas.length === 0) return;
  if (katex) {
    for (const formula of formulas) draw(formula);
    return;
  }
  loading ??= load();
  loading.then(() => {
    typeset(root);
    root.dispatchEvent(new CustomEvent("resized", { bubbles: true }));
  }, () => (loading = null)); // the sources stay, and the next formula tries again
}

async function load() {
  const sheet = document.createElement("link");
  sheet.rel = "stylesheet";
  sheet.href = new URL("vendor/katex.min.css", import.meta.url).href;
  document.head.append(sheet);
  await Promise.all([import("./vendor/katex.min.js"), new Promise((resolve) => (sheet.onload = sheet.onerror = resolve))]);
  katex = globalThis.katex;
}

function draw(formula) {
  formula.classList.add("typeset");
  const displayMode = formula.classList.contains("display");
  try {
    const tree = katex.__renderToDomTree(formula.dataset.tex, {
      displayMode, throwOnError: true, trust: false, strict: false, maxSize: 20, maxExpand: 200,
    });
    allowStyles(tree);
    formula.replaceChildren(tree.toNode());
  } catch {
    formula.classList.add("failed");
  }
}

/** The page's policy forbids the attribute `style`, which KaTeX writes for a few shapes; a style set by script is allowed. */
function allowStyles(node) {
  const style = node.attributes?.style;
  if (style !== undefined) {
    const { toNode } = node;
    delete node.attributes.style;
    node.toNode = () => {
      const element = toNode.call(node);
      element.style.cssText = style;
      return element;
    };
  }
  node.children?.forEach(allowStyles);
}
