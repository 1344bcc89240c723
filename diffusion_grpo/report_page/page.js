"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const COLORS = ["#2457c5", "#c2571a", "#11734b", "#8a3fb0", "#a8862a", "#b32d5d", "#24808a", "#6b7078"];
const DARK = ["#86aefc", "#f0a063", "#62cf98", "#cf9bea", "#e2c363", "#f08cb0", "#6fcbd6", "#b3b9c2"];
const DASHES = [undefined, [5, 4], [2, 3], [9, 3, 2, 3]];  // of several metrics of one run, whose color is its own
const state = { run: 0, zoom: null, smooth: 0, evaluation: null, rollout: null, prompt: null, score: "total",
  sort: { key: "difference", down: true }, filter: "", all: false, playing: 0, any: "", follow: true, open: new Set() };

// ---- small helpers -------------------------------------------------------------------------
// Text goes into the page as text nodes only: a prompt is never read as HTML.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const number = (x, digits = 4) => x === null || x === undefined || Number.isNaN(x) ? "–"
  : Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3) ? (+x.toPrecision(3)).toExponential() : String(+x.toPrecision(digits));
// A mean beside another one, with the zeros that say how precise it is: 0.580 → 0.628.
const precise = (x) => x !== 0 && !(Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5) ? number(x, 3)
  : x.toFixed(Math.abs(x) < 1 ? 3 : Math.max(0, 3 - String(Math.trunc(Math.abs(x))).length));
const signed = (x) => x === null || Number.isNaN(x) ? "–" : (x > 0 ? "+" : x < 0 ? "−" : "") + number(Math.abs(x), 3);
const tone = (x) => x > 0 ? "good" : x < 0 ? "bad" : "";
const run = () => data.runs[state.run];
// of some rewards less is better: their weight is below 0
const sign = (name) => (run().evaluations.at(-1)?.summary?.lower || []).includes(name) ? -1 : 1;
const dark = () => document.documentElement.classList.contains("dark");
const filled = new Map();
function fill(select, options, chosen) {
  const key = JSON.stringify(options);  // a list that is open would close if its options were made anew
  if (filled.get(select) !== key) select.replaceChildren(...options.map(([value, text]) => el("option", { value }, text)));
  filled.set(select, key);
  select.value = String(chosen);
}
// A part that stays open when the page is drawn anew.
function foldable(key, text, ...children) {
  const node = el("details", { ontoggle: () => state.open[node.open ? "add" : "delete"](key) }, el("summary", {}, text), ...children);
  node.open = state.open.has(key);
  return node;
}
function duration(seconds) {
  const whole = Math.round(seconds), h = Math.floor(whole / 3600), m = Math.floor(whole % 3600 / 60), s = whole % 60;
  return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

// ---- pictures: a tile is a part of a sheet -------------------------------------------------
const sheets = new Map();
function sheetUrl(source) {
  if (!source.startsWith("data:")) return source;
  if (!sheets.has(source)) {
    const [head, body] = source.split(",", 2);
    const bytes = Uint8Array.from(atob(body), (c) => c.charCodeAt(0));
    sheets.set(source, URL.createObjectURL(new Blob([bytes], { type: head.slice(5).split(";")[0] })));
  }
  return sheets.get(source);
}
function paint(node, entry, index, label) {
  const columns = entry.columns, rows = Math.ceil(entry.prompts.length / columns);
  const x = index % columns, y = Math.floor(index / columns);
  node.style.backgroundImage = `url("${sheetUrl(entry.source)}")`;
  node.style.backgroundSize = `${columns * 100}% ${rows * 100}%`;
  node.style.backgroundPosition = `${columns > 1 ? x / (columns - 1) * 100 : 0}% ${rows > 1 ? y / (rows - 1) * 100 : 0}%`;
  node.style.aspectRatio = `${entry.tile[0]} / ${entry.tile[1]}`;
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", label || entry.prompts[index]);
  return node;
}
function tile(entry, index, caption, kind) {
  const picture = paint(el("div", { class: "picture" }), entry, index);
  const button = el("button", { type: "button", title: "Enlarge", onclick: () => enlarge(entry, index) }, picture);
  return el("figure", { class: "tile " + (kind || "") }, button, el("figcaption", {}, ...caption));
}
function enlarge(entry, index) {
  const dialog = $("zoom");
  paint(dialog.querySelector(".picture"), entry, index);
  const lines = [entry.prompts[index]];
  for (const [name, values] of Object.entries(entry.scores)) lines.push(`${name}: ${number(values[index])}`);
  if (entry.advantages) lines.push(`advantage: ${signed(entry.advantages[index])}`);
  dialog.querySelector("p").textContent = lines.join("\n");
  dialog.showModal();
}
$("zoom").querySelector("button").onclick = () => $("zoom").close();
$("zoom").onclick = (event) => { if (event.target === $("zoom")) $("zoom").close(); };

// ---- summary -------------------------------------------------------------------------------
function subtitle() { $("subtitle").textContent = `${run().status} · ${run().directory}`; }
function summary() {
  const many = data.runs.length > 1, r = run();
  $("title").textContent = many ? data.runs.map((one) => one.name).join(" · ") : r.name;
  subtitle();
  document.title = $("title").textContent;
  $("run-choice").hidden = !many;
  fill($("run"), data.runs.map((one, i) => [i, one.name]), state.run);
  const cards = [];
  const card = (name, value, note, kind) => cards.push(el("div", {}, el("dl", { style: "margin:0" },
    el("dt", {}, name), el("dd", { class: kind || "" }, value, el("small", {}, note || "")))));
  const first = r.evaluations[0], last = r.evaluations.at(-1);
  if (first) {
    for (const name of scoreNames(r)) {
      const before = mean(first.scores[name]), after = mean(last.scores[name]);
      const found = last.summary?.against_base?.[name];
      const won = found && [found.win_rate, found.win_rate_low, found.win_rate_high].map((x) => number(x * 100, 3));
      card(`${name}, ${r.evaluated} prompts${r.gold.includes(name) ? " (gold)" : ""}`, first === last ? precise(before)
        : `${precise(before)} → ${precise(after)}`, first === last ? "before training"
        : `${signed(after - before)}` + (won ? `, wins ${won[0]} % [${won[1]}, ${won[2]}]` : ""),
        first === last ? "" : tone(sign(name) * (after - before)));
    }
  }
  const rows = r.metrics.iteration || [];
  card("iterations", `${rows.length ? rows.at(-1) + 1 : 0} of ${r.iterations}`, r.status);
  const of = (name) => (r.metrics[name] || []).filter((x) => x !== null);
  if (of("kl").length) card("KL to the reference", number(of("kl").at(-1), 3), "last iteration");
  if (r.seconds) card("training time", duration(r.seconds), `${number(of("images_per_second").at(-1), 3)} images/s`);
  $("summary").replaceChildren(...cards);
  $("warnings").hidden = !r.warnings.length;
  $("warnings").querySelector("ul").replaceChildren(...r.warnings.map((text) => el("li", {}, text)));
}
// null is an image that a reward failed on
const mean = (values) => { const known = values.filter((x) => x !== null); return known.reduce((a, b) => a + b, 0) / known.length; };
// `total` says nothing of its own where it is one reward's
const scoreNames = (r) => {
  const names = Object.keys(r.evaluations.at(-1)?.scores || r.rollouts.at(-1)?.scores || {});
  return names.length === 2 && names.includes("total") || r.single ? names.filter((n) => n !== "total") : names;
};

// ---- curves --------------------------------------------------------------------------------
let plots = [];
function smoothed(values) {
  if (!state.smooth) return values;
  let level = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    level = state.smooth * level + (1 - state.smooth) * value;
    weight = state.smooth * weight + (1 - state.smooth);
    return level / weight;
  });
}
function chart(place, title, names, height) {
  const runs = data.runs.map((r, i) => [r, i]);
  const series = [], labels = [];
  for (const [r, i] of runs) for (const name of names) {
    const values = r.metrics[name];
    if (!values || values.every((x) => x === null)) continue;
    const points = values.map((value, k) => [r.metrics.iteration[k] + 1, value]);
    if (name.startsWith("eval/")) for (const e of r.evaluations) {
      const value = e.iteration === 0 || !points.some(([x, y]) => x === e.iteration && y !== null) ? e.metrics?.[name] : undefined;
      if (value !== undefined && value !== null) points.push([e.iteration, value]);
    }
    const merged = new Map();
    for (const [x, y] of points) if (y !== null || !merged.has(x)) merged.set(x, y);
    const sorted = [...merged].sort((a, b) => a[0] - b[0]);
    series.push({ xs: sorted.map((p) => p[0]), ys: smoothed(sorted.map((p) => p[1])), name, run: i });
  }
  if (!series.length) return;
  const xs = [...new Set(series.flatMap((s) => s.xs))].sort((a, b) => a - b);
  const columns = series.map((s) => {
    const at = new Map(s.xs.map((x, k) => [x, s.ys[k]]));
    return xs.map((x) => at.get(x) ?? null);
  });
  const palette = dark() ? DARK : COLORS;
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--muted").trim(), grid = style.getPropertyValue("--grid").trim();
  const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid }, font: "11px system-ui, sans-serif" };
  const node = el("div", { class: "chart" }, el("h3", { title: names.map((n) => [n, data.docs[n] || data.docs[n.replace(/^eval\//, "")]]).map(([n, text]) => text ? `${n}: ${text}` : n).join("\n") }, title));
  place.append(node);
  const many = data.runs.length > 1;
  const plot = new uPlot({
    width: Math.max(240, node.clientWidth), height: height || 190,
    cursor: { sync: { key: "all" }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
    scales: { x: { time: false }, y: { range: (u, low, high) => low === null ? [0, 1]
      : low === high ? [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : uPlot.rangeNum(low, high, 0.1, true) } },
    axes: [{ ...axis, values: (u, ticks) => ticks.map((t) => Number.isInteger(t) ? t : "") },
      { ...axis, size: 58, values: (u, ticks) => ticks.map((t) => number(t, 4)) }],
    hooks: {
      setSelect: [(u) => {
        if (u.select.width < 4) return;
        zoomTo(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"));
        u.setSelect({ width: 0, height: 0, left: 0, top: 0 }, false);
      }],
      ready: [(u) => u.over.addEventListener("dblclick", () => zoomTo(null))],
    },
    series: [{ label: "iteration", value: (u, v) => v === null ? "–" : v },
      ...series.map((s, i) => {
        const color = palette[(many ? s.run : i) % palette.length];
        const short = s.name.replace(/^eval\//, `${data.runs[s.run].evaluated} prompts: `).replace(/\/mean$/, "");
        return { label: many ? `${data.runs[s.run].name}${names.length > 1 ? " · " + short : ""}` : short,
          stroke: color, width: 1.75, spanGaps: true,
          dash: many ? DASHES[names.indexOf(s.name) % DASHES.length] : undefined,
          points: { show: s.name.startsWith("eval/") || s.xs.length < 30, size: 5, fill: color },
          value: (u, v) => v === null ? "–" : number(v) };
      })],
  }, [xs, ...columns], node);
  node.dataset.metrics = names.join(" ");
  plots.push({ plot, node, low: xs[0], high: xs.at(-1) });
}
function zoomTo(low, high) {
  state.zoom = low === null ? null : [low, high];
  for (const { plot, low: a, high: b } of plots) plot.setScale("x", state.zoom ? { min: low, max: high } : { min: a, max: b });
}
function curves() {
  for (const { plot } of plots) plot.destroy();
  plots = [];
  $("charts").replaceChildren(); $("any-chart").replaceChildren();
  const names = [...new Set(data.runs.flatMap((r) => Object.keys(r.metrics)))].filter((n) => n !== "iteration");
  const rewards = [...new Set(data.runs.flatMap((r) => [...Object.keys(r.evaluations[0]?.scores || {}), ...Object.keys(r.rollouts[0]?.scores || {})]))].filter((n) => n !== "total");
  chart($("charts"), "Reward", ["reward/mean", "eval/reward/mean"]);
  const gold = [...new Set(data.runs.flatMap((r) => r.gold))];
  const alone = data.runs.every((r) => r.single);  // the one reward that is trained on is drawn already
  for (const name of rewards) if (rewards.length > 1 && !(alone && !gold.includes(name) && data.runs.length === 1))
    chart($("charts"), gold.includes(name) ? `${name} (gold)` : name, [`reward/${name}/mean`, `eval/reward/${name}/mean`]);
  const groups = [["KL to the reference", ["kl", "eval/kl"]], ["KL of an update", ["approx_kl"]], ["Clip fraction", ["clip_fraction"]],
    ["Ratio", ["ratio/min", "ratio/mean", "ratio/max"]], ["Drift of log-probs", ["ratio/drift"]],
    ["Diversity", ["diversity", "eval/diversity"]], ["Loss", ["loss", "policy_loss"]], ["Gradient norm", ["grad_norm"]],
    ["Groups without a signal", ["advantage/zero_groups"]], ["Spread within a group", ["reward/group_std"]],
    ...[["Sharpness", "sharpness"], ["Saturation", "saturation"], ["Brightness", "brightness"], ["JPEG size", "jpeg_kilobytes"]]
      .map(([title, name]) => [title, [name, `eval/${name}`]]),
    ["Time split (s)", ["time/sample", "time/reward", "time/update", "time/evaluate"]], ["Images per second", ["images_per_second"]]];
  for (const [title, list] of groups) chart($("charts"), title, list);
  if (!names.includes(state.any)) state.any = names[0] || "";
  fill($("any"), names.sort().map((n) => [n, n]), state.any);
  if (state.any) chart($("any-chart"), state.any, [state.any], 220);
  if (state.zoom) zoomTo(...state.zoom);
}

// ---- pictures over the run -----------------------------------------------------------------
const scoreOf = (entry, name, i) => (entry.scores[name] || entry.scores.total)[i];
function lapse() {
  const list = run().evaluations;
  $("lapse").hidden = $("swipe").hidden = $("extremes").hidden = $("prompts").hidden = !list.length;
  if (!list.length) return;
  if (state.evaluation === null || state.evaluation >= list.length || state.follow) state.evaluation = list.length - 1;
  const slider = $("lapse-slider");
  slider.max = list.length - 1; slider.value = state.evaluation;
  slider.disabled = $("lapse-play").disabled = list.length < 2;
  const entry = list[state.evaluation];
  $("lapse-note").textContent = `The same ${run().evaluated} prompts and seeds as training goes on.`;
  $("lapse-label").textContent = entry.iteration ? `after ${entry.iteration} iterations` : "before training";
  const shown = state.all ? entry.prompts.length : Math.min(24, entry.prompts.length);
  $("lapse-more").hidden = shown === entry.prompts.length;
  $("lapse-more").textContent = `Show all ${entry.prompts.length}`;
  $("lapse-grid").replaceChildren(...Array.from({ length: shown }, (_, i) =>
    tile(entry, i, [el("span", {}, entry.prompts[i]), el("b", {}, number(scoreOf(entry, state.score, i), 3))])));
}
function swipe() {
  const list = run().evaluations;
  if (!list.length) return;
  const before = list[0], after = list.at(-1);
  // At first the prompt that gained most: the first one's pictures may show nothing.
  const gains = before.prompts.map((_, j) => sign(state.score) * (scoreOf(after, state.score, j) - scoreOf(before, state.score, j)));
  const most = gains.reduce((best, gain, j) => gain > gains[best] ? j : best, 0);
  const i = state.shown = Math.min(state.prompt ?? most, before.prompts.length - 1);
  fill($("swipe-prompt"), before.prompts.map((text, j) => [j, text]), i);
  paint($("swipe-before"), before, i, "before: " + before.prompts[i]);
  paint($("swipe-after"), after, i, "after: " + after.prompts[i]);
  const a = scoreOf(before, state.score, i), b = scoreOf(after, state.score, i);
  $("swipe-caption").textContent = `${before.prompts[i]} — before ${number(a, 3)} (left), after ${after.iteration} iterations ${number(b, 3)} (right)`;
}
function swipeTo(value) {
  $("swipe-range").value = value;
  $("swipe-after").style.clipPath = `inset(0 0 0 ${value}%)`;
  $("swipe-line").style.left = `${value}%`;
}
function extremes() {
  const r = run(), list = r.evaluations;
  if (!list.length) return;
  const names = scoreNames(r), last = list.at(-1);
  if (!names.includes(state.score)) state.score = names[0];
  for (const id of ["extremes-by", "prompts-by"]) fill($(id), names.map((n) => [n, n]), state.score);
  const order = last.prompts.map((_, i) => i).filter((i) => scoreOf(last, state.score, i) !== null).sort((i, j) => sign(state.score) * (scoreOf(last, state.score, j) - scoreOf(last, state.score, i)));
  const draw = (i) => tile(last, i, [el("b", {}, number(scoreOf(last, state.score, i), 3)), el("span", {}, last.prompts[i])]);
  const count = Math.min(8, Math.ceil(order.length / 2));
  $("best").replaceChildren(...order.slice(0, count).map(draw));
  $("worst").replaceChildren(...order.slice(-count).reverse().map(draw));
}

// ---- table ---------------------------------------------------------------------------------
function table() {
  const list = run().evaluations;
  if (!list.length) return;
  const before = list[0], after = list.at(-1), tasks = after.tasks;
  const columns = [["prompt", "Prompt"], ...(tasks ? [["task", "Task"]] : []), [null, "Before"], [null, "After"],
    ["before", "Before"], ["after", "After"], ["difference", "Difference"]];
  const arrow = (key) => state.sort.key === key ? (state.sort.down ? " ↓" : " ↑") : "";
  $("table").querySelector("thead").replaceChildren(el("tr", {}, ...columns.map(([key, text]) => {
    if (!key) return el("th", { scope: "col" }, el("span", { class: "visually-hidden" }, text + " picture"));
    const sorted = state.sort.key === key ? (state.sort.down ? "descending" : "ascending") : "none";
    return el("th", { scope: "col", "aria-sort": sorted }, el("button", { type: "button", "data-key": key, onclick: () => {
      state.sort = { key, down: state.sort.key === key ? !state.sort.down : key !== "prompt" && key !== "task" };
      table();
    } }, text + arrow(key)));
  })));
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  let rows = after.prompts.map((prompt, i) => {
    const a = scoreOf(before, state.score, i), b = scoreOf(after, state.score, i);
    return { i, prompt, task: tasks ? tasks[i] : "", before: a, after: b, difference: a === null || b === null ? null : b - a };
  }).filter((row) => words.every((word) => (row.prompt + " " + row.task).toLowerCase().includes(word)));
  const { key, down } = state.sort;
  rows.sort((x, y) => (typeof x[key] === "string" ? x[key].localeCompare(y[key]) : x[key] - y[key]) * (down ? -1 : 1));
  $("filter-count").textContent = `${rows.length} of ${after.prompts.length}`;
  $("table").querySelector("tbody").replaceChildren(...rows.map((row) => el("tr", {},
    el("td", {}, row.prompt), ...(tasks ? [el("td", { class: "task" }, row.task)] : []),
    el("td", {}, paint(el("div", { class: "picture" }), before, row.i, "before: " + row.prompt)),
    el("td", {}, paint(el("div", { class: "picture" }), after, row.i, "after: " + row.prompt)),
    el("td", { class: "number" }, number(row.before)), el("td", { class: "number" }, number(row.after)),
    el("td", { class: "number " + tone(sign(state.score) * row.difference) }, signed(row.difference)))));
}

// ---- groups --------------------------------------------------------------------------------
function groups() {
  const list = run().rollouts;
  $("groups").hidden = !list.length;
  if (!list.length) return;
  if (state.rollout === null || state.rollout >= list.length || state.follow) state.rollout = list.length - 1;
  const slider = $("groups-slider"), entry = list[state.rollout];
  slider.max = list.length - 1; slider.value = state.rollout; slider.disabled = list.length < 2;
  $("groups-label").textContent = `iteration ${entry.iteration + 1}`;
  $("groups-note").textContent = "The images that GRPO compares with each other: reward, and advantage within the group."
    + (run().rollouts_left_out ? ` ${run().rollouts_left_out} iterations are left out to keep the page small.` : "");
  const nodes = [];
  for (let start = 0; start < entry.prompts.length; start += entry.group) {
    const members = Array.from({ length: Math.min(entry.group, entry.prompts.length - start) }, (_, k) => start + k);
    const average = mean(members.map((i) => entry.scores.total[i]));
    nodes.push(el("div", { class: "group" },
      el("p", {}, entry.prompts[start], el("span", { class: "muted" }, `  mean ${number(average, 3)}`)),
      el("div", { class: "row" }, ...members.map((i) => {
        const advantage = entry.advantages ? entry.advantages[i] : 0;
        return tile(entry, i, [el("b", {}, number(entry.scores.total[i], 3)), " ",
          el("span", { class: tone(advantage) }, `A ${signed(advantage)}`)], advantage > 0 ? "up" : advantage < 0 ? "down" : "");
      }))));
  }
  $("groups-list").replaceChildren(...nodes);
}
function events() {
  $("events").hidden = data.runs.every((r) => !r.events.length);
  $("events-list").replaceChildren(...data.runs.filter((r) => r.events.length).map((r) =>
    foldable(`events of ${r.name}`, data.runs.length > 1 ? `${r.name}: ${r.events.length}` : `${r.events.length} events`,
      el("table", {}, ...r.events.map((e) => el("tr", {}, el("td", { class: "muted" }, e.time.replace("T", " ").replace("+00:00", " UTC")),
        el("td", { class: "number" }, String(e.iteration)), el("td", {}, e.text)))))));
}
function config() {
  $("config-list").replaceChildren(...data.runs.map((r) =>
    foldable(`configuration of ${r.name}`, r.name, el("pre", {}, r.config))));
}
function navigation() {
  const names = { summary: "Summary", curves: "Curves", lapse: "Time-lapse", swipe: "Before and after", extremes: "Best and worst", prompts: "Prompts", groups: "Groups", events: "Events", config: "Configuration" };
  $("nav").replaceChildren(el("div", {}, ...Object.entries(names).filter(([id]) => !$(id).hidden).map(([id, text]) => el("a", { href: "#" + id }, text))));
}
function pictures() { extremes(); lapse(); swipe(); table(); groups(); }
function everything() { summary(); curves(); pictures(); events(); config(); navigation(); }

// ---- controls ------------------------------------------------------------------------------
function setTheme(name) { document.documentElement.classList.toggle("dark", name === "dark"); }
const prefers = matchMedia("(prefers-color-scheme: dark)");
setTheme(prefers.matches ? "dark" : "light");
prefers.addEventListener("change", () => { setTheme(prefers.matches ? "dark" : "light"); curves(); });
$("theme").onclick = () => { setTheme(dark() ? "light" : "dark"); curves(); };
$("run").onchange = (e) => { state.run = +e.target.value; state.evaluation = state.rollout = null; summary(); pictures(); navigation(); };
$("smooth").oninput = (e) => { state.smooth = +e.target.value; curves(); };
$("unzoom").onclick = () => zoomTo(null);
$("any").onchange = (e) => { state.any = e.target.value; curves(); };
$("lapse-slider").oninput = (e) => { state.follow = false; state.evaluation = +e.target.value; lapse(); };
$("lapse-more").onclick = () => { state.all = true; lapse(); };
$("lapse-play").onclick = () => {
  if (state.playing) { clearInterval(state.playing); state.playing = 0; $("lapse-play").textContent = "Play"; return; }
  $("lapse-play").textContent = "Stop"; state.follow = false;
  state.playing = setInterval(() => { state.evaluation = (state.evaluation + 1) % run().evaluations.length; lapse(); }, 700);
};
$("swipe-prompt").onchange = (e) => { state.prompt = +e.target.value; swipe(); };
const turn = (by) => { const n = run().evaluations[0].prompts.length; state.prompt = (state.shown + by + n) % n; swipe(); };
$("swipe-prev").onclick = () => turn(-1);
$("swipe-next").onclick = () => turn(1);
$("swipe-range").oninput = (e) => swipeTo(+e.target.value);
for (const id of ["extremes-by", "prompts-by"]) $(id).onchange = (e) => { state.score = e.target.value; pictures(); };
$("filter").oninput = (e) => { state.filter = e.target.value; table(); };
$("groups-slider").oninput = (e) => { state.follow = false; state.rollout = +e.target.value; groups(); };
let resizing = 0;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(curves, 150); });

everything();
swipeTo(50);

// ---- live ----------------------------------------------------------------------------------
if (data.live) {
  let tag = "";
  const look = async () => {
    try {
      const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag") || "";
        Object.assign(data, await answer.json());
        everything();
      } else if (answer.status === 304) subtitle();  // the server may have been away
    } catch { $("subtitle").textContent = "the server has stopped"; }
    setTimeout(look, data.live * 1000);
  };
  setTimeout(look, data.live * 1000);
}
})();
