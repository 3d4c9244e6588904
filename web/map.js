// Select Positions: the map of the model's blocks, and the window of noise levels.

import { addView, element } from "./dom.js";
import { choiceOf, fetchCard, followLoaders, loadersOf, newest, onChange, setWidgets, showWidgets, sourceOf, widgetOf } from "./graph.js";
import { receiptOf } from "./receipt.js";
import { say } from "./words.js";

const BY_HAND = "by hand";
const AS_PLANNED = "as planned";
const FREE = ["form", "strength", "window_start", "window_end"]; // count only where it is not as planned

export function showMap(node) {
  const view = addView(node, "map", 150);
  const value = (name) => widgetOf(node, name).value;
  let card;
  let focused; // the position that has, or would get, the keyboard's focus

  const byHand = () => value("positions").split(/[\s,]+/).filter(Boolean);
  const chosen = () => {
    if (value("select") === BY_HAND) return new Set(byHand());
    if (value("select") === "routed") return new Set(card.plan.map(([position]) => position));
    const group = value("select").split(" ")[0];
    return new Set(Object.keys(card.positions).filter((name) => card.positions[name] === group));
  };

  /** Sets positions on or off by hand; what names no position of this dictionary is kept, for the node to refuse. */
  const choose = (names, on) => {
    const now = chosen();
    for (const name of names) on ? now.add(name) : now.delete(name);
    const known = card.all_positions.filter((name) => now.has(name));
    const unknown = [...now].filter((name) => !card.all_positions.includes(name));
    setWidgets(node, { positions: [...known, ...unknown].join(", "), select: BY_HAND });
  };

  const draw = () => {
    const free = value("operator") !== AS_PLANNED;
    showWidgets(node, { positions: value("select") === BY_HAND, ...Object.fromEntries(FREE.map((name) => [name, free])) });
    const missing = !card ? "map.none" : card.error ? undefined : !card.all_positions && "map.not_here";
    if (card?.error || missing) {
      view.replaceChildren(element("div", card?.error ? "fault" : "faint", card?.error ?? say(missing)));
      return;
    }
    const { position, handle } = view.contains(document.activeElement) ? document.activeElement.dataset : {};
    view.replaceChildren(...strips(), legend(), readout, ...problems());
    if (free) view.append(windowSlider(node, value));
    const had = position ? `[data-position="${position}"]` : handle && `[data-handle="${handle}"]`;
    if (had) view.querySelector(had)?.focus({ preventScroll: true });
  };

  // One strip per stream: every block of the model is a cell, however many there are.
  const strips = () => {
    const on = chosen();
    const rows = new Map();
    for (const name of card.all_positions) {
      const [part, , stream] = name.split(".");
      const key = stream ? `${part}.${stream}` : "prompt";
      if (!rows.has(key)) rows.set(key, []);
      rows.get(key).push(name);
    }
    const all = [...rows].filter(([, names]) => names.some((name) => name in card.positions));
    const there = all.flatMap(([, names]) => names).filter((name) => name in card.positions);
    if (!there.includes(focused)) focused = there.find((name) => on.has(name)) ?? there[0];
    return all.map(([key, names]) => {
      const row = element("div", "strip");
      const cells = element("div", "cells", undefined, { role: "group", "aria-label": say(`map.stream.${key}`) });
      cells.append(...names.map((name) => cell(name, on.has(name))));
      const ends = key === "prompt" ? names.join(", ") : `0 – ${names.length - 1}`;
      const head = element("div", "head");
      head.append(element("span", "", say(`map.stream.${key}`)), element("span", "faint", ends));
      row.append(head, cells);
      return row;
    });
  };

  const cell = (name, on) => {
    const made = element("button", "cell", undefined, { type: "button", "data-position": name });
    const operators = operatorsAt(name);
    made.disabled = !(name in card.positions);
    made.tabIndex = name === focused ? 0 : -1;
    made.setAttribute("aria-pressed", String(on));
    made.setAttribute("aria-label", about(name, on));
    if (on) made.classList.add(...(operators.length ? operators : ["unplanned"]));
    if (witnessed(name).length) made.classList.add("witness");
    const share = on ? strengthAt(name) / strongest() : (card.scores?.[name] ?? 0) / highest();
    made.style.setProperty("--share", String(Math.min(1, Math.max(0, share || 0))));
    return made;
  };

  const operatorsAt = (name) => {
    if (value("operator") !== AS_PLANNED) return [value("operator")];
    return [...new Set(card.plan.filter(([position]) => position === name).map(([, operator]) => operator))];
  };
  const strengthAt = (name) => {
    if (value("operator") !== AS_PLANNED) return value("strength");
    return Math.max(0, ...card.plan.filter(([position]) => position === name).map(([, , strength]) => strength));
  };
  const strongest = () => Math.max(...card.all_positions.map(strengthAt), 1e-6);
  const highest = () => Math.max(...Object.values(card.scores ?? {}), 1e-6);
  const witnessed = (name) => Object.keys(card.witnesses ?? {}).filter((domain) => card.witnesses[domain].includes(name));

  /** A position in words, for the line below the map and for screen readers. */
  const about = (name, on) => {
    if (!(name in card.positions)) return say("map.no_features", { position: name });
    const parts = operatorsAt(name).map((operator) => `${operator} ${strengthAt(name)}`);
    if (!parts.length) parts.push(say("map.unplanned"));
    if (card.scores?.[name] !== undefined) parts.push(say("map.routing", { score: card.scores[name].toFixed(2) }));
    const domains = witnessed(name);
    if (domains.length) parts.push(say("map.witness_of", { domains: domains.join(", ") }));
    return `${name}: ${say(on ? "map.on" : "map.off")}; ${parts.join("; ")}`;
  };

  const readout = element("div", "readout faint", "", { "aria-hidden": "true" });
  const tell = (name) => {
    readout.textContent = name ? about(name, chosen().has(name)) : say("map.how");
  };

  const legend = () => {
    const made = element("div", "legend");
    for (const kind of ["blend", "repel", "unplanned", "witness"]) {
      const entry = element("span", "");
      entry.append(element("i", `cell ${kind}`), say(`map.legend.${kind}`));
      made.append(entry);
    }
    tell();
    return made;
  };

  const problems = () => {
    if (value("operator") !== AS_PLANNED) return [];
    const outside = [...chosen()].filter((name) => name in card.positions && !operatorsAt(name).length);
    return outside.length ? [element("div", "notice", say("map.outside_plan", { positions: outside.join(", ") }))] : [];
  };

  // The mouse: a click toggles a cell, a drag carries what the first cell became to those that it passes.
  let painting;
  const cellAt = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest?.(".cell[data-position]");
  const paint = (made) => {
    if (!made || made.disabled || !view.contains(made) || painting.names.has(made.dataset.position)) return;
    painting.names.add(made.dataset.position);
    made.setAttribute("aria-pressed", String(painting.on));
    made.classList.toggle("painted", true);
  };
  view.addEventListener("pointerdown", (event) => {
    const made = event.target.closest?.(".cell[data-position]");
    if (!made || made.disabled || event.button) return;
    event.preventDefault();
    event.stopPropagation();
    painting = { on: made.getAttribute("aria-pressed") !== "true", names: new Set(), last: event };
    focused = made.dataset.position;
    made.focus({ preventScroll: true });
    view.setPointerCapture(event.pointerId);
    paint(made);
  });
  view.addEventListener("pointermove", (event) => {
    const made = cellAt(event);
    tell(made && view.contains(made) ? made.dataset.position : undefined);
    if (painting) paint(made);
  });
  const finish = () => {
    const { on, names } = painting ?? {};
    painting = undefined;
    if (names?.size) choose(names, on);
  };
  view.addEventListener("pointerup", finish);
  view.addEventListener("pointercancel", finish);
  view.addEventListener("pointerleave", () => painting || tell());

  // The keyboard: arrows go from cell to cell and from strip to strip, Space and Enter toggle.
  view.addEventListener("focusin", (event) => tell(event.target.dataset?.position));
  view.addEventListener("keydown", (event) => {
    const made = event.target.closest?.(".cell[data-position]");
    if (!made) return;
    if (event.key === " " || event.key === "Enter") {
      choose([made.dataset.position], made.getAttribute("aria-pressed") !== "true");
    } else {
      const next = neighbour(made, event.key);
      if (next === undefined) return;
      made.tabIndex = -1;
      focused = next.dataset.position;
      next.tabIndex = 0;
      next.focus({ preventScroll: true });
    }
    event.preventDefault();
    event.stopPropagation();
  });
  const neighbour = (made, key) => {
    const rows = [...view.querySelectorAll(".cells")].map((cells) => [...cells.children].filter((one) => !one.disabled));
    const row = rows.findIndex((cells) => cells.includes(made));
    const at = rows[row].indexOf(made);
    if (key === "ArrowLeft") return rows[row][Math.max(0, at - 1)];
    if (key === "ArrowRight") return rows[row][Math.min(rows[row].length - 1, at + 1)];
    if (key === "Home") return rows[row][0];
    if (key === "End") return rows[row].at(-1);
    const other = key === "ArrowUp" ? rows.slice(0, row).reverse() : key === "ArrowDown" ? rows.slice(row + 1) : undefined;
    const target = other?.find((cells) => cells.length);
    return other && (target?.[Math.min(at, target.length - 1)] ?? made);
  };

  const load = newest(
    async () => {
      const loader = loadersOf(node).at(-1);
      return loader && fetchCard(choiceOf(loader));
    },
    (answer) => {
      card = answer;
      draw();
    },
  );
  for (const name of ["select", "positions", "operator", ...FREE]) onChange(widgetOf(node, name), () => card && draw());
  followLoaders(node, load);
  setTimeout(load); // after a workflow has set the widgets
}

/** Two handles over the noise levels, from noise on the left to the picture on the right. */
function windowSlider(node, value) {
  const made = element("div", "window");
  const handles = ["window_start", "window_end"].map((name) => {
    const label = say(`map.${name}`);
    const range = { type: "range", min: 0, max: 1, step: 0.01, "aria-label": label, "data-handle": name };
    const handle = element("input", "", undefined, range);
    handle.value = String(1 - value(name));
    handle.onpointerdown = (event) => event.stopPropagation();
    handle.onkeydown = (event) => {
      const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -100, End: 100 }[event.key];
      if (!steps) return;
      event.preventDefault(); // the page takes arrows for its own, in some versions
      event.stopPropagation();
      handle.value = String(Number(handle.value) + steps / 100);
      handle.oninput();
      handle.onchange();
    };
    return handle;
  });
  const [start, end] = handles;
  const text = element("div", "faint");
  const track = element("div", "track");
  const sigmas = sigmasOf(node);
  track.append(...sigmas.map((sigma) => {
    const tick = element("i", "tick");
    tick.style.left = `${(1 - sigma) * 100}%`;
    return tick;
  }), element("i", "range"), ...handles);
  const tell = () => {
    const [from, to] = handles.map((handle) => 1 - handle.value);
    made.style.setProperty("--from", String(1 - from));
    made.style.setProperty("--to", String(1 - to));
    const levels = { from: from.toFixed(2), to: to.toFixed(2) };
    const steps = sigmas.map((sigma, i) => [sigma, i + 1]).filter(([sigma]) => from >= sigma && sigma >= to);
    const which = steps.length ? say("map.steps", { first: steps[0][1], last: steps.at(-1)[1], all: sigmas.length }) : say("map.no_step");
    text.textContent = say("map.window", levels) + (sigmas.length ? `: ${which}` : "");
    for (const handle of handles) handle.setAttribute("aria-valuetext", text.textContent);
  };
  start.oninput = () => {
    if (Number(start.value) > Number(end.value)) start.value = end.value; // they never cross
    tell();
  };
  end.oninput = () => {
    if (Number(end.value) < Number(start.value)) end.value = start.value;
    tell();
  };
  const level = (handle) => Math.round((1 - handle.value) * 100) / 100;
  const set = () => setWidgets(node, { window_start: level(start), window_end: level(end) });
  start.onchange = set;
  end.onchange = set;
  made.append(track, text);
  tell();
  return made;
}

/** The noise levels of the steps, as they were when this node's positions were last sampled with. */
function sigmasOf(node) {
  for (const other of node.graph?.nodes ?? []) {
    const apply = other.comfyClass === "SafeDIGSteeringReceipt" ? sourceOf(other, "receipt") : undefined;
    const runs = apply && sourceOf(apply, "positions") === node ? receiptOf(other)?.at(-1)?.runs : undefined;
    if (runs?.at(-1)?.sigmas?.length) return runs.at(-1).sigmas;
  }
  return [];
}
