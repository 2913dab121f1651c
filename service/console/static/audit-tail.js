// The audit log as it grows: new rows come on top of the page, from the server's own pages.
"use strict";

(() => {
  const tail = document.querySelector("[data-tail]");
  if (!tail) return;
  const rows = tail.querySelector("[data-tail-rows]");
  const again = tail.querySelector("[data-tail-again]");
  const pause = tail.querySelector("[data-tail-pause]");
  const says = tail.querySelector("[data-tail-says]");
  const EVERY = 1500, PATIENCE = 5000, DEADLINE = 10000, MOST = 200;
  let then = tail.dataset.tail, paused = false, asking = false, timer = 0;

  // Told only when it changes: who listens to the page is not told every second.
  const say = (text) => { if (says.textContent !== text) says.textContent = text; };
  const wait = (milliseconds) => {
    clearTimeout(timer);
    timer = setTimeout(look, milliseconds);
  };

  const take = (page) => {
    const link = page.querySelector("[data-tail-again]");
    const fresh = [...page.querySelectorAll("tbody tr")].map((row) => document.importNode(row, true));
    for (const row of fresh) row.classList.add("new");
    rows.prepend(...fresh);
    while (rows.children.length > MOST) rows.lastElementChild.remove();
    again.setAttribute("href", link.getAttribute("href"));
    then = link.dataset.then;
    wait("full" in link.dataset ? 0 : EVERY);
    say("New records appear by themselves.");
  };

  // A request for a document: it is parsed without running anything, which a policy of Trusted
  // Types allows; setting HTML from a text it does not.
  function look() {
    if (paused || asking || document.hidden) return;
    asking = true;
    const request = new XMLHttpRequest();
    request.open("GET", then);
    request.responseType = "document";
    request.timeout = DEADLINE;
    request.onloadend = () => {
      asking = false;
      const page = request.response;
      if (request.status === 200 && page?.querySelector("a[data-then]")) {
        take(page);
      } else if (request.status === 200) {
        // It is the sign-in: what comes meanwhile is shown after it.
        say("Your session ended. Look again to sign in and go on here.");
      } else if (request.status >= 400 && request.status < 500) {
        say("It is refused now. Look again to be told why.");
      } else {
        say("The authority does not answer just now. Nothing is missed: it is asked again.");
        wait(PATIENCE);
      }
    };
    request.send();
  }

  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    say(paused ? "Paused. Nothing is missed: it goes on where it stopped." : "Going on.");
    look();
  });
  document.addEventListener("visibilitychange", look);
  say("New records appear by themselves.");
  wait(EVERY);
})();
