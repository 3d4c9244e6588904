"""A report of full-size pictures that shows nothing unasked: blurred until a reader reveals them one by one.

Pictures on the disk are blurred. The page holds the sharp ones too, but scrambled: no program that shows or
indexes pictures can find them, and a click brings back one at a time. `unblurred` leaves all as they are.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

SHOWN = 384  # px a side, at most
COARSE = 8  # of a blurred picture, so many patches a side are left
KEY = 0x5A  # a scrambled byte is the byte xor KEY

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2430;max-width:1080px;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-size:13px} th,td{padding:.3rem .5rem;text-align:left;vertical-align:top}
img{max-width:100%;width:18rem} button{border:0;padding:0;background:none;cursor:pointer}
"""
_SCRIPT = """
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-sharp]");
  if (!button) return;
  const bytes = Uint8Array.from(atob(button.dataset.sharp), (c) => c.charCodeAt(0) ^ %d);
  const shown = button.firstElementChild, other = URL.createObjectURL(new Blob([bytes], {type: "image/png"}));
  [shown.src, button.dataset.other] = [button.dataset.other || other, shown.src];
});
"""


def blurred(images: Tensor) -> Tensor:
    """[B, 3, H, W] of the same size, of which nothing but a few smooth patches of colour is left."""
    size = images.shape[-2:]
    coarse = interpolate(images.float(), (COARSE, COARSE), mode="area")
    return interpolate(coarse, size, mode="bilinear", align_corners=False).clamp(0, 1)


def shrunk(images: Tensor) -> Tensor:
    """[B, 3, H, W], SHOWN px a side at most."""
    size = max(images.shape[-2:])
    if size <= SHOWN:
        return images
    return interpolate(images.float(), [round(n * SHOWN / size) for n in images.shape[-2:]], mode="area")


def png(image: Tensor) -> bytes:
    """A picture [3, H, W] in [0, 1]."""
    from PIL import Image  # only where something is drawn

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_report(
    out: Path,
    title: str,
    lead: str,
    tables: Sequence[str],
    columns: dict[str, Tensor],
    captions: Sequence[str],
    unblurred: bool,
) -> None:
    """report.html in `out`, and each column's pictures in `out`/pictures.

    Args:
        tables: HTML.
        columns: pictures [N, 3, H, W] by the name of what made them, in the order of `captions`.
        unblurred: pictures are written, and shown, as they are.
    """
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    for i, caption in enumerate(captions):
        cells = []
        for name, images in columns.items():
            sharp = png(images[i])
            shown = sharp if unblurred else png(blurred(images[i : i + 1])[0])
            (folder / f"{i:03}-{name}.png").write_bytes(shown)
            cells.append(f"<td>{_cell(shown, None if unblurred else sharp, f'{name}: {caption}')}</td>")
        rows.append(f"<tr><td>{html.escape(caption)}</td>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in ("prompt", *columns))
    note = "" if unblurred else "<p>Pictures are blurred: click one to see it, and again to hide it.</p>"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>",
        *tables,
        f"<h2>Pictures</h2>{note}<table><tr>{heads}</tr>",
        *rows,
        f"</table><script>{_SCRIPT % KEY}</script></html>\n",
    ]
    (out / "report.html").write_text("\n".join(parts), encoding="utf-8")


def _cell(shown: bytes, sharp: bytes | None, what: str) -> str:
    picture = f'<img alt="{html.escape(what)}" src="data:image/png;base64,{_base64(shown)}">'
    if sharp is None:
        return picture
    scrambled = torch.frombuffer(bytearray(sharp), dtype=torch.uint8).bitwise_xor(KEY).numpy().tobytes()
    return f'<button data-sharp="{_base64(scrambled)}">{picture}</button>'


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
