// Conversations out of other programs' files, as POST api/import takes them. Pure: text in, data out; nothing of a file is
// run or drawn. What a format has beyond text (pictures, tools' calls, hidden messages) is left out.

const ROLES = { user: "user", human: "user", prompter: "user", assistant: "assistant", gpt: "assistant", chatgpt: "assistant", bot: "assistant", model: "assistant", system: "system", developer: "system" };
const FINISHED = ["stop", "length", "cancelled", "interrupted", "error"];
const MOST_TITLE = 200; // characters, the server's limit

/** {talks, problems}: the conversations of a file, and a sentence for each that could not be read. Throws an Error where the
 * file is none of these formats. */
export function conversationsOf(text) {
  const items = itemsOf(text);
  const talks = [];
  const problems = [];
  let known = 0;
  let ours = null; // {key, talk}: our export has a line for each branch, one after another
  items.forEach((item, i) => {
    try {
      const turns = turnsOf(item);
      if (turns === null && !item?.mapping) return;
      known++;
      if (!turns) return add(fromMapping(item));
      const key = turns.find(([role]) => role === "user")?.[1] + "\n" + systemOf(turns);
      const talk = Array.isArray(item.messages) && ours?.key === key ? ours.talk : talkOf(item);
      addTurns(talk, turns);
      if (talk !== ours?.talk) add(talk);
      ours = { key, talk };
    } catch (error) {
      problems.push(`Conversation ${i + 1}: ${error.message}`);
    }

    function add(talk) {
      if (talk.messages.length > 0) talks.push(talk);
      else problems.push(`Conversation ${i + 1}: there is no question in it.`);
    }
  });
  if (known === 0) throw new Error("there is no conversation in it that this page knows: its own export, ChatGPT's or ShareGPT's.");
  return { talks, problems };
}

/** A JSON array, one object, or JSON lines. */
function itemsOf(text) {
  let whole;
  try {
    whole = JSON.parse(text);
  } catch {
    const lines = text.split("\n").filter((line) => line.trim());
    try {
      return lines.map((line) => JSON.parse(line));
    } catch {
      throw new Error("it is no JSON, or a damaged or cut one.");
    }
  }
  return Array.isArray(whole) ? whole : [whole];
}

/** [[role, text, fields]] of a list of turns: ours, OpenAI's (`messages`) and ShareGPT's (`conversations`); null: none. */
function turnsOf(item) {
  const list = item?.messages ?? item?.conversations ?? item?.conversation;
  if (!Array.isArray(list)) return null;
  return list.map((turn) => {
    const role = ROLES[String(turn?.role ?? turn?.from).toLowerCase()];
    const text = turn?.content ?? turn?.value;
    return [role, typeof text === "string" ? text : partsOf(text), turn];
  });
}

const systemOf = (turns) => turns.filter(([role]) => role === "system").map(([, text]) => text).join("\n\n");

function talkOf(item, system = "") {
  const title = typeof item.title === "string" ? item.title.trim().slice(0, MOST_TITLE).toWellFormed() : "";
  return { title, system, created_at: moment(item.create_time ?? item.created_at), messages: [] };
}

/** Adds turns, and shares those that the conversation begins with already: a second branch of it. */
function addTurns(talk, turns) {
  talk.system ||= systemOf(turns);
  let above = null;
  for (const [role, text, fields] of turns) {
    if (role === undefined || role === "system" || !text) continue;
    const there = talk.messages.findIndex((message) => message.parent === above && message.role === role && message.content === text);
    if (there >= 0) above = there;
    else above = say(talk, above, role, text, {
      finish_reason: FINISHED.includes(fields.finish_reason) ? fields.finish_reason : null,
      disliked: role === "assistant" && fields.weight === 0 && !fields.finish_reason,
    });
  }
  tidy(talk);
}

/** ChatGPT's export: a tree of nodes, `mapping`, of which many are hidden, tools' or empty. */
function fromMapping(item) {
  const talk = talkOf(item);
  const nodes = new Map(Object.entries(item.mapping));
  const roots = [...nodes].filter(([, node]) => !nodes.has(node?.parent)).map(([id]) => id);
  const waiting = roots.reverse().map((id) => [id, null]);
  const seen = new Set(); // a damaged file may go in a circle
  while (waiting.length > 0) {
    const [id, above] = waiting.pop();
    const node = nodes.get(id);
    if (!node || seen.has(id)) continue;
    seen.add(id);
    const children = Array.isArray(node.children) ? node.children : [];
    const here = fromNode(talk, node.message, above);
    for (const child of [...children].reverse()) waiting.push([child, here]);
  }
  tidy(talk);
  return talk;
}

function fromNode(talk, message, above) {
  const role = ROLES[message?.author?.role];
  const { content_type: type, parts, text } = message?.content ?? {};
  const shown = (type === "text" || type === "multimodal_text" || type === "code") && (message.recipient ?? "all") === "all";
  const content = shown && !message.metadata?.is_visually_hidden_from_conversation ? partsOf(parts ?? text) : "";
  if (role === "system") talk.system ||= content;
  if (!content.trim() || (role !== "user" && role !== "assistant")) return above;
  const model = message.metadata?.model_slug;
  return say(talk, above, role, content, {
    model: role === "assistant" && typeof model === "string" ? model.slice(0, MOST_TITLE) : null,
    created_at: moment(message.create_time),
  });
}

/** Adds a message under another. Two in a row of one side become one, beside the first, which `tidy` removes. Returns its
 * number; of an answer to nothing that of nothing. */
function say(talk, above, role, content, fields) {
  const before = talk.messages[above];
  let parent = above;
  if (before?.role === role) {
    before.replaced = true;
    parent = before.parent;
    content = `${before.content}\n\n${content}`;
  }
  if (role === "assistant" && parent === null) return null;
  return talk.messages.push({ parent, role, content, ...fields }) - 1;
}

/** Drops what was replaced by a longer one and has no successors. */
function tidy(talk) {
  const parents = new Set(talk.messages.map(({ parent }) => parent));
  const kept = new Map([[null, null]]);
  const messages = [];
  talk.messages.forEach(({ replaced, ...message }, i) => {
    if (replaced && !parents.has(i)) return;
    kept.set(i, messages.push({ ...message, parent: kept.get(message.parent) }) - 1);
  });
  talk.messages = messages;
}

/** The texts among the parts of a content: strings, or {type: "text", text}. */
function partsOf(content) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return "";
  return content.map((part) => (typeof part === "string" ? part : typeof part?.text === "string" ? part.text : "")).filter(Boolean).join("\n\n");
}

/** Seconds since 1970, of a number or a date in words; null: neither. */
function moment(time) {
  const seconds = typeof time === "string" ? Date.parse(time) / 1000 : Number(time);
  return Number.isFinite(seconds) && seconds > 0 && seconds < 2 ** 33 ? seconds : null;
}
