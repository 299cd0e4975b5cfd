// One trace on the page: its panels, and what is selected in it.

class View {
  constructor(model, player, stage, number) {
    this.model = model;
    this.player = player;
    this.selected = new Set();
    this.all = [this]; // with the one beside it
    const root = document.createElement("section");
    root.className = "trace";
    root.setAttribute("aria-label", `Trace of ${model.name}`);
    root.innerHTML = skeleton(model, number);
    stage.append(root);
    this.root = root;
    this.parts = [new Timeline(this, root), new Panels(this, root), new Clock(this, root)];
    if (model.hasCache) this.parts.push(new BlockMap(this, root));
    if (model.hasTree) this.parts.push(new TreeView(this, root));
    [this.timeline] = this.parts;
    drawLegend(root, model);
  }

  get frame() { return this.player.frameOf(this.model); }

  draw() {
    if (!this.model.length) return;
    for (const part of this.parts) part.draw();
  }

  goTo(frame) { this.player.goToFrame(this.model, frame); }

  /** Look at one request, or no longer: in all traces, where the same number is mostly the same. */
  select(index) {
    const selected = this.selected.has(index) ? [] : [index];
    for (const view of this.all) {
      view.selected = new Set(selected);
      view.draw();
    }
  }

  isOff(index) { return this.selected.size > 0 && !this.selected.has(index); }

  tip(event, text) { showTip(event, text); }
}

function skeleton(model, number) {
  const { header } = model;
  const { model: net, environment, config } = header;
  const where = environment.gpu
    ?? `${environment.cpu}, ${count(environment.num_threads, "thread")}`;
  const notes = model.notes.map((note) => `<p class="note">Note: ${escapeHtml(note)}.</p>`).join("");
  const id = (name) => `${name}-${number}`;
  const cache = model.hasCache ? `
    <section class="card right" aria-labelledby="${id("blocks")}">
      <header><h2 id="${id("blocks")}">Cache</h2><p class="size"></p></header>
      <div class="map"><canvas tabindex="0" role="application" aria-describedby="${id("told")}"
        aria-label="Map of the cache. Arrow keys go from block to block."></canvas></div>
      <p class="told" id="${id("told")}" aria-live="polite"></p>
      <div class="legend"></div>
    </section>` : "";
  const tree = model.hasTree ? `
    <section class="card left" aria-labelledby="${id("tree")}">
      <header><h2 id="${id("tree")}">Prefix tree</h2>
        <p>what prompts have in common is there once</p></header>
      <div class="tree" tabindex="0" role="img" aria-label="The prefix tree; its numbers follow.">
        <canvas></canvas></div>
      <p class="told"></p>
    </section>` : "";
  return `
    <div class="title"><h2>${escapeHtml(model.name)}</h2>
      <p class="mark-now"></p><p>${escapeHtml(net.name)} · ${config.dtype} · ${escapeHtml(where)} ·
        ${escapeHtml(model.file)}</p></div>
    ${notes}
    <p class="caption"></p>
    <dl class="numbers"></dl>
    <section class="card" aria-labelledby="${id("requests")}">
      <header><h2 id="${id("requests")}">Requests</h2>
        <p>${count(model.requests.length, "request")} in ${count(model.length, "step")}</p>
        <div class="zoom end" role="group" aria-label="Width of the timeline">
          <button type="button" data-zoom="0.5" aria-label="Narrower">−</button>
          <button type="button" data-zoom="2" aria-label="Wider">+</button>
          <button type="button" data-zoom="0">all</button></div></header>
      <div class="rows"><canvas role="img"
        aria-label="Timeline of the requests. The batch below says the same in words."></canvas>
        <i></i></div>
      <canvas class="lanes" role="img"
        aria-label="Tokens and cache in each step; the numbers above say the same."></canvas>
      <div class="legend"></div>
    </section>
    <section class="card left ${model.hasCache ? "" : "alone"}" aria-labelledby="${id("batch")}">
      <header><h2 id="${id("batch")}">Batch</h2><p class="batch-size"></p></header>
      <div class="budget" aria-hidden="true"></div>
      <ul class="batch"></ul>
    </section>
    ${cache}${tree}
    <section class="card ${model.hasTree ? "right" : ""}" aria-labelledby="${id("time")}">
      <header><h2 id="${id("time")}">Host and device</h2>
        <p>${tellOverlap(config)}</p></header>
      <canvas class="clock" role="img"
        aria-label="What takes the time of the steps around this one."></canvas>
      <div class="legend"></div>
    </section>
    <section class="card">
      <details><summary>This step as a table</summary><div class="scroll"><table>
        <thead><tr><th scope="col">request</th><th scope="col">prompt</th>
          <th scope="col">does</th><th scope="col">blocks</th></tr></thead>
        <tbody></tbody></table></div></details>
    </section>`;
}

function tellOverlap(config) {
  if (!config.overlap) return "one waits for the other";
  return config.device === "cpu" ? "on the CPU, to launch a step is to compute it"
    : "a step is planned and launched while the one before it runs";
}

const SPAN_LEGEND = [["waiting", "waits"], ["prefill", "prefill"], ["decode", "decode"],
  ["idle", "holds its cache"], ["preempted", "preempted"], ["recompute", "computes again"],
  ["overrun", "one step too many"]];

const BLOCK_LEGEND = [
  ["held", { owners: [[0, 0]], filled: 1 }],
  ["half full", { owners: [[0, 0]], filled: 0.5 }],
  ["shared", { owners: [[0, 0], [1, 0]], filled: 1 }],
  ["new in this step", { owners: [[0, 0]], filled: 1, isFresh: true }],
  ["in the tree", { owners: [[0, 0]], filled: 1, isCached: true }],
  ["in the tree, idle", { owners: [], isCached: true }],
  ["free", { owners: [] }],
];

/** Legends are drawn by what draws the thing itself. */
function drawLegend(root, model) {
  const legends = [...root.querySelectorAll(".legend")];
  const [spans, clock] = [legends[0], legends.at(-1)];
  const blocks = model.hasCache ? legends[1] : null;
  const fill = (box, entries, paint) => {
    if (!box) return;
    box.replaceChildren(...entries.map(([name, ...rest]) => {
      const item = document.createElement("span");
      const canvas = document.createElement("canvas");
      item.append(canvas, name);
      paint(prepare(canvas, 22, 12), name, ...rest);
      return item;
    }));
  };
  const present = new Set(model.requests.flatMap((r) => r.spans.map(([state]) => state)));
  fill(spans, SPAN_LEGEND.map(([state, name]) => [name, state])
    .filter(([, state]) => present.has(state)),
  (context, _, state) => paintSpan(context, state, 0, 0, 0, 22, 12));
  fill(blocks, BLOCK_LEGEND.filter(([name]) => model.hasTree || !name.startsWith("in the tree")),
    (context, _, block) => {
      paintBlock(context, block, 3, 0.5, 15, 11);
      if (block.isCached && block.owners.length) paintDot(context, 3, 0.5, 15, 0);
    });
  fill(clock, clockParts().filter(([name]) => name !== "launch" || model.frames.times[0][2] !== null),
    (context, _, color) => {
      context.fillStyle = color ?? hatch(context, theme.soft, 5);
      context.fillRect(0, 1, 22, 10);
    });
}
