// The views of SafeDIG's nodes: a dictionary's card, the map of positions, the receipt, reports.
// DOM widgets only, which work on the classic canvas and in Nodes 2.0; none is saved with a workflow.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const STYLE = `
.safedig { font: 12px/1.45 system-ui, sans-serif; color: var(--input-text, #ddd); overflow: auto; padding: 4px 6px; }
.safedig .title { font-weight: 600; }
.safedig .faint { opacity: .65; }
.safedig .fault { color: var(--error-text, #ff6b6b); }
.safedig .row { display: flex; flex-wrap: wrap; gap: 2px; margin: 2px 0 6px; }
.safedig button { all: unset; cursor: pointer; min-width: 16px; padding: 0 3px; border-radius: 3px; text-align: center;
  font-size: 10px; background: var(--comfy-input-bg, #333); border: 1px solid var(--border-color, #555); }
.safedig button:focus-visible { outline: 2px solid #6cf; }
.safedig button[disabled] { opacity: .25; cursor: default; }
.safedig button[aria-pressed=true] { background: #2f7d4f; border-color: #57c785; color: #fff; }
.safedig pre { margin: 4px 0 0; white-space: pre-wrap; font: 11px/1.4 ui-monospace, monospace; }
.safedig .verdict { display: inline-block; padding: 1px 8px; border-radius: 9px; background: #3a5a8c; color: #fff; }
.safedig .verdict.clear { background: #2f7d4f; }
.safedig .verdict.bad { background: #a33; }
`;

/** An element; text is always text, never markup: cards and receipts hold other people's words. */
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function addView(node, name, height) {
  const view = element("div", "safedig");
  const widget = node.addDOMWidget(name, "safedig", view, {
    serialize: false,
    getMinHeight: () => height,
  });
  widget.serialize = false;
  return view;
}

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** Calls `then` after a widget's own callback. */
function onChange(widget, then) {
  const before = widget.callback;
  widget.callback = function (...args) {
    const result = before?.apply(this, args);
    then();
    return result;
  };
}

/** Calls `then` when something is connected to the node, or no longer. */
function onConnections(node, then) {
  const before = node.onConnectionsChange;
  node.onConnectionsChange = function (...args) {
    before?.apply(this, args);
    then();
  };
}

/** What a loader is set to; `reference`, where it is filled in, decides. */
const sourceOf = (node) => ({
  dictionary: widgetOf(node, "dictionary")?.value ?? "",
  reference: widgetOf(node, "reference")?.value ?? "",
});

async function fetchCard(source) {
  const answer = await api.fetchApi(`/safedig/card?${new URLSearchParams(source)}`);
  return answer.json();
}

const megabytes = (size) => (size === null ? "" : `${(size / 2 ** 20).toFixed(size < 10 * 2 ** 20 ? 2 : 0)} MB`);

/** All dictionaries with size and state, to choose from. Asks only when it is opened. */
function addList(view, choose) {
  const list = element("details");
  list.append(element("summary", "faint", "all dictionaries"));
  list.addEventListener("toggle", async () => {
    if (!list.open) return;
    const lines = await (await api.fetchApi("/safedig/list")).json();
    list.replaceChildren(list.firstChild);
    for (const line of lines) {
      const about = [line.title, line.state, megabytes(line.size)].filter(Boolean).join(", ");
      const button = element("button", "", line.name);
      button.onclick = () => choose(line);
      const row = element("div", "row");
      row.append(button, element("span", "faint", about));
      list.append(row);
    }
  });
  view.append(list);
}

function showCard(node) {
  const view = addView(node, "card", 120);
  const choice = widgetOf(node, "dictionary");
  const reference = widgetOf(node, "reference");
  const add = (className, text) => text && view.append(element("div", className, text));

  // A choice from the Hub fills in its reference, so that the workflow also runs where no index has it.
  const choose = (line) => {
    choice.value = line.name;
    if (reference) reference.value = line.reference;
    draw();
  };

  const draw = async () => {
    const source = sourceOf(node);
    const card = await fetchCard(source);
    if (JSON.stringify(source) !== JSON.stringify(sourceOf(node))) return; // changed meanwhile
    view.replaceChildren();
    if (node.getInputNode(node.findInputSlot("base"))) {
      add("faint", "An adapter: adds a risk domain to its base.");
    } else if (card.error) {
      add("fault", card.error);
    }
    if (!card.error) {
      add("title", card.title || source.dictionary);
      add("faint", [card.state, megabytes(card.size)].filter(Boolean).join(", "));
      add("faint", card.model && `for a ${card.model}`);
      add("", card.domains && `risks: ${card.domains.join(", ") || "none"}`);
      add("", card.base && `adapter: connect ${card.base} to its base`);
      const plan = card.plan?.map(([position, operator, strength]) => `${operator} ${strength} at ${position}`);
      add("", plan && `plan: ${plan.join("; ") || "none"}`);
      add("faint", card.measured);
      add("faint", [card.creator, card.licence].filter(Boolean).join(", "));
    }
    addList(view, choose);
  };
  onChange(choice, async () => {
    if (reference) reference.value = "";
    const card = await fetchCard(sourceOf(node));
    if (reference && !card.error) reference.value = card.reference;
    draw();
  });
  if (reference) onChange(reference, draw);
  onConnections(node, draw);
  setTimeout(draw); // after a workflow has set the widget's value
}

/** The dictionary that a node's input comes from, through adapters to their base. */
function dictionaryOf(node) {
  let source = node.getInputNode?.(node.findInputSlot("dictionary"));
  while (source?.comfyClass === "SafeDIGLoadDictionary") {
    const base = source.getInputNode(source.findInputSlot("base"));
    if (!base) return sourceOf(source);
    source = base;
  }
  return undefined;
}

const PARTS = { text: "prompt", pooled: "prompt", double: "double-stream blocks", single: "single-stream blocks", joint: "joint blocks" };

function showMap(node) {
  const view = addView(node, "map", 140);
  const select = widgetOf(node, "select");
  const positions = widgetOf(node, "positions");
  let card;

  const chosen = () => {
    if (select.value === "by hand") return new Set(positions.value.split(/[\s,]+/).filter(Boolean));
    if (select.value === "routed") return new Set(card.plan.map(([position]) => position));
    const group = select.value.split(" ")[0];
    return new Set(Object.keys(card.positions).filter((name) => card.positions[name] === group));
  };

  const toggle = (name) => {
    const names = chosen();
    if (!names.delete(name)) names.add(name);
    select.value = "by hand";
    positions.value = card.all_positions.filter((p) => names.has(p)).join(", ");
    draw();
  };

  const draw = () => {
    view.replaceChildren();
    if (!card) {
      view.append(element("div", "faint", "Connect a dictionary to see its positions."));
      return;
    }
    if (card.error) {
      view.append(element("div", "fault", card.error));
      return;
    }
    if (!card.all_positions) {
      view.append(element("div", "faint", "Its positions show once it is downloaded: run the workflow."));
      return;
    }
    const on = chosen();
    const rows = new Map();
    for (const name of card.all_positions) {
      const [part, index, stream] = name.split(".");
      const key = stream ? `${PARTS[part]}, ${stream === "img" ? "picture" : "prompt"}` : PARTS[part];
      if (!rows.has(key)) rows.set(key, []);
      rows.get(key).push([name, index ?? name]);
    }
    for (const [key, cells] of rows) {
      if (!cells.some(([name]) => name in card.positions)) continue;
      view.append(element("div", "faint", key));
      const row = element("div", "row");
      for (const [name, label] of cells) {
        const cell = element("button", "", label);
        cell.title = name;
        cell.disabled = !(name in card.positions);
        cell.setAttribute("aria-pressed", String(on.has(name)));
        cell.onclick = () => toggle(name);
        row.append(cell);
      }
      view.append(row);
    }
  };

  const load = async () => {
    const source = dictionaryOf(node);
    card = source && (await fetchCard(source));
    draw();
  };
  onChange(select, draw);
  onChange(positions, draw);
  onConnections(node, load);
  view.addEventListener("pointerenter", load); // the loader may hold another one by now
  setTimeout(load);
}

function showReceipt(node) {
  const view = addView(node, "receipt_view", 150);
  view.append(element("div", "faint", "Nothing sampled yet."));
  const executed = node.onExecuted;
  node.onExecuted = function (output, ...rest) {
    executed?.call(this, output, ...rest);
    const report = JSON.parse(output.safedig_receipt[0]);
    const kind = report.as_planned ? (report.verdict === "clear" ? "clear" : "") : "bad";
    view.replaceChildren(element("span", `verdict ${kind}`, report.verdict));
    view.append(element("pre", "", output.text[0].split("\n").slice(1).join("\n").trim()));
  };
}

/** What a node of the offline chain said when it had run. */
function showReport(node) {
  const view = addView(node, "report_view", 44);
  const executed = node.onExecuted;
  node.onExecuted = function (output, ...rest) {
    executed?.call(this, output, ...rest);
    view.replaceChildren(element("pre", "", output.text[0]));
  };
}

const VIEWS = {
  SafeDIGLoadDictionary: showCard,
  SafeDIGSelectPositions: showMap,
  SafeDIGSteeringReceipt: showReceipt,
  SafeDIGLoadPromptPairs: showReport,
  SafeDIGCaptureActivations: showReport,
  SafeDIGRoutePositions: showReport,
  SafeDIGTrainDictionary: showReport,
  SafeDIGAdaptDecoder: showReport,
  SafeDIGSaveDictionary: showReport,
};

app.registerExtension({
  name: "safedig.views",
  setup() {
    document.head.append(element("style", "", STYLE));
  },
  nodeCreated(node) {
    VIEWS[node.comfyClass]?.(node);
  },
});
