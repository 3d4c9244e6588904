// What the views say, in the language that ComfyUI is set to: locales/<language>/main.json, under "safedig".

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let languages = {};

/** Reads the words of all languages, once, before anything is shown. */
export async function loadWords() {
  languages = await (await api.fetchApi("/i18n")).json();
}

function wordsOf(language, key) {
  return key.split(".").reduce((words, name) => words?.[name], languages[language]?.safedig);
}

/** The text of a key such as "map.none", with {names} filled in; English where a language lacks it. */
export function say(key, values = {}) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  const text = wordsOf(language, key) ?? wordsOf("en", key);
  return text?.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}
