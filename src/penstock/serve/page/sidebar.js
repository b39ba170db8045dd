// The list of conversations: newest first, grouped by day, with search, rename and delete. Reads further pages from the
// server when the end of the list comes into view, and for a search.

import { conversations } from "./api.js";
import { $, composing, h, iconButton, replace } from "./dom.js";

let list = []; // newest first
let hasMore = false;
let renaming = null; // {id, title}: the conversation whose title is being changed, and what it is so far
let current = null;
let guarded = null;
let onRemoved = null;

/** Callbacks. guard(f): runs f and shows its error; removed(id): a conversation was deleted. */
export function startSidebar({ guard, removed }) {
  guarded = guard;
  onRemoved = removed;
  $("search").oninput = () => guarded(search);
  new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && guarded(more)).observe(sentinel);
}

const sentinel = h("div", { class: "sentinel" });

export async function loadList() {
  ({ data: list, has_more: hasMore } = await conversations.list());
  draw();
}

let loading = false;

async function more() {
  if (!hasMore || loading) return;
  loading = true;
  try {
    const page = await conversations.list(list.at(-1).id);
    list.push(...page.data);
    hasMore = page.has_more;
  } finally {
    loading = false;
  }
  draw();
}

/** Reads the whole list, because a search needs all titles. */
async function search() {
  draw();
  while (hasMore && !loading && $("search").value) await more();
}

/** Moves a conversation to the top that is new, renamed or has a new message. */
export function touch(chat) {
  const known = list.find((one) => one.id === chat.id);
  const updated_at = new Date().toISOString();
  list = [{ ...known, id: chat.id, title: chat.title, updated_at }, ...list.filter((one) => one !== known)];
  draw();
}

export function setCurrent(id) {
  current = id;
  draw();
}

let drawing = false;

function draw() {
  drawing = true; // a box that leaves the list loses the keyboard, and that is no end of the renaming
  drawList();
  drawing = false;
  $("conversations").querySelector("input")?.focus();
}

function drawList() {
  const wanted = $("search").value.trim().toLowerCase();
  const shown = list.filter((one) => (one.title ?? "").toLowerCase().includes(wanted));
  const groups = new Map();
  for (const one of shown) {
    const day = dayOf(one.updated_at);
    groups.set(day, [...(groups.get(day) ?? []), one]);
  }
  const empty = wanted ? `Nothing called "${$("search").value.trim()}".` : "Your conversations will be listed here.";
  replace(
    $("conversations"),
    ...[...groups].map(([day, ones]) => h("section", {}, h("h2", {}, day), h("ul", {}, ones.map(line)))),
    ...(shown.length === 0 ? [h("p", { class: "nothing" }, empty)] : []),
    sentinel,
  );
}

function line(one) {
  if (renaming?.id === one.id) return h("li", {}, renameBox(one));
  const title = one.title || "Untitled";
  return h(
    "li",
    { class: one.id === current ? "current" : null },
    h("a", { href: `#/${one.id}`, "aria-current": one.id === current ? "page" : null, "data-key": `open ${one.id}`, title, dir: "auto" }, title),
    iconButton("edit", `Rename ${title}`, () => startRename(one), { key: `rename ${one.id}` }),
    iconButton("trash", `Delete ${title}`, () => guarded(() => remove(one)), { key: `delete ${one.id}` }),
  );
}

function startRename(one) {
  renaming = { id: one.id, title: one.title ?? "" };
  draw();
  $("conversations").querySelector("input").select();
}

function renameBox(one) {
  const box = h("input", { type: "text", "aria-label": "New title", maxlength: "200", dir: "auto", value: renaming.title });
  box.oninput = () => (renaming.title = box.value);
  const close = () => {
    renaming = null;
    draw();
  };
  box.onkeydown = (event) => {
    if (composing(event)) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      box.onblur = null;
      close();
    } else if (event.key === "Enter") box.blur();
  };
  box.onblur = () => {
    if (drawing) return;
    box.onblur = null;
    const title = box.value.trim();
    close();
    if (title && title !== one.title) guarded(() => setTitle(one, title));
  };
  return box;
}

async function setTitle(one, title) {
  await conversations.change(one.id, { title });
  one.title = title;
  draw();
  onRenamed(one);
}

let onRenamed = () => {};
export const whenRenamed = (callback) => (onRenamed = callback);

async function remove(one) {
  $("confirm-text").textContent = `"${one.title || "Untitled"}" will be gone for good, with its votes.`;
  $("confirm").showModal();
  await new Promise((resolve) => ($("confirm").onclose = resolve));
  if ($("confirm").returnValue !== "yes") return;
  await conversations.remove(one.id);
  list = list.filter((other) => other.id !== one.id);
  draw();
  onRemoved(one.id);
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight - Date.parse(time)) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  return days <= 7 ? "Last seven days" : "Older";
}
