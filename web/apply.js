// Apply Blend/Repel Steering: what to do about each risk, what wouldn't work before it is run, and why a run stopped.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addView, element } from "./dom.js";
import { choiceOf, fetchCard, followLoaders, loadersOf, newest, onChange, setWidgets, showWidgets, sourceOf, widgetOf } from "./graph.js";
import { say } from "./words.js";

const ACTIONS = ["steer", "observe", "stop"];
const PER_DOMAIN = "action_per_domain";
const LOADS_MODELS = { unet_name: "diffusion_models", ckpt_name: "checkpoints" }; // widget of a loader: its folder

const shown = new Map(); // by node: tells why a run stopped

api.addEventListener("safedig.stopped", ({ detail }) => {
  const number = String(detail.node).split(":").at(-1); // of a node in a subgraph, its own number
  for (const [node, stopped] of shown) if (String(node.id) === number) stopped(detail);
});
api.addEventListener("execution_start", () => {
  for (const stopped of shown.values()) stopped();
});

export function showApply(node) {
  const view = addView(node, "risks", 40);
  let cards = [];
  let misfit;
  let stop;

  const exceptions = () =>
    widgetOf(node, PER_DOMAIN).value.split(/[,\n]/).filter((part) => part.trim()).map((part) => part.split(/[=:]/).map((text) => text.trim()));

  const choose = (domain, action) => {
    const others = exceptions().filter(([name]) => name !== domain);
    if (action) others.push([domain, action]);
    setWidgets(node, { [PER_DOMAIN]: others.map((pair) => pair.join("=")).join(", ") });
  };

  const row = (domain) => {
    const made = element("label", "risk");
    const select = element("select", "", undefined, { "data-domain": domain });
    const usual = say("apply.as_above", { action: say(`apply.action.${widgetOf(node, "action").value}`) });
    select.append(element("option", "", usual, { value: "" }));
    for (const action of ACTIONS) select.append(element("option", "", say(`apply.action.${action}`), { value: action }));
    select.value = exceptions().findLast(([name]) => name === domain)?.[1] ?? "";
    select.onchange = () => choose(domain, select.value);
    select.onpointerdown = (event) => event.stopPropagation();
    made.append(element("span", "", domain), select);
    return made;
  };

  const draw = () => {
    const domains = [...new Set(cards.flatMap((card) => card.domains ?? []))];
    showWidgets(node, { [PER_DOMAIN]: !domains.length });
    view.replaceChildren();
    if (stop) view.append(element("div", "notice stopped", say("apply.stopped", stop)));
    if (misfit) view.append(element("div", "fault", say("apply.misfit", misfit)));
    if (!cards.length) view.append(element("div", "faint", say("apply.none")));
    const alone = cards.length && cards.at(-1).base; // the last one must be a dictionary
    if (alone) view.append(element("div", "fault", say("apply.needs_base", { base: alone })));
    if (domains.length) view.append(element("div", "faint", say("apply.per_risk")), ...domains.map(row));
    const unknown = domains.length ? exceptions().filter(([name, action]) => !domains.includes(name) || !ACTIONS.includes(action)) : [];
    for (const pair of unknown) view.append(element("div", "fault", say("apply.unknown", { text: pair.join("=") })));
  };

  const load = newest(
    async () => {
      const found = await Promise.all(loadersOf(node).map((loader) => fetchCard(choiceOf(loader))));
      return [found, await misfitOf(node, found.at(-1))];
    },
    (answer) => {
      [cards, misfit] = answer;
      draw();
    },
  );
  shown.set(node, (detail) => {
    if (!stop && !detail) return;
    stop = detail;
    draw();
  });
  const removed = node.onRemoved;
  node.onRemoved = function (...args) {
    shown.delete(node);
    return removed?.apply(this, args);
  };
  for (const name of ["action", PER_DOMAIN]) onChange(widgetOf(node, name), draw);
  followLoaders(node, load);
  setTimeout(load); // after a workflow has set the widgets
}

/** A model file that isn't of the family that the dictionary was made for; undefined where that can't be told. */
async function misfitOf(node, dictionary) {
  const source = sourceOf(node, "model");
  const [name, folder] = Object.entries(LOADS_MODELS).find(([widget]) => source && widgetOf(source, widget)) ?? [];
  if (!name || !dictionary?.family) return undefined;
  const file = widgetOf(source, name).value;
  const answer = await api.fetchApi(`/safedig/model?${new URLSearchParams({ folder, file })}`);
  const { model } = answer.ok ? await answer.json() : {};
  return model && model !== dictionary.family ? { file, model, wanted: dictionary.family } : undefined;
}
