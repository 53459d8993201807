// Draw a sound on a canvas in the browser: time to the right, pitch (mel) upwards, the loudest 80 dB in colour.

const FFT_SIZE = 1024;
const RANGE_DB = 80;
const MAGMA = [[0, 0, 4], [40, 17, 89], [114, 31, 129], [182, 54, 121], [241, 96, 93], [254, 175, 119], [252, 253, 191]];

export async function drawSpectrogram(canvas, bytes) {
  const context = new OfflineAudioContext(1, 1, 22050);
  const audio = await context.decodeAudioData(bytes);
  const samples = audio.getChannelData(0);
  const { width, height } = canvas;
  const columns = [];
  let loudest = -Infinity;
  for (let x = 0; x < width; x++) {
    const start = Math.floor((x / width) * Math.max(1, samples.length - FFT_SIZE));
    const column = melColumn(powerSpectrum(samples.subarray(start, start + FFT_SIZE)), audio.sampleRate, height);
    loudest = Math.max(loudest, ...column);
    columns.push(column);
  }
  const drawing = canvas.getContext("2d");
  const image = drawing.createImageData(width, height);
  columns.forEach((column, x) => column.forEach((db, y) => {
    const [r, g, b] = colour(Math.max(0, 1 + (db - loudest) / RANGE_DB));
    image.data.set([r, g, b, 255], 4 * ((height - 1 - y) * width + x));
  }));
  drawing.putImageData(image, 0, 0);
}

function melColumn(power, sampleRate, height) {
  const top = 2595 * Math.log10(1 + sampleRate / 2 / 700);
  return Array.from({ length: height }, (_, y) => {
    const hertz = 700 * (10 ** (((y + 0.5) / height) * top / 2595) - 1);
    const bin = Math.min(power.length - 1, Math.round((hertz / sampleRate) * FFT_SIZE));
    return 10 * Math.log10(power[bin] + 1e-10);
  });
}

function powerSpectrum(frame) {
  const real = new Float32Array(FFT_SIZE), imaginary = new Float32Array(FFT_SIZE);
  for (let i = 0; i < frame.length; i++) {
    real[i] = frame[i] * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / FFT_SIZE));
  }
  fft(real, imaginary);
  return Array.from({ length: FFT_SIZE / 2 }, (_, i) => real[i] ** 2 + imaginary[i] ** 2);
}

// In-place radix-2 Cooley-Tukey.
function fft(real, imaginary) {
  const n = real.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let size = 2; size <= n; size <<= 1) {
    for (let k = 0; k < size / 2; k++) {
      const angle = (-2 * Math.PI * k) / size, cos = Math.cos(angle), sin = Math.sin(angle);
      for (let a = k; a < n; a += size) {
        const b = a + size / 2;
        const re = real[b] * cos - imaginary[b] * sin, im = real[b] * sin + imaginary[b] * cos;
        real[b] = real[a] - re; imaginary[b] = imaginary[a] - im;
        real[a] += re; imaginary[a] += im;
      }
    }
  }
}

function colour(level) {
  const place = level * (MAGMA.length - 1), low = Math.min(MAGMA.length - 2, Math.floor(place)), share = place - low;
  return MAGMA[low].map((value, i) => value + (MAGMA[low + 1][i] - value) * share);
}
