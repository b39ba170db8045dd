// Draws the path of the open conversation. Called again after every change; the text of an unfinished answer is drawn
// alone (`drawText`), so that a token costs one paragraph and not the page.

import { splitFiles } from "./attachments.js";
import { $, announce, composing, confirmed, copy, h, icon, iconButton, keepSelection, morph, replace, sends, toast } from "./dom.js";
import { render } from "./markdown.js";
import { typeset } from "./maths.js";
import { keepUp } from "./scroll.js";
import { splitThinking } from "./thinking.js";
import { answer, answering, chat, edit, followers, goOn, judge, pick, remove, run, thumb } from "./chat.js";
import { pairOf, path } from "./tree.js";
import { timeInWords, usageInWords } from "./usage.js";

const texts = new WeakMap(); // message -> {element, content}: what is drawn already
const turns = new WeakMap(); // first message of a turn -> {element, looks}: the same, for all of the turn
let editing = null; // {id, content}: the message whose wording is being changed, and what it is so far

/** Draws everything. */
export function drawThread(guarded) {
  const steps = path(chat.tree);
  keepSelection(() => replace($("thread"), ...steps.map((step, i) => drawStep(step, i === steps.length - 1, guarded))));
  keepUp();
}

/** Makes a turn again only if it looks different: the cost of a message must not grow with the conversation. */
function drawStep(step, isLast, guarded) {
  const option = step.options[step.index];
  const looks = looksOf(step, option, isLast);
  const drawn = turns.get(option[0]);
  if (drawn?.looks === looks) {
    for (const message of option) if (message.role === "assistant") drawBody(message);
    return drawn.element;
  }
  const draw = option.length === 2 ? drawPair : option[0].role === "user" ? drawUser : drawAnswer;
  let element;
  try {
    element = draw(step, option, isLast, guarded);
  } catch (error) { // the other turns are drawn, and of this the text
    console.error(error);
    element = h("article", { class: "turn" }, option.map(({ content }) => h("p", { class: "plain", dir: "auto" }, content)));
  }
  turns.set(option[0], { element, looks });
  return element;
}

/** Everything that a turn shows except its text, as one string. */
function looksOf({ options, index }, option, isLast) {
  const pair = pairOf(chat.tree, option[0].id);
  const one = ({ id, local, controller, content, waitUntil, error, finish_reason }) => [
    id, local, Boolean(controller), editing?.id === id, content === "", waitUntil, error?.message, finish_reason, chat.tree.thumbs.get(id),
  ];
  const verdict = pair && chat.tree.verdicts.get(pair);
  return JSON.stringify([
    options.length, index, isLast, isLast && answering().length, option.map(one),
    pair?.shown, pair?.blind, verdict === undefined ? "none" : verdict,
  ]);
}

function drawUser(step, [message], isLast, guarded) {
  if (editing?.id === message.id) return drawEditor(message, guarded);
  const ask = isLast && h("button", { type: "button", class: "link", onclick: () => answer(chat, message.id) }, "Answer this");
  return h(
    "article",
    { class: "turn user", id: message.id, tabindex: "-1", "aria-label": "Your message" },
    ...drawBubble(message),
    ask,
    h(
      "div",
      { class: "actions" },
      switcher(step),
      iconButton("edit", "Edit this message", () => startEdit(message), { key: `edit ${message.id}` }),
      iconButton("copy", "Copy this message", (event) => copyFrom(event, message.content), { key: `copy ${message.id}` }),
      trash(message, guarded),
      when(message),
    ),
  );
}

const trash = (message, guarded) =>
  iconButton("trash", `Delete this ${nameOf(message)}`, () => guarded(() => askAndRemove(message)), { key: `delete ${message.id}` });

const nameOf = ({ role }) => (role === "user" ? "message" : "answer");

async function askAndRemove(message) {
  const count = followers(message);
  const others = count === 0 ? "" : count === 1 ? " and the message that follows it" : ` and the ${count} messages that follow it`;
  const text = `It${others} will be gone for good, with votes. Other branches stay.`;
  if (await confirmed(`Delete this ${nameOf(message)}?`, text)) await remove(message);
}

/** When it was written, and of an answer what it took. */
function when(message) {
  const { short, long } = timeInWords(message.created_at);
  const facts = [message.edited_from && "rewritten", usageInWords(message)].filter(Boolean);
  return h("span", { class: "when" }, h("time", { datetime: message.created_at, title: long }, short), facts.map((fact) => h("span", {}, fact)));
}

const LONG = 2000; // characters of a message, or
const MANY = 30; // lines, from which on it is folded
const unfolded = new WeakSet(); // messages that somebody has opened

function drawBubble(message) {
  const { text: content, files } = splitFiles(message.content);
  const file = ({ name, text }) =>
    h("details", { class: "file" }, h("summary", { dir: "auto" }, name, h("span", {}, `${text.length.toLocaleString("en")} characters`)), h("pre", { tabindex: "0", dir: "auto" }, text));
  return [...(content ? drawWords(message, content) : []), ...files.map(file)];
}

function drawWords(message, content) {
  const bubble = h("div", { class: "bubble", dir: "auto" }, content);
  if (content.length <= LONG && content.split("\n", MANY + 1).length <= MANY) return [bubble];
  const button = h("button", { type: "button", class: "link", "data-key": `unfold ${message.id}` });
  const show = () => {
    const open = unfolded.has(message);
    bubble.classList.toggle("folded", !open);
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "Show less" : `Show all ${content.length.toLocaleString("en")} characters`;
  };
  button.onclick = () => {
    if (!unfolded.delete(message)) unfolded.add(message);
    show();
  };
  show();
  return [bubble, button];
}

/** The last message of the person, to be changed. */
export function editLast() {
  const last = path(chat.tree).findLast(({ message }) => message.role === "user");
  if (last) startEdit(last.message);
}

function startEdit(message) {
  editing = { id: message.id, content: message.content };
  $("thread").dispatchEvent(new CustomEvent("redraw"));
  const box = $("thread").querySelector(".editor textarea");
  box.focus();
  box.setSelectionRange(box.value.length, box.value.length);
}

function drawEditor(message, guarded) {
  const mine = message.role === "user";
  const box = h("textarea", { "aria-label": `Edit the ${nameOf(message)}`, dir: "auto", rows: Math.min(12, editing.content.split("\n").length + 1), value: editing.content, "data-key": "editor" });
  box.oninput = () => (editing.content = box.value);
  const close = () => {
    editing = null;
    $("thread").dispatchEvent(new CustomEvent("redraw"));
    $("prompt").focus();
  };
  const save = () => {
    if (!box.value.trim()) return;
    const content = box.value;
    close();
    if (!mine && content === message.content) return;
    guarded(() => edit(message, content));
  };
  box.onkeydown = (event) => {
    if (composing(event)) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (mine ? sends(event) : event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      save();
    }
  };
  return h(
    "article",
    { class: `turn editor ${message.role}`, "aria-label": `The ${nameOf(message)}, being edited` },
    box,
    h(
      "div",
      { class: "editor-buttons" },
      h("p", { class: "help" }, mine ? "The old wording stays: this starts a branch." : "The old answer stays, as a branch. Yours counts as the better one, also in exports."),
      h("button", { type: "button", class: "secondary", onclick: close }, "Cancel"),
      h("button", { type: "button", class: "primary", onclick: save }, mine ? "Send" : "Save"),
    ),
  );
}

function drawAnswer(step, [message], isLast, guarded) {
  if (editing?.id === message.id) return drawEditor(message, guarded);
  const done = !message.controller;
  return h(
    "article",
    { class: "turn assistant", id: message.id, tabindex: "-1", "aria-label": `Answer of ${message.model}`, "aria-busy": String(!done) },
    h("header", { class: "who", title: samplingOf(message) }, message.model),
    drawBody(message),
    drawEnd(message, isLast, guarded),
    done &&
      h(
        "div",
        { class: `actions${isLast ? " shown" : ""}` },
        switcher(step),
        !message.local && [
          copyButton(message),
          ...thumbs(message, guarded),
          iconButton("edit", "Edit this answer", () => startEdit(message), { key: `edit ${message.id}` }),
          again(message),
          trash(message, guarded),
          when(message),
        ],
      ),
  );
}

const again = ({ parent_id }) =>
  iconButton("again", "Answer again", () => answer(chat, parent_id), { key: `again ${parent_id}` });

function drawPair(step, option, isLast, guarded) {
  const pair = pairOf(chat.tree, option[0].id);
  const verdict = chat.tree.verdicts.get(pair); // undefined: not judged; null: a tie
  const hidden = pair.blind && verdict === undefined;
  const done = option.every((message) => !message.controller);
  const votable = done && option.every((message) => !message.local && message.content);
  const column = (message, letter) =>
    h(
      "article",
      {
        id: message.id, tabindex: "-1",
        class: `answer${verdict === message.id ? " better" : ""}`,
        "aria-label": `Answer ${letter}${hidden ? "" : ` of ${message.model}`}`,
        "aria-busy": String(Boolean(message.controller)),
      },
      h(
        "header",
        { class: "who", title: hidden ? null : samplingOf(message) },
        h("b", { class: "badge" }, letter),
        h("span", {}, hidden ? "name hidden until you vote" : nameInPair(message, option)),
        verdict === message.id && h("span", { class: "won" }, icon("check"), "better"),
      ),
      drawBody(message),
      drawEnd(message, isLast, guarded),
      !message.controller && !message.local && h("div", { class: "actions shown" }, copyButton(message)),
    );
  const choice = (label, id) =>
    h(
      "button",
      {
        type: "button", class: "choice", "aria-pressed": String(verdict === id), "data-key": `vote ${label} ${option[0].id}`,
        onclick: () => guarded(() => judge(pair, id)),
      },
      label,
    );
  return h(
    "section",
    { class: "turn pair", "aria-label": "Two answers side by side" },
    h("div", { class: "columns" }, column(option[0], "A"), column(option[1], "B")),
    votable &&
      h(
        "div",
        { class: "verdict", role: "group", "aria-label": "Which answer is better?" },
        choice("A is better", option[0].id),
        choice("Tie", null),
        choice("B is better", option[1].id),
      ),
    done &&
      h(
        "div",
        { class: `actions${isLast ? " shown" : ""}` },
        switcher(step),
        again(option[0]),
      ),
  );
}

/** With the seed, where a pair comes from one model. */
const nameInPair = (message, option) =>
  option[0].model === option[1].model ? `${message.model}, seed ${(message.sampling ?? message.request)?.seed ?? "?"}` : message.model;

function samplingOf(message) {
  const given = Object.entries(message.sampling ?? {}).filter(([name, value]) => value !== null && name !== "continued");
  return given.map(([name, value]) => `${name} ${value}`).join(", ");
}

/** The answer's text, or the dots before its first word. */
function drawBody(message) {
  if (message.waitUntil) return null; // drawEnd says so
  if (message.controller && message.content === "") {
    texts.delete(message);
    return h("div", { class: "dots", "aria-label": "Thinking" }, h("i"), h("i"), h("i"));
  }
  return drawText(message);
}

/** The element with an answer's text, made again only if the text has changed. */
export function drawText(message) {
  const drawn = texts.get(message) ?? { element: h("div", { class: "prose" }), content: null };
  if (drawn.content !== message.content) {
    morph(drawn.element, render(message.content));
    typeset(drawn.element);
    drawn.content = message.content;
    texts.set(message, drawn);
  }
  drawn.element.classList.toggle("streaming", Boolean(message.controller));
  return drawn.element;
}

export const isDrawn = (message) => texts.get(message)?.element.isConnected ?? false;

/** Why an answer ended early, and the button that helps. */
function drawEnd(message, isLast, guarded) {
  const retry = () => (message.local ? run(chat, message) : answer(chat, message.parent_id));
  const button = (label, action) => h("button", { type: "button", class: "link", onclick: action }, label);
  if (message.waitUntil) {
    const seconds = Math.max(0, Math.ceil((message.waitUntil - Date.now()) / 1000));
    return h(
      "p",
      { class: "note busy" },
      "The server is busy. Trying again in ",
      h("span", { class: "countdown", "data-until": String(message.waitUntil) }, String(seconds)),
      " s.",
    );
  }
  if (message.controller) return null;
  if (message.error) return h("p", { class: "note failed", role: "alert" }, message.error.message, " ", button("Try again", retry));
  if (message.finish_reason === "stop") return message.content ? null : h("p", { class: "note" }, "An empty answer.");
  if (message.finish_reason === "error") return h("p", { class: "note failed" }, "This answer failed. ", button("Try again", retry));
  if (message.local) return h("p", { class: "note" }, "Stopped. ", button("Try again", retry));
  const why = { length: "Stopped at the length limit. ", interrupted: "The server ended while it wrote this. " };
  const more = isLast && answering().length === 0 && button("Continue", () => guarded(() => goOn(message)));
  return h("p", { class: "note" }, why[message.finish_reason] ?? "Stopped. ", more);
}

/** "2/3" with arrows, where a message has alternatives. */
function switcher({ options, index, message }) {
  if (options.length < 2) return null;
  const go = (to) => pick(message.parent_id, options[to][0]);
  return h(
    "div",
    { class: "switcher", role: "group", "aria-label": "Branches" },
    iconButton("left", "Previous branch", () => go(index - 1), { disabled: index === 0, key: `previous ${message.parent_id}` }),
    h("span", { "aria-label": `Branch ${index + 1} of ${options.length}` }, `${index + 1}/${options.length}`),
    iconButton("right", "Next branch", () => go(index + 1), { disabled: index === options.length - 1, key: `next ${message.parent_id}` }),
  );
}

const copyButton = (message) =>
  iconButton("copy", "Copy this answer", (event) => copyFrom(event, splitThinking(message.content).answer), { key: `copy ${message.id}` });

function thumbs(message, guarded) {
  const value = chat.tree.thumbs.get(message.id) ?? 0;
  return [
    iconButton("up", "Good answer", () => guarded(() => thumb(message, 1)), { pressed: value === 1, key: `up ${message.id}` }),
    iconButton("down", "Bad answer", () => guarded(() => thumb(message, -1)), { pressed: value === -1, key: `down ${message.id}` }),
  ];
}

/** Copies, and shows a tick on the button for a moment. */
export async function copyFrom({ currentTarget: button }, text) {
  try {
    await copy(text);
  } catch {
    toast("This browser did not allow copying.");
    return;
  }
  const use = button.querySelector("use");
  use.setAttribute("href", "#icon-check");
  setTimeout(() => use.setAttribute("href", "#icon-copy"), 1500);
  announce("Copied");
}
