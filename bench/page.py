"""The report as HTML: plots inside, tables below them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.report import Material

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; margin: 0.6rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.miss { color: #b34700; font-weight: 600; } figure { margin: 0.6rem 0; }
figure svg { width: 100%; height: auto; } figcaption, .note { color: #555; font-size: 13px; }
.scroll { overflow-x: auto; }
"""


Drawn = Sequence[tuple[str, str, bytes]]


def page(materials: Sequence[Material], drawn: Sequence[Drawn]) -> str:
    """The page; `drawn` holds (heading, caption, SVG) of every machine's figures."""
    parts = ["<h1>qlora_kernels: measurements</h1>", machines_html(materials)]
    for material, figures in zip(materials, drawn, strict=True):
        if len(materials) > 1:
            parts.append(f"<h1>{html.escape(material.machine)}</h1>")
        parts += machine_parts(material, figures)
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>qlora_kernels: measurements</title><style>{STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def machine_parts(material: Material, drawn: Drawn) -> list[str]:
    """What one machine has measured."""
    parts = [stages_html(material), refused_html(material)]
    for heading, caption, svg in drawn:
        if heading:
            parts.append(f"<h2>{html.escape(heading)}</h2>")
        image = svg.decode("utf-8")
        image = image[image.index("<svg") :]
        described = html.escape(heading or caption, quote=True)
        image = image.replace("<svg", f'<svg role="img" aria-label="{described}"', 1)
        note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        parts.append(f"<figure>{image}{note}</figure>")
    return [*parts, rows_html(material), points_html(material), missing_html(material)]


def table_html(head: Sequence[str], rows: Sequence[Sequence[object]], numbers: int = 1) -> str:
    """A table whose columns from `numbers` on hold numbers."""
    if not rows:
        return ""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = []
    for row in rows:
        cells = []
        for i, value in enumerate(row):
            kind = ' class="n"' if i >= numbers else ""
            if value == "MISS":
                kind = ' class="miss"'
            cells.append(f"<td{kind}>{html.escape(str(value))}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def machines_html(materials: Sequence[Material]) -> str:
    """What it was measured on."""
    rows = []
    for name, machine in (pair for m in materials for pair in m.machines.items()):
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
        gpu = machine.get("gpu") or {}
        where = f"{machine['cores']} cores, {machine['isa']}, {machine['threads']} threads"
        if gpu:
            where = f"{gpu['sm_count']} SMs, CUDA {gpu['cuda']}, driver: {gpu.get('driver', '-')}"
        rows.append((name, where, versions, machine["date"][:10]))
    return table_html(("machine", "of which", "software", "date"), rows, numbers=9)


def stages_html(material: Material) -> str:
    """How the stages of a GPU run ended."""
    rows = [
        (name, stage["status"], f"{stage['seconds']:.0f} s", (stage["error"] or "")[-160:])
        for name, stage in material.stages.items()
    ]
    table = table_html(("stage", "ended", "took", "error"), rows, numbers=9)
    return f"<h2>Stages</h2>{table}" if rows else ""


def refused_html(material: Material) -> str:
    """What was wrong."""
    rows = [(point["key"], point["reason"]) for point in material.refused]
    table = table_html(("point", "what is wrong"), rows, numbers=9)
    return f"<h2>Wrong results, not timed</h2>{table}" if rows else ""


def rows_html(material: Material) -> str:
    """The table of targets."""
    rows = []
    for row in material.rows:
        verdict = {True: "pass", False: "MISS", None: ""}[row["passed"]]
        target = f"at most {row['at_most']:g}x" if row["at_most"] else ""
        if row["times_faster"]:
            target = f"{row['times_faster']:g}x faster"
        if "ours_ms" in row:
            ours, theirs = (f"{row[k]['median']:.4g} ms" for k in ("ours_ms", "peer_ms"))
        else:
            ours, theirs = (f"{row[k] / 2**20:,.2f} MiB" for k in ("ours_bytes", "peer_bytes"))
        cells = (row["work"], row["peer"], ours, theirs, f"{row['ratio']:.3f}", target, verdict)
        rows.append(cells)
    head = ("work", "peer", "ours", "peer's", "ours / peer's", "target", "")
    table = table_html(head, rows, numbers=2)
    return f"<h2>Targets</h2>{table}" if rows else ""


def points_html(material: Material) -> str:
    """The grid in numbers."""
    rows = []
    for point in material.points:
        ours = point["ours_ms"]
        timed = {n: p for n, p in point["peers_ms"].items() if "missing" not in p}
        best = min(timed.items(), key=lambda item: item[1]["median"], default=None)
        beside = (
            f"{best[0]}: {best[1]['median']:.4g} ms ({best[1]['speedup']:.2f}x)" if best else ""
        )
        rows.append(
            (
                point["key"],
                f"{ours['median']:.4g}",
                f"{ours['spread'] * 50:.0f} %",
                f"{point['floor_ms']:.4g}",
                f"{100 * point['share']:.0f} %",
                beside,
                verdict_of(point),
            )
        )
    head = (
        "point",
        "ms",
        "±",
        "floor ms",
        "of ceiling",
        "fastest peer (ours is … faster)",
        "target",
    )
    table = table_html(head, rows)
    return f"<h2>All points</h2>{table}" if rows else ""


def verdict_of(point: Mapping[str, Any]) -> str:
    """Whether a point of the targets' table reaches what it must."""
    reached = (point.get("target") or {}).get("reached")
    return {True: "pass", False: "MISS", None: ""}[reached]


def missing_html(material: Material) -> str:
    """Peers and points that were not measured, with the reason."""
    reasons: dict[str, int] = {}
    for point in material.points:
        for name, peer in point["peers_ms"].items():
            if "missing" in peer:
                text = f"peer {name}: {peer['missing']}"
                reasons[text] = reasons.get(text, 0) + 1
    for point in material.skipped:
        text = f"{point['backend']}: {point['reason']}"
        reasons[text] = reasons.get(text, 0) + 1
    table = table_html(("not measured", "points"), list(reasons.items()))
    return f"<h2>Not measured</h2>{table}" if reasons else ""
