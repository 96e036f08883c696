// The explorer of tables: list, filter, and one table's blocks.
const COLUMNS = [["table", 0, 0], ["rows", 1, 1, count], ["dim", 2, 1], ["type", 3, 0], ["sharding", 4, 0], ["ranks", 5, 1], ["memory", 6, 1, bytes], ["device time", 7, 1, time], ["runner-up", 8, 0, v => v, "wrap"], ["costs", 9, 1, v => v === null ? "-" : "+" + time(v)]];
let order = 7, down = true, chosen = null;
function explorer() {
  if (!D.tables.length) { $("tables").remove(); return; }
  COLUMNS.forEach(([name, field, numeric]) => {
    const th = html("th", $("columns"), undefined, { className: numeric ? "n" : "" });
    html("button", th, name).addEventListener("click", () => { down = order === field ? !down : Boolean(numeric); order = field; rows(); });
  });
  [...new Set(D.tables.map(t => t[4]))].sort().forEach(o => html("option", $("option"), o, { value: o }));
  $("filter").addEventListener("input", rows); $("option").addEventListener("change", rows);
  rows(); detail(D.tables.reduce((a, b) => a[7] >= b[7] ? a : b));
}
function rows() {
  const want = $("filter").value.toLowerCase(), option = $("option").value;
  const found = D.tables.filter(t => t[0].toLowerCase().includes(want) && (!option || t[4] === option));
  found.sort((a, b) => { const [p, q] = [a[order] ?? -Infinity, b[order] ?? -Infinity]; return (p < q ? -1 : p > q ? 1 : a[0] < b[0] ? -1 : 1) * (down ? -1 : 1); });
  const body = document.createDocumentFragment();
  for (const t of found) {
    const tr = html("tr", body, undefined, { tabIndex: 0, className: t === chosen ? "on" : "" });
    for (const [, field, numeric, show, more] of COLUMNS) html("td", tr, show ? show(t[field]) : t[field], { className: numeric ? "n" : more ?? "" });
    tr.addEventListener("click", () => detail(t, tr)); tr.addEventListener("keydown", k => { if (k.key === "Enter") detail(t, tr); });
  }
  $("rows").replaceChildren(body);
  $("count").textContent = `${found.length} of ${D.tables.length} tables`;
}
function detail(t, row) {
  chosen = t;
  document.querySelector("#rows tr.on")?.classList.remove("on"); row?.classList.add("on");
  const box = $("detail"); box.replaceChildren();
  html("h2", box, t[0]); html("div", box, `${t[4]}: ${t[10]}`);
  for (const line of t[14]) html("p", box, line, { className: "note" });
  drawing(t, box);
  const table = html("table", box), body = html("tbody", table);
  for (const [name, s] of Object.entries(t[12])) { const tr = html("tr", body); html("td", tr, name); html("td", tr, time(s), { className: "n" }); }
  const note = t[8] ? `runner-up: ${t[8]}${t[9] === null ? ", does not fit" : `, ${time(t[9])} more`}` : "no other option";
  html("p", box, note, { className: "note" });
}
function blocks(t) {
  const [, n, dim, , option] = t;
  if (option.startsWith("row_wise")) { const each = Math.ceil(n / D.world); return Array.from({ length: D.world }, (_, r) => [r, Math.min(r * each, n), 0, Math.max(0, Math.min(each, n - r * each)), dim]); }
  if (option.startsWith("data_parallel")) return [["every rank", 0, 0, n, dim]];
  return t[11];
}
const tint = rank => colour(typeof rank === "number" ? rank % 8 : 7);  // of a host of 8 each device has its own
function drawing(t, box) {
  const W = 330, H = 210, left = 2, top = 16, w = W - left - 40, h = H - top - 26, root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `blocks of ${t[0]}` }, box);
  text(left, 11, `${t[2]} columns`, root, { class: "dim" });
  for (const [rank, row, col, n, cols] of blocks(t)) {
    if (!n) continue;
    const a = { x: left + col / t[2] * w, y: top + row / t[1] * h, width: Math.max(0.8, cols / t[2] * w), height: Math.max(0.5, n / t[1] * h) };
    svg("rect", { ...a, fill: tint(rank), stroke: "var(--panel)", "stroke-width": a.height > 4 ? 1 : 0 }, root, `${typeof rank === "number" ? "rank " : ""}${rank}\nrows ${count(row)} to ${count(row + n)}, columns ${col} to ${col + cols}`);
    if (a.height > 13 && a.width > 30) text(a.x + 4, a.y + 12, typeof rank === "number" ? `r${rank}` : rank, root, { class: over(typeof rank === "number" ? rank % 8 : 7), style: "pointer-events:none" });
  }
  let from = 0;
  t[13].forEach(([tier, n], i) => { const y = top + from / t[1] * h, hh = Math.max(1.5, n / t[1] * h); svg("rect", { x: left + w + 6, y, width: 10, height: hh, fill: colour(i + 2) }, root, `${tier}: ${count(n)} rows, hottest first`); text(left + w + 19, Math.min(y + 9, H - 30), tier, root); from += n; });
  text(left, H - 8, `${count(t[1])} rows${t[13].length ? ", tiers by popularity on the right" : ""}`, root, { class: "dim" });
}
