// The three pages: the report on a program, the comparison of layouts, the plan.

const sum = (values) => values.reduce((total, value) => total + (value ?? 0), 0);
const band = (...path) => {
  const found = at(path);
  if (!found) return figure("text", ...path);
  const unit = seconds(found.typical).split(" ")[1], scale = { s: 1, ms: 1e-3, us: 1e-6 }[unit];
  const [low, typical, high] = [found.low, found.typical, found.high].map((value) => fixed(value / scale, 2));
  const text = low === high ? `${typical} ${unit}` : `${low} to ${high} ${unit} (${typical})`;
  return { text, value: found.typical, path, unit: "band" };
};
const rowsOf = (list, make) => (list ?? []).map((item, n) => ({ cells: make(item, n) }));

// ---- a program

function memoryOf() {
  const m = DATA.memory, limit = DATA.device?.memory_bytes;
  const parts = [["argument_bytes", "arguments"], ["output_bytes", "outputs"], ["alias_bytes", "outputs that reuse arguments"], ["temp_bytes", "temporaries"]];
  const rows = [
    ["peak memory", figure("bytes", "memory", "peak_bytes")],
    ...KINDS.map((kind) => [`${kind} at the peak`, figure("bytes", "memory", "by_kind", kind)]),
    ["peak as read from the text", figure("bytes", "memory", "live_peak_bytes")],
    ...parts.filter(([name]) => m[name] != null).map(([name, text]) => [text, figure("bytes", "memory", name)]),
    ...(m.host_bytes ? [["peak in the host's memory", figure("bytes", "memory", "host_bytes")]] : []),
    ...(limit ? [["memory of the device", figure("bytes", "device", "memory_bytes")]] : []),
  ];
  const buffers = rowsOf(m.largest, (b, n) => [
    { ...figure("bytes", "memory", "largest", n, "bytes"), share: b.bytes / m.live_peak_bytes },
    b.kind, `${b.dtype}[${b.shape.join(",")}]`, b.opcode === "parameter" ? b.scope : b.label, b.source.split("/").slice(-2).join("/"), b.name,
  ]);
  const rest = m.live_peak_bytes - sum(m.largest.map((b) => b.bytes));
  return section("memory", "Memory", DATA.memory.argument_bytes == null ? "from the text" : "compiled",
    note(`The peak is at instruction ${m.peak_at.split(" ").pop() || "0"}. State: arguments of the program, and outputs in their place. Residual: from the forward to the backward pass. Transient: everything else.`),
    memoryCurve(),
    table("Memory of one device", [["part", "words"], ["bytes", "right"]], rows.map((cells) => ({ cells }))),
    table("Buffers alive at the peak, the largest first", [["bytes", "right"], ["kind", ""], ["array", ""], ["made by", "long"], ["source", ""], ["instruction", ""]],
      buffers, rest > 0 ? `smaller ones: ${bytes(rest)} together` : ""));
}

function collectivesOf() {
  const all = DATA.collectives, total = sum(all.map((c) => c.total_bytes)), groups = new Map();
  for (const c of all) {
    const key = `${c.op} ${c.axis}`, group = groups.get(key) ?? { ...c, count: 0, total_bytes: 0, hidden: 0, known: true };
    group.count += c.count;
    group.total_bytes += c.total_bytes;
    group.known = group.known && c.hidden_fraction != null;
    group.hidden += c.total_bytes * (c.hidden_fraction ?? 0);
    groups.set(key, group);
  }
  const kinds = [...groups.values()].sort((a, b) => b.total_bytes - a.total_bytes).map((g) => ({ cells: [
    g.op, g.axis, { ...derived("bytes", g.total_bytes), share: g.total_bytes / total }, derived("count", g.count),
    g.known && g.total_bytes ? derived("percent", g.hidden / g.total_bytes) : "unknown",
  ] }));
  const order = all.map((_, n) => n).sort((a, b) => all[b].total_bytes - all[a].total_bytes);
  const rows = order.map((n) => ({ cells: [
    { ...figure("bytes", "collectives", n, "total_bytes"), share: all[n].total_bytes / total },
    all[n].op, all[n].axis, all[n].hidden_fraction == null ? "unknown" : figure("percent", "collectives", n, "hidden_fraction"), all[n].label,
    figure("count", "collectives", n, "count"), figure("bytes", "collectives", n, "bytes"), all[n].is_async ? "yes" : "no", all[n].dtype, all[n].name,
  ] }));
  const left = DATA.left_out?.collectives;
  return section("communication", "Communication", "compiled; overlap simulated",
    note(`A device receives ${bytes(total + (left?.total_bytes ?? 0))} in one execution. Overlapped: share of a collective's time during which the device computes.`),
    table("By kind and mesh axis", [["op", ""], ["axis", ""], ["received", "right"], ["count", "right"], ["overlapped, by bytes", "right"]], kinds),
    table("Collectives, by bytes that a device receives",
      [["received", "right"], ["op", ""], ["axis", ""], ["overlapped", "right"], ["scope", "long"], ["count", "right"], ["each", "right"], ["async", ""], ["dtype", ""], ["instruction", ""]],
      rows, left ? `${count(left.count)} smaller ones are left out: ${bytes(left.total_bytes)}` : ""));
}

const TIMES = {
  step_s: "step", compute_s: "computation", contention_s: "computation is slowed by communication", comm_s: "communication",
  exposed_comm_s: "exposed communication", matmul_s: "matrix products alone", host_s: "copies to and from the host", exposed_host_s: "exposed copies",
};
function bottlenecksOf() {
  const found = DATA.bottlenecks;
  if (!found) return null;
  const rows = found.found.map((each, n) => ({ cells: [each.what, band("bottlenecks", "found", n, "gain_s"), figure("seconds", "bottlenecks", "found", n, "step_s"), each.remedy, each.mostly] }));
  if (rows.length > 1) rows.push({ cells: ["all of these together", "", figure("seconds", "bottlenecks", "together_s"), "", ""] });
  return section("bottlenecks", "What would shorten the step most", "simulated", note(`${found.verdict}. Each line is simulated again with one thing changed, in all scenarios; gains do not add up, and what a remedy costs elsewhere, such as memory, is left out.`),
    rows.length ? table("Changes that would shorten the step most", [["change", "long"], ["shorter by", "right"], ["step", "right"], ["what to do", "long"], ["mostly", "long"]], rows) : null);
}

function timesOf() {
  const t = DATA.timeline;
  if (!t) return section("time", "Time", "", note("The target is not known, so there are no times; --target names it."));
  const names = Object.keys(TIMES).filter((name) => !name.includes("host") || t.host_s);
  const rows = names.map((name) => ({ cells: [TIMES[name], band("timeline", "bands", name), { ...derived("percent", t[name] / t.step_s), share: t[name] / t.step_s }] }));
  if (t.matmul_ratio) rows.push({ cells: ["step over matrix products alone", figure("ratio", "timeline", "matmul_ratio"), ""] });
  const scenarios = Object.keys(t.scenarios).map((name) => ({ cells: [name, ...["step_s", "compute_s", "comm_s", "exposed_comm_s"].map((field) => figure("seconds", "timeline", "scenarios", name, field))] }));
  const scopes = Object.keys(t.by_scope).map((scope) => ({ cells: [scope, figure("seconds", "timeline", "by_scope", scope), { ...derived("percent", t.by_scope[scope] / t.step_s), share: t.by_scope[scope] / t.step_s }] }));
  const left = DATA.left_out?.by_scope;
  return section("time", "Time", "simulated", note("Times are computed by the timeline's rules; nothing is measured. Low to high over what is known of the rates; in parentheses, and where a time stands alone, at typical rates."),
    timeline(),
    el("div", { class: "two" },
      table("Time of one execution", [["part", "words"], ["low to high (typical)", "right"], ["of the step", "right"]], rows),
      table("Bands: the step at each end of the rates", [["rates", "words"], ["step", "right"], ["computation", "right"], ["communication", "right"], ["exposed", "right"]], scenarios)),
    table("Computation by scope", [["scope", "long"], ["time", "right"], ["of the step", "right"]], scopes, left ? `${count(left.count)} shorter ones are left out: ${seconds(left.seconds)}` : ""),
    table("Rates and what is assumed", [["", "long"]], rowsOf(t.assumptions, (line) => [line])));
}

function inspectPage() {
  const t = DATA.timeline, m = DATA.memory, limit = DATA.device?.memory_bytes;
  const cards = [
    m && card(limit ? `peak memory of ${bytes(limit)} (${FORMATS.percent(m.peak_bytes / limit)})` : "peak memory", figure("bytes", "memory", "peak_bytes")),
    t && card(`step, simulated; ${t.bands.step_s.low === t.bands.step_s.high ? "no band" : `${seconds(t.bands.step_s.low)} to ${seconds(t.bands.step_s.high)}`}`, figure("seconds", "timeline", "step_s")),
    card("received by a device", derived("bytes", sum(DATA.collectives.map((c) => c.total_bytes)) + (DATA.left_out?.collectives?.total_bytes ?? 0))),
    t && card("of communication is exposed", figure("percent", "timeline", "exposed_fraction")),
    t?.matmul_ratio && card("step over its matrix products alone", figure("ratio", "timeline", "matmul_ratio")),
  ];
  const shardings = Object.keys(DATA.shardings), unknown = Object.keys(DATA.unknown ?? {});
  return [cards, [
    unknown.length ? section("unknown", "What the text does not tell", "", table("Unknown, and what counts instead", [["figure", "words"], ["unknown", "long"]], unknown.map((name) => ({ cells: [name, figure("text", "unknown", name)] })))) : null,
    m ? memoryOf() : section("memory", "Memory", "", note(`There is no peak and no timeline: ${DATA.missing}.`)),
    collectivesOf(),
    m ? timesOf() : null,
    m ? bottlenecksOf() : null,
    shardings.length ? section("arguments", "Arguments", "compiled", table("Shardings of the arguments", [["argument", "long"], ["sharding", "long"]], shardings.map((name) => ({ cells: [name, figure("text", "shardings", name)] })))) : null,
  ]];
}

// ---- a comparison of layouts

function comparePage() {
  const rows = DATA.rows, limit = DATA.device?.memory_bytes, lengths = [...new Set(rows.map((row) => row.seq_len))];
  const columns = [["layout", "words"], ["tokens", "right"], ["batch", "right"], ["peak", "right"], ["closed form", "right"], ["received", "right"], ["communication", "right"], ["exposed", "right"],
    ["step", "right"], ["low", "right"], ["high", "right"], ["/ products", "right"], ["tokens/s", "right"], ["longest that fits", "right"], ["largest batch", "right"], ["mesh", ""], ["note", "long"]];
  const lines = rows.map((row, n) => ({ style: row.fits ? "" : "bad", cells: [
    row.layout, ...["seq_len", "batch"].map((name) => figure("count", "rows", n, name)),
    ...["peak_bytes", "predicted_bytes", "received_bytes"].map((name) => figure("bytes", "rows", n, name)),
    figure("seconds", "rows", n, "comm_s"), row.comm_s ? derived("percent", row.exposed_comm_s / row.comm_s) : "",
    ...["step_s", "step_low_s", "step_high_s"].map((name) => figure("seconds", "rows", n, name)),
    row.matmul_s ? derived("ratio", row.step_s / row.matmul_s) : "",
    figure("count", "rows", n, "tokens_per_s"), figure("count", "rows", n, "largest_seq_len"), figure("count", "rows", n, "largest_batch"), row.mesh, row.note,
  ] }));
  const charts_ = lengths.map((length) => {
    const some = rows.filter((row) => row.seq_len === length);
    const paper = (row) => (row.paper_peak_gb ? row.paper_peak_gb.split("-").map(Number) : []);
    const memory = some.map((row) => ({ name: row.layout, marks: paper(row), parts: row.peak_bytes == null ? [] : KINDS.map((kind) => [kind, (row.by_kind[kind] ?? 0) / 1e9]) }));
    const time = some.map((row) => ({ name: row.layout, marks: [], whisker: row.step_s == null ? null : [row.step_low_s, row.step_high_s],
      parts: row.step_s == null ? [] : [["busy", row.step_s - row.exposed_comm_s], ["waiting", row.exposed_comm_s]] }));
    const marked = some.some((row) => row.paper_peak_gb) ? [["tick: the paper's peak", "text"]] : [];
    return el("div", { class: "two" },
      bars(`Peak memory per device at ${count(length)} tokens, compiled`, "GB", memory, limit / 1e9, [...KINDS.map((kind) => [kind, kind]), ...(limit ? [["the device's memory", "limit"]] : []), ...marked]),
      bars(`Step at ${count(length)} tokens, simulated`, "s", time, 0, [["computation", "c0"], ["exposed communication", "wait"], ["whisker: band of the rates", "text"]]));
  });
  const best = (name, better) => rows.reduce((found, row, n) => (row.fits && row[name] != null && (found < 0 || better(row[name] / (name === "step_s" ? row.batch * row.seq_len : 1), rows[found][name] / (name === "step_s" ? rows[found].batch * rows[found].seq_len : 1))) ? n : found), -1);
  const least = best("peak_bytes", (a, b) => a < b), most = best("tokens_per_s", (a, b) => a > b);
  const cards = [
    card("rows", derived("count", rows.length)),
    least >= 0 && card(`least peak memory: ${rows[least].layout} at ${count(rows[least].seq_len)}`, figure("bytes", "rows", least, "peak_bytes")),
    most >= 0 && card(`most tokens/s: ${rows[most].layout} at ${count(rows[most].seq_len)}`, figure("count", "rows", most, "tokens_per_s")),
    limit && card("memory of a device", figure("bytes", "device", "memory_bytes")),
  ];
  return [cards, [
    section("chart", "Memory and time", "compiled; times simulated", ...charts_),
    section("rows", "Rows", "compiled; times simulated", note("Bytes and seconds are per device and step; batch: sequences over all devices; low, high: over the bands of the rates; a time that stands alone is at typical rates; red rows do not fit or do not compile."),
      table("Layouts", columns, lines),
      (DATA.turns ?? []).length ? table("Ties: orders that turn within the rates' uncertainty", [["", "long"]], rowsOf(DATA.turns, (line) => [line])) : null),
  ]];
}

// ---- a plan

/** What a plan chose, its fields that differ between candidates first, in one line. */
function chosen(candidate, varied) {
  return varied.map((name) => [name, candidate.config[name]]).filter(([, value]) => value !== "" && value != null && value !== false)
    .map(([name, value]) => (typeof value === "string" ? value : `${name} ${value === true ? "" : value}`.trim())).join(", ");
}

function candidatesTable(varied) {
  const figures = [["peak", "bytes", "peak_bytes"], ["step", "seconds", "step_s"], ["low", "seconds", "step_low_s"], ["high", "seconds", "step_high_s"],
    ["communication", "seconds", "comm_s"], ["exposed", "seconds", "exposed_comm_s"], ["received", "bytes", "received_bytes"]];
  const closed = [["peak, closed form", "bytes", "peak_bytes"], ["step, closed form", "seconds", "step_s"]];
  const whole = [["tokens/s", "count", "tokens_per_s"], ["tokens per device-hour", "count", "tokens_per_device_hour"]];
  const right = (list) => list.map(([name]) => [name, "right"]);
  const columns = [["", ""], ...varied.map((name) => [name, name === "layout" ? "words" : ""]), ...right(figures), ...right(whole), ...right(closed), ["note", "long"]];
  const rows = DATA.candidates.map((c, n) => ({ style: n === DATA.best ? "best" : "", cells: [
    n === DATA.best ? "best" : c.on_front ? "front" : c.compiled ? "compiled" : "closed form",
    ...varied.map((name) => figure("text", "candidates", n, "config", name)),
    ...figures.map(([, unit, name]) => figure(unit, "candidates", n, "compiled", name)),
    ...whole.map(([, unit, name]) => figure(unit, "candidates", n, name)),
    ...closed.map(([, unit, name]) => figure(unit, "candidates", n, "closed_form", name)), c.note,
  ] }));
  const order = ["best", "front", "compiled", "closed form"];
  const at_ = varied.length + 2, time = (row) => row.cells[at_].value ?? row.cells.at(-2).value ?? Infinity;  // compiled, else closed form
  rows.sort((a, b) => order.indexOf(a.cells[0]) - order.indexOf(b.cells[0]) || time(a) - time(b) || 0);
  return table("Candidates; figures are compiled, except those of closed forms", columns, rows);
}

function planPage() {
  const { candidates: all, best, budget, longest, longest_offloaded: offloaded } = DATA;
  const found = (c, name) => c.compiled?.[name] ?? c.closed_form?.[name];
  const names = [...new Set(all.flatMap((c) => Object.keys(c.config)))];
  const varied = names.filter((name) => new Set(all.map((c) => JSON.stringify(c.config[name]))).size > 1);
  const limit = budget?.usable_bytes, part = all[best]?.compiled ? "compiled" : "closed_form";
  const points = all.map((c, n) => ({ x: found(c, "step_s"), y: found(c, "peak_bytes") / 1e9, name: chosen(c, varied), style: n === best ? "best" : c.on_front ? "front" : "" })).filter((p) => isFinite(p.x) && isFinite(p.y));
  const reserves = Object.keys(budget?.reserves ?? {}).map((name) => ({ cells: [name, figure("bytes", "budget", "reserves", name, "bytes"), figure("text", "budget", "reserves", name, "source")] }));
  const lengths = Object.keys(longest ?? {}).map((name) => ({ cells: [name, figure("count", "longest", name), ...(offloaded ? [figure("count", "longest_offloaded", name)] : [])] }));
  const said = (name, caption) => ((DATA[name] ?? []).length ? table(caption, [["", "long"]], rowsOf(DATA[name], (line) => [line])) : null);
  const cards = best == null ? [] : [
    card("step of the best, simulated", figure("seconds", "candidates", best, part, "step_s")),
    card("its peak memory", figure("bytes", "candidates", best, part, "peak_bytes")),
    all[best].tokens_per_s != null && card("tokens/s", figure("count", "candidates", best, "tokens_per_s")),
  ];
  return [[...cards, limit && card("memory that may be filled", figure("bytes", "budget", "usable_bytes")), card("candidates", derived("count", all.length))], [
    section("front", "Time and memory", "compiled or closed form; times simulated",
      best == null ? null : note(`Best: ${chosen(all[best], names)}.`),
      points.length ? scatter("Each candidate; the line is the front, on which less time costs more memory.", "step, s", "peak, GB", points, limit && limit / 1e9, [["best", "limit"], ["on the front", "c0"], ["others", "c7"]]) : note("No candidate has a time and a peak."),
      said("why", "Why the best is best"), said("ties", "Ties within the rates' uncertainty"), said("notes", "Notes")),
    section("candidates", "Candidates", "", candidatesTable(varied)),
    section("limits", "Limits", "", el("div", { class: "two" },
      lengths.length ? table("Longest sequence that fits, in tokens", [["layout", "words"], ["tokens", "right"], ...(offloaded ? [["with layer inputs on the host", "right"]] : [])], lengths) : null,
      reserves.length ? table("Memory that programs do not get", [["part", "words"], ["bytes", "right"], ["source", "long"]], reserves) : null)),
  ]];
}

// ---- every page

function start() {
  document.title = PAGE.title;
  document.getElementById("title").append(PAGE.title);
  document.getElementById("lines").append(...PAGE.lines.map((line) => el("p", { class: "quiet" }, line)));
  const [cards, sections] = { inspect: inspectPage, compare: comparePage, plan: planPage }[PAGE.kind]();
  document.getElementById("cards").append(...cards.filter(Boolean));
  document.getElementById("main").append(...sections.filter(Boolean));
  document.getElementById("footer").append(
    el("p", {}, "Made by ", el("code", {}, PAGE.command)),
    el("p", {}, Object.entries(PAGE.versions).map(([name, version]) => `${name} ${version}`).join(", "), ". All figures of this page are those of the report's JSON, which the page holds."));
  document.getElementById("search").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("query").addEventListener("input", search);
  const redraw = () => charts.forEach((draw) => draw());
  redraw();
  new ResizeObserver(redraw).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
start();
