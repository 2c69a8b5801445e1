// Runs .onnx files in a JavaScript client of onnxruntime:  node run.mjs onnxruntime-node|onnxruntime-web
//
// Every line of standard input is a job, every line of standard output its result, in JSON:
//   job:    {model: path, inputs: {name: tensor}}
//   result: {outputs: {name: tensor}} or {error: message}
//   tensor: {type, dims, data}, data the little-endian bytes in base64, so that NaN, infinities and 16-bit types pass.
// A session is made once for each path.

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

const client = process.argv[2];
const ort = await import(client);
ort.env.wasm.numThreads = 1;

// float16 is bits to JavaScript, and bfloat16 is not among the types of its tensors.
const arrays = {
  float32: Float32Array,
  float64: Float64Array,
  float16: Uint16Array,
  int64: BigInt64Array,
  bool: Uint8Array,
};

function decode({ type, dims, data }) {
  const bytes = Uint8Array.from(Buffer.from(data, "base64"));
  return new ort.Tensor(type, new arrays[type](bytes.buffer), dims);
}

function encode({ type, dims, data }) {
  return { type, dims, data: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64") };
}

const mapValues = (object, f) => Object.fromEntries(Object.entries(object).map(([key, value]) => [key, f(value)]));
const options = { intraOpNumThreads: 1, logSeverityLevel: 4 }; // errors arrive as results
const sessions = new Map();

async function run({ model, inputs }) {
  if (!sessions.has(model)) sessions.set(model, await ort.InferenceSession.create(readFileSync(model), options));
  return { outputs: mapValues(await sessions.get(model).run(mapValues(inputs, decode)), encode) };
}

for await (const line of createInterface({ input: process.stdin })) {
  const result = await run(JSON.parse(line)).catch((error) => ({ error: error.message }));
  process.stdout.write(JSON.stringify(result) + "\n");
}
