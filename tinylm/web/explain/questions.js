// The questions of the tour. Each belongs to a part, and the reader answers it by trying.
// `begin` prepares the part, `solved` says whether the page now shows an answer, `show` gives one. They may be asynchronous.

import { byId, capital, quoted } from "./dom.js";
import { rankedBy, shareOf } from "./heads.js";
import { attention, norms } from "./layer.js";
import { lens, settledAfter } from "./lens.js";
import { cacheNow, rounded, ROUNDED } from "./cache.js";
import { best, last, resetSettings, stage, wouldBe } from "./sampling.js";
import { follow, take } from "./sentence.js";
import { set, state } from "./state.js";
import { embedding, similar } from "./tokens.js";

const CLEARLY = 0.6; // share of a head that reads from one kind of token
const RARE = "The astrolabe";
const TOP_PS = Array.from({ length: 19 }, (_, i) => Number((0.95 - 0.05 * i).toFixed(2))); // of the slider, below 1
const [TOKENIZER, KERNELS] = ["tinylm/tokenizer.py", "tinylm/kernels/numpy.py"];
const end = () => state.tokens.length - 1;
const ids = () => state.tokens.map((token) => token.id);
const toEnd = () => set({ position: end() });
/** Set the sampler. Use the first sentence if this one has no answer, which is a state of the sampler for which `test` is true. */
async function prepare(changes, answers, test) {
  resetSettings();
  setting(changes);
  if (state.logits && !answers.some((answer) => test(wouldBe(answer)))) await follow(byId("sentence").defaultValue);
}
const unlikely = ({ probabilities }) => Math.max(...probabilities) < 0.25;
const few = ({ n_kept }) => n_kept > 1 && n_kept <= 5;
const setting = (changes) => set({ settings: { ...state.settings, ...changes } });
const slide = (id, value) => {
  byId(id).value = value;
  byId(id).dispatchEvent(new Event("input"));
};
let before = {}; // what the question found at its beginning

/** Return the place of the largest value. */
const largest = (values) => values.indexOf(Math.max(...values));
const nearest = async () => similar((await embedding()).values, end())[0]?.position;
const longestAfter = async () => {
  const lengths = (await norms()).norms.map((row) => row[end()]); // the first one is after the embedding
  return 1 + largest(lengths.slice(1).map((length, i) => length - lengths[i]));
};
const settles = async () => settledAfter((await lens(end())).ranks.map((row) => row[end()]));
const roughest = async () => {
  const errors = [];
  for (const name of ROUNDED) errors.push((await rounded(name)).input_error[0]);
  return ROUNDED[largest(errors)];
};
const pieces = () => state.tokens.findIndex((token, i) => i > 1 && /^\p{L}/u.test(token.text) && /\p{L}$/u.test(state.tokens[i - 1].text));

export const QUESTIONS = [
  {
    part: "tokens", ask: "Which token of the sentence has the most bytes?", hint: "Choose it in the row of tokens.",
    begin: () => set({ position: 0 }),
    solved: () => state.tokens[state.position].bytes.length === Math.max(...state.tokens.map(({ bytes }) => bytes.length)),
    show: () => set({ position: largest(state.tokens.map(({ bytes }) => bytes.length)) }),
    say: () => "Long words can be one token if they are frequent. The space in front of a word belongs to the token.",
    code: [TOKENIZER, "encode"],
  },
  {
    part: "tokens", ask: "Which word is so rare that it falls into several tokens?", hint: "Change the sentence at the top, for example to “The astrolabe”, and follow it.",
    begin: () => (before = { text: state.text }),
    solved: () => pieces() > 0, show: () => follow(RARE),
    say: () => `${capital(quoted(state.tokens[pieces()]))} continues a word. So the model can read any text with a small vocabulary.`,
    code: [TOKENIZER, "encode_document"],
  },
  {
    part: "embedding", ask: "Which token's vector is the most similar to that of the last token?", hint: "The table has the similarities to the chosen token. Choose the most similar token instead.",
    begin: async () => {
      if (before.text) await follow(before.text); // the sentence without the rare word
      toEnd();
    },
    solved: async () => state.position === (await nearest()), show: async () => set({ position: await nearest() }),
    say: () => "Training moved tokens that are used in the same way closer together. In a short sentence, even the nearest one can be quite different.",
    code: [KERNELS, "embed"],
  },
  {
    part: "layer", ask: "Which head reads mostly from the token before?", hint: "Its picture is a line just below the diagonal. The list “Mark the heads” helps.",
    begin: () => set({ layer: 1, head: 1, position: end() }),
    solved: async () => shareOf("before", (await attention()).weights[state.layer - 1][state.head - 1], ids()) > CLEARLY,
    show: async () => {
      const [{ layer, head }] = rankedBy("before", (await attention()).weights, ids());
      set({ layer, head });
    },
    say: () => "Nobody designed this head. With it, a later layer can know which word came before.",
    code: [KERNELS, "attention"],
  },
  {
    part: "layer", ask: "One token can read from itself alone. Which one?", hint: "Look at the table “What the chosen token reads from”, and choose another token.",
    begin: toEnd, solved: () => state.position === 0, show: () => set({ position: 0 }),
    say: () => "The first token has nothing before it. Later tokens are hidden from every token, because they do not exist yet when the model writes.",
    code: [KERNELS, "attention"],
  },
  {
    part: "layer", ask: "Which layer adds the most to the length of the last token's vector?", hint: "Move the layer, and look at the curve of the length.",
    begin: async () => set({ position: end(), layer: (await longestAfter()) === 2 ? 3 : 2 }),
    solved: async () => state.position === end() && state.layer === (await longestAfter()),
    show: async () => set({ position: end(), layer: await longestAfter() }),
    say: () => "Layers only add. What an early layer wrote stays in the vector unless a later layer writes the opposite.",
    code: [KERNELS, "run_layers"],
  },
  {
    part: "lens", ask: "After which layer has the final answer won for good?", hint: "Choose the first layer from which its rank stays 1.",
    begin: () => set({ position: end(), layer: 1, head: 1 }),
    solved: async () => state.position === end() && state.layer === (await settles()),
    show: async () => set({ position: end(), layer: await settles() }),
    say: () => "Early layers guess from the last words. Later layers use what attention brought from the whole sentence.",
    code: ["tinylm/explain/explainer.py", "lens"],
  },
  {
    part: "scores", ask: "Can one changed word change the first place?", hint: "Change the sentence at the top so that another token comes first.",
    begin: () => (before = { text: state.text, first: best(stage("model").probabilities, 1)[0] }),
    solved: () => state.text !== before.text && state.choice && best(stage("model").probabilities, 1)[0] !== before.first,
    show: () => follow(state.text.includes("Tom went to the") ? "One day, Tom ate a" : "Once upon a time, there was a little"),
    say: () => `Now ${quoted(state.names.get(best(stage("model").probabilities, 1)[0]))} is first. The whole sentence decides about every score.`,
    code: [KERNELS, "unembed"],
  },
  {
    part: "sampling", ask: "At which temperature does the first token fall below 25 %?", hint: "Move the temperature up.",
    begin: () => prepare({ top_p: 1, temperature: 0.5 }, [{ temperature: 2 }], unlikely),
    solved: () => state.choice && unlikely(last()) && state.settings.temperature > 0.5,
    show: () => setting({ temperature: 2 }),
    say: () => "Temperature divides the scores. A higher temperature makes their differences smaller, so unlikely tokens gain.",
    code: [KERNELS, "soften"],
  },
  {
    part: "sampling", ask: "Which temperature leaves no choice?", hint: "Move the temperature until one token remains.",
    begin: () => setting({ temperature: 0.8, top_p: 1, top_k: 0, min_p: 0 }),
    solved: () => state.settings.temperature === 0, show: () => setting({ temperature: 0 }),
    say: () => "At 0 the most likely token always wins. This is called greedy, and it gives the same story each time.",
    code: [KERNELS, "sample"],
  },
  {
    part: "sampling", ask: "Which top p keeps at most five tokens, and more than one?", hint: "Leave the other limits off, and move top p down.",
    begin: () => prepare({ temperature: 1, top_p: 1 }, TOP_PS.map((top_p) => ({ top_p })), few),
    solved: () => state.choice && state.settings.top_p < 1 && state.settings.top_k === 0 && few(last()),
    show: () => setting({ top_p: TOP_PS.find((top_p) => few(wouldBe({ top_p }))) }),
    say: () => "Top p keeps few tokens when the model is sure and many when it is not. Top k keeps the same number always.",
    code: [KERNELS, "keep"],
  },
  {
    part: "next", ask: "What does the sentence become with the next token?", hint: "Draw a number if you like, then take the token.",
    begin: () => {
      resetSettings();
      before = { n: state.tokens.length };
    },
    solved: () => state.tokens.length > before.n, show: take,
    say: () => `The sentence has ${state.tokens.length} tokens now, and every part above shows the longer one. A story is this step, again and again.`,
    code: ["tinylm/engine/engine.py", "_append"],
  },
  {
    part: "cache", ask: "How many tokens fill a megabyte of cache?", hint: "Move the number of tokens until the first line says 1 MB or a little more.",
    solved: () => cacheNow() && cacheNow().bytes >= 1e6 && cacheNow().bytes < 1.1e6,
    show: () => slide("length", Math.ceil((1e6 * cacheNow().n_tokens) / cacheNow().bytes)),
    say: () => "The cache grows by the same amount for every token. Its size limits how many requests a replica can run at once.",
    code: [KERNELS, "run_layers"],
  },
  {
    part: "int8", ask: "Which input of this layer loses the most by rounding?", hint: "Compare the errors, and choose that input.",
    begin: () => set({ matmul: "qkv" }),
    solved: async () => state.matmul === (await roughest()),
    show: async () => set({ matmul: await roughest() }),
    say: () => "One large number makes the scale large. Then small numbers have few steps.",
    code: [KERNELS, "round_to_int8"],
  },
  {
    part: "batch", ask: "With how many others does your request share a step?", hint: "Send it with 15 others. They go to all replicas of the service.",
    begin: () => set({ shared: undefined }),
    solved: () => state.shared > 0, show: () => document.querySelector('[data-send="15"]').click(),
    say: () => `It shared a step with ${state.shared}. The weights were read once for all of them.`,
    code: ["tinylm/engine/engine.py", "_run"],
  },
];
