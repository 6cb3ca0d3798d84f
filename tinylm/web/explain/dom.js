// Small pieces of the page: elements, tokens as text, numbers as text, tables with bars.

export const byId = (id) => document.getElementById(id);

/** Return a new element. `attributes` with the value null are left out. */
export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Return a token for people: spaces and line ends as faint signs, which screen readers skip. */
export function word(token) {
  const made = make("span", { class: "word" });
  if (!token.bytes.length) {
    made.append(make("i", {}, "boundary"));
    return made;
  }
  for (const letter of token.text) {
    const sign = { " ": "␣", "\n": "↵" }[letter];
    made.append(sign ? make("span", { class: "sign", "aria-hidden": true }, sign) : letter);
  }
  if (!token.text.trim()) made.append(make("span", { class: "unseen" }, token.text.includes("\n") ? "line end" : "space"));
  return made;
}

/** Return a token as a plain string in quotation marks. */
export function quoted(token) {
  if (!token) return "another token";
  return token.bytes.length ? `“${token.text.trim() || "space"}”` : "the boundary";
}

/** Return a text with a large first letter, for the beginning of a sentence. */
export const capital = (text) => text[0].toUpperCase() + text.slice(1);

export function percent(share) {
  if (share >= 0.9995) return "100 %";
  if (share >= 0.1) return `${(share * 100).toFixed(0)} %`;
  if (share >= 0.001) return `${(share * 100).toFixed(1)} %`;
  return share > 0 ? "< 0.1 %" : "0 %";
}

/** Return a number with a fixed number of digits, and a real minus sign. */
export const fixed = (number, digits) => number.toFixed(digits).replace("-", "−");

export const whole = (number) => Math.round(number).toLocaleString("en");

/** Return a cell with a bar of length `share`, from 0 to 1. `was` puts a mark at another share. */
export function bar(share, was = null) {
  const made = make("span", { class: "bar-of" });
  made.style.setProperty("--share", Math.max(0, Math.min(1, share)));
  if (was !== null) {
    made.classList.add("with-mark");
    made.style.setProperty("--was", Math.min(1, was));
  }
  return made;
}

/** Replace the head and the rows of a table, and keep its caption. The first cell of a row is its header.
    A row is a list of cells, each text or an element, or { cells, ...attributes }. */
export function fill(table, head, rows) {
  const cells = (row) => row.cells ?? row;
  const body = rows.map((row) => {
    const { cells: _, ...attributes } = Array.isArray(row) ? { cells: row } : row;
    const [first, ...rest] = cells(row);
    return make("tr", attributes, make("th", { scope: "row" }, first), ...rest.map((cell) => make("td", {}, cell)));
  });
  const titles = head.map((title) => (title ? make("th", { scope: "col" }, title) : make("td")));
  const caption = table.querySelector("caption");
  table.replaceChildren(...(caption ? [caption] : []), make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...body));
}

/** Set text only if it differs, because screen readers read each change of a status. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
