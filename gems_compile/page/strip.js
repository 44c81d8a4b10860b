// The calls in order, each as wide as it takes time, or, where it was not measured, moves bytes.

const strip = $("strip");
const ink = strip.getContext("2d");
const span = { from: 0, to: 1 }; // the part in sight, as shares of the whole
const ROW = 22;

function ends() {
  const made = prepared();
  if (!made.ends) {
    let sum = 0;
    made.ends = graph().boxes.map((box) => (sum += cost(box)));
    made.total = sum;
  }
  return made;
}

function stripHead() {
  const { total } = ends();
  $("strip-title").textContent = graph().measured
    ? `One run: ${micros(total)}`
    : `One run: ${bytes(total)} moved`;
  $("strip-note").textContent =
    (graph().measured ? "calls to scale of time" : "not measured: calls to scale of their bytes") +
    "; kernels above, ATen below; wheel zooms";
}

function drawStrip() {
  const [width, height] = sized(strip, ink),
    { ends: until, total } = ends();
  ink.fillStyle = CSS.paper;
  ink.fillRect(0, 0, width, height);
  if (total === 0) return;
  const at = (value) => ((value / total - span.from) / (span.to - span.from)) * (width - 24) + 12;
  const top = Math.max((height - 2 * ROW - 4) / 2, 0);
  ink.font = `11px ${SANS}`;
  ink.textBaseline = "middle";
  graph().boxes.forEach((box, step) => {
    const x = at(until[step] - cost(box)),
      end = at(until[step]);
    if (end < 0 || x > width) return;
    const y = top + (box.kind === "kernel" ? 0 : ROW + 4),
      wide = Math.max(end - x - (end - x > 3 ? 1 : 0), 0.6);
    const colours = coloursOf(box);
    ink.globalAlpha = state.matches === null || state.matches.has(step) ? 1 : 0.25;
    ink.fillStyle = colours.solid;
    ink.fillRect(x, y, wide, ROW);
    if (step === state.step || step === view.hover) {
      ink.strokeStyle = step === state.step ? CSS.accent : CSS.text;
      ink.lineWidth = 2;
      ink.strokeRect(x - 1, y - 1, Math.max(wide, 2) + 2, ROW + 2);
    }
    if (wide > 34) {
      ink.save();
      ink.beginPath();
      ink.rect(x, y, wide - 3, ROW);
      ink.clip();
      ink.fillStyle = CSS.text;
      ink.fillText(boxTitle(box), Math.max(x, 0) + 4, y + ROW / 2 + 1);
      ink.restore();
    }
    ink.globalAlpha = 1;
  });
}

function stripAt(sx, sy) {
  const { ends: until, total } = ends(),
    width = strip.getBoundingClientRect().width;
  const value = (((sx - 12) / (width - 24)) * (span.to - span.from) + span.from) * total;
  let low = 0,
    high = until.length; // the first call that ends after it
  while (low < high) {
    const middle = (low + high) >> 1;
    if (until[middle] < value) low = middle + 1;
    else high = middle;
  }
  return value < 0 || low >= until.length ? -1 : low;
}

function zoomStrip(by, sx) {
  const width = strip.getBoundingClientRect().width,
    share = Math.min(Math.max((sx - 12) / (width - 24), 0), 1);
  const middle = span.from + share * (span.to - span.from),
    wide = Math.min(Math.max((span.to - span.from) / by, 1e-4), 1);
  moveStrip(middle - share * wide, wide);
}

function moveStrip(from, wide) {
  span.from = Math.min(Math.max(from, 0), 1 - wide);
  span.to = span.from + wide;
  redraw();
}
