"use strict";
// A list of masks, three planes and a surface of the chosen one, and what a person says about it.
const $ = (id) => document.getElementById(id);
const { title, notes, rows, classes, voxels } = JSON.parse($("data").textContent); // voxels: of each value in a mask
const RGB = voxels.map(({ color }) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16)));
const PLANES = ["sagittal", "coronal", "axial"]; // by the axis that they cut
const ACROSS = [[1, 2], [0, 2], [0, 1]]; // their horizontal and vertical axis; the volume is in RAS+
const ENDS = ["LR", "PA", "IS"];
// Radiological: seen from the feet and from the front, the patient's right at the screen's left. The sagittal plane is seen
// from the patient's left in both conventions, as in ITK-SNAP and 3D Slicer.
const radiological = () => $("radiological").checked;
const mirrored = (axis) => ACROSS[axis][0] === 1 || radiological(); // its horizontal axis runs to the screen's left
const columnOf = (axis, n, size) => (mirrored(axis) ? size - 1 - n : n); // of a voxel; and the other way round
const planes = [...document.querySelectorAll("[data-axis]")], axisOf = (canvas) => Number(canvas.dataset.axis);
const judgements = new Map(); // mask -> {judgement, comment}
let chosen = -1, volume = null, cursor = [0, 0, 0], lastAxis = 2, range = [0, 1], listed = [];
let zoom = 1, focus = cursor; // what is in the middle of zoomed planes

// ---- what is stored: one entry per mask (its name and voxels), so that a page that is made again finds it

const keyOf = (row) => `medseg-review:${row.id}`;
let stored = true;
function readJudgements() {
  for (const row of rows) try {
    const { judgement, comment } = JSON.parse(localStorage.getItem(keyOf(row)) || "{}");
    if (judgement || comment) judgements.set(row, { judgement: String(judgement || ""), comment: String(comment || "") });
  } catch { stored = false; }
}

function judge(row, change) {
  const entry = { judgement: "", comment: "", ...judgements.get(row), ...change };
  const empty = !entry.judgement && !entry.comment;
  if (empty) judgements.delete(row); else judgements.set(row, entry);
  try {
    if (empty) localStorage.removeItem(keyOf(row)); else localStorage.setItem(keyOf(row), JSON.stringify(entry));
  } catch { stored = false; }
  showJudgement();
}

// ---- small helpers

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}
const fixed = (value) => (value === null ? "–" : value.toFixed(2));
const short = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

async function unpack(number) {
  const text = atob($(`volume${number}`).textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const { shape, spacing, reference, levels } = rows[number], size = shape[0] * shape[1] * shape[2];
  const part = (i) => bytes.subarray(i * size, (i + 1) * size);
  return { number, shape, spacing, levels, image: part(0), mask: part(1), reference: reference ? part(2) : null };
}

// ---- one plane

function slice(v, voxels, axis, index) {
  const [h, w] = [ACROSS[axis][1], ACROSS[axis][0]], strides = [1, v.shape[0], v.shape[0] * v.shape[1]];
  const out = new Uint8Array(v.shape[w] * v.shape[h]);
  for (let y = 0, o = 0; y < v.shape[h]; y++) {
    let i = index * strides[axis] + (v.shape[h] - 1 - y) * strides[h]; // the first row is at the top
    for (let x = 0; x < v.shape[w]; x++) out[o++] = voxels[i + columnOf(axis, x, v.shape[w]) * strides[w]];
  }
  return out;
}

function bitmap(voxels, width, height, colors) { // colors: of each value, as 0xAABBGGRR
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
  const picture = context.createImageData(width, height), pixels = new Uint32Array(picture.data.buffer);
  voxels.forEach((value, i) => { pixels[i] = colors[value]; });
  context.putImageData(picture, 0, 0);
  return canvas;
}
const asPixel = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
const MASK_COLORS = [0, ...RGB.map(asPixel)];

// Lines along the voxels' edges, so that an outline is where the mask ends.
function outline(context, labels, width, height, place, colorOf) {
  const at = (x, y) => (x >= 0 && y >= 0 && x < width && y < height ? labels[y * width + x] : 0);
  const [across, down] = [place.width / width, place.height / height], paths = new Map();
  const edge = (value, x, y, dx, dy) => {
    if (!value) return;
    if (!paths.has(value)) paths.set(value, new Path2D());
    paths.get(value).moveTo(place.left + x * across, place.top + y * down);
    paths.get(value).lineTo(place.left + (x + dx) * across, place.top + (y + dy) * down);
  };
  for (let y = 0; y <= height; y++) for (let x = 0; x <= width; x++) {
    const here = at(x, y), left = at(x - 1, y), above = at(x, y - 1);
    if (here !== left) edge(here, x, y, 0, 1), edge(left, x, y, 0, 1);
    if (here !== above) edge(here, x, y, 1, 0), edge(above, x, y, 1, 0);
  }
  for (const [value, path] of paths) context.strokeStyle = colorOf(value), context.stroke(path);
}

function placeOf(canvas, v, axis, zoom) { // where a plane is drawn; if it is zoomed, the focus is in the middle
  const [w, h] = ACROSS[axis], mm = [v.shape[w] * v.spacing[w], v.shape[h] * v.spacing[h]];
  const scale = zoom * Math.min(canvas.width / mm[0], canvas.height / mm[1]), width = mm[0] * scale, height = mm[1] * scale;
  const column = columnOf(axis, focus[w], v.shape[w]);
  const [x, y] = zoom > 1 ? [(column + 0.5) / v.shape[w], 1 - (focus[h] + 0.5) / v.shape[h]] : [0.5, 0.5];
  return { left: canvas.width / 2 - x * width, top: canvas.height / 2 - y * height, width, height };
}

function drawPlane(canvas, v, axis, index, style) {
  const context = canvas.getContext("2d"), [w, h] = ACROSS[axis].map((a) => v.shape[a]);
  const place = placeOf(canvas, v, axis, style.zoom), box = [place.left, place.top, place.width, place.height];
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (v.levels) {
    const [low, high] = style.range, grey = (level) => clamp(255 * (level - low) / (high - low || 1), 0, 255);
    const colors = v.levels.map((level) => asPixel([grey(level), grey(level), grey(level)]));
    context.imageSmoothingEnabled = true;
    context.drawImage(bitmap(slice(v, v.image, axis, index), w, h, colors), ...box);
  }
  const labels = slice(v, v.mask, axis, index);
  context.lineWidth = style.line;
  if (style.mask) {
    context.imageSmoothingEnabled = false;
    context.globalAlpha = style.opacity;
    context.drawImage(bitmap(labels, w, h, MASK_COLORS), ...box);
    context.globalAlpha = 1;
    if (style.outline) outline(context, labels, w, h, place, (value) => `rgb(${RGB[value - 1]})`);
  }
  if (v.reference && style.reference) outline(context, slice(v, v.reference, axis, index), w, h, place, () => "#fff");
  return place;
}

function drawLetters(canvas, axis, scale) { // at the ends of both axes
  const context = canvas.getContext("2d"), [w, h] = ACROSS[axis], { width, height } = canvas, edge = 10 * scale;
  Object.assign(context, { fillStyle: "#e7ebf0", strokeStyle: "#000", lineWidth: 3, textAlign: "center", textBaseline: "middle" });
  context.font = `${12 * scale}px system-ui, sans-serif`;
  const places = [[edge, height / 2], [width - edge, height / 2], [width / 2, height - edge], [width / 2, edge]];
  const letters = [...(mirrored(axis) ? [...ENDS[w]].reverse() : ENDS[w]), ...ENDS[h]];
  for (const draw of ["strokeText", "fillText"]) letters.forEach((letter, i) => context[draw](letter, ...places[i]));
}

const style = () => ({
  range, zoom, opacity: Number($("opacity").value), outline: $("outline").checked, mask: $("mask").checked,
  reference: $("reference").checked, line: 1.5 * devicePixelRatio,
});

function fit(canvas) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((n) => Math.round(n * devicePixelRatio));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
}

function drawPlanes() {
  if (!volume) return;
  for (const canvas of planes) {
    fit(canvas);
    const axis = axisOf(canvas), [w, h] = ACROSS[axis];
    const place = drawPlane(canvas, volume, axis, cursor[axis], style());
    const context = canvas.getContext("2d"), size = volume.shape;
    const x = Math.round(place.left + (columnOf(axis, cursor[w], size[w]) + 0.5) * place.width / size[w]) + 0.5;
    const y = Math.round(place.top + (size[h] - cursor[h] - 0.5) * place.height / size[h]) + 0.5;
    Object.assign(context, { strokeStyle: "rgba(108, 178, 245, 0.45)", lineWidth: 1 }).beginPath();
    context.moveTo(x, place.top), context.lineTo(x, place.top + place.height);
    context.moveTo(place.left, y), context.lineTo(place.left + place.width, y);
    context.stroke();
    drawLetters(canvas, axis, devicePixelRatio);
    canvas.nextElementSibling.textContent = `${PLANES[axis]} ${cursor[axis] + 1} / ${size[axis]}`;
  }
  const here = cursor[0] + volume.shape[0] * (cursor[1] + volume.shape[1] * cursor[2]), label = volume.mask[here];
  const value = volume.levels ? `\nvalue ${short(volume.levels[volume.image[here]])}` : "";
  planes[0].nextElementSibling.textContent += value + (label ? `\n${voxels[label - 1].name}` : "");
}

// ---- the surface: a quad between each voxel of the mask and each neighbour outside, smoothed within half a voxel
// (constrained surface nets, Gibson 1998)

function surfaceOf(v) {
  let step = 1;
  while (v.mask.length / step ** 3 > 1.5e6) step++;
  const [X, Y, Z] = v.shape.map((n) => Math.ceil(n / step)), W = X + 2, H = Y + 2; // a border of background
  const grid = new Uint8Array(W * H * (Z + 2)), strides = [1, W, W * H];
  for (let z = 0; z < Z; z++) for (let y = 0; y < Y; y++) for (let x = 0; x < X; x++)
    grid[x + 1 + W * (y + 1 + H * (z + 1))] = v.mask[step * (x + v.shape[0] * (y + v.shape[1] * z))];
  const ids = new Int32Array(grid.length).fill(-1), base = [], quads = [], colors = [];
  const corner = (i) => { // the corner that voxel i shares with the voxels before it
    if (ids[i] < 0) ids[i] = base.push(i % W, Math.floor(i / W) % H, Math.floor(i / strides[2])) / 3 - 1;
    return ids[i];
  };
  for (let i = strides[2]; i < grid.length; i++) for (let axis = 0; axis < 3; axis++) {
    const one = grid[i - strides[axis]], two = grid[i];
    if (!one === !two) continue;
    const a = strides[(axis + 1) % 3], b = strides[(axis + 2) % 3];
    const quad = [i, i + a, i + a + b, i + b].map(corner);
    quads.push(...(two ? [quad[0], quad[3], quad[2], quad[1]] : quad));
    colors.push((one || two) - 1);
  }
  const start = Float32Array.from(base), sums = new Float32Array(start.length), counts = new Uint8Array(start.length / 3);
  let points = start.slice();
  for (let round = 0; round < 12; round++) {
    sums.fill(0), counts.fill(0);
    for (let q = 0; q < quads.length; q++) { // on a closed surface each edge comes once in each direction
      const from = quads[q], to = quads[q % 4 === 3 ? q - 3 : q + 1];
      for (let k = 0; k < 3; k++) sums[3 * from + k] += points[3 * to + k];
      counts[from]++;
    }
    points = points.map((value, i) => {
      const mean = sums[i] / counts[(i - i % 3) / 3];
      return clamp(value + 0.6 * (mean - value), start[i] - 0.6, start[i] + 0.6);
    });
  }
  const mm = points.map((value, i) => value * v.spacing[i % 3] * step), normals = new Float32Array(mm.length);
  const minus = (a, b) => [0, 1, 2].map((k) => mm[3 * a + k] - mm[3 * b + k]);
  for (let q = 0; q < quads.length; q += 4) {
    const [u, w] = [minus(quads[q + 2], quads[q]), minus(quads[q + 3], quads[q + 1])];
    const normal = [u[1] * w[2] - u[2] * w[1], u[2] * w[0] - u[0] * w[2], u[0] * w[1] - u[1] * w[0]];
    for (let k = 0; k < 12; k++) normals[3 * quads[q + Math.floor(k / 3)] + k % 3] += normal[k % 3];
  }
  const low = [Infinity, Infinity, Infinity], high = low.map((n) => -n);
  mm.forEach((value, i) => { low[i % 3] = Math.min(low[i % 3], value), high[i % 3] = Math.max(high[i % 3], value); });
  const middle = low.map((n, k) => (n + high[k]) / 2), reach = Math.hypot(...high.map((n, k) => n - middle[k])) || 1;
  const vertices = new Float32Array(quads.length / 4 * 6 * 9);
  let o = 0;
  for (let q = 0; q < quads.length; q += 4) for (const k of [0, 1, 2, 0, 2, 3]) {
    const p = 3 * quads[q + k], color = RGB[colors[q / 4]];
    for (let d = 0; d < 3; d++) vertices[o++] = (mm[p + d] - middle[d]) / reach;
    for (let d = 0; d < 3; d++) vertices[o++] = normals[p + d];
    for (let d = 0; d < 3; d++) vertices[o++] = color[d] / 255;
  }
  return vertices;
}

const view = { turn: 0.6, tilt: 0.35, zoom: 1, count: 0, gl: null };
const surfaceCaption = $("surface").nextElementSibling;
const surfaceEnds = ["left", "right", "bottom", "top"].map((side) => make("b", "", side)); // letters
function startSurface() {
  const gl = $("surface").getContext("webgl", { preserveDrawingBuffer: true });
  if (!gl) return void (surfaceCaption.textContent = "The 3-D view needs WebGL, which this browser does not have.");
  const program = gl.createProgram();
  const shader = (type, source) => {
    const one = gl.createShader(type);
    gl.shaderSource(one, source), gl.compileShader(one), gl.attachShader(program, one);
  };
  shader(gl.VERTEX_SHADER, `attribute vec3 place, normal, color; uniform mat3 turn; uniform vec2 scale;
    varying vec3 n, c; void main() { vec3 p = turn * place; n = turn * normalize(normal); c = color;
    gl_Position = vec4(p.xy * scale, -p.z * 0.5, 1.0); }`);
  shader(gl.FRAGMENT_SHADER, `precision mediump float; varying vec3 n, c; void main() {
    float light = max(dot(normalize(n), normalize(vec3(0.4, 0.5, 0.8))), 0.0);
    gl_FragColor = vec4(c * (0.25 + 0.75 * light), 1.0); }`);
  gl.linkProgram(program), gl.useProgram(program), gl.enable(gl.DEPTH_TEST);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  ["place", "normal", "color"].forEach((name, i) => {
    const where = gl.getAttribLocation(program, name);
    gl.enableVertexAttribArray(where), gl.vertexAttribPointer(where, 3, gl.FLOAT, false, 36, 12 * i);
  });
  $("surface").parentElement.append(...surfaceEnds);
  Object.assign(view, { gl, turnAt: gl.getUniformLocation(program, "turn"), scaleAt: gl.getUniformLocation(program, "scale") });
}

function drawSurface() {
  const { gl, tilt, zoom } = view, canvas = $("surface");
  const turn = view.turn + (radiological() ? Math.PI : 0); // turned to the other side: a mirrored body would be wrong
  if (!gl) return;
  fit(canvas);
  const [c, s, ct, st] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)];
  const smaller = Math.min(canvas.width, canvas.height) * 0.95 * zoom;
  gl.viewport(0, 0, canvas.width, canvas.height);
  gl.clearColor(0, 0, 0, 1), gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  // by column; without turn and tilt as the coronal plane, z up: from behind with x to the right, from the front to the left
  gl.uniformMatrix3fv(view.turnAt, false, [c, s * st, -s * ct, -s, c * st, -c * ct, 0, ct, st]);
  gl.uniform2f(view.scaleAt, smaller / canvas.width, smaller / canvas.height);
  gl.drawArrays(gl.TRIANGLES, 0, view.count);
  const [right, up] = [[c, -s, 0], [s * st, c * st, ct]], opposite = (direction) => direction.map((n) => -n);
  [opposite(right), right, opposite(up), up].forEach((direction, i) => { surfaceEnds[i].textContent = lettersOf(direction); });
}

function lettersOf(direction) { // the letters of the axes within 70 degrees of a direction, the nearest first
  const size = (axis) => Math.abs(direction[axis]), near = [0, 1, 2].filter((axis) => size(axis) > 0.34);
  return near.sort((a, b) => size(b) - size(a)).map((axis) => ENDS[axis][direction[axis] > 0 ? 1 : 0]).join("");
}

function showSurface() {
  if (!view.gl) return;
  const vertices = surfaceOf(volume);
  view.count = vertices.length / 9;
  view.gl.bufferData(view.gl.ARRAY_BUFFER, vertices, view.gl.STATIC_DRAW);
  surfaceCaption.textContent = view.count ? "surface of the mask" : "The mask is empty.";
  drawSurface();
}

// ---- the list and the chosen mask

function expected({ quality: { mean, interval } }) {
  return mean === null ? "" : `${fixed(mean)}${interval ? ` (${interval.map(fixed).join("–")})` : ""}`;
}
const factsOf = ({ quality, warnings, empty }) => [...(empty ? ["The mask is empty."] : []), ...quality.reasons, ...warnings];

function makeList() {
  const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting) seen.unobserve(entry.target), thumbnails.push(entry.target), drawThumbnails();
  }));
  rows.forEach((row, number) => {
    const item = make("li"), text = make("div"), picture = make("canvas");
    Object.assign(picture, { width: 128, height: 128 });
    item.dataset.number = number;
    const { quality: { verdict }, mean } = row, line = make("span");
    line.append(make("em", verdict || "", verdict || ""), ` ${expected(row) || `${short(row.total)} ml`}`);
    const more = [...(mean === null ? [] : [`Dice ${fixed(mean)}`]), ...factsOf(row)];
    text.append(make("b", row.name), line, make("small", more.join(" · ")), make("span", "", "mark"));
    text.title = [row.name, ...factsOf(row)].join("\n");
    item.append(picture, text);
    item.addEventListener("click", () => choose(number));
    $("list").append(item);
    seen.observe(item);
  });
}

const thumbnails = [], drawn = new Set();
let drawing = false;
async function drawThumbnails() { // one after the other, the last seen first
  if (drawing) return;
  drawing = true;
  while (thumbnails.length) {
    const item = thumbnails.pop(), v = await unpack(Number(item.dataset.number));
    const settings = { range: rows[v.number].window, zoom: 1, opacity: 0.5, outline: false, mask: true, reference: false };
    drawPlane(item.firstChild, v, 2, busiest(v)[2], settings);
    drawLetters(item.firstChild, 2, 1.6);
    drawn.add(item);
  }
  drawing = false;
}

function busiest(v) { // per axis the slice with most of the mask, or else of the label map, or the middle
  const counts = v.shape.map((n) => new Uint32Array(n)), [X, Y] = v.shape;
  const count = (voxels) => voxels.forEach((label, i) => {
    if (label) counts[0][i % X]++, counts[1][Math.floor(i / X) % Y]++, counts[2][Math.floor(i / X / Y)]++;
  });
  count(v.mask);
  if (v.reference && !counts[0].some(Boolean)) count(v.reference);
  return counts.map((c) => { const most = Math.max(...c); return most ? c.indexOf(most) : Math.floor(c.length / 2); });
}

async function choose(number) {
  if (number < 0 || number >= rows.length) return;
  chosen = number;
  showFacts(rows[number]);
  showJudgement();
  $("list").children[number].scrollIntoView({ block: "nearest" });
  const v = await unpack(number).catch(({ message }) =>
    void $("facts").prepend(make("li", `This browser cannot show the images (${message}). Use a current one.`)));
  if (!v || chosen !== number) return; // another was chosen meanwhile
  [volume, zoom, cursor] = [v, 1, busiest(v)];
  resetWindow();
  document.body.dataset.shown = number;
  setTimeout(() => { if (volume === v) showSurface(); }); // after the planes are on the screen
}

function showFacts(row) {
  const { name, quality, mean, notes: remarks } = row, predicted = quality.dice.some((n) => n !== null);
  $("name").textContent = name;
  $("verdict").replaceChildren(make("em", quality.verdict || "no verdict", quality.verdict || ""),
    ...(expected(row) ? [make("br"), `predicted Dice ${expected(row)}`] : []),
    ...(mean === null ? [] : [make("br"), `Dice against the reference ${fixed(mean)}`]));
  $("facts").replaceChildren(...factsOf(row).map((text) => make("li", text)), ...remarks.map((text) => make("li", text, "note")));
  const columns = [["ml", row.volumes.map(short)]];
  if (predicted) columns.push(["predicted", quality.dice.map(fixed)]);
  if (mean !== null) columns.push(["Dice", row.dice.map(fixed)]);
  const head = make("tr");
  head.append(make("th", "class"), ...columns.map(([text]) => make("th", text)));
  $("classes").replaceChildren(head, ...classes.map((one, i) => {
    const line = make("tr"), first = make("td"), swatch = make("span", "", "swatch");
    swatch.style.background = one.color;
    first.append(swatch, one.name);
    line.append(first, ...columns.map(([, cells]) => make("td", cells[i])));
    return line;
  }));
  $("reference").parentElement.hidden = !row.reference;
}

function showJudgement() {
  let done = 0;
  const filter = $("filter").value, search = $("search").value.toLowerCase();
  listed = [];
  rows.forEach((row, number) => {
    const { judgement = "", comment = "" } = judgements.get(row) || {}, item = $("list").children[number];
    if (judgement) done++;
    item.querySelector(".mark").textContent = (judgement ? `✓ ${judgement}` : "") + (comment ? " ✎" : "");
    item.setAttribute("aria-current", number === chosen);
    const fits = { "": true, todo: !judgement }[filter] ?? judgement === filter;
    item.hidden = !(fits && row.name.toLowerCase().includes(search)) && number !== chosen;
    if (!item.hidden) listed.push(number);
  });
  $("progress").textContent = `${done} of ${rows.length} judged` +
    (stored ? "" : " · this browser cannot store judgements: export them before you close the page");
  const { judgement = "", comment = "" } = judgements.get(rows[chosen]) || {};
  document.querySelectorAll("[data-judgement]").forEach((button) =>
    button.setAttribute("aria-pressed", button.dataset.judgement === judgement));
  if (document.activeElement !== $("comment")) $("comment").value = comment;
}

function move(by) {
  const place = listed.indexOf(chosen) + by;
  if (place >= 0 && place < listed.length) $("comment").blur(), choose(listed[place]);
}

// ---- export

function download(name, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// As medseg's own tables: a text that a spreadsheet would run as a formula gets an apostrophe in front.
function cell(value) {
  const text = value === null ? "" : String(value);
  const formula = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
  return /[",\r\n]/.test(formula) ? `"${formula.replaceAll('"', '""')}"` : formula;
}

function judgementsCsv() {
  const head = ["name", "judgement", "comment", "verdict", "predicted_dice", "dice", ...classes.map(({ name }) => `volume_ml ${name}`)];
  const lines = rows.map((row) => {
    const { judgement = "", comment = "" } = judgements.get(row) || {};
    return [row.name, judgement, comment, row.quality.verdict, row.quality.mean, row.mean, ...row.volumes];
  });
  return [head, ...lines].map((line) => line.map(cell).join(",") + "\r\n").join("");
}

function caseList() {
  const names = (judgement) => rows.filter((row) => (judgements.get(row) || {}).judgement === judgement).map(({ name }) => name);
  const listable = (name) => name.trim() === name && !/(^|\s)#|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/.test(name) && !/\p{Surrogate}/u.test(name);
  const [good, correct] = [names("good"), names("needs correction")], odd = [...good, ...correct].filter((name) => !listable(name));
  const lines = [`# medseg review: ${good.length} masks judged good`, ...good.filter(listable)];
  if (correct.length) lines.push("# Correct the masks of these before you train, or delete the lines:", ...correct.filter(listable));
  lines.push(...odd.map((name) => `# A case list cannot hold this name, rename the scan: ${JSON.stringify(name)}`));
  return lines.join("\n") + "\n";
}

// ---- what a person does

function setWindow(level, width) {
  const half = Math.max(width, Number($("width").max) / 500) / 2;
  range = [level - half, level + half];
  [$("level").value, $("width").value] = [level, 2 * half];
  drawPlanes();
}
function resetWindow() {
  const levels = volume.levels || [0, 1], [low, high] = [levels[0], levels[levels.length - 1]], { window: [black, white] } = rows[chosen];
  Object.assign($("level"), { min: low, max: high });
  Object.assign($("width"), { min: 0, max: (high - low) * 1.5 });
  setWindow((black + white) / 2, white - black);
}
function scroll(axis, by) {
  lastAxis = axis;
  if (volume) cursor[axis] = clamp(cursor[axis] + by, 0, volume.shape[axis] - 1);
  drawPlanes();
}
function magnify(by) {
  [zoom, focus] = [clamp(zoom * by, 1, 16), [...cursor]];
  drawPlanes();
}

function listen() {
  for (const canvas of planes) {
    const axis = axisOf(canvas), [w, h] = ACROSS[axis];
    let wheel = 0;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      wheel += event.deltaMode ? event.deltaY * 40 : event.deltaY;
      const steps = -clamp(Math.trunc(wheel / 40), -3, 3);
      if (!steps) return;
      wheel = 0;
      if (event.ctrlKey) magnify(1.1 ** steps); else scroll(axis, steps);
    }, { passive: false });
    const drag = (event) => {
      if (!volume || !event.buttons) return;
      lastAxis = axis;
      if (event.buttons & 2 || event.shiftKey) {
        const pixel = event.type === "pointermove" ? Number($("width").max) / 800 : 0;
        setWindow((range[0] + range[1]) / 2 - event.movementY * pixel, range[1] - range[0] + event.movementX * pixel);
        return;
      }
      const place = placeOf(canvas, volume, axis, zoom), x = event.offsetX * devicePixelRatio, y = event.offsetY * devicePixelRatio;
      const column = clamp(Math.floor((x - place.left) / place.width * volume.shape[w]), 0, volume.shape[w] - 1);
      cursor[w] = columnOf(axis, column, volume.shape[w]);
      cursor[h] = clamp(Math.floor((1 - (y - place.top) / place.height) * volume.shape[h]), 0, volume.shape[h] - 1);
      drawPlanes();
    };
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId), drag(event); });
    canvas.addEventListener("pointermove", drag);
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  }
  const surface = $("surface");
  surface.addEventListener("pointerdown", (event) => surface.setPointerCapture(event.pointerId));
  surface.addEventListener("pointermove", ({ buttons, movementX, movementY }) => {
    if (buttons) view.turn += movementX / 120, view.tilt = clamp(view.tilt + movementY / 120, -1.57, 1.57), drawSurface();
  });
  surface.addEventListener("wheel", (event) => {
    event.preventDefault();
    view.zoom = clamp(view.zoom * Math.exp(-event.deltaY / 600), 0.4, 8), drawSurface();
  }, { passive: false });
  for (const id of ["opacity", "outline", "mask", "reference"]) $(id).addEventListener("input", drawPlanes);
  $("radiological").addEventListener("input", () => {
    drawPlanes(), drawSurface();
    thumbnails.push(...drawn), drawThumbnails();
  });
  for (const id of ["level", "width"]) $(id).addEventListener("input", () => setWindow(Number($("level").value), Number($("width").value)));
  $("reset").addEventListener("click", resetWindow);
  for (const id of ["search", "filter"]) $(id).addEventListener("input", showJudgement);
  $("comment").addEventListener("input", () => judge(rows[chosen], { comment: $("comment").value }));
  document.querySelectorAll("[data-judgement]").forEach((button) => button.addEventListener("click", () => {
    const { judgement } = button.dataset, now = (judgements.get(rows[chosen]) || {}).judgement;
    judge(rows[chosen], { judgement: now === judgement ? "" : judgement });
  }));
  $("save-csv").addEventListener("click", () => download("judgements.csv", judgementsCsv()));
  $("save-cases").addEventListener("click", () => download("cases.txt", caseList()));
  document.addEventListener("keydown", press);
  new ResizeObserver(() => { drawPlanes(), drawSurface(); }).observe($("views"));
}

function press(event) {
  const { key, target } = event, typing = target.matches("textarea, [type=search]");
  if (event.ctrlKey || event.metaKey || event.altKey || chosen < 0) return;
  if (typing) return void (key === "Escape" && target.blur());
  const judged = { 1: "good", 2: "needs correction", 3: "unusable", 0: "" };
  const moves = { j: 1, ArrowDown: 1, PageDown: 1, k: -1, ArrowUp: -1, PageUp: -1 }, across = { ArrowLeft: -1, ArrowRight: 1 };
  const toggles = { m: "mask", r: "reference", o: "outline" }, zooms = { "+": 1.25, "-": 0.8 };
  if (target.matches("select, [type=range]") && key.startsWith("Arrow")) return;
  if (key in moves) move(moves[key]);
  else if (key in across) scroll(lastAxis, across[key]);
  else if (key in judged) judge(rows[chosen], { judgement: judged[key] });
  else if (key in toggles) $(toggles[key]).click();
  else if (key in zooms) magnify(zooms[key]);
  else if (key === "c") $("comment").focus();
  else return;
  event.preventDefault();
}

$("title").textContent = title;
document.title = `${title || "masks"} · medseg review`;
Object.assign($("notes"), { hidden: !notes.length, open: notes.length < 3 });
$("notes").firstChild.textContent = "Notes";
$("notes").lastElementChild.append(...notes.map((text) => make("li", text)));
readJudgements();
makeList();
listen();
startSurface();
choose(0);
