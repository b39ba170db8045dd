// Search in titles and messages: the server finds, this shows. Typing asks again after a short rest.

import { conversations } from "./api.js";
import { $, h } from "./dom.js";

const REST_MS = 200; // after the last letter

let hits = null; // conversations with the message that holds the words, `hit`; null: not asked yet
let rest = null; // what the server has not searched yet
let asked = 0; // counts, so that a late answer does not replace a newer one
let timer = 0;
let guarded = null;
let changed = null;

const words = () => $("search").value.trim();

export const searching = () => words() !== "";

/** guard(f): runs f and shows its error; changed(): draw the list again. */
export function startSearch(callbacks) {
  ({ guard: guarded, changed } = callbacks);
  $("search").oninput = () => {
    clearTimeout(timer);
    asked++;
    hits = rest = null;
    changed();
    if (searching()) timer = setTimeout(() => guarded(find), REST_MS);
  };
}

async function find() {
  const order = asked;
  const page = await conversations.search(words().slice(0, 200), rest);
  if (order !== asked) return;
  const known = new Set(hits?.map(({ id }) => id));
  hits = [...(hits ?? []), ...page.data.filter(({ id }) => !known.has(id))];
  rest = page.rest;
  changed();
}

/** A conversation that is deleted. */
export function forgetHit(id) {
  hits = hits?.filter((one) => one.id !== id) ?? null;
  changed();
}

/** The elements of what was found. line(one): a conversation of the list, for those whose title holds the words. */
export function drawHits(current, line) {
  if (hits === null) return [h("p", { class: "nothing" }, "Searching...")];
  const titles = hits.filter(({ hit }) => !hit);
  const messages = hits.filter(({ hit }) => hit);
  const section = (name, lines) => lines.length > 0 && h("section", {}, h("h2", {}, name), h("ul", {}, lines));
  const more = h("button", { type: "button", class: "link more", onclick: () => guarded(find), "data-key": "search on" }, "Search older messages");
  const none = hits.length === 0 && h("p", { class: "nothing" }, `Nothing with "${words()}"${rest === null ? "" : " in the newer messages"}.`);
  return [section("Titles", titles.map(line)), section("Messages", messages.map((one) => drawHit(one, current))), none, rest !== null && more].filter(Boolean);
}

function drawHit({ id, title, hit }, current) {
  const whose = hit.role === "user" ? "You: " : "";
  return h(
    "li",
    { class: id === current ? "current" : null },
    h(
      "a",
      { class: "hit", href: `#/${id}/${hit.message_id}`, "data-key": `hit ${id}`, dir: "auto" },
      h("span", { class: "hit-title" }, title || "Untitled"),
      h("span", { class: "hit-text" }, whose, marked(hit.text)),
    ),
  );
}

/** A text with the words in <mark>. */
function marked(text) {
  const sought = words().split(/\s+/).map((word) => RegExp.escape?.(word) ?? word.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&"));
  const parts = text.split(new RegExp(`(${sought.join("|")})`, "iu"));
  return parts.map((part, i) => (i % 2 ? h("mark", {}, part) : part));
}
