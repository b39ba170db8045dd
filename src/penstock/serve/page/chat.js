// The open conversation and its actions. Owns the tree of messages and the answers that are being written; reports
// changes to the page through `watch`, and never touches an element.

import { conversations, reply, votes } from "./api.js";
import { requests, settings } from "./settings.js";
import { addPair, addVote, makeTree, path, rename } from "./tree.js";

const ATTEMPTS = 6; // of a request that the server was too busy for
const PAIRS = "penstock.pairs"; // pairs without a vote are known to this browser only

const fresh = () => ({ id: null, title: "", system: "", tree: makeTree([], [], []) });

/** The conversation on the screen; `id` is null until its first message is sent. */
export let chat = fresh();
const busyChats = new Set(); // those with answers under way, on the screen or not

let changed = () => {};
let grew = () => {};
let named = () => {};

/** Callbacks. changed(): draw again; grew(message): new text of one answer; named(chat): new or renamed. */
export function watch(callbacks) {
  ({ changed, grew, named } = callbacks);
}

let opened = 0; // counts, so that a conversation that arrives late does not push away a later one

export function newChat() {
  opened++;
  chat = fresh();
  changed();
}

/** Opens a stored conversation, or returns to one with an unfinished answer. */
export async function openChat(id) {
  const mine = ++opened;
  const one = [...busyChats].find((busy) => busy.id === id) ?? (await load(id));
  if (mine !== opened) return;
  chat = one;
  changed();
}

async function load(id) {
  const [{ messages, ...conversation }, given] = await Promise.all([conversations.get(id), votes.of(id)]);
  const remembered = JSON.parse(localStorage.getItem(PAIRS) ?? "{}")[id] ?? [];
  return { ...conversation, tree: makeTree(messages.filter(said), given, remembered) };
}

/** False for an answer that failed before its first word: it has no text to show. */
const said = ({ role, content, finish_reason }) => role === "user" || content !== "" || finish_reason !== "error";

export async function setSystem(system) {
  chat.system = system;
  if (chat.id !== null) await conversations.change(chat.id, { system });
}

export const answering = (one = chat) => [...one.tree.messages.values()].filter((message) => message.controller);

export function stop() {
  for (const message of answering()) message.controller.abort();
}

/** Sends a message at the end of the path on the screen. */
export async function send(content) {
  const last = path(chat.tree).at(-1)?.message;
  if (!last) return say(null, content);
  if (last.role === "assistant" && !last.local) return say(last.id, content);
  // The last message has no answer: this one replaces it, as an edit would.
  const unanswered = last.role === "user" ? last : chat.tree.messages.get(last.parent_id);
  return say(unanswered.parent_id, content);
}

/** Another wording of a message: a new branch under the same parent. */
export const edit = (message, content) => say(message.parent_id, content);

export const goOn = (message) => say(message.id, "Continue.");

async function say(parentId, content) {
  const one = chat;
  if (one.id === null) {
    const title = content.trim().split("\n")[0].slice(0, 60);
    Object.assign(one, await conversations.create({ title, ...(one.system && { system: one.system }) }));
    named(one);
  }
  const message = await conversations.say(one.id, parentId, content);
  one.tree.messages.set(message.id, message);
  one.tree.picked.delete(parentId);
  answer(one, message.id);
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
  for (const message of drafts) run(one, message);
}

let draftCount = 0;

/** An answer that the server does not store yet. local: its id is not the server's. */
const draft = (parentId, request) => ({
  id: `draft-${draftCount++}`, local: true, parent_id: parentId, role: "assistant", content: "", model: request.model,
  finish_reason: null, request, error: null, waitUntil: null, controller: null,
});

/** Receives an answer to its end or failure; also tries a failed draft again. */
export async function run(one, message) {
  message.controller = new AbortController();
  message.error = null;
  busyChats.add(one);
  changed();
  try {
    await receive(one, message);
  } catch (error) {
    if (error.name === "AbortError") message.finish_reason = "cancelled";
    else message.error = error;
  }
  message.controller = null;
  message.waitUntil = null;
  if (answering(one).length === 0) busyChats.delete(one);
  changed(message);
}

async function receive(one, message) {
  const { parent_id, request, controller } = message;
  for (let attempt = 1; ; attempt++) {
    try {
      for await (const event of reply(one.id, { parent_id, ...request }, controller.signal)) take(one, message, event);
      if (message.finish_reason === null) throw new Error("The connection was lost before the answer ended.");
      return;
    } catch (error) {
      if (!error.busy || !message.local || attempt === ATTEMPTS) throw error;
      await pause(message, error.retryAfter ?? 2 ** (attempt - 1));
    }
  }
}

function take(one, message, event) {
  if (event.type === "message") {
    rename(one.tree, message, event.message.id);
    Object.assign(message, event.message, { local: false });
    remember(one);
    changed();
  } else if (event.type === "delta") {
    message.content += event.content;
    grew(message);
  } else if (event.type === "done") {
    Object.assign(message, event.message);
  } else if (event.type === "error") {
    message.finish_reason = "error";
    throw new Error(event.error.message);
  }
}

/** Waits for the time of retry-after; stop ends the wait. */
function pause(message, seconds) {
  message.waitUntil = Date.now() + 1000 * seconds;
  changed();
  return new Promise((resolve, reject) => {
    const { signal } = message.controller;
    const stopped = () => reject(signal.reason);
    signal.addEventListener("abort", stopped, { once: true });
    setTimeout(() => {
      signal.removeEventListener("abort", stopped);
      message.waitUntil = null;
      changed();
      resolve();
    }, 1000 * seconds);
  });
}

/** Which answers stand side by side, for the next time this browser opens the conversation. */
function remember(one) {
  const pairs = one.tree.pairs.filter(({ shown }) => shown.every((id) => one.tree.messages.get(id)?.local !== true));
  if (pairs.length === 0) return;
  const all = JSON.parse(localStorage.getItem(PAIRS) ?? "{}");
  localStorage.setItem(PAIRS, JSON.stringify({ ...all, [one.id]: pairs }));
}

export function forget(id) {
  const { [id]: _, ...others } = JSON.parse(localStorage.getItem(PAIRS) ?? "{}");
  localStorage.setItem(PAIRS, JSON.stringify(others));
}

/** Shows another alternative of those under a parent. */
export function pick(parentId, message) {
  chat.tree.picked.set(parentId, message.id);
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
