// The list of conversations: pinned ones, then the others by day, newest first; with rename, pin and delete. Reads further
// pages from the server when the end of the list comes into view. What a search finds: search.js.

import { conversations } from "./api.js";
import { $, composing, confirmed, h, iconButton, replace } from "./dom.js";
import { drawHits, forgetHit, searching, startSearch } from "./search.js";

let list = []; // pinned first, each newest first
let hasMore = false;
let renaming = null; // {id, title}: the conversation whose title is being changed, and what it is so far
let current = null;
let guarded = null;
let onRemoved = null;

/** Callbacks. guard(f): runs f and shows its error; removed(id): a conversation was deleted. */
export function startSidebar({ guard, removed }) {
  guarded = guard;
  onRemoved = removed;
  startSearch({ guard, changed: draw });
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
    list.push(...page.data.filter(({ id }) => !list.some((one) => one.id === id)));
    hasMore = page.has_more;
  } finally {
    loading = false;
  }
  draw();
}

/** Moves a conversation to the top that is new or has a new message. */
export function touch(chat) {
  const known = list.find((one) => one.id === chat.id);
  const updated_at = new Date().toISOString();
  put({ pinned: false, ...known, id: chat.id, title: chat.title, updated_at });
}

/** Puts a conversation where it belongs: to the pinned ones or the others, by its last use. */
function put(one) {
  const others = list.filter(({ id }) => id !== one.id);
  const before = ({ pinned, updated_at }) => (pinned === one.pinned ? updated_at <= one.updated_at : one.pinned);
  const place = others.findIndex(before);
  if (place >= 0) list = others.toSpliced(place, 0, one);
  else list = hasMore && !one.pinned ? others : [...others, one]; // further pages will bring it
  draw();
}

/** Shows the title that the model gave. */
export function retitle({ id, title }) {
  list = list.map((one) => (one.id === id ? { ...one, title } : one));
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
  if (searching()) return replace($("conversations"), ...drawHits(current, line));
  const groups = new Map();
  for (const one of list) {
    const day = one.pinned ? "Pinned" : dayOf(one.updated_at);
    groups.set(day, [...(groups.get(day) ?? []), one]);
  }
  replace(
    $("conversations"),
    ...[...groups].map(([day, ones]) => h("section", {}, h("h2", {}, day), h("ul", {}, ones.map(line)))),
    ...(list.length === 0 ? [h("p", { class: "nothing" }, "Your conversations will be listed here.")] : []),
    sentinel,
  );
}

function line(one) {
  if (renaming?.id === one.id) return h("li", {}, renameBox(one));
  const title = one.title || "Untitled";
  const pin = one.pinned ? "Unpin" : "Pin";
  return h(
    "li",
    { class: one.id === current ? "current" : null },
    h("a", { href: `#/${one.id}`, "aria-current": one.id === current ? "page" : null, "data-key": `open ${one.id}`, title, dir: "auto" }, title),
    iconButton("pin", `${pin} ${title}`, () => guarded(() => setPinned(one, !one.pinned)), { key: `pin ${one.id}`, pressed: one.pinned }),
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

async function setPinned(one, pinned) {
  await conversations.change(one.id, { pinned });
  one.pinned = pinned;
  if (pinned || list.some(({ id }) => id === one.id)) put({ ...one });
  else draw();
}

async function setTitle(one, title) {
  await conversations.change(one.id, { title });
  one.title = title;
  retitle(one);
  onRenamed(one);
}

let onRenamed = () => {};
export const whenRenamed = (callback) => (onRenamed = callback);

async function remove(one) {
  const text = `"${one.title || "Untitled"}" will be gone for good, with its votes.`;
  if (!(await confirmed("Delete this conversation?", text))) return;
  await conversations.remove(one.id);
  list = list.filter((other) => other.id !== one.id);
  forgetHit(one.id);
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
