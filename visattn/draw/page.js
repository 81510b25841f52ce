// What the page shows, and what its controls do; the numbers come from page_rows.js.
// One pixel per patch; a margin repeats the outermost patches.
function paint(canvas, view, low, high, margin = 0) {
  const [h, w] = [view.h + 2 * margin, view.w + 2 * margin], inside = (at, count) => Math.min(count - 1, Math.max(0, at - margin));
  Object.assign(canvas, { width: w, height: h });
  const pen = canvas.getContext("2d"), pixels = pen.createImageData(w, h), reach = high - low;
  for (let i = 0; i < h * w; i++) {
    const value = view.values[inside(Math.floor(i / w), view.h) * view.w + inside(i % w, view.w)];
    const part = reach > 0 ? Math.min(1, Math.max(0, (value - low) / reach)) : 0, color = Math.min(255, Math.floor(part * 256));
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = data.colors[3 * color + c];
    pixels.data[4 * i + 3] = 255;
  }
  pen.putImageData(pixels, 0, 0);
}

// Patches that do not tile the picture leave a rim, which the outermost ones fill.
function cover(canvas, view, low, high) {
  const [y, x, down, right] = view.lattice, off = Math.max(Math.abs(y - down / 2), Math.abs(x - right / 2));
  const margin = off > 1e-6 ? 1 : 0;
  paint(canvas, view, low, high, margin);
  lay(canvas, view.lattice, [-margin, -margin], [view.h + 2 * margin, view.w + 2 * margin]);
}

const number = (value) => (value === 0 ? "0" : Math.abs(value) >= 0.001 ? value.toPrecision(3) : value.toExponential(1));
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const span = (view) => [view.low ?? Math.min(0, ...view.values), view.high ?? Math.max(...view.values)];

function queryName(query, layer) {
  if (query.kind === "mean") return "all patches, mean";
  if (query.kind === "token") return data.prefix_names[query.index] ?? `token ${query.index}`;
  const [y, x] = patchAt(layer, query);
  return `patch row ${y + 1}, column ${x + 1}`;
}

async function draw() {
  const job = ++state.job, layer = data.layers[state.layer], query = fitting(layer, state.hover ?? state.query);
  controls(layer, query);
  const view = await viewOf(state.method, state.layer, state.head, query, job);
  if (!view || job !== state.job) return;
  const [low, high] = state.held ?? span(view);
  state.view = { ...view, low, high };
  cover(element("heat"), view, low, high);
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
  lay(marker, layer.lattice, patchAt(layer, query), [1, 1]);
}

// Put an element over some patches: the one at a row and column, and those right of it and below.
function lay(over, [y, x, down, right], [row, column], [rows, columns]) {
  const share = (part) => `${100 * part}%`;
  Object.assign(over.style, { top: share(y + (row - 0.5) * down), left: share(x + (column - 0.5) * right),
    height: share(rows * down), width: share(columns * right) });
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
  const box = element("stage").getBoundingClientRect();
  return { kind: "patch", x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
}

// Patches are remembered by their center, so that one patch is one question.
function centered(query, layer) {
  const [y, x, down, right] = layer.lattice, [row, column] = patchAt(layer, query);
  return { kind: "patch", y: y + row * down, x: x + column * right };
}

function movePatch(dy, dx) {
  if (!usesQuery()) return;
  const layer = data.layers[state.layer], [, , down, right] = layer.lattice;
  const now = state.query.kind === "patch" ? state.query : { y: 0.5 - dy * down, x: 0.5 - dx * right };
  set({ hover: null, query: centered({ y: now.y + dy * down, x: now.x + dx * right }, layer) });
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
