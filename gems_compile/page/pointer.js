// What the pointer does on both canvases.

/** Follow a pointer on a canvas: ``drag(dx, dy)``, ``click(x, y)``, ``over(x, y)``, ``leave()``. */
function follow(of, { drag, click, over, leave }) {
  let last = null,
    far = 0;
  of.addEventListener("pointerdown", (e) => {
    last = [e.offsetX, e.offsetY];
    far = 0;
    of.setPointerCapture(e.pointerId);
  });
  of.addEventListener("pointermove", (e) => {
    if (last === null) return over(e.offsetX, e.offsetY, e);
    const dx = e.offsetX - last[0],
      dy = e.offsetY - last[1];
    far += Math.abs(dx) + Math.abs(dy);
    last = [e.offsetX, e.offsetY];
    if (far > 4) {
      of.classList.add("drag");
      leave();
      drag(dx, dy);
    }
  });
  of.addEventListener("pointerup", (e) => {
    if (last !== null && far <= 4) click(e.offsetX, e.offsetY);
    last = null;
    of.classList.remove("drag");
  });
  of.addEventListener("pointercancel", () => {
    last = null;
    of.classList.remove("drag");
  });
  of.addEventListener("pointerleave", leave);
}

function hovered(step, e) {
  const tip = $("tip");
  if (view.hover !== step) {
    view.hover = step;
    redraw();
  }
  tip.hidden = step < 0;
  if (step < 0) return;
  const box = graph().boxes[step],
    types = (ks) => ks.map((k) => TEXTS[k]).join(", ");
  tip.replaceChildren(
    el("div", {}, `${step}  ${TEXTS[box.name]}`),
    el("div", { className: "mono" }, `${types(box.reads)} \u2192 ${types(box.writes)}`),
    el(
      "div",
      {},
      box.modules
        .map((k) => TEXTS[k])
        .slice(0, 3)
        .join(", "),
    ),
  );
  tip.style.left =
    Math.max(Math.min(e.clientX + 14, window.innerWidth - tip.offsetWidth - 8), 4) + "px";
  tip.style.top =
    (e.clientY + 18 + tip.offsetHeight > window.innerHeight
      ? e.clientY - 10 - tip.offsetHeight
      : e.clientY + 18) + "px";
}

const over = (at) => (x, y, e) => {
  const step = at(x, y);
  canvas.classList.toggle("over", step >= 0);
  hovered(step, e);
};

function wheel(of, act) {
  const own = (e) => {
    e.preventDefault();
    hovered(-1);
    act(e);
  };
  of.addEventListener("wheel", own, { passive: false });
}

function listenGraph() {
  wheel(canvas, (e) => {
    if (e.shiftKey) return pan(-e.deltaY - e.deltaX, 0);
    const far = Math.max(-200, Math.min(e.deltaY, 200)); // a pinch is a wheel with ctrl, in small steps
    zoom(Math.exp(-far * (e.ctrlKey ? 0.01 : 0.0016)), e.offsetX, e.offsetY);
  });
  const click = (x, y) => choose(boxAt(x, y));
  follow(canvas, { drag: pan, click, over: over(boxAt), leave: () => hovered(-1) });
}

function listenStrip() {
  wheel(strip, (e) => zoomStrip(Math.exp(-e.deltaY * 0.002), e.offsetX));
  const drag = (dx) => {
    const wide = span.to - span.from;
    moveStrip(span.from - (dx / strip.clientWidth) * wide, wide);
  };
  const click = (x, y) => {
    const step = stripAt(x, y);
    if (step < 0) return;
    choose(step);
    centre(step);
  };
  follow(strip, { drag, click, over: over(stripAt), leave: () => hovered(-1) });
}
