const MODES = {
  advantage: "advantage",
  difference: "log-prob, trainer − engine",
  engine: "log-prob of the engine",
  none: "nothing",
};
const viewer = { step: null, episode: 0, mode: "advantage" };
const byStep = new Map();
for (const episode of DATA.episodes) byStep.set(episode.step, [...(byStep.get(episode.step) || []), episode]);
const steps = [...byStep.keys()];
const reward = (episode) => Object.values(episode.rewards).reduce((sum, part) => sum + part, 0);

function valueOf(tokens, mode, i) {
  const values = tokens[mode];
  return Array.isArray(values) ? values[i] : values === undefined ? null : values;
}

// Positive is blue and negative orange, as strong as the value is large; of a log-prob the improbable is strong.
function paint(value, scale) {
  const strength = Math.min(Math.abs(value) / (scale || 1), 1) * 0.75;
  return value >= 0 ? `rgba(47, 109, 181, ${strength.toFixed(3)})` : `rgba(217, 110, 40, ${strength.toFixed(3)})`;
}

function scaleOf(episodes, mode) {
  let most = 0;
  for (const episode of episodes)
    for (const turn of episode.turns)
      if (turn.tokens)
        turn.tokens.text.forEach((_, i) => { most = Math.max(most, Math.abs(valueOf(turn.tokens, mode, i) ?? 0)); });
  return most;
}

function drawScale(mode, scale, unknown) {
  const holder = document.getElementById("scale");
  holder.replaceChildren();
  if (mode === "none") return;
  if (!scale && unknown) {
    holder.append("Not known for this episode: the first update of its round computed none of its tokens.");
    return;
  }
  const bar = element("span", { class: "bar" }), ends = mode === "engine" ? [-1, 0] : [-1, 1];
  for (let i = 0; i <= 14; i++) {
    const cell = element("i");
    cell.style.background = paint(ends[0] + ((ends[1] - ends[0]) * i) / 14, 1);
    bar.append(cell);
  }
  const remark = mode === "difference" ? "; known where the first update of a round computed it" : "";
  const notes = [MODES[mode], format(ends[0] * scale), bar, format(ends[1] * scale)];
  notes.push(`largest of this ${mode === "advantage" ? "step" : "episode"}${remark}`);
  for (const note of notes) holder.append(element("span", {}, note));
  if (unknown) holder.append(element("span", { class: "token unknown" }, "not known"));
}

function tokenStrip(tokens, mode, scale) {
  const strip = element("div", { class: "tokens" });
  tokens.text.forEach((text, i) => {
    if (tokens.gap && i === tokens.gap[0]) strip.append(element("span", { class: "omitted" }, ` … ${tokens.gap[1]} tokens were not recorded … `));
    const value = mode === "none" ? null : valueOf(tokens, mode, i);
    const token = element("span", { class: "token" }, (text || "∅").replaceAll("\n", "↵\n"));
    if (value !== null) token.style.background = paint(value, scale);
    else if (mode !== "none") token.classList.add("unknown");
    const difference = valueOf(tokens, "difference", i), engine = valueOf(tokens, "engine", i);
    const lines = [JSON.stringify(text), `advantage: ${format(valueOf(tokens, "advantage", i))}`, `engine: ${format(engine)}`];
    lines.push(difference === null ? "trainer: not known" : `trainer: ${format(engine + difference)}`);
    if (difference !== null) lines.push(`trainer − engine: ${format(difference)}`);
    const version = valueOf(tokens, "version", i);
    if (version !== null) lines.push(`policy version: ${version}`);
    token.addEventListener("pointermove", (event) => showTip(event, lines.join("\n")));
    token.addEventListener("pointerleave", hideTip);
    strip.append(token);
  });
  if (tokens.gap && tokens.gap[0] === tokens.text.length) strip.append(element("span", { class: "omitted" }, ` … ${tokens.gap[1]} tokens were not recorded`));
  return strip;
}

const labelled = (name, ...content) => [element("div", { class: "label" }, name), ...content];

function drawTurn(turn, number, mode, scale) {
  const parsed = element("div");
  if (turn.reasoning) parsed.append(...labelled("thinking", element("p", { class: "text thinking" }, turn.reasoning)));
  if (turn.content) parsed.append(...labelled("answer", element("p", { class: "text" }, turn.content)));
  if (turn.calls.length) parsed.append(...labelled("tool calls"));
  for (const call of turn.calls) {
    const result = element("div", { class: call.error ? "text mono error" : "text mono" }, "→ " + call.result);
    const asked = element("div", { class: "text mono" }, `${call.name}(${JSON.stringify(call.arguments)})`);
    const seconds = call.seconds ? `${format(call.seconds)} s` : "under 1 ms";
    parsed.append(element("div", { class: "call" }, asked, result, element("div", { class: "quiet" }, seconds)));
  }
  if (turn.open) parsed.append(...labelled("not over: the window ended here"));
  if (!parsed.childNodes.length) parsed.append(...labelled("nothing could be read of it"));
  const box = element("div", { class: "box turn" }, element("h3", {}, "Turn " + number), parsed);
  if (turn.tokens) box.append(element("div", {}, ...labelled("as written, token by token"), tokenStrip(turn.tokens, mode, scale)));
  return box;
}

function drawEpisode() {
  const episodes = byStep.get(viewer.step), episode = episodes[viewer.episode], mode = viewer.mode;
  const scale = scaleOf(mode === "advantage" ? episodes : [episode], mode);
  const unknown = episode.turns.some((turn) => turn.tokens && turn.tokens.text.some((_, i) => valueOf(turn.tokens, mode, i) === null));
  drawScale(mode, scale, unknown);
  const fact = (name, value, kind = "") => element("span", {}, element("span", {}, name), element("b", { class: kind }, value));
  const parts = Object.entries(episode.rewards).map(([name, value]) => `${name} ${format(value)}`).join(" + ");
  const facts = element("div", { class: "facts" },
    fact("verdict", episode.success ? "✓ right" : "✗ not right", episode.success ? "right-answer" : "wrong-answer"),
    fact("reward", format(reward(episode)) + (parts ? ` = ${parts}` : "")),
    fact("advantage", format(episode.advantage)), fact("status", episode.status), fact("tokens", String(episode.tokens)),
    fact("difficulty", episode.difficulty || "–"), fact("prompt", `${episode.prompt_id}, sample ${episode.sample}`));
  if (episode.group_rewards) facts.append(fact("rewards of its group", episode.group_rewards.map(format).join(", ")));
  const article = document.getElementById("episode");
  article.replaceChildren(facts);
  if (episode.prompt) article.append(element("div", { class: "box" }, element("h3", {}, "Prompt"), element("p", { class: "text mono" }, episode.prompt)));
  episode.turns.forEach((turn, i) => article.append(drawTurn(turn, i + 1, mode, scale)));
}

function drawViewer() {
  const episodes = byStep.get(viewer.step), at = steps.indexOf(viewer.step);
  viewer.episode = Math.min(viewer.episode, episodes.length - 1);
  document.getElementById("step").value = String(viewer.step);
  document.getElementById("before").disabled = at === 0;
  document.getElementById("after").disabled = at === steps.length - 1;
  const choices = episodes.map((episode, i) => {
    const mark = element("span", { class: episode.success ? "right-answer" : "wrong-answer" }, episode.success ? "✓ " : "✗ ");
    const button = element("button", { type: "button", "aria-pressed": i === viewer.episode }, mark, `${i + 1} · reward ${format(reward(episode))} · advantage ${format(episode.advantage)}`);
    button.addEventListener("click", () => { viewer.episode = i; drawViewer(); });
    return button;
  });
  document.getElementById("choices").replaceChildren(...choices);
  const modes = Object.entries(MODES).map(([mode, name]) => {
    const button = element("button", { type: "button", "aria-pressed": mode === viewer.mode }, name);
    button.addEventListener("click", () => { viewer.mode = mode; drawViewer(); });
    return button;
  });
  document.getElementById("modes").replaceChildren(...modes);
  drawEpisode();
}

if (steps.length) {
  const select = document.getElementById("step");
  for (const step of steps) select.append(element("option", { value: step }, String(step)));
  const go = (step) => { viewer.step = step; drawViewer(); };
  select.addEventListener("change", () => go(Number(select.value)));
  document.getElementById("before").addEventListener("click", () => go(steps[steps.indexOf(viewer.step) - 1]));
  document.getElementById("after").addEventListener("click", () => go(steps[steps.indexOf(viewer.step) + 1]));
  const last = steps[steps.length - 1];
  viewer.episode = Math.max(0, byStep.get(last).findIndex((episode) => episode.advantage)); // one that taught something
  go(last);
}
