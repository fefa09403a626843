// OpenAI's own client for Node. Every function returns what a program would see, as JSON.
import OpenAI from 'openai'

const clientAt = (url) =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: 'anything', maxRetries: 0, defaultHeaders: { 'Accept-Language': 'en' } })

const completionsAt = (url) => clientAt(url).chat.completions

export async function models(url) {
  const names = []
  for await (const model of clientAt(url).models.list()) names.push(model.id)
  return names
}

export const model = (url, name) => clientAt(url).models.retrieve(name)
export const chat = (url, fields) => completionsAt(url).create(fields)
export const complete = (url, fields) => clientAt(url).completions.create(fields)
export const embed = (url, fields) => clientAt(url).embeddings.create(fields)
export const respond = (url, fields) => clientAt(url).responses.create(fields)

/** The chunks of a stream, and the error that ended it or null. */
export async function chatStream(url, fields) {
  return collect(await completionsAt(url).create({ ...fields, stream: true }))
}

export async function completeStream(url, fields) {
  return collect(await clientAt(url).completions.create({ ...fields, stream: true }))
}

async function collect(stream) {
  const chunks = []
  try {
    for await (const chunk of stream) chunks.push(chunk)
  } catch (error) {
    return { chunks, error: facts(error) }
  }
  return { chunks, error: null }
}

/** The completion that the helper for streams puts together. */
export const streamHelper = (url, fields) => completionsAt(url).stream(fields).finalChatCompletion()

/** Lets the client call a tool and go on with the result until there is a text. */
export async function runTools(url, fields) {
  const asked = []
  const get_weather = ({ city }) => {
    asked.push(city)
    return `${city}：晴`
  }
  const parameters = { type: 'object', properties: { city: { type: 'string' } } }
  const tool = { name: 'get_weather', description: '天气', parameters, parse: JSON.parse, function: get_weather }
  const runner = completionsAt(url).runTools({ ...fields, tools: [{ type: 'function', function: tool }] })
  return { text: await runner.finalContent(), asked, roles: runner.messages.map(({ role }) => role) }
}

/** Leaves when the first text has come; returns that text. */
export async function leave(url, fields) {
  const controller = new AbortController()
  const stream = await completionsAt(url).create({ ...fields, stream: true }, { signal: controller.signal })
  let text = ''
  for await (const chunk of stream) {
    text += chunk.choices[0].delta.content
    if (text) controller.abort()
  }
  return text
}

/** The error that one of these functions ends with. */
export async function failure(name, ...args) {
  try {
    await calls[name](...args)
  } catch (error) {
    return facts(error)
  }
  throw new Error(`${name} did not fail`)
}

const calls = { model, chat, complete, respond }

function facts(error) {
  const { status, code, param, type, message } = error
  return { kind: error.constructor.name, isAPIError: error instanceof OpenAI.APIError, status, code, param, type, message }
}
