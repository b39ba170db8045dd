// The labeller's view: an item, its ranking, and what is done with it. Work that is not submitted is kept in this tab.

import { label } from "../api.js";
import { $, announce, composing, h, replace, toast } from "../dom.js";
import { render } from "../markdown.js";
import { Cards } from "./cards.js";

const WHO = { system: "System", developer: "System", user: "User", assistant: "Assistant", tool: "Tool" };

let item = null;
let touched = false; // whether the labeller has said anything about the order
let shownAt = 0;
let busy = false;
let guard = (action) => action();
const cards = new Cards($("answers"), () => {
  touched = true;
  keep();
});

/** Shows the labeller's item. `guarded` runs what calls the server, and shows its error. */
export async function startJudging(guarded, me) {
  guard = guarded;
  $("guidelines-text").replaceChildren(render(me.guidelines || "There are none: rank the answers as you see fit."));
  const read = `penstock.guidelines.${await digest(me.guidelines)}`;
  if (me.guidelines && !localStorage.getItem(read)) {
    $("guidelines").showModal();
    localStorage.setItem(read, "yes");
  }
  await next();
}

export const next = () => guard(async () => show(await label.next()));

const digest = async (text) => {
  if (!crypto.subtle) return String(text.length); // pages that are not served over https or from this machine
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text)));
  return [...bytes.slice(0, 8)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
};

function show({ item: fresh, progress }) {
  drawProgress(progress);
  item = fresh;
  $("item").hidden = !item;
  $("nothing").hidden = Boolean(item);
  if (!item) {
    $("nothing").textContent = progress.left ? "Others hold all that is left. Come back in a while." : "Nothing is left to label. Thank you.";
    announce($("nothing").textContent);
    return;
  }
  const turns = typeof item.prompt === "string" ? [{ role: null, content: item.prompt }] : item.prompt;
  replace($("turns"), ...turns.map(turn));
  const kept = JSON.parse(sessionStorage.getItem(place()) ?? "null") ?? item.judgement;
  touched = Boolean(kept?.ranking);
  cards.show(item.answers, kept?.ranking, kept?.edits ?? {});
  $("note").value = kept?.note ?? "";
  $("flag").value = kept?.flag ?? "";
  shownAt = performance.now();
  $("judging").scrollTop = 0;
  cards.focus();
  announce(`A new item with ${item.answers.length} answers. ${progress.left} left.`);
}

function turn({ role, content }) {
  const text = h("div", { class: "prose" });
  text.append(role === "assistant" ? render(content) : h("p", { class: "plain", dir: "auto" }, content));
  return h("div", { class: `prompt-turn by-${role}` }, role && h("p", { class: "who" }, WHO[role] ?? role), text);
}

function drawProgress({ done, left }) {
  $("progress").value = done + left ? done / (done + left) : 1;
  $("progress-words").textContent = `${done} done, ${left} left`;
}

const place = () => `penstock.label.${item.id}`;

const said = () => ({ ranking: cards.levels, edits: cards.edits, note: $("note").value || null, flag: $("flag").value || null });

function keep() {
  sessionStorage.setItem(place(), JSON.stringify(said()));
}

async function send(judgement, words) {
  if (!item || busy) return;
  busy = true;
  const seconds = Math.min(86400, Math.round((performance.now() - shownAt) / 100) / 10);
  try {
    await guard(async () => {
      try {
        await label.judge(item.id, { ...said(), ...judgement, seconds });
        toast(words);
      } catch (error) {
        if (error.status !== 409 && error.status !== 404) throw error;
        toast(error.message); // somebody else has it: on to the next
      }
      sessionStorage.removeItem(place());
      show(await label.next());
    });
  } finally {
    busy = false;
  }
}

async function submit() {
  if (!item) return;
  if (cards.editing) return toast("Keep or cancel what you are rewriting first.");
  if (!touched) {
    touched = true; // an order that nobody looked at is not a ranking
    return toast("You have not changed the order. Submit again if it is right as it stands.");
  }
  await send({ outcome: "ranked" }, "Submitted.");
}

const skip = () => send({ outcome: "skipped", ranking: null, edits: {} }, "Skipped.");

async function undo() {
  if (busy) return;
  await guard(async () => {
    const answer = await label.undo();
    if (!answer.item) return toast("There is nothing to take back.");
    sessionStorage.removeItem(`penstock.label.${answer.item.id}`);
    show(answer);
    toast("Taken back: judge it again.");
  });
}

$("submit").onclick = submit;
$("skip").onclick = skip;
$("undo").onclick = undo;
$("note").oninput = keep;
$("flag").onchange = keep;
$("open-guidelines").onclick = () => $("guidelines").showModal();
$("open-keys").onclick = () => $("keys").showModal();

const KEYS = {
  s: skip, u: undo, g: () => $("guidelines").showModal(), "?": () => $("keys").showModal(),
  f: () => $("flag").focus(), n: () => $("note").focus(),
};

document.addEventListener("keydown", (event) => {
  if ($("judging").hidden || composing(event) || document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    return submit();
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
  if (item && /^Arrow(Up|Down)$/.test(event.key) && event.target === document.body) {
    event.preventDefault();
    return cards.focus();
  }
  if (!KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});
