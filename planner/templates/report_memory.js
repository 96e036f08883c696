// Memory by rank and purpose, and the tiers of the hosts.
function memory() {
  const { purposes, runs, limit } = D.memory, W = WIDE, H = 210, left = 70, most = Math.max(...runs.map(r => sum(r[2])));
  const near = most > limit * 0.35, top = near ? Math.max(limit, most) : most * 1.15;  // else the bars would lie flat under a far limit
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "memory by rank and purpose" }, $("memory")), y = b => 10 + (1 - b / top) * (H - 40), x = r => left + r / D.world * (W - left - 10);
  for (const [first, last, used] of runs) {
    const total = sum(used), group = svg("g", {}, root, `rank${last > first ? `s ${first}-${last}` : ` ${first}`}: ${bytes(total)} of ${bytes(limit)}\n${purposes.map((p, i) => [p, used[i]]).sort((a, b) => b[1] - a[1]).map(([p, v]) => `${p}: ${bytes(v)}`).join("\n")}`);
    let below = 0;
    used.forEach((v, i) => { if (v > 0) svg("rect", { x: x(first), y: y(below + v), width: Math.max(0.6, x(last + 1) - x(first) - (D.world > 200 ? 0 : 1.5)), height: Math.max(0, y(below) - y(below + v)), fill: colour(i) }, group); below += v; });
  }
  if (near) {
    svg("line", { x1: left, x2: W, y1: y(limit), y2: y(limit), stroke: "var(--crit)", "stroke-dasharray": "6 4" }, root, `usable: ${bytes(limit)}`);
    text(0, y(limit) + 4, bytes(limit), root);
  } else text(0, y(most) + 4, bytes(most), root);
  text(0, y(0) + 2, "0", root);
  const last = Math.max(...runs.filter(r => sum(r[2]) > 0).map(r => r[1]));
  text(left, H - 6, "rank 0", root, { class: "dim" }); text(W - 10, H - 6, `rank ${D.world - 1}${last < D.world - 1 ? ` (from ${last + 1} on idle)` : ""}`, root, { class: "dim", "text-anchor": "end" });
  html("span", $("purposes"), `fullest rank ${bytes(most)} of ${bytes(limit)} usable (${(100 * most / limit).toPrecision(3)} %)${near ? ", dashed" : ", a limit far above this scale"}`);
  purposes.forEach((p, i) => { const s = html("span", $("purposes")); html("i", s).style.background = colour(i); s.append(p); });
  tiers();
}
function tiers() {
  if (!D.tiers.length) return;
  html("h3", $("tiers"), "Memory by tier, on the busiest rank or host");
  const body = html("tbody", html("table", $("tiers")));
  D.tiers.forEach(([name, stored, limit, busy, binding], i) => {
    const tr = html("tr", body), share = limit ? stored / limit : 0;
    html("td", tr, name);
    const cell = html("td", tr, undefined, { className: "fill" });
    if (limit) { const meter = html("i", html("div", cell, undefined, { className: "meter" })); meter.style.width = `${100 * share}%`; meter.style.background = colour(i); }
    html("td", tr, limit ? `${bytes(stored)} of ${bytes(limit)}` : "-", { className: "n" });
    html("td", tr, busy.map(([k, s]) => `${k} ${time(s)}`).join(", ") || "-");
    html("td", tr, binding.length ? `${binding.join(", ")} binds` : "");
  });
}
