// Runs two .tflite files in turns and shows their latencies, and how many of a sample they get right. Parameters of the
// address: `dense` and `sparse`, files to begin with; `seconds` of measuring; `modules`, see speed.html.
const ROUNDS = { least: 20, most: 1000 };
const TURN = 5; // milliseconds at least: the clock of a browser may be as coarse as 0.1
const TYPES = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };
const WHICH = ['dense', 'sparse'];

const main = document.querySelector('main');
const at = (id) => document.getElementById(id);
const parameters = new URLSearchParams(location.search);
const seconds = Number(parameters.get('seconds')) || 3;
const contents = {}; // of the files: Uint8Array
let litert, sample;

function show(state, error) {
  main.dataset.state = state;
  at('start').disabled = state === 'loading' || state === 'measuring' || WHICH.some((which) => !contents[which]);
  // What is chosen while it measures would not be what was measured.
  for (const id of ['accelerator', ...WHICH.map((which) => `${which}-file`)]) at(id).disabled = state === 'measuring';
  at('start').textContent = state === 'measuring' ? 'Measuring …' : 'Measure';
  at('error').textContent = error ? String(error.message ?? error) : '';
}

function clear() {
  for (const which of WHICH) {
    at(`${which}-median`).textContent = '–';
    at(`${which}-spread`).textContent = '\u00a0';
    at(`${which}-bar`).style.width = '0';
    at(`${which}-right`).textContent = '\u00a0';
    at(`${which}-rounds`).setAttribute('points', '');
  }
  at('most').textContent = '';
  at('result').textContent = at('agreement').textContent = '';
}

function take(which, name, content) {
  const isModel = content.length > 8 && String.fromCharCode(...content.subarray(4, 8)) === 'TFL3';
  if (!isModel) throw new Error(`${name} is not a .tflite file`);
  contents[which] = content;
  at(`${which}-name`).textContent = `${name}, ${(content.length / 1000).toLocaleString('en', { maximumFractionDigits: 0 })} kB`;
}

async function download(which) {
  const address = parameters.get(which) ?? `demo_${which}.tflite`;
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address}: ${response.status} ${response.statusText}`);
  take(which, new URL(address, location).pathname.split('/').pop(), new Uint8Array(await response.arrayBuffer()));
}

// Pseudorandom numbers (a linear congruential generator), the same for both models; about normal, or 0 and 1.
function randomInput({ dtype, shape }) {
  let state = 12345;
  const uniform = () => (state = (1103515245 * state + 12345) % 2147483648) / 2147483648;
  const dimensions = Array.from(shape, (n) => Math.max(1, n)); // an open batch size is -1
  const values = new TYPES[dtype](dimensions.reduce((a, b) => a * b, 1));
  const draw = dtype === 'float32' ? () => (uniform() + uniform() + uniform() - 1.5) * 2 : () => Math.round(uniform());
  return new litert.Tensor(values.map(draw), dimensions);
}

async function prepare(content, accelerator) {
  const model = await litert.loadAndCompile(content, { accelerator });
  const details = model.getInputDetails();
  const random = Object.fromEntries(details.map((detail) => [detail.name, randomInput(detail)]));
  const run = async (inputs = random) => {
    const values = [];
    for (const tensor of Object.values(await model.run(inputs))) {
      values.push(...(await tensor.data())); // a GPU is done when its numbers are here
      tensor.delete();
    }
    return values;
  };
  // How many of the sample the model gets right; undefined where it takes other inputs.
  const right = async () => {
    const [{ dtype, shape, name }, ...others] = details;
    const dimensions = Array.from(shape, (n) => Math.max(1, n));
    if (others.length || dtype !== 'float32' || String(dimensions) !== String([1, ...sample.shape])) return undefined;
    let count = 0;
    for (const [i, image] of sample.images.entries()) {
      const input = new litert.Tensor(Float32Array.from(image, (value) => value / sample.largest), dimensions);
      const scores = await run({ [name]: input });
      input.delete();
      count += scores.indexOf(Math.max(...scores)) === sample.labels[i];
    }
    return count;
  };
  let repeats = 1;
  const turn = async () => {
    await run(); // the other model left its data in the caches
    for (;; repeats *= 2) {
      const start = performance.now();
      for (let i = 0; i < repeats; i++) await run();
      const elapsed = performance.now() - start;
      if (elapsed >= TURN) return elapsed / repeats;
    }
  };
  const end = () => [...Object.values(random), model].forEach((object) => object.delete());
  return { run, right, turn, end, times: [] };
}

// Largest difference, relative to the largest value; NaN where one of the two is.
function difference(a, b) {
  if (a.length !== b.length) return NaN;
  const largest = a.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  return a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i])), 0) / Math.max(largest, Number.MIN_VALUE);
}

function quantile(values, share) {
  const sorted = Float64Array.from(values).sort();
  const position = share * (sorted.length - 1), low = Math.floor(position);
  return sorted[low] + (position - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

const milliseconds = (value) => (value < 10 ? value.toFixed(3) : value.toFixed(1));

// One line for each file: a round's time to the right, up to the time that one round in twenty exceeds.
function draw(models) {
  const most = Math.max(...models.map(({ times }) => quantile(times, 0.95)));
  const scale = 1.1 * most || 1;
  WHICH.forEach((which, i) => {
    const { times } = models[i];
    const place = (time, round) => `${(400 * round) / Math.max(1, times.length - 1)},${100 - Math.min(100, (100 * time) / scale)}`;
    at(`${which}-rounds`).setAttribute('points', times.map(place).join(' '));
  });
  at('most').textContent = `0 to ${milliseconds(scale)} ms, round by round`;
}

function display(models) {
  draw(models);
  const medians = models.map(({ times }) => quantile(times, 0.5));
  WHICH.forEach((which, i) => {
    const [low, high] = [0.25, 0.75].map((share) => milliseconds(quantile(models[i].times, share)));
    at(`${which}-median`).textContent = `${milliseconds(medians[i])} ms`;
    at(`${which}-spread`).textContent = `${low} to ${high} ms, ${models[i].times.length} rounds`;
    at(`${which}-bar`).style.width = `${(100 * medians[i]) / Math.max(...medians)}%`;
  });
  return medians[1] / medians[0];
}

async function measure() {
  clear();
  show('measuring');
  const models = [];
  try {
    const accelerator = at('accelerator').value;
    for (const which of WHICH) models.push(await prepare(contents[which], accelerator));
    for (const [i, which] of WHICH.entries()) {
      const count = await models[i].right();
      if (count !== undefined) at(`${which}-right`).textContent = `${count} of ${sample.labels.length} ${sample.of} right`;
    }
    const apart = difference(...[await models[0].run(), await models[1].run()]);
    for (const model of models) await model.turn(); // finds out how often it runs in a turn
    const start = performance.now();
    for (let round = 0; round < ROUNDS.most; round++) {
      const elapsed = (performance.now() - start) / 1000;
      if (round > 0 && (elapsed > 20 * seconds || (round >= ROUNDS.least && elapsed > 2 * seconds))) break;
      // The one that goes first finds the caches as the other left them: take turns at that, too.
      for (const i of round % 2 ? [0, 1] : [1, 0]) models[i].times.push(await models[i].turn());
      if (round % 10 === 0) display(models);
      await new Promise((resolve) => setTimeout(resolve)); // lets the page draw
    }
    const ratio = display(models);
    const faster = ratio < 1 ? `${(1 / ratio).toFixed(1)} times as fast` : 'no faster here';
    at('result').textContent = `Sparse takes ${ratio.toFixed(2)} of the dense time: ${faster}`;
    main.dataset.ratio = ratio;
    at('agreement').textContent = apart < 1e-3
      ? `Both compute the same: outputs differ by ${apart.toExponential(1)} of their magnitude.`
      : `Their outputs differ by ${apart.toExponential(1)} of their magnitude: two networks, or a wrong file.`;
    show('done');
  } catch (error) {
    show('failed', error);
  } finally {
    models.forEach((model) => model.end());
  }
}

at('accelerator').addEventListener('change', () => {
  clear();
  show('ready');
});
for (const which of WHICH) {
  at(`${which}-file`).addEventListener('change', async ({ target }) => {
    const [file] = target.files;
    if (!file) return;
    clear();
    try {
      take(which, file.name, new Uint8Array(await file.arrayBuffer()));
      show('ready');
    } catch (error) {
      show('failed', error);
    }
  });
}
at('start').addEventListener('click', measure);

try {
  litert = await import('@litertjs/core');
  await litert.loadLiteRt(`${litertFolder}wasm/`);
  // LiteRT.js 2.5.3 runs a file with an open batch size at batch 1, if only it is not asked whether [1, 64] fits [-1, 64].
  litert.getGlobalLiteRt().liteRtWasm.checkTensorBufferCompatible = () => {};
  if (!litert.isWebGPUSupported()) at('accelerator').options[1].disabled = true;
  sample = await (await fetch('demo_sample.json')).json();
  for (const which of WHICH) await download(which);
  show('ready');
} catch (error) {
  show('failed', error);
}
