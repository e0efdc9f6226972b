// The balance cockpit: a small router that the reader steers (data.router), and training runs
// recorded by minids/learn/experiments/balance.py (data.runs). Each part is shown if it is there.
const [BLUE, ORANGE, GREEN] = ui.colours;
const GREY = ui.colours[5];
const sum = (list) => list.reduce((a, b) => a + b, 0);
const mean = (list) => sum(list) / list.length;
const maxVio = (load) => (Math.max(...load) - mean(load)) / mean(load);
const fixed = (list, digits) => list.map((x) => x.toFixed(digits)).join(" ");

// ---- what both parts show: loads, biases, and MaxVio over the steps

function screens(part, name, onStep) {
  const box = ui.el("div", { style: "display:grid;gap:0.4rem 1rem;grid-template-columns:"
    + "repeat(auto-fit,minmax(min(17rem,100%),1fr))" });
  part.append(box);
  const plot = (what, alt) =>
    ui.plot(box, { width: 360, height: 190, name: `${name}-${what}`, alt });
  const nodes = {
    load: plot("load-bars", "Tokens sent to each expert, a bar an expert, beside the fair share"),
    bias: plot("bias-bars", "Bias of each expert, up for favoured, down for held back"),
    curve: plot("curve", "MaxVio over the steps; drag sideways to move through the run"),
  };
  const drag = (event) => {
    const at = nodes.curve.getBoundingClientRect();
    const x = ((event.clientX - at.left) / at.width) * 360;
    onStep(Math.min(1, Math.max(0, (x - 34) / 316)));
  };
  nodes.curve.style.cursor = "ew-resize";
  nodes.curve.addEventListener("pointerdown", (event) => {
    nodes.curve.setPointerCapture(event.pointerId);
    drag(event);
  });
  nodes.curve.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  return nodes;
}

const text = (x, y, what, attrs = {}) => ui.svg("text", { x, y, "text-anchor": "middle", ...attrs }, what);
const line = (x1, y1, x2, y2, attrs = {}) =>
  ui.svg("line", { x1, y1, x2, y2, stroke: GREY, "stroke-width": 1, ...attrs });

function drawLoad(node, load) {
  const fair = mean(load), top = Math.max(2.2 * fair, 1.15 * Math.max(...load));
  const y = (n) => 165 - (140 * n) / top, busiest = load.indexOf(Math.max(...load));
  node.replaceChildren(text(180, 14, "tokens to each expert (▲ above the fair share)"));
  load.forEach((n, e) => {
    const x = 20 + 42 * e, over = n > fair;
    node.append(ui.svg("rect", { x, y: y(n), width: 30, height: 165 - y(n),
      fill: over ? ORANGE : BLUE, "fill-opacity": e === busiest ? 1 : 0.75 }));
    const struck = !over && y(n) - y(fair) < 14; // its number would stand on the fair share's line
    node.append(text(x + 15, y(n) + (struck ? 14 : -4), `${n}${over ? "▲" : ""}`), text(x + 15, 181, e));
  });
  node.append(line(14, y(fair), 354, y(fair), { "stroke-dasharray": "5 4", stroke: "currentColor" }));
}

function drawBias(node, bias, most) {
  const y = (b) => 95 - (65 * b) / most;
  node.replaceChildren(text(180, 14, `bias of each expert (scale ±${Number(most.toPrecision(2))})`));
  node.append(line(14, 95, 354, 95, { stroke: "currentColor" }));
  bias.forEach((b, e) => {
    const x = 20 + 42 * e, up = b >= 0;
    node.append(ui.svg("rect", { x, y: Math.min(95, y(b)), width: 30, height: Math.abs(y(b) - 95),
      fill: up ? BLUE : ORANGE }));
    node.append(text(x + 15, up ? y(b) - 4 : y(b) + 13, b ? (up ? "+" : "−") : "0"), text(x + 15, 186, e));
  });
}

// series: [{values, label, strong}], all of one length; `at` is the place of the cursor in 0..1
function drawCurve(node, series, at, lastStep) {
  const which = series.length > 1 ? ": thick this arm, thin the others" : " over the steps";
  const top = Math.max(0.5, ...series.flatMap((s) => s.values));
  const x = (i, n) => 34 + (316 * i) / Math.max(1, n - 1), y = (v) => 160 - (135 * v) / top;
  node.replaceChildren(text(180, 14, `MaxVio${which} (drag here)`));
  node.append(ui.svg("rect", { x: 34, y: 20, width: 316, height: 140, fill: "transparent" }));
  for (const tick of [0, top / 2, top]) {
    node.append(line(34, y(tick), 350, y(tick), { "stroke-opacity": 0.4 }),
      text(30, y(tick) + 4, tick.toFixed(1), { "text-anchor": "end" }));
  }
  node.append(text(34, 180, "1"), text(350, 180, lastStep, { "text-anchor": "end" }));
  for (const { values, strong } of series) {
    const points = values.map((v, i) => `${x(i, values.length).toFixed(1)},${y(v).toFixed(1)}`);
    node.append(ui.svg("polyline", { points: points.join(" "), fill: "none",
      stroke: strong ? GREEN : GREY, "stroke-width": strong ? 2 : 0.8 }));
  }
  const chosen = series.find((s) => s.strong).values;
  const i = Math.round(at * (chosen.length - 1)), cx = x(i, chosen.length);
  node.append(line(cx, 20, cx, 160, { stroke: "currentColor" }),
    ui.svg("circle", { cx, cy: y(chosen[i]), r: 5, fill: GREEN, stroke: "currentColor" }));
}

// a button that moves a slider by itself until the end
function playable(box, slider, name, stride) {
  const button = ui.button(box, { label: "Play", name });
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.current >= Number(slider.max)) move(slider, Number(slider.min));
    button.textContent = "Stop";
    timer = setInterval(() => {
      if (!button.isConnected || slider.current >= Number(slider.max)) return stop();
      move(slider, Math.min(Number(slider.max), slider.current + stride));
    }, 80);
  });
}

function move(slider, value) {
  slider.current = value;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
}

// ---- part 1: a router that the reader steers; the same arithmetic as minids.router and balance

function topExperts(logits, bias, count) {
  const choice = logits.map((z, e) => 1 / (1 + Math.exp(-z)) + bias[e]);
  return choice.map((_, e) => e).sort((a, b) => choice[b] - choice[a]).slice(0, count);
}

function countLoad(router, tokens, skew, bias) {
  const load = bias.map(() => 0);
  for (const taste of tokens) {
    const logits = taste.map((z, e) => z + skew * router.favour[e]);
    for (const e of topExperts(logits, bias, router.top_k)) load[e] += 1;
  }
  return load;
}

// a step's two halves: `lean` of the prose tokens move to the first, as many of code to the second
function halves(router, lean) {
  const n = router.prose.length / 2, more = Math.round(n * (1 + lean)), less = 2 * n - more;
  return [
    [...router.prose.slice(0, more), ...router.code.slice(0, less)],
    [...router.prose.slice(more), ...router.code.slice(less)],
  ];
}

function nudge(bias, load, speed, rule) {
  const fair = mean(load);
  return bias.map((b, e) =>
    b + speed * (rule === "sign" ? Math.sign(fair - load[e]) : (fair - load[e]) / fair));
}

function simulate(router, { speed, skew, lean, rule, each }) {
  let bias = router.favour.map(() => 0);
  const parts = halves(router, lean), frames = [];
  for (let step = 0; step < router.steps; step += 1) {
    const before = bias, loads = [];
    for (const tokens of parts) {
      loads.push(countLoad(router, tokens, skew, bias));
      if (each) bias = nudge(bias, loads.at(-1), speed, rule);
    }
    const load = loads[0].map((n, e) => n + loads[1][e]);
    if (!each) bias = nudge(bias, load, speed, rule);
    frames.push({ bias: before, load, vio: maxVio(load), half: Math.max(...loads.map(maxVio)) });
  }
  return frames;
}

function steer(router) {
  const part = ui.el("section", {}, ui.el("strong", {}, "A router you steer"));
  root.append(part);
  const box = ui.controls(part), speeds = router.speeds;
  const speed = ui.slider(box, { label: "bias speed γ", name: "speed", min: 0, max: speeds.length - 1,
    value: router.start.speed, format: (i) => String(speeds[i]) });
  const skew = ui.slider(box, { label: "skew: how much all tokens agree", name: "skew",
    min: 0, max: 2, step: 0.1, value: router.start.skew, format: (s) => s.toFixed(1) });
  const lean = ui.slider(box, { label: "batch skew: prose first, code second", name: "lean",
    min: 0, max: 1, step: 0.125, value: 0, format: (s) => `${Math.round(100 * s)} %` });
  const rule = ui.choice(box, { label: "rule", name: "rule",
    options: [["sign", "sign (V3)"], ["proportional", "proportional"]] });
  const each = ui.choice(box, { label: "bias moves after", name: "each",
    options: [["step", "the whole batch (V3)"], ["half", "each half of it"]] });
  each.style.maxWidth = "14rem";
  const step = ui.slider(box, { label: "step", name: "step", min: 1, max: router.steps, value: 1 });
  playable(box, step, "play", 4);
  const nodes = screens(part, "router", (share) => move(step, 1 + Math.round(share * (router.steps - 1))));
  const out = (name, label) => ui.readout(part, { name, label });
  const vio = out("max-vio", "MaxVio of this step"), half = out("half-vio", "MaxVio of its worse half");
  const calm = out("calm", "first step with MaxVio ≤ 0.10"), late = out("late-vio", "mean MaxVio, last 50 steps");
  const loads = out("loads", "loads"), biases = out("biases", "biases");
  let frames = [];
  function draw() {
    const frame = frames[step.current - 1], calmAt = frames.findIndex((f) => f.vio <= 0.1);
    const most = Math.max(0.01, ...frames.flatMap((f) => f.bias.map(Math.abs)));
    vio.textContent = frame.vio.toFixed(3);
    half.textContent = frame.half.toFixed(3);
    calm.textContent = calmAt < 0 ? "none" : calmAt + 1;
    late.textContent = mean(frames.slice(-50).map((f) => f.vio)).toFixed(3);
    loads.textContent = frame.load.join(" ");
    biases.textContent = fixed(frame.bias, 4);
    drawLoad(nodes.load, frame.load);
    drawBias(nodes.bias, frame.bias, most);
    drawCurve(nodes.curve, [{ values: frames.map((f) => f.vio), strong: true }],
      (step.current - 1) / (router.steps - 1), router.steps);
  }
  ui.on([speed, skew, lean, rule, each], () => {
    frames = simulate(router, { speed: speeds[speed.current], skew: skew.current,
      lean: lean.current, rule: rule.current, each: each.current === "half" });
    draw();
  });
  step.addEventListener("input", draw);
}

// ---- part 2: training runs, recorded

function replay(runs) {
  const part = ui.el("section", {}, ui.el("strong", {}, "Training runs, recorded"));
  root.append(part);
  const box = ui.controls(part), frames = runs[0].frames;
  const arm = ui.choice(box, { label: "balanced by", name: "arm",
    options: runs.map((run) => [run.arm, run.label]) });
  const layer = ui.choice(box, { label: "MoE layer", name: "layer", options: [["0", "first"], ["1", "second"]], value: "1" });
  const frame = ui.slider(box, { label: "step", name: "run-step", min: 0, max: frames.length - 1,
    value: 0, format: (i) => String(frames[i].step) });
  playable(box, frame, "run-play", 1);
  const nodes = screens(part, "run", (share) => move(frame, Math.round(share * (frames.length - 1))));
  const out = (name, label) => ui.readout(part, { name, label });
  const vio = out("run-max-vio", "MaxVio of this step, this layer"), loss = out("run-loss", "loss, nats a token");
  const final = out("run-heldout", "held-out loss at the end"), idle = out("run-idle", "experts below a tenth of the fair share");
  const series = (run) => run.frames.map((f) => maxVio(f.load[layer.current]));
  ui.on([arm, layer, frame], () => {
    const run = runs.find((r) => r.arm === arm.current), now = run.frames[frame.current];
    const load = now.load[layer.current], zeros = load.map(() => 0);
    const bias = (f) => f.bias?.[layer.current] ?? zeros, all = run.frames.flatMap(bias);
    vio.textContent = maxVio(load).toFixed(3);
    loss.textContent = run.loss[Math.max(0, frame.current - 1)].toFixed(2);
    final.textContent = run.heldout.toFixed(3);
    idle.textContent = load.filter((n) => n < 0.1 * mean(load)).length;
    drawLoad(nodes.load, load);
    drawBias(nodes.bias, bias(now), Math.max(0.01, ...all.map(Math.abs)));
    drawCurve(nodes.curve, runs.map((r) => ({ values: series(r), strong: r === run }))
      .sort((a, b) => a.strong - b.strong), frame.current / (frames.length - 1), frames.at(-1).step);
  });
}

if (data.router) steer(data.router);
if (data.runs) replay(data.runs);
