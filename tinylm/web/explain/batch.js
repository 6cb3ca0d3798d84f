// The part `batch`: send the sentence as a real request, and find it in the engine's last steps.

import { completions, get as getJson } from "../api.js";
import { element } from "../charts.js";
import { bar, byId, fill, percent, say } from "./dom.js";
import { set, state } from "./state.js";

const KEPT_MS = 600; // the service gives all readers the same view for 500 ms
const N_TRIES = 4; // under load, the view can be too old, or the steps of the request over
// On an idle service, the recorded steps hold the reader's request even when all have ended: the others end soon after it.
const OWN_TOKENS = 120;
const OTHERS_TOKENS = [140, 135, 130, 125]; // for each call; with a prompt of 64 tokens they fit into the context
const CALLS = OTHERS_TOKENS.length; // a browser has few connections to a server, so one call has several of the other requests
const WIDEST = 28; // px of a step
const [ROW, GAP, TIMES] = [14, 3, 46]; // px of a slot, between slots, of the times below
const PARTS = { prepare_s: "fill the batch", model_s: "the model", results_s: "give out tokens" };
const details = byId("batch");
const get = (name) => details.querySelector(`[data-is="${name}"]`);

for (const button of details.querySelectorAll("[data-send]")) {
  button.addEventListener("click", () => run(Number(button.dataset.send)));
}

/** Send the sentence with `n_others` further requests, and show the steps that it shared. */
async function run(n_others) {
  if (details.getAttribute("aria-busy") === "true") return;
  details.setAttribute("aria-busy", "true");
  say(get("about"), "Sending …");
  try {
    await getJson("explain/batch"); // from now on, steps are recorded
    let found = null;
    for (let i = 0; i < N_TRIES && !found; i++) {
      await pause(KEPT_MS);
      found = await sendAndLook(n_others);
    }
    if (found) show(found);
    else say(get("about"), "The steps of your request were over before the page could look. Try again.");
  } catch (error) {
    say(get("about"), error.message);
  }
  details.setAttribute("aria-busy", "false");
}

/** Return what `findOwn` does, with `n_others` further requests under way. */
async function sendAndLook(n_others) {
  const stop = new AbortController();
  try {
    for (let call = 0; call < CALLS; call++) others(Math.ceil((n_others - call) / CALLS), call, stop.signal);
    return await findOwn(stop.signal);
  } finally {
    stop.abort();
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Send `n` requests of other readers in one call. Whether it succeeds does not matter. */
async function others(n, call, signal) {
  if (n < 1) return;
  const body = { prompt: Array(n).fill(state.text), max_tokens: OTHERS_TOKENS[call], ignore_eos: true, seed: call };
  try {
    for await (const _ of completions(body, signal));
  } catch {
    // the call was refused or stopped
  }
}

/** Send the reader's request, and look once at the steps. Return its replica and number, or null if none holds it. */
async function findOwn(signal) {
  const body = { prompt: state.text, max_tokens: OWN_TOKENS, ignore_eos: true };
  let own = null;
  let n_chunks = 0;
  const stream = completions(body, signal, (response) => {
    const [id, number] = (response.headers.get("X-Engine-Request") ?? "").split(" ");
    own = { id, number: Number(number) };
  });
  const ended = (async () => {
    for await (const _ of stream) n_chunks += 1;
  })();
  let over = false;
  ended.then(() => (over = true), () => (over = true));
  while (n_chunks < 2 && !over) await pause(5);
  if (over && !own) await ended; // throws why it was refused
  const { replicas } = await getJson("explain/batch");
  const replica = replicas.find(({ id, steps }) => id === own?.id && steps.some(holds(own.number)));
  return replica ? { ...replica, number: own.number } : null;
}

const holds = (number) => ({ shares }) => shares.some(({ request }) => request === number);

function show({ id, steps, slots, number }) {
  const mine = steps.filter(holds(number));
  const most = Math.max(...mine.map(({ shares }) => shares.length));
  const times = Object.keys(PARTS).map((name) => steps.reduce((sum, step) => sum + step[name], 0) / steps.length);
  const step_s = times.reduce((a, b) => a + b, 0);
  const sorted = steps.map((step) => step.prepare_s + step.model_s + step.results_s).sort((a, b) => a - b);
  const waiting = Math.max(...steps.map((step) => step.n_waiting));
  const shared = mine.filter(({ shares }) => shares.length > 1).length;
  say(get("about"), [
    `Your request is number ${number} of its replica. It is in ${mine.length} of the last ${steps.length} steps.`,
    shared ? `It shared ${shared} of them, with up to ${most - 1} ${most === 2 ? "other" : "others"} at once.` : "It was alone in all of them.",
    `Half of the steps took less than ${ms(sorted[sorted.length >> 1])}.`,
    waiting ? `Up to ${waiting} ${waiting === 1 ? "request" : "requests"} waited for a slot.` : "No request waited for a slot.",
  ].join(" "));
  say(get("replica"), id);
  get("timeline").hidden = get("times").hidden = get("requests").hidden = false;
  get("steps").replaceChildren(timeline(steps, slots, number, Math.min(WIDEST, get("steps").clientWidth / steps.length)));
  fill(get("times"), ["Part of a step", "", "Time"], Object.values(PARTS).map((text, i) =>
    [text, bar(times[i] / step_s), `${ms(times[i])} · ${percent(times[i] / step_s)}`]));
  fill(get("requests"), ["Request", "Slot", "Steps", "Tokens"], summary(steps).map(({ request, slot, n_steps, tokens }) => ({
    class: request === number ? "chosen" : null,
    cells: [request === number ? `${request} (yours)` : request, slot, n_steps, tokens],
  })));
  set({ shared: most - 1 });
}

const ms = (seconds) => `${(1000 * seconds).toPrecision(2)} ms`;

function summary(steps) {
  const found = new Map();
  for (const { shares } of steps) {
    for (const { request, slot, tokens } of shares) {
      const row = found.get(request) ?? { request, slot, n_steps: 0, tokens: 0 };
      found.set(request, { ...row, n_steps: row.n_steps + 1, tokens: row.tokens + tokens });
    }
  }
  return [...found.values()].sort((a, b) => a.request - b.request);
}

/** Draw a column of `wide` px for each step: a box for each slot in use, and below it the times of the parts. */
function timeline(steps, slots, number, wide) {
  const n_used = 1 + Math.max(...steps.flatMap(({ shares }) => shares.map(({ slot }) => slot)));
  const [width, foot] = [steps.length * wide, Math.min(n_used + 1, slots) * (ROW + GAP)];
  const longest = Math.max(...steps.map((step) => step.prepare_s + step.model_s + step.results_s));
  const chart = element("svg", { width, height: foot + TIMES + 18, role: "img",
    "aria-label": `${steps.length} steps. The tables below list the times and the requests.` });
  for (const [column, step] of steps.entries()) {
    const x = column * wide;
    for (const { request, slot, tokens, kind } of step.shares) {
      const box = element("g", { class: `${request === number ? "own" : "other"} ${kind}` },
        element("rect", { x: x + 1, y: slot * (ROW + GAP), width: wide - 2, height: ROW, rx: 2 }));
      if (tokens > 1 && wide > 12) box.append(element("text", { x: x + wide / 2, y: slot * (ROW + GAP) + 11, "text-anchor": "middle" }, tokens));
      box.append(element("title", {}, `step ${step.number}, request ${request}: ${tokens} of ${kind}`));
      chart.append(box);
    }
    let y = foot + TIMES;
    for (const name of Object.keys(PARTS)) {
      const height = (step[name] / longest) * (TIMES - 8);
      y -= height;
      chart.append(element("rect", { class: name, x: x + 1, y, width: wide - 2, height }));
    }
  }
  chart.append(element("text", { class: "axis", x: 0, y: foot + TIMES + 13 }, `time of each step, up to ${ms(longest)}`));
  return chart;
}
