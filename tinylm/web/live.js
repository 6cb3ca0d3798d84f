// The live view: asks the service once a second while the page is visible, and shows the changes.

import { get } from "./api.js";
import { histogram, line } from "./charts.js";
import { between, quantile } from "./rates.js";

const EVERY_MS = 1000;
const KEPT_MS = 60_500;
const KEPT = 61; // points of a line
const TICKS_S = [0.001, 0.01, 0.1, 1, 10]; // bounds named below the histogram
const byId = (id) => document.getElementById(id);
const FIGURES = [
  { name: "requests", title: "Requests/s" },
  { name: "tokens", title: "Tokens/s" },
  { name: "running", title: "Running" },
  { name: "waiting", title: "Waiting" },
];

const looks = []; // answers of `/live`, oldest first, each with its time `at`
const lines = Object.fromEntries(FIGURES.map(({ name }) => [name, []]));

/** Start the live view. `onFirst` gets the first answer. */
export async function startLive(onFirst) {
  let ask = true; // whether to ask for a key; not every second
  for (;;) {
    try {
      if (!document.hidden) {
        const look = { ...(await get("live", ask)), at: performance.now() };
        if (!looks.length) onFirst(look);
        take(look);
      }
    } catch (error) {
      ask = false;
      byId("live-state").textContent = error.message;
    }
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

function take(look) {
  looks.push(look);
  while (look.at - looks[0].at > KEPT_MS) looks.shift();
  const rates = looks.length > 1 ? between(looks.at(-2), look) : null;
  const total = (name) => look.replicas.reduce((sum, replica) => sum + replica[name], 0);
  const now = {
    requests: rates?.requests_per_s ?? 0,
    tokens: rates?.tokens_per_s ?? 0,
    running: total("running"),
    waiting: total("waiting"),
  };
  for (const [name, value] of Object.entries(now)) {
    lines[name].push(value);
    if (lines[name].length > KEPT) lines[name].shift();
  }
  say(look);
  showFigures(now);
  showLatency(look);
  showReplicas(look, rates);
}

function say({ replicas, complete }) {
  const text = complete ? `${replicas.length} ${replicas.length === 1 ? "replica" : "replicas"}` : "Some replicas do not answer";
  if (byId("live-state").textContent !== text) byId("live-state").textContent = text; // screen readers read each change
}

function showFigures(now) {
  byId("figures").replaceChildren(
    ...FIGURES.map(({ name, title }) => {
      const figure = document.createElement("div");
      figure.className = "figure";
      figure.dataset.name = name;
      const value = Object.assign(document.createElement("strong"), { textContent: rounded(now[name]) });
      const label = Object.assign(document.createElement("span"), { textContent: title });
      figure.append(label, value, line(lines[name], KEPT));
      return figure;
    }),
  );
}

function showLatency(look) {
  const bounds = look.latency_bounds_s;
  const { latency_counts: counts } = between(looks[0], look);
  const place = byId("histogram");
  const chart = histogram(bounds, counts, (bound) => TICKS_S.includes(bound) && milliseconds(bound), place.clientWidth);
  const text = document.createElement("p");
  text.className = "muted";
  const [half, most] = [0.5, 0.95].map((share) => quantile(bounds, counts, share));
  const total = counts.reduce((a, b) => a + b, 0);
  text.textContent = half === null
    ? "No answer has ended in the last minute."
    : `${total.toLocaleString("en")} ${total === 1 ? "answer" : "answers"}: half within ${milliseconds(half)}, 95 % within ${milliseconds(most)}`;
  place.replaceChildren(chart, text);
}

function showReplicas({ replicas }, rates) {
  const rows = [...replicas].sort((a, b) => (a.id < b.id ? -1 : 1)).map((replica) => {
    const row = document.createElement("tr");
    const name = Object.assign(document.createElement("th"), { scope: "row", textContent: replica.id });
    const load = Object.assign(document.createElement("i"), { className: "load" }); // shows the numbers beside it
    load.style.setProperty("--share", replica.running / replica.slots);
    const share = Object.assign(document.createElement("span"), { textContent: `${replica.running}/${replica.slots}` });
    row.append(name, cell(load, share), cell(replica.waiting), cell(rounded(rates?.tokens_per_s_of.get(replica.id) ?? 0)));
    return row;
  });
  byId("replicas").replaceChildren(...rows);
}

function cell(...content) {
  const made = document.createElement("td");
  made.append(...content);
  return made;
}

const rounded = (value) => (value > 0 && value < 10 ? Number(value.toFixed(1)) : Math.round(value)).toLocaleString("en");

function milliseconds(seconds) {
  if (seconds >= 1) return `${Number(seconds.toFixed(1))} s`;
  return `${Number((seconds * 1000).toPrecision(2))} ms`;
}
