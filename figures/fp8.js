// The FP8 microscope: one number in five formats (data.number), and a few tokens with an outlier
// under one scale a group (data.tile). Each part is shown if it is there. The arithmetic is that of
// minids.formats: FP32 wherever it says FP32, ties to even, what is too large becomes the largest.
const [BLUE, ORANGE, GREEN] = ui.colours;
const GREY = ui.colours[5];
const sum = (list) => list.reduce((a, b) => a + b, 0);

// ---- arithmetic that both parts share

// a format as minids.formats.Format has it; INT8 has a step in place of exponent and mantissa
function completed(f) {
  if (f.step) return { ...f, key: f.name.toLowerCase(), half: f.step / 2 };
  const bias = 2 ** (f.exponent_bits - 1) - 1, least = 1 - bias, smallest = 2 ** (least - f.mantissa_bits);
  return { ...f, key: f.name.toLowerCase(), bias, least, smallest, half: smallest / 2, normal: 2 ** least };
}

function even(x) { // to the nearest integer, ties to the even one
  const low = Math.floor(x), rest = x - low;
  return rest === 0.5 ? low + (low % 2) : Math.round(x);
}

function exponentOf(x) { // floor(log2(x)), exact
  const e = Math.floor(Math.log2(x));
  return 2 ** e > x ? e - 1 : 2 ** (e + 1) <= x ? e + 1 : e;
}

function round(x, f) {
  const size = Math.abs(x), sign = x < 0 || Object.is(x, -0) ? -1 : 1;
  if (Number.isNaN(x)) return x;
  if (size === Infinity) return sign * (f.overflows ? Infinity : f.max);
  const step = f.step ?? 2 ** (Math.max(size ? exponentOf(size) : f.least, f.least) - f.mantissa_bits);
  const nearest = even(size / step) * step;
  if (nearest > f.max) return sign * (f.overflows ? Infinity : f.max);
  return sign * nearest;
}

const say = (v, digits = 7) => (Object.is(v, -0) ? "-0" : Number.isFinite(v)
  ? String(Number(v.toPrecision(digits))) : Number.isNaN(v) ? "NaN" : v > 0 ? "∞" : "-∞");

const text = (x, y, what, attrs = {}) => ui.svg("text", { x, y, "text-anchor": "middle", ...attrs }, what);
const line = (x1, y1, x2, y2, attrs = {}) =>
  ui.svg("line", { x1, y1, x2, y2, stroke: GREY, "stroke-width": 1, ...attrs });
const power = (x, y, exponent) => text(x, y, ["2", ui.svg("tspan", { dy: -4, style: "font-size:9px" }, exponent)]);

function part(title, note) {
  const node = ui.el("section", { style: "margin-bottom:1rem" }, ui.el("strong", {}, title),
    ui.el("p", { style: "margin:0.2rem 0" }, note));
  root.append(node);
  return node;
}

function sideBySide(node) {
  const box = ui.el("div", { style: "display:grid;gap:0.4rem 1rem;grid-template-columns:"
    + "repeat(auto-fit,minmax(min(17rem,100%),1fr))" });
  node.append(box);
  return box;
}

function send(input, value) {
  input.current = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

// a drag in a picture: `act` gets where, as shares of its width and height
function draggable(node, act) {
  const at = (event) => {
    const box = node.getBoundingClientRect();
    const share = (value) => Math.min(1, Math.max(0, value));
    act(share((event.clientX - box.left) / box.width), share((event.clientY - box.top) / box.height));
  };
  node.style.touchAction = "pan-y";
  node.addEventListener("pointerdown", (event) => { node.setPointerCapture(event.pointerId); at(event); });
  node.addEventListener("pointermove", (event) => { if (event.buttons) at(event); });
}

// ---- part 1: one number; bits of a format as an integer, `code`

function decode(code, f) {
  const width = f.bits - 1, negative = code >> width;
  if (f.step) return (negative ? code - 2 ** f.bits : code) * f.step; // two's complement
  const e = (code >> f.mantissa_bits) % 2 ** f.exponent_bits, m = code % 2 ** f.mantissa_bits;
  const top = 2 ** f.exponent_bits - 1, ones = 2 ** f.mantissa_bits - 1, sign = negative ? -1 : 1;
  if (f.infinity && e === top) return m ? NaN : sign * Infinity;
  if (!f.infinity && e === top && m === ones) return NaN;
  return sign * 2 ** (Math.max(e, 1) - f.bias) * ((e ? 1 : 0) + m / 2 ** f.mantissa_bits);
}

function encode(v, f) { // of a value that the format has; null: it has no code for it
  if (f.step) return Number.isNaN(v) ? null : (Math.round(v / f.step) + 2 ** f.bits) % 2 ** f.bits;
  if (Number.isNaN(v)) return 2 ** (f.bits - 1) - 1; // all ones, as minids writes it
  const size = Math.abs(v), sign = v < 0 || Object.is(v, -0) ? 2 ** (f.bits - 1) : 0;
  if (size === Infinity) return sign + (2 ** f.exponent_bits - 1) * 2 ** f.mantissa_bits;
  if (size < f.normal) return sign + size / f.smallest;
  const e = exponentOf(size);
  return sign + (e + f.bias) * 2 ** f.mantissa_bits + (size / 2 ** e - 1) * 2 ** f.mantissa_bits;
}

function neighbours(v, f) { // the next numbers below and above; null: there is none
  if (!Number.isFinite(v)) return [null, null];
  const size = Math.abs(v), step = f.step ?? 2 ** (Math.max(size ? exponentOf(size) : f.least, f.least) - f.mantissa_bits);
  // below a power of two numbers stand twice as close
  const inner = !f.step && size === 2 ** exponentOf(size) && size > f.normal ? step / 2 : step;
  const [low, high] = v < 0 ? [v - step, v + inner] : [v - (size ? inner : step), v + step];
  return [low, high].map((w) => (Math.abs(w) > f.max * (1 + 1e-9) ? null : w));
}

function kindOf(x, v, code, f) {
  if (code === null) return "INT8 has no NaN";
  if (Number.isNaN(v)) return "NaN";
  if (!Number.isFinite(v)) return "infinity";
  if (Math.abs(x) > f.max) return `saturated: ${say(f.max)} is its largest`;
  if (v === 0) return x === 0 ? "zero" : "flushed to zero";
  if (f.step) return "integer";
  return Math.abs(v) < f.normal ? "subnormal" : "normal";
}

function recipe(code, v, f) { // how the bits make the value
  if (code === null || !Number.isFinite(v)) return [];
  if (f.step) return [`${say(Math.round(v / f.step))} × ${say(f.step, 4)}`];
  const e = (code >> f.mantissa_bits) % 2 ** f.exponent_bits, m = code % 2 ** f.mantissa_bits;
  return [`${code >> (f.bits - 1) ? "-" : "+"}2`, ui.el("sup", {}, `${Math.max(e, 1)}−${f.bias}`),
    ` × (${e ? 1 : 0} + ${m}/${2 ** f.mantissa_bits})`];
}

const fieldOf = (f, bit) => (bit === f.bits - 1 ? "sign" : f.step ? "integer"
  : bit >= f.mantissa_bits ? "exponent" : "mantissa");
const TINT = { sign: ORANGE, exponent: BLUE, mantissa: GREEN, integer: GREEN };

// bits are one stop of the Tab key a format: arrows go from bit to bit, Space or Enter turns one
function bitRow(f, flip) {
  const row = ui.el("div", { role: "toolbar", "aria-label": `bits of ${f.name}`, style: "display:flex;flex-wrap:wrap;gap:0.2rem 0.5rem" });
  const buttons = [], groups = {};
  for (let bit = f.bits - 1; bit >= 0; bit--) {
    const field = fieldOf(f, bit);
    groups[field] ??= row.appendChild(ui.el("span", { style: "display:inline-flex;gap:1px" }));
    const node = ui.el("button", { type: "button", "data-name": `${f.key}-bit-${bit}`, tabindex: buttons.length ? -1 : 0,
      style: "border:0;border-radius:3px 3px 0 0;font-family:monospace;font-size:1rem;height:1.75rem;padding:0;"
        + `width:1.5rem;border-bottom:3px solid ${TINT[field]}` });
    node.addEventListener("click", () => flip(f, bit));
    groups[field].append(node);
    buttons.push(node);
  }
  row.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(event.target), last = buttons.length - 1;
    const to = { ArrowLeft: Math.max(0, at - 1), ArrowRight: Math.min(last, at + 1), Home: 0, End: last }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    buttons[at].tabIndex = -1;
    buttons[to].tabIndex = 0;
    buttons[to].focus();
  });
  const show = (code) => buttons.forEach((node, i) => {
    const bit = f.bits - 1 - i, field = fieldOf(f, bit), on = code === null ? null : (code >> bit) & 1;
    node.textContent = on ?? "–";
    node.style.background = on ? `${TINT[field]}40` : "transparent";
    node.setAttribute("aria-pressed", String(Boolean(on)));
    node.setAttribute("aria-label", `${f.name}, ${field} bit ${field === "sign" ? "" : bit}: ${on ?? "none"}`);
  });
  return { row, show };
}

function formatRow(node, f, flip) {
  const bits = bitRow(f, flip), cell = (name) => ui.el("span", { "data-name": `${f.key}-${name}` });
  const out = Object.fromEntries(["kind", "value", "error", "how", "below", "above", "code"].map((n) => [n, cell(n)]));
  out.value.style.fontWeight = out.error.style.fontWeight = 600;
  const quiet = (...children) => ui.el("div", { style: "font-size:0.8rem" }, ...children);
  node.append(ui.el("div", { style: "border-top:1px solid rgba(122,122,122,0.35);display:grid;gap:0.1rem 1rem;padding:0.3rem 0;"
    + "grid-template-columns:repeat(auto-fit,minmax(min(17rem,100%),1fr))" },
    ui.el("div", {}, ui.el("div", {}, ui.el("b", {}, f.name), " ", out.kind), bits.row),
    ui.el("div", {}, ui.el("div", {}, out.value, ", error ", out.error),
      quiet("code ", out.code, ": ", out.how), quiet("neighbours ", out.below, " and ", out.above))));
  return (x, code) => {
    const v = code === null ? NaN : decode(code, f), [below, above] = neighbours(v, f);
    bits.show(code);
    out.kind.textContent = kindOf(x, v, code, f);
    out.value.textContent = say(v);
    const error = x === v ? 0 : (100 * (v - x)) / x;
    out.error.textContent = !Number.isFinite(v - x) ? "–" : Math.abs(error) > 1e-5 ? `${error > 0 ? "+" : ""}${say(error, 3)} %` : "none";
    out.code.textContent = code === null ? "none" : `0x${code.toString(16).toUpperCase().padStart(Math.ceil(f.bits / 4), "0")}`;
    out.how.replaceChildren(...recipe(code, v, f));
    out.below.textContent = below === null ? "none" : say(below);
    out.above.textContent = above === null ? "none" : say(above);
    return v;
  };
}

// a format's numbers in [0, end], largest first; below `solid` they stand closer than `close`
function numbersUpTo(end, f, close) {
  const found = [];
  let top = Math.min(end, f.max);
  for (let e = f.step ? 0 : exponentOf(top); ; e--) {
    const lowest = f.step || e <= f.least, low = lowest ? 0 : 2 ** e;
    const step = f.step ?? 2 ** (Math.max(e, f.least) - f.mantissa_bits);
    if (step < close) return { found, solid: top };
    for (let n = Math.floor(top / step); n * step >= low && n >= 0; n--) found.push(n * step);
    if (lowest) return { found, solid: 0 };
    top = low * (1 - 2 ** -(f.mantissa_bits + 3));
  }
}

// all formats' numbers between 0 and twice x: x stands in the middle, whatever it is
function drawLine(node, x, values, formats) {
  const size = Math.abs(x), end = Number.isFinite(size) ? 2 * size || 2 ** -8 : NaN, at = (v) => 56 + (280 * v) / end;
  node.replaceChildren(text(180, 14, "numbers that each format has, from 0 to 2x"));
  if (Number.isNaN(end)) return node.append(text(180, 100, `${say(x)} is on no line`));
  const middle = at(end / 2), bottom = 30 + 34 * formats.length;
  formats.forEach((f, i) => {
    const y = 52 + 34 * i, { found, solid } = numbersUpTo(end, f, end / 230);
    node.append(text(46, y, f.name, { "text-anchor": "end" }));
    if (solid) node.append(ui.svg("rect", { x: at(0), y: y - 10, width: at(solid) - at(0), height: 10, fill: GREY, "fill-opacity": 0.45 }));
    for (const v of found) node.append(line(at(v), y - 10, at(v), y, { stroke: "currentColor" }));
    if (Number.isFinite(values[i])) {
      const stored = at(Math.abs(values[i]));
      node.append(line(middle, y - 14, stored, y - 14, { stroke: ORANGE, "stroke-width": 2 }),
        ui.svg("circle", { cx: stored, cy: y - 5, r: 5, fill: BLUE, stroke: "currentColor" }));
    }
  });
  const sign = x < 0 ? -1 : 1;
  node.append(line(middle, 26, middle, bottom, { stroke: ORANGE, "stroke-dasharray": "4 3" }));
  for (const [v, anchor] of [[0, "middle"], [end / 2, "middle"], [end, "end"]]) {
    node.append(text(v === end ? 354 : at(v), bottom + 14, `${v === end / 2 ? "x = " : ""}${say(sign * v || 0, 4)}`, { "text-anchor": anchor }));
  }
}

const LOWEST = -18, HIGHEST = 18; // powers of two of the value's slider and of the picture of ranges

function drawRanges(node, x, formats) {
  const at = (e) => 50 + (290 * (Math.min(HIGHEST, Math.max(LOWEST, e)) - LOWEST)) / (HIGHEST - LOWEST);
  const bottom = 30 + 34 * formats.length;
  node.replaceChildren(text(180, 14, "range: full normal, framed subnormal (drag)"),
    ui.svg("rect", { x: 50, y: 20, width: 290, height: bottom - 20, fill: "transparent" }));
  for (let e = -16; e <= 16; e += 8) {
    node.append(line(at(e), 24, at(e), bottom, { "stroke-opacity": 0.35 }), power(at(e), bottom + 15, e));
  }
  formats.forEach((f, i) => {
    const y = 40 + 34 * i, [low, normal, high] = [f.step ?? f.smallest, f.step ?? f.normal, f.max].map((v) => at(Math.log2(v)));
    node.append(text(46, y + 11, f.name, { "text-anchor": "end" }),
      ui.svg("rect", { x: low, y, width: normal - low, height: 13, fill: "none", stroke: BLUE }),
      ui.svg("rect", { x: normal, y, width: high - normal, height: 13, fill: f.step ? GREEN : BLUE, "fill-opacity": 0.6 }));
    const note = f.step ? "equal steps" : high === at(HIGHEST) ? "← goes on both ways →" : "";
    node.append(text((normal + high) / 2, y + 25, note));
  });
  if (x && Number.isFinite(x)) {
    const here = at(Math.log2(Math.abs(x)));
    node.append(line(here, 20, here, bottom, { stroke: ORANGE, "stroke-width": 2 }), text(here, bottom + 30, "|x|"));
  }
}

function microscope(number) {
  const formats = number.formats.map(completed);
  const node = part("A number under the microscope", [
    "Type a number, drag it, or turn its bits: ", ...["sign", "exponent", "mantissa"].flatMap((field) => [
      ui.el("span", { style: `border-bottom:3px solid ${TINT[field]}` }, field), ", "]),
    `from left to right. INT8 is scaled so that 127 stands for ${say(formats[0].max)}, ${formats[0].name}'s largest.`]);
  const box = ui.controls(node);
  const typed = ui.number(box, { label: "x (empty: NaN)", name: "x", value: number.start });
  const size = ui.slider(box, { label: "size of x, logarithmic", name: "size", log: true, min: 2 ** LOWEST,
    max: 2 ** HIGHEST, step: 1 / 64, value: Math.abs(number.start), format: (v) => `about ${say(v, 2)}` });
  const example = ui.choice(box, { label: "look at", name: "example",
    options: [["", "…"], ...number.examples.map(([name], i) => [i, name])] });
  example.style.maxWidth = "13rem";
  const summary = ui.readout(node, { label: "in E4M3", name: "summary" });
  const pictures = sideBySide(node);
  const nearby = ui.plot(pictures, { width: 360, height: 220, name: "line", alt: "Numbers of each format between 0 and twice x; x in the middle, what each format keeps of it as a dot" });
  const ranges = ui.plot(pictures, { width: 360, height: 235, name: "ranges", alt: "Range of each format on a logarithmic line, with the size of x; drag sideways to move x" });
  let state;
  const rows = formats.map((f) => formatRow(node, f, flip));

  // `source`: the format whose bits were turned; it keeps its code, which may be one of several
  function look(x, source = {}) {
    state = { x, codes: formats.map((f) => (f === source.format ? source.code : encode(round(x, f), f))) };
    const values = rows.map((show, i) => show(x, state.codes[i]));
    drawLine(nearby, x, values, formats);
    drawRanges(ranges, x, formats);
    const error = values[0] === x ? "" : `, ${kindOf(x, values[0], state.codes[0], formats[0])}`;
    summary.textContent = `${say(x)} → ${say(values[0])}${error}`;
  }

  function follow(x) { // the inputs show x
    typed.value = Number.isFinite(x) ? String(x) : "";
    if (x) size.current = Number.isFinite(x) ? Math.min(2 ** HIGHEST, Math.max(2 ** LOWEST, Math.abs(x))) : 2 ** HIGHEST;
  }

  function flip(f, bit) {
    const code = (state.codes[formats.indexOf(f)] ?? 0) ^ (1 << bit), x = decode(code, f);
    look(f.step ? Math.fround(x) : x, { format: f, code });
    follow(state.x);
    example.current = "";
  }

  function moveTo(magnitude) { // keeps the sign; four digits, so that the box shows all of x
    const x = Number(magnitude.toPrecision(4)) * (state.x < 0 ? -1 : 1);
    look(Math.fround(x));
    typed.value = String(x);
    example.current = "";
  }

  typed.addEventListener("input", () => {
    const x = Math.fround(typed.current), asTyped = typed.value;
    look(x);
    follow(x);
    typed.value = asTyped;
    example.current = "";
  });
  size.addEventListener("input", () => moveTo(size.current));
  draggable(ranges, (share) => {
    const e = LOWEST + ((share * 360 - 50) / 290) * (HIGHEST - LOWEST);
    send(size, 2 ** Math.min(HIGHEST, Math.max(LOWEST, e)));
  });
  ranges.style.cursor = "ew-resize";
  example.addEventListener("input", () => {
    if (example.current === "") return;
    const x = number.examples[example.current][1] ?? NaN;
    look(Math.fround(x));
    follow(x);
  });
  look(Math.fround(number.start));
}

// ---- part 2: tokens x channels under one scale a group

function nextPowerOfTwo(scale) {
  const e = exponentOf(scale);
  return 2 ** e === scale ? scale : 2 ** (e + 1);
}

const OUTLIERS = { value: (t, c, at) => t === at.token && c === at.channel, token: (t, c, at) => t === at.token,
  channel: (t, c, at) => c === at.channel };

// what a group's values become: scale, share flushed to zero, error of all that is no outlier
function throughGroup(cells, f, ue8m0) {
  const amax = Math.max(...cells.map((cell) => Math.abs(cell.x)));
  const exact = Math.fround(amax / f.max), scale = ue8m0 ? nextPowerOfTwo(exact) : exact;
  for (const cell of cells) {
    cell.scaled = Math.fround(cell.x / scale);
    cell.back = Math.fround(round(cell.scaled, f) * scale);
    cell.flushed = cell.back === 0 && cell.x !== 0;
  }
  const plain = cells.filter((cell) => !cell.out);
  return { cells, scale, error: rms(plain.length ? plain : cells), flushed: cells.filter((cell) => cell.flushed).length };
}

function rms(cells) {
  const squares = (pick) => sum(cells.map((cell) => pick(cell) ** 2));
  return Math.sqrt(squares((cell) => cell.back - cell.x) / squares((cell) => cell.x));
}

function quantised(base, settings, [rows, columns]) {
  const groups = [], all = [], tokens = base.length, channels = base[0].length;
  for (let top = 0; top < tokens; top += rows) {
    for (let left = 0; left < channels; left += columns) {
      const cells = [];
      for (let t = top; t < Math.min(tokens, top + rows); t++) {
        for (let c = left; c < Math.min(channels, left + columns); c++) {
          const out = OUTLIERS[settings.kind](t, c, settings), x = Math.fround(base[t][c]);
          const large = settings.kind === "value" ? settings.size : Math.fround(x * settings.size);
          cells.push({ t, c, out, x: out ? large : x });
        }
      }
      groups.push({ top, left, ...throughGroup(cells, settings.format, settings.ue8m0) });
      all.push(...cells);
    }
  }
  return { groups, all, size: [Math.min(rows, tokens), Math.min(columns, channels)] };
}

const CELL = [4, 20]; // pixels of a value in the map
const rgba = (hex, strength) => `${hex}${Math.round(255 * strength).toString(16).padStart(2, "0")}`;

function drawMap(canvas, { all, size: [rows, columns] }, at) {
  const pen = canvas.getContext("2d"), [w, h] = CELL;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  for (const { t, c, x, back, flushed } of all) {
    const error = Math.abs(back - x) / Math.abs(x);
    pen.fillStyle = flushed ? ORANGE : rgba(BLUE, Math.min(1, 6 * error));
    // flushed values are lower too: they are told by more than their colour
    pen.fillRect(w * c, h * t + (flushed ? h / 2 : 0), w, flushed ? h / 2 : h);
  }
  pen.strokeStyle = GREY;
  pen.lineWidth = 3;
  for (let y = 0; y <= canvas.height; y += h * rows) pen.strokeRect(0, y, canvas.width, 0);
  for (let x = 0; x <= canvas.width; x += w * columns) pen.strokeRect(x, 0, 0, canvas.height);
  for (const [colour, width] of [["#000", 7], ["#fff", 3]]) { // seen on any colour
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.strokeRect(w * at.channel - 6, h * at.token - 1, w + 12, h + 2);
  }
}

// where the values of a group stand on the format's line once they are divided by the scale
function drawLanding(node, group, f) {
  const [low, high] = [-24, 16], at = (e) => 20 + (330 * (e - low)) / (high - low), counts = {};
  for (const { scaled } of group.cells) {
    const e = Math.max(low, exponentOf(Math.abs(scaled)));
    counts[e] = (counts[e] ?? 0) + 1;
  }
  const top = Math.max(...Object.values(counts)), flush = at(Math.log2(f.half)), end = at(Math.log2(f.max));
  const normal = f.step ? flush : at(Math.log2(f.normal));
  node.replaceChildren(text(180, 14, "the outlier's group: |value / scale|, a bar a power of two"),
    ui.svg("rect", { x: 20, y: 24, width: flush - 20, height: 116, fill: ORANGE, "fill-opacity": 0.15 }),
    text((20 + flush) / 2, 36, "flushed to 0"), line(end, 24, end, 140, { stroke: "currentColor" }),
    text(end, 36, say(f.max), { "text-anchor": end > 300 ? "end" : "start", dx: end > 300 ? -4 : 4 }),
    line(20, 140, 350, 140, { stroke: "currentColor" }));
  if (normal > flush) node.append(ui.svg("rect", { x: flush, y: 24, width: normal - flush, height: 116,
    fill: "none", stroke: BLUE, "stroke-dasharray": "3 3" }), text((flush + normal) / 2, 50, "sub-"), text((flush + normal) / 2, 62, "normal"));
  for (const [e, count] of Object.entries(counts)) {
    const x = at(Number(e)), tall = (72 * count) / top;
    node.append(ui.svg("rect", { x: x + 0.5, y: 140 - tall, width: 330 / (high - low) - 1, height: tall,
      fill: x < flush ? ORANGE : BLUE }));
  }
  for (let e = low; e <= high; e += 8) node.append(power(at(e), 157, e));
}

const percent = (share, digits) => `${(100 * share).toFixed(digits)} %`;

function drawTable(table, { groups, size: [rows, columns] }, tokens, channels) {
  const heads = [];
  for (let c = 0; c < channels; c += columns) heads.push(ui.el("th", { scope: "col" }, `${c ? "" : "channels "}${c}–${c + columns - 1}`));
  const lines = Array.from({ length: tokens }, (_, t) => ui.el("tr", {}, ui.el("th", { scope: "row" }, t)));
  for (const group of groups) {
    const holds = group.cells.some((cell) => cell.out);
    lines[group.top].append(ui.el("td", { rowspan: rows, "data-name": `group-${group.top}-${group.left}`,
      style: `padding:0 0.3rem;text-align:left;white-space:nowrap;${holds ? `border-left:3px solid ${ORANGE}` : ""}` },
      `${holds ? "▲ " : ""}${say(group.scale, 3)} · ${percent(group.flushed / group.cells.length, 0)} · ${percent(group.error, 1)}`));
  }
  table.replaceChildren(ui.el("thead", {}, ui.el("tr", {}, ui.el("th", { style: "padding:0 0.3rem" }, "token"), ...heads)), ui.el("tbody", {}, ...lines));
}

function tileLab(tile) {
  const tokens = tile.data[0].values.length, channels = tile.data[0].values[0].length;
  const node = part("An outlier and who pays for it", [`${tokens} tokens, ${channels} channels, one scale a group: `
    + "choose who shares one, then make a value large; drag in the map to move it. V3 gives a scale to a 1 × 128 "
    + "tile of activations and to a 128 × 128 block of weights."]);
  const box = ui.controls(node), select = (label, name, options) => ui.choice(box, { label, name, options });
  const inputs = {
    format: select("format", "format", tile.formats.map((f) => [f.name, f.name])),
    group: select("one scale for", "group", tile.groups.map((g) => [g.name, g.label])),
    kind: select("outlier", "kind", [["value", "one value"], ["token", "a whole token"], ["channel", "a whole channel"]]),
    values: select("values", "values", tile.data.map((d) => [d.name, d.label])),
    size: ui.slider(box, { label: "outlier's size", name: "outlier", min: 0, max: tile.sizes.length - 1, value: 0,
      format: (i) => ui.comma(tile.sizes[i]) }),
    token: ui.slider(box, { label: "token", name: "token", min: 0, max: tokens - 1, value: tile.start.token }),
    channel: ui.slider(box, { label: "channel", name: "channel", min: 0, max: channels - 1, value: tile.start.channel }),
    ue8m0: ui.toggle(box, { label: "scales are powers of two", name: "ue8m0" }),
  };
  const canvas = ui.el("canvas", { width: CELL[0] * channels, height: CELL[1] * tokens, role: "img", "data-name": "map",
    "aria-label": "Map of the values, a row a token: full blue where rounding changed a value much, half-high orange where it was flushed to zero",
    style: "cursor:crosshair;display:block;height:7rem;width:100%" });
  node.append(ui.el("div", { style: "margin:0.3rem 0" }, ui.el("span", {}, "rows are tokens; blue: rounded, darker by more; half-high orange: flushed to zero; frame: the outlier"), canvas));
  const below = sideBySide(node);
  const landing = ui.plot(below, { width: 360, height: 165, name: "landing", alt: "Histogram of the values of the outlier's group after division by their scale, on the format's range" });
  const table = ui.el("table", { style: "font-size:0.75rem", "data-name": "groups" });
  below.append(ui.el("div", { class: "mn-scroll" }, ui.el("span", {}, "each group: scale · flushed · RMS error (▲ the outlier's)"), table));
  const out = (name, label) => ui.readout(node, { name, label });
  const flushed = out("flushed", "flushed to zero"), elsewhere = out("elsewhere", "of these, in groups without outlier");
  const error = out("rms", "RMS error, the outlier left out"), scale = out("scale", "scale of the outlier's group");
  draggable(canvas, (x, y) => {
    inputs.token.current = Math.min(tokens - 1, Math.floor(y * tokens));
    send(inputs.channel, Math.min(channels - 1, Math.floor(x * channels)));
  });
  ui.on(Object.values(inputs), () => {
    const format = completed(tile.formats.find((f) => f.name === inputs.format.current));
    const settings = { format, kind: inputs.kind.current, ue8m0: inputs.ue8m0.current,
      size: tile.sizes[inputs.size.current], token: inputs.token.current, channel: inputs.channel.current };
    const base = tile.data.find((d) => d.name === inputs.values.current).values;
    const done = quantised(base, settings, tile.groups.find((g) => g.name === inputs.group.current).shape);
    const own = done.groups.find((g) => g.cells.some((cell) => cell.t === settings.token && cell.c === settings.channel));
    const count = sum(done.groups.map((g) => g.flushed));
    flushed.textContent = `${ui.comma(count)} of ${ui.comma(done.all.length)} (${percent(count / done.all.length, 1)})`;
    elsewhere.textContent = ui.comma(sum(done.groups.filter((g) => !g.cells.some((cell) => cell.out)).map((g) => g.flushed)));
    error.textContent = percent(rms(done.all.filter((cell) => !cell.out)), 2);
    scale.textContent = say(own.scale, 6);
    drawMap(canvas, done, settings);
    drawLanding(landing, own, format);
    drawTable(table, done, tokens, channels);
  });
}

if (data.number) microscope(data.number);
if (data.tile) tileLab(data.tile);
