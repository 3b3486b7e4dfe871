"use strict";
// What is shown, kept in the hash of the page's address: #view=tasks&suite=ruler&sort=-loss

const VIEWS = new Map(DATA.views.map((view) => [view.name, view]));
const SUITE_NAMES = new Map(DATA.suites);
const AXES = new Map((VIEWS.get("scatter")?.data ?? []).map((axis) => [axis.name, axis]));
const DEPTHS = VIEWS.get("passkeys")?.data.depths ?? [];

const FIRST = {
  view: DATA.views[0].name,
  model: "",
  suite: "",
  scheme: "",
  family: [...DATA.families],
  min: "",
  max: "",
  q: "",
  sort: "",
  x: firstAxis("size") ?? [...AXES.keys()][0] ?? "",
  y: firstAxis("loss") ?? [...AXES.keys()][1] ?? "",
  depth: "",
};
const state = { ...FIRST, family: [...FIRST.family] };

function firstAxis(group) {
  return [...AXES.values()].find((axis) => axis.group === group)?.name;
}

/** Returns the columns by which a view can be sorted. */
function sortable(name) {
  const view = VIEWS.get(name);
  if (view.kind === "scatter") return ["scheme", "family", "x", "y", "front"];
  if (view.kind === "maps") return ["scheme", "family", ...view.data.tasks.map((_, at) => `length${at}`)];
  return view.data.columns.map((column) => column.name);
}

const CHECKS = {
  view: (value) => VIEWS.has(value),
  model: (value) => DATA.models.includes(value),
  suite: (value) => SUITE_NAMES.has(value),
  scheme: (value) => DATA.schemes.some((scheme) => scheme.key === value),
  family: (value) => value === "" || value.split(",").every((one) => DATA.families.includes(one)),
  min: (value) => Number.isFinite(Number.parseFloat(value)),
  max: (value) => Number.isFinite(Number.parseFloat(value)),
  q: () => true,
  sort: (value, found) => sortable(found.view).includes(value.replace(/^-/, "")),
  x: (value) => AXES.has(value),
  y: (value) => AXES.has(value),
  depth: (value) => Object.hasOwn(DEPTHS, value) && value !== "length",
};

/** Reads the hash into the state and returns what of it is not known here. */
function readHash(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const found = { ...FIRST, family: [...FIRST.family] };
  const unknown = [];
  for (const name of ["view", ...[...new Set(given.keys())].filter((key) => key !== "view")]) {
    const value = given.get(name);
    if (value === null) continue;
    if (!Object.hasOwn(CHECKS, name) || !CHECKS[name](value, found)) unknown.push(`${name}=${value}`);
    else found[name] = name === "family" ? value.split(",").filter(Boolean) : value;
  }
  Object.assign(state, found);
  return unknown;
}

/** Returns the hash of a state, without what is as at first. */
function hashOf(one) {
  const told = new URLSearchParams();
  for (const name of Object.keys(FIRST)) {
    const value = String(one[name]);
    if (value !== String(FIRST[name])) told.set(name, value);
  }
  return told.toString();
}

/** Keeps the state in the address; inside another page that may be refused, and the view stays. */
function keepInAddress(asNewEntry) {
  try {
    const hash = hashOf(state);
    const address = hash || location.hash ? `#${hash}` : location.href;
    if (asNewEntry) history.pushState(null, "", address);
    else history.replaceState(null, "", address);
  } catch {
    // an embedded copy without an address of its own
  }
}
