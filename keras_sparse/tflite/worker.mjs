// The worker of worker.py for LiteRT.js, in Node: `node worker.mjs CORE FOLDER`, the folder of the package @litertjs/core
// and one for temporary files.
// LiteRT.js expects a browser's web worker, so the few functions of one that it uses are provided first.
import fs from 'node:fs';
import { createRequire } from 'node:module';
import os from 'node:os';
import path from 'node:path';
import process from 'node:process';
import { pathToFileURL } from 'node:url';
import v8 from 'node:v8';
import vm from 'node:vm';
import { Worker } from 'node:worker_threads';

v8.setFlagsFromString('--experimental-wasm-relaxed-simd'); // Node 20 has it behind this flag, as Chrome has it without

const answer = (message) => fs.writeSync(1, JSON.stringify(message) + '\n');
for (const name of ['log', 'info', 'warn', 'debug']) console[name] = () => {}; // stdout belongs to the answers

globalThis.self = globalThis;
globalThis.require = createRequire(import.meta.url);
globalThis.navigator ??= { hardwareConcurrency: os.availableParallelism() }; // Node < 21
globalThis.importScripts = (script) => {
  globalThis.__filename = script;
  globalThis.__dirname = path.dirname(script);
  const source = `${fs.readFileSync(script, 'utf8')}\n;globalThis.ModuleFactory = ModuleFactory;`;
  vm.runInThisContext(source, { filename: script });
};

const [core, folder] = process.argv.slice(2).map((argument) => path.resolve(argument));
const litert = await import(pathToFileURL(path.join(core, 'dist', 'index.js')));
const types = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };
let model, inputs = {};

const release = (tensors) => Object.values(tensors).forEach((tensor) => tensor.delete());

// LiteRT.js with threads starts them from its own script, which Node would take for an ES module where npm put it.
function threaded() {
  const name = 'litert_wasm_threaded_internal';
  for (const file of [`${name}.js`, `${name}.wasm`]) fs.copyFileSync(path.join(core, 'wasm', file), path.join(folder, file));
  fs.writeFileSync(path.join(folder, 'package.json'), '{"type": "commonjs"}');
  return path.join(folder, `${name}.js`);
}

// Each is a request.
const session = {
  async load({ path: file, threads }) {
    await litert.loadLiteRt(threads > 1 ? threaded() : path.join(core, 'wasm') + path.sep);
    // LiteRT.js 2.5.3 runs a file with an open batch size at batch 1, if only it is not asked whether [1, 64] fits
    // [-1, 64]. At other sizes its outputs are wrong without an error, so the process that asks checks the shapes.
    litert.getGlobalLiteRt().liteRtWasm.checkTensorBufferCompatible = () => {};
    const content = new Uint8Array(fs.readFileSync(file));
    const start = performance.now();
    model = await litert.loadAndCompile(content, { accelerator: 'wasm', cpuOptions: { numThreads: threads } });
    const seconds = (performance.now() - start) / 1000;
    const details = model.getInputDetails().map(({ name, dtype, shape }) => ({ name, dtype, shape: Array.from(shape) }));
    return { inputs: details, outputs: model.getOutputDetails().map(({ name }) => name), seconds };
  },

  async feed({ arrays, path: file }) {
    const content = fs.readFileSync(file);
    release(inputs);
    inputs = {};
    for (const { name, dtype, shape, offset } of arrays) {
      const count = shape.reduce((a, b) => a * b, 1);
      const bytes = content.subarray(offset, offset + count * types[dtype].BYTES_PER_ELEMENT);
      inputs[name] = new litert.Tensor(new types[dtype](new Uint8Array(bytes).buffer), shape);
    }
    return {};
  },

  async run({ path: file }) {
    const outputs = await model.run(inputs);
    const arrays = [], chunks = [];
    let offset = 0;
    for (const [name, tensor] of Object.entries(outputs)) {
      const values = tensor.toTypedArray();
      chunks.push(Buffer.from(values.slice().buffer));
      arrays.push({ name, dtype: tensor.type.dtype, shape: Array.from(tensor.type.layout.dimensions), offset });
      offset += values.byteLength;
    }
    release(outputs);
    fs.writeFileSync(file, Buffer.concat(chunks));
    return { arrays };
  },

  async time({ repeats }) {
    release(await model.run(inputs)); // the process that ran meanwhile left its own data in the caches
    const start = performance.now();
    for (let i = 0; i < repeats; i++) release(await model.run(inputs));
    return { seconds: (performance.now() - start) / 1000 / repeats };
  },
};

// A thread reads the requests: it ends the process with the one that asks, even in the middle of a run.
const reading = `
const net = require('node:net');
const readline = require('node:readline');
const { parentPort } = require('node:worker_threads');
readline.createInterface({ input: new net.Socket({ fd: 0 }) })
  .on('line', (line) => parentPort.postMessage(line))
  .on('close', () => process.kill(process.pid, 'SIGKILL'));
`;

new Worker(reading, { eval: true }).on('message', async (line) => {
  const { do: name, ...request } = JSON.parse(line);
  try {
    answer(await session[name](request));
  } catch (error) {
    answer({ error: String(error) });
  }
});
