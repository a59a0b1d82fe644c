// The simulated timeline on a canvas: rows for loops, then a lane for computation, for the links, for the host.

const LOOP_ROWS = 3, ROW = 17, LANE = 34, GAP = 20;
const OPS = ["all-gather", "reduce-scatter", "all-reduce", "collective-permute"];

/** Seconds of an item of an outline with its repetitions, and the end of what it starts. */
const lengthOf = (item) => (Array.isArray(item) ? item[3] : item.seconds * item.times);
const startOf = (item) => (Array.isArray(item) ? item[2] : item.start);

function timeline() {
  const { tasks, lanes, items } = DATA.timeline.outline, step = DATA.timeline.step_s;
  const scopes = Object.keys(DATA.timeline.by_scope).slice(0, 7);
  const used = new Set();
  (function visit(some) {
    for (const item of some) Array.isArray(item) ? used.add(lanes[item[0]]) : visit(item.items);
  })(items);
  const rows = ["compute", "links", "host"].filter((lane) => lane !== "host" || used.has("host"));
  const height = LOOP_ROWS * ROW + rows.length * (LANE + GAP) + 26;
  const canvas = el("canvas", { tabindex: "0", role: "img", height, "aria-label": "Timeline of the step; keys: plus and minus zoom, arrows move, 0 shows the whole step. The table of scopes has its figures." });
  const output = el("output"), select = el("select", { "aria-label": "Part of the timeline" });
  let view = [0, step], hits = [], colors = {};

  const colorOf = (lane, task) => {
    const { label, op } = tasks[task];
    if (lane === "wait") return colors.wait;
    if (lane === "compute") return colors[`c${scopes.includes(label) ? scopes.indexOf(label) : 7}`];
    return colors[`o${OPS.includes(op) ? OPS.indexOf(op) : 4}`];
  };

  /** For each lane, the share of an iteration that it is busy, and the task that takes longest. */
  function summary(loop) {
    if (loop.summary) return loop.summary;
    const busy = lanes.map(() => 0), longest = lanes.map(() => [0, null]);
    for (const item of loop.items) {
      if (Array.isArray(item)) {
        busy[item[0]] += item[3];
        if (item[3] > longest[item[0]][0]) longest[item[0]] = [item[3], item[1]];
        continue;
      }
      summary(item).forEach(({ share, task }, lane) => {
        const taken = share * lengthOf(item);
        busy[lane] += taken;
        if (taken > longest[lane][0]) longest[lane] = [taken, task];
      });
    }
    loop.summary = lanes.map((_, lane) => ({ share: Math.min(1, busy[lane] / loop.seconds || 0), task: longest[lane][1] }));
    return loop.summary;
  }

  function draw() {
    const width = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
    if (!width) return;
    const style = getComputedStyle(document.documentElement);
    colors = Object.fromEntries(["text", "quiet", "line", "panel", "idle", "wait", "c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "o0", "o1", "o2", "o3", "o4"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, height);
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    hits = [];
    const scale = width / (view[1] - view[0]), x = (time) => (time - view[0]) * scale;
    const top = (lane) => LOOP_ROWS * ROW + GAP + rows.indexOf(lane === "wait" ? "compute" : lane) * (LANE + GAP);
    const names = { compute: "computation; waits in red", links: "links", host: "copies to and from the host" };
    for (const lane of rows) {
      pen.fillStyle = colors.idle;
      pen.fillRect(0, top(lane), width, LANE);
      pen.fillStyle = colors.quiet;
      pen.fillText(names[lane], 2, top(lane) - 9);
    }

    function block(lane, from, to, share, task, told) {
      const [left, right] = [Math.max(-2, x(from)), Math.min(width + 2, x(to))];
      if (right < 0 || left > width || task == null) return;
      const size = Math.max(2, LANE * share), wide = Math.max(right - left, 0.6);
      pen.fillStyle = colorOf(lane, task);
      pen.fillRect(left, top(lane) + LANE - size, wide, size);
      if (wide > 4 && share === 1) {
        pen.fillStyle = colors.panel;
        pen.fillRect(left + wide - 0.7, top(lane), 0.7, LANE);
      }
      hits.push([left, left + Math.max(wide, 2), top(lane), top(lane) + LANE, told]);
    }
    function band(loop, depth, from, seconds, times) {
      if (depth >= LOOP_ROWS) return;
      const [left, right] = [Math.max(0, x(from)), Math.min(width, x(from + seconds * times))];
      if (right - left < 1) return;
      pen.fillStyle = colors.line;
      pen.fillRect(left, depth * ROW, right - left - 1, ROW - 2);
      const text = times > 1 ? `${loop.name}; ${times} alike` : loop.name;
      const fits = [text, text.replace(/ iteration .*/, "")].find((words) => pen.measureText(words).width < right - left - 8);
      pen.fillStyle = colors.text;
      if (fits) pen.fillText(fits, left + 4, depth * ROW + ROW / 2 - 1);
      hits.push([left, right, depth * ROW, depth * ROW + ROW, `${text}, ${seconds_(seconds)} each`]);
    }
    function walk(some, offset, depth) {
      for (const item of some) {
        const start = offset + startOf(item);
        if (Array.isArray(item)) {
          if (start > view[1] || start + item[3] < view[0]) continue;
          block(lanes[item[0]], start, start + item[3], 1, item[1], item);
          continue;
        }
        const { seconds: each, times } = item;
        if (start > view[1] || start + lengthOf(item) + each < view[0]) continue;
        if (each * scale < 3) {
          band(item, depth, start, each, times);
          summary(item).forEach(({ share, task }, lane) => {
            if (share && task != null) block(lanes[lane], start, start + each * times, lanes[lane] === "wait" ? share : Math.max(share, 0.06), task, [lane, task, 0, share * each * times, 0]);
          });
          continue;
        }
        const first = Math.max(0, Math.floor((view[0] - start) / each) - 1);
        const last = Math.min(times - 1, Math.ceil((view[1] - start) / each));
        for (let n = first; n <= last; n++) {
          band(item, depth, start + n * each, each, 1);
          walk(item.items, start + n * each, depth + 1);
        }
      }
    }
    walk(items, 0, 0);

    const base = height - 22;
    pen.fillStyle = colors.quiet;
    pen.strokeStyle = colors.line;
    for (const value of ticks(view[1] - view[0], width < 500 ? 3 : 8)) {
      pen.fillRect(x(view[0] + value), base, 1, 5);
      pen.textAlign = x(view[0] + value) > width - 60 ? "right" : "left";
      pen.fillText(value ? `+${seconds_(value)}` : seconds_(view[0]), x(view[0] + value) + (pen.textAlign === "right" ? -2 : 2), base + 12);
    }
    pen.textAlign = "left";
  }
  const seconds_ = (value) => seconds(value).replace(/\.?0+ /, " ");

  function show(from, to) {
    const least = step * 1e-6, wide = Math.min(step, Math.max(least, to - from));
    const begin = Math.min(Math.max(0, from), step - wide);
    view = [begin, begin + wide];
    draw();
  }
  function zoom(factor, place = 0.5) {
    const wide = view[1] - view[0], middle = view[0] + place * wide;
    show(middle - place * wide * factor, middle + (1 - place) * wide * factor);
  }
  const move = (share) => show(view[0] + share * (view[1] - view[0]), view[1] + share * (view[1] - view[0]));
  const whole = () => show(0, step);

  function told(what) {
    if (typeof what === "string") return what;
    const [lane, number, , length, times] = what, task = tasks[number], where = lanes[lane];
    const name = `${where === "wait" ? "computation waits for " : ""}${task.label} (${task.op} ${task.name})`;
    if (!times) return `${where}: busy ${seconds_(length)} here, mostly with ${name}; zoom in for its parts`;
    const size = [task.bytes ? bytes(task.bytes) : "", task.flops ? `${(task.flops / 1e12).toPrecision(3)} TFLOP` : ""].filter(Boolean).join(", ");
    return `${where}: ${times > 1 ? `${count(times)} short tasks, the longest ` : ""}${name}, ${seconds_(length)}${size && `, ${size}`}`;
  }
  function point(event) {
    const box = canvas.getBoundingClientRect(), [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const hit = hits.findLast(([left, right, above, below]) => px >= left && px <= right && py >= above && py <= below);
    output.textContent = hit ? told(hit[4]) : "";
  }
  let dragged = null;
  canvas.addEventListener("pointerdown", (event) => { dragged = [event.clientX, ...view]; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { dragged = null; });
  canvas.addEventListener("pointercancel", () => { dragged = null; });
  canvas.addEventListener("pointermove", (event) => {
    point(event);
    if (!dragged) return;
    const shift = ((dragged[0] - event.clientX) / canvas.clientWidth) * (dragged[2] - dragged[1]);
    show(dragged[1] + shift, dragged[2] + shift);
  });
  canvas.addEventListener("dblclick", (event) => zoom(0.4, (event.clientX - canvas.getBoundingClientRect().left) / canvas.clientWidth));
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, (event.clientX - canvas.getBoundingClientRect().left) / canvas.clientWidth);
  }, { passive: false });
  const keys = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), ArrowLeft: () => move(-0.25), ArrowRight: () => move(0.25), 0: whole };
  canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });

  const parts = [[0, step]];
  select.append(el("option", { value: 0 }, `whole step, ${seconds_(step)}`));
  (function offer(some, offset, depth) {
    const best = new Map();  // of iterations of one loop, those that stand for most
    for (const item of some) {
      if (Array.isArray(item)) continue;
      const loop = item.name.replace(/ iteration \d+ of \d+$/, "");
      if (!best.has(loop) || best.get(loop).times < item.times) best.set(loop, item);
    }
    for (const item of best.values()) {
      if (parts.length > 200) return;
      const start = offset + item.start;
      select.append(el("option", { value: parts.length }, `${"\u2003".repeat(depth)}${item.name}, ${seconds_(item.seconds)}`));
      parts.push([start, start + item.seconds]);
      offer(item.items, start, depth + 1);
    }
  })(items, 0, 0);
  select.addEventListener("change", () => show(...parts[Number(select.value)]));

  const button = (text, name, act) => {
    const made = el("button", { type: "button", "aria-label": name }, text);
    made.addEventListener("click", act);
    return made;
  };
  const controls = el("div", { class: "controls" }, select, button("−", "Zoom out", () => zoom(2)), button("+", "Zoom in", () => zoom(0.5)),
    button("Earlier", "Earlier", () => move(-0.5)), button("Later", "Later", () => move(0.5)), button("Whole step", "Whole step", () => { select.value = 0; whole(); }));
  charts.push(draw);
  const ops = [...new Set(tasks.map((task) => task.op))].filter((op) => OPS.includes(op));
  const entries = [...scopes.map((scope, k) => [scope, `c${k}`]), ...(Object.keys(DATA.timeline.by_scope).length > 7 ? [["other scopes", "c7"]] : []), ...ops.map((op) => [op, `o${OPS.indexOf(op)}`]), ["computation waits", "wait"]];
  const text = "One step on one device at typical rates. A bar that is not full: a lane that is busy for that share of the time, where single tasks are too short to be seen. A collective is as long as it takes alone.";
  return el("figure", {}, el("figcaption", {}, text), controls, canvas, output, legend(entries));
}
