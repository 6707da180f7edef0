"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const contents = document.querySelector(".contents");
  for (const part of document.querySelectorAll("body > section")) {
    const link = document.createElement("a");
    link.href = "#" + part.id;
    link.textContent = part.querySelector("h2").textContent;
    contents.append(link);
  }
  const get = (id) => document.getElementById(id);
  const holder = get("planes");
  if (!holder || !data.pictures.length) return;

  const planes = {}; // name of a blob -> promise of HU, row by row
  function pixels(name, [rows, columns]) {
    planes[name] ??= (async () => {
      const packed = Uint8Array.from(atob(data.blobs[name]), (c) => c.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
      const values = new Int16Array(await new Response(stream).arrayBuffer());
      for (let r = 0; r < rows; r++)
        for (let c = 1; c < columns; c++) values[r * columns + c] += values[r * columns + c - 1];
      return values;
    })();
    return planes[name];
  }

  const state = { which: 0, place: 0, wipe: 1.5, level: 40, width: 400, reach: 100 };
  const COLD = [64, 156, 255], ZERO = [24, 26, 31], WARM = [255, 112, 67];
  const OPPOSITE = { L: "R", R: "L", A: "P", P: "A", S: "I", I: "S" };

  async function draw(canvas, plane) {
    const [rows, columns] = plane.size;
    const [before, error] = await Promise.all(
      [plane.original, plane.error].map((name) => pixels(name, plane.size)));
    const image = new ImageData(columns, rows), out = image.data;
    const low = state.level - state.width / 2, scale = 255 / state.width;
    // 0: original; 1: reconstruction; 2: error. In between, a line divides two of them.
    const first = Math.min(Math.floor(state.wipe), 1);
    const line = (state.wipe - first) * columns;
    for (let r = 0, k = 0; r < rows; r++)
      for (let c = 0; c < columns; c++, k++) {
        const shown = c < line ? first + 1 : first;
        if (shown === 2) {
          const share = Math.max(-1, Math.min(1, error[k] / state.reach));
          const end = share < 0 ? COLD : WARM, size = Math.abs(share);
          for (let i = 0; i < 3; i++) out[4 * k + i] = ZERO[i] + size * (end[i] - ZERO[i]);
        } else {
          const hu = before[k] + (shown ? error[k] : 0);
          out[4 * k] = out[4 * k + 1] = out[4 * k + 2] = (hu - low) * scale;
        }
        out[4 * k + 3] = 255;
      }
    canvas.width = columns;
    canvas.height = rows;
    const pen = canvas.getContext("2d");
    pen.putImageData(image, 0, 0);
    if (line > 0 && line < columns) {
      pen.fillStyle = "#ffd54a";
      pen.fillRect(line - 0.5, 0, Math.max(1, columns / 400), rows);
    }
  }

  let queued = false;
  function redraw() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(async () => {
      queued = false;
      const shown = data.pictures[state.which].positions[state.place];
      const boxes = [...holder.children];
      await Promise.all(shown.map((plane, n) => draw(boxes[n].querySelector("canvas"), plane)));
      holder.dataset.drawn = String(+(holder.dataset.drawn ?? 0) + 1);
    });
  }

  function build() {
    const shown = data.pictures[state.which].positions[state.place];
    holder.replaceChildren(...shown.map((plane) => {
      const box = document.createElement("div");
      box.className = "plane";
      const canvas = document.createElement("canvas");
      const [high, wide] = plane.size.map((n, axis) => n * plane.mm[axis]);
      const scale = Math.min((plane.name === "Axial" ? 560 : 440) / wide, 440 / high);
      canvas.style.width = Math.round(wide * scale) + "px";
      canvas.style.height = Math.max(24, Math.round(high * scale)) + "px";
      const drag = (event) => {
        if (!event.buttons) return;
        const frame = canvas.getBoundingClientRect();
        const share = Math.max(0, Math.min(1, (event.clientX - frame.left) / frame.width));
        set("wipe", Math.min(Math.floor(state.wipe), 1) + Math.min(share, 0.999));
      };
      canvas.addEventListener("pointerdown", drag);
      canvas.addEventListener("pointermove", drag);
      const name = document.createElement("span");
      name.textContent = `${plane.name}, slice ${plane.slice} of ${plane.count}`;
      const letters = [[OPPOSITE[plane.right], "left:5px;top:2px"], [plane.right, "right:5px;top:2px"]]
        .map(([letter, place]) => {
          const mark = document.createElement("b");
          mark.textContent = letter;
          mark.style.cssText = place;
          return mark;
        });
      box.append(canvas, ...letters, name);
      return box;
    }));
    get("place").max = data.pictures[state.which].positions.length - 1;
    redraw();
  }

  function set(name, value) {
    state[name] = value;
    get(name).value = value;
    for (const button of document.querySelectorAll(".viewer button"))
      button.classList.toggle("on",
        +button.dataset.level === state.level && +button.dataset.width === state.width);
    redraw();
  }
  for (const name of ["wipe", "level", "width", "reach"]) {
    get(name).addEventListener("input", (event) => {
      if (Number.isFinite(event.target.valueAsNumber)) {
        state[name] = event.target.valueAsNumber;
        if (name !== "level" ) state[name] = Math.max(state[name], name === "wipe" ? 0 : 1);
        redraw();
      }
    });
  }
  for (const button of document.querySelectorAll(".viewer button"))
    button.addEventListener("click", () => {
      set("level", +button.dataset.level);
      set("width", +button.dataset.width);
    });
  get("which").addEventListener("change", (event) => {
    state.which = +event.target.value;
    state.place = Math.min(state.place, data.pictures[state.which].positions.length - 1);
    build();
  });
  get("place").addEventListener("input", (event) => {
    state.place = +event.target.value;
    build();
  });
  state.place = Math.floor(data.pictures[0].positions.length / 2);
  build();
  get("place").value = state.place;
  set("level", 40);
  set("width", 400);
})();
