// What somebody has written and not sent, by conversation. Kept in this browser until it is sent or they log out; what is
// on its way to the server is kept by the tab until the server has answered.

const PREFIX = "penstock.unsent.";
const keyOf = (id) => PREFIX + (id ?? "new");

export const unsentOf = (id) => localStorage.getItem(keyOf(id)) ?? "";

export function keepUnsent(id, text) {
  try {
    if (text === "") localStorage.removeItem(keyOf(id));
    else localStorage.setItem(keyOf(id), text);
  } catch {
    // The browser's storage is full (5 MB): the text is in the field and nowhere else.
  }
}

export function dropUnsent() {
  for (const key of Object.keys(localStorage)) if (key.startsWith(PREFIX)) localStorage.removeItem(key);
  sessionStorage.removeItem(SENDING);
}

const SENDING = "penstock.sending";
const sending = JSON.parse(sessionStorage.getItem(SENDING) ?? "{}"); // conversation -> {id, parent_id, content}
const left = { ...sending }; // by this page before it was reloaded: the server may have it or not

/** The message that is being sent, or whose reply was lost. */
export const sendingOf = (id) => sending[id ?? "new"] ?? null;

/** null: it has arrived. */
export function keepSending(id, message) {
  if (message) sending[id ?? "new"] = message;
  else delete sending[id ?? "new"];
  try {
    sessionStorage.setItem(SENDING, JSON.stringify(sending));
  } catch {
    // Full, as above.
  }
}

/** What was being sent in a conversation when the page was left, once. */
export function takeLeft(id) {
  const message = left[id ?? "new"] ?? null;
  delete left[id ?? "new"];
  return message;
}
