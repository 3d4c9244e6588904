// Steering Receipt: what was found in each picture and done about it, first in one sentence.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addView, element, svg } from "./dom.js";
import { after } from "./graph.js";
import { say } from "./words.js";

const KEPT = "safedig_receipt"; // in node.properties, which a workflow is saved, copied and undone with
const COLOURS = 6; // of lines, in safedig.css

/**
 * The last receipts of a node, one per item of a list of pictures: what ComfyUI still has of its last run, or else
 * what the workflow was saved with.
 */
export function receiptOf(node) {
  const outputs = app.nodeOutputs ?? {};
  const output = outputs[node.id] ?? outputs[`${node.graph?.id}:${node.id}`];
  return output?.safedig_view?.map((one) => JSON.parse(one)) ?? node.properties[KEPT];
}

export function showReceipt(node) {
  const view = addView(node, "receipt_view", 60);

  const draw = () => {
    const receipts = receiptOf(node);
    if (!receipts) {
      view.replaceChildren(element("div", "faint", say("receipt.nothing")));
      return;
    }
    node.properties[KEPT] = receipts;
    try {
      view.replaceChildren(...receipts.flatMap(parts));
    } catch {
      view.replaceChildren(element("div", "fault", say("receipt.unreadable"))); // another version's, or made up
    }
  };

  after(node, "onExecuted", (output) => {
    node.properties[KEPT] = output.safedig_view.map((one) => JSON.parse(one));
    draw();
  });
  setTimeout(draw); // after a workflow has set the properties
}

function parts(receipt) {
  const kind = receipt.as_planned ? (receipt.verdict === "clear" ? "clear" : "found") : "bad";
  const verdict = element("div", `verdict ${kind}`);
  if (!receipt.as_planned) verdict.append(element("div", "title", say(`receipt.${receipt.unsteered.length ? "not_steered" : "not_as_planned"}`)));
  const several = receipt.pictures.length > 1;
  receipt.pictures.forEach((picture, i) => {
    const sentence = sentenceOf(picture);
    verdict.append(element("div", "sentence", several ? say("receipt.picture", { number: i + 1, sentence }) : capital(sentence)));
  });
  const notes = [
    ...receipt.unsteered.map((who) => say("receipt.unsteered", { who })),
    ...receipt.unsteered_before.map((who) => say("receipt.unsteered_before", { who })),
    ...new Set(receipt.runs.flatMap((run) => run.problems)),
    ...domainsOf(receipt).filter(([, found]) => found.unread.length).map(([name, found]) => say("receipt.unread", { name, positions: found.unread.join(", ") })),
  ].map((text) => element("div", "fault", text));
  if (receipt.one_of_several && receipt.runs.length) notes.push(element("div", "faint", say("receipt.one_of_several")));
  for (const [name, { left }] of domainsOf(receipt)) {
    if (left !== null && left < 0.995) notes.push(element("div", "faint", say("receipt.left", { name, share: whole(left) })));
  }
  notes.push(...receipt.conflicts.map((text) => element("div", "faint", text)));
  const shown = [verdict, ...notes];
  for (const run of receipt.runs) if (run.evidence.length) shown.push(plot(run));
  if (receipt.heat) shown.push(heatMap(receipt.heat));
  shown.push(details(receipt));
  return shown;
}

/** Each domain of each picture: its name, with the picture's number where there are several, and what became of it. */
const domainsOf = ({ pictures }) =>
  pictures.flatMap(({ domains }, i) =>
    Object.entries(domains).map(([domain, found]) => [pictures.length > 1 ? say("receipt.of_picture", { domain, number: i + 1 }) : domain, found]),
  );

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** "weapons found at step 1, steered; this picture changed" */
export function sentenceOf(picture) {
  const told = Object.entries(picture.domains).filter(([, found]) => found.status !== "clear");
  const clauses = told.map(([domain, found]) => {
    const step = found.found_at_step === null ? "" : found.found_at_step + 1;
    return say(`receipt.status.${found.status}`, { domain, step }) ?? `${domain} ${found.status}`;
  });
  if (!clauses.length) clauses.push(say("receipt.clear"));
  if (picture.changed !== null) clauses.push(say(picture.changed ? "receipt.changed" : "receipt.unchanged"));
  return clauses.join("; ");
}

/** Evidence of each risk over the steps, as a multiple of what opens its gate; hovering tells the numbers. */
function plot(run) {
  const steps = run.evidence.length;
  const lines = run.images.flatMap((limits, image) =>
    Object.entries(limits).map(([domain, limit], d) => ({
      domain,
      colour: d % COLOURS,
      name: run.images.length > 1 ? say("receipt.of_picture", { domain, number: image + 1 }) : domain,
      values: run.evidence.map((step) => (step[image][d] === null ? null : step[image][d] / (limit || 1))),
    })),
  );
  const [width, height, left, right, top, bottom] = [360, 168, 34, 8, 8, 30];
  const most = Math.max(1.2, ...lines.flatMap(({ values }) => values.map((v) => (v ?? 0) * 1.1)));
  const x = (step) => left + ((width - left - right) * step) / Math.max(1, steps - 1);
  const y = (value) => height - bottom - ((height - top - bottom) * (value ?? most)) / most; // no number: at the top

  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "plot", role: "img", "aria-label": say("receipt.plot") });
  for (const value of ticks(most)) {
    drawn.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }));
    drawn.append(svg("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, `${value}×`));
  }
  const every = Math.ceil(steps / 8);
  for (let step = 0; step < steps; step += every) {
    drawn.append(svg("text", { x: x(step), y: height - bottom + 13, "text-anchor": "middle" }, String(step + 1)));
  }
  drawn.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, say("receipt.step")));
  drawn.append(svg("line", { x1: left, x2: width - right, y1: y(1), y2: y(1), class: "gate" }));
  drawn.append(svg("text", { x: width - right - 2, y: y(1) - 4, "text-anchor": "end" }, say("receipt.gate")));
  for (const { values, colour } of lines) {
    const points = values.map((value, step) => `${x(step)},${y(value)}`).join(" ");
    drawn.append(svg("polyline", { points, class: `line line-${colour}` }));
    if (steps === 1) drawn.append(svg("circle", { cx: x(0), cy: y(values[0]), r: 3, class: `dot line-${colour}` }));
  }
  const cursor = svg("line", { y1: top, y2: height - bottom, class: "cursor", visibility: "hidden" });
  drawn.append(cursor);

  const figure = element("figure", "");
  const caption = element("figcaption", "faint", say("receipt.plot"));
  const legend = element("div", "legend");
  for (const { colour, domain } of lines.filter(({ domain: d }, i) => lines.findIndex((line) => line.domain === d) === i)) {
    const entry = element("span", "");
    entry.append(element("i", `key line-${colour}`), domain);
    legend.append(entry);
  }
  drawn.onpointermove = (event) => {
    const box = drawn.getBoundingClientRect();
    const at = (((event.clientX - box.left) / box.width) * width - left) / (width - left - right);
    const step = Math.min(steps - 1, Math.max(0, Math.round(at * (steps - 1))));
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(step));
    cursor.setAttribute("visibility", "visible");
    const said = lines.map(({ name, values }) => `${name} ${values[step] === null ? say("receipt.not_finite") : `${values[step].toFixed(2)}×`}`);
    caption.textContent = say("receipt.at_step", { step: step + 1, values: said.join(", ") });
  };
  drawn.onpointerleave = () => {
    cursor.setAttribute("visibility", "hidden");
    caption.textContent = say("receipt.plot");
  };
  figure.append(drawn, legend, caption);
  return figure;
}

/** Three to six round numbers from 0 up. */
function ticks(most) {
  const step = [0.5, 1, 2, 5, 10, 20, 50, 100].find((size) => most / size <= 5) ?? most / 4;
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
}

/** Where on the pictures activations moved. Its files are ComfyUI's temporary ones: it goes when they are gone. */
function heatMap(files) {
  const figure = element("figure", "heat");
  const pictures = element("div", "pictures");
  for (const [i, file] of files.entries()) {
    const picture = element("img", "", undefined, { alt: say("receipt.heat_of", { number: i + 1 }), draggable: "false" });
    picture.onload = () => picture.classList.toggle("small", picture.naturalWidth < 256); // each pixel stays a square
    picture.onerror = () => figure.remove();
    picture.src = api.apiURL(`/view?${new URLSearchParams(file)}`);
    pictures.append(picture);
  }
  const scale = element("div", "scale");
  scale.append(element("span", "", say("receipt.moved_least")), element("i", ""), element("span", "", say("receipt.moved_most")));
  figure.append(element("figcaption", "faint", say("receipt.heat")), pictures, scale);
  return figure;
}

function details(receipt) {
  const made = element("details", "");
  made.append(element("summary", "", say("receipt.details")));
  const table = element("table", "");
  const row = (tag, ...cells) => {
    const line = element("tr", "");
    line.append(...cells.map((text) => element(tag, "", text)));
    table.append(line);
  };
  row("th", say("receipt.risk"), say("receipt.evidence"), say("receipt.threshold"));
  for (const [name, { threshold, evidence, looked }] of domainsOf(receipt)) {
    const read = evidence === null ? say("receipt.not_finite") : evidence.toFixed(2);
    row("td", name, threshold !== null && looked ? read : "–", threshold === null ? say("receipt.no_gate") : threshold.toFixed(2));
  }
  for (const run of receipt.runs) {
    row("th", say("receipt.position"), say("receipt.calls"), say("receipt.moved"));
    for (const { name, calls, planned, acting, moved, most } of run.positions) {
      const what = !acting ? say("receipt.only_looked") : moved ? say("receipt.tokens", { moved, most: percent(most) }) : say("receipt.nothing_moved");
      row("td", name, `${calls} / ${planned}`, what);
    }
  }
  made.append(table);
  return made;
}

const percent = (share) => `${(100 * share).toPrecision(2)} %`;
const whole = (share) => `${Math.round(100 * Math.max(0, share))} %`;
