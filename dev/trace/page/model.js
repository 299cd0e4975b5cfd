// A trace, and what it looks like at any frame: who owns which block, the tree, the batch.

const CHECKPOINT = 64; // frames between two states that are kept whole

class TraceModel {
  constructor(data) {
    Object.assign(this, data);
    this.length = this.frames.step.length;
    this.begin = this.length ? this.frames.times[0][0] : 0;
    this.hasCache = this.header.layout[1] > 0;
    this.hasTree = this.header.config.prefix_index !== undefined
      && this.header.config.prefix_index !== "off";
    this.requests.forEach((request, index) => {
      request.index = index;
      request.first = request.spans.length ? request.spans[0][1] : this.length;
      request.last = request.spans.length ? request.spans.at(-1)[2] : -1;
    });
    this.stepFrame = new Map(this.frames.step.map((step, frame) => [step, frame]));
    this._sumUp();
    this._checkpoints = [{ frame: -1, state: this._firstState() }];
    this._now = { frame: -1, state: this._firstState() };
  }

  /** What grows from frame to frame, and what is largest. */
  _sumUp() {
    let out = 0, preemptions = 0, evictedBefore = 0, highest = -1;
    this.sampledSoFar = [];
    this.preemptionsSoFar = [];
    for (let frame = 0; frame < this.length; frame++) {
      out += this.frames.sampled[frame];
      const change = this.changes[frame] ?? {};
      preemptions += change.preempted?.length ?? 0;
      this.sampledSoFar.push(out);
      this.preemptionsSoFar.push(preemptions);
      for (const [, , blocks] of change.tables ?? []) {
        for (const block of blocks) highest = Math.max(highest, block);
      }
    }
    this.numBlocksUsed = highest + 1;
    this.mostTokens = Math.max(1, ...this.frames.tokens);
    this.mostKV = Math.max(1, ...this.frames.kv.map((kv) => kv[1]));
  }

  _firstState() {
    const state = { tables: new Map(), nodes: new Map(), layout: this.header.layout, prefix: null,
      leaving: [], fresh: new Set(), freshNodes: new Set(), copies: [] };
    for (const [first, parent, blocks] of this.firstTree?.nodes ?? []) {
      state.nodes.set(first, { parent, blocks });
    }
    return state;
  }

  /** The state while a frame's step runs; the caller only looks at it. */
  at(frame) {
    if (frame < this._now.frame || frame > this._now.frame + 2 * CHECKPOINT) {
      const nearest = this._checkpoints[
        Math.min(Math.floor((frame + 1) / CHECKPOINT), this._checkpoints.length - 1)];
      if (frame < this._now.frame || nearest.frame > this._now.frame) {
        this._now = { frame: nearest.frame, state: copyState(nearest.state) };
      }
    }
    while (this._now.frame < frame) {
      this._now.frame++;
      this._apply(this._now.state, this.changes[this._now.frame] ?? {});
      if ((this._now.frame + 1) % CHECKPOINT === 0
          && this._checkpoints.length === (this._now.frame + 1) / CHECKPOINT) {
        this._checkpoints.push({ frame: this._now.frame, state: copyState(this._now.state) });
      }
    }
    return this._now.state;
  }

  _apply(state, change) {
    for (const request of state.leaving) state.tables.delete(request);
    for (const request of change.gone ?? []) state.tables.delete(request);
    state.fresh = new Set();
    state.freshNodes = new Set();
    if (change.layout) state.layout = change.layout;
    for (const [request, kept, blocks] of change.tables ?? []) {
      const before = state.tables.get(request) ?? [];
      state.tables.set(request, [...before.slice(0, kept), ...blocks]);
      for (const block of blocks) state.fresh.add(block);
    }
    for (const first of change.tree?.gone ?? []) state.nodes.delete(first);
    for (const [first, parent, blocks] of change.tree?.nodes ?? []) {
      const known = new Set(state.nodes.get(first)?.blocks);
      for (const block of blocks) if (!known.has(block)) state.freshNodes.add(block);
      state.nodes.set(first, { parent, blocks });
    }
    if (change.prefix) state.prefix = change.prefix;
    state.copies = change.copies ?? [];
    state.leaving = change.left ?? [];
  }

  /** Block number -> the requests that hold it, each with the block's place in its table. */
  owners(frame) {
    const owners = new Map();
    for (const [request, table] of this.at(frame).tables) {
      table.forEach((block, place) => {
        const holders = owners.get(block);
        if (holders) holders.push([request, place]);
        else owners.set(block, [[request, place]]);
      });
    }
    return owners;
  }

  /** The span of a request that covers a frame, or null: [state, first, last, start, end, why]. */
  spanAt(request, frame) {
    const { spans } = request;
    let low = 0, high = spans.length - 1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      if (spans[middle][2] < frame) low = middle + 1;
      else if (spans[middle][1] > frame) high = middle - 1;
      else return spans[middle];
    }
    return null;
  }

  /** Everyone who is there in a frame, with what they do. */
  present(frame) {
    const present = [];
    for (const request of this.requests) {
      if (request.first > frame || request.last < frame) continue;
      const span = this.spanAt(request, frame);
      if (span) present.push({ request, span, work: workIn(span, frame) });
    }
    return present;
  }

  /** Tokens of a request in the cache once a frame's step is done. */
  computedAt(request, frame) {
    const span = this.spanAt(request, frame);
    if (!span) return 0;
    return span[0] === "decode" ? span[3] + frame - span[1] + 1 : span[4];
  }

  /** Tokens of its output that were known, or being sampled, in a frame. */
  numSampled(request, frame) {
    let count = 0;
    for (const [state, first, last, , end] of request.spans) {
      if (first > frame) break;
      const through = Math.min(last, frame);
      if (state === "decode") count += through - first + 1;
      else if (state === "forked") count += 1;
      else if (state === "prefill" && end >= request.promptTokens) count += 1;
      else if (state === "recompute" && end >= request.promptTokens + count) count += 1;
    }
    return request.end ? Math.min(count, request.end[2]) : count;
  }

  label(request) {
    return request.prompt ? request.prompt : `${request.promptTokens} tokens of prompt`;
  }
}

/** First token and number of tokens that a span computes in a frame. */
function workIn([state, first, , start, end], frame) {
  if (state === "decode" || state === "overrun") return { start: start + frame - first, count: 1 };
  if (state === "prefill" || state === "recompute") return { start, count: end - start };
  return { start, count: 0 };
}

function copyState(state) {
  return {
    ...state,
    tables: new Map(state.tables), // their arrays are replaced, never changed
    nodes: new Map(state.nodes),
    leaving: [...state.leaving],
  };
}
