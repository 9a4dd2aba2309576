"use strict";
// Shows the cards of the kind and change that are chosen; without it, all are shown.
const cards = [...document.querySelectorAll("#cards > li")];
const kind = document.getElementById("kind");
const change = document.getElementById("change");
const count = document.getElementById("count");

function filter() {
  let shown = 0;
  for (const card of cards) {
    const fits =
      (!kind.value || card.dataset.kind === kind.value) &&
      (!change.value || card.dataset.change.split(" ").includes(change.value));
    card.hidden = !fits;
    shown += fits;
  }
  count.textContent = `${shown} of ${cards.length} shown`;
}

document.getElementById("filter").hidden = false;
document.getElementById("filter").addEventListener("submit", (event) => event.preventDefault());
kind.addEventListener("change", filter);
change.addEventListener("change", filter);
filter();
