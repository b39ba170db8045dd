// Presets: a model, a system prompt and sampling under a name. Kept with the settings of this browser.

import { $, h, iconButton, replace, toast } from "./dom.js";
import { change, makeControls, settings } from "./settings.js";

/** applied(preset): its model and system prompt are to be taken; its sampling has been. */
export function startPresets(applied) {
  $("preset-save").onclick = save;
  $("preset-name").onkeydown = (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // of the form, which would close
    save();
  };
  draw();

  function save() {
    const name = $("preset-name").value.trim();
    if (!name) return $("preset-name").focus();
    const preset = { name, model: settings.model, system: $("system").value, sampling: settings.sampling };
    change({ presets: [...settings.presets.filter((other) => other.name !== name), preset] });
    $("preset-name").value = "";
    draw();
    toast(`"${name}" is saved in this browser.`);
  }

  function draw() {
    const line = (preset) =>
      h("li", {},
        h("button", { type: "button", class: "link", "data-key": `preset ${preset.name}`, dir: "auto", onclick: () => apply(preset) }, preset.name),
        iconButton("trash", `Delete the preset ${preset.name}`, () => {
          change({ presets: settings.presets.filter((other) => other !== preset) });
          draw();
          $("preset-name").focus();
        }));
    replace($("presets"), ...settings.presets.map(line));
  }

  function apply(preset) {
    change({ sampling: preset.sampling });
    makeControls();
    $("system").value = preset.system;
    applied(preset);
    toast(`"${preset.name}" is in use.`);
  }
}
