// Text files that go with a message: chosen, dropped or pasted, shown as chips, and sent as a part of the text, each between
// <file name="..."> and </file>. Nothing but text is taken, and nothing of it is run.

import { $, announce, h, iconButton, replace, toast } from "./dom.js";

const MOST = 500_000; // characters of a message, the server's limit
const CLOSE = "\n</file>";

let files = []; // {name, text}, to be sent with the next message
let changed = () => {};

export const attached = () => files.length > 0;

/** changed(): draw what depends on whether there are files. */
export function startAttachments(callback) {
  changed = callback;
  $("attach").onclick = () => $("files").click();
  $("files").onchange = async () => {
    const chosen = [...$("files").files];
    $("files").value = "";
    await attach(chosen);
  };
  const carries = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!carries(event)) return;
    event.preventDefault();
    if (!$("app").hidden) attach([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", ({ clipboardData, target }) => {
    if (target === $("prompt") && clipboardData.files.length > 0 && !clipboardData.types.includes("text/plain")) attach([...clipboardData.files]);
  });
}

async function attach(chosen) {
  for (const file of chosen) {
    try {
      files.push({ name: file.name.replaceAll(/["\r\n]/g, " "), text: await textOf(file) });
    } catch (error) {
      toast(`${file.name}: ${error.message}`);
      continue;
    }
    announce(`${file.name} is attached.`);
  }
  draw();
  $("prompt").focus();
}

async function textOf(file) {
  const room = MOST - files.reduce((sum, { text }) => sum + text.length, 0);
  if (file.size > 4 * MOST) throw tooLong(file.size, room);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error("it is no text in UTF-8. Only text files can be attached.");
  }
  if (text.includes("\0")) throw new Error("it is no text. Only text files can be attached.");
  if (text.length > room) throw tooLong(text.length, room);
  return text;
}

const tooLong = (size, room) =>
  new Error(`it has ${size.toLocaleString("en")} characters, and the message has room for ${room.toLocaleString("en")}.`);

function draw() {
  const chip = (file) =>
    h("li", { class: "chip" }, h("span", { title: file.name }, file.name), iconButton("close", `Take ${file.name} off`, () => {
      files = files.filter((other) => other !== file);
      draw();
      $("prompt").focus();
    }));
  replace($("chips"), ...files.map(chip));
  $("chips").hidden = files.length === 0;
  changed();
}

/** The text of a message with its files, which are then no longer attached. `back()` attaches them again. */
export function withFiles(text) {
  const taken = files;
  files = [];
  draw();
  const parts = taken.map((file) => `<file name="${file.name}">\n${file.text}${CLOSE}`);
  const back = () => {
    files = [...taken, ...files];
    draw();
  };
  return { content: [text, ...parts].filter((part) => part.trim()).join("\n\n"), back };
}

/** A message's own text, and the files at its end: {text, files: [{name, text}]}. */
export function splitFiles(content) {
  const found = [];
  let text = content;
  while (text.endsWith(CLOSE)) {
    const begin = text.lastIndexOf('<file name="');
    const head = begin >= 0 && /^<file name="([^"\n]*)">\n/.exec(text.slice(begin, begin + 1000));
    if (!head || (begin > 0 && text.slice(begin - 2, begin) !== "\n\n")) break;
    found.unshift({ name: head[1], text: text.slice(begin + head[0].length, -CLOSE.length) });
    text = text.slice(0, Math.max(0, begin - 2));
  }
  return { text, files: found };
}
