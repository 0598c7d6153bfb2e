"use strict";
// The page's theme, and the display of events: stored pixels, drawn from their numbers at any magnification.

const NIGHT = [16, 20, 26], CLASS_NAMES = ["background", "cosmic", "neutrino"];
const LAYERS = {
  charge: [],
  truth: [["background", [107, 116, 128]], ["cosmic", [63, 167, 255]], ["neutrino", [255, 176, 0]]],
  prediction: [["background", [107, 116, 128]], ["cosmic", [63, 167, 255]], ["neutrino", [255, 176, 0]]],
  errors: [["right, background", [46, 53, 62]], ["right, labelled", [112, 124, 138]],
    ["missed (called background)", [255, 92, 92]], ["false (of background)", [208, 120, 255]],
    ["cosmic called neutrino", [255, 214, 64]], ["neutrino called cosmic", [64, 224, 208]]],
};
// Colours of charge, from faint to bright, evenly in its logarithm.
const HEAT = [[94, 40, 150], [150, 45, 150], [200, 64, 120], [236, 104, 84], [252, 157, 58], [245, 214, 60], [252, 255, 164]];
const FAINT = 5, BRIGHT = 300, MARGIN = { left: 62, bottom: 40, top: 8, right: 10 };

function theme() {
  const root = document.documentElement, button = document.getElementById("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const show = () => {
    root.dataset.theme = chosen || (dark.matches ? "dark" : "light");
    button.textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
  };
  button.onclick = () => { chosen = root.dataset.theme === "dark" ? "light" : "dark"; show(); };
  dark.addEventListener("change", show);
  show();
}

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new DataView(await new Response(stream).arrayBuffer());
}

// A plane's pixels: row after row, the columns, charges, and truth + 4 * prediction of its stored pixels.
async function readPlane(about, rows) {
  const data = await unpacked(about.data), count = about.pixels;
  const plane = { count, row: new Uint16Array(count), column: new Uint16Array(count), charge: new Float32Array(count),
    truth: new Uint8Array(count), prediction: new Uint8Array(count), order: {}, start: new Uint32Array(rows + 1) };
  let k = 0;
  for (let r = 0; r < rows; r++) {
    plane.start[r] = k;
    for (let n = data.getUint16(2 * r, true); n > 0; n--) plane.row[k++] = r;
  }
  plane.start[rows] = k;
  const columns = 2 * rows, charges = columns + 2 * count, codes = charges + 2 * count;
  for (let i = 0; i < count; i++) {
    plane.column[i] = data.getUint16(columns + 2 * i, true);
    plane.charge[i] = data.getUint16(charges + 2 * i, true) * about.unit;
    const code = data.getUint8(codes + i);
    plane.truth[i] = code & 3;
    plane.prediction[i] = code >> 2;
  }
  return plane;
}

function kindOf(plane, layer, i) {
  const truth = plane.truth[i], said = plane.prediction[i];
  if (layer === "truth") return truth;
  if (layer === "prediction") return said;
  if (truth === said) return truth ? 1 : 0;
  if (said === 0) return 2;
  if (truth === 0) return 3;
  return truth === 1 ? 4 : 5;
}

function heat(charge) {
  const level = Math.log(Math.min(Math.max(charge, FAINT), BRIGHT) / FAINT) / Math.log(BRIGHT / FAINT) * (HEAT.length - 1);
  const low = Math.min(Math.floor(level), HEAT.length - 2), part = level - low;
  return HEAT[low].map((x, k) => Math.round(x + part * (HEAT[low + 1][k] - x)));
}

const packedColour = ([r, g, b]) => (255 << 24 | b << 16 | g << 8 | r) >>> 0;

// What is drawn later lies above: bright over faint, and the more telling over the rest.
function ordered(plane, layer) {
  if (plane.order[layer]) return plane.order[layer];
  const key = layer === "charge" ? i => plane.charge[i] : i => kindOf(plane, layer, i);
  const keys = Float32Array.from({ length: plane.count }, (_, i) => key(i));
  const index = Uint32Array.from({ length: plane.count }, (_, i) => i).sort((a, b) => keys[a] - keys[b]);
  const fixed = LAYERS[layer].map(([, colour]) => packedColour(colour));
  const colours = Uint32Array.from(index, i => layer === "charge" ? packedColour(heat(plane.charge[i])) : fixed[keys[i]]);
  const counts = LAYERS[layer].map((_, kind) => keys.reduce((n, x) => n + (x === kind), 0));
  return plane.order[layer] = { index, colours, counts };
}

// Axes: pieces of the image in which a value runs evenly, as [from, to, value at from, value per pixel], and how a
// value is told in a sentence.
function axesOf(about, planeNumber, unit) {
  const { rows, columns, geometry } = about;
  const across = (name, first, each, say) => ({ name, say, pieces: [[0, columns, first, each]] });
  const down = (name, pieces, say) => ({ name, say, pieces });
  if (unit === "pixel") {
    return [across("column", 0, 1, v => `column ${v}`), down("row", [[0, rows, 0, 1]], v => `row ${v}`)];
  }
  const { offsets, wire_pitch: pitch, row_pitch: depth, ticks } = geometry, half = rows / 2, offset = offsets[planeNumber];
  if (unit === "wire") {
    const pieces = [[0, half, 0, ticks], [half, rows, half * ticks, -ticks]];
    return [across("wire", -offset, 1, v => `wire ${v}`),
      down("drift, ticks from the wires", pieces, v => `${v} ticks from the wires`)];
  }
  const cm = v => `${v.toFixed(1)} cm`, place = planeNumber === 2 ? v => `z ${cm(v)}` : v => `${cm(v)} across the wires`;
  return [across(planeNumber === 2 ? "z, cm" : "across the wires, cm", -offset * pitch, pitch, place),
    down("x, cm", [[0, rows, -half * depth, depth]], v => `x ${cm(v)}`)];
}

function valueAt(axis, place) {
  const piece = axis.pieces.find(([from, to]) => place >= from && place < to) || axis.pieces[0];
  return piece[2] + (place - piece[0]) * piece[3];
}

function ticksOf(axis, low, high, pixels, apart) {
  const out = [];
  for (const [from, to, value, each] of axis.pieces) {
    const a = Math.max(from, low), b = Math.min(to, high);
    if (b <= a) continue;
    const rough = Math.abs(each) * (high - low) * apart / pixels, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
    const ends = [value + (a - from) * each, value + (b - from) * each].sort((x, y) => x - y);
    for (let n = Math.ceil(ends[0] / step - 1e-9); n * step <= ends[1] + 1e-9 * step; n++) {
      out.push([from + (n * step - value) / each, String(Number((n * step).toPrecision(6)))]);
    }
  }
  return out;
}

class Viewer {
  constructor(events) {
    this.events = events;
    this.cache = new Map();
    this.canvas = document.getElementById("view");
    this.state = { event: 0, plane: 2, layer: "errors", unit: events[0].geometry ? "cm" : "pixel" };
    this.home = true;
    this.fingers = new Map();
    this.bind();
    this.show();
  }

  get about() { return this.events[this.state.event]; }

  async show() {
    const { event, plane, layer, unit } = this.state, key = `${event} ${plane}`;
    for (const [name, value] of Object.entries({ event, plane, layer, unit })) {
      for (const button of document.querySelectorAll(`button[data-${name}]`)) {
        button.setAttribute("aria-pressed", String(button.dataset[name] === String(value)));
      }
    }
    document.getElementById("caption").textContent = this.about.caption;
    if (!this.cache.has(key)) this.cache.set(key, readPlane(this.about.planes[plane], this.about.rows));
    const found = await this.cache.get(key);
    if (this.state.event !== event || this.state.plane !== plane || this.state.layer !== layer) return;
    this.pixels = found;
    this.drawing = ordered(found, layer);
    this.legend();
    this.draw();
    document.getElementById("displays").dataset.shown = `${event} ${plane} ${layer} ${this.state.unit}`;
  }

  legend() {
    const list = LAYERS[this.state.layer].map(([name, colour], k) => [colour, `${name}: ${this.drawing.counts[k]}`]);
    if (!list.length) for (const charge of [5, 20, 80, 300]) list.push([heat(charge), `charge ${charge}`]);
    document.getElementById("legend").replaceChildren(...list.map(([colour, text]) => {
      const item = document.createElement("span"), mark = document.createElement("i");
      mark.style.background = `rgb(${colour})`;
      item.append(mark, text);
      return item;
    }));
  }

  // The part of the canvas that shows pixels, in CSS pixels.
  get field() {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    return { x: MARGIN.left, y: MARGIN.top, w: w - MARGIN.left - MARGIN.right, h: h - MARGIN.top - MARGIN.bottom };
  }

  reset() {
    const { w, h } = this.field, { rows, columns } = this.about;
    this.scale = this.least;
    this.left = (columns - w / this.scale) / 2;
    this.top = (rows - h / this.scale) / 2;
    this.home = true;
  }

  // The scale at which all of the image is seen.
  get least() {
    return Math.min(this.field.w / this.about.columns, this.field.h / this.about.rows);
  }

  zoom(factor, x, y) {
    const f = this.field, before = this.scale, least = this.least;
    this.scale = Math.min(Math.max(before * factor, least), 60);
    this.left += (x - f.x) * (1 / before - 1 / this.scale);
    this.top += (y - f.y) * (1 / before - 1 / this.scale);
    this.home = this.scale === least;
    if (this.home) this.reset();
    this.keepInside();
    this.draw();
  }

  move(dx, dy) {
    this.left -= dx / this.scale;
    this.top -= dy / this.scale;
    this.keepInside();
    this.draw();
  }

  keepInside() {
    const f = this.field, { rows, columns } = this.about;
    const kept = (at, size, shown) => shown >= size ? (size - shown) / 2 : Math.min(Math.max(at, 0), size - shown);
    this.left = kept(this.left, columns, f.w / this.scale);
    this.top = kept(this.top, rows, f.h / this.scale);
  }

  draw() {
    if (!this.drawing) return;
    if (this.home) this.reset();
    this.canvas.classList.toggle("inside", !this.home);
    const ratio = window.devicePixelRatio || 1, f = this.field;
    this.canvas.width = Math.round(this.canvas.clientWidth * ratio);
    this.canvas.height = Math.round(this.canvas.clientHeight * ratio);
    const paint = this.canvas.getContext("2d");
    const w = Math.max(1, Math.round(f.w * ratio)), h = Math.max(1, Math.round(f.h * ratio)), each = this.scale * ratio;
    const image = new ImageData(w, h), out = new Uint32Array(image.data.buffer).fill(packedColour(NIGHT));
    const { index, colours } = this.drawing, { row, column } = this.pixels;
    for (let k = 0; k < index.length; k++) {
      const i = index[k];
      let x = Math.round((column[i] - this.left) * each), y = Math.round((row[i] - this.top) * each);
      const right = Math.min(Math.max(x + 1, Math.round((column[i] + 1 - this.left) * each)), w);
      const below = Math.min(Math.max(y + 1, Math.round((row[i] + 1 - this.top) * each)), h);
      if (right <= 0 || below <= 0 || x >= w || y >= h) continue;
      x = Math.max(x, 0);
      for (y = Math.max(y, 0); y < below; y++) out.fill(colours[k], y * w + x, y * w + right);
    }
    paint.fillStyle = `rgb(${NIGHT})`;
    paint.fillRect(0, 0, this.canvas.width, this.canvas.height);
    paint.putImageData(image, Math.round(f.x * ratio), Math.round(f.y * ratio));
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.axes(paint, f);
    paint.setTransform(1, 0, 0, 1, 0, 0);
  }

  axes(paint, f) {
    const [across, down] = axesOf(this.about, this.state.plane, this.state.unit);
    paint.strokeStyle = paint.fillStyle = "#aab4c0";
    paint.font = "12px system-ui, sans-serif";
    paint.strokeRect(f.x - .5, f.y - .5, f.w + 1, f.h + 1);
    paint.textAlign = "center";
    for (const [at, text] of ticksOf(across, this.left, this.left + f.w / this.scale, f.w, 70)) {
      const x = f.x + (at - this.left) * this.scale;
      paint.fillRect(x, f.y + f.h, 1, 4);
      paint.fillText(text, x, f.y + f.h + 16);
    }
    paint.fillText(across.name, f.x + f.w / 2, f.y + f.h + 33);
    paint.textAlign = "right";
    for (const [at, text] of ticksOf(down, this.top, this.top + f.h / this.scale, f.h, 45)) {
      const y = f.y + (at - this.top) * this.scale;
      paint.fillRect(f.x - 4, y, 4, 1);
      paint.fillText(text, f.x - 7, y + 4);
    }
    paint.save();
    paint.translate(12, f.y + f.h / 2);
    paint.rotate(-Math.PI / 2);
    paint.textAlign = "center";
    paint.fillText(down.name, 0, 0);
    paint.restore();
  }

  // The stored pixel under a place of the canvas, or the nearest within a finger's breadth.
  tell(x, y) {
    const f = this.field, column = this.left + (x - f.x) / this.scale, row = this.top + (y - f.y) / this.scale;
    const { rows, columns, geometry } = this.about, plane = this.pixels;
    if (!plane || row < 0 || column < 0 || row >= rows || column >= columns) return;
    const reach = Math.max(0, Math.min(12, 6 / this.scale));
    let best = -1, least = Infinity;
    const last = Math.min(Math.floor(row + reach), rows - 1);
    for (let i = plane.start[Math.max(Math.floor(row - reach), 0)]; i < plane.start[last + 1]; i++) {
      const away = Math.hypot(plane.row[i] + .5 - row, plane.column[i] + .5 - column);
      const here = plane.row[i] === Math.floor(row) && plane.column[i] === Math.floor(column);
      if ((here || away <= reach) && away < least) { best = i; least = away; }
    }
    const at = best < 0 ? [Math.floor(row), Math.floor(column)] : [plane.row[best], plane.column[best]];
    const words = [];
    for (const unit of geometry ? ["pixel", "wire", "cm"] : ["pixel"]) {
      const [across, down] = axesOf(this.about, this.state.plane, unit);
      words.push(across.say(valueAt(across, at[1])), down.say(valueAt(down, at[0])));
    }
    words.push(best < 0 ? "no charge" : `charge ${plane.charge[best].toFixed(1)} · truth ${CLASS_NAMES[plane.truth[best]]}` +
      ` · prediction ${CLASS_NAMES[plane.prediction[best]]}`);
    document.getElementById("readout").textContent = words.join(" · ");
  }

  bind() {
    for (const name of ["event", "plane", "layer", "unit"]) {
      for (const button of document.querySelectorAll(`button[data-${name}]`)) {
        button.onclick = () => {
          const value = button.dataset[name];
          this.state[name] = name === "event" || name === "plane" ? Number(value) : value;
          if (name === "event") { this.home = true; document.getElementById("displays").scrollIntoView(); }
          this.show();
        };
      }
    }
    const middle = () => [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2];
    const does = { in: () => this.zoom(1.6, ...middle()), out: () => this.zoom(1 / 1.6, ...middle()),
      all: () => { this.reset(); this.draw(); }, one: () => this.zoom(1 / this.scale, ...middle()) };
    for (const button of document.querySelectorAll("button[data-zoom]")) button.onclick = does[button.dataset.zoom];
    const canvas = this.canvas, place = e => [e.offsetX, e.offsetY];
    canvas.addEventListener("wheel", e => {
      e.preventDefault();
      this.zoom(Math.exp(-e.deltaY * (e.deltaMode ? .05 : .0016)), ...place(e));
    }, { passive: false });
    canvas.addEventListener("pointerdown", e => {
      this.fingers.set(e.pointerId, place(e));
      if (!this.home) canvas.setPointerCapture(e.pointerId);
      this.tell(...place(e));
    });
    canvas.addEventListener("pointermove", e => this.pointed(e.pointerId, place(e)));
    for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
      canvas.addEventListener(name, e => this.fingers.delete(e.pointerId));
    }
    canvas.addEventListener("dblclick", e => this.zoom(2.5, ...place(e)));
    // Two fingers magnify also where one scrolls the page.
    canvas.addEventListener("touchstart", e => { if (e.touches.length > 1) e.preventDefault(); }, { passive: false });
    canvas.addEventListener("keydown", e => {
      const keys = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
      const done = { "+": does.in, "-": does.out, "0": does.all, "1": does.one }[e.key];
      if (done) done(); else if (keys[e.key]) this.move(...keys[e.key]); else return;
      e.preventDefault();
    });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  pointed(id, now) {
    const before = this.fingers.get(id);
    if (!before) return this.tell(...now);
    const others = [...this.fingers].filter(([other]) => other !== id).map(([, at]) => at);
    this.fingers.set(id, now);
    if (others.length) {
      const apart = at => Math.hypot(at[0] - others[0][0], at[1] - others[0][1]);
      const middle = [(now[0] + others[0][0]) / 2, (now[1] + others[0][1]) / 2];
      this.zoom(apart(now) / Math.max(apart(before), 1), ...middle);
      this.move((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
    } else if (!this.home) {
      this.move(now[0] - before[0], now[1] - before[1]);
    }
  }
}

theme();
const eventsText = document.getElementById("events");
if (eventsText) {
  if (typeof DecompressionStream === "undefined") {
    document.getElementById("readout").textContent = "This browser is too old to unpack the events (it has no DecompressionStream).";
  } else {
    window.viewer = new Viewer(JSON.parse(eventsText.textContent));
  }
}
