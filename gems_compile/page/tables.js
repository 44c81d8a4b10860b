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
  notes: { title: "Notes", count: (g) => g.notes.length + DATA.breaks.length, fill: notesTable },
};

function showTab(name) {
  state.tab = name in TABS ? name : "graph";
  $("tabs").replaceChildren(
    ...Object.entries(TABS).map(([key, tab]) =>
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

/** columns: [title, cell of a row, whether it is a number]; a click goes to the row's next call. */
function tableOf(rows, columns, most = MOST_ROWS) {
  if (rows.length === 0) return el("p", {}, "None.");
  const body = el(
    "tbody",
    {},
    rows.slice(0, most).map((row) => rowOf(row, columns)),
  );
  const head = el(
    "tr",
    {},
    columns.map(([title, , right]) => el("th", { className: right ? "number" : "" }, title)),
  );
  const table = el("table", {}, el("thead", {}, head), body);
  if (rows.length <= most) return table;
  const rest = button(`${number(rows.length - most)} more rows`, () => {
    rest.remove();
    body.append(...rows.slice(most).map((row) => rowOf(row, columns)));
  });
  return [table, rest];
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

function rewriteTables(own) {
  return [
    el("h3", {}, "Rewritten"),
    tableOf(own.rewritten, [
      ["rule", (r) => el("span", {}, code(r.rule), small(r.line), modulesOf(r)), false],
      ["", (r) => often(r.times), true],
      ["nodes before", (r) => number(r.nodes_before), true],
      ["after", (r) => number(r.nodes_after), true],
      ["because", (r) => r.because, false],
    ]),
    el("h3", {}, "Nearly rewritten"),
    tableOf(own.near_misses, [
      ["rule", (r) => el("span", {}, code(r.rule), small(r.line), modulesOf(r)), false],
      ["", (r) => often(r.times), true],
      ["the condition that failed", (r) => r.reason, false],
    ]),
  ];
}

function notesTable(own) {
  const rows = [...own.notes, ...DATA.breaks.map(([n, why]) => [`graph break${times(n)}`, why])];
  return [
    tableOf(rows, [
      ["", (r) => r[0], false],
      ["", (r) => r[1], false],
    ]),
  ];
}
