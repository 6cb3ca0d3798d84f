// The window beside a token, with its alternatives and their probabilities.

const box = document.getElementById("alternatives");
const MARGIN = 8; // px between the window and the edges of the page

/** Show it beside `element`. `top` maps tokens to log-probabilities; the chosen token is always listed. */
export function showAlternatives(element, logprob, top) {
  const chosen = element.textContent;
  const rows = Object.entries(top).map(([text, value]) => ({ text, value, chosen: value === logprob }));
  if (!rows.some((row) => row.chosen)) rows.push({ text: chosen, value: logprob, chosen: true });
  rows.sort((a, b) => b.value - a.value);
  const list = document.createElement("ol");
  list.append(...rows.map(row));
  box.replaceChildren(list);
  box.hidden = false;
  position(element);
}

export function hideAlternatives() {
  box.hidden = true;
}

function row({ text, value, chosen }) {
  const share = Math.exp(value);
  const item = document.createElement("li");
  if (chosen) item.className = "chosen";
  const word = Object.assign(document.createElement("span"), { className: "word" });
  word.append(...[...(text || "∅")].map(visible));
  const bar = Object.assign(document.createElement("span"), { className: "share" });
  bar.style.setProperty("--share", share);
  const number = Object.assign(document.createElement("span"), { className: "number", textContent: percent(share) });
  item.append(word, bar, number);
  return item;
}

/** Show a space or a line end as a faint sign, and any other character unchanged. */
function visible(letter) {
  const sign = { " ": "␣", "\n": "↵" }[letter];
  return sign ? Object.assign(document.createElement("span"), { className: "sign", textContent: sign }) : letter;
}

function percent(share) {
  if (share >= 0.1) return `${Math.round(share * 100)} %`;
  return share >= 0.001 ? `${(share * 100).toFixed(1)} %` : "< 0.1 %";
}

function position(element) {
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect(); // a token can be broken into two lines
  const width = document.documentElement.clientWidth;
  const left = Math.min(Math.max(at.left, MARGIN), width - box.offsetWidth - MARGIN);
  const above = at.bottom + box.offsetHeight + MARGIN > window.innerHeight && at.top > box.offsetHeight + MARGIN;
  const top = above ? at.top - box.offsetHeight - 6 : at.bottom + 6;
  box.style.left = `${left + window.scrollX}px`;
  box.style.top = `${top + window.scrollY}px`;
}
