// The owner's view: figures, labellers and their tokens, items in and out, settings.

import { ApiError, labelling, models } from "../api.js";
import { $, copy, h, replace, toast } from "../dom.js";

const BATCH_BYTES = 600_000; // of a request, which the server limits to 1 MiB
const BATCH_ITEMS = 200;

let guard = (action) => action();

export async function startRoom(guarded) {
  guard = guarded;
  const { settings } = await labelling.overview();
  const served = (await models().catch(() => [])).map(({ id }) => id);
  const part = (id) => h("div", { id });
  replace($("room"), part("figures"), section("Labellers", part("people"), newLabeller()), items(served), settingsForm(settings), exports(), part("problems"));
  await draw();
}

/** Draws what others change. What the owner is typing stays. */
async function draw() {
  const data = await labelling.overview();
  replace($("figures"), figures(data));
  replace($("people"), ...(data.labellers.length ? [people(data.labellers)] : []));
  replace($("problems"), problems(data));
}

const refreshed = (action, words) => () => guard(async () => {
  await action();
  if (words) toast(words);
  await draw();
});

const share = (value) => (value === null ? "-" : `${(100 * value).toFixed(1)} %`);
const section = (title, ...children) => h("section", { class: "room-part", "aria-label": title }, h("h2", {}, title), ...children);

function figures(data) {
  const pairs = [
    ["Items", data.items], ["Open", data.open_items], ["Judgements", data.judgements], ["Test items", data.gold_items],
    ["Being answered", data.drafts],
    ["Alpha (Krippendorff)", data.alpha === null ? "-" : data.alpha.toFixed(3)], ["Pairs in agreement", share(data.pair_agreement)],
    ["Items compared", data.items_compared],
  ];
  return section("Figures",
    h("dl", { class: "figures" }, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
    h("p", { class: "help" }, "Alpha and agreement are over the items compared, those that two people or more ranked. Alpha is 1 where they agree and 0 where chance would do as well."),
    h("button", { type: "button", class: "secondary", onclick: refreshed(() => {}) }, "Look again"));
}

function people(labellers) {
  const row = (one) => h("tr", {},
    h("th", { scope: "row" }, one.name), ...[one.ranked, one.skipped, one.gold_ranked, share(one.gold_accuracy), one.median_seconds === null ? "-" : `${one.median_seconds.toFixed(0)} s`].map((value) => h("td", {}, String(value))),
    h("td", {}, one.name !== "owner" && h("span", { class: "row-buttons" },
      h("button", { type: "button", class: "link", onclick: () => hand(one.name) }, "New link"),
      one.active && h("button", { type: "button", class: "link", onclick: refreshed(() => labelling.endLabeller(one.id), `${one.name}'s link has ended.`) }, "End"))));
  const head = ["Name", "Ranked", "Skipped", "Tested", "Right", "Median", ""].map((title) => (title ? h("th", { scope: "col" }, title) : h("td", {})));
  return h("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": "Their work" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, labellers.map(row))));
}

function newLabeller() {
  const name = h("input", { type: "text", id: "new-labeller", maxlength: "60", required: true, placeholder: "Name", autocomplete: "off" });
  const add = async (event) => {
    event.preventDefault();
    if (await hand(name.value.trim())) name.value = "";
  };
  return h("form", { class: "line", onsubmit: add }, h("label", { for: "new-labeller", class: "visually-hidden" }, "Name of a new labeller"), name, h("button", { class: "primary", type: "submit" }, "Add a labeller"));
}

/** Makes a labeller's link, which ends an earlier one, and shows it. */
const hand = (name) => guard(async () => {
  const { token } = await labelling.addLabeller(name);
  $("token-title").textContent = `The link of ${name}`;
  $("link").value = new URL(`label#token=${encodeURIComponent(token)}`, document.baseURI).href;
  $("copy-link").onclick = () => copy($("link").value);
  $("token-shown").showModal();
  $("link").select();
  await draw();
});

function items(served) {
  const file = h("input", { type: "file", id: "import-file", accept: ".jsonl,.json,.ndjson", required: true });
  const gold = h("input", { type: "checkbox", id: "import-gold" });
  const number = (id, label, value, range) => h("div", { class: "field" }, h("label", { for: id }, label), h("input", { type: "number", id, value, ...range }));
  const boxes = served.map((model, i) => h("label", { class: "switch" }, h("input", { type: "checkbox", class: "draft-model", id: `draft-${i}`, value: model, checked: true }), h("span", {}, model)));
  const add = (event) => {
    event.preventDefault();
    guard(async () => {
      const drafters = [...document.querySelectorAll(".draft-model:checked")].map((box) => box.value);
      const draft = { models: drafters, answers: Number($("draft-answers").value), keep: Number($("draft-keep").value) || null, temperature: Number($("draft-temperature").value), max_tokens: Number($("draft-tokens").value) };
      const words = await send(objects(await file.files[0].text()), { gold: gold.checked, ...(drafters.length && !gold.checked ? { draft } : {}) });
      file.value = "";
      gold.checked = false;
      toast(words);
      await draw();
    });
  };
  return section("Items",
    h("p", { class: "help" }, "JSON lines or a JSON array: prompt and responses, chosen and rejected, Argilla's records, or Label Studio's tasks. The models below answer prompts that come alone."),
    h("form", { class: "stack", onsubmit: add },
      h("div", { class: "field" }, h("label", { for: "import-file" }, "File"), file),
      h("label", { class: "switch" }, gold, h("span", {}, "Their rankings are known: use them to test labellers")),
      boxes.length > 0 && h("fieldset", {}, h("legend", {}, "Models that answer"), ...boxes, h("div", { class: "line" },
        number("draft-answers", "Answers", "4", { min: 2, max: 9 }),
        number("draft-keep", "Of them to rank", "", { min: 2, max: 9, placeholder: "all" }),
        number("draft-temperature", "Temperature", "1", { min: 0, max: 2, step: "any" }),
        number("draft-tokens", "Longest answer", "512", { min: 1, max: 131072 }))),
      h("button", { class: "primary", type: "submit" }, "Import")));
}

/** The objects of a file: one array, or one on each line. */
function objects(text) {
  const body = text.replace(/^\ufeff/, "").trim();
  const lines = body.startsWith("[") ? [] : body.split("\n");
  try {
    if (!lines.length) return JSON.parse(body);
  } catch {
    throw new ApiError(400, { message: "The file is no JSON array." });
  }
  return lines.map((line, i) => {
    try {
      return line.trim() ? JSON.parse(line) : null;
    } catch {
      throw new ApiError(400, { message: `Line ${i + 1} is no JSON.` });
    }
  }).filter((one) => one !== null);
}

/** Sends objects to the room, some at a time. Returns what came of it. */
async function send(rows, options) {
  let added = 0;
  let known = 0;
  for (let start = 0; start < rows.length; ) {
    let end = start;
    for (let size = 0; end < rows.length && end - start < BATCH_ITEMS && (end === start || size < BATCH_BYTES); end++) size += JSON.stringify(rows[end]).length * 3;
    try {
      const answer = await labelling.add({ items: rows.slice(start, end), ...options });
      added += answer.added;
      known += answer.known;
    } catch (error) {
      error.message = error.message.replace(/items\[(\d+)\]/gi, (_, i) => `Object ${start + Number(i) + 1}`);
      throw error;
    }
    start = end;
  }
  return `${added} items are new${known ? `, ${known} were there already` : ""}.`;
}

function settingsForm(settings) {
  const guidelines = h("textarea", { id: "set-guidelines", rows: "8", dir: "auto", value: settings.guidelines });
  const numbers = [["labellers_per_item", "Labellers per item", 1, 50], ["lease_minutes", "Minutes that an item is held", 1, 10080], ["gold_every", "One in so many tests the labeller (0: none)", 0, 1000]];
  const fields = numbers.map(([name, label, min, max]) => h("div", { class: "field" }, h("label", { for: `set-${name}` }, label), h("input", { type: "number", id: `set-${name}`, min, max, required: true, value: settings[name] })));
  const save = (event) => {
    event.preventDefault();
    const values = Object.fromEntries(numbers.map(([name]) => [name, Number($(`set-${name}`).value)]));
    refreshed(() => labelling.change({ guidelines: guidelines.value, ...values }), "Saved.")();
  };
  return section("Settings", h("form", { class: "stack", onsubmit: save },
    h("label", { for: "set-guidelines" }, "Guidelines, in markdown"), guidelines, ...fields, h("button", { class: "primary", type: "submit" }, "Save")));
}

function exports() {
  const link = (href, text, help) => h("li", {}, h("a", { class: "link", href, download: "" }, text), h("span", { class: "help" }, ` ${help}`));
  return section("Out", h("ul", { class: "plain-list" },
    link("api/labelling/export?what=rankings", "Rankings", "for penstock reward, dpo and improve"),
    link("api/labelling/export?what=rewritten", "Rewritten answers", "for penstock sft"),
    link("api/labelling/export?what=argilla", "Argilla's records", "for Dataset.from_disk"),
    link("api/labelling/export?what=label-studio", "Label Studio's tasks", "with the rankings as annotations"),
    link("api/labelling/audit", "Audit trail", "who did what, and when")));
}

function problems({ flags, problems: failed }) {
  const remove = (id) => h("button", { type: "button", class: "link", onclick: refreshed(() => labelling.remove(id), "Removed.") }, "Remove the item");
  const rows = [
    ...flags.map((one) => h("li", {}, h("b", {}, one.flag), ` by ${one.labeller}${one.note ? `: ${one.note}` : ""} `, remove(one.item_id))),
    ...failed.map((one) => h("li", {}, h("b", {}, "no answers"), ` ${one.problem} `, remove(one.item_id))),
  ];
  return section("To look at", rows.length ? h("ul", { class: "plain-list" }, rows) : h("p", { class: "help" }, "Nothing was flagged."));
}
