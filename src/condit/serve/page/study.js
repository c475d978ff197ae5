// A preference study: two images and their reference, keys 1, 2 and 0.
import { $, ask, post, start, t } from "/page/common.js";

const KEYS = { 1: "left", 2: "right", 0: "neither" };
let question = null, shown = 0, busy = false;

const texts = () => { if (question) { $("text").textContent = question.question || t("which"); $("state").textContent = t("answered", question.answered); } };

async function picture(image, name) {
  image.hidden = !name;
  if (!name) return;
  const blob = await (await ask(`/v1/study/pictures/${name}`)).blob();
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  await image.decode();
}

async function next() {
  question = await (await ask(`/v1/study/next?rater=${encodeURIComponent($("rater").value.trim())}`)).json();
  await Promise.all(["reference", "left", "right"].map((side) => picture($(side), question[side])));
  $("left").alt = t("left"); $("right").alt = t("right"); $("reference").alt = t("referenceImage");
  texts();
  shown = performance.now();
}

async function guarded(work) {
  if (busy) return;
  busy = true;
  try { await work(); } catch (error) { $("state").textContent = error.message; } finally { busy = false; }
}

const choose = (choice) => guarded(async () => {
  if (!question) return;
  await post("/v1/study/answers", { ticket: question.ticket, choice, seconds: (performance.now() - shown) / 1000 });
  question = null;
  await next();
});

await start(texts);
$("rater").value = localStorage.getItem("rater") || "";
$("who").onsubmit = (event) => {
  event.preventDefault();
  if (!$("rater").value.trim()) { $("rater").focus(); return; }
  localStorage.setItem("rater", $("rater").value.trim());
  guarded(async () => { await next(); $("who").hidden = true; $("ask").hidden = false; });
};
for (const button of document.querySelectorAll("[data-choice]")) button.onclick = () => choose(button.dataset.choice);
addEventListener("keydown", (event) => { if (!$("ask").hidden && KEYS[event.key] && !event.ctrlKey) { event.preventDefault(); choose(KEYS[event.key]); } });
document.body.dataset.ready = "1";
