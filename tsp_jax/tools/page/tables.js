"use strict";
// Elements, figures, tables and the search. Texts of programs reach the page as text nodes alone, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = JSON.parse(document.getElementById("page").textContent);
const SHOWN_ROWS = 15;

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value != null && value !== false) node.setAttribute(name, value);
  node.append(...children.filter((child) => child != null));
  return node;
}
const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

// ---- figures: the text of a value of DATA, which keeps the value's path

/** The value with so many decimals; a tie goes to the even digit, as in the printed report. */
function fixed(value, digits) {
  const exact = value.toFixed(digits + 25), kept = exact.slice(0, -25).replace(/\.$/, "");
  const tie = exact.endsWith("5" + "0".repeat(24)) && "02468".includes(kept.at(-1));
  return tie ? kept : value.toFixed(digits);
}
const bytes = (value) => (Math.abs(value) >= 1e8 ? `${fixed(value / 1e9, 2)} GB` : `${fixed(value / 1e6, 2)} MB`);
function seconds(value) {
  if (value >= 1) return `${fixed(value, 2)} s`;
  return value >= 1e-3 || !value ? `${fixed(value * 1e3, 2)} ms` : `${fixed(value * 1e6, 2)} us`;
}
const count = (value) => fixed(value, Number.isInteger(value) || Math.abs(value) >= 100 ? 0 : 2).replace(/\B(?=(\d{3})+(?!\d))/g, ",");
const FORMATS = {
  bytes, seconds, count,
  percent: (value) => `${fixed(100 * value, 0)}%`,
  ratio: (value) => `${fixed(value, 2)} x`,
  text: (value) => String(value),
};
const at = (path) => path.reduce((value, key) => (value == null ? undefined : value[key]), DATA);

/** A value of DATA as {text, value, path, unit}; without a text if the value is not there. */
function figure(unit, ...path) {
  const value = at(path);
  return { text: value == null ? "" : FORMATS[unit](value), value, path, unit };
}
/** A value that is computed here from several of DATA. */
const derived = (unit, value) => ({ text: value == null || !isFinite(value) ? "" : FORMATS[unit](value), value });

function write(node, cell) {
  const { text, path, unit, share } = typeof cell === "object" && cell ? cell : { text: String(cell ?? "") };
  node.append(text);
  if (path && text) {
    node.dataset.path = JSON.stringify(path);
    node.dataset.unit = unit;
  }
  if (share) {
    const bar = el("i", { "aria-hidden": "true" });
    bar.style.width = `${Math.min(100, 100 * share)}%`;
    node.classList.add("share");
    node.append(bar);
  }
  return node;
}

/** A headed section; `made` says how its figures came about. */
function section(id, title, made, ...children) {
  const heading = el("h2", { id }, title, made ? el("span", { class: "kind" }, made) : null);
  return el("section", { "aria-labelledby": id }, heading, ...children);
}
function card(label, cell) {
  return el("div", { class: "card" }, write(el("b"), cell), el("span", {}, label));
}
const note = (text) => el("p", { class: "note" }, text);

// ---- tables

const tables = [];
const textOf = (cell) => (typeof cell === "object" && cell ? cell.text : String(cell ?? ""));
const orderOf = (cell) => (typeof cell === "object" && cell && cell.value != null ? cell.value : textOf(cell));

/**
 * A table that can be sorted and searched.
 * columns: [[name, class]], class "" (one line), "words" or "long" (wrapped), or "right"; rows: [{cells, style}]; the first cell is the row's header.
 */
function table(caption, columns, rows, more = "") {
  const body = el("tbody"), rest = el("div", { class: "more" });
  const heads = columns.map(([name, style], k) => {
    const head = el("th", { scope: "col", class: style }, el("button", { type: "button" }, name || "kind"));
    head.firstChild.addEventListener("click", () => sort(k));
    return head;
  });
  const words = rows.map((row) => row.cells.map(textOf).join(" ").toLowerCase());
  let order = rows.map((_, n) => n), sorted = [-1, 1], all = false, query = "";

  function sort(k) {
    sorted = [k, sorted[0] === k ? -sorted[1] : columns[k][1] === "right" ? -1 : 1];
    heads.forEach((head, n) => head.setAttribute("aria-sort", n !== k ? "none" : sorted[1] > 0 ? "ascending" : "descending"));
    const key = (n) => orderOf(rows[n].cells[k]);
    const less = (a, b) => (typeof a === typeof b ? a < b : typeof a === "string");
    order.sort((a, b) => sorted[1] * (less(key(a), key(b)) ? -1 : less(key(b), key(a)) ? 1 : 0) || a - b);
    draw();
  }
  function draw() {
    const found = order.filter((n) => query.split(" ").every((word) => words[n].includes(word)));
    const shown = all ? found : found.slice(0, SHOWN_ROWS);
    body.replaceChildren(...shown.map((n) => line(rows[n])));
    const hidden = found.length - shown.length;
    rest.replaceChildren();
    if (hidden) {
      const button = el("button", { type: "button" }, `Show ${count(hidden)} more rows`);
      button.addEventListener("click", () => { all = true; draw(); });
      rest.append(button);
    }
    rest.append(!found.length ? "No row matches the search." : query ? `${count(found.length)} of ${count(rows.length)} rows` : more);
    return found.length;
  }
  function line({ cells, style }) {
    const nodes = cells.map((cell, k) => {
      const kind = columns[k][1];
      return write(k ? el("td", { class: kind }) : el("th", { scope: "row", class: kind }), cell);
    });
    return el("tr", { class: style }, ...nodes);
  }

  draw();
  tables.push({ size: rows.length, search: (text) => { query = text; return draw(); } });
  const head = columns.length > 1 ? el("thead", {}, el("tr", {}, ...heads)) : null;  // lines of text need none
  const whole = el("table", {}, el("caption", {}, caption), head, body);
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, whole, rest);
}

function search() {
  const query = document.getElementById("query").value.trim().toLowerCase().replace(/\s+/g, " ");
  const found = tables.reduce((sum, each) => sum + each.search(query), 0);
  const size = tables.reduce((sum, each) => sum + each.size, 0);
  document.getElementById("found").textContent = query ? `${count(found)} of ${count(size)} rows` : "";
}

