"""The report as one page that opens in a browser, offline: tables that sort, and heat maps.

Everything is inside the file, and its content security policy forbids it to fetch anything.
"""

from __future__ import annotations

import json
from html import escape

import numpy as np
from numpy.typing import NDArray

from eplb_platform.offline.report import LayoutReport, Report

# Rank loads over time are put into the page layer by layer up to this many numbers, otherwise summed up.
_MAX_CELLS = 400_000


def page(report: Report, title: str) -> str:
    """The page as HTML. title: what was recorded, as text"""
    # "<" cannot end the script then, whatever a file name holds.
    data = json.dumps(_data(report), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        _PAGE.replace("@TITLE@", escape(title))
        .replace("@STYLE@", _STYLE)
        .replace("@DATA@", data)
        .replace("@SCRIPT@", _SCRIPT)
    )


def _data(report: Report) -> dict[str, object]:
    mean = report.expert_load.mean(axis=1, keepdims=True)
    relative = np.divide(report.expert_load, mean, out=np.zeros_like(report.expert_load), where=mean > 0)
    cells = sum(layout.rank_load.size for layout in report.layouts)
    return {
        "steps": report.num_steps,
        "idle": report.num_idle_steps,
        "first": report.first_iteration,
        "firstLayer": report.first_layer,
        "windows": report.num_windows,
        "experts": _rounded(relative),
        "drift": _rounded(report.drift, 4),
        "chance": _rounded(report.chance, 4),
        "hottest": [report.hottest_experts(layer, 3) for layer in range(len(report.expert_load))],
        "layouts": [_layout(layout, by_layer=cells <= _MAX_CELLS) for layout in report.layouts],
    }


def _layout(layout: LayoutReport, by_layer: bool) -> dict[str, object]:
    load = layout.rank_load.transpose(1, 2, 0)  # [layers, ranks, bins]
    mean = load.mean(axis=1, keepdims=True)
    relative = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    statistics = layout.overall
    return {
        "name": layout.name,
        "ranks": layout.expert_map.topology.num_ranks,
        "slots": layout.expert_map.slots_per_rank,
        "mean": _rounded(statistics.mean, 2),
        "std": _rounded(statistics.std, 2),
        "ratio": _rounded(statistics.imbalance_ratio, 4),
        "balancedness": _rounded(statistics.balancedness, 4),
        "phases": {
            name: {
                "steps": each.num_steps,
                "ratio": round(float(each.imbalance_ratio.mean()), 4),
                "balancedness": round(float(each.balancedness.mean()), 4),
            }
            for name, each in layout.by_phase.items()
        },
        "time": _rounded(relative.mean(axis=0)),
        "timeOfLayer": _rounded(relative) if by_layer else None,
    }


def _rounded(values: NDArray[np.float64], digits: int = 3) -> list[object]:
    """As lists; null where there is no number."""
    rounded = np.round(values, digits).astype(object)
    rounded[~np.isfinite(values)] = None
    return list(rounded.tolist())


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>@TITLE@</title>
<style>@STYLE@</style>
</head>
<body>
<h1>@TITLE@</h1>
<p id="summary"></p>
<h2>Layouts</h2>
<p>Balancedness is the mean rank's load over the hottest rank's, summed over the steps: 1 is perfect. The
imbalance ratio is (hottest - mean) / mean, averaged over the steps: 0 is perfect. Click a heading to
sort.</p>
<div id="layouts"></div>
<h2>Ranks over time</h2>
<p><label>Layer <select id="layer"></select></label> Load of each rank over the mean of the ranks. White is
the mean, blue is below it, orange above.</p>
<div id="time"></div>
<h2>Experts</h2>
<p>Load of each expert (across) in each layer (down), over the mean of the layer's experts.</p>
<div id="experts"></div>
<h2>Layers</h2>
<div id="layers"></div>
<h2>Experts by layer</h2>
<p>Drift is how far the shares of the experts change from one window of time to the next (0 to 1); chance is
what independent draws from shares that never change would show.</p>
<div id="drift"></div>
<script type="application/json" id="data">@DATA@</script>
<script>@SCRIPT@</script>
</body>
</html>
"""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em; overflow-wrap: anywhere } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15em .8em; text-align: right } th:first-child, td:first-child { text-align: left }
th { cursor: pointer; border-bottom: 2px solid #888; position: sticky; top: 0; background: #fff }
tbody tr:nth-child(even) { background: #f4f4f4 }
.scroll { max-height: 32em; overflow: auto } .maps { display: flex; flex-wrap: wrap; gap: 1.5em }
figure { margin: 0; flex: 1 1 24em; min-width: 0 } figcaption { font-weight: 600; overflow-wrap: anywhere }
canvas { width: 100%; height: 20em; image-rendering: pixelated; border: 1px solid #ccc }
.at { min-height: 1.5em; color: #555 }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const average = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== null) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}

// White at 1; the further from it, on a scale of doublings, the deeper: blue below, orange above.
function colour(value, widest) {
  const far = value > 0 ? Math.log2(value) / widest : -1;
  const depth = Math.min(Math.abs(far), 1);
  const end = far < 0 ? [0, 90, 160] : [200, 80, 0];
  return end.map((part) => Math.round(255 + (part - 255) * depth));
}

function heatMap(parent, caption, rows, describe, widest) {
  const figure = element("figure", null, parent);
  element("figcaption", caption, figure);
  const canvas = element("canvas", null, figure);
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  rows.forEach((row, y) => row.forEach((value, x) => {
    image.data.set([...colour(value, widest), 255], 4 * (y * canvas.width + x));
  }));
  context.putImageData(image, 0, 0);
  const at = element("div", "", figure);
  at.className = "at";
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const part = (place, start, size, count) =>
      Math.min(count - 1, Math.max(0, Math.floor((place - start) / size * count)));
    const x = part(event.clientX, box.left, box.width, canvas.width);
    const y = part(event.clientY, box.top, box.height, canvas.height);
    at.textContent = describe(x, y) + ": " + rows[y][x];
  });
}

function widestOf(maps) {
  let widest = 0.1;
  for (const rows of maps) for (const row of rows) for (const value of row) {
    if (value > 0) widest = Math.max(widest, Math.abs(Math.log2(value)));
  }
  return Math.min(widest, 3);
}

// A row is an array of numbers and texts; a click on a heading sorts by it, a second one the other way round.
function table(parent, headings, rows) {
  const scroll = element("div", null, parent);
  scroll.className = "scroll";
  const made = element("table", null, scroll);
  const head = element("tr", null, element("thead", null, made));
  const body = element("tbody", null, made);
  let sorted = -1, direction = 1;
  const fill = () => {
    body.replaceChildren();
    for (const row of rows) {
      const line = element("tr", null, body);
      for (const cell of row) element("td", cell === null ? "-" : String(cell), line);
    }
  };
  headings.forEach((heading, column) => {
    element("th", heading, head).addEventListener("click", () => {
      direction = sorted === column ? -direction : 1;
      sorted = column;
      rows.sort((a, b) => {
        const [first, second] = [a[column], b[column]];
        if (first === null || second === null) return (first === null) - (second === null);
        const order = typeof first === "number" && typeof second === "number"
          ? first - second : String(first).localeCompare(String(second));
        return direction * order;
      });
      fill();
    });
  });
  fill();
}

function showTime() {
  const chosen = byId("layer").value;
  const maps = data.layouts.map((layout) => chosen === "" ? layout.time : layout.timeOfLayer[Number(chosen)]);
  const parent = byId("time");
  parent.replaceChildren();
  parent.className = "maps";
  const widest = widestOf(maps);
  data.layouts.forEach((layout, i) => heatMap(parent, layout.name, maps[i], (x, y) => {
    const total = data.steps + data.idle, bins = maps[i][0].length;
    const from = data.first + Math.ceil(x * total / bins);
    return "rank " + y + ", from step " + from + ", load / mean";
  }, widest));
}

byId("summary").textContent = data.steps + " steps with tokens, " + data.idle + " without, from step " +
  data.first + "; " + data.experts.length + " layers of " + data.experts[0].length + " experts.";
const phases = [...new Set(data.layouts.flatMap((layout) => Object.keys(layout.phases)))];
table(byId("layouts"),
  ["layout", "ranks", "slots per rank", "imbalance ratio", "balancedness", "worst layer",
    ...phases.map((phase) => "balancedness, " + phase)],
  data.layouts.map((layout) => [layout.name, layout.ranks, layout.slots,
    Number(average(layout.ratio).toFixed(4)), Number(average(layout.balancedness).toFixed(4)),
    Math.min(...layout.balancedness),
    ...phases.map((phase) => phase in layout.phases ? layout.phases[phase].balancedness : null)]));
const select = byId("layer");
const option = (text, value) => { element("option", text, select).value = value; };
option("all, averaged", "");
if (data.layouts.every((layout) => layout.timeOfLayer !== null)) {
  data.experts.forEach((row, layer) => option(String(data.firstLayer + layer), String(layer)));
}
select.addEventListener("change", showTime);
showTime();
byId("experts").className = "maps";
heatMap(byId("experts"), "expert load / mean expert load", data.experts,
  (x, y) => "layer " + (data.firstLayer + y) + ", expert " + x, widestOf([data.experts]));
table(byId("layers"),
  ["layer", ...data.layouts.flatMap((layout) =>
    [layout.name + ": mean", "std", "imbalance ratio", "balancedness"])],
  data.experts.map((row, layer) => [data.firstLayer + layer, ...data.layouts.flatMap((layout) =>
    [layout.mean[layer], layout.std[layer], layout.ratio[layer], layout.balancedness[layer]])]));
table(byId("drift"), ["layer", "drift", "chance", "hottest experts (load / mean)"],
  data.experts.map((row, layer) => [data.firstLayer + layer, data.drift[layer], data.chance[layer],
    data.hottest[layer].map(([expert, load]) => expert + " (" + load.toFixed(2) + ")").join(", ")]));
"""
