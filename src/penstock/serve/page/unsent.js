// What somebody has written and not sent, by conversation. Kept in this browser until it is sent or they log out.

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
}
