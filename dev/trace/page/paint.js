// Colours and the canvas. A colour is a request everywhere on the page, a pattern is what it does.

// Okabe and Ito's palette, which people with any kind of colour vision tell apart, without its
// black and yellow; then three of Paul Tol's. They come round again: numbers tell requests apart.
const HUES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f6fc9",
  "#999933", "#b0506a", "#44aa99"];

const hueOf = (index) => HUES[index % HUES.length];

/** Black or white, whichever reads better on a colour. */
const INK_ON = new Map(HUES.map((hue) => {
  const [r, g, b] = [1, 3, 5].map((i) => {
    const value = parseInt(hue.slice(i, i + 2), 16) / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return [hue, (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) ? "#0b0d10" : "#ffffff"];
}));
const inkOn = (index) => INK_ON.get(hueOf(index));

/** The theme's colours, read when it changes. */
const theme = {};
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["page", "card", "sunk", "line", "faint", "ink", "soft", "accent", "warn",
    "on-accent"]) {
    theme[name === "on-accent" ? "onAccent" : name] = style.getPropertyValue(`--${name}`).trim();
  }
  theme.sans = style.getPropertyValue("--sans").trim();
  hatches.clear();
}

/** A canvas's context, scaled so that one unit is one CSS pixel, and cleared. */
function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== h) canvas.height = h;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = `11.5px ${theme.sans}`;
  context.textBaseline = "middle";
  return context;
}

const hatches = new Map();

/** Diagonal stripes of a colour. */
function hatch(context, color, gap = 6) {
  const key = `${color} ${gap}`;
  if (!hatches.has(key)) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = gap;
    const inner = tile.getContext("2d");
    inner.strokeStyle = color;
    inner.lineWidth = 1.3;
    for (const shift of [-gap, 0, gap]) {
      inner.moveTo(shift, gap);
      inner.lineTo(shift + gap, 0);
    }
    inner.stroke();
    hatches.set(key, context.createPattern(tile, "repeat"));
  }
  return hatches.get(key);
}

function roundRect(context, x, y, width, height, radius) {
  context.beginPath();
  context.roundRect(x, y, width, height, Math.max(0, Math.min(radius, width / 2, height / 2)));
}

/** Text that ends in "…" where it has to. */
function fitText(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let low = 0, high = text.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (context.measureText(`${text.slice(0, middle)}…`).width <= width) low = middle;
    else high = middle - 1;
  }
  return low ? `${text.slice(0, low)}…` : "";
}

/** One stretch of a request's life, as it looks in the timeline and in the legend. */
function paintSpan(context, state, index, x, y, width, height) {
  const hue = hueOf(index);
  const middle = y + height / 2;
  const w = Math.max(width, 1);
  if (height < 8 && state !== "waiting" && state !== "preempted") { // no room for patterns
    context.fillStyle = hue;
    context.globalAlpha *= { prefill: 1, forked: 1, recompute: 1, idle: 0.3 }[state] ?? 0.62;
    context.fillRect(x, y, w, height);
    context.globalAlpha /= { prefill: 1, forked: 1, recompute: 1, idle: 0.3 }[state] ?? 0.62;
  } else if (state === "waiting" || state === "preempted") {
    context.strokeStyle = state === "waiting" ? theme.faint : theme.warn;
    context.lineWidth = Math.min(2, height);
    context.setLineDash([2.5, 2.5]);
    context.beginPath();
    context.moveTo(x, middle);
    context.lineTo(x + w, middle);
    context.stroke();
    context.setLineDash([]);
  } else if (state === "idle") {
    context.fillStyle = hue;
    context.globalAlpha *= 0.55;
    context.fillRect(x, middle - 1, w, 2);
    context.globalAlpha /= 0.55;
  } else if (state === "prefill" || state === "recompute" || state === "forked") {
    context.fillStyle = hue;
    roundRect(context, x, y, w, height, 3);
    context.fill();
    if (state === "recompute") {
      context.fillStyle = hatch(context, theme.card);
      context.fill();
    }
  } else if (state === "overrun") {
    context.fillStyle = hatch(context, hue, 4);
    context.fillRect(x, y + height * 0.26, w, height * 0.48);
  } else {
    context.fillStyle = hue;
    context.globalAlpha *= 0.62;
    context.fillRect(x, y + height * 0.26, w, height * 0.48);
    context.globalAlpha /= 0.62;
  }
}

/**
 * One block of the cache: whose it is, how full, whether the prefix index has it.
 * owners: [request, place] of each holder; filled: share of its slots that hold a token.
 */
function paintBlock(context, block, x, y, width, height) {
  const { owners, filled, isCached, isFresh, isDim } = block;
  const radius = Math.min(4, height / 4);
  roundRect(context, x, y, width, height, radius);
  if (!owners.length) {
    context.fillStyle = isCached ? theme.sunk : theme.card;
    context.fill();
    if (isCached) {
      context.fillStyle = hatch(context, theme.soft, 5);
      context.fill();
    }
    context.strokeStyle = isCached ? theme.soft : theme.line;
    context.lineWidth = 1;
    context.stroke();
    return;
  }
  context.save();
  context.clip();
  context.fillStyle = theme.sunk;
  context.fillRect(x, y, width, height);
  const shown = owners.slice(0, 4);
  shown.forEach(([request], i) => {
    context.globalAlpha = isDim && !isDim.has(request) ? 0.22 : 1;
    const part = width / shown.length;
    context.fillStyle = hueOf(request);
    if (width > 2.2 * height) { // a slot: it fills from left to right
      context.fillRect(x, y + (i * height) / shown.length, width * filled, height / shown.length);
    } else {
      context.fillRect(x + i * part, y + height * (1 - filled), part + 0.5, height * filled);
    }
  });
  context.restore();
  context.lineWidth = isFresh ? 2 : 1;
  context.strokeStyle = isFresh ? theme.ink : theme.faint;
  roundRect(context, x, y, width, height, radius);
  context.stroke();
  if (height < 17) return;
  const label = owners.length > 1 ? `${owners.length}×` : String(owners[0][0]);
  if (context.measureText(label).width > width - 4) return;
  const isOnColor = filled >= 0.62 && owners.length === 1 && !(isDim && !isDim.has(owners[0][0]));
  context.textAlign = "center";
  if (!isOnColor) { // a plate behind the number, whatever is under it
    const plate = context.measureText(label).width + 6;
    context.fillStyle = theme.card;
    roundRect(context, x + (width - plate) / 2, y + height / 2 - 7, plate, 14, 4);
    context.fill();
  }
  context.fillStyle = isOnColor ? inkOn(owners[0][0]) : theme.ink;
  context.fillText(label, x + width / 2, y + height / 2 + 0.5);
  context.textAlign = "left";
  if (isCached && owners.length === 1 && isOnColor) paintDot(context, x, y, width, owners[0][0]);
}

/** In the corner of a block that the prefix index has. */
function paintDot(context, x, y, width, owner) {
  context.fillStyle = inkOn(owner);
  context.beginPath();
  context.arc(x + width - 4.5, y + 4.5, 1.9, 0, 7);
  context.fill();
}

/** What paintBlock wants to know of one block. */
function describeBlock(model, frame, block, owners, cached, selected) {
  const state = model.at(frame);
  const holders = owners.get(block) ?? [];
  const size = state.layout[0];
  let filled = 0;
  for (const [index, place] of holders) {
    const tokens = model.computedAt(model.requests[index], frame) - place * size;
    filled = Math.max(filled, Math.min(tokens, size) / size);
  }
  return {
    owners: holders,
    filled: holders.length ? Math.max(filled, 0) : 0,
    isCached: cached.has(block),
    isFresh: state.fresh.has(block),
    isDim: selected.size ? selected : null,
  };
}
