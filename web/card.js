// Load SafeDIG Dictionary: the chosen dictionary's card, and the list to choose from.

import { api } from "../../scripts/api.js";
import { addView, button, element } from "./dom.js";
import { after, change, choiceOf, fetchCard, LOADER, loadersChanged, newest, onChange, setWidgets, sourceOf, widgetOf } from "./graph.js";
import { say } from "./words.js";

const fetchList = async () => (await api.fetchApi("/safedig/list")).json();
const megabytes = (size) => (size == null ? "" : `${(size / 2 ** 20).toFixed(size < 10 * 2 ** 20 ? 2 : 0)} MB`);
const line = (...parts) => parts.filter(Boolean).join(", ");

export function showCard(node) {
  const view = addView(node, "card", 120);
  const add = (className, text) => text && view.append(element("div", className, text));

  const draw = (card) => {
    view.replaceChildren();
    const based = sourceOf(node, "base");
    if (based) add("faint", say("card.adapter"));
    else if (card.error) add("fault", card.error);
    if (!card.error) {
      add("title", card.title || choiceOf(node).dictionary);
      add("faint", line(say(`card.state.${card.state}`) ?? card.state, megabytes(card.size)));
      add("faint", card.model && say("card.model", { model: card.model }));
      add("", card.domains && say("card.risks", { risks: card.domains.join(", ") || say("card.none") }));
      if (card.base && !based) addMissingBase(card.base);
      const plan = card.plan?.map(([position, operator, strength]) => say("card.action", { operator, strength, position }));
      add("", plan && say("card.plan", { plan: plan.join("; ") || say("card.none") }));
      add("faint", card.measured);
      add("faint", line(card.creator, card.licence));
    }
    view.append(list());
  };

  const addMissingBase = (base) => {
    const notice = element("div", "notice", say("card.needs_base", { base }));
    notice.append(button(say("card.add_base"), () => addBase(node, base)));
    view.append(notice);
  };

  /** All dictionaries with size and state, to choose from. Asks only when it is opened. */
  const list = () => {
    const all = element("details");
    all.append(element("summary", "", say("card.all")));
    all.addEventListener("toggle", async () => {
      if (!all.open) return;
      const rows = (await fetchList()).map((entry) => {
        const row = element("div", "row");
        const choose = () => setWidgets(node, { dictionary: entry.name, ...withReference(entry.reference) });
        const state = say(`card.state.${entry.state}`) ?? entry.state;
        row.append(button(entry.name, choose), element("span", "faint", line(entry.title, state, megabytes(entry.size))));
        return row;
      });
      all.replaceChildren(all.firstChild, ...rows);
    });
    return all;
  };

  const withReference = (reference) => (widgetOf(node, "reference") ? { reference } : {});
  const show = newest(() => fetchCard(choiceOf(node)), draw);
  // A choice from the Hub fills in its reference, so that the workflow also runs where no index has it.
  const refer = newest(
    () => fetchCard({ dictionary: choiceOf(node).dictionary, reference: "" }),
    (card) => {
      const settled = !node.graph || choiceOf(node).reference; // gone, or given by hand meanwhile
      if (!settled && card.reference) setWidgets(node, withReference(card.reference));
    },
  );
  let choosing = false; // then the reference follows, and is no choice of its own
  onChange(widgetOf(node, "dictionary"), () => {
    choosing = true;
    setWidgets(node, withReference(""));
    choosing = false;
    refer();
    show();
    loadersChanged();
  });
  onChange(widgetOf(node, "reference"), () => {
    if (choosing) return;
    show();
    loadersChanged();
  });
  after(node, "onConnectionsChange", () => {
    show();
    loadersChanged();
  });
  setTimeout(() => {
    show();
    loadersChanged();
  }); // after a workflow has set the widgets
}

/** Puts a loader of the base before an adapter's. */
async function addBase(node, base) {
  const entry = (await fetchList()).find(({ name }) => name.replace(/ \((bundled|hub)\)$/, "") === base);
  change(() => {
    const loader = globalThis.LiteGraph.createNode(LOADER);
    loader.pos = [node.pos[0] - loader.size[0] - 60, node.pos[1]];
    node.graph.add(loader);
    setWidgets(loader, { dictionary: entry?.name ?? base });
    loader.connect(0, node, node.findInputSlot("base"));
  });
}
