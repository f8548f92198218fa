"use strict";
// One patient's visit: photos and a CSV to /v1/triage, its answer to a ranked list. Everything lives in this page's
// memory: no storage, no cookie, no address but this server's.

const $ = (id) => document.getElementById(id);
const BANDS = {
  refer: { mark: "▲", label: "Refer" },
  "cannot judge": { mark: "?", label: "Cannot judge" },
  routine: { mark: "●", label: "Routine" },
  low: { mark: "○", label: "Low" },
  none: { mark: "–", label: "No band" },
};
const MODES = {
  image: "picture alone", record: "record alone", visit: "record and visit",
  image_record: "picture and record", image_visit: "picture, record and visit",
};
const NARROW = matchMedia("(max-width: 900px)");
const RETRIES = 6;
const SVG = "http://www.w3.org/2000/svg";

let model = null, token = "", answer = null, request = null;
let photos = new Map(), csv = null, leftOut = [];
let lesions = [], shown = [], current = null, opener = null;
let rows = new Map(), urls = new Map(), heatmaps = new Map(), heat = false, only = new Set(), scale = null;

// ---- small things

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "circle", "line", "text", "g", "rect", "title"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const stem = (name) => name.replace(/\.[^.]*$/, "") || name;
const megabytes = (n) => (n < 1e6 ? `${Math.max(1, Math.round(n / 1e3))} kB` : `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)} MB`);
const bandOf = (lesion) => lesion.band || "none";
const logit = (p) => Math.log(p / (1 - p));
const clip = (p) => Math.min(1 - 1e-9, Math.max(1e-9, p));

function number(p) {
  const v = 100 * p;
  if (v > 99.9) return ">99.9";
  if (v >= 99) return v.toFixed(1);
  if (v >= 10) return v.toFixed(0);
  if (v >= 1) return v.toFixed(1);
  if (v < 0.001) return "<0.001";
  return Number(v.toPrecision(2)).toFixed(v >= 0.1 ? 2 : v >= 0.01 ? 3 : 4);
}
const percent = (p) => (p === null ? "not scored" : `${number(p)} %`);
const span = (interval) => (interval ? `${number(interval.low)} – ${number(interval.high)} %` : "");
const announce = (words) => { $("said").textContent = words; };

function complain(words) {
  const box = $("problem");
  box.replaceChildren();
  box.hidden = !words;
  if (words) box.append(words);
}

// ---- the server

function send(method, path, body, progress) {
  // XMLHttpRequest, since fetch doesn't say how much has been sent.
  return new Promise((resolve, reject) => {
    const call = new XMLHttpRequest();
    call.open(method, path);
    call.setRequestHeader("Accept", "application/json");
    if (token) call.setRequestHeader("Authorization", `Bearer ${token}`);
    if (progress) {
      call.upload.addEventListener("progress", (event) => progress(event.loaded, event.total));
      call.upload.addEventListener("load", () => progress(1, 1));
    }
    call.addEventListener("load", () => {
      let data = {};
      try { data = JSON.parse(call.responseText); } catch { /* a proxy's page, say: the status tells enough */ }
      resolve({ status: call.status, data, retry: Number(call.getResponseHeader("Retry-After")) || 2 });
    });
    call.addEventListener("error", () => reject(new Error("The server can't be reached. It may have been stopped, or the connection was cut.")));
    call.addEventListener("abort", () => reject(new DOMException("cancelled", "AbortError")));
    if (body instanceof FormData && request) request.abort = () => call.abort();
    call.send(body || null);
  });
}

async function ask(method, path, body, { progress, waiting } = {}) {
  for (let tries = 0; ; tries += 1) {
    const got = await send(method, path, body, progress);
    if (got.status === 401) { await askToken(); continue; }
    if (got.status === 503 && tries < RETRIES) {
      const seconds = Math.min(30, got.retry) + Math.random();
      if (waiting) waiting(got.data.error || "busy", seconds);
      await pause(1000 * seconds);
      continue;
    }
    if (got.status === 200) return got.data;
    const error = new Error(got.data.error || `The server answered ${got.status}.`);
    error.data = got.data;
    throw error;
  }
}

function pause(milliseconds) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    if (request) request.abort = () => { clearTimeout(timer); reject(new DOMException("cancelled", "AbortError")); };
  });
}

let asking = null;
function askToken() {
  if (asking) return asking;
  const dialog = $("token-dialog");
  if (token) $("token-why").textContent = "The server refused that token. Check it for a missing letter.";
  $("token").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  asking = new Promise((resolve, reject) => {
    dialog.addEventListener("close", () => {
      asking = null;
      token = $("token").value.trim();
      $("token").value = "";
      if (dialog.returnValue === "given" && token) resolve();
      else reject(new DOMException("cancelled", "AbortError"));
    }, { once: true });
  });
  return asking;
}
$("token-form").addEventListener("submit", () => { $("token-dialog").returnValue = "given"; });
$("token-form").querySelector(".primary").value = "given";
$("token-cancel").addEventListener("click", () => { $("token").value = ""; $("token-dialog").close("cancelled"); });

async function introduce() {
  if (model) return;
  try {
    model = await ask("GET", "/v1/model");
    $("model").textContent = `${model.model}, bundle ${String(model.bundle).slice(0, 12)}`;
    $("synthetic").hidden = !model.synthetic;
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  }
}

// ---- what is taken in

function take(files) {
  complain("");
  for (const { file, path } of files) {
    const name = file.name;
    if (/^\.|^(Thumbs\.db|desktop\.ini)$/i.test(name)) continue;
    if (/\.csv$/i.test(name)) {
      if (csv && csv.name !== name) leftOut.push([csv.name, `another CSV, ${name}, was added after it`]);
      csv = file;
    } else if (/\.(jpe?g|png)$/i.test(name)) {
      const same = photos.get(stem(name));
      if (same && same.name === name && same.size === file.size && same.lastModified === file.lastModified) continue;
      if (same) leftOut.push([path, "another photo has the same name: rename one of them"]);
      else photos.set(stem(name), file);
    } else leftOut.push([path, "neither a JPEG or PNG photo nor a CSV"]);
  }
  showTaken();
}

function showTaken() {
  const bytes = [...photos.values()].reduce((sum, file) => sum + file.size, 0) + (csv ? csv.size : 0);
  const parts = [];
  if (photos.size) parts.push(count(photos.size, "photo"));
  if (csv) parts.push(csv.name);
  $("taken").hidden = !parts.length && !leftOut.length;
  $("taken-text").textContent = parts.length ? `${parts.join(" and ")}, ${megabytes(bytes)}` : "Nothing here that can be ranked.";
  const list = $("left-out");
  list.hidden = !leftOut.length;
  list.querySelector("summary").textContent = `${count(leftOut.length, "file")} left out`;
  list.querySelector("ul").replaceChildren(...leftOut.slice(0, 200).map(([name, why]) => make("li", {}, make("b", {}, name), ` ${why}`)));
  $("start").hidden = !parts.length;
  $("start").textContent = photos.size ? `Rank ${count(photos.size, "lesion")}` : "Rank the CSV's lesions";
  if (parts.length && !$("start").matches(":focus")) $("start").focus({ preventScroll: true });
}

async function walk(entries) {
  const found = [];
  const queue = [...entries];
  while (queue.length) {
    const entry = queue.shift();
    if (entry.isFile) {
      // A file that has gone meanwhile is named, not the end of all others.
      const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
      if (file) found.push({ file, path: entry.fullPath.slice(1) });
      else leftOut.push([entry.fullPath.slice(1), "could not be read"]);
    } else {
      const reader = entry.createReader();
      for (;;) { // Browsers hand out a hundred at a time.
        const some = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
        if (!some.length) break;
        queue.push(...some);
      }
    }
  }
  return found;
}

const fromInput = (input) => {
  take([...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name })));
  input.value = "";
};
for (const [button, input] of [["choose-photos", "photos"], ["choose-folder", "folder"], ["choose-csv", "csv"]]) {
  $(button).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", () => fromInput($(input)));
}
// Anywhere on the page: a photo that misses the box must not make the browser leave the page for it.
addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
addEventListener("drop", async (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (!document.body.classList.contains("start")) { announce("Begin a new visit to add photos."); return; }
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  const files = [...event.dataTransfer.files].map((file) => ({ file, path: file.name }));
  take(entries.length ? await walk(entries) : files);
});

function stage(name) {
  for (const part of ["intake", "working", "results"]) $(part).hidden = part !== name;
  document.body.className = { intake: "start", working: "busy", results: "done" }[name];
  $("actions").hidden = name !== "results";
}

function clear() {
  for (const url of urls.values()) URL.revokeObjectURL(url);
  urls.clear(); rows.clear(); heatmaps.clear(); only.clear(); photos.clear(); // Cleared here, not kept anywhere else.
  csv = null; leftOut = []; lesions = []; shown = []; answer = null; current = null; heat = false;
  for (const part of ["list", "panel", "summary-text", "bands", "shown", "said"]) $(part).replaceChildren();
  $("errors").querySelector("ul").replaceChildren();
  $("find").value = ""; $("sort").value = "rank";
  document.title = "Triage of a visit";
  complain("");
  stage("intake");
  showTaken();
}

// ---- asking

async function start() {
  complain("");
  const bytes = [...photos.values()].reduce((sum, file) => sum + file.size, 0);
  const limits = (model && model.limits) || {};
  if (limits.visit && photos.size > limits.visit) return complain(`${count(photos.size, "photo")}: the server takes ${limits.visit.toLocaleString("en")} of one visit.`);
  if (limits.visit_body && bytes > limits.visit_body) return complain(`The photos are ${megabytes(bytes)}: the server takes ${megabytes(limits.visit_body)} of one visit. Send close-up crops, not whole photographs.`);
  const form = new FormData();
  for (const file of photos.values()) form.append("images", file, file.name);
  if (csv) form.append("metadata", csv, csv.name);
  form.append("options", JSON.stringify({ reasons: true }));
  stage("working");
  $("working-title").textContent = photos.size ? `Ranking ${count(photos.size, "lesion")}` : "Ranking the CSV's lesions";
  const began = performance.now();
  let sent = false;
  const progress = (loaded, total) => {
    if (loaded >= total) { sent = true; $("progress").removeAttribute("value"); $("working-text").textContent = "The model looks at the lesions."; return; }
    $("progress").value = loaded / total;
    $("working-text").textContent = `Sending: ${Math.round((100 * loaded) / total)} % of ${megabytes(total)}`;
  };
  const clock = setInterval(() => {
    const seconds = Math.round((performance.now() - began) / 1000);
    if (sent && seconds > 3) $("working-text").textContent = `The model looks at the lesions: ${seconds} s`;
  }, 1000);
  request = {};
  $("working-text").textContent = "Sending";
  $("cancel").focus();
  try {
    await introduce();
    const got = await ask("POST", "/v1/triage", form, {
      progress,
      waiting: (why, seconds) => { sent = false; $("working-text").textContent = `The server is ${why.includes("ready") ? "starting" : "busy"}; trying again in ${Math.round(seconds)} s.`; },
    });
    present(got);
  } catch (error) {
    stage("intake");
    showTaken();
    if (error.name === "AbortError") announce("Cancelled.");
    else complain(problem(error));
  } finally {
    clearInterval(clock);
    request = null;
  }
}

function problem(error) {
  const list = (error.data && error.data.errors) || [];
  const words = make("div", {}, make("p", {}, error.message));
  if (list.length) words.append(make("ul", {}, list.slice(0, 50).map((one) => make("li", {}, make("b", {}, one.file || one.id), ` ${one.error}`))));
  return words;
}

$("start").addEventListener("click", start);
$("clear").addEventListener("click", clear);
$("cancel").addEventListener("click", () => request && request.abort && request.abort());
$("again").addEventListener("click", () => { clear(); $("choose-photos").focus(); });

// ---- the list

function present(got) {
  answer = got;
  lesions = got.lesions;
  scale = makeScale(lesions);
  stage("results");
  if (got.notice) $("notice").textContent = got.notice;
  const { summary } = got;
  const unscored = lesions.filter((one) => one.probability === null).length;
  const mode = Object.entries(summary.modes).map(([name, n]) => (Object.keys(summary.modes).length > 1 ? `${n} by ${MODES[name] || name}` : `by ${MODES[name] || name}`));
  const lines = [`${count(summary.lesions, "lesion")}, scored ${mode.join(", ")}${unscored ? `, ${unscored} not at all` : ""}.`];
  if (summary.prevalence) lines.push(`Probabilities are for a clinic where about 1 lesion in ${Math.round(1 / summary.prevalence).toLocaleString("en")} is malignant.`);
  const context = got.context || {};
  for (const note of [context.note, ...(context.notes || [])]) if (note) lines.push(`${note[0].toUpperCase()}${note.slice(1)}.`);
  $("summary-text").textContent = lines.join(" ");
  const errors = $("errors");
  const refused = [...leftOut.map(([file, error]) => ({ file, error })), ...got.errors];
  errors.hidden = !refused.length;
  errors.open = refused.length > 0 && refused.length <= 3;
  errors.querySelector("summary").textContent = `${count(refused.length, "file")} not used`;
  errors.querySelector("ul").replaceChildren(...refused.map((one) => make("li", {}, make("b", {}, one.file || one.id), ` ${one.error}`)));
  drawBands(summary.bands);
  drawAxis();
  rows = new Map(lesions.map((lesion) => [lesion.id, makeRow(lesion)]));
  arrange();
  select(shown[0] || null, { quiet: true });
  document.title = `${count(summary.lesions, "lesion")} ranked`;
  scrollTo(0, 0);
  $("main").focus({ preventScroll: true });
  announce(`${count(summary.lesions, "lesion")} ranked. ${count(summary.bands.refer || 0, "lesion")} to refer.`);
}

function drawBands(counts) {
  const buttons = Object.keys(BANDS).filter((name) => counts[name]).map((name) => {
    const button = make("button", { type: "button", class: `chip ${slug(name)}`, "aria-pressed": "false", "data-band": name },
      make("span", { class: "mark", "aria-hidden": "true" }, BANDS[name].mark), ` ${BANDS[name].label} `, make("b", {}, counts[name].toLocaleString("en")));
    button.addEventListener("click", () => {
      if (!only.delete(name)) only.add(name);
      button.setAttribute("aria-pressed", String(only.has(name)));
      arrange();
    });
    return button;
  });
  $("bands").replaceChildren(...buttons);
}
const slug = (band) => band.replace(" ", "-");

function badge(lesion) {
  const { mark, label } = BANDS[bandOf(lesion)] || BANDS.none;
  return make("span", { class: `band ${slug(bandOf(lesion))}` }, make("span", { class: "mark", "aria-hidden": "true" }, mark), ` ${label}`);
}

const SORTS = {
  rank: (a, b) => a.rank - b.rank,
  name: (a, b) => a.id.localeCompare(b.id, "en", { numeric: true }),
  site: (a, b) => (a.site || "~").localeCompare(b.site || "~", "en") || a.rank - b.rank,
  size: (a, b) => (b.size_mm ?? -1) - (a.size_mm ?? -1) || a.rank - b.rank,
  unsure: (a, b) => width(b) - width(a) || a.rank - b.rank,
};
const width = (lesion) => (lesion.interval ? logit(clip(lesion.interval.high)) - logit(clip(lesion.interval.low)) : -1);

function arrange() {
  const words = $("find").value.trim().toLowerCase();
  shown = lesions.filter((one) => (!only.size || only.has(bandOf(one)))
    && (!words || [one.id, one.file, one.site, ...one.reasons, ...one.doubts].join(" ").toLowerCase().includes(words)));
  shown.sort(SORTS[$("sort").value]);
  $("list").replaceChildren(...shown.map((one) => rows.get(one.id).item));
  if (!shown.length) $("list").append(make("li", { class: "nothing" }, "No lesion is of this kind."));
  $("shown").textContent = shown.length === lesions.length ? "" : `${shown.length.toLocaleString("en")} of ${count(lesions.length, "lesion")} shown`;
  // Tab reaches the list even where the selected lesion is filtered away.
  for (const one of shown) rows.get(one.id).button.tabIndex = -1;
  const stop = shown.includes(current) ? current : shown[0];
  if (stop) rows.get(stop.id).button.tabIndex = 0;
}

function makeRow(lesion) {
  const image = make("img", { alt: "", decoding: "async", width: 56, height: 56 });
  const crop = make("span", { class: "crop" }, fileOf(lesion) ? image : make("span", { class: "blank" }, "no photo"));
  const whisker = make("span", { class: "whisker", "aria-hidden": "true" });
  if (lesion.probability !== null && scale) {
    const line = make("i", { class: "line" }), dot = make("i", { class: `dot ${slug(bandOf(lesion))}` });
    const { low, high } = lesion.interval || { low: lesion.probability, high: lesion.probability };
    line.style.left = `${100 * scale.at(low)}%`;
    line.style.width = `${100 * (scale.at(high) - scale.at(low))}%`;
    dot.style.left = `${100 * scale.at(lesion.probability)}%`;
    whisker.append(line, dot);
  }
  const said = lesion.doubts.length ? lesion.doubts : lesion.reasons;
  const where = [lesion.site, lesion.size_mm ? `${lesion.size_mm.toFixed(1)} mm` : null].filter(Boolean).join(", ");
  const button = make("button", { type: "button", class: "row", tabindex: -1 },
    make("span", { class: "rank" }, String(lesion.rank)), crop,
    make("span", { class: "who" }, make("span", { class: "name" }, lesion.id, where && make("small", {}, where)), make("span", { class: "why" }, said.join("; "))),
    badge(lesion),
    make("span", { class: "p" }, percent(lesion.probability), make("small", {}, span(lesion.interval))),
    whisker);
  const item = make("li", { "data-id": lesion.id }, button);
  button.addEventListener("click", () => { select(lesion, { open: true }); });
  image.lesion = lesion;
  if (fileOf(lesion)) near.observe(image);
  return { item, button, image };
}

function fileOf(lesion) { return (lesion.file && photos.get(stem(lesion.file))) || photos.get(lesion.id) || null; }
function urlOf(lesion) {
  const file = fileOf(lesion);
  if (file && !urls.has(lesion.id)) urls.set(lesion.id, URL.createObjectURL(file));
  return urls.get(lesion.id) || null;
}
// Only rows near the window hold a decoded picture: thousands of them would fill a phone's memory.
const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !target.src) show(target);
    else if (!isIntersecting && target.src && target.isConnected) target.removeAttribute("src");
  }
}, { rootMargin: "600px" });
function show(image) {
  const url = urlOf(image.lesion);
  if (!url) return;
  image.onerror = () => image.replaceWith(make("span", { class: "blank" }, "unreadable"));
  image.src = url;
}

// ---- where a probability lies: log-odds, since most of them are small

function makeScale(all) {
  const known = all.filter((one) => one.probability !== null).flatMap((one) => [one.probability, ...(one.interval ? [one.interval.low, one.interval.high] : [])]).map(clip);
  if (!known.length) return null;
  let low = Infinity, high = -Infinity;
  for (const p of known) { low = Math.min(low, p); high = Math.max(high, p); }
  low = logit(Math.max(low, 1e-6)) - 0.4;
  high = Math.max(logit(high) + 0.4, low + 2);
  const at = (p) => Math.min(1, Math.max(0, (logit(clip(p)) - low) / (high - low)));
  const ticks = [0.00001, 0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99].filter((p) => logit(p) > low && logit(p) < high);
  return { at, ticks };
}
const tick = (p) => `${Number((100 * p).toPrecision(3))} %`;

function drawAxis() {
  $("axis").replaceChildren();
  if (!scale) return;
  const inner = make("span", { class: "ticks" });
  let last = -1;
  for (const p of scale.ticks) {
    if (scale.at(p) - last < 0.3) continue;
    last = scale.at(p);
    const mark = make("span", {}, tick(p));
    mark.style.left = `${100 * last}%`;
    inner.append(mark);
  }
  $("axis").append(make("span", { class: "head lesion" }, "Lesion"), make("span", { class: "head" }, "Band"), make("span", { class: "head p" }, "Probability"), inner);
}

// ---- one lesion

function select(lesion, { open = false, quiet = false, focus = false } = {}) {
  if (current && rows.has(current.id)) {
    const { button } = rows.get(current.id);
    button.removeAttribute("aria-current");
    button.tabIndex = -1;
  }
  current = lesion;
  if (!lesion) { $("panel").replaceChildren(); return; }
  const { button } = rows.get(lesion.id);
  button.setAttribute("aria-current", "true");
  button.tabIndex = 0;
  drawPanel(lesion);
  if (focus && button.isConnected) { button.focus({ preventScroll: true }); button.scrollIntoView({ block: "nearest" }); }
  if (open && NARROW.matches && !document.body.classList.contains("open")) {
    opener = button;
    document.body.classList.add("open");
    $("panel").setAttribute("role", "dialog");
    $("panel").setAttribute("aria-modal", "true");
    for (const part of behind()) part.inert = true;
  }
  if (document.body.classList.contains("open")) { $("panel").scrollTop = 0; $("panel").focus({ preventScroll: true }); }
  if (!quiet && !(open && NARROW.matches)) announce(`${lesion.rank}: ${lesion.id}, ${(BANDS[bandOf(lesion)] || BANDS.none).label}, ${percent(lesion.probability)}`);
  if (heat) drawHeat();
}
const behind = () => [document.querySelector("header"), document.querySelector(".summary"), document.querySelector(".tools"), document.querySelector(".ranked")];

function close() {
  if (!document.body.classList.contains("open")) return;
  document.body.classList.remove("open");
  $("panel").setAttribute("role", "region");
  $("panel").removeAttribute("aria-modal");
  for (const part of behind()) part.inert = false;
  const row = current && rows.get(current.id);
  const target = row && row.button.isConnected ? row.button : opener;
  if (target) { target.focus({ preventScroll: true }); target.scrollIntoView({ block: "nearest" }); }
}
NARROW.addEventListener("change", () => { if (!NARROW.matches) close(); });

function step(by) {
  if (!shown.length) return;
  const at = shown.indexOf(current);
  const next = shown[Math.min(shown.length - 1, Math.max(0, at < 0 ? 0 : at + by))];
  if (next !== current) select(next, { focus: !document.body.classList.contains("open") });
}

function drawPanel(lesion) {
  const scored = lesions.filter((one) => one.probability !== null);
  const below = scored.length - lesion.rank;
  const parts = [
    make("div", { class: "bar" },
      make("button", { type: "button", class: "back", onclick: close }, "‹ All lesions"),
      make("span", { class: "turn" },
        make("button", { type: "button", "aria-label": "Previous lesion", onclick: () => step(-1) }, "↑"),
        make("button", { type: "button", "aria-label": "Next lesion", onclick: () => step(1) }, "↓"))),
    make("h2", {}, lesion.id),
    make("p", { class: "soft" }, [`Rank ${lesion.rank} of ${lesions.length}`, lesion.site, lesion.size_mm ? `${lesion.size_mm.toFixed(1)} mm across` : null].filter(Boolean).join(", ")),
    picture(lesion),
    make("div", { class: "verdict" }, badge(lesion),
      make("span", { class: "big" }, percent(lesion.probability)),
      lesion.interval && make("span", { class: "interval" }, span(lesion.interval), make("small", {}, `${Math.round(100 * lesion.interval.level)} % interval`))),
    make("p", { class: "soft fine" }, meaning(lesion)),
  ];
  if (lesion.doubts.length) parts.push(make("h3", {}, "Why it can't be judged"), make("ul", {}, lesion.doubts.map((one) => make("li", {}, one))));
  if (lesion.reasons.length) parts.push(make("h3", {}, "Reasons"), make("ul", {}, lesion.reasons.map((one) => make("li", {}, one))));
  else if (lesion.probability !== null) parts.push(make("p", { class: "soft fine" }, lesion.mode === "image" ? "Scored by its photo alone, so there are no reasons in words." : "No single reason stands out in its record."));
  if (scored.length > 1 && lesion.probability !== null) {
    parts.push(make("h3", {}, "Among this patient's lesions"),
      make("p", { class: "fine" }, below === 0 ? "The least suspicious one." : `More suspicious than ${below === scored.length - 1 ? "all" : below.toLocaleString("en")} of the ${(scored.length - 1).toLocaleString("en")} others.`),
      strip(scored, lesion));
  }
  const placed = lesions.filter((one) => one.position);
  if (lesion.position && placed.length > 1) parts.push(make("h3", {}, "Where it lies"), map(placed, lesion), neighbours(placed, lesion));
  else if (lesions.some((one) => one.site)) parts.push(make("h3", {}, "By body site"), sites(scored, lesion));
  const modes = Object.entries(lesion.scores);
  if (modes.length > 1) {
    parts.push(make("h3", {}, "What the score rests on"), make("table", {}, make("tbody", {}, modes.map(([name, p]) =>
      make("tr", { class: name === lesion.mode ? "main" : null }, make("th", { scope: "row" }, MODES[name] || name), make("td", {}, percent(p)))))));
  }
  const key = make("p", { class: "key fine soft" }, Object.keys(BANDS).filter((name) => lesions.some((one) => bandOf(one) === name)).map((name) =>
    make("span", {}, make("i", { class: `dot ${slug(name)}` }), ` ${BANDS[name].label}`)));
  if (scored.length > 1) parts.push(key);
  $("panel").replaceChildren(...parts.filter(Boolean));
}

function meaning(lesion) {
  const lines = (model && model.bands[lesion.mode]) || {}; // Each mode has lines of its own.
  const kept = (line) => (line && line.sensitivity ? ` that kept ${percent(line.sensitivity)} of the malignant lesions of other patients` : "");
  return {
    refer: `Above the line${kept(lines.refer)}.`,
    routine: "Between the line for referral and the line for low suspicion.",
    low: `Below the line${kept(lines.low)}.`,
    "cannot judge": "Look at this lesion yourself: the probability can't be relied on.",
    none: "No bands could be vouched for where a score rests on this.",
  }[bandOf(lesion)];
}

function picture(lesion) {
  const url = urlOf(lesion);
  if (!url) return make("div", { class: "large blank" }, "No photo of this lesion");
  const image = make("img", { src: url, alt: `Photo of lesion ${lesion.id}`, id: "photo" });
  const box = make("div", { class: "large" }, image);
  image.addEventListener("error", () => box.replaceChildren(make("span", { class: "blank" }, "This photo can't be shown")));
  const can = (!model || model.maps) && Object.hasOwn(lesion.scores, "image");
  const toggle = make("button", { type: "button", id: "heat", "aria-pressed": String(heat && can), disabled: !can, onclick: toggleHeat }, "Heat map");
  const legend = make("p", { class: "soft fine", id: "legend" }, can ? "" : "This model draws no heat maps.");
  if (!model || model.maps) legend.textContent = can ? "" : "No heat map: the photo was not scored.";
  return make("div", { class: "picture" }, box, make("div", { class: "under" }, toggle, legend));
}

function toggleHeat() {
  const button = $("heat");
  if (!button || button.disabled) return;
  heat = !heat;
  button.setAttribute("aria-pressed", String(heat));
  if (heat) drawHeat();
  else { $("photo").src = urlOf(current); $("photo").alt = `Photo of lesion ${current.id}`; $("legend").textContent = ""; }
}

async function drawHeat() {
  const lesion = current;
  if (!$("heat") || $("heat").disabled) return;
  $("heat").setAttribute("aria-pressed", "true");
  if (!heatmaps.has(lesion.id)) {
    $("legend").textContent = "Drawing …";
    const file = fileOf(lesion), form = new FormData();
    form.append("images", file, file.name);
    form.append("options", JSON.stringify({ heatmaps: true, reasons: false, count: false }));
    const asked = ask("POST", "/v1/triage", form).then((got) => got.lesions[0].heatmap);
    heatmaps.set(lesion.id, asked);
    asked.catch(() => heatmaps.delete(lesion.id)); // What failed may be asked for again.
  }
  let drawn = null, failed = "";
  try { drawn = await heatmaps.get(lesion.id); } catch (error) { failed = error.name === "AbortError" ? "Cancelled." : error.message; }
  if (current !== lesion || !heat || !$("photo")) return; // The reader has moved on.
  if (!drawn) { $("legend").textContent = failed || "The server drew none."; return; }
  $("photo").src = drawn;
  $("photo").alt = `Photo of lesion ${lesion.id} with its heat map`;
  $("legend").textContent = "Blue raises the picture's score, yellow lowers it. Outlined: the fifth that raises it most.";
}

// ---- comparison

const ORDER = ["none", "low", "routine", "cannot judge", "refer"]; // The most urgent is drawn last, on top.
function dots(all, place) {
  return ORDER.map((name) => {
    const path = all.filter((one) => bandOf(one) === name).map((one) => { const [x, y] = place(one); return `M${x.toFixed(1)} ${y.toFixed(1)}h0`; }).join("");
    return path && make("path", { class: `dots ${slug(name)}`, d: path });
  });
}

function strip(all, lesion, { label = true, of = all } = {}) {
  const x = (p) => 8 + 384 * scale.at(p), tall = label ? 50 : 24;
  const ticks = ORDER.map((name) => {
    const path = of.filter((one) => bandOf(one) === name).map((one) => `M${x(one.probability).toFixed(1)} ${8}v14`).join("");
    return path && make("path", { class: `ticks ${slug(name)}`, d: path });
  });
  const svg = make("svg", { viewBox: `0 0 400 ${tall}`, class: "strip", role: "img", "aria-label": `Scores of ${count(of.length, "lesion")}` },
    make("line", { x1: 4, x2: 396, y1: 22.5, y2: 22.5, class: "rule" }), ...ticks);
  if (label) {
    let last = -99;
    for (const p of scale.ticks) {
      if (x(p) - last < 52) continue;
      last = x(p);
      svg.append(make("line", { x1: last, x2: last, y1: 22, y2: 27, class: "rule" }), make("text", { x: last, y: 41, "text-anchor": last < 24 ? "start" : last > 376 ? "end" : "middle" }, tick(p)));
    }
  }
  if (lesion && of.includes(lesion)) {
    if (lesion.interval && label) svg.append(make("rect", { x: x(lesion.interval.low), y: 25, width: Math.max(1, x(lesion.interval.high) - x(lesion.interval.low)), height: 3, class: "here-span" }));
    svg.append(make("path", { class: "here", d: `M${x(lesion.probability)} 24l-5 -10v-12h10v12z` }));
  }
  return svg;
}

function sites(scored, lesion) {
  const names = [...new Set(scored.map((one) => one.site || "site unknown"))].sort();
  return make("div", { class: "sites" }, names.map((name) => {
    const of = scored.filter((one) => (one.site || "site unknown") === name);
    return make("div", { class: of.includes(lesion) ? "site main" : "site" }, make("span", {}, `${name} `, make("small", {}, String(of.length))), strip(scored, lesion, { label: false, of }));
  }));
}

// Total body photography: x grows to the patient's right, y from the floor up, z to the patient's back; millimetres.
function map(placed, lesion) {
  const high = Math.max(1800, ...placed.map((one) => one.position.y + 60)) + 100; // Above the head: words.
  const far = Math.max(480, ...placed.map((one) => Math.abs(one.position.x) + 40));
  const low = Math.min(0, ...placed.map((one) => one.position.y - 40));
  const deep = [Math.min(-230, ...placed.map((one) => one.position.z - 40)), Math.max(310, ...placed.map((one) => one.position.z + 40))];
  const gap = 160, all = 2 * far + gap + deep[1] - deep[0];
  const views = [
    { place: (one) => [far - one.position.x, high - one.position.y], name: "from the front", x: far, ends: ["R", "L"], at: [30, 2 * far - 30] },
    { place: (one) => [2 * far + gap + one.position.z - deep[0], high - one.position.y], name: "from the left", x: 2 * far + gap - deep[0] + 40, ends: ["front", "back"], at: [2 * far + gap + 10, all - 10] },
  ];
  const bodies = Math.abs(high - 1900) < 250 && far < 750;
  const svg = make("svg", { viewBox: `0 0 ${all} ${high - low + 110}`, class: "map", role: "img", "aria-label": `Map of ${count(placed.length, "lesion")}; this one is ringed${lesion.site ? `, on the ${lesion.site}` : ""}` });
  views.forEach((view, side) => {
    if (bodies) svg.append(figure(view.x, high, side));
    svg.append(...dots(placed, view.place).filter(Boolean));
    const [x, y] = view.place(lesion);
    svg.append(make("circle", { class: "ring-back", cx: x, cy: y, r: 36 }), make("circle", { class: "ring", cx: x, cy: y, r: 36 }));
    svg.append(make("text", { x: view.at[0], y: 60, class: "end" }, view.ends[0]), make("text", { x: view.at[1], y: 60, "text-anchor": "end", class: "end" }, view.ends[1]));
    svg.append(make("text", { x: view.x, y: high - low + 90, "text-anchor": "middle" }, view.name));
  });
  svg.addEventListener("click", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null, least = 90;
    for (const one of placed) for (const { place } of views) {
      const [x, y] = place(one), distance = Math.hypot(x - at.x, y - at.y);
      if (distance < least) { least = distance; best = one; }
    }
    if (best) select(best, { focus: !document.body.classList.contains("open") });
  });
  return svg;
}

function figure(x, high, side) {
  const y = (mm) => high - mm, line = (x1, y1, x2, y2, wide) => make("line", { x1: x + x1, y1: y(y1), x2: x + x2, y2: y(y2), "stroke-width": wide });
  const group = make("g", { class: "figure", "aria-hidden": "true" });
  group.append(make("circle", { cx: x - (side ? 25 : 0), cy: y(1640), r: 105 }), line(0, 1560, 0, 1480, 110));
  if (side) group.append(line(5, 1370, 5, 960, 230), line(5, 850, 5, 60, 150));
  else group.append(line(-70, 1370, -50, 940, 190), line(70, 1370, 50, 940, 190), line(-175, 1405, -430, 960, 95), line(175, 1405, 430, 960, 95), line(-95, 850, -185, 60, 140), line(95, 850, 185, 60, 140));
  return group;
}

function neighbours(placed, lesion) {
  const far = (one) => Math.hypot(...["x", "y", "z"].map((axis) => one.position[axis] - lesion.position[axis]));
  const nearest = placed.filter((one) => one !== lesion).map((one) => [far(one), one]).sort((a, b) => a[0] - b[0]).slice(0, 4);
  return make("div", { class: "near" }, make("p", { class: "soft fine" }, "Nearest to it"), make("ul", {}, nearest.map(([mm, one]) => {
    const url = urlOf(one);
    return make("li", {}, make("button", { type: "button", onclick: () => select(one, { focus: false }) },
      url ? make("img", { src: url, alt: `Lesion ${one.id}`, loading: "lazy" }) : make("span", { class: "blank" }, "no photo"),
      make("span", {}, `${Math.round(mm)} mm`), badge(one)));
  })));
}

// ---- keys, sorting, printing, export

$("sort").addEventListener("change", arrange);
$("find").addEventListener("input", arrange);
$("sheet").addEventListener("click", toggleSheet);
function toggleSheet() {
  const on = $("results").classList.toggle("sheet");
  $("sheet").setAttribute("aria-pressed", String(on));
  if (current && rows.get(current.id).button.isConnected) rows.get(current.id).button.scrollIntoView({ block: "nearest" });
}

addEventListener("keydown", (event) => {
  if (!answer || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || $("token-dialog").open) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("open")) { event.preventDefault(); close(); } else if (event.target === $("find")) { $("find").value = ""; arrange(); }
    return;
  }
  if (event.target.closest("input:not([type=checkbox]), select, textarea")) return;
  const inList = event.target.closest(".list, .panel .turn") || event.target === document.body || event.target === $("main");
  if (inList && (event.key === "ArrowDown" || event.key === "ArrowUp")) { event.preventDefault(); step(event.key === "ArrowDown" ? 1 : -1); return; }
  if (event.target.closest(".list") && (event.key === "Home" || event.key === "End")) { event.preventDefault(); step(event.key === "End" ? shown.length : -shown.length); return; }
  if (!$("keys-on").checked) return;
  const act = { j: () => step(1), k: () => step(-1), h: toggleHeat, g: toggleSheet, "/": () => $("find").focus() }[event.key];
  if (act) { event.preventDefault(); act(); }
});

$("print").addEventListener("click", async () => {
  // Rows far from the window hold no picture yet: print them too.
  const images = shown.map((one) => rows.get(one.id).image).filter((image) => fileOf(image.lesion) && image.isConnected);
  $("print").disabled = true;
  for (const image of images) { near.unobserve(image); if (!image.src) show(image); }
  await Promise.allSettled(images.map((image) => image.decode()));
  $("print").disabled = false;
  $("print").focus();
  window.print();
  for (const image of images) near.observe(image);
});
addEventListener("beforeprint", () => { document.body.dataset.printed = new Date().toLocaleString("en-GB", { dateStyle: "long", timeStyle: "short" }); });

function cell(value) {
  let text = value === null || value === undefined ? "" : String(value);
  // A spreadsheet would run a file's name that begins like a formula.
  // Where another character parts the cells, what follows that one begins a cell too.
  if (typeof value === "string") text = text.replace(/(^|[;\t\r\n]\s*)(?=[=+\-@\t\r])/g, "$1'");
  return /[",;\t\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
function csvText() {
  const head = ["rank", "isic_id", "file", "band", "probability", "low", "high", "mode", "logit", "site", "size_mm", "reasons", "doubts", "error", "model", "bundle", "request_id"];
  const failed = new Map(answer.errors.map((one) => [one.id, one.error]));
  const from = [answer.model, answer.bundle, answer.request_id];
  const lines = lesions.map((one) => [one.rank, one.id, one.file, one.band, one.probability, one.interval && one.interval.low, one.interval && one.interval.high,
    one.mode, one.logit, one.site, one.size_mm, one.reasons.join("; "), one.doubts.join("; "), failed.get(one.id), ...from]);
  const listed = new Set(lesions.map((one) => one.id));
  for (const one of answer.errors) if (!listed.has(one.id)) lines.push([null, one.id, one.file, ...Array(10).fill(null), one.error, ...from]);
  for (const [file, error] of leftOut) lines.push([null, null, file, ...Array(10).fill(null), error, ...from]);
  return `\ufeff${[head, ...lines].map((line) => line.map(cell).join(",")).join("\r\n")}\r\n`;
}
$("export").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([csvText()], { type: "text/csv" }));
  const link = make("a", { href: url, download: "triage.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  announce("The CSV was exported.");
});
addEventListener("beforeunload", (event) => { if (answer) event.preventDefault(); });

introduce();
