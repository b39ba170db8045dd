// The page of versions: what a model learned from its users' votes, round by round; rolling back, trust, a new round.

import { listen, session, versions } from "../api.js";
import { $, announce, confirmed, h, replace, toast } from "../dom.js";

const POLL = 2000; // milliseconds, while a round runs; else five times as long

async function start() {
  try {
    await session.resume();
  } catch (error) {
    return banner(error.status === 401 ? signedOut() : error.message);
  }
  await refresh();
}

const signedOut = () => h("span", {}, "Log in first: ", h("a", { class: "link", href: "./" }, "the chat page"), " asks for the key.");

let timer = 0;
let drawn = "";

async function refresh() {
  clearTimeout(timer);
  let busy = false;
  try {
    const { data } = await versions.list();
    banner(data.length ? null : "No folder of versions is served here. `penstock improve RUN --model MODEL` makes one; serve it with --follow.");
    busy = data.some((model) => model.busy);
    draw(data);
  } catch (error) {
    banner(error.status === 401 ? signedOut() : error.message);
  }
  timer = setTimeout(refresh, busy ? POLL : 5 * POLL);
}

function banner(content) {
  replace($("banner"), ...(content ? [typeof content === "string" ? document.createTextNode(content) : content] : []));
  $("banner").hidden = !content;
}

/** Draws what has changed: a page that is read is not moved. */
function draw(data) {
  const text = JSON.stringify(data);
  if (text === drawn) return;
  if (drawn) announce("The versions have changed.");
  drawn = text;
  const open = new Set([...document.querySelectorAll("details[open]")].map((details) => details.dataset.key));
  replace($("models"), ...data.map(modelSection));
  for (const details of document.querySelectorAll("details")) details.open = open.has(details.dataset.key);
}

function modelSection(model) {
  const rows = model.versions.filter((row) => "decision" in row);
  const words = model.versions.filter((row) => "event" in row);
  return h(
    "section",
    { class: "model", "aria-label": model.model },
    h(
      "header",
      {},
      h("div", {}, h("h2", {}, model.model), h("p", {}, `Version ${model.current} is served.`, model.follows ? "" : " This server does not follow (--follow): it answers from what it began with.")),
      h("div", { class: "round" }, roundButton(model)),
    ),
    model.log && h("pre", { class: "log", "aria-label": "The newest round" }, model.log),
    ...rows.reverse().map((row) => versionCard(model, row, words.filter((word) => word.version === row.version))),
  );
}

function roundButton(model) {
  if (!model.busy) {
    return h("button", { type: "button", class: "primary", "data-key": `begin ${model.model}`, onclick: () => act(() => versions.begin(model.model), "A round has begun.") }, "Learn from new votes now");
  }
  return h("button", { type: "button", class: "secondary", "data-key": `stop ${model.model}`, onclick: () => act(() => versions.stop(model.model), "The round ends after a checkpoint.") }, "Stop the round");
}

function versionCard(model, row, words) {
  const served = row.version === model.current;
  const state = model.states[row.version];
  return h(
    "article",
    { class: `version${served ? " served" : ""}`, "aria-label": `Version ${row.version}` },
    h(
      "header",
      {},
      h("h3", {}, `Version ${row.version}`),
      served && h("span", { class: "decision now" }, "served"),
      h("span", { class: `decision ${row.decision === "refused" ? "refused" : ""}` }, row.decision),
      state && h("span", { class: "decision" }, `votes ${state}`),
      h("time", { datetime: when(row.at).toISOString() }, when(row.at).toLocaleString()),
    ),
    h("p", {}, row.why),
    row.version > 0 && h("details", { "data-key": `${model.model} ${row.version}` }, h("summary", {}, "Figures and lineage"), facts(row, words)),
    h("div", { class: "version-buttons" }, ...buttons(model, row, served, state)),
  );
}

const when = (seconds) => new Date(seconds * 1000);
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const agreed = ({ mean, interval: [low, high], conversations }) => `${percent(mean)} (${percent(low)} to ${percent(high)} of ${conversations} conversations)`;
const counted = ({ comparisons, votes, sha256 }) => `${comparisons} comparisons, ${votes} votes; digest ${sha256}`;
const bytes = (count) => `${(count / 1e9).toFixed(2)} GB`;

function facts(row, words) {
  const pairs = [["Came from", `version ${row.parent}`], ["New votes", counted(row.new)]];
  if (row.examined?.new) {
    pairs.push(["Earlier votes' judge agrees with new ones", agreed(row.examined.new)]);
    pairs.push(["and with earlier ones it has not seen", agreed(row.examined.known)]);
  }
  if (row.way) {
    pairs.push(["Learned by", `${row.way.join(" + ")}: ${row.why_way}`]);
    pairs.push(["Learned", `${counted(row.votes)}; they came with version ${row.learned.join(", ")}`]);
    pairs.push(["Held out", counted(row.heldout)]);
    pairs.push(["Conditions", h("ul", { class: "checks" }, row.checks.map((check) => h("li", {}, `${check.passed ? "met" : "not met"}: ${check.name}: ${check.shown}`)))]);
    const { ended, tokens, score } = row.answers;
    pairs.push(["Answers, before and after", `${percent(ended[0])} and ${percent(ended[1])} end; ${tokens.map((n) => n.toFixed(1)).join(" and ")} tokens${score ? `; score ${score.map((n) => n.toFixed(2)).join(" and ")}` : ""}`]);
    pairs.push(["Memory", `${bytes(row.memory.planned)} planned, ${bytes(row.memory.taken)} taken`]);
    pairs.push(["Run", row.model]);
  }
  pairs.push(["Took", `${Math.round(row.seconds)} s`]);
  for (const word of words) pairs.push([when(word.at).toLocaleString(), `${word.event}: ${word.why}`]);
  return h("dl", { class: "facts" }, pairs.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

function buttons(model, row, served, state) {
  const list = [];
  const button = (key, text, onclick) => list.push(h("button", { type: "button", class: "secondary", "data-key": `${key} ${model.model} ${row.version}`, onclick }, text));
  if (!served && row.model) {
    const back = row.version < model.current;
    button("serve", back ? "Roll back to this" : "Serve this", async () => {
      const text = `New answers come from it within seconds; answers that run end on what they began with.${back ? " Votes that only later versions learned are withdrawn." : ""}`;
      if (!(await confirmed(`Serve version ${row.version}?`, text))) return;
      await act(() => versions.serve(model.model, row.version), `Version ${row.version} is served.`);
    });
  }
  if (state && state !== "trusted") button("trust", "Trust its votes", () => act(() => versions.trust(model.model, row.version, true), "Its votes are learned in the next round."));
  if (state === "trusted") button("distrust", "Distrust its votes", () => act(() => versions.trust(model.model, row.version, false), "Its votes are not learned again."));
  return list;
}

async function act(action, done) {
  try {
    await action();
    toast(done);
  } catch (error) {
    toast(error.message);
  }
  await refresh();
}

listen({ signedOut: () => banner(signedOut()), reachable: (yes) => yes || banner("The server cannot be reached. Looking for it...") });
start();
