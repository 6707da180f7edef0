// The page: uploads a CT, follows its job, shows what came back beside what went in.
"use strict";

const at = (id) => document.getElementById(id);
const SIGNED = { // blue below, black at 0, red above
  R: [110, 0, 0, 160, 255], G: [190, 60, 0, 20, 150], B: [255, 200, 0, 20, 110],
  A: [255, 255, 255, 255, 255], I: [0, 64, 128, 192, 255],
};
const view = {}; // one NiiVue for each of original, reconstruction, error
let job = null;

function say(text, bad = false) {
  at("say").textContent = text;
  at("say").className = bad ? "bad" : "";
}

function headers() {
  const token = at("token").value.trim();
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers() });
  if (!answer.ok) {
    const detail = await answer.json().then((found) => found.detail, () => answer.statusText);
    throw new Error(typeof detail === "string" ? detail : detail[0].msg);
  }
  return answer;
}

/** Read server-sent events until the job has ended. EventSource cannot send a token. */
async function follow(id) {
  const answer = await ask(`/v1/jobs/${id}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", found = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return found;
    text += value;
    const lines = text.split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      found = JSON.parse(line.slice(6));
      at("bar").value = found.total ? found.done / found.total : 0;
      say(`${found.state}${found.total ? `: ${found.done} of ${found.total} slices` : ""}`);
    }
  }
}

async function run(file) {
  at("views").hidden = at("errors").hidden = at("save").hidden = true;
  at("bar").hidden = at("stop").hidden = false;
  at("bar").removeAttribute("value");
  try {
    say(`sending ${(file.size / 2 ** 20).toFixed(1)} MiB`);
    job = await (await ask("/v1/reconstruct", { method: "POST", body: file })).json();
    const ended = await follow(job.id);
    if (ended.state !== "done") throw new Error(ended.error);
    const result = await (await ask(`/v1/jobs/${job.id}/result`)).blob();
    at("save").href = URL.createObjectURL(result);
    at("save").hidden = false;
    await show(file, result);
    const { slices_per_second: speed, engine, precision } = ended.report;
    say(`done: ${speed.toFixed(1)} slices/s with ${engine} ${precision}`);
  } catch (error) {
    say(error.message, true);
  } finally {
    at("bar").hidden = at("stop").hidden = true;
  }
}

async function load(file, name) {
  return niivue.NVImage.loadFromFile({ file: new File([file], name) });
}

async function show(file, result) {
  if (typeof niivue === "undefined") throw new Error("this installation has no viewer: make page");
  at("views").hidden = false;
  const original = await load(file, file.name);
  const reconstruction = await load(result, "reconstruction.nii.gz");
  const difference = differences(inHU(original), inHU(reconstruction));
  const error = reconstruction.clone();
  error.img = difference;
  error.hdr.datatypeCode = 16; // float32
  error.hdr.numBitsPerVoxel = 32;
  error.hdr.scl_slope = 1;
  error.hdr.scl_inter = 0;
  error.trustCalMinMax = false;
  for (const [name, volume] of Object.entries({ original, reconstruction, error })) {
    if (!view[name]) {
      view[name] = new niivue.Niivue({ multiplanarShowRender: 0, isColorbar: name === "error" });
      await view[name].attachTo(name);
      view[name].setSliceType(view[name].sliceTypeMultiplanar);
      view[name].setMultiplanarLayout(2); // a grid
    }
    while (view[name].volumes.length) view[name].removeVolumeByIndex(0);
    view[name].addVolume(volume);
  }
  view.error.addColormap("signed", SIGNED);
  error.colormap = "signed";
  error.cal_min = -200;
  error.cal_max = 200;
  view.error.updateGLVolume();
  const all = Object.values(view);
  for (const one of all) one.broadcastTo(all.filter((other) => other !== one), { "2d": true, "3d": true });
  setWindow();
  await table(difference);
}

function setWindow() {
  const [low, high] = at("window").value.split(",").map(Number);
  for (const name of ["original", "reconstruction"]) {
    if (!view[name] || !view[name].volumes.length) continue;
    view[name].volumes[0].cal_min = low;
    view[name].volumes[0].cal_max = high;
    view[name].updateGLVolume();
  }
}

async function table(difference) {
  const file = at("labels").files[0];
  const labels = file ? inHU(await load(file, file.name)) : null;
  if (labels && labels.length !== difference.length) throw new Error("the labels are of another grid");
  const names = file ? await (await fetch("/page/organs.json")).json() : {};
  const body = at("errors").tBodies[0];
  body.replaceChildren();
  for (const row of errorRows(difference, labels)) {
    const cells = [
      row.label < 0 ? "whole volume" : names[row.label] || `label ${row.label}`,
      row.voxels.toLocaleString("en"),
      ...[row.psnr, row.mae, row.max, row.bias].map((n) => n.toFixed(2)),
    ];
    const line = body.insertRow();
    for (const text of cells) line.insertCell().textContent = text;
  }
  at("errors").hidden = false;
}

at("ct").addEventListener("change", () => at("ct").files[0] && run(at("ct").files[0]));
at("window").addEventListener("change", setWindow);
at("stop").addEventListener("click", () => job && ask(`/v1/jobs/${job.id}/cancel`, { method: "POST" }));
at("ask").addEventListener("submit", (event) => event.preventDefault());
for (const kind of ["dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) run(event.dataTransfer.files[0]);
  });
}
