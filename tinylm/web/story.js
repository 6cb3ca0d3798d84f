// The growing story: a span for each token, tinted by its probability. Arrow keys move between tokens.

import { hideAlternatives, showAlternatives } from "./alternatives.js";

const LEVELS = [0.5, 0.25, 0.1, 0.03]; // a token's tint is the number of these above its probability
const place = document.getElementById("story");
let tokens = []; // { element, offset, logprob, top } in the order they came
let letters = []; // code points of the answer so far, which is what offsets count
let base = 0; // the service's offset of the answer's first letter
let unsettled = 0; // the first token that may still gain text
let current = null; // the token that the Tab key reaches

/** Show only the prompt. */
export function beginStory(prompt) {
  [tokens, letters, base, unsettled, current] = [[], [], 0, 0, null];
  hideAlternatives();
  const beginning = document.createElement("span");
  beginning.className = "prompt";
  beginning.textContent = prompt;
  place.replaceChildren(beginning);
}

/** Add a choice of OpenAI's completions. Text can arrive later than its tokens, but not earlier. */
export function continueStory({ text, logprobs }) {
  letters.push(...text);
  for (const [i, offset] of (logprobs?.text_offset ?? []).entries()) {
    if (tokens.length === 0) base = offset;
    addToken(offset - base, logprobs.token_logprobs[i], logprobs.top_logprobs?.[i] ?? {});
  }
  if (tokens.length === 0 && text) addToken(0, null, {}); // a service without log-probabilities
  for (let i = unsettled; i < tokens.length; i++) {
    const end = tokens[i + 1]?.offset;
    tokens[i].element.textContent = letters.slice(tokens[i].offset, end).join("");
    if (end <= letters.length && unsettled === i) unsettled++;
  }
}

function addToken(offset, logprob, top) {
  const element = document.createElement("span");
  element.className = "token";
  element.tabIndex = -1;
  element.setAttribute("aria-describedby", "alternatives");
  if (logprob !== null) element.dataset.level = LEVELS.filter((limit) => Math.exp(logprob) < limit).length;
  tokens.push({ element, offset, logprob, top });
  place.append(element);
  if (tokens.length === 1) makeCurrent(tokens[0]);
}

function makeCurrent(token) {
  if (current) current.element.tabIndex = -1;
  current = token;
  current.element.tabIndex = 0;
}

function tokenAt(event) {
  return tokens.find(({ element }) => element === event.target);
}

function show(event) {
  const token = tokenAt(event);
  if (!token || token.logprob === null) return;
  showAlternatives(token.element, token.logprob, token.top);
}

place.addEventListener("pointerover", show);
place.addEventListener("pointerout", () => {
  if (document.activeElement !== current?.element) hideAlternatives();
});
place.addEventListener("click", (event) => tokenAt(event)?.element.focus());
place.addEventListener("focusin", (event) => {
  const token = tokenAt(event);
  if (!token) return;
  makeCurrent(token);
  show(event);
});
place.addEventListener("focusout", hideAlternatives);
place.addEventListener("keydown", (event) => {
  const shown = tokens.filter(({ element }) => element.textContent); // a token that is part of a character has no text
  const at = shown.indexOf(tokenAt(event));
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: shown.length - 1 }[event.key];
  if (at < 0 || !shown[to]) return;
  event.preventDefault();
  shown[to].element.focus();
});
