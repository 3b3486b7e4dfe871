"use strict";
// Accuracy against cost: one marker per scheme, the frontier, and what a marker stands for.

const MARGIN = { left: 58, right: 18, top: 14, bottom: 28 };
const GREY = "#555";

/** Returns the model whose schemes are drawn: the chosen one, or the first. */
function scatterModel() {
  return Math.max(0, DATA.models.indexOf(state.model));
}

/** Returns the points of schemes that have both coordinates, and which have not. */
function scatterPoints() {
  const [x, y] = [AXES.get(state.x), AXES.get(state.y)];
  const model = scatterModel();
  const of = (axis) => new Map(axis.points.filter(([m]) => m === model).map(([, s, cell]) => [s, cell]));
  const why = (axis, scheme) => Object.entries(axis.none)
    .find(([, pairs]) => pairs.some(([m, s]) => m === model && s === scheme))?.[0];
  const [xs, ys] = [of(x), of(y)];
  const points = [];
  const lacking = [];
  DATA.schemes.forEach((scheme, s) => {
    if (xs.has(s) && ys.has(s)) points.push({ s, scheme, x: xs.get(s), y: ys.get(s), ...who(model, s) });
    else lacking.push([scheme, why(xs.has(s) ? y : x, s)]);
  });
  return { points, lacking };
}

/** Marks the points that another one beats: at least as good on both axes, better on one. */
function markBeaten(points) {
  const cost = (cell, axis) => (axis.more ? -valueOf(cell) : valueOf(cell));
  const costs = points.map((p) => [cost(p.x, AXES.get(state.x)), cost(p.y, AXES.get(state.y))]);
  points.forEach((point, i) => {
    point.by = points.filter((_, j) => costs[j].every((c, k) => c <= costs[i][k])
      && costs[j].some((c, k) => c < costs[i][k])).map((p) => p.scheme.name);
  });
}

/** Returns the table of the points, which is the legend as well. */
function scatterSheet() {
  const { points } = scatterPoints();
  const [x, y] = [AXES.get(state.x), AXES.get(state.y)];
  const columns = [
    { name: "scheme", head: "scheme", text: true },
    { name: "family", head: "family", text: true },
    { name: "x", head: x.label, help: x.help, signed: x.loss, digits: x.digits },
    { name: "y", head: y.label, help: y.help, signed: y.loss, digits: y.digits },
    { name: "front", head: "frontier", help: "Among the schemes shown, on these two axes.", text: true },
  ];
  const rows = points.map((p) => ({ ...p, c: [p.scheme.name, p.scheme.family, p.x, p.y, ""] }));
  return { columns, rows };
}

/** Says in each row whether another one beats it. */
function sayBeaten(rows) {
  markBeaten(rows);
  for (const row of rows) row.c[4] = row.by.length ? "beaten" : "on the frontier";
}

// --- scales

function scaleOf(axis, values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (axis.loss) {
    const bend = (v) => Math.sign(v) * (Math.abs(v) <= 1 ? 0.7 * Math.abs(v) : 0.7 + Math.log10(Math.abs(v)));
    return { bend, low, high, round: true };
  }
  if (low > 0 && (axis.group === "size" || high / low > 20)) return { bend: Math.log10, low, high, round: true };
  return { bend: (v) => v, low, high, round: false };
}

/** Returns ticks that are at least `apart` pixels from one another, the roundest first. */
function ticksOf(scale, place, apart) {
  const found = [];
  const take = (value) => {
    const at = place(value);
    if (found.every((other) => Math.abs(place(other) - at) >= apart)) found.push(value);
  };
  if (!scale.round) {
    const size = (scale.high - scale.low) || Math.abs(scale.high) || 1;
    const raw = size / 5;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((n) => n * power >= raw) * power;
    for (let k = Math.ceil(scale.low / step - 1e-9); k * step <= scale.high + 1e-9 * step; k += 1) {
      take(Number((k * step).toPrecision(12)));
    }
    return found;
  }
  const inside = (v) => v >= scale.low - 1e-12 && v <= scale.high + 1e-12;
  const rounds = [1, 5, 2, 3, 8, 4, 6, 1.6, 7, 1.2, 2.5];
  if (inside(0) && scale.bend(0) === 0) take(0);
  for (const n of rounds) {
    for (let power = -4; power <= 12; power += 1) {
      for (const sign of [1, -1]) {
        const value = sign * Number((n * 10 ** power).toPrecision(6));
        if (inside(value) && (sign > 0 || scale.bend(-1) < 0)) take(value);
      }
    }
  }
  return found;
}

const better = (axis) => (axis.more ? "more is better" : "less is better");
const tickText = (value) => numberText(value, {});

/** Returns a function from values to pixels. */
function placing(scale, from, to) {
  const [low, high] = [scale.bend(scale.low), scale.bend(scale.high)];
  const size = (high - low) || 1;
  const [first, last] = [low - 0.05 * size, high + 0.05 * size];
  return (value) => from + ((scale.bend(value) - first) / (last - first)) * (to - from);
}

// --- drawing

function ends(cell) {
  return typeof cell === "object" && "lo" in cell ? [cell.lo, cell.hi] : [];
}

function describe(point) {
  const [x, y] = [AXES.get(state.x), AXES.get(state.y)];
  const say = (axis, cell) => `${axis.label}: ${cellText(cell, { signed: axis.loss, digits: axis.digits })}`;
  const rank = point.by.length ? `beaten by ${point.by.length} of the schemes shown` : "on the frontier";
  return [point.scheme.name, say(x, point.x), say(y, point.y), rank];
}

/** Shows what a marker stands for below the drawing. */
function showDetails(point) {
  const [name, ...facts] = describe(point);
  const beaten = point.by.length ? [element("li", null, `beaten by ${point.by.join("; ")}`)] : [];
  const lines = facts.slice(0, beaten.length ? 2 : 3).map((text) => element("li", null, text));
  const target = { ...FIRST, view: "tasks", scheme: point.scheme.key };
  byId("details").replaceChildren(
    element("p", null, icon(point.scheme), element("strong", null, name)),
    element("ul", null, lines, beaten),
    element("p", null, element("a", { href: `#${hashOf(target)}`, onclick: (event) => follow(event, target) },
      "All evaluations of this scheme")),
  );
}

/** Draws the shown points, and returns the drawing. */
function scatterDrawing(points, width) {
  const [x, y] = [AXES.get(state.x), AXES.get(state.y)];
  const height = Math.round(Math.min(460, Math.max(300, width * 0.6)));
  const values = (key) => points.flatMap((p) => [valueOf(p[key]), ...ends(p[key])]);
  const [sx, sy] = [scaleOf(x, values("x")), scaleOf(y, values("y"))];
  const px = placing(sx, MARGIN.left, width - MARGIN.right);
  const py = placing(sy, height - MARGIN.bottom, MARGIN.top);
  const floor = height - MARGIN.bottom;
  const line = (x1, y1, x2, y2, more) => drawn("line", { x1, y1, x2, y2, stroke: "#ddd", ...more });
  const text = (content, attributes) => drawn("text", { fill: "#333", "font-size": 12, ...attributes }, content);
  const back = drawn("g", { "aria-hidden": "true" });
  for (const tick of ticksOf(sx, px, 44)) {
    back.append(line(px(tick), MARGIN.top, px(tick), floor),
      text(tickText(tick), { x: px(tick), y: floor + 17, "text-anchor": "middle" }));
  }
  for (const tick of ticksOf(sy, py, 26)) {
    back.append(line(MARGIN.left, py(tick), width - MARGIN.right, py(tick)),
      text(tickText(tick), { x: MARGIN.left - 7, y: py(tick) + 4, "text-anchor": "end" }));
  }
  back.append(line(MARGIN.left, floor, width - MARGIN.right, floor, { stroke: GREY }),
    line(MARGIN.left, MARGIN.top, MARGIN.left, floor, { stroke: GREY }));
  const front = points.filter((p) => !p.by.length).sort((a, b) => valueOf(a.x) - valueOf(b.x) || valueOf(a.y) - valueOf(b.y));
  back.append(drawn("polyline", { class: "front", fill: "none", stroke: "#777", "stroke-width": 1.5,
    points: front.map((p) => `${px(valueOf(p.x)).toFixed(1)},${py(valueOf(p.y)).toFixed(1)}`).join(" ") }));
  for (const p of points) {
    const [cx, cy] = [px(valueOf(p.x)), py(valueOf(p.y))];
    const bar = { stroke: p.scheme.color, "stroke-width": 1.2 };
    const [[xl, xh], [yl, yh]] = [ends(p.x), ends(p.y)];
    if (xl !== undefined) back.append(line(px(xl), cy, px(xh), cy, bar));
    if (yl !== undefined) back.append(line(cx, py(yl), cx, py(yh), bar));
  }
  const marks = drawn("g", { role: "group", "aria-label": "Schemes; arrow keys go from marker to marker" });
  const inOrder = [...points].sort((a, b) => valueOf(a.x) - valueOf(b.x) || valueOf(a.y) - valueOf(b.y));
  const drawOrder = [...inOrder.filter((p) => p.by.length), ...inOrder.filter((p) => !p.by.length)];
  const nodes = new Map();
  const focusOn = (at) => {
    const next = inOrder[(at + inOrder.length) % inOrder.length];
    for (const [point, node] of nodes) node.setAttribute("tabindex", point === next ? "0" : "-1");
    nodes.get(next).focus();
  };
  const keys = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  for (const p of drawOrder) {
    const [cx, cy] = [px(valueOf(p.x)), py(valueOf(p.y))];
    const at = inOrder.indexOf(p);
    const node = drawn("g", {
      class: "mark",
      role: "button",
      tabindex: at === 0 ? "0" : "-1",
      transform: `translate(${cx.toFixed(1)},${cy.toFixed(1)})`,
      "aria-label": describe(p).join(", "),
      "data-scheme": p.scheme.key,
      "aria-describedby": "details",
      onfocus: () => showDetails(p),
      onmouseenter: () => showDetails(p),
      onclick: () => { focusOn(at); showDetails(p); },
      onkeydown: (event) => {
        if (event.key in keys) focusOn(at + keys[event.key]);
        else if (event.key === "Home") focusOn(0);
        else if (event.key === "End") focusOn(inOrder.length - 1);
        else if (event.key === "Enter" || event.key === " ") byId("details").querySelector("a").focus();
        else return;
        event.preventDefault();
      },
    }, drawn("circle", { class: "ring", r: 12 }), markerShapes(p.scheme, 6, p.by.length > 0));
    nodes.set(p, node);
    marks.append(node);
  }
  const label = `${y.label} (${better(y)}) against ${x.label} (${better(x)})`;
  return drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": label }, back, marks);
}

/** Draws points, labels of axes, details, and the schemes that have no point. */
function drawScatter(points) {
  const drawing = byId("drawing");
  const [x, y] = [AXES.get(state.x), AXES.get(state.y)];
  if (!points.length) {
    drawing.replaceChildren(element("p", { class: "nothing" }, "No scheme has a number on both axes with these filters."));
    return;
  }
  const width = Math.max(280, Math.min(900, Math.floor(drawing.clientWidth) - 2));
  const absent = scatterPoints().lacking.filter(([scheme]) => state.family.includes(scheme.family));
  const list = absent.map(([scheme, why]) => element("li", null, `${scheme.name}: ${why}`));
  const model = DATA.models.length > 1 ? `${DATA.models[scatterModel()]}. ` : "";
  const plot = element("div", { class: "plot" },
    element("p", { class: "axis" }, `${model}Vertical: ${y.label} (${better(y)})`),
    scatterDrawing(points, width),
    element("p", { class: "axis right" }, `Horizontal: ${x.label} (${better(x)})`));
  const hint = "Point at a marker, or go to it by keyboard, to see what it stands for.";
  drawing.replaceChildren(
    element("div", { class: "pair" }, plot,
      element("div", { id: "details", class: "details" }, element("p", null, hint))),
    ...(list.length ? [element("details", null, element("summary", null, `Not drawn for want of a number: ${list.length} schemes`), element("ul", null, list))] : []),
  );
}

/** Returns the choices of both axes. */
function scatterChoices(change) {
  const groups = { size: "Size", score: "Score", loss: "Loss", speed: "Speed", energy: "Energy", memory: "Memory" };
  const options = Object.entries(groups)
    .map(([group, words]) => [words, [...AXES.values()].filter((axis) => axis.group === group).map((axis) => [axis.name, axis.label])])
    .filter(([, inside]) => inside.length);
  return [choice("x", "Horizontal axis", options, change), choice("y", "Vertical axis", options, change)];
}
