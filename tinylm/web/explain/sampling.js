// The parts `scores`, `sampling` and `next`: from the raw scores to the token that joins the sentence.

import { post } from "../api.js";
import { bar, byId, capital, fill, fixed, make, percent, quoted, say, whole, word } from "./dom.js";
import { part } from "./part.js";
import { choose, ranked } from "./sampler.js";
import { ask } from "./service.js";
import { on, set, state } from "./state.js";

const SLIDERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8, meaning: "Divides the scores. 0 always takes the first token." },
  { name: "top_k", label: "Top k", min: 0, max: 100, step: 1, value: 0, meaning: "Keep this many of the likeliest tokens. 0 keeps all." },
  { name: "top_p", label: "Top p", min: 0.05, max: 1, step: 0.05, value: 0.95, meaning: "Keep the fewest likeliest tokens that together have this probability." },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, value: 0, meaning: "Remove tokens below this share of the likeliest." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.05, value: 1, meaning: "Lowers the scores of tokens that the sentence has." },
];
const STAGES = { model: "all", repetition_penalty: "penalty", temperature: "temperature", top_k: "top k", top_p: "top p", min_p: "min p" };
const PART_OF_A_CHARACTER = 0xff; // no character has this byte in UTF-8
const N_ROWS = 10;
const LEAST_SHOWN = 0.002; // share of the line that has a segment of its own
const LEAST_LABEL = 0.06; // share of the line that has room for a word

/** The scores of the next token. */
export const raw = (later = false) => ask("logits", {}, later);

/** Read the answer of `raw`, and choose a token by it. */
export async function useScores() {
  const { tokens, logits } = await raw();
  const bytes = Uint8Array.from(atob(logits), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer); // the numbers have the least significant byte first on every machine
  const numbers = Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  const names = new Map([...tokens, ...state.tokens].map((token) => [token.id, token]));
  set({ logits: numbers, names });
}

function chosenBy(settings) {
  const [, ...after_boundary] = state.tokens;
  const seen = new Set(after_boundary.map((token) => token.id));
  return choose(state.logits, seen, settings, state.uniform);
}

const rechoose = () => set({ choice: state.logits && chosenBy(state.settings) });

on(["logits", "settings", "uniform"], rechoose);
on(["choice"], nameThePicked);

/** The tail has thousands of tokens, and the page knows the text of a hundred. A part of a character has no text. */
async function nameThePicked() {
  const id = state.choice?.picked;
  if (id === undefined || state.names.has(id)) return;
  const { prompt: text } = await post("detokenize", { tokens: [id] }).catch(() => ({ prompt: "\ufffd" }));
  if (!text.includes("\ufffd")) set({ names: new Map(state.names).set(id, { id, text, bytes: [...new TextEncoder().encode(text)] }) });
}

export const stage = (name) => state.choice.stages.find((one) => one.name === name);
export const last = () => state.choice.stages.at(-1);
/** Return what `last` would return after these changes of the settings. */
export const wouldBe = (changes) => chosenBy({ ...state.settings, ...changes }).stages.at(-1);
export const nameOf = (id) => state.names.get(id) ?? { id, text: `token ${id}`, bytes: [PART_OF_A_CHARACTER] };

/** Return ids of the most likely tokens at a stage that have a probability. */
export function best(probabilities, n = N_ROWS) {
  return ranked(probabilities).slice(0, n).filter((id) => probabilities[id] > 0);
}

// --- scores

part("scores", ["choice", "names"], useScoresOnce, (_, get) => {
  const { probabilities } = stage("model");
  const ids = best(probabilities);
  const [first, second] = ids;
  const gap = state.logits[first] - state.logits[second];
  say(get("about"), `${whole(state.logits.length)} scores. ${capital(quoted(nameOf(first)))} has ${gap.toFixed(2)} points more than ${quoted(nameOf(second))}, so it is ${(probabilities[first] / probabilities[second]).toFixed(1)} times as likely.`);
  fill(get("table"), ["Token", "Score", "", "Probability"], ids.map((id) =>
    [word(nameOf(id)), fixed(state.logits[id], 2), bar(probabilities[id]), percent(probabilities[id])]));
});

async function useScoresOnce() {
  if (!state.logits) await useScores();
}

// --- sampling

const sliders = new Map();

/** Build the sliders. */
export function showSliders() {
  const place = byId("sampling").querySelector('[data-is="sliders"]');
  for (const { name, label, meaning, ...limits } of SLIDERS) {
    const id = `slider-${name}`;
    const input = make("input", { id, type: "range", ...limits, autocomplete: "off", "aria-describedby": `${id}-meaning` });
    const output = make("output", { for: id, "aria-live": "off" }); // the slider itself says its value
    input.addEventListener("input", () => set({ settings: { ...state.settings, [name]: Number(input.value) } }));
    place.append(make("div", { class: "field" }, make("label", { for: id }, label), output, input,
      make("p", { class: "muted", id: `${id}-meaning` }, meaning)));
    sliders.set(name, { input, output });
  }
  on(["settings"], () => {
    for (const [name, { input, output }] of sliders) {
      input.value = state.settings[name];
      output.value = state.settings[name];
    }
  });
  byId("sampling").querySelector('[data-is="reset"]').addEventListener("click", resetSettings);
  resetSettings();
}

export function resetSettings() {
  set({ settings: Object.fromEntries(SLIDERS.map(({ name, value }) => [name, value])) });
}

part("sampling", ["choice", "names"], useScoresOnce, (_, get) => {
  const { probabilities: own } = stage("model");
  const { probabilities: now, n_kept } = last();
  const likeliest = best(now, 1)[0];
  say(get("about"), `${whole(n_kept)} of ${whole(now.length)} tokens can be chosen. ${capital(quoted(nameOf(likeliest)))} has ${percent(now[likeliest])}.`);
  get("stages").replaceChildren(...state.choice.stages.map(({ name, n_kept: n }) =>
    make("li", {}, make("span", { class: "muted" }, STAGES[name]), make("b", {}, whole(n)))));
  const shown = [...new Set([...best(now), ...best(own)])].slice(0, N_ROWS);
  fill(get("table"), ["Token", "", "Now", "Model"], shown.map((id) => ({
    class: now[id] > 0 ? null : "removed",
    cells: [word(nameOf(id)), bar(now[id], own[id]), now[id] > 0 ? percent(now[id]) : "removed", percent(own[id])],
  })));
});

// --- the next token

part("next", ["choice", "names"], useScoresOnce, (_, get) => {
  const { probabilities } = last();
  const picked = nameOf(state.choice.picked);
  const own = make("div", { class: "shares", "aria-hidden": true });
  let rest = 0;
  for (const [id, share] of probabilities.entries()) {
    if (share < LEAST_SHOWN && id !== picked.id) {
      rest += share;
      continue;
    }
    own.append(segment(rest, ""), segment(share, share >= LEAST_LABEL ? nameOf(id).text.trim() : "", id === picked.id));
    rest = 0;
  }
  own.append(segment(rest, ""));
  const mark = make("span", { class: "place", "aria-hidden": true });
  mark.style.setProperty("--at", state.uniform);
  get("line").replaceChildren(own, mark);
  byId("random").value = state.uniform;
  byId("random-output").value = state.uniform.toFixed(3);
  say(get("about"), `${state.uniform.toFixed(3)} falls on ${quoted(picked)}, which has ${percent(probabilities[picked.id])}.`);
  byId("take").textContent = picked.bytes.length ? `Take ${quoted(picked)}` : "Take the end of the story";
});

function segment(share, text, is_picked = false) {
  const made = make("span", { class: is_picked ? "picked" : null }, text);
  made.style.setProperty("--share", share);
  return made;
}

byId("random").addEventListener("input", (event) => set({ uniform: Number(event.target.value) }));
byId("draw").addEventListener("click", () => set({ uniform: Math.floor(Math.random() * 1000) / 1000 }));
