"use strict";
// Text of models and users enters the page through textContent alone, so that none of it can become markup.
(() => {
  const data = JSON.parse(document.getElementById("data-rows").textContent);
  const at = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const PAGE = 10;

  // Harmful text is blurred for the eye and left out of the accessibility tree until it is asked for.
  let shown = false;
  const hide = (root) => root.querySelectorAll(".harm").forEach((span) => {
    shown ? span.removeAttribute("aria-hidden") : span.setAttribute("aria-hidden", "true");
    const note = span.previousElementSibling;
    if (note && note.classList.contains("veil")) note.hidden = shown;
    else span.before(Object.assign(make("span", "hidden: harmful text ", "sr veil"), { hidden: shown }));
  });
  const boxes = document.querySelectorAll("[data-reveal]");
  boxes.forEach((box) => box.addEventListener("change", () => {
    shown = box.checked;
    boxes.forEach((other) => { other.checked = shown; });
    document.body.classList.toggle("shown", shown);
    hide(document);
  }));
  const words = (text, harmful) => {
    const p = make("p");
    p.append(text === "" ? make("span", "(empty)", "small") : make("span", text, harmful ? "harm" : ""));
    return p;
  };
  const verdict = (answer) => {
    const line = make("p");
    line.append(make("span", answer.label.replace("_", " "), "tag"),
      make("span", `compliance ${answer.compliance}, coherence ${answer.coherence}`, "small"));
    return line;
  };

  // The sweep: one tab stop, arrow keys from cell to cell, and the completions behind the chosen one.
  const cells = [...document.querySelectorAll("[data-cell]")];
  const grid = cells.filter((cell) => cell.closest("#sweep"));
  const open = (button) => {
    cells.forEach((cell) => cell.setAttribute("aria-pressed", String(cell === button)));
    at("panel-title").textContent = `Behind ${button.dataset.name}`;
    at("panel-line").textContent = button.dataset.line;
    at("panel-list").replaceChildren(...(data.cells[button.dataset.cell] || []).map((row) => {
      const item = make("li");
      item.append(words(row.prompt, true), words(row.text, row.compliance > 0), verdict(row));
      return item;
    }));
    hide(at("panel-list"));
  };
  cells.forEach((cell) => cell.addEventListener("click", () => open(cell)));
  const rest = (button) => grid.forEach((cell) => { cell.tabIndex = cell === button ? 0 : -1; });
  grid.forEach((cell) => {
    cell.addEventListener("focus", () => rest(cell));
    cell.addEventListener("keydown", (event) => {
      const column = cell.closest("td").cellIndex, row = cell.closest("tr").rowIndex;
      const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] || [0, 0];
      if (!down && !right) return;
      event.preventDefault();
      const next = at("sweep").rows[row + down]?.cells[column + right]?.querySelector("button");
      if (next) next.focus();
    });
  });
  const label = (key) => grid.forEach((cell) => {
    const value = Number(cell.dataset[key]);
    cell.textContent = value.toFixed(2);
    cell.style.setProperty("--v", value.toFixed(3));
    cell.setAttribute("aria-label", `${cell.dataset.name}: ${key} ${value.toFixed(2)}`);
  });
  document.querySelectorAll("[name=measure]").forEach((radio) => radio.addEventListener("change", () => label(radio.value)));
  label("compliance");
  const first = grid.find((cell) => /\brank_1\b/.test(cell.dataset.name)) || grid[0];
  if (first) { rest(first); open(first); }

  // Answers side by side, filtered. "answer of" says whose verdict the last filter means.
  const filters = at("filters");
  const given = (row) => data.arms.filter((arm) => row.answers[arm]);
  const options = {
    split: data.browser.map((row) => row.split), half: data.browser.map((row) => row.half), arm: data.arms,
    category: data.browser.map((row) => row.category).filter(Boolean).sort(),
    verdict: data.browser.flatMap((row) => given(row).map((arm) => row.answers[arm].label)).sort(),
  };
  for (const [name, values] of Object.entries(options))
    for (const value of new Set(values)) filters.elements[name].append(new Option(value.replace("_", " "), value));
  let visible = PAGE;
  const list = () => {
    const want = Object.fromEntries(Object.keys(options).map((name) => [name, filters.elements[name].value]));
    const rows = data.browser.filter((row) => ["split", "half", "category"].every((name) => !want[name] || row[name] === want[name]) &&
      given(row).some((arm) => (!want.arm || arm === want.arm) && (!want.verdict || row.answers[arm].label === want.verdict)));
    at("count").textContent = `${Math.min(visible, rows.length)} of ${rows.length} prompts`;
    at("more").hidden = rows.length <= visible;
    at("list").replaceChildren(...rows.slice(0, visible).map((row) => {
      const item = make("li"), head = make("p"), three = make("div", undefined, "three");
      const harmful = row.half === "harmful";
      for (const tag of [row.split, row.half, row.category]) if (tag) head.append(make("span", tag, "tag"));
      for (const arm of data.arms) {
        const answer = row.answers[arm], box = make("div");
        box.append(make("h3", arm));
        if (answer) box.append(words(answer.text, harmful && answer.compliance > 0), verdict(answer));
        else box.append(make("p", "not run", "small"));
        three.append(box);
      }
      item.append(head, words(row.prompt, harmful), three);
      return item;
    }));
    hide(at("list"));
  };
  filters.addEventListener("change", (event) => { if (event.target.name) { visible = PAGE; list(); } });
  filters.addEventListener("submit", (event) => event.preventDefault());
  at("more").addEventListener("click", () => { visible += PAGE; list(); });
  list();
  hide(document);
})();
