// The tables: equal things are one row, which says how many they are.

const MOST_ROWS = 300;

const TABS = {
  graph: { title: "Graph" },
  saved: { title: "Saved", count: (g) => g.saved.length, fill: savedTable },
  aten: { title: "ATen calls", count: (g) => g.aten.length, fill: atenTable },
  unfused: { title: "Not fused", count: (g) => g.unfused.length, fill: unfusedTable },
  rewrites: {
    title: "Rewrites",
    count: (g) => g.rewritten.length + g.near_misses.length,
    fill: rewriteTables,
  },
  dynamo: {
    title: "Dynamo",
    count: ofDynamo,
    fill: dynamoTables,
    hidden: () => ofDynamo() === 0,
  },
  notes: { title: "Notes", count: (g) => g.notes.length, fill: notesTable },
};
const isShown = (name) => name in TABS && !TABS[name].hidden?.();

function ofDynamo() {
  return DATA.breaks.length + DATA.recompiles.length + DATA.gave_up;
}

function showTab(name) {
  state.tab = isShown(name) ? name : "graph";
  const tabs = Object.entries(TABS).filter(([key]) => isShown(key));
  $("tabs").replaceChildren(
    ...tabs.map(([key, tab]) =>
      el(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${key}`,
          "aria-selected": String(key === state.tab),
          onclick: () => showTab(key),
        },
        tab.title,
        tab.count ? el("span", { className: "count" }, ` ${number(tab.count(graph()))}`) : null,
      ),
    ),
  );
  $(`tab-${state.tab}`).scrollIntoView({ block: "nearest", inline: "nearest" }); // of a narrow page
  const table = $("table-view");
  $("graph-view").hidden = state.tab !== "graph";
  table.hidden = state.tab === "graph";
  table.replaceChildren(
    ...(state.tab === "graph" ? [] : TABS[state.tab].fill(graph()).flat().filter(Boolean)),
  );
  table.scrollTop = 0;
  remember();
  redraw();
}

/** Rows made into elements of ``into``; the button that adds what is beyond the first. */
function fill(into, rows, make) {
  into.append(...rows.slice(0, MOST_ROWS).map(make));
  if (rows.length <= MOST_ROWS) return null;
  const rest = button(`${number(rows.length - MOST_ROWS)} more rows`, () => {
    rest.remove();
    into.append(...rows.slice(MOST_ROWS).map(make));
  });
  return rest;
}

/** columns: [title, cell of a row, whether it is a number]; a click goes to the row's next call. */
function tableOf(rows, columns) {
  if (rows.length === 0) return el("p", {}, "None.");
  const body = el("tbody");
  const rest = fill(body, rows, (row) => rowOf(row, columns));
  const head = el(
    "tr",
    {},
    columns.map(([title, , right]) => el("th", { className: right ? "number" : "" }, title)),
  );
  return [el("table", {}, el("thead", {}, head), body), rest];
}

function rowOf(row, columns) {
  const made = el(
    "tr",
    {},
    columns.map(([, cell, right]) => el("td", { className: right ? "number" : "" }, cell(row))),
  );
  if (!row.steps || row.steps.length === 0) return made;
  let next = 0;
  const go = () => {
    made.parentNode.querySelector(".on")?.classList.remove("on");
    made.classList.add("on");
    choose(row.steps[next++ % row.steps.length]);
  };
  made.tabIndex = 0;
  made.onclick = go;
  made.onkeydown = (e) => {
    if (e.key === "Enter") go();
  };
  return made;
}

const small = (text) => (text ? el("small", {}, text) : null);
const often = (n) => (n > 1 ? `\u00d7${n}` : "");
const arrow = (row) => `${row.reads.join(", ")} \u2192 ${row.writes.join(", ")}`;
const modulesOf = (row) =>
  el(
    "small",
    {},
    row.modules.slice(0, 6).map((m) =>
      el(
        "span",
        {},
        link(m, () => {
          showTab("graph");
          search(m);
        }),
        " ",
      ),
    ),
    row.modules.length > 6 ? `and ${row.modules.length - 6} more` : null,
  );
const timeColumn = ["time", (r) => micros(r.us), true];

function savedTable(own) {
  return [
    el(
      "p",
      {},
      "Kernels by the bytes that they save: what eager's ops for the same nodes read and write, less what the kernel does. Equal kernels are one row; a click goes from one to the next.",
    ),
    tableOf(own.saved, [
      [
        "kernel",
        (r) =>
          el(
            "span",
            {},
            code(r.name),
            " ",
            el("span", { className: "soft" }, r.detail),
            small(r.ops.join(" ")),
            small(r.line),
          ),
        false,
      ],
      ["", (r) => often(r.steps.length), true],
      ...(own.measured ? [timeColumn] : []),
      ["moved", (r) => bytes(r.moved), true],
      ["eager", (r) => bytes(r.eager), true],
      [
        "saved",
        (r) =>
          el("b", { className: r.saved > 0 ? "good" : r.saved < 0 ? "bad" : "" }, bytes(r.saved)),
        true,
      ],
    ]),
  ];
}

function atenTable(own) {
  return [
    el("p", {}, `What runs as ATen, by its ${own.measured ? "time" : "bytes"}, and why.`),
    tableOf(own.aten, [
      ["call", (r) => el("span", {}, code(r.name), small(arrow(r)), small(r.line)), false],
      ["", (r) => often(r.steps.length), true],
      ...(own.measured ? [timeColumn] : []),
      ["moved", (r) => bytes(r.moved), true],
      ["because", (r) => r.detail, false],
    ]),
  ];
}

function unfusedTable(own) {
  return [
    el(
      "p",
      {},
      "Values that go through memory though both ends are in kernels, by their size, and why the two kernels are not one.",
    ),
    tableOf(own.unfused, [
      [
        "edge",
        (r) =>
          el("span", {}, code(`${r.producer} \u2192 ${r.consumer}`), small(r.line), modulesOf(r)),
        false,
      ],
      ["", (r) => often(r.times), true],
      ["bytes", (r) => bytes(r.bytes), true],
      ["because", (r) => r.reason, false],
    ]),
  ];
}

/** The first lines of what is told once, and how many more there are. */
const linesOf = (row) => [
  ...row.lines.slice(0, 3).map((line) => el("small", {}, lineOf(line))),
  row.lines.length > 3 ? small(`and ${row.lines.length - 3} more lines`) : null,
];

function rewriteTables(own) {
  const cards = el("div");
  const rest = fill(cards, own.rewritten, rewriteCard);
  return [
    el("h3", {}, "Rewritten"),
    own.rewritten.length === 0 ? el("p", {}, "Nothing.") : cards,
    rest,
    el("h3", {}, "Nearly rewritten"),
    tableOf(own.near_misses, [
      ["rule", (r) => el("span", {}, code(r.rule), linesOf(r), modulesOf(r)), false],
      ["", (r) => often(r.times), true],
      ["at", (r) => code(r.node), false],
      ["the condition that failed", (r) => r.reason, false],
    ]),
  ];
}

/** A rewrite with its nodes before and after, side by side: those of the first of equal layers. */
function rewriteCard(row) {
  return el(
    "section",
    { className: "rewrite" },
    el("h4", {}, code(row.rule), ` ${often(row.times)}`),
    el("p", {}, row.because),
    linesOf(row),
    modulesOf(row),
    el(
      "div",
      { className: "sides" },
      chainOf("before", row.nodes_before, row.before),
      chainOf("after", row.nodes_after, row.after),
    ),
  );
}

function chainOf(title, count, lines) {
  const head = el("b", {}, `${title}: ${plural(count, "node")}`);
  if (lines.length === 0) return el("div", {}, head);
  const shown = lines.map((line) => el("div", {}, highlighted(line)));
  return el("div", {}, head, el("pre", { className: "chain" }, shown));
}

function dynamoTables() {
  const again = [
    ["function", (r) => el("span", {}, code(nameOf(r)), small(r.line && lineOf(r.line)))],
    ["what had changed", (r) => el("span", {}, r.change, small(`guard: ${r.guard}`))],
    ["a way out", (r) => r.hint],
    ["became", (r) => (r.place === null ? `graph ${r.graph}` : graphLink(r.place))],
  ];
  const breaks = [
    ["where", (r) => el("span", {}, linesOf(r))],
    ["", (r) => often(r.times), true],
    ["because", (r) => el("span", { className: "reason" }, r.reason)],
  ];
  return [
    el("h3", {}, "Compiled again"),
    tableOf(DATA.recompiles, again),
    DATA.gave_up > 0
      ? el(
          "p",
          { className: "warn" },
          `${plural(DATA.gave_up, "function")} had been compiled too often, and Dynamo left further calls uncompiled: see torch._dynamo.config.recompile_limit.`,
        )
      : null,
    el("h3", {}, "Graph breaks: Dynamo cut the program here"),
    tableOf(DATA.breaks, breaks),
  ];
}

const nameOf = (again) => again.function.replace(/,$/, ""); // "step, behind line 12," of a sentence
const graphLink = (place) =>
  link(DATA.graphs[place].title, () => {
    state.tab = "graph";
    showGraph(place);
  });

function notesTable(own) {
  return [
    tableOf(own.notes, [
      ["", (r) => r[0], false],
      ["", (r) => r[1], false],
    ]),
  ];
}
