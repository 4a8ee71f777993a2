"use strict";

// An image file as the data URL that is sent.
const MAX_SIDE = 1024; // pixels of the image that is sent; encoders take a few hundred
const UNCHANGED_BYTES = 400_000; // a file up to this size needs no smaller copy
const SERVER_TYPES = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"];

// A data URL of the file itself, or of a copy if it is large or of a kind that only browsers read.
async function toDataUrl(file) {
  const bitmap = await createImageBitmap(file);
  const scale = MAX_SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && file.size <= UNCHANGED_BYTES && SERVER_TYPES.includes(file.type)) return fileDataUrl(file);
  return toJpeg(bitmap, scale, 0.92);
}

// A data URL whose picture has no side above `side` pixels.
async function smaller(dataUrl, side) {
  const image = new Image();
  image.src = dataUrl;
  await image.decode();
  const bitmap = await createImageBitmap(image);
  return toJpeg(bitmap, side / Math.max(bitmap.width, bitmap.height), 0.85);
}

function toJpeg(bitmap, scale, quality) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * Math.min(1, scale)));
  canvas.height = Math.max(1, Math.round(bitmap.height * Math.min(1, scale)));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; // as the server does with what is transparent
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", quality);
}

function fileDataUrl(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = failed;
    reader.readAsDataURL(file);
  });
}
