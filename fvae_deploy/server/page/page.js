// The web page: upload a CT, follow its job, show original, reconstruction and error side by side.
"use strict";

const at = (id) => document.getElementById(id);
const SIGNED = { // colour map: blue below 0, black at 0, red above
  R: [110, 0, 0, 160, 255], G: [190, 60, 0, 20, 150], B: [255, 200, 0, 20, 110],
  A: [255, 255, 255, 255, 255], I: [0, 64, 128, 192, 255],
};
const view = {}; // the NiiVue instances: original, reconstruction, error
const STATES = {
  queued: "Waiting in the queue", running: "Computing", done: "Done", failed: "Failed", cancelled: "Cancelled",
};
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
    const detail = await answer.json().then((body) => body.detail, () => answer.statusText);
    throw new Error(typeof detail === "string" ? detail : detail[0].msg);
  }
  return answer;
}

/** Read a job's events until it ends; return its last status. EventSource cannot send a token. */
async function follow(id) {
  const answer = await ask(`/v1/jobs/${id}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", status = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return status;
    text += value;
    const lines = text.split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      status = JSON.parse(line.slice(6));
      at("bar").value = status.total ? status.done / status.total : 0;
      say(STATES[status.state] + (status.total ? `: ${status.done} of ${status.total} slices` : ""));
    }
  }
}

async function run(file) {
  at("views").hidden = at("errors").hidden = at("save").hidden = true;
  at("bar").hidden = at("stop").hidden = false;
  at("bar").removeAttribute("value");
  try {
    say(`Uploading ${(file.size / 2 ** 20).toFixed(1)} MiB`);
    job = await (await ask("/v1/reconstruct", { method: "POST", body: file })).json();
    const ended = await follow(job.id);
    if (ended.state !== "done") throw new Error(ended.error);
    const result = await (await ask(`/v1/jobs/${job.id}/result`)).blob();
    at("save").href = URL.createObjectURL(result);
    at("save").hidden = false;
    await show(file, result);
    const { slices_per_second: speed, engine, precision } = ended.report;
    say(`Done: ${speed.toFixed(1)} slices/s with ${engine} in ${precision}`);
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
  if (typeof niivue === "undefined") throw new Error("The viewer NiiVue is not installed on this server: ask the operator to run make page and install fvae again");
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
      view[name].setMultiplanarLayout(2); // views in a grid
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
  if (labels && labels.length !== difference.length) throw new Error("The organ labels have another size than the CT: choose the labels of this CT");
  const names = file ? await (await fetch("/page/organs.json")).json() : {};
  const body = at("errors").tBodies[0];
  body.replaceChildren();
  for (const row of errorRows(difference, labels)) {
    const cells = [
      row.label < 0 ? "Whole volume" : names[row.label] || `Label ${row.label}`,
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
