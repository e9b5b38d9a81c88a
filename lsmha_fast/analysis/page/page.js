"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const K = data.classes.length;
const $ = (selector, root = document) => root.querySelector(selector);
const make = (tag, more = {}) => Object.assign(document.createElement(tag), more);
const clip = (x, most) => Math.max(0, Math.min(most, x));
const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};

// theme: the system's until the button is used
const theme = $("#theme"), system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
function retheme() {
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.title = "Switch to " + theme.textContent.toLowerCase() + " colours";
  drawMap();
}
theme.hidden = false;
theme.onclick = () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; retheme(); };
system.addEventListener("change", retheme);

// tables: a button in every column head sorts, stable, numbers as numbers, cells without a value last
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => {
    const button = make("button", {type: "button", textContent: head.textContent});
    head.replaceChildren(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = ({cells: {[column]: cell}}) => {
        if (cell.dataset.v === undefined) return cell.textContent;
        return cell.dataset.v === "" ? "" : cell.dataset.v === "inf" ? Infinity : Number(cell.dataset.v);
      };
      const rows = [...table.tBodies[0].rows].map(row => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = typeof a === "number" && typeof b === "number"
          ? (a === b ? 0 : a - b) : String(a).localeCompare(String(b), undefined, {numeric: true});
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    };
  });
}

// fields: the factors of every head are decoded once per block, matrices on demand
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
const decoded = [];
function block(m) {
  if (!decoded[m]) {
    const b = data.blocks[m], short = text => new Int16Array(bytes(text));
    decoded[m] = {
      ...b, means: short(b.means), weights: short(b.weights), scale: new Float32Array(bytes(b.scale)),
      assignment: short(b.assignment), order: short(b.order), own: new Uint8Array(bytes(b.own)),
    };
  }
  return decoded[m];
}
function matrix(m, h) {
  const b = block(m), D = b.rank, at = h * K * D, fields = new Float32Array(K * K), weights = new Float32Array(K * D);
  for (let j = 0; j < K; j++) for (let d = 0; d < D; d++) weights[j * D + d] = b.weights[at + j * D + d] * b.scale[h * D + d];
  for (let i = 0; i < K; i++) for (let j = 0; j < K; j++) {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += b.means[at + i * D + d] * weights[j * D + d];
    fields[i * K + j] = sum;
  }
  return fields;
}
// labels of every cluster of a head, in block-diagonal order
function groups(m, h) {
  const b = block(m), found = new Map();
  for (const k of b.order.subarray(h * K, h * K + K)) {
    const cluster = b.assignment[h * K + k];
    if (cluster >= 0) found.set(cluster, [...(found.get(cluster) || []), data.classes[k]]);
  }
  return [...found.values()];
}
const recognises = (m, h) => groups(m, h).map(g => g.join("+")).join(", ") || "nothing";

// -1 blue, 0 white, +1 red: lightness falls towards both ends, so that it reads without colour too
function colour(v) {
  const mix = (a, b, t) => a.map((x, i) => x + (b[i] - x) * t), t = Math.min(1, Math.abs(v));
  const [near, far] = v < 0 ? [[120, 170, 215], [20, 60, 130]] : [[244, 150, 110], [135, 10, 30]];
  return t < 0.5 ? mix([255, 255, 255], near, 2 * t) : mix(near, far, 2 * t - 1);
}
const palette = Array.from({length: 257}, (_, i) => colour(i / 128 - 1));
const largest = fields => fields.reduce((a, b) => Math.max(a, b), -Infinity);
let last = {};
function picture(m, h) {
  if (last.m === m && last.h === h) return last;
  const fields = matrix(m, h), order = block(m).order.subarray(h * K, h * K + K), most = largest(fields);
  const unit = most > 0 ? most : fields.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
  const image = new ImageData(K, K), small = make("canvas", {width: K, height: K});
  for (let r = 0; r < K; r++) for (let c = 0; c < K; c++) {
    const v = Math.max(-1, Math.min(1, fields[order[r] * K + order[c]] / unit));
    image.data.set([...palette[Math.round(128 * (v + 1))], 255], 4 * (r * K + c));
  }
  small.getContext("2d").putImageData(image, 0, 0);
  last = {m, h, fields, order, most, small, sizes: groups(m, h).map(g => g.length)};
  return last;
}
function paint(canvas, {small, sizes}, size) {
  canvas.width = canvas.height = size;
  const g = canvas.getContext("2d"), cell = size / K;
  g.imageSmoothingEnabled = false;
  g.drawImage(small, 0, 0, size, size);
  g.strokeStyle = "#000";
  g.lineWidth = Math.max(1, Math.min(3, cell / 5));
  let at = 0;
  for (const n of sizes) { g.strokeRect(at * cell + .5, at * cell + .5, n * cell - 1, n * cell - 1); at += n; }
}
function reading({fields, order, most}, r, c) {
  const i = order[r], j = order[c], value = fields[i * K + j];
  const unit = data.normalize === "row" ? largest(fields.subarray(i * K, i * K + K)) : most;
  const where = `True ${data.classes[i]}, output ${data.classes[j]}: field ${value.toPrecision(3)}`;
  if (!(unit > 0)) return where;
  const part = value / unit;
  return `${where}, ${part.toFixed(2)} of the largest, ${part >= data.threshold ? "at or above" : "below"} the threshold`;
}
function cellAt(canvas, event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width].map(t => clip(Math.floor(t * K), K - 1));
}
const key = $("#key canvas").getContext("2d");
for (let i = 0; i <= 100; i++) { key.fillStyle = `rgb(${colour(i / 50 - 1)})`; key.fillRect(i, 0, 1, 1); }
$("#key").hidden = false;

// gallery: pictures are drawn when they come into view
const filter = $("#filter"), gallery = $("#gallery"), tip = $("#tip");
filter.hidden = false;
const draw = button => paint($("canvas", button), picture(+button.dataset.m, +button.dataset.h), K * Math.max(2, Math.ceil(300 / K)));
const seen = new IntersectionObserver(entries => {
  for (const e of entries) if (e.isIntersecting) { seen.unobserve(e.target); draw(e.target); }
}, {rootMargin: "300px"});
addEventListener("beforeprint", () => gallery.childNodes.forEach(draw));
let shown = [];
function list() {
  const m = +filter.block.value, b = block(m), one = parseInt(filter.head.value) - 1, label = filter.label.value;
  filter.head.max = b.heads;
  shown = Array.from({length: b.heads}, (_, h) => h)
    .filter(h => (isNaN(one) || h === one) && (label === "" || b.assignment[h * K + +label] >= 0));
  const by = filter.sort.value;
  if (by === "clusters") shown.sort((x, y) => b.clusters[y] - b.clusters[x]);
  if (by === "noise") shown.sort((x, y) => b.noise[x] - b.noise[y]);
  gallery.replaceChildren(...shown.map(h => {
    const button = make("button", {type: "button"}), canvas = make("canvas"), text = recognises(m, h);
    Object.assign(button.dataset, {m, h});
    canvas.setAttribute("aria-hidden", "true");
    button.append(canvas, make("b", {textContent: `Head ${h + 1}`}), make("span", {textContent: text, title: text}));
    button.onclick = () => open(m, h);
    canvas.onpointermove = event => {
      tip.textContent = reading(picture(m, h), ...cellAt(canvas, event));
      tip.hidden = false;
      tip.style.left = clip(event.clientX + 14, innerWidth - tip.offsetWidth - 4) + "px";
      tip.style.top = clip(event.clientY + 18, innerHeight - tip.offsetHeight - 4) + "px";
    };
    canvas.onpointerleave = () => { tip.hidden = true; };
    seen.observe(button);
    return button;
  }));
  $("#shown").textContent = `${shown.length} of ${b.heads} heads`;
}
filter.oninput = list;
filter.onsubmit = event => event.preventDefault();
list();

// one head, large: pointer or arrow keys read single elements
const large = $("#large"), view = $("canvas", large), read = $("#large-read"), HINT = read.textContent;
let now = null;
function open(m, h) {
  const b = block(m);
  tip.hidden = true;
  if (!large.open) large.showModal();
  const room = Math.min(large.clientWidth - 34, innerHeight - 280, 720);
  const size = Math.max(K, Math.floor(Math.max(240, room) / K) * K);
  now = {m, h, size, r: -1, c: -1};
  paint(view, picture(m, h), size);
  view.setAttribute("aria-label", `Fields of ${b.name}, head ${h + 1}`);
  $("#large-title").textContent = `${b.name}, head ${h + 1}`;
  $("#large-text").textContent = `Recognises ${recognises(m, h)}. ${b.clusters[h]} clusters, ${b.noise[h]} noise elements.`;
  read.textContent = HINT;
}
function point(r, c) {
  const {m, h, size} = now, shape = picture(m, h), g = view.getContext("2d"), cell = size / K;
  paint(view, shape, size);
  g.fillStyle = "#0003";
  g.fillRect(0, r * cell, size, cell);
  g.fillRect(c * cell, 0, cell, size);
  Object.assign(now, {r, c});
  read.textContent = reading(shape, r, c);
}
view.onpointermove = event => point(...cellAt(view, event));
view.onkeydown = event => {
  const step = ARROWS[event.key];
  if (!step) return;
  event.preventDefault();
  point(clip(now.r < 0 ? 0 : now.r + step[0], K - 1), clip(now.c < 0 ? 0 : now.c + step[1], K - 1));
};
large.onclick = event => {
  const step = event.target.dataset.step;
  if (step) open(now.m, shown[(shown.indexOf(now.h) + +step + shown.length) % shown.length]);
  if ("close" in event.target.dataset || event.target === large) large.close();
};

// which head recognises which label
const mapFilter = $("#map-filter"), map = $("#map-canvas"), mapRead = $("#map-read"), MAP_HINT = mapRead.textContent;
let at = [-1, -1];
mapFilter.hidden = $("#map-box").hidden = mapRead.hidden = false;
function mapShape() {
  const b = block(+mapFilter.block.value), font = Math.min(14, Math.max(9, 1400 / K)), line = Math.ceil(font * 1.25), g = map.getContext("2d");
  g.font = `${font}px system-ui, sans-serif`;
  const names = data.classes.map(n => n.length > 22 ? n.slice(0, 21) + "\u2026" : n);
  const left = Math.ceil(Math.max(...names.map(n => g.measureText(n).width))) + 10, top = 20;
  const room = $("#map-box").clientWidth - left - 4, cell = Math.max(7, Math.min(26, Math.floor(room / b.heads)));
  return {b, g, font, names, left, top, line, cell};
}
function drawMap() {
  map.width = map.width;  // back to the identity, so that names are measured unscaled
  const {b, g, font, names, left, top, line, cell} = mapShape(), ratio = devicePixelRatio || 1;
  const style = getComputedStyle(document.documentElement), [fg, soft, grid, fill] = ["--fg", "--soft", "--line", "--c0"].map(n => style.getPropertyValue(n));
  const width = left + cell * b.heads + 2, height = top + line * K + 2;
  map.width = width * ratio; map.height = height * ratio;
  map.style.width = width + "px"; map.style.height = height + "px";
  g.scale(ratio, ratio);
  g.font = `${font}px system-ui, sans-serif`;
  g.textBaseline = "middle"; g.textAlign = "center"; g.fillStyle = soft;
  const every = Math.ceil(24 / cell);
  for (let h = 0; h < b.heads; h++) if ((h + 1) % every === 0 || (h === 0 && every < 4)) g.fillText(h + 1, left + (h + .5) * cell, top / 2);
  for (let k = 0; k < K; k++) {
    const y = top + k * line;
    g.textAlign = "right"; g.fillStyle = fg; g.fillText(names[k], left - 5, y + line / 2);
    g.fillStyle = grid; g.fillRect(left, y + line - .5, cell * b.heads, .5);
    g.fillStyle = fill;
    for (let h = 0; h < b.heads; h++) {
      const own = b.own[h * K + k];
      if (own) { g.globalAlpha = .25 + .75 * own / 255; g.fillRect(left + h * cell + .5, y + 1, cell - 1, line - 2); }
    }
    g.globalAlpha = 1;
  }
  if (at[0] >= 0) { g.strokeStyle = fg; g.lineWidth = 2; g.strokeRect(left + at[1] * cell, top + at[0] * line, cell, line); }
}
function readMap(k, h) {
  at = [k, h];
  drawMap();
  const b = block(+mapFilter.block.value), heads = [];
  for (let x = 0; x < b.heads; x++) if (b.own[x * K + k]) heads.push(x + 1);
  const own = b.own[h * K + k];
  mapRead.textContent = `${data.classes[k]}, head ${h + 1}: ${own ? `recognised, own field ${((own - 1) / 254).toFixed(2)} of the largest` : "not recognised"}. ` +
    (heads.length ? `Heads that recognise it: ${heads.join(", ")}` : "No head recognises it.");
}
map.onpointermove = event => {
  const {left, top, cell, line, b} = mapShape(), box = map.getBoundingClientRect();
  const k = Math.floor((event.clientY - box.top - top) / line), h = Math.floor((event.clientX - box.left - left) / cell);
  if (k >= 0 && k < K && h >= 0 && h < b.heads && (k !== at[0] || h !== at[1])) readMap(k, h);
};
map.onkeydown = event => {
  const step = ARROWS[event.key], heads = block(+mapFilter.block.value).heads;
  if (!step) return;
  event.preventDefault();
  readMap(at[0] < 0 ? 0 : clip(at[0] + step[0], K - 1), at[1] < 0 ? 0 : clip(at[1] + step[1], heads - 1));
};
mapFilter.oninput = () => { at = [-1, -1]; mapRead.textContent = MAP_HINT; drawMap(); };
mapFilter.onsubmit = event => event.preventDefault();
addEventListener("resize", drawMap);
retheme();
})();
