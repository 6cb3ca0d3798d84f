// Elements of SVG, and the charts of the live view: a line of the last minute, a histogram. The style sheet sets the colours.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Draw `values` (oldest first) at the right end of a chart with room for `length` values, from 0 to the largest. */
export function line(values, length) {
  const most = Math.max(...values, 1e-9);
  const x = (i) => (100 * (length - values.length + i)) / (length - 1);
  const points = values.map((value, i) => `${x(i).toFixed(2)},${(30 - (28 * value) / most).toFixed(2)}`);
  const chart = element("svg", { class: "line", viewBox: "0 0 100 31", preserveAspectRatio: "none", "aria-hidden": true });
  if (values.length > 1) {
    chart.append(
      element("polygon", { points: `${x(0)},30 ${points.join(" ")} 100,30` }),
      element("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" }),
    );
  }
  return chart;
}

/** A bar for each bucket, the last without a bound; `label(bound)` returns the label of a bound, if any.
    `width` in px. */
export function histogram(bounds, counts, label, width) {
  const [height, foot] = [130, 22];
  const step = width / counts.length;
  const most = Math.max(...counts, 1);
  const total = counts.reduce((a, b) => a + b, 0);
  const chart = element("svg", { class: "histogram", width, height: height + foot, role: "img" });
  chart.setAttribute("aria-label", `${total} ${total === 1 ? "answer" : "answers"}, by how long they took`);
  counts.forEach((count, i) => {
    const tall = (count / most) * (height - 4);
    if (count) {
      const bar = element("rect", { x: i * step + 1, y: height - tall, width: step - 2, height: tall, rx: 1.5 });
      const range = i < bounds.length ? `up to ${bounds[i] * 1000} ms` : `over ${bounds.at(-1)} s`;
      bar.append(element("title", {}, `${range}: ${count}`));
      chart.append(bar);
    }
    const name = i < bounds.length && label(bounds[i]);
    if (name) chart.append(element("text", { x: (i + 1) * step, y: height + 17, "text-anchor": "middle" }, name));
  });
  chart.append(element("line", { x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 }));
  return chart;
}
