"use strict";
// Passkey maps: a table of schemes by prompt length, whose cells are shaded by their share.

function luminance(color) {
  const [r, g, b] = [1, 3, 5].map((at) => {
    const part = Number.parseInt(color.slice(at, at + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Gives a cell the color of its percentage, with the text in what contrasts more. */
function shade(node, percent) {
  const shades = VIEWS.get("passkeys").data.shades;
  const color = shades[Math.round((Math.min(100, Math.max(0, percent)) / 100) * (shades.length - 1))];
  node.classList.add("shade");
  node.style.backgroundColor = color;
  // contrast with black is (L + 0.05) / 0.05, with white 1.05 / (L + 0.05)
  node.style.color = (luminance(color) + 0.05) ** 2 > 0.05 * 1.05 ? "#000" : "#fff";
}

/** Returns the sheet of the maps: a row per model and scheme, a column per prompt length. */
function mapSheet(view) {
  const { tasks, maps } = view.data;
  const at = state.depth === "" ? 0 : 1 + Number(state.depth);
  const models = DATA.models.length > 1;
  const columns = [
    ...(models ? [{ name: "model", head: "model", text: true }] : []),
    { name: "scheme", head: "scheme", text: true },
    { name: "family", head: "family", text: true },
    ...tasks.map((head, i) => ({ name: `length${i}`, head, digits: 1, shade: true })),
  ];
  const rows = maps.map((map) => ({
    ...who(map.m, map.s),
    c: [
      ...(models ? [DATA.models[map.m]] : []),
      DATA.schemes[map.s].name,
      DATA.schemes[map.s].family,
      ...map.rows[at],
    ],
  }));
  return { columns, rows };
}

const BITS = new Map((VIEWS.get("schemes")?.data.rows ?? []).filter((row) => "b" in row)
  .map((row) => [`${row.m} ${row.s}`, row.b]));

/** Returns the keys of a row of a model and a scheme: with its bits, where they are known. */
function who(model, scheme) {
  const bits = BITS.get(`${model} ${scheme}`);
  return bits === undefined ? { m: model, s: scheme } : { m: model, s: scheme, b: bits };
}

/** Returns the choice of the key's depth. */
function mapChoices(change) {
  const options = [["", "all depths"], ...DEPTHS.map((words, at) => [String(at), words])];
  return [choice("depth", "Depth of the key in the prompt", options, change)];
}
