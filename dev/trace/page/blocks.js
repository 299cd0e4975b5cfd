// The map of the cache's blocks: who owns which, what is shared, what is cached and idle.

class BlockMap {
  constructor(view, root) {
    this.view = view;
    this.box = root.querySelector(".map");
    root = this.box.closest("section");
    this.canvas = this.box.querySelector("canvas");
    this.told = root.querySelector(".told");
    this.size = root.querySelector(".size");
    this.cursor = null; // the block that is told about
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this._look(this._blockAt(event.clientX - box.left, event.clientY - box.top));
    });
    this.canvas.addEventListener("pointerleave", () => {
      if (document.activeElement !== this.canvas) this._look(null);
    });
    this.canvas.addEventListener("focus", () => this._look(this.cursor ?? 0));
    this.canvas.addEventListener("blur", () => this._look(null));
    this.canvas.addEventListener("click", () => {
      const owner = this.view.model.owners(this.view.frame).get(this.cursor)?.[0];
      if (owner) this.view.select(owner[0]);
    });
    this.canvas.addEventListener("keydown", (event) => this._key(event));
  }

  _key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    const step = by[event.key];
    if (step === undefined || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    this._look(Math.min(Math.max((this.cursor ?? 0) + step, 0), this.count - 1));
    const y = Math.floor(this.cursor / this.columns) * this.pitchY;
    if (y < this.box.scrollTop) this.box.scrollTop = y;
    const bottom = y + this.pitchY - this.box.clientHeight;
    if (bottom > this.box.scrollTop) this.box.scrollTop = bottom;
  }

  _look(block) {
    if (block === this.cursor) return;
    this.cursor = block;
    this.draw();
  }

  _blockAt(x, y) {
    const column = Math.floor(x / this.pitchX);
    const block = Math.floor(y / this.pitchY) * this.columns + column;
    return column < this.columns && block >= 0 && block < this.count ? block : null;
  }

  /** Large blocks while they are few; slots, which are long, as bars. */
  _arrange(layout, width) {
    const [size, total] = layout;
    const { model } = this.view;
    this.isSlots = model.header.config.block_size === undefined;
    if (this.isSlots) {
      this.count = Math.min(total, Math.max(model.numBlocksUsed, 1));
      this.columns = Math.min(Math.ceil(this.count / 8), Math.max(1, Math.floor(width / 90)));
      this.pitchX = width / this.columns;
      this.pitchY = 26;
      return;
    }
    const used = Math.min(total, Math.max(model.numBlocksUsed, 1));
    const side = [44, 38, 32, 26, 22, 18, 14, 11, 9, 7].find(
      (pitch) => Math.floor(width / pitch) * Math.floor(280 / pitch) >= used) ?? 7;
    this.columns = Math.max(1, Math.floor(width / side));
    this.count = Math.min(total, Math.ceil(used / this.columns) * this.columns);
    this.pitchX = this.pitchY = side;
  }

  draw() {
    const { model, frame, selected } = this.view;
    if (!model.length || !model.hasCache) return;
    const state = model.at(frame);
    const width = this.box.clientWidth;
    if (!width) return;
    this._arrange(state.layout, width);
    const rows = Math.ceil(this.count / this.columns);
    const context = prepare(this.canvas, width, rows * this.pitchY + 2);
    context.font = `600 11px ${theme.sans}`;
    const owners = model.owners(frame);
    const cached = cachedBlocks(state);
    const gap = this.pitchY >= 14 ? 3 : 1;
    for (let block = 0; block < this.count; block++) {
      const x = (block % this.columns) * this.pitchX + 1;
      const y = Math.floor(block / this.columns) * this.pitchY + 1;
      const about = describeBlock(model, frame, block, owners, cached, selected);
      paintBlock(context, about, x, y, this.pitchX - gap, this.pitchY - gap);
      if (block === this.cursor) {
        context.strokeStyle = theme.accent;
        context.lineWidth = 2.5;
        roundRect(context, x - 1, y - 1, this.pitchX - gap + 2, this.pitchY - gap + 2, 5);
        context.stroke();
      }
    }
    this._tell(state, owners, cached);
  }

  _tell(state, owners, cached) {
    const { model } = this.view;
    const [size, total] = state.layout;
    const what = this.isSlots ? "slot" : "block";
    const hidden = total - this.count;
    this.size.textContent = `${count(total, what)} of ${count(size, "token")}`
      + (hidden > 0 ? `; the first ${this.count.toLocaleString("en")} are shown, `
        + "the others are never used" : "");
    if (this.cursor === null || this.cursor >= this.count) {
      const shared = [...owners.values()].filter((holders) => holders.length > 1).length;
      const idle = [...cached].filter((block) => !owners.has(block)).length;
      const parts = [`${count(owners.size, what)} held`];
      if (!this.isSlots) parts.push(`${shared} shared`);
      if (model.hasTree) parts.push(`${idle} idle in the tree`);
      const copies = state.copies.map(([a, b]) => `${a} → ${b}`).join(", ");
      this.told.textContent = `${parts.join(", ")}.`
        + (copies ? ` Copied before the step: ${copies}.` : "");
      return;
    }
    const holders = owners.get(this.cursor) ?? [];
    const who = holders.map(([index, place]) => {
      const request = model.requests[index];
      const tokens = model.computedAt(request, this.view.frame);
      const end = Math.min(tokens, (place + 1) * size);
      return `request ${index} (“${shorten(model.label(request), 40)}”), `
        + (end > place * size ? `tokens ${place * size} to ${end - 1}` : "nothing in it yet");
    });
    let text = `${what} ${this.cursor}: `;
    text += who.length ? who.join("; ") : cached.has(this.cursor) ? "idle, in the prefix tree" : "free";
    if (who.length && cached.has(this.cursor)) text += "; in the prefix tree";
    this.told.textContent = text[0].toUpperCase() + text.slice(1) + ".";
  }
}

/** Blocks that the prefix index has. */
function cachedBlocks(state) {
  const cached = new Set();
  for (const { blocks } of state.nodes.values()) for (const block of blocks) cached.add(block);
  return cached;
}
