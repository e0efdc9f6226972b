// The tile walker: programs over the tiles of C = A B^T, which tiles each step asks for, what an L2
// cache keeps of them, waves and their tail. Data and arithmetic of figures/walker.py.
const [BLUE, ORANGE, GREEN, PINK] = ui.colours;
const GREY = ui.colours[5];
const { limits, card } = data;
const up = (n, size) => Math.ceil(n / size);
const percent = (share) => `${(100 * share).toFixed(1)} %`;

// ---- the walk

function place(tile, tilesM, tilesN, groupM) {
  const stripe = groupM * tilesN, first = Math.floor(tile / stripe) * groupM;
  const height = Math.min(tilesM - first, groupM), inside = tile % stripe;
  return [first + (inside % height), Math.floor(inside / height)];
}

// rows and columns of the output as it is computed, and how many tiles and slices that makes
function sizes(p) {
  const [rows, cols] = p.swapped ? [p.n, p.m] : [p.m, p.n];
  return { rows, cols, tilesM: up(rows, p.block_m), tilesN: up(cols, p.block_n), slices: up(p.k, p.block_k) };
}

function refusal(p) {
  for (const [name, value] of [["M", p.m], ["N", p.n], ["K", p.k], ["programs at once", p.at_once]]) {
    if (!Number.isInteger(value) || value < 1) {
      return `${name} must be an integer >= 1, got ${Number.isNaN(value) ? "None" : value}`;
    }
  }
  if (p.block_m < limits.rows) {
    return `BLOCK_M must be at least ${limits.rows}, the rows of Hopper's tensor-core product, `
      + `got ${p.block_m}: make it larger, or swap the sides`;
  }
  const sums = p.block_m * p.block_n;
  if (sums > limits.sums) {
    return `BLOCK_M x BLOCK_N must be at most ${ui.comma(limits.sums)}, half of a multiprocessor's `
      + `registers, got ${ui.comma(sums)}: make one smaller`;
  }
  const two = 2 * (p.block_m + p.block_n) * p.block_k * p.number_bytes;
  if (two > limits.shared) {
    return `tiles of two steps must fit into ${limits.shared / 1024} KiB of shared memory, `
      + `got ${two / 1024} KiB: make a BLOCK smaller`;
  }
  const { tilesM, tilesN, slices } = sizes(p), loads = 2 * tilesM * tilesN * slices;
  if (loads > limits.loads) {
    return `a walk must have at most ${ui.comma(limits.loads)} loads to be followed here, got `
      + `${ui.comma(loads)}: make a BLOCK larger`;
  }
  return "";
}

// a cache that keeps the tiles asked for last, as a ring: `last` is its end, a tile that is not in it
// has no next one. A tile's number is its row of tiles times `depths.length` plus its slice of K.
function cacheOf(capacity, extents, depths, from) {
  const slices = depths.length, last = extents.length * slices;
  const next = from ? from.next.slice() : new Int32Array(last + 1).fill(-1);
  const before = from ? from.before.slice() : new Int32Array(last + 1);
  let kept = from ? from.kept : 0;
  if (!from) next[last] = before[last] = last;
  const bytes = (tile) => extents[Math.floor(tile / slices)] * depths[tile % slices];
  function drop(tile) {
    next[before[tile]] = next[tile];
    before[next[tile]] = before[tile];
    next[tile] = -1;
    kept -= bytes(tile);
  }
  return {
    ask(tile) { // bytes that come from DRAM: all or none
      const missed = next[tile] < 0, size = bytes(tile);
      if (!missed) drop(tile);
      before[tile] = before[last];
      next[tile] = last;
      next[before[tile]] = before[last] = tile;
      kept += size;
      while (kept > capacity) drop(next[last]);
      return missed ? size : 0;
    },
    has: (tile) => next[tile] >= 0,
    kept: () => kept,
    copy: () => cacheOf(capacity, extents, depths, { next, before, kept }),
  };
}

// the programs of a wave: which tiles of C, and which rows of tiles of A and B they share
function waveOf(w, wave) {
  const { p } = w, atOnce = Math.min(p.at_once, w.tiles), where = [], wanted = new Set();
  let asked = 0;
  for (let tile = wave * atOnce; tile < Math.min(w.tiles, (wave + 1) * atOnce); tile++) {
    const [row, col] = place(tile, w.tilesM, w.tilesN, p.group_m);
    where.push({ tile, row, col });
    wanted.add(row).add(w.tilesM + col); // A's first, B's after them
    asked += w.extents[row] + w.extents[w.tilesM + col];
  }
  return { where, wanted, asked };
}

function takeStep(w, now, k, cache) {
  const from = new Map();
  let dram = 0;
  for (const row of now.wanted) {
    const fetched = cache.ask(row * w.slices + k);
    from.set(row, fetched > 0);
    dram += fetched;
  }
  return { asked: now.asked * w.depths[k], dram, from };
}

// of the cache, to draw from: a step is found from the last one before it; and their numbers in all
const COPIES = 40, COPIED = 4e6;

// bytes of all steps, and copies of the cache at the start of some waves
function walk(p, draws = true) {
  const w = { ...sizes(p), p, starts: [] };
  w.tiles = w.tilesM * w.tilesN;
  w.waves = up(w.tiles, p.at_once);
  const ends = (count, size, whole) => Array.from({ length: count }, (_, i) => Math.min(size, whole - i * size));
  w.extents = [...ends(w.tilesM, p.block_m, w.rows), ...ends(w.tilesN, p.block_n, w.cols)]; // A's, then B's
  w.depths = ends(w.slices, p.block_k, p.k).map((depth) => depth * p.number_bytes);
  w.every = up(w.waves, Math.max(1, Math.min(COPIES, Math.floor(COPIED / (w.extents.length * w.slices)))));
  const cache = cacheOf(Math.floor(p.l2_mib * 2 ** 20), w.extents, w.depths);
  let asked = 0, dram = 0;
  for (let wave = 0; wave < w.waves; wave++) {
    if (draws && wave % w.every === 0) w.starts.push({ cache: cache.copy(), dram });
    const now = waveOf(w, wave);
    for (let k = 0; k < w.slices; k++) {
      const step = takeStep(w, now, k, cache);
      asked += step.asked;
      dram += step.dram;
    }
  }
  const covered = w.tilesM * p.block_m * w.tilesN * p.block_n * w.slices * p.block_k;
  const length = w.waves * w.slices + p.start * (p.persistent ? 1 : w.waves);
  const operations = 2 * p.m * p.n * p.k, result = limits.result * p.m * p.n;
  return { ...w, asked, dram, length, result,
    least: p.number_bytes * p.k * (p.m + p.n), intensity: operations / (dram + result),
    masked: 1 - (p.m * p.n * p.k) / covered, tail: w.waves - w.tiles / p.at_once,
    idle: 1 - (w.tiles * w.slices) / (p.at_once * length) };
}

function stepOf(w, number) { // a step with what came before it
  const wave = Math.floor(number / w.slices), k = number % w.slices;
  const start = w.starts[Math.floor(wave / w.every)], cache = start.cache.copy();
  let sofar = start.dram, now, step;
  for (let at = wave - (wave % w.every); at <= wave; at++) {
    now = waveOf(w, at);
    for (let slice = 0; slice < (at < wave ? w.slices : k + 1); slice++) {
      step = takeStep(w, now, slice, cache);
      sofar += step.dram;
    }
  }
  return { ...step, where: now.where, wave, k, cache, sofar };
}

// ---- drawing

const rect = (x, y, width, height, attrs = {}) => ui.svg("rect", { x, y, width: Math.max(0, width), height: Math.max(0, height), ...attrs });
const text = (x, y, what, attrs = {}) => ui.svg("text", { x, y, "text-anchor": "middle", ...attrs }, what);
const HATCH = "mn-kernels-hatch";
const hatch = () => ui.svg("defs", {}, ui.svg("pattern", { id: HATCH, width: 5, height: 5, patternUnits: "userSpaceOnUse" },
  ui.svg("path", { d: "M0 5L5 0", stroke: GREY, "stroke-width": 1 })));
const PALE = 0.22;

// stretches of `count` cells for which `test` holds, as [first, end]
function runs(count, test) {
  const found = [];
  for (let at = 0; at < count; at++) {
    if (!test(at)) continue;
    const first = at;
    while (at < count && test(at)) at++;
    found.push([first, at]);
  }
  return found;
}

// a matrix of tiles, `inside` the share that the matrix itself fills
function frame(box, across, down, inside) {
  const { x, y, width, height } = box, w = width * inside[0], h = height * inside[1], parts = [];
  parts.push(rect(x + w, y, width - w, height, { fill: `url(#${HATCH})` }),
    rect(x, y + h, w, height - h, { fill: `url(#${HATCH})` }));
  const [cw, ch] = [width / across, height / down];
  const line = (x1, y1, x2, y2) => ui.svg("line", { x1, y1, x2, y2, stroke: GREY, "stroke-opacity": 0.45, "stroke-width": 0.6 });
  if (cw >= 4) for (let c = 1; c < across; c++) parts.push(line(x + c * cw, y, x + c * cw, y + height));
  if (ch >= 4) for (let r = 1; r < down; r++) parts.push(line(x, y + r * ch, x + width, y + r * ch));
  parts.push(rect(x, y, w, h, { fill: "none", stroke: "currentColor", "stroke-width": 1 }));
  return parts;
}

const TOP = 114, LEFT = 114, SIDE = 80, WIDE = 244; // of C, and how deep A and B are drawn

function boxes(w) {
  const shape = (w.tilesM * w.p.block_m) / (w.tilesN * w.p.block_n);
  const tall = Math.min(230, Math.max(70, WIDE * shape));
  return { c: { x: LEFT, y: TOP, width: WIDE, height: tall }, a: { x: LEFT - SIDE - 8, y: TOP, width: SIDE, height: tall },
    b: { x: LEFT, y: TOP - SIDE - 8, width: WIDE, height: SIDE } };
}

// tiles of one operand: kept ones pale, those of this step full from DRAM, small from L2
function drawOperand(w, step, box, isB) {
  const { slices } = w, count = isB ? w.tilesN : w.tilesM, first = isB ? w.tilesM : 0;
  const across = (isB ? box.width : box.height) / count, deep = (isB ? box.height : box.width) / slices;
  const cell = (at, k, n, attrs, inset = 0) => {
    const share = w.extents[first + at] / (isB ? w.p.block_n : w.p.block_m); // of the tile, in the matrix
    const [from, wide] = [(at + inset) * across, across * share * (1 - 2 * inset)];
    const [low, long] = [(k + inset * n) * deep, n * deep * (1 - 2 * inset)];
    return isB ? rect(box.x + from, box.y + low, wide, long, attrs) : rect(box.x + low, box.y + from, long, wide, attrs);
  };
  const parts = [];
  for (let at = 0; at < count; at++) {
    const kept = (k) => step.cache.has((first + at) * slices + k);
    for (const [k, end] of runs(slices, kept)) parts.push(cell(at, k, end - k, { fill: BLUE, "fill-opacity": PALE }));
    const fetched = step.from.get(first + at);
    if (fetched === undefined) continue;
    const least = Math.max(1, 2 / deep); // a slice is at least two units deep, so that it is seen
    parts.push(cell(at, Math.min(step.k, slices - least), least, { fill: fetched ? ORANGE : GREEN }, fetched || deep < 5 ? 0 : 0.22));
  }
  return parts;
}

function drawOutput(w, step, box) {
  const [cw, ch] = [box.width / w.tilesN, box.height / w.tilesM], parts = [];
  const first = step.where[0].tile, running = new Map(step.where.map((at) => [at.row * w.tilesN + at.col, at.tile]));
  const done = new Uint8Array(w.tilesM * w.tilesN);
  for (let tile = 0; tile < first; tile++) {
    const [row, col] = place(tile, w.tilesM, w.tilesN, w.p.group_m);
    done[row * w.tilesN + col] = 1;
  }
  for (let row = 0; row < w.tilesM; row++) {
    const at = (from, end, attrs) => rect(box.x + from * cw, box.y + row * ch, (end - from) * cw, ch, attrs);
    for (const [from, end] of runs(w.tilesN, (col) => done[row * w.tilesN + col])) parts.push(at(from, end, { fill: BLUE, "fill-opacity": PALE }));
    for (const [from, end] of runs(w.tilesN, (col) => running.has(row * w.tilesN + col))) {
      parts.push(at(from, end, { fill: PINK, "fill-opacity": 0.75, stroke: "currentColor", "stroke-width": ch >= 4 ? 1 : 0 }));
    }
  }
  return parts;
}

// the order of tiles, where there is room for it: in the part of a tile that is in the matrix
function drawNumbers(w, step, box) {
  const [cw, ch] = [box.width / w.tilesN, box.height / w.tilesM];
  if (cw < 17 || ch < 12) return [];
  const first = step.where[0].tile, end = first + step.where.length;
  return Array.from({ length: w.tiles }, (_, tile) => {
    const [row, col] = place(tile, w.tilesM, w.tilesN, w.p.group_m), now = tile >= first && tile < end;
    const [wide, high] = [w.extents[w.tilesM + col] / w.p.block_n, w.extents[row] / w.p.block_m];
    return text(box.x + (col + wide / 2) * cw, box.y + (row + high / 2) * ch + 3.5, tile,
      { "data-at": `${row} ${col}`, style: `font-size:${wide < 0.7 ? 9 : 10}px;${now ? "font-weight:700" : ""}`, "fill-opacity": now || tile < first ? 1 : 0.6 });
  });
}

function drawWalk(node, w, step) {
  const { a, b, c } = boxes(w), { p } = w, [left, top] = p.swapped ? ["B", "A"] : ["A", "B"];
  const [down, over] = [w.rows / (w.tilesM * p.block_m), w.cols / (w.tilesN * p.block_n)];
  const depth = p.k / (w.slices * p.block_k), bottom = c.y + c.height;
  node.setAttribute("viewBox", `0 0 366 ${bottom + 30}`);
  const label = (x, y, what) => text(x, y, what, { "text-anchor": "start" });
  node.replaceChildren(hatch(),
    ...drawOperand(w, step, a, false), ...frame(a, w.slices, w.tilesM, [depth, down]),
    ...drawOperand(w, step, b, true), ...frame(b, w.tilesN, w.slices, [over, depth]),
    ...drawOutput(w, step, c), ...frame(c, w.tilesN, w.tilesM, [over, down]), ...drawNumbers(w, step, c),
    label(LEFT, 14, `${top}ᵀ: ${ui.comma(p.k)} × ${ui.comma(w.cols)}`),
    label(4, 44, `wave ${step.wave + 1} of ${w.waves}`), label(4, 62, `slice ${step.k + 1} of ${w.slices}`), label(4, 80, "of K"),
    label(a.x, bottom + 16, `${left}: ${ui.comma(w.rows)} × ${ui.comma(p.k)}`),
    text(c.x + c.width, bottom + 16, `${p.swapped ? "Cᵀ" : "C"}: ${ui.comma(w.rows)} × ${ui.comma(w.cols)}`, { "text-anchor": "end" }));
}

const LONGEST = 60; // waves that are drawn one by one

// places times steps: what multiplies, what waits for its first tiles, what has no tile
function drawTime(node, w, number) {
  const { p, waves, slices } = w, x = (at) => 8 + (346 * at) / w.length, high = 64, y = 24;
  const whole = w.tiles / p.at_once, last = whole - (waves - 1), parts = [hatch()];
  const busy = (from, n, share) => rect(x(from), y + high * (1 - share), x(from + n) - x(from), high * share, { fill: BLUE, "fill-opacity": 0.55, stroke: BLUE, "stroke-width": 0.5 });
  const wait = (from, n, share) => rect(x(from), y + high * (1 - share), x(from + n) - x(from), high * share, { fill: `url(#${HATCH})`, stroke: GREY, "stroke-width": 0.5 });
  const spread = waves <= LONGEST;
  const begin = (wave) => wave * slices + p.start * (p.persistent ? 1 : spread ? wave + 1 : waves);
  if (p.start && (p.persistent || !spread)) parts.push(wait(0, begin(0), waves > 1 ? 1 : last));
  for (let wave = 0; wave < (spread ? waves : 1); wave++) {
    const share = wave === waves - 1 ? last : 1;
    if (p.start && !p.persistent && spread) parts.push(wait(begin(wave) - p.start, p.start, share));
    parts.push(busy(begin(wave), spread ? slices : slices * (waves - 1), share));
  }
  if (!spread) parts.push(busy(begin(waves - 1), slices, last));
  const at = x(begin(Math.floor(number / slices)) + (number % slices) + 0.5);
  parts.push(rect(8, y, 346, high, { fill: "none", stroke: "currentColor" }),
    ui.svg("line", { x1: at, x2: at, y1: y - 4, y2: y + high + 4, stroke: PINK, "stroke-width": 2.5 }),
    text(180, 14, `${ui.comma(p.at_once)} places, in time: blue multiplies`),
    text(180, y + high + 18, "hatched waits for its first tiles, empty has no tile"));
  node.replaceChildren(...parts);
}

const GROUPS = [1, 2, 4, 8, 16, 32, 64];

function drawGroups(node, w, byGroup) {
  const top = Math.max(...byGroup), y = (bytes) => 124 - (88 * bytes) / top, least = y(w.least);
  const parts = [text(180, 14, "bytes of A and B from DRAM, by GROUP_M")];
  GROUPS.forEach((group, i) => {
    const x = 10 + 50 * i, chosen = group === w.p.group_m;
    parts.push(rect(x, y(byGroup[i]), 36, 124 - y(byGroup[i]), { fill: chosen ? ORANGE : BLUE, "fill-opacity": chosen ? 1 : 0.7, stroke: chosen ? "currentColor" : "none" }),
      text(x + 18, y(byGroup[i]) - 5, `${(byGroup[i] / w.least).toFixed(1)}×`),
      text(x + 18, 140, group, chosen ? { style: "font-weight:700" } : {}));
  });
  parts.push(ui.svg("line", { x1: 4, x2: 362, y1: least, y2: least, stroke: "currentColor", "stroke-dasharray": "5 4" }),
    text(180, 157, "dashed: each of them once; bars are multiples of it"));
  node.replaceChildren(...parts);
}

// ---- the page

function note(...children) {
  root.append(ui.el("p", { style: "margin:0.2rem 0" }, ...children));
}

function move(slider, value) {
  slider.current = value;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
}

// a button that moves a slider by itself until the end, in about ten seconds
function playable(box, slider) {
  const button = ui.button(box, { label: "Play", name: "play" });
  button.style.cssText = "align-self:end;justify-self:start;min-width:6rem";
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.current >= Number(slider.max)) move(slider, Number(slider.min));
    button.textContent = "Stop";
    timer = setInterval(() => {
      const last = Number(slider.max), stride = Math.ceil(last / 120);
      if (!button.isConnected || slider.current >= last) return stop();
      move(slider, Math.min(last, slider.current + stride));
    }, 90);
  });
}

const POWERS = [16, 32, 64, 128, 256].map((size) => [size, String(size)]);
const first = data.presets[0];
note("C = A Bᵀ, in tiles. A program makes one tile of C: in each step it asks for one tile of A and one of B. "
  + "Programs that run at once march in step; what several ask for is fetched once.");
const box = ui.controls(root);
const preset = ui.choice(box, { label: "start from", name: "preset", options: data.presets.map((p) => [p.name, p.name]) });
const group = ui.slider(box, { label: "GROUP_M, stripe height", name: "group_m", min: 1, max: 64, value: first.group_m,
  format: (n) => (n === 1 ? "1, row by row" : String(n)) });
const cacheSize = ui.slider(box, { label: "L2 cache", name: "l2", min: 0, max: data.l2_mib.length - 1,
  value: data.l2_mib.indexOf(first.l2_mib), format: (i) => ui.bytes(data.l2_mib[i] * 2 ** 20) });
const shape = ui.el("details", {}, ui.el("summary", { "data-name": "more" }, "M, N, K, tiles and programs: change them"));
root.append(shape);
const more = ui.controls(shape);
function numeric(label, name) {
  const input = ui.number(more, { label, name, min: 1, step: 1, value: first[name] });
  input.style.width = "6rem";
  return input;
}
const power = (label, name) => ui.choice(more, { label, name, options: POWERS, value: String(first[name]) });
const inputs = {
  m: numeric("M: rows of A", "m"), n: numeric("N: rows of B", "n"), k: numeric("K: the summed axis", "k"),
  block_m: power("BLOCK_M", "block_m"), block_n: power("BLOCK_N", "block_n"), block_k: power("BLOCK_K", "block_k"),
  number_bytes: ui.choice(more, { label: "numbers of A and B", name: "number_bytes", value: String(first.number_bytes), options: [["1", "FP8, 1 byte"], ["2", "BF16, 2 bytes"]] }),
  at_once: numeric(`programs at once (${card.name}: ${card.multiprocessors})`, "at_once"),
  persistent: ui.choice(more, { label: "a program makes", name: "persistent", value: "true", options: [["true", "many tiles (persistent)"], ["false", "one tile"]] }),
  start: ui.slider(more, { label: "steps until its first tiles are there", name: "start", min: 0, max: 8, value: first.start }),
  swapped: ui.toggle(more, { label: "swap the sides: B's rows go down", name: "swapped", value: first.swapped }),
};
const refused = ui.refusal(root);
const results = ui.el("div");
root.append(results);
const stepBox = ui.controls(results);
const step = ui.slider(stepBox, { label: "step", name: "step", min: 0, max: 1, value: 0, format: (n) => ui.comma(n + 1) });
playable(stepBox, step);
const grid = ui.el("div", { style: "display:grid;gap:0.4rem 1rem;grid-template-columns:repeat(auto-fit,minmax(min(21rem,100%),1fr))" });
results.append(grid);
const [leftSide, rightSide] = [ui.el("div"), ui.el("div")];
grid.append(leftSide, rightSide);
const picture = ui.plot(leftSide, { width: 366, height: 380, name: "walk",
  alt: "The output C as tiles with the operands beside it: tiles that programs work on now, tiles of A and B that this step loads, and those in the L2 cache" });
const swatch = (style, label) => ui.el("span", { style: "white-space:nowrap" },
  ui.el("span", { style: `display:inline-block;vertical-align:-1px;margin:0 0.3rem 0 0;${style}` }), label);
const square = (size, margin) => `width:${size}px;height:${size}px;margin:0 ${margin + 4}px 0 ${margin}px`;
leftSide.append(ui.el("div", { style: "display:flex;flex-wrap:wrap;gap:0 0.9rem;font-size:0.8rem" },
  swatch(`${square(12, 0)};background:${PINK};border:1px solid`, "made now"),
  swatch(`${square(12, 0)};background:${ORANGE}`, "comes from DRAM"),
  swatch(`${square(7, 2)};background:${GREEN}`, "comes from L2 (small)"),
  swatch(`${square(12, 0)};background:${BLUE}38`, "kept in L2, or done"),
  swatch(`${square(12, 0)};background:repeating-linear-gradient(135deg,${GREY} 0 1px,transparent 1px 4px)`, "outside: masked"),
  ui.el("span", {}, "numbers: the order of tiles")));
const time = ui.plot(rightSide, { width: 362, height: 112, name: "time", alt: "Places of programs over time: multiplying, waiting for their first tiles, without a tile" });
const groups = ui.plot(rightSide, { width: 366, height: 162, name: "groups", alt: "Bytes from DRAM for seven heights of a stripe, as bars, beside the least" });

const out = (where, name, label) => ui.readout(where, { name, label });
const ofStep = ui.el("div"), ofAll = ui.el("div");
rightSide.append(ofStep);
results.append(ofAll);
const heading = (node, words) => node.append(ui.el("p", { style: "font-weight:600;margin:0.5rem 0 0" }, words));
heading(ofStep, "This step");
const now = {
  running: out(ofStep, "running", "programs at work"), asked: out(ofStep, "now-asked", "A, B: asked for"),
  dram: out(ofStep, "now-dram", "A, B: from DRAM"), kept: out(ofStep, "now-kept", "kept in L2 after it"),
  sofar: out(ofStep, "so-far", "A, B: from DRAM, so far"),
};
heading(ofAll, "The whole product");
const all = {
  asked: out(ofAll, "asked", "A, B: asked for by programs"), dram: out(ofAll, "dram", "A, B: from DRAM"),
  l2: out(ofAll, "l2-bytes", "A, B: from L2"), least: out(ofAll, "least", "A, B: the least, each once"),
  result: out(ofAll, "result", "C: written once, BF16"), intensity: out(ofAll, "intensity", "operations a byte of DRAM"),
  fed: out(ofAll, "fed", "share of the peak that DRAM can feed"), tiles: out(ofAll, "tiles", "tiles of C, and waves"),
  tail: out(ofAll, "tail", "last wave: places without a tile"), idle: out(ofAll, "idle", "places idle: all waves and starts"),
  masked: out(ofAll, "masked", "products outside of the matrices"), sums: out(ofAll, "sums", "FP32 sums of a program"),
};
let current;

function problem() {
  const p = { group_m: group.current, l2_mib: data.l2_mib[cacheSize.current] };
  for (const [name, input] of Object.entries(inputs)) p[name] = input.current;
  for (const name of ["block_m", "block_n", "block_k", "number_bytes"]) p[name] = Number(p[name]);
  return { ...p, persistent: p.persistent === "true" };
}

function sayAll(w) {
  const peak = card.tflops[w.p.number_bytes], fed = Math.min(1, (w.intensity * card.tb_s) / peak);
  all.tiles.textContent = `${ui.comma(w.tiles)} in ${ui.comma(w.waves)}`;
  const amounts = { asked: w.asked, l2: w.asked - w.dram, dram: w.dram, least: w.least, result: w.result };
  for (const [name, bytes] of Object.entries(amounts)) {
    all[name].textContent = ui.bytes(bytes);
    all[name].dataset.bytes = bytes;
  }
  all.intensity.textContent = w.intensity.toFixed(1);
  all.fed.textContent = `${percent(fed)} (${card.name})`;
  all.tail.textContent = percent(w.tail);
  all.idle.textContent = percent(w.idle);
  all.masked.textContent = percent(w.masked);
  const sums = w.p.block_m * w.p.block_n;
  all.sums.textContent = `${ui.comma(sums)} (${percent(sums / (2 * limits.sums))} of registers)`;
}

function showStep() {
  if (!current) return;
  const drawn = stepOf(current, step.current);
  now.running.textContent = `${ui.comma(drawn.where.length)} of ${ui.comma(current.p.at_once)} places`;
  for (const [name, bytes] of [["asked", drawn.asked], ["dram", drawn.dram], ["kept", drawn.cache.kept()], ["sofar", drawn.sofar]]) {
    now[name].textContent = ui.bytes(bytes);
    now[name].dataset.bytes = bytes;
  }
  drawWalk(picture, current, drawn);
  drawTime(time, current, step.current);
}

function show() {
  const p = problem();
  refused.textContent = refusal(p);
  results.hidden = refused.textContent !== "";
  current = results.hidden ? undefined : walk(p);
  if (!current) return;
  sayAll(current);
  step.max = current.waves * current.slices - 1;
  step.current = Math.min(step.current, Number(step.max)); // the old place, where there is one
  const byGroup = GROUPS.map((height) => (height === p.group_m ? current.dram : walk({ ...p, group_m: height }, false).dram));
  groups.dataset.bytes = byGroup.join(" ");
  drawGroups(groups, current, byGroup);
  showStep();
}

preset.addEventListener("input", () => {
  const p = data.presets.find((one) => one.name === preset.current);
  for (const [name, input] of Object.entries(inputs)) {
    input.current = ["block_m", "block_n", "block_k", "number_bytes", "persistent"].includes(name) ? String(p[name]) : p[name];
  }
  group.current = p.group_m;
  cacheSize.current = data.l2_mib.indexOf(p.l2_mib);
  step.current = 0;
});
step.addEventListener("input", showStep);
// a tile that is pressed: the first step of the wave that makes it
picture.addEventListener("pointerdown", (event) => {
  if (!current) return;
  const at = picture.getBoundingClientRect(), { c } = boxes(current), scale = 366 / at.width;
  const col = Math.floor((((event.clientX - at.left) * scale - c.x) / c.width) * current.tilesN);
  const row = Math.floor((((event.clientY - at.top) * scale - c.y) / c.height) * current.tilesM);
  if (col < 0 || row < 0 || col >= current.tilesN || row >= current.tilesM) return;
  for (let tile = 0; tile < current.tiles; tile++) {
    const [r, k] = place(tile, current.tilesM, current.tilesN, current.p.group_m);
    if (r === row && k === col) return move(step, Math.floor(tile / current.p.at_once) * current.slices);
  }
});
picture.style.cursor = "pointer";
ui.on([preset, group, cacheSize, ...Object.values(inputs)], show);
