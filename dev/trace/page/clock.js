// What the host and the device do around the step that is shown: how steps overlap.

const AROUND = 3; // steps before and after it
const HOST = 22;

/** What the host does in a step, in order, and its colour; null: stripes. */
const clockParts = () => [["plan", theme.warn], ["launch", theme.soft], ["wait for tokens", null],
  ["process tokens", theme.faint]];

class Clock {
  constructor(view, root) {
    this.view = view;
    this.canvas = root.querySelector(".clock");
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      const [x, y] = [event.clientX - box.left, event.clientY - box.top];
      const part = this.parts?.find((p) => x >= p.x && x <= p.end && y >= p.y && y <= p.y + HOST);
      this.view.tip(part ? event : null, part && `${part.what}: ${tellTime(part.time)}`);
    });
    this.canvas.addEventListener("pointerleave", () => this.view.tip(null));
  }

  draw() {
    const { model, frame } = this.view;
    const width = this.canvas.clientWidth;
    if (!width || !model.length) return;
    const context = prepare(this.canvas, width, 96);
    const { times, read } = model.frames;
    const from = Math.max(0, frame - AROUND);
    const to = Math.min(model.length - 1, frame + AROUND);
    const [begin, end] = [times[from][0], times[to][3]];
    const left = 54;
    const scale = (width - left - 4) / Math.max(end - begin, 1);
    const x = (at) => left + (at - begin) * scale;
    this.parts = [];
    context.fillStyle = theme.soft;
    context.font = `12px ${theme.sans}`;
    context.fillText("host", 0, 17);
    context.fillText("device", 0, 55);
    for (let f = from; f <= to; f++) {
      const [start, scheduled, launched, done] = times[f];
      const [, readAt] = read[f];
      const isNow = f === frame;
      context.globalAlpha = isNow ? 1 : 0.4;
      const ends = [scheduled, launched, readAt, done];
      let at = start;
      clockParts().forEach(([what, color], i) => {
        if (ends[i] === null || ends[i] <= at) return;
        this._part(context, what, x(at), x(ends[i]), 6, color, ends[i] - at, isNow);
        at = ends[i];
      });
      this._device(context, f, x, isNow);
    }
    context.globalAlpha = 1;
    context.fillStyle = theme.soft;
    context.font = `11px ${theme.sans}`;
    context.fillText(`${tellTime(end - begin)} shown`, left, 86);
  }

  _device(context, frame, x, isNow) {
    const { step, device } = this.view.model.frames;
    if (step[frame] === null) return;
    const [begin, end] = device[frame];
    this._part(context, `step ${step[frame]}`, x(begin), x(end), 44, theme.accent, end - begin,
      isNow, String(step[frame]));
  }

  _part(context, what, x, end, y, color, time, isNow, label) {
    const width = Math.max(end - x, 0.75);
    const height = label ? 20 : HOST;
    roundRect(context, x, y, width, height, 3);
    context.fillStyle = color ?? hatch(context, theme.soft, 5);
    context.fill();
    if (isNow && label) {
      context.strokeStyle = theme.ink;
      context.lineWidth = 1.5;
      context.stroke();
    }
    if (label && width > 24) {
      context.globalAlpha = 1;
      context.fillStyle = isNow ? theme.onAccent : theme.ink;
      context.font = `600 11px ${theme.sans}`;
      context.textAlign = "center";
      context.fillText(label, x + width / 2, y + height / 2 + 0.5);
      context.textAlign = "left";
    }
    this.parts.push({ what, x, end: x + width, y, time });
  }
}
