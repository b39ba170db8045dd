// A conversation is a tree of messages: editing or regenerating adds a sibling. The screen shows one path
// through it. Pure: knows neither the server nor the page.

/** {messages: id -> message, oldest first; picked: parent id -> the child on the screen; pairs: [{shown, blind}]} */
export function makeTree(messages, votes, { pairs = [], picked = [] } = {}) {
  const tree = { messages: new Map(), picked: new Map(picked), pairs: [], thumbs: new Map(), verdicts: new Map() };
  for (const message of messages) tree.messages.set(message.id, message);
  for (const pair of pairs) addPair(tree, pair.shown, pair.blind);
  for (const vote of votes) addVote(tree, vote);
  return tree;
}

/** Two answers that are shown side by side, left first. */
export function addPair(tree, shown, blind) {
  if (!pairOf(tree, shown[0])) tree.pairs.push({ shown, blind });
}

export function pairOf(tree, id) {
  return tree.pairs.find((pair) => pair.shown.includes(id)) ?? null;
}

/** The last vote on the same thing counts. */
export function addVote(tree, vote) {
  if (vote.kind === "thumb") {
    tree.thumbs.set(vote.message_id, vote.value);
  } else if (!vote.shown.some((id) => vote.shown.includes(tree.messages.get(id)?.edited_from))) { // one rewrites the other
    addPair(tree, vote.shown, false);
    tree.verdicts.set(pairOf(tree, vote.shown[0]), vote.chosen_id);
  }
}

export function childrenOf(tree, parentId) {
  return [...tree.messages.values()].filter((message) => message.parent_id === parentId);
}

/** Shows the branch with a message. */
export function reveal(tree, id) {
  for (let message = tree.messages.get(id); message; message = tree.messages.get(message.parent_id)) {
    tree.picked.set(message.parent_id, message.id);
  }
}

/** Ids of a message and of all that follow it. */
export function below(tree, id) {
  const ids = new Set([id]);
  for (const message of tree.messages.values()) if (ids.has(message.parent_id)) ids.add(message.id); // a parent comes first
  return ids;
}

/** The successors of a message: lists of one message, or of two for a pair; oldest first. */
export function alternatives(tree, parentId) {
  const found = [];
  for (const message of childrenOf(tree, parentId)) {
    const pair = pairOf(tree, message.id);
    const shown = pair?.shown.map((id) => tree.messages.get(id));
    if (!shown?.every((one) => one)) found.push([message]);
    else if (!found.some((one) => one[0] === shown[0])) found.push(shown);
  }
  return found;
}

/** The path on the screen, from the first message down: [{options, index, message}]; the path goes on from message. */
export function path(tree) {
  const steps = [];
  let parent = null;
  while (true) {
    const options = alternatives(tree, parent);
    if (options.length === 0) return steps;
    const picked = tree.picked.get(parent);
    const found = options.findIndex((option) => option.some((message) => message.id === picked));
    const index = found < 0 ? options.length - 1 : found;
    const message = goesOn(tree, options[index]);
    steps.push({ options, index, message });
    parent = message.id;
  }
}

/** Of a pair: the answer with a reply, or the winner, or the left one. Otherwise the only message. */
function goesOn(tree, option) {
  const verdict = tree.verdicts.get(pairOf(tree, option[0].id));
  return (
    option.find((message) => childrenOf(tree, message.id).length > 0) ??
    option.find((message) => message.id === verdict) ??
    option[0]
  );
}
