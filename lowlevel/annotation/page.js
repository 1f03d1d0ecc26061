"use strict";
// Texts only ever become textContent. One request at a time: the next pair is shown after the server has saved this one.
const at = (id) => document.getElementById(id);
const CODE = /^([ \t]*```.*\n[\s\S]*?(?:^[ \t]*```[ \t]*$|(?![\s\S])))/m; // a fenced block, also one that was cut
const NAME = "lowlevel annotator";
let annotator = localStorage.getItem(NAME) || "";
let shown = null; // the server's last answer
let busy = false;

function show(id, yes) { at(id).hidden = !yes; }

function notice(text) {
  at("notice").textContent = text;
  show("notice", text !== "");
}

function fill(element, text) {
  const parts = text.split(CODE).map((part, i) => {
    const block = document.createElement(i % 2 ? "pre" : "div");
    block.className = "text";
    block.textContent = i % 2 ? part : part.replace(/^\n+|\n+$/g, "");
    return block;
  });
  element.replaceChildren(...parts.filter((block) => block.textContent !== ""));
}

const draftOf = () => `draft ${annotator} ${shown.pair.number}`; // of this tab: a reload keeps it

function write(text) {
  at("written").value = text;
  show("better", text !== "");
}

function display(answer) {
  const before = shown && shown.pair && shown.pair.number;
  shown = answer;
  const { pair, done, total, undo } = answer;
  show("enter", false);
  show("who", true);
  show("pair", pair !== null);
  show("end", pair === null);
  show("choices", pair !== null || undo !== null);
  for (const button of document.querySelectorAll("[data-choice], #edit")) button.hidden = pair === null;
  at("undo").disabled = undo === null;
  at("count").textContent = `${done} of ${total} judged`;
  at("progress").max = total;
  at("progress").value = done;
  at("rename").textContent = annotator;
  at("rename").title = "another annotator";
  if (pair === null) return;
  at("prompt").replaceChildren(...pair.prompt.map(({ role, text }) => {
    const turn = document.createElement("div"), who = document.createElement("b"), said = document.createElement("div");
    turn.className = "turn";
    who.textContent = role;
    fill(said, text);
    turn.append(who, said);
    return turn;
  }));
  for (const side of ["left", "right"]) {
    fill(at(side), pair[side].text);
    at(`${side}-title`).firstElementChild.textContent = pair[side].cut ? "cut at the longest reply" : "";
  }
  if (answer.written) sessionStorage.setItem(draftOf(), answer.written);
  write(sessionStorage.getItem(draftOf()) || "");
  if (pair.number !== before) {
    window.scrollTo(0, 0);
    at("prompt").scrollTop = at("prompt").scrollHeight;
  }
}

async function ask(action, body = {}) {
  if (busy || !annotator) return;
  busy = true;
  try {
    const headers = { "Content-Type": "application/json" };
    const content = JSON.stringify({ annotator, ...body });
    const signal = AbortSignal.timeout(20000); // a repeated request is no second judgement
    const reply = await fetch(action, { method: "POST", headers, body: content, cache: "no-store", signal });
    const answer = await reply.json();
    if (reply.ok) {
      if (action === "judge" && !answer.conflict) sessionStorage.removeItem(draftOf());
      notice(answer.conflict ? `Not saved: ${answer.conflict}.` : "");
      display(answer);
    } else {
      notice(`Not saved: ${answer.error}.`);
    }
  } catch {
    notice("The server does not answer, so this was not saved; all judgements before it are. Start it again with "
      + "--resume and open the new address. What you wrote stays in this page: copy it first.");
  } finally {
    busy = false;
  }
}

function judge(choice) {
  if (!shown || !shown.pair) return;
  ask("judge", { pair: shown.pair.number, choice, written: at("written").value || null });
}

function undo() {
  if (shown && shown.undo) ask("undo", { pair: shown.undo.pair });
}

function edit() {
  if (!shown || !shown.pair) return;
  show("better", true);
  at("written").focus();
}

function draft(text) {
  at("written").value = text;
  sessionStorage.setItem(draftOf(), text);
}

const KEYS = { ArrowLeft: () => judge("left"), ArrowRight: () => judge("right"), t: () => judge("tie"),
  b: () => judge("bad"), e: edit, u: undo };

document.addEventListener("keydown", (event) => {
  const writing = event.target.matches("input, textarea");
  if (event.key === "Escape" && writing) event.target.blur();
  if (event.repeat && event.target.matches("button")) event.preventDefault(); // a held Enter judges once
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (writing || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !(key in KEYS)) return;
  event.preventDefault();
  KEYS[key]();
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => judge(button.dataset.choice));
}
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => { draft(shown.pair[button.dataset.copy].text); at("written").focus(); });
}
at("written").addEventListener("input", () => draft(at("written").value));
at("discard").addEventListener("click", () => { draft(""); show("better", false); });
at("edit").addEventListener("click", edit);
at("undo").addEventListener("click", undo);
at("rename").addEventListener("click", enter);
at("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  annotator = at("name").value.split(/\s+/).filter(Boolean).join(" ");
  localStorage.setItem(NAME, annotator);
  at("name").blur();
  ask("state");
});

function enter() {
  shown = null;
  for (const id of ["pair", "end", "choices", "who"]) show(id, false);
  show("enter", true);
  at("name").value = annotator;
  at("name").focus();
  at("name").select();
}

if (annotator) ask("state"); else enter();
