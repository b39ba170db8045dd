// Reads files beside the page, which stays alive meanwhile. A File in; {talks, problems} or {error} out.

import { conversationsOf } from "./formats.js";
import { decoded, entriesOf, textOf } from "./zip.js";

const MOST_BYTES = 256 * 2 ** 20; // of one file's text: browsers hold no string of twice as much
const WANTED = /(^|\/)(conversations[^/]*|[^/]*)\.jsonl?$/i;

onmessage = async ({ data: file }) => {
  try {
    postMessage(await read(file));
  } catch (error) {
    postMessage({ error: error.message });
  }
};

async function read(file) {
  const signature = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  if (signature[0] !== 0x50 || signature[1] !== 0x4b) return conversationsOf(await decoded(file.stream(), MOST_BYTES)); // "PK"
  const entries = (await entriesOf(file)).filter(({ name }) => WANTED.test(name));
  const named = entries.filter(({ name }) => /(^|\/)conversations[^/]*\.jsonl?$/i.test(name));
  const all = { talks: [], problems: [] };
  let left = MOST_BYTES;
  for (const entry of named.length > 0 ? named : entries) {
    const text = await textOf(file, entry, left);
    left -= text.length;
    const { talks, problems } = conversationsOf(text);
    all.talks.push(...talks);
    all.problems.push(...problems);
  }
  if (entries.length === 0) throw new Error("there is no .json or .jsonl file in it.");
  return all;
}
