// What the console's pages do beyond forms and links. Every page works without it.
"use strict";

// Whoever walks away from a page that shows a secret leaves none behind, in any cache either.
addEventListener("pagehide", () => {
  for (const element of document.querySelectorAll("[data-secret]")) element.textContent = "shown once";
});
addEventListener("pageshow", (event) => {
  // Asked for anew: a reload would offer to send a form once more.
  if (event.persisted) location.replace(location.pathname + location.search);
});

// Copy buttons.
for (const button of document.querySelectorAll("[data-copy]")) {
  if (!navigator.clipboard) break;
  button.hidden = false;
  const label = button.firstChild;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    label.textContent = "Copied";
    setTimeout(() => { label.textContent = "Copy"; }, 2000);
  });
}

// A form is sent once; whoever comes back to it may send it again.
for (const form of document.querySelectorAll("form[method=post]")) {
  form.addEventListener("submit", () => {
    for (const button of form.querySelectorAll("button")) setTimeout(() => { button.disabled = true; });
  });
}
addEventListener("pageshow", () => {
  for (const button of document.querySelectorAll("form[method=post] button")) button.disabled = false;
});

// Times that count down, by the clock of the server: its answer says what it was.
const drift = (() => {
  const stamp = document.documentElement.dataset.now;
  return stamp ? Date.parse(stamp) - Date.now() : 0;
})();
const left = (element) => Math.max(0, Date.parse(element.dateTime) - Date.now() - drift) / 1000;
const spelled = (seconds) => {
  if (seconds >= 3600) return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds % 3600 / 60)} min`;
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")} min`;
};
const countdowns = document.querySelectorAll("[data-countdown]");
const count = () => {
  for (const element of countdowns) {
    const seconds = left(element);
    element.textContent = seconds > 0 ? spelled(seconds) : "no time: it ended";
  }
};
if (countdowns.length) {
  count();
  setInterval(count, 1000);
}

// A page that stays open stays signed in, as long as the source of its session is live.
const session = document.querySelector("[data-renew]");
if (session) {
  setInterval(async () => {
    if (left(session) > 420 || left(session) === 0) return;
    const answer = await fetch("/console/session", {
      method: "POST",
      body: new URLSearchParams({ csrf: session.dataset.renew }),
      redirect: "manual",
    });
    const end = answer.ok ? (await answer.text()).trim() : "";
    if (/^\d{4}-/.test(end)) session.dateTime = end;
  }, 30000);
}

// Token and Upload: names to choose from, those that begin with what was typed.
for (const input of document.querySelectorAll("[data-names]")) {
  const list = document.getElementById(input.dataset.names);
  input.addEventListener("input", async () => {
    const typed = input.value;
    const answer = await fetch(`/console/token/names?${new URLSearchParams({ beginning: typed })}`, { redirect: "manual" });
    if (!answer.ok || input.value !== typed) return;
    const names = (await answer.text()).split("\n").filter(Boolean);
    list.replaceChildren(...names.map((name) => Object.assign(document.createElement("option"), { value: name })));
  });
}

// Hand-over: the code came in the fragment of the address, which no server sees. It leaves the
// address, so that no history keeps it either.
const fragmentField = document.querySelector("[data-fragment-field]");
const takeFragment = () => {
  if (location.hash.length < 2) return;
  const input = fragmentField.querySelector("input");
  input.value = location.hash.slice(1);
  history.replaceState(null, "", location.pathname);
  fragmentField.hidden = true;
  document.querySelector("[data-fragment-taken]").hidden = false;
};
if (fragmentField) {
  takeFragment();
  addEventListener("hashchange", takeFragment);
}
// What was opened is loaded again without the code, which would be refused and alarm operators.
if (document.querySelector("[data-opened]")) history.replaceState(null, "", location.pathname);
