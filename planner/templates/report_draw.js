// Data of the page, units, and shapes with hints.
const raw = atob(document.getElementById("data").textContent);
const D = JSON.parse(new TextDecoder().decode(Uint8Array.from(raw, c => c.charCodeAt(0))));
const $ = id => document.getElementById(id), NS = "http://www.w3.org/2000/svg";
const colour = i => `var(--c${i % 10})`;
const scale = (x, units, base) => { let i = 0; while (Math.abs(x) >= base && i < units.length - 1) { x /= base; i++; } if (+Math.abs(x).toPrecision(3) >= 1000 && base === 1000 && i < units.length - 1) { x /= base; i++; } return `${+x.toPrecision(3)} ${units[i]}`; };
const time = s => s === 0 ? "0 s" : Math.abs(s) >= 1 ? `${+s.toPrecision(3)} s` : scale(s * 1e9, ["ns", "us", "ms"], 1000);
const bytes = b => scale(b, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024);
const count = n => scale(n, ["", "K", "M", "B", "T"], 1000).trim();
const sum = list => list.reduce((a, b) => a + b, 0);
const svg = (name, attributes, parent, tip) => {
  const e = document.createElementNS(NS, name);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (tip) hint(e, tip);
  parent?.append(e);
  return e;
};
const text = (x, y, value, parent, more = {}) => { const e = svg("text", { x, y, ...more }, parent); e.textContent = value; return e; };
const html = (name, parent, value, more = {}) => { const e = document.createElement(name); if (value !== undefined) e.textContent = value; Object.assign(e, more); parent?.append(e); return e; };
const tip = $("tip");
function hint(e, value) {
  e.dataset.tip = value;
  e.addEventListener("mousemove", m => { tip.textContent = value; tip.style.opacity = 1; tip.style.left = Math.min(m.clientX + 14, innerWidth - 390) + "px"; tip.style.top = m.clientY + 14 + "px"; });
  e.addEventListener("mouseleave", () => { tip.style.opacity = 0; });
}
const terms = t => Object.entries(t).sort((a, b) => b[1] - a[1]).slice(0, 12).map(([k, v]) => `${k}: ${time(v)}`).join("\n");

const over = i => [1, 3, 4, 7, 8].includes(i % 10) ? "ink" : "on";  // text that can be read on colour i
const WIDE = 1180, LEFT = 96, RIGHT = 20, LANE = 34;
