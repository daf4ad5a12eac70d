"use strict";

// The table of edits. What it shows is a function of the address (#run=0&show=forgotten&q=piano&page=2&edit=12), so
// that every view is a link, and going back goes back.

const PER_PAGE = 50;
const runs = readRuns();
const at = (id) => document.getElementById(id);

function readView() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (/^\d+$/.test(given.get(name) ?? "") ? Number(given.get(name)) : null);
  return {
    run: Math.min(number("run") ?? 0, runs.length - 1),
    show: Object.hasOwn(FILTERS, given.get("show") ?? "") ? given.get("show") : "all",
    q: given.get("q") ?? "",
    page: number("page"),
    edit: number("edit"),
  };
}

function address(view) {
  const kept = new URLSearchParams();
  for (const [name, value] of Object.entries(view)) {
    if (value !== null && value !== "") kept.set(name, value);
  }
  return `#${kept}`;
}

// The id is for the keyboard: the link that has the focus has it again when the view is drawn anew.
function link(id, title, view, current) {
  return make("a", { id: `link-${id}`, href: address(view), "aria-current": current ? "true" : null }, ...[title].flat());
}

function render() {
  const focused = document.activeElement.id;
  const view = readView();
  const run = runs[view.run];
  const edits = matching(run, view);
  const opened = edits.findIndex((edit) => edit.index === view.edit);
  const pages = Math.max(1, Math.ceil(edits.length / PER_PAGE));
  const page = Math.min(pages, Math.max(1, view.page ?? Math.floor(Math.max(opened, 0) / PER_PAGE) + 1));
  const fresh = { run: view.run, show: view.show, q: view.q, page: null, edit: null };
  if (at("query").value !== view.q) at("query").value = view.q;
  showSample(run);
  at("runs").hidden = runs.length === 1;
  at("runs").replaceChildren(...runs.map((other, k) => link(`run-${k}`, other.name, { ...fresh, run: k }, k === view.run)));
  at("filters").replaceChildren(...Object.keys(FILTERS).map((show) => filter(show, run, view, fresh)));
  at("count").textContent = count(edits.length, run, view, opened);
  at("rows").replaceChildren(...edits.slice((page - 1) * PER_PAGE, page * PER_PAGE).flatMap((edit) => row(edit, run, view)));
  at("table").hidden = edits.length === 0;
  showPages(page, pages, fresh);
  if (focused.startsWith("link-")) at(focused)?.focus({ preventScroll: true });
}

function filter(show, run, view, fresh) {
  const number = matching(run, { show, q: view.q }).length.toLocaleString("en");
  return link(show, [FILTERS[show].title, " ", make("small", {}, number)], { ...fresh, show }, show === view.show);
}

function showSample(run) {
  at("sample").hidden = run.edits.length === run.total;
  at("sample").textContent =
    `This page has ${run.edits.length.toLocaleString("en")} of the run's ${run.total.toLocaleString("en")} edits: ` +
    "those that failed or diverged first, then others, evenly spread. Numbers beside the filters count these only.";
}

function count(found, run, view, opened) {
  const edits = found === 1 ? "1 edit" : `${found.toLocaleString("en")} edits`;
  const missing = view.edit !== null && opened < 0 ? `; edit ${view.edit} is not among them` : "";
  return (found === 0 ? "No edits" : edits) + (view.q === "" ? "" : ` with “${view.q}”`) + missing;
}

function row(edit, run, view) {
  const open = edit.index === view.edit;
  const toggle = link(`edit-${edit.index}`, String(edit.index), { ...view, edit: open ? null : edit.index }, open);
  toggle.setAttribute("aria-label", open ? `Close edit ${edit.index}` : `Open edit ${edit.index}`);
  const line = make(
    "tr",
    { class: open ? "open" : null },
    make("td", { class: "number" }, toggle),
    make("td", { class: "prompt" }, edit.prompt),
    cell("wanted", edit.target),
    cell("before", said(edit.before)),
    cell("right after", said(edit.immediate.text, edit.immediate.right)),
    cell("at the end", said(edit.final.text, edit.final.right)),
    cell("all questions", tallies(edit)),
  );
  line.addEventListener("click", (event) => {
    if (event.target.closest("a") === null && String(getSelection()) === "") toggle.click();
  });
  return open ? [line, make("tr", { class: "opened" }, make("td", { colspan: 7 }, detail(edit, run)))] : [line];
}

// How many questions of each measure are answered rightly in the end: R 1/1, G 1/2, ...
function tallies(edit) {
  const parts = MEASURES.map((measure) => {
    const asked = edit.probes.filter((probe) => probe.measure === measure);
    if (asked.length === 0) return null;
    const right = asked.filter((probe) => last(probe).right).length;
    const words = `${measure}: ${right} of ${asked.length} right`;
    const key = make("i", { class: "key", style: `background: var(--${measure})` });
    const state = right === asked.length ? null : "missed";
    return make("span", { title: words, "aria-label": words, role: "img", class: state }, key, `${right}/${asked.length}`);
  });
  return make("span", { class: "tallies" }, ...parts);
}

function showPages(page, pages, fresh) {
  const to = (title, number) =>
    number < 1 || number > pages ? make("span", { class: "faint" }, title) : link(title, title, { ...fresh, page: number }, false);
  at("pages").hidden = pages === 1;
  at("pages").replaceChildren(
    to("first", page === 1 ? 0 : 1),
    to("previous", page - 1),
    make("span", {}, `page ${page} of ${pages}`),
    to("next", page + 1),
    to("last", page === pages ? 0 : pages),
  );
}

at("query").addEventListener("input", (event) => {
  const { run, show } = readView();
  history.replaceState(null, "", address({ run, show, q: event.target.value }));
  render();
});
addEventListener("hashchange", () => {
  if (location.hash.includes("=")) render();
});
at("browser").hidden = false;
render();
if (location.hash.includes("=")) {
  (document.querySelector("tr.open") ?? at("edits")).scrollIntoView();
}
