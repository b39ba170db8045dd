// The settings of this browser: models, sampling, side by side. Kept in local storage.

import { $, h } from "./dom.js";

const CONTROLS = [
  // field of the request, label, range, position of the slider by default, and effect
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, slider: 1, help: "0 always takes the likeliest token; higher is more varied." },
  { name: "top_p", label: "Top p", min: 0.05, max: 1, step: 0.05, slider: 1, help: "Keeps the likeliest tokens that together reach this probability." },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, slider: 0, help: "Drops tokens less likely than this share of the likeliest." },
  { name: "top_k", label: "Top k", min: 0, max: 1000, step: 1, help: "Keeps this many of the likeliest tokens; 0 keeps all." },
  { name: "max_tokens", label: "Longest answer", min: 1, max: 131072, step: 1, help: "In tokens." },
  { name: "seed", label: "Seed", min: 0, max: 2147483647, step: 1, help: "The same seed gives the same answer." },
];

const KEY = "penstock.settings";

/** {model, modelB, compare, blind, sampling: {temperature: 0.7, ...}; system: that of new conversations; titles: whether
 * the model names them; folded: the list; presets: [{name, model, system, sampling}]}; change it through `change`. */
export const settings = {
  model: null, modelB: null, compare: false, blind: true, sampling: {}, system: "", titles: true, folded: false, presets: [],
  ...JSON.parse(localStorage.getItem(KEY) ?? "{}"),
};

export function change(fields) {
  Object.assign(settings, fields);
  localStorage.setItem(KEY, JSON.stringify(settings));
}

/** Fills the settings drawer with the sampling controls. */
export function makeControls() {
  $("sampling").replaceChildren(...CONTROLS.map(control));
  for (const name of ["blind", "titles"]) {
    $(name).checked = settings[name];
    $(name).onchange = () => change({ [name]: $(name).checked });
  }
  $("reset-sampling").onclick = () => {
    change({ sampling: {} });
    makeControls();
  };
}

function control({ name, label, help, slider, ...range }) {
  const value = settings.sampling[name];
  const id = `sampling-${name}`;
  const number = h("input", { id, type: "number", inputmode: "decimal", placeholder: "auto", "aria-describedby": `${id}-help`, ...range, step: range.step < 1 ? "any" : range.step, value: value ?? "" });
  const line = slider !== undefined && h("input", { type: "range", class: value === undefined ? "auto" : null, "aria-label": `${label} slider`, tabindex: "-1", ...range, value: value ?? slider });
  const set = (text) => {
    const { [name]: _, ...others } = settings.sampling;
    change({ sampling: text === "" ? others : { ...others, [name]: Number(text) } });
    if (line) line.classList.toggle("auto", text === "");
  };
  number.oninput = () => {
    if (!number.validity.valid) return;
    if (line) line.value = number.value || slider;
    set(number.value);
  };
  if (line) {
    line.oninput = () => {
      number.value = line.value;
      set(line.value);
    };
  }
  return h(
    "div",
    { class: "control" },
    h("label", { for: id }, label),
    number,
    line,
    h("p", { class: "help", id: `${id}-help` }, help),
  );
}

/** The requests for one prompt: one, or two for answers side by side. */
export function requests() {
  const { model, modelB, compare, sampling } = settings;
  const seed = sampling.seed ?? Math.floor(Math.random() * 2 ** 31); // drawn here: shown with the answer, as is
  const one = { model, ...sampling, seed };
  if (!compare) return [one];
  if (model !== modelB) return [one, { ...one, model: modelB }];
  return [one, { ...one, seed: (seed + 1) % 2 ** 31 }]; // one model, two seeds
}
