// A matrix as a picture: one pixel for each number, in the colours that the style sheet gives to the canvas.

/** Draw numbers from -1 to 1. `valueAt(row, column)` gives them. The canvas's text colour means 1, its border colour -1. */
export function paint(canvas, rows, columns, valueAt) {
  if (!canvas.isConnected) return; // another picture has replaced it, and it has no style
  const style = getComputedStyle(canvas);
  const [plus, minus] = [rgb(style.color), rgb(style.borderTopColor)];
  [canvas.width, canvas.height] = [columns, rows];
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const value = valueAt(Math.floor(i / columns), i % columns);
    image.data.set(value < 0 ? minus : plus, 4 * i);
    image.data[4 * i + 3] = 255 * Math.min(1, Math.abs(value));
  }
  context.putImageData(image, 0, 0);
}

/** Return a canvas with such a picture. Its label is its text alternative; without a label, it is decoration. */
export function picture(label, rows, columns, valueAt) {
  const canvas = document.createElement("canvas");
  canvas.className = "heat";
  if (label) {
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
  } else canvas.setAttribute("aria-hidden", "true");
  requestAnimationFrame(() => paint(canvas, rows, columns, valueAt)); // the style is known once it is in the page
  return canvas;
}

const rgb = (colour) => colour.match(/[\d.]+/g).slice(0, 3).map(Number);
