// The graph on a canvas: what is out of sight is not drawn, and what is too small has no text.

const view = { x: 0, y: 0, scale: 1, width: 0, height: 0, hover: -1, asked: false };
const { width: WIDTH, head: HEAD, line: STEP, gutter: GUTTER, label: LABEL } = DATA.size;
const TITLES = 0.26,
  OPS = 0.6,
  TYPES = 1.15; // scales from which a box shows them
const canvas = $("canvas");
const pen = canvas.getContext("2d");
const SANS = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const MONO = 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';

function redraw() {
  if (view.asked) return;
  view.asked = true;
  requestAnimationFrame(() => {
    view.asked = false;
    draw();
    drawStrip();
  });
}

/** Give a canvas as many pixels as it covers; its pen then counts in CSS pixels. */
function sized(of, ink) {
  const box = of.getBoundingClientRect(),
    dense = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(box.width * dense), Math.round(box.height * dense)];
  if (of.width !== w || of.height !== h) {
    of.width = w;
    of.height = h;
  }
  ink.setTransform(dense, 0, 0, dense, 0, 0);
  return [box.width, box.height];
}

function draw() {
  if (state.tab !== "graph") return;
  [view.width, view.height] = sized(canvas, pen);
  pen.fillStyle = CSS.back;
  pen.fillRect(0, 0, view.width, view.height);
  pen.save();
  pen.scale(view.scale, view.scale);
  pen.translate(-view.x, -view.y);
  drawLanes();
  drawEdges();
  drawBoxes();
  pen.restore();
  drawLabels();
}

/** The part of the world in sight: left, top, right, bottom. */
function sight() {
  return [view.x, view.y, view.x + view.width / view.scale, view.y + view.height / view.scale];
}

function drawLanes() {
  const [left, top, right, bottom] = sight();
  pen.fillStyle = CSS.band;
  pen.strokeStyle = CSS.rule;
  pen.lineWidth = Math.max(1, 0.5 / view.scale);
  for (const [, x, y, w, h] of graph().lanes) {
    if (x > right || x + w < left || y > bottom || y + h < top) continue;
    pen.beginPath();
    pen.rect(x - 12, y - 2, w + 24, h + 12);
    pen.fill();
    pen.stroke();
  }
}

/** A lane's name keeps its size; it stands left of the lane's boxes, or at the window's edge. */
function drawLabels() {
  const size = Math.min(Math.max(view.scale * 34, 9), 13),
    room = (GUTTER - 16) * view.scale;
  pen.textBaseline = "top";
  pen.font = `600 ${size}px ${SANS}`;
  for (const [label, x, y, w, h] of graph().lanes) {
    const left = (x - view.x) * view.scale,
      right = left + w * view.scale;
    const top = (y - view.y) * view.scale,
      bottom = top + h * view.scale;
    if (
      left > view.width ||
      right < 30 ||
      top > view.height ||
      bottom < size ||
      bottom - top < size
    )
      continue;
    const at = Math.min(Math.max(top + LABEL * view.scale, 3), bottom - size - 2);
    if (left + room < 4) written(label || "the whole", 4, at, size, true);
    else if (room > 8)
      written(shortened(label || "the whole", room), Math.max(left, 0), at, size, false);
  }
}

function written(text, x, y, size, over) {
  if (over) {
    pen.fillStyle = CSS.paper;
    pen.fillRect(x - 2, y - 2, pen.measureText(text).width + 8, size + 5);
  }
  pen.fillStyle = CSS.soft;
  pen.fillText(text, x + 2, y);
}

/** A path, or where that is too long its last part. */
function shortened(path, room) {
  if (pen.measureText(path).width <= room) return path;
  const last = path.slice(path.lastIndexOf(".") + 1);
  return pen.measureText(last).width <= room ? last : fitted(last, room);
}

// edges ------------------------------------------------------------------------------------------

/** Those of a value that very many read, or of a call that reads very many, only where chosen. */
function drawEdges() {
  const own = graph(),
    chosen = state.step,
    { hubs } = prepared();
  const near = new Path2D(),
    far = new Path2D(),
    before = new Path2D(),
    after = new Path2D(),
    refused = new Path2D();
  for (const edge of own.edges) {
    const [a, b] = edge;
    if (a === chosen) trace(after, edge);
    else if (b === chosen) trace(before, edge);
    else if (!hubs[a] && !hubs[b]) trace(b - a < 16 ? near : far, edge);
  }
  for (const edge of own.refused) trace(refused, edge);
  const width = 1 / view.scale,
    dim = (view.scale < 0.15 ? 0.5 : 1) * (state.matches === null ? 1 : 0.35);
  stroke(near, CSS.edge, Math.min(Math.max(width, 1.2), 6), 0.8 * dim);
  stroke(far, CSS.edge, Math.min(Math.max(width, 1.2), 6), 0.35 * dim);
  pen.setLineDash([5 * Math.max(1, width / 2), 4 * Math.max(1, width / 2)]);
  stroke(refused, CSS.warn, Math.min(Math.max(width, 1.6), 7), 0.85 * dim);
  pen.setLineDash([]);
  stroke(before, CSS.accent, Math.max(2 * width, 2.2), 1);
  stroke(after, CSS.good, Math.max(2 * width, 2.2), 1);
}

function trace(path, [a, b]) {
  const one = graph().boxes[a].at,
    two = graph().boxes[b].at,
    [left, top, right, bottom] = sight();
  const x0 = one[0] + WIDTH,
    y0 = one[1] + HEAD / 2,
    x1 = two[0],
    y1 = two[1] + HEAD / 2;
  if (
    Math.max(x0, x1) < left ||
    Math.min(x0, x1) > right ||
    Math.max(y0, y1) < top ||
    Math.min(y0, y1) > bottom
  )
    return;
  path.moveTo(x0, y0);
  if (view.scale < 0.15) return path.lineTo(x1, y1);
  const bend = x1 > x0 ? Math.min(Math.max((x1 - x0) / 2, 20), 120) : 60;
  path.bezierCurveTo(x0 + bend, y0, x1 - bend, y1, x1, y1);
}

function stroke(path, colour, width, alpha) {
  pen.globalAlpha = alpha;
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.stroke(path);
  pen.globalAlpha = 1;
}

// boxes ------------------------------------------------------------------------------------------

function drawBoxes() {
  const [left, top, right, bottom] = sight();
  graph().boxes.forEach((box, step) => {
    const [x, y, h] = box.at;
    if (x > right || x + WIDTH < left || y > bottom || y + h < top) return;
    const matched = state.matches === null || state.matches.has(step);
    pen.globalAlpha = matched ? 1 : 0.22;
    const colours = coloursOf(box);
    if (view.scale < TITLES) {
      pen.fillStyle = colours.solid;
      pen.fillRect(x, y, WIDTH, h);
    } else drawBox(box, colours, x, y, h);
    rim(box, step, x, y, h, matched);
    pen.globalAlpha = 1;
  });
}

function drawBox(box, colours, x, y, h) {
  pen.fillStyle = colours.fill;
  pen.strokeStyle = colours.line;
  pen.lineWidth = 1.4;
  pen.beginPath();
  pen.roundRect(x, y, WIDTH, h, box.kind === "kernel" ? 5 : 0);
  pen.fill();
  if (box.kind === "aten") pen.setLineDash([4, 3]);
  pen.stroke();
  pen.setLineDash([]);
  pen.textBaseline = "alphabetic";
  pen.fillStyle = CSS.text;
  const large = Math.max(12, 9 / view.scale);
  pen.font = `600 ${large}px ${SANS}`;
  pen.fillText(fitted(boxTitle(box), WIDTH - 12), x + 7, y + 5 + large);
  if (view.scale < OPS) return;
  pen.fillStyle = CSS.soft;
  pen.font = `10.5px ${SANS}`;
  const less = saved(box) > 0 ? `, saves ${bytes(saved(box))}` : "";
  pen.fillText(
    fitted((box.kind === "aten" ? "ATen  " : "kernel  ") + costText(box) + less, WIDTH - 16),
    x + 8,
    y + 31,
  );
  drawOps(box, x, y, h);
}

function drawOps(box, x, y, h) {
  const room = Math.round((h - HEAD) / STEP),
    lines = box.nodes.length + (box.views.length > 0);
  let line = y + HEAD + 8;
  box.nodes.slice(0, lines > room ? room - 1 : room).forEach((k) => {
    const node = graph().nodes[k];
    pen.font = `11px ${MONO}`;
    pen.fillStyle = CSS.text;
    const op = fitted(TEXTS[node[OP]], WIDTH - 16);
    pen.fillText(op, x + 8, line);
    if (view.scale >= TYPES) {
      const from = x + 14 + pen.measureText(op).width,
        left = x + WIDTH - 8 - from;
      pen.font = `9.5px ${MONO}`;
      pen.fillStyle = CSS.soft;
      if (left > 30) pen.fillText(fitted(TEXTS[node[RESULT]], left), from, line);
    }
    line += STEP;
  });
  pen.font = `10.5px ${SANS}`;
  pen.fillStyle = CSS.soft;
  if (lines > room) pen.fillText(`and ${lines - room + 1} more`, x + 8, line);
  else if (box.views.length > 0)
    pen.fillText(`${box.views.length} view${box.views.length > 1 ? "s" : ""}`, x + 8, line);
}

const WIDTHS = new Map();

/** The text, or its start and end where it is too long; measured once. */
function fitted(text, room) {
  const key = `${pen.font}|${Math.round(room)}|${text}`;
  let made = WIDTHS.get(key);
  if (made === undefined) {
    made = text;
    const wide = pen.measureText(text).width;
    let keep = wide > room ? Math.floor((text.length * room) / wide) : text.length;
    while (keep > 0 && pen.measureText(made).width > room) {
      const tail = keep > 18 ? Math.min(Math.floor(keep / 3), 10) : 0;
      made = text.slice(0, keep - tail) + "\u2026" + text.slice(text.length - tail);
      keep -= 1;
    }
    if (WIDTHS.size > 20000) WIDTHS.clear();
    WIDTHS.set(key, made);
  }
  return made;
}

/** Around the chosen box, its equals, what a search found, and what the pointer is on. */
function rim(box, step, x, y, h, matched) {
  const least = 1 / view.scale;
  let colour = null,
    width = 0;
  if (step === state.step) [colour, width] = [CSS.accent, Math.max(3, 3 * least)];
  else if (state.matches !== null && matched)
    [colour, width] = [CSS.found, Math.max(3, 2.5 * least)];
  else if (step === view.hover) [colour, width] = [CSS.text, Math.max(1.5, 1.5 * least)];
  else if (state.step >= 0 && identity(box) === identity(graph().boxes[state.step]))
    [colour, width] = [CSS.accent, Math.max(1.5, least)];
  if (colour === null) return;
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.strokeRect(x - width / 2, y - width / 2, WIDTH + width, h + width);
}

// the camera -------------------------------------------------------------------------------------

function extent() {
  return graph().lanes.reduce(
    ([w, h], n) => [Math.max(w, n[1] + n[3]), Math.max(h, n[2] + n[4])],
    [1, 1],
  );
}

function fit() {
  [view.width, view.height] = sized(canvas, pen);
  const [w, h] = extent(),
    rim = 28;
  view.scale = Math.min(view.width / (w + 2 * rim), view.height / (h + 2 * rim), 1.25);
  view.x = w / 2 - view.width / view.scale / 2;
  view.y = h / 2 - view.height / view.scale / 2;
  redraw();
}

/** Zoom about a place on the canvas. */
function zoom(by, sx = view.width / 2, sy = view.height / 2) {
  const scale = Math.min(Math.max(view.scale * by, 0.01), 3);
  view.x += sx / view.scale - sx / scale;
  view.y += sy / view.scale - sy / scale;
  view.scale = scale;
  redraw();
}

function pan(dx, dy) {
  view.x -= dx / view.scale;
  view.y -= dy / view.scale;
  redraw();
}

/** Bring a box to the middle, large enough to read. */
function centre(step) {
  const [x, y, h] = graph().boxes[step].at;
  view.scale = Math.max(view.scale, 0.75);
  view.x = x + WIDTH / 2 - view.width / view.scale / 2;
  view.y = y + h / 2 - view.height / view.scale / 2;
  redraw();
}

function boxAt(sx, sy) {
  const x = view.x + sx / view.scale,
    y = view.y + sy / view.scale;
  return graph().boxes.findIndex(
    (b) => x >= b.at[0] && x <= b.at[0] + WIDTH && y >= b.at[1] && y <= b.at[1] + b.at[2],
  );
}
