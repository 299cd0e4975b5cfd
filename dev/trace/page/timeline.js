// The timeline: a row for every request, and below it lanes for the batch and the cache.

const ROWS_HEIGHT = 340; // at most; more requests have lower rows, then they scroll
const ROW_HEIGHTS = [24, 20, 14, 9, 6, 4];
const LANE = 38;

class Timeline {
  constructor(view, root) {
    this.view = view;
    this.rows = root.querySelector(".rows");
    this.canvas = this.rows.querySelector("canvas");
    this.spacer = this.rows.querySelector("i");
    this.lanes = root.querySelector(".lanes");
    this.zoom = 1; // 1: all frames fit
    this.offset = 0; // of the left edge, in pixels of the whole width
    this.rows.addEventListener("scroll", () => this.draw());
    for (const canvas of [this.rows, this.lanes]) {
      canvas.addEventListener("pointerdown", (event) => this._press(event, canvas));
      canvas.addEventListener("pointermove", (event) => this._move(event, canvas));
      canvas.addEventListener("pointerleave", () => this.view.tip(null));
    }
    root.querySelector(".zoom").addEventListener("click", (event) => {
      const { zoom } = event.target.dataset;
      if (zoom) this.zoomBy(Number(zoom));
    });
  }

  get row() {
    const { length } = this.view.model.requests;
    return ROW_HEIGHTS.find((height) => height * length <= ROWS_HEIGHT) ?? ROW_HEIGHTS.at(-1);
  }

  zoomBy(factor) {
    this.zoom = factor === 0 ? 1 : Math.min(Math.max(this.zoom * factor, 1), this._mostZoom());
    this.draw();
  }

  /** Where the columns of frames begin: the labels stand before. */
  get left() {
    const width = this.rows.clientWidth;
    return width < 520 ? 34 : Math.min(250, Math.round(width * 0.22));
  }

  get _unit() { // frames, or microseconds
    const { model, player } = this.view;
    return player.byTime ? Math.max(1, player.longest) : Math.max(1, player.mostFrames, model.length);
  }

  get _width() { return Math.max(40, this.rows.clientWidth - this.left - 14); }

  _mostZoom() { return Math.max(1, (this.view.model.length * 34) / this._width); }

  /** Pixels from the left edge of the columns to where a frame begins (or ends). */
  _x(frame, atEnd = false) {
    const { model, player } = this.view;
    let at = frame + (atEnd ? 1 : 0);
    if (player.byTime) {
      const times = model.frames.times[Math.min(frame, model.length - 1)];
      at = (atEnd ? times[3] : times[0]) - model.begin;
    }
    return (at / this._unit) * this._width * this.zoom - this.offset;
  }

  _frameAt(x) {
    const { model } = this.view;
    let low = 0, high = model.length - 1;
    while (low < high) { // the last one that begins at or before x
      const middle = (low + high + 1) >> 1;
      if (this._x(middle) <= x) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  _press(event, target) {
    const x = this._local(event)[0];
    if (x < 0) {
      const request = this._requestAt(event);
      if (target === this.rows && request) this.view.select(request.index);
      return;
    }
    target.setPointerCapture(event.pointerId);
    this.dragging = true;
    this.view.goTo(this._frameAt(x));
    target.addEventListener("pointerup", () => { this.dragging = false; }, { once: true });
  }

  _move(event, target) {
    const [x] = this._local(event);
    if (this.dragging) this.view.goTo(this._frameAt(x));
    const request = target === this.rows ? this._requestAt(event) : null;
    if (!request) return this.view.tip(null);
    const { model } = this.view;
    const frame = this._frameAt(x);
    const span = x >= 0 ? model.spanAt(request, frame) : null;
    const doing = span ? ` — frame ${frame}: ${tellWork(span, frame)}` : "";
    return this.view.tip(event, `${request.name}  ${model.label(request)}${doing}`);
  }

  _local(event) {
    const box = this.rows.getBoundingClientRect();
    return [event.clientX - box.left - this.left, event.clientY - box.top + this.rows.scrollTop];
  }

  _requestAt(event) {
    return this.view.model.requests[Math.floor(this._local(event)[1] / this.row)] ?? null;
  }

  draw() {
    const { model } = this.view;
    if (!model.length) return;
    const all = model.requests.length * this.row;
    const viewport = Math.min(all, ROWS_HEIGHT);
    this.rows.style.height = `${viewport}px`;
    this.spacer.style.cssText = `display:block;height:${all - viewport}px`;
    this._follow();
    if (all > viewport && this._framed !== this.view.frame) this._scrollTo(viewport);
    this._framed = this.view.frame;
    this._drawRows(viewport);
    this._drawLanes();
  }

  /** Keep the frame that is shown in sight. */
  _follow() {
    const most = Math.max(0, this._width * (this.zoom - 1));
    this.offset = Math.min(this.offset, most);
    const x = this._x(this.view.frame);
    if (x < this._width * 0.05 || x > this._width * 0.9) {
      this.offset = Math.min(Math.max(this.offset + x - this._width * 0.35, 0), most);
    }
  }

  /** Bring the rows of those who run into sight, or as many of them as there is room for. */
  _scrollTo(height) {
    const rows = this.view.model.present(this.view.frame)
      .filter(({ span }) => span[0] !== "waiting").map(({ request }) => request.index);
    if (!rows.length) return;
    const [top, bottom] = [rows[0] * this.row, (rows.at(-1) + 1) * this.row];
    const { scrollTop } = this.rows;
    if (top < scrollTop || (bottom > scrollTop + height && top > scrollTop + height / 2)) {
      this.rows.scrollTop = Math.max(0, top - height / 4);
    }
  }

  _drawRows(height) {
    const { model, frame } = this.view;
    const { row } = this;
    const width = this.rows.clientWidth;
    const context = prepare(this.canvas, width, height);
    const top = this.rows.scrollTop;
    const { left } = this;
    const [firstFrame, lastFrame] = [this._frameAt(0), this._frameAt(this._width + 14)];
    const first = Math.floor(top / row);
    const last = Math.min(model.requests.length, Math.ceil((top + height) / row));
    const now = left + this._x(frame, true);
    for (let i = first; i < last; i++) {
      const request = model.requests[i];
      const y = i * row - top;
      const isOff = this.view.isOff(i);
      if (row >= 14) this._label(context, request, y, left, isOff);
      context.save();
      context.beginPath();
      context.rect(left, y, width - left, row);
      context.clip();
      for (const part of [0, 1]) { // what has been, and what is to come, in a paler tone
        context.save();
        context.beginPath();
        if (part) context.rect(now, y, width, row);
        else context.rect(left, y, now - left, row);
        context.clip();
        context.globalAlpha = (part ? 0.3 : 1) * (isOff ? 0.3 : 1);
        if (part) this._spans(context, request, Math.max(firstFrame, frame), lastFrame, y);
        else this._spans(context, request, firstFrame, Math.min(lastFrame, frame), y);
        context.restore();
      }
      context.restore();
    }
    if (row < 14) this._rowNumbers(context, first, last, top, height);
    this._playhead(context, height);
  }

  /** Where rows are too low for names: which ones are in sight. */
  _rowNumbers(context, first, last, top, height) {
    context.fillStyle = theme.soft;
    context.font = `12px ${theme.sans}`;
    const isNarrow = this.left < 60;
    context.fillText(isNarrow ? `${first}` : `request ${first}`, 0, 8);
    context.fillText(isNarrow ? `${last - 1}` : `request ${last - 1}`, 0, height - 8);
    if (!isNarrow) context.fillText("a line for each", 0, height / 2);
  }

  _spans(context, request, firstFrame, lastFrame, y) {
    const { model } = this.view;
    const { row } = this;
    const margin = row >= 20 ? 4 : row >= 9 ? 2 : 0.5;
    let drawnTo = -1;
    for (const [state, from, to] of request.spans) {
      if (to < firstFrame) continue;
      if (from > lastFrame) break;
      const x = this.left + this._x(Math.max(from, firstFrame));
      const end = this.left + this._x(Math.min(to, lastFrame), true);
      if (end - drawnTo < 0.5) continue; // thinner than what is drawn already
      const gap = end - x > 6 && state !== "decode" ? 1 : 0;
      paintSpan(context, state, request.index, x, y + margin, end - x - gap, row - 2 * margin);
      drawnTo = end;
    }
    if (request.end && request.end[0] >= firstFrame) {
      const x = this.left + this._x(Math.min(request.end[0], model.length - 1), true);
      context.fillStyle = ["error", "abort"].includes(request.end[1]) ? theme.warn : theme.soft;
      context.fillRect(x - 1, y + margin, 2, row - 2 * margin);
    }
  }

  _label(context, request, y, left, isOff) {
    const middle = y + this.row / 2;
    context.globalAlpha = isOff ? 0.35 : 1;
    context.font = `600 11px ${theme.sans}`;
    const number = String(request.index);
    const badge = Math.max(22, context.measureText(number).width + 9);
    const tall = Math.min(17, this.row - 2);
    context.fillStyle = hueOf(request.index);
    roundRect(context, 0, middle - tall / 2, badge, tall, 5);
    context.fill();
    context.fillStyle = inkOn(request.index);
    context.textAlign = "center";
    context.fillText(number, badge / 2, middle + 0.5);
    context.textAlign = "left";
    if (left > 60) {
      context.font = `12.5px ${theme.sans}`;
      context.fillStyle = theme.ink;
      const text = this.view.model.label(request).replace(/\s+/g, " ");
      context.fillText(fitText(context, text, left - badge - 18), badge + 8, middle + 0.5);
    }
    context.globalAlpha = 1;
  }

  _playhead(context, height) {
    const { frame } = this.view;
    const [x, end] = [this.left + this._x(frame), this.left + this._x(frame, true)];
    context.save();
    context.beginPath();
    context.rect(this.left - 1, 0, this._width + 16, height);
    context.clip();
    context.fillStyle = theme.accent;
    context.globalAlpha = 0.16;
    context.fillRect(x, 0, Math.max(end - x, 1), height);
    context.globalAlpha = 1;
    context.fillRect(end - 0.75, 0, 1.5, height);
    context.restore();
  }

  _drawLanes() {
    const { model } = this.view;
    const width = this.rows.clientWidth;
    const lanes = [["Tokens in the step", (f) => [model.frames.tokens[f], model.frames.tokens[f]],
      model.mostTokens]];
    if (model.hasCache) {
      const kv = (f) => [model.frames.kv[f][1], model.frames.kv[f][0]];
      lanes.push(["KV slots: used of allocated", kv, model.mostKV]);
    }
    const height = lanes.length * LANE + 22;
    const context = prepare(this.lanes, width, height);
    const [from, to] = [this._frameAt(0), this._frameAt(this._width + 14)];
    lanes.forEach(([name, read, most], i) => {
      const bottom = (i + 1) * LANE;
      const tall = LANE - 10;
      this._laneLabel(context, name, most, bottom, tall);
      // No more bars than pixels: of the frames in one pixel the largest count.
      let bar = null;
      const flush = () => bar && this._bar(context, bar, bottom, tall / most);
      for (let frame = from; frame <= to; frame++) {
        const [high, low] = read(frame);
        const x = this.left + this._x(frame);
        if (bar && Math.floor(x) === Math.floor(bar.x)) {
          bar.high = Math.max(bar.high, high);
          bar.low = Math.max(bar.low, low);
          continue;
        }
        flush();
        const width = Math.max(this._x(frame, true) - this._x(frame) - 0.5, 1);
        bar = { x, width, high, low, isToCome: frame > this.view.frame };
      }
      flush();
      context.globalAlpha = 1;
      context.fillStyle = theme.line;
      context.fillRect(this.left, bottom, this._width + 14, 1);
    });
    this._axis(context, lanes.length * LANE);
    this._playhead(context, lanes.length * LANE);
  }

  _bar(context, { x, width, high, low, isToCome }, bottom, scale) {
    context.globalAlpha = isToCome ? 0.3 : 1;
    if (high > low) {
      context.fillStyle = theme.faint;
      context.fillRect(x, bottom - high * scale, width, (high - low) * scale);
    }
    context.fillStyle = theme.accent;
    context.fillRect(x, bottom - low * scale, width, low * scale);
  }

  _laneLabel(context, name, most, bottom, tall) {
    if (this.left < 60) return;
    context.fillStyle = theme.soft;
    context.font = `12px ${theme.sans}`;
    context.fillText(fitText(context, name, this.left - 12), 0, bottom - tall / 2 - 4);
    context.font = `11px ${theme.sans}`;
    context.fillText(`up to ${most.toLocaleString("en")}`, 0, bottom - tall / 2 + 10);
  }

  _axis(context, y) {
    const { model, player } = this.view;
    const perPixel = this._unit / (this._width * this.zoom);
    const rough = perPixel * 90;
    const power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) ?? power * 10;
    context.fillStyle = theme.soft;
    context.font = `11px ${theme.sans}`;
    for (let at = 0; at <= this._unit; at += step) {
      const x = this.left + (at / this._unit) * this._width * this.zoom - this.offset;
      if (x < this.left - 1 || x > this.left + this._width) continue;
      if (!player.byTime && at >= model.length) break;
      const text = player.byTime ? tellTime(at) : String(model.frames.step[at] ?? "");
      context.textAlign = at === 0 ? "left" : "center";
      context.fillText(text, x, y + 12);
    }
    context.textAlign = "left";
  }
}
