// The modelled step by stream, a measured run beside it, and what each assumption does to it.
const plain = name => name.replace(/(_next|_\d+)$/, "");
function bar(root, x, y, h, from, seconds, fill, label, value, className = "on") {
  const w = Math.max(1.5, x(from + seconds) - x(from));
  svg("rect", { x: x(from), y, width: w, height: h, rx: 3, fill, stroke: "var(--panel)" }, root, value);
  const room = Math.floor((w - 8) / 6.4), said = room >= label.length ? label : room > 4 ? `${label.slice(0, room - 1)}\u2026` : "";
  if (said) text(x(from) + 5, y + h / 2 + 4, said, root, { class: className, style: "pointer-events:none" });
}
function ticks(root, x, span, y) {
  for (let i = 0; i <= 5; i++) text(x(span * i / 5), y, time(span * i / 5), root, { class: "dim", "text-anchor": i === 5 ? "end" : i ? "middle" : "start" });
}
const axis = span => s => LEFT + s / span * (WIDE - LEFT - RIGHT);
function timeline() {
  const M = D.measured, streams = [...new Set(D.events.map(e => e[1]))];
  const end = M ? Math.max(M.median, ...M.spans.map(s => s[3] + s[4])) : 0;
  // beside a step of another size the model would be a sliver: then each has its own scale
  const apart = M && (end > 6 * D.step || end < D.step / 6), span = (apart ? D.step : Math.max(D.step, end)) || 1, x = axis(span);
  const H = streams.length * LANE + 34, root = svg("svg", { viewBox: `0 0 ${WIDE} ${H}`, role: "img", "aria-label": "timeline of the modelled step" }, $("timeline"));
  streams.forEach((s, i) => { text(0, i * LANE + 22, s, root); svg("line", { x1: LEFT, x2: WIDE - RIGHT, y1: (i + 1) * LANE, y2: (i + 1) * LANE, class: "axis" }, root); });
  for (const [name, stream, start, duration, critical, parts] of D.events) {
    if (duration > 0) bar(root, x, streams.indexOf(stream) * LANE + 5, LANE - 10, start, duration, critical ? "var(--crit)" : colour(0), name, `${name}\n${time(duration)} from ${time(start)}${critical ? ", critical" : ""}\n${terms(parts)}`);
  }
  ticks(root, x, span, H - 8);
  if (M) measured(M, span, apart ? end : span, apart);
  operations();
}
function operations() {
  const table = html("table", $("ops")), head = html("tr", html("thead", table)), body = html("tbody", table);
  ["op", "stream", "starts", "lasts", "of the step", "critical", "made of"].forEach((n, i) => html("th", head, n, { className: i > 1 && i < 5 ? "n" : "" }));
  for (const [name, stream, start, duration, critical, parts] of D.events) {
    const tr = html("tr", body);
    html("td", tr, name); html("td", tr, stream);
    for (const v of [time(start), time(duration), `${D.step ? +(100 * duration / D.step).toPrecision(3) : 0} %`]) html("td", tr, v, { className: "n" });
    html("td", tr, critical ? "yes" : ""); html("td", tr, terms(parts).replaceAll("\n", ", "));
  }
}
function measured(M, modelled, span, apart) {
  $("measured").textContent = `measured median of ${M.steps.length} steps: ${time(M.median)}${apart ? "" : " (dashed)"}, modelled ${time(D.step)}`;
  const x = axis(span);
  if (!apart) {
    const root = document.querySelector("#timeline svg"), H = root.viewBox.baseVal.height;
    svg("line", { x1: x(M.median), x2: x(M.median), y1: 0, y2: H - 22, stroke: "var(--ink)", "stroke-dasharray": "4 3", "stroke-width": 2 }, root, `measured: ${time(M.median)}`);
  }
  if (!M.spans.length) return;
  const ranks = [...new Set(M.spans.map(s => s[0]))], shown = ranks.slice(0, 8), streams = [...new Set(M.spans.map(s => s[2]))];
  html("h3", $("timeline"), `Measured step under the profiler, ${ranks.length} ranks${ranks.length > 8 ? ", the first 8" : ""}${apart ? "; on a scale of its own" : ""}`);
  const h = 18, each = streams.length * h + 8, H = shown.length * each + 30;
  const root = svg("svg", { viewBox: `0 0 ${WIDE} ${H}`, role: "img", "aria-label": "timeline of the measured step", id: "spans" }, $("timeline"));
  const phases = [...new Set([...D.events.map(e => plain(e[0])), ...M.spans.map(s => s[1])])];
  shown.forEach((r, i) => { text(0, i * each + 13, `rank ${r}`, root); svg("line", { x1: LEFT, x2: WIDE - RIGHT, y1: (i + 1) * each - 2, y2: (i + 1) * each - 2, class: "axis" }, root); });
  for (const [rank, phase, stream, start, seconds] of M.spans) {
    const i = shown.indexOf(rank);
    if (i >= 0) bar(root, x, i * each + streams.indexOf(stream) * h + 2, h - 3, start, seconds, colour(phases.indexOf(phase)), phase, `rank ${rank}, ${stream}: ${phase}\n${time(seconds)} from ${time(start)}`, over(phases.indexOf(phase)));
  }
  ticks(root, x, span, H - 6);
  const table = html("table", $("phases")), head = html("tr", html("thead", table)), body = html("tbody", table);
  ["phase", "modelled", "measured, slowest rank", "fastest rank", "measured less modelled", "ratio"].forEach((n, i) => html("th", head, n, { className: i ? "n" : "" }));
  for (const [phase, model, slow, fast] of M.phases) {
    const tr = html("tr", body), both = model !== null && slow !== null, show = v => v === null ? "-" : time(v);
    html("td", tr, phase);
    for (const v of [show(model), show(slow), show(fast), both ? (slow < model ? "-" : "+") + time(Math.abs(slow - model)) : "-", both && model > 0 ? (slow / model).toPrecision(3) : "-"]) html("td", tr, v, { className: "n" });
  }
  html("p", $("phases"), "A measured collective includes waiting for the other ranks; a phase that is missing on one side is marked -.", { className: "note" });
}

function tornado() {
  const parts = D.sensitivity.map(([name, base, rows]) => [name, base, rows.filter(r => r[2] - r[3] > base * 1e-5).slice(0, 14)]).filter(p => p[2].length);
  if (!parts.length) { $("sensitive").remove(); return; }
  for (const [name, base, rows] of parts) {
    if (parts.length > 1) html("h3", $("tornado"), name);
    const narrow = innerWidth < 700, W = narrow ? 340 : 1180, lane = narrow ? 38 : 24, left = narrow ? 0 : 250, H = rows.length * lane + 24, most = Math.max(...rows.flatMap(r => [r[2] - base, base - r[3]])), mid = left + (W - left) / 2, x = s => mid + (s - base) / most * (W - left - 150) / 2;
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `sensitivity of the ${name}` }, $("tornado"));
    rows.forEach(([label, value, worse, better], i) => {
      text(0, i * lane + (narrow ? 10 : 17), `${label} (${value})`, root);
      const y = i * lane + (narrow ? 16 : 4);  // on a phone below the name, else beside it
      svg("rect", { x: x(better), y, width: Math.max(1, mid - x(better)), height: 16, fill: colour(2) }, root, `10 % better: ${time(better)}`);
      svg("rect", { x: mid, y, width: Math.max(1, x(worse) - mid), height: 16, fill: "var(--crit)" }, root, `10 % worse: ${time(worse)}`);
      if (worse - base > base * 1e-5) text(x(worse) + 5, y + 12, `+${time(worse - base)}`, root, { class: "dim" });
      if (base - better > base * 1e-5) text(x(better) - 5, y + 12, `-${time(base - better)}`, root, { class: "dim", "text-anchor": "end" });
    });
    svg("line", { x1: mid, x2: mid, y1: 0, y2: H - 20, class: "axis" }, root); text(mid, H - 5, `${name} ${time(base)}`, root, { class: "dim", "text-anchor": "middle" });
  }
}
