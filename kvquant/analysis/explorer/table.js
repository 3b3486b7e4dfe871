"use strict";
// Tables: filters, order, cells, CSV. A sheet has columns and rows; a row has c (cells) and, where it
// is of one, s (scheme), m (model), g (suite), b (bits per element).

const isNumber = (cell) => typeof cell === "number" || (typeof cell === "object" && "v" in cell);
const valueOf = (cell) => (typeof cell === "object" ? cell.v : cell);
const isMissing = (cell) => typeof cell === "object" && "no" in cell;

/** Returns a number as readers see it: with the column's decimals, or four significant digits. */
function numberText(value, column) {
  const size = Math.abs(value);
  let text;
  if (column.digits !== undefined && (value === 0 || size >= 0.5 * 10 ** -column.digits)) {
    // Halves go to the even digit, as in the paper's tables: a mean of 90.25 is 90.2 in both.
    const digits = { minimumFractionDigits: column.digits, maximumFractionDigits: column.digits };
    text = value.toLocaleString("en", { ...digits, roundingMode: "halfEven" });
  } else if (size >= 1000) text = value.toLocaleString("en", { maximumFractionDigits: 0 });
  else if (size >= 1e-4 || value === 0) {
    const significant = column.digits === undefined ? 4 : 1;
    text = value.toLocaleString("en", { maximumSignificantDigits: significant });
  } else text = value.toExponential(0);
  if (column.signed && value > 0) text = `+${text}`;
  return text.replace("-", "\u2212");
}

/** Returns the text of a cell, as it is searched, too. */
function cellText(cell, column) {
  if (isMissing(cell)) return cell.no;
  if (!isNumber(cell)) return cell;
  let text = numberText(valueOf(cell), column);
  if (typeof cell === "object") {
    if ("lo" in cell) text += ` [${numberText(cell.lo, column)}, ${numberText(cell.hi, column)}]`;
    if ("t" in cell) text += ` ${cell.t}`;
  }
  return text;
}

/** Returns which filters mean something for the rows of a sheet. */
function applicable(sheet) {
  return {
    model: DATA.models.length > 1 && sheet.rows.some((row) => "m" in row),
    suite: sheet.rows.some((row) => "g" in row) || sheet.columns.some((column) => column.suite),
    scheme: sheet.rows.some((row) => "s" in row),
    family: sheet.rows.some((row) => "s" in row),
    bits: sheet.rows.some((row) => "b" in row),
  };
}

/** Returns the rows that the filters leave, and how many are left out for want of bits. */
function filtered(sheet) {
  const use = applicable(sheet);
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const min = Number.parseFloat(state.min);
  const max = Number.parseFloat(state.max);
  const ranged = use.bits && !(Number.isNaN(min) && Number.isNaN(max));
  let withoutBits = 0;
  const rows = sheet.rows.filter((row) => {
    if (use.model && state.model && "m" in row && DATA.models[row.m] !== state.model) return false;
    if (state.suite && "g" in row && row.g !== state.suite) return false;
    if (use.scheme && state.scheme && DATA.schemes[row.s]?.key !== state.scheme) return false;
    if (use.family && !fits(row)) return false;
    if (words.length) {
      const text = sheet.columns.map((column, at) => cellText(row.c[at], column)).join(" ").toLowerCase();
      if (!words.every((word) => text.includes(word))) return false;
    }
    if (ranged && !("b" in row)) {
      withoutBits += 1;
      return false;
    }
    return !(ranged && (row.b < min || row.b > max));
  });
  return { rows, withoutBits };
}

/** Returns whether a row is of a chosen family; rows of no scheme go with all families alone. */
function fits(row) {
  if ("s" in row) return state.family.includes(DATA.schemes[row.s].family);
  return state.family.length === DATA.families.length;
}

/** Returns rows in the order that is asked for; those without a value come last either way. */
function ordered(sheet, rows) {
  const name = state.sort.replace(/^-/, "");
  const at = sheet.columns.findIndex((column) => column.name === name);
  if (at < 0) return rows;
  const sign = state.sort.startsWith("-") ? -1 : 1;
  const rank = (cell) => (isMissing(cell) ? 2 : isNumber(cell) ? 0 : 1);
  return rows.map((row, place) => [row, place]).sort(([a, i], [b, j]) => {
    const [one, other] = [a.c[at], b.c[at]];
    if (rank(one) !== rank(other)) return rank(one) - rank(other);
    if (rank(one) === 0) return sign * (valueOf(one) - valueOf(other)) || i - j;
    return sign * cellText(one, {}).localeCompare(cellText(other, {}), "en", { numeric: true }) || i - j;
  }).map(([row]) => row);
}

/** Returns the columns that are shown: those of the chosen suite, and those of none. */
function shownColumns(sheet) {
  return sheet.columns.map((column, at) => [column, at])
    .filter(([column]) => !state.suite || !column.suite || column.suite === state.suite);
}

const GOOD = /^(supported|equivalent|identical|better)/;
const BAD = /^(not supported|worse$)/;

function verdictClass(text) {
  return GOOD.test(text) ? "yes" : BAD.test(text) ? "no" : "";
}

function cellNode(cell, column, row, isFirst) {
  if (column.name === "scheme" || isFirst) {
    const tag = isFirst ? "th" : "td";
    const marker = column.name === "scheme" && "s" in row ? icon(DATA.schemes[row.s]) : null;
    return element(tag, { scope: isFirst ? "row" : null }, marker, cellText(cell, column));
  }
  if (isMissing(cell)) return element("td", { class: "none" }, cell.no);
  if (!isNumber(cell)) {
    const kind = verdictClass(cell) || (cell.length > 60 ? "long" : cell.length > 24 ? "medium" : "name");
    return element("td", { class: kind || null }, cell);
  }
  const value = valueOf(cell);
  const parts = [numberText(value, column)];
  if (typeof cell === "object" && "lo" in cell) {
    const ends = `[${numberText(cell.lo, column)}, ${numberText(cell.hi, column)}]`;
    parts.push(" ", element("span", { class: "ends" }, ends));
  }
  if (typeof cell === "object" && "t" in cell) {
    parts.push(" ", element("span", { class: `note ${verdictClass(cell.t)}` }, cell.t));
  }
  const node = element("td", { class: "number" }, parts);
  if (column.shade) shade(node, value);
  return node;
}

function headNode(column, sortBy) {
  const down = state.sort === `-${column.name}`;
  const up = state.sort === column.name;
  const sign = element("span", { class: "sign", "aria-hidden": "true" }, up ? "\u25b2" : down ? "\u25bc" : "\u2195");
  const button = element("button",
    { type: "button", "data-column": column.name, onclick: () => sortBy(column.name) }, column.head, " ", sign);
  return element("th", {
    scope: "col",
    class: column.text ? null : "number",
    "aria-sort": up ? "ascending" : down ? "descending" : "none",
  }, button);
}

/** Draws a sheet into the box, and keeps the focus where it was. */
function drawTable(sheet, rows, sortBy) {
  const focused = document.activeElement?.dataset?.column;
  const columns = shownColumns(sheet);
  const box = byId("box");
  const body = rows.map((row) => element("tr", null, columns.map(([column, at], place) => cellNode(row.c[at], column, row, place === 0))));
  const heads = element("tr", null, columns.map(([column]) => headNode(column, sortBy)));
  const nothing = element("p", { class: "nothing" }, "No row fits the filters.");
  const table = element("table", null, element("thead", null, heads), element("tbody", null, body));
  box.replaceChildren(rows.length ? table : nothing);
  if (focused) box.querySelector(`[data-column="${CSS.escape(focused)}"]`)?.focus();
  const help = columns.filter(([column]) => column.help)
    .map(([column]) => [element("dt", null, column.head), element("dd", null, column.help)]);
  byId("meaning").hidden = !help.length;
  byId("meaning").querySelector("dl").replaceChildren(...help.flat());
}

const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
// a spreadsheet would compute a text that begins like a formula
const harmless = (text) => (/^[=+\-@\t]/.test(text) ? `'${text}` : text);

/** Returns the shown rows as CSV: numbers unrounded, ends of intervals and notes in own columns. */
function csv(sheet, rows) {
  const columns = [];
  for (const [column, at] of shownColumns(sheet)) {
    const cells = rows.map((row) => row.c[at]).filter((cell) => typeof cell === "object");
    const plain = (cell) => (isMissing(cell) ? cell.no : isNumber(cell) ? String(valueOf(cell)) : harmless(cell));
    columns.push([column.head, at, plain]);
    for (const [part, words] of [["lo", "from"], ["hi", "to"], ["t", "note"]]) {
      if (!cells.some((cell) => part in cell)) continue;
      columns.push([`${column.head}: ${words}`, at, (cell) => String(cell[part] ?? "")]);
    }
  }
  const lines = [columns.map(([head]) => head), ...rows.map((row) => columns.map(([, at, text]) => text(row.c[at])))];
  return lines.map((line) => line.map(quoted).join(",")).join("\r\n") + "\r\n";
}
