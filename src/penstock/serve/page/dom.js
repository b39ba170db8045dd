// Makes elements. Text is always a text node, so no text of a person or a model is parsed as HTML (except in
// markdown.js, which sanitises it).

/** h("button", {class: "quiet", onclick: f, "aria-label": "Copy"}, icon("copy"), "Copy") */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function" || name === "value") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Text as HTML, for what goes through the sanitiser. */
export const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

/** A picture from shared/icons.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with a picture only; `replace` finds it by `key` after a new rendering. */
export function iconButton(name, label, onclick, { key = null, pressed = null, disabled = false } = {}) {
  return h(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, disabled, "data-key": key,
      "aria-pressed": pressed === null ? null : String(pressed) },
    icon(name),
  );
}

/** Puts these elements into a container, and touches only what differs. The keyboard stays where it is: if its button
 * was made anew, it goes to the one with the same data-key. */
export function replace(container, ...children) {
  const before = container.contains(document.activeElement) ? document.activeElement : null;
  children.forEach((child, i) => {
    const there = container.childNodes[i];
    if (!there) container.append(child);
    else if (there !== child) there.replaceWith(child);
  });
  while (container.childNodes.length > children.length) container.lastChild.remove();
  if (!before?.dataset.key || document.activeElement === before) return;
  [...container.querySelectorAll("[data-key]")].find((one) => one.dataset.key === before.dataset.key)?.focus();
}

/** Makes `old` look like `fresh` and keeps every node that need not change, with the selection, focus and scrolling in it. */
export function morph(old, fresh) {
  const wanted = [...fresh.childNodes];
  wanted.forEach((next, i) => {
    const there = old.childNodes[i];
    if (!there) old.append(next);
    else if (!alike(there, next)) there.replaceWith(next);
    else if (next instanceof Text) morphText(there, next.data);
    else if (!next.matches(".math")) {
      morphAttributes(there, next);
      morph(there, next);
    }
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

/** A formula is drawn once: it is another one as soon as its source is. */
const alike = (there, next) => there.nodeName === next.nodeName && there.dataset?.tex === next.dataset?.tex;

function morphText(node, text) {
  let kept = 0;
  while (kept < text.length && node.data[kept] === text[kept]) kept++;
  if (kept < Math.max(text.length, node.length)) node.replaceData(kept, node.length - kept, text.slice(kept));
}

function morphAttributes(there, next) {
  for (const { name, value } of next.attributes) if (there.getAttribute(name) !== value) there.setAttribute(name, value);
  for (const { name } of [...there.attributes]) {
    if (!next.hasAttribute(name) && name !== "open") there.removeAttribute(name); // what a person opened stays open
  }
}

/** Does something that moves elements, and selects again what was selected. */
export function keepSelection(action) {
  const selection = getSelection();
  const { anchorNode, anchorOffset, focusNode, focusOffset, isCollapsed } = selection;
  action();
  if (isCollapsed || !anchorNode.isConnected || !focusNode.isConnected) return;
  if (selection.anchorNode === anchorNode && selection.focusNode === focusNode && !selection.isCollapsed) return;
  selection.setBaseAndExtent(anchorNode, anchorOffset, focusNode, focusOffset);
}

/** True while an input method is at work: its Return confirms a word, and its Escape drops one. */
export const composing = (event) => event.isComposing || event.keyCode === 229; // 229: Safari, at the confirmation

const phone = matchMedia("(hover: none) and (pointer: coarse)");

/** Whether a key press sends a text: Return, but on a phone, where it makes a line; Ctrl or Cmd with it always. */
export const sends = (event) =>
  event.key === "Enter" && !event.shiftKey && !composing(event) && (!phone.matches || event.ctrlKey || event.metaKey);

export const $ = (id) => document.getElementById(id);

/** Announces a text to screen readers. */
export function announce(text) {
  $("status").textContent = text;
}

/** Asks, in the page's dialog, before something is gone for good or changes for everybody. */
export async function confirmed(title, text) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm").returnValue = "no";
  $("confirm").showModal();
  await new Promise((resolve) => ($("confirm").onclose = resolve));
  return $("confirm").returnValue === "yes";
}

let toastTimer = 0;

/** Shows a short message at the bottom of the page for a few seconds. */
export function toast(text) {
  announce(text);
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), 4000);
}

/** Copies text; pages that are not served over https or from this machine have no clipboard API. */
export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
  } else {
    const box = h("textarea", { value: text, class: "visually-hidden" });
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  announce("Copied");
}
