// Reconstruction errors by voxel and by organ, defined as in `fvae compare`.
"use strict";

const LOW = -1000, HIGH = 1000; // HU range to which values are clipped

/** Return the voxels of a NiiVue volume in HU. */
function inHU(volume) {
  const slope = volume.hdr.scl_slope || 1, intercept = volume.hdr.scl_inter || 0;
  if (slope === 1 && intercept === 0) return volume.img;
  return Float32Array.from(volume.img, (value) => value * slope + intercept);
}

const clipped = (value) => Math.min(Math.max(value, LOW), HIGH);

/** Return reconstruction - original in HU, both clipped to LOW...HIGH. */
function differences(original, reconstruction) {
  const result = new Float32Array(original.length);
  for (let i = 0; i < result.length; i++) result[i] = clipped(reconstruction[i]) - clipped(original[i]);
  return result;
}

/** Return a row (voxels, psnr, mae, max, bias) for the whole volume, label -1, and for each label. */
function errorRows(difference, labels) {
  const sums = new Map();
  const add = (label, e) => {
    let row = sums.get(label);
    if (!row) sums.set(label, (row = { label, voxels: 0, sum: 0, size: 0, square: 0, max: 0 }));
    const size = Math.abs(e);
    row.voxels += 1;
    row.sum += e;
    row.size += size;
    row.square += e * e;
    if (size > row.max) row.max = size;
  };
  for (let i = 0; i < difference.length; i++) {
    add(-1, difference[i]);
    if (labels && labels[i] > 0) add(Math.round(labels[i]), difference[i]);
  }
  return [...sums.values()].sort((a, b) => a.label - b.label).map((row) => ({
    label: row.label,
    voxels: row.voxels,
    psnr: 10 * Math.log10((HIGH - LOW) ** 2 / (row.square / row.voxels)),
    mae: row.size / row.voxels,
    max: row.max,
    bias: row.sum / row.voxels,
  }));
}
