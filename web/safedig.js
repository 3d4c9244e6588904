// SafeDIG's views: each node that shows more than its widgets, by its id. DOM widgets only, which work on the
// classic canvas and in Nodes 2.0.

import { app } from "../../scripts/app.js";
import { showApply } from "./apply.js";
import { showCard } from "./card.js";
import { element } from "./dom.js";
import { showMap } from "./map.js";
import { showReceipt } from "./receipt.js";
import { showReport } from "./report.js";
import { loadWords } from "./words.js";

const VIEWS = {
  SafeDIGLoadDictionary: showCard,
  SafeDIGSelectPositions: showMap,
  SafeDIGApplySteering: showApply,
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
  async init() {
    document.head.append(element("link", "", undefined, { rel: "stylesheet", href: new URL("safedig.css", import.meta.url) }));
    await loadWords();
  },
  nodeCreated(node) {
    VIEWS[node.comfyClass]?.(node);
  },
});
