// The dimension lab: what four attentions cache and weigh, the two paths drawn to scale, and what
// keys and values of lower rank would miss. Data of figures/mla.py: `presets` by name, `rank` with
// a singular value decomposition (u, s, v). Numbers are those of minids.count, rules those of Config.
const FIELDS = ["dim", "n_layers", "n_heads", "n_kv_heads", "q_lora_rank", "kv_lora_rank",
  "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]; // in Config's order
const [BLUE, ORANGE] = ui.colours;

function heading(text) {
  root.append(ui.el("p", { style: "font-weight:600;margin:0.6rem 0 0.2rem" }, text));
}

// Config's checks, for the fields that can be moved here, in Config's words
function refusal(cfg) {
  for (const name of FIELDS) {
    const least = name === "q_lora_rank" ? 0 : 1;
    const value = cfg[name];
    if (!Number.isInteger(value) || value < least) {
      return `${name} must be an integer >= ${least}, got ${Number.isNaN(value) ? "None" : value}`;
    }
  }
  const { qk_rope_head_dim, qk_nope_head_dim } = cfg;
  // MLA turns R channels of a head, its twins turn N
  const odd = [qk_rope_head_dim, qk_nope_head_dim].find((width) => width % 2);
  return odd ? `the rotated width of a head must be a multiple of 2, got ${odd} and 2` : "";
}

// a rule of GQA alone: the others are as they were
function refusalOfGqa({ n_heads, n_kv_heads }) {
  if (n_heads % n_kv_heads === 0) return "";
  return `n_heads must be a multiple of n_kv_heads, got ${n_heads} and ${n_kv_heads}`;
}

function cached(cfg, kind) {
  if (kind === "mla") return cfg.kv_lora_rank + cfg.qk_rope_head_dim;
  const heads = { mha: cfg.n_heads, gqa: cfg.n_kv_heads, mqa: 1 }[kind];
  return heads * (cfg.qk_nope_head_dim + cfg.v_head_dim);
}

function parameters(cfg, kind) {
  const { dim, n_heads, q_lora_rank: q, kv_lora_rank: c } = cfg;
  const [n, r, v] = [cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim];
  if (kind !== "mla") return dim * (n_heads * n + cached(cfg, kind) + n_heads * v);
  const wide = n_heads * (n + r);
  const queries = q ? dim * q + q + q * wide : dim * wide;
  return queries + dim * (c + r) + c + c * n_heads * (n + v) + n_heads * v * dim;
}

heading("1. Choose the widths");
const box = ui.controls(root);
const named = data.order.map((name) => [name, data.presets[name].label]);
const preset = ui.choice(box, { label: "start from", name: "preset", options: named });
const start = data.presets[preset.current];
const bar = (name, label, max) =>
  ui.slider(box, { label, name, min: 1, max, step: 1, value: start[name], format: ui.comma });
const field = (name, label, min) =>
  ui.number(box, { label, name, min, step: 1, value: start[name] });
const inputs = {
  n_heads: bar("n_heads", "heads H", 256),
  kv_lora_rank: bar("kv_lora_rank", "latent C", 2048),
  qk_rope_head_dim: bar("qk_rope_head_dim", "rotary width R", 256),
  qk_nope_head_dim: bar("qk_nope_head_dim", "content width N", 256),
  v_head_dim: bar("v_head_dim", "value width V", 256),
  n_kv_heads: field("n_kv_heads", "groups of GQA", 1),
  dim: field("dim", "model width D", 1),
  q_lora_rank: field("q_lora_rank", "query latent Q (0: none)", 0),
  n_layers: field("n_layers", "layers", 1),
};
const dtype = ui.choice(box, {
  label: "a cached number", name: "dtype", value: "2",
  options: [["4", "FP32, 4 bytes"], ["2", "BF16, 2 bytes"], ["1", "8 bits, 1 byte"]],
});
const refused = ui.refusal(root);
const results = ui.el("div");
root.append(results);

const KINDS = [["mla", "MLA"], ["mha", "MHA"], ["gqa", "GQA"], ["mqa", "MQA"]];
const COLUMNS = [["cached", "numbers a token and layer"], ["bytes", "bytes a token"],
  ["times", "of MLA"], ["parameters", "parameters a layer"]];
const cells = {};
const head = COLUMNS.map(([, text]) => ui.el("th", { scope: "col" }, text));
const rows = KINDS.map(([kind, text]) => ui.el("tr", {}, ui.el("th", { scope: "row" }, text),
  ...COLUMNS.map(([column]) => {
    const out = cells[`${kind}-${column}`] = ui.el("output", { "data-name": `${kind}-${column}` });
    return ui.el("td", {}, out);
  })));
results.append(ui.el("div", { class: "mn-scroll" }, ui.el("table", { style: "font-size:0.8rem" },
  ui.el("thead", {}, ui.el("tr", {}, ui.el("td"), ...head)), ui.el("tbody", {}, ...rows))));
const groups = ui.readout(results, { label: "MLA's cache, in groups of GQA", name: "groups" });
const long = ui.readout(results, { label: "MLA: 131,072 tokens", name: "long" });
const longMha = ui.readout(results, { label: "MHA: 131,072 tokens", name: "long-mha" });

// The two paths, side by side where there is room. Widths are drawn to one scale.
const pair = ui.el("div", { style: "display:flex;flex-wrap:wrap;gap:0.5rem 1rem" });
results.append(pair);
const panels = Object.fromEntries(["mha", "mla"].map((kind) => [kind, ui.plot(pair, {
  width: 335, height: 250, name: `path-${kind}`,
  alt: `The path of ${kind.toUpperCase()} from a token's state to queries, keys and values; what is cached is framed`,
})]));
const COLUMN = { left: 30, middle: 128, right: 240 };
const ROW = { q: 58, k: 128, r: 166, v: 212 };

// a symbol with an index above, as the report writes it, and what follows
const symbol = (x, y, [base, index, rest], attrs) => ui.svg("text", { x, y, ...attrs }, base,
  index && ui.svg("tspan", { dy: -4, style: "font-size:9px" }, index),
  ui.svg("tspan", { dy: index ? 4 : 0 }, rest));

function path(cfg, kind) {
  const [h, n, r, v] = [cfg.n_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim];
  const node = (column, row, size, text, kept) => ({ x: COLUMN[column], y: ROW[row], row, size, text, kept });
  const state = node("left", "k", cfg.dim, ["h", "", ` ${ui.comma(cfg.dim)}`]);
  const mha = kind === "mha";
  const q = node("right", "q", h * (mha ? n : n + r), ["q", "", ` ${h} × ${mha ? n : n + r}`]);
  // the rotary key is one for all heads
  const k = node("right", "k", h * n + (mha ? 0 : r), ["k", "", ` ${h} × ${n}${mha ? "" : ` + ${r}`}`], mha);
  const values = node("right", "v", h * v, ["v", "", ` ${h} × ${v}`], mha);
  if (mha) return { all: [state, q, k, values], links: [[state, q, "Q"], [state, k, "K"], [state, values, "V"]] };
  const c = node("middle", "k", cfg.kv_lora_rank, ["c", "KV", ` ${ui.comma(cfg.kv_lora_rank)}`], true);
  const kr = node("middle", "r", r, ["k", "R", ` ${r}`], true);
  const all = [state, c, kr, q, k, values];
  const links = [[state, c, "DKV"], [state, kr, "KR"], [c, k, "UK"], [kr, k, ""], [c, values, "UV"]];
  if (!cfg.q_lora_rank) return { all, links: [[state, q, "Q"], ...links] };
  const cq = node("middle", "q", cfg.q_lora_rank, ["c", "Q", ` ${ui.comma(cfg.q_lora_rank)}`]);
  return { all: [...all, cq], links: [[state, cq, "DQ"], [cq, q, "UQ, QR"], ...links] };
}

function drawLink([from, to, name]) {
  const ends = { x1: from.x + 10, y1: from.y, x2: to.x - 10, y2: to.y };
  const [x, y, climb] = [(ends.x1 + ends.x2) / 2, (ends.y1 + ends.y2) / 2, from.y - to.y];
  const beside = { "text-anchor": climb ? "end" : "middle", "fill-opacity": 0.75 };
  const below = climb < 0 || from.row === "q"; // else it meets the latent's own label
  return [ui.svg("line", { ...ends, stroke: "currentColor", "stroke-opacity": 0.4 }),
    name && symbol(x - (climb ? 4 : 0), below ? y + 15 : y - 5, ["W", name, ""], beside)];
}

function drawBox({ x, y, row, size, text, kept }, scale) {
  const tall = Math.max(1.2, size * scale); // never thinner than a line
  // the frame says "cached" to those who do not see the colour
  const frame = kept && ui.svg("rect", { x: x - 10, y: y - tall / 2 - 3, width: 20, height: tall + 6,
    fill: "none", stroke: ORANGE, "stroke-dasharray": "3 2" });
  const textY = row === "r" ? y + tall / 2 + 17 : y - tall / 2 - 7;
  return [ui.svg("rect", { x: x - 6, y: y - tall / 2, width: 12, height: tall, fill: kept ? ORANGE : BLUE }),
    frame, symbol(x - (x === COLUMN.left ? 28 : 12), textY, text)];
}

function drawPath(cfg, kind, scale) {
  const { all, links } = path(cfg, kind);
  const title = `${kind.toUpperCase()}: ${ui.comma(cached(cfg, kind))} numbers cached (framed)`;
  const parts = [...links.flatMap(drawLink), ...all.flatMap((one) => drawBox(one, scale))];
  panels[kind].replaceChildren(ui.svg("text", { x: 4, y: 14, style: "font-weight:600" }, title),
    ...parts.filter(Boolean));
}

function show() {
  const cfg = Object.fromEntries(FIELDS.map((name) => [name, inputs[name].current]));
  refused.textContent = refusal(cfg);
  results.hidden = refused.textContent !== "";
  if (results.hidden) return;
  refused.textContent = refusalOfGqa(cfg);
  const size = Number(dtype.current) * cfg.n_layers;
  for (const [kind] of KINDS) {
    if (kind === "gqa" && refused.textContent) {
      for (const [column] of COLUMNS) cells[`gqa-${column}`].textContent = "–";
      continue;
    }
    const numbers = cached(cfg, kind);
    cells[`${kind}-cached`].textContent = ui.comma(numbers);
    cells[`${kind}-bytes`].textContent = ui.comma(numbers * size);
    cells[`${kind}-times`].textContent = `${(numbers / cached(cfg, "mla")).toPrecision(3)}×`;
    cells[`${kind}-parameters`].textContent = ui.comma(parameters(cfg, kind));
  }
  const head = cfg.qk_nope_head_dim + cfg.v_head_dim;
  groups.textContent = String(Number((cached(cfg, "mla") / head).toPrecision(4)));
  long.textContent = ui.bytes(131072 * size * cached(cfg, "mla"));
  longMha.textContent = ui.bytes(131072 * size * cached(cfg, "mha"));
  const { n_heads, qk_nope_head_dim: n, qk_rope_head_dim: r, v_head_dim: v } = cfg;
  const widest = Math.max(cfg.dim, n_heads * (n + r), n_heads * v, cfg.kv_lora_rank, cfg.q_lora_rank);
  for (const kind of ["mha", "mla"]) drawPath(cfg, kind, 44 / widest);
}

preset.addEventListener("input", () => {
  for (const name of FIELDS) inputs[name].current = data.presets[preset.current][name];
});
ui.on([preset, ...Object.values(inputs), dtype], show);

// Part 2: a matrix of keys and values, and its best approximation of rank C.
const { u, s, v, heads, width } = data.rank;
heading(`2. How little would do? Keys and values of ${u.length} tokens, ${heads} heads`);
root.append(ui.el("p", { style: "margin:0.2rem 0" },
  `A trained MHA layer caches ${v[0].length} numbers a token (a row): all heads' keys of ${width}, then ` +
  "all values. Blue is below zero, orange above. Keep C numbers a token: what is lost?"));
const rankBox = ui.controls(root);
const rank = ui.slider(rankBox, { label: "rank C", name: "rank", min: 1, max: s.length, step: 1, value: 4 });
const maps = ["cached by MHA", "made from C numbers", "what is missing"].map((text, index) => {
  const canvas = ui.el("canvas", {
    width: v[0].length, height: u.length, role: "img", "data-name": `map-${index}`,
    "aria-label": `Heat-map, ${u.length} tokens by ${v[0].length} numbers: ${text}`,
    style: "width:100%;height:4.5rem;image-rendering:pixelated;display:block;border:1px solid #7a7a7a",
  });
  root.append(ui.el("div", { style: "margin:0.3rem 0" }, ui.el("span", {}, text), canvas));
  return canvas;
});
const kept = ui.readout(root, { label: "numbers kept a token", name: "kept" });
const missing = ui.readout(root, { label: "share of squares missing", name: "missing" });

function product(from, to) {
  return u.map((row) => v[0].map((_, column) => {
    let sum = 0;
    for (let i = from; i < to; i++) sum += row[i] * s[i] * v[i][column];
    return sum;
  }));
}
const whole = product(0, s.length);
const largest = Math.max(...whole.flat().map(Math.abs));
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const [below, above] = [rgb(BLUE), rgb(ORANGE)];

function paint(canvas, matrix) {
  const image = new ImageData(canvas.width, canvas.height);
  matrix.flat().forEach((value, at) => {
    const strength = Math.min(1, Math.abs(value) / largest) ** 0.6; // small values show too
    image.data.set([...(value < 0 ? below : above), Math.round(255 * strength)], 4 * at);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}
paint(maps[0], whole);
ui.on([rank], () => {
  const c = rank.current;
  const squares = (list) => list.reduce((sum, value) => sum + value * value, 0);
  paint(maps[1], product(0, c));
  paint(maps[2], product(c, s.length));
  kept.textContent = `${c} of ${v[0].length}`;
  missing.textContent = `${(100 * squares(s.slice(c)) / squares(s)).toFixed(2)} %`;
});
