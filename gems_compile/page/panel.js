// The panel at the side: one call, or the graph as a whole where none is chosen.

function showPanel() {
  $("panel").replaceChildren(...(state.step < 0 ? overview() : callPanel(state.step)));
  $("panel").scrollTop = 0;
}

const texts = (numbers) => numbers.map((k) => TEXTS[k]);
const facts = (rows) =>
  el(
    "dl",
    { className: "facts" },
    rows.filter(Boolean).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
  );
const list = (items) =>
  el(
    "ul",
    {},
    items.map((item) => el("li", {}, item)),
  );
const code = (text) => el("code", {}, text);
const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;

function callPanel(step) {
  const own = graph(),
    box = own.boxes[step],
    made = prepared();
  const equal = made.equal.get(identity(box)),
    place = equal.indexOf(step);
  const key = `${TEXTS[box.name]}_${TEXTS[box.detail]}`;
  return [
    el("h2", { className: "mono" }, TEXTS[box.name]),
    el(
      "p",
      { className: "under" },
      `step ${step} of ${own.boxes.length}, ` +
        (box.kind === "kernel" ? `kernel ${TEXTS[box.detail]}` : "ATen call"),
    ),
    el(
      "div",
      { className: "row" },
      button("\u2190 step", () => choose(Math.max(step - 1, 0)), step === 0),
      button(
        "step \u2192",
        () => choose(Math.min(step + 1, own.boxes.length - 1)),
        step === own.boxes.length - 1,
      ),
      button("show", () => {
        showTab("graph");
        centre(step);
      }),
      equal.length > 1
        ? button(`equal ${place + 1} of ${equal.length} \u2192`, () =>
            choose(equal[(place + 1) % equal.length]),
          )
        : null,
      button("close", () => choose(-1)),
    ),
    ...(box.kind === "aten"
      ? [el("h3", {}, "Why ATen"), el("p", { className: "why" }, TEXTS[box.detail])]
      : []),
    ...memory(box),
    ...section(`Eager ops: ${box.nodes.length}`, box.nodes.map(nodeLine)),
    ...(key in DATA.sources ? sourceOf(DATA.sources[key]) : []),
    ...section(`Views without a call: ${box.views.length}`, box.views.map(nodeLine)),
    ...section("Lines", texts(box.lines).map(lineOf)),
    ...section(
      "Modules",
      texts(box.modules).map((m) => link(m, () => search(m))),
    ),
    ...section(
      "Reads from",
      made.before[step].map((e) => stepLink(e[0], moduleOf(e[0]))),
    ),
    ...section(
      "Is read by",
      made.after[step].map((e) => stepLink(e[1], moduleOf(e[1]))),
    ),
    ...section(
      "Not fused with",
      made.refused[step].map((e) => stepLink(e[0] === step ? e[1] : e[0], `  ${TEXTS[e[2]]}`)),
    ),
  ];
}

function memory(box) {
  const less = saved(box),
    eager = box.bytes[2];
  const share = eager > 0 ? ` (${Math.round((100 * less) / eager)}% of eager's)` : "";
  const types = (numbers) =>
    el(
      "div",
      { className: "mono" },
      texts(numbers).map((t) => el("div", {}, t)),
    );
  return [
    el("h3", {}, "Memory"),
    facts([
      ["reads", types(box.reads)],
      ["writes", types(box.writes)],
      ["bytes", `${bytes(box.bytes[0])} read, ${bytes(box.bytes[1])} written`],
      box.kind === "kernel" ? ["eager's", bytes(eager)] : null,
      box.kind === "kernel"
        ? [
            "saved",
            el(
              "span",
              { className: less > 0 ? "good" : less < 0 ? "bad" : "" },
              bytes(less) + share,
            ),
          ]
        : null,
      ["time", graph().measured ? micros(box.us) : "not measured"],
      graph().measured && box.us > 0
        ? ["bandwidth", `${bytes((moved(box) / box.us) * 1e6)}/s`]
        : null,
      box.parts.length > 0
        ? [
            "parts",
            `${box.parts.length} in one launch, of ${box.parts.map(number).join(", ")} elements`,
          ]
        : null,
    ]),
  ];
}

function section(title, items, most = 40) {
  if (items.length === 0) return [];
  const more =
    items.length > most
      ? [el("span", { className: "soft" }, `and ${items.length - most} more`)]
      : [];
  return [el("h3", {}, title), list([...items.slice(0, most), ...more])];
}

const button = (text, act, off = false) =>
  el("button", { type: "button", onclick: act, disabled: off }, text);
const link = (text, act) => el("button", { type: "button", className: "link", onclick: act }, text);
const moduleOf = (step) => `  ${texts(graph().boxes[step].modules.slice(0, 1))}`;

function stepLink(step, more) {
  return el(
    "span",
    {},
    link(`${step} ${boxTitle(graph().boxes[step])}`, () => choose(step)),
    el("span", { className: "soft" }, more),
  );
}

/** ``name = op(inputs)``, as eager runs it, and the type of its result. */
function nodeLine(k) {
  const node = graph().nodes[k];
  return el(
    "span",
    {},
    code(`${TEXTS[node[NAME]]} = ${TEXTS[node[OP]]}(${texts(node[INPUTS]).join(", ")})`),
    el("span", { className: "soft mono" }, `  ${TEXTS[node[RESULT]]}`),
  );
}

/** "file.py:12  code": the place in grey, the code behind it. */
function lineOf(line) {
  const cut = line.indexOf("  ");
  if (cut < 0) return code(line);
  return el(
    "span",
    {},
    el("span", { className: "soft mono" }, line.slice(0, cut) + "  "),
    code(line.slice(cut).trim()),
  );
}

// source -----------------------------------------------------------------------------------------

const TOKEN =
  /("""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(#[^\n]*)|(@[\w.]+)|(\b\d[\w.]*)|([A-Za-z_]\w*)|[^A-Za-z_\d"'#@]+|[\s\S]/g;
const KEYWORDS = new Set(
  "and as assert async await break class continue def del elif else except False finally for from global if import in is lambda None nonlocal not or pass raise return True try while with yield".split(
    " ",
  ),
);

function sourceOf(text) {
  const shown = el("pre", {}, highlighted(text));
  const copy = button("copy", () =>
    navigator.clipboard?.writeText(text).then(
      () => {
        copy.textContent = "copied";
      },
      () => {},
    ),
  );
  return [el("div", { className: "row" }, el("h3", {}, "Kernel"), copy), shown];
}

/** Python as text and spans: strings, comments, decorators, numbers, keywords and defined names. */
function highlighted(text) {
  const parts = [];
  let plain = "",
    last = "";
  for (const [token, string, comment, decorator, digits, word] of text.matchAll(TOKEN)) {
    const kind = string
      ? "s"
      : comment
        ? "c"
        : decorator
          ? "d"
          : digits
            ? "n"
            : !word
              ? ""
              : KEYWORDS.has(word)
                ? "k"
                : last === "def"
                  ? "d"
                  : "";
    if (word) last = word;
    if (kind === "") {
      plain += token;
      continue;
    }
    if (plain) parts.push(plain);
    plain = "";
    parts.push(el("span", { className: kind }, token));
  }
  if (plain) parts.push(plain);
  return parts;
}

// the whole graph --------------------------------------------------------------------------------

function overview() {
  const own = graph(),
    n = own.numbers;
  const now = own.boxes.reduce((sum, b) => sum + moved(b), 0),
    eager = own.boxes.reduce((sum, b) => sum + b.bytes[2], 0);
  const best = own.saved.filter((row) => row.saved > 0).slice(0, 5);
  return [
    el("h2", {}, own.title),
    el(
      "p",
      { className: "under" },
      `${plural(n.nodes, "node")}: ${number(n.fused)} fused, ${number(n.free || 0)} need no call`,
    ),
    ...(eager > 0
      ? [
          el("h3", {}, "Bytes moved by one run"),
          compared("gems", now, eager),
          compared("eager", eager, eager),
        ]
      : []),
    el("h3", {}, "Calls"),
    facts([
      ["launches", `${number(n.launches)} of ${plural(n.kernels, "kernel")}`],
      ["ATen calls", number(n.aten_calls)],
      ["not fused", plural(n.unfused, "edge")],
      ["rewritten", plural(n.rewritten, "place")],
      n.failures ? ["failures", el("span", { className: "bad" }, number(n.failures))] : null,
    ]),
    ...section(
      "Most saved",
      best.map((row) =>
        el(
          "span",
          {},
          link(opsTitle(row.ops) || row.name, () => choose(row.steps[0])),
          el("span", { className: "soft" }, `  ${bytes(row.saved)}${times(row.steps.length)}`),
        ),
      ),
    ),
    ...(Object.keys(own.seconds).length > 0
      ? [
          el("h3", {}, "Compile seconds"),
          facts(Object.entries(own.seconds).map(([stage, s]) => [stage, s.toFixed(4)])),
        ]
      : []),
    ...section(
      "Inputs: " + own.inputs.length,
      own.inputs.map(([name, type]) => code(`${name}: ${type}`)),
      12,
    ),
    el("h3", {}, "Legend"),
    list([
      swatch("kernel"),
      swatch("aten"),
      el("span", { className: "warn" }, "\u2504 two kernels that are not one, see Not fused"),
      "of the chosen call: blue comes in, green goes out",
    ]),
    el("h3", {}, "Keys"),
    keys([
      ["/", "search"],
      ["Enter", "next match"],
      ["j k", "next, previous step"],
      ["arrows", "move"],
      ["+ \u2212", "zoom"],
      ["0", "show all"],
      ["Esc", "close, clear"],
    ]),
  ];
}

const times = (n) => (n > 1 ? `  \u00d7${n}` : "");
const keys = (rows) =>
  facts(
    rows.map(([key, what]) => [
      el(
        "span",
        {},
        key.split(" ").flatMap((k) => [el("kbd", {}, k), " "]),
      ),
      what,
    ]),
  );

function compared(name, value, most) {
  const inner = el("i");
  inner.style.width = `${(100 * value) / most}%`;
  return el(
    "div",
    {},
    el("span", {}, `${name} `),
    el("b", {}, bytes(value)),
    el("div", { className: "bar" }, inner),
  );
}

function swatch(kind) {
  const made = el("span", { className: "swatch" });
  const colours = kind === "aten" ? { fill: CSS.aten, line: CSS["aten-rule"] } : ofHue(HUES[0]);
  made.style.background = colours.fill;
  made.style.borderColor = colours.line;
  if (kind === "aten") made.style.borderStyle = "dashed";
  return el(
    "span",
    {},
    made,
    kind === "aten" ? "an ATen call" : "a launch of our kernel: equal kernels, equal colours",
  );
}
