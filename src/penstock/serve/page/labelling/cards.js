// The answers of an item as cards in the order of their ranking: drawn, moved by buttons, keys and a pointer. Knows no
// server.

import { announce, h, iconButton } from "../dom.js";
import { render } from "../markdown.js";
import { typeset } from "../maths.js";
import { best, levelOf, place, step, tie, tieAbove, worst } from "./levels.js";

const LETTERS = "ABCDEFGHI";

/** Cards in a list. `changed` is called after each change by a person. */
export class Cards {
  constructor(list, changed) {
    Object.assign(this, { list, changed, levels: [], edits: {}, texts: [], cards: [] });
  }

  /** Shows answers; `levels` and `edits` (texts by number) are what was said of them before. */
  show(texts, levels, edits) {
    Object.assign(this, { texts, levels: levels ?? texts.map((_, i) => [i]), edits: { ...edits } });
    this.cards = texts.map((_, i) => this.#card(i));
    this.list.replaceChildren();
    this.#draw();
  }

  focus(number = this.levels[0][0]) {
    this.cards[number].focus();
  }

  #card(i) {
    const move = (change) => () => this.#move(i, change);
    const grip = h("span", { class: "grip", "aria-hidden": "true", title: "Drag" }, iconOnly("grip"));
    grip.onpointerdown = (event) => this.#drag(i, event);
    const card = h(
      "div",
      { class: "answer-card", role: "group", tabindex: "0", "aria-describedby": "answers-help" },
      h("div", { class: "card-top" }, grip, h("b", { class: "badge rank" }), h("span", { class: "letter" }, `Answer ${LETTERS[i]}`), h("span", { class: "tied" }),
        h("span", { class: "card-buttons" },
          iconButton("best", "The best", move(best)),
          iconButton("arrow-up", "Better", move((levels, answer) => step(levels, answer, -1))),
          iconButton("tie", "Equal to the one above", move(tieAbove)),
          iconButton("arrow-down", "Worse", move((levels, answer) => step(levels, answer, 1))),
          iconButton("worst", "The worst", move(worst)),
          iconButton("edit", "Rewrite", () => this.#edit(i)))),
      h("div", { class: "text" }),
    );
    card.onkeydown = (event) => this.#key(i, event);
    return card;
  }

  #draw() {
    const order = this.levels.flat();
    const items = order.map((i) => this.cards[i].parentElement ?? h("li", {}, this.cards[i]));
    if (items.some((item, i) => this.list.children[i] !== item)) this.list.replaceChildren(...items);
    for (const i of order) this.#drawCard(i);
  }

  #drawCard(i) {
    const number = levelOf(this.levels, i);
    const level = this.levels[number];
    const equals = level.filter((other) => other !== i).map((other) => LETTERS[other]);
    const card = this.cards[i];
    card.querySelector(".rank").textContent = String(number + 1);
    card.querySelector(".tied").textContent = equals.length ? `equal to ${equals.join(", ")}` : "";
    card.parentElement.classList.toggle("joined", level.indexOf(i) > 0);
    card.setAttribute("aria-label", this.#words(i));
    const text = card.querySelector(".text");
    const shown = this.edits[i] ?? this.texts[i];
    if (text.dataset.shown === shown || text.querySelector("textarea")) return;
    text.dataset.shown = shown;
    const prose = h("div", { class: "prose" });
    prose.append(render(shown));
    typeset(prose);
    const restore = () => {
      delete this.edits[i];
      this.#drawCard(i);
      this.changed();
    };
    text.replaceChildren(prose, ...(i in this.edits ? [h("p", { class: "help" }, "Rewritten by you. ", h("button", { type: "button", class: "link", onclick: restore }, "Restore"))] : []));
  }

  #words(i) {
    const number = levelOf(this.levels, i);
    const equals = this.levels[number].filter((other) => other !== i).map((other) => LETTERS[other]);
    return `Answer ${LETTERS[i]}, rank ${number + 1} of ${this.levels.length}${equals.length ? `, equal to ${equals.join(" and ")}` : ""}${i in this.edits ? ", rewritten" : ""}`;
  }

  #move(i, change) {
    const focused = this.cards[i].contains(document.activeElement) ? document.activeElement : null;
    this.levels = change(this.levels, i);
    this.#draw();
    focused?.focus(); // an element that moves loses it
    announce(this.#words(i));
    this.changed();
  }

  #key(i, event) {
    if (event.target !== this.cards[i] || event.ctrlKey || event.metaKey || event.altKey) return;
    const order = this.levels.flat();
    const at = order.indexOf(i);
    const { key, shiftKey } = event;
    const up = (levels, answer) => step(levels, answer, -1);
    const down = (levels, answer) => step(levels, answer, 1);
    const moves = { k: up, j: down, "=": tieAbove, b: best, w: worst, ...(shiftKey && { ArrowUp: up, ArrowDown: down }) };
    if (moves[key]) this.#move(i, moves[key]);
    else if (/^[1-9]$/.test(key)) this.#move(i, (levels, answer) => place(levels, answer, Number(key) - 1));
    else if (key === "e") this.#edit(i);
    else if (key === "ArrowUp" || key === "ArrowDown") this.cards[order[at + (key === "ArrowUp" ? -1 : 1)]]?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #edit(i) {
    const text = this.cards[i].querySelector(".text");
    if (text.querySelector("textarea")) return;
    const box = h("textarea", { rows: "6", dir: "auto", "aria-label": `Answer ${LETTERS[i]}, rewritten`, value: this.edits[i] ?? this.texts[i] });
    const close = (keep) => {
      if (keep && box.value.trim() && box.value !== this.texts[i]) this.edits[i] = box.value;
      else if (keep) delete this.edits[i];
      delete text.dataset.shown;
      text.replaceChildren();
      this.#drawCard(i);
      this.cards[i].focus();
      if (keep) this.changed();
    };
    box.onkeydown = (event) => {
      if (event.key !== "Escape" || event.isComposing) return;
      event.stopPropagation();
      close(false);
    };
    const buttons = h("div", { class: "editor-buttons" },
      h("button", { type: "button", class: "secondary", onclick: () => close(false) }, "Cancel"),
      h("button", { type: "button", class: "primary", onclick: () => close(true) }, "Keep"));
    text.replaceChildren(h("div", { class: "editor" }, box, buttons));
    box.focus();
  }

  /** Whether somebody is in the middle of rewriting. */
  get editing() {
    return this.list.querySelector("textarea") !== null;
  }

  /** Follows a pointer: between two cards is a place of its own, on the middle of one is a tie. */
  #drag(i, event) {
    event.preventDefault();
    const grip = event.currentTarget;
    grip.setPointerCapture(event.pointerId);
    this.cards[i].classList.add("dragged");
    let target = null;
    const mark = (found) => {
      target?.card.classList.remove("before", "after", "onto");
      target = found;
      target?.card.classList.add(target.where);
    };
    grip.onpointermove = ({ clientY }) => mark(this.#under(i, clientY));
    const end = (apply) => {
      grip.onpointermove = grip.onpointerup = grip.onpointercancel = null;
      this.cards[i].classList.remove("dragged");
      const chosen = target;
      mark(null);
      if (apply && chosen) this.#drop(i, chosen);
    };
    grip.onpointerup = () => end(true);
    grip.onpointercancel = () => end(false);
  }

  /** Where an answer would go; null on its own card. */
  #under(i, y) {
    const own = this.cards[i].getBoundingClientRect();
    if (y >= own.top && y <= own.bottom) return null;
    for (const other of this.levels.flat()) {
      if (other === i) continue;
      const { top, height } = this.cards[other].getBoundingClientRect();
      const part = (y - top) / height;
      if (part < 1.02) return { other, card: this.cards[other], where: part < 0.25 ? "before" : part > 0.75 ? "after" : "onto" };
    }
    const other = this.levels.flat().findLast((one) => one !== i);
    return { other, card: this.cards[other], where: "after" };
  }

  #drop(i, { other, where }) {
    if (where === "onto") return this.#move(i, (levels) => tie(levels, i, other));
    this.#move(i, (levels) => {
      const rest = levels.map((level) => level.filter((one) => one !== i)).filter((level) => level.length);
      return place(levels, i, levelOf(rest, other) + (where === "after" ? 1 : 0));
    });
  }
}

function iconOnly(name) {
  return iconButton(name, "", null).firstChild;
}
