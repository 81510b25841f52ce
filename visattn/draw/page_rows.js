"use strict";
// From the stored numbers to the map of one question. Layers are token attention (form "maps": 8-bit rows with their
// range; form "qk": fp16 q and k, the softmax is taken here) or values without a query (form "gate"); heats are
// finished maps. The numbers lie base64-coded in one script element per layer (or heat), part and image, little endian.
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
  const [h, w] = layer.grid, [y, x] = query.kind === "patch" ? patchAt(layer, query) : [];
  if (query.kind === "patch") return [[first + y * w + x, 1]];
  return Array.from({ length: h * w }, (_, i) => [first + i, 1 / (h * w)]);
}

// The patch whose center is next to a place of the picture: row and column.
function patchAt(layer, query) {
  const [y, x, down, right] = layer.lattice, [h, w] = layer.grid;
  const nearest = (part, first, step, count) => Math.min(count - 1, Math.max(0, Math.floor((part - first) / step + 0.5)));
  return [nearest(query.y, y, down, h), nearest(query.x, x, right, w)];
}

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
  return { h, w, values, prefix, tokens: layer.key_prefix, lattice: layer.key_lattice };
}

function gateView(index, head) {
  const layer = data.layers[index], [h, w] = layer.key_grid, all = blob(index).gate, heads = headsOf(layer, head);
  const values = Array.from({ length: h * w }, (_, i) => {
    let sum = 0;
    for (const one of heads) sum += all[one * h * w + i];
    return sum / heads.length;
  });
  return { h, w, values, prefix: 0, tokens: 0, lattice: layer.key_lattice };
}

function heatView(name) {
  const heat = data.heats.find((one) => one.name === name), [h, w] = heat.grid;
  const values = Array.from(new Float32Array(bytes(`h-${data.heats.indexOf(heat)}-${state.image}`)));
  return { h, w, values, prefix: heat.prefix ? heat.prefix[state.image] : 0, tokens: heat.prefix ? 1 : 0,
    low: heat.low, high: heat.high, lattice: heat.lattice };
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
