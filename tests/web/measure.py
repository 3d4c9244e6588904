"""What a person sees, measured: contrast of text, and text that is cut."""

from __future__ import annotations

from typing import Any

# Of every text in a view: its contrast by WCAG 2 with the ground behind it, blended where it is transparent.
_CONTRASTS = """(view) => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, ground) => top.slice(0, 3).map((c, i) => c * top[3] + ground[i] * (1 - top[3]));
  const light = (colour) => colour.map((c) => c / 255)
    .map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(view, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.getClientRects().length || element.tagName === 'OPTION') continue;
    const style = getComputedStyle(element), behind = ground(element);
    const ink = rgba(element instanceof SVGElement ? style.fill : style.color);
    let opacity = 1;
    for (let at = element; at && at !== view; at = at.parentElement) opacity *= getComputedStyle(at).opacity;
    ink[3] *= opacity;
    const [a, b] = [light(over(ink, behind)), light(behind)].sort((x, y) => y - x);
    found.push([text, (a + .05) / (b + .05)]);
  }
  return found;
}"""

# Elements whose content reaches past what they show; the view itself where its node shows less than it has.
_CUT = """(view) => [view, ...view.querySelectorAll('*')].filter((element) => {
  if (!element.getClientRects().length || element instanceof SVGElement) return false;
  const style = getComputedStyle(element);
  if (['SELECT', 'INPUT'].includes(element.tagName) || style.overflow === 'visible') return false;
  return element.scrollHeight > element.clientHeight + 2 || element.scrollWidth > element.clientWidth + 2;
}).map((element) => `${element.className}: ${element.scrollWidth}x${element.scrollHeight} in `
  + `${element.clientWidth}x${element.clientHeight}`)"""


def contrasts(view: Any) -> list[tuple[str, float]]:
    found = view.evaluate(_CONTRASTS)
    assert found, "no text"
    return found


def cut(view: Any) -> list[str]:
    return view.evaluate(_CUT)
