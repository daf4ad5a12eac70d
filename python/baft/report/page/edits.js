"use strict";

// Runs as baft/report/packing.py packs them, made into objects; the order of the columns is given there.

const MEASURES = ["reliability", "generality", "locality", "portability"];

function readRuns() {
  return JSON.parse(document.getElementById("data").textContent).map((run) => ({
    name: run.name,
    mode: run.mode,
    total: run.total,
    stopBelow: run.stop_below,
    edits: run.edits.map((row) => readEdit(row, run)),
  }));
}

function readEdit(row, { texts, curves }) {
  const [index, id, prompt, target, steps, seconds, ended, curve, immediate, final, probes, superseded] = row;
  const read = probes.map((probe) => readProbe(probe, texts));
  const own = read.find((probe) => probe.measure === "reliability");
  return {
    index,
    id: id === null ? null : texts[id],
    prompt: texts[prompt],
    target: texts[target],
    steps,
    seconds,
    ended, // "converged", "stopped" (it had taken all of its steps), "diverged", or "out of memory"
    losses: curves[curve],
    immediate: { right: immediate, text: own ? own.immediate.text : null },
    final: { right: final, text: own ? own.final.text : null },
    before: own ? own.before : null,
    probes: read,
    superseded, // by a later request with its prompt and another target: what it should bring isn't judged at the end
  };
}

function readProbe(row, texts) {
  const [measure, kind, prompt, answers, before, immediate, immediateRight, final, finalRight] = row;
  const text = (place) => (place === null ? null : texts[place]);
  return {
    measure: MEASURES[measure],
    kind: texts[kind],
    prompt: texts[prompt],
    answers: answers.map(text),
    before: texts[before],
    immediate: { right: immediateRight, text: text(immediate) },
    final: { right: finalRight, text: text(final) },
  };
}

// Single edits have no end that holds them all, and what is superseded can't hold there: theirs is the moment right after.
const last = (asked) => (asked.final.right === null ? asked.immediate : asked.final);

const FILTERS = {
  all: { title: "all", has: () => true },
  failed: { title: "failed at the end", has: (edit) => last(edit).right === false },
  forgotten: { title: "forgotten", has: (edit) => edit.immediate.right === true && edit.final.right === false },
  disturbing: {
    title: "changed something else",
    has: (edit) => edit.probes.some((probe) => probe.measure === "locality" && last(probe).right === false),
  },
  diverged: { title: "diverged", has: (edit) => edit.ended === "diverged" },
};

function matching(run, { show, q }) {
  const wanted = q.toLowerCase();
  const said = (edit) => [edit.id, edit.prompt, edit.target, edit.before, edit.immediate.text, edit.final.text];
  const found = (edit) => said(edit).some((text) => text !== null && text.toLowerCase().includes(wanted));
  return run.edits.filter((edit) => FILTERS[show].has(edit) && (wanted === "" || found(edit)));
}
