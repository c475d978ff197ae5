// The studio: a form, references, a queue of one request, a gallery.
import { $, ask, element, events, post, start, t, translate } from "/page/common.js";
import { paint, readImage, recipeOf } from "/page/images.js";
import { asCommand, asCurl, asPython } from "/page/code.js";

const EDITS = ["swap", "attribute", "style", "background", "shape", "add", "remove"];
const references = []; // {name, uri, role, strength, mask}
const source = { uri: null, name: "image.png", mask: null };
const picked = []; // figures to compare
let models = [], running = null, locked = false;

const model = () => models.find((m) => m.id === $("model").value);
const editing = () => document.querySelector("[name=mode]:checked").value === "edit";
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
const outputSize = () => ($("size").value || model()?.condit.size || "128x128").split("x").map(Number);

function say(text, bad = false) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

function onLanguage() {
  $("go").textContent = t(editing() ? "edit" : "generate");
  $("prompt-label").textContent = t(editing() ? "target" : "prompt");
  showReferences();
  for (const button of document.querySelectorAll("#gallery [data-t]")) button.textContent = t(button.dataset.t);
}

function onMode() {
  document.body.classList.toggle("editing", editing());
  onLanguage();
}

function onModel() {
  const own = model()?.condit;
  if (!own) return;
  $("steps").placeholder = own.steps ?? ""; $("guidance").placeholder = own.guidance_scale ?? ""; $("size").placeholder = own.size;
  document.querySelector("[value=edit]").disabled = !own.edits;
  showReferences();
}

// References

function roles() {
  const own = model()?.condit ?? { roles: {}, adapters: [] };
  const named = Object.values(own.roles);
  return [...Object.keys(own.roles), ...own.adapters.filter((name) => !named.includes(name))];
}

function showReferences() {
  $("references").replaceChildren(...references.map((reference, index) => {
    if (!roles().includes(reference.role)) reference.role = roles()[0] ?? "";
    const role = element("select", { "aria-label": `${t("role")} ${index + 1}` }, ...roles().map((name) => element("option", { value: name, textContent: name })));
    role.value = reference.role;
    role.onchange = () => { reference.role = role.value; };
    const shown = element("output", { textContent: reference.strength.toFixed(2) });
    const slider = element("input", { type: "range", min: 0, max: 2, step: 0.05, value: reference.strength, "aria-label": `${t("strength")} ${index + 1}` });
    slider.oninput = () => { reference.strength = Number(slider.value); shown.textContent = reference.strength.toFixed(2); };
    const region = element("button", { type: "button", textContent: t("region") + (reference.mask ? ` (${t("painted")})` : "") });
    region.onclick = async () => {
      const [width, height] = outputSize();
      const mask = await paint(width, height, document.querySelector("#gallery figure > img")?.src, reference.mask);
      if (mask !== undefined) reference.mask = mask;
      showReferences();
    };
    const remove = element("button", { type: "button", textContent: "✕", title: t("remove"), "aria-label": `${t("remove")} ${index + 1}` });
    remove.onclick = () => { references.splice(index, 1); showReferences(); };
    const image = element("img", { src: reference.uri, alt: reference.name });
    return element("li", {}, image, element("div", {}, element("div", { className: "row" }, role, region, remove), element("div", { className: "slider" }, slider, shown)));
  }));
}

function addReference(uri, name, more = {}) {
  references.push({ name, uri, role: roles()[0] ?? "", strength: 1, mask: null, ...more });
  showReferences();
}

async function take(files, { restore = true } = {}) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    try {
      const recipe = restore ? await recipeOf(file) : null;
      if (recipe?.request) { restoreSettings(recipe.request, recipe.index ?? 0); continue; }
      const uri = await readImage(file);
      if (editing() && !source.uri) setSource(uri, file.name); else addReference(uri, file.name || "pasted.png");
    } catch (error) { say(error.message, true); }
  }
}

function setSource(uri, name) {
  Object.assign(source, { uri, name: name || "image.png", mask: null });
  $("source-image").src = uri; $("source-image").alt = source.name; $("source-image").hidden = false;
}

function restoreSettings(request, index) {
  $("prompt").value = request.prompt; $("negative").value = request.negative ?? "";
  $("seed").value = request.seed + index; lock(true);
  $("number").value = 1; $("steps").value = request.steps ?? ""; $("guidance").value = request.guidance ?? "";
  $("size").value = request.width && request.height ? `${request.width}x${request.height}` : "";
  if (models.some((m) => m.id === request.model)) { $("model").value = request.model; onModel(); }
  references.length = 0;
  for (const r of request.references ?? []) {
    if (r.path.startsWith("data:image/")) addReference(r.path, `${r.use.split("/").pop()}.png`, { role: r.use, strength: r.strength, mask: r.mask ?? null });
  }
  showReferences();
  say(t("restored"));
}

// A request

function lock(value) {
  locked = value;
  $("lock").setAttribute("aria-pressed", value);
}

const dice = () => { $("seed").value = Math.floor(Math.random() * 2 ** 31); };

function body() {
  const made = {
    model: $("model").value, prompt: $("prompt").value.trim(), n: number("number") ?? 1, seed: number("seed"),
    size: $("size").value || "auto", negative_prompt: $("negative").value.trim() || undefined,
    num_inference_steps: number("steps"), guidance_scale: number("guidance"),
    controls: references.map((r) => ({ adapter: r.role, reference: r.uri, strength: r.strength, ...(r.mask ? { mask: r.mask } : {}) })),
    stream: true, progress: true, partial_images: 3,
  };
  if (editing()) {
    Object.assign(made, { image: source.uri, source_prompt: $("source").value.trim(), edit_type: $("kind").value, n: 1 });
    if (source.mask) made.mask = source.mask;
  } else if ($("sweep").value) {
    const values = $("values").value.split(",").map((v) => v.trim()).filter(Boolean);
    made.sweep = { over: $("sweep").value, values: $("sweep").value === "adapter" ? values : values.map(Number) };
  }
  return made;
}

function problem(made) {
  if (!made.prompt) return t("needPrompt");
  if (editing() && (!made.image || !made.source_prompt)) return t("needImage");
  if (made.sweep && (!made.sweep.values.length || (made.sweep.over !== "seed" && !references.length))) return t("needValues");
  return null;
}

async function go() {
  if (running) return;
  if (!locked) dice();
  const made = body(), wrong = problem(made);
  if (wrong) { say(wrong, true); return; }
  running = new AbortController();
  $("go").disabled = true; $("cancel").disabled = false; $("empty").hidden = true;
  $("progress").hidden = false; $("progress").removeAttribute("value");
  const begun = performance.now(), open = new Map(), known = references.map((r) => ({ ...r }));
  const group = element("div", { className: "group" });
  let first = null;
  $("gallery").prepend(group);
  if (innerWidth <= 800) $("results").scrollIntoView();
  say(t("waiting"));
  try {
    const answer = await post(editing() ? "/v1/images/edits" : "/v1/images/generations", made, running.signal);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.type === "condit.progress") {
        first ??= { at: performance.now(), step: event.step };
        const left = ((performance.now() - first.at) / Math.max(event.step - first.step, 1)) * (event.steps - event.step);
        if (event.steps) { $("progress").value = event.step / event.steps; say(t("step", event.step, event.steps, Math.ceil(left / 1000))); }
        else say(t("working", event.step));
        continue;
      }
      const own = event.condit, uri = `data:image/png;base64,${event.b64_json}`;
      const partial = event.type.endsWith("partial_image");
      const key = `${own.number}/${partial ? own.image : own.seed - firstSeed(made, own.number)}`;
      const figure = open.get(key) ?? element("figure");
      if (!open.has(key)) { group.append(figure); open.set(key, figure); }
      fill(figure, uri, partial ? null : { made, own, known });
    }
    say(t("done", ((performance.now() - begun) / 1000).toFixed(1)));
  } catch (error) {
    for (const figure of open.values()) if (figure.classList.contains("partial")) figure.remove();
    if (!group.children.length) group.remove();
    if (error.name === "AbortError") say(t("cancelled")); else say(error.message, true);
  } finally {
    running = null;
    $("go").disabled = false; $("cancel").disabled = true; $("progress").hidden = true;
  }
}

const firstSeed = (made, index) => (made.sweep?.over === "seed" ? made.sweep.values[index] : made.seed);

// The gallery

function fill(figure, uri, done) {
  figure.classList.toggle("partial", !done);
  const image = element("img", { src: uri, alt: $("prompt").value });
  if (!done) { figure.replaceChildren(image); return; }
  const { made, own, known } = done;
  const settings = { ...made, seed: own.seed, n: 1, names: known.map((r) => r.name), sweep: undefined, sourceName: source.name };
  settings.controls = made.controls.map((c, i) => ({ ...c, strength: own.strengths?.[i] ?? c.strength, ...(i === 0 && made.sweep?.over === "adapter" ? { adapter: made.sweep.values[own.number] } : {}) }));
  image.alt = made.prompt;
  const facts = [t("seedIs", own.seed), ...settings.controls.map((c) => `${c.adapter} ${c.strength}`)];
  const button = (key, action) => {
    const made = element("button", { type: "button", textContent: t(key), onclick: action });
    made.dataset.t = key;
    return made;
  };
  const compare = button("compare", () => pick(figure, compare));
  compare.setAttribute("aria-pressed", "false");
  const row = element("div", { className: "row" },
    button("asReference", () => { addReference(uri, `image-${own.seed}.png`); $("references").scrollIntoView({ block: "nearest" }); }),
    compare,
    button("command", () => showCode(asCommand(settings))), button("python", () => showCode(asPython(settings))), button("curl", () => showCode(asCurl(settings))),
    button("save", () => element("a", { href: uri, download: `condit-${own.seed}.png` }).click()),
    button("restore", async () => { const recipe = await recipeOf(await (await fetch(uri)).blob()).catch(() => null); if (recipe?.request) restoreSettings(recipe.request, recipe.index ?? 0); }));
  figure.replaceChildren(image, element("figcaption", { textContent: `${made.prompt} · ${facts.join(" · ")}` }), row);
  if (own.maps?.length) figure.append(element("div", { className: "maps" }, ...own.maps.map((m) => element("span", {}, element("img", { src: m.image, alt: m.word }), m.word))));
}

function pick(figure, button) {
  const at = picked.findIndex((p) => p.figure === figure);
  if (at >= 0) { picked.splice(at, 1); button.setAttribute("aria-pressed", "false"); return; }
  picked.push({ figure, button });
  button.setAttribute("aria-pressed", "true");
  if (picked.length < 2) return;
  const [a, b] = picked.splice(0).map((p) => { p.button.setAttribute("aria-pressed", "false"); return p.figure.querySelector("img"); });
  $("compare-a").src = a.src; $("compare-b").src = b.src; $("compare-a").alt = a.alt; $("compare-b").alt = b.alt;
  $("compare").showModal();
  $("cut").focus();
}

function showCode(text) {
  $("code-text").textContent = text;
  $("code").showModal();
}

// Start

function bind() {
  $("form").onsubmit = (event) => { event.preventDefault(); go(); };
  $("cancel").onclick = () => running?.abort();
  $("dice").onclick = dice;
  $("lock").onclick = () => lock(!locked);
  $("model").onchange = onModel;
  for (const radio of document.querySelectorAll("[name=mode]")) radio.onchange = onMode;
  $("files").onchange = () => { take($("files").files); $("files").value = ""; };
  $("source-file").onchange = async () => {
    const file = $("source-file").files[0];
    try { if (file) setSource(await readImage(file), file.name); } catch (error) { say(error.message, true); }
  };
  $("source-mask").onclick = async () => { const [w, h] = outputSize(); const mask = await paint(w, h, source.uri, source.mask); if (mask !== undefined) source.mask = mask; };
  $("cut").oninput = () => $("compare").querySelector(".pair").style.setProperty("--cut", `${$("cut").value}%`);
  $("code-close").onclick = () => $("code").close();
  $("code-copy").onclick = async () => { await navigator.clipboard?.writeText($("code-text").textContent); say(t("copied")); $("code").close(); };
  addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
  addEventListener("dragleave", () => document.body.classList.remove("over"));
  addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("over"); take(event.dataTransfer.files); });
  addEventListener("paste", (event) => { if (event.clipboardData.files.length) { event.preventDefault(); take(event.clipboardData.files); } });
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); go(); }
    else if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
    else if (event.altKey && event.key.toLowerCase() === "d") { event.preventDefault(); dice(); }
  });
  for (const kind of EDITS) $("kind").append(element("option", { value: kind, textContent: kind }));
}

await start(onLanguage);
bind();
dice();
onMode();
try {
  models = (await (await ask("/v1/models")).json()).data;
  $("model").append(...models.map((m) => element("option", { value: m.id, textContent: m.id })));
  $("model-field").hidden = models.length < 2;
  if (!models.length) say(t("noModels"), true);
  onModel();
} catch (error) { say(error.message, true); }
translate();
onLanguage();
document.body.dataset.ready = "1";
