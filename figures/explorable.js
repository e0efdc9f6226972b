// The toolkit of interactive figures: native inputs, readouts, SVG. minids/learn/widget.py puts it
// before figures/<stem>.js, which gets it as `ui`. It asks for nothing from outside of the page.
const ui = (() => {
  const colours = COLOURS;
  const NS = "http://www.w3.org/2000/svg";

  function fill(node, attrs, children) {
    for (const [key, value] of Object.entries(attrs ?? {})) {
      if (value !== undefined && value !== null) node.setAttribute(key, value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    // else JupyterLab takes arrow keys and Enter for its own before they reach what has the focus
    if (node.matches("button, input, select, summary, [tabindex]")) {
      node.setAttribute("data-lm-suppress-shortcuts", "true");
    }
    return node;
  }
  const el = (tag, attrs, ...children) => fill(document.createElement(tag), attrs, children);
  const svg = (tag, attrs, ...children) => fill(document.createElementNS(NS, tag), attrs, children);

  const slug = (text) => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");

  function controls(root) {
    const box = el("div", { class: "mn-controls" });
    root.append(box);
    return box;
  }

  // each control is a native input in a label: mouse, touch, keys and screen readers for nothing
  function labelled(box, options, input, ...rest) {
    input.dataset.name = options.name ?? slug(options.label);
    const label = el("label", {}, el("span", {}, options.label), ...rest, input);
    box.append(label);
    return input;
  }

  function slider(box, options) {
    const { min, max, step = 1, log = false, format = String } = options;
    const out = el("output");
    const input = el("input", { type: "range" });
    // a logarithmic slider moves over exponents of 2; `current` is the number either way
    const to = log ? Math.log2 : (x) => x;
    const from = log ? (x) => 2 ** x : (x) => x;
    fill(input, { min: to(min), max: to(max), step }, []);
    input.value = to(options.value);
    Object.defineProperty(input, "current", {
      get: () => from(Number(input.value)),
      set: (value) => { input.value = to(value); show(); },
    });
    const show = () => {
      out.textContent = format(input.current);
      input.setAttribute("aria-valuetext", out.textContent);
    };
    input.addEventListener("input", show);
    labelled(box, options, input, out);
    show();
    return input;
  }

  function number(box, options) {
    const { min, max, step = "any" } = options;
    const input = el("input", { type: "number", min, max, step, inputmode: "decimal" });
    input.value = options.value;
    Object.defineProperty(input, "current", {
      get: () => (input.value.trim() === "" ? NaN : Number(input.value)),
      set: (value) => { input.value = value; },
    });
    return labelled(box, options, input);
  }

  function choice(box, options) {
    const input = el("select");
    for (const [value, text] of options.options) input.append(el("option", { value }, text));
    input.value = options.value ?? options.options[0][0];
    Object.defineProperty(input, "current", {
      get: () => input.value,
      set: (value) => { input.value = value; },
    });
    return labelled(box, options, input);
  }

  function toggle(box, options) {
    const input = el("input", { type: "checkbox" });
    input.checked = Boolean(options.value);
    Object.defineProperty(input, "current", {
      get: () => input.checked,
      set: (value) => { input.checked = value; },
    });
    return labelled(box, options, input);
  }

  function button(box, options) {
    const node = el("button", { type: "button" }, options.label);
    node.dataset.name = options.name ?? slug(options.label);
    box.append(node);
    return node;
  }

  function readout(root, options) {
    let box = root.lastElementChild;
    if (!box?.classList.contains("mn-readouts")) {
      box = el("div", { class: "mn-readouts" });
      root.append(box);
    }
    const out = el("output", { "aria-live": "polite", "data-name": options.name ?? slug(options.label) });
    box.append(el("div", { class: "mn-readout" }, el("span", {}, options.label), out));
    return out;
  }

  // what was refused and why, in Config's words; empty text hides it
  function refusal(root) {
    const node = el("p", { class: "mn-refused", role: "alert", "data-name": "refused" });
    root.append(node);
    return node;
  }

  function plot(root, { width, height, name, alt }) {
    const box = el("div", { class: "mn-scroll" });
    const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img", "aria-label": alt });
    node.dataset.name = name;
    box.append(node);
    root.append(box);
    return node;
  }

  function on(inputs, change) {
    for (const input of inputs) input.addEventListener("input", change);
    change();
  }

  // two digits; a tie goes to the even one, as in Python, so that both write 68.62 KiB
  function fixed(x) {
    const cents = x * 100;
    const tie = cents % 1 === 0.5;
    return (tie ? Math.floor(cents / 2 + 0.5) / 50 : x).toFixed(2);
  }

  function short(n) {
    for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
      if (Math.abs(n) >= size) return `${fixed(n / size)} ${letter}`;
    }
    return String(Number(n.toPrecision(4)));
  }

  const comma = (n) => n.toLocaleString("en-US", { maximumFractionDigits: 20 });

  function bytes(n) {
    for (const [power, unit] of [[40, "TiB"], [30, "GiB"], [20, "MiB"], [10, "KiB"]]) {
      if (n >= 2 ** power) return `${fixed(n / 2 ** power)} ${unit}`;
    }
    return `${n} B`;
  }

  return {
    colours, el, svg, controls, slider, number, choice, toggle, button, readout, refusal, plot, on,
    short, comma, bytes,
  };
})();
