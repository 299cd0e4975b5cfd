// Where we are, and how fast it goes. The place is an index into `moments`: frames that all traces
// count alike, or, by time, every moment at which one of them begins a step.

const STEPS_A_SECOND = [1, 2, 4, 8, 16, 32, 64];
const TIME_FACTORS = [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8];

class Player {
  constructor(models, onChange) {
    this.models = models;
    this.onChange = onChange;
    this.byTime = false;
    this.isPlaying = false;
    this.index = 0;
    this.mostFrames = Math.max(...models.map((model) => model.length), 1);
    this.longest = Math.max(...models.map((model) =>
      model.length ? model.frames.times.at(-1)[3] - model.begin : 0), 1);
    this.stepSpeed = 8;
    this.timeFactor = TIME_FACTORS.findLast((f) => this.longest / 1e6 / f > 6) ?? TIME_FACTORS[0];
    this._setMoments();
  }

  _setMoments() {
    if (!this.byTime) {
      this.moments = Array.from({ length: this.mostFrames }, (_, i) => i);
      return;
    }
    const starts = this.models.flatMap((model) =>
      model.frames.times.map(([start]) => start - model.begin));
    this.moments = [...new Set(starts)].sort((a, b) => a - b);
  }

  /** The frame of a model at the place where we are. */
  frameOf(model) {
    const at = this.moments[this.index];
    if (!this.byTime) return Math.min(at, model.length - 1);
    let low = 0, high = model.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (model.frames.times[middle][0] - model.begin <= at) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /** Go where one model is in a frame. */
  goToFrame(model, frame) {
    const wanted = this.byTime ? model.frames.times[frame][0] - model.begin : frame;
    let low = 0, high = this.moments.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.moments[middle] < wanted) low = middle + 1;
      else high = middle;
    }
    this.goTo(low);
  }

  goTo(index) {
    const bounded = Math.min(Math.max(index, 0), this.moments.length - 1);
    this._clock = this.moments[bounded];
    if (bounded !== this.index) {
      this.index = bounded;
      this.onChange();
    }
  }

  setByTime(byTime) {
    if (byTime === this.byTime) return;
    const [first] = this.models;
    const frame = this.frameOf(first);
    this.byTime = byTime;
    this._setMoments();
    this.index = -1;
    this.goToFrame(first, frame);
  }

  get speeds() { return this.byTime ? TIME_FACTORS : STEPS_A_SECOND; }
  get speed() { return this.byTime ? this.timeFactor : this.stepSpeed; }
  set speed(value) {
    if (this.byTime) this.timeFactor = value;
    else this.stepSpeed = value;
  }

  toggle() {
    if (this.isPlaying) this.pause();
    else this.play();
  }

  play() {
    if (this.index >= this.moments.length - 1) this.goTo(0);
    this.isPlaying = true;
    this._clock = this.moments[this.index];
    let before = performance.now();
    const tick = (now) => {
      if (!this.isPlaying) return;
      const seconds = Math.min(now - before, 250) / 1e3;
      before = now;
      this._clock += seconds * (this.byTime ? 1e6 * this.timeFactor : this.stepSpeed);
      let index = this.index;
      while (index < this.moments.length - 1 && this.moments[index + 1] <= this._clock) index++;
      if (index !== this.index) {
        this.index = index;
        this.onChange();
      }
      if (index >= this.moments.length - 1) this.pause();
      else requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
    this.onChange();
  }

  pause() {
    this.isPlaying = false;
    this.onChange();
  }
}
