// What an answer took, and how full the context is: numbers in words, and the gauge below the message field.

import { $ } from "./dom.js";

const contexts = new Map(); // model -> tokens of its context

/** cards: [{id, max_model_len}] */
export function setContexts(cards) {
  for (const { id, max_model_len } of cards) contexts.set(id, max_model_len);
}

const count = (number) => number.toLocaleString("en");

/** "128 tokens, 31.2 per second"; "" for an answer that tells nothing. */
export function usageInWords({ usage }) {
  if (!usage) return "";
  const { completion_tokens: tokens, seconds } = usage;
  const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} per second` : ""; // from the first one on
  return `${count(tokens)} token${tokens === 1 ? "" : "s"}${rate}`;
}

/** Draws the gauge for a path through the conversation: what its last answer with numbers read and wrote. */
export function drawGauge(steps) {
  const messages = steps.flatMap(({ message }) => (message.usage ? [message] : []));
  const last = messages.at(-1);
  const most = last && contexts.get(last.model);
  $("gauge").hidden = !most;
  if (!most) return;
  const used = Math.min(most, last.usage.prompt_tokens + last.usage.completion_tokens);
  $("gauge").classList.toggle("nearly", used / most >= 0.8);
  $("gauge").setAttribute("aria-valuemax", String(most));
  $("gauge").setAttribute("aria-valuenow", String(used));
  $("gauge").setAttribute("aria-valuetext", `${count(used)} of ${count(most)} tokens`);
  $("gauge").title = "How much of what the model can read this conversation fills";
  $("gauge-fill").style.width = `${(100 * used) / most}%`;
  $("gauge-text").textContent = `${count(used)} of ${count(most)} tokens`;
}

/** "14:03" today, "28 Nov 14:03" before, and the whole date for the pointer. */
export function timeInWords(iso) {
  const time = new Date(iso);
  const clock = time.toLocaleTimeString([], { hour: "numeric", minute: "2-digit" });
  const today = time.toDateString() === new Date().toDateString();
  const year = time.getFullYear() === new Date().getFullYear() ? undefined : "numeric";
  const day = time.toLocaleDateString([], { day: "numeric", month: "short", year });
  return { short: today ? clock : `${day}, ${clock}`, long: time.toLocaleString() };
}
