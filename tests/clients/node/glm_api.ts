// A client of GLM-API after the TypeScript example in its README, in words of our own: the address from the environment,
// axios, messages made into a prompt and one flat list of questions and answers, a stream by `responseType`. The example
// stops at the raw stream; reading it is ours.
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'

import axios, { type AxiosRequestConfig } from 'axios'

interface Message {
  role: 'system' | 'user' | 'assistant'
  content: string
}

interface ChatRequest {
  prompt: string
  history?: string[][]
  max_length?: number
  top_p?: number
  temperature?: number
}

interface ChatResponse {
  content: string
  prompt_tokens: number
  completion_tokens: number
  total_tokens: number
  model: string
  object: 'chat.completion'
}

async function post<T>(path: string, body: object, config: AxiosRequestConfig): Promise<T> {
  const { data } = await axios.post<T>(`${process.env.GLM_API as string}${path}`, body, config)
  return data
}

function chatRequest(messages: Message[]): ChatRequest {
  const rounds: string[] = []
  let prompt = ''
  for (const { role, content } of messages) {
    if (role === 'assistant') {
      rounds.push(prompt, content)
      prompt = ''
    } else {
      prompt += content + '\n'
    }
  }
  return rounds.length ? { prompt, history: [rounds] } : { prompt }
}

export async function chat(messages: Message[], options: Partial<ChatRequest> = {}): Promise<ChatResponse> {
  return post('/chat', { ...chatRequest(messages), ...options }, { responseType: 'json' })
}

export async function chatStream(messages: Message[], options: Partial<ChatRequest> = {}): Promise<ChatResponse[]> {
  const body = { ...chatRequest(messages), ...options }
  const stream = await post<Readable>('/chat-stream', body, { responseType: 'stream' })
  const events: ChatResponse[] = []
  for await (const line of createInterface({ input: stream })) {
    if (line.startsWith('data: ')) events.push(JSON.parse(line.slice('data: '.length)))
  }
  return events
}

export async function tokenize(prompt: string): Promise<{ tokenIds: number[]; tokens: string[] }> {
  return post('/tokenize', { prompt, max_length: 4096 }, {})
}

export async function embedding(prompt: string[]): Promise<{ data: number[][]; model: string; object: 'embedding' }> {
  return post('/embedding', { prompt }, {})
}
