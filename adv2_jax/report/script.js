"use strict";
// Sorts and filters the cards, and moves the pictures of a card through the steps of the attack. The page is whole without it.

function setUpCards(form) {
  const sections = [...document.querySelectorAll(".cards")].map((list) => ({
    list,
    cards: [...list.children],
    none: list.parentElement.querySelector(".none"),
  }));

  function passes(card) {
    const [attack, wanted] = form.elements.success.value.split(" ");
    const limit = form.elements.distance.value;
    return (!attack || card.dataset[attack + "Success"] === wanted) && (limit === "" || Number(card.dataset.adv2L1) <= Number(limit));
  }

  function inOrder(cards) {
    const [key, sign] = form.elements.order.value.split(" ");
    if (!key) return cards;
    const known = cards.filter((card) => key in card.dataset);
    // failed images have no number: last in both directions
    const unknown = cards.filter((card) => !(key in card.dataset));
    return [...known.sort((a, b) => sign * (a.dataset[key] - b.dataset[key])), ...unknown];
  }

  function update() {
    for (const { list, cards, none } of sections) {
      for (const card of cards) card.hidden = !passes(card);
      list.append(...inOrder(cards));
      none.hidden = cards.length === 0 || cards.some((card) => !card.hidden);
    }
    const cards = sections.flatMap((section) => section.cards);
    form.querySelector("output").value = `${cards.filter((card) => !card.hidden).length} of ${cards.length} cards shown`;
  }

  form.addEventListener("input", update);
  // the event comes before the fields are reset: update after it
  form.addEventListener("reset", () => setTimeout(update));
  // Enter in a field would load the page anew
  form.addEventListener("submit", (event) => event.preventDefault());
  // of no use without a script
  form.querySelector(".scripted").hidden = false;
  update();
}

function setUpSteps(card) {
  const slider = card.querySelector(".slider input");
  const output = card.querySelector(".slider output");
  const players = [...card.querySelectorAll(".film")].map((film) => player(card, film));
  const last = Math.max(...players.map((play) => play.frames)) - 1;
  if (last < 1) return;
  slider.max = last; // before the value, which is clamped to it; 100 unless set
  slider.value = last;

  function update() {
    const told = players.map((play) => play(Math.round((slider.value / last) * (play.frames - 1))));
    output.value = told.join(" · ");
    // else screen readers say the number of the frame
    slider.setAttribute("aria-valuetext", told.join(", "));
  }

  slider.addEventListener("input", update);
  slider.parentElement.hidden = false;
  update();
}

// Shows one frame of a film in the pictures of its attack; at the last frame, the delivered image and map themselves.
function player(card, film) {
  const steps = film.dataset.steps.split(" ");
  const confidence = film.dataset.confidence.split(" ");
  const figure = card.querySelector(`figure[data-attack="${film.dataset.attack}"]`);
  const [images, maps] = film.querySelectorAll("img");
  const [image, base, map] = figure.querySelectorAll(".tile img"); // what comes after them is of the delivered image alone
  const pictures = [[image, images], [base, images], [map, maps]].map(([picture, sheet]) => ({ picture, sheet, delivered: picture.src }));
  const end = steps.length - 1;

  function play(k) {
    figure.classList.toggle("playing", k < end);
    figure.style.setProperty("--frames", steps.length);
    figure.style.setProperty("--frame", k);
    for (const { picture, sheet, delivered } of pictures) {
      picture.src = k < end ? sheet.src : delivered;
      picture.classList.toggle("frame", k < end);
    }
    return `${film.dataset.name} step ${steps[k]}: p ${confidence[k]}`;
  }

  play.frames = steps.length;
  return play;
}

const form = document.querySelector(".controls");
if (form) setUpCards(form);
for (const slider of document.querySelectorAll(".slider")) setUpSteps(slider.closest(".card"));
