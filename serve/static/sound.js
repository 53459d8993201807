// Sounds as pictures: waveform peaks, and a spectrogram with time to the right, pitch (mel) upwards, 80 dB in colour.

const RATE = 22050, FFT_SIZE = 1024, RANGE_DB = 80;
const MAGMA = [[0, 0, 4], [40, 17, 89], [114, 31, 129], [182, 54, 121], [241, 96, 93], [254, 175, 119], [252, 253, 191]];

export async function decode(bytes) {
  const audio = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes);
  const samples = audio.getChannelData(0).slice();
  for (let channel = 1; channel < audio.numberOfChannels; channel++) {
    audio.getChannelData(channel).forEach((value, at) => { samples[at] += value; });
  }
  if (audio.numberOfChannels > 1) samples.forEach((value, at) => { samples[at] = value / audio.numberOfChannels; });
  return { samples, sampleRate: audio.sampleRate, duration: audio.duration };
}

export function peaksOf(samples, count) {
  return Array.from({ length: count }, (_, at) => {
    const start = Math.floor((at / count) * samples.length), end = Math.max(start + 1, Math.floor(((at + 1) / count) * samples.length));
    let peak = 0;
    for (let i = start; i < end && i < samples.length; i++) peak = Math.max(peak, Math.abs(samples[i]));
    return peak;
  });
}

// The canvas's own pixels follow its size on the screen.
export function fit(canvas) {
  const scale = Math.min(2, devicePixelRatio || 1);
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * scale));
  return canvas.getContext("2d");
}

function cssColour(element, name) {
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  element.parentNode.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

// peaks over [from, to] seconds; stretches in `marks` [[start, end], ...] take the colour of a match.
export function drawPeaks(canvas, peaks, { from = 0, to = 1, marks = [] } = {}) {
  const drawing = fit(canvas), { width, height } = canvas;
  const loudest = Math.max(1e-4, ...peaks), step = width / peaks.length;
  const plain = cssColour(canvas, "--wave"), marked = cssColour(canvas, "--match");
  drawing.clearRect(0, 0, width, height);
  peaks.forEach((peak, at) => {
    const second = from + ((at + 0.5) / peaks.length) * (to - from);
    drawing.fillStyle = marks.some(([start, end]) => second >= start && second < end) ? marked : plain;
    const tall = Math.max(1, (peak / loudest) * (height - 2));
    drawing.fillRect(at * step, (height - tall) / 2, Math.max(1, step * 0.7), tall);
  });
}

export function drawSpectrogram(canvas, samples, sampleRate) {
  const width = 480, height = 96, columns = [];
  canvas.width = width;
  canvas.height = height;
  let loudest = -Infinity;
  for (let x = 0; x < width; x++) {
    const start = Math.floor((x / width) * Math.max(1, samples.length - FFT_SIZE));
    const column = melColumn(powerSpectrum(samples.subarray(start, start + FFT_SIZE)), sampleRate, height);
    loudest = Math.max(loudest, ...column);
    columns.push(column);
  }
  const drawing = canvas.getContext("2d"), image = drawing.createImageData(width, height);
  columns.forEach((column, x) => column.forEach((db, y) => {
    const [r, g, b] = magma(Math.max(0, 1 + (db - loudest) / RANGE_DB));
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
  for (let i = 0; i < frame.length; i++) real[i] = frame[i] * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / FFT_SIZE));
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

function magma(level) {
  const place = level * (MAGMA.length - 1), low = Math.min(MAGMA.length - 2, Math.floor(place)), share = place - low;
  return MAGMA[low].map((value, i) => value + (MAGMA[low + 1][i] - value) * share);
}

export const seconds = (value) => (value < 60 ? `${value.toFixed(1)} s`
  : `${Math.floor(value / 60)}:${String(Math.floor(value % 60)).padStart(2, "0")}`);
