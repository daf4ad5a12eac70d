"use strict";

// The training curve of one edit: loss over steps, on a logarithmic axis, with the loss at which training stops.

const CURVE = { width: 340, height: 150, left: 44, right: 10, top: 8, bottom: 26 };

function svgElement(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function drawCurve(losses, stopBelow) {
  const points = losses.map((loss, step) => [step + 1, loss]).filter(([, loss]) => loss !== null && loss > 0);
  if (points.length === 0) return null;
  const shown = points.map(([, loss]) => loss).concat(stopBelow > 0 ? [stopBelow] : []);
  const low = Math.floor(Math.log10(Math.min(...shown)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...shown))));
  const { width, height, left, right, top, bottom } = CURVE;
  const x = (step) => left + ((step - 1) / Math.max(losses.length - 1, 1)) * (width - left - right);
  const y = (loss) => top + ((high - Math.log10(loss)) / (high - low)) * (height - top - bottom);
  const words = `Loss from ${points[0][1]} to ${points[points.length - 1][1]} in ${losses.length} steps`;
  const svg = svgElement("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words, class: "curve" });
  for (let power = low; power <= high; power++) {
    const at = y(10 ** power);
    svg.append(svgElement("line", { x1: left, x2: width - right, y1: at, y2: at, class: "grid" }));
    svg.append(svgElement("text", { x: left - 6, y: at + 3.5, "text-anchor": "end" }, String(+(10 ** power).toPrecision(1))));
  }
  if (stopBelow > 0) {
    svg.append(svgElement("line", { x1: left, x2: width - right, y1: y(stopBelow), y2: y(stopBelow), class: "stop" }));
  }
  svg.append(svgElement("polyline", { points: points.map(([s, l]) => `${x(s).toFixed(1)},${y(l).toFixed(1)}`).join(" ") }));
  if (points.length <= 60) {
    for (const [step, loss] of points) svg.append(svgElement("circle", { cx: x(step), cy: y(loss), r: 2.4 }));
  }
  svg.append(svgElement("text", { x: left, y: height - 8 }, "1"));
  svg.append(svgElement("text", { x: width - right, y: height - 8, "text-anchor": "end" }, `${losses.length} steps`));
  return svg;
}
