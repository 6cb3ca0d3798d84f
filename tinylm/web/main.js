// Connects the parts of the page: begin, show, stop and end a story.

import { hideAlternatives } from "./alternatives.js";
import { completions } from "./api.js";
import { startLive } from "./live.js";
import { resetSettings, settings, showSettings } from "./settings.js";
import { beginStory, continueStory } from "./story.js";

const LOGPROBS = 5; // alternatives of each token
const ENDINGS = { stop: "the model", length: "the length", timeout: "the time limit" };
const NARROW = "(max-width: 60rem)"; // as in base.css
const byId = (id) => document.getElementById(id);
const [go, prompt, error, status] = ["go", "prompt", "error", "status"].map(byId);
let writing = null; // the AbortController of the story that is being written

async function write() {
  error.hidden = true;
  let body;
  try {
    body = { ...settings(), prompt: prompt.value, logprobs: LOGPROBS };
  } catch (mistake) {
    return fail(mistake);
  }
  writing = new AbortController();
  go.textContent = "Stop";
  status.textContent = "Writing";
  beginStory(prompt.value);
  const clock = new Clock();
  clock.show();
  let end = "you";
  try {
    for await (const { choices, usage } of completions(body, writing.signal)) {
      if (writing.signal.aborted) break; // skip the rest of the last piece
      for (const choice of choices) {
        continueStory(choice);
        clock.tick(choice.logprobs?.tokens?.length ?? 1);
        if (choice.finish_reason) end = ENDINGS[choice.finish_reason] ?? choice.finish_reason;
      }
      if (usage) clock.n_tokens = usage.completion_tokens;
      clock.show();
    }
  } catch (mistake) {
    if (mistake.name !== "AbortError") {
      end = "an error";
      fail(mistake);
    }
  }
  clock.show(end);
  writing = null;
  go.textContent = "Write";
  status.textContent = `Ended by ${end} after ${clock.n_tokens} tokens.`;
}

function stop() {
  writing?.abort();
}

function fail(mistake) {
  error.textContent = mistake.message;
  error.hidden = false;
}

/** Time to the first token, and tokens per second. Both begin at the click and are measured in the browser. */
class Clock {
  #began = performance.now();
  #first = null;
  #last = null;
  n_tokens = 0;

  tick(n_tokens) {
    if (!n_tokens) return;
    this.n_tokens += n_tokens;
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  show(end = "–") {
    const seconds = (this.#last - this.#began) / 1000;
    const texts = {
      first: this.#first === null ? "–" : `${Math.round(this.#first - this.#began)} ms`,
      speed: this.n_tokens ? `${Math.round(this.n_tokens / seconds).toLocaleString("en")} tokens/s` : "–",
      length: this.n_tokens ? `${this.n_tokens} tokens` : "–",
      end,
    };
    for (const element of byId("timing").querySelectorAll("dd")) element.textContent = texts[element.dataset.is];
  }
}

go.addEventListener("click", () => (writing ? stop() : write()));
byId("writing").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !writing) write();
  if (event.key === "Escape") {
    hideAlternatives();
    stop();
  }
});
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => {
    prompt.value = example.textContent;
    prompt.focus();
  });
}

showSettings(byId("settings").querySelector(".fields"));
byId("defaults").addEventListener("click", resetSettings);
byId("settings").open = !matchMedia(NARROW).matches;

startLive(({ model }) => (byId("model").textContent = model));
