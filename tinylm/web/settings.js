// The sampling settings: their names, meanings, limits and current values.

// Limits are those of tinylm.sampling.SamplingParams, or narrower where a slider needs it.
const SETTINGS = [
  { name: "max_tokens", label: "Length", min: 1, max: 250, step: 1, value: 200,
    meaning: "The most tokens to write. Prompt and story share 256." },
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8,
    meaning: "0 always takes the likeliest token; higher values vary more." },
  { name: "top_p", label: "Top p", min: 0.05, max: 1, step: 0.05, value: 0.95,
    meaning: "Choose among the likeliest tokens that together have this probability." },
  { name: "top_k", label: "Top k", min: 0, max: 100, step: 1, value: 0,
    meaning: "Choose among this number of likeliest tokens; 0 means no limit." },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, value: 0,
    meaning: "Drop tokens less likely than this share of the likeliest." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.05, value: 1,
    meaning: "Above 1, tokens that occurred before become less likely." },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, value: 0,
    meaning: "Above 0, tokens that the story holds become less likely. The beginning does not count." },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, value: 0,
    meaning: "Above 0, tokens become less likely each time that the story holds them." },
  { name: "stop", label: "Stop at", type: "text", value: "",
    meaning: "The story ends before this text." },
  { name: "seed", label: "Seed", type: "text", value: "", pattern: "[0-9]{1,15}",
    meaning: "The same number gives the same story. Empty gives a new story each time." },
];

const inputs = new Map();

/** Build the fields inside `parent`. */
export function showSettings(parent) {
  for (const setting of SETTINGS) parent.append(field(setting));
}

export function resetSettings() {
  for (const { name, value } of SETTINGS) {
    const input = inputs.get(name);
    input.value = value;
    input.dispatchEvent(new Event("input"));
  }
}

/** The settings as fields of a request; throws an Error for an invalid one. */
export function settings() {
  const body = {};
  for (const { name, label, type } of SETTINGS) {
    const input = inputs.get(name);
    if (!input.checkValidity()) throw new Error(`${label} must be a whole number of at most 15 digits.`);
    if (input.value === "") continue;
    body[name] = type === "text" && name !== "seed" ? input.value : Number(input.value);
  }
  return body;
}

function field({ name, label, type = "range", meaning, value, ...limits }) {
  const id = `setting-${name}`;
  const row = document.createElement("div");
  row.className = "field";
  const title = Object.assign(document.createElement("label"), { htmlFor: id, textContent: label });
  const input = Object.assign(document.createElement("input"), { id, type, name, ...limits, value });
  const text = Object.assign(document.createElement("p"), { id: `${id}-meaning`, textContent: meaning });
  text.className = "muted";
  input.setAttribute("aria-describedby", text.id);
  input.autocomplete = "off";
  inputs.set(name, input);
  row.append(title);
  if (type === "range") {
    const output = document.createElement("output");
    output.htmlFor = id;
    const show = () => (output.value = input.value);
    input.addEventListener("input", show);
    show();
    row.append(output);
  }
  row.append(input, text);
  return row;
}
