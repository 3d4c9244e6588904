// Elements, and the one kind of widget that SafeDIG's nodes have: a view, sized to what it holds.

import { app } from "../../scripts/app.js";

/** An element; text is always text, never markup: cards and receipts hold other people's words. */
export function element(tag, className = "", text = undefined, attributes = {}) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export function svg(tag, attributes = {}, text = undefined) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** What a button does, by click, Enter and Space. */
export function button(text, act) {
  const made = element("button", "act", text, { type: "button" });
  made.onclick = act;
  return made;
}

/**
 * A view as a widget of a node, on the classic canvas and in Nodes 2.0; it is not saved with a workflow.
 * The node grows where what the view holds doesn't fit. `height` is what it takes before it was ever seen.
 */
export function addView(node, name, height) {
  const frame = element("div", "safedig");
  const view = frame.appendChild(element("div", "safedig-view"));
  const widget = node.addDOMWidget(name, "safedig", frame, {
    serialize: false,
    hideOnZoom: false, // else it is a blank box in a workflow that is seen whole
    getMinHeight: () => height + 20, // with the margins that the canvas leaves around it
  });
  widget.serialize = false;
  const resized = new ResizeObserver(() => {
    if (!view.offsetHeight) return; // out of sight
    height = view.offsetHeight;
    grow(node);
  });
  resized.observe(view);
  setTimeout(() => takePlace(`${node.id} ${name}`, frame)); // when the node has its number
  return view;
}

const frames = new Map(); // by node and widget

/** Nodes 2.0 keeps showing the view of a node that undo or another tab has replaced by one of the same number. */
function takePlace(key, frame) {
  const earlier = frames.get(key);
  if (earlier?.isConnected && !frame.isConnected) earlier.replaceWith(frame);
  frames.set(key, frame);
}

function grow(node) {
  if (globalThis.LiteGraph?.vueNodesMode || node.flags?.collapsed || !node.graph) return; // Nodes 2.0 does it itself
  const [width, height] = node.computeSize();
  if (height > node.size[1] + 1) node.setSize([Math.max(width, node.size[0]), height]);
  node.setDirtyCanvas?.(true, true);
}
