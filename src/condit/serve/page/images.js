// Images in the browser: files to data: URIs, recipes in PNGs, a brush for regions.
import { $, t } from "/page/common.js";

const MOST = 1024;

export function uriOf(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(t("notImage")));
    reader.readAsDataURL(file);
  });
}

function loaded(uri) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error(t("notImage")));
    image.src = uri;
  });
}

// A file as a data: URI that the server takes; large images are scaled down, as the server would do.
export async function readImage(file) {
  const uri = await uriOf(file);
  const image = await loaded(uri);
  const scale = MOST / Math.max(image.width, image.height);
  if (scale >= 1 && /^data:image\/(png|jpeg|webp|gif|bmp)/.test(uri)) return uri;
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.width * Math.min(scale, 1)));
  canvas.height = Math.max(1, Math.round(image.height * Math.min(scale, 1)));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

// The recipe that condit stores in a PNG, or null.
export async function recipeOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const view = new DataView(bytes.buffer);
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 8 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    const zero = data.indexOf(0);
    if (kind === "tEXt" && new TextDecoder("latin1").decode(data.subarray(0, zero)) === "condit") {
      try { return JSON.parse(new TextDecoder("latin1").decode(data.subarray(zero + 1))); } catch { return null; }
    }
    at += 12 + length;
  }
  return null;
}

// Opens the brush; resolves to a mask (white where painted) as a data: URI, null without paint, undefined if closed.
export function paint(width, height, backdrop, before) {
  const dialog = $("mask"), canvas = $("brush"), pen = canvas.getContext("2d");
  canvas.width = 256; canvas.height = Math.round((256 * height) / width);
  const layer = document.createElement("canvas");
  layer.width = canvas.width; layer.height = canvas.height;
  const ink = layer.getContext("2d");
  let under = null, painted = false, down = null, cursor = { x: canvas.width / 2, y: canvas.height / 2 };
  const show = () => {
    pen.globalAlpha = 1; pen.fillStyle = "#000"; pen.fillRect(0, 0, canvas.width, canvas.height);
    if (under) { pen.globalAlpha = 0.55; pen.drawImage(under, 0, 0, canvas.width, canvas.height); }
    pen.globalAlpha = 0.6; pen.drawImage(layer, 0, 0);
    if (document.activeElement === canvas) { pen.globalAlpha = 1; pen.strokeStyle = "#f2b84b"; pen.beginPath(); pen.arc(cursor.x, cursor.y, radius(), 0, 7); pen.stroke(); }
  };
  const radius = () => Number($("radius").value);
  const line = (from, to) => {
    ink.strokeStyle = ink.fillStyle = "#fff"; ink.lineCap = "round"; ink.lineWidth = 2 * radius();
    ink.beginPath(); ink.moveTo(from.x, from.y); ink.lineTo(to.x + 0.01, to.y); ink.stroke();
    painted = true; show();
  };
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: ((event.clientX - box.left) * canvas.width) / box.width, y: ((event.clientY - box.top) * canvas.height) / box.height };
  };
  canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); down = cursor = point(event); line(down, down); };
  canvas.onpointermove = (event) => { if (down) { const next = point(event); line(down, next); down = cursor = next; } };
  canvas.onpointerup = canvas.onpointercancel = () => { down = null; };
  canvas.onfocus = canvas.onblur = show;
  canvas.onkeydown = (event) => {
    const move = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] }[event.key];
    if (move) {
      cursor = { x: Math.min(Math.max(cursor.x + move[0], 0), canvas.width), y: Math.min(Math.max(cursor.y + move[1], 0), canvas.height) };
      if (event.shiftKey) line(cursor, cursor); else show();
      event.preventDefault();
    } else if (event.key === " ") { line(cursor, cursor); event.preventDefault(); }
  };
  const ready = [backdrop && loaded(backdrop).then((image) => { under = image; }), before && loaded(before).then((image) => {
    ink.globalCompositeOperation = "source-over"; ink.drawImage(image, 0, 0, layer.width, layer.height);
    const data = ink.getImageData(0, 0, layer.width, layer.height);
    for (let i = 0; i < data.data.length; i += 4) data.data[i + 3] = data.data[i];
    ink.putImageData(data, 0, 0); painted = true;
  })];
  Promise.all(ready).then(show, show);
  show();
  dialog.showModal();
  return new Promise((resolve) => {
    let result;
    $("mask-clear").onclick = () => { ink.clearRect(0, 0, layer.width, layer.height); painted = false; show(); };
    $("mask-close").onclick = () => dialog.close();
    $("mask-save").onclick = () => {
      pen.globalAlpha = 1; pen.fillStyle = "#000"; pen.fillRect(0, 0, canvas.width, canvas.height); pen.drawImage(layer, 0, 0);
      result = painted ? canvas.toDataURL("image/png") : null;
      dialog.close();
    };
    dialog.onclose = () => resolve(result);
  });
}
