// The sentence: typed by the reader, or longer by the token that was taken.

import { post } from "../api.js";
import { byId, capital, quoted, say } from "./dom.js";
import { remember } from "./part.js";
import { nameOf, useScores } from "./sampling.js";
import { onBusy, Outdated } from "./service.js";
import { set, state } from "./state.js";

const FIRST = byId("sentence").defaultValue;
const [field, error, status] = ["sentence", "error", "busy"].map(byId);
let earlier = []; // sentences before each taken token
let latest = 0; // the number of the last call of `follow`

onBusy((message) => say(status, message));

/** Use another sentence. The chosen token becomes the last one. An error leaves the old sentence in the parts. */
export async function follow(text, message = "") {
  field.value = text;
  error.hidden = true;
  say(status, "");
  const run = ++latest;
  try {
    if (!text) throw new Error("Type a sentence first.");
    const { tokens } = await post("explain/tokens", { prompt: text });
    if (run !== latest) return;
    const names = new Map(tokens.map((token) => [token.id, token]));
    set({ text, tokens, names, position: tokens.length - 1, logits: null });
    say(status, message);
    remember();
    await useScores();
  } catch (mistake) {
    if (mistake instanceof Outdated || run !== latest) return;
    error.textContent = mistake.message.replace(/^prompt /, "The sentence ");
    error.hidden = false;
  }
}

/** Add the picked token to the sentence. */
export async function take() {
  if (!state.choice) return;
  const token = nameOf(state.choice.picked);
  if (!token.bytes.length) return say(status, "The model chose the end. The story is complete.");
  const bytes = Uint8Array.from([...new TextEncoder().encode(state.text), ...token.bytes]);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return say(status, "This token is only a part of a character. Draw another number.");
  }
  earlier.push(state.text);
  await follow(text, `${capital(quoted(token))} joined the sentence.`);
}

byId("take").addEventListener("click", take);
byId("start").addEventListener("submit", (event) => {
  event.preventDefault();
  earlier = [];
  if (field.value !== state.text) follow(field.value);
});
byId("back").addEventListener("click", () => {
  if (earlier.length) follow(earlier.pop(), "The last token is gone.");
  else say(status, "You have not taken a token yet.");
});
byId("again").addEventListener("click", () => {
  earlier = [];
  follow(FIRST);
});
