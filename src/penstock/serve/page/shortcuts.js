// The keyboard: one table for what keys do and for the sheet that lists them.

import { $, composing, h } from "./dom.js";

const mac = /Mac|iP(hone|ad)/.test(navigator.platform);
const CTRL = mac ? "\u2318" : "Ctrl"; // as keyboards of Apple show it

/** keys: as shown; is(event): whether it was pressed; does: the name of what it does; typing: in a field too. */
const SHORTCUTS = [
  { keys: ["Enter"], label: "Send the message" },
  { keys: ["Shift", "Enter"], label: "New line in the message" },
  { keys: ["Esc"], label: "Stop the answer", does: "stop", typing: true, is: ({ key }) => key === "Escape" },
  { keys: ["\u2191"], label: "In an empty message: change the last one", does: "editLast", typing: true, is: (event) => event.key === "ArrowUp" && event.target === $("prompt") && $("prompt").value === "" },
  { keys: ["/"], label: "Go to the message", does: "write", is: ({ key }) => key === "/" },
  { keys: [CTRL, "K"], label: "Search conversations", does: "search", typing: true, is: (event) => held(event, "k", false) },
  { keys: [CTRL, "Shift", "O"], label: "New chat", does: "newChat", typing: true, is: (event) => held(event, "o", true) },
  { keys: [CTRL, "Shift", "S"], label: "Fold or show the list", does: "fold", typing: true, is: (event) => held(event, "s", true) },
  { keys: ["?"], label: "This list", does: "help", is: ({ key }) => key === "?" },
];

const held = (event, letter, shift) =>
  (mac ? event.metaKey : event.ctrlKey) && event.shiftKey === shift && !event.altKey && event.key.toLowerCase() === letter;

/** does: {stop, editLast, write, search, newChat, fold}: called when the page is open and no dialog is. */
export function startShortcuts(does) {
  const actions = { ...does, help: () => $("shortcuts").showModal() };
  document.addEventListener("keydown", (event) => {
    if (composing(event) || $("app").hidden || document.querySelector("dialog[open]")) return;
    const typing = event.target.closest("input, textarea, select, [contenteditable]");
    const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
    const pressed = SHORTCUTS.find(({ is, typing: anywhere }) => is?.(event) && (anywhere || (!typing && plain)));
    if (!pressed) return;
    if (pressed.does !== "stop") event.preventDefault();
    actions[pressed.does]();
  });
  $("help").onclick = actions.help;
  const line = ({ keys, label }) => [h("dt", {}, keys.map((key) => h("kbd", {}, key))), h("dd", {}, label)];
  $("shortcut-list").replaceChildren(...SHORTCUTS.flatMap(line));
}
