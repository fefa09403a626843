// Asks as docile-chatty does: axios, every network chunk taken for one event, 5 s without one are the end.
import axios from 'axios'

/** The answers to all requests, `atOnce` of them at a time: the `texts` of its events, `broken` chunks, an `error`. */
export async function ask(url, requests, atOnce) {
  const answers = []
  let next = 0
  async function askInTurn() {
    while (next < requests.length) {
      const mine = next++
      answers[mine] = await read(url, requests[mine])
    }
  }
  await Promise.all(Array.from({ length: atOnce }, askInTurn))
  return answers
}

async function read(url, { interruptAfter, ...fields }) {
  const answer = { texts: [], broken: [], error: null }
  try {
    const { data } = await axios.post(
      `${url}/generate`,
      { ...fields, stream: true },
      { timeout: 5000, responseType: 'stream' },
    )
    await new Promise((resolve, reject) => {
      data.on('data', (chunk) => {
        try {
          answer.texts.push(JSON.parse(chunk.toString().replace(/^data: /, '')).response)
        } catch {
          answer.broken.push(chunk.toString())
        }
        if (answer.texts.length === interruptAfter) axios.post(`${url}/interrupt`).catch(reject)
      })
      data.on('error', reject)
      data.on('end', resolve)
    })
  } catch (error) {
    answer.error = `${error.code}: ${error.message}`
  }
  return answer
}
