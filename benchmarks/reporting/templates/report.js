"use strict";
// All text reaches the page through textContent, so text of models and errors stays text.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const made = (tag, properties = {}, ...children) => {
  const { attributes = {}, ...rest } = properties;
  const node = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

// ---- light and dark
const themes = ["system", "light", "dark"];
const themeButton = document.getElementById("theme");
let stored = null;
try { stored = localStorage.getItem("prefzoo-theme"); } catch { /* a browser may forbid it to files */ }
const setTheme = (theme) => {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  themeButton.textContent = `Theme: ${theme === "system" ? "as the system" : theme}`;
  themeButton.value = theme;
  try { localStorage.setItem("prefzoo-theme", theme); } catch { /* it is forgotten with the page */ }
};
setTheme(themes.includes(stored) ? stored : "system");
themeButton.addEventListener("click", () => setTheme(themes[(themes.indexOf(themeButton.value) + 1) % 3]));

// ---- sorting: numbers downwards first, words upwards; what is missing stays below
for (const table of all("table.data")) {
  const heads = all("thead th", table), body = table.tBodies[0];
  const key = (row, column) => row.cells[column].dataset.sort;
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const rows = [...body.rows];
    const numeric = rows.every((row) => key(row, column) === "" || !Number.isNaN(Number(key(row, column))));
    const before = head.getAttribute("aria-sort");
    const down = before === "none" ? numeric : before === "ascending";
    rows.sort((a, b) => {
      const [x, y] = [key(a, column), key(b, column)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en");
      return down ? -order : order;
    });
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  }));
}

// ---- filtering rows
for (const input of all("[data-filter]")) {
  const paragraph = input.closest("p"), rows = all("tbody tr", paragraph.nextElementSibling);
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      left += !row.hidden;
    }
    paragraph.querySelector(".count").textContent = words.length ? `${left} of ${rows.length}` : "";
  };
  input.addEventListener("input", filter);
}

// ---- one of several charts
for (const group of all(".choice")) {
  const buttons = all("button", group), options = [...group.nextElementSibling.children];
  const choose = (index) => {
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", String(i === index));
      button.tabIndex = i === index ? 0 : -1;
    });
    options.forEach((option, i) => { option.hidden = i !== index; });
  };
  buttons.forEach((button, index) => {
    button.addEventListener("click", () => choose(index));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = (index + step + buttons.length) % buttons.length;
      choose(next);
      buttons[next].focus();
    });
  });
}

// ---- the matrix: arrow keys
for (const table of all("table.matrix")) {
  const rows = all("tbody tr", table).map((row) => [...row.cells].slice(1).map((cell) => cell.firstElementChild));
  const buttons = rows.flat().filter(Boolean);
  buttons.forEach((button, index) => {
    button.tabIndex = index ? -1 : 0;
  });
  table.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    let i = rows.findIndex((row) => row.includes(event.target));
    if (!step || i < 0) return;
    event.preventDefault();
    let j = rows[i].indexOf(event.target);
    do { i += step[0]; j += step[1]; } while (rows[i] && j in rows[i] && !rows[i][j]);
    if (!rows[i]?.[j]) return;
    buttons.forEach((button) => { button.tabIndex = -1; });
    rows[i][j].tabIndex = 0;
    rows[i][j].focus();
  });
}

// ---- tips
const tip = document.getElementById("tip");
const showTip = (target, x, y) => {
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18}px`;
};
document.addEventListener("pointermove", (event) => {
  const target = event.target.closest?.("[data-tip]");
  if (target) showTip(target, event.clientX, event.clientY);
  else if (!document.activeElement.matches("[data-tip]")) tip.hidden = true;
});
const tipOfFocus = () => {
  const target = document.activeElement.closest("[data-tip]");
  if (!target || !document.activeElement.matches(":focus-visible")) { tip.hidden = true; return; }
  const box = target.getBoundingClientRect();
  showTip(target, box.left, box.bottom - 10);
};
document.addEventListener("focusin", tipOfFocus);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
document.addEventListener("scroll", tipOfFocus, { passive: true, capture: true });

// ---- the section that is read
const links = new Map(all("nav a").map((link) => [decodeURIComponent(link.hash.slice(1)), link]));
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) {
    links.forEach((link) => link.removeAttribute("aria-current"));
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-10% 0px -75% 0px" });
all("section").forEach((section) => watcher.observe(section));

// ---- answers side by side
for (const root of all(".answers")) {
  const { methods, prompts } = JSON.parse(root.querySelector("script").textContent);
  const state = { at: 0, sample: 0, query: "", chosen: new Set([...methods.slice(0, 3), ...methods.filter((m) => m === "start")]) };
  const search = made("input", { type: "search", attributes: { "aria-label": "Search in prompts and answers" }, placeholder: "Search in prompts and answers" });
  const count = made("span", { className: "count", attributes: { role: "status" } });
  const sampleButton = made("button", { type: "button", className: "plain" });
  const list = made("ul", { className: "list", attributes: { "aria-label": "Prompts" } });
  const shown = made("div", { className: "shown" });
  const boxes = made("div", { className: "methods" });
  const summary = made("summary", {});
  for (const method of methods) {
    const box = made("input", { type: "checkbox", checked: state.chosen.has(method) });
    box.addEventListener("change", () => { state.chosen[box.checked ? "add" : "delete"](method); show(); });
    boxes.append(made("label", {}, box, ` ${method}`));
  }
  root.append(
    made("div", { className: "tools" }, search, sampleButton, count),
    made("details", {}, summary, boxes),
    made("div", { className: "body" }, list, shown),
  );

  const lower = prompts.map((prompt) => ({
    text: prompt.text.toLowerCase(),
    answers: methods.map((method) => (prompt.answers[method] ?? []).map((answer) => answer.text.toLowerCase())),
  }));
  // Methods whose answer holds the words; null: neither they nor the prompt do.
  const hits = (index) => {
    const found = methods.filter((_, m) => lower[index].answers[m].some((text) => text.includes(state.query)));
    return found.length || lower[index].text.includes(state.query) ? found : null;
  };
  // The words with what was searched for marked; lower case may be longer than the text, then nothing is marked.
  const marked = (text) => {
    const node = made("p", { className: "text" }), small = text.toLowerCase();
    if (!state.query || small.length !== text.length) { node.textContent = text; return node; }
    let from = 0;
    for (let at = small.indexOf(state.query); at >= 0; at = small.indexOf(state.query, from)) {
      node.append(text.slice(from, at), made("mark", { textContent: text.slice(at, at + state.query.length) }));
      from = at + state.query.length;
    }
    node.append(text.slice(from));
    return node;
  };
  const card = (prompt, method) => {
    const answer = (prompt.answers[method] ?? [])[state.sample];
    const scores = made("dl");
    for (const [name, value] of Object.entries(answer?.scores ?? {}))
      scores.append(made("div", {}, made("dt", { textContent: name }), made("dd", { textContent: String(value) })));
    return made("article", {}, made("h5", { textContent: method }), answer ? marked(answer.text || "(empty)") : made("p", { textContent: "(no such answer)" }), scores);
  };
  function show() {
    const prompt = prompts[state.at];
    const found = state.query ? hits(state.at) ?? [] : [];
    const names = methods.filter((method) => state.chosen.has(method) || found.slice(0, 12).includes(method));
    const words = marked(prompt.text);
    words.classList.add("prompt");
    shown.replaceChildren(words, made("div", { className: "cards" }, ...names.map((method) => card(prompt, method))));
    sampleButton.textContent = `Answer ${state.sample + 1} of each; show ${2 - state.sample}`;
    summary.textContent = `Methods: ${state.chosen.size} of ${methods.length}`;
    all("button", list).forEach((button) => {
      if (Number(button.value) === state.at) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    });
  }
  function find() {
    state.query = search.value.trim().toLowerCase();
    const left = prompts.map((_, index) => index).filter((index) => !state.query || hits(index));
    list.replaceChildren(...left.map((index) => {
      const text = prompts[index].text, found = state.query ? hits(index) : [];
      const button = made("button", { type: "button", value: String(index), textContent: text.length > 70 ? `${text.slice(0, 70)}…` : text || "(empty)" });
      if (found.length) button.append(made("small", { textContent: `in ${found.slice(0, 4).join(", ")}${found.length > 4 ? ` and ${found.length - 4} more` : ""}` }));
      button.addEventListener("click", () => { state.at = index; show(); });
      return made("li", {}, button);
    }));
    count.textContent = state.query ? `${left.length} of ${prompts.length} prompts` : `${prompts.length} prompts`;
    if (left.length && !left.includes(state.at)) state.at = left[0];
    show();
  }
  search.addEventListener("input", find);
  sampleButton.addEventListener("click", () => { state.sample = 1 - state.sample; show(); });
  find();
}
