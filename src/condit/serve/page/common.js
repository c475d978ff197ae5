// What both pages share: words in two languages, light or dark, requests with the token.
export const $ = (id) => document.getElementById(id);
let words = {};
let language = "en";

export function t(key, ...values) {
  const text = (words[language] || {})[key] ?? words.en?.[key] ?? key;
  return text.replace(/\{(\d)\}/g, (_, i) => values[i]);
}

export function translate(root = document) {
  document.documentElement.lang = language;
  for (const e of root.querySelectorAll("[data-t]")) e.textContent = t(e.dataset.t);
  for (const e of root.querySelectorAll("[data-t-label]")) { e.setAttribute("aria-label", t(e.dataset.tLabel)); e.title = t(e.dataset.tLabel); }
  for (const e of root.querySelectorAll("[data-t-placeholder]")) e.placeholder = t(e.dataset.tPlaceholder);
}

export async function start(onLanguage) {
  words = await (await fetch("/page/words.json")).json();
  const kept = localStorage.getItem("language");
  language = kept || (navigator.language.startsWith("zh") ? "zh" : "en");
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  $("language").value = language;
  $("language").onchange = () => { language = $("language").value; localStorage.setItem("language", language); translate(); onLanguage(); };
  $("theme").onclick = () => {
    const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    const next = now === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    localStorage.setItem("theme", next);
  };
  translate();
}

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") made.setAttribute(name, value); else made[name] = value;
  }
  made.append(...children);
  return made;
}

// A request with the token. Asks for the token when the server does; throws an Error with the server's message.
export async function ask(path, options = {}) {
  for (;;) {
    const headers = { "X-Condit": "1", ...options.headers };
    const token = sessionStorage.getItem("token");
    if (token) headers.Authorization = `Bearer ${token}`;
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error(t("lost"));
    }
    if (answer.status === 401) { await askToken(); continue; }
    if (!answer.ok) {
      const body = await answer.json().catch(() => ({}));
      throw new Error(body.error?.message || `HTTP ${answer.status}`);
    }
    return answer;
  }
}

function askToken() {
  const dialog = $("token");
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => { sessionStorage.setItem("token", $("token-text").value.trim()); resolve(); };
  });
}

export const post = (path, body, signal) =>
  ask(path, { method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json" } });

// The events of a server-sent stream as objects.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}
