// The microphone, with a meter that shows that it hears something.

const $ = (id) => document.getElementById(id);
let recorder = null;

export async function toggle(done, problem) {
  if (recorder) return recorder.stop();
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    return problem(`no microphone: ${error.message}`);
  }
  const pieces = [], began = performance.now(), context = new AudioContext(), analyser = context.createAnalyser();
  context.createMediaStreamSource(stream).connect(analyser);
  recorder = new MediaRecorder(stream);
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  recorder.addEventListener("stop", () => {
    stream.getTracks().forEach((track) => track.stop());
    context.close();
    cancelAnimationFrame(frame);
    const type = recorder.mimeType;
    recorder = null;
    $("record").setAttribute("aria-pressed", "false");
    $("record-text").textContent = "Record";
    $("level").hidden = true;
    done(new Blob(pieces, { type }));
  });
  let frame = 0;
  const samples = new Float32Array(analyser.fftSize);
  const tick = () => {
    analyser.getFloatTimeDomainData(samples);
    const rms = Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length);
    $("level").value = Math.min(1, Math.max(0, 1 + (20 * Math.log10(rms + 1e-6)) / 60)); // 60 dB of range
    $("record-text").textContent = `Stop and search (${Math.floor((performance.now() - began) / 1000)} s)`;
    frame = requestAnimationFrame(tick);
  };
  $("level").hidden = false;
  $("record").setAttribute("aria-pressed", "true");
  recorder.start();
  tick();
}
