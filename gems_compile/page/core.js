"use strict";
// What the other scripts share: the data, the state, and a few helpers. Texts of users' programs
// become text nodes or are drawn on a canvas, so that none of them can be markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const TEXTS = DATA.texts;
const NAME = 0,
  OP = 1,
  RESULT = 2,
  FATE = 3,
  DETAIL = 4,
  LINE = 5,
  MODULE = 6,
  INPUTS = 7;

const state = { graph: 0, step: -1, tab: "graph", matches: null, match: -1, query: "" };

const $ = (id) => document.getElementById(id);
const graph = () => DATA.graphs[state.graph];

/** An element with properties, and with children that are elements or texts. */
function el(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  for (const child of children.flat()) if (child !== null) made.append(child);
  return made;
}

function bytes(n) {
  if (n < 0) return "\u2212" + bytes(-n);
  const units = ["B", "KB", "MB", "GB", "TB"];
  let k = 0;
  while (n >= 1000 && k < units.length - 1) {
    n /= 1000;
    k += 1;
  }
  return (k === 0 || n >= 100 ? n.toFixed(0) : n.toPrecision(3)) + " " + units[k];
}

function micros(us) {
  return us >= 1000 ? (us / 1000).toFixed(2) + " ms" : us.toFixed(us < 100 ? 1 : 0) + " \u00b5s";
}

const number = (n) => n.toLocaleString("en-US");
const moved = (box) => box.bytes[0] + box.bytes[1];
const saved = (box) => box.bytes[2] - moved(box);
const cost = (box) => (graph().measured ? box.us : moved(box));
const costText = (box) => (graph().measured ? micros(box.us) : bytes(moved(box)));

/** What a box is called: the ops that it fuses, since a kernel's name lists each step of them. */
function boxTitle(box) {
  return opsTitle(box.ops.map((k) => TEXTS[k])) || TEXTS[box.name];
}

const OVERLOAD = /\.(?:[A-Z]\w*|dim|dim_\w+|int|self|correction|memory_format)$/; // of "add.Tensor", not "mylib.scale"
const opsTitle = (ops) => [...new Set(ops.map((op) => op.replace(OVERLOAD, "")))].join(" + ");

/** The same for equal kernels, and for equal ATen calls of equal types for the same reason. */
const identity = (box) =>
  `${box.name} ${box.detail}` + (box.kind === "kernel" ? "" : ` ${box.reads} ${box.writes}`);

// prepared once a graph ------------------------------------------------------------------------

const PREPARED = new Map();

/** Neighbours of boxes, which boxes are equal, what a search looks at. */
function prepared() {
  const own = graph();
  if (PREPARED.has(own)) return PREPARED.get(own);
  const made = {
    before: own.boxes.map(() => []),
    after: own.boxes.map(() => []),
    refused: own.boxes.map(() => []),
    equal: new Map(),
    hues: new Map(),
    haystack: null,
    hubs: null,
  };
  for (const edge of own.edges) {
    made.after[edge[0]].push(edge);
    made.before[edge[1]].push(edge);
  }
  for (const edge of own.refused) {
    made.refused[edge[0]].push(edge);
    made.refused[edge[1]].push(edge);
  }
  made.hubs = own.boxes.map(
    (_, step) => made.before[step].length > 24 || made.after[step].length > 24,
  );
  own.boxes.forEach((box, step) => {
    const key = identity(box);
    if (!made.equal.has(key)) made.equal.set(key, []);
    made.equal.get(key).push(step);
    if (box.kind === "kernel" && !made.hues.has(box.detail))
      made.hues.set(box.detail, made.hues.size);
  });
  PREPARED.set(own, made);
  return made;
}

/** What is found of each box, in lower case; made at the first search. */
function haystack() {
  const made = prepared();
  if (made.haystack === null) {
    const nodes = graph().nodes.map((n) =>
      [n[NAME], n[OP], n[LINE], n[MODULE]].map((k) => TEXTS[k]).join("\n"),
    );
    made.haystack = graph().boxes.map((box) =>
      [
        TEXTS[box.name],
        TEXTS[box.detail],
        ...[...box.lines, ...box.modules].map((k) => TEXTS[k]),
        ...[...box.nodes, ...box.views].map((k) => nodes[k]),
      ]
        .join("\n")
        .toLowerCase(),
    );
  }
  return made.haystack;
}

// colours --------------------------------------------------------------------------------------

const HUES = [255, 150, 55, 310, 205, 95, 20, 180, 285, 125, 340, 230];
let CSS = {};

/** The colours of the scheme that is on, read again when it changes. */
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = [
    "back",
    "paper",
    "text",
    "soft",
    "rule",
    "accent",
    "band",
    "aten",
    "aten-rule",
    "aten-solid",
    "edge",
    "found",
    "warn",
    "good",
    "fill",
    "line",
    "solid",
  ];
  CSS = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** {fill, line, solid}: of a box with text in it, of its rim, and of one too small for text. */
function coloursOf(box) {
  const by = $("colour").value;
  if (by === "kernel") {
    if (box.kind === "aten")
      return { fill: CSS.aten, line: CSS["aten-rule"], solid: CSS["aten-solid"] };
    return ofHue(HUES[prepared().hues.get(box.detail) % HUES.length]);
  }
  const most = largest(by);
  const share = most > 0 ? Math.max(by === "saved" ? saved(box) : cost(box), 0) / most : 0;
  if (share === 0) return { fill: CSS.paper, line: CSS["aten-rule"], solid: CSS["aten-solid"] };
  const [hue, strong] = [by === "saved" ? 150 : 40, Math.sqrt(share)];
  return {
    fill: oklch("fill", hue, 0.4 + 2.4 * strong),
    line: oklch("line", hue, 1),
    solid: oklch("solid", hue, 0.15 + 1.4 * strong),
  };
}

function largest(by) {
  const made = prepared();
  const key = `most ${by}`;
  if (!(key in made))
    made[key] = graph().boxes.reduce((m, b) => Math.max(m, by === "saved" ? saved(b) : cost(b)), 0);
  return made[key];
}

function ofHue(hue) {
  return {
    fill: oklch("fill", hue, 1),
    line: oklch("line", hue, 1),
    solid: oklch("solid", hue, 1),
  };
}

function oklch(name, hue, strength) {
  const [light, chroma] = CSS[name].split(" ").map(Number);
  return `oklch(${light} ${(chroma * strength).toFixed(4)} ${hue})`;
}
