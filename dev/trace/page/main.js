// The page as a whole: traces, playback, keys, theme.

const byId = (id) => document.getElementById(id);
const models = [...document.querySelectorAll('script[type="application/json"]')]
  .map((script) => new TraceModel(JSON.parse(script.textContent)));
const stage = byId("stage");
stage.classList.toggle("pair", models.length > 1);

let isDue = false;
const player = new Player(models, () => {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    draw();
  });
});

applyTheme(storedTheme());
const views = models.map((model, number) => new View(model, player, stage, number));
for (const view of views) view.all = views;

function draw() {
  for (const view of views) view.draw();
  drawTransport();
}

// --- playback -----------------------------------------------------------------------------------

const SHAPES = { play: "M7 4.5v15L19.5 12z", pause: "M6.5 5h3.8v14H6.5zM13.7 5h3.8v14h-3.8z" };

function drawTransport() {
  const scrub = byId("scrub");
  scrub.max = player.moments.length - 1;
  scrub.value = player.index;
  const at = player.moments[player.index] ?? 0;
  const [view] = views;
  const step = view.model.frames.step[view.frame];
  const now = player.byTime ? tellTime(at) : `step ${step ?? "–"}`;
  const all = player.byTime ? tellTime(player.longest) : player.mostFrames - 1;
  byId("readout").innerHTML = `<b>${now}</b> <span>of ${all}</span>`;
  scrub.setAttribute("aria-valuetext", `${now} of ${all}`);
  byId("play-shape").setAttribute("d", player.isPlaying ? SHAPES.pause : SHAPES.play);
  byId("play").setAttribute("aria-label", player.isPlaying ? "Pause" : "Play");
  byId("by-step").setAttribute("aria-pressed", String(!player.byTime));
  byId("by-time").setAttribute("aria-pressed", String(player.byTime));
  const options = player.speeds.map((speed) => {
    const name = player.byTime ? `${speed} ×` : `${speed} steps/s`;
    return `<option value="${speed}" ${speed === player.speed ? "selected" : ""}>${name}</option>`;
  }).join("");
  if (options !== drawTransport.options) byId("speed").innerHTML = drawTransport.options = options;
  if (!player.isPlaying) speak(`${now} of ${all}`);
}

/** For those who listen: where we are and what happens, once it stands still. */
let speaking = 0;
function speak(place) {
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    const parts = views.map((view) => {
      const name = views.length > 1 ? `${view.model.name}: ` : "";
      return view.model.length ? name + narrate(view.model, view.frame) : `${name}no steps.`;
    });
    byId("live").textContent = `${place}. ${parts.join(" ")}`;
  }, 250);
}

function stepBy(count) {
  player.pause();
  player.goTo(player.index + count);
}

function setByTime(byTime) {
  player.setByTime(byTime);
  draw();
}

function changeSpeed(by) {
  const { speeds } = player;
  const place = speeds.indexOf(player.speed) + by;
  player.speed = speeds[Math.min(Math.max(place, 0), speeds.length - 1)];
  drawTransport();
}

byId("first").addEventListener("click", () => stepBy(-Infinity));
byId("back").addEventListener("click", () => stepBy(-1));
byId("play").addEventListener("click", () => player.toggle());
byId("forward").addEventListener("click", () => stepBy(1));
byId("last").addEventListener("click", () => stepBy(Infinity));
byId("scrub").addEventListener("input", (event) => {
  if (player.isPlaying) player.pause();
  player.goTo(Number(event.target.value));
});
byId("speed").addEventListener("change", (event) => { player.speed = Number(event.target.value); });
byId("by-step").addEventListener("click", () => setByTime(false));
byId("by-time").addEventListener("click", () => setByTime(true));

// --- keys ---------------------------------------------------------------------------------------

const KEYS = {
  " ": () => player.toggle(),
  ArrowLeft: (event) => stepBy(event.shiftKey ? -10 : -1),
  ArrowRight: (event) => stepBy(event.shiftKey ? 10 : 1),
  Home: () => stepBy(-Infinity),
  End: () => stepBy(Infinity),
  "[": () => changeSpeed(-1),
  "]": () => changeSpeed(1),
  "+": () => zoom(2),
  "=": () => zoom(2),
  "-": () => zoom(0.5),
  0: () => zoom(0),
  s: () => setByTime(!player.byTime),
  t: () => applyTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark", true),
  Escape: () => {
    for (const view of views) view.selected.clear();
    draw();
  },
  "?": () => byId("help").showModal(),
};

function zoom(factor) {
  for (const view of views) view.timeline.zoomBy(factor);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const { tagName, type } = event.target;
  if (tagName === "SELECT") return;
  // A button that has the focus is pressed by the space bar; the slider moves by itself.
  if (event.key === " " && (tagName === "BUTTON" || tagName === "SUMMARY")) return;
  if (type === "range" && event.key !== " " && event.key.length > 1) return;
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act(event);
});
byId("help-open").addEventListener("click", () => byId("help").showModal());

// --- theme, tips, size --------------------------------------------------------------------------

function storedTheme() {
  try {
    return localStorage.getItem("folovllm-theme");
  } catch {
    return null; // a page from a file may not be allowed to keep anything
  }
}

/** "light", "dark", or null: what the system says. */
function applyTheme(name, isChoice = false) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = name ?? (dark.matches ? "dark" : "light");
  const now = document.documentElement.dataset.theme;
  byId("theme").textContent = now === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", now === "dark" ? "Use light colours" : "Use dark colours");
  readTheme();
  if (isChoice) {
    try {
      localStorage.setItem("folovllm-theme", now);
    } catch { /* then it holds for this visit */ }
    refresh();
  }
}

function refresh() {
  for (const view of views) drawLegend(view.root, view.model);
  draw();
}

byId("theme").addEventListener("click", () => KEYS.t());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (storedTheme() === null) {
    applyTheme(null);
    refresh();
  }
});

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");
document.body.append(tip);

function showTip(event, text) {
  tip.hidden = !event || !text;
  if (tip.hidden) return;
  tip.textContent = text;
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18;
  const y = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
  tip.style.left = `${Math.max(4, x)}px`;
  tip.style.top = `${y}px`;
}

const [{ header }] = models;
byId("subtitle").textContent = models.length > 1
  ? "two runs side by side, stepped together"
  : `recorded ${header.environment.date.slice(0, 10)}, torch ${header.environment.torch}`;

new ResizeObserver(() => draw()).observe(stage);
// page.html#40: begin at the 41st step; page.html#40,dark: in dark colours.
const asked = /^#(\d+)(?:,(dark|light))?$/.exec(location.hash);
if (asked) player.goTo(Number(asked[1]));
if (asked?.[2]) applyTheme(asked[2]);
refresh();
