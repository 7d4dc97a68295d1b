"use strict";
// Read-outs of the charts, a slider over the samples, and the reader's choices, which survive the
// reloads of a running run. The page is complete without this script.

function formatted(value) {
  return value.toLocaleString("en", { maximumSignificantDigits: 5 });
}

function readLines(plot) {
  return [...plot.querySelectorAll("path[data-x]")].map((path) => ({
    name: path.dataset.name,
    style: path.getAttribute("class"),
    x: path.dataset.x.split(" ").map(Number),
    y: path.dataset.y.split(" ").map(Number),
  }));
}

function nearest(values, target) {
  let best = 0;
  values.forEach((value, index) => {
    if (Math.abs(value - target) < Math.abs(values[best] - target)) best = index;
  });
  return best;
}

function addReadOut(plot) {
  const [xLow, xHigh] = plot.dataset.x.split(" ").map(Number);
  const [yLow, yHigh, isLog] = plot.dataset.y.split(" ").map(Number);
  const yPart = (y) =>
    isLog ? Math.log(y / yLow) / Math.log(yHigh / yLow) : (y - yLow) / (yHigh - yLow);
  const cursor = document.createElement("div");
  const box = document.createElement("div");
  cursor.className = "cursor";
  box.className = "read-out";
  box.setAttribute("role", "status");
  let lines = null;
  let current = 0;

  function show(x) {
    lines ||= readLines(plot);
    const at = lines.map((line) => nearest(line.x, x));
    const xs = lines.map((line, index) => line.x[at[index]]);
    current = xs[nearest(xs, x)];
    const part = (current - xLow) / (xHigh - xLow);
    cursor.style.left = `${part * 100}%`;
    box.replaceChildren(document.createElement("b"));
    box.firstChild.textContent = `${plot.dataset.title} ${formatted(current)}`;
    plot.querySelectorAll(".dot").forEach((dot) => dot.remove());
    lines.forEach((line, index) => {
      const [lineX, lineY] = [line.x[at[index]], line.y[at[index]]];
      // A line that has ended, or has not begun, has no value here.
      if (Math.abs(lineX - current) > 0.02 * (xHigh - xLow)) return;
      const row = document.createElement("span");
      const value = document.createElement("i");
      row.className = line.style;
      row.textContent = line.name;
      value.textContent = formatted(lineY) + (lineX === current ? "" : ` at ${formatted(lineX)}`);
      box.append(row, value);
      const dot = document.createElement("div");
      dot.className = `dot ${line.style}`;
      dot.style.left = `${((lineX - xLow) / (xHigh - xLow)) * 100}%`;
      dot.style.top = `${(1 - yPart(lineY)) * 100}%`;
      plot.append(dot);
    });
    plot.append(cursor, box);
    const room = plot.clientWidth - box.offsetWidth;
    const left = part * plot.clientWidth;
    const before = Math.max(0, left - 12 - box.offsetWidth);
    box.style.left = `${left + 12 <= room ? left + 12 : before}px`;
  }

  function hide() {
    plot.querySelectorAll(".dot, .cursor, .read-out").forEach((part) => part.remove());
  }

  function move(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    lines ||= readLines(plot);
    const all = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const next = nearest(all, current) + step;
    show(all[Math.min(all.length - 1, Math.max(0, next))]);
  }

  function follow(event) {
    const area = plot.getBoundingClientRect();
    show(xLow + ((event.clientX - area.left) / area.width) * (xHigh - xLow));
  }

  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("keydown", move);
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && show(xHigh));
  plot.addEventListener("blur", hide);
}

const store = {
  // The storage of a page may be blocked.
  read(name) {
    try {
      return sessionStorage.getItem(location.pathname + name);
    } catch {
      return null;
    }
  },
  write(name, value) {
    try {
      sessionStorage.setItem(location.pathname + name, value);
    } catch {
      // The choice is lost at the next reload.
    }
  },
};

function addSlider(samples) {
  const articles = [...samples.children].reverse();
  if (articles.length < 2) return;
  const last = articles.length - 1;
  const slider = document.createElement("input");
  const label = document.createElement("label");
  Object.assign(slider, { type: "range", min: 0, max: last, step: 1 });
  label.className = "slider";
  label.append("first", slider, "last");
  slider.setAttribute("aria-label", "sample");

  function show() {
    const chosen = Number(slider.value);
    articles.forEach((article, index) => (article.hidden = index !== chosen));
    slider.setAttribute("aria-valuetext", articles[chosen].firstChild.textContent);
    // The last sample stays the last one when new ones arrive.
    store.write("sample", chosen === last ? "last" : articles[chosen].firstChild.textContent);
  }

  const stored = store.read("sample");
  const found = articles.findIndex((article) => article.firstChild.textContent === stored);
  slider.value = found < 0 ? last : found;
  slider.addEventListener("input", show);
  samples.before(label);
  samples.classList.add("single");
  show();
}

function warnOfSilence(time) {
  const ageSeconds = (Date.now() - Date.parse(time.dateTime)) / 1000;
  if (ageSeconds < Number(time.dataset.silenceS)) return;
  const minutes = Math.round(ageSeconds / 60);
  const age = minutes < 120 ? `${minutes} minutes` : `${Math.round(minutes / 60)} hours`;
  const warning = document.createElement("p");
  warning.className = "notice";
  warning.textContent = `The last evaluation was ${age} ago. The process may have been killed.`;
  document.querySelector("header").append(warning);
}

document.querySelectorAll("time[data-silence-s]").forEach(warnOfSilence);
document.querySelectorAll(".plot").forEach(addReadOut);
document.querySelectorAll("#samples").forEach(addSlider);
document.querySelectorAll("input.choice").forEach((choice) => {
  if (store.read(choice.name) === choice.id) choice.checked = true;
  choice.addEventListener("change", () => store.write(choice.name, choice.id));
});
document.querySelectorAll("details").forEach((details) => {
  details.open = store.read(details.id) === "open";
  details.addEventListener("toggle", () => store.write(details.id, details.open ? "open" : ""));
});
