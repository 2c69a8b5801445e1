// Writes on from what is typed, one character at a time, with the model in char_model.onnx.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";

const LENGTH = 280; // characters written after the text
const FRAME = 16; // milliseconds after which the browser may draw and take keys

ort.env.wasm.numThreads = 1; // more of them need a server that isolates the page, and the model is small

const element = (id) => document.getElementById(id);
const [page, prompt, temperature] = ["page", "prompt", "temperature"].map(element);

// The model

/** The entries of metadata_props, field 14 of a ModelProto: onnxruntime-web does not hand them out. */
function readMetadata(bytes) {
  const metadata = {};
  for (const [field, value] of protobuf(bytes)) {
    if (field !== 14) continue;
    const entry = Object.fromEntries(protobuf(value));
    metadata[text(entry[1])] = text(entry[2]);
  }
  return metadata;
}

const text = (bytes) => new TextDecoder().decode(bytes);

/** The fields [number, bytes] of a protobuf message; those that are not strings, bytes or messages are passed over. */
function* protobuf(bytes) {
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const kind = key % 8;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const length = varint();
      yield [Math.floor(key / 8), bytes.subarray(at, (at += length))];
    } else throw new Error(`not an .onnx file: protobuf wire type ${kind}`);
  }
}

async function loadModel(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  const { alphabet, context, description } = readMetadata(bytes);
  if (!alphabet) throw new Error(`${url} has no alphabet in its metadata; export it with char_model.save_onnx`);
  const session = await ort.InferenceSession.create(bytes);
  const characters = [...alphabet];
  return {
    characters,
    description,
    context: Number(context),
    megabytes: bytes.length / 1e6,
    index: new Map(characters.map((character, i) => [character, i])),

    /** The scores of every character to come next after these. */
    async next(indices) {
      const seen = BigInt64Array.from(indices.slice(-this.context), BigInt);
      const outputs = await session.run({ [session.inputNames[0]]: new ort.Tensor("int64", seen, [1, seen.length]) });
      return outputs[session.outputNames[0]].data.slice(-characters.length);
    },
  };
}

/** A draw from softmax(logits / temperature); at temperature 0 the likeliest. */
function draw(logits, temperature) {
  const largest = Math.max(...logits);
  if (temperature === 0) return logits.indexOf(largest);
  const weights = Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  let rest = Math.random() * weights.reduce((sum, weight) => sum + weight, 0);
  const drawn = weights.findIndex((weight) => (rest -= weight) < 0);
  return drawn >= 0 ? drawn : logits.indexOf(largest); // the sums may differ by a rounding
}

// The page

function showModel({ description, characters, context, megabytes }) {
  const facts = {
    Model: description,
    File: `char_model.onnx, ${megabytes.toFixed(1)} MB`,
    Reads: `the last ${context} characters, ${characters.length} different ones`,
    Runs: `onnxruntime-web ${ort.env.versions.web}, WebAssembly`,
  };
  for (const [name, fact] of Object.entries(facts)) {
    const [term, definition] = ["dt", "dd"].map((tag) => document.createElement(tag));
    [term.textContent, definition.textContent] = [name, fact];
    element("model").append(term, definition);
  }
}

function show(state, message) {
  page.dataset.state = state;
  element("status").textContent = message;
}

const breathe = () => new Promise((resolve) => setTimeout(resolve));

async function write(model, signal) {
  const unknown = new Set([...prompt.value].filter((character) => !model.index.has(character)));
  const indices = [...prompt.value].filter((character) => model.index.has(character)).map((c) => model.index.get(c));
  show("writing", unknown.size ? `The model does not know ${[...unknown].join(" ")} and passes over it.` : "");
  if (indices.length === 0) return show("done", "Type something for it to go on from.");

  const start = performance.now();
  let breathed = start;
  for (let count = 1; count <= LENGTH; count++) {
    const next = draw(await model.next(indices), temperature.valueAsNumber);
    if (signal.aborted) return;
    indices.push(next);
    element("continuation").append(model.characters[next]);
    const now = performance.now();
    element("rate").textContent = Math.round((1000 * count) / (now - start));
    if (now - breathed > FRAME) {
      await breathe();
      if (signal.aborted) return;
      breathed = performance.now();
    }
  }
  page.dataset.state = "done";
}

/** Starts to write, and starts over whenever the text or the temperature changes: one run at a time. */
function follow(model) {
  let running = Promise.resolve();
  let stop = new AbortController();
  const restart = () => {
    stop.abort();
    stop = new AbortController();
    const { signal } = stop;
    element("typed").textContent = prompt.value;
    element("continuation").textContent = "";
    element("rate").textContent = "–";
    element("temperature-value").textContent = temperature.valueAsNumber.toFixed(1);
    page.dataset.state = "writing";
    running = running.then(() => signal.aborted || write(model, signal)).catch(fail);
  };
  prompt.addEventListener("input", restart);
  temperature.addEventListener("input", restart);
  restart();
}

function fail(error) {
  show("failed", `It does not run: ${error.message}`);
  throw error;
}

const model = await loadModel("char_model.onnx").catch(fail);
showModel(model);
follow(model);
