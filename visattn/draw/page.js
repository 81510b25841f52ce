"use strict";
// Layers are token attention (form "maps": 8-bit rows with their range; form "qk": fp16 q and k, the softmax is taken
// here) or values without a query (form "gate"); heats are finished maps. The numbers lie base64-coded in one script
// element per layer (or heat), part and image; browsers and numpy agree on little endian.
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const state = { image: 0, layer: data.start, head: -1, method: "attention", query: null, hover: null, held: null, job: 0 };
const loaded = new Map(), cache = new Map();

function bytes(id) {
  const text = atob(element(id).textContent), out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out.buffer;
}

let halves = null;
function floats(buffer) {
  if (!halves) {
    halves = new Float32Array(65536);
    for (let i = 0; i < 65536; i++) {
      const exponent = (i >> 10) & 31, part = i & 1023, sign = i >> 15 ? -1 : 1;
      halves[i] = sign * (exponent ? 2 ** (exponent - 15) * (1 + part / 1024) : 2 ** -24 * part);
    }
  }
  return Float32Array.from(new Uint16Array(buffer), (bits) => halves[bits]);
}

function blob(index) {
  const key = `${state.image}-${index}`, layer = data.layers[index];
  if (!loaded.has(key)) {
    const read = (part) => bytes(`b-${index}-${part}-${state.image}`);
    if (layer.form === "maps") loaded.set(key, { parts: new Uint8Array(read("a")), ranges: new Float32Array(read("r")) });
    else if (layer.form === "qk") loaded.set(key, { q: floats(read("q")), k: floats(read("k")), mean: new Float32Array(read("m")) });
    else loaded.set(key, { gate: new Float32Array(read("g")) });
  }
  return loaded.get(key);
}

// In which group (window) a token lies, and where in it; without groups all tokens form one.
function places(layer) {
  if (!layer.groups || layer.places) return layer.places;
  layer.places = new Map();
  layer.groups.forEach((tokens, group) => tokens.forEach((token, at) => token >= 0 && layer.places.set(token, [group, at])));
  return layer.places;
}

// out[key] += weight * attention of one head from one token
function addRow(index, head, token, weight, out) {
  const layer = data.layers[index], store = blob(index);
  if (layer.form === "qk") return addSoftmaxRow(layer, store, head, token, weight, out);
  const [group, at] = layer.groups ? places(layer).get(token) : [0, token], keys = layer.key_groups?.[group];
  const groups = layer.groups?.length ?? 1, queries = layer.groups?.[0].length ?? layer.tokens, size = keys?.length ?? layer.keys;
  const row = (head * groups + group) * queries + at, low = store.ranges[2 * row], step = store.ranges[2 * row + 1] / 255;
  for (let j = 0; j < size; j++) {
    const key = keys ? keys[j] : j;
    if (key >= 0) out[key] += weight * (low + step * store.parts[row * size + j]);
  }
}

function addSoftmaxRow(layer, store, head, token, weight, out) {
  const width = layer.dim, { q, k } = store, scores = new Float64Array(layer.keys);
  const from = (head * layer.tokens + token) * width;
  const keyHead = Math.floor(head / (layer.heads / layer.key_heads));
  let largest = -Infinity, sum = 0;
  for (let j = 0; j < layer.keys; j++) {
    const to = (keyHead * layer.keys + j) * width;
    let dot = 0;
    for (let c = 0; c < width; c++) dot += q[from + c] * k[to + c];
    scores[j] = dot;
    if (scores[j] > largest) largest = scores[j];
  }
  for (let j = 0; j < layer.keys; j++) sum += scores[j] = Math.exp(scores[j] - largest);
  for (let j = 0; j < layer.keys; j++) out[j] += (weight * scores[j]) / sum;
}

function headsOf(layer, head) {
  return head >= 0 && head < layer.heads ? [head] : [...Array(layer.heads).keys()];
}

// The weights over tokens that a question starts from: one token, or all patches alike.
function starts(layer, query) {
  const first = layer.prefix;
  if (query.kind === "token") return [[query.index, 1]];
  const [h, w] = layer.grid;
  if (query.kind === "patch") return [[first + cell(query.y, h) * w + cell(query.x, w), 1]];
  return Array.from({ length: h * w }, (_, i) => [first + i, 1 / (h * w)]);
}

const cell = (part, count) => Math.min(count - 1, Math.max(0, Math.floor(part * count)));

// Long sums let the browser breathe; a newer question ends them.
function pacer(job) {
  let last = performance.now();
  return async (status) => {
    if (performance.now() - last > 40) {
      element("readout").textContent = status;
      await new Promise((resume) => setTimeout(resume));
      last = performance.now();
    }
    return job === state.job;
  };
}

async function attention(index, head, query, job) {
  const layer = data.layers[index], out = new Float64Array(layer.keys), heads = headsOf(layer, head), goOn = pacer(job);
  const { mean } = blob(index);
  if (query.kind === "mean" && mean) {
    for (const one of heads) out.forEach((value, j) => (out[j] += mean[one * layer.keys + j] / heads.length));
    return onGrid(layer, out);
  }
  for (const [token, weight] of starts(layer, query)) {
    for (const one of heads) addRow(index, one, token, weight / heads.length, out);
    if (!(await goOn("attention of all patches ..."))) return null;
  }
  return onGrid(layer, out);
}

// Rollout of one row: from the chosen layer down, half of every row stays (the residual), half follows the mean head.
async function rollout(index, query, job) {
  const chain = data.layers.map((layer, at) => at).filter((at) => at <= index && data.layers[at].form !== "gate");
  const ready = storedRollout(data.layers[index], chain.length - 1, query);
  if (ready) return onGrid(data.layers[index], ready);
  let row = new Float64Array(data.layers[index].tokens);
  const goOn = pacer(job);
  for (const [token, weight] of starts(data.layers[index], query)) row[token] += weight;
  for (const [done, at] of chain.reverse().entries()) {
    const layer = data.layers[at], next = row.map((value) => value / 2);
    for (let token = 0; token < layer.tokens; token++) {
      if (row[token] === 0) continue;
      for (let head = 0; head < layer.heads; head++) addRow(at, head, token, row[token] / 2 / layer.heads, next);
      if (!(await goOn(`rollout, layer ${done + 1} of ${chain.length} ...`))) return null;
    }
    row = next;
  }
  return onGrid(data.layers[index], row);
}

// Where the page would have to take every softmax of the model, the rows of class token and mean are stored.
function storedRollout(layer, at, query) {
  const store = element(`s-${state.image}`), first = query.kind === "token" && query.index === 0;
  if (!store || (!first && query.kind !== "mean")) return null;
  const kinds = layer.prefix ? 2 : 1, from = (at * kinds + (first ? 0 : kinds - 1)) * layer.tokens;
  return new Float32Array(bytes(`s-${state.image}`), 4 * from, layer.tokens);
}

function onGrid(layer, row) {
  const [h, w] = layer.key_grid, values = Array.from(row.slice(layer.key_prefix, layer.key_prefix + h * w));
  let prefix = 0;
  for (let i = 0; i < layer.key_prefix; i++) prefix += row[i];
  return { h, w, values, prefix, tokens: layer.key_prefix };
}

function gateView(index, head) {
  const layer = data.layers[index], [h, w] = layer.key_grid, all = blob(index).gate, heads = headsOf(layer, head);
  const values = Array.from({ length: h * w }, (_, i) => {
    let sum = 0;
    for (const one of heads) sum += all[one * h * w + i];
    return sum / heads.length;
  });
  return { h, w, values, prefix: 0, tokens: 0 };
}

function heatView(name) {
  const heat = data.heats.find((one) => one.name === name), [h, w] = heat.grid;
  const values = Array.from(new Float32Array(bytes(`h-${data.heats.indexOf(heat)}-${state.image}`)));
  return { h, w, values, prefix: heat.prefix ? heat.prefix[state.image] : 0, tokens: heat.prefix ? 1 : 0,
    low: heat.low, high: heat.high };
}

async function viewOf(method, index, head, query, job) {
  const asked = query.kind === "patch" ? `${query.y},${query.x}` : `${query.kind}${query.index ?? ""}`;
  const key = [state.image, method, index, head, asked].join("|");
  if (!cache.has(key)) {
    let view;
    if (!["attention", "rollout"].includes(method)) view = heatView(method);
    else if (data.layers[index].form === "gate") view = gateView(index, head);
    else view = await (method === "rollout" ? rollout(index, query, job) : attention(index, head, query, job));
    if (!view) return null;
    if (cache.size > 300) cache.delete(cache.keys().next().value);
    cache.set(key, view);
  }
  return cache.get(key);
}

function paint(canvas, view, low, high) {
  canvas.width = view.w;
  canvas.height = view.h;
  const pen = canvas.getContext("2d"), pixels = pen.createImageData(view.w, view.h), reach = high - low;
  view.values.forEach((value, i) => {
    const part = reach > 0 ? Math.min(1, Math.max(0, (value - low) / reach)) : 0, color = Math.min(255, Math.floor(part * 256));
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = data.colors[3 * color + c];
    pixels.data[4 * i + 3] = 255;
  });
  pen.putImageData(pixels, 0, 0);
}

const number = (value) => (value === 0 ? "0" : Math.abs(value) >= 0.001 ? value.toPrecision(3) : value.toExponential(1));
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const span = (view) => [view.low ?? Math.min(0, ...view.values), view.high ?? Math.max(...view.values)];

function queryName(query, layer) {
  if (query.kind === "mean") return "all patches, mean";
  if (query.kind === "token") return data.prefix_names[query.index] ?? `token ${query.index}`;
  return `patch row ${cell(query.y, layer.grid[0]) + 1}, column ${cell(query.x, layer.grid[1]) + 1}`;
}

async function draw() {
  const job = ++state.job, layer = data.layers[state.layer], query = fitting(layer, state.hover ?? state.query);
  controls(layer, query);
  const view = await viewOf(state.method, state.layer, state.head, query, job);
  if (!view || job !== state.job) return;
  const [low, high] = state.held ?? span(view);
  state.view = { ...view, low, high };
  paint(element("heat"), view, low, high);
  element("low").textContent = number(low);
  element("high").textContent = number(high);
  mark(layer, query);
  describe(view, layer, query);
  headStrip(view, layer, query, job);
}

const usesQuery = () => ["attention", "rollout"].includes(state.method) && data.layers[state.layer].form !== "gate";

// A class token asked of a layer that has none becomes the mean over its patches.
function fitting(layer, query) {
  return query.kind === "token" && query.index >= layer.prefix ? { kind: "mean" } : query;
}

function mark(layer, query) {
  const marker = element("marker");
  marker.hidden = query.kind !== "patch" || !usesQuery();
  if (marker.hidden) return;
  const [h, w] = layer.grid, y = cell(query.y, h), x = cell(query.x, w);
  Object.assign(marker.style, { top: `${(100 * y) / h}%`, left: `${(100 * x) / w}%`, height: `${100 / h}%`, width: `${100 / w}%` });
}

function describe(view, layer, query) {
  const top = view.values.indexOf(Math.max(...view.values)), row = Math.floor(top / view.w) + 1, column = (top % view.w) + 1;
  const from = usesQuery() ? `${queryName(query, layer)} looks most at` : "largest at";
  const prefix = view.tokens ? `; ${percent(view.prefix)} goes to class and register tokens` : "";
  element("readout").textContent = `${from} row ${row}, column ${column}: ${number(view.values[top])}${prefix}.`;
}

async function headStrip(view, layer, query, job) {
  const strip = element("heads"), shown = state.method === "attention" && layer.heads > 1;
  strip.hidden = !shown;
  if (!shown) return;
  while (strip.children.length > layer.heads) strip.lastChild.remove();
  while (strip.children.length < layer.heads) {
    const button = document.createElement("button"), head = strip.children.length;
    button.type = "button";
    button.append(document.createElement("canvas"), document.createElement("span"));
    button.lastChild.textContent = `head ${head}`;
    button.onclick = () => set({ head: state.head === head ? -1 : head });
    strip.append(button);
  }
  const views = [];
  for (let head = 0; head < layer.heads; head++) {
    views.push(await viewOf("attention", state.layer, head, query, job));
    if (job !== state.job) return;
  }
  describe(view, layer, query);
  const low = Math.min(...views.map((one) => span(one)[0])), high = Math.max(...views.map((one) => span(one)[1]));
  views.forEach((one, head) => {
    paint(strip.children[head].firstChild, one, low, high);
    strip.children[head].setAttribute("aria-pressed", state.head === head);
  });
  strip.title = `one scale for all heads: ${number(low)} to ${number(high)}`;
}

function controls(layer, query) {
  element("layer").value = state.layer;
  element("layer").disabled = !["attention", "rollout"].includes(state.method);
  element("layer-name").textContent = `${state.layer + 1} of ${data.layers.length}: ${layer.name}`;
  element("head").max = layer.heads - 1;
  element("head").value = state.head;
  element("head").disabled = state.method !== "attention" || layer.heads < 2;
  element("head-name").textContent = state.method === "attention" && state.head >= 0 ? `${state.head} of 0-${layer.heads - 1}` : "mean";
  for (const button of element("methods").children) button.setAttribute("aria-pressed", button.value === state.method);
  for (const button of element("queries").children) {
    button.disabled = !usesQuery();
    button.setAttribute("aria-pressed", usesQuery() && sameQuery(JSON.parse(button.value), query));
  }
  for (const [index, button] of [...element("images").children].entries()) button.setAttribute("aria-pressed", index === state.image);
}

const sameQuery = (a, b) => a.kind === b.kind && (a.kind === "patch" || a.index === b.index);

function set(change) {
  Object.assign(state, change);
  const layer = data.layers[state.layer];
  if (state.head >= layer.heads) state.head = -1;
  draw();
}

function choice(parent, label, value, title, action) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: label, value, title });
  button.onclick = action;
  parent.append(button);
  return button;
}

function showImage(index) {
  const image = data.images[index], stage = element("stage"), photo = element("photo");
  photo.src = image.source;
  photo.alt = image.name;
  photo.className = Math.min(image.width, image.height) < 200 ? "small" : "";
  stage.style.aspectRatio = `${image.width} / ${image.height}`;
  stage.style.maxWidth = `calc(74vh * ${image.width / image.height})`;
  element("caption").textContent = [image.name, image.label].filter(Boolean).join(": ");
  loaded.clear();
  set({ image: index, hover: null });
}

function pointed(event) {
  const box = element("heat").getBoundingClientRect();
  return { kind: "patch", x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
}

// Patches are remembered by their center, so that one patch is one question.
function centered(query, layer) {
  const [h, w] = layer.grid;
  return { kind: "patch", y: (cell(query.y, h) + 0.5) / h, x: (cell(query.x, w) + 0.5) / w };
}

function movePatch(dy, dx) {
  if (!usesQuery()) return;
  const layer = data.layers[state.layer], [h, w] = layer.grid;
  const now = state.query.kind === "patch" ? state.query : { y: 0.5 - dy / h, x: 0.5 - dx / w };
  set({ hover: null, query: centered({ y: now.y + dy / h, x: now.x + dx / w }, layer) });
}

function stepLayer(by) {
  set({ layer: Math.min(data.layers.length - 1, Math.max(0, state.layer + by)) });
}

function stepHead(by) {
  set({ head: Math.min(data.layers[state.layer].heads - 1, Math.max(-1, state.head + by)) });
}

function turnTheme() {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = (root.dataset.theme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
}

const keys = {
  ArrowUp: () => movePatch(-1, 0), ArrowDown: () => movePatch(1, 0), ArrowLeft: () => movePatch(0, -1), ArrowRight: () => movePatch(0, 1),
  "[": () => stepLayer(-1), "]": () => stepLayer(1), ",": () => stepHead(-1), ".": () => stepHead(1),
  a: () => set({ method: "attention" }), r: () => data.rollout && set({ method: "rollout" }),
  c: () => set({ query: { kind: "token", index: 0 }, hover: null }), m: () => set({ query: { kind: "mean" }, hover: null }),
  n: () => showImage((state.image + 1) % data.images.length), t: turnTheme,
};

function listen() {
  const stage = element("stage");
  stage.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse" || !usesQuery() || state.method === "rollout") return;
    const query = centered(pointed(event), data.layers[state.layer]);
    if (!state.hover || state.hover.x !== query.x || state.hover.y !== query.y) set({ hover: query });
  });
  stage.addEventListener("pointerleave", () => state.hover && set({ hover: null }));
  stage.addEventListener("click", (event) => {
    if (usesQuery()) set({ query: centered(pointed(event), data.layers[state.layer]), hover: null });
  });
  element("layer").oninput = (event) => set({ layer: Number(event.target.value) });
  element("head").oninput = (event) => set({ head: Number(event.target.value) });
  element("opacity").oninput = showOpacity;
  element("hold").onchange = (event) => set({ held: event.target.checked ? [state.view.low, state.view.high] : null });
  element("theme").onclick = turnTheme;
  document.addEventListener("keydown", (event) => {
    const slider = event.target.matches("input[type=range]") && event.key.startsWith("Arrow");
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || slider || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
}

function showOpacity() {
  const value = Number(element("opacity").value);
  element("heat").style.opacity = value / 100;
  element("opacity-name").textContent = `${value} %`;
}

function build() {
  const pen = element("bar").getContext("2d"), ramp = pen.createImageData(256, 1);
  for (let i = 0; i < 256; i++) ramp.data.set([...data.colors.slice(3 * i, 3 * i + 3), 255], 4 * i);
  pen.putImageData(ramp, 0, 0);
  element("layer").max = data.layers.length - 1;
  const methods = element("methods");
  choice(methods, "Attention", "attention", "One layer, one head or their mean", () => set({ method: "attention" }));
  const why = data.rollout ? "Through all layers up to the chosen one" : "Needs layers with the same tokens";
  choice(methods, "Rollout", "rollout", why, () => set({ method: "rollout" })).disabled = !data.rollout;
  for (const heat of data.heats) choice(methods, heat.name, heat.name, heat.detail, () => set({ method: heat.name }));
  const asks = data.prefix_names.map((name, index) => [name, { kind: "token", index }]);
  asks.push(["mean of patches", { kind: "mean" }], ["a patch", { kind: "patch", y: 0.5, x: 0.5 }]);
  for (const [label, query] of asks)
    choice(element("queries"), label, JSON.stringify(query), label === "a patch" ? "Or click the image" : "", () =>
      set({ query: query.kind === "patch" ? centered(query, data.layers[state.layer]) : query, hover: null }));
  state.query = asks[0][1];
  data.images.forEach((image, index) => {
    if (data.images.length < 2) return;
    const picture = document.createElement("img");
    picture.src = image.source;
    picture.alt = image.name;
    choice(element("images"), "", String(index), image.name, () => showImage(index)).append(picture);
  });
  listen();
  showOpacity();
  showImage(0);
}

build();
