// The server's own protocol: POST /generate as a stream, POST /interrupt.
import { EventSourceParserStream } from "/web/vendor/eventsource-parser/stream.js";

const LONGEST = 2 ** 31 - 1; // tokens; the server takes its own limit where that is less

// What the server says of a failure, in the user's language.
export class Refused extends Error {}

// Yields the whole answer so far, as often as there is more of it. fields: those of /generate; started(id): what
// interrupt() takes. Throws Refused, or what fetch throws when the connection fails.
export async function* generate(fields, signal, started) {
  const response = await fetch("/generate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    // max_length: what is left out is 2048, however much the server and its model can do
    body: JSON.stringify({ max_length: LONGEST, ...fields, stream: true }),
    signal,
  });
  if (!response.ok) {
    throw new Refused((await response.json()).message);
  }
  started(response.headers.get("X-Request-Id"));
  const events = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream());
  const reader = events.getReader(); // Safari cannot iterate over streams
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    const event = JSON.parse(next.value.data);
    yield event.response;
    if (event.success === false) {
      throw new Refused(event.message);
    }
  }
}

// The stream of the answer then ends by itself, with all that was said.
export function interrupt(id) {
  return fetch("/interrupt", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ id }),
  });
}
