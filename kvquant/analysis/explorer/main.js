"use strict";
// The page: its facts, tabs and filters, and what they show.

const controls = {};

/** Returns a labelled select; options are [value, words], or [words, options] of a group. */
function choice(name, words, options, change) {
  const one = ([value, text]) => element("option", { value, selected: state[name] === value }, text);
  const inside = options.map(([first, second]) => (Array.isArray(second)
    ? element("optgroup", { label: first }, second.map(one)) : one([first, second])));
  const select = element("select", { name, id: `choose-${name}`, onchange: (event) => change(name, event.target.value) }, inside);
  return element("label", { for: `choose-${name}` }, words, select);
}

function change(name, value) {
  state[name] = value;
  keepInAddress(false);
  render();
}

/** Follows a link to another state without leaving the page, also inside another page. */
function follow(event, target) {
  event.preventDefault();
  Object.assign(state, target, { family: [...target.family] });
  keepInAddress(true);
  say([]);
  render();
  if (document.activeElement === document.body) byId("results").focus();
}

function sortBy(column) {
  const next = { "": column, [column]: `-${column}`, [`-${column}`]: "" };
  change("sort", next[state.sort] ?? column);
}

function say(unknown) {
  byId("problems").textContent = unknown.length
    ? `Not known on this page and left out of the view: ${unknown.join(", ")}` : "";
}

function facts() {
  const counts = DATA.counts.map(({ what, there, asked }) => {
    const number = (n) => n.toLocaleString("en");
    return `${number(there)} of ${number(asked)} ${what}`;
  });
  const claims = VIEWS.get("claims").data;
  const at = claims.columns.findIndex((column) => column.name === "verdict");
  const verdicts = DATA.verdicts
    .map((verdict) => [verdict, claims.rows.filter((row) => row.c[at] === verdict).length])
    .filter(([, count]) => count).map(([verdict, count]) => `${count} ${verdict}`);
  const target = { ...FIRST, view: "claims" };
  const link = element("a", { href: `#${hashOf(target)}`, onclick: (event) => follow(event, target) }, "Claims");
  const timed = DATA.devices.length ? ` Timed on ${DATA.devices.join(" and ")}.` : "";
  byId("facts").replaceChildren(`Measured: ${counts.join(", ")}.${timed} `, link, `: ${verdicts.join(", ") || "none"}.`);
}

function filters() {
  const number = (name, words) => element("label", null, words,
    element("input", { type: "number", name, min: 0, max: 32, step: "any", inputmode: "decimal", oninput: (event) => change(name, event.target.value) }));
  const family = DATA.families.map((name) => element("label", { class: "check" },
    element("input", { type: "checkbox", name: "family", value: name, onchange: () => {
      const boxes = [...controls.family.querySelectorAll("input")];
      change("family", boxes.filter((box) => box.checked).map((box) => box.value));
    } }), name));
  controls.q = element("label", null, "Search",
    element("input", { type: "search", name: "q", placeholder: "scheme, task, verdict", oninput: (event) => change("q", event.target.value) }));
  controls.model = choice("model", "Model", [["", "all models"], ...DATA.models.map((name) => [name, name])], change);
  controls.suite = choice("suite", "Suite", [["", "all suites"], ...DATA.suites], change);
  const names = DATA.schemes.map(({ key, name }) => [key, name]);
  controls.scheme = choice("scheme", "Scheme", [["", "all schemes"], ...names], change);
  controls.family = element("fieldset", null, element("legend", null, "Family"), family);
  controls.bits = element("fieldset", null, element("legend", null, "Bits per element"), number("min", "from"), number("max", "to"));
  const reset = element("button", { type: "button", id: "reset", onclick: () => {
    Object.assign(state, FIRST, { family: [...FIRST.family], view: state.view, x: state.x, y: state.y });
    keepInAddress(false);
    say([]);
    render();
  } }, "Reset filters and order");
  byId("filters").append(controls.q, controls.model, controls.suite, controls.scheme, controls.family, controls.bits, reset);
  byId("panel").open = innerWidth >= 700;
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
}

/** Makes controls say what the state says; those that mean nothing in a view are not there. */
function sync(sheet) {
  const use = applicable(sheet);
  for (const name of ["model", "suite", "scheme", "family", "bits"]) controls[name].hidden = !use[name];
  const set = (box, value) => {
    if (box.value !== value && !(box.type === "number" && box === document.activeElement)) box.value = value;
  };
  set(controls.q.querySelector("input"), state.q);
  set(controls.model.querySelector("select"), state.model);
  set(controls.suite.querySelector("select"), state.suite);
  set(controls.scheme.querySelector("select"), state.scheme);
  for (const name of ["min", "max"]) set(controls.bits.querySelector(`[name=${name}]`), state[name]);
  for (const box of controls.family.querySelectorAll("input")) box.checked = state.family.includes(box.value);
  byId("views").replaceChildren(...DATA.views.map((view) => {
    const target = { ...state, view: view.name, sort: "" };
    const here = view.name === state.view;
    return element("li", null, element("a", { href: `#${hashOf(target)}`, "data-view": view.name,
      "aria-current": here ? "page" : null, onclick: (event) => follow(event, target) }, view.label));
  }));
  return use;
}

/** Returns the filters in use, in words. */
function inUse(use) {
  const words = [];
  if (use.model && state.model) words.push(state.model);
  if (use.suite && state.suite) words.push(SUITE_NAMES.get(state.suite));
  if (use.scheme && state.scheme) words.push(DATA.schemes.find((one) => one.key === state.scheme).name);
  if (use.family && state.family.length < DATA.families.length) words.push(state.family.join(" and ") || "no schemes");
  if (use.bits && state.min !== "") words.push(`from ${state.min} bits`);
  if (use.bits && state.max !== "") words.push(`up to ${state.max} bits`);
  if (state.q) words.push(`with "${state.q}"`);
  return words;
}

let shown = { sheet: null, rows: [] };

function render() {
  const view = VIEWS.get(state.view);
  const focused = document.activeElement?.dataset?.view;
  const empty = view.kind === "scatter" && AXES.size < 2;
  const sheet = empty ? { columns: [], rows: [] }
    : view.kind === "scatter" ? scatterSheet() : view.kind === "maps" ? mapSheet(view) : view.data;
  const use = sync(sheet);
  if (focused) byId("views").querySelector(`[data-view="${CSS.escape(focused)}"]`)?.focus();
  byId("head").textContent = view.label;
  byId("caption").textContent = view.caption;
  const { rows, withoutBits } = filtered(sheet);
  if (view.kind === "scatter") sayBeaten(rows);
  const inOrder = ordered(sheet, rows);
  const told = inUse(use);
  const noun = view.kind === "table" ? "rows" : "schemes";
  const count = `${rows.length.toLocaleString("en")} of ${sheet.rows.length.toLocaleString("en")} ${noun}`;
  const hidden = withoutBits ? `; ${withoutBits} rows without measured bits are left out` : "";
  byId("status").textContent = `${view.label}: ${count}${told.length ? `: ${told.join(", ")}` : ""}${hidden}`;
  const choices = empty ? [] : view.kind === "scatter" ? scatterChoices : view.kind === "maps" ? mapChoices : null;
  const before = document.activeElement?.id;
  byId("choices").replaceChildren(...(typeof choices === "function" ? choices(change) : []));
  if (before?.startsWith("choose-")) byId(before)?.focus();
  if (view.kind === "scatter" && !empty) drawScatter(rows);
  else byId("drawing").replaceChildren(...(empty ? [element("p", { class: "nothing" }, "No two measures have two schemes with a number yet.")] : []));
  drawTable(sheet, inOrder, sortBy);
  shown = { sheet, rows: inOrder };
  document.title = `${view.label}: ${DATA.title}`;
}

function save() {
  const blob = new Blob([csv(shown.sheet, shown.rows)], { type: "text/csv;charset=utf-8" });
  const address = URL.createObjectURL(blob);
  const link = element("a", { href: address, download: `${DATA.study}-${state.view}.csv` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function fromAddress() {
  say(readHash(location.hash));
  // what narrows a view is in sight where it came with a link
  if (["q", "suite", "scheme", "min", "max", "model"].some((name) => state[name] !== "")) byId("panel").open = true;
  render();
}

facts();
filters();
byId("save").addEventListener("click", save);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("results").focus();
});
addEventListener("hashchange", fromAddress);
addEventListener("popstate", fromAddress);
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === lastWidth || VIEWS.get(state.view).kind !== "scatter") return;
  lastWidth = innerWidth;
  render();
});
fromAddress();
