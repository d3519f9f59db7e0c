"""The frame of a page that needs no network and no script, and what its sections are written with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from dylo_moe.report.charts import STYLE
from dylo_moe.report.run_record import finite

REPORT = "report.html"
"""The page of a folder."""

PAGE_STYLE = (
    """
:root{color-scheme:light dark;--surface:#fff;--page:#f4f6f7;--ink:#1b2126;--faint:#5d6870;--good:#00725c;--bad:#b34700;
--link:#0b5fa5}
@media(prefers-color-scheme:dark){:root{--surface:#191e22;--page:#101417;--ink:#e8ecee;--faint:#9aa5ad;--good:#43cfa6;
--bad:#ff9a5c;--link:#6cb8f2}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.6rem;line-height:1.25;margin:.4em 0;overflow-wrap:anywhere} h2{font-size:1.15rem;margin:0 0 .6em}
section{background:var(--surface);border-radius:12px;padding:18px;margin:14px 0}
p{margin:.4em 0;max-width:75ch} .caption,.none,.note{color:var(--faint);font-size:.87rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px;margin:0 0 14px}
.tiles div{background:var(--page);border-radius:8px;padding:8px 12px} .tiles b{display:block;font-size:1.15rem;
overflow-wrap:anywhere;line-height:1.3} .tiles span{color:var(--faint);font-size:.8rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:20px}
figure{margin:0;max-width:600px;min-width:0} figcaption{font-weight:600;font-size:.95rem;margin-bottom:4px;
overflow-wrap:anywhere} svg{display:block;width:100%;height:auto;font-family:inherit}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:0 0 4px;padding:0;font-size:.85rem}
.legend li{overflow-wrap:anywhere} .legend i{display:inline-block;width:16px;border-top:3px var(--border) var(--c);
margin-right:5px;vertical-align:middle} .legend .point,.key{display:inline-block;width:9px;height:9px;border:0;
border-radius:50%;background:var(--c);margin-right:6px} .key{border-radius:2px}
.wide{overflow-x:auto} table{border-collapse:collapse;font-size:.9rem} th,td{padding:4px 12px 4px 0;text-align:left;
vertical-align:top;border-bottom:1px solid var(--grid)} th{color:var(--faint);font-weight:500}
td{min-width:3.5em;max-width:22em;overflow-wrap:break-word}
td.long{overflow-wrap:anywhere;min-width:10em;max-width:60em}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.who{white-space:nowrap} td.share{background:color-mix(in srgb,var(--heat) var(--p),transparent);padding-left:12px}
.good{color:var(--good)} .bad{color:var(--bad)} .alarm{border-left:4px solid var(--bad);padding-left:10px}
.sample{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.75 ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",
monospace;background:var(--page);border-radius:8px;padding:10px 12px;margin:.3em 0 1em}
.sample span{padding-bottom:3px;border-bottom:2px var(--border) var(--c);
background:color-mix(in srgb,var(--c) 20%,transparent)}
.sample .prompt{opacity:.55} .sample .base{border-bottom:2px solid transparent}
.scale{display:inline-block;width:90px;height:10px;border-radius:3px;vertical-align:middle;
background:linear-gradient(90deg,var(--grid),var(--heat))}
td.tint{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding:4px 10px;
border:2px solid var(--surface);background:color-mix(in srgb,var(--tone) var(--p),transparent)}
.better{--tone:var(--c0)} .worse{--tone:var(--c1)} td.learned{outline:2px solid var(--ink);outline-offset:-3px}
td.blank{color:var(--faint);
font-size:.78rem;line-height:1.15;text-align:right} td.tint,td.blank{min-width:5.6em;max-width:6em} a{color:var(--link)}
td.stage{white-space:nowrap;max-width:none;position:sticky;left:0;background:var(--surface)}
@media(max-width:600px){td.stage{white-space:normal;max-width:9em;overflow-wrap:anywhere;min-width:7em}}
.two{display:inline-block;width:150px;height:12px;border-radius:3px;vertical-align:middle;background:linear-gradient(90deg,
color-mix(in srgb,var(--c0) 50%,transparent),transparent,color-mix(in srgb,var(--c1) 50%,transparent))}
pre{overflow:auto;max-height:420px;background:var(--page);border-radius:8px;padding:10px;font-size:12px}
summary{cursor:pointer;font-weight:600}
"""
    + STYLE
)


def html_page(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page. Its policy forbids scripts and requests, whatever its texts hold.

    Args:
        title: plain text.
        sections: (id, title, HTML) of each.
    """
    parts = [f"<section id='{identity}'><h2>{name}</h2>{body}</section>" for identity, name, body in sections]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "img-src data:\"><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><title>{escape(title)}</title><style>{PAGE_STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{''.join(parts)}</main></body></html>\n"
    )


def side_by_side(figures: Sequence[str], note: str = "") -> str:
    """Charts in a grid, below a note (HTML)."""
    return (f"<p class='note'>{note}</p>" if note else "") + f"<div class='charts'>{''.join(figures)}</div>"


def table(titles: Sequence[str], rows: Sequence[str], right: set[int]) -> str:
    """Rows of cells (HTML) below their titles; `right`: the columns of numbers."""
    head = "".join(
        f"<th{' class=n' if index in right else ''}>{escape(title)}</th>" for index, title in enumerate(titles)
    )
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>"


def cell(text: str, kind: str = "") -> str:
    """A cell of plain text, with its CSS classes."""
    return f"<td{f' class={kind!r}' if kind else ''}>{escape(text)}</td>"


def tinted(value: float, scale: float, text: str, *, told: str, kind: str = "") -> str:
    """A cell with a ground: bluer the further `value` is below 0 (better, for a loss), more orange above.

    Args:
        scale: the size of `value` that has the full tint.
        told: what its hover title says.
    """
    tone = "better" if value < 0 else "worse"
    part = round(50 * min(abs(value) / scale, 1)) if math.isfinite(value) else 50
    kinds = " ".join(filter(None, ("tint", tone, kind)))
    return f"<td class='{kinds}' style='--p:{part}%' title='{escape(told)}'>{escape(text)}</td>"


def tint_legend(scale: float, unit: str) -> str:
    """What the grounds of `tinted` mean."""
    return f"better, -{scale:.3g} <span class='two'></span> +{scale:.3g} {escape(unit)}, worse"


def count(value: Any) -> str:
    """A number in full."""
    known = finite(value)
    return "not known" if known is None else f"{known:,.0f}"


def percent(value: Any) -> str:
    """A part of 1."""
    known = finite(value)
    return "" if known is None else f"{known:.1%}"


def in_short(value: Any) -> str:
    """A large number in three digits and a letter."""
    known = finite(value)
    if known is None:
        return "not known"
    size, letter = next((pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(known) >= pair[0]), (1.0, ""))
    return f"{known:,.0f}" if size == 1 else f"{known / size:.3g} {letter}"
