"""What benchmark.py makes of its results: tables as text and Markdown, and a picture of `sweep`."""

import math
from collections.abc import Callable, Iterable
from itertools import product


def cell(value) -> str:
    if isinstance(value, list):
        return "..".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def table(rows: Iterable[dict]) -> str:
    """A column a key, aligned; the words of a key stand above each other."""
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    words = [key.split("_") for key in keys]
    height = max(map(len, words), default=0)
    columns = []
    for key, head in zip(keys, words):
        column = [""] * (height - len(head)) + head + [cell(row.get(key)) for row in rows]
        left = any(isinstance(row.get(key), str) for row in rows)
        width = max(map(len, column))
        columns.append([text.ljust(width) if left else text.rjust(width) for text in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def weights_tables(rows: list[dict]) -> str:
    """`weights`' rows in Markdown: a table of each random model's sizes and speeds and each checkpoint's quality."""

    def values(key: str) -> list:
        return list(dict.fromkeys(row[key] for row in rows if key in row))

    out, names = [], values("precision")
    for model, checkpoint in product(values("model") or [None], values("checkpoint") or [None]) if rows else ():
        heads, lines = {"weights": "weights"}, {name: {"weights": name} for name in names}
        for row in sorted(rows, key=lambda row: "checkpoint" in row):
            if (row.get("model", model), row.get("checkpoint", checkpoint)) == (model, checkpoint):
                lines[row["precision"]] |= (cells := weights_cells(row))
                heads |= dict(zip(cells, cells))
        titles = (model and f"{model}: sizes and tokens/s", checkpoint and f"{checkpoint}: quality")
        out += ["; ".join(filter(None, titles)), ""]
        for line in (heads, dict.fromkeys(heads, "---"), *lines.values()):
            out.append(f"| {' | '.join(line.get(head, '') for head in heads)} |")
        out.append("")
    return "\n".join(out)


def weights_cells(row: dict) -> dict[str, str]:
    if "model" in row:
        rate = f"{row['decode_tokens_per_second']:,.0f}"
        if row["batch"] > 1:
            return {f"batch {row['batch']}": rate}
        sizes = {"disk, GiB": f"{row['disk_gib']:.2f}", "GPU, GiB": f"{row['gpu_gib']:.2f}"}
        return sizes | {"batch 1": f"{rate} ({100 * row['share_of_copy_bandwidth']:.0f} %)"}
    cells = {"MB": f"{row['disk_mb']:.1f}", "perplexity": f"{row['perplexity']:.3f}"}
    if "kl" in row:
        cells["perplexity"] += f" ({row['change_percent']:+.2f} %)"
        cells |= {"KL": f"{row['kl']:.4f}", "same top token": f"{100 * row['top1_agreement']:.1f} %"}
    return cells


COLORS = ("#1f5fa8", "#c2501b", "#2e7d4f", "#7a4fa0", "#8a6d1a", "#a8325e")


def sweep_picture(rows: list[dict], title: str) -> str:
    """SVG of `sweep`'s rows: tokens/s, dashed at the floor, and share of the copy bandwidth, both over the batch."""
    series = {}
    for row in rows:
        series.setdefault(f"{row['model']} {row['precision']}", []).append(row)
    batches = sorted({row["batch"] for row in rows})
    title += ", {context} prompt tokens, {new_tokens} new".format(**rows[0])
    rates, floors, shares = [], [], []
    for color, values in zip(COLORS, series.values()):
        rates.append((color, "", [(row["batch"], row["decode_tokens_per_second"]) for row in values]))
        floors.append((color, "5 4", [(row["batch"], 1e3 * row["batch"] / row["floor_ms"]) for row in values]))
        shares.append((color, "", [(row["batch"], 100 * row["share_of_copy_bandwidth"]) for row in values]))
    points = [y for _, _, line in rates + floors for _, y in line]
    powers = range(math.floor(math.log10(min(points))), math.ceil(math.log10(max(points))) + 1)
    legend = [
        f'<path d="M{70 + 190 * i} 46h24" stroke="{color}" stroke-width="2.5"/>'
        f'<text x="{100 + 190 * i}" y="50">{label}</text>'
        for i, (color, label) in enumerate(zip(COLORS, series))
    ]
    return "\n".join((
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 430" font-family="sans-serif" font-size="13">',
        '<rect width="960" height="430" fill="#fff"/>',
        f'<text x="70" y="26" font-size="15">{title}</text>',
        *legend,
        *panel(70, "tokens/s while decoding; dashed: at the copy bandwidth", batches, rates + floors,
               [10**power for power in powers], math.log10),
        *panel(550, "share of the copy bandwidth, %", batches, shares, range(0, 101, 20), float),
        "</svg>\n",
    ))  # fmt: skip


def panel(left: int, title: str, batches: list[int], lines: list, ticks: Iterable[int], scale: Callable) -> list[str]:
    """Lines (color, dashes, [(batch, y)]) over the logarithm of the batch; `scale` of y is linear on the paper."""
    ticks, top, bottom, width = list(ticks), 90, 375, 370
    low, high, octaves = scale(ticks[0]), scale(ticks[-1]), math.log2(batches[-1] / batches[0]) or 1

    def x(batch: int) -> str:
        return f"{left + width * math.log2(batch / batches[0]) / octaves:.1f}"

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (scale(value) - low) / (high - low), 1)

    parts = [f'<text x="{left}" y="76">{title}</text>']
    for tick in ticks:
        parts.append(f'<path d="M{left} {y(tick)}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4}" text-anchor="end">{tick:,}</text>')
    for batch in batches:
        parts.append(f'<text x="{x(batch)}" y="{bottom + 20}" text-anchor="middle">{batch}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{bottom + 42}" text-anchor="middle">batch</text>')
    for color, dashes, values in lines:
        points = " ".join(f"{x(batch)},{y(value)}" for batch, value in values)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        )
        if not dashes:
            parts += [f'<circle cx="{x(batch)}" cy="{y(value)}" r="3.5" fill="{color}"/>' for batch, value in values]
    return parts
