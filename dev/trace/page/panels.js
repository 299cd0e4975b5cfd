// What stands beside the drawings: numbers, the batch, and the same as a table.

const MOST_LINES = 60;

class Panels {
  constructor(view, root) {
    this.view = view;
    this.numbers = root.querySelector(".numbers");
    this.caption = root.querySelector(".caption");
    this.mark = root.querySelector(".mark-now");
    this.list = root.querySelector(".batch");
    // As high as the fullest step needs, so that what stands below does not move.
    const most = Math.max(1, ...this.view.model.frames.running.map(
      (running, i) => running + this.view.model.frames.waiting[i]));
    this.list.style.setProperty("--rows", Math.min(most, 6));
    this.budget = root.querySelector(".budget");
    this.size = root.querySelector(".batch-size");
    this.table = root.querySelector("tbody");
    this.details = root.querySelector("details");
    this.details.addEventListener("toggle", () => this._drawTable());
    this.list.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) this.view.select(Number(button.dataset.request));
    });
  }

  draw() {
    const mark = this.view.model.marks.findLast(([first]) => first <= this.view.frame);
    this.mark.textContent = mark ? mark[1] : "";
    this.caption.textContent = this.view.model.length ? narrate(this.view.model, this.view.frame) : "";
    this._drawNumbers();
    this._drawBatch();
    this._drawTable();
  }

  _drawNumbers() {
    const { model, frame } = this.view;
    const { frames } = model;
    const [start, , , end] = frames.times[frame];
    const [used, allocated] = frames.kv[frame];
    const elapsed = (end - model.begin) / 1e6;
    const numbers = [
      ["Step", frames.step[frame] ?? "–", frames.graph[frame] ? "CUDA graph" : ""],
      ["Took", tellTime(end - start), ""],
      ["In the step", frames.tokens[frame].toLocaleString("en"),
        frames.tokens[frame] === 1 ? "token" : "tokens"],
      ["Running", frames.running[frame], `${frames.waiting[frame]} waiting`],
    ];
    if (model.hasCache) {
      const share = allocated ? Math.round((100 * used) / allocated) : 100;
      numbers.push(["KV slots used", used.toLocaleString("en"),
        `${share} % of ${allocated.toLocaleString("en")}`]);
    }
    numbers.push(
      ["Tokens so far", model.sampledSoFar[frame].toLocaleString("en"),
        elapsed > 0 ? `${Math.round(model.sampledSoFar[frame] / elapsed)}/s` : ""],
      ["Preemptions", model.preemptionsSoFar[frame], ""],
    );
    const html = numbers.map(([name, value, note]) =>
      `<div><dt>${name}</dt><dd>${value} <small>${note}</small></dd></div>`).join("");
    if (html !== this._numbersHtml) this.numbers.innerHTML = this._numbersHtml = html;
  }

  /** Those who compute first, then those who hold their cache, then those who wait. */
  _order(present) {
    const rank = { decode: 0, overrun: 0, prefill: 1, recompute: 1, forked: 1, idle: 2,
      preempted: 3, waiting: 4 };
    return present.sort((a, b) => rank[a.span[0]] - rank[b.span[0]]);
  }

  _drawBatch() {
    const { model, frame } = this.view;
    const present = this._order(model.present(frame));
    const busy = present.filter(({ work }) => work.count);
    const most = model.mostTokens;
    this.size.textContent = model.frames.step[frame] === null ? "no step"
      : `${count(model.frames.tokens[frame], "token")} of ${count(busy.length, "request")}`;
    this.budget.innerHTML = busy.slice(0, 300).map(({ request, work }) =>
      `<i style="width:${(100 * work.count) / most}%;background:${hueOf(request.index)}"></i>`).join("");
    this.budget.title = `the fullest step has ${count(most, "token")}`;
    const items = present.slice(0, MOST_LINES).map((each) => this._line(each));
    if (present.length > MOST_LINES) {
      items.push(`<li class="more">and ${present.length - MOST_LINES} more</li>`);
    }
    if (!present.length) items.push('<li class="more">nobody is here</li>');
    const html = items.join("");
    if (html === this._batchHtml) return;
    this._batchHtml = html;
    const focused = this.list.contains(document.activeElement)
      ? document.activeElement.dataset.request : null;
    this.list.innerHTML = html;
    if (focused !== null) this.list.querySelector(`[data-request="${focused}"]`)?.focus();
  }

  _line({ request, span }) {
    const { model, frame, selected } = this.view;
    const { index } = request;
    const label = escapeHtml(shorten(model.label(request).replace(/\s+/g, " "), 110));
    return `<li class="${this.view.isOff(index) ? "off" : ""}">`
      + `<span class="badge" style="background:${hueOf(index)};color:${inkOn(index)}">${index}</span>`
      + `<button type="button" data-request="${index}" aria-pressed="${selected.has(index)}">`
      + `${label}</button><span class="doing">${this._doing(request, span)}</span>`
      + `${this._said(request)}</li>`;
  }

  _doing(request, span) {
    const { start, count: tokens } = workIn(span, this.view.frame);
    switch (span[0]) {
      case "decode": return `decode · token ${start}`;
      case "prefill": return `prefill · ${start}–${start + tokens - 1} of ${request.promptTokens}`;
      case "recompute": return `again · ${start}–${start + tokens - 1}`;
      case "forked": return "shares the prompt";
      case "overrun": return "one step too many";
      case "idle": return "holds its cache";
      case "preempted": return "preempted";
      default: return request.priority ? `waits · priority ${request.priority}` : "waits";
    }
  }

  /** The tail of what it has said, the newest token in ink. */
  _said(request) {
    if (!request.pieces?.length) return "";
    const known = this.view.model.numSampled(request, this.view.frame);
    if (!known) return "";
    const pieces = request.pieces.slice(Math.max(0, known - 40), known);
    const clean = (text) => escapeHtml(text.replace(/\s+/g, " "));
    const before = clean(pieces.slice(0, -1).join(""));
    return `<span class="said"><bdi>${before}<ins>${clean(pieces.at(-1) ?? "")}</ins></bdi></span>`;
  }

  _drawTable() {
    if (!this.details.open) return;
    const { model, frame } = this.view;
    if (!model.length) return;
    const state = model.at(frame);
    this.table.innerHTML = this._order(model.present(frame)).map(({ request, span }) => {
      const blocks = state.tables.get(request.index) ?? [];
      return `<tr><th scope="row">${request.index}</th>`
        + `<td>${escapeHtml(shorten(model.label(request), 60))}</td>`
        + `<td>${tellWork(span, frame)}</td><td>${blocks.join(" ") || "none"}</td></tr>`;
    }).join("");
  }
}
