"use strict";
// The page is complete without this script: it adds filtering, sorting and keys to the list of features.
(() => {
  const filter = document.getElementById("filter");
  if (!filter) return;
  const body = document.querySelector("tbody");
  const main = document.querySelector("main");
  const nothing = document.getElementById("nothing");
  const heads = [...document.querySelectorAll("th button")];
  const items = [...body.rows].map((row) => {
    const card = document.getElementById("f" + row.dataset.feature);
    return { row, card, text: null };
  });
  let order = items;

  const shown = () => order.filter((item) => !item.row.hidden);

  function applyFilter() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const item of items) {
      item.text ??= item.card.textContent.toLowerCase();
      const hit = words.every((word) => item.text.includes(word));
      item.row.hidden = item.card.hidden = !hit;
    }
    nothing.hidden = shown().length > 0;
  }

  function sortBy(button) {
    const head = button.parentElement;
    const key = button.dataset.key;
    const natural = key === "rank" || key === "feature" ? 1 : -1;
    const current = head.getAttribute("aria-sort");
    const direction = current === null ? natural : current === "ascending" ? -1 : 1;
    for (const other of heads) other.parentElement.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    order = [...items].sort((a, b) => direction * (a.row.dataset[key] - b.row.dataset[key]));
    body.append(...order.map((item) => item.row));
    main.prepend(...order.map((item) => item.card));
  }

  // The card being read: the last one whose top is above a third of the window.
  function current(list) {
    let found = -1;
    list.forEach((item, index) => {
      if (item.card.getBoundingClientRect().top < innerHeight / 3) found = index;
    });
    return found;
  }

  function go(step) {
    const list = shown();
    const next = list[Math.min(Math.max(current(list) + step, 0), list.length - 1)];
    if (!next) return;
    next.card.scrollIntoView({ behavior: "instant" });
    next.card.querySelector("h2").focus({ preventScroll: true });
  }

  let waiting = false;
  function follow() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const list = shown();
      const now = list[current(list)];
      for (const item of items) item.row.classList.toggle("now", item === now);
      const table = body.parentElement;
      if (!now || getComputedStyle(table.parentElement).position !== "sticky") return;
      const top = now.row.offsetTop - table.offsetTop;
      if (top < table.scrollTop + 40 || top > table.scrollTop + table.clientHeight - 60) {
        table.scrollTop = top - table.clientHeight / 2;
      }
    });
  }

  filter.addEventListener("input", applyFilter);
  for (const button of heads) button.addEventListener("click", () => sortBy(button));
  heads[0].parentElement.setAttribute("aria-sort", "ascending");
  addEventListener("scroll", follow, { passive: true });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target === filter) {
      filter.value = "";
      applyFilter();
      filter.blur();
    } else if (event.target.closest?.("input")) {
      return;
    } else if (event.key === "/") {
      event.preventDefault();
      filter.focus();
    } else if (event.key === "j" || event.key === "k") {
      go(event.key === "j" ? 1 : -1);
    }
  });
})();
