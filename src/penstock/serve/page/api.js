// The server's routes, as functions. Knows HTTP: the session's CSRF token, errors, and streams of events.
// Addresses are relative to the page, which a proxy may serve below a prefix.

import { inWords } from "./words.js";

export class ApiError extends Error {
  /** status 0: the server cannot be reached. */
  constructor(status, { message, code = null, param = null }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }

  /** Whether the same request may succeed in a moment. */
  get busy() {
    return this.status === 429 || this.status === 503;
  }
}

let csrf = null;
let onSignedOut = () => {};
let onReachable = () => {};

/** Callbacks: the session has ended; the server answers (true) or cannot be reached (false). */
export function listen({ signedOut, reachable }) {
  onSignedOut = signedOut;
  onReachable = reachable;
}

export const session = {
  /** Whether it is the owner's, and not a labeller's, for whom there is the labelling room alone. */
  owner: true,
  async open(key) {
    ({ csrf, owner: session.owner } = await json("POST", "api/session", { key }));
  },
  async resume() {
    ({ csrf, owner: session.owner } = await json("GET", "api/session"));
  },
  async close() {
    await json("DELETE", "api/session");
    csrf = null;
  },
};

/** The models: [{id, max_model_len}], the context in tokens. Throws an error that is `busy` while they load. */
export async function models() {
  await json("GET", "health");
  return (await json("GET", "v1/models")).data.filter((model) => model.task === "generate");
}

const at = (id) => `api/conversations/${encodeURIComponent(id)}`;

export const conversations = {
  list: (before = null) =>
    json("GET", `api/conversations?limit=50${before === null ? "" : `&before=${encodeURIComponent(before)}`}`),
  create: (fields) => json("POST", "api/conversations", fields),
  get: (id) => json("GET", at(id)),
  change: (id, fields) => json("PATCH", at(id), fields),
  remove: (id) => json("DELETE", at(id)),
  say: (id, message) => json("POST", `${at(id)}/messages`, { ...message, role: "user" }),
  nameBy: (id, model) => json("POST", `${at(id)}/title`, { model }),
  /** Titles and messages with all these words; `rest` of an answer goes on behind it. */
  search: (words, rest = null) => json("GET", `api/search?q=${encodeURIComponent(words)}${rest === null ? "" : `&rest=${rest}`}`),
  bring: (talk) => json("POST", "api/import", talk),
  exportUrl: (id) => `${at(id)}/export`,
  markdownUrl: (id, leaf) => `${at(id)}/markdown?leaf=${encodeURIComponent(leaf)}`,
};

export const votes = {
  of: async (id) => (await json("GET", `api/votes?conversation_id=${encodeURIComponent(id)}`)).data,
  thumb: (message_id, value) => json("POST", "api/votes", { kind: "thumb", message_id, value }),
  pair: (shown, chosen_id) => json("POST", "api/votes", { kind: "pair", shown, chosen_id }),
};

export const versions = {
  list: () => json("GET", "api/versions"),
  serve: (model, version) => json("POST", "api/versions/serve", { model, version }),
  trust: (model, version, trusted) => json("POST", "api/versions/trust", { model, version, trusted }),
  begin: (model) => json("POST", "api/versions/rounds", { model }),
  stop: (model) => json("POST", "api/versions/rounds/stop", { model }),
};

/** Removes a message and all below it. */
export const removeMessage = (id, messageId) => json("DELETE", message(id, messageId));

const message = (id, messageId) => `${at(id)}/messages/${encodeURIComponent(messageId)}`;

/** Answers live on the server. Three ways to see one grow: each gives its events as they arrive: the message with its
 * text so far, then deltas, then done or error. */
export const answers = {
  begin: (id, request, signal) => events("POST", `${at(id)}/replies`, request, signal),
  goOn: (id, messageId, request, signal) => events("POST", `${message(id, messageId)}/continuation`, request, signal),
  watch: (id, messageId, signal) => events("GET", `${message(id, messageId)}/events`, undefined, signal),
  stop: (id, messageId) => json("POST", `${message(id, messageId)}/stop`),
  rewrite: (id, messageId, content) => json("POST", `${message(id, messageId)}/rewrite`, { content }),
};

/** What a labeller does. */
export const label = {
  me: () => json("GET", "api/label/me"),
  next: () => json("POST", "api/label/next"),
  judge: (id, judgement) => json("POST", `api/label/items/${encodeURIComponent(id)}`, judgement),
  undo: () => json("POST", "api/label/undo"),
};

/** The labelling room, for its owner. */
export const labelling = {
  overview: () => json("GET", "api/labelling"),
  change: (settings) => json("PATCH", "api/labelling", settings),
  add: (request) => json("POST", "api/labelling/items", request),
  remove: (id) => json("DELETE", `api/labelling/items/${encodeURIComponent(id)}`),
  addLabeller: (name) => json("POST", "api/labelling/labellers", { name }),
  endLabeller: (id) => json("DELETE", `api/labelling/labellers/${encodeURIComponent(id)}`),
};

async function* events(method, url, request, signal) {
  const response = await send(method, url, request, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { value, done } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new ApiError(0, { message: "The connection was lost before the answer ended." });
    });
    if (done) return;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield JSON.parse(line.slice(5));
  }
}

/** The server refuses zero bytes and halves of characters, which pasted text may hold. */
const storable = (_, value) => (typeof value === "string" ? value.replaceAll("\0", "").toWellFormed() : value);

async function json(method, url, body) {
  const response = await send(method, url, body);
  return response.status === 204 ? null : response.json();
}

async function send(method, url, body, signal, again = false) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (csrf && method !== "GET") headers["x-csrf-token"] = csrf;
  let response;
  try {
    response = await fetch(url, { method, headers, body: body && JSON.stringify(body, storable), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    onReachable(false);
    throw new ApiError(0, { message: "The server cannot be reached." });
  }
  onReachable(true);
  if (response.ok) return response;
  if (response.status === 403 && !again) {
    await session.resume(); // another tab logged in again, and our token is of the session before
    return send(method, url, body, signal, true);
  }
  const error = await failure(response);
  if (response.status === 401 && url !== "api/session") onSignedOut();
  throw error;
}

async function failure(response) {
  const isJson = response.headers.get("content-type")?.includes("json");
  const { error = {} } = isJson ? await response.json() : {};
  const message = inWords(error) ?? `The server answered ${response.status}.`;
  const retryAfter = Number(response.headers.get("retry-after")) || null; // seconds
  return new ApiError(response.status, { ...error, message }, retryAfter);
}
