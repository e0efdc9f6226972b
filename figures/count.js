// The model sizer: every field of Config that decides a count, and all that follows from it.
// minids.count and minids.config are the originals of each formula and each refusal here;
// tests/test_widget_count.py compares them on presets and on random configs.
const whole = (cfg) => Object.fromEntries(
  // BigInt: exact at any size, where a Number is exact up to 2^53
  Object.entries(cfg).map(([name, value]) => [name, typeof value === "number" ? BigInt(value) : value]),
);

function shape(c) {
  const mla = c.attn === "mla";
  const kvHeads = { gqa: c.n_kv_heads, mqa: 1n }[c.attn] ?? c.n_heads;
  const qk = c.qk_nope_head_dim + (mla ? c.qk_rope_head_dim : 0n);
  const cached = mla ? c.kv_lora_rank + c.qk_rope_head_dim : kvHeads * (qk + c.v_head_dim);
  return { mla, kvHeads, qk, cached };
}

function attention(c) {
  const { mla, kvHeads, qk } = shape(c);
  const out = c.n_heads * c.v_head_dim * c.dim, queries = c.n_heads * qk;
  if (!mla) return c.dim * queries + c.dim * kvHeads * (qk + c.v_head_dim) + out;
  const q = c.q_lora_rank, latent = c.kv_lora_rank;
  const asked = q ? c.dim * q + q + q * queries : c.dim * queries;
  const down = c.dim * (latent + c.qk_rope_head_dim) + latent;
  return asked + down + latent * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim) + out;
}

function countParts(c) {
  const moe = c.n_layers - c.n_dense_layers, expert = 3n * c.dim * c.moe_inter_dim;
  const table = c.vocab_size * c.dim;
  return {
    "attention": c.n_layers * attention(c),
    "dense FFN": c.n_dense_layers * 3n * c.dim * c.inter_dim,
    "shared experts": moe * c.n_shared_experts * expert,
    "routed experts": moe * c.n_routed_experts * expert,
    "gate matrices": moe * c.n_routed_experts * c.dim,
    "gate biases": c.score_func === "sigmoid" ? moe * c.n_routed_experts : 0n,
    "norms": (2n * c.n_layers + 1n) * c.dim,
    "embedding": table,
    "output head": table,
  };
}

const sum = (parts) => Object.values(parts).reduce((a, b) => a + b, 0n);

function count(cfg, seqLen) {
  const c = whole(cfg), parts = countParts(c), total = sum(parts);
  const chosen = (parts["routed experts"] * c.n_activated_experts) / c.n_routed_experts;
  const tables = parts["embedding"] + parts["output head"];
  const neither = total - tables - parts["routed experts"] + chosen;
  const layer = countParts({ ...c, n_layers: 1n, n_dense_layers: 0n });
  const block = sum(layer) - layer["embedding"] - layer["output head"] - c.dim;
  const mtp = c.mtp_depth * (block + 2n * c.dim * c.dim + 3n * c.dim);
  const { qk, cached } = shape(c);
  const keys = (c.n_layers * 2n * c.n_heads * (qk + c.v_head_dim) * BigInt(seqLen)) / 2n;
  const forward = 2n * (neither + parts["output head"]) + keys;
  return {
    parts, total, mtp, mtp_stored: mtp + c.mtp_depth * tables,
    used: { ...parts, "routed experts": chosen, "embedding": 0n },
    active: {
      "with head": neither + parts["output head"], "with both tables": neither + tables,
      "with neither": neither,
    },
    cache_elements: c.n_layers * cached, cache_bytes: 2n * c.n_layers * cached,
    flops_attention: keys, flops_forward: forward, flops_training: 3n * forward,
  };
}

const hours = (counts, tokens, tflops) =>
  (tokens * Number(counts.flops_training)) / (tflops * 1e12 * 3600);

// what is below one keeps two digits, else it would be shown as nothing
const small = (x) => (x < 1 ? String(Number(x.toPrecision(2))) : x.toFixed(1));
const rounded = (x) => (x < 1 ? small(x) : ui.comma(Math.round(x)));

// The first rule of Config that is broken, in its words; "" for a legal config.
function refuse(cfg) {
  const asPython = (value) =>
    typeof value === "string" ? `'${value}'` : Number.isNaN(value) ? "None" : String(value);
  for (const { name, least } of data.config) {
    const value = cfg[name];
    if (data.choices[name]) {
      if (!data.choices[name].includes(value)) {
        const known = data.choices[name].map(asPython).join(", ");
        return `${name} must be one of (${known}), got ${asPython(value)}`;
      }
    } else if (!Number.isInteger(value) || value < least) {
      return `${name} must be an integer >= ${least}, got ${asPython(value)}`;
    }
  }
  const groups = cfg.n_expert_groups, { kvHeads } = shape(whole(cfg));
  const kept = cfg.n_limited_groups * Math.floor(cfg.n_routed_experts / groups);
  const rotated = cfg.attn === "mla" ? cfg.qk_rope_head_dim : cfg.qk_nope_head_dim;
  for (const [name, limit, bound] of [
    ["n_dense_layers", "n_layers", cfg.n_layers],
    ["n_limited_groups", "n_expert_groups", groups],
    ["n_activated_experts", "the kept groups' experts", kept],
  ]) {
    if (cfg[name] > bound) return `${name} must be at most ${limit}, got ${cfg[name]} and ${bound}`;
  }
  for (const [name, value, divisor, by] of [
    ["n_heads", cfg.n_heads, "n_kv_heads", Number(kvHeads)],
    ["n_routed_experts", cfg.n_routed_experts, "n_expert_groups", groups],
    ["the rotated width of a head", rotated, "2", 2],
  ]) {
    if (value % by) return `${name} must be a multiple of ${divisor}, got ${value} and ${by}`;
  }
  return "";
}

// Rectangles whose areas are the values: the largest first, off the longer side.
function cut(items, x, y, w, h) {
  let left = items.reduce((all, item) => all + item.value, 0);
  return [...items].sort((a, b) => b.value - a.value).map((item) => {
    const share = left ? item.value / left : 0;
    const rect = w >= h ? { item, x, y, w: w * share, h } : { item, x, y, w, h: h * share };
    if (w >= h) [x, w] = [x + rect.w, w - rect.w];
    else [y, h] = [y + rect.h, h - rect.h];
    left -= item.value;
    return rect;
  });
}

function drawMap(svg, title, groups, box, share) {
  svg.append(ui.svg("text", { x: box.x, y: box.y + 12, "font-weight": 600 }, title));
  for (const { item, x, y, w, h } of cut(groups, box.x, box.y + 20, box.w, box.h - 20)) {
    const colour = ui.colours[item.colour];
    const rect = { x, y, width: w, height: h, stroke: colour, fill: colour, "fill-opacity": 0.18 };
    const name = `${item.name}: ${ui.short(item.value)}`;
    svg.append(ui.svg("rect", rect, ui.svg("title", {}, name)));
    if (item.name === "routed experts" && share < 1) {
      // the share that one token uses, along the foot of the rectangle
      const foot = { y: y + h * (1 - share), height: h * share, "fill-opacity": 0.6 };
      svg.append(ui.svg("rect", { ...rect, ...foot, "data-name": "used-experts" }));
    }
    const fits = (line) => w > 7 * line.length;
    let lines = fits(name) && h > 18 ? [name] : name.split(": ");
    if (!lines.every(fits)) lines = [...item.name.split(" "), ui.short(item.value)];  // a word a line
    if (item.name === "routed experts" && share < 1) lines.push(`used: ${(100 * share).toFixed(1)} %`);
    if (!lines.every(fits) || h < 16 * lines.length) continue;
    lines.forEach((line, row) =>
      svg.append(ui.svg("text", { x: x + 4, y: y + 14 + 15 * row }, line)));
  }
}

// ---- what the reader sees: each field with its symbol and the range of its slider

const FIELDS = [
  ["Shape", [
    ["dim", "D", 64, 16384, 64], ["n_layers", "layers", 1, 128, 1],
    ["n_dense_layers", "of them dense", 0, 16, 1], ["inter_dim", "F, dense", 64, 65536, 64],
    ["vocab_size", "rows of a table", 1024, 262144, 256],
  ]],
  ["Experts", [
    ["n_routed_experts", "E", 8, 1024, 8], ["n_activated_experts", "K", 1, 32, 1],
    ["n_shared_experts", "always used", 0, 8, 1], ["moe_inter_dim", "F, one expert", 32, 8192, 32],
    ["n_expert_groups", "G", 1, 32, 1], ["n_limited_groups", "groups kept", 1, 32, 1],
    ["score_func", "sigmoid has a bias"],
  ]],
  ["Attention", [
    ["attn", "kind"], ["n_heads", "H", 1, 256, 1], ["n_kv_heads", "gqa alone", 1, 128, 1],
    ["q_lora_rank", "Q, 0 = none", 0, 4096, 32], ["kv_lora_rank", "C", 32, 2048, 32],
    ["qk_nope_head_dim", "N", 16, 256, 16], ["qk_rope_head_dim", "R", 2, 128, 2],
    ["v_head_dim", "V", 16, 256, 16],
  ]],
  ["Training", [
    ["mtp_depth", "MTP modules", 0, 4, 1], ["seq_len", "context, tokens", 128, 163840, 128],
    ["tokens", "10¹² of them", 0.1, 40, 0.1], ["tflops", "10¹² FLOP/s a GPU", 5, 1000, 5],
    ["gpus", "GPUs", 8, 16384, 8], ["usd", "$ a GPU-hour", 0.1, 10, 0.1],
  ]],
];
const LARGEST = 1e12;  // beyond it the numbers fit no page
const GIVEN = { ...data.training, gpus: 2048, usd: 2 };
const READOUTS = {
  total: "parameters", active: "active, with head", share: "active share",
  both: "active, with both tables", neither: "active, with neither",
  mtp: "MTP modules", stored: "MTP as stored",
  cache: "cache a token, BF16", context: "cache of one context", twin: "cache of MHA : of this",
  flops: "training FLOPs a token", attention: "attention's share of them",
  hours: "GPU-hours", days: "days on these GPUs", money: "rent", memory: "memory to train, FP8",
};

const top = ui.controls(root);
const preset = ui.choice(top, {
  label: "preset", value: "v3",
  options: [...Object.keys(data.presets).map((name) => [name, name]), ["", "(changed)"]],
});
preset.lastElementChild.disabled = true;  // what the figure says, not what a reader chooses
const inputs = {}, folds = [];
for (const [title, fields] of FIELDS) {
  const fold = ui.el("details", {}, ui.el("summary", {}, title));
  fold.open = title === "Experts";
  fold.addEventListener("toggle", () => {  // one at a time: the map stays in sight
    if (fold.open) for (const other of folds) other.open &&= other === fold;
  });
  folds.push(fold);
  root.append(fold);
  const box = ui.controls(fold);
  for (const [name, symbol, min, max, step] of fields) {
    const label = `${name} (${symbol})`;
    if (data.choices[name]) {
      inputs[name] = ui.choice(box, { name, label, options: data.choices[name].map((x) => [x, x]) });
      continue;
    }
    inputs[name] = ui.number(box, { name, label, value: GIVEN[name] ?? min });
    const handle = ui.el("input", { type: "range", min, max, step, "aria-label": `${name}, slider` });
    handle.dataset.name = `slide-${name}`;
    inputs[name].parentElement.append(handle);
    inputs[name].handle = handle;
  }
}
const svg = ui.plot(root, {
  width: 720, height: 280, name: "treemap",
  alt: "Two maps: all parameters, and those that one token uses; the table below has the numbers.",
});
const refused = ui.refusal(root);
const readouts = {};
for (const [name, label] of Object.entries(READOUTS)) {
  readouts[name] = ui.readout(root, { name, label });
  readouts[name].style.whiteSpace = "nowrap";
}
const table = ui.el("tbody");
const heads = ["part", "stored", "share", "a token uses", "share"];
root.append(ui.el("div", { class: "mn-scroll" }, ui.el("table", {},
  ui.el("thead", {}, ui.el("tr", {}, ...heads.map((text) => ui.el("th", { scope: "col" }, text)))),
  table)));

const config = () => Object.fromEntries(data.config.map(({ name }) => [name, inputs[name].current]));

function show() {
  for (const input of Object.values(inputs)) if (input.handle) input.handle.value = input.current;
  const cfg = config(), seqLen = inputs.seq_len.current;
  const [trillions, tflops, usd, gpus] =
    ["tokens", "tflops", "usd", "gpus"].map((name) => inputs[name].current);
  const problem = refuse(cfg)
    || (Number.isInteger(seqLen) ? "" : `seq_len must be an integer, got ${seqLen}`)
    || (seqLen >= 1 ? "" : `seq_len must be at least 1, got ${seqLen}`)
    || Object.entries({ tokens: trillions, tflops, usd })
      .filter(([, value]) => !(value > 0 && value < Infinity))
      .map(([name, value]) => `${name} must be a positive number, got ${value}`)[0]
    || (Number.isInteger(gpus) && gpus >= 1 ? "" : `gpus must be an integer >= 1, got ${gpus}`)
    || Object.entries(inputs)
      .filter(([, { current }]) => current > LARGEST || (current > 0 && current < 1 / LARGEST))
      .map(([name, { current }]) => `${name} is beyond what this figure shows, got ${current}`)[0]
    || "";
  refused.textContent = problem;
  svg.replaceChildren();
  table.replaceChildren();
  if (problem) {
    for (const out of Object.values(readouts)) out.textContent = "–";
    return;
  }
  const counts = count(cfg, seqLen), twin = count({ ...cfg, attn: "mha" }, seqLen);
  const spent = hours(counts, trillions * 1e12, tflops);
  const percent = (a, b) => `${((100 * Number(a)) / Number(b)).toFixed(2)} %`;
  const says = {
    total: ui.comma(counts.total), active: ui.comma(counts.active["with head"]),
    both: ui.comma(counts.active["with both tables"]),
    neither: ui.comma(counts.active["with neither"]),
    share: percent(counts.active["with head"], counts.total),
    mtp: ui.comma(counts.mtp), stored: ui.comma(counts.mtp_stored),
    cache: `${ui.comma(counts.cache_bytes)} B`,
    context: ui.bytes(Number(counts.cache_bytes) * seqLen),
    twin: `${(Number(twin.cache_bytes) / Number(counts.cache_bytes)).toFixed(1)} : 1`,
    flops: ui.comma(counts.flops_training),
    attention: percent(counts.flops_attention, counts.flops_forward),
    hours: rounded(spent), days: small(spent / gpus / 24), money: `$${rounded(spent * usd)}`,
    memory: ui.bytes(data.bytes_to_train * Number(counts.total)),
  };
  for (const [name, text] of Object.entries(says)) readouts[name].textContent = text;
  draw(cfg, counts, percent);
}

function draw(cfg, counts, percent) {
  const of = (source) => data.parts.map(([name, parts], colour) =>
    ({ name, colour, value: Number(parts.reduce((all, part) => all + source[part], 0n)) }));
  const stored = of(counts.parts), used = of(counts.used);
  const width = Math.min(960, Math.max(300, root.clientWidth || 720)), wide = width >= 600;
  const half = wide ? width / 2 - 8 : width, height = wide ? 280 : 210;
  svg.setAttribute("viewBox", `0 0 ${width} ${wide ? height : 2 * height + 8}`);
  svg.setAttribute("width", width);
  const share = cfg.n_activated_experts / cfg.n_routed_experts;
  drawMap(svg, `stored: ${ui.short(Number(counts.total))}`, stored,
    { x: 1, y: 0, w: half - 2, h: height }, share);
  const active = Number(counts.active["with head"]), larger = Number(counts.total) / active;
  const scale = larger < 1.5 ? "" : `, ${larger.toFixed(0)} times enlarged`;
  drawMap(svg, `one token uses: ${ui.short(active)}${scale}`, used,
    { x: wide ? half + 16 : 1, y: wide ? 0 : height + 8, w: half - 2, h: height }, 1);
  stored.forEach((group, row) => {
    const swatch = `background:${ui.colours[row]};display:inline-block;height:0.7em;width:0.7em`;
    const cells = [ui.short(group.value), percent(group.value, counts.total),
      ui.short(used[row].value), percent(used[row].value, counts.active["with head"])];
    table.append(ui.el("tr", { style: "white-space:nowrap" },
      ui.el("th", { scope: "row", style: "text-align:left" },
      ui.el("span", { style: swatch }), ` ${group.name}`), ...cells.map((text) => ui.el("td", {}, text))));
  });
  // five columns on a phone too
  table.parentElement.style.fontSize = wide ? "" : "0.8em";
  for (const cell of table.parentElement.querySelectorAll("td, th")) {
    cell.style.paddingInline = wide ? "" : "0.2em";
  }
}

function take(name) {
  for (const [field, value] of Object.entries(data.presets[name])) inputs[field].current = value;
}

take("v3");
for (const input of Object.values(inputs)) {
  input.handle?.addEventListener("input", () => {
    input.current = Number(input.handle.value);
    preset.current = "";
    show();
  });
  input.addEventListener("input", () => { if (data.config.some(({ name }) => inputs[name] === input)) preset.current = ""; });
}
preset.addEventListener("input", () => { if (preset.current) take(preset.current); });
root.sizer = { count, hours, refuse };
ui.on([preset, ...Object.values(inputs)], show);
let seen = root.clientWidth;
new ResizeObserver(() => {
  if (root.clientWidth === seen) return;
  seen = root.clientWidth;
  show();
}).observe(root);
