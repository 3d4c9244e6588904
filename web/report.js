// The nodes that make a dictionary: what each of them said when it had run.

import { addView, element } from "./dom.js";
import { after } from "./graph.js";

export function showReport(node) {
  const view = addView(node, "report_view", 24);
  after(node, "onExecuted", (output) => view.replaceChildren(element("pre", "", output.text[0])));
}
