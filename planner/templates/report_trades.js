// Step against memory, or loss: plans and layouts as points.
const UNIT = { bytes, seconds: time, loss: v => `${+v.toPrecision(3)}` };
function trades() {
  if (!D.fronts.length) { $("fronts").remove(); return; }
  const row = html("div", $("fronts"), undefined, { className: "charts" });
  for (const { title, units, points, note } of D.fronts) {
    const box = html("div", row); html("h3", box, title);
    const W = 560, H = 260, left = 74, bottom = 34, [ux, uy] = units.map(u => UNIT[u]);
    const range = i => { const v = points.map(p => p[i]), lo = Math.min(...v), hi = Math.max(...v), pad = (hi - lo || Math.abs(hi) || 1) * 0.08; return [lo - pad, hi + pad]; };
    const [x0, x1] = range(0), [y0, y1] = range(1), x = v => left + (v - x0) / (x1 - x0) * (W - left - 16), y = v => H - bottom - (v - y0) / (y1 - y0) * (H - bottom - 14);
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title }, box);
    for (let i = 0; i <= 4; i++) {
      const vx = x0 + (x1 - x0) * i / 4, vy = y0 + (y1 - y0) * i / 4;
      svg("line", { x1: left, x2: W - 16, y1: y(vy), y2: y(vy), class: "axis" }, root);
      if (i % 2 === 0) text(Math.min(x(vx), W - 2), H - 12, ux(vx), root, { class: "dim", "text-anchor": i === 4 ? "end" : i ? "middle" : "start" });
      text(left - 8, y(vy) + 4, uy(vy), root, { class: "dim", "text-anchor": "end" });
    }
    // what no other point beats in both
    const best = points.filter(p => !points.some(q => q[0] <= p[0] && q[1] <= p[1] && (q[0] < p[0] || q[1] < p[1]))).sort((a, b) => a[0] - b[0]);
    svg("polyline", { points: best.map(p => `${x(p[0])},${y(p[1])}`).join(" "), fill: "none", stroke: "var(--accent)", "stroke-width": 1.5 }, root);
    points.forEach((p, i) => svg("circle", { cx: x(p[0]), cy: y(p[1]), r: i ? 5 : 7, fill: i ? (best.includes(p) ? "var(--accent)" : "var(--c7)") : "var(--crit)", stroke: "var(--panel)" }, root, `${ux(p[0])}, ${uy(p[1])}\n${p[2]}`));
    html("div", box, undefined, { className: "legend" }).innerHTML = '<span><i style="background:var(--crit)"></i>this plan</span><span><i style="background:var(--accent)"></i>beaten by none in both</span>';
    if (note) html("p", box, note, { className: "note" });
  }
}
