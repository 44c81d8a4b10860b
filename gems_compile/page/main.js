// The header, the search, the keys, and the address: #graph=1&step=5&search=layers.3&tab=aten.

function header() {
  const all = DATA.graphs,
    sum = (f) => all.reduce((n, g) => n + f(g), 0);
  const now = sum((g) => g.boxes.reduce((n, b) => n + moved(b), 0)),
    eager = sum((g) => g.boxes.reduce((n, b) => n + b.bytes[2], 0));
  const ours = sum((g) => g.numbers.seconds),
    torchs = Object.values(DATA.seconds).reduce((a, b) => a + b, 0);
  const less =
    eager > 0
      ? ` ${now > eager ? "+" : "\u2212"}${Math.abs(Math.round(100 - (100 * now) / eager))}%`
      : "";
  $("name").textContent = DATA.name;
  $("target").textContent = `target: ${DATA.target}`;
  $("totals").replaceChildren(
    ...[
      [number(sum((g) => g.numbers.nodes)), "nodes"],
      [number(sum((g) => g.numbers.launches)), "launches"],
      [number(sum((g) => g.numbers.aten_calls)), "ATen calls"],
      [eager > 0 ? bytes(now) + less : "not known", `moved (eager ${bytes(eager)})`],
      [`${ours.toFixed(2)} s`, "compile" + (torchs > 0 ? ` (torch ${torchs.toFixed(2)} s)` : "")],
    ].map(([value, name]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
  $("graph").replaceChildren(
    ...all.map((g, k) =>
      el("option", { value: String(k) }, `${g.title} (${plural(g.boxes.length, "call")})`),
    ),
  );
  $("graph").hidden = all.length < 2;
}

function showGraph(k) {
  state.graph = Math.min(Math.max(k, 0), DATA.graphs.length - 1);
  state.step = -1;
  $("graph").value = String(state.graph);
  $("nothing").hidden = graph().boxes.length > 0;
  $("nothing").textContent =
    "The calls of this graph are not known: it runs as ATen, or came from the cache of whole graphs.";
  [span.from, span.to] = [0, 1];
  stripHead();
  showTab(state.tab);
  showPanel();
  find(state.query);
  fit();
}

/** Show a call in the panel, and in the graph where it is out of sight. */
function choose(step) {
  state.step = step;
  showPanel();
  if (step >= 0 && !inSight(step)) centre(step);
  remember();
  redraw();
}

function inSight(step) {
  const [left, top, right, bottom] = sight(),
    [x, y, h] = graph().boxes[step].at;
  return x >= left && x + WIDTH <= right && y >= top && y + Math.min(h, 60) <= bottom;
}

// search -----------------------------------------------------------------------------------------

/** The boxes whose name, ops, lines or modules hold the text. */
function find(query) {
  state.query = query;
  state.match = -1;
  const wanted = query.trim().toLowerCase();
  state.matches =
    wanted === ""
      ? null
      : new Set(haystack().flatMap((text, step) => (text.includes(wanted) ? [step] : [])));
  told();
  redraw();
}

function told() {
  const n = state.matches?.size;
  $("found").textContent =
    n === undefined
      ? ""
      : n === 0
        ? "none"
        : state.match < 0
          ? number(n)
          : `${state.match + 1} of ${number(n)}`;
}

/** Go to the next match, or the one before. */
function next(by) {
  const all = [...(state.matches || [])];
  if (all.length === 0) return;
  state.match =
    state.match < 0 && by < 0 ? all.length - 1 : (state.match + by + all.length) % all.length;
  told();
  choose(all[state.match]);
  centre(all[state.match]);
}

function search(query) {
  $("search").value = query;
  find(query);
  next(1);
}

// the address ------------------------------------------------------------------------------------

let shown = "";

function remember() {
  const parts = new URLSearchParams();
  if (state.graph > 0) parts.set("graph", state.graph);
  if (state.tab !== "graph") parts.set("tab", state.tab);
  if (state.query.trim() !== "") parts.set("search", state.query);
  if (state.step >= 0) parts.set("step", state.step);
  if ("theme" in chosenTheme) parts.set("theme", chosenTheme.theme);
  const text = `#${parts}`;
  if (text === shown || !ready) return;
  shown = text;
  history.replaceState(null, "", text);
}

function fromAddress() {
  const parts = new URLSearchParams(location.hash.slice(1)),
    step = Number(parts.get("step") ?? -1);
  if (parts.has("theme")) setTheme(parts.get("theme"));
  state.tab = parts.get("tab") ?? "graph";
  state.query = parts.get("search") ?? "";
  $("search").value = state.query;
  showGraph(Number(parts.get("graph") ?? 0) || 0);
  if (parts.has("step") && step >= 0 && step < graph().boxes.length) {
    choose(step);
    centre(step);
  } else if (state.query !== "") next(1);
}

// light and dark ---------------------------------------------------------------------------------

const chosenTheme = {}; // empty while the page follows the system
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function applyTheme() {
  document.documentElement.dataset.theme = chosenTheme.theme ?? (dark.matches ? "dark" : "light");
  readColours();
}

function setTheme(theme) {
  chosenTheme.theme = theme === "dark" ? "dark" : "light";
  applyTheme();
}

// events -----------------------------------------------------------------------------------------

const KEYS = {
  "+": () => zoom(1.25),
  "=": () => zoom(1.25),
  "-": () => zoom(0.8),
  0: fit,
  j: () => graph().boxes.length && choose(Math.min(state.step + 1, graph().boxes.length - 1)),
  k: () => graph().boxes.length && choose(Math.max(state.step - 1, 0)),
  n: () => next(1),
  N: () => next(-1),
  "/": () => $("search").select(),
  Escape: () => choose(-1),
};
const ARROWS = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80] };

function listenSearch() {
  $("search").oninput = () => {
    find($("search").value);
    remember();
  };
  $("search").onkeydown = (e) => {
    if (e.key === "Enter") next(e.shiftKey ? -1 : 1);
    if (e.key === "Escape") {
      $("search").value = "";
      find("");
      remember();
      canvas.focus();
    }
    e.stopPropagation();
  };
}

function listen() {
  $("graph").onchange = () => {
    showGraph(Number($("graph").value));
    remember();
  };
  $("colour").onchange = redraw;
  $("theme").onclick = () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    showPanel();
    remember();
    redraw();
  };
  dark.addEventListener("change", () => {
    applyTheme();
    showPanel();
    redraw();
  });
  $("in").onclick = () => zoom(1.4);
  $("out").onclick = () => zoom(1 / 1.4);
  $("fit").onclick = fit;
  listenSearch();
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT)$/.test(e.target.tagName)) return;
    if (e.key in ARROWS && e.target === canvas) pan(...ARROWS[e.key]);
    else if (e.key in KEYS) KEYS[e.key]();
    else return;
    e.preventDefault();
  });
  listenGraph();
  listenStrip();
  window.addEventListener("resize", redraw);
  window.addEventListener("hashchange", () => {
    if (location.hash !== shown) fromAddress();
  });
}

let ready = false;
applyTheme();
header();
if (DATA.graphs.length === 0) {
  document
    .querySelector("main")
    .replaceChildren(el("p", { id: "nothing" }, "Nothing was compiled."));
} else {
  listen();
  fromAddress();
  draw();
  drawStrip();
  ready = true;
}
document.documentElement.dataset.ready = Math.ceil(performance.now()); // ms since it was opened
