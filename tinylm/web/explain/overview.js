// The drawing of the whole path: a small picture of each part, which opens the part.

import { bar, byId, capital, make, percent, quoted, say, whole, word } from "./dom.js";
import { paint } from "./heat.js";
import { rounded, ROUNDED } from "./cache.js";
import { attention, neurons, norms } from "./layer.js";
import { lens, settledAfter } from "./lens.js";
import { open } from "./part.js";
import { best, last, nameOf, raw, stage } from "./sampling.js";
import { embedding } from "./tokens.js";
import { Outdated } from "./service.js";
import { on, state } from "./state.js";

const N_BARS = 5;
const mini = (name) => document.querySelector(`[data-mini="${name}"]`);
const caption = (name, text) => say(document.querySelector(`[data-says="${name}"]`), text);
const shown = { embedding: null, attention: null, lens: null };

/** Draw the overview, and ask for what it needs. The parts need the same answers, so most of them open at once. */
export function startOverview() {
  byId("overview").addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (!link) return;
    const target = byId(link.hash.slice(1));
    event.preventDefault();
    if (target.matches("details")) open(target.id);
    else target.focus();
  });
  for (const name of ["embedding", "layer"]) mini(name).append(make("canvas", { class: "heat" }));
  on(["tokens"], drawTokens);
  on(["tokens"], askAll);
  on(["layer", "head"], drawHead);
  on(["choice", "names"], drawChoice);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (drawEmbedding(), drawHead()));
}

async function askAll() {
  const { tokens } = state;
  byId("overview").ariaBusy = "true";
  Object.assign(shown, { embedding: null, attention: null, lens: null });
  const drawn = [
    raw(true),
    attention(true).then(({ weights }) => ((shown.attention = weights), drawHead())),
    lens(undefined, true).then((found) => ((shown.lens = found), drawLens())),
    embedding(true).then(({ values }) => ((shown.embedding = values), drawEmbedding())),
  ];
  const for_parts = [norms(true), neurons(true), ...ROUNDED.map((name) => rounded(name, true))];
  for (const one of [...drawn, ...for_parts]) one.catch((error) => { if (!(error instanceof Outdated)) console.warn(error.message); });
  await Promise.allSettled(drawn);
  if (tokens === state.tokens) byId("overview").ariaBusy = "false";
}

function drawTokens() {
  const end = state.text.length > 24 ? `… ${state.text.slice(-22)}` : state.text;
  mini("text").textContent = end;
  const blocks = state.tokens.map((token, i) => {
    const block = make("i", { class: i === state.tokens.length - 1 ? "new" : null });
    block.style.setProperty("--size", Math.max(1, token.text.length));
    return block;
  });
  mini("tokens").replaceChildren(...blocks);
  caption("tokens", `${state.tokens.length} tokens`);
  const used = make("i");
  used.style.setProperty("--share", state.tokens.length / 64);
  mini("cache").replaceChildren(used);
  caption("cache", `${state.tokens.length} tokens stored`);
}

function drawEmbedding() {
  const values = shown.embedding;
  if (!values) return;
  paint(mini("embedding").firstChild, values.length, values[0].length, (i, j) => values[i][j] / 127);
  caption("embedding", `${values[0].length} numbers for each`);
}

function drawHead() {
  const rows = shown.attention?.[state.layer - 1]?.[state.head - 1];
  if (!rows) return;
  paint(mini("layer").firstChild, rows.length, rows.length, (i, j) => rows[i][j] / 255);
  caption("layer", `layer ${state.layer}, head ${state.head}`);
}

function drawLens() {
  const ranks = shown.lens.ranks.map((row) => row.at(-1));
  const most = Math.log(Math.max(...ranks, 10));
  mini("lens").replaceChildren(...ranks.map((rank) => {
    const column = make("i", { class: rank === 1 ? "first" : null });
    column.style.setProperty("--share", 1 - (0.9 * Math.log(rank)) / most);
    return column;
  }));
  const layer = settledAfter(ranks);
  caption("lens", `${capital(quoted(shown.lens.answers.at(-1)))} leads after layer ${layer}`);
}

function drawChoice() {
  if (!state.choice) return;
  const { probabilities: own } = stage("model");
  const { probabilities: now, n_kept } = last();
  const ids = best(own, N_BARS);
  for (const [name, shares] of [["scores", own], ["sampling", now]]) {
    mini(name).replaceChildren(...ids.map((id) => bar(shares[id] / Math.max(own[ids[0]], now[ids[0]]))));
  }
  caption("scores", `${capital(quoted(nameOf(ids[0])))} ${percent(own[ids[0]])}`);
  caption("sampling", `${whole(n_kept)} ${n_kept === 1 ? "token remains" : "tokens remain"}`);
  mini("next").replaceChildren(word(nameOf(state.choice.picked)));
}
