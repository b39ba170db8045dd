// Colours for code: comments, strings, numbers and words that most languages share. One regular expression, no grammars.

const WORDS = new Set(
  ("and as async await bool break case catch char class const continue def default del delete do double elif else enum " +
    "except export extends false False finally float fn for foreach from func function global if impl implements " +
    "import in int interface is lambda let long loop match module mut new nil None nonlocal not null or package pass " +
    "private protected pub public raise return self short static str string struct super switch then this throw trait " +
    "true True try type typeof undefined union unsigned use using var void where while with yield " +
    "SELECT FROM WHERE JOIN ON GROUP ORDER BY INSERT INTO VALUES UPDATE SET CREATE TABLE AND OR NOT NULL LIMIT AS").split(" "),
);
const HASH_COMMENTS = new Set(["python", "py", "bash", "sh", "shell", "zsh", "yaml", "yml", "toml", "ruby", "rb", "r", "make", "makefile", "dockerfile", "ini", "perl", "jl", "julia", ""]);
const STRING = String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'|` + "`(?:\\\\.|[^`\\\\])*`?";
const REST = String.raw`\b\d[\w.]*\b|[A-Za-z_$][\w$]*`;
const pattern = (comment) => new RegExp(`(?<comment>${comment})|(?<string>${STRING})|${REST}`, "g");
const HASH = pattern(String.raw`#[^\n]*`);
const SLASH = pattern(String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)|--[ ][^\n]*`);
const LONGEST = 20000; // characters; longer code is shown plain

/** Wraps the tokens of a <code> element, whose only child is its text. */
export function highlight(code, language) {
  const text = code.textContent;
  if (text.length > LONGEST || ["text", "txt", "plain", "markdown", "md"].includes(language)) return;
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(HASH_COMMENTS.has(language) ? HASH : SLASH)) {
    const kind = kindOf(found);
    if (!kind) continue;
    const span = document.createElement("span");
    span.className = `code-${kind}`;
    span.textContent = found[0];
    parts.push(text.slice(end, found.index), span);
    end = found.index + found[0].length;
  }
  code.replaceChildren(...parts, text.slice(end));
}

function kindOf(found) {
  if (found.groups.comment) return "comment";
  if (found.groups.string) return "string";
  if (/^\d/.test(found[0])) return "number";
  return WORDS.has(found[0]) ? "word" : null;
}
