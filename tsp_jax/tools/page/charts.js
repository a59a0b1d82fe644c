// Charts as SVG, drawn as wide as the page is and again when that changes.

const KINDS = ["state", "residual", "transient"];
const charts = [];

/** A figure whose picture is drawn by `draw(width)`; `text` describes it to who cannot see it. */
function chart(text, draw, ...children) {
  const place = el("div", { role: "img", "aria-label": text });
  let width = 0;
  const redraw = () => {
    const now = place.clientWidth;
    if (now && now !== width) place.replaceChildren(draw((width = now)));
  };
  charts.push(redraw);
  return el("figure", {}, el("figcaption", {}, text), place, ...children);
}

function legend(entries) {
  const items = entries.map(([name, color]) => {
    const swatch = el("i", { "aria-hidden": "true" });
    swatch.style.background = `var(--${color})`;
    return el("li", {}, swatch, name);
  });
  return el("ul", { class: "legend" }, ...items);
}

/** Round values from 0 to `most`, about `wanted` of them. */
function ticks(most, wanted) {
  if (!(most > 0)) return [0];
  const rough = most / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((n) => n * power >= rough) * power;
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, n) => n * step);
}
const short = (value) => String(Number(value.toPrecision(3)));
const label = (x, y, text, anchor = "start", style = "") => svg("text", { x, y, "text-anchor": anchor, class: style }, text);

/** Frame of a chart with axes from 0: {node, x, y}, the two functions from values to places. */
function frame(width, height, [mostX, unitX], [mostY, unitY], left = 48) {
  const [right, top, bottom] = [14, 20, 36];
  const x = (value) => left + (value / (mostX || 1)) * (width - left - right);
  const y = (value) => height - bottom - (value / (mostY || 1)) * (height - top - bottom);
  const node = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const value of ticks(mostX, width < 500 ? 4 : 8)) {
    node.append(svg("path", { class: "axis", d: `M${x(value)} ${y(0)}v4` }), label(x(value), y(0) + 17, short(value), "middle"));
  }
  for (const value of mostY ? ticks(mostY, 5) : []) {
    node.append(svg("path", { class: "axis", d: `M${left} ${y(value)}H${width - right}` }), label(left - 6, y(value) + 4, short(value), "end"));
  }
  if (!mostY) node.append(svg("path", { class: "axis", d: `M${left} ${y(0)}H${width - right}` }));
  node.append(label(4, 12, unitY), label(width - right, height - 4, unitX, "end"));
  return { node, x, y };
}

// ---- memory over the schedule

function memoryCurve() {
  const { points, scopes, loops, moments } = DATA.memory.curve;
  const total = (point) => point[1] + point[2] + point[3];
  const most = Math.max(...points.map(total)), limit = DATA.device?.memory_bytes;
  const fits = limit && limit < 1.6 * most;
  const peak = points.findIndex((point) => total(point) === most);
  const range = el("input", { type: "range", min: 0, max: points.length - 1, value: peak, "aria-label": "Moment of the schedule" });
  const output = el("output");
  let cursor, frameX;

  function draw(width) {
    const { node, x, y } = frame(width, 280, [moments, "instruction of the schedule"], [(fits ? 1.05 * limit : 1.08 * most) / 1e9, "GB"]);
    const height = (value) => y(value / 1e9);
    for (const [first, last] of loops) node.append(svg("rect", { class: "loop", x: x(first), y: 20, width: x(last) - x(first), height: y(0) - 20 }));
    let base = points.map(() => 0);
    KINDS.forEach((kind, k) => {
      const top = base.map((value, n) => value + points[n][k + 1]);
      const begins = points.map((point, n) => (n ? point[0] : 0));
      const ends = points.map((_, n) => x(n + 1 < points.length ? points[n + 1][0] : moments + 1));
      const over = points.map((_, n) => `${n ? "L" : "M"}${x(begins[n])} ${height(top[n])}H${Math.min(ends[n], x(moments))}`).join("");
      const under = points.map((_, n) => `L${Math.min(ends[n], x(moments))} ${height(base[n])}H${x(begins[n])}`).reverse().join("");
      node.append(svg("path", { class: kind, d: `${over}${under}Z` }));
      base = top;
    });
    if (fits) {
      node.append(svg("path", { class: "limit", d: `M${x(0)} ${height(limit)}H${x(moments)}` }));
      node.append(label(x(0) + 6, height(limit) - 5, "the device's memory", "start", "strong"));
    }
    cursor = svg("path", { class: "cursor" });
    frameX = x;
    node.append(cursor);
    node.addEventListener("pointermove", (event) => {
      const place = event.clientX - node.getBoundingClientRect().left;
      const near = (n) => Math.abs(x(points[n][0]) - place);
      range.value = points.reduce((best, _, n) => (near(n) < near(best) ? n : best), 0);
      tell();
    });
    tell();
    return node;
  }
  function tell() {
    const n = Number(range.value), point = points[n];
    cursor.setAttribute("d", `M${frameX(point[0])} 20V244`);
    const kinds = KINDS.map((kind, k) => `${kind} ${bytes(point[k + 1])}`).join(", ");
    const place = `${n === peak ? "Peak, " : ""}instruction ${count(point[0])} of ${count(moments)} (${scopes[n]})`;
    output.textContent = `${place}: ${bytes(total(point))}; ${kinds}`;
  }
  range.addEventListener("input", tell);
  const text = "Bytes alive over the schedule. Grey: outermost loops, whose bodies stand in the schedule once.";
  return chart(text, draw, legend(KINDS.map((kind) => [kind, kind])), range, output);
}

// ---- bars, for a comparison of layouts

/** Horizontal bars. rows: [{name, parts: [[class, value]], marks: [values], whisker: [low, high]}]; limit: a line. */
function bars(text, unit, rows, limit, entries) {
  const most = Math.max(...rows.flatMap((row) => [row.parts.reduce((sum, part) => sum + part[1], 0), ...row.marks, ...(row.whisker ?? [0])]));
  const end = 1.04 * (limit && limit < 2 * most ? Math.max(limit, most) : most);
  const draw = (width) => {
    const step = 38, height = 40 + rows.length * step;
    const { node, x } = frame(width, height, [end, unit], [0, ""], 10);
    rows.forEach((row, n) => {
      const y = 18 + n * step;
      let base = 0;
      node.append(label(10, y + 8, row.name, "start", "strong"));
      for (const [kind, value] of row.parts) {
        node.append(svg("rect", { class: kind, x: x(base), y: y + 13, width: Math.max(0, x(base + value) - x(base)), height: 13 }));
        base += value;
      }
      if (!row.parts.length) node.append(label(10, y + 24, "no figures"));
      for (const value of row.marks) node.append(svg("path", { class: "whisker", d: `M${x(value)} ${y + 10}v19` }));
      if (row.whisker) node.append(svg("path", { class: "whisker", d: `M${x(row.whisker[0])} ${y + 15}v9m0 -4.5H${x(row.whisker[1])}m0 -4.5v9` }));
    });
    if (limit && limit <= end) node.append(svg("path", { class: "limit", d: `M${x(limit)} 14V${height - 36}` }));
    return node;
  };
  return chart(text, draw, legend(entries));
}

// ---- points, for the front of time and memory

/**
 * points: [{x, y, name, style}]; a line joins those of style front or best. What takes much longer than the best, and a
 * limit far above all points, are told instead of drawn.
 */
function scatter(text, unitX, unitY, points, limit, entries) {
  const front = points.filter((point) => point.style).sort((a, b) => a.x - b.x || a.y - b.y);
  const least = Math.min(...points.map((point) => point.x)), lastX = Math.max(...front.map((point) => point.x), 2.5 * least);
  const drawn = points.filter((point) => point.x <= lastX), highest = Math.max(...drawn.map((point) => point.y));
  const near = limit && limit < 1.8 * highest, mostX = 1.06 * Math.max(...drawn.map((point) => point.x));
  const mostY = 1.12 * Math.max(near ? limit : 0, Math.min(highest, Math.max(2.5 * (limit || highest), ...front.map((point) => point.y))));
  const shown = drawn.filter((point) => point.y <= mostY), output = el("output");
  const told = [near || !limit ? "" : `The memory that may be filled, ${short(limit)} GB, is above the chart.`,
    shown.length < points.length ? `${count(points.length - shown.length)} candidates that take much longer or more are outside.` : ""].filter(Boolean);
  const draw = (width) => {
    const { node, x, y } = frame(width, 340, [mostX, unitX], [mostY, unitY]);
    if (near) {
      node.append(svg("path", { class: "limit", d: `M${x(0)} ${y(limit)}H${x(mostX)}` }));
      node.append(label(x(0) + 6, y(limit) - 5, "memory that may be filled", "start", "strong"));
    }
    const steps = front.map((point, n) => (n ? `H${x(point.x)}V${y(point.y)}` : `M${x(point.x)} ${y(point.y)}`)).join("");
    node.append(svg("path", { class: "front-line", d: steps }));
    for (const point of [...shown.filter((each) => !each.style), ...front]) {
      const dot = svg("circle", { class: `dot ${point.style}`, cx: x(point.x), cy: y(point.y), r: point.style ? 6 : 4 }, svg("title", {}, point.name));
      dot.addEventListener("pointerenter", () => { output.textContent = `${point.name}: ${seconds(point.x)}, ${point.y.toFixed(2)} GB`; });
      node.append(dot);
    }
    return node;
  };
  return chart([text, ...told].join(" "), draw, legend(entries), output);
}
