"use strict";

// Elements with text in them, and one edit in full. Text from a run goes in as text nodes only.

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// What was said, with a mark if it was judged. A text may be empty or begin with spaces: an empty one is named.
function said(text, right) {
  if (text === null) return make("span", { class: "faint" }, "no data");
  const shown = text.trim() === "" ? make("em", { class: "faint" }, "nothing") : text.trim();
  if (right === undefined || right === null) return make("span", { class: "said" }, shown);
  const mark = make("b", { class: right ? "right" : "wrong", role: "img", "aria-label": right ? "right" : "wrong" }, right ? "✓" : "✗");
  return make("span", { class: "said" }, mark, " ", shown);
}

function cell(title, ...children) {
  return make("td", { "data-title": title }, ...children);
}

const ENDED = {
  converged: "its loss was low enough",
  stopped: "it had taken all of its steps",
  diverged: "its loss was no finite number any more",
  "out of memory": "the device had no more memory",
};

function detail(edit, run) {
  const curve = drawCurve(edit.losses, run.stopBelow);
  const training =
    `${edit.steps} steps in ${edit.seconds.toFixed(2)} s; it ended because ${ENDED[edit.ended]}.` +
    (run.stopBelow > 0 && curve ? ` The dashed line is the loss at which it may stop, ${run.stopBelow}.` : "") +
    (edit.superseded ? " A later request has its prompt and another target, so it isn't judged at the end." : "");
  return make(
    "article",
    { class: "detail", "aria-label": `Edit ${edit.index}` },
    make("h3", {}, `Edit ${edit.index}`, edit.id === null ? "" : make("small", {}, ` ${edit.id}`)),
    make("p", { class: "request" }, edit.prompt, " → ", make("b", {}, edit.target)),
    make("figure", {}, curve, make("figcaption", {}, training)),
    questions(edit.probes),
  );
}

function questions(probes) {
  const head = ["question", "accepted", "before", "right after", "at the end"];
  const body = make("tbody", {});
  for (const measure of MEASURES) {
    const asked = probes.filter((probe) => probe.measure === measure);
    if (asked.length === 0) continue;
    const key = make("i", { class: "key", style: `background: var(--${measure})` });
    body.append(make("tr", { class: "measure" }, make("th", { colspan: head.length, scope: "rowgroup" }, key, measure)));
    for (const probe of asked) body.append(question(probe));
  }
  const titles = head.map((title) => make("th", { scope: "col" }, title));
  return make("table", { class: "edits questions" }, make("thead", {}, make("tr", {}, ...titles)), body);
}

function question(probe) {
  const kind = probe.kind === probe.measure ? null : make("small", {}, `${probe.kind} `);
  const accepted = probe.measure === "locality" ? "the same as before" : probe.answers.join(" / ");
  return make(
    "tr",
    {},
    make("td", { class: "prompt" }, kind, probe.prompt),
    cell("accepted", accepted),
    cell("before", said(probe.before)),
    cell("right after", said(probe.immediate.text, probe.immediate.right)),
    cell("at the end", said(probe.final.text, probe.final.right)),
  );
}
