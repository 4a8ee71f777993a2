"use strict";

const WORDS = {
  en: {
    running: "running", finished: "finished", pruned: "ended early (pruned)", failed: "failed", stopped: "stopped",
    killed: "killed: the same command continues it", elsewhere: "held on another machine", offline: "train watch does not answer",
    verdict: "verdict", final: "Verdict: ", far: "Verdict so far: ", next: "Next: ", trials: "Trials", answers: "Answers about held-out pictures", step: "step",
    choose: "Press a trial to see its figures, verdict and answers; its lines are thick, with the 95 % interval.",
    untrained: "Nothing has been learnt yet: expect answers that do not fit their pictures.",
    question: "question", truth: "truth", answer: "answer", loss: "Loss", gap: "Grounding gap", rate: "Throughput",
    training: "training", held: "held-out", interval: "95 % interval", nats: "nats per answer token", samples: "samples/s",
    heldLoss: "held-out loss", trainLoss: "training loss", token: ", nats per token",
    memory: "memory", wait: "waits for data", trial: "trial", values: "values", state: "state", waiting: "no evaluation yet",
    at: (step, total) => `step ${step.toLocaleString()}` + (total ? ` of ${total.toLocaleString()}` : ""),
    left: (time) => `${time} left, evaluations not counted`, ago: (time) => `last line ${time} ago`,
    beyond: (n) => `${n} point${n === 1 ? "" : "s"} above the edge`, units: ["s", "min", "h"], count: (n, state) => `${n} ${state}`,
    damaged: (n) => `${n} damaged line${n === 1 ? "" : "s"} left out`, to: (low, high) => `${low} to ${high}`,
    foot: (version) => ["Served by ", `, ${version}. Nothing on this page comes from elsewhere.`],
  },
  zh: {
    running: "训练中", finished: "已完成", pruned: "提前结束（剪枝）", failed: "失败", stopped: "已停止",
    killed: "被杀掉：重跑同一条命令即可继续", elsewhere: "在另一台机器上", offline: "train watch 没有应答",
    verdict: "结论", final: "结论：", far: "目前的结论：", next: "下一步：", trials: "各次训练", answers: "对验证图片的回答", step: "步数",
    choose: "点一次训练，查看它的数值、结论和回答；它的线加粗，并带 95 % 区间。",
    untrained: "还什么都没学：回答与图片对不上是正常的。",
    question: "问题", truth: "真实", answer: "回答", loss: "损失", gap: "Grounding gap", rate: "吞吐量",
    training: "训练", held: "验证", interval: "95 % 区间", nats: "nat/token，只计回答", samples: "样本/秒",
    heldLoss: "验证损失", trainLoss: "训练损失", token: "（nat/token）",
    memory: "内存", wait: "等待数据", trial: "编号", values: "取值", state: "状态", waiting: "还没有验证",
    at: (step, total) => `第 ${step.toLocaleString()} 步` + (total ? `，共 ${total.toLocaleString()} 步` : ""),
    left: (time) => `还需 ${time}（不含验证）`, ago: (time) => `最后一行写于 ${time}前`,
    beyond: (n) => `${n} 个点超出上边`, units: ["秒", "分钟", "小时"], count: (n, state) => `${n} 次${state}`,
    damaged: (n) => `略过 ${n} 个损坏的行`, to: (low, high) => `${low} 到 ${high}`,
    foot: (version) => ["本页由 ", `（${version}）生成，不从别处加载任何内容。`],
  },
};
const [W, H, LEFT, BOTTOM, TOP] = [400, 230, 48, 34, 10]; // of a chart, in its own units
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const at = (id) => document.getElementById(id);
const runs = new Map(); // by name: what the server told last of each, and all `lines` of its metrics
let language = navigator.language.startsWith("zh") ? "zh" : "en", chosen = null, offline = false, begun = false;
const say = (name) => WORDS[language][name];
const version = document.querySelector("footer").lastChild.data.match(/llava-align [\w.+]*\w/)[0]; // in the language of the server

const events = new EventSource("events");
events.onopen = () => { begun = false; };
events.onerror = () => { offline = true; draw(); };
events.onmessage = ({ data }) => {
  if (!begun) runs.clear(); // a new stream tells all anew
  begun = true, offline = false;
  for (const told of JSON.parse(data)) {
    const before = told.anew ? [] : runs.get(told.name)?.lines || [];
    runs.set(told.name, { ...told, lines: [...before, ...told.lines], written: performance.now() - told.age * 1000 });
  }
  draw();
};
setInterval(drawState, 1000);
at("language").onclick = () => { language = language === "zh" ? "en" : "zh"; draw(); };
at("step").onchange = drawAnswers;

const last = (run, key) => run.lines.findLast((line) => line[key] !== undefined && line[key] !== null) || {};
const points = (run, key) => run.lines.filter((line) => Number.isFinite(line[key])).map((line) => [line.step, line[key], line[`${key}_low`], line[`${key}_high`]]);
const decimal = (value, digits = 4) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
const time = (seconds) => { const k = (seconds >= 90) + (seconds >= 5400); return `${(seconds / 60 ** k).toFixed(k > 1 ? 1 : 0)} ${say("units")[k]}`; };
const selected = () => runs.get(chosen) || [...runs.values()].findLast((run) => run.state === "running") || [...runs.values()].at(-1);

function make(tag, text = "", ...children) {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...children);
  return made;
}
function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const stroke = (colour, dash, width) => ({ fill: "none", stroke: `var(--${colour})`, "stroke-dasharray": dash, "stroke-width": width });
const key = (...style) => svg("svg", { class: "key", viewBox: "0 0 32 8", "aria-hidden": "true" }, svg("line", { x1: 0, x2: 32, y1: 4, y2: 4, ...stroke(...style) }));
const styleOf = (name) => { const k = [...runs.keys()].indexOf(name); return [`c${k % 7}`, DASHES[k % 4]]; };

function draw() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  const footer = document.querySelector("footer");
  [footer.firstChild.data, footer.lastChild.data] = say("foot")(version);
  at("language").textContent = language === "zh" ? "English" : "中文";
  drawState();
  const run = selected();
  if (!run) return;
  drawTotals(run);
  drawVerdict(run);
  drawCurves(run);
  drawTrials(run);
  const steps = run.lines.filter((line) => line.eval_captions).map((line) => line.step);
  const select = at("step"), newest = !select.value || select.selectedIndex === select.length - 1 || select.dataset.run !== run.name;
  const kept = newest ? steps.at(-1) : select.value;
  select.replaceChildren(...steps.map((step) => new Option(step.toLocaleString(), step)));
  select.value = kept, select.dataset.run = run.name;
  drawAnswers();
}

function drawState() {
  const line = document.querySelector("header p"), run = selected(), words = [];
  line.className = offline ? "offline" : runs.size === 1 && run ? run.state : "";
  if (offline || !run) { line.textContent = say(offline ? "offline" : "waiting"); return; }
  const states = [...runs.values()].map(({ state }) => say(state)), total = last(run, "total_steps");
  words.push(...new Set(runs.size === 1 ? states : states.map((state) => say("count")(states.filter((other) => other === state).length, state))));
  if (runs.size === 1) {
    const logged = last(run, "samples_per_s"), step = run.lines.at(-1)?.step || 0;
    words.push(say("at")(step, total.total_steps));
    const left = ((total.total_steps - step) * total.batch_size) / logged.samples_per_s;
    if (run.state === "running" && left > 0) words.push(say("left")(time(left)));
  }
  if (run.note) words.push(run.note);
  const newest = Math.max(...[...runs.values()].map(({ written }) => written));
  words.push(say("ago")(time(Math.max(0, performance.now() - newest) / 1000)));
  const damaged = [...runs.values()].reduce((sum, each) => sum + each.damaged, 0);
  if (damaged) words.push(say("damaged")(damaged));
  line.textContent = words.join(" · ");
}

function drawTotals(run) {
  const held = last(run, "eval_loss"), trained = last(run, "loss"), interval = (name) =>
    (Number.isFinite(held[`${name}_low`]) ? say("to")(decimal(held[`${name}_low`]), decimal(held[`${name}_high`])) : "");
  const numbers = [
    [say("heldLoss") + say("token"), decimal(held.eval_loss), interval("eval_loss")], [say("gap").toLowerCase() + say("token"), decimal(held.eval_grounding_gap), interval("eval_grounding_gap")],
    [say("trainLoss") + say("token"), decimal(trained.loss)], [say("samples"), decimal(trained.samples_per_s, 0)],
    [say("wait"), Number.isFinite(trained.data_wait) ? `${(100 * trained.data_wait).toFixed(1)} %` : "–"],
    [say("memory"), Number.isFinite(trained.memory_bytes) ? `${(trained.memory_bytes / 2 ** 30).toFixed(1)} GiB` : "–"],
  ];
  document.querySelector(".totals").replaceChildren(...numbers.map(([name, value, small = ""]) =>
    make("div", "", make("dt", name), make("dd", value, ...(small ? [make("small", small)] : [])))));
}

function drawVerdict({ verdict, state }) {
  at("verdict").hidden = !verdict;
  if (!verdict) return;
  const own = ([en, zh]) => (language === "zh" ? zh : en);
  at("verdict-title").textContent = say(state === "finished" ? "final" : "far") + own(verdict.name);
  at("evidence").replaceChildren(...verdict.evidence.map((text) => make("li", own(text))));
  at("next").textContent = say("next") + own(verdict.next);
}

function drawCurves(run) {
  const all = runs.size > 1, series = (name) => [...runs.values()].map((each) =>
    ({ points: points(each, name), style: [...styleOf(each.name), each === run ? 2.8 : 1.3], strong: each === run }));
  const one = (name) => [{ points: points(run, name), style: ["c0", "", 2], strong: true }];
  const training = { points: points(run, "loss"), style: ["soft", "3 2", 1] };
  const keys = () => [make("span", "", key("c0", "", 2), ` ${say("held")} (${say("interval")})`)];
  at("curves").replaceChildren(
    chart(say("loss"), all ? `${say("held")} · ${say("nats")}` : say("nats"), all ? series("eval_loss") : [training, ...one("eval_loss")],
      all ? [] : [make("span", "", key(...training.style), ` ${say("training")}`), ...keys()]),
    chart(say("gap"), say("nats"), all ? series("eval_grounding_gap") : one("eval_grounding_gap"), all ? [] : keys(), 0),
    chart(say("rate"), say("samples"), all ? series("samples_per_s") : one("samples_per_s"), [], 0));
}

// Lines over steps, with bands where points have an interval. Values from `least` or the lowest on; those far above the others, and
// above all of step 0, are drawn at the edge and counted.
function chart(title, unit, series, keys, least = Infinity) {
  const shown = series.filter((each) => each.points.length), values = shown.flatMap((each) => each.points.map(([, y]) => y)).sort((a, b) => a - b);
  const caption = make("figcaption", "", make("h2", title), make("span", unit), ...keys);
  if (!values.length) return make("figure", "", caption, make("p", say("waiting")));
  const strong = shown.filter((each) => each.strong).flatMap((each) => each.points), median = values[Math.floor(values.length / 2)];
  const low = Math.min(least, values[0], ...strong.map(([, y, from]) => from ?? y));
  const begun = shown.flatMap((each) => each.points.filter(([step]) => !step).map(([, y, , to]) => to ?? y));
  const high = Math.min(Math.max(values.at(-1), ...strong.map(([, y, , to]) => to ?? y)), Math.max(...begun, low + Math.max(8 * (median - low), 0.05 * Math.abs(low), 1e-9)));
  const beyond = values.filter((value) => value > high).length;
  if (beyond) caption.append(make("span", "", say("beyond")(beyond)));
  const bottom = low && low - 0.05 * (high - low), end = Math.max(1, ...shown.map((each) => each.points.at(-1)[0]));
  const x = (step) => LEFT + (step / end) * (W - LEFT - 8), y = (value) => TOP + ((high - Math.min(high, value)) / (high - bottom)) * (H - TOP - BOTTOM);
  const path = (list) => list.map(([a, b], k) => `${k ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
  const drawn = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}, ${unit}` });
  for (const value of ticks(bottom, high)) {
    drawn.append(svg("line", { x1: LEFT, x2: W - 8, y1: y(value), y2: y(value), stroke: "var(--line)" }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, String(+value.toPrecision(6))));
  }
  for (const value of ticks(0, end).filter(Number.isInteger)) drawn.append(svg("text", { x: x(value), y: H - 12, "text-anchor": "middle" }, value.toLocaleString()));
  drawn.append(svg("text", { x: W - 8, y: H + 4, "text-anchor": "end" }, say("step")));
  for (const { points: list, style, strong: bold } of shown) {
    const banded = list.filter(([, , from, to]) => Number.isFinite(from) && Number.isFinite(to));
    if (bold && banded.length) {
      const edge = [...banded.map(([a, , , to]) => [a, to]), ...banded.toReversed().map(([a, , from]) => [a, from])];
      drawn.append(svg("path", { d: `${path(edge)}Z`, fill: `var(--${style[0]})`, opacity: 0.2 }));
    }
    drawn.append(svg("path", { d: path(list), ...stroke(...style) }));
    if (list.length < 60) for (const [a, b] of list) {
      drawn.append(svg("circle", { cx: x(a), cy: y(b), r: style[2] + 0.6, fill: `var(--${style[0]})` }, svg("title", {}, `${say("at")(a)}: ${decimal(b)}`)));
    }
  }
  return make("figure", "", caption, drawn);
}

function ticks(from, to) {
  const rough = (to - from) / 4, power = 10 ** Math.floor(Math.log10(rough)), size = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
  return Array.from({ length: 12 }, (_, k) => (Math.ceil(from / size) + k) * size).filter((value) => value <= to);
}

function drawTrials(run) {
  at("trials").hidden = runs.size < 2;
  const heads = ["trial", "values", "state", "step", "heldLoss", "gap", "samples", "verdict"];
  document.querySelector("#trials tr").replaceChildren(...heads.map((name) => Object.assign(make("th", say(name).toLowerCase()), { scope: "col" })));
  document.querySelector("#trials tbody").replaceChildren(...[...runs.values()].map((each) => {
    const button = make("button", each.name);
    button.prepend(key(...styleOf(each.name), 3), " ");
    button.setAttribute("aria-pressed", String(each === run));
    button.onclick = () => { chosen = each.name; draw(); document.querySelector("#trials [aria-pressed=true]").focus(); };
    const held = last(each, "eval_loss"), verdict = each.verdict ? each.verdict.name[language === "zh" ? 1 : 0] : "–";
    const cells = [each.label, say(each.state), (each.lines.at(-1)?.step || 0).toLocaleString(), decimal(held.eval_loss),
      decimal(held.eval_grounding_gap), decimal(last(each, "samples_per_s").samples_per_s, 0), verdict];
    const row = make("tr", "", make("td", "", button), ...cells.map((text) => make("td", text)));
    row.className = each.state;
    return row;
  }));
}

function drawAnswers() {
  const run = selected(), step = Number(at("step").value), line = run?.lines.findLast((each) => each.eval_captions && each.step === step);
  at("answers").hidden = !line;
  if (!line) return;
  at("untrained").hidden = step > 0 || run.lines.some((each) => each.continued);
  at("samples").replaceChildren(...line.eval_captions.flatMap((each) => {
    const texts = [["truth", each.written], ["answer", each.generated + (each.cut ? "…" : "")]];
    const row = Object.assign(make("dt", `${each.row} · ${each.question}`), { className: "row" });
    return [row, ...texts.flatMap(([name, text]) => [make("dt", say(name)), make("dd", text)])];
  }));
}
draw();
