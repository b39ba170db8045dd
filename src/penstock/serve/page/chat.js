// The open conversation and its actions. Owns the tree of messages, and watches the answers that the server writes;
// reports changes to the page through `watch`, and never touches an element.

import { answers, conversations, removeMessage, votes } from "./api.js";
import { requests, settings } from "./settings.js";
import { addPair, addVote, below, makeTree, path, reveal } from "./tree.js";
import { keepSending, sendingOf } from "./unsent.js";
import { inWords } from "./words.js";

const ATTEMPTS = 6; // of a request that the server was too busy for
const LOST_SECONDS = 2; // until a lost connection is tried again
const VIEWS = "penstock.views"; // pairs without a vote, and the branches on the screen: known to this browser only

const fresh = () => ({ id: null, title: "", system: settings.system, named: false, tree: makeTree([], []) });

/** The conversation on the screen; `id` is null until its first message is sent. */
export let chat = fresh();
const unsent = new Set(); // conversations with a draft that the server has not taken yet, on the screen or not

let changed = () => {};
let grew = () => {};
let begun = () => {};
let titled = () => {};

/** Callbacks. changed(): draw again; grew(message): new text of one answer; begun(chat): the server has it; titled(chat):
 * the model has named it. */
export function watch(callbacks) {
  ({ changed, grew, begun, titled } = callbacks);
}

let opened = 0; // counts, so that a conversation that arrives late does not push away a later one

export function newChat() {
  opened++;
  leave();
  chat = fresh();
  changed();
}

/** Opens a stored conversation, and watches the answers in it that are being written. */
export async function openChat(id) {
  const order = ++opened;
  const loaded = [...unsent].find((waiting) => waiting.id === id) ?? (await load(id));
  if (order !== opened) return;
  leave();
  chat = loaded;
  changed();
  watchAll(chat);
}

/** Stops watching: the server writes on, and a browser has few connections. */
function leave() {
  for (const message of answering()) if (!message.local) message.controller.abort();
}

function watchAll(one) {
  for (const message of one.tree.messages.values()) {
    if (message.role === "assistant" && !message.local && !message.controller && message.finish_reason === null) run(one, message);
  }
}

/** Reads the conversation again after a sleep or a loss: what another tab wrote, and answers from where they are now. */
export async function refresh() {
  const one = chat;
  if (one.id === null) return;
  const { tree } = await load(one.id);
  if (one !== chat) return;
  for (const [id, message] of tree.messages) {
    const known = one.tree.messages.get(id);
    if (!known?.controller) one.tree.messages.set(id, Object.assign(known ?? {}, message, { error: null }));
    else if (!known.local && !known.waiting) known.controller.abort(AGAIN);
  }
  changed();
  watchAll(one);
}

async function load(id) {
  const [{ messages, ...conversation }, given] = await Promise.all([conversations.get(id), votes.of(id)]);
  const view = JSON.parse(localStorage.getItem(VIEWS) ?? "{}")[id];
  return { ...conversation, tree: makeTree(messages.filter(said), given, view) };
}

/** False for an answer that failed before its first word: it has no text to show. */
const said = ({ role, content, finish_reason }) => role === "user" || content !== "" || finish_reason !== "error";

export async function setSystem(system) {
  chat.system = system;
  if (chat.id !== null) await conversations.change(chat.id, { system });
}

export const answering = (one = chat) => [...one.tree.messages.values()].filter((message) => message.controller);

/** Ends the answers of this conversation; the server stores what there is. */
export async function stop() {
  const ends = answering().map((message) => {
    message.stopping = true; // one that the server does not have yet is stopped when it has
    if (!message.local) return answers.stop(chat.id, message.id);
    if (message.waiting) message.controller.abort();
    return null;
  });
  await Promise.all(ends);
}

/** Sends a message at the end of the path on the screen. */
export async function send(content) {
  const last = path(chat.tree).at(-1)?.message;
  if (!last) return say(null, content);
  if (last.role === "assistant" && !last.local && last.content) return say(last.id, content);
  // The last message has no answer: this one replaces it, as an edit would.
  const unanswered = last.role === "user" ? last : chat.tree.messages.get(last.parent_id);
  return say(unanswered.parent_id, content);
}

/** Another wording: of a message, which is answered anew; of an answer, which counts as the better one. Both are branches. */
export async function edit(message, content) {
  if (message.role === "user") return say(message.parent_id, content);
  const one = chat;
  const row = await answers.rewrite(one.id, message.id, content);
  one.tree.messages.set(row.id, row);
  one.tree.picked.set(row.parent_id, row.id);
  remember(one);
  changed();
}

/** How many messages follow one. */
export const followers = (message) => below(chat.tree, message.id).size - 1;

/** Removes a message with all that follow it. */
export async function remove(message) {
  const one = chat;
  await removeMessage(one.id, message.id);
  for (const id of below(one.tree, message.id)) {
    one.tree.messages.get(id)?.controller?.abort();
    one.tree.messages.delete(id);
  }
  one.tree.pairs = one.tree.pairs.filter(({ shown }) => shown.every((id) => one.tree.messages.has(id)));
  one.tree.picked = new Map([...one.tree.picked].filter((ids) => ids.every((id) => id === null || one.tree.messages.has(id))));
  remember(one);
  changed();
}

/** Shows the branch with a message. */
export function show(id) {
  reveal(chat.tree, id);
  changed();
}

/** After the first answer the model names the conversation, unless a person did. Nothing waits for it. */
async function nameByModel(one, message) {
  const ended = [...one.tree.messages.values()].filter(({ role, content }) => role === "assistant" && content);
  if (!settings.titles || one.named || ended[0] !== message || ended.length > 2) return;
  const { title, named } = await conversations.nameBy(one.id, message.model);
  if (one.named || title === one.title) return;
  Object.assign(one, { title, named });
  titled(one);
}

/** Goes on with an answer that was cut, in place. */
export function goOn(message) {
  const { seed: _, ...sampling } = settings.sampling;
  return run(chat, message, (signal) => answers.goOn(chat.id, message.id, sampling, signal));
}

const newId = () => `msg_${[...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;

async function say(parentId, content) {
  const one = chat;
  let said = sendingOf(one.id); // sent again with the same id: the server may have it, and only its reply was lost
  if (said?.parent_id !== parentId || said.content !== content) said = { id: newId(), parent_id: parentId, content };
  keepSending(one.id, said);
  if (one.id === null) {
    const title = titleOf(content);
    Object.assign(one, await conversations.create({ title, ...(one.system && { system: one.system }) }));
    keepSending(one.id, said);
    keepSending(null, null);
    begun(one);
  }
  const message = await conversations.say(one.id, said);
  keepSending(one.id, null);
  one.tree.messages.set(message.id, message);
  one.tree.picked.delete(parentId);
  answer(one, message.id);
}

/** The first line, cut between letters as people see them: an emoji is one, whatever it is made of. */
function titleOf(content) {
  const [line] = content.trim().split("\n", 1);
  let title = "";
  let count = 0;
  for (const { segment } of new Intl.Segmenter().segment(line.slice(0, 1000))) {
    if (count++ === 60 || title.length + segment.length > 200) break; // 200: the server's limit
    title += segment;
  }
  return title.trim();
}

/** Answers a user message: with one model, or with two side by side. Asking again adds an alternative. */
export function answer(one, parentId) {
  const drafts = requests().map((request) => draft(parentId, request));
  for (const message of drafts) one.tree.messages.set(message.id, message);
  if (drafts.length === 2) {
    const shown = drafts.map((message) => message.id);
    if (settings.blind && Math.random() < 0.5) shown.reverse();
    addPair(one.tree, shown, settings.blind);
  }
  one.tree.picked.delete(parentId);
  remember(one);
  for (const message of drafts) run(one, message);
}

/** An answer that the server does not have yet. */
const draft = (parentId, request) => ({
  id: newId(), local: true, parent_id: parentId, role: "assistant", content: "", model: request.model,
  finish_reason: null, request, error: null, waitUntil: null, controller: null,
});

const AGAIN = "again"; // why a connection is dropped: to watch from where the answer is now

/** Watches an answer to its end or failure. `begin`: what makes the server write it; a draft is always begun. */
export async function run(one, message, begin = null) {
  message.error = null;
  message.stopping = false;
  message.controller = new AbortController();
  if (message.local) unsent.add(one);
  changed();
  try {
    await receive(one, message, begin);
  } catch (error) {
    if (!message.controller.signal.aborted) message.error = error;
    else if (message.local) message.finish_reason = "cancelled";
  }
  message.controller = null;
  if (!answering(one).some(({ local }) => local)) unsent.delete(one);
  if (message.error || message.finish_reason !== null) changed(message);
  else changed(); // left while it grows
  if (message.finish_reason === "stop" || message.finish_reason === "length") nameByModel(one, message).catch(() => {});
}

async function receive(one, message, begin) {
  for (let attempt = 1; ; attempt++) {
    const { signal } = message.controller;
    let busySeconds = 0;
    try {
      for await (const event of source(one, message, begin, signal)) {
        take(one, message, event);
        if (event.type === "done") return;
      }
      begin = null;
    } catch (error) {
      if (signal.reason === AGAIN) {
        message.controller = new AbortController();
        begin = null;
        continue;
      }
      if (signal.aborted || !(error.status === 0 || (error.busy && attempt < ATTEMPTS))) throw error;
      if (error.busy) busySeconds = error.retryAfter ?? 2 ** (attempt - 1);
      else begin = null; // it may have begun: watching shows whether it has
    }
    await pause(message, busySeconds || LOST_SECONDS, busySeconds > 0);
  }
}

function source(one, message, begin, signal) {
  if (message.local) return answers.begin(one.id, { id: message.id, parent_id: message.parent_id, ...message.request }, signal);
  return begin?.(signal) ?? answers.watch(one.id, message.id, signal);
}

function take(one, message, event) {
  if (event.type === "message") {
    Object.assign(message, event.message, { local: false });
    remember(one);
    if (message.stopping) answers.stop(one.id, message.id).catch(() => {});
    else if (one !== chat) message.controller.abort(); // left before the server had it
    changed();
  } else if (event.type === "delta") {
    message.content += event.content;
    grew(message);
  } else if (event.type === "done") {
    Object.assign(message, event.message);
    message.finish_reason ??= "interrupted"; // by the end of a server that this one knows nothing of
  } else if (event.type === "error") {
    message.finish_reason = "error";
    throw new Error(inWords(event.error));
  }
}

/** Waits; stop ends the wait. `shown`: the page counts the seconds. */
async function pause(message, seconds, shown) {
  message.waiting = true;
  if (shown) message.waitUntil = Date.now() + 1000 * seconds;
  changed();
  try {
    await new Promise((resolve, reject) => {
      setTimeout(resolve, 1000 * seconds);
      message.controller.signal.addEventListener("abort", reject, { once: true });
    });
  } finally {
    message.waiting = false;
    message.waitUntil = null;
    changed();
  }
}

/** What this browser shows when it opens the conversation again: pairs side by side, and the branches picked. */
function remember(one) {
  const stored = (id) => id === null || one.tree.messages.get(id)?.local !== true;
  const pairs = one.tree.pairs.filter(({ shown }) => shown.every(stored));
  const picked = [...one.tree.picked].filter((ids) => ids.every(stored));
  const { [one.id]: _, ...views } = JSON.parse(localStorage.getItem(VIEWS) ?? "{}");
  if (pairs.length > 0 || picked.length > 0) views[one.id] = { pairs, picked };
  localStorage.setItem(VIEWS, JSON.stringify(views));
}

export function forget(id) {
  const { [id]: _, ...others } = JSON.parse(localStorage.getItem(VIEWS) ?? "{}");
  localStorage.setItem(VIEWS, JSON.stringify(others));
}

/** Shows another alternative of those under a parent. */
export function pick(parentId, message) {
  chat.tree.picked.set(parentId, message.id);
  remember(chat);
  changed();
}

/** A thumb on one answer; the same thumb again removes it. */
export async function thumb(message, value) {
  const { tree } = chat;
  const now = tree.thumbs.get(message.id) === value ? 0 : value;
  await votes.thumb(message.id, now);
  addVote(tree, { kind: "thumb", message_id: message.id, value: now });
  changed();
}

/** Which of a pair is better; null: a tie. */
export async function judge(pair, chosenId) {
  const { tree } = chat;
  await votes.pair(pair.shown, chosenId);
  addVote(tree, { kind: "pair", shown: pair.shown, chosen_id: chosenId });
  changed();
}
