// What OpenAI's client for JavaScript must see, as openai_cases.py for Python: node npm_client.mjs ADDRESS KEY, run in a
// folder with `npm install openai`. Prints one JSON object.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(`${process.cwd()}/`));
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai")));
const { version } = JSON.parse(readFileSync("node_modules/openai/package.json", "utf8"));
const [address, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey, maxRetries: 0 });
const ask = { model: "tiny", messages: [{ role: "user", content: "What is a penstock?" }], max_tokens: 12, seed: 7 };
const create = (changes) => client.chat.completions.create({ ...ask, ...changes });
const textOf = async (changes) => (await create(changes)).choices[0].message.content;

const cases = {
  async models_are_listed() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert(ids.includes("tiny"));
    assert.equal((await client.models.retrieve("tiny")).object, "model");
  },
  async the_same_seed_gives_the_same_answer() {
    assert.equal(await textOf(), await textOf());
  },
  async a_stream_says_what_the_whole_answer_says() {
    let text = "";
    for await (const chunk of await create({ stream: true })) text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, await textOf());
  },
  async the_stream_helper_ends_with_the_whole_answer() {
    const stream = client.chat.completions.stream({ ...ask, stream_options: { include_usage: true } });
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].message.content, await textOf());
    assert(final.usage.completion_tokens > 0);
  },
  async a_stream_can_be_left() {
    for await (const chunk of await create({ stream: true, max_tokens: 200 })) if (chunk) break;
    assert(await textOf());
  },
  async a_text_is_gone_on_with() {
    const answer = await client.completions.create({ model: "tiny", prompt: "What is", max_tokens: 12, seed: 7, logprobs: 1 });
    assert.equal(answer.object, "text_completion");
    assert(answer.choices[0].logprobs.tokens.length > 0);
  },
  async errors_have_their_classes() {
    await assert.rejects(create({ model: "gpt-17" }), OpenAI.NotFoundError);
    await assert.rejects(create({ temperature: 3 }), (error) => error.param === "temperature" && error.status === 400);
    const stranger = new OpenAI({ baseURL: `${address}/v1`, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
  },
  async what_would_change_the_meaning_is_refused() {
    await assert.rejects(create({ response_format: { type: "json_object" } }), (error) => error.param === "response_format");
  },
};

const results = {};
for (const [name, run] of Object.entries(cases)) {
  results[name] = await run().then(() => "passed", (error) => `${error.name}: ${error.message}`);
}
console.log(JSON.stringify({ openai: version, results }));
