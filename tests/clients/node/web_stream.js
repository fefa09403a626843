// A page that talks to ChatGLM-web-stream-demo's server, with the library that browsers POST event streams with.
import { fetchEventSource } from '@microsoft/fetch-event-source'

// all that it asks of a browser
globalThis.window = globalThis
globalThis.document = Object.assign(new EventTarget(), { hidden: false })

const headers = { 'Content-Type': 'application/json', 'Cache-Control': 'no-cache' }

/** The events of /stream, each with its name and parsed data. */
export async function stream(url, fields) {
  const events = []
  await fetchEventSource(`${url}/stream`, {
    method: 'POST',
    headers,
    body: JSON.stringify(fields),
    onmessage: ({ event, data }) => events.push({ event, data: JSON.parse(data) }),
    onerror: (error) => {
      throw error // else it would ask again
    },
  })
  return events
}

/** A whole conversation by /stream, the history of each answer going into the next question. */
export async function converse(url, queries) {
  let history = []
  const rounds = []
  for (const query of queries) {
    rounds.push(await stream(url, { query, history }))
    history = rounds.at(-1).at(-1).data.history
  }
  return rounds
}

/** The answer to any other request: its status and its JSON. */
export async function ask(url, path, fields) {
  const options = fields ? { method: 'POST', headers, body: JSON.stringify(fields) } : {}
  const response = await fetch(url + path, options)
  return { status: response.status, body: await response.json() }
}
