"use strict";
// The picture of the fused graph: a list of operations in the order in which they run, folded along the modules, with
// lanes for values that are read further down. Text reaches the page through textContent alone.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, classes, networks } = data;
const at = (id) => document.getElementById(id);
const [view, canvas, panel, find, found] = ["view", "canvas", "panel", "find", "found"].map(at);
const ROW = 30, LANE = 10, MOST_LANES = matchMedia("(max-width: 640px)").matches ? 5 : 16, OPEN_AT_FIRST = 45, MOST_CARDS = 12;

function el(name, attributes = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value != null) made.setAttribute(key, value);
  made.append(...content.filter((c) => c != null));
  return made;
}
function svg(name, attributes, ...content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...content);
  return made;
}
const look = (number) => (number ? `c${(number - 1) % 6} p${Math.floor((number - 1) / 6) % 4}` : "pin");
const chip = (k) => el("span", { class: "chip" }, el("i", { class: `swatch ${look(classes[k].number)}`, "aria-hidden": "true" }),
  classes[k].number ?? "");
const named = (k) => (classes[k].number ? `class ${classes[k].number}` : "pinned");
const short = (n) => (n >= 1e9 ? `${(n / 1e9).toPrecision(3)} G` : n >= 1e6 ? `${(n / 1e6).toPrecision(3)} M`
  : n >= 1e4 ? `${(n / 1e3).toPrecision(3)} k` : String(n));

// Items: groups and nodes, each with the range of nodes that it covers ------------------------------------------
const items = [], leafOf = [];
function build(list, level, up) {
  return list.map((entry) => {
    const item = { id: items.length, level, up, open: false, node: null, items: null };
    items.push(item);
    if (typeof entry === "number") {
      item.node = nodes[entry];
      item.from = item.to = entry;
      item.classes = new Set(item.node.classes.map(([k]) => k));
      item.inserted = item.node.inserted;
      leafOf[entry] = item;
    } else {
      Object.assign(item, { path: entry.path, parameters: entry.parameters, units: entry.units });
      item.items = build(entry.items, level + 1, item);
      item.from = item.items[0].from;
      item.to = item.items.at(-1).to;
      item.classes = new Set(item.items.flatMap((i) => [...i.classes]));
      item.inserted = item.items[0].inserted.filter((p) => item.items.every((i) => i.inserted.includes(p)));
    }
    return item;
  });
}
const root = build(data.tree, 1, null);
const title = (item) => item.path ?? item.node.target ?? item.node.name;
const unitOf = (item, p) => (item.items ? item.units : item.node.units)?.[p] ?? null;

function* visible(list = root) {
  for (const item of list) {
    yield item;
    if (item.open) yield* visible(item.items);
  }
}

// Rows ---------------------------------------------------------------------------------------------------------
function rowOf(item) {
  if (item.row) return item.row;
  const node = item.node, first = node?.classes[0]?.[0];
  const path = title(item), within = item.up ? item.up.path.length + 1 : 0;
  const name = el("span", { class: "name", style: `--level:${item.level - 1}` },
    item.items ? el("i", { class: "fold", "aria-hidden": "true" }) : null,
    item.items ? path.slice(within) : node.label,
    el("span", { class: "op" }, item.items ? `${item.to - item.from + 1} operations` : node.op));
  const marks = el("span", { class: "marks" });
  const shown = [...item.classes].filter((k) => classes[k].number || !item.items);
  for (const k of shown.slice(0, item.items ? 3 : 2)) marks.append(chip(k));
  const more = shown.length - marks.children.length;
  if (more > 0) marks.append(el("span", { class: "dim" }, `+${more}`));
  const quality = first == null ? null : classes[first].quality;
  const row = el("div", { class: item.items ? "row group" : "row", role: "treeitem", id: `row${item.id}`, tabindex: "-1",
      "aria-level": item.level, "aria-selected": "false",
      "aria-label": `${path}${item.items ? "" : `, ${node.op || node.label}`}${shown.length ? `, ${shown.slice(0, 3).map(named).join(", ")}` : ""}` },
    name,
    el("span", { class: "shape" }, node ? (node.shape?.join(" × ") ?? "") : item.parameters ? short(item.parameters) : ""),
    marks,
    el("span", { class: "quality" }, node && quality != null ? quality.toFixed(2) : ""));
  networks.forEach((_, p) => {
    const unit = unitOf(item, p), gone = item.inserted.includes(p);
    const width = node && first != null ? String(classes[first].widths[p]) : "";
    const said = gone ? "inserted" : [unit, width].filter(Boolean).join(" · ");
    row.append(el("span", { class: gone ? "net gone" : "net", title: said }, said));
  });
  return (item.row = row);
}

const heading = el("div", { class: "head", "aria-hidden": "true" },
  ...["layer", "shape, parameters", "class", "match", ...networks.map((_, p) => `network ${p + 1}`)]
    .map((said, i) => el("span", { class: ["name", "shape", "marks", "quality"][i] ?? "net" }, said)));
const lines = svg("svg", { class: "lines", "aria-hidden": "true" });
const tree = el("div", { class: "tree", role: "tree", "aria-label": "Operations of the fused network" });
canvas.append(heading, el("div", { class: "body" }, lines, tree));
canvas.style.setProperty("--networks", networks.length);
if (items.some((item) => item.inserted.length || networks.some((_, p) => unitOf(item, p)))) canvas.style.setProperty("--net", "7.4rem");

let rows = [], selected = root[0], chosen = null;
function draw() {
  rows = [...visible()];
  tree.replaceChildren(...rows.map((item) => {
    const row = rowOf(item);
    if (item.items) row.setAttribute("aria-expanded", item.open);
    return row;
  }));
  if (!rows.includes(selected)) selected = rows[0];
  canvas.closest(".picture").style.setProperty("--rows", rows.length);
  trace();
  mark();
}

// Lanes: one per value that is read further down than the next row; values that do not overlap share one.
function trace() {
  const dots = rows.map((item, i) => ({ item, y: (i + 0.5) * ROW })).filter(({ item }) => !item.open);
  const place = [];
  dots.forEach(({ item }, d) => { for (let n = item.from; n <= item.to; n++) place[n] = d; });
  const reads = dots.map(() => new Set());
  nodes.forEach((node, n) => node.inputs.forEach((m) => { if (place[m] !== place[n]) reads[place[m]].add(place[n]); }));
  const spans = reads.map((set, from) => ({ from, to: [...set].filter((t) => t !== from + 1).sort((a, b) => a - b) }))
    .filter((s) => s.to.length).sort((a, b) => (a.to.at(-1) - a.from) - (b.to.at(-1) - b.from) || a.from - b.from);
  const lanes = [];
  for (const s of spans) {
    const free = (taken) => taken.every(([a, b]) => s.to.at(-1) <= a || s.from >= b);
    s.lane = lanes.findIndex(free);
    if (s.lane < 0) s.lane = lanes.length < MOST_LANES ? lanes.push([]) - 1 : MOST_LANES - 1;
    lanes[s.lane].push([s.from, s.to.at(-1)]);
  }
  const gutter = 26 + LANE * lanes.length, x = gutter - 10;
  canvas.style.setProperty("--gutter", `${gutter}px`);
  const edge = (from, d) => {
    const source = dots[from].item, k = last(source), hot = chosen != null && source.classes.has(chosen);
    const style = k == null || !classes[k].number ? "" : `k${(classes[k].number - 1) % 6}`;
    return svg("path", { d, class: `${style} ${hot ? "hot" : ""}` });
  };
  const drawn = spans.map(({ from, to, lane }) => {
    const left = x - 10 - LANE * lane, start = dots[from].y, r = 7;
    const goals = to.map((t) => `M${left} ${start + r}V${dots[t].y - r}Q${left} ${dots[t].y} ${left + r} ${dots[t].y}H${x}`);
    return edge(from, `M${x} ${start}H${left + r}Q${left} ${start} ${left} ${start + r}${goals.join("")}`);
  });
  reads.forEach((set, d) => { if (set.has(d + 1)) drawn.push(edge(d, `M${x} ${dots[d].y}V${dots[d + 1].y}`)); });
  for (const { item, y } of dots) {
    const k = last(item), style = `dot ${k == null || !classes[k].number ? "" : `k${(classes[k].number - 1) % 6}`}`;
    drawn.push(item.items ? svg("rect", { x: x - 5, y: y - 5, width: 10, height: 10, rx: 2, class: style })
      : svg("circle", { cx: x, cy: y, r: 4, class: style }));
  }
  lines.setAttribute("width", gutter);
  lines.setAttribute("height", rows.length * ROW);
  lines.replaceChildren(...drawn);
}
/** The class that an item hands on: the first of its last node. */
const last = (item) => nodes[item.to].classes[0]?.[0] ?? null;

function mark() {
  canvas.classList.toggle("chosen", chosen != null);
  for (const item of rows) {
    item.row.classList.toggle("same", chosen != null && item.classes.has(chosen));
    item.row.setAttribute("aria-selected", item === selected);
    item.row.tabIndex = item === selected ? 0 : -1;
  }
}

// What is known of the selected item ---------------------------------------------------------------------------
const jump = (n) => {
  const button = el("button", { type: "button", class: "link" }, nodes[n].target ?? nodes[n].name);
  button.addEventListener("click", () => reveal(leafOf[n]));
  return button;
};
const facts = (pairs) => el("dl", {}, ...pairs.filter(([, said]) => said != null && said.length !== 0)
  .flatMap(([name, said]) => [el("dt", {}, name), el("dd", {}, ...(Array.isArray(said) ? said : [said]))]));
const spaced = (parts) => parts.flatMap((part, i) => (i ? [", ", part] : [part]));
function who(list) {
  if (list.length === networks.length) return networks.length === 2 ? "shared by both" : `shared by all ${networks.length}`;
  const names = list.map((p) => p + 1).join(" and ");
  return list.length === 1 ? `from network ${names} alone` : `shared by ${names}`;
}
const kind = (list) => (list.length === networks.length ? "all" : list.length > 1 ? "some" : list.length ? `only o${list[0] % 4}` : "none");

function card(k) {
  const c = classes[k];
  const bar = c.shared.length ? el("span", { class: "mix wide", "aria-hidden": "true" }, ...c.shared.map(([list, n]) =>
    el("i", { class: kind(list), style: `width:${(100 * n) / c.size}%` }))) : null;
  const sites = c.sites.map(([site, reads]) => el("li", {}, `${site} `, el("span", { class: "dim" }, reads ? "reads" : "")));
  const show = el("button", { type: "button", "aria-pressed": String(chosen === k) }, "Show in the picture");
  show.addEventListener("click", () => {
    chosen = chosen === k ? null : k;
    trace();
    mark();
    panel.querySelectorAll("[aria-pressed]").forEach((b) => b.setAttribute("aria-pressed", String(b === show && chosen === k)));
  });
  return el("section", { class: "card" },
    el("h4", {}, chip(k), c.number ? `Class ${c.number}` : "Pinned"),
    facts([
      ["first site", c.name],
      ["why it stays", c.pinned],
      ["neurons", `${c.widths.join(" + ")} → ${c.size}`],
      ["coupling", c.shared.length ? [bar, c.shared.map(([list, n]) => `${n} ${who(list)}`).join(", ")] : null],
      ["match quality", c.quality == null ? null : c.quality.toFixed(3)],
      ["in blocks of", c.within.length ? spaced(c.within.map(named)) : null],
    ]),
    show,
    el("details", {}, el("summary", {}, `${c.sites.length} sites`), el("ul", { class: "sites" }, ...sites)));
}

function describe(item) {
  const node = item.node, parts = [el("h3", {}, title(item))];
  const parents = networks.map((_, p) => (item.inserted.includes(p) ? "inserted: passes on what it reads" : unitOf(item, p)))
    .map((said, p) => [`network ${p + 1}`, said]);
  if (node) {
    const own = new Map(node.classes.map(([k, axis]) => [k, axis]));
    parts.push(facts([
      ["operation", node.source],
      ["shape", node.shape ? node.shape.join(" × ") || "scalar" : null],
      ["reads", spaced(node.inputs.map(jump))],
      ["read by", spaced(nodes.flatMap((other, n) => (other.inputs.includes(item.from) ? [jump(n)] : [])))],
      ["variance", node.variance ? `${node.variance.map((v) => (v == null ? "–" : v.toFixed(3))).join(" → ")} of the parents' (before → after repair)` : null],
      ["axes", node.sites.length ? [el("ul", { class: "sites" }, ...node.sites.map(([site, k, reads]) =>
        el("li", {}, chip(k), ` ${site} `, el("span", { class: "dim" }, reads ? "reads" : "makes"))))] : null],
      ...parents,
    ]));
    parts.push(...[...own.keys()].slice(0, MOST_CARDS).map(card));
    if (own.size > MOST_CARDS) parts.push(el("p", { class: "dim" }, `and ${own.size - MOST_CARDS} classes more`));
    if (!own.size) parts.push(el("p", { class: "dim" }, "Its output carries no neurons."));
  } else {
    const free = [...item.classes].filter((k) => classes[k].number);
    parts.push(facts([
      ["operations", String(item.to - item.from + 1)],
      ["parameters", item.parameters.toLocaleString("en")],
      ...parents,
      ["classes", free.map((k) => el("span", { class: "line" }, chip(k), ` ${classes[k].name}`))],
    ]));
  }
  panel.replaceChildren(...parts);
  panel.scrollTop = 0;
}

function select(item, focus = true) {
  selected = item;
  mark();
  describe(item);
  if (focus) {
    item.row.focus({ preventScroll: true });
    item.row.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}
function fold(item, open) {
  if (!item.items || item.open === open) return;
  item.open = open;
  draw();
}
function reveal(item) {
  for (let up = item.up; up; up = up.up) up.open = true;
  draw();
  select(item, false);
  item.row.focus({ preventScroll: true });
  view.scrollTo({ top: Math.max(0, (rows.indexOf(item) * ROW - view.clientHeight / 3) * scale), left: 0 });
  item.row.scrollIntoView({ block: "nearest", inline: "nearest" });
}

let dragged = false;
tree.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (!row || dragged) return;
  const item = items[row.id.slice(3)];
  fold(item, !item.open);
  select(item);
});
tree.addEventListener("keydown", (event) => {
  const i = rows.indexOf(selected), item = selected;
  const step = { ArrowDown: i + 1, ArrowUp: i - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (step != null) select(rows[Math.min(Math.max(step, 0), rows.length - 1)]);
  else if (event.key === "ArrowRight") item.items && (item.open ? select(item.items[0]) : (fold(item, true), select(item)));
  else if (event.key === "ArrowLeft") item.open ? (fold(item, false), select(item)) : item.up && select(item.up);
  else if (event.key === "Enter" || event.key === " ") { fold(item, !item.open); select(item); }
  else return;
  event.preventDefault();
});
function all(open) {
  for (const item of items) if (item.items) item.open = open;
  draw();
}
at("open").addEventListener("click", () => all(true));
at("close").addEventListener("click", () => { all(false); view.scrollTo(0, 0); });

// Zoom and pan -------------------------------------------------------------------------------------------------
let scale = 1;
function zoom(to) {
  scale = Math.min(2, Math.max(0.3, Math.round(to * 10) / 10));
  canvas.style.zoom = scale;
  at("scale").textContent = `${Math.round(100 * scale)} %`;
}
at("in").addEventListener("click", () => zoom(scale + 0.1));
at("out").addEventListener("click", () => zoom(scale - 0.1));
view.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  zoom(scale + (event.deltaY < 0 ? 0.1 : -0.1));
}, { passive: false });
let grip = null;
view.addEventListener("pointerdown", (event) => {
  dragged = false;
  if (event.pointerType === "mouse" && event.button === 0) grip = [event.clientX + view.scrollLeft, event.clientY + view.scrollTop];
});
addEventListener("pointermove", (event) => {
  if (!grip) return;
  const [x, y] = [grip[0] - event.clientX, grip[1] - event.clientY];
  if (!dragged && Math.hypot(x - view.scrollLeft, y - view.scrollTop) < 5) return;
  dragged = true;
  view.scrollTo(x, y);
});
addEventListener("pointerup", () => { grip = null; });

// Search -------------------------------------------------------------------------------------------------------
const known = [
  ...classes.flatMap((c, k) => (c.number ? [{ said: `class ${c.number}`, more: c.name, go: () => choose(k) }] : [])),
  ...items.map((item) => ({ said: title(item), more: item.items ? "group" : item.node.op || item.node.label, go: () => reveal(item) })),
].map((entry) => ({ ...entry, text: `${entry.said} ${entry.more}`.toLowerCase() }));
function choose(k) {
  chosen = k;
  const item = items.find((i) => i.node && i.node.classes.some(([other]) => other === k));
  if (item) reveal(item);
}
let hits = [], active = -1;
function search() {
  const wanted = find.value.trim().toLowerCase();
  const matching = wanted ? known.filter((entry) => entry.text.includes(wanted)) : [];
  hits = matching.slice(0, 40);
  active = hits.length ? 0 : -1;
  found.replaceChildren(...hits.map((entry, i) => el("span", { role: "option", id: `hit${i}`, class: "hit" },
    entry.said, el("span", { class: "dim" }, entry.more))));
  if (wanted) found.append(el("span", { class: "dim count" }, matching.length ? `${matching.length} found` : "nothing found"));
  found.hidden = !wanted;
  find.setAttribute("aria-expanded", String(!found.hidden));
  point();
}
function point() {
  [...found.querySelectorAll(".hit")].forEach((option, i) => option.setAttribute("aria-selected", String(i === active)));
  if (active < 0) return find.removeAttribute("aria-activedescendant");
  find.setAttribute("aria-activedescendant", `hit${active}`);
  at(`hit${active}`).scrollIntoView({ block: "nearest" });
}
function take(i) {
  const entry = hits[i];
  find.value = "";
  search();
  entry?.go();
}
find.addEventListener("input", search);
find.addEventListener("keydown", (event) => {
  if (event.key === "Enter") take(active);
  else if (event.key === "Escape") { find.value = ""; search(); }
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    active = hits.length ? (active + (event.key === "ArrowDown" ? 1 : hits.length - 1)) % hits.length : -1;
    point();
  } else return;
  event.preventDefault();
});
found.addEventListener("mousedown", (event) => {
  const option = event.target.closest(".hit");
  event.preventDefault();
  if (option) take(Number(option.id.slice(3)));
});
find.addEventListener("blur", () => { found.hidden = true; find.setAttribute("aria-expanded", "false"); });

// Open as many levels as can be taken in at a glance.
for (let level = root; level.length;) {
  const groups = level.filter((item) => item.items);
  const inside = groups.flatMap((item) => item.items);
  const count = [...visible()].length;
  if (!groups.length || (count > 3 && count + inside.length > OPEN_AT_FIRST)) break;
  for (const item of groups) item.open = true;
  level = inside;
}
document.querySelectorAll(".tools, .picture").forEach((part) => { part.hidden = false; });
draw();
describe(selected);
})();
