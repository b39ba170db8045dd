// The page: the composer, the keyboard, and the calls between the other files. Conversations: chat.js, tree.js;
// their looks: thread.js, sidebar.js, style.css; the server's routes: api.js.

import { listen, models, session, conversations } from "./api.js";
import { attached, startAttachments, withFiles } from "./attachments.js";
import { answering, chat, forget, newChat, openChat, refresh, send, setSystem, show, stop, watch } from "./chat.js";
import { $, announce, copy, h, icon, replace, sends, toast } from "./dom.js";
import { startImport } from "./import/dialog.js";
import { askForKey, guard, logOut, showApp, startLogin } from "./login.js";
import { startPresets } from "./presets.js";
import { change, makeControls, settings } from "./settings.js";
import { startShortcuts } from "./shortcuts.js";
import { loadList, retitle, setCurrent, startSidebar, touch, whenRenamed } from "./sidebar.js";
import { farFromEnd, keepUp, startScroll, toEnd } from "./scroll.js";
import { drawText, drawThread, editLast, isDrawn } from "./thread.js";
import { path } from "./tree.js";
import { dropUnsent, keepUnsent, takeLeft, unsentOf } from "./unsent.js";
import { drawGauge, setContexts } from "./usage.js";

const THEMES = ["system", "light", "dark"];
const narrow = matchMedia("(max-width: 48rem)"); // where the list is a drawer
const IDEAS = ["What colour is the fox?", "Explain how a penstock works", "Write a haiku about a river"];

// Start ---------------------------------------------------------------------------------------------------------------

async function enter() {
  if (!session.owner) return location.replace("label");
  showApp();
  if (await showModels()) {
    await guard(loadList);
    await route();
    focusPrompt();
  }
}

/** False if the server has no model yet; then the page asks again. */
async function showModels() {
  let known = [];
  try {
    const cards = await models();
    setContexts(cards);
    known = cards.map(({ id }) => id);
  } catch (error) {
    banner(error.busy ? "The model is being loaded. This takes a moment." : error.message);
    setTimeout(() => guard(enter), 1000 * (error.retryAfter ?? 2));
    return false;
  }
  banner(known.length > 0 ? null : "No model here can chat. A reward model gives scores: POST /v1/score.");
  for (const [id, name] of [["model", "model"], ["model-b", "modelB"]]) {
    const usual = known[id === "model-b" ? known.length - 1 : 0];
    if (usual && !known.includes(settings[name])) change({ [name]: usual });
    $(id).replaceChildren(...known.map((model) => h("option", { value: model, selected: model === settings[name] }, model)));
    $(id).onchange = () => change({ [name]: $(id).value });
  }
  drawCompare();
  return true;
}

/** Opens the conversation of the address: "#/conv_5c...", or "#/conv_5c.../msg_7a..." at a message; without a hash, a new
 * one. */
async function route() {
  const [, id, messageId] = /^#\/([^/]+)(?:\/(.+))?$/.exec(location.hash) ?? [];
  if (messageId) history.replaceState(null, "", `#/${id}`);
  if (id && id === chat.id) {
    await guard(refresh);
    return messageId && goTo(messageId);
  }
  closeSidebar();
  const opened = id && (await guard(() => openChat(id)));
  if (!opened) {
    history.replaceState(null, "", location.pathname);
    newChat();
  }
  setCurrent(chat.id);
  writeUnsent();
  toEnd();
  if (messageId) goTo(messageId);
}

/** Shows a message that a search found. */
function goTo(messageId) {
  closeSidebar();
  show(messageId);
  const turn = document.getElementById(messageId);
  turn?.scrollIntoView({ block: "center" });
  turn?.focus({ preventScroll: true });
}

function goToNewChat() {
  history.pushState(null, "", location.pathname);
  closeSidebar();
  newChat();
  setCurrent(null);
  writeUnsent();
  focusPrompt();
}

/** Not on phones: their keyboard would cover half of the screen. */
function focusPrompt() {
  if (matchMedia("(hover: hover)").matches) $("prompt").focus();
}

// Drawing -------------------------------------------------------------------------------------------------------------

function draw(ended) {
  const empty = chat.tree.messages.size === 0;
  $("app").classList.toggle("empty", empty);
  if (empty) drawWelcome();
  else drawThread(guard);
  document.title = chat.title ? `${chat.title} - penstock` : "penstock";
  $("title").textContent = chat.title || "New chat";
  drawGauge(path(chat.tree));
  drawSend();
  drawLatest();
  if (ended?.controller === null) announce(ended.error?.message ?? "The answer is complete.");
}

function drawWelcome() {
  const idea = (text) =>
    h("button", { type: "button", class: "idea", onclick: () => fill(text) }, text);
  replace(
    $("thread"),
    h("div", { class: "welcome" }, icon("drop"), h("h2", {}, "What shall we talk about?"), h("div", { class: "ideas" }, IDEAS.map(idea))),
  );
}

function fill(text) {
  write(text);
  $("prompt").focus();
}

/** Puts a text into the message field. */
function write(text) {
  $("prompt").value = text;
  keepUnsent(chat.id, text);
  sizePrompt();
}

/** What was written here before, and what was on its way when the page was left and has not arrived. */
function writeUnsent() {
  const left = takeLeft(chat.id);
  const unsent = unsentOf(chat.id);
  const lost = left && !chat.tree.messages.has(left.id) && !unsent.startsWith(left.content);
  write(lost ? [left.content, unsent].filter(Boolean).join("\n") : unsent);
}

function drawSend() {
  const busy = answering().length > 0;
  $("send").setAttribute("aria-label", busy ? "Stop" : "Send");
  $("send").title = busy ? "Stop (Esc)" : "Send (Enter)";
  $("send").classList.toggle("busy", busy);
  $("send").disabled = !busy && !attached() && !$("prompt").value.trim();
  $("send-icon").setAttribute("href", busy ? "#icon-stop" : "#icon-arrow-up");
}

function drawCompare() {
  document.body.classList.toggle("comparing", settings.compare);
  $("compare").setAttribute("aria-pressed", String(settings.compare));
}

function drawTheme() {
  const theme = document.documentElement.dataset.theme;
  $("theme-name").textContent = `Theme: ${theme}`;
}

const growing = new Set(); // answers whose text is to be drawn in the next frame
let frame = 0;
let restUntil = 0;

/** Draws new text once per frame, and less often where drawing is slow: a long answer must not freeze the page. */
function grow(message) {
  growing.add(message);
  frame ||= requestAnimationFrame(drawGrown);
}

function drawGrown(now) {
  frame = 0;
  if (now < restUntil) {
    frame = requestAnimationFrame(drawGrown);
    return;
  }
  for (const message of growing) {
    if (isDrawn(message)) drawText(message);
    else if (chat.tree.messages.has(message.id)) drawThread(guard);
  }
  growing.clear();
  restUntil = now + 4 * (performance.now() - now);
  keepUp();
  drawLatest();
}

function drawLatest() {
  $("to-latest").hidden = !farFromEnd();
}

setInterval(() => {
  for (const span of document.querySelectorAll(".countdown")) {
    span.textContent = String(Math.max(0, Math.ceil((Number(span.dataset.until) - Date.now()) / 1000)));
  }
}, 250);

// The server comes and goes -------------------------------------------------------------------------------------------

function banner(text) {
  $("banner").textContent = text ?? "";
  $("banner").hidden = !text;
}

let probing = 0;

function setReachable(reachable) {
  document.body.classList.toggle("offline", !reachable);
  if (reachable && probing) {
    clearInterval(probing);
    probing = 0;
    banner(null);
    announce("The server is back.");
  } else if (!reachable && !probing) {
    banner(navigator.onLine ? "The server cannot be reached. Looking for it..." : "You are offline.");
    probing = setInterval(() => session.resume().catch(() => {}), 2000);
  }
}

// Wiring --------------------------------------------------------------------------------------------------------------

listen({ signedOut: () => askForKey("Please log in again."), reachable: setReachable });
watch({
  changed: draw,
  grew: grow,
  titled: (one) => {
    retitle(one);
    if (chat === one) draw();
  },
  begun: (one) => {
    history.replaceState(null, "", `#/${one.id}`);
    touch(one);
    setCurrent(one.id);
  },
});
startSidebar({
  guard,
  removed: (id) => {
    forget(id);
    keepUnsent(id, "");
    if (chat.id === id) goToNewChat();
  },
});
whenRenamed((one) => {
  if (chat.id !== one.id) return;
  Object.assign(chat, { title: one.title, named: true });
  draw();
});
makeControls();
startPresets(({ model }) => {
  const known = [...$("model").options].some(({ value }) => value === model);
  if (known) change({ model: ($("model").value = model) });
  drawUsual();
});
startAttachments(drawSend);
startImport({ guard, done: loadList });
drawTheme();
drawFold();

$("log-out").onclick = async () => {
  await logOut();
  dropUnsent();
  location.href = location.pathname;
};

$("new-chat").onclick = goToNewChat;
$("new-chat-narrow").onclick = goToNewChat;
window.addEventListener("hashchange", () => $("app").hidden || /^#[^/]/.test(location.hash) || route()); // "#prompt": a jump
window.addEventListener("offline", () => setReachable(false));
window.addEventListener("online", () => guard(refresh));
document.addEventListener("visibilitychange", () => document.hidden || $("app").hidden || guard(refresh));

$("theme").onclick = () => {
  const { dataset } = document.documentElement;
  dataset.theme = THEMES[(THEMES.indexOf(dataset.theme) + 1) % THEMES.length];
  localStorage.setItem("penstock.theme", dataset.theme);
  drawTheme();
};

$("compare").onclick = () => {
  change({ compare: !settings.compare });
  drawCompare();
};

$("composer").onsubmit = async (event) => {
  event.preventDefault();
  if (answering().length > 0) return guard(stop);
  const text = $("prompt").value;
  if ((!text.trim() && !attached()) || $("send").dataset.sending) return;
  const { content, back } = withFiles(text);
  $("send").dataset.sending = "yes"; // until the server has the message; then the button is Stop
  const one = chat;
  fill("");
  toEnd();
  let sent = false;
  try {
    sent = await guard(() => send(content));
  } finally {
    delete $("send").dataset.sending;
    if (!sent) {
      takeBack(one, text);
      back();
    }
  }
  if (chat.id !== null) touch(chat);
  toEnd();
};

/** A text that could not be sent goes before what has been written since, in its own conversation. */
function takeBack(one, text) {
  const whole = [text, unsentOf(one.id)].filter(Boolean).join("\n");
  if (chat === one) fill(whole);
  else keepUnsent(one.id, whole);
}

$("prompt").onkeydown = (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  if (answering().length === 0) $("composer").requestSubmit();
};
$("prompt").oninput = () => {
  keepUnsent(chat.id, $("prompt").value);
  sizePrompt();
};

function sizePrompt() {
  const { style, value } = $("prompt");
  style.height = value.length < MUCH ? "auto" : "40dvh";
  if (value.length < MUCH) style.height = `${$("prompt").scrollHeight}px`;
  drawSend();
}

const MUCH = 10_000; // characters, which browsers lay out and edit slowly: 100,000 pasted ones took minutes

document.addEventListener("paste", (event) => {
  const { target, clipboardData } = event;
  const text = clipboardData.getData("text/plain");
  if (text.length < MUCH || !target.matches("textarea")) return;
  event.preventDefault();
  target.setRangeText(text, target.selectionStart, target.selectionEnd, "end");
  target.dispatchEvent(new Event("input"));
});

startShortcuts({
  stop: () => (document.body.classList.contains("sidebar-open") ? closeSidebar() : guard(stop)),
  editLast,
  write: () => $("prompt").focus(),
  search: () => {
    if (narrow.matches) openSidebar();
    else fold(false);
    $("search").focus();
  },
  newChat: goToNewChat,
  fold: () => (narrow.matches ? openSidebar() : fold(!settings.folded)),
});

$("thread").addEventListener("redraw", () => draw());
$("thread").addEventListener("click", async (event) => {
  const button = event.target.closest(".copy-code");
  if (!button) return;
  await copy(button.closest("figure").querySelector("code").textContent);
  button.lastChild.textContent = "Copied";
  setTimeout(() => (button.lastChild.textContent = "Copy"), 1500);
});
$("thread").addEventListener("resized", keepUp); // formulas are drawn late
startScroll(drawLatest);
$("to-latest").onclick = toEnd;

// Paper cannot be unfolded: what is folded is printed open.
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("#thread details:not([open])")];
  for (const details of opened) details.open = true;
});
window.addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
});

/** On a wide screen the list is there unless somebody folds it. */
function fold(folded) {
  change({ folded });
  drawFold();
}

function drawFold() {
  document.body.classList.toggle("folded", settings.folded);
  $("open-sidebar").setAttribute("aria-expanded", String(!settings.folded && !narrow.matches));
}

function openSidebar() {
  if (!narrow.matches) {
    fold(false);
    return $("fold-sidebar").focus();
  }
  document.body.classList.add("sidebar-open");
  $("open-sidebar").setAttribute("aria-expanded", "true");
  $("close-sidebar").focus();
}

function closeSidebar() {
  if (!document.body.classList.contains("sidebar-open")) return;
  document.body.classList.remove("sidebar-open");
  $("open-sidebar").setAttribute("aria-expanded", "false");
  $("open-sidebar").focus();
}

$("fold-sidebar").onclick = () => {
  fold(true);
  $("open-sidebar").focus();
};
$("open-sidebar").onclick = openSidebar;
$("close-sidebar").onclick = closeSidebar;
$("scrim").onclick = closeSidebar;

$("open-settings").onclick = () => {
  $("system").value = chat.system;
  $("export-one").hidden = chat.id === null;
  const leaf = path(chat.tree).findLast(({ message }) => !message.local)?.message;
  $("export-markdown").hidden = chat.id === null || !leaf;
  if (chat.id !== null) $("export-one").href = conversations.exportUrl(chat.id);
  if (chat.id !== null && leaf) $("export-markdown").href = conversations.markdownUrl(chat.id, leaf.id);
  drawUsual();
  $("settings").showModal();
};
$("system").oninput = drawUsual;
$("system-usual").onclick = () => {
  change({ system: $("system").value });
  drawUsual();
  toast(settings.system ? "New conversations begin with it." : "New conversations begin without one.");
};

/** The button is there where new conversations begin with another system prompt. */
function drawUsual() {
  $("system-usual").hidden = $("system").value === settings.system;
}

$("settings").onclick = ({ target }) => {
  if (target === $("settings")) $("settings").close(); // the backdrop; returning false would cancel other clicks
};
$("settings").onclose = () => {
  if ($("system").value !== chat.system) guard(() => setSystem($("system").value));
};

startLogin({ field: "key", wrong: "That is not the key. It was printed when the server started.", enter });
