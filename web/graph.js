// What the views read from ComfyUI's graph and write to it, in one way each.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

export const LOADER = "SafeDIGLoadDictionary";

export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** Makes one step of several changes: one undo takes them back, and a save has them all. */
export function change(make) {
  app.canvas.emitBeforeChange();
  try {
    make();
  } finally {
    app.canvas.emitAfterChange();
  }
}

/** The only way in which the views set widgets: what is shown, what runs and what is saved stay one. */
export function setWidgets(node, values) {
  change(() => {
    for (const [name, value] of Object.entries(values)) {
      const widget = widgetOf(node, name);
      if (!widget || widget.value === value) continue;
      const before = widget.value;
      widget.value = value;
      widget.callback?.(value, app.canvas, node);
      node.onWidgetChanged?.(name, value, before, widget);
    }
    node.setDirtyCanvas?.(true, true);
  });
}

/** Shows or hides widgets by name; one whose value comes over a link is always shown. */
export function showWidgets(node, shown) {
  let changed = false;
  for (const [name, wanted] of Object.entries(shown)) {
    const widget = widgetOf(node, name);
    if (!widget) continue;
    const linked = node.inputs?.some((input) => input.widget?.name === name && input.link != null);
    const hidden = !wanted && !linked;
    if (Boolean(widget.options.hidden) === hidden) continue;
    widget.hidden = hidden; // the canvas reads this one, Nodes 2.0 the other
    widget.options.hidden = hidden;
    changed = true;
  }
  if (!changed) return;
  node.widgets.splice(0, node.widgets.length, ...node.widgets); // so that Nodes 2.0 looks again
  node.setDirtyCanvas?.(true, true);
}

/** Calls `then` after a method of the node, such as onConnectionsChange. */
export function after(node, method, then) {
  const before = node[method];
  node[method] = function (...args) {
    const result = before?.apply(this, args);
    then(...args);
    return result;
  };
}

/** Calls `then` after a widget's own callback. */
export function onChange(widget, then) {
  if (widget) after(widget, "callback", then);
}

/** The node that an input comes from, past reroutes. */
export function sourceOf(node, input) {
  if (!node.graph) return undefined; // removed, or not yet there
  let source = node.getInputNode?.(node.findInputSlot(input));
  while (source?.type === "Reroute") source = source.getInputNode(0);
  return source ?? undefined;
}

/** What a loader is set to; `reference`, where it is filled in, decides. */
export const choiceOf = (loader) => ({
  dictionary: widgetOf(loader, "dictionary")?.value ?? "",
  reference: widgetOf(loader, "reference")?.value ?? "",
});

/** The loaders behind a node's dictionary input: adapters first, the dictionary itself last. */
export function loadersOf(node) {
  const loaders = [];
  let source = sourceOf(node, "dictionary");
  while (source?.comfyClass === LOADER && !loaders.includes(source)) {
    loaders.push(source);
    source = sourceOf(source, "base");
  }
  return loaders;
}

export async function fetchCard(choice) {
  const answer = await api.fetchApi(`/safedig/card?${new URLSearchParams(choice)}`);
  return answer.json();
}

/** Calls `show` with the answer to the newest question only: an answer that comes late never wins. */
export function newest(ask, show) {
  let asked = 0;
  return async () => {
    const mine = ++asked;
    const answer = await ask();
    if (mine === asked) show(answer);
  };
}

const following = new Map(); // by node

/** Calls `then` whenever a loader is set or connected anew, for as long as the node is in the graph. */
export function followLoaders(node, then) {
  following.set(node, then);
  after(node, "onRemoved", () => following.delete(node));
  after(node, "onConnectionsChange", then);
}

export function loadersChanged() {
  for (const [node, then] of [...following]) if (node.graph) then(); // a cleared graph doesn't tell its nodes
}
