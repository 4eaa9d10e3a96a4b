"use strict";
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const NAME = 0, TYPE = 1, CALL = 2, MODULE = 3, SOURCE = 4, KIND = 5, SENT = 6;
  const MOST = 3;
  const esc = (x) => String(x).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const field = (line, at) => (line[at] < 0 ? "" : D.texts[line[at]]);
  const sum = (xs) => xs.reduce((a, b) => a + b, 0);
  const number = (text, source, exact) => `<span class="n" data-p="${source}" title="${esc(exact ?? text)}, ${source}">${esc(text)}</span>`;

  // the same three digits as Python's units.py
  const TIMES = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]];
  const BINARY = ["PiB", "TiB", "GiB", "MiB", "KiB", "B"].map((unit, i) => [1024 ** (5 - i), unit]);
  const DECIMAL = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
  function digits(x, scales) {
    const [scale, unit] = scales.find(([each]) => Math.abs(x) >= each * 0.9995) ?? scales.at(-1), value = x / scale;
    return `${Math.abs(value) < 999.5 ? Number(value.toPrecision(3)) : grouped(Math.round(value))} ${unit}`.trim();
  }
  const bytes = (x) => digits(x, BINARY);
  const took = (x) => digits(x, TIMES);
  const flops = (x) => digits(x, DECIMAL.map(([scale, prefix]) => [scale, prefix + "FLOP"]));
  const grouped = (x) => String(x).replace(/\B(?=(\d{3})+(?!\d))/g, ",");

  // ---- what is shown -------------------------------------------------------------------------------------------
  D.options.forEach((o) => (o.where = o.where.map(([segment, module, kind, direction, count, size]) => ({ segment, module: D.texts[module], kind: D.kinds[kind], direction: ["forward", "backward"][direction], count, bytes: size }))));
  D.rings.forEach((ring) => {
    for (const name in ring.layouts) ring.layouts[name] = ring.layouts[name].map((row) => row.split(" ").flatMap((run) => Array(Number(run.slice(2) || 1)).fill(parseInt(run.slice(0, 2), 36))));
  });
  const runnable = D.options.map((o, i) => i).filter((i) => !D.options[i].blocked);
  // the best of each kind first
  const kind = (i) => D.options[i].name.split(" ")[0];
  const firsts = runnable.filter((i, k) => runnable.findIndex((j) => kind(j) === kind(i)) === k);
  let shown = [...new Set([...firsts, ...runnable])].slice(0, window.innerWidth < 1000 ? 2 : MOST).sort((a, b) => a - b);
  const draws = [];
  const draw = () => draws.forEach((each) => each());
  const picks = [...document.querySelectorAll(".pick")];
  picks.forEach((box) => {
    box.checked = shown.includes(Number(box.value));
    box.addEventListener("change", () => {
      const own = Number(box.value);
      shown = box.checked ? [...shown, own].slice(-MOST) : shown.filter((i) => i !== own);
      if (!shown.length) shown = [own];
      picks.forEach((each) => (each.checked = shown.includes(Number(each.value))));
      shown.sort((a, b) => a - b);
      draw();
    });
  });

  /** A row of buttons of which one is pressed. */
  function segmented(node, names, at, pressed) {
    node.innerHTML = names.map((name, i) => `<button type="button" aria-pressed="${i === at}">${name}</button>`).join("");
    [...node.children].forEach((button, i) =>
      button.addEventListener("click", () => {
        [...node.children].forEach((each, j) => each.setAttribute("aria-pressed", String(j === i)));
        pressed(i);
      }));
    node.hidden = names.length < 2;
  }

  // ---- where the bytes go --------------------------------------------------------------------------------------
  draws.push(function layers() {
    const rows = new Map();
    shown.forEach((option, column) =>
      D.options[option].where.forEach((cell) => {
        const key = JSON.stringify([cell.segment < 0 ? D.segments.length : cell.segment, cell.module]);
        if (!rows.has(key)) rows.set(key, shown.map(() => []));
        rows.get(key)[column].push(cell);
      }));
    const most = (inside) => Math.max(1, ...[...rows.values()].flat(2).filter((cell) => cell.segment >= 0 === inside).map((cell) => cell.bytes));
    const scales = { true: most(true), false: most(false) };
    const keys = [...rows.keys()].map((key) => JSON.parse(key)).sort((a, b) => a[0] - b[0]);
    let html = `<thead><tr><th scope="col">Module</th>${shown.map((i) => `<th scope="col">${esc(D.options[i].name)}</th>`).join("")}</tr></thead><tbody>`;
    let before = null;
    for (const [segment, module] of keys) {
      if (segment !== before) {
        const found = D.segments[segment];
        const title = found ? `<code>${esc(found.title)}</code>${found.times > 1 ? `<span class="times">× ${found.times}</span>` : ""}` : "outside of layers";
        html += `<tr class="head"><th scope="rowgroup" colspan="${shown.length + 1}">${title}</th></tr>`;
        before = segment;
      }
      const cells = rows.get(JSON.stringify([segment, module]));
      html += `<tr><th scope="row">${esc(module || "(itself)")}</th>${cells.map((own) => `<td>${moves(own, scales[segment < D.segments.length])}</td>`).join("")}</tr>`;
    }
    $("where").innerHTML = html + "</tbody>";
  });

  function moves(cells, most) {
    const kinds = D.kinds.filter((kind) => cells.some((cell) => cell.kind === kind && cell.bytes));
    if (!kinds.length) return '<span class="none">nothing is sent</span>';
    return kinds.map((kind) => {
      const lines = ["forward", "backward"].map((direction) => {
        const own = cells.filter((cell) => cell.kind === kind && cell.direction === direction);
        if (!own.length) return "";
        const size = sum(own.map((cell) => cell.bytes)), count = sum(own.map((cell) => cell.count));
        return `<span class="${direction}" title="${direction}: ${grouped(count)} messages, ${grouped(size)} bytes"><em>${direction === "forward" ? "fwd" : "bwd"}</em><i class="bar2 ${kind}" style="width:${((64 * size) / most).toFixed(1)}px"></i>${number(bytes(size), "counted", grouped(size) + " bytes")}</span>`;
      });
      return `<div class="move"><b><i class="sw ${kind}"></i>${kind}</b><div class="lines">${lines.join("")}</div></div>`;
    }).join("");
  }

  // ---- the graph -----------------------------------------------------------------------------------------------
  const largest = D.segments.reduce((best, each, i) => (each.times > D.segments[best].times ? i : best), 0);
  let segment = largest;
  const segmentNames = () => D.segments.map((each) => `${esc(each.title)}${each.times > 1 ? ` × ${each.times}` : ""}`);
  segmented($("segments"), segmentNames(), segment, (i) => { segment = i; graph(); });
  $("moves").addEventListener("change", () => graph());

  /** Lines of several graphs as rows: nodes of the first graph share one with their like, new ones stand side by side. */
  function aligned(columns) {
    const base = columns[0].length ? columns[0] : columns[1] || [];
    const order = new Map(base.map((line, i) => [D.lines[line][NAME], i]));
    const rows = Array.from({ length: base.length + 1 }, () => ({ same: columns.map(() => null), after: [] }));
    columns.forEach((lines, column) => {
      let at = 0, fresh = 0;
      lines.forEach((index) => {
        const line = D.lines[index], found = order.get(line[NAME]);
        if (found !== undefined && found + 1 > at) {
          [at, fresh] = [found + 1, 0];
          rows[at].same[column] = line;
        } else {
          const own = (rows[at].after[fresh] ??= columns.map(() => null));
          own[column] = line;
          fresh++;
        }
      });
    });
    return rows.flatMap(({ same, after }) => [same, ...after]).filter((row) => row.some(Boolean));
  }

  function cell(line, isNew) {
    if (!line) return "<td></td>";
    const [kind, forward, backward] = field(line, SENT).split("|");
    const tip = [forward && `sends ${forward} forward`, backward && `${backward} backward`].filter(Boolean).join(", ");
    const tag = kind ? `<span class="tag ${kind}">${kind}${forward ? " " + forward : ""}</span>` : "";
    const type = esc(field(line, TYPE)).replace(/\d+(\.\.\d+)?(@(sp|outer|inner))+/g, '<span class="sp">$&</span>');
    const call = esc(field(line, CALL));
    const style = kind ? ` style="border-left-color:var(--${kind})"` : "";
    return `<td class="${isNew ? "new" : ""}"${style} data-source="${line[SOURCE]}" data-name="${line[NAME]}" title="${esc(field(line, TYPE))} = ${call}${tip && `\n${tip}`}">${tag}%${esc(field(line, NAME))} <span class="t">: ${type}</span><span class="c">${call}</span></td>`;
  }

  function graph() {
    const columns = [D.segments[segment].before, ...shown.map((i) => D.options[i].graph[segment] || [])];
    let rows = aligned(columns);
    if ($("moves").checked) rows = rows.filter((row) => row.some((line) => line && (field(line, SENT) || field(line, KIND) === "move")));
    let html = `<table><thead><tr><th scope="col">before</th>${shown.map((i) => `<th scope="col">${esc(D.options[i].name)}</th>`).join("")}</tr></thead><tbody>`;
    let before = null;
    for (const row of rows) {
      const line = row.find(Boolean), module = field(line, MODULE);
      if (module !== before) html += `<tr class="mod"><th scope="rowgroup" colspan="${columns.length}">${esc(module || "(itself)")}</th></tr>`;
      before = module;
      html += `<tr tabindex="-1">${row.map((own, i) => cell(own, i > 0 && !row[0] && columns[0].length)).join("")}</tr>`;
    }
    if (!rows.length) html += `<tr><td colspan="${columns.length}" class="none">nothing moves here</td></tr>`;
    $("lines").innerHTML = html + "</tbody></table>";
    const sends = document.querySelector("#lines .tag")?.closest("tr");
    $("lines").scrollTop = sends ? sends.offsetTop - 150 : 0;
  }
  draws.push(graph);

  function says(text) {
    const found = /^(\S*?:\d+): (.*)$/.exec(text);
    $("source").innerHTML = found ? `<b>${esc(found[1])}</b>  ${esc(found[2])}` : esc(text) || '<span class="hint">no source line: what the compiler made itself</span>';
  }
  function point(target) {
    const own = target.closest("td[data-source]") || target.closest("tr")?.querySelector("td[data-source]");
    if (!own) return;
    document.querySelectorAll("#lines td.same").forEach((each) => each.classList.remove("same"));
    const source = own.dataset.source, text = D.texts[source] || "";
    if (text) document.querySelectorAll(`#lines td[data-source="${source}"]`).forEach((each) => each.classList.add("same"));
    says(text);
  }
  $("lines").addEventListener("mouseover", (event) => point(event.target));
  $("lines").addEventListener("focusin", (event) => point(event.target));
  $("lines").addEventListener("keydown", (event) => {
    const way = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!way) return;
    event.preventDefault();
    const rows = [...document.querySelectorAll("#lines tr[tabindex]")];
    const at = rows.indexOf(document.activeElement);
    const next = rows[Math.min(Math.max(at + way, 0), rows.length - 1)];
    if (next) next.focus();
  });

  // ---- search --------------------------------------------------------------------------------------------------
  const input = $("find"), list = $("found");
  let hits = [], chosen = 0;
  function search(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean), seen = new Set(), found = [];
    if (!words.length) return [];
    D.segments.forEach((each, at) =>
      [each.before, ...shown.map((i) => D.options[i].graph[at] || [])].forEach((lines) =>
        lines.forEach((index) => {
          const line = D.lines[index], key = `${at}:${line[NAME]}`;
          if (seen.has(key)) return;
          const text = [NAME, CALL, MODULE, SOURCE, SENT].map((f) => field(line, f)).join(" ").toLowerCase() + " " + each.title.toLowerCase();
          if (words.every((word) => text.includes(word))) { seen.add(key); found.push({ segment: at, line }); }
        })));
    return found;
  }
  function results() {
    hits = search(input.value).slice(0, 60);
    chosen = 0;
    list.innerHTML = hits.map((hit, i) => `<li role="option" id="hit-${i}" aria-selected="${i === 0}"><code>%${esc(field(hit.line, NAME))}</code><span>${esc(field(hit.line, CALL))}</span><span>${esc(D.segments[hit.segment].title)} ${esc(field(hit.line, MODULE))}</span></li>`).join("") || "<li>nothing found</li>";
    list.hidden = !input.value.trim();
    input.setAttribute("aria-expanded", String(!list.hidden));
  }
  function go(hit) {
    if (!hit) return;
    segment = hit.segment;
    $("moves").checked = false;
    [...$("segments").children].forEach((each, i) => each.setAttribute("aria-pressed", String(i === segment)));
    graph();
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    const found = document.querySelector(`#lines td[data-name="${hit.line[NAME]}"]`);
    $("graph").scrollIntoView();
    if (!found) return;
    found.classList.add("hit");
    found.scrollIntoView({ block: "center" });
    found.parentElement.focus({ preventScroll: true });
    point(found);
  }
  input.addEventListener("input", results);
  input.addEventListener("keydown", (event) => {
    const way = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (way && hits.length) {
      event.preventDefault();
      chosen = (chosen + way + hits.length) % hits.length;
      [...list.children].forEach((each, i) => each.setAttribute("aria-selected", String(i === chosen)));
      input.setAttribute("aria-activedescendant", `hit-${chosen}`);
      list.children[chosen].scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter") go(hits[chosen]);
    else if (event.key === "Escape") { list.hidden = true; input.blur(); }
  });
  list.addEventListener("mousedown", (event) => {
    const at = [...list.children].indexOf(event.target.closest("li"));
    if (at >= 0) { event.preventDefault(); go(hits[at]); }
  });
  input.addEventListener("blur", () => (list.hidden = true));
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); input.focus(); input.select(); }
  });

  // ---- tensors by rank -----------------------------------------------------------------------------------------
  const tensors = [...new Set(D.options.flatMap((o) => o.placed.map((each) => each.name)))];
  let tensor = 0;
  segmented($("tensor"), tensors, 0, (i) => { tensor = i; placements(); });

  /** One tensor as a box for each row of the batch (four at most), what the rank has painted on its sides. */
  function box(shape, ranges) {
    const w = 92, h = 40, dx = 11, dy = 8, gap = 5;
    const rows = Math.min(shape[0], 4), height = rows * (h + dy + gap);
    const of = (dim, size) => ranges[dim].map(([lo, hi]) => [(lo / shape[dim]) * size, (hi / shape[dim]) * size]);
    const widest = (pairs, least) => pairs.map(([a, b]) => [a, Math.max(b, a + least)]);
    let svg = "";
    for (let row = 0; row < rows; row++) {
      const y = row * (h + dy + gap) + dy;
      const lo = (row * shape[0]) / rows, hi = ((row + 1) * shape[0]) / rows;
      const has = ranges[0].some(([a, b]) => a < hi && b > lo);
      svg += `<path d="M0 ${y}h${w}l${dx} ${-dy}h${-w}z M${w} ${y}l${dx} ${-dy}v${h}l${-dx} ${dy}z M0 ${y}h${w}v${h}h${-w}z" fill="var(--faint)" stroke="var(--line)"/>`;
      if (!has) continue;
      for (const [x0, x1] of widest(of(2, w), 1.2)) for (const [y0, y1] of widest(of(1, h), 1.2)) {
        svg += `<rect x="${x0}" y="${y + y0}" width="${x1 - x0}" height="${y1 - y0}" fill="var(--accent)"/>`;
        if (y0 < 0.01) svg += `<path d="M${x0} ${y}h${x1 - x0}l${dx} ${-dy}h${x0 - x1}z" fill="var(--accent)" opacity=".62"/>`;
        if (x1 > w - 0.01) svg += `<path d="M${w} ${y + y0}l${dx} ${-dy}v${y1 - y0}l${-dx} ${dy}z" fill="var(--accent)" opacity=".42"/>`;
      }
      svg += `<path d="M0 ${y}h${w}v${h}h${-w}z" fill="none" stroke="var(--soft)" stroke-opacity=".55"/>`;
    }
    return `<svg width="${w + dx + 2}" height="${height + 2}" viewBox="-1 -1 ${w + dx + 2} ${height + 2}" aria-hidden="true">${svg}</svg>`;
  }
  const range = (pairs) => pairs.map(([a, b]) => `${a}:${b}`).slice(0, 4).join(", ") + (pairs.length > 4 ? ", …" : "") || "nothing";

  function placements() {
    const node = $("placed");
    node.style.gridTemplateColumns = `repeat(${shown.length}, minmax(0, 1fr))`;
    node.innerHTML = shown.map((i) => {
      const option = D.options[i], own = option.placed.filter((each) => each.name === tensors[tensor]);
      if (!own.length) return `<div class="card"><h3>${esc(option.name)}</h3><p class="none">No attention whose sizes are known.</p></div>`;
      const places = own.filter((each, j) => j === 0 || each.boxes !== own[0].boxes);
      return `<div class="card"><h3>${esc(option.name)}</h3>` + places.map((each, j) => {
        const words = each.place === "around" ? "around the attention" : "in the attention";
        const both = places.length === 1 && own.length > 1 ? "around and in the attention" : words;
        const figures = each.ranks.map((rank, k) => {
          const ranges = D.boxes[each.boxes][k], says = `rank ${rank}: B ${range(ranges[0])}; H ${range(ranges[1])}; S ${range(ranges[2])}; D ${range(ranges[3])}`;
          return `<figure role="img" aria-label="${says}" title="${says}">${box(each.shape, ranges)}<figcaption>rank ${rank}</figcaption></figure>`;
        });
        return `${j ? "" : `<div class="small">${esc(tensors[tensor])} [${each.shape.join(", ")}]</div>`}<p class="arrow">${j ? "↓ " : ""}<b>${esc(each.placements)}</b> ${both}</p><div class="ranks">${figures.join("")}</div>`;
      }).join("") + "</div>";
    }).join("");
  }
  draws.push(placements);

  // ---- rings ---------------------------------------------------------------------------------------------------
  if ($("rings")) {
    const names = ["zigzag", "contiguous", "striped"];
    let ring = 0, layout = 0;
    const own = () => [...shown, ...runnable].flatMap((i, k) => D.options[i].rings.map((each) => [k < shown.length, D.rings[each.lanes].ranks, each])).sort((a, b) => b[0] - a[0] || b[1] - a[1])[0][2];
    const colour = (block, ranks) => `hsl(${(172 + (150 * block) / ranks).toFixed(0)} ${block % 2 ? 38 : 46}% ${block % 2 ? 61 : 69}%)`;
    function lanes() {
      const found = D.rings[ring], rows = found.layouts[names[layout]], ranks = found.ranks;
      const slowest = rows[0].map((_, step) => Math.max(...rows.map((row) => row[step])));
      const all = Math.max(...Object.values(found.layouts).map((each) => sum(each[0].map((_, step) => Math.max(...each.map((row) => row[step]))))));
      const left = 54, width = 1120, height = Math.max(5, Math.min(24, 400 / ranks)), gap = height > 8 ? 3 : 1;
      const scale = (width - left - 8) / all;
      let x = left, svg = "";
      slowest.forEach((longest, step) => {
        const w = longest * scale;
        rows.forEach((row, rank) => {
          const y = 18 + rank * (height + gap), busy = row[step] * scale, block = (((rank - step) % ranks) + ranks) % ranks;
          if (w - busy > 0.4) svg += `<rect x="${(x + busy).toFixed(2)}" y="${y}" width="${(w - busy).toFixed(2)}" height="${height}" fill="url(#idle)"/>`;
          if (busy > 0.05) svg += `<rect x="${x.toFixed(2)}" y="${y}" width="${busy.toFixed(2)}" height="${height}" fill="${colour(block, ranks)}"><title>step ${step}: rank ${rank} attends to the keys of rank ${block}</title></rect>`;
          if (height > 14 && busy > 20) svg += `<text x="${(x + busy / 2).toFixed(1)}" y="${y + height / 2 + 4}" text-anchor="middle" style="fill:#1c232b">${block}</text>`;
        });
        if (w > 2.5) svg += `<path d="M${(x + w).toFixed(2)} 14v${rows.length * (height + gap) + 4}" stroke="var(--card)" stroke-width="${w > 12 ? 2 : 0.7}"/>`;
        if (w > 22) svg += `<text x="${x + w / 2}" y="11" text-anchor="middle">${step}</text>`;
        x += w;
      });
      const every = Math.ceil(12 / (height + gap));
      rows.forEach((_, rank) => { if (rank % every === 0) svg += `<text x="${left - 8}" y="${18 + rank * (height + gap) + height / 2 + 4}" text-anchor="end">${height > 14 ? "rank " : ""}${rank}</text>`; });
      const total = 22 + rows.length * (height + gap), end = left + all * scale;
      if (end - x > 3) svg += `<path d="M${end} 14V${total - 4}" stroke="var(--soft)" stroke-dasharray="2 4"/><text x="${end - 6}" y="${total / 2 + 4}" text-anchor="end">${end - x > 170 ? "here the slowest layout is done" : ""}</text>`;
      $("lanes").innerHTML = `<svg viewBox="0 0 ${width} ${total}" role="img" aria-label="Lanes of ${ranks} ranks under the ${names[layout]} layout"><defs><pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="6" height="6" fill="var(--faint)"/><rect width="2" height="6" fill="var(--idle)"/></pattern></defs>${svg}</svg>`;
      const sums = found.sums[names[layout]], busiest = Math.max(...sums), last = found.slowest[names[layout]];
      const idle = 1 - sum(sums) / (last * ranks);
      const has = D.options.filter((o) => o.rings.some((each) => each.lanes === ring && each.layout === names[layout])).map((o) => o.name);
      $("ring-says").innerHTML = `busiest rank ${number("+" + ((100 * busiest * ranks) / sum(sums) - 100).toFixed(1) + "%", "counted")} over the mean, ranks idle ${number((100 * idle).toFixed(1) + "%", "counted")} of the time${has.length ? `; the layout of ${esc(has.join(", "))}` : ""}`;
    }
    draws.push(() => {
      const mine = own();
      ring = mine.lanes;
      layout = Math.max(names.indexOf(mine.layout), 0);
      const order = D.rings.map((_, i) => i).sort((a, b) => D.rings[a].ranks - D.rings[b].ranks);
      segmented($("ring"), order.map((i) => `${D.rings[i].ranks} ranks`), order.indexOf(ring), (k) => { ring = order[k]; lanes(); });
      segmented($("layout"), names, layout, (i) => { layout = i; lanes(); });
      lanes();
    });
  }

  // ---- memory --------------------------------------------------------------------------------------------------
  if ($("memory")) draws.push(function curves() {
    const node = $("curves");
    const most = Math.max(...shown.map((i) => D.options[i].memory?.peak || 0));
    node.style.gridTemplateColumns = `repeat(${shown.length}, minmax(0, 1fr))`;
    node.innerHTML = shown.map((i) => {
      const option = D.options[i], found = option.memory;
      if (!found) return `<div class="card"><h3>${esc(option.name)}</h3><p class="none">not counted</p></div>`;
      const w = shown.length > 1 ? 520 : 1150, h = 170, top = 20, n = found.points.length, high = (v) => top + h - (v / most) * h;
      const live = (point) => (found.points[point] / 1000) * found.peak, x = (point) => (n > 1 ? (point / (n - 1)) * w : 0);
      const path = found.points.map((_, p) => `${x(p).toFixed(1)} ${high(live(p)).toFixed(1)}`).join("L");
      const spikes = found.spikes.map((spike, k) => `<circle cx="${x(spike.point)}" cy="${high(live(spike.point))}" r="4" fill="var(--card)" stroke="var(--send_recv)" stroke-width="2"/><text class="ink" x="${Math.min(Math.max(x(spike.point), 8), w - 8)}" y="${high(live(spike.point)) - 7}" text-anchor="middle">${k + 1}</text>`).join("");
      const list = found.spikes.map((spike, k) => `<li><b>${k + 1}</b><b>${number(spike.text, "counted", spike.exact)}</b><code title="${esc(spike.line)}">${esc(spike.op)} ${esc(spike.line.replace(/^\S*\//, ""))}</code></li>`).join("");
      return `<div class="card"><h3>${esc(option.name)}</h3><svg class="curve" data-option="${i}" viewBox="0 0 ${w} ${h + top + 16}" role="img" aria-label="Memory over the step under ${esc(option.name)}: at most ${found.spikes[0]?.text}">
        <path d="M0 ${top + h}L${path}L${w} ${top + h}z" fill="var(--accent)" fill-opacity=".22"/><path d="M${path}" fill="none" stroke="var(--accent)" stroke-width="1.6"/>
        <path d="M0 ${high(found.floor)}H${w}V${top + h}H0z" fill="var(--compute)" fill-opacity=".35"/>
        <path d="M${x(found.backward)} ${top}V${top + h}" stroke="var(--soft)" stroke-dasharray="3 3"/>
        ${D.limit && D.limit < most ? `<path d="M0 ${high(D.limit)}H${w}" stroke="var(--over)" stroke-dasharray="6 3"/><text x="3" y="${high(D.limit) - 4}">what a device has: ${bytes(D.limit)}</text>` : ""}
        <text x="3" y="${Math.min(high(found.floor) + 13, top + h - 3)}">parameters and inputs</text><text x="0" y="${top + h + 13}">forward</text><text x="${x(found.backward) + 4}" y="${top + h + 13}">backward</text>${spikes}</svg><ol class="spikes">${list}</ol></div>`;
    }).join("");
    node.querySelectorAll("svg.curve").forEach((svg) => svg.addEventListener("mousemove", (event) => {
      const found = D.options[svg.dataset.option].memory, area = svg.getBoundingClientRect();
      const at = Math.min(found.points.length - 1, Math.max(0, Math.round(((event.clientX - area.left) / area.width) * (found.points.length - 1))));
      const [op, layer, line] = D.places[found.works[at]].map((text) => D.texts[text]);
      $("source").innerHTML = `<b>${bytes((found.points[at] / 1000) * found.peak)}</b>  ${esc(op)}  ${esc(layer)}  ${esc(line)}`;
    }));
  });

  // ---- time of one layer ----------------------------------------------------------------------------------------
  if ($("time")) draws.push(function time() {
    const node = $("events"), w = 1120, high = 20;
    const longest = Math.max(...shown.flatMap((i) => D.options[i].events?.lasts ?? []), 1e-9);
    const kernels = ["accent", "compute", "memory"];
    node.innerHTML = shown.map((i) => {
      const own = D.options[i].events;
      if (!own) return "";
      const rows = ["forward", "backward"].map((direction, row) => {
        const y = 4 + row * 2.9 * high, events = own[direction], last = own.lasts[row], scale = (w - 230) / longest;
        let svg = `<text x="0" y="${y + 14}">${direction}</text><text x="66" y="${y + 14}">compute</text><text x="66" y="${y + high + 16}">messages</text>`;
        svg += `<rect x="150" y="${y}" width="${last * scale}" height="${high}" fill="url(#idle-${i})"/>`;
        const done = [0, 0];
        for (let k = 0; k < events.length; k += 4) {
          const [kind, place, gap, lasts] = events.slice(k, k + 4), stream = Number(kind < D.kinds.length);
          const [start, length] = [(done[stream] + gap) * own.unit, lasts * own.unit];
          done[stream] += gap + lasts;
          const [op, , line] = D.places[place].map((text) => D.texts[text]);
          const fill = `var(--${D.kinds[kind] ?? kernels[kind - D.kinds.length]})`;
          svg += `<rect x="${(150 + start * scale).toFixed(2)}" y="${y + stream * (high + 2)}" width="${Math.max(length * scale, 0.4).toFixed(2)}" height="${high}" fill="${fill}"><title>${esc(op)}, ${took(length)}, simulated\n${esc(line)}</title></rect>`;
        }
        return svg + `<text class="ink" x="${156 + last * scale}" y="${y + 14}">${took(last)}<tspan class="soft"> ○</tspan></text>`;
      });
      return `<div class="card"><h3>${esc(D.options[i].name)} <span class="small">${esc(own.layer)}</span></h3><svg viewBox="0 0 ${w} ${5.2 * high + 6}" role="img" aria-label="Streams of one layer under ${esc(D.options[i].name)}: forward ${took(own.lasts[0])}, backward ${took(own.lasts[1])}"><defs><pattern id="idle-${i}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="6" height="6" fill="var(--faint)"/><rect width="2" height="6" fill="var(--idle)"/></pattern></defs>${rows.join("")}</svg></div>`;
    }).join("");
  });

  // ---- what if -------------------------------------------------------------------------------------------------
  if ($("what-if")) {
    const P = D.sliders, T = D.times;
    const compiled = P.formulas.map((own) => Object.fromEntries(Object.entries(own).map(([name, js]) => [name, new Function("S", "B", "N", `return ${js}`)])));
    const at = {}, hasFormulas = P.names.length > 0, STEP = "step time";
    if (hasFormulas) {
      for (const key of ["N", "S", "B"]) {
        const slider = $(key);
        slider.max = P[key].length - 1;
        slider.value = P[key].indexOf(P.at[key]);
        slider.addEventListener("input", formulas);
      }
      $("count").addEventListener("change", formulas);
    }
    $("machine")?.addEventListener("change", formulas);

    /** What the formula gives at a position; null where it does not hold. */
    function value(option, name, S, B, N) {
      if (name === STEP) return stepTime(option, S, B, N);
      const formula = compiled[option][name], holds = P.holds[option];
      return formula && N in holds.ranks && S % holds.multiple === 0 ? Math.round(formula(S, B, N)) : null;
    }

    const quantitiesAt = T && new Function("S", `return [${T.quantities}]`);
    const kinds = new Map();
    /** What one op of a kind takes on a machine, as a function of its quantities; null where the machine cannot tell. */
    function kindOn(machine, at) {
      const key = `${machine} ${at}`;
      if (!kinds.has(key)) kinds.set(key, T.machines[machine].js[at] && new Function(...T.arguments[at], `return ${T.machines[machine].js[at]}`));
      return kinds.get(key);
    }
    /** Seconds of a step on the chosen machine: simulated at the page's own sizes, elsewhere the sum over its ops. */
    function stepTime(option, S, B, N) {
      const machine = $("machine").value, simulated = D.machines[machine]?.[option]?.[0] ?? null;
      if (!hasFormulas || (S === P.at.S && B === P.at.B && N === P.at.N)) return simulated;
      const own = T?.options[option][N], on = T?.machines[machine];
      if (!own || !on || B !== T.rows[option] || S % T.multiples[option]) return null;
      const quantities = quantitiesAt(S);
      let seconds = 0;
      for (let k = 0; k < own.length; k += 2) {
        const [kind, places, [first, stride, ranks]] = T.parts[own[k]], given = places.map((place) => quantities[place]), takes = kindOn(machine, kind);
        if (!takes) return null;
        if (ranks) {
          const nodes = new Set(Array.from({ length: ranks }, (_, i) => Math.floor((first + i * stride) / on.ranks))).size;
          // where kernels do not wait for it, a sum does not say how long both take
          if ((nodes > 1 ? on.between : on.inside) !== false) return null;
          given.push(ranks, nodes);
        }
        seconds += own[k + 1] * takes(...given);
      }
      return seconds;
    }
    const isBytes = (name) => /bytes|memory|traffic/.test(name);
    const text = (name, x) => (name === STEP ? took(x) : isBytes(name) ? bytes(x) : /flop/i.test(name) ? flops(x) : grouped(x));
    const exact = (name, x) => (name === STEP ? `${x} s` : Number.isSafeInteger(x) ? grouped(x) : x.toExponential(14));
    const source = (name) => (name === STEP ? "simulated" : "counted");
    const named = (i, N) => P.holds[i].ranks[N] || D.options[i].name;

    function formulas() {
      const name = hasFormulas ? $("count").value : null, steps = $("machine") && name !== STEP;
      if (hasFormulas)
        for (const key of ["N", "S", "B"]) {
          at[key] = P[key][$(key).value];
          $(`at-${key}`).textContent = grouped(at[key]);
        }
      const now = runnable.map((i) => [i, name && value(i, name, at.S, at.B, at.N), steps ? stepTime(i, at.S, at.B, at.N) : null]);
      const by = hasFormulas ? 1 : 2;
      const shownAs = (what, x) => (x === null ? "–" : number(text(what, x), source(what), exact(what, x)));
      const rows = now.sort((a, b) => (a[by] ?? Infinity) - (b[by] ?? Infinity)).map(([i, x, s]) => `<tr title="${esc(P.holds[i].words)}"><th scope="row">${dot(i)}${esc(named(i, at.N))}</th>`
        + (name ? `<td class="num" title="${esc(name === STEP ? "" : P.formulas[i][name] ?? "no formula")}">${shownAs(name, x)}</td>` : "")
        + (steps ? `<td class="num">${shownAs(STEP, s)}</td>` : "") + "</tr>");
      const machine = esc($("machine")?.value ?? "");
      $("formula-table").innerHTML = `<table><thead><tr><th scope="col">Strategy</th>${name ? `<th scope="col" class="num">${esc(name)}${name === STEP ? ` on ${machine}` : ""}</th>` : ""}${steps ? `<th scope="col" class="num">Step on ${machine}</th>` : ""}</tr></thead><tbody>${rows.join("")}</tbody></table>`
        + (T && at.B !== P.at.B ? `<p class="small">Step times are for B ${grouped(P.at.B)}.</p>` : "");
      if (name) chart(name);
      if ($("machine")) machines();
    }

    /** The step on each machine, as a bar for each strategy that is shown; the end of a bar waits for others. */
    function machines() {
      const names = Object.keys(D.machines), longest = Math.max(...names.flatMap((each) => D.machines[each].map((own) => own?.[0] || 0)));
      const rows = names.map((each) => `<tr><th scope="row">${esc(each)}</th><td>${shown.map((i) => {
        const own = D.machines[each][i];
        if (!own) return `<div class="bars"><span class="none">–</span></div>`;
        const [all, waits] = own.map((x) => (82 * x) / longest);
        return `<div class="bars" title="${esc(D.options[i].name)}: ${took(own[0])}, waits ${took(own[1])}, simulated"><i style="width:${(all - waits).toFixed(2)}%;background:${hue(i)}"></i><i class="exposed" style="width:${waits.toFixed(2)}%"></i><span>${number(took(own[0]), "simulated", `${own[0]} s`)}</span></div>`;
      }).join("")}</td></tr>`);
      $("machine-chart").innerHTML = `<table class="machines"><caption>Step time on each machine, simulated: ${shown.map((i) => `<span>${dot(i)}${esc(D.options[i].name)}</span>`).join(" ")} <span><i class="sw exposed"></i>waits for others</span></caption><tbody>${rows.join("")}</tbody></table>`;
    }
    const HUES = ["--accent", "--send_recv", "--all_gather"];
    const hue = (i) => `var(${shown.includes(i) ? HUES[shown.indexOf(i)] : "--compute"})`;
    const dot = (i) => `<i class="sw" style="background:${hue(i)}"></i>`;
    function chart(name) {
      const w = 720, h = 330, left = 66, bottom = 34, xs = P.N.filter((n) => n > 1);
      const lines = runnable.map((i) => [i, xs.map((n) => value(i, name, at.S, at.B, n))]);
      const ys = lines.flatMap(([, own]) => own).filter((y) => y !== null && y > 0);
      if (!ys.length) { $("formula-chart").innerHTML = '<p class="none">No formula holds here.</p>'; return; }
      const low = Math.log(Math.min(...ys)), high = Math.max(Math.log(Math.max(...ys)), low + 1e-9 + 1);
      const x = (k) => left + (k / Math.max(xs.length - 1, 1)) * (w - left - 16), y = (v) => 12 + (1 - (Math.log(v) - low) / (high - low)) * (h - bottom - 24);
      let svg = xs.map((n, k) => `<text x="${x(k)}" y="${h - 14}" text-anchor="middle"${n === at.N ? ' class="ink"' : ""}>${n}</text>`).join("");
      svg += `<text x="${w - 16}" y="${h - 1}" text-anchor="end">ranks N</text>`;
      for (let k = 0; k < 5; k++) { const v = Math.exp(low + ((high - low) * k) / 4); svg += `<path d="M${left} ${y(v)}H${w - 16}" stroke="var(--line)"/><text x="${left - 8}" y="${y(v) + 4}" text-anchor="end">${text(name, Number(v.toPrecision(3)))}</text>`; }
      const now = xs.indexOf(at.N);
      if (now >= 0) svg += `<path d="M${x(now)} 8V${h - bottom}" stroke="var(--soft)" stroke-dasharray="3 3"/>`;
      for (const [i, own] of [...lines].sort((a, b) => shown.includes(a[0]) - shown.includes(b[0]))) {
        const points = own.map((v, k) => (v > 0 ? [x(k), y(v)] : null));
        let pen = "M", path = "";
        points.forEach((p) => { if (p) { path += `${pen}${p[0].toFixed(1)} ${p[1].toFixed(1)}`; pen = "L"; } else pen = "M"; });
        svg += `<path d="${path}" fill="none" stroke="${hue(i)}" stroke-width="2"/>` + points.map((p, k) => (p ? `<circle cx="${p[0]}" cy="${p[1]}" r="${xs[k] === at.N ? 4.5 : 2.6}" fill="${hue(i)}"><title>${esc(named(i, xs[k]))}, N = ${xs[k]}: ${text(name, own[k])}</title></circle>` : "")).join("");
      }
      $("formula-chart").innerHTML = `<svg viewBox="0 0 ${w} ${h}" role="img" aria-label="${esc(name)} by the number of ranks">${svg}</svg>`;
    }
    draws.push(formulas);
  }

  // ---- theme, sections -----------------------------------------------------------------------------------------
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = getComputedStyle(root).colorScheme === "dark";
    root.dataset.theme = dark ? "light" : "dark";
  });
  const links = [...document.querySelectorAll("nav a")];
  const watch = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting) links.forEach((link) => (link.hash === `#${entry.target.id}` ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
  }), { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main section").forEach((each) => watch.observe(each));
  draw();
})();
