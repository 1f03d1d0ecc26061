"use strict";
(() => {
  const main = document.querySelector("main");
  const tip = document.getElementById("tip");
  let active = null;

  for (const input of document.querySelectorAll("input[name=mode]"))
    input.addEventListener("change", () => { main.dataset.mode = input.value; });

  // The numbers of one token: lines of "label, tab, value" under a title, always as text. A line without a label continues the last one.
  function fill(text) {
    const [title, ...lines] = text.split("\n");
    const heading = document.createElement("strong");
    heading.textContent = title;
    const list = document.createElement("dl");
    for (const line of lines) {
      const [label, value] = line.split("\t");
      if (!label) {
        list.lastElementChild.textContent += `\n${value}`;
        continue;
      }
      list.append(Object.assign(document.createElement("dt"), { textContent: label }));
      list.append(Object.assign(document.createElement("dd"), { textContent: value }));
    }
    tip.replaceChildren(heading, list);
  }

  // Above the element if there is room, else below it; a narrow window shows it at the bottom (page.css).
  function place(box) {
    const gap = 8, width = tip.offsetWidth, height = tip.offsetHeight;
    const above = box.top - gap - height;
    const y = above > gap ? above : Math.min(box.bottom + gap, innerHeight - height - gap);
    tip.style.setProperty("--x", `${Math.max(gap, Math.min(box.left, innerWidth - width - gap))}px`);
    tip.style.setProperty("--y", `${y}px`);
  }

  function show(element) {
    if (active && active !== element) hide();
    active = element;
    fill(element.dataset.tip);
    tip.hidden = false;
    place(element.getClientRects()[0]);
    element.setAttribute("aria-describedby", "tip");
    element.classList.add("on");
    mark(element);
  }

  function hide() {
    if (!active) return;
    active.removeAttribute("aria-describedby");
    active.classList.remove("on");
    const cursor = active.closest("article")?.querySelector(".cursor");
    if (cursor) cursor.hidden = true;
    active = null;
    tip.hidden = true;
  }

  // Mark the same token in the chart.
  function mark(element) {
    const article = element.closest("article");
    if (!element.closest(".charted")) return;
    const tokens = [...article.querySelectorAll(".charted .tok")];
    const cursor = article.querySelector(".cursor");
    cursor.style.left = `${(100 * (tokens.indexOf(element) + 0.5)) / tokens.length}%`;
    cursor.firstElementChild.style.top = `${element.dataset.y}%`;
    cursor.hidden = false;
  }

  const tipped = (event) => (event.target instanceof Element ? event.target.closest("[data-tip]") : null);
  document.addEventListener("pointerover", (event) => {
    const element = tipped(event);
    if (element) show(element);
    else if (active && active !== document.activeElement && !event.target.closest(".canvas")) hide();
  });
  document.addEventListener("focusin", (event) => { const element = tipped(event); if (element) show(element); });
  document.addEventListener("focusout", hide);
  addEventListener("scroll", () => { if (active) place(active.getClientRects()[0]); }, { passive: true, capture: true });

  // Each text is one stop of the Tab key; the arrow keys move inside it.
  for (const heat of document.querySelectorAll(".heat")) {
    const tokens = [...heat.querySelectorAll(".tok")];
    tokens.forEach((token, i) => { token.tabIndex = i ? -1 : 0; });
    heat.addEventListener("keydown", (event) => {
      const at = tokens.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      const token = tokens[Math.max(0, Math.min(to, tokens.length - 1))];
      tokens[at].tabIndex = -1;
      token.tabIndex = 0;
      token.focus();
    });
    heat.addEventListener("focusin", (event) => {
      for (const token of tokens) token.tabIndex = token === event.target ? 0 : -1;
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // Moving the pointer over the chart shows the token at that place.
  for (const canvas of document.querySelectorAll(".canvas")) {
    canvas.addEventListener("pointermove", (event) => {
      const tokens = canvas.closest("article").querySelectorAll(".charted .tok");
      const box = canvas.getBoundingClientRect();
      const i = Math.floor((tokens.length * (event.clientX - box.left)) / box.width);
      const token = tokens[Math.max(0, Math.min(i, tokens.length - 1))];
      if (token && token !== active) show(token);
      if (token) place({ left: event.clientX + 8, top: box.top, bottom: box.bottom });
    });
    canvas.addEventListener("pointerleave", hide);
  }
})();
