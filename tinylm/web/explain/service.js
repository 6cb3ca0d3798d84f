// Questions about the sentence: one after the other, again when the service is busy, and each only once.

import { post, ServiceError } from "../api.js";
import { state } from "./state.js";

const BUSY = [429, 503];
const MOST_TRIES = 20;
const AT_ONCE = ["cache"]; // needs no computation, so it waits for no other question
const waiting = []; // questions that have not been sent
let answers = new Map(); // question -> promise, for one sentence
let sentence = "";
let sending = false;
let whenBusy = () => {};
let isBusy = false; // whether the reader knows that the service is busy

/** The sentence has changed since the question. */
export class Outdated extends Error {}

/** Let `react` get a message while the service is busy, and "" afterwards. */
export const onBusy = (react) => (whenBusy = react);

/** Return a promise of the answer to `POST /explain/PIECE` about the sentence. `later`: after all other questions. */
export function ask(piece, fields = {}, later = false) {
  if (state.text !== sentence) {
    [sentence, answers] = [state.text, new Map()];
    for (const { reject } of waiting.splice(0)) reject(new Outdated());
  }
  const name = piece + JSON.stringify(fields);
  const old = waiting.findIndex((question) => question.name === name);
  if (old >= 0 && !later) waiting.unshift(...waiting.splice(old, 1));
  if (!answers.has(name)) {
    const { promise, resolve, reject } = Promise.withResolvers();
    const question = { name, piece, body: { ...fields, prompt: sentence }, resolve, reject, of: answers };
    promise.catch(() => question.of.delete(name)); // so that the next one to ask tries again
    answers.set(name, promise);
    if (AT_ONCE.includes(piece)) patiently(question).then(resolve, reject);
    else if (later) waiting.push(question);
    else waiting.unshift(question);
    send();
  }
  return answers.get(name);
}

async function send() {
  if (sending) return;
  sending = true;
  while (waiting.length) {
    const question = waiting.shift();
    try {
      question.resolve(await patiently(question));
    } catch (error) {
      question.reject(error);
    }
  }
  sending = false;
}

async function patiently({ piece, body }) {
  for (let tries = 1; ; tries++) {
    try {
      const answer = await post(`explain/${piece}`, body);
      if (isBusy) whenBusy("");
      isBusy = false;
      return answer;
    } catch (error) {
      if (body.prompt !== state.text) throw new Outdated();
      const wait_s = error.retryAfter_s;
      if (!(error instanceof ServiceError) || !BUSY.includes(error.status) || wait_s === null || tries === MOST_TRIES) throw error;
      isBusy = true;
      whenBusy("The service is busy with requests. Trying again …");
      await new Promise((resolve) => setTimeout(resolve, 1000 * wait_s));
      if (body.prompt !== state.text) throw new Outdated();
    }
  }
}
