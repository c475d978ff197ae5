// A request of the page as a command, as Python and as curl.
const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
const python = (value) => JSON.stringify(value);
const file = (settings, index) => settings.names[index] ?? `reference-${index + 1}.png`;
const ROLES = ["style", "subject", "edges", "gray"];

export function asCommand(s) {
  if (s.source_prompt) {
    const mask = s.mask ? " --mask mask.png" : "";
    return `condit edit ${quoted(s.sourceName)} ${quoted(s.source_prompt)} ${quoted(s.prompt)} --model ${s.model} --type ${s.edit_type}${mask} --seed ${s.seed} -o edited.png`;
  }
  const words = ["condit generate", quoted(s.prompt), `--model ${s.model}`];
  s.controls.forEach((c, i) => {
    const value = `${file(s, i)}:${c.strength}${c.mask ? `,mask=mask-${i + 1}.png` : ""}`;
    words.push(ROLES.includes(c.adapter) ? `--${c.adapter} ${quoted(value)}` : `--control ${quoted(`${c.adapter}=${value}`)}`);
  });
  if (s.negative_prompt) words.push(`--negative ${quoted(s.negative_prompt)}`);
  words.push(`--seed ${s.seed}`);
  if (s.num_inference_steps) words.push(`--steps ${s.num_inference_steps}`);
  if (s.guidance_scale !== undefined) words.push(`--guidance ${s.guidance_scale}`);
  if (s.size !== "auto") { const [w, h] = s.size.split("x"); words.push(`--width ${w} --height ${h}`); }
  return `${words.join(" ")} -o image.png`;
}

function own(s) {
  const more = { seed: s.seed };
  for (const name of ["num_inference_steps", "guidance_scale", "negative_prompt", "source_prompt", "edit_type"]) if (s[name] !== undefined) more[name] = s[name];
  return more;
}

export function asPython(s) {
  const lines = ["import base64", "from openai import OpenAI", "", "def read(path):", "    with open(path, 'rb') as file:", "        return base64.b64encode(file.read()).decode()", "", `client = OpenAI(base_url=${python(`${location.origin}/v1`)}, api_key="TOKEN")`, `more = ${python(own(s))}`];
  if (s.controls.length) {
    lines.push(`more["controls"] = [`);
    s.controls.forEach((c, i) => lines.push(`    {"adapter": ${python(c.adapter)}, "reference": read(${python(file(s, i))}), "strength": ${c.strength}${c.mask ? `, "mask": read("mask-${i + 1}.png")` : ""}},`));
    lines.push("]");
  }
  const call = `model=${python(s.model)}, prompt=${python(s.prompt)}, size=${python(s.size)}, extra_body=more`;
  lines.push(s.source_prompt ? `answer = client.images.edit(image=open(${python(s.sourceName)}, "rb"), ${call})` : `answer = client.images.generate(${call})`);
  lines.push(`with open("image.png", "wb") as file:`, "    file.write(base64.b64decode(answer.data[0].b64_json))");
  return lines.join("\n");
}

export function asCurl(s) {
  const parts = [`curl ${location.origin}/v1/images/${s.source_prompt ? "edits" : "generations"} -H 'X-Condit: 1' -H 'Authorization: Bearer TOKEN'`, `-F model=${quoted(s.model)}`, `-F prompt=${quoted(s.prompt)}`, `-F size=${s.size}`];
  for (const [name, value] of Object.entries(own(s))) parts.push(`-F ${name}=${quoted(value)}`);
  if (s.source_prompt) parts.push(`-F image=@${quoted(s.sourceName)}`);
  s.controls.forEach((c, i) => parts.push(`-F 'adapter[]=${c.adapter}' -F ${quoted(`references[]=@${file(s, i)}`)} -F 'strength[]=${c.strength}'`));
  return `${parts.join(" \\\n  ")} \\\n  | python3 -c 'import sys, json, base64; open("image.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'`;
}
