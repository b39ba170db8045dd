// What a model thinks before it answers: the text between <think> and </think> at the beginning of its answer.

/** {thinking: null without a thought; closed: whether it has ended; answer: the text behind it} */
export function splitThinking(text) {
  const match = /^\s*<think>([\s\S]*?)(<\/think>|$)/.exec(text);
  if (!match) return { thinking: null, closed: true, answer: text };
  return { thinking: match[1].trim(), closed: match[2] !== "", answer: text.slice(match[0].length).trimStart() };
}
