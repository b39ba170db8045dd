// The server's errors in a person's words: what happened, and what helps. What is not in the table is the server's own
// sentence, which is one.

const WORDS = {
  queue_full: "Many answers are being written right now.",
  rate_limit_exceeded: "Too many requests are in work for this key.",
  model_not_found: "This model is no longer served. Pick another one at the top.",
  model_failed: "The model failed while it wrote. The server's log says why.",
  database_busy: "The server cannot store anything at the moment: another program holds its database.",
  draining: "The server is about to stop.",
  request_too_large: "This is more than the server takes at once. Send a part of it.",
  timeout: "Sending took too long. Is the connection slow?",
  invalid_csrf_token: "This page is out of date. Reload it.",
  internal_error: "Something in the server went wrong. Its log says what.",
};
const GONE = /^there is no (conversation|message) /;

/** A sentence for an error {code, message}; undefined for one without words. */
export function inWords({ code, message }) {
  if (WORDS[code]) return WORDS[code];
  const gone = GONE.exec(message ?? "");
  if (gone) return `This ${gone[1]} no longer exists.`;
  if (code === "context_length_exceeded") return tooLong(message);
  return message && message[0].toUpperCase() + message.slice(1);
}

function tooLong(message) {
  const [tokens, most] = (message.match(/\b\d+\b/g) ?? []).map((number) => Number(number).toLocaleString("en"));
  return `This conversation has grown to ${tokens} tokens, and the model reads ${most} with its answer. Shorten it, or begin a new chat.`;
}
