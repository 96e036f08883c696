// The machine as a tree with the load of its links, and the work of every rank.
const SLOTS = 16;  // hosts that are drawn; the others are said in words
function tree() {
  const M = D.machine, levels = M.levels.filter((l, i) => i === 0 || l.fanout > 1);
  const sizes = []; let ranks = 1;
  for (const l of levels) sizes.push(ranks *= l.fanout);
  // how many members of each level are drawn, from the top: the tree gets no wider than SLOTS hosts
  const shown = levels.map(l => l.fanout); let free = SLOTS;
  for (let i = levels.length - 1; i > 0; i--) { shown[i] = Math.min(shown[i], i > 1 ? Math.max(2, Math.floor(free ** (1 / i))) : Math.max(2, free)); free = Math.max(1, Math.floor(free / shown[i])); }
  const slots = shown.slice(1).reduce((a, b) => a * b, 1), X = 196, ROW = 80, W = WIDE, slot = Math.min(190, (W - X) / slots);
  const perRow = Math.min(levels[0].fanout, levels[0].fanout > 16 ? 8 : 4), pitch = Math.min(14, (slot - 16) / perRow);
  const rows = Math.min(Math.ceil(levels[0].fanout / perRow), 10), hostHeight = 26 + rows * pitch, H = (levels.length - 1) * ROW + hostHeight + 12;
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "topology with the load of each link", id: "tree" }, $("topology"));
  for (const l of levels) if (l.sent) l.each = l.sent.flatMap(([n, b]) => Array(n).fill(b));
  const sent = (l, r) => l.each?.[r] ?? 0;
  const most = (l, from, n) => (l.each ?? []).slice(from, from + n).reduce((a, b) => Math.max(a, b), 0);
  const busy = (l, b) => l.rate && D.step ? b / l.rate / D.step : 0;
  const shade = share => `color-mix(in srgb, var(--crit) ${Math.round(12 + 88 * Math.sqrt(Math.min(1, share)))}%, var(--faint))`;
  const percent = x => x >= 0.0995 ? `${(100 * x).toFixed(0)} %` : x >= 0.0005 ? `${+(100 * x).toPrecision(2)} %` : x > 0 ? "< 0.1 %" : "0 %";
  const told = (l, b, who) => l.sent ? `${who}, ${l.link}: ${bytes(b)} a ${M.what}\n${percent(busy(l, b))} of it at ${l.reached}` : `${who}, ${l.link}`;
  function host(first, x) {
    const box = svg("g", {}, root), y = (levels.length - 1) * ROW + 4, l = levels[0];
    svg("rect", { x: x + 3, y, width: slot - 6, height: hostHeight, rx: 6, fill: "none", class: "axis" }, box);
    text(x + 9, y + 14, `host ${first / sizes[0]}`, box, { class: "dim", opacity: first < M.used ? 1 : 0.4 });
    for (let d = 0; d < Math.min(levels[0].fanout, rows * perRow); d++) {
      const r = first + d, b = r < M.used ? sent(l, r) : 0;
      svg("rect", { x: x + 9 + (d % perRow) * pitch, y: y + 21 + Math.floor(d / perRow) * pitch, width: pitch - 2, height: pitch - 2, rx: 2, fill: r < M.used ? shade(busy(l, b)) : "none", class: "device axis" }, box, r < M.used ? told(l, b, `device ${r}, in its host`) : `device ${r}: idle`);
    }
    return x + slot / 2;
  }
  function domain(i, first, x) {
    if (i === 0) return host(first, x);
    const l = levels[i], below = sizes[i - 1], wide = slot * shown.slice(1, i).reduce((a, b) => a * b, 1), y = (levels.length - 1 - i) * ROW + 8;
    const all = Array.from({ length: l.fanout }, (_, k) => k), kept = all.slice(0, l.fanout > shown[i] ? shown[i] - 1 : shown[i]);
    const left = l.fanout - kept.length, middles = kept.map((k, at) => domain(i - 1, first + k * below, x + at * wide));
    if (left > 0) {
      const at = x + kept.length * wide;
      text(at + wide / 2, y + ROW - 4, `+${left.toLocaleString("en")} more`, root, { class: "dim", "text-anchor": "middle" });
      middles.push(at + wide / 2);
    }
    const from = x + 3, to = x + wide * shown[i] - 3;
    middles.forEach((m, at) => {
      const start = first + (at < kept.length ? kept[at] : kept.length) * below, n = at < kept.length ? below : left * below;
      const b = start < M.used ? most(l, start, n) : 0, share = busy(l, b);
      svg("line", { x1: m, x2: m, y1: y + 20, y2: y + ROW - (at < kept.length ? 4 : 16), stroke: b ? shade(share) : "var(--line)", "stroke-width": 2 + 8 * Math.sqrt(Math.min(1, share)), class: "link", "stroke-dasharray": at < kept.length ? "none" : "3 4" }, root, told(l, b, `a device of ${levels[i - 1].name} ${start / below}`));
      if (at < kept.length && l.sent && wide > 44) {
        svg("rect", { x: m - 24, y: y + 27, width: 48, height: 29, fill: "var(--panel)", style: "pointer-events:none" }, root);
        text(m, y + 38, bytes(b), root, { "text-anchor": "middle" }); text(m, y + 52, percent(share), root, { class: "dim", "text-anchor": "middle" });
      }
    });
    svg("rect", { x: from, y, width: to - from, height: 20, rx: 6, fill: "var(--faint)", class: "axis" }, root);
    text((from + to) / 2, y + 14, i === levels.length - 1 ? l.name : `${l.name} ${first / sizes[i]}`, root, { "text-anchor": "middle" });
    return (from + to) / 2;
  }
  domain(levels.length - 1, 0, X);
  levels.forEach((l, i) => {
    const y = (levels.length - 1 - i) * ROW + (i ? 40 : 18);
    text(0, y, i ? `${l.fanout} x ${levels[i - 1].name}, ${l.link}` : `${l.fanout} x ${M.device}`, root);
    text(0, y + 14, i ? `${l.peak} a device` : `${l.link}, ${l.peak} a device`, root, { class: "dim" });
  });
  linkTable(levels, M, percent);
}
function linkTable(levels, M, percent) {
  if (!levels.some(l => l.sent)) { html("p", $("topology"), "The load of the links is not modelled for tables in groups.", { className: "note" }); return; }
  const table = html("table", html("div", $("topology"), undefined, { className: "wide" })), head = html("tr", html("thead", table)), body = html("tbody", table);
  ["link", `busiest device, a ${M.what}`, "at the rate reached", "takes", `of the ${M.what}`, "for"].forEach((n, i) => html("th", head, n, { className: i && i < 5 ? "n" : "" }));
  for (const l of levels) {
    const tr = html("tr", body, undefined, { className: "level" });
    html("td", tr, `${l.name}: ${l.link}`);
    for (const v of [bytes(l.most), l.reached, time(l.seconds), percent(l.share)]) html("td", tr, v, { className: "n" });
    html("td", tr, Object.entries(l.parts).map(([k, v]) => `${k} ${bytes(v)}`).join(", ") || "nothing");
  }
  html("p", $("topology"), "Bytes in one direction, counted from the decisions. Lines and squares are darker and lines thicker the larger the share of the time in which the busiest device's link carries data; start-up times and waiting are not in it.", { className: "note" });
}

function machine() {
  tree();
  const { phases, seconds } = D.load, box = $("hosts"), pick = $("phase");
  if (!seconds.length) { $("work").remove(); return; }
  ["all phases", ...phases].forEach((p, i) => html("option", pick, p, { value: i }));
  const cells = [], hosts = Math.min(D.world / D.hostSize, 256);
  for (let h = 0; h < hosts; h++) {
    const host = html("div", box, undefined, { className: "host" }); html("b", host, `host ${h}`);
    const grid = html("div", host, undefined, { className: "devices" });
    for (let d = 0; d < D.hostSize; d++) { const c = html("i", grid); cells.push(c); hint(c, ""); }
  }
  const draw = () => {
    const at = +pick.value, value = r => at ? seconds[r][at - 1] : sum(seconds[r]);
    const all = seconds.map((_, r) => value(r)), most = Math.max(...all) || 1;
    $("shade").textContent = `Colour in proportion to the embedding work of a rank: ${time(Math.min(...all))} to ${time(Math.max(...all))} (full colour).${D.world / D.hostSize > hosts ? ` The first ${hosts} hosts are drawn.` : ""}`;
    cells.forEach((c, r) => {
      c.style.background = `rgba(var(--hot), ${(0.06 + 0.94 * value(r) / most).toFixed(3)})`;
      const label = `rank ${r}: ${time(value(r))}\n${phases.map((p, i) => `${p}: ${time(seconds[r][i])}`).join("\n")}`;
      c.dataset.tip = label; c.onmousemove = () => { tip.textContent = label; };
    });
  };
  pick.addEventListener("change", draw); draw();
}
