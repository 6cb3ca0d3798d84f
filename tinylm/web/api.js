// Requests to the service: streamed completions, and the live view.

import { askForKey, key } from "./key.js";

export class ServiceError extends Error {}

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
    if (response.status !== 401 || !ask || !(await askForKey(reason))) throw new ServiceError(reason);
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

/** Yield the chunks of `/v1/completions`. Aborting `signal` also ends the request on the server. */
export async function* completions(body, signal) {
  const response = await request("v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
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
