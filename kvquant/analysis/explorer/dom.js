"use strict";
// Elements are made from names, attributes and texts alone, so that no text of the study is parsed.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Returns an HTML element. */
function element(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Returns an SVG element. */
function drawn(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function byId(id) {
  return document.getElementById(id);
}

// Corners of markers of radius 1, by Matplotlib's names: [x, y] of each corner.
const THIRD = 1 / 3;
const CORNERS = {
  s: [[-0.85, -0.85], [0.85, -0.85], [0.85, 0.85], [-0.85, 0.85]],
  "^": [[0, -1], [1, 0.85], [-1, 0.85]],
  v: [[0, 1], [1, -0.85], [-1, -0.85]],
  "<": [[-1, 0], [0.85, -1], [0.85, 1]],
  ">": [[1, 0], [-0.85, -1], [-0.85, 1]],
  D: [[0, -1.15], [1.15, 0], [0, 1.15], [-1.15, 0]],
  d: [[0, -1.2], [0.7, 0], [0, 1.2], [-0.7, 0]],
  P: [[-THIRD, -1], [THIRD, -1], [THIRD, -THIRD], [1, -THIRD], [1, THIRD], [THIRD, THIRD],
    [THIRD, 1], [-THIRD, 1], [-THIRD, THIRD], [-1, THIRD], [-1, -THIRD], [-THIRD, -THIRD]],
  X: [[-1, -0.5], [-0.5, -1], [0, -0.5], [0.5, -1], [1, -0.5], [0.5, 0], [1, 0.5], [0.5, 1],
    [0, 0.5], [-0.5, 1], [-1, 0.5], [-0.5, 0]],
  p: turned(5, () => 1.05),
  "*": turned(10, (at) => (at % 2 ? 0.5 : 1.25)),
};

function turned(count, radius) {
  return Array.from({ length: count }, (_, at) => {
    const angle = (2 * Math.PI * at) / count - Math.PI / 2;
    return [radius(at) * Math.cos(angle), radius(at) * Math.sin(angle)];
  });
}

/** Returns the path of a scheme's marker around 0. */
function markerPath(marker, radius) {
  if (!(marker in CORNERS)) {
    const r = radius.toFixed(2);
    return `M-${r},0a${r},${r} 0 1,0 ${2 * radius},0a${r},${r} 0 1,0 -${2 * radius},0Z`;
  }
  const corners = CORNERS[marker].map(([x, y]) => `${(x * radius).toFixed(2)},${(y * radius).toFixed(2)}`);
  return `M${corners.join("L")}Z`;
}

/** Returns a scheme's marker as shapes: hollow ones are white inside; a dark line bounds both. */
function markerShapes(scheme, radius, hollow) {
  const path = markerPath(scheme.marker, radius);
  if (!hollow) return [drawn("path", { d: path, fill: scheme.color, stroke: "#222", "stroke-width": 0.8 })];
  return [
    drawn("path", { d: path, fill: "#fff", stroke: "#222", "stroke-width": 3.4 }),
    drawn("path", { d: path, fill: "#fff", stroke: scheme.color, "stroke-width": 2.2 }),
  ];
}

/** Returns the small picture of a scheme's marker beside its name. */
function icon(scheme) {
  return drawn("svg", { class: "icon", viewBox: "-8 -8 16 16", "aria-hidden": "true" },
    markerShapes(scheme, 5.2, false));
}
