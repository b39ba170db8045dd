// The import dialog: files are chosen, read by the worker, and sent one conversation at a time.

import { ApiError, conversations } from "../api.js";
import { $, announce, h } from "../dom.js";

const ATTEMPTS = 6; // of a conversation that the server is too busy for
const MOST_SHOWN = 20; // problems

let stopped = false;

/** guard(f): runs f and shows its error; done(): conversations were imported. */
export function startImport({ guard, done }) {
  $("import-open").onclick = () => {
    show([]);
    $("import-progress").hidden = true;
    $("import").showModal();
  };
  $("import").onclose = () => (stopped = true);
  $("import-files").onchange = async () => {
    const files = [...$("import-files").files];
    $("import-files").value = ""; // the same file may be chosen again
    await guard(() => importAll(files));
    await guard(done);
  };
}

async function importAll(files) {
  stopped = false;
  const counts = { added: 0, existed: 0 };
  const problems = [];
  $("import-files").disabled = true;
  try {
    for (const file of files) {
      const read = await reading(file);
      if (read.error) problems.push(`${file.name}: ${read.error}`);
      problems.push(...(read.problems ?? []));
      await sendAll(read.talks ?? [], counts, problems);
    }
  } finally {
    $("import-files").disabled = false;
    $("import-progress").hidden = true;
  }
  const sentence = summary(counts, problems);
  show([sentence], problems);
  announce(sentence);
}

async function reading(file) {
  show([`Reading ${file.name} ...`]);
  const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  try {
    return await new Promise((resolve) => {
      worker.onmessage = ({ data }) => resolve(data);
      worker.onerror = () => resolve({ error: "it could not be read." });
      worker.postMessage(file);
    });
  } finally {
    worker.terminate();
  }
}

async function sendAll(talks, counts, problems) {
  const bar = $("import-progress");
  bar.hidden = false;
  bar.max = talks.length;
  for (let i = 0; i < talks.length && !stopped; i++) {
    bar.value = i;
    if (i % 20 === 0) show([`${(i + 1).toLocaleString("en")} of ${talks.length.toLocaleString("en")}`]);
    try {
      const { existed } = await sent(talks[i]);
      counts[existed ? "existed" : "added"]++;
    } catch (error) {
      if (!(error instanceof ApiError) || error.status === 0 || error.status === 401) throw error;
      const large = "is longer than the server takes.";
      problems.push(`${talks[i].title || "A conversation"}: ${error.status === 413 ? large : error.message}`);
    }
  }
}

async function sent(talk) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await conversations.bring(talk);
    } catch (error) {
      if (!error.busy || attempt === ATTEMPTS) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter ?? attempt)));
    }
  }
}

function summary({ added, existed }, problems) {
  const parts = [`${added.toLocaleString("en")} imported`];
  if (existed > 0) parts.push(`${existed.toLocaleString("en")} were here already`);
  if (problems.length > 0) parts.push(`${problems.length.toLocaleString("en")} left out`);
  return `${parts.join(", ")}.${stopped ? " Stopped before the end." : ""}`;
}

function show(lines, problems = []) {
  const rest = problems.length - MOST_SHOWN;
  const listed = [...problems.slice(0, MOST_SHOWN), ...(rest > 0 ? [`and ${rest} more`] : [])];
  $("import-result").replaceChildren(
    ...lines.map((line) => h("p", {}, line)),
    ...(listed.length > 0 ? [h("ul", {}, listed.map((problem) => h("li", { dir: "auto" }, problem)))] : []),
  );
}
