"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const K = data.classes.length;
const $ = (selector, root = document) => root.querySelector(selector);

// theme: the system's until the button is used
const theme = $("#theme"), system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.title = "Switch to " + theme.textContent.toLowerCase() + " colours"; };
theme.hidden = false;
theme.onclick = () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); drawMap(); };
system.addEventListener("change", () => { nameTheme(); drawMap(); });
nameTheme();

// tables: a button in every column head sorts, stable, numbers as numbers, empty cells last
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const down = head.ariaSort === "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => {
        const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent;
        return text === "" || isNaN(Number(text.replace(" %", ""))) ? text : Number(text.replace(" %", ""));
      };
      const rows = [...table.tBodies[0].rows].map(row => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true});
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
    const b = data.blocks[m];
    decoded[m] = {
      ...b, means: new Int16Array(bytes(b.means)), weights: new Int16Array(bytes(b.weights)),
      scale: new Float32Array(bytes(b.scale)), assignment: new Int16Array(bytes(b.assignment)), order: new Int16Array(bytes(b.order)),
    };
  }
  return decoded[m];
}
function matrix(m, h) {
  const b = block(m), D = b.rank, at = h * K * D, fields = new Float32Array(K * K);
  const weights = new Float32Array(K * D);
  for (let j = 0; j < K; j++) for (let d = 0; d < D; d++) weights[j * D + d] = b.weights[at + j * D + d] * b.scale[h * D + d];
  for (let i = 0; i < K; i++) for (let j = 0; j < K; j++) {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += b.means[at + i * D + d] * weights[j * D + d];
    fields[i * K + j] = sum;
  }
  return fields;
}
const head = (m, h) => {
  const b = block(m), order = b.order.subarray(h * K, h * K + K), cluster = b.assignment.subarray(h * K, h * K + K);
  const sizes = new Map();
  for (const k of order) if (cluster[k] >= 0) sizes.set(cluster[k], (sizes.get(cluster[k]) || 0) + 1);
  return {order, cluster, sizes: [...sizes.values()]};
};
const text = (m, h) => {
  const {order, cluster} = head(m, h), groups = new Map();
  for (const k of order) if (cluster[k] >= 0) groups.set(cluster[k], [...(groups.get(cluster[k]) || []), data.classes[k]]);
  return [...groups.values()].map(g => g.join("+")).join(", ") || "nothing";
};

// -1 blue, 0 white, +1 red: lightness falls towards both ends, so that it reads without colour too
function colour(v) {
  const mix = (a, b, t) => a.map((x, i) => x + (b[i] - x) * t), t = Math.min(1, Math.abs(v));
  const [near, far] = v < 0 ? [[120, 170, 215], [20, 60, 130]] : [[244, 150, 110], [135, 10, 30]];
  return t < 0.5 ? mix([255, 255, 255], near, 2 * t) : mix(near, far, 2 * t - 1);
}
const palette = Array.from({length: 257}, (_, i) => colour(i / 128 - 1));
const largest = fields => fields.reduce((a, b) => Math.max(a, b), -Infinity);
function pixels(canvas, fields, order, most) {
  const unit = most > 0 ? most : fields.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
  const image = new ImageData(K, K);
  for (let r = 0; r < K; r++) for (let c = 0; c < K; c++) {
    const v = Math.max(-1, Math.min(1, fields[order[r] * K + order[c]] / unit));
    image.data.set([...palette[Math.round(128 * (v + 1))], 255], 4 * (r * K + c));
  }
  canvas.width = canvas.height = K;
  canvas.getContext("2d").putImageData(image, 0, 0);
}
function paint(canvas, m, h, size) {
  const fields = matrix(m, h), {order, sizes} = head(m, h), small = document.createElement("canvas");
  pixels(small, fields, order, largest(fields));
  canvas.width = canvas.height = size;
  const g = canvas.getContext("2d"), cell = size / K;
  g.imageSmoothingEnabled = false;
  g.drawImage(small, 0, 0, size, size);
  g.strokeStyle = "#000"; g.lineWidth = Math.max(1, Math.min(3, cell / 5));
  let at = 0;
  for (const n of sizes) { g.strokeRect(at * cell + .5, at * cell + .5, n * cell - 1, n * cell - 1); at += n; }
  return {fields, order};
}
const key = $("#key canvas").getContext("2d");
for (let i = 0; i <= 100; i++) { key.fillStyle = `rgb(${colour(i / 50 - 1)})`; key.fillRect(i, 0, 1, 1); }
$("#key").hidden = false;

// gallery: pictures are drawn when they come into view
const filter = $("#filter"), gallery = $("#gallery");
filter.hidden = false;
const seen = new IntersectionObserver(entries => {
  for (const e of entries) if (e.isIntersecting) {
    seen.unobserve(e.target);
    paint($("canvas", e.target), +e.target.dataset.m, +e.target.dataset.h, K * Math.max(2, Math.ceil(240 / K)));
  }
}, {rootMargin: "300px"});
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
    const button = document.createElement("button"), canvas = document.createElement("canvas"), title = document.createElement("b"), span = document.createElement("span");
    button.type = "button"; button.dataset.m = m; button.dataset.h = h;
    title.textContent = `Head ${h + 1}`;
    span.textContent = text(m, h); button.title = `${b.name}, head ${h + 1}: ${span.textContent}`;
    canvas.setAttribute("aria-hidden", "true");
    button.append(canvas, title, span);
    button.onclick = () => open(m, h);
    seen.observe(button);
    return button;
  }));
  $("#shown").textContent = `${shown.length} of ${b.heads} heads`;
}
filter.oninput = list;
filter.onsubmit = event => event.preventDefault();
list();

// one head, large: pointer or arrow keys read single elements
const large = $("#large"), view = $("canvas", large), read = $("#large-read");
let now = null;
function open(m, h) {
  const b = block(m);
  if (!large.open) large.showModal();
  const room = Math.min(large.clientWidth - 34, innerHeight - 260, 720);
  const size = Math.max(K, Math.floor(Math.max(240, room) / K) * K);
  now = {m, h, size, r: -1, c: -1, ...paint(view, m, h, size)};
  view.setAttribute("aria-label", `Fields of ${b.name}, head ${h + 1}`);
  $("#large-title").textContent = `${b.name}, head ${h + 1}`;
  $("#large-text").textContent = `Recognises ${text(m, h)}. ${b.clusters[h]} clusters, ${b.noise[h]} noise elements.`;
  read.textContent = "Point at an element, or use the arrow keys.";
}
function point(r, c) {
  const {m, h, fields, order, size} = now, i = order[r], j = order[c];
  paint(view, m, h, size);
  const g = view.getContext("2d"), cell = size / K;
  g.fillStyle = "#0003"; g.fillRect(0, r * cell, size, cell); g.fillRect(c * cell, 0, cell, size);
  Object.assign(now, {r, c});
  let most = largest(fields);
  if (data.normalize === "row") most = largest(fields.subarray(i * K, i * K + K));
  const value = fields[i * K + j], part = most > 0 ? value / most : 0;
  read.textContent = `True ${data.classes[i]}, output ${data.classes[j]}: field ${value.toPrecision(3)}` +
    (most > 0 ? `, ${part.toFixed(2)} of the largest, ${part >= data.threshold ? "at or above" : "below"} the threshold` : "");
}
const clip = x => Math.max(0, Math.min(K - 1, x));
view.onpointermove = event => {
  const box = view.getBoundingClientRect();
  point(clip(Math.floor((event.clientY - box.top) / box.height * K)), clip(Math.floor((event.clientX - box.left) / box.width * K)));
};
const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
view.onkeydown = event => {
  const step = ARROWS[event.key];
  if (!step) return;
  event.preventDefault();
  point(clip(now.r < 0 ? 0 : now.r + step[0]), clip(now.c < 0 ? 0 : now.c + step[1]));
};
large.onclick = event => {
  const step = event.target.dataset.step;
  if (step) open(now.m, shown[(shown.indexOf(now.h) + +step + shown.length) % shown.length]);
  if ("close" in event.target.dataset || event.target === large) large.close();
};

// which head recognises which label
const mapFilter = $("#map-filter"), map = $("#map-canvas"), mapRead = $("#map-read");
mapFilter.hidden = $("#map-box").hidden = false;
let at = [-1, -1];
function drawMap() {
  const b = block(+mapFilter.block.value), style = getComputedStyle(document.documentElement);
  const font = Math.min(14, Math.max(9, 1400 / K)), line = Math.ceil(font * 1.25);
  const g = map.getContext("2d"), ratio = devicePixelRatio || 1;
  g.font = `${font}px system-ui, sans-serif`;
  const names = data.classes.map(n => n.length > 22 ? n.slice(0, 21) + "\u2026" : n);
  const left = Math.ceil(Math.max(...names.map(n => g.measureText(n).width))) + 10, top = 20;
  const room = $("#map-box").clientWidth - left - 4, cell = Math.max(7, Math.min(26, Math.floor(room / b.heads)));
  const width = left + cell * b.heads + 2, height = top + line * K + 2;
  map.width = width * ratio; map.height = height * ratio;
  map.style.width = width + "px"; map.style.height = height + "px";
  g.scale(ratio, ratio);
  g.font = `${font}px system-ui, sans-serif`; g.textBaseline = "middle";
  const fg = style.getPropertyValue("--fg"), soft = style.getPropertyValue("--soft"), grid = style.getPropertyValue("--line"), fill = style.getPropertyValue("--c0");
  g.textAlign = "center"; g.fillStyle = soft;
  const every = Math.ceil(24 / cell);
  for (let h = 0; h < b.heads; h++) if (h === 0 || (h + 1) % every === 0 && h >= every - 1) g.fillText(h + 1, left + (h + .5) * cell, top / 2);
  g.textAlign = "right";
  for (let k = 0; k < K; k++) {
    const y = top + k * line;
    g.fillStyle = fg; g.fillText(names[k], left - 5, y + line / 2);
    g.fillStyle = grid; g.fillRect(left, y + line - .5, cell * b.heads, .5);
    for (let h = 0; h < b.heads; h++) if (b.assignment[h * K + k] >= 0) { g.fillStyle = fill; g.fillRect(left + h * cell + .5, y + 1, cell - 1, line - 2); }
  }
  if (at[0] >= 0) { g.strokeStyle = fg; g.lineWidth = 2; g.strokeRect(left + at[1] * cell, top + at[0] * line, cell, line); }
  return {left, top, cell, line, b};
}
function readMap(k, h) {
  at = [k, h];
  const {b} = drawMap(), heads = [];
  for (let x = 0; x < b.heads; x++) if (b.assignment[x * K + k] >= 0) heads.push(x + 1);
  mapRead.textContent = `${data.classes[k]}, head ${h + 1}: ${b.assignment[h * K + k] >= 0 ? "recognised" : "not recognised"}. ` +
    (heads.length ? `Heads that recognise it: ${heads.join(", ")}` : "No head recognises it.");
}
map.onpointermove = event => {
  const {left, top, cell, line, b} = drawMap(), box = map.getBoundingClientRect();
  const k = Math.floor((event.clientY - box.top - top) / line), h = Math.floor((event.clientX - box.left - left) / cell);
  if (k >= 0 && k < K && h >= 0 && h < b.heads && (k !== at[0] || h !== at[1])) readMap(k, h);
};
map.onkeydown = event => {
  const step = ARROWS[event.key], heads = block(+mapFilter.block.value).heads;
  if (!step) return;
  event.preventDefault();
  readMap(clip(at[0] < 0 ? 0 : at[0] + step[0]), at[1] < 0 ? 0 : Math.max(0, Math.min(heads - 1, at[1] + step[1])));
};
mapFilter.oninput = () => { at = [-1, -1]; mapRead.textContent = ""; drawMap(); };
mapFilter.onsubmit = event => event.preventDefault();
addEventListener("resize", drawMap);
drawMap();
})();
