// The prefix tree. From left to right as the tokens of a prompt: a node begins where the one above
// it ends, and what two sequences share is there once.

const TREE_ROW = 27;

class TreeView {
  constructor(view, root) {
    this.view = view;
    this.box = root.querySelector(".tree");
    this.canvas = this.box.querySelector("canvas");
    this.told = this.box.closest("section").querySelector(".told");
    this.places = [];
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      const [x, y] = [event.clientX - box.left, event.clientY - box.top];
      const place = this.places.find((p) => x >= p.x && x < p.end && y >= p.y && y < p.y + TREE_ROW);
      this.view.tip(place ? event : null, place && this._tellNode(place));
    });
    this.canvas.addEventListener("pointerleave", () => this.view.tip(null));
  }

  draw() {
    const { model, frame, selected } = this.view;
    if (!model.length || !model.hasTree) return;
    const state = model.at(frame);
    const width = this.box.clientWidth;
    if (!width) return;
    const rows = layOut(state.nodes);
    const deepest = Math.max(1, ...rows.nodes.map((node) => node.depth + node.blocks.length));
    const cell = Math.max(5, Math.min(40, (width - 26) / deepest));
    const height = Math.max(1, rows.count) * TREE_ROW + 4;
    const context = prepare(this.canvas, width, height);
    context.font = `600 11px ${theme.sans}`;
    const owners = model.owners(frame);
    const cached = cachedBlocks(state);
    const tall = TREE_ROW - 5;
    this.places = [];
    const left = 16;
    context.strokeStyle = theme.faint;
    context.lineWidth = 1.5;
    for (const node of rows.nodes) { // the lines lie below the blocks
      const x = left + node.depth * cell;
      const y = node.row * TREE_ROW + tall / 2 + 2;
      const from = node.parentRow * TREE_ROW + tall / 2 + 2;
      context.beginPath();
      context.moveTo(x - 6, from);
      context.lineTo(x - 6, y);
      context.lineTo(x, y);
      context.stroke();
    }
    context.fillStyle = theme.soft;
    context.beginPath();
    context.arc(left - 6, tall / 2 + 2, 4, 0, 7);
    context.fill();
    for (const node of rows.nodes) {
      const x = left + node.depth * cell;
      const y = node.row * TREE_ROW + 2;
      node.blocks.forEach((block, i) => {
        const about = describeBlock(model, frame, block, owners, cached, selected);
        about.filled = about.owners.length ? 1 : 0;
        about.isFresh = state.freshNodes.has(block);
        about.isCached = true;
        paintBlock(context, about, x + i * cell + 1, y, Math.max(cell - 2, 2), tall);
      });
      this.places.push({ ...node, x, end: x + node.blocks.length * cell, y });
    }
    this._tell(state);
  }

  _tell(state) {
    const { model } = this.view;
    const value = (name) => state.prefix?.[model.counters.indexOf(name)] ?? 0;
    const asked = value("num_query_tokens");
    const share = asked ? ` (${Math.round((100 * value("num_hit_tokens")) / asked)} %)` : "";
    this.told.innerHTML = `<b>${value("num_hits")} of ${count(value("num_queries"), "request")}</b> `
      + `found something: ${value("num_hit_tokens").toLocaleString("en")} of `
      + `${asked.toLocaleString("en")} tokens${share}. ${count(value("num_blocks"), "block")} in `
      + `${count(value("num_nodes"), "node")}, ${value("num_evictable")} idle, `
      + `${value("num_evicted")} evicted so far.`;
  }

  _tellNode(place) {
    const size = this.view.model.header.layout[0];
    const from = place.depth * size;
    return `${count(place.blocks.length, "block")} of the tree: tokens ${from} to `
      + `${from + place.blocks.length * size - 1} of a prompt`;
  }
}

/** Rows for the nodes of a tree: the first child goes on in its parent's row, others below it. */
function layOut(nodes) {
  const children = new Map();
  for (const [first, { parent }] of nodes) {
    const above = nodes.has(parent) ? parent : -1;
    if (!children.has(above)) children.set(above, []);
    children.get(above).push(first);
  }
  const placed = [];
  let count = 0;
  const stack = [];
  const push = (parent, depth, row) => {
    const below = children.get(parent) ?? [];
    for (let i = below.length - 1; i >= 0; i--) {
      stack.push({ first: below[i], depth, parentRow: row, isFirst: i === 0 });
    }
  };
  push(-1, 0, 0);
  while (stack.length) {
    const { first, depth, parentRow, isFirst } = stack.pop();
    const { blocks } = nodes.get(first);
    if (!isFirst || !placed.length) count++;
    const row = count - 1;
    placed.push({ first, blocks, depth, row, parentRow });
    push(first, depth + blocks.length, row);
  }
  return { nodes: placed, count };
}
