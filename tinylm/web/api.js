// Requests to the service: streamed completions, and questions with one JSON answer.

import { askForKey, key } from "./key.js";

export class ServiceError extends Error {
  /** `status` of the response, and the seconds after which the service wants the request again, if it says so. */
  constructor(message, status = 0, retryAfter_s = null) {
    super(message);
    Object.assign(this, { status, retryAfter_s });
  }
}

/** Return the response to a request. Throw ServiceError if it fails. `ask` for a key if the service needs one. */
async function request(path, options = {}, ask = true) {
  for (;;) {
    const headers = { ...options.headers };
    if (key()) headers.Authorization = `Bearer ${key()}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError("The service does not answer.");
    }
    if (response.ok) return response;
    const reason = await errorOf(response);
    if (response.status !== 401 || !ask || !(await askForKey(reason))) {
      const wait = response.headers.get("Retry-After");
      throw new ServiceError(reason, response.status, wait === null ? null : Number(wait));
    }
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The service answered with status ${response.status}.`;
  }
}

/** Return the JSON at a path. */
export async function get(path, ask) {
  return (await request(path, {}, ask)).json();
}

/** Send a JSON body to a path, and return the response. */
function send(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** Return the JSON that answers a JSON body. */
export async function post(path, body) {
  return (await send(path, body)).json();
}

/** Yield the chunks of `/v1/completions`. Aborting `signal` also ends the request on the server.
    `onStart` gets the response before the first chunk. */
export async function* completions(body, signal, onStart) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("v1/completions", whole, signal);
  onStart?.(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServiceError(chunk.error.message);
    yield chunk;
  }
  throw new ServiceError("The answer ended too early.");
}

/** Yield the data of each server-sent event in a stream of bytes. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
