// What happens, in words: for the caption, for tips, for those who listen to the page.

const count = (n, what) =>
  `${n.toLocaleString("en")} ${what}${n === 1 ? "" : what.endsWith("s") ? "es" : "s"}`;

const shorten = (text, most) => (text.length <= most ? text : `${text.slice(0, most - 1)}…`);

const escapeHtml = (text) =>
  text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

/** Microseconds, in the unit that suits them. */
function tellTime(us) {
  if (us === 0) return "0";
  if (us >= 1e6) return `${(us / 1e6).toFixed(us >= 1e7 ? 1 : 2)} s`;
  if (us >= 1e3) return `${(us / 1e3).toFixed(us >= 1e5 ? 0 : us >= 1e4 ? 1 : 2)} ms`;
  return `${Math.round(us)} µs`;
}

const REASONS = {
  prompt: "to its end",
  budget: "as much as the step's budget left",
  itl: "as much as the target latency allows",
  blocks: "as much as the free blocks hold",
};

const ENDINGS = {
  stop: "is done: it said stop",
  length: "is done: it has all the tokens it may have",
  abort: "was aborted",
  error: "ended with an error",
};

/** What a request does in a frame, as a phrase. */
function tellWork(span, frame) {
  const [state, , , , end, why] = span;
  const { start, count: tokens } = workIn(span, frame);
  switch (state) {
    case "waiting": return "waits";
    case "preempted": return "waits, preempted";
    case "prefill": return `computes prompt tokens ${start} to ${end - 1}`
      + (why && why !== "prompt" ? `, ${REASONS[why]}` : "");
    case "recompute": return `computes tokens ${start} to ${end - 1} again`;
    case "decode": return `decodes: token ${start}`;
    case "forked": return "takes its first token from another sample's prompt";
    case "overrun": return "one step too many: it had ended";
    default: return tokens ? "" : "holds its cache and has nothing computed";
  }
}

/** One frame as sentences; `b` marks what is bold in HTML. */
function narrate(model, frame) {
  const { frames } = model;
  const change = model.changes[frame] ?? {};
  const present = model.present(frame);
  const of = (...states) => present.filter(({ span }) => states.includes(span[0]));
  const said = [];
  const step = frames.step[frame];
  const decoding = of("decode").length;
  const chunks = of("prefill", "recompute");
  if (frames.failed[frame]) {
    said.push("A step was planned, found no memory, and was taken back.");
  } else if (step === null) {
    said.push("Nothing is left to launch: the engine reads the tokens of the step before.");
  } else {
    const doing = [];
    if (decoding) doing.push(`${count(decoding, "request")} ${decoding > 1 ? "decode" : "decodes"} `
      + "one token" + (decoding > 1 ? " each" : ""));
    for (const { request, span } of chunks.slice(0, 3)) {
      doing.push(`request ${request.index} ${tellWork(span, frame)}`);
    }
    const more = chunks.length - 3;
    if (more > 0) doing.push(`${more} more ${more > 1 ? "compute their prompts" : "computes its prompt"}`);
    said.push(`${doing.join("; ") || "Nobody computes"}.`);
  }
  for (const { request } of present) {
    for (const [at, tokens] of request.hits) {
      if (at === frame) said.push(
        `Request ${request.index} finds ${tokens} of its ${request.promptTokens} prompt tokens `
        + "in the cache.");
    }
  }
  for (const { request } of of("forked")) {
    said.push(`Request ${request.index} shares the prompt's blocks.`);
  }
  if (change.preempted) {
    said.push(`Preempted for want of blocks: ${change.preempted.map((i) => `request ${i}`).join(", ")}.`);
  }
  if (change.copies) said.push(`${count(change.copies.length, "block")} copied before `
    + `${change.copies.length > 1 ? "they are" : "it is"} written to.`);
  const ended = model.requests.filter((r) => r.end && r.end[0] === frame);
  for (const request of ended.slice(0, 3)) {
    said.push(`Request ${request.index} ${ENDINGS[request.end[1]] ?? `ended: ${request.end[1]}`}.`);
  }
  if (ended.length > 3) said.push(`${ended.length - 3} more ${ended.length > 4 ? "end" : "ends"}.`);
  const text = said.join(" ");
  return text[0].toUpperCase() + text.slice(1);
}
