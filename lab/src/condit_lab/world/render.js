// Renders SVG documents with resvg: one JSON line {"svg", "fit"} in; width and height (two uint16, little endian) and
// premultiplied RGBA out; 0 x 0 for a document that cannot be drawn. fit = crop to the ink and scale it to that size.
const fs = require("fs");
const readline = require("readline");
const { Resvg } = require(process.argv[2]);
const SIZE = Number(process.argv[3]);
const font = { loadSystemFonts: false };

function draw({ svg, fit }) {
  if (!fit) return new Resvg(svg, { font, fitTo: { mode: "width", value: SIZE } }).render();
  const box = new Resvg(svg, { font }).innerBBox();
  if (!box || !(box.width > 0) || !(box.height > 0)) return null;
  const scaled = new Resvg(svg, { font, fitTo: { mode: "zoom", value: fit / Math.max(box.width, box.height) } });
  const ink = scaled.innerBBox();
  if (!ink) return null;
  scaled.cropByBBox(ink);
  return scaled.render();
}

function write(buffer) {
  for (let at = 0; at < buffer.length; ) {
    try {
      at += fs.writeSync(1, buffer, at);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error;
    }
  }
}

readline.createInterface({ input: process.stdin }).on("line", (line) => {
  let image = null;
  try {
    image = draw(JSON.parse(line));
  } catch (error) {
    process.stderr.write(`${error}\n`);
  }
  const head = Buffer.alloc(4);
  if (image) {
    head.writeUInt16LE(image.width, 0);
    head.writeUInt16LE(image.height, 2);
  }
  write(head);
  if (image) write(image.pixels);
});
