// Reads texts out of a zip file, in the browser. Knows the plain format (no zip64, no encryption) and trusts no size that
// the file itself states: what is unpacked is counted.

const END = 0x06054b50; // signature of the end of the central directory
const ENTRY = 0x02014b50; // of an entry in it
const FIND = 65_557; // bytes from the file's end in which END must be: its 22, and the longest comment
const MOST_ENTRIES = 20_000;

/** The names and places of a zip's files: [{name, start, packed, method}]. Throws an Error in a person's words. */
export async function entriesOf(blob) {
  const tail = await view(blob, Math.max(0, blob.size - FIND), blob.size);
  let at = tail.byteLength - 22;
  while (at >= 0 && tail.getUint32(at, true) !== END) at--;
  if (at < 0) throw new Error("it is no zip file, or only a part of one.");
  const count = tail.getUint16(at + 10, true);
  const size = tail.getUint32(at + 12, true);
  const start = tail.getUint32(at + 16, true);
  if (count === 0xffff || start === 0xffffffff || count > MOST_ENTRIES || start + size > blob.size) {
    throw new Error("it is a zip file that this page cannot read; unpack it, and choose the .json file in it.");
  }
  const list = await view(blob, start, start + size);
  const entries = [];
  for (let i = 0, place = 0; i < count; i++) {
    if (place + 46 > list.byteLength || list.getUint32(place, true) !== ENTRY) throw new Error("it is a damaged zip file.");
    const lengths = [28, 30, 32].map((offset) => list.getUint16(place + offset, true)); // name, extra, comment
    if (place + 46 + lengths[0] > list.byteLength) throw new Error("it is a damaged zip file.");
    const name = new TextDecoder().decode(new Uint8Array(list.buffer, place + 46, lengths[0]));
    const [method, packed, start] = [list.getUint16(place + 10, true), list.getUint32(place + 20, true), list.getUint32(place + 42, true)];
    entries.push({ name, method, packed, start });
    place += 46 + lengths[0] + lengths[1] + lengths[2];
  }
  return entries;
}

/** A file's text, of `most` bytes at most. */
export async function textOf(blob, { start, packed, method }, most) {
  const head = await view(blob, start, start + 30);
  if (head.byteLength < 30 || (method !== 0 && method !== 8)) throw new Error("it is packed in a way that this page cannot read.");
  const begin = start + 30 + head.getUint16(26, true) + head.getUint16(28, true);
  let bytes = blob.slice(begin, begin + packed).stream();
  if (method === 8) bytes = bytes.pipeThrough(new DecompressionStream("deflate-raw"));
  return decoded(bytes, most);
}

/** A stream of UTF-8 as text; more than `most` bytes are an error, and are not read. */
export async function decoded(stream, most) {
  const reader = stream.getReader();
  const decoder = new TextDecoder("utf-8", { fatal: true });
  const parts = [];
  let size = 0;
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) break;
      size += value.byteLength;
      if (size > most) throw new RangeError(`it holds more than ${Math.round(most / 2 ** 20)} MB of text; split it.`);
      parts.push(decoder.decode(value, { stream: true }));
    }
    parts.push(decoder.decode());
  } catch (error) {
    reader.cancel().catch(() => {});
    throw error instanceof RangeError ? error : new Error("it is damaged, or no text in UTF-8.");
  }
  return parts.join("");
}

const view = async (blob, begin, end) => new DataView(await blob.slice(begin, end).arrayBuffer());
